# %% [markdown]
# # Stepwise DPO
# > Stage after stage: the model that one stage leaves behind is the reference of the next.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/14_stepwise.ipynb)
#
# **You should know** what [the DPO loss](03_loss.ipynb) and [the order of sources](05_partition.ipynb) are. You can read this chapter without 09 to 13, which hold the machinery. **Time** 45 minutes to read, a minute and a half to run.
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
    source = '"sdpo_nb @ git+https://github.com/sdpo-nb/sdpo_nb@v0.1.0"'
    get_ipython().run_line_magic("pip", f"install -q {source}")
again = "On Colab, choose Runtime > Disconnect and delete runtime, then run this cell again."
assert importlib.util.find_spec("sdpo_nb"), f"pip could not install sdpo_nb, see above. {again}"

import sdpo_nb
version = sdpo_nb.__version__
assert version == "0.1.0", f"This page is made for sdpo_nb 0.1.0, and {version} is installed. {again}"

# %%
#| export
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
from datasets import concatenate_datasets

from sdpo_nb.evaluate import held_out
from sdpo_nb.folder import (
    alone_in, cure_of, finished_stages, load_any, load_saved_tokenizer, read_part, stage_folders
)
from sdpo_nb.logprobs import (
    Clock, check_model, check_rows, load_tokenizer, pair_tokens, pairs_hash, pick_precision, weights_hash,
    write_lines
)
from sdpo_nb.plan import (
    StepwiseConfig, asked_device, check_apart, check_names, extent, load_sources, part_sources, read_rows
)
from sdpo_nb.preferences import Source, normalise
from sdpo_nb.report import Run
from sdpo_nb.stages import Context, free_model, made_chunk, prepare_run, run_stage, tracking
from sdpo_nb.trainer import epoch_order

# %%
import math, tempfile

import matplotlib.pyplot as plt
import seaborn as sns
import torch.nn.functional as F

from sdpo_nb.evaluate import answers_beside, as_text
from sdpo_nb.figures import plot_gamma, plot_models
from sdpo_nb.logprobs import load_model, read_table, score_pairs
from sdpo_nb.packing import packed_logprobs
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.report import gamma_table
from sdpo_nb.trainer import TrainConfig, train_stage
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
# That is sDPO. What the loop lacks is everything around it. The order was typed by hand. A crash in the third stage costs the first two. Next week nobody can say what was trained on what. And no number says whether a stage did any good.

# %% [markdown]
# ## The loop in a folder
#
# Four chapters hold what is missing: a run lives in [a folder](10_folder.ipynb), [its report](11_report.ipynb) says what came out, [what is asked](12_plan.ipynb) is checked before anything is computed, and [a stage](13_stages.ipynb) asks its reference, trains, measures and saves. So the loop stays short: find the last finished
# stage, load its model, go on. It must end in the same weights as the four lines.

# %%
#| export
def sdpo(
    model,              # hub id, folder, or a loaded causal LM (then with its tokenizer)
    sources: dict=None, # name -> data, as for `load_sources`; none where `chunks` is a function
    config: StepwiseConfig=None, # default: all defaults
    folder="runs/sdpo", # the run's; the same call on the same folder goes on where it stopped
    tokenizer=None,     # of a loaded model; of one that is named, in place of its own
    logprobs=None,      # (model, pairs) -> (chosen, rejected); None: packed where the guard agrees
    revision: str=None, # commit of a model on the hub
    held_out: dict=None, # sources of their own that are measured after every stage and never trained on
    on_step=None,       # called after each optimizer step, with its line of metrics.jsonl and its stage
    on_stage=None,      # called after each stage, with the run as it stands
) -> Run:
    """Stepwise DPO (arXiv 2403.19270, section 3): one DPO stage per chunk, the reference moving up.

    Raises ValueError for what cannot work, before anything is computed.
    """
    folder = Path(folder).expanduser()
    with alone_in(folder):
        asked = model, sources, config, folder, tokenizer, logprobs, revision, held_out
        ctx, chunks, policy = prepare_run(*asked)
        ctx.on_step, ctx.on_stage = on_step, on_stage
        with tracking(ctx.config, ctx.folder) as ctx.tracker:
            run = _all_stages(ctx, chunks, policy)
        run.report()
    return run

def _all_stages(ctx, chunks, policy):
    "From the last finished stage to the end."
    made = callable(ctx.config.chunks)
    t = begun = len(stage_folders(ctx.folder))
    if t:
        free_model(policy)
        policy = ctx.load(t)
    if made: chunks = [made_chunk(i, None, ctx) for i in range(1, t + 1)]
    ctx.before = sum(s["steps"] for s in Run(ctx.folder).stages)
    while True:
        new = made_chunk(t + 1, policy, ctx) if made else None
        if new: chunks.append(new)
        _drop_checkpoints(ctx, last=t == len(chunks) and not made) # a function may have more pairs later
        if t == len(chunks): break
        if t and t == begun: _check_exact(t, policy, ctx)
        t += 1
        policy = run_stage(t, chunks, policy, ctx)
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

def _check_exact(t, policy, ctx):
    "Raise ValueError where M_t was loaded rounded, since the checkpoint with its exact weights is gone."
    found, ended = weights_hash(policy), read_part(ctx.at(t) / "stage.json")["end"]
    if found == ended: return
    path = ctx.at(t) / "checkpoint"
    raise ValueError(f"{path}: is missing, and the model beside it is rounded: it has weights {found}, and stage {t} "
                     f"ended with {ended}, where stage {t+1} must begin; {cure_of(path)}")


# %% [markdown]
# ## A run
#
# `sdpo` does everything that the four lines did, and keeps it in a folder. The settings are those of the four lines. The order is now the partition's: by *reward accuracy*, the share of pairs whose chosen response S already finds likelier.

# %%
asked = dict(model=w.base, sources=w.sources, config=StepwiseConfig(**quick), folder=tmp / "run")
run = sdpo(**asked)
run.partition()[["n", "accuracy", "low", "high", "mean_gamma"]].round(3)

# %% [markdown]
# The order is the one that was typed by hand, and so are the models, stage by stage, to the bit:

# %%
assert [s["end"] for s in run.stages] == ends[1:]
run.table()

# %% [markdown]
# Three rows matter now, `reference`, `first loss` and `change of gamma`; [chapter 11](11_report.ipynb) explains the others. Each stage's reference is the model before it. The hashes say so, and the first loss agrees: a model that is its own reference starts at $\ln 2 = 0.693$. And each stage has raised $\gamma$ on its own chunk, since all three intervals lie above 0.

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
    tokenizer=None,     # of a loaded model; of one that is named, in place of its own
    logprobs=None,      # (model, pairs) -> (chosen, rejected)
    revision: str=None, # commit of a model on the hub
    held_out: dict=None, # sources that are only measured
) -> Run:
    "The beginning of `sdpo`: M_0's pass and the partition. `sdpo` with the same arguments goes on from here."
    folder = Path(folder).expanduser()
    with alone_in(folder):
        prepare_run(model, sources, config, folder, tokenizer, logprobs, revision, held_out)
    return Run(folder)


# %%
looked = sdpo_partition(**asked | dict(folder=tmp / "looked"))
assert looked.partition().equals(run.partition())
looked.stages


# %% [markdown]
# ### The chunks as files
#
# Some people want the order and the chunks, and train with something else: on many cards, or with [TRL](with_trl.ipynb). For them the chunks become files, `chunk-1.jsonl` and so on. What should stand in such a file?
#
# - **The texts, not the token ids.** Each pair as it stood in its source, as `prompt`, `chosen` and `rejected`: three strings, or three lists of messages. A system message and earlier turns are part of the prompt. So TRL reads the file, and so does `sdpo`.
# - **Nothing else.** Rows that were dropped or held out are not in it, and no row says more than it said.
# - **The order of training.** A stage shuffles its chunk, and draws the order from its seed ([chapter 06](06_trainer.ipynb)). The file has the order of the first epoch. Whoever reads it from top to bottom sees the batches that a run sees.
#
# `partition.json` numbers the pairs, and each pair knows the row that it came from. So the sources are read again. If they have changed since, the numbers mean other pairs; then nothing is written.

# %%
#| export
def _settings_of(run):
    "What the run was asked for, with the defaults of what it does not say."
    defaults = {f.name: f.default for f in fields(StepwiseConfig)}
    return SimpleNamespace(**defaults | run.config["settings"])

def _texts_of(run, settings, sources, tokenizer=None):
    "A function: the number of a pair in partition.json -> the pair as texts or messages."
    sources = _same_names(run.config["sources"], sources)
    tokenizer = tokenizer or load_tokenizer(run.model_folder(0).as_posix(), run.config.get("revision"))
    read = load_sources(sources, tokenizer, settings)
    trained = {s.name: s for s in part_sources(read, sources, settings)[0]}

    groups = settings.chunks if isinstance(settings.chunks, list) else [list(trained)]
    places = [(name, row) for name in sum(groups, []) for row in trained[name].pairs["row"]]
    found = pairs_hash(*(trained[name].pairs for name in sum(groups, [])))
    if found != run.config["pairs"]:
        raise ValueError(f"{run.folder}: its sources, or its tokenizer, give other pairs now (their hash is {found}, "
                         f"and was {run.config['pairs']}), so its chunks cannot be written")
    rows = {name: read_rows(name, what) for name, what in sources.items()}

    def texts(i):
        name, row = places[i]
        chat = bool(trained[name].counts["chat"])
        pair = normalise(rows[name][row], f"source '{name}', row {row}", chat)
        sides = {side: [pair[side]] if pair["chat"] else pair[side] for side in ("chosen", "rejected")}
        return dict(prompt=pair["prompt"]) | sides
    return texts

def _same_names(written, given):
    "The sources of a run in its order: those given, or those that config.yaml names."
    sources = written if given is None else given
    if not isinstance(sources, dict): raise ValueError(f"sources: expected {{'name': data}}, got {str(sources)[:60]}")
    if set(sources) != set(written):
        raise ValueError(f"sources: the run has {', '.join(written)}, and {', '.join(sources)} are given")
    for name in written:
        if sources[name] is None or isinstance(sources[name], Source):
            raise ValueError(f"sources: the texts of '{name}' are in no file that config.yaml names; "
                             "give the sources, as files or rows")
    return {name: sources[name] for name in written}


# %%
texts = _texts_of(looked, _settings_of(looked), None)
assert texts(0)["prompt"] == load_pairs(w.sources[next(iter(w.sources))])[0]["prompt"]
texts(0)


# %% [markdown]
# Pair 0 is the first row of the first source that was given. What is left is to write. A folder with `chunk-4.jsonl` of an export of yesterday, when there were four, would look like one of four chunks; it is refused.

# %%
#| export
def export_chunks(
    run: Run, # whose sources are partitioned; no stage need be finished
    out,      # folder for chunk-1.jsonl, chunk-2.jsonl, ...
    sources: dict=None, # as the run was given them; none: from where its config.yaml says that they lie
    tokenizer=None, # where the run was given one of its own
) -> list[Path]: # the files, in the order of training
    """Each chunk as a file that TRL reads: prompt, chosen and rejected as text or as messages.

    One pair a line, in the order of the first epoch.

    Raises ValueError where the chunks are not known, the sources are not those of the run, or a file
    would take the place of one.
    """
    out, path = Path(out).expanduser(), run.folder / "partition.json"
    if not path.exists(): raise ValueError(f"{path}: there is none, so there are no chunks to write")
    chunks, settings = read_part(path)["chunks"], _settings_of(run)
    _check_no_other_chunks(out, len(chunks))
    files = [out / f"chunk-{t}.jsonl" for t in range(1, len(chunks) + 1)]
    for file in files:
        for some in (sources, run.config["sources"], run.config.get("held_out")): check_apart(file, some)
    texts = _texts_of(run, settings, sources, tokenizer)
    for file in files: file.unlink(missing_ok=True) # or a call that dies leaves some of these and some older ones
    for t, (file, rows) in enumerate(zip(files, chunks), 1):
        order = epoch_order(len(rows), settings.seed, t, 0, settings.shuffle)
        write_lines(file, (texts(rows[i]) for i in order))
    return files

def _check_no_other_chunks(out, T):
    "Raise ValueError where a file of another export would stay beside those of this one."
    new = {f"chunk-{t}.jsonl" for t in range(1, T + 1)}
    for path in sorted(out.glob("chunk-*.jsonl")):
        if path.name in new: continue
        raise ValueError(f"{path}: of other chunks, as these are {T}; delete it, or name another folder")


# %% [markdown]
# The first lines of the first file, and the files as sources of a new run: every chunk has the pairs that it had.

# %%
files = export_chunks(looked, tmp / "files")
print("\n".join(files[0].read_text().splitlines()[:2]))
chunk_1 = tokenize_pairs(load_pairs(files[0]), tok).pairs["key"][:]
same_pairs = chunks["primer"]["key"][:]
first_epoch = epoch_order(len(same_pairs), seed=0, stage=1, epoch=0)
assert chunk_1 == [same_pairs[i] for i in first_epoch]
pd.Series({file.name: len(file.read_text().splitlines()) for file in files}, name="pairs").to_frame()


# %% [markdown]
# ### And back: models from elsewhere
#
# The models that another trainer makes are folders with weights or with an adapter, and no run. What do they say about pairs? All of them read the same pairs, and each is compared with the first, pair by pair. That takes one pass for each model, and the numbers are kept under the hash of its weights: a call that is killed goes on, and a model that was read before is not read again.
#
# There is one trap. Every model gets the token ids of the *first* model's tokenizer. A model with another vocabulary would read other texts, and give numbers all the same. So the vocabularies are compared before anything is computed.

# %%
#| export
def _check_same_tokens(models):
    "The first model's tokenizer. Raises ValueError for a model in whose vocabulary a token has another id."
    if not models or not isinstance(models, dict):
        raise ValueError(f"models: {models or 'none'}; expected {{'name': 'folder or hub id'}}")
    first = next(iter(models))
    tokenizer = load_saved_tokenizer(models[first])
    for name, place in list(models.items())[1:]:
        theirs = load_saved_tokenizer(place).get_vocab()
        other = [token for token, i in tokenizer.get_vocab().items() if theirs.get(token) != i]
        if not other: continue
        raise ValueError(f"models: '{name}' has another vocabulary than '{first}': {len(other)} tokens "
                         f"have another id or none, e.g. {min(other)!r}")
    return tokenizer

def _read_by(name, place, pairs, config, folder, clock):
    "The table of one model, in a folder that has the hash of its weights for a name."
    model = load_any(place, asked_device(config))
    check_model(model)
    check_rows(model, *extent(pairs))
    precision = pick_precision(config.precision, model.device)
    ctx = Context(config, folder, place, None, model.device, precision, None, None, clock=clock)
    table = ctx.score_to(Path(folder) / weights_hash(model), model, pairs, f"{name} reads")
    free_model(model)
    return table

def measure_models(
    models: dict,  # name -> folder (a model, or an adapter of PEFT) or hub id; the others are compared with the first
    sources: dict, # name -> data, as for `load_sources`
    config: StepwiseConfig=None, # its lengths, precision, packing, token_budget and device count
    folder="runs/measure", # where the tables are kept; the same call goes on where it stopped
) -> pd.DataFrame: # source, model: the index; pairs, and (mean, low, high) of what `held_out` measures without beta
    """What any models say about pairs, and what changed against the first of them, pair by pair.

    Raises ValueError for a model with another vocabulary, for sources that cannot be read, or with an eval_share.
    """
    config, folder = config or StepwiseConfig(), Path(folder).expanduser()
    asked_device(config)
    check_names(sources)
    check_apart(folder, sources)
    tokenizer = _check_same_tokens(models)
    read = load_sources(sources, tokenizer, config)
    if part_sources(read, sources, config)[1]:
        raise ValueError("eval_share: every pair of a source is measured, and none is held out; leave it out")
    pairs = concatenate_datasets([s.pairs for s in read])
    clock = Clock(len(models) * pair_tokens(pairs).sum())
    with alone_in(folder):
        tables = {name: _read_by(name, place, pairs, config, folder, clock) for name, place in models.items()}
    return _measured(tables, read)

def _measured(tables, sources):
    "What the tables say, one row for each source and model."
    first = next(iter(tables))
    found = {}
    for source in sources:
        for name, table in tables.items():
            row = held_out(table, tables[first], source.pairs, beta=1.)
            del row["loss"] # a matter of the trainer's beta
            against_itself = [] if name != first else [m for m in row if m not in ("gamma", "prefers chosen")]
            for measure in against_itself: row[measure] = None
            found[source.name, name] = dict(pairs=len(source)) | row
    return pd.DataFrame(found, dtype=object).T.rename_axis(["source", "model"])


# %% [markdown]
# S, and two models of the run, as if they came from elsewhere. They read the chunk that only $M_3$ was trained on:

# %%
elsewhere = {"S": w.base, "two stages": run.model_folder(2), "three stages": run.model_folder(3)}
riddle = dict(riddle=w.sources["riddle"])
measured = measure_models(elsewhere, riddle, StepwiseConfig(**quick), tmp / "measure")
words = measured.map(lambda cell: as_text(cell, ".2f") if isinstance(cell, tuple) else "")
words.drop(columns="pairs")


# %% [markdown]
# *Change of gamma* is what to look at: it is paired. These are the numbers that the run has written down of the same models and pairs. The figure needs the change alone:

# %%
#| export
def changes_of(
    measured: pd.DataFrame, # of `measure_models`
) -> pd.DataFrame: # source, model, mean, low, high: what `plot_models` draws
    "The change of gamma of each model but the first."
    change = measured["change of gamma"].dropna()
    cells = pd.DataFrame(change.tolist(), columns=["mean", "low", "high"], index=change.index)
    return cells.reset_index()


# %%
of_run = gamma_table(run).query("chunk == 'riddle'").groupby("model")["gamma"].mean()
changes = changes_of(measured).set_index("model")["mean"]
assert abs(changes["three stages"] - (of_run["M_3"] - of_run["M_0"])) < 1e-4
assert abs(changes["two stages"] - (of_run["M_2"] - of_run["M_0"])) < 1e-4
plot_models(changes_of(measured), "S");

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
# So a moving reference takes the leash off and fastens it again, one model further. That is the whole difference, and it cuts both ways: the policy is pulled further from S, for better or for worse. If every stage found the same reward and reached its optimum, $T$ stages at $\beta$ would end where one stage at
# $\beta/T$ ends ([chapter 03](03_loss.ipynb)); with few pairs for each stage they do not: [farther](experiments/finite_data.ipynb), or nearer where the pairs are [known by heart](experiments/finite_data_tested.ipynb).
#
# ## Signs of failure
#
# The report looks for [four of them](08_evaluate.ipynb): *forgetting*, where a later stage undoes what an earlier one learned; *instability*, where the loss ends above its start; *minimal improvement*, a stage that changed nothing; and *made worse*, a stage that moved its own pairs the wrong way. This run has none. With a learning rate that is too small for so few steps, each stage has one.

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
def losses(run): return run.metrics.query("stage == 2").set_index("step")["loss"]

curves = pd.DataFrame({name: losses(run) for name, run in both.items()})
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
# What is lost when a run dies is time: the steps since the last checkpoint, at most `save_every` of them, are made again. They come out the same; tests do this with a real SIGKILL. Here the second stage is interrupted by an exception, in the fiftieth batch of the run.

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
def share_right(model): return score_responses(model, tok, w.test, tau=0)["exact"].mean()

exact = {"S": share_right(S), "M_3": share_right(run.model)}
assert exact["M_3"] > exact["S"]
print(f"right of {len(w.test)} test prompts: S {exact['S']:.0%}, after three stages {exact['M_3']:.0%}")

# %% [markdown]
# Alignment is a change of odds, not a switch. Some wrong answers became right, some are wrong in another way, and a few right ones were lost.

# %% [markdown]
# ## What this does not show
#
# Nothing here says that stages *help*. $T$ stages at $\beta$ may do what one stage at $\beta/T$ does, and so the [demo](demo.ipynb) puts DPO at $\beta/T$ beside every stepwise run.

# %%
#| hide
shutil.rmtree(tmp)

# %% [markdown]
# ## What you now have
#
# `sdpo(...)`: stages, a moving reference that is a table with a hash, a folder that survives a kill, a report that says which model was measured
# against which. And a way out and back for other trainers: `export_chunks` writes the chunks as files, `measure_models` compares what was made of them.
#
# ## Questions to test yourself
#
# 1. The reference of stage 2 is $M_1$, and the policy of stage 2 starts as $M_1$. Why is that not a contradiction: how can a model be held near itself?
#
# <details><summary>Answer</summary>
#
# Only at the first step are they the same. The reference is a table of numbers that stays as it is, while the policy moves. The loss asks the policy to gain on those numbers, and $\beta$ says how soon a gain is enough.
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
# 3. Somebody adds ten rows to a source, after the partition and before `export_chunks`. Why is nothing written, although all old rows are still there?
#
# <details><summary>Answer</summary>
#
# `partition.json` has numbers of pairs. With rows more, the numbers may mean other pairs, and the files would look as good as the right ones. The hash of all pairs is the only thing that can tell, and it differs.
#
# </details>
#
# 4. Why may `save_every` change between two calls on one folder, and `probe` not?
#
# <details><summary>Answer</summary>
#
# `save_every` changes no number. `probe` decides on which pairs the models are measured; with another one, two stages of the same run would be measured on different pairs.
#
# </details>
#
# ## Try this
#
# 1. Run `order="hard_to_easy"`. Look at `gamma_ref on D_t` of stage 3, beside `mean_gamma` in `run.partition()`.
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
