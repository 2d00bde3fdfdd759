# %% [markdown]
# # What a model says about a response
# > The log-probability of a response: shift, gather, mask, sum, in fp32; and a pass that writes one row per pair to a table.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/02_logprobs.ipynb)
#
# **You should know** what logits and a softmax are, and what a pair is ([chapter 01](01_preferences.ipynb)).
#
# **Time** to read: part 1 half an hour, part 2 one hour, part 3 two hours. Running takes about a minute on two CPU cores.
#
# Preference training starts from pairs. Somebody saw two responses to the same prompt, *chose* one and *rejected* the other.
# DPO (direct preference optimisation, [chapter 03](03_loss.ipynb)) makes the chosen response more likely *relative to* the rejected
# one. So everything in this book is made of one number: how likely does a model find a given response?
#
# Computing that number takes a few lines. Getting it wrong is just as easy, and no mistake raises an error. You can forget the
# shift, mask the wrong tokens, take the mean, sum in bf16, or leave dropout on. This chapter makes each of these mistakes once,
# and writes the plain version that everybody can read. Faster versions come later and must equal it.
#
# The chapter has three parts:
#
# 1. **What a model says**: one response by hand, a batch, and $\gamma$, which compares two. *If you came to learn DPO, read this
#    part and go on with [chapter 03](03_loss.ipynb).*
# 2. **The same number every time**: sums and means, rounding, neighbours in a batch, dropout.
# 3. **The reference is a table**: which model was loaded, can it be trained, and how its numbers are kept in files. *The first
#    page of it says what to know; the rest is engineering, which you may skip.*

# %%
#| default_exp logprobs

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
import contextlib, errno, hashlib, json, logging, os, re, shutil, sys, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig,
)
from transformers.utils import logging as bars

# %%
import io, tempfile

import matplotlib.pyplot as plt
import seaborn as sns
import transformers
from torch.testing import assert_close
from tqdm.std import tqdm as text_bar
from transformers import LlamaConfig

from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.world import complaint, load_base, load_world, prompt_ids, respond, skipped_without

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## Part 1. What a model says
#
# ### One response, by hand
#
# How likely does a model find a given response? A causal language model gives, at every position, a distribution over the *next* token. We write $\pi$ for the model, $x$ for
# the prompt, and $y$ for the response with its tokens $y_1, y_2, \dots$ The probability of the response is the product of the
# probabilities of its tokens. In logarithms it is a sum:
#
# $$\log \pi(y \mid x) = \sum_{t=1}^{|y|} \log \pi(y_t \mid x, y_{<t}). \tag{1}$$
#
# Here $|y|$ is the number of tokens and $y_{<t}$ are the tokens before the $t$-th. Why logarithms? The product of several hundred
# probabilities is zero in floating point; their sum is not. The logarithm is the natural one, and its unit is called *nat*.
#
# Our model is S, the base model of the tiny world ([chapter 00](00_world.ipynb)). Our pair is the first one of its hardest
# source. One character is one token, so you can see everything.

# %%
world = load_world()
S, tok = load_base(world)
S.requires_grad_(False)
pairs = list(tokenize_pairs(load_pairs(world.sources["riddle"]), tok, "riddle").pairs)
pair = pairs[0]
{k: tok.decode(pair[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids")}


# %% [markdown]
# Where do we read the number for the first response token, `d`? Not at its own position: the logits at position $i$ speak about
# token $i+1$. So we read it at the *last prompt position*, and the last position of the row is never read.

# %%
def one_row(model, x, y):  # prompt ids, response ids -> (|y|,) log-probability of each response token
    logits = model(input_ids=torch.tensor([x + y])).logits[0]
    before = len(x) - 1                                  # the position before the first response token
    each = [logits[before + t].log_softmax(-1)[token] for t, token in enumerate(y)]
    return torch.stack(each)


# %%
x, y = pair["prompt_ids"], pair["chosen_ids"]
row = [tok.decode(i) for i in x + y]
logp = one_row(S, x, y)

# %% [markdown]
# S sometimes follows the right rule ("reverse the letters") and sometimes a wrong one, which keeps the first letter and reverses the
# rest. Before you look: at which token will it hesitate?
#
# The picture shows the end of the row. Each arrow starts where the logits are read and ends at the token that they speak about. The
# number is the probability that S gives to this token.

# %%
fig, ax = plt.subplots(figsize=(9, 2))
centre = dict(ha="center", va="center")
for i in range(len(x) - 3, len(row)):
    color = "tab:blue" if i >= len(x) else "tab:gray"
    ax.add_patch(plt.Rectangle((i - 0.45, 0), 0.9, 0.5, color=color, alpha=0.25))
    ax.text(i, 0.25, row[i], fontsize=7 if len(row[i]) > 9 else 9, **centre)
    ax.text(i, -0.2, i, fontsize=8, color="gray", **centre)
bow = dict(arrowstyle="->", connectionstyle="arc3,rad=-0.5")
for i, p in enumerate(logp.exp().tolist(), len(x) - 1):
    ax.annotate("", (i + 0.95, 0.55), (i + 0.05, 0.55), arrowprops=bow)
    ax.text(i + 0.5, 1.08, f"{p:.2f}", color="tab:red" if p < 0.5 else "black", **centre)
ax.text(len(x) - 1, 1.08, "S's probability of the next token:", ha="right", va="center")
ax.text(len(x) - 2, -0.55, "prompt, never scored", color="tab:gray", **centre)
ax.text(len(x) + 2, -0.55, "response, scored", color="tab:blue", **centre)
ax.text(len(row) - 1, -0.55, "not read: nothing follows", fontsize=8, color="tab:gray", **centre)
ax.set(xlim=(len(x) - 3.6, len(row) - 0.2), ylim=(-0.7, 1.25))
ax.set_axis_off()

# %% [markdown]
# It hesitates once, at the first letter: that letter decides between the two rules. The same numbers as a table, with their
# logarithms and the sum so far:

# %%
last = len(x) - 1                                        # of the prompt: the first position that is read
table_of_row = pd.DataFrame({
    "position": range(last, len(row) - 1),
    "reads": row[last:-1],
    "speaks about": row[last + 1:],
    "p": logp.exp(),
    "log p (nats)": logp,
    "cumulative sum": logp.cumsum(0),
})
table_of_row.set_index("position").round(3)

# %% [markdown]
# The last number of the last column is (1). Is it true? We can count a probability: let S answer the same prompt many times.

# %%
n = 2000
text = tok.decode(y[:-1])
question = tok.decode(x[1:-2])                           # without the tokens of the chat template
p = logp.sum().exp().item()
counted = respond(S, tok, [question] * n).count(text) / n
standard_error = (p * (1 - p) / n) ** 0.5
assert abs(counted - p) < 4 * standard_error
{"exp of (1)": round(p, 3), "share of 2000 samples": round(counted, 3)}

# %% [markdown]
# The commonest mistake is to forget the shift. Nothing fails. The model is then asked how likely each token is to follow *itself*:

# %%
all_logp = S(input_ids=torch.tensor([x + y])).logits[0].log_softmax(-1)
shifted = logp.sum().item()
forgotten = sum(all_logp[len(x) + t][token] for t, token in enumerate(y)).item()
assert forgotten < 10 * shifted
{"shifted": round(shifted, 2), "shift forgotten": round(forgotten, 2)}


# %% [markdown]
# ### A batch
#
# How do we ask about many responses at once, and still get the same numbers? A graphics card wants many rows at once, and the rows of a batch have one length. So short rows are padded. We pad on the right:
# then every real token keeps its position, and a causal model cannot look ahead into the padding.
#
# A token now belongs to the prompt, to the response or to the padding. Only a mask can say which. `collate` makes two: one for
# the model (which tokens are real) and one for us (which tokens are response). Both responses of all pairs go through the model
# together, so that both are computed in the same way.

# %%
#| export
def check_prompts(
    pairs: list,  # n pairs with prompt_ids, chosen_ids, rejected_ids
):
    "Raise ValueError for no pairs, for a pair without a prompt, and for one with an empty response."
    if not pairs: raise ValueError("pairs: none")
    if not all(len(p["prompt_ids"]) for p in pairs):
        raise ValueError("a pair without a prompt token: nothing predicts the first token of its responses")
    if not all(len(p["chosen_ids"]) and len(p["rejected_ids"]) for p in pairs):
        raise ValueError("a pair with an empty response: the sum over its tokens would be 0, "
                         "the log-probability of certainty")

def collate(
    pairs: list,   # n pairs with prompt_ids, chosen_ids, rejected_ids
    device="cpu",  # where the three tensors go
) -> tuple[Tensor, Tensor, Tensor]:  # each (2n, L), chosen rows first: ids, attention mask, response mask
    """Right-padded rows. Padding is known by length, never by token id.
    Raises ValueError for no pairs, and for a pair without a prompt or with an empty response."""
    check_prompts(pairs)
    chosen = [(list(p["prompt_ids"]), list(p["chosen_ids"])) for p in pairs]
    rejected = [(list(p["prompt_ids"]), list(p["rejected_ids"])) for p in pairs]
    rows = chosen + rejected
    longest = max(len(x) + len(y) for x, y in rows)
    shape = (len(rows), longest)

    ids = torch.zeros(shape, dtype=torch.long)
    seen = torch.zeros(shape, dtype=torch.long)          # 1 for a real token, 0 for padding
    scored = torch.zeros(shape, dtype=torch.bool)        # true for a token of the response
    for i, (x, y) in enumerate(rows):
        end = len(x) + len(y)
        ids[i, :end] = torch.tensor(x + y)
        seen[i, :end] = 1
        scored[i, len(x):end] = True
    return ids.to(device), seen.to(device), scored.to(device)


# %% [markdown]
# Three pairs of unequal lengths make six rows:

# %%
by_length = sorted(pairs, key=lambda p: len(p["prompt_ids"]))
mixed = [by_length[0], pair, by_length[-1]]
ids, seen, scored = collate(mixed)

def letters(seen, scored):  # one row of the masks as text
    kinds = [("." if not m else "R" if r else "p") for m, r in zip(seen, scored)]
    return "".join(kinds)

drawn = [letters(*row) for row in zip(seen, scored)]
names = [f"{side} {i}" for side in ("chosen", "rejected") for i in range(3)]
pd.DataFrame(drawn, index=names, columns=["p prompt, R response, . padding"])

# %% [markdown]
# What if a prompt is empty? Then nothing stands before the first response token, and nothing predicts it. And an empty response? A sum
# of nothing is 0, a valid log-probability, that of certainty; nobody would notice. (`complaint`, of
# [chapter 00](00_world.ipynb), makes a call that must refuse, and returns the message. We shall break many things here.)

# %%
print(complaint(collate, [pair | dict(prompt_ids=[])]))
print(complaint(collate, [pair | dict(chosen_ids=[])]))


# %% [markdown]
# Now the log-probabilities of a batch, in four steps. **Shift** the logits against the ids. **Gather** the log-probability of the
# token that came. **Mask** what is not response. **Sum**. Only response positions go through the softmax, and they go through it
# in fp32 (32-bit floating point; part 2 shows why).

# %%
#| export
def token_logprobs(
    logits: Tensor,  # (m, V) in any dtype; V is the size of the vocabulary
    ids: Tensor,     # (m,) the tokens that came next
) -> Tensor:         # (m,) fp32, nats
    "Log-probability of each token, in fp32."
    return -F.cross_entropy(logits.float(), ids, reduction="none")


# %% [markdown]
# The cross-entropy of a token *is* its negative log-probability, so PyTorch's own function does the gathering. Our first row again:

# %%
read_at = slice(len(x) - 1, len(x) + len(y) - 1)
logits = S(input_ids=torch.tensor([x + y])).logits[0]
got = token_logprobs(logits[read_at], torch.tensor(y))
assert_close(got, logp)
got


# %% [markdown]
# The whole function. We take the model's own `.logits`. A product of hidden states and output matrix, made here, would be cheaper.
# But some architectures scale or cap their logits after that product, and then we would score another model. The price is
# the largest tensor of the pass: rows by length by vocabulary. [Chapter 04](04_packing.ipynb) avoids it and is checked
# against this function. (This cell is not exported yet. In part 2 it learns two more things.)

# %%
def response_logprobs(model, pairs):  # -> (n,) log pi(y_w|x) and (n,) log pi(y_l|x), nats, fp32
    ids, seen, scored = collate(pairs, model.device)
    logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits
    logits, ids, scored = logits[:, :-1], ids[:, 1:], scored[:, 1:]            # shift
    logp = token_logprobs(logits[scored], ids[scored])                         # gather
    rows = torch.zeros(ids.shape, device=logp.device).masked_scatter(scored, logp)  # mask
    return tuple(rows.sum(1).chunk(2))                                         # sum; chosen rows come first


# %% [markdown]
# It must equal the loop over single rows without padding. All later versions meet this same check.

# %%
def by_rows(model, pairs):  # the loop: no batch, no padding, no mask
    def sums(side):
        return torch.stack([one_row(model, p["prompt_ids"], p[side]).sum() for p in pairs])
    return sums("chosen_ids"), sums("rejected_ids")

chosen, rejected = response_logprobs(S, mixed)
assert_close((chosen, rejected), by_rows(S, mixed))
pd.DataFrame({"log p(chosen)": chosen, "log p(rejected)": rejected}).round(3)


# %% [markdown]
# **Why by length and not by token id?** Many tokenizers use the end token for padding, too. If you find padding by its id, you also
# throw away the real end token. Then nobody asks the model whether the response should stop here. Take the right answer and the
# same answer, cut short. Which of the two should be likelier?

# %%
def make_pair(prompt, chosen, rejected):
    def ids(text): return tok(text, add_special_tokens=False).input_ids + [tok.eos_token_id]
    return dict(
        key=f"{prompt}|{chosen}|{rejected}",
        prompt_ids=prompt_ids(tok, prompt),
        chosen_ids=ids(chosen),
        rejected_ids=ids(rejected),
    )

right_and_cut = make_pair("shift deajc", "efbkd", "efb")
endless = right_and_cut | {                              # what `ids != pad` leaves when pad = eos
    "chosen_ids": right_and_cut["chosen_ids"][:-1],
    "rejected_ids": right_and_cut["rejected_ids"][:-1],
}

# %%
by_mask = pd.DataFrame({
    "by length": torch.cat(response_logprobs(S, [right_and_cut])),
    "by id, pad = eos": torch.cat(response_logprobs(S, [endless])),
}, index=["efbkd", "efb"]).T
assert by_mask.loc["by length", "efbkd"] > by_mask.loc["by length", "efb"]
assert by_mask.loc["by id, pad = eos", "efbkd"] < by_mask.loc["by id, pad = eos", "efb"]
by_mask.round(2)


# %% [markdown]
# Without its end token a response is only a beginning. A beginning is never less likely than the whole that it begins, so every
# response that was cut short would win.
#
# ### Gamma
#
# How much more likely is the chosen response $y_w$ (w for "won") than the rejected one $y_l$ ("lost")? The paper on *stepwise DPO* (sDPO), which this
# book follows, writes
#
# $$\gamma_\pi(x, y_w, y_l) = \log \pi(y_w \mid x) - \log \pi(y_l \mid x). \tag{2}$$
#
# The probability of the prompt itself would cancel here, so it is enough to score the responses. What does not cancel is everything
# that the two responses do not share: their length, their style, the tokens that end them.

# %%
#| export
def gamma(
    chosen: Tensor,    # (n,) log pi(y_w|x), nats
    rejected: Tensor,  # (n,) log pi(y_l|x), nats
) -> Tensor:           # (n,) positive where the model prefers the chosen response
    "How much more likely, in nats, the model finds the chosen response (the paper's gamma_pi, equation (2))."
    return chosen - rejected


# %% [markdown]
# When the two responses change places, $\gamma$ changes its sign. (A test at $\gamma = 0$ would never notice a swap.)

# %%
def swapped(p): return p | dict(chosen_ids=p["rejected_ids"], rejected_ids=p["chosen_ids"])

g = gamma(*response_logprobs(S, pairs))
other_way = gamma(*response_logprobs(S, [swapped(p) for p in pairs]))
assert_close(other_way, -g)
{
    "pairs": len(g),
    "mean gamma (nats)": round(g.mean().item(), 2),
    "gamma > 0": round((g > 0).float().mean().item(), 3),
}

# %% [markdown]
# On the source `riddle` S prefers the chosen response about every second time. This will be the hardest source: [chapter
# 05](05_partition.ipynb) orders sources by that share.
#
# > **You may stop here.** These two numbers for each pair, and their difference $\gamma$, are all that the DPO loss needs. It is
# > derived in [chapter 03](03_loss.ipynb). Come back for part 2 when you wonder why two passes over the same pair disagree, and for part 3
# > when you want to align a model of your own.
#
# ## Part 2. The same number every time (you may skip this)
#
# The log-probability of a response depends on the weights and on nothing else: in mathematics. In a computer it also depends on
# how sums are rounded, on the other rows of the batch, and on layers that draw random numbers. This part takes these
# one by one.
#
# Why so much care? DPO looks at *differences* of log-probabilities, between two responses and between two models. The numbers are
# large (hundreds of nats for a real response), and the differences can be a tenth of a nat. So a rounding error that nobody would
# notice in one log-probability can be as large as what you want to measure.
#
# ### Sum or mean?
#
# Some methods divide (1) by the number of tokens. That is not the same number on another scale: it can reverse a preference. Here
# S finds a short, cut answer far more likely than a long, garbled one, as it should. The mean says the opposite.

# %%
short = make_pair("shift deajc", "ef", "cdbk d")         # right: efbkd
lengths = torch.tensor([len(short["chosen_ids"]), len(short["rejected_ids"])])
sums = torch.cat(response_logprobs(S, [short]))
names = [f"chosen: ef, {lengths[0]} tokens", f"rejected: cdbk d, {lengths[1]} tokens"]
sum_and_mean = pd.DataFrame({"sum": sums, "mean": sums / lengths}, index=names)
sum_and_mean.loc["gamma"] = sum_and_mean.iloc[0] - sum_and_mean.iloc[1]
assert sum_and_mean.loc["gamma", "sum"] > 0
assert sum_and_mean.loc["gamma", "mean"] < 0
sum_and_mean.round(2)

# %% [markdown]
# Real pairs do this all the time, because real responses differ in length. Eight of them, asked of SmolLM2-135M-Instruct (the cell
# is skipped in tests, its output is kept):

# %%
#| slow
with skipped_without(
    "SmolLM2-135M-Instruct and pairs of Orca (from the hub, or SDPO_MODEL and SDPO_DATA)",
    "by the sum all eight chosen responses are preferred, by the mean one",
):
    smol = Path(os.environ.get("SDPO_MODEL", "~/.cache/sdpo_nb/smollm2-135m-instruct")).expanduser()
    if not smol.exists(): smol = "HuggingFaceTB/SmolLM2-135M-Instruct"         # no local copy: the hub
    data = Path(os.environ.get("SDPO_DATA", "../../shared/data")) / "preferences" / "orca_dpo_pairs.jsonl.gz"
    if not data.exists(): data = "Intel/orca_dpo_pairs"

    real = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32).requires_grad_(False)
    real_tok = AutoTokenizer.from_pretrained(smol)

    def real_pairs(n, max_length):  # the first n, tokenised
        rows = load_pairs(data, columns={"question": "prompt"}).select(range(n))
        return list(tokenize_pairs(rows, real_tok, "orca", max_length=max_length).pairs)

    eight = real_pairs(8, max_length=768)
    one_by_one = [torch.stack(response_logprobs(real, [p])) for p in eight]
    c, r = torch.cat(one_by_one, 1)
    tokens_c = torch.tensor([len(p["chosen_ids"]) for p in eight])
    tokens_r = torch.tensor([len(p["rejected_ids"]) for p in eight])
    display(pd.DataFrame({
        "tokens chosen": tokens_c,
        "tokens rejected": tokens_r,
        "gamma, sum": c - r,
        "gamma, mean": c / tokens_c - r / tokens_r,
    }).style.format(precision=2))

# %% [markdown]
# By the sum the model prefers all eight chosen responses, and in each pair the chosen one is the shorter. By the mean it prefers one
# of eight. Neither is a verdict about quality: a long text is improbable because it is long.
#
# DPO is derived for the probability of a whole response. It also looks at the *change* of $\gamma$ against a frozen model, the
# *reference* ([chapter 03](03_loss.ipynb)). A length that both models see alike cancels in this change. So the sum is the method. The
# mean is another method and needs another $\beta$ (the number that says how much a nat counts), because its
# differences are smaller by the length of a response.
#
# ### Why is the sum made in fp32?
#
# The number format bf16 (16 bits) keeps eight significant bits. Between 128 and 256 its numbers are one apart. How much does a
# sum lose? Take token log-probabilities of S that are *already rounded to bf16*, so that all sums below add the same numbers,
# and look at 400 of them, as in a response of half a page.

# %%
all_ids, seen, scored = collate(pairs)
next_ids, scored = all_ids[:, 1:], scored[:, 1:]
logits = S(input_ids=all_ids, attention_mask=seen).logits[:, :-1]
values = token_logprobs(logits[scored], next_ids[scored]).bfloat16()

def running_sum(x):  # (orders, tokens), one after another, in the dtype of x
    total, out = torch.zeros_like(x[:, 0]), []
    for column in x.T:
        total = total + column
        out.append(total)
    return torch.stack(out, 1)


# %%
def sum_in(dtype):  # of the first 400 values
    return running_sum(values[None, :400].to(dtype))[0, -1]

fp32 = sum_in(torch.float32)
total = pd.Series({
    "exact": sum_in(torch.float64).item(),
    "fp32": fp32.item(),
    "fp32, kept in bf16": fp32.bfloat16().item(),
    "bf16": sum_in(torch.bfloat16).item(),
}, name="sum of 400 (nats)")
total.to_frame().assign(error=total - total["exact"]).round(5)

# %% [markdown]
# Added one after another in bf16, small terms are rounded away against a large total: the sum comes out nearly seven nats too
# high. A sum made in fp32 and then *stored* in bf16 is a whole number here. How does the error grow with the length? We add the
# same values in thirty random orders:

# %%
orders = torch.stack([values[torch.randperm(len(values))[:2048]] for _ in range(30)])
dtypes = torch.float64, torch.float32, torch.bfloat16
exact, fp32, bf16 = (running_sum(orders.to(dtype)).double() for dtype in dtypes)
errors = {
    "summed in bf16": bf16 - exact,
    "summed in fp32, stored in bf16": fp32.bfloat16().double() - exact,
    "summed in fp32": fp32 - exact,
}

# %% [markdown]
# For each length we take the mean error over the thirty orders:

# %%
lengths = [2 ** k for k in range(3, 12)]                 # 8 to 2048 tokens
means = pd.DataFrame({
    name: error.abs().mean(0)[[n - 1 for n in lengths]]
    for name, error in errors.items()
}, index=pd.Index(lengths, name="tokens"))

# %%
fig, ax = plt.subplots(figsize=(6, 3.4))
above_zero = means.where(means > 0)                      # a logarithmic axis has no zero
sns.lineplot(above_zero, ax=ax, markers=True, dashes=False, legend=False)
on_line = dict(textcoords="offset points", va="center")
for (name, line), color in zip(means.items(), sns.color_palette()):
    ax.annotate(name, (2048, line[2048]), xytext=(8, 0), color=color, **on_line)
ax.axhline(0.1, color="gray", ls=":")
ax.annotate("differences that matter to DPO", (2048, 0.1), xytext=(22, 0), color="gray", **on_line)
ax.annotate("no error up to 32 tokens", (64, 1e-7), xytext=(-125, 0), color=color, size=8, **on_line)
ax.set_xscale("log", base=2)
ax.set_yscale("log")
ax.set_xticks(lengths, lengths)
ax.set(xlabel="tokens in the response", ylabel="mean error of the sum (nats)\nlower is better")
sns.despine()

# %%
assert means.loc[512, "summed in bf16"] > 5
assert means["summed in fp32"].max() < 1e-3
columns = ["summed in bf16", "summed in fp32", "summed in fp32, stored in bf16"]
means.loc[[64, 512, 2048], columns].map("{:.3g}".format)


# %% [markdown]
# The bf16 sum falls behind once the spacing of its numbers exceeds the terms. At 512 tokens it is wrong by some fifteen nats. DPO
# multiplies log-probabilities by $\beta$, often 0.1, and calls the change against the reference the *implicit reward* of a response. Fifteen nats move it
# by 1.5. Storing a good sum in bf16 costs up to half a spacing. In fp32 the question disappears: the line lies far below
# what anybody wants to measure.
#
# ### Do other pairs of the batch matter?
#
# An fp32 sum is only as good as its terms. In a bf16 forward pass, matrix products round differently for different shapes. So a
# pair gets another log-probability when other pairs stand beside it. No weight has changed, and nothing is random.
#
# To see it we need a forward pass in a chosen precision. PyTorch calls this *autocast*: weights stay in fp32, and matrix products
# are computed in half precision (bf16 or fp16).

# %%
#| export
def autocast(
    device,     # where the model is
    precision,  # fp32, bf16 or fp16
):              # a context manager
    "The context in which forward passes of this precision run; fp32 is no context at all."
    if precision == "fp32": return contextlib.nullcontext()
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16)[precision]
    return torch.autocast(torch.device(device).type, dtype)


# %% [markdown]
# One third times one third in the three precisions. One ninth is 0.1111111:

# %%
a = torch.tensor([[1 / 3]])
for precision in ("fp32", "fp16", "bf16"):
    with autocast("cpu", precision): product = a @ a
    print(precision, product.dtype, f"{product.item():.7f}")


# %% [markdown]
# Now the comparison. Each pair is asked alone, then all of them together, and we keep the largest difference. The third number says
# how far the precision is off at all.

# %%
def worst(difference): return difference.abs().max().item()

@torch.no_grad()
def batch_shape(model, pairs):  # the same pairs, alone and together, in two precisions
    rows, exact = {}, None
    for precision in ("fp32", "bf16"):
        with autocast(model.device, precision):
            alone = torch.stack([torch.cat(response_logprobs(model, [p])) for p in pairs], 1)
            together = torch.stack(response_logprobs(model, pairs))
        if exact is None: exact = alone
        rows[precision] = {
            "log p: alone - together": worst(alone - together),
            "gamma: alone - together": worst(gamma(*alone) - gamma(*together)),
            "log p: off fp32": worst(alone - exact),
        }
    return pd.DataFrame(rows).T


# %% [markdown]
# A random Llama of six layers and random responses of 60 to 100 tokens show it. The largest difference over eight pairs, in nats:

# %%
def random_pair(n, vocab=2000):  # n tokens chosen, 160 - n rejected
    lengths = (20 + n // 3, n, 160 - n)
    prompt, chosen, rejected = (torch.randint(0, vocab, (k,)).tolist() for k in lengths)
    return dict(key=str(n), prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected)

config = LlamaConfig(
    vocab_size=2000,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=8,
    initializer_range=0.05,
)
wide = transformers.LlamaForCausalLM(config).eval()

# %%
shapes = batch_shape(wide, [random_pair(n) for n in range(60, 100, 5)])
by_others = ["log p: alone - together", "gamma: alone - together"]
assert shapes.loc["fp32"].max() < 2e-3
assert shapes.loc["bf16", by_others].min() > 10 * shapes.loc["fp32", by_others].max()
shapes.style.format("{:.1g}")

# %% [markdown]
# In fp32 the other pairs of the batch change the fifth decimal place. In bf16 they change the second, and the number itself
# is further off. The real model with its eight real pairs, which are longer:

# %%
#| slow
with skipped_without(
    "SmolLM2-135M-Instruct and pairs of Orca (from the hub, or SDPO_MODEL and SDPO_DATA)",
    "in fp32 another batch changes the fifth decimal place, in bf16 the first",
):
    display(batch_shape(real, eight).style.format("{:.1g}"))

# %% [markdown]
# ### Where does the noise come from?
#
# Under bf16, three things can be rounded to eight bits: the weights, the activations inside the layers, and the logits. The logits of a
# trained language model lie around 20, where the numbers of bf16 are 0.125 apart. That is a coarse ruler for a quantity that we are
# going to add up 400 times.
#
# The logits are also the cheapest of the three to save: only the *last* matrix product has to leave its result in fp32. Its
# factors may stay in half precision, because a matrix product is added up in fp32 anyway and rounded only when it is stored.
#
# Why is the backward pass below written by hand? Autograd would keep fp32 copies of both factors until then, and would
# multiply in fp32. By hand it is the pass that autocast makes: factors in half precision, and no copies.

# %%
#| export
# From this version on, a product on a card can leave its result in fp32.
WIDE_ON_CUDA = torch.__version__ >= torch.torch_version.TorchVersion("2.8")

@contextlib.contextmanager
def _bf16_factors():
    "For a while, a CPU that has units for bf16 multiplies fp32 factors in them. Nothing is lost if they are bf16 numbers already."
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # from torch 2.9 on
    if matmul is None or not torch.backends.mkldnn.is_available():
        yield
        return
    was, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try: yield
    finally: matmul.fp32_precision = was

def _wide_product(
    a: Tensor,  # (m, d) in half precision
    b: Tensor,  # (V, d) in half precision, or such numbers in fp32
) -> Tensor:    # (m, V) fp32
    "a times b transposed, without the rounding at the end."
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and WIDE_ON_CUDA: return torch.mm(a, b.T, out_dtype=torch.float32)
        fast = _bf16_factors() if a.dtype == torch.bfloat16 else contextlib.nullcontext()
        with fast: return a.float() @ b.float().T

class _WideLinear(torch.autograd.Function):
    "A linear layer: factors in half precision, result in fp32. The backward pass is that of autocast."
    @staticmethod
    def forward(ctx, hidden, weight, half, factor):
        ctx.save_for_backward(hidden, half)
        return _wide_product(hidden, factor)

    @staticmethod
    def backward(ctx, grad):
        hidden, half = ctx.saved_tensors
        grad = grad.to(half.dtype)                       # before its two products, as autocast does
        of_hidden = grad @ half
        of_weight = (grad.T @ hidden).float() if ctx.needs_input_grad[1] else None
        return of_hidden, of_weight, None, None


# %% [markdown]
# On a CPU the factors are widened to fp32 before the product. Some CPUs have units that multiply in bf16, several times faster, and PyTorch can be told to use them for fp32 numbers, which it then rounds to bf16. Our factors *are* bf16 numbers already, so this rounding changes nothing. (fp16 numbers have more digits, and for them it is not done.)
#
# A small output layer, with the usual product beside ours. The gradient of the weight comes back in fp32, so that the pieces of a
# batch add up without another rounding.

# %%
luck = torch.Generator().manual_seed(0)
hidden = torch.randn(2, 256, generator=luck).bfloat16()
weight = torch.randn(4, 256, generator=luck).requires_grad_()
half = weight.detach().bfloat16()

rounded = hidden @ half.T
kept = _WideLinear.apply(hidden, weight, half, half)
kept.sum().backward()
assert_close(kept.bfloat16(), rounded)
assert_close(kept, (hidden.double() @ half.double().T).float())     # nothing was rounded to bf16 on the way
assert weight.grad.dtype == torch.float32
pd.DataFrame({"stored in bf16": rounded[0].float(), "stored in fp32": kept[0].detach()})


# %% [markdown]
# How does a model come to use it? We lend its output layer another `forward`, for a while. Some architectures scale or cap
# their logits; they do so after this layer, and so in fp32, too. An output layer that is not plain (adapted or quantised) keeps its own
# way, and so does everything outside autocast.

# %%
#| export
def _half(model):
    "The dtype that autocast computes in at the moment, or None."
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

def is_plain(
    head,      # the output layer of a model
) -> bool:
    "Whether an output layer is a linear layer with a weight of its own, and nothing else."
    return type(head) is torch.nn.Linear and type(head.weight) is torch.nn.Parameter

def half_weight(
    model,                             # any causal LM
) -> tuple[Tensor, Tensor]|None: # the weight in half precision, and as a factor: on a CPU the same numbers in fp32
    "What `fp32_logits` needs of the output layer under autocast; None where the layer keeps its own way."
    head, dtype = model.get_output_embeddings(), _half(model)
    if dtype is None or not is_plain(head): return None
    half = head.weight.detach().to(dtype)
    return half, half if half.is_cuda and WIDE_ON_CUDA else half.float()

@contextlib.contextmanager
def fp32_logits(
    model,       # any causal LM
    known=None,  # `half_weight` of it, if it is at hand
):
    "For a while, let a model under autocast answer with logits that were never rounded to half precision."
    head, known = model.get_output_embeddings(), known or half_weight(model)
    if known is None:
        yield
        return
    half, factor = known
    def forward(hidden):
        rows = hidden.flatten(0, -2).to(half.dtype)
        logits = _WideLinear.apply(rows, head.weight, half, factor)
        logits = logits.unflatten(0, hidden.shape[:-1])
        return logits if head.bias is None else logits + head.bias
    own = {k: f for k, f in vars(head).items() if k == "forward"}    # a hook may have set one on this object
    head.forward = forward
    try: yield
    finally:
        del head.forward
        vars(head).update(own)


# %% [markdown]
# The same logit, once as autocast gives it and once with the lent `forward`:

# %%
with autocast("cpu", "bf16"):
    usual = S(input_ids=all_ids).logits
    with fp32_logits(S): ours = S(input_ids=all_ids).logits
assert usual.dtype == torch.bfloat16
assert ours.dtype == torch.float32
{"a logit of autocast": usual[0, 0, 5].item(), "the same, in fp32": round(ours[0, 0, 5].item(), 6)}


# %% [markdown]
# ### Which models read their neighbours even in fp32?
#
# Most models today tell positions apart by *rotation* (rotary positions). Some stretch the rotation for long texts; their configs
# say "dynamic" or "longrope". They stretch it by the longest row of the batch. So a short row beside a long one is read
# at positions that are not its own. Such a model gets each row alone, as soon as a row is long enough for that.

# %%
#| export
def _configs(config):
    "A config and the configs inside it."
    if not isinstance(config, PretrainedConfig): return []
    found = [config]
    for inner in vars(config).values(): found += _configs(inner)
    return found

def _rope_settings(config):
    "Settings of the rotary positions: one for all layers, or one for each kind of layer."
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [r for r in [rope, *rope.values()] if isinstance(r, dict)]

def _stretched_from(config):
    "Lengths of a row from which the rotary positions of a config depend on the longest row."
    for c in _configs(config):
        for rope in _rope_settings(c):
            kind = rope.get("rope_type") or rope.get("type") or ""
            if "dynamic" in kind:
                yield c.max_position_embeddings
            if kind == "longrope":
                original = rope.get("original_max_position_embeddings")
                original = original or getattr(c, "original_max_position_embeddings", None)
                yield original or c.max_position_embeddings

def _longest(pair):
    "Tokens of the longer of the two rows of a pair."
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))

def must_read_alone(
    model,        # any causal LM
    pairs: list,  # those of one batch
) -> bool:
    "Whether a row of these pairs would be read differently beside the others."
    limit = min(_stretched_from(getattr(model, "config", None)), default=None)
    return limit is not None and max(map(_longest, pairs)) >= limit


# %% [markdown]
# A model whose positions stretch beyond 32 tokens, and a short pair beside a long one:

# %%
config = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=32,
    rope_parameters=dict(rope_type="dynamic", factor=4., rope_theta=1e4),
    initializer_range=0.2,
)
stretched = transformers.LlamaForCausalLM(config).requires_grad_(False).eval()
few = dict(prompt_ids=[5] * 6, chosen_ids=[6, 7, 8], rejected_ids=[9, 10])
many = dict(prompt_ids=[5] * 20, chosen_ids=[6, 7] * 15, rejected_ids=[8, 9] * 15)
beside = [few, many]

# %% [markdown]
# The short pair alone is safe, and the two together are not. S does not stretch, so no pair of S is ever read alone.

# %%
assert must_read_alone(stretched, beside)
assert not must_read_alone(stretched, [few])             # nothing is long enough to stretch
assert not must_read_alone(S, pairs)
list(_stretched_from(config))

# %% [markdown]
# ### The readable function, finished
#
# What must `response_logprobs` of part 1 do so that its numbers depend on the weights alone? Two things: keep the logits in fp32, and
# read a row alone where its neighbours would change it. Outside autocast, and for other models, they change nothing. (The version
# of part 1 keeps a name, so that we can compare.)

# %%
usual_logprobs = response_logprobs


# %%
#| export
def _row_sums(model, ids, seen, scored):  # (rows,)
    "Shift, gather, mask, sum."
    logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits
    logits, ids, scored = logits[:, :-1], ids[:, 1:], scored[:, 1:]
    logp = token_logprobs(logits[scored], ids[scored])
    rows = torch.zeros(ids.shape, device=logp.device).masked_scatter(scored, logp)
    return rows.sum(1)

def _forget_longest(model):
    "Some models remember the longest row so far; now they do not."
    for module in model.modules():
        for name in list(vars(module)):
            if name.endswith("max_seq_len_cached"): setattr(module, name, 0)

def _one_by_one(model, pairs, ids, seen, scored):
    "The rows of a batch, each without its padding."
    chosen = [len(p["prompt_ids"]) + len(p["chosen_ids"]) for p in pairs]
    rejected = [len(p["prompt_ids"]) + len(p["rejected_ids"]) for p in pairs]
    for i, n in enumerate(chosen + rejected):
        _forget_longest(model)
        yield ids[i:i+1, :n], seen[i:i+1, :n], scored[i:i+1, :n]

def response_logprobs(
    model,        # a causal LM; gradients flow
    pairs: list,  # n pairs with prompt_ids, chosen_ids, rejected_ids
) -> tuple[Tensor, Tensor]:  # (n,) log pi(y_w|x) and (n,) log pi(y_l|x), nats, fp32
    """Summed log-probabilities of both responses of each pair: the padded version that everybody can read.
    Source: equation (1). Raises ValueError for no pairs, and for a pair without a prompt or with an empty response."""
    batch = collate(pairs, model.device)
    parts = _one_by_one(model, pairs, *batch) if must_read_alone(model, pairs) else [batch]
    with fp32_logits(model):
        sums = torch.cat([_row_sums(model, *part) for part in parts])
    return tuple(sums.chunk(2))


# %% [markdown]
# The same check as before, and then the stretched model:

# %%
assert_close(response_logprobs(S, mixed), by_rows(S, mixed))
assert_close(response_logprobs(stretched, beside), by_rows(stretched, beside))

# %% [markdown]
# What would the usual batch have said of the stretched model? The long pair is right in all three columns. The short pair is wrong
# where it shares a batch:

# %%
first_of = {
    "one batch": usual_logprobs(stretched, beside)[0],
    "alone": response_logprobs(stretched, beside)[0],
    "plain rows": by_rows(stretched, beside)[0],
}
read_as = pd.DataFrame(first_of, index=["short", "long"])
assert abs(read_as.loc["short", "one batch"] - read_as.loc["short", "plain rows"]) > 1e-2
read_as.round(2)


# %% [markdown]
# ### What does each rounding cost?
#
# Weights, activations, logits: which of the three is worth saving? Round one thing after the other, and look at the distance from
# the log-probability for which nothing was rounded.

# %%
@contextlib.contextmanager
def rounded_weights(model):  # for a while; computing stays in fp32
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters(): p.data = p.data.bfloat16().float()
    try: yield
    finally:
        for n, p in model.named_parameters(): p.data = kept[n]

@torch.no_grad()
def where_from(model, pairs):  # root mean square distance from fp32, nats per response
    def ask_all(logprobs): return torch.cat([torch.cat(logprobs(model, [p])) for p in pairs])
    exact, got = ask_all(response_logprobs), {}
    with rounded_weights(model):
        got["rounded weights, computed in fp32"] = ask_all(response_logprobs)
    with autocast("cpu", "bf16"):
        got["bf16, logits in fp32"] = ask_all(response_logprobs)
        got["bf16, logits too"] = ask_all(usual_logprobs)
    distance = {name: (values - exact).square().mean().sqrt().item() for name, values in got.items()}
    return pd.Series(distance)


# %%
where = where_from(wide, [random_pair(n) for n in range(60, 100, 5)])
where.round(3).to_frame("random Llama (nats)")

# %% [markdown]
# Here fp32 logits buy nothing, because a random model's logits are small. A trained model is sure of itself: its logits are large, and
# so is their rounding. Real pairs, their rows (a prompt with one response) cut at two lengths:

# %%
#| slow
with skipped_without(
    "SmolLM2-135M-Instruct and pairs of Orca (from the hub, or SDPO_MODEL and SDPO_DATA)",
    "in bf16, a response in a row of at most 256 tokens is off by 0.35 nats, with logits in fp32 by 0.27",
):
    torch.set_num_threads(os.cpu_count())
    by_cut = {n: where_from(real, real_pairs(40, max_length=n)[:12]) for n in (256, 768)}
    torch.set_num_threads(1)
    found = pd.DataFrame({f"{n} tokens at most": where for n, where in by_cut.items()})
    assert (found.loc["bf16, logits in fp32"] < found.loc["bf16, logits too"]).all()
    display(found.round(2))


# %% [markdown]
# Errors that are independent of each other add up in squares. So the longer a response, the further off it is, roughly by the square
# root of its length: rows of three times the length are off 2.0, 1.56 and 1.26 times as far. With the logits in fp32 a part of the error
# is gone; the part of weights and activations stays.
#
# Two passes that must agree (reference and trained model before the first step) agree only as well as that. [Chapter
# 06](06_trainer.ipynb) measures how well, before it calls a table wrong. Hence two rules: logits, softmax and sum are always
# fp32, and a table remembers the precision it was computed in.
#
# ### Where does dropout hide?
#
# Dropout sets random activations to zero while a model is in train mode. Log-probabilities must not depend on it: they are a
# property of the weights. It is not enough to use eval mode, because gradient checkpointing (which saves memory) works in train mode only.
# Many checkpoints come with dropout at zero, so code that forgets it works, until somebody loads one that does not.
#
# Dropout hides in four places: the config (under many names, also in configs inside it), float attributes of modules, `nn.Dropout`
# modules, and whole layers left out. `dropouts` only looks, so you can see what was found before anything is changed. It goes by a
# pattern, because architectures agree on the word but not on what they write around it.

# %%
#| export
def _is_dropout(owner, name):
    "Whether an attribute is a dropout probability, by its name; `p` only in PyTorch's dropout modules."
    if re.search("dropout|pdrop|layerdrop|drop_prob|drop_path", name): return True
    return name == "p" and isinstance(owner, torch.nn.modules.dropout._DropoutNd)

def dropouts(
    model,           # any model
) -> list[tuple]:    # (config or module, name of its attribute)
    "Every dropout probability of a model, wherever it is kept."
    owners = _configs(getattr(model, "config", None)) + list(model.modules())
    found = []
    for owner in owners:
        for name, value in vars(owner).items():
            is_number = type(value) in (int, float)
            if is_number and _is_dropout(owner, name): found.append((owner, name))
    return found


# %% [markdown]
# We shall ask ten architectures, tiny and random, each with every dropout of its config at 0.1. The last two have experts. What
# does it find in GPT-2?

# %%
sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
grouped = sizes | dict(num_key_value_heads=2)
kinds = {
    "llama": sizes,
    "gpt2": dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
    "opt": sizes | dict(ffn_dim=64, word_embed_proj_dim=32),
    "bloom": dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "gpt_neox": sizes,
    "mistral": grouped,
    "qwen2": grouped,
    "falcon": sizes,
    "phimoe": grouped | dict(num_local_experts=4),
    "mixtral": grouped | dict(num_local_experts=4, router_jitter_noise=0.1),
}

def random_model(kind, dropout=0.1):
    config = AutoConfig.for_model(kind, **kinds[kind], pad_token_id=0, bos_token_id=1, eos_token_id=0)
    for c in _configs(config):
        for name, value in vars(c).items():
            if isinstance(value, float) and _is_dropout(c, name): setattr(c, name, dropout)
    return transformers.AutoModelForCausalLM.from_config(config)


# %% [markdown]
# Eleven numbers in two kinds of places. If you set only those of the config, the seven modules keep theirs, because they were built before.

# %%
with torch.random.fork_rng():                            # leaves the random numbers to the table below
    noisy = random_model("gpt2")
places = [f"{type(owner).__name__}.{name}" for owner, name in dropouts(noisy)]
pd.Series(places).value_counts(sort=False).to_frame("times")


# %% [markdown]
# `freeze_dropout` sets them all to zero. One thing needs another cure. A model with experts may also shake its *router* (the layer that
# picks the experts) in train mode; this noise is called "jitter". Zero is no cure there: PhiMoE uses the same number to decide in eval mode,
# too. So a module with such a number is held in eval mode, whatever mode the rest is in.

# %%
#| export
def _in_eval_mode(module, inputs): module.training = False

def _is_noisy(module):
    "Whether a module has an amplitude of noise."
    for name, value in vars(module).items():
        if type(value) in (int, float) and re.search("jitter|noise", name): return True
    return False

def freeze_dropout(
    model,  # any model; it is changed
):          # the same model
    """Set every dropout probability of a model to zero, in config and modules,
    and keep its noisy modules in eval mode."""
    came_with = model.__dict__.setdefault("_came_with", [])
    for owner, name in dropouts(model):
        value = getattr(owner, name)
        if value and not isinstance(owner, torch.nn.Module): came_with.append((owner, name, value))
        setattr(owner, name, type(value)(0))             # an int stays an int
    for module in filter(_is_noisy, model.modules()):
        held = _in_eval_mode in module._forward_pre_hooks.values()
        if not held: module.register_forward_pre_hook(_in_eval_mode)
    return model

@contextlib.contextmanager
def own_config(
    model, # of `freeze_dropout`
):
    "While it is saved: the config says of dropout what it said when the model came."
    came_with = getattr(model, "_came_with", [])
    for owner, name, value in came_with: setattr(owner, name, value)
    try: yield
    finally:
        for owner, name, value in came_with: setattr(owner, name, type(value)(0))


# %% [markdown]
# Whoever is given the aligned model may fine-tune it with dropout, so its file must not say zero. `own_config` puts the old numbers back while the model is saved.

# %%
probabilities = [noisy.config.attn_pdrop]
freeze_dropout(noisy)
probabilities.append(noisy.config.attn_pdrop)
with own_config(noisy): probabilities.append(noisy.config.attn_pdrop)
probabilities.append(noisy.config.attn_pdrop)
assert probabilities == [0.1, 0, 0.1, 0]
probabilities

# %% [markdown]
# Two questions to each architecture. Do two forward passes in train mode agree to the last bit? Does the padded batch still equal
# single rows?

# %%
uneven = [
    dict(prompt_ids=[5, 6, 7], chosen_ids=[8, 9, 0], rejected_ids=[10, 11, 12, 13, 0]),
    dict(prompt_ids=[5], chosen_ids=[14, 0], rejected_ids=[0]),
]

@torch.no_grad()
def ask(kind):
    model = random_model(kind).train()
    def score(): return torch.cat(response_logprobs(model, uneven))
    names = {name for _, name in dropouts(model)}
    before = torch.equal(score(), score())
    freeze_dropout(model)
    after = torch.equal(score(), score())
    error = worst(score() - torch.cat(by_rows(model, uneven)))
    return {
        "found": ", ".join(sorted(names)),
        "same before": before,
        "same after": after,
        "padded - single (nats)": error,
    }


# %%
asked = pd.DataFrame({kind: ask(kind) for kind in kinds}).T
assert not asked["same before"].any()
assert asked["same after"].all()
assert asked["padded - single (nats)"].max() < 1e-4
asked.style.format({"padded - single (nats)": "{:.0e}"}).set_properties(**{"text-align": "left"})

# %% [markdown]
# Every model disagreed with itself before, and none does afterwards. Padding costs at most the last digits of fp32, whether positions are
# learned (GPT-2, OPT), rotated (Llama) or added to the attention (BLOOM). The `p` in the table belongs to `nn.Dropout`. In rows without
# it, zeroing these modules alone would have changed nothing.
#
# What about an architecture that is not in this table? The guard stands elsewhere: [chapter 06](06_trainer.ipynb) compares the first
# loss of a training with the one that the reference implies.
#
# ## Part 3. The reference is a table (engineering, you may stop here)
#
# DPO compares the model in training (the *policy*) with a frozen model (the *reference*). The usual way keeps both in
# memory. But only two numbers per pair are ever asked of the reference. So we ask once, beforehand, and write them down. Then no second
# model is needed. Here is the whole idea, in two lines:

# %%
chosen, rejected = response_logprobs(S, pairs)
reference = pd.DataFrame({"chosen": chosen, "rejected": rejected}, index=[p["key"] for p in pairs])
reference.head(3).round(3)

# %% [markdown]
# > **You may stop here.** In the chapters that follow you will meet `load_model(folder)`, which loads a model, and
# > `score_pairs(model, pairs)`, which makes such a table and keeps it in a folder. It is a table of these two columns. That is
# > all you need to know to read on.
#
# What is missing? A table of numbers is only as good as what is known about it. Which model was it, and was it whole? How were the
# numbers computed? What is left of the table when the computer is switched off in the middle? The rest of this part answers such
# questions, one a section: first about the model, then about the table, then about the pass that fills it. It is engineering: you
# need it to trust a run with a model of your own, not to understand DPO.
#
# ### Is this a model at all?
#
# A mistyped path must not be taken for the name of a model on the hub. The answer would be a long wait and then a message about the
# network. Two words with a slash between can be both a path and a hub id; there, a folder that exists wins.
# A folder with a *PEFT adapter* holds a few small weights that go on top of a model ([chapter 09](09_lora.ipynb)); it is no whole model.

# %%
#| export
MERGE = "has a PEFT adapter; merge it first: merge_and_unload()"

def _find_model(model):
    "A folder that is a model, or what can only be a hub id: a local path never reaches the hub."
    p = Path(model).expanduser()
    if (p / "adapter_config.json").exists():
        raise ValueError(f"{model}: {MERGE}, then save_pretrained into a folder of its own")
    if p.is_dir():
        if (p / "config.json").exists(): return str(p)
        raise ValueError(f"{model}: a folder without config.json is not a model")
    relative = str(model).startswith((".", "~"))
    if p.exists() or p.is_absolute() or relative or len(p.parts) > 2:
        raise ValueError(f"{model}: no such model folder; give a folder with config.json, "
                         "or a hub id such as 'HuggingFaceTB/SmolLM2-135M-Instruct'")
    return str(model)


# %% [markdown]
# Three names that cannot be right, and one that can be a hub id. Nothing is downloaded here: this function only looks at the name and
# the disk.

# %%
tmp = tempfile.TemporaryDirectory()
home = Path(tmp.name)
(home / "empty").mkdir()
for name in (home / "empty", "./nowhere", "runs/first/model"): print(complaint(_find_model, name))
_find_model("somebody/some-model")                       # may be a hub id

# %% [markdown]
# Much can be wrong with a folder. Where a file is to blame, we look for it: one that Git LFS never fetched (LFS keeps large files
# elsewhere and leaves a *pointer*, a text of three lines), half a file, broken JSON. But only among those that were read. A folder
# holds many others, such as a trainer's log, and if we blamed one of these, nobody would hear what is really wrong.

# %%
#| export
OF_TOKENIZER = "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model"

def _files_read(folder, kind):
    "The files of a folder that a class of transformers reads."
    names = ["config.json"]
    if kind is AutoTokenizer: names += OF_TOKENIZER
    if kind is AutoModelForCausalLM:
        safe = any(folder.glob("model*.safetensors*"))   # then no other format is read
        names += ["model*.safetensors*"] if safe else ["pytorch_model*.bin*"]
    return sorted(p for name in names for p in folder.glob(name) if p.is_file())

def _is_pointer(path):
    "Whether a file is what Git LFS leaves in the place of a large one."
    with open(path, "rb") as f: return f.read(40).startswith(b"version https://git-lfs")

def _read_whole(path):
    "Read a file; raises where it is not what its name says."
    if path.suffix == ".json": json.loads(path.read_text())
    if path.suffix == ".safetensors":
        with safe_open(path, "pt"): pass
    if path.suffix == ".bin": torch.load(path, "meta", weights_only=True)

def _broken_file(folder, kind):
    """What is wrong with the first broken file of those that a class of transformers reads, or None.
    Raises PermissionError for one that you may not read: nothing is known about it."""
    for path in _files_read(Path(folder), kind):
        try:
            if _is_pointer(path):
                return f"{path.name} is a Git-LFS pointer, not the file itself; fetch it with `git lfs pull`"
            _read_whole(path)
        except PermissionError as e:
            raise PermissionError(f"{path}: you have no right to read this file; its owner can give it") from e
        except Exception as e:
            return f"{path.name} is broken or not complete ({type(e).__name__}); copy or download it again"


# %% [markdown]
# Two folders that are no model. Each is a copy of S with one file changed. In the first a file is to blame; in the second,
# two files do not belong together, and `load_model` will see that, below.

# %%
def spoil(name, file, content=None, **settings):  # other text, or other settings
    folder = Path(shutil.copytree(world.base, home / name))
    if content is None:
        before = json.loads((folder / file).read_text())
        content = json.dumps(before | settings)
    (folder / file).write_text(content)

spoil("not-fetched", "model.safetensors", "version https://git-lfs.github.com/spec/v1\n")
spoil("other-sizes", "config.json", vocab_size=56)

assert _broken_file(world.base, AutoModelForCausalLM) is None
assert _broken_file(home / "not-fetched", AutoTokenizer) is None   # which reads no weights
_broken_file(home / "not-fetched", AutoModelForCausalLM)


# %% [markdown]
# For everything else the libraries have exceptions of their own, seldom with the name of a file in them. Here all become one line that begins
# with the folder. A model that wants to bring Python code of its own is refused: that code is never run here.

# %%
#| export
def _one_line(text):
    words = " ".join(text.split())
    return words if len(words) < 300 else words[:words.rfind(" ", 0, 300)] + " ..."

def _reason(e):
    "What an exception of a library means."
    said = str(e)
    if "trust_remote_code" in said:
        return ("wants Python code of its own (auto_map in its config), which is never run here; "
                "take an architecture that transformers has")
    if "couldn't connect" in said.lower():
        return ("is no folder here, and the hub cannot be reached (or HF_HUB_OFFLINE is set); "
                "download the model, and give its folder")
    if "backend tokenizer" in said:
        return ("has no tokenizer that can be read (no tokenizer.json); "
                "save one beside the model: tokenizer.save_pretrained(folder)")
    return f"cannot be loaded ({type(e).__name__}: {_one_line(said)})"

def memory_ended(
    e: Exception, # of any library
) -> bool:
    "Whether it says that memory ended. PyTorch has an exception for that on a card, on a CPU only words."
    ended = any(words in str(e) for words in ("out of memory", "allocate memory"))
    return ended or isinstance(e, (MemoryError, torch.OutOfMemoryError))

@contextlib.contextmanager
def _loading(model, kind):
    """What the libraries throw, as a ValueError of one line that begins with the model, or as a
    PermissionError; their own report is silent meanwhile."""
    report = logging.getLogger("transformers.modeling_utils")
    before, report.disabled = report.disabled, True
    try: yield
    except Exception as e:
        if memory_ended(e): raise
        why = _broken_file(Path(model).expanduser(), kind) or _reason(e)
        raise ValueError(f"{model}: {why}") from e
    finally: report.disabled = before


# %% [markdown]
# A tensor that the checkpoint lacks is worse than an error. The library fills it with random numbers and goes on. That happens to every
# folder without an output layer, such as a reward model. The library does keep a report of what it found, and we read it:

# %%
#| export
def _check_report(model, report):
    """Raise ValueError for a tensor that a checkpoint lacks or has in another shape;
    print one line about those that are left over."""
    mismatched = sorted((name, tuple(a), tuple(b)) for name, a, b in report["mismatched_keys"])
    missing = sorted(report["missing_keys"])
    unused = sorted(report["unexpected_keys"])
    if mismatched:
        name, there, wanted = mismatched[0]
        raise ValueError(f"{model}: {name} is {there} in the checkpoint, but config.json asks for {wanted} "
                         f"({len(mismatched)} such); the two do not belong together")
    if missing:
        raise ValueError(f"{model}: the checkpoint has no {missing[0]} ({len(missing)} missing); "
                         "it would be random. Give a complete causal language model")
    if unused:
        print(f"{model}: {len(unused)} tensors of the checkpoint are not used, the first is {unused[0]}")


# %% [markdown]
# Such a report by hand. A tensor too many is told and left out; a tensor too few is refused:

# %%
report = dict(mismatched_keys=[], missing_keys=[], unexpected_keys=[])
_check_report("a sound model", report)                   # says nothing
_check_report("a value model", report | dict(unexpected_keys=["value.weight"]))
print(complaint(_check_report, "a reward model", report | dict(missing_keys=["lm_head.weight"])))


# %% [markdown]
# ### In which precision does it come?
#
# A folder saved in bf16 comes back in bf16 when nobody objects. Weights in bf16 hardly move at a learning rate of 5e-7, while the loss looks
# fine ([chapter 06](06_trainer.ipynb) watches them). So trained weights are fp32 here, always, and `stored_dtype` tells what the folder had.

# %%
#| export
def _from_pretrained(kind, model, revision, **kw):
    "Never with code that comes from the model."
    found = _find_model(model)
    if revision and not Path(found).is_dir(): kw["revision"] = revision
    with _loading(model, kind), _no_bar(hide=Path(found).is_dir()):
        return kind.from_pretrained(found, trust_remote_code=False, **kw)

@contextlib.contextmanager
def _no_bar(hide):
    "Reading a folder is short; a download from the hub keeps its bar."
    shown = hide and bars.is_progress_bar_enabled()
    if shown: bars.disable_progress_bar()
    try: yield
    finally:
        if shown: bars.enable_progress_bar()

def load_config(
    model: str,          # hub id or folder
    revision: str=None,  # of a hub id: a branch, a tag or a commit
):                       # a config of transformers
    "What a model is made of, without its weights. Raises ValueError, in one line, where there is none."
    return _from_pretrained(AutoConfig, model, revision)

def load_tokenizer(
    model: str,          # hub id or folder
    revision: str=None,  # of a hub id: a branch, a tag or a commit
):                       # a tokenizer of transformers
    "The tokenizer that lies with a model. Raises ValueError, in one line, where there is none."
    return _from_pretrained(AutoTokenizer, model, revision)

def stored_dtype(
    model: str,          # hub id or folder
    revision: str=None,  # of a hub id: a branch, a tag or a commit
) -> torch.dtype:        # fp32 where the config does not say
    "The dtype in which a model lies on disk."
    dtype = load_config(model, revision).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


# %% [markdown]
# S is stored in fp32. We save a copy of it in bf16, which is used twice below:

# %%
half_S = transformers.AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.bfloat16)
half_S.save_pretrained(home / "half")
{
    "S is stored in": stored_dtype(world.base),
    "its copy is stored in": stored_dtype(home / "half"),
    "layers of S": load_config(world.base).num_hidden_layers,
    "tokens of S": len(load_tokenizer(world.base)),
}

# %% [markdown]
# ### Where does a pass run, and how exactly does it compute?
#
# On the graphics card, if there is one. But a model as tiny as ours stays on the CPU: on a card, starting a computation
# takes longer than the arithmetic in it.

# %%
#| export
SMALL = 5_000_000  # parameters; below, a CPU is faster than a graphics card

def best_device(
    model,  # any model
) -> str:   # cuda or cpu
    """Where a loaded model goes when nobody says where:
    to the graphics card, if there is one and the model is not tiny."""
    tiny = sum(p.numel() for p in model.parameters()) < SMALL
    return "cuda" if torch.cuda.is_available() and not tiny else "cpu"


# %% [markdown]
# And in which precision should it compute? bf16 saves time and memory only where the hardware has it. Emulated, it is slower than
# fp32 and no more exact. So we ask the hardware and not the library: on some graphics cards "supported" includes emulation. If you name a precision, you get it.

# %%
#| export
def pick_precision(
    precision: str="auto",  # auto, bf16, fp16 or fp32
    device: str="cpu",      # where the pass runs
) -> str:                   # bf16, fp16 or fp32
    """bf16 where the hardware really has it, else fp16 on CUDA, else fp32.
    Raises ValueError for an unknown name."""
    if precision not in ("auto", "bf16", "fp16", "fp32"):
        raise ValueError(f"precision: {precision!r} is none of auto, bf16, fp16, fp32")
    if precision != "auto": return precision
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if has_bf16 else "fp32"


# %%
assert best_device(S) == "cpu"                           # S is tiny
assert pick_precision("fp16") == "fp16"                  # you get what you name
assert pick_precision("auto") in ("bf16", "fp32")        # of this CPU
complaint(pick_precision, "float8")


# %% [markdown]
# Now a model can be loaded. Its weights are fp32; in which precision a pass computes, each pass is told when it begins.

# %%
#| export
def has_adapter(
    model,  # any model
) -> bool:
    "Whether a model carries adapters of PEFT (chapter 09)."
    return getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config")

def load_model(
    model: str,          # hub id or folder
    device: str=None,    # default: `best_device` of the model
    revision: str=None,  # of a hub id: a branch, a tag or a commit
):                       # causal LM with fp32 weights and no dropout, in eval mode
    """Load in fp32 whatever the folder's dtype. Raises ValueError, in one line, for what is not a complete
    causal language model."""
    how = dict(dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)
    loaded, report = _from_pretrained(AutoModelForCausalLM, model, revision, **how)
    _check_report(model, report)
    if has_adapter(loaded): raise ValueError(f"{model}: {MERGE}")
    soft_cap = getattr(loaded.config.get_text_config(), "attn_logit_softcapping", None)
    # Gemma 2 caps the logits of its attention.
    # Before transformers 5.23, other implementations than this one leave the cap out.
    if soft_cap: loaded.set_attn_implementation("eager")
    return freeze_dropout(loaded).to(device or best_device(loaded))


# %% [markdown]
# The copy in bf16, and the folder whose two files do not belong together:

# %%
assert load_model(home / "half", "cpu").dtype == torch.float32
complaint(load_model, home / "other-sizes")


# %% [markdown]
# ### Which model was it?
#
# A name or a path can lie, and a trainer that reloads its reference by name gets the wrong model after the first stage. The bytes
# of the weights cannot lie. So we hash them: a *hash* is a short number made of many bytes, which is another one as soon as one bit
# differs. Weights that a model uses in two places (tied weights) count once.
#
# The same model can lie on disk in bf16 and in memory in fp32. Then its bytes differ. With `dtype` we hash the weights as they would be
# in another dtype, and can compare the two.

# %%
#| export
def weights_hash(
    model,       # any model
    dtype=None,  # hash the weights as they would be in this dtype
) -> str:        # 16 hex digits
    "sha256 over sorted parameter names, dtypes, shapes and bytes."
    h = hashlib.sha256()
    for name, p in sorted(model.named_parameters(), key=lambda item: item[0]):
        p = p.detach().to(dtype or p.dtype)
        h.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        flat = p.cpu().contiguous().reshape(-1)
        h.update(flat.view(torch.uint8).numpy().data)
    return h.hexdigest()[:16]


# %% [markdown]
# Does the hash survive saving and loading? Does it notice one bit?

# %%
S.save_pretrained(home / "S")
moved = load_model(home / "S", "cpu")
hashes = {"S": weights_hash(S), "saved and loaded": weights_hash(moved)}
with torch.no_grad():
    moved.model.norm.weight[0] *= 1 + 2 ** -23           # the last bit of one weight
hashes["one bit changed"] = weights_hash(moved)
assert hashes["S"] == hashes["saved and loaded"]
assert hashes["S"] != hashes["one bit changed"]
pd.Series(hashes, name="weights_hash").to_frame()


# %% [markdown]
# ### Can it be trained?
#
# A folder is not the only way in. A run also takes a model that lies in memory; it saves it, and loads it again before the first stage.
# Whatever the folder cannot hold would be lost on the way: an adapter, a class of your own, the choice of weights that are
# frozen. So we look beforehand at what would be lost. (On the device "meta" a model has shapes and no numbers. That is enough to
# ask which of its weights want a gradient.)

# %%
#| export
def _other_class(model):
    "Why this model would not come back with its class if it were saved and loaded, or None."
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), ())
    if not isinstance(known, tuple): known = (known,)
    if name.startswith("transformers_modules."): known = ()  # code of its own: with it no folder is trusted
    if type(model) in known: return None
    back = f"comes back as {known[0].__name__}" if known else "cannot be loaded again"
    return (f"its class {name} {back}: "
            "a model with code of its own, or with another head, cannot be trained here")

def _frozen_weights(model):
    "Which weights are frozen, and would not be after loading, or None."
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    if not frozen: return None
    with torch.device("meta"): fresh = type(model)(model.config)
    frozen -= {n for n, p in fresh.named_parameters() if not p.requires_grad}  # these never want a gradient
    if not frozen: return None
    return (f"{sorted(frozen)[0]} has requires_grad=False ({len(frozen)} such), and would be trained "
            "all the same: every stage trains all weights. model.requires_grad_(True) allows it")


# %% [markdown]
# Is the model causal? An encoder such as BERT can be loaded as a causal language model. It then reads the very answer that it is asked
# about. We can find out by asking: two rows begin with the same four tokens and go on differently. If the logits of the first four
# differ, the model looks ahead. A causal model may differ by rounding only, so the answer is measured in units of what it may
# change: the logits of the tokens that do differ. For this, and for every pass below, the model is in eval mode for a while, and
# afterwards in whatever mode it was.

# %%
#| export
@contextlib.contextmanager
def _evaluating(model):
    "Eval mode for a while, then whatever mode it was."
    was_training = model.training
    model.eval()
    try: yield
    finally: model.train(was_training)

@torch.no_grad()
def _looks_ahead(model, prefix=4, rest=8):
    "How far the logits of a prefix move with what follows, relative to how far those of what follows move."
    names = ("pad_token_id", "bos_token_id", "eos_token_id")   # these may mean more than a token
    special = [getattr(model.config, name, None) for name in names]
    usual = [i for i in range(3, 60) if i not in special]
    size = model.get_input_embeddings().weight.shape[0]
    rows = []
    for follows in usual[prefix:prefix + 2]:
        row = usual[:prefix] + [follows] * rest
        rows.append([i % size for i in row])
    with _evaluating(model):
        logits = model(input_ids=torch.tensor(rows, device=model.device), use_cache=False).logits.float()
    moved = (logits[0] - logits[1]).abs().amax(-1)       # one number a position
    return (moved[:prefix].max() / moved[prefix:].max().clamp(min=1e-9)).item()


# %% [markdown]
# Would it lose an adapter, would it come back as it is, is it causal? The three questions in one:

# %%
#| export
def check_model(
    model,  # a model in memory
):
    """Raise ValueError for a model with an adapter, one that would not come back from a folder as it is,
    and one that is not causal."""
    if has_adapter(model): raise ValueError(f"model: {MERGE}, then requires_grad_(True)")
    lost = _other_class(model) or _frozen_weights(model)
    if lost: raise ValueError(f"model: {lost}")
    rounding = 1e-3 if model.dtype == torch.float32 else 0.05
    if _looks_ahead(model) > rounding:
        raise ValueError(f"model: {type(model).__name__} is not causal: what it says about a token changes "
                         "with the tokens after it. Take a decoder")


# %% [markdown]
# A sound model passes in silence. Three do not: one with a frozen embedding, one of a class of your own (it would come back as a
# plain Llama, without whatever the class adds), and a small random BERT.

# %%
class Mine(transformers.LlamaForCausalLM): pass          # a class of your own

bert = transformers.AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **sizes))
check_model(moved)
moved.model.embed_tokens.requires_grad_(False)
for model in (moved, Mine(S.config), bert): print(complaint(check_model, model))


# %% [markdown]
# ### Does it have room for the pairs?
#
# Some models keep their positions in a table, and have no row for a longer text. Some have an embedding that is shorter than their
# tokenizer, and no row for the last tokens. On a graphics card both end the process, an hour into a run. Rotary positions have no
# end; there, a row beyond what the model was made for is worth a line.

# %%
#| export
def _has_position_table(model, limit):
    "Whether the positions of a model are rows of a table; some begin with a few that are never used."
    usual_names = r"wpe|pos\w*_embed|embed_pos|pos_encoding"
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        is_table = re.search(usual_names, name) and t.ndim == 2
        if is_table and limit <= t.shape[0] <= limit + 8: return True
    return False

def check_rows(
    model,            # a model in memory
    longest: int,     # tokens of the longest row: a prompt with one response
    largest_id: int,  # of any token in the rows
):
    """Raise ValueError for rows longer than the model's table of positions, and for a token that its
    embedding lacks; print a line for rows beyond its context."""
    tokens = model.get_input_embeddings().weight.shape[0]
    config = model.config.get_text_config()
    ends = config.model_type == "mpt"                    # adds its positions to the attention, from a table
    limit = config.max_seq_len if ends else getattr(config, "max_position_embeddings", None)
    if largest_id >= tokens:
        raise ValueError(f"model: token {largest_id} is in the pairs, but the embedding has {tokens} rows; "
                         "take the model's own tokenizer, or resize_token_embeddings(len(tokenizer))")
    if not limit or longest <= limit: return
    if ends or _has_position_table(model, limit):
        raise ValueError(f"model: rows of up to {longest} tokens, but it has {limit} positions; "
                         f"set max_length={limit}")
    print(f"model: rows of up to {longest} tokens go beyond the {limit} that it was made for; "
          f"max_length={limit} keeps within")


# %% [markdown]
# S has rotary positions and was made for 128 tokens. The GPT-2 here has a table of 32 positions and an embedding of 64 tokens:

# %%
longest = max(map(_longest, pairs))
check_rows(S, longest, len(tok) - 1)                     # says nothing
check_rows(S, 500, len(tok) - 1)
gpt2_config = AutoConfig.for_model("gpt2", **kinds["gpt2"], n_positions=32)
gpt2 = transformers.AutoModelForCausalLM.from_config(gpt2_config)
print(complaint(check_rows, gpt2, 47, 0), complaint(check_rows, gpt2, 12, 64), sep="\n")


# %% [markdown]
# ### What is in the table?
#
# One row per pair: two numbers, found by the pair's *key*. A key is a hash of the pair's token ids ([chapter
# 01](01_preferences.ipynb)). Another tokenizer, another boundary between prompt and response, another length limit: they all make other
# keys. The keys of a whole data set, in their order, make one hash more.

# %%
#| export
def keys_of(
    pairs,         # a list or a Dataset
) -> list[str]:    # one key per pair
    "The keys of pairs, without reading their ids."
    if hasattr(pairs, "column_names"): return pairs["key"][:]
    return [p["key"] for p in pairs]

def pairs_hash(
    *sets,   # lists or Datasets of pairs
) -> str:    # 16 hex digits
    "sha256 over the keys of pairs, in their order."
    keys = [key for pairs in sets for key in keys_of(pairs)]
    return hashlib.sha256("".join(keys).encode()).hexdigest()[:16]


# %% [markdown]
# The hash of a data set does not care how the set is cut. It does care about the order, because training does:

# %%
assert pairs_hash(pairs[:2], pairs[2:]) == pairs_hash(pairs)
assert pairs_hash(pairs[::-1]) != pairs_hash(pairs)
keys_of(pairs[:3])


# %% [markdown]
# The table itself. It has two parts: the rows, and the `kind`, which says how they were computed (next section). You may ask for its
# pairs in any order.

# %%
#| export
@dataclass
class LogprobTable:
    """Log-probabilities of one model for many pairs, and how they were computed. Its numbers are on the CPU;
    what compares them with a policy moves them to the policy (chapter 03)."""
    kind: dict          # weights, config, precision, device, attention, logprobs
    rows: pd.DataFrame  # index: pair key; columns chosen, rejected (nats, fp32)

    def lookup(
        self,
        pairs,                   # n pairs with keys: a list or a Dataset
    ) -> tuple[Tensor, Tensor]:  # (n,) log pi(y_w|x) and (n,) log pi(y_l|x), nats, fp32
        "The two numbers of each pair. Raises ValueError for a pair without a row."
        keys = keys_of(pairs)
        absent = [k for k in keys if k not in self.rows.index]
        if absent:
            raise ValueError(f"{len(absent)} of {len(keys)} pairs are not in the table of log-probabilities, "
                             f"the first is {absent[0]}; score them with score_pairs")
        def numbers(side): return torch.tensor(self.rows.loc[keys, side].to_numpy("float32", copy=True))
        return numbers("chosen"), numbers("rejected")

    def gamma(
        self,
        pairs,      # n pairs with keys: a list or a Dataset
    ) -> Tensor:    # (n,) nats
        "Gamma of each pair. Raises ValueError for a pair without a row."
        return gamma(*self.lookup(pairs))


# %% [markdown]
# A table made by hand, and a pair that it does not hold. A pair without a row must be an error. A default of zero would be a valid
# log-probability, that of certainty, and nobody would notice.

# %%
numbers = {"chosen": [-1., -2.], "rejected": [-4., -1.]}
by_hand = LogprobTable(kind={}, rows=pd.DataFrame(numbers, index=["a", "b"], dtype="float32"))
print("gamma:", by_hand.gamma([dict(key="b"), dict(key="a")]).tolist())
print(complaint(by_hand.gamma, [dict(key="a"), dict(key="c")]))

# %% [markdown]
# ### When are two tables the same?
#
# When the same weights, under the same config, were asked in the same way. (The config belongs to it: the length of an attention
# window, say, is no weight.) All this is written down as the *kind* of a table:
#
# - `weights`: the hash of the weights;
# - `config`: a hash of the config;
# - `precision`: fp32, bf16 or fp16;
# - `device`: cpu or cuda, because they round differently;
# - `attention`: which implementation of attention was used, for the same reason;
# - `logprobs`: the name of the function that computed the numbers.
#
# Saving a model writes into its config, for example the name of its class. What changes no number is left out of the kind, or a model would
# lose its table by being saved. The size of a batch is not part of the kind either. In fp32 it does not matter. In bf16 it moves
# the numbers by what you saw in part 2, and one table is as good as another.

# %%
#| export
NO_NUMBER = """_name_or_path architectures auto_map dtype torch_dtype transformers_version
    id2label label2id problem_type output_attentions output_hidden_states return_dict
    use_cache initializer_range task_specific_params""".split()  # of a config: changes no log-probability

def _of_numbers(config):
    "What of a config, and of the configs inside it, can change a log-probability."
    if not isinstance(config, dict): return config
    return {k: _of_numbers(v) for k, v in config.items() if k not in NO_NUMBER}

def table_kind(
    model,           # any causal LM
    precision: str,  # fp32, bf16 or fp16
    logprobs,        # (model, pairs) -> (chosen, rejected); a named function
) -> dict:           # weights, config, precision, device, attention, logprobs
    "What must agree for two tables to be the same."
    config = json.dumps(_of_numbers(model.config.to_dict()), sort_keys=True, default=str)
    attention = getattr(model.config, "_attn_implementation", None)
    return dict(
        weights=weights_hash(model),
        config=hashlib.sha256(config.encode()).hexdigest()[:16],
        precision=precision,
        device=model.device.type,
        attention=getattr(logprobs, "attention", attention),  # a function may bring its own
        logprobs=logprobs.__name__,
    )


# %% [markdown]
# Three tables of S. In the second we changed the name of the class in the config, in the third a number of the rotary positions. The weights
# are the same in all three:

# %%
renamed, shorter = (load_model(world.base, "cpu") for _ in range(2))
renamed.config.architectures = ["SomethingElse"]         # a name
shorter.config.rope_parameters["rope_theta"] = 500.      # a number
kinds_of = {
    "S": table_kind(S, "fp32", response_logprobs),
    "renamed": table_kind(renamed, "fp32", response_logprobs),
    "other positions": table_kind(shorter, "fp32", response_logprobs),
}
assert kinds_of["S"] == kinds_of["renamed"]
assert kinds_of["S"] != kinds_of["other positions"]
pd.DataFrame(kinds_of)

# %% [markdown]
# ### What if the disk is full?
#
# Whatever a run writes, it writes under another name and renames it at the end. The system renames a file in one step, and there is no
# moment in between. So a kill leaves the old file or the new one, never half of one. Before the renaming we wait until the file lies
# on the disk (`fsync`). Otherwise the power might go while the new name stands over a file whose contents the system still holds back.
#
# A folder cannot be renamed over another one. So the old one is put aside, the new one takes its place, and only then the old one goes.
#
# Every library reports a full disk in its own way; here it becomes one line. The other name is ours alone, `.state.pt.tmp` beside
# `state.pt`, so that nothing of yours lies there. It is not trusted: whatever lies there goes first, so that nobody can make us
# write through a link.

# %%
#| export
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

def _why(e) -> str:
    """What went wrong in writing. torch raises a RuntimeError while it handles the true error;
    safetensors says the number in its text."""
    cause = e
    while cause and not isinstance(cause, OSError): cause = cause.__context__
    said = str(e).splitlines()[0]
    full = getattr(cause, "errno", None) in FULL or any(f"os error {n})" in said for n in FULL)
    if full: return "disk full?"
    return getattr(cause, "strerror", None) or said

def _remove(path):
    "A file, a folder or a link, if there is one. What a link points to stays."
    if path.is_symlink() or path.is_file(): path.unlink()
    elif path.is_dir(): shutil.rmtree(path)

def _to_disk(path):
    "Wait until a file, or what is in a folder, lies on the disk."
    for p in [path, *path.rglob("*")]:
        if p.is_file() and os.access(p, os.W_OK):        # a copy may be read-only; Windows wants it open for writing
            with open(p, "r+b") as f: os.fsync(f.fileno())

@contextlib.contextmanager
def replacing(
    path,  # of a file or a folder
):         # yields a name in the same folder, where nothing is
    """Write a file or folder under another name; it then takes the place of the old one.
    Raises OSError where it cannot be written, and leaves nothing half-written."""
    path = Path(path)
    tmp, aside = (path.with_name(f".{path.name}{ending}") for ending in (".tmp", ".old.tmp"))
    try:
        _remove(tmp)
        yield tmp
        _to_disk(tmp)
        if path.is_dir():
            _remove(aside)
            os.replace(path, aside)
        os.replace(tmp, path)
        _remove(aside)
    except (OSError, RuntimeError, SafetensorError) as e:
        raise OSError(f"{path}: could not be written ({_why(e)})") from e
    finally: _remove(tmp)


# %% [markdown]
# The disk is full in the middle of a file. The old file stays, and nothing else:

# %%
(home / "run").mkdir()
old = home / "run" / "state.pt"
old.write_text("the old one")

def write_half():
    with replacing(old) as new:
        new.write_text("half of the new")
        raise OSError(errno.ENOSPC, "No space left on device")

print(complaint(write_half))
assert old.read_text() == "the old one"
sorted(p.name for p in old.parent.iterdir())


# %% [markdown]
# ### How does a table lie on disk?
#
# As a folder: `kind.json`, and *pieces* of a few hundred rows, each written in this way. Why pieces? One file could only be written at the
# end, and a kill would cost the whole pass. With pieces it costs one of them. They are numbered, and a new one gets a number above all
# that are there, so none is ever overwritten.

# %%
#| export
def write_json(
    path,  # of the file
    data,  # what JSON can hold
):
    "Write a whole file, or nothing."
    with replacing(path) as tmp: tmp.write_text(json.dumps(data, indent=1) + "\n")

def write_lines(
    path,  # of the file; its folder is made
    rows,  # what JSON can hold, a line each
):
    "Write a whole file of lines, or nothing."
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as tmp, open(tmp, "w", encoding="utf-8", newline="\n") as f:
        for row in rows: f.write(json.dumps(row, ensure_ascii=False) + "\n")

def lines_of(
    found: bytes, # of a file of lines
    path,         # of the file, for messages
) -> list:        # what each line holds; empty lines hold nothing
    "What `write_lines` wrote. Raises ValueError with the line that cannot be read."
    rows = []
    for number, line in enumerate(found.split(b"\n"), 1):
        if not line.strip(): continue
        try: rows.append(json.loads(line))
        except ValueError as e: raise ValueError(f"{path}, line {number}: not JSON; take the line out") from e
    return rows

def _write_piece(folder, rows):
    "One file more, with a number that no other piece has."
    found = [re.match(r"logprobs-(\d+)", p.name) for p in Path(folder).glob("logprobs-*.parquet")]
    numbers = [int(m[1]) for m in found if m]
    path = Path(folder) / f"logprobs-{max(numbers, default=-1) + 1:05}.parquet"
    with replacing(path) as tmp: rows.to_parquet(tmp, write_page_checksum=True)


# %% [markdown]
# Reading is the other way round: all pieces, one below the other. A disk can lose a bit without saying so. The files
# (Parquet) therefore carry a *checksum* of each page, a small number that no longer fits when a bit of the page has changed.
# (`tests/test_logprobs.py` flips one bit in one number of a piece, and it is noticed.)

# %%
#| export
def _no_rows():
    no_keys = pd.Index([], dtype=str)
    return pd.DataFrame({"chosen": [], "rejected": []}, index=no_keys, dtype="float32")

def _read_piece(path):
    "A piece of a table. Its checksums are compared: a bit that flipped in a number makes another number."
    rows = pd.read_parquet(path, page_checksum_verification=True)
    if list(rows.columns) != ["chosen", "rejected"]:
        raise ValueError(f"its columns are {', '.join(map(repr, rows.columns))}")
    return rows

def _read_pieces(folder):
    "The rows of all pieces; of a key that occurs twice, the first."
    parts = [_no_rows()]
    for p in sorted(Path(folder).glob("logprobs-*.parquet")):
        try: parts.append(_read_piece(p))
        except PermissionError: raise
        except Exception as e:
            raise ValueError(f"{p}: cannot be read ({e}); delete this file and run again") from e
    rows = pd.concat(parts)
    return rows[~rows.index.duplicated()]


# %% [markdown]
# Rows without a kind are numbers that nobody can trust. So a folder without a readable `kind.json` is no table:

# %%
#| export
def _read_kind(folder):
    "The kind of a table; empty where none can be read."
    try: kind = json.loads((Path(folder) / "kind.json").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError): return {}
    return kind if isinstance(kind, dict) else {}

def read_table(
    folder,            # where `score_pairs` kept it
) -> LogprobTable:
    "A table as it lies on disk. Raises ValueError where there is none, and for a piece that cannot be read."
    kind = _read_kind(folder)
    if not kind:
        raise ValueError(f"{folder}: no table of log-probabilities here (kind.json is missing or broken)")
    return LogprobTable(kind, _read_pieces(folder))


# %% [markdown]
# Let us write the table made by hand, its only piece twice, and read it: each key is there once. In the other folder nothing lies.

# %%
folder = home / "by-hand"
folder.mkdir()
write_json(folder / "kind.json", dict(weights="made by hand"))
for _ in range(2): _write_piece(folder, by_hand.rows)
assert len(read_table(folder).rows) == 2
print(*sorted(p.name for p in folder.iterdir()))
print(complaint(read_table, home / "empty"))


# %% [markdown]
# ### What if the folder holds another table?
#
# Before a pass the folder is opened. What a kill left half-written goes, silently, because it was never part of the table. Pieces of another
# kind, or of a kind that nobody knows, go too, and this is said.
#
# The order matters. Old pieces are removed first, then the new kind is written, then the first new piece. At whatever moment the process
# dies, what lies there is what it says it is.

# %%
#| export
def _changes(old, new):
    "In what two kinds differ, as text."
    names = [k for k in new | old if old.get(k) != new.get(k)]
    return ", ".join(f"{k} {old.get(k, 'unknown')} -> {new.get(k)}" for k in names)

def _open_table(folder, kind):
    "The rows of this kind that are already there."
    if folder is None: return _no_rows()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for p in folder.glob(".logprobs-*.tmp"): p.unlink()
    old = _read_kind(folder)
    if old != kind:
        pieces = list(folder.glob("logprobs-*.parquet"))
        if pieces: print(f"{folder}: table of another kind ({_changes(old, kind)}); computed again")
        for p in pieces: p.unlink()
        write_json(folder / "kind.json", kind)
    return _read_pieces(folder)


# %% [markdown]
# We leave half a piece in the folder, and open it twice: first with its own kind, then with another one.

# %%
(folder / ".logprobs-00002.parquet.tmp").write_bytes(b"half a piece")
with contextlib.chdir(home):
    same = _open_table("by-hand", dict(weights="made by hand"))
    other = _open_table("by-hand", dict(weights="deaa", precision="bf16"))
assert len(same) == 2
assert len(other) == 0
sorted(p.name for p in folder.iterdir())


# %% [markdown]
# ### Which pairs go into one batch?
#
# As many as fit a *budget of tokens*. Then memory is bounded whatever the lengths; a number of pairs would bound nothing.
# But what counts as a token? A padded batch costs all its cells, padding included:

# %%
#| export
def padded_tokens(
    pairs: list,  # those of one batch
) -> int:         # tokens, padding included
    "Cells of the padded batch of these pairs: rows times the longest row."
    return 2 * len(pairs) * max(map(_longest, pairs))

response_logprobs.tokens = padded_tokens                 # how this function counts what a batch costs

# %%
ids, seen, scored = collate(mixed)
assert padded_tokens(mixed) == ids.numel()
{"cells": padded_tokens(mixed), "tokens": int(seen.sum())}


# %% [markdown]
# Another function may count otherwise: the packed rows of [chapter 04](04_packing.ipynb) have no padding. So each says how it
# counts (its `tokens`). Long pairs come first, so that pairs of like length share a batch and little is padded.

# %%
#| export
def micro_batches(
    pairs: list,  # tokenised pairs
    budget: int,  # tokens in a forward pass; a pair that is longer goes alone
    logprobs=response_logprobs,  # its `tokens`, if it has them, say what pairs cost; else padded cells count
) -> list[list]:  # batches of pairs
    "Cut pairs into batches that fit a budget, long pairs first."
    tokens = getattr(logprobs, "tokens", padded_tokens)
    batches = []
    for p in sorted(pairs, key=_longest, reverse=True):
        if batches and tokens(batches[-1] + [p]) <= budget: batches[-1].append(p)
        else: batches.append([p])
    return batches


# %% [markdown]
# How much does sorting save? We cut the same pairs once by the budget, and once as they come, as many in a batch as the first batch has:

# %%
batches = micro_batches(pairs, 400)
n = len(batches[0])
as_they_come = [pairs[i:i+n] for i in range(0, len(pairs), n)]
assert max(map(padded_tokens, batches)) <= 400
assert sorted(p["key"] for b in batches for p in b) == sorted(keys_of(pairs))
{
    "batches": len(batches),
    "cells, by length": sum(map(padded_tokens, batches)),
    "cells, as they come": sum(map(padded_tokens, as_they_come)),
}


# %% [markdown]
# While a graphics card computes, the processor has nothing to do. It may as well put together what the card gets next. `ahead` makes one
# thing while the one before it is in use. It is one ahead and no more, so that at most two of them lie in memory.
#
# `prepared` does this with batches. The packed version of [chapter 04](04_packing.ipynb) has something to prepare (its rows); the padded
# version of this chapter has not.

# %%
#| export
def ahead(
    make,   # item -> what is wanted
    items,  # anything that can be gone through once
):          # yields make(item) for each, in order
    "The next one is made in a thread while the last one is in use."
    with ThreadPoolExecutor(1) as thread:
        coming = None
        for item in items:
            after, coming = coming, thread.submit(make, item)
            if after: yield after.result()
        if coming: yield coming.result()

def prepared(
    model,     # any causal LM
    parts,     # batches of pairs
    logprobs,  # its `prepare`, where it has one, is (model, pairs) -> what it takes in their place
):             # yields (pairs, what `logprobs` takes for them)
    "Batches one after the other; a function that can make its input beforehand (`prepare`) does."
    make = getattr(logprobs, "prepare", lambda model, pairs: pairs)
    return ahead(lambda pairs: (pairs, make(model, pairs)), parts)


# %% [markdown]
# While the first thing is in use, the second has been begun:

# %%
begun, in_use = [], {}

def square(n):
    begun.append(n)
    return n * n

for result in ahead(square, range(4)):
    time.sleep(0.05)                                     # the use
    in_use[result] = f"begun: {begun}"
assert list(in_use) == [0, 1, 4, 9]
assert list(ahead(str, [])) == []
in_use

# %% [markdown]
# ### Does it find the same bits again?
#
# A run that is killed and goes on must find the same bits. On a CPU it does. Some operations of a graphics card add up in an order of their
# own, unless they are told not to. Where one has no other way, PyTorch warns, and [chapter 06](06_trainer.ipynb) finds out
# beforehand.

# %%
#| export
# What the matrix products of a card need for it; read when they are first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

@contextlib.contextmanager
def same_bits(
    device,              # of the model
    on: bool=True,       # False: do nothing
    strict: bool=False,  # raise RuntimeError where an operation cannot, instead of a warning
):
    "For a while, a graphics card computes the same bits every time. A CPU does so anyway."
    if not on or torch.device(device).type != "cuda":
        yield
        return
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    torch.utils.deterministic.fill_uninitialized_memory = False  # new memory is written before it is read
    try: yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=only_warned)
        torch.utils.deterministic.fill_uninitialized_memory = filled


# %% [markdown]
# The setting is PyTorch's own and global. It is on inside, for a graphics card only, and afterwards as it was:

# %%
with same_bits("cuda"): assert torch.are_deterministic_algorithms_enabled()
with same_bits("cpu"): assert not torch.are_deterministic_algorithms_enabled()
assert not torch.are_deterministic_algorithms_enabled()


# %% [markdown]
# ### When will it be done?
#
# A bar shows where one pass is. What you want to know is when *all* of the work will be done. That is a matter of counting: tokens that are
# left, and seconds that a token took so far. First the tokens:

# %%
#| export
def pair_tokens(
    pairs,         # a list or a Dataset of n pairs
    responses=False, # count the chosen and the rejected response only
) -> np.ndarray:   # (n,)
    "Tokens of each pair: prompt, chosen and rejected response."
    names = ["chosen_ids", "rejected_ids"] + ["prompt_ids"] * (not responses)
    if not hasattr(pairs, "column_names"):
        return np.array([sum(len(p[name]) for name in names) for p in pairs], int)
    counts = []
    for block in pairs.select_columns(names).with_format("arrow").iter(10_000):
        counts.append(sum(pc.list_value_length(ids).to_numpy() for ids in block.columns))
    return np.concatenate(counts) if counts else np.zeros(0, int)


# %% [markdown]
# The prompt counts once, though a padded batch holds it twice; for telling the time this is as good. Now the time. A clock knows
# what is left, and learns its speed from what is done:

# %%
#| export
@dataclass
class Clock:
    "How long the work still takes, told by how long it took so far."
    left: float       # tokens that are still to be computed
    done: float = 0.  # tokens
    spent: float = 0. # seconds

    def tick(
        self,
        tokens: float,   # that were computed
        seconds: float,  # that they took
    ):
        "So many tokens more are done, and took so long."
        self.left = max(0., self.left - tokens)
        self.done += tokens
        self.spent += seconds

    def skip(
        self,
        tokens: float,  # that need not be computed
    ):
        "So many were done before."
        self.left = max(0., self.left - tokens)

    def __str__(self):
        if not self.done: return "time left unknown"
        seconds = self.left * self.spent / self.done
        return f"{tqdm.format_interval(seconds)} left"


# %% [markdown]
# A clock that is told about three batches of a hundred tokens, the last of them a slow one. Then two hundred tokens turn out to be done
# already.

# %%
clock = Clock(left=1000)
said = {"before": str(clock)}
for batch, seconds in enumerate((7, 7, 16), 1):
    clock.tick(tokens=100, seconds=seconds)
    said[f"batch {batch}: {seconds} s"] = str(clock)
clock.skip(200)
said["200 done before"] = str(clock)
assert said["batch 1: 7 s"] == "01:03 left"
said


# %% [markdown]
# ### What do you see while it runs?
#
# A bar draws itself by returning to the beginning of its line. In a file, where the log of a night's run goes, nothing returns: all the
# bars stand one behind the other, in a line of some kilobytes. So where the output is no terminal, each state becomes a line of its own,
# one every half a minute. And a pass that has nothing to do shows no bar. (The lines go where the error output went when the bar was
# made. While the harness of [chapter 15](15_benchmarks.ipynb) is silenced, it goes nowhere.)
#
# The bar itself is tqdm's. `progress` only chooses among four shapes: nothing, a terminal, a notebook, a log.

# %%
#| export
class _Lines:
    "A file that tqdm writes to where there is no terminal: each state that it shows becomes a line."
    def __init__(self): self.out = sys.stderr            # of now: later it may be sent elsewhere for a while
    def write(self, text):
        if text := text.replace("\r", "").strip(): print(text, file=self.out, flush=True)
    def flush(self): self.out.flush()

EVERY = 30  # seconds between two lines of a log

def progress(
    total: int,         # units of work, all together
    desc: str,          # what is being done
    unit: str,          # what is counted, in the singular
    done: int=0,        # of the total, before
    leave: bool=False,  # the full bar stays on the screen
):                      # a tqdm bar; what `set_postfix_str` gets stands behind it
    "A bar in a terminal or a notebook, lines elsewhere, nothing where nothing is left to do."
    how = dict(total=total, initial=done, desc=desc, unit=unit)
    if total == done: return tqdm(**how, disable=True)
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns or 80
        shape = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
        return tqdm(**how, leave=leave, ncols=width, bar_format=shape)
    if issubclass(tqdm, tqdm_notebook):
        return tqdm(**how, leave=leave, bar_format="{desc} {bar} {n_fmt}/{total_fmt}{postfix}")
    shape = "{desc}: {n_fmt} of {total_fmt} {unit}s{postfix}"
    return tqdm(**how, leave=False, file=_Lines(), delay=EVERY, mininterval=EVERY, bar_format=shape)


# %% [markdown]
# The same bar, in a terminal and in a log. Every `\r` is a return to the beginning of the line.

# %%
def heard(lines):
    log = io.StringIO()
    shape = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}"
    with contextlib.redirect_stderr(log):
        how = dict(file=_Lines() if lines else log, mininterval=0, ncols=40, bar_format=shape, disable=False)
        for _ in text_bar(range(2), "S reads digest", **how): time.sleep(0.01)
    return log.getvalue()

in_terminal, in_log = heard(lines=False), heard(lines=True)
assert in_terminal.count("\r") > 2
assert "\r" not in in_log
assert progress(7, "S reads digest", "pair", done=7).disable
print("terminal:", repr(in_terminal), "log:", in_log, sep="\n")


# %% [markdown]
# ### The pass
#
# Everything is there. First the numbers of one batch. A number that is not finite must not get into a table.

# %%
#| export
def _score_batch(model, batch, inputs, precision, logprobs):
    "Key -> chosen, rejected. Raises ValueError for a number that is not finite."
    with autocast(model.device, precision):
        values = torch.stack(logprobs(model, inputs), 1)
    keys = keys_of(batch)
    for key, finite in zip(keys, values.isfinite().all(1).tolist()):
        if not finite:
            raise ValueError(f"log-probability of pair {key} is not finite in {precision}; "
                             "look at this pair and at the weights")
    return dict(zip(keys, values.tolist()))


# %% [markdown]
# The three pairs of part 1. Then the same with one infinite weight:

# %%
print(_score_batch(S, mixed, mixed, "fp32", response_logprobs))
broken = load_model(world.base, "cpu").requires_grad_(False)
broken.model.norm.weight[0] = float("inf")
complaint(_score_batch, broken, mixed, mixed, "fp32", response_logprobs)


# %% [markdown]
# And all of them. Read it from top to bottom; every line but a few is a call of something that you have met:
#
# 1. say what kind of table this will be, and open the folder;
# 2. find the pairs that have no row; a key that occurs twice is scored once;
# 3. tell the clock how much that is;
# 4. for each piece: cut it into batches, score them, move the bar, write the piece.
#
# Each piece is written as soon as it is scored. Long pairs come first in it, so a batch that does not fit into memory fails at the
# beginning of its piece.

# %%
#| export
@torch.no_grad()
def score_pairs(
    model,             # any causal LM
    pairs,             # tokenised pairs, with keys: a list or a Dataset; the same key twice is scored once
    folder=None,       # where the table is kept, in pieces; a killed pass goes on from there
    precision="fp32",  # fp32, bf16, fp16, or auto
    logprobs=response_logprobs,  # (model, pairs) -> (chosen, rejected); a named function
    token_budget=4096, # tokens in a forward pass
    piece=512,         # pairs a file
    desc="scoring",    # what the bar says
    clock: Clock=None, # of the work that this pass is a part of; None: this pass alone
) -> LogprobTable:     # these pairs, and whatever else the folder holds
    """One pass of a model over pairs. A folder that holds a table of another kind is computed again,
    saying so. Raises ValueError for a number that is not finite, and for fp32 with weights that are not."""
    precision = pick_precision(precision, model.device)
    half = {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16}
    if half and precision == "fp32":
        raise ValueError(f"precision: fp32, but the model has weights in {half.pop()} and computes in it; "
                         "load it with load_model, or call model.float()")
    kind = table_kind(model, precision, logprobs)
    rows = _open_table(folder, kind)
    keys = pd.Index(keys_of(pairs))
    no_row = ~keys.isin(rows.index) & ~keys.duplicated()
    todo = no_row.nonzero()[0].tolist()
    total = keys.nunique()
    if todo:                                             # many passes find everything there: no count
        tokens = pair_tokens(pairs)
        left = tokens[todo].sum()
        if clock is None: clock = Clock(left)
        else: clock.skip(tokens.sum() - left)

    with _evaluating(model), same_bits(model.device), progress(total, desc, "pair", total - len(todo)) as bar:
        for start in range(0, len(todo), piece):
            part = [pairs[i] for i in todo[start:start + piece]]
            new, since = {}, time.perf_counter()
            for batch, inputs in prepared(model, micro_batches(part, token_budget, logprobs), logprobs):
                new |= _score_batch(model, batch, inputs, precision, logprobs)
                now = time.perf_counter()
                clock.tick(pair_tokens(batch).sum(), now - since)
                since = now
                bar.set_postfix_str(str(clock), refresh=False)
                bar.update(len(batch))
            new = pd.DataFrame.from_dict(new, orient="index", columns=["chosen", "rejected"], dtype="float32")
            rows = pd.concat([rows, new])
            if folder: _write_piece(folder, new)
    return LogprobTable(kind, rows)


# %% [markdown]
# Does the table say what the two lines at the beginning of this part said, and what the loop over single rows says?

# %%
table = score_pairs(S, pairs)
assert_close(table.lookup(pairs), (chosen, rejected))
assert_close(table.lookup(mixed), by_rows(S, mixed))
table.rows.head(3).round(3)

# %% [markdown]
# A table must not say fp32 where the model computed in bf16. Our copy of S still has its weights in bf16, as `from_pretrained` leaves
# them. What would be off, and who says so?

# %%
off = gamma(*response_logprobs(half_S.requires_grad_(False), pairs)) - table.gamma(pairs)
assert off.abs().max() > 0.1
print(f"gamma is off by up to {off.abs().max():.1f} nats")
print(complaint(score_pairs, half_S, pairs))

# %% [markdown]
# How much smaller is the table than the model it replaces? Eight bytes a pair, whatever the size of the model. The same table also tells how
# often the model prefers the chosen response. So the pass that orders the sources ([chapter 05](05_partition.ipynb)) is also the
# pass that makes the first reference.

# %%
{
    "bytes of S": S.get_memory_footprint(),
    "bytes of the numbers in its table": table.rows.to_numpy().nbytes,
    "pairs": len(table.rows),
}


# %% [markdown]
# ### What if it is killed?
#
# A pass over a large data set is long enough to be interrupted, and too long to begin again. Here the model is watched: `watch` counts the
# pairs that it is asked about, and pulls the plug after a given number. We leave half a piece behind, too, as a kill while writing would.

# %%
@contextlib.contextmanager
def watch(model, stop=float("inf")):
    asked = []
    def hook(module, args, kwargs):
        if sum(asked) >= stop: raise KeyboardInterrupt
        asked.append(len(kwargs["input_ids"]) // 2)      # two rows a pair
    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try: yield asked
    finally: handle.remove()

some = pairs[:100]
small = dict(piece=16, token_budget=400)
with contextlib.suppress(KeyboardInterrupt), watch(S, stop=56) as first:
    score_pairs(S, some, home / "table", **small)
(home / "table" / ".logprobs-00003.parquet.tmp").write_bytes(b"half a piece")
{"pairs asked": sum(first), "rows on disk": len(read_table(home / "table").rows)}

# %% [markdown]
# Three whole pieces survive; the half piece is lost. The next call asks for the missing pairs only, and the table is the same, bit for bit,
# as one from a pass that was never interrupted.

# %%
with watch(S) as second: continued = score_pairs(S, some, home / "table", **small)
with watch(S) as third: whole = score_pairs(S, some + some[:10], **small)
assert sum(third) == 100
assert continued.rows.equals(whole.rows)
assert not list((home / "table").glob("*.tmp"))
{"asked the second time": sum(second), "asked for all of them, ten pairs twice": sum(third)}

# %%
#| hide
tmp.cleanup()

# %% [markdown]
# ## What you now have
#
# - `response_logprobs`: the log-probability of both responses of a pair, in fp32, equal to a loop over single rows on ten
#   architectures.
# - `fp32_logits`, `freeze_dropout` and `must_read_alone`: what keeps precision, dropout and the rest of a batch out of the numbers.
# - `gamma`, their difference: the one number that the loss, the partition and the report are made of.
# - `load_model`, `check_model` and `check_rows`: a model that is whole, can be trained, and has room for the pairs; or one line that
#   says why not.
# - `score_pairs` and `read_table`: the reference as a table that knows which weights it came from and goes on after a kill.
# - Tools that later chapters use: `micro_batches` cuts a batch by a budget of tokens, `replacing` writes a file whole or not at all, `same_bits` makes a
#   computation repeatable, `Clock` and `progress` say how long it will take.
#
# ## Questions to test yourself
#
# 1. Which position's logits score the first response token? Which position is never read?
#
# <details><summary>Answer</summary>
#
# The last position of the prompt: the logits at position $i$ speak about token $i+1$. The last position of the row is never read, because
# no token follows it.
# </details>
#
# 2. Why does the probability of the prompt not appear in $\gamma$? What would change in (1) if we scored the prompt, too?
#
# <details><summary>Answer</summary>
#
# Both responses have the same prompt. With the prompt scored, (1) would be $\log \pi(x) + \log \pi(y \mid x)$. Each of the two
# numbers would change by the same $\log \pi(x)$, and their difference would stay what it is.
# </details>
#
# 3. A colleague's log-probabilities are all multiples of two. What happened?
#
# <details><summary>Answer</summary>
#
# They were summed or stored in bf16. It keeps eight significant bits, so between 256 and 512 its numbers are two apart.
# </details>
#
# 4. Two tables are of the same kind, computed in bf16. The rows of one pair differ by 0.2 nats. Name two harmless reasons.
#
# <details><summary>Answer</summary>
#
# The pair stood beside other pairs: another token budget, another size of the pieces, or a pass over other pairs. (Not a pass that was
# killed and continued: only whole pieces survive, so its batches are the same.) Or the table was made on another card or with another
# version of PyTorch, which multiplies in another order: the kind names the type of device and no more.
# </details>
#
# 5. The reference of the second stage must be the model after the first. By mistake it was loaded from the folder of the model before
#    training. How does its table give this away?
#
# <details><summary>Answer</summary>
#
# The `kind` of the table holds the hash of the weights that it was made with. It is the hash of the untrained model, and not that of
# the model after the first stage.
# </details>
#
# ## Try this
#
# Change the cell, run the notebook from there, and look.
#
# - Pad on the left in `collate`, and run the architecture table again. Which models notice? Then pass `position_ids` to the model.
#
# <details><summary>What you should see</summary>
#
# At first only GPT-2 notices, by 0.2 nats: it numbers positions from the left end of the row and so counts the padding. With
# `position_ids=(seen.cumsum(1) - 1).clamp(min=0)` it is right again. OPT and BLOOM count positions by the attention mask, and to rotary
# models only differences of positions matter. The check of the stretched model fails in both cases, for another reason:
# `_one_by_one` cuts the padding off on the right.
# </details>
#
# - Replace the sum by the mean in the last `response_logprobs`. Which checks of this chapter fail?
#
# <details><summary>What you should see</summary>
#
# Those that compare with the loop over rows: the one right under the function, the column "padded - single" of the architecture table (by
# 16 nats), and the one of the finished table in part 3. Nothing else fails. Hashes, kinds, pieces and kills do not know what was
# summed: a table of means is as whole as a table of sums, and wrong.
# </details>
#
# - Remove the line about `_DropoutNd` from `_is_dropout`. Which rows of the architecture table fail now?
#
# <details><summary>What you should see</summary>
#
# GPT-2, BLOOM and GPT-NeoX disagree with themselves, because their `nn.Dropout` modules still drop a tenth. Falcon has such modules,
# too, but does not use them here, and passes. The other six have none.
# </details>
