# %% [markdown]
# # How many stages?
# > T from 1 to 8, with the same pairs and steps, and what each more costs.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/how_many_stages.ipynb)
#
# **At one $\beta$ two to four; with a $\beta$ that grows with $T$ it does not matter, up to five.** In ten worlds with two seeds each, at $\beta$ = 1.2 true reward rises from 0.830 with one stage to 0.871 with three and falls to 0.820 with eight; between two and four it differs by less than 0.02. Where $\beta/T$ is kept at 0.4, one stage (which is DPO), two and five are equal to three within
# $\pm 0.02$, one by +0.003 [-0.001, +0.008]; eight are worse than three by 0.017 [0.008, 0.025].
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
from sdpo_nb.evaluate import interval
from sdpo_nb.experiments import choices, differences, load_grid, outcome, plot_contrasts

# %% [markdown]
# ## The same pairs, cut finer
#
# The paper has two stages, one per data set, and leaves open what more would do. Here the pairs of the three sources, easy first, are cut into $T$ parts of equal size (three parts are the sources); each pair is still seen three times. $\beta$ = 1.2 and the learning rate are those that the search
# chose for three stages.
#
# But if stages add up ([smaller_beta](smaller_beta.ipynb)), more of them at one $\beta$ pull farther from S, and $T$ would only be another name for $\beta$. So there is a second line, on which $\beta$ grows with $T$ and $\beta/T$ stays what it is for three, 0.4. At $T = 1$ that is DPO with $\beta = 0.4$.

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
# Along the first line $T$ has a best value, two or three, and the distance from S grows with every stage. Along the second hardly anything moves up to $T = 5$. So the rise and fall of the first line is that of DPO over $\beta$, walked through in steps of $T$.

# %%
against = {f"T = {T} minus T = 3, {name}": outcome(found[row], "sampled") - outcome(found["T = 3"], "sampled") for name, line in LINES.items() for T, row in line.items() if T != 3}
apart = differences(against).set_index("question"); inside = apart[["low", "high"]].abs().max(axis=1) < 0.02
assert inside[[f"T = {T} minus T = 3, {name}" for name, Ts in zip(LINES, ((2, 4), (1, 2, 5))) for T in Ts]].all() and apart["high"].filter(like="T = 8").max() < 0
plot_contrasts(apart.reset_index());

# %% [markdown]
# *Whoever tunes $\beta$ gains nothing from choosing $T$; whoever keeps a $\beta$ changes it with $T$.* At $\beta = 1.2$ one stage is worse than three by 0.041 [0.030, 0.052]; at $\beta = 0.4$ it is as good, and nearer to S.
#
# Eight stages lose even with $\beta$ kept in step. Part of that could be the schedule: each stage warms up anew and reaches the peak again, and its last batch is small, so that eight are trained more than three. How much more says the [protocol](protocol.ipynb): their learning rates sum up to 80.0 peaks, those of three stages to 75.0 and of one to 71.5. How much of the loss this explains
# was not measured.

# %% [markdown]
# ## What more stages cost
#
# In tokens, a moving reference is one pass without gradients over each chunk but the first, $(T-1)/T$ of the data, beside the partition's pass and three passes of training. So most of the price is paid with two stages. What goes on growing is the number of models that are saved, and measured: a cell of this experiment lets every $M_t$ answer 600 prompts, which
# is most of its time.

# %%
cost = pd.DataFrame({T: {"optimizer steps": np.mean([sum(s) for s in r["steps"]]), "tokens trained on": r["tokens"].mean(), "tokens of other passes": r["pass_tokens"].mean()} for T, r in ((T, found[f"T = {T}"]) for T in range(1, 9))}).rename_axis(columns="stages")
assert cost.loc["tokens trained on"].nunique() == 1
cost.round(0).astype(int)

# %% [markdown]
# ## What you now have
#
# - A best number of stages that is a best $\beta$ in disguise.
# - The price of a stage: half a pass more for the second, next to nothing for those after it.
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
