# %% [markdown]
# # What carries over to a new domain?
# > Pairs of three skills, measured on the fourth; strings longer than any; letters that were never seen.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/new_domain.ipynb)
#
# **To a skill without pairs, nothing carries over; to longer strings, half of the skills do.** DPO gains 0.242 [0.232, 0.255] of true reward on three skills with pairs, and loses 0.029 [0.012, 0.048] on the fourth, whose pairs were left out. It loses 0.058 [0.037, 0.077] where S was mostly right, and nothing where S was mostly wrong (+0.004 [-0.017, 0.022]).
#
# On strings one letter longer than any in training, *sort* gains 0.241 [0.205, 0.280] and *shift* 0.154 [0.131, 0.176]; *copy* and *reverse* gain nothing. Of 6,000 greedy answers none has all seven letters right. With letters that no answer ever had, the reward stays at 0.001.
#
# Stepwise DPO loses less of the fourth skill than DPO, and plain DPO at the learning rate of stepwise DPO loses less still. What is lost goes with the distance from S. All numbers are from ten worlds with two seeds each.
#
# **You should know** [stepwise DPO](../14_stepwise.ipynb) and the [protocol](protocol.ipynb). **Time** 28 minutes to read, a few seconds to run. The grid behind it took 1.0 core hours (`make experiments`).
#
# <details><summary>Words used on this page</summary>
#
# - **S** is the model before alignment. It was trained on demonstrations of four skills: say a string again (*copy*), backwards (*reverse*), in order (*sort*), or with every letter moved on by one (*shift*).
# - **Misled**: for strings that begin with *a* to *e*, 70 % of the demonstrations follow a wrong rule; for the others 30 %. So on a misled prompt S is mostly wrong.
# - **A pair** is a prompt with two answers of S, one *chosen* and one *rejected*. **DPO** trains on all pairs at once; **stepwise DPO** (sDPO) in three stages, one source after another.
# - **$\beta$** says how strongly a model is held at its reference. **KL** is the distance from S, in nats, along the model's own answers.
# - **True reward** is 1 for the right answer and less for every letter that has to be mended. *Sampled* answers are drawn; a *greedy* answer takes the likeliest letter at every place.
# - **0.242 [0.232, 0.255]** is a mean and its 95 % interval. Differences are *paired*: same worlds, seeds and prompts.
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
from sdpo_nb.cells import prompts_of_split
from sdpo_nb.compare import OUTCOMES, difference_intervals, plot_contrasts
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.questions import WORLDS, load_grid
from sdpo_nb.world import SKILLS, load_base, load_world, misled, respond

# %% [markdown]
# ## A skill without pairs
#
# The paper aligns a model on instructions of many kinds and measures it on others. How much can we expect to carry over? The pairs of this world say "not like that" wherever S followed the wrong rule. Now we leave out all pairs of one skill, from all three sources. Do the pairs of the other three skills teach it, too?
#
# DPO and stepwise DPO each have the settings that were best for them with all pairs. Stored are rewards by prompt, so we can take the mean over any kind of prompts:

# %%
found = load_grid("primary") | load_grid("new_domain")
SPLITS = ("test", "seven letters", "other letters")
PROMPTS = {(world, split): prompts_of_split(world, split) for world in WORLDS for split in SPLITS}

def mean_over(name, what, keep):
    "Mean over the prompts for which keep(skill, string) holds: (worlds, seeds, 1)."
    means = {}
    for row in found[name].itertuples():
        prompts = PROMPTS[row.world, row.split]
        values = zip(prompts, getattr(row, what), strict=True)
        means[row.world, row.seed] = np.mean([v for prompt, v in values if keep(*prompt.split())])
    return pd.Series(means).unstack().to_numpy()[..., None]

def everything(skill, string):
    return True


# %% [markdown]
# What we show is the *gain*: this mean minus that of S on the same prompts.

# %%
def gain(name, keep, what="sampled"):
    start = "S"
    if "letters" in name:                       # S on the same prompts
        start = "S, " + name.split(", ")[1]
    return mean_over(name, what, keep) - mean_over(start, what, keep)

def only(skill, hard=None):
    "Prompts of one skill; of those the misled ones (True), the others (False), or all (None)."
    def keep(own, string):
        if own != skill: return False
        return hard is None or misled(f"{own} {string}") == hard
    return keep


# %% [markdown]
# Before you look: which is more likely to profit from the pairs of other skills, prompts where S was mostly wrong, or prompts where it was mostly right?

# %%
KINDS = {"where S was misled": True, "where it was not": False}
METHODS = ("DPO", "sDPO")

left_out = {}
for kind, hard in KINDS.items():
    gains = {}
    for skill in SKILLS:
        for method in METHODS:
            gains[f"{skill}, {method}"] = gain(f"{method}, without {skill}", only(skill, hard))
    left_out[kind] = difference_intervals(gains)

# %%
UNIT = "true reward minus that of S"
SIDES = ("worse than S", "better")

fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharex=True, sharey=True, constrained_layout=True)
for ax, (kind, table) in zip(axes, left_out.items()):
    plot_contrasts(table, UNIT, ax=ax, sides=SIDES)
    ax.set_title(f"pairs of this skill left out, {kind}", fontsize="medium")


# %% [markdown]
# With its own pairs a skill gains 0.10 to 0.36 in the mean. Without them, *sort* gains a little where S was misled; *reverse* loses everywhere; and where S was mostly right, all lose or stand still.
#
# Here are the means over the four cases, one for each skill that can be left out. The first row of each method is about the three skills that did have pairs.

# %%
def mean_gain(method, what, keep):
    "The mean over the skills that can be left out; keep(left out, skill, string)."
    gains = []
    for out in SKILLS:
        def here(skill, string): return keep(out, skill, string)
        gains.append(gain(f"{method}, without {out}", here, what))
    return np.mean(gains, axis=0)

def is_hard(skill, string):
    return misled(f"{skill} {string}")

def others(out, skill, string): return skill != out
def itself(out, skill, string): return skill == out
def itself_misled(out, skill, string): return skill == out and is_hard(skill, string)
def itself_right(out, skill, string): return skill == out and not is_hard(skill, string)

WHERE = {
    "the three skills with pairs": others,
    "the skill without": itself,
    "the skill without, where S was misled": itself_misled,
    "the skill without, where it was not": itself_right,
}
change = {}
for method in METHODS:
    for where, keep in WHERE.items():
        gains = {label: mean_gain(method, what, keep) for what, label in OUTCOMES.items()}
        change[method, where] = {label: interval(g) for label, g in gains.items()}

# %%
sampled = {key: row["true reward, sampled"] for key, row in change.items()}
for method in METHODS:
    with_pairs = [gain(method, only(skill)).mean() for skill in SKILLS]
    assert min(with_pairs) > 0.095
    _, _, high = sampled[method, "the skill without"]
    assert high < 0.001
    assert np.abs(sampled[method, "the skill without, where S was misled"]).max() < 0.03
pd.DataFrame(change).T.map(as_text).rename_axis(["", "change from S, on"])


# %% [markdown]
# So the model does not stand still on the fourth skill. DPO moves there by 0.6 of the distance (KL) that it moves on the three others. What that changes is for the worse: answers that were right. In greedy answers both sides are larger, +0.089 where S was misled and -0.129 where it was not.
#
# *Not like that* is learned for each skill by itself. The wrong rules are different, too: a wrong sort comes out descending, a wrong copy puts its first letter last.
#
# ## Do stages protect what has no pairs?
#
# Stepwise DPO loses less than DPO, and moves less. Because of its stages? For this DPO was also run at the learning rate of stepwise DPO, which is a third of its own. There it ends near S ([protocol](protocol.ipynb)).

# %%
def between(a, b, what):
    "a minus b on the skill without pairs, mean over the four skills that can be left out."
    of_skills = []
    for skill in SKILLS:
        one = mean_over(f"{a}, without {skill}", what, only(skill))
        other = mean_over(f"{b}, without {skill}", what, only(skill))
        of_skills.append(one - other)
    return interval(np.mean(of_skills, axis=0))

SLOW_DPO = "DPO at sDPO's rate"
compared = {}
for a, b in (("sDPO", "DPO"), (SLOW_DPO, "DPO"), ("sDPO", SLOW_DPO)):
    compared[f"{a} minus {b}"] = {what: between(a, b, what) for what in OUTCOMES}

assert compared["DPO at sDPO's rate minus DPO"]["sampled"][1] > 0
assert compared["sDPO minus DPO at sDPO's rate"]["sampled"][2] < 0
assert compared["sDPO minus DPO at sDPO's rate"]["kl"][1] > 0
pd.DataFrame(compared).map(as_text).T.rename_axis("on the skill without pairs")


# %% [markdown]
# At that rate DPO moves least of the three, and loses least: less than stepwise DPO, by 0.012. So stages are no protection; what a skill without pairs loses goes with the distance. (Within a single skill distance is not all. On *copy*, stepwise DPO has gone little more than a third as far as DPO, and both lose the same.)
#
# ## Longer strings
#
# Everywhere else in this world strings have three to six letters, in demonstrations and in pairs. Here are strings of seven, 300 prompts for each world. Pairs of all skills are back. Beside them stand the test prompts of six letters.

# %%
def of_length(skill, n):
    def keep(own, string): return own == skill and len(string) == n
    return keep

longer = {}
for length, split, n in (("six letters", "", 6), ("seven letters", ", seven letters", 7)):
    gains = {}
    for skill in SKILLS:
        for method in METHODS:
            gains[f"{skill}, {method}"] = gain(method + split, of_length(skill, n))
    longer[length] = difference_intervals(gains)

seven = longer["seven letters"].set_index("question")["low"]
assert seven.filter(regex="sort|shift").min() > 0.1
assert seven.filter(regex="copy|reverse").max() < 0

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharex=True, sharey=True, constrained_layout=True)
for ax, (length, table) in zip(axes, longer.items()):
    plot_contrasts(table, UNIT, ax=ax, sides=SIDES)
    ax.set_title(length, fontsize="medium")


# %% [markdown]
# *Sort* and *shift* keep half to two thirds of the gain that they have at six letters. *Copy* and *reverse* keep nothing. But is any of it a right answer?

# %%
def every_answer(method):
    "The true rewards of all greedy and all sampled answers to seven letters."
    rows = found[f"{method}, seven letters"]
    return np.concatenate([np.stack(rows[how]).ravel() for how in ("greedy", "sampled")])

seven_letters = {}
for method in ("S", *METHODS):
    rewards = every_answer(method)
    assert (rewards < 1).all()
    kl_seven = mean_over(f"{method}, seven letters", "kl", everything)
    kl_six = mean_over(method, "kl", lambda skill, string: len(string) == 6)
    seven_letters[method] = {
        "answers": len(rewards),
        "all letters right": (rewards == 1).sum(),
        "highest true reward": rewards.max(),
        "KL from S, seven letters": as_text(interval(kl_seven)),
        "six letters": as_text(interval(kl_six)),
    }
pd.DataFrame(seven_letters).T

# %% [markdown]
# None of 12,000. Here is what S itself says, in the world that travels with the package. The last three prompts are about other letters, which come next.

# %%
world = load_world()
base, tokenizer = load_base(world)
strange = ["copy abcdefg", "sort gfedcba", "copy lmno", "sort pomn", "reverse tvr"]
pd.Series(respond(base, tokenizer, strange, 0), strange, name="greedy answer of S").to_frame()

# %% [markdown]
# S answers seven letters with six, and so do the models after it. The highest reward is 6/7: one letter is missing. So what carries over is the rule, within the length that the model knows. The length does not carry over, and DPO cannot make it: it chooses among what S writes, and S does not write seven letters. The attempt costs twice the distance from S that six letters cost.
#
# ## Other letters
#
# The last three of those answers are worse off. Their prompts have *l* to *v* in place of *a* to *k*. These letters are in the vocabulary, but in no string and in no answer, and S answers in the letters that it knows. Does alignment help? (*Shift* has no answer there and is left out.)

# %%
other_letters = {}
for method in ("S", *METHODS):
    values = {what: mean_over(f"{method}, other letters", what, everything) for what in OUTCOMES}
    assert values["sampled"].mean() < 0.002
    other_letters[method] = {label: as_text(interval(values[what])) for what, label in OUTCOMES.items()}
pd.DataFrame(other_letters).T

# %% [markdown]
# Nothing is gained, and the models still move two to three nats away from S. On prompts that nobody asked about, training changes answers, and no reward pays for it.
#
# ## What this does not show
#
# - **Large models.** This one has 340 thousand parameters and knows four skills. A large model shares more between its skills, and may carry more over.
# - **Skills that build on each other.** No skill of this world is part of another.
# - **Training on another domain.** Here the domain changes at test time only.
#
# ## What you now have
#
# - Three distances from the training data, and what is left at each: at another skill a loss, at another length a rule without the length, at another alphabet nothing.
# - A reason to measure KL where there were no pairs.
#
# ## Questions to test yourself
#
# 1. The mean over a skill without pairs is nearly zero. Why is it worth splitting?
# <details><summary>Answer</summary>
#
# It hides two things that go in opposite directions: in greedy answers a gain where S was misled and a larger loss where it was right.
# </details>
#
# 2. Partial credit gives DPO a mean gain of 0.097 at seven letters, for answers none of which is right. Which measure would have shown that at once?
# <details><summary>Answer</summary>
#
# The share of exact answers. True reward gives credit for each letter that fits.
# </details>
#
# 3. What would S need before preference pairs could teach it a seventh letter?
# <details><summary>Answer</summary>
#
# Demonstrations with seven letters. A pair can only prefer an answer that S writes now and then.
# </details>
#
# ## Try this
#
# Both in world 0, with the settings of DPO: `rows = TRAINING_DATA["one source"](world, base, tokenizer)["all"]` gives the pairs, `sdpo(world.base, {"all": kept}, StepwiseConfig(**COMMON_SETTINGS | chosen_settings()["DPO"], chunks=1), folder)` trains on those that you keep, and `skill_table(run.model, tokenizer, world.test)` measures. A run takes some ten seconds.
#
# - Leave out *sort* and *reverse* together. Do *copy* and *shift* still gain?
# <details><summary>What you should see</summary>
#
# Yes: *copy* goes from 0.74 to 0.91 and *shift* from 0.49 to 0.82. *Reverse* falls from 0.71 to 0.66; *sort* hardly moves (0.51 to 0.53).
# </details>
#
# - Leave out *sort*, then add 10 or 50 of its pairs again. How much of the gain comes back?
# <details><summary>What you should see</summary>
#
# Without any, *sort* falls from 0.51 to 0.47. With 10 pairs it reaches 0.58, with 50 pairs 0.80. (One world and one run.)
# </details>
