# %% [markdown]
# # New data between the stages
# > Pairs that the current model writes, against as many that S writes; labels from the truth, from a judge who errs, and from the model itself.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/with_new_data.ipynb)
#
# **New pairs bring the same reward at a shorter distance; labels decide about everything else.** In ten worlds with two seeds each, pairs that the model before wrote are as good as as many of S, at true labels (+0.002 [-0.005, +0.008]), and end 0.28 nats [0.20, 0.37] nearer to S. With a judge who never errs they are better by 0.015 [0.007, 0.024].
# A judge who errs in a fifth costs 0.06, whoever writes; labels by the model's own implicit reward cost 0.055 [0.035, 0.073] on the answers of S and 0.105 [0.082, 0.130] on its own, where the last stage makes the model worse.
#
# **You should know** [stepwise DPO](../09_stepwise.ipynb), `chunks` as a function, and the [protocol](protocol.ipynb). **Time** a few seconds; the grid behind it took hours (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from sdpo_nb.experiments import differences, load_grid, means, outcome, plot_contrasts, unfolded

# %% [markdown]
# ## Who writes, who labels?
#
# The paper names iterative generation of data as a partner of its stages and does not try it. Here are three stages on a third of the prompts each, at the best settings of stepwise DPO. Every prompt is answered twice, by S in all stages or, from stage 2 on, by the model $M_{t-1}$ that the stage starts from (which is also its reference). Labels come from one of four:
#
# - *true*: Bradley-Terry on the true reward, as everywhere. It errs where two responses are close;
# - *judge, 0 % wrong*: always the better response;
# - *judge, 20 % wrong*: the better response, but in a fifth of the cases the other;
# - *implicit*: true in stage 1, then the response that $M_{t-1}$ has raised more against S, by $\log M_{t-1} - \log S$. It asks nobody.
#
# A model that has become sure often gives the same answer twice, which makes no pair; so $M$ writes fewer pairs than S from the same prompts. Where that could matter, there is a third writer: S with as many pairs, at random, as the model would have written.

# %%
found = load_grid("with_new_data")
LABELS = ("true", "judge, 0 % wrong", "judge, 20 % wrong", "implicit")
def minus(a, b, what="sampled"): return outcome(found[a], what) - outcome(found[b], what)
fresh = differences({f"{label}, {what}": minus(f"policy, {label}", f"S, {label}", what) for label in LABELS for what in ("sampled", "greedy")}
                    | {f"{label}, sampled, as many pairs": minus(f"policy, {label}", f"S, as many, {label}") for label in LABELS[:2]})
rows = fresh.set_index("question")
assert abs(rows.loc["true, sampled, as many pairs", ["low", "high"]]).max() < 0.02 and rows.loc["judge, 0 % wrong, sampled, as many pairs", "low"] > 0 and rows.loc["implicit, sampled", "high"] < 0
plot_contrasts(fresh, "written by M minus written by S, true reward");

# %% [markdown]
# With labels that say which response is better, new pairs cost no reward, and gain a little where the labels are sharp. With the implicit reward they are clearly worse. A fifth of wrong labels leaves no difference that we could see.

# %%
far = differences({f"{label}{there}": minus(f"policy, {label}", f"S{there}, {label}", "kl") for label in LABELS for there in ("", ", as many") if f"S{there}, {label}" in found})
assert (far["high"] < 0).sum() == 5 and far["low"].iloc[-1] > 0
plot_contrasts(far, "written by M minus written by S, KL from S (nats)", same=0);

# %% [markdown]
# The models end much nearer to S, by 27 to 39 %, and not because they had fewer pairs: against as many it is nearly the same. One reason can be read off the loss. A pair of S often has a response that the model before has made rare already; the loss goes on pushing it down, which costs distance and changes no answer. A pair of its own is about what it
# still does. (We did not test this.) Only the implicit reward sends the model farther. Stage by stage:

# %%
paths = pd.concat([unfolded(found[f"{writer}, {label}"], "stages").groupby("stage")[["sampled", "kl"]].mean().assign(writer=who, labels=label) for writer, who in (("S", "S"), ("policy", "the model before")) for label in LABELS]).reset_index()
fig, ax = plt.subplots(figsize=(7, 3.6))
sns.lineplot(paths, x="kl", y="sampled", hue="labels", style="writer", markers=True, dashes={"S": (2, 2), "the model before": ""}, ax=ax)
ax.set(xlabel="KL from S (nats)", ylabel="true reward, sampled"); ax.legend(frameon=False, fontsize="small", bbox_to_anchor=(1, 1)); sns.despine(fig)


# %% [markdown]
# Each line is $M_1$, $M_2$, $M_3$. On new pairs (solid) they hardly bend; on pairs of S they flatten, as the frontier of [the protocol](protocol.ipynb) does. The red ones are the implicit reward:

# %%
def stages(name): # (stages, worlds, seeds, 1)
    mean = unfolded(found[name], "stages").groupby(["stage", "world", "seed"])["sampled"].mean()
    return np.stack([mean[t].unstack().to_numpy() for t in (1, 2, 3)])[..., None]
own = differences({f"implicit, written by {who}: M_{t} minus M_{t-1}": stages(f"{writer}, implicit")[t-1] - stages(f"{writer}, implicit")[t-2] for writer, who in (("S", "S"), ("policy", "M")) for t in (2, 3)}).set_index("question")
assert (own["low"].iloc[[0, 2]] > 0).all() and own["high"].iloc[3] < 0
own.round(3)

# %% [markdown]
# The second stage still gains, from labels that nobody gave; the third, on the model's own answers, takes most of it back. A model that is asked for its own opinion gets surer of it, wrong or right. The labels, then, with those of the truth as the measure:

# %%
labels = differences({f"{label}, written by {who}": minus(f"{writer}, {label}", f"{writer}, true") for label in LABELS[1:] for writer, who in (("S", "S"), ("policy", "M"))})
plot_contrasts(labels, "minus true labels, true reward");


# %% [markdown]
# An errorless judge is slightly better than Bradley-Terry, an erring one worse by more than any choice of writer makes up for. And one who cannot pay for labels after stage 1 gets further with the answers of S than with new ones.
#
# ## What is paid for
#
# Labels are what data cost. With the implicit reward only those of stage 1 are labelled by somebody.

# %%
def counted(name):
    pairs = np.stack(found[name]["chunk_pairs"])
    return {"pairs by stage": " ".join(f"{p:.0f}" for p in pairs.mean(0)), "label calls": round((pairs[:, 0] if name.endswith("implicit") else pairs.sum(1)).mean())}
means(found).join(pd.DataFrame({name: counted(name) for name in found}).T).rename_axis("written by, labels")

# %% [markdown]
# (Pairs of S in stages 2 and 3 are 300 each; a model that follows true labels writes 279 and 260.)
#
# ## What you now have
#
# - Writer and labeller taken apart: the writer sets the distance, the labels the reward.
# - A case where a stage makes the model worse on its own terms: its own labels.
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
# - Let the judge err in 40 %. Do new answers still cost less KL?
