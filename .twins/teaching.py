# %% [markdown]
# # Teaching with this book
# > Six sessions, four assignments, one project; how to hand out, grade and read what comes back.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/teaching.ipynb)
#
# This page is for teachers. Your students should know PyTorch (a training loop, autograd), what a language model computes, and logarithms. They need no graphics card, except for the project and one part of assignment 3; a free T4 on Colab will do.
#
# ## What they can do afterwards
#
# 1. Compute the log-probability of an answer, and say which four mistakes give a wrong number without an error.
# 2. Write the DPO loss from memory, derive it, and say what $\beta$ does and why a log begins with 0.693.
# 3. Write the training loop of a stage with a reference table, gradient accumulation and half precision.
# 4. Say what stepwise DPO changes, which model is the reference of which stage, and which runs a fair comparison needs.
# 5. Read somebody else's result: which baseline is missing, what the interval means, what one world does not show.
#
# ## Six sessions of 90 minutes
#
# Read before the session, run together, write afterwards. How long each part takes to read stands at the top of its chapter.
#
# | session | students read before | in class | after |
# |---|---|---|---|
# | 1. What people prefer | [welcome](welcome.ipynb); [00](00_world.ipynb) to the first comparisons | let students label ten pairs of the tiny world, and compare their labels with Bradley-Terry; which answer would *you* choose? | |
# | 2. What a model says | [02](02_logprobs.ipynb), part 1; [01](01_preferences.ipynb), where the prompt ends | one response by hand on the board: shift, gather, mask, sum; then break each of the four | assignment 1, questions 1 and 2 |
# | 3. The loss | [03](03_loss.ipynb) to the end of "What $\beta$ does", and "Label smoothing" | the line on one pair; predict each cell before it is run; the derivation with books closed | rest of assignment 1 |
# | 4. Data and order | [05](05_partition.ipynb) to "The blind spot: length" | which of two sources is easier? vote, then measure; flipped labels | assignment 2 |
# | 5. One stage for real | [06](06_trainer.ipynb), "Six lines" to "One step"; [02](02_logprobs.ipynb), the first paragraph of "Where does dropout hide?" | the six lines, live; then a bf16 model whose weights do not move; choose project models | assignment 3 |
# | 6. Stages, and what a result shows | [03](03_loss.ipynb), "The reference as a lower bound" and "What $T$ stages add up to"; [14](14_stepwise.ipynb), the method; [08](08_evaluate.ipynb), asking both models the same | run the [demo](demo.ipynb); then plan the comparison that would convince a sceptic | assignment 4, project |
#
# ## The assignments
#
# | | points | by checks | by hand | minutes | runtime |
# |---|---|---|---|---|---|
# | [a1: a loss from four numbers](assignments/a1.ipynb) | 20 | 17 | 3 | 90 | CPU |
# | [a2: which data first](assignments/a2.ipynb) | 20 | 16 | 4 | 75 | CPU |
# | [a3: one stage, half the precision](assignments/a3.ipynb) | 20 | 18 | 2 | 90 (+ 15 on a T4) | CPU, then T4 |
# | [a4: stages](assignments/a4.ipynb) | 20 | 15 | 5 | 100 | CPU |
#
# The minutes are estimates, without the reading that comes first; ask your first group. A question gives all its points or none; only the questions in words, which you mark, can give a part.
#
# ## From handing out to the last mark
#
# You need the repository: clone it, run `make demo` once, and give the commands below with `.venv/bin/python`. The solved masters are in `nbs/course`, with model answers and points for the questions in words.
#
# 1. **Hand out.** Send the link behind a notebook's Colab badge. Students save a copy, and download the notebook when they have finished.
# 2. **Grade.** Put what comes back into one folder, one file a student:
#
#    ```
#    python -m sdpo_nb.course grade nbs/course/a1.ipynb submissions/ --csv grades.csv --feedback out/
#    ```
#
#    Expect less than ten seconds for each submission. A function with an endless loop costs the time limit (60 seconds for each question, `--limit`). Files that are not `.ipynb` are named and left out; unpack a zip first.
# 3. **Look at the column `flags`** of `grades.csv`: cells and lines that could not be read, names that are not defined, answers out of place, a notebook that belongs to another assignment, functions that never ended.
# 4. **Mark the words.** Each page in `out/` holds a student's text. Until you have marked it, its question is empty in the table, and the total is without it. Write your points into a file `marks.csv`:
#
#    ```
#    student,q6
#    alice,2.5
#    ```
#
#    Then give the command of step 2 once more, with `--manual marks.csv`. A name or a number that cannot be is told before anything is graded. A point in this file counts also where a check gave another one.
#
# **To change something**, edit the master and never the students' version. The points stand in the line `#| question q1 4 check_sequence_logps sequence_logps` and in the heading of the question; a date for handing in belongs into the first cell. Then write the students' versions anew, into a repository of your own, because the badge is a link to it:
#
# ```
# python -m sdpo_nb.course build nbs/course nbs/assignments --repository YOU/YOURS
# ```
#
# **The solutions are public**, like everything here. The checks draw new numbers each time, so a table of answers passes none of them, but a copied solution passes. If points matter, change a question, give the words more weight, ask a student to explain a line, or add a check that only you have (`--extra mine.py`).
# How all this works, and what grading does not catch: [chapter 21](21_course.ipynb), "How a teacher uses it" and before.
#
# ## A student is stuck
#
# A student who is stuck should read what the check says before anything else: it names the mistake and the section of the book. To see the same numbers as the student, put a `print` into the function and pass the seed of the message: `try_check(check_ipo, ipo, seed=528380)`. This is what such a message looks like:
#
# > dpo_loss: beta stands outside the logarithm; it must scale the gain inside. Read chapter 03, "The loss". Your numbers are exactly those of this mistake; seed=1. Try: gain 0.6, beta 0.5 give 0.554.
#
# *Exactly* is meant: the student's numbers are, digit by digit, those of somebody who has made this mistake ([chapter 19](19_mistakes.ipynb) shows how that can be known). So you may believe a check that names a mistake. Where it says "not in a way that this check knows", look at the code yourself; it is wrong, but nobody has foreseen how. A right answer is not accused: the tests of the package check right answers 11,200 times (fourteen exercises, four ways to write each, 200 seeds), and none is refused.
#
# If three students meet the same message, that is the beginning of the next session. [Chapter 20](20_checks.ipynb) has, for every exercise, why the mistake is made, what it does in training, and a question to ask the class.
#
# ## What students get wrong
#
# Each check knows the usual mistakes of its exercise. This is the whole list, from the package. Use it as a bank of questions: show a wrong line, and ask what it does to the numbers before anybody runs it.

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
import pandas as pd
from IPython.display import Markdown

from sdpo_nb.checks import EXERCISES
from sdpo_nb.course import questions, read_notebook
from sdpo_nb.report import as_markdown

# %%
rows = []
for exercise in EXERCISES.values():
    if exercise.name == "predictions": continue          # its sentences give the answers away
    for mistake, told in exercise.says.items():
        chapter, heading = exercise.elsewhere.get(mistake, exercise.read)
        rows.append((exercise.name, told, f"{chapter}, {heading}"))
mistakes = pd.DataFrame(rows, columns=["exercise", "what is wrong, and why", "where to read"])
Markdown(as_markdown(mistakes.set_index("exercise")))

# %% [markdown]
# ## The project
#
# *Align a model of your choice on a T4, and compare stepwise DPO with DPO.* In pairs, two weeks.
#
# - A model of at most half a billion parameters. Weights, gradients and AdamW cost 16 bytes a parameter in fp32: 2.2 GB for 135 million, 5.8 GB for 360 million, 8 GB for half a billion. A T4 has 15 GB, so a model of one billion does not fit.
# - Two sources or more, at least 1,000 pairs, at least two stages.
# - Four runs: the base model; DPO, with $\beta$ chosen on validation pairs; DPO at $\beta/T$; stepwise DPO at the same $\beta$.
# - Measured on held-out pairs, with paired intervals and the KL to the base model; ten answers of each model side by side.
# - The run folder on Drive, so that a disconnect costs nothing ([chapter 22](22_colab.ipynb) shows how). One page of text.
#
# Students hand in one small file for each run, without the weights, and you check it:
#
# ```
# sdpo pack runs/mine                               # the student: makes runs/mine.zip
# sdpo verify mine.zip --sources a=a.jsonl b=b.jsonl   # you: every claim, ok or DIFFERS
# ```
#
# Without `--sources`, the data are listed as not checked; with `--model`, a model is asked again about 32 pairs. What is checked, and what no check can find: [chapter 17](17_verify.ipynb).
#
# | 10 points by the folder | |
# |---|---|
# | `sdpo verify` finds no DIFFERS: settings, tables, metrics and hashes agree | 4 |
# | the first loss of each stage is $\ln 2$, and the reference of each stage is the model before it | 2 |
# | the DPO runs saw the same pairs | 2 |
# | held-out pairs were never trained on | 2 |
#
# | 10 points by rubric | 0 | 1 | 2 |
# |---|---|---|---|
# | the question | none | one that no result could answer | one that the four runs can answer |
# | the baseline | none | DPO at the same $\beta$ only | DPO at $\beta$ and at $\beta/T$, with $\beta$ chosen on validation pairs |
# | the interval | none | there, but unpaired or not explained | paired, and its meaning said in one right sentence |
# | failures and samples | none | good samples only | signs of failure looked for, samples chosen by a rule that is stated |
# | what it does not show | nothing said | general caution | the one or two reasons why *this* result might not hold elsewhere |

# %% [markdown]
# The points of the assignments, from their masters (for a check of the table above; it needs the repository):

# %%
from pathlib import Path

masters = sorted(Path("course").glob("*.ipynb"))
points = {}
for path in masters:
    asked = questions(read_notebook(path))
    points[path.stem] = {
        "points": sum(q.points for q in asked),
        "by checks": sum(q.points for q in asked if q.check),
        "by hand": sum(q.points for q in asked if not q.check),
    }
if masters: assert [p["by checks"] for p in points.values()] == [17, 16, 18, 15]
pd.DataFrame(points).T
