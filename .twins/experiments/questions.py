# %% [markdown]
# # Questions, asked beforehand
# > Ten worlds, one search for every method, eight questions fixed before the answers, and the runs that answer them.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/questions.ipynb)
#
# **You should know** what a [cell](cells.ipynb) is and how two methods are [compared](compare.ipynb).
#
# **Time** an hour to read, half of it for the grids, which you may skip; a few seconds to run, as everything is read from the stored table. What the runs behind it took is added up in the [protocol](protocol.ipynb).
#
# When you look at enough differences, some are large by chance. And a method that you tuned beats one that you did not tune. So four things were fixed before
# the answers were seen: how many worlds, how settings are searched, which questions are asked, and what counts as equal. This page says how they were fixed.
# Its second half lists the runs of all experiments, one grid for each page. If you only want the answers, go to the [protocol](protocol.ipynb).

# %%
#| default_exp questions

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
import itertools, json
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pandas as pd

from sdpo_nb.bodies import BODIES, SEARCH_WORLDS, SIZES, untrained
from sdpo_nb.cells import BASELINES, METHODS, RESULTS, Cell, read_runs, rows_of_cells, stored_rows
from sdpo_nb.compare import SAME, check_same_draws, outcome_values, paired_difference
from sdpo_nb.compare import reward_at_kl, slope_test, tested_differences, verdict, weighted_sum
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.training_data import COMMON_SETTINGS
from sdpo_nb.world import SKILLS, make_tokenizer

# %%
import matplotlib.pyplot as plt
import seaborn as sns
from sdpo_nb.compare import sign_flip_p_value, standard_deviations
from sdpo_nb.world import complaint

# %% [markdown]
# ## How many worlds, how many seeds?
#
# Before the real runs there was a small trial, a *pilot*: DPO and sDPO with four seeds in each of five worlds that are reported nowhere, measured on
# validation prompts. From it we estimate how much a difference varies between worlds, and between the seeds of a world.

# %%
#| export
PILOT_WORLDS = range(201, 206)
WORLDS, SEEDS = range(1, 11), range(2) # of every experiment that OTHER_DRAWS does not name

def pilot_cells() -> list[Cell]:
    "DPO and sDPO, before any settings were searched."
    return [Cell(world, seed, method, split="validation")
            for method in ("DPO", "sDPO") for world in PILOT_WORLDS for seed in range(4)]


# %%
trial = {}
for method in ("DPO", "sDPO"):
    cells = [cell for cell in pilot_cells() if cell.method == method]
    trial[method] = outcome_values(stored_rows(cells), "sampled")

parts = {
    "true reward of DPO": standard_deviations(trial["DPO"]),
    "of sDPO minus DPO, paired": standard_deviations(trial["sDPO"] - trial["DPO"]),
}

def standard_error(sd, W, R): # of W worlds with R seeds: equation (1) of the page on comparing
    return (sd["worlds"]**2 / W + sd["seeds"]**2 / (W * R)) ** 0.5

rows = {}
for name, sd in parts.items():
    rows[name] = {"sd between worlds": sd["worlds"], "sd between seeds": sd["seeds"]}
    for W, R in ((5, 4), (len(WORLDS), len(SEEDS)), (20, 1)):
        rows[name][f"standard error, {W} worlds x {R}"] = standard_error(sd, W, R)

paired = parts["of sDPO minus DPO, paired"]
assert paired["worlds"] < 0.7 * parts["true reward of DPO"]["worlds"]
assert standard_error(paired, len(WORLDS), len(SEEDS)) < SAME / 4
pd.DataFrame(rows).T.round(4)

# %% [markdown]
# Pairing takes away half of what differs between worlds. It adds to what differs between seeds, which counts less. Ten worlds with two seeds had been set by what the machine could do, before the pilot was complete. The pilot says
# that they suffice: the standard error is 0.004, a fifth of what counts as equal below. (Five worlds say little about a standard deviation. And the
# pilot ran before the search, at settings that are nobody's best. Afterwards: the standard error of the first question was 0.005.)
#
# ## The same search for every method
#
# Every method of DPO has two settings that matter most. $\beta$ says how hard the model is held near its reference, and the learning rate how far a step goes. Each method gets the same grid of
# both: seven $\beta$, a factor of two apart, and four rates. It is searched on validation prompts of two worlds that are reported nowhere. Fine-tuning on the chosen responses has no $\beta$ and is searched over learning rates; the
# temperature of S is searched in each world by itself.

# %%
#| export
BETAS = (0.15, 0.3, 0.6, 1.2, 2.4, 4.8, 9.6)
LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3)

def search_cells() -> list[Cell]:
    "The search: of every method of DPO, and (without beta) of fine-tuning on the chosen responses."
    cells = []
    for method, beta, lr, world in itertools.product(METHODS, BETAS, LEARNING_RATES, SEARCH_WORLDS):
        cells.append(Cell(world, 0, method, dict(beta=beta, lr=lr), "validation"))
    for lr, world in itertools.product((*LEARNING_RATES, 3e-3), SEARCH_WORLDS):
        cells.append(Cell(world, 0, "SFT on chosen", dict(lr=lr), "validation"))
    return cells

def search_table(
    rows: pd.DataFrame, # of the table of runs
) -> pd.DataFrame:      # method, reward, kl, and a column for each setting
    "Mean sampled true reward and KL (nats) of each run of a search, with its settings as columns."
    runs = []
    for row in rows.itertuples():
        means = dict(method=row.method, reward=np.mean(row.sampled), kl=np.mean(row.kl))
        runs.append(means | json.loads(row.settings))
    return pd.DataFrame(runs)


# %% [markdown]
# Here are the three best runs of the whole search. They belong to two methods, lie within 0.003 of each other, and went quite different distances:

# %%
search_rows = stored_rows(search_cells())
assert len(search_rows) == len(search_cells())
tried = search_table(search_rows)
tried.sort_values("reward", ascending=False).head(3).round(dict(reward=3, kl=3))


# %% [markdown]
# The best of each method is chosen. What if the best lies at the edge of the grid? Then a better one may lie beyond it, and this method
# would be treated worse than the others. That is refused, and the grid has to grow, for all methods.

# %%
#| export
def choose_settings(
    rows: pd.DataFrame, # of a search
) -> dict:              # method -> settings
    """The settings with the highest mean true reward, sampled on validation prompts.
    Raises ValueError where they lie on the edge of what was tried, or where not all were tried in the same worlds."""
    check_same_draws({" ".join(run): tried for run, tried in rows.groupby(["method", "settings"])})
    rewards = rows.assign(reward=rows["sampled"].map(np.mean))
    rewards = rewards.groupby(["method", "settings"])["reward"].mean()
    best = {}
    for method, (_, settings) in rewards.groupby("method").idxmax().items():
        best[method] = json.loads(settings)
        tried = [json.loads(text) for text in rows.loc[rows["method"] == method, "settings"]]
        for name, value in best[method].items():
            values = [settings[name] for settings in tried]
            if value in (min(values), max(values)):
                raise ValueError(f"{method}: its best {name}, {value:g}, is on the edge of the grid; "
                                 "extend the grid, for all methods")
    return best

def chosen_settings() -> dict: # method -> settings
    "What the search chose, as it was committed."
    return json.loads((RESULTS / "choices.json").read_text())


# %% [markdown]
# An invented search: the best of A is inside, the best of B on the edge.

# %%
def invented(method, rewards): # beta -> reward
    rows = []
    for beta, reward in rewards.items():
        run = dict(method=method, settings=json.dumps(dict(beta=beta)), sampled=[reward])
        rows.append(run | dict(world=0, seed=0, weights="S of 0"))
    return pd.DataFrame(rows)

inside = invented("A", {1: 0.2, 2: 0.4, 3: 0.1})
on_the_edge = invented("B", {1: 0.5, 2: 0.6, 3: 0.7})
assert choose_settings(inside) == dict(A=dict(beta=2))
print(complaint(choose_settings, pd.concat([inside, on_the_edge])))

# %% [markdown]
# A search that was stopped is refused, too. Worlds differ by more than settings do, so a mean over two worlds must not be compared with the reward in one of them.

# %%
unfinished = pd.concat([inside, inside.iloc[:2].assign(world=1)])
print(complaint(choose_settings, unfinished))

# %% [markdown]
# So we know what the function protects us from. The real search met it once. It began as six $\beta$ from 0.075 and three rates. Where the grid lies was seen from DPO and sDPO in world 0, and it was moved up by a factor of two before it ran. Then `sDPO, target S` was best at the largest of both,
# and 9.6 and $10^{-3}$ were added for all.

# %%
chosen = chosen_settings()
assert choose_settings(search_rows) == chosen
pd.DataFrame(chosen).T

# %% [markdown]
# This is what the search saw, as mean true reward over its two worlds; the chosen cell is framed. Before you look: how much does a careless $\beta$ or
# learning rate cost, compared with a careless choice of the method?

# %%
fig, axes = plt.subplots(2, 3, figsize=(11, 4.8), sharex=True, sharey=True, constrained_layout=True)
for ax, method in zip(axes.flat, METHODS):
    grid = tried[tried["method"] == method].pivot_table("reward", "lr", "beta")
    colours = dict(cmap="viridis", vmin=0.5, vmax=0.9, cbar=False)
    sns.heatmap(grid, annot=True, fmt=".2f", annot_kws=dict(size=8), ax=ax, **colours)
    column = list(grid.columns).index(chosen[method]["beta"])
    row = list(grid.index).index(chosen[method]["lr"])
    ax.add_patch(plt.Rectangle((column, row), 1, 1, fill=False, color="red", lw=2))
    ax.set_title(method, fontsize="medium")
    ax.set(xlabel=r"$\beta$", ylabel="learning rate")
    ax.tick_params(axis="y", rotation=0)
for ax in axes.flat: ax.label_outer()

# %% [markdown]
# At their best all methods but `sDPO, target S` are close to each other, and far from what a careless choice gives. Look at DPO: at the chosen $\beta$ two learning rates are a tie, 0.867 and 0.865. The question
# comes back on the page of the [protocol](protocol.ipynb).
#
# There is *one* choice for all ten worlds. A different pair of search worlds might have chosen differently. Our intervals do not include that.
#
# ## Eight questions
#
# Eight comparisons are *primary*. They were committed before the grid was run, and their p-values are corrected by Holm's method, so that they hold for all eight at once. All else in the experiments
# is *exploratory*: an interval without correction. We say *equal* where the whole interval lies within $\pm 0.02$, two points of a hundred of the true reward.
#
# This much was fixed before the answers were seen. The words for the other cases were added afterwards (commit `b218013`). We say *different* where a primary p-value is below 0.05, or an exploratory interval
# leaves out 0. Both at once is a difference that is there and *small*; neither is *we cannot tell*.

# %%
#| export
PRIMARY_QUESTIONS = pd.DataFrame([
    ("stepwise against plain", "sDPO", "DPO", "sampled"),
    ("the same, greedy", "sDPO", "DPO", "greedy"),
    ("the same, at the KL of plain", "sDPO at the KL of DPO", "DPO", "sampled"),
    ("easy first against random order", "sDPO", "sDPO, random", "sampled"),
    ("easy first against hard first", "sDPO", "sDPO, hard first", "sampled"),
    ("moving against fixed reference", "sDPO", "sDPO, fixed reference", "sampled"),
    ("target from M_{t-1} against from S", "sDPO", "sDPO, target S", "sampled"),
    ("stepwise at beta against plain at beta/T", "sDPO at DPO's beta", "DPO at beta/T", "sampled"),
], columns=["question", "a", "b", "outcome"])

# %%
PRIMARY_QUESTIONS.set_index("question")

# %% [markdown]
# Each method runs at its own best settings. So questions 4 to 7 compare tuned methods. They do not throw one switch at fixed settings; [why it works](why_it_works.ipynb) does that.
#
# How often will these words be right? We invent a hundred pairs of methods for each true difference, with the noise of the pilot, in ten worlds with two
# seeds. A difference is tested twice: alone, and as the smallest of eight p-values, which Holm's method multiplies by eight.

# %%
rng = np.random.default_rng(0)

def words(shift): # are two methods called equal, or different, whose true difference is `shift`?
    worlds = rng.normal(0, paired["worlds"], (10, 1, 1))
    seeds = rng.normal(0, paired["seeds"], (10, 2, 1))
    difference = shift + worlds + seeds
    _, low, high = interval(difference, draws=300)
    equal, p = max(-low, high) < SAME, sign_flip_p_value(difference)
    return {
        "equal": equal,
        "different, alone": p < 0.05,
        "both at once": equal and p < 0.05,
        "different, the smallest of eight": 8 * p < 0.05,
    }

shares = {}
for shift in (0, 0.01, 0.02, 0.03):
    trials = [words(shift) for _ in range(100)]
    shares[shift] = pd.DataFrame(trials).mean()
shares = pd.DataFrame(shares).rename_axis(columns="true difference")

assert shares.loc["equal", 0] > 0.9
assert shares.loc["equal", [0.02, 0.03]].max() < 0.1
assert shares.loc["different, alone", 0] < 0.12
assert shares.loc["different, alone", 0.03] > 0.9
alone, of_eight = shares.loc["different, alone"], shares.loc["different, the smallest of eight"]
assert of_eight[0] < 0.05
assert of_eight[0.01] < alone[0.01] / 2
assert of_eight[0.02] > 0.8
shares.map("{:.0%}".format)


# %% [markdown]
# Read it column by column. When there is no difference, we say *equal* every time. Alone, a question would be called *different* in 7 trials of a hundred; among eight it was in none. When the true difference is 0.02, we hardly ever say equal, and find it in 84 of a hundred even as one of eight. In between, at 0.01, each word alone is said in
# two trials of three, both at once in 31 of a hundred: such a difference can be there and be small. Among eight it is found in 28 of a hundred, so the eight questions often miss a difference of that size.
#
# ## The runs of the eight questions
#
# What has to be run, to answer the eight questions? A *grid* says it. It is a dictionary. Each of its rows has a name, and behind the name stands a *condition*: a method with its settings and, where they are not the usual ones, its data, its
# prompts or its body. Every condition is run in every world with every seed.
#
# The primary grid has each method at its best settings, the baselines, and what questions 3 and 8 need. Question 3 asks for sDPO at the KL of DPO, so sDPO is run on
# a ladder of five $\beta$. Question 8 asks for DPO at a third of its $\beta$.

# %%
#| export
@dataclass
class Condition:
    "What all runs behind one row of a grid have in common."
    method: str                  # of METHODS, RELATIVES or BASELINES
    settings: dict               # of StepwiseConfig
    data: tuple = ("sources",)   # a name in TRAINING_DATA, and what that function asks for
    split: str = "test"          # prompts it is measured on
    body: str = "llama"          # or a name in BODIES or SIZES
    pairs: int = None            # of each source; None: all

    def cells(self, worlds, seeds) -> list[Cell]:
        "One cell for each world and seed."
        return [Cell(world, seed, self.method, self.settings, self.split, self.pairs, self.data, self.body)
                for world in worlds for seed in seeds]

BETA_LADDER = (1 / 4, 1 / 2, 1, 2, 4) # of sDPO, times its best beta

def _scaled(settings, by): # the same settings at another beta
    return settings | dict(beta=settings["beta"] * by)

def primary_grid() -> dict: # name -> Condition
    "Every method at its own best settings, the baselines, and what questions 3 and 8 need."
    best = chosen_settings()
    dpo, stepwise = best["DPO"], best["sDPO"]
    grid = {}
    for method in METHODS: grid[method] = Condition(method, best[method])
    for method in BASELINES: grid[method] = Condition(method, best.get(method, {}))
    grid["sDPO at DPO's beta"] = Condition("sDPO", dpo)
    grid["DPO at beta/T"] = Condition("DPO", dpo | dict(beta=dpo["beta"] / 3))
    grid["DPO at sDPO's rate"] = Condition("DPO", dpo | dict(lr=stepwise["lr"]))
    for factor in BETA_LADDER: grid[f"sDPO, {factor:g} beta"] = Condition("sDPO", _scaled(stepwise, factor))
    return grid


# %%
def settings_text(settings): # as "beta 0.6, lr 0.0003"
    texts = []
    for name, value in settings.items():
        if isinstance(value, float): value = f"{value:g}"
        texts.append(f"{name} {value}")
    return ", ".join(texts)

def as_table(grid): # a condition a row, without the columns in which all are as usual
    rows = {}
    for name, condition in grid.items():
        rows[name] = dict(
            method=condition.method,
            settings=settings_text(condition.settings),
            data=" ".join(map(str, condition.data)),
            split=condition.split,
            body=condition.body,
            pairs=condition.pairs or "all",
        )
    table = pd.DataFrame(rows).T
    told = [column for column in table if column == "settings" or table[column].nunique() > 1]
    return table[told]

as_table(primary_grid())


# %% [markdown]
# Methods of one name with other settings are rows of their own, so a row is known by its name and not by its method. (`DPO at sDPO's rate` was added after the answers; the [protocol](protocol.ipynb) says why.)
#
# Now the questions can be put to the rows of this grid. "sDPO at the KL of DPO" is no row. It is read off the ladder of sDPO.

# %%
#| export
def question_values(
    found: dict, # name of a row of the primary grid -> its rows of the table of runs
    name: str,   # of a row, or 'sDPO at the KL of DPO'
    what: str,   # sampled, greedy, kl
) -> np.ndarray: # (worlds, seeds, prompts); (worlds, seeds, 1) at the KL of DPO
    "`outcome_values` of a row of the primary grid; 'sDPO at the KL of DPO' is read off its ladder."
    if name != "sDPO at the KL of DPO": return outcome_values(found[name], what)
    ladder = [found[f"sDPO, {factor:g} beta"] for factor in BETA_LADDER]
    return reward_at_kl(ladder, outcome_values(found["DPO"], "kl"))

def primary_contrasts(
    found: dict,                               # name -> rows of the table of runs
    questions: pd.DataFrame=PRIMARY_QUESTIONS, # question, a, b, outcome
) -> pd.DataFrame:                             # the questions with mean, low, high, worlds, seeds, p, holm
    """a minus b for each question, with interval, p-value and Holm's.
    Raises ValueError unless all rows come from the same worlds (the same weights of S) and seeds."""
    check_same_draws(found)
    differences = {}
    for question in questions.itertuples():
        a = question_values(found, question.a, question.outcome)
        b = question_values(found, question.b, question.outcome)
        if a.shape != b.shape: b = b.mean(2, keepdims=True)     # a is one number per run
        differences[question.question] = a - b
    return questions.merge(tested_differences(differences), on="question")


# %% [markdown]
# Does it find what we plant? Two invented rows, of which A is better by 0.1:

# %%
rng = np.random.default_rng(0)
def invented_rows(mean):
    rows = []
    for world, seed in itertools.product(range(10), range(2)):
        rewards = mean + rng.normal(0, 0.01, 50)
        rows.append(dict(world=world, seed=seed, weights=f"S of {world}", sampled=rewards))
    return pd.DataFrame(rows)

asked = pd.DataFrame([("is A better?", "A", "B", "sampled")], columns=["question", "a", "b", "outcome"])
answer = primary_contrasts({"A": invented_rows(0.9), "B": invented_rows(0.8)}, asked)
assert abs(answer["mean"][0] - 0.1) < 0.01
answer.round(3)

# %% [markdown]
# ## The grids of the other pages
#
# You may skip this section and come back from the experiment that you are reading. Each grid belongs to the page of its name. A table shows a row for each condition: first its name, by which the page asks for its runs, then what sets it apart from the others. What is the same in all rows is left out.
#
# Three are about the number of stages $T$. In theory $T$ stages at $\beta$ end where one stage at $\beta/T$ ends if every stage finds the same reward. Stages on the *same* prompts do (with labels enough), and stages on prompts of their own need not. So [smaller beta](smaller_beta.ipynb) has both kinds of chunks, and DPO at $\beta/T$ beside each. Then,
# [how many stages](how_many_stages.ipynb) are best? If more stages act like a smaller $\beta$, that question must be asked twice: at one $\beta$, and at a $\beta$ that grows with $T$. In the first table every row of stages has its opponent directly above it: DPO at $\beta/T$, trained on the same pairs.

# %%
#| export
STAGE_COUNTS = (1, 2, 3, 5, 8)

def smaller_beta_grid() -> dict: # name -> Condition
    "T stages at beta against one at beta / T: chunks with prompts of their own, and with the same prompts."
    dpo = chosen_settings()["DPO"]
    grid = {"DPO at beta": Condition("DPO", dpo)}
    for T in STAGE_COUNTS[1:]:
        for order, data in (("random", ("sources",)), ("as_given", ("same prompts", T))):
            smaller = dpo | dict(beta=dpo["beta"] / T)
            grid[f"DPO at beta/{T}, {data[0]}"] = Condition("DPO", smaller, data)
            grid[f"sDPO, T = {T}, {data[0]}"] = Condition("sDPO", dpo | dict(order=order, chunks=T), data)
    return grid

def how_many_stages_grid() -> dict: # name -> Condition
    """T = 1 ... 8 parts of the ordered data, at the beta that is best for three stages
    and at a beta that grows with T. And three stages at an eighth and at eight times their beta,
    which take the ladder of `primary_grid` to both sides."""
    best = chosen_settings()["sDPO"]
    grid = {}
    for T in range(1, 9): grid[f"T = {T}"] = Condition("sDPO", best | dict(chunks=T))
    for factor in (1 / 8, 8): grid[f"T = 3, {factor:g} beta"] = Condition("sDPO", _scaled(best, factor))
    for T in (1, 2, 5, 8):
        grown = dict(chunks=T, beta=best["beta"] * T / 3)
        grid[f"T = {T}, beta T/3"] = Condition("sDPO", best | grown)
    return grid


# %%
as_table(smaller_beta_grid())

# %%
as_table(how_many_stages_grid())

# %% [markdown]
# The third asks [how much data a stage needs](finite_data.ipynb). It was added after the answers of the others, with predictions of its own. Two and four stages are compared with DPO at $\beta/T$, on an eighth, a quarter, half and all of the pairs. Fewer pairs are seen more often, so that every run takes about as many steps; and labels are smoothed, so that there is an optimum which many passes can approach.

# %%
#| export
FINITE_PAIRS = {180: 60, 360: 120, 720: 240, 1440: None} # pairs in all -> of each source; None: all, about 1,440
FINITE_STAGES = {2: (180, 360, 720, 1440), 4: (360, 720, 1440)} # T -> pairs in all; at least 90 for each stage

def finite_data_grid() -> dict: # name -> Condition
    """T stages at T times a beta against DPO at that beta, on few pairs and on many;
    every run takes about as many steps, as few pairs are seen more often."""
    best = chosen_settings()["sDPO"]
    grid = {}
    for total, pairs in FINITE_PAIRS.items():
        epochs = COMMON_SETTINGS["epochs"] * 1440 // total
        common = dict(lr=best["lr"], epochs=epochs, label_smoothing=0.05)
        for T in (1, *FINITE_STAGES):
            if T > 1 and total not in FINITE_STAGES[T]: continue
            settings = common | dict(beta=best["beta"] * T / 3)
            if T > 1: settings |= dict(order="random", chunks=T)
            name = f"T = {T}, {total} pairs"
            grid[name] = Condition("sDPO" if T > 1 else "DPO", settings, pairs=pairs)
    return grid


# %%
as_table(finite_data_grid())


# %% [markdown]
# Its answers asked for an explanation, so some runs came after them: DPO at the $\beta$ that the stages have, $T\beta$, on the same pairs.

# %%
#| export
def finite_data_apart_grid() -> dict: # name -> Condition
    "DPO at T times the beta of `finite_data_grid`: where stages would end that share nothing."
    grid = {}
    for T, total in ((2, 180), (2, 360), (4, 360), (2, 1440)):
        one = finite_data_grid()[f"T = 1, {total} pairs"]
        grid[f"T = {T}, {total} pairs"] = Condition("DPO", _scaled(one.settings, T), pairs=one.pairs)
    return grid


# %%
as_table(finite_data_apart_grid())


# %% [markdown]
# And a second test, with new predictions: the same, but three passes over however many pairs there are.

# %%
#| export
def finite_data_three_passes_grid() -> dict: # name -> Condition
    "Rows of `finite_data_grid` on a quarter and on half of the pairs, passed three times."
    grid = {}
    for total, T in itertools.product((360, 720), (1, *FINITE_STAGES)):
        often = finite_data_grid()[f"T = {T}, {total} pairs"]
        settings = often.settings | dict(epochs=COMMON_SETTINGS["epochs"])
        grid[f"T = {T}, {total} pairs"] = Condition(often.method, settings, pairs=often.pairs)
    return grid


# %%
as_table(finite_data_three_passes_grid())


# %% [markdown]
# Two grids throw one switch at a time. Stepwise DPO differs from DPO in its reference, its order and its schedule. [Why it works](why_it_works.ipynb) has all twelve combinations of these, at one $\beta$, so that the effect of each can be told from the others. The names say how the three switches stand: `moving, random, never` has a moving reference, chunks at random, and a schedule that never restarts.
# [The paper in miniature](paper_in_miniature.ipynb) repeats the paper's tables: one source trained against three references, and stages that each start from S.

# %%
#| export
def why_it_works_grid() -> dict: # name -> Condition
    """Reference x order x schedule, all at DPO's best settings and T = 3;
    DPO itself, with twice the epochs, at beta/3, and stages that restart from S."""
    dpo = chosen_settings()["DPO"]
    references = ("fixed", "moving")
    orders = ("random", "easy_to_hard", "hard_to_easy")
    restarts = ("never", "stage")
    grid = {}
    for reference, order, restart in itertools.product(references, orders, restarts):
        switches = dict(reference=reference, order=order, restart=restart)
        grid[f"{reference}, {order}, {restart}"] = Condition("sDPO", dpo | switches)
    grid["DPO"] = Condition("DPO", dpo)
    grid["DPO, twice the epochs"] = Condition("DPO", dpo | dict(epochs=2 * COMMON_SETTINGS["epochs"]))
    grid["DPO at beta/3"] = Condition("DPO", dpo | dict(beta=dpo["beta"] / 3))
    grid["from S"] = Condition("sDPO, target S", dpo)
    return grid

def paper_in_miniature_grid() -> dict: # name -> Condition
    """S trained on the hardest source against three references, S, M_1 and M_2 (the paper's table 1);
    and stages that each start from S (its figure 3)."""
    dpo = chosen_settings()["DPO"]
    grid = {"target S": Condition("sDPO, target S", dpo)}
    for before in ([], ["primer"], ["primer", "digest"]):
        reference = f"M_{len(before)}" if before else "S"
        settings = dict(chunks=[*before, "riddle"], order="as_given", init_target="S")
        grid[f"riddle against {reference}"] = Condition("sDPO", dpo | settings)
    return grid


# %%
as_table(why_it_works_grid())

# %%
as_table(paper_in_miniature_grid())


# %% [markdown]
# Two are about which pairs stand in which chunk. [How to partition](how_to_partition.ipynb) sorts the pairs by five measures, in both directions, and leaves out a third of them by three rules. `-1` and `1` in the column `data` say in which direction a measure sorts. [Stage by stage](stage_by_stage.ipynb) needs chunks that have nothing in common, to see what a
# stage undoes: there each source is a skill.

# %%
#| export
def how_to_partition_grid() -> dict: # name -> Condition
    """Three chunks, ordered in both directions by several measures,
    by gamma also at the best settings of stepwise DPO;
    and two selections, with as many pairs at random."""
    dpo, tuned = chosen_settings()["DPO"], chosen_settings()["sDPO"]
    grid = {
        "accuracy of sources": Condition("sDPO", dpo | dict(order="easy_to_hard")),
        "accuracy of sources, hard first": Condition("sDPO", dpo | dict(order="hard_to_easy")),
        "random": Condition("sDPO", dpo | dict(order="random")),
    }
    for direction, order in (("", "easy_to_hard"), (", hard first", "hard_to_easy")):
        by_gamma = dict(order=order, chunks=3)
        grid[f"gamma of pairs{direction}"] = Condition("sDPO", dpo | by_gamma, ("one source",))
        grid[f"gamma of pairs{direction}, tuned"] = Condition("sDPO", tuned | by_gamma, ("one source",))

    as_given = dpo | dict(order="as_given", chunks=3)
    for what, easy in (("length", 1), ("distance", -1), ("true gap", -1)):
        grid[f"{what} of pairs"] = Condition("sDPO", as_given, ("sorted", what, easy))
        grid[f"{what} of pairs, hard first"] = Condition("sDPO", as_given, ("sorted", what, -easy))

    grid["DPO"] = Condition("DPO", dpo)
    selections = {"the smallest gaps": "smallest", "the largest gaps": "largest", "a random part": "random"}
    for name, keep in selections.items():
        grid[f"DPO on {name}"] = Condition("DPO", dpo, ("selected", keep, dpo["beta"], dpo["lr"]))
    return grid

def stage_by_stage_grid() -> dict: # name -> Condition
    "Sources that are skills, so that a stage can unlearn what another taught."
    dpo = chosen_settings()["DPO"]
    grid = {}
    for order in ("easy_to_hard", "hard_to_easy"):
        grid[f"skills, {order}"] = Condition("sDPO", dpo | dict(order=order), ("skills",))
    return grid


# %%
as_table(how_to_partition_grid())

# %%
as_table(stage_by_stage_grid())


# %% [markdown]
# Two go beyond the usual pairs and prompts. [New domain](new_domain.ipynb) leaves out a skill, and measures on strings that are longer or made of other letters: what carries over? [With new data](with_new_data.ipynb) has pairs that are written between the stages. There two things could make a
# difference, the writer and the labels, so the grid combines them: `S, true` means that S wrote the pairs and that the true reward labelled them. Pairs of S also run at larger $\beta$, for comparisons at equal distance.

# %%
#| export
def new_domain_grid() -> dict: # name -> Condition
    "Three skills trained, the fourth measured; strings longer than any, and letters that were never seen."
    best = chosen_settings()
    grid = {}
    for skill in SKILLS:
        data = ("without", skill)
        grid[f"DPO, without {skill}"] = Condition("DPO", best["DPO"], data)
        grid[f"sDPO, without {skill}"] = Condition("sDPO", best["sDPO"], data)
        at_its_rate = best["DPO"] | dict(lr=best["sDPO"]["lr"])
        grid[f"DPO at sDPO's rate, without {skill}"] = Condition("DPO", at_its_rate, data)
    for split in ("seven letters", "other letters"):
        for method in ("S", "DPO", "sDPO"):
            grid[f"{method}, {split}"] = Condition(method, best.get(method, {}), split=split)
    return grid

def with_new_data_grid() -> dict: # name -> Condition
    """Three stages on pairs that M_{t-1} wrote, against pairs that S wrote, under four labels;
    and pairs of S at larger beta, to compare at equal KL."""
    best = chosen_settings()["sDPO"] | dict(order="as_given")
    labels = { # name -> what the function that writes the pairs is asked for
        "true": ("true",),
        "judge, 0 % wrong": ("judge", 0.),
        "judge, 20 % wrong": ("judge", 0.2),
        "implicit": ("implicit",),
    }
    without_errors = ("true", "judge, 0 % wrong")
    grid = {}
    for writer in ("S", "S, as many", "policy"):
        for label in without_errors if writer == "S, as many" else labels:
            grid[f"{writer}, {label}"] = Condition("sDPO", best, ("new", writer, *labels[label]))
    for label in without_errors:
        data = ("new", "S", *labels[label])
        for factor in (2, 4):
            grid[f"S, {label}, {factor:g} beta"] = Condition("sDPO", _scaled(best, factor), data)
    return grid


# %%
as_table(new_domain_grid())

# %%
as_table(with_new_data_grid())

# %% [markdown]
# ## Other bodies
#
# Settings that suit a Llama need not suit a GPT-2. So each of the four other [bodies](bodies.ipynb) has a search of its own, smaller than the first: six $\beta$ and four learning rates, for DPO and sDPO, in one of the search
# worlds. (It began with four $\beta$. When BLOOM was best at the smallest, one was added on each side.) The comparison is run in five worlds with four seeds each. S of each body is measured on their validation prompts, too, with other
# luck than it was tuned with.

# %%
#| export
BODY_WORLDS = range(1, 6)

def body_search_cells() -> list[Cell]:
    "The search of every body but the Llama."
    cells = []
    for body, method, beta, lr in itertools.product(BODIES, ("DPO", "sDPO"), BETAS[:6], LEARNING_RATES):
        cells.append(Cell(SEARCH_WORLDS[0], 0, method, dict(beta=beta, lr=lr), "validation", body=body))
    return cells

def start_cells(
    body: str, # llama, or a name in BODIES
) -> list[Cell]:
    "S of a body, on the validation prompts of its worlds."
    return [Cell(world, 0, "S", {}, "validation", body=body) for world in BODY_WORLDS]

def chosen_for_body(
    body: str, # llama, or a name in BODIES
) -> dict:     # method -> settings
    "What the search chose for a body. Raises ValueError for half a search."
    if body == "llama": return chosen_settings()
    cells = [cell for cell in body_search_cells() if cell.body == body]
    rows = stored_rows(cells)
    if len(rows) < len(cells): raise ValueError(f"{body}: {len(rows)} of {len(cells)} cells of its search have been run")
    return choose_settings(rows)

def which_architecture_grid() -> dict: # name -> Condition
    "S, DPO and stepwise DPO in worlds whose S has another body."
    grid = {}
    for body in ("llama", *BODIES):
        best = chosen_for_body(body)
        for method in ("S", "DPO", "sDPO"):
            settings = {} if method == "S" else best[method]
            grid[f"{body}, {method}"] = Condition(method, settings, body=body)
    return grid


# %%
as_table(which_architecture_grid())


# %% [markdown]
# ## Chosen in five worlds, measured in ten
#
# Settings were searched on two worlds, and the best of a search is partly the luckiest ([compare](compare.ipynb)). Five pages were added after the answers of the others, and they do better. Every arm has a *ladder*: values of $\beta$, each twice the one before. Its rungs are run in five worlds in which nothing else is measured, and the best one is measured in ten others.
#
# A ladder with steps of two is coarse. But rewards along it bend like a parabola, so the top can be read between the rungs: through the best one and its neighbours, in $\log \beta$.

# %%
#| export
def top_of_ladder(
    rewards: dict,             # beta -> mean reward
    name: str = "ladder",      # in the message
) -> tuple[float, float]:      # beta and reward at the top of a parabola in log beta
    """Where the parabola through the best rung and its two neighbours is highest.
    Raises ValueError where the best rung is at an end."""
    betas = sorted(rewards)
    best = betas.index(max(rewards, key=rewards.get))
    if best in (0, len(betas) - 1):
        raise ValueError(f"{name}: its best beta, {betas[best]:g}, is at an end of its ladder; add a rung there")
    three = betas[best - 1:best + 2]
    curve = np.polyfit(np.log(three), [rewards[beta] for beta in three], 2)
    top = -curve[1] / (2 * curve[0])
    return round(float(np.exp(top)), 3), float(np.polyval(curve, top))


# %% [markdown]
# A reward that is highest at 0.5, tried at five other places. Is 0.5 found?

# %%
ladder = {beta: 0.8 - 0.02 * np.log2(beta / 0.5) ** 2 for beta in (0.1, 0.2, 0.4, 0.8, 1.6)}
beta, reward = top_of_ladder(ladder)
assert abs(beta - 0.5) < 1e-3
assert abs(reward - 0.8) < 1e-6
print(complaint(top_of_ladder, {beta: ladder[beta] for beta in (0.1, 0.2, 0.4)}, "DPO"))
beta, round(reward, 3)


# %% [markdown]
# Now the arms of five pages. [When order matters](when_order_matters.ipynb) has worlds in which the labels of the hard sources are worse, as the sources of the other pages teach the same and have equally good labels, so there was little that an order could do. Two arms without noise stand beside them. [Builds on](builds_on.ipynb) has a hard source that a teacher wrote, with strings longer than S knows. [When sizes differ](when_sizes_differ.ipynb) has a source five times as large as the other. [Tuned elsewhere](tuned_elsewhere.ipynb) asks two of the eight questions again, and three about relatives. [Model size](model_size.ipynb) has an S of 86 thousand to 5.3 million parameters. All sizes have the same two rates, and the widest has a third; that page says why.

# %%
#| export
@dataclass
class Ladder:
    "One way to train, and the settings among which it may choose."
    method: str                                  # of METHODS, RELATIVES or BASELINES
    betas: tuple                                 # each twice the one before
    rates: tuple = (1e-4,)                       # learning rates
    settings: dict = field(default_factory=dict) # of StepwiseConfig; the same on every rung
    data: tuple = ("sources",)                   # a name in TRAINING_DATA, and what that function asks for
    split: str = "test"                          # prompts it is measured on
    body: str = "llama"                          # or a name in BODIES or SIZES

    def rung(
        self,
        beta: float,
        lr: float,
    ) -> Condition:
        "The condition at these settings."
        return Condition(self.method, self.settings | dict(beta=beta, lr=lr), self.data, self.split, self.body)

def _betas(low, rungs=5): return tuple(round(low * 2 ** rung, 6) for rung in range(rungs))

ORDER_NOISE = ("graded noise", 0., 0.15, 0.35)      # share of pairs that are swapped, from the easy to the hard source
ORDERS = {"easy first": "easy_to_hard", "random order": "random", "hard first": "hard_to_easy"}

def order_ladders() -> dict: # arm -> Ladder
    "Every order with every reference, in worlds with `ORDER_NOISE`; two orders without it."
    ladders = {"all at once": Ladder("DPO", _betas(0.05), data=ORDER_NOISE)}
    for name, order in ORDERS.items():
        ladders[f"{name}, moving"] = Ladder("sDPO", _betas(0.15), settings=dict(order=order), data=ORDER_NOISE)
        fixed = dict(order=order, reference="fixed")
        ladders[f"{name}, fixed"] = Ladder("sDPO", _betas(0.05), settings=fixed, data=ORDER_NOISE)
    for name in ("easy first", "hard first"):
        ladders[f"{name}, moving, without noise"] = Ladder("sDPO", _betas(0.3), settings=dict(order=ORDERS[name]))
    return ladders

def builds_on_ladders() -> dict: # arm -> Ladder
    "Two sources in both orders with both references; and both orders where the taught strings are short."
    rates, split = (1e-4, 3e-4), "up to seven letters"
    given = dict(order="as_given")
    fixed = given | dict(reference="fixed")
    ladders = {"all at once": Ladder("DPO", _betas(0.1, 6), rates, data=("taught letters", 7, 7), split=split)}
    for name, kind in (("own first", "taught letters"), ("taught first", "taught letters first")):
        ladders[f"{name}, moving"] = Ladder("sDPO", _betas(0.5, 6), rates, given, (kind, 7, 7), split)
        ladders[f"{name}, fixed"] = Ladder("sDPO", _betas(0.25, 7), rates, fixed, (kind, 7, 7), split)
        ladders[f"{name}, moving, short"] = Ladder("sDPO", _betas(0.25, 6), rates, given, (kind, 3, 6))
    return ladders

def size_ladders() -> dict: # arm -> Ladder
    "A small source and one five times as large, in both orders with both references; two halves; all at once."
    given = dict(order="as_given")
    fixed = given | dict(reference="fixed")
    ladders = {
        "all at once": Ladder("DPO", _betas(0.1)),
        "two halves, moving": Ladder("sDPO", _betas(0.2), settings=given, data=("small and large", 2)),
    }
    for name, kind in (("small first", "small and large"), ("large first", "large and small")):
        ladders[f"{name}, moving"] = Ladder("sDPO", _betas(0.2), settings=given, data=(kind, 6))
        ladders[f"{name}, fixed"] = Ladder("sDPO", _betas(0.1), settings=fixed, data=(kind, 6))
    return ladders

def elsewhere_ladders() -> dict: # arm -> Ladder
    "DPO, also with twice the passes; sDPO with both references; the relatives."
    low = {
        "DPO": 0.1,
        "sDPO": 0.3,
        "sDPO, fixed reference": 0.15,
        "TR-DPO, hard": 0.6,
        "TR-DPO, soft": 0.3,
        "Pre-DPO": 0.15,
    }
    rates = (1e-4, 3e-4)
    ladders = {method: Ladder(method, _betas(beta), rates) for method, beta in low.items()}
    twice = dict(epochs=2 * COMMON_SETTINGS["epochs"])
    ladders["DPO, six passes"] = Ladder("DPO", _betas(low["DPO"]), rates, twice)
    ladders["DPO, smaller rate"] = Ladder("DPO", _betas(low["DPO"]), rates[:1])
    return ladders

MODEL_SIZES = sorted(["llama", *SIZES], key=lambda body: SIZES.get(body, 96)) # bodies, from narrow to wide

def model_size_ladders() -> dict: # arm -> Ladder
    "DPO and sDPO, in worlds whose S has another size."
    of_the_llama = elsewhere_ladders()
    ladders = {}
    for body in MODEL_SIZES:
        for method in ("DPO", "sDPO"):
            ladder = replace(of_the_llama[method], body=body)
            if body == MODEL_SIZES[-1]: ladder.rates = (3e-5, *ladder.rates)    # the largest is useless for the widest
            ladders[f"{body}, {method}"] = ladder
    return ladders

LADDERS = { # grid -> function that makes its ladders
    "when_order_matters": order_ladders,
    "builds_on": builds_on_ladders,
    "when_sizes_differ": size_ladders,
    "tuned_elsewhere": elsewhere_ladders,
    "model_size": model_size_ladders,
}
CHOICE_WORLDS = range(11, 16)
OTHER_CHOICE_WORLDS = {"model_size": (14, 15)}      # it measures in worlds 11 to 13

def choice_cells(
    grid: str,       # of LADDERS
    rung: Condition,
) -> list[Cell]:
    "A rung in the worlds in which settings of this grid are chosen, with one seed."
    return rung.cells(OTHER_CHOICE_WORLDS.get(grid, CHOICE_WORLDS), (0,))

def ladder_cells(
    grid: str, # of LADDERS
) -> list[Cell]:
    "Every rung of every arm, in the worlds in which settings are chosen."
    cells = []
    for ladder in LADDERS[grid]().values():
        for beta, lr in itertools.product(ladder.betas, ladder.rates): cells += choice_cells(grid, ladder.rung(beta, lr))
    return cells

def choose_on_ladders(
    grid: str,          # of LADDERS
    rows: pd.DataFrame, # of the table of runs, with all of `ladder_cells`
) -> dict:              # arm -> beta, lr
    """The top of each arm's ladder, and of the tops of its learning rates the highest.
    A rate whose best rung is more than the margin below that of the other needs no top.
    Raises ValueError where a top that is needed lies at an end."""
    rewards = dict(zip(rows["key"], rows["sampled"].map(np.mean)))
    def reward_at(rung): return np.mean([rewards[cell.key] for cell in choice_cells(grid, rung)])

    chosen = {}
    for arm, ladder in LADDERS[grid]().items():
        means = {}
        for lr in ladder.rates: means[lr] = {beta: reward_at(ladder.rung(beta, lr)) for beta in ladder.betas}
        best = {lr: max(at_rate.values()) for lr, at_rate in means.items()}
        tops = {}
        for lr, at_rate in means.items():
            if best[lr] < max(best.values()) - SAME: continue
            beta, reward = top_of_ladder(at_rate, f"{grid}: {arm} at rate {lr:g}")
            tops[reward] = dict(beta=beta, lr=lr)
        chosen[arm] = tops[max(tops)]
    return chosen

def chosen_on_ladders(
    grid: str, # of LADDERS
) -> dict:     # arm -> beta, lr; empty where nothing was chosen yet
    "What was chosen, as it was committed."
    path = RESULTS / "tuned.json"
    return json.loads(path.read_text()).get(grid, {}) if path.exists() else {}

def tuned_grid(
    grid: str, # of LADDERS
) -> dict:     # arm -> Condition; empty where nothing was chosen yet
    "Every arm at the settings that were chosen for it."
    ladders = LADDERS[grid]()
    return {arm: ladders[arm].rung(**settings) for arm, settings in chosen_on_ladders(grid).items()}


# %%
table = {}
for grid in LADDERS:
    for arm, ladder in LADDERS[grid]().items():
        rates = ", ".join(f"{lr:g}" for lr in ladder.rates)
        betas = ", ".join(f"{beta:g}" for beta in ladder.betas)
        table[grid, arm] = {"beta": betas, "learning rate": rates, "pairs": " ".join(map(str, ladder.data))}
pd.DataFrame(table).T


# %% [markdown]
# `choose_on_ladders` reads the tops off invented runs, in which the best $\beta$ is a little above the middle rung. An arm whose ladder ends too early is refused. Then its ladder gets a rung more there, before anything is measured. Only a learning rate that falls more than 0.02, our margin, behind the other needs no top, as it would not be chosen.

# %%
def invented_choice(shift): # rows of every rung; the best is `shift` octaves above the middle
    rows = []
    for arm, ladder in LADDERS["when_order_matters"]().items():
        for beta, lr in itertools.product(ladder.betas, ladder.rates):
            octaves = np.log2(beta / ladder.betas[2]) - shift
            for cell in choice_cells("when_order_matters", ladder.rung(beta, lr)):
                rows.append(dict(key=cell.key, sampled=[0.8 - 0.02 * octaves ** 2]))
    return pd.DataFrame(rows)

chosen = choose_on_ladders("when_order_matters", invented_choice(0.3))
for arm, ladder in order_ladders().items():
    assert abs(np.log2(chosen[arm]["beta"] / ladder.betas[2]) - 0.3) < 0.01
complaint(choose_on_ladders, "when_order_matters", invented_choice(2.))

# %% [markdown]
# And the questions of the four pages. A question is a sum of arms with weights: 1 for the first, -1 for the second; one of them compares two differences.

# %%
#| export
ORDER_QUESTIONS = { # question -> arm -> weight
    "easy first against hard first":
        {"easy first, moving": 1, "hard first, moving": -1},
    "the same, minus what it is without noise":
        {"easy first, moving": 1, "hard first, moving": -1,
         "easy first, moving, without noise": -1, "hard first, moving, without noise": 1},
    "easy first against hard first, fixed reference":
        {"easy first, fixed": 1, "hard first, fixed": -1},
    "stepwise, easy first, against all at once":
        {"easy first, moving": 1, "all at once": -1},
}
BUILDS_ON_QUESTIONS = { # question -> arm -> weight
    "own first against taught first":
        {"own first, moving": 1, "taught first, moving": -1},
    "the same, minus what it is with short strings":
        {"own first, moving": 1, "taught first, moving": -1,
         "own first, moving, short": -1, "taught first, moving, short": 1},
    "own first against taught first, fixed reference":
        {"own first, fixed": 1, "taught first, fixed": -1},
    "stepwise, own first, against all at once":
        {"own first, moving": 1, "all at once": -1},
}
SIZE_QUESTIONS = { # question -> arm -> weight
    "small first against large first":
        {"small first, moving": 1, "large first, moving": -1},
    "small first against large first, fixed reference":
        {"small first, fixed": 1, "large first, fixed": -1},
    "stepwise, small first, against two halves":
        {"small first, moving": 1, "two halves, moving": -1},
    "stepwise, small first, against all at once":
        {"small first, moving": 1, "all at once": -1},
}
ELSEWHERE_QUESTIONS = { # question -> arm -> weight
    "stepwise against plain": {"sDPO": 1, "DPO": -1},
    "moving against fixed reference": {"sDPO": 1, "sDPO, fixed reference": -1},
    "TR-DPO, hard after every 16 steps, against plain": {"TR-DPO, hard": 1, "DPO": -1},
    "TR-DPO, soft after every 16 steps, against plain": {"TR-DPO, soft": 1, "DPO": -1},
    "Pre-DPO against plain with as many passes": {"Pre-DPO": 1, "DPO, six passes": -1},
}

def answer_together(
    questions: dict, # question -> arm -> weight
    found: dict,     # arm -> rows of the table of runs
) -> pd.DataFrame:   # question, mean, low, high, p-values as of `tested_differences`, verdict
    """Every question in mean sampled reward, corrected for all of them.
    Raises ValueError unless all rows come from the same worlds (the same weights of S) and seeds."""
    check_same_draws(found)                                 # of arms that no question names, too
    table = tested_differences({question: weighted_sum(arms, found) for question, arms in questions.items()})
    return table.assign(verdict=[verdict(answer) for _, answer in table.iterrows()])

def answers_table(
    answers: pd.DataFrame, # of `answer_together`
) -> pd.DataFrame:         # a question a row: mean, interval, both corrected p-values, verdict
    "What a page shows of the answers."
    shown = ["mean", "low", "high", "holm", "holm_equal", "verdict"]
    return answers.set_index("question")[shown].round(3)

UNTESTED = {"sampled": "reward", "greedy": "greedy", "choice": "multiple choice", "kl": "KL from S (nats)"}

def by_outcome(
    questions: dict, # question -> arm -> weight
    found: dict,     # arm -> rows of the table of runs
) -> pd.DataFrame:   # a question a row, a column for each of UNTESTED; intervals as text
    "Every question in every outcome, without tests."
    table = {}
    for what, label in UNTESTED.items():
        sums = {question: weighted_sum(arms, found, what) for question, arms in questions.items()}
        table[label] = {question: as_text(interval(d), "+.3f") for question, d in sums.items()}
    return pd.DataFrame(table)

def untested_differences(
    found: dict,     # arm -> rows of the table of runs
    other: str,      # an arm
) -> pd.DataFrame:   # an arm a row, a column for each of UNTESTED; intervals as text
    "Every arm minus another one, without tests."
    return by_outcome({arm: {arm: 1, other: -1} for arm in found if arm != other}, found)

def as_formulas(
    questions: dict, # question -> arm -> weight, 1 or -1
) -> pd.DataFrame:   # question, which is
    "Every question as a sum of arms."
    def formula(arms): return " ".join(f"{'+' if weight > 0 else '−'} {arm}" for arm, weight in arms.items())
    return pd.DataFrame({question: {"which is": formula(arms)} for question, arms in questions.items()}).T


# %%
asked = {
    "when_order_matters": ORDER_QUESTIONS,
    "builds_on": BUILDS_ON_QUESTIONS,
    "when_sizes_differ": SIZE_QUESTIONS,
    "tuned_elsewhere": ELSEWHERE_QUESTIONS,
}
for grid, questions in asked.items():
    for arms in questions.values():
        assert sum(arms.values()) == 0
        assert set(arms) <= set(LADDERS[grid]())

found = {"A": invented_rows(0.9), "B": invented_rows(0.8), "C": invented_rows(0.8)}
answers = answer_together({"is A better than B?": {"A": 1, "B": -1}, "and C than B?": {"C": 1, "B": -1}}, found)
assert answers["verdict"].tolist() == ["better", "equal"]
answers_table(answers)

# %%
outcomes = dict.fromkeys(("greedy", "choice", "kl"))
shown = {arm: rows.assign(**{what: rows["sampled"] for what in outcomes}) for arm, rows in found.items()}
beside = untested_differences(shown, "B")
assert beside.loc["A"].str.startswith("+0.099").all()
beside

# %% [markdown]
# ## From a grid to its rows
#
# All grids have a name, and so have the searches. The names are also the arguments of the command line. `load_grid` gives the runs of a grid, name by name. It refuses half a grid. It also refuses a grid in which one world was run with two S, which happens when a world is
# built anew on another machine: then the rows would not be about the same thing.

# %%
#| export
GRIDS = { # name -> function that makes it
    "primary": primary_grid,
    "smaller_beta": smaller_beta_grid,
    "why_it_works": why_it_works_grid,
    "how_many_stages": how_many_stages_grid,
    "paper_in_miniature": paper_in_miniature_grid,
    "how_to_partition": how_to_partition_grid,
    "stage_by_stage": stage_by_stage_grid,
    "new_domain": new_domain_grid,
    "with_new_data": with_new_data_grid,
    "which_architecture": which_architecture_grid,
    "finite_data": finite_data_grid,
    "finite_data_apart": finite_data_apart_grid,
    "finite_data_three_passes": finite_data_three_passes_grid,
    **{grid: partial(tuned_grid, grid) for grid in LADDERS},
}
OTHER_DRAWS = { # worlds and seeds; the others have WORLDS, SEEDS
    "which_architecture": (BODY_WORLDS, range(4)),
    "tuned_elsewhere": (range(21, 31), SEEDS),      # two of its questions have been answered in worlds 1 to 10
    "model_size": (range(11, 14), SEEDS),           # a world of a large model takes long to build
}

def _search_bodies():
    starts = [cell for body in ("llama", *BODIES) for cell in start_cells(body)]
    return body_search_cells() + starts

SEARCHES = { # name -> function that makes its cells
    "pilot": pilot_cells,
    "search": search_cells,
    "search_bodies": _search_bodies,
    **{f"choose_{grid}": partial(ladder_cells, grid) for grid in LADDERS},
}

def grid_cells(
    grid: str, # of GRIDS
) -> dict:     # name of a row -> its cells
    "The cells of a grid, row by row."
    worlds, seeds = OTHER_DRAWS.get(grid, (WORLDS, SEEDS))
    return {name: condition.cells(worlds, seeds) for name, condition in GRIDS[grid]().items()}

def all_cells_of(
    what: str, # of SEARCHES or GRIDS
) -> list[Cell]:
    "Every cell of a search or a grid."
    if what in SEARCHES: return SEARCHES[what]()
    return [cell for cells in grid_cells(what).values() for cell in cells]


# %% [markdown]
# How many cells is that? Two grids that ask for the same run, and spell it alike, name cells with the same key. Such a run is made once, and both grids find it in the table.

# %%
counts = {name: len({cell.key for cell in all_cells_of(name)}) for name in (*SEARCHES, *GRIDS)}
pd.Series(counts, name="cells").to_frame().T


# %%
#| export
def load_grid(
    grid: str, # of GRIDS
) -> dict:     # name of a row -> rows of the table of runs
    """What was run of a grid.
    Raises ValueError where cells are missing or no settings were chosen yet, or where a world was run with two S
    (built anew, on another machine), so that rows of one grid are always about the same worlds and seeds."""
    asked = grid_cells(grid)
    if not asked: raise ValueError(f"{grid}: no settings yet; `python -m sdpo_nb.experiments choose_{grid}` chooses them")
    table, found, missing = read_runs(), {}, {}
    for name, cells in asked.items():
        found[name] = rows_of_cells(table, cells)
        if len(found[name]) < len(cells): missing[name] = len(cells) - len(found[name])
    if missing:
        raise ValueError(f"{grid}: {sum(missing.values())} cells have not been run, of {', '.join(missing)}; "
                         f"`python -m sdpo_nb.experiments {grid}` goes on")

    rows = pd.concat(found.values())
    rows["body"] = rows["body"].fillna("llama")             # rows are older than other bodies
    weights = rows.groupby(["world", "body"])["weights"].nunique()
    doubled = [f"world {world:g} ({body})" for world, body in weights.index[weights > 1]]
    if doubled:
        raise ValueError(f"{grid}: {', '.join(doubled)} was run with more than one S; "
                         "delete the older rows and run them again")
    return found


# %%
found = load_grid("stage_by_stage")
print({name: len(rows) for name, rows in found.items()}, "runs")

GRIDS["half"] = lambda: {"DPO at beta 77": Condition("DPO", dict(beta=77))}
print(complaint(load_grid, "half"))
del GRIDS["half"]


# %% [markdown]
# A page whose settings come from ladders shows its answers as soon as they are there. Until then it says how far the runs are.

# %%
#| export
def measured_on_ladders(
    grid: str, # of LADDERS
) -> dict:     # arm -> rows of the table of runs; empty while some are missing
    "What was measured at the settings that the ladders chose; prints how much there is."
    there = {}
    for what in (f"choose_{grid}", grid):
        cells = all_cells_of(what)
        there[what] = len(stored_rows(cells)), len({cell.key for cell in cells})
        print(f"{what}: {there[what][0]} of {there[what][1]} cells have been run")
    done, wanted = there[grid]
    return load_grid(grid) if done == wanted > 0 else {}


# %%
for grid in LADDERS: print(f"{len(measured_on_ladders(grid))} arms to compare", end="\n\n")


# %% [markdown]
# [Model size](model_size.ipynb) asks for a trend. Its answer is the slope of a straight line: what is added to the difference, sDPO minus DPO, when the model has ten times as many parameters. Here it is for differences that grow by 0.03 from each size to the next, and for differences that are all alike.

# %%
#| export
def lead_by_size(
    found: dict, # of `load_grid`: arm -> rows of the table of runs
) -> dict:       # body -> (worlds,)
    "sDPO minus DPO in mean sampled reward, size by size."
    def lead(body): return paired_difference(found[f"{body}, sDPO"], found[f"{body}, DPO"]).mean((1, 2))
    return {body: lead(body) for body in MODEL_SIZES}

def trend_of_sizes(
    leads: dict, # body -> (worlds,)
) -> dict:       # of `slope_test`
    "What ten times as many parameters add to the lead of sDPO: a straight line through all worlds of all sizes."
    tokenizer = make_tokenizer()
    exponents = [np.log10(untrained(body, tokenizer).num_parameters()) for body in leads]
    x = np.repeat(exponents, [len(of_worlds) for of_worlds in leads.values()])
    return slope_test(x, np.concatenate(list(leads.values())), SAME)


# %%
growing = {body: 0.03 * rank + np.array([-0.005, 0, 0.005]) for rank, body in enumerate(MODEL_SIZES)}
alike = {body: np.array([-0.005, 0, 0.005]) for body in MODEL_SIZES}
trends = pd.DataFrame({"growing": trend_of_sizes(growing), "alike": trend_of_sizes(alike)}).T
assert trends.loc["growing", "low"] > 0 and trends.loc["alike", "p_equal"] < 0.05
trends.round(3)

# %% [markdown]
# ## What you now have
#
# - Worlds and seeds that suffice, says a pilot, for differences that count.
# - `chosen_settings`: one search for all methods, and no best value on an edge.
# - `PRIMARY_QUESTIONS`: eight questions and a margin that were fixed before the answers.
# - All grids by name, and `load_grid`, which refuses half of one.
#
# Next: the [answers](protocol.ipynb).
#
# ## Questions to test yourself
#
# 1. Why is a best value on the edge of the grid refused for *all* methods, and not extended for the one alone?
#
#    <details><summary>Answer</summary>
#
#    The method with the larger grid would have had more trials. More trials mean a better best value, even among methods that are equal.
#
#    </details>
# 2. Why are validation prompts of *other* worlds used for the search?
#
#    <details><summary>Answer</summary>
#
#    The best of 28 settings is best partly by luck of the worlds in which it was chosen. In the worlds that are reported this luck must be gone.
#
#    </details>
# 3. What could still be unfair, if every method is searched on the same grid?
#
#    <details><summary>Answer</summary>
#
#    Only reward is searched for. Two settings with equal reward may differ in greedy answers and in KL, and the search leaves that to chance.
#
#    </details>
#
# ## Try this
#
# - Write a method into `METHODS` (label smoothing, say), and count how many cells its search would have.
#
#   <details><summary>What you should see</summary>
#
#   `METHODS["smooth"] = dict(chunks=1, label_smoothing=0.1)`, then `len(search_cells())`: 402 for 346, that is 7 x 4 settings in two worlds. To run them, write the method into the page on [one run](cells.ipynb): the processes that run cells know the package, and not your notebook.
#
#   </details>
# - Take one world instead of ten in the cell with the hundred pairs of methods. What happens to the words?
#
#   <details><summary>What you should see</summary>
#
#   The p-value of one world is always 1, so nothing is ever "different". The interval no longer knows how worlds vary and becomes too narrow: it misses the true difference in six trials of ten, and two methods that differ by 0.02 are called equal in nearly one trial of three.
#
#   </details>
