# %% [markdown]
# # Stage by stage
# > Every model on the way, measured like the last: does each stage help, and what does it undo?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/stage_by_stage.ipynb)
#
# ANSWER
#
# **You should know** [how a model is measured](../08_evaluate.ipynb) and the [protocol](protocol.ipynb). **Time** about a minute; the grids behind it took hours (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import io, json, tempfile
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Markdown
from sdpo_nb.evaluate import as_text, forgetting, interval, win_rate
from sdpo_nb.experiments import COMMON, choices, load_grid
from sdpo_nb.stepwise import StepwiseConfig, sdpo
from sdpo_nb.world import load_world, respond, true_reward

# %% [markdown]
# ## Does each stage help?
#
# The paper shows the last model only. Here is every $M_t$ of stepwise DPO on the three sources, at its best settings: true reward and the distance that was paid for it.

# %%
main, skills = load_grid("primary"), load_grid("stage_by_stage")
def on_the_way(rows): # one row per world, seed, stage and skill; stage 0 is S
    parts = [pd.read_json(io.StringIO(row.stages)).assign(world=row.world, seed=row.seed) for part in (main["S"], rows) for row in part.itertuples()]
    return pd.concat(parts, ignore_index=True)

way = on_the_way(main["sDPO"]).groupby(["world", "seed", "stage"])[["sampled", "greedy", "kl"]].mean()
def array(table, column): return np.stack([table[column].xs(t, level="stage").unstack().to_numpy() for t in sorted(table.index.unique("stage"))])[..., None]   # (models, worlds, seeds, 1)

rows = {f"M_{t}": {name: as_text(interval(array(way, what)[t])) for what, name in (("sampled", "true reward, sampled"), ("greedy", "greedy"), ("kl", "KL from S (nats)"))}
                | ({} if t == 0 else {"gain of the stage, sampled": as_text(interval(array(way, "sampled")[t] - array(way, "sampled")[t-1]))}) for t in range(len(array(way, "kl")))}
pd.DataFrame(rows).T.fillna("")

# %% [markdown]
# ## What does a stage undo?
#
# The sources share all four skills, so a later stage repeats what an earlier one taught. Where could forgetting show? In chunks that are *skills*: stage by stage only copy, only sort, and so on, in the order of reward accuracy under S. A row is a model, a
# column the skill that was trained first, second, ...; easy first on the left, hard first on the right.

# %%
def by_position(rows): # (models, chunks) for each world and seed: true reward on the skill that stage j trains
    table = on_the_way(rows).pivot_table("sampled", ["world", "seed", "stage"], "skill")
    order = {(r.world, r.seed): list(dict.fromkeys(g["chunk"] for g in json.loads(r.gammas))) for r in rows.itertuples()}
    return {at: t.droplevel([0, 1])[order[at]].set_axis([f"stage {j}'s" for j in range(1, 5)], axis=1) for at, t in table.groupby(level=["world", "seed"])}

scores = {order: by_position(rows) for order, rows in skills.items()}
fig, axes = plt.subplots(1, 2, figsize=(9, 3), constrained_layout=True)
for ax, (order, found) in zip(axes, scores.items()):
    sns.heatmap(sum(found.values()) / len(found), annot=True, fmt=".2f", cmap="viridis", vmin=0.4, vmax=1, cbar=False, ax=ax)
    ax.set(title=order, ylabel="", xlabel="skill of", yticklabels=[f"M_{t}" for t in range(5)])

# %% [markdown]
# Read down a column: it rises at its own stage. What comes after? *Forgetting* of a skill is how far the last model is below the best of those up to it.

# %%
def lost(found, j): return np.array([[forgetting(found[w, s]).iloc[-1, j] for s in sorted({s for _, s in found})] for w in sorted({w for w, _ in found})])[..., None]
pd.DataFrame({order: {f"skill of stage {j + 1}": as_text(interval(lost(found, j))) for j in range(4)} for order, found in scores.items()}).rename_axis("forgotten by M_4, true reward")

# %% [markdown]
# ## One run, with its report
#
# For one run of the tiny world the report lists its signs of failure, and answers of neighbouring models can be compared prompt by prompt.

# %%
world = load_world()
run = sdpo(world.base, world.sources, StepwiseConfig(**COMMON | choices()["sDPO"]), tempfile.mkdtemp())
def better(prompt, a, b): # judged by the true reward
    gap = true_reward(prompt, a) - true_reward(prompt, b)
    return 0.5 + 0.5 * np.sign(gap)

from sdpo_nb.logprobs import load_model
answers = [respond(load_model(str(run.model_folder(t))), run.tokenizer, world.test, seed=1) for t in range(len(run.stages) + 1)]
won = {f"M_{t} against M_{t-1}": win_rate(better, world.test, answers[t], answers[t-1]) for t in range(1, len(answers))}
pd.DataFrame({name: {"wins": as_text(v["wins"]), "ties": round(v["ties"], 3)} for name, v in won.items()}).T

# %%
Markdown("\n".join(f"- {s}" for s in run.signs()) or "No sign of forgetting, instability, minimal improvement.")
