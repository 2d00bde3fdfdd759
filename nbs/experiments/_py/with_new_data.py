# %% [markdown]
# # New data between the stages
# > Pairs that the current model writes, against as many that S wrote; labels from the truth, from a judge who errs, and from the model itself.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/with_new_data.ipynb)
#
# ANSWER
#
# **You should know** [stepwise DPO](../09_stepwise.ipynb), `chunks` as a function, and the [protocol](protocol.ipynb). **Time** a few seconds; the grid behind it took HOURS (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import numpy as np
import pandas as pd
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.experiments import load_grid, outcome, plot_contrasts

# %% [markdown]
# ## Who writes, who labels?
#
# The paper names iterative data generation as a partner of its stages and does not try it. Three stages, each on prompts of its own. Either S writes all pairs, as before ("static"), or $M_{t-1}$ writes those of stage $t$. Labels come from the true reward by Bradley-Terry, from a
# judge who prefers the better response and errs in none or a fifth of the cases, or, from stage 2 on, from the implicit reward $\log M_{t-1} - \log S$, which asks nobody.

# %%
found = load_grid("with_new_data")
LABELS = ("true", "judge, 0 % wrong", "judge, 20 % wrong", "implicit")
def minus(a, b, what="sampled"): return interval(outcome(found[a], what) - outcome(found[b], what))
fresh = pd.DataFrame([(f"{label}: written by M minus by S, {what}", *minus(f"policy, {label}", f"S, {label}", what)) for label in LABELS for what in ("sampled", "greedy")], columns=["question", "mean", "low", "high"])
plot_contrasts(fresh);

# %% [markdown]
# Labels are what data cost. A model that became sure gives the same answer twice, which makes no pair, so the pairs that it writes are fewer; with the implicit reward only those of stage 1 are labelled at all.

# %%
def line(name):
    rows, pairs = found[name], np.stack(found[name]["chunk_pairs"])
    calls = pairs[:, 0] if name.endswith("implicit") else pairs.sum(1)
    return {"true reward, sampled": as_text(interval(outcome(rows, "sampled"))), "greedy": as_text(interval(outcome(rows, "greedy"))), "KL from S (nats)": as_text(interval(outcome(rows, "kl"))), "pairs by stage": " ".join(f"{p:.0f}" for p in pairs.mean(0)), "label calls": round(calls.mean())}
pd.DataFrame({name: line(name) for name in found}).T
