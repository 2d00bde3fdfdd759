# %% [markdown]
# # The pictures of a run
# > Partition bars, the loss over stages, the distribution of gamma and its change, the drift of chosen and rejected: one function, one figure.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/07_figures.ipynb)
#
# **You should know** what [gamma](02_logprobs.ipynb) is, what a [partition](05_partition.ipynb) does, and how a [stage](06_trainer.ipynb) is trained.
#
# **Time** 45 minutes to read, under a minute to run on two CPU cores.
#
# A run of stepwise DPO leaves numbers. Four questions are asked of them every time:
#
# 1. Which source of pairs came first, and why?
# 2. Did the loss go down?
# 3. Did the model come to prefer the chosen responses?
# 4. How did it get there?
#
# Each question has a figure; the third has two, and one more for models that are no stages. The figures stand before the stepwise chapter because its report draws them, and in this book a module
# imports only from lower numbers.

# %%
#| default_exp figures

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
#| export
import math, re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from sdpo_nb.partition import mean_interval

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
# We need a real run, if a small one. Two sources of preference pairs, `digest` and `primer`, become two *chunks*, one for each stage. The partition puts the easier source first: the one
# whose pairs the base model S already ranks rightly more often. That share is its *reward accuracy*.

# %%
world = load_world()
tok, policy = load_tokenizer(world.base), load_model(world.base, "cpu")
sources = [tokenize_pairs(load_pairs(world.sources[name]), tok, name) for name in ("digest", "primer")]
base = score_pairs(policy, [*sources[0].pairs, *sources[1].pairs])
plan = partition(sources, base)
plan.measures[["source", "n", "accuracy", "low", "high", "accuracy_per_token"]].round(3)

# %% [markdown]
# Now two stages of DPO. Each stage trains the *policy* (the model that learns) against a *reference*, a table with the log-probabilities of the model that the stage starts from. $M_0$ is S, and $M_t$ is the model after stage $t$. So the
# second stage needs a new table, another pass of `score_pairs`.

# %%
config = TrainConfig(lr=1e-4, beta=0.3, batch_size=32, epochs=2, precision="fp32")

def train(t, reference):
    "Train stage t; its optimizer steps, one per row."
    with tempfile.TemporaryDirectory() as folder:
        train_stage(policy, plan.chunk(t - 1), reference, config, folder, t)
        steps = pd.read_json(Path(folder) / "metrics.jsonl", lines=True)
    return steps.assign(stage=t)

tables, steps = {"M_0": base}, []
for t in (1, 2):
    steps.append(train(t, tables[f"M_{t-1}"]))
    tables[f"M_{t}"] = score_pairs(policy, plan.pairs)
metrics = pd.concat(steps, ignore_index=True)

# %%
columns = ["loss", "margin", "logratio_chosen", "logratio_rejected"]
metrics.groupby(["stage", "epoch"])[columns].mean().round(3)

# %% [markdown]
# The *log-ratio* of a response is its log-probability under the policy minus that under the reference. The *margin* is $\beta$ times the log-ratio of chosen minus that of rejected; the loss falls as it grows. More of both below.
#
# ## Colours
#
# In every figure of a run two colours mean two sides: blue is chosen, orange is rejected. Green and red would say it louder, but not to readers
# who cannot tell them apart. Models are a scale from dark to light. Stage $t$ has the colour of the model it makes, and so has its chunk.

# %%
#| export
CHOSEN, REJECTED = sns.color_palette("colorblind")[:2]
NEUTRAL = "0.75"

def _model_colors(T):
    "M_0 ... M_T; stage t and its chunk have the colour of M_t."
    return sns.color_palette("viridis", T + 1)


# %%
sns.color_palette([CHOSEN, REJECTED, *_model_colors(2)]) # chosen, rejected, M_0, M_1, M_2


# %% [markdown]
# ## Which source came first?
#
# One bar per source, in the order of training. Its length is the reward accuracy under $M_0$, and the whisker is its 95 % interval. A diamond is the same share, read from the *mean* log-probability per token instead of the sum.
# A sum over more tokens is lower, so where bar and diamond part, the length of the responses decides.

# %%
#| export
def plot_partition(
    measures: pd.DataFrame, # one row per source: source, accuracy, low, high, accuracy_per_token
) -> plt.Figure:
    "Reward accuracy of each source under M_0 with its 95 % interval, in the order of training."
    fig, ax = plt.subplots(figsize=(6, 0.5 * len(measures) + 1.2))
    y = range(len(measures))
    names = [f"{t}. {source}" for t, source in enumerate(measures["source"], 1)]
    below = measures["accuracy"] - measures["low"]
    above = measures["high"] - measures["accuracy"]
    bars = dict(color=NEUTRAL, ecolor="black", capsize=3, label="sum over tokens")
    ax.barh(y, measures["accuracy"], xerr=[below, above], **bars)
    ax.plot(measures["accuracy_per_token"], y, "D", ms=7, color="white", mec="black", label="mean per token")
    ax.axvline(0.5, color="black", lw=1, ls=":")
    ax.set(yticks=list(y), yticklabels=names, xlim=(0, 1))
    ax.set_xlabel("reward accuracy under $M_0$ (share of pairs)\nhard  ←  0.5 is chance  →  easy")
    ax.invert_yaxis()
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize="small", ncol=2)
    sns.despine(fig)
    return fig


# %% [markdown]
# The third row is made up. Before you look: its chosen responses are much longer than the rejected ones. On which side of one half will its bar be, and on which its diamond?

# %%
wordy = dict(source="wordy (made up)", accuracy=0.36, low=0.32, high=0.40, accuracy_per_token=0.63)
with_wordy = pd.concat([plan.measures, pd.DataFrame([wordy])], ignore_index=True)
assert plan.measures["low"][0] > plan.measures["high"][1]
assert (plan.measures["decided_by_length"] < 0.01).all()
plot_partition(with_wordy);


# %% [markdown]
# What to see: `primer` goes first because S gets more of it right, and the intervals do not touch. In the tiny world both responses of a pair are nearly always equally long, so
# its diamonds say nothing new. In the made-up source they do: per token S prefers the longer responses, but their sums are lower.
#
# ## Did the loss go down?
#
# One optimizer step sees one batch, so its loss is noisy. Thin lines are steps, thick ones a running median over a quarter of their stage. A stage whose policy starts as its own
# reference has all log-ratios zero, so its loss starts at
#
# $$-\log\sigma(0) = \ln 2, \tag{1}$$
#
# where $\sigma$ is the sigmoid of the [DPO loss](03_loss.ipynb).
#
# Two figures have optimizer steps on their axis, so what they share comes first.

# %%
#| export
def _whole_run(metrics):
    "Optimizer steps counted over the whole run. Raises ValueError where there are none."
    if metrics.empty: raise ValueError("metrics: no optimizer steps")
    steps = metrics.sort_values("stage", kind="stable").reset_index(drop=True)
    steps.index += 1
    return steps

def _window(rows):
    "Of a running average: a quarter of the stage, in steps. A long stage must not smooth away a short one."
    return max(5, len(rows) // 4)

def _step_axis(ax, steps):
    "Steps from left to right; a line where a stage begins, its number above."
    for i, (stage, rows) in enumerate(steps.groupby("stage")):
        start, end = rows.index[0] - 0.5, rows.index[-1] + 0.5
        if i: ax.axvline(start, color="0.5", lw=0.8)
        name = f"{stage}" if i else f"stage {stage}"
        above = dict(transform=ax.get_xaxis_transform(), ha="center", fontsize="small")
        ax.text((start + end) / 2, 1.02, name, **above)
    ax.set(xlabel="optimizer step", xlim=(0.5, len(steps) + 0.5))
    sns.despine(ax.figure)

def _apart(heights, gap):
    "The same heights, moved up where one is less than `gap` above the next lower one."
    out = np.array(heights, dtype=float)
    order = np.argsort(out, kind="stable")
    for lower, upper in zip(order, order[1:]):
        out[upper] = max(out[upper], out[lower] + gap)
    return out

def _label_lines(ax, heights, names, colors):
    "The name of each line at its right end, none on top of another."
    low, high = ax.get_ylim()
    for y, name, color in zip(_apart(heights, 0.09 * (high - low)), names, colors):
        ax.text(1.02, y, name, color=color, transform=ax.get_yaxis_transform(), va="center", fontsize="small")


# %% [markdown]
# At which step does stage 2 begin? (And labels that would lie on each other are moved apart.)

# %%
run_steps = _whole_run(metrics)
first_of_2 = run_steps.index[run_steps["stage"] == 2][0]
assert first_of_2 == len(steps[0]) + 1
assert _apart([1.0, 3.0, 1.1], gap=0.5).tolist() == [1.0, 3.0, 1.5]
{"steps": len(run_steps), "first step of stage 2": int(first_of_2)}


# %%
#| export
def plot_loss(
    metrics: pd.DataFrame, # stage, loss; one row per optimizer step
    name: str=None,        # of another loss than DPO's, which need not start at ln 2
) -> plt.Figure:
    "Loss of each optimizer step, stages side by side; ln 2 is where a stage starts when policy = reference."
    steps = _whole_run(metrics)
    colors = _model_colors(steps["stage"].nunique())[1:]
    fig, ax = plt.subplots(figsize=(6.5, 2.8))
    for color, (_, rows) in zip(colors, steps.groupby("stage")):
        smooth = rows["loss"].rolling(_window(rows), min_periods=1, center=True).median()
        ax.plot(rows.index, rows["loss"], color=color, lw=0.8, alpha=0.5)
        ax.plot(rows.index, smooth, color=color, lw=2.2)
    ax.set(ylabel=f"{name or 'DPO loss (nats)'}\n←  better, within a stage")
    if name is None: ax.axhline(math.log(2), color="black", lw=1, ls=":")
    _step_axis(ax, steps)
    if name is None: _label_lines(ax, [math.log(2)], ["ln 2"], ["black"])
    return fig


# %%
assert (abs(metrics.groupby("stage")["loss"].first() - math.log(2)) < 1e-4).all()
plot_loss(metrics);


# %% [markdown]
# What to see: both stages start at (1), the second *again*, because it has a new reference, the model it starts from. The losses of two stages are distances from two different references.
# So compare losses within a stage only.
#
# ## Does it prefer the chosen responses?
#
# $\gamma$ is the log-probability of the chosen response minus that of the rejected one. It needs no reference, so it *can* be compared across stages. One panel per chunk, one box per model: the line is the median, the dot the mean (the paper's
# $\gamma_{ref}$ is a mean), the box holds half of the pairs, and the whiskers nearly all. A box is hollow while its model has not been trained on this chunk.

# %%
#| export
def _as_formula(model):
    "M_12 as the formula M with the index 12; another name as it is."
    return re.sub(r"^([A-Z])_(\d+)$", r"$\1_{\2}$", model)

def _in_order(frame, column):
    "The names in a column, in their order. Raises ValueError where there are none."
    if frame.empty: raise ValueError(f"{column}: no rows to draw")
    return list(dict.fromkeys(frame[column]))

def _panels(n, width, height, margin, **more):
    "A figure with n panels that share y, at most four beside each other; sizes in inches."
    across = min(4, n)
    down = math.ceil(n / across)
    size = (width * across + margin, height * down)
    more |= dict(sharey=True, squeeze=False, layout="constrained")
    fig, axes = plt.subplots(down, across, figsize=size, **more)
    for ax in axes.flat[n:]: ax.remove()
    return fig, list(axes.flat[:n])

def _boxes(gammas, models, ax, **look):
    "Boxes of some of the models, each in its place and colour."
    if not len(gammas): return
    dot = dict(marker="o", markerfacecolor="white", markeredgecolor="black", markersize=5)
    sns.boxplot(
        gammas, x="model", y="gamma", hue="model", order=models, hue_order=models,
        palette=_model_colors(len(models) - 1), saturation=1, legend=False,
        showfliers=False, showmeans=True, meanprops=dot, ax=ax, **look,
    )

def plot_gamma(
    gammas: pd.DataFrame, # model, chunk, gamma: one row per pair; chunks in the order of training
) -> plt.Figure:
    """Distribution of gamma under every model of a run (from M_0 on), one panel per chunk;
    hollow where the model was not yet trained on it."""
    chunks, models = _in_order(gammas, "chunk"), _in_order(gammas, "model")
    fig, axes = _panels(len(chunks), 2.9, 2.8, 0.6)
    for t, (ax, chunk) in enumerate(zip(axes, chunks), 1):
        of_chunk = gammas[gammas["chunk"] == chunk]
        not_yet = of_chunk["model"].isin(models[:t])
        _boxes(of_chunk[not_yet], models, ax, fill=False)
        _boxes(of_chunk[~not_yet], models, ax, medianprops=dict(color="white"))
        ax.axhline(0, color="black", lw=1, ls=":")
        ax.set(title=chunk, xlabel="", ylabel="$\\gamma$ (nats)\nprefers chosen  →")
        ax.set_xticks(range(len(models)), [_as_formula(m) for m in models])
    fig.supxlabel("filled: trained on this chunk; hollow: not yet", fontsize="medium")
    sns.despine(fig)
    return fig


# %% [markdown]
# Each model has read all pairs of both chunks. Before you look: $M_1$ was trained on the first chunk only. What will its box do on the second?

# %%
parts = []
for t, name in enumerate(plan.names):
    for model, table in tables.items():
        values = table.gamma(plan.chunk(t)).numpy()
        parts.append(pd.DataFrame(dict(model=model, chunk=f"chunk {t+1}: {name}", gamma=values)))
gammas = pd.concat(parts)

# %%
assert _as_formula("M_12") == "$M_{12}$"
assert _as_formula("my_model") == "my_model"
plot_gamma(gammas);


# %% [markdown]
# What to see: in the right panel the hollow box of $M_1$ is above that of $M_0$. On pairs that it has *not* been trained on, the model moved up. $M_1$ is the reference of stage 2, so the mean of
# this box is the $\gamma_{ref}$ of stage 2: the reference is better than S would be. The filled box of $M_2$ says less, because $M_2$ was trained on these pairs.
#
# ### Small changes
#
# Pairs differ far more from each other than a model differs from the one before it. With real pairs a box reaches from -250 to 150 nats, and a gain of 4 cannot be seen in it. But the pairs are the same for every model. So look at what changed, pair by pair, and
# at the mean of that with its 95 % interval.

# %%
#| export
def plot_change(
    gammas: pd.DataFrame, # model, chunk, gamma: one row per pair; chunks in the order of training
) -> plt.Figure:
    """Mean change of gamma since M_0 on every chunk, with 95 % intervals; hollow where the model was not yet
    trained on it. For every model (from M_0 on) the same pairs in the same order. Six chunks or more: a panel for each.
    Raises ValueError for a chunk that two models were asked about with another number of pairs."""
    models, chunks = _in_order(gammas, "model"), _in_order(gammas, "chunk")
    gamma_of = {}
    for key, rows in gammas.groupby(["model", "chunk"], sort=False):
        gamma_of[key] = rows["gamma"].to_numpy()

    together = len(chunks) < 6                               # of more lines, nobody could say which is which
    if together:
        fig, ax = plt.subplots(figsize=(6.5, 3))
        axes = [ax] * len(chunks)
    else:
        fig, axes = _panels(len(chunks), 2.9, 2.4, 0.6)
    colors = _model_colors(max(len(models) - 1, len(chunks)))[1:]
    ends = []
    for t, (ax, chunk, color) in enumerate(zip(axes, chunks, colors), 1):
        x, changes = [], []
        beside = 0.06 * (t - (len(chunks) + 1) / 2) if together else 0   # or the intervals hide each other
        if not together: ax.set_title(chunk)
        for s, model in enumerate(models):
            if (model, chunk) not in gamma_of or (models[0], chunk) not in gamma_of: continue
            before, after = gamma_of[models[0], chunk], gamma_of[model, chunk]
            if len(after) != len(before):
                pairs = f"{len(before)} under {models[0]}, {len(after)} under {model}"
                raise ValueError(f"{chunk}: not the same pairs, {pairs}")
            x.append(s + beside)
            changes.append(mean_interval(after - before))
            fill = color if s >= t else "white"
            ax.plot(x[-1], changes[-1][0], "o", color=color, mfc=fill, ms=6, zorder=3)
        if not changes: continue
        mean, low, high = np.array(changes).T
        ax.errorbar(x, mean, [mean - low, high - mean], color=color, capsize=3, lw=1.5)
        ends.append((mean[-1], chunk, color))
    for ax in fig.axes:
        ax.axhline(0, color="black", lw=1, ls=":")
        ax.set_xticks(range(len(models)), ["S", *range(1, len(models))])
    when, change = "after stage", "change of $\\gamma$ since S (nats)\nbetter  →"
    if together:
        ax.set(xlabel=when, ylabel=change)
        if ends: _label_lines(ax, *zip(*ends))
    else:
        fig.supxlabel(when, fontsize="medium")
        fig.supylabel(change, fontsize="medium")
    sns.despine(fig)
    return fig


# %%
by_model = gammas.groupby(["chunk", "model"])["gamma"].mean().unstack()
assert (by_model.diff(axis=1).iloc[:, 1:] > 0).all(axis=None)
plot_change(gammas);


# %% [markdown]
# What to see: both lines rise at every stage, also the one of chunk 2 during stage 1, when only chunk 1 was trained on.
#
# ### Models that are no stages
#
# Models may also come from elsewhere: two trainers, three learning rates. Then there is no order from left to right, and names are longer than a number. So the models are rows, and each source is a panel. The dotted line is the model that all are compared with.

# %%
#| export
def plot_models(
    changes: pd.DataFrame, # source, model; change of gamma since the first model (nats): mean, low, high
    first: str="the first model", # what the others are compared with
) -> plt.Figure:
    "Mean change of gamma with its 95 % interval: a row for each model, a panel for each source."
    models, sources = _in_order(changes, "model"), _in_order(changes, "source")
    fig, axes = _panels(len(sources), 2.4, 0.4 * len(models) + 1.2, 1.6, sharex=True)
    for ax, source in zip(axes, sources):
        rows = changes[changes["source"] == source].set_index("model").reindex(models)
        y, mean = range(len(models)), rows["mean"]
        ax.errorbar(mean, y, xerr=[mean - rows["low"], rows["high"] - mean], fmt="o", color="black", capsize=3)
        ax.axvline(0, color="black", lw=1, ls=":")
        ax.set(title=source, yticks=list(y), yticklabels=models, ylim=(len(models) - 0.5, -0.5))
        ax.tick_params(labelbottom=True)      # also where no panel is below
    fig.supxlabel(f"change of $\\gamma$ since {first} (nats)\nbetter  →", fontsize="medium")
    sns.despine(fig)
    return fig


# %% [markdown]
# The two stages again, as if they were two models that somebody sent us:

# %%
def changed_by(model, t):
    "One row of the figure: a model on the pairs of a chunk."
    pairs = plan.chunk(t)
    mean, low, high = mean_interval(tables[model].gamma(pairs) - tables["M_0"].gamma(pairs))
    named = {"M_1": "one stage", "M_2": "two stages"}[model]
    return dict(source=plan.names[t], model=named, mean=mean, low=low, high=high)

changes = pd.DataFrame([changed_by(model, t) for t in (0, 1) for model in ("M_1", "M_2")])
assert (changes["low"] > 0).all()
plot_models(changes, "S");


# %% [markdown]
# What to see: no interval reaches the dotted line, so each of the two is better than S on both sources. The second is further from S than the first.
#
# ## How did it get there?
#
# The loss knows only the gap between two log-ratios,
#
# $$\gamma_\theta - \gamma_{ref} = \log\frac{\pi_\theta(y_w|x)}{\pi_{ref}(y_w|x)} - \log\frac{\pi_\theta(y_l|x)}{\pi_{ref}(y_l|x)}. \tag{2}$$
#
# Here $x$ is the prompt, $y_w$ the chosen response and $y_l$ the rejected one; $\pi_\theta$ is the policy and $\pi_{ref}$ the reference. So the loss is content when the chosen response becomes *less* likely, as long as the rejected one loses more. The commonest question about DPO is "why is chosen falling?", and the
# first answer is to plot the two log-ratios apart.

# %%
#| export
def plot_drift(
    metrics: pd.DataFrame, # stage, logratio_chosen, logratio_rejected (nats); one row per optimizer step
) -> plt.Figure:
    "log pi_theta / pi_ref of chosen and of rejected responses: DPO needs the gap, not a rise of the chosen."
    steps = _whole_run(metrics)
    fig, ax = plt.subplots(figsize=(6.5, 2.8))
    for _, rows in steps.groupby("stage"):
        running = rows[["logratio_chosen", "logratio_rejected"]].rolling(_window(rows), min_periods=1).mean()
        chosen, rejected = running["logratio_chosen"], running["logratio_rejected"]
        ax.fill_between(rows.index, chosen, rejected, color="0.92", lw=0)
        ax.plot(rows.index, chosen, color=CHOSEN, lw=2)
        ax.plot(rows.index, rejected, color=REJECTED, lw=2)
    ax.axhline(0, color="black", lw=1, ls=":")
    ax.set(ylabel="$\\log\\,\\pi_\\theta/\\pi_{ref}$ (nats)\nlikelier than before  →")
    _step_axis(ax, steps)
    high, low = chosen.iloc[-1], rejected.iloc[-1]
    names, colors = ["chosen", "gap", "rejected"], [CHOSEN, "0.5", REJECTED]
    _label_lines(ax, [high, (high + low) / 2, low], names, colors)
    return fig


# %%
second_epoch = metrics[metrics["epoch"] == 1]
late = second_epoch.groupby("stage")["logratio_chosen"].mean()
assert abs(late[1]) < 0.2
assert late[2] < -0.2
gap = metrics["logratio_chosen"] - metrics["logratio_rejected"]
assert (metrics["margin"] - config.beta * gap).abs().max() < 1e-4   # (2), times beta
plot_drift(metrics);


# %% [markdown]
# What to see: both stages start at zero, because each has a new reference. Then the gap opens *downwards*. In stage 1 the chosen side stays near where it was. In stage 2 it falls,
# and the loss, which knows only (2), goes down all the same.
#
# ### Averages hide pairs
#
# Look at the pairs of each chunk, before and after its stage. In how many did the gap grow, and in how many of those did the chosen response fall?

# %%
def moved(t):
    "What stage t did to the pairs of its chunk."
    pairs = plan.chunk(t - 1)
    before = torch.stack(tables[f"M_{t-1}"].lookup(pairs))
    after = torch.stack(tables[f"M_{t}"].lookup(pairs))
    chosen, rejected = after - before
    grew = chosen > rejected
    fell = chosen[grew] < 0
    return {
        "gap grew (share)": grew.float().mean().item(),
        "of these, chosen fell (share)": fell.float().mean().item(),
        "mean change of chosen (nats)": chosen.mean().item(),
        "of rejected (nats)": rejected.mean().item(),
    }

changed = pd.DataFrame([moved(1), moved(2)], index=plan.names)
assert (changed["gap grew (share)"] > 0.8).all()
assert changed.loc["digest", "mean change of chosen (nats)"] < 0
changed.round(2)

# %% [markdown]
# In a fifth of these pairs in the first stage, and in two fifths in the second, the chosen response became *less* likely although the gap grew. This has been studied as
# *likelihood displacement* (arXiv 2410.08847). It comes with pairs whose two responses look alike to the model, so that pushing one down drags the other along. The probability goes to
# a third response that no label speaks about. Whether that one is better or worse, none of these figures can tell; [chapter 08](08_evaluate.ipynb) looks at the answers themselves.
#
# ## What you now have
#
# - Six functions, each from one data frame to one figure. The report of a run draws four of them: partition, loss, change and drift.
# - One meaning for each colour: two sides, and a scale of models.
# - An answer to "why is chosen falling?", and the figure that shows whether it is.
#
# ## Questions to test yourself
#
# 1. Stage 2 ends at a lower loss than stage 1. May one say that it learned more? Which figure would you look at instead?
#
# <details><summary>Answer</summary>
#
# No. The two losses are measured from two references. $\gamma$ needs none, so look at `plot_gamma` or `plot_change`.
#
# </details>
#
# 2. Why does the drift start at zero twice, and $\gamma$ not?
#
# <details><summary>Answer</summary>
#
# The drift is relative to the reference, and each stage begins as its own reference. $\gamma$ is a number of the model alone, so it goes on from where the last stage left it.
#
# </details>
#
# 3. In `plot_loss` the second stage of some run starts far above $\ln 2$. What does that say about its policy and its reference?
#
# <details><summary>Answer</summary>
#
# They are not the same model. The stage started from other weights than those whose log-probabilities are in the table; on this batch its gap (2) is negative.
#
# </details>
#
# 4. Bar and diamond of `plot_partition` lie on either side of 0.5. What decided?
#
# <details><summary>Answer</summary>
#
# The length of the responses. In sum the model finds the shorter ones likelier, only because they have fewer tokens to pay for.
#
# </details>
#
# ## Try this
#
# - Train the second stage with `beta=3`, and look at the drift.
#
# <details><summary>What you should see</summary>
#
# The chosen side no longer falls. In the second epoch of stage 2 its mean log-ratio is +0.1 instead of -0.4, and that of rejected is -0.9 instead of -2.3. A larger $\beta$ holds the policy nearer to its reference, on both sides.
#
# </details>
#
# - Swap the two chunks, and compare the boxes of $M_2$.
#
# <details><summary>What you should see</summary>
#
# Both means (the dots) are a little lower than in this chapter: 4.4 on `primer`, 3.4 on `digest`. In so small a run that is no verdict on the order; chapter [how to partition](experiments/how_to_partition.ipynb) asks properly.
#
# </details>
#
# - Draw `plot_gamma` of `riddle`, which neither stage has seen: score its pairs after each stage, and add them as a third chunk.
#
# <details><summary>What you should see</summary>
#
# Its mean rises all the same, from 0.5 to 1.3 to 2.4. What the two stages taught carries over, and all boxes of `riddle` are hollow.
#
# </details>
