# %% [markdown]
# # How many stages?
# > T from 1 to 8 on the same pairs: what each reaches, and how far from S it goes for it.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/how_many_stages.ipynb)
#
# **At one $\beta$, two or three stages are best. At one distance from S, the number of stages hardly matters.** At $\beta = 1.2$ true reward rises from 0.830 with one stage (which is DPO) to 0.871 with three, and falls to 0.820 with eight. But the distance from S, the KL, grows all along, from 0.5 to 3.2 nats. At the same KL, two to seven stages are equal to three within $\pm 0.02$, and so is one stage at $\beta = 0.4$.
# One stage at $\beta = 1.2$ is even *better* than three at that distance, by 0.016 [0.011, 0.021].
#
# All numbers are from ten worlds with two seeds each.
#
# **You should know** [stepwise DPO](../14_stepwise.ipynb) and the [protocol](protocol.ipynb). **Time** 20 minutes to read, a few seconds to run. The grid behind it took 1.3 core hours (`make experiments`).
#
# <details><summary>Words used on this page</summary>
#
# - **S** is the model before alignment. **DPO** trains it on all pairs at once. **Stepwise DPO** cuts the pairs into $T$ chunks and trains one *stage* on each; the model of the stage before is the *reference*, the fixed model that the loss measures from.
# - **$\beta$** says how strongly a model is held at its reference. A smaller $\beta$ lets it go farther.
# - **KL** is the distance of a model from S, in nats, measured along its own answers.
# - **True reward** is 1 for the right answer and less for every letter that has to be mended. *Sampled* answers are drawn from the model; a *greedy* answer takes the likeliest letter at every place.
# - **World**: an S with its own demonstrations and pairs. **Seed**: the order of the training pairs.
# - **0.016 [0.011, 0.021]** is a mean and its 95 % interval. Differences are *paired*: the same worlds, seeds and prompts for both. *Equal* means that the whole interval lies within $\pm 0.02$.
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
from sdpo_nb.cells import learning_rate_sum
from sdpo_nb.compare import OUTCOMES, difference_intervals, outcome_values, paired_difference
from sdpo_nb.compare import plot_contrasts, reward_at_kl
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.questions import BETA_LADDER, chosen_settings, load_grid

# %% [markdown]
# ## The same pairs, cut finer
#
# The paper has two stages, one for each data set, and leaves open what more stages would do. Here the pairs of all three sources stand in one row, the easy source first, and the row is cut into $T$ equal parts. (Three parts are the sources themselves, which differ by up to 42 pairs.) Whatever $T$ is, each pair is seen three times. The learning rate, and $\beta = 1.2$, are what the search chose for three stages.
#
# More stages also means going farther. Every stage has a reference of its own, and may go away from it as far as $\beta$ allows ([smaller_beta](smaller_beta.ipynb)). So "more stages" could be another name for "a smaller $\beta$". To see that, a second line lets $\beta$ grow with $T$. Then $\beta/T$ is always 0.4: DPO with $\beta = 0.4$, three stages with 1.2, eight with 3.2.

# %%
found = load_grid("how_many_stages")
main = load_grid("primary")
beta = chosen_settings()["sDPO"]["beta"]

one_beta = {T: found[f"T = {T}"] for T in range(1, 9)}
growing_beta = {T: found[f"T = {T}, beta T/3"] for T in (1, 2, 5, 8)}
growing_beta[3] = one_beta[3]                          # beta T/3 is beta
growing_beta = dict(sorted(growing_beta.items()))
LINES = {rf"$\beta$ = {beta:g}": one_beta, rf"$\beta$ = {beta / 3:g} T": growing_beta}

# %% [markdown]
# A third line is needed for the comparison at equal distance: three stages at seven values of $\beta$, from an eighth of 1.2 to eight times 1.2. We call it the *ladder*.

# %%
ladder = [main[f"sDPO, {factor:g} beta"] for factor in BETA_LADDER]
ladder = [found["T = 3, 0.125 beta"], *ladder, found["T = 3, 8 beta"]]


# %% [markdown]
# Before you look: at $\beta = 1.2$, which number of stages will be best? And will the best stay the best when $\beta$ grows with $T$?

# %%
def mean(rows, what):
    return outcome_values(rows, what).mean()

dpo = growing_beta[1]                                  # DPO at beta = 0.4
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True, constrained_layout=True)

kl = [mean(rows, "kl") for rows in ladder]
reward = [mean(rows, "sampled") - mean(dpo, "sampled") for rows in ladder]
right.plot(kl, reward, color="0.7", lw=2)
right.annotate("three stages,\nother $\\beta$", (kl[-1], reward[-1]), xytext=(10, -4), ha="left",
               color="0.5", textcoords="offset points")

PLACES = (6, -14)                                      # the numbers of a line: above its points, or below
for color, up, (name, line) in zip(sns.color_palette("colorblind"), PLACES, LINES.items()):
    stages = list(line)
    paired = [interval(paired_difference(rows, dpo)) for rows in line.values()]
    middle, low, high = np.array(paired).T
    left.errorbar(stages, middle, yerr=[middle - low, high - middle], fmt="o-", capsize=3, color=color)
    left.annotate(name, (8, middle[-1]), xytext=(10, -3), textcoords="offset points", color=color)
    for T, rows, y in zip(stages, line.values(), middle):
        x = mean(rows, "kl")
        height = 6 if T == 1 else up                   # below it another point would cover it
        right.plot(x, y, "o", color=color)
        right.annotate(T, (x, y), xytext=(0, height), textcoords="offset points", ha="center",
                       fontsize="small", color=color)

left.axhline(0, color="black", lw=1, ls=":")
left.set(xlabel="number of stages T", xticks=range(1, 9), xlim=(0.5, 9.4),
         ylabel="true reward minus that of DPO at $\\beta$ = 0.4\n← worse      better →")
right.set(xlabel="KL from S (nats), farther →      (the numbers are T)")
sns.despine(fig)


# %% [markdown]
# On the left, each point is a paired difference to DPO at $\beta = 0.4$. At $\beta = 1.2$ (blue) there is a best number of stages, two or three. When $\beta$ grows with $T$ (orange), five stages are nearly as good as one.
#
# On the right, the same runs stand over their distance from S, and the best number is gone. All but the leftmost point lie on the line that three stages draw when only $\beta$ changes, or a little above it.
#
# ## At the same distance
#
# Now each is compared with three stages *at the same KL*: for every world and seed we read off the ladder what three stages reach at the KL of the other run, and subtract it.

# %%
def minus_three_stages(rows):
    at_same_kl = reward_at_kl(ladder, outcome_values(rows, "kl"))
    return outcome_values(rows, "sampled").mean(2, keepdims=True) - at_same_kl

compared = {}
for name, line in LINES.items():
    for T, rows in line.items():
        if T == 3 or rows is one_beta[8]: continue     # three is the ladder; eight leaves it in two runs
        compared[f"T = {T}, {name}"] = minus_three_stages(rows)
compared[r"T = 1, $\beta$ = 0.6"] = minus_three_stages(main["DPO at sDPO's rate"])

level = difference_intervals(compared)
one_stage = level["question"].str.startswith("T = 1,")
assert level.loc[~one_stage, ["low", "high"]].abs().max(axis=None) < 0.02
assert level.loc[one_stage, "low"].min() > 0

# %%
plot_contrasts(level, "true reward minus that of three stages at the same KL (grey: equal)",
               sides=("three stages better", "better than three"));

# %% [markdown]
# All but one are equal to three stages: their intervals lie in the grey band. One stage, which is plain DPO, is ahead at each of the three $\beta$ that we have: by 0.006, 0.007 and 0.016 at $\beta$ = 0.4, 0.6 and 1.2, and the last one leaves the band.
#
# Nearly all points lie to the right of 0. Do not read much into that. The true line of three stages bends between its points and we draw it straight, so it is up to a few thousandths too low. (DPO at $\beta = 0.6$ is taken from the grid of the protocol. Eight stages at $\beta = 1.2$ are missing: in two of twenty runs they go farther than three stages do at the smallest $\beta$.)
#
# *If you compare numbers of stages at one $\beta$, you compare distances.* Eight stages at $\beta = 1.2$ reach 0.820; so do three at $\beta = 0.3$.
#
# ## Is it enough to let beta grow with T?
#
# Up to five stages, nearly. Here every number of stages has $\beta = 0.4\,T$, and DPO at $\beta = 0.4$ is subtracted:

# %%
against_dpo = {}
for T, rows in growing_beta.items():
    if T == 1: continue
    row = {}
    for what, label in OUTCOMES.items():
        difference = paired_difference(rows, dpo, what)
        row[f"{label}, minus DPO"] = as_text(interval(difference))
    against_dpo[T] = row
pd.DataFrame(against_dpo).T.rename_axis("stages")

# %% [markdown]
# Two to five stages are within 0.02 of DPO in sampled reward, though five go farther and lose a little. Eight do not stay with it: they go 0.8 nats farther and lose 0.020. So a $\beta$ in step with $T$ does not hold eight stages back.
#
# One explanation is that each stage learns the reward from an eighth of the pairs, with larger errors, and that the errors of all stages add up ([the law](finite_data.ipynb)). This page does not test it, and [the page that did](finite_data_tested.ipynb) found the opposite where few pairs are passed often. ([Smaller_beta](smaller_beta.ipynb) finds more of a gap, at three times the learning rate, with chunks in random order and at smaller $\beta$. Which of these makes it was not taken apart.)
#
# ## What more stages cost
#
# The tokens that are trained on stay the same. What is added is the moving reference: before each stage but the first, the model of the stage before reads the next chunk once, without gradients. That is $(T-1)/T$ of the data: half a pass for two stages, two thirds for three, seven eighths for eight. Compare it with the three passes of training, and with the one pass of S over everything that orders the sources and serves as the first reference.

# %%
cost = {}
for T, rows in one_beta.items():
    cost[T] = {
        "optimizer steps": np.mean([sum(steps) for steps in rows["steps"]]),
        "sum of learning rates (peaks)": np.mean([learning_rate_sum(steps) for steps in rows["steps"]]),
        "tokens trained on": rows["tokens"].mean(),
        "tokens of other passes": rows["pass_tokens"].mean(),
    }
cost = pd.DataFrame(cost).rename_axis(columns="stages")
assert cost.loc["tokens trained on"].nunique() == 1
cost.round(0).astype(int)

# %% [markdown]
# *Sum of learning rates* counts each step by its learning rate, in units of the highest. Every stage warms up and decays anew and ends in a smaller batch. So eight stages take 9 % more steps than one, with a sum of learning rates that is 19 % larger. How much of their distance comes from that was not taken apart.
#
# ## What this does not show
#
# - **More data for more stages.** Here $T$ stages share the pairs of one. If every stage had as many pairs as DPO has in all, eight might look different.
# - **Chunks of unequal size.** The paper's second data set is five times its first ([when sizes differ](when_sizes_differ.ipynb)).
# - **A curriculum.** The sources of this world share all skills, and nothing in them builds on anything else. Where it does ([builds on](builds_on.ipynb)), the order of two stages matters.
# - **Large models.** This one has 340 thousand parameters.
#
# ## What you now have
#
# - A best number of stages that is a best distance in disguise.
# - A way to see that: run one method at several $\beta$, and compare everything else with it at equal KL.
#
# ## Questions to test yourself
#
# 1. Why is the pass over the references not $T$ times as expensive as one?
# <details><summary>Answer</summary>
#
# Every model reads only the chunk of the stage that it is the reference of. Together the chunks are the data, once, less the first chunk, which S has read already.
# </details>
#
# 2. With one chunk, what is left of stepwise DPO?
# <details><summary>Answer</summary>
#
# Plain DPO: one stage, with S as its start and as its reference.
# </details>
#
# 3. Somebody reports that five stages beat two at $\beta = 0.1$. Which two numbers would you ask for?
# <details><summary>Answer</summary>
#
# The KL of both from S, and what two stages reach at a smaller $\beta$, one that brings them to the same KL.
# </details>
#
# ## Try this
#
# - Draw the figure with greedy answers: `"greedy"` for `"sampled"` in the line that begins with `reward =`, and `paired_difference(rows, dpo, "greedy")` for the points. Do the runs still lie on one line?
# <details><summary>What you should see</summary>
#
# Yes, all but the leftmost. One stage at $\beta = 1.2$ lies 0.010 above the line of three stages, the others within 0.005. The top of the line is nearer to S, at 0.8 nats instead of 1.3. So at $\beta = 1.2$ two stages are best, and five lose 0.03.
# </details>
#
# - Which of the eight stages at $\beta = 1.2$ goes farthest? `unfold_column(found["T = 8"], "stages")` of `sdpo_nb.cells` has the KL from S after each. Take the means with `.groupby("stage")[["kl", "sampled"]].mean()`.
# <details><summary>What you should see</summary>
#
# The fifth and the seventh, but not by much. The first goes 0.15 nats and the second 0.30; from the third on each adds 0.43 to 0.53. True reward is highest after the fifth, 0.840. The last three only lose.
# </details>
