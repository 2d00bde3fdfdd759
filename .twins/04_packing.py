# %% [markdown]
# # Packing
# > The same log-probabilities from fewer tokens: a row holds prompt, chosen and rejected of many pairs, without padding, and only responses reach the output layer.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/04_packing.ipynb)
#
# **You should know** how [chapter 02](02_logprobs.ipynb) computes a log-probability, and what attention does with queries, keys and values. **Time** under a minute on two CPU cores, without the cells marked slow.
#
# Chapter 02 computes what is needed in a way that everybody can read. Much of what it makes the model compute is thrown away: padding, the same prompt a second time,
# a distribution over the whole vocabulary at places nobody asks about. This chapter removes all three. Nothing is approximated, so the result can be compared with chapter 02:
# the same values, the same gradients.

# %%
#| default_exp packing

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
#| export
import contextlib, inspect
from dataclasses import dataclass, field, fields, is_dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from sdpo_nb.logprobs import autocast, check_prompts, fp32_logits, is_plain, must_read_alone, response_logprobs, token_logprobs

# %%
import json, math, os
from importlib.resources import files
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from sdpo_nb.logprobs import freeze_dropout, load_model, load_tokenizer, micro_batches
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.world import load_world
torch.set_num_threads(1); torch.manual_seed(0);

# %% [markdown]
# ## What a padded batch holds
#
# These are the lengths of the first eight pairs of HH-RLHF harmless, in tokens of SmolLM2: prompt, chosen, rejected.

# %%
eight = [(228, 29, 62), (196, 61, 29), (119, 66, 88), (328, 9, 70), (42, 86, 69), (167, 47, 37), (182, 49, 19), (102, 40, 27)]

def padded_rows(lengths): # (rows, cells): 0 padding, 1 prompt, 2 the same prompt again, 3 response
    width = max(x + max(c, r) for x, c, r in lengths)
    return np.array([[1 + again] * x + [3] * y + [0] * (width - x - y) for again in (0, 1) for x, *sides in lengths for y in [sides[again]]])


# %%
colours = {"padding": "#d9d9d9", "prompt": "#4878d0", "the same prompt again": "#d65f5f", "response": "#6acc64"}

def draw(cells, ax, title):
    sns.heatmap(cells, cmap=ListedColormap(list(colours.values())), vmin=0, vmax=3, cbar=False, xticklabels=100, yticklabels=False, ax=ax)
    ax.set(title=title, xlabel="token"); ax.tick_params(rotation=0)

fig, ax = plt.subplots(figsize=(7, 3))
draw(padded_rows(eight), ax, f"16 rows of one padded batch: {padded_rows(eight).size:,} cells")
ax.legend([plt.Rectangle((0, 0), 1, 1, color=c) for c in colours.values()], colours, loc="upper left", bbox_to_anchor=(1, 1), frameon=False);


# %% [markdown]
# Blue and green are needed, grey and red are not. How many cells is that, and how much do smaller batches help? A batch of one pair has hardly any padding, but it still reads its prompt twice.

# %%
def cells(lengths, size): # of padded batches of `size` pairs, cut in the order of the data
    return sum(padded_rows(lengths[i:i+size]).size for i in range(0, len(lengths), size))

needed = sum(x + c + r for x, c, r in eight)
table = pd.DataFrame({size: {"cells": cells(eight, size), "cells / needed tokens": cells(eight, size) / needed} for size in (8, 4, 2, 1)}).T.rename_axis("pairs in a batch")
assert table["cells / needed tokens"].is_monotonic_decreasing and table["cells / needed tokens"].min() > 1.5
table.style.format({"cells": "{:,.0f}", "cells / needed tokens": "{:.2f}"})


# %% [markdown]
# Two changes remove the grey and the red. *Share the prompt*: one row reads `prompt | chosen | rejected`. *Do not pad*: rows are laid end to end in one long row, and attention sees to it that no
# pair looks at another.
#
# ## A packed row
#
# Three things are recorded for every token. Its *position*, which starts again after the prompt for the rejected response: to the model, both responses follow the prompt
# directly. The *pair* it belongs to. And its *side*: prompt, chosen or rejected. The other fields of a row are filled in below.

# %%
#| export
@dataclass
class Row:
    "Pairs, packed. Tensors of tokens are (N,), those of response tokens (m,)."
    ids: Tensor
    position: Tensor
    pair: Tensor
    side: Tensor       # 0 prompt, 1 chosen, 2 rejected
    scored: Tensor     # (m,) where the response tokens stand
    read: Tensor       # (m,) where the logits for each of them stand
    sizes: list        # of each pair: tokens of prompt, chosen, rejected
    blocks: list       # lengths of the stretches that attend among themselves
    masks: dict = field(default_factory=dict)
    windows: set = field(default_factory=set) # sliding windows that the layers have asked for
    plan: object = None # how a graphics card attends; see below

PARTS = ("prompt_ids", "chosen_ids", "rejected_ids")

def _stretches(starts, lengths): # (sum of lengths,) start, start + 1, ...; one stretch after the other
    return np.concatenate([np.arange(start, start + n) for start, n in zip(starts, lengths)])

def pack(pairs: list, # n pairs with prompt_ids, chosen_ids, rejected_ids
        ) -> Row:     # on the CPU
    "One row of all pairs: prompt, chosen, rejected, next pair. Raises ValueError for a pair without a prompt."
    check_prompts(pairs)
    sizes = [[len(p[part]) for part in PARTS] for p in pairs]
    lengths = np.array(sizes).flatten()
    ids = np.concatenate([np.asarray(p[part], "int64") for p in pairs for part in PARTS])
    begins = [start for x, _, _ in sizes for start in (0, x, x)]
    position = _stretches(begins, lengths)
    pair = np.repeat(np.arange(len(pairs)), [sum(size) for size in sizes])
    side = np.repeat(np.tile([0, 1, 2], len(pairs)), lengths)
    scored = np.flatnonzero(side)
    tokens = [torch.from_numpy(t) for t in (ids, position, pair, side, scored, _read(sizes))]
    return Row(*tokens, sizes, _blocks([sum(size) for size in sizes]))


# %% [markdown]
# The shift of chapter 02 changes in one place. A response token is predicted at the position before it, and the *first* token of both responses at the last position of the
# prompt, which is therefore read twice.

# %%
#| export
def _read(sizes):
    "Positions whose logits predict the response tokens, in the order of the tokens."
    out, start = [], 0
    for x, c, r in sizes:
        last = start + x - 1
        out += [np.arange(last, last + c), [last], np.arange(last + c + 1, last + c + r)]
        start += x + c + r
    return np.concatenate(out).astype("int64")

def _blocks(lengths, merge_up_to=256):
    "Neighbours that are short attend in one block, which saves calls; a long pair is a block of its own."
    out = []
    for n in lengths:
        if out and out[-1] + n <= merge_up_to: out[-1] += n
        else: out.append(n)
    return out


# %%
world = load_world()
S, tok = load_model(world.base), load_tokenizer(world.base)
pairs = list(tokenize_pairs(load_pairs(world.sources["riddle"]), tok, "riddle").pairs)
three = sorted(pairs, key=lambda p: len(p["prompt_ids"]))[::len(pairs) // 3][:3]
row = pack(three)
shown = pd.DataFrame({"token": [tok.decode(i) for i in row.ids], "pair": row.pair, "side": [("prompt", "chosen", "rejected")[s] for s in row.side], "position": row.position, "predicted at": ""})
shown.loc[(row.side > 0).numpy(), "predicted at"] = [str(i) for i in row.read.tolist()]
assert row.ids[row.side > 0].tolist() == sum((p[k] for p in three for k in ("chosen_ids", "rejected_ids")), [])
assert (row.position[row.read] + 1 == row.position[row.side > 0]).all()
shown[shown["pair"] == 0].T

# %% [markdown]
# The eight pairs from above make 2,152 tokens. Folded at the width of the padded batch, to compare the areas:

# %%
width = padded_rows(eight).shape[1]
flat = np.concatenate([[1] * x + [3] * (c + r) for x, c, r in eight])
assert len(flat) == needed == 2152
fig, ax = plt.subplots(figsize=(7, 1.3))
draw(np.pad(flat, (0, -len(flat) % width)).reshape(-1, width), ax, "the same pairs in one row, folded: 2,152 cells")


# %% [markdown]
# ## Who sees whom
#
# Within its pair a token sees the prompt and its own side, and of these only tokens at its own position or earlier. A model with a sliding window sees only that far back, counted in positions.

# %%
#| export
def visible(row: Row, tokens: slice, window: int=None) -> Tensor: # (n, n) bool; [i, j]: i sees j
    "Which of these tokens see which."
    pair, side, position = row.pair[tokens], row.side[tokens], row.position[tokens]
    sees = (pair[:, None] == pair) & ((side == 0) | (side[:, None] == side)) & (position[:, None] >= position)
    return sees & (position[:, None] - position < window) if window else sees


# %%
fig, ax = plt.subplots(figsize=(4.2, 4.2))
seen = {"a prompt token": colours["prompt"], "a chosen token": colours["response"], "a rejected token": "#ee854a"}
sns.heatmap(visible(row, slice(None)) * (1 + row.side), cmap=ListedColormap(["white", *seen.values()]), cbar=False, xticklabels=False, yticklabels=False, ax=ax)
sns.despine(ax=ax, left=False, bottom=False, top=False, right=False)
ax.legend([plt.Rectangle((0, 0), 1, 1, color=c) for c in seen.values()], seen, title="what is seen", loc="upper right", fontsize="small")
ax.set(xlabel="is seen", ylabel="sees", title="three pairs in one row");


# %% [markdown]
# Each pair is a triangle with a notch: the rejected response sees the prompt, and not the chosen response between them. Everything outside the triangles is white, so no large
# masked matrix is needed: attention is computed block by block along the diagonal.
#
# transformers lets a program register an attention function by name, and hands it the queries, keys and values of a layer. Keywords that the model is called with travel along, through every layer, and this is how the
# function will get at the row; the usual mask is not even made, since transformers has none for this name. The function is also told what the layer wants of its attention: scaling, a window, a soft-cap. These
# are honoured. Dropout, attention sinks and position biases are refused, for to ignore them would be wrong without an error; what a future model may want is left to the guard below. A block goes through PyTorch's fused attention,
# which keeps no matrix of scores for the backward pass; with a soft-cap, which it does not know, the scores are written out.

# %%
#| export
def _bias(row, tokens, window, dtype):
    "0 where seen, the lowest number elsewhere; (n, n), made once for all layers and heads."
    n = tokens.stop - tokens.start
    key = tokens.start, window if window and window < n else None, dtype
    if key not in row.masks:
        hidden = ~visible(row, tokens, key[1])
        row.masks[key] = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min)
    return row.masks[key]

def _attend(q, k, v, bias, scaling, softcap):
    "(heads, n, d) queries, (key heads, n, d) keys and values -> (n, heads, d)."
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    if not softcap: return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=bias, scale=scaling)[0].transpose(0, 1)
    scores = softcap * torch.tanh(q @ k.transpose(1, 2) * (scaling / softcap)) + bias
    return (scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v).transpose(0, 1)


# %%
#| export
@torch.compiler.disable
def by_blocks(q, k, v, row: Row, scaling: float, window: int=None, softcap: float=None) -> Tensor: # (N, heads, d)
    "Attention of a packed row, one block after the other: the version to read. q is (heads, N, d), k and v (key heads, N, d)."
    out, start = [], 0
    for n, *block in zip(row.blocks, *(x.split(row.blocks, 1) for x in (q, k, v))):
        bias = _bias(row, slice(start, start + n), window, q.dtype)
        out.append(_attend(*block, bias, scaling, softcap))
        start += n
    return torch.cat(out)


# %%
#| export
def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, row: Row=None, sliding_window=None, softcap=None, **rest):
    "What transformers calls in every layer of a packed row. Raises NotImplementedError for what a layer wants and cannot have."
    unknown = [k for k in ("s_aux", "position_bias", "head_mask") if rest.get(k) is not None]
    if dropout: unknown.append("dropout")
    if unknown: raise NotImplementedError(f"its attention wants {', '.join(unknown)}")
    if row is None: raise NotImplementedError("its layers do not pass the row to the attention")
    if not torch.compiler.is_compiling(): row.windows.add(sliding_window)
    attend = by_blocks if row.plan is None else row.plan.attend
    scaling = scaling or query.shape[-1] ** -0.5
    return attend(query.squeeze(0), key.squeeze(0), value.squeeze(0), row, scaling, sliding_window, softcap)[None], None

AttentionInterface.register("sdpo_packed", packed_attention)


# %% [markdown]
# The name is put into the model's config for the length of one forward pass. Gradient checkpointing runs layers a second time, in the backward pass, and by then the config has its old value back. So whoever
# switches checkpointing on passes `recompute_alike`, as [chapter 06](06_trainer.ipynb) does, or the layers would be computed again with another attention.

# %%
#| export
@contextlib.contextmanager
def attention(model, name: str):
    "For a while, let a model use an attention function by its name."
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try: yield
    finally: model.config._attn_implementation = before

def recompute_alike(model):
    "For `context_fn` of gradient checkpointing: recompute with the attention that the forward pass had."
    return contextlib.nullcontext(), attention(model, model.config._attn_implementation)


# %% [markdown]
# ## Only responses reach the output layer
#
# The output layer is a matrix from the hidden size to the vocabulary, and its result is often the largest tensor of a training step. Prompts need none of it, and only a piece of it
# has to exist at a time. Where one piece does not hold all, pieces are made again in the backward pass, so no more than one of the size [positions, vocabulary] is ever kept. And logits are fp32 in any precision ([chapter 02](02_logprobs.ipynb)).
#
# One does not simply multiply by that matrix: Gemma 2 caps the logits, Granite and Cohere scale them, and whoever multiplies by hand scores another model. So we ask the *model's own*
# forward pass, with its decoder replaced, for that moment, by the hidden states that are already there.

# %%
#| export
PIECE = 64 * 2**20 # bytes of the fp32 logits of one piece on a CPU; two or three such tensors exist at a time

def piece_bytes(device) -> int:
    "How large the logits of one piece may be: `PIECE`, and on a graphics card a sixteenth of its memory, since a card wants few, large products."
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available(): return PIECE
    return torch.cuda.get_device_properties(device).total_memory // 16

@contextlib.contextmanager
def _answering(decoder, hidden):
    "For a while, a decoder that answers with these hidden states."
    decoder.forward = lambda *args, **kwargs: BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)
    try: yield
    finally: del decoder.forward

def _head(model, hidden, ids):
    with fp32_logits(model), _answering(model.get_decoder(), hidden[None]):
        logits = model(input_ids=ids[None], use_cache=False).logits.squeeze(0)
    return token_logprobs(logits, ids)

def head_logprobs(model, hidden: Tensor, # (m, d) hidden states
                  ids: Tensor,           # (m,) the tokens that came next
                 ) -> Tensor:            # (m,) fp32, nats
    "Log-probability of each token by the model's own output layer. What does not fit into one piece is done in several, which the backward pass makes again."
    size = max(1, piece_bytes(hidden.device) // (4 * model.get_output_embeddings().weight.shape[0]))
    if len(ids) <= size: return _head(model, hidden, ids)
    pieces = zip(hidden.split(size), ids.split(size))
    return torch.cat([checkpoint(_head, model, h, t, use_reentrant=False) for h, t in pieces])


# %% [markdown]
# ## The same function, packed
#
# `packed_logprobs` takes and returns what `response_logprobs` does, so the two are interchangeable. Three things travel with it: what a batch costs, in tokens, which attention it used, and how a row is made beforehand. (`padded_plan` is for
# graphics cards, and comes below.)

# %%
#| export
def packed_tokens(pairs: list) -> int:
    "Tokens of the packed row of these pairs."
    return sum(len(p[k]) for p in pairs for k in ("prompt_ids", "chosen_ids", "rejected_ids"))

def packed_logprobs(model,       # a causal LM whose attention can be set; gradients flow
                    pairs: list, # n pairs with prompt_ids, chosen_ids, rejected_ids; or the `Row` that `packed_row` makes of them
                   ) -> tuple[Tensor, Tensor]: # (n,) log pi(y_w|x) and (n,) log pi(y_l|x), nats, fp32
    "What `response_logprobs` of chapter 02 computes, from one packed row."
    return of_row(model, pairs if isinstance(pairs, Row) else packed_row(model, pairs))

def packed_row(model, pairs: list) -> Row|list:
    "The row of `packed_logprobs`, or the pairs where their rows must be read alone. It can be made while the model is busy with another one."
    if must_read_alone(model, pairs): return pairs
    row = pack(pairs)
    if model.device.type == "cuda": row.plan = padded_plan(row)
    return row

packed_logprobs.tokens, packed_logprobs.attention, packed_logprobs.prepare = packed_tokens, "packed", packed_row

def of_row(model, row: Row|list) -> tuple[Tensor, Tensor]: # (n,) log pi(y_w|x) and (n,) log pi(y_l|x), nats, fp32
    "Log-probabilities of a packed row, wherever it lies; of pairs that were not packed, those of chapter 02."
    if not isinstance(row, Row): return response_logprobs(model, row)
    row = to_device(row, model.device)
    with attention(model, "sdpo_packed"):
        hidden = model.get_decoder()(input_ids=row.ids[None], position_ids=row.position[None], row=row, use_cache=False).last_hidden_state.squeeze(0)
    logp = head_logprobs(model, hidden.index_select(0, row.read), row.ids[row.scored])
    response = 2 * row.pair[row.scored] + row.side[row.scored] - 1      # 0, 1: chosen and rejected of the first pair
    sums = logp.new_zeros(2 * len(row.sizes)).index_add(0, response, logp)
    return sums[0::2], sums[1::2]

def to_device(value, device):
    "A tensor, or a dataclass with its tensors, on a device; what is neither stays as it is."
    if isinstance(value, Tensor): return value.to(device, non_blocking=True)
    if not is_dataclass(value): return value
    return replace(value, **{f.name: to_device(getattr(value, f.name), device) for f in fields(value)})


# %% [markdown]
# Now chapter 02's check, with values and gradients: unequal lengths, a batch of one, short pairs that share a block and, with a small `PIECE`, an output layer in many pieces.

# %%
def value_and_gradient(logprobs, model, pairs):
    model.zero_grad()
    chosen, rejected = logprobs(model, pairs)
    (chosen.sum() - 2 * rejected.sum()).backward()                  # unequal weights: no cancelling
    return torch.cat([chosen, rejected]).detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

def compare(model, pairs, other=packed_logprobs): # largest error in nats, largest error of a gradient relative to the largest gradient norm
    (a, g), (b, h) = (value_and_gradient(f, model, pairs) for f in (response_logprobs, other))
    assert g.keys() == h.keys()
    return (a - b).abs().max().item(), max((g[n] - h[n]).norm().item() for n in g) / max(x.norm().item() for x in g.values())

errors = {f"{len(p)} pairs": compare(S, p) for p in (pairs[:1], three, pairs[:64])}
PIECE = 4 * len(tok) * 5
errors["3 pairs, output layer in pieces of 5 tokens"] = compare(S, three)
PIECE = 64 * 2**20
errors = pd.DataFrame(errors, index=["log-probability (nats)", "gradient (relative)"]).T
assert (errors < 1e-4).all(axis=None)
errors.style.format("{:.0e}")


# %% [markdown]
# Would the checks notice a mistake? Four, made on purpose, and the error that each would leave:

# %%
def broken(change): # packed_logprobs with a change to the row
    def logprobs(model, pairs):
        row = pack(pairs)
        change(row)
        return of_row(model, row)
    return logprobs

# all three pairs fit into one block, so there is one mask, and writing it beforehand is enough to change who sees whom
def only(row, sees): row.masks = {(0, None, torch.float32): torch.zeros(sees.shape).masked_fill_(~sees, -1e9)}
def causal(row): return torch.ones(len(row.ids), len(row.ids), dtype=bool).tril()

def forget_the_restart(row): row.position = torch.cat([torch.arange(n) for n in row.pair.bincount()])
def see_the_other_side(row): only(row, causal(row) & (row.pair[:, None] == row.pair))
def see_other_pairs(row): only(row, causal(row))
def shift_as_in_a_plain_row(row): row.read = torch.where(row.side > 0)[0] - 1     # the first rejected token at the last chosen one

mistakes = {f.__name__.replace("_", " "): compare(S, three, broken(f)) for f in (forget_the_restart, see_the_other_side, see_other_pairs, shift_as_in_a_plain_row)}
mistakes = pd.DataFrame(mistakes, index=["log-probability (nats)", "gradient (relative)"]).T
assert (mistakes["log-probability (nats)"] > 0.05).all()
mistakes.style.format("{:.2g}")

# %% [markdown]
# Gradient checkpointing and half precision must not change this. bf16 moves every log-probability (chapter 02), so there the question is whether packing is *further* from fp32 than padding is.

# %%
S.train(); S.gradient_checkpointing_enable(dict(use_reentrant=False, context_fn=lambda: recompute_alike(S)))
checkpointed = compare(S, three)
S.gradient_checkpointing_disable(); S.eval()
assert max(checkpointed) < 1e-4

@torch.no_grad()
def half(logprobs, pairs):
    exact = torch.cat(response_logprobs(S, pairs))
    with torch.autocast("cpu", torch.bfloat16): return (torch.cat(logprobs(S, pairs)) - exact).abs().mean().item()

off = {name: half(f, pairs) for name, f in (("padded", response_logprobs), ("packed", packed_logprobs))}
assert off["packed"] < 1.2 * off["padded"]
pd.Series({"with checkpointing, gradient (relative)": checkpointed[1], "bf16 - fp32, padded (nats)": off["padded"], "bf16 - fp32, packed (nats)": off["packed"]}).map("{:.1e}".format).to_frame("")


# %% [markdown]
# With six responses this says little more than that the two are alike; real pairs are asked below.

# %% [markdown]
# ## A graphics card wants few, large calls
#
# The loop over blocks is easy to read, and on a CPU it costs little. On a graphics card it is the slowest way there is: each small call has to be started, in every layer, and a card has finished it before the next one
# arrives. Its arithmetic is free, its starts are not. So the question is how to attend to all pairs *at once*, whatever their lengths.
#
# Look at the triangle with the notch again, and cut it below the chosen response. Above the cut is an ordinary causal sequence: prompt and chosen. Below it are the queries of the rejected response. They see the prompt and themselves, causally:
# put a second copy of the prompt's keys in front of theirs, and this, too, is an ordinary causal sequence. It has fewer queries than keys, and both end together. Nothing is left of the tree.

# %%
def halves(x, c, r): # of one pair: which keys, in which order, each of the two sequences of queries sees
    row = pack([random_pair(x, c, r)])
    tree = visible(row, slice(None)).numpy() * (1 + row.side.numpy())
    again = np.r_[0:x, x + c:x + c + r]
    return {"the tree": tree, "prompt + chosen": tree[:x + c, :x + c], "rejected": tree[x + c:][:, again]}

def random_pair(*sizes): return {k: torch.randint(2, 96, (n,)).tolist() for k, n in zip(PARTS, sizes)}

drawn = halves(20, 12, 16)
fig, axes = plt.subplots(1, 3, figsize=(9, 3.2), gridspec_kw=dict(width_ratios=[48, 32, 36], wspace=0.3))
for ax, (title, cells) in zip(axes, drawn.items()):
    sns.heatmap(cells, cmap=ListedColormap(["white", *seen.values()]), vmin=0, vmax=3, cbar=False, square=True, xticklabels=False, yticklabels=False, ax=ax)
    sns.despine(ax=ax, left=False, bottom=False, top=False, right=False)
    ax.set(title=title, xlabel="keys", ylabel="queries")
n = {name: np.arange(cells.shape[1])[None] <= np.arange(len(cells))[:, None] + cells.shape[1] - len(cells) for name, cells in drawn.items()}
assert all((n[name] == (drawn[name] > 0)).all() for name in ("prompt + chosen", "rejected")) and (n["the tree"] != (drawn["the tree"] > 0)).any()


# %% [markdown]
# The second and the third are causal, aligned at their ends; the cell checks it. So no mask has to exist at all, and the two kinds of sequences of all pairs can go through one kernel that was made for sequences of many lengths.
#
# ### Copies
#
# What is needed is a copy of some tokens in another order: every key once, and those of a prompt a second time. An index does that. Its gradient adds up the copies of a token, and here PyTorch would let thousands of threads add into the same
# memory, in an order that changes from run to run. We know more than it does: a token has at most two copies. So the backward pass *reads* both and adds them, and comes out the same every time. A number one past the end stands for "none", and reads zeros.

# %%
#| export
@dataclass
class Copies:
    "Which tokens are copied where. Numbers one past the end mean none."
    take: Tensor    # (...) the token that stands in each place
    first: Tensor   # (tokens,) the place of a token's first copy
    second: Tensor  # (tokens,) and of its second one

    def __call__(self, x: Tensor) -> Tensor: # (tokens, ...) -> (places, ...)
        return _Copy.apply(x, self.take, self.first, self.second)

def _pick(x, index):
    "Rows of x by number; one past the end is a row of zeros."
    more = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return more.index_select(0, index.flatten()).unflatten(0, index.shape)

class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, take, first, second):
        ctx.save_for_backward(first, second)
        ctx.places = take.ndim
        return _pick(x, take)

    @staticmethod
    def backward(ctx, grad):
        first, second = ctx.saved_tensors
        grad = grad.flatten(0, ctx.places - 1)
        return _pick(grad, first) + _pick(grad, second), None, None, None

def copies(take: np.ndarray, # (...) token of each place; `tokens` where there is none
           tokens: int) -> Copies:
    "The way there and back. No token may have more than two copies."
    places = take.flatten()
    used = np.flatnonzero(places < tokens)
    first, second = np.full((2, tokens), len(places))
    first[places[used][::-1]] = used[::-1]              # of several places the first one stays
    others = used[first[places[used]] != used]
    second[places[others]] = others
    return Copies(*(torch.from_numpy(a.astype("int64")) for a in (take, first, second)))


# %%
three_tokens = torch.tensor([[1.], [2.], [3.]], requires_grad=True)
c = copies(np.array([0, 1, 0, 2, 3]), 3)                 # 3 is one past the end
got = c(three_tokens)
(got * torch.tensor([1, 10, 100, 1000, 10000])[:, None]).sum().backward()
assert got.flatten().tolist() == [1, 2, 1, 3, 0] and three_tokens.grad.flatten().tolist() == [101, 10, 1000]
{"copied": got.flatten().tolist(), "gradient": three_tokens.grad.flatten().tolist()}


# %% [markdown]
# ### One call
#
# The kernel is PyTorch's variable-length flash attention. It takes all queries in one tensor, all keys in another, and two lists of where the sequences begin. The plan of a row is made once, on the processor, from the lengths alone; the layers only use it. The kernel
# also wants the length of the longest sequence, which decides how much work it lays out. It is rounded up, so that a compiled layer, which remembers the numbers it has seen, sees few of them.

# %%
#| export
def _rounded_up(n, to=256): return to * -(-int(n) // to) # a plain int: a compiled layer would take numpy's for a tensor

@dataclass
class FlashPlan:
    "A row as causal sequences that end together: prompt + chosen, rejected, next pair."
    keys: Copies
    query_starts: Tensor # (2n + 1,) int32; the queries are the row itself
    key_starts: Tensor   # (2n + 1,) int32
    most_queries: int
    most_keys: int

    def attend(self, q, k, v, row, scaling, window, softcap):
        if softcap: raise NotImplementedError("the flash kernel has no soft-cap")
        half = torch.get_autocast_dtype(q.device.type)   # rotary embeddings leave q and k in fp32
        q, k, v = (x.transpose(0, 1).to(half) for x in (q, k, v))
        return flash(q, self.keys(k), self.keys(v), self, scaling, window)

def flash_plan(row: Row) -> FlashPlan:
    "From the lengths of the pairs."
    x, c, r = np.array(row.sizes).T
    starts = np.r_[0, np.cumsum(x + c + r)[:-1]]
    queries, keys = (np.stack(lengths, 1).flatten() for lengths in ((x + c, r), (x + c, x + r)))
    key_begins = np.stack([starts, starts, starts + x + c], 1).flatten()
    take = _stretches(key_begins, np.stack([x + c, x, r], 1).flatten())
    begins = [torch.from_numpy(np.r_[0, np.cumsum(lengths)].astype("int32")) for lengths in (queries, keys)]
    return FlashPlan(copies(take, len(row.ids)), *begins, _rounded_up(queries.max()), _rounded_up(keys.max()))


# %% [markdown]
# Its name and its arguments have moved from version to version of PyTorch, so it is called in one place. A window of $w$ tokens is $w - 1$ to the left and none to the right.

# %%
#| export
try: from torch.nn.attention.varlen import varlen_attn
except ImportError: varlen_attn = None
KNOWN = inspect.signature(varlen_attn).parameters if varlen_attn else {}

def flash(q, k, v, plan: FlashPlan, scaling: float, window: int=None) -> Tensor: # (N, heads, d)
    "Causal attention of sequences that end together. q is (N, heads, d), k and v (K, key heads, d), in half precision."
    grouped = dict(enable_gqa=True) if "enable_gqa" in KNOWN else {}
    left = window - 1 if window else -1
    return varlen_attn(q, k, v, plan.query_starts, plan.key_starts, plan.most_queries, plan.most_keys, scale=scaling, window_size=(left, 0), **grouped)

def flash_logprobs(model,       # as for `packed_logprobs`, under autocast on a graphics card that has the kernel
                   pairs: list, # n pairs, or the `Row` that `flash_row` makes of them
                  ) -> tuple[Tensor, Tensor]: # (n,) log pi(y_w|x) and (n,) log pi(y_l|x), nats, fp32
    "`packed_logprobs` with one call of attention for each layer."
    return of_row(model, pairs if isinstance(pairs, Row) else flash_row(model, pairs))

def flash_row(model, pairs: list) -> Row|list:
    "The row of `flash_logprobs`, or the pairs, as in `packed_row`."
    if must_read_alone(model, pairs): return pairs
    row = pack(pairs)
    row.plan = flash_plan(row)
    return row

flash_logprobs.tokens, flash_logprobs.attention, flash_logprobs.prepare = packed_tokens, "flash", flash_row
flash_logprobs.exact = packed_logprobs # the same in fp32


# %% [markdown]
# A CPU does not have this kernel. But the plan can be tested anywhere: here is what the kernel promises, in six lines, sequence by sequence. Put in its place, it must give the numbers and gradients of chapter 02.

# %%
def flash_by_hand(q, k, v, plan, scaling, window=None):
    out, q, k, v = [], q.float(), k.float(), v.float()
    for a, b, c, d in zip(plan.query_starts, plan.query_starts[1:], plan.key_starts, plan.key_starts[1:]):
        sees = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        if window: sees = sees.triu(d - c - (b - a) - window + 1)
        bias = torch.zeros(sees.shape).masked_fill(~sees, -1e30)
        out.append(_attend(q[a:b].transpose(0, 1), k[c:d].transpose(0, 1), v[c:d].transpose(0, 1), bias, scaling, None))
    return torch.cat(out)

def flash_stand_in(model, pairs): # in fp32: autocast is asked for its dtype, but switched off
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        torch.set_autocast_dtype("cpu", torch.float32)
        return flash_logprobs(model, pairs)

kernel, flash = flash, flash_by_hand
by_flash = {f"{len(p)} pairs": compare(S, p, flash_stand_in) for p in (pairs[:1], three, pairs[:64])}
by_flash = pd.DataFrame(by_flash, index=["log-probability (nats)", "gradient (relative)"]).T
assert (by_flash < 1e-4).all(axis=None)
by_flash.style.format("{:.0e}")

# %% [markdown]
# ### Without that kernel
#
# It works in half precision only, on cards from 2020 on, and knows no soft-caps. A T4, the free card of Colab, does not have it; neither does fp32. There the sequences are padded, but only *inside* attention, where padding is cheap: everything else in the model still
# sees the packed row. The first kind of sequence needs no mask, since padding on the right is out of sight of a causal query. The second one does, because its prompts end at different places. A padded query may look wherever it likes; nobody reads it. But it
# must see something, or its softmax is not a number, and so is the gradient.

# %%
#| export
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH] # cuDNN would plan anew for every new length

@dataclass
class Padded:
    "Sequences of one kind, as a batch (n, length)."
    queries: Copies
    keys: Copies
    query_at: Tensor # (n, longest) positions
    key_at: Tensor   # (n, longest)
    causal: bool     # whether queries and keys begin together, so that causal attention needs no mask

    def attend(self, q, k, v, scaling, window, softcap): # (N, heads, d) -> (n longest, heads, d)
        q, k, v = (where(x).transpose(1, 2) for where, x in ((self.queries, q), (self.keys, k), (self.keys, v)))
        plain = self.causal and not window and not softcap
        mask = None if plain else self.visible(window)
        if softcap: out = _capped(q, k, v, mask, scaling, softcap)
        else:
            with sdpa_kernel(BACKENDS): out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain, scale=scaling)
        return out.transpose(1, 2).flatten(0, 1)

    def visible(self, window): # (n, 1, queries, keys)
        ahead = self.query_at[:, None, :, None] - self.key_at[:, None, None, :]
        return (ahead >= 0) & (ahead < window) if window else ahead >= 0

def _capped(q, k, v, mask, scaling, softcap):
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scaling / softcap))
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


# %%
#| export
@dataclass
class PaddedPlan:
    "A row as two batches of padded sequences, and the way back."
    chosen: Padded
    rejected: Padded
    back: Copies

    def attend(self, q, k, v, row, scaling, window, softcap):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        parts = [kind.attend(q, k, v, scaling, window, softcap) for kind in (self.chosen, self.rejected)]
        return self.back(torch.cat(parts))

def _grid(rows, none): # lists of numbers -> (n, longest), filled up with `none`
    out = np.full((len(rows), max(map(len, rows))), none)
    for line, row in zip(out, rows): line[:len(row)] = row
    return out

def padded_plan(row: Row) -> PaddedPlan:
    "From the lengths of the pairs."
    tokens = len(row.ids)
    starts = np.r_[0, np.cumsum([sum(size) for size in row.sizes])[:-1]]
    first = [np.arange(s, s + x + c) for s, (x, c, r) in zip(starts, row.sizes)]
    second = [np.arange(s + x + c, s + x + c + r) for s, (x, c, r) in zip(starts, row.sizes)]
    seen = [np.r_[s:s + x, own] for s, (x, c, r), own in zip(starts, row.sizes, second)]
    position = np.r_[row.position.numpy(), 0]           # a query that is padding stands at 0, and sees the first token of its prompt
    def kind(queries, keys, causal):
        q, k = _grid(queries, tokens), _grid(keys, tokens)
        key_at = np.where(k < tokens, position[k], 2**30) # a key that is padding is ahead of everyone
        return Padded(copies(q, tokens), copies(k, tokens), torch.from_numpy(position[q]), torch.from_numpy(key_at), causal)
    batches = kind(first, first, True), kind(second, seen, False)
    places = np.r_[tuple(b.queries.take.numpy().flatten() for b in batches)]
    back = np.empty(tokens, "int64")
    back[places[places < tokens]] = np.flatnonzero(places < tokens)
    return PaddedPlan(*batches, copies(back, len(places)))


# %%
def padded_inside(model, pairs): # what `packed_logprobs` does on a graphics card, anywhere
    row = pack(pairs)
    row.plan = padded_plan(row)
    return of_row(model, row)

by_padding = {f"{len(p)} pairs": compare(S, p, padded_inside) for p in (pairs[:1], three, pairs[:64])}
by_padding = pd.DataFrame(by_padding, index=["log-probability (nats)", "gradient (relative)"]).T
assert (by_padding < 1e-4).all(axis=None)
by_padding.style.format("{:.0e}")


# %% [markdown]
# Three ways to attend, one set of numbers. None but the first has a loop over pairs, and none of them cares how many different lengths there are.
#
# ### Compiled layers
#
# What is left between the large products (norms, rotations, activations, casts) is a dozen small calls for each layer. `torch.compile` turns them into a few. Layers are compiled one by one, since they are all alike: one compilation serves all. The
# number of tokens is declared to be variable. If layers are recomputed in the backward pass, it is their parts that are compiled, and the recomputation stays outside.
#
# The first call in each mode is the one that compiles, for some seconds. It is made on two pairs of fixed lengths, not on data: a run that was killed and goes on must end with the same kernels, whichever batch it meets first. If it fails (no compiler, an unknown operation), the layers are used as they were,
# and the reason is printed.

# %%
#| export
def _layers(model): return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]

def uncompile(model):
    "Every layer as it was."
    model._compiled_for = None
    for layer in _layers(model):
        for module in (layer, *layer.children()): module._compiled_call_impl = None

def compile_layers(model, logprobs,
                   precision: str="fp32",
                   recompute: bool=False, # whether layers are recomputed in the backward pass (gradient checkpointing)
                  ) -> str|None: # why not, or None
    "Compile the layers of a model for this function, once, and try them in eval and in train mode. Returns why it could not be done."
    wanted = logprobs, precision, recompute
    if getattr(model, "_compiled_for", None) == wanted: return None
    uncompile(model)
    for layer in _layers(model):
        for module in (layer.children() if recompute else [layer]): module.compile(dynamic=True)
    was_training = model.training
    try:
        for training in (False, True): try_out(model.train(training), logprobs, precision)
    except Exception as e:                               # whatever a compiler may raise
        uncompile(model)
        return _first_line(e)
    finally: model.train(was_training)
    model._compiled_for = wanted

def _first_line(e):
    "What an exception says, shortly."
    said = [line.strip() for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
    return " ".join(said[:2]) if said[0].endswith(":") else said[0]

def try_out(model, logprobs, precision: str):
    "One pass over two pairs of fixed lengths, with gradients if the model is in train mode."
    pairs = [dict(zip(PARTS, ([1] * 40, [2] * 30, [1] * 50))), dict(zip(PARTS, ([2] * 17, [1] * 9, [2] * 5)))]
    with autocast(model.device, precision), torch.set_grad_enabled(model.training): chosen, rejected = logprobs(model, pairs)
    if model.training: torch.autograd.grad((chosen - rejected).sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True)


# %%
#| slow
compiled = load_model(world.base, "cpu").train()
why = compile_layers(compiled, packed_logprobs)
errors = compare(compiled, three, lambda model, pairs: packed_logprobs(model, pairs))
uncompile(compiled)
assert why is None and max(errors) < 1e-4
pd.Series(errors, index=["log-probability (nats)", "gradient (relative)"]).map("{:.0e}".format).to_frame("compiled")

# %% [markdown]
# ## Other architectures, with settings that bite
#
# A check on a model that does not use its window says nothing about windows. So these tiny random models have large weights, and small windows, strong soft-caps and scales wherever their
# architecture knows them. One column says what ignoring them would cost.

# %%
usual = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=0)
grouped, old = usual | dict(num_key_value_heads=2), dict(vocab_size=96, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=0)
window = dict(use_sliding_window=True, sliding_window=4, max_window_layers=0)
kinds = dict(llama=grouped, mistral=grouped | dict(sliding_window=4), qwen2=grouped | window, qwen3=grouped | window | dict(head_dim=8), phi3=grouped | dict(sliding_window=4),
             gemma2=grouped | dict(head_dim=8, sliding_window=4, attn_logit_softcapping=0.05, final_logit_softcapping=2.0), gpt2=old, gpt_neox=usual,
             opt=usual | dict(ffn_dim=64, word_embed_proj_dim=16), granite=grouped | dict(logits_scaling=8.0, attention_multiplier=0.3, residual_multiplier=0.5),
             cohere=grouped | dict(logit_scale=8.0), bloom=dict(vocab_size=96, hidden_size=32, n_layer=2, n_head=4), falcon=usual, gptj=old | dict(rotary_dim=4))

neutral = dict(mistral=dict(sliding_window=None), qwen2=dict(use_sliding_window=False), qwen3=dict(use_sliding_window=False), phi3=dict(sliding_window=None),
               gemma2=dict(sliding_window=100, attn_logit_softcapping=None, final_logit_softcapping=None), granite=dict(logits_scaling=1., attention_multiplier=1., residual_multiplier=1.), cohere=dict(logit_scale=1.))

def random_model(kind, **kw):
    torch.manual_seed(0)
    model = freeze_dropout(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **kinds[kind] | kw)))
    for p in model.parameters():
        if p.ndim > 1: torch.nn.init.normal_(p, std=0.3)
    return model

random_pairs = [random_pair(*s) for s in ((9, 7, 12), (3, 15, 2), (1, 1, 6), (12, 5, 5))]

def attempt(kind, logprobs=packed_logprobs):
    try: return compare(random_model(kind), random_pairs, logprobs)
    except (TypeError, NotImplementedError) as e: return str(e)

@torch.no_grad()
def bite(kind): # the same weights, with and without the settings
    if kind in neutral: return max((a - b).abs().max().item() for a, b in zip(*(response_logprobs(random_model(kind, **kw), random_pairs) for kw in ({}, neutral[kind]))))


# %%
tried = pd.Series({kind: attempt(kind) for kind in kinds})
good = pd.DataFrame(tried[[k for k in kinds if k not in ("bloom", "falcon", "gptj")]].tolist(), index=list(kinds)[:11], columns=["log-probability (nats)", "gradient (relative)"])
assert (good < 1e-4).all(axis=None)
good["ignored settings (nats)"] = [bite(kind) for kind in good.index]
others = {name: {kind: attempt(kind, f) for kind in good.index} for name, f in (("padded inside", padded_inside), ("flash, by hand", flash_stand_in))}
assert all(max(e) < 1e-4 for e in others["padded inside"].values())
assert all(kind == "gemma2" if isinstance(e, str) else max(e) < 1e-4 for kind, e in others["flash, by hand"].items())
for name, found in others.items(): good[name + " (nats)"] = [None if isinstance(e, str) else e[0] for e in found.values()]
assert good["ignored settings (nats)"].min() > 0.1
ignored = "ignored settings (nats)"
good.style.format("{:.0e}", subset=[c for c in good if c != ignored], na_rep="refused").format("{:.1f}", subset=[ignored], na_rep="")

# %%
flash = kernel

# %% [markdown]
# ## The guard
#
# BLOOM, Falcon and GPT-J are missing in the table. Falcon stops with an error. The other two go through, and are wrong by nats: they never ask for the registered function.

# %%
tried[["bloom", "falcon", "gptj"]].map(lambda e: e if isinstance(e, str) else f"wrong by {e[0]:.1f} nats").to_frame("packed, without a guard")


# %% [markdown]
# So packing is used only after it has been seen to work, on this very model. One half of the guard reads the config, and the output layer: it is asked for a piece at a time, and where it is adapted, quantised or
# sharded nobody has checked that. The other half compares numbers on a long pair and a short one of the data (a long row must not change a short one): log-probabilities with the model's own logits of four plain
# rows, to $10^{-3}$ nats and $10^{-5}$ of their size, and the gradient of one weight to $10^{-3}$. A window shows in the numbers only where a row is longer than it; so the attention also notes which windows it
# was asked for, and the one in the config must be among them.

# %%
#| export
def _config_refuses(model):
    "What in the config or the output layer rules packing out, or None."
    head, c = model.get_output_embeddings(), model.config.get_text_config()
    odd = set(getattr(c, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if odd: return f"it has layers of {', '.join(sorted(odd))}"
    if not is_plain(head): return "its output layer is adapted, quantised or sharded"

def _window(config):
    "The sliding window that a config puts to use, or None."
    kinds = getattr(config, "layer_types", None)
    used = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if used else None

def _plain(model, x, y):
    "(|y|,) log-probabilities by the model's own logits of one plain row."
    logits = model(input_ids=torch.tensor([[*x, *y]], device=model.device), use_cache=False).logits[0, len(x)-1:-1]
    return token_logprobs(logits, torch.tensor(y, device=model.device))


# %%
#| export
def _gradient(model, logprobs, pair):
    "Of the chosen response, for one weight of the model; None where nothing is trained."
    weight = next((p for p in model.parameters() if p.requires_grad), None)
    return None if weight is None else torch.autograd.grad(logprobs(model, [pair])[0].sum(), weight)[0]

def _plain_pairs(model, pairs):
    "Both responses of each pair by the model's own logits, row by row."
    sides = "chosen_ids", "rejected_ids"
    return tuple(torch.stack([_plain(model, p["prompt_ids"], p[side]).sum() for p in pairs]) for side in sides)

def _numbers_refuse(model, probe):
    "Where packed numbers differ from the model's own on two pairs, the second of them short; None where they agree."
    row = packed_row(model, probe)
    with torch.no_grad(): got, want = (torch.stack(both, 1) for both in (of_row(model, row), _plain_pairs(model, probe)))
    off = (got - want).abs()
    if not (off - 1e-5 * want.abs()).max() < 1e-3: return f"packed log-probabilities differ from its own by {off.max().item():.2g} nats"
    window = _window(model.config.get_text_config())
    if window not in row.windows | {None}: return f"its window of {window} does not reach the attention"
    g, h = (_gradient(model, f, probe[1]) for f in (packed_logprobs, _plain_pairs))
    if g is None: return None
    if not (g - h).norm() <= 1e-3 * h.norm(): return f"a packed gradient differs from its own by {((g - h).norm() / h.norm()).item():.1%}"


# %% [markdown]
# A model that the guard refuses falls back to the padded batches of chapter 02, and is told why.

# %%
#| export
REFUSED = (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError)

def _extremes(pairs):
    "The longest and the shortest."
    by_length = sorted(pairs, key=lambda p: packed_tokens([p]))
    return [by_length[-1], by_length[0]]

def why_not_packed(model, pairs: list) -> str|None:
    "Why packed log-probabilities cannot be used for this model, or None; looks at the longest and the shortest of these pairs, without autocast."
    if refused := _config_refuses(model): return refused
    if must_read_alone(model, pairs): return "its rotary positions depend on the longest row of a batch"
    try:
        with torch.autocast(model.device.type, enabled=False): return _numbers_refuse(model, _extremes(pairs))
    except REFUSED as e: return f"a packed row cannot be computed: {_first_line(e)}"


# %% [markdown]
# The flash kernel is asked for only where packing is right already, and in half precision, where "equal" means as near to fp32 as the other way of packing is. It must be there, it must know the size of the heads, and its error may be one and a half times that of
# the exact path, in value and in gradient.

# %%
#| export
def why_not_flash(model, pairs: list, precision: str) -> str|None:
    "Why the flash kernel cannot be used, or None. Supposes that packing can."
    if precision == "fp32": return "it does not know fp32"
    if model.device.type != "cuda": return "there is no graphics card"
    if not {"scale", "window_size"} <= set(KNOWN): return "this version of PyTorch does not have it"
    if torch.cuda.get_device_capability(model.device) < (8, 0): return "this graphics card does not have it"
    return _flash_numbers_refuse(model, _extremes(pairs), precision)

def _flash_numbers_refuse(model, probe, precision):
    "Where flash is further from fp32 than the exact path is; None where it is not."
    def ask(f): return torch.cat(f(model, probe)).detach()
    def slope(f): return _gradient(model, f, probe[1])
    try:
        with torch.autocast(model.device.type, enabled=False): value, g = ask(packed_logprobs), slope(packed_logprobs)
        with autocast(model.device, precision): off = {f: ask(f) - value for f in (packed_logprobs, flash_logprobs)}
        with autocast(model.device, precision): apart = {f: 0 if g is None else (slope(f) - g).norm() / g.norm() for f in off}
    except REFUSED as e: return f"it cannot be computed: {_first_line(e)}"
    error = {f: d.square().mean().sqrt() for f, d in off.items()}
    if not error[flash_logprobs] <= 1.5 * error[packed_logprobs] + 0.05: return f"it is off by {error[flash_logprobs].item():.2g} nats, the exact path by {error[packed_logprobs].item():.2g}"
    if not apart[flash_logprobs] <= 1.5 * apart[packed_logprobs] + 0.01: return f"its gradient is off by {apart[flash_logprobs]:.1%}, that of the exact path by {apart[packed_logprobs]:.1%}"


# %%
#| export
def choose_logprobs(model, pairs: list, # some of those that will be scored
                    packing="auto",     # auto or off
                    precision="fp32",   # of the forward passes: fp32, bf16 or fp16
                   ):                   # `flash_logprobs`, `packed_logprobs` or `response_logprobs`
    "Packing where it is known to give the model's own numbers, by the flash kernel where there is one; else padding, saying why."
    if packing not in ("auto", "off"): raise ValueError(f"packing: {packing!r} is neither auto nor off")
    if packing == "off": return response_logprobs
    if why := why_not_packed(model, pairs):
        print(f"packing is off: {why}; padded batches are used")
        return response_logprobs
    why = why_not_flash(model, pairs, precision)
    if why and model.device.type == "cuda" and precision != "fp32": print(f"the flash kernel is not used: {why}; attention is padded instead, which is slower")
    return packed_logprobs if why else flash_logprobs


# %%
unused, adapted, hybrid = (random_model(k) for k in ("gpt2", "llama", "llama"))
unused.config.sliding_window = 4                                    # a window that its layers do not ask for
adapted.lm_head = torch.nn.Sequential(adapted.lm_head)
hybrid.config.layer_types = ["full_attention", "linear_attention"]
refused = {kind: random_model(kind) for kind in ("bloom", "falcon", "gptj")} | {"a window that no layer asks for": unused, "an adapted output layer": adapted, "a layer that is not attention": hybrid}
assert all(choose_logprobs(random_model(kind), random_pairs) is packed_logprobs for kind in good.index)
assert all(choose_logprobs(model, random_pairs) is response_logprobs for model in refused.values())


# %% [markdown]
# ## A budget of tokens
#
# A packed row can have any length, so pairs are added until a budget of tokens is full. `micro_batches` of [chapter 02](02_logprobs.ipynb) does it for both functions, counting as they count. Memory then follows from the
# budget (a pair that is longer goes alone), and the gradient of the batch stays what it was.

# %%
def summed(budget, logprobs):
    S.zero_grad()
    parts = micro_batches(pairs[:64], budget, logprobs)
    for part in parts: torch.stack(logprobs(S, part)).diff(dim=0).sum().backward()
    return parts, {n: p.grad.clone() for n, p in S.named_parameters()}

whole = summed(10**6, packed_logprobs)[1]
rows = {}
for name, f, budget in (("packed", packed_logprobs, 400), ("packed", packed_logprobs, 100), ("padded", response_logprobs, 400)):
    parts, g = summed(budget, f)
    rows[name, budget] = {"forward passes": len(parts), "most tokens in one": max(map(f.tokens, parts)), "tokens in all": sum(map(f.tokens, parts)), "gradient (relative)": max((g[n] - whole[n]).norm().item() for n in g) / max(x.norm().item() for x in whole.values())}
budgets = pd.DataFrame(rows).T.rename_axis(["", "budget"])
assert (budgets["gradient (relative)"] < 1e-5).all() and (budgets["most tokens in one"] <= budgets.index.get_level_values("budget")).all()
budgets.style.format({"forward passes": "{:.0f}", "most tokens in one": "{:.0f}", "tokens in all": "{:,.0f}", "gradient (relative)": "{:.0e}"})

# %% [markdown]
# ## On a real model
#
# 64 pairs of HH-RLHF with SmolLM2-135M-Instruct, in fp32: rows of at most 4,096 tokens, against padded batches of one pair (a budget of one token). (Slow cells are skipped in tests, their outputs are kept.)

# %%
#| slow
smol = Path(os.environ.get("SDPO_MODEL", "~/.cache/sdpo_nb/smollm2-135m-instruct")).expanduser() # a local copy, else the hub
name = str(smol) if smol.exists() else "HuggingFaceTB/SmolLM2-135M-Instruct"
data = Path(os.environ.get("SDPO_DATA", "../../shared/data")) / "preferences/hh_harmless.jsonl.gz"
assert data.exists(), "set SDPO_DATA to the folder of the preference data"
real = load_model(name, "cpu")
real_pairs = list(tokenize_pairs(load_pairs(data).select(range(64)), load_tokenizer(name), "hh", 512, 384, chat=True).pairs)
torch.set_num_threads(os.cpu_count())

def real_values(logprobs, budget):
    real.zero_grad(); values = {}
    for part in micro_batches(real_pairs, budget, logprobs):
        c, r = logprobs(real, part)
        ((c - r).sum() / len(real_pairs)).backward()
        values |= {p["key"]: v for p, v in zip(part, torch.stack([c, r], 1).tolist())}
    return torch.tensor([values[p["key"]] for p in real_pairs]), {n: p.grad.clone() for n, p in real.named_parameters()}

(a, g), (b, h) = real_values(response_logprobs, 1), real_values(packed_logprobs, 4096)
torch.set_num_threads(1)
whole = math.sqrt(sum((g[n] - h[n]).norm()**2 for n in g) / sum(x.norm()**2 for x in g.values()))
found = pd.Series({"largest difference of a log-probability (nats)": (a - b).abs().max().item(), "whole gradient (relative)": whole,
                   "worst single tensor (relative)": max(((g[n] - h[n]).norm() / g[n].norm()).item() for n in g)})
assert len(real_pairs) == 64 and [tuple(len(p[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids")) for p in real_pairs[:8]] == eight
assert found.iloc[0] < 1e-3 and found.iloc[1] < 1e-5 and found.iloc[2] < 3e-5
found.map("{:.1e}".format).to_frame("64 real pairs, fp32")


# %% [markdown]
# These are sums of tens of log-probabilities, so a few $10^{-4}$ nats are fp32's own rounding. And bf16? Where the hardware has none it is emulated, slowly and with the same rounding; so sixteen pairs will do.

# %%
#| slow
@torch.no_grad()
def real_half(logprobs, pairs):
    exact = torch.cat([torch.cat(response_logprobs(real, [p])) for p in pairs])
    with torch.autocast("cpu", torch.bfloat16): return (torch.cat([torch.cat(logprobs(real, [p])) for p in pairs]) - exact).abs().mean().item()

torch.set_num_threads(os.cpu_count())
bf16 = pd.Series({name: real_half(f, real_pairs[:16]) for name, f in (("padded", response_logprobs), ("packed", packed_logprobs))})
torch.set_num_threads(1)
assert bf16["packed"] < 1.2 * bf16["padded"]
bf16.round(3).to_frame("mean |bf16 - fp32| (nats)")

# %% [markdown]
# ## How much faster?
#
# `make bench` asks SmolLM2-135M-Instruct. An optimizer batch is eight pairs, cut at 512 tokens; a step is forward, backward, clipping and AdamW. TRL's `DPOTrainer` has its reference precomputed, as we have, and is shown at
# the fastest of micro-batches of 1, 2, 4 and 8 pairs with and without gradient checkpointing, beside micro-batches of 8. All sides take turns step by step, in one process, so that a busy machine slows all alike. It
# was run on two CPU cores in fp32. (Measured before attention was also written for graphics cards; on a CPU the path is the same.)

# %%
bench = json.loads((files("sdpo_nb.data") / "results/packing.json").read_text())
versions = bench["made"]["versions"]
sources = {"hh_harmless fp32": "HH-RLHF harmless", "ultrafeedback_binarized fp32": "UltraFeedback"}

def called(side): # "TRL, 8, checkpointing" -> "TRL, 8 pairs, checkpointing"
    kind, *size = side.split(", ")
    return ", ".join([kind if kind != "TRL" else f"TRL {versions['trl']}", *(f"{n} pair{'s' * (n != '1')}" if n.isdigit() else n for n in size)])

speed = pd.DataFrame([dict(source=name, side=called(side), kind=side.split(", ")[0], **r) for key, name in sources.items() for side, r in bench[key]["rows"].items()])
fig, axes = plt.subplots(1, 2, figsize=(11, 2.6), gridspec_kw=dict(wspace=1.0))
for ax, (name, rows) in zip(axes, speed.groupby("source")):
    sns.barplot(rows, y="side", x="step", hue="kind", palette={"packed": colours["response"], "padded": colours["padding"], "TRL": colours["prompt"]}, legend=False, ax=ax)
    for i, r in enumerate(rows["slower"]): ax.text(rows["step"].iloc[i], i, f" {r[0]:.1f}x" if i else "", va="center")
    ax.set(title=name, xlabel="seconds per step (median)", ylabel="", xlim=(0, 1.15 * rows["step"].max())); sns.despine(ax=ax)

# %% [markdown]
# The ratios with their 95 % intervals over steps, the same for a pass without gradients (what writes a reference table), and where the time goes: operations per pair of the first batch, and how much of the
# machine's measured matrix-product speed they reach.

# %%
ratio = "{:.2f} [{:.2f}, {:.2f}]".format
shown = pd.DataFrame({"steps": speed["steps"], "slower than packed": [ratio(*r) for r in speed["slower"]], "reference pass, slower": [ratio(*r) for r in speed["reference_slower"]],
                      "GFLOP per pair": speed["gflop_per_pair"].round().astype(int), "of matmul speed": speed["of_peak"].map("{:.0%}".format)}).set_index(pd.MultiIndex.from_frame(speed[["source", "side"]]))
best = {key: bench[key]["rows"][bench[key]["best_trl"]]["slower"] for key in sources}
assert all(low > 1.3 for _, low, _ in best.values())
shown

# %% [markdown]
# Against TRL at its best a step of HH-RLHF is a good two times faster, and more than four times where pairs are batched by eight. UltraFeedback has long responses and short prompts, so there is less to save. Most of the
# gain is work not done. The rest of the way to full speed goes into what is not a matrix product: attention, norms, activations, the optimizer.
#
# And in bf16? On a CPU that has it in hardware (another machine, two cores with AVX-512 BF16, four steps), everything that is a matrix product becomes four times faster, and what is none weighs more. TRL is at the best of the same eight settings, with autocast on.

# %%
half = bench["hh_harmless bf16"]["rows"]
in_half = pd.DataFrame({called(side): {"seconds per step": f"{r['step']:.1f}", "slower than packed": ratio(*r["slower"]), "reference pass, slower": ratio(*r["reference_slower"])} for side, r in half.items()}).T
assert half[bench["hh_harmless bf16"]["best_trl"]]["slower"][1] > 1.3
in_half.rename_axis("HH-RLHF harmless, bf16")

# %% [markdown]
# Memory is the peak of a fresh process that makes one step on the longest of 16 pairs; weights, gradients and AdamW's moments take 2 GiB of it.

# %%
pd.Series({called(side): v for side, v in bench["memory_gib"].items()}, name="peak memory (GiB)").round(1).to_frame()

# %% [markdown]
# And the vocabulary? A pass without gradients should not care how large it is. With gradients, copies of the output matrix are added (the gradient of a piece, the sum, and that of the embedding, which here is the same
# matrix), and nothing else.

# %%
vocabulary = pd.DataFrame(bench["vocabulary_mib"]).rename(columns=lambda v: f"{int(v):,} tokens").rename(index={"one_weight_matrix": "the output matrix itself"})
little, much = (vocabulary[c] for c in vocabulary)
assert much["packed, score"] < 1.2 * little["packed, score"] and much["padded, score"] > 4 * little["padded, score"]
beyond = vocabulary.loc["packed, step"] - 3 * vocabulary.loc["the output matrix itself"]
assert abs(beyond.iloc[1] - beyond.iloc[0]) < 64      # one piece of logits
vocabulary.round().astype(int).rename_axis("memory added (MiB)")

# %% [markdown]
# Nor should a source grow with the number of its pairs. Tokenised pairs lie in a file that is mapped, not read; here a thousand and a million were tokenised and a part of them scored.

# %%
many = pd.Series({f"{int(n):,} pairs": v for n, v in bench["pairs_gib"].items()}, name="peak memory (GiB)")
assert many.iloc[1] < 1.3 * many.iloc[0]
many.round(2).to_frame()

# %% [markdown]
# Last, a whole run: two stages of 32 pairs each, from loading S to the last file, by `sdpo` packed and padded, and by hand with one TRL trainer per stage. Packed and padded are the same run, loss by loss. (TRL draws its
# batches in another order and starts its warm-up at 0, so its losses are others.) What `sdpo` spends on the partition, on the models between the stages and on the report is in its time. Minutes and memory are those of a default of 4,096
# tokens; the last row is a later pair of runs, on another machine, with today's 1,536 tokens against TRL's one pair.

# %%
whole = pd.DataFrame({called(name.removeprefix("whole ")): v for name, v in bench.items() if name.startswith("whole")}).T
packed, padded = (np.array(whole.loc[side, "losses"]) for side in ("packed", "padded"))
today = bench["gib_today"]
assert today["packed"] < today["TRL, 1"]
assert len(packed) == 8 and np.ptp(packed) > 0.01 and abs(packed - padded).max() < 1e-3
later = {called(side): f"{gib:.1f}" for side, gib in today.items()}
rows = {side: [f"{w.seconds / 60:.1f}", f"{w.gib:.1f}", *(f"{x:.4f}" for x in w.losses), later.get(side, "")] for side, w in whole.iterrows()}
pd.DataFrame(rows, index=["minutes", "peak memory (GiB)", *(f"loss of step {t}" for t in range(1, 9)), "peak memory today (GiB)"])

# %% [markdown]
# ## On a graphics card
#
# `make bench-gpu` asks the same of a card: random weights of two shapes, 32 pairs an optimizer step, bf16, batches whose lengths the card has not seen. TRL's model is prepared as its own `train` prepares it, so it computes in bf16, too; "x TRL" compares tokens a
# second with the best of its four micro-batches. "Useful" work is 6 operations for each parameter and packed token, as a share of what a large bf16 matrix product reached there.

# %%
gpu = json.loads((files("sdpo_nb.data") / "results/gpu.json").read_text())

def on_card(setting):
    rows = {called(side): r for side, r in setting["rows"].items() if r["step"]}
    return pd.DataFrame({side: {"s a step": f"{r['step']:.3f}", "x TRL": f"{r['times_trl']:.2f}", "useful": f"{r['of_peak']:.0%}", "GiB": f"{r['peak_gib']:.1f}", "first step": f"{r['first']:.2f}", "reference pass": f"{r['reference']:.3f}" if r.get("reference") else ""}
                         for side, r in rows.items()}).T

assert all(s["rows"]["ours, compiled"]["times_trl"] > 1.3 for s in gpu["settings"].values())
card = f"{gpu['card']['name']}, PyTorch {gpu['versions']['torch']}"
pd.concat({name: on_card(s) for name, s in gpu["settings"].items()}, names=[card, "side"])

# %% [markdown]
# A model of 1.2B parameters uses more than half of what the card can do. One of 135M does not, and here is less of an advantage: its layers are so small that the card waits for Python to start the next kernel, ours as much as TRL's, and with 32 rows at once TRL starts few. What each change gave is in the rows: one
# call of attention a layer ("ours"), then compiled layers. Recomputing layers repeats all starts, and costs half of the speed for half of the memory. One run on one card; the first row of a setting compiles, which takes 7 to 15 s once. A TRL row with small micro-batches
# pays for every new length (its attention is planned anew), and varies most. In this run "same bits" was not yet what its name says ([06](06_trainer.ipynb)): its rows are the price of a switch that did not reach the flash kernel.

# %% [markdown]
# ## What you now have
#
# - `packed_logprobs`: the numbers and gradients of chapter 02, without padding, without a second reading of the prompt, without logits that nobody asks for.
# - `flash_logprobs`, the same in one call of attention a layer, where the card has the kernel; and attention padded inside where it has not.
# - `choose_logprobs`: a guard that uses each only where it has been seen to be right.
# - A budget of tokens in place of a number of pairs.
#
# ## Questions to test yourself
#
# 1. Why is the last token of the prompt read twice, and why is the last token of a response never read?
# 2. Which of the four mistakes would a test with a single pair miss?
# 3. Pairs with long responses and short prompts gain little. Which of the three savings is left to them?
# 4. Why must the guard look for the window, when it has already compared the numbers?
#
# ## Try this
#
# - Put `merge_up_to=10**6` into `_blocks`, so that a row is one block. What does it cost with 64 pairs of the tiny world, and with real ones?
# - Set `sdpo_nb.packing.PIECE` to 4 MiB and to 1 GiB, and compare the peak memory of a fresh process. Below which value does it stop falling?
# - Load a model of your own and call `why_not_packed`.
