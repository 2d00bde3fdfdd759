# %% [markdown]
# # Which architecture?
# > Stepwise against plain DPO in five bodies of equal size and equally good at the start.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/which_architecture.ipynb)
#
# ANSWER
#
# **You should know** [stepwise DPO](../09_stepwise.ipynb) and the [protocol](protocol.ipynb). **Time** a few seconds; the grids behind it took hours (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import json
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.experiments import BODIES, choices_of, differences, load_grid, make_body, means, outcome, plot_contrasts, rows_of, search_bodies
from sdpo_nb.world import make_model, make_tokenizer

# %% [markdown]
# ## Five bodies
#
# The paper aligns one kind of model, and asks whether others behave alike. GPT-2 and OPT learn their positions, BLOOM has none but a slope in its attention (ALiBi), Llama and Qwen rotate; they differ in norms, activations and biases. Here each has three layers of width 96.
#
# A worse S leaves more to be gained. So in each of five worlds every body is fine-tuned to the validation reward of the world's Llama, within 0.01, on the same demonstrations. Then it writes its own pairs, on the same prompts, and its sources are ordered by its own
# reward accuracy.

# %%
found, tok = load_grid("which_architecture"), make_tokenizer()
KINDS = ("llama", *BODIES)
start = {body: outcome(found[f"{body}, S, validation"], "sampled").mean((1, 2)) for body in KINDS}      # by world
off = {body: abs(v - start["llama"]).max() for body, v in start.items()}
assert max(off.values()) <= 0.02
pd.DataFrame({body: {"parameters": (make_model(tok) if body == "llama" else make_body(body, tok)).num_parameters(), "validation reward of S": v.mean(), "farthest from Llama, of 5 worlds": off[body], "pairs": np.mean([sum(p) for p in found[f"{body}, sDPO"]["chunk_pairs"]])} for body, v in start.items()}).T.round(3)

# %% [markdown]
# ## Settings of its own for each
#
# The search over $\beta$ and learning rate was made for every body, in one world that is not reported. Framed is what was chosen.

# %%
rows = {body: rows_of([c for c in search_bodies() if c.body == body]) for body in BODIES}
fig, axes = plt.subplots(2, len(BODIES), figsize=(12, 4.2), sharex=True, sharey=True, constrained_layout=True)
for column, (body, seen) in zip(axes.T, rows.items()):
    tried = pd.DataFrame([dict(method=r.method, reward=np.mean(r.sampled), **json.loads(r.settings)) for r in seen.itertuples()])
    for ax, (method, at) in zip(column, choices_of(body).items()):
        grid = tried[tried["method"] == method].pivot_table("reward", "lr", "beta")
        sns.heatmap(grid, annot=True, fmt=".2f", annot_kws=dict(size=8), cmap="viridis", vmin=0.5, vmax=0.9, cbar=False, ax=ax); ax.set_title(f"{body}, {method}", fontsize="medium")
        ax.add_patch(plt.Rectangle((list(grid.columns).index(at["beta"]), list(grid.index).index(at["lr"])), 1, 1, fill=False, color="red", lw=2))
for ax in axes.flat: ax.tick_params(axis="y", rotation=0); ax.label_outer()

# %% [markdown]
# ## Stepwise minus plain, within each body

# %%
gain = differences({f"{body}, {what}": outcome(found[f"{body}, sDPO"], what) - outcome(found[f"{body}, DPO"], what) for body in KINDS for what in ("sampled", "greedy")})
plot_contrasts(gain, "sDPO minus DPO, true reward");

# %% [markdown]
# (text)

# %%
means({name: r for name, r in found.items() if not name.endswith("validation")})

# %% [markdown]
# This ranks no body: three layers of width 96 say nothing about which of them is the better model.
#
# ## What you now have
#
# - (text)
#
# ## Questions to test yourself
#
# 1. Why was S of each body tuned to the same reward, and not trained for equally many steps?
# 2. Why does each body train on pairs of its own?
#
# ## Try this
#
# - Give all bodies the Llama's pairs. What does "reward accuracy of S" order then?
