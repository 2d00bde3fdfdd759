# %% [markdown]
# # Stepwise DPO
# > Stage after stage: the model of one stage is the reference of the next. A run is a folder.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/09_stepwise.ipynb)

# %%
#| default_exp stepwise

# %%
#| export
import difflib, hashlib, json, math, os, shutil
from dataclasses import dataclass, fields, asdict
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import yaml
from datasets import Dataset, load_from_disk

from sdpo_nb.figures import plot_drift, plot_gamma, plot_loss, plot_partition
from sdpo_nb.logprobs import LogprobTable, load_model, load_tokenizer, pick_precision, response_logprobs, score_pairs, weights_hash, write_json
from sdpo_nb.loss import certificate, dpo_loss, reward_accuracy
from sdpo_nb.partition import ORDERS, Partition, partition
from sdpo_nb.preferences import Source, counts_table, load_pairs, tokenize_pairs
from sdpo_nb.world import mean_interval
from sdpo_nb.trainer import TrainConfig, check_settings, make_accelerator, setting, train_stage


# %% [markdown]
# ## Settings

# %%
#| export
@dataclass
class StepwiseConfig(TrainConfig):
    "Settings of a run: those of a stage, and what the stages are."
    order: str = setting("easy_to_hard", "which chunk comes first", choices=ORDERS)
    chunks: object = setting(None, "number of stages T; by default one per source. In Python also a list of lists of source names, or a function (t, model) -> pairs, None to end")
    init_target: str = setting("previous", "weights a stage starts from: M_{t-1}, or the SFT base S", choices=("previous", "S"))
    reference: str = setting("moving", "moving (M_{t-1}), fixed (S), or the folder of a model")
    restart: str = setting("stage", "a new optimizer and schedule each stage, or one for the whole run", choices=("stage", "never"))
    max_length: int = setting(1024, "longest prompt + response in tokens; the response's tail is cut", 2)
    max_prompt_length: int = setting(512, "longest prompt in tokens; its end is kept", 1)
    probe: int = setting(512, "pairs per chunk on which every model is measured for the report", 1)

FREE = {"save_every", "probe"} # settings that change no weight

def defaults_table() -> pd.DataFrame:
    "Every setting, its default and what it means."
    return pd.DataFrame([(f.name, f.default, f.metadata["help"]) for f in fields(StepwiseConfig)], columns=["setting", "default", "meaning"]).set_index("setting")


# %%
#| export
def make_config(settings: dict, # names and values, from a file or a command line
               ) -> StepwiseConfig:
    "A StepwiseConfig; raises ValueError naming an unknown setting and the one that was probably meant."
    known = [f.name for f in fields(StepwiseConfig)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(f"unknown setting '{name}'" + (f"; did you mean '{near[0]}'?" if near else f"; settings are {', '.join(known)}"))
    return StepwiseConfig(**settings)


# %% [markdown]
# ## A run is a folder

# %%
#| export
@dataclass
class Run:
    "A run folder, read."
    folder: Path

    @property
    def config(self) -> dict: return yaml.safe_load((self.folder / "config.yaml").read_text())
    @property
    def stages(self) -> list: return [json.loads(p.read_text()) for p in _numbered(self.folder, "stage.json")]
    @property
    def metrics(self) -> pd.DataFrame:
        return pd.concat([pd.read_json(p, lines=True).assign(stage=t) for t, p in enumerate(_numbered(self.folder, "metrics.jsonl"), 1)], ignore_index=True)
    @property
    def model(self): return load_model(str(self.model_folder()))
    @property
    def tokenizer(self): return load_tokenizer(str(self.model_folder()))

    def model_folder(self, t: int=-1) -> Path: # of M_t; -1: the last
        return _numbered(self.folder, "model")[t if t < 0 else t - 1]
    def partition(self) -> pd.DataFrame: return pd.DataFrame(json.loads((self.folder / "partition.json").read_text())["measures"])
    def table(self) -> pd.DataFrame: return stage_table(self)
    def report(self): return write_report(self)

def _numbered(folder, name): return sorted(Path(folder).glob(f"stage-*/{name}"), key=lambda p: int(p.parent.name.split("-")[1]))


# %% [markdown]
# ## Where things start

# %%
#| export
def load_sources(sources: dict, # name -> path, hub id, rows, Dataset, `Source`, or dict(source=..., split=, revision=, columns=, chat=)
                 tokenizer, config: StepwiseConfig,
                ) -> list[Source]:
    "Tokenise every source; raises ValueError naming the source that cannot be used."
    if not sources: raise ValueError("sources: at least one is needed, as {'name': 'file, folder or hub id'}")
    out = []
    for name, what in sources.items():
        if isinstance(what, Source): out.append(what); continue
        spec = dict(what) if isinstance(what, dict) else dict(source=what)
        chat = spec.pop("chat", False)
        out.append(tokenize_pairs(load_pairs(**spec), tokenizer, name, config.max_length, config.max_prompt_length, chat))
    return out


# %%
#| export
def _open_folder(folder, config, identity):
    "Write config.yaml, or compare with the one that is there; raises ValueError naming what differs."
    folder.mkdir(parents=True, exist_ok=True)
    settings = {k: v if isinstance(v, (int, float, str, list, type(None))) else getattr(v, "__qualname__", str(v)) for k, v in asdict(config).items()}
    new, path = dict(identity, settings=settings), folder / "config.yaml"
    if path.exists():
        old = yaml.safe_load(path.read_text())
        for k in new["settings"]:
            if k not in FREE and old["settings"].get(k) != new["settings"][k]:
                raise ValueError(f"{folder}: this run was started with {k}={old['settings'].get(k)!r}, not {new['settings'][k]!r}; use another folder")
        for k in identity:
            if k != "versions" and old.get(k) != new[k]: raise ValueError(f"{folder}: this run was started with another {k} ({old.get(k)} there, {new[k]} here); use another folder")
        return
    tmp = path.with_suffix(".tmp"); tmp.write_text(yaml.safe_dump(new, sort_keys=False)); os.replace(tmp, path)

def _versions(): return {p: version(p) for p in ("torch", "transformers", "datasets", "accelerate")}


# %%
#| export
def _base(model, tokenizer, folder):
    "The folder of S, its tokenizer; a loaded model is saved into the run first, so that every model is a folder."
    if isinstance(model, (str, Path)):
        tokenizer = tokenizer or load_tokenizer(str(model))
        return str(model), tokenizer
    if tokenizer is None: raise ValueError("a loaded model needs its tokenizer: sdpo(model=..., tokenizer=...)")
    path = folder / "base" / "model"
    if not path.exists(): save_model(model, tokenizer, path)
    return str(path), tokenizer

def save_model(model, tokenizer, path):
    "save_pretrained under a temporary name, then renamed."
    tmp = Path(path).with_name(Path(path).name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    model.save_pretrained(tmp); tokenizer.save_pretrained(tmp); os.replace(tmp, path)


# %% [markdown]
# ## The loop

# %%
#| export
def sdpo(model,              # hub id, folder, or a loaded causal LM (then with `tokenizer`)
         sources: dict,      # name -> path, hub id, rows, ...; see `load_sources`
         config: StepwiseConfig=None,
         folder="runs/sdpo", # a folder that holds the same run continues
         tokenizer=None,
         logprobs=response_logprobs, # (model, pairs) -> (chosen, rejected)
        ) -> Run:
    "Stepwise DPO: partition, then one DPO stage per chunk, the reference moving up. Source: arXiv 2403.19270, section 3."
    ctx, plan, policy = _prepare(model, sources, config, folder, tokenizer, logprobs)
    t = len(_numbered(ctx.folder, "stage.json"))
    if t: _free(policy); policy = load_model(ctx.model_folder(t), ctx.device)
    while (chunk := plan.next(t + 1, policy)) is not None:
        t += 1
        policy = _stage(t, chunk, plan, policy, ctx)
    run = Run(ctx.folder); run.report()
    return run

def partition_only(model, sources: dict, config: StepwiseConfig=None, folder="runs/sdpo", tokenizer=None, logprobs=response_logprobs) -> Run:
    "The first part of `sdpo`: pass of M_0 and partition; `sdpo` with the same arguments goes on from here."
    ctx, *_ = _prepare(model, sources, config, folder, tokenizer, logprobs)
    return Run(ctx.folder)

def _prepare(model, sources, config, folder, tokenizer, logprobs):
    config, folder = config or StepwiseConfig(), Path(folder)
    base, tokenizer = _base(model, tokenizer, folder)
    device = make_accelerator().device
    loaded = load_sources(sources, tokenizer, config)
    policy, precision = load_model(base, device), pick_precision(config.precision, device)
    pairs_hash = hashlib.sha256("".join(k for s in loaded for k in s.pairs["key"]).encode()).hexdigest()[:16]
    _open_folder(folder, config, dict(model=str(model) if isinstance(model, (str, Path)) else type(model).__name__, weights=weights_hash(policy),
                                      pairs=pairs_hash, sources=[s.name for s in loaded], versions=_versions()))
    ctx = _Context(config, folder, base, tokenizer, device, precision, logprobs)
    return ctx, _plan(loaded, policy, ctx), policy


# %%
#| export
@dataclass
class _Context:
    "What every stage needs to know."
    config: StepwiseConfig; folder: Path; base: str; tokenizer: object; device: object; precision: str; logprobs: object

    def at(self, t): return self.folder / (f"stage-{t}" if t else "base")
    def model_folder(self, t): return str(self.at(t) / "model") if t else self.base
    def score(self, t, model, pairs, desc): # the table of M_t, with at least these pairs
        return score_pairs(model, pairs, self.at(t) / "logprobs", self.precision, self.logprobs, desc=desc)


# %% [markdown]
# ## The chunks

# %%
#| export
@dataclass
class Chunk:
    "D_t: what one stage trains on."
    name: str; pairs: Dataset

@dataclass
class _Plan:
    "Chunk after chunk; `T` is None where a function decides."
    chunks: list; T: int|None; make: object=None; ctx: object=None

    def next(self, t, model):
        if self.make is None: return self.chunks[t-1] if t <= self.T else None
        while len(self.chunks) < t and (made := _made_chunk(self.make, len(self.chunks) + 1, model, self.ctx)): self.chunks.append(made)
        return self.chunks[t-1] if t <= len(self.chunks) else None
    def probes(self): return [probe(c.pairs, self.ctx.config) for c in self.chunks]

def probe(pairs, config) -> Dataset:
    "At most `config.probe` pairs of a chunk, the same ones for every model."
    if len(pairs) <= config.probe: return pairs
    return pairs.select(sorted(torch.randperm(len(pairs), generator=torch.Generator().manual_seed(config.seed))[:config.probe].tolist()))


# %%
#| export
def _plan(loaded, policy, ctx):
    "Partition the sources under M_0 and write partition.json; the pass of M_0 is kept as stage 1's reference table."
    chunks, c = ctx.config.chunks, ctx.config
    if callable(chunks): return _Plan([], None, chunks, ctx)
    groups = {s.name: s for s in loaded}
    if isinstance(chunks, (list, tuple)): loaded = [_merge(names, groups) for names in chunks]
    by_source = loaded if isinstance(chunks, (list, tuple)) else list(groups.values())
    base = LogprobTable({}, pd.DataFrame())
    for s in by_source: base = ctx.score(0, policy, s.pairs, f"M_0 on {s.name}")
    order = "as_given" if isinstance(chunks, (list, tuple)) else c.order
    part = partition(by_source, base, order, None if isinstance(chunks, (list, tuple)) else chunks, c.seed)
    write_json(ctx.folder / "partition.json", dict(order=order, measures=part.measures.to_dict("records"), names=part.names, chunks=part.chunks,
                                                   counts=counts_table(by_source).reset_index().to_dict("records")))
    return _Plan([Chunk(n, part.chunk(t)) for t, n in enumerate(part.names)], len(part.names), ctx=ctx)

def _merge(names, groups):
    from datasets import concatenate_datasets
    names = [names] if isinstance(names, str) else list(names)
    for n in names:
        if n not in groups: raise ValueError(f"chunks: no source '{n}' among {', '.join(groups)}")
    return Source("+".join(names), concatenate_datasets([groups[n].pairs for n in names]), {})

def _made_chunk(make, t, model, ctx):
    "What the user's function returns for stage t, tokenised, and kept so that a continued run sees the same pairs."
    path = ctx.at(t) / "chunk"
    if not path.exists():
        got = make(t, model)
        if got is None: return None
        source = got if isinstance(got, Source) else tokenize_pairs(load_pairs(got), ctx.tokenizer, f"chunk {t}", ctx.config.max_length, ctx.config.max_prompt_length)
        source.pairs.save_to_disk(str(path) + ".tmp"); os.replace(str(path) + ".tmp", path)
    return Chunk(f"chunk {t}", load_from_disk(str(path)))


# %% [markdown]
# ## One stage of the loop

# %%
#| export
def _free(model): model.to("meta") # give the memory back, whoever still holds the object

def _reference(t, chunk, plan, policy, ctx):
    "The table of stage t's reference, computed before the target is reset: (table, name, policy)."
    ref = ctx.config.reference
    if ref == "fixed": return ctx.score(0, policy, [], "S") if t == 1 else _stored(ctx.at(0) / "logprobs"), "S", policy
    if ref == "moving": return ctx.score(t-1, policy, chunk.pairs, f"M_{t-1} on {chunk.name}"), f"M_{t-1}", policy
    _free(policy)
    other = load_model(ref, ctx.device)
    need = [chunk.pairs[i] for i in range(len(chunk.pairs))] + ([*plan.probes()[t]] if t < len(plan.chunks) else [])
    table = score_pairs(other, need, ctx.at(t) / "reference", ctx.precision, ctx.logprobs, desc=f"{ref} on {chunk.name}")
    _free(other)
    return table, ref, load_model(ctx.model_folder(t-1), ctx.device)

def _stored(folder):
    "A table as it lies on disk."
    return LogprobTable(json.loads((folder / "kind.json").read_text()), pd.concat([pd.read_parquet(p) for p in sorted(folder.glob("part-*.parquet"))]))


# %%
#| export
def _stage(t, chunk, plan, policy, ctx):
    "Stage t: reference table, target, training, measurement, model; returns M_t."
    c, folder = ctx.config, ctx.at(t)
    folder.mkdir(exist_ok=True)
    table, ref_name, policy = _reference(t, chunk, plan, policy, ctx)
    start = _stored(ctx.at(0) / "logprobs") if c.init_target == "S" else table if c.reference == "moving" or t == 1 and c.reference == "fixed" else None
    if c.init_target == "S" and t > 1: _free(policy); policy = load_model(ctx.base, ctx.device)
    came_in = weights_hash(policy)
    previous, schedule = _going_on(t, plan, ctx)
    summary = train_stage(policy, chunk.pairs, table, c, folder, t, start, ctx.logprobs, previous, schedule)
    for pairs in plan.probes(): ctx.score(t, policy, pairs, f"M_{t} on the probes")
    write_json(ctx.folder / "probes.json", {c.name: list(p["key"]) for c, p in zip(plan.chunks, plan.probes())})
    save_model(policy, ctx.tokenizer, folder / "model")
    if c.restart == "stage": shutil.rmtree(folder / "checkpoint")
    write_json(folder / "stage.json", dict(stage=t, chunk=chunk.name, pairs=len(chunk.pairs), reference=ref_name, reference_kind=table.kind,
        start=came_in, end=weights_hash(policy), **summary, **_measures(t, chunk, plan, table, ctx)))
    return policy

def _going_on(t, plan, ctx):
    "Optimizer and schedule of one run over all stages, where asked for."
    if ctx.config.restart == "stage": return None, None
    if plan.T is None: raise ValueError("restart='never' needs to know all chunks beforehand, so it does not go with a function as chunks")
    steps = [ctx.config.epochs * math.ceil(len(c.pairs) / ctx.config.batch_size) for c in plan.chunks]
    return (ctx.at(t-1) if t > 1 else None), (sum(steps[:t-1]), sum(steps))


# %%
#| export
def _measures(t, chunk, plan, table, ctx):
    "What the report says about stage t, from the tables: on the probe of D_t unless it says otherwise."
    rows = list(probe(chunk.pairs, ctx.config))
    ref, after = table.gamma(rows), _stored(ctx.at(t) / "logprobs").gamma(rows)
    before = _known(ctx.at(t-1) / "logprobs", rows)
    loss = dpo_loss(after, ref, ctx.config.beta).mean().item()
    out = dict(gamma_ref=table.gamma(list(chunk.pairs)).mean().item(), gamma_ref_next=None, n_probe=len(rows), gamma=after.mean().item(),
               loss=loss, certificate=certificate(loss, ref.mean().item(), ctx.config.beta), below_reference=(after < ref).float().mean().item(),
               accuracy_after=reward_accuracy(after).mean().item(), accuracy_vs_reference=reward_accuracy(after, ref).mean().item())
    if t < len(plan.chunks) and (nxt := _known(table, list(plan.probes()[t]))) is not None: out["gamma_ref_next"] = nxt.mean().item()
    if before is not None:
        out |= dict(accuracy_before=reward_accuracy(before).mean().item(), gamma_change=mean_interval(after - before))
    return out

def _known(table, rows):
    table = table if isinstance(table, LogprobTable) else _stored(table)
    return table.gamma(rows) if all(r["key"] in table.rows.index for r in rows) else None


# %% [markdown]
# ## The report

# %%
#| export
def stage_table(run: Run) -> pd.DataFrame:
    "One stage a row."
    rows = []
    for s in run.stages:
        mean, low, high = s.get("gamma_change") or (float("nan"),) * 3
        rows.append({"stage": s["stage"], "chunk": s["chunk"], "pairs": s["pairs"], "steps": s["steps"], "reference": s["reference"],
            "first loss": s["first_loss"], "expected": s["expected_first_loss"], "loss of M_t": s["loss"],
            "gamma_ref on D_t": s["gamma_ref"], "gamma_ref on D_t+1": s["gamma_ref_next"], "gamma of M_t on D_t": s["gamma"],
            "change of gamma": f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]", "certified gamma": s["certificate"],
            "below reference": s["below_reference"], "accuracy before": s.get("accuracy_before"), "accuracy after": s["accuracy_after"]})
    return pd.DataFrame(rows).set_index("stage")


# %%
#| export
def gamma_table(run: Run) -> pd.DataFrame: # model, chunk, gamma: one probe pair a row
    "gamma of every model on the probe of every chunk it was measured on."
    out = []
    for name, keys in json.loads((run.folder / "probes.json").read_text()).items():
        for m, folder in [("M_0", run.folder / "base")] + [(f"M_{i}", p.parent) for i, p in enumerate(_numbered(run.folder, "stage.json"), 1)]:
            t = _stored(folder / "logprobs").rows
            if set(keys) <= set(t.index): out.append(pd.DataFrame(dict(model=m, chunk=name, gamma=(t.loc[keys, "chosen"] - t.loc[keys, "rejected"]).to_numpy())))
    return pd.concat(out, ignore_index=True)


# %%
#| export
def write_report(run: Run) -> Path:
    "report.md and its figures."
    figures = run.folder / "figures"; figures.mkdir(exist_ok=True)
    drawn = dict(loss=plot_loss(run.metrics), drift=plot_drift(run.metrics), gamma=plot_gamma(gamma_table(run)))
    if (run.folder / "partition.json").exists(): drawn = dict(partition=plot_partition(run.partition())) | drawn
    for name, fig in drawn.items():
        fig.savefig(figures / f"{name}.png", dpi=110, bbox_inches="tight"); plt.close(fig)
    c = run.config
    text = [f"# Stepwise DPO: {len(run.stages)} stage{'s' * (len(run.stages) > 1)}", f"model {c['model']} ({c['weights']}), pairs {c['pairs']}, " + ", ".join(f"{k} {v}" for k, v in c["versions"].items())]
    if "partition" in drawn: text += ["## Partition", as_markdown(run.partition().set_index("source")), "![](figures/partition.png)"]
    text += ["## Stages", as_markdown(run.table().T), *(f"![](figures/{n}.png)" for n in ("loss", "gamma", "drift")),
             "## Settings", as_markdown(pd.DataFrame(c["settings"].items(), columns=["setting", "value"]).set_index("setting"))]
    path = run.folder / "report.md"
    path.write_text("\n\n".join(text) + "\n")
    return path

def as_markdown(frame: pd.DataFrame, digits=3) -> str:
    "A data frame as a markdown table."
    def show(v): return f"{v:.{digits}f}" if isinstance(v, float) else "" if v is None else str(v)
    head = [frame.index.name or ""] + [str(c) for c in frame.columns]
    rows = [[str(i)] + [show(v) for v in r] for i, r in zip(frame.index, frame.to_numpy(dtype=object))]
    return "\n".join("| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *rows])
