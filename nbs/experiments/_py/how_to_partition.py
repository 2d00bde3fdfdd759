# %% [markdown]
# # How should the data be cut?
# > Reward accuracy, gamma, length, distance, the true gap and chance, in both directions; and two ways of leaving pairs out.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/how_to_partition.ipynb)
#
# ANSWER
#
# **You should know** [partition](../05_partition.ipynb) and the [protocol](protocol.ipynb). **Time** a few seconds; the grid behind it took HOURS (`make experiments`).

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
# Cut the same pairs into three chunks by each measure, easy first. The world knows which labels are wrong (Bradley-Terry at $k = 6$ flips some) and how far apart the two rewards are. World 0:

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
shares.rename_axis("share of wrong labels")

# %% [markdown]
# (text: hard pairs are ...)
#
# ## Does the order matter?

# %%
found = load_grid("how_to_partition")
def minus(a, b, what="sampled"): return outcome(found[a], what) - outcome(found[b], what)
MEASURES = ("accuracy of sources", "gamma of pairs", "length of pairs", "distance of pairs", "true gap of pairs")
order = differences({f"{m}: easy minus hard first": minus(m, f"{m}, hard first") for m in MEASURES} | {f"{m}: easy first minus random": minus(m, "random") for m in MEASURES})
plot_contrasts(order);

# %%
means(found)

# %% [markdown]
# ## Leaving pairs out

# %%
kept = differences({f"DPO on the {keep} gaps minus on all, {what}": minus(f"DPO on the {keep} gaps", "DPO", what) for keep in ("smallest", "largest") for what in ("sampled", "greedy")})
plot_contrasts(kept);
