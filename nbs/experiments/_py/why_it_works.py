# %% [markdown]
# # Why does it work?
# > Reference, order and schedule, each switched while the others stand still.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/why_it_works.ipynb)
#
# **At DPO's settings nothing in stepwise DPO works for it.** In ten worlds with two seeds each, at the $\beta$ that is best for DPO and three chunks, a moving reference costs 0.021 [0.008, 0.033] of true reward, restarting the schedule 0.009 [0.001, 0.017], and the order nothing that we could see, -0.006 [-0.016, +0.002]. A moving
# reference pulls like a smaller $\beta$, and this $\beta$ was the best; with one of its own it gains what it costs here ([protocol](protocol.ipynb)).
#
# **You should know** [stepwise DPO](../09_stepwise.ipynb) and the [protocol](protocol.ipynb). **Time** a few seconds; the grid behind it took hours (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.experiments import differences, load_grid, means, outcome, plot_contrasts

# %% [markdown]
# ## Three switches at once
#
# Stepwise DPO differs from DPO in three ways: the *reference* moves, the data have an *order*, and optimizer and *schedule* start anew in every stage. The paper compares both ends, so any of the three may have done it. (Its one control, a random split, came out 0.11 points of its
# benchmark mean below DPO.)
#
# The closed form expects something of the reference, since stages at $\beta$ add up to a smaller $\beta$ ([smaller_beta](smaller_beta.ipynb)), and nothing of the order. So, with three chunks, at the $\beta$ and learning rate that are best for DPO, all twelve
# combinations. Mean true reward, sampled:

# %%
found = load_grid("why_it_works")
SWITCHES = {"reference": ("fixed", "moving"), "order": ("random", "easy_to_hard", "hard_to_easy"), "restart": ("never", "stage")}
def cell(reference, order, restart, what="sampled"): return outcome(found[f"{reference}, {order}, {restart}"], what)

pd.DataFrame({(reference, restart): {order: as_text(interval(cell(reference, order, restart))) for order in SWITCHES["order"]} for reference in SWITCHES["reference"] for restart in SWITCHES["restart"]}).rename_axis(columns=["reference", "restart"])


# %% [markdown]
# A *main effect* is the mean difference that a switch makes, over all settings of the others.

# %%
def mean_where(what, **fixed): # over the cells in which these switches stand as given
    kept = [(fixed[name],) if name in fixed else values for name, values in SWITCHES.items()]
    return np.mean([cell(a, b, c, what) for a in kept[0] for b in kept[1] for c in kept[2]], 0)

EFFECTS = {"moving minus fixed reference": (dict(reference="moving"), dict(reference="fixed")), "easy first minus random order": (dict(order="easy_to_hard"), dict(order="random")),
           "easy first minus hard first": (dict(order="easy_to_hard"), dict(order="hard_to_easy")), "restarted minus one schedule": (dict(restart="stage"), dict(restart="never"))}
def effects(what): return differences({q: mean_where(what, **a) - mean_where(what, **b) for q, (a, b) in EFFECTS.items()})
fig, axes = plt.subplots(1, 2, figsize=(10, 2.6), sharey=True, constrained_layout=True)
for ax, what in zip(axes, ("sampled", "greedy")): plot_contrasts(effects(what), f"main effect on true reward, {what}", ax=ax)
here = effects("sampled").set_index("question")
assert (here["high"] < 0).tolist() == [True, False, False, True] and (here.iloc[1:3][["low", "high"]].abs() < 0.02).all(axis=None)

# %% [markdown]
# The prediction holds: nothing of the order, and of the reference what a smaller $\beta$ would do. It is the *same* switch that gains 0.012 [0.006, 0.018] on the page of the [protocol](protocol.ipynb), where each side has its own $\beta$. So the sign of its effect is a statement about $\beta$, not about references. Restarting
# costs a little, although it has a little more learning rate in sum.
#
# ## The control one picks changes the answer
#
# Whoever compares stepwise DPO with one control reports one of the lines below. "DPO" trains on all pairs at once, in another order in each of its three epochs. (It is not "fixed, random, one schedule" of the table: that one sees each chunk three times before the next.)

# %%
stepwise = "moving, easy_to_hard, stage"
CONTROLS = {"DPO": "DPO", "DPO at beta/3": "DPO at beta/3", "DPO, twice the epochs": "DPO, twice the epochs", "stages with a fixed reference": "fixed, easy_to_hard, stage", "stages with one schedule": "moving, easy_to_hard, never",
            "stages in random order": "moving, random, stage", "stages that start from S": "from S"}
against = differences({f"minus {q}": outcome(found[stepwise], "sampled") - outcome(found[name], "sampled") for q, name in CONTROLS.items()})
plot_contrasts(against, "stepwise DPO minus a control, true reward");

# %%
rows = {"stepwise DPO": found[stepwise]} | {q: found[name] for q, name in CONTROLS.items()}
means(rows).join(pd.DataFrame({q: {"thousand tokens trained on": round(r["tokens"].mean() / 1000), "of other passes": round(r["pass_tokens"].mean() / 1000)} for q, r in rows.items()}).T)

# %% [markdown]
# From -0.05 to +0.04: a reader of the first line alone, or of the last, would hold stepwise DPO for a failure or a success. The line nearest to zero that is not itself stepwise DPO is DPO at $\beta/3$, and it has the same KL, 4.2 and 4.4 nats. And the step from DPO to "fixed, random, one schedule" (0.867 to 0.849) is the price of
# training chunk by chunk at all.
#
# ## What you now have
#
# - Main effects of three switches, at one $\beta$, and a prediction that held.
# - Seven controls for one method, and as many verdicts.
#
# ## Questions to test yourself
#
# 1. Why does this page compare at one $\beta$, and the [protocol](protocol.ipynb) at the best of each method?
# 2. Which two cells of the table differ in the order alone?
# 3. "Restarted" has a little more learning rate in sum ([protocol](protocol.ipynb)). In which direction could that bias its main effect?
#
# ## Try this
#
# - Compute the interaction of reference and schedule, and its interval.
