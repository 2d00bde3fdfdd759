# %% [markdown]
# # Stage by stage
# > Every model on the way, measured like the last: does each stage help, and what does it undo?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/stage_by_stage.ipynb)
#
# **Whether a stage helps depends on $\beta$, and what it undoes on its data.** In ten worlds with two seeds each, the three stages of tuned sDPO gain 0.136 [0.121, 0.151], 0.082 [0.071, 0.094] and 0.027 [0.022, 0.033] of true reward; at half the $\beta$ and three times the
# learning rate the first gains 0.199 and the others nothing. Stages that share no skill undo each other: the skill of the first loses 0.136 [0.097, 0.174] in the three that follow (easy first; 0.116 hard first), and hardly anything of it shows on pairs.
#
# **You should know** [how a model is measured](../08_evaluate.ipynb) and the [protocol](protocol.ipynb). **Time** about a minute; the grid behind it took 0.2 core hours (`make experiments`).

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
from sdpo_nb.cells import unfold_column
from sdpo_nb.compare import difference_intervals, outcome_means, outcome_values, plot_contrasts
from sdpo_nb.evaluate import as_text, held_out, interval, response_kl, win_rate
from sdpo_nb.logprobs import load_model, score_pairs
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.questions import chosen_settings, load_grid
from sdpo_nb.stepwise import StepwiseConfig, gamma_table, sdpo
from sdpo_nb.training_data import COMMON_SETTINGS, TRAINING_DATA
from sdpo_nb.world import load_base, load_world, make_pairs, respond, score_responses, true_reward

# %% [markdown]
# ## Does each stage help?
#
# The paper shows the last model only. Here is every $M_t$ of stepwise DPO on the three sources, twice: at its own best settings and at those that are best for DPO, with half the $\beta$ and three times the learning rate. Points are means over ten worlds and two seeds.

# %%
main, skills = load_grid("primary"), load_grid("stage_by_stage")
RUNS = {"tuned": main["sDPO"], "at DPO's settings": main["sDPO at DPO's beta"]}
def on_the_way(rows): # one row per world, seed, stage and skill; stage 0 is S
    return pd.concat([unfold_column(part, "stages") for part in (main["S"], rows)], ignore_index=True)

def by_stage(rows, what): # (models, worlds, seeds, 1), a mean over skills
    mean = on_the_way(rows).groupby(["stage", "world", "seed"])[what].mean()
    return np.stack([mean[t].unstack().to_numpy() for t in range(mean.index.get_level_values("stage").max() + 1)])[..., None]

fig, axes = plt.subplots(1, 3, figsize=(11, 3), constrained_layout=True)
for ax, (what, label) in zip(axes, {"sampled": "true reward, sampled", "greedy": "true reward, greedy", "kl": "KL from S (nats)"}.items()):
    for name, rows in RUNS.items():
        mean, low, high = np.array([interval(v) for v in by_stage(rows, what)]).T
        ax.errorbar([f"M_{t}" for t in range(4)], mean, yerr=[mean - low, high - mean], fmt="o-", capsize=3, label=name)
    ax.set(ylabel=label)
axes[0].legend(frameon=False); sns.despine(fig)

# %%
gains = {f"{name}: M_{t} minus M_{t-1}, {how}": by_stage(rows, how)[t] - by_stage(rows, how)[t-1] for name, rows in RUNS.items() for how in ("sampled", "greedy") for t in (1, 2, 3)}
steps = difference_intervals(gains)
tuned, other = (steps[steps["question"].str.startswith(name) & steps["question"].str.endswith("sampled")] for name in RUNS)
assert (tuned["low"] > 0).all() and tuned["mean"].is_monotonic_decreasing and other["high"].iloc[1:].max() < 0.02
plot_contrasts(steps, "gain of a stage, true reward (grey: too small to count)");

# %% [markdown]
# Whether a stage helps depends on how far those before it went. With the larger $\beta$ each stage is a modest step, and all three are needed. With the smaller one $M_1$ is where the others end; what follows adds distance and no reward. A later stage gains less in either case, and not because its
# pairs are hard: with chunks at random, tuned, the gains fall in the same way.

# %%
shuffled = by_stage(main["sDPO, random"], "sampled")
difference_intervals({f"random chunks: M_{t} minus M_{t-1}": shuffled[t] - shuffled[t-1] for t in (1, 2, 3)}).set_index("question").round(3)


# %% [markdown]
# ## What does a stage undo?
#
# The sources share all four skills, so every stage repeats what those before it taught. Forgetting could hardly show. So now the chunks *are* the skills: each stage trains one, in the order of reward accuracy under the S of that world, easy first on the left, hard first on
# the right. A row is a model, a column the skill that was trained first, second, ... (in each world another). Settings are those of DPO.

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
# Read down a column: in its own stage a skill jumps, and after it, it falls. With intervals:

# %%
def stacked(found, value): # (worlds, seeds, 1)
    return np.array([[value(found[w, s]) for s in sorted({s for _, s in found})] for w in sorted({w for w, _ in found})])[..., None]

PARTS = {"before its stage": lambda j: lambda t: t.iloc[j-1, j-1] - t.iloc[0, j-1], "in its stage": lambda j: lambda t: t.iloc[j, j-1] - t.iloc[j-1, j-1], "after it": lambda j: lambda t: t.iloc[4, j-1] - t.iloc[j, j-1], "in all": lambda j: lambda t: t.iloc[4, j-1] - t.iloc[0, j-1]}
change = {(order, f"skill of stage {j}"): {name: interval(stacked(found, part(j))) for name, part in PARTS.items()} for order, found in scores.items() for j in (1, 2, 3, 4)}
assert all(c["after it"][2] < 0 for (_, at), c in change.items() if at != "skill of stage 4") and all(c["in its stage"][1] > 0.1 for c in change.values())
pd.DataFrame(change).T.map(as_text).rename_axis(["order", "change of true reward"])

# %% [markdown]
# After their own stage all skills lose, the older the more. The first loses about as much in both orders; what differs is what it had gained: where the easy skill came first, all of it is gone, where the hard one came first, two thirds are left.
#
# How much of this is due to the skills? The fair control are three stages of mixed chunks at the same settings: they, too, end below DPO.

# %%
same = main["sDPO at DPO's beta"]
ends = {"DPO, all at once": main["DPO"], "three mixed stages": same} | {f"four stages of skills, {order.removeprefix('skills, ')}": rows for order, rows in skills.items()}
lost = difference_intervals({"three mixed stages minus DPO": outcome_values(same, "sampled") - outcome_values(main["DPO"], "sampled")} | {f"{name} minus three mixed": outcome_values(rows, "sampled") - outcome_values(same, "sampled") for name, rows in ends.items() if "skills" in name})
assert (lost["high"] < 0).all()
plot_contrasts(lost);

# %%
outcome_means(ends)

# %% [markdown]
# Half of what is lost comes from stages at a $\beta$ that is too small for them, and the other half from chunks that do not repeat each other. (Four stages instead of three are in that half, too.) So mind what a chunk contains: *an order by difficulty that happens to be an order by subject
# costs more than any order was seen to win.*
#
# ## One run, measured by everything
#
# The tiny world, live, with skills as chunks. For each model: what it says of pairs that S wrote on validation and test prompts, what it answers, how far it has gone, and how often its answer is better than that of the model before, by the true reward.

# %%
world = load_world(); base, tok = load_base(world)
config = StepwiseConfig(**COMMON_SETTINGS | chosen_settings()["DPO"])
run = sdpo(world.base, TRAINING_DATA["skills"](world, base, tok), config, tempfile.mkdtemp())
models = {f"M_{t}": load_model(str(run.model_folder(t))) for t in range(5)}
rows = [r for i in range(3) for r in make_pairs(copy.deepcopy(base).double(), tok, world.validation + world.test, seed=900 + i) if r["chosen"][0]["content"] and r["rejected"][0]["content"]]
pairs = tokenize_pairs(load_pairs(rows), tok, "held out", COMMON_SETTINGS["max_length"], COMMON_SETTINGS["max_length"] // 2).pairs
tables = {name: score_pairs(m, pairs) for name, m in models.items()}
first = next(iter(tables.values()))
pd.DataFrame({name: held_out(table, first, pairs, config.beta) for name, table in tables.items()}, dtype=object).T.map(as_text)


# %%
def better(prompt, a, b): return 0.5 + 0.5 * np.sign(true_reward(prompt, a) - true_reward(prompt, b))
answers = {name: respond(m, tok, world.test, seed=1) for name, m in models.items()}
chunks = ["", *(s["chunk"] for s in run.stages)]
asked = pd.DataFrame({name: {"trained on": chunks[t], "true reward, sampled": np.mean([true_reward(p, y) for p, y in zip(world.test, answers[name])]), "exact, greedy": score_responses(m, tok, world.test, 0)["exact"].mean(),
                             "KL from S (nats)": response_kl(m, base, tok, world.test).mean().item()} for t, (name, m) in enumerate(models.items())}).T
assert asked.loc["M_4", "exact, greedy"] < asked.loc["M_2", "exact, greedy"]
asked["wins against the one before"] = pd.Series({f"M_{t}": as_text(win_rate(better, world.test, answers[f"M_{t}"], answers[f"M_{t-1}"])["wins"]) for t in range(1, 5)})
asked.fillna("").map(lambda v: round(v, 3) if isinstance(v, float) else v)

# %% [markdown]
# On the pairs all goes well: $\gamma$ rises from model to model. The answers tell another story. Greedy, the last model is exact less often than the second. Skill by skill, this is the share of a stage's gain that the last model keeps:

# %%
skill = [r["prompt"][0]["content"].split()[0] for r in rows]
seen = {"gamma, training pairs": gamma_table(run).groupby(["model", "chunk"])["gamma"].mean().unstack(),
        "gamma, other pairs": pd.DataFrame({name: pd.Series(t.gamma(pairs).numpy()).groupby(skill).mean() for name, t in tables.items()}).T,
        "true reward of answers": pd.DataFrame({name: pd.Series([true_reward(p, y) for p, y in zip(world.test, answers[name])]).groupby([p.split()[0] for p in world.test]).mean() for name in models}).T}
kept = pd.DataFrame({what: {f"{c} (stage {j})": (t.loc["M_4", c] - t.loc["M_0", c]) / (t.loc[f"M_{j}", c] - t.loc["M_0", c]) for j, c in enumerate(chunks[1:4], 1)} for what, t in seen.items()})
assert (kept["true reward of answers"] < kept.drop(columns="true reward of answers").min(axis=1)).all()
kept.round(2)

# %%
signs = run.signs()
assert signs == []
Markdown("\n".join(f"- {s}" for s in signs) or "*the report's signs of failure: none*")


# %% [markdown]
# The report looks at the pairs of each chunk, and is silent. A pair asks whether this response is still preferred to that one; what the model would write is another matter, and was lost sooner. This is one world; in all ten the training pairs show the same, with
# exceptions: the share of its gain that the pairs of stage 1 keep, by run.

# %%
def share(row): # of what stage 1 gained on its own training pairs
    t = pd.read_json(io.StringIO(row.gammas)).pivot_table("gamma", "model", "chunk"); c = json.loads(row.gammas)[0]["chunk"]
    return (t.loc["M_4", c] - t.loc["M_0", c]) / (t.loc["M_1", c] - t.loc["M_0", c])
pd.DataFrame({order: [share(r) for r in rows.itertuples()] for order, rows in skills.items()}).describe().loc[["min", "25%", "50%", "75%", "max"]].round(2)

# %% [markdown]
# ## What you now have
#
# - The gain of every stage, which depends on $\beta$ more than on its place.
# - A case where stages forget: chunks without common subjects.
# - A warning about warnings: pairs showed little of what answers lost.
#
# ## Questions to test yourself
#
# 1. At the smaller $\beta$ stages 2 and 3 gain nothing. Would you train with fewer stages, or with another $\beta$?
# 2. The skill of stage 4 has lost before its stage. What did it share with the others?
# 3. $\gamma$ of a pair rises while both of its responses become rarer. How?
#
# ## Try this
#
# - Put a tenth of each skill's pairs into every later chunk. How much of the loss is left?
# - Take `reference="fixed"`. Is less forgotten?
