# %% [markdown]
# # The paper in miniature
# > Its two tables and two figures, redone where the true reward is known, with ten worlds where the paper has one run.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/paper_in_miniature.ipynb)
#
# **Of the paper's four pictures two come out here and two do not.** In ten worlds with two seeds each, $\gamma$ of the reference rises from stage to stage, also on chunks still to come (figure 2), and stages that start at S begin with three times the loss and end worse, by 0.045 [0.027, 0.064] of true reward
# (figure 3). But at one $\beta$, as in the paper, sDPO is *worse* than DPO, by 0.052 [0.037, 0.068]; tuned, it is equal, +0.004 [-0.008, +0.014] (table 3). And an aligned reference was no better than S (table 1).
#
# **You should know** [stepwise DPO](../09_stepwise.ipynb) and the [protocol](protocol.ipynb). **Time** about half a minute; the grid behind its tables took 0.2 core hours (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import math, tempfile
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch.nn.functional as F
from sdpo_nb.cells import unfold_column
from sdpo_nb.compare import difference_intervals, outcome_means, outcome_values, plot_contrasts
from sdpo_nb.evaluate import interval
from sdpo_nb.logprobs import read_table
from sdpo_nb.questions import chosen_settings, load_grid
from sdpo_nb.stepwise import StepwiseConfig, load_sources, sdpo
from sdpo_nb.training_data import COMMON_SETTINGS
from sdpo_nb.world import load_world

# %% [markdown]
# ## Table 1: does a better reference make a better model?
#
# The paper trains two models on one set of pairs against three references. A model that had been aligned by DPO was the best reference for both (a mean score of 70.13 where the SFT base gave 68.87, and 69.72 where it gave 68.41); a larger, aligned model was better for one of them and worse for the other.
#
# Here S is trained on the hardest source, `riddle`, against S, against $M_1$ (S after `primer`) and against $M_2$ (S after `digest`, with $M_1$ as reference). Pairs, steps, settings (DPO's) and the start, S, are the same; only the reference differs. The last row repeats $M_2$ at the
# settings that the search found best for stages that start from S: the same learning rate, and eight times the $\beta$ in all stages.

# %%
table_1, main = load_grid("paper_in_miniature"), load_grid("primary")
references = {name.removeprefix("riddle against "): rows for name, rows in table_1.items() if name.startswith("riddle")} | {"M_2, beta = 4.8": main["sDPO, target S"]}
assert (chosen_settings()["sDPO, target S"], chosen_settings()["DPO"]) == (dict(beta=4.8, lr=3e-4), dict(beta=0.6, lr=3e-4))
def own_reward(rows): # of the reference: of S, or of the model of the stage before the last
    if len(rows["steps"].iloc[0]) == 1: return outcome_values(main["S"], "sampled").mean()
    return unfold_column(rows, "stages").query("stage == stage.max() - 1")["sampled"].mean()
outcome_means(references).assign(**{"of the reference itself": [round(own_reward(rows), 3) for rows in references.values()]}).rename_axis("riddle against")

# %%
better = difference_intervals({f"against {name} minus against S, {what}": outcome_values(rows, what) - outcome_values(references["S"], what) for name, rows in references.items() if name != "S" for what in ("sampled", "greedy")})
assert better["high"].iloc[[1, 2, 3]].max() < 0 < better["high"].iloc[4]
plot_contrasts(better);

# %% [markdown]
# $M_1$ and $M_2$ are far better models than S, and no better references at this $\beta$: of two outcomes $M_1$ is worse in one, and $M_2$ in both. The models trained against them have moved two and three times as far, which is what a smaller $\beta$ would do, and this $\beta$ was chosen for S as reference.
# With a larger one most of the difference is gone, and none in favour of $M_2$ appears. (The paper's references had been trained on *other* data than its targets, which this does not imitate.)
#
# ## Table 3: all at once, in stages, in stages without order
#
# In the paper DPO reaches 72.67, sDPO 74.31, and sDPO on a random split 72.56, all with one $\beta$. The first row below does the same, at the best settings of DPO; in the others each method is tuned.

# %%
outcome_means({"sDPO at DPO's settings": main["sDPO at DPO's beta"]} | {name: main[name] for name in ("DPO", "DPO at sDPO's rate", "sDPO", "sDPO, random", "SFT on chosen", "S, best temperature", "S")})

# %%
gain = difference_intervals({f"{name} minus DPO, {what}": outcome_values(main[row], what) - outcome_values(main["DPO"], what) for name, row in (("sDPO at DPO's settings", "sDPO at DPO's beta"), ("sDPO", "sDPO"), ("sDPO, random", "sDPO, random")) for what in ("sampled", "greedy")})
assert gain["high"].iloc[:2].max() < -0.02 and gain["low"].iloc[2:].min() > -0.02
plot_contrasts(gain);

# %% [markdown]
# At one $\beta$, the best for DPO, sDPO is *worse* by 0.05. Tuned, the three are equal in sampled reward. Greedy answers of both kinds of stages are a little better than DPO's, and nearer to S; but so are those of DPO at their learning rate, the second row, which the search had left as a tie ([protocol](protocol.ipynb)).
# ("sDPO minus DPO" is a primary question there, sampled and greedy; the others are exploratory.)
#
# ## Figure 2: does the bar rise?
#
# The paper prints the mean of $\gamma$ of three references on its second data set: -38.60 under S, -25.10 under $M_1$, and 84.35 under $M_2$, which was trained on it. Here is every model of tuned sDPO on every chunk (64 of its pairs), with intervals over worlds.

# %%
gammas = unfold_column(main["sDPO"], "gammas")
met = gammas.pivot_table("gamma", ["model", "chunk"], ["world", "seed"])
fig, ax = plt.subplots(figsize=(6, 3.2))
for chunk in dict.fromkeys(gammas["chunk"]):
    mean, low, high = np.array([interval(met.loc[(m, chunk)].unstack().to_numpy()[..., None]) for m in ("M_0", "M_1", "M_2", "M_3")]).T
    ax.errorbar(["S", "M_1", "M_2", "M_3"], mean, yerr=[mean - low, high - mean], fmt="o-", capsize=3, label=chunk)
ax.set(ylabel="mean gamma (nats)"); ax.legend(frameon=False, title="chunk"); sns.despine()
assert all((met.loc[(b, c)] > met.loc[(a, c)]).mean() > 0.8 for a, b, chunks in (("M_0", "M_1", ("digest", "riddle")), ("M_1", "M_2", ("riddle",))) for c in chunks)

# %% [markdown]
# As in the paper: a model raises $\gamma$ most on the chunk that it was trained on, and somewhat on those still to come. When stage 3 begins, its reference is at 2.2 nats on `riddle`, where S is at 0.4. The bar rises. That a higher bar makes a better model does not follow (table 1), and
# $\gamma$ might rise as well if S only became surer of what it says.
#
# ## Figure 3: where the target starts
#
# If stage 2 starts its target at S instead of $M_1$, its first loss is no longer $\ln 2$: it is
#
# $$L = E\,\log\!\left(1 + e^{\beta(\gamma_{M_1} - \gamma_S)}\right) \;\ge\; \log\!\left(1 + e^{\beta\,E(\gamma_{M_1} - \gamma_S)}\right), \tag{1}$$
#
# by the convexity of softplus. Both sides can be read off the tables before a step is made. In the paper's numbers, the mean gap of 13.5 nats at $\beta = 0.1$ gives at least 1.58.

# %%
world, settings = load_world(), COMMON_SETTINGS | chosen_settings()["DPO"]
config = StepwiseConfig(**settings, init_target="S", shuffle=False)     # unshuffled: the first batch is the chunk's first 32 pairs
run = sdpo(world.base, world.sources, config, tempfile.mkdtemp())
chunk = next(s.pairs for s in load_sources(world.sources, run.tokenizer, config) if s.name == run.stages[1]["chunk"])
S, M_1 = (read_table(run.folder / place / "logprobs").gamma(chunk) for place in ("base", "stage-1"))
gap = config.beta * (M_1 - S)
first = run.metrics.query("stage == 2")["loss"].iloc[0]
assert abs(F.softplus(gap[:config.batch_size]).mean().item() - first) < 1e-4
assert F.softplus(gap).mean() > F.softplus(gap.mean()) > math.log(2)
pd.Series({"mean gap, nats": (gap.mean() / config.beta).item(), "left side of (1), the whole chunk": F.softplus(gap).mean().item(), "right side": F.softplus(gap.mean()).item(), "the first batch, from the tables": F.softplus(gap[:config.batch_size]).mean().item(), "the run's first loss": first}).round(4).to_frame("stage 2, target S")


# %% [markdown]
# Here are the losses of stage 2 in all runs, at DPO's settings: mean and range over worlds and seeds, as far as the shortest stage goes.

# %%
def stage_2(rows): return np.array([row.losses[row.steps[0]:row.steps[0] + row.steps[1]] for row in rows.itertuples()], dtype=object)
fig, ax = plt.subplots(figsize=(6, 3.2))
for rows, label in ((main["sDPO at DPO's beta"], "target $M_1$"), (table_1["target S"], "target S")):
    losses = stage_2(rows); n = min(map(len, losses)); losses = np.array([l[:n] for l in losses], dtype=float)
    (drawn,) = ax.plot(range(1, n + 1), losses.mean(0), label=label); ax.fill_between(range(1, n + 1), losses.min(0), losses.max(0), color=drawn.get_color(), alpha=0.15, lw=0)
assert stage_2(table_1["target S"])[0][0] > 1.4 and all(abs(row.losses[row.steps[0]] - math.log(2)) < 1e-3 for row in main["sDPO at DPO's beta"].itertuples())
ax.axhline(math.log(2), color="black", lw=1, ls=":"); ax.set(xlabel="optimizer step of stage 2", ylabel="loss"); ax.legend(frameon=False); sns.despine()

# %% [markdown]
# A target that is its own reference starts at $\ln 2$, exactly. One that starts at S begins at three times that, in the mean, needs the first of its three passes over the chunk to come back to $\ln 2$, and ends above the other. The models at the end of all stages:

# %%
back = [next(i for i, loss in enumerate(l, 1) if loss < math.log(2)) for l in stage_2(table_1["target S"])]
assert 5 < min(back) and max(back) < 25
both = {"DPO's settings": (table_1["target S"], main["sDPO at DPO's beta"]), "each tuned": (main["sDPO, target S"], main["sDPO"])}
end = difference_intervals({f"target S minus M_(t-1), {how}, {what}": outcome_values(a, what) - outcome_values(b, what) for how, (a, b) in both.items() for what in ("sampled", "greedy")})
assert end["high"].iloc[[0, 2]].max() < 0
plot_contrasts(end);

# %% [markdown]
# Starting from S loses work of the stages before, whatever the $\beta$. (Another group found the opposite for a target restarted once against an aligned reference, on one data set in two halves: [Pre-DPO](https://arxiv.org/abs/2504.15843).)
#
# ## What you now have
#
# - The paper's comparisons with intervals, with tuned opponents and the baselines that they lack.
# - Equation (1): the first loss of a stage, known before it starts.
#
# ## Questions to test yourself
#
# 1. "Target S" on all three sources ends in the same model as "riddle against M_2". Why?
# 2. Why may $M_2$ be a worse reference at the same $\beta$, although it is the better model?
#
# ## Try this
#
# - Divide the logits of S by 0.5 and compute its $\gamma$ on the three chunks. How much of figure 2 is sharpening?
# - Double $\beta$ in the live run. How does the first loss of stage 2 change, and can you predict it from the table?
