# %% [markdown]
# # What carries over to a new domain?
# > Pairs of three skills, measured on the fourth; strings longer than any; letters that were never seen.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/new_domain.ipynb)
#
# **To longer strings two fifths of the gain, to a skill without pairs none.** In ten worlds with two seeds each, DPO gains 0.242 of true reward with pairs of all skills. A skill whose pairs are left out loses 0.029 [0.012, 0.048], though S had demonstrations of it; with stepwise DPO it loses 0.016 [0.000, 0.031], after half the distance from S. Strings one letter longer than any gain 0.094 [0.083, 0.105],
# equally with both ($\pm 0.02$). Letters that were never answered stay hopeless, at 0.001, before and after.
#
# **You should know** [stepwise DPO](../09_stepwise.ipynb) and the [protocol](protocol.ipynb). **Time** a few seconds; the grid behind it took hours (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import numpy as np
import pandas as pd
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.experiments import differences, load_grid, plot_contrasts, unfolded
from sdpo_nb.world import SKILLS, load_base, load_world, respond

# %% [markdown]
# ## A skill without pairs
#
# The paper aligns a model on instructions of many kinds and measures it on others. How much can we expect to carry over? In the tiny world S has seen demonstrations of all four skills, and in each of them about half of its prompts misled it. Now the pairs of one skill are left out, for all three sources, and the models are measured on test prompts of that skill. DPO and stepwise DPO each have the settings
# that were best for them with all pairs.

# %%
found, main = load_grid("new_domain"), load_grid("primary")
def ends(rows, what, *skills): # (worlds, seeds, 1): the last model, a mean over skills, all where none is named
    t = unfolded(rows, "stages").query("skill in @skills") if skills else unfolded(rows, "stages")
    return t[t["stage"] == t["stage"].max()].groupby(["world", "seed"])[what].mean().unstack().to_numpy()[..., None]
def gain(rows, what, *skills): return ends(rows, what, *skills) - ends(main["S"], what, *skills)

RUNS = {"pairs of all skills": lambda m, skill: main[m], "no pairs of it": lambda m, skill: found[f"{m}, without {skill}"]}
carried = differences({f"{skill}: {how}, {m}": gain(rows(m, skill), "sampled", skill) for how, rows in RUNS.items() for skill in SKILLS for m in ("DPO", "sDPO")})
without = carried[carried["question"].str.contains("no pairs")]
assert without["high"].max() < 0.04 and carried["mean"].drop(without.index).min() > 0.1
plot_contrasts(carried, "true reward on the skill, minus that of S (grey: too small to count)");


# %% [markdown]
# With its own pairs a skill gains 0.1 to 0.36. Without them, nothing that is worth the name; *reverse* is worse than before, with either method. The mean over the four cases, beside the three skills that did have pairs:

# %%
def other(skill): return [s for s in SKILLS if s != skill]
def mean_of(m, what, which): return np.mean([gain(found[f"{m}, without {skill}"], what, *which(skill)) for skill in SKILLS], 0)
means = {(m, kind): {name: mean_of(m, what, which) for name, what in {"true reward, sampled": "sampled", "greedy": "greedy", "KL from S (nats)": "kl"}.items()} for m in ("DPO", "sDPO") for kind, which in (("the three skills with pairs", other), ("the skill without", lambda s: [s]))}
assert all(interval(t["true reward, sampled"])[2] < 0.001 for (_, kind), t in means.items() if kind == "the skill without")
pd.DataFrame(means).T.map(lambda d: as_text(interval(d))).rename_axis(["", "change from S, on"])

# %% [markdown]
# So the model does not stand still on the fourth skill. It moves, by 0.6 (DPO) or 0.4 (sDPO) of the distance that the others move, and to no avail. One might have hoped otherwise: in each skill half of the prompts, those whose string begins with *a* to *e*, were demonstrated wrongly, and the pairs say "not like that". But *how* it is done wrongly is each skill's own (a sort comes out descending,
# a copy puts its first letter last), and that is what is unlearned.
#
# Does it matter which method moved it?

# %%
between = differences({f"without {skill}, on {skill}, {what}": ends(found[f"sDPO, without {skill}"], what, skill) - ends(found[f"DPO, without {skill}"], what, skill) for skill in SKILLS for what in ("sampled", "greedy")})
plot_contrasts(between, "sDPO minus DPO on the skill that was left out, true reward");

# %% [markdown]
# On *reverse*, which loses most, stepwise DPO loses less by 0.028 [0.013, 0.043], and nowhere more. It is also only half as far from S there (0.47 against 0.99 nats, above), because the search gave it a larger $\beta$ and a smaller learning rate. [The protocol](protocol.ipynb) shows DPO at that rate as near to S as stepwise DPO, so these bars speak of the distance, and not of stages.
#
# ## Longer strings, other letters
#
# Strings have three to six letters everywhere else in the world, in demonstrations and pairs. Here are strings of seven, 300 prompts for each world; and the test prompts with *l* to *v* in place of *a* to *k*. (Those letters are in the vocabulary, but no prompt and no answer had them. *shift* has no answer there and is left out.)

# %%
SPLITS, METHODS = {"seven letters": (), "other letters": tuple(s for s in SKILLS if s != "shift")}, ("S", "DPO", "sDPO")
far = {split: {m: {name: ends(found[f"{m}, {split}"], what, *skills) for name, what in {"true reward, sampled": "sampled", "greedy": "greedy", "KL from S (nats)": "kl"}.items()} for m in METHODS} for split, skills in SPLITS.items()}
pd.DataFrame({(split, m): {k: as_text(interval(v)) for k, v in t.items()} for split, by in far.items() for m, t in by.items()}).T

# %%
seven = far["seven letters"]
longer = differences({f"{a} minus {b}, {what.removeprefix('true reward, ')}": seven[a][what] - seven[b][what] for a, b in (("DPO", "S"), ("sDPO", "S"), ("sDPO", "DPO")) for what in ("true reward, sampled", "greedy")})
assert longer["low"].iloc[:4].min() > 0.07 and longer[["low", "high"]].iloc[4].abs().max() < 0.02 and all(t["true reward, sampled"].mean() < 0.002 for t in far["other letters"].values())
plot_contrasts(longer, "seven letters: difference of mean true reward");

# %% [markdown]
# One letter more, and 0.094 is left of a gain of 0.242. It costs more than twice the distance from S. With other letters there was nothing that DPO could have raised: it chooses among what S may answer, and S answers in the letters it knows.

# %%
world = load_world(); base, tok = load_base(world)
strange = ["copy lmno", "sort pomn", "reverse tvr", "copy abcdefg", "sort gfedcba"]
pd.Series(respond(base, tok, strange, 0), strange, name="greedy answer of S").to_frame()

# %% [markdown]
# ## What you now have
#
# - Three distances from the training data, and what is left at each: a longer string some, another skill nothing, another alphabet nothing.
# - A KL on prompts that training never asked about: it grows there, too, without a reward that pays for it.
#
# All of it is about a model of 340 thousand parameters that knows four skills. A large one shares more between its skills, and may carry more over.
#
# ## Questions to test yourself
#
# 1. S had demonstrations of the skill that was left out. Does that make carrying over easier or harder to show?
# 2. Why does KL grow on prompts without pairs?
# 3. What would a model need before preference pairs could teach it an alphabet?
#
# ## Try this
#
# - Leave out *sort* and *reverse*. Does *copy* still gain?
# - Add ten pairs of the skill that was left out. How much of the gain comes back?
