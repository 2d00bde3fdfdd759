# %% [markdown]
# # The pictures of a run
# > Partition bars, the loss over stages, the distribution of gamma, the drift of chosen and rejected: one function, one figure.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/07_figures.ipynb)
#
# **You should know** what a [partition](05_partition.ipynb) and a [stage](06_trainer.ipynb) are. **Time** under a minute on two CPU cores.
#
# A run leaves numbers. Four questions are asked of them every time: which source came first, did the loss go down, did the model come to prefer what was
# chosen, and how did it get there? Each has one figure. They stand before the stepwise chapter because its report draws them, and in this book a module
# imports only from lower numbers.

# %%
#| default_exp figures

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
#| export
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from sdpo_nb.world import mean_interval

# %%
import tempfile
from pathlib import Path
import torch
from sdpo_nb.logprobs import load_model, load_tokenizer, score_pairs
from sdpo_nb.partition import partition
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.trainer import TrainConfig, train_stage
from sdpo_nb.world import load_world
torch.set_num_threads(1)
pd.set_option("display.width", 180, "display.max_columns", 20);

# %% [markdown]
# ## Two stages to look at
#
# Real ones, if small: `primer`, then `digest`, as the partition orders them. The second stage's reference is the model after the first, so its table is
# another pass of `score_pairs`.

# %%
world = load_world()
tok, policy = load_tokenizer(world.base), load_model(world.base, "cpu")
sources = [tokenize_pairs(load_pairs(world.sources[name]), tok, name) for name in ("digest", "primer")]
config = TrainConfig(lr=1e-4, beta=0.3, batch_size=32, epochs=2, precision="fp32")
base = score_pairs(policy, [*sources[0].pairs, *sources[1].pairs])
plan = partition(sources, base)
plan.measures[["source", "n", "accuracy", "low", "high", "accuracy_per_token"]].round(3)


# %%
def stage(t, reference): # the optimizer steps of stage t + 1, one a row
    with tempfile.TemporaryDirectory() as folder:
        train_stage(policy, plan.chunk(t), reference, config, folder, t + 1)
        return pd.read_json(Path(folder) / "metrics.jsonl", lines=True).assign(stage=t + 1)

tables, steps = {"M_0": base}, []
for t in range(2):
    steps.append(stage(t, tables[f"M_{t}"]))
    tables[f"M_{t+1}"] = score_pairs(policy, plan.pairs)
metrics = pd.concat(steps, ignore_index=True)
metrics.groupby(["stage", "epoch"])[["loss", "margin", "logratio_chosen", "logratio_rejected"]].mean().round(3)

# %% [markdown]
# ## Colours
#
# In every figure of a run two colours mean two sides: blue is chosen, orange is rejected. Green and red would say it louder, but not to the readers
# who cannot tell them apart. Models are a scale from dark to light, and stage $t$ has the colour of the model it makes.

# %%
#| export
CHOSEN, REJECTED, NEUTRAL = *sns.color_palette("colorblind")[:2], "0.75"

def _model_colors(T: int): return sns.color_palette("viridis", T + 1) # M_0 ... M_T; stage t has the colour of M_t

def _above(ax, **kw): ax.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize="small", **kw)


# %%
sns.color_palette([CHOSEN, REJECTED, *_model_colors(2)]) # chosen, rejected, M_0, M_1, M_2


# %% [markdown]
# ## Which source came first
#
# The partition: a bar is the reward accuracy under $M_0$, a whisker its 95 % interval, a diamond the same per token. Where bar and diamond part, length decides.

# %%
#| export
def plot_partition(measures: pd.DataFrame, # one source a row: source, accuracy, low, high, accuracy_per_token
                  ) -> plt.Figure:
    "Reward accuracy of each source under M_0 with its 95 % interval, in the order of training."
    fig, ax = plt.subplots(figsize=(6, 0.5 * len(measures) + 1.2))
    y, names = range(len(measures)), [f"{t}. {s}" for t, s in enumerate(measures["source"], 1)]
    err = [measures["accuracy"] - measures["low"], measures["high"] - measures["accuracy"]]
    ax.barh(y, measures["accuracy"], xerr=err, color=NEUTRAL, ecolor="black", capsize=3, label="sum over tokens")
    ax.plot(measures["accuracy_per_token"], y, "D", ms=7, color="white", mec="black", label="mean per token")
    ax.axvline(0.5, color="black", lw=1, ls=":", label="chance")
    ax.set(yticks=list(y), yticklabels=names, xlim=(0, 1), xlabel="reward accuracy under $M_0$ (share of pairs)")
    ax.invert_yaxis(); _above(ax, ncol=3); sns.despine(fig)
    return fig


# %% [markdown]
# What to see: `primer` goes first because S gets more of it right, and the intervals do not touch. In the tiny world both responses of a pair are nearly always equally long, so
# the diamonds say nothing new. The third row is made up, to show what they are for: where what was chosen is longer, S can prefer it per token and not in sum.

# %%
wordy = dict(source="wordy (made up)", accuracy=0.36, low=0.32, high=0.40, accuracy_per_token=0.63)
assert plan.measures["low"][0] > plan.measures["high"][1] and (plan.measures["decided_by_length"] < 0.01).all()
plot_partition(pd.concat([plan.measures, pd.DataFrame([wordy])], ignore_index=True));


# %% [markdown]
# ## Did the loss go down
#
# One optimizer step sees one batch, so its loss is noisy: thin lines are steps, thick ones a running median. A stage whose target starts as its own
# reference starts at
#
# $$-\log\sigma(0) = \ln 2. \tag{1}$$

# %%
#| export
def _stages(metrics): # (steps in order, window of the running averages, colours)
    "Optimizer steps counted over the whole run; the window is a quarter of a stage."
    m = metrics.sort_values("stage", kind="stable").reset_index(drop=True)
    m.index += 1
    return m, max(5, len(m) // (4 * m["stage"].nunique())), dict(zip(m["stage"].unique(), _model_colors(m["stage"].nunique())[1:]))

def _borders(ax, m):
    "A line where a stage begins."
    for start in m.groupby("stage").head(1).index[1:]: ax.axvline(start - 0.5, color="0.5", lw=0.8)
    ax.set(xlabel="optimizer step", xlim=(0.5, len(m) + 0.5)); sns.despine(ax.figure)


# %%
#| export
def plot_loss(metrics: pd.DataFrame, # stage, loss; one optimizer step a row
             ) -> plt.Figure:
    "Loss of each optimizer step, stages side by side; ln 2 is where a stage starts when target = reference."
    m, window, colors = _stages(metrics)
    fig, ax = plt.subplots(figsize=(6.5, 2.8))
    for stage, rows in m.groupby("stage"):
        ax.plot(rows.index, rows["loss"], color=colors[stage], lw=0.8, alpha=0.5)
        ax.plot(rows.index, rows["loss"].rolling(window, min_periods=1, center=True).median(), color=colors[stage], lw=2.2, label=f"stage {stage}")
    ax.axhline(math.log(2), color="black", lw=1, ls=":", label="ln 2")
    ax.set(ylabel="DPO loss (nats)"); _borders(ax, m); _above(ax, ncol=6)
    return fig


# %% [markdown]
# What to see: both stages start at (1), the second *again*, since its reference has moved up; the losses of two stages are distances from two different references
# and must not be compared.

# %%
assert (abs(metrics.groupby("stage")["loss"].first() - math.log(2)) < 1e-4).all()
plot_loss(metrics);


# %% [markdown]
# ## Does it prefer what was chosen
#
# $\gamma$ needs no reference, so it *can* be compared across stages. One panel a chunk, one box a model: line for the median, dot for the mean (the paper's
# $\gamma_{ref}$ is a mean), box for half of the pairs, whiskers for nearly all. A box is hollow while its model has not been trained on this chunk.

# %%
#| export
def plot_gamma(gammas: pd.DataFrame, # model, chunk, gamma: one pair a row; chunks in the order of training, from M_0 on
              ) -> plt.Figure:
    "Distribution of gamma under every model of a run, one panel per chunk; hollow where the model was not yet trained on it."
    chunks, models = list(dict.fromkeys(gammas["chunk"])), list(dict.fromkeys(gammas["model"]))
    across = min(4, len(chunks)); down = math.ceil(len(chunks) / across)
    fig, axes = plt.subplots(down, across, figsize=(2.9 * across + 0.6, 2.8 * down), sharey=True, squeeze=False)
    for t, (ax, chunk) in enumerate(zip(axes.flat, chunks), 1):
        for some, look in ((models[:t], dict(fill=False)), (models[t:], dict(medianprops=dict(color="white")))):
            _boxes(gammas[(gammas["chunk"] == chunk) & gammas["model"].isin(some)], models, ax, look)
        ax.axhline(0, color="black", lw=1, ls=":"); ax.set(title=chunk, xlabel="", ylabel=r"$\gamma$ (nats)"); ax.set_xticks(range(len(models)), [f"${m}$" for m in models])
    for ax in list(axes.flat)[len(chunks):]: ax.remove()
    fig.supxlabel("filled: trained on this chunk; hollow: not yet", fontsize="medium"); sns.despine(fig); fig.tight_layout()
    return fig

def _boxes(gammas, models, ax, look):
    "Boxes of some of the models, each in its place and colour."
    mean = dict(marker="o", markerfacecolor="white", markeredgecolor="black", markersize=5)
    if len(gammas): sns.boxplot(gammas, x="model", y="gamma", hue="model", order=models, hue_order=models, palette=_model_colors(len(models) - 1), saturation=1,
                                showfliers=False, showmeans=True, meanprops=mean, legend=False, ax=ax, **look)


# %%
gammas = pd.concat([pd.DataFrame(dict(model=m, chunk=f"chunk {t+1}: {n}", gamma=table.gamma(plan.chunk(t)).numpy())) for t, n in enumerate(plan.names) for m, table in tables.items()])
means = gammas.groupby(["model", "chunk"])["gamma"].mean().unstack()
assert means.apply(lambda column: column.is_monotonic_increasing).all()
means.round(2)

# %% [markdown]
# What to see: every mean is higher than the one before it. In the right panel the hollow box of $M_1$ is above that of $M_0$: on pairs it has *not* seen, the reference moved up, and the mean of
# this box is $\gamma_{ref}$ of stage 2. The filled box of $M_2$ says less, for $M_2$ was trained on these pairs.

# %%
plot_gamma(gammas);


# %% [markdown]
# Pairs differ far more from each other than a model differs from the one before it. With real pairs a box reaches from -250 to 150 nats, and a gain of 4 cannot be seen in it. But the pairs are the same for every model, so look at what changed, pair by pair, and at the mean of that.

# %%
#| export
def plot_change(gammas: pd.DataFrame, # model, chunk, gamma: one pair a row, the same pairs in the same order for every model; from M_0 on
               ) -> plt.Figure:
    "Mean change of gamma since M_0 on every chunk, with 95 % intervals; hollow where the model was not yet trained on it."
    models, chunks = list(dict.fromkeys(gammas["model"])), list(dict.fromkeys(gammas["chunk"]))
    of = {key: rows["gamma"].to_numpy() for key, rows in gammas.groupby(["model", "chunk"], sort=False)}
    fig, ax = plt.subplots(figsize=(6.5, 3))
    for t, (chunk, color) in enumerate(zip(chunks, sns.color_palette("colorblind", len(chunks))), 1):
        seen = [s for s, m in enumerate(models) if (m, chunk) in of and (models[0], chunk) in of]
        change = [mean_interval(of[models[s], chunk] - of[models[0], chunk]) for s in seen]
        x = [s + 0.06 * (t - (len(chunks) + 1) / 2) for s in seen]   # side by side, or intervals hide each other
        mean, low, high = (np.array(v) for v in zip(*change)) if change else ([], [], [])
        ax.errorbar(x, mean, [mean - low, high - mean] if change else None, color=color, capsize=3, lw=1.5, label=chunk)
        for s, at, y in zip(seen, x, mean): ax.plot(at, y, "o", color=color, mfc=color if s >= t else "white", ms=6)
    ax.axhline(0, color="black", lw=1, ls=":")
    ax.set(ylabel="change of $\\gamma$ since S\n(nats; up is better)", xticks=range(len(models)), xticklabels=["S"] + [f"after stage {s}" for s in range(1, len(models))])
    sns.despine(fig); _above(ax, ncol=4)
    return fig


# %% [markdown]
# What to see: both lines rise at every stage, also the one of chunk 2 during stage 1, when only chunk 1 was trained on.

# %%
by_model = gammas.groupby(["chunk", "model"])["gamma"].mean().unstack()
assert (by_model.diff(axis=1).iloc[:, 1:] > 0).all(axis=None)
plot_change(gammas);


# %% [markdown]
# ## How it got there
#
# The loss knows only the gap between two log-ratios,
#
# $$\gamma_\theta - \gamma_{ref} = \log\frac{\pi_\theta(y_w|x)}{\pi_{ref}(y_w|x)} - \log\frac{\pi_\theta(y_l|x)}{\pi_{ref}(y_l|x)}, \tag{2}$$
#
# so it is content when the chosen response becomes *less* likely, as long as the rejected one loses more. The commonest question about DPO is "why is chosen falling?", and the
# first answer is to plot the two apart.

# %%
#| export
def plot_drift(metrics: pd.DataFrame, # stage, logratio_chosen, logratio_rejected; one optimizer step a row
              ) -> plt.Figure:
    "log pi_theta / pi_ref of chosen and of rejected responses: DPO needs the gap, not a rise of the chosen."
    m, window, _ = _stages(metrics)
    fig, ax = plt.subplots(figsize=(6.5, 2.8))
    for i, (_, rows) in enumerate(m.groupby("stage")):
        chosen, rejected = (rows[f"logratio_{side}"].rolling(window, min_periods=1).mean() for side in ("chosen", "rejected"))
        ax.fill_between(rows.index, chosen, rejected, color="0.92", lw=0, label="gap" if i == 0 else None)
        for y, color, side in ((chosen, CHOSEN, "chosen"), (rejected, REJECTED, "rejected")): ax.plot(rows.index, y, color=color, lw=2, label=side if i == 0 else None)
    ax.axhline(0, color="black", lw=1, ls=":")
    ax.set(ylabel=r"$\log\,\pi_\theta/\pi_{ref}$ (nats)"); _borders(ax, m); _above(ax, ncol=3)
    return fig


# %% [markdown]
# What to see: both stages start at zero, as a new reference makes them, and then the gap opens *downwards*. In stage 1 the chosen side stays near where it was; in stage 2 it falls,
# and the loss, which knows only (2), goes down all the same.

# %%
late = metrics[metrics["epoch"] == 1].groupby("stage")["logratio_chosen"].mean()
assert abs(late[1]) < 0.2 and late[2] < -0.2
assert (metrics["margin"] - config.beta * (metrics["logratio_chosen"] - metrics["logratio_rejected"])).abs().max() < 1e-4   # (2), times beta
plot_drift(metrics);


# %% [markdown]
# Averages hide pairs. Of each chunk, before and after its stage: in how many pairs did the gap grow, and in how many of those did chosen fall?

# %%
def moved(t): # the pairs of chunk t + 1, in stage t + 1
    before, after = (torch.stack(tables[f"M_{i}"].lookup(plan.chunk(t))) for i in (t, t + 1))
    chosen, rejected = after - before
    grew = chosen > rejected
    return {"gap grew (share)": grew.float().mean().item(), "of these, chosen fell (share)": (chosen[grew] < 0).float().mean().item(),
            "mean change of chosen (nats)": chosen.mean().item(), "of rejected (nats)": rejected.mean().item()}

fell = pd.DataFrame([moved(t) for t in range(2)], index=plan.names)
assert (fell["gap grew (share)"] > 0.8).all() and fell.loc["digest", "mean change of chosen (nats)"] < 0
fell.round(2)

# %% [markdown]
# In a fifth of these pairs in the first stage, and in two fifths in the second, the chosen response became *less* likely although the gap grew. This has been studied as
# *likelihood displacement* (arXiv 2410.08847): it comes with pairs whose two responses look alike to the model, so that pushing one down drags the other along. The probability goes to
# a third response that no label speaks about. Whether that one is better or worse, none of these figures can tell.
#
# ## What you now have
#
# - Four functions, each from one data frame to one figure; the report of every run calls them.
# - One meaning for each colour: two sides, and a scale of models.
# - An answer to "why is chosen falling?", and the figure that shows whether it is.
#
# ## Questions to test yourself
#
# 1. Stage 2 ends at a lower loss than stage 1: may one say that it learned more? Which figure would you look at instead?
# 2. Why does the drift start at zero twice, and $\gamma$ not?
# 3. In `plot_loss` the second stage starts far above $\ln 2$. What does that say about its target and its reference?
# 4. Bar and diamond of `plot_partition` lie on either side of 0.5. What decided?
#
# ## Try this
#
# - Train the second stage with `beta=3` and look at the drift.
# - Swap the two chunks and compare the boxes of $M_2$.
# - Draw `plot_gamma` of `riddle`, which neither stage has seen.
