# %% [markdown]
# # What a preference is
# > Two answers to one prompt, one of them better, and the exact tokens that will be scored.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/01_preferences.ipynb)
#
# **You should know** what a tokenizer does: it cuts a text into *tokens* and gives each a whole number, its *id*. The
# examples come from the tiny world of [chapter 00](00_world.ipynb).
#
# **Time**: an hour to read what everybody needs (part one, and of part three the beginning, "What was dropped" and "Held
# out"), nearly three hours for the whole page; under a minute to run on two CPU cores.
#
# A *preference* is one sentence: for this prompt, this response is better than that one. Somebody has compared the two,
# a person or another model. The three texts have names that you will meet everywhere:
#
# - `prompt`: what was asked;
# - `chosen`: the response that was found better;
# - `rejected`: the other one.
#
# We call the three together a *pair*, because two responses are compared, and a file of many pairs a *source*.
#
# Direct preference optimisation (DPO, [chapter 03](03_loss.ipynb)) trains a language model on such pairs. It asks the
# model how likely each response is after the prompt, and then makes the chosen one likelier, compared with the rejected
# one. The answer comes as a *log-probability*, the logarithm of a probability, and it is a sum over the tokens of the
# response ([chapter 02](02_logprobs.ipynb)). So before anything is trained, somebody must decide which tokens are in
# that sum. This chapter decides it. Mistakes made here raise no error. An end token is counted twice, or never; a
# prompt is asked twice; a file is read in another way than it was written. The training runs, and learns something
# else.
#
# **Which part do you need?**
#
# | part | its question | for whom |
# |---|---|---|
# | one | which tokens of a pair are scored, what is cut, what is dropped | everybody who wants to understand DPO |
# | two | how files and chats in many formats become pairs | people with data of their own; all others may skip it |
# | three | how many pairs are tokenised once, counted, and partly held out | everybody, but for "How it is done", which is for engineers |

# %%
#| default_exp preferences

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
import csv, glob, gzip, hashlib, json, os, re
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import datasets
import jinja2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, concatenate_datasets
from datasets import load_dataset, load_dataset_builder, load_from_disk
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

# %%
import tempfile, textwrap
from unittest.mock import Mock

import matplotlib.pyplot as plt
import seaborn as sns
from tokenizers import Tokenizer, decoders, models, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from sdpo_nb.world import complaint, load_world

pd.set_option("display.width", 160, "display.max_columns", 20)
folder = Path(tempfile.mkdtemp())                     # for the files of this notebook
datasets.config.HF_DATASETS_CACHE = folder / "cache"  # it leaves nothing in your cache

# %% [markdown]
# ## Part one: from a pair to scored tokens
#
# ### One pair
#
# What does a preference look like in a file, and which part of it will a model be asked about?
#
# Here is the first pair of `primer`, one of the world's three sources. It is written as a chat: each text is a list of
# *messages*, and each message says who speaks, its *role*, and what is said.

# %%
world = load_world()
base = AutoTokenizer.from_pretrained(world.base)
with open(world.sources["primer"]) as lines:
    row = json.loads(lines.readline())
first_prompt = row["prompt"]
{field: row[field] for field in ("prompt", "chosen", "rejected")}


# %% [markdown]
# A model does not read messages. It reads one row of tokens. A chat model's tokenizer therefore has a *template*, which
# writes the messages into one text, with special tokens for the roles and for the end of a turn. We render the prompt
# alone, then the prompt with each response.

# %%
def written(messages, **kw):
    return base.apply_chat_template(messages, tokenize=False, **kw)

before = written(row["prompt"], add_generation_prompt=True)
whole = {side: written(row["prompt"] + row[side]) for side in ("chosen", "rejected")}
scored = {side: text.removeprefix(before) for side, text in whole.items()}
assert all(text.startswith(before) for text in whole.values())
pd.DataFrame({side: {"is read": before, "is scored": scored[side]} for side in whole}).T

# %% [markdown]
# Look at two things.
#
# - The prompt is *read* and not scored. DPO compares two responses to the same question, so how likely the question was
#   says nothing. It must be the very same prompt on both sides, token for token.
# - The end token `<|end|>` *is* scored. Whether a model stops where it should is part of what it has to learn.
#
# In this world every letter is a token, and the place where the prompt ends is easy to see. With a real tokenizer it is
# not.
#
# ### Where does the prompt end?
#
# Real tokenizers *merge*: characters that often stand together become one token. The toy tokenizer below does so, too.
# It is trained on three sentences by byte pair encoding (BPE), the usual way of merging.

# %%
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
LINES = ["see http://a.org", "the page is http://b.org", "is it http://a.org or http://b.org?"] * 4

def toy_tokenizer(lines, template=None, size=58, **kw):
    "A BPE tokenizer in which anything may merge with its neighbour, as in SentencePiece."
    t = Tokenizer(models.BPE())
    t.decoder = decoders.Fuse()
    alphabet = list("abcdefghijklmnopqrstuvwxyz .:/?=0123456789\n")
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    t.train_from_iterator(lines, trainer)
    names = dict(bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIAL[2:])
    return PreTrainedTokenizerFast(tokenizer_object=t, chat_template=template, **names, **kw)


# %% [markdown]
# Take a prompt that ends in the middle of a link. Two ways seem equally good: tokenise prompt and response apart and
# glue the ids together, or tokenise the whole text at once. Do they give the same tokens?

# %%
tok = toy_tokenizer(LINES)
link = dict(chat=False, prompt="is it http:", chosen="//a.org", rejected=" or not?")
glued = tok.tokenize(link["prompt"]) + tok.tokenize(link["chosen"])
joint = tok.tokenize(link["prompt"] + link["chosen"])
assert glued != joint

def token_table(rows):
    "Rows of tokens under each other, of {name: tokens}; a blank is a ␣."
    visible = {name: pd.Series(tokens).str.replace(" ", "␣") for name, tokens in rows.items()}
    return pd.DataFrame(visible).T.fillna("")

token_table({"glued": glued, "tokenised together": joint})

# %% [markdown]
# They do not. In every text that this model has read, a blank and `http://` are one token. The glued row has ` htt`,
# `p`, `:` and `//`, which the model has never met in this order. Training on it would teach the model something about
# rows that never occur.
#
# So the whole row is tokenised, prompt and response together, once for each side. One detail belongs to it. A tokenizer
# has a token for the beginning of a text, BOS, and one for its end, EOS. Some tokenizers write them by themselves, some
# data contain them already, and sometimes nobody writes them. Whichever it is, each row gets exactly one EOS and at
# most one BOS.

# %%
#| export
_SIDES = ("chosen", "rejected")

def _text_ids(pair, tokenizer):
    "Ids of the prompt, and of the two full rows; plain text."
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def ids(text):
        found = list(tokenizer(text).input_ids)
        twice = bos is not None and found[:2] == [bos, bos]
        return found[1:] if twice else found

    def without_eos(ids):
        while ids[-1:] == [eos]: ids = ids[:-1]
        return ids

    prompt = ids(pair["prompt"])
    if not pair["prompt"].endswith(tokenizer.eos_token):
        prompt = without_eos(prompt)                        # some tokenizers append EOS to everything
    full = []
    for side in _SIDES:
        row = ids(pair["prompt"] + pair[side])
        full.append(without_eos(row) + [eos])
    return prompt, full


# %%
prompt, full = _text_ids(link, tok)
already_ended = dict(link, chosen=link["chosen"] + "</s>")
assert _text_ids(already_ended, tok) == (prompt, full)      # the end token is there once
names = ["prompt alone", "prompt + chosen", "prompt + rejected"]
token_table({name: tok.convert_ids_to_tokens(ids) for name, ids in zip(names, (prompt, *full))})


# %% [markdown]
# Three rows of tokens. Where, in the two long ones, does the response begin? The prompt's last character is the `:`,
# but in the second row that character stands inside the token ` http://`, together with the beginning of the response.
# No token boundary is there.
#
# A way out: go from the left, as long as all three rows have the same tokens. That is their *longest common prefix*.

# %%
#| export
def _shared(a, b) -> int:
    "Length of the longest common prefix of two sequences."
    longest = min(len(a), len(b))
    n = 0
    while n < longest and a[n] == b[n]: n += 1
    return n


# %% [markdown]
# Write $x$ for the ids of the prompt, and $z_w$ and $z_l$ for those of the full rows with the chosen and the rejected
# response ($w$ and $l$ stand for winner and loser). With lcp for the length of the longest common prefix, the boundary
# is
#
# $$n = \min\big(\mathrm{lcp}(x, z_w),\ \mathrm{lcp}(x, z_l)\big). \tag{1}$$
#
# Before you run the cell: how many tokens of `is it http:` are left before the boundary?

# %%
shared = {side: _shared(prompt, row) for side, row in zip(_SIDES, full)}
n = min(shared.values())                                    # (1)
assert n == 5
assert tok.decode(prompt[:n]) == "is it"
{"tokens of the prompt": len(prompt)} | shared | {"n": n}


# %% [markdown]
# The rejected row agrees with the prompt to its end. The chosen row leaves it after `t`, where ` htt` meets ` http://`.
# The boundary must serve both sides, so the smaller number counts. What merged across the prompt's end is now part of
# the response, *on both sides*: the two responses are always read after the same prompt. The picture shows where every
# token went.

# %%
def draw(ax, y, ids, boundary, colour):
    "The tokens of one row as boxes over their characters; those before the boundary are grey."
    left = 0
    for i, token in enumerate(tok.convert_ids_to_tokens(ids)):
        width = len(token)
        box = "lightgrey" if i < boundary else colour
        ax.barh(y, width, left=left, height=0.7, color=box, edgecolor="white", linewidth=3)
        shown = token.replace(" ", "␣")
        ax.text(left + width / 2, y, shown, ha="center", va="center", family="monospace")
        left += width

palette = sns.color_palette("colorblind")
rows = {
    "prompt alone": (prompt, "whitesmoke"),
    "with chosen": (full[0], palette[2]),
    "with rejected": (full[1], palette[1]),
}
fig, ax = plt.subplots(figsize=(8, 2.2))
for name, (ids, colour) in rows.items(): draw(ax, name, ids, n, colour)
ax.invert_yaxis()

boundary, text_ends = len(tok.decode(prompt[:n])), len(link["prompt"])
ax.axvline(boundary, color="black")
ax.axvline(text_ends, color="grey", ls=":")
above = dict(y=1.04, transform=ax.get_xaxis_transform())
ax.text(boundary - 0.8, s="read, not scored ←", ha="right", **above)
ax.text(boundary, s="(1)", ha="center", weight="bold", **above)
ax.text(boundary + 0.8, s="→ scored", ha="left", **above)
ax.text(text_ends, s="the prompt's text ends", color="grey", **above)
ax.set(xlabel="position (characters)")
sns.despine(ax=ax, left=True)


# %% [markdown]
# The text of the prompt ends at the dotted line, inside a token of the chosen row. The boundary (1) stands at the solid
# line, the last place where all three rows agree.
#
# ### What is too long is cut
#
# What happens to a pair that is longer than the memory allows? A row of tokens costs memory, so there is a longest row,
# `max_length`. There is also a longest prompt, `max_prompt_length`: if the prompt could fill the row, nothing would be
# left to score. Where nobody names it, it is half of the row.

# %%
#| export
def prompt_limit(
    max_length: int,    # longest prompt + response, in tokens; at least 2
    given: int=None,    # longest prompt, in tokens, below max_length; None or 0: nobody named it
) -> int:               # longest prompt, in tokens; half of max_length where nobody named it
    "The longest prompt. Raises ValueError where it could fill the row and leave nothing to score."
    if max_length < 2: raise ValueError(f"max_length: must be at least 2, got {max_length}")
    if not given: return max_length // 2
    if not 1 <= given < max_length:
        raise ValueError(f"max_prompt_length: must be at least 1 and below max_length = {max_length}, "
                         f"got {given}; a longer prompt leaves no room for a response")
    return given


# %% [markdown]
# `complaint`, of [chapter 00](00_world.ipynb), makes a call that must refuse, and returns what is said.

# %%
assert prompt_limit(64) == prompt_limit(64, 0) == 32
assert prompt_limit(64, 60) == 60
complaint(prompt_limit, 64, 64)

# %% [markdown]
# Which end is cut? A prompt loses its *beginning*, because the question stands at its end. In a chat that cut also
# takes BOS and the header of the first turn, so it should be rare. A response loses its *tail*, and the end token goes
# with it. That is intended: better no end than an end the text did not have.
#
# ### Pairs that teach nothing
#
# Is every pair worth training on? Some are written correctly, and still DPO can learn nothing from them. We leave them
# out, and count them by reason, so that a file in which half of the pairs are empty does not pass for a good one:
#
# - `empty`: a response has no text. Its end token alone is no answer.
# - `equal`: both responses are the same, so neither is better.
# - `no_prompt`: the prompt has no token. A model predicts each token from the ones before it, and nothing stands before
#   the response's first one.
# - `no_room`: the row is too short. After the cut the two responses are the same.

# %%
#| export
DROPPED = "empty", "equal", "no_prompt", "no_room" # reasons

def _why_dropped(texts, prompt, whole, kept) -> str:
    "Why a pair carries no signal: texts without end tokens; ids of prompt, responses, what is kept of them."
    if not all(whole): return "empty"
    if not all(text.strip() for text in texts): return "empty"
    if whole[0] == whole[1]: return "equal"
    if not prompt: return "no_prompt"
    if kept[0] == kept[1]: return "no_room"
    return ""


# %%
def why(chosen, rejected, prompt=(7,), room=9):
    "Letters are tokens here, and a response may have `room` of them."
    responses = [list(chosen), list(rejected)]
    kept = [response[:room] for response in responses]
    return _why_dropped([chosen, rejected], list(prompt), responses, kept)

reasons = {
    "ab, ba": why("ab", "ba"),
    "a blank, ba": why(" ", "ba"),
    "ab, ab": why("ab", "ab"),
    "ab, ba, no prompt": why("ab", "ba", prompt=()),
    "abcd, abce": why("abcd", "abce"),
    "abcd, abce, room for 3": why("abcd", "abce", room=3),
}
assert list(reasons.values()) == ["", "empty", "equal", "no_prompt", "", "no_room"]
reasons


# %% [markdown]
# ### A pair, encoded
#
# Now all of it in one function: ids, boundary, cuts, reason. A pair may be plain text, as here, or a chat
# (`chat=True`); part two makes the ids of chats.
#
# The function also gives the pair a name. What is it for? Later a model will say two numbers about this pair, and they
# are kept in a table ([chapter 02](02_logprobs.ipynb)). If they were kept under the number of the row, then a row more
# in the file, or another length limit, would give a pair the numbers of other texts. So they are kept under the pair's
# `key`, a hash of its ids and its boundary: other ids, another key. `swapped` is the key that this pair would
# have with the opposite label, that is, with chosen and rejected exchanged. With it we find pairs that two people
# have judged in two ways.
#
# The prompt has a name of its own, `asked`. It is a hash of the prompt's ids *before* the boundary moves: where the
# boundary stands depends on the responses too, and all pairs of one prompt shall have one name. By it pairs are held
# out (part three).

# %%
#| export
def _spelled(pair, tokenizer):
    "The three lists of ids of a pair as text."
    return {field: tokenizer.decode(pair[f"{field}_ids"]) for field in ("prompt", *_SIDES)}

def _hash(ids): return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]

def _key(prompt, first, second): return _hash([prompt, first, second])

def _said_by(pair, tokenizer):
    "The two responses as text, without end tokens."
    texts = [pair[side]["content"] if pair["chat"] else pair[side] for side in _SIDES]
    return [text.replace(tokenizer.eos_token, "") for text in texts]

def _begin_with_prompt(pair, texts):
    "Whether both responses begin with what was asked, the prompt or its last turn."
    asked = pair["prompt"][-1]["content"] if pair["chat"] else pair["prompt"]
    asked = asked.strip()
    return bool(asked) and all(text.lstrip().startswith(asked) for text in texts)

def encode(
    pair: dict,                  # what `normalise` returns: chat, prompt, chosen, rejected
    tokenizer,                   # a transformers tokenizer
    max_length: int=1024,        # longest prompt + response, in tokens; the response's tail is cut
    max_prompt_length: int=None, # longest prompt, in tokens, its end is kept; None or 0: half of max_length
    end: tuple=None,             # `turn_end(tokenizer)`, for chats; asked for where it is not given
) -> dict:                       # key, swapped, asked, prompt_ids, chosen_ids, rejected_ids, and what was done
    "Token ids of one pair. Its prompt is what the prompt's ids and both full rows begin with (1)."
    if pair["chat"]: prompt, full = _chat_ids(pair, tokenizer, end)
    else: prompt, full = _text_ids(pair, tokenizer)

    n = min(_shared(prompt, row) for row in full)        # (1)
    longest = prompt_limit(max_length, max_prompt_length)
    kept = prompt[max(0, n - longest):n]                 # its end
    room = max_length - len(kept)
    whole = [row[n:] for row in full]
    chosen, rejected = (response[:room] for response in whole)
    texts = _said_by(pair, tokenizer)

    return dict(
        key=_key(kept, chosen, rejected),
        swapped=_key(kept, rejected, chosen),
        asked=_hash(prompt[-longest:]),
        prompt_ids=kept,
        chosen_ids=chosen,
        rejected_ids=rejected,
        drop=_why_dropped(texts, kept, whole, [chosen, rejected]),
        chat=pair["chat"],
        truncated=max(map(len, whole)) > room,
        prompt_truncated=n > longest,
        boundary_moved=n < len(prompt),
        prompt_repeated=_begin_with_prompt(pair, texts),
    )


# %%
e = encode(link, tok)
assert e["boundary_moved"]
assert not e["drop"]
stored = _spelled(e, tok)
for side in _SIDES:
    written_out = link["prompt"] + link[side] + "</s>"
    assert stored["prompt"] + stored[side] == written_out
pd.Series({name: repr(text) for name, text in stored.items()}, name="stored as").to_frame()

# %% [markdown]
# No character is lost, and none is written twice: prompt and response together still spell the whole row. The key knows
# which response is the better one. Give the pair the opposite label, and the two keys change places:

# %%
opposite = encode(link | dict(chosen=link["rejected"], rejected=link["chosen"]), tok)
assert opposite["key"] == e["swapped"]
assert opposite["swapped"] == e["key"]
assert opposite["asked"] == e["asked"]
pd.DataFrame({"the pair": e, "opposite label": opposite}).loc[["key", "swapped", "asked"]]

# %% [markdown]
# Now the cuts. One pair, five pairs of limits. In which rows does a response still have its end token? In which is the
# pair lost?

# %%
long = dict(chat=False, prompt="see http://a.org ", chosen="is it http://b.org", rejected="is it 42")
limits = [(64, 60), (64, 4), (12, 4), (8, 4), (5, 4)]
cuts = []
for max_length, longest in limits:
    e = encode(long, tok, max_length, longest)
    assert len(e["prompt_ids"]) <= longest
    for side in _SIDES:
        assert len(e["prompt_ids"]) + len(e[f"{side}_ids"]) <= max_length
    cuts.append(_spelled(e, tok) | dict(truncated=e["truncated"], drop=e["drop"]))
assert [c["drop"] for c in cuts] == ["", "", "", "no_room", "no_room"]
pd.DataFrame(cuts, index=pd.MultiIndex.from_tuples(limits, names=["max_length", "max_prompt_length"]))


# %% [markdown]
# A cut can remove the signal. In the last two rows what is left of both responses is the same, so the pair is dropped,
# and the reason is counted. In the third row both end tokens are gone, and yet the pair is kept: the two beginnings
# differ, and which of them is better was judged.
#
# **This is all that the following chapters need to know about a preference**: a prompt, two responses that follow the
# same prompt tokens and end where a model should stop, and a count of what was left out. If you came for DPO, read
# "What was dropped" and "Held out" near the end of part three, and go on with [chapter 02](02_logprobs.ipynb).

# %% [markdown]
# ## Part two: from files and chats to pairs (you may skip this)
#
# Preference data come in many forms, and a form that is misread is worse than a file that is refused. This part is
# about reading them: eight spellings of one pair, the templates of chat models, and files of five kinds. Nothing in it
# changes what a pair is. Read it when you have data of your own, or a message that you want to understand.
#
# The way is short. A *row* of a file becomes a pair of texts (`normalise`), the pair becomes ids (`encode`), and many
# rows come from a file, a folder, the hub or a list (`load_pairs`).
#
# Three rules hold throughout.
#
# - *Refuse rather than guess.* A row that can be read in two ways is an error. A guess that is right for one file is
#   wrong for the next, and nobody would notice.
# - *Say where.* A message names the file, the row and the field, says what was expected and what was found, and where
#   there is a remedy, names it.
# - *Drop nothing in silence.* A valid row that carries no signal is dropped and counted (part one). An invalid row is
#   never dropped; it stops the reading.
#
# ### What a field may hold
#
# Can this row be read at all? A field holds a string, or a list of messages, or nothing. Which of these each field may
# hold is the whole schema. An empty list is a case of its own: no earlier `messages` is fine, a prompt without a
# message is not. The words are those of the error messages.

# %%
#| export
def _is_message(m):
    return isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)

def _shape(x) -> str:
    "What a field holds, in the words of the error messages."
    if x is None: return "nothing"
    if isinstance(x, str): return "a string"
    if not isinstance(x, (list, tuple)): return "something else"
    if not x: return "no messages"
    return "messages" if all(map(_is_message, x)) else "something else"

def _wrong(where, field, what): return ValueError(f"{where}, field '{field}': {what}")

def _short(x):
    shown = x if len(str(x)) <= 60 else str(x)[:60] + "..."
    return f"{type(x).__name__} {shown!r}"

_SCHEMA = dict(
    prompt=("a string", "messages", "nothing"),
    chosen=("a string", "messages"),
    rejected=("a string", "messages"),
    system=("a string", "nothing"),
    messages=("messages", "no messages", "nothing"),
)


# %%
def user(x): return {"role": "user", "content": x}
def assistant(x): return {"role": "assistant", "content": x}

print(_wrong("pairs.jsonl, row 3", "chosen", f"expected a string or messages, got {_short(4)}"))
values = ["sort gace", [user("sort gace")], [], None, 4, [{"role": "user"}]]
pd.DataFrame({"it is": [_shape(x) for x in values]}, index=[_short(x) for x in values])


# %% [markdown]
# A row that does not fit is an error. It is never skipped: skipping would hide that a column has another name, or that
# a file is half written. The message says where it is (file and row), which field it is, what stands there, and what
# would be right.

# %%
#| export
def _check_fields(row, where):
    "Raise ValueError, naming file, row and field, unless every field holds what it may."
    for field, allowed in _SCHEMA.items():
        value = row.get(field)
        if _shape(value) in allowed: continue
        got = _short(value)
        if value is None:
            got = f"nothing; the row has {sorted(row)}, and columns={{'your name': '{field}'}} renames"
        if isinstance(value, (list, dict)):
            got += " (messages are a list of {'role': string, 'content': string})"
        raise _wrong(where, field, f"expected {' or '.join(allowed)}, got {got}")
    shape = _shape(row["chosen"])
    if _shape(row["rejected"]) != shape:
        raise _wrong(where, "rejected", f"expected {shape} as in 'chosen', got {_short(row['rejected'])}")


# %% [markdown]
# The prompt may be left out. Some data sets repeat it inside both responses, and it is what the two have in common. But
# a prompt that stands in a column of another name looks just the same. So two strings may go without a prompt only
# where no column has one of the usual other names. Turns of a chat may never: what two answers happen to share at their
# beginning is no question.

# %%
#| export
def _is_chat(row, chat):
    "Are the strings of a row turns of a chat?"
    return chat or row.get("system") is not None or row.get("messages") is not None

def _check_prompt(row, where, chat):
    "Raise ValueError where two strings lack a prompt and their common beginning cannot be meant."
    there = row.get("prompt") is not None or row.get("messages")
    if there or not isinstance(row["chosen"], str): return
    other = next((c for c in ("question", "instruction", "query", "input") if c in row), None)
    if not other and not _is_chat(row, chat): return
    filled = sorted(c for c in row if row[c] is not None)
    name = other or "your name"
    raise _wrong(where, "prompt",
                 f"expected a string or messages, got nothing; the row has {filled}, "
                 f"and columns={{'{name}': 'prompt'}} renames")


# %% [markdown]
# Scores, ids and dates may stand beside a preference; nobody reads them. But some fields are meant for the model:
# tools, images, a chain of thought. A pair without them is another pair. They cannot be rendered here, so they are
# refused rather than left out. The same holds for the column `input`, in which one popular format keeps half of the
# prompt. A system message under another usual name is refused too, because renaming is all it needs.

# %%
#| export
_FOR_THE_MODEL = dict(
    row="tools functions images image videos video audios audio documents history chat_template_kwargs".split(),
    message="tool_calls tool_call_id function_call reasoning_content reasoning thinking images".split(),
)

_SYSTEM_TOO = "system_prompt", "system_message" # other names of `system`

def _for_the_model(row):
    "(name, value) of every field that is meant for the model and cannot be rendered here."
    for field in _FOR_THE_MODEL["row"]: yield field, row.get(field)
    for field in _SCHEMA:
        if not isinstance(row.get(field), (list, tuple)): continue
        for i, message in enumerate(row[field]):
            for key in _FOR_THE_MODEL["message"]: yield f"{field}[{i}].{key}", message.get(key)

def _check_lost(row, where):
    "Raise ValueError for what a model was meant to read and would not."
    for field, value in _for_the_model(row):
        if not value: continue
        raise _wrong(where, field,
                     "is meant for the model and cannot be rendered here; "
                     f"write it into the text, or remove it; got {_short(value)}")
    for field in _SYSTEM_TOO:
        if not row.get(field) or row.get("system") is not None: continue
        raise _wrong(where, field, f"is meant for the model; columns={{'{field}': 'system'}} renames it")
    extra, prompt = row.get("input"), row.get("prompt")
    if not isinstance(extra, str) or not isinstance(prompt, str): return
    if extra.strip() not in prompt:
        raise _wrong(where, "input",
                     "is not part of 'prompt' and would be lost; write the two into one column")


# %% [markdown]
# Text itself can be broken. A character may be cut in half (half of a *surrogate* pair, the two numbers with which some
# programs write an emoji), or a CSV file may have turned a conversation into one long string.

# %%
#| export
def _said(row):
    "(field, value) of everything in a row that a model would read."
    for field in _SCHEMA:
        value = row.get(field)
        if isinstance(value, str): yield field, value
        if isinstance(value, (list, tuple)):
            for i, m in enumerate(value): yield f"{field}[{i}].content", m["content"]

def _looks_like_messages(x):
    return isinstance(x, str) and x.lstrip().startswith("[{") and "role" in x[:20]

def _check_text(row, where):
    "Raise ValueError for text that is broken."
    for field, text in _said(row):
        try: text.encode()
        except UnicodeEncodeError as e:
            half = text[e.start]
            raise _wrong(where, field, f"half a character, {half!r}, at position {e.start}") from None
    if _looks_like_messages(row["chosen"]) and _looks_like_messages(row["rejected"]):
        raise _wrong(where, "chosen", "messages, written as text; keep conversations in JSONL or Parquet")


# %% [markdown]
# The four checks make one. Their order matters: the later ones may rely on what the earlier ones have found to be
# right. Who walks through the messages of a field need not ask again whether they are messages.

# %%
#| export
def _check(row, where, chat=False):
    "Raise ValueError, naming file, row and field, for a row that cannot be read in full."
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with fields, got {_short(row)}")
    _check_fields(row, where)
    _check_lost(row, where)
    _check_text(row, where)
    _check_prompt(row, where, chat)


# %% [markdown]
# Eight wrong rows, and what is said about them: three by the first check, one by the check of the prompt, two by the check of what
# would be lost, two by that of broken text. Note the second one: a number is not turned into its digits. A file
# that has `4` in one row and `"4"` in another may have meant a score.

# %%
thought = assistant("4") | {"thinking": "two and two"}
wrong_rows = [
    dict(prompt="sort gace", chosen="aceg"),
    dict(prompt="add 1 2", chosen="3", rejected=4),
    dict(prompt="add 1 2", chosen="3", rejected=[assistant("4")]),
    dict(question="add 2 2", chosen="4", rejected="5"),
    dict(prompt=[user("add 2 2")], chosen=[thought], rejected=[assistant("5")]),
    dict(prompt="translate", input="hello", chosen="bonjour", rejected="salut"),
    dict(prompt="smile", chosen="\ud83d", rejected="no"),
    dict(prompt="smile", chosen=str([assistant("yes")]), rejected=str([assistant("no")])),
]
_check(dict(prompt="add 2 2", chosen="4", rejected="5", id=17, score=0.9), "row 0")     # fine
said = [complaint(_check, row, f"pairs.jsonl, row {i}") for i, row in enumerate(wrong_rows)]
pd.DataFrame({"the message": said}).style.hide().set_uuid("bad")


# %% [markdown]
# ### One pair, many spellings
#
# How do many ways to write a pair become one? There are three questions, and each data set answers them in its own way:
# where is the prompt, is it written once or twice, and what was said before it? We take them one by one.
#
# #### The prompt inside the responses
#
# Where the prompt is not written out, it is what the two sides share at their beginning. As in TRL, the trainer most
# people use, text is cut wherever the sides differ, even inside a word. `_shared` of part one finds the place.

# %%
#| export
def _split(chosen, rejected):
    "The common beginning of two strings or lists of messages, and at least one element that is left of each."
    n = min(_shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    n = max(0, n)
    if n and chosen[n-1] == " ": n -= 1 # a blank belongs to the word after it
    return chosen[:n], chosen[n:], rejected[n:]


# %%
assert _split("yes", "yes, sir") == ("ye", "s", "s, sir") # neither side is left empty
_split("Q: 2+3? A: it is 5", "Q: 2+3? A: it is 6")


# %% [markdown]
# #### The prompt written twice
#
# Sets on the hub often have a string in `prompt` and whole conversations in `chosen` and `rejected`. The prompt is then
# inside them already and must not be asked twice: the model would learn to answer a question that is always repeated,
# and nobody repeats it later. But a prompt that is *not* inside them must not be lost.

# %%
#| export
def _turn(role, content): return {"role": role, "content": content}

def _messages(x): return [_turn(m["role"], m["content"]) for m in x]

def _split_turns(prompt, chosen, rejected, where):
    "A list prompt stands before the two sides; a string prompt, or none, is inside them if they share turns."
    if isinstance(prompt, (list, tuple)): return _messages(prompt), chosen, rejected
    head, chosen, rejected = _split(chosen, rejected)
    if not isinstance(prompt, str): return head, chosen, rejected
    asked = [m["content"].strip() for m in head if m["role"] == "user"]
    if not asked: return [*head, _turn("user", prompt)], chosen, rejected
    flat_copy = all(a in prompt for a in asked)
    one_turn = any(prompt.strip() in a for a in asked)
    if not flat_copy and not one_turn:
        raise _wrong(where, "prompt",
                     "expected what the user says in the turns both sides share, or nothing, "
                     f"got {_short(prompt)}")
    return head, chosen, rejected


# %%
ask, good, bad = "sort gace", "aceg", "geca"
won, lost = [user(ask), assistant(good)], [user(ask), assistant(bad)]
parted = _split_turns(ask, won, lost, "row 0")
assert parted == ([user(ask)], [assistant(good)], [assistant(bad)])   # asked once
complaint(_split_turns, "copy gace", won, lost, "row 0")

# %% [markdown]
# Where both sides are strings, nobody can say which is meant: an answer may well begin with the question. So nothing
# is taken away. Such pairs are counted, and where they are most of a source, a run warns before it trains. Here the
# prompt would be read twice:

# %%
twice = dict(chat=False, prompt=ask, chosen=f" {ask} {good}", rejected=f" {ask} {bad}")
assert encode(twice, base)["prompt_repeated"]
twice["prompt"] + twice["chosen"]


# %% [markdown]
# #### Earlier turns
#
# The column `messages` comes in three readings:
#
# - the turns *before* the prompt;
# - the conversation up to the answer, of which `prompt` is a flat copy (the data set HH of Anthropic);
# - the conversation *with* the chosen answer (UltraFeedback).
#
# Its end tells them apart. If it ends with a user's turn, that is the prompt, because two user's turns cannot follow
# each other. If it ends with an answer to the very question of this row, the answer must go: the question cannot have
# been answered before it was asked.
#
# The prompt may bring earlier turns along, too. What stands in both is said once, and what stands in one of them only
# is kept. Two different system messages are refused: nobody can say which of them the model was given.

# %%
#| export
def _without_answer(before, turns, sides, where):
    "Earlier turns; a whole conversation loses the answer, which is one of the row's own."
    if len(before) < 2 or not turns or before[-1]["role"] != "assistant": return before
    if before[-2]["content"].strip() != turns[-1]["content"].strip(): return before
    answers = [side["content"] for side in sides]
    if before[-1]["content"] not in answers:
        raise _wrong(where, "messages",
                     "holds the prompt, and an answer that is neither 'chosen' nor 'rejected'; "
                     "leave the two out of it")
    return before[:-1]

def _without_both(before, turns):
    "Earlier turns, without those that the prompt's own turns hold as well."
    said = [[(m["role"], m["content"].strip()) for m in some] for some in (before, turns)]
    n = len(before)
    if any(said[1][i:i+n] == said[0] for i in range(len(turns))): return []
    both = next((k for k in range(n, 0, -1) if said[0][-k:] == said[1][:k]), 0)
    return before[:n - both]

def _context(row, turns, sides, where):
    "System message, earlier turns, then the prompt's own."
    before = _without_answer(_messages(row.get("messages") or []), turns, sides, where)
    before = _without_both(before, turns)
    if before and before[-1]["role"] == "user":
        copied = len(turns) == 1 and before[-1]["content"].strip() in turns[0]["content"]
        if turns and not copied:
            raise _wrong(where, "messages",
                         "ends with a user turn, and 'prompt' is no copy of that; "
                         "end it with the assistant turn before the prompt")
        turns = []
    elif not turns:
        raise _wrong(where, "prompt",
                     "expected a string or messages, got nothing, and the two sides share no turn")
    system = [_turn("system", row["system"])] if row.get("system") else []
    first = [part[0] for part in (system, before, turns) if part and part[0]["role"] == "system"]
    for m in first:
        if m == first[0]: continue
        raise _wrong(where, "system" if system else "messages",
                     f"two system messages, {_short(first[0]['content'])} and {_short(m['content'])}; keep one")
    return first[:1] + [m for m in before + turns if m not in first]


# %%
earlier = [user("hi"), assistant("hello")]
sides = [assistant(good), assistant(bad)]
assert _context(dict(messages=earlier), earlier + [user(ask)], sides, "row 0") == earlier + [user(ask)]
stranger = dict(messages=[user(ask), assistant("gace")])
complaint(_context, stranger, [user(ask)], sides, "row 0")


# %% [markdown]
# #### Two shapes are left
#
# We can now put the pieces together. A row is checked. If it holds plain text, only the prompt may have to be found. If
# it is a chat, the turns that both sides share are taken off, and what was said before goes in front: the system
# message, which tells a model how to behave, and the earlier turns.
#
# Plain strings stay plain text, as in TRL, unless something says that they are turns of a chat: a `system` or
# `messages` column, or `chat=True`. Whatever the spelling, a pair comes out as three strings, or as a conversation with
# two possible closing turns.

# %%
#| export
def normalise(
    row: dict,         # a raw row: prompt (may be missing), chosen, rejected; optional system, messages
    where: str="row",  # file and row number, for error messages
    chat: bool=False,  # read string fields as turns of a chat
) -> dict:             # chat (bool), prompt, chosen, rejected: strings, or messages and two closing messages
    "One preference, whatever its spelling. Raises ValueError naming file, row and field."
    _check(row, where, chat)
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str):
        if not _is_chat(row, chat):
            if prompt is None: prompt, chosen, rejected = _split(chosen, rejected)
            if isinstance(prompt, str):
                return dict(chat=False, prompt=prompt, chosen=chosen, rejected=rejected)
        chosen = [_turn("assistant", chosen)]
        rejected = [_turn("assistant", rejected)]

    turns, chosen, rejected = _split_turns(prompt, _messages(chosen), _messages(rejected), where)
    for field, side in (("chosen", chosen), ("rejected", rejected)):
        roles = [m["role"] for m in side]
        if roles != ["assistant"]:
            raise _wrong(where, field, f"expected one assistant turn after the prompt, got roles {roles}")
    sides = [chosen[0], rejected[0]]
    return dict(chat=True, prompt=_context(row, turns, sides, where), chosen=sides[0], rejected=sides[1])


# %% [markdown]
# Eight spellings of one pair. The first stays text. The other seven must come out as the same conversation, apart from
# the turns that only some of them carry.

# %%
strings = dict(prompt=ask, chosen=good, rejected=bad)
conversations = dict(chosen=won, rejected=lost)
spellings = {
    "text": strings,
    "conversational": dict(prompt=[user(ask)], chosen=[assistant(good)], rejected=[assistant(bad)]),
    "implicit prompt": conversations,
    "string + conversations": conversations | dict(prompt=ask),
    "system": strings | dict(system="be brief"),
    "messages before": strings | dict(messages=earlier),
    "messages, to the answer": strings | dict(prompt=f"Human: {ask} Assistant:", messages=[user(ask)]),
    "messages, whole": conversations | dict(prompt=ask, messages=won),
}


# %%
def flat(x):
    "A string, a message or several, on one line."
    if isinstance(x, str): return x
    messages = x if isinstance(x, list) else [x]
    return " / ".join(f"{m['role']}: {m['content']}" for m in messages)

def on_a_line(pair): return {field: flat(pair[field]) for field in ("prompt", "chosen", "rejected")}

pairs = {name: normalise(row) for name, row in spellings.items()}
for name, pair in pairs.items():
    if name == "text": continue
    assert pair["chat"]
    assert pair["prompt"][-1] == user(ask)
    assert [pair["chosen"], pair["rejected"]] == sides
pd.DataFrame({name: on_a_line(pair) for name, pair in pairs.items()}).T

# %% [markdown]
# ### Where a turn ends
#
# Which token tells a chat model that its answer is finished, and is it scored? A template closes the assistant's turn with an end token, and some templates write more after
# it: ChatML, a common one, a line feed. When the model is used, it is stopped at the end token and never asked for the
# rest. So the rest must not be scored.
#
# Two things are therefore needed: a way to render a conversation that gives the same ids every day, and a way to find
# out what a template writes at the end of a turn. The second is not written down anywhere. It differs from model to
# model, and it is a popular source of mistakes: a model that is never asked whether to stop after its answer learns to
# go on talking.
#
# A template is a small program and may do what it likes. Some look at the clock and write today's date into the prompt.
# Then the ids would be others tomorrow, so a template that asks for the date is told a fixed one.

# %%
#| export
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

def _without_clock(template):
    "A chat template in which every day is the one that Llama 3's own takes where no clock is at hand."
    day = datetime(2024, 7, 26)
    return _CLOCK.sub(lambda found: found[1] + day.strftime(found[2]) + found[1], template)

def _render(tokenizer, messages, **kw) -> str:
    "Text of a conversation. Raises ValueError without a template, TemplateError where it fails."
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; set tokenizer.chat_template, "
                         "or give prompt, chosen and rejected as plain strings")
    if "strftime_now" in tokenizer.chat_template:
        kw["chat_template"] = _without_clock(tokenizer.chat_template)
    try: return tokenizer.apply_chat_template(messages, tokenize=False, **kw)
    except (ValueError, jinja2.TemplateError): raise
    except Exception as e:                                    # a template may do anything that Python can
        raise jinja2.TemplateError(f"{type(e).__name__}: {e}") from e

def _rendered_ids(tokenizer, text):
    "Ids of what a template has written; BOS and the like are in it already."
    return list(tokenizer(text, add_special_tokens=False).input_ids)


# %%
chatml = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
talk = [user("is it?"), assistant("yes")]
dated = toy_tokenizer(LINES, "today {{ strftime_now('%d %m %Y') }} " + chatml)
assert _render(dated, talk).startswith("today 26 07 2024")
chatter = toy_tokenizer(LINES, chatml)
assert _rendered_ids(chatter, _render(chatter, talk)) == chatter.apply_chat_template(talk, return_dict=False)
print(complaint(_render, tok, talk))
_render(chatter, talk)


# %% [markdown]
# What follows the response? Nobody tells us, but we can ask the template: render two conversations that differ only in
# the response. What the two texts share at their *end* comes after the response. A missing prompt was found in the same
# way, at the beginning.

# %%
#| export
def _after_answer(tokenizer, later=()) -> str:
    "Text that follows an assistant's turn, whatever it says. Raises ValueError for an unusable template."
    def texts(before):
        asked = [*before, _turn("user", "x")]
        return [_render(tokenizer, [*asked, _turn("assistant", said), *later]) for said in ("a", "b b")]

    try: a, b = texts([])
    except jinja2.TemplateError:         # it may insist on a system message
        try: a, b = texts([_turn("system", "x")])
        except jinja2.TemplateError as e:
            raise ValueError(f"the chat template cannot be rendered ({e})") from e
    if a == b:
        raise ValueError("the chat template leaves out what a message says: "
                         "it wants content in parts, not a string")
    tail = _shared(a[::-1], b[::-1])
    return a[len(a) - tail:]


# %%
_after_answer(chatter)


# %% [markdown]
# In that text the first end token counts, and what comes after it is cut. Three more cases:
#
# - Llama 3 ends a turn with a token that is not its EOS. It is an end token all the same.
# - A template may have no end token at all. Then all that follows the response is cut, and EOS is appended.
# - A turn may end with *two* tokens, as in Cohere's models. The second one belongs to the turn if it also stands
#   between two turns. Otherwise it ends the whole text, and is cut.
#
# It is *text* that is cut, and not a number of tokens. Where two line feeds follow a response, some tokenizers have one
# token for its full stop and the line feeds together. Whoever cuts that token cuts the full stop.

# %%
#| export
def _end_tokens(tokenizer) -> set:
    "The tokens, as text, that may end a turn."
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
    return added | set(tokenizer.all_special_tokens)

def turn_end(
    tokenizer,          # a tokenizer with a chat template
) -> tuple[list[int], str]: # ids to append, and before that the text to cut, after a rendered assistant turn
    "How a rendered turn is mended to end with its end token. Raises ValueError for an unusable template."
    tail = _after_answer(tokenizer)
    longest_first = sorted(_end_tokens(tokenizer), key=len, reverse=True)
    an_end = re.compile("|".join(map(re.escape, longest_first)))

    found = an_end.search(tail)
    if not found: return [tokenizer.eos_token_id], tail
    n = found.end()
    found = an_end.match(tail, n)
    if found:                                # the turn's, if it stands between two turns as well
        between = _after_answer(tokenizer, [_turn("user", "y")])
        as_between = _shared(tail, between)
        while found and found.end() <= as_between:
            n = found.end()
            found = an_end.match(tail, n)
    return [], tail[n:]


# %% [markdown]
# Then a row can be mended. Some data have the end token in the answer already; as in plain text, it is there once.

# %%
#| export
def _ended_ids(tokenizer, text, end):
    "Ids of a rendered conversation, up to and with the one token that ends its last turn."
    add, cut = end
    ids = _rendered_ids(tokenizer, text.removesuffix(cut)) + add
    def ends(i): return tokenizer.convert_ids_to_tokens(i) in _end_tokens(tokenizer)
    while ids[-2:] == ids[-1:] * 2 and ends(ids[-1]): ids.pop()
    return ids


# %%
templates = {
    "ChatML": chatml,
    "Llama-3-like": chatml.replace("<|im_end|>\n", "<|eot_id|>"),
    "no end token": chatml.replace("<|im_end|>", ""),
    "two end tokens": chatml.replace("<|im_end|>\n", "<|eot_id|><|im_end|>"),
}

def ending(template):
    "What a template writes at the end of a turn, and what is scored."
    t = toy_tokenizer(LINES, template)
    add, cut = turn_end(t)
    return dict(
        template_writes=repr(_after_answer(t)),
        cut=repr(cut),
        append=t.decode(add),
        scored_end=t.decode(_ended_ids(t, _render(t, talk), (add, cut))[-1:]),
    )

endings = pd.DataFrame({name: ending(template) for name, template in templates.items()}).T
assert endings["scored_end"].tolist() == ["<|im_end|>", "<|eot_id|>", "</s>", "<|im_end|>"]
endings


# %% [markdown]
# #### What a template leaves out
#
# A template may also drop a part of what it is given, and say nothing. Some keep only what stands after `</think>`:
# they are made for earlier turns, whose thoughts a model is not shown again. In a pair the thought is a part of the
# answer that was judged. Others write the system message only where a question comes last, and so not above an answer.
# We therefore look whether the text has all that was said. White space does not count, since many templates trim it, and
# earlier answers are not looked at.

# %%
#| export
def _check_written(text, messages):
    "Raise ValueError where a template has left out a part of what these messages say."
    def close(x): return "".join(x.split())
    written = None
    for m in messages:
        if m["content"] in text: continue
        written = written or close(text)
        if close(m["content"]) in written: continue
        raise ValueError(f"the chat template leaves out a part of what '{m['role']}' says, "
                         f"{_short(m['content'])}; take another template, or leave that part out of the data")


# %%
forgetful = chatml.replace("m.content", "m.content.split('</think>')[-1]")
thinking = [user("is it?"), assistant("<think>it is</think>yes")]
complaint(_check_written, _render(toy_tokenizer(LINES, forgetful), thinking), thinking)


# %% [markdown]
# With this the ids of a chat are made as those of a text: the prompt alone, with the header that asks the model to
# speak, and the two full rows, mended at their end.

# %%
#| export
def _chat_ids(pair, tokenizer, end):
    "Ids of the prompt, and of the two full rows; a chat."
    end = end or turn_end(tokenizer)
    asked = [m for m in pair["prompt"] if m["role"] != "assistant"]
    full = []
    for side in _SIDES:
        text = _render(tokenizer, pair["prompt"] + [pair[side]])
        _check_written(text, [*asked, pair[side]])
        full.append(_ended_ids(tokenizer, text, end))
    prompt = _render(tokenizer, pair["prompt"], add_generation_prompt=True)
    return _rendered_ids(tokenizer, prompt), full


# %%
asked = normalise(dict(prompt=[user("is it?")], chosen=[assistant("yes")], rejected=[assistant("no")]))
uncut, cut = (_spelled(encode(asked, chatter, max_prompt_length=n), chatter) for n in (64, 15))
assert uncut["chosen"] == "yes<|im_end|>"
assert uncut["prompt"].startswith("<|im_start|>user")
assert uncut["prompt"].endswith(cut["prompt"])
assert not cut["prompt"].startswith("<|im_start|>user")     # the cut took the header of the first turn
pd.DataFrame({"whole": uncut, "prompt of 15 tokens": cut}).map(repr).style.format(escape="html")


# %% [markdown]
# ### Reading rows
#
# The rest of this part is about where rows come from. It has one public function, `load_pairs`, which takes a file, a
# folder, the name of a data set on the hub, a list, or a `Dataset`, and gives back the same kind of table for all of
# them. On the way every row goes through the same three steps:
#
# 1. its columns get the names `prompt`, `chosen`, `rejected`, `system`, `messages`;
# 2. it is checked, as above, and compared with the first row of its file;
# 3. everything but these five fields is left behind.
#
# We build it from the inside: first what happens to a row, then the files, then the places.
#
# Columns with other names are renamed first. Where only the new name is there, nothing is to be done, so one renaming
# serves several sources that spell it differently. Where both are there, the renamed column wins: somebody has asked
# for it. A renaming can be wrong in two ways. It may name a column that no row has: that is a slip of the pen, or it is
# meant for another source. Or it gives two columns of a row one name, and nobody can say which of them is meant.

# %%
#| export
def _check_columns(columns, names, where):
    "Raise ValueError where a rename finds neither its old nor its new name."
    there = {*names, *(columns[c] for c in columns if c in names)}
    absent = [c for c in columns if c not in names and columns[c] not in there]
    if absent:
        raise ValueError(f"{where}: columns= names {sorted(absent)}, but the rows have {sorted(names)}; "
                         "--columns goes to every source, and in sources= or the file of --config "
                         "each source may have columns of its own")

def _rename(columns, names, where):
    "Old name -> new name, for the columns that stay. Raises ValueError where two would get one name."
    taken = {}
    for c in columns:
        if c in names: taken.setdefault(columns[c], []).append(c)
    for name, (first, *others) in taken.items():
        if not others: continue
        raise ValueError(f"{where}: columns= gives both '{first}' and '{others[0]}' the name '{name}'")
    return {c: columns.get(c, c) for c in names if c in columns or c not in taken} # a rename wins


# %%
question = {"question": "prompt"}
assert _rename(question, ["prompt", "chosen"], "") == dict(prompt="prompt", chosen="chosen")     # nothing to do
_rename(question, ["question", "prompt", "chosen"], "")


# %% [markdown]
# A field must keep its shape through a whole file. Where it changes, two exports have been glued together, so the row
# at which it happens is an error. Rows pass one by one, and a file of any size is read in constant memory. Only the
# five fields of a preference go on.

# %%
#| export
def _fields_of(row):
    "The five fields of a preference, messages reduced to role and content."
    values = {field: row.get(field) for field in _SCHEMA}
    return {field: _messages(x) if isinstance(x, (list, tuple)) else x for field, x in values.items()}

def _check_drift(row, where, first_seen):
    "Raise ValueError where a field holds another shape than in the first row."
    for field in ("prompt", "chosen", "rejected"):
        shape = _shape(row.get(field))
        before, first = first_seen.setdefault(field, (shape, where))
        if shape == before: continue
        number = first.split(", row ")[-1]
        raise _wrong(where, field, f"expected {before} as in row {number}, got {_short(row.get(field))}")

def _checked(rows, columns: dict): # rows: (where, row)
    "The rows, renamed, checked and reduced to the fields of a preference."
    first_seen, names = {}, set()
    for where, row in rows:
        if isinstance(row, dict):
            names |= set(row)
            row = {new: row[old] for old, new in _rename(columns, row, where).items()}
        _check(row, where)
        _check_drift(row, where, first_seen)
        yield _fields_of(row)
    if names: _check_columns(columns, names, where.split(", row")[0])


# %%
def numbered(rows): return ((f"pairs.jsonl, row {i}", row) for i, row in enumerate(rows))

scored_too = dict(question=ask, chosen=good, rejected=bad, score=4.5)
print(next(_checked(numbered([scored_too]), question)))                       # no score, and a prompt
print(complaint(list, _checked(numbered([strings, conversations]), {})))
print(textwrap.fill(complaint(list, _checked(numbered([conversations]), {"qestion": "prompt"})), 100))


# %% [markdown]
# #### Lines of JSON
#
# JSON is read line by line, and not by Arrow, the table format below `datasets`. Arrow would turn a column of answers
# like `2024-01-01` into dates, and it could not say in which line a mistake is. Rows count from 0, as in `data[0]`;
# lines count from 1, as in an editor, and blank lines are no rows. So a message gives both numbers.

# %%
#| export
def _suffix(path):
    "Kind of a file, without .gz."
    path = Path(str(path).lower())
    return Path(path.stem if path.suffix == ".gz" else path).suffix

def _opened(path, **kw):
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    return opened(path, "rt", encoding="utf-8-sig", **kw)

def _once(pairs):
    "An object of JSON. A name that is given twice is an error; json lets the later value win."
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1: raise ValueError(f"'{name}' is given twice")
    return dict(pairs)

def _parsed(text, where, expected=""):
    try: return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as e:
        why = str(e).splitlines()[0]
        if not isinstance(e, json.JSONDecodeError): expected = ""
        raise ValueError(f"{where}: not JSON ({why}){expected}") from None

def _json_rows(path):
    "(where, row): one object a line, or, in a .json file, one list of objects."
    with _opened(path) as f:
        first = next((line for line in f if line.strip()), "") if _suffix(path) == ".json" else ""
        f.seek(0)
        if first.lstrip().startswith("["):
            rows = _parsed(f.read(), path)
            for i, row in enumerate(rows): yield f"{path}, row {i}", row
            return
        expected = "; expected one object a line, or one list of objects in a .json file"
        i = 0
        for n, line in enumerate(f, 1):
            if not line.strip(): continue
            where = f"{path}, row {i} (line {n})"
            yield where, _parsed(line.rstrip("\n"), where, expected)
            i += 1


# %%
def write(name, text):
    path = folder / name
    path.write_text(text)
    return path

for text in ('\n{"prompt": "copy ab", "chosen": "ab"', '{"prompt": "copy ab", "prompt": "copy ba"}'):
    print(complaint(list, _json_rows(write("broken.jsonl", text))))


# %% [markdown]
# #### CSV, Parquet and Arrow
#
# A CSV file does not say what its cells are, and readers guess. `007` becomes 7, `NA` becomes nothing, and where a row
# has a cell more than the first line has names, every cell moves under the name to its left: the chosen response is
# read as the prompt. So here, too, nothing is guessed. Every cell is text, an empty cell is nothing, and a row with too
# many cells is an error. A row may take several lines; the message gives its first.

# %%
#| export
def _csv_rows(path):
    "(where, row): every cell is text, and an empty one is nothing."
    csv.field_size_limit(2**31 - 1)                         # an answer may be longer than csv expects
    names, i, n = None, 0, 1
    with _opened(path, newline="") as f:
        lines = csv.reader(f, strict=True)
        try:
            for cells in lines:
                where = f"{path}, row {i} (line {n})"
                n = lines.line_num + 1
                if not cells: continue                      # a blank line
                if names is None:
                    names = cells
                    twice = [name for name in names if name and names.count(name) > 1]
                    if twice: raise ValueError(f"{path}: the first line gives '{twice[0]}' twice")
                    continue
                if len(cells) > len(names):
                    raise ValueError(f"{where}: {len(cells)} cells, but the first line has {len(names)} names; "
                                     'a text with a comma in it stands in quotes: "one, two"')
                filled = {name: cell or None for name, cell in zip(names, cells)}
                yield where, dict.fromkeys(names) | filled
                i += 1
        except csv.Error as e: raise ValueError(f"{path}, row {i} (line {n}): not CSV ({e})") from None


# %%
words = write("words.csv", "prompt,chosen,rejected\nis it so?,None,007\nand this?,NA,\n")
assert [row["chosen"] for _, row in _csv_rows(words)] == ["None", "NA"]
assert [row["rejected"] for _, row in _csv_rows(words)] == ["007", None]
complaint(list, _csv_rows(write("comma.csv", "prompt,chosen,rejected\nis it so?,Yes, it is,No\n")))

# %% [markdown]
# Parquet and Arrow know the types of their columns. They are streamed by `datasets`.

# %%
#| export
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}

def _file_rows(path: Path):
    "(where, row) of every row of a file."
    kind = _READERS[_suffix(path)]
    own = dict(json=_json_rows, csv=_csv_rows).get(kind)
    if own:
        yield from own(path)
        return
    if kind == "parquet" and not pq.read_metadata(path).num_rows: return
    rows = load_dataset(kind, data_files=glob.escape(str(path)), split="train", streaming=True)
    for i, row in enumerate(rows): yield f"{path}, row {i}", row


# %% [markdown]
# #### A file, once
#
# A file becomes an Arrow table on disk once, under the hash of its *content*. So an edited file is never read from an
# old table, even where its size and date are the old ones. A read that is interrupted leaves nothing under that name.

# %%
#| export
_VERSION = 6 # of what is cached: raise it when the same file or row would give something else

def _generate(path, columns, digest): yield from _checked(_file_rows(Path(path)), columns)

def _features(row):
    "Types of the columns, by the first row."
    text = datasets.Value("string")
    turns = datasets.List({"role": text, "content": text})
    types = {}
    for field, x in row.items():
        types[field] = turns if field == "messages" or isinstance(x, list) else text
    return datasets.Features(types)

@contextmanager
def _no_bar(hide=True):
    "Reading a file is not the long work; the bar of tokenising it is enough."
    shown = hide and not are_progress_bars_disabled()
    if hide: disable_progress_bars()
    try: yield
    finally:
        if shown: enable_progress_bars()

def _table_of(path, columns):
    "The checked rows of a file as a memory-mapped table."
    first = next(_checked(_file_rows(path), columns), None)
    if first is None: raise ValueError(f"{path}: no rows")
    with open(path, "rb") as f: digest = hashlib.file_digest(f, "sha256").hexdigest()
    decides = dict(path=str(path), columns=columns, digest=f"{_VERSION}-{digest}")
    with _no_bar(): return Dataset.from_generator(_generate, features=_features(first), gen_kwargs=decides)


# %%
pairs_file = write("pairs.jsonl", json.dumps(strings) + "\n")
before = _table_of(pairs_file, {}).to_list()
write("pairs.jsonl", json.dumps(strings | dict(chosen="gace")) + "\n")       # as long as it was
[row["chosen"] for row in before + _table_of(pairs_file, {}).to_list()]


# %% [markdown]
# What goes wrong on the way is said in one line that begins with the file. One thing is not the file's fault: the
# folder in which `datasets` keeps its tables may be full or broken. The file itself has been read by then, so the
# message names that folder.

# %%
#| export
def _why(e) -> str:
    "What an error says, in one line."
    if isinstance(e, UnicodeDecodeError): return f"is not text in UTF-8 ({e.reason}); save it as UTF-8"
    return " ".join(str(e).split())[:300] or type(e).__name__

def _read_file(path: Path, columns: dict) -> Dataset:
    "The checked rows of one file, memory-mapped. Raises ValueError naming the file or the cache."
    if _suffix(path) not in _READERS:
        raise ValueError(f"{path}: cannot read '{path.suffix}' files; use one of {sorted(_READERS)}; "
                         "the text formats may end in .gz")
    try: return _table_of(path, columns)
    except Exception as e:
        e = e.__cause__ or e # datasets wraps what the generator raises
        why = _why(e)
        elsewhere = isinstance(e, OSError) and e.filename and str(e.filename) != str(path)
        if isinstance(e, json.JSONDecodeError) or elsewhere:  # of the cache: this file has been read by then
            cache = datasets.config.HF_DATASETS_CACHE
            raise ValueError(f"the cache of datasets, {cache}, cannot be used ({why}); "
                             "delete it, or name another folder in HF_DATASETS_CACHE") from e
        said = str(e)
        raise ValueError(said if said.startswith(str(path)) else f"{path}: {why}") from e


# %%
for name, text in {"notes.txt": "no pairs", "empty.jsonl": "", "torn.parquet": "torn"}.items():
    print(complaint(_read_file, write(name, text), {}))


# %% [markdown]
# #### A folder
#
# A folder is read file by file, so that a message can name the file. Which file belongs to which split (train, test) is
# left to `datasets`. It takes files of one kind only; what it leaves aside is said. A folder, or a data set of the hub,
# may hold several sets that `datasets` calls *configurations*. Nobody can say which of them is meant, so it is refused.

# %%
#| export
def _pick(splits, split, where):
    if split not in splits: raise ValueError(f"{where}: no split '{split}', only {sorted(splits)}")
    return splits[split]

def _remedy(why):
    "What helps where an error says that one of several configurations must be named."
    if "Config name is missing" not in why: return ""
    return ("; datasets.load_dataset(name, configuration) reads one of them: "
            "give what it returns, or the folder of its save_to_disk")

def _files_of(path):
    "{split: files}, as `datasets` sorts them; prints what it leaves aside."
    try: found = load_dataset_builder(str(path)).config.data_files
    except Exception as e:
        why = _why(e)
        raise ValueError(f"{path}: cannot be read as a folder of data ({why}){_remedy(why)}") from e
    files = {str(split): names for split, names in found.items()}
    used = {Path(name).resolve() for names in files.values() for name in names}
    aside = []
    for f in path.rglob("*"):
        if _suffix(f) not in _READERS or f.resolve() in used or f.name.startswith("."): continue
        aside.append(str(f.relative_to(path)))
    left = ", ".join(sorted(aside))
    if left: print(f"{path}: not read, as the folder's data are of another kind: {left}")
    return files

def _read_folder(path, split, columns):
    files = _pick(_files_of(path), split, path)
    parts = [_read_file(Path(f), columns) for f in files]
    for f, part in zip(files, parts):
        if part.features != parts[0].features:
            raise ValueError(f"{f}: its fields hold other things than those of {files[0]}; "
                             "load the two as two sources")
    return concatenate_datasets(parts)


# %%
(folder / "set").mkdir()
write("set/train.jsonl", json.dumps(strings) + "\n")
write("set/test.jsonl", json.dumps(strings) + "\n")
assert _read_folder(folder / "set", "train", {}).num_rows == 1
complaint(_read_folder, folder / "set", "dev", {})


# %% [markdown]
# #### `datasets`, and the hub
#
# Rows that are a `Dataset` already (from the hub, from `save_to_disk`, from memory) stay where they are. They are
# renamed and checked. Arrow gives a column one type, so the first row shows a misnamed or wrong column, and the others
# are checked for gaps.

# %%
#| export
def _from_dataset(data, split, columns, where):
    if isinstance(data, DatasetDict): data = _pick(data, split, where)
    _check_columns(columns, data.column_names, where)
    names = _rename(columns, data.column_names, where)
    new_names = {old: new for old, new in names.items() if old != new}
    if data.format["type"] == "custom":
        raise ValueError(f"{where}: has a transform (set_transform), which is not read; apply it with map, "
                         "or remove it (reset_format)")
    data = data.with_format(None).select_columns(list(names)).rename_columns(new_names)

    if len(data): _check(data[0], f"{where}, row 0")
    may_matter = [*_SCHEMA, *_FOR_THE_MODEL["row"], *_SYSTEM_TOO, "input"]
    looked_at = data.select_columns([c for c in may_matter if c in data.column_names])
    rows = ((f"{where}, row {i}", row) for i, row in enumerate(looked_at))
    for _ in _checked(rows, {}): pass                           # read for its errors
    return data.select_columns([c for c in _SCHEMA if c in data.column_names])


# %%
gap = Dataset.from_list([strings, strings | dict(rejected=None)])
complaint(_from_dataset, gap, "train", {}, "my data")


# %% [markdown]
# What `save_to_disk` has written is read back by `load_from_disk`. Any other name may be a data set of the Hugging Face
# hub. But a path that does not exist must not turn into a question to the hub: offline that costs half a minute of
# attempts, online it may find somebody else's data. What ends like a file, starts like a path, or has two slashes is a
# path.

# %%
#| export
def _from_disk(path):
    try: return load_from_disk(str(path))
    except Exception as e:
        what = f"{type(e).__name__}: {_why(e)}"
        raise ValueError(f"{path}: what save_to_disk wrote here cannot be read ({what})") from e

def _from_hub(name, split, revision):
    path = Path(name).expanduser()
    like_a_path = path.is_absolute() or name.startswith(".") or name.count("/") > 1
    if like_a_path or _suffix(path) in _READERS: raise FileNotFoundError(f"{name}: no such file or folder")
    try: return load_dataset(name, split=split, revision=revision)
    except Exception as e:
        why = _why(e)
        raise ValueError(f"{name}: neither a local path nor a hub data set that could be read "
                         f"({why}){_remedy(why)}") from e


# %%
complaint(_from_hub, "nowhere/pairs.jsonl", "train", None)


# %% [markdown]
# #### The function that you call
#
# Together they are `load_pairs`. Its rows are checked but not yet interpreted: whether strings are turns of a chat is
# decided when they are tokenised.

# %%
#| export
def _from_list(source, columns):
    rows = ((f"<list>, row {i}", row) for i, row in enumerate(source))
    rows = list(_checked(rows, columns))
    if not rows: raise ValueError("<list>: no rows")
    return Dataset.from_list(rows, features=_features(rows[0]))

def load_pairs(
    source,              # file (see _READERS; also .gz), folder, hub id, list of rows, Dataset or DatasetDict
    split: str="train",  # of a hub id, folder or DatasetDict; a single file has none
    revision: str=None,  # hub ids: a commit, so that the data cannot change under you
    columns: dict=None,  # renames, e.g. {"question": "prompt"}; where a source has both, its "question" wins
) -> Dataset:            # raw rows, memory-mapped: prompt, chosen, rejected, system, messages
    "Preference rows, checked. Raises ValueError naming file, row and field, and FileNotFoundError."
    columns = columns or {}
    kind = f"<{type(source).__name__}>"
    if isinstance(source, (Dataset, DatasetDict)): return _from_dataset(source, split, columns, kind)
    if isinstance(source, (list, tuple)): return _from_list(source, columns)
    if not isinstance(source, (str, Path)):
        raise ValueError(f"{kind}: expected a file, a folder, a hub id, a list of rows or a Dataset; "
                         "Dataset.from_list(list(...)) makes one of most things")
    if not str(source).strip(): raise ValueError("'' names no file, folder or hub id")
    path = Path(source).expanduser()
    if path.is_file(): return _read_file(path, columns)
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return _from_dataset(_from_disk(path), split, columns, str(path))
    if path.is_dir(): return _read_folder(path, split, columns)
    return _from_dataset(_from_hub(str(source), split, revision), split, columns, str(source))


# %% [markdown]
# The layout of a popular hub set: a system message, and `question` where the others say `prompt`. Read from a file,
# from memory and from a saved data set, the rows are the same.

# %%
orca = [
    dict(system="be brief", question="sort gace", chosen="aceg", rejected="geca"),
    dict(system="", question="copy ab", chosen="ab", rejected="ba"),
]
as_lines = "".join(json.dumps(row) + "\n" for row in orca)
data = load_pairs(write("orca.jsonl", as_lines), columns=question)
data.save_to_disk(str(folder / "orca"))
assert data.to_list() == load_pairs(orca, columns=question).to_list()
assert data.to_list() == load_pairs(folder / "orca").to_list()
pd.DataFrame([on_a_line(normalise(row)) for row in data])


# %% [markdown]
# The second row has an empty system message. It is a conversation like its neighbour, only without a system turn.
#
# ## Part three: many pairs, tokenised once
#
# A file has thousands of pairs. Which of them are used, and how do we know that the others are not missed? Three calls
# are what you need of this part. `load_pairs(file)` reads the rows (part two), `tokenize_pairs(rows, tokenizer)` gives
# every row to `encode` of part one, and `hold_out(source, share)` keeps some pairs apart. How the second one keeps its
# ids in a file is engineering; you may go on with "What was dropped".
#
# What later chapters get is a `Source`: the usable pairs of one data set as ids, and the counts of all others. Its rows
# are lists of their own length. They become equally long only in a batch, where *padding* is added: tokens that mean
# nothing. Padding is known by its place and never by its id, which for many models is the id of EOS.

# %%
#| export
@dataclass
class Source:
    "A named preference dataset, tokenised."
    name: str      # what the partition and the report call it
    pairs: Dataset # a usable pair a row: row (its place in the data), key, asked, prompt_ids, chosen_ids,
                   # rejected_ids, truncated; memory-mapped
    counts: dict   # rows read, dropped by reason, truncated, ...

    def __len__(self): return len(self.pairs)

    def dropped(self) -> dict:
        "Reason -> rows, for the reasons that occurred."
        return {why: self.counts[why] for why in DROPPED if self.counts[why]}

    def asked(self) -> list[str]:
        "A name for the prompt of each pair, made of `prompt_ids` where a pair has none."
        known = self.pairs["asked"] if "asked" in self.pairs.column_names else [None] * len(self)
        return [name or _hash(self.pairs[i]["prompt_ids"]) for i, name in enumerate(known)]

def counts_table(
    sources, # several `Source`s
) -> pd.DataFrame: # one row a source
    "What was read, dropped and cut, one source a row."
    names = pd.Index([s.name for s in sources], name="source")
    return pd.DataFrame([s.counts for s in sources], index=names)


# %%
counts = dict(rows=3, usable=1, empty=2, equal=0, no_prompt=0, no_room=0)
by_hand = Source("by hand", Dataset.from_list([encode(link, tok)]), counts)
print(len(by_hand), by_hand.dropped())
counts_table([by_hand])


# %% [markdown]
# ### How it is done (engineering, you may skip it)
#
# #### Kept under a name
#
# When may ids that were made yesterday be used again? Tokenising takes time, so the ids are made once and kept in a
# file. Its name is a hash of all that decides them: the content of the rows, the tokenizer, the template, the lengths.
# When one of these is another, the name is another, no file is found under it, and the ids are made anew. A tokenizer written in Python may add tokens by itself,
# which is written in no file; so it is asked about one short text. Padding and truncation are left out of the name: a
# tokenizer remembers them from whatever it was last asked.

# %%
#| export
def _backend(tokenizer):
    "What decides the ids that a tokenizer gives, apart from its template."
    if not tokenizer.is_fast:
        return [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer(" a B").input_ids]
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: part for name, part in parts.items() if name not in ("padding", "truncation")}

def _digest(data, tokenizer, *settings) -> str:
    "sha256 over everything that decides the ids, 24 hex digits."
    h = hashlib.sha256()
    for table in data.with_format("arrow").iter(1000):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer: writer.write_table(table.combine_chunks())
        h.update(sink.getvalue())
    template, special = tokenizer.chat_template, tokenizer.special_tokens_map
    decides = [_VERSION, _backend(tokenizer), template, special, *settings]
    h.update(json.dumps(decides, sort_keys=True, default=str).encode())
    return h.hexdigest()[:24]


# %%
one_row = load_pairs([strings])
name = _digest(one_row, tok, 1024)
padding = toy_tokenizer(LINES)
padding.backend_tokenizer.enable_padding(length=9)          # somebody else asked for it: not in the name
same = {
    "padding": _digest(one_row, padding, 1024) == name,
    "other length": _digest(one_row, tok, 512) == name,
}
assert list(same.values()) == [True, False]
same

# %% [markdown]
# Dropped rows stay in the table that is kept, with their reason. So the counts cost as little the second time as the
# pairs. A source of which nothing is left is an error: training on it would do nothing, and say nothing.

# %%
#| export
_FLAGS = ("chat", "truncated", "prompt_truncated", "boundary_moved", "prompt_repeated")

def _counts(kept):
    "What was read, dropped and cut: counts of a table of all rows."
    usable = kept[kept["drop"] == ""]
    counts = {"rows": len(kept), "usable": len(usable)}
    for why in DROPPED: counts[why] = (kept["drop"] == why).sum()
    for flag in _FLAGS: counts[flag] = usable[flag].sum()
    if not counts["prompt_repeated"]: del counts["prompt_repeated"] # no line in every report for what is rare
    counts["duplicates"] = usable["key"].duplicated().sum()
    counts["both_labels"] = usable["swapped"].isin(usable["key"]).sum()
    return {name: int(count) for name, count in counts.items()}

def _usable(name, out):
    "A `Source` of the pairs that carry signal, with the counts of all. Raises ValueError if there are none."
    kept = out.select_columns(["key", "swapped", "drop", *_FLAGS]).to_pandas()
    is_usable = kept["drop"] == ""
    if not is_usable.any():
        dropped = kept["drop"].value_counts().to_dict()
        raise ValueError(f"source '{name}': no usable pair among {len(kept)} rows, dropped {dropped}")
    pairs = out.select_columns(["row", "key", "asked", "prompt_ids", "chosen_ids", "rejected_ids", "truncated"])
    if not is_usable.all(): pairs = pairs.select(is_usable.to_numpy().nonzero()[0])
    return Source(name, pairs, _counts(kept))


# %%
empty, equal = link | dict(chosen=""), link | dict(rejected=link["chosen"])
nothing = Dataset.from_list([encode(pair, tok) for pair in (empty, equal)])
complaint(_usable, "hopeless", nothing)


# %% [markdown]
# #### Text or chat?
#
# Whether strings are plain text or the turns of a chat is asked once for a source, and not for every row. One row with
# a system message or with earlier turns says that all of them are turns. Otherwise half of a file would go through the
# template and half of it would not.

# %%
#| export
def _first_turns(data) -> int|None:
    "The first row that has a system message or earlier turns."
    columns = [c for c in ("system", "messages") if c in data.column_names]
    if not columns: return None
    blocks = data.select_columns(columns).with_format("arrow").iter(1000)
    for n, table in enumerate(blocks):
        places = [pc.index(pc.is_valid(column), True).as_py() for column in table.columns]
        found = [i for i in places if i >= 0]              # -1 where a column has nothing
        if found: return 1000 * n + min(found)


# %%
late = [strings, strings, strings | dict(system="be brief")]
_first_turns(load_pairs(late)), _first_turns(load_pairs(late[:2]))


# %% [markdown]
# What the rows of a source share while they are encoded, from its name for the messages to the end of a turn, is kept
# together. A message says in which row something is wrong and, if another row made a chat of this one, which.

# %%
#| export
@dataclass
class _Encoder:
    "How the rows of one source become ids."
    name: str              # of the source
    tokenizer: object      # a transformers tokenizer
    max_length: int        # longest prompt + response, in tokens
    max_prompt_length: int # longest prompt, in tokens
    chat: bool             # are strings turns of a chat?
    because: int|None      # the row that says so, where the data do
    end: tuple|None        # `turn_end(tokenizer)`, where there are turns

    def pair(self, row, where):
        try: return normalise(dict(row), where, self.chat)
        except ValueError as e:
            if self.because is None: raise
            raise ValueError(f"{e} (row {self.because} has a system message or earlier turns, "
                             "so every row of this source is a conversation)") from e

    def ids(self, row, i):
        where = f"source '{self.name}', row {i}"
        pair = self.pair(row, where)
        try: found = encode(pair, self.tokenizer, self.max_length, self.max_prompt_length, self.end)
        except (ValueError, jinja2.TemplateError) as e: raise ValueError(f"{where}: {e}") from e
        return dict(row=i) | found

def _encoder(data, name, tokenizer, max_length, max_prompt_length, chat):
    "The encoder of a source. Raises ValueError for a template that cannot be rendered."
    conversational = isinstance(data[0]["chosen"], list)
    turns = _first_turns(data)
    chat = chat or turns is not None or conversational
    try: end = turn_end(tokenizer) if chat and tokenizer.chat_template else None
    except ValueError as e: raise ValueError(f"source '{name}': {e}") from e
    because = None if conversational else turns
    return _Encoder(name, tokenizer, max_length, max_prompt_length, chat, because, end)


# %%
no_prompt = dict(chosen="see x", rejected="see y", prompt=None, system=None)
mixed = Dataset.from_list([no_prompt, strings | dict(system="be brief")])
encoder = _encoder(mixed, "mixed", chatter, 64, 32, chat=False)
print(encoder.end, encoder.because)
print(textwrap.fill(complaint(encoder.ids, mixed[0], 0), 100))

# %% [markdown]
# #### All rows of a source
#
# Tokenising is a `map` of `datasets`. It may be stopped at any time, because the result is written to a temporary file
# and then renamed.

# %%
#| export
_TEXT, _IDS = datasets.Value("string"), datasets.List(datasets.Value("int32"))
_FEATURES = datasets.Features(
    dict(row=datasets.Value("int64"), key=_TEXT, swapped=_TEXT, asked=_TEXT)
    | dict.fromkeys(["prompt_ids", "chosen_ids", "rejected_ids"], _IDS)
    | dict(drop=_TEXT)
    | dict.fromkeys(_FLAGS, datasets.Value("bool"))
)

def _processes(rows): return min(os.cpu_count() or 1, rows // 10_000) or None

def tokenize_pairs(
    data,                 # what `load_pairs` returns
    tokenizer,            # a transformers tokenizer
    name: str="pairs",    # of the source
    max_length: int=1024, # longest prompt + response, in tokens; the response's tail is cut
    max_prompt_length: int=None, # longest prompt, in tokens, its end is kept; None or 0: half of max_length
    chat: bool=False,     # read string fields as turns of a chat, also where nothing in the data says so
    num_proc: int=None,   # processes; None: one for every 10,000 rows, at most one a core
) -> Source:              # usable pairs, with counts of the others
    "Tokenise once. Raises ValueError for a row that breaks the schema or a source without a usable pair."
    if not len(data): raise ValueError(f"source '{name}': no rows")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token; set tokenizer.eos_token")
    max_prompt_length = prompt_limit(max_length, max_prompt_length)
    encoder = _encoder(data, name, tokenizer, max_length, max_prompt_length, chat)

    digest = _digest(data, tokenizer, max_length, max_prompt_length, chat)
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "sdpo_nb"
    cache.mkdir(parents=True, exist_ok=True)
    with _no_bar(hide=len(data) < 1000): # they take a second or two
        out = data.map(
            encoder.ids,
            with_indices=True,
            remove_columns=data.column_names,
            features=_FEATURES,
            num_proc=num_proc or _processes(len(data)),
            desc=f"tokenising {name}",
            cache_file_name=str(cache / f"{digest}.arrow"),
            load_from_cache_file=True,
            new_fingerprint=digest,
        )
    return _usable(name, out)


# %% [markdown]
# *Once* is a promise. The tokenizer below counts how often its template is rendered.

# %%
def renders(rows, **kw):
    "How many conversations are rendered while these rows are tokenised."
    t = AutoTokenizer.from_pretrained(world.base)
    t.apply_chat_template = Mock(wraps=t.apply_chat_template)   # counts its calls
    tokenize_pairs(load_pairs(rows), t, **kw)
    return t.apply_chat_template.call_count

few = load_pairs(world.sources["riddle"]).to_list()[:10]
edited = few[:9] + [dict(few[9], chosen=[assistant("abc")])]
renderings = pd.Series({
    "first call": renders(few),
    "the same again": renders(few),
    "other name": renders(few, name="again"),
    "shorter": renders(few, max_length=20),
    "one row edited": renders(edited),
}, name="renderings")
assert renderings.tolist() == [32, 2, 2, 32, 32]
renderings.to_frame()

# %% [markdown]
# Thirty renderings are three for each of ten rows. The other two find the turn's end, and are always needed.
#
# ### What was dropped
#
# How many pairs of a source can be trained on, and what became of the others? Every `Source` has these counts:
#
# | count | what it says |
# |---|---|
# | `rows` | read; always `usable + empty + equal + no_prompt + no_room` |
# | `empty` | a response has no text |
# | `equal` | both responses have the same ids |
# | `no_prompt` | no token stands before the responses |
# | `no_room` | what is left of the responses after the cut is the same |
# | `chat` | usable pairs rendered by the chat template: all or none |
# | `truncated`, `prompt_truncated` | usable pairs that lost a response's tail, or the prompt's beginning |
# | `boundary_moved` | usable pairs with $n$ of (1) shorter than the prompt |
# | `prompt_repeated` | usable pairs in which both responses begin with the prompt; only where there are some |
# | `duplicates`, `both_labels` | usable pairs that occurred before, and pairs that occur with the opposite label, too |
#
# The last two are counted and kept. A pair that somebody judged twice counts twice. Two people may judge it in two ways,
# and this is no mistake: the model of preferences behind DPO ([chapter 03](03_loss.ipynb)) gives each response a
# chance to win. But a source of which half is in `both_labels` says nearly nothing, and you want to know it.
#
# We count the world's three sources, and one made of trouble. It has nine rows; how many of them will be usable?

# %%
sources = [tokenize_pairs(load_pairs(file), base, name) for name, file in world.sources.items()]

answers = [("ab", "ba"), ("ba", "ab"), ("ab", "ba")]                # a pair, opposite label, the pair again
answers += [("ab", "ab"), ("", "ba"), ("<|end|>", "ba")]
answers += [("abcdefghij", "ba"), ("abcdefghija", "abcdefghijb")]   # too long
trouble = [dict(prompt="copy ab", chosen=chosen, rejected=rejected) for chosen, rejected in answers]
trouble.append(dict(prompt="", chosen="ab", rejected="ba"))
troubled = tokenize_pairs(load_pairs(trouble), base, "trouble", max_length=16, max_prompt_length=8)

# %%
expected = dict(
    rows=9, usable=4,
    empty=2, equal=1, no_prompt=1, no_room=1,
    chat=0, truncated=1, prompt_truncated=0, boundary_moved=0,
    duplicates=1, both_labels=3,
)
counts = counts_table([*sources, troubled])
assert (counts["rows"] == counts[["usable", *DROPPED]].sum(axis=1)).all()
assert counts.loc["trouble"].to_dict() == expected
counts.T


# %% [markdown]
# Even the world has an `empty` row: once, its base model S ended an answer before it began. In `trouble` there are two,
# one of them with nothing but an end token.
#
# What is kept is small. These are the first pairs of `primer` as text, what is read and what is scored. It is all that
# the next chapters will see of a preference. The first one is the pair with which this chapter began:

# %%
#| export
def decoded(
    source: Source,  # tokenised pairs
    tokenizer,       # the one that made the ids
    n: int=3,        # pairs, the first ones
) -> list[dict]:     # prompt, chosen, rejected: what is read and what is scored, with special tokens
    "Some pairs of a source, as text."
    first = source.pairs.select(range(min(n, len(source))))
    return [_spelled(pair, tokenizer) for pair in first]


# %%
firsts = decoded(sources[0], base)
assert firsts[0] == scored | {"prompt": written(first_prompt, add_generation_prompt=True)}
pd.DataFrame(firsts)


# %% [markdown]
# ### Held out
#
# Has training helped? Only pairs that it has not seen can tell. So some pairs are kept apart, *held out*, and never
# trained on. The prompt decides which, and not the pair: two pairs of one prompt have too much in common. The
# prompt's name `asked`, a hash, is read as a number between 0 and 1; below `share` the prompt is held out. So a prompt
# falls on the same side in every source, and rows that are added to a file later move no other row.
#
# This holds for prompts that are written out. Where the prompt is only the common beginning of two texts (part two), it
# ends where the two happen to part. Two pairs of one question may then have two prompts, and nobody can tell.

# %%
#| export
def _lot(name) -> float:
    "A hash as a number from 0 to 1."
    return int(name[:12], 16) / 16**12

def hold_out(
    source: Source,  # tokenised pairs
    share: float,    # of the prompts, from 0 to below 1
) -> tuple[Source, Source|None]: # to train on, and never to train on; None where there are no such pairs
    "Part a source by prompt. Raises ValueError where nothing is left to train on."
    if not 0 <= share < 1:
        raise ValueError(f"source '{source.name}': eval_share must be from 0 to below 1, got {share}")
    if not share: return source, None
    held = np.array([_lot(name) < share for name in source.asked()])
    if held.all():
        raise ValueError(f"source '{source.name}': eval_share = {share} holds out all of its {len(held)} "
                         "pairs; a smaller one leaves some to train on")
    if not held.any(): return source, None
    kept = source.pairs.select((~held).nonzero()[0])
    apart = source.pairs.select(held.nonzero()[0])
    counts = source.counts | dict(held_out=int(held.sum()))
    return Source(source.name, kept, counts), Source(source.name, apart, {})


# %%
train, test = hold_out(sources[0], 0.5)
assert len(train) + len(test) == len(sources[0])
assert not set(train.asked()) & set(test.asked())
{"to train on": len(train), "held out": len(test)}

# %% [markdown]
# Not exactly half and half: the lots are drawn by prompt, and a coin is thrown for each.
#
# Here are three pairs of the prompt `is it http:`, in which the boundary moves (part one). How many prompts does a
# model read, and how many were asked?

# %%
endings = [("//a.org", " or not?"), (" or not?", "//b.org"), ("42", " or not?")]
thrice = [dict(prompt=link["prompt"], chosen=chosen, rejected=rejected) for chosen, rejected in endings]
one_prompt = tokenize_pairs(load_pairs(thrice), tok, "one prompt")
assert len(set(one_prompt.asked())) == 1
[tok.decode(ids) for ids in one_prompt.pairs["prompt_ids"]]

# %% [markdown]
# Two are read, and one was asked. With the ids that are read, this prompt might have been on both sides.
#
# ### The same ids as TRL, but for seven things
#
# `tests/test_preferences.py` compares these ids with those of TRL 1.16, a library that many people train with, on text
# and on conversations. They are equal, except on purpose:
#
# - What a template writes after the end token, such as ChatML's line feed, is scored there and not here.
# - A chat whose template has no end token gets an EOS here and none there.
# - Where the tokenizer appends EOS by itself, or an answer in a chat has its end token already, there are two there and
#   one here.
# - A template that asks for the date gets today's there, and a fixed one here.
# - A prompt that is too long loses its beginning here. There the response alone pays, and the pair goes if the prompt
#   fills `max_length`. Pairs whose responses part behind the cut go here.
# - Empty, equal and promptless pairs are dropped and counted here; there they are trained on.
# - `system` and `messages` columns are read here; there they are ignored.

# %% [markdown]
# ## What you now have
#
# - A rule for what is scored: the tokens of a response after the longest prefix that the prompt and both rows share, up
#   to and with the end token.
# - `encode`: ids of one pair, what was cut, and why it may be useless.
# - `load_pairs`: rows in any common spelling, from any common place, or an error that names file, row and field.
# - `tokenize_pairs`: a `Source` of ids, in which both responses follow the same prompt and end where a model is asked
#   to end.
# - `counts_table`: what was dropped, cut or moved, for every source, so that nothing is lost in silence.
# - `hold_out`: pairs to train on, and pairs to ask later.
#
# ## Questions to test yourself
#
# 1. Why may the boundary move to the left of the prompt's end, and why must it be the same for both sides?
#
# <details><summary>Answer</summary>
#
# Characters of the prompt's end and of the response's beginning may share one token. That token belongs to neither
# alone, so the boundary goes left until all three rows agree. DPO compares two responses *after the same prompt*. If
# the prompts of the two sides differed by a token, a part of the difference would come from the prompt.
#
# </details>
#
# 2. What would be scored if ChatML's line feed were kept? Does it change which response is preferred?
#
# <details><summary>Answer</summary>
#
# One more token on each side: how likely a line feed is after the end token. A model of this kind is nearly sure of it
# after any response, so it adds about the same number to both log-probabilities, and hardly changes which is larger.
# But training would spend gradient on a token that is never generated.
#
# </details>
#
# 3. A row whose responses differ only after token 1024 is dropped. Which other remedy is there, and what does it cost?
#
# <details><summary>Answer</summary>
#
# A larger `max_length`. It costs memory, and time, for every long row, since longer rows are kept whole. Cutting what
# the two responses share would be cheaper, but then the model would score an answer whose beginning it has not read.
#
# </details>
#
# 4. Why does the prompt decide what is held out, and not the pair?
#
# <details><summary>Answer</summary>
#
# Many sources have several pairs of one prompt. If some of them are trained on, the others are no longer new: the model
# has seen the question, and often one of the answers.
#
# </details>
#
# ## Try this
#
# - Give `toy_tokenizer` more merges (`size=80`). Before you encode `link` again: does the boundary move further?
#
# <details><summary>What you should see</summary>
#
# Yes, as far as it can. With so many merges all of `is it http://a.org` becomes one token. The three rows have no first
# token in common, the boundary is 0, and nothing is left of the prompt: `encode` says `no_prompt`. (At `size=62` the
# boundary is 4.) Trained tokenizers do not go so far, because they never merge across a word.
#
# </details>
#
# - Tokenise `riddle` with `max_length=12`. Which counts move?
#
# <details><summary>What you should see</summary>
#
# `prompt_truncated` becomes 507: six tokens are left for a prompt, and every prompt loses its beginning, here the name
# of the skill. `truncated` becomes 162. No pair is dropped, so nothing fails, and yet the model could no longer know
# what was asked. (At `max_length=10` six pairs have `no_room`, too.) Look at these counts before you train.
#
# </details>
#
# - Write a file in which one line has `"chosen": 4`, and load it. Then give the same rows to `load_pairs` as a list.
#   Which part of the message changes?
#
# <details><summary>What you should see</summary>
#
# From a file the message begins with its path, the row and the line; from a list with `<list>` and the row. What is
# expected and what was found are the same.
#
# </details>
