# %% [markdown]
# # Did it work?
# > Held-out pairs, true reward, distance from S, win rate and three signs of failure, compared on the same prompts and with intervals.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/08_evaluate.ipynb)
#
# **You should know** what [gamma](02_logprobs.ipynb) is and how [one stage](06_trainer.ipynb) is trained. **Time** about a minute on two CPU cores.
#
# A falling loss says that training went on. Whether the model became *better* is another question, and has no single answer: it may rank pairs rightly that it never saw; it may answer rightly; it may
# answer rightly only after moving far from S. This chapter measures each, for two models on the same prompts, and says how sure a difference is.

# %%
#| default_exp evaluate

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
#| export
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from torch import Tensor
from transformers import GenerationConfig

from sdpo_nb.logprobs import LogprobTable, autocast, gamma
from sdpo_nb.loss import dpo_loss, reward_accuracy
from sdpo_nb.partition import wilson
from sdpo_nb.world import K, answer, mean_interval, prompt_ids, respond, respond_ids, text_of, true_reward

# %%
import tempfile
from importlib.resources import files
from sdpo_nb.logprobs import load_model, load_tokenizer, score_pairs
from sdpo_nb.packing import packed_logprobs
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.trainer import TrainConfig, train_stage
from sdpo_nb.world import load_world, respond, score_responses, true_rewards
torch.set_num_threads(1);

# %% [markdown]
# Two models to compare: S of the tiny world, and M, which is S after one stage of DPO. The last 100 pairs of every source are held out.

# %%
w = load_world()
S, tok = load_model(w.base), load_tokenizer(w.base)
sources = {name: tokenize_pairs(load_pairs(file), tok, name).pairs for name, file in w.sources.items()}
train = [p for pairs in sources.values() for p in list(pairs)[:-100]]
held = {name: list(pairs)[-100:] for name, pairs in sources.items()}

M = load_model(w.base)
table = score_pairs(M, train, logprobs=packed_logprobs, token_budget=16384)
train_stage(M, train, table, TrainConfig(beta=0.3, lr=3e-4, precision="fp32"), tempfile.mkdtemp());


# %% [markdown]
# ## The same prompts for both
#
# Some prompts are hard for every model. Compare two models on *the same* prompts and this drops out: what counts is how much the differences scatter, not how much the scores do.
# The bootstrap draws prompts again, with replacement, and records how much the mean varies. It asks for no normal distribution, and where the data have levels (several worlds, in each several training
# runs, in each the same prompts) it draws on every level, so that 600 prompts of one lucky run do not count as 600 runs.

# %%
#| export
def bootstrap(values,  # (n,) one number per prompt or pair; or (worlds, seeds, prompts): prompts are shared by the seeds of a world
              draws: int=2000, seed: int=0) -> np.ndarray: # (draws,)
    "Means of values drawn anew on every level. Raises ValueError where there is nothing to draw from, or a number is missing."
    v = np.asarray(values, "float64")
    if not v.size or not np.isfinite(v).all() or v.ndim not in (1, 3): raise ValueError(f"bootstrap: needs finite numbers, (n,) or (worlds, seeds, prompts); got shape {v.shape}, {np.sum(~np.isfinite(v))} not finite")
    v, g = v.reshape((1,) * (3 - v.ndim) + v.shape), np.random.default_rng(seed)
    W, R, P = v.shape
    def draw():
        worlds, seeds, prompts = g.integers(W, size=(W, 1, 1)), g.integers(R, size=(W, R, 1)), g.integers(P, size=(W, 1, P))
        return v[worlds, seeds, prompts].mean()
    return np.array([draw() for _ in range(draws)])

def interval(values, draws: int=2000, seed: int=0) -> tuple[float, float, float]:
    "Mean of values and its 95 % percentile interval; of one number, no interval (NaN)."
    v = np.asarray(values, "float64")
    return float(v.mean()), *(np.quantile(bootstrap(v, draws, seed), [0.025, 0.975]).tolist() if v.size > 1 else (math.nan, math.nan))


# %% [markdown]
# The true reward of both models on the same 200 test prompts, with the same random numbers behind the samples. Read the width of the intervals.

# %%
prompts = w.test[:200]
a, b = (np.array(true_rewards(m, tok, prompts)) for m in (S, M))
unpaired = interval(b)[0] - interval(a)[0], *(b.mean() - a.mean() + s * 1.96 * math.sqrt((a.var() + b.var()) / len(a)) for s in (-1, 1))
widths = pd.DataFrame({"S": interval(a), "M": interval(b), "M - S, as if on other prompts": unpaired, "M - S, paired": interval(b - a)}, index=["mean", "low", "high"]).T
assert widths["low"].iloc[3] > 0 and np.ptp(interval(b - a)[1:]) < np.ptp(unpaired[1:])
widths.round(3)


# %% [markdown]
# These intervals are about prompts: they say what other prompts would have shown of *this* S and M, and nothing of another training run.
#
# An interval is a promise about repetition: of a hundred such intervals about 95 should hold the truth. That can be tried, since we can make data whose mean we know. Beside the plain case stand five
# worlds of four runs, whose means differ by more than the runs do.

# %%
def covers(make, truth, tries=200):
    return np.mean([low <= truth <= high for _, low, high in (interval(make(np.random.default_rng(i)), 300, i) for i in range(tries))])

def five_worlds(g): return g.normal(0, 0.1, (5, 1, 1)) + g.normal(0, 0.05, (5, 4, 1)) + g.normal(0, 0.3, (5, 1, 30)) + g.normal(0, 0.1, (5, 4, 30))

coverage = pd.Series({"60 skewed numbers": covers(lambda g: g.exponential(size=60), 1), "five worlds, drawn on every level": covers(five_worlds, 0),
                      "five worlds, taken for 600 numbers": covers(lambda g: five_worlds(g).ravel(), 0)}, name="holds the truth")
assert coverage.iloc[0] > 0.9 and coverage.iloc[2] < 0.7 and 0.85 < coverage.iloc[1] < 0.97
coverage.map("{:.1%}".format).to_frame()


# %% [markdown]
# Treating all numbers as independent is the error to avoid. The other two are a few points short of 95: skewed numbers, and five worlds, are little to draw from. And a share whose pairs are all alike (all right, all wrong)
# gets an interval of no width, as [chapter 05](05_partition.ipynb) warns.
#
# ## Held-out pairs
#
# The cheapest question needs no answers from the model, only its log-probabilities of pairs that it was not trained on: $\gamma$, the share of pairs with $\gamma>0$ (it finds the chosen response
# more likely), and against S whatever changed, pair by pair. The last two columns are the two halves of the change of $\gamma$: did the chosen response become likelier, or only the rejected one less likely?
# For means of independent pairs there is a formula, Student's, and for shares [Wilson's](05_partition.ipynb), which does not shrink to nothing where all pairs agree; no need to draw.

# %%
#| export
def held_out(now: LogprobTable,    # of a model
             before: LogprobTable, # of the one that it is compared with
             pairs, beta: float) -> dict: # name -> (mean, low, high)
    "What a model says about pairs, and what changed against another model, pair by pair; 95 % intervals."
    (chosen, rejected), (chosen_0, rejected_0) = now.lookup(pairs), before.lookup(pairs)
    g, g_0 = gamma(chosen, rejected), gamma(chosen_0, rejected_0)
    def share(right): return right.mean().item(), *wilson(right.mean().item(), len(right))
    return {"gamma": mean_interval(g),
            "prefers chosen": share(reward_accuracy(g)),
            "loss": mean_interval(dpo_loss(g, g_0, beta)),
            "reward accuracy": share(reward_accuracy(g, g_0)),
            "change of gamma": mean_interval(g - g_0),
            "log-ratio of chosen": mean_interval(chosen - chosen_0),
            "log-ratio of rejected": mean_interval(rejected - rejected_0)}

def as_text(cell) -> str:
    "mean [low, high]"
    return "{:.3f} [{:.3f}, {:.3f}]".format(*cell)


# %%
tables = {name: score_pairs(m, sum(held.values(), []), logprobs=packed_logprobs) for name, m in (("S", S), ("M", M))}
by_source = pd.DataFrame({(source, name): held_out(table, tables["S"], pairs, 0.3) for source, pairs in held.items() for name, table in tables.items()}, dtype=object).T
of_S, of_M = by_source.xs("S", level=1), by_source.xs("M", level=1)
assert all(v[1] > 0 for v in of_M["change of gamma"]) and (of_M["prefers chosen"] > of_S["prefers chosen"]).all()
assert all(v[0] == 0.5 for v in of_S["reward accuracy"])     # S against itself: ties, one half
by_source.map(as_text)


# %% [markdown]
# On every source the model agrees with more labels of pairs it has not seen than S does, if not by much. Note the two accuracies: *prefers chosen* asks the model alone, *reward accuracy* asks whether training moved it the right way, and a
# model that is itself the reference has 0.5 by definition.
#
# ## Answers, to read
#
# Numbers about given responses say nothing of what a model writes. So a report shows some answers, the likeliest token each time, prompt by prompt without padding.

# %%
#| export
@torch.no_grad()
def greedy_answers(model, tokenizer, prompts: list, # of token ids
                   max_new: int=64, # tokens
                   precision: str="fp32") -> list[str]:
    "One answer per prompt, without special tokens."
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    how = GenerationConfig(do_sample=False, max_new_tokens=max_new, eos_token_id=sorted(ends), pad_token_id=tokenizer.eos_token_id)
    out, was_training = [], model.training
    model.eval()
    try:
        for ids in prompts:
            row = torch.tensor([ids], device=model.device)
            with autocast(model.device, precision): said = model.generate(input_ids=row, attention_mask=torch.ones_like(row), generation_config=how)
            out.append(tokenizer.decode(said[0, len(ids):], skip_special_tokens=True).strip())
    finally: model.train(was_training)
    return out


# %%
asked = w.test[:4]
answers = pd.DataFrame({name: greedy_answers(m, tok, [prompt_ids(tok, p) for p in asked]) for name, m in (("S", S), ("M", M))}, index=asked)
assert answers["S"].tolist() == respond(S, tok, asked, tau=0)
answers


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
    "Greedy answers of two models, on few prompts that a rule picks: what was mended, or not, and what was spoilt."
    said = {"S says": respond(S, tokenizer, prompts, tau=0), "aligned": respond(model, tokenizer, prompts, tau=0)}
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
# ## Right answers
#
# In the tiny world every answer has a true reward. `score_responses` of [chapter 00](00_world.ipynb) keeps one row per prompt, so that any two models can be paired.

# %%
scores = {(name, how): score_responses(m, tok, prompts, tau) for name, m in (("S", S), ("M", M)) for how, tau in (("sampled", 1.), ("greedy", 0.))}
skills = pd.DataFrame({key: s.groupby("skill")["exact"].apply(interval) for key, s in scores.items()})
assert (scores["M", "sampled"]["exact"].mean() > scores["S", "sampled"]["exact"].mean()) and scores["S", "sampled"]["reward"].tolist() == a.tolist()
skills.map(as_text)


# %% [markdown]
# Sampled and greedy answers tell different things. Where S's greedy answer is right, sharpening alone would help sampled answers; where it is wrong, it would hurt.
#
# ## How far from S?
#
# The objective that DPO stands for pays for reward with distance, $\mathrm{KL}(\pi\,\|\,S)$. Along a sampled response it is a sum over tokens, and at each token the whole vocabulary is there, so that
# the inner expectation need not be sampled:
#
# $$\mathrm{KL}(\pi\,\|\,S) = \mathbb{E}_{y\sim\pi} \sum_t \sum_v \pi(v\,|\,x,y_{<t}) \log\frac{\pi(v\,|\,x,y_{<t})}{S(v\,|\,x,y_{<t})}. \tag{1}$$

# %%
#| export
def _steps(model, prompts: list, responses: list, tau: float=1.) -> tuple[Tensor, Tensor, Tensor]: # (n, L, V) log-probabilities in float64, (n, L) next tokens, (n, L) which are there
    "The distribution over the vocabulary at each token of a response, at temperature tau. Rows are padded to the right, which a causal model cannot see."
    first, n = (torch.tensor([len(x) for x in xs], device=model.device)[:, None] for xs in (prompts, responses))
    token = torch.arange(n.max(), device=model.device)
    width = int(first.max() + n.max())
    rows = torch.tensor([[*x, *y, *[0] * (width - len(x) - len(y))] for x, y in zip(prompts, responses)], device=model.device)
    logits = model(input_ids=rows, use_cache=False).logits.take_along_dim((first - 1 + token)[..., None], 1)
    return logits.double().div(tau).log_softmax(-1), rows.gather(1, first + token), token < n

def _logp(model, prompts, responses): # (n,) nats, in float64
    logp, ids, there = _steps(model, prompts, responses)
    return (logp.gather(2, ids[..., None])[..., 0] * there).sum(1)

@torch.no_grad()
def kl_along(model, base, tokenizer, prompts: list,
             responses: list, # ids, sampled from the model at tau
             tau: float=1.,   # temperature of the model, above 0; of base it is 1
             batch: int=200) -> Tensor: # (n,) nats per response
    "KL(model || base) along given responses: equation (1). Unbiased for the KL of as many tokens as they may have."
    ids, out = [prompt_ids(tokenizer, p) for p in prompts], []
    for i in range(0, len(prompts), batch):
        (p, _, there), (q, *_) = (_steps(m, ids[i:i+batch], responses[i:i+batch], t) for m, t in ((model, tau), (base, 1.)))
        out.append(((p.exp() * (p - q)).sum(-1) * there).sum(1))
    return torch.cat(out).cpu()

def response_kl(model, base, tokenizer, prompts: list, tau: float=1., seed: int=0, max_new: int=8, batch: int=200) -> Tensor: # (n,) nats per response
    "The same along one sampled response per prompt."
    return kl_along(model, base, tokenizer, prompts, respond_ids(model, tokenizer, prompts, tau, seed, max_new), tau, batch)


# %% [markdown]
# Responses of two tokens can all be listed, so (1) can be checked against the plain sum $\sum_y \pi(y)\log(\pi(y)/S(y))$. The same sampled responses also give the plain estimate, the
# mean of $\log\pi(y) - \log S(y)$, which is right, too, and here scatters more.

# %%
@torch.no_grad()
def listed_kl(prompt):
    x, V = prompt_ids(tok, prompt), len(tok)
    ys = [[tok.eos_token_id], *([i, j] for i in range(V) if i != tok.eos_token_id for j in range(V))]
    logp = [torch.cat([_logp(m, [x] * len(part), part) for part in (ys[i:i+500] for i in range(0, len(ys), 500))]) for m in (M, S)]
    assert abs(logp[0].exp().sum() - 1) < 1e-6
    return (logp[0].exp() * (logp[0] - logp[1])).sum().item()

one, n = prompts[0], 2000
exact, along = listed_kl(one), response_kl(M, S, tok, [one] * n, max_new=2)
with torch.no_grad():
    ys, xs = respond_ids(M, tok, [one] * n, 1., 0, 2), [prompt_ids(tok, one)] * n
    ratio = _logp(M, xs, ys) - _logp(S, xs, ys)
kls = pd.DataFrame({"all responses listed": [exact, 0.], "(1)": [along.mean().item(), along.std().item()], "mean log-ratio": [ratio.mean().item(), ratio.std().item()]}, index=["KL (nats)", "scatter per response"]).T
assert abs(along.mean() - exact) < 4 * along.std() / n**0.5 and along.std() < ratio.std()
kls.round(4)


# %% [markdown]
# ## Reward at equal distance
#
# More reward for more distance is no merit by itself. What can be had for a distance is known here: the best policy of a given KL is proportional to $S\,e^{k r/\beta}$ for some $\beta$, with the true reward $r$ and the scale $k=6$ of
# the comparisons ([chapter 03](03_loss.ipynb)). The responses of S to a short prompt can mostly be listed: draw some, add the right answer, compute the probability of each. What S has outside the list, about a seventh in many rare
# mistakes, is represented by a second draw: those of its responses that are not in the list. (Those of the first draw are all in it.)

# %%
#| export
@torch.no_grad()
def frontier(base, tokenizer, prompts: list, betas: list, samples: int=50) -> pd.DataFrame: # beta, reward, kl (nats), unlisted: share of S outside the list
    "True reward and KL of S exp(k r / beta), as means over prompts of the tiny world."
    listed, rest = ([respond_ids(base, tokenizer, prompts, 1., 2 * s + i) for s in range(samples)] for i in (0, 1))
    out = []
    for i, p in enumerate(prompts):
        ys = {tuple(y[i]) for y in listed} | {(*tokenizer(answer(p), add_special_tokens=False).input_ids, tokenizer.eos_token_id)}
        others = [y[i] for y in rest if tuple(y[i]) not in ys]
        log_s = _logp(base, [prompt_ids(tokenizer, p)] * len(ys), list(ys)).cpu()
        missing = (1 - log_s.exp().sum()).clamp(min=0)
        log_s = torch.cat([log_s, (missing / max(1, len(others))).log().expand(len(others))]).log_softmax(0)
        r = torch.tensor([true_reward(p, text_of(tokenizer, y)) for y in [*ys, *others]], dtype=torch.float64)
        for beta in betas:
            log_q = (log_s + K * r / beta).log_softmax(0)
            out.append((beta, (log_q.exp() * r).sum().item(), (log_q.exp() * (log_q - log_s)).sum().item(), missing.item()))
    return pd.DataFrame(out, columns=["beta", "reward", "kl", "unlisted"]).groupby("beta", as_index=False).mean()

def excess(reward: float, kl: float, curve: pd.DataFrame) -> float:
    "Reward minus what the curve has at this KL, or at its end where that is beyond; above 0 only by luck, of the samples or of the curve's own draws, or where few points make a coarse curve."
    c = curve.sort_values("kl")
    return reward - float(np.interp(kl, c["kl"], c["reward"]))


# %%
few, betas = prompts[:60], [math.inf, 100, 60, 40, 30, 20, 15, 10, 8, 6, 5, 4, 3, 2, 1.5, 1, 0.7, 0.5, 0.3, 0.1]
curve = frontier(S, tok, few, betas)
assert curve["reward"].is_monotonic_decreasing and curve["kl"].is_monotonic_decreasing and curve["unlisted"].max() < 0.2 and abs(curve["kl"].min()) < 1e-9
curve[::2].round(3)


# %%
#| export
def plot_frontier(curve: pd.DataFrame,  # beta, reward, kl
                  points: pd.DataFrame, # name, reward, kl
                  ax=None) -> plt.Figure:
    "True reward against KL: the best policies as a line, models as points."
    ax = ax or plt.subplots(figsize=(5.5, 3.2))[1]
    c = curve.sort_values("kl")
    ax.plot(c["kl"], c["reward"], color="black", lw=1.5, label=r"best possible, $S\,e^{kr/\beta}$")
    sns.scatterplot(points, x="kl", y="reward", hue="name", style="name", s=60, palette="colorblind", ax=ax)
    ax.set(xlabel="KL from S (nats per response)", ylabel="true reward, sampled"); ax.legend(frameon=False, fontsize="small"); sns.despine(ax.figure)
    return ax.figure


# %%
spent = response_kl(M, S, tok, few).mean().item()
gained = score_responses(M, tok, few)["reward"].mean()
assert excess(gained, spent, curve) < 0
plot_frontier(curve, pd.DataFrame({"name": ["S", "M"], "kl": [0, spent], "reward": [curve["reward"].min(), gained]}));


# %% [markdown]
# The line is what the true reward, known for every response, could buy; the point is what some twelve hundred noisy comparisons bought.
#
# ## Which answer is better?
#
# Where no true reward exists one asks a judge, and judges have a favourite position. So each pair of answers is shown twice, with places changed, and the mean of both verdicts counts. A judge who only looks at positions then
# says 0.5, and how often the two verdicts contradict each other is reported, too.

# %%
#| export
def win_rate(judge,         # (prompt, first, second) -> 1 the first is better, 0 the second, 0.5 a tie
             prompts: list, ours: list, theirs: list) -> dict: # wins: (mean, low, high), ties one half; ties: both verdicts 0.5; contradicted: by the other order
    "How often ours is better, asked in both orders. Raises ValueError for a verdict outside [0, 1], naming the prompt."
    def verdict(i, first, second):
        v = float(judge(prompts[i], first, second))
        if not 0 <= v <= 1: raise ValueError(f"judge: {v} for prompt {i}, {prompts[i]!r}; a verdict is 1, 0, or 0.5 for a tie")
        return v
    def verdicts(first, second): return np.array([verdict(i, a, b) for i, (a, b) in enumerate(zip(first, second))])
    if not len(prompts) == len(ours) == len(theirs): raise ValueError(f"win_rate: {len(prompts)} prompts, {len(ours)} of our answers, {len(theirs)} of theirs")
    there, back = verdicts(ours, theirs), 1 - verdicts(theirs, ours)
    won = (there + back) / 2
    return dict(wins=interval(won), ties=float(((there == 0.5) & (back == 0.5)).mean()), contradicted=float((there != back).mean()))


# %%
def truth(p, first, second): return 0.5 + 0.5 * np.sign(true_reward(p, first) - true_reward(p, second))
def vain(p, first, second): return 1 if first != second else 0.5   # whatever comes first

ours, theirs = (respond(m, tok, prompts) for m in (M, S))
rates = {"by true reward": win_rate(truth, prompts, ours, theirs), "by position": win_rate(vain, prompts, ours, theirs), "M against itself": win_rate(truth, prompts, ours, ours)}
assert rates["by true reward"]["wins"][1] > 0.5 and rates["by position"]["wins"] == (0.5, 0.5, 0.5) and rates["by position"]["contradicted"] > 0.3 and rates["M against itself"]["ties"] == 1
pd.DataFrame(rates, dtype=object).T.assign(wins=lambda d: d["wins"].map(as_text)).round(3)


# %% [markdown]
# ## Three signs of failure
#
# A stage may become *unstable*; it may change *nothing*; and what only stages can do, a model may *forget* an early chunk while it learns a late one. Each is a number. With $R_s(j)$ the
# score of $M_s$ on chunk $j$, forgetting after stage $t$ is $\max_{s\le t} R_s(j) - R_t(j)$.

# %%
#| export
def forgetting(scores: pd.DataFrame, # one model a row, M_0 first; one chunk a column
              ) -> pd.DataFrame:     # the same shape, at least 0
    "How far each model is below the best of those up to it, chunk by chunk."
    return scores.cummax() - scores

def stability(losses, # of the optimizer steps of one stage
              window: int=9) -> dict: # sd of the residual; its robust sd; spikes: steps above 4 robust sd
    "Residual of the loss about its running median. Compare runs on the same batches only."
    loss = pd.Series(np.asarray(losses, "float64"))
    residual = loss - loss.rolling(window, center=True, min_periods=1).median()
    robust = 1.4826 * (residual - residual.median()).abs().median()
    return dict(sd=float(residual.std(ddof=0)), robust_sd=float(robust), spikes=[int(i) for i in residual.index[residual > 4 * robust]] if robust > 0 else [])


# %% [markdown]
# Each must see what it is for: a loss with three planted spikes against the same loss without; a chunk that falls back against one that only rises. And how often does a calm loss raise an alarm?

# %%
g = np.random.default_rng(0)
trend = 0.69 * np.exp(-np.arange(100) / 80)
calm = trend + g.normal(0, 0.02, 100)
spiked = calm.copy(); spiked[[20, 50, 51]] += 0.6
R = pd.DataFrame({"first": [0.5, 0.8, 0.6], "second": [0.5, 0.6, 0.9]}, index=["M_0", "M_1", "M_2"])
assert stability(calm)["spikes"] == [] and stability(spiked)["spikes"] == [20, 50, 51] and stability(spiked)["sd"] > 2 * stability(calm)["sd"]
assert forgetting(R).loc["M_2"].round(3).tolist() == [0.2, 0]
false_alarms = np.mean([len(stability(trend + g.normal(0, 0.02, 100))["spikes"]) > 0 for _ in range(500)])
assert false_alarms < 0.25
forgetting(R).round(3), f"{false_alarms:.0%} of calm runs of 100 steps have a spike"


# %% [markdown]
# A maximum of noisy scores is too high, so `forgetting` is a little above 0 even where nothing was forgotten.
#
# A run's report needs words, and stricter rules. *Forgetting*: a chunk is preferred less often than right after its own stage, and the paired interval lies above 0. *Minimal improvement*: the interval of the gain in $\gamma$ does not
# lie above 0.01 nats; *made worse*: it lies below 0. *Instability*: the stage ends with losses above the one that it began with, and the interval of their mean says so. Single high losses are no sign: where $\beta$ or the changes are large, hard batches have them, and the stage goes well.
#
# The pairs of a report are some of those that were trained on, so forgetting is in part lost memory of single pairs, which held-out pairs would not show.

# %%
#| export
def failure_signs(gammas: pd.DataFrame,  # model, chunk, gamma: one pair a row, the same pairs in the same order for every model; models from M_0 on, chunks in the order of training
                  metrics: pd.DataFrame, # stage, loss: one optimizer step a row
                 ) -> list[str]:
    "Forgetting, instability and stages that changed nothing, as sentences; none where all is well."
    g = {(m, c): rows["gamma"].to_numpy() for (m, c), rows in gammas.groupby(["model", "chunk"], sort=False)}
    models, chunks, signs = gammas["model"].unique(), gammas["chunk"].unique(), []
    def right(m, c): return reward_accuracy(torch.tensor(g[m, c])).numpy()
    for t, (before, after, chunk) in enumerate(zip(models, models[1:], chunks), 1):
        gain, lost = mean_interval(g[after, chunk] - g[before, chunk]), mean_interval(right(after, chunk) - right(models[-1], chunk))
        if gain[2] < 0: signs.append(f"made worse: stage {t} changed gamma on {chunk} by {as_text(gain)} nats")
        elif gain[1] <= 0.01: signs.append(f"minimal improvement: stage {t} changed gamma on {chunk} by {as_text(gain)} nats")
        if lost[1] > 0: signs.append(f"forgetting: {models[-1]} prefers the chosen response of {chunk} less often than {after}, by {as_text(lost)}")
        loss = metrics.loc[metrics["stage"] == t, "loss"]
        if (end := ends_above(loss)): signs.append(f"instability: the loss of stage {t} began at {loss.iloc[0]:.3f}, and its last quarter is at {as_text(end)}")
    return signs

def ends_above(loss: pd.Series) -> tuple|None: # (mean, low, high) of the last quarter
    "Whether the losses of a stage end above the one that it began with, by more than chance."
    end = mean_interval(loss.iloc[-max(3, len(loss) // 4):].tolist())
    return end if end[1] > loss.iloc[0] else None


# %%
flat = pd.DataFrame(dict(stage=1, loss=calm))
def gammas_of(**models): return pd.concat([pd.DataFrame(dict(model=m, chunk=c, gamma=v)) for m, cs in models.items() for c, v in cs.items()])

x = g.normal(0, 1, 200)
well = gammas_of(M_0=dict(a=x, b=x), M_1=dict(a=x + 2, b=x), M_2=dict(a=x + 2, b=x + 2))
ill = gammas_of(M_0=dict(a=x, b=x), M_1=dict(a=x + 2, b=x), M_2=dict(a=x - 2, b=x))
both = pd.concat([flat, flat.assign(stage=2, loss=spiked)])
climbing = pd.concat([flat, flat.assign(stage=2, loss=calm + 0.01 * np.arange(100))])
assert failure_signs(well, both) == []
signs = failure_signs(ill, climbing)
assert [s.split(":")[0] for s in signs] == ["forgetting", "minimal improvement", "instability"]
signs

# %% [markdown]
# A sign is worth as much as it is rare where nothing is wrong. All runs of the [experiments](experiments/protocol.ipynb) have kept their losses, and we know how good they became: S has a true reward of 0.66 at most, in any world. How often does a run that ended above 0.7 show the sign, and how often one that ended below 0.6? Beside it, the rule that
# we had first: more than two of a hundred losses four robust standard deviations above the first.

# %%
kept = pd.read_parquet(files("sdpo_nb.data") / "results/runs.parquet", columns=["method", "sampled", "losses", "steps"])
assert kept[kept["method"] == "S"]["sampled"].map(np.mean).max() < 0.67
kept = kept[kept["losses"].notna() & kept["method"].str.contains("DPO")]

def spiky(loss): return (loss > loss.iloc[0] + 4 * stability(loss)["robust_sd"]).sum() > 0.02 * len(loss)
def in_any_stage(rule, run):
    at = np.cumsum([0, *run["steps"]]).astype(int)
    return any(rule(pd.Series(run["losses"][a:b])) for a, b in zip(at, at[1:]))

ended = pd.cut(kept["sampled"].map(np.mean), [-1, 0.6, 0.7, 1], labels=["below 0.6", "0.6 to 0.7", "above 0.7"])
fired = pd.DataFrame({name: kept.apply(lambda run: in_any_stage(rule, run), axis=1) for name, rule in {"the rule": lambda loss: ends_above(loss) is not None, "single high losses": spiky}.items()})
rates = fired.groupby(ended, observed=True).agg("sum").assign(runs=ended.value_counts())
good, bad = rates.loc["above 0.7"], rates.loc["below 0.6"]
assert good["the rule"] < 0.002 * good["runs"] and good["single high losses"] > 0.2 * good["runs"] and bad["the rule"] > 0.1 * bad["runs"]
rates.rename_axis("true reward in the end")

# %% [markdown]
# The old rule cried wolf in a quarter of the good runs. The new one hardly ever does, and overlooks most of the bad ones: a run may fail with a falling loss. The other three signs are one-sided comparisons at 2.5 %, for each chunk; with nothing wrong, one chunk in forty shows one by chance. A report says so.

# %%
#| export
FALSE_ALARMS = ("How far to trust these signs. *Instability*: in the tiny world it appeared in 2 of 2,630 runs that ended well, and in 19 of 136 that ended badly. "
                "*Forgetting*, *made worse* and *minimal improvement* are comparisons at 2.5 %: with nothing wrong, chance shows one in every fortieth chunk. No sign is no proof that all is well.")

# %% [markdown]
# ## What you now have
#
# - `interval`: a 95 % interval that knows what was drawn from what.
# - `held_out`, `response_kl`, `frontier`, `win_rate`: better in which sense, and for which distance?
# - `failure_signs`: what a report warns of.
#
# ## Questions to test yourself
#
# 1. Two models have overlapping 95 % intervals. Can the paired difference be clearly above zero?
# 2. A model has a higher sampled reward than S and the same greedy answers. What may have happened?
# 3. When is `excess` above 0, although no policy is better than the best?
# 4. A judge always prefers the longer answer. Does asking in both orders help?
#
# ## Try this
#
# - Train M with a smaller $\beta$, and put the point into the figure. Does it move along the line, or away from it?
# - Write a judge that prefers long answers, and see what it says of M.
# - Take the same 20 prompts 30 times instead of 600 prompts, and look at the interval. What should it be?
