# %% [markdown]
# # What a model says about a response
# > The log-probability of a response: shift, gather, mask, sum, in fp32; and a pass that writes one row per pair to a table.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/02_logprobs.ipynb)
#
# **You should know** what logits and a softmax are, and what a pair is (chapter 01). **Time** under a minute on two CPU cores.
#
# Every quantity of preference training is made of one: how likely a model finds a given response. Computing it takes a few lines. Getting it wrong
# is as easy, and none of the mistakes raises an error: forget the shift, mask the wrong tokens, take the mean, sum in bf16, leave dropout on. This chapter
# makes each of them once and writes the plain version that everybody can read. Faster ones, in later chapters, must equal it.

# %%
#| default_exp logprobs

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

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
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

# %%
import io, itertools, resource, tempfile

import matplotlib.pyplot as plt
import seaborn as sns
import transformers
from torch.testing import assert_close
from transformers import LlamaConfig

from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.world import load_base, load_world, prompt_ids, respond

torch.manual_seed(0); torch.set_num_threads(1)

# %% [markdown]
# ## One response, by hand
#
# A causal language model gives, at every position, a distribution over the *next* token. A response $y$ to a prompt $x$ gets the product of
# the probabilities of its tokens; in logarithms a sum,
#
# $$\log \pi(y \mid x) = \sum_{t=1}^{|y|} \log \pi(y_t \mid x, y_{<t}). \tag{1}$$
#
# Logarithms, because the product of several hundred probabilities is zero in floating point; natural ones, so the unit is the nat. Our model is the base model S
# of the tiny world, our pair the first one of its hardest source. One character is one token, so everything can be seen.

# %%
world = load_world()
S, tok = load_base(world)
S.requires_grad_(False)
pairs = list(tokenize_pairs(load_pairs(world.sources["riddle"]), tok, "riddle").pairs)
pair = pairs[0]
{k: tok.decode(pair[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids")}


# %% [markdown]
# The logits at position $i$ speak about token $i+1$. So the first response token is read off at the *last prompt position*, and the last
# position of the row is never read.

# %%
def one_row(model, x, y): # prompt ids, response ids -> (|y|,) log-probabilities of the response tokens
    logits = model(input_ids=torch.tensor([x + y])).logits[0]
    return torch.stack([logits[len(x) + t - 1].log_softmax(-1)[token] for t, token in enumerate(y)])

def show_row(x, y):
    logp, row = one_row(S, x, y), [tok.decode(i) for i in x + y]
    return pd.DataFrame({"position": range(len(x) - 1, len(row) - 1), "reads": row[len(x) - 1:-1], "speaks about": row[len(x):],
                         "p": logp.exp(), "log p (nats)": logp, "cumulative sum": logp.cumsum(0)}).set_index("position").round(3)

show_row(pair["prompt_ids"], pair["chosen_ids"])

# %% [markdown]
# S hesitates once, at the first letter: whether to follow the right rule or the wrong one. The last number of the last column is (1). Is it true? A
# probability can be counted: let S answer the same prompt many times.

# %%
x, y = pair["prompt_ids"], pair["chosen_ids"]
n, text = 2000, tok.decode(y[:-1])
p = one_row(S, x, y).sum().exp().item()
question = tok.decode(x[1:-2])                                  # without the tokens of the chat template
counted = respond(S, tok, [question] * n).count(text) / n
assert abs(counted - p) < 4 * (p * (1 - p) / n) ** 0.5          # four standard errors
{"exp of (1)": round(p, 3), "share of 2000 samples": round(counted, 3)}

# %% [markdown]
# The commonest mistake is to forget the shift. Nothing fails; the model is then asked how likely each token is to follow *itself*.

# %%
logits = S(input_ids=torch.tensor([x + y])).logits[0].log_softmax(-1)
forgotten = sum(logits[len(x) + t][token] for t, token in enumerate(y)).item()
assert forgotten < 10 * one_row(S, x, y).sum()
{"shifted": round(one_row(S, x, y).sum().item(), 2), "shift forgotten": round(forgotten, 2)}


# %% [markdown]
# ## A batch
#
# Rows of a batch have one length, so short ones are padded. On the right: then every real token keeps its position, and a causal model cannot look
# ahead into the padding. A token now belongs to the prompt, the response or the padding, and only a mask can say which. Both responses
# of all pairs go through the model together, so that they are computed alike.

# %%
#| export
def check_prompts(pairs: list):
    "Raise ValueError for a pair without a prompt."
    if not all(len(p["prompt_ids"]) for p in pairs): raise ValueError("a pair without a prompt token: nothing predicts the first token of its responses")

def collate(pairs: list, # n pairs with prompt_ids, chosen_ids, rejected_ids
            device="cpu",
           ) -> tuple[Tensor, Tensor, Tensor]: # (2n, L) ids, (2n, L) attention mask, (2n, L) response mask; chosen rows first
    "Right-padded rows, all chosen then all rejected. Padding is known by length, never by token id. Raises ValueError for a pair without a prompt."
    check_prompts(pairs)
    rows = [(list(p["prompt_ids"]), list(p[side])) for side in ("chosen_ids", "rejected_ids") for p in pairs]
    shape = len(rows), max(len(x) + len(y) for x, y in rows)
    ids, seen, scored = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for i, (x, y) in enumerate(rows):
        n = len(x) + len(y)
        ids[i, :n] = torch.tensor(x + y); seen[i, :n] = 1; scored[i, len(x):n] = True
    return ids.to(device), seen.to(device), scored.to(device)


# %%
mixed = sorted(pairs, key=lambda p: len(p["prompt_ids"]))
mixed = [mixed[0], pair, mixed[-1]]                             # unequal lengths
ids, seen, scored = collate(mixed)
pd.DataFrame(["".join("." if not m else "R" if r else "p" for m, r in zip(*row)) for row in zip(seen, scored)],
             index=[f"{s} {i}" for s in ("chosen", "rejected") for i in range(3)], columns=["p prompt, R response, . padding"])


# %% [markdown]
# What a batch costs is what it holds, padding included. Everything that has to fit into memory is counted so.

# %%
#| export
def _longest(p): return len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"]))

def padded_tokens(pairs: list) -> int:
    "Cells of the padded batch of these pairs: rows times the longest row."
    return 2 * len(pairs) * max(map(_longest, pairs))


# %%
assert padded_tokens(mixed) == ids.numel()
{"cells": padded_tokens(mixed), "tokens": int(seen.sum())}


# %% [markdown]
# Four steps: **shift** logits against ids, **gather** the log-probability of the token that came, **mask** what is not response, **sum**. Only
# response positions go through the softmax, and they go through it in fp32.

# %%
#| export
def token_logprobs(logits: Tensor, # (m, V) in any dtype
                   ids: Tensor,    # (m,) the tokens that came next
                  ) -> Tensor:     # (m,) fp32, nats
    "Log-probability of each token, in fp32."
    return -F.cross_entropy(logits.float(), ids, reduction="none")


# %% [markdown]
# The logits are the model's own `.logits`, not a product of hidden states and the output matrix made here: some architectures scale or cap
# them, and whoever skips that scores another model. The price is the largest tensor of the pass, rows by length by
# vocabulary. [Chapter 04](04_packing.ipynb) avoids it, and is checked against this. (This cell is not exported yet. It gets one more line below, for half precision.)

# %%
def response_logprobs(model, pairs): # -> (n,) log pi(y_w|x) and (n,) log pi(y_l|x), nats, fp32
    ids, seen, scored = collate(pairs, model.device)
    logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits
    ids, scored = ids[:, 1:], scored[:, 1:]
    logp = token_logprobs(logits[:, :-1][scored], ids[scored])
    rows = torch.zeros(ids.shape, device=logp.device).masked_scatter(scored, logp)
    return tuple(rows.sum(1).chunk(2))


# %% [markdown]
# It must equal the loop over single, unpadded rows. All later versions meet this same check.

# %%
def by_rows(model, pairs): # the loop: no batch, no padding, no mask
    return tuple(torch.stack([one_row(model, p["prompt_ids"], p[s]).sum() for p in pairs]) for s in ("chosen_ids", "rejected_ids"))

assert_close(response_logprobs(S, mixed), by_rows(S, mixed))
pd.DataFrame(dict(zip(("log p(chosen)", "log p(rejected)"), response_logprobs(S, mixed)))).round(3)


# %% [markdown]
# *By length, never by token id*: many tokenizers pad with the end token. Who masks every token that equals the pad id masks the real end
# token too, and the model is no longer asked whether the response stops there. Take the right answer and the same answer, cut:

# %%
def make_pair(prompt, chosen, rejected):
    ids = {s: tok(t, add_special_tokens=False).input_ids + [tok.eos_token_id] for s, t in (("chosen_ids", chosen), ("rejected_ids", rejected))}
    return dict(key=f"{prompt}|{chosen}|{rejected}", prompt_ids=prompt_ids(tok, prompt), **ids)

whole = make_pair("shift deajc", "efbkd", "efb")
endless = whole | {s: whole[s][:-1] for s in ("chosen_ids", "rejected_ids")} # what `ids != pad` leaves when pad = eos
shown = pd.DataFrame([torch.cat(response_logprobs(S, [p])).tolist() for p in (whole, endless)], columns=["efbkd", "efb"], index=["by length", "by id, pad = eos"])
assert shown.loc["by length", "efbkd"] > shown.loc["by length", "efb"] and shown.iloc[1, 0] < shown.iloc[1, 1]
shown.round(2)


# %% [markdown]
# Without its end token a response is only a beginning, and a beginning is never less likely than what it begins. Every cut response
# would win.
#
# ## The log-ratio
#
# How much more likely is the chosen response than the rejected one? The paper writes
#
# $$\gamma_\pi(x, y_w, y_l) = \log \pi(y_w \mid x) - \log \pi(y_l \mid x). \tag{2}$$
#
# The prompt's own probability would cancel in it, so leaving the prompt unscored loses nothing. What does not cancel is everything the two
# responses do not share: their length, their style, the tokens that end them. And $\gamma$ changes its sign when the two change places, which a test at
# $\gamma = 0$ would never see.

# %%
#| export
def gamma(chosen: Tensor,   # (n,) log pi(y_w|x), nats
          rejected: Tensor, # (n,) log pi(y_l|x), nats
         ) -> Tensor:       # (n,) log-ratio; positive where the model prefers the chosen response
    "How much more likely, in nats, the model finds the chosen response (the paper's gamma_pi)."
    return chosen - rejected


# %%
g = gamma(*response_logprobs(S, pairs))
assert_close(gamma(*response_logprobs(S, [p | dict(chosen_ids=p["rejected_ids"], rejected_ids=p["chosen_ids"]) for p in pairs])), -g)
{"pairs": len(g), "mean gamma (nats)": round(g.mean().item(), 2), "gamma > 0": round((g > 0).float().mean().item(), 3)}

# %% [markdown]
# On the source `riddle` S prefers the chosen response about every second time: this will be the hardest source. Chapter 05 orders sources by
# that share.
#
# ## Sum against mean
#
# Some methods divide (1) by the number of tokens. That is not the same number on another scale: it can reverse a preference. Here S finds a short, cut answer far more
# likely than a long, garbled one, as it should, and the mean says the opposite.

# %%
short = make_pair("shift deajc", "ef", "cdbk d")                # right: efbkd
lengths = torch.tensor([len(short["chosen_ids"]), len(short["rejected_ids"])])
sums = torch.cat(response_logprobs(S, [short]))
both = pd.DataFrame({"sum": sums, "mean": sums / lengths}, index=[f"{t}, {n} tokens" for t, n in zip(("chosen: ef", "rejected: cdbk d"), lengths)])
both.loc["gamma"] = both.iloc[0] - both.iloc[1]
assert both.loc["gamma", "sum"] > 0 > both.loc["gamma", "mean"]
both.round(2)

# %% [markdown]
# Real pairs do this all the time, because real responses differ in length. Eight of them, asked of SmolLM2-135M-Instruct (the cell is skipped in
# tests, its output is kept):

# %%
#| slow
smol = Path(os.environ.get("SDPO_MODEL", "~/.cache/sdpo_nb/smollm2-135m-instruct")).expanduser() # local copies, else the hub
data = Path(os.environ.get("SDPO_DATA", "../../shared/data")) / "preferences" / "orca_dpo_pairs.jsonl.gz"
smol, data = smol if smol.exists() else "HuggingFaceTB/SmolLM2-135M-Instruct", data if data.exists() else "Intel/orca_dpo_pairs"

real, real_tok = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32).requires_grad_(False), AutoTokenizer.from_pretrained(smol)
eight = list(tokenize_pairs(load_pairs(data, columns={"question": "prompt"}).select(range(8)), real_tok, "orca", max_length=768).pairs)
c, r = torch.cat([torch.stack(response_logprobs(real, [p])) for p in eight], 1)
nc, nr = (torch.tensor([len(p[s]) for p in eight]) for s in ("chosen_ids", "rejected_ids"))
pd.DataFrame({"tokens chosen": nc, "tokens rejected": nr, "gamma, sum": c - r, "gamma, mean": c / nc - r / nr}).style.format(precision=2)

# %% [markdown]
# By the sum the model prefers all eight chosen responses, and in each pair the chosen one is the shorter; by the mean it prefers one of eight. Neither is a verdict about
# quality: a long text is improbable because it is long. DPO is derived for the probability of a whole response (chapter 03), and it looks at the *change* of $\gamma$
# against the reference, in which a length that both models see alike cancels. So the sum is the method. The mean is another one and wants
# another $\beta$: its differences are smaller by the length of a response.
#
# ## Why fp32: sums
#
# bf16 keeps eight significant bits. Between 128 and 256 its numbers are one apart. Take token log-probabilities of S *already
# rounded to bf16*, so that all sums below add the same numbers, and look at 400 of them, as in a response of half a page.

# %%
ids, seen, scored = collate(pairs)
values = token_logprobs(S(input_ids=ids, attention_mask=seen).logits[:, :-1][scored[:, 1:]], ids[:, 1:][scored[:, 1:]]).bfloat16()

def running_sum(x): # (orders, tokens), one after another, in the dtype of x
    total, out = torch.zeros_like(x[:, 0]), []
    for column in x.T: total = total + column; out.append(total)
    return torch.stack(out, 1)

v = values[None, :400]
exact, fp32, bf16 = (running_sum(v.to(t))[0, -1] for t in (torch.float64, torch.float32, torch.bfloat16))
total = pd.Series({"exact": exact.item(), "fp32": fp32.item(), "fp32, kept in bf16": fp32.bfloat16().item(), "bf16": bf16.item()}, name="sum of 400 (nats)")
total.to_frame().assign(error=total - total["exact"]).round(5)

# %% [markdown]
# Added one after another in bf16, small terms are rounded away against a large total; the sum comes out nearly seven nats too high. A sum made in fp32 and then *stored*
# in bf16 is a whole number here. How does this grow with the length? Thirty random orders of the same values say it:

# %%
orders = torch.stack([values[torch.randperm(len(values))[:2048]] for _ in range(30)])
exact, fp32, bf16 = (running_sum(orders.to(t)).double() for t in (torch.float64, torch.float32, torch.bfloat16))
error = {"bf16": bf16 - exact, "fp32, kept in bf16": fp32.bfloat16().double() - exact, "fp32": fp32 - exact}
at = torch.tensor([2 ** k - 1 for k in range(3, 12)])
drawn = pd.concat([pd.DataFrame(e[:, at].abs(), columns=(at + 1).tolist()).melt(var_name="tokens", value_name="nats").assign(sum=name) for name, e in error.items()])
means = drawn.groupby(["sum", "tokens"])["nats"].mean().unstack(0)

# %%
fig, ax = plt.subplots(figsize=(6, 3.4))
sns.lineplot(means, ax=ax, markers=True, dashes=False, legend=False)
for name, line in means.items(): ax.annotate(name, (2048, line[2048]), xytext=(8, 0), textcoords="offset points", va="center")
ax.set(xscale="log", yscale="log", xlabel="tokens in the response", ylabel="mean |error| of the sum (nats)"); ax.set_xscale("log", base=2)
sns.despine()
assert means.loc[512, "bf16"] > 5 and means["fp32"].max() < 1e-3

# %%
means.loc[[64, 512, 2048]].map("{:.3g}".format)


# %% [markdown]
# What to see: the bf16 sum falls behind once the spacing of its numbers exceeds the terms. At 512 tokens it is wrong by some fifteen nats; at $\beta = 0.1$ that moves an implicit
# reward by 1.5. Storing a good sum in bf16 costs up to half a spacing. In fp32 the question disappears: the line lies decades below, and up to 32 tokens
# there is no error at all, so a logarithmic axis cannot show it.
#
# ## Why fp32: the batch
#
# An fp32 sum is only as good as its terms. In a bf16 forward pass, matrix products round differently for different shapes, so a pair gets another
# log-probability when other pairs stand beside it. No weight has changed, and nothing is random. To see it, a forward pass in a chosen precision; weights stay fp32.

# %%
#| export
def autocast(device, precision): # fp32, bf16 or fp16
    "The context in which forward passes of this precision run; fp32 is no context at all."
    if precision == "fp32": return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


# %%
@torch.no_grad()
def batch_shape(model, pairs): # the same pairs, alone and together, in two precisions
    rows, exact = {}, None
    for precision in ("fp32", "bf16"):
        with autocast(model.device, precision):
            alone = torch.stack([torch.cat(response_logprobs(model, [p])) for p in pairs], 1)
            together = torch.stack(response_logprobs(model, pairs))
        exact = alone if exact is None else exact
        rows[precision] = {"log p: alone - together": alone - together, "gamma: alone - together": gamma(*alone) - gamma(*together), "log p: off fp32": alone - exact}
    return pd.DataFrame({p: {k: d.abs().max().item() for k, d in row.items()} for p, row in rows.items()}).T


# %% [markdown]
# A random Llama of six layers and random responses of 60 to 100 tokens show it. The largest difference over eight pairs, in nats:

# %%
def random_pair(n, vocab=2000): # n response tokens
    prompt, *sides = (torch.randint(0, vocab, (k,)).tolist() for k in (20 + n // 3, n, 160 - n))
    return dict(key=str(n), prompt_ids=prompt, chosen_ids=sides[0], rejected_ids=sides[1])

config = LlamaConfig(vocab_size=2000, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8, initializer_range=0.05)
wide = transformers.LlamaForCausalLM(config).eval()
shown = batch_shape(wide, [random_pair(n) for n in range(60, 100, 5)])
assert shown.loc["fp32"].max() < 2e-3 and shown.loc["bf16"].iloc[:2].min() > 10 * shown.loc["fp32"].iloc[:2].max()
shown.style.format("{:.1g}")

# %% [markdown]
# In fp32 company changes the fourth decimal place at most. In bf16 it changes the second, and the number itself is further off. The real model with its eight real pairs,
# which are longer:

# %%
#| slow
batch_shape(real, eight).style.format("{:.1g}")


# %% [markdown]
# ### Where the noise comes from
#
# Three things are rounded to eight bits: the weights, the activations inside the layers, and the logits. The logits of a language model lie around 20, where the numbers of bf16 are
# 0.125 apart. That is a coarse ruler for a quantity that we are going to add up 400 times. And it is the cheapest of the three to avoid: only the *last* matrix product has to leave its result in fp32. Its factors
# may stay in half precision, since a product is summed up in fp32 anyway, and rounded when it is stored.

# %%
#| export
def _wide_product(a: Tensor, # (m, d) in half precision
                  b: Tensor, # (V, d) in half precision
                 ) -> Tensor: # (m, V) fp32
    "a times b transposed, without the rounding at the end."
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and WIDE_ON_CUDA: return torch.mm(a, b.T, out_dtype=torch.float32)
        return a.float() @ b.float().T

WIDE_ON_CUDA = torch.__version__ >= torch.torch_version.TorchVersion("2.8")

class _WideLinear(torch.autograd.Function):
    "A linear layer: factors in half precision, result in fp32. The backward pass is the usual one of autocast."
    @staticmethod
    def forward(ctx, hidden, weight, half):
        ctx.save_for_backward(hidden, half)
        return _wide_product(hidden, half)

    @staticmethod
    def backward(ctx, grad):
        hidden, half = ctx.saved_tensors
        grad = grad.to(half.dtype)
        of_weight = (grad.T @ hidden).float() if ctx.needs_input_grad[1] else None
        return grad @ half, of_weight, None


# %% [markdown]
# `grad` is cast down before its two products, as autocast does. The gradient of the weight comes back in fp32, so that pieces of a batch add up without another rounding.
#
# How does a model come to use it? We lend its output layer another `forward`, for a while. Scaling and capping of logits, where an architecture has them, come after that layer and so act on fp32, too. An output layer that is not
# plain (adapted, quantised) keeps its own way, and so does everything outside autocast.

# %%
#| export
def _half(model):
    "The dtype that autocast computes in at the moment, or None."
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

def is_plain(head) -> bool:
    "Whether an output layer is a linear layer with a weight of its own, and nothing else."
    return type(head) is torch.nn.Linear and type(head.weight) is torch.nn.Parameter

@contextlib.contextmanager
def fp32_logits(model):
    "For a while, let a model under autocast answer with logits that were never rounded to half precision."
    head, dtype = model.get_output_embeddings(), _half(model)
    if dtype is None or not is_plain(head):
        yield
        return
    half = head.weight.detach().to(dtype)
    def forward(hidden):
        rows = hidden.flatten(0, -2).to(dtype)
        logits = _WideLinear.apply(rows, head.weight, half).unflatten(0, hidden.shape[:-1])
        return logits if head.bias is None else logits + head.bias
    head.forward = forward
    try: yield
    finally: del head.forward


# %% [markdown]
# One kind of model reads its neighbours even in fp32. Rotary positions that are stretched for long texts ("dynamic", "longrope") are stretched by the longest row of
# the batch, so a short row beside a long one is read at positions that are not its own. Such a model gets each row alone, as soon as a row is long enough for that.

# %%
#| export
def _configs(config):
    "A config and the configs inside it."
    if not isinstance(config, PretrainedConfig): return []
    return [config] + [c for inner in vars(config).values() for c in _configs(inner)]

def _stretched_from(config):
    "Lengths of a row from which the rotary positions of a config depend on the longest row."
    for c in _configs(config):
        rope = getattr(c, "rope_parameters", None) or getattr(c, "rope_scaling", None) or {}
        for r in [rope, *rope.values()]:                     # one for all layers, or one for each kind of layer
            kind = (r.get("rope_type") or r.get("type") or "") if isinstance(r, dict) else ""
            if "dynamic" in kind: yield c.max_position_embeddings
            if kind == "longrope":
                yield r.get("original_max_position_embeddings") or getattr(c, "original_max_position_embeddings", None) or c.max_position_embeddings

def must_read_alone(model,       # any causal LM
                    pairs: list, # those of one batch
                   ) -> bool:
    "Whether a row of these pairs would be read differently beside the others."
    limit = min(_stretched_from(getattr(model, "config", None)), default=None)
    return limit is not None and max(map(_longest, pairs)) >= limit

def _one_by_one(model, pairs, ids, seen, scored):
    "The rows of a batch, each without its padding; what the model remembers of the longest row so far is forgotten."
    lengths = [len(p["prompt_ids"]) + len(p[side]) for side in ("chosen_ids", "rejected_ids") for p in pairs]
    for i, n in enumerate(lengths):
        for module in model.modules():
            for name in [k for k in vars(module) if k.endswith("max_seq_len_cached")]: setattr(module, name, 0)
        yield ids[i:i+1, :n], seen[i:i+1, :n], scored[i:i+1, :n]


# %% [markdown]
# The readable function gets these two things, and is finished. Outside autocast, and for other models, they do nothing. (The version before it keeps a name, to compare with.)

# %%
usual_logprobs = response_logprobs


# %%
#| export
def _row_sums(model, ids, seen, scored): # (rows,)
    logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits
    ids, scored = ids[:, 1:], scored[:, 1:]
    logp = token_logprobs(logits[:, :-1][scored], ids[scored])
    return torch.zeros(ids.shape, device=logp.device).masked_scatter(scored, logp).sum(1)

def response_logprobs(model,       # a causal LM; gradients flow
                      pairs: list, # n pairs with prompt_ids, chosen_ids, rejected_ids
                     ) -> tuple[Tensor, Tensor]: # (n,) log pi(y_w|x) and (n,) log pi(y_l|x), nats, fp32
    "Summed log-probabilities of both responses of each pair: the padded version that everybody can read. Source: equation (1)."
    batch = collate(pairs, model.device)
    parts = _one_by_one(model, pairs, *batch) if must_read_alone(model, pairs) else [batch]
    with fp32_logits(model): sums = torch.cat([_row_sums(model, *part) for part in parts])
    return tuple(sums.chunk(2))

response_logprobs.tokens = padded_tokens

# %%
assert_close(response_logprobs(S, mixed), by_rows(S, mixed))
with autocast("cpu", "bf16"):
    usual, wider = S(input_ids=ids).logits, response_logprobs(S, mixed)[0]
    with fp32_logits(S): ours = S(input_ids=ids).logits
assert (usual.dtype, ours.dtype) == (torch.bfloat16, torch.float32)
{"a logit of autocast": usual[0, 0, 5].item(), "the same, in fp32": round(ours[0, 0, 5].item(), 6)}

# %% [markdown]
# And a model whose positions stretch beyond 32 tokens, asked about a short pair beside a long one:

# %%
rope = dict(rope_type="dynamic", factor=4., rope_theta=1e4)
config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32, rope_parameters=rope, initializer_range=0.2)
stretched = transformers.LlamaForCausalLM(config).requires_grad_(False).eval()
beside = [dict(prompt_ids=[5] * 6, chosen_ids=[6, 7, 8], rejected_ids=[9, 10]), dict(prompt_ids=[5] * 20, chosen_ids=[6, 7] * 15, rejected_ids=[8, 9] * 15)]
shown = pd.DataFrame({name: f(stretched, beside)[0] for name, f in (("one batch", usual_logprobs), ("alone", response_logprobs), ("plain rows", by_rows))}, index=["short", "long"])
assert_close(response_logprobs(stretched, beside), by_rows(stretched, beside))
assert abs(shown.loc["short", "one batch"] - shown.loc["short", "plain rows"]) > 1e-2
shown.round(2)


# %% [markdown]
# What does each rounding cost? Round one thing after the other, and look at the distance from the log-probability that nothing was rounded for.

# %%
@contextlib.contextmanager
def rounded_weights(model): # for a while; computing stays in fp32
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters(): p.data = p.data.bfloat16().float()
    try: yield
    finally:
        for n, p in model.named_parameters(): p.data = kept[n]

@torch.no_grad()
def where_from(model, pairs): # root mean square distance from fp32, nats per response
    def ask(logprobs): return torch.cat([torch.cat(logprobs(model, [p])) for p in pairs])
    exact, rows = ask(response_logprobs), {}
    with rounded_weights(model): rows["rounded weights, computed in fp32"] = ask(response_logprobs)
    with autocast("cpu", "bf16"):
        rows["bf16, logits in fp32"] = ask(response_logprobs)
        rows["bf16, logits too"] = ask(usual_logprobs)
    return pd.Series({name: (got - exact).square().mean().sqrt().item() for name, got in rows.items()})

where = where_from(wide, [random_pair(n) for n in range(60, 100, 5)])
where.round(3).to_frame("random Llama (nats)")

# %% [markdown]
# Here fp32 logits buy nothing, because a random model's logits are small. A trained one is sure of itself: its logits are large, and so is their rounding. Real pairs, cut at two lengths:

# %%
#| slow
more = {n: list(tokenize_pairs(load_pairs(data, columns={"question": "prompt"}).select(range(40)), real_tok, "orca", max_length=n).pairs)[:12] for n in (256, 768)}
torch.set_num_threads(os.cpu_count())
asked = {f"{n} tokens at most": where_from(real, pairs) for n, pairs in more.items()}
torch.set_num_threads(1)
found = pd.DataFrame(asked)
assert (found.loc["bf16, logits in fp32"] < found.loc["bf16, logits too"]).all()
found.round(2)

# %% [markdown]
# Errors that are independent of each other add up in squares. So a response is the further off the longer it is, by the square root of its length; and with the logits in fp32 a part of it is gone, while that of weights and activations stays. How
# much do neighbours still matter? The eight pairs again, with the finished function:

# %%
#| slow
batch_shape(real, eight).style.format("{:.1g}")


# %% [markdown]
# Two passes that must agree (reference and policy before the first step) agree only as well as that. [Chapter 06](06_trainer.ipynb) measures how well before it calls a table wrong. Hence two rules:
# logits, softmax and sum are always fp32, and a table remembers the precision it was computed in.
#
# ## Dropout off, in all its forms
#
# Log-probabilities are a property of the weights, so nothing may be random: not even in train mode, which gradient checkpointing needs.
# Many checkpoints come with dropout at zero, so code that forgets it works, until somebody loads one that does not.
# Dropout hides in four places: the config (under many names, also nested), float attributes of modules, `nn.Dropout` modules, and whole layers left out.

# %%
#| export
def _is_dropout(owner, name):
    return bool(re.search("dropout|pdrop|layerdrop|drop_prob|drop_path", name)) or name == "p" and isinstance(owner, torch.nn.modules.dropout._DropoutNd)

def dropouts(model) -> list[tuple]: # (config or module, name of its attribute)
    "Every dropout probability of a model, wherever it is kept."
    owners = _configs(getattr(model, "config", None)) + list(model.modules())
    return [(o, name) for o in owners for name, value in vars(o).items() if type(value) in (int, float) and _is_dropout(o, name)]

def _in_eval_mode(module, inputs): module.training = False

def _is_noisy(module):
    "Whether a module has an amplitude of noise."
    return any(type(value) in (int, float) and re.search("jitter|noise", name) for name, value in vars(module).items())

def freeze_dropout(model):
    "Set every dropout probability of the model to zero, in the config and in the modules, and keep its noisy modules in eval mode; returns the model."
    for owner, name in dropouts(model): setattr(owner, name, type(getattr(owner, name))(0))
    for module in filter(_is_noisy, model.modules()):
        if _in_eval_mode not in module._forward_pre_hooks.values(): module.register_forward_pre_hook(_in_eval_mode)
    return model


# %% [markdown]
# `dropouts` only looks, so one can see what was found before it is changed. Names are matched by a pattern: architectures agree on the word but not on what
# they write around it. A model with experts may shake its router as well, in train mode only ("jitter"). Zero is no cure there: PhiMoE uses the same number to decide in eval mode, too.
# So a module with such a number is held in eval mode, whatever the rest is in.
#
# The lesson runs on eight architectures, tiny and random, each with every dropout of its config at 0.1. Two questions: do two
# forwards in train mode agree to the last bit? Does the padded batch still equal single rows?

# %%
usual = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
bloom = dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
kinds = {"llama": usual, "gpt2": dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4), "opt": usual | dict(ffn_dim=64, word_embed_proj_dim=32), "bloom": bloom,
         "gpt_neox": usual, "mistral": usual | dict(num_key_value_heads=2), "qwen2": usual | dict(num_key_value_heads=2), "falcon": usual}

def random_model(kind, dropout=0.1):
    config = AutoConfig.for_model(kind, **kinds[kind], pad_token_id=0, bos_token_id=1, eos_token_id=0)
    for c in _configs(config):
        for name, value in vars(c).items():
            if isinstance(value, float) and _is_dropout(c, name): setattr(c, name, dropout)
    return transformers.AutoModelForCausalLM.from_config(config)


# %%
uneven = [dict(prompt_ids=[5, 6, 7], chosen_ids=[8, 9, 0], rejected_ids=[10, 11, 12, 13, 0]), dict(prompt_ids=[5], chosen_ids=[14, 0], rejected_ids=[0])]

@torch.no_grad()
def ask(kind):
    model = random_model(kind).train()
    def same(): return torch.equal(*(torch.cat(response_logprobs(model, uneven)) for _ in range(2)))
    names, before, after = {n for _, n in dropouts(model)}, same(), freeze_dropout(model) and same()
    error = (torch.cat(response_logprobs(model, uneven)) - torch.cat(by_rows(model, uneven))).abs().max().item()
    return {"found": ", ".join(sorted(names)), "same before": before, "same after": after, "padded - single (nats)": error}


# %%
asked = pd.DataFrame({kind: ask(kind) for kind in kinds}).T
assert not asked["same before"].any() and asked["same after"].all() and asked["padded - single (nats)"].max() < 1e-4
asked.style.format({"padded - single (nats)": "{:.0e}"}).set_properties(**{"text-align": "left"})

# %% [markdown]
# What to see: every model disagreed with itself before and none does afterwards, and padding costs at most the last digits of fp32, whether positions
# are learned (GPT-2, OPT), rotated (Llama) or added to the attention (BLOOM). `p` belongs to `nn.Dropout`: rows without it would have been missed by anyone who zeroes only those modules. For an architecture that is not in this table the guard stands
# elsewhere: the first loss of a stage is compared with the one that the reference table implies (chapter 06). Two models with experts:

# %%
kinds["phimoe"] = usual | dict(num_key_value_heads=2, num_local_experts=4)
kinds["mixtral"] = kinds["phimoe"] | dict(router_jitter_noise=0.1)
experts = pd.DataFrame({kind: ask(kind) for kind in ("phimoe", "mixtral")}).T
assert experts["same after"].all() and experts["padded - single (nats)"].max() < 1e-4
experts[["same before", "same after"]]

# %% [markdown]
# ## A model, loaded for this
#
# A mistyped path must not be taken for the name of a model on the hub: the answer would be a long wait and a message about the network. Two
# words with a slash between can be both, so a folder that exists wins.

# %%
#| export
MERGE = "has a PEFT adapter; merge it first: merge_and_unload()"

def _find_model(model):
    "A folder that is a model, or what can only be a hub id: a local path never reaches the hub."
    p = Path(model).expanduser()
    if (p / "adapter_config.json").exists(): raise ValueError(f"{model}: {MERGE}, then save_pretrained into a folder of its own")
    if p.is_dir() and not (p / "config.json").exists(): raise ValueError(f"{model}: a folder without config.json is not a model")
    if not p.is_dir() and (p.exists() or p.is_absolute() or str(model).startswith((".", "~")) or len(p.parts) > 2):
        raise ValueError(f"{model}: no such model folder; give a folder with config.json, or a hub id such as 'HuggingFaceTB/SmolLM2-135M-Instruct'")
    return str(p) if p.is_dir() else str(model)


# %% [markdown]
# Much can be wrong with a folder, and the libraries have an exception of their own for everything, seldom with the name of a file in it. Here all become one line
# that begins with the folder. Where a file is to blame it is looked for: one that Git LFS never fetched, half a file, broken JSON.

# %%
#| export
def _is_pointer(path):
    "Whether a file is what Git LFS leaves in the place of a large one."
    with open(path, "rb") as f: return f.read(40).startswith(b"version https://git-lfs")

WEIGHTS = ".safetensors", ".bin"

def _read_whole(path): # raises where a file is not what its name says
    if path.suffix == ".json": json.loads(path.read_text())
    if path.suffix == ".safetensors":
        with safe_open(path, "pt"): pass
    if path.suffix == ".bin": torch.load(path, "meta", weights_only=True)

def _broken_file(folder, weights):
    "What is wrong with the first broken file of a folder, or None; weights only where they were wanted."
    for path in sorted(p for p in Path(folder).glob("*") if p.is_file() and (weights or p.suffix not in WEIGHTS)):
        try:
            if _is_pointer(path): return f"{path.name} is a Git-LFS pointer, not the file itself; fetch it with `git lfs pull`"
            _read_whole(path)
        except Exception as e: return f"{path.name} is broken or not complete ({type(e).__name__}); copy or download it again"

def _one_line(text):
    words = " ".join(text.split())
    return words if len(words) < 300 else words[:words.rfind(" ", 0, 300)] + " ..."

def _reason(e):
    "What an exception of a library means."
    said = str(e)
    if "trust_remote_code" in said: return "wants Python code of its own (auto_map in its config), which is never run here; take an architecture that transformers has"
    if "couldn't connect" in said.lower(): return "is no folder here, and the hub cannot be reached (or HF_HUB_OFFLINE is set); download the model, and give its folder"
    if "backend tokenizer" in said: return "has no tokenizer that can be read (no tokenizer.json); save one beside the model: tokenizer.save_pretrained(folder)"
    return f"cannot be loaded ({type(e).__name__}: {_one_line(said)})"

@contextlib.contextmanager
def _loading(model, weights):
    "What the libraries throw, as a ValueError of one line that begins with the model; their own report is silent meanwhile."
    report = logging.getLogger("transformers.modeling_utils")
    before, report.disabled = report.disabled, True
    try: yield
    except (MemoryError, torch.OutOfMemoryError): raise
    except Exception as e: raise ValueError(f"{model}: {_broken_file(Path(model).expanduser(), weights) or _reason(e)}") from e
    finally: report.disabled = before


# %% [markdown]
# A tensor that the checkpoint lacks is worse than an error. The library fills it with random numbers and goes on; that happens to every folder without an output layer, such as a reward model.

# %%
#| export
def _check_report(model, report):
    "Raise ValueError for a tensor that a checkpoint lacks or has in another shape; print one line about those that are left over."
    mismatched = sorted((name, tuple(there), tuple(wanted)) for name, there, wanted in report["mismatched_keys"])
    for name, there, wanted in mismatched[:1]:
        raise ValueError(f"{model}: {name} is {there} in the checkpoint, but config.json asks for {wanted} ({len(mismatched)} such); the two do not belong together")
    missing, unused = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        raise ValueError(f"{model}: the checkpoint has no {missing[0]} ({len(missing)} missing); it would be random. Give a complete causal language model")
    if unused: print(f"{model}: {len(unused)} tensors of the checkpoint are not used, the first is {unused[0]}")


# %% [markdown]
# A folder saved in bf16 comes back in bf16 when nobody objects, and weights in bf16 hardly move at learning rate 5e-7 while the loss looks
# fine. So trained weights are fp32, always, and `stored_dtype` tells what the folder had. A model as tiny as ours stays on the CPU, also beside a graphics card: there, starting a kernel takes longer than the arithmetic in it.

# %%
#| export
SMALL = 5_000_000 # parameters; below, a CPU is faster than a graphics card

def best_device(model) -> str: # cuda or cpu
    "Where a loaded model goes when nobody says where: to the graphics card, if there is one and the model is not tiny."
    tiny = sum(p.numel() for p in model.parameters()) < SMALL
    return "cuda" if torch.cuda.is_available() and not tiny else "cpu"

def _from_pretrained(kind, model, revision, **kw):
    "Never with code that comes from the model."
    found = _find_model(model)
    if revision and not Path(found).is_dir(): kw["revision"] = revision
    with _loading(model, kind is AutoModelForCausalLM): return kind.from_pretrained(found, trust_remote_code=False, **kw)

def load_model(model: str, # hub id or folder
               device: str=None, # default: `best_device` of the model
               revision: str=None, # of a hub id: a branch, a tag or a commit
              ):           # causal LM with fp32 weights and no dropout, in eval mode
    "Load in fp32 whatever the folder's dtype. Raises ValueError, in one line, for what is not a complete causal language model."
    m, report = _from_pretrained(AutoModelForCausalLM, model, revision, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)
    _check_report(model, report)
    if _has_adapter(m): raise ValueError(f"{model}: {MERGE}")
    if getattr(m.config.get_text_config(), "attn_logit_softcapping", None): m.set_attn_implementation("eager") # before transformers 5.23, others leave out the soft-cap of Gemma 2
    return freeze_dropout(m).to(device or best_device(m))

def _has_adapter(model): return getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config")

def load_config(model: str, # hub id or folder
                revision: str=None): # of a hub id
    "What a model is made of, without its weights."
    return _from_pretrained(AutoConfig, model, revision)

def stored_dtype(model: str, # hub id or folder
                 revision: str=None, # of a hub id
                ) -> torch.dtype: # fp32 where the config does not say
    "The dtype in which a model lies on disk."
    dtype = load_config(model, revision).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32

def load_tokenizer(model: str, # hub id or folder
                   revision: str=None): # of a hub id
    "The tokenizer that lies with a model."
    return _from_pretrained(AutoTokenizer, model, revision)


# %%
tmp = tempfile.TemporaryDirectory()
home = Path(tmp.name)
transformers.AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.bfloat16).save_pretrained(home / "half")
usual_way, ours = transformers.AutoModelForCausalLM.from_pretrained(home / "half"), load_model(home / "half", "cpu")
assert ours.dtype == torch.float32
pd.DataFrame({"weights": [str(m.dtype) for m in (usual_way, ours)], "0.5 + 5e-7, in these weights": [f"{torch.tensor(0.5, dtype=m.dtype) + 5e-7:.7f}" for m in (usual_way, ours)]},
             index=["from_pretrained", "load_model"]).assign(stored=[str(stored_dtype(home / "half"))] * 2)


# %% [markdown]
# Five folders that are no model, and what is said about each:

# %%
def spoil(name, file, content=None, **settings): # a copy of S with one file changed
    folder = Path(shutil.copytree(world.base, name))
    if content is None: content = json.dumps(json.loads((folder / file).read_text()) | settings)
    (folder / file).write_text(content)

def refusal(f, *args):
    try: f(*args)
    except ValueError as e: return str(e)
    raise AssertionError("not refused")

with contextlib.chdir(home):
    spoil("not-fetched", "model.safetensors", "version https://git-lfs.github.com/spec/v1\n")
    spoil("cut", "tokenizer.json", "{")
    spoil("other-sizes", "config.json", vocab_size=56)
    spoil("more-layers", "config.json", num_hidden_layers=4)
    spoil("own-code", "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    said = [refusal(load_tokenizer if name == "cut" else load_model, name) for name in ("not-fetched", "cut", "other-sizes", "more-layers", "own-code")]
print("\n".join(said))


# %% [markdown]
# Which model was it? A name or a path can lie, and a trainer that reloads its reference by name gets the wrong one after the first stage. The bytes of the
# weights cannot lie. Tied weights count once, and one bit changes the hash.

# %%
#| export
def weights_hash(model, dtype=None, # hash the weights as they would be in this dtype
                ) -> str:           # 16 hex digits
    "sha256 over sorted parameter names, dtypes, shapes and bytes."
    h = hashlib.sha256()
    for name, p in sorted(model.named_parameters(), key=lambda item: item[0]):
        p = p.detach().to(dtype or p.dtype)
        h.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        h.update(p.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()[:16]


# %%
S.save_pretrained(home / "S")
moved = load_model(home / "S", "cpu")
hashes = [weights_hash(S), weights_hash(moved)]
with torch.no_grad(): moved.model.norm.weight[0] *= 1 + 2 ** -23   # the last bit of one weight
hashes.append(weights_hash(moved))
assert hashes[0] == hashes[1] != hashes[2]
pd.Series(hashes, index=["S", "saved and loaded", "one bit changed"], name="weights_hash").to_frame()


# %% [markdown]
# ## Can it be trained?
#
# A folder is not the only way in: a run also takes a model that lies in memory, saves it, and loads it again before the first stage. Whatever the folder cannot hold would be lost on the way:
# an adapter, a class of one's own, what was frozen. And nobody has looked yet whether the model is causal. An encoder such as BERT can be loaded as a causal language model, and then reads the very answer that it is asked about.

# %%
#| export
def _not_reloaded(model):
    "What would not come back if this model were saved and loaded, or None."
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), ())
    known = known if isinstance(known, tuple) else (known,)
    if name.startswith("transformers_modules."): known = ()         # loaded with its own code, which a folder is not trusted with
    if type(model) not in known:
        back = f"comes back as {known[0].__name__}" if known else "cannot be loaded again"
        return f"its class {name} {back}: a model with code of its own, or with another head, cannot be trained here"
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    if not frozen: return None
    with torch.device("meta"): fresh = type(model)(model.config)    # what never requires a gradient is not meant
    frozen -= {n for n, p in fresh.named_parameters() if not p.requires_grad}
    if frozen: return f"{sorted(frozen)[0]} has requires_grad=False ({len(frozen)} such), and would be trained all the same: every stage trains all weights. model.requires_grad_(True) allows it"

@torch.no_grad()
def _looks_ahead(model, prefix=4, rest=8):
    "How far the logits of a prefix move with what follows, relative to how far those of what follows move."
    ends = [getattr(model.config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]     # may mean more than a token
    usual = [i for i in range(3, 60) if i not in ends]
    size = model.get_input_embeddings().weight.shape[0]
    a, b = ([i % size for i in [*usual[:prefix], *[last] * rest]] for last in usual[prefix:prefix + 2])
    was_training = model.training; model.eval()
    try: logits = model(input_ids=torch.tensor([a, b], device=model.device), use_cache=False).logits.float()
    finally: model.train(was_training)
    moved = (logits[0] - logits[1]).abs().amax(-1)
    return (moved[:prefix].max() / moved[prefix:].max().clamp(min=1e-9)).item()

def check_model(model): # a model in memory
    "Raise ValueError for a model with an adapter, one that would not come back from a folder as it is, and one that is not causal."
    if _has_adapter(model): raise ValueError(f"model: {MERGE}, then requires_grad_(True)")
    if lost := _not_reloaded(model): raise ValueError(f"model: {lost}")
    if _looks_ahead(model) > (1e-3 if model.dtype == torch.float32 else 0.05):
        raise ValueError(f"model: {type(model).__name__} is not causal: what it says about a token changes with the tokens after it. Take a decoder")


# %%
check_model(moved)
moved.model.embed_tokens.requires_grad_(False)
bert = transformers.AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **usual))
print(refusal(check_model, moved), refusal(check_model, bert), sep="\n")


# %% [markdown]
# The last two questions need the pairs. A model whose positions are a table has no row for a longer text, and one whose embedding is shorter than its tokenizer has no row for the last tokens. On a graphics card both end the process, an hour into a run.
# Rotary positions have no end; there, a row beyond what the model was made for is worth a line.

# %%
#| export
def _has_position_table(model, limit):
    "Whether the positions of a model are rows of a table; some begin with a few that are never used."
    tables = [*model.named_parameters(), *model.named_buffers()]
    return any(re.search(r"wpe|pos\w*_embed|embed_pos|pos_encoding", name) and t.ndim == 2 and limit <= t.shape[0] <= limit + 8 for name, t in tables)

def check_rows(model,           # a model in memory
               longest: int,    # tokens of the longest row: a prompt with one response
               largest_id: int, # of any token in them
              ):
    "Raise ValueError for rows longer than the model's table of positions, and for a token that its embedding lacks; print a line for rows beyond its context."
    tokens, limit = model.get_input_embeddings().weight.shape[0], getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if largest_id >= tokens:
        raise ValueError(f"model: token {largest_id} is in the pairs, but the embedding has {tokens} rows; take the model's own tokenizer, or resize_token_embeddings(len(tokenizer))")
    if not limit or longest <= limit: return
    if _has_position_table(model, limit): raise ValueError(f"model: rows of up to {longest} tokens, but it has {limit} positions; set max_length={limit}")
    print(f"model: rows of up to {longest} tokens go beyond the {limit} that it was made for; max_length={limit} keeps within")


# %%
longest = max(map(_longest, pairs))
check_rows(S, longest, len(tok) - 1)
check_rows(S, 500, len(tok) - 1)
gpt2 = transformers.AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **kinds["gpt2"], n_positions=32))
print(refusal(check_rows, gpt2, 47, 0), refusal(check_rows, gpt2, 12, 64), sep="\n")


# %% [markdown]
# ## Which precision
#
# bf16 saves time and memory only where the hardware has it; emulated, it is slower than fp32 and no more exact. So ask the hardware, not the library: on some
# GPUs "supported" includes emulation. Whatever the choice, the last two steps, softmax and sum, stay in fp32:

# %%
#| export
def pick_precision(precision: str="auto", # auto, bf16, fp16 or fp32
                   device: str="cpu",
                  ) -> str:               # bf16, fp16 or fp32
    "bf16 where the hardware really has it, else fp16 on CUDA, else fp32. Raises ValueError for an unknown name."
    if precision not in ("auto", "bf16", "fp16", "fp32"): raise ValueError(f"precision: {precision!r} is none of auto, bf16, fp16, fp32")
    if precision != "auto": return precision
    if torch.device(device).type == "cuda": return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


# %%
with autocast("cpu", "bf16"): logits, logp = S(input_ids=ids).logits, response_logprobs(S, mixed)[0]
assert logp.dtype == torch.float32
pd.Series({"weights": S.dtype, "logits under bf16 autocast": logits.dtype, "log-probabilities under bf16 autocast": logp.dtype}, name="dtype").astype(str).to_frame()


# %% [markdown]
# ## The reference is data, not a model
#
# DPO compares the model in training with a frozen reference. The usual way keeps both in memory. But only two numbers per pair are ever asked
# of the reference, so ask once, beforehand, and write them down. Then no second model is needed, and "which model was the reference?" is answered by the table.

# %%
#| export
def keys_of(pairs) -> list[str]: # of a list or a Dataset
    "The keys of pairs, without reading their ids."
    return list(pairs["key"]) if hasattr(pairs, "column_names") else [p["key"] for p in pairs]

def pairs_hash(*sets) -> str: # 16 hex digits
    "sha256 over the keys of pairs, in their order."
    return hashlib.sha256("".join(k for pairs in sets for k in keys_of(pairs)).encode()).hexdigest()[:16]

@dataclass
class LogprobTable:
    "Log-probabilities of one model for many pairs, and how they were computed. Its numbers are on the CPU; what compares them with a policy moves them to the policy (chapter 03)."
    kind: dict         # weights, config, precision, device, attention, logprobs
    rows: pd.DataFrame # index: pair key; columns chosen, rejected (nats, fp32)

    def lookup(self, pairs) -> tuple[Tensor, Tensor]: # (n,), (n,) fp32
        keys = keys_of(pairs)
        absent = [k for k in keys if k not in self.rows.index]
        if absent: raise ValueError(f"{len(absent)} of {len(keys)} pairs are not in the table of log-probabilities, the first is {absent[0]}; score them with score_pairs")
        return tuple(torch.tensor(self.rows.loc[keys, side].to_numpy("float32", copy=True)) for side in ("chosen", "rejected"))

    def gamma(self, pairs) -> Tensor: # (n,) nats
        return gamma(*self.lookup(pairs))


# %% [markdown]
# Rows are found by the pair's key, a hash of its token ids (chapter 01): another tokenizer, boundary or length limit makes other
# keys, and a pair without a row is an error. The rest of what must agree is the table's *kind*: which weights under which config (a window is no weight), computed how. Saving a model writes into its config, its class for
# one; what changes no number is left out, or a model would lose its table by being saved. The size of a batch is not part of the kind either, since in fp32 it does not matter; in bf16 one table is as good as another to the tenths of a nat seen above.

# %%
#| export
NO_NUMBER = """_name_or_path architectures auto_map dtype torch_dtype transformers_version id2label label2id problem_type
    output_attentions output_hidden_states return_dict use_cache initializer_range task_specific_params""".split() # of a config: changes no log-probability

def _of_numbers(config): # also of the configs inside
    if not isinstance(config, dict): return config
    return {k: _of_numbers(v) for k, v in config.items() if k not in NO_NUMBER}

def table_kind(model, precision: str, logprobs) -> dict:
    "What must agree for two tables to be the same."
    config = _of_numbers(model.config.to_dict())
    return dict(weights=weights_hash(model), config=hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16], precision=precision,
                device=model.device.type, attention=getattr(logprobs, "attention", getattr(model.config, "_attn_implementation", None)), logprobs=logprobs.__name__)


# %% [markdown]
# ## Files that are whole or not there
#
# What a run writes, it writes under another name and renames at the end. A kill then leaves the old file or the new one, never half of one. The other name is not trusted: what lies there goes first, so a link is not written through. And a full disk, which every library reports in its own way, becomes one line.

# %%
#| export
@contextlib.contextmanager
def replacing(path, # of a file or a folder
             ):     # yields a name in the same folder, where nothing is
    "Write a file or folder under another name; it then takes the place of the old one. Raises OSError where it cannot be written, and leaves nothing half-written."
    path = Path(path)
    tmp = path.with_suffix(".tmp")
    try:
        _remove(tmp)
        yield tmp
        if path.is_dir(): _remove(path)          # a folder cannot be renamed over another one
        os.replace(tmp, path)
    except (OSError, RuntimeError, SafetensorError) as e: raise OSError(f"{tmp}: could not be written ({_why(e)})") from e
    finally: _remove(tmp)

def _remove(path):
    "A file, a folder or a link, if there is one. What a link points to stays."
    if path.is_symlink() or path.is_file(): path.unlink()
    elif path.is_dir(): shutil.rmtree(path)

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

def _why(e) -> str:
    "What went wrong in writing. torch raises a RuntimeError while it handles the true error; safetensors says the number in its text."
    cause = e
    while cause and not isinstance(cause, OSError): cause = cause.__context__
    said = str(e).splitlines()[0]
    full = getattr(cause, "errno", None) in FULL or any(f"os error {n})" in said for n in FULL)
    return "disk full?" if full else getattr(cause, "strerror", None) or said


# %% [markdown]
# A limit on the size of a file does what a full disk does. The old file stays, and nothing else.

# %%
with tempfile.TemporaryDirectory() as place:
    old = Path(place) / "state.pt"
    old.write_text("the old one")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    try:
        with replacing(old) as new, open(new, "xb") as f: torch.save(S.state_dict(), f)
    except OSError as e: message = str(e).removeprefix(place)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert old.read_text() == "the old one" and [p.name for p in Path(place).iterdir()] == ["state.pt"]
message


# %% [markdown]
# On disk a table is a folder: `kind.json` and pieces of a few hundred rows, each of them written so. The kind is written before the first piece, and pieces of an old kind are removed before the new kind is written: at whatever moment the
# process dies, what lies there is what it says it is.

# %%
#| export
def write_json(path, data):
    "Write a whole file, or nothing."
    with replacing(path) as tmp: tmp.write_text(json.dumps(data, indent=1) + "\n")

def _write_piece(folder, rows):
    numbers = [int(p.stem.split("-")[1]) for p in Path(folder).glob("logprobs-*.parquet")]
    path = Path(folder) / f"logprobs-{max(numbers, default=-1) + 1:05}.parquet"
    with replacing(path) as tmp: rows.to_parquet(tmp, write_page_checksum=True)


# %%
#| export
def _no_rows(): return pd.DataFrame({"chosen": [], "rejected": []}, index=pd.Index([], dtype=str), dtype="float32")

def _read_piece(path):
    "A piece of a table. Its checksums are compared: a bit that flipped in a number makes another number."
    rows = pd.read_parquet(path, page_checksum_verification=True)
    if list(rows.columns) != ["chosen", "rejected"]: raise ValueError(f"its columns are {', '.join(map(repr, rows.columns))}")
    return rows

def _read_pieces(folder):
    parts = [_no_rows()]
    for p in sorted(Path(folder).glob("logprobs-*.parquet")):
        try: parts.append(_read_piece(p))
        except Exception as e: raise ValueError(f"{p}: cannot be read ({e}); delete this file and run again") from e
    rows = pd.concat(parts)
    return rows[~rows.index.duplicated()]

def _read_kind(folder): # {} where none can be read
    try: kind = json.loads((Path(folder) / "kind.json").read_text())
    except (FileNotFoundError, ValueError): return {}
    return kind if isinstance(kind, dict) else {}

def read_table(folder) -> LogprobTable:
    "A table as it lies on disk. Raises ValueError where there is none."
    kind = _read_kind(folder)
    if not kind: raise ValueError(f"{folder}: no table of log-probabilities here (kind.json is missing or broken)")
    return LogprobTable(kind, _read_pieces(folder))


# %% [markdown]
# Before a pass the folder is opened. What a kill left half-written goes, silently, since it was never part of the table. Pieces of another kind, or of a kind nobody knows, go too, and this is said.

# %%
#| export
def _open_table(folder, kind):
    "The rows of this kind that are already there."
    if folder is None: return _no_rows()
    folder = Path(folder); folder.mkdir(parents=True, exist_ok=True)
    for p in folder.glob("logprobs-*.tmp"): p.unlink()
    old, pieces = _read_kind(folder), list(folder.glob("logprobs-*.parquet"))
    if old != kind:
        differs = ", ".join(f"{k} {old.get(k, 'unknown')} -> {kind.get(k)}" for k in kind | old if old.get(k) != kind.get(k))
        if pieces: print(f"{folder}: table of another kind ({differs}); computed again")
        for p in pieces: p.unlink()
        write_json(folder / "kind.json", kind)
    return _read_pieces(folder)


# %% [markdown]
# Pairs are put into batches up to a *budget of tokens*, so that memory is bounded whatever the lengths. A number of pairs would bound nothing. Long pairs come first: pairs of like
# length share a batch, so little is padded. The function that computes the log-probabilities says how it counts (`tokens`).

# %%
#| export
def micro_batches(pairs: list,  # tokenised pairs
                  budget: int,  # tokens in a forward pass; a pair that is longer goes alone
                  logprobs=response_logprobs, # its `tokens`, where it has them, say what pairs cost; else padded cells count
                 ) -> list[list]:
    "Cut pairs into batches that fit a budget, long pairs first."
    out, tokens = [], getattr(logprobs, "tokens", padded_tokens)
    for p in sorted(pairs, key=_longest, reverse=True):
        if out and tokens(out[-1] + [p]) <= budget: out[-1].append(p)
        else: out.append([p])
    return out


# %%
parts = micro_batches(pairs, 400)
as_they_come = [pairs[i:i+len(parts[0])] for i in range(0, len(pairs), len(parts[0]))]
assert max(map(padded_tokens, parts)) <= 400 and sorted(p["key"] for b in parts for p in b) == sorted(p["key"] for p in pairs)
{"batches": len(parts), "cells, by length": sum(map(padded_tokens, parts)), "cells, as they come": sum(map(padded_tokens, as_they_come))}


# %% [markdown]
# While a graphics card computes, the processor has nothing to do; it may as well put together what the card gets next. `ahead` makes one thing while the one before it is in use.

# %%
#| export
def ahead(make,   # item -> what is wanted
          items): # yields make(item) for each, in order
    "The next one is made in a thread while the last one is in use."
    with ThreadPoolExecutor(1) as thread:
        coming = None
        for item in items:
            after, coming = coming, thread.submit(make, item)
            if after: yield after.result()
        if coming: yield coming.result()

def prepared(model, parts, logprobs): # yields (pairs, what `logprobs` takes for them)
    "Batches one after the other; a function that can make its input beforehand (`prepare`) does."
    make = getattr(logprobs, "prepare", lambda model, pairs: pairs)
    return ahead(lambda pairs: (pairs, make(model, pairs)), parts)


# %%
assert list(ahead(lambda n: n * n, range(4))) == [0, 1, 4, 9] and list(ahead(str, [])) == []

# %% [markdown]
# A run that is killed and goes on must find the same bits. On a CPU it does. Some kernels of a graphics card add up in an order of their own, unless they are told not to; where one has no other way, PyTorch warns, and [chapter 06](06_trainer.ipynb) finds out beforehand.

# %%
#| export
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8") # what the matrix products of a card need for it, read when they are first used

@contextlib.contextmanager
def same_bits(device,        # of the model
              on: bool=True,
              strict: bool=False): # raise RuntimeError where an operation cannot, instead of a warning
    "For a while, a graphics card computes the same bits every time. A CPU does so anyway."
    if not on or torch.device(device).type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    torch.utils.deterministic.fill_uninitialized_memory = False   # new memory need not be filled: it is written before it is read
    try: yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


# %% [markdown]
# ## What you see while it runs
#
# A bar shows where one pass is. What you want to know is when *all* of it will be done, and that is a matter of counting: tokens that are left, and seconds that a token took so far.

# %%
#| export
def pair_tokens(pairs) -> np.ndarray: # (n,) of a list or a Dataset
    "Tokens of each pair: prompt, chosen and rejected response."
    names = ["prompt_ids", "chosen_ids", "rejected_ids"]
    if not hasattr(pairs, "column_names"): return np.array([sum(len(p[name]) for name in names) for p in pairs], int)
    blocks = pairs.select_columns(names).with_format("arrow").iter(10_000)
    counts = [sum(pc.list_value_length(ids).to_numpy() for ids in block.columns) for block in blocks]
    return np.concatenate(counts) if counts else np.zeros(0, int)

@dataclass
class Clock:
    "How long the work still takes, told by how long it took so far."
    left: float      # tokens that are still to be computed
    done: float = 0. # tokens
    spent: float = 0. # seconds

    def tick(self, tokens: float, seconds: float):
        "So many tokens more are done, and took so long."
        self.left, self.done, self.spent = max(0., self.left - tokens), self.done + tokens, self.spent + seconds
    def skip(self, tokens: float):
        "So many were done before."
        self.left = max(0., self.left - tokens)
    def __str__(self): return f"{tqdm.format_interval(self.left * self.spent / self.done)} left" if self.done else "time left unknown"


# %%
clock = Clock(left=1000)
clock.tick(tokens=100, seconds=7)
assert str(clock) == "01:03 left" and str(Clock(5)) == "time left unknown"
assert pair_tokens(pairs[:5]).tolist() == [len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs[:5]]
str(clock)


# %% [markdown]
# A bar draws itself by returning to the beginning of its line. In a file, where the log of a night's run goes, nothing returns: all the bars stand one behind the other, in a line of some kilobytes. So where the output is no terminal, plain lines are written, one every half a minute. And a pass that has nothing to do shows no bar.

# %%
#| export
class _Lines:
    "A file that tqdm writes to where there is no terminal: each state that it shows becomes a line."
    def write(self, text):
        if text := text.replace("\r", "").strip(): print(text, file=sys.stderr, flush=True)
    def flush(self): sys.stderr.flush()

EVERY = 30 # seconds between two lines of a log

def progress(total: int, desc: str, unit: str,
             done: int=0,      # of the total, before
             leave: bool=False, # the full bar stays on the screen
            ): # a tqdm bar; what `set_postfix_str` gets stands behind it
    "A bar in a terminal or a notebook, lines elsewhere, nothing where nothing is left to do."
    how = dict(total=total, initial=done, desc=desc, unit=unit)
    if total == done: return tqdm(**how, disable=True)
    if sys.stderr.isatty(): return tqdm(**how, leave=leave, ncols=shutil.get_terminal_size().columns or 80, bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}")
    if issubclass(tqdm, tqdm_notebook): return tqdm(**how, leave=leave, bar_format="{desc} {bar} {n_fmt}/{total_fmt}{postfix}")
    return tqdm(**how, leave=False, file=_Lines(), delay=EVERY, mininterval=EVERY, bar_format="{desc}: {n_fmt} of {total_fmt} {unit}s{postfix}")


# %% [markdown]
# The same bar, in a terminal and in a log. Every `\r` is a return to the beginning of the line.

# %%
def heard(file=None):
    log = io.StringIO()
    with contextlib.redirect_stderr(log):
        for _ in tqdm(range(2), "S reads digest", file=file, mininterval=0, ncols=60, disable=False): time.sleep(0.01)
    return re.sub(r"\[.*\]", "[...]", log.getvalue())

assert "\r" not in heard(_Lines()) and progress(7, "", "pair", done=7).disable
print("terminal:", repr(heard()), heard(_Lines()), sep="\n")


# %% [markdown]
# The pass itself. A batch that does not fit into memory fails at the beginning of its piece.

# %%
#| export
def _score_piece(model, part, precision, logprobs, budget, bar, clock):
    out, start = {}, time.perf_counter()
    for batch, inputs in prepared(model, micro_batches(part, budget, logprobs), logprobs):
        with autocast(model.device, precision): both = torch.stack(logprobs(model, inputs), 1)
        bad = [p["key"] for p, ok in zip(batch, both.isfinite().all(1).tolist()) if not ok]
        if bad: raise ValueError(f"log-probability of pair {bad[0]} is not finite in {precision}; look at this pair and at the weights")
        out |= dict(zip([p["key"] for p in batch], both.tolist()))
        start, before = time.perf_counter(), start
        clock.tick(pair_tokens(batch).sum(), start - before)
        bar.set_postfix_str(str(clock), refresh=False)
        bar.update(len(batch))
    return pd.DataFrame.from_dict(out, orient="index", columns=["chosen", "rejected"], dtype="float32")


# %%
#| export
@torch.no_grad()
def score_pairs(model,            # any causal LM
                pairs,            # tokenised pairs, with keys: a list or a Dataset; a key that occurs twice is scored once
                folder=None,      # where the table is kept, in pieces; a killed pass goes on from there
                precision="fp32", # fp32, bf16, fp16
                logprobs=response_logprobs, # (model, pairs) -> (chosen, rejected); a named function
                token_budget=4096, # tokens in a forward pass
                piece=512,        # pairs a file
                desc="scoring",
               clock: Clock=None, # of the work that this pass is a part of; None: this pass alone
               ) -> LogprobTable: # these pairs, and whatever else the folder holds
    "One pass of a model over pairs. A folder that holds a table of another kind is computed again, saying so."
    precision = pick_precision(precision, model.device)
    kind = table_kind(model, precision, logprobs)
    done = _open_table(folder, kind)
    first = {}
    for i, k in enumerate(keys_of(pairs)): first.setdefault(k, i)
    todo = [i for k, i in first.items() if k not in done.index]
    if todo: # most passes of a run find everything there, and need no count
        tokens = pair_tokens(pairs)
        if clock: clock.skip(tokens.sum() - tokens[todo].sum())
        else: clock = Clock(tokens[todo].sum())
    was_training = model.training; model.eval()
    try:
        with same_bits(model.device), progress(len(first), desc, "pair", len(first) - len(todo)) as bar:
            for start in range(0, len(todo), piece):
                rows = _score_piece(model, [pairs[i] for i in todo[start:start+piece]], precision, logprobs, token_budget, bar, clock)
                done = pd.concat([done, rows])
                if folder: _write_piece(folder, rows)
    finally: model.train(was_training)
    return LogprobTable(kind, done)


# %%
table = score_pairs(S, pairs)
assert_close(table.lookup(mixed), by_rows(S, mixed))
table.rows.head(3).round(3)

# %% [markdown]
# How much smaller is the table than the model it replaces? Eight bytes a pair, whatever the size of the model. The same table also tells how often
# the model prefers the chosen response, so the pass that orders the sources (chapter 05) is the pass that makes the first reference.

# %%
{"bytes of S": S.get_memory_footprint(), "bytes of the numbers in its table": table.rows.to_numpy().nbytes, "pairs": len(table.rows)}


# %% [markdown]
# ## Killed and continued
#
# A pass over a large data set is long enough to be interrupted, and too long to begin again. Here the model is watched: `watch` counts the pairs it is
# asked about, and pulls the plug after a given number. We leave half a piece behind, too, as a kill in mid-write would.

# %%
@contextlib.contextmanager
def watch(model, stop=float("inf")):
    asked = []
    def hook(module, args, kwargs):
        if sum(asked) >= stop: raise KeyboardInterrupt
        asked.append(len(kwargs["input_ids"]) // 2)
    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try: yield asked
    finally: handle.remove()

some = pairs[:100]
with contextlib.suppress(KeyboardInterrupt), watch(S, stop=56) as first: score_pairs(S, some, home / "table", piece=16, token_budget=400)
(home / "table" / "logprobs-00003.tmp").write_bytes(b"half a piece")
{"pairs asked": sum(first), "rows on disk": len(read_table(home / "table").rows)}

# %% [markdown]
# Three whole pieces survive; the half piece is lost. The next call asks for the missing pairs only, and the table is the same, bit for bit, as one from an uninterrupted pass.

# %%
with watch(S) as second: continued = score_pairs(S, some, home / "table", piece=16, token_budget=400)
with watch(S) as third: whole = score_pairs(S, some + some[:10], piece=16, token_budget=400)
assert sum(third) == 100 and continued.rows.equals(whole.rows) and not list((home / "table").glob("*.tmp"))
{"asked the second time": sum(second), "asked for all of them, ten pairs twice": sum(third)}

# %% [markdown]
# Rows of two kinds are never mixed. The same folder, now asked for in bf16, is computed again and says why:

# %%
with contextlib.chdir(home), watch(S) as again: half = score_pairs(S, some, "table", precision="bf16")
{"asked": sum(again), "largest difference (nats)": round(float((half.rows.loc[continued.rows.index] - continued.rows).abs().max().max()), 3)}

# %% [markdown]
# A pair that was never scored is an error that names it. A default of zero would be a valid log-probability, that of certainty, and nobody would notice:

# %%
try: half.lookup(pairs[98:103])
except ValueError as e: print(e)
else: raise AssertionError("pairs without a row were looked up")

# %%
#| hide
tmp.cleanup()

# %% [markdown]
# ## What you now have
#
# - `response_logprobs`: the log-probability of both responses of a pair, in fp32, equal to a loop over single rows on eight architectures.
# - `gamma`, their difference, the one number that the loss, the partition and the report are made of.
# - `load_model`, `check_model` and `check_rows`: a model that is whole, can be trained, and has room for the pairs; or one line that says why not.
# - `score_pairs` and `read_table`: the reference as a table that knows which weights it came from and goes on after a kill.
#
# ## Questions to test yourself
#
# 1. Which position's logits score the first response token? Which position is never read?
# 2. Why does the probability of the prompt not appear in $\gamma$, and what would change in (1) if it did?
# 3. A colleague's log-probabilities are all multiples of two. What happened?
# 4. Two tables have the same weights, precision and device, but one pair differs by 0.2 nats. Name two harmless reasons.
#
# ## Try this
#
# - Pad on the left in `collate` and run the architecture table again. Which models notice? Pass `position_ids` and see who is cured.
# - Replace the sum by the mean in `response_logprobs`. Which checks of this chapter fire?
# - Remove the part about `_DropoutNd` from `_is_dropout`. Which rows of the architecture table fail now, and which are left untouched?
