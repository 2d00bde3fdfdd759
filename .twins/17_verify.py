# %% [markdown]
# # What somebody else can check
# > A run is handed in without its weights. Does what its report says follow from what its folder holds?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/17_verify.ipynb)
#
# **You should know** that [a run is a folder](10_folder.ipynb), and what [a stage writes down about itself](13_stages.ipynb). **Time** two hours to read with its code, half a minute to run.
#
# A student hands in a run, or a colleague sends you one. Its report says that accuracy rose from 0.74 to 0.86, and that the reference of stage 2 was $M_1$. A report is a claim. Why should you believe it?
#
# You need not train again. A run keeps more than its report shows: for each model a table of what it said about each pair, a hash of its weights, and one line for each optimizer step. The numbers of the report were *computed* from these. So compute them again. Three kinds of claims are left, and it helps to keep them apart:
#
# | what is claimed | what you need to check it |
# |---|---|
# | numbers of a stage, its reference, its first loss, the steps that it made | the folder |
# | these are the pairs, this is their order | the folder and the data |
# | the tables were written by these models | the folder, the data and the weights |
#
# What cannot be checked is not passed over: it is listed as *not checked*.
#
# Most faults that this finds are no fraud. A folder was copied while a run wrote into it; a stage was trained again with another setting and the report is the old one; a model was put where another one had been. The check does not ask why. It says what does not fit.

# %%
#| default_exp verify

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
import hashlib, json, math, random, re, tempfile, zipfile, zlib
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
from datasets import Dataset, load_from_disk

from sdpo_nb.evaluate import as_text
from sdpo_nb.folder import (
    alone_in, folder_of, load_any, load_exactly, load_saved_tokenizer, load_stage, naming, read_part, saved_as,
    versions
)
from sdpo_nb.logprobs import (
    LogprobTable, keys_of, load_model, pairs_hash, read_table, replacing, response_logprobs, score_pairs,
    table_kind, weights_hash
)
from sdpo_nb.lora import is_adapter
from sdpo_nb.loss import dpo_loss
from sdpo_nb.partition import ORDER_BY
from sdpo_nb.plan import (
    Chunk, StepwiseConfig, check_chunks, check_names, load_sources, make_config, part_sources
)
from sdpo_nb.report import Run, as_markdown, report_text, stage_table
from sdpo_nb.stages import partition_of, stage_measures, start_of
from sdpo_nb.trainer import all_batches, learning_rate

# %%
import shutil

from sdpo_nb.logprobs import load_tokenizer, write_json
from sdpo_nb.loss import reward_accuracy
from sdpo_nb.stepwise import sdpo
from sdpo_nb.world import complaint, load_world

torch.set_num_threads(1)
pd.set_option("display.width", 180, "display.max_columns", 20, "display.max_colwidth", 100)

# %% [markdown]
# ## One number, computed again
#
# Here is a small run to check: sixty pairs of each of three sources, a fifth of the prompts held out. It takes some seconds. What it claims of its three stages:

# %%
w, tmp = load_world(), Path(tempfile.mkdtemp())
sources = {name: dict(source=w.sources[name], max_pairs=60) for name in ("primer", "digest", "riddle")}
settings = dict(beta=0.3, lr=1e-3, batch_size=16, precision="fp32", max_length=64, eval_share=0.2)

run = sdpo(w.base, sources, StepwiseConfig(**settings), tmp / "run")
run.table().loc[["chunk", "reference", "first loss", "accuracy of M_t on D_t"]]

# %% [markdown]
# Take one number: the accuracy of $M_2$ on $D_2$. `stage.json` of stage 2 claims it, and names the pairs on which it was measured. The table of $M_2$ holds what the model said about them. Reward accuracy is the share of pairs with $\gamma > 0$:

# %%
claimed = run.stages[1]
M_2 = read_table(run.folder / "stage-2/logprobs")
pairs = [dict(key=key) for key in claimed["probes"]["digest"]]

by_table = reward_accuracy(M_2.gamma(pairs)).mean().item()
assert abs(by_table - claimed["accuracy"]) < 1e-4
print(f"claimed {claimed['accuracy']:.4f}, by the table {by_table:.4f}, of {len(pairs)} pairs")


# %% [markdown]
# The number follows from the table, and no model was loaded. That is the whole idea, and the rest of the chapter does it for every claim. A table is a stronger witness than a number, because many numbers come from it. To raise this accuracy by hand, you must change $\gamma$ of single pairs, and then the mean of $\gamma$ moves, and the certificate, and what the next stage says about its reference.
#
# ## Reading a folder without trusting it
#
# Each check needs the same few things: what a stage claims, the hash that a model is said to have, the table of a model. `Evidence` holds them. It loads no model, and believes nothing: `ended` is the hash that $M_t$ is *said* to have, and whether it has it is for others to ask. `whose` goes the other way, from a hash to a name, so that a note can say "started from $M_0$" where a reader would not recognise sixteen letters.

# %%
#| export
@dataclass
class Evidence:
    "A run folder, as somebody reads it who was not there."
    folder: Path     # config.yaml lies in it
    config: dict     # config.yaml
    stages: list     # stage.json of each finished stage
    settings: object # those of config.yaml, with defaults for what it lacks
    names: list      # of the chunks, in order
    given: str = None # folder or hub id of a model that came beside the folder
    given_is: int = None # t, where that model is M_t
    loaded: list = field(default_factory=list) # sources that were trained on, where they were given
    held: list = field(default_factory=list)   # sources that were held out, where they were given

    def at(
        self,
        t: int, # of M_t; 0: S
    ) -> Path:
        "The folder of M_t."
        return folder_of(self.folder, t)

    def ended(
        self,
        t: int, # of M_t; 0: S
    ) -> str:
        "The hash that M_t is said to have."
        return self.stages[t-1]["end"] if t else self.config["weights"]

    def whose(
        self,
        weights: str, # a hash
    ) -> str:
        "The model of this run that has these weights, in words."
        for t in range(len(self.stages) + 1):
            if self.ended(t) == weights: return f"M_{t}"
        return f"a model that is not of this run ({weights})"

    def table(
        self,
        t: int, # of M_t; 0: S
    ) -> LogprobTable:
        "What M_t said. Raises ValueError where there is no table."
        return read_table(self.at(t) / "logprobs")


# %% [markdown]
# A reader of folders meets old ones, too. Settings that did not exist when a run was made get their defaults, and a file that not every run has is nothing where it is missing. But a folder without a `config.yaml` is no run, and neither is one whose settings no run could have; and one without a finished stage has claimed nothing yet.

# %%
#| export
def read_evidence(
    folder, # of a run
) -> Evidence:
    "A run folder. Raises ValueError for one that is no run, or has no finished stage."
    folder = Path(folder).expanduser()
    if not (folder / "config.yaml").exists():
        raise ValueError(f"{folder}: no config.yaml here, so it is not a run")
    run = Run(folder)
    config, stages = run.config, run.stages
    if not stages: raise ValueError(f"{folder}: no stage is finished, so there is nothing to check")
    with naming(folder / "config.yaml"): settings = _settings(config)
    parted = _part(folder, "partition.json")
    names = parted.get("names") or [stage["chunk"] for stage in stages]
    return Evidence(folder, config, stages, settings, names)

def _settings(config):
    "Those of config.yaml, with defaults for what it lacks. Raises ValueError for what no run could have."
    if not isinstance(config["model"], str): raise ValueError(f"model: must be text, got {config['model']!r}")
    defaults, given = {f.name: f.default for f in fields(StepwiseConfig)}, config["settings"]
    def known(name, value):
        elsewhere = name == "reference" or name in ("loss", "chunks") and isinstance(value, str) # a model, a function
        return name in defaults and not elsewhere
    make_config({name: value for name, value in given.items() if known(name, value)})
    return SimpleNamespace(**defaults | given)

def _part(folder, name):
    "A file that not every run has; nothing where it is missing."
    path = folder / name
    return read_part(path) if path.exists() else {}


# %%
ev = read_evidence(run.folder)
print("stage 2 was trained against", ev.whose(claimed["reference_kind"]["weights"]))
print(complaint(read_evidence, w.base).replace(w.base, "S"))


# %% [markdown]
# The hash that stage 2 wrote down as that of its reference belongs to $M_1$, as it should.
#
# Which table was that of the reference? The folder has several. `stage.json` holds the hash of the weights of the reference that the stage was trained against, and each table holds the hash of its model. So the table is found *by its hash*, whatever the settings say. Whether the settings say the same is a question of its own.

# %%
#| export
def _reference_table(t, ev):
    "The table of the reference of stage t, found by its hash. Raises ValueError where there is none."
    weights = ev.stages[t-1]["reference_kind"]["weights"]
    earlier = [ev.at(s) / "logprobs" for s in reversed(range(t))]
    for folder in [ev.at(t) / "reference", *earlier]: # the first is that of a model from elsewhere
        table = read_table(folder) if folder.exists() else None
        if table and table.kind["weights"] == weights: return table
    raise ValueError(f"no table of the reference, {ev.whose(weights)}, is in the folder")


# %%
assert _reference_table(2, ev).kind == ev.table(1).kind


# %% [markdown]
# It is the table of $M_1$: the reference of stage 2 is the model that stage 1 ended with, and its table was written when that stage was measured.
#
# And which pairs were in $D_t$? A table has keys, without an order. `stage.json` names the pairs of the probe, in the order of the chunk. A chunk of up to 512 pairs is its own probe; of a larger one, only the data know all of it.

# %%
#| export
def _chunk_keys(t, ev):
    "The keys of D_t, in their order; nothing where they are not known."
    stage, made = ev.stages[t-1], ev.at(t) / "chunk" # of a chunk that a function made
    if made.exists(): return load_from_disk(str(made))["key"][:]
    probe = stage["probes"][stage["chunk"]]
    if len(probe) == stage["pairs"]: return probe
    every = [key for source in ev.loaded for key in keys_of(source.pairs)]
    rows = _part(ev.folder, "partition.json")["chunks"][t-1]
    return [every[i] for i in rows] if every else []


def _held_out_keys(ev):
    "The keys of held-out pairs, in their order."
    held = _part(ev.folder, "held_out.json")
    return [key for part in held.values() for key in part["keys"]]


# %%
assert len(_chunk_keys(2, ev)) == claimed["pairs"]
_chunk_keys(2, ev)[:3]

# %% [markdown]
# ## Three answers
#
# A check is a function that returns `True`, `False` or `None`, and a note that says what was compared. `_row` calls it, and makes a row of the answer. What stops with an error is a fault of the folder, since a good folder stops none of them; a value that was never written down is only *not checked*, because older versions wrote less.
#
# So there are three answers. The third answer is as important as the others. If a check that could not be made counted as passed, leaving a file out would be the best way to pass.

# %%
#| export
OK, DIFFERS, NOT_CHECKED = "ok", "DIFFERS", "not checked"

_ANSWERS = {True: OK, False: DIFFERS, None: NOT_CHECKED}

def _row(check, ask, *args):
    "One row: `ask` returns True, False or None, where it cannot be checked, and a note."
    try: right, note = ask(*args)
    except KeyError as e: right, note = None, f"{e} was not written down"
    except (ValueError, TypeError, AttributeError, IndexError, OSError, ArithmeticError, RuntimeError) as e:
        first_line = str(e).split("\n")[0]
        right = None if isinstance(e, PermissionError) else False # what may not be read may be right
        note = first_line.split("; ")[0] or type(e).__name__
    return dict(check=check, result=_ANSWERS[right], note=note)


# %% [markdown]
# ## Who was whose reference?
#
# Four hashes of a stage must fit together: that of its reference, that of the model it started from, that of the model it ended with, and that of the table which this model is said to have written. The table must be whole, too: if what $M_3$ says of the first chunk were left out, nobody would see what it forgot.

# %%
#| export
def _reference(t, ev):
    "Is the reference of stage t the one that the settings name?"
    which, stage = ev.settings.reference, ev.stages[t-1]
    named = dict(moving=(f"M_{t-1}", ev.ended(t-1)), fixed=("S", ev.ended(0)))
    name, weights = named.get(which) or (which, ev.config["reference_weights"])
    found = stage["reference_kind"]["weights"]
    if found != weights: return False, f"{which} means {name}; the table was that of {ev.whose(found)}"
    if stage["reference"] != name: return False, f"{which} means {name}; the stage names {stage['reference']}"
    return True, f"{which}: {name}, {weights}"

def _start(t, ev):
    "Did stage t start where the settings say?"
    before, found = start_of(t, ev.settings), ev.stages[t-1]["start"]
    if found == ev.ended(before): return True, f"M_{before}"
    return False, f"started from {ev.whose(found)}, not from M_{before}"

def _table(t, ev):
    "Is the table of M_t of the weights that M_t is said to have, with all that every model reads?"
    table = ev.table(t)
    found = table.kind["weights"]
    if found != ev.ended(t): return False, f"the table is that of {ev.whose(found)}"
    probes = ev.stages[max(t, 1) - 1]["probes"].values()
    absent = {key for keys in [*probes, _held_out_keys(ev)] for key in keys} - set(table.rows.index)
    if absent: return False, f"{len(absent)} pairs of the probes and of the held-out pairs are missing"
    return True, f"{len(table.rows)} pairs"


# %% [markdown]
# Each of the three checks reads one link of the chain. To see one of them speak, we change the evidence in memory: what if stage 2 had started from S?

# %%
ev.stages[1]["start"] = ev.ended(0) # what if stage 2 had started from S?
rows = [_row(f.__name__, f, 2, ev) for f in (_reference, _start, _table)]
ev = read_evidence(run.folder)
assert [row["result"] for row in rows] == [OK, DIFFERS, OK]
pd.DataFrame(rows).set_index("check")

# %% [markdown]
# Only the row of the broken link differs. The reference and the table are what they were. That is wanted of every check here: a single fault, a single row, so that a reader sees at once where to look. A hash in the middle of the chain is the exception; question 2 asks about it.
#
# ## The numbers of a stage
#
# [Chapter 13](13_stages.ipynb) computes the numbers of a stage from three tables: that of the reference, of the model that the stage started at and of $M_t$. The same function is called here, so nobody can say that we measure otherwise. They must agree to 1e-4: another processor may add in another order.
#
# `_close` compares single numbers and lists, and is strict about what is missing: a number that is not there is close to nothing, except to another one that is not there. NaN is close to NaN.

# %%
#| export
NEAR = 1e-4 # how far a number may be from the same number computed again

def _close(a, b, near=NEAR):
    "Whether two numbers, or two lists of numbers, are the same but for rounding."
    if a is None or b is None: return a is b
    if isinstance(b, (list, tuple)):
        return isinstance(a, (list, tuple)) and len(a) == len(b) and all(map(_close, a, b))
    if math.isnan(b): return math.isnan(a)
    return math.isclose(a, b, abs_tol=near, rel_tol=near / 10)


# %%
assert _close(0.69315, 0.69317)
assert not _close([1.0, 2.0], [1.0, 2.1])
assert not _close(None, 1.0)


# %% [markdown]
# Now the numbers. `recomputed` gives what `stage.json` should say. The probe of the next chunk is measured with it, because a stage also says what it did to pairs that it has not seen yet.

# %%
#| export
def _as_pairs(keys): return [dict(key=key) for key in keys]

def _three_tables(t, ev): return _reference_table(t, ev), ev.table(start_of(t, ev.settings)), ev.table(t)

def recomputed(
    t: int, # the stage
    ev: Evidence,
) -> dict:  # as `stage_measures`; gamma_ref is missing where the keys of D_t are not known
    "What stage.json should say about stage t, by the tables."
    stage, keys = ev.stages[t-1], _chunk_keys(t, ev)
    probes = stage["probes"]
    probe = _as_pairs(probes[stage["chunk"]])
    coming = [_as_pairs(probes[name]) for name in ev.names[t:t+1] if name in probes]
    tables = _three_tables(t, ev)
    whole = _as_pairs(keys) or probe
    found = stage_measures(*tables, probe, whole, coming[0] if coming else None, ev.settings.beta)
    if not keys: del found["gamma_ref"]
    return found


# %% [markdown]
# The two columns, claimed and computed again, for stage 2:

# %%
by_tables = recomputed(2, ev)
as_claimed = {name: claimed[name] for name in by_tables}
pd.DataFrame({"claimed": as_claimed, "by the tables": by_tables})


# %% [markdown]
# Ten numbers, digit by digit. Read them as a teacher would: before stage 2 the chosen responses were ahead by 1.2 nats on its chunk, after it by 6.0, and the accuracy rose from 0.59 to 0.86. All of that is in the tables of $M_1$ and $M_2$, and nobody had to believe the report.
#
# One more number hides in the log. Each line of `metrics.jsonl` has the mean $\gamma_{ref}$ of its batch. The [order of the data](06_trainer.ipynb) follows from the seed, so the folder knows which pairs were in each batch, and the table of the reference knows their $\gamma$. If every line agrees, this log belongs to this
# reference, these pairs and this seed.

# %%
#| export
def _log(t, ev):
    "The lines of metrics.jsonl. Raises ValueError for one that is cut."
    path, lines = ev.at(t) / "metrics.jsonl", []
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try: lines.append(json.loads(line))
        except ValueError as e: raise ValueError(f"{path}: line {n} is cut or damaged") from e
    return lines

def _whole_log(t, ev):
    "The lines, or nothing, where some are missing."
    try: lines = _log(t, ev)
    except (ValueError, OSError): return []
    stage = ev.stages[t-1]
    return lines if len(lines) == stage["steps"] + stage["skipped"] else []

def _batch_means(t, ev):
    "gamma_ref of each batch by the table, in the order of the log; nothing where the pairs are not known."
    keys = _chunk_keys(t, ev)
    if not keys: return []
    gamma_ref = _reference_table(t, ev).gamma(_as_pairs(keys))
    return [gamma_ref[rows].mean().item() for _, rows in all_batches(len(keys), ev.settings, t)]


# %% [markdown]
# The log of stage 2, against the table of $M_1$. One number a step, and all of them agree:

# %%
logged = [line["gamma_ref"] for line in _log(2, ev)]
by_table = _batch_means(2, ev)
assert _close(logged, by_table)
pd.DataFrame({"in the log": logged, "by the table": by_table}).round(4).T


# %% [markdown]
# This is a strong check for so little. The order of the pairs depends on seed, stage and epoch, and the mean of sixteen pairs on which sixteen they were. A log of another run, of another seed or of a chunk with one other pair does not pass it.
#
# There is a cheaper way to a better accuracy than to change a number: leave the bad pairs out of the probe. But nobody chooses the probe. A chunk of up to `probe` pairs is its own probe. Of a larger one a fixed draw is taken. The same function is called here, for each chunk that the stage was measured on.

# %%
#| export
def _wrong_probe(t, ev):
    "In words, where stage t was measured on other pairs than a run draws; nothing where that cannot be told."
    probes, most = ev.stages[t-1]["probes"], ev.settings.probe
    names = ev.names if ev.config["sources"] else ev.names[:t] # a function makes one chunk after the other
    if list(probes) != names: return f"measured on {', '.join(probes)}, not on {', '.join(names)}"
    for s, (name, stage) in enumerate(zip(names, ev.stages), 1):
        wanted, keys = min(most, stage["pairs"]), _chunk_keys(s, ev)
        if len(probes[name]) != wanted: return f"measured on {len(probes[name])} pairs of {name}, not on {wanted}"
        drawn = Chunk(name, Dataset.from_dict(dict(key=keys))).probe(most)
        if keys and keys_of(drawn) != probes[name]: return f"measured on other pairs of {name} than those that are drawn"


# %%
assert _wrong_probe(2, ev) is None
ev.stages[1]["probes"]["digest"] = claimed["probes"]["digest"][1:]
said = _wrong_probe(2, ev)
ev = read_evidence(run.folder)
said


# %% [markdown]
# A table may have been computed a second time on another machine, when a run went on there. Its numbers are then near, and not the same, and the check says that it cannot compare.

# %%
#| export
def _other_machine(t, ev):
    "In words, where a table was computed otherwise than when stage t was measured."
    was = ev.stages[t-1]["reference_kind"]
    for table in _three_tables(t, ev):
        for name in ("device", "precision"):
            now = table.kind.get(name)
            if now != was.get(name): return f"measured with {name} {was.get(name)}, the table is of {now}"

def _numbers(t, ev):
    "Do the numbers of stage t follow from the tables?"
    other, picked = _other_machine(t, ev), _wrong_probe(t, ev)
    if picked: return False, picked
    if other: return None, other
    stage, found = ev.stages[t-1], recomputed(t, ev)
    wrong = [name for name, value in found.items() if not _close(stage.get(name), value)]
    if wrong: return False, _told(wrong, stage, found)

    lines, means = _whole_log(t, ev), _batch_means(t, ev)
    if not means: return True, f"{len(found)} numbers; gamma_ref, the log and the choice of the probe need the data"
    if not lines: return True, f"{len(found)} numbers"
    logged = [line["gamma_ref"] for line in lines]
    if not _close(logged, means):
        return False, "gamma_ref of the log is not that of these pairs in this order"
    return True, f"{len(found)} numbers, and gamma_ref of {len(lines)} steps"

def _told(wrong, stage, found):
    "The first number that is wrong, and how many more."
    first = wrong[0]
    more = f", and {len(wrong) - 1} more numbers" if len(wrong) > 1 else ""
    return f"{first} is {_shown(stage.get(first))}, by the tables {_shown(found[first])}{more}"

def _shown(value):
    "A number, or several, in a few digits."
    if isinstance(value, (list, tuple)): return as_text(value)
    return f"{value:.4g}" if isinstance(value, (int, float)) else value


# %% [markdown]
# Three stages, two of them tampered with in memory: an accuracy of 0.95 in stage 2, and in stage 3 a change of $\gamma$ that is one nat too large.

# %%
ev.stages[1]["accuracy"] = 0.95
ev.stages[2]["gamma_change"][0] += 1
rows = [_row(f"stage {t}", _numbers, t, ev) for t in (1, 2, 3)]
ev = read_evidence(run.folder)
assert [row["result"] for row in rows] == [OK, DIFFERS, DIFFERS]
pd.DataFrame(rows).set_index("check")


# %% [markdown]
# The note says which number it was, what is claimed and what the tables say. With that, somebody who made an honest mistake can find it.
#
# ## Pairs and steps
#
# `partition.json` says which rows of the data make each chunk, `stage.json` names their keys, and `config.yaml` has a hash of all keys in the order of the data. So the chunks can be put together again, and must give that hash.
#
# The first check is about the plan: are the stages those of `partition.json`, in their order and with their sizes, and does the partition have the number of chunks and the order that the settings ask for? A run that was stopped after two of three stages is not wrong. It is not finished, and what cannot be asked of it is *not checked*. The second is about the pairs themselves. Whoever trained on other pairs than those that were planned must have changed a key, and then the hash is another one.

# %%
#| export
def _finished(ev):
    "Are all stages there, with the pairs of their chunks?"
    done = len(ev.stages)
    parted = _part(ev.folder, "partition.json")
    if not parted and ev.config["sources"]: return False, "partition.json is missing"
    if not parted: return True, f"{done}, their chunks made by a function"
    sizes = [len(rows) for rows in parted["chunks"]]
    T = _T(parted, ev.settings)
    if len(sizes) != T: return False, f"partition.json has {len(sizes)} chunks, the settings ask for {T}"
    if not _in_order(parted, ev.settings): return False, f"{ev.settings.order} is not the order of partition.json"
    wanted = list(zip(parted["names"], sizes))
    found = [(stage["chunk"], stage["pairs"]) for stage in ev.stages]
    if found != wanted[:done]: return False, "chunks or their sizes are not those of partition.json"
    if done < len(sizes): return None, f"only {done} of {len(sizes)} are finished"
    return True, f"{done} of {done} are finished"

def _T(parted, config):
    "The number of chunks that the settings ask for; one per source where they do not say it."
    if config.chunks is None: return len(parted["measures"])
    return config.chunks if isinstance(config.chunks, int) else len(config.chunks)

def _in_order(parted, config):
    "Whether the sources lie in the order of the settings, by what partition.json says of each."
    easy = [measure[ORDER_BY[config.order_by]] for measure in parted["measures"]]
    down, up = sorted(easy, reverse=True), sorted(easy)
    wanted = dict(easy_to_hard=down, random=down, hard_to_easy=up, as_given=easy)[config.order]
    return easy == wanted and parted.get("order", config.order) == config.order

def _keys(ev):
    "Do the chunks hold the pairs of which config.yaml has a hash?"
    parted = _part(ev.folder, "partition.json")
    if not parted and ev.config["sources"]: return None, "partition.json is missing"
    if not parted: return None, "the chunks were made by a function"
    chunks = [_chunk_keys(t, ev) for t in range(1, len(ev.stages) + 1)]
    if len(chunks) < len(parted["chunks"]) or not all(chunks):
        return None, "the keys of some chunks are not in the folder"
    by_row = {}
    for rows, keys in zip(parted["chunks"], chunks): by_row |= zip(rows, keys)
    found = pairs_hash(_as_pairs(by_row[i] for i in sorted(by_row)))
    return found == ev.config["pairs"], f"{len(by_row)} pairs in {len(chunks)} chunks"


# %% [markdown]
# Three stages, all pairs, and the hash agrees:

# %%
print(_finished(ev))
print(_keys(ev))


# %% [markdown]
# ## The log, and the first loss
#
# The log shows whether the training went well: a loss that jumped, steps that were skipped in fp16. So it can be tempting to cut a log where it gets ugly. But its length is known: epochs times the number of batches, and in all epochs together every pair of the chunk once an epoch. Each line also has its learning rate, which follows from the settings.

# %%
#| export
def _steps(t, ev):
    "Has the log of stage t every step and every pair?"
    stage, lines = ev.stages[t-1], _log(t, ev)
    config = ev.settings
    batches = config.epochs * math.ceil(stage["pairs"] / config.batch_size)
    pairs = config.epochs * stage["pairs"]
    found = sum(line["pairs"] for line in lines)
    made = stage["steps"] + stage["skipped"]
    told = f"{len(lines)} of {batches} steps, {found} of {pairs} pairs"
    if not (len(lines) == batches == made and found == pairs): return False, told
    before, total = _schedule(t, batches, ev)
    for n, line in enumerate(lines, 1):
        rate = learning_rate(before + line["step"] - (not line["skipped"]), total, config)
        if math.isclose(line["lr"], rate, rel_tol=1e-6, abs_tol=1e-15): continue
        return False, f"the learning rate of line {n} is {line['lr']:.3g}, by the settings {rate:.3g}"
    return True, told

def _schedule(t, batches, ev):
    "Steps before stage t, and steps of the whole schedule."
    if ev.settings.restart == "stage": return 0, batches
    sizes = map(len, _part(ev.folder, "partition.json")["chunks"])
    steps = [ev.settings.epochs * math.ceil(n / ev.settings.batch_size) for n in sizes]
    return sum(steps[:t-1]), sum(steps)


# %%
_steps(2, ev)


# %% [markdown]
# The first loss is the best witness of all. Before its first step, the policy is the model that it starts from. If that is its own reference, the loss is $\ln 2$, whatever the data. If it is not, two tables say what it must be: softplus of $\beta\,(\gamma_{ref} - \gamma_{start})$, as a mean over the first batch. Three numbers must
# then be one: what `stage.json` says, what the log says, and what the tables say.
#
# If $M_{t-1}$ has read only a part of the first batch, no table tells, and the first loss is *not checked*. Of a loss of your own ([other losses](other_losses.ipynb)) only the name is in the folder, so what it must be is *not checked*. All other numbers are checked as ever: they are those of the DPO loss.
#
# In half precision the policy and the table round in different ways. Half a nat of difference in $\gamma$ moves a loss near $\ln 2$ by $\beta/4$, and so much is allowed. So the stage, its reference and the settings must name one precision: a word in a single file would buy this allowance.

# %%
#| export
def _implied(t, ev):
    "The first loss that stage t must have, and why; None where no table here tells."
    stage, keys = ev.stages[t-1], _chunk_keys(t, ev)
    start, ref = stage["start"], stage["reference_kind"]["weights"]
    if start == ref: return math.log(2), "ln 2"
    rows = all_batches(len(keys), ev.settings, t)[0][1] if keys else []
    batch = [keys[i] for i in rows]
    for table in [ev.table(s) for s in range(t) if ev.ended(s) == start]:
        if batch and set(batch) <= set(table.rows.index): # it may have read a probe of D_t only
            return _loss_of(_as_pairs(batch), table, _reference_table(t, ev), ev.settings), "by the tables"
    return None, ""

def _loss_of(batch, table, ref, config):
    "The loss of a policy that says what the table says."
    losses = dpo_loss(table.gamma(batch), ref.gamma(batch), config.beta, config.label_smoothing)
    return losses.mean().item()

def _first_loss(t, ev):
    "Is the first loss of stage t what it must be?"
    stage, lines = ev.stages[t-1], _whole_log(t, ev)
    said, own = stage["first_loss"], ev.settings.loss
    must, why = (None, "") if own else _implied(t, ev)
    told = f"{said:.4f}; the tables here do not tell what it must be"
    if own: told = f"{said:.4f}, of a loss of its own, {own}, which is not in the folder"
    if must is not None: told = f"{said:.4f}; it must be {must:.4f}, {why}"
    if lines and not _close(said, lines[0]["loss"], 1e-6):
        return False, f"{told}; the log begins with {lines[0]['loss']:.4f}"
    named = {stage["precision"], stage["reference_kind"]["precision"], ev.settings.precision}
    if len(named) > 1: return False, f"{told}; stage, reference and settings name {', '.join(sorted(named))}"
    if must is None: return None, told
    near = NEAR * max(1, must)
    if stage["precision"] != "fp32": near += ev.settings.beta / 4
    return abs(said - must) <= near, told


# %% [markdown]
# In this run the reference moves, and each stage begins as its own reference:

# %%
for t in (1, 2, 3): print(t, *_first_loss(t, ev))


# %% [markdown]
# All three are $\ln 2$. In *Seven who cheat* there is a run in which they are not, and the tables say what they must be.
#
# ## Held-out pairs
#
# Held-out pairs are worth something only if nobody trained on them, and if none that went badly was dropped afterwards. `config.yaml` has a hash of their keys since the run began. Are the keys still the same, and are they others than those that were trained on?
#
# The comparison is by key, which is a hash of token ids. Two pairs with the same words under another name have the same key, so renaming a source hides nothing. Two prompts that differ in a blank do not have the same key; whether held-out prompts are *like* those that were trained on is a question for a reader.

# %%
#| export
def _trained_keys(ev):
    "Keys that were trained on, as far as they are known, and whether these are all."
    trained, whole = set(), True
    for t, stage in enumerate(ev.stages, 1):
        keys = _chunk_keys(t, ev)
        if not keys: whole = False
        trained |= set(keys or stage["probes"][stage["chunk"]])
    return trained, whole

def _apart(ev):
    "Are the held-out pairs those that were held out, and was none of them trained on?"
    held, said = _held_out_keys(ev), ev.config["held_out_pairs"]
    if not held and not said: return None, "no pairs are held out"
    if not held: return False, "held_out.json is missing or empty, but config.yaml has a hash of held-out pairs"
    if pairs_hash(_as_pairs(held)) != said:
        return False, "held_out.json does not name the pairs with the hash of config.yaml"
    trained, whole = _trained_keys(ev)
    both = len(trained & set(held))
    if both: return False, f"{both} of {len(held)} held-out pairs were trained on"
    known = "" if whole else ", as far as the folder tells which those are"
    return True, f"{len(held)} held out, none of them among the {len(trained)} that were trained on{known}"


# %%
_apart(ev)

# %% [markdown]
# ## What the report says
#
# The report is what people read, and it is a text file: whoever wants a better number can type one. All of it follows from other files of the folder, so it is [written once more](11_report.ipynb), without its figures, and compared line by line: the tables of stages, of the partition and of held-out pairs, the signs of failure, the settings. Only seconds and gigabytes are left out, since nothing in the folder bears on them.
#
# If `stage.json` itself is wrong, this has been said in its own row. So in the table of stages a line is right if it agrees with `stage.json` *or* with the tables: each fault is then reported once, where it is.

# %%
#| export
_NUMBER = re.compile(r"[-+]?\d+\.\d+")

def _alike(a, b):
    "Whether two lines of a report are the same, but for one in the last digit of a number."
    if _NUMBER.sub("0", a) != _NUMBER.sub("0", b): return False
    for x, y in zip(_NUMBER.findall(a), _NUMBER.findall(b)):
        digits = len(y.split(".")[1])
        if abs(float(x) - float(y)) > 1.01 * 10.0 ** -digits: return False
    return True


# %% [markdown]
# The last digit of a number may differ by one, because a report rounds. Words and the number of columns may not:

# %%
assert _alike("| gamma | 8.463 |", "| gamma | 8.464 |")
assert not _alike("| gamma | 8.463 |", "| gamma | 8.563 |")
assert not _alike("| gamma | 8.463 |", "| loss | 8.463 |")

# %% [markdown]
# What may it say? Of each line, one or two ways:

# %%
#| export
_UNKNOWN = "| time of the stages |", "| peak memory |" # begin the lines that nothing in the folder bears on

def _told_lines(text): return [line for line in text.splitlines() if line and not line.startswith(_UNKNOWN)]

def _stage_lines(stages, ev):
    table = stage_table(SimpleNamespace(stages=stages, config=ev.config))
    return as_markdown(table).splitlines()

def _by_tables(t, ev):
    "stage.json as the tables and the log would have it, as far as they can be read."
    stage, lines = ev.stages[t-1], _whole_log(t, ev)
    if lines: stage = stage | dict(first_loss=lines[0]["loss"])
    try: found = recomputed(t, ev)
    except (ValueError, KeyError): return stage
    return stage | found | dict(gamma_change=list(found["gamma_change"]))

def _ways(ev):
    "The lines of the report, in their order: of each, the ways in which it may read."
    stages = [_by_tables(t, ev) for t in range(1, len(ev.stages) + 1)]
    by_tables = dict(zip(_stage_lines(ev.stages, ev), _stage_lines(stages, ev)))
    return [(line, by_tables.get(line, line)) for line in _told_lines(report_text(Run(ev.folder)))]


# %%
ways = _ways(ev)
print(len(ways), "lines, one of them:")
print(next(line for line, _ in ways if line.startswith("| accuracy of M_t on D_t |")))


# %% [markdown]
# Each line of the report must be one of these, and they must stand in this order. Otherwise a right line at the end would excuse a wrong one at the top, and what is true of the stage before could be shown as true against S. A line that is not there is no fault, since a report may be shortened. But then the report is *not checked*. So is one that another version of this package wrote, where it has other words.

# %%
#| export
def _report(ev):
    "Does report.md say what the rest of the folder says?"
    path = ev.folder / "report.md"
    if not path.exists(): return None, "report.md is not here"
    if not all(_whole_log(t, ev) for t in range(1, len(ev.stages) + 1)): return None, "a log is not whole"
    ways, said = _ways(ev), _told_lines(path.read_text(encoding="utf-8"))
    rest = iter(ways)
    for line in said:
        if any(_alike(line, way) for of_line in rest for way in of_line): continue # it goes on after this line
        theirs, mine = (what["sdpo_nb"].split(" at ")[0] for what in (ev.config["versions"], versions()))
        if theirs != mine: return None, f"it was written by sdpo_nb {theirs}, and {mine} would write something else"
        return False, f"this line, or its place, does not follow from the folder: {line[:60]}"
    return (True if len(said) == len(ways) else None), f"{len(said)} of {len(ways)} lines"


# %% [markdown]
# Somebody types 0.999 for the accuracy of stage 1. Somebody puts such a line above the right one, with one column more. Somebody names another reference. And somebody takes the signs of failure away, or what stands in their place. Which of them did you expect to be the hardest to find? (The report is put back at the end of the cell.)

# %%
report = run.folder / "report.md"
honest = report.read_text()
assert _report(ev)[0]

def edited(old, new):
    "What is said of the report, once somebody typed something else."
    assert old in honest
    report.write_text(honest.replace(old, new, 1))
    return _report(ev)

right = next(line for line in honest.splitlines() if line.startswith("| accuracy of M_t on D_t |"))
signs = honest.split("## Signs of failure\n\n")[1].split("\n\n")[0]
edits = {
    "typed": edited(right, right.replace("0.909", "0.999")),
    "above the right one": edited(right, right.replace("0.909", "0.999") + "  |\n" + right),
    "another reference": edited("| reference | M_0 | M_1", "| reference | M_0 | M_0"),
    "other signs": edited(signs, "- none that matters"),
    "shortened": edited(signs + "\n\n", ""),
}
report.write_text(honest)
results = {name: (_ANSWERS[right], note) for name, (right, note) in edits.items()}
assert [result for result, _ in results.values()] == 4 * [DIFFERS] + [NOT_CHECKED]
pd.DataFrame(results, index=["result", "note"]).T


# %% [markdown]
# ## Weights, where they are
#
# Everything so far was read from files of a few kilobytes. Where the models lie in the folder too, their hashes can be compared with what the stages claim. `load_stage` does that whenever it loads a model, so nothing new is needed.
#
# One complication: a model may have been saved in half precision, to save space. Then what lies there is not what the stage ended with, but its rounded copy, and the stage has written down the hash of that as well.
#
# Weights alone are not a model. Its config says how they are used, and its tokenizer what is read. Each table holds a hash of the config, and every stage hands on the same tokenizer. S may lie outside of the folder. If another model lies where the run found it, this is your computer and not that of the run, so it is *not checked*.

# %%
#| export
def _weights(t, ev):
    "Are the weights that lie in the folder those of M_t?"
    where, saved = _path_of(t, ev), _saved(t, ev)
    rounded = saved["dtype"] != "float32"
    if saved["weights"] != ev.ended(t) and not rounded:
        return False, f"the stage ended with {ev.ended(t)}, but saved {saved['weights']}"
    if where is None: return None, "the weights are not here"
    if t and is_adapter(where) != bool(ev.settings.lora_r):
        what = "an adapter" if is_adapter(where) else "a whole model"
        return False, f"lora_r is {ev.settings.lora_r}, and {what} lies there"
    if _lacks_base(where, ev): return None, "S is not here, on which its adapter belongs"
    if t:
        model = load_stage(ev.at(t), "cpu") # raises ValueError for others
        other = _other_use(t, model, where, ev)
        return not other, other or saved["weights"] + (", rounded" if rounded else "")
    found = weights_hash(load_model(where, "cpu"))
    told = f"S has {ev.ended(0)}, the model that lies there {found}"
    if found == ev.ended(0) or Path(where).parent == ev.at(0): return found == ev.ended(0), told
    return None, f"S has {ev.ended(0)}; in {Path(where).resolve()} lies a model with {found}"

def _other_use(t, model, where, ev):
    "In words, where the weights of M_t are right, and what says how they are used is not."
    same_library = ev.config["versions"].get("transformers") == versions()["transformers"]
    config = table_kind(model, "fp32", response_logprobs)["config"]
    if same_library and config != ev.table(t).kind["config"]:
        return "its config.json is not the one with which its table was made"
    first = _path_of(1, ev)
    if first is None: return None
    mine, its = map(load_saved_tokenizer, (where, first))
    if mine.get_vocab() != its.get_vocab() or mine.chat_template != its.chat_template:
        return "its tokenizer, or the chat template, is not that of M_1"

def _saved(t, ev):
    "dtype and hash of M_t as it was saved, perhaps rounded; S is saved by others."
    return saved_as(ev.stages[t-1] if t else dict(end=ev.ended(0)))

def _path_of(t, ev):
    "Where M_t lies, or None. S may lie outside of the folder; a hub id is not followed."
    if (ev.at(t) / "model").exists(): return str(ev.at(t) / "model")
    elsewhere = Path(ev.config["model"]).expanduser()
    if t == 0 and (elsewhere / "config.json").exists(): return str(elsewhere)
    return None

def _has_S(ev):
    "Whether S lies where the run found it."
    where = _path_of(0, ev)
    return where is not None and weights_hash(load_model(where, "cpu")) == ev.ended(0)

def _lacks_base(where, ev):
    "Whether an adapter lies there, and S does not."
    return is_adapter(where) and not _has_S(ev)


# %%
for t in (0, 3): print(f"M_{t}:", *_weights(t, ev))


# %% [markdown]
# A model may also come beside the folder, from the hub for example. Which model of the run is it? A name would be one more claim, so its hash is compared with that of each model:

# %%
#| export
def _which(model, ev):
    "The number of a model of this run, by its weights; None for another model."
    if weights_hash(model) == ev.ended(0): return 0
    for t in range(1, len(ev.stages) + 1):
        saved = _saved(t, ev)
        if weights_hash(model, getattr(torch, saved["dtype"])) == saved["weights"]: return t

def _given(ev):
    "Is the model that came beside the folder one of this run?"
    ev.given_is = _which(load_any(ev.given, "cpu"), ev)
    if ev.given_is is None: return False, f"{ev.given} has the weights of no model of this run"
    return True, f"it is M_{ev.given_is}"


# %% [markdown]
# We give the model of stage 2, and do not say which it is:

# %%
ev.given = str(run.model_folder(2))
print(_given(ev))
ev = read_evidence(run.folder)


# %% [markdown]
# ## With the data
#
# Tables have keys, not texts. Which pairs stand behind the keys? A key is a hash of the token ids of a pair, so whoever has the data and the tokenizer computes the keys again. Split, columns and the other options of a source are taken from `config.yaml`; only where the data lie has to be said. The options of a held-out source of its own are not taken from there: give it with them, as the run had it.

# %%
#| export
def _read_data(
    ev: Evidence,  # gets the sources
    sources: dict, # name -> where the data lie now
    tokenizer,     # of any model of the run
):
    "Read the sources again. Raises ValueError for a name that the run does not know, and for a missing one."
    check_names(sources)
    written = ev.config["sources"]
    apart = [name for name in _part(ev.folder, "held_out.json") if name not in written]
    _check_sources(sources, written, apart)

    train = {name: _as_written(written[name], sources[name]) for name in written}
    if train:
        read = load_sources(train, tokenizer, ev.settings)
        read, ev.held = part_sources(read, train, ev.settings)
        ev.loaded = check_chunks(ev.settings.chunks, read)
    own = {name: sources[name] for name in apart if name in sources}
    if own: ev.held += load_sources(own, tokenizer, ev.settings, "held_out")

def _check_sources(sources, written, apart):
    known = [*written, *apart]
    for name in sources:
        if name in known: continue
        raise ValueError(f"sources: this run has no source '{name}'; it has {', '.join(known) or 'none'}")
    for name in written:
        if name not in sources: raise ValueError(f"sources: '{name}' is missing; give {', '.join(written)}")

def _as_written(written, data):
    "What `load_sources` takes: the options that the run had, and the place that is given now."
    new = data if isinstance(data, dict) else dict(source=data)
    return (written if isinstance(written, dict) else {}) | new


# %% [markdown]
# Sources under their old names, and one name too many:

# %%
tok = load_tokenizer(w.base)
_read_data(ev, w.sources, tok)
print(ev.loaded[0].counts["rows"], "rows, as the run had them:", run.config["sources"]["primer"]["max_pairs"])
print(complaint(_read_data, ev, dict(riddles="a.jsonl"), tok))


# %% [markdown]
# Only paths were given; that sixty rows of each source count came from `config.yaml`. Now: are these the pairs, were these held out, and do the [chunks](05_partition.ipynb) follow from what S said about them?

# %%
#| export
def _pairs(ev):
    "Are these the pairs that were trained on?"
    found = pairs_hash(*(source.pairs for source in ev.loaded))
    n = sum(map(len, ev.loaded))
    if found == ev.config["pairs"]: return True, f"{n} pairs, {found}"
    return False, f"{n} pairs with the hash {found}; the run had {ev.config['pairs']}"

def _same_lengths(ev):
    "Whether held_out.json says how many tokens the held-out responses have, as far as it says it."
    tokens = {}
    for pairs in (source.pairs for source in ev.held):
        lengths = zip(map(len, pairs["chosen_ids"]), map(len, pairs["rejected_ids"]))
        tokens |= zip(keys_of(pairs), lengths)
    for part in _part(ev.folder, "held_out.json").values():
        if "lengths" not in part or not set(part["keys"]) <= set(tokens): continue
        said = list(zip(part["lengths"]["chosen"], part["lengths"]["rejected"]))
        if said != [tokens[key] for key in part["keys"]]: return False
    return True

def _held_out_pairs(ev):
    "Are these the pairs that were held out, of the sources that are given?"
    said = _part(ev.folder, "held_out.json")
    given = [*ev.config["sources"], *(source.name for source in ev.held)]
    absent = [name for name in said if name not in given] # held-out sources of their own
    held = {name: part["keys"] for name, part in said.items() if name in given}
    found = {source.name: keys_of(source.pairs) for source in ev.held}
    wrong = [name for name in held | found if held.get(name) != found.get(name)]
    if wrong: return False, f"other pairs than those that were held out, or in another order: {', '.join(wrong)}"
    if not _same_lengths(ev): return False, "held_out.json gives responses another length"
    n = sum(map(len, held.values()))
    if absent: return None, f"{n} pairs; {', '.join(absent)}: not given"
    return True, f"{n} pairs"

def _partition(ev):
    "Do the chunks, and what was measured of each source, follow from what S said about the pairs?"
    config, there = ev.settings, _part(ev.folder, "partition.json")
    mine = partition_of(ev.loaded, ev.table(0), config)
    if mine.names != there["names"]: return False, f"the order would be {', '.join(mine.names)}"
    if mine.chunks != there["chunks"]: return False, "the chunks would hold other pairs"
    rows = mine.measures.to_dict("records")
    if len(rows) != len(there["measures"]): return False, "partition.json measures another number of sources"
    for row, said in zip(rows, there["measures"]):
        wrong = [name for name in row if not _same(said.get(name), row[name])]
        if wrong: return False, f"{wrong[0]} of {row['source']} is {said.get(wrong[0])}, by the table {row[wrong[0]]}"
    return True, f"{config.order}: {', '.join(mine.names)}"

def _same(a, b): return a == b if isinstance(b, str) else _close(a, b)


# %% [markdown]
# The third of these is the interesting one. From the table of S and the settings it computes the partition once more: which source is easiest, and which rows make each chunk. A partition that was made by hand, to look better, is found here, and so is an accuracy of S that was.

# %%
for ask in (_pairs, _held_out_pairs, _partition): print(*ask(ev))

# %% [markdown]
# ## With data and weights
#
# One question is left, and it is the one that matters most. The tables are numbers in a file. Did *these models* say them? Somebody who makes up a table, computes everything else from it and writes it all down is consistent, and everything above says ok.
#
# Ask the model about thirty-two pairs, drawn anew at each call. How likely is it that a made-up table is found? Guess first, for a table in which a tenth of the pairs is changed, and for one with a single changed pair of 180. None of 32 draws hits a tenth in $0.9^{32}$, so it is found in 97 % of the calls. The single pair is found in $32/180$, 18 %. So a table that gains ten points of accuracy is found almost surely, and one pair turned around is not; `verify` can be called again.
#
# They are read in fp32, padded, in the way of [chapter 02](02_logprobs.ipynb), which has the fewest tricks. The numbers must agree to a thousandth of a nat, and a hundred-thousandth of themselves; where the table or the model on disk is in half precision, to half a nat. (That is a constant, and [rounding grows with the length](06_trainer.ipynb) of a response. Of long ones in half precision a row may differ for no other reason.)

# %%
#| export
ROWS = 32 # that a model is asked about again

def _known_pairs(ev):
    "Key -> (Dataset, row), of all pairs that can be read."
    sets = [source.pairs for source in ev.loaded + ev.held]
    made = [ev.at(t) / "chunk" for t in range(1, len(ev.stages) + 1)]
    sets += [load_from_disk(str(path)) for path in made if path.exists()]
    return {key: (pairs, i) for pairs in sets for i, key in enumerate(keys_of(pairs))}

def _load(t, ev):
    "M_t as exactly as it is there, or None. Raises ValueError where another model lies in its place."
    if ev.given and ev.given_is == t: return load_any(ev.given, "cpu")
    where = _path_of(t, ev)
    if where is None or _lacks_base(where, ev): return None
    if t: return load_exactly(ev.at(t), "cpu")
    model = load_model(where, "cpu")
    if weights_hash(model) != ev.ended(0): raise ValueError(f"{where}: is not S")
    return model

def _again(t, ev, known, seed):
    "Does M_t say again what its table says?"
    try: model = _load(t, ev)
    except ValueError: return None, "other weights lie in its place"
    if model is None: return None, "its weights are not here"
    table = ev.table(t)
    keys = sorted(set(table.rows.index) & set(known))
    if not keys: return None, "its table has none of these pairs"
    drawn = random.Random(seed).sample(keys, min(ROWS, len(keys)))
    pairs = []
    for source, i in map(known.get, drawn): pairs.append(source[i])
    mine = score_pairs(model, pairs).rows.loc[drawn]

    off = (mine - table.rows.loc[drawn]).abs()
    exact = table.kind["precision"] == "fp32" and weights_hash(model) == ev.ended(t)
    allowed = 1e-3 + 1e-5 * mine.abs() if exact else 0.5
    told = f"{len(drawn)} pairs, at most {off.max(axis=None):.1g} nats apart"
    return bool((off <= allowed).all(axis=None)), told


# %% [markdown]
# Four models, 32 pairs each:

# %%
known = _known_pairs(ev)
for t in range(4): print(f"M_{t}", *_again(t, ev, known, seed=0))


# %% [markdown]
# They agree far better than a thousandth of a nat. And a table that is made up? Suppose that somebody adds two nats to each chosen response of $M_3$:

# %%
class Wishful(Evidence):
    "Tables in which every model likes the chosen responses more."
    def table(self, t):
        table = super().table(t)
        return LogprobTable(table.kind, table.rows + dict(chosen=2, rejected=0))

wishful = Wishful(**vars(ev))
_again(3, wishful, known, seed=0)

# %% [markdown]
# ## Handing in
#
# The folder of a real run is large because of its weights. Without them it is small enough for an upload form. `pack_run` leaves out models and checkpoints, and adds a list of the sha256 of every file, so that a file that was lost or changed on the way is found.
#
# It refuses a folder in which a run is going on: half of one stage and half of the next would be packed, and every check would object. A run in which no stage is finished is refused too, because there is nothing to check. The zip is written under another name and renamed at the end, so a zip that is there is whole.

# %%
#| export
LEFT_OUT = {"model", "checkpoint"} # folders that hold weights

MANIFEST = "MANIFEST.json"

def _files(folder):
    "Every file that is handed in, by its name inside the folder."
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder)
        weights = LEFT_OUT & set(name.parts[:-1])
        # .db: every request of `sdpo eval`, kept to go on; the scores lie beside it
        passing = name.name.startswith(".") or name.name == MANIFEST or name.suffix in (".zip", ".db")
        unfinished = any(part.endswith(".tmp") for part in name.parts) # what a kill left, weights among it
        if path.is_file() and not weights and not passing and not unfinished: found[name.as_posix()] = path
    return found

def _sha256(path): return hashlib.sha256(path.read_bytes()).hexdigest()

def pack_run(
    folder,   # of a run
    out=None, # the zip; default: beside the folder, with its name
) -> Path:    # the zip
    """A run without its weights, as one file, with the hash of each file in MANIFEST.json.

    Raises ValueError where no stage is finished, or where a run is going on.
    """
    folder = Path(folder).expanduser().resolve()
    read_evidence(folder)
    out = Path(out).expanduser() if out else folder.with_name(f"{folder.name}.zip")
    if out.suffix != ".zip" or out.is_dir():
        raise ValueError(f"{out}: must be the name of a file that ends in .zip")
    with alone_in(folder), replacing(out) as tmp:
        files = _files(folder)
        hashes = {name: _sha256(path) for name, path in files.items()}
        manifest = dict(sdpo_nb=versions()["sdpo_nb"], files=hashes)
        with zipfile.ZipFile(tmp, "w", zipfile.ZIP_DEFLATED) as z:
            for name, path in files.items(): z.write(path, f"{folder.name}/{name}")
            z.writestr(f"{folder.name}/{MANIFEST}", json.dumps(manifest, indent=1) + "\n")
    return out

def _manifest(ev):
    "Are the files those that were packed?"
    path = ev.folder / MANIFEST
    if not path.exists(): return None, f"no {MANIFEST}: this was not made by sdpo pack"
    said = json.loads(path.read_text(encoding="utf-8"))["files"]
    there = {name: _sha256(path) for name, path in _files(ev.folder).items()}
    wrong = [name for name in said | there if said.get(name) != there.get(name)]
    if wrong: return False, f"changed, missing or new: {', '.join(sorted(wrong)[:5])}"
    return True, f"{len(said)} files"


# %% [markdown]
# What it saves, for this small model. What is left depends on the number of pairs and not on that of the parameters. A model of 135 million parameters has 0.5 GB a stage, and its tables are as small as these.

# %%
packed = pack_run(run.folder)
whole = sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file())
print(f"{whole / 1e6:.1f} MB with weights, {packed.stat().st_size / 1e6:.2f} MB without")

# %% [markdown]
# What is handed in may be a folder or a zip, and a zip may be cut or no zip at all.

# %%
#| export
MOST_BYTES = 8 << 30 # of a zip, unpacked

@contextmanager
def _opened(where):
    "The run folder of a folder or a zip. Raises ValueError for what is neither."
    where = Path(where).expanduser()
    if where.is_dir():
        yield where
        return
    if not where.exists(): raise ValueError(f"{where}: no such folder or file")
    with tempfile.TemporaryDirectory() as tmp:
        _unpack(where, tmp)
        found = sorted(Path(tmp).rglob("config.yaml"), key=lambda path: len(path.parts))
        if not found: raise ValueError(f"{where}: no config.yaml in it, so it is not a run")
        yield found[0].parent

def _unpack(where, folder):
    try:
        with zipfile.ZipFile(where) as z:
            size = sum(file.file_size for file in z.infolist())
            if size > MOST_BYTES:
                size = f"{size / 1e9:.0f} GB"
                raise ValueError(f"{where}: {size} when unpacked; unpack it, and give the folder")
            z.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as e:
        raise ValueError(f"{where}: is no zip, or was cut or damaged on the way ({e}); "
                         "it must be handed in again") from e


# %% [markdown]
# The zip is unpacked into a temporary folder, and a limit on its unpacked size keeps a small file from filling the disk. An upload that was cut off:

# %%
half = tmp / "half.zip"
half.write_bytes(packed.read_bytes()[:100_000])
print(complaint(_opened(half).__enter__).replace(str(tmp), "."))

# %% [markdown]
# ## All of it
#
# The rows in their order: first what is true of the whole folder, then the same seven questions for each stage, then what needs the data. `STAGE_CHECKS` is the list to add to when a stage makes a new claim. Where the pairs turn out to be others than those of the run, the rest is not asked: every answer would be about the wrong pairs.

# %%
#| export
STAGE_CHECKS = { # name -> (t, evidence) -> right, note
    "reference": _reference,
    "start": _start,
    "table": _table,
    "numbers": _numbers,
    "log": _steps,
    "first loss": _first_loss,
    "weights": _weights,
}

def _rows_of_run(ev):
    "What the folder alone can tell."
    yield _row("manifest", _manifest, ev)
    yield _row("stages", _finished, ev)
    yield _row("pairs", _keys, ev)
    yield _row("S: table", _table, 0, ev)
    yield _row("S: weights", _weights, 0, ev)
    for t in range(1, len(ev.stages) + 1):
        for name, ask in STAGE_CHECKS.items(): yield _row(f"stage {t}: {name}", ask, t, ev)
    yield _row("held-out pairs", _apart, ev)
    yield _row("report.md", _report, ev)
    if ev.given: yield _row("the model given", _given, ev)

def _rows_of_data(ev, seed):
    "What needs the pairs, and perhaps weights."
    if ev.loaded:
        same = _row("data: pairs", _pairs, ev)
        yield same
        if same["result"] != OK: return # whatever else is asked would be asked about other pairs
        yield _row("data: partition", _partition, ev)
    if ev.held: yield _row("data: held-out pairs", _held_out_pairs, ev)
    try: known = _known_pairs(ev)
    except (ValueError, OSError) as e:
        result = NOT_CHECKED if isinstance(e, PermissionError) else DIFFERS
        yield dict(check="data", result=result, note=str(e).split("\n")[0])
        return
    if not known:
        yield _row("data", lambda: (None, "the pairs are not here; give the sources"))
        return
    for t in range(len(ev.stages) + 1): yield _row(f"M_{t} asked again", _again, t, ev, known, seed)

def _tokenizer(ev):
    "That which the stages saved, of the model given, or of S; the run may have had another one than S."
    places = [*(_path_of(t, ev) for t in range(1, len(ev.stages) + 1)), ev.given]
    if not any(places) and _has_S(ev): places.append(_path_of(0, ev))
    for place in filter(None, places): return load_saved_tokenizer(place)
    raise ValueError("sources: reading them needs a tokenizer, and no model lies in the folder; "
                     "give a model of this run")


# %%
rows = pd.DataFrame(_rows_of_run(ev))
print(len(rows), "rows:", rows["result"].value_counts().to_dict())


# %% [markdown]
# `verify` is what people call. It opens the folder or the zip, reads the data where they are given, and makes a table of the rows. It raises for what is no run, and where `config.yaml`, `partition.json` or a `stage.json` cannot be read: without them there is nothing to ask. All else is an answer, and not an error.

# %%
#| export
def verify(
    where,             # a run: its folder, or the zip of `pack_run`
    sources: dict=None, # name -> where the data lie; the options of a source are those of the run
    model: str=None,   # folder or hub id of any model of the run, or none
    seed: int=None,    # of the pairs that models are asked about again; none: drawn anew
) -> pd.DataFrame:     # check: the index; result: ok, DIFFERS or not checked; note
    """Check that what a run says follows from its folder, and from data and weights as far as they are there.

    Raises ValueError for what is no run, for a source that the run does not know, and where one is missing.
    """
    if model: load_saved_tokenizer(model) # raises where there is no such model
    with _opened(where) as folder:
        try: ev = read_evidence(folder)
        except ValueError as e: raise ValueError(str(e).replace(str(folder), str(where))) from e
        ev.given = model
        if sources: _read_data(ev, sources, _tokenizer(ev))
        rows = [*_rows_of_run(ev), *_rows_of_data(ev, seed)]
        for row in rows: row["note"] = row["note"].replace(f"{folder}/", "")
    return pd.DataFrame(rows).set_index("check")


# %% [markdown]
# A good run, with data and weights:

# %%
good = verify(run.folder, sources, seed=0)
assert not (good["result"] == DIFFERS).any()
good

# %% [markdown]
# The same run as it was handed in. No weights are in the zip and no data beside it, and each question that needs them says so. (S lies where the run says; on another computer it would not be there.)

# %%
handed_in = verify(packed)
assert not (handed_in["result"] == DIFFERS).any()
handed_in[handed_in["result"] == NOT_CHECKED]


# %% [markdown]
# ## Seven who cheat
#
# A check that never objects is worth nothing. So make seven copies, and tamper with each in one way. Six are of this run. One claims an accuracy of 0.95, and writes the report anew, so that the two agree. One puts S in the place of $M_3$. One leaves out the last line of a log. One turns a single pair around in a table. One leaves the wrong pairs of stage 2 out of its probe, and computes all numbers anew. One takes the list of held-out pairs away, and has a report that does not mention them. Which row will find it? Before you look: some of these change several files. Is each found exactly once?

# %%
def wrote(folder, t, **changes):
    "Change what a stage says about itself."
    path = folder / f"stage-{t}/stage.json"
    write_json(path, read_part(path) | changes)

def better_accuracy(folder):
    wrote(folder, 2, accuracy=0.95)
    Run(folder).report() # and the report is written again

def foreign_weights(folder):
    shutil.rmtree(folder / "stage-3/model")
    shutil.copytree(w.base, folder / "stage-3/model")

def cut_log(folder):
    path = folder / "stage-2/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))

def better_pair(folder):
    "The worst pair of the last chunk changes sides in the table of M_3."
    table = read_table(folder / "stage-3/logprobs")
    last = read_part(folder / "stage-3/stage.json")
    gamma = table.gamma(_as_pairs(last["probes"]["riddle"]))
    worst = last["probes"]["riddle"][gamma.argmin()]
    for path in (folder / "stage-3/logprobs").glob("*.parquet"):
        rows = pd.read_parquet(path)
        if worst not in rows.index: continue
        rows.loc[worst, ["chosen", "rejected"]] = rows.loc[worst, ["rejected", "chosen"]].to_numpy()
        rows.to_parquet(path, write_page_checksum=True)


# %%
def picked_probe(folder):
    "Only the pairs that M_2 gets right are left in the probe of stage 2."
    probes = read_part(folder / "stage-2/stage.json")["probes"]
    gamma = read_table(folder / "stage-2/logprobs").gamma(_as_pairs(probes["digest"]))
    right = [key for key, value in zip(probes["digest"], gamma.tolist()) if value > 0]
    wrote(folder, 2, probes=probes | dict(digest=right))
    wrote(folder, 2, **recomputed(2, read_evidence(folder)))
    Run(folder).report()

def left_out(folder):
    (folder / "held_out.json").unlink()
    Run(folder).report()


# %% [markdown]
# The seventh is a run of two stages that had S as its reference in both, and says that its reference moved. It changes the setting, and the name of the reference in each stage:

# %%
fixed = StepwiseConfig(**settings, reference="fixed")
two = {name: sources[name] for name in ("primer", "digest")}
sdpo(w.base, two, fixed, tmp / "fixed")

def says_it_moved(folder):
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("reference: fixed", "reference: moving"))
    for t in (1, 2): wrote(folder, t, reference=f"M_{t-1}")
    Run(folder).report()


# %% [markdown]
# In this run stage 2 begins at $M_1$ and is measured against S, so its first loss is not $\ln 2$. The tables of both models say what it must be, and the log agrees:

# %%
other = read_evidence(tmp / "fixed")
for t in (1, 2): print(t, *_first_loss(t, other))


# %% [markdown]
# Each cheat works on a copy, and we keep the rows that differ.

# %%
def differs(cheat, start="run"):
    "What is found in a copy of a run, after somebody tampered with it."
    copy = tmp / cheat.__name__
    shutil.copytree(tmp / start, copy)
    cheat(copy)
    found = verify(copy)
    return found[found["result"] == DIFFERS].reset_index()

cheats = better_accuracy, foreign_weights, cut_log, better_pair, picked_probe, left_out
found = {cheat.__name__: differs(cheat) for cheat in cheats}
found["says_it_moved"] = differs(says_it_moved, "fixed")

# %%
for name, rows in found.items(): assert len(rows) == 1, name
pd.concat(found, names=["who", None]).droplevel(1)[["check", "note"]]

# %% [markdown]
# Each is found once. Look at the fourth: one pair is turned around, and five of the ten numbers of the stage move. And look at what did *not* fire for the last: its numbers are right, since they were computed from the table that the stage really had. Only its story is wrong, and the hash of the reference tells.
#
# ## What this does not show
#
# - *That the numbers mean something.* They follow from the tables. Whether the comparison is fair is a question for a reader.
# - *Anything about weights that are not there.* Without them, a student with patience can make up tables that are consistent with each other. So ask for the weights of the last stage, or a hub id, and give the data too: `model=` then finds out whether they are $M_T$, and asks them.
# - *What no table holds.* The losses of the log after the first, the answers, which rows were dropped, the figures, seconds and gigabytes. The report agrees with the files in which they stand, and nothing bears on these files.
# - *Settings that leave no trace.* `clip`, `label_smoothing` where a stage starts as its own reference, rank and layers of adapters, and how it was computed: packing, budget, checkpoints. `max_length` and `eval_share` need the data.
# - *A tokenizer that is wrong in all stages alike*, without the data. With them, the pairs would have other keys.
# - *Whether a rounded copy is that of $M_t$.* Where models are saved in half precision, the hash of the copy is one more claim: it cannot be computed from the hash of $M_t$. Only asking it again, with the data, tells them apart, and only as far as rounding allows.
# - *The table of a reference from elsewhere.* It is found by its hash, but its model is not asked again.
# - *Numbers of a table from another device.* They are not compared, and one word in `kind.json` says so. Read the rows that are *not checked* as carefully as those that differ.
# - *How the weights were made.* A hash says that two files are the same, not that gradient descent led from one to the other. Training again is the only proof, and [on the same machine](14_stepwise.ipynb) it gives the same bits.
# - *Who changed a file.* The manifest finds accidents. Somebody who can edit a file can write its new hash as well.

# %%
#| hide
shutil.rmtree(tmp)

# %% [markdown]
# ## What you now have
#
# `pack_run` makes of a run one small file. `verify` asks it every question that can be asked, and says of each: ok, DIFFERS, or not checked. On the command line they are [`sdpo pack` and `sdpo verify`](18_cli.ipynb).
#
# ## Questions to test yourself
#
# 1. Why is the table of the reference found by its hash, and not by the setting `reference`?
#
# <details><summary>Answer</summary>
#
# The setting is one of the claims. If the table were chosen by it, a run that lies about its reference would get other numbers in every row, and the reader would have to guess what the one fault is. By the hash, the numbers are checked against what was really used, and the setting is checked alone.
#
# </details>
#
# 2. Somebody changes `end` of stage 1 to the hash of another model. Which rows differ?
#
# <details><summary>Answer</summary>
#
# Four: the table of $M_1$ has another hash, the weights on disk have another one, stage 2 started from a model that is now "not of this run", and so is its reference. A hash stands in the middle of the chain, and everything that is tied to it speaks.
#
# </details>
#
# 3. Why are the 32 pairs drawn anew at each call?
#
# <details><summary>Answer</summary>
#
# If they were always the same, it would be enough to have the right numbers for these 32.
#
# </details>
#
# ## Try this
#
# Before the last cell removes the folders, take a line out of the middle of `stage-1/metrics.jsonl` instead of the last one, and copy another line into its place, so that their number is right again. Which row of `verify` finds it?
#
# <details><summary>What you should see</summary>
#
# Row `stage 1: numbers`: "gamma_ref of the log is not that of these pairs in this order". The number of steps is right. If the copy is that of the short last batch, `stage 1: log` finds it as well, since the pairs do not add up. And `report.md` says how many tokens were read in training, which is now another number.
#
# </details>
