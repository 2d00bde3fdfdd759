# %% [markdown]
# # How many stages?
# > T from 1 to 8, with the same pairs and steps, and what each more costs.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/how_many_stages.ipynb)
#
# ANSWER
#
# **You should know** [stepwise DPO](../09_stepwise.ipynb) and the [protocol](protocol.ipynb). **Time** a few seconds; the grid behind it took hours (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.experiments import choices, differences, load_grid, outcome, plot_contrasts

# %% [markdown]
# ## The same pairs, cut finer
#
# The paper has two stages, one per data set, and leaves open what more would do. Here the pairs of the three sources, easy first, are cut into $T$ parts; each pair is still seen three times, in as many steps. $\beta$ and learning rate are those that the search
# chose for three stages.
#
# But if stages add up ([smaller_beta](smaller_beta.ipynb)), more of them at one $\beta$ pull farther from S, and $T$ would only be another name for $\beta$. So there is a second line, on which $\beta$ grows with $T$ and $\beta/T$ stays what it is for three.

# %%
found, beta = load_grid("how_many_stages"), choices()["sDPO"]["beta"]
LINES = {rf"$\beta$ = {beta:g}": {T: f"T = {T}" for T in range(1, 9)}, rf"$\beta$ = {beta / 3:g} T": {T: "T = 3" if T == 3 else f"T = {T}, beta T/3" for T in (1, 2, 3, 5, 8)}}
fig, axes = plt.subplots(1, 3, figsize=(11, 3.2), constrained_layout=True)
for ax, (what, label) in zip(axes, {"sampled": "true reward, sampled", "greedy": "true reward, greedy", "kl": "KL from S (nats)"}.items()):
    for name, line in LINES.items():
        mean, low, high = np.array([interval(outcome(found[row], what)) for row in line.values()]).T
        ax.errorbar(list(line), mean, yerr=[mean - low, high - mean], fmt="o-", capsize=3, label=name)
    ax.set(xlabel="stages T", ylabel=label, xticks=range(1, 9))
axes[0].legend(frameon=False); sns.despine(fig)

# %% [markdown]
# (text)

# %%
against = {f"T = {T} minus T = 3, {name}": outcome(found[row], "sampled") - outcome(found["T = 3"], "sampled") for name, line in LINES.items() for T, row in line.items() if T != 3}
plot_contrasts(differences(against));

# %% [markdown]
# ## What more stages cost
#
# A moving reference is a pass over each later chunk, $(T-1)/T$ of the data, and there are three passes of training. So the price is nearly reached with two stages. What grows with $T$ is the number of models that are saved and measured.
# (Seconds are of a whole cell, which measures every $M_t$ on 600 prompts.) Warm-ups add up, too: eight restarted schedules have 12 % more learning rate than one, as the [protocol](protocol.ipynb) shows, so $T = 8$ was trained a little *more*.

# %%
rows = {T: found[f"T = {T}"] for T in range(1, 9)}
cost = pd.DataFrame({T: {"optimizer steps": np.mean([sum(s) for s in r["steps"]]), "tokens trained on": r["tokens"].mean(), "tokens of other passes": r["pass_tokens"].mean(), "seconds of a cell": r["seconds"].median()} for T, r in rows.items()}).rename_axis(columns="stages")
cost.round(0).astype(int)

# %% [markdown]
# ## What you now have
#
# - (text)
#
# ## Questions to test yourself
#
# 1. Why is the pass over the references not $T$ times as expensive as one?
# 2. With one chunk, what is left of stepwise DPO?
# 3. Which of the two lines would a reader compare who has tuned $\beta$ for every $T$?
#
# ## Try this
#
# - Take `restart="never"`. Which part of the figure stays?
