# %% [markdown]
# # Compare two methods
# > Paired differences, intervals that know about worlds and seeds, p-values for many questions at once: all on invented data whose answer we know.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/compare.ipynb)
#
# **You should know** what a mean, a standard deviation and a 95 % interval are, and the [bootstrap](../08_evaluate.ipynb) of chapter 08. Nothing here needs a language model.
#
# **Time** 45 minutes to read, a few seconds to run.
#
# Method A has a mean true reward of 0.87, method B has 0.86. Is A better? It depends on how the two numbers were made. The paper compares single runs. But a run is a
# draw, of a base model with its data and of a seed, and with another draw the order might be the other way round. This page has the tools with which the
# experiments decide. Each is tried on invented results first, because there we know what it should find.

# %%
#| default_exp compare

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

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from scipy.stats import linregress, t as student

from sdpo_nb.evaluate import as_text, interval, stability

# %%
from sdpo_nb.world import complaint


# %% [markdown]
# ## Invented results
#
# A *world* is a base model S with its preference data. It is the thing that is drawn independently. In each world a method is run with two *seeds*, and each run is
# measured on the same prompts. So a result has three levels, and all of them vary. We invent a method by adding three kinds of luck to a mean:
#
# - the luck of the world, the same for all methods of that world: some worlds are easy;
# - the luck of the run, different for each method, world and seed;
# - the luck of the prompt.
#
# The table has one row per run, like the [real one](cells.ipynb).

# %%
def invent(mean, worlds=10, seeds=2, prompts=50, seed=0): # rows of one invented method
    of_world = np.random.default_rng(100).normal(0, 0.05, worlds)      # shared by all methods
    rng = np.random.default_rng(seed)
    rows = []
    for w in range(worlds):
        for s in range(seeds):
            run = rng.normal(0, 0.01)
            rewards = mean + of_world[w] + run + rng.normal(0, 0.05, prompts)
            rows.append(dict(
                world=w,
                seed=s,
                weights=f"S of world {w}",
                sampled=rewards,
                greedy=rewards + 0.02,
                kl=10 * rewards,
            ))
    return pd.DataFrame(rows).sample(frac=1, random_state=seed)        # a real table is in no order, too

plain, better = invent(0.80, seed=1), invent(0.83, seed=2)
shown = plain.assign(sampled=plain["sampled"].map(np.mean))
shown[["world", "seed", "weights", "sampled"]].head(3).round(3)

# %% [markdown]
# ## Numbers in their place
#
# To compare two methods, the same world, seed and prompt must stand in the same place. So a table becomes an array with three axes. A method that lacks one
# run leaves a hole; that is refused.

# %%
#| export
OUTCOMES = { # column of the table of runs -> label
    "sampled": "true reward, sampled",
    "greedy": "greedy",
    "kl": "KL from S (nats)",
}

def outcome_values(
    rows: pd.DataFrame, # runs of one method
    what: str,          # of OUTCOMES
) -> np.ndarray:        # (worlds, seeds, prompts)
    "One number per world, seed and prompt. Raises ValueError unless every world has the same seeds."
    runs = {(row.world, row.seed): list(getattr(row, what)) for row in rows.itertuples()}
    worlds = sorted({world for world, _ in runs})
    seeds = sorted({seed for _, seed in runs})
    if len(runs) != len(rows) or len(runs) != len(worlds) * len(seeds):
        raise ValueError(f"outcome: {len(rows)} rows for {len(worlds)} worlds and {len(seeds)} seeds; "
                         "one each is needed")
    return np.array([[runs[world, seed] for seed in seeds] for world in worlds])


# %%
values = outcome_values(plain, "sampled")
print(complaint(outcome_values, plain.iloc[1:], "sampled"))
values.shape


# %% [markdown]
# ## Pairs have less noise
#
# We planted a difference of 0.03. The worlds differ by more than that. Which interval will be narrower: that of each method, or that of their
# difference, taken world by world? A method that was run in other worlds, with other seeds, or with another S under the same number is no opponent, so we look at that first.

# %%
#| export
def check_same_draws(
    found: dict, # name -> rows of the table of runs
):
    "Raises ValueError unless all rows come from the same worlds (the same weights of S) and seeds."
    draws = {name: set(zip(rows["world"], rows["seed"], rows["weights"])) for name, rows in found.items()}
    first = next(iter(draws))
    for name in draws:
        if draws[name] != draws[first]:
            raise ValueError(f"draws: '{name}' was run in other worlds, from another S "
                             f"or with other seeds than '{first}'")

def weighted_sum(
    arms: dict,             # name -> weight
    found: dict,            # name -> rows of the table of runs
    what: str = "sampled",  # of OUTCOMES, or another column with a number per prompt
) -> np.ndarray:            # (worlds, seeds, prompts)
    """A sum of methods, each with its weight.
    Raises ValueError unless their rows have the same worlds (the same weights of S), seeds and prompts."""
    check_same_draws({name: found[name] for name in arms})
    values = {name: outcome_values(found[name], what) for name in arms}
    asked = {name: v.shape[2] for name, v in values.items()}
    if len(set(asked.values())) > 1:
        raise ValueError("prompts: " + " and ".join(f"{n} of {name}" for name, n in asked.items()))
    return np.sum([weight * values[name] for name, weight in arms.items()], axis=0)

def paired_difference(
    rows_a: pd.DataFrame,   # runs of a method
    rows_b: pd.DataFrame,   # runs of another, in the same worlds and with the same seeds
    what: str = "sampled",  # of OUTCOMES
) -> np.ndarray:            # (worlds, seeds, prompts)
    "a minus b. Raises ValueError as `weighted_sum` does."
    return weighted_sum({"rows_a": 1, "rows_b": -1}, dict(rows_a=rows_a, rows_b=rows_b), what)


# %%
other_worlds = better.assign(world=better["world"] + 10)
print(complaint(paired_difference, other_worlds, plain))

difference = paired_difference(better, plain)
intervals = {
    "plain": interval(values),
    "better": interval(outcome_values(better, "sampled")),
    "better minus plain": interval(difference),
}
mean, low, high = intervals["better minus plain"]
assert low > 0
assert low < 0.03 < high
pd.Series({name: as_text(found) for name, found in intervals.items()}, name="mean [95 %]").to_frame()

# %% [markdown]
# The intervals of the methods overlap widely. The difference is clear all the same, because the luck of a world is on both sides and falls out.
#
# The interval is that of [chapter 08](../08_evaluate.ipynb): a bootstrap that draws worlds, seeds within worlds, and prompts. What would be wrong with drawing single numbers, as if
# all thousand were independent?

# %%
flat = interval(difference.ravel())
assert flat[2] - flat[1] < 0.8 * (high - low)
print("worlds, seeds, prompts:", as_text((mean, low, high)))
print("a thousand numbers:    ", as_text(flat))

# %% [markdown]
# It looks surer than it may. Fifty prompts of one run share the luck of that run, so they are not fifty pieces of evidence.
#
# And the first of the two? A 95 % interval should miss the truth in 5 of a hundred. We invent differences whose truth is 0. Once all noise is between worlds and between runs, with about the size that ours turned out to have. Once there is little of that, and much noise between prompts:

# %%
rng = np.random.default_rng(3)
def misses(worlds, seeds, of_world=0.0145, of_run=0.009, of_prompt=0., prompts=1): # share of intervals without the truth
    missed = []
    for _ in range(400):
        luck = rng.normal(0, of_world, (worlds, 1, 1)) + rng.normal(0, of_run, (worlds, seeds, 1))
        if of_prompt: luck = luck + rng.normal(0, of_prompt, (worlds, seeds, prompts))
        _, low, high = interval(luck, draws=200)
        missed.append(not low <= 0 <= high)
    return np.mean(missed)

missed = {f"{W} worlds x {R} seeds": misses(W, R) for W, R in ((10, 2), (5, 4))}
missed["10 worlds x 2 seeds, noise between prompts"] = misses(10, 2, 0.003, 0.003, 0.16, 100)
first, fewer, between_prompts = missed.values()
assert between_prompts < 0.05 < first < 0.10 < fewer
pd.Series(missed, name="misses").map("{:.1%}".format).to_frame()


# %% [markdown]
# Where worlds differ, it misses more often than it says: with ten worlds by two or three in a hundred, with five more than twice as often. A bootstrap of few worlds is too sure. Where prompts make the noise, it misses hardly ever: their noise is in the means of the worlds already, and drawing prompts counts it once more. Ours lie between the two.
#
# ## Many differences
#
# An experiment shows several differences. Two small helpers: one for the intervals of differences, one for the means behind them.

# %%
#| export
def difference_intervals(
    differences: dict, # question -> paired difference, (worlds, seeds, prompts)
) -> pd.DataFrame:     # question, mean, low, high
    "Mean and 95 % interval of each difference."
    rows = [(question, *interval(difference)) for question, difference in differences.items()]
    return pd.DataFrame(rows, columns=["question", "mean", "low", "high"])

def outcome_means(
    found: dict,       # name -> rows of the table of runs
) -> pd.DataFrame:     # one row per name, one column per outcome
    "Mean and 95 % interval of every outcome, as text."
    means = {}
    for name, rows in found.items():
        values = {label: outcome_values(rows, what) for what, label in OUTCOMES.items()}
        means[name] = {label: as_text(interval(v)) for label, v in values.items()}
    return pd.DataFrame(means).T


# %%
slightly, same = invent(0.81, seed=3), invent(0.80, seed=4)
found = {"plain": plain, "better": better, "slightly better": slightly, "the same": same}
outcome_means(found)

# %%
differences = {
    "better minus plain (0.03)": paired_difference(better, plain),
    "slightly better minus plain (0.01)": paired_difference(slightly, plain),
    "the same minus plain (0)": paired_difference(same, plain),
}
table = difference_intervals(differences)
table.round(3)

# %% [markdown]
# ## A picture of differences
#
# A difference of 0.001 may be real, and nobody need care. We say beforehand what we do not care about: two points of a hundred of the true reward. Two methods are *equal* when the
# whole interval of their difference lies within that band, drawn in grey. Where an interval leaves out 0, we say *different*. Both can be true at once: the difference is there and *small*.
# And neither may be true: then *we cannot tell*.

# %%
#| export
SAME = 0.02 # of true reward: a smaller difference is too small to count

def plot_contrasts(
    table: pd.DataFrame,     # question, mean, low, high
    unit: str = "difference of mean true reward",   # label of the axis
    same: float = SAME,      # half the width of the grey band
    ax = None,               # where to draw; None: a new figure
    sides: tuple = None,     # (left, right): what it means to lie there, as ("better: DPO", "better: sDPO")
) -> plt.Figure:
    """Differences with 95 % intervals; an interval inside the grey band means equal.
    A question that begins with a space is drawn as a part of the one above it."""
    if ax is None: _, ax = plt.subplots(figsize=(6.5, 0.42 * len(table) + 1))
    y = np.arange(len(table))
    part = table["question"].str.startswith(" ").to_numpy()
    labels = ["└ " + text.strip() if text.startswith(" ") else text for text in table["question"]]

    ax.axvspan(-same, same, color="0.9", lw=0)
    ax.axvline(0, color="black", lw=1, ls=":")
    below, above = table["mean"] - table["low"], table["high"] - table["mean"]
    ax.errorbar(table["mean"], y, xerr=[below, above], fmt="none", ecolor="black", capsize=3)
    ax.plot(table["mean"][~part], y[~part], "o", color="black")
    ax.plot(table["mean"][part], y[part], "o", color="black", mfc="white", ms=5)
    ax.set(yticks=y, yticklabels=labels, ylim=(len(table) - 0.5, -0.5))
    ax.set_xlabel(unit, labelpad=4 if sides is None else 18)
    if sides: _name_sides(ax, *sides)
    sns.despine(ax.figure)
    return ax.figure

def _name_sides(ax, left, right):
    "Words under the axis, on both sides of 0."
    at_zero = dict(xy=(0, 0), xycoords=ax.get_xaxis_transform(), textcoords="offset points")
    at_zero |= dict(va="top", fontsize="small", color="0.3")
    ax.annotate(f"← {left}", xytext=(-5, -20), ha="right", **at_zero)
    ax.annotate(f"{right} →", xytext=(5, -20), ha="left", **at_zero)


# %% [markdown]
# Our three differences, and the first of them by seed. A part of a row stands under it, with a mark and a hollow dot.

# %%
differences = {
    "better minus plain": paired_difference(better, plain),
    "  seed 0 only": paired_difference(better, plain)[:, :1],
    "  seed 1 only": paired_difference(better, plain)[:, 1:],
    "slightly better minus plain": paired_difference(slightly, plain),
    "the same minus plain": paired_difference(same, plain),
}
table = difference_intervals(differences)
assert (table["low"] > 0).tolist()[0]
plot_contrasts(table, sides=("better: plain", "better: the other"));


# %% [markdown]
# The first interval lies beyond the band: better, and by enough to count. *Slightly better* is different from plain, but whether by enough to count, we cannot tell. *The same* is equal:
# its interval lies in the band.
#
# In some experiments all three outcomes matter. Then they stand side by side. KL is a distance, so there "equal" has no
# band, and no side is the better one.

# %%
#| export
def plot_outcomes(
    tables: dict,         # of OUTCOMES -> `difference_intervals` of the same questions
    unit: str,            # what is subtracted from what
    sides: tuple = None,  # (left, right) of the two rewards; KL has words of its own
) -> plt.Figure:
    "`plot_contrasts` of every outcome, side by side; a KL has no band in which it is the same."
    height = 0.3 * len(tables["kl"]) + 1.2
    fig, axes = plt.subplots(1, len(OUTCOMES), figsize=(12, height), sharey=True, constrained_layout=True)
    for ax, (what, label) in zip(axes, OUTCOMES.items()):
        of_this = f"{label}\n({unit})"
        if what == "kl":
            plot_contrasts(tables[what], of_this, 0, ax, ("nearer to S", "farther from S"))
        else:
            plot_contrasts(tables[what], of_this, SAME, ax, sides)
    return fig


# %%
tables = {}
for what in OUTCOMES:
    tables[what] = difference_intervals({
        "better": paired_difference(better, plain, what),
        "slightly better": paired_difference(slightly, plain, what),
        "the same": paired_difference(same, plain, what),
    })
plot_outcomes(tables, "minus plain", sides=("better: plain", "better: the other"));


# %% [markdown]
# ## How often would chance do that?
#
# Suppose A and B are the same method with two names. Then in each world the sign of the difference is a coin. So we can try *all* $2^W$ choices of signs of $W$ worlds, and count in how many
# the mean difference is as large as the one that we saw. That share is the p-value of the exact sign-flip test. It uses the means of worlds and nothing else, as worlds are what was drawn independently.
#
# If all worlds agree in sign, what is the smallest p-value that ten worlds can give? And five?

# %%
#| export
def sign_flip_p_value(
    difference: np.ndarray, # (worlds, ...)
) -> float:                 # at least 2 / 2**worlds
    "Two-sided p-value, by all changes of sign of the means of worlds. Raises ValueError for what is not a number."
    values = np.asarray(difference)
    if not np.isfinite(values).all(): raise ValueError("difference: a value is not a finite number")
    means = values.reshape(len(values), -1).mean(1)
    signs = np.array(list(itertools.product((1, -1), repeat=len(means))))
    as_large = abs(signs @ means) >= abs(means.sum()) - 1e-12     # what we saw is as large as itself
    return float(as_large.mean())


# %%
smallest = {worlds: sign_flip_p_value(np.ones((worlds, 1, 1))) for worlds in (10, 8, 5)}
assert smallest[10] == 2 / 2**10
assert smallest[5] == 2 / 2**5
assert 8 * smallest[10] < 0.05 < 8 * smallest[8]
smallest

# %% [markdown]
# With five worlds no result can be below 0.06, however many prompts there are. With eight it can, but not when eight questions are asked at once: then the smallest p-value counts eightfold (next section), and 8 x 0.008 is above 0.05. With ten it is 0.016. Does the test keep its promise? Two equal methods in eight worlds, four hundred times: it should give
# a false alarm in about 5 %.

# %%
rng = np.random.default_rng(0)
p_values = [sign_flip_p_value(rng.normal(size=(8, 1, 1))) for _ in range(400)]
alarms = np.mean(np.array(p_values) <= 0.05)
assert 0.02 < alarms < 0.08
f"{alarms:.1%} false alarms"


# %% [markdown]
# ## Many questions at once
#
# Twenty questions about nothing, each at 5 %: one will be "significant" on average. Holm's method multiplies the smallest p-value by the number of questions, the next by one less, and
# so on, and never lets the order change. Then the chance of *any* false alarm is at most 5 %. (S. Holm, A simple sequentially rejective multiple test procedure, 1979.)

# %%
#| export
def holm_p_values(
    p_values: list, # of questions that are asked together
) -> list: # in the same order, none smaller than before
    "p-values that hold for all at once (Holm 1979)."
    corrected, highest = [0.] * len(p_values), 0.
    for rank, i in enumerate(np.argsort(p_values)):
        times = len(p_values) - rank
        highest = max(highest, min(1., times * p_values[i]))
        corrected[i] = highest
    return corrected


# %%
print(np.round(holm_p_values([0.01, 0.04, 0.03]), 3))   # 3 x 0.01, then 2 x 0.03, and 0.04 is not below it
def eight_about_nothing(): # p-values of eight questions in ten worlds
    return [sign_flip_p_value(rng.normal(size=(10, 1, 1))) for _ in range(8)]

trials = [eight_about_nothing() for _ in range(60)]
alarms = {
    "any of eight below 0.05": np.mean([min(p_values) < 0.05 for p_values in trials]),
    "the same, after Holm": np.mean([min(holm_p_values(p_values)) < 0.05 for p_values in trials]),
}
assert alarms["the same, after Holm"] < 0.12 < alarms["any of eight below 0.05"]
pd.Series(alarms).map("{:.0%}".format).to_frame("share of 60 trials with a false alarm")


# %% [markdown]
# A p-value that is not small says nothing of equality. For that there are *two one-sided tests*: the difference is equal, up to a margin, if it is neither at least that far above zero nor at least that far below.

# %%
#| export
def equality_test(
    mean: float,    # of a difference
    error: float,   # its standard error
    degrees: int,   # of freedom: one less than there are draws
    margin: float,  # what is too small to count
) -> dict:          # mean, low, high (95 %), p_equal: the larger of two one-sided p-values
    "A mean with Student's interval, and how sure it is that it lies within the margin."
    law = student(degrees)
    half = law.ppf(0.975) * error
    error = max(error, 1e-12)
    above, below = law.sf((mean + margin) / error), law.cdf((mean - margin) / error)
    return dict(mean=mean, low=mean - half, high=mean + half, p_equal=float(max(above, below)))

def equality_of(
    values,         # (draws,) one number of each draw; two or more
    margin: float,  # what is too small to count
) -> dict:          # as of `equality_test`
    "The same for draws that are independent of each other."
    values = np.asarray(values, "float64")
    error = values.std(ddof=1) / len(values) ** 0.5
    return equality_test(values.mean(), error, len(values) - 1, margin)

def with_holm(
    table: pd.DataFrame, # questions that are asked together, with p and p_equal
) -> pd.DataFrame:       # the same, with holm and holm_equal
    "Both p-values, corrected for all questions at once."
    corrected = {f"holm{kind}": holm_p_values(table[f"p{kind}"].tolist()) for kind in ("", "_equal")}
    return table.assign(**corrected)

def verdict(
    answer,  # of `with_holm`: low, high, holm, holm_equal; and mean
) -> str:
    """In a word: a difference needs its p-value and its interval, equality its p-value; both may be true at once.
    (The protocol is older than the test of equality: its *equal* and *little* are said of the interval.)"""
    different = answer["holm"] < 0.05 and not answer["low"] <= 0 <= answer["high"]
    equal = answer["holm_equal"] < 0.05
    if not different: return "equal" if equal else "we cannot tell"
    direction = "better" if answer["mean"] > 0 else "worse"
    return f"{direction}, but little" if equal else direction


# %%
near, far = (equality_test(mean, 0.005, 7, margin=0.02) for mean in (0.002, 0.02))
assert near["p_equal"] < 0.05 < far["p_equal"]
assert verdict(near | dict(holm=1., holm_equal=near["p_equal"])) == "equal"
assert verdict(far | dict(holm=0.01, holm_equal=far["p_equal"])) == "better"
{"near 0": round(near["p_equal"], 4), "at the margin": round(far["p_equal"], 4)}


# %% [markdown]
# A question may also be about a trend: does the difference grow with the size of the model? Then a straight line goes through one point for each size and world, and both tests are made of its slope. Two points fewer are free, as the line has two numbers.

# %%
#| export
def slope_test(
    x,              # (n,) of points; three or more
    y,              # (n,) of the same points
    margin: float,  # a slope that is too small to count
) -> dict:          # of the slope, as `equality_test` has it; p, that it is not 0; and the intercept of the line
    "A straight line through points, and how sure its slope is."
    line = linregress(x, y)
    answer = equality_test(line.slope, line.stderr, len(x) - 2, margin)
    return answer | dict(p=line.pvalue, intercept=line.intercept)


# %%
sizes = np.repeat([5., 5.5, 6., 6.5], 3)                   # logarithms
scatter = np.random.default_rng(0).normal(0, 0.01, 12)
flat, steep = (slope_test(sizes, slope * sizes + scatter, SAME) for slope in (0., 0.03))
assert flat["p_equal"] < 0.05 < flat["p"] and steep["p"] < 0.05 < steep["p_equal"]
assert (steep["low"] > 0) == (steep["p"] < 0.05) and np.isclose(steep["mean"] - flat["mean"], 0.03)
pd.DataFrame({"flat": flat, "steep": steep}).T[["mean", "low", "high", "p", "p_equal"]].round(3)


# %% [markdown]
# All together: one table with differences, intervals, p-values and their correction.

# %%
#| export
def tested_differences(
    differences: dict, # question -> paired difference, (worlds, seeds, prompts); two worlds or more
) -> pd.DataFrame:     # question, mean, low, high, worlds, seeds, p, p_equal, holm, holm_equal
    "Intervals and p-values of differences that are asked for together, and of their being equal."
    table = difference_intervals(differences)
    table["worlds"] = [len(difference) for difference in differences.values()]
    table["seeds"] = [difference.shape[1] for difference in differences.values()]
    table["p"] = [sign_flip_p_value(difference) for difference in differences.values()]
    of_worlds = [difference.mean((1, 2)) for difference in differences.values()]
    table["p_equal"] = [equality_of(values, SAME)["p_equal"] for values in of_worlds]
    return with_holm(table)


# %%
tested = tested_differences({
    "better minus plain": paired_difference(better, plain),
    "slightly better minus plain": paired_difference(slightly, plain),
    "the same minus plain": paired_difference(same, plain),
})
assert (tested["holm"] >= tested["p"]).all()
assert tested["holm"][0] < 0.01
tested.round(3)


# %% [markdown]
# ## How many worlds are enough?
#
# More worlds cost more. What does one more buy, and what another seed in each world? Call the standard deviation of worlds $\sigma_w$ and that of the seeds within a world $\sigma_s$. The mean over $W$ worlds with $R$ seeds each has the standard error
#
# $$\sqrt{\sigma_w^2 / W + \sigma_s^2 / (W R)}. \tag{1}$$
#
# Seeds make only the second part smaller; worlds make both smaller. The two deviations are estimated from a small trial. The variance of the means of worlds has a part of the seeds in it, which is subtracted. If that
# leaves less than nothing, it is zero.

# %%
#| export
def standard_deviations(
    values: np.ndarray, # (worlds, seeds, prompts)
) -> dict:              # worlds, seeds
    """Of means over prompts: between worlds (sampling of prompts included) and between the seeds of a world.
    A variance that comes out negative is zero. Raises ValueError for a single world or seed."""
    means = np.asarray(values).mean(2)
    if min(means.shape) < 2:
        raise ValueError(f"values: {means.shape[0]} worlds with {means.shape[1]} seeds; two or more of each are needed")
    between_seeds = means.var(1, ddof=1).mean()
    between_worlds = means.mean(1).var(ddof=1) - between_seeds / means.shape[1]
    return dict(
        worlds=float(np.sqrt(max(0, between_worlds))),
        seeds=float(np.sqrt(between_seeds)),
    )


# %%
rng = np.random.default_rng(0)
of_worlds, of_seeds = rng.normal(0, 0.3, (200, 1, 1)), rng.normal(0, 0.1, (200, 6, 1))
seen = standard_deviations(of_worlds + of_seeds)
assert abs(seen["worlds"] - 0.3) < 0.03
assert abs(seen["seeds"] - 0.1) < 0.01
print("planted: worlds 0.3, seeds 0.1")
print({name: round(value, 3) for name, value in seen.items()})

# %% [markdown]
# Does (1) hold? We draw ten worlds with two seeds a thousand times, and look how far the means scatter.

# %%
W, R = 10, 2
means = rng.normal(0, 0.3, (1000, W, 1)) + rng.normal(0, 0.1, (1000, W, R))
scatter = means.mean((1, 2)).std()
expected = (0.3**2 / W + 0.1**2 / (W * R)) ** 0.5      # (1)
assert abs(scatter / expected - 1) < 0.1
round(float(scatter), 4), round(expected, 4)


# %% [markdown]
# ## At the same distance from S
#
# A method can buy reward by moving farther from S. If A has more reward than B and has moved twice as far, what did we learn? So we sometimes ask for the reward of A *at the KL of B*. A was run at several $\beta$, which makes a *ladder*: a KL and a reward
# at each rung. Between two rungs we take a straight line, run by run. Outside the ladder we do not guess.

# %%
#| export
def reward_at_kl(
    ladder: list,    # rows of one method at several beta
    kl: np.ndarray,  # (worlds, seeds, ...) whose means are asked for, nats
) -> np.ndarray:     # (worlds, seeds, 1)
    """Mean sampled reward of a method at another's KL, linear between neighbours of its ladder.
    Raises ValueError outside the ladder."""
    kls = np.array([outcome_values(rows, "kl").mean(2) for rows in ladder])     # (rungs, worlds, seeds)
    rewards = np.array([outcome_values(rows, "sampled").mean(2) for rows in ladder])
    asked = kl.mean(2)
    out = np.empty((*asked.shape, 1))
    for run in np.ndindex(asked.shape):
        order = np.argsort(kls[:, *run])
        x, y = kls[order, *run], rewards[order, *run]
        if not x[0] <= asked[run] <= x[-1]:
            raise ValueError(f"at_kl: {asked[run]:.2f} nats is outside the ladder, "
                             f"{x[0]:.2f} to {x[-1]:.2f}; add a beta")
        out[run] = np.interp(asked[run], x, y)
    return out


# %% [markdown]
# Three rungs without noise. Here the KL is ten times the reward, so at 3 nats the reward must be 0.3:

# %%
def rung(reward): # two worlds, one seed, three prompts
    return pd.DataFrame([dict(world=w, seed=0, sampled=[reward] * 3, kl=[10 * reward] * 3) for w in (1, 2)])

ladder = [rung(0.5), rung(0.2), rung(0.4)]
at = reward_at_kl(ladder, np.array([[[3.0]], [[4.5]]]))
assert at.ravel().round(6).tolist() == [0.3, 0.45]
print(complaint(reward_at_kl, ladder, np.full((2, 1, 1), 6.0)))
at.ravel()


# %% [markdown]
# ## A rough loss
#
# Is one way of training steadier than another? We have the losses of every step. A loss falls, and jumps from batch to batch, so we take a running median away and look at what is left: its standard deviation is the *roughness* of the curve ([chapter 08](../08_evaluate.ipynb)). Each stage has a curve of its own.

# %%
#| export
def loss_roughness(
    rows: pd.DataFrame,  # of the table of runs, with losses, and steps of each stage
    stages: list = None, # numbers from 1; None: all
) -> np.ndarray:         # (worlds, seeds, 1) nats
    "Scatter of the losses about their running median, within stages: root mean square over stages."
    roughness = []
    for row in rows.itertuples():
        ends = np.cumsum(row.steps)
        curves = np.split(np.asarray(row.losses), ends[:-1])
        asked = [curves[t - 1] for t in stages] if stages else curves
        scatter = [stability(curve)["sd"] for curve in asked]
        roughness.append([float(np.sqrt(np.mean(np.square(scatter))))])    # a list, as of prompts
    return outcome_values(rows.assign(roughness=roughness), "roughness")


# %% [markdown]
# Two stages of 200 steps. The first scatters by 0.1 about its line, the second by 0.3. (The median follows the noise a little, so we read a little less.)

# %%
rng = np.random.default_rng(0)
losses = np.concatenate([np.linspace(0.7, 0.5, 200) + rng.normal(0, scatter, 200) for scatter in (0.1, 0.3)])
rows = pd.DataFrame([dict(world=0, seed=0, losses=losses, steps=[200, 200])])
read = {f"stage {t}": loss_roughness(rows, [t]).item() for t in (1, 2)}
read["both"] = loss_roughness(rows).item()
assert abs(read["stage 1"] - 0.1) < 0.02
assert abs(read["stage 2"] - 0.3) < 0.06
assert read["stage 1"] < read["both"] < read["stage 2"]
pd.Series(read).round(2)

# %% [markdown]
# A loss scales with $\beta$, and a high loss scatters more than a low one. So compare runs at one $\beta$ and learning rate, and on the same batches where you can. DPO and stepwise DPO see other batches; their curves are compared as wholes, over many runs.
#
# ## Settings that were chosen elsewhere
#
# Each method has settings of its own, so we try some and take the best. But the best of ten numbers is partly the luckiest of ten. We invent methods that are equal in truth, with ten settings that are equal in truth, and choose one in three ways:
#
# - the best in the ten worlds that are measured;
# - for each of the ten worlds, the best in the other nine. That is *cross-fitting*;
# - the best in five other worlds, where nothing else is measured.

# %%
rng = np.random.default_rng(0)
def tried(worlds): return rng.normal(0, 0.01, (10, worlds))     # rewards of ten settings, without their mean

def best_here():
    rewards = tried(10)
    return rewards[rewards.mean(1).argmax()]

def best_of_the_other_nine():
    rewards = tried(10)
    elsewhere = rewards.sum(1, keepdims=True) - rewards
    return rewards[elsewhere.argmax(0), range(10)]

def best_of_five_other_worlds():
    chosen = tried(5).mean(1).argmax()
    return tried(10)[chosen]


# %% [markdown]
# Two things can go wrong. Is the reward too high? And how often does the sign-flip test call two such methods different, at a p-value of 0.05?

# %%
table = {}
for choose in (best_here, best_of_the_other_nine, best_of_five_other_worlds):
    rewards = [choose().mean() for _ in range(1000)]
    p_values = np.array([sign_flip_p_value(choose() - choose()) for _ in range(1000)])
    table[choose.__name__.replace("_", " ")] = {"too high by": np.mean(rewards), "false alarms": np.mean(p_values < 0.05)}
table = pd.DataFrame(table).T
assert table["too high by"].iloc[0] > 0.004
assert table["too high by"].iloc[1:].abs().max() < 0.001
assert table["false alarms"].iloc[1] > 0.10
assert table["false alarms"].iloc[2] < 0.07
table.round(3)

# %% [markdown]
# The best of ten is too high, and a method with fewer settings would lose to it for nothing. Cross-fitting mends that. But its ten worlds are no longer independent: each has a part in the choice of the other nine. So chance looks like a difference far too often. Only the third way has neither fault. We choose in some worlds and measure in others.

# %% [markdown]
# ## What you now have
#
# - `paired_difference` and `difference_intervals`: two methods where both were asked the same, with an interval that knows about worlds, seeds and prompts.
# - `sign_flip_p_value` and `holm_p_values`: how often chance would do that, for one question and for many.
# - `equality_test` and `slope_test`: how sure we are that a difference is too small to count, and that it does not grow.
# - `plot_contrasts`: a picture with a band in which a difference is too small to count.
# - `reward_at_kl`: a comparison at equal distance from S.
# - `loss_roughness`: how much a loss jumps.
#
# Next: the [questions](questions.ipynb) that were asked with these tools.
#
# ## Questions to test yourself
#
# 1. Why do 600 test prompts and two seeds not make up for a single world?
#
#    <details><summary>Answer</summary>
#
#    They tell exactly how the methods compare *in that world*. In another world the difference may be another one, and of that a single world says nothing, as equation (1) shows: with $W = 1$ the part $\sigma_w^2$ stays whole.
#
#    </details>
# 2. A primary difference has a p-value of 0.002 and lies within $\pm 0.02$. Is that a contradiction?
#
#    <details><summary>Answer</summary>
#
#    No. The p-value says that the difference is not chance; the band says that it is too small to count. It is there, and small.
#
#    </details>
# 3. A method wins at its best $\beta$ but loses at equal KL. What has it been doing?
#
#    <details><summary>Answer</summary>
#
#    It moved farther from S, and got reward for the distance. At the distance of the other it had less.
#
#    </details>
#
# ## Try this
#
# - Drop the pairing: take worlds 0 to 4 of `better` and 5 to 9 of `plain`, and subtract the two means. What comes out?
#
#   <details><summary>What you should see</summary>
#
#   The luck of the worlds no longer falls out. The difference of two such means scatters by about $0.05 \sqrt{2/5} = 0.03$, as much as the effect that we planted. Here it comes out below zero: the better method looks worse.
#
#   </details>
# - Invent two methods with 2000 prompts instead of 50. Does the interval of the difference become much narrower?
#
#   <details><summary>What you should see</summary>
#
#   Not by the factor of six that 40 times the prompts promise: the luck of the runs is still there, in 20 runs.
#
#   </details>
