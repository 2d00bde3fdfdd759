# %% [markdown]
# # What carries over to a new domain?
# > Pairs of three skills, measured on the fourth; strings longer than any; letters that were never seen.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/new_domain.ipynb)
#
# ANSWER
#
# **You should know** [stepwise DPO](../09_stepwise.ipynb) and the [protocol](protocol.ipynb). **Time** a few seconds; the grid behind it took hours (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import io
import pandas as pd
from sdpo_nb.experiments import differences, load_grid, means, outcome, plot_contrasts
from sdpo_nb.world import SKILLS

# %% [markdown]
# ## A skill without pairs
#
# S has seen demonstrations of all four skills, and half of its prompts are misled in each. Now the pairs of one skill are left out, and the models are measured on that skill. What they gain there, they learned from pairs about other skills.

# %%
found, main = load_grid("new_domain"), load_grid("primary")
def on(rows, skill, what="sampled"): # (worlds, seeds, 1): the last model, on the test prompts of one skill
    last = pd.concat([pd.read_json(io.StringIO(r.stages)).query("skill == @skill").sort_values("stage").tail(1).assign(world=r.world, seed=r.seed) for r in rows.itertuples()])
    return last.set_index(["world", "seed"])[what].unstack().to_numpy()[..., None]

carried = differences({f"{skill}: {m}, {how}": on(rows, skill) - on(main["S"], skill) for skill in SKILLS for m in ("DPO", "sDPO") for how, rows in ((f"pairs without {skill}", found[f"{m}, without {skill}"]), ("all pairs", main[m]))})
plot_contrasts(carried, "true reward on the skill, minus that of S");

# %% [markdown]
# (text)

# %%
between = differences({f"{skill}, {what}": on(found[f"sDPO, without {skill}"], skill, what) - on(found[f"DPO, without {skill}"], skill, what) for skill in SKILLS for what in ("sampled", "greedy")})
plot_contrasts(between, "sDPO minus DPO on the skill that was left out, true reward");

# %% [markdown]
# ## Longer strings, other letters
#
# Strings have three to six letters everywhere else in the world. Here are strings of seven, and strings of letters that no string and no answer ever contained. S has no demonstrations of either.

# %%
means({f"{m}, {split}": found[f"{m}, {split}"] for split in ("seven letters", "other letters") for m in ("S", "DPO", "sDPO")})

# %%
there = differences({f"{split}: {a} minus {b}, {what}": outcome(found[f"{a}, {split}"], what) - outcome(found[f"{b}, {split}"], what) for split in ("seven letters", "other letters") for a, b in (("DPO", "S"), ("sDPO", "S"), ("sDPO", "DPO")) for what in ("sampled", "greedy")})
plot_contrasts(there);

# %% [markdown]
# (text)
#
# ## What you now have
#
# - (text)
#
# ## Questions to test yourself
#
# 1. Why is a gain on a skill without pairs no proof that the *skill* was learned from the pairs? (What did S know?)
# 2. What would be needed for a model to answer in letters that it has never written?
#
# ## Try this
#
# - Leave two skills out. Does what is carried over halve?
