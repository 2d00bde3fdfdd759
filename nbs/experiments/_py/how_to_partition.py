# %% [markdown]
# # How should the data be cut?
# > By sources or by pairs, by five measures, in both directions; and two ways of leaving pairs out.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/how_to_partition.ipynb)
#
# **By sources, in any order; not by the $\gamma$ of single pairs, easy first.** In ten worlds with two seeds each, at DPO's settings and three chunks, easy minus hard first is +0.004 [-0.011, +0.020] of true reward where sources are ordered by reward accuracy, and -0.116 [-0.145, -0.085] where pairs are ordered by $\gamma$. Hard pairs are
# wrong more often (16 % against 4 % in one world) but mostly right, and no selection did as well as all pairs.
#
# **You should know** [partition](../05_partition.ipynb) and the [protocol](protocol.ipynb). **Time** a few seconds; the grid behind it took hours (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import numpy as np
import pandas as pd
from sdpo_nb.experiments import COMMON, DATA, differences, load_grid, means, outcome, plot_contrasts
from sdpo_nb.logprobs import score_pairs
from sdpo_nb.partition import wilson
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.world import edit_distance, load_base, load_world, true_reward

# %% [markdown]
# ## What are hard pairs?
#
# Cut the same pairs into three chunks by each measure, easy first. *Length* is the number of letters in both responses (short is easy), *distance* the edit distance between them, our measure of diversity (far apart is easy), the *true gap* that of the two true rewards, which nobody else could know. And the world knows which labels are wrong: Bradley-Terry at $k = 6$ flips some. World 0:

# %%
world = load_world()
base, tok = load_base(world)
rows = DATA["one source"](world, base, tok)["all"]
pairs = tokenize_pairs(load_pairs(rows), tok, "all", COMMON["max_length"], COMMON["max_length"] // 2).pairs
gamma = score_pairs(base, pairs).gamma(pairs).numpy()
accuracy = pd.Series(gamma > 0).groupby([r["source"] for r in rows]).mean()
def text(r, side): return r[side][-1]["content"]
gap = np.array([true_reward(text(r, "prompt"), text(r, "chosen")) - true_reward(text(r, "prompt"), text(r, "rejected")) for r in rows])
easy = {"accuracy of sources": np.array([accuracy[r["source"]] for r in rows]), "gamma of pairs": gamma, "length of pairs": -np.array([len(text(r, "chosen")) + len(text(r, "rejected")) for r in rows]),
        "distance of pairs": np.array([edit_distance(text(r, "chosen"), text(r, "rejected")) for r in rows]), "true gap of pairs": abs(gap)}
cut = {what: np.array_split(np.argsort(-v, kind="stable"), 3) for what, v in easy.items()}
wrong = np.array([r["flipped"] for r in rows])
shares = pd.DataFrame({what: [f"{wrong[c].mean():.2f} [{low:.2f}, {high:.2f}]" for c in chunks for low, high in [wilson(wrong[c].mean(), len(c))]] for what, chunks in cut.items()}, index=["easy", "middle", "hard"]).T
assert wrong[cut["gamma of pairs"][2]].mean() > 2 * wrong[cut["gamma of pairs"][0]].mean()
shares.rename_axis("share of wrong labels, 95 %")

# %% [markdown]
# Are hard pairs mislabelled pairs? More often than others, by every measure that looks at single pairs, and least so by sources, which were made to differ in their prompts and not in their labels. But even the hardest third by $\gamma$ is right five times out of six. What marks it is something else: S contradicts its labels.

# %%
pd.DataFrame({what: [f"{(gamma[c] < 0).mean():.2f}" for c in chunks] for what, chunks in cut.items()}, index=["easy", "middle", "hard"]).T.rename_axis("share of pairs that S orders against the label")

# %% [markdown]
# ## Does the order matter?
#
# All at DPO's settings, so that nothing differs but what lies in which chunk. Pairs of three sources at once, sorted by a measure and cut in three; "accuracy of sources" is the paper's way.

# %%
found = load_grid("how_to_partition")
def minus(a, b, what="sampled"): return outcome(found[a], what) - outcome(found[b], what)
MEASURES = ("accuracy of sources", "gamma of pairs", "length of pairs", "distance of pairs", "true gap of pairs")
order = differences({f"{m}: easy minus hard first": minus(m, f"{m}, hard first") for m in MEASURES} | {f"{m}: easy first minus random": minus(m, "random") for m in MEASURES})
here = order.set_index("question")
assert here.loc["accuracy of sources: easy minus hard first", ["low", "high"]].abs().max() <= 0.02 and here.loc[[f"gamma of pairs: easy {x}" for x in ("minus hard first", "first minus random")], "high"].max() < -0.05
plot_contrasts(order);

# %% [markdown]
# For sources the order is one more time without effect. For single pairs there is one large effect, and it speaks against the paper's rule: sorted by $\gamma$, *easy first is the worst of all*, by a tenth of the reward, and hard first is like random. In this order the last stage sees nothing but pairs that contradict S,
# a sixth of them mislabelled, and no others correct it; such a model ends 6.8 nats from S, farther than any. With the other measures a sorted split was never better than a random one, and mostly a little worse. Chunks that resemble each other are the safe choice.

# %%
means(found)

# %% [markdown]
# ## Leaving pairs out
#
# Two published selections contradict each other: keep the pairs with the smallest implicit gap of a trained model ([2508.04149](https://arxiv.org/abs/2508.04149)), or drop those, the hardest ([2502.09650](https://arxiv.org/abs/2502.09650)). The gap is signed here, and the model that measures it is trained one epoch on all pairs; with it, three passes
# over the two thirds that are kept cost what three passes over all cost.

# %%
kept = differences({f"DPO on the {keep} gaps minus on all, {what}": minus(f"DPO on the {keep} gaps", "DPO", what) for keep in ("smallest", "largest") for what in ("sampled", "greedy")})
plot_contrasts(kept);

# %% [markdown]
# Neither is as good as using all pairs: both lose about 0.035 sampled, and they differ from each other only in greedy answers, where the small gaps lose less. With one pair to a prompt each pair is the only word on its prompt, and every third of them is worth having. ($\beta$ and learning rate were searched for all pairs; a selection might
# want others.)
#
# ## What you now have
#
# - Shares of wrong labels by measure and chunk, since this world knows them.
# - Fourteen ways to arrange or select the same pairs, none better than DPO on all of them, one much worse.
#
# ## Questions to test yourself
#
# 1. Sources sorted by accuracy hardly differ in their wrong labels. Why do pairs sorted by $\gamma$?
# 2. Why does *hard first* by $\gamma$ not suffer, although it sees the same pairs?
# 3. What part of "easy" by length is a property of the prompt alone?
#
# ## Try this
#
# - Sort by $|\gamma|$ instead of $\gamma$. What is in the last chunk now?
