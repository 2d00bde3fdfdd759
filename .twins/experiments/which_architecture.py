# %% [markdown]
# # Which architecture?
# > Stepwise against plain DPO in five bodies of about equal size, about equally good at the start.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/which_architecture.ipynb)
#
# **As with the Llama: when both are tuned, stepwise and plain DPO are equal in the mean of the four other bodies.** Stepwise minus plain DPO is +0.002 [-0.001, +0.006] of sampled true reward in the mean of GPT-2, OPT, BLOOM and Qwen3, every body at its own best $\beta$ and learning rate.
#
# One by one they go from -0.011 [-0.021, -0.003] (BLOOM) to +0.013 [+0.008, +0.018] (Qwen3). Do not read these two as findings: the settings come from a search in one world with one run for each cell, and differences of this size are inside the noise of such a search. GPT-2, OPT and the Llama are equal ($\pm 0.02$). All numbers are from five worlds with four seeds each.
#
# **You should know** [stepwise DPO](../14_stepwise.ipynb) and the [protocol](protocol.ipynb). **Time** 19 minutes to read, a few seconds to run. The search and the grid behind it took 1.3 core hours (`make experiments`).
#
# <details><summary>Words used on this page</summary>
#
# - **Body**: the architecture of the network. **S** is the model before alignment. **DPO** trains it on all pairs at once; **stepwise DPO** (sDPO) in stages, one for each *source* of pairs.
# - **$\beta$** says how strongly a model is held at its reference, the fixed model that the loss measures from. **KL** is the distance from S, in nats, along the model's own answers.
# - **True reward** is 1 for the right answer and less for every letter that has to be mended. *Sampled* answers are drawn; a *greedy* answer takes the likeliest letter at every place.
# - **Reward accuracy** of a source under S: in what share of its pairs S finds the chosen response likelier than the rejected one. A source with a high share is called easy.
# - **Tuned**: at the $\beta$ and learning rate that a search found best for this body and this method.
# - **+0.002 [-0.001, +0.006]** is a mean and its 95 % interval. Differences are *paired*: same worlds, seeds and prompts. *Equal* means that the whole interval lies within $\pm 0.02$.
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
import seaborn as sns
from sdpo_nb.bodies import BODIES, untrained
from sdpo_nb.cells import stored_rows
from sdpo_nb.compare import OUTCOMES, difference_intervals, outcome_values, paired_difference, plot_outcomes
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.questions import body_search_cells, chosen_for_body, load_grid, search_table, start_cells
from sdpo_nb.world import make_tokenizer

# %% [markdown]
# ## Five bodies
#
# The paper aligns one kind of model, and asks whether others behave alike. The bodies here differ in how they know positions: GPT-2 and OPT learn them, BLOOM has none but a slope in its attention (ALiBi), Llama and Qwen rotate. They also differ in norms, activations and biases. Each has three layers of width 96. (Qwen is Qwen3, with its norms on queries and keys.)
#
# A worse S leaves more to be gained, so all must start alike. In each of five worlds every body is fine-tuned on the same demonstrations until its reward on validation prompts is that of the world's Llama, within 0.01. Then it writes its own pairs, on the same prompts, and its sources are ordered by its own reward accuracy.

# %%
found = load_grid("which_architecture")
tokenizer = make_tokenizer()
KINDS = ("llama", *BODIES)
NAMES = dict(llama="Llama", gpt2="GPT-2", opt="OPT", bloom="BLOOM", qwen3="Qwen3") # in the figures

def start_of(body):
    "Validation reward of S, by world."
    by_world = stored_rows(start_cells(body)).sort_values("world")
    return np.array([np.mean(rewards) for rewards in by_world["sampled"]])


# %%
start = {body: start_of(body) for body in KINDS}
for body in KINDS:
    assert abs((start[body] - start["llama"]).mean()) < 0.01

table = {}
for body in KINDS:
    pairs = [sum(chunks) for chunks in found[f"{body}, sDPO"]["chunk_pairs"]]
    table[body] = {
        "parameters": untrained(body, tokenizer).num_parameters(),
        "pairs": np.mean(pairs),
        "validation reward of S": start[body].mean(),
        "test reward of S": outcome_values(found[f"{body}, S"], "sampled").mean(),
    }
pd.DataFrame(table).T.round(3)


# %% [markdown]
# Pairs are what S writes. Each prompt is answered twice, two equal answers make no pair, and how often that happens depends on the body. Each body has pairs of its own because the first chunk should be easy for *this* S.
#
# ## Settings of its own for each
#
# The Llama keeps what the [protocol](protocol.ipynb) found for it. For the four others $\beta$ and learning rate were searched in one world that is not reported, with one run for each cell. The numbers are true rewards; the frame marks what was chosen.

# %%
def search_of(body):
    return search_table(stored_rows([cell for cell in body_search_cells() if cell.body == body]))

tried = {body: search_of(body) for body in BODIES}

# %%
size = dict(figsize=(13, 4.4), constrained_layout=True)
fig, axes = plt.subplots(2, len(BODIES), sharex=True, sharey=True, **size)
for column, body in zip(axes.T, BODIES):
    for ax, (method, chosen) in zip(column, chosen_for_body(body).items()):
        runs = tried[body][tried[body]["method"] == method]
        grid = runs.pivot_table("reward", "lr", "beta")
        sns.heatmap(grid, annot=True, fmt=".2f", annot_kws=dict(size=8), cmap="viridis",
                    vmin=0.5, vmax=0.9, cbar=False, ax=ax)
        corner = (grid.columns.get_loc(chosen["beta"]), grid.index.get_loc(chosen["lr"]))
        ax.add_patch(plt.Rectangle(corner, 1, 1, fill=False, color="red", lw=2))
        ax.set_title(f"{NAMES[body]}, {method}", fontsize="medium")
        ax.set(xlabel=r"$\beta$", ylabel="learning rate")
for ax in axes.flat:
    ax.tick_params(axis="y", rotation=0)
    ax.label_outer()


# %% [markdown]
# For stepwise DPO the search always chose twice the $\beta$ of DPO. A learning rate of $10^{-3}$, the lowest row, is nearly always the worst.
#
# ## Stepwise minus plain, within each body

# %%
def gain(body, what):
    return paired_difference(found[f"{body}, sDPO"], found[f"{body}, DPO"], what)

gains = {what: difference_intervals({body: gain(body, what) for body in KINDS}) for what in OUTCOMES}

# %%
named = {what: table.replace({"question": NAMES}) for what, table in gains.items()}
plot_outcomes(named, "sDPO minus DPO", sides=("DPO better", "sDPO better"));

# %% [markdown]
# Grey is equal; a KL has no band in which it is the same. And the mean of the four bodies that are not the Llama:

# %%
sampled = gains["sampled"].set_index("question")
equal = sampled.loc[["llama", "gpt2", "opt"], ["low", "high"]]
assert equal.abs().max(axis=None) < 0.02
assert 0 < sampled.loc["qwen3", "low"] and sampled.loc["qwen3", "high"] < 0.02
assert sampled.loc["bloom", "high"] < 0

mean_of_four = {}
for what in OUTCOMES:
    mean_of_four[what] = interval(np.mean([gain(body, what) for body in BODIES], axis=0))
assert np.abs(mean_of_four["sampled"]).max() < 0.02
pd.Series(mean_of_four).map(as_text).to_frame("sDPO minus DPO, mean of the four")


# %% [markdown]
# Whichever way a body keeps its positions, no mean difference of sampled reward is larger than 0.013. In greedy reward BLOOM's is -0.016, and its interval leaves the band.
#
# How sure are the two that differ? Qwen3's small gain is there in each of the five worlds; half of BLOOM's loss comes from one. But five worlds are few. The exact sign-flip test of the protocol cannot go below $p = 2/2^5 = 0.06$, even where all five agree. Of such intervals, from five worlds and four seeds, about one in nine misses the truth, not one in twenty ([compare](compare.ipynb)). And what another search would have chosen is in no interval at all.
#
# ## A tie in reward can be half a nat of distance
#
# The choice matters most for the distance, in the right panel. The search looks at reward only, and two cells that are equal in reward can be half a nat apart. Here is, for each choice, the cell that comes next in reward:

# %%
def two_best(body, method):
    runs = tried[body]
    best = runs[runs["method"] == method].nlargest(2, "reward")
    row = {}
    for i, name in enumerate(("chosen", "next")):
        for what in ("beta", "lr", "reward", "kl"):
            row[f"{name}: {what}"] = best[what].iloc[i]
    return row

ties = {}
for body in BODIES:
    for method in ("DPO", "sDPO"):
        ties[f"{body}, {method}"] = two_best(body, method)
ties = pd.DataFrame(ties).T
behind = ties["chosen: reward"] - ties["next: reward"]
assert behind[["opt, sDPO", "bloom, sDPO"]].max() < 0.001
ties.round(4)

# %% [markdown]
# With the next cell instead of the chosen one, the stepwise models of OPT and BLOOM would have been nearer to S by nearly half a nat, at the same reward. So the right panel shows what was run, and says little of the methods.
#
# ## What this does not show
#
# - **Which body is the better model.** Three layers of width 96 say nothing about that.
# - **Other sizes.** All five have about 340 thousand parameters and were trained from scratch. Pretrained models of these kinds may behave otherwise.
# - **Differences of a hundredth.** For those the search would have to see more than one world.
#
# ## What you now have
#
# - The first result of this book that is not about one architecture: tuned alike, the two methods are equal in the mean of four bodies, and differ by no more than 0.013 in any of five.
# - A way to start other bodies at the same height: the same demonstrations, until the same validation reward.
#
# ## Questions to test yourself
#
# 1. Why was S of each body tuned to the same reward, and not trained for equally many steps?
# <details><summary>Answer</summary>
#
# A body that learns slower would start lower and have more to gain, and we would compare starting points, not methods.
# </details>
#
# 2. Why does each body train on pairs of its own?
# <details><summary>Answer</summary>
#
# What is easy or hard, and what the labels contradict, depends on the model that is trained. With the Llama's pairs the other bodies would learn from somebody else's answers, which is another experiment.
# </details>
#
# 3. BLOOM's search chose half the $\beta$ of the others, for both methods. Does that say anything about BLOOM?
# <details><summary>Answer</summary>
#
# Little. For stepwise DPO the next cell, at twice the $\beta$, is behind by less than 0.001, and for DPO by 0.0015: ties in one world, with one run each.
# </details>
#
# ## Try this
#
# - Choose again: of all cells within 0.005 of the best reward, take the one with the smallest KL. For which bodies does the choice change?
# <details><summary>What you should see</summary>
#
# For the stepwise models of OPT (1.21 to 0.73 nats) and BLOOM (1.41 to 0.97), each with twice the $\beta$ and the same learning rate. All others stay. BLOOM's $\beta$ for stepwise DPO is then 1.2, like that of GPT-2 and Qwen3; OPT's is 2.4.
# </details>
