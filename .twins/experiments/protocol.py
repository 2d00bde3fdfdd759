# %% [markdown]
# # Protocol
# > How the experiments are run: worlds, seeds, search, equal budgets, and eight questions that were fixed before the answers were seen.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/protocol.ipynb)
#
# **You should know** [stepwise DPO](../09_stepwise.ipynb) and [how a model is measured](../08_evaluate.ipynb). **Time** a few seconds; all grids together took 12.6 core hours (`make experiments`).
#
# The paper compares single runs, and a run is a draw: of a seed, and of a base model with its data. So every experiment here asks its question of several small worlds whose true reward is known, and follows the rules of
# this page.

# %%
#| default_exp experiments

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
#| export
import copy, io, itertools, json, math, os, random, tempfile, time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from sdpo_nb.evaluate import as_text, excess, frontier, interval, kl_along, plot_frontier
from sdpo_nb.logprobs import load_model, score_pairs
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.report import gamma_table
from sdpo_nb.stepwise import StepwiseConfig, sdpo
from sdpo_nb.trainer import learning_rate
from sdpo_nb.world import ALPHABET, SKILLS, content_hash, edit_distance, freeze_world, load_base, load_world, make_pairs, make_model, make_prompts, make_tokenizer, prompt_ids, respond_ids, sft, text_of, true_reward, true_rewards, world_texts


# %% [markdown]
# ## A world is a draw, too
#
# A *world* is a seed of demonstrations, of S and of the pairs that S writes. [Chapter 00](../00_world.ipynb) is world 0; worlds 1, 2, ... are made like it, with an S that is fine-tuned until it has learned
# something, and kept in `runs/worlds`. A *seed* fixes the
# order in which a world's pairs are trained on and, where the order is random, the chunks.

# %%
#| export
def _once(path, make): # make(folder) fills it; a folder is there in full or not at all
    if path.exists(): return path
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = tempfile.mkdtemp(dir=path.parent, prefix="unfinished-")
    make(tmp); os.replace(tmp, path)
    return path

def build_world(seed: int, worlds="runs/worlds", body="llama"):
    "A world, made where it is not there yet; 0 is the one that travels with the package. A world of another body (`BODIES`) has the same prompts and demonstrations; its S is as good as the Llama and writes its own pairs."
    if (seed, body) == (0, "llama"): return load_world()
    if body == "llama": return load_world(_once(Path(worlds) / str(seed), lambda folder: freeze_world(folder, seed)))
    def make(folder): freeze_world(folder, seed, as_good_as(build_world(seed, worlds), body, worlds))
    return load_world(_once(Path(worlds) / f"{seed}-{body}", make))


# %% [markdown]
# ## A cell
#
# A cell is a method in a world with a seed. Its settings are those of `StepwiseConfig` and nothing else, so there is no second copy of the loop: DPO is stepwise DPO with one chunk. "sDPO" is what `StepwiseConfig` does by itself: three stages, one for each source, easy to hard by reward accuracy under S; each starts from the model before, has it as its reference, and restarts schedule and optimizer. A world has about 1,450 pairs and 600 test prompts. Beside the
# methods stand three that do without DPO: S, S at the temperature that is best on validation prompts, and S fine-tuned on the chosen responses.

# %%
#| export
COMMON = dict(beta=0.3, lr=1e-4, epochs=3, batch_size=32, max_length=64, precision="fp32", probe=64)

METHODS = {
    "DPO": dict(chunks=1),
    "sDPO": dict(),
    "sDPO, random": dict(order="random"),
    "sDPO, hard first": dict(order="hard_to_easy"),
    "sDPO, fixed reference": dict(reference="fixed"),
    "sDPO, target S": dict(init_target="S"),
}
BASELINES = ("S", "S, best temperature", "SFT on chosen")

@dataclass(frozen=True)
class Cell:
    "One run."
    world: int; seed: int; method: str           # of METHODS or BASELINES
    settings: dict = field(default_factory=dict) # of StepwiseConfig; they win over METHODS and COMMON
    split: str = "test"                          # prompts it is measured on; see `prompts_of`
    pairs: int = None                            # of each source; None: all
    data: tuple = ("sources",)                   # a name in DATA, and what that function asks for
    body: str = "llama"                          # or a name in BODIES

    @property
    def config(self): return COMMON | METHODS.get(self.method, {}) | self.settings
    @property
    def key(self): # the Llama goes without saying: keys are older than other bodies
        return content_hash([self.world, self.seed, self.method, self.config, self.split, self.pairs, self.data, *([] if self.body == "llama" else [self.body])])


# %% [markdown]
# What is kept of a run are numbers: the true reward of every prompt, sampled at temperature 1 and greedy, and the KL from S along the sampled responses, with the same luck for all methods of a world so that
# differences are paired; the means by skill, also of the models of earlier stages; the losses; the mean gamma of every model on every chunk.

# %%
#| export
def _results(model, base, tok, prompts, tau, luck): # (n,) each
    "What is measured of a model."
    responses = respond_ids(model, tok, prompts, tau, luck)
    rewards = dict(sampled=[true_reward(p, text_of(tok, y)) for p, y in zip(prompts, responses)], greedy=true_rewards(model, tok, prompts, 0.))
    return {how: np.round(v, 4).tolist() for how, v in rewards.items()} | dict(kl=np.round(kl_along(model, base, tok, prompts, responses, tau), 3).tolist())

def _by_skill(results, prompts, stage): # skill, sampled, greedy, kl, stage
    return pd.DataFrame(results).groupby([p.split()[0] for p in prompts]).mean().round(4).rename_axis("skill").reset_index().assign(stage=stage)


# %% [markdown]
# *Equal budgets* follow from the settings, nearly: every method of DPO sees the same pairs three times. A schedule that starts anew in every stage adds up to a little more learning rate than one that does not, since every
# warm-up reaches the peak again, and chunks end in smaller batches. For three stages that is little, for eight it is not:

# %%
#| export
def peaks(steps: list) -> float: # optimizer steps of each stage
    "Sum of the learning rates of restarted schedules, in units of the peak."
    return sum(learning_rate(step, n, StepwiseConfig(lr=1.0)) for n in steps for step in range(n))


# %%
def steps_of(T, pairs=1500): return [COMMON["epochs"] * math.ceil(len(part) / COMMON["batch_size"]) for part in np.array_split(range(pairs), T)]
pd.DataFrame({T: {"sum of learning rates (peaks)": peaks(steps_of(T)), "optimizer steps": sum(steps_of(T))} for T in (1, 3, 8)}).rename_axis(columns="stages").round(1)


# %% [markdown]
# What a moving reference costs on top is one pass without gradients over each chunk but the first; its tokens are counted beside those that were trained on.

# %%
#| export
def _pass_tokens(run):
    "Tokens of the partition and of moving references: passes without gradients."
    per_stage = run.metrics.groupby("stage")["tokens"].sum() / run.config["settings"]["epochs"]
    moving = run.config["settings"]["reference"] == "moving"
    return int(per_stage.sum() + (per_stage.iloc[1:].sum() if moving and (run.folder / "partition.json").exists() else 0))

TEMPERATURES = (1., 0.8, 0.6, 0.4, 0.2, 0.1)

def _baseline(cell, base, tokenizer, world, sources):
    "(model, temperature, trained tokens) of a method without DPO."
    if cell.method == "S": return base, 1., 0
    if cell.method == "S, best temperature": return base, max(TEMPERATURES, key=lambda t: np.mean(true_rewards(base, tokenizer, world.validation, t))), 0
    rows = [(r["prompt"][-1]["content"], r["chosen"][-1]["content"]) for pairs in sources.values() for r in pairs]
    c = cell.config
    return sft(copy.deepcopy(base), tokenizer, rows, c["epochs"], c["batch_size"], c["lr"], cell.seed), 1., c["epochs"] * sum(len(prompt_ids(tokenizer, p)) + len(y) + 1 for p, y in rows)


# %% [markdown]
# Most cells train on the three sources as they are. What other data a cell may ask for stands in `DATA`, by name.

# %%
#| export
def _usable(rows): return [r for r in rows if r["chosen"][-1]["content"].strip() and r["rejected"][-1]["content"].strip()] # as tokenisation would

def _texts(world): # every pair of a world, with its source and whether its label is wrong
    return _usable([json.loads(line) | dict(source=n) for n, f in world.sources.items() for line in Path(f).read_text().splitlines()])

def _by(key, rows): # key of a row -> rows
    out = {}
    for r in rows: out.setdefault(key(r), []).append(r)
    return out

def _same_prompts(world, base, tok, T): # T sources of fresh pairs, all on every T-th prompt
    precise, prompts = copy.deepcopy(base).double(), [r["prompt"][-1]["content"] for r in _texts(world)][::T]
    return {f"part {t+1}": _usable(make_pairs(precise, tok, prompts, 10_000 + t)) for t in range(T)}

def _skill(row): return row["prompt"][-1]["content"].split()[0]

DATA = { # name -> (world, S, tokenizer, ...) -> sources, or the function (t, model) -> pairs that makes the chunks
    "sources": lambda world, base, tok: _by(lambda r: r["source"], _texts(world)),
    "one source": lambda world, base, tok: {"all": _texts(world)},
    "skills": lambda world, base, tok: _by(_skill, _texts(world)),
    "without": lambda world, base, tok, skill: _by(lambda r: r["source"], [r for r in _texts(world) if _skill(r) != skill]),
    "same prompts": _same_prompts,
}


# %% [markdown]
# Pairs can also be put in order by what is known of each: its length, the distance of its two responses, or (which nobody else can) the gap of their true rewards.

# %%
#| export
def true_gap(row): # true reward of chosen minus that of rejected
    prompt, y, z = (row[k][-1]["content"] for k in ("prompt", "chosen", "rejected"))
    return true_reward(prompt, y) - true_reward(prompt, z)

def measured(row, what): # length: letters of both responses; distance: edit distance between them; true gap: without its sign
    y, z = row["chosen"][-1]["content"], row["rejected"][-1]["content"]
    if what == "length": return len(y) + len(z)
    if what == "distance": return edit_distance(y, z)
    if what == "true gap": return abs(true_gap(row))
    raise ValueError(f"measure: {what!r} is none of length, distance, true gap")

def _sorted(world, base, tok, what, sign): # one source, from small to large with sign 1, the other way with -1
    rows = _texts(world)
    return {"all": sorted(random.Random(0).sample(rows, len(rows)), key=lambda r: sign * measured(r, what))}

DATA["sorted"] = _sorted


# %% [markdown]
# Two published ways to *select* pairs contradict each other: keep those with the smallest implicit reward gap of a trained model ([2508.04149](https://arxiv.org/abs/2508.04149)), or drop the hardest
# ([2502.09650](https://arxiv.org/abs/2502.09650)), which are those again. The gap is signed here: the smallest belong to pairs that the model orders against their label. That model is trained on all pairs once; with three passes over the
# two thirds that it keeps, as many pairs are seen as in three passes over all (its own tokens are not in the table). Beside them stand two thirds at random.

# %%
#| export
def _implicit_gap(model, base, tok, rows): # (n,) gamma of the model minus gamma of S, nats
    pairs = tokenize_pairs(load_pairs(rows), tok, "pairs", COMMON["max_length"], COMMON["max_length"] // 2).pairs
    if len(pairs) != len(rows): raise ValueError(f"implicit gap: {len(rows) - len(pairs)} of {len(rows)} pairs cannot be used")
    return score_pairs(model, pairs).gamma(pairs) - score_pairs(base, pairs).gamma(pairs)

def _selected(world, base, tok, keep, beta, lr): # two thirds of the pairs: the smallest or the largest gaps, or any
    rows, settings = _texts(world), COMMON | dict(beta=beta, lr=lr, chunks=1, epochs=1)
    if keep == "random": return {"all": random.Random(0).sample(rows, 2 * len(rows) // 3)}
    with tempfile.TemporaryDirectory() as tmp: model = sdpo(world.base, {"all": rows}, StepwiseConfig(**settings), tmp).model
    order = _implicit_gap(model, base, tok, rows).argsort(descending=keep == "largest").tolist()
    return {"all": [rows[i] for i in order[:2 * len(rows) // 3]]}

DATA["selected"] = _selected


# %% [markdown]
# And pairs can be *made between stages*: the model that a stage starts from answers prompts of its own, twice each, and the two answers are labelled by the true reward as everywhere (Bradley-Terry), by a judge who errs with a
# stated probability, or by the implicit reward, $\log M_{t-1} - \log S$, which costs nothing; it is not there yet in stage 1, whose labels come from the true reward. Equal answers make no pair, so a sharper model writes fewer pairs; how
# many stands in the table.

# %%
#| export
def _swapped(row): return row | dict(chosen=row["rejected"], rejected=row["chosen"])

def _judged(rows, error, rng): # the better response is chosen, but for errors
    return [_swapped(r) if (true_gap(r) < 0) != (rng.random() < error) else r for r in rows]

def _new(world, base, tok, writer, label, error=0., stages=3): # writer: S, policy, or "S, as many": of S as many pairs as the policy would write; label: true, judge, implicit
    prompts = [r["prompt"][-1]["content"] for r in _texts(world)]
    def written(t, model): return _usable(make_pairs(copy.deepcopy(model).double(), tok, prompts[t-1::stages], 20_000 + t))
    def chunk(t, model):
        if t > stages: return None
        rows = written(t, model if writer == "policy" and t > 1 else base)
        if writer == "S, as many" and t > 1: rows = random.Random(t).sample(rows, min(len(rows), len(written(t, model))))
        if label == "judge": return _judged(rows, error, random.Random(t))
        if label == "implicit" and t > 1: return [_swapped(r) if gap < 0 else r for r, gap in zip(rows, _implicit_gap(model, base, tok, rows))]
        return rows
    return chunk

DATA["new"] = _new


# %% [markdown]
# Prompts are those of a split. Two more kinds are unlike anything that a model of the world has seen: strings of seven letters, and strings of the eleven letters after k, which occur in no string and no
# answer (six of them occur in the names of skills). "Shift" has no answer there.

# %%
#| export
def prompts_of(seed: int, # of the world
               split: str) -> list[str]:
    "The prompts that a cell is measured on, in the order of its stored rewards. Raises ValueError for a split that is not there."
    if split in ("validation", "test"): return world_texts(seed)[split]
    if split == "seven letters": return make_prompts(300, "test", random.Random(seed), lengths=(7, 7))
    if split == "other letters": return [skill + " " + "".join(chr(ord(c) + len(ALPHABET)) for c in s) for skill, s in map(str.split, world_texts(seed)["test"]) if skill != "shift"]
    raise ValueError(f"split: {split!r} is none of validation, test, seven letters, other letters")


# %%
#| export
def run_cell(cell: Cell, worlds="runs/worlds") -> dict:
    "Train and measure one cell, with one thread; the run itself is thrown away."
    torch.set_num_threads(1)
    start, w = time.perf_counter(), build_world(cell.world, worlds, cell.body)
    base, tok = load_base(w)
    name, *asked = cell.data
    sources, prompts = DATA[name](w, base, tok, *asked), prompts_of(cell.world, cell.split)
    def results_of(model, tau=1.): return _results(model, base, tok, prompts, tau, 1 + cell.world)
    if cell.pairs and not callable(sources): sources = {n: s[:cell.pairs] for n, s in sources.items()}
    if cell.method in BASELINES:
        model, tau, tokens = _baseline(cell, base, tok, w, sources)
        results, extra = results_of(model, tau), {}
        stages = [_by_skill(results, prompts, 0)]
    else:
        wrong = []                          # labels of each chunk that is made on the way, of those whose rewards differ
        def counted(t, model):
            rows = sources(t, model)
            if rows: wrong.append(round(float(np.mean([gap < 0 for r in rows if (gap := true_gap(r))])), 4))
            return rows
        config = cell.config | (dict(chunks=counted) if callable(sources) else {})
        with tempfile.TemporaryDirectory() as tmp:
            run = sdpo(w.base, None if callable(sources) else sources, StepwiseConfig(**config, seed=cell.seed), Path(tmp) / "run")
            models = [results_of(load_model(str(run.model_folder(t)))) for t in range(1, len(run.stages) + 1)]
            gammas = gamma_table(run).groupby(["model", "chunk"], sort=False)["gamma"].mean().round(4).reset_index()
            extra = dict(pass_tokens=_pass_tokens(run), losses=run.metrics["loss"].round(4).tolist(), steps=[s["steps"] for s in run.stages], chunk_pairs=[s["pairs"] for s in run.stages], gammas=gammas.to_json(orient="records"), **({"wrong_labels": wrong} if wrong else {}))
            results, tokens, stages = models[-1], int(run.metrics["tokens"].sum()), [_by_skill(m, prompts, t) for t, m in enumerate(models, 1)]
    return results | extra | dict(stages=pd.concat(stages).to_json(orient="records"), tokens=tokens, seconds=time.perf_counter() - start, weights=w.manifest["model"])


# %% [markdown]
# ## A grid
#
# Cells are independent and run one to a core. A finished cell is written at once, so a grid that is killed goes on; the table says what made each row. All experiments share one table, so that a cell which two of them
# need is run once. A row does not know which code made it; `python -m sdpo_nb.experiments again` runs one of each grid once more and compares.

# %%
#| export
RESULTS = Path(str(files("sdpo_nb.data"))) / "results"

def _read(path, key): return pd.read_parquet(path) if path.exists() else pd.DataFrame({key: []})

def _add(path, key, *new): # the whole table as it is now, with more rows; written under a temporary name, then renamed
    rows = pd.concat([_read(path, key), *new], ignore_index=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(path.with_suffix(".tmp"), compression="zstd"); os.replace(path.with_suffix(".tmp"), path)
    return rows

def _pool(workers=None):
    os.environ["TQDM_DISABLE"] = "1"        # for the workers; this process has read it before
    return ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))

def _of(table, cells): return table[table["key"].isin({c.key for c in cells})]
def _path(folder): return Path(folder or RESULTS) / "runs.parquet"

def rows_of(cells: list, folder=None) -> pd.DataFrame: # one cell a row
    "Those of the cells that are in the table of `folder` already."
    return _of(_read(_path(folder), "key"), cells)

def _begin(body): begun(body)
def _build(needed): build_world(needed[2], body=needed[1])

def run_grid(cells: list, folder=None, desc="cells", workers: int=None) -> pd.DataFrame: # one cell a row
    "Run those of the cells that are not in the table yet. Raises RuntimeError, after the others are through, for a cell that failed."
    path, failed = _path(folder), []
    done = _read(path, "key"); known = set(done["key"])
    todo = list({c.key: c for c in cells if c.key not in known}.values())
    if not todo: return _of(done, cells)
    made_by = dict(versions=json.dumps({p: version(p) for p in ("torch", "transformers")}), command=f"python -m sdpo_nb.experiments {desc}")
    with _pool(workers) as pool:
        needed = sorted({(c.body != "llama", c.body, c.world) for c in todo})        # Llamas first: the others are tuned to them
        list(tqdm(pool.map(_begin, bodies := sorted({body for other, body, _ in needed if other})), total=len(bodies), desc="bodies", disable=not bodies))
        list(tqdm(pool.map(_build, needed), total=len(needed), desc="worlds"))
        running = {pool.submit(run_cell, c): c for c in todo}
        for f in tqdm(as_completed(running), total=len(todo), desc=desc, unit="cell"):
            c = running[f]
            if error := f.exception(): failed.append((c, error)); continue      # the others go on
            row = asdict(c) | dict(settings=json.dumps(c.settings, sort_keys=True), data=json.dumps(c.data), key=c.key) | f.result() | made_by
            done = _add(path, "key", pd.DataFrame([row]))
    for c, error in failed: raise RuntimeError(f"{c}: {error}; the finished cells are in {path}, run it again") from error
    return _of(done, cells)


# %% [markdown]
# ## Paired differences
#
# Two methods are compared where both were run: the same worlds, seeds and prompts. The interval of the difference comes from a bootstrap on all three levels ([chapter 08](../08_evaluate.ipynb)); the p-value from the worlds alone, which
# are what was drawn independently. If the two methods were interchangeable, the mean difference of each world could as well have had the other sign, so all $2^W$ choices of signs are tried (the exact sign-flip test). With ten
# worlds the smallest p-value is 0.002, with five it would be 0.06.

# %%
#| export
def outcome(rows: pd.DataFrame, # of one method
            what: str,          # sampled, greedy: true reward; kl: nats
           ) -> np.ndarray:     # (worlds, seeds, prompts)
    "One number per world, seed and prompt. Raises ValueError unless every world has the same seeds."
    table = {(r.world, r.seed): list(getattr(r, what)) for r in rows.itertuples()}
    worlds, seeds = sorted({w for w, _ in table}), sorted({s for _, s in table})
    if len(table) != len(rows) or len(table) != len(worlds) * len(seeds): raise ValueError(f"outcome: {len(rows)} rows for {len(worlds)} worlds and {len(seeds)} seeds; one each is needed")
    return np.array([[table[w, s] for s in seeds] for w in worlds])

def unfolded(rows: pd.DataFrame, # of the table
             what: str,          # stages: skill, sampled, greedy, kl by stage; gammas: model, chunk, gamma
            ) -> pd.DataFrame:   # with world and seed
    "What is kept as a table inside each row."
    return pd.concat([pd.read_json(io.StringIO(getattr(r, what))).assign(world=r.world, seed=r.seed) for r in rows.itertuples()], ignore_index=True)

def searched(rows: pd.DataFrame) -> pd.DataFrame: # method, reward, kl, and a column for each setting
    "Mean sampled true reward and KL (nats) of each run of a search, with its settings as columns."
    return pd.DataFrame([dict(method=r.method, reward=np.mean(r.sampled), kl=np.mean(r.kl), **json.loads(r.settings)) for r in rows.itertuples()])

def at_kl(ladder: list,      # rows of one method at several beta
          kl: np.ndarray,    # (worlds, seeds, ...) whose means are asked for, nats
         ) -> np.ndarray:    # (worlds, seeds, 1)
    "Mean sampled reward of a method at another's KL, linear between neighbours of its ladder. Raises ValueError outside the ladder."
    points = np.array([[outcome(rows, what).mean(2) for what in ("kl", "sampled")] for rows in ladder])     # (betas, 2, worlds, seeds)
    asked, out = kl.mean(2), np.empty((*kl.shape[:2], 1))
    for w, s in np.ndindex(asked.shape):
        x, y = points[np.argsort(points[:, 0, w, s]), :, w, s].T
        if not x[0] <= asked[w, s] <= x[-1]: raise ValueError(f"at_kl: {asked[w, s]:.2f} nats is outside the ladder, {x[0]:.2f} to {x[-1]:.2f}; add a beta")
        out[w, s] = np.interp(asked[w, s], x, y)
    return out

def p_value(values: np.ndarray) -> float: # of (worlds, ...)
    "Two-sided, by all changes of sign of the world means."
    m = np.asarray(values).reshape(len(values), -1).mean(1)
    signs = np.array(list(itertools.product((1, -1), repeat=len(m))))
    return float((abs(signs @ m) >= abs(m.sum()) - 1e-12).mean())

def holm(p: list) -> list:
    "p-values that hold for all at once (Holm 1979)."
    order, out, highest = np.argsort(p), [0.] * len(p), 0.
    for rank, i in enumerate(order):
        highest = max(highest, min(1., (len(p) - rank) * p[i])); out[i] = highest
    return out


# %% [markdown]
# ## The same search for every method
#
# A method that was tuned beats one that was not. So each method of DPO gets the same grid, seven $\beta$, a factor of two apart, and four learning rates, on validation prompts of two worlds that are reported nowhere; a best value on the
# edge extends the grid for all. (Where the grid lies was seen from DPO and stepwise DPO in world 0. It began as six $\beta$ from 0.075 and three rates, was moved up by a factor of two before it ran, and when "target S" was best at the largest of both, 9.6 and $10^{-3}$ were added.) What is chosen is stored, and there is *one* choice for all worlds: how much it would change with other search worlds is in no interval below. (Two baselines have
# no $\beta$: fine-tuning on the chosen responses is searched over the learning rates, the temperature of S over six values in each world.)

# %%
#| export
BETAS, RATES, SEARCH_WORLDS = (0.15, 0.3, 0.6, 1.2, 2.4, 4.8, 9.6), (3e-5, 1e-4, 3e-4, 1e-3), (101, 102)

def search() -> list[Cell]:
    "The search: of every method of DPO, and (without beta) of fine-tuning on the chosen responses."
    cells = [Cell(w, 0, m, dict(beta=b, lr=r), "validation") for m in METHODS for b in BETAS for r in RATES for w in SEARCH_WORLDS]
    return cells + [Cell(w, 0, "SFT on chosen", dict(lr=r), "validation") for r in (*RATES, 3e-3) for w in SEARCH_WORLDS]

def choose(rows: pd.DataFrame) -> dict: # method -> settings
    "The settings with the highest mean true reward, sampled on validation prompts. Raises ValueError where they lie on the edge of what was tried."
    mean = rows.assign(reward=rows["sampled"].map(np.mean)).groupby(["method", "settings"])["reward"].mean()
    best = {m: json.loads(at[1]) for m, at in mean.groupby("method").idxmax().items()}
    for m, chosen in best.items():
        tried = [json.loads(x) for x in rows.loc[rows["method"] == m, "settings"]]
        for name, v in chosen.items():
            if v in (min(t[name] for t in tried), max(t[name] for t in tried)): raise ValueError(f"{m}: its best {name}, {v:g}, is on the edge of the grid; extend the grid, for all methods")
    return best

def choices() -> dict:
    "What the search chose, as it was committed."
    return json.loads((RESULTS / "choices.json").read_text())


# %% [markdown]
# What the search saw, as mean true reward over its two worlds; the chosen cell is framed. At their best all methods but "target S" are close to each other, and far from what a careless $\beta$ or rate gives. (Mind DPO: at the chosen $\beta$ two learning rates are a tie, 0.867 and 0.865. The question comes back below.)

# %%
seen = rows_of(search())
assert len(seen) == len(search()) and choose(seen) == choices()
tried = searched(seen)
fig, axes = plt.subplots(2, 3, figsize=(11, 4.6), sharex=True, sharey=True, constrained_layout=True)
for ax, method in zip(axes.flat, METHODS):
    grid, at = tried[tried["method"] == method].pivot_table("reward", "lr", "beta"), choices()[method]
    sns.heatmap(grid, annot=True, fmt=".2f", annot_kws=dict(size=8), cmap="viridis", vmin=0.5, vmax=0.9, cbar=False, ax=ax); ax.set_title(method, fontsize="medium")
    ax.add_patch(plt.Rectangle((list(grid.columns).index(at["beta"]), list(grid.index).index(at["lr"])), 1, 1, fill=False, color="red", lw=2))
for ax in axes.flat: ax.tick_params(axis="y", rotation=0); ax.label_outer()

# %% [markdown]
# ## How many worlds, how many seeds?
#
# In a pilot, on five worlds that are reported nowhere and on validation prompts, the difference of two methods has a part that differs between worlds and a part that differs between the
# seeds of a world. Of $W$ worlds with $R$ seeds the mean then has the standard error
#
# $$\sqrt{\sigma_w^2 / W + \sigma_s^2 / (W R)}. \tag{1}$$

# %%
#| export
PILOT_WORLDS = range(201, 206)

def pilot() -> list[Cell]: return [Cell(w, s, m, split="validation") for m in ("DPO", "sDPO") for w in PILOT_WORLDS for s in range(4)]

def variances(values: np.ndarray) -> dict: # (worlds, seeds, prompts)
    "Standard deviations of means over prompts, between worlds (sampling of prompts included) and between seeds; a variance that comes out negative is zero."
    m = np.asarray(values).mean(2)
    within = m.var(1, ddof=1).mean()
    return dict(worlds=float(np.sqrt(max(0, m.mean(1).var(ddof=1) - within / m.shape[1]))), seeds=float(np.sqrt(within)))

WORLDS, SEEDS = range(1, 11), range(2)

# %% [markdown]
# DPO and stepwise DPO, four seeds in each of five worlds, at the same settings:

# %%
trial = {m: outcome(rows_of([c for c in pilot() if c.method == m]), "sampled") for m in ("DPO", "sDPO")}
parts = {"true reward of DPO": variances(trial["DPO"]), "of sDPO minus DPO, paired": variances(trial["sDPO"] - trial["DPO"])}
def standard_error(v, W, R): return (v["worlds"]**2 / W + v["seeds"]**2 / (W * R)) ** 0.5      # (1)
assert parts["of sDPO minus DPO, paired"]["worlds"] < 0.7 * parts["true reward of DPO"]["worlds"] and standard_error(parts["of sDPO minus DPO, paired"], len(WORLDS), len(SEEDS)) < 0.02 / 4
pd.DataFrame({name: {"sd between worlds": v["worlds"], "sd between seeds": v["seeds"]} | {f"standard error, {W} worlds x {R}": standard_error(v, W, R) for W, R in ((5, 4), (len(WORLDS), len(SEEDS)), (20, 1))} for name, v in parts.items()}).T.round(4)

# %% [markdown]
# Pairing takes away half of what differs between worlds (and adds to what differs between seeds, which counts less). Ten worlds with two seeds each had been set by what the machine could do, before the pilot was complete; the pilot says that they suffice, with a standard error of 0.004, a fifth of what counts as equal below. (Five
# worlds say little of a standard deviation, and the pilot ran before the search, at settings that are nobody's best.)

# %% [markdown]
# ## Eight questions, asked beforehand
#
# With enough comparisons something is always significant. Eight contrasts are primary: they are committed before the grid is run, and Holm's p-values hold for all eight at once. All else in the
# experiments is exploratory: an interval without correction. *Equal* is said where the whole interval lies within $\pm 0.02$, two points of a hundred of the true reward.
#
# So far the page as it stood before the answers. Words for the other cases came after them (commit `b218013`): *different* where a primary p-value is below 0.05, or an exploratory interval leaves out 0; both at once is a difference that is there and *small*; neither is *we cannot tell*.
#
# Each method runs at its own best settings, so questions 4 to 7 compare tuned methods, not one switch at fixed settings; the factorial of `why_it_works` does the latter.

# %%
#| export
PRIMARY = pd.DataFrame([
    ("stepwise against plain", "sDPO", "DPO", "sampled"),
    ("the same, greedy", "sDPO", "DPO", "greedy"),
    ("the same, at the KL of plain", "sDPO at the KL of DPO", "DPO", "sampled"),
    ("easy first against random order", "sDPO", "sDPO, random", "sampled"),
    ("easy first against hard first", "sDPO", "sDPO, hard first", "sampled"),
    ("moving against fixed reference", "sDPO", "sDPO, fixed reference", "sampled"),
    ("target from M_{t-1} against from S", "sDPO", "sDPO, target S", "sampled"),
    ("stepwise at beta against plain at beta/T", "sDPO at DPO's beta", "DPO at beta/T", "sampled"),
], columns=["question", "a", "b", "outcome"])

LADDER = (1 / 4, 1 / 2, 1, 2, 4) # of sDPO, times its best beta

def primary() -> dict: # name of a row -> (method, settings)
    "Every method at its own best settings, the baselines, and what questions 3 and 8 need."
    best = choices()
    dpo, stepwise = best["DPO"], best["sDPO"]
    rows = {m: (m, best[m]) for m in METHODS} | {b: (b, best.get(b, {})) for b in BASELINES}
    rows |= {"sDPO at DPO's beta": ("sDPO", dpo), "DPO at beta/T": ("DPO", dpo | dict(beta=dpo["beta"] / 3)), "DPO at sDPO's rate": ("DPO", dpo | dict(lr=stepwise["lr"]))}
    return rows | {f"sDPO, {f:g} beta": ("sDPO", stepwise | dict(beta=stepwise["beta"] * f)) for f in LADDER}

def values(found: dict, name: str, what: str) -> np.ndarray:
    "`outcome` of a row of the main grid; 'sDPO at the KL of DPO' is read off its ladder."
    if name != "sDPO at the KL of DPO": return outcome(found[name], what)
    return at_kl([found[f"sDPO, {f:g} beta"] for f in LADDER], outcome(found["DPO"], "kl"))

def contrasts(found: dict, # name -> rows of the table
              questions: pd.DataFrame=PRIMARY) -> pd.DataFrame:
    "a minus b for each question, with interval, p-value and Holm's. Raises ValueError unless all rows come from the same worlds (the same weights of S) and seeds."
    drawn = {name: set(zip(rows["world"], rows["seed"], rows["weights"])) for name, rows in found.items()}
    for name, those in drawn.items():
        if those != next(iter(drawn.values())): raise ValueError(f"contrasts: '{name}' was run in other worlds or with other seeds than '{next(iter(drawn))}'")
    both = [(values(found, q.a, q.outcome), values(found, q.b, q.outcome)) for q in questions.itertuples()]
    d = [a - (b if a.shape == b.shape else b.mean(2, keepdims=True)) for a, b in both]
    mean, low, high = zip(*map(interval, d))
    return questions.assign(mean=mean, low=low, high=high, worlds=[len(x) for x in d], seeds=[x.shape[1] for x in d], p=[p_value(x) for x in d]).assign(holm=lambda t: holm(t["p"].tolist()))


# %%
#| export
def plot_contrasts(table: pd.DataFrame, # question, mean, low, high
                   unit="difference of mean true reward", same=0.02, ax=None) -> plt.Figure:
    "Differences with 95 % intervals; an interval inside the grey band means equal."
    ax = ax or plt.subplots(figsize=(6.5, 0.42 * len(table) + 1))[1]
    y = np.arange(len(table))
    ax.axvspan(-same, same, color="0.9", lw=0); ax.axvline(0, color="black", lw=1, ls=":")
    ax.errorbar(table["mean"], y, xerr=[table["mean"] - table["low"], table["high"] - table["mean"]], fmt="o", color="black", capsize=3)
    ax.set(yticks=y, yticklabels=table["question"], xlabel=unit, ylim=(len(table) - 0.5, -0.5)); sns.despine(ax.figure)
    return ax.figure


# %% [markdown]
# What is not among the eight is *exploratory*. Small helpers show it in the notebooks: paired differences with intervals and without p-values, of one outcome or of all, and the means behind them.

# %%
#| export
OUTCOMES = {"sampled": "true reward, sampled", "greedy": "greedy", "kl": "KL from S (nats)"} # of `outcome` -> label

def differences(asked: dict, # question -> paired differences (worlds, seeds, prompts)
               ) -> pd.DataFrame: # question, mean, low, high
    "Mean and 95 % interval of each."
    return pd.DataFrame([(q, *interval(d)) for q, d in asked.items()], columns=["question", "mean", "low", "high"])

def plot_outcomes(tables: dict, # of OUTCOMES -> differences of the same questions
                  unit: str) -> plt.Figure:
    "`plot_contrasts` of every outcome, side by side; a KL has no band in which it is the same."
    fig, axes = plt.subplots(1, len(OUTCOMES), figsize=(12, 0.3 * len(tables["kl"]) + 1.2), sharey=True, constrained_layout=True)
    for ax, (what, label) in zip(axes, OUTCOMES.items()): plot_contrasts(tables[what], f"{unit}: {label}", 0 if what == "kl" else 0.02, ax)
    return fig

def means(found: dict) -> pd.DataFrame: # name -> rows of the table
    "Mean and 95 % interval of true reward, sampled and greedy, and of KL from S, for each name."
    return pd.DataFrame({name: {label: as_text(interval(outcome(rows, what))) for what, label in OUTCOMES.items()} for name, rows in found.items()}).T


# %% [markdown]
# How often are these words right? A hundred pairs of invented methods for each true difference, with the variances of the pilot, in ten worlds with two seeds:

# %%
g, noise = np.random.default_rng(0), parts["of sDPO minus DPO, paired"]
def verdicts(shift):
    d = shift + g.normal(0, noise["worlds"], (10, 1, 1)) + g.normal(0, noise["seeds"], (10, 2, 1))
    _, low, high = interval(d, draws=300)
    return {"equal": max(-low, high) < 0.02, "different": p_value(d) < 0.05}
said = pd.DataFrame({shift: pd.DataFrame([verdicts(shift) for _ in range(100)]).mean() for shift in (0, 0.01, 0.02, 0.03)}).rename_axis(columns="true difference")
assert said.loc["equal", 0] > 0.9 and said.loc["equal", [0.02, 0.03]].max() < 0.1 and said.loc["different", 0] < 0.12 and said.loc["different", 0.03] > 0.9
said.map("{:.0%}".format)

# %% [markdown]
# ## The grids of the experiments
#
# A grid is a dictionary: the name of a row, and the method, settings and (where they are not the usual) data and prompts behind it. Each is run in every world with every seed. The first two are about the number of stages.

# %%
#| export
STAGES = (1, 2, 3, 5, 8)

def smaller_beta() -> dict:
    "T stages at beta against one at beta / T: chunks with prompts of their own, and chunks with the same prompts."
    dpo = choices()["DPO"]
    def both(T, data, order): return {f"DPO at beta/{T}, {data[0]}": ("DPO", dpo | dict(beta=dpo["beta"] / T), data), f"sDPO, T = {T}, {data[0]}": ("sDPO", dpo | dict(order=order, chunks=T), data)}
    rows = {"DPO at beta": ("DPO", dpo)}
    for T in STAGES[1:]: rows |= both(T, ("sources",), "random") | both(T, ("same prompts", T), "as_given")
    return rows

def how_many_stages() -> dict:
    "T = 1 ... 8 parts of the ordered data, at the beta that is best for three stages; at a beta that grows with T; and three stages at an eighth and at eight times their beta, which take the ladder of `primary` to both sides."
    best = choices()["sDPO"]
    rows = {f"T = {T}": ("sDPO", best | dict(chunks=T)) for T in range(1, 9)} | {f"T = 3, {f:g} beta": ("sDPO", best | dict(beta=best["beta"] * f)) for f in (1 / 8, 8)}
    return rows | {f"T = {T}, beta T/3": ("sDPO", best | dict(chunks=T, beta=best["beta"] * T / 3)) for T in (1, 2, 5, 8)}


# %% [markdown]
# Two throw one switch at a time: of stepwise DPO, and of the paper's tables.

# %%
#| export
def why_it_works() -> dict:
    "Reference x order x schedule, all at DPO's best settings and T = 3; DPO itself, with twice the epochs, at beta/3, and stages that restart from S."
    dpo = choices()["DPO"]
    factorial = {f"{ref}, {order}, {restart}": ("sDPO", dpo | dict(reference=ref, order=order, restart=restart))
                 for ref in ("fixed", "moving") for order in ("random", "easy_to_hard", "hard_to_easy") for restart in ("never", "stage")}
    return factorial | {"DPO": ("DPO", dpo), "DPO, twice the epochs": ("DPO", dpo | dict(epochs=2 * COMMON["epochs"])), "DPO at beta/3": ("DPO", dpo | dict(beta=dpo["beta"] / 3)), "from S": ("sDPO, target S", dpo)}

def paper_in_miniature() -> dict:
    "S trained on the hardest source against three references, S, M_1 and M_2 (the paper's table 1); and stages that each start from S (its figure 3)."
    dpo = choices()["DPO"]
    return {"target S": ("sDPO, target S", dpo)} | {f"riddle against M_{len(before)}" if before else "riddle against S": ("sDPO", dpo | dict(chunks=[*before, "riddle"], order="as_given", init_target="S"))
            for before in ([], ["primer"], ["primer", "digest"])}


# %% [markdown]
# Four are about the data: how they are cut, what a stage on one skill does to the others, prompts unlike the training's, and pairs that are written on the way.

# %%
#| export
def how_to_partition() -> dict:
    "Three chunks, ordered in both directions by several measures, by gamma also at the best settings of stepwise DPO; and two selections, with as many pairs at random."
    dpo, tuned = choices()["DPO"], choices()["sDPO"]
    rows = {"accuracy of sources": "easy_to_hard", "accuracy of sources, hard first": "hard_to_easy", "random": "random"}
    out = {name: ("sDPO", dpo | dict(order=order)) for name, order in rows.items()}
    out |= {f"gamma of pairs{there}{how}": ("sDPO", settings | dict(order=order, chunks=3), ("one source",)) for there, order in (("", "easy_to_hard"), (", hard first", "hard_to_easy")) for how, settings in (("", dpo), (", tuned", tuned))}
    for what, easy in (("length", 1), ("distance", -1), ("true gap", -1)):
        out |= {f"{what} of pairs{there}": ("sDPO", dpo | dict(order="as_given", chunks=3), ("sorted", what, sign)) for there, sign in (("", easy), (", hard first", -easy))}
    selections = {"DPO on the smallest gaps": "smallest", "DPO on the largest gaps": "largest", "DPO on a random part": "random"}
    return out | {"DPO": ("DPO", dpo)} | {name: ("DPO", dpo, ("selected", keep, dpo["beta"], dpo["lr"])) for name, keep in selections.items()}

def stage_by_stage() -> dict:
    "Sources that are skills, so that a stage can unlearn what another taught."
    dpo = choices()["DPO"]
    return {f"skills, {order}": ("sDPO", dpo | dict(order=order), ("skills",)) for order in ("easy_to_hard", "hard_to_easy")}

def new_domain() -> dict:
    "Three skills trained, the fourth measured; strings longer than any, and letters that were never seen."
    best, methods = choices(), ("S", "DPO", "sDPO")
    rates = {"DPO": best["DPO"], "sDPO": best["sDPO"], "DPO at sDPO's rate": best["DPO"] | dict(lr=best["sDPO"]["lr"])}
    rows = {f"{m}, without {skill}": (m.split()[0], settings, ("without", skill)) for skill in SKILLS for m, settings in rates.items()}
    return rows | {f"{m}, {split}": (m, best.get(m, {}), ("sources",), split) for split in ("seven letters", "other letters") for m in methods}

def with_new_data() -> dict:
    "Three stages on pairs that M_{t-1} wrote, against pairs that S wrote, under four labels; and pairs of S at larger beta, to compare at equal KL."
    best = choices()["sDPO"]
    labels = {"true": (), "judge, 0 % wrong": (0.,), "judge, 20 % wrong": (0.2,), "implicit": ()}
    def cell(writer, label, **settings): return "sDPO", best | dict(order="as_given") | settings, ("new", writer, label.split(",")[0], *labels[label])
    rows = {f"{writer}, {label}": cell(writer, label) for writer in ("S", "S, as many", "policy") for label, error in labels.items() if writer != "S, as many" or error != (0.2,) and label != "implicit"}
    return rows | {f"S, {label}, {f:g} beta": cell("S", label, beta=best["beta"] * f) for label in ("true", "judge, 0 % wrong") for f in (2, 4)}


# %% [markdown]
# And one is about the body of S. Four others have as many layers of the same width as the Llama, and nearly as many parameters:

# %%
#| export
_WIDE = dict(hidden_size=96, num_attention_heads=4)
BODIES = { # of the size of the Llama, which has 337,248 parameters
    "gpt2": dict(n_embd=96, n_layer=3, n_head=4, n_positions=128, resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.),
    "opt": _WIDE | dict(num_hidden_layers=3, ffn_dim=384, word_embed_proj_dim=96, max_position_embeddings=128, dropout=0.),
    "bloom": dict(hidden_size=96, n_layer=3, n_head=4),
    "qwen3": _WIDE | dict(num_hidden_layers=3, num_key_value_heads=4, head_dim=24, intermediate_size=256, max_position_embeddings=128, tie_word_embeddings=True),
}

def make_body(kind: str, tokenizer, seed: int=0):
    "A small model of this kind with random weights, drawn without touching the global random state."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **BODIES[kind]))


# %%
small = {"llama": make_model(make_tokenizer())} | {kind: make_body(kind, make_tokenizer()) for kind in BODIES}
assert all(abs(m.num_parameters() / small["llama"].num_parameters() - 1) < 0.05 for m in small.values())
{kind: f"{m.num_parameters():,}" for kind, m in small.items()}


# %% [markdown]
# A better S leaves less to be gained. So another body's S is fine-tuned until its reward on the validation prompts is that of the world's Llama, within 0.01, as a mean of four samplings; then it writes its pairs. Most epochs go by before a body sees the rules at all, BLOOM's above all; they are spent once for each body, in a search world, up to a reward of 0.45, and its worlds go on from there.

# %%
#| export
def _level(model, tokenizer, prompts): return np.mean([true_rewards(model, tokenizer, prompts, seed=s) for s in range(4)])

def tuned_to(target: float, start, within=0.01, most=60): # (texts, tokenizer, seed) -> S, as `freeze_world` asks for
    "Fine-tuning of a model until its validation reward is as asked: epoch by epoch; one that overshoots is taken back and tried at half its learning rate. Raises RuntimeError where `most` epochs do not suffice."
    def train(texts, tokenizer, seed):
        torch.set_num_threads(1)
        model, lr = copy.deepcopy(start), 2e-3
        for epoch in range(most):
            before = copy.deepcopy(model.state_dict())
            got = _level(sft(model, tokenizer, texts["sft"], epochs=1, lr=lr, seed=seed + 1000 * epoch), tokenizer, texts["validation"])
            if abs(got - target) <= within: return model
            if got > target: model.load_state_dict(before); lr /= 2
        raise RuntimeError(f"world {seed}: after {most} epochs a {model.config.model_type} has a true reward of {got:.3f}; {target:.3f} is asked for")
    return train

def begun(body: str, worlds="runs/worlds"):
    "Where all worlds of a body begin: random weights, fine-tuned in a search world to a true reward of 0.4 to 0.5."
    def make(folder): tuned_to(0.45, make_body(body, tok := make_tokenizer()), within=0.05)(world_texts(SEARCH_WORLDS[0]), tok, SEARCH_WORLDS[0]).save_pretrained(folder)
    return load_model(str(_once(Path(worlds) / f"begun-{body}", make)))

def as_good_as(world, body: str, worlds="runs/worlds"): # -> (texts, tokenizer, seed) -> S
    "How S of another body is trained: to the validation reward of this world's S."
    base, tok = load_base(world)
    return tuned_to(_level(base, tok, world.validation), begun(body, worlds))


# %% [markdown]
# Settings that suit a Llama need not suit a GPT-2, so each body has a search of its own, smaller than the first: six $\beta$ and four learning rates, for DPO and stepwise DPO, in one of the search worlds. (It began with four; when BLOOM was best at the smallest, one was added on each side.) It is run in five
# worlds with four seeds each; S is measured on their validation prompts, too, with other luck than it was tuned with.

# %%
#| export
BODY_WORLDS = range(1, 6)

def search_bodies() -> list[Cell]: return [Cell(SEARCH_WORLDS[0], 0, m, dict(beta=b, lr=r), "validation", body=body) for body in BODIES for m in ("DPO", "sDPO") for b in BETAS[:6] for r in RATES]
def starts(body: str) -> list[Cell]: return [Cell(w, 0, "S", {}, "validation", body=body) for w in BODY_WORLDS]

def choices_of(body: str) -> dict: # method -> settings
    "What the search chose for a body."
    return choices() if body == "llama" else choose(rows_of([c for c in search_bodies() if c.body == body]))

def which_architecture() -> dict:
    "S, DPO and stepwise DPO in worlds whose S has another body."
    bodies = ("llama", *BODIES)
    return {f"{body}, {m}": (m, {} if m == "S" else choices_of(body)[m], ("sources",), "test", body) for body in bodies for m in ("S", "DPO", "sDPO")}


# %%
#| export
GRIDS = {f.__name__: f for f in (primary, smaller_beta, why_it_works, how_many_stages, paper_in_miniature, how_to_partition, stage_by_stage, new_domain, with_new_data, which_architecture)}
DRAWS = {"which_architecture": (BODY_WORLDS, range(4))} # the others: WORLDS, SEEDS

def cells_of(grid: str) -> dict: # name of a row -> its cells
    worlds, seeds = DRAWS.get(grid, (WORLDS, SEEDS))
    def row(method, settings, data=("sources",), split="test", body="llama"): return [Cell(w, s, method, settings, split, data=data, body=body) for w in worlds for s in seeds]
    return {name: row(*what) for name, what in GRIDS[grid]().items()}

SEARCHES = {"pilot": pilot, "search": search, "search_bodies": lambda: search_bodies() + [c for body in ("llama", *BODIES) for c in starts(body)]}

def all_cells(what: str) -> list[Cell]:
    "Every cell of one of SEARCHES or GRIDS."
    return SEARCHES[what]() if what in SEARCHES else sum(cells_of(what).values(), [])

def load_grid(grid: str) -> dict: # name of a row -> rows of the table
    "What was run of a grid. Raises ValueError where cells are missing, or where a world was run with two S (built anew, on another machine), so that rows of one grid are always about the same worlds and seeds."
    table = _read(_path(None), "key")
    found = {name: (_of(table, cells), len(cells)) for name, cells in cells_of(grid).items()}
    missing = {name: n - len(rows) for name, (rows, n) in found.items() if len(rows) < n}
    if missing: raise ValueError(f"{grid}: {sum(missing.values())} cells have not been run, of {', '.join(missing)}; `python -m sdpo_nb.experiments {grid}` goes on")
    found = {name: rows for name, (rows, _) in found.items()}
    starts = pd.concat(found.values()).assign(body=lambda t: t["body"].fillna("llama")).groupby(["world", "body"])["weights"].nunique()
    if (starts > 1).any(): raise ValueError(f"{grid}: {', '.join(f'world {w:g} ({body})' for w, body in starts.index[starts > 1])} was run with more than one S; delete the older rows and run them again")
    return found


# %% [markdown]
# ## The runner

# %%
#| export
FRONTIER_BETAS = (1e9, 100, 60, 40, 25, 15, 10, 8, 6, 5, 4, 3, 2, 1.5, 1, 0.7, 0.5, 0.3, 0.1)

def world_curve(seed: int, worlds="runs/worlds") -> pd.DataFrame:
    torch.set_num_threads(1)
    w = build_world(seed, worlds); base, tok = load_base(w)
    return frontier(base, tok, w.test, list(FRONTIER_BETAS), samples=30).assign(world=seed)

def run_frontiers(worlds=WORLDS, folder=None) -> dict: # world -> frontier
    "The best that each KL can buy, in every world; kept in frontiers.parquet."
    path = Path(folder or RESULTS) / "frontiers.parquet"
    done = _read(path, "world"); known = set(done["world"])
    with _pool() as pool: new = list(pool.map(world_curve, [w for w in worlds if w not in known]))
    if new: done = _add(path, "world", *new)
    return {w: rows for w, rows in done.groupby("world") if w in worlds}

def small_cells() -> list[Cell]:
    "Every method, every kind of data and every kind of prompts once, in world 0 with few pairs."
    def cell(method="sDPO", split="validation", *data, **settings): return Cell(0, 0, method, dict(epochs=1) | settings, split, 32, data or ("sources",))
    given = dict(order="as_given")
    return [cell(m) for m in (*METHODS, *BASELINES)] + [cell(split=s) for s in ("seven letters", "other letters")] + [
        cell("sDPO", "validation", *data, **settings) for data, settings in (
            (("one source",), dict(chunks=3)), (("skills",), {}), (("without", "sort"), {}), (("same prompts", 3), given), (("sorted", "true gap", -1), given | dict(chunks=3)), (("selected", "largest", 0.3, 1e-4), dict(chunks=1)),
            (("new", "policy", "judge", 0.2), given), (("new", "S", "implicit"), given))]

def again(seed: int=0) -> pd.DataFrame: # one row a grid
    "A stored cell of each grid, at random, run once more: does today's code on this machine still make what the table holds?"
    picked = {grid: random.Random(f"{grid} {seed}").choice(all_cells(grid)) for grid in GRIDS}
    stored = rows_of(list(picked.values())).set_index("key")
    with tempfile.TemporaryDirectory() as tmp: new = run_grid(list(picked.values()), tmp, "again").set_index("key")
    def row(c): return dict(world=c.world, body=c.body, seed=c.seed, method=c.method, same_S=stored["weights"][c.key] == new["weights"][c.key], stored=np.mean(stored["sampled"][c.key]), again=np.mean(new["sampled"][c.key]), other_rewards=np.mean(np.not_equal(stored["sampled"][c.key], new["sampled"][c.key])))
    return pd.DataFrame({grid: row(c) for grid, c in picked.items()}).T

def run(what: str):
    "One of: small, again, frontiers, or a name in SEARCHES or GRIDS."
    if what == "small":
        with tempfile.TemporaryDirectory() as tmp: print(run_grid(small_cells(), tmp, what)[["method", "tokens", "seconds"]].to_string())
    elif what in SEARCHES or what in GRIDS:
        rows = run_grid(all_cells(what), desc=what)
        print(f"{what}: {len(rows)} cells in the table, {rows['seconds'].sum() / 3600:.1f} core hours", flush=True)
        if what == "search": (RESULTS / "choices.json").write_text(json.dumps(choose(rows), indent=1) + "\n")
    elif what == "frontiers": run_frontiers()
    elif what == "again": print(again().to_string())
    else: raise SystemExit(f"usage: python -m sdpo_nb.experiments [small|again|frontiers|{'|'.join((*SEARCHES, *GRIDS))} ...]")

if __name__ == "__main__" and __spec__:
    import sys
    for what in sys.argv[1:] or [*SEARCHES, *GRIDS, "frontiers"]: run(what)

# %% [markdown]
# ## The eight answers
#
# Ten worlds, two seeds each. The questions stand in this page since commit `afb6ac7`, the settings since `fcaf101`; then the grid was run, once. (Fine-tuning on the chosen responses in world 10 was run again, when one of its pairs was found to hold an empty response.)
#
# At their best settings stepwise and plain DPO are *equal* in sampled reward: the interval lies within $\pm 0.02$, also at the same KL. Greedy answers of stepwise DPO are a little better, which turns out below to be its learning rate. The order of the chunks makes no difference to the sampled reward: easy first, random and hard first are equal. A moving reference is better than a fixed one, by little.
# Of the eight, one is large: a stage that starts from S throws away what the stages before it learned. And stepwise DPO at $\beta$ may or may not be plain DPO at $\beta/3$: the interval is wider than $\pm 0.02$.

# %%
main = load_grid("primary")
answers = contrasts(main)
here = answers.set_index("question")
assert all((here.loc[q, ["low", "high"]].abs() < 0.02).all() for q in ("stepwise against plain", "the same, at the KL of plain", "easy first against random order", "easy first against hard first"))
assert here[here["holm"] < 0.05].index.tolist() == ["the same, greedy", "moving against fixed reference", "target from M_{t-1} against from S"] and here["low"].iloc[-1] < -0.02
plot_contrasts(answers);

# %%
answers[["question", "mean", "low", "high", "p", "holm"]].round(3).set_index("question")

# %% [markdown]
# Are greedy answers better because of stages? The search gave DPO a learning rate of 0.0003 and stepwise DPO one of 0.0001, but for DPO that was a tie, and such a tie decides nothing about greedy answers or KL. So DPO was run once more, afterwards, at the rate of stepwise DPO:

# %%
tie = differences({f"{a} minus {b}, {what}": outcome(main[a], what) - outcome(main[b], what) for a, b in (("DPO at sDPO's rate", "DPO"), ("sDPO", "DPO at sDPO's rate")) for what in ("sampled", "greedy")})
assert tie["low"].iloc[1] > 0 > tie["high"].iloc[3] and (tie[["low", "high"]].iloc[[0, 2]].abs() < 0.02).all(axis=None)
plot_contrasts(tie);

# %% [markdown]
# It is as good in sampled answers, better in greedy ones than either, and half as far from S as before (0.8 nats, below). So nothing is left of the second difference in favour of stages; *a search that looks at one outcome leaves the others to chance.* (These 20 cells are exploratory: they were run after the answers.)

# %% [markdown]
# Behind the differences stand these means over worlds and seeds. Tokens are counted in thousands per run; those of other passes are the partition's and the references'.

# %%
shown = {name: main[name] for name in (*BASELINES, *METHODS, "sDPO at DPO's beta", "DPO at beta/T", "DPO at sDPO's rate")}
tokens = {name: {"tokens trained on": f"{rows['tokens'].mean() / 1000:.0f}", "of other passes": f"{rows['pass_tokens'].mean() / 1000:.0f}" if rows["pass_tokens"].notna().all() else ""} for name, rows in shown.items()}
means(shown).join(pd.DataFrame(tokens).T)

# %% [markdown]
# The distance from S has a price of its own, so a reward is fairly seen beside its KL. The line is the best that each KL can buy, the exact optimum $S\,e^{kr/\beta}$ of [chapter 08](../08_evaluate.ipynb), as a mean over the ten worlds. The table is how far a method stays under the line of its world; beyond the end of a line, at 1.2 nats in the mean, this is what is missing to 1.

# %%
curves = run_frontiers()
assert list(curves) == list(WORLDS)
curve = pd.concat(curves.values()).groupby("beta", as_index=False)[["reward", "kl"]].mean()
points = pd.DataFrame([dict(name=name, kl=outcome(rows, "kl").mean(), reward=outcome(rows, "sampled").mean()) for name, rows in shown.items()])
plot_frontier(curve[curve["kl"] < 1.3 * points["kl"].max()], points)
plt.gca().legend(frameon=False, fontsize="small", bbox_to_anchor=(1, 1));


# %%
def below(rows): # (worlds, seeds, 1): how far under the frontier
    return -np.array([[excess(r, kl, curves[w]) for r, kl in zip(*per)] for w, per in zip(WORLDS, zip(outcome(rows, "sampled").mean(2), outcome(rows, "kl").mean(2)))])[..., None]
assert all(below(rows).mean() > 0 for name, rows in shown.items() if name != "S") and abs(below(shown["S"]).mean()) < 0.01
pd.Series({name: as_text(interval(below(rows))) for name, rows in shown.items()}).to_frame("true reward below the best at its KL")

# %% [markdown]
# ### What sampled reward leaves out
#
# Equal reward is not equal distance. The same comparisons, with their other outcomes beside the sampled one:

# %%
ASKED = {"stepwise against plain": ("sDPO", "DPO"), "the same, at the rate of stepwise": ("sDPO", "DPO at sDPO's rate"), "easy first against random order": ("sDPO", "sDPO, random"), "easy first against hard first": ("sDPO", "sDPO, hard first"),
         "moving against fixed reference": ("sDPO", "sDPO, fixed reference"), "random order against plain, at the same rate": ("sDPO, random", "DPO at sDPO's rate")}
beside = pd.DataFrame({q: {label: interval(measure(main[a]) - measure(main[b])) for label, measure in
                           {"sampled": lambda r: outcome(r, "sampled"), "greedy": lambda r: outcome(r, "greedy"), "KL from S (nats)": lambda r: outcome(r, "kl"), "below the frontier": below}.items()} for q, (a, b) in ASKED.items()}).T
level = interval(at_kl([main[f"sDPO, {f:g} beta"] for f in LADDER], outcome(main["DPO at sDPO's rate"], "kl")) - outcome(main["DPO at sDPO's rate"], "sampled").mean(2, keepdims=True))
assert level[2] < 0 and beside.loc["easy first against random order", "KL from S (nats)"][1] > 0.3 and abs(np.array(beside.loc["moving against fixed reference", "below the frontier"])).max() < 0.02
print(f"stepwise minus plain at the same rate, at the KL of plain: {as_text(level)}")
beside.map(as_text)

# %% [markdown]
# Random order brings the same reward 0.43 nats nearer to S (its best $\beta$ is 2.4, that of easy first 1.2), and so brings it exactly where plain DPO at $\beta = 0.6$ and that rate is, in all three outcomes. A moving reference pays for its 0.012 with 0.26 nats, and is no nearer to the frontier. And against plain DPO at the same rate, at *its* KL, stages are a little worse. All of this is exploratory, and all of it says: what differs between these methods, once tuned, is mostly how far they went.

# %% [markdown]
# What the grids cost, in core hours as they passed on two busy cores; a cell that two grids need is counted in the first. Before it, a world takes two to eight core minutes, and the beginning of a body two to ten.

# %%
known, hours = set(), {}
for name in (*SEARCHES, *GRIDS):
    cells = all_cells(name)
    rows = rows_of(cells); first = rows[~rows["key"].isin(known)]; known |= set(rows["key"])
    hours[name] = dict(cells=len({c.key for c in cells}), run=len(rows), **{"core hours": round(first["seconds"].sum() / 3600, 1)})
pd.DataFrame(hours).T

# %% [markdown]
# ## Claim by claim
#
# What the paper says or asks, and what the experiments found: differences of mean true reward. A primary question counts as different by its p-value, an exploratory one where its interval excludes 0.

# %%
#| export
CLAIMS = { # claim -> the primary question
    "sDPO is better than DPO (table 3)": "stepwise against plain", "sDPO is better than DPO at the same KL": "the same, at the KL of plain", "sDPO gives better greedy answers than DPO (its learning rate does)": "the same, greedy",
    "easy to hard is better than a random split (table 3)": "easy first against random order", "easy to hard is better than hard to easy": "easy first against hard first",
    "a reference that moves up is better than a fixed one": "moving against fixed reference", "a stage that starts at $M_{t-1}$ is better than one that starts at S (figure 3)": "target from M_{t-1} against from S",
    "sDPO at $\\beta$ is better than DPO at $\\beta/T$ (not in the paper)": "stepwise at beta against plain at beta/T"}
EXPLORED = { # claim -> page, grid, row a, row b; {} stands for every body but the Llama
    "sDPO is better than DPO at one $\\beta$ and rate, the best for DPO": ("paper_in_miniature", "primary", "sDPO at DPO's beta", "DPO"),
    "sDPO is better than DPO at one $\\beta$ and rate, the best for sDPO": ("how_many_stages", "how_many_stages", "T = 3", "T = 1"),
    "a more aligned reference makes a better model, at one $\\beta$ (table 1)": ("paper_in_miniature", "paper_in_miniature", "riddle against M_2", "riddle against S"),
    "a reference that moves up is better, at one $\\beta$": ("why_it_works", "why_it_works", "moving, easy_to_hard, stage", "fixed, easy_to_hard, stage"),
    "easy to hard by the $\\gamma$ of single pairs is better than a random split": ("how_to_partition", "how_to_partition", "gamma of pairs", "random"),
    "eight stages are better than three, at one $\\beta$": ("how_many_stages", "how_many_stages", "T = 8", "T = 3"),
    "three stages are better than one, where $\\beta$ grows with their number": ("how_many_stages", "how_many_stages", "T = 3", "T = 1, beta T/3"),
    "sDPO is better than DPO, each tuned, in four other architectures (their mean)": ("which_architecture", "which_architecture", "{}, sDPO", "{}, DPO"),
    "sDPO carries over to longer strings better than DPO": ("new_domain", "new_domain", "sDPO, seven letters", "DPO, seven letters"),
    "pairs written between the stages are better than as many before them": ("with_new_data", "with_new_data", "policy, true", "S, as many, true"),
}

def claims() -> pd.DataFrame: # claim, what we found, how sure, where
    "Every claim with its difference, interval and verdict, from the stored table."
    def row(claim, mean, low, high, different, why, page):
        verdict = ("better" if mean > 0 else "worse") if different else "equal" if max(-low, high) < 0.02 else "we cannot tell"
        small = ", but little" if different and max(-low, high) < 0.02 else ""
        return {"claim": claim, "what we found": f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", "how sure": f"{verdict}{small}, {why}", "where": page}
    grids = {grid: load_grid(grid) for grid in {"primary", *(grid for _, grid, _, _ in EXPLORED.values())}}
    answers = contrasts(grids["primary"]).set_index("question")
    rows = [row(claim, *(a := answers.loc[q])[["mean", "low", "high"]], a["holm"] < 0.05, f"p = {a['holm']:.2f} (Holm)", "protocol") for claim, q in CLAIMS.items()]
    for claim, (page, grid, a, b) in EXPLORED.items():
        found = grids[grid]
        mean, low, high = interval(np.mean([outcome(found[a.format(body)], "sampled") - outcome(found[b.format(body)], "sampled") for body in (BODIES if "{}" in a else [""])], axis=0))
        rows.append(row(claim, mean, low, high, not low <= 0 <= high, "exploratory", page))
    return pd.DataFrame(rows)


# %%
claims().set_index("claim")

# %% [markdown]
# ## What you now have
#
# - `Cell`, `run_cell`, `run_grid`: any setting of stepwise DPO in any world, measured, resumable, one row each.
# - `contrasts`: paired differences with intervals and corrected p-values, which refuses rows of other worlds.
# - Eight questions and a margin that were fixed before the answers, and a list of what came after.
#
# ## Questions to test yourself
#
# 1. Why do 600 test prompts and two seeds not make up for a single world?
# 2. A method wins at its best $\beta$ but loses at equal KL. What has it been doing?
# 3. "Moving against fixed" is significantly different from 0 and lies within $\pm 0.02$. Is that a contradiction?
#
# ## Try this
#
# - Write a method into `METHODS` (label smoothing, say), search its $\beta$ and learning rate, and compare it with DPO in two worlds.
# - Drop the pairing: take worlds 1 to 5 for one method and 6 to 10 for the other. How large must a difference be to be seen?
