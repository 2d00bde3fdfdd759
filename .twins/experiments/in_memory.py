# %% [markdown]
# # A stage in memory
# > The same steps as the trainer's, the same bits, and no file: for experiments that train a model hundreds of times and throw it away.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/in_memory.ipynb)
#
# **You should know** [one stage of training](../06_trainer.ipynb). **Time** 20 minutes to read, half a minute to run.
#
# The trainer writes a checkpoint, so that nothing is lost when a run is killed. An experiment does not want that: its models live for seconds, and a run that was killed is made again. And one method needs what stepwise DPO has no switch for: TR-DPO moves its reference *within* a stage. This page has both: a stage without files, and a reference that moves in it.

# %%
#| default_exp in_memory

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
from dataclasses import dataclass, field, replace

import torch

from sdpo_nb.logprobs import LogprobTable, ahead, autocast, load_model, pick_precision
from sdpo_nb.logprobs import same_bits, score_pairs, weights_hash
from sdpo_nb.packing import choose_logprobs
from sdpo_nb.trainer import TrainConfig, Trainer, activation_checkpointing, all_batches, compile_for
from sdpo_nb.trainer import fit, learning_rate, make_accelerator, make_optimizer, trainable, wants_compiling
from sdpo_nb.trainer import why_not_same_bits

# %%
import math, tempfile
import pandas as pd
from sdpo_nb.plan import StepwiseConfig, load_sources
from sdpo_nb.trainer import train_stage
from sdpo_nb.world import load_base, load_world


# %% [markdown]
# ## S, loaded once
#
# On a card a run takes some seconds, and so do loading a model and compiling it. So there is one model. A cell begins by putting the weights of S back into it, which keeps what was compiled.
#
# `load_S` decides once what would otherwise be asked again in every cell: the precision, the function that reads the pairs, and how many tokens fit into a forward pass. For the last it looks at the 64 longest pairs that it was given.
#
# `Base.score` reads pairs with the model as it is now. That may be S, or what a stage has made of it. Given a folder, it writes a file after every 64 pairs, so a pass that was killed goes on from there.

# %%
#| export
def _copied(model): return {name: value.detach().clone() for name, value in model.state_dict().items()}

@dataclass
class Base:
    "S on its device, and what all cells share."
    model: object      # causal LM; after `reset` it is S
    weights: dict      # of S, to be put back
    hash: str          # of these weights
    precision: str     # of forward passes
    logprobs: object   # (model, pairs) -> (chosen, rejected)
    strict: bool       # whether all its operations have a deterministic form
    fitted: TrainConfig # with the token budget that the device has room for, asked once
    begun: dict = field(default_factory=dict) # for other pages: first stages that were trained already

    def reset(self):
        "Make the model S again."
        with torch.no_grad(): self.model.load_state_dict(self.weights)
        return self.model

    def score(
        self,
        pairs: list,    # with keys
        folder = None,  # where the table is kept; None: nowhere
    ) -> LogprobTable:
        "What the model, as it is now, says about pairs."
        budget = 65536 if self.model.device.type == "cuda" else 8192
        return score_pairs(self.model, pairs, folder, self.precision, self.logprobs, budget, piece=64)

def load_S(
    model,                     # hub id or folder of S
    pairs: list,               # some of those that will be read; packing is tried on them
    precision: str = "auto",   # bf16, fp16, fp32, or what suits the device
    compile: str = "auto",     # layers: auto (on a card), on or off
) -> Base:
    "Load S, choose how it reads pairs, and compile it where that is wanted."
    loaded = trainable(load_model(str(model)))
    weights = _copied(loaded)
    precision = pick_precision(precision, loaded.device)
    logprobs = choose_logprobs(loaded, pairs[:64], "auto", precision)
    fitted = fit(loaded, pairs, TrainConfig(compile=compile), precision, logprobs)
    if wants_compiling(fitted, loaded.device): compile_for(loaded, logprobs, precision, fitted)
    strict = why_not_same_bits(loaded, logprobs, precision) is None
    return Base(loaded, weights, weights_hash(loaded), precision, logprobs, strict, fitted)


# %% [markdown]
# What did it choose for the tiny S, with 96 pairs of its world?

# %%
world = load_world()
_, tokenizer = load_base(world)
sources = load_sources(world.sources, tokenizer, StepwiseConfig(max_length=64))
pairs = [dict(pair) for source in sources for pair in source.pairs.select(range(32))]

base = load_S(world.base, pairs, "fp32")
table_S = base.score(pairs)
base.precision, base.logprobs.__name__, base.fitted.token_budget, len(table_S.rows)


# %% [markdown]
# It computes in fp32, because we asked for that, and reads packed pairs: packing was tried on this model, and nothing spoke against it. A token budget of 0 means the usual one: on a processor it need not be chosen.
#
# ## The loop, without files
#
# The loop of [`train_stage`](../06_trainer.ipynb) is said once more, with the same parts: the same batches, gradients, learning rates and updates. Two methods need something else in it:
#
# - *Fine-tuning* has no reference, so no table. Its loss is minus the mean log-probability of the chosen tokens of the batch.
# - *TR-DPO* ([2404.09656](https://arxiv.org/abs/2404.09656)) moves the reference after every few steps, a *share* of the way to the model. With a share of 1 the model itself becomes the reference. The chunk is not scored again for that, only the pairs of the batches until the next move.

# %%
#| export
def _sft_gradients(trainer, batch, parts):
    "The gradient of fine-tuning: minus the mean log-probability of a chosen token."
    tokens, total = sum(len(pair["chosen_ids"]) for pair in batch), 0.
    for _, inputs in parts:
        with autocast(trainer.model.device, trainer.precision):
            chosen, _ = trainer.logprobs(trainer.model, inputs)
        loss = -chosen.sum() / tokens
        trainer.accelerator.backward(loss)
        total += loss.item()
    return dict(loss=total)

@torch.no_grad()
def _score_moved(base, reference, share, pairs):
    "Move a reference towards the model and let it read pairs; where it is None, the model reads them."
    if reference is None: return base.score(pairs)
    own = _copied(base.model)
    for name, value in reference.items(): value.lerp_(own[name], share)
    base.model.load_state_dict(reference)
    table = base.score(pairs)
    base.model.load_state_dict(own)
    return table

def train_in_memory(
    base: Base,                # its model is trained, from whatever it is now
    pairs: list,               # of the chunk
    table: LogprobTable,       # of the reference; None: fine-tuning on the chosen responses
    config: TrainConfig,       # settings of the stage
    stage: int = 1,            # enters the seed of the data order
    every: int = 0,            # steps after which the reference moves towards the model; 0: never
    share: float = 1.,         # of the way that it then goes; 1: the model itself becomes the reference
) -> dict:                     # losses, grad_norms: one number a step
    "Train one stage as `train_stage` does, without files. A reference that moves begins as the model."
    model = trainable(base.model)
    recompute = config.gradient_checkpointing or base.fitted.gradient_checkpointing
    budget = config.token_budget or base.fitted.token_budget
    config = replace(config, token_budget=budget, gradient_checkpointing=recompute)
    activation_checkpointing(model, recompute)
    accelerator = make_accelerator(base.precision, model.device)
    optimizer = make_optimizer(model, config)
    trainer = Trainer(model, table, config, accelerator, optimizer, base.precision, base.logprobs)
    batches = [[pairs[i] for i in rows] for _, rows in all_batches(len(pairs), config, stage)]
    losses, norms, done = [], [], 0
    reference = _copied(model) if every and share < 1 else None

    def ready(batch): return batch, trainer.prepare(batch)
    with same_bits(model.device, config.deterministic, base.strict):
        for batch, parts in ahead(ready, batches):      # the next one is made ready meanwhile
            step = len(losses)
            if every and step and step % every == 0:
                coming = [pair for batch in batches[step:step + every] for pair in batch]
                trainer.table = _score_moved(base, reference, share, coming)
            made = _sft_gradients(trainer, batch, parts) if table is None else trainer.gradients(batch, parts)
            made = trainer.update(made, learning_rate(done, len(batches), config))
            done += not made["skipped"]         # in fp16, where a gradient was not finite
            losses.append(round(made["loss"], 4))
            norms.append(made["grad_norm"])
    activation_checkpointing(model, False)
    model.eval()
    return dict(losses=losses, grad_norms=norms)


# %% [markdown]
# Are they the same steps? We train one DPO stage from S in both ways, and compare the hashes of the weights. They must have the same bits: that is a stronger test than losses that look alike. The last assertion makes sure that the stage has moved the model at all.

# %%
config = TrainConfig(beta=0.3, lr=1e-4, batch_size=8, precision="fp32")
base.reset()
in_memory = train_in_memory(base, pairs, table_S, config)
here = weights_hash(base.model)

base.reset()
train_stage(base.model, pairs, table_S, config, tempfile.mkdtemp(), logprobs=base.logprobs)
assert here == weights_hash(base.model)
assert here != base.hash
here, in_memory["losses"][:3]

# %% [markdown]
# The two hashes are equal. The first loss is 0.6931, which is $\log 2$, since the stage starts at its own reference.
#
# Every cell trusts that `reset` removes all that the cell before it did. So after `reset` the hash must be that of S:

# %%
assert weights_hash(base.reset()) == base.hash

# %% [markdown]
# And fine-tuning? Its first loss must be minus the mean log-probability of a chosen token under S, in the first batch. The table of S has those.

# %%
first_batch = [pairs[i] for _, rows in list(all_batches(len(pairs), config, 1))[:1] for i in rows]
chosen, _ = table_S.lookup(first_batch)
expected = -chosen.sum().item() / sum(len(pair["chosen_ids"]) for pair in first_batch)
first_loss = train_in_memory(base, pairs, None, config)["losses"][0]
assert abs(first_loss - expected) < 1e-3
first_loss

# %% [markdown]
# ## A reference that moves
#
# Four stages on the same batches, of twelve steps each. The reference stays; or it moves after every four steps, by nothing, half the way, all the way. Where must the loss be $\ln 2$ again?

# %%
MOVES = {
    "fixed": {},
    "by nothing": dict(every=4, share=0.),
    "half the way": dict(every=4, share=0.5),
    "all the way": dict(every=4),
}
curves = {}
for name, moves in MOVES.items():
    base.reset()
    curves[name] = train_in_memory(base, pairs, table_S, config, **moves)["losses"]
curves = pd.DataFrame(curves).rename_axis("step")
assert (curves["by nothing"] - curves["fixed"]).abs().max() < 2e-4
assert (curves["all the way"][[0, 4, 8]] - math.log(2)).abs().max() < 1e-4
assert (curves["half the way"][:4] == curves["fixed"][:4]).all()
curves.iloc[[0, 3, 4, 5, 8]]

# %% [markdown]
# In the last column, at steps 4 and 8: there the model has just become its own reference. At step 4 the model is worse than S on this batch, 0.762, and half the way leaves about half of the difference. A share of 0 scores the old reference again and changes nothing.
#
# The reference borrows the model to read its pairs. Afterwards the model must have its own weights again.

# %%
reference = {name: value.clone() for name, value in base.weights.items()}   # S, and no longer the model
before = weights_hash(base.model)
assert before != base.hash
_score_moved(base, reference, 0.5, pairs[:8])
assert weights_hash(base.model) == before

# %% [markdown]
# ## Stages in a row
#
# A method is written as its stages, and a stage says three things: which pairs, where it starts, and what its reference is. `before` is the model of the stage before, `none` is fine-tuning, `every 8 steps` is TR-DPO. Here are stepwise DPO on two chunks, and Pre-DPO:

# %%
TWO_STAGES = [("one", "S", "S"), ("two", "before", "before")]
PRE_DPO = [("both", "S", "S"), ("both", "S", "before")]


# %% [markdown]
# In Pre-DPO the order of two lines matters: the chunk is scored first, while the model is still the one of the stage before; only then are the weights of S put back.

# %%
#| export
def train_stages(
    base: Base,            # afterwards its model is the last one
    stages: list,          # of (pairs, start, reference)
    pairs_named,           # function: name of pairs -> list of pairs
    table_S: LogprobTable, # of S, with all of them
    config: TrainConfig,   # settings of every stage
    begun: int = 0,        # stages that the model has been through already
):                         # yields number, pairs, and losses and grad_norms of each stage
    "Train stage after stage. Between two of them the model may be measured."
    if not begun: base.reset()
    for t, (name, start, reference) in enumerate(stages, 1):
        if t <= begun: continue
        pairs = pairs_named(name)
        table, every = _reference(reference, t > 1, pairs, table_S, base)
        if start == "S": base.reset()
        yield t, pairs, train_in_memory(base, pairs, table, config, t, every)

def _reference(what, before, pairs, table_S, base):
    "The table of a stage's reference, and after how many steps it moves. The model is the one of the stage before."
    if what == "none": return None, 0
    if what == "S": return table_S, 0
    if what == "before": return (base.score(pairs) if before else table_S), 0
    return table_S, int(what.split()[1])                # every 8 steps


# %% [markdown]
# Where must the second stage begin at $\ln 2$?

# %%
chunks = {"one": pairs[:48], "two": pairs[48:], "both": pairs}
first = {}
for name, stages in (("stepwise DPO", TWO_STAGES), ("Pre-DPO", PRE_DPO)):
    first[name] = [made["losses"][0] for _, _, made in train_stages(base, stages, chunks.get, table_S, config)]
assert all(abs(loss - math.log(2)) < 1e-3 for loss in first["stepwise DPO"])
assert abs(first["Pre-DPO"][1] - math.log(2)) > 1e-3
first

# %% [markdown]
# In stepwise DPO, where a stage is its own reference. That of Pre-DPO starts at S, away from its reference.
#
# ## What you now have
#
# - `load_S`, `Base.reset`, `Base.score`: one model for many runs.
# - `train_in_memory`: a stage with the bits of `train_stage`, and a reference that may move on the way.
# - `train_stages`: a method, written as its stages.
#
# Next: [one run on a real model](real_cells.ipynb).
#
# ## Questions to test yourself
#
# 1. TR-DPO scores only the pairs of the coming batches. What would it cost to score the whole chunk at every move?
#
#    <details><summary>Answer</summary>
#
#    A pass over all pairs for every few steps. With 12 steps and a move after every four, twice the whole chunk, and only a third of each would be used.
#
#    </details>
#
# ## Try this
#
# - Move the reference after every step. What does the loss do?
#
#   <details><summary>What you should see</summary>
#
#   It stays at $\ln 2$: the model is its own reference in every step. It learns all the same, since the gradient is not zero where $\gamma_\theta = \gamma_{ref}$.
#
#   </details>
