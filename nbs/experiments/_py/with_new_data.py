# %% [markdown]
# # New data between the stages
# > Pairs that the current model writes, against as many prompts answered by S; labels from the truth, from a judge who errs, and from the model itself.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/with_new_data.ipynb)
#
# ANSWER
#
# **You should know** [stepwise DPO](../09_stepwise.ipynb), `chunks` as a function, and the [protocol](protocol.ipynb). **Time** a few seconds; the grid behind it took hours (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import numpy as np
import pandas as pd
from sdpo_nb.experiments import differences, load_grid, means, outcome, plot_contrasts

# %% [markdown]
# ## Who writes, who labels?
#
# The paper names iterative generation of data as a partner of its stages and does not try it. Here are three stages on a third of the prompts each, at the best settings of stepwise DPO. Every prompt is answered twice, by S in all stages ("static") or, from stage 2 on, by the model $M_{t-1}$ that the stage starts from. Four labels:
#
# - *true*: Bradley-Terry on the true reward, as everywhere;
# - *judge*: the better response, but the other one in none or a fifth of the cases;
# - *implicit*: from stage 2 on the response that $M_{t-1}$ has raised more against S, by $\log M_{t-1} - \log S$. It asks nobody.

# %%
found = load_grid("with_new_data")
LABELS = ("true", "judge, 0 % wrong", "judge, 20 % wrong", "implicit")
def minus(a, b, what="sampled"): return outcome(found[a], what) - outcome(found[b], what)
fresh = differences({f"{label}: written by M minus by S, {what}": minus(f"policy, {label}", f"S, {label}", what) for label in LABELS for what in ("sampled", "greedy")})
plot_contrasts(fresh);

# %% [markdown]
# (text)

# %%
labels = differences({f"{label} minus true labels, written by {who}": minus(f"{writer}, {label}", f"{writer}, true") for label in LABELS[1:] for writer, who in (("S", "S"), ("policy", "M"))})
plot_contrasts(labels);

# %% [markdown]
# (text)
#
# ## What is paid for
#
# Labels are what data cost. A model that has become sure gives the same answer twice, which makes no pair, so it writes fewer pairs from as many prompts. With the implicit reward only those of stage 1 are labelled at all.

# %%
def counted(name):
    pairs = np.stack(found[name]["chunk_pairs"])
    return {"pairs by stage": " ".join(f"{p:.0f}" for p in pairs.mean(0)), "label calls": round((pairs[:, 0] if name.endswith("implicit") else pairs.sum(1)).mean())}
means(found).join(pd.DataFrame({name: counted(name) for name in found}).T).rename_axis("written by, labels")

# %% [markdown]
# ## What you now have
#
# - (text)
#
# ## Questions to test yourself
#
# 1. Why does a sharper model write fewer pairs from the same prompts?
# 2. The implicit reward agrees with $M_{t-1}$ by definition. What can a stage on such labels still change?
# 3. A judge without errors gives harder labels than Bradley-Terry. Which should DPO like better?
#
# ## Try this
#
# - Let M write at temperature 2, so that its answers differ. Does it make up for the lost pairs?
