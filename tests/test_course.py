"Assignments: what students get is committed, complete and without solutions; what they hand in gets the points it should."
import csv, json, re, subprocess, sys, time, zipfile
from pathlib import Path

import pytest

from sdpo_nb import __version__
from sdpo_nb.checks import check_dpo_loss, report
from sdpo_nb.course import (
    asking, assignment_of, build, definitions, feedback, given_imports, grade, grade_one, gradescope, leaks, main,
    questions, read_marks, read_notebook, split_solution, student_version, text_of, try_check, write_grades
)

ROOT = Path(__file__).parent.parent
MASTERS, ASSIGNMENTS = ROOT / "nbs/course", ROOT / "nbs/assignments"
NAMES = ("a1", "a2", "a3", "a4")
AUTOMATIC = dict(a1=17, a2=16, a3=18, a4=15)    # points that checks give; the rest of 20 is marked by hand
LIMIT = 20                                      # seconds for a question: the slowest right one takes three


def master_of(name): return read_notebook(MASTERS / f"{name}.ipynb")

def code_cells(nb): return [text_of(cell) for cell in nb["cells"] if cell["cell_type"] == "code"]

def save(nb, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(nb))
    return path

def notebook(*texts):
    cells = [dict(cell_type="code", metadata={}, outputs=[], execution_count=None, source=text, id=f"c{i}") for i, text in enumerate(texts)]
    return dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)

def prose(text, i=0): return dict(cell_type="markdown", metadata={}, source=text, id=f"p{i}")

def with_words(nb, words="It cancels."):
    "A submission of assignment 1 with question 6 answered, as a student does it."
    cell = next(cell for cell in read_notebook(ASSIGNMENTS / "a1.ipynb")["cells"] if "question q6" in text_of(cell))
    answer = "\n".join(words if line == "..." else line for line in text_of(cell).splitlines())
    return dict(nb, cells=[*nb["cells"], prose(answer)])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_is_what_build_makes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = build(MASTERS, Path("nbs/assignments"))
    assert [path.stem for path in made] == list(NAMES)
    assert (tmp_path / f"nbs/assignments/{name}.ipynb").read_bytes() == (ASSIGNMENTS / f"{name}.ipynb").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_students_version(name):
    master, student = master_of(name), read_notebook(ASSIGNMENTS / f"{name}.ipynb")
    text = "\n".join(map(text_of, student["cells"]))
    assert leaks(master, student) == []
    assert not re.search("SOLUTION|#. teacher|<!-- teacher|Marking:", text)
    assert not any(cell.get("outputs") for cell in student["cells"])
    assert 12 <= len(student["cells"]) <= 20

    assert sum(q.points for q in questions(master)) == 20
    assert sum(q.points for q in questions(master) if q.check) == AUTOMATIC[name]
    assert [q.name for q in questions(student)] == [q.name for q in questions(master)]
    listed = re.search(r'report\(globals\(\), """\n(.*)\n"""\)\s*$', text, re.S).group(1).splitlines()
    assert [line.split() for line in listed] == [[q.name, str(q.points), *([q.check, q.target] if q.check else ["manual"])] for q in questions(master)]
    for wanted in (f"nbs/assignments/{name}.ipynb)", "Save a copy in Drive", "**Goal.**", "reading", "Change runtime type", f"@v{__version__}", f'"{__version__}"'):
        assert wanted in text, wanted


def test_a_badly_stripped_master_is_not_built(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for spoil, told in (
        (lambda text: text.replace("    ### BEGIN SOLUTION\n", ""), "without its partner"),
        (lambda text: text + "\n\ndef draft(beta, gain):\n    return -F.logsigmoid(beta*gain)", "left in the student's version: return -F.logsigmoid(beta * gain)"),
    ):
        master = master_of("a1")
        cell = next(cell for cell in master["cells"] if "def dpo_loss" in text_of(cell))
        cell["source"] = spoil(text_of(cell))
        save(master, tmp_path / "masters/a1.ipynb")
        with pytest.raises(SystemExit) as stopped: main(["build", "masters", "out"])
        assert told in str(stopped.value)
        assert not Path("out").exists()


def test_a_folder_outside_the_repository_has_no_badge(tmp_path, monkeypatch):
    here, outside = tmp_path / "repository", tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    for out in (outside, Path("../elsewhere")):
        with pytest.raises(ValueError, match="is outside .* so Colab cannot find it; .*--repository ''"): build(MASTERS, out)
        assert not outside.exists()
    build(MASTERS, here / "nbs/assignments")         # absolute, but inside
    assert (here / "nbs/assignments/a1.ipynb").read_bytes() == (ASSIGNMENTS / "a1.ipynb").read_bytes()
    build(MASTERS, outside, repository="")
    assert "colab.research" not in (outside / "a1.ipynb").read_text()


def test_what_is_not_there_is_said_plainly(tmp_path):
    (tmp_path / "empty").mkdir()
    for call, told in (
        (lambda: build(tmp_path / "none", tmp_path, ""), "none: there is no such folder"),
        (lambda: build(tmp_path / "empty", tmp_path, ""), "empty: there is no notebook here"),
        (lambda: grade(tmp_path / "a9.ipynb", tmp_path), "a9.ipynb: there is no such file$"),
        (lambda: grade(MASTERS / "a1.ipynb", tmp_path / "none"), "none: there is no such file or folder"),
        (lambda: grade(MASTERS / "a1.ipynb", tmp_path / "empty"), "empty: there is no notebook here"),
    ):
        with pytest.raises(ValueError, match=told): call()


def test_the_report_of_a_student_counts_all_questions():
    "Run as a student does who has run no cell of a check: of 20, and every question has a row."
    for name in NAMES:
        cell = code_cells(read_notebook(ASSIGNMENTS / f"{name}.ipynb"))[-1]
        space = dict(report=report, In=[cell])
        exec(cell.replace("report(globals()", "table = report(globals()"), space)
        assert space["table"]["of"].sum() == 20
        assert list(space["table"].index) == [q.name for q in questions(master_of(name))]


def test_outputs_leak_too():
    master = notebook("def f():\n    ### BEGIN SOLUTION\n    return 12345678901234\n    ### END SOLUTION")
    student = student_version(master)
    assert leaks(master, student) == []
    student["cells"][0]["outputs"] = [dict(output_type="stream", name="stdout", text="return 12345678901234")]
    assert leaks(master, student)


def test_a_solution_within_a_line():
    given, hidden = split_solution("    x=math.log(2), ### SOLUTION x=...,")
    assert given == ["    x=...,"]
    assert hidden == ["    x=math.log(2), "]


@pytest.fixture(scope="module")
def ask():
    "One server for all tests that do not kill it."
    ready = {module for name in NAMES for module, _ in given_imports(master_of(name))}
    with asking(limit=LIMIT, ready=sorted(ready)) as ask: yield ask


@pytest.mark.parametrize("name", NAMES)
def test_solved_gets_all_points_and_a_stub_none(name, ask):
    solved = grade_one("solved", master_of(name), assignment_of(master_of(name)), ask)
    assert solved.total == AUTOMATIC[name], solved.said
    assert solved.flags == []
    handed_out = grade_one("stubs", read_notebook(ASSIGNMENTS / f"{name}.ipynb"), assignment_of(master_of(name)), ask)
    assert handed_out.total == 0
    for q in questions(master_of(name)):
        if q.check: assert "nothing yet" in handed_out.said[q.name]
        else: assert handed_out.points[q.name] is None


def solved_a1(**changed):
    "A submission of assignment 1: all solved but for these cells, by the name of the function."
    cells = []
    for text in code_cells(student_version_with_solutions("a1")):
        name = next((n for n in changed if f"def {n}(" in text or text.startswith(f"{n} = ")), None)
        cells.append(changed[name] if name else text)
    return cells

def student_version_with_solutions(name):
    master = master_of(name)
    cells = [cell for cell in master["cells"] if not text_of(cell).startswith("#| teacher")]
    return dict(master, cells=cells)

BETA_LESS = """
def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    return -F.logsigmoid((chosen - rejected) - (ref_chosen - ref_rejected))
"""
PACKAGE = "from sdpo_nb import loss\ndef dpo_loss(c, r, rc, rr, beta): return loss.dpo_loss(c - r, rc - rr, beta)"
PATCHED_CELL = "import sdpo_nb.checks\nsdpo_nb.checks.run_check = lambda *a: 1\nsdpo_nb.mistakes.find_mistakes = lambda *a: ()"
PATCHED_INSIDE = """
def dpo_loss(*all):
    import sdpo_nb.mistakes as m
    m.find_mistakes = lambda *a: ()
    m._is_at_edge = lambda *a: False
    return all[0]
"""
PATCHED_NAMES = """
def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    import sdpo_nb.checks as c
    c.run_check = c.find_mistakes = lambda *a: 1
    gain = (chosen - rejected) - (ref_chosen - ref_rejected)
    return -F.logsigmoid(beta * gain)
"""

def submitted():
    "name -> submission, points of 17, what is said or flagged somewhere."
    stubs = code_cells(read_notebook(ASSIGNMENTS / "a1.ipynb"))
    return dict(
        right=(solved_a1(), 17, ""),
        beta_less=(solved_a1(dpo_loss=BETA_LESS), 13, "beta is missing"),
        empty=(stubs, 0, "nothing yet"),
        package=(solved_a1(dpo_loss=PACKAGE), 13, "the import of sdpo_nb was left out"),
        syntax=(solved_a1(gradient="def gradient(gamma_theta, gamma_ref, beta)\n    return 1"), 15, "does not parse"),
        renamed=(solved_a1(gradient="def slope(gamma_theta, gamma_ref, beta): return -beta"), 15, "gradient is not defined"),
        endless=(solved_a1(gradient="def gradient(*all):\n    while True: pass"), 15, "no answer within"),
        stray_raise=(["raise SystemExit", *solved_a1(), "raise ValueError('stop')"], 17, ""),
        long_training=(["for step in range(10**12): pass", *solved_a1()], 17, ""),
        patched_cell=([*stubs, PATCHED_CELL], 0, "nothing yet"),
        patched_inside=(solved_a1(dpo_loss=PATCHED_INSIDE), 13, "changes the check"),
        patched_names=(solved_a1(dpo_loss=PATCHED_NAMES), 13, "changes the check"),
    )

def test_submissions_of_all_kinds(tmp_path):
    expected = submitted()
    for name, (cells, _, _) in expected.items(): save(with_words(notebook(*cells)), tmp_path / f"in/{name}.ipynb")
    (tmp_path / "marks.csv").write_text("student,q6\nright,2.5\nempty,0\n")

    command = [sys.executable, "-m", "sdpo_nb.course", "grade", MASTERS / "a1.ipynb", tmp_path / "in", "--csv", tmp_path / "grades.csv"]
    options = ["--feedback", tmp_path / "out", "--limit", "6", "--manual", tmp_path / "marks.csv"]
    done = subprocess.run([*map(str, command + options)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert len(done.stdout.splitlines()) == len(expected) # one line a student

    with open(tmp_path / "grades.csv", newline="") as f: rows = {row["student"]: row for row in csv.DictReader(f)}
    assert list(rows["right"]) == ["student", "q1", "q2", "q3", "q4", "q5", "q6", "total", "flags"]
    assert rows.keys() == expected.keys()
    for name, (_, points, told) in expected.items():
        automatic = sum(int(rows[name][f"q{i}"]) for i in range(1, 6))
        assert automatic == points, (name, rows[name])
        assert told in (tmp_path / f"out/{name}.md").read_text(), name
    assert rows["right"]["q6"] == "2.5" and rows["right"]["total"] == "19.5"
    assert rows["empty"]["q6"] == "0" and rows["renamed"]["q6"] == ""
    assert rows["endless"]["flags"] and rows["patched_inside"]["flags"] and rows["patched_names"]["flags"] and rows["syntax"]["flags"]
    assert not rows["right"]["flags"] and not rows["long_training"]["flags"]


def no_server(*all): raise AssertionError("nothing should have been graded")

@pytest.mark.parametrize("row,told", [("right,7", "right, q6: 7 is not between 0 and 3"), ("wrong,1", "no submission of 'wrong'"), ("right,x", "student right: ")])
def test_wrong_marks_are_told_before_anything_is_graded(row, told, tmp_path, monkeypatch):
    monkeypatch.setattr("sdpo_nb.course.asking", no_server)
    save(with_words(notebook(*solved_a1())), tmp_path / "in/right.ipynb")
    (tmp_path / "marks.csv").write_text(f"student,q6\n{row}\n")
    with pytest.raises(ValueError, match=told): grade(MASTERS / "a1.ipynb", tmp_path / "in", manual=tmp_path / "marks.csv")


def test_an_answer_in_words_is_found_wherever_it_stands():
    def ask(code, question): return True, "passed"
    def words_and_flags(change, stub=True):
        nb = read_notebook(ASSIGNMENTS / "a1.ipynb")
        at = next(i for i, cell in enumerate(nb["cells"]) if "question q6" in text_of(cell))
        change(nb["cells"], at)
        got = grade_one("x", nb, assignment_of(master_of("a1")), ask)
        return got.said["q6"], [flag for flag in got.flags if flag.startswith("q6")]
    def write(cells, at, mark=True):
        text = text_of(cells[at]).replace("\n...", "\nBoth answers have one prompt.")
        cells[at]["source"] = text if mark else text.split("\n", 1)[1]

    told, flags = words_and_flags(write)
    assert "Both answers have one prompt." in told and "3 manual -->" not in told and flags == []
    told, flags = words_and_flags(lambda cells, at: write(cells, at, mark=False))
    assert "Both answers have one prompt." in told and flags == ["q6: its first line is gone; it was found by its heading"]
    told, flags = words_and_flags(lambda cells, at: cells.insert(at + 1, prose("# My answer\nIt cancels.")))
    assert told.endswith("# My answer\nIt cancels.") and "new cell below" in flags[0]
    assert "Hand in" not in told
    told, flags = words_and_flags(lambda cells, at: None)
    assert flags == ["q6: nothing is written there"]
    told, flags = words_and_flags(lambda cells, at: cells.pop(at))
    assert told == "(the cell of this question is gone)" and "is gone" in flags[0]


def test_another_assignment_is_recognised(ask):
    got = grade_one("x", read_notebook(ASSIGNMENTS / "a2.ipynb"), assignment_of(master_of("a1")), ask)
    assert got.total == 0 and "it defines nothing that is asked for: is it 'Assignment 1: a loss from four numbers'?" in got.flags
    for nb in (read_notebook(ASSIGNMENTS / "a1.ipynb"), notebook("def ipo(*all): ...")):
        assert not any("asked for" in flag for flag in grade_one("x", nb, assignment_of(master_of("a1")), ask).flags)


def test_the_table_can_be_read_again_as_marks(tmp_path, ask):
    asked = questions(master_of("a1"))
    one = grade_one("a,b \"c\"", notebook(*solved_a1(dpo_loss=BETA_LESS)), assignment_of(master_of("a1")), ask)
    one.points["q6"] = 3
    write_grades([one], tmp_path / "grades.csv", asked)
    with open(tmp_path / "grades.csv", newline="") as f: rows = list(csv.DictReader(f))
    for row in rows: del row["total"], row["flags"]
    with open(tmp_path / "marks.csv", "w", newline="") as f:
        table = csv.DictWriter(f, rows[0])
        table.writeheader()
        table.writerows(rows)
    assert read_marks(tmp_path / "marks.csv") == {one.student: one.points}


def test_a_killed_server_is_started_again():
    asked = questions(master_of("a1"))
    kills = solved_a1(sequence_logps="def sequence_logps(*all):\n    import os, signal\n    os.kill(os.getppid(), signal.SIGKILL)\n    os._exit(0)")
    with asking(limit=LIMIT) as ask: points = grade_one("x", notebook(*kills), assignment_of(master_of("a1")), ask).points
    assert [points[q.name] for q in asked] == [0, 4, 2, 3, 4, None]


def test_private_checks(tmp_path):
    extra = tmp_path / "private.py"
    extra.write_text("def check_ipo(f, seed=None):\n    assert f.__name__ == 'ipo_of_alice', 'private: no'\n    return seed\n")
    points = grade(MASTERS / "a1.ipynb", save(notebook(*solved_a1()), tmp_path / "in/x.ipynb"), str(extra), LIMIT, say=lambda line: None)[0]
    assert points.points["q4"] == 0 and points.said["q4"] == "private: no"
    assert points.total == 14


def test_a_check_that_is_not_there_is_the_teachers_mistake(tmp_path):
    master = save(notebook("#| question q1 4 check_nothing f\n1"), tmp_path / "a.ipynb")
    with pytest.raises(ValueError, match="there is no check of the name check_nothing"): grade(master, master, say=lambda line: None)
    (tmp_path / "private.py").write_text("1 / 0")
    with pytest.raises(ValueError, match="the checks could not be loaded"): grade(MASTERS / "a1.ipynb", master, str(tmp_path / "private.py"), say=lambda line: None)


def test_what_is_kept_of_a_submission():
    given = given_imports(master_of("a4"))
    kept, remarks = definitions(notebook(
        "%matplotlib inline\n!pip install x\nimport torch, os\nfrom torch import nn\nimport torch.nn.functional as F",
        "%%time\nthis is no Python",
        "x = 3; y: float = -math.log(2); z = train(); a.b = 1; d = dict(q=[1, 2 * x]); u, v = 1, 2; u, a.b = 1, 2; w = lambda z: z",
        "print(1)\nclass A: pass\nwith open('f') as f: pass",
        "from sdpo_nb.stepwise import sdpo\nfrom sdpo_nb.loss import dpo_loss",
        "f(",
    ), given)
    assert kept == [
        "import torch", "from torch import nn", "import torch.nn.functional as F", "x = 3", "y: float = -math.log(2)",
        "d = dict(q=[1, 2 * x])", "u, v = (1, 2)", "w = lambda z: z", "class A:\n    pass", "from sdpo_nb.stepwise import sdpo",
    ]
    assert "code cell 6 does not parse" in remarks[0]
    assert remarks[1:] == ["the import of os was left out", "the import of sdpo_nb.loss was left out"]


def test_a_file_that_is_no_notebook_stops_nobody(tmp_path):
    save(notebook(*solved_a1()), tmp_path / "good/a1.ipynb")
    (tmp_path / "bad.ipynb").write_text("{}")
    (tmp_path / "notes.docx").write_text("my answers")
    (tmp_path / ".DS_Store").write_text("")
    said = []
    grades = {g.student: g for g in grade(MASTERS / "a1.ipynb", tmp_path, limit=LIMIT, say=said.append)}
    assert grades["good_a1"].total == 17
    assert grades["bad"].total == 0 and "is no notebook" in grades["bad"].flags[0]
    assert said[0] == "not notebooks, left out: notes.docx" and len(said) == 3
    page = feedback(grades["bad"], questions(master_of("a1")))
    assert page.count("##") == 1 and "## Remarks" in page       # no five empty sections
    assert feedback(grades["good_a1"], questions(master_of("a1"))).startswith("# good_a1: 17 of 20 points, without q6\n")


def test_gradescope(tmp_path):
    made = gradescope(MASTERS / "a1.ipynb", tmp_path / "a1.zip")
    with zipfile.ZipFile(made) as z:
        assert z.namelist() == ["setup.sh", "run_autograder", "a1.ipynb"]
        z.extractall(tmp_path / "source")
        run = z.read("run_autograder").decode()
    assert f"sdpo_nb@v{__version__}" in (tmp_path / "source/setup.sh").read_text()
    save(notebook(*solved_a1(dpo_loss=BETA_LESS)), tmp_path / "submission/a1.ipynb")
    (tmp_path / "results").mkdir()
    run = run.replace("cd /autograder", f"cd {tmp_path}").replace("python3", sys.executable)
    done = subprocess.run(["bash", "-c", run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results/results.json").read_text())
    assert [test["score"] for test in results["tests"]] == [4, 0, 2, 3, 4]
    assert [test["max_score"] for test in results["tests"]] == [4, 4, 2, 3, 4]
    assert "beta is missing" in results["tests"][1]["output"]


def test_try_check_prints_and_goes_on(capsys):
    try_check(check_dpo_loss, lambda c, r, rc, rr, beta: c, seed=77)
    assert capsys.readouterr().out.rstrip().endswith("seed=77. Try: gain 0.6, beta 0.5 give 0.554.")
    try_check(check_dpo_loss, lambda *all: None)
    assert "nothing yet" in capsys.readouterr().out
