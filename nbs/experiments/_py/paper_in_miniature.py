# %% [markdown]
# # The paper in miniature
# > Its two tables and two figures, redone where the true reward is known, with ten worlds where the paper has one run.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/paper_in_miniature.ipynb)
#
# **Of the paper's four pictures two come out here and two do not.** In ten worlds with two seeds each, the reference rises from stage to stage, also on chunks still to come (figure 2), and a stage that starts its target at S begins with three times the
# loss (figure 3). But sDPO, tuned like DPO, is equal to it (+0.004 [-0.008, +0.014] of true reward; table 3), and a more aligned reference was no better ($M_1$: -0.006 [-0.020, +0.007]) or worse ($M_2$: -0.042 [-0.060, -0.025]; table 1, at one $\beta$).
#
# **You should know** [stepwise DPO](../09_stepwise.ipynb) and the [protocol](protocol.ipynb). **Time** about half a minute; the grids behind its tables took hours (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import io, math, tempfile
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch.nn.functional as F
from sdpo_nb.experiments import COMMON, choices, differences, load_grid, means, outcome, plot_contrasts
from sdpo_nb.logprobs import read_table
from sdpo_nb.stepwise import StepwiseConfig, load_sources, sdpo
from sdpo_nb.world import load_world

# %% [markdown]
# ## Table 1: does a better reference make a better model?
#
# The paper trains one target on one set of pairs against three references: the target's own SFT base, and two other open models. Here S is trained on the hardest source, `riddle`, against S, against $M_1$ (S after `primer`) and
# against $M_2$ (after `digest` too). Only the reference differs: pairs, steps and the start are the same.

# %%
table_1, main = load_grid("paper_in_miniature"), load_grid("primary")
references = {name: rows for name, rows in table_1.items() if name.startswith("riddle")}
means(references)

# %%
base = table_1["riddle against S"]
better = differences({f"{name} minus riddle against S, {what}": outcome(rows, what) - outcome(base, what) for name, rows in references.items() if rows is not base for what in ("sampled", "greedy")})
plot_contrasts(better);

# %% [markdown]
# The opposite of the paper's table. The models trained against $M_1$ and $M_2$ have moved two and three times as far from S, which is what a smaller $\beta$ would do, and $\beta$ was chosen for the reference S. So this does not say that an aligned reference is
# bad; it says that an aligned reference with an unchanged $\beta$ is not *by itself* better. The paper changes references at one $\beta$, too; what else differs is that two of its references are other models, which the target never was.
#
# ## Table 3: all at once, in stages, in stages without order
#
# Each method at its own best settings.

# %%
means({name: main[name] for name in ("S", "S, best temperature", "SFT on chosen", "DPO", "sDPO", "sDPO, random")})

# %% [markdown]
# The last three rows overlap, and their paired differences lie within $\pm 0.02$ (two of the eight primary questions of the [protocol](protocol.ipynb)). All of DPO is far above S, S at its best temperature and fine-tuning on the chosen responses.
#
# ## Figure 2: does the bar rise?
#
# The mean of $\gamma$ of every model on every chunk. On a chunk that is still to come, the last model before it is the reference that it will meet.

# %%
gammas = pd.concat([pd.read_json(io.StringIO(row.gammas)).assign(world=row.world, seed=row.seed) for row in main["sDPO"].itertuples()])
ax = sns.pointplot(gammas, x="model", y="gamma", hue="chunk", palette="colorblind", errorbar=("ci", 95), capsize=0.1)
ax.axhline(0, color="black", lw=1, ls=":"); ax.set(xlabel="", ylabel="mean gamma (nats)"); sns.despine()
met = gammas.pivot_table("gamma", "model", "chunk")
assert all(met.loc["M_2", c] > met.loc["M_1", c] > met.loc["M_0", c] for c in ("digest", "riddle"))

# %% [markdown]
# Every model raises $\gamma$ on all chunks: most on the one that it was trained on, and somewhat on those that are still to come. So when stage 3 begins, its reference is at 2.2 nats on `riddle`, where S is at 0.4. The bar rises, as the paper says; that a
# higher bar makes a better model does not follow (table 1).
#
# ## Figure 3: where the target starts
#
# If stage 2 starts its target at S instead of $M_1$, its first loss is no longer $\ln 2$: it is
#
# $$L = E\,\log\!\left(1 + e^{\beta(\gamma_{M_1} - \gamma_S)}\right) \;\ge\; \log\!\left(1 + e^{\beta\,E(\gamma_{M_1} - \gamma_S)}\right), \tag{1}$$
#
# by the convexity of softplus. Both sides can be read off the tables before a step is made. In the paper's numbers, the mean gap of 13.5 nats at $\beta = 0.1$ gives at least 1.58.

# %%
world, settings = load_world(), COMMON | choices()["DPO"]
config = StepwiseConfig(**settings, init_target="S", shuffle=False)     # unshuffled: the first batch is the chunk's first 32 pairs
run = sdpo(world.base, world.sources, config, tempfile.mkdtemp())
chunk = next(s.pairs for s in load_sources(world.sources, run.tokenizer, config) if s.name == run.stages[1]["chunk"])
S, M_1 = (read_table(run.folder / place / "logprobs").gamma(chunk) for place in ("base", "stage-1"))
gap = config.beta * (M_1 - S)
first = run.metrics.query("stage == 2")["loss"].iloc[0]
assert abs(F.softplus(gap[:config.batch_size]).mean().item() - first) < 1e-4
assert F.softplus(gap).mean() > F.softplus(gap.mean()) > math.log(2)
pd.Series({"mean gap, nats": (gap.mean() / config.beta).item(), "left side of (1), the whole chunk": F.softplus(gap).mean().item(), "right side": F.softplus(gap.mean()).item(), "the first batch, from the tables": F.softplus(gap[:config.batch_size]).mean().item(), "the run's first loss": first}).round(4).to_frame("stage 2, target S")


# %% [markdown]
# Here are all the losses of stage 2, mean and range over the worlds, at the same settings.

# %%
def stage_2(rows): return np.array([row.losses[row.steps[0]:row.steps[0] + row.steps[1]] for row in rows.itertuples()], dtype=object)
fig, ax = plt.subplots(figsize=(6, 3.2))
for rows, label in ((main["sDPO at DPO's beta"], "target $M_1$"), (table_1["target S"], "target S")):
    losses = stage_2(rows); n = min(map(len, losses)); losses = np.array([l[:n] for l in losses], dtype=float)
    (drawn,) = ax.plot(range(1, n + 1), losses.mean(0), label=label); ax.fill_between(range(1, n + 1), losses.min(0), losses.max(0), color=drawn.get_color(), alpha=0.15, lw=0)
assert stage_2(table_1["target S"])[0][0] > 1.4 and all(abs(row.losses[row.steps[0]] - math.log(2)) < 1e-3 for row in main["sDPO at DPO's beta"].itertuples())
ax.axhline(math.log(2), color="black", lw=1, ls=":"); ax.set(xlabel="optimizer step of stage 2", ylabel="loss"); ax.legend(frameon=False); sns.despine()

# %% [markdown]
# A target that is its own reference starts at $\ln 2$, exactly. One that starts at S needs about twenty steps, half of the stage, to come back to where the other began, and ends above it. Its losses are higher and scatter more; at the end its model is worse by
# 0.06 even with a $\beta$ of its own.
#
# ## What you now have
#
# - The paper's comparisons with intervals, and with the baselines that they lack.
# - Equation (1): the first loss of a stage, known before it starts.
#
# ## Questions to test yourself
#
# 1. "Target S" on all three sources ends in the same model as "riddle against M_2". Why?
# 2. What would table 1 look like at a $\beta$ chosen for each reference?
#
# ## Try this
#
# - Double $\beta$ in the live run. How does the first loss of stage 2 change, and can you predict it from the table?
