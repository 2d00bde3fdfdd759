# %% [markdown]
# # Stepwise DPO
# > Stage after stage: the model that one stage leaves behind is the reference of the next.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/13_stepwise.ipynb)
#
# **You should know** what [the DPO loss](03_loss.ipynb), [one stage of training](06_trainer.ipynb) and [the order of sources](05_partition.ipynb) are. To learn what stepwise DPO does, read "The method in
# four lines" and then from "A run" on; between them stands the machinery. **Time** two hours to read with all its code, half an hour without the machinery; a minute to run on two CPU cores.
#
# DPO trains a *policy*, the model that we want to align, on pairs of a chosen and a rejected response. It rewards the policy for preferring the chosen one *more than a reference does*, and the reference is a frozen model, usually S, the
# model that training starts from. So all the data is used against one and the same reference.
#
# Stepwise DPO (sDPO, Kim et al., arXiv 2403.19270) cuts the data into chunks $D_1, \dots, D_T$, easy ones first, and trains in stages, one per chunk. After each stage the reference moves up: it becomes the model that the
# stage has just made. With $M_0 = S$, stage $t$ makes
#
# $$M_t:\quad \text{a few epochs of descent on}\quad -\mathbb{E}_{D_t} \log\sigma\big(\beta\,(\gamma_\theta - \gamma_{M_{t-1}})\big), \qquad \theta \text{ starting at } M_{t-1}. \tag{1}$$
#
# The paper writes $\arg\min$. We write what is done: with few labels there is [no minimum](03_loss.ipynb), and where a stage starts turns out to matter more than anything else.
#
# In words: $\gamma_\theta$ is how much likelier (in nats) the policy finds the chosen response than the rejected one, $\gamma_{M_{t-1}}$ is the same for the reference, and $\beta$ says how much a nat counts.
#
# ```
#          D_1                    D_2                    D_3
#           |                      |                      |
#   S ---> M_0 reads D_1   .---> M_1 reads D_2   .---> M_2 reads D_3
#           |  (a table)   |       |  (a table)  |       |  (a table)
#           v              |       v             |       v
#         train M_0 -----> M_1   train M_1 ----> M_2   train M_2 ----> M_3
# ```
#
# Why would one want this? The paper's reason: a reference that is better aligned is a higher bar. The policy is asked to beat a model that already prefers the right response, not one that does not know. Whether that helps
# is a question for [experiments](experiments/protocol.ipynb); this chapter builds the method, and answers what a loop over stages gets wrong in practice: *which* model is the reference, what happens
# after a crash, and what you may conclude afterwards.

# %%
#| default_exp stepwise

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
#| export
import difflib, math, shutil, time, unicodedata, warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import pandas as pd
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from datasets import Dataset, concatenate_datasets, load_from_disk

from sdpo_nb.evaluate import as_text, greedy_answers
from sdpo_nb.folder import (
    alone_in, base_folder, check_fresh, finished_stages, load_exactly, machine_of, naming,
    open_folder, read_part, recorded, save_model, share_changed, stage_folders
)
from sdpo_nb.logprobs import (
    SMALL, Clock, check_model, check_rows, load_model, load_tokenizer, pair_tokens, pairs_hash,
    pick_precision, read_table, replacing, response_logprobs, score_pairs, stored_dtype, table_kind,
    weights_hash, write_json
)
from sdpo_nb.loss import certificate, dpo_loss, reward_accuracy
from sdpo_nb.packing import choose_logprobs
from sdpo_nb.partition import ORDERS, mean_interval, partition
from sdpo_nb.preferences import Source, counts_table, hold_out, load_pairs, prompt_limit, tokenize_pairs
from sdpo_nb.report import Run
from sdpo_nb.trainer import (
    GIB, MOST, TRAINING, TrainConfig, as_line, check_memory, compile_for, free_memory, peak_memory,
    plan_for, setting, train_stage, wants_compiling, why_not_same_bits
)

# %%
import tempfile

import matplotlib.pyplot as plt
import seaborn as sns
import torch.nn.functional as F

from sdpo_nb.evaluate import answers_beside
from sdpo_nb.figures import plot_gamma
from sdpo_nb.packing import packed_logprobs
from sdpo_nb.report import gamma_table
from sdpo_nb.trainer import epoch_order
from sdpo_nb.world import complaint, load_world, score_responses

torch.set_num_threads(1)
pd.set_option("display.width", 180, "display.max_columns", 20);

# %% [markdown]
# ## The method in four lines
#
# Three sources of the [tiny world](00_world.ipynb) are our chunks. Written down, (1) is a loop: ask the model what it thinks of the next chunk, then train it against that answer. ($\beta = 0.3$ belongs to this world; for a
# real model 0.1 is usual.)

# %%
w, tmp = load_world(), Path(tempfile.mkdtemp())
quick = dict(beta=0.3, lr=1e-4, epochs=2, precision="fp32")
policy, tok = load_model(w.base), load_tokenizer(w.base)

chunks = {}
for name in ("primer", "digest", "riddle"):
    chunks[name] = tokenize_pairs(load_pairs(w.sources[name]), tok, name).pairs

# %%
ends, against = [weights_hash(policy)], []
for t, pairs in enumerate(chunks.values(), 1):
    reference = score_pairs(policy, pairs, logprobs=packed_logprobs, token_budget=4 * 4096)
    train_stage(policy, pairs, reference, TrainConfig(**quick), tmp / f"naive-{t}", t)
    ends.append(weights_hash(policy))
    against.append(reference.kind["weights"])

# %% [markdown]
# The reference is not a second model in memory. It is a table of numbers, what a model said about each pair, and a table knows whose it is: it carries a hash of the weights. So the sentence "the reference is $M_{t-1}$" of (1) can be checked.

# %%
assert against == ends[:-1]
assert len(set(ends)) == 4
whose = {h: f"M_{t}" for t, h in enumerate(ends)}
named = {"reference": map(whose.get, against), "trained": map(whose.get, ends[1:])}
pd.DataFrame(named, index=pd.Index(chunks, name="chunk"))


# %% [markdown]
# That is sDPO. What the loop lacks is everything around it: the order was typed by hand, a crash in the third stage costs the first two, and next week nobody can say
# what was trained on what. The rest of this chapter puts the loop into [a folder](09_folder.ipynb), and must end in the same weights.

# %% [markdown]
# ## Settings
#
# A run has the settings of [a stage](06_trainer.ipynb) and a few of its own. Four of them are the switches that the paper's experiments turn: the order of the sources, where the policy of a stage starts, which model is the
# reference, and whether optimizer and schedule start anew.

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
        self.chunks = _chunks_setting(self.chunks)
        if isinstance(self.chunks, list) or callable(self.chunks):
            if self.order not in ("easy_to_hard", "as_given"):
                raise ValueError(f"order: chunks that are given have their own order, so it cannot be {self.order}")
            self.order = "as_given"
        if self.reference not in ("moving", "fixed") and not (Path(self.reference) / "config.json").is_file():
            raise ValueError(f"reference: must be moving, fixed or the folder of a model; there is no model in {self.reference!r}")
        if callable(self.chunks) and self.restart == "never":
            raise ValueError("restart: 'never' needs all chunks beforehand, so chunks cannot be a function")

def _chunks_setting(chunks):
    "None, a number or a function as it is; a list as lists of source names."
    if chunks is None or callable(chunks): return chunks
    if type(chunks) is int and chunks >= 1: return chunks
    if not isinstance(chunks, (list, tuple)):
        raise ValueError(f"chunks: must be a whole number from 1, a list of source names or a function, got {chunks!r}")
    groups = [_group(g) for g in chunks]
    if not groups or not all(groups):
        raise ValueError(f"chunks: a list must hold source names, or lists of them, and none may be empty; got {chunks!r}")
    return groups

def _group(names):
    "A name alone is a chunk of one; nothing, where it is no name and no list of names."
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)): return []
    return list(names) if all(isinstance(n, str) for n in names) else []


# %% [markdown]
# Everything is checked when the settings are made, long before a model is loaded:

# %%
for wrong in (dict(order="easy"), dict(reference="runs/nowhere"), dict(chunks=["primer", []])):
    print(complaint(StepwiseConfig, **wrong))


# %%
#| export
def defaults_table() -> pd.DataFrame: # setting: the index; default, meaning
    "Every setting, its default and its meaning."
    rows = [(f.name, str(f.default), f.metadata["help"]) for f in fields(StepwiseConfig)]
    return pd.DataFrame(rows, columns=["setting", "default", "meaning"]).set_index("setting")


# %%
pd.set_option("display.max_colwidth", 90)
defaults_table()

# %% [markdown]
# The defaults are the paper's recipe for models of billions of parameters and tens of thousands of pairs. With a few hundred pairs, a learning rate of $5\cdot10^{-7}$ for ten steps changes nothing:
# small runs need a larger one.
#
# Settings also come from files and command lines, where people misspell them, or call them what another trainer does. So an unknown name is answered with what was probably meant.

# %%
#| export
CALLED = dict( # elsewhere
    learning_rate="lr",
    num_train_epochs="epochs",
    num_epochs="epochs",
    max_grad_norm="clip",
    warmup_ratio="warmup",
    per_device_train_batch_size="token_budget",
    gradient_accumulation_steps="token_budget",
    train_batch_size="batch_size",
    bf16="precision",
    fp16="precision",
    dtype="precision",
    torch_dtype="precision",
    torch_compile="compile",
    max_seq_length="max_length",
    save_steps="save_every",
)

def no_such_setting(
    name: str, # as it was typed
) -> str:
    "What to say of a setting that does not exist: its nearest neighbour, or all there are."
    known = [f.name for f in fields(StepwiseConfig)]
    near = [CALLED[name]] if name in CALLED else difflib.get_close_matches(str(name), known, 1)
    advice = f"did you mean '{near[0]}'?" if near else f"settings are {', '.join(known)}"
    return f"unknown setting '{name}'; {advice}"

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
    "YAML reads 1e-4 as text; people mean a number."
    try: return float(value) if isinstance(value, str) else value
    except ValueError: return value


# %%
for wrong in (dict(bta=0.1), dict(learning_rate=1e-5), dict(lr="fast")):
    print(complaint(make_config, wrong))
make_config(dict(lr="1e-5")).lr

# %% [markdown]
# ## Sources
#
# A *source* is a named set of preference pairs. It may come as a path, a hub id, rows in memory, or a dict with the arguments of `load_pairs` when columns need other names.

# %%
#| export
_SPEC = {"source", "split", "revision", "columns", "chat", "max_pairs", "eval_share"}

def load_sources(
    sources: dict, # name -> path, hub id, rows, Dataset, `Source`, or dict(source=, split=, revision=, columns=, chat=, max_pairs=, eval_share=)
    tokenizer,     # of the model that will read them
    config: StepwiseConfig, # its lengths and eval_share count
    called: str="sources",  # in messages
) -> list[Source]: # in the order given
    "Tokenise every source; raises ValueError naming the one that cannot be used."
    if not sources or not isinstance(sources, dict):
        raise ValueError(f"{called}: expected {{'name': 'file, folder or hub id'}}, with at least one name")
    return [_load_source(name, what, tokenizer, config) for name, what in sources.items()]

def _load_source(name, what, tokenizer, config):
    spec = dict(what) if isinstance(what, dict) else dict(source=what)
    _check_spec(name, spec)
    if isinstance(what, Source): return what
    chat = spec.pop("chat", False)
    most = spec.pop("max_pairs", None)
    spec.pop("eval_share", 0) # `part_sources` asks for it
    try: data = load_pairs(**spec)
    except (ValueError, OSError) as e: raise ValueError(f"source '{name}': {e}") from e
    if most: data = data.select(range(min(most, len(data))))
    return tokenize_pairs(data, tokenizer, name, config.max_length, config.max_prompt_length, chat)

def _check_spec(name, spec):
    "Raise ValueError for a dict that `load_pairs` would not understand."
    if not {"source"} <= set(spec) <= _SPEC:
        may = ", ".join(sorted(_SPEC - {"source"}))
        raise ValueError(f"source '{name}': a dict needs 'source' and may have {may}; got {', '.join(map(str, spec))}")
    share, chat, most = spec.get("eval_share", 0), spec.get("chat", False), spec.get("max_pairs")
    if type(share) not in (int, float):
        raise ValueError(f"source '{name}': eval_share must be a number from 0 to below 1, got {share!r}")
    if type(chat) is not bool:
        raise ValueError(f"source '{name}': chat must be true or false, got {chat!r}")
    if most is not None and not (type(most) is int and most >= 1):
        raise ValueError(f"source '{name}': max_pairs must be a whole number from 1, got {most!r}")


# %%
pairs = dict(source=w.sources["riddle"], max_pairs=100)
few, = load_sources(dict(riddle=pairs), tok, StepwiseConfig())
print(few.name, len(few))
print(complaint(load_sources, dict(riddle=pairs | dict(max_pairs=0)), tok, StepwiseConfig()))


# %% [markdown]
# Pairs get lost on the way: a response may be empty, a prompt may fill the whole row. What was read, dropped and cut is said before anything is computed, and again in the report. A warning stands where more is lost than one would expect.

# %%
#| export
def data_notes(
    source: Source,
    templated: bool=False, # whether the tokenizer has a chat template
) -> list[str]: # first what was read and used, then whatever is worth a second look
    "What was read, dropped and cut, in words."
    c, name = source.counts, source.name
    if not c: return [] # a source that somebody made by hand
    used, rows = c["usable"], c["rows"]
    notes = [_read_line(source)]

    def warn(text): notes.append(f"  warning: {text}")
    def note(text): notes.append(f"  note: {text}")
    if used < 0.95 * rows:
        advice = "; a larger max_length keeps more" if c["no_room"] else ""
        warn(f"{1 - used / rows:.0%} of {name} are dropped{advice}")
    if c["truncated"] > 0.3 * used:
        warn(f"{c['truncated'] / used:.0%} of the pairs of {name} lose the end of a response; a larger max_length keeps it")
    if c["prompt_truncated"] > 0.05 * used:
        warn(f"{c['prompt_truncated'] / used:.0%} of the prompts of {name} lose their beginning; max_prompt_length is too small for them")
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


# %%
texts = (("copy ab", "ab"), ("copy ab", "ab"), ("copy ab", ""), ("copy abcdefghij", "abcdefghij"))
rows = [dict(prompt=prompt, chosen=chosen, rejected="ba") for prompt, chosen in texts]
made_up, = load_sources(dict(made_up=rows), tok, StepwiseConfig(max_length=16))
print("\n".join(data_notes(made_up, templated=True)))


# %% [markdown]
# ### Held-out pairs
#
# Some pairs may be kept aside: a share of each source ([by prompt](01_preferences.ipynb), so that no prompt is on both sides), or sources of their own. They are never trained on, measured after every stage, and lead the report.

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
        kept, aside = hold_out(source, share)
        train.append(kept)
        if aside: held.append(aside)
    return train, held


# %%
riddle = dict(riddle=w.sources["riddle"])
whole = load_sources(riddle, tok, StepwiseConfig())
(train,), (held,) = part_sources(whole, riddle, StepwiseConfig(eval_share=0.1))
assert len(train) + len(held) == len(whole[0])
data_notes(train)


# %% [markdown]
# A held-out source of your own may hold prompts that are trained on as well. Then it measures memory, not learning; so that is said.

# %%
#| export
def read_sources(
    sources: dict,  # as for `load_sources`
    held_out: dict, # the same, for pairs that are only measured; or None
    tokenizer,      # of the model
    config: StepwiseConfig,
) -> tuple[list[Source], list[Source]]: # to train on, held out
    "What is trained on, and what is held out of it or comes as sources of its own."
    train, held = part_sources(load_sources(sources, tokenizer, config), sources, config)
    return train, held + _own(held_out, tokenizer, config)

def _own(held_out, tokenizer, config):
    return load_sources(held_out, tokenizer, config, "held_out") if held_out else []

def _check_held(held, loaded) -> list[str]:
    """A line for each held-out source whose prompts are trained on as well.

    Raises ValueError for a name that occurs twice.
    """
    if not held: return []
    names = [s.name for s in held]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"held_out: '{name}' is also the name of a source of which a share is held out; give it another name")
    trained = {tuple(ids) for s in loaded for ids in s.pairs["prompt_ids"]}
    lines = []
    for s in held:
        seen = sum(tuple(ids) in trained for ids in s.pairs["prompt_ids"])
        if seen: lines.append(f"  warning: {seen} of the {len(s)} held-out pairs of {s.name} have a prompt that is trained on")
    return lines


# %%
assert _check_held([held], [train]) == []
_check_held([held], whole) # the source with the held-out pairs still in it


# %% [markdown]
# ## Chunks
#
# A *chunk* $D_t$ is what one stage trains on. Usually the [partition](05_partition.ipynb) decides: one chunk per source, or all rows in order of their sources, cut into $T$ equal parts. Every model is measured on a *probe* of each chunk: a
# few hundred pairs, drawn once, the same for every model.

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
assert D_3.probe(4)["key"][:] == D_3.probe(4)["key"][:]
D_3.probe(4)["key"][:]


# %% [markdown]
# For experiments the chunks may also be given as lists of source names, or made on the way by a function that sees $M_{t-1}$, so that data can be generated between stages. Names are checked before anything is computed.

# %%
#| export
def _check_chunks(chunks, loaded):
    "Chunks that are possible with these sources, found out before anything is computed; lists of names become sources."
    total = sum(map(len, loaded))
    if isinstance(chunks, int) and chunks > total: raise ValueError(f"chunks: {chunks} chunks cannot be cut from {total} pairs")
    if not isinstance(chunks, list): return loaded
    by_name = {s.name: s for s in loaded}
    for name in sum(chunks, []):
        if name not in by_name: raise ValueError(f"chunks: there is no source '{name}'; sources are {', '.join(by_name)}")
    joined = []
    for group in chunks:
        pairs = concatenate_datasets([by_name[name].pairs for name in group])
        joined.append(Source("+".join(group), pairs, {}))
    return joined


# %%
all_three = load_sources(w.sources, tok, StepwiseConfig())
two = StepwiseConfig(chunks=["riddle", ["primer", "digest"]]).chunks
print([(s.name, len(s)) for s in _check_chunks(two, all_three)])
print(complaint(_check_chunks, [["ridle"]], all_three))


# %% [markdown]
# ## What all stages share
#
# Settings, folder, device, tokenizer, the clock that knows how much of the run is left: seventeen things that every stage needs. They travel together.

# %%
#| export
@dataclass
class _Context:
    "What every stage needs to know."
    config: StepwiseConfig
    folder: Path
    base: str            # path or hub id of S
    tokenizer: object
    device: torch.device
    precision: str       # fp32, bf16 or fp16
    logprobs: object     # given by the caller; None: chosen for the model
    dtype: torch.dtype   # of S on disk, and so of every M_t
    revision: str = None # of S on the hub
    otherwise: str = ""  # what may change the last bits, said when training goes on
    held: list = field(default_factory=list) # sources that are never trained on
    talks: bool = False  # of a tiny model, whose runs come by the hundred, nothing is said
    clock: Clock = None  # time left of the run
    chosen: dict = field(default_factory=dict) # kind of model -> packed or padded
    before: int = 0      # optimizer steps of the stages that are finished
    tracker: object = None
    on_step: object = None
    on_stage: object = None

    def at(self, t):
        "The folder of M_t."
        return self.folder / (f"stage-{t}" if t else "base")

    def load(self, t):
        "M_t in fp32."
        if not t: return load_model(self.base, self.device, self.revision)
        return load_exactly(self.at(t), self.device)

    def table(self, t):
        "What M_t has said so far."
        return read_table(self.at(t) / "logprobs")

    def score(self, t, model, pairs, what):
        "The table of M_t, once it holds these pairs."
        who = f"the model of stage {t}" if t else "S"
        return self.score_to(self.at(t) / "logprobs", model, pairs, f"{who} reads {what}")

    def score_all(self, t, model, chunks):
        "On everything that every model is measured on."
        for d in chunks: self.score(t, model, d.probe(self.config.probe), d.name)
        for s in self.held: self.score(t, model, s.pairs, f"{s.name}, held out")

    def score_to(self, folder, model, pairs, desc):
        how = self.how(model, pairs)
        budget = _scoring_budget(self.config, how, model.device)
        return score_pairs(model, pairs, folder, self.precision, how, budget, desc=desc, clock=self.clock)

    def how(self, model, pairs):
        "Packed or padded: asked once for each kind of model."
        kind = type(model).__name__
        if kind not in self.chosen:
            some = [pairs[i] for i in range(min(len(pairs), 64))]
            self.chosen[kind] = self.logprobs or choose_logprobs(model, some, self.config.packing, self.precision)
        if wants_compiling(self.config, model.device): compile_for(model, self.chosen[kind], self.precision, self.config)
        return self.chosen[kind]

    def after_step(self, t, row):
        "Tell the tracker and the caller of a step."
        if self.tracker:
            numbers = {name: float(v) for name, v in row.items() if isinstance(v, (int, float))}
            self.tracker.log(numbers | dict(stage=t), step=self.before + row["step"])
        if self.on_step: self.on_step(dict(stage=t) | row)

def _scoring_budget(config, logprobs, device):
    """Tokens of a forward pass without gradients.

    Nothing is kept for a backward pass, so a packed row may be longer than in training.
    """
    usual = MOST // 4 if torch.device(device).type == "cuda" else 4096
    packed = getattr(logprobs, "attention", "") in ("packed", "flash")
    return (config.token_budget or usual) * (4 if packed else 1)


# %% [markdown]
# Its `score` is the only way a table is made: it reads what is there and computes what is missing. So the second call below finds nothing to do.

# %%
ctx = _Context(StepwiseConfig(**quick), tmp / "shared", w.base, tok, torch.device("cpu"), "fp32", None, torch.float32)
S = ctx.load(0)
first = ctx.score(0, S, D_3.probe(64), "riddle")
files = sorted((ctx.at(0) / "logprobs").iterdir())
again = ctx.score(0, S, D_3.probe(64), "riddle")
assert len(first.rows) == 64
assert again.rows.equals(first.rows)
assert sorted((ctx.at(0) / "logprobs").iterdir()) == files
print(ctx.at(0).relative_to(tmp), "and", ctx.at(2).relative_to(tmp))


# %% [markdown]
# Whatever was decided about the chunks is written down and read again. Otherwise a run that goes on could train on other pairs: on another machine, accuracies that nearly tie may change places. The pass of $M_0$ over the pairs, which the partition needs, is also
# the reference table of stage 1.

# %%
#| export
def _partitioned(loaded, policy, ctx):
    "Chunks by the partition under M_0; its pass over the pairs is kept, and is stage 1's reference table."
    path = ctx.folder / "partition.json"
    for s in loaded: table = ctx.score(0, policy, s.pairs, s.name)
    if not path.exists(): write_json(path, _decide(loaded, table, ctx.config))

    decided = read_part(path)
    pairs = concatenate_datasets([s.pairs for s in loaded])
    with naming(path):
        every_pair_once = sorted(sum(decided["chunks"], [])) == list(range(len(pairs)))
        every_name = len(decided["names"]) == len(decided["chunks"])
        if not (every_pair_once and every_name): raise ValueError("its chunks do not hold every pair once")
    return [Chunk(name, pairs.select(rows)) for name, rows in zip(decided["names"], decided["chunks"])]

def _decide(loaded, table, config):
    "What partition.json holds."
    T = config.chunks if isinstance(config.chunks, int) else None
    part = partition(loaded, table, config.order, T, config.seed)
    return dict(
        order=config.order,
        measures=part.measures.to_dict("records"),
        names=part.names,
        chunks=part.chunks, # rows of all pairs
        counts=counts_table(loaded).reset_index().to_dict("records"),
    )


# %%
parts = _partitioned(all_three, S, ctx)
print([d.name for d in parts])

path = tmp / "shared/partition.json"
decided = read_part(path)
decided["chunks"][0] += decided["chunks"][1][:1] # one pair twice
write_json(path, decided)
print(complaint(_partitioned, all_three, S, ctx))


# %% [markdown]
# A chunk that a function makes is kept in its stage's folder, for the same reason: a second call would make other pairs.

# %%
#| export
def _made(t, policy, ctx):
    "The chunk that the user's function makes for stage t, or None; kept in the stage's folder."
    path = ctx.at(t) / "chunk"
    if not path.exists():
        got = ctx.config.chunks(t, policy)
        if got is None: return None
        if not isinstance(got, Source):
            got = tokenize_pairs(load_pairs(got), ctx.tokenizer, f"chunk {t}", ctx.config.max_length, ctx.config.max_prompt_length)
        check_rows(policy, *_extent(got.pairs))
        _say_data(data_notes(got, bool(ctx.tokenizer.chat_template)), ctx.talks)
        with replacing(path) as tmp: got.pairs.save_to_disk(str(tmp))
    return Chunk(f"chunk {t}", load_from_disk(str(path)))

def _extent(pairs):
    "The longest prompt with a response, and the largest token id, over all pairs."
    longest, largest = [], []
    ids_only = pairs.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    for some in ids_only.with_format("arrow").iter(1000):
        prompt, chosen, rejected = (pc.list_value_length(ids) for ids in some.columns)
        longest.append(pc.max(pc.add(prompt, pc.max_element_wise(chosen, rejected))).as_py())
        largest += [pc.max(pc.list_flatten(ids)).as_py() for ids in some.columns]
    return max(longest), max(largest)

def _say_data(notes, always):
    "Print them. Of the sources of a tiny model, which come by the hundred, only those with a warning."
    warned = any("warning" in line for line in notes)
    if notes and (always or warned): print("\n".join(notes))


# %%
def writes(t, model): # a real one would let the model answer
    asked.append(t)
    return rows[:2] if t == 1 else None

asked = []
ctx.config = StepwiseConfig(**quick, chunks=writes)
made = _made(1, S, ctx)
assert len(_made(1, S, ctx).pairs) == len(made.pairs)
assert _made(2, S, ctx) is None
asked # stage 1 once, although its chunk was wanted twice


# %% [markdown]
# ## Before the first stage
#
# A run that cannot work should stop in the first minute, not in the third hour. So everything that can be found out beforehand is: whether the model has room for the longest row, whether the memory is there, whether names can
# be printed. Only then is `config.yaml` written, and the folder belongs to the run.
#
# One check is about a reference from elsewhere, the folder of another model. It is asked about *our* token ids. With another vocabulary it would answer too, finitely and about other texts. So the vocabularies are compared, and its
# weights are hashed into config.yaml.

# %%
#| export
def _foreign(reference, tokenizer):
    "Weights of a reference that is a folder, else None; raises ValueError where a token has another id."
    if reference in ("moving", "fixed"): return None
    try: theirs = load_tokenizer(reference).get_vocab()
    except Exception as e:
        raise ValueError(f"reference: no tokenizer in {reference} can be read, so its tokens cannot be compared with the model's") from e
    other = [token for token, i in tokenizer.get_vocab().items() if theirs.get(token) != i]
    if other:
        raise ValueError(f"reference: {reference} has another vocabulary, {len(other)} tokens of the model "
                         f"have another id or none, e.g. {min(other)!r}")
    return weights_hash(load_model(reference, "cpu"))


# %%
wider = load_tokenizer(w.base)
wider.add_tokens(["zebra"])
assert _foreign(w.base, tok) == weights_hash(S)
print(complaint(_foreign, w.base, wider).replace(w.base, "S"))


# %% [markdown]
# The rest is what a run *says* before it starts: of a model of five million parameters or more, its size and device, the stages that will come, and the memory. Tiny models, whose runs come by the hundred, stay silent, unless there is something to warn of.

# %%
#| export
def _check_names(sources):
    "Raise ValueError for a source whose name cannot be printed in one line: it goes into tables, figures and messages."
    if not isinstance(sources, dict): return # `load_sources` says what is wrong
    names = [what.name if isinstance(what, Source) else str(name) for name, what in sources.items()]
    for name in names:
        if names.count(name) > 1: raise ValueError(f"sources: two of them are called {name!r}")
        unprintable = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)
        if unprintable: raise ValueError(f"sources: the name {name!r} has a control character or a new line; use one that can be printed")

def _say_memory(model_config, config, precision, device):
    "One line on what training will need; an error, if that is not there."
    try: plan = plan_for(model_config, config, precision, device)
    except Exception as e: # a plan is made from the config alone, which not every model allows
        print(f"memory: cannot be planned for this model ({type(e).__name__})")
        return
    check_memory(plan, device)
    print(f"memory on {device}: {as_line(plan)}; {free_memory(device) / GIB:.1f} GiB are free")

_ROWS = {"packed": "packed rows", "flash": "packed rows, flash attention"} # attention -> in words

def _say_model(policy, pairs, ctx):
    "What computes, and how."
    attention = getattr(ctx.how(policy, pairs), "attention", "")
    rows = _ROWS.get(attention, "padded batches")
    millions = policy.num_parameters() / 1e6
    print(f"model: {ctx.base}, {millions:.0f} million parameters; on {ctx.device.type} in {ctx.precision}, {rows}")

def _steps_of(chunk, config):
    "Optimizer steps of a stage."
    return config.epochs * math.ceil(len(chunk.pairs) / config.batch_size)

def _plan_line(chunks, ctx):
    "The stages that will come."
    stages = [f"{t}. {d.name} ({len(d.pairs)} pairs, {_steps_of(d, ctx.config)} steps)" for t, d in enumerate(chunks, 1)]
    return f"stages: {', '.join(stages)}; each step becomes a line of {ctx.at(1).parent}/stage-1/metrics.jsonl, and so on"

def _not_deterministic(policy, loaded, ctx):
    "What keeps a graphics card from computing the same bits again, if anything does and it matters; said in one line."
    if ctx.device.type == "cpu" or not ctx.config.deterministic or not loaded: return None
    why = why_not_same_bits(policy.train(), ctx.how(policy, loaded[0].pairs), ctx.precision)
    policy.eval()
    if why: print(f"a run that is killed and goes on will not end in the same bits: {why}")
    return why


# %%
ctx.config = StepwiseConfig(**quick)
print(_plan_line(parts, ctx).replace(str(tmp), "runs"))
print(complaint(_check_names, {"two\nlines": []}))


# %% [markdown]
# The time that is left is counted in tokens, and a token of training counts three times: one forward pass, and a backward pass that costs two. Before stage $t$, what is still to come?

# %%
#| export
def _tokens(pairs): return pair_tokens(pairs).sum()

def _tokens_ahead(t, chunks, ctx) -> float:
    "Tokens of forward passes from stage t to the end; training counts threefold."
    every = [_tokens(d.pairs) for d in chunks]
    probed = [_tokens(d.probe(ctx.config.probe)) for d in chunks]
    first = max(t, 2) - 1 # the reference of stage 1 was computed for the partition
    reference = sum(every[first:]) - sum(probed[first:]) # of the later ones, the probes when the stage before ended
    training = TRAINING * ctx.config.epochs * sum(every[t-1:])
    measured = sum(probed) + sum(_tokens(s.pairs) for s in ctx.held) # after each stage
    return reference + training + (len(chunks) - t + 1) * measured


# %%
ahead = [_tokens_ahead(t, parts, ctx) for t in (1, 2, 3, 4)]
assert ahead[3] == 0
[f"{n:,}" for n in ahead]


# %% [markdown]
# All of it in its order. What is refused is refused before the folder is touched.

# %%
#| export
def _prepare(model, sources, config, folder, tokenizer, logprobs, revision, held_out):
    "Check everything, open the folder, measure and partition: the context, the chunks and M_0."
    config, folder = config or StepwiseConfig(), Path(folder)
    made = callable(config.chunks)
    if made and sources: raise ValueError("sources: chunks is a function, which brings its own pairs; leave sources out")
    _tracker(config, folder) # an impossible one is found out before anything is computed
    check_fresh(folder)
    _check_names(sources)
    _check_names(held_out)

    base, tokenizer = base_folder(model, tokenizer, folder, revision)
    if made: read, held = [], _own(held_out, tokenizer, config)
    else: read, held = read_sources(sources, held_out, tokenizer, config)
    loaded = [] if made else _check_chunks(config.chunks, read)
    theirs = _foreign(config.reference, tokenizer)

    policy = load_model(base, None if config.device == "auto" else config.device, revision)
    check_model(policy)
    for s in loaded + held: check_rows(policy, *_extent(s.pairs))
    precision = pick_precision(config.precision, policy.device)
    dtype = stored_dtype(base, revision) if config.save_dtype == "S" else torch.float32
    ctx = _Context(config, folder, base, tokenizer, policy.device, precision, logprobs, dtype, revision, held=held, clock=Clock(0))
    ctx.talks = policy.num_parameters() >= SMALL
    if ctx.talks: _say_memory(policy.config, config, precision, policy.device)

    written = {s.name: _written(what) for s, what in zip(read, (sources or {}).values())}
    ctx.otherwise = open_folder(folder, config, precision, _identity(policy, ctx, loaded, written, theirs))
    own = [s for s in held if s.counts] # of a source that was parted, the counts are told once
    for s in read + own: _say_data(data_notes(s, bool(tokenizer.chat_template)), always=ctx.talks)
    _say_data(_check_held(held, loaded), always=True)
    if ctx.talks and loaded: _say_model(policy, loaded[0].pairs, ctx)
    return ctx, _first_pass(loaded, policy, ctx), policy

def _first_pass(loaded, policy, ctx):
    "M_0 reads everything that it must; the chunks, unless a function will make them."
    sets = [Chunk(s.name, s.pairs) for s in loaded]
    ctx.clock.left = sum(_tokens(d.pairs) for d in sets) + _tokens_ahead(1, sets, ctx)
    chunks = [] if callable(ctx.config.chunks) else _partitioned(loaded, policy, ctx)
    ctx.score_all(0, policy, [])
    path = ctx.folder / "held_out.json"
    if ctx.held and not path.exists():
        write_json(path, {s.name: dict(keys=s.pairs["key"][:], tokens=_mean_tokens(s.pairs)) for s in ctx.held})
    if ctx.talks and chunks: print(_plan_line(chunks, ctx))
    return chunks

def _mean_tokens(pairs):
    "Mean length of the responses."
    return {side: sum(map(len, pairs[f"{side}_ids"])) / len(pairs) for side in ("chosen", "rejected")}

def _identity(policy, ctx, loaded, sources, reference_weights):
    "What a run is made of, beside its settings: for config.yaml."
    of_S = table_kind(policy, ctx.precision, response_logprobs)
    return dict(
        model=ctx.base,
        revision=ctx.revision,
        weights=of_S["weights"],
        base=of_S["config"],
        sources=sources,
        reference_weights=reference_weights,
        device=ctx.device.type,
        machine=machine_of(ctx.device),
        pairs=pairs_hash(*(s.pairs for s in loaded)),
        held_out_pairs=pairs_hash(*(s.pairs for s in ctx.held)) if ctx.held else None,
        not_deterministic=_not_deterministic(policy, loaded, ctx),
    )

def _written(source):
    "A source as a run file says it; nothing for what was only in memory."
    if isinstance(source, (str, Path)): return str(source)
    if not isinstance(source, dict) or not isinstance(source["source"], (str, Path)): return None
    return {name: str(v) if isinstance(v, Path) else v for name, v in source.items()}


# %% [markdown]
# It needs one more thing: somebody who follows a run elsewhere names a tracker that Accelerate knows. A tracker is told of each step. It cannot change what is computed.

# %%
#| export
@contextmanager
def tracking(
    config: StepwiseConfig, # log_with names the tracker
    folder, # of the run; the tracker writes into tracker/
):          # a context: the Accelerator, or None
    """An Accelerator with the tracker of `log_with` begun, or None.

    Raises ValueError for one that is unknown or not installed.
    """
    accelerator = _tracker(config, folder)
    if accelerator is None:
        yield None
        return
    settings = {f.name: recorded(getattr(config, f.name)) for f in fields(config)}
    plain = {name: v if isinstance(v, (int, float, str)) else str(v) for name, v in settings.items()}
    accelerator.init_trackers("sdpo", plain)
    try: yield accelerator
    finally: accelerator.end_training()

def _tracker(config, folder):
    "An Accelerator that knows the tracker, or None. Raises ValueError for one that is unknown or not installed."
    if config.log_with == "none": return None
    with warnings.catch_warnings(action="ignore"):
        try: accelerator = Accelerator(log_with=config.log_with, project_dir=Path(folder) / "tracker")
        except ValueError as e: raise ValueError(f"log_with: {str(e).splitlines()[0]}") from e
    if not accelerator.log_with:
        raise ValueError(f"log_with: {config.log_with} is not installed; pip install {config.log_with}, or take none")
    return accelerator


# %%
print(complaint(tracking(StepwiseConfig(log_with="paper"), tmp).__enter__))

# %% [markdown]
# Now a run can begin. After this call $M_0$ has read all pairs, and the chunks are decided.

# %%
asked = dict(model=w.base, sources=w.sources, config=StepwiseConfig(**quick), folder=tmp / "by-hand")
with alone_in(asked["folder"]):
    ctx, parts, policy = _prepare(**asked, tokenizer=None, logprobs=None, revision=None, held_out=None)
print([d.name for d in parts])
sorted(p.name for p in ctx.folder.iterdir())


# %% [markdown]
# ## One stage
#
# First the reference. The order is the point: its table is computed with the model that *is* the reference at this moment, before the policy is reset or trained. There is never a second model in memory. A reference from elsewhere is loaded
# in the policy's place, asked, and given back.

# %%
#| export
def _reference(t, chunks, policy, ctx):
    "Stage t's reference: (table, its name, policy)."
    which, chunk = ctx.config.reference, chunks[t-1]
    if which == "moving": return ctx.score(t-1, policy, chunk.pairs, chunk.name), f"M_{t-1}", policy
    if which == "fixed":
        if t == 1: return ctx.score(0, policy, chunk.pairs, chunk.name), "S", policy
        if not callable(ctx.config.chunks): return ctx.table(0), "S", policy
        which = ctx.base # S has not seen these pairs yet
    return _foreign_reference(which, t, chunks, policy, ctx)

def _foreign_reference(which, t, chunks, policy, ctx):
    "The table of a model that is loaded for it, in the policy's place."
    _free(policy)
    other = ctx.load(0) if which == ctx.base else load_model(which, ctx.device)
    ahead = [c.probe(ctx.config.probe) for c in chunks[t:t+1]]
    need = concatenate_datasets([chunks[t-1].pairs, *ahead])
    table = ctx.score_to(ctx.at(t) / "reference", other, need, f"reference on {chunks[t-1].name}")
    _free(other)
    return table, "S" if which == ctx.base else which, ctx.load(t-1)

def _free(model):
    "Give the memory back, whoever still holds the object."
    model.to("meta")


# %%
table, name, policy = _reference(1, parts, policy, ctx)
assert table.kind["weights"] == weights_hash(policy)
name, len(table.rows)


# %% [markdown]
# Then the stage is trained, measured and saved. Its numbers are those that a table of losses would not show, all on the probe of $D_t$: $\gamma$ before and after with a *paired* interval; the
# [certificate](03_loss.ipynb), the least gain that the loss guarantees, from an evaluation pass of $M_t$ and not from the running loss; and the share of pairs of which the certificate says nothing, those that fell below their reference.

# %%
#| export
def _measures(t, chunks, table, ctx):
    "What the report says about stage t: in nats, on the probe of D_t."
    config, chunk = ctx.config, chunks[t-1]
    probe = list(chunk.probe(config.probe))
    ref, before, after = table.gamma(probe), ctx.table(t-1).gamma(probe), ctx.table(t).gamma(probe)

    def mean(x): return x.float().mean().item()
    loss = mean(dpo_loss(after, ref, config.beta))
    next_ref = table.gamma(chunks[t].probe(config.probe)) if t < len(chunks) else None
    return dict(
        gamma_ref=mean(table.gamma(chunk.pairs)),       # of the whole chunk
        gamma_ref_next=None if next_ref is None else mean(next_ref),
        gamma=mean(after),
        probe=len(probe),
        gamma_change=mean_interval(after - before),     # paired
        loss=loss,
        certificate=certificate(loss, mean(ref), config.beta),
        below_reference=mean(after < ref),              # of these it says nothing
        accuracy_before=mean(reward_accuracy(before)),
        accuracy=mean(reward_accuracy(after)),
    )


# %%
ctx.score_all(0, policy, parts)
shutil.copytree(ctx.at(0) / "logprobs", ctx.at(1) / "logprobs") # as if M_1 had learned nothing
still = _measures(1, parts, table, ctx)
shutil.rmtree(ctx.at(1))

assert still["gamma_change"] == (0, 0, 0)
{name: still[name] for name in ("loss", "below_reference")}

# %% [markdown]
# That was a model measured against itself: nothing changed, and the loss is $\ln 2 = 0.693$. It is the right value for doing nothing, and the first loss of every stage.
#
# For the report, every model also answers a few prompts.

# %%
#| export
ASKED = 4 # prompts that every model answers, for the report

def _answer(t, model, chunks, ctx):
    """What M_t answers to a few prompts, held-out ones if there are any, into answers.json.

    A model that cannot generate has none.
    """
    path = ctx.at(t) / "answers.json"
    if path.exists(): return
    sets = [s.pairs for s in ctx.held] or [d.pairs for d in chunks]
    ids = [pairs[i]["prompt_ids"] for i in range(ASKED) for pairs in sets if i < len(pairs)][:ASKED]
    try: said = greedy_answers(model, ctx.tokenizer, ids, precision=ctx.precision)
    except Exception as e:
        first_line = (str(e).splitlines() or [""])[0]
        print(f"no answers for the report: {type(e).__name__}: {first_line}")
    else: write_json(path, dict(prompts=[ctx.tokenizer.decode(x) for x in ids], answers=said))


# %%
_answer(0, policy, parts, ctx)
answers = read_part(ctx.at(0) / "answers.json")
pd.Series(answers["answers"], index=answers["prompts"], name="answer of S").to_frame()


# %% [markdown]
# The stage itself. What $M_{t-1}$ says about the probes was written down when its stage ended. Should that table be lost, or be of another kind on this machine, the second line makes it again. `stage.json` comes last: it is the mark that the stage is finished.

# %%
#| export
def _stage(t, chunks, policy, ctx):
    "Train M_t, measure it, save it; returns it."
    config, folder, chunk = ctx.config, ctx.at(t), chunks[t-1]
    _begin(t, chunks, ctx)
    start = time.time()
    if t > 1: ctx.score_all(t-1, policy, chunks[:t-1] if callable(config.chunks) else chunks)

    table, reference, policy = _reference(t, chunks, policy, ctx) # before the policy is reset or trained
    ctx.score(t-1, policy, chunk.probe(config.probe), chunk.name)
    if t == 1: _answer(0, policy, chunks, ctx)
    if config.init_target == "S" and t > 1:
        _free(policy)
        policy = ctx.load(0)
    came_in = weights_hash(policy)
    summary = train_stage(
        policy, chunk.pairs, table, config, folder, t,
        logprobs=ctx.how(policy, chunk.pairs),
        clock=ctx.clock,
        on_step=lambda row: ctx.after_step(t, row),
        **_going_on(t, chunks, ctx))

    ctx.score_all(t, policy, chunks)
    _answer(t, policy, chunks, ctx)
    write_json(folder / "cost.json", dict(seconds=round(time.time() - start), peak_gib=round(peak_memory(ctx.device) / GIB, 2)))
    save_model(policy, ctx.tokenizer, folder / "model", ctx.dtype)
    ended = dict(
        stage=t,
        chunk=chunk.name,
        pairs=len(chunk.pairs),
        reference=reference,
        reference_kind=table.kind,
        start=came_in,
        end=weights_hash(policy),
        saved=_saved(t, policy, ctx),
        probes={d.name: d.probe(config.probe)["key"][:] for d in chunks},
        **summary,
        **_measures(t, chunks, table, ctx),
    )
    write_json(folder / "stage.json", ended)

    ctx.before += summary["steps"]
    if ctx.talks: print(_stage_line(ended, len(chunks)))
    if ctx.on_stage: ctx.on_stage(Run(ctx.folder))
    return policy

def _begin(t, chunks, ctx):
    "Set the clock; say once what may change the last bits."
    if ctx.otherwise: print(f"{ctx.folder}: {ctx.otherwise}")
    ctx.otherwise = ""
    ctx.clock.left = _tokens_ahead(t, chunks, ctx)

def _going_on(t, chunks, ctx):
    "With restart = never: the folder whose optimizer goes on, and where this stage stands in the one schedule."
    if ctx.config.restart == "stage": return {}
    steps = [_steps_of(d, ctx.config) for d in chunks]
    previous = ctx.at(t-1) if t > 1 else None
    return dict(previous=previous, schedule=(sum(steps[:t-1]), sum(steps)))

def _saved(t, policy, ctx):
    "What stage.json says about the model on disk."
    saved = dict(dtype=str(ctx.dtype).removeprefix("torch."), weights=weights_hash(policy, ctx.dtype))
    if ctx.dtype == torch.float32: return saved
    from_S = t == 1 or ctx.config.init_target == "S"
    before = ctx.base if from_S else str(ctx.at(t-1) / "model")
    changed = share_changed(policy, before, ctx.dtype, ctx.revision)
    if changed < 0.5:
        print(f"stage {t}: in {saved['dtype']}, the dtype of S, only {changed:.1%} of the saved weights "
              "differ from those before the stage; save_dtype = fp32 keeps the rest of what was learned")
    return saved | dict(changed=changed)

def _stage_line(ended, T):
    "One line about a stage that has ended."
    trained = f"{ended['steps']} steps against {ended['reference']}, first loss {ended['first_loss']:.3f}"
    changed = f"gamma changed by {as_text(ended['gamma_change'], '+.2f')} nats"
    prefers = f"chosen preferred in {ended['accuracy_before']:.0%}, now {ended['accuracy']:.0%}"
    return f"stage {ended['stage']} of {T}, {ended['chunk']}: {trained}; {changed}; {prefers}"


# %%
M_1 = _stage(1, parts, policy, ctx)
assert weights_hash(M_1) == ends[1] # as in the four lines
print(_stage_line(read_part(ctx.at(1) / "stage.json"), 3))
sorted(p.name for p in ctx.at(1).iterdir())


# %% [markdown]
# ## The loop
#
# What is left is short: find the last finished stage, load its model, go on.

# %%
#| export
def sdpo(
    model,              # hub id, folder, or a loaded causal LM (then with its tokenizer)
    sources: dict=None, # name -> path, hub id, rows, ...; see `load_sources`; none where `chunks` is a function
    config: StepwiseConfig=None, # default: all defaults
    folder="runs/sdpo", # the run's; the same call on the same folder goes on where it stopped
    tokenizer=None,     # of a loaded model
    logprobs=None,      # (model, pairs) -> (chosen, rejected); None: packed where `config.packing` allows and the guard agrees
    revision: str=None, # commit of a model on the hub
    held_out: dict=None, # sources of their own that are measured after every stage and never trained on
    on_step=None,       # called after each optimizer step, with its line of metrics.jsonl and the stage, as a dict
    on_stage=None,      # called after each stage, with the run as it stands
) -> Run:
    """Stepwise DPO (arXiv 2403.19270, section 3): one DPO stage per chunk, the reference moving up.

    Raises ValueError for what cannot work, before anything is computed.
    """
    with alone_in(folder):
        ctx, chunks, policy = _prepare(model, sources, config, folder, tokenizer, logprobs, revision, held_out)
        ctx.on_step, ctx.on_stage = on_step, on_stage
        with tracking(ctx.config, ctx.folder) as ctx.tracker: run = _all_stages(ctx, chunks, policy)
        run.report()
    return run

def _all_stages(ctx, chunks, policy):
    "From the last finished stage to the end."
    made = callable(ctx.config.chunks)
    t = len(stage_folders(ctx.folder))
    if t:
        _free(policy)
        policy = ctx.load(t)
    if made: chunks = [_made(i, None, ctx) for i in range(1, t + 1)]
    ctx.before = sum(s["steps"] for s in Run(ctx.folder).stages)
    while True:
        new = _made(t + 1, policy, ctx) if made else None
        if new: chunks.append(new)
        _drop_checkpoints(ctx, last=t == len(chunks))
        if t == len(chunks): break
        t += 1
        policy = _stage(t, chunks, policy, ctx)
    if not t: raise ValueError("chunks: the function returned no pairs for stage 1")
    return Run(ctx.folder)

def _drop_checkpoints(ctx, last):
    """Those of finished stages, unless the next stage takes over the optimizer.

    The last stage's holds its exact weights, where the model on disk is rounded, and stays until no
    other follows.
    """
    if ctx.config.restart != "stage": return
    finished = finished_stages(ctx.folder)
    if ctx.dtype != torch.float32 and not last: finished = finished[:-1]
    for t in finished: shutil.rmtree(ctx.at(t) / "checkpoint", ignore_errors=True)


# %% [markdown]
# ## A run
#
# `sdpo` does everything that the four lines did, and keeps it in a folder. `asked` holds model, sources, settings and folder. (If you read the machinery: stage 1 lies there already, and `sdpo` goes on from it.) The settings are those of the four lines; the order is now the partition's.

# %%
run = sdpo(**asked)
run.partition()[["n", "accuracy", "low", "high", "mean_gamma"]].round(3)

# %% [markdown]
# It is the loop of the first page: the same models, stage by stage, to the bit.

# %%
assert [s["end"] for s in run.stages] == ends[1:]
run.table()

# %% [markdown]
# Three rows matter now, `reference`, `first loss` and `gamma`; [chapter 10](10_report.ipynb) explains the others. Each stage's reference is the model before it. The hashes say so, and the first loss agrees: a model that is its own reference starts at $\ln 2 = 0.693$.

# %%
assert [s["reference_kind"]["weights"] for s in run.stages] == ends[:-1]
assert all(abs(s["first_loss"] - math.log(2)) < 1e-4 for s in run.stages)
assert all(s["gamma_change"][1] > 0 for s in run.stages)


# %% [markdown]
# Sometimes one wants to see the partition before a long run. This is the beginning of `sdpo`, and the same call goes on from it:

# %%
#| export
def sdpo_partition(
    model,              # as for `sdpo`, and so are all others
    sources: dict=None, # name -> data
    config: StepwiseConfig=None, # default: all defaults
    folder="runs/sdpo", # of the run
    tokenizer=None,     # of a loaded model
    logprobs=None,      # (model, pairs) -> (chosen, rejected)
    revision: str=None, # commit of a model on the hub
    held_out: dict=None, # sources that are only measured
) -> Run:
    "The beginning of `sdpo`: the pass of M_0 and the partition. `sdpo` with the same arguments goes on from here."
    with alone_in(folder):
        ctx, _, _ = _prepare(model, sources, config, folder, tokenizer, logprobs, revision, held_out)
        return Run(ctx.folder)


# %%
looked = sdpo_partition(**asked | dict(folder=tmp / "looked"))
assert looked.partition().equals(run.partition())
looked.stages

# %% [markdown]
# ## Does the bar rise?
#
# The row `gamma_ref on D_t` above compares different chunks, so it does not answer. Stay with one chunk, and go from model to model. Before you look: will $\gamma$ on `riddle` rise while *other* chunks are trained on?

# %%
bars = gamma_table(run).groupby(["chunk", "model"], sort=False)["gamma"].mean().unstack()
assert (bars.diff(axis=1).iloc[:, 1:] > 0).all(axis=None)
bars.round(2)

# %% [markdown]
# On `digest`, $D_2$, the bar was 0.73 under $M_0$ and is 1.55 under $M_1$, which has not seen it. On `riddle`, $D_3$, it went from 0.47 to 1.25 to 2.40 while other chunks
# were trained on. This is the rise of a moving reference: the hollow boxes below, models that have not yet trained on the chunk, climb as well.

# %%
plot_gamma(gamma_table(run));

# %% [markdown]
# ## Why not S?
#
# What if S stayed the reference in every stage? Then the stages would be plain DPO in pieces. The gradient of a pair has the weight $\lambda = \sigma(\beta(\gamma_{ref} - \gamma_\theta))$ ([chapter 03](03_loss.ipynb)): one half where the
# policy equals its reference, less the further it is ahead. Measured from S, a policy that comes out of stage 1 is ahead on most pairs of $D_2$ already, and they pull less. Measured from $M_1$, every pair starts again at one half.

# %%
D_2 = chunks["digest"]
gamma_S = run.folder / "base/logprobs"
gamma_1 = run.folder / "stage-1/logprobs"
gamma_S, gamma_1 = (read_table(path).gamma(D_2) for path in (gamma_S, gamma_1))
from_S, from_1 = torch.sigmoid(0.3 * (gamma_S - gamma_1)), torch.sigmoid(0.3 * (gamma_1 - gamma_1))

assert (from_1 == 0.5).all()
ahead = (gamma_1 > gamma_S).float().mean()
print(f"the policy is ahead of S on {ahead:.0%} of the pairs of D_2")
print(f"mean weight of a pair: {from_S.mean():.3f} against S, {from_1.mean():.3f} against M_1")

# %% [markdown]
# So a moving reference takes the leash off and fastens it again, one model further. That is the whole difference, and it cuts both ways: the policy is pulled further from S, for better or for worse. If all stages saw the same prompts and each reached its optimum, $T$ stages at $\beta$ would end where one stage at
# $\beta/T$ ends ([chapter 03](03_loss.ipynb)).
#
# ## Signs of failure
#
# The report looks for [three of them](08_evaluate.ipynb): *forgetting*, where a later stage undoes what an earlier one learned; *instability*, where the loss ends above its start; and a stage that changed nothing. This run has none. With a learning rate that is too small for so few steps, each stage has one.

# %%
assert run.signs() == []
timid = sdpo(w.base, w.sources, StepwiseConfig(**quick | dict(lr=1e-9, epochs=1)), tmp / "timid")
assert [sign.split(":")[0] for sign in timid.signs()] == ["minimal improvement"] * 3
timid.signs()

# %% [markdown]
# ## One stage is plain DPO
#
# With $T = 1$ there is nothing left but chapter 06, and no second code path: the same bits come out.

# %%
one = sdpo(w.base, w.sources, StepwiseConfig(**quick, chunks=1, order="as_given"), tmp / "one")
alone = load_model(w.base)
every = concatenate_datasets([chunks[name] for name in w.sources])
train_stage(alone, every, read_table(tmp / "one/base/logprobs"), TrainConfig(**quick), tmp / "alone")
assert weights_hash(alone) == one.stages[0]["end"]

# %% [markdown]
# ## Where the policy starts
#
# The paper's Figure 3: in stage 2, a policy that starts at S against the reference $M_1$ has a far higher loss. The tables say how high before a step is made. On the first batch $B$ of stage 2,
#
# $$L = \frac{1}{|B|} \sum_{B} \mathrm{softplus}\big(\beta\,(\gamma_{M_1} - \gamma_S)\big). \tag{2}$$

# %%
from_S = sdpo(w.base, w.sources, StepwiseConfig(**quick, init_target="S"), tmp / "from-S")
batch = D_2.select(epoch_order(len(D_2), seed=0, stage=2, epoch=0)[:32])
gamma_S, gamma_1 = (read_table(from_S.folder / f / "logprobs").gamma(batch) for f in ("base", "stage-1"))
expected = F.softplus(0.3 * (gamma_1 - gamma_S)).mean().item() # (2)

# %%
starts = {
    "from M_1": run.stages[1]["first_loss"],
    "from S": from_S.stages[1]["first_loss"],
    "from S, by (2)": expected,
}
assert abs(starts["from S"] - expected) < 1e-4
assert expected > math.log(2) + 0.05
pd.Series(starts, name="first loss of stage 2").round(3).to_frame()

# %% [markdown]
# Thin lines are steps, thick ones the mean of the last eight. Both policies learn, and after two epochs the one from S is still behind.

# %%
both = {"from $M_1$": run, "from S": from_S}
curves = pd.DataFrame({name: r.metrics.query("stage == 2").set_index("step")["loss"] for name, r in both.items()})
smooth = curves.rolling(8, min_periods=1).mean()
assert (smooth["from S"] > smooth["from $M_1$"] + 0.05).all()

fig, ax = plt.subplots(figsize=(6, 2.8))
for i, name in enumerate(curves):
    ax.plot(curves[name], color=f"C{i}", lw=0.8, alpha=0.5)
    ax.plot(smooth[name], color=f"C{i}", lw=2.2)
    ax.text(curves.index[-1] + 0.5, smooth[name].iloc[-1], f"policy {name}", color=f"C{i}", va="center")
ax.axhline(math.log(2), color="black", lw=1, ls=":")
ax.text(curves.index[-1] + 0.5, math.log(2), "$\\ln 2$: as good as $M_1$", va="center")
ax.set(xlabel="optimizer step of stage 2", ylabel="DPO loss against $M_1$ (nats)\nlower is better")
sns.despine()


# %% [markdown]
# ## Killed and continued
#
# Nothing is lost when a run dies; tests do this with a real SIGKILL. Here the second stage is interrupted by an exception, in the fiftieth batch of the run.

# %%
def dies_at(call):
    "Packed log-probabilities that stop at a batch of training."
    def logprobs(model, pairs):
        logprobs.calls += model.training
        if logprobs.calls == call: raise KeyboardInterrupt
        return packed_logprobs(model, pairs)
    logprobs.calls = 0
    logprobs.__name__ = "packed_logprobs"
    logprobs.tokens = packed_logprobs.tokens
    logprobs.attention = "packed"
    return logprobs

settings = StepwiseConfig(**quick, save_every=7)
try: sdpo(w.base, w.sources, settings, tmp / "killed", logprobs=dies_at(50))
except KeyboardInterrupt: pass

# %%
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
other_beta = StepwiseConfig(**quick | dict(beta=0.2))
complaint(sdpo, w.base, w.sources, other_beta, tmp / "killed").split(": ", 1)[1]

# %% [markdown]
# ## What did alignment do?
#
# Tables of nats are not the point; answers are. Prompts are picked as on the [front page](index.ipynb): of each skill the first that S gets wrong, then the first that S gets right and the aligned model gets wrong. The settings are others, and so are the answers.

# %%
S = load_model(w.base)
answers_beside(S, run.model, tok, w.test)

# %%
exact = {name: score_responses(model, tok, w.test, tau=0)["exact"].mean() for name, model in (("S", S), ("M_3", run.model))}
assert exact["M_3"] > exact["S"]
print(f"right of {len(w.test)} test prompts: S {exact['S']:.0%}, after three stages {exact['M_3']:.0%}")

# %% [markdown]
# Alignment is a change of odds, not a switch. Some wrong answers became right, some are wrong in another way, and a few right ones were lost.

# %% [markdown]
# ## What this does not show
#
# Nothing here says that stages *help*. If every stage reached its optimum on the same prompts, $T$ stages at $\beta$ would be one stage at $\beta/T$
# ([chapter 03](03_loss.ipynb)), and the [demo](demo.ipynb) puts DPO at $\beta/T$ beside every stepwise run for that reason.

# %%
#| hide
shutil.rmtree(tmp)

# %% [markdown]
# ## What you now have
#
# `sdpo(...)`: stages, a moving reference that is a table with a hash, a folder that survives a kill, a report that says which model was measured
# against which. `StepwiseConfig` with every switch that an experiment on the paper needs.
#
# ## Questions to test yourself
#
# 1. Why is the reference table computed before the policy is reset?
#
# <details><summary>Answer</summary>
#
# The reference of stage $t$ is $M_{t-1}$, and at that moment the policy in memory *is* $M_{t-1}$. After a reset to S it would be another model, and the table would be S's.
#
# </details>
#
# 2. With `reference="fixed"` and `init_target="previous"`, why is stage 2's first loss *below* $\ln 2$?
#
# <details><summary>Answer</summary>
#
# The policy is $M_1$, the reference is S. What stage 1 taught carries over to $D_2$: on most of its pairs the policy already prefers the chosen response more than S does, so the gain is positive and the loss is below the value for a gain of zero.
#
# </details>
#
# 3. Why may `save_every` change between two calls on one folder, and `probe` not?
#
# <details><summary>Answer</summary>
#
# `save_every` changes no number. `probe` decides on which pairs the models are measured; with another one, two stages of the same run would be measured on different pairs.
#
# </details>
#
# ## Try this
#
# 1. Run `order="hard_to_easy"` and look at `gamma_ref on D_t+1`.
#
# <details><summary>What you should see</summary>
#
# `riddle` comes first now, and `primer` last. Before `primer` is trained on, the reference's mean $\gamma$ on it is 3.67 nats; under S it was 1.68. So the bar of the easiest pairs has risen before their stage began.
#
# </details>
#
# 2. Give `reference` the folder of $M_1$ of another run, `stage-1/model`.
#
# <details><summary>What you should see</summary>
#
# With the settings of this page, stage 1 begins at a loss of 1.18, far above $\ln 2$: S is asked to beat a model that has already learned these pairs. Stage 3 begins at 0.52, below $\ln 2$: by then the policy has passed its reference. In the table of stages, `reference` is the folder.
#
# </details>
