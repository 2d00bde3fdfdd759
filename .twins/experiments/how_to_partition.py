# %% [markdown]
# # How should the data be cut?
# > By sources or by pairs, by five measures, in both directions; and two ways of leaving pairs out.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/how_to_partition.ipynb)
#
# **The order of sources does not matter; ending on the pairs that S contradicts does, the more the smaller $\beta$.** In ten worlds with two seeds each, three chunks: by reward accuracy of sources, easy minus hard first is +0.004 [-0.011, +0.020] of true reward; pairs sorted by $\gamma$, easy first, are worse than a random split by
# 0.104 [0.080, 0.130] at DPO's settings, and than the sources by 0.014 [0.003, 0.027] at those of sDPO. Hard pairs are mislabelled more often than easy ones, but mostly right, and two selections by difficulty did worse than as many pairs at random.
#
# **You should know** [partition](../05_partition.ipynb) and the [protocol](protocol.ipynb). **Time** a few seconds; the grid behind it took 1.3 core hours (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from sdpo_nb.cells import unfold_column
from sdpo_nb.compare import difference_intervals, outcome_means, outcome_values, plot_contrasts
from sdpo_nb.logprobs import score_pairs
from sdpo_nb.partition import wilson
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.questions import load_grid
from sdpo_nb.training_data import COMMON_SETTINGS, TRAINING_DATA, pair_measure, true_gap
from sdpo_nb.world import load_base, load_world

# %% [markdown]
# ## What are hard pairs?
#
# Cut the same pairs into three chunks by each measure, easy first. *Length* is the number of letters in both responses (short is easy), *distance* the edit distance between them, our measure of diversity (far apart is easy), the *true gap* that of the two true rewards, which nobody else could know. And the world knows which labels are wrong: Bradley-Terry at $k = 6$ flips some. World 0:

# %%
world = load_world()
base, tok = load_base(world)
rows = TRAINING_DATA["one source"](world, base, tok)["all"]
pairs = tokenize_pairs(load_pairs(rows), tok, "all", COMMON_SETTINGS["max_length"], COMMON_SETTINGS["max_length"] // 2).pairs
gamma = score_pairs(base, pairs).gamma(pairs).numpy()
accuracy = pd.Series(gamma > 0).groupby([r["source"] for r in rows]).mean()
gap = np.array([true_gap(r) for r in rows])
def measure(what): return np.array([pair_measure(r, what) for r in rows])
easy = {"accuracy of sources": np.array([accuracy[r["source"]] for r in rows]), "gamma of pairs": gamma, "length of pairs": -measure("length"),
        "distance of pairs": measure("distance"), "true gap of pairs": measure("true gap")}
cut = {what: np.array_split(np.argsort(-v, kind="stable"), 3) for what, v in easy.items()}
wrong = np.array([r["flipped"] for r in rows])
shares = pd.DataFrame({what: [f"{wrong[c].mean():.2f} [{low:.2f}, {high:.2f}]" for c in chunks for low, high in [wilson(wrong[c].mean(), len(c))]] for what, chunks in cut.items()}, index=["easy", "middle", "hard"]).T
assert wrong[cut["gamma of pairs"][2]].mean() > 2 * wrong[cut["gamma of pairs"][0]].mean()
shares.rename_axis("share of wrong labels, 95 %")

# %% [markdown]
# By every measure that looks at single pairs hard ones are mislabelled more often. By sources they are not: those were made to differ in their prompts. Are hard pairs, then, mislabelled pairs? Of the hardest third:

# %%
hardest = pd.DataFrame({what: {"wrong": wrong[c[2]].mean(), "tied, no label is right": (gap[c[2]] == 0).mean(), "right": (~wrong & (gap != 0))[c[2]].mean(), "S prefers the other": (gamma[c[2]] < 0).mean()} for what, c in cut.items()}).T
assert (hardest["right"] > 2 * hardest["wrong"]).all()
hardest.round(2)

# %% [markdown]
# Most are right. What marks those of small $\gamma$ is, by definition, that S prefers the other response: a third of the data in which every label contradicts S.
#
# ## Does the order matter?
#
# All at DPO's settings ($\beta = 0.6$, learning rate 0.0003), so that nothing differs but what lies in which chunk. The pairs of three sources together are sorted by a measure and cut in three; "accuracy of sources" is the paper's way.

# %%
found = load_grid("how_to_partition")
def minus(a, b, what="sampled"): return outcome_values(found[a], what) - outcome_values(found[b], what)
MEASURES = ("accuracy of sources", "gamma of pairs", "length of pairs", "distance of pairs", "true gap of pairs")
order = difference_intervals({f"{m}: {way} minus random": minus(m + there, "random") for m in MEASURES for way, there in (("easy first", ""), ("hard first", ", hard first"))})
here = order.set_index("question")
assert here.loc["accuracy of sources: easy first minus random", ["low", "high"]].abs().max() <= 0.02 and here.loc["gamma of pairs: easy first minus random", "high"] < -0.05 and (here["low"] < 0).all()
plot_contrasts(order);


# %% [markdown]
# No sorted split is better than a random one, four of the ten are worse by a little, and one by a tenth: by $\gamma$, easy first. Where is it lost?

# %%
def on_the_way(rows): # mean by stage
    return unfold_column(rows, "stages").groupby("stage")[["sampled", "kl"]].mean()
ways = {"random": "random", "by gamma, easy first": "gamma of pairs", "by gamma, hard first": "gamma of pairs, hard first", "by gamma, easy first, sDPO's settings": "gamma of pairs, tuned", "by gamma, hard first, sDPO's settings": "gamma of pairs, hard first, tuned"}
fig, axes = plt.subplots(1, 2, figsize=(9, 3), constrained_layout=True)
for name, row in ways.items():
    for ax, (what, label) in zip(axes, {"sampled": "true reward, sampled", "kl": "KL from S (nats)"}.items()):
        ax.plot(["M_1", "M_2", "M_3"], on_the_way(found[row])[what], "o-", ls="--" if "sDPO" in name else "-", label=name); ax.set(ylabel=label)
axes[1].legend(frameon=False, fontsize="small", bbox_to_anchor=(1, 1)); sns.despine(fig)
assert on_the_way(found["gamma of pairs"])["sampled"].diff().loc[3] < -0.08 < 0 < on_the_way(found["gamma of pairs, tuned"])["sampled"].diff().loc[3]

# %% [markdown]
# In the last stage, which sees nothing but pairs that contradict S. Its model runs off, three nats in one stage, and there is no later stage to bring it back; *hard first* goes through the same stage and recovers. At the best settings of stepwise DPO, with twice the $\beta$ and a third of the learning rate, nothing runs off, and little is left of the harm:

# %%
main = load_grid("primary")
tuned = difference_intervals({f"by gamma, {way}, minus by sources, {what}": outcome_values(found[f"gamma of pairs{there}, tuned"], what) - outcome_values(main["sDPO"], what) for way, there in (("easy first", ""), ("hard first", ", hard first")) for what in ("sampled", "greedy")})
plot_contrasts(tuned, "difference of mean true reward, sDPO's settings");

# %%
outcome_means(found)

# %% [markdown]
# ## Leaving pairs out
#
# Two published rules point in opposite directions: keep the pairs with the smallest implicit gap ([2508.04149](https://arxiv.org/abs/2508.04149)), or drop the hardest ([2502.09650](https://arxiv.org/abs/2502.09650)). What follows is after their idea, not their recipes. The gap of a pair is $\gamma_M - \gamma_S$, with its sign, and M is trained one epoch on all
# pairs; *smallest* and *largest* keep two thirds. With M's own epoch, three passes over the kept pairs cost what three passes over all cost. The fair control are two thirds at random.

# %%
parts = {"DPO on the smallest gaps": "smallest gaps", "DPO on the largest gaps": "largest gaps", "DPO": "all pairs"}
kept = difference_intervals({f"{name} minus a random part, {what}": minus(row, "DPO on a random part", what) for row, name in parts.items() for what in ("sampled", "greedy")})
assert kept["high"].iloc[:4].max() < 0 < kept["low"].iloc[4:].min()
plot_contrasts(kept);

# %% [markdown]
# Both selections are *worse* than as many pairs at random, by 0.02, and those are worse than all pairs, by as much. They fail differently: the smallest gaps stay nearer to S (1.2 nats), the largest run farther (3.3 nats, all pairs 1.7), so that another $\beta$ might suit each of them better; here all have DPO's.
#
# ## What you now have
#
# - Shares of wrong labels by measure, since this world knows them.
# - Ten sorted splits and a random one; what harms is the *last* chunk, where it is one-sided and $\beta$ is small.
#
# ## Questions to test yourself
#
# 1. Sources sorted by accuracy hardly differ in their wrong labels. Why do pairs sorted by $\gamma$?
# 2. Why does *hard first* by $\gamma$ not suffer, although it sees the same pairs?
# 3. A selection is compared with all pairs and loses. What two reasons can that have?
#
# ## Try this
#
# - Sort by $|\gamma|$ instead of $\gamma$. What is in the last chunk now?
