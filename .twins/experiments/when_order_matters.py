# %% [markdown]
# # When does the order matter?
# > Easy first, hard first and shuffled, in worlds whose hard sources have bad labels.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/when_order_matters.ipynb)
#
# **Four questions, asked and not yet answered.** In the other worlds of this book the order of the sources changes nothing, and hardly could. Here it might. Questions, tests and margins were committed before any run.
#
# **You should know** what stepwise DPO does ([chapter 14](../14_stepwise.ipynb)), and equation (2) of [how much data a stage needs](finite_data.ipynb). **Time** 20 minutes to read, seconds to run.
#
# <details><summary>Words used on this page</summary>
#
# - **S** is the model before alignment. **DPO** trains it on all pairs at once. **Stepwise DPO** trains in three stages, one for each *source* of pairs; $\beta$ holds a stage at its *reference*, which is the model of the stage before (*moving*) or always S (*fixed*).
# - **Easy** is a source where S often finds the chosen response the likelier one. The method measures that itself.
# - **Reward** is the true reward of a sampled answer on test prompts, between 0 and 1.
# - **+0.011 [+0.003, +0.020]** is the mean of paired differences and its 95 % interval.
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
from sdpo_nb.cells import stored_rows
from sdpo_nb.compare import plot_contrasts
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.questions import ORDER_QUESTIONS, all_cells_of, cross_fitted_contrasts, cross_fitted_values
from sdpo_nb.questions import load_grid, order_ladders

# %% [markdown]
# ## A world in which order could not matter
#
# The [protocol](protocol.ipynb) found that the order of the sources changes nothing. A referee would answer: in your worlds it cannot. All three sources teach the same four skills, and their labels are equally good. Only the share of prompts on which S is misled differs. By equation (2) of [finite data](finite_data.ipynb) a moving reference *adds* what its stages learn, and a sum does not care about order.
#
# So we change one thing: labels get worse from source to source. In the easy one they stay as they are. In the middle one 15 % of the pairs are swapped, in the hard one 35 %. That is not far-fetched: where it is hard to say which answer is better, people disagree.
#
# What should we expect?
#
# - *Moving reference.* A sum is a sum, so equation (2) says: still nothing. But it speaks of stages that reach their optimum, and ours stop early.
# - *Fixed reference.* By (2) the last stage has the last word. If that is the source with the bad labels, the model unlearns. So hard first should be better.
# - A small trial in one world, before this page was planned, points elsewhere: with a moving reference easy first was better than hard first by 0.02. It is the reason for this page, and no part of its data.
#
# ## Four questions
#
# They and their tests were committed before any run.

# %%
ORDER_QUESTIONS

# %% [markdown]
# *Which settings?* Every arm has four values of $\beta$, each twice the one before, at one learning rate. The ladder of a moving reference begins three times as high, as $T$ stages at $T\beta$ go about as far as one at $\beta$. For each world we take the $\beta$ that has the highest mean reward in the other nine ([cross-fitting](compare.ipynb)). So no arm is tuned on the world that it is measured in.
#
# *Which tests?* The outcome is the reward of sampled answers, in ten worlds with two seeds. A difference needs a p-value below 0.05 by sign flips over worlds, and an interval that leaves out 0. Equality needs a p-value below 0.05 by two one-sided tests within $\pm 0.02$. Both are corrected for four questions by Holm's method. If an arm ends at an end of its ladder in more than half of the worlds, its answer is called provisional.

# %%
plan = {}
for arm, ladder in order_ladders().items():
    betas = [f"{condition.settings['beta']:g}" for condition in ladder.values()]
    plan[arm] = {"beta": ", ".join(betas), "runs": 20 * len(ladder)}
pd.DataFrame(plan).T


# %% [markdown]
# The table of answers is made by `cross_fitted_contrasts` ([questions](questions.ipynb)). We try it on invented runs: with easy first better by 0.03 where the reference moves, and with nothing planted.

# %%
def answers(found): return cross_fitted_contrasts(ORDER_QUESTIONS, order_ladders(), found)


# %%
def invent_runs(planted, seed=0):
    "A reward that is best at the second beta, with the luck of worlds and runs."
    rng = np.random.default_rng(seed)
    of_world = rng.normal(0.8, 0.02, 10)
    found = {}
    for arm, ladder in order_ladders().items():
        extra = planted if arm == "easy first, moving" else 0
        for rung, name in enumerate(ladder):
            rows = []
            for world in range(10):
                for run in range(2):
                    mean = of_world[world] + extra - 0.01 * (rung - 1) ** 2 + rng.normal(0, 0.008)
                    sampled = rng.normal(mean, 0.03, 50)
                    rows.append(dict(world=world, seed=run, weights=f"S of {world}", sampled=sampled))
            found[name] = pd.DataFrame(rows)
    return found

planted, nothing = answers(invent_runs(0.03)), answers(invent_runs(0.))
moving = planted["a"] == "easy first, moving"
assert planted["verdict"][moving].isin(["better", "better, but little"]).all()
assert not nothing["verdict"].isin(["better", "worse"]).any()
assert not planted["provisional"].any()
SHOWN = ["question", "mean", "low", "high", "holm", "holm_equal", "verdict", "provisional"]
planted[SHOWN].round(3).set_index("question")

# %% [markdown]
# ## What came out
#
# `python -m sdpo_nb.experiments when_order_matters` runs the grid.

# %%
cells = all_cells_of("when_order_matters")
done = stored_rows(cells)
complete = len(done) == len(cells)
print(f"{len(done)} of {len(cells)} cells have been run")
if complete:
    found = load_grid("when_order_matters")
    table = answers(found)
    display(table[SHOWN].round(3).set_index("question"))

# %% [markdown]
# ## What this does not show
#
# - **Other reasons why an order could matter.** A hard source may build on an easy one; S may never give a good answer to it; it may be much larger; somebody else may have written its pairs. In these worlds none of that is so.
# - **Other amounts of noise.** Three sources with 0, 15 and 35 % are one choice.
# - **Larger models.** S has 340 thousand parameters.
#
# ## Questions to test yourself
#
# 1. Swapped labels lower the reward accuracy of S wherever S is mostly right. Which source looks harder to the method then: one with hard prompts, or one with bad labels?
#
#    <details><summary>Answer</summary>
#
#    It cannot tell. Both have an accuracy near one half. That is why "hard" and "noisy" often come together when a model orders its own data.
#
#    </details>
# 2. Why is every arm given a ladder of its own, and not the $\beta$ that is best for DPO?
#
#    <details><summary>Answer</summary>
#
#    At one $\beta$ arms go to different distances from S, and a difference may be no more than that. With worse labels the best $\beta$ moves, too, and not for all arms alike.
#
#    </details>
