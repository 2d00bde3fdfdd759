# %% [markdown]
# # New data between the stages
# > Pairs that the current model writes, against as many that S writes; labels from the truth, from a judge who errs, and from the model itself.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/with_new_data.ipynb)
#
# **New pairs help a little, if the labels know the truth.** With true labels, three stages on pairs that the model of the stage before wrote reach the reward of three stages on pairs of S (-0.004 [-0.010, 0.003]), at two thirds of the distance from S. At a larger $\beta$, which brings the pairs of S to that distance, these are behind by 0.008 [0.002, 0.015].
#
# If the model labels by its own implicit reward, stages 2 and 3 together gain 0.065 [0.040, 0.092] on pairs of S and 0.010 [-0.018, 0.040] on pairs of its own, where true labels bring 0.12. By stage 3, half of its labels of its own pairs are wrong. All numbers are from ten worlds with two seeds each.
#
# **You should know** [stepwise DPO](../14_stepwise.ipynb), there the setting `chunks` as a function, and the [protocol](protocol.ipynb). **Time** 23 minutes to read, a few seconds to run. The grid behind it took 1.5 core hours (`make experiments`).
#
# <details><summary>Words used on this page</summary>
#
# - **S** is the model before alignment. **Stepwise DPO** trains in *stages*, one for each *chunk* of pairs; $M_t$ is the model after stage $t$. Stage $t$ starts from $M_{t-1}$ and has it as its *reference*, the fixed model that the loss measures from.
# - **Pair**: a prompt with two answers. The *label* says which one is chosen.
# - **$\beta$** says how strongly a model is held at its reference. **KL** is the distance from S, in nats, along the model's own answers.
# - **Implicit reward** of an answer: how much likelier the model finds it than S does, $\log M - \log S$.
# - **True reward** is 1 for the right answer and less for every letter that has to be mended. *Sampled* answers are drawn; a *greedy* answer takes the likeliest letter at every place.
# - **-0.004 [-0.010, 0.003]** is a mean and its 95 % interval. Differences are *paired*: same worlds, seeds and prompts. *Equal* means that the whole interval lies within $\pm 0.02$, the grey band in the figures.
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
from sdpo_nb.cells import unfold_column
from sdpo_nb.compare import OUTCOMES, difference_intervals, outcome_means, paired_difference, plot_outcomes
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.questions import load_grid

# %% [markdown]
# ## Who writes, who labels?
#
# The paper names iterative generation of data as a partner of its stages and does not try it. Here are three stages with some 500 prompts each, a third of all, at the settings that were best for stepwise DPO on the usual pairs ($\beta = 1.2$). Every prompt is answered twice.
#
# The *writer* is S in all stages; or it is S in stage 1 and then the model $M_{t-1}$ that the stage starts from, *M* for short.
#
# *Labels* are one of four:
#
# - *true*: by Bradley-Terry on the true reward, as everywhere in this book. It prefers the better response, and errs where two responses are close;
# - *judge, 0 % wrong*: always the better response;
# - *judge, 20 % wrong*: the better response, but in a fifth of the cases the other, in stage 1 as well;
# - *implicit*: true in stage 1; then the response with the higher implicit reward, $\log M_{t-1} - \log S$. It asks nobody.
#
# Two equal answers make no pair. So S makes 300 pairs of 500 prompts, and M, which has become surer, makes fewer. Where that could matter there is a third writer: S with *as many* pairs, drawn at random, as the model of that very run would have written.
#
# Before you look: whose pairs will be better with true labels? And whose with implicit ones?

# %%
found = load_grid("with_new_data")
LABELS = ("true", "judge, 0 % wrong", "judge, 20 % wrong", "implicit")
WRITERS = {"S": "S", "policy": "M"}                    # name in the grid -> here

def minus(a, b, what):
    return paired_difference(found[a], found[b], what)

COMPARED = {label: (f"policy, {label}", f"S, {label}") for label in LABELS}
for label in LABELS[:2]:
    COMPARED[f"{label}, as many pairs"] = (f"policy, {label}", f"S, as many, {label}")

fresh = {}
for what in OUTCOMES:
    fresh[what] = difference_intervals({name: minus(*runs, what) for name, runs in COMPARED.items()})

# %%
plot_outcomes(fresh, "M writes minus S writes", sides=("pairs of S better", "pairs of M better"));

# %%
sampled = fresh["sampled"].set_index("question")
kl = fresh["kl"].set_index("question")
assert sampled.loc[["true", "true, as many pairs"], ["low", "high"]].abs().max(axis=None) < 0.02
assert sampled.loc["implicit", "high"] < 0
assert (kl["high"] < 0).sum() == 5
assert kl.loc["implicit", "low"] > 0

numbers = {}
for what, table in fresh.items():
    rows = table.set_index("question")[["mean", "low", "high"]]
    numbers[what] = {name: as_text(row) for name, row in zip(rows.index, rows.to_numpy())}
pd.DataFrame(numbers).rename_axis("M minus S")

# %% [markdown]
# With labels that know the truth (the first two), pairs of M bring as much sampled reward as pairs of S or a little more, greedy a little more, and they end nearer to S by a third. With the erring judge they end nearer, too. With the model's own labels they are clearly worse, and farther.
#
# ## Is it worth something to end nearer?
#
# A larger $\beta$ ends nearer, too. So the pairs of S were also run at twice and at four times the $\beta$, and are subtracted from the pairs of M at the usual one:

# %%
larger = {}
for label in LABELS[:2]:
    for factor in (2, 4):
        runs = (f"policy, {label}", f"S, {label}, {factor} beta")
        row = {what: interval(minus(*runs, what)) for what in OUTCOMES}
        larger[f"{label}: M minus S at {factor} times beta"] = row

true_labels = larger["true: M minus S at 2 times beta"]
judge = larger["judge, 0 % wrong: M minus S at 2 times beta"]
for row in (true_labels, judge):
    assert row["sampled"][1] > 0
    assert row["greedy"][1] > 0
_, low, high = true_labels["kl"]
assert low < 0 < high                                  # the same distance
assert judge["kl"][2] < 0                              # M is still nearer
pd.DataFrame(larger).T.map(as_text)

# %% [markdown]
# With true labels, the pairs of S come to the distance of M's at twice the $\beta$, and have lost something on the way: M is ahead by 0.008, sampled and greedy. With an errorless judge M at that $\beta$ is still nearer and ahead by 0.011; at four times the $\beta$ it is farther and ahead by 0.035. So at one distance it is somewhere between.
#
# ## Stage by stage
#
# Each line is $M_1$, $M_2$, $M_3$, from left to right. A good line goes up steeply: much reward for little distance.

# %%
COLORS = dict(zip(LABELS, ("C0", "C1", "C2", "C3")))
PLACES = {  # where the name of a line stands
    "true, S": (1.11, 0.838),
    "true, M": (0.78, 0.843),
    "judge, 0 % wrong, S": (1.36, 0.859),
    "judge, 0 % wrong, M": (0.84, 0.867),
    "judge, 20 % wrong, S and M": (0.2, 0.687),
    "implicit, S": (1.93, 0.793),
    "implicit, M": (2.29, 0.739),
}
fig, ax = plt.subplots(figsize=(8, 4))
for labels in LABELS:
    for (writer, who), line in zip(WRITERS.items(), ("--", "-")):
        models = unfold_column(found[f"{writer}, {labels}"], "stages")
        path = models.groupby("stage")[["sampled", "kl"]].mean()
        inside = COLORS[labels] if who == "M" else "white"
        ax.plot(path["kl"], path["sampled"], "o", ls=line, color=COLORS[labels], mfc=inside)
for name, place in PLACES.items():
    labels, _ = name.rsplit(", ", 1)
    ax.annotate(name, place, color=COLORS[labels], fontsize="small")
ax.set(xlabel="KL from S (nats), farther →", xlim=(0, 2.6))
ax.set(ylabel="true reward, sampled\n← worse      better →")
ax.set_title("filled: M writes; hollow: S writes", fontsize="medium")
sns.despine(fig)


# %% [markdown]
# An erring judge is behind from the first stage. The implicit reward begins with true labels, so what it is worth is seen from $M_1$ on.
#
# In numbers, with the share of labels that were wrong in each stage, of those whose rewards differ (true labels are wrong in a tenth; see stage 1):

# %%
def by_stage(name):
    "Sampled reward: (stages, worlds, seeds, 1)."
    mean = unfold_column(found[name], "stages").groupby(["stage", "world", "seed"])["sampled"].mean()
    return np.stack([mean[t].unstack().to_numpy() for t in (1, 2, 3)])[..., None]

def wrong_labels(name):
    "By stage; only where labels are made on the way."
    return np.stack(found[name]["wrong_labels"]).mean(0)

gains = {}
for label in LABELS:
    for writer, who in WRITERS.items():
        M_1, M_2, M_3 = by_stage(f"{writer}, {label}")
        wrong = wrong_labels(f"{writer}, {label}") if label == "implicit" else []
        gains[f"{label}, written by {who}"] = {
            "M_3 minus M_1": as_text(interval(M_3 - M_1)),
            "M_2 minus M_1": as_text(interval(M_2 - M_1)),
            "M_3 minus M_2": as_text(interval(M_3 - M_2)),
            "wrong labels by stage": " ".join(f"{share:.0%}" for share in wrong),
        }

_, M_2, M_3 = by_stage("policy, implicit")
assert interval(M_3 - M_2)[2] < 0
pd.DataFrame(gains).T


# %% [markdown]
# In stage 2 one and the same model, $M_1$, labels either kind of pairs. It errs in a fifth of S's answers and in a third of its own. In stage 3 the model labels its own answers no better than a coin would, and that stage takes most of the second's gain back.
#
# The share of wrong labels is not all. On pairs of S the implicit reward errs as often as the erring judge. In stage 2 both gain 0.058; in stage 3 the implicit reward gains 0.007 [-0.005, 0.018] and the judge 0.035 [0.027, 0.043]. The errors of the judge fall anywhere, those of the model where it was mistaken already. (It is also farther from S by then, 0.9 against 0.4 nats, which could be the reason as well.)
#
# So without anybody to label, a second stage on answers of S still gained here. A third gained nothing that we could see, and doubled the distance.
#
# ## What is paid for
#
# A *label call* is one question to the truth or to the judge.

# %%
def counted(name):
    pairs = np.stack(found[name]["chunk_pairs"])       # (runs, stages)
    asked = pairs[:, 0] if name.endswith("implicit") else pairs.sum(1)
    return {
        "pairs by stage": " ".join(f"{p:.0f}" for p in pairs.mean(0)),
        "label calls": round(asked.mean()),
    }

table = outcome_means(found).join(pd.DataFrame({name: counted(name) for name in found}).T)
table.rename(lambda name: name.replace("policy", "M")).rename_axis("written by, labels")

# %% [markdown]
# Labels are what data cost, and the implicit reward saves two thirds of them. (The usual sources of a world are about 1,450 pairs, as more prompts were answered for them, and stepwise DPO reaches 0.871 with them.)
#
# ## What this does not show
#
# - **A model that judges by reading.** The implicit reward compares log-probabilities. A large model that is asked which answer is better may err elsewhere.
# - **Pairs from other models.** The paper's responses were written by others. Here S or its descendants write everything.
# - **The best settings for each writer.** All ran at those of stepwise DPO on the usual pairs, but for S at two larger $\beta$.
# - **More rounds.** Three stages, with a third of the prompts each.
#
# ## What you now have
#
# - Writer and labeller taken apart. With good labels the writer changes the distance and hardly the reward; with the model's own labels it changes both.
# - The number behind it: wrong labels, stage by stage.
#
# ## Questions to test yourself
#
# 1. Why does a sharper model write fewer pairs from the same prompts?
# <details><summary>Answer</summary>
#
# Its two answers to a prompt are more often the same, and two equal answers make no pair.
# </details>
#
# 2. The implicit reward agrees with $M_{t-1}$ by definition. What can a stage on such labels still change?
# <details><summary>Answer</summary>
#
# It goes on in the direction in which $M_{t-1}$ has moved already, on new prompts as well. Where that direction is right, it gains; it cannot mend an error.
# </details>
#
# 3. A judge without errors gives harder labels than Bradley-Terry. Which does the closed form of DPO assume?
# <details><summary>Answer</summary>
#
# Bradley-Terry. With labels that never err, the optimum of DPO lies infinitely far away, and only the end of training stops the model.
# </details>
#
# ## Try this
#
# - Draw the lines with `"greedy"` in place of `"sampled"`. Are M's own labels of M's pairs still the worst?
# <details><summary>What you should see</summary>
#
# Yes. That line goes from 0.83 to 0.89 and back to 0.85, at more than two nats. All others end near 0.90 or higher.
# </details>
#
# - Let the judge err in 40 %, in world 0: `run_cell(Cell(0, 0, "sDPO", settings, "test", data=("new", "policy", "judge", 0.4)))` from `sdpo_nb.cells`, where `settings = chosen_settings()["sDPO"] | dict(order="as_given")`, and the same with `"S"` for `"policy"`. Do pairs of M still end nearer to S?
# <details><summary>What you should see</summary>
#
# No. At 20 % M's pairs end nearer, as above (0.64 against 0.78 nats). At 40 % they end farther (0.50 against 0.31), with 0.72 and 0.70 of sampled reward where 20 % gave 0.80 and 0.82. (One world and one run each, some ten seconds.)
# </details>
