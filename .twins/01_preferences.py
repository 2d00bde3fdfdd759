# %% [markdown]
# # What a preference is
# > From rows in any of the usual formats to token ids: one prompt, two responses, and the exact place where they part.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/01_preferences.ipynb)
#
# **You should know** what a tokenizer and a chat template do. **Time** under a minute on two CPU cores.
#
# A preference is a sentence with three parts: *for this prompt, this response is better than that one*.
# Everything later is arithmetic on the log-probabilities of those two responses, so this chapter
# decides which tokens are counted. Most of what goes wrong in preference training goes wrong here, silently:
# an end token counted twice or never, a prompt asked twice, a file read in another spelling than it was written in.
#
# The way is short: a *row* of a file becomes a *pair* of texts, the pair becomes three lists of token ids, and many pairs become a
# `Source`. Each arrow is one function whose result you can print.

# %%
#| default_exp preferences

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
#| export
import glob, gzip, hashlib, json, os, re
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
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_dataset_builder, load_from_disk
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

# %%
import tempfile
import matplotlib.pyplot as plt
import seaborn as sns
from tokenizers import Tokenizer, decoders, models, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from sdpo_nb.world import load_world
pd.set_option("display.width", 160, "display.max_columns", 20);


# %% [markdown]
# ## One pair, many spellings
#
# A field holds a string, or a list of messages, or nothing. Which of these each field may hold is the whole schema.
# `[]` is its own case: no earlier `messages` is fine, a prompt without a message is not. The words are those a reader of an error
# message will see.

# %%
#| export
def _shape(x) -> str:
    "What a field holds, in the words of the error messages."
    if x is None: return "nothing"
    if isinstance(x, str): return "a string"
    if not isinstance(x, (list, tuple)): return "something else"
    if not x: return "no messages"
    ok = all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in x)
    return "messages" if ok else "something else"

def _short(x): return f"{type(x).__name__} {x if len(str(x)) <= 60 else str(x)[:60] + '...'!r}"

_SCHEMA = dict(prompt=("a string", "messages", "nothing"), chosen=("a string", "messages"), rejected=("a string", "messages"),
               system=("a string", "nothing"), messages=("messages", "no messages", "nothing"))


# %% [markdown]
# A prompt may be left out, but nothing tells a prompt that is left out from one that stands in a column of another name. So two strings go without only
# where no column has one of the usual names, and never as turns of a chat, since a user who says only what the two answers share asks nothing.

# %%
#| export
def _is_chat(row, chat): return chat or row.get("system") is not None or row.get("messages") is not None

def _check_prompt(row, where, chat):
    "Raise ValueError where two strings lack a prompt and their common beginning cannot be meant."
    if row.get("prompt") is not None or row.get("messages") or not isinstance(row["chosen"], str): return
    other = next((c for c in ("question", "instruction", "query", "input") if c in row), None)
    if other or _is_chat(row, chat):
        raise ValueError(f"{where}, field 'prompt': expected a string or messages, got nothing; the row has "
                         f"{sorted(c for c in row if row[c] is not None)}, and columns={{'{other or 'your name'}': 'prompt'}} renames")


# %% [markdown]
# Scores, ids and dates may stand beside a preference; nobody reads them. But some fields are meant for the model: tools, images, a chain of thought. A pair without them
# is another pair, so they are refused rather than left out. Text can be broken, too: half of a surrogate, or a conversation that a CSV file has turned into one string.

# %%
#| export
_FOR_THE_MODEL = dict(
    row="tools functions images image videos video audios audio chat_template_kwargs".split(),
    message="tool_calls tool_call_id function_call reasoning_content reasoning thinking images".split())

def _said(row):
    "(field, value) of everything in a row that a model would read."
    for field in _SCHEMA:
        value = row.get(field)
        if isinstance(value, str): yield field, value
        elif isinstance(value, (list, tuple)): yield from ((f"{field}[{i}].content", m["content"]) for i, m in enumerate(value))

def _check_lost(row, where):
    "Raise ValueError for what a model was meant to read and would not."
    found = {field: row.get(field) for field in _FOR_THE_MODEL["row"]}
    for field in _SCHEMA:
        if not isinstance(row.get(field), (list, tuple)): continue
        found |= {f"{field}[{i}].{key}": m.get(key) for i, m in enumerate(row[field]) for key in _FOR_THE_MODEL["message"]}
    for field, value in found.items():
        if value: raise ValueError(f"{where}, field '{field}': is meant for the model and cannot be rendered here; write it into the text, or remove it; got {_short(value)}")
    extra, prompt = row.get("input"), row.get("prompt")
    if isinstance(extra, str) and isinstance(prompt, str) and extra.strip() not in prompt:
        raise ValueError(f"{where}, field 'input': is not part of 'prompt' and would be lost; write the two into one column")

def _check_text(row, where):
    "Raise ValueError for text that is none."
    for field, text in _said(row):
        try: text.encode()
        except UnicodeEncodeError as e: raise ValueError(f"{where}, field '{field}': half a character, {text[e.start]!r}, at position {e.start}") from None
    answers = [row["chosen"], row["rejected"]]
    if all(isinstance(x, str) and x.lstrip().startswith("[{") and "role" in x[:20] for x in answers):
        raise ValueError(f"{where}, field 'chosen': messages, written as text; keep conversations in JSONL or Parquet")


# %% [markdown]
# A row that does not fit is an error, never a skipped row: skipping would hide that a column was misnamed or a file half written.
# The message says where, what, and what would be right.

# %%
#| export
def _check(row: dict,  # one raw row
           where: str, # file and row, for the message
           chat: bool=False, # are strings turns of a chat?
          ):
    "Raise ValueError, naming file, row and field, unless every field holds what it may."
    if not isinstance(row, dict): raise ValueError(f"{where}: expected an object with fields, got {_short(row)}")
    for field, allowed in _SCHEMA.items():
        value = row.get(field)
        if _shape(value) in allowed: continue
        got = _short(value) if value is not None else f"nothing; the row has {sorted(row)}, and columns={{'your name': '{field}'}} renames"
        raise ValueError(f"{where}, field '{field}': expected {' or '.join(allowed)}, got {got}"
                         + " (messages are a list of {'role': string, 'content': string})" * isinstance(value, (list, dict)))
    if _shape(row["chosen"]) != _shape(row["rejected"]):
        raise ValueError(f"{where}, field 'rejected': expected {_shape(row['chosen'])} as in 'chosen', got {_short(row['rejected'])}")
    _check_lost(row, where)
    _check_text(row, where)
    _check_prompt(row, where, chat)


# %% [markdown]
# Seven wrong rows and what is said about them. A number is not turned into its digits: whoever wrote `4` in one row and `"4"` in
# another may have meant a score.

# %%
def complaint(f, *args, **kw):
    try: f(*args, **kw)
    except ValueError as e: return str(e)
    raise AssertionError("nothing was wrong")

bad = [dict(prompt="sort gace", chosen="aceg"), dict(prompt="add 1 2", chosen="3", rejected=4), dict(question="add 2 2", chosen="4", rejected="5"),
       dict(prompt=[], chosen="a", rejected="b"), dict(chosen=[{"role": "assistant", "content": None}], rejected="b"),
       dict(prompt="what is this?", chosen="a cat", rejected="a dog", images=["cat.png"]), dict(prompt="translate", input="hello", chosen="bonjour", rejected="salut")]
pd.DataFrame({"the message": [complaint(_check, row, f"pairs.jsonl, row {i}") for i, row in enumerate(bad)]}).style.hide().set_uuid("bad")


# %% [markdown]
# Where the prompt is not written out, it is what the two sides share at their beginning. As in TRL, text is cut wherever the sides differ, even inside
# a word. The same function will find where two rows of token ids part.

# %%
#| export
def _shared(a, b) -> int:
    "Length of the longest common prefix of two sequences."
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]: n += 1
    return n

def _split(chosen, rejected): # two strings or two lists of messages
    "Implicit prompt: the common beginning, which leaves each side at least one element."
    n = max(0, min(_shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1))
    if n and chosen[n-1] == " ": n -= 1 # a blank belongs to the word after it
    return chosen[:n], chosen[n:], rejected[n:]


# %%
prompt, chosen, rejected = _split("Q: 2+3? A: it is 5", "Q: 2+3? A: it is 6")
assert _split("yes", "yes, sir") == ("ye", "s", "s, sir") # neither side is left empty
prompt, chosen, rejected


# %% [markdown]
# Hub sets often pair a string `prompt` with whole conversations in `chosen` and `rejected`. The prompt is then inside them already,
# and must not be asked twice; but a prompt that is *not* inside them must not be lost.

# %%
#| export
def _messages(x): return [{"role": m["role"], "content": m["content"]} for m in x]

def _split_turns(prompt, chosen, rejected, where):
    "A list prompt stands before the two sides; a string prompt, or none, is inside them if they share turns."
    if isinstance(prompt, (list, tuple)): return _messages(prompt), chosen, rejected
    head, chosen, rejected = _split(chosen, rejected)
    if isinstance(prompt, str):
        asked = [m["content"].strip() for m in head if m["role"] == "user"]
        if not asked: head = head + [{"role": "user", "content": prompt}]
        elif not (all(a in prompt for a in asked) or any(prompt.strip() in a for a in asked)):
            raise ValueError(f"{where}, field 'prompt': expected what the user says in the turns both sides share, or nothing, got {_short(prompt)}")
    return head, chosen, rejected


# %% [markdown]
# `messages` comes in three readings: the turns *before* the prompt; the conversation up to the answer, of which `prompt` is a flat copy
# (Anthropic's HH); or the conversation *with* the chosen answer (UltraFeedback). Its end tells them apart. After a user's turn no second user's turn can follow, and the question of this row cannot have been
# answered before it was asked.

# %%
#| export
def _without_answer(before, turns, sides, where):
    "Earlier turns; a whole conversation loses the answer, which is one of the row's own."
    if len(before) < 2 or not turns or before[-1]["role"] != "assistant": return before
    if before[-2]["content"].strip() != turns[-1]["content"].strip(): return before
    if before[-1]["content"] not in [s["content"] for s in sides]:
        raise ValueError(f"{where}, field 'messages': holds the prompt, and an answer that is neither 'chosen' nor 'rejected'; leave the two out of it")
    return before[:-1]

def _context(row, turns, sides, where):
    "System message, earlier turns, then the prompt's own."
    before = _without_answer(_messages(row.get("messages") or []), turns, sides, where)
    if before and before[-1]["role"] == "user":
        if turns and before[-1]["content"].strip() not in turns[-1]["content"]:
            raise ValueError(f"{where}, field 'messages': ends with a user turn that 'prompt' does not repeat; end it with the assistant turn before the prompt")
        turns = []
    elif not turns: raise ValueError(f"{where}, field 'prompt': expected a string or messages, got nothing, and the two sides share no turn")
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return system + [m for m in before + turns if m not in system]


# %% [markdown]
# Plain strings stay plain text, as in TRL, unless something says they are turns: a `system` or `messages` column, or `chat=True`.
# Either way two shapes are left, three strings or a conversation with two closing turns.

# %%
#| export
def normalise(row: dict,         # a raw row: prompt (may be missing), chosen, rejected; optional system, messages
              where: str="row",  # file and row number, for error messages
              chat: bool=False,  # read string fields as turns of a chat
             ) -> dict:          # {"chat": bool, "prompt", "chosen", "rejected"}: three strings, or messages and two closing messages
    "One preference, whatever its spelling. Raises ValueError naming file, row and field."
    _check(row, where, chat)
    prompt, sides, chat = row.get("prompt"), [row["chosen"], row["rejected"]], _is_chat(row, chat)
    if isinstance(sides[0], str):
        if prompt is None and not chat: prompt, *sides = _split(*sides)
        if isinstance(prompt, str) and not chat: return dict(chat=False, prompt=prompt, chosen=sides[0], rejected=sides[1])
        sides = [[{"role": "assistant", "content": s}] for s in sides]
    turns, *sides = _split_turns(prompt, *map(_messages, sides), where)
    for field, side in zip(("chosen", "rejected"), sides):
        if [m["role"] for m in side] != ["assistant"]:
            raise ValueError(f"{where}, field '{field}': expected one assistant turn after the prompt, got roles {[m['role'] for m in side]}")
    return dict(chat=True, prompt=_context(row, turns, [sides[0][0], sides[1][0]], where), chosen=sides[0][0], rejected=sides[1][0])


# %% [markdown]
# Eight spellings of one pair. The first stays text; the other seven must come out as the same conversation, apart from the turns
# that only some of them carry.

# %%
def user(x): return {"role": "user", "content": x}
def assistant(x): return {"role": "assistant", "content": x}

ask, good, bad = "sort gace", "aceg", "geca"
spellings = {
    "text":              dict(prompt=ask, chosen=good, rejected=bad),
    "conversational":    dict(prompt=[user(ask)], chosen=[assistant(good)], rejected=[assistant(bad)]),
    "implicit prompt":   dict(chosen=[user(ask), assistant(good)], rejected=[user(ask), assistant(bad)]),
    "string + conversations": dict(prompt=ask, chosen=[user(ask), assistant(good)], rejected=[user(ask), assistant(bad)]),
    "system":            dict(prompt=ask, chosen=good, rejected=bad, system="be brief"),
    "messages before":   dict(prompt=ask, chosen=good, rejected=bad, messages=[user("hi"), assistant("hello")]),
    "messages, to the answer": dict(prompt=f"Human: {ask} Assistant:", chosen=good, rejected=bad, messages=[user(ask)]),
    "messages, whole":   dict(prompt=ask, chosen=[user(ask), assistant(good)], rejected=[user(ask), assistant(bad)], messages=[user(ask), assistant(good)]),
}


# %%
def flat(x): return x if isinstance(x, str) else " / ".join(f"{m['role']}: {m['content']}" for m in (x if isinstance(x, list) else [x]))

pairs = {name: normalise(row) for name, row in spellings.items()}
for p in list(pairs.values())[1:]:
    assert p["chat"] and p["prompt"][-1] == user(ask) and (p["chosen"], p["rejected"]) == (assistant(good), assistant(bad))
pd.DataFrame({name: {k: flat(p[k]) for k in ("prompt", "chosen", "rejected")} for name, p in pairs.items()}).T


# %% [markdown]
# ## Where a turn ends
#
# Now tokens. The toy tokenizer below is BPE trained on three sentences, enough to behave like a real one: frequent neighbours
# merge, and special tokens stand for roles and ends.

# %%
def toy_tokenizer(lines, template=None, size=58, **kw):
    "A BPE tokenizer without pre-tokenisation: anything may merge with its neighbour, as in SentencePiece."
    t = Tokenizer(models.BPE()); t.decoder = decoders.Fuse()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
    t.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False,
                                                     initial_alphabet=list("abcdefghijklmnopqrstuvwxyz .:/?=0123456789\n")))
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>", additional_special_tokens=special[2:], chat_template=template, **kw)

LINES = ["see http://a.org", "the page is http://b.org", "is it http://a.org or http://b.org?"] * 4

# %% [markdown]
# A template closes the assistant's turn with an end token, and some write more after it: ChatML a line feed. In generation
# the model is stopped at the end token and never asked for the rest, so the rest must not be scored.

# %%
#| export
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

def _without_clock(template):
    "A chat template in which every day is the one that Llama 3's own takes where no clock is at hand."
    return _CLOCK.sub(lambda m: m[1] + datetime(2024, 7, 26).strftime(m[2]) + m[1], template)

def _render(tokenizer, messages, **kw):
    "Ids of a conversation. A template that asks for today's date is told another: pairs must not depend on the day."
    if not tokenizer.chat_template: raise ValueError("the tokenizer has no chat template; set tokenizer.chat_template, or give prompt, chosen and rejected as plain strings")
    if "strftime_now" in tokenizer.chat_template: kw["chat_template"] = _without_clock(tokenizer.chat_template)
    try: return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **kw)
    except (ValueError, jinja2.TemplateError): raise
    except Exception as e: raise jinja2.TemplateError(f"{type(e).__name__}: {e}") from e  # a template may do anything that Python can

def _after_answer(tokenizer, later=()):
    "Ids that follow an assistant's turn, whatever it says."
    asked = {"role": "user", "content": "x"}
    def rendered(before, said): return _render(tokenizer, [*before, asked, {"role": "assistant", "content": said}, *later])
    try: a, b = (rendered([], said) for said in ("a", "b b"))
    except jinja2.TemplateError:         # it may insist on a system message
        try: a, b = (rendered([{"role": "system", "content": "x"}], said) for said in ("a", "b b"))
        except jinja2.TemplateError as e: raise ValueError(f"the chat template cannot be rendered ({e})") from e
    if a == b: raise ValueError("the chat template leaves out what a message says: it wants content in parts, not a string")
    return a[len(a) - _shared(a[::-1], b[::-1]):]

def turn_end(tokenizer, # a tokenizer with a chat template
            ) -> tuple[list[int], int]: # (ids that must be appended, number of ids to cut) after a rendered assistant turn
    "How a rendered assistant turn has to be mended so that it ends with the turn's end token, or tokens. Raises ValueError for a template that cannot be rendered."
    tail = _after_answer(tokenizer)
    ends = {i for i, t in tokenizer.added_tokens_decoder.items() if t.content.strip()} | set(tokenizer.all_special_ids)
    ends -= {tokenizer.unk_token_id}
    first = next((i for i, t in enumerate(tail) if t in ends), None)
    if first is None: return [tokenizer.eos_token_id], len(tail)
    n = first + 1
    if n < len(tail) and tail[n] in ends:    # the turn's, if it stands between two turns as well
        between = _after_answer(tokenizer, [{"role": "user", "content": "y"}])
        while n < len(tail) and tail[n] in ends and tail[:n+1] == between[:n+1]: n += 1
    return [], len(tail) - n


# %% [markdown]
# What follows the response is found like an implicit prompt, from the other end: two renderings that differ only in the
# response share the tail. Llama 3 ends turns with a token that is not its EOS; a template without any end token gets EOS. Cohere's ends a turn with two tokens, and both count, since both stand between turns as well.

# %%
chatml = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
templates = {"ChatML": chatml, "Llama-3-like": chatml.replace("<|im_end|>\n", "<|eot_id|>"), "no end token": chatml.replace("<|im_end|>", ""), "two end tokens": chatml.replace("<|im_end|>\n", "<|eot_id|><|im_end|>")}
rows = {}
for name, template in templates.items():
    t = toy_tokenizer(LINES, template)
    add, cut = turn_end(t)
    full = t.apply_chat_template([user("is it?"), assistant("yes")], tokenize=True, return_dict=False)
    rows[name] = dict(template_writes=repr(t.decode(full[-2:])), cut=cut, append=t.decode(add), scored_end=t.decode((full[:len(full) - cut] + add)[-1:]))
assert [r["scored_end"] for r in rows.values()] == ["<|im_end|>", "<|eot_id|>", "</s>", "<|im_end|>"]
pd.DataFrame(rows).T

# %% [markdown]
# ## Where the prompt ends
#
# Tokenise the prompt alone and the response alone, glue them together, and you train on ids the model never meets: here `:`
# followed by `//`, where every text it has read has `://`.

# %%
tok = toy_tokenizer(LINES)
link = dict(chat=False, prompt="is it http:", chosen="//a.org", rejected=" or not?")
glued = tok.tokenize(link["prompt"]) + tok.tokenize(link["chosen"])
joint = tok.tokenize(link["prompt"] + link["chosen"])
assert glued != joint
pd.DataFrame([glued, joint], index=["glued", "tokenised together"]).fillna("")


# %% [markdown]
# So the whole row is tokenised, prompt and response together, once for each side. Plain text gets exactly one EOS, and at most one BOS, whether the
# tokenizer, the data or nobody wrote one.

# %%
#| export
def _text_ids(pair, tokenizer):
    "Ids of the prompt and of both full rows."
    bos = tokenizer.bos_token_id
    def ids(text):
        found = list(tokenizer(text).input_ids)
        twice = bos is not None and found[:2] == [bos, bos]
        return found[twice:]
    def bare(ids): return bare(ids[:-1]) if ids[-1:] == [tokenizer.eos_token_id] else ids
    prompt = ids(pair["prompt"])
    if not pair["prompt"].endswith(tokenizer.eos_token): prompt = bare(prompt) # some tokenizers append EOS to everything
    return prompt, [bare(ids(pair["prompt"] + pair[s])) + [tokenizer.eos_token_id] for s in ("chosen", "rejected")]

def _chat_ids(pair, tokenizer, end):
    add, cut = end or turn_end(tokenizer)
    full = [_render(tokenizer, pair["prompt"] + [pair[s]]) for s in ("chosen", "rejected")]
    return _render(tokenizer, pair["prompt"], add_generation_prompt=True), [f[:len(f) - cut] + add for f in full]


# %% [markdown]
# Four kinds of valid rows teach nothing: a response without text (its EOS alone is no answer), two equal responses, a prompt
# of no token at all, after which nothing predicts the response's first token, and a row too short for the place where the two responses part.

# %%
#| export
DROPPED = "empty", "equal", "no_prompt", "no_room" # reasons

def _why_dropped(pair, tokenizer, prompt, whole, kept) -> str: # empty where the pair is usable
    "The reason for which a valid pair carries no signal, or not after the cut."
    texts = [pair[s]["content"] if pair["chat"] else pair[s] for s in ("chosen", "rejected")]
    if not all(whole) or not all(t.replace(tokenizer.eos_token, "").strip() for t in texts): return "empty"
    if whole[0] == whole[1]: return "equal"
    if not prompt: return "no_prompt"
    return "" if all(kept) and kept[0] != kept[1] else "no_room"


# %% [markdown]
# Write $x$ for the ids of the prompt and $z_w, z_l$ for those of the two full rows. The boundary is the longest prefix all three share,
#
# $$n = \min\big(\mathrm{lcp}(x, z_w),\ \mathrm{lcp}(x, z_l)\big). \tag{1}$$
#
# What merged across the prompt's end counts as response, on both sides: the two are always read after the same prompt. The `key` of a pair is a
# hash of its ids and boundary; reference tables will be kept under it. `swapped` is the key of the same pair with the opposite label.

# %%
#| export
def prompt_limit(max_length: int,  # longest prompt + response, in tokens
                 given: int=None,  # longest prompt, if somebody said so
                ) -> int:          # half of max_length, where nobody did
    "The longest prompt. Raises ValueError where it could fill the row and leave nothing to score."
    if max_length < 2: raise ValueError(f"max_length: must be at least 2, got {max_length}")
    if not given: return max_length // 2
    if not 1 <= given < max_length: raise ValueError(f"max_prompt_length: must be at least 1 and below max_length = {max_length}, got {given}; a longer prompt leaves no room for a response")
    return given

def _key(prompt, first, second): return hashlib.sha256(json.dumps([prompt, first, second]).encode()).hexdigest()[:16]

def encode(pair: dict,             # what `normalise` returns
           tokenizer,              # a transformers tokenizer
           max_length: int=1024,   # longest prompt + response, in tokens
           max_prompt_length: int=None, # longest prompt, its end is kept; None: half of max_length
           end: tuple=None,        # `turn_end(tokenizer)`, asked for where it is not given
          ) -> dict:               # prompt_ids, chosen_ids, rejected_ids and what was done to them
    "Token ids of one pair. The prompt is the longest common prefix of the prompt's ids and both full rows."
    prompt, full = _chat_ids(pair, tokenizer, end) if pair["chat"] else _text_ids(pair, tokenizer)
    n = min(_shared(prompt, f) for f in full) # (1)
    longest = prompt_limit(max_length, max_prompt_length)
    kept = prompt[max(0, n - longest):n]
    whole = [f[n:] for f in full]
    sides = [w[:max_length - len(kept)] for w in whole]
    return dict(key=_key(kept, *sides), swapped=_key(kept, *sides[::-1]), prompt_ids=kept, chosen_ids=sides[0], rejected_ids=sides[1],
                drop=_why_dropped(pair, tokenizer, kept, whole, sides), chat=pair["chat"],
                truncated=len(kept) + max(map(len, whole)) > max_length, prompt_truncated=n > longest, boundary_moved=n < len(prompt))


# %%
e = encode(link, tok)
assert e["boundary_moved"] and not e["drop"] and tok.decode(e["prompt_ids"]) == "is it" # (1): neither less nor more
for side in ("chosen", "rejected"):
    assert tok.decode(e["prompt_ids"] + e[f"{side}_ids"]) == link["prompt"] + link[side] + "</s>"
pd.Series({k: repr(tok.decode(e[f"{k}_ids"])) for k in ("prompt", "chosen", "rejected")}, name="stored as").to_frame()


# %% [markdown]
# No character is lost or written twice: prompt and response together still spell the whole row. The picture shows which tokens went where.

# %%
def draw(ax, y, ids, boundary, colour):
    "The tokens of one row as boxes over their characters; those before the boundary are grey."
    left = 0
    for x, token in enumerate(tok.convert_ids_to_tokens(ids)):
        ax.barh(y, len(token), left=left, height=0.7, color="lightgrey" if x < boundary else colour, edgecolor="white", linewidth=3)
        ax.text(left + len(token) / 2, y, token.replace(" ", "␣"), ha="center", va="center", family="monospace")
        left += len(token)

n, colours = len(e["prompt_ids"]), sns.color_palette("colorblind")
fig, ax = plt.subplots(figsize=(8, 2.2))
draw(ax, "prompt alone", tok(link["prompt"]).input_ids, n, "whitesmoke")
for side, colour in (("chosen", colours[2]), ("rejected", colours[1])): draw(ax, f"with {side}", e["prompt_ids"] + e[f"{side}_ids"], n, colour)
ax.invert_yaxis()
for text, at, ls in (("boundary (1)", len(tok.decode(e["prompt_ids"])), "--"), ("prompt text ends", len(link["prompt"]), ":")):
    ax.axvline(at, color="black", ls=ls); ax.text(at, 1.02, text, ha="center", fontsize="small", transform=ax.get_xaxis_transform())
ax.set(xlabel="position (characters)"); sns.despine(ax=ax, left=True)

# %% [markdown]
# Grey is the shared prompt, colour is scored. The text of the prompt ends at the dotted line, inside a token of the chosen row; so the
# boundary stands at the dashed line, the last place where all three rows agree.

# %% [markdown]
# ## Two cuts
#
# A prompt that is too long loses its beginning: the question stands at its end. In a chat the cut takes BOS and the header of the first turn, so it should be rare.
# A response that is too long loses its tail, and with it the EOS; better no end than an end the text did not have.

# %%
long = dict(chat=False, prompt="see http://a.org ", chosen="is it http://b.org", rejected="is it 42")
cuts = {}
for max_length, max_prompt in ((64, 60), (64, 4), (12, 4), (8, 4), (5, 4)):
    e = encode(long, tok, max_length, max_prompt)
    assert len(e["prompt_ids"]) <= max_prompt and all(len(e["prompt_ids"]) + len(e[s]) <= max_length for s in ("chosen_ids", "rejected_ids"))
    cuts[max_length, max_prompt] = {k: tok.decode(e[f"{k}_ids"]) for k in ("prompt", "chosen", "rejected")} | {k: e[k] for k in ("truncated", "drop")}
assert [c["drop"] for c in cuts.values()] == ["", "", "", "no_room", "no_room"]
asked = dict(prompt=[user("is it?")], chosen=[assistant("yes")], rejected=[assistant("no")])
whole, cut = (tok.decode(encode(normalise(asked), toy_tokenizer(LINES, chatml), max_prompt_length=n)["prompt_ids"]) for n in (64, 15))
assert "no room for a response" in complaint(encode, long, tok, 64, 64)
assert whole.startswith("<|im_start|>user") and whole.endswith(cut) and not cut.startswith("<|im_start|>user")
pd.DataFrame(cuts.values(), index=pd.MultiIndex.from_tuples(cuts, names=["max_length", "max_prompt_length"]))


# %% [markdown]
# A cut can remove the signal: in the last two rows what is left of both sides is the same. Such pairs are
# dropped, and counted by reason. A prompt may never fill the row, so a limit for prompts at or above `max_length` is an error.
#
# ## Anything `datasets` reads
#
# A field must keep one shape through a whole file. Type drift between rows is how two exports get glued together unnoticed, so
# the row at which it happens is an error.
#
# Columns with other names are renamed first. Where only the new name is there, nothing is to be done, so one renaming serves sources that spell it differently.

# %%
#| export
def _rename(names, columns): # old name -> new name, for the columns that stay
    taken = {columns[c] for c in names if c in columns} # a rename wins over a column that has the new name already
    return {c: columns.get(c, c) for c in names if c in columns or c not in taken}

def _check_columns(columns, names, where):
    "Raise ValueError where a rename finds neither its old nor its new name."
    there = {*names, *(columns[c] for c in columns if c in names)}
    if absent := [c for c in columns if c not in names and columns[c] not in there]:
        raise ValueError(f"{where}: columns= names {sorted(absent)}, but the rows have {sorted(names)}")

def _check_one_each(columns, names, where):
    "Raise ValueError where two columns of a row would get one name."
    old = [c for c in columns if c in names]
    for c in old:
        if both := [other for other in old if other != c and columns[other] == columns[c]]:
            raise ValueError(f"{where}: columns= gives both '{c}' and '{both[0]}' the name '{columns[c]}'")


# %% [markdown]
# Rows pass through one generator, so a file of any size is read in constant memory. Only the five fields of a preference go on; scores, ids and
# whatever else a row carries stay behind.

# %%
#| export
def _checked(rows, columns: dict): # rows: (where, row)
    "The rows, renamed, checked and reduced to the fields of a preference."
    shapes, seen = {}, set()
    for where, row in rows:
        if isinstance(row, dict):
            seen |= set(row)
            _check_one_each(columns, row, where)
            row = {new: row[old] for old, new in _rename(row, columns).items()}
        _check(row, where)
        for field in ("prompt", "chosen", "rejected"):
            before, first = shapes.setdefault(field, (_shape(row.get(field)), where))
            if _shape(row.get(field)) != before:
                raise ValueError(f"{where}, field '{field}': expected {before} as in row {first.split(', row ')[-1]}, got {_short(row.get(field))}")
        yield {f: _messages(row[f]) if isinstance(row.get(f), (list, tuple)) else row.get(f) for f in _SCHEMA}
    if seen: _check_columns(columns, seen, where.split(", row")[0])


# %% [markdown]
# JSON is read line by line rather than by Arrow, which would turn a column of answers like `2024-01-01` into timestamps
# and could not say in which line a mistake is. Everything else is streamed by `datasets`.

# %%
#| export
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}

def _suffix(path):
    "Kind of a file, without .gz."
    path = Path(str(path).lower())
    return Path(path.stem if path.suffix == ".gz" else path).suffix


# %% [markdown]
# Rows count from 0, as in `data[0]`, lines from 1, as in an editor, and blank lines are no rows. So both numbers are given.

# %%
#| export
def _once(pairs):
    "An object of JSON. A name that is given twice is an error; json lets the later value win."
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1: raise ValueError(f"'{name}' is given twice")
    return dict(pairs)

def _json_rows(path):
    "One object a line, or, in a .json file, one list of objects."
    def parsed(text, where):
        try: return json.loads(text, object_pairs_hook=_once)
        except (ValueError, RecursionError) as e: raise ValueError(f"{where}: not JSON ({str(e).splitlines()[0]})") from None
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", encoding="utf-8-sig") as f:
        whole = _suffix(path) == ".json" and f.read(1000).lstrip().startswith("[")
        f.seek(0)
        if whole: yield from ((f"{path}, row {i}", row) for i, row in enumerate(parsed(f.read(), path)))
        else:
            for i, (n, line) in enumerate((n, line) for n, line in enumerate(f, 1) if line.strip()):
                where = f"{path}, row {i} (line {n})"
                yield where, parsed(line, where)


# %%
#| export
def _file_rows(path: Path):
    "(where, row) of every row of a file. In a CSV only an empty cell is nothing: None and NA are words."
    kind = _READERS[_suffix(path)]
    if kind == "json": yield from _json_rows(path)
    elif kind == "parquet" and not pq.read_metadata(path).num_rows: return
    else:
        how = dict(keep_default_na=False, na_values=[""]) if kind == "csv" else {}
        rows = load_dataset(kind, data_files=glob.escape(str(path)), split="train", streaming=True, **how)
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows))


# %% [markdown]
# A file becomes an Arrow table on disk once, under the hash of its *content*. An edited file can never be served stale, even
# where its size and date are the old ones; a read that is interrupted leaves nothing under that name.

# %%
#| export
_VERSION = 3 # of what is cached: raise it when the same file or row would give something else

def _generate(path, columns, digest): yield from _checked(_file_rows(Path(path)), columns)

def _features(row):
    text = datasets.Value("string")
    return datasets.Features({f: datasets.List({"role": text, "content": text}) if f == "messages" or isinstance(x, list) else text for f, x in row.items()})

@contextmanager
def _no_bar():
    "Reading a file is not the long work; the bar of tokenising it is enough."
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try: yield
    finally:
        if shown: enable_progress_bars()

def _read_file(path: Path, columns: dict) -> Dataset:
    "The checked rows of one file, memory-mapped."
    if _suffix(path) not in _READERS: raise ValueError(f"{path}: cannot read '{path.suffix}' files; use one of {sorted(_READERS)}; the text formats may end in .gz")
    try:
        first = next(_checked(_file_rows(path), columns), None)
        if first is None: raise ValueError(f"{path}: no rows")
        with open(path, "rb") as f: digest = hashlib.file_digest(f, "sha256").hexdigest()
        with _no_bar(): return Dataset.from_generator(_generate, features=_features(first), gen_kwargs=dict(path=str(path), columns=columns, digest=f"{_VERSION}-{digest}"))
    except Exception as e:
        e = e.__cause__ or e # datasets wraps what the generator raises
        why = (str(e) or repr(e)).splitlines()[0]
        ours = isinstance(e, json.JSONDecodeError) or isinstance(e, OSError) and e.filename and str(e.filename) != str(path) # the file itself has been read by then
        if ours: raise ValueError(f"the cache of datasets, {datasets.config.HF_DATASETS_CACHE}, cannot be used ({why}); delete it, or name another folder in HF_DATASETS_CACHE") from e
        raise ValueError(str(e) if str(e).startswith(str(path)) else f"{path}: {why}") from e


# %% [markdown]
# A folder is read file by file, so that a message can name the file; which file belongs to which split is left to `datasets`.
# It takes files of one kind. What it leaves aside is said.

# %%
#| export
def _pick(splits, split, where):
    if split not in splits: raise ValueError(f"{where}: no split '{split}', only {sorted(splits)}")
    return splits[split]

def _read_folder(path, split, columns):
    try: files = {str(s): fs for s, fs in load_dataset_builder(str(path)).config.data_files.items()}
    except Exception as e: raise ValueError(f"{path}: no files in this folder that datasets can read ({' '.join(str(e).split())[:300]})") from e
    used = {Path(f) for fs in files.values() for f in fs}
    if aside := sorted(str(f.relative_to(path)) for f in path.rglob("*") if _suffix(f) in _READERS and f not in used and not f.name.startswith(".")):
        print(f"{path}: not read, as the folder's data are of another kind: {', '.join(aside)}")
    parts = [_read_file(Path(f), columns) for f in _pick(files, split, path)]
    for f, part in zip(files[split], parts):
        if part.features != parts[0].features: raise ValueError(f"{f}: its fields hold other things than those of {files[split][0]}; load the two as two sources")
    return concatenate_datasets(parts)


# %% [markdown]
# Rows that are a `Dataset` already (from the hub, from `save_to_disk`, from memory) stay where they are; they are renamed and checked.
# Arrow gives a column one type, so the first row shows a misnamed or wrong column; the others are checked for gaps.

# %%
#| export
def _from_dataset(data, split, columns, where):
    if isinstance(data, DatasetDict): data = _pick(data, split, where)
    names = _rename(data.column_names, columns)
    _check_columns(columns, data.column_names, where)
    _check_one_each(columns, data.column_names, where)
    data = data.with_format(None).select_columns(list(names)).rename_columns({a: b for a, b in names.items() if a != b})
    if len(data): _check(data[0], f"{where}, row 0")
    looked_at = [c for c in (*_SCHEMA, *_FOR_THE_MODEL["row"], "input") if c in data.column_names]
    for _ in _checked(((f"{where}, row {i}", row) for i, row in enumerate(data.select_columns(looked_at))), {}): pass
    return data.select_columns([c for c in _SCHEMA if c in data.column_names])


# %% [markdown]
# A path that does not exist must not turn into a question to the hub: offline that costs half a minute of retries, online it can find
# somebody else's data. What ends like a file, starts like a path or has two slashes is a path.

# %%
#| export
def _from_disk(path):
    try: return load_from_disk(str(path))
    except Exception as e: raise ValueError(f"{path}: what save_to_disk wrote here cannot be read ({type(e).__name__}: {(str(e) or 'empty').splitlines()[0]})") from e

def _from_hub(name, split, revision):
    path = Path(name).expanduser()
    if _suffix(path) in _READERS or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: no such file or folder")
    try: return load_dataset(name, split=split, revision=revision)
    except Exception as e: raise ValueError(f"{name}: neither a local path nor a hub data set that could be read ({str(e).splitlines()[0]})") from e


# %% [markdown]
# Together they are the function one calls. It returns rows that are checked but not yet interpreted: whether strings are turns of a chat is decided
# when they are tokenised.

# %%
#| export
def load_pairs(source,              # file (.jsonl, .json, .parquet, .arrow, .csv; also .gz), folder, hub id, list of rows, Dataset or DatasetDict
               split: str="train",  # of a hub id, folder or DatasetDict; a single file has none
               revision: str=None,  # hub ids: a commit, so that the data cannot change under you
               columns: dict=None,  # renames, e.g. {"question": "prompt"}; a source that says "prompt" already is left as it is
              ) -> Dataset:         # raw rows, memory-mapped, with the columns prompt, chosen, rejected, system, messages
    "Preference rows, checked. Raises ValueError naming file, row and field, and FileNotFoundError."
    columns = columns or {}
    if isinstance(source, (Dataset, DatasetDict)): return _from_dataset(source, split, columns, f"<{type(source).__name__}>")
    if isinstance(source, (list, tuple)):
        rows = list(_checked(((f"<list>, row {i}", row) for i, row in enumerate(source)), columns))
        if not rows: raise ValueError("<list>: no rows")
        return Dataset.from_list(rows, features=_features(rows[0]))
    if not isinstance(source, (str, Path)): raise ValueError(f"<{type(source).__name__}>: expected a file, a folder, a hub id, a list of rows or a Dataset; Dataset.from_list(list(...)) makes one of most things")
    path = Path(source).expanduser()
    if path.is_file(): return _read_file(path, columns)
    if any((path / f"dataset_{kind}.json").exists() for kind in ("info", "dict")): return _from_dataset(_from_disk(path), split, columns, str(path))
    if path.is_dir(): return _read_folder(path, split, columns)
    return _from_dataset(_from_hub(str(source), split, revision), split, columns, str(source))


# %% [markdown]
# The layout of a popular hub set: a system message, and `question` where the others say `prompt`. Read from a file and from memory, the rows
# are the same.

# %%
folder = Path(tempfile.mkdtemp())
datasets.config.HF_DATASETS_CACHE = folder / "cache" # this notebook leaves nothing in yours
orca = [dict(system="be brief", question="sort gace", chosen="aceg", rejected="geca"), dict(system="", question="copy ab", chosen="ab", rejected="ba")]
(folder / "orca.jsonl").write_text("".join(json.dumps(r) + "\n" for r in orca))

data = load_pairs(folder / "orca.jsonl", columns={"question": "prompt"})
assert data.to_list() == load_pairs(orca, columns={"question": "prompt"}).to_list()
pd.DataFrame([{k: flat(v) for k, v in normalise(row).items() if k != "chat"} for row in data])

# %% [markdown]
# The second row has an empty system message: it is a conversation like its neighbours, without a system turn. And this is said where a field changes its shape.

# %%
complaint(load_pairs, orca + [dict(prompt=[user(ask)], chosen=[assistant(good)], rejected=[assistant(bad)])], columns={"question": "prompt"})


# %% [markdown]
# ## Tokenised once
#
# What later chapters get is a `Source`: usable pairs as ids, and the counts of everything else. Rows are lists of their own
# length; padding is added in the batch and known by length, never by its id, which for many models is that of EOS.

# %%
#| export
@dataclass
class Source:
    "A named preference dataset, tokenised."
    name: str      # what the partition and the report call it
    pairs: Dataset # key, prompt_ids, chosen_ids, rejected_ids, truncated: one usable pair a row; memory-mapped
    counts: dict   # rows read, dropped by reason, truncated, ...

    def __len__(self): return len(self.pairs)
    def dropped(self) -> dict: return {why: n for why in DROPPED if (n := self.counts[why])} # reason -> rows

def counts_table(sources) -> pd.DataFrame:
    "What was read, dropped and cut, one source a row."
    return pd.DataFrame([s.counts for s in sources], index=pd.Index([s.name for s in sources], name="source"))


# %% [markdown]
# Ids are made once and kept under a hash of what decides them: the rows' content, the tokenizer, the template, the lengths. A probe shows what a tokenizer
# written in Python adds by itself. Padding and truncation are left out: they are what the last caller happened to ask for.

# %%
#| export
_FEATURES = datasets.Features({"key": datasets.Value("string"), "swapped": datasets.Value("string"),
    **{f"{s}_ids": datasets.List(datasets.Value("int32")) for s in ("prompt", "chosen", "rejected")}, "drop": datasets.Value("string"),
    **{k: datasets.Value("bool") for k in ("chat", "truncated", "prompt_truncated", "boundary_moved")}})

def _processes(rows): return min(os.cpu_count() or 1, rows // 10_000) or None

def _digest(data, tokenizer, *settings) -> str:
    "sha256 over everything that decides the ids, 24 hex digits."
    h = hashlib.sha256()
    for table in data.with_format("arrow").iter(1000):
        with pa.ipc.new_stream(sink := pa.BufferOutputStream(), table.schema) as w: w.write_table(table.combine_chunks())
        h.update(sink.getvalue())
    if tokenizer.is_fast: backend = {k: v for k, v in json.loads(tokenizer.backend_tokenizer.to_str()).items() if k not in ("padding", "truncation")}
    else: backend = [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer(" a B").input_ids]
    h.update(json.dumps([_VERSION, backend, tokenizer.chat_template, tokenizer.special_tokens_map, *settings], sort_keys=True, default=str).encode())
    return h.hexdigest()[:24]


# %% [markdown]
# Dropped rows stay in the cached table, so the counts are as cheap the second time as the pairs. A source of which nothing is left is an
# error: training on it would do nothing, quietly.

# %%
#| export
def _usable(name, out):
    "The pairs that carry signal, and the counts."
    t = out.select_columns(["key", "swapped", "drop", "chat", "truncated", "prompt_truncated", "boundary_moved"]).to_pandas()
    keep, dropped = t["drop"] == "", t["drop"].value_counts()
    if not keep.any(): raise ValueError(f"source '{name}': no usable pair among {len(t)} rows, dropped {dropped.to_dict()}")
    usable = t[keep]
    counts = dict(rows=len(t), usable=len(usable), **{why: dropped.get(why, 0) for why in DROPPED},
                  **{k: usable[k].sum() for k in ("chat", "truncated", "prompt_truncated", "boundary_moved")},
                  duplicates=usable["key"].duplicated().sum(), both_labels=usable["swapped"].isin(usable["key"]).sum())
    pairs = out.select_columns(["key", "prompt_ids", "chosen_ids", "rejected_ids", "truncated"])
    return Source(name, pairs if keep.all() else pairs.select(keep.to_numpy().nonzero()[0]), {k: int(v) for k, v in counts.items()})


# %% [markdown]
# Whether strings are text or the turns of a chat is asked once for a source, not for every row. One row with a system message or with earlier turns says that all of them are turns,
# or half a file would go through the template and half of it would not.

# %%
#| export
def _first_turns(data) -> int|None:
    "The first row that has a system message or earlier turns."
    columns = [c for c in ("system", "messages") if c in data.column_names]
    if not columns: return None
    for n, table in enumerate(data.select_columns(columns).with_format("arrow").iter(1000)):
        at = [i for c in table.columns if (i := pc.index(pc.is_valid(c), True).as_py()) >= 0]
        if at: return 1000 * n + min(at)


# %% [markdown]
# Tokenising is a `map` of `datasets`: it may be stopped at any time, because the result is written to a temporary file and then renamed.

# %%
#| export
def tokenize_pairs(data,                 # what `load_pairs` returns
                   tokenizer,            # a transformers tokenizer
                   name: str="pairs",    # of the source
                   max_length: int=1024, # longest prompt + response, in tokens; the response's tail is cut
                   max_prompt_length: int=None, # longest prompt, its end is kept; None: half of max_length
                   chat: bool=False,     # read string fields as turns of a chat, also where no row has a system message or earlier turns
                   num_proc: int=None,   # processes; None: one for every 10,000 rows, at most one a core
                  ) -> Source:           # usable pairs, with counts of the others
    "Tokenise once. Raises ValueError for a row that breaks the schema or a source without a usable pair."
    if not len(data): raise ValueError(f"source '{name}': no rows")
    if tokenizer.eos_token_id is None: raise ValueError("the tokenizer has no EOS token; set tokenizer.eos_token")
    max_prompt_length = prompt_limit(max_length, max_prompt_length)
    turns = _first_turns(data)
    conversational = isinstance(data[0]["chosen"], list)
    rendered = chat or turns is not None or conversational
    try: end = turn_end(tokenizer) if rendered and tokenizer.chat_template else None
    except ValueError as e: raise ValueError(f"source '{name}': {e}") from e
    def one(row, i):
        where = f"source '{name}', row {i}"
        try: pair = normalise(dict(row), where, rendered)
        except ValueError as e:
            if turns is None or conversational: raise
            raise ValueError(f"{e} (row {turns} has a system message or earlier turns, so every row of this source is a conversation)") from e
        try: return encode(pair, tokenizer, max_length, max_prompt_length, end)
        except (ValueError, jinja2.TemplateError) as e: raise ValueError(f"{where}: {e}") from e
    digest = _digest(data, tokenizer, max_length, max_prompt_length, chat)
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "sdpo_nb"; cache.mkdir(parents=True, exist_ok=True)
    out = data.map(one, with_indices=True, remove_columns=data.column_names, features=_FEATURES, num_proc=num_proc or _processes(len(data)), desc=f"tokenising {name}",
                   cache_file_name=str(cache / f"{digest}.arrow"), load_from_cache_file=True, new_fingerprint=digest)
    return _usable(name, out)


# %% [markdown]
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
# | `duplicates`, `both_labels` | usable pairs that occurred before, and pairs that occur with the opposite label, too |
#
# The world's three sources, and one made of trouble:

# %%
world = load_world()
base = AutoTokenizer.from_pretrained(world.base)
sources = [tokenize_pairs(load_pairs(file), base, name) for name, file in world.sources.items()]
answers = ("ab", "ba"), ("ba", "ab"), ("ab", "ba"), ("ab", "ab"), ("", "ba"), ("<|end|>", "ba"), ("abcdefghij", "ba"), ("abcdefghija", "abcdefghijb")
trouble = [dict(prompt="copy ab", chosen=c, rejected=r) for c, r in answers] + [dict(prompt="", chosen="ab", rejected="ba")]
counts = counts_table(sources + [tokenize_pairs(load_pairs(trouble), base, "trouble", max_length=16, max_prompt_length=8)])
assert (counts["rows"] == counts[["usable", *DROPPED]].sum(axis=1)).all()
found = dict(rows=9, usable=4, empty=2, equal=1, no_prompt=1, no_room=1, chat=0, truncated=1, prompt_truncated=0, boundary_moved=0, duplicates=1, both_labels=3)
assert counts.loc["trouble"].to_dict() == found
counts.T


# %% [markdown]
# Even the world has an `empty` row: once, S ended its answer before it began. In `trouble` there are two, one of them with nothing but an end token.
#
# *Once* is a promise too. The tokenizer below counts how often its template is rendered.

# %%
def renders(rows, **kw):
    "How many conversations are rendered while these rows are tokenised."
    asked, t = [], AutoTokenizer.from_pretrained(world.base)
    render = t.apply_chat_template
    t.apply_chat_template = lambda *a, **k: asked.append(1) or render(*a, **k)
    tokenize_pairs(load_pairs(rows), t, **kw)
    return len(asked)

few = load_pairs(world.sources["riddle"]).to_list()[:10]
edited = few[:9] + [dict(few[9], chosen=[assistant("abc")])]
seen = pd.Series({"first call": renders(few), "the same again": renders(few), "other name": renders(few, name="again"), "shorter": renders(few, max_length=20), "one row edited": renders(edited)}, name="renderings")
assert seen.tolist() == [32, 2, 2, 32, 32]
seen.to_frame()


# %% [markdown]
# Thirty renderings are three for each of ten rows; two find the turn's end and are always needed. What is kept is small, and
# this is all that the chapters to come will see of a preference:

# %%
#| export
def decoded(source: Source, tokenizer,
            n: int=3,       # pairs, the first ones
           ) -> list[dict]: # prompt, chosen, rejected: what is read, and what is scored after it, special tokens included
    "Some pairs of a source, as text."
    first = source.pairs.select(range(min(n, len(source))))
    return [{side: tokenizer.decode(pair[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")} for pair in first]


# %%
pd.DataFrame(decoded(sources[0], base))


# %% [markdown]
# ## Held out
#
# Whether training helped is asked with pairs that it has not seen. The prompt decides which, not the pair: two pairs of one prompt have too much in common. A number between 0 and 1 is made from the prompt's ids. So a prompt falls on the same side in every source, and rows that are added to a file later move no other row.

# %%
#| export
def _lot(ids) -> float:
    "A number from 0 to 1 that only these ids have."
    return int(hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12], 16) / 16**12

def hold_out(source: Source,
             share: float,  # of the prompts, from 0 to below 1
            ) -> tuple[Source, Source|None]: # to train on, and never to train on; None where there are no such pairs
    "Part a source by prompt. Raises ValueError where nothing is left to train on."
    if not 0 <= share < 1: raise ValueError(f"source '{source.name}': eval_share must be from 0 to below 1, got {share}")
    if not share: return source, None
    held = np.array([_lot(ids) < share for ids in source.pairs["prompt_ids"]])
    if held.all(): raise ValueError(f"source '{source.name}': eval_share = {share} holds out all of its {len(held)} pairs; a smaller one leaves some to train on")
    if not held.any(): return source, None
    parts = (source.pairs.select((~held).nonzero()[0]), source.pairs.select(held.nonzero()[0]))
    return Source(source.name, parts[0], source.counts | dict(held_out=int(held.sum()))), Source(source.name, parts[1], {})


# %%
train, test = hold_out(sources[0], 0.5)
assert len(train) + len(test) == len(sources[0]) and not {tuple(x) for x in train.pairs["prompt_ids"]} & {tuple(x) for x in test.pairs["prompt_ids"]}
{"to train on": len(train), "held out": len(test)}

# %% [markdown]
# ## The same ids as TRL, but for five things
#
# `tests/test_preferences.py` compares these ids with those of TRL 1.16, on text and on conversations. They are equal, except on purpose:
#
# - ChatML's line feed after the end token is scored there and not here.
# - Where the tokenizer appends EOS by itself, there are two there and one here.
# - A prompt that is too long loses its beginning here; there the response alone pays, and the pair goes if the prompt fills `max_length`. Pairs whose responses part behind the cut go here.
# - Empty, equal and promptless pairs are dropped and counted here; there they are trained on.
# - `system` and `messages` columns are read here; there they are ignored.

# %% [markdown]
# ## What you now have
#
# - `load_pairs`: rows in any common spelling, from any common place, or an error that names file, row and field.
# - `tokenize_pairs`: a `Source` of ids in which both responses follow the same prompt and end where a model is asked to end.
# - `counts_table`: what was dropped, cut or moved, for every source, so that nothing is lost in silence.
#
# ## Questions to test yourself
#
# 1. Why may the boundary move to the left of the prompt's end, and why must it be the same for both sides?
# 2. What would be scored if ChatML's line feed were kept? Does it change which response is preferred?
# 3. A row whose responses differ only after token 1024 is dropped. Which other remedy is there, and what does it cost?
#
# ## Try this
#
# - Load a preference set of your own with `load_pairs` and look at `counts_table`: is any count a surprise?
# - Give `toy_tokenizer` more merges (`size=80`): how far does the boundary of `link` move, and what does `encode` say about the pair then?
