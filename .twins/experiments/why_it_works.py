# %% [markdown]
# # Why does it work?
# > Chunks, reference, schedule and order, each switched while the others stand still.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/why_it_works.ipynb)
#
# **At the $\beta$ of DPO the parts of stepwise DPO cost reward; at a larger $\beta$ a moving reference pays.** At the settings that are best for DPO, stepwise DPO loses 0.052 [0.037, 0.068] of true reward. On one path from the one to the other, 0.018 [0.011, 0.026] of it comes with chunks and 0.028 [0.015, 0.040] with the moving reference; on other paths the chunks cost up to 0.030 and the reference as little as 0.015. Restarts of the schedule cost 0.009 in the mean (0.014 with a fixed reference), and of the order of these sources nothing was seen.
#
# Nearly all variants lie on one line: the farther from S, the less reward. On the other side of the best distance a moving reference beats a fixed one: at a third of the learning rate at $\beta$ from 1.2 on, at this one from 2.4 on (two worlds of the search). All numbers but those of the search are from ten worlds with two seeds each.
#
# **You should know** [stepwise DPO](../14_stepwise.ipynb) and the [protocol](protocol.ipynb). **Time** 25 minutes to read, a few seconds to run. The grid behind it took 1.6 core hours (`make experiments`).
#
# <details><summary>Words used on this page</summary>
#
# - **S** is the model before alignment. **DPO** trains it on all pairs at once. **Stepwise DPO** trains in three *stages*, one for each *chunk* of the pairs.
# - **Reference**: the fixed model that the loss measures from. It is *moving* where every stage has the model of the stage before, *fixed* where every stage has S.
# - **$\beta$** says how strongly a model is held at its reference. A smaller $\beta$ lets it go farther. **KL** is the distance from S, in nats, along the model's own answers.
# - **Schedule**: the learning rate rises at the start and falls to the end. It *restarts* where every stage has a schedule and an optimizer of its own.
# - **Order**: by *source*, the easy one first or the hard one first, where easy means that S already agrees with most labels; or *random*, where all pairs are shuffled before they are cut.
# - **True reward** is 1 for the right answer and less for every letter that has to be mended. *Sampled* answers are drawn; a *greedy* answer takes the likeliest letter at every place.
# - **-0.052 [-0.068, -0.037]** is a mean and its 95 % interval. Differences are *paired*: same worlds, seeds and prompts. Inside the grey band, $\pm 0.02$, a difference is too small to count.
#
# </details>

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
import itertools
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from sdpo_nb.cells import stored_rows
from sdpo_nb.compare import difference_intervals, outcome_means, outcome_values
from sdpo_nb.compare import paired_difference, plot_contrasts
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.questions import load_grid, search_cells, search_table

# %% [markdown]
# ## Four steps from DPO to stepwise DPO
#
# Stepwise DPO differs from DPO in more than one way. Pairs come *chunk by chunk*; the *reference* moves; optimizer and *schedule* start anew in every stage; and the chunks have an *order*. The paper compares the two ends. It has one run between them, stepwise DPO on a random split (all pairs shuffled, then cut), whose benchmark mean was 0.11 points below that of DPO. So any of the four may have made the difference.
#
# What does the closed form of [chapter 03](../03_loss.ipynb) expect? Of the order, nothing. Of a moving reference, that it pulls farther from S: if all stages find the same reward, $T$ stages at $\beta$ end where one stage at $\beta/T$ ends. With a fixed reference they end where one stage at $\beta$ ends.
#
# All runs here have the settings that are best for DPO, $\beta = 0.6$ and a learning rate of 0.0003, and three chunks. A run is named by its reference, its order, and where its schedule restarts. Before you look: which of the four steps will cost most?

# %%
found = load_grid("why_it_works")

def minus(a, b, what="sampled"):
    return paired_difference(found[a], found[b], what)

PATH = {  # step -> the run that has taken it
    "DPO": "DPO",
    "chunk by chunk": "fixed, random, never",
    "... and the reference moves": "moving, random, never",
    "... and the schedule restarts": "moving, random, stage",
    "... and easy sources first": "moving, easy_to_hard, stage",
}
compared = {}
for (_, before), (step, after) in itertools.pairwise(PATH.items()):
    compared[step] = minus(after, before)
compared["all four: stepwise DPO minus DPO"] = minus("moving, easy_to_hard, stage", "DPO")
steps = difference_intervals(compared)

assert (steps["high"] < 0).tolist() == [True, True, False, False, True]
four, together = steps["mean"].iloc[:4].sum(), steps["mean"].iloc[4]
assert abs(four - together) < 1e-9

# %%
plot_contrasts(steps, "change of true reward by this step (grey: too small to count)",
               sides=("costs", "gains"));

# %% [markdown]
# Two of the four steps cost something, and none gains. But this path is one of many. Does a moving reference cost as much where the schedule restarts, or where the order is another?
#
# ## All twelve combinations

# %%
SWITCHES = {
    "reference": ("fixed", "moving"),
    "order": ("random", "easy_to_hard", "hard_to_easy"),
    "restart": ("never", "stage"),
}
def reward_of(reference, order, restart, what="sampled"):
    return outcome_values(found[f"{reference}, {order}, {restart}"], what)

table = {}
for reference in SWITCHES["reference"]:
    for restart in SWITCHES["restart"]:
        by_order = {order: interval(reward_of(reference, order, restart)) for order in SWITCHES["order"]}
        table[reference, restart] = {order: as_text(row) for order, row in by_order.items()}
pd.DataFrame(table).rename_axis(columns=["reference", "restart"])


# %% [markdown]
# A *main effect* is the mean difference that one switch makes, over all settings of the others. Where it depends on another switch, a mean hides that. So the effect of the reference is shown three times: in the mean, with one schedule for all stages, and with restarts.

# %%
def mean_where(what, **given):
    "The mean over the combinations in which these switches stand as given."
    allowed = [(given[name],) if name in given else every for name, every in SWITCHES.items()]
    return np.mean([reward_of(*setting, what) for setting in itertools.product(*allowed)], axis=0)

def effects(what):
    def effect_of_reference(**given):
        return mean_where(what, reference="moving", **given) - mean_where(what, reference="fixed", **given)
    easy_first = mean_where(what, order="easy_to_hard")
    return difference_intervals({
        "moving minus fixed reference": effect_of_reference(),
        " with one schedule": effect_of_reference(restart="never"),
        " restarted": effect_of_reference(restart="stage"),
        "restarted minus one schedule": mean_where(what, restart="stage") - mean_where(what, restart="never"),
        "easy first minus random order": easy_first - mean_where(what, order="random"),
        "easy first minus hard first": easy_first - mean_where(what, order="hard_to_easy"),
    })

sampled = effects("sampled")
order = sampled.iloc[4:]
assert (sampled["high"] < 0).tolist() == [True, True, True, True, False, False]
assert (order[["low", "high"]].abs() < 0.02).all(axis=None)

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharex=True, sharey=True, constrained_layout=True)
SIDES = ("the first-named is worse", "better")
plot_contrasts(sampled, "effect on true reward, sampled", ax=axes[0], sides=SIDES)
plot_contrasts(effects("greedy"), "effect on true reward, greedy", ax=axes[1], sides=SIDES);


# %% [markdown]
# Of the order of these three sources nothing is seen. A moving reference costs more with one schedule than with restarts, and more in greedy answers. Restarting costs about a hundredth; its interval barely leaves zero, and it is one of several.
#
# So what a step costs depends on when it is taken. Chunks can come as sources, the easy one first, and the reference can be the last to move. How much is a restart with each reference? And how much farther do restarts alone take a model? For that we look at random chunks, which are all alike.

# %%
def restarting(reference):
    restarted = mean_where("sampled", reference=reference, restart="stage")
    return restarted - mean_where("sampled", reference=reference, restart="never")

elsewhere = difference_intervals({
    "chunk by chunk, sources, easy first": minus("fixed, easy_to_hard, never", "DPO"),
    "the reference moves, last of all": minus("moving, easy_to_hard, stage", "fixed, easy_to_hard, stage"),
    "restarts, fixed reference": restarting("fixed"),
    "restarts, moving reference": restarting("moving"),
})
farther = difference_intervals({
    f"{reference} reference": minus(f"{reference}, random, stage", f"{reference}, random, never", "kl")
    for reference in SWITCHES["reference"]
})
assert (elsewhere["high"] < 0).tolist() == [True, False, True, False]
assert (farther["low"] > 0).all()
tables = {"true reward": elsewhere, "KL from S (nats), of restarts": farther}
pd.concat(tables).droplevel(1).set_index("question", append=True).round(3)


# %% [markdown]
# With sources the first step costs 0.030, more than with random chunks. The reference, as the last step, costs 0.015, and there the interval reaches over zero. And with random chunks restarts take a model farther, with either reference. (With sources some intervals of that are too wide to say.)
#
# ## One curve
#
# If all of this is "like a smaller $\beta$", it should be movement along one line: farther from S, less reward. Is it?

# %%
def kind_of(name):
    if name == "from S": return "stages that start from S"
    if name.startswith("moving"): return "three stages, moving reference"
    if name.startswith("fixed"): return "three stages, fixed reference"
    return "DPO"

points = []
for name, rows in found.items():
    kl, reward = outcome_values(rows, "kl").mean(), outcome_values(rows, "sampled").mean()
    points.append(dict(name=name, kind=kind_of(name), kl=kl, reward=reward))
points = pd.DataFrame(points)

others = points[points["kind"] != "stages that start from S"]
assert others["kl"].rank().corr(others["reward"].rank()) < -0.9

# %%
LOOKS = {  # kind -> marker, colour, where its label stands
    "three stages, fixed reference": ("o", "C0", (1.7, 0.818)),
    "three stages, moving reference": ("X", "C1", (3.35, 0.806)),
    "stages that start from S": ("P", "C3", (2.9, 0.769)),
    "DPO": ("s", "0.2", None),
}
fig, ax = plt.subplots(figsize=(7, 3.8))
for kind, rows in points.groupby("kind"):
    marker, color, place = LOOKS[kind]
    ax.plot(rows["kl"], rows["reward"], marker, color=color, ms=7)
    if place: ax.annotate(kind, place, color=color)
for point in points[points["kind"] == "DPO"].itertuples():
    name = point.name.replace("beta", r"$\beta$")
    ax.annotate(name, (point.kl, point.reward), xytext=(8, 2), textcoords="offset points")
ax.set(xlabel="KL from S (nats), farther →", xlim=(1.5, 5))
ax.set(ylabel="true reward, sampled\n← worse      better →")
sns.despine()

# %% [markdown]
# It nearly is. Fifteen of the sixteen runs lie along one falling line. DPO at $\beta$ is at its upper end, and DPO at $\beta/3$ among the moving references. Only stages that start from S fall off it: they are as far from S as the others and have less to show.
#
# On this side of the best $\beta$, whatever pulls farther is worse. Then on the other side it must be better. The search of the [protocol](protocol.ipynb) has both sides, at a smaller learning rate (two worlds, one seed, validation prompts):

# %%
seen = search_table(stored_rows(search_cells()))
same_rate = seen[seen["lr"] == 1e-4]
by_beta = same_rate.pivot_table("reward", "beta", "method")
sides = by_beta["sDPO"] - by_beta["sDPO, fixed reference"]
assert sides.loc[:0.6].max() < 0
assert sides.loc[1.2:].min() > 0
sides.to_frame("moving minus fixed reference").T.round(3)

# %% [markdown]
# So *whether a moving reference is better than a fixed one depends on $\beta$*. With a $\beta$ of its own each is about as good as the other. (The primary question of the protocol finds +0.012 [0.006, 0.018] for the moving one, which is inside the grey band. It compares two points of a grid in which $\beta$ goes in steps of a factor of two, and a finer grid could move either by that much.)
#
# ## The control one picks changes the answer
#
# Suppose you compare stepwise DPO with one control. Each line below is what you would report; all runs have the $\beta$ and the learning rate of DPO.

# %%
stepwise = "moving, easy_to_hard, stage"
CONTROLS = {
    "DPO": "DPO",
    "DPO, twice the epochs": "DPO, twice the epochs",
    "stages with a fixed reference": "fixed, easy_to_hard, stage",
    "DPO at beta/3": "DPO at beta/3",
    "stages in random order": "moving, random, stage",
    "stages with one schedule": "moving, easy_to_hard, never",
    "stages that start from S": "from S",
}
against = difference_intervals({control: minus(stepwise, name) for control, name in CONTROLS.items()})
against["question"] = against["question"].str.replace("beta/3", r"$\beta/3$")
plot_contrasts(against, "true reward of stepwise DPO, minus that of this control",
               sides=("the control is better", "stepwise is"));

# %% [markdown]
# From -0.05 to +0.04: clearly worse, undecided or clearly better. Behind the differences stand these means. Tokens are in thousands; those "of other passes" are read without training, by the models that order the sources and serve as references.

# %%
rows = {"stepwise DPO": found[stepwise]}
for control, name in CONTROLS.items():
    rows[control] = found[name]

tokens = {}
for name, runs in rows.items():
    tokens[name] = {
        "thousand tokens trained on": round(runs["tokens"].mean() / 1000),
        "of other passes": round(runs["pass_tokens"].mean() / 1000),
    }
outcome_means(rows).join(pd.DataFrame(tokens).T)

# %% [markdown]
# ## What this does not show
#
# - **That order never matters.** The sources of this world share all skills, are equally noisy, and build on nothing: there is no curriculum to find.
# - **The parts at the best settings of stepwise DPO.** All twelve combinations ran at those of DPO. Only the search looks at the other side, with two worlds.
# - **Large models, or chunks of unequal size.** The paper's second data set is five times its first.
#
# ## What you now have
#
# - The loss of stepwise DPO at DPO's settings, taken apart in four steps.
# - One line on which nearly all of its variants lie, and with it the reason why $\beta$ decides.
#
# ## Questions to test yourself
#
# 1. Why does this page compare at one $\beta$, and the [protocol](protocol.ipynb) at the best of each method?
# <details><summary>Answer</summary>
#
# Here we ask what a part does, so everything else must stand still. There we ask which method to use, and nobody uses a method at the settings of another.
# </details>
#
# 2. "Random" shuffles all pairs before they are cut. What else than the order of the sources changes with it?
# <details><summary>Answer</summary>
#
# What is in a chunk. With sources, each chunk has its own share of misled prompts; with random chunks all are alike, and every stage sees a little of everything.
# </details>
#
# 3. Restarted schedules have a little more learning rate in sum ([protocol](protocol.ipynb)). Given the line, in which direction does that push?
# <details><summary>Answer</summary>
#
# Farther from S, and on this side of the best $\beta$ that means less reward. It may be a part of what restarts cost.
# </details>
#
# ## Try this
#
# - Draw the figure of one curve with `"greedy"` in place of `"sampled"`. Is it still one line?
# <details><summary>What you should see</summary>
#
# Yes: the rank correlation of KL and reward over the fifteen runs is -0.96, as before, and stages that start from S are off it again (0.859 at 4.2 nats, where DPO at $\beta/3$ has 0.887).
# </details>
#
# - Repeat the table of both sides at the three other learning rates of these methods, 0.00003, 0.0003 and 0.001. Where does the sign change?
# <details><summary>What you should see</summary>
#
# At 0.0003 later, between $\beta$ = 1.2 (-0.011) and 2.4 (+0.042). At 0.00003 the moving reference is ahead already at 0.6 (+0.016) and level below. So with these three rates, the faster one learns, the larger the $\beta$ that stages need. At 0.001 that ends: the moving reference is ahead at every $\beta$, by 0.05 to 0.19. But nothing is good there, 0.58 at best with stages and 0.65 with DPO.
# </details>
