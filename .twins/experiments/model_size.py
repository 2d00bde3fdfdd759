# %% [markdown]
# # Model size
# > Stepwise against plain DPO in worlds whose S has 86 thousand to 5.3 million parameters.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/model_size.ipynb)
#
# **One question, asked and not yet answered.** Every other tiny world of this book has an S of 337 thousand parameters. Does the difference between stepwise and plain DPO grow, or shrink, with the model? Question, test and ladders were committed before any run of this grid with another size.
#
# **You should know** what stepwise DPO does ([chapter 14](../14_stepwise.ipynb)) and the [protocol](protocol.ipynb). **Time** 8 minutes to read, seconds to run.
#
# <details><summary>Words used on this page</summary>
#
# - **S** is the model before alignment. **DPO** trains it on all pairs at once, held by $\beta$ at a *reference*, which is S. **Stepwise DPO** (sDPO) trains in three stages, one for each *source* of pairs; the reference is the model of the stage before.
# - A **rung** is one method at one $\beta$ and one learning rate. A **ladder** is all rungs of a method.
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
from scipy.stats import linregress
from sdpo_nb.bodies import SIZES, make_body
from sdpo_nb.cells import stored_rows
from sdpo_nb.compare import SAME, equality_test, outcome_values, paired_difference
from sdpo_nb.evaluate import as_text
from sdpo_nb.questions import MODEL_SIZES, cross_fitted, grid_cells, model_size_ladders
from sdpo_nb.world import make_model, make_tokenizer

# %% [markdown]
# ## Four sizes that start equally well
#
# All are Llamas of three layers, and only the width differs. A better S leaves less to be gained. So in each of three worlds a Llama of another width is fine-tuned until its reward on validation prompts is that of the Llama we know, within 0.01 ([bodies](bodies.ipynb)). Then it writes its own pairs, and its sources are ordered by its own reward accuracy.

# %%
tokenizer = make_tokenizer()
def model_of(body): return make_body(body, tokenizer) if body in SIZES else make_model(tokenizer)
parameters = {body: model_of(body).num_parameters() for body in MODEL_SIZES}
pd.DataFrame({"width": MODEL_SIZES, "parameters": parameters}).map("{:,}".format)

# %% [markdown]
# ## The question
#
# *How does the difference, sDPO minus DPO in mean sampled reward, change when the model has ten times as many parameters?*
#
# *Which settings?* Each method has a ladder of five $\beta$, each twice the one before, at two learning rates; all rungs run in worlds 11, 12 and 13 with one seed. The rates are divided by the width, as the best rate of a wider model is smaller ([questions](questions.ipynb)). A method is scored in each world at the rung that was best in the *two others*, so the luck of a world cannot choose for itself. If in the mean of the worlds a best rung is at the end of its ladder in $\beta$, both methods get a rung more there, at all rates.
#
# *Which test?* Four sizes in three worlds make twelve differences. A straight line through them against $\log_{10}$ of the parameters has a slope: the change for ten times as many. It differs from 0 if its 95 % interval, by Student's law with ten degrees of freedom, leaves 0 out. It is equal to 0 by two one-sided tests within $\pm 0.02$, at 0.05. It is one question, so nothing is to be corrected.
#
# *What will it see?* From the protocol a difference in one world with one seed has a standard deviation of some 0.02, before the noise of choosing. The widths span 1.8 powers of ten. So the slope will be known to about $\pm 0.02$: a strong trend would be seen, and a difference of 0.01 between neighbours would not.
#
# Beside it, and without tests, stand the difference for each size, the gain of both methods over S, and their KL.
#
# ## What came out
#
# `python -m sdpo_nb.experiments model_size` runs all rungs. A size is shown here when all of its cells have been run.

# %%
rungs = {}
for name, cells in grid_cells("model_size").items():
    body, method, *settings = name.split(", ")
    rows = stored_rows(cells)
    if len(rows) == len(cells): rungs.setdefault((body, method), {})[", ".join(settings)] = rows

asked = {which: len(ladder.betas) * len(ladder.rates) for which, ladder in model_size_ladders().items()}
asked |= {(body, "S"): 1 for body in MODEL_SIZES}
there = pd.Series({which: f"{len(rungs.get(which, {}))} of {n}" for which, n in asked.items()}).unstack()
sizes = [body for body in MODEL_SIZES if all(len(rungs.get((body, m), {})) == asked[body, m] for m in ("S", "DPO", "sDPO"))]
there.loc[list(MODEL_SIZES)]


# %%
def of_size(body): # method -> rows at the settings chosen in the other worlds
    return {method: cross_fitted(rungs[body, method]) for method in ("S", "DPO", "sDPO")}

found = {body: of_size(body) for body in sizes}
differences = {body: paired_difference(found[body]["sDPO"], found[body]["DPO"]).mean((1, 2)) for body in sizes}
pd.DataFrame(differences, index=[f"world {world}" for world in range(11, 14)]).T.round(4)


# %%
def slope_of(differences): # size -> a number for each world; the change for ten times as many parameters
    x = np.repeat([np.log10(parameters[body]) for body in differences], 3)
    line = linregress(x, np.concatenate(list(differences.values())))
    return line, equality_test(line.slope, line.stderr, len(x) - 2, SAME) | dict(p=line.pvalue)

def with_one_scatter(differences): # size -> mean and interval, from the scatter between worlds that is common to all sizes
    scatter = np.mean([d.var(ddof=1) for d in differences.values()]) ** 0.5
    return {body: equality_test(d.mean(), scatter / 3 ** 0.5, 2 * len(differences), SAME) for body, d in differences.items()}

if len(sizes) > 1:
    line, answer = slope_of(differences)
    print("for ten times as many parameters:", as_text([answer[what] for what in ("mean", "low", "high")], "+.3f"),
          f"p = {answer['p']:.2f} (different), {answer['p_equal']:.3f} (equal)")
    table = {}
    for body, d in with_one_scatter(differences).items():
        means = {method: outcome_values(rows, "sampled").mean() for method, rows in found[body].items()}
        kls = {f"KL of {method}": outcome_values(found[body][method], "kl").mean() for method in ("DPO", "sDPO")}
        table[body] = means | {"sDPO minus DPO": as_text([d[what] for what in ("mean", "low", "high")], "+.3f")} | kls
    display(pd.DataFrame(table).T)

# %%
if len(sizes) > 1:
    fig, (levels, ax) = plt.subplots(1, 2, figsize=(11, 3.6), constrained_layout=True)
    for method, color in zip(("S", "DPO", "sDPO"), ("0.5", "C0", "C1")):
        values = np.array([outcome_values(found[body][method], "sampled").mean((1, 2)) for body in sizes])
        x = [parameters[body] for body in sizes]
        levels.plot(x, values.mean(1), "o-", color=color, label=method)
        levels.plot(x, values, "o", color=color, ms=3, alpha=0.5)
    levels.set(xscale="log", xlabel="parameters", ylabel="true reward, sampled")
    levels.legend()
    ax.axhspan(-SAME, SAME, color="0.9", lw=0)
    for body, d in with_one_scatter(differences).items():
        ax.plot([parameters[body]] * 2, [d["low"], d["high"]], color="C1")
        ax.plot(parameters[body], d["mean"], "o", color="C1")
        ax.plot([parameters[body]] * 3, differences[body], "o", color="C1", ms=3, alpha=0.5)
    ends = np.array([min(x), max(x)])
    ax.plot(ends, line.intercept + line.slope * np.log10(ends), color="0.4", ls="--")
    ax.set(xscale="log", xlabel="parameters", ylabel="sDPO minus DPO")

# %% [markdown]
# ## What this does not show
#
# - **Large models.** Five million parameters are few, and three layers are few. What a wider model has to learn is the same four skills.
# - **Models that know more.** All S are equally good. A model that is larger *and* better is another question, for [a real model](smollm2.ipynb).
# - **Thousandths.** Three worlds and one seed see a trend of two hundredths for ten times as many parameters.
#
# ## What you now have
#
# - A way to choose and to measure with the same runs, without choosing by luck.
# - A question about a trend, with a test.
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
# 2. A method is scored in world 11 at the rung that was best in worlds 12 and 13. What would be wrong with the rung that was best in all three?
#
#    <details><summary>Answer</summary>
#
#    World 11 would take part in the choice. A rung that was lucky there would be chosen more often, and its luck would be counted as merit. With the same number of rungs for both methods that luck is the same in the mean, but each single difference would be noisier.
#
#    </details>
#
# ## Try this
#
# - Give `cross_fitted` only the rungs of the smaller learning rate. Does any difference change its sign?
#
#   <details><summary>What you should see</summary>
#
#   Filter with `{s: rows for s, rows in rungs["llama", "sDPO"].items() if s.endswith("lr 0.0001")}`, and the same for DPO.
#
#   </details>
