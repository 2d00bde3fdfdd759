"Assignments: what students get is committed, complete and without solutions; what they hand in gets the points it should."
import csv, json, os, re, subprocess, sys, time, unicodedata, zipfile
from pathlib import Path

import pytest

from sdpo_nb import __version__
from sdpo_nb.checks import check_dpo_loss, report
from sdpo_nb.course import (
    Grade, Question, asking, assignment_of, build, check_marks, definitions, feedback, given_imports, grade,
    grade_one, gradescope, leaks, load_checks, main, questions, read_marks, read_notebook, split_solution, student_version,
    text_of, try_check, write_grades
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

    with open(tmp_path / "grades.csv", newline="", encoding="utf-8-sig") as f: rows = {row["student"]: row for row in csv.DictReader(f)}
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
    with open(tmp_path / "grades.csv", newline="", encoding="utf-8-sig") as f: rows = list(csv.DictReader(f))
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
        "%%bash\nthis is no Python",
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
    run = run.replace("cd /autograder", f"cd {tmp_path}").replace("/opt/grader/bin/python", sys.executable)
    def ran():
        done = subprocess.run(["bash", "-c", run], capture_output=True, text=True)
        return done, json.loads((tmp_path / "results/results.json").read_text())
    done, results = ran()
    assert done.returncode == 0, done.stderr
    assert [test["score"] for test in results["tests"]] == [4, 0, 2, 3, 4]
    assert [test["max_score"] for test in results["tests"]] == [4, 4, 2, 3, 4]
    assert "beta is missing" in results["tests"][1]["output"]
    (tmp_path / "submission/a1.ipynb").rename(tmp_path / "submission/a1.pdf")
    done, results = ran()
    assert done.returncode == 1 and results == dict(score=0, output="could not be graded: submission: there is no notebook here")


def test_a_name_with_a_blank_reaches_gradescope_whole(tmp_path):
    master = save(master_of("a1"), tmp_path / "my a1.ipynb")
    with zipfile.ZipFile(gradescope(master, tmp_path / "a1.zip")) as z: assert "source/'my a1.ipynb' " in z.read("run_autograder").decode()


def test_try_check_prints_and_goes_on(capsys):
    try_check(check_dpo_loss, lambda c, r, rc, rr, beta: c, seed=77)
    assert capsys.readouterr().out.rstrip().endswith("seed=77. Try: gain 0.6, beta 0.5 give 0.554.")
    try_check(check_dpo_loss, lambda *all: None)
    assert "nothing yet" in capsys.readouterr().out


def code_cell(text): return dict(cell_type="code", metadata={}, outputs=[], source=text)

SEVEN = "predictions = dict(first_loss={}, loss=0.127, weight=0.119, settles=4.39, nearer=4, farther_sgd=4, farther_adam=0)"

@pytest.mark.parametrize("before,value", [
    ("from math import log", "log(2)"), ("import numpy as np", "np.log(2)"), ("import torch", "torch.log(torch.tensor(2.)).item()"),
    ("import torch.nn.functional as F, torch", "-F.logsigmoid(torch.tensor(0.)).item()"),
])
def test_right_answers_in_other_words_are_read(before, value, ask):
    if "numpy" in before: pytest.importorskip("numpy")
    assignment = assignment_of(master_of("a1"))
    got = grade_one("x", notebook(before, SEVEN.format(value)), assignment, ask)
    assert got.points["q5"] == 4, got.said["q5"]
    assert not any("predictions" in flag for flag in got.flags)


def test_what_is_meant_for_jupyter_takes_nothing_along():
    for text in ("%%time\n{}", "\n%%capture out\n{}", "torch.gather?\n{}", "?torch.gather\n{}", "files = !ls\n{}", "%time f()\n{}", "!ls\n{}"):
        assert definitions(notebook(text.format("x = 1\ndef f(x): return 1"))) == (["x = 1", "def f(x):\n    return 1"], []), text
    for text in ("%%writefile f.py\ndef f(): pass", "%%timeit\ndef f(): pass"): assert definitions(notebook(text)) == ([], [])


@pytest.mark.parametrize("line", [
    "f['a'] = 0.693", "f.update(a=1)", "f |= dict(a=1)", "f = train()", "if True:\n    def f(): pass", "for i in g: f[i] = 1", "f.a = 2", "f, g = h()",
])
def test_no_line_about_an_answer_is_lost_without_a_word(line):
    kept, remarks = definitions(notebook("f = dict(a=...)", line), asked={"f"})
    assert kept == ["f = dict(a=...)"]
    (remark,) = remarks
    assert remark == f"code cell 2: a line about f was not read: {' '.join(line.split())}"
    assert definitions(notebook("print(f)", "try_check(check, f)", line), asked={"g_"})[1] == []
    assert definitions(notebook("print(f)", "try_check(check, f)"), asked={"f"})[1] == []


def test_a_name_that_is_missing_is_flagged(ask):
    no_imports = [text for text in solved_a1() if "import" not in text]
    got = grade_one("x", notebook(*no_imports), assignment_of(master_of("a1")), ask)
    assert got.points["q2"] == 0 and any(flag.startswith("q2: ") and "NameError" in flag for flag in got.flags)


BROKEN = dict(
    deep=json.dumps(notebook("x = " + " + ".join(["1"] * 5000))),
    minus=json.dumps(notebook("x = " + "-" * 3000 + "1")),
    null=json.dumps(dict(cells=[code_cell([None])])),
    number=json.dumps(dict(cells=[code_cell([1])])),
    brackets="[" * 200_000,
)

def test_a_broken_submission_costs_nobody_else_a_point(tmp_path):
    for name, text in BROKEN.items(): (tmp_path / f"{name}.ipynb").write_text(text)
    (tmp_path / "mark.ipynb").write_text(json.dumps(notebook(*solved_a1())), encoding="utf-8-sig")
    grades = {g.student: g for g in grade(MASTERS / "a1.ipynb", tmp_path, limit=LIMIT, say=lambda line: None)}
    assert grades["mark"].total == 17
    for name in BROKEN: assert grades[name].total == 0 and grades[name].flags, name
    for name in ("null", "number"): assert grades[name].flags == [f"cannot be graded: {tmp_path}/{name}.ipynb: is no notebook (a cell has no text)"]


def test_what_nobody_has_foreseen_costs_nobody_else_a_point(tmp_path, monkeypatch):
    def stumbles(student, *all):
        if student == "a": raise IndexError("list index out of range")
        return Grade(student, dict(q1=4))
    monkeypatch.setattr("sdpo_nb.course.grade_one", stumbles)
    for name in "ab": save(notebook("x = 1"), tmp_path / f"{name}.ipynb")
    a, b = grade(MASTERS / "a1.ipynb", tmp_path, say=lambda line: None)
    assert (a.total, a.flags, b.total) == (0, ["cannot be graded: list index out of range"], 4)


def test_names_of_all_spellings(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sdpo_nb.course.grade_one", lambda student, *all: Grade(student, flags=["x = '\ud800'"]))
    (tmp_path / "in").mkdir()
    two_signs = unicodedata.normalize("NFD", "Zo\u00eb")
    for name in (b"M\x81ller.ipynb", f"{two_signs}.ipynb".encode(), b"M\x81.txt"):
        try: save(notebook("x = 1"), tmp_path / "in" / os.fsdecode(name))
        except OSError: pytest.skip("this file system has no such names")
    (tmp_path / "marks.csv").write_text("student,q5\nZo\u00eb,1\n", encoding="utf-8")
    files = ["--csv", str(tmp_path / "new/g.csv"), "--feedback", str(tmp_path / "out/pages"), "--manual", str(tmp_path / "marks.csv")]
    main(["grade", str(MASTERS / "a2.ipynb"), str(tmp_path / "in"), *files])
    capsys.readouterr().out.encode("utf-8")
    text = (tmp_path / "new/g.csv").read_text(encoding="utf-8-sig")
    assert [line.split(",")[0] for line in text.splitlines()] == ["student", r"M\x81ller", "Zo\u00eb"]
    assert len(list((tmp_path / "out/pages").glob("*.md"))) == 2


def test_two_files_of_one_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sdpo_nb.course.asking", no_server)
    for place in ("anna/a1.ipynb", "anna_a1.ipynb"): save(notebook("x = 1"), tmp_path / place)
    with pytest.raises(ValueError, match="anna/a1.ipynb and .*anna_a1.ipynb would both be 'anna_a1'"): grade(MASTERS / "a1.ipynb", tmp_path)


@pytest.mark.parametrize("text,marks", [
    ("student, q6\nalice, 2\n", dict(alice=dict(q6=2))),
    ("student;q6\nalice;2,5\nbob;\n;\n", dict(alice=dict(q6=2.5), bob={})),
    ('student,q6,\nalice,"2,5",\n', dict(alice=dict(q6=2.5))),
    ("student,q6\n" + unicodedata.normalize("NFD", "Zo\u00eb") + ",2\n", {"Zo\u00eb": dict(q6=2)}),
    ("student,q6\nalice,2,5\n", "student alice: more fields than columns; write 2.5, not 2,5"),
    ("student,q6\nalice,2\nalice,\n", "student alice is there twice"),
    ("student,q6\nalice,nan\n", "alice, q6: nan is not between 0 and 3"),
    ("name,q6\nalice,2\n", "m.csv: has no column 'student'"), ("\n", "m.csv: has no column 'student'"),
    ("student,q6\nM\u00fcller,2\n".encode("cp1252"), "m.csv: is not UTF-8; in Excel, save it as 'CSV UTF-8'"),
])
def test_marks_as_spreadsheets_write_them(text, marks, tmp_path):
    path = tmp_path / "m.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if isinstance(marks, dict): assert read_marks(path) == marks
    else:
        with pytest.raises(ValueError, match=re.escape(marks)): check_marks(read_marks(path), ["alice"], [Question("q6", 3)])


@pytest.mark.parametrize("line", [
    "#| question q1 4 check_it it ", "#| question q1  4 check_it it", "#| question q1 2.5 check_it it", "#|question q1 4 check_it it",
    "<!-- question q6 2.5 manual -->", "<!-- question q6 3 manual-->", "  #| question q1 4 check_it it", "#| Question q1 4 check_it it",
])
def test_what_is_nearly_a_question_is_an_error(line):
    master = notebook("#| question q9 1 check_z z", f"import math\n{line}\nmath")
    for reads in (questions, student_version):
        with pytest.raises(ValueError, match=re.escape(repr(line)) + " is no question; write it exactly as '#. question .*' or '<!-- question"): reads(master)


TENSORS = """
def ipo(gt, gr, beta):
    import torch
    torch.Tensor.double = lambda s, *a, **k: torch.zeros(s.shape, dtype=torch.float64)
    return 0 * gt
"""
CROOKED = """
def ipo(gt, gr, beta):
    import sys
    exercise = sys.modules["sdpo_nb." + "checks"].EXERCISES["ipo"]
    exercise.crooked = lambda gt, gr, beta, wrong=(): 0 * gt
    return 0 * gt
"""
NO_EDGES = """
def predictions():
    import sys
    sys.modules["sdpo_nb." + "checks"].EXERCISES["predictions"].edges.clear()
    return dict.fromkeys(("first_loss", "loss", "weight", "settles", "nearer", "farther_sgd", "farther_adam"), 1)
"""

@pytest.mark.parametrize("text,name", [(TENSORS, "q4"), (CROOKED, "q4"), (NO_EDGES, "q5")])
def test_tools_of_a_check_are_watched(text, name, ask):
    got = grade_one("x", notebook(text), assignment_of(master_of("a1")), ask)
    assert got.points[name] == 0 and "changes the check" in got.said[name]


STOPS_THE_CLOCK = """
def sequence_logps(*all):
    import faulthandler
    faulthandler.cancel_dump_traceback_later()
    while True: pass
"""
STOPS_THE_SERVER = """
def sequence_logps(*all):
    import faulthandler, os, signal, time
    faulthandler.cancel_dump_traceback_later()
    os.kill(os.getppid(), signal.SIGSTOP)
    time.sleep(10**6)
"""

@pytest.mark.parametrize("text", [STOPS_THE_CLOCK, STOPS_THE_SERVER])
def test_grading_goes_on_whatever_a_submission_does_to_the_clock(text):
    q1, *_, q5, _ = questions(master_of("a1"))
    with asking(limit=3) as ask:
        ask([], q1)                     # wakes the server
        begun = time.monotonic()
        assert ask([text], q1) == (False, "no answer within 3 seconds")
        assert time.monotonic() - begun < 20
        assert ask([SEVEN.format(0.693)], q5)[0]


def test_nobody_waits_for_input(ask):
    begun = time.monotonic()
    _, told = ask(["def ipo(*all): return input()"], questions(master_of("a1"))[3])
    assert "EOFError" in told and time.monotonic() - begun < LIMIT / 2


def test_a_teachers_own_check_that_cannot_be_called(tmp_path, capfd):
    own, handed_in = tmp_path / "own.py", save(with_words(notebook(*solved_a1())), tmp_path / "in/x.ipynb")
    own.write_text("def check_ipo(f): assert callable(f)\n")
    with pytest.raises(ValueError, match=r"own.py: check_ipo is called as check_ipo\(value, seed\): too many"): load_checks(str(own))
    with pytest.raises(ValueError, match="the checks could not be loaded"): grade(MASTERS / "a1.ipynb", handed_in, str(own), LIMIT, say=lambda line: None)
    assert "check_ipo is called as" in capfd.readouterr().err
    own.write_text("print('hello')\ndef check_ipo(f, seed=None): return f.nothing\n")
    (got,) = grade(MASTERS / "a1.ipynb", handed_in, str(own), LIMIT, say=lambda line: None)
    assert got.total == 14
    assert got.flags == ["q4: the check stopped with AttributeError: 'function' object has no attribute 'nothing'"]


def test_a_place_that_cannot_be_written_is_told_before_anything_is_graded(tmp_path, monkeypatch):
    monkeypatch.setattr("sdpo_nb.course.asking", no_server)
    handed_in = save(notebook(*solved_a1()), tmp_path / "in/x.ipynb")
    (tmp_path / "file").write_text("")
    for option in ("--csv", "--results", "--feedback"):
        with pytest.raises(SystemExit, match="file"): main(["grade", str(MASTERS / "a1.ipynb"), str(handed_in), option, str(tmp_path / "file/g.csv")])
    with pytest.raises(SystemExit, match="in"): main(["grade", str(MASTERS / "a1.ipynb"), str(handed_in), "--csv", str(tmp_path / "in")])
    with pytest.raises(AssertionError, match="nothing should"): main(["grade", str(MASTERS / "a1.ipynb"), str(handed_in), "--csv", str(tmp_path / "deep/er/g.csv")])
    assert (tmp_path / "deep/er").is_dir() and not (tmp_path / "deep/er/g.csv").exists()
