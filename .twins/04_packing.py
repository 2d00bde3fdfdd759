# %% [markdown]
# # Packing
# > The same log-probabilities from fewer tokens: a row holds prompt, chosen and rejected of many pairs, without padding, and only responses reach the output layer.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/04_packing.ipynb)
#
# **You should know** how [chapter 02](02_logprobs.ipynb) computes the log-probability of a response, and what attention does with queries, keys and values.
#
# **Time** about 100 minutes to read up to "A graphics card wants few, large calls": the idea, its checks, and how much faster it is. The three sections after it say in their headings that you may skip them; with them it is 190 minutes.
# Under a minute to run on two CPU cores, without the cells marked slow.
#
# Preference training (in this book DPO, [chapter 03](03_loss.ipynb)) asks one question over and over: how likely is this response to this prompt? Chapter 02 answers it in a way that everybody can read. But most of
# what it makes the model compute is thrown away. It computes padding. It reads every prompt twice. And it computes a distribution over the whole vocabulary
# at places that nobody asks about.
#
# This chapter removes all three. Nothing is approximated, so we can hold every step against chapter 02: the same values, the same gradients. In the end a training step on real pairs is 1.4 to 2.4 times as fast as the best setting of TRL, a library that many people use for this ("How much faster?").
#
# The way through: we count what is wasted, lay the pairs end to end in one row, tell attention who may see whom, and let only responses reach the output layer. Then we check, and measure.

# %%
#| default_exp packing

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
import contextlib, functools, inspect
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

from sdpo_nb.logprobs import autocast, check_prompts, fp32_logits, half_weight, is_plain, memory_ended
from sdpo_nb.logprobs import must_read_alone, padded_tokens, response_logprobs, same_bits, token_logprobs

# %%
import json, math, os, textwrap
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
from sdpo_nb.world import complaint, load_world, skipped_without

torch.set_num_threads(1)
pd.set_option("display.width", 180, "display.max_columns", 20);
torch.manual_seed(0);

# %% [markdown]
# ## What a padded batch holds
#
# How much of a padded batch does anybody need? Let us count.
#
# A *pair* is a prompt with two responses: people preferred the *chosen* one to the *rejected* one. Here are the lengths of eight pairs, the first ones of a public
# collection of such judgements (HH-RLHF harmless), in tokens of the model SmolLM2.

# %%
eight = [ # tokens of prompt, chosen, rejected
    (228, 29, 62),
    (196, 61, 29),
    (119, 66, 88),
    (328, 9, 70),
    (42, 86, 69),
    (167, 47, 37),
    (182, 49, 19),
    (102, 40, 27),
]

# %% [markdown]
# Chapter 02 puts them into sixteen rows: the prompt with its chosen response, eight times, then the prompt with its rejected response. A batch is one tensor, so all rows must have one length, and short ones are filled up with *padding*. Before you look: which part of such a batch
# is needed, do you think? A half? A third?

# %%
PADDING, PROMPT, AGAIN, RESPONSE = range(4)

def padded_rows(lengths): # (rows, width) what stands in each cell of the batch
    width = max(x + max(c, r) for x, c, r in lengths)
    rows = []
    for side, prompt in ((1, PROMPT), (2, AGAIN)):
        for sizes in lengths:
            x, y = sizes[0], sizes[side]
            padding = width - x - y
            rows.append([prompt] * x + [RESPONSE] * y + [PADDING] * padding)
    return np.array(rows)

batch = padded_rows(eight)
needed = sum(x + c + r for x, c, r in eight)
{"rows, tokens in each": batch.shape, "cells": batch.size, "needed": needed}

# %%
colours = {
    "padding": "#d9d9d9",
    "prompt": "#4878d0",
    "the same prompt again": "#d65f5f",
    "response": "#6acc64",
}

def draw_rows(cells, title): # in every picture a row is as high, and a token as wide
    fig, ax = plt.subplots(figsize=(6, 0.16 * len(cells)))
    ax.set_position([0, 0, 1, 1])
    cmap = ListedColormap(list(colours.values()))
    sns.heatmap(cells, cmap=cmap, vmin=0, vmax=3, cbar=False, xticklabels=100, yticklabels=False, ax=ax)
    ax.set(title=title, xlabel="token")
    ax.tick_params(rotation=0)
    return ax

ax = draw_rows(batch, f"16 rows of one padded batch: {batch.size:,} cells, {needed:,} of them needed")
ax.text(50, 1.5, "prompt", color="white", va="center")
ax.text(20, 9, "the same prompt again", color="white", va="center")
ax.text(300, 6.5, "padding", va="center")
for x, y in ((48, 4.55), (337, 11.55)): ax.text(x, y, "response", fontsize=8, va="center")


# %% [markdown]
# Only a third. Blue and green are needed, grey and red are not. Smaller batches have less padding. A batch of one pair has hardly any, but it still reads its prompt twice.
# How far do we get with smaller batches?

# %%
def padded_cells(lengths, size): # of padded batches of `size` pairs, cut in the order of the data
    starts = range(0, len(lengths), size)
    return sum(padded_rows(lengths[i:i+size]).size for i in starts)

counts = pd.Series({size: padded_cells(eight, size) for size in (8, 4, 2, 1)})
waste = counts / needed
assert waste.is_monotonic_decreasing
assert waste.min() > 1.5
table = pd.DataFrame({"cells": counts, "cells / needed tokens": waste}).rename_axis("pairs in a batch")
table.style.format({"cells": "{:,.0f}", "cells / needed tokens": "{:.2f}"})


# %% [markdown]
# Not far enough: even alone, these pairs cost three quarters more than they need. Two changes remove the grey and the red.
#
# - *Share the prompt.* One row reads `prompt | chosen | rejected`, so the prompt is read once.
# - *Do not pad.* The rows are laid end to end in one long row, and attention sees to it that no pair looks at another.
#
# ## A packed row
#
# How does a token in a long row know where it belongs? We note three things for each. Its *pair*. Its *side*: prompt, chosen or rejected. And its *position*, which the model uses to
# know how far apart two tokens are. The position starts again after the prompt for the rejected response: to the model, both responses follow the prompt directly.
#
# For each response token we also note where it is *read*: the place whose logits predict it. That is the token before it. (The last four fields are for later.)

# %%
#| export
@dataclass
class Row:
    "Pairs, packed: N tokens, of which m are response tokens."
    ids: Tensor        # (N,) token ids
    position: Tensor   # (N,) restarts after the prompt for the rejected response
    pair: Tensor       # (N,) number of the pair, from 0
    side: Tensor       # (N,) 0 prompt, 1 chosen, 2 rejected
    scored: Tensor     # (m,) where the response tokens stand
    read: Tensor       # (m,) where the logits for each of them stand
    sizes: list        # of each pair: tokens of prompt, chosen, rejected
    blocks: list       # lengths of the stretches that attend among themselves
    masks: dict = field(default_factory=dict)  # of the blocks, made when first asked for
    windows: set = field(default_factory=set)  # sliding windows that the layers have asked for
    plan: object = None                        # how a graphics card attends


# %% [markdown]
# One pair by hand, with two prompt tokens, one chosen and two rejected ones. Which positions do the rejected tokens have, and where is the first of them read?

# %%
by_hand = Row(
    ids=torch.tensor([5, 6, 7, 8, 9]),
    position=torch.tensor([0, 1, 2, 2, 3]),
    pair=torch.tensor([0, 0, 0, 0, 0]),
    side=torch.tensor([0, 0, 1, 2, 2]),
    scored=torch.tensor([2, 3, 4]),
    read=torch.tensor([1, 1, 3]),
    sizes=[[2, 1, 2]],
    blocks=[5],
)
print(textwrap.fill(str(by_hand), 100))

# %% [markdown]
# Packing is one walk over the pairs. Three lists grow on the way, and the rest follows from the sizes. (`_blocks` cuts the row into stretches for attention; why, we see in the section after next.) Look at `read`: the first rejected token is predicted at the last token of the prompt, not
# at the token before it in the row, which belongs to the chosen response. So that place is read twice.

# %%
#| export
PARTS = ("prompt_ids", "chosen_ids", "rejected_ids")

def _blocks(lengths, merge_up_to=256):
    "Neighbours that are short attend in one block, which saves calls; a long pair is a block of its own."
    out = []
    for n in lengths:
        if out and out[-1] + n <= merge_up_to: out[-1] += n
        else: out.append(n)
    return out

def pack(
    pairs: list,   # n pairs with prompt_ids, chosen_ids, rejected_ids
) -> Row:          # on the CPU
    """One row: prompt, chosen, rejected, next pair.
    Raises ValueError for no pairs, and for a pair without a prompt or with an empty response."""
    check_prompts(pairs)
    ids, position, read, sizes = [], [], [], []
    for p in pairs:
        x, c, r = size = [len(p[part]) for part in PARTS]
        last = len(ids) + x - 1                       # the last token of the prompt
        for part in PARTS: ids.extend(p[part])
        position.append(np.arange(x + c))             # prompt and chosen run on;
        position.append(np.arange(x, x + r))          # rejected starts again after the prompt
        read.append(np.arange(last, last + c))        # each token is read one place before it;
        read.append([last][:r])                       # the first rejected one at the prompt's end, again
        read.append(np.arange(last + c + 1, last + c + r))
        sizes.append(size)

    lengths = [sum(size) for size in sizes]
    pair = np.repeat(np.arange(len(pairs)), lengths)
    side = np.repeat(np.tile([0, 1, 2], len(pairs)), np.ravel(sizes))
    columns = ids, np.concatenate(position), pair, side, np.flatnonzero(side), np.concatenate(read)
    tensors = [torch.from_numpy(np.asarray(column, "int64")) for column in columns]
    return Row(*tensors, sizes, _blocks(lengths))


# %%
assert str(pack([dict(prompt_ids=[5, 6], chosen_ids=[7], rejected_ids=[8, 9])])) == str(by_hand)

# %% [markdown]
# The row that was written by hand comes out again. Let us pack three pairs of the tiny world of [chapter 00](00_world.ipynb), in which every character is a token, and look at the first of them.

# %%
world = load_world()
S, tok = load_model(world.base), load_tokenizer(world.base)     # S: the model that training starts from
pairs = list(tokenize_pairs(load_pairs(world.sources["riddle"]), tok, "riddle").pairs)
by_prompt = sorted(pairs, key=lambda p: len(p["prompt_ids"]))
three = by_prompt[::len(pairs) // 3][:3]                        # unequal lengths
row = pack(three)

tokens = [tok.decode(i).replace(" ", "␣") for i in row.ids]
sides = [("prompt", "chosen", "rejected")[side] for side in row.side]
shown = pd.DataFrame({
    "token": tokens,
    "pair": row.pair,
    "side": sides,
    "position": row.position,
    "predicted at": "",
})
shown.loc[row.scored.tolist(), "predicted at"] = [str(i) for i in row.read.tolist()]
shown[shown["pair"] == 0].T

# %% [markdown]
# The same as a picture. An arc leads from the place that is read to the token that is predicted there. Look at the last token of the prompt: two arcs start from it. And look at the positions: they run on from prompt to chosen, and from the prompt *again* to rejected.

# %%
first = shown[shown["pair"] == 0]
fills = {"prompt": colours["prompt"], "chosen": colours["response"], "rejected": "#ee854a"}

fig, ax = plt.subplots(figsize=(9, 1.7))
for i, token in first.iterrows():
    ax.add_patch(plt.Rectangle((i, 0), 0.94, 1, color=fills[token["side"]]))
    text = token["token"].strip("<|>").replace(" ", "\N{OPEN BOX}")
    long = len(text) > 4
    ax.text(i + 0.47, 0.5, text, ha="center", va="center", fontsize=6.5 if long else 8, rotation=90 * long)
    ax.text(i + 0.47, -0.35, token["position"], ha="center", va="center", fontsize=8, color="dimgray")
for side, part in first.groupby("side"):
    ax.text(part.index[0], -1.0, side, va="center", color=fills[side], weight="bold")
for place, token in zip(row.read.tolist(), row.scored.tolist()):
    if token not in first.index: continue
    bend, width = (0.25, 1.6) if token - place > 1 else (0.7, 0.8)
    arc = dict(arrowstyle="->", connectionstyle=f"arc3,rad=-{bend}", lw=width)
    ax.annotate("", xy=(token + 0.47, 1.02), xytext=(place + 0.47, 1.02), arrowprops=arc)
ax.text(-0.3, -0.35, "position", ha="right", va="center", fontsize=8, color="dimgray")
ax.set(xlim=(-0.1, len(first)), ylim=(-1.3, 2))
ax.set_title("who reads what: the long arc leads to the first rejected token")
ax.axis("off");

# %% [markdown]
# Two statements can be checked for all three pairs: the tokens are those of the pairs, and every response token is read one position before its own.

# %%
responses = [token for p in three for part in ("chosen_ids", "rejected_ids") for token in p[part]]
assert row.ids[row.scored].tolist() == responses
assert (row.position[row.read] + 1 == row.position[row.scored]).all()

# %% [markdown]
# What if a pair has no prompt? Then nothing stands before the first token of its responses, and nothing predicts it. So `pack` refuses:

# %%
complaint(pack, [dict(prompt_ids=[], chosen_ids=[5, 6], rejected_ids=[7])])

# %% [markdown]
# And the eight pairs from above? They make 2,152 tokens. Here they are folded at the width of the padded batch, on the same scale, so the areas can be compared.

# %%
width = batch.shape[1]
flat = []
for x, c, r in eight: flat += [PROMPT] * x + [RESPONSE] * (c + r)
assert len(flat) == needed == 2152
rest = [np.nan] * (-len(flat) % width)                # stays white
folded = np.reshape(flat + rest, (-1, width))
ax = draw_rows(folded, "the same pairs in one row, folded: 2,152 cells, all needed")
ax.text(50, 0.5, "prompt", color="white", va="center")
ax.text(235, 0.5, "both responses", va="center", fontsize=8);


# %% [markdown]
# ## Who sees whom
#
# Who may see whom? In one long row every token could look at every token before it, also at those of other pairs. Then each pair would change the numbers of the next. So there is a rule. A token sees only tokens of its own pair; of these, the prompt and its own side; and of these, only tokens at its own position or
# earlier. Some models also have a *sliding window*: a layer looks back over so many positions and no further.

# %%
#| export
def visible(
    row: Row,          # a packed row
    tokens: slice,     # of the row: a block, or all of it
    window: int=None,  # how many positions a token sees, its own included; None: all
) -> Tensor:           # (n, n) bool; [i, j]: i sees j
    "Which of these tokens see which."
    pair, side, position = row.pair[tokens], row.side[tokens], row.position[tokens]
    same_pair = pair[:, None] == pair
    prompt_or_own_side = (side == 0) | (side[:, None] == side)
    not_ahead = position[:, None] >= position
    sees = same_pair & prompt_or_own_side & not_ahead
    return sees & (position[:, None] - position < window) if window else sees


# %%
everything = visible(row, slice(None))

def draw_sees(sees, ax, title): # 0 not seen, 1 a prompt token, 2 a chosen one, 3 a rejected one
    cmap = ListedColormap(["white", *fills.values()])
    sns.heatmap(sees, cmap=cmap, vmin=0, vmax=3, cbar=False, square=True, ax=ax)
    ax.set(xticks=[], yticks=[])
    sns.despine(ax=ax, left=False, bottom=False, top=False, right=False)
    ax.set(title=title, xlabel="keys: tokens that are seen", ylabel="queries: tokens that see")

fig, ax = plt.subplots(figsize=(4.2, 4.2))
draw_sees(everything * (1 + row.side), ax, "three pairs in one row")
patches = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in fills.values()]
names = [f"a {side} token" for side in fills]
ax.legend(patches, names, title="what is seen", loc="upper right", fontsize="small")
x, c, r = row.sizes[0]
notch = x + c / 2, x + c + r / 2
arrow = dict(arrowstyle="->")
ax.annotate("the notch:\nrejected does\nnot see chosen", notch, (1, 62), arrowprops=arrow, fontsize=8);

# %% [markdown]
# Each pair is a triangle with a notch. A triangle is what every language model has: a token sees the tokens before it. The notch is new. The rejected response sees the prompt, and not the chosen response that stands between them; so to it the row looks as if chosen were not there. With a window of 3 nobody sees more than three
# tokens.

# %%
rejected = everything[x + c]                     # the first rejected token of the first pair
assert rejected[:x].all()                        # sees its prompt
assert not rejected[x:x + c].any()               # not the chosen response
assert not rejected[x + c + r:].any()            # and no other pair
assert visible(row, slice(None), 3).sum(1).max() == 3


# %% [markdown]
# ## Attention, block by block
#
# Can we leave out the white part? With one large mask, attention would compute a score for every white cell, too, and then throw it away. So we cut the row into *blocks*, stretches of whole pairs along the diagonal, and compute one after the other.
#
# First the attention of one block. What may not be seen is told by a *bias* that is added to the scores: 0 where a token is seen, and the lowest number there is elsewhere, of which a softmax leaves nothing. And many models let several query heads share one head of keys and values, which saves memory; here each gets its copy.
#
# The work goes through PyTorch's *fused* attention: one operation that goes from queries, keys and values straight to the result, and keeps no matrix of scores for the
# backward pass. A few models squash their scores with a *soft-cap* $c$, that is $c \tanh(s / c)$ in place of $s$. The fused operation does not know that, so there the scores are written out.

# %%
#| export
def _as_bias(sees, dtype):
    "0 where a token is seen, the lowest number elsewhere."
    bias = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return bias.masked_fill_(~sees, torch.finfo(dtype).min)

def _capped(q, k, v, bias, scaling, softcap):
    "Attention written out, with scores between -softcap and softcap."
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scaling / softcap))
    return (scores + bias).softmax(-1, dtype=torch.float32).to(v.dtype) @ v

def _attend(q, k, v, bias, scaling, softcap):
    "(heads, n, d) queries, (key heads, n, d) keys and values -> (n, heads, d)."
    share = q.shape[0] // k.shape[0]                 # so many query heads share a key head
    k, v = (x.repeat_interleave(share, 0) for x in (k, v))
    if softcap: return _capped(q, k, v, bias, scaling, softcap).transpose(0, 1)
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=bias, scale=scaling)[0]
    return out.transpose(0, 1)


# %% [markdown]
# Are the two branches the same thing? A cap that is far above all scores changes nothing, and there they must agree. We take the sixty-four first pairs of the source as one single block.

# %%
long_row = pack(pairs[:64])
N, g = len(long_row.ids), torch.Generator().manual_seed(0)
q, k, v = (torch.randn(heads, N, 8, generator=g) for heads in (4, 2, 2))    # four query heads, two key heads

bias = _as_bias(visible(long_row, slice(None)), torch.float32)
in_one = _attend(q, k, v, bias, scaling=8**-0.5, softcap=None)
assert_close(_attend(q, k, v, bias, scaling=8**-0.5, softcap=1e4), in_one, atol=1e-4, rtol=1e-4)
tuple(in_one.shape)


# %% [markdown]
# Now block by block. The bias of a block is made once and kept in the row, for all layers and heads. (A compiler, which comes into play on graphics cards, is told to leave this loop alone: it is as long as the row has blocks, and a compiler would unroll it anew for each length.)

# %%
#| export
def _bias(row, tokens, window, dtype):
    "0 where seen, the lowest number elsewhere; (n, n)."
    n = tokens.stop - tokens.start
    if not window or window >= n: window = None      # it hides nothing
    key = tokens.start, window, dtype
    if key not in row.masks: row.masks[key] = _as_bias(visible(row, tokens, window), dtype)
    return row.masks[key]

@torch.compiler.disable
def by_blocks(
    q: Tensor,            # (heads, N, d)
    k: Tensor,            # (key heads, N, d)
    v: Tensor,            # (key heads, N, d)
    row: Row,             # which tokens these are
    scaling: float,       # what scores are multiplied by
    window: int=None,     # of this layer
    softcap: float=None,  # of the scores
) -> Tensor:              # (N, heads, d)
    "Attention of a packed row, one block after the other: the version to read."
    out, start = [], 0
    blocks = zip(*(x.split(row.blocks, 1) for x in (q, k, v)))
    for n, block in zip(row.blocks, blocks):
        bias = _bias(row, slice(start, start + n), window, q.dtype)
        out.append(_attend(*block, bias, scaling, softcap))
        start += n
    return torch.cat(out)


# %% [markdown]
# It gives what the single large block gave. How much of the large matrix was computed?

# %%
assert_close(by_blocks(q, k, v, long_row, scaling=8**-0.5), in_one, atol=1e-5, rtol=1e-4)
assert len(long_row.masks) == len(long_row.blocks)
scores = sum(n * n for n in long_row.blocks)
{"blocks": long_row.blocks, "share of the scores": f"{scores / N**2:.0%}"}

# %% [markdown]
# Pairs of this world are short, so several share a block: a few calls with some white in them, in place of many small ones. A pair of more than 256 tokens is a block of its own.
#
# ## A model that attends our way
#
# How do we get our function into somebody else's model? transformers lets a program *register* an attention function under a name. A model whose config has that name calls the function in every layer. What does a layer
# hand to it? Let us register one that only listens.

# %%
heard = []

def listening(module, query, key, value, attention_mask, **wishes):
    heard.append(dict(query=tuple(query.shape), key=tuple(key.shape), mask=attention_mask, **wishes))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2), None                 # (1, N, heads, d), and no weights

AttentionInterface.register("listening", listening)
of_S = S.config._attn_implementation
S.config._attn_implementation = "listening"
with torch.no_grad(): S(input_ids=row.ids[None], use_cache=False, remark="hello")
S.config._attn_implementation = of_S

assert len(heard) == S.config.num_hidden_layers
assert heard[0]["remark"] == "hello"
told = ("query", "key", "mask", "scaling", "dropout", "remark")
pd.Series({name: str(heard[0][name]) for name in told}).to_frame("what the first layer hands over")


# %% [markdown]
# Three things to notice. Keywords that the *model* was called with arrive in every layer; so the row can travel to the attention as a keyword. There is no mask: transformers makes none for a name it does not know.
# And the layer says what it wants: scaling, dropout, and in some models a window or a soft-cap.
#
# Scaling, window and soft-cap we can do. Four wishes we cannot fulfil: dropout, attention sinks (`s_aux`, extra scores that take weight away from all tokens), biases that depend on the position, and masks of whole heads. Ignoring them would give wrong numbers and no error, so we raise. Wishes that a future model may
# have are not in this list. For them there is a guard, below, which compares numbers.

# %%
#| export
def packed_attention(
    module,                   # the layer that calls; not used
    query: Tensor,            # (1, heads, N, d)
    key: Tensor,              # (1, key heads, N, d)
    value: Tensor,            # (1, key heads, N, d)
    attention_mask,           # not used: who sees whom is known from the row
    scaling: float=None,      # what scores are multiplied by; default: 1 / sqrt(d)
    dropout: float=0.0,       # refused
    row: Row=None,            # what the model was called with
    sliding_window: int=None, # of this layer
    softcap: float=None,      # of the scores
    **rest,                   # whatever else a layer says
) -> tuple[Tensor, None]:     # (1, N, heads, d), and no attention weights
    """What transformers calls in each layer.

    Raises NotImplementedError for what a layer wants and cannot have."""
    unknown = [k for k in ("s_aux", "position_bias", "head_mask") if rest.get(k) is not None]
    if dropout: unknown.append("dropout")
    if unknown: raise NotImplementedError(f"its attention wants {', '.join(unknown)}")
    if row is None: raise NotImplementedError("its layers do not pass the row to the attention")
    if not torch.compiler.is_compiling(): row.windows.add(sliding_window)

    attend = by_blocks if row.plan is None else row.plan.attend
    scaling = scaling or query.shape[-1] ** -0.5
    q, k, v = query.squeeze(0), key.squeeze(0), value.squeeze(0)
    return attend(q, k, v, row, scaling, sliding_window, softcap)[None], None

AttentionInterface.register("sdpo_packed", packed_attention)

# %% [markdown]
# Three refusals: a dropout, attention sinks, and a model that does not pass keywords on.

# %%
for wish in (dict(dropout=0.1), dict(s_aux=torch.zeros(4)), dict(row=None)):
    try: packed_attention(None, q[None], k[None], v[None], None, **dict(row=long_row) | wish)
    except NotImplementedError as e: print(e)


# %% [markdown]
# How does a model get this attention, and get rid of it again? The name is put into its config for the length of one forward pass; afterwards the model is as it was, also after an error.

# %%
#| export
@contextlib.contextmanager
def attention(
    model,      # a causal LM
    name: str,  # of a registered attention function
):
    "For a while, let a model use an attention function by its name."
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try: yield
    finally: model.config._attn_implementation = before


# %% [markdown]
# One forward pass of S over three packed pairs. What the decoder returns are *hidden states*, one vector a token; the output layer that makes logits of them comes next.

# %%
with torch.no_grad(), attention(S, "sdpo_packed"):
    out = S.get_decoder()(input_ids=row.ids[None], position_ids=row.position[None], row=row, use_cache=False)
hidden = out.last_hidden_state.squeeze(0)
assert S.config._attn_implementation == of_S
{"hidden states": tuple(hidden.shape), "windows asked for": row.windows}

# %% [markdown]
# ## Only responses reach the output layer
#
# Who needs logits? The output layer is a matrix from the hidden size to the vocabulary. Its result, the logits, is often the largest tensor of a training step. How large would it be for a packed row of 4,096 tokens and a vocabulary of 49,152?

# %%
logits_mib = 4096 * 49152 * 4 / 2**20                # four bytes each, in fp32
f"{logits_mib:.0f} MiB"

# %% [markdown]
# Two things save most of it. Prompts need no logits, since only response tokens are scored. And only a piece of the logits has to exist at a time: where one piece does not hold all, each piece is computed, used and forgotten, and
# computed again in the backward pass. How large is a piece? On a CPU 64 MiB. On a graphics card a sixteenth of its memory, because a card wants few, large products.

# %%
#| export
PIECE = 64 * 2**20 # bytes of the fp32 logits of one piece on a CPU; two or three such tensors exist at a time

def piece_bytes(
    device,   # of the model
) -> int:     # bytes
    "How large the logits of one piece may be: `PIECE`, on a graphics card a sixteenth of its memory."
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available(): return PIECE
    return torch.cuda.get_device_properties(device).total_memory // 16


# %%
tokens_a_piece = piece_bytes("cpu") // (4 * 49152)
{"tokens in a piece": tokens_a_piece}

# %% [markdown]
# How are logits made from hidden states? It looks like one product with the output matrix. But Gemma 2 caps its logits, and Granite and Cohere scale them. If you multiply by hand, you score another model. A tiny random Gemma 2 shows by how much:

# %%
sizes = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=64,
)
with torch.random.fork_rng():                        # leaves the random numbers of the other cells alone
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma2", **sizes, final_logit_softcapping=2.0)
    capped = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    torch.nn.init.normal_(capped.lm_head.weight, std=0.3)

some = torch.arange(2, 22)
with torch.no_grad():
    states = capped.get_decoder()(input_ids=some[None]).last_hidden_state[0, :-1]
    own = token_logprobs(capped(input_ids=some[None]).logits[0, :-1], some[1:])
    by_hand = token_logprobs(capped.lm_head(states), some[1:])
wrong = (by_hand - own).abs().max().item()
assert wrong > 0.1
f"multiplied by hand: wrong by up to {wrong:.1f} nats a token"


# %% [markdown]
# So we ask the *model's own* forward pass. For that moment its decoder is replaced by one that answers at once, with the hidden states that we have already. What follows (scaling, product, cap) is the model's own code. (A mixture of experts also hands on what its routers said, for a loss of its own that balances the experts. We ask for logits and never for that loss, padded or packed, so here it may find nothing.) And logits are fp32 in any precision,
# as in [chapter 02](02_logprobs.ipynb).

# %%
#| export
@contextlib.contextmanager
def _answering(decoder, hidden):
    "For a while, a decoder that answers with these hidden states."
    answer = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)
    answer.router_logits = answer.shared_kv_states = None            # some models hand these on
    own = {k: f for k, f in vars(decoder).items() if k == "forward"} # a hook may have set one on this object
    decoder.forward = lambda *args, **kwargs: answer
    try: yield
    finally:
        del decoder.forward
        vars(decoder).update(own)

def _head(model, hidden, ids, known=None):
    with fp32_logits(model, known), _answering(model.get_decoder(), hidden[None]):
        logits = model(input_ids=ids[None], use_cache=False).logits.squeeze(0)
    return token_logprobs(logits, ids)

def head_logprobs(
    model,           # a causal LM
    hidden: Tensor,  # (m, d) hidden states
    ids: Tensor,     # (m,) the tokens that came next
) -> Tensor:         # (m,) fp32, nats
    "Log-probability of each token by the model's own output layer, in pieces where one would be too large."
    vocabulary = model.get_output_embeddings().weight.shape[0]
    size = max(1, piece_bytes(hidden.device) // (4 * vocabulary))
    if len(ids) <= size: return _head(model, hidden, ids)
    known = half_weight(model)                           # once, and not in every piece
    pieces = zip(hidden.split(size), ids.split(size), strict=True)
    return torch.cat([checkpoint(_head, model, h, t, known, use_reentrant=False) for h, t in pieces])


# %% [markdown]
# The capped model is right now, in one piece and in pieces of five tokens:

# %%
with torch.no_grad():
    assert_close(head_logprobs(capped, states, some[1:]), own)
    PIECE = 4 * 96 * 5
    assert_close(head_logprobs(capped, states, some[1:]), own)
    PIECE = 64 * 2**20
assert "forward" not in vars(capped.get_decoder())    # the decoder is its own again


# %% [markdown]
# ## The same function, packed
#
# Does a packed row say what chapter 02 says? Everything is there to ask: a row, an attention that knows who sees whom, an output layer for response tokens only. What remains is to add up the log-probabilities of each response.
#
# Let us number the responses: 0 and 1 are chosen and rejected of the first pair, 2 and 3 of the second, and so on. Then one `index_add` sums them all. (In the comments $x$ is the prompt, $y_w$ the chosen response, $y_l$ the rejected one, and $\pi$ the model.) Some models stretch their positions to the longest row of a batch, so a response would get other numbers beside a longer one. Their rows must be read one by one (chapter 02 shows it); such pairs are not packed, and arrive here as they are.

# %%
#| export
def to_device(
    value,   # a tensor, a dataclass with tensors in it, or anything else
    device,  # where it should be
):           # the same on the device; what is neither stays as it is
    "A tensor, or a dataclass with its tensors, on a device."
    if isinstance(value, Tensor): return value.to(device, non_blocking=True)
    if not is_dataclass(value): return value
    moved = {f.name: to_device(getattr(value, f.name), device) for f in fields(value)}
    return replace(value, **moved)

def of_row(
    model,                    # a causal LM whose attention can be set; gradients flow
    row: Row|list,            # a packed row, wherever it lies; or pairs that must be read alone
) -> tuple[Tensor, Tensor]:   # (n,) log pi(y_w|x) and (n,) log pi(y_l|x), nats, fp32
    "Log-probabilities of a packed row; of pairs that were not packed, those of chapter 02."
    if not isinstance(row, Row): return response_logprobs(model, row)
    row = to_device(row, model.device)
    with attention(model, "sdpo_packed"):
        decoder = model.get_decoder()
        out = decoder(input_ids=row.ids[None], position_ids=row.position[None], row=row, use_cache=False)
    hidden = out.last_hidden_state.squeeze(0).index_select(0, row.read)
    logp = head_logprobs(model, hidden, row.ids[row.scored])
    response = 2 * row.pair[row.scored] + row.side[row.scored] - 1
    sums = logp.new_zeros(2 * len(row.sizes)).index_add(0, response, logp)
    return sums[0::2], sums[1::2]


# %%
with torch.no_grad(): packed, padded = of_row(S, row), response_logprobs(S, three)
assert_close(packed, padded)
columns = {
    "chosen, packed": packed[0],
    "chosen, chapter 02": padded[0],
    "rejected, packed": packed[1],
    "rejected, chapter 02": padded[1],
}
pd.DataFrame(columns).round(4).T.rename_axis(columns="pair")


# %% [markdown]
# The same numbers. Now the function that other chapters call. `packed_logprobs` takes and returns what `response_logprobs` does, so the two can be exchanged. It carries three things that others ask for: what a batch costs in tokens (`tokens`), which attention it uses
# (`attention`), and how a row is made beforehand (`prepare`), while the model is busy with another one. A *plan* says how a graphics card attends; on a CPU there is none. Plans come below.

# %%
#| export
def packed_tokens(
    pairs: list,  # n pairs with prompt_ids, chosen_ids, rejected_ids
) -> int:
    "Tokens of the packed row of these pairs."
    return sum(len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs)

def packed_row(
    model,        # a causal LM
    pairs: list,  # n pairs
    plan=None,    # row -> how a card attends; None: `padded_plan` on a card, nothing on a CPU
) -> Row|list:    # a row; the pairs themselves where their rows must be read alone
    "What `packed_logprobs` makes of pairs. It can be made while the model is busy with another row."
    if must_read_alone(model, pairs): return pairs
    row = pack(pairs)
    if plan is None and model.device.type == "cuda": plan = padded_plan
    if plan: row.plan = plan(row)
    return row

def packed_logprobs(
    model,                    # a causal LM whose attention can be set; gradients flow
    pairs: list,              # n pairs, or the `Row` that `packed_row` makes of them
) -> tuple[Tensor, Tensor]:   # (n,) log pi(y_w|x) and (n,) log pi(y_l|x), nats, fp32
    "What `response_logprobs` of chapter 02 computes, from one packed row."
    row = pairs if isinstance(pairs, Row) else packed_row(model, pairs)
    return of_row(model, row)

packed_logprobs.tokens = packed_tokens
packed_logprobs.attention = "packed"
packed_logprobs.prepare = packed_row

# %%
assert_close(packed_logprobs(S, packed_logprobs.prepare(S, three)), packed_logprobs(S, three))
{
    "tokens of 64 pairs, packed": packed_logprobs.tokens(pairs[:64]),
    "padded": response_logprobs.tokens(pairs[:64]),
}


# %% [markdown]
# Three pairs without gradients are a weak check. Now chapter 02's full one, with values and gradients. The two responses get unequal weights, so that errors cannot cancel. The error of a gradient is the largest difference in one weight matrix,
# relative to the largest gradient.

# %%
def value_and_gradient(logprobs, model, pairs):
    model.zero_grad()
    chosen, rejected = logprobs(model, pairs)
    (chosen.sum() - 2 * rejected.sum()).backward()
    gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return torch.cat([chosen, rejected]).detach(), gradient

def relative_error(gradient, exact):
    worst = max((gradient[n] - exact[n]).norm().item() for n in exact)
    return worst / max(g.norm().item() for g in exact.values())

def compare(model, pairs, other=packed_logprobs): # with chapter 02: errors in nats, and of the gradient
    exact, exact_gradient = value_and_gradient(response_logprobs, model, pairs)
    values, gradient = value_and_gradient(other, model, pairs)
    assert gradient.keys() == exact_gradient.keys()
    return (values - exact).abs().max().item(), relative_error(gradient, exact_gradient)

ERRORS = ["log-probability (nats)", "gradient (relative)"]


# %% [markdown]
# Four batches, each of which could go wrong in a way of its own: one pair; three unequal pairs, which share a block; sixty-four pairs in many blocks; and three pairs whose output layer works in many pieces.

# %%
def on_few_and_many(logprobs):
    batches = pairs[:1], three, pairs[:64]
    return {f"{len(batch)} pairs": compare(S, batch, logprobs) for batch in batches}

errors = on_few_and_many(packed_logprobs)
PIECE = 4 * len(tok) * 5
errors["3 pairs, output layer in pieces of 5 tokens"] = compare(S, three)
PIECE = 64 * 2**20
errors = pd.DataFrame(errors, index=ERRORS).T
assert (errors < 1e-4).all(axis=None)
errors.style.format("{:.0e}")


# %% [markdown]
# Would the check notice a mistake? We make four on purpose. Which of them is the worst, would you say?
#
# - *Forget the restart*: positions of the rejected response go on after the chosen one.
# - *See the other side*: the rejected response also sees the chosen one.
# - *See other pairs*: a pair sees all pairs before it.
# - *Shift as in a plain row*: the first rejected token is read at the last chosen one.

# %%
def broken(change): # packed_logprobs with a change to the row
    def logprobs(model, pairs):
        row = pack(pairs)
        change(row)
        return of_row(model, row)
    return logprobs

def only(row, sees): # the three pairs are one block, so there is one mask; we write it first
    row.masks = {(0, None, torch.float32): _as_bias(sees, torch.float32)}

def causal(row): return torch.ones(len(row.ids), len(row.ids), dtype=bool).tril()

def forget_the_restart(row): row.position = torch.cat([torch.arange(n) for n in row.pair.bincount()])
def see_the_other_side(row): only(row, causal(row) & (row.pair[:, None] == row.pair))
def see_other_pairs(row): only(row, causal(row))
def shift_as_in_a_plain_row(row): row.read = row.scored - 1

changes = forget_the_restart, see_the_other_side, see_other_pairs, shift_as_in_a_plain_row
mistakes = {change.__name__.replace("_", " "): compare(S, three, broken(change)) for change in changes}
mistakes = pd.DataFrame(mistakes, index=ERRORS).T
assert (mistakes["log-probability (nats)"] > 10).all()
mistakes.style.format("{:.2g}")


# %% [markdown]
# By the worst log-probability it is the forgotten restart, with 35 nats; by the gradient it is the other pairs. Each is wrong by more than ten nats for at least one response: a factor of more than twenty thousand in a probability. And none of them raises an error. The model reads whatever row it is given; only the comparison tells.
#
# ### Gradient checkpointing
#
# Is it still the same if every layer is computed twice? *Gradient checkpointing* saves memory: a layer forgets what it computed and computes it again in the backward pass. By then the forward pass is over, and the config has its old attention back. The layers would be computed again with *another*
# attention. So checkpointing gets a context for its second computation, as [chapter 06](06_trainer.ipynb) passes it: one that does nothing at first, and one that sets the attention again.

# %%
#| export
def recompute_alike(
    model,   # a causal LM, asked in the forward pass of a layer
) -> tuple:  # a context for the forward pass, one for the recomputation
    "For `context_fn` of gradient checkpointing: recompute with the attention that the forward pass had."
    return contextlib.nullcontext(), attention(model, model.config._attn_implementation)


# %%
def checkpointed(**settings): # errors with gradient checkpointing, or what PyTorch says
    S.train()
    S.gradient_checkpointing_enable(dict(use_reentrant=False, **settings))
    try: return compare(S, three)
    except RuntimeError as e: return str(e).splitlines()[0].removeprefix("torch.utils.checkpoint: ")
    finally:
        S.gradient_checkpointing_disable()
        S.eval()

alike = checkpointed(context_fn=lambda: recompute_alike(S))
forgotten = checkpointed()
assert max(alike) < 1e-4
assert isinstance(forgotten, str) or max(forgotten) > 1e-2
{"with recompute_alike": [f"{error:.0e}" for error in alike], "without": forgotten}


# %% [markdown]
# ## A budget of tokens
#
# How many pairs go into one row? A number of pairs would be a bad measure: pairs have any length, and memory is used by tokens. So pairs are added until a *budget of tokens* is full (a pair that is longer goes alone). `micro_batches` of [chapter 02](02_logprobs.ipynb) does it for both functions, in
# what each of them counts.

# %%
def cut_up(logprobs, budget):
    tokens = [logprobs.tokens(part) for part in micro_batches(pairs[:64], budget, logprobs)]
    return {"forward passes": len(tokens), "most tokens in one": max(tokens), "tokens in all": sum(tokens)}

budgets = pd.DataFrame({
    ("packed", 400): cut_up(packed_logprobs, 400),
    ("packed", 100): cut_up(packed_logprobs, 100),
    ("padded", 400): cut_up(response_logprobs, 400),
}).T.rename_axis(["", "budget"])
assert (budgets["most tokens in one"] <= budgets.index.get_level_values("budget")).all()
budgets

# %% [markdown]
# A smaller budget only means more passes, each of which needs less memory. Packed, the same pairs are more than a third fewer tokens. The gradient of the whole batch does not depend on the cut, since it is a sum over pairs; [chapter 06](06_trainer.ipynb) checks that.
#
# ## On a real model
#
# Does all this hold for a real model and real text? 64 pairs of HH-RLHF with SmolLM2-135M-Instruct, in fp32: packed rows of at most 4,096 tokens, against padded batches of one pair (a budget of one token, so every pair goes alone). Slow cells are skipped in tests; their outputs are kept.

# %%
#| slow
with skipped_without(
    "SmolLM2-135M-Instruct and pairs of HH-RLHF (SDPO_DATA)",
    "packed and padded agree to 2.4e-4 nats, gradients to 7e-6",
):
    local = os.environ.get("SDPO_MODEL", "~/.cache/sdpo_nb/smollm2-135m-instruct")   # a copy, else the hub
    smol = Path(local).expanduser()
    name = str(smol) if smol.exists() else "HuggingFaceTB/SmolLM2-135M-Instruct"
    data = Path(os.environ.get("SDPO_DATA", "../../shared/data")) / "preferences/hh_harmless.jsonl.gz"
    assert data.exists(), "set SDPO_DATA to the folder of the preference data"
    real = load_model(name, "cpu")
    chosen_rows = load_pairs(data).select(range(64))
    real_pairs = list(tokenize_pairs(chosen_rows, load_tokenizer(name), "hh", 512, 384, chat=True).pairs)
    torch.set_num_threads(os.cpu_count())

    def real_values(logprobs, budget):
        real.zero_grad()
        values = {}
        for part in micro_batches(real_pairs, budget, logprobs):
            c, r = logprobs(real, part)
            ((c - r).sum() / len(real_pairs)).backward()
            both = torch.stack([c, r], 1).tolist()
            values |= {p["key"]: v for p, v in zip(part, both)}
        gradient = {n: p.grad.clone() for n, p in real.named_parameters()}
        return torch.tensor([values[p["key"]] for p in real_pairs]), gradient

    (a, g), (b, h) = real_values(response_logprobs, 1), real_values(packed_logprobs, 4096)
    torch.set_num_threads(1)
    differences = [(g[n] - h[n]).norm() for n in g]
    norms = [x.norm() for x in g.values()]
    squares = sum(d**2 for d in differences), sum(x**2 for x in norms)
    found = pd.Series({
        "largest difference of a log-probability (nats)": (a - b).abs().max().item(),
        "whole gradient (relative)": math.sqrt(squares[0] / squares[1]),
        "worst single tensor (relative)": max((d / x).item() for d, x in zip(differences, norms)),
    })
    assert len(real_pairs) == 64
    assert [tuple(len(p[part]) for part in PARTS) for p in real_pairs[:8]] == eight
    assert found.iloc[0] < 1e-3
    assert found.iloc[1] < 1e-5
    assert found.iloc[2] < 3e-5
    display(found.map("{:.1e}".format).to_frame("64 real pairs, fp32"))

# %% [markdown]
# These are sums of tens of log-probabilities, so a few $10^{-4}$ nats are fp32's own rounding.
#
# And in half precision? *Autocast* lets a model compute its products in 16 bits, here in bf16. That moves every log-probability (chapter 02), with and without packing. So the question is whether packing is *further* from fp32 than padding is. Where the hardware has no bf16 it is emulated, slowly and with the same rounding; so sixteen pairs will do.

# %%
#| slow
with skipped_without(
    "SmolLM2-135M-Instruct and pairs of HH-RLHF (SDPO_DATA)",
    "in bf16, padded is off by 0.150 nats, packed by 0.151",
):
    torch.set_num_threads(os.cpu_count())
    ways = {"padded": response_logprobs, "packed": packed_logprobs}

    @torch.no_grad()
    def real_half(logprobs, pairs): # mean error, nats; one pair at a time
        exact = torch.cat([torch.cat(response_logprobs(real, [p])) for p in pairs])
        with torch.autocast("cpu", torch.bfloat16):
            values = torch.cat([torch.cat(logprobs(real, [p])) for p in pairs])
        return (values - exact).abs().mean().item()

    bf16 = pd.Series({name: real_half(f, real_pairs[:16]) for name, f in ways.items()})
    torch.set_num_threads(1)
    assert bf16["packed"] < 1.2 * bf16["padded"]
    display(bf16.round(3).to_frame("mean |bf16 - fp32| (nats)"))

# %% [markdown]
# In bf16 both ways are off by 0.15 nats: packing is no further from fp32 than padding is.
#
# ## How much faster?
#
# What is all this worth? We compare with TRL, a library that many people use for this training. `make bench` asks SmolLM2-135M-Instruct, on two CPU cores in fp32.
#
# - A *step* is forward, backward, clipping of the gradient and the optimizer AdamW, for a batch of eight pairs, cut at 512 tokens.
# - TRL's `DPOTrainer` has its reference precomputed, as we have. It is shown at the fastest of micro-batches (the pieces that a batch is computed in) of 1, 2, 4 and 8 pairs with and without gradient checkpointing, and beside it with 8.
# - All sides take turns step by step, in one process, so that a busy machine slows all alike.

# %%
bench = json.loads((files("sdpo_nb.data") / "results/packing.json").read_text())
versions = bench["made"]["versions"]
sources = {"hh_harmless fp32": "HH-RLHF harmless", "ultrafeedback_binarized fp32": "UltraFeedback"}

def called(side): # "TRL, 8, checkpointing" -> "TRL 1.16.0, 8 pairs, checkpointing"
    kind, *rest = side.split(", ")
    names = [kind.replace("TRL", f"TRL {versions['trl']}")]
    for part in rest:
        if part.isdigit(): part = "1 pair" if part == "1" else f"{part} pairs"
        names.append(part)
    return ", ".join(names)

measured = []
for key, source in sources.items():
    for side, numbers in bench[key]["rows"].items():
        measured.append(dict(source=source, side=called(side), kind=side.split(", ")[0], **numbers))
speed = pd.DataFrame(measured)

# %%
palette = {"packed": colours["response"], "padded": colours["padding"], "TRL": colours["prompt"]}
fig, axes = plt.subplots(1, 2, figsize=(11, 2.6), sharey=True)
for ax, (source, rows) in zip(axes, speed.groupby("source")):
    sns.barplot(rows, y="side", x="step", hue="kind", palette=palette, legend=False, ax=ax)
    for i, (seconds, slower) in enumerate(zip(rows["step"], rows["slower"])):
        ax.text(seconds, i, f" {slower[0]:.1f} times as long" if i > 0 else " this chapter", va="center")
    ax.set(title=source, xlabel="seconds per step, median (shorter is better)", ylabel="")
    ax.set_xlim(0, 1.6 * rows["step"].max())
    sns.despine(ax=ax)

# %% [markdown]
# A packed step of HH-RLHF takes less than half the time of TRL's best. UltraFeedback has long responses and short prompts, so there is less to save.
#
# The table has the ratios with their 95 % intervals over steps, and the same for a pass without gradients. Such a pass writes the table of reference log-probabilities: those of the model that training started from, with which DPO compares. The last two columns say where the time goes: operations for each pair of the first batch, and how much of the
# machine's measured speed of matrix products they reach.

# %%
ratio = "{:.2f} [{:.2f}, {:.2f}]".format
shown = pd.DataFrame({
    "steps": speed["steps"],
    "slower than packed": [ratio(*numbers) for numbers in speed["slower"]],
    "reference pass, slower": [ratio(*numbers) for numbers in speed["reference_slower"]],
    "GFLOP per pair": speed["gflop_per_pair"].round().astype(int),
    "of matmul speed": speed["of_peak"].map("{:.0%}".format),
})
for key in sources:
    best = bench[key]["best_trl"]
    _, low, _ = bench[key]["rows"][best]["slower"]
    assert low > 1.3
shown.set_index(pd.MultiIndex.from_frame(speed[["source", "side"]]))

# %% [markdown]
# Against TRL at its best a step of HH-RLHF is a good two times faster, and more than four times where pairs are batched by eight. Most of the
# gain is work not done: little more than half of the operations for each pair. The rest of the way to full speed goes into what is not a matrix product: attention, norms, activations, the optimizer.
#
# ### In bf16
#
# The same on a CPU that has bf16 in hardware (two cores with AMX), with autocast on both sides. Two rows are new: the layers of the model are *compiled*, ours and TRL's, in the way that is told below for graphics cards.

# %%
in_half = {}
for key, source in sources.items():
    half = bench[key.replace("fp32", "bf16")]
    for side, numbers in half["rows"].items():
        in_half[source, called(side)] = {
            "steps": numbers["steps"],
            "seconds per step": f"{numbers['step']:.1f}",
            "slower than packed": ratio(*numbers["slower"]),
            "slower than packed, compiled": ratio(*numbers["slower_than_compiled"]),
            "reference pass, slower": ratio(*numbers["reference_slower"]),
        }
    for side in (half["best_trl"], half["best_compiled_trl"]):
        assert half["rows"][side]["slower_than_compiled"][1] > 1.3
pd.DataFrame(in_half).T.rename_axis(["bf16", "side"])

# %% [markdown]
# On HH-RLHF we are 2.7 times as fast, packed, as TRL at its best. Compiled layers save a fifth of a step: what is no matrix product weighs more in bf16, and that is what a compiler joins. Then it is 3.2 times, and 2.5 times if TRL's layers are compiled, too (nobody's default). On UltraFeedback, with less to save, it is 1.6, 1.8 and 1.5 times. (It was measured on another day, and matrix products were twice as fast then; only ratios within a source compare. Micro-batches have up to four pairs there: eight of TRL's do not fit into 23 GB beside the four models that take turns.) Compiling takes its time once, so it is a setting of the trainer ([chapter 06](06_trainer.ipynb)), `compile="on"`, and not the default on a CPU.
#
# ### Memory
#
# Does it fit where padding does not? The peak of a fresh process that makes one step on the longest of 16 pairs. Weights, gradients and AdamW's moments take 2 GiB of it.

# %%
memory = {called(side): gib for side, gib in bench["memory_gib"].items()}
pd.Series(memory, name="peak memory (GiB)").round(1).to_frame()

# %% [markdown]
# Eight pairs at once take 4.7 GiB packed, and 15.3 GiB with TRL.
#
# And the vocabulary? A pass without gradients should not care how large it is. With gradients, copies of the output matrix are added (the gradient of a piece, the sum, and that of the embedding, which here is the same
# matrix), and nothing else.

# %%
vocabulary = pd.DataFrame(bench["vocabulary_mib"])
vocabulary = vocabulary.rename(columns=lambda tokens: f"{int(tokens):,} tokens")
vocabulary = vocabulary.rename(index={"one_weight_matrix": "the output matrix itself"})
little, much = (vocabulary[column] for column in vocabulary)
assert much["packed, score"] < 1.2 * little["packed, score"]
assert much["padded, score"] > 4 * little["padded, score"]
beyond = vocabulary.loc["packed, step"] - 3 * vocabulary.loc["the output matrix itself"]
assert abs(beyond.iloc[1] - beyond.iloc[0]) < 64      # one piece of logits
thousand, million = bench["pairs_gib"].values()
assert million < 1.15 * thousand
vocabulary.round().astype(int).rename_axis("memory added (MiB)")

# %% [markdown]
# With a vocabulary five times as large, scoring takes no more memory packed, and five times as much padded. Nor does memory grow with the number of pairs, as tokenised pairs lie in a file that is mapped, not read: a million take a tenth more than a thousand.
#
# ### A whole run
#
# And what is left of it in a whole run, in which more is done than training? Two stages of stepwise DPO, 32 pairs of HH-RLHF and 32 of UltraFeedback, from loading S to the last file: by `sdpo` ([chapter 14](14_stepwise.ipynb)) packed and padded, and by hand with one TRL trainer per stage.
# The first two rows are of passes of 4,096 tokens by `sdpo`, and of one pair at a time by TRL; the last row is another pair of runs, on another machine, with the default of 1,536 tokens.

# %%
runs = {called(name.removeprefix("whole ")): run for name, run in bench.items() if name.startswith("whole")}
packed, padded = (np.array(runs[side]["losses"]) for side in ("packed", "padded"))
today = bench["gib_today"]
assert len(packed) == 8
assert np.ptp(packed) > 0.01
assert abs(packed - padded).max() < 1e-3
assert today["packed"] < today["TRL, 1"]
times = bench["whole TRL, 1"]["seconds"] / bench["whole packed"]["seconds"]
assert 1.2 < times < 1.35

later = {called(side): f"{gib:.1f}" for side, gib in today.items()}
columns = {}
for side, run in runs.items():
    minutes = run["seconds"] / 60
    columns[side] = [f"{minutes:.1f}", f"{run['gib']:.1f}", later.get(side, "")]
names = ["minutes", "peak memory (GiB)", "peak memory, 1,536 tokens (GiB)"]
pd.DataFrame(columns, index=names)


# %% [markdown]
# Packed and padded are the same run, loss by loss (the cell compares them; TRL draws its batches in another order). Packing saves two of five and a half minutes. Against TRL it is 1.3 times as fast, less than a single step promised: half of the pairs are of UltraFeedback, and `sdpo` also orders the sources, saves the models between the stages and writes the report. With 4,096 tokens it takes more memory than TRL, with the default it takes less.

# %% [markdown]
# ## A graphics card wants few, large calls (you may skip this)
#
# *You have the idea now, complete and measured. What follows is for those who use it. This section changes how fast a card computes the numbers, not the numbers. The next two keep packing away from models that it does not fit. `choose_logprobs` at their end is what the trainer asks first; you may go on at "What you now have".*
#
# Why is the loop over blocks not good enough for a card? It is easy to read, and on a CPU it costs little. On a graphics card it is the slowest way there is. Each small call has to be started, in every layer, and the card has finished it before the next one
# arrives. Arithmetic is free there, starts are not. So how can we attend to all pairs *at once*, whatever their lengths?
#
# Look at the triangle with the notch again, and cut it below the chosen response.
#
# - Above the cut stand the queries of prompt and chosen. That is an ordinary causal sequence: each token sees all before it.
# - Below stand the queries of the rejected response. They see the prompt and themselves. Put a second copy of the prompt's keys in front of theirs, and this is an ordinary causal sequence, too. It has fewer queries than keys, and both end together.

# %%
def random_pair(*sizes): return {part: torch.randint(2, 96, (n,)).tolist() for part, n in zip(PARTS, sizes)}

def halves(x, c, r): # of one pair: which keys, in which order, each of the two sequences of queries sees
    row = pack([random_pair(x, c, r)])
    sees = visible(row, slice(None)).numpy() * (1 + row.side.numpy())
    above, below = sees[:x + c], sees[x + c:]
    prompt_and_rejected = np.r_[0:x, x + c:x + c + r]
    return {
        "one pair": sees,
        "prompt + chosen": above[:, :x + c],
        "rejected": below[:, prompt_and_rejected],
    }

drawn = halves(20, 12, 16)
fig, axes = plt.subplots(1, 3, figsize=(9, 3.2), gridspec_kw=dict(width_ratios=[48, 32, 36], wspace=0.3))
for ax, (title, sees) in zip(axes, drawn.items()):
    draw_sees(sees, ax, title)
    ax.set(xlabel="keys", ylabel="queries")


# %% [markdown]
# Nothing is left of the notch. The second and the third picture are causal, aligned at their ends; the first is not:

# %%
def is_causal(cells): # query i sees exactly the keys up to its own place, counted from the end
    queries, keys = cells.shape
    own_place = np.arange(queries)[:, None] + keys - queries
    return ((np.arange(keys) <= own_place) == (cells > 0)).all()

assert is_causal(drawn["prompt + chosen"])
assert is_causal(drawn["rejected"])
assert not is_causal(drawn["one pair"])


# %% [markdown]
# So no mask has to exist at all. The sequences of all pairs can go through one kernel (a program that runs on the card) that was made for causal sequences of many lengths.
#
# ### Copies
#
# How do the prompt's keys get in front of both? We need some tokens in another order: every key once, and those of a prompt a second time. An index does that. Its gradient has to add up the copies of a token, and here PyTorch lets thousands of threads add into the same
# memory, in an order that changes from run to run. Sums of floating point numbers depend on their order, so two runs would differ in their last bits.
#
# We know more than PyTorch does: a token has at most two copies. So the backward pass *reads* both and adds them, and comes out the same every time. A number one past the end stands for "none", and reads zeros. Where the copies of a token stand follows from where each copy came from, so `copies` finds it out.

# %%
#| export
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

@dataclass
class Copies:
    "Which tokens are copied where. Numbers one past the end mean none."
    take: Tensor    # (...) the token that stands in each place
    first: Tensor   # (tokens,) the place of a token's first copy
    second: Tensor  # (tokens,) and of its second one

    def __call__(
        self,
        x: Tensor,   # (tokens, ...)
    ) -> Tensor:     # (places, ...)
        return _Copy.apply(x, self.take, self.first, self.second)

def copies(
    take: np.ndarray,  # (...) token of each place; `tokens` where there is none
    tokens: int,       # how many there are
) -> Copies:
    "The way there and back. No token may have more than two copies."
    places = take.flatten()
    used = np.flatnonzero(places < tokens)
    first, second = np.full((2, tokens), len(places))
    first[places[used][::-1]] = used[::-1]              # of several places the first one stays
    others = used[first[places[used]] != used]
    second[places[others]] = others
    return Copies(*(torch.from_numpy(a.astype("int64")) for a in (take, first, second)))


# %% [markdown]
# Three tokens and five places. The first token is copied to the places 0 and 2, the last place stays empty. Each place gets its own weight in the loss, so the gradient tells which places a token was copied to. What must the gradient of the first token be?

# %%
by_hand = copies(np.array([0, 1, 0, 2, 3]), tokens=3)     # 3 is one past the end of the tokens
x = torch.tensor([[1.], [2.], [3.]], requires_grad=True)
out = by_hand(x)
weights = torch.tensor([1, 10, 100, 1000, 10000])[:, None]
(out * weights).sum().backward()
result = {"copied": out.flatten().tolist(), "gradient": x.grad.flatten().tolist()}
assert result["copied"] == [1, 2, 1, 3, 0]
assert result["gradient"] == [101, 10, 1000]
result


# %% [markdown]
# ### A plan of the row
#
# What must be known before the first layer? The kernel is PyTorch's variable-length *flash* attention. It takes all queries in one tensor, all keys in another, and two lists of where the sequences begin. These lists and the copies are the plan of a row. It is made once, on the processor, from the lengths alone; the layers only use it.
#
# The kernel also wants the length of the longest sequence, which decides how much work it lays out. We round it up. A compiled layer (below) remembers the numbers it has seen, and so it sees few of them.

# %%
#| export
def _rounded_up(n, to=256):
    return to * -(-int(n) // to)    # a plain int: a compiled layer would take numpy's for a tensor

@dataclass
class FlashPlan:
    "A row as causal sequences that end together: prompt + chosen, rejected, next pair."
    keys: Copies
    query_starts: Tensor  # (2n + 1,) int32; the queries are the row itself
    key_starts: Tensor    # (2n + 1,) int32
    most_queries: int     # of a sequence, rounded up
    most_keys: int

    def attend(
        self,
        q: Tensor,      # (heads, N, d)
        k: Tensor,      # (key heads, N, d)
        v: Tensor,      # (key heads, N, d)
        row: Row,       # not used
        scaling: float, # what scores are multiplied by
        window: int,    # of this layer, or None
        softcap: float, # refused
    ) -> Tensor:        # (N, heads, d)
        "One call of the kernel. Raises NotImplementedError for a soft-cap."
        if softcap: raise NotImplementedError("the flash kernel has no soft-cap")
        half = torch.get_autocast_dtype(q.device.type)   # rotary embeddings leave q and k in fp32
        q, k, v = (x.transpose(0, 1).to(half) for x in (q, k, v))
        return flash(q, self.keys(k), self.keys(v), self, scaling, window)

def _stretches(starts, lengths):
    "start, start + 1, ...; one stretch after the other."
    return np.concatenate([np.arange(start, start + n) for start, n in zip(starts, lengths)])

def flash_plan(
    row: Row,   # on the CPU
) -> FlashPlan:
    "From the lengths of the pairs."
    x, c, r = np.array(row.sizes).T
    starts = np.r_[0, np.cumsum(x + c + r)[:-1]]          # of the pairs
    queries = np.stack([x + c, r], 1).flatten()           # of each sequence
    keys = np.stack([x + c, x + r], 1).flatten()
    key_begins = np.stack([starts, starts, starts + x + c], 1).flatten()
    key_lengths = np.stack([x + c, x, r], 1).flatten()    # prompt and chosen; the prompt again; rejected
    take = _stretches(key_begins, key_lengths)
    begins = [np.r_[0, np.cumsum(lengths)].astype("int32") for lengths in (queries, keys)]
    return FlashPlan(
        copies(take, len(row.ids)),
        *map(torch.from_numpy, begins),
        most_queries=_rounded_up(queries.max()),
        most_keys=_rounded_up(keys.max()),
    )


# %% [markdown]
# The plan of two small pairs: prompts of 2 and 3 tokens, responses of 1 to 3. You can read off the keys that the tokens of the first prompt, 0 and 1, come twice.

# %%
two = [
    dict(prompt_ids=[5, 6], chosen_ids=[7], rejected_ids=[8, 9]),
    dict(prompt_ids=[5, 6, 7], chosen_ids=[8, 9], rejected_ids=[5, 6, 7]),
]
plan = flash_plan(pack(two))
assert plan.query_starts[-1] == packed_tokens(two)            # every token asks once
assert len(plan.keys.take) == packed_tokens(two) + 2 + 3      # the prompts are seen twice
print("queries begin at:  ", *plan.query_starts.tolist())
print("keys begin at:     ", *plan.key_starts.tolist())
print("keys are copies of:", *plan.keys.take.tolist())

# %% [markdown]
# ### One call
#
# Now all pairs attend in a single call. The kernel's name and its arguments have moved from version to version of PyTorch, so it is called in one place. A window of $w$ tokens is $w - 1$ to the left and none to the right.

# %%
#| export
try: from torch.nn.attention.varlen import varlen_attn
except ImportError: varlen_attn = None
KNOWN = inspect.signature(varlen_attn).parameters if varlen_attn else {}

def flash(
    q: Tensor,         # (N, heads, d), in half precision
    k: Tensor,         # (K, key heads, d)
    v: Tensor,         # (K, key heads, d)
    plan: FlashPlan,   # of the row
    scaling: float,    # what scores are multiplied by
    window: int=None,  # of this layer
) -> Tensor:           # (N, heads, d)
    "Causal attention of sequences that end together."
    more = dict(enable_gqa=True) if "enable_gqa" in KNOWN else {}
    left = window - 1 if window else -1
    return varlen_attn(q, k, v, plan.query_starts, plan.key_starts, plan.most_queries, plan.most_keys,
                       scale=scaling, window_size=(left, 0), **more)

def flash_row(
    model,        # a causal LM
    pairs: list,  # n pairs
) -> Row|list:    # a row with its plan; the pairs themselves where their rows must be read alone
    "What `flash_logprobs` makes of pairs."
    return packed_row(model, pairs, flash_plan)

def flash_logprobs(
    model,                    # a causal LM under autocast, on a graphics card that has the kernel
    pairs: list,              # n pairs, or the `Row` that `flash_row` makes of them
) -> tuple[Tensor, Tensor]:   # (n,) log pi(y_w|x) and (n,) log pi(y_l|x), nats, fp32
    "`packed_logprobs` with one call of attention for each layer."
    row = pairs if isinstance(pairs, Row) else flash_row(model, pairs)
    return of_row(model, row)

flash_logprobs.tokens = packed_tokens
flash_logprobs.attention = "flash"
flash_logprobs.prepare = flash_row


# %% [markdown]
# How can we test that without a card? A CPU does not have this kernel. But the plan, which is the part that we wrote, can be tested anywhere. Here is what the kernel promises, written out sequence by sequence.

# %%
def flash_by_hand(q, k, v, plan, scaling, window=None):
    q, k, v = q.float(), k.float(), v.float()
    query_starts, key_starts = plan.query_starts.tolist(), plan.key_starts.tolist()
    out = []
    for i in range(len(query_starts) - 1):
        mine = slice(*query_starts[i:i+2])
        theirs = slice(*key_starts[i:i+2])
        queries, keys = mine.stop - mine.start, theirs.stop - theirs.start
        sees = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        if window: sees = sees.triu(keys - queries - window + 1)
        parts = [x.transpose(0, 1) for x in (q[mine], k[theirs], v[theirs])]
        out.append(_attend(*parts, _as_bias(sees, torch.float32), scaling, None))
    return torch.cat(out)

def flash_stand_in(model, pairs): # in fp32: autocast is asked for its dtype, but switched off
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        torch.set_autocast_dtype("cpu", torch.float32)
        return flash_logprobs(model, pairs)


# %% [markdown]
# Put in the kernel's place, it must give the numbers and gradients of chapter 02. (It stays there until the section on architectures has used it, too.)

# %%
kernel, flash = flash, flash_by_hand
by_flash = pd.DataFrame(on_few_and_many(flash_stand_in), index=ERRORS).T
assert (by_flash < 1e-4).all(axis=None)
by_flash.style.format("{:.0e}")

# %% [markdown]
# ### Without that kernel
#
# What do other cards do? The kernel works in half precision only, on cards from 2020 on, and knows no soft-caps. A T4, the free card of Colab, does not have it; neither does fp32. There the sequences are padded, but only *inside* attention: everything else in the model still
# sees the packed row.
#
# The first kind of sequence, prompt + chosen, needs no mask. Padding stands on the right, out of sight of a causal query. The second kind, rejected, needs one, because its prompts end at different places. A padded query may look wherever it likes, since nobody reads it. But it
# must see something: a softmax over nothing is not a number, and neither is its gradient.

# %%
#| export
# without cuDNN, which would plan anew for every new length
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

@dataclass
class Padded:
    "n sequences of one kind, as a batch."
    queries: Copies
    keys: Copies
    query_at: Tensor  # (n, longest) positions
    key_at: Tensor    # (n, longest)
    causal: bool      # whether queries and keys begin together, so that causal attention needs no mask

    def attend(
        self,
        q: Tensor,      # (N, heads, d)
        k: Tensor,      # (N, heads, d)
        v: Tensor,      # (N, heads, d)
        scaling: float,
        window: int,    # or None
        softcap: float, # or None
    ) -> Tensor:        # (n longest, heads, d)
        q = self.queries(q).transpose(1, 2)
        k, v = (self.keys(x).transpose(1, 2) for x in (k, v))
        plain = self.causal and not window and not softcap
        mask = None if plain else self.visible(window)
        if softcap: out = _capped(q, k, v, _as_bias(mask, v.dtype), scaling, softcap)
        else:
            with sdpa_kernel(BACKENDS):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain, scale=scaling)
        return out.transpose(1, 2).flatten(0, 1)

    def visible(
        self,
        window: int,  # or None
    ) -> Tensor:      # (n, 1, queries, keys) bool
        ahead = self.query_at[:, None, :, None] - self.key_at[:, None, None, :]
        return (ahead >= 0) & (ahead < window) if window else ahead >= 0

def _grid(rows, none):
    "Lists of numbers -> (n, longest), filled up with `none`."
    out = np.full((len(rows), max(map(len, rows))), none)
    for line, row in zip(out, rows): line[:len(row)] = row
    return out

def _padded(queries, keys, position, causal):
    "Sequences of one kind, from the numbers of the tokens that each of them asks and sees."
    none = len(position)                                  # one past the end
    q, k = _grid(queries, none), _grid(keys, none)
    position = np.r_[position, 0]                         # padding asks from position 0: it sees one token
    query_at = position[q]
    key_at = np.where(k < none, position[k], 2**30)       # a key that is padding is ahead of everyone
    places = torch.from_numpy(query_at), torch.from_numpy(key_at)
    return Padded(copies(q, none), copies(k, none), *places, causal)


# %% [markdown]
# The rejected responses of the two small pairs from above, in the row `0 1 | 2 | 3 4` and `5 6 7 | 8 9 | 10 11 12`. The first has two queries and four keys, the second three and six; so the first is padded by one query and two keys. An `x` means "sees".

# %%
queries = [3, 4], [10, 11, 12]
keys = [0, 1, 3, 4], [5, 6, 7, 10, 11, 12]
masks = _padded(queries, keys, pack(two).position.numpy(), causal=False).visible(None)
lines = [["".join("x" if sees else "." for sees in query) for query in mask[0]] for mask in masks]
assert masks.any(-1).all()                            # every query sees something, also one that is padding
pd.DataFrame(lines, index=["first pair", "second pair"], columns=["query 1", "query 2", "query 3"])


# %% [markdown]
# A whole row becomes two such batches, one of each kind. Their results are copied back to where the tokens stand. The way back is the way there, read backwards: `first` says in which place a token stands.

# %%
#| export
@dataclass
class PaddedPlan:
    "A row as two batches of padded sequences, and the way back."
    chosen: Padded
    rejected: Padded
    back: Copies

    def attend(
        self,
        q: Tensor,      # (heads, N, d)
        k: Tensor,      # (key heads, N, d)
        v: Tensor,      # (key heads, N, d)
        row: Row,       # not used
        scaling: float, # what scores are multiplied by
        window: int,    # of this layer, or None
        softcap: float, # or None
    ) -> Tensor:        # (N, heads, d)
        "Two calls, one for each batch."
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        share = q.shape[1] // k.shape[1]                    # so many query heads share a key head
        k, v = (x.repeat_interleave(share, 1) for x in (k, v))
        parts = [kind.attend(q, k, v, scaling, window, softcap) for kind in (self.chosen, self.rejected)]
        return self.back(torch.cat(parts))

def padded_plan(
    row: Row,   # on the CPU
) -> PaddedPlan:
    "From the lengths of the pairs."
    first, second, seen = [], [], []
    start = 0
    for x, c, r in row.sizes:
        middle, end = start + x + c, start + x + c + r
        first.append(np.arange(start, middle))             # prompt and chosen
        second.append(np.arange(middle, end))              # rejected
        seen.append(np.r_[start:start + x, middle:end])    # what rejected sees
        start = end
    position = row.position.numpy()
    chosen = _padded(first, first, position, True)
    rejected = _padded(second, seen, position, False)
    places = np.concatenate([kind.queries.take.numpy().flatten() for kind in (chosen, rejected)])
    there = copies(places, len(position))
    return PaddedPlan(chosen, rejected, copies(there.first.numpy(), len(places)))


# %% [markdown]
# And the same check again:

# %%
def padded_inside(model, pairs): # what `packed_logprobs` does on a graphics card, anywhere
    return of_row(model, packed_row(model, pairs, padded_plan))

by_padding = pd.DataFrame(on_few_and_many(padded_inside), index=ERRORS).T
assert (by_padding < 1e-4).all(axis=None)
by_padding.style.format("{:.0e}")


# %% [markdown]
# Three ways to attend, one set of numbers. Only the first has a loop over pairs, and none of them cares how many different lengths there are.
#
# But what if one pair is long and a hundred are short? Inside attention each of them becomes as long as the long one. There the row takes far more memory than its tokens tell. So where attention is padded, a budget counts its cells if they are more than the tokens; a long pair then gets a row with few others, and most of the short ones share another. The
# numbers are those of `packed_logprobs`, and so is the name: a table that was kept stays valid.

# %%
#| export
def _tokens_on_card(pairs):
    "Tokens of the packed row; or the cells that attention pads them to, if these are more."
    return max(packed_tokens(pairs), padded_tokens(pairs) // 2)

@functools.wraps(packed_logprobs)
def _packed_on_card(model, pairs): return packed_logprobs(model, pairs)

_packed_on_card.tokens = _tokens_on_card
flash_logprobs.exact = _packed_on_card    # the same in fp32


# %% [markdown]
# One long pair and 101 short ones, 4,028 tokens. How are they cut, by a budget of 4,096?

# %%
def alike(x, c, r): return dict(prompt_ids=[1] * x, chosen_ids=[1] * c, rejected_ids=[1] * r)

skewed = [alike(600, 300, 300)] + [alike(14, 7, 7)] * 101

def in_attention(row): # cells of prompt and chosen
    return padded_plan(pack(row)).chosen.queries.take.numel()

cuts = {}
for name, logprobs in (("packed", packed_logprobs), ("packed, on such a card", _packed_on_card)):
    parts = micro_batches(skewed, 4096, logprobs)
    cuts[name] = {
        "pairs in each row": [len(part) for part in parts],
        "tokens": [packed_tokens(part) for part in parts],
        "cells in attention": [in_attention(part) for part in parts],
    }
assert max(cuts["packed"]["cells in attention"]) > 20 * 4096
assert max(cuts["packed, on such a card"]["cells in attention"]) <= 4096
pd.DataFrame(cuts).T


# %% [markdown]
# ### Compiled layers
#
# Where does the card still wait? What is left between the large products (norms, rotations, activations, changes of precision) is a dozen small calls for each layer. `torch.compile` turns them into a few. Layers are compiled one by one. They are all alike, so one compilation serves all. The
# number of tokens is declared to be variable. If layers are recomputed in the backward pass, their parts are compiled, and the recomputation stays outside.
#
# The first call in each mode is the one that compiles, for some seconds. We make it on two pairs of fixed lengths, not on data: a run that was killed and goes on must end with the same kernels, whichever batch it meets first. And under the same switches as later, for deterministic kernels (`same_bits` of [chapter 02](02_logprobs.ipynb)): with another switch PyTorch compiles anew.

# %%
#| export
def try_out(
    model,           # a causal LM
    logprobs,        # (model, pairs) -> (chosen, rejected)
    precision: str,  # fp32, bf16 or fp16
):
    "One pass over two pairs of fixed lengths, with gradients if the model is in train mode."
    long = dict(zip(PARTS, ([1] * 40, [2] * 30, [1] * 50)))
    short = dict(zip(PARTS, ([2] * 17, [1] * 9, [2] * 5)))
    with autocast(model.device, precision), torch.set_grad_enabled(model.training):
        chosen, rejected = logprobs(model, [long, short])
    if not model.training: return
    weights = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad((chosen - rejected).sum(), weights, allow_unused=True)


# %% [markdown]
# It leaves nothing behind, no gradient either:

# %%
S.zero_grad()
try_out(S.train(), packed_logprobs, "fp32")
S.eval()
assert all(p.grad is None for p in S.parameters())


# %% [markdown]
# Compiling can fail: there is no compiler, or an operation is unknown to it. Then the layers are used as they were, and the function returns the reason.

# %%
#| export
def _layers(model): return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]

def uncompile(
    model,   # a causal LM
):
    "Every layer as it was."
    model._compiled_for = None
    for layer in _layers(model):
        for module in (layer, *layer.children()): module._compiled_call_impl = None

def _as_reason(e):
    """What an exception says, shortly. That memory ended is no reason, and is raised again:
    what would be done instead needs more of it."""
    if memory_ended(e): raise e
    said = [line.strip() for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
    return " ".join(said[:2]) if said[0].endswith(":") else said[0]

def compile_layers(
    model,                  # a causal LM
    logprobs,               # the function it is compiled for
    precision: str="fp32",  # fp32, bf16 or fp16
    recompute: bool=False,  # whether layers are recomputed in the backward pass (gradient checkpointing)
    deterministic: bool=False, # whether training will ask for the same bits every time
    strict: bool=False,     # in the strict form
) -> str|None:              # why not, or None
    "Compile the layers of a model for this function, once, and try them as they will score and train."
    wanted = logprobs, precision, recompute, deterministic, strict
    if getattr(model, "_compiled_for", None) == wanted: return None
    uncompile(model)
    for layer in _layers(model):
        for module in (layer.children() if recompute else [layer]): module.compile(dynamic=True)
    was_training = model.training
    try:
        with same_bits(model.device): try_out(model.eval(), logprobs, precision)  # as scoring does, always
        with same_bits(model.device, deterministic, strict): try_out(model.train(), logprobs, precision)
    except Exception as e:                               # whatever a compiler may raise
        uncompile(model)
        return _as_reason(e)
    finally: model.train(was_training)
    model._compiled_for = wanted


# %%
def fails(model, pairs): raise RuntimeError("no such kernel\nand many lines more")

why = compile_layers(S, fails)
assert all(module._compiled_call_impl is None for module in S.modules())
assert not S.training
why

# %% [markdown]
# And where it works (the cell is skipped in tests, since not every machine has a compiler; its output is kept):

# %%
#| slow
with skipped_without("a C++ compiler", "compiled layers agree to 1e-6"):
    compiled = load_model(world.base, "cpu").train()
    why = compile_layers(compiled, packed_logprobs)
    errors = compare(compiled, three, lambda model, pairs: packed_logprobs(model, pairs))
    uncompile(compiled)
    assert why is None and max(errors) < 1e-4
    display(pd.Series(errors, index=ERRORS).map("{:.0e}".format).to_frame("compiled"))

# %% [markdown]
# ### On a graphics card, measured
#
# `make bench-gpu` asks the same of a card: random weights of two shapes, 32 pairs an optimizer step, bf16, batches whose lengths the card has not seen. TRL's model is prepared as its own `train` prepares it, so it computes in bf16, too.
#
# Each row is three or four steps. "s a step" is their median, with the shortest and the longest; "x TRL" compares the median of tokens a
# second with that of the best of TRL's four micro-batches. "Useful" work is 6 operations for each parameter and packed token, as a share of what a large bf16 matrix product reached there.

# %%
gpu = json.loads((files("sdpo_nb.data") / "results/gpu.json").read_text())

def on_card(setting):
    rows = {}
    for side, numbers in setting["rows"].items():
        if not numbers["step"] or "same bits" in side: continue # the switch has changed since
        steps = numbers["steps"]
        reference = numbers.get("reference")
        rows[called(side)] = {
            "steps": len(steps),
            "s a step": f"{numbers['step']:.3f} [{min(steps):.2f}, {max(steps):.2f}]",
            "x TRL": f"{numbers['times_trl']:.2f}",
            "useful": f"{numbers['of_peak']:.0%}",
            "GiB": f"{numbers['peak_gib']:.1f}",
            "compiling": f"{numbers['compile']:.1f}" if "compile" in numbers else "",
            "first step": f"{numbers['first']:.2f}",
            "reference pass": f"{reference:.3f}" if reference else "",
        }
    return pd.DataFrame(rows).T

for setting in gpu["settings"].values(): assert setting["rows"]["ours, compiled"]["times_trl"] > 1.3
tables = {name: on_card(setting) for name, setting in gpu["settings"].items()}
card = f"{gpu['card']['name']}, PyTorch {gpu['versions']['torch']}"
pd.concat(tables, names=[card, "side"])

# %% [markdown]
# Compiled, we read 1.6 to 1.9 times as many tokens a second as TRL at its best. What each change gave is in the rows: one call of attention a layer ("ours"), then compiled layers.
#
# A model of 1.2B parameters uses more than half of what the card can do. One of 135M does not: its layers are so small that the card waits for Python to start the next kernel, ours as much as TRL's. With 32 rows at once TRL starts few kernels, so our advantage is smaller there.
#
# What does it cost to recompute layers, and what does it save? It repeats all starts, so it costs the small model more than the large one.

# %%
change = {}
for name, setting in gpu["settings"].items():
    rows = setting["rows"]
    ratios = {}
    for what, key in (("tokens a second", "tokens_per_second"), ("memory", "peak_gib")):
        recomputed = rows["ours, compiled, checkpointing"][key] / rows["ours, compiled"][key]
        ratios[what] = f"{recomputed - 1:+.0%}"
    change[name] = ratios
pd.DataFrame(change).T.rename_axis("recomputed, against kept")

# %% [markdown]
# The small model gives half of its speed or more than that, for not quite half of the memory. The large one gives 29 % of its speed for 35 % of the memory.
#
# **What was hoped for.** A first measurement, on an H100, gave TRL 0.75 s for a step of HH-RLHF. From it came these goals, fixed before the rows above were measured.

# %%
goals = {"hh_harmless, 135M": (7, 0.12), "ultrafeedback_binarized, 135M": (3, 0.2), "ultrafeedback_binarized, 1.2B": (2, 0.4)}
against = {}
for name, (times, useful) in goals.items():
    rows = gpu["settings"][name]["rows"]
    ours, trl = rows["ours, compiled"], rows[gpu["settings"][name]["best_trl"]]
    first, later = ours["first_new"], ours["step"]
    against[name] = {
        "step, x TRL": f"{ours['times_trl']:.1f} (goal {times})",
        "reference, x TRL": f"{trl['reference'] / ours['reference']:.1f} (goal {times})",
        "memory / TRL's": f"{ours['peak_gib'] / trl['peak_gib']:.2f}" + " (goal 0.50)" * ("135M" in name),
        "useful": f"{ours['of_peak']:.0%} (goal {useful:.0%})",
        "new lengths, x a later step": f"{first / later:.1f} (goal 2.0)",
    }
pd.DataFrame(against).T

# %% [markdown]
# Most are missed. TRL, with its model prepared as its own `train` does it, takes 0.21 s for that step; seven times as fast would be 0.03 s, and ours takes 0.13 s while the card waits for Python. Tried and left: the whole decoder as one graph was not compiled after 45 s. Not tried: groups of layers, and CUDA graphs over rows that are filled up to one length.
#
# **What this does not show.**
#
# It is one run on one card, and three or four steps say little about how much a row varies. Each of the two compiled rows of a setting compiles for itself, for 5 to 15 s. In UltraFeedback the first step of "ours, compiled" takes another 6 s, probably since the compiler wants other kernels where tokens times width pass $5\cdot 2^{20}$, which two short pairs do not show it. No ratio counts this. A TRL row with small micro-batches
# pays for every new length (its attention is planned anew), and varies most: of HH-RLHF, 16 pairs look faster than 8 by the ratio and hardly by the median, since its four steps take 0.4 to 2.4 s.

# %% [markdown]
# ## Other architectures (you may skip this)
#
# Is it right for other models, too? So far we asked one small Llama. Other models have windows, soft-caps, scales. A check on a model that does not *use* its window says nothing about windows. So these tiny random models have large weights, and small windows, strong soft-caps and odd scales wherever their
# architecture knows them.

# %%
usual = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=0,
)
shared = usual | dict(num_key_value_heads=2)          # two query heads share a key head
old = dict(vocab_size=96, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=0)
window = dict(use_sliding_window=True, sliding_window=4, max_window_layers=0)

kinds = {
    "llama": shared,
    "mistral": shared | dict(sliding_window=4),
    "mixtral": shared | dict(sliding_window=4, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": shared | window,
    "qwen3": shared | window | dict(head_dim=8),
    "phi3": shared | dict(sliding_window=4),
    "gemma2": shared | dict(
        head_dim=8,
        sliding_window=4,
        attn_logit_softcapping=0.05,
        final_logit_softcapping=2.0,
    ),
    "gpt2": old,
    "gpt_neox": usual,
    "opt": usual | dict(ffn_dim=64, word_embed_proj_dim=16),
    "granite": shared | dict(logits_scaling=8.0, attention_multiplier=0.3, residual_multiplier=0.5),
    "cohere": shared | dict(logit_scale=8.0),
    "bloom": dict(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    "falcon": usual,
    "gptj": old | dict(rotary_dim=4),
}
neutral = { # the same models without these settings
    "mistral": dict(sliding_window=None),
    "mixtral": dict(sliding_window=None),
    "qwen2": dict(use_sliding_window=False),
    "qwen3": dict(use_sliding_window=False),
    "phi3": dict(sliding_window=None),
    "gemma2": dict(sliding_window=100, attn_logit_softcapping=None, final_logit_softcapping=None),
    "granite": dict(logits_scaling=1., attention_multiplier=1., residual_multiplier=1.),
    "cohere": dict(logit_scale=1.),
}


# %% [markdown]
# The model's own attention is what we compare with, so it must be right itself. For Gemma 2 we ask for the one that is written out ("eager"), as `load_model` does: before version 5.23 of transformers the default one leaves out the soft-cap.

# %%
def random_model(kind, **changes):
    config = AutoConfig.for_model(kind, **kinds[kind] | changes)
    own_attention = dict(attn_implementation="eager") if kind == "gemma2" else {}
    torch.manual_seed(0)
    model = freeze_dropout(AutoModelForCausalLM.from_config(config, **own_attention))
    for p in model.parameters():
        if p.ndim > 1: torch.nn.init.normal_(p, std=0.3)
    return model

lengths = (9, 7, 12), (3, 15, 2), (1, 1, 6), (12, 5, 5)     # of prompt, chosen, rejected
random_pairs = [random_pair(*sizes) for sizes in lengths]

def attempt(kind, logprobs=packed_logprobs): # errors as in `compare`, or what the model says
    try: return compare(random_model(kind), random_pairs, logprobs)
    except (AttributeError, KeyError, RuntimeError, TypeError) as e: return str(e)

def is_equal(found): return not isinstance(found, str) and max(found) < 1e-4

@torch.no_grad()
def bite(kind): # how much the settings change, in nats
    if kind not in neutral: return None
    ours = response_logprobs(random_model(kind), random_pairs)
    without = response_logprobs(random_model(kind, **neutral[kind]), random_pairs)
    return max((a - b).abs().max().item() for a, b in zip(ours, without))


# %% [markdown]
# Where do packed numbers equal the model's own? The table lists these models. The third column says what ignoring the settings would cost: between seven and almost five hundred nats. The last two are the two other ways to attend.

# %%
tried = {kind: attempt(kind) for kind in kinds}
equal = [kind for kind, found in tried.items() if is_equal(found)]

ignored = "ignored settings (nats)"
good = pd.DataFrame([tried[kind] for kind in equal], index=equal, columns=ERRORS)
good[ignored] = [bite(kind) for kind in equal]
for name, logprobs in (("padded inside", padded_inside), ("flash, by hand", flash_stand_in)):
    found = {kind: attempt(kind, logprobs) for kind in equal}
    for answer in found.values(): assert is_equal(answer) or answer == "the flash kernel has no soft-cap"
    good[name + " (nats)"] = [None if isinstance(answer, str) else answer[0] for answer in found.values()]

assert len(equal) > len(kinds) / 2
assert good[ignored].min() > 0.1
small = [column for column in good if column != ignored]
good.style.format("{:.0e}", subset=small, na_rep="refused").format("{:.1f}", subset=[ignored], na_rep="")

# %%
flash = kernel      # the real one is back

# %% [markdown]
# ## The guard (you may skip this)
#
# Which of the models in the list are not in the table, and what happens to them? Packed without a guard, with the version of transformers that this page was run with:

# %%
others = {kind: found for kind, found in tried.items() if kind not in equal}
def in_words(found): return found if isinstance(found, str) else f"wrong by {found[0]:.1f} nats"

pd.Series(others).map(in_words).to_frame("packed, without a guard").style


# %% [markdown]
# One stops with an error, which is fine. The other two go through and are wrong by nats, and nothing tells you: they never ask for the registered function. Other versions of transformers have other lists.
#
# So packing is used only after it has been seen to work, on this very model. The guard has three parts.
#
# The first reads the config and the output layer. A layer that is not attention cannot be told who sees whom. And an output layer that is adapted, quantised or
# sharded has not been checked in pieces.

# %%
#| export
def _config_refuses(model):
    "What in the config or the output layer rules packing out, or None."
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    odd = kinds - {"full_attention", "sliding_attention"}
    if odd: return f"it has layers of {', '.join(sorted(odd))}"
    if not is_plain(model.get_output_embeddings()): return "its output layer is adapted, quantised or sharded"


# %%
hybrid, adapted = random_model("llama"), random_model("llama")
hybrid.config.layer_types = ["full_attention", "linear_attention"]
adapted.lm_head = torch.nn.Sequential(adapted.lm_head)
for model in (random_model("llama"), hybrid, adapted): print(_config_refuses(model))


# %% [markdown]
# The second part knows about windows. A window shows in the numbers only where a row is longer than it, and a row of the data may be shorter. So the attention notes in `row.windows` which windows it was asked for, and the one that the config puts to use must be among them.

# %%
#| export
def _window(config):
    "The sliding window that a config puts to use, or None."
    kinds = getattr(config, "layer_types", None)
    used = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if used else None


# %%
unused = random_model("gpt2")
unused.config.sliding_window = 4                     # a window that its layers do not ask for
row = pack(random_pairs)
with torch.no_grad(): of_row(unused, row)
{"in the config": _window(unused.config), "asked for": row.windows}


# %% [markdown]
# The third part compares numbers, on a long pair and a short one of the data, since a long row must not change a short one. What is right is asked as plainly as possible: the model's own logits of one row, four times.
#
# - Log-probabilities must agree to $10^{-3}$ nats and $10^{-5}$ of their size.
# - The gradients of both responses, for one weight, must agree to $10^{-3}$ of their size. They stand side by side and are not added up: in a sum or a difference they could nearly cancel, and rounding would look like a mistake.

# %%
#| export
def _plain(model, x, y):
    "(|y|,) log-probabilities by the model's own logits of one plain row."
    ids = torch.tensor([[*x, *y]], device=model.device)
    keep = len(y) + 1                                    # the prompt makes no logits, but for its last token
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0, -keep:-1]
    return token_logprobs(logits, ids[0, len(x):])

def _plain_pairs(model, pairs):
    "Both responses of each pair by the model's own logits, row by row."
    def sums(side): return torch.stack([_plain(model, p["prompt_ids"], p[side]).sum() for p in pairs])
    return sums("chosen_ids"), sums("rejected_ids")

def _gradient(model, logprobs, pair):
    """Of the chosen and of the rejected response, for one weight of the decoder; None where nothing is trained.
    The first weight of a new adapter has none, so the next one is asked."""
    def of_side(side, weight): return torch.autograd.grad(logprobs(model, [pair])[side].sum(), weight)[0]
    gradient = None
    for weight in [p for p in model.get_decoder().parameters() if p.requires_grad][:2]:
        gradient = torch.stack([of_side(side, weight) for side in (0, 1)])
        if gradient.any(): break
    return gradient

def _numbers_refuse(model, probe):
    "Where packed numbers differ from the model's own on two pairs, the second of them short; or None."
    row = packed_row(model, probe)
    with torch.no_grad():
        values = torch.stack(of_row(model, row), 1)
        own = torch.stack(_plain_pairs(model, probe), 1)
    off = (values - own).abs()
    near = (off - 1e-5 * own.abs()).max() < 1e-3         # what is not a number is not near
    if not near: return f"packed log-probabilities differ from its own by {off.max().item():.2g} nats"

    window = _window(model.config.get_text_config())
    if window not in row.windows | {None}: return f"its window of {window} does not reach the attention"

    gradient, own = (_gradient(model, f, probe[1]) for f in (packed_logprobs, _plain_pairs))
    if gradient is None: return None
    off = (gradient - own).norm()
    if not off <= 1e-3 * own.norm():
        return f"a packed gradient differs from its own by {(off / own.norm()).item():.1%}"


# %% [markdown]
# A model that can be packed, and the one with the window that no layer asks for:

# %%
long_and_short = [random_pairs[0], random_pairs[2]]
assert _numbers_refuse(random_model("llama"), long_and_short) is None
_numbers_refuse(unused, long_and_short)

# %% [markdown]
# Together they are the guard. What cannot be computed at all is refused, too, with the first line of what the model says. (Memory that ends is another matter. The padded batches, which are taken instead, need more of it, so this error is passed on.) The guard looks at the longest and the shortest pair only: it costs some small passes, once.
#
# Two models would be refused for a wrong reason. Weights in half precision round by more than the check allows, packed or not, so they are told apart before. And compiled layers note no windows, so while the guard looks, a model is not compiled.

# %%
#| export
REFUSED = (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError)

def _extremes(pairs):
    "The longest and the shortest."
    by_length = sorted(pairs, key=lambda p: packed_tokens([p]))
    return [by_length[-1], by_length[0]]

@contextlib.contextmanager
def _not_compiled(model):
    "For a while, every module as it was before it was compiled."
    compiled = {module: module._compiled_call_impl for module in model.modules()}
    for module in compiled: module._compiled_call_impl = None
    try: yield
    finally:
        for module, call in compiled.items(): module._compiled_call_impl = call

def why_not_packed(
    model,        # a causal LM
    pairs: list,  # some of those that will be scored; the longest and the shortest are looked at
) -> str|None:    # a reason, or None
    """Why packed log-probabilities cannot be used for this model. Looks without autocast.
    Raises ValueError where there is no pair to look at."""
    if not pairs: raise ValueError("pairs: none; the guard looks at some of those that will be scored")
    dtype = str(model.dtype).removeprefix("torch.")
    if model.dtype.itemsize < 4: return f"its weights are {dtype}, and the check needs fp32"
    if refused := _config_refuses(model): return refused
    if must_read_alone(model, pairs): return "its rotary positions depend on the longest row of a batch"
    try:
        with _not_compiled(model), torch.autocast(model.device.type, enabled=False):
            return _numbers_refuse(model, _extremes(pairs))
    except REFUSED as e: return f"a packed row cannot be computed: {_as_reason(e)}"


# %% [markdown]
# What does the guard promise? Packing is used exactly where the numbers agree. We saw above where they agree:

# %%
verdicts = {kind: why_not_packed(random_model(kind), random_pairs) for kind in kinds}
allowed = [kind for kind, why in verdicts.items() if why is None]
assert allowed == equal
f"{len(allowed)} of {len(kinds)} architectures are packed, and these are the ones whose numbers agree"


# %% [markdown]
# ### And the flash kernel?
#
# It is asked for only where packing is right already. It works in half precision, where "equal" has no sharp meaning. So we ask whether it is as near to fp32 as the other way of packing is: its error may be one and a half times that of
# the exact path, in value and in gradient. And the kernel must be there, and must know the size of the heads.

# %%
#| export
def _flash_numbers_refuse(model, probe, precision):
    "Where flash is further from fp32 than the exact path is; None where it is not."
    ways = packed_logprobs, flash_logprobs
    def ask(f): return torch.cat(f(model, probe)).detach()
    def slope(f): return _gradient(model, f, probe[1])
    def distance(f): return 0 if gradient is None else (slope(f) - gradient).norm() / gradient.norm()
    try:
        with torch.autocast(model.device.type, enabled=False):
            value, gradient = ask(packed_logprobs), slope(packed_logprobs)
        with autocast(model.device, precision):
            off = {f: ask(f) - value for f in ways}
        with autocast(model.device, precision):
            apart = {f: distance(f) for f in ways}
    except REFUSED as e: return f"it cannot be computed: {_as_reason(e)}"

    exact, flashed = (off[f].square().mean().sqrt() for f in ways)
    if not flashed <= 1.5 * exact + 0.05:
        return f"it is off by {flashed.item():.2g} nats, the exact path by {exact.item():.2g}"
    exact, flashed = (apart[f] for f in ways)
    if not flashed <= 1.5 * exact + 0.01:
        return f"its gradient is off by {flashed:.1%}, that of the exact path by {exact:.1%}"

def why_not_flash(
    model,           # a causal LM that can be packed
    pairs: list,     # some of those that will be scored
    precision: str,  # of the forward passes: fp32, bf16 or fp16
) -> str|None:       # a reason, or None
    "Why the flash kernel cannot be used."
    if precision == "fp32": return "it does not know fp32"
    if model.device.type != "cuda": return "there is no graphics card"
    if not {"scale", "window_size"} <= set(KNOWN): return "this version of PyTorch does not have it"
    if torch.cuda.get_device_capability(model.device) < (8, 0): return "this graphics card does not have it"
    with _not_compiled(model): return _flash_numbers_refuse(model, _extremes(pairs), precision)


# %%
assert S.device.type == "cpu"
{precision: why_not_flash(S, three, precision) for precision in ("fp32", "bf16")}


# %% [markdown]
# ### The choice
#
# Other chapters ask one function which log-probabilities to use. A model that the guard refuses falls back to the padded batches of chapter 02, and you are told why.

# %%
#| export
def choose_logprobs(
    model,             # a causal LM
    pairs: list,       # some of those that will be scored
    packing="auto",    # auto or off
    precision="fp32",  # of the forward passes: fp32, bf16 or fp16
):                     # `flash_logprobs`, `packed_logprobs` or `response_logprobs`
    """Packing where it gives the model's own numbers, by the flash kernel where there is one; else padding.

    Prints why, where a model cannot be packed, or where half precision on a card must do without the flash kernel.
    Raises ValueError for another `packing` than auto and off."""
    if packing not in ("auto", "off"): raise ValueError(f"packing: {packing!r} is neither auto nor off")
    if packing == "off": return response_logprobs
    if why := why_not_packed(model, pairs):
        print(f"packing is off: {why}; padded batches are used")
        return response_logprobs
    why = why_not_flash(model, pairs, precision)
    if why is None: return flash_logprobs
    if model.device.type == "cuda" and precision != "fp32":
        print(f"the flash kernel is not used: {why}; attention is padded instead, which is slower")
    return _packed_on_card if model.device.type == "cuda" else packed_logprobs


# %%
refused = [random_model(kind) for kind in others] + [unused, adapted, hybrid]
assert all(choose_logprobs(model, random_pairs) is response_logprobs for model in refused)
assert choose_logprobs(random_model("llama"), random_pairs) is packed_logprobs
assert choose_logprobs(random_model("llama"), random_pairs, packing="off") is response_logprobs

# %% [markdown]
# ## What you now have
#
# - `packed_logprobs`: the numbers and gradients of chapter 02, without padding, without a second reading of the prompt, without logits that nobody asks for.
# - `flash_logprobs`: the same in one call of attention a layer, where the card has the kernel; where it has not, attention is padded inside.
# - `choose_logprobs`: a guard that uses each only where it has been seen to be right.
# - `compile_layers`, and what all this is worth: a step of HH-RLHF on a CPU takes less than half of TRL's time at its best, a card reads 1.6 to 1.9 times as many tokens a second as with TRL.
#
# ## Questions to test yourself
#
# 1. Why is the last token of the prompt read twice, and why is the last token of a response never read?
#
# <details><summary>Answer</summary>
#
# It is the token before the first chosen token and, to the model, also the token before the first rejected one. Its logits predict both. After the last token of a response comes nothing that is scored.
#
# </details>
#
# 2. Which of the four mistakes would a test with a single pair miss?
#
# <details><summary>Answer</summary>
#
# "See other pairs": with a single pair there is no other. The remaining three happen within a pair.
#
# </details>
#
# 3. Pairs with long responses and short prompts gain little. Which of the three savings is left to them?
#
# <details><summary>Answer</summary>
#
# No padding. A short prompt costs little when it is read twice, and it has few positions whose logits could be left out. (Memory is another matter: logits in pieces help most where there are many response tokens.)
#
# </details>
#
# 4. Why must the guard look for the window, when it has already compared the numbers?
#
# <details><summary>Answer</summary>
#
# A window changes numbers only in rows that are longer than it. If the pairs that the guard looks at are shorter, the numbers agree, and a longer pair would be wrong later.
#
# </details>
#
# ## Try this
#
# 1. Run the cell of `pack` again with `merge_up_to=10**6`, so that a row is one block, and time `packed_logprobs(S, pairs[:64])`. Do the same with eight pairs of five hundred tokens: `[random_pair(300, 100, 100) for _ in range(8)]` and a Llama of 96 tokens.
#
# <details><summary>What you should see</summary>
#
# One block costs almost three times as much for the tiny pairs (0.5 and 1.3 seconds with gradients, on a busy core), and six times as much for the long ones (0.6 and 3.4 seconds). The scores of a block grow with the square of its length, and in one large block nearly all of them are white. At the other end, `merge_up_to=0`
# gives every pair a block of its own; here that is as fast as 256.
#
# </details>
#
# 2. Build a Llama with a vocabulary of 49,152 and one layer of hidden size 64, set `sdpo_nb.packing.PIECE` to 1, 4, 64 and 1,024 MiB, each in a fresh process, and look at the peak memory of `packed_logprobs` with gradients on 16 pairs with responses of 120 tokens. Is smaller always better?
#
# <details><summary>What you should see</summary>
#
# No. We saw 3.5, 1.8, 0.8 and 2.7 GB. A large piece means large logits. Small pieces mean many blocks of memory, and the C library keeps some of what was freed: with `return_large_blocks` of chapter 06 called first, we saw 1.5, 0.5, 0.7 and 2.7 GB.
#
# </details>
#
# 3. Ask the guard about architectures that are not in the table: put settings into `kinds` and call `why_not_packed(random_model(kind), random_pairs)`. Good candidates are `starcoder2` and `olmo2` (both take `shared`), `gpt_neo` (`hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]`) and `mamba` (`hidden_size=32, num_hidden_layers=2`), all with `vocab_size=96`.
#
# <details><summary>What you should see</summary>
#
# With transformers 5.23 the first two can be packed. GPT-Neo would be wrong by several nats. Mamba has no attention at all: "it has layers of linear_attention".
#
# </details>
