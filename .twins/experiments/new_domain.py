# %% [markdown]
# # What carries over to a new domain?
# > Pairs of three skills, measured on the fourth; strings longer than any; letters that were never seen.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/new_domain.ipynb)
#
# **To a skill without pairs nothing, to longer strings half of the skills.** In ten worlds with two seeds each, DPO gains 0.242 [0.232, 0.255] of true reward on three skills with pairs, and loses 0.029 [0.012, 0.048] on the fourth, whose pairs were left out: 0.058 [0.037, 0.077] where S was mostly right, nothing where it was misled (+0.004 [-0.017, 0.022]).
# On strings one letter longer than any, *sort* gains 0.241 [0.205, 0.280] and *shift* 0.154 [0.131, 0.176], *copy* and *reverse* nothing, and of 6,000 greedy answers none has all seven letters right. With letters that no answer ever had the reward stays at 0.001. Stepwise DPO loses less of the fourth skill, and plain DPO at its learning rate less still: the loss goes with the distance from S.
#
# **You should know** [stepwise DPO](../09_stepwise.ipynb) and the [protocol](protocol.ipynb). **Time** a few seconds; the grid behind it took 1.0 core hours (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

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
# The paper aligns a model on instructions of many kinds and measures it on others. How much can we expect to carry over? In the tiny world S has seen demonstrations of all four skills. In each of them it was *misled* on the strings that begin with *a* to *e*: 70 % of their demonstrations follow a wrong rule, and 30 % of the others. The pairs say "not like that". Now those of one skill are left out, from all three sources; do
# the other three teach it? DPO and stepwise DPO each have the settings that were best for them with all pairs, and what is shown is the change of true reward on test prompts of the skill that was left out.

# %%
found = load_grid("primary") | load_grid("new_domain")
PROMPTS = {(w, split): prompts_of_split(w, split) for w in WORLDS for split in ("test", "seven letters", "other letters")}
def kept(name, what, keep): # (worlds, seeds, 1): mean over the prompts for which keep(skill, string) holds
    of = {(r.world, r.seed): np.mean([v for v, p in zip(getattr(r, what), PROMPTS[r.world, r.split], strict=True) if keep(*p.split())]) for r in found[name].itertuples()}
    return pd.Series(of).unstack().to_numpy()[..., None]
def gain(name, keep, what="sampled"): return kept(name, what, keep) - kept("S, " + name.split(", ")[1] if "letters" in name else "S", what, keep)

KINDS = {"where S was misled": True, "where it was not": False}
METHODS = ("DPO", "sDPO")
left_out = {kind: difference_intervals({f"{skill}, {m}": gain(f"{m}, without {skill}", lambda s, string: s == skill and misled(f"{s} {string}") == hard) for skill in SKILLS for m in METHODS}) for kind, hard in KINDS.items()}
fig, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True, sharey=True, constrained_layout=True)
for ax, (kind, table) in zip(axes, left_out.items()): plot_contrasts(table, "true reward minus that of S", ax=ax); ax.set_title(kind, fontsize="medium")


# %% [markdown]
# With its own pairs a skill gains 0.10 to 0.36 in the mean. Without them *sort* gains a little where it was misled, *reverse* loses everywhere, and all lose or stand still where S was right more often than not. The means over the four cases, with the three skills that did have pairs beside them:

# %%
def mean_of(m, what, keep): return np.mean([gain(f"{m}, without {skill}", lambda s, string: keep(skill, s, string), what) for skill in SKILLS], 0)
WHERE = {"the three skills with pairs": lambda skill, s, string: s != skill, "the skill without": lambda skill, s, string: s == skill,
         **{f"the skill without, {kind}": (lambda skill, s, string, hard=hard: s == skill and misled(f"{s} {string}") == hard) for kind, hard in KINDS.items()}}
change = {(m, where): {label: mean_of(m, what, keep) for what, label in OUTCOMES.items()} for m in METHODS for where, keep in WHERE.items()}
all_skills = {skill: gain(m, lambda s, string: s == skill).mean() for m in METHODS for skill in SKILLS}
assert min(all_skills.values()) > 0.095 and all(interval(change[m, "the skill without"]["true reward, sampled"])[2] < 0.001 and abs(np.array(interval(change[m, "the skill without, where S was misled"]["true reward, sampled"]))).max() < 0.03 for m in METHODS)
pd.DataFrame(change).T.map(lambda d: as_text(interval(d))).rename_axis(["", "change from S, on"])


# %% [markdown]
# So the model does not stand still on the fourth skill. DPO moves there by 0.6 of the distance that the three others move, and what that changes is for the worse: answers that were right. In greedy answers both sides are larger, +0.089 where S was misled and -0.129 where it was not. *Not like that* is learned for each skill by itself; its wrong rule is its own, too (a sort comes out descending, a copy puts its first letter last).
#
# Stepwise DPO loses less, and moves less. Because of its stages? DPO was run at its learning rate, too, where it is near S ([protocol](protocol.ipynb)):

# %%
def of(skill): return lambda s, string: s == skill
PAIRS = {"sDPO minus DPO": ("sDPO", "DPO"), "DPO at sDPO's rate minus DPO": ("DPO at sDPO's rate", "DPO"), "sDPO minus DPO at sDPO's rate": ("sDPO", "DPO at sDPO's rate")}
between = {pair: {what: np.mean([kept(f"{a}, without {skill}", what, of(skill)) - kept(f"{b}, without {skill}", what, of(skill)) for skill in SKILLS], 0) for what in OUTCOMES} for pair, (a, b) in PAIRS.items()}
assert interval(between["DPO at sDPO's rate minus DPO"]["sampled"])[1] > 0 > interval(between["sDPO minus DPO at sDPO's rate"]["sampled"])[2] and interval(between["sDPO minus DPO at sDPO's rate"]["kl"])[1] > 0
pd.DataFrame(between).map(lambda d: as_text(interval(d))).T.rename_axis("on the skill without pairs")

# %% [markdown]
# At that rate DPO moves least of the three, and loses least: less than stepwise DPO, by 0.012. So what a skill without pairs loses goes with the distance, and stages are no protection. (Within a single skill distance is not all: on *copy* stepwise DPO is at little more than a third of the distance of DPO, and both lose the same.)
#
# ## Longer strings
#
# Strings have three to six letters everywhere else in the world, in demonstrations and pairs. Here are strings of seven, 300 prompts for each world, beside the test prompts of six.

# %%
LENGTHS = {"six letters": ("{}", 6), "seven letters": ("{}, seven letters", 7)}
longer = {length: difference_intervals({f"{skill}, {m}": gain(name.format(m), lambda s, string: s == skill and len(string) == n) for skill in SKILLS for m in METHODS}) for length, (name, n) in LENGTHS.items()}
by_row = longer["seven letters"].set_index("question")
assert by_row["low"].filter(regex="sort|shift").min() > 0.1 and by_row["low"].filter(regex="copy|reverse").max() < 0
fig, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True, sharey=True, constrained_layout=True)
for ax, (length, table) in zip(axes, longer.items()): plot_contrasts(table, "true reward minus that of S", ax=ax); ax.set_title(length, fontsize="medium")

# %% [markdown]
# *Sort* and *shift* keep half to two thirds of the gain that they have at six letters, *copy* and *reverse* keep nothing. But none of it is a right answer. S answers seven letters with six, and so do the models after it:

# %%
answers = {m: np.concatenate([np.stack(found[f"{m}, seven letters"][how]).ravel() for how in ("greedy", "sampled")]) for m in ("S", *METHODS)}
assert all((v < 1).all() for v in answers.values())
pd.DataFrame({m: {"answers": len(v), "all letters right": (v == 1).sum(), "highest true reward": v.max(), "KL from S, seven letters": as_text(interval(kept(f"{m}, seven letters", "kl", lambda *_: True))), "six letters": as_text(interval(kept(m, "kl", lambda s, string: len(string) == 6)))} for m, v in answers.items()}).T

# %%
world = load_world(); base, tok = load_base(world)
strange = ["copy abcdefg", "sort gfedcba", "copy lmno", "sort pomn", "reverse tvr"]
pd.Series(respond(base, tok, strange, 0), strange, name="greedy answer of S").to_frame()

# %% [markdown]
# The highest reward is 6/7, an edit distance of one. So what carries over is the rule, within the length that the model knows; the length does not, and DPO cannot make it: it chooses among what S writes, and S does not write seven letters. It costs twice the distance from S that six letters cost.
#
# ## Other letters
#
# The last rows of that table are worse off. They have *l* to *v* in place of *a* to *k*, letters that are in the vocabulary and in no string and no answer; S answers in the letters it knows. (*Shift* has no answer there and is left out.)

# %%
assert all(kept(f"{m}, other letters", "sampled", lambda *_: True).mean() < 0.002 for m in ("S", *METHODS))
pd.DataFrame({m: {label: as_text(interval(kept(f"{m}, other letters", what, lambda *_: True))) for what, label in OUTCOMES.items()} for m in ("S", *METHODS)}).T

# %% [markdown]
# Nothing is gained, and the models still move two to three nats away from S: on prompts that nobody asked about, training changes answers without a reward that would pay for it.
#
# ## What you now have
#
# - Three distances from the training data, and what is left at each: at another skill a loss, at another length a rule without the length, at another alphabet nothing.
# - A reason to measure KL where there were no pairs.
#
# All of it is about a model of 340 thousand parameters that knows four skills. A large one shares more between its skills, and may carry more over.
#
# ## Questions to test yourself
#
# 1. The mean over a skill without pairs is nearly zero. Why is it worth splitting?
# 2. Partial credit gives 0.094 of mean reward to answers none of which is right. Which measure would have shown that at once?
# 3. What would S need before preference pairs could teach it a seventh letter?
#
# ## Try this
#
# - Leave out *sort* and *reverse*. Does *copy* still gain?
# - Add ten pairs of the skill that was left out. How much of the gain comes back?
