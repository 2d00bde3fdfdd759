# %% [markdown]
# # Model size
# > Stepwise against plain DPO in worlds whose S has 86 thousand to 5.3 million parameters.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/model_size.ipynb)
#
# **One question, asked beforehand.** Every other Llama of this book has 337 thousand parameters. Does the difference between stepwise and plain DPO grow, or shrink, with the model? Here it does neither: for ten times as many parameters it changes by -0.003 [-0.016, +0.010], which is equal to nothing. Question and test were committed before any run with another size. The learning rates were changed after ladders of two sizes had been run, and before anything was measured.
#
# **You should know** what stepwise DPO does ([chapter 14](../14_stepwise.ipynb)) and the [protocol](protocol.ipynb). **Time** 8 minutes to read, seconds to run.
#
# <details><summary>Words used on this page</summary>
#
# - **S** is the model before alignment. **DPO** trains it on all pairs at once, held by $\beta$ at a *reference*, which is S. **Stepwise DPO** (sDPO) trains in three stages, one for each *source* of pairs; the reference is the model of the stage before.
# - A **ladder** is one method at several $\beta$ and learning rates; each of these is a *rung*.
# - **Reward** is the true reward of a sampled answer on test prompts, between 0 and 1. **KL** is the distance from S in nats.
# - **+0.011 [+0.003, +0.020]** is a mean of paired differences and its 95 % interval. *Equal* means within $\pm 0.02$.
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
from sdpo_nb.bodies import untrained
from sdpo_nb.cells import stored_rows
from sdpo_nb.compare import SAME, equality_test, outcome_values, slope_test
from sdpo_nb.evaluate import as_text
from sdpo_nb.questions import MODEL_SIZES, OTHER_DRAWS, choice_cells, chosen_on_ladders, lead_by_size, load_grid
from sdpo_nb.questions import model_size_ladders, trend_of_sizes
from sdpo_nb.world import make_tokenizer

# %% [markdown]
# ## Four sizes that start equally well
#
# All are Llamas of three layers, and only the width differs. A better S leaves less to be gained. So in each world a Llama of another width is fine-tuned until its reward on validation prompts is that of the Llama we know, within 0.01 ([bodies](bodies.ipynb)). Then it writes its own pairs, and its sources are ordered by its own reward accuracy.

# %%
tokenizer = make_tokenizer()
models = {body: untrained(body, tokenizer) for body in MODEL_SIZES}
parameters = {body: model.num_parameters() for body, model in models.items()}
widths = {body: model.config.hidden_size for body, model in models.items()}
pd.DataFrame({"width": widths, "parameters": parameters}).map("{:,}".format)

# %% [markdown]
# ## The question
#
# *How does the difference, sDPO minus DPO in mean sampled reward, change when the model has ten times as many parameters?*
#
# *Which settings?* For each size both methods have a ladder of five $\beta$, each twice the one before, at two learning rates, run in worlds 14 and 15 with one seed. The top of the ladder is read off as on the other pages. If a best rung is at an end, both methods of that size get a rung more there before anything is measured.
#
# *Which rates?* As a rule of thumb, the best rate of Adam is inversely proportional to the width ([Yang et al. 2022](https://arxiv.org/abs/2203.03466)). So the two rates were first divided by the width, and ladders of two sizes were run with them. Here is the best mean reward on each:

# %%
ladders = model_size_ladders()
def best_on(ladder, lr):
    "The mean reward of the best rung."
    rungs = [stored_rows(choice_cells("model_size", ladder.rung(beta, lr))) for beta in ladder.betas]
    return max(np.mean([np.mean(rewards) for rewards in rows["sampled"]]) for rows in rungs)

def best_by_rate(rates_of): # ladder -> rates
    best = {}
    for arm, ladder in ladders.items():
        body, method = arm.split(", ")
        for lr in rates_of(ladder): best.setdefault((body, f"rate {lr:g}"), {})[method] = best_on(ladder, lr)
    return pd.DataFrame(best).T.rename_axis(["model", ""])

def scaled(ladder):
    if ladder.body not in ("llama-48", "llama-192"): return []
    return [round(lr * 96 / widths[ladder.body], 9) for lr in ladder.rates]

tried = best_by_rate(scaled)
assert (tried.loc[("llama-192", "rate 5e-05")] < tried.loc[("llama-192", "rate 0.00015")] - 0.05).all()
tried.round(3)

# %% [markdown]
# For the wider model the smaller rate is far too small, and the larger one is at the end of what was tried; for the narrower model the larger rate is too large. So the rule does not hold in runs as short as these. All sizes now have the rates of the Llama that we know, 1e-4 and 3e-4:

# %%
best = best_by_rate(lambda ladder: ladder.rates)
assert best.loc[("llama-384", "rate 0.0003")].max() < 0.6
best.round(3)

# %% [markdown]
# For the widest 3e-4 turned out to be useless, so it has a third rate, 3e-5. It is the best of the three for both methods, and a smaller one was not tried. Both changes were made before anything was measured.
#
# *Which test?* The tops are measured in worlds 11 to 13 with two seeds. Four sizes in three worlds make twelve differences. A straight line through them against $\log_{10}$ of the parameters has a slope: the change for ten times as many. It differs from 0 if its 95 % interval, by Student's law with ten degrees of freedom, leaves 0 out. It is equal to 0 by two one-sided tests within $\pm 0.02$, at 0.05. It is one question, so nothing is to be corrected. (The Llama of width 96 has been run in these worlds before, at other settings, as the ladders of [tuned elsewhere](tuned_elsewhere.ipynb). The others have not.)
#
# *What can it see?* The twelve differences are not quite independent. All three of a size share what was chosen for that size, and a choice is never exact. We draw them many times: 0.016 of scatter between worlds and seeds, as the protocol found, and 0.004 from the choice. How often is a true slope found, and how often is it called equal?

# %%
sizes = np.array(list(parameters.values()))
worlds = len(OTHER_DRAWS["model_size"][0])
x = np.log10(np.repeat(sizes, worlds))

rng = np.random.default_rng(0)
def words(slope):
    of_choice = np.repeat(rng.normal(0, 0.004, len(sizes)), worlds)
    answer = slope_test(x, slope * x + of_choice + rng.normal(0, 0.016, len(x)), SAME)
    return answer["p"] < 0.05, answer["p_equal"] < 0.05

power = {slope: np.mean([words(slope) for _ in range(500)], axis=0) for slope in (0., 0.01, 0.02, 0.03)}
assert power[0.][0] < 0.10
pd.DataFrame(power, index=["different", "equal"]).T.rename_axis("true slope").round(2)

# %% [markdown]
# A strong trend would be seen: 0.03 for ten times as many, or 0.05 from the smallest model to the largest. Half of that would often be missed.
#
# Beside it, and without tests, stand the difference for each size, the levels and the KL.
#
# ## What came out
#
# `python -m sdpo_nb.experiments choose_model_size` runs the ladders and writes what was chosen; `... model_size` measures. The settings:

# %%
pd.DataFrame(chosen_on_ladders("model_size")).T

# %%
found = load_grid("model_size")
leads = lead_by_size(found)
trend = trend_of_sizes(leads)
print("for ten times as many parameters:", as_text((trend["mean"], trend["low"], trend["high"]), "+.3f"))
print(f"p = {trend['p']:.2f} (different), {trend['p_equal']:.3f} (equal)")

# %% [markdown]
# The trend is shown to be none that counts. (The simulation gave this two chances in three, if there is none at all.) Size by size, without tests; the intervals take the scatter between worlds from all sizes:

# %%
scatter = np.mean([lead.var(ddof=1) for lead in leads.values()]) ** 0.5     # between worlds, common to all sizes
table = {}
for body, lead in leads.items():
    own = equality_test(lead.mean(), scatter / worlds ** 0.5, (worlds - 1) * len(leads), SAME)
    table[body] = {"sDPO minus DPO": own["mean"], "low": own["low"], "high": own["high"]}
    for method in ("DPO", "sDPO"):
        rows = found[f"{body}, {method}"]
        table[body][method] = outcome_values(rows, "sampled").mean()
        table[body][f"KL, {method}"] = outcome_values(rows, "kl").mean()
table = pd.DataFrame(table).T
assert table["sDPO minus DPO"].abs().max() < SAME
assert (table["KL, sDPO"] < table["KL, DPO"]).sum() == 3
table.round(3)

# %%
fig, (levels, ax) = plt.subplots(1, 2, figsize=(11, 3.6), constrained_layout=True)
for method, color in (("DPO", "C0"), ("sDPO", "C1")):
    values = np.array([outcome_values(found[f"{body}, {method}"], "sampled").mean((1, 2)) for body in MODEL_SIZES])
    levels.plot(sizes, values.mean(1), "o-", color=color, label=method)
    levels.plot(sizes, values, "o", color=color, ms=3, alpha=0.5)
levels.set(xscale="log", xlabel="parameters", ylabel="true reward, sampled")
levels.legend()
ax.axhspan(-SAME, SAME, color="0.9", lw=0)
ax.vlines(sizes, table["low"], table["high"], color="C1")
ax.plot(sizes, table["sDPO minus DPO"], "o", color="C1")
ax.plot(sizes, np.array(list(leads.values())), "o", color="C1", ms=3, alpha=0.5)
ends = sizes[[0, -1]]
ax.plot(ends, trend["intercept"] + trend["mean"] * np.log10(ends), color="0.4", ls="--")
ax.set(xscale="log", xlabel="parameters", ylabel="sDPO minus DPO")
sns.despine()

# %% [markdown]
# Left, the levels: all sizes begin at nearly the same reward, and neither method gains steadily more or less with the width. Right, the differences: large points are the means of a size with their intervals, small ones its three worlds, the dashed line is the trend, and grey is what counts as nothing. The mean of every size lies in the grey band, the ends of three intervals do not. How far the two go from S follows no order, either: sDPO is nearer to S at three sizes and farther at one.

# %% [markdown]
# ## What this does not show
#
# - **Large models.** Five million parameters are few, and three layers are few. What a wider model has to learn is the same four skills.
# - **Models that know more.** All S are equally good. A model that is larger *and* better is another question, for [a real model](smollm2.ipynb).
# - **Hundredths.** The simulation above says what three worlds can see.
# - **Other learning rates.** Two for each size, three for the widest, whose best is the smallest. If none of them suits a size, both methods suffer, but perhaps not alike.
#
# ## What you now have
#
# - A question about a trend, with a test, what the test can see, and its answer: as much, whatever the size.
#
# ## Questions to test yourself
#
# 1. Why are all S tuned to one reward?
#
#    <details><summary>Answer</summary>
#
#    A better S leaves less to be gained, for both methods. The difference between them would shrink with that, and we could not tell it from an effect of size.
#
#    </details>
# 2. The three differences of one size share what was chosen for that size. What if the choice were made in the three worlds that are measured?
#
#    <details><summary>Answer</summary>
#
#    A rung that was lucky there would be chosen, and its luck would be counted three times, always for the same size. The line would take it for a trend. The page on [comparing](compare.ipynb) shows what that does to false alarms.
#
#    </details>
#
# ## Try this
#
# - In the simulation, let the choice be worse: 0.012 in place of 0.004. How often is a slope of 0 now called different?
#
#   <details><summary>What you should see</summary>
#
#   In about one of seven trials, not in one of twenty.
#
#   </details>
