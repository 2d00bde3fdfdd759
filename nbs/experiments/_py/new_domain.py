# %% [markdown]
# # What carries over to a new domain?
# > Pairs of three skills, measured on the fourth; strings longer than any; letters that were never seen.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/new_domain.ipynb)
#
# ANSWER
#
# **You should know** [stepwise DPO](../09_stepwise.ipynb) and the [protocol](protocol.ipynb). **Time** a few seconds; the grid behind it took HOURS (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import io
import numpy as np
import pandas as pd
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.experiments import load_grid, outcome, plot_contrasts
from sdpo_nb.world import SKILLS

# %% [markdown]
# ## A skill without pairs
#
# S has seen demonstrations of all four skills. Now the pairs of one are left out, and the models are measured on it. What they gain there, they gained from pairs about other skills.

# %%
found, main = load_grid("new_domain"), load_grid("primary")
def last(rows, skill, what): # (worlds, seeds, 1): the last model on the test prompts of one skill
    t = pd.concat([pd.read_json(io.StringIO(r.stages)).query("skill == @skill").sort_values("stage").tail(1).assign(world=r.world, seed=r.seed) for r in rows.itertuples()])
    return t.set_index(["world", "seed"])[what].unstack().to_numpy()[..., None]

gain = pd.DataFrame([(f"{skill}: {m}, {how}", *interval(last(rows, skill, "sampled") - last(main["S"], skill, "sampled")))
                     for skill in SKILLS for m in ("DPO", "sDPO") for how, rows in ((f"trained without {skill}", found[f"{m}, without {skill}"]), ("trained with it", main[m]))], columns=["question", "mean", "low", "high"])
plot_contrasts(gain, "true reward on the skill, minus that of S");
