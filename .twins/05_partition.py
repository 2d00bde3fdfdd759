# %% [markdown]
# # Which data first?
# > How easy is each source for the base model, how sure are we of it, and in which order are the data used?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/05_partition.ipynb)
#
# **You should know** what $\gamma$ is ([chapter 02](02_logprobs.ipynb)) and what an implicit reward is
# ([chapter 03](03_loss.ipynb)). Both are repeated below in a sentence.
#
# **Time**: about 65 minutes to read, a minute to run on two CPU cores.
#
# Stepwise DPO does not use its data all at once. It cuts them into *chunks* and trains in *stages*, one chunk per stage.
# Three names are needed:
#
# - $M_0$ is the model before the first stage. It is the base model S, the one that was fine-tuned on demonstrations.
# - $M_t$ is the model after stage $t$.
# - The *reference* of a stage is a frozen model to which the trained one, the *policy*, is compared. In stage $t$ it is
#   $M_{t-1}$, the model with which the stage begins.
#
# [Chapter 14](14_stepwise.ipynb) runs the stages. Here we ask only what comes first. The paper's answer is *easy to
# hard*: first the data on which the base model already agrees with the labels. This chapter measures that agreement,
# says how sure the number is and what it cannot see, and then cuts the chunks.

# %%
#| default_exp partition

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
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import torch
from datasets import Dataset, concatenate_datasets
from scipy.stats import t as student

from sdpo_nb.logprobs import LogprobTable
from sdpo_nb.loss import reward_accuracy
from sdpo_nb.preferences import Source

# %%
import random
from itertools import combinations
import matplotlib.pyplot as plt
import seaborn as sns
from scipy.stats import fisher_exact
from sdpo_nb.logprobs import load_model, load_tokenizer, score_pairs
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.world import SOURCES, answer, complaint, demonstration, load_world, make_model
from sdpo_nb.world import make_prompts, misled, sft, true_reward

torch.set_num_threads(1)
pd.set_option("display.width", 180, "display.max_columns", 20);

# %% [markdown]
# ## A definition with a gap
#
# A pair has a prompt $x$, a chosen response $y_w$ and a rejected one $y_l$. For a model $\pi$,
#
# $$\gamma_\pi = \log\pi(y_w|x) - \log\pi(y_l|x)$$
#
# says how much likelier the model finds the chosen response, in nats (units of the natural logarithm). The *implicit
# reward* of a response is, up to a factor, how much likelier the policy finds it than the reference does.
#
# The paper sorts sources by their *reward accuracy* under $M_0$: the share of pairs in which the implicit reward ranks
# the chosen response first,
#
# $$\log\frac{\pi_{M_0}(y_w|x)}{\pi_{ref}(y_w|x)} > \log\frac{\pi_{M_0}(y_l|x)}{\pi_{ref}(y_l|x)}, \qquad\text{that is}\qquad \gamma_{M_0} > \gamma_{ref}. \tag{1}$$
#
# Which reference? In stage 1 it is $M_0$ itself. Then both sides are zero for every pair, and nothing can be sorted.
# The paper names no other reference, and it does not print its accuracies. We read (1) without a reference:
#
# $$\gamma_{M_0}(x, y_w, y_l) > 0, \tag{2}$$
#
# the base model finds the chosen response likelier. You can have the other reading, too: (1) with a reference of your
# choice (`reference=`, below).
#
# The tiny world has three sources. Here they are in no particular order, and S has said once how likely it finds each
# response. The result is a table: one row per pair, two log-probabilities. Asking the model is the expensive part, and a run pays for it once: the reference of
# stage 1 is $M_0$, too, so this table is also the reference table of stage 1 ([chapter 02](02_logprobs.ipynb) says when a kept table is taken).

# %%
world = load_world()
tok, S = load_tokenizer(world.base), load_model(world.base, "cpu")
rows_of = {name: load_pairs(world.sources[name]) for name in ("riddle", "primer", "digest")}
sources = [tokenize_pairs(rows, tok, name) for name, rows in rows_of.items()]
everything = concatenate_datasets([s.pairs for s in sources])
table = score_pairs(S, everything)
table.rows.head(3).round(3)

# %% [markdown]
# Five pairs of `riddle`, judged twice: by (2), and by (1) with the reference that stage 1 has. A tie counts one half.
# Before you look: what will the second verdict be?

# %%
FIELDS = ("prompt", "chosen", "rejected")

def text(ids): return tok.decode([i for i in ids if i not in tok.all_special_ids])
def texts_of(pair): return [text(pair[f"{field}_ids"]) for field in FIELDS]

def verdict(gamma, gamma_ref=0.):
    words = {1: "right", 0: "wrong", 0.5: "tie"}
    return [words[v] for v in reward_accuracy(gamma, gamma_ref).tolist()]

few = sources[0].pairs.select(range(5))
gamma = table.gamma(few)
shown = pd.DataFrame([texts_of(pair) for pair in few], columns=FIELDS)
shown["gamma"] = gamma.numpy().round(2)
shown["by (2)"] = verdict(gamma)
shown["by (1), reference S"] = verdict(gamma, table.gamma(few))
assert {*shown["by (2)"]} == {"right", "wrong"}
assert {*shown["by (1), reference S"]} == {"tie"}
shown

# %% [markdown]
# All ties: by (1) every source in the world has the accuracy 0.5.
#
# And where (2) says *wrong*, is S wrong, or is the label? Here we can ask, because the world knows the true reward of
# any response.

# %%
rewards = shown[["prompt", "by (2)"]].copy()
for side in ("chosen", "rejected"):
    graded = [true_reward(prompt, response) for prompt, response in zip(shown["prompt"], shown[side])]
    rewards[f"reward of {side}"] = np.round(graded, 2)
rewards


# %% [markdown]
# Both happen. In row 4 S prefers the worse answer. In row 2 the label does. In row 1 the answers are
# equally bad, and the label was thrown like a coin. A reward accuracy cannot tell these cases apart; the coin's pair even
# counts as right.
#
# ## How sure is a share?
#
# An accuracy over $n$ pairs is an estimate of a share $p$. With other pairs of the same kind it would have come out a
# little different. An *interval of 95 %* says how much: it is made so that of many such intervals 95 in 100 contain the
# true share. Wilson's interval, with $z = 1.96$ for 95 %, is
#
# $$\frac{p + z^2/2n \;\pm\; z\sqrt{p(1-p)/n + z^2/4n^2}}{1 + z^2/n}. \tag{3}$$
#
# The interval of most textbooks, $p \pm z\sqrt{p(1-p)/n}$, is simpler. But it may leave [0, 1], and where all pairs are
# right it shrinks to a point, as if ten pairs were certainty. Both take the pairs for independent. Several pairs of one
# prompt are not, and then both tend to be too narrow.

# %%
#| export
def wilson(
    p: float,      # a share in [0, 1]; ties may have counted one half
    n: int,        # of how many, at least 1
    z: float=1.96, # normal quantile; 1.96 gives 95 %
) -> tuple[float, float]: # lower and upper end, in [0, 1]
    """Wilson's score interval of a share of independent pairs, equation (3).
    Raises ValueError if there is no share."""
    if not (n > 0 and 0 <= p <= 1):
        raise ValueError(f"wilson: p = {p}, n = {n}; it takes a share in [0, 1] of at least one pair")
    middle = p + z*z / (2*n)
    half = z * math.sqrt(p * (1 - p) / n + z*z / (4*n*n))
    whole = 1 + z*z/n
    low, high = (middle - half) / whole, (middle + half) / whole
    return max(0., min(p, low)), min(1., max(p, high))      # at 0 and 1 rounding may leave p outside


# %%
def textbook(p, n):
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    return p - half, p + half

assert textbook(1, 10) == (1, 1)
assert textbook(0.9, 10)[1] > 1
assert wilson(1, 10)[1] == 1
assert math.isclose(wilson(1, 10)[0], 10 / (10 + 1.96**2))  # (3) where all pairs are right
wilson(1, 10)


# %% [markdown]
# Ten of ten: the share may well be as low as 0.72.
#
# 95 % is a promise, and it can be checked. We simulate 5000 sources with true accuracy $p$ and count how many of their
# intervals contain $p$. In the last row two pairs of five are ties.

# %%
def coverage(interval, p, n, ties=0.):
    "Share of 5000 simulated sources whose interval holds p."
    kinds = [p - ties / 2, ties, 1 - p - ties / 2]      # right, tie, wrong
    counts = np.random.default_rng(0).multinomial(n, kinds, 5000)
    held = 0
    for right, tie, wrong in counts:
        low, high = interval((right + tie / 2) / n, n)
        held += low <= p <= high
    return held / len(counts)

cases = {
    "p 0.70, n 500": (0.7, 500),
    "p 0.95, n 40": (0.95, 40),
    "p 0.99, n 40": (0.99, 40),
    "p 0.70, n 500, ties 0.4": (0.7, 500, 0.4),
}
covered = pd.DataFrame({
    "(3)": {name: coverage(wilson, *case) for name, case in cases.items()},
    "textbook": {name: coverage(textbook, *case) for name, case in cases.items()},
})
assert covered["(3)"].iloc[:3].between(0.93, 0.97).all()     # (3)
assert covered["(3)"].iloc[3] > 0.97                        # with ties
assert covered.loc["p 0.99, n 40", "textbook"] < 0.5
covered.round(3)


# %% [markdown]
# A tie is worth one half and varies less than a coin, so with ties the interval is wider than it need be. It errs on
# the safe side.
#
# ## How sure is a mean?
#
# Not everything is a share. The mean of $\gamma$ over a source has no bounds, and neither has a change of reward. For
# the mean $\bar v$ of $n$ independent values, with standard deviation $s$, Student's interval is
#
# $$\bar v \pm t_{n-1}\, s / \sqrt n. \tag{4}$$
#
# The factor $t_{n-1}$ is near 1.96 for many values and larger for few, because the spread $s$ has itself been guessed
# from them.

# %%
#| export
def mean_interval(
    values, # (n,) independent numbers, at least one
) -> tuple[float, float, float]: # mean, lower and upper end; of one value the ends are NaN
    "Mean of independent values and its 95 % interval by Student's t (4); of one value, no interval (NaN)."
    v = torch.as_tensor(values, dtype=torch.float64)
    mean, n = v.mean().item(), len(v)
    half = student.ppf(0.975, n - 1) * v.std().item() / math.sqrt(n) if n > 1 else math.nan
    return mean, mean - half, mean + half


# %%
means = {s.name: mean_interval(table.gamma(s.pairs)) for s in sources}
one_value = mean_interval([0.3])
assert one_value[0] == 0.3
assert math.isnan(one_value[1])
pd.DataFrame(means, index=["mean gamma", "low", "high"]).T.round(2)


# %% [markdown]
# The same promise, the same check: 2000 samples of a normal distribution with mean 0. What happens if one takes 1.96
# for every $n$?

# %%
def held(interval, n):
    "Share of 2000 samples of n values whose interval holds the true mean, 0."
    samples = np.random.default_rng(0).standard_normal((2000, n))
    hits = 0
    for sample in samples:
        mean, low, high = interval(sample)
        hits += low <= 0 <= high
    return hits / len(samples)

def with_1_96(values):
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    return values.mean(), values.mean() - half, values.mean() + half

held_by = pd.DataFrame({
    "(4)": {f"n = {n}": held(mean_interval, n) for n in (3, 10, 100)},
    "1.96": {f"n = {n}": held(with_1_96, n) for n in (3, 10, 100)},
})
assert held_by["(4)"].between(0.93, 0.97).all()
assert held_by.loc["n = 3", "1.96"] < 0.85
held_by.round(3)


# %% [markdown]
# With three values, and three seeds are a usual number in this field, the simple interval misses the truth nearly four
# times as often as it promises.
#
# ## One source, measured
#
# A source may have a million pairs. Its columns are therefore read in blocks, and only lengths and flags are kept:
# token ids never become Python objects.

# %%
#| export
def _scan(pairs: Dataset) -> list:
    "Tokens of chosen, tokens of rejected, truncated (0 or 1): three columns of n numbers."
    columns = [], [], []
    needed = pairs.select_columns(["chosen_ids", "rejected_ids", "truncated"])
    for block in needed.with_format("arrow").iter(10_000):
        parts = (
            pc.list_value_length(block["chosen_ids"]),
            pc.list_value_length(block["rejected_ids"]),
            block["truncated"],
        )
        for column, part in zip(columns, parts): column.append(np.asarray(part, "float64"))
    return [torch.from_numpy(np.concatenate(column)) for column in columns]

def _nats(table: LogprobTable|None, pairs: Dataset) -> tuple:
    """Log-probabilities of chosen and rejected, (n,) each; 0 without a table.
    In fp64, so that equal numbers stay ties."""
    if table is None: return 0., 0.
    chosen, rejected = table.lookup(pairs)
    return chosen.double(), rejected.double()


# %%
lengths_and_flags = _scan(few)
assert lengths_and_flags[0].tolist() == [len(ids) for ids in few["chosen_ids"]]
assert _nats(None, few) == (0, 0)
names = ["tokens of chosen", "tokens of rejected", "truncated"]
pd.DataFrame({name: column.int() for name, column in zip(names, lengths_and_flags)}).T


# %% [markdown]
# Beside the accuracy stands what a careful reader asks next:
#
# - `ties`: how many pairs are ties;
# - `accuracy_per_token`: the same accuracy, with every log-probability divided by the number of its tokens;
# - `decided_by_length`: in which share of the pairs the two verdicts differ;
# - `truncated`: in which share of the pairs a response was cut;
# - `mean_gamma`: how large $\gamma$ is, and not only on which side of 0.

# %%
#| export
def measure_source(
    source: Source,        # tokenised pairs
    table: LogprobTable,   # of M_0, the model before the first stage
    reference: LogprobTable=None, # reads (1) against this model; None: (2)
) -> dict:                 # one row of the partition table: shares in [0, 1], counts, gamma in nats
    """Reward accuracy of one source under M_0, and what stands beside it.
    Raises ValueError for an empty source."""
    if not len(source): raise ValueError(f"source '{source.name}': no pairs to measure")
    chosen, rejected = _nats(table, source.pairs)
    ref_chosen, ref_rejected = _nats(reference, source.pairs)
    n_chosen, n_rejected, truncated = _scan(source.pairs)

    right = reward_accuracy(chosen - rejected, ref_chosen - ref_rejected).double()
    reward_chosen = (chosen - ref_chosen) / n_chosen                     # per token
    reward_rejected = (rejected - ref_rejected) / n_rejected
    per_token = reward_accuracy(reward_chosen, reward_rejected).double()

    accuracy = right.mean().item()
    low, high = wilson(accuracy, len(source))
    return dict(
        source=source.name,
        n=len(source),
        accuracy=accuracy,
        low=low,
        high=high,
        ties=int((right == 0.5).sum()),
        accuracy_per_token=per_token.mean().item(),
        decided_by_length=(right != per_token).double().mean().item(),
        truncated=truncated.mean().item(),
        mean_gamma=(chosen - rejected).mean().item(),
    )


# %%
measured = pd.DataFrame([measure_source(s, table) for s in sources]).set_index("source")
low, high = measured["low"], measured["high"]
assert high["riddle"] < low["digest"]
assert high["digest"] < low["primer"]
assert low["riddle"] < 0.5 < high["riddle"]
measured.round(3)

# %% [markdown]
# Three intervals that do not overlap, and a `riddle` in which S is no better than a coin:

# %%
bars = measured.sort_values("accuracy")
errors = [bars["accuracy"] - bars["low"], bars["high"] - bars["accuracy"]]
fig, ax = plt.subplots(figsize=(6, 2))
blue = sns.color_palette("colorblind")[9]
ax.barh(bars.index, bars["accuracy"], xerr=errors, color=blue, ecolor="0.2", capsize=3)
ax.axvline(0.5, color="grey", ls=":")
ax.text(0.505, 2.55, "a coin", color="grey", fontsize=8)
ax.set(xlim=(0, 1), xlabel="reward accuracy under S (share of pairs, 95 % interval); right: easier for S")
sns.despine()

# %% [markdown]
# ## The blind spot: length
#
# $\gamma$ is a difference of *sums* over tokens. Take a model that knows nothing: every token of every response costs
# it $c$ nats. Then
#
# $$\gamma = c\,(|y_l| - |y_w|), \tag{5}$$
#
# where $|y|$ is the number of tokens. This model "prefers" the shorter response of every pair. So we build two sources
# with the same texts. Each pair has a short and a long answer, and both are answers to some other prompt, so that each
# is as wrong as the other. In `terse` the short one is chosen, in `wordy` the long one.

# %%
short = [answer(p) for p in world.validation if len(answer(p)) in (3, 4)]
long = [answer(p) for p in world.validation if len(answer(p)) in (5, 6)]
rng = random.Random(0)
drawn = [(p, rng.choice(short), rng.choice(long)) for p in world.validation]
wrong = [(p, shorter, longer) for p, shorter, longer in drawn if answer(p) not in (shorter, longer)]

gaps = [true_reward(p, shorter) - true_reward(p, longer) for p, shorter, longer in wrong]
assert abs(np.mean(gaps)) < 0.02                        # each as wrong as the other

terse = [dict(prompt=p, chosen=shorter, rejected=longer) for p, shorter, longer in wrong]
wordy = [dict(prompt=p, chosen=longer, rejected=shorter) for p, shorter, longer in wrong]
made = []
for name, rows in (("terse", terse), ("wordy", wordy)):
    made.append(tokenize_pairs(load_pairs(rows), tok, name, chat=True))


# %%
def knows_nothing(pairs, c=4.):
    "The table of a model to which all tokens are alike, (5)."
    rows = {side: [-c * len(ids) for ids in pairs[f"{side}_ids"]] for side in ("chosen", "rejected")}
    return LogprobTable({}, pd.DataFrame(rows, index=pairs["key"], dtype="float32"))

blind = pd.DataFrame([measure_source(s, knows_nothing(s.pairs)) for s in made]).set_index("source")
assert blind["accuracy"].tolist() == [1, 0]
assert blind["accuracy_per_token"].tolist() == [0.5, 0.5]
blind[["n", "accuracy", "ties", "accuracy_per_token", "decided_by_length", "mean_gamma"]]

# %% [markdown]
# A perfectly easy source and a perfectly hard one, measured by a model that knows nothing. Two columns warn: the
# accuracy per token is that of a coin, and *all* pairs are decided by length. The value per token is no better judge;
# it is only another one. Where the two part, an order may rest on style and not on difficulty. S itself is not blind: its tokens
# do not all cost the same, so for S length decides only some of such pairs.
#
# In the three sources of the world both responses are nearly always equally long, hence the zeros above. Real ones are
# not like that ([chapter 02](02_logprobs.ipynb) has eight). The exceptions:

# %%
unequal = {}
for s in sources:
    n_chosen, n_rejected, _ = _scan(s.pairs)
    unequal[s.name] = int((n_chosen != n_rejected).sum())
assert sum(unequal.values()) < 0.02 * len(everything)
unequal


# %% [markdown]
# ## What easy means here
#
# The world's sources were built with one difference. For some prompts S was taught the wrong rule most of the time;
# such a prompt is called *misled*. `primer` has few of them, `riddle` many. Does easy-to-hard find this order without
# being told?
#
# If it does, there are two ways in which it could happen. Within one kind of prompt a source may be harder than
# another. Or the kinds are equally hard everywhere, and only the mixture differs. So we measure each source three
# times: on all prompts, on the misled ones, and on the others.

# %%
def share(flags):
    "n, the share of true ones, and its interval."
    p = float(np.mean(flags))
    low, high = wilson(p, len(flags))
    return dict(n=len(flags), share=p, low=low, high=high)

rows = []
for s in sources:
    right = reward_accuracy(table.gamma(s.pairs)).numpy()
    is_misled = np.array([misled(text(ids)) for ids in s.pairs["prompt_ids"]])
    rows.append(dict(source=s.name, prompts="all") | share(right))
    rows.append(dict(source=s.name, prompts="misled") | share(right[is_misled]))
    rows.append(dict(source=s.name, prompts="others") | share(right[~is_misled]))
by_kind = pd.DataFrame(rows).set_index(["prompts", "source"])

# %%
easy_first = by_kind.loc["all"].assign(share_misled=SOURCES).sort_values("share", ascending=False)
assert easy_first["share_misled"].is_monotonic_increasing

def in_words(r):
    interval = f"[{r['low']:.2f}, {r['high']:.2f}]"
    return f"{r['share']:.2f} {interval} of {r['n']:.0f}"

accuracies_by_kind = by_kind.apply(in_words, axis=1).unstack("prompts")
easy_first[["share_misled"]].join(accuracies_by_kind)


# %% [markdown]
# Each entry is an accuracy, its 95 % interval, and the number of pairs. Read it column by column.
#
# - `all`: the order is that of the share of misled prompts, the one we built in.
# - `others`: the three sources are alike, 0.74 to 0.75.
# - `misled`: `primer` is higher, with 79 such pairs. Its interval overlaps the others, but that does not make them
#   alike: two intervals of 95 % may overlap, and the difference be clear all the same.
#
# So test the difference. Fisher's exact test says how probable a table of right and wrong is that is no likelier than
# ours, if both sources had the same accuracy.

# %%
def chance(a, b):
    "Of two shares with their n: the p-value of Fisher's exact test."
    yes = [round(row["share"] * row["n"]) for row in (a, b)]
    no = [int(row["n"]) - k for row, k in zip((a, b), yes)]
    return fisher_exact([yes, no]).pvalue

def chances(shares):
    "Every two rows of a table of shares."
    return pd.Series({f"{a}, {b}": chance(shares.loc[a], shares.loc[b]) for a, b in combinations(shares.index, 2)})

p = pd.DataFrame({kind: chances(by_kind.loc[kind].loc[easy_first.index]) for kind in ("others", "misled")})
assert p["others"].min() > 0.5
assert p["misled"].drop("digest, riddle").max() < 0.05 < p["misled"]["digest, riddle"]
p.round(3)

# %% [markdown]
# The other prompts are equally hard everywhere, as far as one can see. The misled ones of `primer` are easier for S than
# those of the other two; with p-values of 0.03 and 0.04, among three, chance is not ruled out. So the mixture may not be all. How much is
# it? We give every source the same two accuracies, those of all misled and of all other prompts, and let only the
# mixture differ.

# %%
kinds = by_kind.loc[["misled", "others"]]
right = kinds["share"] * kinds["n"]
pooled = right.groupby("prompts").sum() / kinds["n"].groupby("prompts").sum()
counts = kinds["n"].unstack("prompts")
by_mixture = counts @ pooled / counts.sum(axis=1)
mixture = easy_first[["share"]].assign(by_mixture=by_mixture)
first, last = mixture.loc["primer"], mixture.loc["riddle"]
explained = ((first - last)["by_mixture"] / (first - last)["share"]).item()
assert 0.8 < explained < 0.95
print(f"the mixture explains {explained:.0%} of the difference between primer and riddle")
mixture.rename(columns={"share": "accuracy", "by_mixture": "accuracy by the mixture alone"}).round(3)


# %% [markdown]
# So what differs between the sources is for the most part the mixture. There is one more explanation to rule out: perhaps
# hard sources simply have worse labels. The true reward says which labels contradict it.

# %%
def is_flipped(pair):
    "Does the label contradict the true reward?"
    prompt, chosen, rejected = texts_of(pair)
    return true_reward(prompt, chosen) < true_reward(prompt, rejected)

def share_flipped(named):
    "Of {name: pairs}: the share of flipped labels, one row per name."
    rows = []
    for name, pairs in named.items():
        flags = [is_flipped(pair) for pair in pairs]
        rows.append(dict(name=name) | share(flags))
    return pd.DataFrame(rows).set_index("name").rename_axis("labels flipped")

flipped = share_flipped({s.name: s.pairs for s in sources})
assert chances(flipped).min() > 0.2
assert flipped["share"].idxmax() == "primer"        # the easiest
flipped.loc[easy_first.index].round(3)

# %% [markdown]
# No two of the shares differ by more than chance gives (p is 0.21 and more), and the largest is that of the easiest
# source: the labels are not the reason. Here we can say so because we know the true reward. With
# real data nobody can tell the two apart. A low reward accuracy means *hard for S* or *wrongly labelled*, and
# easy-to-hard puts both last.
#
# ## From numbers to an order
#
# *Easy to hard* is descending accuracy. Sources of equal accuracy keep the order in which they were given. The other
# orders are the controls with which easy-to-hard has to be compared. All are decided once, under $M_0$, and not again
# when the model has changed.

# %%
#| export
ORDERS = ("easy_to_hard", "hard_to_easy", "as_given", "random")
ORDER_BY = dict(gamma="accuracy", gamma_per_token="accuracy_per_token") # what is easy -> column of the measures

def _source_order(accuracy: list, order: str) -> list:
    "Positions of the sources, first to last; ties keep the order given, in both directions."
    sign = {"easy_to_hard": -1, "hard_to_easy": 1, "as_given": 0, "random": 0}[order]
    return sorted(range(len(accuracy)), key=lambda i: sign * accuracy[i])


# %%
tied = dict(a=0.6, b=0.7, c=0.6)

def spelled(order):
    places = _source_order(list(tied.values()), order)
    return "".join(list(tied)[i] for i in places)

orders = {order: spelled(order) for order in ORDERS[:3]}
assert orders == dict(easy_to_hard="bac", hard_to_easy="acb", as_given="abc")
orders


# %% [markdown]
# What is ordered are rows. All pairs of all sources lie in one table, source after source, and an order is a list of
# row numbers. Below, source `a` has two pairs and `b` has three, and `b` comes first:

# %%
#| export
def _rows_by_source(sizes: list, ranks: list) -> list:
    "Row numbers, source after source: sizes in the order given, ranks as `_source_order` gives them."
    starts = np.cumsum([0, *sizes])
    return [np.arange(starts[i], starts[i+1]) for i in ranks]


# %%
sizes = dict(a=2, b=3)
[rows.tolist() for rows in _rows_by_source(sizes.values(), ranks=[1, 0])]


# %% [markdown]
# ### When there is only one source
#
# Then there are no sources to sort, and the pairs themselves are sorted, by $\gamma$, the left side of (2), or by the
# gain $\gamma - \gamma_{ref}$ where a reference is given. A large value means that S is sure of the label.

# %%
#| export
def _pair_order(pairs, table, reference, order, order_by="gamma"):
    "Row numbers of a single source, first to last, by gamma or the gain; equal ones keep the order given."
    chosen, rejected = _nats(table, pairs)
    ref_chosen, ref_rejected = _nats(reference, pairs)
    sure = chosen - rejected - (ref_chosen - ref_rejected)
    if order_by == "gamma_per_token":
        n_chosen, n_rejected, _ = _scan(pairs)
        sure = (chosen - ref_chosen) / n_chosen - (rejected - ref_rejected) / n_rejected
    return np.array(_source_order(sure.tolist(), order))


# %%
easy = _pair_order(few, table, None, "easy_to_hard")
assert gamma[easy].tolist() == sorted(gamma.tolist(), reverse=True)
shown.loc[easy, ["prompt", "gamma"]]


# %% [markdown]
# ### The random order
#
# `random` shuffles all pairs, but it keeps the *sizes* of the chunks that the ordered run has. Otherwise a comparison
# of the two would mix two changes. It draws from a generator of its own, so nothing else that is random in your program
# changes.

# %%
#| export
def _shuffled(rows, seed):
    "All rows in a random order, in chunks of the same sizes. The global random state is not touched."
    sizes = [len(chunk) for chunk in rows]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(sum(sizes), generator=generator).numpy()
    return np.split(order, np.cumsum(sizes)[:-1])


# %%
mixed = _shuffled([[0, 1], [2, 3, 4]], seed=0)
assert [len(chunk) for chunk in mixed] == [2, 3]
[chunk.tolist() for chunk in mixed]


# %% [markdown]
# ### Chunks
#
# A `Partition` says which pairs each stage trains on. It holds row numbers and no copies. Usually one source is one
# chunk. If you ask for another number of chunks, the ordered rows are cut into that many equal parts.

# %%
#| export
@dataclass
class Partition:
    "Which pairs each stage trains on."
    measures: pd.DataFrame # one row per source, in the order of training; easy to hard where that is random
    chunks: list           # T lists of row numbers of `pairs`
    names: list            # T names
    pairs: Dataset         # all pairs of all sources, in the order given

    def chunk(
        self,
        t: int, # counts from 0
    ) -> Dataset:
        "The pairs of stage t + 1."
        return self.pairs.select(self.chunks[t])

def partition(
    sources: list,        # `Source`s in the order given, at least one
    table: LogprobTable,  # of M_0, with every pair of every source
    order: str="easy_to_hard", # one of ORDERS
    chunks: int=None,     # T, the number of stages, from 1 to the number of pairs; None: one per source
    seed: int=0,          # of the random order
    reference: LogprobTable=None, # reads (1) against this model; None: (2)
    order_by: str="gamma", # one of ORDER_BY: sums over tokens, or means
) -> Partition:           # T chunks; every pair is in exactly one
    """The paper's chunks, by reward accuracy under M_0.
    Raises ValueError for an unknown order or measure or an impossible T."""
    if order not in ORDERS: raise ValueError(f"order: {order!r} is none of {', '.join(ORDERS)}")
    if order_by not in ORDER_BY: raise ValueError(f"order_by: {order_by!r} is none of {', '.join(ORDER_BY)}")
    if not sources: raise ValueError("sources: at least one is needed")
    pairs = concatenate_datasets([s.pairs for s in sources])
    T = len(sources) if chunks is None else chunks
    if not isinstance(T, Integral) or isinstance(T, bool) or not 1 <= T <= len(pairs):
        raise ValueError(f"chunks: {T!r} is not a whole number from 1 to {len(pairs)}, the number of pairs")

    measures = pd.DataFrame([measure_source(s, table, reference) for s in sources])
    accuracy = measures[ORDER_BY[order_by]].tolist()
    ranks = _source_order(accuracy, "easy_to_hard" if order == "random" else order)
    names = [sources[i].name for i in ranks]
    if len(sources) == 1 and T > 1: rows = [_pair_order(pairs, table, reference, order, order_by)]
    else: rows = _rows_by_source([len(s) for s in sources], ranks)

    if T != len(sources):
        rows = np.array_split(np.concatenate(rows), T)
        names = [f"part {t}" for t in range(1, T + 1)]
    if order == "random":
        rows = _shuffled(rows, seed)
        names = [f"random {t}" for t in range(1, T + 1)]
    measures = measures.iloc[ranks].reset_index(drop=True)
    return Partition(measures, [r.tolist() for r in rows], names, pairs)


# %%
plans = {order: partition(sources, table, order) for order in ORDERS}

def sizes_of(plan): return [len(chunk) for chunk in plan.chunks]
def described(plan): return [f"{name} ({n})" for name, n in zip(plan.names, sizes_of(plan))]

assert plans["easy_to_hard"].names == list(SOURCES)
assert sizes_of(plans["random"]) == sizes_of(plans["easy_to_hard"])
stages = [f"stage {t}" for t in (1, 2, 3)]
pd.DataFrame({order: described(plan) for order, plan in plans.items()}, index=stages).T

# %% [markdown]
# An impossible request is refused:

# %%
for wrong_setting in (dict(order="upwards"), dict(order_by="length"), dict(chunks=0)):
    print(complaint(partition, sources, table, **wrong_setting))

# %% [markdown]
# ## One source, pair by pair
#
# Many people have one preference set and no second. With `chunks=3` its pairs are sorted by $\gamma$ under S and cut
# into thirds. `part 1` has the pairs of whose labels S is surest, `part 3` those whose labels surprise it most.

# %%
digest = sources[2]
alone = partition([digest], table, chunks=3)
gammas = {name: table.gamma(alone.chunk(t)) for t, name in enumerate(alone.names)}

# %%
fig, ax = plt.subplots(figsize=(6, 2.6))
lowest, highest = gammas["part 3"].min().item(), gammas["part 1"].max().item()
bins = np.arange(math.floor(lowest), math.ceil(highest) + 1)
colours = sns.color_palette("viridis_r", 3)
ax.hist([g.numpy() for g in gammas.values()], bins, stacked=True, color=colours, edgecolor="white")
places = {"part 3": (-4, 25, "right"), "part 2": (2.5, 65, "left"), "part 1": (7, 25, "left")}
for name, colour in zip(gammas, colours):
    x, y, side = places[name]
    ax.text(x, y, name, ha=side, color=colour, weight="bold")
ax.axvline(0, color="grey", ls=":")
ax.set(xlabel=r"$\gamma$ under S (nats); to the right: easier for S", ylabel="pairs of digest")
sns.despine()

# %% [markdown]
# At the dotted line S finds both responses equally likely. It lies inside `part 2`. In `part 3` S disagrees with
# *every* label. Two reasons are possible: S is wrong there, or the labels are. Which is it? Again we ask the true
# reward.

# %%
assert (gammas["part 1"] > 0).all()
assert gammas["part 2"].min() < 0 < gammas["part 2"].max()
assert (gammas["part 3"] < 0).all()
parts = share_flipped({name: alone.chunk(t) for t, name in enumerate(alone.names)})
p = chances(parts)
assert p["part 1, part 3"] < 0.001
assert p["part 2, part 3"] < 0.05 < p["part 1, part 2"]
display(p.round(4).to_frame("p-value"))
parts.round(3)

# %% [markdown]
# Three things can be read from it.
#
# - In `part 3` labels are flipped more often than in `part 1`, and more often than in `part 2`, too (p = 0.02), although
#   these two intervals overlap. Whether `part 1` and `part 2` differ we cannot say.
# - Still, about six of seven labels in `part 3` are right. There S is wrong, and these are just the pairs from which it
#   can learn.
# - Between whole sources we saw no such thing: the hard source had no more flipped labels than the easy one.
#
# So sorting pairs and sorting sources are two different things. Sorting pairs puts together whatever surprises S, and
# mistakes in the labels are among it. Sorting sources compares averages, in which single mistakes do not show.
#
# ## Other numbers of chunks
#
# The ordered rows are cut into T parts wherever the cuts fall, also inside a source. Every pair is in exactly one of them.

# %%
origin = np.repeat([s.name for s in sources], [len(s) for s in sources])

def contents(chunk):
    counts = pd.Series(origin[chunk]).value_counts(sort=False)
    return " + ".join(f"{n} {name}" for name, n in counts.items())

cuts = {}
for T in (1, 2, 3, 4):
    chunks = partition(sources, table, chunks=T).chunks
    cuts[f"T = {T}"] = [contents(chunk) for chunk in chunks] + [""] * (4 - T)
    assert sorted(sum(chunks, [])) == list(range(len(everything)))
pd.DataFrame.from_dict(cuts, orient="index", columns=[f"stage {t}" for t in range(1, 5)])

# %% [markdown]
# ## Another reference
#
# Now (1), with a reference that is not S: the argument `reference` of `partition`. A run has a *setting* of that name,
# and it is another thing. It says which model the loss compares with. The order of a run is always that of (2).
#
# A natural choice is the model *before* it was fine-tuned on demonstrations. The accuracy then asks what the fine-tuning
# has taught. The world has no such model, so we train one that has read only 2000 demonstrations.

# %%
rng = random.Random(0)
demonstrations = [(p, demonstration(p, rng)) for p in make_prompts(2000, "sft", rng)]
early = sft(make_model(tok), tok, demonstrations, epochs=1)

# %%
readings = {
    "none: (2)": partition(sources, table),
    "an early model": partition(sources, table, reference=score_pairs(early, everything)),
}
for plan in readings.values(): assert plan.names == list(SOURCES)
accuracies = {name: plan.measures.set_index("source")["accuracy"] for name, plan in readings.items()}
pd.DataFrame(accuracies).T.rename_axis("reference").round(3)

# %% [markdown]
# Here the two readings give the same order: the early model has learnt so little that its own $\gamma$ is near 0 for
# most pairs, so (1) is nearly (2). They need not agree, and length shows why. Take as reference the model that knows
# nothing, for which each token costs $c$ nats. By (5) its $\gamma_{ref}$ is $c\,(|y_l| - |y_w|)$, and (1) becomes
#
# $$\gamma_{M_0} + c\,(|y_w| - |y_l|) > 0. \tag{6}$$
#
# This is (2) with a credit for length: each token that the chosen response has more than the rejected one earns $c$
# nats.
#
# Now recall `terse` and `wordy`, two sources with the same wrong answers, in which only the length decides what is
# chosen. We let S measure them, with four credits. One of them is S's own rate: its mean log-probability
# per token, on these responses, with the sign turned.

# %%
asked_S = {s.name: score_pairs(S, s.pairs) for s in made}
tokens = sum(column.sum().item() for column in _scan(made[0].pairs)[:2])
own = -asked_S["terse"].rows.to_numpy().sum() / tokens

rows = []
for s in made:
    for c in (0., 2., own, 8.):
        measure = measure_source(s, asked_S[s.name], reference=knows_nothing(s.pairs, c))
        rows.append(dict(c=round(c, 1)) | measure)
priced = pd.DataFrame(rows)

# %%
at_own_price = priced[priced["c"] == round(own, 1)]
accuracy = priced.pivot(index="source", columns="c", values="accuracy")
assert at_own_price["low"].max() < 0.5 < at_own_price["high"].min()
assert accuracy.loc["terse", 0] > 0.8
assert accuracy.loc["terse", 8] < 0.5
accuracy.rename_axis(columns="c (nats)").round(2)

# %% [markdown]
# Read the row of `terse` from left to right. Without credit ($c = 0$, which is (2)), S finds it easy, and `wordy`
# hard, although the answers are equally wrong. At S's own rate, both are coin tosses. With a larger credit the order
# turns round.
#
# No $c$ is the right one. The finding is that the accuracy depends on it: for sources whose responses differ in length,
# *easy* is a matter of how length is counted.
#
# ## By the token
#
# Of all ways to count length, one is used often enough to be a setting: the *mean* over tokens in place of the sum,
#
# $$\frac{\log\pi(y_w|x)}{|y_w|} - \frac{\log\pi(y_l|x)}{|y_l|} > 0. \tag{7}$$
#
# You know it as `accuracy_per_token`. With `order_by="gamma_per_token"` the sources are ordered by it; the table of measures stays what it
# is. What will S say of `terse` and `wordy` now? Their texts are the same, only the labels are swapped. So whoever finds
# one of them easy must find the other one hard.

# %%
both = score_pairs(S, concatenate_datasets([s.pairs for s in made]))
by = {order_by: partition(made, both, order_by=order_by) for order_by in ORDER_BY}
easiest = {order_by: plan.names[0] for order_by, plan in by.items()}
assert by["gamma"].names[0] == "terse"

two_measures = by["gamma"].measures.set_index("source")[list(ORDER_BY.values())]
per_token = two_measures["accuracy_per_token"]
assert abs(per_token.sum() - 1) < 1e-9                                 # (7): one is the other, swapped
two_measures.round(2).T.assign(easiest=list(easiest.values()))

# %% [markdown]
# By the sum, short is easy: 0.84 against 0.16. By the token, both are near a coin, and now `wordy` comes first, by a
# hair. Either is a choice. `partition.json`, which a run writes ([chapter 10](10_folder.ipynb)), keeps both numbers, so a reader can see what the other choice would have
# done. The pairs of a single source are sorted in the same way, by the difference in (7).
#
# ## What you now have
#
# - `wilson` and `mean_interval`: how sure a share is, and how sure a mean is.
# - `measure_source`: reward accuracy of a source with its interval, and the columns that say when length decided it.
# - `partition`: chunks in four orders, by sums or by means over tokens, for any number of stages, of several sources or of one; every pair once.
# - Stage 1's reference table, at no extra cost: it is the table from which the sources were ordered.
#
# ## Questions to test yourself
#
# 1. Why does (1) with the reference of stage 1 give every source the same accuracy? Which accuracy?
#
# <details><summary>Answer</summary>
#
# The reference of stage 1 is $M_0$ itself, so $\gamma_{M_0} = \gamma_{ref}$ for every pair. All pairs are ties, a tie
# counts one half, and the accuracy is 0.5.
#
# </details>
#
# 2. A source has accuracy 0.9, per token 0.4, and 0.6 of its pairs are decided by length. What would you look at before
#    calling it easy?
#
# <details><summary>Answer</summary>
#
# At the lengths. Chosen responses are probably much shorter than rejected ones, and a sum over fewer tokens is larger
# whatever the model knows. Look at $|y_w| - |y_l|$, and at the accuracy of pairs whose responses are about equally
# long.
#
# </details>
#
# 3. Two sources have overlapping intervals. What does easy-to-hard do, and what would you report?
#
# <details><summary>Answer</summary>
#
# It sorts by the two numbers all the same, so the order may be an accident. Overlapping intervals do not say whether it
# is: test the difference. If that is not clear, report the accuracies with their intervals and say that the order of these two is not
# known; if it matters, run both orders.
#
# </details>
#
# 4. Why must `random` keep the chunk sizes?
#
# <details><summary>Answer</summary>
#
# With other sizes the stages would have other numbers of steps. A difference between the two runs could then come from
# the order or from the sizes, and one could not tell from which.
#
# </details>
#
# 5. Why is $t_{n-1}$ in (4) larger for few values?
#
# <details><summary>Answer</summary>
#
# The spread $s$ is estimated from the same values. With few of them it is often too small by chance, and an interval of
# 1.96 standard errors would then be too narrow too often.
#
# </details>
#
# ## Try this
#
# - Give `tokenize_pairs` the argument `max_length=11`, score the pairs again and measure the sources. Which columns
#   move?
#
# <details><summary>What you should see</summary>
#
# `truncated` rises from 0 to about 0.3, as one would expect. But the accuracies fall, too, to between 0.52 and 0.55,
# and the sources can no longer be told apart. Half of the 11 tokens is for the prompt, and a prompt that is too long
# loses its beginning: here the name of the skill. S no longer knows what was asked.
#
# </details>
#
# - Cut `riddle` pair by pair into ten parts. How does the share of flipped labels run from the first to the last?
#
# <details><summary>What you should see</summary>
#
# In the last part 0.24 of the labels are flipped, with an interval from 0.14 to 0.37; in the nine others it is between
# 0.00 and 0.08. What surprises S most is often a wrong label, in this source, too.
#
# </details>
#
# - Partition under `early` instead of S. Does the order hold? Do the intervals still part?
#
# <details><summary>What you should see</summary>
#
# `partition(sources, score_pairs(early, everything))` gives the same order, but its accuracies are 0.52, 0.50 and 0.49,
# and all intervals overlap. This model has learnt too little to find anything easy. So the order under it is an
# accident, and easy-to-hard is a matter of who is asked.
#
# </details>
