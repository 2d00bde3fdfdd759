# %% [markdown]
# # New data between the stages
# > Pairs that the current model writes, against as many that S writes; labels from the truth, from a judge who errs, and from the model itself.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/with_new_data.ipynb)
#
# **New pairs help a little, if the labels know the truth.** In ten worlds with two seeds each, with true labels, three stages on pairs that the model before wrote reach the reward of three stages on S's pairs (-0.004 [-0.010, 0.003]) at two thirds of the distance from S; at a $\beta$ that brings S's pairs to that distance, these are behind by 0.008 [0.002, 0.015]. Labelled by the model's own implicit reward, stages 2 and 3 together gain
# 0.065 [0.040, 0.092] on pairs of S and 0.010 [-0.018, 0.040] on pairs of its own, where true labels bring 0.12; by stage 3 half of its labels of its own pairs are wrong.
#
# **You should know** [stepwise DPO](../09_stepwise.ipynb), `chunks` as a function, and the [protocol](protocol.ipynb). **Time** a few seconds; the grid behind it took 1.5 core hours (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from sdpo_nb.cells import unfold_column
from sdpo_nb.compare import OUTCOMES, difference_intervals, outcome_means, outcome_values, plot_outcomes
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.questions import load_grid

# %% [markdown]
# ## Who writes, who labels?
#
# The paper names iterative generation of data as a partner of its stages and does not try it. Here are three stages with some 500 prompts each, a third of all, at the settings that were best for stepwise DPO on the usual pairs ($\beta = 1.2$). Every prompt is answered twice. The *writer* is S in all stages, or from stage 2 on the model $M_{t-1}$ that the stage starts from, and which is its reference; *M* for short. Labels
# are one of four:
#
# - *true*: Bradley-Terry on the true reward, as everywhere; where two responses are close it errs;
# - *judge, 0 % wrong*: always the better response;
# - *judge, 20 % wrong*: the better response, but in a fifth of the cases the other, in stage 1 as well;
# - *implicit*: true in stage 1, then the response that $M_{t-1}$ has raised more against S, by $\log M_{t-1} - \log S$. It asks nobody.
#
# Two equal answers make no pair. So S makes 300 pairs of 500 prompts, and M, which has become surer, fewer. Where that could matter, there is a third writer: S with as many pairs, drawn at random, as the model of that very run would have written.

# %%
found = load_grid("with_new_data")
LABELS = ("true", "judge, 0 % wrong", "judge, 20 % wrong", "implicit")
WRITERS = {"S": "S", "policy": "M"}        # name in the grid -> here
COMPARED = {label: ("S, " + label) for label in LABELS} | {f"{label}, as many pairs": f"S, as many, {label}" for label in LABELS[:2]}
def minus(a, b, what="sampled"): return outcome_values(found[a], what) - outcome_values(found[b], what)
fresh = {what: difference_intervals({name: minus(f"policy, {name.removesuffix(', as many pairs')}", row, what) for name, row in COMPARED.items()}) for what in OUTCOMES}
plot_outcomes(fresh, "M minus S");

# %%
by_label = {what: t.set_index("question") for what, t in fresh.items()}
assert abs(by_label["sampled"].loc[["true", "true, as many pairs"], ["low", "high"]]).max(axis=None) < 0.02 and by_label["sampled"].loc["implicit", "high"] < 0
assert (by_label["kl"]["high"] < 0).sum() == 5 and by_label["kl"].loc["implicit", "low"] > 0
pd.DataFrame({what: {q: as_text(r) for q, r in zip(t["question"], t[["mean", "low", "high"]].to_numpy())} for what, t in fresh.items()}).rename_axis("M minus S")

# %% [markdown]
# With labels that know the truth (the first two), M's pairs bring as much sampled reward as those of S or a little more, greedy a little more, and end nearer to S by a third. With the erring judge they end nearer, too. With the model's own labels they are clearly worse, and farther.
#
# Is it worth something to end nearer? A larger $\beta$ does that, too. So S's pairs were also run at twice and four times the $\beta$:

# %%
LARGER = {f"{label}: M minus S at {f} times beta": (f"policy, {label}", f"S, {label}, {f} beta") for label in LABELS[:2] for f in (2, 4)}
larger = {q: {what: minus(*ab, what) for what in OUTCOMES} for q, ab in LARGER.items()}
first, second = (larger[q] for q in list(larger)[::2])
assert interval(first["kl"])[1] < 0 < interval(first["kl"])[2] and all(interval(d[what])[1] > 0 for d in (first, second) for what in ("sampled", "greedy")) and interval(second["kl"])[2] < 0
pd.DataFrame({q: {what: as_text(interval(v)) for what, v in d.items()} for q, d in larger.items()}).T

# %% [markdown]
# At twice the $\beta$ S's pairs come to the distance of M's, with true labels, and have lost something on the way: M is ahead by 0.008, sampled and greedy. With an errorless judge M at that $\beta$ is still nearer and ahead by 0.011; at four times it is farther and ahead by 0.035, so at one distance it is somewhere between.
#
# ## Stage by stage

# %%
paths = pd.concat([unfold_column(found[f"{writer}, {label}"], "stages").groupby("stage")[["sampled", "kl"]].mean().assign(writer=who, labels=label) for writer, who in WRITERS.items() for label in LABELS]).reset_index()
fig, ax = plt.subplots(figsize=(7, 3.6))
sns.lineplot(paths, x="kl", y="sampled", hue="labels", style="writer", markers=True, dashes={"S": (2, 2), "M": ""}, ax=ax)
ax.set(xlabel="KL from S (nats)", ylabel="true reward, sampled"); ax.legend(frameon=False, fontsize="small", bbox_to_anchor=(1, 1)); sns.despine(fig)


# %% [markdown]
# Each line is $M_1$, $M_2$, $M_3$. An erring judge is behind from the first stage; the implicit reward begins with true labels, so what it is worth is seen from $M_1$ on. Beside it stands how many of the labels were wrong, of those whose rewards differ (true labels are wrong in a tenth, stage 1):

# %%
def stages(name): # (stages, worlds, seeds, 1)
    mean = unfold_column(found[name], "stages").groupby(["stage", "world", "seed"])["sampled"].mean()
    return np.stack([mean[t].unstack().to_numpy() for t in (1, 2, 3)])[..., None]
steps = {f"{label}, written by {who}": stages(f"{writer}, {label}") for label in LABELS for writer, who in WRITERS.items()}
wrong = {f"implicit, written by {who}": np.stack(found[f"{writer}, implicit"]["wrong_labels"]).mean(0) for writer, who in WRITERS.items()}
assert interval(steps["implicit, written by M"][2] - steps["implicit, written by M"][1])[2] < 0
pd.DataFrame({name: {"M_3 minus M_1": as_text(interval(m[2] - m[0])), "M_2 minus M_1": as_text(interval(m[1] - m[0])), "M_3 minus M_2": as_text(interval(m[2] - m[1])), "wrong labels by stage": " ".join(f"{v:.0%}" for v in wrong.get(name, ()))} for name, m in steps.items()}).T


# %% [markdown]
# In stage 2 the same model labels either kind of pairs, and errs in a fifth of S's answers and a third of its own. In stage 3 it labels its own no better than a coin, and that stage takes most of the second's gain back.
#
# The share of wrong labels is not all. On S's pairs the implicit reward errs as often as the erring judge. In stage 2 both gain 0.058; in stage 3 it gains 0.007 [-0.005, 0.018] and the judge 0.035 [0.027, 0.043]. The judge's errors fall anywhere, those of the model where it was mistaken already. (It is also farther from S by then, 0.9 against 0.4 nats, which could be the reason as well.)
#
# So without anybody to label, a second stage on S's answers still gained here; a third gained nothing that we could see, and doubled the distance.
#
# ## What is paid for

# %%
def counted(name):
    pairs = np.stack(found[name]["chunk_pairs"])
    return {"pairs by stage": " ".join(f"{p:.0f}" for p in pairs.mean(0)), "label calls": round((pairs[:, 0] if name.endswith("implicit") else pairs.sum(1)).mean())}
outcome_means(found).join(pd.DataFrame({name: counted(name) for name in found}).T).rename(lambda name: name.replace("policy", "M")).rename_axis("written by, labels")

# %% [markdown]
# Labels are what data cost, and the implicit reward saves two thirds of them. (The usual sources of a world are about 1,450 pairs, as more prompts were answered for them, and stepwise DPO reaches 0.871 with them.)
#
# ## What you now have
#
# - Writer and labeller taken apart: with good labels the writer changes the distance and hardly the reward; with the model's own labels it changes both.
# - The number behind it: wrong labels, stage by stage.
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
# - Let the judge err in 40 %. Do M's pairs still cost less KL?
