# %% [markdown]
# # What a run says
# > A finished folder becomes tables, figures and a report for its reader; and a model with a card, to give away.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/11_report.ipynb)
#
# **You should know** that [a run is a folder](10_folder.ipynb) and what is [measured on pairs](08_evaluate.ipynb). If you came to learn what stepwise DPO does, read [14](14_stepwise.ipynb) first.
# **Time** an hour to read with its code, a minute to run. If you have a report of your own before you, half an hour: read the text and the tables, and skip the cells that begin with `#| export`.
#
# When a run has ended, its reader has one question: *is the last model better than the one I began with?* Then come the smaller ones: which stage did it, what did it cost, can I trust it, can I run it
# again? The report answers in that order, and this chapter goes through it from top to bottom. Of each part it says what it is for, what a healthy value is, and what should worry you. Then come the few lines that make it.
#
# Nothing here computes with a model. So a report can be made again in seconds, also on a laptop to which you copied the folder without its models.

# %%
#| default_exp report

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
import base64, re, shutil, tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData

from sdpo_nb.evaluate import FALSE_ALARMS, as_text, failure_signs, held_out
from sdpo_nb.figures import plot_change, plot_drift, plot_loss, plot_partition
from sdpo_nb.folder import (
    cure_of, finished_stages, folder_of, load_saved_tokenizer, load_stage, naming, read_part, stage_folders, write_model
)
from sdpo_nb.logprobs import read_table, replacing, stored_dtype
from sdpo_nb.lora import is_adapter
from sdpo_nb.partition import wilson

# %%
import math

from IPython.display import Markdown

from sdpo_nb.stepwise import StepwiseConfig, sdpo
from sdpo_nb.world import complaint, load_world

torch.set_num_threads(1)
pd.set_option("display.width", 180, "display.max_columns", 20)

# %% [markdown]
# ## Three runs
#
# To have something to read, we borrow the call of [chapter 14](14_stepwise.ipynb), and train three times in the tiny world, each time in three stages, one per source of pairs. The first run has usual settings. The second has
# thirty times its learning rate. The third has 30 pairs of each source, holds out more of them, and reads the rest ten times, at three times the learning rate. A share of the prompts of each source is *held out*: never trained on, and read by every model.

# %%
w, tmp = load_world(), Path(tempfile.mkdtemp())
usual = dict(beta=0.3, lr=1e-4, epochs=2, precision="fp32", eval_share=0.1)
run = sdpo(w.base, w.sources, StepwiseConfig(**usual), tmp / "run")

# %%
hot = sdpo(w.base, w.sources, StepwiseConfig(**usual | dict(lr=3e-3)), tmp / "hot")

few = {name: dict(source=file, max_pairs=30) for name, file in w.sources.items()}
often = dict(lr=3e-4, epochs=10, eval_share=0.4)
by_heart = sdpo(w.base, few, StepwiseConfig(**usual | often), tmp / "by-heart")

# %% [markdown]
# Each folder now holds a `report.md`. After a line or two, the page of the first run shows this table. Which numbers say that the model after stage 3 is better than S?

# %%
page = (run.folder / "report.md").read_text()
begin, end = page.index("| model | gamma"), page.index("### Against the stage before")
Markdown(page[begin:end])


# %% [markdown]
# Look at *change of gamma* in the three rows "after stage 3": +3.7, +3.9 and +3.4 nats, and none of the intervals comes near zero. That is the answer. What the other columns are for comes below; before, we need the folder.
#
# ## A folder, read
#
# `Run` gives the files of a folder names. It keeps nothing in memory: each property reads its file when you ask. Its last methods are what you will type; most hand over to a function of this chapter, where it is explained.

# %%
#| export
@dataclass
class Run:
    "A run folder, read."
    folder: Path # config.yaml lies in it

    def __post_init__(self):
        self.folder = Path(self.folder).expanduser()

    @property
    def config(self) -> dict: # config.yaml: model, weights, sources, settings, versions, ...
        "What the run is made of. Raises ValueError where this is missing or damaged, as all of these do."
        return read_part(self.folder / "config.yaml")

    @property
    def stages(self) -> list[dict]: # stage.json of each finished stage
        "What is written down about each stage. Raises ValueError for a gap between them."
        return [read_part(folder / "stage.json") for folder in stage_folders(self.folder)]

    @property
    def metrics(self) -> pd.DataFrame: # one row per optimizer step of a finished stage, taken or skipped
        "The logs of all stages. Raises ValueError where no stage is finished, or a log lacks steps."
        self.model_folder() # there must be one
        steps = [_steps(folder).assign(stage=t) for t, folder in enumerate(stage_folders(self.folder), 1)]
        return pd.concat(steps, ignore_index=True)

    @property
    def model(self): # of the last finished stage, as transformers loads it
        "Loaded anew each time. Raises ValueError where another model lies in its place."
        return load_stage(self.model_folder().parent)

    @property
    def tokenizer(self): # of transformers
        "That which was saved with the model of the last finished stage."
        return load_saved_tokenizer(self.model_folder())

    def model_folder(
        self,
        t: int=None, # of M_t; 0: S, perhaps a hub id; none: of the last finished stage
    ) -> Path:
        "Where a model lies, as `from_pretrained` reads it. Raises ValueError where no stage is finished."
        if t == 0:
            named, kept = Path(self.config["model"]), self.folder / "base" / "model"
            loaded = named.parts[-2:] == ("base", "model") # it lies in the run, which may have been moved
            return kept if loaded and kept.exists() else named
        finished = finished_stages(self.folder)
        if t is None and not finished:
            raise ValueError(f"{self.folder}: no stage is finished, so there is no model yet")
        if t and t not in finished: raise ValueError(f"{self.folder}: stage {t} is not finished")
        return folder_of(self.folder, t or finished[-1]) / "model"

    def partition(self) -> pd.DataFrame:
        "What was measured of each source under S, in the order of training."
        path = self.folder / "partition.json"
        if not path.exists():
            raise ValueError(f"{path}: there is none: S has not read all pairs yet, or chunks is a function")
        return pd.DataFrame(read_part(path)["measures"]).set_index("source")

    def held_out(self) -> pd.DataFrame: return held_out_table(self)
    def table(self) -> pd.DataFrame: return stage_table(self)
    def signs(self) -> list[str]: return failure_signs(gamma_table(self), self.metrics, _from_S(self))
    def report(self): return write_report(self)
    def export(self, folder) -> Path: return export_model(self, folder)
    def push(self, repo_id: str, private: bool=True) -> str: return push_model(self, repo_id, private)

def _from_S(run): # whether every stage starts at S
    return run.config["settings"].get("init_target") == "S"

def _trained_on(config): # the sources of config.yaml, but for those that a list of chunks leaves out
    chunks, sources = config["settings"].get("chunks"), config["sources"]
    named = sum(chunks, []) if isinstance(chunks, list) else sources
    return {name: what for name, what in sources.items() if name in named}

def _steps(folder):
    "metrics.jsonl of a finished stage as a data frame."
    ended = read_part(folder / "stage.json")
    made = ended["steps"] + ended["skipped"]
    path = folder / "metrics.jsonl"
    with naming(path):
        steps = pd.read_json(path, lines=True)
        if "loss" not in steps: raise ValueError("it holds no steps")
        if len(steps) != made: raise ValueError(f"it holds {len(steps)} steps, and the stage made {made}")
    return steps


# %%
run, hot, by_heart = (Run(r.folder) for r in (run, hot, by_heart))
assert [s["stage"] for s in run.stages] == [1, 2, 3]
run.metrics.groupby("stage")[["loss", "reward_accuracy", "margin"]].last().round(3)

# %% [markdown]
# The last step of each stage, from `metrics.jsonl`: its loss, the share of its pairs whose chosen response gained on the rejected one, and by how much (the *margin*, in units of reward). These numbers
# come from one batch each, and from pairs that are being trained on. They are good for watching a run. To judge it, there are better ones.
#
# A file of steps may have been cut on the way, when a disk was full or a copy was stopped. A loss curve without its end looks like any other, so the number of steps is compared with what the stage says it made:

# %%
metrics = run.folder / "stage-2/metrics.jsonl"
whole = metrics.read_text()
metrics.write_text("".join(whole.splitlines(True)[:-1]))
print(complaint(lambda: run.metrics))
_ = metrics.write_text(whole)


# %% [markdown]
# ### As markdown
#
# The report is a markdown file. Names of sources come from users, and a user may call a source `a|b` or `<b>`. So whatever is printed first loses what markdown would read as a mark.

# %%
#| export
def escaped(
    value, # anything that can be printed; a float gets three digits
    formulas: bool=False, # whether $...$ is one, and stays
) -> str:
    "Text in one line, in which nothing ends a cell, begins a tag, a picture or a formula, or changes the type."
    printed = f"{value:.3f}" if isinstance(value, float) else str(value)
    text = " ".join(printed.splitlines())
    marks = ("|", "<", "*", "`") if formulas else ("\\", "|", "<", "*", "`", "~", "$")
    for mark in marks: text = text.replace(mark, "\\" + mark)
    if not formulas: text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text) # within a word, as in both_labels, it is no mark
    return text.replace("![", r"!\[")


# %%
assert escaped("two\nlines") == "two lines"
assert escaped("both_labels") == "both_labels"
for name in ("a|b <img>", r"\|x\|", "_so_", "$5 or $6"): print(escaped(name))
assert escaped(r"$M_{t-1}$", formulas=True) == r"$M_{t-1}$"


# %%
#| export
def as_markdown(
    frame: pd.DataFrame, # its index becomes the first column
    formulas: bool=False, # as for `escaped`
) -> str:
    "A data frame as a markdown table."
    head = [frame.index.name or "", *frame.columns]
    rule = ["---"] * len(head)
    body = [[name, *row] for name, row in zip(frame.index, frame.to_numpy(dtype=object))]
    rows = [" | ".join(escaped(cell, formulas) for cell in row) for row in [head, rule, *body]]
    return "\n".join(f"| {row} |" for row in rows)


# %%
print(as_markdown(pd.DataFrame({"accuracy": [0.5]}, index=["a|b <img>"])))


# %% [markdown]
# ## Did it help on pairs that it never saw?
#
# This is the question of the reader, so it comes first. Each model is compared with S, and with the stage before it. Every cell of the table holds a mean and its 95 % interval.

# %%
#| export
def held_out_table(
    run: Run, # with a finished stage
) -> pd.DataFrame: # source, model, against: the index; one column per measure; (mean, low, high) in each cell
    """What every model says about held-out pairs, against S and against the stage before.

    Empty where no pairs are held out.
    """
    folders = _model_folders(run)
    tables = [read_table(folder / "logprobs") for folder in folders]
    beta = run.config["settings"]["beta"]
    found = {}
    for source, held in _held(run).items():
        for m, table in enumerate(tables): _check_table(folders[m], m, table.rows, held["keys"], source)
        pairs = [dict(key=key) for key in held["keys"]]
        tokens = _lengths(held)
        of_S = held_out(tables[0], tables[0], pairs, beta, tokens)
        of_one_model = ("gamma", "prefers chosen", "gamma per token") # against itself, the rest is nothing
        found[source, "S", "S"] = {measure: of_S[measure] for measure in of_one_model if measure in of_S}
        for t, table in enumerate(tables[1:], 1):
            model = f"after stage {t}"
            found[source, model, "S"] = held_out(table, tables[0], pairs, beta, tokens)
            if t > 1: found[source, model, f"stage {t-1}"] = held_out(table, tables[t-1], pairs, beta, tokens)
    if not found: return pd.DataFrame()
    return pd.DataFrame(found, dtype=object).T.rename_axis(["source", "model", "against"])

def _model_folders(run):
    "Of M_0, M_1, ...: where the tables of log-probabilities lie."
    return [run.folder / "base", *stage_folders(run.folder)]

def _lengths(held):
    "Tokens of the responses of held-out pairs, (n, 2); nothing in a folder that does not say them."
    if "lengths" not in held: return None
    return torch.tensor([held["lengths"][side] for side in ("chosen", "rejected")]).T

def _check_table(folder, m, rows, keys, chunk):
    "Raise ValueError where M_m has not read all of these pairs."
    absent = set(keys) - set(rows.index)
    if not absent: return
    path = folder / "logprobs"
    cure = cure_of(path) if m else "run again: they are computed anew"
    raise ValueError(f"{path}: the table of M_{m} lacks {len(absent)} pairs of '{chunk}'; {cure}")

def _in_words(found):
    "The same table with text in its cells; nothing where a model is compared with itself."
    return found.map(lambda cell: as_text(cell) if isinstance(cell, tuple) else "")


# %% [markdown]
# Such a file may have been damaged on the way, like any other of a run. It must hold, for each source, what the table needs.

# %%
#| export
def _held(run) -> dict: # name -> keys, tokens, lengths
    "held_out.json; nothing where no pairs are held out."
    path = run.folder / "held_out.json"
    if not path.exists(): return {}
    held = read_part(path)
    with naming(path):
        for name, part in held.items(): _check_held(name, part)
    return held

def _check_held(name, part):
    "Raise ValueError for a source that does not say what the report needs."
    if not isinstance(part, dict): raise ValueError(f"{name} holds no names and values")
    absent = {"keys", "tokens"} - set(part)
    if absent: raise ValueError(f"{name} lacks {', '.join(sorted(absent))}")
    sides = "chosen", "rejected"
    if not set(sides) <= set(part["tokens"]): raise ValueError(f"{name} lacks the tokens of a side")
    lengths = part.get("lengths")
    if lengths is None: return # an older folder
    if any(len(lengths.get(side, [])) != len(part["keys"]) for side in sides):
        raise ValueError(f"{name}: it needs the lengths of both responses of every pair")


# %%
path = run.folder / "held_out.json"
whole = path.read_text()
path.write_text(whole.replace('"tokens"', '"token"'))
print(complaint(run.held_out))
_ = path.write_text(whole)

# %%
held = run.held_out()
assert held.loc[("riddle", "after stage 3", "S"), "change of gamma"][1] > 0
_in_words(held.xs("S", level="against")[["gamma", "prefers chosen", "change of gamma"]])

# %% [markdown]
# Read it in this order:
#
# | column | question | healthy | worry |
# | --- | --- | --- | --- |
# | change of gamma | by how many nats did the chosen response gain on the rejected one? | the whole interval is above 0 | it holds 0: nothing is shown; it is below 0: the model got worse |
# | reward accuracy | on which share of the pairs did it gain? | above 0.5, with its interval | near 0.5 although the change is large: a few pairs make the mean |
# | loss | how surprised is the model by these labels, with the model it is compared with as reference? | below $\ln 2$ = 0.693, which is the value for learning nothing | above 0.693: not training at all would have been better |
# | prefers chosen | on which share of the pairs is the chosen response the likelier one? | higher than in the row of S; a difference of a few pairs says nothing | lower than in the row of S |
# | log-ratio of chosen, of rejected | which of the two moved? | rejected falls, chosen falls less | chosen falls by several nats *a token* (the numbers are of whole responses; divide by the tokens that stand above the table): the model leaves the language of its data |
# | gamma | the same as change of gamma, but of one model alone | not to be judged alone | |
# | gamma per token | gamma with each log-probability divided by its tokens | rises where gamma rises | gamma rises and this one falls: it was learned which response is shorter |
#
# Two kinds of intervals stand here. Shares have Wilson's interval, means Student's, [chapter 05](05_partition.ipynb) explains both. *Change of gamma* is *paired*: the difference is taken pair by pair, so it does not matter that some pairs are easy and some are hard. That is why the intervals of *gamma* of S and after
# stage 2 overlap on `primer`, [0.44, 2.95] and [2.40, 5.30], and the change between them is still clear: [1.26, 3.06].
#
# Now read the first run by these rules, not only by its best column. On average the chosen responses gained, for certain. The loss is below $\ln 2$ on all three sources, but on `digest` and `riddle` its interval still holds it. And on `riddle` the stage that trained on riddles added 1.6 nats of $\gamma$ and, on balance, not one pair: *reward accuracy* stayed at 0.704, and the loss rose a little, from 0.539 to 0.558. Most pairs that were already won were won by more, and most that were lost were lost by more.
#
# All of them answer one question: what would other pairs of the same kind have shown of *these* models? They say nothing about another training run, another seed, or other data.
#
# Now the same columns of the run that was too hot. Its $\gamma$ has risen as well. What has happened?

# %%
columns = ["change of gamma", "loss", "log-ratio of chosen", "log-ratio of rejected"]
of_hot = hot.held_out().xs(("after stage 3", "S"), level=("model", "against"))
assert of_hot["change of gamma"].map(lambda cell: cell[0] > 0).all()
assert of_hot["loss"].map(lambda cell: cell[0] > math.log(2)).all()
for side in columns[2:]: assert of_hot[side].map(lambda cell: cell[0] < -15).all()
_in_words(of_hot[columns])

# %% [markdown]
# Both responses became less likely, by far more than fifteen nats. A response has six tokens here, and $e^{15/6}$ is 12: each token of a *chosen* response is now more than twelve times less likely than it was under S. The rejected ones lost even more, so the mean of $\gamma$ grew, and its intervals are wide. The loss tells: its mean is above $\ln 2$ for all three, because the pairs that were lost are lost by far. Its intervals are wide as well: a mean that a few lost pairs make is uncertain.
#
# ### When an interval says little
#
# From five or ten pairs one learns next to nothing ([chapter 08](08_evaluate.ipynb) shows how little). A table does not look different for that, so a sentence says it.

# %%
#| export
FEW = 20 # held-out pairs of a source; with fewer, a report warns of its intervals

def _few_text(held):
    "One sentence, where a source holds out few pairs."
    few = [escaped(name) for name, part in held.items() if len(part["keys"]) < FEW]
    if not few: return []
    return [f"Fewer than {FEW} pairs of {', '.join(few)} are held out, so their intervals say little; "
            "a larger `eval_share`, or a larger held-out source, would help."]


# %%
assert _few_text(_held(run)) == []
print(*_few_text(_held(by_heart)))

# %%
pairs_of = {name: len(part["keys"]) for name, part in _held(by_heart).items()}
last = by_heart.held_out().xs(("after stage 3", "S"), level=("model", "against"))
_in_words(last[["prefers chosen", "change of gamma", "loss"]]).assign(pairs=pairs_of)


# %% [markdown]
# With 5 to 14 pairs nothing is decided. The model may be better than S, or worse.
#
# Each part of the report is made by a function that takes the run and returns paragraphs. This is the first of them. If nothing was held out, that is the first thing a reader must know.

# %%
#| export
def _held_out_text(run):
    "One table for each comparison."
    title = "## Held-out pairs"
    found, held = run.held_out(), _held(run)
    if found.empty:
        return [title, NOTHING_HELD_OUT]
    sizes = ", ".join(_size(name, part) for name, part in held.items())
    text = [title, f"Never trained on: {sizes}. {HELD_OUT_TEXT}", *_few_text(held), *_seen_text(held)]

    shown = _in_words(found).reset_index()
    shown["model"] = shown["source"] + ", " + shown["model"]
    of_S = shown["against"] == "S"
    for heading, rows in (("Against S", shown[of_S]), ("Against the stage before", shown[~of_S])):
        if not len(rows): continue
        table = rows.drop(columns=["source", "against"]).set_index("model")
        text += [f"### {heading}", as_markdown(table)]
    return text

def _seen_text(held):
    "One sentence, where prompts of held-out pairs are trained on as well."
    seen = [f"{part['seen']} of {escaped(name)}" for name, part in held.items() if part.get("seen")]
    if not seen: return []
    return [f"Of these pairs, some have a prompt that was trained on: {', '.join(seen)}. They say less."]

NOTHING_HELD_OUT = (
    "None: everything below is about pairs that were trained on. "
    "`eval_share`, or a larger one, keeps some aside."
)

HELD_OUT_TEXT = (
    "Log-probabilities in nats; "
    "*loss* and *reward accuracy* take the model that is compared with as the reference."
)

def _size(name, held):
    "How many pairs a source holds out, and how long their responses are."
    chosen, rejected = held["tokens"]["chosen"], held["tokens"]["rejected"]
    tokens = f"{chosen:.0f} and {rejected:.0f} tokens on average, chosen and rejected"
    return f"{escaped(name)} ({len(held['keys'])} pairs; responses of {tokens})"


# %%
print(_held_out_text(run)[1])


# %% [markdown]
# ## What do they say?
#
# Next, what no table of numbers can show. Each model has answered the same four prompts, held-out ones where there are any, with the likeliest token each time. So the same weights always give the same answers, and you may compare word by word.
#
# Healthy is: the answers end by themselves, stay with the subject, and change where S was wrong. Worry about answers that repeat themselves, that grow longer from stage to stage, or that end in the middle of a word (64 tokens is the most that
# is asked for). If nothing changes over all stages, the learning rate is probably too small.

# %%
#| export
def _answers_text(run):
    "What each model answers to the same prompts."
    parts = {}
    for t, folder in enumerate(_model_folders(run)):
        file = folder / "answers.json"
        if not file.exists(): continue
        part = read_part(file)
        with naming(file):
            if len(part["answers"]) != len(part["prompts"]): raise ValueError("it needs one answer for each prompt")
        parts[f"after stage {t}" if t else "S"] = dict(zip(part["prompts"], part["answers"]))
    if not parts: return []
    text = ["## Answers", ANSWERS_TEXT]
    for prompt in next(iter(parts.values())):
        answers = {name: said[prompt] for name, said in parts.items() if prompt in said}
        table = pd.DataFrame({"answer": answers}).rename_axis("model")
        text += [f"**{escaped(prompt.strip())}**", as_markdown(table)]
    return text

ANSWERS_TEXT = "The likeliest token each time, 64 at most; the prompts are held-out ones where there are any."

# %%
print("\n\n".join(_answers_text(run)[2:4]))

# %% [markdown]
# The fourth prompt asks for `gfhka` in reverse, so `akhfg` is right, and S is wrong. What will the usual run say, and what the hot one?

# %%
for t in (1, 2, 3):
    usual_says, hot_says = (read_part(r.folder / f"stage-{t}/answers.json")["answers"][3] for r in (run, hot))
    assert usual_says == "akhfg" != hot_says
Markdown("\n\n".join(_answers_text(run)[-2:] + _answers_text(hot)[-1:]))


# %% [markdown]
# The usual run is right from stage 1 on. The hot one never is. An answer of 64 letters is one that was cut off. No more has to be said about it. Its table of stages, as we shall see, looks fine.
#
# ## What was trained on, and in which order?
#
# First the counts: how many rows were read, and what became of them. [Chapter 01](01_preferences.ipynb) has a line on each. Healthy is that nearly all rows are `usable`. Worry where `truncated` or `prompt_truncated` is a large share of them (a
# larger `max_length` helps), and where `both_labels` is a large share: these pairs occur with the opposite label, too, and the two pull against each other.

# %%
#| export
def _data_text(run):
    "What was read, dropped and cut, one column per source or listed chunk; of chunks that a function makes, nothing."
    path = run.folder / "partition.json"
    counts = read_part(path).get("counts") if path.exists() else None
    if not counts or not any("rows" in of_one for of_one in counts): return []
    table = pd.DataFrame(counts, dtype=object).set_index("source").T.rename_axis("rows")
    return ["## Data", as_markdown(table.fillna(""))]


# %%
Markdown(_data_text(run)[1])


# %% [markdown]
# Then the order. `accuracy` is the share of pairs that S ranks rightly before any training, with its interval from `low` to `high`; the easy source goes first. The columns are those of [chapter 05](05_partition.ipynb).
#
# An order looks decided. So a sentence says where it is not: where the intervals of two neighbours overlap, and where the mean per token would have ordered the sources differently from the sum.

# %%
#| export
def undecided(
    measures: pd.DataFrame, # of a partition, in the order of training; indexed by source
    order: str="easy_to_hard", # or hard_to_easy
    order_by: str="gamma",     # or gamma_per_token
) -> list[str]:
    "What the order of the sources does not say."
    per_token = order_by == "gamma_per_token"

    def ends(row): # of the interval of what the sources are ordered by
        return wilson(row["accuracy_per_token"], row["n"]) if per_token else (row["low"], row["high"])

    rows, out = list(measures.iterrows()), []
    for (a, x), (b, y) in zip(rows, rows[1:]):
        (low_a, high_a), (low_b, high_b) = ends(x), ends(y)
        overlap = low_a <= high_b and low_b <= high_a
        if not overlap: continue
        out.append(f"The intervals of {a} and {b} overlap: "
                   "which of them comes first is not decided by these pairs.")
    hard_first = order == "hard_to_easy"
    other = "accuracy" if per_token else "accuracy_per_token"
    by_other = measures.sort_values(other, ascending=hard_first, kind="stable").index.tolist()
    if by_other != measures.index.tolist():
        which = ["the mean log-probability of a token", "the sum"]
        one, not_one = reversed(which) if per_token else which
        names = ", ".join(map(str, by_other))
        out.append(f"By {one}, not {not_one}, the order would be {names}.")
    return out


# %%
measures = pd.DataFrame(
    dict(accuracy=[0.6, 0.55], low=[0.5, 0.5], high=[0.7, 0.6], accuracy_per_token=[0.4, 0.6]),
    index=["short", "mixed"])
apart = measures.assign(low=[0.59, 0.5], high=[0.7, 0.56], accuracy_per_token=[0.6, 0.4])
assert undecided(apart) == []
undecided(measures)


# %%
#| export
def _partition_text(run):
    "What the order of the sources rests on; nothing for chunks that a function makes."
    config = run.config
    if not config["sources"]: return []
    measures, order = run.partition(), config["settings"]["order"]
    order_by = config["settings"].get("order_by", "gamma")
    ordered = order in ("easy_to_hard", "hard_to_easy")
    words = [escaped(sentence) for sentence in undecided(measures, order, order_by)] if ordered else []
    if ordered and order_by == "gamma_per_token": words.insert(0, BY_TOKEN)
    return ["## Partition under S", as_markdown(measures), *words, "![](figures/partition.png)"]

BY_TOKEN = "Ordered by *accuracy_per_token*, the diamonds of the figure (`order_by = gamma_per_token`)."

# %%
sentences = _partition_text(by_heart)[2:-1]
assert sentences                        # of the few pairs, something is undecided
assert len(_partition_text(run)) == 3   # title, table, figure: nothing to say
print(*sentences, sep="\n")

# %%
plot_partition(run.partition().reset_index());

# %% [markdown]
# What to see in the first figure of the report: in the usual run the whiskers do not touch, so the order is decided by these pairs. In the run with few pairs they do, and the sentence above the figure says so. A diamond away from the end of its bar says that the
# length of the responses has a hand in the order.
#
# ## What did each stage do?
#
# One column per stage. All but one row is measured on the stage's own chunk $D_t$, *which was trained on*. `gamma_ref on D_t` is the mean of the whole chunk, the rest of a probe of at most 512 pairs; so in a large chunk take the change from its own row, and do not subtract. The table tells you whether the training worked, and not whether it was of any use.

# %%
#| export
STAGE_ROWS = { # label -> name in stage.json
    "chunk": "chunk",
    "pairs": "pairs",
    "steps": "steps",
    "reference": "reference",
    "first loss": "first_loss",
    "gamma_ref on D_t": "gamma_ref",
    "gamma_ref on D_t+1": "gamma_ref_next",
    "gamma of M_t on D_t": "gamma",
    "change of gamma, 95 %": "gamma_change",
    "gamma certified by the loss": "certificate",
    "pairs below reference": "below_reference",
    "accuracy of M_t-1 on D_t": "accuracy_before",
    "accuracy of M_t on D_t": "accuracy",
}

def stage_table(
    run: Run, # with a finished stage
) -> pd.DataFrame: # one row per measure, one column per stage
    """One column per stage; gammas in nats.

    `gamma_ref on D_t` is a mean over the whole chunk, the rest are means over the chunks' probes.
    """
    columns = {}
    for stage in run.stages:
        column = {label: _shown(stage.get(name)) for label, name in STAGE_ROWS.items()}
        columns[f"stage {stage['stage']}"] = column
    table = pd.DataFrame(columns, dtype=object)
    return table.rename({"accuracy of M_t-1 on D_t": "accuracy of S on D_t"}) if _from_S(run) else table

def _shown(value):
    "A number of stage.json as a reader wants it."
    if value is None: return ""
    if isinstance(value, list): return as_text(value, "+.2f")
    return round(value, 3) if isinstance(value, float) else value


# %%
for stage in run.stages: assert stage["certificate"] <= stage["gamma"]
run.table()

# %% [markdown]
# Row by row:
#
# | row | what it is | what to look for |
# | --- | --- | --- |
# | chunk, pairs, steps | what the stage was trained on, and how many optimizer steps it made | ten steps at the default learning rate change nothing |
# | reference | whose log-probabilities the loss compares with | `M_t-1` in stepwise DPO |
# | first loss | the loss of the first batch, before any step | 0.693 = $\ln 2$ where a policy is its own reference; anything else says that it starts elsewhere |
# | gamma_ref on D_t | mean $\gamma$ of the reference on the chunk: the bar of this stage | |
# | gamma_ref on D_t+1 | what the same reference says about the *next* chunk, which it has not seen | compare with the next column's `gamma_ref on D_t`: the rise is what this stage taught beyond its own pairs (with a fixed reference there is none) |
# | gamma of M_t on D_t | mean $\gamma$ after the stage | above the bar |
# | change of gamma | the same pairs before and after, pair by pair, with the paired interval | above 0; if it holds 0, the stage did nothing: more steps, or a larger learning rate |
# | gamma certified by the loss | the least mean $\gamma$ that the loss allows ([chapter 03](03_loss.ipynb)) | near the row two above it; far below: some pairs gained much and others lost |
# | pairs below reference | the share of pairs on which the model fell below its reference; of single pairs the certificate says nothing | small; near one half, the stage moved pairs at random |
# | accuracy of M_t-1 (of S, where every stage starts there), of M_t on D_t | the share of pairs with $\gamma > 0$ before and after | it rises; near 1.000 with many epochs, the pairs may have been learned by heart |
#
# Now all three runs. One of them babbles, one has learned by heart. Can you tell which from these rows?

# %%
rows = ["change of gamma, 95 %", "accuracy of M_t-1 on D_t", "accuracy of M_t on D_t"]
three = dict(first=run, second=hot, third=by_heart)
for one in three.values():
    for stage in one.stages: assert stage["gamma_change"][1] > 0
for stage in by_heart.stages: assert stage["accuracy"] > 0.9
pd.concat({name: one.table().loc[rows] for name, one in three.items()})


# %% [markdown]
# You cannot. Every change lies above 0, and every stage looks like a success. The third run has the finest rows: more than ten nats in each stage, and nearly every pair ranked rightly. But these are pairs that were read ten times. On held-out pairs, above, its change could as well be zero. This is why the report begins with them, and why it says under "Stages": *a check of the training, not of its success*.
#
# ## What did it do to the *other* chunks?
#
# Every model has read a *probe* of every chunk: at most 512 pairs, the same for all models. So we can follow one chunk through all models, before and after it was trained on.

# %%
#| export
def gamma_table(
    run: Run, # with a finished stage
) -> pd.DataFrame: # model, chunk, gamma (nats): one row per probe pair
    """gamma of every model on the probe of every chunk that it was measured on.

    Raises ValueError for a table that lacks pairs.
    """
    run.model_folder() # there must be one
    stages, folders = run.stages, _model_folders(run)
    rows = [read_table(folder / "logprobs").rows for folder in folders]
    probes = stages[-1]["probes"]
    for t, stage in enumerate(stages, 1):
        start = 0 if _from_S(run) else t - 1
        for m in (start, *range(t, len(stages) + 1)): # what the signs of failure compare
            _check_table(folders[m], m, rows[m], probes[stage["chunk"]], stage["chunk"])

    parts = []
    for chunk, keys in probes.items():
        for m, table in enumerate(rows):
            if not set(keys) <= set(table.index): continue # this model was not measured on it
            gammas = table.loc[keys, "chosen"] - table.loc[keys, "rejected"]
            parts.append(pd.DataFrame(dict(model=f"M_{m}", chunk=chunk, gamma=gammas.to_numpy())))
    return pd.concat(parts, ignore_index=True)


# %%
gammas = gamma_table(run)
assert set(gammas["model"]) == {"M_0", "M_1", "M_2", "M_3"}
gammas.groupby(["chunk", "model"], sort=False)["gamma"].mean().unstack().round(2)

# %% [markdown]
# Read a row from left to right. Which number of a row did training on that very chunk make? For the first row it is the step from `M_0` to `M_1`; the other steps are what the other stages did to it. The report draws this table, as the change since S, with intervals:

# %%
plot_change(gammas);

# %% [markdown]
# What to see: every line rises at every stage. A hollow point is a chunk that was not trained on yet; where the line rises there, the bar of a later stage rises before that stage begins. A line that comes down after its points are filled is *forgetting*.
#
# The other two figures come from `metrics.jsonl`. The loss:

# %%
plot_loss(run.metrics);

# %% [markdown]
# What to see: each stage starts at the dotted line, $\ln 2$, and goes down. That the second curve starts higher than the first one ended is no setback: it is measured from a new reference. Worry where the thick line ends above the dotted one.

# %%
plot_drift(run.metrics);

# %% [markdown]
# What to see: in each stage the orange line (rejected) falls away from the blue one (chosen), and that gap is what DPO trains. Blue may sink a little. How it looks when it sinks too far, the hot run shows; mind the scale:

# %%
columns = ["logratio_chosen", "logratio_rejected"]
usual_falls, hot_falls = (r.metrics.query("stage == 1")[columns].min() for r in (run, hot))
assert (hot_falls < -10).all()
assert (usual_falls > -10).all()
plot_drift(hot.metrics);


# %% [markdown]
# In stage 1 of the hot run *both* responses fell by more than ten nats, together. The gap between them is narrow beside that. Where you see this picture, read the answers, and train again with a smaller learning rate or a larger $\beta$.
#
# ## Signs of failure
#
# Some patterns are looked for by rule, and each becomes a sentence. [Chapter 08](08_evaluate.ipynb) makes the rules and measures how often they are wrong:
#
# | sign | what it says | what to do |
# | --- | --- | --- |
# | minimal improvement | the interval of a stage's change of $\gamma$ does not lie above 0.01 nats | a larger learning rate, more epochs or more pairs |
# | made worse | that interval lies below 0 | a smaller learning rate |
# | forgetting | the last model prefers the chosen response of a chunk less often than the model right after that chunk's stage | fewer epochs, a smaller learning rate, or the chunks mixed in one stage |
# | instability | the last quarter of a stage's losses lies above its first loss | a smaller learning rate, or a larger batch |
#
# Which signs will the three runs show?

# %%
#| export
def _signs_text(run):
    "What the rules have found, and how far they can be trusted."
    signs = [f"- {escaped(sign)}" for sign in run.signs()]
    found = "\n".join(signs) or "None of minimal improvement, made worse, forgetting, instability."
    return ["## Signs of failure", found, FALSE_ALARMS]


# %%
assert run.signs() == []
assert {sign.split(":")[0] for sign in hot.signs()} == {"forgetting"}
assert by_heart.signs() == []
Markdown("\n\n".join(_signs_text(hot)[1:]))


# %% [markdown]
# The hot run forgets. The usual run has no sign; but neither has the one that learned by heart, for the rules look at pairs that were trained on. So a sign is a reason to look, and no sign is no proof. The last paragraph stands in every report and gives the known rates of false alarms.
#
# ## How was it run?
#
# Last, enough to run it again, and to know what it cost. Worry where a value is not what you thought you had asked for: `precision`, `lr`, the revision of the model; and where steps were skipped: in fp16 a few at the beginning are usual.

# %%
#| export
def _costs(run):
    "Time and memory of the stages, as far as they are known."
    files = [folder / "cost.json" for folder in _model_folders(run)]
    costs = [read_part(file) for file in files if file.exists()]
    seconds = sum(cost["seconds"] for cost in costs)
    peak = max((cost["peak_gib"] for cost in costs), default=0)
    took = (f"{seconds // 60} min {seconds % 60} s (without the first pass of S over all pairs; "
            "of a stage that was interrupted, of its last call)")
    return {"time of the stages": took if costs else "unknown",
            "peak memory": f"{peak:.1f} GiB" if peak else "unknown"}


# %%
list(_costs(run))


# %%
#| export
def _run_text(run):
    "The command, versions, tokens, time and memory; then all settings."
    config, metrics, stages = run.config, run.metrics, run.stages
    made, skipped = (sum(stage[what] for stage in stages) for what in ("steps", "skipped"))
    def places(sources): return "; ".join(f"{name}: {what or 'from memory'}" for name, what in sources.items())
    facts = {
        "command": config.get("command", "unknown"),
        "model": config["model"],
        "revision of the model": config.get("revision") or "none",
        "weights of S": config["weights"],
        "hash of the pairs": config["pairs"],
        "sources": places(_trained_on(config)) or "made by a function",
        "sources that are only measured": places(config.get("held_out", {})) or "none",
        "device": config["device"],
        **{f"version of {name}": number for name, number in config["versions"].items()},
        **config.get("machine", {}),
        "tokens read in training": f"{metrics['tokens'].sum():,} (every epoch; each response with its prompt)",
        "optimizer steps": f"{made:,}" + (f", and {skipped:,} that were skipped" if skipped else ""),
        **_costs(run),
    }
    settings = _values(config["settings"], "setting")
    return ["## How it was run", _values(facts, "what"), "## Settings", settings]

def _values(values, name):
    "Names and values as a table."
    printed = {k: str(v) for k, v in values.items()}
    return as_markdown(pd.DataFrame({"value": printed}).rename_axis(name))


# %%
how = _run_text(run)
print("\n".join(how[3].splitlines()[:6]))
[line for line in how[1].splitlines() if "steps" in line or "tokens" in line]

# %% [markdown]
# ## The page
#
# One section after the other, the answer first:

# %%
#| export
INTERVALS_TEXT = "Intervals are 95 % intervals: Student's for means, Wilson's for shares."

STAGES_TEXT = (
    "Stage t trains on the chunk D_t and ends in the model M_t; M_0 is S. "
    "Gamma is how much more likely the chosen response is than the rejected one, in nats. "
    "The first gamma_ref is a mean over the whole chunk, the rest are means over a probe of it. "
    "All of it is measured on pairs that were trained on: a check of the training, not of its success."
)

def _own_loss(run) -> str|None: # its name
    return run.config["settings"].get("loss")

def _loss_text(run):
    "One sentence, where the run was not trained with the DPO loss."
    name = _own_loss(run)
    if not name: return []
    return [f"Trained with a loss of its own, the function `{name}`: *first loss* and the figure of losses are its values. "
            "Every other loss on this page, and what it certifies, is the DPO loss at the beta of the settings."]

def _in_stages(run):
    T = len(run.stages)
    return f"{T} {'stage' if T == 1 else 'stages'}"

def _where_text(run):
    "Where the trained model lies, or how it is made."
    model = run.model_folder().relative_to(run.folder) # there must be one
    if not run.config["settings"].get("lora_r"): return f"The trained model lies in `{model}`."
    return (f"The trained model is S with the adapter in `{model}`; "
            "`sdpo push --export` writes it as a whole model.")

def report_text(
    run: Run, # with a finished stage
) -> str:
    "What report.md says, one section after the other, the answer first."
    signs = _signs_text(run) # it reads all tables, and says which of them lacks something
    text = [
        f"# Stepwise DPO of {escaped(run.config['model'])} in {_in_stages(run)}",
        f"{_where_text(run)} {INTERVALS_TEXT}",
        *_loss_text(run),
        *_held_out_text(run),
        *_answers_text(run),
        *_data_text(run),
        *_partition_text(run),
        "## Stages", STAGES_TEXT, as_markdown(run.table()),
        *(f"![](figures/{name}.png)" for name in ("change", "loss", "drift")),
        *signs,
        *_run_text(run),
    ]
    return "\n\n".join(text) + "\n"


# %%
text = report_text(run)
headings = [line for line in text.splitlines() if line.startswith("##")]
assert headings[0] == "## Held-out pairs"
headings


# %% [markdown]
# The four figures you have seen. In a name, a dollar sign would begin a formula for Matplotlib; so it is escaped.

# %%
#| export
def _drawn(run):
    "The figures of a report; names in them are no formulas."
    def plain(frame, column):
        names = frame[column].str.replace("$", r"\$", regex=False)
        return frame.assign(**{column: names})

    metrics = run.metrics
    drawn = dict(
        change=plot_change(plain(gamma_table(run), "chunk")),
        loss=plot_loss(metrics, _own_loss(run)),
        drift=plot_drift(metrics),
    )
    if run.config["sources"]: # chunks that a function makes have no partition
        drawn["partition"] = plot_partition(plain(run.partition().reset_index(), "source"))
    return drawn


# %%
drawn = _drawn(run)
plt.close("all") # they were all shown above
list(drawn)


# %% [markdown]
# A notebook should show the page with its figures, but its markdown finds no files in another folder. So they go into the text:

# %%
#| export
@dataclass
class Report:
    "report.md of a run; a notebook shows it with its figures."
    path: Path # of report.md; the figures lie beside it
    new: bool = True # whether it could be written

    def _repr_markdown_(self):
        if not self.path.exists(): return f"{self.path}: not written"
        return re.sub(r"!\[\]\((figures/\w+\.png)\)", self._embedded, self.path.read_text(encoding="utf-8"))

    def _embedded(self, match):
        picture = self.path.parent / match[1]
        if not picture.exists(): return f"({match[1]}: not there)"
        return f"![](data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()})"


# %%
shown = Report(run.folder / "report.md")._repr_markdown_()
assert "(figures/" not in shown
shown.count("(data:image/png;base64,")


# %% [markdown]
# A finished run may lie on a disk that can only be read. Then there is nothing to write, but still much to show: one line says so, and the tables are there all the same.

# %%
#| export
def write_report(
    run: Run, # with a finished stage
) -> Report:
    """report.md: what came of it, what was read, the stages, what to worry about, how it was run.

    Where it cannot be written, this is said in one line.
    """
    text, drawn = report_text(run), _drawn(run)
    report, figures = Report(run.folder / "report.md"), run.folder / "figures"
    look = dict(format="png", dpi=110, bbox_inches="tight")
    try:
        if figures.is_symlink(): figures.unlink()
        figures.mkdir(exist_ok=True)
        for name, fig in drawn.items():
            with replacing(figures / f"{name}.png") as tmp: fig.savefig(tmp, **look)
        with replacing(report.path) as tmp: tmp.write_text(text, encoding="utf-8")
    except OSError as e:
        report.new = False
        print(f"no new report: {e}")
    finally:
        for fig in drawn.values(): plt.close(fig)
    return report


# %%
report = run.report()
assert report.path.read_text() == text
sorted(p.name for p in (run.folder / "figures").iterdir())


# %% [markdown]
# In a notebook, end a cell with `run.report()`, and the whole page appears under it.
#
# ## To give away
#
# A model that leaves its run needs a card. A stranger who finds it must be able to tell:
#
# - what it was made from: the base model, and the data, by names that others can find;
# - how: the method, and the settings that matter;
# - what came out, *on pairs that were not trained on*, with intervals; or that nothing was held out;
# - where it fails, and what it may be used for.
#
# The first three are in the folder. The last is not: which licence holds, for whom the model is, and what you saw it do wrong, only you know. So export, look, add these lines to `README.md`, and upload *this folder*: `hf upload user/name to-give`.
#
# A path on your machine says nothing to others. So the card leaves out what looks like a path, and with it the few names on the hub that have no owner, such as `gpt2`. A folder such as `models/S` looks like a name on the hub when you export from another place: read the first lines of the card.

# %%
#| export
def _hub_ids(config):
    "What a run used that others can find by name: the base model, the data sets."
    sources = _trained_on(config).values()
    sources = [what.get("source") if isinstance(what, dict) else what for what in sources]
    base = config["model"] if _on_hub(config["model"]) else None
    return base, [source for source in sources if _on_hub(source)]

_FILES = {".jsonl", ".json", ".csv", ".parquet", ".txt", ".gz", ".zst"}

def _on_hub(name):
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name): return False
    return Path(name).suffix not in _FILES and not Path(name).exists()


# %%
assert _hub_ids(run.config) == (None, [])
named = dict(own="data/pairs.jsonl", above="../pairs", orca="Intel/orca_dpo_pairs")
_hub_ids(dict(model="HuggingFaceTB/SmolLM2-135M-Instruct", sources=named, settings={}))


# %%
#| export
def model_card(
    run: Run, # with a finished stage
) -> ModelCard:
    "The card of the last stage's model, for the hub."
    config = run.config
    base, data = _hub_ids(config)
    about = ModelCardData(
        base_model=base,
        datasets=data or None,
        library_name="transformers",
        tags=["dpo", "stepwise-dpo", "sdpo", "alignment"],
    )
    text = [
        f"# {escaped(Path(config['model']).name)}, aligned by stepwise DPO",
        _method_text(run),
        INTERVALS_TEXT,
        *_loss_text(run),
        *_held_out_text(run),
        "## Stages", STAGES_TEXT, as_markdown(run.table()), "![](figures/change.png)",
        *_signs_text(run),
        *_data_text(run),
    ]
    return ModelCard(f"---\n{about.to_yaml()}\n---\n\n" + "\n\n".join(text) + "\n")

_REFERENCES = dict(
    moving="the model that a stage leaves behind is the reference of the next",
    fixed="the base model is the reference of every stage",
)

def _method_text(run):
    c = run.config["settings"]
    reference = _REFERENCES.get(c["reference"], "the reference of every stage is a model of its own")
    start = "Every stage starts at the base model. " if c["init_target"] == "S" else ""
    return (
        "Trained by stepwise DPO (sDPO, [arXiv 2403.19270](https://arxiv.org/abs/2403.19270)) "
        f"in {_in_stages(run)} with [sdpo_nb](https://github.com/sdpo-nb/sdpo_nb): {reference}. {start}"
        f"beta = {c['beta']}, learning rate {c['lr']}, {c['batch_size']} pairs a step, "
        f"{c['epochs']} epoch(s) a stage, {c['precision']}{_adapters_text(c)}."
    )

def _adapters_text(settings):
    "What of the weights was trained, where it was not all of them."
    if not settings.get("lora_r"): return ""
    layers = settings["lora_targets"]
    return f"; LoRA adapters of rank {settings['lora_r']} ({layers}), merged into the weights"


# %%
assert STAGES_TEXT in model_card(run).content
print(model_card(run).content[:560])


# %% [markdown]
# `run.export` puts model, card and figure into a new folder. It refuses one that exists, because it would have to delete what is in it; and it refuses a model that [is not the one that the stage saved](10_folder.ipynb), because then the card would speak of another. Where a run trained [adapters](09_lora.ipynb), this is the place where they are merged: what you give away is a whole model, in the dtype of S, that needs no PEFT. The adapter itself stays in `stage-t/model` of the run.

# %%
#| export
def export_model(
    run: Run, # with a finished stage
    folder, # must not exist
) -> Path:  # the same folder
    """The last stage's model with its card and figure, as it would be pushed.

    Raises ValueError for a folder that exists, or a model that is not the one that the stage saved.
    """
    folder = Path(folder).expanduser()
    if folder.exists(): raise ValueError(f"{folder}: is there already; give a folder that does not exist")
    model = load_stage(run.model_folder().parent, "cpu") # it must be the model that the stage saved
    folder.parent.mkdir(parents=True, exist_ok=True)
    drawn = _drawn(run)
    try:
        with replacing(folder) as tmp:
            if is_adapter(run.model_folder()): _write_merged(model, run, tmp)
            else: shutil.copytree(run.model_folder(), tmp)
            (tmp / "figures").mkdir()
            drawn["change"].savefig(tmp / "figures/change.png", dpi=110, bbox_inches="tight")
            model_card(run).save(tmp / "README.md")
    finally:
        for fig in drawn.values(): plt.close(fig)
    return folder

def _write_merged(model, run, folder):
    "A whole model, its adapter merged, in the dtype of S or in fp32, as save_dtype says."
    config = run.config
    rounded = config["settings"]["save_dtype"] == "S"
    S = run.model_folder(0).as_posix()
    dtype = stored_dtype(S, config.get("revision")) if rounded else torch.float32
    folder.mkdir()
    write_model(model, run.tokenizer, folder, dtype)


# %%
given = run.export(tmp / "to-give")
print(complaint(run.export, given))
sorted(str(path.relative_to(given)) for path in given.rglob("*") if path.is_file())


# %% [markdown]
# `run.push` does it in one go: it exports to a temporary folder and uploads that. It knows nothing of lines that you wrote elsewhere, and it replaces the card on the hub. So use it first, and add your lines on the hub afterwards; or do not use it at all, and upload the folder that you looked at. A stand-in for the hub shows what would be sent:

# %%
#| export
def push_model(
    run: Run, # with a finished stage
    repo_id: str, # on the hub, as user/name; made if it is not there
    private: bool=True, # a repository that is made
) -> str:         # its address
    "Upload what `export_model` makes. You must be logged in (hf auth login)."
    with tempfile.TemporaryDirectory() as tmp:
        folder = export_model(run, Path(tmp) / "model")
        hub = HfApi()
        address = hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Stepwise DPO with sdpo_nb")
    return str(address)


# %%
class NoHub:
    def create_repo(self, repo_id, private, exist_ok):
        return f"https://huggingface.co/{repo_id} (private: {private})"

    def upload_folder(self, repo_id, folder_path, commit_message):
        print(sorted(path.name for path in folder_path.iterdir()))

the_hub, HfApi = HfApi, NoHub
said = push_model(run, "me/aligned")
HfApi = the_hub
said

# %%
#| hide
shutil.rmtree(tmp)

# %% [markdown]
# ## What this does not show
#
# - Held-out pairs come from the same sources as the training pairs. Whether the model is better at what *you* want it for, only a test of your own can say ([chapter 08](08_evaluate.ipynb) has win rates and benchmarks).
# - One run is one seed. If a choice depends on the difference between two runs, train each of them several times.
# - The answers are four. Read more of them before you give a model away.
#
# ## What you now have
#
# `Run(folder)` reads any run: settings, stages, steps, models. `run.held_out()`, `run.table()`, `run.signs()` and `gamma_table(run)` are what it found; `run.report()` is the page, `run.export(...)` and `run.push(...)` the model with
# its card. And an order to read in: held-out pairs, answers, stages, signs.
#
# ## Questions to test yourself
#
# 1. The table of stages shows a large change of $\gamma$ in every stage. Why is that no proof that the model is better?
#
# <details><summary>Answer</summary>
#
# It is measured on pairs that were trained on. A model that learned them by heart shows the same, as the third run does. Held-out pairs, which lead the report, were never trained on.
#
# </details>
#
# 2. On held-out pairs $\gamma$ rose by 4 nats, and the loss is 1.2. What has happened?
#
# <details><summary>Answer</summary>
#
# Some pairs gained much, and others lost so much that their loss is far above $\ln 2$. The mean hides it, the loss does not. Look at the log-ratio of chosen and at the answers.
#
# </details>
#
# 3. Why does every model read a probe of *every* chunk, also of those that come later?
#
# <details><summary>Answer</summary>
#
# To see two things that one chunk alone cannot show: whether a later stage undoes what an earlier one learned, and how high the bar of a later stage has become before it starts.
#
# </details>
#
# 4. Why does the report say that two sources whose intervals overlap are not ordered?
#
# <details><summary>Answer</summary>
#
# The accuracies come from a sample of pairs. If the intervals overlap, another sample could well have put the two the other way round.
#
# </details>
#
# ## Try this
#
# - Call the first source `$ 5|<b>` and make a report.
#
# <details><summary>What you should see</summary>
#
# The name as you typed it. In the tables the marks of markdown are escaped, in the figures the dollar sign is.
#
# </details>
#
# - Train the run that learned by heart with 200 pairs of each source (`max_pairs=200`) instead of 30. What do the held-out pairs say now?
#
# <details><summary>What you should see</summary>
#
# A success and a warning at once. With 73 to 82 held-out pairs the intervals say something: after stage 3 the change of $\gamma$ is +10.0, +7.7 and +8.9 nats, clearly above 0. But the loss is above $\ln 2$ on `digest` and `riddle`, the chosen
# responses lost 5 to 12 nats, and on `riddle` stages 2 and 3 made *prefers chosen* smaller again (0.740, 0.671, 0.644). Ten epochs were too many. The table of stages, with accuracies above 0.96, and the signs of failure, of which there is none, show nothing of it.
#
# </details>
