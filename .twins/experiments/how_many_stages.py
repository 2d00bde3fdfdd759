# %% [markdown]
# # How many stages?
# > T from 1 to 8 on the same pairs: what each reaches, and how far from S it goes for it.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/how_many_stages.ipynb)
#
# **At one $\beta$ two or three; at one distance from S it hardly matters.** In ten worlds with two seeds each, at $\beta = 1.2$ true reward rises from 0.830 with one stage (DPO) to 0.871 with three and falls to 0.820 with eight, but the KL from S grows all along, from 0.5 to 3.2 nats. At the same KL, two to seven stages are equal to three within $\pm 0.02$, and so is one at $\beta = 0.4$;
# one at $\beta = 1.2$ is *better* than three at that distance, by 0.016 [0.011, 0.021].
#
# **You should know** [stepwise DPO](../11_stepwise.ipynb) and the [protocol](protocol.ipynb). **Time** a few seconds; the grid behind it took 1.3 core hours (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from sdpo_nb.cells import learning_rate_sum
from sdpo_nb.compare import OUTCOMES, difference_intervals, outcome_values, plot_contrasts, reward_at_kl
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.questions import BETA_LADDER, chosen_settings, load_grid

# %% [markdown]
# ## The same pairs, cut finer
#
# The paper has two stages, one per data set, and leaves open what more would do. Here the pairs of the three sources, easy source first, are cut into $T$ parts of equal size; three parts are the sources themselves, which differ by up to forty pairs. Each pair is seen three times in any case. $\beta$ = 1.2 and the learning rate are those that the search chose for three stages.
#
# But every stage starts a new tilt, from its own reference, and may go as far as $\beta$ lets it ([smaller_beta](smaller_beta.ipynb)). So $T$ could be another name for $\beta$. A second line therefore lets $\beta$ grow with $T$: $\beta/T$ stays what it is for three stages, 0.4, from DPO with $\beta = 0.4$ to eight stages with $\beta = 3.2$. And on the right the same runs stand over their distance from S, with three stages
# at other $\beta$ as a line.

# %%
found, main, beta = load_grid("how_many_stages"), load_grid("primary"), chosen_settings()["sDPO"]["beta"]
LINES = {rf"$\beta$ = {beta:g}": {T: f"T = {T}" for T in range(1, 9)}, rf"$\beta$ = {beta / 3:g} T": {T: "T = 3" if T == 3 else f"T = {T}, beta T/3" for T in (1, 2, 3, 5, 8)}}
ladder = [found["T = 3, 0.125 beta"], *(main[f"sDPO, {f:g} beta"] for f in BETA_LADDER), found["T = 3, 8 beta"]]
def mean(rows, what): return outcome_values(rows, what).mean()

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, constrained_layout=True)
right.plot([mean(r, "kl") for r in ladder], [mean(r, "sampled") for r in ladder], color="0.7", lw=2, label=r"three stages, other $\beta$")
for name, line in LINES.items():
    at, low, high = np.array([interval(outcome_values(found[row], "sampled")) for row in line.values()]).T
    left.errorbar(list(line), at, yerr=[at - low, high - at], fmt="o-", capsize=3, label=name)
    right.plot([mean(found[row], "kl") for row in line.values()], at, "o", label=name)
    for (T, row), y in zip(line.items(), at): right.annotate(T, (mean(found[row], "kl"), y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize="small")
left.set(xlabel="stages T", ylabel="true reward, sampled", xticks=range(1, 9)); right.set(xlabel="KL from S (nats); the number is T")
left.legend(frameon=False); right.legend(frameon=False); sns.despine(fig)


# %% [markdown]
# On the left $T$ has a best value at $\beta = 1.2$, two or three. On the right that is gone: all but the leftmost point lie on the line that three stages draw when only $\beta$ changes, or a little above it. Each compared with three stages *at the same KL* (read off that line, world by world and seed by seed):

# %%
def at_their_kl(rows): return outcome_values(rows, "sampled").mean(2, keepdims=True) - reward_at_kl(ladder, outcome_values(rows, "kl"))
rows = {f"T = {T}, {name}": found[row] for name, line in LINES.items() for T, row in line.items() if T != 3 and row != "T = 8"} | {r"T = 1, $\beta$ = 0.6": main["DPO at sDPO's rate"]}
level = difference_intervals({name: at_their_kl(r) for name, r in rows.items()}); more = ~level["question"].str.startswith("T = 1,")
assert level.loc[more, ["low", "high"]].abs().max(axis=None) < 0.02 and level.loc[~more, "low"].min() > 0
plot_contrasts(level, "minus three stages at the same KL, true reward");

# %% [markdown]
# All but one are equal to three stages ($\pm 0.02$, grey). That nearly all lie to the right of 0 means little: the line bends between its points and is drawn straight, so it is up to a few thousandths too low. One stage, which is DPO, at $\beta = 1.2$ is ahead by more than that. (At $\beta = 0.6$ it is taken from the primary grid. Eight stages at $\beta = 1.2$ are missing, since in one world they go farther than three do at the smallest $\beta$.)
#
# *Whoever compares numbers of stages at one $\beta$ compares distances.* Eight stages at $\beta = 1.2$ reach 0.820; so do three at $\beta = 0.3$.
#
# ## Does beta over T settle it?
#
# Up to five stages nearly: they are within 0.02 of DPO in sampled reward, though five go farther and lose a little. Eight do not stay with it: $\beta$ in step with $T$ does not hold them back, they go 0.8 nats farther and lose 0.020. ([Smaller_beta](smaller_beta.ipynb) finds more of a gap, at three times the learning rate, with chunks in random order and at smaller $\beta$; which of these makes it was not taken apart.)

# %%
second = list(LINES.values())[1]
pd.DataFrame({T: {f"{label}, minus DPO": as_text(interval(outcome_values(found[row], what) - outcome_values(found[second[1]], what))) for what, label in OUTCOMES.items()} for T, row in second.items() if T > 1}).T.rename_axis("stages")

# %% [markdown]
# ## What more stages cost
#
# Tokens that are trained on stay the same. A moving reference is one pass without gradients over each chunk but the first, $(T-1)/T$ of the data: half a pass for two stages, two thirds for three, seven eighths for eight. Beside it stand three passes of training and one of S over everything, which orders the sources and is the first stage's reference. Each stage also decays and warms up anew and ends in a smaller batch, so that eight stages take 10 % more steps than one, with a sum of learning rates that is 19 % larger. How much of their distance is that was not taken apart.

# %%
cost = pd.DataFrame({T: {"optimizer steps": np.mean([sum(s) for s in r["steps"]]), "sum of learning rates (peaks)": np.mean([learning_rate_sum(s) for s in r["steps"]]),
                         "tokens trained on": r["tokens"].mean(), "tokens of other passes": r["pass_tokens"].mean()} for T, r in ((T, found[f"T = {T}"]) for T in range(1, 9))}).rename_axis(columns="stages")
assert cost.loc["tokens trained on"].nunique() == 1
cost.round(0).astype(int)

# %% [markdown]
# ## What you now have
#
# - A best number of stages that is a best distance in disguise.
# - A way to see that: the ladder of one method over $\beta$, and everything else at its KL.
#
# ## Questions to test yourself
#
# 1. Why is the pass over the references not $T$ times as expensive as one?
# 2. With one chunk, what is left of stepwise DPO?
# 3. Somebody reports that five stages beat two at $\beta = 0.1$. Which two numbers would you ask for?
#
# ## Try this
#
# - Draw the right panel with greedy answers (`"greedy"` for `"sampled"`). Do the runs still lie on one line?
# - Which of the eight stages goes farthest? `unfolded(found["T = 8"], "stages")` has the KL after each.
