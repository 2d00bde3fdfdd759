# %% [markdown]
# # What is asked of a run
# > Settings, sources and chunks: all that goes into a run, read and checked before anything is computed.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/12_plan.ipynb)
#
# **You should know** how [pairs are read](01_preferences.ipynb), and what [a partition](05_partition.ipynb) is. If you came to learn what stepwise DPO does, read [chapter 14](14_stepwise.ipynb) first: it needs nothing of
# this one. **Time** an hour to read with its code, a few seconds to run.
#
# A run is asked for in three things: *settings* ($\beta$, the learning rate, how many stages), *sources* (named sets of preference pairs), and a *model*. People get all three wrong in ordinary ways. A setting is misspelt, or has the name that another trainer gives it. A source turns out to be half empty. A row has more tokens than the model has positions.
#
# Some of these mistakes end in an error after an hour. The others are worse: they end in a model. It was trained on half the data, or with a reference that reads other tokens, and nothing says so. So this chapter has one aim. **Whatever can be found out before the first step is found out before the first step, and said in one line that names the place.**
#
# ```
# what you write                                                     what is checked there
#
# settings --- make_config ---> StepwiseConfig                       names, bounds, what excludes what
# sources ---- read_rows -----> rows, as text                        files, columns
#         ---- load_sources --> Source, as ids                       what was dropped and cut (data_notes)
#         ---- part_sources --> to train on | held out               prompts on both sides (check_held_out)
#         ---- check_chunks --> D_1 ... D_T, by the partition (05)   names, enough pairs
# model -------- extent ------> check_rows (02)                      ids, positions
#         - foreign_weights --> the reference's hash                 the same vocabulary, and check_rows
# ```

# %%
#| default_exp plan

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
import difflib, unicodedata
from dataclasses import dataclass, fields, replace
from inspect import signature
from numbers import Integral, Real
from pathlib import Path

import pandas as pd
import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets

from sdpo_nb.logprobs import check_model, check_rows, load_model, load_tokenizer, pair_tokens, weights_hash
from sdpo_nb.partition import ORDER_BY, ORDERS
from sdpo_nb.preferences import Source, counts_table, hold_out, load_pairs, prompt_limit, tokenize_pairs
from sdpo_nb.trainer import TrainConfig, setting

# %%
import json, shutil, tempfile

from sdpo_nb.loss import dpo_loss
from sdpo_nb.preferences import decoded
from sdpo_nb.world import complaint, load_world

torch.set_num_threads(1)
pd.set_option("display.width", 180, "display.max_columns", 20, "display.max_colwidth", 90)

w = load_world()
tok = load_tokenizer(w.base)


# %% [markdown]
# ## Settings
#
# A run has the settings of [one stage](06_trainer.ipynb), and a few of its own. Six of these say what the stages are:
#
# | setting | the question | the paper's answer, the default |
# |---|---|---|
# | `chunks` | What does each stage train on? | one source |
# | `order` | Which source comes first? | the easiest |
# | `order_by` | What is [easy](05_partition.ipynb): sums over tokens, or means? | sums |
# | `init_target` | Where does the policy of a stage start? | at $M_{t-1}$, the model of the stage before |
# | `reference` | Which model is the reference? | $M_{t-1}$ too: it moves up |
# | `restart` | When do the optimizer and its schedule start anew? | in each stage |
#
# What one stage trains on is a *chunk*. You can ask for chunks in three ways: by their number, by lists of source names, or by a function that makes them on the way. The first cell brings the lists into one form, so that later code meets one form only.

# %%
#| export
def _chunks_setting(chunks):
    "None, a number or a function as it is; a list as lists of source names."
    if callable(chunks): _check_takes(chunks)
    if chunks is None or callable(chunks): return chunks
    if isinstance(chunks, Integral) and type(chunks) is not bool and chunks >= 1: return int(chunks)
    if not isinstance(chunks, (list, tuple)):
        raise ValueError("chunks: must be a whole number from 1, a list of source names or a function, "
                         f"got {chunks!r}")
    groups = [_group(g) for g in chunks]
    if not groups or not all(groups):
        raise ValueError("chunks: a list must hold source names, or lists of them, "
                         f"and none may be empty; got {chunks!r}")
    return groups

def _check_takes(chunks):
    "Raise ValueError for a function that cannot be called with a stage and a model."
    try: signature(chunks).bind(1, None)
    except TypeError as e: raise ValueError(f"chunks: the function must take (t, model): {e}") from e
    except ValueError: pass # one in C, which does not say what it takes

def _group(names):
    "A name alone is a chunk of one; nothing, where it is no name and no list of names."
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)): return []
    return list(names) if all(isinstance(n, str) for n in names) else []


# %%
assert _chunks_setting(3) == 3
print(complaint(_chunks_setting, 0))
_chunks_setting(["primer", ("digest", "riddle")])


# %% [markdown]
# Now the settings. Read the cell as a table: a name, a default, a meaning, bounds or choices. The command line makes its options from it, `config.yaml` its lines, and the table below its rows, so they cannot say different things.

# %%
#| export
@dataclass
class StepwiseConfig(TrainConfig):
    "Settings of a run: those of a stage, and what the stages are."
    lr: float = setting(
        None,
        "peak learning rate of AdamW; none: 5e-7, and 5e-6 with adapters (lora_r)",
        0, 1e3, open_low=True)
    order: str = setting("easy_to_hard", "which source comes first", choices=ORDERS)
    order_by: str = setting(
        "gamma",
        "what is easy: gamma sums over tokens, gamma_per_token takes the mean",
        choices=tuple(ORDER_BY))
    chunks: object = setting(
        None,
        "number of stages T; none: one per source. In Python also lists of source names, "
        "or a function (t, model) -> pairs that returns None to end")
    init_target: str = setting(
        "previous",
        "where a stage starts: at M_{t-1} or at the SFT base S",
        choices=("previous", "S"))
    reference: str = setting("moving", "moving (M_{t-1}), fixed (S), or the folder of a model")
    restart: str = setting(
        "stage",
        "optimizer and schedule: new in every stage, or never",
        choices=("stage", "never"))
    max_length: int = setting(
        1024,
        "longest prompt + response in tokens; the response's tail is cut",
        low=2)
    max_prompt_length: int = setting(
        0,
        "longest prompt in tokens, its end is kept; 0: half of max_length",
        low=0)
    probe: int = setting(
        512,
        "pairs of each chunk on which every model is measured for the report",
        low=1)
    eval_share: float = setting(
        0.0,
        "share of the prompts of each source that is held out: never trained on, measured after every stage",
        low=0,
        high=0.9)
    log_with: str = setting(
        "none",
        "a tracker that gets every step, if it is installed: tensorboard, wandb, trackio, or none")
    save_dtype: str = setting(
        "S",
        "dtype of the models on disk: that of S, or fp32",
        choices=("S", "fp32"))
    lora_r: int = setting(
        0,
        "rank of LoRA adapters, which are trained in place of the weights; 0: none",
        low=0)
    lora_alpha: int = setting(0, "adapters count alpha / r times; 0: alpha is 2 r", low=0)
    lora_targets: str = setting(
        "all-linear",
        "layers that get an adapter: all-linear (all but the output layer), or names, with commas")
    lora_stages: str = setting(
        "merge",
        "merge: each stage has a new adapter on the merged model; same: one adapter goes on",
        choices=("merge", "same"))
    device: str = setting(
        "auto",
        "auto: the graphics card, if there is one and the model is not tiny; cpu; or cuda",
        choices=("auto", "cpu", "cuda"))

    def __post_init__(self):
        defaults = {f.name: f.default for f in fields(self)}
        left_open = [name for name in _FOLLOW if getattr(self, name) == defaults[name]]
        if self.lr is None: self.lr = 5e-6 if self.lora_r else 5e-7
        super().__post_init__() # bounds and choices
        self.max_prompt_length = prompt_limit(self.max_length, self.max_prompt_length)
        self.chunks = _chunks_setting(self.chunks)
        _check_chunks_and_order(self)
        _check_reference(self)
        _check_adapters(self)
        self.filled_in = {name: (getattr(self, name), defaults[name]) for name in left_open}

_FOLLOW = "lr", "order", "max_prompt_length" # where nobody gives them, they follow from other settings


# %% [markdown]
# Bounds and choices look at one setting at a time. But some settings are good alone and wrong together. Chunks that you list have their own order, so an `order` beside them would be ignored. An optimizer that never restarts needs weights that go on, and a new adapter has new ones.

# %%
#| export
def _check_chunks_and_order(config):
    "Chunks that are given have their own order; those that a function makes are not known beforehand."
    if isinstance(config.chunks, list) or callable(config.chunks):
        if config.order not in ("easy_to_hard", "as_given"):
            raise ValueError("order: chunks that are given have their own order, "
                             f"so it cannot be {config.order}")
        config.order = "as_given"
    if callable(config.chunks) and config.restart == "never":
        raise ValueError("restart: 'never' needs all chunks beforehand, so chunks cannot be a function")
    if callable(config.chunks) and config.eval_share:
        raise ValueError("eval_share: of chunks that a function makes nothing is held out; "
                         "give held_out a source of its own")

def asked_device(
    config: StepwiseConfig,
) -> str: # cpu or cuda; None where the model decides
    "The device that the settings name. Raises ValueError for a graphics card that is not there."
    if config.device == "auto": return None
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: there is no graphics card here; take auto or cpu")
    return config.device

def _check_reference(config):
    if config.reference in ("moving", "fixed"): return
    if not (Path(config.reference) / "config.json").is_file():
        raise ValueError("reference: must be moving, fixed or the folder of a model; "
                         f"there is no model in {config.reference!r}")

def _check_adapters(config):
    "Settings of adapters that are not there, and ways of going on that exclude each other."
    asked = config.lora_alpha, config.lora_targets, config.lora_stages
    if not config.lora_r and asked != (0, "all-linear", "merge"):
        raise ValueError("lora_r: is 0, so there are no adapters for lora_alpha, lora_targets "
                         "or lora_stages; set lora_r, for example to 16")
    if config.lora_stages == "same" and config.init_target == "S":
        raise ValueError("lora_stages: 'same' goes on with the adapter of the stage before, "
                         "and init_target = S begins anew; choose one of them")
    if config.lora_r and config.lora_stages == "merge" and config.restart == "never":
        raise ValueError("restart: 'never' needs weights that go on, and each stage has a new adapter; "
                         "take lora_stages = same")


# %% [markdown]
# All of this runs when the settings are made, long before a model is loaded. Which of these five are wrong alone, and which only together?

# %%
mistakes = [
    dict(order="easy"),
    dict(reference="runs/nowhere"),
    dict(chunks=["primer", []]),
    dict(order="random", chunks=["primer", "riddle"]),
    dict(lora_alpha=32), # and no lora_r
]
for wrong in mistakes: print(complaint(StepwiseConfig, **wrong))


# %% [markdown]
# Some settings follow from others where nobody gives them: the learning rate from `lora_r`, the longest prompt from `max_length`, the order from chunks that are given. What happens to them when you change the setting they came from? A plain copy would keep the old numbers, and nobody chose those. So a config remembers what it filled in, and a changed copy fills it in anew. What you gave stays, also what you gave later, by assignment.

# %%
#| export
def changed(
    config: StepwiseConfig,
    **settings, # that get another value
) -> StepwiseConfig: # a copy
    "The same settings but for these; what nobody gave is filled in anew."
    filled_in = config.filled_in.items()
    again = {name: default for name, (value, default) in filled_in if getattr(config, name) == value}
    return replace(config, **again | settings)


# %%
small = StepwiseConfig(lora_r=16)
full = changed(small, lora_r=0, max_length=256)
assert (full.lr, full.max_prompt_length) == (5e-7, 128)
assert changed(StepwiseConfig(lr=1e-4), lora_r=16).lr == 1e-4 # given, so it stays
later = StepwiseConfig()
later.lr = 1e-4
assert changed(later, lora_r=16).lr == 1e-4
assert changed(StepwiseConfig(chunks=["riddle", "primer"]), chunks=2).order == "easy_to_hard"
print(f"lr {small.lr} -> {full.lr}, max_prompt_length {small.max_prompt_length} -> {full.max_prompt_length}")


# %% [markdown]
# All settings in one table, those of a stage first:

# %%
#| export
def defaults_table() -> pd.DataFrame: # setting: the index; default, meaning
    "Every setting, its default and its meaning."
    rows = [(f.name, str(f.default), f.metadata["help"]) for f in fields(StepwiseConfig)]
    return pd.DataFrame(rows, columns=["setting", "default", "meaning"]).set_index("setting")


# %%
defaults_table()

# %% [markdown]
# Thirty-five settings look like a lot. Most of them change no result, or are right as they are. These are the ones to think about, in this order:
#
# | setting | what to ask yourself |
# |---|---|
# | `max_length` | How long are my prompts and responses in tokens? `sdpo data` says how many are cut. Memory and time grow with it. |
# | `lr` | How many steps will there be? The default is the paper's, for models of billions of parameters and tens of thousands of pairs. With a few hundred pairs, $5\cdot10^{-7}$ for ten steps changes nothing: small runs need a larger one. The report has [a sign](08_evaluate.ipynb) for a stage that changed nothing. |
# | `beta` | How far may the model go from S? A smaller one lets it go further, and so do more stages: [$T$ stages at $\beta$ are held about as tightly as one stage at $\beta/T$](03_loss.ipynb). |
# | `eval_share` | With which pairs shall I find out whether it helped? With 0 there are none, and the report cannot say. |
# | `precision` | Does the machine compute in bf16? `auto` takes it where it does. Weights are kept in fp32 in any case ([06](06_trainer.ipynb)). |
# | `token_budget` | Only if the memory is too small, or if much of it is free. It is not the batch size: gradients stay what they are ([04](04_packing.ipynb)). |
# | `lora_r` | Is the memory too small for all weights? 16 is a usual rank ([09](09_lora.ipynb)). |
# | `order`, `reference`, `init_target` | Leave them, unless the question is about them. |
#
# Settings also come from files and command lines. There people misspell them, or call them what another trainer does. So an unknown name is answered with what was probably meant.

# %%
#| export
CALLED = dict( # elsewhere
    learning_rate="lr",
    num_train_epochs="epochs",
    num_epochs="epochs",
    max_grad_norm="clip",
    warmup_ratio="warmup",
    per_device_train_batch_size="batch_size",
    gradient_accumulation_steps="batch_size",
    train_batch_size="batch_size",
    bf16="precision",
    fp16="precision",
    dtype="precision",
    torch_dtype="precision",
    torch_compile="compile",
    r="lora_r",
    rank="lora_r",
    target_modules="lora_targets",
    lr_scheduler_type="schedule",
    loss_type="loss",
    max_seq_length="max_length",
    save_steps="save_every",
    report_to="log_with",
    ref_model="reference",
)
ABSENT = dict( # what others have and a run has not
    max_completion_length="a response may be as long as its prompt leaves room in max_length",
    max_steps="epochs says how often each pair is seen",
    warmup_steps="warmup is a share of the steps",
    weight_decay="AdamW runs without it",
    lora_dropout="nothing is dropped while a stage trains",
    precompute_ref_log_probs="the reference is always asked once, beforehand",
)

def no_such_setting(
    name: str, # as it was typed
) -> str:
    "What to say of a setting that does not exist: why, its nearest neighbour, or all there are."
    if name in ABSENT: return f"there is no setting '{name}': {ABSENT[name]}"
    known = [f.name for f in fields(StepwiseConfig)]
    near = [CALLED[name]] if name in CALLED else difflib.get_close_matches(str(name), known, 1)
    advice = f"did you mean '{near[0]}'?" if near else f"settings are {', '.join(known)}"
    return f"unknown setting '{name}'; {advice}"


# %%
print(no_such_setting("bta"))
print(no_such_setting("learning_rate"))
print(no_such_setting("per_device_train_batch_size"))
print(no_such_setting("warmup_steps"))

# %% [markdown]
# The name is translated, and the value is yours to translate. Elsewhere 8 pairs per device and 4 accumulated steps make one optimizer step of 32 pairs; here that is `batch_size=32`.
#
# A settings file goes through the same checks, and has a trap. People write `1e-4`. What does YAML read?

# %%
import yaml
for written in ("1e-4", "1.0e-4"): print(written, "is read as", repr(yaml.safe_load(written)))


# %% [markdown]
# Without a point it is text. People mean a number, so text that means one becomes one, where a number is wanted.

# %%
#| export
def make_config(
    settings: dict, # names and values, from a file or a command line
) -> StepwiseConfig:
    "A StepwiseConfig; raises ValueError for an unknown setting, naming its nearest neighbour."
    types = {f.name: f.type for f in fields(StepwiseConfig)}
    values = {}
    for name, value in settings.items():
        if name not in types: raise ValueError(no_such_setting(name))
        values[name] = _number(value) if types[name] in (int, float) else value
    return StepwiseConfig(**values)

def _number(value):
    "Text that means a number, as a number; all else as it is."
    if not isinstance(value, str): return value
    for kind in (int, float): # a float would lose the last digits of a long seed
        try: return kind(value)
        except ValueError: pass
    return value


# %%
print(complaint(make_config, dict(lr="fast")))
make_config(dict(lr="1e-5")).lr

# %% [markdown]
# ## Sources
#
# A *source* is a named set of preference pairs. It may come as a path, a hub id, rows in memory, or a dict with the arguments of `load_pairs`, where columns need other names or a split is wanted. With `max_pairs` in its dict, a source gives its first rows only; each source has a number of its own.
#
# Reading has two halves: the rows, as texts, and their token ids. Rows are quick to read, and ids take long. So the rows of *all* sources are read before the first source is tokenised: a typing error in the last path is found in seconds. The rows are wanted again when somebody asks for the texts of a chunk, [to train elsewhere](14_stepwise.ipynb).

# %%
#| export
OF_A_SOURCE = {"split", "revision", "columns", "chat", "max_pairs", "eval_share"} # beside where it lies

def load_sources(
    sources: dict, # name -> path, hub id, rows, Dataset, `Source`, or a dict with 'source' and more of OF_A_SOURCE
    tokenizer,     # of the model that will read them
    config: StepwiseConfig, # its lengths and eval_share count
    called: str="sources",  # in messages
) -> list[Source]: # in the order given
    "Tokenise every source; raises ValueError naming the one that cannot be used."
    if not sources or not isinstance(sources, dict):
        raise ValueError(f"{called}: expected {{'name': 'file, folder or hub id'}}, with at least one name")
    # all are read before the first is tokenised
    rows = {name: _rows_of(name, what) for name, what in sources.items()}
    return [_tokenised(name, what, rows[name], tokenizer, config) for name, what in sources.items()]

def _rows_of(name, what):
    if not isinstance(what, Source): return read_rows(name, what)
    if not len(what): raise ValueError(f"source '{name}': no pairs")

def _tokenised(name, what, rows, tokenizer, config):
    if isinstance(what, Source): return what
    chat = what.get("chat", False) if isinstance(what, dict) else False
    return tokenize_pairs(rows, tokenizer, name, config.max_length, config.max_prompt_length, chat)

def read_rows(
    name: str, # of the source, for messages
    what,      # path, hub id, rows, Dataset or a dict, as for `load_sources`
) -> Dataset:  # prompt, chosen, rejected, system, messages, as `load_pairs` gives them
    "The rows of one source, before they are tokenised. Raises ValueError naming the source."
    is_spec = isinstance(what, dict) and not isinstance(what, DatasetDict) # which is a dict, too
    spec = dict(what) if is_spec else dict(source=what)
    _check_spec(name, spec)
    most = spec.pop("max_pairs", None)
    for other in ("chat", "eval_share"): spec.pop(other, None) # of what happens to the rows later
    try: data = load_pairs(**spec)
    except (ValueError, OSError) as e: raise ValueError(f"source '{name}': {e}") from e
    return data.select(range(min(int(most), len(data)))) if most else data

def _check_spec(name, spec):
    "Raise ValueError for a dict that `load_pairs` would not understand."
    if not {"source"} <= set(spec) <= OF_A_SOURCE | {"source"}:
        may, got = ", ".join(sorted(OF_A_SOURCE)), ", ".join(map(str, spec))
        raise ValueError(f"source '{name}': a dict needs 'source' and may have {may}; got {got}")
    columns = spec.get("columns") or {}
    if not isinstance(columns, dict):
        raise ValueError(f"source '{name}': columns must be {{their name: our name}}, got {columns!r}")
    share, chat, most = spec.get("eval_share", 0), spec.get("chat", False), spec.get("max_pairs")
    if not isinstance(share, Real) or type(share) is bool or not 0 <= share < 1:
        raise ValueError(f"source '{name}': eval_share must be a number from 0 to below 1, got {share!r}")
    if type(chat) is not bool:
        raise ValueError(f"source '{name}': chat must be true or false, got {chat!r}")
    if most is not None and not (isinstance(most, Integral) and type(most) is not bool and most >= 1):
        raise ValueError(f"source '{name}': max_pairs must be a whole number from 1, got {most!r}")


# %%
pairs = dict(source=w.sources["riddle"], max_pairs=100)
asked = dict(riddle=pairs, primer=dict(source=w.sources["primer"], max_pairs=20), digest=w.sources["digest"])
read = load_sources(asked, tok, StepwiseConfig())
assert [len(s) for s in read[:2]] == [100, 20]
few = read[0]
print({s.name: len(s) for s in read})
print("the first row of riddle:", read_rows("riddle", pairs)[0]["prompt"])

# %% [markdown]
# Three mistakes: a row without `rejected`, a share above 1, and a source of no pairs. Each message names the source, and the row or the setting.

# %%
broken = [dict(prompt="copy ab", chosen="ab", rejected="ba"), dict(prompt="copy ab", chosen="ab")]
for wrong in (broken, pairs | dict(eval_share=1.5), pairs | dict(max_pairs=0)):
    print(complaint(load_sources, dict(riddle=pairs, mine=wrong), tok, StepwiseConfig()))


# %% [markdown]
# ### What was lost on the way?
#
# Pairs get lost between a file and a batch:
#
# | what happens | what the model learns then |
# |---|---|
# | a response is empty | nothing: the pair is dropped |
# | two long responses differ only behind the cut (`no_room`) | nothing: the pair is dropped |
# | a response is cut | from its beginning only |
# | a prompt is cut | to answer a question whose beginning is gone |
# | a pair occurs with the opposite label, too | two things that pull against each other |
#
# None of this is an error, and all of it changes what is learned. So it is said before anything is computed, and again in the report. There is a *warning* where more than 5 % of the rows are dropped, more than 30 % of the pairs lose the end of a response, more than 5 % lose the beginning of the prompt, or any pair has both labels. A *note* is worth a look, no more.

# %%
#| export
def data_notes(
    source: Source, # tokenised, with its counts
    templated: bool=False, # whether the tokenizer has a chat template
) -> list[str]: # first what was read and used, then whatever is worth a second look
    "What was read, dropped and cut, in words."
    c, name = source.counts, source.name
    if "rows" not in c: return [] # a source that somebody made by hand
    used, rows = c["usable"], c["rows"]
    notes = [_read_line(source)]

    def warn(text): notes.append(f"  warning: {text}")
    def note(text): notes.append(f"  note: {text}")
    if used < 0.95 * rows:
        advice = "; a larger max_length keeps more" if c["no_room"] else ""
        warn(f"{1 - used / rows:.0%} of {name} are dropped{advice}")
    if c["truncated"] > 0.3 * used:
        warn(f"{c['truncated'] / used:.0%} of the pairs of {name} lose the end of a response; "
             "a larger max_length keeps it")
    if c["prompt_truncated"] > 0.05 * used:
        warn(f"{c['prompt_truncated'] / used:.0%} of the prompts of {name} lose their beginning; "
             "max_prompt_length is too small for them")
    if c.get("held_out") == 0: warn(f"of {name} no pair is held out; a larger eval_share holds out some")
    if c.get("prompt_repeated", 0) > 0.5 * used:
        cure = "take it out of them" if c["chat"] else "leave the prompt column out"
        warn(f"both responses of {c['prompt_repeated']} pairs of {name} begin with the prompt, "
             f"so it is read twice; {cure}")
    if c["both_labels"]: warn(f"{c['both_labels']} pairs of {name} occur with the opposite label, too")
    if templated and not c["chat"]:
        note(f"{name} is plain text, so the model's chat template is not used; chat = true (--chat) uses it")
    if c["duplicates"]: note(f"{c['duplicates']} pairs of {name} occur more than once")
    return notes

def _read_line(source):
    "One line: rows, pairs, what was dropped and cut, the kind of text, tokens."
    c = source.counts
    lost = ", ".join(f"{n} {why}" for why, n in source.dropped().items())
    parts = [f"{c['rows']} rows read", f"{c['usable']} used"]
    if lost: parts.append(f"dropped: {lost}")
    if c["truncated"]: parts.append(f"{c['truncated']} cut")
    if "held_out" in c: parts.append(f"{c['held_out']} held out")
    kind = "conversations" if c["chat"] else "plain text"
    return f"{source.name}: {', '.join(parts)}; {kind}; {pair_tokens(source.pairs).sum():,} tokens"


# %% [markdown]
# Four rows, and room for sixteen tokens; a character is a token here. The first row is good. The second repeats it, the third has an empty response, the fourth is too long. Before you look: which rows are dropped, and which are only mentioned?

# %%
texts = (("copy ab", "ab"), ("copy ab", "ab"), ("copy ab", ""), ("copy abcdefghij", "abcdefghij"))
rows = [dict(prompt=prompt, chosen=chosen, rejected="ba") for prompt, chosen in texts]
made_up, = load_sources(dict(made_up=rows), tok, StepwiseConfig(max_length=16))
print("\n".join(data_notes(made_up, templated=True)))

# %% [markdown]
# Only the empty one is dropped. The long one stays, and this is what the model would learn from. Look at the last row:

# %%
pd.DataFrame(decoded(made_up, tok))


# %% [markdown]
# The word `copy` is gone, and the answer begins with letters that the prompt does not have. The pair counts as used. The two warnings about cuts are all that tells you.
#
# ### Is there room for the longest row?
#
# A model knows so many token ids. Some kinds of model also have a table of positions, and a row longer than the table stops a run when its turn comes: perhaps in the third hour. Two numbers of the whole data are enough to [ask the model](02_logprobs.ipynb) beforehand.

# %%
#| export
def extent(
    pairs: Dataset, # tokenised
) -> tuple[int, int]: # tokens of the longest row; the largest token id
    "The longest prompt with a response, and the largest token id, over all pairs."
    longest, largest = [], []
    ids_only = pairs.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    for some in ids_only.with_format("arrow").iter(1000):
        prompt, chosen, rejected = (pc.list_value_length(ids) for ids in some.columns)
        response = pc.max_element_wise(chosen, rejected)
        longest.append(pc.max(pc.add(prompt, response)).as_py())
        largest += [pc.max(pc.list_flatten(ids)).as_py() for ids in some.columns]
    return max(longest), max(largest)


# %%
S = load_model(w.base, "cpu")
longest, largest = extent(few.pairs)
check_rows(S, longest, largest)
positions, known = S.config.max_position_embeddings, S.config.vocab_size
print(f"longest row: {longest} tokens of {positions}; largest id: {largest} of 0 to {known - 1}")

# %% [markdown]
# Now one position too many, and one id too many. Which of them is refused?

# %%
check_rows(S, positions + 1, largest)
print(complaint(check_rows, S, longest, known))


# %% [markdown]
# Only the id. S computes its positions, so it can go beyond what it was made for, and a line says so. A model with a table of positions, such as GPT-2, would refuse.
#
# The id is checked for a tokenizer that is newer than its model: somebody added a token and forgot the embedding. On a graphics card, such an id ends in an error far from its cause.
#
# ### Can its name be printed?
#
# The name of a source goes into tables, figures, file lists and messages. A name with a line break in it would break every one of them, so it is refused here. So is a name that is no text: in a YAML file `2023` is a number, and in the JSON files of a run it would come back as another name.

# %%
#| export
def check_names(
    sources: dict, # as for `load_sources`
):
    "Raise ValueError for a source whose name is no text in one line, or that has the name of another."
    if not isinstance(sources, dict): return # `load_sources` says what is wrong
    names = [what.name if isinstance(what, Source) else name for name, what in sources.items()]
    for name in names:
        if not isinstance(name, str): raise ValueError(f"sources: the name {name!r} is no text; '{name}' is")
        if names.count(name) > 1: raise ValueError(f"sources: two of them are called {name!r}")
        unprintable = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)
        if unprintable:
            raise ValueError(f"sources: the name {name!r} has a control character or a new line; "
                             "use one that can be printed")


# %%
check_names(w.sources)
for name in ("two\nlines", 2023): print(complaint(check_names, {name: []}))


# %% [markdown]
# ### Would the run write into its sources?
#
# A folder may be a source: all data files in it are read. If the run's own folder lies in there, the files that it writes are data in the next call. And if the chunks are [written as files](14_stepwise.ipynb) where a source lies, the source is gone.

# %%
#| export
def check_apart(
    path, # of a file or folder that would be written
    sources: dict, # as for `load_sources`
):
    "Raise ValueError where a path is that of a source, or lies in the folder of one."
    if not isinstance(sources, dict): return # `load_sources` says what is wrong
    target = Path(path).resolve()
    for name, what in sources.items():
        place = what.get("source") if isinstance(what, dict) else what
        if not isinstance(place, (str, Path)): continue
        if target.is_relative_to(Path(place).expanduser().resolve()):
            raise ValueError(f"{path}: is source '{name}' or lies in its folder, where nothing may be written; "
                             "use another folder")


# %%
data = Path(w.sources["riddle"]).parent
check_apart(data.parent / "run", w.sources)
said = complaint(check_apart, data / "run", dict(mine=data))
print(said.replace(str(data), "data"))


# %% [markdown]
# ## Held-out pairs
#
# Some pairs may be kept aside: a share of each source ([by prompt](01_preferences.ipynb), so that no prompt is on both sides), or sources of their own. They are never trained on. Every model is measured on them after its stage, and they lead the report, because nothing else in it can show that a model is *better* and not only well rehearsed. Each prompt draws its own lot, so a share of 0.1 gives about a tenth: here 54 of 507. Of a few pairs it may give none, and a warning says so.

# %%
#| export
def part_sources(
    read: list[Source], # of `load_sources`
    sources: dict,      # what it was given
    config: StepwiseConfig, # its eval_share counts
) -> tuple[list[Source], list[Source]]: # to train on, held out
    "Hold out a share of every source; one that names an `eval_share` of its own has that."
    train, held = [], []
    for source, what in zip(read, sources.values()):
        share = what.get("eval_share", config.eval_share) if isinstance(what, dict) else config.eval_share
        kept, aside = hold_out(source, float(share))
        if share and not aside: kept = replace(kept, counts=kept.counts | dict(held_out=0))
        train.append(kept)
        if aside: held.append(aside)
    return train, held


# %%
riddle = dict(riddle=w.sources["riddle"])
whole = load_sources(riddle, tok, StepwiseConfig())
(train,), (held,) = part_sources(whole, riddle, StepwiseConfig(eval_share=0.1))
assert len(train) + len(held) == len(whole[0])
tiny = dict(tiny=dict(source=w.sources["primer"], max_pairs=3))
(none_held,), nothing = part_sources(load_sources(tiny, tok, StepwiseConfig()), tiny, StepwiseConfig(eval_share=0.1))
assert nothing == []
data_notes(train) + data_notes(none_held)


# %% [markdown]
# A held-out source of your own may hold prompts that are trained on as well. Then it measures memory, not learning. That is not refused, because somebody may want to measure just this; but it is said.

# %%
#| export
def seen_in_training(
    held: list[Source],   # held out
    loaded: list[Source], # trained on
) -> list[int]:           # a number for each held-out source
    "How many pairs of each held-out source have a prompt that is trained on."
    trained = {name for s in loaded for name in s.asked()}
    return [sum(name in trained for name in s.asked()) for s in held]

def check_held_out(
    held: list[Source],   # held out
    loaded: list[Source], # trained on
) -> list[str]: # a line for each held-out source whose prompts are trained on as well
    "Compare held-out prompts with those that are trained on. Raises ValueError for a name that occurs twice."
    if not held: return []
    names = [s.name for s in held]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"held_out: '{name}' is also the name of a source of which a share is held out; "
                             "give it another name")
    lines = []
    for s, seen in zip(held, seen_in_training(held, loaded)):
        if not seen: continue
        lines.append(f"  warning: {seen} of the {len(s)} held-out pairs of {s.name} "
                     "have a prompt that is trained on")
    return lines


# %%
assert check_held_out([held], [train]) == []
check_held_out([held], whole) # the source with the held-out pairs still in it


# %% [markdown]
# All sources of a run, in one call. It holds out, and it does not compare: that is left to `check_held_out`.

# %%
#| export
def read_sources(
    sources: dict,  # as for `load_sources`; not asked for where a function makes the chunks
    held_out: dict, # the same, for pairs that are only measured; or None
    tokenizer,      # of the model
    config: StepwiseConfig, # its lengths and eval_share count
) -> tuple[list[Source], list[Source]]: # to train on, held out
    """What is trained on, and what is held out of it or comes as sources of its own.
    Raises ValueError for a held-out source with an eval_share."""
    train, held = [], []
    if not callable(config.chunks):
        train, held = part_sources(load_sources(sources, tokenizer, config), sources, config)
    for name, what in (held_out or {}).items():
        if isinstance(what, dict) and "eval_share" in what:
            raise ValueError(f"held_out, source '{name}': every pair of it is held out; leave out its eval_share")
    if held_out: held += load_sources(held_out, tokenizer, config, "held_out")
    return train, held


# %% [markdown]
# We hold out a tenth of every source, and give all of `riddle` again as `mine`, a held-out source of our own. Before you look: for how many of the 507 pairs of `mine` is the prompt trained on?

# %%
train, held = read_sources(w.sources, dict(mine=w.sources["riddle"]), tok, StepwiseConfig(eval_share=0.1))
parts = {"trained on": train, "held out": held}
sizes = pd.DataFrame({part: {s.name: len(s) for s in sources} for part, sources in parts.items()})
sizes.fillna(0).astype(int)

# %%
print("\n".join(check_held_out(held, train)))


# %% [markdown]
# ## Chunks
#
# A *chunk* $D_t$ is what one stage trains on. Usually the [partition](05_partition.ipynb) decides: one chunk per source, or all rows in order of their sources, cut into $T$ equal parts. Every model is measured on a *probe* of each chunk: a few hundred pairs, the same for every model. Only then can two models be compared pair by pair. The draw has its own seed, so nothing that a run draws elsewhere can change it.

# %%
#| export
@dataclass
class Chunk:
    "D_t: what one stage trains on."
    name: str      # of its source, or of its place
    pairs: Dataset # tokenised

    def probe(
        self,
        n: int, # at most so many
    ) -> Dataset:
        "At most n pairs, the same for every model."
        if len(self.pairs) <= n: return self.pairs
        draw = torch.randperm(len(self.pairs), generator=torch.Generator().manual_seed(0))
        return self.pairs.select(sorted(draw[:n].tolist()))


# %%
D_3 = Chunk("riddle", whole[0].pairs)
first = D_3.probe(4)["row"][:]
torch.manual_seed(1) # as if other code had drawn
assert D_3.probe(4)["row"][:] == first
assert set(first) <= set(D_3.probe(8)["row"][:]) # a larger probe holds the smaller one
first


# %% [markdown]
# For experiments the chunks may also be given as lists of source names, or made on the way by a function that sees $M_{t-1}$, so that data can be generated between stages. Names are checked as soon as the sources are read; a function cannot be checked, it has made nothing yet.
#
# A list may name a source twice, to train on it again. Tables and figures go by the names of chunks, so the second time gets a name of its own. And it may leave a source out. Then no stage trains on it, and [the run says so](13_stages.ipynb), because somebody may have forgotten a name.

# %%
#| export
def check_chunks(
    chunks, # of the settings: None, a number, lists of source names
    loaded: list[Source], # to train on
) -> list[Source]: # the same, or joined where lists of names ask for it
    "Raise ValueError for chunks that cannot be made of these sources; lists of names become sources."
    total = sum(map(len, loaded))
    if isinstance(chunks, int) and chunks > total:
        raise ValueError(f"chunks: {chunks} chunks cannot be cut from {total} pairs")
    if not isinstance(chunks, list): return loaded
    by_name = {s.name: s for s in loaded}
    for name in sum(chunks, []):
        if name not in by_name:
            raise ValueError(f"chunks: there is no source '{name}'; sources are {', '.join(by_name)}")
    joined = {}
    for group in chunks:
        some = [by_name[name] for name in group]
        pairs = concatenate_datasets([s.pairs for s in some])
        name = _new_name("+".join(group), joined)
        joined[name] = Source(name, pairs, counts_table(some).sum().astype(int).to_dict())
    return list(joined.values())

def _new_name(name, taken):
    "The name, with a number where it is taken."
    new, n = name, 2
    while new in taken: new, n = f"{name} ({n})", n + 1
    return new


# %%
all_three = load_sources(w.sources, tok, StepwiseConfig())
two = StepwiseConfig(chunks=["riddle", ["primer", "digest"]]).chunks
twice = StepwiseConfig(chunks=["primer", "riddle", "primer"]).chunks
for chunks in (two, twice): print([(s.name, len(s)) for s in check_chunks(chunks, all_three)])
print(complaint(check_chunks, [["ridle"]], all_three))


# %% [markdown]
# ## Does the reference read the same tokens?
#
# The reference may be a model from elsewhere: then `reference` is its folder. It is asked about *our* token ids. A model with another vocabulary would answer, too. Its answers would be finite, and about other texts, and the loss would fall all the same. So the two vocabularies are
# compared token by token. And it must have room for the rows, as the model must. The hash of its weights goes into `config.yaml`, as that of every model of a run does.

# %%
#| export
def foreign_weights(
    reference: str, # as in the settings: moving, fixed, or the folder of a model
    tokenizer,      # of the policy
    loaded: list[Source], # that it will read
) -> str: # hash of the weights of a model in a folder; None for moving and fixed
    "Weights of a reference from elsewhere. Raises ValueError where a token has another id there, or a row has no room."
    if reference in ("moving", "fixed"): return None
    try: theirs = load_tokenizer(reference).get_vocab()
    except Exception as e:
        raise ValueError(f"reference: no tokenizer in {reference} can be read, "
                         "so its tokens cannot be compared with the model's") from e
    other = [token for token, i in tokenizer.get_vocab().items() if theirs.get(token) != i]
    if other:
        raise ValueError(f"reference: {reference} has another vocabulary, {len(other)} tokens of the model "
                         f"have another id or none, e.g. {min(other)!r}")
    other = load_model(reference, "cpu")
    try:
        check_model(other)
        for s in loaded: check_rows(other, *extent(s.pairs))
    except ValueError as e: raise ValueError(f"reference: {reference}: {e}") from e
    return weights_hash(other)


# %%
wider = load_tokenizer(w.base)
wider.add_tokens(["zebra"])
assert foreign_weights("moving", tok, [few]) is None
assert foreign_weights(w.base, tok, [few]) == weights_hash(S)
print(complaint(foreign_weights, w.base, wider, [few]).replace(w.base, "S"))

# %% [markdown]
# The dangerous case has the same tokens with other ids. We make a model like S, but exchange the ids of *a* and *b* in its tokenizer. What does it read when we ask about our ids?

# %%
other = Path(tempfile.mkdtemp()) / "other"
shutil.copytree(w.base, other)
file = other / "tokenizer.json"
spec = json.loads(file.read_text())
ids = spec["model"]["vocab"]
ids["a"], ids["b"] = ids["b"], ids["a"]
file.write_text(json.dumps(spec))

# %%
prompt = few.pairs[0]["prompt_ids"]
print("we ask:  ", tok.decode(prompt))
print("it reads:", load_tokenizer(str(other)).decode(prompt))
print(complaint(foreign_weights, str(other), tok, [few]))
shutil.rmtree(other.parent)

# %% [markdown]
# Would the loss show it? Take the worst reference there is, pure noise, and look at the [DPO loss](03_loss.ipynb) of a thousand pairs. Is there one pair whose loss does not fall as the policy's gamma rises?

# %%
gamma = torch.zeros(1000, requires_grad=True)
noise = 5 * torch.randn(1000, generator=torch.Generator().manual_seed(0)) # the reference's gamma
dpo_loss(gamma, noise, beta=0.1).sum().backward()
assert (gamma.grad < 0).all()

# %% [markdown]
# None. Each pair's loss goes down, whatever the reference says. The reference only decides how hard each pair pulls. So a wrong one cannot be seen in the loss, and has to be found before.
#
# ## What was checked, and what it would have cost
#
# | what | where it is found out now | without the check |
# |---|---|---|
# | a setting that does not exist | `make_config` | the default is used, and nobody notices |
# | a value out of its bounds, settings that exclude each other | when the settings are made | it is used, or ignored, and nobody notices |
# | a source that cannot be read, a column that is missing | `load_sources`, with file and row, before anything is tokenised | an error after the sources before it were tokenised, perhaps after an hour |
# | pairs that are dropped or cut | `data_notes` | a model that learned from half of the data |
# | a prompt that is trained on and held out | `check_held_out`, in a warning | held-out numbers that are too good |
# | a row longer than the table of positions, an id without an embedding | `check_rows`, with the two numbers of `extent`; of a reference `foreign_weights` asks it | an error in the step in which that row comes |
# | more chunks than pairs, a chunk of an unknown source | `check_chunks` | an error when the chunks are made |
# | a source that no chunk names | `prepare_run`, in a warning | it is not trained on, and nobody notices |
# | a reference with another vocabulary | `foreign_weights` | a loss that falls, and pairs weighted by answers about other texts |
#
# ## What you now have
#
# `StepwiseConfig` with every switch that an experiment on the paper needs, and `make_config` for what comes from a file. `read_sources` gives what is trained on and what is held out, `data_notes` says what was lost, `Chunk` is what one stage trains on. Nothing has been computed yet, and whatever
# could be wrong with the question has been said. [The next chapter](13_stages.ipynb) trains one stage.
#
# ## Questions to test yourself
#
# 1. A source has 1,000 rows. In 260 of them the two responses are the same up to the cut. What would a run do that dropped these rows without a word?
#
# <details><summary>Answer</summary>
#
# It would train, and every number of it would look healthy. But it would have learned from the other 740 only, and the order of the sources would have been decided on them. The line says `dropped: 260 no_room`, and a warning names `max_length`.
#
# </details>
#
# 2. Why is the share held out by prompt, and not by pair?
#
# <details><summary>Answer</summary>
#
# Many data sets have several pairs for one prompt. With some of them in training, the others would be half known, and the held-out numbers would be too good.
#
# </details>
#
# 3. Why does a wrong vocabulary of the reference not show in the loss?
#
# <details><summary>Answer</summary>
#
# The reference is only a number for each response. Any finite numbers make a loss that can be minimised: the policy gains on whatever bar it is given. What the bar means is not in the loss.
#
# </details>
#
# ## Try this
#
# Make `StepwiseConfig(max_length=64, max_prompt_length=64)`, and then `StepwiseConfig(order="hard_to_easy", chunks=["riddle", "primer"])`.
#
# <details><summary>What you should see</summary>
#
# Two refusals. The first says that a prompt of 64 tokens leaves no room for a response. The second says that chunks that are given have their own order.
#
# </details>
