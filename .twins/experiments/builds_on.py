# %% [markdown]
# # When a hard source builds on an easy one
# > Six letters first or seven letters first, where S could not have written the answers of the hard source.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/builds_on.ipynb)
#
# **Four questions, asked and not yet answered.** In the other worlds of this book the sources teach the same skills, and no order of them was better than another. Here the hard source needs what the easy one teaches, and its chosen responses come from a teacher. A small trial points to a large difference. Questions and tests were committed before any run that counts.
#
# **You should know** what stepwise DPO does ([chapter 14](../14_stepwise.ipynb)), and the pairs called [taught letters](training_data.ipynb). **Time** 10 minutes to read, seconds to run.
#
# <details><summary>Words used on this page</summary>
#
# - **S** is the model before alignment. **DPO** trains it on all pairs at once, held by $\beta$ at a *reference*, which is S. **Stepwise DPO** trains in two stages here, one for each *source* of pairs; the reference is the model of the stage before (*moving*), or always S (*fixed*).
# - **Easy** is a source where S often finds the chosen response the likelier one. The method measures that itself.
# - An **arm** is one way to train. Its **ladder** is the same arm at several $\beta$.
# - **Reward** is the true reward of a sampled answer, between 0 and 1; half of the test prompts have six letters at most, half have seven. **KL** is the distance from S in nats.
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
from sdpo_nb.cells import stored_rows
from sdpo_nb.compare import plot_contrasts
from sdpo_nb.questions import BUILDS_ON_QUESTIONS, all_cells_of, answer_together, as_formula, ladder_cells
from sdpo_nb.questions import load_grid, tuned_grid, untested_differences

# %% [markdown]
# ## A source that builds on another
#
# Who sorts seven letters must know how to sort, and must not stop after the sixth letter. S has seen strings of three to six letters, so it often sorts by the wrong rule, and always stops too early: it never gives a right answer of seven letters. The *easy* source has pairs of three to six letters, two answers of S each, and teaches the rules. The *hard* source has seven letters; the chosen answer is right and a teacher wrote it, the rejected one is what S wrote.
#
# The two differ in a second way: S prefers the chosen response in six of ten easy pairs, and in hardly any hard one. In the [real data](which_is_easy.ipynb) of the paper such a source would come from a stronger model.
#
# What should we expect?
#
# - *By equation (2) of [finite data](finite_data.ipynb)*, that a moving reference adds what its stages learn, so order does not matter, as long as each stage reaches its optimum. But an optimum for these pairs lies far from S, and a stage ends long before it. So where a stage *starts* may matter.
# - *Forgetting.* What was learned last is freshest. Hard first ends on short strings and may stop after the sixth letter again.
# - *A small trial* in the world that travels with the package, one seed, each arm at three $\beta$, on validation prompts: with a moving reference easy first was better than hard first at every $\beta$, by 0.04 to 0.05, and all at once at its best $\beta$ was better than both. It is the reason for this page, and its runs were not kept.
#
# ## Four questions

# %%
pd.DataFrame({question: {"which is": as_formula(arms)} for question, arms in BUILDS_ON_QUESTIONS.items()}).T

# %% [markdown]
# Settings, worlds, tests and margin are those of [when order matters](when_order_matters.ipynb): each arm has a ladder of five $\beta$, run in worlds 11 to 15; the top of a parabola is measured in worlds 1 to 10 with two seeds; a difference needs a p-value below 0.05 by sign flips over worlds, equality one by two one-sided tests within $\pm 0.02$, both corrected for four questions by Holm's method.
#
# Beside the answers, and without tests, stand all arms against all at once, and the two halves of the test by themselves.
#
# ## What came out
#
# `python -m sdpo_nb.experiments choose_builds_on` runs the ladders and writes what was chosen; `... builds_on` measures.

# %%
cells = ladder_cells("builds_on")
print(f"{len(stored_rows(cells))} of {len(cells)} rungs have been run in the worlds of the choice")
grid = tuned_grid("builds_on")
if grid:
    cells = all_cells_of("builds_on")
    print(f"{len(stored_rows(cells))} of {len(cells)} cells have been run at the chosen settings")
    complete = len(stored_rows(cells)) == len(cells)
if grid and complete:
    found = load_grid("builds_on")
    answers = answer_together(BUILDS_ON_QUESTIONS, found)
    display(answers[["question", "mean", "low", "high", "holm", "holm_equal", "verdict"]].round(3).set_index("question"))
    plot_contrasts(answers, sides=("better: the second", "better: the first"))
    display(untested_differences(found, "all at once"))

# %% [markdown]
# ## What this does not show
#
# - **Which of three things makes the order matter**, if it does: that the hard source builds on the easy one, that S cannot write its answers, or that another writer wrote them.
# - **A source that is hard for other reasons.** [When order matters](when_order_matters.ipynb) has bad labels.
# - **Larger models.** S has 340 thousand parameters, and seven letters are one letter more than it knows.
#
# ## What you now have
#
# - Worlds whose hard source builds on the easy one, and four questions with tests.
#
# ## Questions to test yourself
#
# 1. Why is half of the test about six letters?
#
#    <details><summary>Answer</summary>
#
#    An order that teaches seven letters and forgets six is not better. The mean over both halves counts what is lost, too.
#
#    </details>
# 2. S never writes seven letters. How can pairs that S did not write change that, when pairs written by S could not?
#
#    <details><summary>Answer</summary>
#
#    DPO raises the chosen response against the rejected one. Where the chosen one has a seventh letter, going on is raised against stopping. Two answers of S both stop, so nothing is said about going on.
#
#    </details>
#
# ## Try this
#
# - Make the pairs of [taught letters](training_data.ipynb) with eight letters instead of seven. What would you have to change in the exam?
#
#   <details><summary>What you should see</summary>
#
#   Answers are cut after eight tokens, and the eighth is the end of the answer. A right answer of eight letters needs nine, so `max_new` has to grow.
#
#   </details>
