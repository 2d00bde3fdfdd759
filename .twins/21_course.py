# %% [markdown]
# # Assignments, made and graded
# > A teacher keeps one solved notebook. The student's version and the grades are made from it.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/21_course.ipynb)
#
# **You should know** what [a check](19_mistakes.ipynb) is: a function that takes yours, and says what is wrong with it. **Time** two hours and a quarter to read with all its code, a minute to run. If you only want to
# use the assignments, read the last section, "How a teacher uses it", and nothing else.
#
# An assignment exists three times: as the students see it, with the solutions, and as something that gives points. When these are three files, they drift apart: a question is reworded in one
# of them and forgotten in the others. So we keep one file, the *master*: a notebook with all solutions in it, which runs. Two functions do the rest.
#
# ```
#                     build                         students write
#    master (solved) -------> student's version ---------------------> submissions
#          |                                                                |
#          '--------------------------- grade ------------------------------'--> points, feedback
# ```
#
# Both are small, and need nothing but Python's standard library. This chapter grows them on a master with two questions.

# %%
#| default_exp course

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    source = '"sdpo_nb @ git+https://github.com/sdpo-nb/sdpo_nb@v0.1.0"'
    get_ipython().run_line_magic("pip", f"install -q {source}")
again = "On Colab, choose Runtime > Disconnect and delete runtime, then run this cell again."
assert importlib.util.find_spec("sdpo_nb"), f"pip could not install sdpo_nb, see above. {again}"

import sdpo_nb
version = sdpo_nb.__version__
assert version == "0.1.0", f"This page is made for sdpo_nb 0.1.0, and {version} is installed. {again}"

# %%
#| export
import argparse, ast, copy, csv, faulthandler, importlib, importlib.util, inspect, io, json, os, re, shlex, signal
import subprocess, sys, tempfile, threading, time, unicodedata, zipfile
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

# %%
import math, shutil

from sdpo_nb.world import complaint

tmp = Path(tempfile.mkdtemp())


# %% [markdown]
# ## A master
#
# A notebook file is JSON: a list of cells, each with a kind and its text. So a small notebook can be typed. These two helpers do it, and show one:

# %%
def code(text): return dict(cell_type="code", metadata={}, outputs=[], execution_count=None, source=text)
def prose(text): return dict(cell_type="markdown", metadata={}, source=text)

def notebook(*cells):
    "A notebook of these cells."
    named = [dict(cell, id=f"c{i}") for i, cell in enumerate(cells)]
    return dict(cells=named, metadata={}, nbformat=4, nbformat_minor=5)

def show(nb):
    "The cells of a notebook, one under the other."
    for i, cell in enumerate(nb["cells"]): print(f"[{i} {cell['cell_type']}]\n{''.join(cell['source'])}\n")


# %% [markdown]
# (`nbformat` could do this, too. But a notebook that a grader reads may be broken in ways that a library refuses to open, so we stay with the JSON.)
#
# Our master asks two questions about the [DPO loss](03_loss.ipynb): one to program, one to answer in words. The last cell counts the points. Five marks say which part is what. Can you find them?

# %%
loss_cell = '''
def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    "(n,) each, nats -> (n,) the loss of each pair"
    ### BEGIN SOLUTION
    gain = (chosen - rejected) - (ref_chosen - ref_rejected)
    return -F.logsigmoid(beta * gain)
    ### END SOLUTION
'''.strip()
imports_cell = '''
import torch.nn.functional as F
from sdpo_nb.checks import check_dpo_loss
from sdpo_nb.course import try_check
'''.strip()
check_cell = "#| question q1 4 check_dpo_loss dpo_loss\ntry_check(check_dpo_loss, dpo_loss)"
last_cell = "from sdpo_nb.checks import report\nreport(globals())"
words_cell = '''
<!-- question q2 3 manual -->
Why does Z(x) cancel?

### BEGIN SOLUTION
It depends on the prompt only, and both responses of a pair answer the same prompt.
### END SOLUTION
'''.strip()

master = notebook(
    prose("# A loss\n<!-- badge -->"),
    code(imports_cell),
    code(loss_cell),
    code("#| teacher\nassert dpo_loss.__doc__"),
    code(check_cell),
    prose(words_cell),
    code(last_cell),
)


# %% [markdown]
# - `### BEGIN SOLUTION` and `### END SOLUTION`, in code or in text: what stands between them is for the teacher, and becomes `...`
# - `#| question q1 4 check_dpo_loss dpo_loss`, on top of the cell with the check: question q1 is worth 4 points, which `check_dpo_loss` gives to what is called `dpo_loss`.
# - `<!-- question q2 3 manual -->`: question q2 is worth 3 points, which a person gives.
# - `#| teacher`: the whole cell is for the teacher, and vanishes.
# - `<!-- badge -->`: here comes the button that opens the notebook in Colab.
#
# Why these marks, and not the metadata of cells, where other tools put them? A mark that is text is seen in every editor, survives every tool that cleans notebooks, and can be searched for. And the notebook runs as it stands, because each of them is a comment. So a master is tested like any chapter of this book.
#
# One line more is not a mark, but is changed for the students: `report(globals())`, at the end, gets the list of all questions. So it counts "of 7 points" also if a student has not run the cell of a check.
#
# A check raises an error where it objects. In a notebook this would stop *Run all* at the first question that is not answered yet. So the cell asks with `try_check`, which prints the sentence and goes on.

# %%
#| export
def try_check(
    check, # a function that raises where it objects
    value, # what the student wrote
    seed: int=None, # of the numbers; None: the check draws fresh ones
):
    "Call a check. What it objects to is printed, so that the cells below can run."
    settings = {} if seed is None else dict(seed=seed)
    try: check(value, **settings)
    except AssertionError as e: print(e)


# %% [markdown]
# It catches `AssertionError` and nothing else. A check that stops with another error is a mistake of ours, and should be seen.

# %%
from sdpo_nb.checks import check_dpo_loss

def nothing_yet(chosen, rejected, ref_chosen, ref_rejected, beta): ...

try_check(check_dpo_loss, nothing_yet)


# %% [markdown]
# Now, the questions of a master. They are read from the marks, in the order of the notebook, and become plain data: a name, points, a check, and the name of what it checks.

# %%
#| export
@dataclass(frozen=True)
class Question:
    "One question of an assignment."
    name: str        # q1, q2, ...
    points: int      # at most
    check: str = ""  # name of the function that gives them; empty where a person does
    target: str = "" # name of what the student writes

def text_of(
    cell: dict, # of a notebook
) -> str:
    "The text of a cell, which a file may hold as a list of lines."
    return "".join(cell["source"])

_ASKED = re.compile(r"#\| question (\w+) (\d+) (\w+) (\w+)|<!-- question (\w+) (\d+) manual -->")
_ALIKE = re.compile(r"^[ \t]*(?:#[ \t]*\||<!--)[ \t]*question\b.*", re.M | re.I)
_FORMS = "'#| question q1 4 check_it it' or '<!-- question q2 3 manual -->'"

def _questions(master):
    "The questions of a notebook, in order."
    found = []
    for cell in master["cells"]:
        for line in _ALIKE.findall(text_of(cell)):
            asked = _ASKED.fullmatch(line)
            if not asked: raise ValueError(f"{line!r} is no question; write it exactly as {_FORMS}, with whole points")
            q, points, check, target, by_hand, marks = asked.groups(default="")
            found.append(Question(q or by_hand, int(points or marks), check, target))
    return found

def questions(
    master: dict, # a notebook
) -> list[Question]:
    "The questions of a master, in order. Raises ValueError for a line that is nearly one, for two of one name, for none."
    found = _questions(master)
    names = [q.name for q in found]
    for name in names:
        if names.count(name) > 1: raise ValueError(f"question {name} is there twice")
    if not found: raise ValueError("no question; a check cell begins with '#| question q1 4 check_it it'")
    return found


# %%
for q in questions(master): print(q)

# %% [markdown]
# Two questions of one name would share a column in the table of grades, and one of them would get the points of both. That is easily done by copying a cell, so it is an error:

# %%
twice = notebook(code(check_cell), code(check_cell))
print(complaint(questions, twice))

# %% [markdown]
# A line that is only nearly a question, with half a point or a blank too many, must not be passed over either: nobody would miss the question until the points do not add up.

# %%
print(complaint(questions, notebook(prose(words_cell.replace("3", "2.5")))))

# %% [markdown]
# ## The student's version
#
# Inside a cell, the solution becomes `...`, with the indentation of its mark. A mark without its partner would leave half a solution, or swallow what comes after it. So that is an error. Where only a part of one line is the
# solution, the line carries its own replacement: `x = 0.5 ### SOLUTION x = ...`.

# %%
#| export
BEGIN, END, INLINE = "### BEGIN SOLUTION", "### END SOLUTION", "### SOLUTION"

def _split_line(line):
    "A line that ends with its own replacement: what a student sees, what is for the teacher."
    hidden, seen = line.split(INLINE)
    indent = hidden[:len(hidden) - len(hidden.lstrip())]
    return indent + seen.strip(), hidden

def split_solution(
    text: str, # of a cell of a master
) -> tuple[list[str], list[str]]: # lines that a student sees, lines that are for the teacher
    "Cut the solutions out of a cell, and leave `...`. Raises ValueError for a mark without its partner."
    given, hidden, inside = [], [], False
    for line in text.split("\n"):
        mark = line.strip()
        if mark == (BEGIN if inside else END): raise ValueError(f"'{mark}' without its partner")
        if INLINE in line:
            seen, own = _split_line(line)
            given.append(seen)
            hidden.append(own)
        elif mark == BEGIN: given.append(line.replace(BEGIN, "..."))
        elif mark != END: (hidden if inside else given).append(line)
        if mark in (BEGIN, END): inside = mark == BEGIN
    if inside: raise ValueError(f"'{BEGIN}' without its partner")
    return given, hidden


# %% [markdown]
# It returns both parts. The first is for the student; the second, which nobody should see, is what we will look for later. The cell with the loss, as it will be handed out:

# %%
given, hidden = split_solution(loss_cell)
assert len(hidden) == 2
print("\n".join(given))

# %% [markdown]
# What stays is Python that runs: `...` is a statement, so a function without a solution can be defined, and returns nothing. That is what lets a student press *Run all* before the first line is written. A replacement within a line, and a mark that has lost its partner:

# %%
given, hidden = split_solution("    first_loss=math.log(2), ### SOLUTION first_loss=...,")
given, hidden

# %%
cut_off = loss_cell.replace("    ### END SOLUTION", "")
print(complaint(split_solution, cut_off))

# %% [markdown]
# Now the whole notebook: solutions out, teacher's cells out, outputs out. An output may tell a solution, too: the value of `first_loss` under a cell is the answer to the question above it. The metadata stay as they are: a kernel that the master names, the student's version names, too. (The masters of this book name none. Colab and Jupyter take Python then.)

# %%
#| export
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})"

def _for_teacher(cell): return text_of(cell).startswith(("#| teacher", "<!-- teacher -->"))

REPORT = "report(globals())" # the last line of a master

def _lines(text): return text.splitlines(keepends=True)

def _full_report(asked):
    "`report`, with a list of the questions."
    def line(q): return f"{q.name} {q.points} " + (f"{q.check} {q.target}" if q.check else "manual")
    listed = map(line, asked)
    return "\n".join(['report(globals(), """', *listed, '""")'])

def student_version(
    master: dict, # a notebook
    url: str="",  # where Colab finds the student's version; empty: no badge
) -> dict:        # a notebook
    "A master without solutions, teacher's cells and outputs."
    badge = BADGE.format(url=url) if url else ""
    counts = _full_report(_questions(master))
    out = dict(copy.deepcopy(master), cells=[])
    for cell in master["cells"]:
        if _for_teacher(cell): continue
        given, _ = split_solution(text_of(cell))
        text = "\n".join(given).replace("<!-- badge -->", badge)
        if cell["cell_type"] == "code": text = text.replace(REPORT, counts)
        kept = dict(copy.deepcopy(cell), source=_lines(text))
        if cell["cell_type"] == "code": kept.update(outputs=[], execution_count=None)
        out["cells"].append(kept)
    return out


# %% [markdown]
# Look at three places: the badge in cell 0, the `...` in cell 2, and the list of questions in the last cell. The cell of the teacher is gone.

# %%
handed_out = student_version(master, "https://colab.research.google.com/...")
assert len(handed_out["cells"]) == len(master["cells"]) - 1
show(handed_out)

# %% [markdown]
# ## Did anything leak?
#
# Marks are set by people, and people forget them. A published course once handed out its answers; its readers asked for a version without. So every build ends with a test: is any line of a solution
# anywhere in the student's version? Blanks do not count, so that `beta*gain` is found in `beta * gain`. Very short lines do not count either, for `return out` may stand in many places.

# %%
#| export
TELLING = 15 # characters, blanks not counted: a shorter line of a solution may stand elsewhere

def _bare(text): return "".join(text.split())

def leaks(
    master: dict,  # a notebook
    student: dict, # its student's version, or anything that students see
) -> list[str]:    # lines of solutions, as they stand in the master; empty is good
    "Lines of the solutions that can be read in a student's version."
    hidden = [line for cell in master["cells"] for line in split_solution(text_of(cell))[1]]
    seen = "\n".join(_bare(json.dumps(cell.get("outputs", [])) + text_of(cell)) for cell in student["cells"])
    return [line.strip() for line in hidden if len(_bare(line)) >= TELLING and _bare(line) in seen]


# %% [markdown]
# `TELLING` is a compromise. At 15, a line like `n = len(pairs)` is not looked for, because many notebooks contain it; `return ref - bound / beta` is. A lower number would report lines that give nothing away, and a teacher who is warned for nothing stops reading warnings.

# %%
assert leaks(master, handed_out) == []

# %% [markdown]
# A test that never fails is worth nothing. Here is a master in which the teacher has tried the solution in a second cell, and forgot to mark it:

# %%
tried = code("gain = (c - r) - (rc - rr)\nloss = -F.logsigmoid(beta * gain)\nreturn_value = loss")
spare = code("def draft(beta, gain):\n    return -F.logsigmoid(beta*gain)")
careless = notebook(*master["cells"], tried, spare)
leaks(careless, student_version(careless))

# %% [markdown]
# It found the line in `draft`, where only the blanks differ. It did not find the first cell: with other names it is another line. So the test guards against a forgotten mark, not against a teacher who explains
# too much.
#
# `build` does this for a folder of masters, and writes nothing if one of them leaks. First, reading a notebook. Much of what is called `.ipynb` is none: a file that was cut off, a web page that was saved under this name, an empty upload. The message says which file, and what is missing.

# %%
#| export
COLAB, REPOSITORY = "https://colab.research.google.com/github", "sdpo-nb/sdpo_nb"

def read_notebook(
    path, # of an .ipynb file
) -> dict:
    "A notebook. Raises ValueError, with the path, for a file that is none."
    try: found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError: raise ValueError(f"{path}: there is no such file") from None
    except (ValueError, OSError, RecursionError) as e: raise ValueError(f"{path}: is no notebook ({e})") from e
    cells = found.get("cells") if isinstance(found, dict) else None
    if not isinstance(cells, list): raise ValueError(f"{path}: is no notebook (it has no cells)")
    for cell in cells:
        whole = isinstance(cell, dict) and "cell_type" in cell
        lines = cell.get("source") if whole else None
        is_text = isinstance(lines, (str, list)) and all(isinstance(line, str) for line in lines)
        if not is_text: raise ValueError(f"{path}: is no notebook (a cell has no text)")
    return found


# %%
(tmp / "letter.ipynb").write_text('{"dear": "teacher"}')
print(complaint(read_notebook, tmp / "letter.ipynb").replace(str(tmp), ""))


# %% [markdown]
# Now the folder. Three decisions are in it. Everything is made in memory and written at the end, so a leak in the fourth master leaves no three new files beside an old one. The keys are sorted, so that `git diff` shows what changed, and a test can compare the files byte for byte with what `build` makes. And the badge is a link to the place of the notebook in the repository, so the folder must be inside.

# %%
#| export
def _notebooks_of(folder):
    "The notebooks of a folder. Raises ValueError where there are none."
    if not folder.is_dir(): raise ValueError(f"{folder}: there is no such folder")
    found = sorted(folder.glob("*.ipynb"))
    if not found: raise ValueError(f"{folder}: there is no notebook here")
    return found

def _place_in_repository(out):
    "A folder as seen from the repository, which is where the command runs: the badge is a link to there."
    here = Path.cwd().resolve()
    try: return (here / out).resolve().relative_to(here)
    except ValueError:
        advice = "name a folder inside, or leave out the badge with --repository ''"
        raise ValueError(f"{out}: is outside {here}, so Colab cannot find it; {advice}") from None

def build(
    masters,       # folder of solved notebooks
    out,           # folder of the students' versions, as seen from the repository; what is there is replaced
    repository: str=REPOSITORY, # on GitHub, where Colab finds `out` on the branch main; empty: no badge
) -> list[Path]:   # what was written
    """Students' versions of all masters of a folder.

    Raises ValueError, with the line, where a solution can still be read.
    """
    made, out = {}, Path(out)
    inside = _place_in_repository(out) if repository else out
    for path in _notebooks_of(Path(masters)):
        master = read_notebook(path)
        try:
            questions(master)
            place = f"{COLAB}/{repository}/blob/main/{(inside / path.name).as_posix()}"
            student = student_version(master, place if repository else "")
        except ValueError as e: raise ValueError(f"{path}: {e}") from e
        for line in leaks(master, student):
            raise ValueError(f"{path}: this line of a solution is left in the student's version: {line}")
        made[out / path.name] = json.dumps(student, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    for path, text in made.items(): path.write_text(text, encoding="utf-8")
    return list(made)


# %%
def save(nb, path):
    "Write a notebook, and the folder that it lies in."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(nb))
    return path

save(master, tmp / "masters/a0.ipynb")
(written,) = build(tmp / "masters", tmp / "students", repository="")
assert read_notebook(written)["cells"][2] == dict(handed_out["cells"][2])

# %% [markdown]
# A folder outside of the repository has no such link. So it is refused, unless you want no badge:

# %%
told = complaint(build, tmp / "masters", tmp / "students")
print(told.replace(str(tmp), "").replace(str(Path.cwd()), "the repository"))

# %% [markdown]
# And the master that leaks. The message holds the line itself, because that is what the teacher will search for:

# %%
save(careless, tmp / "careless/a0.ipynb")
print(complaint(build, tmp / "careless", tmp / "nowhere", "").replace(str(tmp), ""))
assert not (tmp / "nowhere").exists()

# %% [markdown]
# ## What is graded
#
# A submission is whatever a student has left in the notebook: experiments, prints, a training loop that takes an hour, a cell that was never finished. To run all this again is slow, and one broken cell at
# the top costs all points below it. But what a question asks for is a *function*. So the grader reads a submission and keeps only what defines something: functions, classes, constants,
# and some imports. The rest is never run.
#
# A constant is kept, since a function may use it. But `model = train(...)` is an assignment, too, and takes an hour. How can one tell, without running it? By its form: numbers, words, containers, arithmetic, and calls of a handful of harmless functions, such as `log`, `np.log` and `torch.log`. Everything else on the right of `=` is left out. (A `lambda` is a function, and is kept. To look something up, as `model.forward` does, is harmless.)

# %%
#| export
IMPORTS = (
    "torch", "math", "random", "numpy", "itertools", "dataclasses", "collections", "functools",
    "typing", "copy", "operator", "statistics", "bisect", "heapq", "time",
    "sdpo_nb.world", "sdpo_nb.mistakes", "sdpo_nb.checks",
)
_CALLS = {"dict", "float", "int", "list", "tuple", "set", "round", "abs", "min", "max", "sum", "len", "range"}
_CALLS |= {"log", "log2", "log10", "log1p", "exp", "expm1", "sqrt"}                 # of math, numpy or torch
_CALLS |= {"tensor", "item", "sigmoid", "logsigmoid", "softplus"}
_PLAIN = (
    ast.Constant, ast.Name, ast.Load, ast.Dict, ast.List, ast.Tuple, ast.Set, ast.BinOp, ast.UnaryOp,
    ast.operator, ast.unaryop, ast.Call, ast.keyword, ast.Attribute, ast.Subscript, ast.Slice,
)

def _is_constant(value):
    "Whether an expression only computes with numbers and words: `0.1`, `{'a': -math.log(2)}`."
    for node in ast.walk(value):
        if not isinstance(node, _PLAIN): return False
        if not isinstance(node, ast.Call): continue
        called = ast.unparse(node.func)
        if called.split(".")[-1] not in _CALLS and not called.startswith("math."): return False
    return True


# %%
for line in ("0.1", "{'first': -math.log(0.5)}", "torch.tensor(0.5).log()", "train(model)", "model.forward"):
    value = ast.parse(line).body[0].value
    print(f"{line:28} {_is_constant(value)}")


# %% [markdown]
# An import runs code, too. It is kept if it is on the list above, or if the master has the very same one: then the student was given it. The rest of `sdpo_nb` is not on the list: it holds the solutions. A check refuses functions of the package in any case; but without the import the function is "not defined", and the remark below says why. Numbers are another matter. The seven predictions of assignment 1 stand in `sdpo_nb.checks`, which is on the list, and a check cannot tell a number that was copied from one that was found. Whoever reads the notebook can.

# %%
#| export
def _imported(node):
    "What an import statement names, as (module, name) with the name empty for `import module`."
    if isinstance(node, ast.Import): return [(a.name, "") for a in node.names]
    return [(node.module or "", a.name) for a in node.names]

def _is_allowed(module, name, given):
    own = module if module.startswith("sdpo_nb") else module.split(".")[0]
    whole = f"{module}.{name}"      # from sdpo_nb import world
    return own in IMPORTS or whole in IMPORTS or (module, name) in given

def _kept(node, given, dropped):
    "A statement of a submission, as far as it defines something; None where it does not."
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)): return node
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        good = [a for a, what in zip(node.names, _imported(node)) if _is_allowed(*what, given)]
        dropped += [module for module, name in _imported(node) if not _is_allowed(module, name, given)]
        if not good: return None
        node.names = good
        return node
    if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None: return None
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    named = all(map(_is_named, targets))
    defines = isinstance(node.value, ast.Lambda) or _is_constant(node.value)
    return node if named and defines else None

def _is_named(target):
    "Whether an assignment gives names, `a = 1` or `a, b = 1, 2`, and changes no object, as in `a.b = 1`."
    if isinstance(target, ast.Tuple): return all(map(_is_named, target.elts))
    return isinstance(target, ast.Name)


# %% [markdown]
# Each statement of a notebook is now kept or dropped by its form alone. `ast` gives the statements, and writes them as text again, so comments and odd spacing are gone on the way.
#
# A rule about forms is sometimes wrong. A student who writes `predictions["loss"] = 0.127` into a later cell, or a function under `if True:`, has answered: in the notebook the check passes, and here the answer is dropped. So a dropped statement that would give or change something that is *asked for* must not vanish silently. These are the names that a statement touches:

# %%
#| export
def _base(node):
    "The name that `a`, `a.b` or `a['b'].c` begins with; empty where it begins with something else."
    while isinstance(node, (ast.Attribute, ast.Subscript)): node = node.value
    return node.id if isinstance(node, ast.Name) else ""

def _touched(statement):
    "The names that a statement would give or change: `a` in `a = f()`, `a['b'] = 1`, `a.update(b=1)`, `if c: a = 1`."
    names = set()
    for node in ast.walk(statement):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): names.add(node.name)
        elif isinstance(getattr(node, "ctx", None), ast.Store): names.add(_base(node))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute):
            names.add(_base(node.value.func))
    return names


# %%
for line in ("a = f(b)", "a['b'] = 1", "a.update(b=1)", "if c: a = 1", "print(a)"):
    print(f"{line:28} {_touched(ast.parse(line))}")

# %% [markdown]
# Cells are parsed one by one. What is meant for Jupyter (`%pip`, `!ls`, `torch.gather?`) is no Python, and is dropped; a `%%time` on top of a cell is taken off, because the cell under it is Python. If a cell still cannot be parsed, it is skipped, and the report names it.

# %%
#| export
_TIMED = re.compile(r"\A(\s*)%%(?:time|capture)\b.*")
_MAGIC = re.compile(r"^([ \t]*)(?:(?:\w+ *= *)?[%!].*|\?.*|[\w.]+\?\??[ \t]*)$", re.M)

def _parse(text):
    "The statements of a cell, without what is meant for Jupyter."
    text = _TIMED.sub(r"\1", text)
    try: return ast.parse(text).body
    except SyntaxError: pass
    if text.lstrip().startswith("%%"): return []
    return ast.parse(_MAGIC.sub(r"\1pass", text)).body

def _code_of(nb): return [text_of(cell) for cell in nb["cells"] if cell["cell_type"] == "code"]

def given_imports(
    master: dict, # a notebook
) -> set[tuple]:  # (module, name)
    "What a master imports: students were given it."
    nodes = [node for text in _code_of(master) for node in _parse(text)]
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {what for node in imports for what in _imported(node)}

def definitions(
    submission: dict, # a notebook
    given: set=frozenset(), # of `given_imports`
    asked: set=frozenset(), # names that questions ask for
) -> tuple[list[str], list[str]]: # one definition each; one remark each
    "What a submission defines and may import, and what was left out that may matter."
    kept, remarks, dropped = [], [], []
    for i, text in enumerate(_code_of(submission), 1):
        try:
            for node in _parse(text):
                good = _kept(node, given, dropped)
                if good:
                    kept.append(ast.unparse(good))
                    continue
                for name in sorted(_touched(node) & asked):
                    line = " ".join(ast.unparse(node).split())
                    remarks.append(f"code cell {i}: a line about {name} was not read: {line[:80]}")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
            where = f"line {getattr(e, 'lineno', 1)}: {getattr(e, 'msg', e)}"
            remarks.append(f"code cell {i} does not parse ({where}) and was skipped")
    remarks += [f"the import of {module} was left out" for module in dict.fromkeys(dropped)]
    return kept, remarks


# %% [markdown]
# A submission as students write them: an answer, and around it all sorts of things. What will be left?

# %%
def answered(*answers, before=()):
    "The handed-out notebook, with cells of a student before and after the stub."
    cells = handed_out["cells"]
    return notebook(*cells[:2], *map(code, before), cells[2], *map(code, answers), *cells[3:])

right_answer = '''
BETAS = [0.1, 0.5]

def sigmoid(z):
    return torch.sigmoid(z)

def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    gain = chosen - rejected - ref_chosen + ref_rejected
    return F.softplus(-beta * gain)
'''
messy = answered(
    right_answer,
    before=(
        "%pip install -q something\nimport torch, os",
        "for step in range(10**12): pass        # an hour of training",
        "raise SystemExit",
        "def unfinished(:",
        "import sdpo_nb.checks\nsdpo_nb.checks.check_dpo_loss = print",
        "dpo_loss = torch.compile(dpo_loss)",
    ),
)
kept, remarks = definitions(messy, given_imports(master), asked={"dpo_loss"})
print("\n".join(kept))

# %% [markdown]
# What was left out silently is what defines nothing. What was left out and *may matter* is a remark: it goes to the student and to the teacher.

# %%
assert not any("range" in part or "print" in part or "raise" in part for part in kept)
remarks


# %% [markdown]
# The stub is kept as well; as in a notebook, the later definition wins. The loop, the `raise` and the line that replaces the check define nothing, so they are gone.
#
# ## One question, one process
#
# Definitions do nothing until they are called. But the check will call them, and a function of a student may run for ever, fill the memory, or end Python. So each question is answered in a process of its own, with a time limit. If `q1` never ends, this costs `q1` and nothing else.
#
# What happens in that process? The definitions are executed, then the check is called with the student's function. A definition is executed alone, so that one which stops does not take the others along; what went wrong first is remembered, for it often explains why a name is missing.

# %%
#| export
def _define(code, space) -> str:
    "Execute definitions one by one; what went wrong first, in words."
    trouble = ""
    for part in code:
        try: exec(compile(part, "<submission>", "exec"), space)
        except Exception as e: trouble = trouble or f" ({type(e).__name__} in '{part.splitlines()[0]}': {e})"
    return trouble

STOPPED = "the check stopped with"

def _passes(check, value, seed=None) -> tuple[bool, str]:
    "Whether a check accepts, and what it says."
    try: seed = check(value, seed)
    except AssertionError as e: return False, str(e) or "the check objects, and does not say to what"
    except Exception as e: return False, f"{STOPPED} {type(e).__name__}: {e}"
    return True, f"passed (seed {seed})"


# %% [markdown]
# A definition that stops, with a name that the grader has left out, does not stop the others. And a check may pass, object, or meet something that it did not expect:

# %%
names = {}
trouble = _define(["a = 3", "b = a + unknown", "c = a + 4"], names)
print(names["c"], trouble)


# %%
def check_seven(value, seed=None):
    assert value == 7, "it should be 7"
    return seed

for value in (names["c"], 8, "seven"): print(_passes(check_seven, value, seed=1))
print(_passes(lambda value, seed: value + 1, "seven"))

# %% [markdown]
# A student's function could also change the check while it is being checked. Two guards stand against it, after a pass. The first is a *canary*, the bird that miners took along: the check must still refuse a function that returns
# nothing. The second compares: no function of the package, of torch, of `math` or of Python itself may have been replaced, no method of a tensor, and no part of an exercise.

# %%
#| export
PATCHED = "something in this notebook changes the check, or what it computes with"
_WATCHED = {"sdpo_nb", "torch", "math", "builtins"}

def _spaces():
    "Where the things stand that a check computes with: the name of a place, and what has a name there."
    for home, module in list(sys.modules.items()):
        if home.split(".")[0] not in _WATCHED: continue
        yield home, {name: thing for name, thing in list(vars(module).items()) if callable(thing)}
    torch, checks = sys.modules.get("torch"), sys.modules.get("sdpo_nb.checks")
    if torch:
        classes = reversed(torch.Tensor.__mro__)     # a method may be new in Tensor and hide one that it inherits
        yield "torch.Tensor", {name: thing for c in classes for name, thing in vars(c).items()}
    if checks:
        for name, exercise in checks.EXERCISES.items(): yield f"exercise {name}", vars(exercise) | exercise.edges

def functions_of_modules() -> dict: # (place, name) -> the thing and its code
    "All that a check computes with, as it is now: functions and classes, methods of tensors, parts of exercises."
    found = {}
    for home, space in _spaces():
        for name, thing in space.items(): found[home, name] = thing, getattr(thing, "__code__", None)
    return found

def was_patched(
    before: dict, # of `functions_of_modules`
) -> bool:
    "Whether something has been replaced. What was added does not count: modules load their parts late."
    spaces = dict(_spaces())
    for (home, name), (thing, code) in before.items():
        now = spaces.get(home, {}).get(name)
        if now is not thing or getattr(now, "__code__", None) is not code: return True
    return False


# %% [markdown]
# A thing and its code are both compared: `torch.allclose = mine` puts another thing under the name, and `check.__code__ = ...` changes the thing itself. What was *added* does not count, because modules load some of their parts when they are first used.

# %%
isclose, before = math.isclose, functions_of_modules()
math.isclose = lambda *a, **k: True         # all numbers are equal now
assert was_patched(before)
math.isclose = isclose
was_patched(before)

# %% [markdown]
# A method that tensors inherit is replaced by adding one: `torch.Tensor.double = mine` hides the old one. So for tensors the comparison goes through all classes they inherit from:

# %%
import torch

torch.Tensor.double = lambda self: self.new_zeros(self.shape)       # all answers are 0 now, and so are the right ones
assert was_patched(before)
del torch.Tensor.double
assert not was_patched(before)


# %% [markdown]
# Definitions, check, guards: that is all of it. The order matters. The functions are noted *before* a line of the student's is executed, and both guards come *after* a pass, because only a pass is worth something.

# %%
#| export
def answer(
    code: list[str], # definitions
    target: str,     # name of what the check looks at
    checks: list,    # functions that raise where they object
    seed: int=None,  # of the numbers that a check draws; default: new ones
) -> tuple[bool, str]: # whether all of them accept it, and what is to be said
    "Hold the definitions of a submission against checks."
    before = functions_of_modules()
    space = {"__name__": "submission"}
    trouble = _define(code, space)
    if target not in space: return False, f"{target} is not defined{trouble}"
    for check in checks:
        good, told = _passes(check, space[target], seed)
        if not good: return False, told
    accepts_anything = any(_passes(check, lambda *a, **k: None)[0] for check in checks)
    if accepts_anything or was_patched(before): return False, PATCHED
    return True, told


# %% [markdown]
# Four submissions, and a check of our own. One is honest, one is wrong, and two are clever. What will be said to each?

# %%
tried_with = [3, 5, 8]

def check_double(f, seed=None):
    for x in tried_with: assert f(x) == 2 * x, f"f({x}) should be {2 * x}"
    return seed

honest = "def double(x): return x + x"
wrong = "def double(x): return x * x"
sly = "def double(x):\n    import __main__\n    __main__.tried_with = []\n    return 2 * x"

slier = "def double(x):\n    import math\n    math.isclose = lambda *a, **k: True\n    return 2 * x"

for text in (honest, wrong, sly, slier):
    print(answer([text], "double", [check_double], seed=1))
math.isclose = isclose


# %% [markdown]
# `honest` passes. `wrong` is told at which number it fails. `sly` empties the list of numbers that the check tries, while it is being checked; it is refused by the canary. `slier` makes all numbers equal, which would help it in the next question; it is refused by the comparison. This catches a trick, not every trick: a student's code runs in
# the same process as the check, and a function that writes the answer file of the next section itself passes. If you grade people whom you do not trust, look at their code, and grade them in a container.
#
# Now the process around it. Starting Python and importing torch takes seconds, so it is done once: a *server* imports the checks, and for each question it makes a copy of itself (`os.fork`). The copy answers and ends, and whatever the student's function has done to it ends with it. The next copy is as fresh as the first.
#
# A teacher may have checks of their own, in a file that is not public:

# %%
#| export
def load_checks(
    extra: str="", # path of a Python file with more checks; empty: none
) -> tuple: # a module, and another or None
    "The checks of the package, and a teacher's own."
    from sdpo_nb import checks
    if not extra: return checks, None
    spec = importlib.util.spec_from_file_location("extra_checks", extra)
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    for name, check in vars(own).items():
        if not name.startswith("check_"): continue
        try: inspect.signature(check).bind("value", "seed")
        except TypeError as e: raise ValueError(f"{extra}: {name} is called as {name}(value, seed): {e}") from None
    return checks, own


# %%
mine = """
def check_double(f, seed=None):
    assert f(4) == 8, 'f(4) should be 8'
    return seed
"""
(tmp / "mine.py").write_text(mine)
public, private = load_checks(tmp / "mine.py")
for value in (7, 8): print(_passes(private.check_double, lambda x: value))

# %% [markdown]
# A private check has the signature of the others: it takes what the student wrote and a seed, raises an `AssertionError` with a sentence, and returns the seed. One that cannot be called like this would refuse everybody, so it is refused itself:

# %%
(tmp / "seedless.py").write_text("def check_double(f): assert f(4) == 8")
print(complaint(load_checks, tmp / "seedless.py").replace(str(tmp), ""))


# %% [markdown]
# The server speaks a small language. It says which checks it knows; then each line that it reads is a job, and the line that it writes says that the job is over. The answer itself goes through a file, because a student's `print` would end up among the answers: so the copy closes its output first. It closes its input, too, or `input()` would wait for somebody to type.

# %%
#| export
def _answer_job(job, modules):
    "Answer one question, silently, and write what came out into a file."
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2): os.dup2(nowhere, stream)
    faulthandler.dump_traceback_later(job["limit"], exit=True, file=nowhere)
    found = [getattr(m, job["check"], None) for m in modules]
    good, told = answer(job["code"], job["target"], [check for check in found if check], job["seed"])
    Path(job["result"]).write_text(json.dumps([good, told]))

def _serve(extra="", ready=()):
    "Answer questions from stdin, one a line, each in a process of its own; without fork, one and no more."
    with redirect_stdout(sys.stderr):       # a print in a teacher's file is no answer
        modules = load_checks(extra)
        for name in ready: importlib.import_module(name)
    known = [name for m in modules if m for name in vars(m) if name.startswith("check_")]
    print(json.dumps(known), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork() if hasattr(os, "fork") else 0
        if child: os.waitpid(child, 0)
        else:
            try: _answer_job(job, modules)
            finally: os._exit(0)
        print("answered", flush=True)


# %% [markdown]
# `dump_traceback_later` is the time limit. It is a thread of its own, written in C: it ends the process even if Python is stuck in an endless loop. A student's code could switch it off, but not the second clock, which comes below. Where there is no `fork`, as on Windows, the server answers one question and ends; the next one starts another server, which is slower and gives the same grades.
#
# This is how a server is started, and what it says first:

# %%
#| export
class NoCheck(ValueError):
    "A check that is not there or cannot be loaded: a mistake of the teacher's, and not of a student."

def _start(extra, ready):
    "A server with one thread, which does not load anything from the internet; with its copies it is a group."
    calm = dict(OMP_NUM_THREADS="1", TQDM_DISABLE="1", HF_HUB_OFFLINE="1", MPLBACKEND="agg")
    command = [sys.executable, "-m", "sdpo_nb.course", "serve", extra, *ready]
    how = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    return subprocess.Popen(command, env=os.environ | calm, **how)

def _hello(server):
    "The checks that a new server knows."
    line = server.stdout.readline()
    if not line: raise NoCheck("the checks could not be loaded; what Python said stands above")
    return json.loads(line)

def _kill(server):
    "End a server, and its copies with it."
    if not hasattr(os, "killpg"): return server.kill()
    try: os.killpg(server.pid, signal.SIGKILL)
    except OSError: pass        # it has ended already


# %%
server = _start("", ())
known = _hello(server)
_kill(server)
server.communicate()
print(len(known), "checks, from", known[0], "to", known[-1])


# %% [markdown]
# `asking` keeps such a server, and gives a function that asks it. It has to expect the worst. A submission may kill not only its own copy but the server as well: then no line comes back, this question has no answer, and the next one wakes a new server. A submission may also switch the time limit off, or stop the server without ending it. So whoever asks has a clock, too: five seconds after the limit it ends the server and everything that the server has started. A server that is woken only when there is a question also costs nothing where there is none.

# %%
#| export
@contextmanager
def asking(
    extra: str="",   # path of a Python file with more checks
    limit: float=60, # seconds for one question
    seed: int=None,  # of the numbers that the checks draw; default: new ones each time
    ready=(),        # modules that the server imports once, so that not every question has to
):                   # a context with a function: (definitions, question) -> whether it passed, what is said
    "A server that answers questions. It is started when needed, and again when a submission has killed it."
    server, known = [], set()
    folder = tempfile.TemporaryDirectory()
    result = Path(folder.name) / "result.json"

    def alive(): return server and server[-1].poll() is None

    def wake():
        if alive(): return
        server.append(_start(extra, ready))
        known.update(_hello(server[-1]))

    def send(job):
        late = threading.Timer(limit + 5, _kill, [server[-1]])
        late.start()
        try:
            server[-1].stdin.write(json.dumps(job) + "\n")
            server[-1].stdin.flush()
            said = server[-1].stdout.readline()
        except OSError: said = ""       # it has just ended
        finally: late.cancel()
        if said: return
        _kill(server[-1])
        server.pop().wait()

    def ask(code, question):
        result.unlink(missing_ok=True)
        wake()
        if question.check not in known: raise NoCheck(f"there is no check of the name {question.check}")
        begun = time.monotonic()
        asked = dict(check=question.check, target=question.target, limit=limit, seed=seed)
        send(dict(asked, code=code, result=str(result)))
        if result.exists(): return tuple(json.loads(result.read_text()))
        if time.monotonic() - begun >= limit: return False, f"no answer within {limit:g} seconds"
        return False, "Python ended before the check had an answer"

    with folder:
        try: yield ask
        finally:
            if alive(): _kill(server[-1])
            for started in server: started.communicate()



# %% [markdown]
# Ask it about four submissions to `q1`: right, not begun, an endless loop, and one that ends Python. The loop costs its five seconds, and the others are answered at once:

# %%
q1, q2 = questions(master)
submissions = dict(
    right=messy,
    stub=handed_out,
    loop=answered("def dpo_loss(*all):\n    while True: pass"),
    exits=answered("def dpo_loss(*all): __import__('os')._exit(3)"),
)
with asking(limit=5, seed=1) as ask:
    for name, nb in submissions.items():
        code_of, _ = definitions(nb, given_imports(master))
        print(f"{name:6}", *ask(code_of, q1))


# %% [markdown]
# ## A whole course
#
# What does the grader need of a master? Its questions, the imports that students were given, the texts of the cells that were handed out (to tell them from what a student wrote), and its title. All submissions of an assignment need the same, so it is made once:

# %%
#| export
def _title(nb):
    "The first heading of a notebook."
    prose = [text_of(cell) for cell in nb["cells"] if cell["cell_type"] == "markdown"]
    headings = re.findall(r"^# (.+)$", "\n".join(prose), re.M)
    return headings[0] if headings else "the right notebook"

@dataclass(frozen=True)
class Assignment:
    "What a grader needs of a master."
    asked: list[Question] # in order
    imports: set[tuple]   # that students were given
    given: set[str]       # texts of the cells that were handed out
    title: str            # its first heading

def assignment_of(
    master: dict, # a notebook
) -> Assignment:
    "What a grader needs of a master, made once for all submissions. Raises ValueError as `questions` does."
    given = {text_of(cell).strip() for cell in student_version(master)["cells"]}
    return Assignment(questions(master), given_imports(master), given, _title(master))


# %%
a0 = assignment_of(master)
print(f"{a0.title}: {len(a0.asked)} questions, {len(a0.given)} cells handed out")
sorted(a0.imports)


# %% [markdown]
# The imports of the master are what its students were given: `try_check` is on no list of ours, and is kept in a submission because it is on this one.
#
# And what comes out for one student? Points and a sentence for each question, and *flags*: what was odd, and a person should look at. A question that a person marks has `None` for its points until somebody has, which is not the same as 0.

# %%
#| export
@dataclass
class Grade:
    "What one submission got."
    student: str
    points: dict[str, int|None] = field(default_factory=dict) # by question; None: nobody has marked it yet
    said: dict[str, str] = field(default_factory=dict)        # by question: a sentence, or the words
    flags: list[str] = field(default_factory=list)            # what a teacher should know

    @property
    def total(self): return sum(p or 0 for p in self.points.values())


# %%
half = Grade("alice", points=dict(q1=4, q2=None))
half.total


# %% [markdown]
# What a student wrote for a question that a person marks is collected, so that the person can read it in one place. That sounds easy. But students write below the cell instead of in it, or delete its first line with the mark because it looks like rubbish. So we look for the mark, then for the heading, and then at new cells below, up to the next one that was handed out. Whatever had to be guessed is said in a remark.

# %%
#| export
def _place_of(texts, question):
    "Where the question stands in a submission, and what is odd about it."
    mark = f"<!-- question {question.name} {question.points} manual -->"
    heading = re.compile(rf"^#+ *Question {question.name[1:]}\b", re.M)
    by_mark = [i for i, text in enumerate(texts) if mark in text]
    if by_mark: return by_mark[-1], ""
    by_heading = [i for i, text in enumerate(texts) if heading.search(text)]
    if by_heading: return by_heading[-1], "its first line is gone; it was found by its heading"
    return None, "its cell is gone; look for the answer in the notebook"

def _written(
    submission, # a notebook
    given,      # texts of the cells that were handed out
    question,   # that a person marks
):              # the text, and remarks
    "What a student wrote under a question that a person marks, also in new cells below it."
    mark = f"<!-- question {question.name} {question.points} manual -->"
    texts = [text_of(cell).strip() for cell in submission["cells"]]
    at, odd = _place_of(texts, question)
    if at is None: return "(the cell of this question is gone)", [odd]

    below = []
    for text in texts[at + 1:]:
        if text in given: break
        if text: below.append(text)
    handed_out = {line.strip() for text in given for line in text.splitlines()}
    own = [line for line in texts[at].splitlines() if line.strip() not in handed_out]
    remarks = [odd] if odd else []
    if below: remarks.append("there is text in a new cell below it; it is part of what is shown")
    elif not own: remarks.append("nothing is written there")
    return "\n\n".join([texts[at].replace(mark, "").strip(), *below]), remarks


# %% [markdown]
# An answer in a new cell, below the one that was meant for it. It must be found, and it must be said that it was not where it belongs:

# %%
*before, last = handed_out["cells"]
in_a_new_cell = notebook(*before, prose("It depends on x only."), last)
text, remarks = _written(in_a_new_cell, a0.given, q2)
assert text.endswith("It depends on x only.")
remarks


# %% [markdown]
# A notebook that defines nothing of what was asked for gets 0 everywhere, and a flag: it is perhaps another assignment, handed in at the wrong place. An empty submission is no such case, for the handed-out notebook has all names.

# %%
#| export
def _is_another(code, asked):
    "Whether a submission defines nothing that is asked for."
    wanted = {q.target for q in asked if q.target}
    defined = {word for part in code for word in re.findall(r"^(?:def |class )?(\w+)", part, re.M)}
    return bool(wanted) and not wanted & defined

def grade_one(
    student: str,     # who handed it in
    submission: dict, # a notebook
    assignment: Assignment, # of `assignment_of`
    ask,              # of `asking`
) -> Grade:
    "Points and sentences for one submission."
    code, remarks = definitions(submission, assignment.imports, {q.target for q in assignment.asked if q.target})
    grade = Grade(student, flags=remarks)
    if _is_another(code, assignment.asked):
        grade.flags.append(f"it defines nothing that is asked for: is it '{assignment.title}'?")
    for q in assignment.asked:
        if not q.check:
            grade.points[q.name] = None
            grade.said[q.name], odd = _written(submission, assignment.given, q)
            grade.flags += [f"{q.name}: {remark}" for remark in odd]
            continue
        good, told = ask(code, q)
        grade.points[q.name], grade.said[q.name] = q.points if good else 0, told
        strange = told == PATCHED or told.startswith((STOPPED, "no answer", "Python ended"))
        if strange or "NameError" in told: grade.flags.append(f"{q.name}: {told}")
    return grade


# %% [markdown]
# A whole submission. Alice has programmed `q1`, and has not written anything for `q2`:

# %%
with asking(seed=1) as ask: alice = grade_one("alice", messy, a0, ask)
assert alice.points == dict(q1=4, q2=None)
alice


# %% [markdown]
# The marks of a person come from a table: `student,q2`, one student a line. A point that stands there counts, also where a check has given another one: the last word is the teacher's.

# %%
#| export
def _number(text): return int(text) if text.isdigit() else float(text.replace(",", "."))

def _plain_name(text):
    "A student's name in one spelling: `ü` may be one character or two, and a zip may hold bytes that are no text."
    readable = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", readable).strip()

def _table(path):
    "Names and rows of a CSV file, without blanks around the fields; with semicolons where Excel writes semicolons."
    try: text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError: raise ValueError(f"{path}: is not UTF-8; in Excel, save it as 'CSV UTF-8'") from None
    delimiter = ";" if ";" in text.partition("\n")[0] else ","
    rows = [[field.strip() for field in row] for row in csv.reader(io.StringIO(text), delimiter=delimiter) if any(row)]
    return (rows[0], rows[1:]) if rows else ([], [])

def read_marks(
    path, # of a CSV file: student, and any questions
) -> dict[str, dict[str, int|float]]: # points by student and question
    "Points that a person gave."
    names, rows = _table(path)
    if "student" not in names: raise ValueError(f"{path}: has no column 'student'")
    marks = {}
    for row in rows:
        given = dict(zip(names, row))
        student = _plain_name(given.pop("student", ""))
        if student in marks: raise ValueError(f"{path}: student {student} is there twice")
        if any(row[len(names):]):
            raise ValueError(f"{path}: student {student}: more fields than columns; write 2.5, not 2,5")
        try: marks[student] = {q: _number(text) for q, text in given.items() if text}
        except ValueError as e: raise ValueError(f"{path}: student {student}: {e}") from None
    return marks


# %%
def wrote_marks(text):
    "The marks of a file with this text."
    (tmp / "marks.csv").write_text(text)
    return read_marks(tmp / "marks.csv")

wrote_marks("student,q1,q2\nalice,,2\nbob,4,1.5\n")

# %% [markdown]
# Spreadsheets have their own ideas of such a file. In many countries it has semicolons, and `1,5` for one and a half. That is read as it is meant. What can be meant in two ways is an error:

# %%
assert wrote_marks("student;q1; q2\nalice;;2\nbob;4;1,5\n") == dict(alice=dict(q2=2), bob=dict(q1=4, q2=1.5))
for text in ("student,q2\nalice,2,5\n", "student,q2\nalice,2\nalice,3\n"):
    print(complaint(wrote_marks, text).replace(str(tmp), ""))


# %% [markdown]
# An empty field is no mark, and so is a column that is not there. A student who is not among the submissions, a question that does not exist, or five of four points are mistakes of the teacher's own. They are told before anything is graded, and before any mark is written:

# %%
#| export
def check_marks(
    marks: dict, # of `read_marks`
    students,    # names of those who handed in
    asked: list, # of Questions
):
    "Raises ValueError for a student, a question or a number that cannot be."
    most = {q.name: q.points for q in asked}
    for student, given in marks.items():
        if student not in students: raise ValueError(f"marks: there is no submission of '{student}'")
        for q, points in given.items():
            if q not in most: raise ValueError(f"marks: there is no question '{q}'")
            if not 0 <= points <= most[q]:
                raise ValueError(f"marks: {student}, {q}: {points} is not between 0 and {most[q]}")

def add_marks(
    grades: list,      # of Grades
    marks: dict,       # of `read_marks`
    asked: list,       # of Questions
):
    "Write a person's points into grades. Raises ValueError as `check_marks` does, and writes nothing then."
    by_name = {g.student: g for g in grades}
    check_marks(marks, by_name, asked)
    for student, given in marks.items(): by_name[student].points.update(given)


# %%
add_marks([alice], wrote_marks("student,q2\nalice,2\n"), [q1, q2])
assert alice.total == 6
print(complaint(add_marks, [alice], wrote_marks("student,q2\nalice,30\n"), [q1, q2]))


# %% [markdown]
# What leaves the grader: a table for the teacher, and a page for each student. The table can be read by `read_marks` again, once *total* and *flags* are taken out, so a teacher may also work in it and hand it back. The page says for each question what the check said, or shows what the student wrote, for the person who marks it.

# %%
#| export
def write_grades(
    grades: list,      # of Grades
    path,              # of the CSV file
    asked: list,       # of Questions
):
    "A table: student, one column a question, total, flags. A question that nobody has marked is empty."
    names, text = [q.name for q in asked], io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["student", *names, "total", "flags"])
    for g in grades:
        points = [g.points.get(q) for q in names]
        table.writerow([g.student, *points, g.total, "; ".join(g.flags)])
    # Excel knows by the mark of utf-8-sig how the letters are to be read
    Path(path).write_text(text.getvalue(), encoding="utf-8-sig", errors="replace", newline="")

def feedback(
    grade: Grade, # of one submission
    asked: list,       # of Questions
) -> str: # Markdown
    "What a student is told."
    most = sum(q.points for q in asked)
    unmarked = [q.name for q in asked if grade.points.get(q.name) is None]
    left = f", without {', '.join(unmarked)}" if unmarked else ""
    parts = [f"# {grade.student}: {grade.total} of {most} points{left}"]
    for q in asked if grade.said else ():                # nothing is said of a file that is no notebook
        points = grade.points.get(q.name)
        got = "not marked yet" if points is None else f"{points} of {q.points}"
        title = f"{q.name}, {q.target}" if q.target else q.name
        parts.append(f"## {title}: {got}\n\n{grade.said.get(q.name, '')}")
    if grade.flags: parts.append("## Remarks\n\n" + "\n".join(f"- {flag}" for flag in grade.flags))
    return "\n\n".join(parts) + "\n"


# %%
print(feedback(alice, [q1, q2]))


# %% [markdown]
# So far one notebook; a class has thirty. What can be read anew for each of them is read once: the master, the marks, and the server with its imports. Every learning platform names the files it collects in its own way, so a student's name is the path of the file inside the folder. Two files that would get one name are an error, because one of them would vanish. A file that is no notebook, or that the grader stumbles over, gets 0 and a flag. It must not stop the other thirty. A wrong name in the teacher's own table of marks, however, is told at once, and not after an hour of grading.

# %%
#| export
def _students(folder):
    "{name: path} of the submissions in a folder or of one file, and the other files of the folder."
    folder = Path(folder)
    if folder.is_file(): return {_plain_name(folder.stem): folder}, []
    if not folder.exists(): raise ValueError(f"{folder}: there is no such file or folder")
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not _is_hidden(p.relative_to(folder))]
    paths = [p for p in files if p.suffix == ".ipynb"]
    if not paths: raise ValueError(f"{folder}: there is no notebook here")
    others = [_plain_name(str(p.relative_to(folder))) for p in files if p not in paths]
    found = {}
    for p in paths:
        name = _plain_name("_".join(p.relative_to(folder).with_suffix("").parts))
        if name in found: raise ValueError(f"{found[name]} and {p} would both be '{name}'; rename one of them")
        found[name] = p
    return found, others

def _is_hidden(path): return any(part.startswith((".", "__MACOSX")) for part in path.parts)

def grade(
    master,          # path of the solved notebook
    submissions,     # folder of notebooks, or one notebook
    extra: str="",   # path of a Python file with more checks, called after those of the same name
    limit: float=60, # seconds for one question
    manual: str="",  # path of a CSV file with a person's points
    seed: int=None,  # of the numbers that the checks draw; default: new ones each time
    say=print,       # is told one line a student
) -> list[Grade]:
    "Grade all submissions of an assignment."
    assignment = assignment_of(read_notebook(master))
    asked, grades = assignment.asked, []
    students, others = _students(submissions)
    if others: say(f"not notebooks, left out: {', '.join(others)}")
    marks = read_marks(manual) if manual else {}
    check_marks(marks, students, asked)     # before the slow part
    most = sum(q.points for q in asked)
    ready = sorted({module for module, _ in assignment.imports})
    with asking(extra, limit, seed, ready) as ask:
        for i, (student, path) in enumerate(students.items(), 1):
            begun = time.monotonic()
            try: one = grade_one(student, read_notebook(path), assignment, ask)
            except NoCheck: raise
            except Exception as e:      # whatever it is, it is this student's alone
                one = Grade(student, {q.name: 0 for q in asked}, flags=[f"cannot be graded: {e}"])
            grades.append(one)
            say(f"{i}/{len(students)} {student}: {one.total} of {most} ({time.monotonic() - begun:.1f} s)")
    add_marks(grades, marks, asked)
    return grades


# %% [markdown]
# Now the class. Seven submissions: the four of above, one without $\beta$, one that changes the check while it is being checked, and a text file with the wrong name. Before you look: who gets 4 points?

# %%
patched = answered('''
def dpo_loss(*all):
    import sdpo_nb.mistakes as m
    m.find_mistakes = lambda *a: ()
    m.DPO_LOSS.edges.clear()
    return all[0]
''')
no_beta = answered(right_answer.replace("-beta *", "-"))
for name, nb in (submissions | dict(no_beta=no_beta, patched=patched)).items():
    save(nb, tmp / f"handed_in/{name}.ipynb")
(tmp / "handed_in/word.ipynb").write_text("my homework")

grades = grade(tmp / "masters/a0.ipynb", tmp / "handed_in", limit=5, seed=1, say=lambda line: None)
write_grades(grades, tmp / "grades.csv", [q1, q2])

# %% [markdown]
# One of seven. Each of the others has its own sentence, and nobody's mistake cost anybody else a point. `patched` did what was asked of a cheat: in its process, every function that returns numbers is right. A canary that returns nothing is still refused, so the canary saw nothing. The comparison saw it, because `find_mistakes` had become another function:

# %%
import pandas as pd
pd.set_option("display.max_colwidth", 120)
told = {g.student: dict(q1=g.points["q1"], said=g.said.get("q1", "; ".join(g.flags))) for g in grades}
told = pd.DataFrame(told).T
assert told["q1"].to_dict() == dict(right=4) | dict.fromkeys(set(told.index) - {"right"}, 0)
told.replace(str(tmp), "", regex=True)


# %% [markdown]
# Look at `word`, too: the reason stands in its flags, so the teacher can ask this student for the right file. And look at what is *not* a flag: `no_beta` and `stub` are ordinary wrong answers. A column that speaks about every student is a column that nobody reads.
#
# ## Gradescope
#
# Many universities collect work with Gradescope. It runs a *zip* for each submission, in a container of its own: `setup.sh` installs, `run_autograder` grades and leaves `results.json`. Its fields are few, so we write them directly. Three things are worth knowing. The version of the package is pinned, so that the grades of a term do not change in the middle of it. The Python of Gradescope's machine may be older than the 3.11 that the package needs, so `setup.sh` brings one along. And the master lies in the zip with its solutions, so the zip is for the teacher and not for students.

# %%
#| export
def gradescope_results(
    grade: Grade, # of one submission
    asked: list,       # of Questions
) -> dict: # as Gradescope reads it
    "One test a question; those that a person marks are left to Gradescope's own rubric."
    tests = []
    for q in asked:
        if not q.check: continue
        points, told = grade.points[q.name], grade.said.get(q.name, "")
        tests.append(dict(name=q.name, score=points, max_score=q.points, output=told))
    return dict(tests=tests, output="\n".join(grade.flags))

_SETUP = """#!/usr/bin/env bash
set -e
apt-get update
apt-get install -y curl git
curl -LsSf https://astral.sh/uv/install.sh | env UV_INSTALL_DIR=/usr/local/bin sh
uv venv --python 3.11 /opt/grader
uv pip install --python /opt/grader/bin/python "sdpo_nb @ git+https://github.com/sdpo-nb/sdpo_nb@v{version}"
"""
_RUN = """#!/usr/bin/env bash
cd /autograder
/opt/grader/bin/python -m sdpo_nb.course grade source/{name} submission --results results/results.json{extra}
"""

def gradescope(
    master,        # path of the solved notebook
    out,           # path of the zip
    extra: str="", # path of a Python file with more checks
) -> Path:
    "The zip that Gradescope wants."
    from sdpo_nb import __version__
    master = Path(master)
    own = f" --extra source/{shlex.quote(Path(extra).name)}" if extra else ""
    run = _RUN.format(name=shlex.quote(master.name), extra=own)
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("setup.sh", _SETUP.format(version=__version__))
        z.writestr("run_autograder", run)
        z.write(master, master.name)
        if extra: z.write(extra, Path(extra).name)
    return Path(out)


# %% [markdown]
# What the zip holds, and what the student without $\beta$ would see:

# %%
made = gradescope(tmp / "masters/a0.ipynb", tmp / "a0.zip")
print(*zipfile.ZipFile(made).namelist())
wrong_one = next(g for g in grades if g.student == "no_beta")
print(json.dumps(gradescope_results(wrong_one, [q1, q2]), indent=1))


# %% [markdown]
# ## The commands
#
# Teachers do not grade in a notebook. So there are three verbs, with the same names as the functions. (`serve` is the server of above; you never type it.) `argparse` reads the line, and writes the help page as well: `python -m sdpo_nb.course grade --help`.

# %%
#| export
def _parser():
    "The three verbs and their options."
    parser = argparse.ArgumentParser("python -m sdpo_nb.course", description="Make and grade assignments.")
    verbs = parser.add_subparsers(dest="verb", required=True)

    v = verbs.add_parser("build", help="students' versions of a folder of masters")
    v.add_argument("masters", help="folder of solved notebooks")
    v.add_argument("out", help="folder of the students' versions")
    v.add_argument("--repository", default=REPOSITORY, help="on GitHub; '': no badge (default: %(default)s)")

    v = verbs.add_parser("grade", help="points and feedback for submissions")
    v.add_argument("master", help="the solved notebook")
    v.add_argument("submissions", help="folder of notebooks, or one notebook")
    v.add_argument("--csv", help="write the table of points here")
    v.add_argument("--feedback", help="write a page for each student into this folder")
    v.add_argument("--limit", type=float, default=60, help="seconds for one question (default: %(default)s)")
    v.add_argument("--extra", default="", help="Python file with more checks")
    v.add_argument("--manual", default="", help="CSV file with a person's points: student, q6, ...")
    v.add_argument("--seed", type=int, help="of the numbers that checks draw (default: new ones each time)")
    v.add_argument("--results", help="write Gradescope's results.json here (of the last submission)")

    v = verbs.add_parser("gradescope", help="the zip that Gradescope wants")
    v.add_argument("master", help="the solved notebook")
    v.add_argument("--out", required=True, help="path of the zip")
    v.add_argument("--extra", default="", help="as for grade")

    v = verbs.add_parser("serve")
    v.add_argument("extra")
    v.add_argument("ready", nargs="*")
    return parser



# %%
args = _parser().parse_args(["grade", "a1.ipynb", "submissions/", "--limit", "30"])
args.verb, args.limit


# %% [markdown]
# What `grade` leaves behind is what was asked for: a table with `--csv`, pages with `--feedback`, and `results.json` only for Gradescope. A file that cannot be used ends in one line and status 1, so a script that grades at night can notice. Whether the files can be written is tried before the slow part. And Gradescope hears of a failure, too, as a result with 0 points and the reason.

# %%
#| export
def _try_places(args):
    "Make the folders that `grade` writes into, and open its files once. Raises OSError where that cannot be."
    if args.feedback: Path(args.feedback).mkdir(parents=True, exist_ok=True)
    for path in (Path(name) for name in (args.csv, args.results) if name):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        open(path, "a").close()
        if new: path.unlink()

def _write_all(args, grades):
    "What `grade` leaves behind, where it was asked for."
    asked = questions(read_notebook(args.master))
    if args.csv: write_grades(grades, args.csv, asked)
    if args.results:
        results = gradescope_results(grades[-1], asked)
        Path(args.results).write_text(json.dumps(results, indent=1))
    if not args.feedback: return
    for g in grades:
        page = Path(args.feedback) / f"{g.student}.md"
        page.write_text(feedback(g, asked), encoding="utf-8", errors="replace")

def main(
    argv: list=None, # words of the command line; default: those of this process
):
    "`python -m sdpo_nb.course`. A file that cannot be used ends in one line and status 1."
    args = _parser().parse_args(argv)
    if args.verb == "serve": return _serve(args.extra, args.ready)
    try:
        if args.verb == "build": print(*build(args.masters, args.out, args.repository), sep="\n")
        elif args.verb == "gradescope": print(gradescope(args.master, args.out, args.extra))
        else:
            _try_places(args)
            how = dict(extra=args.extra, limit=args.limit, manual=args.manual, seed=args.seed)
            _write_all(args, grade(args.master, args.submissions, **how))
    except (ValueError, OSError) as e:
        if getattr(args, "results", None) and Path(args.results).parent.is_dir():
            Path(args.results).write_text(json.dumps(dict(score=0, output=f"could not be graded: {e}")))
        sys.exit(f"{e}")


# %%
#| export
#| eval: false
if __name__ == "__main__": main()


# %% [markdown]
# The commands as a teacher types them, each in a process of its own. First the careless master of above:

# %%
def course_says(*words):
    "Exit status of a command, and what it printed."
    command = [sys.executable, "-m", "sdpo_nb.course", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, (done.stdout + done.stderr).replace(str(tmp), "").strip()

status, text = course_says("build", tmp / "careless", tmp / "nowhere", "--repository", "")
assert status == 1
print(text)

# %% [markdown]
# Then the class once more, with a person's mark for one of them. The empty fields of q2 are those that nobody has marked yet:

# %%
(tmp / "marks.csv").write_text("student,q2\nright,3\n")
files = ["--csv", tmp / "grades.csv", "--feedback", tmp / "out", "--manual", tmp / "marks.csv"]
how = ["--limit", 5, "--seed", 1]
status, text = course_says("grade", tmp / "masters/a0.ipynb", tmp / "handed_in", *how, *files)
assert status == 0, text
table = pd.read_csv(tmp / "grades.csv", dtype=str, keep_default_na=False)[["student", "q1", "q2", "total"]]
assert table.set_index("student").loc["right"].to_list() == ["4", "3", "7"]
table

# %% [markdown]
# And the page that the student without $\beta$ gets back. The first section is the sentence of the check, with the section of the book and the seed. The second is what stands in the notebook under question 2: the question, and no answer.

# %%
print((tmp / "out/no_beta.md").read_text())

# %%
#| hide
shutil.rmtree(tmp)

# %% [markdown]
# ## Why not Otter or nbgrader?
#
# Both are good programs, and many courses have them. A review of this project, at commit b9eec8b, tried both with a short form of assignment 1, and a prototype of this chapter beside them. The numbers are
# the review's, not this notebook's:
#
# | | Otter 7.0.0 | nbgrader | this chapter's prototype |
# |---|---|---|---|
# | what it installs | 94 packages, 574 MB | 102 packages, 337 MB | nothing |
# | to grade one submission | 11 to 20 s; runs the whole notebook | 7 s for a toy; runs the whole notebook | 4 to 5 s; runs definitions only |
# | two lines that replace the checks | full points | not tried; the same design | 0 points |
# | on Colab | needs its folder of tests there | does not support it | needs nothing |
#
# nbgrader keeps its marks in the metadata of cells. This book is cleaned by nbdev, which removes such metadata; the marks were gone. If your university has one of the two, use it: the checks are plain functions that
# raise an error, so a test that calls `check_dpo_loss(dpo_loss)` works in either. Know then that a student's notebook can replace the checks.
#
# ## How a teacher uses it
#
# Clone the repository, and set it up with `make demo`. The masters are in `nbs/course`, the students' versions in `nbs/assignments`.
#
# 1. **Hand out**: send the link behind the Colab badge of `nbs/assignments/a1.ipynb`. Students save a copy in Drive, and download the notebook when they have finished (*File > Download > Download .ipynb*).
# 2. **Change something**, if you like: edit the master (points stand in the line `#| question q1 4 ...` and in the heading, a date belongs into the first cell), run it from the top, then
#
#    ```
#    python -m sdpo_nb.course build nbs/course nbs/assignments --repository YOU/YOURS
#    ```
# 3. **Collect** the notebooks into one folder, one file a student, and grade them:
#
#    ```
#    python -m sdpo_nb.course grade nbs/course/a1.ipynb submissions/ --csv grades.csv --feedback out/
#    ```
#    A question that a check grades gives all its points or none. Look at the column `flags`: there stands what a person should see, such as a cell or a line that could not be read, a name that is not defined, an answer in the wrong place, or an endless loop, which costs the time limit. Files that are no `.ipynb` are named and left out.
# 4. **Mark by hand** what is left: each page in `out/` holds the student's text. Write the points into `marks.csv` (columns `student`, `q6`), and grade once more with `--manual marks.csv`. Until then the total is without these questions.
#
# *Private checks.* The solutions of the masters are public, like everything here. The checks draw new numbers at each call, so a table of answers passes none of them, but a copied solution does. If points matter, change a
# question, and put a check of your own into a file that only you have: `--extra mine.py`. A function in it that has the name of a check is called after it, with the same argument; one with a new name is a new check, which
# a new question of your master can name.
#
# ## What you now have
#
# - `build`: students' versions without solutions, or an error with the line that is left.
# - `grade`: definitions only, a process for each question, a time limit, two guards against patched checks; a table, and a page for each student.
# - `gradescope`: the same, as the zip that Gradescope wants.
#
# ## Questions to test yourself
#
# 1. A student's training cell runs for an hour. How long does the grader take for it?
#
# <details><summary>Answer</summary>
#
# No time. The cell defines nothing, so it is not run. Only if the loop stands inside the function that is checked does it run, and then until the time limit.
#
# </details>
#
# 2. The leak test compares lines without blanks. What would it miss?
#
# <details><summary>Answer</summary>
#
# A solution with other names, one that is cut into lines at other places, and lines of fewer than 15 characters. It finds forgotten marks, and copies.
#
# </details>
#
# 3. Why does the canary call the check *after* the student's function, and not before it?
#
# <details><summary>Answer</summary>
#
# Before, the student's function has not run yet, so it cannot have changed anything.
#
# </details>
#
# ## Try this
#
# Add a third question to `master`, with a check of your own in a file: `check_double` of above, say, for a function `double`. Then grade with `--extra`.
#
# <details><summary>What you should see</summary>
#
# The table has a column q3. A submission without `double` gets 0 there, with the sentence "double is not defined".
#
# </details>
