# %% [markdown]
# # Stepwise DPO
# > Stage after stage: the model that one stage leaves behind is the reference of the next. A run is a folder.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/09_stepwise.ipynb)
#
# **You should know** what [one stage](06_trainer.ipynb) is and how [sources are ordered](05_partition.ipynb). **Time** about a minute on two CPU cores.
#
# DPO holds the policy near a reference, and uses all its data against that one reference. Stepwise DPO (sDPO, Kim et al., arXiv 2403.19270) cuts the data
# into chunks $D_1, \dots, D_T$, easy ones first, and lets the reference climb: with $M_0 = S$, stage $t$ trains
#
# $$M_t = \arg\min_\theta\; -\mathbb{E}_{D_t} \log\sigma\big(\beta\,(\gamma_\theta - \gamma_{M_{t-1}})\big), \qquad \theta \text{ starting at } M_{t-1}. \tag{1}$$
#
# Everything hard is done by earlier chapters. This one answers what a loop over stages gets wrong in practice: *which* model is the reference, what happens
# after a crash, and what one may conclude afterwards.

# %%
#| default_exp stepwise

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
#| export
import base64, difflib, json, math, os, re, shlex, shutil, subprocess, sys, tempfile, time, unicodedata, warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pyarrow.compute as pc
import torch
import yaml
from accelerate import Accelerator
from datasets import Dataset, concatenate_datasets, load_from_disk
from huggingface_hub import HfApi, ModelCard, ModelCardData

try: import fcntl
except ImportError: fcntl = None # Windows

from sdpo_nb.evaluate import FALSE_ALARMS, as_text, failure_signs, greedy_answers, held_out
from sdpo_nb.figures import plot_change, plot_drift, plot_loss, plot_partition
from sdpo_nb.logprobs import SMALL, Clock, check_model, check_rows, load_model, load_tokenizer, pair_tokens, pairs_hash, pick_precision, read_table, replacing, response_logprobs, score_pairs, stored_dtype, table_kind, weights_hash, write_json
from sdpo_nb.loss import certificate, dpo_loss, reward_accuracy
from sdpo_nb.packing import choose_logprobs
from sdpo_nb.partition import ORDERS, partition
from sdpo_nb.preferences import Source, counts_table, hold_out, load_pairs, prompt_limit, tokenize_pairs
from sdpo_nb.trainer import COMPUTED_ALIKE, GIB, MOST, TRAINING, TrainConfig, as_line, check_memory, check_one_process, compile_for, free_memory, peak_memory, plan_for, read_checkpoint, setting
from sdpo_nb.trainer import train_stage, wants_compiling, why_not_same_bits
from sdpo_nb.world import mean_interval

# %%
from sdpo_nb.figures import plot_gamma
from sdpo_nb.packing import packed_logprobs
import seaborn as sns
import torch.nn.functional as F
from sdpo_nb.trainer import epoch_order
from sdpo_nb.world import load_world
torch.set_num_threads(1)
pd.set_option("display.width", 180, "display.max_columns", 20);

# %% [markdown]
# ## The method in four lines
#
# Three sources of the tiny world ($k = 6$, so $\beta = 0.3$ is not the $\beta$ of a real model). Written down, (1) is a loop: ask the model what it thinks of the
# next chunk, and train it against that answer.

# %%
w, tmp = load_world(), Path(tempfile.mkdtemp())
quick = dict(beta=0.3, lr=1e-4, epochs=2, precision="fp32")
policy, tok = load_model(w.base), load_tokenizer(w.base)
chunks = {name: tokenize_pairs(load_pairs(w.sources[name]), tok, name).pairs for name in ("primer", "digest", "riddle")}

ends, against = [weights_hash(policy)], []
for t, pairs in enumerate(chunks.values(), 1):
    reference = score_pairs(policy, pairs, logprobs=packed_logprobs, token_budget=4 * 4096)
    train_stage(policy, pairs, reference, TrainConfig(**quick), tmp / f"naive-{t}", t)
    ends.append(weights_hash(policy)); against.append(reference.kind["weights"])

# %% [markdown]
# A table of log-probabilities knows whose it is. So the sentence "the reference is $M_{t-1}$" of (1) can be checked.

# %%
assert against == ends[:-1] and len(set(ends)) == 4
whose = {h: f"M_{t}" for t, h in enumerate(ends)}
pd.DataFrame({"reference": map(whose.get, against), "trained": map(whose.get, ends[1:])}, index=pd.Index(chunks, name="chunk"))


# %% [markdown]
# That is sDPO. What the loop lacks is everything around it: the order was typed by hand, a crash in the third stage costs the first two, and next week nobody can say
# what was trained on what. The rest of this chapter puts the loop into a folder, and must end in the same weights.
#
# ## Settings
#
# A run has the settings of a stage and a few of its own. The ones below are the switches that the paper's experiments turn: the order, where the
# target starts, which model is the reference, and whether optimizer and schedule start anew.

# %%
#| export
@dataclass
class StepwiseConfig(TrainConfig):
    "Settings of a run: those of a stage, and what the stages are."
    order: str = setting("easy_to_hard", "which source comes first", choices=ORDERS)
    chunks: object = setting(None, "number of stages T; none: one per source. In Python also lists of source names, or a function (t, model) -> pairs that returns None to end")
    init_target: str = setting("previous", "where a stage starts: at M_{t-1} or at the SFT base S", choices=("previous", "S"))
    reference: str = setting("moving", "moving (M_{t-1}), fixed (S), or the folder of a model")
    restart: str = setting("stage", "optimizer and schedule: new in every stage, or never", choices=("stage", "never"))
    max_length: int = setting(1024, "longest prompt + response in tokens; the response's tail is cut", 2)
    max_prompt_length: int = setting(0, "longest prompt in tokens, its end is kept; 0: half of max_length", 0)
    probe: int = setting(512, "pairs of each chunk on which every model is measured for the report", 1)
    eval_share: float = setting(0.0, "share of the prompts of each source that is held out: never trained on, measured after every stage", 0, 0.9)
    log_with: str = setting("none", "a tracker that gets every step, if it is installed: tensorboard, wandb, trackio, or none")
    save_dtype: str = setting("S", "dtype of the models on disk: that of S, or fp32", choices=("S", "fp32"))
    device: str = setting("auto", "auto: the graphics card, if there is one and the model is not tiny; cpu; or cuda", choices=("auto", "cpu", "cuda"))

    def __post_init__(self):
        super().__post_init__()
        self.max_prompt_length = prompt_limit(self.max_length, self.max_prompt_length)
        if isinstance(self.chunks, (list, tuple)): self.chunks = _groups(self.chunks)
        elif not (self.chunks is None or callable(self.chunks) or type(self.chunks) is int and self.chunks >= 1):
            raise ValueError(f"chunks: must be a whole number from 1, a list of source names or a function, got {self.chunks!r}")
        if isinstance(self.chunks, list) or callable(self.chunks):
            if self.order not in ("easy_to_hard", "as_given"): raise ValueError(f"order: chunks that are given have their own order, so it cannot be {self.order}")
            self.order = "as_given"
        if self.reference not in ("moving", "fixed") and not (Path(self.reference) / "config.json").is_file():
            raise ValueError(f"reference: must be moving, fixed or the folder of a model; there is no model in {self.reference!r}")
        if callable(self.chunks) and self.restart == "never": raise ValueError("restart: 'never' needs all chunks beforehand, so chunks cannot be a function")

def _groups(chunks):
    "Lists of source names, one per chunk; a name alone is a chunk of one."
    groups = [[g] if isinstance(g, str) else list(g) if isinstance(g, (list, tuple)) else [] for g in chunks]
    if not groups or not all(g and all(isinstance(n, str) for n in g) for g in groups):
        raise ValueError(f"chunks: a list must hold source names, or lists of them, and none may be empty; got {chunks!r}")
    return groups


# %%
#| export
def defaults_table() -> pd.DataFrame:
    "Every setting, its default and its meaning."
    return pd.DataFrame([(f.name, str(f.default), f.metadata["help"]) for f in fields(StepwiseConfig)], columns=["setting", "default", "meaning"]).set_index("setting")


# %%
pd.set_option("display.max_colwidth", 90)
defaults_table()

# %% [markdown]
# The defaults are the paper's recipe for models of billions of parameters and tens of thousands of pairs. With a few hundred pairs, $5\cdot10^{-7}$ for ten steps changes nothing:
# small runs need a larger rate. A misspelt setting is an error that guesses what was meant; it also knows what other trainers call it.

# %%
#| export
CALLED = dict(learning_rate="lr", num_train_epochs="epochs", num_epochs="epochs", max_grad_norm="clip", warmup_ratio="warmup", per_device_train_batch_size="token_budget", gradient_accumulation_steps="token_budget",
              train_batch_size="batch_size", bf16="precision", fp16="precision", dtype="precision", torch_dtype="precision", torch_compile="compile", max_seq_length="max_length", save_steps="save_every") # elsewhere

def no_such_setting(name, # as it was typed
                   ) -> str:
    "What to say of a setting that does not exist: its nearest neighbour, or all there are."
    known = [f.name for f in fields(StepwiseConfig)]
    near = [CALLED[name]] if name in CALLED else difflib.get_close_matches(str(name), known, 1)
    return f"unknown setting '{name}'; " + (f"did you mean '{near[0]}'?" if near else f"settings are {', '.join(known)}")

def make_config(settings: dict, # names and values, from a file or a command line
               ) -> StepwiseConfig:
    "A StepwiseConfig; raises ValueError for an unknown setting, naming its nearest neighbour."
    known = {f.name: f.type for f in fields(StepwiseConfig)}
    for name in settings:
        if name not in known: raise ValueError(no_such_setting(name))
    return StepwiseConfig(**{name: _number(v) if known[name] in (int, float) else v for name, v in settings.items()})

def _number(v):
    "YAML reads 1e-4 as text; people mean a number."
    try: return float(v) if isinstance(v, str) else v
    except ValueError: return v


# %% [markdown]
# ## A run is a folder
#
# ```
# run/config.yaml     settings, hashes of S and of the pairs, machine, versions
#     partition.json  measures of each source, chunks
#     base/logprobs/  what M_0 says about every pair
#     stage-1/        metrics.jsonl, checkpoint/, model/, logprobs/, stage.json
#     stage-2/ ...
#     report.md, figures/
# ```
#
# Every model has *one* table of log-probabilities. The table of $M_{t-1}$ is the reference of stage $t$; so "which model is the reference?" is answered by a path and a hash of weights.

# %% [markdown]
# All of it is read again: by the call that goes on, by the report, in a year by you. By then a file may be missing, empty or cut. One function reads them all, so that every complaint says which file it is, what is wrong and what to do.

# %%
#| export
class _Once(yaml.SafeLoader):
    "A name that is given twice is an error; YAML lets the later value win."
    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) > 1: raise yaml.constructor.ConstructorError(problem=f"'{key.value}' is given twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)

def read_yaml(path, # of any YAML file
             ):     # whatever it holds; None where it is empty
    "A YAML file. Raises ValueError, with file and line, for what is not YAML and for a name that is given twice."
    try: return yaml.load(Path(path).read_text(encoding="utf-8"), _Once)
    except UnicodeDecodeError as e: raise ValueError(f"{path}: is not text in UTF-8 ({e.reason})") from e
    except yaml.YAMLError as e:
        mark, problem = getattr(e, "problem_mark", None), getattr(e, "problem", None) or str(e).splitlines()[0]
        raise ValueError(f"{path}: " + (f"line {mark.line + 1}: " if mark else "") + problem) from e

NEEDED = {"config.yaml": {"model", "weights", "sources", "pairs", "device", "settings", "versions"}, "partition.json": {"measures", "names", "chunks"}, "stage.json": {"stage", "chunk", "end", "probes", "steps", "skipped"},
          "held_out.json": set(), "answers.json": {"prompts", "answers"}, "cost.json": {"seconds", "peak_gib"}}

def read_part(path, # of a config.yaml, partition.json or stage.json
             ) -> dict:
    "A file of a run. Raises ValueError: which file, what is wrong with it, what to do."
    path = Path(path)
    with _named(path):
        found = read_yaml(path) if path.suffix == ".yaml" else json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict): raise ValueError("holds no names and values")
        if absent := NEEDED[path.name] - set(found): raise ValueError(f"lacks {', '.join(sorted(absent))}")
    return found

@contextmanager
def _named(path):
    "Whatever goes wrong in reading says where, and what to do."
    try: yield
    except Exception as e:
        why = getattr(e, "strerror", None) or str(e).removeprefix(f"{path}: ").split("\n")[0] or type(e).__name__
        raise ValueError(f"{path}: cannot be used ({why}); {_cure(path)}") from e

_CURES = {
    "config.yaml": "put a copy of it back, or use another folder",
    "partition.json": "remove it and run again: the partition is made anew",
    "held_out.json": "remove it and run again: it is made anew",
    "answers.json": "remove it: the report does without",
    "cost.json": "remove it: the report does without"}

def _cure(path):
    "What to do about a file of a run."
    return _CURES.get(path.name) or f"put it back, or remove {path.parent.name} and the stages after it, and run again: they are trained anew"


# %%
stage = tmp / "stage-1"
stage.mkdir()
for text in ("", "null", '{"stage": 1'):
    (stage / "stage.json").write_text(text)
    try: read_part(stage / "stage.json")
    except ValueError as e: print(str(e).removeprefix(str(tmp)))


# %% [markdown]
# A stage is finished when its `stage.json` is there. Its number counts: with stage 1 gone, the last of two stages is still stage 2. And a copy that you made, `stage-1-before`, is no stage.

# %%
#| export
def finished_stages(folder, # of a run
                   ) -> list[int]:
    "Numbers of the finished stages in a run folder, in order. Another folder beside them is no stage."
    return [t for t in _stage_numbers(folder) if (Path(folder) / f"stage-{t}" / "stage.json").exists()]

def _stage_numbers(folder):
    found = [re.fullmatch(r"stage-([1-9]\d*)", p.name) for p in Path(folder).glob("stage-*")]
    return sorted(int(m[1]) for m in found if m)

def _without_gap(folder):
    "The finished stages, which must be 1, 2, ... for a run to go on or be reported."
    done = finished_stages(folder)
    for t, found in enumerate(done, 1):
        if t != found: raise ValueError(f"{Path(folder) / f'stage-{t}' / 'stage.json'}: is missing, but stage {done[-1]} is finished; put it back, or remove the stages after {t} and run again: they are trained anew")
    return done


# %%
for name in ("stage-2", "stage-10", "stage-1-before"):
    (tmp / name).mkdir()
    (tmp / name / "stage.json").write_text("{}")
assert finished_stages(tmp) == [1, 2, 10]
try: _without_gap(tmp)
except ValueError as e: print(str(e).removeprefix(str(tmp)))
for folder in tmp.glob("stage-*"): shutil.rmtree(folder)


# %% [markdown]
# A model on disk may have been replaced, and nothing else would show it. Each stage wrote down the hash of what it saved; whoever loads the model compares.

# %%
#| export
def load_stage(folder, # of a finished stage
               device: str=None, # as for `load_model`
              ):       # M_t as it lies on disk
    "The model that a stage saved. Raises ValueError where another one lies there."
    folder = Path(folder)
    ended = read_part(folder / "stage.json")
    saved = ended.get("saved") or dict(dtype="float32", weights=ended["end"])
    model = load_model(str(folder / "model"), device)
    _compare(model, getattr(torch, saved["dtype"]), saved["weights"], folder / "model")
    return model

def _compare(model, dtype, weights, path):
    found = weights_hash(model, dtype)
    if found != weights: raise ValueError(f"{path}: has weights {found}, but the stage ended with {weights}; {_cure(path)}")

@dataclass
class Run:
    "A run folder, read."
    folder: Path

    def __post_init__(self): self.folder = Path(self.folder)
    @property
    def config(self) -> dict: return read_part(self.folder / "config.yaml")
    @property
    def stages(self) -> list[dict]: return [read_part(self.folder / f"stage-{t}" / "stage.json") for t in _without_gap(self.folder)]
    @property
    def model(self): return load_stage(self.model_folder().parent)
    @property
    def tokenizer(self): return load_tokenizer(str(self.model_folder()))
    @property
    def metrics(self) -> pd.DataFrame: # one optimizer step of a finished stage a row
        return pd.concat([_steps(self.folder / f"stage-{t}" / "metrics.jsonl").assign(stage=t) for t in _without_gap(self.folder)], ignore_index=True)

    def model_folder(self, t: int=None) -> Path: # of M_t; 0: S, perhaps a hub id; none: of the last finished stage
        "Where a model lies, as `from_pretrained` reads it."
        if t == 0: return Path(self.config["model"])
        if t is None and not finished_stages(self.folder): raise ValueError(f"{self.folder}: no stage is finished, so there is no model yet")
        return self.folder / f"stage-{t or finished_stages(self.folder)[-1]}" / "model"
    def partition(self) -> pd.DataFrame: return pd.DataFrame(read_part(self.folder / "partition.json")["measures"]).set_index("source")
    def table(self) -> pd.DataFrame: return stage_table(self)
    def held_out(self) -> pd.DataFrame: return held_out_table(self)
    def signs(self) -> list[str]: return failure_signs(gamma_table(self), self.metrics)
    def report(self): return write_report(self)
    def export(self, folder) -> Path: return export_model(self, folder)
    def push(self, repo_id: str, private: bool=True) -> str: return push_model(self, repo_id, private)

def _steps(path):
    "metrics.jsonl of a finished stage as a data frame."
    ended = read_part(path.parent / "stage.json")
    made = ended["steps"] + ended["skipped"]
    with _named(path):
        steps = pd.read_json(path, lines=True)
        if "loss" not in steps: raise ValueError("it holds no steps")
        if len(steps) != made: raise ValueError(f"it holds {len(steps)} steps, and the stage made {made}")
    return steps


# %% [markdown]
# A folder belongs to one run. Called again with the same settings it goes on; with others it refuses, naming the setting. Only how often a checkpoint is written, and who is told of each step, may change.
# `precision="auto"` is recorded as what it meant on this machine, so that another machine cannot go on in another precision unnoticed. As long as nothing has been trained, there is nothing to protect: then *how* things are computed may still change, and the partition is measured anew.

# %%
#| export
FREE = {"save_every", "log_with"}

HOW = {"precision"} | COMPUTED_ALIKE - FREE # may change until the first update is saved

def _has_trained(folder): return any((folder / f"stage-{t}" / name).exists() for t in _stage_numbers(folder) for name in ("checkpoint/state.pt", "stage.json"))

def _recorded(v):
    "A setting as config.yaml can hold it: of a function, the name."
    return v if isinstance(v, (int, float, str, list, type(None))) else getattr(v, "__qualname__", type(v).__name__)

SAID = {"base": "a config of S with the hash", "held_out_pairs": "held-out pairs with the hash"} # of what has no name that people know

RECORDED = "weights reference_weights pairs held_out_pairs base versions device not_deterministic machine command".split() # in config.yaml, beside what was asked for

def _compared(config):
    "What must agree between two calls on one folder."
    compared = {k: v for k, v in (config | config["settings"]).items() if k not in FREE | {"settings", "versions", "machine", "device", "model", "revision", "not_deterministic", "command"}}
    return compared | dict(sources=list(config["sources"])) # the names; where the data lie may change, what they are may not

def _open_folder(folder, config, precision, identity) -> str:
    "Write config.yaml, or compare with the one that is there; raises ValueError naming the first difference. Returns what may change the last bits."
    settings = {f.name: _recorded(getattr(config, f.name)) for f in fields(config)} | dict(precision=precision)
    new = identity | dict(settings=settings, versions=_versions(), command=_command())
    path = folder / "config.yaml"
    if path.exists():
        there = read_part(path)
        old, now = _compared(there), _compared(new)
        if there["versions"].get("transformers") != new["versions"]["transformers"]: old["base"] = now["base"] # another version may give a config more fields
        old = {k: now[k] for k in ("base", "held_out_pairs", "eval_share")} | old      # a folder from before they were recorded
        differs = sorted((k for k in now if old.get(k) != now[k]), key=lambda k: k not in settings) # a setting says more than the hash that it changed
        if not differs: return _otherwise(there, new)
        k = next((k for k in differs if k not in HOW), differs[0])
        if k not in HOW or _has_trained(folder): raise ValueError(f"{folder}: this run was started with {SAID.get(k, k)} = {old.get(k)}, not {now[k]}; use that or another folder")
        print(f"{folder}: nothing was trained here yet; goes on with " + ", ".join(f"{k} = {now[k]}" for k in differs))
        (folder / "partition.json").unlink(missing_ok=True)
    with replacing(path) as tmp: tmp.write_text(yaml.safe_dump(new, sort_keys=False))
    return ""


# %% [markdown]
# What is left is the machine. With another number of threads a sum is added up in another order, and other versions may compute in another way. That is no mistake, so a run goes on; but it says so.

# %%
#| export
def _versions():
    "Of what computes, and of this package with the commit that it is at, where that can be known."
    found = {p: version(p) for p in ("torch", "transformers", "datasets", "accelerate", "sdpo_nb")}
    here = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
    try: commit = subprocess.run(["git", "-C", here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError): return found
    if commit.returncode == 0 and "site-packages" not in here.parts: found["sdpo_nb"] += f" at {commit.stdout.strip()}"
    return found

def _command():
    "What was typed; of a call from Python, the script."
    name = Path(sys.argv[0]).name
    return shlex.join(["sdpo" if name in ("sdpo", "cli.py") else name, *sys.argv[1:]])

def _machine(device):
    "What the last bits depend on, beside the settings."
    if device.type == "cuda": return dict(card=torch.cuda.get_device_name(device))
    return dict(threads=torch.get_num_threads(), cpu=torch.backends.cpu.get_cpu_capability())

def _otherwise(old, new):
    "A sentence, where two calls on one folder compute on different machines."
    def facts(config): return dict(device=config["device"]) | config.get("machine", {}) | config["versions"]
    was, now = facts(old), facts(new)
    def said(k): return f"{now[k]} {'thread' if now[k] == 1 else 'threads'}" if k == "threads" else f"{k} {now[k]}"
    differs = [f"{said(k)}, started with {was[k]}" for k in now if k in was and was[k] != now[k]]
    return f"goes on with {'; with '.join(differs)}: the last bits may differ" if differs else ""


# %%
here = dict(device="cpu", machine=dict(threads=1, cpu="AVX2"), versions=dict(torch="2.13.0"))
assert _otherwise(here, here) == ""
_otherwise(here, here | dict(machine=dict(threads=2, cpu="AVX2"), versions=dict(torch="2.14.0")))


# %% [markdown]
# Two processes in one folder would write the same checkpoint and each other's metrics. So a call holds a lock while it works. The system gives the lock back when a process dies, however it dies; there is nothing to clean up. A folder that holds stages but no `config.yaml` is refused, too: nobody knows with which settings they were trained.

# %%
#| export
@contextmanager
def alone_in(folder, # of a run; made where it is missing
            ):       # a context, for as long as the work takes
    "Hold a folder's lock. Raises ValueError where another process has it, or where a launcher started several. On Windows, and on a disk that cannot be written to, there is none."
    check_one_process()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = _open_lock(folder / ".lock") if fcntl else None
    try:
        if lock is not None and not _take(lock): raise ValueError(f"{folder}: another process works in this folder; wait until it has ended, or use another folder")
        yield
    finally:
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_UN)     # said, not left to closing: a process that was forked may still hold a copy
            os.close(lock)

def _open_lock(path):
    try: return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError: return None

def _take(lock) -> bool:
    try: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError: return False
    except OSError: pass                         # a file system without locks
    return True

def _check_fresh(folder):
    "Raise ValueError for parts of a run without config.yaml. A base/model alone is what an interrupted or refused call with a loaded model leaves; it is written anew."
    if (folder / "config.yaml").exists(): return
    parts = [folder / f"stage-{t}" for t in _stage_numbers(folder)] + list(folder.glob("partition.json")) + [p for p in (folder / "base").glob("*") if p.name not in ("model", "model.tmp")]
    if parts: raise ValueError(f"{folder}: not empty and not a run, there is {parts[0].relative_to(folder)} but no config.yaml; use another folder")


# %%
with alone_in(tmp / "once"):
    try:
        with alone_in(tmp / "once"): pass
    except ValueError as e: print(str(e).removeprefix(str(tmp)))
with alone_in(tmp / "once"): pass                # it has been given back


# %% [markdown]
# ## Models are folders, too
#
# One mistake with DPO in stages is easy to make and hard to see, a reference that silently is another model: a trainer that reloads "the" model by its name gets S instead
# of $M_1$. Here a model that comes in as an object is first saved into the run, and from then on every model is a path. A folder appears under its name only when it is complete. Models are written in the dtype of S: who brings a bf16 model gets one back. Inside the run they stay fp32, so the checkpoint of the
# last stage is kept until the next one is finished, and a run that goes on starts from there, not from the rounded file. Rounding may also swallow what was learned: a weight of bf16 moves only if it moved by half the distance to its neighbour. A stage counts how many did, and says so where most did not.

# %%
#| export
def save_model(model, tokenizer, path,
               dtype: torch.dtype=None): # of the file; default: the model's own
    "`save_pretrained` under a temporary name, then renamed. Everybody may read it who may read your files; safetensors alone would write for you only."
    with replacing(path) as tmp:
        if dtype in (None, model.dtype): model.save_pretrained(tmp)
        else: _save_rounded(model, tmp, dtype)
        tokenizer.save_pretrained(tmp)
        usual = (tmp / "config.json").stat().st_mode
        for file in tmp.glob("*.safetensors"): file.chmod(usual)

def _save_rounded(model, path, dtype):
    "The model stays as it is; the file, and what its config says of it, are of another dtype."
    rounded = {id(p): p.detach().to(dtype) for p in model.parameters()}      # tied weights stay one tensor
    state = {name: rounded.get(id(p), p) for name, p in model.state_dict(keep_vars=True).items()}
    model.save_pretrained(path, state_dict=state)
    config = json.loads((path / "config.json").read_text())
    config.pop("torch_dtype", None)
    write_json(path / "config.json", config | dict(dtype=str(dtype).removeprefix("torch.")))

def _base(model, tokenizer, folder, revision=None):
    "The path of S, and its tokenizer."
    if isinstance(model, (str, Path)): return str(model), tokenizer or load_tokenizer(str(model), revision)
    check_model(model)
    if tokenizer is None: raise ValueError("model: a loaded model needs its tokenizer, sdpo(model=..., tokenizer=...)")
    path, started = folder / "base" / "model", (folder / "config.yaml").exists()
    if started and (mine := weights_hash(model, torch.float32)) != (theirs := Run(folder).config["weights"]):
        raise ValueError(f"{folder}: this run was started with a model of weights {theirs}, the loaded one has {mine}; use that or another folder")
    if not (started and path.exists()): path.parent.mkdir(parents=True, exist_ok=True); save_model(model, tokenizer, path)
    return str(path), tokenizer

def _free(model): model.to("meta") # gives the memory back, whoever still holds the object


# %%
#| export
def share_changed(model,         # M_t, in fp32
                  before: str,   # folder or hub id of the model that it came from
                  dtype: torch.dtype,
                  revision: str=None, # of a hub id
                 ) -> float:
    "Share of the weights that differ between two models, once both are rounded."
    old = dict(load_model(before, "cpu", revision).named_parameters())
    moved = sum((p.detach().cpu().to(dtype) != old[name].to(dtype)).sum().item() for name, p in model.named_parameters())
    return moved / model.num_parameters()


# %% [markdown]
# A reference from elsewhere is asked about *our* token ids. With another vocabulary it would answer, finitely and about other texts; so the vocabularies are compared. Its
# weights are hashed into config.yaml, since a path is a name, too.

# %%
#| export
def _foreign(reference, tokenizer):
    "Weights of a reference that is a folder, else None; raises ValueError where a token has another id."
    if reference in ("moving", "fixed"): return None
    try: theirs = load_tokenizer(reference).get_vocab()
    except Exception as e: raise ValueError(f"reference: no tokenizer in {reference} can be read, so its tokens cannot be compared with the model's") from e
    other = [token for token, i in tokenizer.get_vocab().items() if theirs.get(token) != i]
    if other: raise ValueError(f"reference: {reference} has another vocabulary, {len(other)} tokens of the model have another id or none, e.g. {min(other)!r}")
    return weights_hash(load_model(reference, "cpu"))


# %%
#| export
@dataclass
class _Context:
    "What every stage needs to know."
    config: StepwiseConfig; folder: Path; base: str; tokenizer: object; device: object; precision: str; logprobs: object
    dtype: torch.dtype # of S on disk, and so of every M_t
    revision: str = None # of S on the hub
    otherwise: str = "" # what may change the last bits, said when training goes on
    held: list = field(default_factory=list) # sources that are never trained on
    talks: bool = False # of a tiny model, whose runs come by the hundred, nothing is said
    clock: Clock = None
    chosen: dict = field(default_factory=dict)
    before: int = 0 # optimizer steps of the stages that are finished
    tracker: object = None
    on_step: object = None
    on_stage: object = None

    def at(self, t): return self.folder / (f"stage-{t}" if t else "base")
    def load(self, t): # M_t in fp32; where the model on disk is rounded, the checkpoint has it exactly
        if not t: return load_model(self.base, self.device, self.revision)
        model = load_stage(self.at(t), self.device)
        exact = read_checkpoint(self.at(t)) if self.dtype != torch.float32 else None
        if exact:
            model.load_state_dict(exact["model"])
            _compare(model, None, read_part(self.at(t) / "stage.json")["end"], self.at(t) / "checkpoint")
        return model
    def table(self, t): return read_table(self.at(t) / "logprobs")
    def score(self, t, model, pairs, what): # the table of M_t, once it holds these pairs
        return self.score_to(self.at(t) / "logprobs", model, pairs, f"{'the model of stage ' + str(t) if t else 'S'} reads {what}")
    def score_all(self, t, model, chunks): # on what every model is measured on
        for d in chunks: self.score(t, model, d.probe(self.config.probe), d.name)
        for s in self.held: self.score(t, model, s.pairs, f"{s.name}, held out")
    def after_step(self, t, row):
        if self.tracker: self.tracker.log({k: float(v) for k, v in row.items() if isinstance(v, (int, float))} | dict(stage=t), step=self.before + row["step"])
        if self.on_step: self.on_step(dict(stage=t) | row)
    def how(self, model, pairs): # packed or padded: asked once for each kind of model
        kind = type(model).__name__
        if kind not in self.chosen: self.chosen[kind] = self.logprobs or choose_logprobs(model, [pairs[i] for i in range(min(len(pairs), 64))], self.config.packing, self.precision)
        if wants_compiling(self.config, model.device): compile_for(model, self.chosen[kind], self.precision, self.config)
        return self.chosen[kind]
    def score_to(self, folder, model, pairs, desc):
        how = self.how(model, pairs)
        return score_pairs(model, pairs, folder, self.precision, how, _scoring_budget(self.config, how, model.device), desc=desc, clock=self.clock)

def _scoring_budget(config, logprobs, device):
    "Tokens of a forward pass without gradients. Nothing is kept for a backward pass, so a packed row may be longer than in training."
    tokens = config.token_budget or (MOST // 4 if torch.device(device).type == "cuda" else 4096)
    return tokens * (4 if getattr(logprobs, "attention", "") in ("packed", "flash") else 1)


# %% [markdown]
# ## Sources
#
# A source may come as a path, a hub id, rows in memory, or a dict with the arguments of `load_pairs` when columns need other names. What was read, dropped and cut is said before anything is computed, and again in the report.

# %%
#| export
_SPEC = {"source", "split", "revision", "columns", "chat", "max_pairs", "eval_share"}

def load_sources(sources: dict, # name -> path, hub id, rows, Dataset, `Source`, or dict(source=, split=, revision=, columns=, chat=, max_pairs=, eval_share=)
                 tokenizer, config: StepwiseConfig,
                 called: str="sources") -> list[Source]: # in messages
    "Tokenise every source; raises ValueError naming the one that cannot be used."
    if not sources or not isinstance(sources, dict): raise ValueError(f"{called}: expected {{'name': 'file, folder or hub id'}}, with at least one name")
    out = []
    for name, what in sources.items():
        spec = dict(what) if isinstance(what, dict) else dict(source=what)
        if not {"source"} <= set(spec) <= _SPEC: raise ValueError(f"source '{name}': a dict needs 'source' and may have {', '.join(sorted(_SPEC - {'source'}))}; got {', '.join(map(str, spec))}")
        if isinstance(what, Source): out.append(what); continue
        chat, most, share = spec.pop("chat", False), spec.pop("max_pairs", None), spec.pop("eval_share", 0)
        if type(share) not in (int, float): raise ValueError(f"source '{name}': eval_share must be a number from 0 to below 1, got {share!r}")
        if type(chat) is not bool: raise ValueError(f"source '{name}': chat must be true or false, got {chat!r}")
        if most is not None and not (type(most) is int and most >= 1): raise ValueError(f"source '{name}': max_pairs must be a whole number from 1, got {most!r}")
        try: data = load_pairs(**spec)
        except (ValueError, OSError) as e: raise ValueError(f"source '{name}': {e}") from e
        data = data.select(range(min(most or len(data), len(data))))
        out.append(tokenize_pairs(data, tokenizer, name, config.max_length, config.max_prompt_length, chat))
    return out

def data_notes(source: Source,
               templated: bool=False, # whether the tokenizer has a chat template
              ) -> list[str]: # first what was read and used, then whatever is worth a second look
    "What was read, dropped and cut, in words."
    c, name = source.counts, source.name
    if not c: return []                          # a source that somebody made by hand
    used, rows = c["usable"], c["rows"]
    lost = ", ".join(f"{n} {why}" for why, n in source.dropped().items())
    parts = [f"{rows} rows read", f"{used} used"]
    if lost: parts.append(f"dropped: {lost}")
    if c["truncated"]: parts.append(f"{c['truncated']} cut")
    if "held_out" in c: parts.append(f"{c['held_out']} held out")
    out = [f"{name}: {', '.join(parts)}; {'conversations' if c['chat'] else 'plain text'}; {pair_tokens(source.pairs).sum():,} tokens"]
    if used < 0.95 * rows: out.append(f"  warning: {1 - used / rows:.0%} of {name} are dropped" + ("; a larger max_length keeps more" if c["no_room"] else ""))
    if c["truncated"] > 0.3 * used: out.append(f"  warning: {c['truncated'] / used:.0%} of the pairs of {name} lose the end of a response; a larger max_length keeps it")
    if c["prompt_truncated"] > 0.05 * used: out.append(f"  warning: {c['prompt_truncated'] / used:.0%} of the prompts of {name} lose their beginning; max_prompt_length is too small for them")
    if c["both_labels"]: out.append(f"  warning: {c['both_labels']} pairs of {name} occur with the opposite label, too")
    if templated and not c["chat"]: out.append(f"  note: {name} is plain text, so the model's chat template is not used; chat = true (--chat) uses it")
    if c["duplicates"]: out.append(f"  note: {c['duplicates']} pairs of {name} occur more than once")
    return out


# %%
made_up = [dict(prompt=p, chosen=c, rejected="ba") for p, c in (("copy ab", "ab"), ("copy ab", "ab"), ("copy ab", ""), ("copy abcdefghij", "abcdefghij"))]
made_up, = load_sources(dict(made_up=made_up), load_tokenizer(w.base), StepwiseConfig(max_length=16))
print("\n".join(data_notes(made_up, templated=True)))


# %% [markdown]
# Some pairs may be kept aside: a share of each source ([by prompt](01_preferences.ipynb)), or sources of their own. They are measured after every stage, and lead the report. A source of one's own may hold prompts that are trained on, too; that is said.

# %%
#| export
def part_sources(read: list,    # of `load_sources`
                 sources: dict, # what it was given
                 config: StepwiseConfig,
                ) -> tuple[list[Source], list[Source]]: # to train on, held out
    "Hold out a share of every source; one that names an `eval_share` of its own has that."
    asked = [what.get("eval_share", config.eval_share) if isinstance(what, dict) else config.eval_share for what in sources.values()]
    parts = [hold_out(s, share) for s, share in zip(read, asked)]
    return [train for train, _ in parts], [held for _, held in parts if held]

def read_sources(sources: dict, held_out: dict, tokenizer, config: StepwiseConfig) -> tuple[list[Source], list[Source]]:
    "What is trained on, and what is held out of it or comes as sources of its own."
    read, held = part_sources(load_sources(sources, tokenizer, config), sources, config)
    return read, held + _own(held_out, tokenizer, config)

def _own(held_out, tokenizer, config): return load_sources(held_out, tokenizer, config, "held_out") if held_out else []

def _check_held(held, loaded) -> list[str]:
    "A line for each held-out source whose prompts are trained on as well. Raises ValueError for a name that occurs twice."
    names = [s.name for s in held]
    for n in names:
        if names.count(n) > 1: raise ValueError(f"held_out: '{n}' is also the name of a source of which a share is held out; give it another name")
    trained = {tuple(ids) for s in loaded if held for ids in s.pairs["prompt_ids"]}
    seen = {s.name: sum(tuple(ids) in trained for ids in s.pairs["prompt_ids"]) for s in held}
    return [f"  warning: {n} of the {len(s)} held-out pairs of {s.name} have a prompt that is trained on" for s in held if (n := seen[s.name])]


# %%
riddle, = load_sources(dict(riddle=w.sources["riddle"]), tok, StepwiseConfig())
(train,), (held,) = part_sources([riddle], dict(riddle=w.sources["riddle"]), StepwiseConfig(eval_share=0.1))
assert len(train) + len(held) == len(riddle) and _check_held([held], [train]) == []
data_notes(train) + _check_held([held], [riddle])


# %% [markdown]
# ## Chunks
#
# Usually the partition decides: one chunk per source, or the ordered rows in T equal parts. For experiments the chunks may also be given, as lists of source names,
# or made on the way by a function that sees $M_{t-1}$, so that data can be generated between stages. Whatever was decided is written down and read again, or a continued run
# would train on other pairs: on another machine, accuracies that nearly tie may change places.

# %%
#| export
@dataclass
class Chunk:
    "D_t: what one stage trains on."
    name: str; pairs: Dataset

    def probe(self, n: int) -> Dataset:
        "At most n pairs, the same for every model."
        if len(self.pairs) <= n: return self.pairs
        return self.pairs.select(sorted(torch.randperm(len(self.pairs), generator=torch.Generator().manual_seed(0))[:n].tolist()))

def _partitioned(loaded, policy, ctx):
    "Chunks by the partition under M_0; its pass over the pairs is kept, and is stage 1's reference table."
    c, path = ctx.config, ctx.folder / "partition.json"
    for s in loaded: table = ctx.score(0, policy, s.pairs, s.name)
    if not path.exists():
        part = partition(loaded, table, c.order, c.chunks if isinstance(c.chunks, int) else None, c.seed)
        write_json(path, dict(order=c.order, measures=part.measures.to_dict("records"), names=part.names, chunks=part.chunks, counts=counts_table(loaded).reset_index().to_dict("records")))
    decided, pairs = read_part(path), concatenate_datasets([s.pairs for s in loaded])
    with _named(path):
        if sorted(sum(decided["chunks"], [])) != list(range(len(pairs))) or len(decided["names"]) != len(decided["chunks"]): raise ValueError("its chunks do not hold every pair once")
    return [Chunk(name, pairs.select(rows)) for name, rows in zip(decided["names"], decided["chunks"])]


# %%
#| export
def _check_chunks(chunks, loaded):
    "Chunks that are possible with these sources, found out before anything is computed; lists of names become sources."
    if isinstance(chunks, int) and chunks > sum(map(len, loaded)): raise ValueError(f"chunks: {chunks} chunks cannot be cut from {sum(map(len, loaded))} pairs")
    if not isinstance(chunks, list): return loaded
    by_name = {s.name: s for s in loaded}
    for n in sum(chunks, []):
        if n not in by_name: raise ValueError(f"chunks: there is no source '{n}'; sources are {', '.join(by_name)}")
    return [Source("+".join(g), concatenate_datasets([by_name[n].pairs for n in g]), {}) for g in chunks]

def _made(t, policy, ctx):
    "The chunk that the user's function makes for stage t, or None; kept in the stage's folder."
    path = ctx.at(t) / "chunk"
    if not path.exists():
        got = ctx.config.chunks(t, policy)
        if got is None: return None
        if not isinstance(got, Source): got = tokenize_pairs(load_pairs(got), ctx.tokenizer, f"chunk {t}", ctx.config.max_length, ctx.config.max_prompt_length)
        check_rows(policy, *_extent(got.pairs))
        _say_data(data_notes(got, bool(ctx.tokenizer.chat_template)), ctx.talks)
        with replacing(path) as tmp: got.pairs.save_to_disk(str(tmp))
    return Chunk(f"chunk {t}", load_from_disk(str(path)))


# %% [markdown]
# ## One stage
#
# The order of these lines is the point. The reference table is computed with the model that *is* the reference at this moment, before the target is reset or trained. There
# is never a second model in memory: a foreign reference is loaded in the policy's place and given back. What $M_{t-1}$ says about the probes was written down when its stage ended. Should that table be lost, or be of another kind on this machine, it is made again first, in the same order.

# %%
#| export
def _reference(t, chunks, policy, ctx):
    "Stage t's reference: (table, its name, policy)."
    ref, pairs, name = ctx.config.reference, chunks[t-1].pairs, chunks[t-1].name
    if ref == "moving": return ctx.score(t-1, policy, pairs, name), f"M_{t-1}", policy
    if ref == "fixed" and t == 1: return ctx.score(0, policy, pairs, name), "S", policy
    if ref == "fixed" and callable(ctx.config.chunks): ref = ctx.base    # S has not seen these pairs yet
    if ref == "fixed": return ctx.table(0), "S", policy
    _free(policy); other = load_model(ref, ctx.device)
    need = concatenate_datasets([pairs, *(c.probe(ctx.config.probe) for c in chunks[t:t+1])])
    table = ctx.score_to(ctx.at(t) / "reference", other, need, f"reference on {name}")
    _free(other)
    return table, "S" if ref == ctx.base else ref, ctx.load(t-1)


# %%
#| export
def _stage(t, chunks, policy, ctx):
    "Train M_t, measure it, save it; returns it."
    c, folder, chunk = ctx.config, ctx.at(t), chunks[t-1]
    if ctx.otherwise: print(f"{ctx.folder}: {ctx.otherwise}"); ctx.otherwise = ""
    start, ctx.clock.left = time.time(), _tokens_ahead(t, chunks, ctx)
    if t > 1: ctx.score_all(t-1, policy, chunks[:t-1] if callable(c.chunks) else chunks)
    table, reference, policy = _reference(t, chunks, policy, ctx)
    ctx.score(t-1, policy, chunk.probe(c.probe), chunk.name)
    if t == 1: _answer(0, policy, chunks, ctx)
    if c.init_target == "S" and t > 1: _free(policy); policy = ctx.load(0)
    came_in = weights_hash(policy)
    summary = train_stage(policy, chunk.pairs, table, c, folder, t, logprobs=ctx.how(policy, chunk.pairs), clock=ctx.clock, on_step=lambda row: ctx.after_step(t, row), **_going_on(t, chunks, ctx))
    ctx.score_all(t, policy, chunks)
    _answer(t, policy, chunks, ctx)
    write_json(folder / "cost.json", dict(seconds=round(time.time() - start), peak_gib=round(peak_memory(ctx.device) / GIB, 2)))
    save_model(policy, ctx.tokenizer, folder / "model", ctx.dtype)
    saved = _saved(t, policy, ctx)
    ended = dict(stage=t, chunk=chunk.name, pairs=len(chunk.pairs), reference=reference, reference_kind=table.kind, start=came_in,
                                           end=weights_hash(policy), saved=saved, probes={d.name: d.probe(c.probe)["key"][:] for d in chunks}, **summary, **_measures(t, chunks, table, ctx))
    write_json(folder / "stage.json", ended)
    ctx.before += summary["steps"]
    if ctx.talks: print(_stage_line(ended, len(chunks)))
    if ctx.on_stage: ctx.on_stage(Run(ctx.folder))
    return policy

def _stage_line(s, T):
    "One line about a stage that has ended."
    mean, low, high = s["gamma_change"]
    return f"stage {s['stage']} of {T}, {s['chunk']}: {s['steps']} steps against {s['reference']}, first loss {s['first_loss']:.3f}; gamma changed by {mean:+.2f} [{low:+.2f}, {high:+.2f}] nats; chosen preferred in {s['accuracy_before']:.0%}, now {s['accuracy']:.0%}"

ASKED = 4 # prompts that every model answers, for the report

def _answer(t, model, chunks, ctx):
    "What M_t answers to a few prompts, held-out ones if there are any, into answers.json. A model that cannot generate has none."
    path = ctx.at(t) / "answers.json"
    if path.exists(): return
    sets = [s.pairs for s in ctx.held] or [d.pairs for d in chunks]
    ids = [pairs[i]["prompt_ids"] for i in range(ASKED) for pairs in sets if i < len(pairs)][:ASKED]
    try: said = greedy_answers(model, ctx.tokenizer, ids, precision=ctx.precision)
    except Exception as e: print(f"no answers for the report: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")
    else: write_json(path, dict(prompts=[ctx.tokenizer.decode(x) for x in ids], answers=said))

def _tokens_ahead(t, chunks, ctx) -> float:
    "Tokens of forward passes from stage t to the end; training counts threefold."
    c, every, probed = ctx.config, [pair_tokens(d.pairs).sum() for d in chunks], [pair_tokens(d.probe(ctx.config.probe)).sum() for d in chunks]
    first = max(t, 2) - 1                        # the reference of stage 1 was computed for the partition
    reference = sum(every[first:]) - sum(probed[first:])          # and of every later one, the probes when the stage before it ended
    measured = sum(probed) + sum(pair_tokens(s.pairs).sum() for s in ctx.held)
    return reference + TRAINING * c.epochs * sum(every[t-1:]) + (len(chunks) - t + 1) * measured

def _saved(t, policy, ctx):
    "What stage.json says about the model on disk."
    saved = dict(dtype=str(ctx.dtype).removeprefix("torch."), weights=weights_hash(policy, ctx.dtype))
    if ctx.dtype == torch.float32: return saved
    before = ctx.base if t == 1 or ctx.config.init_target == "S" else str(ctx.at(t-1) / "model")
    changed = share_changed(policy, before, ctx.dtype, ctx.revision)
    if changed < 0.5: print(f"stage {t}: in {saved['dtype']}, the dtype of S, only {changed:.1%} of the saved weights differ from those before the stage; save_dtype = fp32 keeps the rest of what was learned")
    return saved | dict(changed=changed)

def _going_on(t, chunks, ctx):
    "With restart = never: the folder whose optimizer goes on, and where this stage stands in the one schedule."
    if ctx.config.restart == "stage": return {}
    steps = [ctx.config.epochs * math.ceil(len(c.pairs) / ctx.config.batch_size) for c in chunks]
    return dict(previous=ctx.at(t-1) if t > 1 else None, schedule=(sum(steps[:t-1]), sum(steps)))


# %% [markdown]
# After the stage, numbers that a table of losses would not show, all on the probe of $D_t$: $\gamma$ before and after with a *paired* interval, the
# [certificate](03_loss.ipynb) from an evaluation pass of $M_t$ (not from the running loss), and the share of pairs that it does not speak of, those that fell below their reference.

# %%
#| export
def _measures(t, chunks, table, ctx):
    "What the report says about stage t."
    c, rows = ctx.config, list(chunks[t-1].probe(ctx.config.probe))
    ref, before, after = table.gamma(rows), ctx.table(t-1).gamma(rows), ctx.table(t).gamma(rows)
    loss = dpo_loss(after, ref, c.beta).mean().item()
    ahead = table.gamma(chunks[t].probe(c.probe)).mean().item() if t < len(chunks) else None
    return dict(gamma_ref=table.gamma(chunks[t-1].pairs).mean().item(), gamma_ref_next=ahead, gamma=after.mean().item(), probe=len(rows), gamma_change=mean_interval(after - before),
                loss=loss, certificate=certificate(loss, ref.mean().item(), c.beta), below_reference=(after < ref).float().mean().item(),
                accuracy_before=reward_accuracy(before).mean().item(), accuracy=reward_accuracy(after).mean().item())


# %% [markdown]
# ## The loop
#
# Who wants to follow a run elsewhere names a tracker that Accelerate knows; whoever wants to do something after each step or stage gives a function. Neither can change what is computed.

# %%
#| export
@contextmanager
def tracking(config: StepwiseConfig, folder):
    "An Accelerator with the tracker of `log_with` begun, or None."
    accelerator = _tracker(config, folder)
    if accelerator is None:
        yield None
        return
    settings = {f.name: _recorded(getattr(config, f.name)) for f in fields(config)}
    accelerator.init_trackers("sdpo", {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in settings.items()})
    try: yield accelerator
    finally: accelerator.end_training()

def _tracker(config, folder):
    "An Accelerator that knows the tracker, or None. Raises ValueError for one that is unknown or not installed."
    if config.log_with == "none": return None
    with warnings.catch_warnings(action="ignore"):
        try: accelerator = Accelerator(log_with=config.log_with, project_dir=Path(folder) / "tracker")
        except ValueError as e: raise ValueError(f"log_with: {str(e).splitlines()[0]}") from e
    if not accelerator.log_with: raise ValueError(f"log_with: {config.log_with} is not installed; pip install {config.log_with}, or take none")
    return accelerator


# %%
try:
    with tracking(StepwiseConfig(log_with="paper"), tmp): pass
except ValueError as e: print(e)


# %%
#| export
def sdpo(model,              # hub id, folder, or a loaded causal LM (then with its tokenizer)
         sources: dict=None, # name -> path, hub id, rows, ...; see `load_sources`; none where `chunks` is a function
         config: StepwiseConfig=None,
         folder="runs/sdpo", # the run's; the same call on the same folder goes on where it stopped
         tokenizer=None,
         logprobs=None, # (model, pairs) -> (chosen, rejected); None: packed where `config.packing` allows and the guard agrees
         revision: str=None, # commit of a model on the hub
         held_out: dict=None, # sources of their own that are measured after every stage and never trained on
         on_step=None,  # called after each optimizer step, with its line of metrics.jsonl and the stage, as a dict
         on_stage=None, # called after each stage, with the run as it stands
        ) -> Run:
    "Stepwise DPO (arXiv 2403.19270, section 3): one DPO stage per chunk, the reference moving up."
    with alone_in(folder):
        ctx, chunks, policy = _prepare(model, sources, config, folder, tokenizer, logprobs, revision, held_out)
        ctx.on_step, ctx.on_stage = on_step, on_stage
        with tracking(ctx.config, ctx.folder) as ctx.tracker: run = _all_stages(ctx, chunks, policy)
        run.report()
    return run

def _all_stages(ctx, chunks, policy):
    "From the last finished stage to the end."
    made, t = callable(ctx.config.chunks), len(_without_gap(ctx.folder))
    if t: _free(policy); policy = ctx.load(t)
    if made: chunks = [_made(i, None, ctx) for i in range(1, t + 1)]
    ctx.before = sum(s["steps"] for s in Run(ctx.folder).stages)
    while True:
        if made and (new := _made(t + 1, policy, ctx)): chunks.append(new)
        _drop_checkpoints(ctx, last=t == len(chunks))
        if t == len(chunks): break
        t += 1; policy = _stage(t, chunks, policy, ctx)
    if not t: raise ValueError("chunks: the function returned no pairs for stage 1")
    return Run(ctx.folder)

def _drop_checkpoints(ctx, last):
    "Those of finished stages, unless the next stage takes over the optimizer. The last stage's holds its exact weights, where the model on disk is rounded, and stays until no other follows."
    if ctx.config.restart != "stage": return
    finished = finished_stages(ctx.folder)
    if ctx.dtype != torch.float32 and not last: finished = finished[:-1]
    for t in finished: shutil.rmtree(ctx.at(t) / "checkpoint", ignore_errors=True)


# %%
#| export
def sdpo_partition(model, sources: dict=None, config: StepwiseConfig=None, folder="runs/sdpo", tokenizer=None, logprobs=None, revision: str=None, held_out: dict=None) -> Run:
    "The beginning of `sdpo`: the pass of M_0 and the partition. `sdpo` with the same arguments goes on from here."
    with alone_in(folder): return Run(_prepare(model, sources, config, folder, tokenizer, logprobs, revision, held_out)[0].folder)

def _prepare(model, sources, config, folder, tokenizer, logprobs, revision, held_out):
    config, folder = config or StepwiseConfig(), Path(folder)
    _tracker(config, folder)                     # an impossible one is found out before anything is computed
    made = callable(config.chunks)
    if made and sources: raise ValueError("sources: chunks is a function, which brings its own pairs; leave sources out")
    _check_fresh(folder)
    _check_names(sources)
    _check_names(held_out)
    base, tokenizer = _base(model, tokenizer, folder, revision)
    read, held = ([], _own(held_out, tokenizer, config)) if made else read_sources(sources, held_out, tokenizer, config)
    loaded = [] if made else _check_chunks(config.chunks, read)
    theirs = _foreign(config.reference, tokenizer)
    policy = load_model(base, None if config.device == "auto" else config.device, revision)
    check_model(policy)
    for s in loaded + held: check_rows(policy, *_extent(s.pairs))
    device, precision = policy.device, pick_precision(config.precision, policy.device)
    talks = policy.num_parameters() >= SMALL
    if talks: _say_memory(policy.config, config, precision, device)
    ctx = _Context(config, folder, base, tokenizer, device, precision, logprobs, stored_dtype(base, revision) if config.save_dtype == "S" else torch.float32, revision, held=held, talks=talks, clock=Clock(0))
    of_S = table_kind(policy, precision, response_logprobs)
    identity = dict(model=base, revision=revision, weights=of_S["weights"], base=of_S["config"], sources={s.name: _written(what) for s, what in zip(read, (sources or {}).values())}, reference_weights=theirs, device=device.type, machine=_machine(device),
                    pairs=pairs_hash(*(s.pairs for s in loaded)), held_out_pairs=pairs_hash(*(s.pairs for s in held)) if held else None, not_deterministic=_not_deterministic(policy, loaded, ctx))
    ctx.otherwise = _open_folder(folder, config, precision, identity)
    for s in read + [s for s in held if s.counts]: _say_data(data_notes(s, bool(tokenizer.chat_template)), always=talks)
    _say_data(_check_held(held, loaded), always=True)
    if talks and loaded: _say_model(policy, loaded[0].pairs, ctx)
    sets = [Chunk(s.name, s.pairs) for s in loaded]
    ctx.clock.left = sum(pair_tokens(d.pairs).sum() for d in sets) + _tokens_ahead(1, sets, ctx)
    chunks = [] if made else _partitioned(loaded, policy, ctx)
    ctx.score_all(0, policy, [])
    if held and not (folder / "held_out.json").exists(): write_json(folder / "held_out.json", {s.name: dict(keys=s.pairs["key"][:], tokens=_mean_tokens(s.pairs)) for s in held})
    if talks and chunks: print(_plan_line(chunks, ctx))
    return ctx, chunks, policy

def _mean_tokens(pairs): return {side: sum(map(len, pairs[f"{side}_ids"])) / len(pairs) for side in ("chosen", "rejected")}

def _say_model(policy, pairs, ctx):
    "What computes, and how."
    rows = {"packed": "packed rows", "flash": "packed rows, flash attention"}.get(getattr(ctx.how(policy, pairs), "attention", ""), "padded batches")
    print(f"model: {ctx.base}, {policy.num_parameters() / 1e6:.0f} million parameters; on {ctx.device.type} in {ctx.precision}, {rows}")

def _plan_line(chunks, ctx):
    "The stages that will come."
    c = ctx.config
    steps = [c.epochs * math.ceil(len(d.pairs) / c.batch_size) for d in chunks]
    stages = ", ".join(f"{t}. {d.name} ({len(d.pairs)} pairs, {n} steps)" for t, (d, n) in enumerate(zip(chunks, steps), 1))
    return f"stages: {stages}; each step becomes a line of {ctx.at(1).parent}/stage-1/metrics.jsonl, and so on"


def _written(source):
    "A source as a run file says it; nothing for what was only in memory."
    if isinstance(source, (str, Path)): return str(source)
    if not isinstance(source, dict): return None
    return {k: str(v) if isinstance(v, Path) else v for k, v in source.items()} if isinstance(source["source"], (str, Path)) else None

def _extent(pairs):
    "The longest prompt with a response, and the largest token id, over all pairs."
    longest, largest = [], []
    for some in pairs.select_columns([f"{part}_ids" for part in ("prompt", "chosen", "rejected")]).with_format("arrow").iter(1000):
        prompt, *sides = (pc.list_value_length(ids) for ids in some.columns)
        longest.append(pc.max(pc.add(prompt, pc.max_element_wise(*sides))).as_py())
        largest += [pc.max(pc.list_flatten(ids)).as_py() for ids in some.columns]
    return max(longest), max(largest)

def _check_names(sources):
    "Raise ValueError for a source whose name cannot be printed in one line: it goes into tables, figures and messages."
    if not isinstance(sources, dict): return     # `load_sources` says what is wrong
    for name in (what.name if isinstance(what, Source) else str(name) for name, what in sources.items()):
        if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name): raise ValueError(f"sources: the name {name!r} has a control character or a new line; use one that can be printed")

def _say_data(notes, always):
    "Print them. Of the sources of a tiny model, which come by the hundred, only those with a warning."
    if notes and (always or any("warning" in line for line in notes)): print("\n".join(notes))

def _say_memory(model_config, config, precision, device):
    "One line on what training will need; an error, if that is not there."
    try: plan = plan_for(model_config, config, precision, device)
    except Exception as e:                       # a plan is made from the config alone, which not every model allows
        print(f"memory: cannot be planned for this model ({type(e).__name__})")
        return
    check_memory(plan, device)
    print(f"memory on {device}: {as_line(plan)}; {free_memory(device) / GIB:.1f} GiB are free")

def _not_deterministic(policy, loaded, ctx):
    "What keeps a graphics card from computing the same bits again, if anything does and it matters; said in one line."
    if ctx.device.type == "cpu" or not ctx.config.deterministic or not loaded: return None
    if why := why_not_same_bits(policy.train(), ctx.how(policy, loaded[0].pairs), ctx.precision):
        print(f"a run that is killed and goes on will not end in the same bits: {why}")
    policy.eval()
    return why


# %% [markdown]
# ## The report

# %%
#| export
def stage_table(run: Run) -> pd.DataFrame:
    "One stage a column; gammas in nats. `gamma_ref on D_t` is a mean over the whole chunk, the rest are means over the chunks' probes."
    rows = {"chunk": "chunk", "pairs": "pairs", "steps": "steps", "reference": "reference", "first loss": "first_loss",
            "gamma_ref on D_t": "gamma_ref", "gamma_ref on D_t+1": "gamma_ref_next", "gamma of M_t on D_t": "gamma", "change of gamma, 95 %": "gamma_change",
            "gamma certified by the loss": "certificate", "pairs below reference": "below_reference",
            "accuracy of M_t-1 on D_t": "accuracy_before", "accuracy of M_t on D_t": "accuracy"}
    def show(v): return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*v) if isinstance(v, list) else "" if v is None else round(v, 3) if isinstance(v, float) else v
    return pd.DataFrame({f"stage {s['stage']}": {label: show(s.get(k)) for label, k in rows.items()} for s in run.stages}, dtype=object)

def gamma_table(run: Run) -> pd.DataFrame: # model, chunk, gamma: one probe pair a row
    "gamma of every model on the probe of every chunk that it was measured on."
    stages, folders = run.stages, _model_folders(run)
    rows = [read_table(f / "logprobs").rows for f in folders]
    probes = stages[-1]["probes"]
    for t, stage in enumerate(stages, 1):
        for m in (t - 1, t, len(stages)):        # what the signs of failure compare
            absent = set(probes[stage["chunk"]]) - set(rows[m].index)
            if absent: raise ValueError(f"{folders[m] / 'logprobs'}: the table of M_{m} lacks {len(absent)} pairs of '{stage['chunk']}'; " + (_cure(folders[m] / "logprobs") if m else "run again: they are computed anew"))
    return pd.concat([pd.DataFrame(dict(model=f"M_{m}", chunk=chunk, gamma=(r.loc[keys, "chosen"] - r.loc[keys, "rejected"]).to_numpy()))
                      for chunk, keys in probes.items() for m, r in enumerate(rows) if set(keys) <= set(r.index)], ignore_index=True)

def _model_folders(run): return [run.folder / "base", *(run.folder / f"stage-{t}" for t in _without_gap(run.folder))]

def _held(run) -> dict: # name -> keys, tokens
    path = run.folder / "held_out.json"
    return read_part(path) if path.exists() else {}

def held_out_table(run: Run) -> pd.DataFrame: # source, model, against: the index; a column a measure; (mean, low, high) in each cell
    "What every model says about held-out pairs, against S and against the stage before. Empty where no pairs are held out."
    tables, beta, found = [read_table(f / "logprobs") for f in _model_folders(run)], run.config["settings"]["beta"], {}
    for name, held in _held(run).items():
        pairs = [dict(key=key) for key in held["keys"]]
        of_S = held_out(tables[0], tables[0], pairs, beta)
        found[name, "S", "S"] = {k: of_S[k] for k in ("gamma", "prefers chosen")}   # against itself, the rest is nothing
        for t, table in enumerate(tables[1:], 1):
            found[name, f"after stage {t}", "S"] = held_out(table, tables[0], pairs, beta)
            if t > 1: found[name, f"after stage {t}", f"stage {t-1}"] = held_out(table, tables[t-1], pairs, beta)
    return pd.DataFrame(found, dtype=object).T.rename_axis(["source", "model", "against"]) if found else pd.DataFrame()


# %%
#| export
@dataclass
class Report:
    "report.md of a run; a notebook shows it with its figures."
    path: Path
    def _repr_markdown_(self):
        if not self.path.exists(): return f"{self.path}: not written"
        def embed(m): return f"![](data:image/png;base64,{base64.b64encode((self.path.parent / m[1]).read_bytes()).decode()})"
        return re.sub(r"!\[\]\((figures/\w+\.png)\)", embed, self.path.read_text(encoding="utf-8"))

def _escaped(v) -> str:
    "A value as text in which nothing is markdown or HTML."
    text = " ".join((f"{v:.3f}" if isinstance(v, float) else str(v)).splitlines())
    for mark, plain in (("|", r"\|"), ("<", r"\<"), ("![", r"!\[")): text = text.replace(mark, plain)
    return text

def as_markdown(frame: pd.DataFrame) -> str:
    "A data frame as a markdown table."
    rows = [[frame.index.name or "", *frame.columns], ["---"] * (len(frame.columns) + 1), *([i, *r] for i, r in zip(frame.index, frame.to_numpy(dtype=object)))]
    return "\n".join("| " + " | ".join(map(_escaped, r)) + " |" for r in rows)


# %%
print(as_markdown(pd.DataFrame({"accuracy": [0.5]}, index=["a|b <img>"])))


# %% [markdown]
# A finished run may lie on a disk that can only be read. Then there is nothing to write, but much to show. And a name may hold a dollar sign, which Matplotlib would take for the beginning of a formula.

# %%
#| export
def write_report(run: Run) -> Report:
    "report.md: what came of it, what was read, the stages, what to worry about, how it was run. Where it cannot be written, this is said in one line."
    metrics, gammas = run.metrics, gamma_table(run)
    measures = run.partition() if run.config["sources"] else None      # chunks that a function makes have none
    text, figures, path = _report_text(run, metrics, gammas, measures), run.folder / "figures", run.folder / "report.md"
    drawn = _drawn(metrics, gammas, measures)
    try:
        if figures.is_symlink(): figures.unlink()
        figures.mkdir(exist_ok=True)
        for name, fig in drawn.items():
            with replacing(figures / f"{name}.png") as tmp: fig.savefig(tmp, format="png", dpi=110, bbox_inches="tight")
        with replacing(path) as tmp: tmp.write_text(text, encoding="utf-8")
    except OSError as e: print(f"no new report: {e}")
    finally:
        for fig in drawn.values(): plt.close(fig)
    return Report(path)

def _drawn(metrics, gammas, measures):
    "The figures of a report; names in them are no formulas."
    def plain(names): return names.str.replace("$", r"\$", regex=False)
    drawn = dict(loss=plot_loss(metrics), change=plot_change(gammas.assign(chunk=plain(gammas["chunk"]))), drift=plot_drift(metrics))
    if measures is None: return drawn
    sources = measures.reset_index()
    return drawn | dict(partition=plot_partition(sources.assign(source=plain(sources["source"]))))

def _report_text(run, metrics, gammas, measures):
    "One section after the other, the answer first."
    c, T = run.config, len(run.stages)
    text = [f"# Stepwise DPO of {_escaped(c['model'])} in {T} {'stage' if T == 1 else 'stages'}",
            f"The trained model lies in `{run.model_folder().relative_to(run.folder)}`. Intervals are 95 % intervals: Student's for means, Wilson's for shares.",
            *_held_out_text(run), *_answers_text(run), *_data_text(run), *_partition_text(measures, c["settings"]["order"]),
            "## Stages", "Stage t trains on the chunk D_t and ends in the model M_t; M_0 is S. Gamma is how much more likely the chosen response is than the rejected one, in nats. All of it is measured on pairs that were trained on: a check of the training, not of its success.", as_markdown(run.table()),
            *(f"![](figures/{name}.png)" for name in ("change", "loss", "drift")),
            *_signs_text(gammas, metrics), *_run_text(run, metrics)]
    return "\n\n".join(text) + "\n"


# %% [markdown]
# Each section is a few lines. *Held out* leads: it is what the reader came for. Where nothing was held out, that is the first thing to know.

# %%
#| export
def _held_out_text(run):
    "One table for each comparison."
    found = run.held_out()
    if found.empty: return ["## Held-out pairs", "None: everything below is about pairs that were trained on. `eval_share` keeps some aside."]
    sizes = ", ".join(f"{_escaped(name)} ({len(held['keys'])} pairs; responses of {held['tokens']['chosen']:.0f} and {held['tokens']['rejected']:.0f} tokens on average, chosen and rejected)" for name, held in _held(run).items())
    text = ["## Held-out pairs", f"Never trained on: {sizes}. Log-probabilities in nats; *loss* and *reward accuracy* take the model that is compared with as the reference."]
    shown = found.map(lambda cell: as_text(cell) if isinstance(cell, tuple) else "").reset_index()
    shown["model"] = [f"{source}, {model}" for source, model in zip(shown["source"], shown["model"])]
    against = shown["against"] == "S"
    for title, rows in (("Against S", shown[against]), ("Against the stage before", shown[~against])):
        if len(rows): text += [f"### {title}", as_markdown(rows.drop(columns=["source", "against"]).set_index("model"))]
    return text

def _answers_text(run):
    "What each model answers to the same prompts."
    parts = [read_part(f / "answers.json") for f in _model_folders(run) if (f / "answers.json").exists()]
    if not parts: return []
    names = ["S", *(f"after stage {t}" for t in range(1, len(parts)))]
    text = ["## Answers", "The likeliest token each time, 64 at most; the prompts are held-out ones where there are any."]
    for i, prompt in enumerate(parts[0]["prompts"]):
        said = {name: part["answers"][i] for name, part in zip(names, parts)}
        text += [f"**{_escaped(prompt.strip())}**", as_markdown(pd.DataFrame({"answer": said}).rename_axis("model"))]
    return text

def _data_text(run):
    "What was read, dropped and cut, a source a column; of chunks that a function makes, nothing is known."
    path = run.folder / "partition.json"
    counts = read_part(path).get("counts") if path.exists() else None
    if not counts or "rows" not in counts[0]: return []
    return ["## Data", as_markdown(pd.DataFrame(counts).set_index("source").T.rename_axis("rows"))]


# %% [markdown]
# The partition is an order, and an order looks decided. So a sentence says where it is not: where intervals overlap, and where the mean per token would have ordered the sources otherwise.

# %%
#| export
def undecided(measures: pd.DataFrame, # of a partition, in the order of training; indexed by source
             ) -> list[str]:
    "What the order of the sources does not say."
    rows, out = list(measures.iterrows()), []
    for (a, x), (b, y) in zip(rows, rows[1:]):
        if x["low"] <= y["high"] and y["low"] <= x["high"]: out.append(f"The intervals of {a} and {b} overlap: which of them comes first is not decided by these pairs.")
    rising = measures["accuracy"].is_monotonic_increasing and len(measures) > 1
    by_token = measures.sort_values("accuracy_per_token", ascending=rising, kind="stable").index.tolist()
    if by_token != measures.index.tolist(): out.append(f"By the mean log-probability of a token, not the sum, the order would be {', '.join(map(str, by_token))}.")
    return out

def _partition_text(measures, order):
    if measures is None: return []
    words = [_escaped(s) for s in undecided(measures)] if order in ("easy_to_hard", "hard_to_easy") else []
    return ["## Partition under S", as_markdown(measures), *words, "![](figures/partition.png)"]


# %%
measures = pd.DataFrame(dict(accuracy=[0.6, 0.55], low=[0.5, 0.5], high=[0.7, 0.6], accuracy_per_token=[0.4, 0.6]), index=["short", "mixed"])
assert undecided(measures.assign(low=[0.59, 0.5], high=[0.7, 0.56], accuracy_per_token=[0.6, 0.4])) == []
undecided(measures)


# %% [markdown]
# Last, how it was run: enough to run it again, and to know what it cost.

# %%
#| export
def _signs_text(gammas, metrics):
    signs = failure_signs(gammas, metrics)
    return ["## Signs of failure", "\n".join(f"- {_escaped(sign)}" for sign in signs) or "None of forgetting, instability, minimal improvement.", FALSE_ALARMS]

def _run_text(run, metrics):
    "The command, versions, tokens, time and memory; then all settings."
    c, costs = run.config, [read_part(f / "cost.json") for f in _model_folders(run) if (f / "cost.json").exists()]
    seconds, peak = sum(x["seconds"] for x in costs), max((x["peak_gib"] for x in costs), default=0)
    facts = {"command": c.get("command", "unknown"), "model": c["model"], "revision of the model": c.get("revision") or "none", "weights of S": c["weights"], "hash of the pairs": c["pairs"],
             "sources": "; ".join(f"{name}: {what or 'from memory'}" for name, what in c["sources"].items()) or "made by a function",
             "device": c["device"], **{f"version of {name}": v for name, v in c["versions"].items()}, **c.get("machine", {}),
             "tokens trained on": f"{metrics['tokens'].sum():,}", "optimizer steps": f"{len(metrics):,}",
             "time of the stages": f"{seconds // 60} min {seconds % 60} s (of a stage that was interrupted, of its last call)" if costs else "unknown",
             "peak memory": f"{peak:.1f} GiB" if peak else "unknown"}
    def table(values, name): return as_markdown(pd.DataFrame({"value": {k: str(v) for k, v in values.items()}}).rename_axis(name))
    return ["## How it was run", table(facts, "what"), "## Settings", table(c["settings"], "setting")]


# %% [markdown]
# ## To give away
#
# A model that leaves its run needs a card: what it was made of, by which method, and what came out. `sdpo push` writes one and uploads both; `export` does the same into a folder, to look at first.

# %%
#| export
def _hub_ids(config):
    "What a run used that others can find by name: the base model, the data sets. A path says nothing to them."
    def on_hub(name): return isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    sources = [what.get("source") if isinstance(what, dict) else what for what in config["sources"].values()]
    return config["model"] if on_hub(config["model"]) else None, [s for s in sources if on_hub(s)]

def model_card(run: Run) -> ModelCard:
    "The card of the last stage's model, for the hub."
    base, data = _hub_ids(run.config)
    about = ModelCardData(base_model=base, datasets=data or None, library_name="transformers", tags=["dpo", "stepwise-dpo", "sdpo", "alignment"])
    c, T = run.config["settings"], len(run.stages)
    text = [f"# {_escaped(Path(run.config['model']).name)}, aligned by stepwise DPO",
            f"Trained by stepwise DPO (sDPO, [arXiv 2403.19270](https://arxiv.org/abs/2403.19270)) in {T} {'stage' if T == 1 else 'stages'} with [sdpo_nb](https://github.com/sdpo-nb/sdpo_nb): the model that a stage leaves behind is the reference of the next. "
            f"beta = {c['beta']}, learning rate {c['lr']}, {c['batch_size']} pairs a step, {c['epochs']} epoch(s) a stage, {c['precision']}.",
            *_held_out_text(run), "## Stages", as_markdown(run.table()), "![](figures/change.png)", *_data_text(run)]
    return ModelCard(f"---\n{about.to_yaml()}\n---\n\n" + "\n\n".join(text) + "\n")

def export_model(run: Run,
                 folder, # must not exist
                ) -> Path:
    "The last stage's model with its card and figure, as it would be pushed."
    folder = Path(folder)
    if folder.exists(): raise ValueError(f"{folder}: is there already; give a folder that does not exist")
    load_stage(run.model_folder().parent, "cpu")                 # it must be the model that the stage saved
    run.report()
    with replacing(folder) as tmp:
        shutil.copytree(run.model_folder(), tmp)
        shutil.copytree(run.folder / "figures", tmp / "figures", ignore=lambda _, names: [n for n in names if n != "change.png"])
        model_card(run).save(tmp / "README.md")
    return folder

def push_model(run: Run,
               repo_id: str, # on the hub, as user/name; made if it is not there
               private: bool=True) -> str: # its address
    "Upload what `export_model` makes. You must be logged in (hf auth login)."
    with tempfile.TemporaryDirectory() as tmp:
        folder = export_model(run, Path(tmp) / "model")
        hub = HfApi()
        address = hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Stepwise DPO with sdpo_nb")
    return str(address)


# %% [markdown]
# ## A run
#
# The same three sources, and the same settings, in a folder; the order is now the partition's.

# %%
run = sdpo(w.base, w.sources, StepwiseConfig(**quick), tmp / "three")
run.partition().round(3)

# %% [markdown]
# It is the loop of the first page: the same models, stage by stage, to the bit.

# %%
assert [s["end"] for s in run.stages] == ends[1:]
run.table()

# %% [markdown]
# Read it from the top. Each stage's reference is the model before it. The hashes say so; the first loss agrees, for a model that is its own reference starts at $\ln 2 = 0.693$.

# %%
assert [s["reference_kind"]["weights"] for s in run.stages] == ends[:-1]
assert all(abs(s["first_loss"] - math.log(2)) < 1e-4 for s in run.stages)
assert all(s["gamma_change"][1] > 0 for s in run.stages)

# %% [markdown]
# Does the bar rise? The row `gamma_ref on D_t` compares different chunks. Stay with one chunk, and go from model to model.

# %%
bars = gamma_table(run).groupby(["chunk", "model"], sort=False)["gamma"].mean().unstack()
assert (bars.diff(axis=1).iloc[:, 1:] > 0).all(axis=None)
bars.round(2)

# %% [markdown]
# On `digest`, $D_2$, the bar was 0.73 under $M_0$ and is 1.55 under $M_1$, which has not seen it. On `riddle`, $D_3$, it went from 0.47 to 1.25 to 2.40 while other chunks
# were trained on. This is the rise of a moving reference: the hollow boxes below climb as well.

# %%
plot_gamma(gamma_table(run));

# %% [markdown]
# The report also looks for the [three signs of failure](08_evaluate.ipynb): forgetting, instability, a stage that changed nothing. This run has none; with a learning rate too small for so few steps it has one per stage.

# %%
assert run.signs() == []
timid = sdpo(w.base, w.sources, StepwiseConfig(**quick | dict(lr=1e-9, epochs=1)), tmp / "timid")
assert [x.split(":")[0] for x in timid.signs()] == ["minimal improvement"] * 3
timid.signs()

# %% [markdown]
# ## One stage is plain DPO
#
# With $T = 1$ there is nothing left but chapter 06, and no second code path: the same bits come out.

# %%
one = sdpo(w.base, w.sources, StepwiseConfig(**quick, chunks=1, order="as_given"), tmp / "one")
alone, every = load_model(w.base), concatenate_datasets([chunks[name] for name in w.sources])
train_stage(alone, every, read_table(tmp / "one/base/logprobs"), TrainConfig(**quick), tmp / "alone")
assert weights_hash(alone) == one.stages[0]["end"]

# %% [markdown]
# ## Where the target starts
#
# The paper's Figure 3: in stage 2, a target that starts at S against the reference $M_1$ has a far higher loss. The tables say how high before a step is made. On the first batch $B$ of stage 2,
#
# $$L = \frac{1}{|B|} \sum_{B} \mathrm{softplus}\big(\beta\,(\gamma_{M_1} - \gamma_S)\big). \tag{2}$$

# %%
from_S = sdpo(w.base, w.sources, StepwiseConfig(**quick, init_target="S"), tmp / "from-S")
D_2 = chunks["digest"]
batch = D_2.select(epoch_order(len(D_2), seed=0, stage=2, epoch=0)[:32])
gamma_S, gamma_1 = (read_table(from_S.folder / f / "logprobs").gamma(batch) for f in ("base", "stage-1"))
expected = F.softplus(0.3 * (gamma_1 - gamma_S)).mean().item()   # (2)
starts = {"from M_1": run.stages[1]["first_loss"], "from S": from_S.stages[1]["first_loss"], "from S, by (2)": expected}
assert abs(starts["from S"] - expected) < 1e-4 and expected > math.log(2) + 0.05
pd.Series(starts, name="first loss of stage 2").round(3).to_frame()

# %% [markdown]
# Thin lines are steps, thick ones the mean of the last eight. Both targets learn, and after two epochs the one from S is still behind.

# %%
curves = pd.DataFrame({name: r.metrics.query("stage == 2").set_index("step")["loss"] for name, r in (("from M_1", run), ("from S", from_S))})
smooth = curves.rolling(8, min_periods=1).mean()
assert (smooth["from S"] > smooth["from M_1"] + 0.05).all()
fig, ax = plt.subplots(figsize=(6, 2.8))
for i, name in enumerate(curves): ax.plot(curves[name], color=f"C{i}", lw=0.8, alpha=0.5); ax.plot(smooth[name], color=f"C{i}", lw=2.2, label=name.replace("M_1", "$M_1$"))
ax.axhline(math.log(2), color="black", lw=1, ls=":", label="ln 2"); ax.legend(frameon=False)
ax.set(xlabel="optimizer step of stage 2", ylabel="DPO loss against $M_1$ (nats)"); sns.despine()


# %% [markdown]
# ## Killed and continued
#
# Nothing is lost when a run dies; tests do this with a real SIGKILL. Here the second stage is interrupted by an exception.

# %%
def dies_at(call):
    def logprobs(model, pairs):
        logprobs.calls += model.training
        if logprobs.calls == call: raise KeyboardInterrupt
        return packed_logprobs(model, pairs)
    logprobs.calls, logprobs.__name__, logprobs.tokens, logprobs.attention = 0, "packed_logprobs", packed_logprobs.tokens, "packed"
    return logprobs

settings = StepwiseConfig(**quick, save_every=7)
try: sdpo(w.base, w.sources, settings, tmp / "killed", logprobs=dies_at(50))
except KeyboardInterrupt: pass
killed = Run(tmp / "killed")
assert len(killed.stages) == 1
sorted(p.name for p in (tmp / "killed/stage-2").iterdir())

# %% [markdown]
# The same call goes on from the checkpoint, and the run ends where the uninterrupted one did.

# %%
again = sdpo(w.base, w.sources, settings, tmp / "killed")
assert [s["end"] for s in again.stages] == ends[1:]

# %% [markdown]
# Called with another `beta`, the folder refuses: half a run at one $\beta$ and half at another is no run.

# %%
try: sdpo(w.base, w.sources, StepwiseConfig(**quick | dict(beta=0.2)), tmp / "killed")
except ValueError as e: refusal = str(e).split(": ", 1)[1]
refusal

# %% [markdown]
# ## What this does not show
#
# Nothing here says that stages *help*. If every stage reached its optimum on the same prompts, $T$ stages at $\beta$ would be one stage at $\beta/T$
# ([chapter 03](03_loss.ipynb)), and the [demo](index.ipynb) puts DPO at $\beta/T$ beside every stepwise run for that reason.

# %%
#| hide
shutil.rmtree(tmp)

# %% [markdown]
# **What you now have.** `sdpo(...)`: stages, a moving reference that is a table with a hash, a folder that survives a kill, a report that says which model was measured
# against which. `StepwiseConfig` with every switch that an experiment on the paper needs.
#
# **Questions to test yourself.** Why is the reference table computed before the target is reset? With `reference="fixed"` and `init_target="previous"`, why is stage 2's
# first loss *below* $\ln 2$? Why may `save_every` change between two calls on one folder, and `probe` not?
#
# **Try this.** Run `order="hard_to_easy"` and compare `gamma_ref on D_t+1`. Give `chunks` a function that samples fresh pairs from $M_{t-1}$
# (`make_pairs` of [chapter 00](00_world.ipynb) does the labelling). Give `reference` the folder of a model from another run.
