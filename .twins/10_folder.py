# %% [markdown]
# # A run is a folder
# > Everything a run knows lies in files. Each file can be read again, and says what is wrong with it.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/10_folder.ipynb)
#
# **You should know** what [a table of log-probabilities](02_logprobs.ipynb) and [one stage of training](06_trainer.ipynb) are. If you came to learn what stepwise DPO *does*, skip this
# chapter and read [14](14_stepwise.ipynb) first. **Time** an hour to read with its code, a few seconds to run.
#
# Stepwise DPO trains a model in stages: stage 1 turns the start model S into $M_1$, stage 2 turns $M_1$ into $M_2$, and each stage measures itself against the model before it. That takes
# hours on a real model, and hours are long enough for a machine to stop, for a disk to fill up, or for a colleague to copy the folder and change one setting. So a run is a
# folder, and the same command on the same folder goes on where it stopped:
#
# ```
# run/config.yaml     what was asked for: settings, hashes of S and of the pairs, machine, versions
#     partition.json  how the data was cut into chunks, and why
#     base/           logprobs/: what S says about every pair; answers.json: what it answers
#     stage-1/        metrics.jsonl  a line for each step
#                     checkpoint/    to go on from; removed when no longer needed
#                     logprobs/, answers.json, cost.json, model/
#                     stage.json     the last file: the stage is finished
#     stage-2/        the same for M_2, and so on
#     report.md, figures/
# ```
#
# This chapter holds what keeps such a folder honest. It answers five questions, one a section: what does a file say? which stages are finished? is this the model that the stage
# saved? is this the same run? is anybody else at work here?
#
# Each answer is a guard: some lines that stop a run, or say something, where it would otherwise go wrong in silence. So most sections first let it go wrong.

# %%
#| default_exp folder

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
import functools, hashlib, json, os, re, shlex, subprocess, sys
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from numbers import Integral, Real
from pathlib import Path
from types import CodeType

import torch
import yaml

try: import fcntl
except ImportError: fcntl = None # Windows

import sdpo_nb
from transformers import AutoTokenizer, GenerationConfig

from sdpo_nb.logprobs import (
    best_device, check_model, load_model, load_tokenizer, memory_ended, own_config, replacing, weights_hash,
    write_json,
)
from sdpo_nb.lora import CONFIG_FILE, Adapter, is_adapter, merge_adapter, read_adapter, write_adapter
from sdpo_nb.trainer import COMPUTED_ALIKE, check_one_process, read_checkpoint

# %%
import contextlib, io, shutil, tempfile
from types import SimpleNamespace

from sdpo_nb.lora import adapter_of, add_adapter
from sdpo_nb.trainer import TrainConfig, save_checkpoint
from sdpo_nb.world import complaint, load_world

torch.set_num_threads(1)
w, place = load_world(), Path(tempfile.mkdtemp())

# %% [markdown]
# Here is a real one. We borrow the call of [chapter 14](14_stepwise.ipynb), for two stages of thirty pairs.

# %%
from sdpo_nb.stepwise import StepwiseConfig, sdpo

real = place / "real"
few = {name: dict(source=w.sources[name], max_pairs=30) for name in ("primer", "digest")}
sdpo(w.base, few, StepwiseConfig(beta=0.3, lr=3e-4, precision="fp32"), real)

def inside(folder): return sorted(path.name for path in folder.iterdir() if path.name != ".lock")
print(inside(real))
print(inside(real / "stage-1"))

# %% [markdown]
# Where is `checkpoint/`? Both stages are finished, and their models lie on disk in fp32, so nothing would go on from a checkpoint. It has been removed.
#
# With this folder you can read the run. To go on with it, you also need S and the pairs: the folder holds their hashes, not always the things themselves.
#
# To break things, we take another folder, in which nothing is lost.

# %%
tmp = place / "run"
tmp.mkdir()

# %% [markdown]
# ## What does a file say?
#
# People write YAML by hand, and by hand one writes a setting twice. Which $\beta$ will this be?

# %%
twice = "beta: 0.1\nlr: 1e-5\nbeta: 0.3\n"
yaml.safe_load(twice)


# %% [markdown]
# YAML takes the second value and says nothing. Here that is an error, and it names the line.
#
# Look at `lr` too: `'1e-5'` came back as text, because YAML wants a point in such a number, `1.0e-5`. That is harmless here. The [plan](12_plan.ipynb) turns a text that means a number into one.

# %%
#| export
class _Once(yaml.SafeLoader):
    "A name that is given twice is an error; YAML lets the later value win."
    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) == 1: continue
            problem = f"'{key.value}' is given twice"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)

def read_yaml(
    path, # of any YAML file
):        # whatever it holds; None where it is empty
    """A YAML file.

    Raises ValueError, with file and line, for what is not YAML and for a name that is given twice.
    """
    try: return yaml.load(Path(path).read_text(encoding="utf-8"), _Once)
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: is not text in UTF-8 ({e.reason})") from e
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        problem = getattr(e, "problem", None) or str(e).splitlines()[0]
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{path}: {line}{problem}") from e


# %%
file = tmp / "run.yaml"
for text in (twice, "sources: [a.jsonl\n"):
    file.write_text(text)
    print(complaint(read_yaml, file))

# %% [markdown]
# The files that a run writes itself are read in the next call, or in a year. By then one may be missing, empty or cut. What does Python say of an empty one?

# %%
complaint(json.loads, "")

# %% [markdown]
# Which of the many files of a run was it, and what can be done? A complaint should say three things: which file, what is wrong with it, and how to go on. The last depends on the file. What the report can do without may go; a partition is
# measured anew; but what was trained must come back, or be trained again.

# %%
#| export
_CURES = {
    "config.yaml": "put a copy of it back, or use another folder",
    "partition.json": "remove it and run again: the partition is made anew",
    "held_out.json": "remove it and run again: it is made anew",
    "answers.json": "remove it: the report does without",
    "cost.json": "remove it: the report does without",
}

def cure_of(
    path: Path, # of a file or folder, of a run or not
) -> str:
    "What to do about a part of a run that cannot be used."
    if path.name in _CURES: return _CURES[path.name]
    stage = path.parent.name
    if not re.fullmatch(r"stage-[1-9]\d*", stage): return "put it back, or make it again"
    return (f"put it back, or remove {stage} and the stages after it, "
            "and run again: they are trained anew")


# %%
for name in ("answers.json", "stage.json"): print(name, "->", cure_of(real / "stage-2" / name))
assert "remove" not in cure_of(Path("my_adapters/first")) # not a stage: nothing of yours is to be removed


# %%
#| export
@contextmanager
def naming(
    path: Path, # of a file of a run
):              # a context, for as long as it is read
    """Whatever goes wrong in reading a file says which file it was, and what to do. Raises ValueError,
    but for what says nothing about the file: memory that ends, a right to read that is missing."""
    try: yield
    except Exception as e:
        if memory_ended(e) or isinstance(e, PermissionError): raise
        told = str(e).removeprefix(f"{path}: ").split("\n")[0]
        why = getattr(e, "strerror", None) or told or type(e).__name__
        raise ValueError(f"{path}: cannot be used ({why}); {cure_of(path)}") from e


# %%
def read_cut(path):
    with naming(path): return json.loads(path.read_text()[:-9])

print(complaint(read_cut, real / "stage-2/cost.json"))

# %% [markdown]
# A file that can be read may still be the wrong one. So each must hold what others will look for in it.

# %%
#| export
NEEDED = { # name of a file -> what it must hold
    "config.yaml": {"model", "weights", "sources", "pairs", "device", "settings", "versions"},
    "partition.json": {"measures", "names", "chunks"},
    "stage.json": {"stage", "chunk", "end", "probes", "steps", "skipped"},
    "held_out.json": set(),
    "answers.json": {"prompts", "answers"},
    "cost.json": {"seconds", "peak_gib"},
}

def read_part(
    path, # of a config.yaml, partition.json, stage.json, ...
) -> dict:
    "A file of a run. Raises ValueError: which file, what is wrong with it, what to do."
    path = Path(path)
    with naming(path):
        if path.suffix == ".yaml": found = read_yaml(path)
        else: found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict): raise ValueError("holds no names and values")
        absent = NEEDED[path.name] - set(found)
        if absent: raise ValueError(f"lacks {', '.join(sorted(absent))}")
        for name in ("settings", "versions", "sources", "held_out"):
            inner = found.get(name, {})
            if not isinstance(inner, dict): raise ValueError(f"{name} holds no names and values")
        return found


# %% [markdown]
# Four bad files: an empty one, one that says `null`, half a file, and one without most of its entries. Which of them does `json.loads` alone accept?

# %%
stage = tmp / "stage-1"
stage.mkdir()
for text in ("", "null", '{"stage": 1', '{"stage": 1, "chunk": "primer"}'):
    (stage / "stage.json").write_text(text)
    print(complaint(read_part, stage / "stage.json"))

# %% [markdown]
# `json.loads` accepts the second and the fourth. The error would come later, in another function, as a `TypeError` or a `KeyError` that names no file.
#
# ## Which stages are finished?
#
# `stage.json` is the last file that a stage writes. So a stage is finished when it is there, and only then. Here are some folders, the way users leave them. Which is the last finished stage? What would you get if you sorted the names, and what if you counted the folders?

# %%
for name in ("stage-2", "stage-10", "stage-1-before"):
    (tmp / name).mkdir()
    (tmp / name / "stage.json").write_text("{}")
(tmp / "stage-3").mkdir() # begun
inside(tmp)


# %% [markdown]
# Sorted by name, stage 3 comes last, and it is not finished. There are five folders, so counting says stage 5. The answer is stage 10. So the number is read from the name, and a copy that you made, `stage-1-before`, is no stage.

# %%
#| export
def stage_numbers(
    folder, # of a run
) -> list[int]:
    "Numbers of the stages that have a folder, finished or not, in order."
    found = [re.fullmatch(r"stage-([1-9]\d*)", p.name) for p in Path(folder).glob("stage-*")]
    return sorted(int(match[1]) for match in found if match)


# %%
stage_numbers(tmp)


# %%
#| export
def finished_stages(
    folder, # of a run
) -> list[int]:
    "Numbers of the finished stages in a run folder, in order. Another folder beside them is no stage."
    def finished(t): return (Path(folder) / f"stage-{t}" / "stage.json").exists()
    return [t for t in stage_numbers(folder) if finished(t)]


# %%
assert stage_numbers(tmp) == [1, 2, 3, 10]
finished_stages(tmp)


# %% [markdown]
# To go on from stage 10 without stages 3 to 9 would be a run that nobody can explain. `stage_folders` lists the folders of the finished stages, and raises an error if one is missing.

# %%
#| export
def folder_of(
    folder, # of a run
    t: int, # of M_t; 0: S
) -> Path:
    "Where M_t lies in a run, with its table."
    return Path(folder) / (f"stage-{t}" if t else "base")

def stage_folders(
    folder, # of a run
) -> list[Path]:
    """Folders of the finished stages, which must be 1, 2, ... for a run to go on or be reported.

    Raises ValueError for a gap.
    """
    done = finished_stages(folder)
    for t, found in enumerate(done, 1):
        if t == found: continue
        missing = folder_of(folder, t) / "stage.json"
        raise ValueError(f"{missing}: is missing, but stage {done[-1]} is finished; "
                         f"put it back, or remove the stages after {t} and run again: they are trained anew")
    return [folder_of(folder, t) for t in done]


# %%
print(complaint(stage_folders, tmp))
for folder in tmp.glob("stage-*"): shutil.rmtree(folder)


# %% [markdown]
# ## Is this the model that the stage saved?
#
# A model is saved as a folder that `from_pretrained` reads. What if the disk is full when half of it is written? This tokenizer stands for a disk without room.

# %%
class NoRoom:
    def save_pretrained(self, path): raise OSError(28, "No space left on device")

model, tokenizer = load_model(w.base, "cpu"), load_tokenizer(w.base)
model.save_pretrained(tmp / "plain")
print(complaint(NoRoom().save_pretrained, tmp / "plain"))
inside(tmp / "plain")


# %% [markdown]
# A model without a tokenizer, which looks like a whole one until somebody uses it. So `save_model` lets the folder appear under its name only when it is complete.
#
# It can also save in another dtype. Training keeps its weights in fp32. If S came in bf16, a run saves its models in bf16 too, unless you set `save_dtype="fp32"`.

# %%
#| export
def save_model(
    model,     # a transformers model
    tokenizer, # goes into the same folder
    path,      # of the folder; what was there is replaced
    dtype: torch.dtype=None, # of the file; default: the model's own
):
    """`save_pretrained` under a temporary name, then renamed.

    Safetensors makes files that only you can read; they get the permissions of config.json.
    """
    with replacing(path) as tmp: write_model(model, tokenizer, tmp, dtype)

def write_model(
    model,     # a transformers model
    tokenizer, # goes into the same folder
    folder: Path, # which may hold other files
    dtype: torch.dtype=None, # of the file; default: the model's own
):
    "The files of a model, one after the other; config and generation settings are those that it came with."
    with own_config(model), _plain_generation(model) as generation:
        if dtype in (None, model.dtype): model.save_pretrained(folder)
        else: _save_rounded(model, folder, dtype)
    if generation: generation.to_json_file(folder / "generation_config.json")
    tokenizer.save_pretrained(folder)
    _readable(folder, "config.json")

@contextmanager
def _plain_generation(model):
    "Put the generation settings aside: versions of transformers refuse to save some that they have loaded."
    own = getattr(model, "generation_config", None)
    if own: model.generation_config = GenerationConfig()
    try: yield own
    finally:
        if own: model.generation_config = own

def _readable(folder, usual):
    mode = (folder / usual).stat().st_mode
    for file in folder.glob("*.safetensors"): file.chmod(mode)


# %%
print(complaint(save_model, model, NoRoom(), tmp / "whole"))
assert not (tmp / "whole").exists()
save_model(model, tokenizer, tmp / "whole")
inside(tmp / "whole")


# %% [markdown]
# The other dtype is made on the way to the disk. The model in memory stays as it is.

# %%
#| export
def _save_rounded(model, path, dtype):
    "The model stays as it is; the file, and what its config says of it, are of another dtype."
    rounded = {id(p): p.detach().to(dtype) for p in model.parameters()} # tied weights stay one tensor
    named = model.state_dict(keep_vars=True)
    state = {name: rounded.get(id(p), p) for name, p in named.items()}
    model.save_pretrained(path, state_dict=state)
    config = json.loads((path / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(path / "config.json", config)


# %%
save_model(model, tokenizer, tmp / "half", torch.bfloat16)
config = json.loads((tmp / "half/config.json").read_text())

def size(folder): return (Path(folder) / "model.safetensors").stat().st_size
ratio = size(tmp / "half") / size(w.base)
assert model.dtype == torch.float32
print(f"in memory {model.dtype}, on disk {config['dtype']}; {ratio:.2f} of the size of S")


# %% [markdown]
# Rounding may swallow what was learned. A number in bf16 keeps 8 binary digits, so its neighbours are 0.4 to 0.8 % away. If every weight grows by a thousandth, most of them are rounded to the same neighbour as before. How many of the saved
# weights will differ?

# %%
#| export
def share_changed(
    model,         # M_t, in fp32
    before: str,   # folder or hub id of the model that it came from
    dtype: torch.dtype, # both are rounded to it
    revision: str=None, # of a hub id
) -> float:        # from 0 to 1
    "Share of the weights that differ between two models, once both are rounded."
    old = dict(load_model(before, "cpu", revision).named_parameters())
    moved = 0
    for name, new in model.named_parameters():
        differs = new.detach().cpu().to(dtype) != old[name].to(dtype)
        moved += differs.sum().item()
    return moved / model.num_parameters()


# %%
grown = load_model(w.base, "cpu")
with torch.no_grad():
    for p in grown.parameters(): p.mul_(1.001)

for dtype in (torch.float32, torch.bfloat16):
    print(f"{dtype}: {share_changed(grown, w.base, dtype):.0%} of the weights differ")

# %% [markdown]
# Could you have known the 18 %? A weight moves by 0.1 %, and the neighbours are 0.4 to 0.8 % away. So one weight in eight to one in four crosses the middle between two neighbours.
#
# So where S is stored in another dtype than fp32, a stage counts this share. It says so where most weights did not move, and names the way out: `save_dtype="fp32"`.
#
# A file on disk may also have been *replaced*: a colleague copies a model into the folder, or a synchronised drive restores an old one. Its path stays the same, so nothing shows it:

# %%
stage.mkdir()
save_model(model, tokenizer, stage / "model")
ended = dict(stage=1, chunk="primer", end=weights_hash(model), probes={}, steps=0, skipped=0)
write_json(stage / "stage.json", ended)

save_model(grown, tokenizer, stage / "model") # somebody puts another model there
weights_hash(load_model(stage / "model", "cpu")) == ended["end"]


# %% [markdown]
# It was loaded without a word. But every stage wrote down the hash of the weights that it saved. `load_stage` compares the two.

# %%
#| export
def load_stage(
    folder,          # of a finished stage
    device: str=None, # as for `load_model`
):                   # M_t as it lies on disk
    "The model that a stage saved. Raises ValueError where another one lies there."
    folder = Path(folder)
    saved = saved_as(read_part(folder / "stage.json"))
    where = folder / "model"
    if is_adapter(where): model = load_merged(folder, "cpu")
    else:
        with naming(where): model = load_model(str(where), "cpu")
    _compare(model, getattr(torch, saved["dtype"]), saved["weights"], where)
    return model.to(device or best_device(model))

def saved_as(
    ended: dict, # stage.json of a finished stage
) -> dict:       # dtype, weights
    "dtype and hash of the model that a stage saved."
    return ended.get("saved") or dict(dtype="float32", weights=ended["end"])

def _compare(model, dtype, weights, path):
    found = weights_hash(model, dtype)
    if found == weights: return
    raise ValueError(f"{path}: has weights {found}, but the stage ended with {weights}; {cure_of(path)}")


# %%
print(complaint(load_stage, stage))
save_model(model, tokenizer, stage / "model") # the right one is put back
assert weights_hash(load_stage(stage)) == ended["end"]


# %% [markdown]
# One more thing follows from the rounding. Say S is stored in bf16, and the run stops after stage 1. If it went on from the file, it would start from rounded weights, and end in others than a run that was never interrupted. So the checkpoint of the last stage, which holds the weights in fp32, is kept until the next stage is finished, and the run goes on from there. This is about what lies on disk. `precision`, below, says how the training computes, and is another setting.

# %%
#| export
def load_exactly(
    folder,           # of a finished stage
    device: str=None, # as for `load_model`
):                    # M_t in fp32
    """The model that a stage ended with.

    From its checkpoint, where the model on disk is rounded and a checkpoint is there. Raises ValueError
    where another one lies there.
    """
    folder = Path(folder)
    model = load_stage(folder, device)
    ended = read_part(folder / "stage.json")
    exact = read_checkpoint(folder) if saved_as(ended)["dtype"] != "float32" else None
    if exact:
        model.load_state_dict(exact["model"])
        _compare(model, None, ended["end"], folder / "checkpoint")
    return model


# %% [markdown]
# Here a stage is saved in bf16, with its checkpoint still there. What lies on disk is not what the stage ended with; `load_exactly` is.

# %%
save_model(grown, tokenizer, stage / "model", torch.bfloat16)
saved = dict(dtype="bfloat16", weights=weights_hash(grown, torch.bfloat16))
write_json(stage / "stage.json", ended | dict(end=weights_hash(grown), saved=saved))
optimizer, scaler = torch.optim.AdamW(grown.parameters()), torch.amp.GradScaler("cpu", enabled=False)
save_checkpoint(stage, grown, optimizer, scaler, dict(batch=0))

assert weights_hash(load_stage(stage)) != weights_hash(grown)
assert weights_hash(load_exactly(stage)) == weights_hash(grown)

on_disk = torch.cat([p.flatten() for p in load_stage(stage).parameters()])
ended_with = torch.cat([p.flatten() for p in grown.parameters()])
differ = (on_disk != ended_with).float().mean()
print(f"{differ:.0%} of the weights on disk are not what the stage ended with")



# %% [markdown]
# A stage that trains [adapters](09_lora.ipynb) saves an adapter in `model`, and not the weights beneath it, which are S's. The adapter is kept in fp32, whatever the dtype of S, so nothing of it is rounded away.

# %%
#| export
def save_adapter(
    adapter: Adapter, # on S
    tokenizer,        # goes into the same folder
    path,             # of the folder; what was there is replaced
    base: str,        # path or hub id of S
    revision: str=None, # of a hub id
):
    "An adapter as PEFT reads it, under a temporary name, then renamed."
    local = Path(base).expanduser()
    there = str(local.resolve()) if local.is_dir() else base
    with replacing(path) as tmp:
        tmp.mkdir()
        write_adapter(adapter, tmp, there, revision)
        tokenizer.save_pretrained(tmp)
        _readable(tmp, CONFIG_FILE)


# %%
shutil.rmtree(stage)
stage.mkdir()
base = tmp / "S"
save_model(model, tokenizer, base)

small = SimpleNamespace(lora_r=2, lora_alpha=0, lora_targets="q_proj", seed=0)
adapted = add_adapter(load_model(base, "cpu"), small)
save_adapter(adapter_of(adapted), tokenizer, stage / "model", str(base))
inside(stage / "model")


# %% [markdown]
# That is half a model. The other half is S, and `config.yaml` holds the hash of S. What the stage ended with is *S with this adapter merged*, and from here on it is a model like any other.

# %%
#| export
def load_base(
    folder, # of a run
):          # S in fp32, on the CPU
    """S, where the run kept it, or where it was said to lie.

    Raises ValueError where it is not there, or another model is.
    """
    config, kept = read_part(Path(folder) / "config.yaml"), Path(folder) / "base" / "model"
    where = str(kept) if kept.exists() else config["model"]
    S = load_model(where, "cpu", config.get("revision"))
    found = weights_hash(S)
    if found == config["weights"]: return S
    raise ValueError(f"{where}: has weights {found}, but the adapters of this run belong on S "
                     f"with {config['weights']}; put S back")

def load_merged(
    folder,           # of a stage that saved an adapter
    device: str=None, # as for `load_model`
):                    # M_t in fp32, a plain model
    "S with the adapter of a stage merged. Raises ValueError where one of them is missing, or another."
    return _merged(load_base(Path(folder).parent), Path(folder) / "model", device)

def _merged(base, folder, device):
    with naming(folder): merge_adapter(base, read_adapter(folder))
    return base.to(device or best_device(base))


# %% [markdown]
# Our adapter has learned nothing yet: its matrix $B$ starts at zero. Which model should `load_stage` give back? And what if somebody then exchanges S beneath the adapter?

# %%
write_json(stage / "stage.json", ended)
nothing = dict(sources={}, settings={}, versions={}, pairs="", device="cpu")
begun = nothing | dict(model=str(base), weights=weights_hash(model))
(tmp / "config.yaml").write_text(yaml.safe_dump(begun))
assert weights_hash(load_stage(stage)) == weights_hash(model) # S itself

save_model(grown, tokenizer, base)                            # S is exchanged
print(complaint(load_stage, stage))
(tmp / "config.yaml").unlink()


# %% [markdown]
# Some adapters come from outside a run, made by PEFT. No `config.yaml` says which S they belong on, and all there is to follow is the name of the base that PEFT wrote beside the adapter. The other model still lies under that name. Will `load_any` notice?

# %%
#| export
def load_any(
    place,            # folder or hub id of a model, or folder of an adapter, of a stage or by PEFT
    device: str=None, # as for `load_model`
):                    # a plain model, in fp32 where it is merged
    "The model that lies there; an adapter is merged into the base that it names, whose weights are taken as they are."
    place = os.path.expanduser(place) # a hub id stays as it is
    if not is_adapter(place): return load_model(str(place), device)
    named, revision = _base_of(place)
    return _merged(load_model(named, "cpu", revision), Path(place), device)

def _base_of(folder): # the model that an adapter names, and its revision or None
    path = Path(folder) / CONFIG_FILE
    with naming(path): config = dict(json.loads(path.read_text(encoding="utf-8")))
    named = config.get("base_model_name_or_path")
    if named and isinstance(named, str): return named, config.get("revision")
    raise ValueError(f"{folder}: the adapter does not name its base; write it into {CONFIG_FILE}")

def load_saved_tokenizer(
    folder, # in which a stage, or PEFT, saved a model or an adapter; or a hub id
):
    "The tokenizer that lies there; beside an adapter without one, that of its base."
    folder = os.path.expanduser(folder)
    if not is_adapter(folder): return load_tokenizer(str(folder))
    if not (Path(folder) / "tokenizer_config.json").exists(): return load_tokenizer(*_base_of(folder))
    with naming(Path(folder)): return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


# %%
assert weights_hash(load_any(stage / "model", "cpu")) == weights_hash(grown) # the exchanged one, without a word
assert len(load_saved_tokenizer(stage / "model")) == len(tokenizer)

# %% [markdown]
# It cannot notice: a name is all it has. So inside a run we use `load_stage`, and `load_any` only for models that no run has made.

# %% [markdown]
# S itself may come in as an object, not as a path. Some code then reloads "the" model by the name in its config. Does it get the same one?

# %%
reloaded = load_model(grown.config._name_or_path, "cpu")
{"the object": weights_hash(grown), "by its name": weights_hash(reloaded)}


# %% [markdown]
# It gets the model that the object was made of, not the object. Here the object is saved into the run first, and from then on it has a path like any other.

# %%
#| export
def base_folder(
    model,       # hub id, folder, or a loaded causal LM
    tokenizer,   # of a loaded model; else None is fine
    folder: Path, # of the run
    revision: str=None, # of a hub id
) -> tuple:      # path or hub id of S, its tokenizer
    """Where S lies.

    A loaded model is saved under base/model. Raises ValueError where the run was started with other
    weights.
    """
    if isinstance(model, (str, Path)):
        return str(model), tokenizer or load_tokenizer(str(model), revision)
    check_model(model)
    if tokenizer is None:
        raise ValueError("model: a loaded model needs its tokenizer, sdpo(model=..., tokenizer=...)")
    path = folder / "base" / "model"
    started = (folder / "config.yaml").exists()
    if started:
        mine = weights_hash(model, torch.float32)
        theirs = read_part(folder / "config.yaml")["weights"]
        if mine != theirs:
            raise ValueError(f"{folder}: this run was started with a model of weights {theirs}, "
                             f"the loaded one has {mine}; use that or another folder")
    if not (started and path.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, tokenizer, path)
    return str(path), tokenizer


# %%
print(complaint(base_folder, grown, None, tmp))
where, _ = base_folder(grown, tokenizer, tmp)
assert weights_hash(load_model(where, "cpu")) == weights_hash(grown)
print("saved under", Path(where).relative_to(tmp))
shutil.rmtree(tmp / "base")
shutil.rmtree(stage)

# %% [markdown]
# ## Is this the same run?
#
# We call the run from the beginning of the chapter again, with another $\beta$. Without a guard, which $\beta$ would the report name, and what would its two stages have been trained with?

# %%
other_beta = StepwiseConfig(beta=0.2, lr=3e-4, precision="fp32")
print(complaint(sdpo, w.base, few, other_beta, real))

# %% [markdown]
# It refuses, because half a run at one $\beta$ and half at another is no run. But not every change is a mistake. Say stage 1 is finished. Which of these should be refused: another `beta`; `bf16` for `fp32`; a checkpoint every 7 steps; two threads for one; the file of pairs in another place?
#
# | what | for example | may it change? |
# | --- | --- | --- |
# | what the weights depend on | `beta`, the pairs, S | no |
# | how it is computed | `precision`, rows packed or padded | until the first update is saved |
# | what it is computed on | threads, card, versions | yes, and the run says so |
# | what changes no weight | `save_every`, where S and the pairs lie | yes |
#
# The first two are refused. Where S and the pairs lie may change, since the hashes say what they are.
#
# `precision="auto"` is recorded as what it meant on this machine. Otherwise another machine would go on in another precision, and nobody would notice.
#
# `COMPUTED_ALIKE` comes from [chapter 6](06_trainer.ipynb): settings that change memory and speed, and the sums only in their last bits. `RECORDED` lists what a run writes down itself. You can give its `config.yaml` to `sdpo run --config` again, and then these lines are no settings.

# %%
#| export
FREE = {"save_every", "log_with"} # may change at any time

HOW = {"precision", "compile", "deterministic"} | (COMPUTED_ALIKE - FREE) # until the first update is saved

RECORDED = [ # in config.yaml, beside what was asked for
    "weights", "reference_weights", "pairs", "held_out_pairs", "base",
    "versions", "device", "not_deterministic", "machine", "command", "loss_code",
]

MAY_DIFFER = FREE | { # of config.yaml, between two calls
    "settings", "versions", "machine", "device", "model", "revision", "held_out", "not_deterministic", "command",
    "loss_code",
}

# %%
assert "beta" not in FREE | HOW
{"at any time": sorted(FREE), "until the first update": sorted(HOW)}


# %% [markdown]
# So two `config.yaml` are compared without what may differ. Of the sources only the names are compared: where the data lie may change, and what they are is in the hash of the pairs.

# %%
#| export
def _compared(config):
    "What must agree between two calls on one folder."
    flat = config | config["settings"]
    compared = {name: value for name, value in flat.items() if name not in MAY_DIFFER}
    return compared | dict(sources=list(config["sources"]))


# %%
def made_up(**changes):
    "A config.yaml, as far as it matters here."
    settings = dict(beta=0.3, save_every=50, precision="fp32") | changes
    sources, versions = dict(riddle="riddle.jsonl"), dict(transformers="5.23")
    return dict(sources=sources, settings=settings, weights="1f0c", device="cpu", versions=versions)

moved = made_up() | dict(sources=dict(riddle="elsewhere/riddle.jsonl"))
assert _compared(moved) == _compared(made_up())
_compared(made_up())

# %% [markdown]
# What is left must agree. Two things need care:
#
# - The folder may be older than an entry. A setting that did not exist then had one value in every run, and `AS_BEFORE` lists these. An entry that an older folder could not have, like the hash of the held-out pairs, is not compared.
# - `base` is a hash of S's config. Another version of transformers may give that config more fields, so then it is not compared.
#
# The first difference that is told is a setting, if there is one: `beta` says more than the hash that it changed.

# %%
#| export
AS_BEFORE = dict( # what every run did before one could choose, for older folders
    lora_r=0,
    lora_alpha=0,
    lora_targets="all-linear",
    lora_stages="merge",
    schedule="linear",
    order_by="gamma",
)
NOT_IN_OLDER = "base", "held_out_pairs", "eval_share"

def _differences(there, new) -> dict: # name -> (what it was, what it is now)
    "What differs and must not, the settings first: they say more than the hash that they changed."
    now = _compared(new)
    absent = {name: now.get(name) for name in NOT_IN_OLDER}
    old = absent | AS_BEFORE | _compared(there)
    if there["versions"].get("transformers") != new["versions"]["transformers"]:
        old["base"] = now.get("base")
    names = sorted(now, key=lambda name: name not in new["settings"])
    return {name: (old.get(name), now[name]) for name in names if old.get(name) != now[name]}


# %%
assert _differences(made_up(), made_up(save_every=7)) == {} # may change at any time
assert _differences(made_up(), made_up(lora_r=0)) == {}     # a folder from before there were adapters
assert _differences(made_up(), made_up(lora_r=8)) == dict(lora_r=(0, 8))
updated = made_up() | dict(versions=dict(transformers="5.24"), base="77ab")
assert _differences(made_up() | dict(base="1234"), updated) == {}
_differences(made_up(), made_up(beta=0.2, precision="bf16"))


# %% [markdown]
# What is left is the machine. With another number of threads a sum is added up in another order, and other versions may compute in another way. That is no mistake, so a run goes on; but it says so.

# %%
#| export
def what_differs(
    old: dict, # a config.yaml
    new: dict, # the config.yaml that this call would write
) -> str:      # nothing, where they agree
    "A sentence, where two calls on one folder compute on different machines."
    was, now = _facts(old), _facts(new)
    differs = [name for name in now if name in was and was[name] != now[name]]
    if not differs: return ""
    told = [f"{_fact(name, now[name])}, started with {was[name]}" for name in differs]
    return f"goes on with {'; with '.join(told)}: the last bits may differ"

def _facts(config): return dict(device=config["device"]) | config.get("machine", {}) | config["versions"]

def _fact(name, value):
    if name != "threads": return f"{name} {value}"
    return f"{value} {'thread' if value == 1 else 'threads'}"


# %%
here = dict(device="cpu", machine=dict(threads=1, cpu="AVX2"), versions=dict(torch="2.13.0"))
there = here | dict(machine=dict(threads=2, cpu="AVX2"), versions=dict(torch="2.14.0"))
assert what_differs(here, here) == ""
what_differs(here, there)


# %% [markdown]
# Where do these facts come from? We ask torch for the machine and Python for the versions. If git holds the package, we ask it for the commit; a `+` after it means that the code was changed since. A package that was installed into some other project's folder has nothing to do with the commit of that project.

# %%
#| export
def machine_of(
    device: torch.device, # that a run computes on
) -> dict: # card; or threads, cpu
    "What the last bits depend on, beside the settings: the card, or threads and kind of CPU."
    if device.type == "cuda": return dict(card=torch.cuda.get_device_name(device))
    return dict(threads=torch.get_num_threads(), cpu=torch.backends.cpu.get_cpu_capability())

def _git(*words):
    "What git says in the folder of the package; None where it has nothing to say."
    ask = ["git", "-C", Path(sdpo_nb.__file__).resolve().parent, *words]
    try: said = subprocess.run(ask, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError): return None
    return said.stdout.strip() if said.returncode == 0 else None

def package_commit() -> str|None: # None where git does not hold the package
    "The commit of this package, with a + where its files were changed."
    if _git("ls-files", "--error-unmatch", "__init__.py") is None: return None
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".")
    head = _git("rev-parse", "--short", "HEAD")
    return f"{head}+" if head and changed else head

@functools.cache
def versions() -> dict[str, str]: # package -> its version
    "Of what computes, and of this package with the commit that it is at, where that can be known."
    found = {p: version(p) for p in ("torch", "transformers", "datasets", "accelerate", "sdpo_nb")}
    commit = package_commit()
    if commit: found["sdpo_nb"] += f" at {commit}"
    return found


# %%
list(machine_of(torch.device("cpu"))), list(versions())


# %% [markdown]
# `config.yaml` also says what was typed, so that you can type it again. Some settings are functions, and a YAML file cannot hold a function. It holds the name. A name stays when somebody changes what the function computes, so a loss of your own leaves a hash of its code, too.

# %%
#| export
def command() -> str: # as a shell takes it
    "What was typed; of a call from Python, the script."
    name = Path(sys.argv[0]).name
    return shlex.join(["sdpo" if name in ("sdpo", "cli.py") else name, *sys.argv[1:]])

def recorded(
    value, # of a setting
):         # a number, a text, a list or None
    "A setting as config.yaml can hold it: of a function, the name."
    if isinstance(value, (int, float, str, list, type(None))): return value
    return getattr(value, "__qualname__", type(value).__name__)

def code_hash(
    function, # or anything else
) -> str|None: # 16 hex digits; None for what has no code of its own
    "A hash of what a function does by itself. Another version of Python may give another one."
    code = getattr(function, "__code__", None)
    return hashlib.sha256(_code_text(code).encode()).hexdigest()[:16] if code else None

def _code_text(code):
    "Instructions, names and constants, as text that is the same in every process."
    constants = []
    for c in code.co_consts:
        if isinstance(c, frozenset): c = sorted(map(repr, c))
        constants.append(_code_text(c) if isinstance(c, CodeType) else repr(c))
    return repr((code.co_code, code.co_names, constants))

def _other_code(old, new):
    "A sentence, where a loss has its name and no longer its code."
    was, now = old.get("loss_code"), new.get("loss_code")
    if not was or not now or was == now: return ""
    name = new["settings"]["loss"]
    return f"the code of loss {name} is not that which it was started with (or another Python compiled it)"


# %%
typed, sys.argv = sys.argv, ["/usr/bin/sdpo", "run", "--folder", "my runs/first"]
said = command()
sys.argv = typed
said, recorded(0.3), recorded(made_up)


# %%
def margin(chosen, rejected): return chosen - rejected
before = code_hash(margin)
def margin(chosen, rejected): return rejected - chosen
assert code_hash(margin) != before
assert recorded(margin) == "margin"


# %% [markdown]
# When is a change of *how* it is computed harmless? As long as no update has been saved. A stage that has only begun holds nothing that could be spoilt. `SAID` gives the three entries whose names say too little: `base`, the hash of S's config, `pairs`, which are other ones after a change of the sources or of the tokenizer, and `held_out_pairs`.

# %%
#| export
def _has_trained(folder):
    "Whether an update of any stage has been saved."
    marks = ("checkpoint/state.pt", "stage.json")
    return any((folder_of(folder, t) / mark).exists() for t in stage_numbers(folder) for mark in marks)

SAID = { # names shown in messages
    "base": "a config of S with the hash",
    "pairs": "pairs (sources and tokenizer) with the hash",
    "held_out_pairs": "held-out pairs with the hash",
}

def _check_may_differ(folder, differs):
    "Raise ValueError unless only the way of computing differs and nothing has been trained."
    first = next((name for name in differs if name not in HOW), next(iter(differs)))
    if first in HOW and not _has_trained(folder): return
    was, now = differs[first]
    raise ValueError(f"{folder}: this run was started with {SAID.get(first, first)} = {was}, not {now}; "
                     "use that or another folder")


# %%
assert not _has_trained(tmp)
_check_may_differ(tmp, dict(precision=("fp32", "bf16"))) # nothing to protect yet
print(complaint(_check_may_differ, real, dict(precision=("fp32", "bf16"))))
print(complaint(_check_may_differ, tmp, dict(pairs=("90d2", "11aa"))))


# %% [markdown]
# All of it goes into the folder: `open_folder` writes `config.yaml`, or compares with the one that is there. Names and numbers may come from NumPy or pandas, whose types YAML does not know; they are written as plain ones.

# %%
#| export
def _plain(value):
    "The same value in the types that YAML knows."
    if isinstance(value, dict): return {_plain(name): _plain(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)): return [_plain(v) for v in value]
    if isinstance(value, (str, Path)): return str(value)
    if isinstance(value, Integral) and type(value) is not bool: return int(value)
    return float(value) if isinstance(value, Real) and type(value) is not bool else value

def open_folder(
    folder: Path,   # of the run
    config,         # the settings, a dataclass
    precision: str, # fp32, bf16 or fp16: what "auto" meant
    identity: dict, # hashes and names of S, the sources, the machine: what config.yaml holds beside settings
) -> str:           # what may change the last bits, or nothing
    """Write config.yaml, or compare with the one that is there.

    Raises ValueError naming the first difference that matters.
    """
    settings = {f.name: recorded(getattr(config, f.name)) for f in fields(config)}
    settings["precision"] = precision
    new = _plain(identity | dict(settings=settings, versions=versions(), command=command()))
    path = folder / "config.yaml"
    if path.exists():
        there = read_part(path)
        differs = _differences(there, new)
        if not differs:
            if _other_code(there, new) and not _has_trained(folder): # nothing is here that the old loss has made
                there["loss_code"] = new["loss_code"]
                _write_config(path, there)
            return "; ".join(filter(None, [what_differs(there, new), _other_code(there, new)]))
        _check_may_differ(folder, differs)
        said = ", ".join(f"{name} = {now}" for name, (_, now) in differs.items())
        print(f"{folder}: nothing was trained here yet; goes on with {said}")
        (folder / "partition.json").unlink(missing_ok=True) # it is measured anew
    _write_config(path, new)
    return ""

def _write_config(path, config):
    with replacing(path) as tmp: tmp.write_text(yaml.safe_dump(config, sort_keys=False))


# %% [markdown]
# A made-up run is opened three times. The second call differs only in how often a checkpoint is written. Will `config.yaml` have the new value? The third changes the precision, before anything was trained.

# %%
S_here = dict(
    model="S",
    weights="1f0c",
    base="77ab",
    sources=dict(riddle="riddle.jsonl"),
    pairs="90d2",
    device="cpu",
    machine=dict(threads=1, cpu="AVX2"),
)
assert open_folder(tmp, TrainConfig(beta=0.3), "fp32", S_here) == ""
assert open_folder(tmp, TrainConfig(beta=0.3, save_every=7), "fp32", S_here) == ""
kept = read_part(tmp / "config.yaml")["settings"]["save_every"]
assert kept == TrainConfig(beta=0.3).save_every # what the first call asked for
with contextlib.redirect_stdout(io.StringIO()) as said:
    open_folder(tmp, TrainConfig(beta=0.3), "bf16", S_here)
print(said.getvalue().replace(str(tmp), "run"))

# %% [markdown]
# Now a stage is trained (here its mark is enough), and the same change is refused. So is another `beta`. Another number of threads is only reported.

# %%
(tmp / "stage-1/checkpoint").mkdir(parents=True)
(tmp / "stage-1/checkpoint/state.pt").touch()
print(complaint(open_folder, tmp, TrainConfig(beta=0.3), "fp32", S_here))
print(complaint(open_folder, tmp, TrainConfig(beta=0.2), "bf16", S_here))

elsewhere = S_here | dict(machine=dict(threads=2, cpu="AVX2"))
print(open_folder(tmp, TrainConfig(beta=0.3), "bf16", elsewhere))

# %% [markdown]
# The guard keeps an honest user from a mistake. It is no seal: if you change `beta` in `config.yaml` *and* in the call, it believes you.

# %%
config = read_part(tmp / "config.yaml")
config["settings"]["beta"] = 0.2
(tmp / "config.yaml").write_text(yaml.safe_dump(config))
assert open_folder(tmp, TrainConfig(beta=0.2), "bf16", S_here) == ""

# %% [markdown]
# One case is left: a folder with stages but without `config.yaml`, say because only some of it was copied. What would a run go on from?

# %%
shutil.copytree(real / "stage-1", tmp / "part/stage-1")
finished_stages(tmp / "part")

# %% [markdown]
# From stage 1, and nobody knows with which settings that was trained. So nothing may go on from it. A `report.md` that you wrote yourself looks the same from outside, and a run would write its own over it.

# %%
#| export
_WRITTEN = "partition.json", "held_out.json", "report.md", "figures" # by a run, beside base and its stages

def check_fresh(
    folder: Path, # that a run wants to work in
):
    """Raise ValueError for parts of a run without config.yaml, or somebody's files that have their names.

    A base/model alone is what an interrupted or refused call with a loaded model leaves; it is written
    anew.
    """
    if (folder / "config.yaml").exists(): return
    parts = [folder_of(folder, t) for t in stage_numbers(folder)]
    parts += [folder / name for name in _WRITTEN if (folder / name).exists()]
    parts += [p for p in (folder / "base").glob("*") if p.name != "model" and p.suffix != ".tmp"]
    if not parts: return
    part = parts[0].relative_to(folder)
    raise ValueError(f"{folder}: not empty and not a run, there is {part} but no config.yaml; "
                     "use another folder")


# %%
check_fresh(tmp / "new") # not there yet
check_fresh(real)        # a run
print(complaint(check_fresh, tmp / "part"))

# %% [markdown]
# ## Is anybody else at work here?
#
# A job seems to hang, you start it again, and both go on. Here two open files stand for the two jobs. Each writes steps 1, 2, 3. What will the file hold?

# %%
file = tmp / "metrics.jsonl"
with open(file, "a") as one, open(file, "a") as other:
    for step in (1, 2, 3):
        for process in (one, other): print(json.dumps(dict(step=step)), file=process, flush=True)
[json.loads(line)["step"] for line in file.read_text().splitlines()]


# %% [markdown]
# Neither of them notices. They would overwrite each other's checkpoint as well, and what is left belongs to no run. So a call holds a lock while it works. The usual way, a file that says "busy", stays behind when a process is killed, and then locks out everybody. This lock
# belongs to the system, which gives it back when the process dies, however it dies.

# %%
#| export
@contextmanager
def alone_in(
    folder, # of a run; made where it is missing
):          # a context, for as long as the work takes
    """Hold a folder's lock.

    Raises ValueError where another process has it, or where a launcher started several. On Windows, and
    on a disk that cannot be written to, there is none.
    """
    check_one_process()
    folder = Path(folder)
    try: folder.mkdir(parents=True, exist_ok=True)
    except OSError as e: raise OSError(f"{folder}: cannot be made ({e.strerror}); use another folder") from e
    lock = _open_lock(folder / ".lock") if fcntl else None
    try:
        if lock is not None and not _take(lock):
            raise ValueError(f"{folder}: another process works in this folder; "
                             "wait until it has ended, or use another folder")
        yield
    finally:
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_UN) # not left to closing: a forked process may still hold a copy
            os.close(lock)

def _open_lock(path):
    try: return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError: return None

def _take(lock) -> bool:
    try: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError: return False
    except OSError: pass # a file system without locks
    return True


# %%
with alone_in(tmp / "once"):
    print(complaint(alone_in(tmp / "once").__enter__))
assert (tmp / "once/.lock").exists() # the file stays,
with alone_in(tmp / "once"): pass     # the lock has been given back

# %% [markdown]
# And if the process that holds the lock is killed? It gets no chance to clean up.

# %%
hold = """
import fcntl, sys, time
file = open(sys.argv[1])
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(9)
"""
asked = [sys.executable, "-c", hold, tmp / "once/.lock"]
with subprocess.Popen(asked, stdout=subprocess.PIPE) as job:
    job.stdout.readline() # now it holds the lock
    print(complaint(alone_in(tmp / "once").__enter__))
    job.kill()
with alone_in(tmp / "once"): pass # free again

# %%
#| hide
shutil.rmtree(place)

# %% [markdown]
# ## What you now have
#
# | guard | without it |
# | --- | --- |
# | `read_yaml` | a setting that is given twice has its second value |
# | `read_part`, `naming` | "Expecting value: line 1 column 1", and forty files to search |
# | `stage_numbers`, `stage_folders` | stage 10 sorts before stage 2, and a copy counts as a stage |
# | `save_model` | half a model looks like a whole one |
# | `load_stage`, `load_exactly`, `base_folder` | another model, or a rounded one, is trained on |
# | `open_folder` | half a run at one $\beta$, half at another |
# | `check_fresh` | a run goes on from a stage whose settings nobody knows |
# | `alone_in` | two processes write one file |
#
# A folder that knows what it is. `read_part` reads each of its files or says what to do; `stage_folders` lists what is finished; `load_stage` gives you the model that a stage saved, and no other;
# `open_folder` lets a run go on only as the run that it was; `alone_in` keeps a second process out. The [next chapter](11_report.ipynb) reads such a folder, and [14](14_stepwise.ipynb) writes one.
#
# ## Questions to test yourself
#
# 1. Why is `stage.json` written last, after the model?
#
# <details><summary>Answer</summary>
#
# It is the mark that a stage is finished. If it came first and the process died before the model was complete, the next call would go on from a model that is not there, or from an old one.
#
# </details>
#
# 2. Why may `save_every` change between two calls, but not `beta`?
#
# <details><summary>Answer</summary>
#
# `save_every` says how often the state is written down. It changes no weight. With another `beta` the second half of the stage would minimise another loss, and no report could say which model came out.
#
# </details>
#
# 3. S is stored in bf16, and so are the models of its run, which was stopped after stage 1 and goes on. Why does it read the checkpoint of stage 1, and not the model beside it?
#
# <details><summary>Answer</summary>
#
# The model on disk is rounded to bf16. A run that was never stopped starts stage 2 from the fp32 weights in memory; only the checkpoint holds these. From the rounded ones it would end in another model.
#
# </details>
#
# 4. Why does a path not answer the question "which model is this"?
#
# <details><summary>Answer</summary>
#
# A path is a name, and what lies under a name can be exchanged. A hash of the weights is made of the weights themselves.
#
# </details>
#
# ## Try this
#
# Make a copy of a finished run (`sdpo demo` makes some in `runs/demo`), flip one byte in the middle of `stage-2/model/model.safetensors`, and call `load_stage` on the stage.
#
# <details><summary>What you should see</summary>
#
# One line: the path, the hash found, the hash that the stage ended with, and what to do. If you hit the header at the beginning of the file instead, the line says that the file cannot be read.
#
# </details>
