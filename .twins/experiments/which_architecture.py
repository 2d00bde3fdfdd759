# %% [markdown]
# # Which architecture?
# > Stepwise against plain DPO in five bodies of about equal size, about equally good at the start.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/which_architecture.ipynb)
#
# **As with the Llama: equal, when both are tuned.** In five worlds with four seeds each, every body at its own best $\beta$ and learning rate, stepwise minus plain DPO is +0.002 [-0.001, +0.006] of sampled true reward in the mean of GPT-2, OPT, BLOOM and Qwen3. One by one: GPT-2, OPT and the Llama are equal ($\pm 0.02$), Qwen3 is better, but little (+0.013 [+0.008, +0.018]), BLOOM worse
# (-0.011 [-0.021, -0.003]).
#
# **You should know** [stepwise DPO](../09_stepwise.ipynb) and the [protocol](protocol.ipynb). **Time** a few seconds; the search and the grid behind it took 1.3 core hours (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from sdpo_nb.bodies import BODIES, make_body
from sdpo_nb.cells import stored_rows
from sdpo_nb.compare import OUTCOMES, difference_intervals, outcome_values, plot_outcomes
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.questions import body_search_cells, chosen_for_body, load_grid, search_table, start_cells
from sdpo_nb.world import make_model, make_tokenizer

# %% [markdown]
# ## Five bodies
#
# The paper aligns one kind of model, and asks whether others behave alike. GPT-2 and OPT learn their positions, BLOOM has none but a slope in its attention (ALiBi), Llama and Qwen rotate; they differ in norms, activations and biases. Here each has three layers of width 96 (Qwen is Qwen3, with its norms on queries and keys).
#
# A worse S leaves more to be gained. So in each of five worlds every body is fine-tuned to the validation reward of the world's Llama, within 0.01, on the same demonstrations. Then it writes its own pairs, on the same prompts, and its sources are ordered by its own
# reward accuracy.

# %%
found, tok = load_grid("which_architecture"), make_tokenizer()
KINDS = ("llama", *BODIES)
start = {body: np.array([np.mean(r) for r in stored_rows(start_cells(body)).sort_values("world")["sampled"]]) for body in KINDS}      # by world
assert all(abs((v - start["llama"]).mean()) < 0.01 for v in start.values())
def row(body): return {"parameters": (make_model(tok) if body == "llama" else make_body(body, tok)).num_parameters(), "pairs": np.mean([sum(p) for p in found[f"{body}, sDPO"]["chunk_pairs"]]), "validation reward of S": start[body].mean(), "test reward of S": outcome_values(found[f"{body}, S"], "sampled").mean()}
pd.DataFrame({body: row(body) for body in KINDS}).T.round(3)

# %% [markdown]
# The pairs are what S writes: each prompt is answered twice, two equal answers make no pair, and how often that happens depends on the body. They are its own because the first chunk should be easy for *this* S.
#
# ## Settings of its own for each
#
# The Llama keeps what the [protocol](protocol.ipynb) found for it. For the four others $\beta$ and learning rate were searched in one world that is not reported, with one run for each cell. Framed is what was chosen: for stepwise DPO always twice the $\beta$ of DPO. A rate of $10^{-3}$ is nearly always the worst.

# %%
tried = {body: search_table(stored_rows([c for c in body_search_cells() if c.body == body])) for body in BODIES}
fig, axes = plt.subplots(2, len(BODIES), figsize=(13, 4.2), sharex=True, sharey=True, constrained_layout=True)
for column, body in zip(axes.T, BODIES):
    for ax, (method, at) in zip(column, chosen_for_body(body).items()):
        grid = tried[body].query("method == @method").pivot_table("reward", "lr", "beta")
        sns.heatmap(grid, annot=True, fmt=".2f", annot_kws=dict(size=8), cmap="viridis", vmin=0.5, vmax=0.9, cbar=False, ax=ax); ax.set_title(f"{body}, {method}", fontsize="medium")
        ax.add_patch(plt.Rectangle((list(grid.columns).index(at["beta"]), list(grid.index).index(at["lr"])), 1, 1, fill=False, color="red", lw=2))
for ax in axes.flat: ax.tick_params(axis="y", rotation=0); ax.label_outer()

# %% [markdown]
# ## Stepwise minus plain, within each body

# %%
gain = {what: difference_intervals({body: outcome_values(found[f"{body}, sDPO"], what) - outcome_values(found[f"{body}, DPO"], what) for body in KINDS}) for what in OUTCOMES}
plot_outcomes(gain, "sDPO minus DPO");

# %%
table = gain["sampled"].set_index("question")
others = {what: interval(np.mean([outcome_values(found[f"{body}, sDPO"], what) - outcome_values(found[f"{body}, DPO"], what) for body in BODIES], 0)) for what in OUTCOMES}
assert np.abs(others["sampled"]).max() < 0.02 and (table.loc[["llama", "gpt2", "opt"], ["low", "high"]].abs() < 0.02).all(axis=None) and 0 < table.loc["qwen3", "low"] and table.loc["qwen3", "high"] < 0.02 and table.loc["bloom", "high"] < 0
pd.Series({what: as_text(v) for what, v in others.items()}, name="sDPO minus DPO, mean of the four").to_frame()


# %% [markdown]
# Whichever way a body keeps its positions, no mean difference of sampled reward is larger than 0.013; of greedy reward BLOOM's is -0.016, and its interval leaves the band. Qwen3's small gain is there in each of the five worlds; half of BLOOM's loss comes from one. Five worlds are few: such an interval of 95 % covers the truth in about 91 % ([chapter 08](../08_evaluate.ipynb)), and the search is in no interval at all.
#
# That matters most for the distance, in the right panel. The search looks at reward only, and what it leaves as a tie can be half a nat apart. Here is, for each choice, the cell that comes next in reward:

# %%
def two_best(body, method):
    best = tried[body].query("method == @method").nlargest(2, "reward")
    return {f"{name}: {what}": best[what].iloc[i] for i, name in enumerate(("chosen", "next")) for what in ("beta", "lr", "reward", "kl")}
ties = pd.DataFrame({f"{body}, {m}": two_best(body, m) for body in BODIES for m in ("DPO", "sDPO")}).T
assert (ties.loc[["opt, sDPO", "bloom, sDPO"], "chosen: reward"] - ties.loc[["opt, sDPO", "bloom, sDPO"], "next: reward"]).max() < 0.001
ties.round(4)

# %% [markdown]
# With the next cell instead of the chosen one, the stepwise models of OPT and BLOOM would have been nearer to S by nearly half a nat, at the same reward. So the panel shows what was run, and says little of the methods.
#
# This ranks no body: three layers of width 96 say nothing about which of them is the better model.
#
# ## What you now have
#
# - The first result of this book that is not about one architecture: tuned alike, the two methods differ by no more than 0.013 in the mean, in five.
# - A way to start other bodies at the same height: the same demonstrations, until the same validation reward.
#
# ## Questions to test yourself
#
# 1. Why was S of each body tuned to the same reward, and not trained for equally many steps?
# 2. Why does each body train on pairs of its own?
# 3. BLOOM's search chose half the $\beta$ of the others, for both methods. Does that say anything about BLOOM?
#
# ## Try this
#
# - Give all bodies the Llama's pairs. What does "reward accuracy of S" order then?
