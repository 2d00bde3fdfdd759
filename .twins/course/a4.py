# %% [markdown]
# # Assignment 4: stages
# > Write the loop of stepwise DPO, say what a loss guarantees, and compare it fairly with plain DPO.
#
# <!-- badge -->
#
# **First: File > Save a copy in Drive.** A notebook that was opened from GitHub is not saved when you close it.
#
# **Goal.** Stepwise DPO trains in stages, and after each stage the reference moves up. The loop is short. Which model is the reference of which stage is easy to get wrong, and whether it helped is easy to claim. You do both properly.
# **Before you start**, read [chapter 14](https://github.com/sdpo-nb/sdpo_nb/blob/main/nbs/14_stepwise.ipynb), "The method in four lines", [chapter 03](https://github.com/sdpo-nb/sdpo_nb/blob/main/nbs/03_loss.ipynb), "The reference as a lower bound" and "What $T$ stages add up to", and [chapter 08](https://github.com/sdpo-nb/sdpo_nb/blob/main/nbs/08_evaluate.ipynb), "Ask both models the same prompts".
# **Time**: 60 minutes for reading in the three chapters, then 100 here, of which 5 are running. **Runtime**: CPU (*Runtime > Change runtime type > CPU*). **Points**: 20.
#
# **How it works.** Each question has a function with `...` in it. Replace the `...`, run the cell, and run the check under it. As long as the `...` is there, the check says "nothing yet". You may run a check as often as you like: it draws new numbers each time.
# To get the same numbers again, pass the seed of a message, `try_check(check_certificate, certificate, seed=528380)`, and put a `print` into your function. A question gives all its points or none. Keep the names of the functions, and leave the lines that begin with `#| question` as they are. A check may send you to a section
# that you were not asked to read. You can work the question out without it; it is there in case you are stuck.

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    source = '"sdpo_nb @ git+https://github.com/sdpo-nb/sdpo_nb@v0.1.0"'
    get_ipython().run_line_magic("pip", f"install -q {source}")
again = "Choose Runtime > Disconnect and delete runtime, then run this cell again."
assert importlib.util.find_spec("sdpo_nb"), f"pip could not install sdpo_nb, see above. {again}"

import sdpo_nb
version = sdpo_nb.__version__
assert version == "0.1.0", f"This assignment is made for sdpo_nb 0.1.0, and {version} is installed. {again}"

import math, random, tempfile
from functools import cache

import pandas as pd
import torch
import torch.nn.functional as F

from sdpo_nb.checks import check_certificate, check_experiment, check_first_loss, check_stepwise
from sdpo_nb.checks import difference_interval, report
from sdpo_nb.course import try_check
from sdpo_nb.evaluate import response_kl
from sdpo_nb.stepwise import StepwiseConfig, sdpo
from sdpo_nb.world import load_base, load_world, true_rewards


# %% [markdown]
# ## Question 1. The loop (5 points)
#
# Write $D_1, \dots, D_T$ for the chunks of data, and $M_0 = S$ for the base model. Stage $t$ starts at $M_{t-1}$, is measured against $M_{t-1}$, and ends as $M_t$:
#
# $$M_t:\quad \text{train on } -\log\sigma\big(\beta\,(\gamma_\theta - \gamma_{M_{t-1}})\big) \text{ over } D_t, \qquad \theta \text{ starting at } M_{t-1}.$$
#
# Here $\gamma = \log\pi(y_w|x) - \log\pi(y_l|x)$ is how much likelier a model finds the chosen answer than the rejected one, in *nats*, the unit of the natural logarithm: $\gamma_\theta$ that of the model in training, $\gamma_{M_{t-1}}$ that of its reference. You get three functions. `score(model, chunk)` returns a table: what this model says about the pairs of this chunk, now. `train(model, chunk, table)` trains the model, in place, against the table as its reference, and returns nothing. `copy(model)` returns a copy. $S$ itself must stay as it is.
#
# *By hand*, for $T = 2$: a copy of $S$ scores $D_1$; it is trained on $D_1$ against this table and is now $M_1$; $M_1$ scores $D_2$; it is trained on $D_2$ against that table and is now $M_2$. That is 2 calls of `score`, 2 of `train`, 1 of `copy`.

# %%
def stepwise(
    S,      # the base model; must not be changed
    chunks, # list of T chunks, in the order of training
    score,  # (model, chunk) -> table of log-probabilities
    train,  # (model, chunk, table): trains the model in place
    copy,   # (model) -> another model with the same weights
):          # -> M_T, the model after the last stage
    "Stepwise DPO: the model that one stage leaves behind is the reference of the next."
    ### BEGIN SOLUTION
    model = copy(S)
    for chunk in chunks:
        reference = score(model, chunk)
        train(model, chunk, reference)
    return model
    ### END SOLUTION


# %%
#| question q1 5 check_stepwise stepwise
try_check(check_stepwise, stepwise)


# %% [markdown]
# ## Question 2. What a loss guarantees (3 points)
#
# A stage ended with the mean loss $L$ over some pairs. How much does the policy prefer the chosen answers at least? The loss is convex in $\gamma_\theta$, so by Jensen's inequality $L \ge \log(1 + e^{-\beta(\bar\gamma_\theta - \bar\gamma_{ref})})$, where a bar is a mean over the pairs (chapter 03 solves it; try it first without). Solve it for $\bar\gamma_\theta$:
#
# $$\bar\gamma_\theta \;\ge\; \bar\gamma_{ref} - \frac1\beta \log\big(e^{L} - 1\big).$$
#
# Return the right side. Mind large losses: $e^{5000}$ is too large for a computer, but the answer is not. ($\log(e^L - 1) = L + \log(1 - e^{-L})$.)
#
# *By hand.* $L = 0.5$, $\bar\gamma_{ref} = 2$, $\beta = 0.1$: $e^{0.5} - 1 = 0.649$, its logarithm is $-0.433$, so the bound is $2 + 4.33 = 6.33$ nats.

# %%
def certificate(
    loss,           # float: mean loss over some pairs, > 0
    mean_gamma_ref, # float: mean gamma of the reference over the same pairs, nats
    beta,           # float > 0, per nat
):                  # -> float: lower bound of the mean gamma of the policy, nats
    "What a mean loss guarantees."
    ### BEGIN SOLUTION
    log_of_difference = loss + math.log(-math.expm1(-loss))
    return mean_gamma_ref - log_of_difference / beta
    ### END SOLUTION


# %%
#| teacher
assert round(certificate(0.5, 2., 0.1), 2) == 6.33

# %%
#| question q2 3 check_certificate certificate
try_check(check_certificate, certificate)


# %% [markdown]
# ## Question 3. The first line of the log (3 points)
#
# In stepwise DPO a stage starts as its own reference, so its first loss is $\ln 2$. Other designs start elsewhere: from $S$ against $M_{t-1}$, or from $M_{t-1}$ against $S$. Then the first loss is another number, and whoever knows it sees in one step whether the right table was loaded.
# It is the mean over pairs of $-\log\sigma\big(\beta(\gamma_{start} - \gamma_{ref})\big)$.
#
# *By hand.* Two pairs, $\gamma_{start} = (1, 3)$, $\gamma_{ref} = (1, 1)$, $\beta = 0.5$. The losses are $0.693$ and $-\log\sigma(1) = 0.313$, their mean is $0.503$. (The loss of the mean gain, $-\log\sigma(0.5) = 0.474$, is another number.)

# %%
def first_loss(
    gamma_start, # (n,) gamma of the model where training starts, nats
    gamma_ref,   # (n,) gamma of the reference, nats
    beta,        # float > 0, per nat
):               # -> float: the mean loss before the first step
    "The loss in the first line of the log."
    ### BEGIN SOLUTION
    gain = gamma_start - gamma_ref
    return -F.logsigmoid(beta * gain).mean().item()
    ### END SOLUTION


# %%
#| teacher
assert round(first_loss(torch.tensor([1., 3.]), torch.tensor([1., 1.]), 0.5), 3) == 0.503

# %%
#| question q3 3 check_first_loss first_loss
try_check(check_first_loss, first_loss)

# %% [markdown]
# ## Question 4. A fair comparison (4 points)
#
# Is stepwise DPO better than DPO? You are given `measure(method, beta, stages, seed, split)`. It trains a model of the tiny world, if need be, lets it answer all prompts of a split (`"validation"` or `"test"`), and returns a list: the true reward of each answer, between 0 and 1. For the base model call it with `method="S"`, `beta=nan`, `stages=0`.
# Write `experiment(measure)`, which returns a data frame with one run a row and these columns:
#
# `method` ("S", "DPO", "sDPO"), `beta`, `stages` (0 for S, 1 for DPO, 3 for sDPO), `seed`, `picked_on` (the split on which $\beta$ was chosen), `rewards` (the list, on *test* prompts), `low` and `high`.
#
# - Choose $\beta$ from `BETAS`: the one with the highest mean reward of DPO with seed 0 on *validation* prompts. Whoever chooses on test prompts has used them up.
# - For each of the seeds 0 and 1 there are four runs: S, DPO at $\beta$, sDPO at $\beta$ with $T = 3$ stages, and DPO at $\beta/T$. The last one is what most comparisons lack: stages that add up are like a smaller $\beta$, and a smaller $\beta$ can be had without stages. (By equation (3) of chapter 03 the best policy is $S\, e^{kr/\beta}/Z$, where $kr$ is the reward that the labels reveal. If each of $T$ stages learns the same $kr$ against the one before it, the factors multiply to $e^{Tkr/\beta}$: that of one stage at $\beta/T$.)
# - `low` and `high` are the 95 % interval of the mean difference to S with the same seed. Both models answered the same prompts, so take differences prompt by prompt: with $d_i$ the differences, $\bar d$ their mean and $s$ their standard deviation (divided by $n - 1$), it is $\bar d \pm 1.96\, s/\sqrt n$. For S itself write 0 and 0.
#
# *By hand.* Rewards $(0.5, 0.9, 0.7, 0.3)$ against $(0.4, 0.7, 0.7, 0.1)$: differences $(0.1, 0.2, 0, 0.2)$, $\bar d = 0.125$, $s = 0.096$, and the interval runs from $0.031$ to $0.219$.
#
# To write and check your function you need no training: `pretend` makes rewards up, in no time. Nothing about them is true.

# %%
BETAS = [0.3, 0.9]
T = 3

def pretend(method, beta, stages, seed, split):
    "Made-up rewards of 40 prompts; they are good for trying the code, and for nothing else."
    luck = random.Random(f"{method} {beta} {stages} {seed} {split}")
    hard = random.Random(f"{seed} {split}")
    return [0.7 * hard.random() + 0.3 * luck.random() for _ in range(40)]

def experiment(
    measure=pretend, # (method, beta, stages, seed, split) -> list of rewards, one a prompt
):                   # -> pandas.DataFrame: one run a row
    "DPO and stepwise DPO, compared fairly."
    ### BEGIN SOLUTION
    def mean(values): return sum(values) / len(values)
    def on_validation(beta): return mean(measure("DPO", beta, 1, 0, "validation"))
    best = max(BETAS, key=on_validation)
    methods = [("S", math.nan, 0), ("DPO", best, 1), ("sDPO", best, T), ("DPO", best / T, 1)]

    rows = []
    for seed in (0, 1):
        for method, beta, stages in methods:
            rewards = measure(method, beta, stages, seed, "test")
            if method == "S": base = rewards
            differences = torch.tensor(rewards) - torch.tensor(base)
            half = 1.96 * differences.std().item() / math.sqrt(len(rewards))
            middle = differences.mean().item()
            rows.append(dict(
                method=method, beta=beta, stages=stages, seed=seed, picked_on="validation",
                rewards=rewards, low=middle - half, high=middle + half,
            ))
    return pd.DataFrame(rows)
    ### END SOLUTION


# %%
#| question q4 4 check_experiment experiment
try_check(check_experiment, experiment)

# %% [markdown]
# ### The real thing
#
# Now for real: about seven trainings, some three minutes on a CPU. Each makes one pass over its pairs; the demo makes three. You need not change this cell. Run it when your function has passed the check. The table shows, beside the mean reward, how far each model has moved from S (its KL, in nats a response). Its intervals are against S. To compare two trained models with each other, take *their* difference, prompt by prompt: that is the second table.

# %%
#| slow
world = load_world()
S, tokenizer = load_base(world)

@cache
def trained(method, beta, stages, seed):
    "A model of the tiny world; the same question twice trains once."
    if method == "S": return S
    settings = StepwiseConfig(
        beta=beta, chunks=stages, seed=seed, lr=1e-4, max_length=64, precision="fp32", device="cpu")
    return sdpo(world.base, world.sources, settings, tempfile.mkdtemp()).model

def measure(method, beta, stages, seed, split):
    model = trained(method, beta, stages, seed)
    return true_rewards(model, tokenizer, getattr(world, split), seed=seed)

def with_kl(runs):
    "The table, with mean reward and KL in the place of single rewards."
    table = runs.drop(columns=["rewards", "picked_on"])
    table["reward"] = [sum(rewards) / len(rewards) for rewards in runs["rewards"]]
    models = [trained(*row) for row in runs[["method", "beta", "stages", "seed"]].itertuples(index=False)]
    table["KL"] = [response_kl(model, S, tokenizer, world.test).mean().item() for model in models]
    return table.round(3)

runs = experiment(measure)
with_kl(runs) if isinstance(runs, pd.DataFrame) else "experiment returns nothing yet"


# %%
#| slow
def sdpo_minus(others, runs):
    "Mean difference of sDPO and the other run of the same seed, with its paired interval."
    stepwise = runs[runs["method"] == "sDPO"]
    pairs = stepwise.merge(others, on="seed", suffixes=("", "_other"))
    found = []
    for run in pairs.itertuples():
        low, high = difference_interval(run.rewards, run.rewards_other)
        found.append(dict(seed=run.seed, against=f"DPO at {run.beta_other:.2g}", mean=(low + high) / 2, low=low, high=high))
    return pd.DataFrame(found)

def paired(runs): return sdpo_minus(runs[runs["method"] == "DPO"], runs).round(3)
paired(runs) if isinstance(runs, pd.DataFrame) else "experiment returns nothing yet"

# %% [markdown]
# <!-- question q5 5 manual -->
# ## Question 5. In words (5 points)
#
# Look at your two tables. (a) At the same $\beta$, is sDPO better than DPO here? By how much, and how sure is it? (b) And against DPO at $\beta/T$? (c) Compare the KL of the three: which runs have moved equally far, and what is left of the difference, if any? (d) So does the *moving reference* help here, or something
# else, or nothing that these runs can show? (e) What does one tiny world with two seeds show about a model of seven billion parameters, and which run would you make next? At most 200 words. If you could not run the training, say what you would expect from chapter 03, and why.
#
# *Your answer. Double-click this cell and write here, not in a new cell. Keep the line `<!-- question q5 ... -->` at its top.*
#
# ### BEGIN SOLUTION
# In one run of this notebook: $\beta = 0.3$ was picked. Mean reward 0.620 and 0.627 for S; 0.825 and 0.826 for DPO; 0.818 and 0.828 for sDPO; 0.831 and 0.821 for DPO at $\beta/T$. KL 0.60 and 0.78 for DPO, 1.07 and 0.76 for sDPO, 0.87 and 1.15 for DPO at $\beta/T$.
#
# (a) No: the paired difference of sDPO and DPO is $-0.007$ $[-0.023, +0.009]$ with one seed and $+0.003$ $[-0.013, +0.018]$ with the other. Both intervals contain 0. (The intervals of the first table are against S and say nothing about this.) (b) No: $-0.013$ and $+0.007$; read their intervals in the same way. (c) The KLs of one method differ between seeds as much as between methods, so no two methods can be told apart by how far they went; rewards are equal at KLs from 0.6 to 1.15. (d) These runs show no effect of the moving
# reference: all three trained models are 0.2 above S, and equal to each other. (e) Nothing: another size, other data, other labels. Even here, three passes in place of one change the answer: in the demo sDPO is clearly worse at $\beta = 0.3$. Next: more seeds and worlds, several $\beta$ for each method, then the same table for a real model with its own held-out pairs.
#
# Without the training: chapter 03 says that $T$ stages at $\beta$ may be worth one at $\beta/T$. So expect sDPO to go farther from S than DPO at the same $\beta$, about as far as DPO at $\beta/T$, and no difference to the latter in reward; which of them is better at equal KL only runs can tell.
#
# *Marking:* one point for each part. The numbers differ a little between machines; what counts is that they are read rightly.
# ### END SOLUTION

# %% [markdown]
# ## Hand in
#
# The last cell calls every check once more and adds up. Run it, then *File > Download > Download .ipynb*, and hand in this file. The grader runs your functions with new numbers, so there is no need to keep the outputs. Question 5 is marked by a person, so its points are not in the sum yet.

# %%
report(globals())
