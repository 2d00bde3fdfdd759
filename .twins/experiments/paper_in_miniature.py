# %% [markdown]
# # The paper in miniature
# > Two of its tables and two of its figures, redone where the true reward is known, with ten worlds where the paper has one run.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/paper_in_miniature.ipynb)
#
# **Of these four, two come out here and two do not.**
#
# | in the paper | here |
# |---|---|
# | figure 2: the bar ($\gamma$ of the reference) rises from stage to stage | yes, also on chunks still to come |
# | figure 3: stages that start at S begin with a larger loss, and train less stably | yes, three times as large, and in stage 2 rougher by 0.09 [0.07, 0.12] nats; and they end worse, by 0.045 [0.027, 0.064] of true reward at the settings of DPO |
# | table 3: stepwise DPO is better than DPO, at one $\beta$ | no: at one $\beta$ it is *worse*, by 0.052 [0.037, 0.068]; tuned, it is equal, +0.004 [-0.008, +0.014] |
# | table 1: an aligned reference makes a better model | no: it was no better than S |
#
# All numbers are from ten worlds with two seeds each.
#
# **You should know** [stepwise DPO](../14_stepwise.ipynb) and the [protocol](protocol.ipynb). **Time** 31 minutes to read, half a minute to run. The grid behind its tables took 0.2 core hours (`make experiments`).
#
# <details><summary>Words used on this page</summary>
#
# - **S** is the model before alignment. **DPO** trains it on all pairs at once. **Stepwise DPO** (sDPO) trains in stages, one for each *chunk* of the pairs; $M_t$ is the model after stage $t$. Here there are three chunks, the sources `primer`, `digest` and `riddle`, from easy to hard.
# - **Target** is the model in training. **Reference** is the fixed model that the loss measures from. In stepwise DPO both are $M_{t-1}$ when stage $t$ begins.
# - **$\beta$** says how strongly the target is held at its reference. **KL** is the distance from S, in nats, along the model's own answers.
# - **$\gamma$** of a pair is how much more likely a model finds the chosen response than the rejected one, as a difference of log-probabilities, in nats.
# - **True reward** is 1 for the right answer and less for every letter that has to be mended. *Sampled* answers are drawn; a *greedy* answer takes the likeliest letter at every place.
# - **Tuned**: at the $\beta$ and learning rate that a search on two other worlds found best for the method.
# - **-0.052 [-0.068, -0.037]** is a mean and its 95 % interval. Differences are *paired*: same worlds, seeds and prompts. *Equal* means that the whole interval lies within $\pm 0.02$, the grey band in the figures.
#
# </details>

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    source = '"sdpo_nb @ git+https://github.com/sdpo-nb/sdpo_nb@v0.1.0"'
    get_ipython().run_line_magic("pip", f"install -q {source}")
again = "On Colab, choose Runtime > Disconnect and delete runtime, then run this cell again."
assert importlib.util.find_spec("sdpo_nb"), f"pip could not install sdpo_nb, see above. {again}"

import sdpo_nb
version = sdpo_nb.__version__
assert version == "0.1.0", f"This page is made for sdpo_nb 0.1.0, and {version} is installed. {again}"

# %%
import math, tempfile
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch.nn.functional as F
from sdpo_nb.cells import unfold_column
from sdpo_nb.compare import difference_intervals, loss_roughness, outcome_means, outcome_values
from sdpo_nb.compare import paired_difference, plot_contrasts
from sdpo_nb.evaluate import interval, stability
from sdpo_nb.logprobs import read_table
from sdpo_nb.questions import chosen_settings, load_grid
from sdpo_nb.plan import StepwiseConfig, load_sources
from sdpo_nb.stepwise import sdpo
from sdpo_nb.training_data import COMMON_SETTINGS
from sdpo_nb.world import load_world

# %% [markdown]
# ## Table 1: does a better reference make a better model?
#
# The paper trains two models on one set of pairs against three references. For both, a model that had been aligned by DPO was the best reference: a mean score of 70.13 where the SFT base gave 68.87, and 69.72 where it gave 68.41. A larger aligned model was better for one of them and worse for the other.
#
# Here S is trained on the hardest source, `riddle`, against three references: against S, against $M_1$ (S after `primer`), and against $M_2$ (after `primer` and `digest`). Pairs, steps, settings (DPO's) and the start, S, are the same; only the reference differs.
#
# A fourth row repeats $M_2$ with another $\beta$: the learning rate is the same, and $\beta$ is eight times as large in all stages, as the search found best for stages that start from S.

# %%
table_1 = load_grid("paper_in_miniature")
main = load_grid("primary")

references = {
    "S": table_1["riddle against S"],
    "M_1": table_1["riddle against M_1"],
    "M_2": table_1["riddle against M_2"],
    "M_2, beta = 4.8": main["sDPO, target S"],
}
best = chosen_settings()
assert best["DPO"] == dict(beta=0.6, lr=3e-4)
assert best["sDPO, target S"] == dict(beta=4.8, lr=3e-4)


# %% [markdown]
# Before you look: $M_1$ and $M_2$ are much better models than S. Will they be better references?

# %%
def reward_of_reference(rows):
    "Of S, or of the model after the stage before the last."
    stages = len(rows["steps"].iloc[0])
    if stages == 1: return outcome_values(main["S"], "sampled").mean()
    models = unfold_column(rows, "stages")
    return models[models["stage"] == stages - 1]["sampled"].mean()

own = [round(reward_of_reference(rows), 3) for rows in references.values()]
outcome_means(references).assign(**{"of the reference itself": own}).rename_axis("riddle against")

# %% [markdown]
# The same as paired differences to the model that was trained against S:

# %%
LABELS = {"M_1": "$M_1$", "M_2": "$M_2$", "M_2, beta = 4.8": r"$M_2$, $\beta$ = 4.8"}
compared = {}
for name, label in LABELS.items():
    for what in ("sampled", "greedy"):
        difference = paired_difference(references[name], references["S"], what)
        compared[f"against {label}, {what}"] = difference
better = difference_intervals(compared)
assert better["high"].iloc[[1, 2, 3]].max() < 0     # M_1 greedy, M_2 sampled and greedy
assert better["high"].iloc[4] > 0                   # M_2 with the larger beta, sampled

# %%
plot_contrasts(better, "true reward minus that of the model trained against S",
               sides=("S is the better reference", "the other is"));

# %% [markdown]
# $M_1$ and $M_2$ are far better models than S, and no better references at this $\beta$. Of two outcomes, $M_1$ is worse in one and $M_2$ in both.
#
# The models trained against them have moved two and three times as far. A smaller $\beta$ would do the same, and this $\beta$ was chosen with S as the reference. With a larger $\beta$ most of the difference is gone, and none in favour of $M_2$ appears. (The references of the paper had been trained on *other* data than its targets, which this does not imitate.)
#
# ## Table 3: all at once, in stages, in stages without order
#
# In the paper DPO reaches 72.67, sDPO 74.31, and sDPO on a random split (all pairs shuffled, then cut) 72.56, all with one $\beta$. The first row below does the same: stepwise DPO at the settings that are best for DPO. In the others each method is tuned.
#
# "DPO at sDPO's rate" has the $\beta$ of DPO and the smaller learning rate of stepwise DPO. The search had seen it as a tie with DPO ([protocol](protocol.ipynb)). The last three rows do without DPO: S fine-tuned on the chosen responses, S at its best temperature, and S itself.

# %%
METHODS = ("DPO", "DPO at sDPO's rate", "sDPO", "sDPO, random")
BASELINES = ("SFT on chosen", "S, best temperature", "S")

rows = {"sDPO at DPO's settings": main["sDPO at DPO's beta"]}
for name in METHODS + BASELINES:
    rows[name] = main[name]
outcome_means(rows)

# %%
compared = {}
for name in ("sDPO at DPO's settings", "sDPO", "sDPO, random"):
    for what in ("sampled", "greedy"):
        compared[f"{name}, {what}"] = paired_difference(rows[name], rows["DPO"], what)
gain = difference_intervals(compared)
assert gain["high"].iloc[:2].max() < -0.02          # at the settings of DPO
assert gain["low"].iloc[2:].min() > -0.02           # tuned

# %%
plot_contrasts(gain, "true reward minus that of tuned DPO (grey: equal)",
               sides=("DPO better", "stepwise better"));

# %% [markdown]
# At one $\beta$, the best for DPO, sDPO is *worse* by 0.05. Tuned, the three are equal in sampled reward.
#
# Equal reward is not an equal price. Look at the KL: at one learning rate, sDPO stands 1.29 nats from S and DPO 0.84. Greedy answers of both kinds of stages are a little better than those of DPO; but so are those of DPO at their learning rate (0.963, where sDPO has 0.956). So the gain in greedy answers belongs to the learning rate, not to the stages. ("sDPO minus DPO" is a primary question of the protocol, sampled and greedy; the others are exploratory.)
#
# ## Figure 2: does the bar rise?
#
# The certificate of [chapter 03](../03_loss.ipynb) says that the reference is a bar which training must clear. The paper prints its height on the second data set, the mean of $\gamma$: -38.60 under S, -25.10 under $M_1$, and 84.35 under $M_2$, which was trained on it. Here is every model of tuned sDPO on every chunk (64 of its pairs). Which models will have a higher $\gamma$ than S on a chunk they were *not* yet trained on?

# %%
gammas = unfold_column(main["sDPO"], "gammas")
mean_gamma = gammas.pivot_table("gamma", ["model", "chunk"], ["world", "seed"])
MODELS = ("M_0", "M_1", "M_2", "M_3")
CHUNKS = ("primer", "digest", "riddle")                # of stage 1, 2 and 3
for _, rows in gammas.groupby(["world", "seed"]):
    assert tuple(rows["chunk"].unique()) == CHUNKS      # the same order in every world

fig, ax = plt.subplots(figsize=(6.5, 3.6))
for stage, (chunk, color) in enumerate(zip(CHUNKS, sns.color_palette("colorblind")), 1):
    by_model = [interval(mean_gamma.loc[m, chunk].unstack().to_numpy()[..., None]) for m in MODELS]
    mean, low, high = np.array(by_model).T
    ax.errorbar(range(4), mean, yerr=[mean - low, high - mean], capsize=3, color=color)
    for t, y in enumerate(mean):
        ax.plot(t, y, "o", color=color, mfc=color if t >= stage else "white")
    height = -3 - 6 * (stage - 2)
    ax.annotate(chunk, (3, mean[-1]), xytext=(10, height), textcoords="offset points", color=color)
ax.set_xticks(range(4), ["S", "$M_1$", "$M_2$", "$M_3$"])
ax.set(ylabel=r"mean $\gamma$ (nats), higher bar →", xlim=(-0.3, 3.7),
       title="filled: trained on this chunk; hollow: not yet")
ax.title.set_size("medium")
sns.despine()


# %%
def share_higher(after, before, chunk):
    "In how many runs a model has the higher mean gamma."
    return (mean_gamma.loc[after, chunk] > mean_gamma.loc[before, chunk]).mean()

assert share_higher("M_1", "M_0", "digest") > 0.8      # all three: a chunk still to come
assert share_higher("M_1", "M_0", "riddle") > 0.8
assert share_higher("M_2", "M_1", "riddle") > 0.8

# %% [markdown]
# As in the paper: a model raises $\gamma$ most on the chunk that it was trained on (the first filled mark of each line), and somewhat on those still to come (hollow). When stage 3 begins, its reference is at 2.2 nats on `riddle`, where S is at 0.4. The bar rises.
#
# That a higher bar makes a better model does not follow (table 1). And $\gamma$ would rise as well if S only became surer of what it says anyway.
#
# ## Figure 3: where the target starts
#
# Suppose stage 2 starts its target at S instead of $M_1$, while the reference stays $M_1$. Then its first loss is no longer $\ln 2$. It is
#
# $$L = E\,\log\!\left(1 + e^{\beta(\gamma_{M_1} - \gamma_S)}\right) \;\ge\; \log\!\left(1 + e^{\beta\,E(\gamma_{M_1} - \gamma_S)}\right), \tag{1}$$
#
# where $E$ is the mean over the pairs of the chunk. The inequality holds since softplus, $\log(1 + e^x)$, is convex. Both sides can be read off the tables of log-probabilities before a single step is made. In the paper's numbers, the mean gap of 13.5 nats at $\beta = 0.1$ gives at least 1.58.
#
# Live, in world 0. Pairs are not shuffled, so the first batch is the first 32 pairs of the chunk.

# %%
world = load_world()
settings = COMMON_SETTINGS | chosen_settings()["DPO"]
config = StepwiseConfig(**settings, init_target="S", shuffle=False)
run = sdpo(world.base, world.sources, config, tempfile.mkdtemp())

# %%
second = run.stages[1]["chunk"]
chunk = next(s.pairs for s in load_sources(world.sources, run.tokenizer, config) if s.name == second)
S = read_table(run.folder / "base" / "logprobs").gamma(chunk)
M_1 = read_table(run.folder / "stage-1" / "logprobs").gamma(chunk)
gap = config.beta * (M_1 - S)

left_side = F.softplus(gap).mean().item()
right_side = F.softplus(gap.mean()).item()
predicted = F.softplus(gap[:config.batch_size]).mean().item()
first_loss = run.metrics.query("stage == 2")["loss"].iloc[0]

assert abs(predicted - first_loss) < 1e-4
assert left_side > right_side > math.log(2)
pd.Series({
    "mean gap, nats": (gap.mean() / config.beta).item(),
    "left side of (1), the whole chunk": left_side,
    "right side": right_side,
    "the first batch, from the tables": predicted,
    "the run's first loss": first_loss,
}).round(4).to_frame("stage 2, target S")


# %% [markdown]
# The first loss was known before the stage began. Now the losses of stage 2 in all runs, at the settings of DPO: the mean, and the range over worlds and seeds, as far as the shortest stage goes.

# %%
def losses_of_stage_2(rows):
    losses = []
    for row in rows.itertuples():
        first, second = row.steps[:2]
        losses.append(row.losses[first:first + second])
    return losses

from_S = losses_of_stage_2(table_1["target S"])
from_M_1 = losses_of_stage_2(main["sDPO at DPO's beta"])
assert from_S[0][0] > 1.4
assert all(abs(losses[0] - math.log(2)) < 1e-3 for losses in from_M_1)

# %%
fig, ax = plt.subplots(figsize=(6.5, 3.4))
LINES = (
    (from_S, "target starts at S", 0.9),               # losses, label, its height
    (from_M_1, "target starts at $M_1$", -0.12),
)
for losses, label, height in LINES:
    shortest = min(map(len, losses))
    steps = range(1, shortest + 1)
    losses = np.array([run[:shortest] for run in losses], dtype=float)
    (line,) = ax.plot(steps, losses.mean(0))
    ax.fill_between(steps, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.15, lw=0)
    ax.annotate(label, (24, height), color=line.get_color())
ax.axhline(math.log(2), color="black", lw=1, ls=":")
ax.annotate("ln 2", (43, math.log(2)), xytext=(0, 3), textcoords="offset points")
ax.set(xlabel="optimizer step of stage 2", ylabel="loss (nats)\n← better", ylim=(-0.2, 3.2))
sns.despine()

# %% [markdown]
# A target that is its own reference starts at $\ln 2$, exactly. One that starts at S begins at three times that, in the mean, and ends above the other. A pass over the chunk has 15 or 16 steps. After which step does its loss first fall below $\ln 2$?

# %%
back = [next(step for step, loss in enumerate(losses, 1) if loss < math.log(2)) for losses in from_S]
assert 14 <= min(back) and max(back) <= 19
f"{min(back)} to {max(back)}, mean {np.mean(back):.1f}"

# %% [markdown]
# The paper says of this figure that a target which starts at $M_{t-1}$ trains more *stably*. It needs about one pass over the chunk to come back. And how rough are the curves? Roughness is the scatter about a running median ([compare](compare.ipynb)). The first three rows are on the same batches, the fourth is at one $\beta$ and rate.

# %%
from_both = (table_1["target S"], main["sDPO at DPO's beta"])
def rougher(rows, other, stages=None): return loss_roughness(rows, stages) - loss_roughness(other, stages)

roughness = {}
for t in (1, 2, 3): roughness[f"starts at S, minus starts before: stage {t}"] = rougher(*from_both, [t])
roughness["sDPO minus DPO: at DPO's settings"] = rougher(main["sDPO at DPO's beta"], main["DPO"])
roughness["sDPO minus DPO: each tuned"] = rougher(main["sDPO"], main["DPO"])
table = difference_intervals(roughness)
assert table["low"][1] > 0
table.round(3)

# %% [markdown]
# Stages that start from S are rougher, by 0.09 nats in stage 2 and by 0.21 in stage 3; in stage 1 both are one and the same. A part of it is that a high loss scatters more. Is it still so from step 31 on, when the mean of each is below $\ln 2$?

# %%
late = {}
for name, curves in (("starts at S", from_S), ("starts at M_1", from_M_1)):
    late[name] = np.mean([stability(losses[30:])["sd"] for losses in curves])
assert late["starts at S"] > 1.3 * late["starts at M_1"]
pd.Series(late, name="roughness of stage 2 from step 31 on, nats").round(3).to_frame()

# %% [markdown]
# It is. But all this is about where a stage *starts*. Stepwise DPO itself is not found to be steadier than DPO: at one $\beta$ and rate nothing is seen. As tuned its loss is smoother, and its learning rate is a third.

# %% [markdown]
# Are the models worse in the end? We compare two ways to run all stages: each starts at S, or each starts at the model before it, $M_{t-1}$.

# %%
pairs_of_runs = {
    "settings of DPO": (table_1["target S"], main["sDPO at DPO's beta"]),
    "each tuned": (main["sDPO, target S"], main["sDPO"]),
}
compared = {}
for how, (start_S, start_before) in pairs_of_runs.items():
    for what in ("sampled", "greedy"):
        compared[f"{how}, {what}"] = paired_difference(start_S, start_before, what)
end = difference_intervals(compared)
assert end["high"].iloc[[0, 2]].max() < 0
plot_contrasts(end, "true reward of stages that start at S, minus stages that start at $M_{t-1}$",
               sides=("$M_{t-1}$ is the better start", "S is"));

# %% [markdown]
# Starting from S loses, at both settings that we ran. Two things could do that. A last stage that starts from S trains its model on the last chunk only, a third of the pairs. And it does so against a reference that is far ahead of it. Table 1 has the same last stage with the ordinary reference, at the settings of DPO:

# %%
parts = difference_intervals({
    "three stages, minus one from S on the last chunk, against S": paired_difference(main["sDPO at DPO's beta"], table_1["riddle against S"]),
    "that one, minus the same against M_2": paired_difference(table_1["riddle against S"], table_1["riddle against M_2"]),
    "three stages, minus stages that start at S": paired_difference(main["sDPO at DPO's beta"], table_1["target S"]),
})
assert parts["low"][0] < 0 < parts["high"][0] and parts["low"][1] > 0
parts.round(3)

# %% [markdown]
# There the last chunk alone is as good as all three stages, and the far reference costs nearly all that is lost. At these settings three stages go too far. As tuned, less data may cost more; that control was not run. ([Pre-DPO](https://arxiv.org/abs/2504.15843) restarts a target from S against an aligned reference on the *same* data, and finds a gain. That is another design, and nothing here contradicts it.)
#
# ## What this does not show
#
# - **The paper's scores.** It measures large models on question benchmarks, we measure the true reward of answers of a model with 340 thousand parameters.
# - **Chunks like the paper's.** It has two data sets, one five times as large as the other, written by other models; here three sources of equal size were written by S, and share all skills. There is no curriculum to find.
# - **Small differences.** Settings were searched on two worlds, with $\beta$ in steps of a factor of two. Another search could move a method by several thousandths.
# - **One epoch.** The paper trains on each pair once, we three times.
#
# ## What you now have
#
# - The paper's comparisons with intervals, with tuned opponents, and with the baselines that they lack.
# - Equation (1): the first loss of a stage, known before it starts.
#
# ## Questions to test yourself
#
# 1. "Target S" on all three sources ends in the same model as "riddle against M_2". Why?
# <details><summary>Answer</summary>
#
# Its last stage starts from S, trains on `riddle`, and has $M_2$ as its reference. What the target did in the stages before survives only in that reference.
# </details>
#
# 2. Why may $M_2$ be a worse reference at the same $\beta$, although it is the better model?
# <details><summary>Answer</summary>
#
# Its optimum lies around $M_2$, which is away from S already. At the same $\beta$ the target ends farther from S, on the side of the best distance where farther is worse.
# </details>
#
# ## Try this
#
# - Divide the logits of S by 0.5, which makes it surer without teaching it anything, and compute its $\gamma$ on the three chunks. How much of figure 2 is sharpening?
# <details><summary>What you should see</summary>
#
# In world 0 the mean $\gamma$ nearly doubles: 1.68 to 3.12 on `primer`, 0.73 to 1.36 on `digest`, 0.47 to 0.95 on `riddle`. That is nearly the height that $M_1$ has in the figure. $M_2$ and $M_3$ are well above it.
# </details>
#
# - Double $\beta$ in the live run. How does the first loss of stage 2 change, and can you predict it from the table?
# <details><summary>What you should see</summary>
#
# It rises from 2.04 to 3.07, and the tables say so beforehand. It does not double: with the larger $\beta$, $M_1$ stays nearer to S, and the mean gap shrinks from 2.43 to 1.76 nats.
# </details>
