# %% [markdown]
# # Stage by stage
# > Every model on the way, measured like the last: does each stage help, and what does it undo?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/stage_by_stage.ipynb)
#
# **Each stage helps, the later the less; and a stage undoes what its own data do not repeat.** In ten worlds with two seeds each, the three stages of sDPO gain 0.136 [0.121, 0.151], 0.082 [0.071, 0.094] and 0.027 [0.022, 0.033] of true reward. Their sources share
# all skills. Where every stage has a skill of its own, the first skill rises from 0.70 to 0.85 in its stage and is back at 0.71 at the end.
#
# **You should know** [how a model is measured](../08_evaluate.ipynb) and the [protocol](protocol.ipynb). **Time** about a minute; the grids behind it took hours (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import copy, io, json, tempfile
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Markdown
from sdpo_nb.evaluate import as_text, forgetting, held_out, interval, response_kl, win_rate
from sdpo_nb.experiments import COMMON, DATA, choices, differences, load_grid, plot_contrasts
from sdpo_nb.logprobs import load_model, score_pairs
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.stepwise import StepwiseConfig, sdpo
from sdpo_nb.world import load_base, load_world, make_pairs, respond, score_responses, true_reward

# %% [markdown]
# ## Does each stage help?
#
# The paper shows the last model only. Here is every $M_t$ of stepwise DPO on the three sources, at its best settings: the true reward (as a mean over skills), and the distance from S that was paid for it.

# %%
main, skills = load_grid("primary"), load_grid("stage_by_stage")
def on_the_way(rows): # one row per world, seed, stage and skill; stage 0 is S
    return pd.concat([pd.read_json(io.StringIO(row.stages)).assign(world=row.world, seed=row.seed) for part in (main["S"], rows) for row in part.itertuples()], ignore_index=True)

def by_stage(table, what): # (models, worlds, seeds, 1)
    mean = table.groupby(["stage", "world", "seed"])[what].mean()
    return np.stack([mean[t].unstack().to_numpy() for t in range(mean.index.get_level_values("stage").max() + 1)])[..., None]

way = on_the_way(main["sDPO"])
reward, greedy, kl = (by_stage(way, what) for what in ("sampled", "greedy", "kl"))
pd.DataFrame({f"M_{t}": {name: as_text(interval(v[t])) for name, v in (("true reward, sampled", reward), ("greedy", greedy), ("KL from S (nats)", kl))} for t in range(4)}).T

# %%
gains = {f"stage {t}, {how}": v[t] - v[t-1] for how, v in (("sampled", reward), ("greedy", greedy)) for t in (1, 2, 3)}
assert all(interval(g)[1] > 0 for g in gains.values()) and interval(gains["stage 1, sampled"])[1] > interval(gains["stage 3, sampled"])[2]
plot_contrasts(differences(gains), "gain of the stage, true reward");


# %% [markdown]
# No stage is without gain. The third pays as much distance as the second, half a nat, for a third of the gain: the frontier of [chapter 08](../08_evaluate.ipynb) flattens, and so does what can be won.
#
# ## What does a stage undo?
#
# The sources share all four skills, so every stage repeats what those before it taught. Forgetting could hardly show. So now the chunks *are* the skills, a stage of copying, one of sorting and so on, in the order of reward accuracy under S: easy first on the left, hard first on
# the right. A row is a model, a column the skill that was trained first, second, ...

# %%
def by_position(rows): # (world, seed) -> true reward of each model on the skill that stage j trains
    table = on_the_way(rows).pivot_table("sampled", ["world", "seed", "stage"], "skill")
    order = {(r.world, r.seed): list(dict.fromkeys(g["chunk"] for g in json.loads(r.gammas))) for r in rows.itertuples()}
    return {at: t.droplevel([0, 1])[order[at]].set_axis([f"stage {j}" for j in range(1, 5)], axis=1) for at, t in table.groupby(level=["world", "seed"])}

scores = {order.removeprefix("skills, "): by_position(rows) for order, rows in skills.items()}
fig, axes = plt.subplots(1, 2, figsize=(9, 3), constrained_layout=True)
for ax, (order, found) in zip(axes, scores.items()):
    sns.heatmap(sum(found.values()) / len(found), annot=True, fmt=".2f", cmap="viridis", vmin=0.4, vmax=0.9, cbar=False, ax=ax)
    ax.set(title=order, ylabel="", xlabel="true reward on the skill of", yticklabels=[f"M_{t}" for t in range(5)]); ax.tick_params(axis="y", rotation=0)


# %% [markdown]
# Read down a column. Before its own stage a skill *falls*, a little with every stage on something else; in its own it jumps; after it, it falls again. What is lost between a skill's own stage and the end:

# %%
def stacked(found, value): # (worlds, seeds, 1)
    return np.array([[value(found[w, s]) for s in sorted({s for _, s in found})] for w in sorted({w for w, _ in found})])[..., None]

lost = {order: {f"skill of stage {j}": stacked(found, lambda t: t.iloc[j, j-1] - t.iloc[4, j-1]) for j in (1, 2, 3)} for order, found in scores.items()}
assert all(interval(v)[1] > 0 for by in lost.values() for v in by.values())
pd.DataFrame({order: {skill: as_text(interval(v)) for skill, v in by.items()} for order, by in lost.items()}).rename_axis("lost since its own stage")

# %% [markdown]
# The older, the more: 0.14 of the 0.14 that stage 1 had gained where the easy skill came first. Here the pairs lie in stages that share nothing; DPO on the same pairs, all at once, loses none of it. So mind what a chunk contains: *an order of difficulty that
# happens to be an order of subjects costs what it was meant to win.*
#
# The report has a number of its own for this, [`forgetting`](../08_evaluate.ipynb), the distance to the best model so far. It is a warning and no estimate: the best of several noisy scores is too high, so it is above zero even where nothing was lost.

# %%
together = on_the_way(main["DPO"])
one = by_stage(together, "sampled")[1]
end = {order: stacked(found, lambda t: t.iloc[4].mean()) for order, found in scores.items()}
signal = {order: stacked(found, lambda t: forgetting(t).iloc[4, 0]) for order, found in scores.items()}
assert all(np.mean(signal[order]) >= np.mean(lost[order]["skill of stage 1"]) for order in lost)
pd.DataFrame({"all skills, at the end": {"DPO, all at once": as_text(interval(one))} | {f"skills, {order}": as_text(interval(v)) for order, v in end.items()}, "minus DPO": {f"skills, {order}": as_text(interval(v - one)) for order, v in end.items()},
              "`forgetting` of the first skill": {f"skills, {order}": as_text(interval(v)) for order, v in signal.items()}}).fillna("")

# %% [markdown]
# ## One run, measured by everything
#
# The tiny world once more, live, with skills as chunks. For each model: what it says of held-out pairs (which S wrote on validation prompts), what it answers to test prompts, how far it has gone, and how often its answer is better than that of the model before, by the
# true reward.

# %%
world = load_world(); base, tok = load_base(world)
config = StepwiseConfig(**COMMON | choices()["DPO"])
run = sdpo(world.base, DATA["skills"](world, base, tok), config, tempfile.mkdtemp())
models = {f"M_{t}": load_model(str(run.model_folder(t))) for t in range(5)}
pairs = tokenize_pairs(load_pairs(make_pairs(copy.deepcopy(base).double(), tok, world.validation, seed=9)), tok, "held out", COMMON["max_length"], COMMON["max_length"] // 2).pairs
held = held_out({name: score_pairs(m, pairs) for name, m in models.items()}, pairs, config.beta).map(as_text)


# %%
def better(prompt, a, b): return 0.5 + 0.5 * np.sign(true_reward(prompt, a) - true_reward(prompt, b))
answers = {name: respond(m, tok, world.test, seed=1) for name, m in models.items()}
asked = pd.DataFrame({name: {"trained on": "" if name == "M_0" else run.stages[int(name[-1]) - 1]["chunk"], "true reward, sampled": np.mean([true_reward(p, y) for p, y in zip(world.test, answers[name])]), "exact, greedy": score_responses(m, tok, world.test, 0)["exact"].mean(),
                             "KL from S (nats)": response_kl(m, base, tok, world.test).mean().item()} for name, m in models.items()}).T
won = {f"M_{t}": win_rate(better, world.test, answers[f"M_{t}"], answers[f"M_{t-1}"]) for t in range(1, 5)}
asked["wins against the one before"] = pd.Series({name: as_text(w["wins"]) for name, w in won.items()})
asked.fillna("").map(lambda v: round(v, 3) if isinstance(v, float) else v)

# %%
held

# %% [markdown]
# On held-out pairs $\gamma$ rises from stage to stage, because these pairs are of all skills, and the gain in one is larger than the loss in the others. A mean hides a fall. What does the report say, which looks chunk by chunk?

# %%
signs = run.signs()
assert signs == []
Markdown("\n".join(f"- {s}" for s in signs) or "*no sign of forgetting, instability or minimal improvement*")

# %% [markdown]
# Nothing! It looks at the pairs of each chunk, and there is hardly anything to see, in all ten worlds: this is the mean $\gamma$ on the pairs of each stage, easy first.

# %%
rows = skills["skills, easy_to_hard"]
gammas = pd.concat([pd.read_json(io.StringIO(r.gammas)).assign(run=i) for i, r in enumerate(rows.itertuples())])
gammas["pairs of"] = gammas.groupby("run")["chunk"].transform(lambda c: c.map({name: f"stage {j}" for j, name in enumerate(dict.fromkeys(c), 1)}))
seen = gammas.pivot_table("gamma", "model", "pairs of")
kept = (seen.loc["M_4"] - seen.loc["M_0"]) / pd.Series({f"stage {j}": seen.loc[f"M_{j}", f"stage {j}"] - seen.loc["M_0", f"stage {j}"] for j in range(1, 5)})
assert (kept > 0.8).all() and kept["stage 1"] > 0.9
seen.round(2)

# %% [markdown]
# Of the nats that stage 1 gained on its pairs, the last model keeps over nine tenths; of the true reward that its answers gained, next to nothing. Whether the chosen response is still preferred to *that* rejected one says little about what the model would write. So a report
# on pairs is blind to this, and ours is: ask the model.
#
# ## What you now have
#
# - The gain and the price of every stage, with intervals.
# - A case where stages forget, and the reason: chunks without common subjects.
# - A warning about warnings: pairs did not show what answers did.
#
# ## Questions to test yourself
#
# 1. Why does a skill fall *before* its own stage?
# 2. Why is `forgetting` above zero for a model that forgot nothing?
# 3. Held-out $\gamma$ rises at every stage. Why does it not show what was lost?
#
# ## Try this
#
# - Put a tenth of each skill's pairs into every later chunk. How much of the loss is left?
# - Take `reference="fixed"`. Is less forgotten?
