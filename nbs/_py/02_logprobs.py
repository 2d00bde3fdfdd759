# %% [markdown]
# # What a model says about a response
# > The log-probability of a response: shift, gather, mask, sum, in fp32; and a pass that writes one row per pair to a table.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/02_logprobs.ipynb)

# %%
#| default_exp logprobs

# %%
#| export
import contextlib, hashlib, json, os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


# %% [markdown]
# ## A batch

# %%
#| export
def collate(pairs: list, # n pairs with prompt_ids, chosen_ids, rejected_ids
            device="cpu",
           ) -> tuple[Tensor, Tensor, Tensor]: # (2n, L) ids, (2n, L) attention mask, (2n, L) response mask; chosen rows first
    "Right-padded rows, all chosen then all rejected. Padding is known by length, never by token id."
    rows = [(p["prompt_ids"], p[side]) for side in ("chosen_ids", "rejected_ids") for p in pairs]
    L = max(len(x) + len(y) for x, y in rows)
    ids, seen, scored = torch.zeros(len(rows), L, dtype=torch.long), torch.zeros(len(rows), L, dtype=torch.long), torch.zeros(len(rows), L, dtype=torch.bool)
    for i, (x, y) in enumerate(rows):
        n = len(x) + len(y)
        ids[i, :n] = torch.tensor(list(x) + list(y)); seen[i, :n] = 1; scored[i, len(x):n] = True
    return ids.to(device), seen.to(device), scored.to(device)


# %%
#| export
def response_logprobs(model,       # a causal LM; gradients flow
                      pairs: list, # n pairs with prompt_ids, chosen_ids, rejected_ids
                     ) -> tuple[Tensor, Tensor]: # (n,) log pi(y_w|x) and (n,) log pi(y_l|x), nats, fp32
    "Summed log-probabilities of both responses of each pair: the padded version that everybody can read."
    ids, seen, scored = collate(pairs, model.device)
    logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits
    at = scored[:, 1:]                                # position i predicts token i + 1
    logp = token_logprobs(logits[:, :-1][at], ids[:, 1:][at])
    total = torch.zeros(len(ids), device=logp.device).index_add(0, at.nonzero()[:, 0], logp)
    return tuple(total.chunk(2))

def token_logprobs(logits: Tensor, # (m, V) in any dtype
                   ids: Tensor,    # (m,) the tokens that came next
                  ) -> Tensor:     # (m,) fp32, nats
    return logits.float().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)


# %%
#| export
def gamma(chosen: Tensor,   # (n,) log pi(y_w|x), nats
          rejected: Tensor, # (n,) log pi(y_l|x), nats
         ) -> Tensor:       # (n,) log-ratio; positive where the model prefers the chosen response
    "How much more likely, in nats, the model finds the chosen response (the paper's gamma_pi)."
    return chosen - rejected


# %% [markdown]
# ## A model, loaded for this

# %%
#| export
def load_model(model: str, # hub id or folder
               device: str=None,
              ):           # causal LM with fp32 weights and no dropout
    "Load in fp32 whatever the folder's dtype. Raises ValueError for a folder that is not a model."
    _check_model(model)
    m = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return freeze_dropout(m).to(device or best_device())

def load_tokenizer(model: str): # hub id or folder
    _check_model(model)
    return AutoTokenizer.from_pretrained(model)

def best_device(): return "cuda" if torch.cuda.is_available() else "cpu"

def _check_model(model):
    p = Path(model).expanduser()
    if p.is_dir() and not (p / "config.json").exists(): raise ValueError(f"{model}: a folder without config.json is not a model")
    if not p.is_dir() and (p.is_absolute() or str(model).startswith(".") or str(model).count("/") > 1):
        raise ValueError(f"{model}: no such model folder")


# %%
#| export
def freeze_dropout(model):
    "Set every dropout probability of the model to zero, in the config and in the modules; returns the model."
    def is_dropout(name): return "dropout" in name or name.endswith("pdrop") or name == "layerdrop"
    for owner in [model.config, *model.modules()]:
        for name, value in list(vars(owner).items()):
            if is_dropout(name) and isinstance(value, float): setattr(owner, name, 0.0)
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout): m.p = 0.0
    return model


# %%
#| export
def weights_hash(model) -> str:
    "sha256 over sorted parameter names, dtypes, shapes and bytes, 16 hex digits."
    h = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        h.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        h.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return h.hexdigest()[:16]


# %% [markdown]
# ## Precision

# %%
#| export
def pick_precision(precision: str="auto", # auto, bf16, fp16 or fp32
                   device: str="cpu",
                  ) -> str:
    "bf16 where the hardware really has it, else fp16 on CUDA, else fp32."
    if precision not in ("auto", "bf16", "fp16", "fp32"): raise ValueError(f"precision: {precision!r} is none of auto, bf16, fp16, fp32")
    if precision != "auto": return precision
    if str(device).startswith("cuda"): return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    real = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if real else "fp32"

def autocast(device, precision):
    "The context in which forward passes of this precision run; fp32 is no context at all."
    if precision == "fp32": return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


# %% [markdown]
# ## One pass, one table

# %%
#| export
@dataclass
class LogprobTable:
    "Log-probabilities of one model for many pairs, and how they were computed."
    kind: dict         # weights, precision, attention, device, logprobs
    rows: pd.DataFrame # index: pair key; columns chosen, rejected (nats, fp32)

    def lookup(self, pairs) -> tuple[Tensor, Tensor]: # (n,), (n,)
        got = self.rows.loc[[p["key"] for p in pairs]]
        return torch.tensor(got["chosen"].to_numpy()), torch.tensor(got["rejected"].to_numpy())

    def gamma(self, pairs) -> Tensor: # (n,) nats
        return gamma(*self.lookup(pairs))


# %%
#| export
def table_kind(model, precision, logprobs) -> dict:
    "What must agree for two tables to be the same."
    return dict(weights=weights_hash(model), precision=precision, device=model.device.type,
                attention=model.config._attn_implementation, logprobs=logprobs.__name__)


# %%
#| export
@torch.no_grad()
def score_pairs(model,            # any causal LM
                pairs,            # tokenised pairs, with keys
                folder=None,      # where the table is kept, in pieces; a killed pass goes on from there
                precision="fp32", # fp32, bf16, fp16
                logprobs=response_logprobs, # (model, pairs) -> (chosen, rejected)
                batch_size=8,     # pairs a forward
                piece=512,        # pairs a file
                desc="scoring",
               ) -> LogprobTable:
    "One pass of a model over pairs. A folder that holds a table of another kind is computed again, saying so."
    kind = table_kind(model, precision, logprobs)
    done = _open_table(folder, kind)
    keys = pairs["key"] if hasattr(pairs, "column_names") else [p["key"] for p in pairs]
    todo = sorted({k: i for i, k in enumerate(keys) if k not in done.index}.values())
    was_training = model.training; model.eval()
    bar = tqdm(total=len(todo), desc=desc, unit="pair", leave=False)
    for start in range(0, len(todo), piece):
        part = [pairs[i] for i in todo[start:start+piece]]
        rows = _score_piece(model, part, precision, logprobs, batch_size, bar)
        done = pd.concat([done, rows])
        if folder: _write_piece(folder, rows)
    model.train(was_training)
    return LogprobTable(kind, done)


# %%
#| export
def _score_piece(model, part, precision, logprobs, batch_size, bar):
    out = {}
    part = sorted(part, key=lambda p: -len(p["prompt_ids"]) - max(len(p["chosen_ids"]), len(p["rejected_ids"])))
    for i in range(0, len(part), batch_size):
        batch = part[i:i+batch_size]
        with autocast(model.device, precision): c, r = logprobs(model, batch)
        out |= {p["key"]: v for p, v in zip(batch, zip(c.tolist(), r.tolist()))}
        bar.update(len(batch))
    return pd.DataFrame.from_dict(out, orient="index", columns=["chosen", "rejected"], dtype="float32")

def _write_piece(folder, rows):
    path = Path(folder) / f"part-{len(list(Path(folder).glob('part-*.parquet'))):05}.parquet"
    rows.to_parquet(path.with_suffix(".tmp")); os.replace(path.with_suffix(".tmp"), path)


# %%
#| export
def _open_table(folder, kind):
    empty = pd.DataFrame({"chosen": [], "rejected": []}, dtype="float32")
    if folder is None: return empty
    folder = Path(folder); folder.mkdir(parents=True, exist_ok=True)
    meta = folder / "kind.json"
    if meta.exists() and (old := json.loads(meta.read_text())) != kind:
        print(f"{folder}: table of another kind ({', '.join(f'{k} {old.get(k)} -> {v}' for k, v in kind.items() if old.get(k) != v)}); computed again")
        for p in folder.glob("part-*"): p.unlink()
    if not meta.exists() or json.loads(meta.read_text()) != kind: write_json(meta, kind)
    parts = [pd.read_parquet(p) for p in sorted(folder.glob("part-*.parquet"))]
    return pd.concat(parts) if parts else empty

def write_json(path, data):
    "Write a whole file under a temporary name, then rename it."
    path = Path(path); tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(json.dumps(data, indent=1) + "\n"); os.replace(tmp, path)
