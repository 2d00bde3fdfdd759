# %% [markdown]
# # Tuned elsewhere
# > DPO, stepwise DPO and four relatives, each at settings that were chosen in other worlds than the one it is measured in.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/tuned_elsewhere.ipynb)
#
# **Five questions, asked and not yet answered.** The [protocol](protocol.ipynb) says that tuned stepwise DPO and tuned DPO are equal. Here that is asked again, with a fairer search, and TR-DPO and Pre-DPO are asked for the first time. Questions, tests and settings were committed before any run.
#
# **You should know** the [protocol](protocol.ipynb) and [cross-fitting](compare.ipynb). **Time** 15 minutes to read, seconds to run.
#
# <details><summary>Words used on this page</summary>
#
# - **S** is the model before alignment. **DPO** trains it on all pairs at once, held by $\beta$ at a *reference*, which is S. **Stepwise DPO** (sDPO) trains in three stages, from easy to hard; the reference is the model of the stage before.
# - **TR-DPO** trains on all pairs at once and moves its reference after every 16 steps: all the way to the model (*hard*), or 0.6 of it (*soft*). **Pre-DPO** runs DPO twice: the second time from S again, against the model that came out of the first.
# - **Reward** is the true reward of a sampled answer on test prompts, between 0 and 1. **KL** is the distance from S in nats.
# - **+0.011 [+0.003, +0.020]** is the mean of paired differences and its 95 % interval.
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
import numpy as np
import pandas as pd
from sdpo_nb.cells import stored_rows
from sdpo_nb.compare import difference_intervals, paired_difference, plot_contrasts, reward_at_kl
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.questions import ELSEWHERE_QUESTIONS, all_cells_of, cross_fitted_contrasts, cross_fitted_values
from sdpo_nb.questions import ELSEWHERE_MIDDLES, elsewhere_ladders, load_grid, search_table, trial_cells

# %% [markdown]
# ## What was wrong with the search
#
# Nothing, but it was small: two worlds, and $\beta$ in steps of a factor of two. How much hangs on that? For another page DPO was once run between two steps of that grid, at $\beta = 0.4$ and the smaller learning rate. Compare tuned sDPO with DPO as it was tuned, and with this one:

# %%
primary, stages = load_grid("primary"), load_grid("how_many_stages")
opponents = {"DPO, as tuned": primary["DPO"], "DPO at beta 0.4, rate 1e-4": stages["T = 1, beta T/3"]}
differences = {f"sDPO minus {name}": paired_difference(primary["sDPO"], rows) for name, rows in opponents.items()}
table = difference_intervals(differences)
assert table["mean"][0] > 0 > table["mean"][1]
table.round(4)

# %% [markdown]
# The sign turns. Neither difference is certain, and both lie within the $\pm 0.02$ that we call equal. But whoever wants to know which of two methods is ahead by a few thousandths must not choose settings by luck, and not in the worlds that are measured.
#
# ## Five questions
#
# They were committed before any run.

# %%
ELSEWHERE_QUESTIONS

# %% [markdown]
# *Which settings?* Every method has five values of $\beta$, in steps of a factor of $\sqrt 2$, at two learning rates. A world gets those of the ten with the highest mean reward in the other nine worlds. The middle of each ladder comes from the earlier searches. TR-DPO and Pre-DPO were never searched, so for them it comes from a trial with seventeen runs in world 0, which is measured nowhere on this page.
#
# *Which tests?* Reward of sampled answers, ten worlds, one seed. A difference needs a p-value below 0.05 by sign flips over worlds and an interval without 0. Equality needs a p-value below 0.05 by two one-sided tests within $\pm 0.02$. Both are corrected for five questions. An answer is provisional if one of its methods ends at an end of its ladder in more than half of the worlds.
#
# *What is not equal?* Pre-DPO trains twice as long as the others. All see the same pairs three times in a run.

# %%
plan = {}
for method, ladder in elsewhere_ladders().items():
    betas = sorted({condition.settings["beta"] for condition in ladder.values()})
    rates = sorted({condition.settings["lr"] for condition in ladder.values()})
    plan[method] = {"beta": ", ".join(f"{beta:g}" for beta in betas), "rate": ", ".join(f"{lr:g}" for lr in rates)}
pd.DataFrame(plan).T

# %% [markdown]
# The trial in world 0, at the smaller rate (`python -m sdpo_nb.experiments trial`): reward on validation prompts. The middles are the best of each line.

# %%
trial = search_table(stored_rows(trial_cells()))
if len(trial):
    rewards = trial.pivot_table(index="method", columns="beta", values="reward")
    for method, row in rewards.iterrows(): assert row.idxmax() == ELSEWHERE_MIDDLES[method]
    display(rewards.round(3).fillna(""))

# %% [markdown]
# Beside the answers stand greedy answers, multiple choice, and KL, without tests. And because TR-DPO is said to be better *at the same KL* ([2404.09656](https://arxiv.org/abs/2404.09656)), every method is read off its ladder at the KL of DPO. We try the tables on invented runs in which all methods are equal, and reward grows with KL.

# %%
WHAT = {"greedy": "greedy", "choice": "multiple choice", "kl": "KL from S (nats)"}

def beside(found):
    "Each method minus DPO in what is not tested, and at DPO's KL: reward read off its ladder at rate 1e-4."
    ladders = elsewhere_ladders()
    table = {method: {} for method in ladders if method != "DPO"}
    for what, label in WHAT.items():
        values, _ = cross_fitted_values(ladders, found, what)
        for method in table: table[method][label] = as_text(interval(values[method] - values["DPO"]), "+.3f")
    kl, reward = (cross_fitted_values(ladders, found, what)[0]["DPO"] for what in ("kl", "sampled"))
    for method in table:
        rungs = [found[name] for name in ladders[method] if name.endswith("rate 0.0001")]
        try: at = reward_at_kl(rungs, kl) - reward.mean(2, keepdims=True)
        except ValueError as e: table[method]["reward at DPO's KL"] = str(e).split(";")[0]
        else: table[method]["reward at DPO's KL"] = as_text(interval(at), "+.3f")
    return pd.DataFrame(table).T


# %%
def invent_runs(seed=0):
    "KL falls with beta; reward is a function of KL and the luck of the run, for every method alike."
    rng = np.random.default_rng(seed)
    found = {}
    for method, ladder in elsewhere_ladders().items():
        middle = np.median([condition.settings["beta"] for condition in ladder.values()])
        for name, condition in ladder.items():
            kl = 1.2 * middle / condition.settings["beta"]
            rows = []
            for world in range(10):
                mean = 0.85 - 0.05 * (kl - 1.2) ** 2 + rng.normal(0, 0.004)
                rewards = rng.normal(mean, 0.03, 50)
                row = dict(world=world, seed=0, weights=f"S of {world}", sampled=rewards, greedy=rewards, choice=rewards)
                rows.append(row | dict(kl=rng.normal(kl, 0.1, 50)))
            found[name] = pd.DataFrame(rows)
    return found

invented = invent_runs()
answers = cross_fitted_contrasts(ELSEWHERE_QUESTIONS, elsewhere_ladders(), invented)
assert (answers["verdict"] == "equal").all()
assert not answers["provisional"].any()
beside(invented)

# %% [markdown]
# ## What came out
#
# `python -m sdpo_nb.experiments tuned_elsewhere` runs the grid.

# %%
SHOWN = ["question", "mean", "low", "high", "holm", "holm_equal", "verdict", "provisional"]
cells = all_cells_of("tuned_elsewhere")
done = stored_rows(cells)
complete = len(done) == len(cells)
print(f"{len(done)} of {len(cells)} cells have been run")
if complete:
    found = load_grid("tuned_elsewhere")
    answers = cross_fitted_contrasts(ELSEWHERE_QUESTIONS, elsewhere_ladders(), found)
    display(answers[SHOWN].round(3).set_index("question"))
    display(beside(found))
    plot_contrasts(answers, sides=("better: the second", "better: the first"))

# %% [markdown]
# ## What this does not show
#
# - **Other schedules of a moving reference.** TR-DPO moves after every 16 of about 140 steps. Its authors searched for that number; here it was fixed.
# - **Order.** All methods but sDPO train on all pairs at once; the [page on order](when_order_matters.ipynb) asks what an order can do.
# - **Larger models.** S has 340 thousand parameters.
#
# ## Questions to test yourself
#
# 1. Each world gets the settings that are best in the other nine. Any two worlds share eight of their nine. What does that mean for the ten differences?
#
#    <details><summary>Answer</summary>
#
#    They are not quite independent: the choice for one world depends on the others. The mean stays fair, since no world takes part in its own choice; the interval is a little too sure.
#
#    </details>
# 2. Pre-DPO trains twice as long. If it came out ahead, what would you compare it with next?
#
#    <details><summary>Answer</summary>
#
#    With DPO that sees every pair six times, at its own best settings. Otherwise the second reference and the second round of training cannot be told apart.
#
#    </details>
