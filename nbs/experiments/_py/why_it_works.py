# %% [markdown]
# # Why does it work?
# > Reference, order and schedule, each switched while the others stand still.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/why_it_works.ipynb)
#
# ANSWER
#
# **You should know** [stepwise DPO](../09_stepwise.ipynb) and the [protocol](protocol.ipynb). **Time** a few seconds; the grid behind it took HOURS (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import numpy as np
import pandas as pd
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.experiments import choices, load_grid, outcome, plot_contrasts

# %% [markdown]
# ## Three switches at once
#
# Stepwise DPO differs from DPO in three ways: the *reference* moves, the data have an *order*, and optimizer and *schedule* start anew in every stage. The paper compares both ends, so any of the three may have done it. Its one control,
# a random split, came out 0.11 points of H4 below DPO.
#
# The closed form expects something of the reference (stages at $\beta$ add up to a smaller $\beta$, [smaller_beta](smaller_beta.ipynb)), and nothing of the order. So, with three chunks, at the $\beta$ and learning rate that are best for DPO, all twelve
# combinations:

# %%
found = load_grid("why_it_works")
REFERENCES, ORDERS, SCHEDULES = ("fixed", "moving"), ("random", "easy_to_hard", "hard_to_easy"), ("never", "stage")
def cell(ref, order, restart, what="sampled"): return outcome(found[f"{ref}, {order}, {restart}"], what)

pd.DataFrame({(ref, restart): {order: as_text(interval(cell(ref, order, restart))) for order in ORDERS} for ref in REFERENCES for restart in SCHEDULES}).rename_axis(columns=["reference", "restart"])

# %% [markdown]
# A main effect is the mean difference that a switch makes, over all settings of the others.

# %%
def mean_of(**fixed): # over the cells in which these settings are as given
    axes = dict(ref=REFERENCES, order=ORDERS, restart=SCHEDULES) | {k: (v,) for k, v in fixed.items()}
    return lambda what: np.mean([cell(a, b, c, what) for a in axes["ref"] for b in axes["order"] for c in axes["restart"]], 0)

SWITCHES = {"moving minus fixed reference": (mean_of(ref="moving"), mean_of(ref="fixed")),
            "easy first minus random order": (mean_of(order="easy_to_hard"), mean_of(order="random")),
            "easy first minus hard first": (mean_of(order="easy_to_hard"), mean_of(order="hard_to_easy")),
            "schedule: every stage anew minus one": (mean_of(restart="stage"), mean_of(restart="never"))}
def effects(what): return pd.DataFrame([(q, *interval(a(what) - b(what))) for q, (a, b) in SWITCHES.items()], columns=["question", "mean", "low", "high"])

plot_contrasts(effects("sampled"));

# %% [markdown]
# (text)

# %%
plot_contrasts(effects("greedy"));

# %% [markdown]
# ## The control one picks changes the answer
#
# A paper that compares stepwise DPO with one control reports one of the lines below. "DPO" trains on all pairs at once; "fixed, random, never" sees the same chunks in the same order as stepwise DPO, three times each before the next.

# %%
stepwise = "moving, easy_to_hard, stage"
CONTROLS = {"DPO": "DPO", "DPO at beta/3": "DPO at beta/3", "DPO with twice the epochs": "DPO, twice the epochs", "stages with a fixed reference": "fixed, easy_to_hard, stage", "stages in random order": "moving, random, stage",
            "stages that start from S": "from S"}
against = pd.DataFrame([(f"against {q}", *interval(outcome(found[stepwise], "sampled") - outcome(found[name], "sampled"))) for q, name in CONTROLS.items()], columns=["question", "mean", "low", "high"])
plot_contrasts(against, "stepwise DPO minus control, true reward");

# %%
pd.DataFrame({q: {"true reward, sampled": as_text(interval(outcome(found[name], "sampled"))), "greedy": as_text(interval(outcome(found[name], "greedy"))), "KL (nats)": as_text(interval(outcome(found[name], "kl"))),
                  "tokens trained on": int(found[name]["tokens"].mean()), "tokens of other passes": int(found[name]["pass_tokens"].mean())} for q, name in {"stepwise DPO": stepwise, **CONTROLS}.items()}).T
