# %% [markdown]
# # Did it work?
# > Answers to read, held-out pairs, true reward, distance from S, win rate and signs of failure, with intervals.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/08_evaluate.ipynb)
#
# **You should know** what [gamma](02_logprobs.ipynb) is, what $\beta$ and the [DPO loss](03_loss.ipynb) are, and how [one stage](06_trainer.ipynb) is trained.
#
# **Time** 95 minutes to read, about a minute to run on two CPU cores.
#
# A falling loss says that training went on. It does not say that the model became *better*. That question has no single answer. A model may rank
# pairs rightly that it never saw. It may answer rightly. It may answer rightly, but only after moving far away from where it began.
#
# This chapter asks five questions of two models, and asks both the same prompts:
#
# 1. What do they answer?
# 2. Do they rank pairs rightly that were not trained on?
# 3. Are their answers right?
# 4. How far has the second one moved, and was the distance worth it?
# 5. Which answer would a judge prefer?
#
# Means come with an interval that says how sure they are. The chapter ends with the warnings that a run's report prints.

# %%
#| default_exp evaluate

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
#| export
import math
from contextlib import contextmanager

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from torch import Tensor
from transformers import GenerationConfig

from sdpo_nb.logprobs import LogprobTable, autocast, gamma
from sdpo_nb.loss import dpo_loss, reward_accuracy
from sdpo_nb.partition import mean_interval, wilson
from sdpo_nb.world import K, answer, prompt_ids, respond, respond_ids, text_of, true_reward

# %%
import tempfile
from importlib.resources import files
from sdpo_nb.logprobs import load_model, load_tokenizer, score_pairs
from sdpo_nb.packing import packed_logprobs
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.trainer import TrainConfig, train_stage
from sdpo_nb.world import complaint, load_world, score_responses, true_rewards
torch.set_num_threads(1);

# %% [markdown]
# We need two models to compare. S is the base model of the [tiny world](00_world.ipynb): it was fine-tuned on demonstrations, and nothing else. M is S after one stage
# of DPO on preference pairs, each a prompt with a *chosen* and a *rejected* response. The last 100 pairs of every source are *held out*: M is not trained on them.

# %%
w = load_world()
S, tok = load_model(w.base, "cpu"), load_tokenizer(w.base)

train, held = [], {}
for name, file in w.sources.items():
    pairs = list(tokenize_pairs(load_pairs(file), tok, name).pairs)
    train += pairs[:-100]
    held[name] = pairs[-100:]

# %%
M = load_model(w.base, "cpu")
table = score_pairs(M, train, logprobs=packed_logprobs, token_budget=16384)
config = TrainConfig(beta=0.3, lr=3e-4, precision="fp32")
train_stage(M, train, table, config, tempfile.mkdtemp());


# %% [markdown]
# ## What do they answer?
#
# Read before you count. A number can hide what one look at the texts would show: answers that break off, repeat themselves, or change the subject.
# So every report shows some answers. We take the *greedy* answer, the likeliest token each time, because it involves no luck. Prompts go through the model one by one, so nothing has
# to be padded.

# %%
#| export
@contextmanager
def generating(
    model,          # a causal language model
    precision: str, # fp32, bf16 or fp16, as in chapter 02
    **how,          # of a GenerationConfig
):
    "`model.generate` does as it is told, whatever the model's own settings of generation. The model stays as it was."
    was_training, own = model.training, model.generation_config
    model.generation_config = GenerationConfig(**how)       # or its own would fill in what `how` leaves open
    model.eval()
    try:
        with torch.no_grad(), autocast(model.device, precision): yield
    finally:
        model.train(was_training)
        model.generation_config = own

def end_tokens(
    model,     # a causal language model
    tokenizer, # its tokenizer
) -> list:     # of token ids, sorted
    "Where an answer ends: the tokenizer's end token, and those of the model's own settings."
    also = model.generation_config.eos_token_id             # none, one or several
    also = also if isinstance(also, list) else [also]
    return sorted({tokenizer.eos_token_id, *also} - {None})

def greedy_answers(
    model,                 # a causal language model
    tokenizer,             # its tokenizer
    prompts: list,         # of token ids, one list per prompt, up to where the answer begins
    max_new: int=64,       # longest answer, in tokens
    precision: str="fp32", # fp32, bf16 or fp16, as in chapter 02
) -> list[str]:            # one answer per prompt, without special tokens
    "The greedy answer to each prompt."
    how = dict(
        do_sample=False,
        max_new_tokens=max_new,
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.eos_token_id,
    )
    answers = []
    with generating(model, precision, **how):
        for ids in prompts:
            row = torch.tensor([ids], device=model.device)
            out = model.generate(input_ids=row, attention_mask=torch.ones_like(row))
            new = out[0, len(ids):]
            answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


# %%
asked = w.test[:4]
asked_ids = [prompt_ids(tok, p) for p in asked]
answers = pd.DataFrame({
    "S": greedy_answers(S, tok, asked_ids),
    "M": greedy_answers(M, tok, asked_ids),
    "right": [answer(p) for p in asked],
}, index=asked)
assert answers["S"].tolist() == respond(S, tok, asked, tau=0)   # as chapter 00 samples them
answers

# %% [markdown]
# S gets two of four right. M has mended the first one, and has changed the third without getting it right.
#
# Many models come with settings of their own for generation: Qwen2.5 has a penalty on words that were said before, others search with several beams. `generate` takes them wherever we say nothing else, and the answer is no longer the likeliest token each time. So they are put aside for the call.

# %%
S.generation_config.no_repeat_ngram_size = 1               # no token twice
assert greedy_answers(S, tok, asked_ids) == answers["S"].tolist()
assert S.generation_config.no_repeat_ngram_size == 1
S.generation_config.no_repeat_ngram_size = 0

# %% [markdown]
# An answer that is not finished after `max_new` tokens is cut, and nothing marks the place. Give real models enough room.

# %%
cut = greedy_answers(M, tok, asked_ids, max_new=2)
assert all(len(y) == 2 for y in cut)
cut


# %% [markdown]
# Which prompts should a page show? If the author picks them, they prove nothing. So they are picked by a rule: of each skill of the tiny world, the first prompt that S gets wrong; then the first that S gets right and the aligned model gets wrong.

# %%
#| export
def answers_beside(
    S,             # the model that training began with
    model,         # the aligned one
    tokenizer,     # of both
    prompts: list, # of the tiny world, as text
) -> pd.DataFrame: # prompt: the index; S says, aligned, right
    "Greedy answers of two models, on few prompts that a rule picks: what was mended and what was spoilt."
    said = {
        "S says": respond(S, tokenizer, prompts, tau=0),
        "aligned": respond(model, tokenizer, prompts, tau=0),
    }
    answers = pd.DataFrame(said, index=pd.Index(prompts, name="prompt"))
    answers["right"] = [answer(p) for p in prompts]
    was_right = answers["S says"] == answers["right"]
    is_right = answers["aligned"] == answers["right"]

    skills = pd.Series(prompts, index=answers.index).str.split().str[0]
    wrong = answers[~was_right]
    first_of_each = wrong[~skills[~was_right].duplicated()]
    spoilt = answers[was_right & ~is_right].head(1)
    return pd.concat([first_of_each, spoilt])


# %%
answers_beside(S, M, tok, w.test)


# %% [markdown]
# ## Better, or lucky?
#
# Four answers prove nothing. With 200 prompts we get a mean, and the next question is how much that mean would change with other prompts. We cannot ask
# new prompts every time, but we can act as if: draw 200 of our 200 numbers with replacement, so that some come twice and some not at all, and take the mean. Do this two thousand times
# and look how much the means vary. This is the *bootstrap*. It does not ask for a normal distribution.
#
# Experiments often have levels: several worlds, in each several training runs, and in each the same prompts. Then we draw on every level: worlds first, then
# runs, then prompts. Otherwise 600 prompts of one lucky run would count as 600 runs.

# %%
#| export
def bootstrap(
    values,          # (n,) numbers; or (worlds, seeds, prompts), where seeds share the prompts
    draws: int=2000, # how many means
    seed: int=0,     # of the draws
) -> np.ndarray:     # (draws,)
    """Means of values drawn anew on every level.
    Raises ValueError where there is nothing to draw from, or a number is missing."""
    v = np.asarray(values, "float64")
    missing = np.sum(~np.isfinite(v))
    if not v.size or missing or v.ndim not in (1, 3):
        raise ValueError("bootstrap: needs finite numbers, (n,) or (worlds, seeds, prompts); "
                         f"got shape {v.shape}, {missing} not finite")
    if v.ndim == 1: v = v[None, None]                 # one world, one seed
    W, R, P = v.shape
    g = np.random.default_rng(seed)
    means = []
    for _ in range(draws):
        worlds = g.integers(W, size=(W, 1, 1))
        seeds = g.integers(R, size=(W, R, 1))         # anew in each world
        prompts = g.integers(P, size=(W, 1, P))       # the same for all seeds of a world
        means.append(v[worlds, seeds, prompts].mean())
    return np.array(means)


# %% [markdown]
# Four numbers with the mean 0.75, drawn again five times. A missing number would make every mean worthless, so it is refused.

# %%
print(complaint(bootstrap, [0, 1, math.nan]))
bootstrap([0, 1, 1, 1], draws=5)


# %% [markdown]
# The interval leaves out the lowest and the highest 2.5 % of the means. What remains is the 95 % percentile interval.

# %%
#| export
def interval(
    values,          # as `bootstrap` takes them
    draws: int=2000, # of the bootstrap
    seed: int=0,     # of the draws
) -> tuple[float, float, float]: # mean, low, high
    """Mean of values and its 95 % percentile interval; of one number, no interval (NaN).
    Raises ValueError as `bootstrap` does."""
    v = np.asarray(values, "float64")
    means = bootstrap(v, draws, seed)
    low, high = np.quantile(means, [0.025, 0.975]).tolist() if v.size > 1 else (math.nan, math.nan)
    return float(v.mean()), low, high

def as_text(
    cell: tuple, # mean, low, high
    digits: str=".3f", # as a format says it; "+.2f" shows the sign and two digits
) -> str:
    "mean [low, high]"
    mean, low, high = (format(number, digits) for number in cell)
    return f"{mean} [{low}, {high}]"


# %%
as_text(interval([0, 1, 1, 1])), as_text(interval([0.75]), "+.2f")

# %% [markdown]
# ### Ask both models the same prompts
#
# Some prompts are hard for every model. If both models answer *the same* prompts, this drops out of their difference: subtract prompt by prompt, and what
# counts is how much the differences scatter, not how much the rewards do. Such a comparison is called *paired*.
#
# We take the true reward of one sampled answer to each of 200 test prompts, with the same random numbers for both models. Before you look: which interval of the difference is
# narrower, the paired one, or the one computed as if each model had been asked prompts of its own?

# %%
prompts = w.test[:200]
reward_S = np.array(true_rewards(S, tok, prompts))
reward_M = np.array(true_rewards(M, tok, prompts))

gain = reward_M.mean() - reward_S.mean()
half = 1.96 * math.sqrt((reward_M.var() + reward_S.var()) / len(prompts))
unpaired = (gain, gain - half, gain + half)
paired = interval(reward_M - reward_S)

# %%
widths = pd.DataFrame({
    "S": interval(reward_S),
    "M": interval(reward_M),
    "M - S, as if on other prompts": unpaired,
    "M - S, paired": paired,
}, index=["mean", "low", "high"]).T
assert paired[1] > 0
assert np.ptp(paired[1:]) < np.ptp(unpaired[1:])
widths.round(3)


# %% [markdown]
# The paired one. M is better than S by 0.19, and its interval is well above 0.
#
# These intervals are about prompts. They say what other prompts would have shown of *this* S and *this* M. They say nothing about another training run.
#
# ### Does the interval keep its promise?
#
# An interval is a promise about repetition: of a hundred such intervals, about 95 should hold the truth. We can try this, because we can make data whose mean we know. We try
# three cases: sixty numbers from a skewed distribution; five worlds with four runs each, where the worlds differ more than the runs do; and the same five worlds, treated as if
# all 600 numbers were independent.

# %%
def skewed(g): return g.exponential(size=60)        # true mean 1

def five_worlds(g):                                 # true mean 0
    worlds = g.normal(0, 0.1, (5, 1, 1))
    runs = g.normal(0, 0.05, (5, 4, 1))
    prompts = g.normal(0, 0.3, (5, 1, 30))
    noise = g.normal(0, 0.1, (5, 4, 30))
    return worlds + runs + prompts + noise

def flat(g): return five_worlds(g).ravel()          # the same, without its levels

def covers(make, truth, tries=200):
    "How often the interval of new data holds the truth."
    hits = []
    for i in range(tries):
        data = make(np.random.default_rng(i))
        _, low, high = interval(data, draws=300, seed=i)
        hits.append(low <= truth <= high)
    return np.mean(hits)


# %%
coverage = pd.Series({
    "60 skewed numbers": covers(skewed, 1),
    "five worlds, drawn on every level": covers(five_worlds, 0),
    "five worlds, taken for 600 numbers": covers(flat, 0),
}, name="holds the truth")
assert coverage.iloc[0] > 0.9
assert 0.85 < coverage.iloc[1] < 0.97
assert coverage.iloc[2] < 0.7
coverage.map("{:.1%}".format).to_frame()


# %% [markdown]
# The last row is the error to avoid: those intervals are far too narrow. The other two are a few points short of 95, because sixty skewed numbers, and five worlds, are little to draw from.
#
# One case is worse. If all values are alike, say 20 of 20 answers are right, every draw gives the same mean, and the interval has no width. For shares
# we therefore use [Wilson's interval](05_partition.ipynb), which stays honest there. Ties count one half. Where there are many of them, it is wider than it need be.

# %%
#| export
def _share(right): # n numbers from 0 to 1
    "Their mean and Wilson's interval."
    p = right.mean().item()
    return p, *wilson(p, len(right))


# %%
all_right = np.ones(20)
assert interval(all_right) == (1, 1, 1)
{"bootstrap": as_text(interval(all_right)), "Wilson": as_text(_share(all_right))}


# %% [markdown]
# ## Do they rank pairs that were not trained on?
#
# The cheapest question needs no answers from the model. It needs only log-probabilities of the held-out pairs. For each pair, $\gamma$ is the log-probability of the chosen response
# minus that of the rejected one, in nats. Where $\gamma > 0$, the model finds the chosen response more likely.
#
# `held_out` reads two [tables of log-probabilities](02_logprobs.ipynb), one of the model and one of the model it is compared with, and returns seven means:
#
# - **gamma** and **prefers chosen** (the share of pairs with $\gamma>0$) ask the model alone.
# - **loss** and **reward accuracy** (the share of pairs whose $\gamma$ grew, ties count one half) compare it with the other model, pair by pair.
# - **change of gamma** says by how much $\gamma$ grew. It is the **log-ratio of chosen** minus the **log-ratio of rejected**: did the chosen response become likelier, or did
#   only the rejected one become less likely? A log-ratio is the log-probability now minus the one before.
#
# For means of independent pairs there is a formula, Student's (`mean_interval`), and for shares there is Wilson's. So nothing has to be drawn here.

# %%
#| export
def held_out(
    now: LogprobTable,    # of the model that is asked
    before: LogprobTable, # of the model that it is compared with
    pairs,                # n tokenized pairs; both tables have a row for each
    beta: float,          # of the DPO loss, above 0
    tokens: Tensor=None,  # (n, 2) of the chosen and of the rejected responses; None: nothing per token
) -> dict:                # name -> (mean, low, high)
    """What a model says about pairs, and what changed against another model, pair by pair; 95 % intervals.
    A loss cannot be negative, and neither can the lower end of its interval."""
    chosen, rejected = now.lookup(pairs)
    chosen_0, rejected_0 = before.lookup(pairs)
    g, g_0 = gamma(chosen, rejected), gamma(chosen_0, rejected_0)
    loss, low, high = mean_interval(dpo_loss(g, g_0, beta))

    per_token = {}
    if tokens is not None:
        chosen_tokens, rejected_tokens = tokens.to(g).T
        per_token["gamma per token"] = mean_interval(chosen / chosen_tokens - rejected / rejected_tokens)

    return {
        "gamma": mean_interval(g),
        "prefers chosen": _share(reward_accuracy(g)),
        **per_token,
        "loss": (loss, max(low, 0.0), high),
        "reward accuracy": _share(reward_accuracy(g, g_0)),
        "change of gamma": mean_interval(g - g_0),
        "log-ratio of chosen": mean_interval(chosen - chosen_0),
        "log-ratio of rejected": mean_interval(rejected - rejected_0),
    }


# %%
all_held = sum(held.values(), [])
tables = {
    "S": score_pairs(S, all_held, logprobs=packed_logprobs),
    "M": score_pairs(M, all_held, logprobs=packed_logprobs),
}
measured = {}
for source, pairs in held.items():
    for name, table in tables.items():
        measured[source, name] = held_out(table, tables["S"], pairs, beta=0.3)
by_source = pd.DataFrame(measured, dtype=object).T

# %% [markdown]
# First the two numbers that ask one model alone.

# %%
of_S, of_M = by_source.xs("S", level=1), by_source.xs("M", level=1)
assert (of_M["prefers chosen"] > of_S["prefers chosen"]).all()
by_source[["gamma", "prefers chosen"]].map(as_text)

# %% [markdown]
# On every source M agrees with more labels of pairs it has not seen than S does. The gain is largest on the hard source, `riddle`: from 0.48 to 0.73.
#
# A sum over many tokens is lower than one over few, whatever the texts say ([chapter 05](05_partition.ipynb) shows how far this goes). So real pairs want **gamma per token**, too: each log-probability divided by the tokens of its response. `held_out` needs their numbers for it.

# %%
riddle = held["riddle"]
lengths = torch.tensor([[len(p["chosen_ids"]), len(p["rejected_ids"])] for p in riddle])
of_both = {name: held_out(table, tables["S"], riddle, 0.3, lengths) for name, table in tables.items()}
shown = pd.DataFrame(of_both, dtype=object).T[["gamma", "gamma per token"]]
assert shown.loc["M", "gamma per token"][0] > shown.loc["S", "gamma per token"][0]
shown.map(as_text)

# %% [markdown]
# Here the responses of a pair are nearly always equally long, and the two columns tell the same.
#
# Now what has changed since S. What must stand in the rows of S, which is compared with itself?

# %%
assert all(v[0] == 0.5 for v in of_S["reward accuracy"])     # nothing changed: all ties, one half
assert all(v[1] > 0 for v in of_M["change of gamma"])
by_source[["loss", "reward accuracy", "change of gamma"]].map(as_text)

# %% [markdown]
# S against itself has a reward accuracy of 0.5 and a loss of $\ln 2 \approx 0.693$, by definition. Do not confuse the two accuracies: *prefers chosen* asks whether the model ranks a pair rightly, *reward
# accuracy* asks whether training moved it in the right direction.
#
# And the two halves of the change:

# %%
assert all(v[2] < 0 for v in of_M["log-ratio of chosen"])
by_source[["log-ratio of chosen", "log-ratio of rejected"]].map(as_text)


# %% [markdown]
# Both halves are negative. The chosen responses became less likely, too; the rejected ones lost more. [Chapter 07](07_figures.ipynb) has the picture of this, and what it means.
#
# And how many pairs does one need? Here are the first 2, 6 and 20 of the held-out pairs of `riddle`, and all 100.

# %%
def first(n): return held_out(tables["M"], tables["S"], held["riddle"][:n], beta=0.3)

few = pd.DataFrame({n: first(n) for n in (2, 6, 20, 100)}, dtype=object).T.rename_axis("pairs")
assert few.loc[2, "loss"][1] == 0
assert few.loc[2, "change of gamma"][1] < 0 < few.loc[100, "change of gamma"][1]
few[["gamma", "change of gamma", "loss"]].map(as_text)

# %% [markdown]
# With two pairs, Student's factor is 12.7 instead of 1.96, and the interval says nothing. The formula knows no bounds: it would reach below zero for the loss, which cannot be negative, so its lower end is cut there. A report says so where
# a source holds out fewer than 20 pairs.
#
# ## Are the answers right?
#
# In the tiny world every answer has a true reward, 1 for the right one. `score_responses` of [chapter 00](00_world.ipynb) keeps one row per prompt, so any two models can be paired. We look at the share of exact answers,
# by skill, for *sampled* answers (temperature 1) and for greedy ones.

# %%
scores = {}
for name, model in (("S", S), ("M", M)):
    scores[name, "sampled"] = score_responses(model, tok, prompts, tau=1.)
    scores[name, "greedy"] = score_responses(model, tok, prompts, tau=0.)
assert scores["S", "sampled"]["reward"].tolist() == reward_S.tolist()    # the same luck, the same answers

# %%
skills = {}
for key, rows in scores.items():
    skills[key] = rows.groupby("skill")["exact"].apply(_share)
assert scores["M", "sampled"]["exact"].mean() > scores["S", "sampled"]["exact"].mean()
pd.DataFrame(skills).map(as_text)


# %% [markdown]
# Which skills are better? Whether two intervals overlap does not say it: both models answered the same prompts. So once more prompt by prompt:

# %%
def gains(how):
    "M minus S, share of exact answers, skill by skill."
    before, after = scores["S", how], scores["M", how]
    difference = after["exact"].astype(float) - before["exact"]
    return difference.groupby(before["skill"]).apply(interval)

better = pd.DataFrame({how: gains(how) for how in ("sampled", "greedy")})
low = better.map(lambda cell: cell[1])
assert (low.drop("shift") > 0).all(axis=None)
assert (low.loc["shift"] < 0).all()
better.map(lambda cell: as_text(cell, "+.3f"))


# %% [markdown]
# Copy, reverse and sort are clearly better, sampled and greedy. Shift is not shown to be: both of its intervals hold 0, and sampled it is even a little lower. A single mean over all skills would have hidden this.
#
# Sampled and greedy answers tell different things. Where the greedy answer of S is right, a colder temperature alone would make its sampled answers better. Where it is wrong, a colder temperature makes them worse. So
# look at both.

# %% [markdown]
# ## How far from S?
#
# DPO does not aim at reward alone. The objective behind it pays for reward with distance from S ([chapter 03](03_loss.ipynb)). The distance of a model $\pi$ is the *Kullback-Leibler divergence*, KL: the mean, over responses that $\pi$ samples,
# of how much more likely they are under $\pi$ than under S. It is 0 where both agree, and it is measured in nats.
#
# Along a sampled response the KL is a sum over tokens. At each token we know the whole vocabulary under both models, so the inner mean need not be sampled:
#
# $$\mathrm{KL}(\pi\,\|\,S) = \mathbb{E}_{y\sim\pi} \sum_t \sum_v \pi(v\,|\,x,y_{<t}) \log\frac{\pi(v\,|\,x,y_{<t})}{S(v\,|\,x,y_{<t})}. \tag{1}$$
#
# Here $x$ is the prompt, $y$ the response, $y_{<t}$ the tokens before place $t$, $v$ any token of the vocabulary, and $\mathbb{E}_{y\sim\pi}$ the mean over responses of $\pi$.
#
# First we need what a model says at each token of a response.

# %%
#| export
def _next_tokens(model, prompts, responses, tau=1.):
    """At each place of a response: log-probabilities of the vocabulary (n, L, V) in float64,
    the token that came (n, L), and whether the place exists (n, L)."""
    device = model.device
    prompt_length = torch.tensor([len(x) for x in prompts], device=device)[:, None]
    length = torch.tensor([len(y) for y in responses], device=device)[:, None]
    width = int(prompt_length.max() + length.max())
    rows = []
    for x, y in zip(prompts, responses):
        pad = [0] * (width - len(x) - len(y))         # on the right, where a causal model does not look
        rows.append([*x, *y, *pad])
    rows = torch.tensor(rows, device=device)
    place = torch.arange(length.max(), device=device)
    read = prompt_length - 1 + place                  # a token is predicted one place before it
    logits = model(input_ids=rows, use_cache=False).logits.take_along_dim(read[..., None], 1)
    logp = logits.double().div(tau).log_softmax(-1)
    came = rows.gather(1, prompt_length + place)
    return logp, came, place < length

def _logp(model, prompts, responses):
    "Log-probability of each response (n,), in nats and float64."
    logp, came, there = _next_tokens(model, prompts, responses)
    of_tokens = logp.gather(2, came[..., None])[..., 0]
    return (of_tokens * there).sum(1)


# %% [markdown]
# Take the first prompt above, and the greedy answer of M. What do M and S say at each of its tokens, and what does each token add to the KL?

# %%
x = asked_ids[0]
y = respond_ids(M, tok, asked[:1], tau=0)[0]
with torch.no_grad():
    p, came, _ = _next_tokens(M, [x], [y])
    q, _, _ = _next_tokens(S, [x], [y])
    whole = _logp(M, [x], [y])

of_came = came[0, :, None]
by_token = pd.DataFrame({
    "probability under M": p[0].exp().gather(1, of_came)[:, 0],
    "probability under S": q[0].exp().gather(1, of_came)[:, 0],
    "KL (nats)": (p.exp() * (p - q)).sum(-1)[0],
}, index=tok.convert_ids_to_tokens(y))
assert abs(np.log(by_token["probability under M"]).sum() - whole.item()) < 1e-9
by_token.round(3)


# %% [markdown]
# The distance is in the first token. S would begin with another letter; M has learned to begin with the last letter of the string. After the first letter both go on alike. The KL along this response is the sum of the last column.

# %%
#| export
@torch.no_grad()
def kl_along(
    model,           # a causal language model: pi of equation (1)
    base,            # the model it is measured from: S
    tokenizer,       # of both
    prompts: list,   # n texts of user turns, or n lists of ids
    responses: list, # n lists of ids, sampled from the model at tau
    tau: float=1.,   # temperature of the model, above 0; of base it is 1
    batch: int=200,  # responses at a time
) -> Tensor:         # (n,) nats per response
    """KL(model || base) along given responses: equation (1).
    Unbiased for the KL of as many tokens as they may have."""
    ids = [p if isinstance(p, list) else prompt_ids(tokenizer, p) for p in prompts]
    out = []
    for i in range(0, len(prompts), batch):
        xs, ys = ids[i:i+batch], responses[i:i+batch]
        p, _, there = _next_tokens(model, xs, ys, tau)
        q, _, _ = _next_tokens(base, xs, ys)
        at_each_place = (p.exp() * (p - q)).sum(-1)
        out.append((at_each_place * there).sum(1))
    return torch.cat(out).cpu()

def response_kl(
    model,           # as for `kl_along`
    base,            # as for `kl_along`
    tokenizer,       # of both
    prompts: list,   # n texts of user turns
    tau: float=1.,   # temperature of the model, above 0
    seed: int=0,     # of the samples
    max_new: int=8,  # longest response, in tokens
    batch: int=200,  # responses at a time
) -> Tensor:         # (n,) nats per response
    "The same along one sampled response per prompt."
    responses = respond_ids(model, tokenizer, prompts, tau, seed, max_new)
    return kl_along(model, base, tokenizer, prompts, responses, tau, batch)


# %%
along = kl_along(M, S, tok, asked[:1], [y])
assert abs(along.item() - by_token["KL (nats)"].sum()) < 1e-9
assert response_kl(S, S, tok, asked).abs().max() < 1e-9            # no distance from itself
response_kl(M, S, tok, asked).numpy().round(2)


# %% [markdown]
# ### Is (1) right?
#
# Responses of at most two tokens can all be listed. So we can compute the KL from its definition, $\sum_y \pi(y)\log(\pi(y)/S(y))$, and compare. There is also a plainer estimate: the mean
# of $\log\pi(y) - \log S(y)$ over sampled responses. It is right, too. Which of the two scatters more?

# %%
def two_tokens(tok):
    "All responses of at most two tokens: the end token at once, or one other token and anything after it."
    eos = tok.eos_token_id
    responses = [[eos]]
    for first in range(len(tok)):
        if first == eos: continue
        for second in range(len(tok)): responses.append([first, second])
    return responses

@torch.no_grad()
def logp_of(model, x, responses):
    parts = [responses[i:i+500] for i in range(0, len(responses), 500)]
    return torch.cat([_logp(model, [x] * len(part), part) for part in parts])

listed = two_tokens(tok)
x = prompt_ids(tok, prompts[0])
p, q = logp_of(M, x, listed), logp_of(S, x, listed)
assert abs(p.exp().sum() - 1) < 1e-6               # nothing is missing
exact = (p.exp() * (p - q)).sum().item()

# %%
n = 2000
again = [prompts[0]] * n
along = response_kl(M, S, tok, again, max_new=2)   # equation (1)

sampled = respond_ids(M, tok, again, tau=1., seed=0, max_new=2)
ratio = logp_of(M, x, sampled) - logp_of(S, x, sampled)

# %%
kls = pd.DataFrame({
    "all responses listed": [exact, 0.],
    "(1)": [along.mean().item(), along.std().item()],
    "mean log-ratio": [ratio.mean().item(), ratio.std().item()],
}, index=["KL (nats)", "scatter per response"]).T
assert abs(along.mean() - exact) < 4 * along.std() / n**0.5
assert along.std() < ratio.std()
kls.round(4)


# %% [markdown]
# Both agree with the list. The plain estimate scatters thirty times as much, so it would need about a thousand times as many samples.
#
# ## Was the distance worth it?
#
# More reward for more distance is no merit by itself. What counts is the reward compared with the best that could be had for the same distance.
#
# In this world we can compute that best. Among all policies with a given KL from S, the best one is proportional to $S(y|x)\,e^{k\,r(x,y)/\beta}$ ([chapter 03](03_loss.ipynb)). Here $r$ is the true reward, $k = 6$ is the
# scale of the comparisons that labelled the pairs, and each $\beta$ gives one policy: a large $\beta$ stays close to S, a small one goes for the reward.
#
# To compute it, we need the responses of S. For a short prompt most of them can be listed: draw some, add the right answer, and compute the probability of each. What S has outside the list is
# about a seventh, in many rare mistakes. A second draw stands for it: those of its responses that are not in the list share this seventh.

# %%
#| export
def _responses_of(base, tokenizer, prompt, first, second):
    """The responses that stand for all of S, for one prompt: texts, log S (m,), true reward (m,);
    and the share of S outside the list."""
    right = tokenizer(answer(prompt), add_special_tokens=False).input_ids
    listed = {tuple(y) for y in first} | {(*right, tokenizer.eos_token_id)}
    others = [y for y in second if tuple(y) not in listed]
    x = prompt_ids(tokenizer, prompt)
    log_s = _logp(base, [x] * len(listed), list(listed)).cpu()
    unlisted = (1 - log_s.exp().sum()).clamp(min=0)
    of_each = (unlisted / max(1, len(others))).log().expand(len(others))
    log_s = torch.cat([log_s, of_each]).log_softmax(0)
    texts = [text_of(tokenizer, y) for y in [*listed, *others]]
    reward = torch.tensor([true_reward(prompt, y) for y in texts], dtype=torch.float64)
    return texts, log_s, reward, unlisted.item()

def _tilted(log_s, reward, beta):
    "Log-probabilities of the best policy, S exp(k r / beta)."
    return (log_s + K * reward / beta).log_softmax(0)


# %% [markdown]
# One prompt, and its five likeliest responses under S. Watch how a smaller $\beta$ moves probability to the right answer.

# %%
one = prompts[0]
first, second = (respond_ids(S, tok, [one] * 50, tau=1., seed=seed) for seed in (0, 1))
with torch.no_grad():
    texts, log_s, reward, unlisted = _responses_of(S, tok, one, first, second)

policies = pd.DataFrame({"true reward": reward, "S": log_s.exp()}, index=texts)
for beta in (10, 3, 1): policies[f"beta {beta}"] = _tilted(log_s, reward, beta).exp()
best = policies[policies.index == answer(one)].iloc[0]
assert best["S"] < best["beta 10"] < best["beta 3"] < best["beta 1"]
policies.nlargest(5, "S").round(3)


# %% [markdown]
# Now all prompts and many values of $\beta$: one point of the curve for each $\beta$.

# %%
#| export
@torch.no_grad()
def frontier(
    base,              # S
    tokenizer,         # of S
    prompts: list,     # of the tiny world
    betas: list,       # one point of the curve for each, above 0; infinity is S itself
    samples: int=50,   # responses drawn per prompt, for the list and again for the rest
) -> pd.DataFrame:     # beta, reward, kl (nats), unlisted (share of S outside the list)
    "True reward and KL of S exp(k r / beta), as means over prompts of the tiny world."
    firsts = [respond_ids(base, tokenizer, prompts, 1., 2 * s) for s in range(samples)]
    seconds = [respond_ids(base, tokenizer, prompts, 1., 2 * s + 1) for s in range(samples)]
    rows = []
    for i, prompt in enumerate(prompts):
        first, second = [ys[i] for ys in firsts], [ys[i] for ys in seconds]
        _, log_s, reward, unlisted = _responses_of(base, tokenizer, prompt, first, second)
        for beta in betas:
            log_q = _tilted(log_s, reward, beta)
            q = log_q.exp()
            mean_reward = (q * reward).sum().item()
            kl = (q * (log_q - log_s)).sum().item()
            rows.append((beta, mean_reward, kl, unlisted))
    rows = pd.DataFrame(rows, columns=["beta", "reward", "kl", "unlisted"])
    return rows.groupby("beta", as_index=False).mean()


# %%
few = prompts[:60]
betas = [math.inf, 100, 60, 40, 30, 20, 15, 10, 8, 6, 5, 4, 3, 2, 1.5, 1, 0.7, 0.5, 0.3, 0.1]
curve = frontier(S, tok, few, betas)
assert curve["reward"].is_monotonic_decreasing
assert curve["kl"].is_monotonic_decreasing
assert abs(curve["kl"].min()) < 1e-9               # infinite beta: S itself
assert curve["unlisted"].max() < 0.2
curve[::2].round(3)


# %% [markdown]
# The first tenths of a nat are cheap: 0.3 nats buy more than half of what there is to gain. The last hundredths of reward are dear.
#
# How far below this curve is a model? `excess` subtracts the best reward at the model's own KL.

# %%
#| export
def excess(
    reward: float,       # mean true reward of a model
    kl: float,           # its KL from S, nats per response
    curve: pd.DataFrame, # beta, reward, kl: from `frontier`
) -> float:
    """Reward minus what the curve has at this KL, or at its end where that is beyond. Above 0 only by luck,
    of the samples or of the curve's own draws, or where few points make a coarse curve."""
    c = curve.sort_values("kl")
    best = np.interp(kl, c["kl"], c["reward"])
    return reward - float(best)


# %%
spent = response_kl(M, S, tok, few).mean().item()
gained = score_responses(M, tok, few)["reward"].mean()
assert excess(gained, spent, curve) < 0
below = excess(gained, spent, curve)
pd.Series({"KL of M (nats)": spent, "true reward of M": gained, "excess": below}).round(3)


# %%
#| export
def plot_frontier(
    curve: pd.DataFrame,  # beta, reward, kl: from `frontier`
    points: pd.DataFrame, # name, reward, kl: one model a row
    ax=None,              # where to draw; None makes a figure
) -> plt.Figure:
    "True reward against KL: the best policies as a line, models as points."
    ax = ax or plt.subplots(figsize=(5.5, 3.2))[1]
    c = curve.sort_values("kl")
    ax.plot(c["kl"], c["reward"], color="black", lw=1.5)
    x, y = c[["kl", "reward"]].iloc[len(c) * 3 // 4]
    ax.text(x, y, r"best possible, $S\,e^{kr/\beta}$   ", ha="right", va="bottom", fontsize="small")
    sns.scatterplot(points, x="kl", y="reward", hue="name", style="name", s=60, palette="colorblind", ax=ax)
    ax.set_xlabel("KL from S (nats per response)\n←  better")
    ax.set_ylabel("true reward, sampled\nbetter  →")
    ax.legend(frameon=False, fontsize="small")
    sns.despine(ax.figure)
    return ax.figure


# %%
at_0 = curve["reward"].min()                       # the reward of S
two = pd.DataFrame({"name": ["S", "M"], "kl": [0, spent], "reward": [at_0, gained]})
plot_frontier(curve, two);


# %% [markdown]
# The line is what the true reward could buy if it were known for every response. M is what some twelve hundred noisy comparisons bought.
#
# ## Which answer would a judge prefer?
#
# Real tasks have no true reward. There one asks a judge, a person or a model, which of two answers is better. Judges have a favourite position: some prefer whatever they read first. So we show each pair of answers twice, with places changed, and take the mean of both verdicts.
# A judge who only looks at positions then says 0.5. We also report how often the two verdicts contradict each other.

# %%
#| export
def win_rate(
    judge,         # (prompt, first, second) -> 1 the first is better, 0 the second, 0.5 a tie
    prompts: list, # n texts
    ours: list,    # n answers of the model we ask about
    theirs: list,  # n answers of the other
) -> dict:         # wins: (mean, low, high), ties one half; ties, contradicted: shares of prompts
    """How often ours is better, asked in both orders; Wilson's interval, wide where there are many ties.
    Raises ValueError for no prompts, and for a verdict outside [0, 1], naming the prompt."""
    if not len(prompts): raise ValueError("win_rate: no prompts")
    if not len(prompts) == len(ours) == len(theirs):
        raise ValueError(f"win_rate: {len(prompts)} prompts, "
                         f"{len(ours)} of our answers, {len(theirs)} of theirs")

    def verdicts(first, second):
        out = []
        for i, prompt in enumerate(prompts):
            v = float(judge(prompt, first[i], second[i]))
            if not 0 <= v <= 1:
                raise ValueError(f"judge: {v} for prompt {i}, {prompt!r}; "
                                 "a verdict is 1, 0, or 0.5 for a tie")
            out.append(v)
        return np.array(out)

    there = verdicts(ours, theirs)
    back = 1 - verdicts(theirs, ours)
    tie = (there == 0.5) & (back == 0.5)
    return dict(
        wins=_share((there + back) / 2),
        ties=float(tie.mean()),
        contradicted=float((~np.isclose(there, back)).mean()),
    )


# %% [markdown]
# Two judges: one knows the true reward, the other always prefers what comes first. What will the second one say about M and S?

# %%
def truth(prompt, first, second):
    return 0.5 + 0.5 * np.sign(true_reward(prompt, first) - true_reward(prompt, second))

def vain(prompt, first, second):
    return 1 if first != second else 0.5

ours, theirs = (respond(m, tok, prompts) for m in (M, S))
rates = {
    "by true reward": win_rate(truth, prompts, ours, theirs),
    "by position": win_rate(vain, prompts, ours, theirs),
    "M against itself": win_rate(truth, prompts, ours, ours),
}

# %%
assert rates["by true reward"]["wins"][1] > 0.5
assert rates["by position"]["wins"][0] == 0.5
assert rates["by position"]["contradicted"] > 0.3
assert rates["M against itself"]["ties"] == 1
shown = pd.DataFrame(rates, dtype=object).T
shown["wins"] = shown["wins"].map(as_text)
shown.round(3)

# %% [markdown]
# The vain judge contradicts himself on every pair of different answers, and his verdict is worth nothing: 0.5. A judge who writes something that is no verdict stops the count, with the prompt named:

# %%
complaint(win_rate, lambda *asked: 7, prompts, ours, theirs)


# %% [markdown]
# ## Signs of failure
#
# Training in stages can fail in four ways. A model may *forget* an early chunk of the data while it learns a late one; only stages can do that. A stage may become *unstable*. It may change *nothing*, or make things *worse*.
#
# ### Forgetting
#
# Let $R_s(j)$ be a score of the model after stage $s$ on chunk $j$, say its reward accuracy. Forgetting after stage $t$ is how far the model has fallen below the best so far: $\max_{s\le t} R_s(j) - R_t(j)$.

# %%
#| export
def forgetting(
    scores: pd.DataFrame, # one model a row, M_0 first; one chunk a column
) -> pd.DataFrame:        # the same shape, at least 0
    "How far each model is below the best of those up to it, chunk by chunk."
    return scores.cummax() - scores


# %% [markdown]
# The first chunk rises to 0.8 and falls back to 0.6. The second only rises.

# %%
R = pd.DataFrame({"first": [0.5, 0.8, 0.6], "second": [0.5, 0.6, 0.9]}, index=["M_0", "M_1", "M_2"])
assert forgetting(R).loc["M_2"].round(3).tolist() == [0.2, 0]
forgetting(R).round(3)


# %% [markdown]
# The maximum of noisy scores is too high. So `forgetting` is a little above 0 even where nothing was forgotten.
#
# ### Spikes
#
# Losses of single steps are noisy. What is left after we subtract a running median is the *residual*. Its scatter is measured *robustly*, by the median of the deviations, so that the
# spikes themselves do not count. A spike is a step more than four such deviations above the median.

# %%
#| export
def stability(
    losses,         # of the optimizer steps of one stage, in order
    window: int=9,  # of the running median, in steps
) -> dict:          # sd of the residual; robust_sd; spikes: steps above 4 robust sd
    """Residual of the loss about its running median. Compare runs at one beta, on the same batches where you can.
    Where half of the residuals are equal, as in a loss without noise, there is no scale, and no spike."""
    loss = pd.Series(np.asarray(losses, "float64"))
    residual = loss - loss.rolling(window, center=True, min_periods=1).median()
    deviation = (residual - residual.median()).abs()
    robust = 1.4826 * deviation.median()               # the sd, if the residual were normal
    spikes = residual.index[residual > 4 * robust] if robust > 0 else []
    return dict(
        sd=float(residual.std(ddof=0)),
        robust_sd=float(robust),
        spikes=[int(i) for i in spikes],
    )


# %% [markdown]
# A calm loss, and the same loss with three planted spikes. And of 500 calm losses, how many raise a false alarm?

# %%
g = np.random.default_rng(0)
trend = 0.69 * np.exp(-np.arange(100) / 80)

def noise(): return g.normal(0, 0.02, 100)

calm = trend + noise()
spiked = calm.copy()
spiked[[20, 50, 51]] += 0.6
assert stability(calm)["spikes"] == []
assert stability(spiked)["spikes"] == [20, 50, 51]
assert stability(spiked)["sd"] > 2 * stability(calm)["sd"]

# %%
spikes = [stability(trend + noise())["spikes"] for _ in range(500)]
false_alarms = np.mean([len(s) > 0 for s in spikes])
assert false_alarms < 0.25
f"{false_alarms:.0%} of calm runs of 100 steps have a spike"


# %% [markdown]
# One calm run in six has a spike. This is a number to look at, and no alarm.
#
# ### Rules for a report
#
# A report needs words, and stricter rules. We need one for instability first. Single high losses are no sign: where $\beta$ or the changes are large, hard batches have them, and the stage goes well. So the rule
# looks at the end: the last quarter of the losses lies above the first loss, and the interval of its mean says so.

# %%
#| export
def ends_above(
    loss: pd.Series, # of the optimizer steps of one stage, in order
) -> tuple|None:     # (mean, low, high) of the last quarter; None where all is well
    "Whether the losses of a stage end above the one that it began with, by more than chance, or as no numbers."
    if loss.empty: return None
    last = loss.iloc[-max(3, len(loss) // 4):]
    end = mean_interval(last.tolist())
    lost = not math.isfinite(end[0])
    return end if lost or end[1] > loss.iloc[0] else None


# %%
climbing = calm + 0.01 * np.arange(100)
assert ends_above(pd.Series(calm)) is None
assert ends_above(pd.Series(spiked)) is None        # three spikes are no instability
as_text(ends_above(pd.Series(climbing)))


# %% [markdown]
# The other rules compare $\gamma$ of the same pairs under two models, pair by pair:
#
# - *Forgetting*: the last model prefers the chosen response of a chunk less often than the model right after that chunk's own stage did, and the paired interval lies above 0.
# - *Minimal improvement*: the interval of the gain in $\gamma$ does not lie above 0.01 nats.
# - *Made worse*: the interval of the gain lies below 0.
#
# The gain of a stage is counted from the model that it began with. That is the one before, or S, where [every stage begins at S](12_plan.ipynb); and a stage that begins at S has learned nothing of the chunks before, so it cannot forget them.
#
# Each sign becomes a sentence that says what, where, and by how much. A chunk of one pair has no interval, so nothing can be said of it.

# %%
#| export
def failure_signs(
    gammas: pd.DataFrame,  # model, chunk, gamma: one pair a row; chunks in the order of training
    metrics: pd.DataFrame, # stage, loss: one optimizer step a row
    from_S: bool=False,    # every stage began at M_0, and not at the model before
) -> list[str]:            # one sentence per sign; none where all is well
    """Forgetting, instability, and stages that changed nothing or made it worse, as sentences.
    `gammas` has models from M_0 on, and for every model the same pairs in the same order."""
    gamma_of = {}
    for key, rows in gammas.groupby(["model", "chunk"], sort=False):
        gamma_of[key] = rows["gamma"].to_numpy()
    models, chunks = gammas["model"].unique(), gammas["chunk"].unique()
    last = models[-1]

    def right(model, chunk): return reward_accuracy(torch.tensor(gamma_of[model, chunk])).numpy()

    signs = []
    for t, (before, after, chunk) in enumerate(zip(models, models[1:], chunks), 1):
        if from_S: before = models[0]
        gain = mean_interval(gamma_of[after, chunk] - gamma_of[before, chunk])
        said = f"stage {t} changed gamma on {chunk} by {as_text(gain)} nats"
        if gain[2] < 0: signs.append(f"made worse: {said}")
        elif gain[1] <= 0.01: signs.append(f"minimal improvement: {said}")

        lost = mean_interval(right(after, chunk) - right(last, chunk))
        if lost[1] > 0 and not from_S:
            signs.append(f"forgetting: {last} prefers the chosen response of {chunk} "
                         f"less often than {after}, by {as_text(lost)}")

        loss = metrics.loc[metrics["stage"] == t, "loss"]
        end = ends_above(loss)
        if end:
            signs.append(f"instability: the loss of stage {t} began at {loss.iloc[0]:.3f}, "
                         f"and its last quarter is at {as_text(end)}")
    return signs


# %% [markdown]
# Two runs of two stages, made up. In the first, each stage raises $\gamma$ on its own chunk by 2, and the losses fall. In the second, stage 2 changes nothing on chunk b, throws chunk a back, and its
# loss climbs.

# %%
def gammas_of(models):
    parts = []
    for model, chunks in models.items():
        for chunk, values in chunks.items():
            parts.append(pd.DataFrame(dict(model=model, chunk=chunk, gamma=values)))
    return pd.concat(parts)

def losses_of(*stages):
    return pd.concat([pd.DataFrame(dict(stage=t, loss=loss)) for t, loss in enumerate(stages, 1)])

of_S = g.normal(0, 1, 200)
start, after_1 = dict(a=of_S, b=of_S), dict(a=of_S + 2, b=of_S)
well = gammas_of({"M_0": start, "M_1": after_1, "M_2": dict(a=of_S + 2, b=of_S + 2)})
ill = gammas_of({"M_0": start, "M_1": after_1, "M_2": dict(a=of_S - 2, b=of_S)})

# %%
assert failure_signs(well, losses_of(calm, spiked)) == []
signs = failure_signs(ill, losses_of(calm, climbing))
assert [s.split(":")[0] for s in signs] == ["forgetting", "minimal improvement", "instability"]
signs

# %% [markdown]
# ### How far can the sign of instability be trusted?
#
# A sign is worth as much as it is rare where nothing is wrong. The runs of the [experiments](experiments/protocol.ipynb) have kept their losses, and we know how good each became. We take the 2,888 runs of DPO, in one stage or in several, that there were when this was first counted; later experiments are left out. S has a true reward of 0.66 at most, in any world. So a run that ended above 0.7 went well, and one that
# ended below 0.6 went badly. How often does each kind show the sign?
#
# Beside it stands the rule that we had first: more than two of a hundred losses lie four robust standard deviations above the first loss.

# %%
runs = files("sdpo_nb.data") / "results/runs.parquet"
kept = pd.read_parquet(runs, columns=["method", "sampled", "losses", "steps", "command"])
later = "finite_data|tuned_elsewhere|when_order_matters|builds_on|when_sizes_differ|model_size"    # experiments that came after this count
kept = kept[~kept["command"].fillna("").str.contains(later)]
kept["reward"] = kept["sampled"].map(np.mean)
assert kept.loc[kept["method"] == "S", "reward"].max() < 0.67
kept = kept[kept["losses"].notna() & kept["method"].str.contains("DPO")]
assert len(kept) == 2888

def stages_of(run):
    "The losses of each stage of a run."
    ends = np.cumsum(run["steps"]).astype(int)
    return [pd.Series(part) for part in np.split(run["losses"], ends)[:-1]]

def unstable(loss): return ends_above(loss) is not None

def spiky(loss):
    high = loss > loss.iloc[0] + 4 * stability(loss)["robust_sd"]
    return high.sum() > 0.02 * len(loss)


# %%
fired = pd.DataFrame({
    "the rule": kept.apply(lambda run: any(map(unstable, stages_of(run))), axis=1),
    "single high losses": kept.apply(lambda run: any(map(spiky, stages_of(run))), axis=1),
})
ended = pd.cut(kept["reward"], [-1, 0.6, 0.7, 1], labels=["below 0.6", "0.6 to 0.7", "above 0.7"])
rates = fired.groupby(ended, observed=True).agg("sum")
rates["runs"] = ended.value_counts()

# %%
good, bad = rates.loc["above 0.7"], rates.loc["below 0.6"]
assert good["the rule"] < 0.002 * good["runs"]
assert good["single high losses"] > 0.2 * good["runs"]
assert bad["the rule"] > 0.1 * bad["runs"]
rates.rename_axis("true reward in the end")


# %% [markdown]
# The old rule gave a false alarm in three of ten good runs. The new one hardly ever does. But it overlooks most of the bad runs: a run may fail with a falling loss.
#
# *Forgetting* and *made worse* are one-sided comparisons at 2.5 %, one for each chunk. With nothing wrong, each of them appears in one chunk in forty, by chance.
#
# *Minimal improvement* is another kind of sign. It does not say that there is no gain, but that none could be shown. How often does it appear where there *is* one? Take differences with a standard deviation of 2 nats:

# %%
def none_shown(gain, n, tries=400):
    "How often n pairs with a true gain (nats) get the sign."
    g = np.random.default_rng(0)
    lows = np.array([mean_interval(g.normal(gain, 2, n))[1] for _ in range(tries)])
    return np.mean(lows <= 0.01)

overlooked = pd.DataFrame({
    f"a gain of {gain} nats": {n: none_shown(gain, n) for n in (50, 200, 800)} for gain in (0.2, 0.5)
}).rename_axis("pairs")
assert overlooked.loc[200, "a gain of 0.2 nats"] > 0.5
overlooked.map("{:.0%}".format)

# %% [markdown]
# With 50 pairs the sign appears more often than not, and for a gain of 0.2 nats in one of five cases even with 800. A report says all this in one paragraph.

# %%
#| export
FALSE_ALARMS = (
    "How far to trust these signs. *Instability*: in the tiny world it appeared in 2 of 2,630 runs that ended well, "
    "and in 19 of 136 that ended badly. *Forgetting* and *made worse* are comparisons at 2.5 %: "
    "with nothing wrong, chance shows each of them in one chunk of forty. *Minimal improvement* says that no gain "
    "could be shown; with few pairs a real gain gets this sign, too. No sign is no proof that all is well."
)

# %% [markdown]
# The paragraph quotes the table. If these runs change, this cell fails.

# %%
for kind in (good, bad):
    quoted = f"{kind['the rule']} of {kind['runs']:,}"
    assert quoted in FALSE_ALARMS, quoted

# %% [markdown]
# ## What these numbers do not show
#
# - The intervals of this chapter are about prompts and pairs. Another training seed, or another world, may give another M. The [experiments](experiments/protocol.ipynb) have several of both.
# - The pairs of a report are some of those that were trained on. So its *forgetting* is in part lost memory of single pairs, which held-out pairs would not show.
# - A win rate is as good as its judge. Asking in both orders removes one bias only, the one about positions.
#
# ## What you now have
#
# - `greedy_answers`, and `answers_beside` for two models of the tiny world: something to read.
# - `interval`: a 95 % interval that knows what was drawn from what.
# - `held_out`, `win_rate`: better in which sense?
# - `response_kl`, `frontier`, `excess`: at which distance, and was it worth it?
# - `failure_signs`: what a report warns of, and how often it is wrong.
#
# ## Questions to test yourself
#
# 1. Two models have overlapping 95 % intervals. Can the paired difference be clearly above zero?
#
# <details><summary>Answer</summary>
#
# Yes. The two intervals contain what makes prompts hard or easy. In the paired difference this drops out, so its interval can be much narrower.
#
# </details>
#
# 2. A model has a higher sampled reward than S and the same greedy answers. What may have happened?
#
# <details><summary>Answer</summary>
#
# It may only have become more certain. S at a lower temperature would do the same. Always compare with S at its best temperature.
#
# </details>
#
# 3. When is `excess` above 0, although no policy is better than the best?
#
# <details><summary>Answer</summary>
#
# When luck helps: the reward and the KL of the model are means of samples, the curve has draws of its own, and between its points it is a straight line, which lies below the true, bent curve.
#
# </details>
#
# 4. A judge always prefers the longer answer. Does asking in both orders help?
#
# <details><summary>Answer</summary>
#
# No. The longer answer is the longer one in both orders. The verdicts never contradict each other, and the bias stays.
#
# </details>
#
# ## Try this
#
# - Train M with `beta=0.1` and with `beta=1`, and put both points into the figure. Do they move along the line, or away from it?
#
# <details><summary>What you should see</summary>
#
# With `beta=0.1` M is 2.5 nats away and has a reward of 0.77: farther and worse. With `beta=1` it is 0.7 nats away and has 0.88: nearer, better, and only 0.04 below the line. A small $\beta$ spends distance
# that some twelve hundred noisy labels cannot pay back.
#
# </details>
#
# - Write a judge that prefers long answers, and ask it about M and S.
#
# <details><summary>What you should see</summary>
#
# A win rate of 0.505, and 99 % ties. Nearly all answers have the right length here, so a biased judge does no harm. On real text it would.
#
# </details>
#
# - Take the rewards of the same 20 prompts 30 times, as 600 numbers, and look at the interval. What should it be? Then give `interval` the same numbers with shape (1, 30, 20).
#
# <details><summary>What you should see</summary>
#
# As 600 numbers the interval of S is 0.05 wide. It should be 0.30 wide, as for the 20 prompts alone: repeating a number adds no knowledge. With the shape (1, 30, 20), `interval` knows that the 30 runs share their prompts, and says so.
#
# </details>
