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
import contextlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from sdpo_nb.logprobs import check_prompts, response_logprobs, token_logprobs

# %%
import json, math, os
from importlib.resources import files
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
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
    "Pairs, packed. All tensors of tokens are (N,)."
    ids: Tensor; position: Tensor; pair: Tensor; side: Tensor # side: 0 prompt, 1 chosen, 2 rejected
    read: Tensor       # (m,) where the logits for each response token stand
    blocks: list[int]  # lengths of the stretches that attend among themselves
    masks: dict = field(default_factory=dict)
    windows: set = field(default_factory=set) # sliding windows that the layers have asked for

def _flat(values, device): return torch.cat([torch.as_tensor(v) for v in values]).to(device)

def pack(pairs: list, # n pairs with prompt_ids, chosen_ids, rejected_ids
         device="cpu") -> Row:
    "One row of all pairs: prompt, chosen, rejected, next pair. Raises ValueError for a pair without a prompt."
    check_prompts(pairs)
    sizes = [[len(p[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids")] for p in pairs]
    ids = _flat([list(p[k]) for p in pairs for k in ("prompt_ids", "chosen_ids", "rejected_ids")], device)
    position = _flat([torch.arange(n) + start for x, c, r in sizes for n, start in ((x, 0), (c, x), (r, x))], device)
    pair = _flat([torch.full((sum(s),), i) for i, s in enumerate(sizes)], device)
    side = _flat([torch.full((n,), k) for s in sizes for k, n in enumerate(s)], device)
    return Row(ids, position, pair, side, _read(sizes, device), _blocks([sum(s) for s in sizes]))


# %% [markdown]
# The shift of chapter 02 changes in one place. A response token is predicted at the position before it, and the *first* token of both responses at the last position of the
# prompt, which is therefore read twice.

# %%
#| export
def _read(sizes, device):
    "Positions whose logits predict the response tokens, in the order of the tokens."
    out, start = [], 0
    for x, c, r in sizes:
        last = start + x - 1
        out += [torch.arange(last, last + c), torch.tensor([last]), torch.arange(last + c + 1, last + c + r)]
        start += x + c + r
    return _flat(out, device)

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
def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, row: Row=None, sliding_window=None, softcap=None, **rest):
    "Attention of a packed row, block by block; transformers calls it in every layer. Raises NotImplementedError for what it cannot do."
    unknown = [k for k in ("s_aux", "position_bias", "head_mask") if rest.get(k) is not None] + ["dropout"] * bool(dropout)
    if row is None or unknown: raise NotImplementedError(f"its attention wants {', '.join(unknown)}" if unknown else "its layers do not pass the row to the attention")
    row.windows.add(sliding_window)
    scaling, start, out = scaling or query.shape[-1] ** -0.5, 0, []
    for n, q, k, v in zip(row.blocks, *(x[0].split(row.blocks, 1) for x in (query, key, value))):
        out.append(_attend(q, k, v, _bias(row, slice(start, start + n), sliding_window, q.dtype), scaling, softcap))
        start += n
    return torch.cat(out)[None], None

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
# has to exist at a time. The piece is made again in the backward pass, so nothing of the size [positions, vocabulary] is kept.
#
# One does not simply multiply by that matrix: Gemma 2 caps the logits, Granite and Cohere scale them, and whoever multiplies by hand scores another model. So we ask the *model's own*
# forward pass, with its decoder replaced, for that moment, by the hidden states that are already there.

# %%
#| export
PIECE = 64 * 2**20 # bytes of the fp32 logits of one piece; two or three such tensors exist at a time

@contextlib.contextmanager
def _answering(decoder, hidden):
    "For a while, a decoder that answers with these hidden states."
    decoder.forward = lambda *args, **kwargs: BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)
    try: yield
    finally: del decoder.forward

def _head(model, hidden, ids):
    with _answering(model.get_decoder(), hidden[None]): logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return token_logprobs(logits, ids)

def head_logprobs(model, hidden: Tensor, # (m, d) hidden states
                  ids: Tensor,           # (m,) the tokens that came next
                 ) -> Tensor:            # (m,) fp32, nats
    "Log-probability of each token by the model's own output layer, in pieces of bounded size that the backward pass makes again."
    size = max(1, PIECE // (4 * model.get_output_embeddings().weight.shape[0]))
    return torch.cat([checkpoint(_head, model, h, t, use_reentrant=False) for h, t in zip(hidden.split(size), ids.split(size))])


# %% [markdown]
# ## The same function, packed
#
# `packed_logprobs` takes and returns what `response_logprobs` does, so the two are interchangeable. Two facts travel with it: what a batch costs, in tokens, and which attention it used.

# %%
#| export
def packed_tokens(pairs: list) -> int:
    "Tokens of the packed row of these pairs."
    return sum(len(p[k]) for p in pairs for k in ("prompt_ids", "chosen_ids", "rejected_ids"))

def packed_logprobs(model,       # a causal LM whose attention can be set; gradients flow
                    pairs: list, # n pairs with prompt_ids, chosen_ids, rejected_ids
                   ) -> tuple[Tensor, Tensor]: # (n,) log pi(y_w|x) and (n,) log pi(y_l|x), nats, fp32
    "What `response_logprobs` of chapter 02 computes, from one packed row."
    return _of_row(model, pack(pairs, model.device), len(pairs))

packed_logprobs.tokens, packed_logprobs.attention = packed_tokens, "packed"

def _of_row(model, row, n):
    with attention(model, "sdpo_packed"):
        hidden = model.get_decoder()(input_ids=row.ids[None], position_ids=row.position[None], row=row, use_cache=False).last_hidden_state[0]
    scored = row.side > 0
    logp = head_logprobs(model, hidden[row.read], row.ids[scored])
    sums = logp.new_zeros(2 * n).index_add(0, 2 * row.pair[scored] + row.side[scored] - 1, logp)
    return sums[0::2], sums[1::2]


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
        row = pack(pairs, model.device); change(row)
        return _of_row(model, row, len(pairs))
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
#
# ## Other architectures, with settings that bite
#
# A check on a model that does not use its window says nothing about windows. So these tiny random models have large weights, and small windows, strong soft-caps and scales wherever their
# architecture knows them. The last column says what ignoring them would cost.

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

def random_pair(*sizes): return {k: torch.randint(2, 96, (n,)).tolist() for k, n in zip(("prompt_ids", "chosen_ids", "rejected_ids"), sizes)}
random_pairs = [random_pair(*s) for s in ((9, 7, 12), (3, 15, 2), (1, 1, 6), (12, 5, 5))]

def attempt(kind):
    try: return compare(random_model(kind), random_pairs)
    except TypeError as e: return str(e)

@torch.no_grad()
def bite(kind): # the same weights, with and without the settings
    if kind in neutral: return max((a - b).abs().max().item() for a, b in zip(*(response_logprobs(random_model(kind, **kw), random_pairs) for kw in ({}, neutral[kind]))))


# %%
tried = pd.Series({kind: attempt(kind) for kind in kinds})
good = pd.DataFrame(tried[[k for k in kinds if k not in ("bloom", "falcon", "gptj")]].tolist(), index=list(kinds)[:11], columns=["log-probability (nats)", "gradient (relative)"])
assert (good < 1e-4).all(axis=None)
good["ignored settings (nats)"] = [bite(kind) for kind in good.index]
assert good["ignored settings (nats)"].min() > 0.1
good.style.format("{:.0e}", subset=list(good)[:2]).format("{:.1f}", subset=list(good)[2:], na_rep="")

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
    if type(head) is not torch.nn.Linear or type(head.weight) is not torch.nn.Parameter: return "its output layer is adapted, quantised or sharded"

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
def _numbers_refuse(model, probe):
    "Where packed numbers differ from the model's own on two pairs, the second of them short; None where they agree."
    row = pack(probe, model.device)
    with torch.no_grad():
        got = torch.stack(_of_row(model, row, 2), 1)
        want = torch.tensor([[_plain(model, p["prompt_ids"], p[side]).sum() for side in ("chosen_ids", "rejected_ids")] for p in probe], device=got.device)
    off = (got - want).abs() - 1e-5 * want.abs()
    if not off.max() < 1e-3: return f"packed log-probabilities differ from its own by {(got - want).abs().max().item():.2g} nats"
    if (window := _window(model.config.get_text_config())) not in row.windows | {None}: return f"its window of {window} does not reach the attention"
    weight, p = next((p for p in model.parameters() if p.requires_grad), None), probe[1]
    if weight is None: return None
    g = torch.autograd.grad(packed_logprobs(model, [p])[0].sum(), weight)[0]
    h = torch.autograd.grad(_plain(model, p["prompt_ids"], p["chosen_ids"]).sum(), weight)[0]
    if not (g - h).norm() <= 1e-3 * h.norm(): return f"a packed gradient differs from its own by {((g - h).norm() / h.norm()).item():.1%}"


# %% [markdown]
# A model that the guard refuses falls back to the padded batches of chapter 02, and is told why.

# %%
#| export
def why_not_packed(model, pairs: list) -> str|None:
    "Why packed log-probabilities cannot be used for this model, or None; looks at the longest and the shortest of these pairs, without autocast."
    if refused := _config_refuses(model): return refused
    by_length = sorted(pairs, key=lambda p: packed_tokens([p]))
    device = model.device.type
    try:
        with torch.autocast(device, enabled=False): return _numbers_refuse(model, [by_length[-1], by_length[0]])
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError) as e: return f"a packed row cannot be computed: {(str(e) or type(e).__name__).splitlines()[0]}"

def choose_logprobs(model, pairs: list, # some of those that will be scored
                    packing="auto",     # auto or off
                   ):                   # `packed_logprobs` or `response_logprobs`
    "Packing where it is known to give the model's own numbers, else padding, saying why."
    if packing not in ("auto", "off"): raise ValueError(f"packing: {packing!r} is neither auto nor off")
    if packing == "off": return response_logprobs
    why = why_not_packed(model, pairs)
    if why: print(f"packing is off: {why}; padded batches are used")
    return response_logprobs if why else packed_logprobs


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
# was run on two CPU cores in fp32. No GPU has been measured.

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
# batches in another order and starts its warm-up at 0, so its losses are others.) What `sdpo` spends on the partition, on the models between the stages and on the report is in its time; its memory is that of 4096 tokens at a
# time, where TRL takes one pair.

# %%
whole = pd.DataFrame({called(name.removeprefix("whole ")): v for name, v in bench.items() if name.startswith("whole")}).T
packed, padded = (np.array(whole.loc[side, "losses"]) for side in ("packed", "padded"))
assert len(packed) == 8 and np.ptp(packed) > 0.01 and abs(packed - padded).max() < 1e-3
pd.DataFrame({side: [f"{w.seconds / 60:.1f}", f"{w.gib:.1f}", *(f"{x:.4f}" for x in w.losses)] for side, w in whole.iterrows()}, index=["minutes", "peak memory (GiB)", *(f"loss of step {t}" for t in range(1, 9))])

# %% [markdown]
# ## What you now have
#
# - `packed_logprobs`: the numbers and gradients of chapter 02, without padding, without a second reading of the prompt, without logits that nobody asks for.
# - `choose_logprobs`: a guard that uses it only where it has been seen to be right.
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
