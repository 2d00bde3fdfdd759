# %% [markdown]
# # New data between the stages
# > Pairs that the current model writes, against as many that S writes; labels from the truth, from a judge who errs, and from the model itself.
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
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from sdpo_nb.experiments import differences, load_grid, means, outcome, plot_contrasts, unfolded

# %% [markdown]
# ## Who writes, who labels?
#
# The paper names iterative generation of data as a partner of its stages and does not try it. Here are three stages on a third of the prompts each, at the best settings of stepwise DPO. Every prompt is answered twice, by S in all stages or, from stage 2 on, by the model $M_{t-1}$ that the stage starts from (which is also its reference). Labels come from one of four:
#
# - *true*: Bradley-Terry on the true reward, as everywhere. It errs where two responses are close;
# - *judge, 0 % wrong*: always the better response;
# - *judge, 20 % wrong*: the better response, but in a fifth of the cases the other;
# - *implicit*: true in stage 1, then the response that $M_{t-1}$ has raised more against S, by $\log M_{t-1} - \log S$. It asks nobody.
#
# A model that has become sure often gives the same answer twice, which makes no pair; so $M$ writes fewer pairs than S from the same prompts. Where that could matter, there is a third writer: S with as many pairs, at random, as the model would have written.

# %%
found = load_grid("with_new_data")
LABELS = ("true", "judge, 0 % wrong", "judge, 20 % wrong", "implicit")
def minus(a, b, what="sampled"): return outcome(found[a], what) - outcome(found[b], what)
fresh = differences({f"{label}, {what}": minus(f"policy, {label}", f"S, {label}", what) for label in LABELS for what in ("sampled", "greedy")}
                    | {f"{label}, sampled, as many pairs": minus(f"policy, {label}", f"S, as many, {label}") for label in LABELS[:2]})
plot_contrasts(fresh, "written by M minus written by S, true reward");

# %% [markdown]
# (text)

# %%
far = differences({f"{label}{there}": minus(f"policy, {label}", f"S{there}, {label}", "kl") for label in LABELS for there in ("", ", as many") if f"S{there}, {label}" in found})
plot_contrasts(far, "written by M minus written by S, KL from S (nats)");

# %% [markdown]
# (text)

# %%
paths = pd.concat([unfolded(found[f"{writer}, {label}"], "stages").groupby("stage")[["sampled", "kl"]].mean().assign(writer=who, labels=label) for writer, who in (("S", "S"), ("policy", "the model before")) for label in LABELS]).reset_index()
fig, ax = plt.subplots(figsize=(7, 3.6))
sns.lineplot(paths, x="kl", y="sampled", hue="labels", style="writer", markers=True, dashes={"S": (2, 2), "the model before": ""}, ax=ax)
ax.set(xlabel="KL from S (nats)", ylabel="true reward, sampled"); ax.legend(frameon=False, fontsize="small", bbox_to_anchor=(1, 1)); sns.despine(fig)

# %% [markdown]
# (text)

# %%
labels = differences({f"{label}, written by {who}": minus(f"{writer}, {label}", f"{writer}, true") for label in LABELS[1:] for writer, who in (("S", "S"), ("policy", "M"))})
plot_contrasts(labels, "minus true labels, true reward");

# %% [markdown]
# (text)
#
# ## What is paid for
#
# Labels are what data cost. With the implicit reward only those of stage 1 are labelled by somebody.

# %%
def counted(name):
    pairs = np.stack(found[name]["chunk_pairs"])
    return {"pairs by stage": " ".join(f"{p:.0f}" for p in pairs.mean(0)), "label calls": round((pairs[:, 0] if name.endswith("implicit") else pairs.sum(1)).mean())}
means(found).join(pd.DataFrame({name: counted(name) for name in found}).T).rename_axis("written by, labels")

# %% [markdown]
# (text)
#
# ## What you now have
#
# - (text)
#
# ## Questions to test yourself
#
# 1. Why does a sharper model write fewer pairs from the same prompts?
# 2. The implicit reward agrees with $M_{t-1}$ by definition. What can a stage on such labels still change?
# 3. A judge without errors gives harder labels than Bradley-Terry. Which does the closed form of DPO assume?
#
# ## Try this
#
# - Let M write at temperature 2, so that its answers differ. Does it make up for the lost pairs?
# - Let the judge err in 40 %. Do new answers still cost less KL?
