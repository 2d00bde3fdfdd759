# %% [markdown]
# # When sizes differ
# > A small source and one five times as large: which first, and is it a loss to keep them apart?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/when_sizes_differ.ipynb)
#
# **Sizes of one to five change nothing that is worth a name.** The sources of the other pages are equally large. Those of the paper are not: 12 thousand pairs first, then 60 thousand. Here two sources differ in their size and in nothing else. Small first and large first are equal within $\pm 0.02$ of true reward, with a moving reference (+0.002 [-0.006, +0.009]) and with a fixed one (+0.004 [-0.002, +0.010]); small first is equal to two halves, and to all at once. Questions, tests and ladders were committed before any run of this grid.
#
# **You should know** what stepwise DPO does ([chapter 14](../14_stepwise.ipynb)), and equation (2) of [how much data a stage needs](finite_data.ipynb). **Time** 8 minutes to read, seconds to run. The runs behind it took 1.2 core hours.
#
# <details><summary>Words used on this page</summary>
#
# - **S** is the model before alignment. **DPO** trains it on all pairs at once, held by $\beta$ at a *reference*, which is S. **Stepwise DPO** (sDPO) trains in two stages here, one for each *source* of pairs; the reference is the model of the stage before (*moving*), or always S (*fixed*).
# - An **arm** is one way to train. Its **ladder** is the same arm at several $\beta$.
# - **Reward** is the true reward of a sampled answer on test prompts, between 0 and 1. **KL** is the distance from S in nats.
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
import pandas as pd
from sdpo_nb.compare import plot_contrasts
from sdpo_nb.questions import SIZE_QUESTIONS, answer_together, answers_table, as_formulas, measured_on_ladders
from sdpo_nb.questions import untested_differences

# %% [markdown]
# ## What a small stage should do
#
# All pairs of a world, some 1,440, are mixed and cut in two: a sixth and five sixths ([training data](training_data.ipynb)). Every pair is passed three times in every arm. So the small stage has some 24 updates and the large one some 110.
#
# Equation (2) of [finite data](finite_data.ipynb) says what becomes of stages that reach their optimum:
#
# - *Moving reference.* The model is S with the sum of two rewards, each found from its own pairs and each with the same weight. In either order it is the same sum. But the reward of the small source is found from few pairs: it is less certain, and too large. So an uneven cut should lose against two halves, and both against all at once.
# - *Fixed reference.* Only the last source counts. So the large one should be last.
#
# Stages here stop long before their optimum, the small one first of all. Then it adds less than its equal share, and what is lost is small. And with a fixed reference the second stage starts at the model of the first, so something of the first source stays.
#
# ## Four questions

# %%
with pd.option_context("display.max_colwidth", None): display(as_formulas(SIZE_QUESTIONS))

# %% [markdown]
# Worlds, tests and margin are those of [when order matters](when_order_matters.ipynb). Each arm has a ladder of five $\beta$, run in worlds 11 to 15; its top is measured in worlds 1 to 10 with two seeds. If a best rung is at an end, a rung is added there first. A difference needs a p-value below 0.05 by sign flips over worlds, and an interval without 0. Equality needs a p-value below 0.05 by two one-sided tests within $\pm 0.02$. Both are corrected for four questions by Holm's method.
#
# Beside the answers, and without tests, stand all arms against all at once.
#
# ## What came out
#
# `python -m sdpo_nb.experiments choose_when_sizes_differ` runs the ladders and writes what was chosen; `... when_sizes_differ` measures.

# %%
found = measured_on_ladders("when_sizes_differ")
answers = answer_together(SIZE_QUESTIONS, found)
display(answers_table(answers))
plot_contrasts(answers, sides=("better: the second", "better: the first"))
display(untested_differences(found, "all at once"))

# %% [markdown]
# All four are shown to be equal. What equation (2) says of stages at their optimum is hardly seen in stages that stop early:
#
# - *An uneven cut should lose against two halves.* The sign is right, -0.005 [-0.010, -0.000], but after Holm's correction the p-value is 0.12. If it is real, it is a quarter of our margin.
# - *Both should lose against all at once.* They do not. Two halves even look a little better (+0.005 [0.000, 0.009], without a test).
# - *With a fixed reference the large source should be last.* The sign is right, and again it is small. The second stage starts at the model of the first, and that model's share is not forgotten within 24 updates.
#
# So with sources that teach the same, sizes as unequal as the paper's are no reason to choose an order. Where sources differ in what they teach, see [builds on](builds_on.ipynb).

# %% [markdown]
# ## What this does not show
#
# - **A small source that is also easier**, or of another kind, as in the paper. Here the two are drawn from the same pairs.
# - **Sixty thousand pairs.** A stage that is long enough to reach its optimum would give its reward the full weight.
# - **Larger models.** S has 340 thousand parameters.
#
# ## What you now have
#
# - Two sources of which one is five times as large, what equation (2) says of them, and four answers with tests.
#
# ## Questions to test yourself
#
# 1. Why are the pairs mixed before they are cut?
#
#    <details><summary>Answer</summary>
#
#    If the small source were the easy one, a difference could come from its size or from what it teaches. Mixed, only its size is left.
#
#    </details>
# 2. Both rewards have the same weight in the sum. Which of the two does the sum inherit most of its error from?
#
#    <details><summary>Answer</summary>
#
#    From that of the small source. By the law of [finite data](finite_data.ipynb) a reward from a fifth of the pairs is too large by five times the share.
#
#    </details>
#
# ## Try this
#
# - Which $\beta$ of the small stage would give both pairs of a small and of a large source the same weight? Write the sum of equation (2) with a $\beta_t$ for each stage.
#
#   <details><summary>What you should see</summary>
#
#   The sum is $r_1/\beta_1 + r_2/\beta_2$. For weights like 1 to 5, the small stage needs five times the $\beta$ of the large one.
#
#   </details>
