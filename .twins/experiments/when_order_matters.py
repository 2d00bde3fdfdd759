# %% [markdown]
# # When does the order matter?
# > Easy first, hard first and shuffled, in worlds whose hard sources have bad labels.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/when_order_matters.ipynb)
#
# **With a moving reference the order does not matter here either; with a fixed one, ending on bad labels costs 0.051.** In the other worlds of this book no difference between the orders of the sources was found, and little could be expected. Here labels get worse from source to source. With a moving reference easy first minus hard first is -0.007 [-0.013, 0.000] of true reward: equal within $\pm 0.02$. With a fixed reference it is -0.051 [-0.075, -0.029]. Stepwise DPO, easy first, is as good as all pairs at once, +0.001 [-0.006, +0.008]. Questions and tests were committed before any run that counts.
#
# **You should know** what stepwise DPO does ([chapter 14](../14_stepwise.ipynb)), and equation (2) of [how much data a stage needs](finite_data.ipynb). **Time** 15 minutes to read, seconds to run. The runs behind it took 2.6 core hours.
#
# <details><summary>Words used on this page</summary>
#
# - **S** is the model before alignment. **DPO** trains it on all pairs at once, held by $\beta$ at a *reference*, which is S. **Stepwise DPO** (sDPO) trains in three stages, one for each *source* of pairs; the reference is the model of the stage before (*moving*), or always S (*fixed*).
# - **Easy** is a source where S often finds the chosen response the likelier one. The method measures that itself.
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
import numpy as np
import pandas as pd
from sdpo_nb.compare import holm_p_values, plot_contrasts, sign_flip_p_value
from sdpo_nb.questions import ORDER_QUESTIONS, answer_together, answers_table, as_formulas, by_outcome, measured_on_ladders
from sdpo_nb.questions import untested_differences

# %% [markdown]
# ## A world in which order could do something
#
# The [protocol](protocol.ipynb) found no difference between orders. A referee would answer: in your worlds there can hardly be one. All three sources teach the same four skills, and their labels are equally good. Only the share of prompts on which S is misled differs. By equation (2) of [finite data](finite_data.ipynb) a moving reference *adds* what its stages learn, and a sum does not care about order.
#
# So we change one thing: labels get worse from source to source. In the easy one they stay as they are. In the middle one 15 % of the pairs are swapped, in the hard one 35 %. That is not far-fetched: where it is hard to say which answer is better, people disagree. In ten worlds that we looked at, S still finds the first source the easiest and the last the hardest.
#
# What should we expect?
#
# - *Moving reference.* In either order the same chunks add up to the same sum, says (2). But it speaks of stages that reach their optimum, and ours stop early.
# - *Fixed reference.* By (2) only the last source counts. Noise makes its reward shorter, which a smaller $\beta$ mends, and less certain, which nothing mends. So hard first, which ends on clean labels, has an advantage. But its last source also has fewer prompts on which S is wrong. Equation (2) does not say which weighs more.
# - *All at once, or shuffled.* That is another matter than order. In sources kept apart, the clean one finds a longer reward and counts for more. So (2) lets stepwise DPO gain on DPO here, in either order.
# - A small trial in one world, before this page was planned: with a moving reference, each order at the better of two $\beta$, easy first was better than hard first by 0.013 [0.001, 0.025]. It is the reason for this page, and its runs were not kept.
#
# ## Four questions

# %%
with pd.option_context("display.max_colwidth", None): display(as_formulas(ORDER_QUESTIONS))

# %% [markdown]
# The second question asks whether noise is the reason: two arms are run in the usual worlds, too.
#
# *Which settings?* Each arm has a ladder of five $\beta$, each twice the one before. Its rungs are run in worlds 11 to 15 with one seed. The top of the ladder is read off a parabola through the best rung and its neighbours ([questions](questions.ipynb)). If the best rung is at an end, a rung is added there before anything is measured. So all arms are tuned alike, in worlds in which nothing else is measured, and the ten differences below are independent of each other.
#
# *Which tests?* The outcome is the reward of sampled answers, in worlds 1 to 10 with two seeds. A difference needs a p-value below 0.05 by sign flips over worlds, and an interval without 0. Equality needs a p-value below 0.05 by two one-sided tests within $\pm 0.02$. Both are corrected for four questions by Holm's method.
#
# What can such a test see? Differences of this kind vary from world to world with a standard deviation of about 0.01. So we draw ten worlds from a normal distribution, many times, with the first question true and the three others not. How often is the first found, and how often does chance find another?

# %%
rng = np.random.default_rng(0)
def found_by_chance(true):
    "Which of four questions have a p-value below 0.05 after Holm's correction."
    differences = rng.normal([true, 0, 0, 0], 0.01, (10, 4))
    return np.array(holm_p_values([sign_flip_p_value(differences[:, i]) for i in range(4)])) < 0.05

power = {}
for true in (0., 0.005, 0.01, 0.013, 0.02):
    seen = np.array([found_by_chance(true) for _ in range(250)])
    power[true] = {"the first is found": seen[:, 0].mean(), "another is found": seen[:, 1:].any(1).mean()}
power = pd.DataFrame(power).T.rename_axis("true difference")
assert power["another is found"].max() < 0.08
assert power["the first is found"][0.02] > 0.9
power.round(2)

# %% [markdown]
# A difference of 0.02 would hardly be missed, one of 0.01 every second time. What is found and lies within $\pm 0.02$ is called *better, but little*.
#
# Beside the answers stand all arms against all at once, without tests.
#
# ## What came out
#
# `python -m sdpo_nb.experiments choose_when_order_matters` runs the ladders and writes what was chosen; `... when_order_matters` measures.

# %%
found = measured_on_ladders("when_order_matters")
answers = answer_together(ORDER_QUESTIONS, found)
display(answers_table(answers))
plot_contrasts(answers, sides=("better: the second", "better: the first"))
noisy = {arm: rows for arm, rows in found.items() if not arm.endswith("without noise")}
display(untested_differences(noisy, "all at once"))

# %% [markdown]
# Of what we expected, two things came out.
#
# - *Moving reference: a sum does not care about order.* The difference is shown to be small, with noise and without. The trial's 0.013 did not come back; the sign is the other one.
# - *Fixed reference: the last source counts most.* Hard first ends on clean labels, and is better by 0.051. It even looks a little better than all at once (+0.009 [+0.002, +0.016], without a test), where easy first loses 0.042. The tuned $\beta$ tell the same: easy first, fixed wants the smallest of all, 0.13, as a reward from noisy labels is too short.
# - *All at once* was expected to lose against sources that are kept apart. It did not: the two are equal.
#
# The paper's benchmarks never let a model write; they rank given answers. By that exam, of four answers ([one run](cells.ipynb)), the same questions are

# %%
display(by_outcome(ORDER_QUESTIONS, found)[["reward", "multiple choice"]])

# %% [markdown]
# Now the order counts with a moving reference, too. Hard first is right in 0.02 more of the cases; where 8 to 10 of 100 choices are wrong, that is a fifth of them. An answer that is spoilt in one letter costs little reward when it is written, and a whole point here. So "equal" is a word about one measure. Both agree on the sign.
#
# So if a source with bad labels must come last, let the reference move. If you keep it fixed, end on the source whose labels you trust.
#
# ## What this does not show
#
# - **Other reasons why an order could matter.** A hard source may build on an easy one; S may never give a good answer to it; it may be much larger; somebody else may have written its pairs. In these worlds none of that is so; [builds on](builds_on.ipynb) has a hard source that builds on the easy one, and there order matters; [when sizes differ](when_sizes_differ.ipynb) has a large one, and there it does not.
# - **Which of two things makes a source last.** The noisy source is also the one with most prompts on which S is misled.
# - **Other amounts of noise.** Three sources with 0, 15 and 35 % are one choice.
# - **Larger models.** S has 340 thousand parameters.
#
# ## What you now have
#
# - Worlds with graded noise, and what equation (2) says of them.
# - Four answers with tests, and what the tests can see.
#
# ## Questions to test yourself
#
# 1. Which source looks harder to the method: one with hard prompts, or one with bad labels?
#
#    <details><summary>Answer</summary>
#
#    It cannot tell. Swapped labels pull the accuracy of S towards one half, from either side. That is why "hard" and "noisy" often come together when a model orders its own data.
#
#    </details>
# 2. Why does "easy first is better than a random split" not show that order matters?
#
#    <details><summary>Answer</summary>
#
#    The chunks are others, too. Random chunks mix clean and noisy labels. Only arms with the same chunks in another order compare orders.
#
#    </details>
#
# ## Try this
#
# - In the simulation of power, use twenty worlds. Which difference is now found nine times of ten?
#
#   <details><summary>What you should see</summary>
#
#   About 0.01. (Twenty worlds have a million changes of sign; draw two thousand of them at random, or use Student's test.)
#
#   </details>
