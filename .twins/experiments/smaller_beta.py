# %% [markdown]
# # Is stepwise DPO just DPO with a smaller beta?
# > T stages at beta against one at beta / T: exactly, where theory has an answer, and in a model that is far from any optimum.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/smaller_beta.ipynb)
#
# **At the optimum, yes. After three passes over noisy data, not quite: stages are worse, by up to 0.04.** If every stage finds the same reward and is trained to its optimum, $T$ stages at $\beta$ are one stage at $\beta/T$, whether or not they share prompts; trained here on the same prompts, to 1e-6 nats. In a language model, from $\beta = 0.6$ down, $T$ stages end below DPO at $\beta/T$ in six of eight comparisons (the same six after Holm's correction for eight), by 0.041 [0.025, 0.057] of true reward at most (five stages, same prompts). In two we cannot tell (two and three stages with prompts of their own).
#
# "The same within $\pm 0.02$" is shown at no $T$. The numbers of the language model are from ten worlds with two seeds each.
#
# **You should know** the [closed form](../03_loss.ipynb) and the [protocol](protocol.ipynb). **Time** 28 minutes to read, a few seconds to run. The grid behind the second part took 1.4 core hours (`make experiments`).
#
# <details><summary>Words used on this page</summary>
#
# - **S** is the model before alignment. **DPO** trains it on all pairs at once, with S as its *reference*, the fixed model that the loss measures from. **Stepwise DPO** trains in $T$ stages, one for each *chunk* of the pairs; the model of the stage before is the next reference.
# - **$\beta$** says how strongly a model is held at its reference. A smaller $\beta$ lets it go farther.
# - **KL** is the distance of a model from S, in nats, measured along its own answers.
# - **True reward** is 1 for the right answer and less for every letter that has to be mended; *sampled* answers are drawn from the model.
# - **Bradley-Terry** is the rule by which labels are drawn: the better of two responses is preferred with probability $1/(1 + e^{-k \Delta r})$, where $\Delta r$ is the difference of true rewards and $k = 6$ here.
# - **-0.041 [-0.057, -0.025]** is a mean and its 95 % interval. Differences are *paired*: same worlds, seeds and prompts.
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
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from sdpo_nb.cells import learning_rate_sum
from sdpo_nb.compare import difference_intervals, outcome_values, paired_difference, plot_contrasts
from sdpo_nb.compare import tested_differences
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.loss import bradley_terry, optimal_policy, population_loss
from sdpo_nb.questions import STAGE_COUNTS, chosen_settings, load_grid
from sdpo_nb.world import K, enumerable_world, true_reward

# %% [markdown]
# ## What theory says
#
# Suppose a stage finds the true reward $r$ of every response and is trained to its optimum. Then it multiplies its reference by $e^{kr/\beta}$ ([chapter 03](../03_loss.ipynb)). Each stage multiplies what the stage before has left. So if all $T$ stages find the *same* reward, they end in
#
# $$M_T \propto S\,e^{T k r/\beta}, \tag{1}$$
#
# whatever their order, and that is one stage at $\beta/T$. In words: log-ratios add up, $\log M_T/S$ is the sum of $T$ rewards over $\beta$.
#
# The simplest way to find the same reward is to see the same prompts. (It is not the only one: features that all prompts share [do as well](finite_data.ipynb), exactly.) The simplest way to miss it is to have prompts of one's *own* in every stage, when nothing learned on one prompt carries over to another. Then each prompt is met once, and $T$ stages at $\beta$ are one stage at $\beta$. A real model lies between: its prompts are different, and it shares what it learns.
#
# Both ends can be checked where all responses can be listed. Here are eight prompts about strings of a and b, with the fourteen responses of the [enumerable world](../00_world.ipynb).

# %%
strings = ("ba", "aba", "bba")
prompts = [f"{skill} {s}" for skill in ("copy", "reverse", "sort") for s in strings][:8]
responses = enumerable_world().responses
r = torch.tensor([[true_reward(p, y) for y in responses] for p in prompts], dtype=torch.float64)
wins = bradley_terry(r, K)                             # how often each response beats each other


# %% [markdown]
# A stage is *trained*, not computed from (1). It sees every comparison of its prompts as often as Bradley-Terry draws it (which is what endless resampling would show), and runs from its reference until nothing moves.

# %%
def train_stage(log_ref, rows, beta):
    "DPO on the comparisons of these prompts, from the reference to convergence."
    log_pi = log_ref[rows].clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [log_pi], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = population_loss(log_pi.log_softmax(-1), log_ref[rows], wins[rows], beta)
        loss.backward()
        return loss

    optimizer.step(closure)
    new = log_ref.clone()
    new[rows] = log_pi.detach().log_softmax(-1)
    return new

def train_stages(log_S, chunks, beta):
    log_pi = log_S
    for rows in chunks:
        log_pi = train_stage(log_pi, rows, beta)
    return log_pi


# %% [markdown]
# Is (1) what comes out? For every $T$, with the same eight prompts in every stage and with prompts of its own in each:

# %%
generator = torch.Generator().manual_seed(0)
log_S = torch.randn(8, len(responses), dtype=torch.float64, generator=generator).log_softmax(-1)
everything = list(range(8))

def same(T): return [everything] * T
def own(T): return [everything[t::T] for t in range(T)]

def error(chunks, beta):
    "Largest error of a log-probability when one stage at `beta` is expected; all stages have 6."
    trained = train_stages(log_S, chunks, 6.)
    expected = optimal_policy(log_S, K * r, beta)
    return (trained - expected).abs().max().item()

errors = {}
for T in STAGE_COUNTS:
    errors[T] = {
        "same prompts, from S exp(T k r / beta)": error(same(T), 6. / T),
        "own prompts, from S exp(k r / beta)": error(own(T), 6.),
    }
errors = pd.DataFrame(errors).rename_axis("largest error of a log-probability, nats; T =")
assert errors.max(axis=None) < 1e-6
errors.map("{:.0e}".format)


# %% [markdown]
# Now a picture of the same. On the horizontal axis is $\beta/T$, so that (1) becomes one curve. Where will the stages with prompts of their own lie?

# %%
def reward_and_kl(log_pi):
    pi = log_pi.exp()
    return {
        "reward": (pi * r).sum(1).mean().item(),
        "kl": (pi * (log_pi - log_S)).sum(1).mean().item(),
    }

curve = []
for x in np.geomspace(0.5, 24, 40):
    curve.append({"x": x} | reward_and_kl(optimal_policy(log_S, K * r, x)))
curve = pd.DataFrame(curve)

dots = []
for beta in (6., 12.):
    for T in STAGE_COUNTS:
        for kind, chunks in (("same", same(T)), ("own", own(T))):
            trained = train_stages(log_S, chunks, beta)
            dots.append({"x": beta / T, "kind": kind} | reward_and_kl(trained))
dots = pd.DataFrame(dots)

# %%
LOOKS = {"same": ("o", "C0"), "own": ("x", "C1")}
AXES = {"reward": "true reward\nbetter →", "kl": "KL from S (nats)\nfarther →"}
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4), constrained_layout=True)
for ax, (what, label) in zip(axes, AXES.items()):
    ax.plot(curve["x"], curve[what], color="black", lw=1.5)
    for kind, (marker, color) in LOOKS.items():
        rows = dots[dots["kind"] == kind]
        ax.plot(rows["x"], rows[what], marker, color=color, ms=7)
    ax.set(xscale="log", xlabel=r"$\beta / T$ (per nat)", ylabel=label)
axes[0].annotate(r"one stage at $\beta/T$", (0.7, 0.9))
axes[0].annotate("T stages, the same prompts", (1.7, 0.72), color="C0")
axes[0].annotate("T stages, own prompts", (0.5, 0.6), color="C1")
sns.despine(fig)

# %% [markdown]
# Stages on the same prompts (circles) fall onto the curve of the optimum. Stages on prompts of their own (crosses) do not: whatever $T$ is, they stay at the height of their $\beta$, which is 6 for one row and 12 for the other.
#
# ## What happens in a language model
#
# Now the tiny world: a language model, three passes over noisy labels, far from any optimum. Chunks are of two kinds.
#
# - *Prompts of its own*: the pairs of the three sources, about 1,440, are cut at random into $T$. Chunks share no prompt, but all skills.
# - *Same prompts*: every $T$-th prompt, answered by S anew for each stage. That makes a little over 900 pairs for every $T$.
#
# $\beta$ and learning rate are those that the search chose for DPO. Every smaller $\beta$ is therefore on the far side of the best, where going farther is *worse*. (In the exact part, farther was always better.)
#
# The opponent, DPO at $\beta/T$, sees the same pairs three times, too. But one thing is not equal. $T$ chunks end in $T$ smaller batches, which makes more steps, and they warm up $T$ times. So the learning rates of the stages add up to more, which pushes them farther. By how much more?

# %%
found = load_grid("smaller_beta")
KINDS = {"same prompts": "same prompts in every stage", "sources": "prompts of its own"}

def rows_of(method, T, data):
    if T == 1: return found["DPO at beta"]
    if method == "DPO": return found[f"DPO at beta/{T}, {data}"]
    return found[f"sDPO, T = {T}, {data}"]

def mean_rate_sum(rows):
    "Sum of the learning rates of a run, in units of the peak."
    return np.mean([learning_rate_sum(steps) for steps in rows["steps"]])

more = {}
for data, kind in KINDS.items():
    more[kind] = {}
    for T in STAGE_COUNTS[1:]:
        stages, dpo = mean_rate_sum(rows_of("sDPO", T, data)), mean_rate_sum(rows_of("DPO", T, data))
        more[kind][f"T = {T}"] = f"{stages / dpo - 1:.0%}"
pd.DataFrame(more).rename_axis("more learning rate in sum than DPO")


# %% [markdown]
# "One curve" would mean that at every $T$ the whole interval of the difference lies within $\pm 0.02$, the grey band.

# %%
def stages_minus_dpo(T, data, what):
    return paired_difference(rows_of("sDPO", T, data), rows_of("DPO", T, data), what)

compared = {}
for data, kind in KINDS.items():
    for T in STAGE_COUNTS[1:]:
        compared[f"T = {T}, {kind}"] = stages_minus_dpo(T, data, "sampled")
gap = tested_differences(compared)
different = (gap["high"] < 0) | (gap["low"] > 0)
assert (gap["mean"] < 0).all()
assert (gap["low"] < -0.02).all()
assert different.sum() == 6
assert ((gap["holm"] < 0.05) == different).all()
plot_contrasts(gap, r"true reward of T stages at $\beta$, minus DPO at $\beta/T$ (grey: equal)",
               sides=("DPO better", "stages better"));

# %% [markdown]
# All eight means are below zero, six of them clearly, also after Holm's correction for eight. Theory has two answers: $\beta/T$ where every stage finds the same reward, and $\beta$ for prompts that share nothing. Are prompts of their own near the second? The same runs, as levels:

# %%
beta = chosen_settings()["DPO"]["beta"]
levels = []
for T in STAGE_COUNTS:
    for data, kind in KINDS.items():
        for method in ("DPO", "sDPO"):
            if T == 1 and data != "sources": continue  # DPO at beta was run on the sources only
            rows = rows_of(method, T, data)
            levels.append({
                "T": T, "prompts": kind, "method": method,
                "sampled": outcome_values(rows, "sampled").mean(),
                "kl": outcome_values(rows, "kl").mean(),
            })
levels = pd.DataFrame(levels)

# %%
LINES = {  # method, prompts -> label, colour, line, height of the label left and right
    ("DPO", "prompts of its own"): (r"DPO at $\beta/T$, all pairs", "0.3", "-", 2, 5),
    ("DPO", "same prompts in every stage"): (r"DPO at $\beta/T$, fewer prompts", "0.3", ":", 4, -5),
    ("sDPO", "prompts of its own"): ("T stages, own prompts", "C1", "-", -8, -4),
    ("sDPO", "same prompts in every stage"): ("T stages, same prompts", "C0", ":", -2, 4),
}
AXES = {"sampled": "true reward, sampled\n← worse      better →", "kl": "KL from S (nats)\nfarther →"}
fig, axes = plt.subplots(1, 2, figsize=(11.5, 3.6), constrained_layout=True)
for (method, kind), (label, color, line, *heights) in LINES.items():
    rows = levels[(levels["method"] == method) & (levels["prompts"] == kind)]
    for ax, what, height in zip(axes, AXES, heights):
        ax.plot(rows["T"], rows[what], "o", ls=line, color=color)
        ax.annotate(label, (8, rows[what].iloc[-1]), xytext=(8, height - 3), textcoords="offset points",
                    color=color, fontsize="small")
for ax, (what, label) in zip(axes, AXES.items()):
    ax.set(xscale="log", xlim=(0.95, 21), ylabel=label)
    ax.set_xlabel(r"T: number of stages, or what $\beta$ is divided by")
    ax.set_xticks(STAGE_COUNTS, [str(T) for T in STAGE_COUNTS])
    ax.minorticks_off()
sns.despine(fig)

# %% [markdown]
# The black lines are DPO at smaller and smaller $\beta$. Prompts of their own do *not* stay at $\beta$: if they did, the orange lines would be flat. These stages share skills, and end near $\beta/T$ or below it. And the same prompts (blue) are not nearer to their black line than the others; one reason may be that they have 900 pairs and not 1,440.
#
# Are stages farther from S than DPO at $\beta/T$, too?

# %%
farther = {}
for data, kind in KINDS.items():
    kl = {T: interval(stages_minus_dpo(T, data, "kl")) for T in STAGE_COUNTS[1:]}
    farther[kind] = {f"T = {T}": as_text(found) for T, found in kl.items()}
pd.DataFrame(farther).rename_axis("KL from S, stages minus DPO at beta/T (nats)")

# %% [markdown]
# In the mean always; clearly in three of eight.
#
# Stages warm up $T$ times, as said above. Does that take them farther? For $T = 3$ we can tell: [why it works](why_it_works.ipynb) has the same stages, and beside them stages with one schedule for all.

# %%
parts = load_grid("why_it_works")
restarted, one_schedule = parts["moving, random, stage"], parts["moving, random, never"]
same_runs = outcome_values(rows_of("sDPO", 3, "sources"), "kl")
assert (outcome_values(restarted, "kl") == same_runs).all()

dpo = rows_of("DPO", 3, "sources")
told_apart = difference_intervals({
    "three stages, minus DPO at beta/3": paired_difference(restarted, dpo, "kl"),
    " with one schedule": paired_difference(one_schedule, dpo, "kl"),
    "restarts: the first minus the second": paired_difference(restarted, one_schedule, "kl"),
})
assert (told_apart["low"] > 0).tolist() == [False, False, True]
assert told_apart["mean"][1] < 0 < told_apart["high"][1]
told_apart.set_index("question").round(2).rename_axis("KL from S (nats)")

# %% [markdown]
# Restarts take three stages 0.72 nats farther, which is more than the whole mean difference. Without them the mean is below zero, and the interval reaches far to both sides. So at $T = 3$ nothing is seen that is not restarts. Reward is hardly touched: restarts change it by -0.004 [-0.019, 0.011]. (The other $T$ were not run with one schedule.)
#
# Why farther, and worse? Each stage learns the reward from a $T$-th of the pairs. With few pairs a reward is overestimated and noisy, and (1) adds up $T$ of them. DPO at $\beta/T$ learns one reward from all pairs. If that is the reason, the gap must shrink with more pairs for each stage; this page does not test it. [The next one](finite_data.ipynb) derives the law. A [first test of it](finite_data_tested.ipynb) passed few pairs so often that they were known by heart, and found the opposite there. A second one, with three passes, has the signs of the law: stages go 8 to 29 % farther. But it cannot tell the law from restarts.
#
# So, as a rule of thumb for this world: *expect $T$ stages at $\beta$ to have gone about as far as one at $\beta/T$, or farther, and raise $\beta$ with $T$.* The search did so: 0.6 for DPO and 1.2 for three stages (and it took a smaller learning rate with it).
#
# ## What this does not show
#
# - **What $\beta$ to take for another model.** Here the scale of the rewards is known, $k = 6$. In the paper's models it is not.
# - **The near side of the best $\beta$.** All runs of the language model have $\beta$ of 0.6 or less, and DPO's learning rate.
# - **The reason for the gap.** For that the number of pairs for each stage would have to be varied.
#
# ## What you now have
#
# - Equation (1), trained and not only derived, and its counterpart for prompts that share nothing.
# - The same comparison in a language model far from the optimum: off the curve, in one direction.
#
# ## Questions to test yourself
#
# 1. In the first figure, why do crosses of one $\beta$ lie on a horizontal line?
# <details><summary>Answer</summary>
#
# Every prompt is met by one stage only, at $\beta$. The number of stages only decides which one.
# </details>
#
# 2. Why can chunks that share no prompt still add up?
# <details><summary>Answer</summary>
#
# The model shares weights between prompts. What a stage learns about sorting holds for all strings, so the next stage starts from it and finds the same reward again.
# </details>
#
# 3. In the first figure the reward rises where $\beta/T$ gets smaller, in the last it falls. Why?
# <details><summary>Answer</summary>
#
# In the first, the labels of every comparison are known as often as they occur, so the reward is exact and farther is better. In the last it is learned from few noisy labels; beyond the best $\beta$ the model follows the errors.
# </details>
#
# ## Try this
#
# - In the exact part, swap two stages: `own(2)` against `own(2)[::-1]`. Does anything change?
# <details><summary>What you should see</summary>
#
# No, to the last bit. The two stages touch different prompts; for a table of log-probabilities neither sees what the other did.
# </details>
#
# - Two stages on the same prompts, the first at $\beta = 6$, the second at $\beta = 12$. Which one stage are they?
# <details><summary>What you should see</summary>
#
# One stage at $\beta = 4$: log-ratios add up, and $1/6 + 1/12 = 1/4$. `optimal_policy(log_S, K * r, 4.)` agrees within 1e-7 nats.
# </details>
