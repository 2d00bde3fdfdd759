# %% [markdown]
# # How should the data be cut?
# > By sources or by pairs, by five measures, in both directions; and two ways of leaving pairs out.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/how_to_partition.ipynb)
#
# **The order of these sources does not matter. Ending on the pairs that S contradicts does, at the settings that are best for DPO.** Easy source first minus hard source first is +0.004 [-0.011, +0.020] of true reward. Pairs sorted one by one by $\gamma$, easy first, are worse there than a random split by 0.104 [0.080, 0.130]. At the settings that are best for stepwise DPO, with a larger $\beta$ and a smaller learning rate, they are worse than the sources by only 0.014 [0.003, 0.027].
#
# Hard pairs are mislabelled more often than easy ones, but most of their labels are right. Two ways of selecting pairs by difficulty did worse, at one $\beta$, than as many pairs at random. All numbers of trained models are from ten worlds with two seeds each, in three chunks.
#
# **You should know** [partition](../05_partition.ipynb) and the [protocol](protocol.ipynb). **Time** 25 minutes to read, a few seconds to run. The grid behind it took 1.4 core hours (`make experiments`).
#
# <details><summary>Words used on this page</summary>
#
# - **S** is the model before alignment; it wrote both responses of every pair. The *chosen* response is the one that the label prefers, the other is *rejected*.
# - **$\gamma$** of a pair is how much more likely S finds the chosen response than the rejected one, as a difference of log-probabilities, in nats. Where it is negative, S prefers the rejected one.
# - **Reward accuracy of a source** is the share of its pairs with positive $\gamma$. The paper calls a source with a high share easy, and trains on it first.
# - **Stepwise DPO** trains one *stage* on each chunk, and every stage has the model of the stage before as its reference. **DPO** trains on everything at once.
# - **$\beta$** says how strongly a model is held at its reference. **KL** is the distance from S, in nats, along the model's own answers.
# - **True reward** is 1 for the right answer and less for every letter that has to be mended. *Sampled* answers are drawn; a *greedy* answer takes the likeliest letter at every place.
# - **-0.104 [-0.130, -0.080]** is a mean and its 95 % interval. Differences are *paired*: same worlds, seeds and prompts. *Equal* means that the whole interval lies within $\pm 0.02$, the grey band in the figures.
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
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from sdpo_nb.cells import unfold_column
from sdpo_nb.compare import difference_intervals, outcome_means, paired_difference, plot_contrasts
from sdpo_nb.evaluate import as_text
from sdpo_nb.logprobs import score_pairs
from sdpo_nb.partition import wilson
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.questions import load_grid
from sdpo_nb.training_data import COMMON_SETTINGS, TRAINING_DATA, pair_measure, true_gap
from sdpo_nb.world import load_base, load_world

# %% [markdown]
# ## What are hard pairs?
#
# Take the pairs of world 0, and let S say how likely it finds their responses.

# %%
world = load_world()
base, tokenizer = load_base(world)
rows = TRAINING_DATA["one source"](world, base, tokenizer)["all"]

longest = COMMON_SETTINGS["max_length"]
pairs = tokenize_pairs(load_pairs(rows), tokenizer, "all", longest, longest // 2).pairs
gamma = score_pairs(base, pairs).gamma(pairs).numpy()

# %% [markdown]
# There are five ways to say how easy a pair is:
#
# - *accuracy of sources*: by the reward accuracy of the whole source that the pair is from, as in the paper;
# - *gamma*: the surer S is of the label, the easier;
# - *length*: letters in both responses; short is easy;
# - *distance*: the edit distance between the two responses, which is our measure of diversity; far apart is easy;
# - *true gap*: the difference of the two true rewards; a large gap is easy. Nobody outside this world could know it.

# %%
source = [r["source"] for r in rows]
accuracy = pd.Series(gamma > 0).groupby(source).mean()

easy = {
    "accuracy of sources": np.array([accuracy[s] for s in source]),
    "gamma of pairs": gamma,
    "length of pairs": -np.array([pair_measure(r, "length") for r in rows]),
    "distance of pairs": np.array([pair_measure(r, "distance") for r in rows]),
    "true gap of pairs": np.array([pair_measure(r, "true gap") for r in rows]),
}
thirds = {}
for measure, value in easy.items():
    easy_first = np.argsort(-value, kind="stable")
    thirds[measure] = np.array_split(easy_first, 3)

# %% [markdown]
# This world knows which labels are wrong. The labels were drawn by Bradley-Terry, which prefers the better response the more surely the larger the gap of true rewards is, and errs where two responses are close. Before you look: are labels of hard pairs wrong more often?

# %%
wrong = np.array([r["flipped"] for r in rows])

def share_of_wrong(third):
    share = wrong[third].mean()
    return as_text((share, *wilson(share, len(third))), ".2f")

shares = pd.DataFrame(
    {measure: [share_of_wrong(third) for third in parts] for measure, parts in thirds.items()},
    index=["easy", "middle", "hard"],
).T
easiest, _, hardest = thirds["gamma of pairs"]
assert wrong[hardest].mean() > 2 * wrong[easiest].mean()
shares.rename_axis("share of wrong labels, 95 %")

# %% [markdown]
# By every measure that looks at single pairs, hard pairs are mislabelled more often. By sources they are not, since the sources were made to differ in their prompts only. Are hard pairs, then, mislabelled pairs? Here is the hardest third by each measure:

# %%
tied = np.array([true_gap(r) for r in rows]) == 0
hardest_third = {}
for measure, (_, _, hard) in thirds.items():
    hardest_third[measure] = {
        "wrong": wrong[hard].mean(),
        "tied, no label is right": tied[hard].mean(),
        "right": (~wrong & ~tied)[hard].mean(),
        "S prefers the other": (gamma[hard] < 0).mean(),
    }
hardest_third = pd.DataFrame(hardest_third).T
assert (hardest_third["right"] > 2 * hardest_third["wrong"]).all()
hardest_third.round(2)

# %% [markdown]
# Most of their labels are right. What marks the pairs of small $\gamma$ is something else, and by definition: S prefers the other response. They are a third of the data in which every single label contradicts S.
#
# ## Does the order matter?
#
# All pairs are sorted by a measure and cut into three chunks. All runs have the settings that are best for DPO ($\beta = 0.6$, learning rate 0.0003), so that they differ only in what lies in which chunk. What is subtracted is stepwise DPO at the same settings on a *random* split: all pairs shuffled, then cut in three.

# %%
found = load_grid("how_to_partition")

def minus(a, b, what="sampled"):
    return paired_difference(found[a], found[b], what)

compared = {}
for measure in easy:
    compared[f"{measure}: easy first"] = minus(measure, "random")
    compared[f"{measure}: hard first"] = minus(f"{measure}, hard first", "random")
order = difference_intervals(compared)

by_name = order.set_index("question")
assert by_name.loc["accuracy of sources: easy first", ["low", "high"]].abs().max() <= 0.02
assert by_name.loc["gamma of pairs: easy first", "high"] < -0.05
assert (by_name["low"] < 0).all()

# %%
plot_contrasts(order, "true reward minus that of a random split (grey: equal)",
               sides=("worse than random", "better"));

# %% [markdown]
# And the two directions of the sources against each other, as the paper would have it minus the opposite:

# %%
sources = difference_intervals({
    "easy source first minus hard source first": minus("accuracy of sources", "accuracy of sources, hard first"),
})
assert sources[["low", "high"]].abs().max(axis=None) < 0.02
sources.set_index("question").round(3)


# %% [markdown]
# The whole interval lies in the band. Of no sorted split can we say that it is better than a random one. (By $\gamma$, hard first, we cannot tell.) Four of the ten are worse by 0.02 to 0.03, and one is worse by a tenth: by $\gamma$, easy first. In which stage is that lost?

# %%
def on_the_way(row):
    "Means of the models after stage 1, 2 and 3."
    return unfold_column(found[row], "stages").groupby("stage")[["sampled", "kl"]].mean()

WAYS = {  # label -> row, colour, line, height of the labels left and right
    "random": ("random", "0.4", "-", 0, 4),
    "easy first": ("gamma of pairs", "C3", "-", 0, 0),
    "hard first": ("gamma of pairs, hard first", "C0", "-", -4, -8),
    "easy first, tuned": ("gamma of pairs, tuned", "C3", "--", -3, 4),
    "hard first, tuned": ("gamma of pairs, hard first, tuned", "C0", "--", 3, -4),
}

# %%
AXES = {
    "sampled": "true reward, sampled\n← worse      better →",
    "kl": "KL from S (nats)\nfarther →",
}
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4), constrained_layout=True)
for name, (row, color, line, *heights) in WAYS.items():
    models = on_the_way(row)
    for ax, (what, label), height in zip(axes, AXES.items(), heights):
        ax.plot(["$M_1$", "$M_2$", "$M_3$"], models[what], "o", ls=line, color=color)
        ax.annotate(name, (2, models[what].iloc[-1]), xytext=(8, height - 3), textcoords="offset points",
                    color=color, fontsize="small")
        ax.set(ylabel=label, xlim=(-0.2, 3.1))
axes[0].set_title("by gamma of pairs", fontsize="medium")
axes[1].set_title("dashed: settings that are best for stepwise DPO", fontsize="medium")
sns.despine(fig)

last_stage = on_the_way("gamma of pairs")["sampled"].diff()[3]
last_stage_tuned = on_the_way("gamma of pairs, tuned")["sampled"].diff()[3]
assert last_stage < -0.08
assert last_stage_tuned > 0

# %% [markdown]
# $M_t$ is the model after stage $t$. The harm is done in the last stage, which sees nothing but pairs that contradict S. Its model runs off, three nats in one stage, and no later stage brings it back. *Hard first* goes through the same stage, as its first, and recovers.
#
# The dashed lines have the settings that are best for stepwise DPO: twice the $\beta$ and a third of the learning rate. There nothing runs off, and little is left of the harm. (Which of the two settings helps, we did not ask.) At these settings each is compared with stepwise DPO by *sources*, easy source first:

# %%
by_sources = load_grid("primary")["sDPO"]
ROWS = {"easy first": "gamma of pairs, tuned", "hard first": "gamma of pairs, hard first, tuned"}
compared = {}
for way, row in ROWS.items():
    for what in ("sampled", "greedy"):
        compared[f"by gamma, {way}, {what}"] = paired_difference(found[row], by_sources, what)
tuned = difference_intervals(compared)
plot_contrasts(tuned, "true reward minus that of the split by sources, easy first (grey: equal)",
               sides=("by sources better", "by gamma better"));

# %% [markdown]
# All means, with their distances from S ("tuned": at the settings that are best for stepwise DPO; the rows of DPO belong to the last section):

# %%
outcome_means(found)

# %% [markdown]
# ## Leaving pairs out
#
# Two published rules point in opposite directions: keep the pairs with the *smallest* implicit gap ([2508.04149](https://arxiv.org/abs/2508.04149)), or drop the hardest ([2502.09650](https://arxiv.org/abs/2502.09650)). What follows takes their idea, not their recipes.
#
# A model M is trained for one epoch on all pairs, by plain DPO. The gap of a pair is $\gamma_M - \gamma_S$, with its sign: how much M has learned to prefer the chosen response. *Smallest* and *largest* each keep two thirds of the pairs. Together with the epoch of M, three passes over the kept pairs cost as much as three passes over all. The fair comparison is with two thirds *at random*:

# %%
PARTS = {
    "smallest gaps": "DPO on the smallest gaps",
    "largest gaps": "DPO on the largest gaps",
    "all pairs": "DPO",
}
compared = {}
for name, row in PARTS.items():
    for what in ("sampled", "greedy"):
        compared[f"{name}, {what}"] = minus(row, "DPO on a random part", what)
kept = difference_intervals(compared)
assert kept["high"].iloc[:4].max() < 0             # both selections
assert kept["low"].iloc[4:].min() > 0              # all pairs

# %%
plot_contrasts(kept, "true reward minus that of two thirds at random",
               sides=("random part better", "better than random"));

# %% [markdown]
# Both selections are *worse* than as many pairs at random, by 0.02. The random part is worse than all pairs, by as much. The two selections fail differently: the smallest gaps stay nearer to S (1.2 nats), the largest run farther (3.3 nats; all pairs 1.7). So another $\beta$ might suit each of them better. Here all have the $\beta$ of DPO.
#
# ## What this does not show
#
# - **That order never matters.** These sources share all skills, their labels are equally noisy, and nothing in them builds on anything else: there is no curriculum to find. [When order matters](when_order_matters.ipynb) has sources whose hard part is also the noisy part, and [builds on](builds_on.ipynb) a hard source that builds on the easy one.
# - **That the two published selections fail.** They keep other shares, on other data, and were tuned; ours ran at one $\beta$.
# - **The ten splits at the best $\beta$ of each.** Only the sources and $\gamma$ were also run at the settings of stepwise DPO.
#
# ## What you now have
#
# - Shares of wrong labels by measure, since this world knows them.
# - Ten sorted splits and a random one. What harms is the *last* chunk, where it is one-sided, at the settings of DPO.
#
# ## Questions to test yourself
#
# 1. Sources sorted by accuracy hardly differ in their wrong labels. Why do pairs sorted by $\gamma$?
# <details><summary>Answer</summary>
#
# $\gamma$ is measured with the label. S is right more often than not, so a flipped label usually turns a positive $\gamma$ into a negative one, and the pair lands among the hard ones. The accuracy of a source is one number for all its pairs and cannot sort within it.
# </details>
#
# 2. Why does *hard first* by $\gamma$ not suffer, although it sees the same pairs?
# <details><summary>Answer</summary>
#
# After its one-sided stage come two others, which mend the model. With easy first, the one-sided stage is the last.
# </details>
#
# 3. A selection is compared with all pairs and loses. What two reasons can that have?
# <details><summary>Answer</summary>
#
# It has fewer pairs, or it has worse ones. As many pairs at random tell the two apart.
# </details>
#
# ## Try this
#
# - Sort by $|\gamma|$ instead of $\gamma$: first the pairs of which S is sure, in either direction. What is in the last chunk now, and where do the wrong labels go?
# <details><summary>What you should see</summary>
#
# The last chunk holds the pairs of which S is unsure; it prefers the rejected response in 48 % of them, about as often as not. Wrong labels are now most frequent in the *first* chunk, 0.12 against 0.07 in the two others: where S is sure and the label says the opposite, the label is often wrong.
# </details>
