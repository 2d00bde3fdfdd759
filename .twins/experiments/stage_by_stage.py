# %% [markdown]
# # Stage by stage
# > Every model on the way, measured like the last: does each stage help, and what does it undo?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/stage_by_stage.ipynb)
#
# **Whether a stage helps depends on $\beta$. What it undoes depends on its data.** At its best settings the three stages of stepwise DPO gain 0.136 [0.121, 0.151], 0.082 [0.071, 0.094] and 0.027 [0.022, 0.033] of true reward. At half that $\beta$ and three times the learning rate, the first stage gains 0.199 and the others nothing.
#
# Stages that share no skill undo each other. The skill of the first stage loses 0.136 [0.097, 0.174] in the three that follow (easy skill first; 0.116 with the hard skill first), and the mean $\gamma$ of pairs hardly shows it. All numbers but those of the live run are from ten worlds with two seeds each.
#
# **You should know** [how a model is measured](../08_evaluate.ipynb) and the [protocol](protocol.ipynb). **Time** 35 minutes to read, about a minute to run. The grid behind it took 0.2 core hours (`make experiments`).
#
# <details><summary>Words used on this page</summary>
#
# - **S** or $M_0$ is the model before alignment, $M_t$ the model after stage $t$. **DPO** trains S on all pairs at once; **stepwise DPO** (sDPO) in *stages*, one for each *chunk* of the pairs, with the model of the stage before as its *reference*, the fixed model that the loss measures from.
# - **$\beta$** says how strongly a model is held at its reference. **KL** is its distance from S, in nats, along its own answers.
# - **True reward** is 1 for the right answer and less for every letter that has to be mended. *Sampled* answers are drawn; a *greedy* answer takes the likeliest letter at every place.
# - **$\gamma$** of a pair is how much more likely a model finds the chosen response than the rejected one, as a difference of log-probabilities, in nats.
# - **Reward accuracy** of a source under S: the share of its pairs with positive $\gamma$. A source with a high share is called easy.
# - **0.136 [0.121, 0.151]** is a mean and its 95 % interval. Differences are *paired*: same worlds, seeds and prompts. Differences inside the grey band, $\pm 0.02$, are too small to count.
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
from sdpo_nb.report import gamma_table
from sdpo_nb.stepwise import StepwiseConfig, sdpo
from sdpo_nb.training_data import COMMON_SETTINGS, TRAINING_DATA
from sdpo_nb.world import load_base, load_world, make_pairs, respond, score_responses, true_reward

# %% [markdown]
# ## Does each stage help?
#
# The paper shows the last model only. Here is every $M_t$ of stepwise DPO on the three sources, easy source first, at two settings: at its own best (*tuned*), and at those that are best for DPO, with half the $\beta$ and three times the learning rate.

# %%
main = load_grid("primary")
skills = load_grid("stage_by_stage")
RUNS = {"tuned": main["sDPO"], "settings of DPO": main["sDPO at DPO's beta"]}

def on_the_way(rows):
    "One row for each world, seed, stage and skill; stage 0 is S."
    both = [unfold_column(main["S"], "stages"), unfold_column(rows, "stages")]
    return pd.concat(both, ignore_index=True)

def by_stage(rows, what):
    "Means over skills: (models, worlds, seeds, 1)."
    mean = on_the_way(rows).groupby(["stage", "world", "seed"])[what].mean()
    stages = sorted(mean.index.unique("stage"))
    return np.stack([mean[t].unstack().to_numpy() for t in stages])[..., None]


# %% [markdown]
# Before you look: with the smaller $\beta$ every stage may go farther. Will each then gain more, or less?

# %%
AXES = {
    "sampled": "true reward, sampled (better →)",
    "greedy": "true reward, greedy (better →)",
    "kl": "KL from S, nats (farther →)",
}
fig, axes = plt.subplots(1, 3, figsize=(12, 3.4), constrained_layout=True)
for ax, (what, label) in zip(axes, AXES.items()):
    for color, (name, rows) in zip(("C0", "C1"), RUNS.items()):
        mean, low, high = np.array([interval(model) for model in by_stage(rows, what)]).T
        ax.errorbar(range(4), mean, yerr=[mean - low, high - mean], fmt="o-", capsize=3, color=color)
        ax.annotate(name, (3, mean[-1]), xytext=(8, -3), textcoords="offset points",
                    color=color, fontsize="small")
    ax.set_xticks(range(4), ["S", "$M_1$", "$M_2$", "$M_3$"])
    ax.set(ylabel=label, xlim=(-0.2, 4.9))
sns.despine(fig)

# %% [markdown]
# The same as paired differences, each model minus the one before:

# %%
gains = {}
for name, rows in RUNS.items():
    for how in ("sampled", "greedy"):
        models = by_stage(rows, how)
        for t in (1, 2, 3):
            before = "S" if t == 1 else f"$M_{t-1}$"
            gains[f"{name}: $M_{t}$ minus {before}, {how}"] = models[t] - models[t-1]
steps = difference_intervals(gains)

sampled = steps[steps["question"].str.endswith("sampled")]
tuned = sampled[sampled["question"].str.startswith("tuned")]
other = sampled[~sampled["question"].str.startswith("tuned")]
assert (tuned["low"] > 0).all()
assert tuned["mean"].is_monotonic_decreasing
assert other["high"].iloc[1:].max() < 0.02

# %%
plot_contrasts(steps, "true reward, minus that of the model before (grey: too small to count)",
               sides=("the stage harms", "helps"));

# %% [markdown]
# Whether a stage helps depends on how far the stages before it went. With the larger $\beta$ each stage is a modest step, and all three are needed. With the smaller one $M_1$ already is where the others end; what follows adds distance and no reward.
#
# A later stage gains less in either case. Is that because its pairs are hard? No: with all pairs shuffled before they are cut, tuned, the gains fall in the same way.

# %%
shuffled = by_stage(main["sDPO, random"], "sampled")
gains = {f"random chunks: M_{t} minus M_{t-1}": shuffled[t] - shuffled[t-1] for t in (1, 2, 3)}
difference_intervals(gains).set_index("question").round(3)


# %% [markdown]
# ## What does a stage undo?
#
# The sources share all four skills, so every stage repeats what those before it taught, and forgetting could hardly show. So now the chunks *are* the skills. Each stage trains one, in the order of reward accuracy under the S of that world, once with the easy skill first and once with the hard one first. Settings are those of DPO.

# %%
def by_position(rows):
    "(world, seed) -> true reward: models as rows, as columns the skills by the stage that trains them."
    scores = on_the_way(rows).pivot_table("sampled", ["world", "seed", "stage"], "skill")
    tables = {}
    for run in rows.itertuples():
        chunks = [g["chunk"] for g in json.loads(run.gammas)]
        order = list(dict.fromkeys(chunks))                        # as they were trained
        table = scores.loc[(run.world, run.seed), order]
        tables[run.world, run.seed] = table.set_axis([f"stage {j}" for j in range(1, 5)], axis=1)
    return tables

scores = {
    "easy skill first": by_position(skills["skills, easy_to_hard"]),
    "hard skill first": by_position(skills["skills, hard_to_easy"]),
}

# %% [markdown]
# A row is a model, a column the skill that was trained in stage 1, 2, ... (which is another skill in another world). The frame marks the model that was just trained on it. What will happen below the frames?

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4), constrained_layout=True)
for ax, (order, tables) in zip(axes, scores.items()):
    mean = sum(tables.values()) / len(tables)
    sns.heatmap(mean, annot=True, fmt=".2f", cmap="viridis", vmin=0.4, vmax=0.9, cbar=False, ax=ax)
    for stage in range(1, 5):
        ax.add_patch(plt.Rectangle((stage - 1, stage), 1, 1, fill=False, color="red", lw=2))
    ax.set(title=order, ylabel="", xlabel="true reward on the skill of")
    ax.set_yticklabels(["S", "$M_1$", "$M_2$", "$M_3$", "$M_4$"], rotation=0)


# %% [markdown]
# Read down a column: in its own stage a skill jumps, and below the frame it falls. With intervals:

# %%
def changes(table, j):
    "What happens to the skill of stage j, in one run."
    skill = table[f"stage {j}"]
    first, before, after, last = skill.iloc[[0, j - 1, j, 4]]
    return {
        "before its stage": before - first,
        "in its stage": after - before,
        "after it": last - after,
        "in all": last - first,
    }

change = {}
for order, tables in scores.items():
    for j in (1, 2, 3, 4):
        runs = pd.DataFrame({run: changes(table, j) for run, table in tables.items()}).T
        change[order, f"skill of stage {j}"] = {
            part: interval(runs[part].unstack().to_numpy()[..., None])      # (worlds, seeds, 1)
            for part in runs
        }

for (order, skill), parts in change.items():
    assert parts["in its stage"][1] > 0.1
    if skill != "skill of stage 4":
        assert parts["after it"][2] < 0
pd.DataFrame(change).T.map(as_text).rename_axis(["order", "change of true reward"])

# %% [markdown]
# After their own stage all skills lose, the older the more. The first loses about as much in both orders. What differs is what it had gained: where the easy skill came first, all of it is gone; where the hard one came first, two thirds are left.
#
# How much of this is due to the skills? The fair comparison is with three stages of *mixed* chunks, the usual sources, at the same settings. They, too, end below DPO:

# %%
mixed = main["sDPO at DPO's beta"]
ends = {
    "DPO, all at once": main["DPO"],
    "three mixed stages": mixed,
    "four stages of skills, easy first": skills["skills, easy_to_hard"],
    "four stages of skills, hard first": skills["skills, hard_to_easy"],
}
end = {name: outcome_values(rows, "sampled") for name, rows in ends.items()}
compared = {"three mixed stages minus DPO": end["three mixed stages"] - end["DPO, all at once"]}
for name in ("four stages of skills, easy first", "four stages of skills, hard first"):
    compared[f"{name}, minus three mixed"] = end[name] - end["three mixed stages"]
lost = difference_intervals(compared)
assert (lost["high"] < 0).all()
plot_contrasts(lost, "difference of true reward (grey: too small to count)",
               sides=("the first-named is worse", "better"));

# %%
outcome_means(ends)

# %% [markdown]
# Half of what is lost comes from stages at a $\beta$ that is too small for them, the other half from chunks that do not repeat each other. (Four stages instead of three are in that half, too.) So mind what a chunk contains: *an order by difficulty may happen to be an order by subject, and that costs 0.06 of reward when the easy subject comes first, 0.05 when the hard one does.*
#
# ## One run, measured by everything
#
# Now live, in world 0, with skills as chunks. First what each model says about *pairs*. They are new ones, which S wrote on validation and test prompts.

# %%
world = load_world()
base, tokenizer = load_base(world)
config = StepwiseConfig(**COMMON_SETTINGS | chosen_settings()["DPO"])
run = sdpo(world.base, TRAINING_DATA["skills"](world, base, tokenizer), config, tempfile.mkdtemp())
models = {f"M_{t}": load_model(str(run.model_folder(t))) for t in range(5)}


# %%
def is_empty(pair):
    return not pair["chosen"][0]["content"] or not pair["rejected"][0]["content"]

precise = copy.deepcopy(base).double()
rows = []
for i in range(3):
    written = make_pairs(precise, tokenizer, world.validation + world.test, seed=900 + i)
    rows += [pair for pair in written if not is_empty(pair)]

longest = COMMON_SETTINGS["max_length"]
pairs = tokenize_pairs(load_pairs(rows), tokenizer, "held out", longest, longest // 2).pairs
tables = {name: score_pairs(model, pairs) for name, model in models.items()}

# %%
of_pairs = {name: held_out(table, tables["M_0"], pairs, config.beta) for name, table in tables.items()}
pd.DataFrame(of_pairs, dtype=object).T.map(as_text)


# %% [markdown]
# $\gamma$ rises from model to model, and so does the share of pairs on which the chosen response is preferred. Only the loss does not fall. In each of the four rows its interval holds 0.693, the loss of S. A mean of $\gamma$ can rise while some pairs fall, and in the loss those that fall weigh more than those that rise. But the loss is no guide either: it is highest at $M_3$ and lowest at $M_4$.
#
# Now what each model *answers*: its true reward, how far it has gone, and how often its answer is better than that of the model before, by the true reward.

# %%
def better(prompt, a, b):
    "1 where a is the better answer, 0 where b is, one half for a tie."
    return 0.5 + 0.5 * np.sign(true_reward(prompt, a) - true_reward(prompt, b))

answers = {name: respond(model, tokenizer, world.test, seed=1) for name, model in models.items()}
chunks = ["", *(stage["chunk"] for stage in run.stages)]

of_answers = {}
for t, (name, model) in enumerate(models.items()):
    rewards = [true_reward(prompt, y) for prompt, y in zip(world.test, answers[name])]
    of_answers[name] = {
        "trained on": chunks[t],
        "true reward, sampled": np.mean(rewards),
        "exact, greedy": score_responses(model, tokenizer, world.test, 0)["exact"].mean(),
        "KL from S (nats)": response_kl(model, base, tokenizer, world.test).mean().item(),
    }
    if t > 0:
        wins = win_rate(better, world.test, answers[name], answers[f"M_{t-1}"])["wins"]
        of_answers[name]["wins against the one before"] = as_text(wins)
of_answers = pd.DataFrame(of_answers).T
assert of_answers.loc["M_4", "exact, greedy"] < of_answers.loc["M_2", "exact, greedy"]

# %%
of_answers.fillna("").map(lambda v: round(v, 3) if isinstance(v, float) else v)

# %% [markdown]
# The answers tell another story. Greedy, the last model is exact less often than the second.
#
# Now skill by skill. A stage gains something on its skill; what share of that gain does the last model still have? Measured in three ways: by $\gamma$ on the pairs of training, by $\gamma$ on the new pairs, and by the true reward of answers.

# %%
skill_of_pair = [r["prompt"][0]["content"].split()[0] for r in rows]
skill_of_prompt = [prompt.split()[0] for prompt in world.test]

on_new_pairs, on_prompts = {}, {}
for name in models:
    gamma = pd.Series(tables[name].gamma(pairs).numpy())
    reward = pd.Series([true_reward(prompt, y) for prompt, y in zip(world.test, answers[name])])
    on_new_pairs[name] = gamma.groupby(skill_of_pair).mean()
    on_prompts[name] = reward.groupby(skill_of_prompt).mean()

measures = {
    "gamma, training pairs": gamma_table(run).groupby(["model", "chunk"])["gamma"].mean().unstack(),
    "gamma, other pairs": pd.DataFrame(on_new_pairs).T,
    "true reward of answers": pd.DataFrame(on_prompts).T,
}


# %%
def share_kept(table, chunk, stage):
    "Of what this stage gained on its chunk, the share that the last model has."
    value = table[chunk]
    return (value["M_4"] - value["M_0"]) / (value[f"M_{stage}"] - value["M_0"])

kept = {}
for what, table in measures.items():
    kept[what] = {f"{chunks[j]} (stage {j})": share_kept(table, chunks[j], j) for j in (1, 2, 3)}
kept = pd.DataFrame(kept)
least_on_pairs = kept.drop(columns="true reward of answers").min(axis=1)
assert (kept["true reward of answers"] < least_on_pairs).all()
kept.round(2)

# %% [markdown]
# Would the report of the run have warned us?

# %%
signs = run.signs()
assert signs == []
lines = "\n".join(f"- {sign}" for sign in signs)
Markdown(lines or "*the report's signs of failure: none*")


# %% [markdown]
# No. The report looks at the pairs of each chunk, and is silent. A pair asks whether this response is still preferred to that one. What the model would write is another matter, and was lost sooner.
#
# This is one world. In all ten the training pairs show the same, with exceptions. Here is the share of its gain that the pairs of stage 1 keep, by run:

# %%
def share_on_first_chunk(row):
    "Of what stage 1 gained in gamma on its own training pairs, the share that the last model has."
    table = pd.read_json(io.StringIO(row.gammas)).pivot_table("gamma", "model", "chunk")
    first = json.loads(row.gammas)[0]["chunk"]
    return share_kept(table, first, 1)

shares = {order: [share_on_first_chunk(row) for row in runs.itertuples()] for order, runs in skills.items()}
pd.DataFrame(shares).describe().loc[["min", "25%", "50%", "75%", "max"]].round(2)

# %% [markdown]
# ## What this does not show
#
# - **Large models.** One with 340 thousand parameters has little room for four skills. A large one may forget less.
# - **The best $\beta$ for skills as chunks.** They ran at the settings of DPO, which are too small a $\beta$ for stages.
# - **A curriculum.** No skill of this world is needed for another. Where it is, an order by subject may be worth its price.
# - **Why a later stage gains less.** There is less left to gain, and it starts farther from S; the two were not taken apart.
#
# ## What you now have
#
# - The gain of every stage, which depends on $\beta$ more than on its place.
# - A case where stages forget: chunks without common subjects.
# - A warning about warnings: the $\gamma$ of pairs showed little of what answers lost.
#
# ## Questions to test yourself
#
# 1. At the smaller $\beta$ stages 2 and 3 gain nothing. Would you train with fewer stages, or with another $\beta$?
# <details><summary>Answer</summary>
#
# With a larger $\beta$. At the smaller one no model on the way is much better than the first, which saw a third of the pairs, and all are well below the last model at the larger one.
# </details>
#
# 2. The skill of stage 4 has lost before its stage. What did it share with the others?
# <details><summary>Answer</summary>
#
# The weights. What the stages before changed for their skills moved its answers, too, and no pair of its own held them.
# </details>
#
# 3. $\gamma$ of a pair rises while both of its responses become rarer. How?
# <details><summary>Answer</summary>
#
# The rejected one becomes rarer faster. In the table of pairs above the log-ratio of the chosen falls to -3.8 nats, and that of the rejected to -6.9.
# </details>
#
# ## Try this
#
# Both in the live run. Measure the models with `skill_table(model, tokenizer, world.test)["reward"]` of `sdpo_nb.world`; with it, the run above takes *copy* to 0.86 in its own stage and ends with 0.80, *reverse* to 0.85 and 0.70, and all skills together end at 0.77.
#
# - Put a tenth of each earlier skill's pairs into every later chunk, with `order="as_given"`. How much of the loss is left?
# <details><summary>What you should see</summary>
#
# *Copy* keeps nearly all (0.855 to 0.850). *Reverse* reaches less in its own stage (0.79) and ends at 0.73. All skills together end at 0.80, where they had 0.77. (One world.)
# </details>
#
# - Take `reference="fixed"`, so that S is the reference of every stage. Is less forgotten?
# <details><summary>What you should see</summary>
#
# No: *copy* ends at 0.77 and *reverse* at 0.70. The target still starts at the model before and sees none of the earlier pairs. (One world.)
# </details>
