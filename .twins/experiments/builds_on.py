# %% [markdown]
# # When a hard source builds on an easy one
# > Own pairs first or taught pairs first, where S could not have written the answers of the hard source.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/builds_on.ipynb)
#
# **Here the order matters, and all pairs at once are better than either order.** In the usual worlds of this book all sources teach the same skills, and no difference between their orders was found. Here a teacher wrote the hard source, and S could not have written it. With a moving reference easy first is better than hard first, by +0.021 [+0.013, +0.029] of true reward; with a fixed one it is worse, -0.019 [-0.034, -0.003]. Stepwise DPO, easy first, loses 0.034 [0.021, 0.048] against all at once. Questions and tests were committed before any run that counts.
#
# **You should know** what stepwise DPO does ([chapter 14](../14_stepwise.ipynb)), and the pairs called [taught letters](training_data.ipynb). **Time** 10 minutes to read, seconds to run. The runs behind it took 2.3 core hours.
#
# <details><summary>Words used on this page</summary>
#
# - **S** is the model before alignment. **DPO** trains it on all pairs at once, held by $\beta$ at a *reference*, which is S. **Stepwise DPO** trains in two stages here, one for each *source* of pairs; the reference is the model of the stage before (*moving*), or always S (*fixed*).
# - **Own** pairs are two answers of S, and are easy: S is on the side of the label in six of ten. **Taught** pairs are the right answer against one of S, and are hard where they have seven letters: S is on the side of the label in hardly any.
# - An **arm** is one way to train. Its **ladder** is the same arm at several $\beta$ and learning rates.
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
import numpy as np
import pandas as pd
from sdpo_nb.cells import Exam, prompts_of_split, stored_rows
from sdpo_nb.compare import outcome_values, plot_contrasts, weighted_sum
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.questions import BUILDS_ON_QUESTIONS, answer_together, answers_table, as_formulas, builds_on_ladders
from sdpo_nb.questions import by_outcome, choice_cells, ladder_cells, measured_on_ladders
from sdpo_nb.questions import untested_differences
from sdpo_nb.world import load_base, load_world

# %% [markdown]
# ## A source that builds on another
#
# To sort seven letters, a model must know how to sort, and must not stop after the sixth. S fails at both. Many of its demonstrations follow a wrong rule, and none is longer than six letters: [of 12,000 answers](new_domain.ipynb) to seven letters none was right. It is the same with the other three skills. The *own* source has pairs of three to six letters, and teaches the right rules. The *taught* source has seven letters.
#
# They differ in more than what they build on. S prefers the chosen response in six of ten own pairs, and in no taught one. A teacher wrote the chosen responses of the taught source. And all its labels are right, while own pairs are labelled by Bradley-Terry, which errs. So whoever ends on the taught source ends on clean labels, and that alone could make own pairs first better. Therefore both orders are also run with taught strings that are *short*: the same teacher and clean labels, and nothing that builds on the other source.
#
# What should we expect?
#
# - *By equation (2) of [finite data](finite_data.ipynb)* a moving reference adds what its stages learn, so order does not matter, if every stage reaches its optimum. Here none can: in the taught source the chosen response always wins, so its best reward is without end. Where a stage *starts* may then matter.
# - *Forgetting.* Taught first ends on short strings, and may stop after the sixth letter again. Own first ends on seven letters, and may go on too long where six were asked for. Each order can forget one half of the test.
# - *The trial* was made in the world that travels with the package, on 300 validation prompts and as many of seven letters. With a moving reference own first was better at each of three $\beta$. It is the reason for this page, and its runs were not kept.
#
# In real data, too, a stronger model often writes the chosen responses. That alone does not make a source hard: in [which is easy](which_is_easy.ipynb) Orca is such a source, and by the sum it is the easiest.
#
# ## Four questions

# %%
with pd.option_context("display.max_colwidth", None): display(as_formulas(BUILDS_ON_QUESTIONS))

# %% [markdown]
# The second question asks whether building on is the reason. Its two arms with short strings are asked the usual test prompts, which have three to six letters, so that all of them are about what both sources teach.
#
# Worlds, tests and margin are those of [when order matters](when_order_matters.ipynb). Each arm has a ladder of five $\beta$ at two learning rates, run in worlds 11 to 15; the better of two tops is measured in worlds 1 to 10 with two seeds. If a best rung is at an end, a rung is added there first. (At the larger rate five ladders went on. In two of them rewards still rose at the end, towards S, and stayed 0.05 below those of the smaller rate; then it was agreed that a rate which is 0.02 behind needs no top. Nothing had been measured yet.) A difference needs a p-value below 0.05 by sign flips over worlds, and an interval without 0. Equality needs a p-value below 0.05 by two one-sided tests within $\pm 0.02$. Both are corrected for four questions by Holm's method. How much such differences vary from world to world was not known beforehand.
#
# The outcome is a mean over two halves. A difference of 0.04 in one half alone is 0.02 in the mean, the margin; so *equal* does not say that both halves are. Beside the answers, and without tests, stand all arms against all at once, and the two halves by themselves.
#
# ## What came out
#
# `python -m sdpo_nb.experiments choose_builds_on` runs the ladders and writes what was chosen; `... builds_on` measures.

# %%
found = measured_on_ladders("builds_on")
answers = answer_together(BUILDS_ON_QUESTIONS, found)
display(answers_table(answers))
plot_contrasts(answers, sides=("better: the second", "better: the first"));

# %%
HALVES = {"six letters at most": slice(None, 300), "seven letters": slice(300, None)}
def told(difference): return as_text(interval(difference), "+.3f")
def by_half(difference): return {label: told(difference[..., half]) for label, half in HALVES.items()}

longer = {arm: rows for arm, rows in found.items() if not arm.endswith("short")}
beside = untested_differences(longer, "all at once")
halves = {arm: by_half(weighted_sum({arm: 1, "all at once": -1}, found)) for arm in beside.index}
display(beside.join(pd.DataFrame(halves).T))

# %% [markdown]
# So is one half of the test won and the other lost?

# %%
ORDERS = {
    "moving": ("own first, moving", "taught first, moving"),
    "fixed": ("own first, fixed", "taught first, fixed"),
    "moving, short strings": ("own first, moving, short", "taught first, moving, short"),
}
orders = {}
for name, (own, taught) in ORDERS.items():
    difference = weighted_sum({own: 1, taught: -1}, found)
    orders[name] = {"all prompts": told(difference)}
    if "short" not in name: orders[name] |= by_half(difference)
display(pd.DataFrame(orders).T.fillna("").rename_axis("own first minus taught first"))

# %% [markdown]
# What we expected, and what came out:
#
# - *Stages do not reach their optimum, so order may matter.* It does, with a moving reference, and in the direction of the trial: own first is better, by half of what the trial showed. It is better on both halves of the test, so it is not that one order forgets six letters and the other one seven.
# - *Building on is the reason.* With short strings, written by the same teacher and as clean, +0.004 [-0.002, +0.010] is left of the difference. So clean labels at the end do not explain it.
# - *Each order can forget one half.* So it is with a fixed reference. There the last source counts most, and taught first, which ends on own pairs, is better: on strings of six letters at most by 0.037, on seven by nothing.
# - *All at once is ahead of both*, as in the trial: of every arm in stages, by 0.025 to 0.055, and most on the short strings.
#
# The tuned $\beta$ say where taught first goes wrong: it wants 4.1 with a moving reference, own first 1.8. The chosen response of a taught pair always wins, so a stage that has only such pairs must be held tightly. How far the two steps can be told apart, no arm here says.
#
# In all ten worlds own first is ahead with a moving reference. And in the five in which settings were chosen, with one seed?

# %%
rewards = stored_rows(ladder_cells("builds_on")).set_index("key")["sampled"].map(np.mean)

def in_choice_worlds(arm, beta): # mean reward in each of the five
    rung = builds_on_ladders()[arm].rung(beta, 1e-4)
    return np.array([rewards[cell.key] for cell in choice_cells("builds_on", rung)])

rungs = {}
for beta in builds_on_ladders()["own first, moving"].betas:
    own, taught = (in_choice_worlds(arm, beta) for arm in ORDERS["moving"])
    rungs[beta] = {"own first": own.mean(), "taught first": taught.mean()}
    rungs[beta]["own first is ahead in"] = f"{(own > taught).sum()} of 5"
rungs = pd.DataFrame(rungs).T.rename_axis("beta, at rate 1e-4").infer_objects()
best = rungs.max()
assert round(best["own first"] - best["taught first"], 3) == 0.004
display(rungs.round(3))

# %% [markdown]
# There own first is ahead at small $\beta$, and from 4 on it is not. The best rungs differ by 0.004 only, four worlds for own first and one clearly against it. So the sign is well supported, and the size of 0.021 less so.
#
# So if sources must come one after the other, let the reference move and begin with the one that S can already do. If nothing forces you, mix them.

# %% [markdown]
# ## Asked by multiple choice
#
# The benchmarks of the paper, H4, never let a model write. They rank given answers. Beside the reward we did that, too: four answers, of which one is right, one follows the wrong rule, one is a letter short, and in one two neighbours are swapped ([one run](cells.ipynb)). Do the two exams agree?

# %%
display(by_outcome(BUILDS_ON_QUESTIONS, found)[["reward", "multiple choice"]])

choices = {}
for name, (own, taught) in ORDERS.items():
    if "short" in name: continue
    choices[name] = by_half(weighted_sum({own: 1, taught: -1}, found, "choice"))
    for arm in (own, taught):
        levels = outcome_values(found[arm], "choice")
        choices[arm] = {label: f"{levels[..., half].mean():.2f}" for label, half in HALVES.items()}
pd.DataFrame(choices).T.rename_axis("multiple choice; the difference, then its two arms")

# %% [markdown]
# With a moving reference they do, and the choices differ by twice as much. With a fixed one they do not. On six letters own first is behind in both. On seven it writes no better answers, but *chooses* the right one in 0.11 more of the cases; so in the mean of both halves it is ahead (+0.028, p = 0.06 by sign flips), where by reward it is behind. And on seven letters every arm chooses worse than by guessing, which would be right in 25 of 100. Which answer do they like better? S of world 0, before any training:

# %%
kinds = ("right", "wrong rule", "a letter short", "neighbours swapped")
world = load_world()
base, tokenizer = load_base(world)
liked = {}
for split in ("test", "seven letters"):
    exam = Exam(base, tokenizer, prompts_of_split(0, split)[:300], luck=1)
    liked[split] = pd.Series(exam.first_choices(base)["choice"]).value_counts(normalize=True).reindex(range(4), fill_value=0)
liked = pd.DataFrame(liked).set_axis(kinds).round(2)
assert liked["seven letters"].idxmax() == "a letter short"
liked

# %% [markdown]
# The one that is a letter short: an answer of six letters, which is what S has learned to write. So on seven letters this exam asks how far a model has unlearned to stop after six. Pairs of a teacher teach that best when they come last. It is no lie, but it is not what the written answers are worth. A score below guessing is a warning: it does not measure the skill that it is named after.

# %% [markdown]
# ## What this does not show
#
# - **How large the difference is in other worlds.** It is 0.021 in the ten that were measured, and 0.004 in the five of the choice.
# - **That the hard source needs the easy one.** Its own pairs teach the rules, too. No arm here trains on one source alone.
# - **Which of two things makes seven letters hard**: that they build on six, or that S cannot write their answers.
# - **A source that is hard for other reasons.** [When order matters](when_order_matters.ipynb) has bad labels.
# - **Larger models.** S has 340 thousand parameters, and seven letters are one letter more than it knows.
#
# ## What you now have
#
# - Worlds whose hard source builds on the easy one, a control in which it does not, and four answers with tests.
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
#   Answers are cut after eight tokens. A right answer of seven letters needs all eight, the last for its end. One of eight letters needs nine, so `max_new` has to grow, also where S writes the rejected answers.
#
#   </details>
