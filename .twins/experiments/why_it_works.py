# %% [markdown]
# # Why does it work?
# > Chunks, reference, schedule and order, each switched while the others stand still.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/why_it_works.ipynb)
#
# **At DPO's $\beta$ its parts cost, at a larger one they pay.** In ten worlds with two seeds each, stepwise DPO at the settings that are best for DPO loses 0.052 [0.037, 0.068] of true reward: 0.018 [0.011, 0.026] since pairs come chunk by chunk, 0.028 [0.015, 0.040] since the reference moves; restarts and the order of the sources add nothing
# that we could see. Nearly all variants lie on one line of reward against KL, and on its other side, at $\beta$ from 1.2 on, the moving reference wins.
#
# **You should know** [stepwise DPO](../09_stepwise.ipynb) and the [protocol](protocol.ipynb). **Time** a few seconds; the grid behind it took 1.5 core hours (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from sdpo_nb.cells import stored_rows
from sdpo_nb.compare import difference_intervals, outcome_means, outcome_values, plot_contrasts
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.questions import load_grid, search_cells, search_table

# %% [markdown]
# ## Four steps from DPO to stepwise DPO
#
# Stepwise DPO differs from DPO in more than one way: pairs come *chunk by chunk*, the *reference* moves, optimizer and *schedule* start anew in every stage, and the chunks have an *order*. The paper compares both ends (and a random split, which came out 0.11 points of its benchmark mean below DPO), so any of
# these may have done it.
#
# What does the closed form expect? Of the order nothing. Of a moving reference, that it pulls farther from S: if all stages saw the same prompts, $T$ stages at $\beta$ would be one at $\beta/T$ ([chapter 03](../03_loss.ipynb)). All runs here have the settings that are best for DPO, $\beta = 0.6$ and a
# learning rate of 0.0003, and three chunks. Step by step:

# %%
found = load_grid("why_it_works")
PATH = {"chunk by chunk": ("fixed, random, never", "DPO"), "... and the reference moves": ("moving, random, never", "fixed, random, never"),
        "... and the schedule restarts": ("moving, random, stage", "moving, random, never"), "... and easy sources first": ("moving, easy_to_hard, stage", "moving, random, stage")}
def minus(a, b, what="sampled"): return outcome_values(found[a], what) - outcome_values(found[b], what)
steps = difference_intervals({q: minus(*rows) for q, rows in PATH.items()} | {"all four: stepwise DPO minus DPO": minus("moving, easy_to_hard, stage", "DPO")})
assert (steps["high"] < 0).tolist() == [True, True, False, False, True] and abs(steps["mean"].iloc[:4].sum() - steps["mean"].iloc[4]) < 1e-9
plot_contrasts(steps, "change of true reward (grey: too small to count)");

# %% [markdown]
# Two of the four steps cost something, and none gains. But a path is one of many. Does the reference cost as much where the schedule restarts, or where the order is another?
#
# ## All twelve combinations

# %%
SWITCHES = {"reference": ("fixed", "moving"), "order": ("random", "easy_to_hard", "hard_to_easy"), "restart": ("never", "stage")}
def cell(reference, order, restart, what="sampled"): return outcome_values(found[f"{reference}, {order}, {restart}"], what)
pd.DataFrame({(reference, restart): {order: as_text(interval(cell(reference, order, restart))) for order in SWITCHES["order"]} for reference in SWITCHES["reference"] for restart in SWITCHES["restart"]}).rename_axis(columns=["reference", "restart"])


# %% [markdown]
# A *main effect* is the mean difference that a switch makes, over all settings of the others. Where it depends on another switch, a mean hides that; so the reference is shown with and without restarts, too.

# %%
def mean_where(what, **fixed): # over the cells in which these switches stand as given
    kept = [(fixed[name],) if name in fixed else values for name, values in SWITCHES.items()]
    return np.mean([cell(a, b, c, what) for a in kept[0] for b in kept[1] for c in kept[2]], 0)

moving, fixed = dict(reference="moving"), dict(reference="fixed")
EFFECTS = {"moving minus fixed reference": (moving, fixed), "   with one schedule": (moving | dict(restart="never"), fixed | dict(restart="never")), "   restarted": (moving | dict(restart="stage"), fixed | dict(restart="stage")),
           "restarted minus one schedule": (dict(restart="stage"), dict(restart="never")), "easy first minus random order": (dict(order="easy_to_hard"), dict(order="random")), "easy first minus hard first": (dict(order="easy_to_hard"), dict(order="hard_to_easy"))}
def effects(what): return difference_intervals({q: mean_where(what, **a) - mean_where(what, **b) for q, (a, b) in EFFECTS.items()})
fig, axes = plt.subplots(1, 2, figsize=(10, 3), sharex=True, sharey=True, constrained_layout=True)
for ax, what in zip(axes, ("sampled", "greedy")): plot_contrasts(effects(what), f"effect on true reward, {what}", ax=ax)
here = effects("sampled").set_index("question")
assert (here["high"] < 0).tolist() == [True, True, True, True, False, False] and (here.iloc[4:][["low", "high"]].abs() < 0.02).all(axis=None)

# %% [markdown]
# Of the order of these three sources nothing is seen, as expected. The reference costs more with one schedule than with restarts, and more in greedy answers. Restarting costs about a hundredth; its interval barely leaves zero, and it is one of several.
#
# ## One curve
#
# Is it "like a smaller $\beta$"? Then all of this should be movement along one line: farther from S, less reward.

# %%
points = pd.DataFrame([dict(kl=outcome_values(r, "kl").mean(), reward=outcome_values(r, "sampled").mean(), kind="chunks, moving reference" if name.startswith("moving") else "chunks, fixed reference" if name.startswith("fixed") else "stages from S" if name == "from S" else "DPO", name=name) for name, r in found.items()])
fig, ax = plt.subplots(figsize=(6, 3.4))
sns.scatterplot(points, x="kl", y="reward", hue="kind", style="kind", s=60, palette="colorblind", ax=ax)
for r in points[points["kind"] == "DPO"].itertuples(): ax.annotate(r.name, (r.kl, r.reward), xytext=(6, 2), textcoords="offset points", fontsize="small")
ax.set(xlabel="KL from S (nats)", ylabel="true reward, sampled"); ax.legend(frameon=False, fontsize="small"); sns.despine()
others = points[points["kind"] != "stages from S"]
assert others["kl"].rank().corr(others["reward"].rank()) < -0.9

# %% [markdown]
# It nearly is. Fifteen of the sixteen runs lie along one falling line; DPO at $\beta$ is at its upper end, and DPO at $\beta/3$ among the moving references. Only stages that start from S fall off it: they are as far from S as the others and have less to show. On this side of the best $\beta$, whatever pulls farther is worse.
# On the other side it must be better. The search of the [protocol](protocol.ipynb) has both sides, at a smaller learning rate (two worlds, validation prompts):

# %%
seen = search_table(stored_rows(search_cells()))
by_beta = seen[seen["lr"] == 1e-4].pivot_table("reward", "beta", "method")
sides = (by_beta["sDPO"] - by_beta["sDPO, fixed reference"]).to_frame("moving minus fixed reference")
assert sides.loc[:0.6].max().item() < 0 < sides.loc[1.2:].min().item()
sides.T.round(3)

# %% [markdown]
# So *whether a moving reference is better than a fixed one depends on $\beta$*, and with a $\beta$ of its own each is about as good as the other (+0.012 [0.006, 0.018], a primary question).
#
# ## The control one picks changes the answer
#
# Whoever compares stepwise DPO with one control reports one of these lines.

# %%
stepwise = "moving, easy_to_hard, stage"
CONTROLS = {"DPO": "DPO", "DPO, twice the epochs": "DPO, twice the epochs", "stages with a fixed reference": "fixed, easy_to_hard, stage", "DPO at beta/3": "DPO at beta/3", "stages in random order": "moving, random, stage",
            "stages with one schedule": "moving, easy_to_hard, never", "stages that start from S": "from S"}
plot_contrasts(difference_intervals({f"minus {q}": minus(stepwise, name) for q, name in CONTROLS.items()}), "stepwise DPO minus a control, true reward");

# %%
rows = {"stepwise DPO": found[stepwise]} | {q: found[name] for q, name in CONTROLS.items()}
outcome_means(rows).join(pd.DataFrame({q: {"thousand tokens trained on": round(r["tokens"].mean() / 1000), "of other passes": round(r["pass_tokens"].mean() / 1000)} for q, r in rows.items()}).T)

# %% [markdown]
# From -0.05 to +0.04: clearly worse, undecided or clearly better. (Tokens of other passes are those of the partition and of the references.)
#
# ## What you now have
#
# - The loss of stepwise DPO at DPO's settings, taken apart in four steps.
# - One line on which nearly all of its variants lie, and the reason why $\beta$ decides.
#
# ## Questions to test yourself
#
# 1. Why does this page compare at one $\beta$, and the [protocol](protocol.ipynb) at the best of each method?
# 2. "Random" shuffles all pairs before they are cut. What else than the order of the sources changes with it?
# 3. Restarted schedules have a little more learning rate in sum ([protocol](protocol.ipynb)). Given the line, in which direction does that push?
#
# ## Try this
#
# - Add "fixed, random, never" at $\beta/3$ to the figure. Does chunk by chunk cost there, too?
