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
# decides which tokens are counted. Most of what goes wrong in preference training goes wrong here, silently.

# %%
#| default_exp preferences

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
#| export
import gzip, hashlib, json, os
from dataclasses import dataclass
from pathlib import Path

import datasets
import pandas as pd
from datasets import Dataset, load_dataset, load_from_disk

# %%
import tempfile
from sdpo_nb.world import load_world


# %% [markdown]
# ## One row, five spellings
#
# Preference data come in a handful of spellings. The functions of this section turn each of them into one of two shapes:
# three strings, or a list of messages and two closing messages.

# %%
#| export
def _is_chat(x): return isinstance(x, (list, tuple)) and len(x) > 0 and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in x)

def _messages(x): return [{"role": m["role"], "content": m["content"]} for m in x]

def _shared(a, b):
    "Length of the longest common prefix of two sequences."
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]: n += 1
    return n


# %%
#| export
def _check(row: dict, # one raw row
           where: str, # file and row, for the message
          ):
    "Raise ValueError, naming file, row and field, unless the row is a preference in a known spelling."
    for field in ("chosen", "rejected"):
        if row.get(field) is None: raise ValueError(f"{where}, field '{field}': missing; a pair needs 'chosen' and 'rejected'")
        if not isinstance(row[field], str) and not _is_chat(row[field]):
            raise ValueError(f"{where}, field '{field}': expected a string or a list of {{'role', 'content'}} messages, got {_short(row[field])}")
    if isinstance(row["chosen"], str) != isinstance(row["rejected"], str):
        raise ValueError(f"{where}, field 'rejected': 'chosen' is {_short(row['chosen'])} but 'rejected' is {_short(row['rejected'])}; both must be strings or both messages")
    prompt = row.get("prompt")
    if prompt is not None and not isinstance(prompt, str) and not _is_chat(prompt):
        raise ValueError(f"{where}, field 'prompt': expected a string or messages, got {_short(prompt)}")
    for field, ok in (("system", lambda x: isinstance(x, str)), ("messages", lambda x: x == [] or _is_chat(x))):
        if row.get(field) is not None and not ok(row[field]):
            raise ValueError(f"{where}, field '{field}': expected {'a string' if field == 'system' else 'messages'}, got {_short(row[field])}")

def _short(x): return f"{type(x).__name__} {str(x)[:40]!r}"


# %%
#| export
def normalise(row: dict,         # a raw row: prompt (may be missing), chosen, rejected; optional system, messages
              where: str="row",  # file and row number, for error messages
              chat: bool=False,  # read string fields as turns of a chat
             ) -> dict:          # {"chat": bool, "prompt", "chosen", "rejected"}: three strings, or messages and two closing messages
    "One preference, whatever its spelling. Raises ValueError naming file, row and field."
    _check(row, where)
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if not isinstance(chosen, str): return _normalise_messages(prompt, chosen, rejected, row, where)
    if prompt is None: prompt, chosen, rejected = _split_text(chosen, rejected)
    if not (chat or row.get("system") or row.get("messages") or _is_chat(prompt)):
        return dict(chat=False, prompt=prompt, chosen=chosen, rejected=rejected)
    turns = _messages(prompt) if _is_chat(prompt) else [{"role": "user", "content": prompt}]
    return dict(chat=True, prompt=_context(row, turns), chosen={"role": "assistant", "content": chosen},
                rejected={"role": "assistant", "content": rejected})


# %%
#| export
def _context(row, turns):
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return system + _messages(row.get("messages") or []) + turns

def _split_text(chosen, rejected):
    "Implicit prompt in plain text: the common beginning, cut back to a blank."
    n = _shared(chosen, rejected)
    if 0 < n < max(len(chosen), len(rejected)) and chosen[n-1] == " ": n -= 1
    return chosen[:n], chosen[n:], rejected[n:]


# %%
#| export
def _normalise_messages(prompt, chosen, rejected, row, where):
    "Messages: a list prompt stands before them; a string prompt, or none, is already inside them."
    chosen, rejected = _messages(chosen), _messages(rejected)
    if _is_chat(prompt): head = _messages(prompt)
    else:
        n = min(_shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
        head, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
        if not head and isinstance(prompt, str): head = [{"role": "user", "content": prompt}]
    for field, turns in (("chosen", chosen), ("rejected", rejected)):
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise ValueError(f"{where}, field '{field}': expected one closing assistant message after the shared turns, got roles {[m['role'] for m in turns]}")
    if not head: raise ValueError(f"{where}, field 'prompt': missing, and 'chosen' and 'rejected' share no first turn")
    return dict(chat=True, prompt=_context(row, head), chosen=chosen[0], rejected=rejected[0])


# %% [markdown]
# ## Where a turn ends
#
# A chat template closes the assistant's turn with a special token, and some write more after it (ChatML: a line feed).
# The model is asked for the first, never for the second, so the second is not scored.

# %%
#| export
def turn_end(tokenizer, # a tokenizer with a chat template
            ) -> tuple[list[int], int]: # (ids that must be appended, number of ids to cut) after a rendered assistant turn
    "How a rendered assistant turn has to be mended so that it ends with the turn's end token."
    mark = "sdpomark"
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}], tokenize=False)
    tail = tokenizer(text[text.rindex(mark) + len(mark):], add_special_tokens=False).input_ids
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    ends = [i for i, t in enumerate(tail) if t in special]
    return ([], len(tail) - ends[0] - 1) if ends else ([tokenizer.eos_token_id], len(tail))


# %% [markdown]
# ## Where the prompt ends
#
# Tokenising the prompt alone and the response alone gives other tokens than tokenising the two together. So both full rows are
# tokenised, and the boundary is the longest prefix that the prompt and both rows share.

# %%
#| export
def _full_ids(pair, tokenizer, end):
    if not pair["chat"]:
        ids = [tokenizer(pair["prompt"]).input_ids]
        for side in ("chosen", "rejected"):
            full = tokenizer(pair["prompt"] + pair[side]).input_ids
            ids.append(full if full[-1:] == [tokenizer.eos_token_id] else full + [tokenizer.eos_token_id])
        return ids
    def render(messages, **kw): return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **kw)
    add, cut = end
    full = [render(pair["prompt"] + [pair[side]]) for side in ("chosen", "rejected")]
    return [render(pair["prompt"], add_generation_prompt=True)] + [f[:len(f) - cut] + add for f in full]


# %%
#| export
def encode(pair: dict,             # what `normalise` returns
           tokenizer,              # a transformers tokenizer
           max_length: int=1024,   # longest prompt + response, in tokens
           max_prompt_length: int=512, # longest prompt; its end is kept
           end: tuple=None,        # `turn_end(tokenizer)`, needed for chats
          ) -> dict:               # prompt_ids, chosen_ids, rejected_ids and what was done to them
    "Token ids of one pair. The prompt is the longest common prefix of the prompt's ids and both full rows."
    prompt, *full = _full_ids(pair, tokenizer, end)
    n = min(_shared(prompt, f) for f in full)
    kept = prompt[:n][-max_prompt_length:] if max_prompt_length else []
    chosen, rejected = (f[n:][:max(0, max_length - len(kept))] for f in full)
    text = [pair[s] if isinstance(pair[s], str) else pair[s]["content"] for s in ("chosen", "rejected")]
    drop = ("empty" if not (chosen and rejected and all(t.strip() for t in text)) else "equal" if chosen == rejected else "")
    key = hashlib.sha256(json.dumps([kept, chosen, rejected]).encode()).hexdigest()[:16]
    return dict(key=key, prompt_ids=kept, chosen_ids=chosen, rejected_ids=rejected, drop=drop, chat=pair["chat"],
                truncated=len(kept) + max(len(f) - n for f in full) > max_length,
                prompt_truncated=n > max_prompt_length, boundary_moved=n < len(prompt))


# %% [markdown]
# ## Anything `datasets` reads

# %%
#| export
def load_pairs(source,              # file (.jsonl, .json, .jsonl.gz, .parquet), folder, hub id, list of rows, or Dataset
               split: str="train",  # hub ids and folders with splits
               revision: str=None,  # hub ids: a commit, so that the data cannot change under you
               columns: dict=None,  # renames, e.g. {"question": "prompt"}
              ) -> Dataset:         # raw rows, memory-mapped, with the columns prompt, chosen, rejected, system, messages that exist
    "Preference rows as `datasets` reads them. A local path never reaches the hub."
    data = _read(source, split, revision)
    absent = [c for c in (columns or {}) if c not in data.column_names]
    if absent: raise ValueError(f"{_name(source)}: columns= names {absent}, but the data have {data.column_names}")
    clash = [new for new in (columns or {}).values() if new in data.column_names and new not in columns]
    data = data.remove_columns(clash).rename_columns(columns or {})
    for field in ("chosen", "rejected"):
        if field not in data.column_names:
            raise ValueError(f"{_name(source)}: no column '{field}' among {data.column_names}; name it with columns={{'your name': '{field}'}}")
    return data.select_columns([c for c in ("prompt", "chosen", "rejected", "system", "messages") if c in data.column_names])

def _name(source): return str(source) if isinstance(source, (str, Path)) else f"<{type(source).__name__} in memory>"


# %%
#| export
def _read(source, split, revision):
    if isinstance(source, Dataset): return source
    if isinstance(source, (list, tuple)): return _from_rows(list(source))
    path = Path(source).expanduser()
    if path.is_dir() and (path / "dataset_info.json").exists(): return load_from_disk(str(path))
    if path.is_dir() and (path / "dataset_dict.json").exists(): return load_from_disk(str(path))[split]
    if path.is_dir(): return load_dataset(str(path), split=split)
    if path.is_file(): return _read_file(path)
    if path.suffix in _READERS or path.suffix == ".gz" or path.is_absolute() or str(source).startswith("."):
        raise FileNotFoundError(f"{source}: no such file or folder")
    try: return load_dataset(str(source), split=split, revision=revision)
    except Exception as e: raise ValueError(f"{source}: neither a local path nor a hub data set that could be read ({str(e).splitlines()[0]})") from e

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}


# %%
#| export
def _read_file(path):
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in _READERS: raise ValueError(f"{path}: cannot read '{suffix}' files; use one of {sorted(_READERS)} (also with .gz)")
    try: return load_dataset(_READERS[suffix], data_files=str(path), split="train")
    except Exception as e:
        if suffix == ".jsonl": _find_bad_line(path)
        raise ValueError(f"{path}: {str(e.__cause__ or e).splitlines()[0]}") from e

def _find_bad_line(path):
    "Raise for the first line that is no JSON object or whose fields are no preference."
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
        for i, line in enumerate(f):
            try: row = json.loads(line)
            except ValueError as e: raise ValueError(f"{path}, row {i}: not JSON ({e})") from None
            if not isinstance(row, dict): raise ValueError(f"{path}, row {i}: expected a JSON object, got {_short(row)}")
            _check(row, f"{path}, row {i}")

def _from_rows(rows):
    for i, row in enumerate(rows):
        if not isinstance(row, dict): raise ValueError(f"row {i}: expected a dict, got {_short(row)}")
        if "chosen" in row and "rejected" in row: _check(row, f"<list in memory>, row {i}")
    return Dataset.from_list(rows)


# %% [markdown]
# ## Tokenised once
#
# Tokenising is a `map` of `datasets`: memory-mapped, and cached under a name that is the hash of everything that can change the result.

# %%
#| export
@dataclass
class Source:
    "A named preference dataset, tokenised."
    name: str      # what the partition and the report call it
    pairs: Dataset # key, prompt_ids, chosen_ids, rejected_ids, ... one usable pair a row; memory-mapped
    counts: dict   # rows read, dropped by reason, truncated, ...

    def __len__(self): return len(self.pairs)

def counts_table(sources) -> pd.DataFrame:
    "What was read, dropped and cut, one source a row."
    return pd.DataFrame([s.counts for s in sources], index=pd.Index([s.name for s in sources], name="source"))


# %%
#| export
def tokenize_pairs(data,                 # what `load_pairs` returns
                   tokenizer,            # a transformers tokenizer
                   name: str="pairs",    # of the source
                   max_length: int=1024, # longest prompt + response, in tokens; the response's tail is cut
                   max_prompt_length: int=512, # longest prompt; its end is kept
                   chat: bool=False,     # read string fields as turns of a chat
                   num_proc: int=None,   # processes
                  ) -> Source:           # usable pairs, with counts of the others
    "Tokenise once. Raises ValueError for a row that breaks the schema or a source without a usable pair."
    _need_end(data, tokenizer, name, chat)
    end = turn_end(tokenizer) if tokenizer.chat_template else None
    def one(row, i): return encode(normalise(row, f"source '{name}', row {i}", chat), tokenizer, max_length, max_prompt_length, end)
    print_key = _fingerprint(data, tokenizer, name, max_length, max_prompt_length, chat)
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "sdpo_nb"; cache.mkdir(parents=True, exist_ok=True)
    out = data.map(one, with_indices=True, remove_columns=data.column_names, features=_FEATURES, num_proc=num_proc, desc=f"tokenising {name}",
                   cache_file_name=str(cache / f"{print_key}.arrow"), new_fingerprint=print_key)
    return _usable(name, out)

_FEATURES = datasets.Features({"key": datasets.Value("string"),
    **{f"{s}_ids": datasets.List(datasets.Value("int32")) for s in ("prompt", "chosen", "rejected")}, "drop": datasets.Value("string"),
    **{k: datasets.Value("bool") for k in ("chat", "truncated", "prompt_truncated", "boundary_moved")}})


# %%
#| export
def _need_end(data, tokenizer, name, chat):
    if tokenizer.eos_token_id is None: raise ValueError("the tokenizer has no EOS token; set tokenizer.eos_token")
    first = normalise(data[0], f"source '{name}', row 0", chat) if len(data) else None
    if first is None: raise ValueError(f"source '{name}': no rows")
    if first["chat"] and not tokenizer.chat_template:
        raise ValueError(f"source '{name}' is conversational but the tokenizer has no chat template; set tokenizer.chat_template or use text fields")

def _fingerprint(data, tokenizer, *settings):
    backend = tokenizer.backend_tokenizer.to_str() if hasattr(tokenizer, "backend_tokenizer") else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    what = [data._fingerprint, backend, tokenizer.chat_template, tokenizer.eos_token, *settings]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]

def _usable(name, out):
    t = out.data.table.select(["drop", "chat", "truncated", "prompt_truncated", "boundary_moved"]).to_pandas()
    keep = t["drop"] == ""
    if not keep.any(): raise ValueError(f"source '{name}': no usable pair among {len(t)} rows ({t['drop'].value_counts().to_dict()})")
    counts = dict(rows=len(t), usable=int(keep.sum()), empty=int((t["drop"] == "empty").sum()), equal=int((t["drop"] == "equal").sum()),
                  chat=int(t["chat"][keep].sum()), **{k: int(t[k][keep].sum()) for k in ("truncated", "prompt_truncated", "boundary_moved")})
    pairs = out.remove_columns(["drop", "chat", "prompt_truncated", "boundary_moved"])
    return Source(name, pairs if keep.all() else pairs.select([i for i, k in enumerate(keep) if k]), counts)
