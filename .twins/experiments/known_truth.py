# %% [markdown]
# # A real model, and the truth is known
# > The eight questions of the tiny worlds, asked of SmolLM2-135M-Instruct on tasks that a program grades; with margins and reasons, fixed before there is an answer.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/known_truth.ipynb)
#
# **There are no answers yet.** The questions, margins and arms below were committed before anything was trained (commit `dcdf499`; the rule of the levels was changed in `0d6aa7f` and `ef3de31`, after S had been asked and before any training). The grid waits for a graphics card.
#
# **You should know** the [protocol](protocol.ipynb) of the tiny worlds, the [tasks](graded_tasks.ipynb) of this page, and [stepwise DPO](../14_stepwise.ipynb). **Time** 35 minutes to read, a minute to run.
#
# The tiny worlds know the truth, but their model has 337 thousand parameters. And in most of them no curriculum is hidden: their easy and hard sources ask for the same skills. [SmolLM2 on real pairs](smollm2.ipynb) is a real model, but there nobody knows which answer is right. This experiment stands between the two. The model is real, with 135 million parameters, a program knows how right an answer is, and a hard problem really builds on an easy one.

# %%
#| default_exp known_truth

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
import itertools

import numpy as np
import pandas as pd

from sdpo_nb.compare import equality_of, sign_flip_p_value, with_holm
from sdpo_nb.graded import calibration

# %%
import matplotlib.pyplot as plt
import seaborn as sns
from sdpo_nb.compare import verdict
from sdpo_nb.evaluate import as_text
from sdpo_nb.graded import TASKS, grade
from sdpo_nb.graded_cells import common_draws, draw_problems, draws_off_the_ladder
from sdpo_nb.graded_cells import graded_answers, graded_means, read_known_truth
from sdpo_nb.partition import wilson
from sdpo_nb.smollm2 import on_the_edge, without_words_before_the_end
from sdpo_nb.timed import read_results

# %% [markdown]
# ## Three sources
#
# S answers problems of five [tasks](graded_tasks.ipynb): additions, sorting, reversing, JSON and counting words. A task has three sizes, and so there are three sources. In *easy* S is right in about 60 of 100 sampled answers, in *middle* in 20, in *hard* in 3. Which sizes these are is measured, and the rule that picks them is fixed here:
#
# - Let $p$ be the share of right answers of a size, counted as $(\text{right} + \frac12)/(\text{answers} + 1)$, so that it is never 0 or 1. For each task those three sizes are taken, one larger than the other, whose log-odds are nearest to those of 0.60, 0.20 and 0.03: the sum of the squared distances is smallest.
# - A source has the same number of problems of each task. There are only 45 sums of two digits, so there the same questions come again, each time with other answers of S. (This rule first left such sums out. The first sixteen answers of S to larger ones showed that no other addition is easy for it.)

# %%
#| export
SOURCES = ("easy", "middle", "hard")
TARGETS = dict(easy=0.60, middle=0.20, hard=0.03)   # share of right answers that S should have
PROMPTS = 500                                       # of each source, in equal parts of each task
TEST, VALIDATION = 40, 20                           # problems of each task and level

def _log_odds(p): return np.log(p / (1 - p))

def choose_sizes(
    right: dict,     # size -> right answers
    answers: dict,   # size -> answers
) -> dict:           # source -> size
    "The three sizes of one task, by the rule above. Raises ValueError for fewer than three."
    sizes = sorted(right)
    if len(sizes) < len(SOURCES): raise ValueError(f"sizes: {sizes}; at least three are needed")
    odds = {size: _log_odds((right[size] + 0.5) / (answers[size] + 1)) for size in sizes}
    wanted = [_log_odds(p) for p in TARGETS.values()]

    def distance(triple): return sum((odds[size] - want) ** 2 for size, want in zip(triple, wanted))
    best = min(itertools.combinations(sizes, len(SOURCES)), key=distance)
    return dict(zip(SOURCES, best))

def levels_from(
    rows: list,  # of a calibration: task, size, first, second (scores)
) -> dict:       # source -> task -> size
    "The sizes of the three sources, task by task."
    right, answers = {}, {}
    for row in rows:
        task, size, scores = row["task"], row["size"], row["first"] + row["second"]
        right.setdefault(task, {})[size] = sum(score == 1 for score in scores)
        answers.setdefault(task, {})[size] = len(scores)
    chosen = {task: choose_sizes(right[task], answers[task]) for task in right}
    return {source: {task: chosen[task][source] for task in chosen} for source in SOURCES}

def stored_levels() -> dict: # source -> task -> size
    "The sizes of the three sources, by the rule above."
    return levels_from(calibration())


# %% [markdown]
# An invented task: of 48 answers each, 40 are right at size 1, 30 at size 2, 11 at size 3, none at size 4, and none at size 5.

# %%
tried = {1: 40, 2: 30, 3: 11, 4: 0, 5: 0}
chosen = choose_sizes(tried, dict.fromkeys(tried, 48))
assert chosen == dict(easy=2, middle=3, hard=4)      # on a tie the smaller size
chosen

# %% [markdown]
# S was asked: two sampled answers to each of 24 problems of every task and size, 48 answers. These sizes were chosen:

# %%
levels = stored_levels()
for task in levels["easy"]: assert levels["easy"][task] < levels["middle"][task] < levels["hard"][task], task
assert set(levels["easy"]) == set(TASKS)
UNITS = dict(add="digits of both numbers", sort="words", reverse="words", json="keys", count="words")
pd.DataFrame(levels).assign(unit=UNITS)

# %% [markdown]
# And this is how often S was right. Before you look: on which tasks is the step from one size to the next steep?

# %%
asked = pd.DataFrame(calibration())
asked["scores"] = asked["first"] + asked["second"]
asked["share"] = asked["scores"].map(lambda scores: np.mean(np.array(scores) == 1))

COLOURS = dict(easy="tab:green", middle="tab:orange", hard="tab:red")
fig, axes = plt.subplots(1, len(TASKS), figsize=(11, 2.9), sharey=True, constrained_layout=True)
for ax, (task, rows) in zip(axes, asked.groupby("task", sort=False)):
    for source, share in TARGETS.items(): ax.axhline(share, color=COLOURS[source], lw=1, ls=":")
    low, high = np.array([wilson(p, n) for p, n in zip(rows["share"], rows["n"])]).T
    ax.vlines(rows["size"], low, high, color="0.7")
    ax.plot(rows["size"], rows["share"], "o-", color="0.7", mfc="white")
    for source in SOURCES:
        size = levels[source][task]
        ax.plot(size, rows.loc[rows["size"] == size, "share"], "o", color=COLOURS[source], ms=8, label=source)
    ax.set(title=task, xlabel=UNITS[task], xticks=rows["size"], ylim=(-0.02, 1))
axes[0].set_ylabel("share of right answers of S")
axes[-1].legend(fontsize="small", frameon=False)
sns.despine()

# %% [markdown]
# The lines are 95 % intervals. They count a problem once, not twice, as its two answers are alike; the dotted lines are the 60, 20 and 3 of a hundred that were wanted. In every task the three chosen sizes are ever harder. (Two additions that differ by a digit, of five and six, are in each other's interval.) So the name *building on* has a meaning that can be measured: S, which often fails at the small one, hardly ever does the large one.
#
# How hard is each source as a whole, and how many pairs will it have? A pair needs two answers with different scores; the teacher needs an answer of S that is not right.

# %%
rows = {}
for source in SOURCES:
    sizes = asked["task"].map(levels[source])
    chosen_rows = [row for _, row in asked[asked["size"] == sizes].iterrows()]
    first, second = (np.concatenate([row[name] for row in chosen_rows]) for name in ("first", "second"))
    right = np.concatenate([first == 1, second == 1]).mean()
    better = np.maximum(first, second)
    with_right = (first != second) & (better == 1)
    rows[source] = {
        "right": as_text((right, *wilson(right, len(first))), ".2f"),
        "mean score": round(np.concatenate([first, second]).mean(), 2),
        "pairs of 500 prompts": round(PROMPTS * np.mean(first != second)),
        "of these with a right answer": round(PROMPTS * with_right.mean()),
        "pairs with a teacher": round(PROMPTS * np.mean(first < 1)),
    }
table = pd.DataFrame(rows).T
assert (table["pairs with a teacher"].diff().dropna() > 0).all()
assert table.loc["hard", "of these with a right answer"] < 0.1 * table.loc["hard", "pairs of 500 prompts"]
table

# %% [markdown]
# So the three sources are as easy and hard as was wanted: 0.57, 0.23 and 0.03. And a hard source has more pairs than an easy one, since two answers of S are seldom both right there. But hardly any of its pairs shows a right answer. That is what the teacher is for.

# %% [markdown]
# ## Pairs, draws, and what is measured
#
# A *draw* has problems of its own, 500 of each source, with two answers of S to each, and labels by Bradley-Terry on the score with $k = 6$ ([tasks](graded_tasks.ipynb)). It also has test problems of its own, forty of each task and level, so 600. (Small tasks have few different problems, so some of them stand in several draws; how many is counted below.) All arms of a draw share the pairs, the order of the data, the test problems, and the luck behind their sampled answers.
#
# - *sampled* and *greedy*: the mean score of the answers to the 600 test problems, at temperature 1 and without chance. The first is the outcome of all questions but one, as in the tiny worlds.
# - Beside them, without a test: each level by itself, the share of answers that are right, and the KL from S in nats, along the sampled answers.
#
# How many draws? With eight questions corrected together, the smallest p-value that a sign-flip test can have must survive a factor of 8.

# %%
#| export
DRAWS = range(1, 11)
SEARCH_DRAW = 101    # reported nowhere; its settings are measured on validation problems


# %%
def smallest(draws, questions=8): return questions * 2 / 2 ** draws
assert smallest(len(DRAWS)) < 0.05 < smallest(8)     # eight draws could not answer
{draws: round(smallest(draws), 4) for draws in (6, 8, 9, 10)}


# %% [markdown]
# With six or eight draws nothing could pass. So there are ten.
#
# ## The arms
#
# An arm is a list of stages, as on [the page of SmolLM2](smollm2.ipynb): which pairs, where it starts (`S`, or the model `before`), and what its reference is.

# %%
#| export
def _stages(chunks, start="before", reference="before"):
    "The first stage starts at S and has S as its reference; the others as is said."
    later = [(chunk, start, reference) for chunk in chunks[1:]]
    return [(chunks[0], "S", "S"), *later]

ARMS = { # name -> stages: (pairs, start, reference)
    "S": [],
    "SFT on chosen": [("all", "S", "none")],
    "DPO": _stages(["all"]),
    "sDPO": _stages(SOURCES),
    "sDPO, random": _stages(["random 1", "random 2", "random 3"]),
    "sDPO, hard first": _stages(SOURCES[::-1]),
    "sDPO, fixed reference": _stages(SOURCES, reference="S"),
    "sDPO, target S": _stages(SOURCES, start="S"),
}
LADDER = (1 / 4, 1 / 2, 2, 4)   # of sDPO, times its best beta: for the question at equal KL
BORROWED = { # arm -> the arm whose stages it has, the arm whose settings it takes, and the factor of beta
    "sDPO at DPO's beta": ("sDPO", "DPO", 1),
    "DPO at beta/T": ("DPO", "DPO", 1 / 3),
    **{f"sDPO, {factor:g} beta": ("sDPO", "sDPO", factor) for factor in LADDER},
}

# %%
said = {name: [" ".join(stage) for stage in stages] for name, stages in ARMS.items()}
pd.DataFrame.from_dict(said, orient="index", columns=["stage 1", "stage 2", "stage 3"]).fillna("")

# %% [markdown]
# *Easy first* means here: in the order of S's pass rates, which is the true one. The paper's recipe measures the order, by the share of pairs with $\gamma > 0$ under S. Whether that gives the same order is noted for every draw.
#
# Every arm is searched on one grid, in one draw that is reported nowhere, and takes the settings with the highest mean score of sampled answers to the validation problems; on a tie the first of the grid. The grid is not extended where the best lies on its edge; the page will say where it does. Fine-tuning has no $\beta$. Everything else is that of the tiny worlds: three passes over the pairs, batches of 32, a schedule that restarts in each stage. Longer answers than 32 tokens are cut.

# %%
#| export
BETAS = (0.03, 0.1, 0.3, 1.0)
LEARNING_RATES = (3e-6, 1e-5, 3e-5)
COMMON = dict(epochs=3, batch_size=32)   # of every run
LONGEST_PAIR = 384                       # tokens of a prompt with its response

def graded_grid(
    arm: str,     # of ARMS
) -> list[dict]:  # settings, in the order of the search; none for S
    "The settings that are tried for an arm."
    if arm == "S": return []
    if arm == "SFT on chosen": return [dict(lr=lr) for lr in LEARNING_RATES]
    return [dict(beta=beta, lr=lr) for beta, lr in itertools.product(BETAS, LEARNING_RATES)]


# %%
searched = sum(len(graded_grid(arm)) for arm in ARMS)
main = (len(ARMS) + len(BORROWED)) * len(DRAWS)
print(f"{searched} runs of the search; then {len(ARMS) + len(BORROWED)} rows in {len(DRAWS)} draws: {main}")

# %% [markdown]
# ## Eight questions
#
# They are those of the tiny worlds, and all eight are primary: their p-values are corrected together, by Holm.

# %%
#| export
QUESTIONS = pd.DataFrame([
    ("stepwise against plain", "sDPO", "DPO", "sampled"),
    ("the same, greedy", "sDPO", "DPO", "greedy"),
    ("the same, at the KL of plain", "sDPO at the KL of DPO", "DPO", "sampled"),
    ("easy first against random order", "sDPO", "sDPO, random", "sampled"),
    ("easy first against hard first", "sDPO", "sDPO, hard first", "sampled"),
    ("moving against fixed reference", "sDPO", "sDPO, fixed reference", "sampled"),
    ("target from M_{t-1} against from S", "sDPO", "sDPO, target S", "sampled"),
    ("stepwise at beta against plain at beta/T", "sDPO at DPO's beta", "DPO at beta/T", "sampled"),
], columns=["question", "a", "b", "outcome"])
MARGIN = 0.02 # of the score: what is too small to count

# %%
names = {*ARMS, *BORROWED, "sDPO at the KL of DPO"}
assert set(QUESTIONS["a"]) | set(QUESTIONS["b"]) <= names
QUESTIONS.set_index("question")

# %% [markdown]
# *sDPO at the KL of DPO* is no arm. It is read off the ladder of sDPO's $\beta$, draw by draw, linearly between its neighbours. Where DPO lies outside the ladder in a draw, the nearest end is taken, and the page will say in how many draws it was.
#
# ## What is too small to count
#
# The margin is two points of a hundred of the score, as in the tiny worlds. What speaks for it here? An outcome counts only if it is *sensitive*: DPO minus S must exceed twice the margin. In the paper's table 3 stepwise DPO is ahead of DPO by 1.64, on top of the 3.16 that DPO is ahead of S. If it were as far ahead here, what would the smallest difference be that we had to see?

# %%
ahead = 1.64 / 3.16
least = ahead * 2 * MARGIN
assert least > MARGIN
print(f"at least {least:.4f}")

# %% [markdown]
# More than the margin. So whatever is inside the margin is smaller than the paper's effect would be. If DPO minus S does not exceed 0.04, we say *this outcome cannot tell*, whatever the differences between arms are.
#
# The words, for one question:
#
# - *different*: the p-value of the exact sign-flip test over draws is below 0.05 after Holm, and the interval leaves out 0;
# - *equal*: the larger p-value of two one-sided tests, against plus and minus the margin, is below 0.05 after Holm;
# - both: the difference is there, and little. Neither: we cannot tell. What is different is called *better* or *worse*.
#
# A draw is one number, the mean of its differences. The interval is Student's, with nine degrees of freedom. It takes the ten numbers as independent. Are they? Every draw draws its problems anew, but small tasks have few different ones. What share of the test questions of a draw comes again in another draw?

# %%
questions = {}
for draw in DRAWS:
    for problems in draw_problems(draw, "test", levels, TEST).values():
        for problem in problems: questions.setdefault(problem.task, {}).setdefault(draw, []).append(problem.question)

def share_again(by_draw): # of the questions of a draw, in another draw
    shares = [np.isin(by_draw[a], by_draw[b]).mean() for a in DRAWS for b in DRAWS if a != b]
    return float(np.mean(shares))

again = {task: share_again(by_draw) for task, by_draw in questions.items()}
everything = {draw: sum((by_draw[draw] for by_draw in questions.values()), []) for draw in DRAWS}
again["all five"] = share_again(everything)
topics = {question.split(": ")[1] for draw in DRAWS for question in questions["count"][draw]}
sums = {question for draw in DRAWS for question in questions["add"][draw] if len(question) == len("1 + 2 =")}
assert len(topics) == 41
assert len(sums) == 18
assert again["count"] > 0.9
assert 0.2 < again["all five"] < 0.3
pd.Series(again).map("{:.0%}".format).to_frame("in another draw, too")


# %% [markdown]
# A quarter. There are 41 topics for *count* in the test, and each draw has nearly all of them; of the smallest additions there are 18 questions, and each draw has these. The luck of such problems has one sign in all draws. More draws do not average it out, and neither the interval nor the two tests know it. So what they say is about these problems where *count* and small additions are concerned. The answers are sampled with other luck in each draw.

# %%
#| export
def draw_contrasts(
    differences: dict,       # question -> (draws,) mean difference of each draw; two draws or more
    margin: float = MARGIN,  # what is too small to count
) -> pd.DataFrame:           # question, mean, low, high, draws, p, holm, p_equal, holm_equal
    "Intervals, p-values of a difference and of equality, of questions that are asked together."
    rows = []
    for question, values in differences.items():
        asked = dict(question=question, draws=len(values), p=sign_flip_p_value(np.asarray(values)))
        rows.append(asked | equality_of(values, margin))
    return with_holm(pd.DataFrame(rows))


# %% [markdown]
# How often are these words right, where draws are independent? We invent eight questions with one true difference, a hundred times, with a standard deviation of 0.02 between draws. (Six hundred problems whose differences have a standard deviation of 0.35 give 0.014 already.) How often is *equal* said where the difference is as large as the margin?

# %%
rng = np.random.default_rng(0)

def invented_words(shift, draws=len(DRAWS), questions=8, deviation=0.02, tries=100):
    said = []
    for _ in range(tries):
        values = {str(i): shift + rng.normal(0, deviation, draws) for i in range(questions)}
        said += draw_contrasts(values).apply(verdict, axis=1).tolist()
    said = pd.Series(said).str.replace("better|worse", "different", regex=True)
    return said.value_counts(normalize=True)

VERDICTS = ["different", "different, but little", "equal", "we cannot tell"]
words = pd.DataFrame({shift: invented_words(shift) for shift in (0, MARGIN, 0.04, 0.08)})
words = words.reindex(VERDICTS).fillna(0)
assert words.loc["equal", MARGIN] < 0.02
assert words.loc[["different", "different, but little"], 0].sum() < 0.05
assert words.loc["different", 0.08] > 0.95
words.rename_axis(columns="true difference").round(3)

# %% [markdown]
# Hardly ever. And where nothing differs, *different* is said of less than one in a hundred. The price: of eight true equalities a third is found. Ten draws are few for it, if draws vary as much as this.

# %% [markdown]
# ## Where the answers will come from
#
# The grid needs a graphics card. The [command](graded_cells.ipynb) is
#
#     python -m sdpo_nb.experiments known_truth --minutes 8 --folder OUT
#
# and it goes on where it was stopped. Rows that are brought back into `../shared/results` are found here.
#
# Without a card there is a *smaller version*, `known_truth_cpu`: four of the eight questions, eight draws of 300 problems to learn from and 300 to be tested with, and no search. All arms have $\beta = 0.1$, a learning rate of $10^{-5}$ and batches of 16; only *DPO at beta/T* has a third of that $\beta$. *sDPO at DPO's beta* is then sDPO itself. Answers are computed in bf16. At one $\beta$ three stages go farther from S than one ([finite data](finite_data.ipynb), equation 3), so *stepwise against plain* mixes the method with the distance, and the last question is the fairer of the two. The stages are short: some 30 pairs in the easy one, 70 in the hard one. This version was fixed in commit 376488c, before its first run.

# %%
#| export
CPU_ARMS = ("S", "DPO", "sDPO", "sDPO, hard first")
CPU_BORROWED = ("sDPO at DPO's beta", "DPO at beta/T")
_there = CPU_ARMS + CPU_BORROWED
CPU_QUESTIONS = QUESTIONS[QUESTIONS["a"].isin(_there) & QUESTIONS["b"].isin(_there)]
CPU_DRAWS = range(1, 9)
CPU_SAMPLES = dict(n=20, tests=20, how=dict(precision="bf16"), settings=COMMON | dict(batch_size=16))

# %%
assert smallest(len(CPU_DRAWS), len(CPU_QUESTIONS)) < 0.05
CPU_QUESTIONS.set_index("question")

# %% [markdown]
# What can eight draws say? *Different*, only where all eight lie on the same side of 0: then p is $2/2^8$, and 0.031 after Holm. And *equal*? We invent answers again, now with a standard deviation of 0.03 between draws, as there are fewer test problems.

# %%
of_few = dict(draws=len(CPU_DRAWS), questions=len(CPU_QUESTIONS), deviation=0.03)
words = pd.DataFrame({shift: invented_words(shift, **of_few) for shift in (0, MARGIN, 0.04, 0.08)})
words = words.reindex(VERDICTS).fillna(0)
assert words.loc["equal", 0] < 0.1
words.rename_axis(columns="true difference").round(3)

# %% [markdown]
# Hardly ever. So this version can find a large difference, and says *we cannot tell* of the others. If DPO gains less than 0.04 on S, all four answers are *this outcome cannot tell*, and no other setting is tried.

# %%
for name, questions, draws in (("known_truth_cpu", CPU_QUESTIONS, CPU_DRAWS), ("known_truth", QUESTIONS, DRAWS)):
    found = read_known_truth(name)
    complete = common_draws(found, questions)
    print(f"{name}: {len(complete)} of {len(draws)} draws are there")
    for draw, mix in found.left_out.items(): print(f"draw {draw} is left out; {mix}")
    if found.chosen and name == "known_truth":
        edges = {arm: on_the_edge(settings, graded_grid(arm)) for arm, settings in found.chosen.items() if arm in ARMS}
        display(pd.DataFrame(found.chosen).T.assign(edge=pd.Series(edges)))
    if len(complete) > 1:
        display(without_words_before_the_end(graded_answers(found, questions), found.missing).round(3))
        display(graded_means(found).round(3))
        if name == "known_truth": print("DPO is outside the ladder in draws", draws_off_the_ladder(found))
        prefers = {draw: row["prefers"] for draw, row in found.rows["DPO"].items()}
        print("as the recipe would order:", {draw: sorted(of, key=of.get)[::-1] for draw, of in prefers.items()})

# %% [markdown]
# ## A rehearsal
#
# Do all parts work on the real model? On a processor, `known_truth_rehearsal` asked S for two problems of each task and level, and for one of each in the test. It answers nothing. But the parts can be looked at: what S wrote, how often it was right, and what it takes.

# %%
rehearsed = read_results("known_truth_rehearsal")
for row in rehearsed:
    seconds = f"{row['seconds']:.0f} s on a busy machine"
    print(row["kind"], row.get("arm", "S"), row["card"], seconds)

wrote = rehearsed[0]
problems = draw_problems(wrote["draw"], "train", levels, 2)
shown = []
for source, asked_here in problems.items():
    for problem, *answers in zip(asked_here[:2], *wrote["answers"][source]):
        first, second = answers
        shown.append({
            "source": source,
            "question": problem.question,
            "first answer": first,
            "its score": grade(problem, first),
            "second answer": second,
            "its score ": grade(problem, second),
        })
with pd.option_context("display.max_colwidth", 50): display(pd.DataFrame(shown).set_index("source").round(2))

# %%
models = {row["arm"]: row for row in rehearsed if row["kind"] == "arm"}
assert max(map(abs, models["S"]["kl"])) < 1e-6                   # S is at no distance from itself
assert np.mean(models["DPO"]["kl"]) > 0
means = {}
for arm, row in models.items():
    means[arm] = {what: np.mean(row[what]).round(4) for what in ("sampled", "greedy", "kl")}
pd.DataFrame(means).T

# %% [markdown]
# One step of DPO on a few pairs: the model has hardly moved, as it must be, and fifteen answers say nothing about scores. All parts work.

# %% [markdown]
# ## What this does not show
#
# - One base model. All ten draws are of its answers, so nothing is said about another one.
# - Other problems. A quarter of the test questions of a draw stands in any other draw as well, and of *count* nearly all. The intervals take draws as independent, and are a little too narrow for problems that nobody has asked.
# - The hard source is about form and nearness more than about being right, as S is hardly ever right there. The arms with the [teacher's](graded_tasks.ipynb) pairs ask the same with right answers (`known_truth_teacher`); they are exploratory.
# - The levels come from 48 answers each. On the test problems of the draws S will be a little better or worse; its row says by how much.
# - A curriculum of five tasks at once. Which task builds on which is known only within a task.
#
# ## What you now have
#
# - Eight questions, a margin with a reason, ten draws, and a rule that says when an outcome cannot tell: all before there is an answer.
# - `choose_sizes`: sources that are easy, middle and hard for a given S, by a rule.
# - `draw_contrasts`: from one number a draw to the words of the page.
#
# ## Questions to test yourself
#
# 1. In the tiny worlds there were ten worlds with two seeds. Here there is one S with ten draws. What do we learn less about?
#
#    <details><summary>Answer</summary>
#
#    How much the answer depends on S. Ten worlds had ten base models.
#
#    </details>
# 2. Why is a gain of DPO asked for before two other arms are compared?
#
#    <details><summary>Answer</summary>
#
#    Where DPO does nothing, stepwise DPO does nothing either, and both are "equal". That would be a statement about the outcome, and not about the methods.
#
#    </details>
# 3. A hard source could be hard because its labels are wrong more often. Is it so here?
#
#    <details><summary>Answer</summary>
#
#    No: labels come from the score and (1) everywhere. But two wrong answers often have close scores, and close scores are what (1) errs about.
#
#    </details>
#
# ## Try this
#
# - Give `invented_words` a deviation of 0.01. Is *equal* said more often where it is true?
#
#   <details><summary>What you should see</summary>
#
#   It is said of 99 in a hundred questions that are truly equal, instead of 31. Ten draws suffice where draws vary little.
#
#   </details>
