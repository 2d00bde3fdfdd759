# %% [markdown]
# # One stage of a run
# > Which model is the reference, when it is asked, and what is written down about a stage.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/13_stages.ipynb)
#
# **You should know** how [a stage is trained](06_trainer.ipynb), that [a run is a folder](10_folder.ipynb), and [what is asked of it](12_plan.ipynb). If you came to learn what stepwise DPO does, read [chapter 14](14_stepwise.ipynb) first; it needs
# nothing of this one. **Time** an hour and twenty minutes to read with its code, half a minute to run.
#
# [Chapter 06](06_trainer.ipynb) trains a model on pairs against a table: the reference's log-probabilities of these pairs. It does not ask where the table came from. In a run with stages this is the question on which everything hangs. The reference of stage $t$ is $M_{t-1}$, the model that the stage before
# left behind, and in three places it is easy to take another one without noticing:
#
# - **Too late.** The policy *is* $M_{t-1}$ until its first step. A table computed one line later belongs to nobody.
# - **Of another chunk.** The reference must have read the pairs of $D_t$. A table of $D_{t-1}$ has the right owner and the wrong rows.
# - **After a crash.** A run that goes on must find the table, the chunk and the weights that it had, to the bit, or it is another run.
#
# This chapter builds the steps of a stage in an order that avoids these mistakes. Each table carries the hash of its model, so a mistake that is made can be seen. The steps are:
#
# ```
# ask         M_{t-1} reads D_t            the reference table, before anything is trained
# train       M_{t-1} ---> M_t             chapter 06
# measure     M_t reads a probe of every chunk, and the held-out pairs
# save        the model, then stage.json   the mark that the stage is finished
# ```

# %%
#| default_exp stages

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
import math, time, warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import concatenate_datasets, load_from_disk

from sdpo_nb.evaluate import as_text, greedy_answers
from sdpo_nb.folder import (
    base_folder, check_fresh, code_hash, folder_of, load_exactly, load_merged, machine_of, naming, open_folder,
    read_part, recorded, save_adapter, save_model, share_changed
)
from sdpo_nb.logprobs import (
    SMALL, Clock, LogprobTable, check_model, check_rows, has_adapter, load_model, pair_tokens, pairs_hash,
    pick_precision, read_table, replacing, response_logprobs, score_pairs, stored_dtype, table_kind,
    weights_hash, write_json
)
from sdpo_nb.lora import (
    adapter_of, adapter_size, add_adapter, is_wrapped, join_adapters, lora_config, put_back, read_adapter,
    unwrapped
)
from sdpo_nb.loss import certificate, dpo_loss, reward_accuracy
from sdpo_nb.packing import choose_logprobs
from sdpo_nb.partition import mean_interval, partition
from sdpo_nb.plan import (
    Chunk, StepwiseConfig, asked_device, changed, check_apart, check_chunks, check_held_out, check_names,
    data_notes, extent, foreign_weights, load_sources, read_sources, seen_in_training
)
from sdpo_nb.report import Run
from sdpo_nb.trainer import (
    GIB, MOST, TRAINING, as_line, check_memory, compile_for, free_memory, peak_memory, plan_for,
    share_of_responses, train_stage, wants_compiling, why_not_same_bits
)

# %%
import io, shutil, tempfile
from contextlib import redirect_stdout

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from sdpo_nb.folder import alone_in
from sdpo_nb.logprobs import load_tokenizer
from sdpo_nb.preferences import Source
from sdpo_nb.trainer import TrainConfig
from sdpo_nb.world import complaint, load_world

torch.set_num_threads(1)
pd.set_option("display.width", 180, "display.max_columns", 20, "display.max_colwidth", 90)

w, tmp = load_world(), Path(tempfile.mkdtemp())
tok = load_tokenizer(w.base)
quick = dict(beta=0.3, lr=1e-4, epochs=2, precision="fp32")
all_three = load_sources(w.sources, tok, StepwiseConfig())
D_3 = Chunk("riddle", all_three[-1].pairs)

# %% [markdown]
# ## A stage by hand
#
# Without a folder, a stage is three calls. $M_0$ reads the pairs. It is trained against what it said, and is $M_1$ then. $M_1$ reads the same pairs again. For each pair, $\gamma$ is how much likelier the chosen response is than the rejected one, in nats. On what share of the pairs will it have risen: nearly all, or about three quarters?

# %%
sources = {s.name: s for s in all_three}
D_1 = sources["primer"].pairs
model = load_model(w.base, "cpu")
how = choose_logprobs(model, [D_1[i] for i in range(64)]) # packed rows or padded ones
budget = 4 * 4096                                         # tokens in a forward pass; a run takes the same

said_before = score_pairs(model, D_1, logprobs=how, token_budget=budget)   # ask
train_stage(model, D_1, said_before, TrainConfig(**quick), tmp / "alone")  # train
said_after = score_pairs(model, D_1, logprobs=how, token_budget=budget)    # measure

by_hand = weights_hash(model)
change = said_after.gamma(D_1) - said_before.gamma(D_1)
print(f"risen on {(change > 0).float().mean():.0%} of the pairs, by {change.mean():.2f} nats on average")


# %% [markdown]
# It rises on most pairs, not on all. Nothing else in this chapter changes what is learned. What it adds is that the table is the right one, that a crash costs little, and that everything is written down. At the end we compare `run_stage` with these three calls.
#
# How many models are in memory? One, while the stage asks, trains and measures. (When S is stored in bf16 or fp16, saving also loads the model before the stage on the CPU for a moment, to count the weights that changed.) The line below follows the one model through two stages. Above it stands which model the weights are, below it what they are used for.
#
# ```
# weights    M_0 = S                M_0 ~> M_1            M_1                        M_1 ~> M_2           M_2
#            |--------------------|---------------------|--------------------------|--------------------|----------
# used to    read all pairs,        train on D_1,         read the probes, answer,   train on D_2,        read, answer,
#            decide the chunks      against the table     be saved, read D_2         against the table    be saved
#                                   of M_0                (the table of stage 2)     of M_1
# ```
#
# One could also keep the reference beside the policy, as a second model. That takes the memory of a second model, and a second forward pass in every step of every epoch. A table takes a few bytes per pair, and is computed once. Its price: when the policy has moved on, nobody is left to ask about other pairs. So everything that will be needed must be asked in time.
#
# ## One way to make a table
#
# A stage needs many things. They travel together, as a `Context`. Its fields are of four sorts:
#
# | fields | what for |
# |---|---|
# | `config`, `folder`, `base`, `revision`, `tokenizer`, `held` | what the user asked for; `held` are the sources that are only measured |
# | `device`, `precision`, `dtype`, `logprobs`, `chosen` | how it is computed. `dtype` is that in which $M_t$ is saved. `chosen` remembers whether rows are [packed](04_packing.ipynb), because finding out costs some passes |
# | `clock`, `before`, `otherwise` | where the run stands: tokens left, steps of finished stages, and what may change the last bits of a run that goes on, to be said once |
# | `talks`, `tracker`, `on_step`, `on_stage` | who is told. `talks` is false for models of less than five million parameters |
#
# You need three of its methods to read on. `at(t)` is the folder of $M_t$, where $M_0$ is S. `load(t)` is the model. And `score(t, model, pairs, what)` is **the only way in which a table of log-probabilities is made in a run**: it takes the number of the model and puts the table into that model's folder. It reads what is there, and computes what is missing. That the model really is $M_t$ is up to the caller; further below we give it the wrong one.

# %%
#| export
@dataclass
class Context:
    "What every stage needs to know."
    config: StepwiseConfig
    folder: Path         # of the run
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
    tracker: object = None  # an Accelerator, or none
    on_step: object = None  # the caller's, or none
    on_stage: object = None # the same

    def at(
        self,
        t: int, # of M_t; 0: S
    ) -> Path:
        "The folder of M_t."
        return folder_of(self.folder, t)

    def load(
        self,
        t: int, # of M_t
    ):
        "M_t in fp32."
        if not t: return load_model(self.base, self.device, self.revision)
        return load_exactly(self.at(t), self.device)

    def table(
        self,
        t: int, # of M_t
    ):
        "What M_t has said so far."
        return read_table(self.at(t) / "logprobs")

    def score(
        self,
        t: int, # of M_t
        model,  # M_t itself
        pairs,  # tokenised
        what: str, # their name, for the bar
    ):
        "The table of M_t, once it holds these pairs."
        who = f"the model of stage {t}" if t else "S"
        return self.score_to(self.at(t) / "logprobs", model, pairs, f"{who} reads {what}")

    def score_all(
        self,
        t: int, # of M_t
        model,  # M_t itself
        chunks, # of which a probe is read
    ):
        "M_t reads everything that every model is measured on."
        for d in chunks: self.score(t, model, d.probe(self.config.probe), d.name)
        for s in self.held: self.score(t, model, s.pairs, f"{s.name}, held out")

    def score_to(
        self,
        folder, # of the table
        model,  # whose it is
        pairs,  # tokenised
        desc: str, # of the bar
    ):
        "The table in a folder, once it holds these pairs."
        how = self.how(model, pairs)
        budget = _scoring_budget(self.config, how, model.device)
        return score_pairs(model, pairs, folder, self.precision, how, budget, desc=desc, clock=self.clock)

    def how(
        self,
        model, # whatever is to read
        pairs, # on the first of which packing is tried
    ):
        "The function that computes log-probabilities, packed or padded: asked once for each kind of model."
        kind = type(model).__name__, has_adapter(model)
        if kind not in self.chosen: self.chosen[kind] = self.logprobs or self._choose(model, pairs)
        how = self.chosen[kind]
        if wants_compiling(self.config, model.device): compile_for(model, how, self.precision, self.config)
        return how

    def _choose(self, model, pairs):
        some = [pairs[i] for i in range(min(len(pairs), 64))]
        return choose_logprobs(model, some, self.config.packing, self.precision)

    def after_step(
        self,
        t: int, # the stage
        row: dict, # its line of metrics.jsonl
    ):
        "Tell the tracker and the caller of a step."
        if self.tracker:
            numbers = {name: float(v) for name, v in row.items() if isinstance(v, (int, float))}
            self.tracker.log(numbers | dict(stage=t), step=self.before + row["step"])
        if self.on_step: self.on_step(dict(stage=t) | row)


# %% [markdown]
# How many tokens go through the model at once when it only reads? Nothing is kept for a backward pass, so packed rows may be four times as long as in training.

# %%
#| export
def _scoring_budget(config, logprobs, device):
    "Tokens of a forward pass without gradients."
    usual = MOST // 4 if torch.device(device).type == "cuda" else 4096
    packed = getattr(logprobs, "attention", "") in ("packed", "flash")
    return (config.token_budget or usual) * (4 if packed else 1)


# %%
assert _scoring_budget(StepwiseConfig(), response_logprobs, "cpu") == 4096
assert _scoring_budget(StepwiseConfig(token_budget=100), response_logprobs, "cpu") == 100

# %% [markdown]
# S reads 64 pairs of `riddle`. The second call finds nothing to do, and writes nothing:

# %%
ctx = Context(
    config=StepwiseConfig(**quick),
    folder=tmp / "shared",
    base=w.base,
    tokenizer=tok,
    device=torch.device("cpu"),
    precision="fp32",
    logprobs=None,
    dtype=torch.float32,
)
S = ctx.load(0)
first = ctx.score(0, S, D_3.probe(64), "riddle")
files = sorted((ctx.at(0) / "logprobs").iterdir())
again = ctx.score(0, S, D_3.probe(64), "riddle")
assert len(first.rows) == 64
assert again.rows.equals(first.rows)
assert sorted((ctx.at(0) / "logprobs").iterdir()) == files
print(ctx.at(0).relative_to(tmp), "and", ctx.at(2).relative_to(tmp))


# %% [markdown]
# ## Chunks that stay what they are
#
# To [partition](05_partition.ipynb) the pairs, S must read them all. That pass is not wasted: S is $M_0$, so its table *is* the reference table of stage 1.
#
# Whatever was decided is written down, and read again by every later call. Why not decide again? Two sources may have nearly the same accuracy. On another machine, the last digit of one log-probability would be enough to change their places, and the run would go on with other chunks. A file that was edited by hand is
# checked: every pair must be in exactly one chunk.

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

def partition_of(
    loaded, # sources that are trained on
    table,  # what S said about their pairs
    config: StepwiseConfig, # its order, order_by, chunks and seed count
):
    "The partition that a run's settings ask for."
    T = config.chunks if isinstance(config.chunks, int) else None
    return partition(loaded, table, config.order, T, config.seed, order_by=config.order_by)

def _decide(loaded, table, config):
    "What partition.json holds."
    part = partition_of(loaded, table, config)
    return dict(
        order=config.order,
        measures=part.measures.to_dict("records"),
        names=part.names,
        chunks=part.chunks, # rows of all pairs
        counts=[dict(source=s.name) | s.counts for s in loaded],
    )


# %%
parts = _partitioned(all_three, S, ctx)
print("order:", [d.name for d in parts])

path = tmp / "shared/partition.json"
decided = read_part(path)
decided["chunks"][0] += decided["chunks"][1][:1] # one pair twice
write_json(path, decided)
print(complaint(_partitioned, all_three, S, ctx))


# %% [markdown]
# A chunk that a function makes is kept in its stage's folder, for the same reason. The function may let the model write answers, and a second call would make other ones. It may return whatever [a source](12_plan.ipynb) may be: rows, a file, or a dict with `chat=True`. What it may not do is change the model: stage $t$ would start at another one than $M_{t-1}$.

# %%
#| export
def made_chunk(
    t: int, # the stage
    policy, # M_{t-1}, which the function may ask; None: the chunk must be there
    ctx: Context, # of the run
) -> Chunk: # D_t, or None where the function has no more
    """The chunk that the user's function makes for stage t; kept in the stage's folder.

    Raises ValueError for pairs that cannot be used, for a function that changes the model, and for a
    kept chunk that is missing or damaged.
    """
    path = ctx.at(t) / "chunk"
    if policy is not None and path.exists():
        begun = path.parent if t > 1 else ctx.folder # S has answered prompts of the first pairs
        print(f"stage {t} goes on with the pairs that an earlier call made; remove {begun} to make them anew")
    elif policy is not None:
        got = _asked(t, policy, ctx)
        if got is None: return None
        made = _checked(t, got, policy, ctx)
        with replacing(path) as tmp: made.save_to_disk(str(tmp))
    with naming(path): return Chunk(f"chunk {t}", load_from_disk(str(path)))

def _asked(t, policy, ctx):
    "What the function returns for stage t. It may ask the model, which must be M_{t-1} afterwards, too."
    before = weights_hash(policy)
    got = ctx.config.chunks(t, policy)
    if weights_hash(policy) == before: return got
    raise ValueError(f"chunks, stage {t}: the function changed the model; work on a copy")

def _checked(t, got, policy, ctx):
    "What the function returned for stage t, as tokenised pairs; what is worth a look is said."
    try:
        if isinstance(got, dict) and "eval_share" in got: raise ValueError("nothing is held out of it")
        made, = load_sources({f"chunk {t}": got}, ctx.tokenizer, ctx.config)
        check_rows(policy, *extent(made.pairs))
    except ValueError as e: raise ValueError(f"chunks, stage {t}: {e}") from e
    _say_data(data_notes(made, bool(ctx.tokenizer.chat_template)), ctx.talks)
    return made.pairs

def _say_data(notes, always):
    "Print them. Of the sources of a tiny model, which come by the hundred, only those with a warning."
    warned = any("warning" in line for line in notes)
    if notes and (always or warned): print("\n".join(notes))


# %%
rows = [dict(prompt=prompt, chosen="ab", rejected="ba") for prompt in ("copy ab", "sort ba")]

def writes(t, model): # a real one would let the model answer
    asked.append(t)
    return rows if t == 1 else None

asked = []
ctx.config = StepwiseConfig(**quick, chunks=writes)
made = made_chunk(1, S, ctx)
with redirect_stdout(io.StringIO()) as said: again = made_chunk(1, S, ctx)
print(said.getvalue().strip().replace(f"{tmp}/", ""))
assert again.pairs["key"][:] == made.pairs["key"][:]
assert made_chunk(2, S, ctx) is None
asked # stage 1 once, although its chunk was wanted twice


# %% [markdown]
# A function that rounds the model to half precision, and back, because that answers faster:

# %%
def hurries(t, model):
    model.bfloat16()
    model.float()
    return rows

ctx.config = StepwiseConfig(**quick, chunks=hurries)
print(complaint(made_chunk, 2, load_model(w.base), ctx))


# %% [markdown]
# ## What a run says before it starts
#
# Somebody who starts a run of three hours wants to know four things in the first minute: what will be trained and on what device, whether the memory is enough, which stages will come, and where to look meanwhile. Tiny models, whose runs come by the hundred, stay silent, unless there is something to warn of.

# %%
#| export
def _say_memory(model_config, config, precision, device, sources):
    "One line on what training will need; an error, if that is not there."
    share = max((share_of_responses(s.pairs) for s in sources), default=0.5)
    try: plan = plan_for(model_config, config, precision, device, lora_config(config), share)
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
    how = f"on {ctx.device.type} in {ctx.precision}, {rows}"
    print(f"model: {ctx.base}, {millions:.0f} million parameters{_adapters(policy, ctx)}; {how}")

def _adapters(policy, ctx):
    if not ctx.config.lora_r: return ""
    millions = adapter_size(policy, ctx.config) / 1e6
    return f", {millions:.1f} million in adapters of rank {ctx.config.lora_r}"


# %% [markdown]
# Which stages will come, and where are their steps written? A stage has as many steps as it has batches, times the epochs. `primer` has 492 pairs. In batches of 32, and twice over, how many steps is that?

# %%
#| export
def _steps_of(chunk, config):
    "Optimizer steps of a stage."
    return config.epochs * math.ceil(len(chunk.pairs) / config.batch_size)

def _plan_line(chunks, ctx):
    "The stages that will come."
    stages = []
    for t, d in enumerate(chunks, 1):
        stages.append(f"{t}. {d.name} ({len(d.pairs)} pairs, {_steps_of(d, ctx.config)} steps)")
    where = f"{ctx.folder}/stage-1/metrics.jsonl"
    return f"stages: {', '.join(stages)}; each step becomes a line of {where}, and so on"


# %%
ctx.config = StepwiseConfig(**quick)
_say_model(S, parts[0].pairs, replace(ctx, base="S"))
print(_plan_line(parts, ctx).replace(str(tmp), "runs"))


# %% [markdown]
# The time that is left is counted in tokens. A token of training counts three times: one forward pass, and a backward pass that costs two. Before stage $t$, what is still to come?

# %%
#| export
def _tokens(pairs): return pair_tokens(pairs).sum()

def _tokens_ahead(t, chunks, ctx) -> float:
    "Tokens of forward passes from stage t to the end, for a moving reference; training counts threefold."
    every = [_tokens(d.pairs) for d in chunks]
    probed = [_tokens(d.probe(ctx.config.probe)) for d in chunks]
    first = max(t, 2) - 1 # the reference of stage 1 was computed for the partition
    reference = sum(every[first:]) - sum(probed[first:]) # their probes were read when the stage before ended
    training = TRAINING * ctx.config.epochs * sum(every[t-1:])
    measured = sum(probed) + sum(_tokens(s.pairs) for s in ctx.held) # after each stage
    return reference + training + (len(chunks) - t + 1) * measured


# %% [markdown]
# We take small probes, so that every term counts. Which of the three will cost most?

# %%
ctx.config = StepwiseConfig(**quick, probe=64)
all_tokens = [_tokens(d.pairs) for d in parts]
probe_tokens = [_tokens(d.probe(64)) for d in parts]
tokens = {
    "reference tables": sum(all_tokens[1:]) - sum(probe_tokens[1:]), # D_2 and D_3, less their probes
    "training": 3 * 2 * sum(all_tokens),                             # threefold, two epochs
    "measuring": 3 * sum(probe_tokens),                              # after each of three stages
}
assert _tokens_ahead(1, parts, ctx) == sum(tokens.values())
assert _tokens_ahead(4, parts, ctx) == 0
ctx.config = StepwiseConfig(**quick)
pd.Series(tokens, name="tokens of forward passes").to_frame()


# %% [markdown]
# ### Somebody may look on
#
# Whoever follows a run from elsewhere names a *tracker* that Accelerate knows: tensorboard, wandb, trackio. It is told of each step, and cannot change what is computed. One that is not installed is found out now, not after the first pass.

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
    plain = {}
    for name, v in settings.items(): plain[name] = v if isinstance(v, (int, float, str)) else str(v)
    accelerator.init_trackers("sdpo", plain)
    try: yield accelerator
    finally: accelerator.end_training()

def _tracker(config, folder):
    "An Accelerator that knows the tracker, or None. Raises ValueError as `tracking` does."
    if config.log_with == "none": return None
    with warnings.catch_warnings(action="ignore"):
        try: accelerator = Accelerator(log_with=config.log_with, project_dir=Path(folder) / "tracker")
        except ValueError as e: raise ValueError(f"log_with: {str(e).splitlines()[0]}") from e
    if not accelerator.log_with:
        raise ValueError(f"log_with: {config.log_with} is not installed; "
                         f"pip install {config.log_with}, or take none")
    return accelerator


# %%
print(complaint(tracking(StepwiseConfig(log_with="paper"), tmp).__enter__))


# %% [markdown]
# ## What makes it this run?
#
# A run that goes on must be the run that it was. So `config.yaml` holds, beside the settings, what the run is *made of*: hashes of the weights of S, of the pairs, of the held-out pairs and of a reference from elsewhere, and the machine. [Chapter 10](10_folder.ipynb) compares them, and refuses by name what has changed.

# %%
#| export
def _not_deterministic(policy, loaded, ctx):
    "What keeps a graphics card from computing the same bits again, if anything does and it matters."
    if ctx.device.type == "cpu" or not ctx.config.deterministic or not loaded: return None
    why = why_not_same_bits(policy.train(), ctx.how(policy, loaded[0].pairs), ctx.precision)
    policy.eval()
    if why: print(f"a run that is killed and goes on will not end in the same bits: {why}")
    return why

def _identity(policy, ctx, loaded, sources, held_out, reference_weights):
    "What a run is made of, beside its settings: for config.yaml."
    of_S = table_kind(policy, ctx.precision, response_logprobs)
    return dict(
        model=ctx.base,
        revision=ctx.revision,
        weights=of_S["weights"],
        base=of_S["config"],
        sources=sources,
        held_out=held_out, # may lie elsewhere in the next call: its pairs are compared
        reference_weights=reference_weights,
        device=ctx.device.type,
        machine=machine_of(ctx.device),
        loss_code=code_hash(ctx.config.loss),
        pairs=pairs_hash(*(s.pairs for s in loaded)),
        held_out_pairs=pairs_hash(*(s.pairs for s in ctx.held)) if ctx.held else None,
        not_deterministic=_not_deterministic(policy, loaded, ctx),
    )

def _written(source):
    "A source as a run file says it; nothing for what was only in memory."
    if isinstance(source, (str, Path)): return str(source)
    if not isinstance(source, dict) or not isinstance(source.get("source"), (str, Path)): return None
    return dict(source)


# %% [markdown]
# One source less, and the hash of the pairs is another one. The hash of S stays.

# %%
whole = _identity(S, ctx, all_three, {}, {}, None)
less = _identity(S, ctx, all_three[:2], {}, {}, None)
assert whole["weights"] == less["weights"] == weights_hash(S)
assert whole["pairs"] != less["pairs"]
sorted(name for name in whole if whole[name] != less[name])


# %% [markdown]
# ## The first pass
#
# Then S reads: all pairs that are trained on, for the partition and as the reference of stage 1, and all that are held out. Of the held-out pairs, their names and lengths are written down, for the report. The clock now knows how much there is to read and to train on, and can say how long it will take as soon as some of it is done.

# %%
#| export
def _first_pass(loaded, policy, ctx):
    "M_0 reads everything that it must; the chunks, unless a function will make them."
    sets = [Chunk(s.name, s.pairs) for s in loaded]
    to_read = sum(_tokens(source.pairs) for source in [*loaded, *ctx.held])
    ctx.clock.left = to_read + _tokens_ahead(1, sets, ctx)
    chunks = [] if callable(ctx.config.chunks) else _partitioned(loaded, policy, ctx)
    ctx.score_all(0, policy, [])
    path = ctx.folder / "held_out.json"
    if ctx.held and not path.exists():
        seen = seen_in_training(ctx.held, loaded)
        write_json(path, {s.name: _described(s.pairs) | dict(seen=n) for s, n in zip(ctx.held, seen)})
    if ctx.talks and chunks: print(_plan_line(chunks, ctx))
    return chunks

def _described(pairs):
    "Held-out pairs as held_out.json has them: their keys, the tokens of their responses, and the means of these."
    lengths = {side: list(map(len, pairs[f"{side}_ids"])) for side in ("chosen", "rejected")}
    means = {side: sum(tokens) / len(pairs) for side, tokens in lengths.items()}
    return dict(keys=pairs["key"][:], tokens=means, lengths=lengths)


# %% [markdown]
# Forty pairs of `riddle` are taken out and held out. S reads them too, so the clock must count them. When the pass has ended, what was read is gone from the clock. What is left is the training and what comes after it.

# %%
shutil.rmtree(ctx.folder)
ctx.clock = Clock(0)
riddle = all_three[-1].pairs
ctx.held = [Source("unseen", riddle.select(range(40)), {})]
rest = Source("riddle", riddle.select(range(40, len(riddle))), {})
to_train = [*all_three[:2], rest]

chunks = _first_pass(to_train, S, ctx)
left = ctx.clock.left
assert left == _tokens_ahead(1, chunks, ctx)
assert not set(ctx.held[0].pairs["key"][:]) & set(rest.pairs["key"][:])

read = sum(_tokens(s.pairs) for s in [*to_train, *ctx.held])
print(f"read {read:,} tokens, {left:,.0f} to come")
read_part(ctx.folder / "held_out.json")["unseen"]["tokens"]



# %% [markdown]
# ## All of it, in its order
#
# First the checks. What is refused is refused before the folder is touched, so a run with a wrong setting leaves no folder that says otherwise. Then `open_folder` writes `config.yaml`, and from here on [the folder belongs to this run](10_folder.ipynb). Then it is said what will happen, and S reads.

# %%
#| export
def prepare_run(
    model,    # hub id, folder, or a loaded model
    sources,  # as for `load_sources`; none where a function makes the chunks
    config,   # StepwiseConfig, or None for all defaults
    folder,   # of the run
    tokenizer=None, # of a loaded model; of one that is named, in place of its own
    logprobs=None,  # (model, pairs) -> (chosen, rejected); None: chosen for the model
    revision=None,  # commit of a model on the hub
    held_out=None,  # sources that are only measured
) -> tuple: # the context, the chunks, and M_0
    "Check everything, open the folder, measure and partition. Raises ValueError for what cannot work."
    config, folder = config or StepwiseConfig(), Path(folder).expanduser()
    if is_wrapped(model): model, config = _unwrapped(model, config)
    if callable(config.chunks) and sources:
        raise ValueError("sources: chunks is a function, which brings its own pairs; leave sources out")
    device = asked_device(config)
    _tracker(config, folder) # an impossible one is found out before anything is computed
    check_fresh(folder)
    for some in (sources, held_out):
        check_names(some)
        check_apart(folder, some)

    base, tokenizer = base_folder(model, tokenizer, folder, revision)
    read, held = read_sources(sources, held_out, tokenizer, config)
    loaded = check_chunks(config.chunks, read)
    theirs = foreign_weights(config.reference, tokenizer, loaded)

    policy = load_model(base, device, revision)
    check_model(policy)
    _check_adapters(policy, config)
    for s in loaded + held: check_rows(policy, *extent(s.pairs))
    precision = pick_precision(config.precision, policy.device)
    rounded = config.save_dtype == "S" and not config.lora_r # adapters are kept in fp32
    dtype = stored_dtype(base, revision) if rounded else torch.float32
    ctx = Context(
        config, folder, base, tokenizer, policy.device, precision, logprobs, dtype, revision,
        held=held,
        clock=Clock(0),
        talks=policy.num_parameters() >= SMALL,
    )
    if ctx.talks: _say_memory(policy.config, config, precision, policy.device, loaded)

    written = {s.name: _written(what) for s, what in zip(read, (sources or {}).values())}
    apart = {name: _written(what) for name, what in (held_out or {}).items()}
    seen = check_held_out(held, loaded)
    ctx.otherwise = open_folder(folder, config, precision, _identity(policy, ctx, loaded, written, apart, theirs))
    own = [s for s in held if s.counts] # of a source that was parted, the counts are told once
    for s in read + own: _say_data(data_notes(s, bool(tokenizer.chat_template)), always=ctx.talks)
    _say_data(_left_out(config.chunks, read), always=True)
    _say_data(seen, always=True)
    if ctx.talks and loaded: _say_model(policy, loaded[0].pairs, ctx)
    return ctx, _first_pass(loaded, policy, ctx), policy

def _unwrapped(model, config):
    "S and the settings that a model in PEFT's wrapping asks for."
    plain, asked = unwrapped(model)
    if config.lora_r:
        raise ValueError("lora_r: the model carries an adapter already; "
                         "set lora_r, or give get_peft_model(...), not both")
    return plain, changed(config, **asked)

def _left_out(chunks, read):
    "A line for each source that a list of chunks does not name."
    named = sum(chunks, []) if isinstance(chunks, list) else [s.name for s in read]
    return [f"  warning: no chunk names {s.name}, so it is not trained on" for s in read if s.name not in named]

def _check_adapters(policy, config):
    "Raise ValueError for adapters that cannot be had; say so where the learning rate is low for them."
    if not config.lora_r: return
    lora_config(config) # raises where PEFT is missing
    adapter_size(policy, config)
    if config.lr < 1e-6: print(f"  note: lr = {config.lr:g} is low for adapters; without lr they get 5e-6")


# %% [markdown]
# Now a run can begin. After this call, $M_0$ has read all pairs and the chunks are decided.

# %%
with alone_in(tmp / "run"):
    ctx, parts, policy = prepare_run(w.base, w.sources, StepwiseConfig(**quick), tmp / "run")
print([d.name for d in parts])
sorted(p.name for p in ctx.folder.iterdir())


# %% [markdown]
# ## Ask the reference
#
# Now the stage itself, and first its reference. The moment is the point. The table is computed while the policy in memory still *is* $M_{t-1}$: before it is reset to S, where a setting wants that, and before its first step. So asking never takes a second model. A reference from elsewhere is loaded
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
    free_model(policy)
    other = ctx.load(0) if which == ctx.base else load_model(which, ctx.device)
    ahead = [c.probe(ctx.config.probe) for c in chunks[t:t+1]]
    need = concatenate_datasets([chunks[t-1].pairs, *ahead])
    check_rows(other, *extent(need)) # of pairs that a function made, nobody asked it before
    alone = replace(ctx, chosen={})  # a model of the same class may have another config
    table = alone.score_to(ctx.at(t) / "reference", other, need, f"reference on {chunks[t-1].name}")
    free_model(other)
    return table, "S" if which == ctx.base else which, ctx.load(t-1)

def free_model(
    model, # no longer needed
):
    "Give its memory back, whoever still holds the object."
    model.to("meta")


# %%
table, name, policy = _reference(1, parts, policy, ctx)
assert table.kind["weights"] == weights_hash(policy)
name, len(table.rows)

# %% [markdown]
# The name and the hash agree: the table is $M_0$'s, and $M_0$ is what the policy holds. Which pairs must each model read before it is gone? With three chunks and a moving reference:
#
# | table of | $D_1$ | $D_2$ | $D_3$ |
# |---|---|---|---|
# | $M_0$ | **all** | all | all |
# | $M_1$ | probe | **all** | probe |
# | $M_2$ | probe | probe | **all** |
# | $M_3$ | probe | probe | probe |
#
# In bold stand the reference tables. $M_0$ reads everything because of the partition. A probe has at most 512 pairs. Our chunks are smaller, so here a probe is the whole chunk, and the table has all 1,508 rows. What if a stage takes the table of the chunk before? Say that $M_1$ has read the probes of $D_1$ only:

# %%
few = LogprobTable(table.kind, table.rows.loc[parts[0].pairs["key"][:]])
print(complaint(few.gamma, parts[1].pairs))


# %% [markdown]
# The pairs are not there, so it says so. What about the other two kinds of reference? With `reference="fixed"` the table is S's in every stage, and S has read everything already: no pass at all. With the folder of another model, that model is loaded in each stage, reads the chunk and the probe of the next one, and is given back.
#
# ## Measure
#
# After training, $M_t$ reads the probe of every chunk. What should be kept of that? Not the loss alone, which can fall while the model gets worse on some pairs.
#
# | number | on which pairs | what it answers |
# |---|---|---|
# | `gamma_ref` | all of $D_t$ | how high is the bar of this stage? |
# | `gamma_ref_next` | probe of $D_{t+1}$ | what does this reference say about the chunk that comes next? |
# | `gamma`, `accuracy_before`, `accuracy` | probe of $D_t$ | where is the model, and how many chosen responses does it prefer, before and after? |
# | `gamma_change` | the same | what did the stage change? The interval is *paired*: each pair is compared with itself |
# | `loss` | the same | from a pass of the finished $M_t$, not the running loss of training |
# | `certificate` | the same | the least mean $\gamma$ that this loss [guarantees](03_loss.ipynb), from the reference's mean on the probe |
# | `below_reference` | the same | on what share of the pairs is $\gamma$ under its reference, although the mean is certified? |
#
# *Before* is the model that the stage starts at, $M_{t-1}$, or S with `init_target = S`. `stage_measures` needs no model, only three tables. So anybody who has the tables can compute these numbers again, and [chapter 17](17_verify.ipynb) does.

# %%
#| export
def stage_measures(
    ref: LogprobTable,    # of the reference of stage t
    before: LogprobTable, # of the model that the stage starts at: M_{t-1}, or S
    after: LogprobTable,  # of M_t
    probe,                # pairs of D_t, with keys, that all three have read
    chunk,                # all pairs of D_t, which the reference has read
    coming,               # the probe of D_{t+1}, which the reference has read; None where nothing comes
    beta: float,          # of the DPO loss, per nat
) -> dict:                # in nats, or shares from 0 to 1; gamma_change as (mean, low, high)
    "What the report says about stage t, from tables alone."
    gamma_ref, gamma_before, gamma_after = (table.gamma(probe) for table in (ref, before, after))

    def mean(x): return x.float().mean().item()
    loss = mean(dpo_loss(gamma_after, gamma_ref, beta))
    return dict(
        gamma_ref=mean(ref.gamma(chunk)),               # of the whole chunk
        gamma_ref_next=None if coming is None else mean(ref.gamma(coming)),
        gamma=mean(gamma_after),
        probe=len(probe),
        gamma_change=mean_interval(gamma_after - gamma_before), # paired
        loss=loss,
        certificate=certificate(loss, mean(gamma_ref), beta),
        below_reference=mean(gamma_after < gamma_ref),  # of these it says nothing
        accuracy_before=mean(reward_accuracy(gamma_before)),
        accuracy=mean(reward_accuracy(gamma_after)),
    )

def start_of(
    t: int, # the stage
    config, # has init_target
) -> int:   # s of M_s
    "The number of the model that a stage starts at."
    return 0 if config.init_target == "S" else t - 1

def _measures(t, chunks, table, ctx):
    "The measures of stage t of a run that is going on."
    n = ctx.config.probe
    probe = chunks[t-1].probe(n)
    coming = chunks[t].probe(n) if t < len(chunks) else None
    tables = table, ctx.table(start_of(t, ctx.config)), ctx.table(t)
    return stage_measures(*tables, probe, chunks[t-1].pairs, coming, ctx.config.beta)


# %%
ctx.score_all(0, policy, parts)
shutil.copytree(ctx.at(0) / "logprobs", ctx.at(1) / "logprobs") # as if M_1 had learned nothing
still = _measures(1, parts, table, ctx)
shutil.rmtree(ctx.at(1))

assert still["gamma_change"] == (0, 0, 0)
{name: still[name] for name in ("loss", "below_reference")}

# %% [markdown]
# That was a model measured against itself: nothing changed, and the loss is $\ln 2 = 0.693$. It is also the first loss of every stage whose policy starts as its own reference. With a fixed reference or a start at S, this holds in stage 1 only; with both, in every stage again.
#
# For the report, every model also answers a few prompts. Numbers say how far a model has moved; only its words say where to.

# %%
#| export
ASKED = 4 # prompts that every model answers, for the report

def _answer(t, model, chunks, ctx):
    """What M_t answers to a few prompts, held-out ones if there are any, into answers.json.

    A model that cannot generate has none.
    """
    path = ctx.at(t) / "answers.json"
    if path.exists(): return
    if callable(ctx.config.chunks): chunks = chunks[:1] # those that S was asked about; more come on the way
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
# ## The stage
#
# The code has the four parts of the sketch above, and their names stand as comments.
#
# 1. **Ask.** First $M_{t-1}$ reads the probes, in case its own table is lost or of another kind on this machine. Then the reference reads $D_t$.
# 2. **Train.** The policy stays $M_{t-1}$, or goes back to S where the setting says so. Before it moves, it reads the probe of $D_t$: from here the change of $\gamma$ is counted. `own` is the reference's table where the reference is the model as it came in; training compares its first batch with it. An adapter changes the hash of a model but not its numbers, so hashes are compared before.
# 3. **Measure.** With adapters, $M_t$ is saved first and read again from the disk, so what is measured is what a later call will load.
# 4. **Save.** `stage.json` comes last. It is [the mark that the stage is finished](10_folder.ipynb): whatever dies before it is done again.

# %%
#| export
def run_stage(
    t: int,  # the stage, from 1
    chunks,  # of the whole run, as far as they are known
    policy,  # M_{t-1}; it is trained in place, or its memory is given back
    ctx: Context, # of the run
): # M_t
    "Train M_t against the reference of stage t, measure it, save it."
    config, folder, chunk = ctx.config, ctx.at(t), chunks[t-1]
    _begin(t, chunks, ctx)
    began = time.time()

    # ask
    if t > 1:
        measured = chunks[:t-1] if callable(config.chunks) else chunks
        ctx.score_all(t-1, policy, measured)
    table, reference, policy = _reference(t, chunks, policy, ctx) # before the policy is reset or trained

    # train
    start = start_of(t, config)
    if start != t - 1:
        free_model(policy)
        policy = ctx.load(start)
    mine = ctx.score(start, policy, chunk.probe(config.probe), chunk.name).kind # for the change of gamma
    if t == 1: _answer(0, policy, chunks, ctx)
    own = table if all(table.kind[name] == mine[name] for name in ("weights", "config")) else None
    if config.lora_r: policy = _with_adapter(t, policy, ctx)
    summary = train_stage(
        policy, chunk.pairs, table, config, folder, t, own,
        logprobs=ctx.how(policy, chunk.pairs),
        clock=ctx.clock,
        on_step=lambda row: ctx.after_step(t, row),
        **_going_on(t, chunks, ctx))

    # measure
    if config.lora_r: policy = _merged(t, policy, ctx)            # saves the adapter
    ctx.score_all(t, policy, chunks)
    _answer(t, policy, chunks, ctx)
    peak = peak_memory(ctx.device) / GIB

    # save
    write_json(folder / "cost.json", dict(seconds=round(time.time() - began), peak_gib=round(peak, 2)))
    if not config.lora_r: save_model(policy, ctx.tokenizer, folder / "model", ctx.dtype)
    ended = dict(
        stage=t,
        chunk=chunk.name,
        pairs=len(chunk.pairs),
        reference=reference,
        reference_kind=table.kind,
        start=mine["weights"],
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


# %% [markdown]
# Where does this stage begin? The clock is set, and with `restart = never` the optimizer of the stage before goes on.

# %%
#| export
def _begin(t, chunks, ctx):
    "Set the clock; say once what may change the last bits."
    if ctx.otherwise: print(f"{ctx.folder}: {ctx.otherwise}")
    ctx.otherwise = ""
    ctx.clock.left = _tokens_ahead(t, chunks, ctx)

def _going_on(t, chunks, ctx):
    "With restart = never: the folder whose optimizer goes on, and this stage's place in the one schedule."
    if ctx.config.restart == "stage": return {}
    steps = [_steps_of(d, ctx.config) for d in chunks]
    previous = ctx.at(t-1) if t > 1 else None
    return dict(previous=previous, schedule=(sum(steps[:t-1]), sum(steps)))


# %% [markdown]
# With [adapters](09_lora.ipynb), what is trained is small, and what is saved is one adapter on S.

# %%
#| export
def _with_adapter(t, policy, ctx):
    "What stage t trains: a new adapter on M_{t-1}, or the one of the stage before, on S."
    if ctx.config.lora_stages == "merge" or t == 1: return add_adapter(policy, ctx.config, t)
    free_model(policy)
    return put_back(ctx.load(0), read_adapter(ctx.at(t-1) / "model"), ctx.config)

def _merged(t, policy, ctx):
    "Save the adapter of M_t, one on S; then M_t is S with it, read from the disk as a later call would."
    adapter, where = adapter_of(policy), ctx.at(t) / "model"
    if ctx.config.lora_stages == "merge" and start_of(t, ctx.config):
        adapter = join_adapters(read_adapter(ctx.at(t-1) / "model"), adapter)
    free_model(policy)
    save_adapter(adapter, ctx.tokenizer, where, ctx.base, ctx.revision)
    return load_merged(ctx.at(t), ctx.device)


# %% [markdown]
# In bf16 a small change of a weight can be lost when it is rounded. So the share of weights that changed is counted, and told where it is under one half.

# %%
#| export
def _saved(t, policy, ctx):
    "What stage.json says about the model on disk."
    saved = dict(dtype=str(ctx.dtype).removeprefix("torch."), weights=weights_hash(policy, ctx.dtype))
    if ctx.dtype == torch.float32: return saved
    start = start_of(t, ctx.config)
    before = str(ctx.at(start) / "model") if start else ctx.base
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
M_1 = run_stage(1, parts, policy, ctx)
assert read_part(ctx.at(1) / "cost.json")["seconds"] < 600
print(_stage_line(read_part(ctx.at(1) / "stage.json"), 3))
sorted(p.name for p in ctx.at(1).iterdir())

# %% [markdown]
# The line is what a user sees when a stage ends. *First loss 0.693*: does the table belong to the model that we train? *$\gamma$ changed by ...*: was anything learned, and is it more than noise? *Chosen preferred in 72 %, now 84 %*: on how many pairs does it show?
#
# And the answers? Each prompt says what to do. Before you look: which of S's four answers were wrong?

# %%
answers = {}
for t, who in enumerate(("S", "M_1")): answers[who] = read_part(ctx.at(t) / "answers.json")
pd.DataFrame({who: a["answers"] for who, a in answers.items()}, index=answers["S"]["prompts"])

# %% [markdown]
# Why is the change of $\gamma$ *paired*? Each dot is one pair. To the right, S prefers the chosen response; upward, $M_1$ does. Dots over the dashed line have risen. The pairs spread widely along the line, and less across it. The paired interval counts only the spread across.

# %%
before = ctx.table(0).gamma(parts[0].pairs)
after = ctx.table(1).gamma(parts[0].pairs)
fig, ax = plt.subplots(figsize=(4.2, 4.2))
ax.plot(before, after, ".", ms=4)
ends = [min(before.min(), after.min()), max(before.max(), after.max())]
ax.plot(ends, ends, "--", color="grey")
ax.set(xlabel="gamma under S (nats), right is better", ylabel="gamma under $M_1$ (nats), up is better")
sns.despine()

intervals = {
    "gamma under S": mean_interval(before),
    "gamma under M_1": mean_interval(after),
    "change, paired": mean_interval(after - before),
}
pd.DataFrame(intervals, index=["mean", "low", "high"]).T.round(2)

# %% [markdown]
# Is this the stage that we made by hand? The weights are the same, to the bit:

# %%
assert weights_hash(M_1) == by_hand
by_hand

# %% [markdown]
# The first loss says that the table belongs to the model that is trained. It cannot say *which* model that was. Suppose we ask too late: the policy has moved on to $M_1$, and we still call it $M_0$. Will `score` refuse?

# %%
wrong = replace(ctx, folder=tmp / "wrong")
shutil.copytree(ctx.at(0), wrong.at(0))
with redirect_stdout(io.StringIO()) as said: late = wrong.score(0, M_1, parts[0].pairs, parts[0].name)
assert late.kind["weights"] == weights_hash(M_1)
assert late.kind["weights"] != table.kind["weights"]
print(said.getvalue().replace(str(tmp), "runs"))


# %% [markdown]
# It does not refuse. It sees a table of other weights, says so, and computes again. Training against this table would begin at 0.693 as well. Two things help: `run_stage` asks before anything moves, and `stage.json` keeps the hash of the table's model, which [chapter 17](17_verify.ipynb) compares.

# %% [markdown]
# ## Where can it die?
#
# Everywhere. Here is what each moment leaves behind, and what the next call makes of it. (A test of this project kills runs at such moments, also in the middle of a file, forty times per test run; all of them end in the same bits as a run that lives.)
#
# | it dies while | what lies there | the next call |
# |---|---|---|
# | S reads | `base/logprobs`, the pieces that were finished | reads the pairs that are missing |
# | the chunks are decided | no `partition.json`, or a whole one | decides, or reads what was decided |
# | stage $t$ trains | `stage-t/checkpoint`, once `save_every` steps are done (50 by default): weights, optimizer, place in the data | goes on from there; later steps are done again. With no checkpoint yet, the stage starts again |
# | $M_t$ is measured or saved | the checkpoint of the last step, no `stage.json` | trains nothing, reads the pairs that are missing, saves again |
# | `stage.json` is written | no `stage.json` (a file appears under its name only when it is whole) | the same |
# | the report is written | all stages | writes the report |
#
# Nothing in this table is a special case in the code. Every line follows from three habits: a file is written under another name and then renamed; whatever is there and belongs to this run is read and not computed again; and the mark of completion comes last.
#
# We try the third row. A checkpoint is made every 8 steps, and the plug is pulled at step 20. How many steps are done twice?

# %%
def pulled(row):
    if row["step"] == 20: raise RuntimeError("the plug was pulled at step 20")

config = StepwiseConfig(**quick, save_every=8)
killed = replace(ctx, folder=tmp / "killed", config=config, on_step=pulled)
shutil.copytree(ctx.at(0), killed.at(0))
print(complaint(run_stage, 1, parts, ctx.load(0), killed))
sorted(p.name for p in killed.at(1).iterdir())

# %%
killed.on_step = None
survivor = run_stage(1, parts, ctx.load(0), killed)
steps = (killed.at(1) / "metrics.jsonl").read_text().splitlines()
assert weights_hash(survivor) == weights_hash(M_1)
assert len(steps) == 32

# %% [markdown]
# Four: the last checkpoint is that of step 16, and steps 17 to 20 are done again. Their lines in `metrics.jsonl` are cut off and written anew.

# %%
#| hide
shutil.rmtree(tmp)

# %% [markdown]
# ## What you now have
#
# `prepare_run` checks all that can be checked, opens the folder, lets S read and decides the chunks. `run_stage` makes $M_t$ of $M_{t-1}$: it asks the reference, trains, measures and saves. `Context.score` is the one way in which a table is made. [The next chapter](14_stepwise.ipynb) calls them in a loop, which is all that is left of stepwise DPO.
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
# 2. Why is the partition written to a file, when the same pairs and the same S would give it again?
#
# <details><summary>Answer</summary>
#
# They would on the same machine. On another one the last digits differ, and two sources with nearly the same accuracy may change places. A run that goes on there would then train stage 2 on what stage 1 has seen already.
#
# </details>
#
# 3. Under S, the mean $\gamma$ of `primer` is 1.68, with an interval of 0.37 to each side. Why has its change only 0.16?
#
# <details><summary>Answer</summary>
#
# It is paired. Pairs differ in $\gamma$: their standard deviation is 4.2 nats here. That drops out when each pair is compared with itself. It helps as long as a stage changes all pairs by about the same amount. Where training has spread the pairs far apart, the change is as uncertain as $\gamma$ itself.
#
# </details>
#
# ## Try this
#
# The notebook removes its folder when it ends. So run it up to "Where can it die?", put S's table in the place of $M_1$'s, and measure again:
#
# ```python
# shutil.rmtree(ctx.at(1) / "logprobs")
# shutil.copytree(ctx.at(0) / "logprobs", ctx.at(1) / "logprobs")
# _measures(1, parts, table, ctx)
# ```
#
# <details><summary>What you should see</summary>
#
# `gamma_change` is zero with a width of zero, and `loss` is $\ln 2$: as in the cell above, the stage seems to have learned nothing, since the table that should be $M_1$'s is S's.
#
# </details>
