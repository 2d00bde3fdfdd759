# %% [markdown]
# # What a run says
# > A finished folder becomes tables, figures and a report for its reader; and a model with a card, to give away.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/10_report.ipynb)
#
# **You should know** that [a run is a folder](09_folder.ipynb) and what is [measured on pairs](08_evaluate.ipynb). If you came to learn what stepwise DPO does, read [13](13_stepwise.ipynb) first.
# **Time** an hour to read with its code, half a minute to run.
#
# When a run has ended, its reader has one question: *is the last model better than the one I began with?* Then come the smaller ones: which stage did it, what did it cost, can I trust it, can I run it
# again? This chapter reads the folder and answers in that order. Nothing here computes with a model, so a report can be made again in seconds, also on a laptop to which you copied the folder without its models.

# %%
#| default_exp report

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
#| export
import base64, re, shutil, tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from huggingface_hub import HfApi, ModelCard, ModelCardData

from sdpo_nb.evaluate import FALSE_ALARMS, as_text, failure_signs, held_out
from sdpo_nb.figures import plot_change, plot_drift, plot_loss, plot_partition
from sdpo_nb.folder import cure_of, finished_stages, load_stage, naming, read_part, stage_folders
from sdpo_nb.logprobs import load_tokenizer, read_table, replacing

# %%
import torch

from sdpo_nb.world import complaint, load_world

torch.set_num_threads(1)
pd.set_option("display.width", 180, "display.max_columns", 20)


# %% [markdown]
# ## A folder, read
#
# `Run` gives the files of a folder names. It keeps nothing in memory: each property reads its file when you ask. Its last methods are the sections of this chapter.

# %%
#| export
@dataclass
class Run:
    "A run folder, read."
    folder: Path # config.yaml lies in it

    def __post_init__(self):
        self.folder = Path(self.folder)

    @property
    def config(self) -> dict:
        return read_part(self.folder / "config.yaml")

    @property
    def stages(self) -> list[dict]: # stage.json of each finished stage
        return [read_part(folder / "stage.json") for folder in stage_folders(self.folder)]

    @property
    def metrics(self) -> pd.DataFrame: # one row per optimizer step of a finished stage
        self.model_folder() # there must be one
        steps = [_steps(folder).assign(stage=t) for t, folder in enumerate(stage_folders(self.folder), 1)]
        return pd.concat(steps, ignore_index=True)

    @property
    def model(self): # of the last finished stage, as transformers loads it
        return load_stage(self.model_folder().parent)

    @property
    def tokenizer(self):
        return load_tokenizer(str(self.model_folder()))

    def model_folder(
        self,
        t: int=None, # of M_t; 0: S, perhaps a hub id; none: of the last finished stage
    ) -> Path:
        "Where a model lies, as `from_pretrained` reads it. Raises ValueError where no stage is finished."
        if t == 0: return Path(self.config["model"])
        finished = finished_stages(self.folder)
        if t is None and not finished: raise ValueError(f"{self.folder}: no stage is finished, so there is no model yet")
        return self.folder / f"stage-{t or finished[-1]}" / "model"

    def partition(self) -> pd.DataFrame:
        "What was measured of each source under S, in the order of training."
        return pd.DataFrame(read_part(self.folder / "partition.json")["measures"]).set_index("source")

    def table(self) -> pd.DataFrame: return stage_table(self)
    def held_out(self) -> pd.DataFrame: return held_out_table(self)
    def signs(self) -> list[str]: return failure_signs(gamma_table(self), self.metrics)
    def report(self): return write_report(self)
    def export(self, folder) -> Path: return export_model(self, folder)
    def push(self, repo_id: str, private: bool=True) -> str: return push_model(self, repo_id, private)

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

def _model_folders(run):
    "Of M_0, M_1, ...: where the tables of log-probabilities lie."
    return [run.folder / "base", *stage_folders(run.folder)]


# %% [markdown]
# To have something to read, we borrow one call of the [next chapter](13_stepwise.ipynb): three stages in the tiny world, one per source. A tenth of the prompts of each source is held out: never trained on, and
# read by every model.

# %%
from sdpo_nb.stepwise import StepwiseConfig, sdpo

w, tmp = load_world(), Path(tempfile.mkdtemp())
settings = StepwiseConfig(beta=0.3, lr=1e-4, epochs=2, precision="fp32", eval_share=0.1)
run = sdpo(w.base, w.sources, settings, tmp / "run")

# %%
assert [s["stage"] for s in run.stages] == [1, 2, 3]
run.metrics.groupby("stage")[["loss", "reward_accuracy", "margin"]].last().round(3)

# %% [markdown]
# The last step of each stage, from `metrics.jsonl`: its loss, the share of its pairs whose chosen response gained on the rejected one, and by how much (the *margin*, in units of reward). These numbers
# come from one batch each, and from pairs that are being trained on. The tables below are better.
#
# A file of steps may have been cut on the way, when a disk was full or a copy was stopped. Then the number of steps gives it away:

# %%
metrics = run.folder / "stage-2/metrics.jsonl"
whole = metrics.read_text()
metrics.write_text("".join(whole.splitlines(True)[:-1]))
print(complaint(lambda: run.metrics))
metrics.write_text(whole);


# %% [markdown]
# ## Did it help on pairs that it never saw?
#
# This is the question of the reader, so it comes first, here and in the report. Each model is compared with S, and with the stage before it.

# %%
#| export
def held_out_table(
    run: Run, # with a finished stage
) -> pd.DataFrame: # source, model, against: the index; one column per measure; (mean, low, high) in each cell
    """What every model says about held-out pairs, against S and against the stage before.

    Empty where no pairs are held out.
    """
    tables = [read_table(folder / "logprobs") for folder in _model_folders(run)]
    beta = run.config["settings"]["beta"]
    found = {}
    for name, held in _held(run).items():
        pairs = [dict(key=key) for key in held["keys"]]
        of_S = held_out(tables[0], tables[0], pairs, beta)
        found[name, "S", "S"] = {measure: of_S[measure] for measure in ("gamma", "prefers chosen")} # against itself, the rest is nothing
        for t, table in enumerate(tables[1:], 1):
            found[name, f"after stage {t}", "S"] = held_out(table, tables[0], pairs, beta)
            if t > 1: found[name, f"after stage {t}", f"stage {t-1}"] = held_out(table, tables[t-1], pairs, beta)
    if not found: return pd.DataFrame()
    return pd.DataFrame(found, dtype=object).T.rename_axis(["source", "model", "against"])

def _held(run) -> dict: # name -> keys, tokens
    path = run.folder / "held_out.json"
    return read_part(path) if path.exists() else {}


# %%
held = held_out_table(run)
against_S = held.xs("S", level="against")[["gamma", "prefers chosen", "change of gamma"]]
against_S.map(lambda cell: as_text(cell) if isinstance(cell, tuple) else "")

# %% [markdown]
# Only some fifty pairs of each source are held out here, so the intervals are wide.
#
# ## What did each stage do?
#
# One column per stage. $\gamma$ is how much likelier the chosen response is than the rejected one, in nats. `gamma_ref on D_t` is what the reference of the stage says about its pairs, and `gamma_ref on D_t+1`
# what it says about the next stage's.

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
        columns[f"stage {stage['stage']}"] = {label: _shown(stage.get(name)) for label, name in STAGE_ROWS.items()}
    return pd.DataFrame(columns, dtype=object)

def _shown(value):
    "A number of stage.json as a reader wants it."
    if value is None: return ""
    if isinstance(value, list): return as_text(value, "+.2f")
    return round(value, 3) if isinstance(value, float) else value


# %%
stage_table(run)


# %% [markdown]
# Two rows need a word. `gamma certified by the loss` is the least mean $\gamma$ that the loss allows ([chapter 03](03_loss.ipynb)); the certificate speaks only of the mean, and `pairs below reference` is the share of
# pairs on which the model fell below its reference all the same.
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
        for m in (t - 1, t, len(stages)): # what the signs of failure compare
            _check_table(folders[m], m, rows[m], probes[stage["chunk"]], stage["chunk"])

    parts = []
    for chunk, keys in probes.items():
        for m, table in enumerate(rows):
            if not set(keys) <= set(table.index): continue # this model was not measured on it
            gammas = table.loc[keys, "chosen"] - table.loc[keys, "rejected"]
            parts.append(pd.DataFrame(dict(model=f"M_{m}", chunk=chunk, gamma=gammas.to_numpy())))
    return pd.concat(parts, ignore_index=True)

def _check_table(folder, m, rows, keys, chunk):
    "Raise ValueError where M_m has not read all of these pairs."
    absent = set(keys) - set(rows.index)
    if not absent: return
    path = folder / "logprobs"
    cure = cure_of(path) if m else "run again: they are computed anew"
    raise ValueError(f"{path}: the table of M_{m} lacks {len(absent)} pairs of '{chunk}'; {cure}")


# %%
gammas = gamma_table(run)
assert set(gammas["model"]) == {"M_0", "M_1", "M_2", "M_3"}
gammas.groupby(["chunk", "model"], sort=False)["gamma"].mean().unstack().round(2)


# %% [markdown]
# Read a row from left to right. Which number of a row did training on that very chunk make? For the first row it is the step from `M_0` to `M_1`; the other steps are what the other stages did to it.

# %% [markdown]
# ## From tables to a page
#
# The report is markdown, so every cell goes through one function that takes away what markdown would read as a mark. Names of sources come from users, and a user may call a source `a|b`.

# %%
#| export
def escaped(
    value, # anything that can be printed; a float gets three digits
) -> str:
    "A value as text in one line, in which nothing ends a cell, begins a tag or a picture, or changes the type."
    printed = f"{value:.3f}" if isinstance(value, float) else str(value)
    text = " ".join(printed.splitlines())
    for mark in ("|", "<", "*", "`"): text = text.replace(mark, "\\" + mark)
    return text.replace("![", r"!\[")

def as_markdown(
    frame: pd.DataFrame,
) -> str:
    "A data frame as a markdown table."
    head = [frame.index.name or "", *frame.columns]
    rule = ["---"] * len(head)
    body = [[name, *row] for name, row in zip(frame.index, frame.to_numpy(dtype=object))]
    return "\n".join("| " + " | ".join(map(escaped, row)) + " |" for row in [head, rule, *body])


# %%
print(as_markdown(pd.DataFrame({"accuracy": [0.5]}, index=["a|b <img>"])))


# %% [markdown]
# Each section of the report is a list of paragraphs. *Held out* leads. If nothing was held out, that is the first thing a reader must know.

# %%
#| export
def _held_out_text(run):
    "One table for each comparison."
    found = run.held_out()
    if found.empty:
        return ["## Held-out pairs", "None: everything below is about pairs that were trained on. `eval_share` keeps some aside."]
    sizes = ", ".join(_size(name, held) for name, held in _held(run).items())
    text = ["## Held-out pairs",
            f"Never trained on: {sizes}. Log-probabilities in nats; *loss* and *reward accuracy* take the model that is compared with as the reference."]
    shown = found.map(lambda cell: as_text(cell) if isinstance(cell, tuple) else "").reset_index()
    shown["model"] = shown["source"] + ", " + shown["model"]
    of_S = shown["against"] == "S"
    for title, rows in (("Against S", shown[of_S]), ("Against the stage before", shown[~of_S])):
        if len(rows): text += [f"### {title}", as_markdown(rows.drop(columns=["source", "against"]).set_index("model"))]
    return text

def _size(name, held):
    "How many pairs a source holds out, and how long their responses are."
    chosen, rejected = held["tokens"]["chosen"], held["tokens"]["rejected"]
    return f"{escaped(name)} ({len(held['keys'])} pairs; responses of {chosen:.0f} and {rejected:.0f} tokens on average, chosen and rejected)"


# %%
print(_held_out_text(run)[1])


# %% [markdown]
# Next, what a table of numbers cannot show: what the models *say*. Each of them has answered the same four prompts.

# %%
#| export
def _answers_text(run):
    "What each model answers to the same prompts."
    parts = {}
    for t, folder in enumerate(_model_folders(run)):
        file = folder / "answers.json"
        if file.exists(): parts[f"after stage {t}" if t else "S"] = read_part(file)
    if not parts: return []
    text = ["## Answers", "The likeliest token each time, 64 at most; the prompts are held-out ones where there are any."]
    prompts = next(iter(parts.values()))["prompts"]
    for i, prompt in enumerate(prompts):
        answers = {name: part["answers"][i] for name, part in parts.items()}
        text += [f"**{escaped(prompt.strip())}**", as_markdown(pd.DataFrame({"answer": answers}).rename_axis("model"))]
    return text

def _data_text(run):
    "What was read, dropped and cut, one column per source; of chunks that a function makes, nothing is known."
    path = run.folder / "partition.json"
    counts = read_part(path).get("counts") if path.exists() else None
    if not counts or "rows" not in counts[0]: return []
    return ["## Data", as_markdown(pd.DataFrame(counts).set_index("source").T.rename_axis("rows"))]


# %%
print("\n\n".join(_answers_text(run)[2:4]))


# %% [markdown]
# The partition is an order, and an order looks decided. So a sentence says where it is not: where the intervals of two neighbours overlap, and where the mean per token would have ordered the sources differently from the sum.

# %%
#| export
def undecided(
    measures: pd.DataFrame, # of a partition, in the order of training; indexed by source
    order: str="easy_to_hard", # or hard_to_easy
) -> list[str]:
    "What the order of the sources does not say."
    rows, out = list(measures.iterrows()), []
    for (a, x), (b, y) in zip(rows, rows[1:]):
        overlap = x["low"] <= y["high"] and y["low"] <= x["high"]
        if overlap: out.append(f"The intervals of {a} and {b} overlap: which of them comes first is not decided by these pairs.")
    hard_first = order == "hard_to_easy"
    by_token = measures.sort_values("accuracy_per_token", ascending=hard_first, kind="stable").index.tolist()
    if by_token != measures.index.tolist():
        out.append(f"By the mean log-probability of a token, not the sum, the order would be {', '.join(map(str, by_token))}.")
    return out

def _partition_text(measures, order):
    if measures is None: return []
    ordered = order in ("easy_to_hard", "hard_to_easy")
    words = [escaped(sentence) for sentence in undecided(measures, order)] if ordered else []
    return ["## Partition under S", as_markdown(measures), *words, "![](figures/partition.png)"]


# %%
measures = pd.DataFrame(
    dict(accuracy=[0.6, 0.55], low=[0.5, 0.5], high=[0.7, 0.6], accuracy_per_token=[0.4, 0.6]),
    index=["short", "mixed"])
apart = measures.assign(low=[0.59, 0.5], high=[0.7, 0.56], accuracy_per_token=[0.6, 0.4])
assert undecided(apart) == []
undecided(measures)


# %% [markdown]
# Last, how it was run: enough to run it again, and to know what it cost.

# %%
#| export
def _signs_text(gammas, metrics):
    signs = [f"- {escaped(sign)}" for sign in failure_signs(gammas, metrics)]
    return ["## Signs of failure", "\n".join(signs) or "None of forgetting, instability, minimal improvement.", FALSE_ALARMS]

def _run_text(run, metrics):
    "The command, versions, tokens, time and memory; then all settings."
    config = run.config
    sources = [f"{name}: {what or 'from memory'}" for name, what in config["sources"].items()]
    facts = {
        "command": config.get("command", "unknown"),
        "model": config["model"],
        "revision of the model": config.get("revision") or "none",
        "weights of S": config["weights"],
        "hash of the pairs": config["pairs"],
        "sources": "; ".join(sources) or "made by a function",
        "device": config["device"],
        **{f"version of {name}": number for name, number in config["versions"].items()},
        **config.get("machine", {}),
        "tokens trained on": f"{metrics['tokens'].sum():,}",
        "optimizer steps": f"{len(metrics):,}",
        **_costs(run),
    }
    return ["## How it was run", _values(facts, "what"), "## Settings", _values(config["settings"], "setting")]

def _costs(run):
    "Time and memory of the stages, as far as they are known."
    files = [folder / "cost.json" for folder in _model_folders(run)]
    costs = [read_part(file) for file in files if file.exists()]
    seconds = sum(cost["seconds"] for cost in costs)
    peak = max((cost["peak_gib"] for cost in costs), default=0)
    took = f"{seconds // 60} min {seconds % 60} s (of a stage that was interrupted, of its last call)"
    return {"time of the stages": took if costs else "unknown",
            "peak memory": f"{peak:.1f} GiB" if peak else "unknown"}

def _values(values, name):
    "Names and values as a table."
    printed = {k: str(v) for k, v in values.items()}
    return as_markdown(pd.DataFrame({"value": printed}).rename_axis(name))


# %%
print("\n".join(_values(run.config["settings"], "setting").splitlines()[:6]))


# %% [markdown]
# ## The report
#
# A finished run may lie on a disk that can only be read: then there is nothing to write, but still much to show. And a name may hold a dollar sign, which
# Matplotlib would take for the beginning of a formula.

# %%
#| export
@dataclass
class Report:
    "report.md of a run; a notebook shows it with its figures."
    path: Path

    def _repr_markdown_(self):
        if not self.path.exists(): return f"{self.path}: not written"
        return re.sub(r"!\[\]\((figures/\w+\.png)\)", self._embedded, self.path.read_text(encoding="utf-8"))

    def _embedded(self, match):
        picture = (self.path.parent / match[1]).read_bytes()
        return f"![](data:image/png;base64,{base64.b64encode(picture).decode()})"

def write_report(
    run: Run, # with a finished stage
) -> Report:
    """report.md: what came of it, what was read, the stages, what to worry about, how it was run.

    Where it cannot be written, this is said in one line.
    """
    metrics, gammas = run.metrics, gamma_table(run)
    measures = run.partition() if run.config["sources"] else None # chunks that a function makes have none
    text = _report_text(run, metrics, gammas, measures)
    figures, path = run.folder / "figures", run.folder / "report.md"
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
    drawn = dict(
        loss=plot_loss(metrics),
        change=plot_change(gammas.assign(chunk=plain(gammas["chunk"]))),
        drift=plot_drift(metrics),
    )
    if measures is None: return drawn
    sources = measures.reset_index()
    return drawn | dict(partition=plot_partition(sources.assign(source=plain(sources["source"]))))

STAGES_TEXT = ("Stage t trains on the chunk D_t and ends in the model M_t; M_0 is S. Gamma is how much more likely the chosen response is than the rejected one, in nats. "
               "All of it is measured on pairs that were trained on: a check of the training, not of its success.")

def _report_text(run, metrics, gammas, measures):
    "One section after the other, the answer first."
    config, T = run.config, len(run.stages)
    model = run.model_folder().relative_to(run.folder)
    text = [
        f"# Stepwise DPO of {escaped(config['model'])} in {T} {'stage' if T == 1 else 'stages'}",
        f"The trained model lies in `{model}`. Intervals are 95 % intervals: Student's for means, Wilson's for shares.",
        *_held_out_text(run),
        *_answers_text(run),
        *_data_text(run),
        *_partition_text(measures, config["settings"]["order"]),
        "## Stages", STAGES_TEXT, as_markdown(run.table()),
        *(f"![](figures/{name}.png)" for name in ("change", "loss", "drift")),
        *_signs_text(gammas, metrics),
        *_run_text(run, metrics),
    ]
    return "\n\n".join(text) + "\n"


# %%
report = write_report(run)
headings = [line for line in report.path.read_text().splitlines() if line.startswith("##")]
assert headings[0] == "## Held-out pairs"
headings

# %% [markdown]
# In a notebook, `run.report()` shows the page with its figures. This one shows how $\gamma$ changed from S to each later model, on the probe of each chunk:

# %%
plot_change(gammas);


# %% [markdown]
# ## To give away
#
# A model that leaves its run needs a card: what it was made of, by which method, and what came out. `sdpo push` writes one and uploads both. `export` does the same into a folder, so that you can look first. A path on your machine says nothing to others, so
# the card names the model and the data only if they have a name on the hub.

# %%
#| export
def _hub_ids(config):
    "What a run used that others can find by name: the base model, the data sets."
    sources = [what.get("source") if isinstance(what, dict) else what for what in config["sources"].values()]
    base = config["model"] if _on_hub(config["model"]) else None
    return base, [source for source in sources if _on_hub(source)]

def _on_hub(name): return isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()

def model_card(
    run: Run, # with a finished stage
) -> ModelCard:
    "The card of the last stage's model, for the hub."
    base, data = _hub_ids(run.config)
    about = ModelCardData(
        base_model=base,
        datasets=data or None,
        library_name="transformers",
        tags=["dpo", "stepwise-dpo", "sdpo", "alignment"],
    )
    c, T = run.config["settings"], len(run.stages)
    method = (f"Trained by stepwise DPO (sDPO, [arXiv 2403.19270](https://arxiv.org/abs/2403.19270)) in {T} {'stage' if T == 1 else 'stages'} "
              "with [sdpo_nb](https://github.com/sdpo-nb/sdpo_nb): the model that a stage leaves behind is the reference of the next. ")
    how = f"beta = {c['beta']}, learning rate {c['lr']}, {c['batch_size']} pairs a step, {c['epochs']} epoch(s) a stage, {c['precision']}."
    text = [
        f"# {escaped(Path(run.config['model']).name)}, aligned by stepwise DPO",
        method + how,
        *_held_out_text(run),
        "## Stages", as_markdown(run.table()), "![](figures/change.png)",
        *_data_text(run),
    ]
    return ModelCard(f"---\n{about.to_yaml()}\n---\n\n" + "\n\n".join(text) + "\n")


# %%
print(model_card(run).content[:560])


# %%
#| export
def export_model(
    run: Run, # with a finished stage
    folder, # must not exist
) -> Path:  # the same folder
    """The last stage's model with its card and figure, as it would be pushed.

    Raises ValueError for a folder that exists, or a model that is not the one that the stage saved.
    """
    folder = Path(folder)
    for there in (folder, folder.with_suffix(".tmp")): # the second is where it is made
        if there.exists(): raise ValueError(f"{there}: is there already; give a folder that does not exist")
    load_stage(run.model_folder().parent, "cpu") # it must be the model that the stage saved
    run.report()
    with replacing(folder) as tmp:
        shutil.copytree(run.model_folder(), tmp)
        (tmp / "figures").mkdir()
        shutil.copy(run.folder / "figures/change.png", tmp / "figures/change.png")
        model_card(run).save(tmp / "README.md")
    return folder

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
given = export_model(run, tmp / "to-give")
sorted(str(path.relative_to(given)) for path in given.rglob("*") if path.is_file())

# %%
#| hide
shutil.rmtree(tmp)

# %% [markdown]
# ## What you now have
#
# `Run(folder)` reads any run: settings, stages, steps, models. `run.table()`, `run.held_out()` and `gamma_table(run)` are what it found; `run.report()` is the page, `run.export(...)` and `run.push(...)` the model with
# its card.
#
# ## Questions to test yourself
#
# 1. The table of stages shows a large change of $\gamma$ in every stage. Why is that no proof that the model is better?
#
# <details><summary>Answer</summary>
#
# It is measured on pairs that were trained on. A model that learned them by heart would show the same. Held-out pairs, which lead the report, were never trained on.
#
# </details>
#
# 2. Why does every model read a probe of *every* chunk, also of those that come later?
#
# <details><summary>Answer</summary>
#
# To see two things that one chunk alone cannot show: whether a later stage undoes what an earlier one learned, and how high the bar of a later stage has become before it starts.
#
# </details>
#
# 3. Why does the report say that two sources whose intervals overlap are not ordered?
#
# <details><summary>Answer</summary>
#
# The accuracies come from a sample of pairs. If the intervals overlap, another sample could well have put the two the other way round.
#
# </details>
#
# ## Try this
#
# Call the first source `$ 5|<b>` and make a report.
#
# <details><summary>What you should see</summary>
#
# The name as you typed it. In the tables the marks of markdown are escaped, in the figures the dollar sign is.
#
# </details>
