# %% [markdown]
# # One stage of DPO
# > A plain loop, then accumulation, mixed precision, a schedule, checkpoints and exact resume: each refinement equal to the version before it.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/06_trainer.ipynb)
#
# **You should know** the [loss](03_loss.ipynb), the [log-probability table](02_logprobs.ipynb), and what AdamW and mixed precision are, in a sentence each: AdamW divides each gradient by its usual size before it steps; mixed precision computes products in 16 bits and keeps the weights in 32.
#
# **Time**: about two hours to read, and an hour and a half more for the six sections that say you may skip them (and a part of "Settings"). The code runs in about a minute on two CPU cores.
#
# Six lines train a model with DPO. A real trainer has several hundred. The rest is there so that the same thing happens with less memory, in half the
# precision, and across an interruption. Each of these additions is a chance to change the gradient without an error. So we start with the six lines,
# add one thing at a time, and after each addition we ask for the same gradient again.
#
# The words of this chapter:
#
# | word | in code | what it is |
# |---|---|---|
# | pair | `pair` | a prompt with two responses: people preferred the *chosen* one to the *rejected* one |
# | policy $\pi_\theta$ | `model` | the model that is trained |
# | reference $\pi_{ref}$ | `table` | a frozen model that the policy should not move too far from; we only need its log-probabilities |
# | $\gamma$ | `gamma` | how much more likely a model finds the chosen response than the rejected one, in nats (natural logarithm) |
# | $\beta$ | `beta` | how strongly the policy is pulled back to the reference |
# | margin $\beta\Delta$ | `margin` | $\beta$ times $\Delta = \gamma_\theta - \gamma_{ref}$: how much further apart the policy puts the two responses than the reference does |
# | $\lambda$ | `lambda_hist` | $\sigma(-\beta\Delta)$, the weight of a pair in the gradient: one half at margin zero, small once the pair is learned |
#
# The loss of a pair is $-\log\sigma(\beta\Delta)$. [Chapter 03](03_loss.ipynb) says why.
#
# A *stage* is one DPO training on one set of pairs, the *chunk*. Stepwise DPO runs several stages, one after the other; that is [chapter 14](14_stepwise.ipynb). Here we only need one.
#
# The way through the chapter: first the gradient (six lines, accumulation, metrics, half precision, Accelerate), then one step, then what turns steps into a stage (settings, order, schedule). After these sections you have a working stage in ten lines. Then come six sections of engineering, which say in their
# headings that you may skip them. At the end stands the whole stage, and the checks.

# %%
#| default_exp trainer

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
import copy, ctypes, functools, hashlib, inspect, json, math, numbers, os, sys, time, warnings, zipfile
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, get_scheduler

try: import resource
except ImportError: resource = None # Windows

from sdpo_nb.logprobs import Clock, LogprobTable, ahead, autocast, freeze_dropout, gamma, has_adapter
from sdpo_nb.logprobs import memory_ended, micro_batches, padded_tokens, pair_tokens, pairs_hash, pick_precision
from sdpo_nb.logprobs import prepared, progress, replacing, response_logprobs, same_bits, weights_hash
from sdpo_nb.loss import dpo_loss, follow, reward, reward_accuracy
from sdpo_nb.packing import PARTS, REFUSED, choose_logprobs, compile_layers, flash_plan, of_row, pack
from sdpo_nb.packing import padded_plan, piece_bytes, recompute_alike, try_out

# %%
import tempfile, textwrap
from importlib.resources import files
from types import SimpleNamespace
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from transformers import LlamaConfig
from sdpo_nb.logprobs import load_model, load_tokenizer, score_pairs
from sdpo_nb.packing import packed_logprobs
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.world import complaint, load_world
torch.set_num_threads(1);

# %% [markdown]
# ## Six lines
#
# What is the least that trains a model with DPO? We take 64 pairs of the tiny world. The reference is S, the model that we start from. It is not kept in memory as a second model ([chapter 02](02_logprobs.ipynb) says why): a table holds the two numbers that the
# loss asks of it for every pair.

# %%
world = load_world()
tokenizer = load_tokenizer(world.base)
digest = tokenize_pairs(load_pairs(world.sources["digest"]), tokenizer, "digest").pairs
pairs = digest.select(range(64))
def start_model(): return load_model(world.base)

table = score_pairs(start_model(), pairs)
table.rows.head(3).round(3)


# %% [markdown]
# Each row is a pair, and its name is a hash of the pair's tokens. Each number is a log-probability: the reference gives the chosen response of the first pair a probability of $e^{-0.544}$, more than one half, and the rejected one next to nothing.
#
# Here is the trainer that everything below has to agree with. The six lines are the body of the loop: take a batch, ask the policy for its log-probabilities, compute the loss against the table, go backwards, let the optimizer step, and clear the gradients.

# %%
def plain_loop(model, pairs, table, beta=0.5, lr=1e-4, size=16):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for start in range(0, len(pairs), size):
        batch = list(pairs.select(range(start, start + size)))
        chosen, rejected = response_logprobs(model, batch)
        loss = dpo_loss(gamma(chosen, rejected), table.gamma(batch), beta).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# %% [markdown]
# Before you run it: what must the first loss be, and why?

# %%
policy = start_model()
losses = plain_loop(policy, pairs, table)
assert abs(losses[0] - math.log(2)) < 1e-4
assert losses[-1] < losses[0]
[round(loss, 4) for loss in losses]


# %% [markdown]
# It is $-\log\sigma(0) = \ln 2$. Policy and reference are still the same model, so every margin is zero. After three updates the loss is smaller.
#
# From here on, `policy` is the model *after* this loop. At margin zero every pair has the same weight, $\lambda = \frac12$, and a mistake in these weights would not show in a gradient.
# This is the gradient that every later version has to give, for a batch of eleven pairs:

# %%
def mean_loss(model, batch, table, beta=0.5):
    chosen, rejected = response_logprobs(model, batch)
    return dpo_loss(gamma(chosen, rejected), table.gamma(batch), beta).mean()

def gradients_of(model): return {name: p.grad.clone() for name, p in model.named_parameters()}

def plain_gradient(model, batch, table):
    model.zero_grad()
    mean_loss(model, batch, table).backward()
    return gradients_of(model)

def difference(a, b): # the largest relative difference of all tensors
    return max(((a[name] - b[name]).norm() / b[name].norm()).item() for name in b)


# %%
batch = [pairs[i] for i in range(11)]
want = plain_gradient(policy, batch, table)
squares = [g.norm()**2 for g in want.values()]
round(sum(squares).sqrt().item(), 3)


# %% [markdown]
# ## Accumulation: divide by pairs
#
# What if a batch does not fit into memory? Then it is cut into micro-batches: one forward and one backward pass for each, and their gradients add up. What should each micro-batch
# contribute? If it is its own *mean*, the pairs of a short last micro-batch count more than the others. What we want is the gradient of the mean over all $n$ pairs, and that is a sum over micro-batches $m$ in which every pair has the same weight:
#
# $$\nabla \frac1n\sum_{i=1}^n \ell_i = \sum_m \nabla \sum_{i \in m} \frac{\ell_i}{n}$$
#
# Eleven pairs, cut into 4, 4 and 3, show the difference.

# %%
def losses_of(model, batch): # one for each pair
    chosen, rejected = response_logprobs(model, batch)
    return dpo_loss(gamma(chosen, rejected), table.gamma(batch), 0.5)

def accumulated(model, batch, size, share): # share: losses of a micro-batch -> what it contributes
    model.zero_grad()
    for start in range(0, len(batch), size):
        losses = losses_of(model, batch[start:start+size])
        share(losses).backward()
    return gradients_of(model)


# %%
off = {
    "mean of means": difference(accumulated(policy, batch, 4, lambda losses: losses.mean() / 3), want),
    "sum / pairs": difference(accumulated(policy, batch, 4, lambda losses: losses.sum() / 11), want),
}
assert off["sum / pairs"] < 1e-4
assert off["mean of means"] > 1e-2
pd.Series(off, name="relative difference of the gradient").map("{:.1e}".format)


# %% [markdown]
# The mean of means is wrong by 17 %. So we divide by the number of pairs, once. There is a second gain: a sum does not care about order, so we may cut a batch in any way. `micro_batches` of
# [chapter 02](02_logprobs.ipynb) puts pairs of like length together and fills each micro-batch up to a number of tokens, the *token budget*.

# %% [markdown]
# ## What is measured
#
# How do we see what is learned? The loss alone tells little. It sees only the gap between the two responses, and the log-probabilities of *both* may fall while it goes down. So chosen and rejected are
# measured apart, too. Metrics are sums over pairs for the same reason as the gradient: they are divided once, at the end.
#
# A word on two of them. The *reward* of a response is $\beta(\log\pi_\theta - \log\pi_{ref})$, and the margin is the reward of the chosen response minus that of the rejected one. The *reward accuracy* is the share of pairs with a margin above zero;
# a tie counts one half.
#
# First the loss of each pair. It is the DPO loss, unless the settings name a function of your own; [other losses](other_losses.ipynb) is about those. Training and every check ask for the loss here, so that they cannot mean different ones.

# %%
#| export
def pair_losses(
    chosen: Tensor,       # (n,) log pi_theta of the chosen responses, nats
    rejected: Tensor,     # (n,) of the rejected ones
    ref_chosen: Tensor,   # (n,) the same of the reference
    ref_rejected: Tensor, # (n,)
    config,               # has `beta`, `label_smoothing` and `loss`
    pairs: list=None,     # the n tokenised pairs, for a loss that asks for them
) -> Tensor:              # (n,) nats
    """The loss of each pair: the DPO loss, or what the function `config.loss` says.

    Raises ValueError for a function that returns something else, or nothing to learn from."""
    if config.loss is None:
        gamma_theta = gamma(chosen, rejected)
        gamma_ref = gamma(ref_chosen, ref_rejected)
        return dpo_loss(gamma_theta, gamma_ref, config.beta, config.label_smoothing)
    references = follow(ref_chosen, chosen), follow(ref_rejected, rejected)
    losses = config.loss(chosen, rejected, *references, config.beta, pairs)
    shape, wanted = losses.shape if isinstance(losses, Tensor) else type(losses).__name__, chosen.shape
    if shape != wanted:
        raise ValueError(f"loss: {config.loss.__name__} must return one number per pair, "
                         f"a tensor of shape {tuple(wanted)}; it returned {shape}")
    if chosen.requires_grad and not losses.requires_grad:
        raise ValueError(f"loss: what {config.loss.__name__} returns has no gradient; "
                         "compute it from chosen and rejected, with torch")
    return losses


# %% [markdown]
# Two invented pairs. In the first the policy likes the chosen response more than the reference does. In the second both responses became *less* likely, the rejected one even more so. What does the loss say of them?

# %%
settings = SimpleNamespace(beta=0.5, label_smoothing=0.0, loss=None)
ref = torch.tensor([-8.0, -8.0])
two_pairs = torch.tensor([-5.0, -10.0]), torch.tensor([-9.0, -12.0]), ref, ref

by_dpo = pair_losses(*two_pairs, settings)
assert by_dpo.allclose(dpo_loss(torch.tensor([4.0, 2.0]), torch.zeros(2), 0.5))
by_dpo.tolist()


# %% [markdown]
# Both losses are below $\ln 2$. What became of each single response, a loss does not say. So here is what is measured beside it:

# %%
#| export
def measure(
    chosen: Tensor,       # (n,) log pi_theta of the chosen responses, nats
    rejected: Tensor,     # (n,) of the rejected ones
    ref_chosen: Tensor,   # (n,) the same of the reference
    ref_rejected: Tensor, # (n,)
    config,               # has `beta`, `label_smoothing` and `loss`
    pairs: list=None,     # the n tokenised pairs, for a loss that asks for them
) -> dict:                # name -> sum over the pairs; `loss` carries the gradient
    "The loss of some pairs and every metric, as sums."
    ref_chosen = follow(ref_chosen, chosen)
    ref_rejected = follow(ref_rejected, rejected)
    loss = pair_losses(chosen, rejected, ref_chosen, ref_rejected, config, pairs).sum()
    with torch.no_grad():
        gamma_theta = gamma(chosen, rejected)
        gamma_ref = gamma(ref_chosen, ref_rejected)
        reward_chosen = reward(chosen, ref_chosen, config.beta)
        reward_rejected = reward(rejected, ref_rejected, config.beta)
        margin = reward_chosen - reward_rejected
        per_pair = dict(
            reward_chosen=reward_chosen,
            reward_rejected=reward_rejected,
            margin=margin,
            reward_accuracy=reward_accuracy(gamma_theta, gamma_ref),
            logratio_chosen=chosen - ref_chosen,
            logratio_rejected=rejected - ref_rejected,
            gamma=gamma_theta,
            gamma_ref=gamma_ref,
        )
        sums = {name: values.sum() for name, values in per_pair.items()}
        weight = torch.sigmoid(-margin)                    # lambda
        tenth = (10 * weight).long().clamp(0, 9)
        lambda_hist = F.one_hot(tenth, 10).sum(0).float()  # a graphics card has no deterministic histogram
        return dict(loss=loss, **sums, lambda_hist=lambda_hist)


# %% [markdown]
# Our two pairs again:

# %%
sums = measure(*two_pairs, settings)
assert sums["margin"] == 0.5 * ((-5 + 9) + (-10 + 12))
assert sums["reward_accuracy"] == 2
assert sums["logratio_chosen"] == 3 - 2
{name: value.tolist() for name, value in sums.items()}


# %% [markdown]
# Both pairs are right. That the second chosen response became less likely is hidden in the sums, too: `logratio_chosen` is 1, which is 3 and -2. Only pair by pair would it show. The last entry is a histogram: the weights $\lambda$ of the two
# pairs are 0.12 and 0.27, so one is in the second tenth and one in the third.

# %% [markdown]
# ## Half precision, full weights
#
# Can we compute in 16 bits, and what goes wrong? A forward pass in 16 bits needs less memory for its activations, three quarters for the small model that is planned below. On a graphics card it takes a fraction of the time. Two formats are used:
#
# | format | bits of precision | smallest number above zero | what goes wrong |
# |---|---|---|---|
# | fp32 | 24 | $10^{-45}$ | nothing here |
# | bf16 | 8 | $10^{-40}$ | neighbouring numbers are 0.4 to 0.8 % apart |
# | fp16 | 11 | $6\cdot10^{-8}$ | small gradients become zero; above 65,504 they become infinite |
#
# Before we compute in bf16, look at what happens to *weights* in bf16. A model saved in bf16 is loaded in bf16 if nobody objects. A step of AdamW at the usual learning rate of
# $5\cdot10^{-7}$ is smaller than the distance of most weights to the next bf16 number. What happens to such a weight?

# %%
def ten_steps(model, lr=5e-7):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(10):
        mean_loss(model, batch, table).backward()
        optimizer.step()
        optimizer.zero_grad()

def all_weights(model): return torch.cat([p.detach().flatten().float() for p in model.parameters()])

def moved_by_ten_steps(model):
    old = all_weights(model)
    ten_steps(model)
    moved = old != all_weights(model)
    return pd.Series({
        "share that moved": moved.float().mean().item(),
        "largest that moved": old[moved].abs().max().item(),
        "largest of all": old.abs().max().item(),
    })


# %%
with tempfile.TemporaryDirectory() as folder:
    start_model().bfloat16().save_pretrained(folder)
    in_bf16 = load_model(folder).bfloat16()
    in_fp32 = load_model(folder)
ways = {"bf16 weights": in_bf16, "fp32 weights": in_fp32}
moved = pd.DataFrame({name: moved_by_ten_steps(model) for name, model in ways.items()})
assert moved.loc["share that moved", "bf16 weights"] < 0.01
assert moved.loc["share that moved", "fp32 weights"] > 0.999
assert moved.loc["largest that moved", "bf16 weights"] < 2.5e-4
moved.map("{:.2g}".format)


# %% [markdown]
# It is rounded back to where it was, ten times. In bf16 only weights up to $2.4\cdot10^{-4}$ could move, 0.5 % of all: their neighbours are near enough. The loss starts at $\ln 2$, and everything looks well.
#
# Hence a rule: **trained weights are fp32, whatever the folder says**. Only the matrix products, of the forward and of the backward pass, are done in half precision. Dropout is off, too. With dropout, policy and reference would differ before the
# first step.

# %%
#| export
def trainable(
    model, # causal LM
):         # the same model: fp32 weights, no dropout, train mode
    "Make a model ready for training, in place."
    return freeze_dropout(model.float()).train()


# %%
half = trainable(in_bf16)
assert half is in_bf16
assert half.training
{p.dtype for p in half.parameters()}


# %% [markdown]
# PyTorch's *autocast* is a context in which matrix products are computed in half precision while the weights stay as they are. In fp16 there is a second problem: small gradients become zero. So the loss is multiplied by a large number before the
# backward pass, and the gradient is divided by it afterwards. PyTorch's `GradScaler` does this. If a scaled gradient overflows, it skips the step and halves the number.
#
# (Why scale at all, if we divide again? In between, the small numbers are large enough for fp16. And a power of two changes no digit of a number.)
#
# How much accuracy does all this cost? Here it is by hand, for the same eleven pairs:

# %%
def by_hand(model, batch, precision):
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    model.zero_grad()
    with autocast("cpu", precision):
        chosen, rejected = response_logprobs(model, batch)
    loss = dpo_loss(gamma(chosen, rejected), table.gamma(batch), 0.5).mean()
    scaler.scale(loss).backward()
    scale = scaler.get_scale()
    return {name: g / scale for name, g in gradients_of(model).items()}

PRECISIONS = "fp32", "bf16", "fp16"
rounding = {precision: difference(by_hand(policy, batch, precision), want) for precision in PRECISIONS}
assert rounding["fp32"] < 1e-6
assert rounding["fp32"] < rounding["fp16"] < rounding["bf16"] < 0.3
pd.Series(rounding, name="relative difference of the gradient").map("{:.1e}".format)


# %% [markdown]
# fp16 has three bits more than bf16, and its gradient is ten times as near. bf16 needs no scaler, since its range is that of fp32.

# %% [markdown]
# ## The same, with Accelerate
#
# [Accelerate](https://huggingface.co/docs/accelerate) is a small library between a training loop and the machine. The loop calls `accelerator.backward(loss)` instead of `loss.backward()`, and the same loop can then run with loss scaling, on another device, or in several processes. We use two things
# of it, the backward pass and the clipping of gradients, and leave the door to several processes open.
#
# Does it compute our gradient? It also has defaults that would change our gradient without an error. There are four:
#
# - **Its precision belongs to the whole process.** A launcher, or another trainer before us, may have set it. And if you ask for fp16 on a CPU, it agrees but makes no scaler, so that the first overflow is final. So the precision stays ours: autocast around the forward pass, as above, and our own `GradScaler` in the
#   place of Accelerate's. In fp32 and bf16 that scaler passes everything through.
# - **It divides each loss by a number of accumulation steps.** An environment variable can set this number, and it is stronger than the argument. So we set it to 1 afterwards.
# - **It wraps the model** so that all logits become fp32. That costs memory, so we do not let it.
# - **On a machine without a graphics card it thinks it is alone**, even if a launcher has started several processes. All of them would write the same files. So we ask the variable by which a launcher tells each process how many there are.

# %%
#| export
def check_one_process():
    "Raise ValueError where a launcher such as torchrun started several processes."
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started > 1:
        raise ValueError(f"{started} processes were started (WORLD_SIZE), "
                         "but sdpo_nb trains in one process so far; start it without a launcher")


# %%
os.environ["WORLD_SIZE"] = "2"
print(complaint(check_one_process))
del os.environ["WORLD_SIZE"]


# %% [markdown]
# Alone, we can make an `Accelerator` and put right what it brings along:

# %%
#| export
def make_accelerator(
    precision: str="fp32", # fp32, bf16 or fp16
    device: str="cpu",     # of the model
) -> Accelerator:          # its `scaler` works in fp16 only, and passes everything through otherwise
    """An Accelerator whose scaler is ours. A process may make several, one after the other.

    Raises ValueError where a launcher started several processes."""
    check_one_process()
    accelerator = Accelerator()
    accelerator.gradient_accumulation_steps = 1 # `backward` divides by it
    kind = torch.device(device).type
    accelerator.scaler = torch.amp.GradScaler(kind, enabled=precision == "fp16")
    return accelerator


# %%
os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "4"
accelerators = {precision: make_accelerator(precision) for precision in PRECISIONS}
del os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"]
assert all(a.gradient_accumulation_steps == 1 for a in accelerators.values())
scales = {precision: a.scaler.get_scale() for precision, a in accelerators.items()}
pd.Series(scales, name="the loss is multiplied by")

# %% [markdown]
# Now the gradient of a batch, put together from what we have: cut it, and for each micro-batch do a forward pass under autocast, measure, and call `backward` with the *sum* of its losses over the pairs of the *whole* batch.
#
# First the cutting. Where no setting says how many tokens a forward pass may have, we take 1,536. (Why this number? See "What fits into memory?" below.)

# %%
#| export
USUAL_BUDGET = 1536 # tokens in a forward pass with gradients, unless a setting or a graphics card wants more

def cut(
    batch: list,  # tokenised pairs of one optimizer batch
    config,       # has `token_budget`
    logprobs,     # the function that will read them; it says how many tokens that takes
) -> list[list]:  # micro-batches
    "Cut an optimizer batch into micro-batches that keep to the token budget."
    budget = config.token_budget or USUAL_BUDGET
    return micro_batches(batch, budget, logprobs)


# %%
parts = cut(batch, SimpleNamespace(token_budget=200), response_logprobs)
tokens = [response_logprobs.tokens(part) for part in parts]
assert sum(map(len, parts)) == len(batch)
assert max(tokens) <= 200
pd.DataFrame({"pairs": [len(part) for part in parts], "tokens": tokens}).rename_axis("micro-batch")


# %% [markdown]
# No micro-batch is above 200 tokens, and no pair is lost. Now the gradient. `logprobs` is the function that reads the pairs: padded batches as in [chapter 02](02_logprobs.ipynb), or packed rows as in [chapter 04](04_packing.ipynb). It may want its input prepared, which `prepared` does.

# %%
#| export
def batch_gradients(
    model,                      # causal LM in train mode
    batch: list,                # tokenised pairs of one optimizer batch
    table: LogprobTable,        # of the reference, with these pairs
    config,                     # has `beta`, `label_smoothing`, `loss`, `token_budget`
    accelerator: Accelerator,   # of `make_accelerator`
    precision: str="fp32",      # of the forward pass: fp32, bf16 or fp16
    logprobs=response_logprobs, # (model, pairs) -> (chosen, rejected)
    parts: list=None,           # of `prepared`: micro-batches, if they are made already
) -> dict:                      # every metric, as a mean over the batch; lambda_hist as counts
    "Add the gradient of the batch's mean loss to the parameters."
    sums = {}
    for pairs, inputs in parts or prepared(model, cut(batch, config, logprobs), logprobs):
        with autocast(model.device, precision):
            chosen, rejected = logprobs(model, inputs)
        found = measure(chosen, rejected, *table.lookup(pairs), config, pairs)
        accelerator.backward(found["loss"] / len(batch))
        for name, value in found.items():
            sums[name] = sums.get(name, 0) + value.detach()
    return _means(sums, len(batch))

def _means(sums, n):
    "Divide once, at the end."
    histogram = sums.pop("lambda_hist").tolist()
    values = torch.stack(list(sums.values())).tolist()     # one transfer from a graphics card, not ten
    means = {name: value / n for name, value in zip(sums, values)}
    return means | dict(lambda_hist=histogram)


# %% [markdown]
# The same check again: three precisions, each in one forward pass and in several.

# %%
def with_accelerate(model, batch, precision, budget=0):
    settings = SimpleNamespace(beta=0.5, label_smoothing=0.0, loss=None, token_budget=budget)
    accelerator = make_accelerator(precision)
    model.zero_grad()
    metrics = batch_gradients(model, batch, table, settings, accelerator, precision)
    scale = accelerator.scaler.get_scale()
    return {name: g / scale for name, g in gradients_of(model).items()}, metrics

def off_by_hand(precision, budget):
    gradient, _ = with_accelerate(policy, batch, precision, budget)
    return difference(gradient, by_hand(policy, batch, precision))


# %%
def column(budget): return {precision: off_by_hand(precision, budget) for precision in sorted(PRECISIONS)}

off = pd.DataFrame({budget: column(budget) for budget in (200, 4096)})
assert (off.loc["fp32"] < 1e-5).all()
assert (off.loc["bf16"] < 0.3 * rounding["bf16"]).all()
assert (off.loc["fp16"] < 0.3 * rounding["fp16"]).all()
off.map("{:.0e}".format).rename_axis("precision").rename_axis("tokens per forward", axis=1)


# %% [markdown]
# In fp32 the two agree. In half precision a little is left, far below the rounding of the table before. It is no error: the order of a sum and the *shape* of a batch round differently, as [chapter 02](02_logprobs.ipynb) has shown.

# %% [markdown]
# ## One step
#
# How does a gradient become a step? A step also clips the gradient: if its norm over all parameters is above `clip`, the whole gradient is multiplied by `clip / norm`, so that one odd batch cannot throw the model far away. Then AdamW moves the weights.
#
# What can go wrong here? A gradient that is not finite. One step with it makes every weight NaN, and the next checkpoint keeps them. Under fp16 the scaler skips such a step, which is normal and is reported. In fp32 and bf16 it is an error.
#
# Model, table, settings, accelerator, optimizer, precision: every step needs all of them, and they are the same for a whole stage. So they get one name, `Trainer`. It has a step in two halves, because between them is the last moment to look before a weight changes:
#
# - `gradients` does the forward and the backward pass of a batch, and returns its metrics;
# - `update` clips the gradient, lets the optimizer step and clears the gradient.
#
# (`prepare` makes the input of a batch beforehand. It saves time later, when the next batch is prepared while the last one is computed.)

# %%
#| export
def trained_weights(
    model, # causal LM
) -> list: # of Parameters
    "What an optimizer may change: all weights, or those of an adapter (chapter 09)."
    return [p for p in model.parameters() if p.requires_grad]

def make_optimizer(
    model,  # causal LM with fp32 weights
    config, # has `lr`
):          # AdamW of the weights that are trained
    "AdamW without weight decay."
    return torch.optim.AdamW(trained_weights(model), lr=config.lr, weight_decay=0.0, fused=True)

@dataclass
class Trainer:
    "What all steps of a stage share: who is trained, against which reference, and how."
    model: object                        # causal LM, see `trainable`
    table: LogprobTable                  # of the reference
    config: object                       # settings, see `TrainConfig`
    accelerator: Accelerator             # of `make_accelerator`
    optimizer: object                    # of `make_optimizer`
    precision: str = "fp32"              # of the forward pass: fp32, bf16 or fp16
    logprobs: object = response_logprobs # (model, pairs) -> (chosen, rejected)

    def prepare(
        self,
        batch: list, # tokenised pairs of one optimizer batch
    ) -> list:       # (pairs, what `logprobs` takes for them) of each micro-batch
        "The micro-batches of a batch, made ready for the forward pass: `parts` of `gradients`."
        parts = cut(batch, self.config, self.logprobs)
        return list(prepared(self.model, parts, self.logprobs))

    def gradients(
        self,
        batch: list,      # tokenised pairs of one optimizer batch
        parts: list=None, # of `prepare`, if they are made already
    ) -> dict:            # metrics of the batch, as `batch_gradients` returns them
        "Add the gradient of the batch's mean loss to the parameters."
        return batch_gradients(self.model, batch, self.table, self.config, self.accelerator,
                               self.precision, self.logprobs, parts)

    def update(
        self,
        metrics: dict, # of `gradients`
        lr: float,     # learning rate of this step
    ) -> dict:         # the same with grad_norm (before clipping; None where it is not finite), lr, skipped
        """Clip and step.

        Raises ValueError for a gradient that is not finite, if no scaler skips the step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        scaler = self.accelerator.scaler
        scale = scaler.get_scale()
        scaler.unscale_(self.optimizer)      # before clipping, or the norm would be the scaled one
        norm = self.accelerator.clip_grad_norm_(trained_weights(self.model), self.config.clip).item()
        finite = math.isfinite(norm)
        if not finite and not scaler.is_enabled():
            raise ValueError(f"the gradient is not finite in {self.precision}, "
                             f"the loss is {metrics['loss']:.5g}; no weight was changed. "
                             "Look at this batch, or lower lr")
        scaler.step(self.optimizer)          # skipped, in fp16, if the gradient is not finite
        scaler.update()                      # and then the scale is halved
        self.optimizer.zero_grad()
        skipped = scaler.get_scale() < scale
        return metrics | dict(grad_norm=norm if finite else None, lr=lr, skipped=skipped)


# %% [markdown]
# Run one batch through it. We ask for the gradient twice and do not update in between. What will the second gradient be?

# %%
settings = SimpleNamespace(
    beta=0.5,
    label_smoothing=0.0, # all labels are believed
    loss=None,           # that of DPO
    token_budget=0,      # the usual one
    clip=1.0,
    lr=1e-4,
)
learner = trainable(copy.deepcopy(policy))
trainer = Trainer(learner, table, settings, make_accelerator(), make_optimizer(learner, settings))

once = trainer.gradients(batch)
first_gradient = gradients_of(learner)
twice = trainer.gradients(batch)
assert once == twice
assert difference(first_gradient, want) < 1e-5
assert all(torch.equal(g, 2 * first_gradient[name]) for name, g in gradients_of(learner).items())
{name: round(value, 3) for name, value in once.items() if name != "lambda_hist"}

# %% [markdown]
# The metrics are the same, to the bit: nothing was changed. The gradient is twice as large, because `gradients` *adds*. We start again from zero and update once. Which weights move, and how far?

# %%
before = {name: p.detach().clone() for name, p in learner.named_parameters()}
learner.zero_grad()
metrics = trainer.update(trainer.gradients(batch), lr=1e-4)
assert all(p.grad is None for p in learner.parameters())
moves = {name: (p.detach() - before[name]).abs() for name, p in learner.named_parameters()}
{name: metrics[name] for name in ("grad_norm", "lr", "skipped")}


# %%
def describe(move):
    return {"weights": move.numel(), "moved": (move > 0).float().mean().item(), "farthest": move.max().item()}

moved = pd.DataFrame({name: describe(move) for name, move in moves.items()}).T
assert moved["farthest"].between(0.9e-4, 1.1e-4).all()
moved.iloc[[0, 1, 2, -2, -1]].style.format({"weights": "{:.0f}", "moved": "{:.3f}", "farthest": "{:.1e}"})

# %% [markdown]
# Every tensor moved, and in each the farthest weight moved by the learning rate. That is AdamW: in its first step it divides each gradient by its own size, so only the sign is left. (The norm was 4.7 and the gradient was clipped to 1. The first step of AdamW would have
# been nearly the same without it.)
#
# Now break it: one gradient is infinite. In fp32 this is an error. What does fp16 do?

# %%
before = weights_hash(learner)
metrics = trainer.gradients(batch)
next(learner.parameters()).grad[0, 0] = math.inf
print(complaint(trainer.update, metrics, lr=1e-4))
assert weights_hash(learner) == before
learner.zero_grad()

# %%
trainer = replace(trainer, accelerator=make_accelerator("fp16"), precision="fp16")
scales = [trainer.accelerator.scaler.get_scale()]
metrics = trainer.gradients(batch)
next(learner.parameters()).grad[0, 0] = math.inf
skipped = trainer.update(metrics, lr=1e-4)["skipped"]
scales.append(trainer.accelerator.scaler.get_scale())
assert skipped
assert weights_hash(learner) == before
{"skipped": skipped, "the loss is multiplied by, before and after": scales}


# %% [markdown]
# It skips the step and multiplies by half as much from now on. No weight was changed, in either case.

# %% [markdown]
# ## Settings
#
# *You may skip the code that checks settings, and go on at "Which settings does a stage have?"; of `TrainConfig` itself the names and the defaults are enough.*
#
# What if a setting is wrong? So far `settings` was a bag of names, and a bag takes anything: `beta=0`, `lr="fast"`, `precision="half"`. The mistake shows up later, somewhere else. So each setting gets a default, a
# help text and a range, all in one place. The error messages, the table of defaults and the command line are made from it.

# %%
#| export
def setting(
    default,              # its value, where none is given
    help: str,            # what it means, in a few words
    low=None,             # the least value
    high=None,            # the largest value
    choices: tuple=None,  # the only values, for a text
    open_low: bool=False, # whether `low` itself is too little
):                        # a dataclass field
    "A dataclass field that knows what it means and which values are possible."
    metadata = dict(help=help, low=low, high=high, choices=choices, open_low=open_low)
    return field(default=default, metadata=metadata)

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}

def check_settings(
    config, # a dataclass whose fields were made by `setting`
):
    """Give every value its field's type.

    Raises ValueError for an impossible one, naming the setting and what would be right."""
    for f in fields(config):
        value = getattr(config, f.name)
        kind = _KINDS.get(f.type)                # a field of another type takes anything
        if kind and not _fits(value, f.type): raise ValueError(f"{f.name}: must be {kind}, got {value!r}")
        _check_range(f.name, value, **f.metadata)
        if kind: setattr(config, f.name, f.type(value))

def _fits(value, kind) -> bool:
    "Whether a value is one of this type. A whole number may be written 4.0; a truth value is no number."
    if kind not in (int, float): return isinstance(value, kind)
    if not isinstance(value, numbers.Real) or isinstance(value, bool): return False
    try:
        return math.isfinite(value) and (kind is float or value == int(value))
    except OverflowError: return False           # a whole number of hundreds of digits

def _check_range(name, value, low, high, choices, open_low, help):
    if choices and value not in choices:
        raise ValueError(f"{name}: must be one of {', '.join(choices)}; got {value!r}")
    if low is not None and (value < low or open_low and value == low):
        bound = "above" if open_low else "at least"
        raise ValueError(f"{name}: must be {bound} {low}, got {value}")
    if high is not None and value > high: raise ValueError(f"{name}: must be at most {high}, got {value}")


# %% [markdown]
# How does it look in use? A dataclass with two settings. Numbers may come as `4.0` from a YAML file, or from numpy. What fits is stored in the field's own type: otherwise `range`, the seed of the data order and the written
# configuration would each take it in a way of their own.

# %%
@dataclass
class Two:
    size: int = setting(32, "pairs in a batch", low=1)
    kind: str = setting("plain", "which of two", choices=("plain", "fancy"))

two = Two(size=4.0)
check_settings(two)
assert type(two.size) is int
[complaint(check_settings, config=Two(size=0)), complaint(check_settings, config=Two(kind="other"))]

# %% [markdown]
# **Which settings does a stage have?** They are of three kinds:
#
# - *What is learned*: `beta`, `lr`, `batch_size`, `epochs`, `warmup`, `schedule`, `clip`, `label_smoothing`, `loss`, `shuffle`, `seed`. Change one, and you get another model.
# - *How it is computed*: `token_budget`, `packing`, `precision`, `gradient_checkpointing`, `compile`, `deterministic`. They trade memory against time. The gradient stays the same up to rounding.
# - *How often it is saved*: `save_every`.
#
# A dataclass calls `__post_init__` when it is made, so an impossible `TrainConfig` cannot exist.

# %%
#| export
SCHEDULES = "linear", "cosine", "constant" # see "The schedule"

@dataclass
class TrainConfig:
    "Settings of one stage. The defaults are the sDPO paper's where it names any."
    beta: float = setting(0.1, "strength of the pull to the reference, per nat", 0, 1e6, open_low=True)
    lr: float = setting(5e-7, "peak learning rate of AdamW", 0, 1e3, open_low=True)
    batch_size: int = setting(32, "pairs per optimizer step", 1)
    token_budget: int = setting(
        0, "tokens per forward pass: memory and speed, not the gradient; 0: what suits the device", 0)
    packing: str = setting(
        "auto", "packed rows where they give the model's own numbers, or off: padded batches",
        choices=("auto", "off"))
    epochs: int = setting(1, "passes over a chunk per stage", 1, 10_000)
    warmup: float = setting(0.1, "share of the steps in which the learning rate rises", 0, 1)
    schedule: str = setting("linear", "how the learning rate falls after warm-up", choices=SCHEDULES)
    clip: float = setting(1.0, "largest gradient norm", 0, open_low=True)
    label_smoothing: float = setting(
        0.0, "assumed share of flipped labels: the target is 1 minus it", 0, 0.499)
    loss: object = setting(
        None, "none: the DPO loss. In Python a function "
        "(chosen, rejected, ref_chosen, ref_rejected, beta, pairs) -> losses")
    precision: str = setting(
        "auto", "precision of the forward pass; weights stay fp32",
        choices=("auto", "bf16", "fp16", "fp32"))
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, more time")
    compile: str = setting(
        "auto", "compile the layers: auto on a graphics card, on, or off",
        choices=("auto", "on", "off"))
    deterministic: bool = setting(True, "on a graphics card: the same bits every time, for some of the speed")
    shuffle: bool = setting(True, "a new order of the chunk in every epoch; off keeps the partition's order")
    seed: int = setting(0, "seed of the data order, of a random partition and of new adapters", 0, 2**63 - 1)
    save_every: int = setting(50, "optimizer steps between checkpoints", 1)

    def __post_init__(self):
        check_settings(self)
        if self.loss is not None: _check_loss(self.loss, self.label_smoothing)

def _check_loss(loss, label_smoothing):
    "Raise ValueError for what cannot be a loss. Its name is written down, so it must have one."
    takes = "(chosen, rejected, ref_chosen, ref_rejected, beta, pairs)"
    if not callable(loss):
        raise ValueError(f"loss: must be a function {takes}, which only Python can give; got {loss!r}")
    if getattr(loss, "__name__", "<lambda>") == "<lambda>":
        raise ValueError("loss: must be a function with a name, made by def; its name goes into config.yaml")
    try: inspect.signature(loss).bind(*range(6))
    except (TypeError, ValueError) as e: raise ValueError(f"loss: {loss.__name__} must take {takes}") from e
    if label_smoothing:
        raise ValueError("label_smoothing: belongs to the DPO loss; with a loss of your own, leave it at 0")


# %%
[
    complaint(TrainConfig, beta=0),
    complaint(TrainConfig, lr="fast"),
    complaint(TrainConfig, loss=lambda *six: six),
    complaint(TrainConfig, batch_size=2.5),
    complaint(TrainConfig, precision="half"),
    complaint(TrainConfig, seed=2**63),
]


# %% [markdown]
# ## The order of the data
#
# In which order do the pairs come? Each epoch goes through the pairs in a new random order. The order comes from a generator of its own, seeded by (seed, stage, epoch). If it were drawn from PyTorch's global generator, a logging call or an extra
# evaluation that also draws a number would change what is learned. And a run that goes on after an interruption could not find its place again.

# %%
#| export
def epoch_order(
    n: int,             # pairs in the chunk
    seed: int,          # of `TrainConfig`
    stage: int,         # 1, 2, ...
    epoch: int,         # 0, 1, ...
    shuffle: bool=True, # off: the order in which they come
) -> list[int]:         # row numbers
    "Row numbers in the order of one epoch."
    if not shuffle: return list(range(n))
    digits = hashlib.sha256(f"{seed} {stage} {epoch}".encode()).hexdigest()[:15]
    generator = torch.Generator().manual_seed(int(digits, 16))
    return torch.randperm(n, generator=generator).tolist()


# %%
before = torch.get_rng_state()
orders = {(stage, epoch): epoch_order(8, 0, stage, epoch) for stage in (1, 2) for epoch in (0, 1)}
assert torch.equal(torch.get_rng_state(), before)
orders


# %% [markdown]
# Every (stage, epoch) has an order of its own, and the global generator has not moved. The batches of a stage follow from it. If the pairs do not divide evenly, the last batch of an epoch is short; it is a step like any other, the mean over fewer pairs.

# %%
#| export
def all_batches(
    n: int,              # pairs in the chunk
    config: TrainConfig, # batch_size, epochs, seed, shuffle
    stage: int,          # 1, 2, ...
) -> list[tuple[int, list[int]]]: # (epoch, row numbers)
    "Every optimizer batch of a stage; the last one of an epoch may be short."
    batches = []
    for epoch in range(config.epochs):
        rows = epoch_order(n, config.seed, stage, epoch, config.shuffle)
        for start in range(0, n, config.batch_size):
            batches.append((epoch, rows[start:start+config.batch_size]))
    return batches


# %%
two_epochs = TrainConfig(epochs=2)
batches = all_batches(70, two_epochs, stage=1)
first_epoch = [row for epoch, rows in batches if epoch == 0 for row in rows]
assert sorted(first_epoch) == list(range(70))
assert batches == all_batches(70, two_epochs, stage=1)
assert batches != all_batches(70, two_epochs, stage=2)
[(epoch, len(rows), rows[:4]) for epoch, rows in batches]


# %% [markdown]
# ## The schedule
#
# How large is a step? The learning rate rises in the first tenth of the steps (*warm-up*: AdamW does not know the size of the gradients yet), then falls in a straight line. With a peak rate of $\eta$ and $N$ steps in all, of which $W$ are warm-up, step $s = 0, 1, \ldots$ has the rate
#
# $$\eta \cdot \frac{s+1}{W} \quad\text{for } s < W, \qquad \eta \cdot \frac{N-s}{N-W} \quad\text{after it.}$$
#
# Each stage has a schedule of its own. It is a plain function of the step, so there is no state of it that a checkpoint could forget.
#
# The straight line is the default. Two other shapes need no number of their own: `cosine` and `constant`. They come from transformers, by the names that they have there. The warm-up is ours in all three. In transformers it begins with a rate of zero, and the first step would change nothing.

# %%
#| export
def learning_rate(
    step: int,           # optimizer steps made so far
    total: int,          # of the schedule
    config: TrainConfig, # lr, warmup, schedule
) -> float:
    "Linear warm-up over a share of the steps; then towards zero, or constant."
    warm = math.ceil(config.warmup * total)
    if step < warm: return config.lr * (step + 1) / warm
    if config.schedule == "linear": return config.lr * (total - step) / max(1, total - warm)
    return config.lr * _shape(config.schedule, warm, total)(step)

@functools.cache
def _shape(schedule, warm, total):
    "Step -> share of the peak rate, by transformers."
    nothing = torch.optim.SGD([torch.zeros(1)])
    return get_scheduler(schedule, nothing, warm, total).lr_lambdas[0]


# %% [markdown]
# All three, each over a stage of 40 steps. After the warm-up our straight line is that of transformers:

# %%
def rates_of(schedule): return [learning_rate(step, 40, TrainConfig(lr=1.0, schedule=schedule)) for step in range(40)]

rates = pd.DataFrame({schedule: rates_of(schedule) for schedule in SCHEDULES})
theirs = [_shape("linear", 4, 40)(step) for step in range(4, 40)]
torch.testing.assert_close(rates["linear"][4:].tolist(), theirs)
assert (rates[:4].nunique(axis=1) == 1).all()          # one warm-up for all
assert rates["constant"][4:].eq(1).all()
assert rates["linear"].idxmax() == 3

# %%
fig, ax = plt.subplots(figsize=(6, 2.4))
places = {"linear": (20, 0.48, "right"), "cosine": (15, 0.87, "left"), "constant": (28, 1.04, "left")}
for (name, column), color in zip(rates.items(), sns.color_palette("colorblind")):
    ax.plot(column, color=color)
    x, y, side = places[name]
    ax.text(x, y, name, color=color, ha=side)
ax.axvline(3, color="grey", lw=1, ls=":")
ax.text(3.4, 0.05, "warm-up ends", color="grey", fontsize=9)
ax.set(xlabel="optimizer step of the stage", ylabel="learning rate\n(share of the peak)", ylim=(0, 1.15))
sns.despine()

# %% [markdown]
# *To see:* all three rise alike. `linear` and `cosine` end near zero, so that the last steps settle what the first ones have moved; over the whole stage their rates add up to nearly the same. `constant` keeps its peak to the end, and its rates add up to twice as much: it wants a smaller `lr`.

# %%
total = rates.sum().round(2)
assert abs(total["cosine"] / total["linear"] - 1) < 0.05
assert 1.7 < total["constant"] / total["linear"] < 2.1
total.rename("sum of the rates, in peaks")


# %% [markdown]
# ## A stage in ten lines
#
# Is this all? Nearly. Now we have a whole stage: for each batch, add the gradient, look up the rate, update.

# %%
def simple_stage(model, pairs, table, config):
    trainer = Trainer(trainable(model), table, config, make_accelerator(), make_optimizer(model, config))
    batches = all_batches(len(pairs), config, stage=1)
    lines = []
    for step, (epoch, rows) in enumerate(batches):
        metrics = trainer.gradients([pairs[i] for i in rows])
        metrics = trainer.update(metrics, learning_rate(step, len(batches), config))
        lines.append(dict(epoch=epoch, **metrics))
    model.eval()
    return pd.DataFrame(lines)

config = TrainConfig(beta=0.5, lr=1e-4, batch_size=8, precision="fp32")
simple = start_model()
simple_metrics = simple_stage(simple, pairs, table, config)
assert len(simple_metrics) == 8
assert abs(simple_metrics["loss"][0] - math.log(2)) < 1e-4
simple_metrics[["loss", "reward_accuracy", "margin", "lr", "grad_norm"]].round(5)


# %% [markdown]
# Read the table from left to right. The loss starts at $\ln 2$ and wanders before it falls: each line is another eight pairs. The reward accuracy starts at one half, since at margin zero every pair is a tie. The rate starts at its peak, as one step of eight is warm-up, and falls. The norm of the gradient is above 1 in every step, so every step was clipped.
#
# The margin rises from zero to 0.22. And these are pairs that the policy has not been trained on: in a single epoch, every batch is new. This loop is all that DPO asks for. What does it *not* do?
#
# - It believes the table. With another model's numbers it would train just as happily.
# - It does not ask whether it fits into memory.
# - It dies with its process, and nothing is left.
#
# The next six sections deal with this: a look before the first update, gradient checkpointing, a memory plan, compiled layers, equal bits on a graphics card, checkpoints. **You may skip them** and go on at **The stage**, which calls
# them by name. There we ask whether the finished trainer ends in the same weights as these ten lines.

# %% [markdown]
# ## Before the first update (you may skip this)
#
# What if the reference is the wrong one? A wrong reference raises no error. The loss falls, the model learns something, and nobody knows against what. The first batch is the last moment to notice, because nothing has been changed yet. Two questions can be asked then.
#
# (Why not `score_pairs` of chapter 02? It keeps a table, cuts pairs in its own way, and refuses numbers that are not finite. Here the micro-batches must be those of training, or the roundings would differ.)
#
# **Is the model the same twice?** Score the batch once more: by the same function, in the same micro-batches, but without gradients and in eval mode. The shapes are equal, so the roundings are equal, and the loss must be the same to $10^{-4}$, in any precision. If it is not, something in
# the model is random in training: dropout under a name that we did not know, or noise in a router.

# %%
#| export
@torch.no_grad()
def batch_logprobs(
    model,                      # causal LM
    batch: list,                # n tokenised pairs of one optimizer batch
    config: TrainConfig,        # token_budget
    precision: str="fp32",      # of the forward pass
    logprobs=response_logprobs, # (model, pairs) -> (chosen, rejected)
) -> Tensor:                    # (n, 2) log-probabilities of chosen and rejected, nats
    "What the model says about a batch, in the micro-batches that it is trained in, in eval mode."
    said = {}
    was_training = model.training
    model.eval()
    try:
        for pairs, inputs in prepared(model, cut(batch, config, logprobs), logprobs):
            with autocast(model.device, precision):
                both = torch.stack(logprobs(model, inputs), 1)
            keys = [p["key"] for p in pairs]
            said |= zip(keys, both.cpu())
    finally: model.train(was_training)
    return torch.stack([said[p["key"]] for p in batch])


# %%
first = [pairs[i] for i in range(16)]

def loss_again(precision):
    said = batch_logprobs(policy, first, TrainConfig(), precision)
    return dpo_loss(gamma(*said.T), table.gamma(first), 0.5).mean().item()

for precision in ("fp32", "bf16"):
    _, metrics = with_accelerate(policy.train(), first, precision)
    assert abs(loss_again(precision) - metrics["loss"]) < 1e-6


# %% [markdown]
# The two agree in both precisions. If they do not, the stage stops:

# %%
#| export
def check_same_twice(
    loss: float,           # of the first batch, in training
    again: float,          # of the same batch, scored once more
    precision: str="fp32", # of both
    near: float=1e-4,      # how far they may be apart; times the loss, where that is above 1
):
    "Raise ValueError unless a batch has the same loss twice, and a finite one."
    twice = (f"the first batch has a loss of {loss:.5f} in training "
             f"and of {again:.5f} when it is scored once more, both in {precision}")
    if not math.isfinite(loss) or not math.isfinite(again):
        raise ValueError(f"{twice}: nothing can be learned from it. "
                         "Look at this batch, and at a loss of your own; in fp16, try bf16 or fp32")
    allowed = near * max(1, abs(again))  # a large beta makes a large loss, whose last digits are larger, too
    if abs(loss - again) <= allowed: return
    raise ValueError(f"{twice}: something in this model is random in training mode. "
                     "Look for dropout or noise in its config. "
                     "And a loss of your own must look at each pair alone, as a batch is cut")


# %% [markdown]
# A model with noise in training mode, made on purpose:

# %%
def noisy(model, batch):
    chosen, rejected = response_logprobs(model, batch)
    if not model.training: return chosen, rejected
    noise = torch.randn(len(chosen), generator=torch.Generator().manual_seed(0))
    return chosen + 0.5 * noise, rejected

metrics = batch_gradients(policy, first, table, config, make_accelerator(), logprobs=noisy)
said = batch_logprobs(policy, first, config, logprobs=noisy)
again = dpo_loss(gamma(*said.T), table.gamma(first), 0.5).mean().item()
print(textwrap.fill(complaint(check_same_twice, loss=metrics["loss"], again=again), 100))


# %% [markdown]
# **Is the table this model's?** A table records the hash of the weights that made it. If this is the hash of our model, then the table must hold the numbers that our model says. But how exactly? The table was made in batches of another shape, and in half precision that changes every number
# ([chapter 02](02_logprobs.ipynb)). A constant limit cannot be right: rounding depends on the model, the precision and the length of the responses.
#
# So we *measure* the rounding. One more pass tells how far half precision is from fp32, on these very responses. The errors of the tokens are nearly independent, so the error of a response grows with the square root of its length. For that reason we count in nats per root of a token.
#
# Let $n$ be the number of pairs. The sums go over both responses $y$ of each pair, and $|y|$ is the number of tokens of $y$:
#
# $$s^2 = \frac{1}{2n}\sum_{i,\,y} \frac{(\log\pi^{half}(y) - \log\pi^{fp32}(y))^2}{|y|}, \qquad
# d^2 = \frac{1}{2n}\sum_{i,\,y} \frac{(\log\pi^{table}(y) - \log\pi^{half}(y))^2}{|y|}, \qquad d \le \sqrt2\,s\,\Big(1 + \frac{6}{2n}\Big) \tag{1}$$
#
# - $s$ is the size of the rounding: half precision against fp32.
# - $d$ is the distance of the table from what the model says.
# - The table is accepted if $d$ is at most $\sqrt2\,s$. That is how far apart two passes are that round independently, each $s$ away from fp32. Healthy ones share the rounded weights, so they are mostly nearer to each other.
# - A look takes 32 pairs, if there are as many. With fewer, $s$ itself is a guess, and the last factor allows for that.

# %%
#| export
def per_root_token(
    off: Tensor, # (n, 2) differences of log-probabilities, nats
    batch: list, # n tokenised pairs
) -> float:      # root mean square, nats per root of a token
    "How far log-probabilities are apart, whatever the lengths: equation (1)."
    tokens = torch.tensor([[len(p["chosen_ids"]), len(p["rejected_ids"])] for p in batch])
    return (off.square() / tokens.to(off.device)).mean().sqrt().item()


# %% [markdown]
# By hand: a response of 4 tokens that is off by 2 nats, one of 16 that is off by 4. Each is off by one nat per root of a token.

# %%
two_responses = dict(chosen_ids=[1] * 4, rejected_ids=[1] * 16)
assert per_root_token(torch.tensor([[2.0, -4.0]]), [two_responses]) == 1

# %% [markdown]
# The limit is made from two passes over the same pairs, one in the precision of training and one in fp32:

# %%
#| export
SLACK = 2 ** 0.5 # times the measured rounding: so far are two passes apart that round independently

def rounding_limit(
    said: Tensor,  # (n, 2) log-probabilities in the precision of training, nats
    exact: Tensor, # (n, 2) the same in fp32
    batch: list,   # n tokenised pairs
) -> float:        # nats per root of a token
    """How far a healthy table may be from what the model says: equation (1).

    In fp32, where only the last digits are rounded, a thousandth of a nat and 1e-5 of the number."""
    last_digits = per_root_token(1e-3 + 1e-5 * exact.abs(), batch)
    rounding = per_root_token(said - exact, batch)
    few = 1 + 6 / (2 * len(batch))
    return max(last_digits, SLACK * rounding * few)


# %%
exact = batch_logprobs(policy, first, config)
in_bf16 = batch_logprobs(policy, first, config, "bf16")
limits = {"fp32": rounding_limit(exact, exact, first), "bf16": rounding_limit(in_bf16, exact, first)}
assert limits["bf16"] > 10 * limits["fp32"]
pd.Series(limits, name="limit, nats per root of a token").map("{:.1e}".format)


# %% [markdown]
# For these pairs, a table in bf16 may be some thirty times as far off as one in fp32. Now the check:

# %%
#| export
def check_table(
    table: LogprobTable,   # one that claims to be of this model
    batch: list,           # n tokenised pairs
    said: Tensor,          # (n, 2) what the model says about the batch, nats
    limit: float,          # of `rounding_limit`, nats per root of a token
    precision: str="fp32", # in which it was said
) -> float:                # how far they are apart, nats per root of a token
    "Raise ValueError unless the table holds what the model says."
    off = said - torch.stack(table.lookup(batch), 1)
    apart = per_root_token(off, batch)
    if apart <= limit: return apart
    nats = off.square().mean().sqrt().item()
    times = apart / limit
    otherwise = ". Or, if you trust it, go on with precision = fp32: a run may, until its first update"
    raise ValueError(f"the table of reference log-probabilities is {nats:.2g} nats a response "
                     f"from what this model says in {precision}, "
                     f"{times:.0f} times as far as rounding allows: "
                     "it is of other weights, of other pairs, or was changed. "
                     "Remove it (in a run, the folder logprobs or reference that holds it) and start again: "
                     f"it is computed anew{'' if precision == 'fp32' else otherwise}")


# %% [markdown]
# The table of S is healthy for S. For our `policy`, four small steps later, it is not:

# %%
said = batch_logprobs(start_model(), first, config)
limit = rounding_limit(said, said, first)
apart = check_table(table, first, said, limit)
message = complaint(check_table, table=table, batch=first, said=exact, limit=limit)
assert apart < 0.1 * limit
message.split(":")[0]

# %% [markdown]
# Does it cry wolf, and does it see the wolf? `make bench-first-look` makes many first looks with SmolLM2-135M-Instruct and real pairs. Two kinds of tables are healthy: the model's own, in rows of another shape, and the one that padded batches give. (The second is stricter than anything that happens in a run.) Five kinds are wrong:
#
# - the weights after *one* step of AdamW at $10^{-4}$;
# - the reference of another stage: $M_1$ after an epoch on Orca at $5\cdot10^{-6}$;
# - the numbers of the next pair;
# - chosen and rejected swapped;
# - pairs cut at three quarters of their length.
#
# How far is each from what the model says, in units of the limit? Each point is one look.

# %%
results = json.loads((files("sdpo_nb.data") / "results/first_look.json").read_text())
looks = pd.DataFrame(results["looks"])
called = dict(
    healthy="its own",
    padded="its own, padded",
    M1="another stage",
    step="one step later",
    short="cut otherwise",
    swapped="swapped",
    others="other pairs",
)
about = ["precision", "source", "length", "pairs"]
tables = list(called.values())
off = looks.rename(columns=called).melt(about, tables, var_name="table", value_name="off").dropna()
off["right"] = off["table"].isin(["its own", "its own, padded"])
off["stopped"] = off["off"] > 1

# %%
blue, orange = sns.color_palette("colorblind")[:2]
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharex=True, sharey=True)
for ax, pairs_in_look in zip(axes, (8, 32)):
    shown = off[off["pairs"] == pairs_in_look]
    shown = shown.assign(off=shown["off"].clip(lower=1e-2))
    sns.stripplot(shown, x="off", y="table", hue="right", palette={True: blue, False: orange},
                  order=tables, size=2.5, jitter=0.3, legend=False, ax=ax)
    ax.axvline(1, color="black", lw=1)
    ax.set_xscale("log")
    ax.set_title(f"{pairs_in_look} pairs in the look\n", fontsize=10)
    ax.text(0.8, -0.65, "let through", ha="right", fontsize=9)
    ax.text(1.25, -0.65, "stopped", ha="left", fontsize=9)
    ax.set(xlabel="distance from the model, in units of the limit", ylabel="")
axes[1].text(2, 0.6, "healthy tables", color=blue, fontsize=9)
axes[1].text(0.7, 4.1, "wrong tables", color=orange, fontsize=9, ha="right")
sns.despine()

# %%
counted = off.groupby(["table", "precision", "length", "pairs"])["stopped"].agg(["sum", "size"])
counted = counted.apply(lambda row: f"{row['sum']} of {row['size']}", axis=1)
assert len(looks) == 1005 and results["made"]["in_view"] == 670
assert not off[off["right"]]["stopped"].any()
assert off[~off["right"] & (off["pairs"] == 32)]["stopped"].all()
passed = off[~off["right"] & ~off["stopped"]]["table"].value_counts()
assert passed.index.tolist() == ["another stage", "cut otherwise"] and passed["cut otherwise"] == 1
assert off[~off["right"] & (off["precision"] == "fp16")]["stopped"].all()
wide = counted.rename("stopped").unstack(["precision", "length", "pairs"]).fillna("")
wide.loc[tables]

# %% [markdown]
# No healthy table is stopped, in none of 1,005 looks. With 32 pairs every wrong one is. With eight pairs, which is all that a chunk of eight has, one kind of wrong table can pass in bf16: $M_1$ on a source that it was not trained on. One epoch on Orca hardly changed what it says about HH,
# so this table is wrong by little more than its own rounding. In fp16, which rounds eight times finer, it is stopped, too. (In a run such a table is refused before, by the hash of its weights.) And once a table of pairs that were cut otherwise passed: only the beginnings of prompts were gone, which hardly changed what the model says of the responses.
#
# **What this does not show.** The limit was $1.25\,s$ before. 327 looks on a processor without hardware for matrices in bf16 left it room, but on one that has it (AMX) a model's own table came to 0.97 of it, and a padded one was stopped. So it is $\sqrt2\,s$ now, for the reason above; 670 looks were in view then, and 335 are fresh. None of 1,005 means a rate below 0.3 % (at 95 %), not zero, at pairs drawn from the same 96 of each source. In fp16 only three looks have 1,024 tokens. Other models and half precision on a graphics card are not in it.
#
# Only the rows of the first look are checked. And if a table says that it is *another* model's, there is nothing to compare it with. That is a normal case: the reference is $M_1$, say, and training starts at S again. Then only the recorded hash says whose table it is.
#
# Both questions, in one function. It returns the loss that the tables say the first batch must have.

# %%
#| export
LOOK_AT = 32 # pairs; with fewer, rounding can only be guessed at

def _first_look(trainer, loss, batch, pairs, start):
    "Ask both questions about the first batch. Returns the loss that it must have by the tables."
    model, table, config = trainer.model, trainer.table, trainer.config
    precision, logprobs = trainer.precision, trainer.logprobs
    def loss_from(chosen, rejected):
        return pair_losses(chosen, rejected, *table.lookup(batch), config, batch).mean().item()

    said = batch_logprobs(model, batch, config, precision, logprobs)
    again = loss_from(*said.T)
    slope = _slope(said, table, batch, config)
    own = start or (table if table.kind["weights"] == weights_hash(model) else None)

    more = batch
    if len(batch) < LOOK_AT:                     # a small batch borrows pairs from the chunk
        more = [pairs[i] for i in range(min(LOOK_AT, len(pairs)))]
        said = batch_logprobs(model, more, config, precision, logprobs)
    exact = said
    if precision != "fp32":
        plain = getattr(logprobs, "exact", logprobs)
        exact = batch_logprobs(model, more, config, "fp32", plain)
    limit = rounding_limit(said, exact, more)

    rounded = slope * limit * _root_of_tokens(batch)
    half = precision != "fp32" and wants_compiling(config, model.device)
    # compiled layers round half precision otherwise with gradients than without
    check_same_twice(loss, again, precision, 1e-4 + rounded if half else 1e-4)
    if own is None: return again
    # in half precision, merged weights round otherwise than weights with an adapter beside them
    told = exact if has_adapter(model) else said
    check_table(own, more, told, limit, precision)
    return loss_from(*own.lookup(batch))


def _root_of_tokens(batch):
    tokens = [len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in batch]
    return (sum(tokens) / len(tokens)) ** 0.5

def _slope(said, table, batch, config):
    "How far a loss moves, at most, when a log-probability moves by a nat."
    if config.loss is None: return config.beta
    chosen, rejected = (side.clone().requires_grad_() for side in said.T)
    losses = pair_losses(chosen, rejected, *table.lookup(batch), config, batch)
    slopes = torch.autograd.grad(losses.sum(), (chosen, rejected), allow_unused=True)
    return max(slope.abs().max().item() for slope in slopes if slope is not None)


# %% [markdown]
# At the start of a stage whose reference is the model itself, it must say $\ln 2$. (With a loss of your own it is another number, and the tables know that one, too: see [other losses](other_losses.ipynb).)

# %%
starter = trainable(start_model())
trainer = Trainer(starter, table, config, make_accelerator(), make_optimizer(starter, config))
metrics = trainer.gradients(first)
must_be = _first_look(trainer, metrics["loss"], first, pairs, start=None)
assert abs(must_be - math.log(2)) < 1e-6
dict(loss=round(metrics["loss"], 6), must_be=round(must_be, 6))


# %% [markdown]
# ## Gradient checkpointing (you may skip this)
#
# What can we do without in memory? The backward pass needs the results of the forward pass, the *activations*. Autograd keeps them until then, and for long rows they take most of the memory. With gradient checkpointing they are thrown away and computed again when their turn comes: less memory, more time. (It has nothing to do with the
# checkpoints of a run.) The gradient must stay the same, and the bytes that autograd keeps must fall.
#
# Each layer must be computed again with the attention of its forward pass; `recompute_alike` of [chapter 04](04_packing.ipynb) sees to it. transformers renamed the switch in version 5; older versions know it by its old name.
#
# On a CPU there is a second half to it. The C library keeps freed memory for the next request. Our requests come in ever new sizes and do not fit into what it kept, so a process can hold twice what its tensors need. If you ask for it, the library returns large blocks at once, and a stage on a CPU does ask. The cost was too small to measure: six steps of SmolLM2-135M on HH pairs took 0.97 [0.80, 1.04] times as long.

# %%
#| export
def activation_checkpointing(
    model,    # causal LM
    on: bool, # whether activations are computed again in the backward pass
):
    "Switch gradient checkpointing, not reentrant, on or off; it acts in train mode only."
    new = hasattr(model, "activation_checkpointing_enable")
    how = {"use_reentrant": False, "context_fn": lambda: recompute_alike(model)}
    if on:
        enable = model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable
        enable(how)
    else:
        disable = model.activation_checkpointing_disable if new else model.gradient_checkpointing_disable
        disable()

def return_large_blocks(
    size: int=2**20, # bytes
):
    "Let the C library return freed blocks of this size to the system at once. Without glibc, do nothing."
    M_MMAP_THRESHOLD = -3
    try: ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, size)
    except OSError: pass


# %% [markdown]
# PyTorch lets us watch: `saved_tensors_hooks` calls a function for each tensor that autograd keeps.

# %%
def watched_gradient(model, batch): # MB kept, gradient
    sizes = []
    def note(x):
        sizes.append(x.numel() * x.element_size())
        return x
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        gradient = plain_gradient(model, batch, table)
    return sum(sizes) / 2**20, gradient

trainable(policy)
kept, kept_gradient = watched_gradient(policy, batch)
activation_checkpointing(policy, True)
less, less_gradient = watched_gradient(policy, batch)
activation_checkpointing(policy, False)
assert difference(less_gradient, kept_gradient) < 1e-5
assert less < 0.7 * kept
pd.Series({"MB kept": kept, "MB kept with checkpointing": less}).round(1)

# %% [markdown]
# ## What fits into memory? (you may skip this)
#
# A run that needs more memory than there is dies an hour after it was started. Can we know before? Weights, gradients and the two moments of AdamW are four numbers of four bytes for each parameter: 16 bytes, before a single token is read. Activations come on top, and they grow with the tokens of a forward pass.
#
# How much they take depends on the architecture, and no formula knows them all. But we need not load a model to know. PyTorch can run it on *fake tensors*, which have a shape and a dtype but no memory. We let a fake model read a row of fake pairs, and add up what autograd would keep. (The three kernels are the ways in which packed rows attend on a CPU and on old and new graphics cards, see [chapter 04](04_packing.ipynb).)

# %%
#| export
GIB = 2**30
KERNELS = dict(cpu=lambda row: None, padded=padded_plan, flash=flash_plan) # how a row attends; see chapter 04

def kept_bytes(
    config,                # of a transformers model
    tokens: int,           # of a packed row: pairs of 256 + 128 + 128
    precision: str="fp32", # of the forward pass: fp32, bf16 or fp16
    kernel: str="cpu",     # how it attends: cpu, padded or flash
    recompute: bool=False, # gradient checkpointing
    lora=None,             # the LoraConfig of adapters, if these are trained (chapter 09)
) -> tuple[int, int]:      # parameters, bytes
    """What a forward pass with gradients leaves in memory for the backward pass, counted on fake tensors.

    Copies of weights in half precision are part of it."""
    row = _usual_row(tokens, kernel)
    kept, sizes = [], {}
    def note(x):
        kept.append(x)                           # alive, or its address would be given away again
        storage = x.untyped_storage()
        sizes[storage._cdata] = storage.nbytes() # a storage that is kept twice counts once
        return x
    model = _shape_of(config, lora).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").tie_weights()
        activation_checkpointing(freeze_dropout(model), recompute)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), autocast("cpu", precision):
            try:
                of_row(model, row)
            except REFUSED:                      # it cannot be packed: each response has a row of its own
                kept.clear()
                sizes.clear()
                ids = torch.ones(max(1, tokens // 384), 384, dtype=torch.long)
                model(input_ids=ids, use_cache=False)
        for p in model.parameters():
            sizes.pop(p.untyped_storage()._cdata, None)
        return sum(p.numel() for p in model.parameters()), sum(sizes.values())

def _shape_of(config, lora):
    "A model without its numbers, with adapters where these are trained."
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if lora is None: return model
        from peft import inject_adapter_in_model
        with warnings.catch_warnings(action="ignore"): return inject_adapter_in_model(copy.copy(lora), model)

def trained_numbers(
    config,    # of a transformers model
    lora=None, # the LoraConfig of adapters, if these are trained
) -> int:
    "How many numbers an optimizer changes."
    return sum(p.numel() for p in trained_weights(_shape_of(config, lora)))

def _usual_row(tokens, kernel):
    "A packed row of pairs of 256 + 128 + 128 tokens."
    pair = dict(zip(PARTS, ([1] * 256, [1] * 128, [1] * 128)))
    row = pack([pair] * max(1, tokens // 512))
    row.plan = KERNELS[kernel](row)
    return row


# %% [markdown]
# The tiny world's model, from its config alone:

# %%
tiny_shape = policy.config
parameters, kept = kept_bytes(tiny_shape, 2048)
_, kept_if_recomputed = kept_bytes(tiny_shape, 2048, recompute=True)
assert parameters == sum(p.numel() for p in policy.parameters())
assert kept_if_recomputed < 0.5 * kept
{
    "parameters": parameters,
    "MB kept": round(kept / 2**20, 1),
    "MB kept, if recomputed": round(kept_if_recomputed / 2**20, 1),
}


# %% [markdown]
# Activations are one part of six. The others follow from the shape of the model:
#
# - weights, gradients and the two moments of AdamW: 4, 4 and 8 bytes for each parameter;
# - logits: the vocabulary is large, so they are made in pieces ([chapter 04](04_packing.ipynb)), and one piece and its gradients are alive at a time. Only responses have logits, so their share of the tokens counts;
# - the gradient of the output matrix, which is made beside the sum that it is added to.
#
# With gradient checkpointing, the layer whose turn it is keeps its activations for a while.

# %%
#| export
def memory_plan(
    config,                # of a transformers model
    train: TrainConfig,    # token_budget, gradient_checkpointing
    precision: str="fp32", # of the forward pass: fp32, bf16 or fp16
    kernel: str="cpu",     # how it attends: cpu, padded or flash
    piece: int=None,       # bytes of one piece of logits; default: a CPU's
    lora=None,             # the LoraConfig of adapters, if these are trained (chapter 09)
    responses: float=0.5,  # share of the tokens that are responses; `share_of_responses` of pairs
) -> dict:                 # name -> GiB
    "Memory of a training step, beyond the process itself. Takes layers to be as they are, not compiled."
    tokens = train.token_budget or USUAL_BUDGET
    n, kept = kept_bytes(config, tokens, precision, kernel, train.gradient_checkpointing, lora)
    trained = trained_numbers(config, lora) if lora else n
    text = config.get_text_config()
    all_logits = int(4 * text.vocab_size * tokens * responses)
    logits = 3 * min(all_logits, piece or piece_bytes("cpu"))
    output_gradient = 0 if lora else 4 * text.vocab_size * text.hidden_size
    layer = 0            # what a recomputed layer keeps while its turn lasts; the logits are gone by then
    if train.gradient_checkpointing:
        _, kept_by_all = kept_bytes(config, tokens, precision, kernel, lora=lora)
        layer = kept_by_all / text.num_hidden_layers
    beyond = max(0, layer - logits - output_gradient)
    found = dict(
        weights=4 * n,
        gradients=4 * trained,
        moments=8 * trained,                     # of AdamW
        activations=kept + beyond,
        logits=logits,                           # of one piece, with their gradients
        output_gradient=output_gradient,
    )
    return {name: size / GIB for name, size in found.items()}

def share_of_responses(
    pairs,    # tokenised pairs
) -> float:   # in 0..1
    "How many of the tokens of a packed row are responses. These have logits."
    return float(pair_tokens(pairs, responses=True).sum() / pair_tokens(pairs).sum())


# %%
share_of_responses(pairs)

# %% [markdown]
# The shape of SmolLM2-135M, which needs no download for this:

# %%
smol_shape = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)

def plan_of(tokens, precision, recomputed=False):
    train = TrainConfig(token_budget=tokens, gradient_checkpointing=recomputed)
    return memory_plan(smol_shape, train, precision)

plans = pd.DataFrame({
    "2048 tokens, fp32": plan_of(2048, "fp32"),
    "4096 tokens, fp32": plan_of(4096, "fp32"),
    "2048 tokens, bf16": plan_of(2048, "bf16"),
    "2048 tokens, fp32, recomputed": plan_of(2048, "fp32", recomputed=True),
}).T
plans["all"] = plans.sum(axis=1)
usual, longer, half, recomputed = plans["all"]
assert abs(plans["weights"] - 0.5).max() < 0.01
assert longer > usual > half > recomputed
plans.style.format("{:.2f}")

# %% [markdown]
# Is it true? The peak of a fresh process that makes two optimizer steps, beyond what the process holds before it has a model (`make bench`, on a CPU):

# %%
results = json.loads((files("sdpo_nb.data") / "results/packing.json").read_text())
measured = pd.DataFrame(results["plan_gib"]).T
measured["planned / measured"] = measured["planned"] / measured["measured"]
assert measured["planned / measured"].between(0.85, 1.15).all()
measured.rename_axis("model, tokens, precision, recomputed").style.format("{:.2f}")

# %% [markdown]
# On a CPU the plan is within 15 % of the truth. And on a graphics card? There a piece of logits may be a sixteenth of the whole card, so it matters how many of the tokens are responses: 39 % in HH-RLHF, 76 % in UltraFeedback. These are the six settings that [chapter 04](04_packing.ipynb) has measured; the recomputed layers were compiled, too, which the plan does not know.

# %%
larger_shape = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)

responses_of = {"hh_harmless": 0.39, "ultrafeedback_binarized": 0.76} # of the pairs that `make bench-gpu` reads
gpu = json.loads((files("sdpo_nb.data") / "results/gpu.json").read_text())
whole_card = int(gpu["card"]["memory_gib"] * GIB)

def beside_the_plan(name, recomputed):
    setting = gpu["settings"][name]
    row = setting["rows"]["ours, compiled, checkpointing" if recomputed else "ours"]
    tokens = min(row.get("budget", setting["budget"]), max(row["tokens"]))
    train = TrainConfig(token_budget=tokens, gradient_checkpointing=recomputed)
    shape = larger_shape if "1.2B" in name else smol_shape
    share = responses_of[name.split(",")[0]]
    plan = memory_plan(shape, train, "bf16", "flash", whole_card // 16, responses=share)
    return {"tokens": tokens, "planned": sum(plan.values()), "measured": row["peak_gib"]}

both = [(name, recomputed) for name in gpu["settings"] for recomputed in (False, True)]
index = pd.MultiIndex.from_tuples(both, names=[f"GiB, {gpu['card']['name']}", "recomputed"])
on_card = pd.DataFrame([beside_the_plan(*case) for case in both], index)
on_card["planned / measured"] = on_card["planned"] / on_card["measured"]
assert on_card["planned / measured"].between(0.85, 1.15).all()
on_card.style.format("{:.2f}").format("{:.0f}", subset=["tokens"])

# %% [markdown]
# Within 15 % here, too. (With half of the tokens as responses, whatever the data, it was from 22 % too little to 18 % too much.) A single pass may have more responses than the mean of its source, so where a card chooses its budget, as below, 15 % of it stay free.
#
# Now we can turn the question round: how many tokens of a forward pass fit into a graphics card? The parameters take their part, and tokens get the rest. The answer goes by the card's whole memory, not by what is free at the moment, so that a run that goes on computes
# as it did before.

# %%
#| export
MOST = 65_536   # tokens in a forward pass; more are not faster
_PLANNED = 0.85 # the share of a card's memory that a plan may fill

def tokens_that_fit(
    config,                # of a transformers model
    memory: int,           # of the card, bytes
    precision: str,        # of the forward pass: fp32, bf16 or fp16
    kernel: str,           # how it attends: padded or flash
    recompute: bool=False, # gradient checkpointing
    lora=None,             # the LoraConfig of adapters, if these are trained
    responses: float=0.5,  # share of the tokens that are responses
) -> int:
    "Tokens of a forward pass with gradients that go into this many bytes; in thousands, at most `MOST`."
    def need(tokens):
        train = TrainConfig(token_budget=tokens, gradient_checkpointing=recompute)
        return GIB * sum(memory_plan(config, train, precision, kernel, memory // 16, lora, responses).values())
    few, many = need(2048), need(4096)
    each = (many - few) / 2048
    room = _PLANNED * memory - few
    thousands = (2048 + room / each) // 1024
    return min(MOST, max(0, 1024 * int(thousands)))


# %%
def kept_or_recomputed(memory, shape, precision, kernel):
    return {
        "kept": tokens_that_fit(shape, memory, precision, kernel),
        "recomputed": tokens_that_fit(shape, memory, precision, kernel, recompute=True),
    }

pd.DataFrame({
    ("T4, 15 GB", "135M"): kept_or_recomputed(15 * GIB, smol_shape, "fp16", "padded"),
    ("T4, 15 GB", "1.2B"): kept_or_recomputed(15 * GIB, larger_shape, "fp16", "padded"),
    ("H100, 80 GB", "1.2B"): kept_or_recomputed(80 * GIB, larger_shape, "bf16", "flash"),
}).T


# %% [markdown]
# (More models and cards stand in the [README](index.ipynb).) Zero says that not even the parameters fit: 1.2 billion of them, trained in full, want 20 GB. The way out is [LoRA](09_lora.ipynb), or a smaller model.
#
# `fit` sets the token budget of a stage in this way. If not even the longest pair would fit, activations are recomputed; and if that does not help either, it says so. On a CPU it changes nothing. There, longer passes are no faster: one of 1,536 tokens took 1.01 [0.92, 1.04] times as long for the same pairs as one of 2,048. And with 1,536 a whole run needs less memory than TRL with one pair at a time ([chapter 04](04_packing.ipynb)).

# %%
#| export
def fit(
    model,               # causal LM on its device
    pairs,               # tokenised pairs of the chunk
    config: TrainConfig, # its token_budget is kept, if there is one
    precision: str,      # of the forward pass: fp32, bf16 or fp16
    logprobs,            # the function that will read the pairs
) -> TrainConfig:
    """The config with a token budget, if the card is to choose it.

    Prints a line if activations must be recomputed, and one if the longest pair may not fit even then."""
    if config.token_budget or model.device.type != "cuda": return config
    memory = torch.cuda.get_device_properties(model.device).total_memory
    tokens = getattr(logprobs, "tokens", padded_tokens)   # a budget counts padding where there is some
    long = pair_tokens(pairs).argsort()[-64:].tolist()
    longest = max(tokens([pairs[i]]) for i in long)
    kernel = "flash" if getattr(logprobs, "attention", "") == "flash" else "padded"
    lora = getattr(model, "peft_config", {}).get("default")
    share = share_of_responses(pairs)
    ways = [True] if config.gradient_checkpointing else [False, True]
    for recompute in ways:
        budget = tokens_that_fit(model.config, memory, precision, kernel, recompute, lora, share)
        if budget >= longest: break
    if recompute and not config.gradient_checkpointing:
        print(f"activations are recomputed: without that, {memory / GIB:.0f} GiB do not hold "
              f"the longest pair, {longest} tokens")
    if budget < longest:
        print(f"memory may not be enough: {memory / GIB:.0f} GiB hold {budget} tokens of a forward pass, "
              f"and the longest pair has {longest}. Take shorter pairs, adapters or a smaller model")
    return replace(config, token_budget=max(budget, 1), gradient_checkpointing=recompute)


# %%
assert fit(policy, pairs, config, "fp32", response_logprobs) is config


# %% [markdown]
# Before a run scores its first pair, it compares the plan with the memory that is free.

# %%
#| export
def free_memory(
    device, # of the model
) -> int:   # bytes
    "What a process could still have: of a card, or of the machine and its container."
    if torch.device(device).type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) # PyTorch keeps it for reuse
        return torch.cuda.mem_get_info(device)[0] + held
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if not limit.exists() or not limit.read_text().strip().isdigit(): return free
    used = int((group / "memory.current").read_text())
    parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    cache = int(parts["inactive_file"]) + int(parts["active_file"]) # files read before; they go when needed
    return min(free, int(limit.read_text()) - used + cache)

def peak_memory(
    device, # of the model
) -> int:   # bytes
    "The most that this process has had: of a card, or of the machine; 0 where the system does not say."
    if torch.device(device).type == "cuda": return torch.cuda.max_memory_allocated(device)
    if resource is None: return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# %%
assert 0 < free_memory("cpu") <= psutil.virtual_memory().total
assert resource is None or 2**26 < peak_memory("cpu") < psutil.virtual_memory().total


# %% [markdown]
# Which plan holds on this device, and how is it said?

# %%
#| export
def plan_for(
    config,             # of a transformers model
    train: TrainConfig, # token_budget, gradient_checkpointing
    precision: str,     # of the forward pass: fp32, bf16 or fp16
    device,             # of the model
    lora=None,          # the LoraConfig of adapters, if these are trained
    responses: float=0.5, # share of the tokens that are responses
) -> dict:              # name -> GiB
    """The memory plan on this device. On a card that chooses its token budget itself, that of the usual one,
    with activations recomputed where `fit` would recompute them."""
    if torch.device(device).type != "cuda": return memory_plan(config, train, precision, lora=lora, responses=responses)
    new_card = torch.cuda.get_device_capability(device) >= (8, 0)
    kernel = "flash" if precision != "fp32" and new_card else "padded"
    def plan(train): return memory_plan(config, train, precision, kernel, piece_bytes(device), lora, responses)
    kept = plan(train)
    room = _PLANNED * torch.cuda.get_device_properties(device).total_memory / GIB
    if train.token_budget or sum(kept.values()) <= room: return kept
    return plan(replace(train, gradient_checkpointing=True))

def as_line(
    plan: dict, # name -> GiB
) -> str:
    "A memory plan in words."
    parts = [f"{name.replace('_', ' ')} {size:.1f}" for name, size in plan.items()]
    return f"about {sum(plan.values()):.1f} GiB: " + ", ".join(parts)


# %%
plan = plan_for(smol_shape, TrainConfig(), "fp32", "cpu")
assert plan == plan_of(USUAL_BUDGET, "fp32")
as_line(plan)


# %% [markdown]
# If the plan needs more than is free, the run says so and does not start:

# %%
#| export
def check_memory(
    plan: dict,        # name -> GiB
    device,            # of the model
    loaded: bool=True, # whether the weights are in memory already
):
    "Raise ValueError for what cannot fit."
    need = sum(plan.values()) - loaded * plan["weights"]
    free = free_memory(device) / GIB
    if need <= free: return
    raise ValueError(f"memory: training needs {as_line(plan)}; "
                     f"{free:.1f} GiB are free on {torch.device(device).type}. "
                     "Take gradient_checkpointing, a smaller token_budget or a smaller model")


# %%
too_much = {name: 1e6 for name in plan}
print(complaint(check_memory, plan=too_much, device="cpu").split("; ")[0])


# %% [markdown]
# ## Compiled layers (you may skip this)
#
# Can the layers be made faster? PyTorch can compile the layers of a model into fewer and larger steps. On a graphics card this saves time ([chapter 04](04_packing.ipynb)), so it is done there unless a setting says otherwise. On a CPU you have to ask for it (`compile="on"`, and a C++ compiler must be there).

# %%
#| export
def wants_compiling(
    config: TrainConfig, # compile: auto, on or off
    device,              # of the model
) -> bool:
    "Whether the layers should be compiled on this device."
    return config.compile == "on" or config.compile == "auto" and torch.device(device).type == "cuda"

def compile_for(
    model,               # causal LM
    logprobs,            # the function that will read pairs
    precision: str,      # of the forward pass: fp32, bf16 or fp16
    config: TrainConfig, # gradient_checkpointing, deterministic
):
    "Compile the layers of a model once, under the switches of training, and say so where it cannot be done."
    switches = config.deterministic, _strictly(model, logprobs, precision, config)
    why = compile_layers(model, logprobs, precision, config.gradient_checkpointing, *switches)
    if why: print(f"compile is off: {why}")


# %%
assert [wants_compiling(config, device) for device in ("cpu", "cuda")] == [False, True]     # of `auto`


# %% [markdown]
# ## The same bits on a card (you may skip this)
#
# Does the same run give the same weights twice? A CPU computes the same bits every time. A graphics card need not: some of its kernels add up in any order. `same_bits` of [chapter 02](02_logprobs.ipynb) asks every kernel for its deterministic form. But does every operation of *this* model have one? PyTorch's switch has two forms: the strict one raises an error for an operation that cannot, the other one only warns.
#
# Why care? Because an interrupted run should end in the same weights as one that was left alone, and because two runs that differ by a setting should differ by nothing else.
#
# A pass over two short pairs, in the strict form, finds out before the run begins, and a run writes down what it found. If all operations have a deterministic form, training uses the strict switch. This matters: under the switch that only warns, the flash kernel still adds its gradients in any order. (Seen on an H200: no gradient came out the same twice.)

# %%
#| export
def why_not_same_bits(
    model,          # causal LM
    logprobs,       # the function that will read pairs
    precision: str, # of the forward pass: fp32, bf16 or fp16
) -> str|None:      # the operation, or None
    "Which operation of this model has no deterministic form on its device, or None, as on every CPU. Tried once."
    if model.device.type != "cuda": return None
    asked = logprobs, precision, model.training, has_adapter(model)
    known, why = getattr(model, "_same_bits", (None, None))
    if known == asked: return why
    why = None
    try:
        with same_bits(model.device, strict=True):
            try_out(model, logprobs, precision)
    except RuntimeError as e:
        if "deterministic" not in str(e): raise
        why = str(e).split(". ")[0]
    model._same_bits = asked, why
    return why

def _strictly(model, logprobs, precision, config):
    "Whether training uses the strict switch: where it may, since the flash kernel needs it."
    was_training = model.training
    try: return config.deterministic and why_not_same_bits(model.train(), logprobs, precision) is None
    finally: model.train(was_training)


# %%
assert why_not_same_bits(policy.train(), response_logprobs, "fp32") is None  # as on every CPU


# %% [markdown]
# ## Checkpoints (you may skip this)
#
# What if the process dies? It does: the power, the queue, Colab. The next call should go on from the last checkpoint and end *in the same bits*. So everything that the next step depends on goes into one file:
#
# - the weights that are trained, and the moments of AdamW: without them, AdamW would begin again with the signs of the gradients;
# - the scale of the scaler, which decides what overflows;
# - how far the stage has come: batch, step, and the length of the metrics file.
#
# The order of the data and the learning rate are not in it. They are functions of the step. That is why they were written as plain functions: what has no state cannot be forgotten.
#
# `replacing` of [chapter 02](02_logprobs.ipynb) writes to another name and renames at the end, so the file is whole or not there.

# %%
#| export
def save_checkpoint(
    folder,      # of the stage
    model,       # its weights; of frozen ones only the hash
    optimizer,   # its moments
    scaler,      # its scale
    state: dict, # how far the stage has come
):
    "Model, optimizer, scaler and position of a stage go into folder/checkpoint/state.pt."
    frozen = _frozen(model)
    path = Path(folder) / "checkpoint"
    path.mkdir(parents=True, exist_ok=True)
    saved = dict(
        model={name: x for name, x in model.state_dict().items() if name not in frozen},
        optimizer=optimizer.state_dict(),
        scaler=scaler.state_dict(),
        state=state | dict(weights=weights_hash(model)),
    )
    with replacing(path / "state.pt") as tmp, open(tmp, "xb") as f:
        torch.save(saved, f)                     # through a file of Python's, which keeps the system's error

def _frozen(model):
    "Names of the weights that are not trained: those beneath an adapter."
    every = model.named_parameters(remove_duplicate=False) # a shared weight has two names
    return {name for name, p in every if not p.requires_grad}


# %%
tmp = tempfile.TemporaryDirectory()
save_checkpoint(tmp.name, policy, trainer.optimizer, trainer.accelerator.scaler, dict(batch=3))
saved = torch.load(Path(tmp.name, "checkpoint/state.pt"), weights_only=True)
assert saved["state"] == dict(batch=3, weights=weights_hash(policy))
list(saved)


# %% [markdown]
# Disks and copies change bits, and PyTorch loads a changed file without a word. But the file is a zip archive with a checksum for each tensor. So we can ask, for the moments of the optimizer as well.

# %%
#| export
def read_checkpoint(
    folder,       # of a stage
) -> dict|None:   # model, optimizer, scaler, state; None where there is no checkpoint
    "What a checkpoint holds. Raises ValueError, saying what to do, where it cannot be read or was changed."
    path = Path(folder) / "checkpoint" / "state.pt"
    if not path.exists(): return None
    with _saying_what_to_do(path):
        damaged = zipfile.ZipFile(path).testzip()
        if damaged: raise ValueError(f"{damaged} in it was changed")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        absent = {"model", "optimizer", "scaler", "state"} - set(saved)
        if absent: raise ValueError(f"it has no {', '.join(sorted(absent))}")
    return saved

@contextmanager
def _saying_what_to_do(path):
    "An exception means that the checkpoint cannot be used, unless memory or the right to read it is missing."
    try: yield
    except Exception as e:
        if memory_ended(e) or isinstance(e, PermissionError): raise
        why = str(e).strip().splitlines() or [type(e).__name__]
        raise ValueError(f"{path}: this checkpoint cannot be used ({why[0]}); "
                         f"{_train_anew('it', path.parent.parent)}") from e

def _train_anew(what, folder):
    "What to do about a stage that cannot go on."
    end = Path(folder) / "stage.json"
    also = f" and {end}" if end.exists() else ""
    return f"remove {what}{also}, and run again: the stage is trained anew, to the same bits"


# %% [markdown]
# One flipped bit among some hundred thousand bytes:

# %%
path = Path(tmp.name, "checkpoint/state.pt")
whole = bytearray(path.read_bytes())
assert read_checkpoint(tmp.name)["state"] == saved["state"]
whole[5000] ^= 1
path.write_bytes(whole)
complaint(read_checkpoint, folder=tmp.name).removeprefix(tmp.name)

# %% [markdown]
# A checkpoint belongs to one stage. What if it is loaded under another learning rate, or with other pairs? The stage would go on as a mixture, or be found finished, and nothing would be
# trained. So the checkpoint carries everything that the weights depend on, and refuses a stage that differs. Four settings are left out. Three of them change how a gradient is computed, not what it is, and the fourth how often the stage is saved.

# %%
#| export
COMPUTED_ALIKE = {"save_every", "token_budget", "packing", "gradient_checkpointing"}

def _identity(pairs, table, config, precision, stage, schedule) -> dict:
    "What the weights of a stage depend on; `precision` is the one that was picked."
    names = [f.name for f in fields(TrainConfig) if f.name not in COMPUTED_ALIKE]
    settings = {name: getattr(config, name) for name in names}
    return settings | dict(
        loss=getattr(config.loss, "__qualname__", None), # of a function, the name
        precision=precision,
        pairs=pairs_hash(pairs),
        reference=table.kind["weights"],
        stage=stage,
        steps=list(schedule),
    )

def _as_today(identity):
    "An identity from before there were schedules: `schedule` was what `steps` is now."
    if "steps" in identity or "schedule" not in identity: return identity
    return identity | dict(schedule="linear", steps=identity["schedule"])

def load_checkpoint(
    folder,              # of the stage
    model,               # gets the weights
    optimizer,           # gets the moments
    scaler,              # gets the scale
    identity: dict=None, # what the weights of this stage depend on
) -> dict|None:          # how far the stage has come; None where there is no checkpoint
    "Put the last checkpoint back. Raises ValueError, naming what differs, if it is of another identity."
    saved = read_checkpoint(folder)
    if saved is None: return None
    path = Path(folder) / "checkpoint" / "state.pt"
    state = saved["state"]
    old = _as_today(state.get("identity") or {})
    wanted = (identity or {}).items()
    differs = [f"{name} = {old.get(name)}, not {value}" for name, value in wanted if old.get(name) != value]
    if differs:
        raise ValueError(f"{path}: this stage was started with {'; '.join(differs)}; "
                         "use that or another folder")
    with _saying_what_to_do(path):
        absent, foreign = model.load_state_dict(saved["model"], strict=False)
        odd = foreign + [name for name in absent if name not in _frozen(model)]
        if odd: raise ValueError(f"{odd[0]} is only in one of checkpoint and model")
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        found = weights_hash(model)
        if found != state.get("weights", found):
            frozen = ", with the frozen ones," if _frozen(model) else ""
            raise ValueError(f"its weights{frozen} are {found}, not {state['weights']}")
    return state


# %%
def identity_of(**changes): return _identity(pairs, table, replace(config, **changes), "fp32", 1, (0, 8))

state = dict(batch=3, identity=identity_of())
save_checkpoint(tmp.name, policy, trainer.optimizer, trainer.accelerator.scaler, state)

reader = trainable(start_model())
optimizer, scaler = make_optimizer(reader, config), make_accelerator().scaler
into = dict(folder=tmp.name, model=reader, optimizer=optimizer, scaler=scaler)
assert load_checkpoint(**into, identity=identity_of(save_every=7))["batch"] == 3
assert weights_hash(reader) == weights_hash(policy)
complaint(load_checkpoint, **into, identity=identity_of(lr=2e-4, beta=0.1)).split(": ")[1]


# %% [markdown]
# The metrics of a stage are a file that only grows, `metrics.jsonl`: one line for each step. On resume it is cut back to the length that it had at the checkpoint, so no step appears twice.

# %%
#| export
class MetricsLog:
    "metrics.jsonl: one optimizer step a line."
    def __init__(
        self,
        path,        # of the file; it is made, if it is not there
        size: int=0, # cut back to so many bytes first
    ):
        if Path(path).is_symlink():
            raise ValueError(f"{path}: is a link, which a run does not write through; remove it")
        self.file = open(path, "ab")
        found = self.size
        if found < size:
            self.close()
            folder = Path(path).parent
            raise ValueError(f"{path}: {found} bytes, but {size} at the checkpoint; lines were lost; "
                             f"{_train_anew(folder / 'checkpoint', folder)}")
        self.file.truncate(size)

    def add(self, row: dict):
        line = json.dumps(row) + "\n"
        self.file.write(line.encode())
        self.file.flush()

    @property
    def size(self): return self.file.seek(0, os.SEEK_END)

    def close(self): self.file.close()


# %% [markdown]
# Two lines, of which the checkpoint knew one:

# %%
path = Path(tmp.name, "metrics.jsonl")
log = MetricsLog(path)
log.add(dict(step=1, loss=0.69))
at_checkpoint = log.size
log.add(dict(step=2, loss=0.68))
log.close()

again = MetricsLog(path, at_checkpoint)
again.add(dict(step=2, loss=0.67))
again.close()
print(path.read_text())
print(complaint(MetricsLog, path=path, size=1000).removeprefix(tmp.name))
tmp.cleanup()


# %% [markdown]
# ## The stage
#
# How do all these parts become one call? What is left is bookkeeping: where to start, when to save, what to say. First, everything that the first step needs. `previous` serves [chapter 14](14_stepwise.ipynb), where one optimizer may go on over several
# stages.

# %%
#| export
def _begin(model, table, config, precision, logprobs, previous):
    "A Trainer as the first step needs it. Gradients that an interrupted call left behind go."
    accelerator = make_accelerator(precision, model.device)
    trainable(model).zero_grad()
    activation_checkpointing(model, config.gradient_checkpointing)
    if model.device.type == "cpu": return_large_blocks()
    if wants_compiling(config, model.device): compile_for(model, logprobs, precision, config)
    trainer = Trainer(model, table, config, accelerator, make_optimizer(model, config), precision, logprobs)
    if previous: _take_over(previous, trainer)
    return trainer

def _take_over(previous, trainer):
    "Moments and scale from the stage before."
    saved = read_checkpoint(previous)
    if saved is None:
        raise ValueError(f"{previous}: its checkpoint is missing, whose optimizer was to go on; "
                         "put it back or use another folder")
    trainer.optimizer.load_state_dict(saved["optimizer"])
    trainer.accelerator.scaler.load_state_dict(saved["scaler"])


# %%
about_to_start = _begin(start_model(), table, config, "fp16", packed_logprobs, previous=None)
print(complaint(_take_over, previous="stage-0", trainer=about_to_start))
{
    "train mode": about_to_start.model.training,
    "learning rate": about_to_start.optimizer.defaults["lr"],
    "the loss is multiplied by": about_to_start.accelerator.scaler.get_scale(),
    "pairs are read by": about_to_start.logprobs.__name__,
}

# %% [markdown]
# Second, the counting. A step that the scaler skipped moves neither the step number nor the learning rate. A few skipped steps are the scaler looking for its scale: it starts at $2^{16}$ and halves each time. After twenty in a row, the scale is not the reason.

# %%
#| export
MAX_SKIPS = 20

def _count(state, skipped):
    "One batch more; one step more, unless it was skipped."
    state["batch"] += 1
    state["step"] += not skipped
    state["skips"] = state["skips"] + 1 if skipped else 0

def _stop_if_stuck(state, loss):
    if state["skips"] < MAX_SKIPS: return
    raise ValueError(f"{MAX_SKIPS} steps in a row were skipped, the loss is {loss:.5g}: "
                     "no scale makes the gradient finite; use bf16 or fp32")


# %%
state = dict(batch=0, step=0, skips=0)
for skipped in (False, True, True, False, True): _count(state, skipped)
assert state == dict(batch=5, step=2, skips=1)
complaint(_stop_if_stuck, state=dict(skips=20), loss=0.7)

# %% [markdown]
# Third, the line that a step writes, and the clock that tells how long the run still takes ([chapter 02](02_logprobs.ipynb)). The clock counts tokens. A token costs three times as much in training as in a forward pass alone, because the backward pass computes two products for each of its one.

# %%
#| export
TRAINING = 3 # times as long as a forward pass alone

def _line(state, epoch, batch, metrics, seconds):
    "What metrics.jsonl says about a step. `tokens` counts each response with its prompt."
    prompts = sum(len(p["prompt_ids"]) for p in batch)
    tokens = int(pair_tokens(batch).sum()) + prompts
    speed = dict(tokens=tokens, tokens_per_second=round(tokens / seconds, 1))
    return dict(step=state["step"], epoch=epoch, pairs=len(batch), **metrics, **speed)

def _set_clock(clock, pairs, todo, epochs):
    "The clock of the run, told what this stage has done before; or one of this stage alone."
    tokens = TRAINING * pair_tokens(pairs)
    left = sum(tokens[rows].sum() for _, rows in todo)
    if clock is None: return Clock(left)
    clock.skip(epochs * tokens.sum() - left)
    return clock


# %%
todo = all_batches(len(pairs), config, stage=1)
clock = _set_clock(None, pairs, todo, epochs=1)
assert clock.left == 3 * sum(len(p[part]) for p in pairs for part in PARTS)
_line(state, 0, batch, dict(loss=0.69), seconds=0.5)


# %% [markdown]
# Now the stage itself, which you can read from top to bottom. Before the loop stands what a stage decides once:
#
# 1. which batches there are, and at which step of the schedule it begins;
# 2. that weights are fp32 and dropout is off, before anything is asked of the model;
# 3. in which precision, and by which function, pairs are read;
# 4. what its checkpoint must agree with, and whether there is one to go on from.
#
# Each turn of the loop is one optimizer step:
#
# 1. **gradients**: forward and backward pass of a batch;
# 2. **look**, in the first step only: nothing has been changed yet;
# 3. **update**: clip and step, at the rate of the schedule;
# 4. **count** the batch, and the step, unless it was skipped;
# 5. **write** a line to `metrics.jsonl`, and show it behind the progress bar;
# 6. **save** a checkpoint, every so many steps and at the end.
#
# `ready` prepares the next batch in a thread while the last one is computed.

# %%
#| export
def train_stage(
    model,                    # causal LM, trained in place
    pairs,                    # tokenised pairs of the chunk
    table: LogprobTable,      # of the reference, with these pairs
    config: TrainConfig,      # settings of the stage
    folder,                   # metrics.jsonl and checkpoint/; an interrupted stage goes on
    stage: int=1,             # enters the seed of the data order
    start: LogprobTable=None, # of the model as it comes in; None: `table`, if it is this model's
    logprobs=None,            # (model, pairs) -> (chosen, rejected); None: what `choose_logprobs` takes
    previous=None,            # folder of the stage whose optimizer goes on; None: a new one
    schedule: tuple=None,     # (steps before this stage, steps in all); None: this stage alone
    clock: Clock=None,        # of the run; None: of this stage
    on_step=None,             # called after each step, with its line of metrics.jsonl as a dict
) -> dict:                    # steps, skipped, first loss, the loss it had to be, precision
    """Train one stage of DPO against a table of reference log-probabilities.

    Raises ValueError for a folder of another stage, a wrong table or first loss, or a gradient that is not finite."""
    if not len(pairs): raise ValueError("pairs: none; a stage needs at least one")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    batches = all_batches(len(pairs), config, stage)
    before, total = schedule or (0, len(batches))

    _check_weights(model, table)
    trainable(model).eval()
    precision = pick_precision(config.precision, model.device)
    if not logprobs:
        first = [pairs[i] for i in batches[0][1]]
        logprobs = choose_logprobs(model, first, config.packing, precision)
    identity = _identity(pairs, table, config, precision, stage, (before, total))
    config = fit(model, pairs, config, precision, logprobs)
    trainer = _begin(model, table, config, precision, logprobs, previous)
    optimizer, scaler = trainer.optimizer, trainer.accelerator.scaler

    state = dict(identity=identity, batch=0, step=0, skips=0, log=0, first_loss=None, implied=None)
    state = load_checkpoint(folder, model, optimizer, scaler, identity) or state
    todo = batches[state["batch"]:]
    clock = _set_clock(clock, pairs, todo, config.epochs)
    strict = _strictly(model.train(), logprobs, precision, config)
    bar = progress(len(batches), f"stage {stage}", "step", state["batch"], leave=True)

    def ready(epoch_and_rows):
        epoch, rows = epoch_and_rows
        batch = [pairs[i] for i in rows]
        return epoch, batch, trainer.prepare(batch)

    with (
        bar,
        closing(MetricsLog(folder / "metrics.jsonl", state["log"])) as log,
        same_bits(model.device, config.deterministic, strict),
    ):
        for epoch, batch, parts in ahead(ready, todo):
            began = time.perf_counter()
            metrics = trainer.gradients(batch, parts)              # forward and backward
            if state["batch"] == 0:                                # nothing has been changed yet: look
                looked = time.perf_counter()
                implied = _first_look(trainer, metrics["loss"], batch, pairs, start)
                state.update(first_loss=metrics["loss"], implied=implied)
                began += time.perf_counter() - looked              # a look is no training
            lr = learning_rate(before + state["step"], total, config)
            metrics = trainer.update(metrics, lr)                  # clip and step
            seconds = time.perf_counter() - began

            _count(state, metrics["skipped"])
            clock.tick(TRAINING * pair_tokens(batch).sum(), seconds)
            row = _line(state, epoch, batch, metrics, seconds)
            log.add(row)                                           # write
            _stop_if_stuck(state, metrics["loss"])
            _show(bar, row, clock)
            if on_step: on_step(row)

            if state["batch"] % config.save_every == 0 or state["batch"] == len(batches):
                save_checkpoint(folder, model, optimizer, scaler, state | dict(log=log.size))

    activation_checkpointing(model, False)
    model.eval()
    return dict(
        steps=state["step"],
        skipped=len(batches) - state["step"],
        first_loss=state["first_loss"],
        implied_first_loss=state["implied"],
        precision=precision,
    )

def _check_weights(model, table):
    "Raise ValueError for a table of this model's weights as they are before `trainable` makes them fp32."
    half = any(p.dtype != torch.float32 for p in model.parameters())
    if half and weights_hash(model) == table.kind["weights"]:
        raise ValueError("table: it is of this model with weights in half precision, but a stage trains weights "
                         "in fp32; call trainable(model) first, and score the pairs after that")

def _show(bar, row, clock):
    learned = f"loss {row['loss']:.3f}, accuracy {row['reward_accuracy']:.2f}, margin {row['margin']:+.2f}"
    bar.set_postfix_str(f"{learned}, lr {row['lr']:.1e}, {clock}", refresh=False)
    bar.update()


# %% [markdown]
# ## The checks, once more
#
# Is the finished stage still the six lines? Every refinement was checked against the version before it. Now the whole is checked: against the ten lines, against the six, and against two things that go wrong in practice.
#
# **The ten lines.** With the same settings, and read by the same function, the finished stage must end in the weights of `simple_stage`, to the bit. And its two first losses, measured and implied by the table, must be $\ln 2$.

# %%
def run(model, table, folder=None, use=pairs, logprobs=None, **changes):
    usual = dict(beta=0.5, lr=1e-4, batch_size=16, precision="fp32")
    config = TrainConfig(**usual | changes)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(folder or tmp)
        summary = train_stage(model, use, table, config, folder, logprobs=logprobs)
        return summary, pd.read_json(folder / "metrics.jsonl", lines=True)

finished = start_model()
summary, metrics = run(finished, table, batch_size=8, logprobs=response_logprobs)
assert weights_hash(finished) == weights_hash(simple)
assert (metrics["loss"] - simple_metrics["loss"]).abs().max() < 1e-9
summary

# %% [markdown]
# **The six lines.** The plain loop of the first section had no shuffling, no warm-up, no clipping and a constant rate. The stage without them must be that loop. It is: the same four losses.

# %%
summary, metrics = run(start_model(), table, shuffle=False, schedule="constant", warmup=0, clip=1e9)
torch.testing.assert_close(metrics["loss"].tolist(), losses, rtol=1e-4, atol=1e-5)
pd.DataFrame({"plain loop": losses, "stage": metrics["loss"]}).round(5)

# %% [markdown]
# **A wrong table.** Usually the reference *is* the model that we start from. Then policy and reference say the same, and the first loss must be $\ln 2$. A table that carries this model's hash but holds another model's numbers, other tokens or other rows is caught before the first update. Here the chosen and rejected numbers are swapped.
#
# And if the table says that it is another model's? Then the same numbers pass, for they might well be right. If you meant this model, read `table.kind`, or notice that the first loss is not $\ln 2$.

# %%
swapped = table.rows.rename(columns={"chosen": "rejected", "rejected": "chosen"})
of_this_model = LogprobTable(table.kind, swapped)
of_another = LogprobTable(table.kind | dict(weights="another"), swapped)

message = complaint(run, model=start_model(), table=of_this_model)
passed, _ = run(start_model(), of_another)
assert "other weights" in message
assert abs(passed["first_loss"] - math.log(2)) > 0.05
first_losses = {name: round(passed[name], 5) for name in ("first_loss", "implied_first_loss")}
print(textwrap.fill(message, 100))
first_losses     # where the table says that it is another model's


# %% [markdown]
# (One table looks like another model's and is not: it was scored while this model's weights were in half precision. A stage would make them fp32, which changes their hash, and nothing would be compared. So a stage asks for this first, and refuses.)
#
# **An interruption.** Interrupted and continued, the stage must end in the same bits. We raise an exception in the middle of the eighth of eight steps. The last checkpoint is of
# the sixth, so one finished step is lost and made again, and its line must not appear twice. Asked to go on with another learning rate, the folder refuses.

# %%
def stop_at(call):
    calls = 0
    def logprobs(model, batch):
        nonlocal calls
        calls += model.training          # those of the first look do not count
        if calls == call: raise KeyboardInterrupt
        return packed_logprobs(model, batch)
    return logprobs

def lines_of(folder): return len(Path(folder, "metrics.jsonl").read_text().splitlines())


# %%
straight, broken, continued = start_model(), start_model(), start_model()
often = dict(batch_size=8, save_every=2)
with tempfile.TemporaryDirectory() as tmp:
    run(straight, table, tmp + "/straight", **often)
    try: run(broken, table, tmp + "/broken", logprobs=stop_at(8), **often)
    except KeyboardInterrupt: lines_when_stopped = lines_of(tmp + "/broken")
    _, metrics = run(continued, table, tmp + "/broken", **often)
    refusal = complaint(run, model=start_model(), table=table, folder=tmp + "/broken", batch_size=8, lr=2e-4)
assert weights_hash(continued) == weights_hash(straight)
assert weights_hash(broken) != weights_hash(straight)
assert lines_when_stopped == 7
assert metrics["step"].tolist() == list(range(1, 9))
dict(
    straight=weights_hash(straight),
    continued=weights_hash(continued),
    lines_when_stopped=lines_when_stopped,
    lines_in_the_end=len(metrics),
    other_lr=refusal.split(": ", 1)[1],
)

# %% [markdown]
# ## What training looks like from inside
#
# Which pairs does the model still learn from? Each pair's gradient is weighted by $\lambda = \sigma(-\beta\Delta)$: how wrong the policy still is about this pair. At first every pair has one half. What will become of the weights when the same pairs come again and again?
#
# We train on all pairs of the source, for four epochs. Each column of the picture is one step, and shows how the weights of its pairs are spread. Bright cells hold many pairs. Below the dotted line the policy prefers the chosen response more than the reference does, and the lower, the less this pair still pulls.

# %%
reference = score_pairs(start_model(), digest)
summary, metrics = run(start_model(), reference, use=digest, batch_size=32, epochs=4)
counts = pd.DataFrame(metrics["lambda_hist"].tolist())   # a step a row, ten bins of lambda
shares = counts.div(metrics["pairs"], axis=0).T

# %%
fig, ax = plt.subplots(figsize=(7, 3))
sns.heatmap(shares, vmax=0.4, cmap="viridis", cbar_kws=dict(label="share of the batch", extend="max"), ax=ax)
for epoch, rows in metrics.groupby("epoch"):
    if epoch: ax.axvline(rows.index[0], color="white", lw=1.2)
    ax.text(rows.index.to_numpy().mean(), 10.2, f"epoch {epoch + 1}", ha="center", fontsize=9)
white = dict(color="white", fontsize=9, va="center")
ax.text(1, 8.6, "still wrong", **white)
ax.text(1, 1.2, "learned", **white)
ax.axhline(5, color="white", lw=0.8, ls=":")
steps, edges = range(0, len(metrics) + 1, 8), range(0, 11, 2)
ax.set_xticks(steps, steps, rotation=0)
ax.set_yticks(edges, [edge / 10 for edge in edges], rotation=0)
ax.invert_yaxis()
ax.set(xlabel="optimizer step", ylabel=r"weight of a pair, $\lambda$")
ax.set_title("all pairs start at one half; most are learned, a few are not", fontsize=10, pad=20);

# %%
last_epoch = metrics["epoch"] == 3
last = counts[last_epoch].sum() / metrics["pairs"][last_epoch].sum()
shares = pd.Series({
    "below 0.3": last[:3].sum(),
    "0.3 to 0.5": last[3:5].sum(),
    "above 0.5": last[5:].sum(),
}, name="share of the pairs, last epoch")
assert shares["below 0.3"] > 0.6
assert 0 < shares["above 0.5"] < 0.15
shares.rename_axis("lambda").round(2)

# %% [markdown]
# Most pairs are settled and hardly pull any more. A few, 8 %, stand above one half: the policy prefers their chosen response *less* than the reference does. A mean loss
# that falls does not speak for every pair.
#
# ## What you now have
#
# - `train_stage`, which trains any causal LM against a table, at any precision, and survives being killed. Without its refinements it is six lines, and agrees with them.
# - `Trainer`, what the steps of a stage share, with the two halves of a step: `gradients` and `update`.
# - A folder that belongs to one stage, and refuses other settings, pairs or another reference.
# - A look at the first batch, before anything is changed: the model must say the same twice, and a table that claims to be this model's must hold what it says, as near as rounding allows.
# - `TrainConfig`, the settings that you type, and `learning_rate`, the schedule that they make.
# - `memory_plan`, which tells what is needed before a weight is loaded, on a CPU to within 15 %, and `fit`, which gives a card the token budget that it holds.
#
# **What it leaves out.** It trains in one process and on one device. It makes no adapters: it trains what wants a gradient, and [chapter 09](09_lora.ipynb) says what that is. It looks at no held-out pairs: that is [chapter 08](08_evaluate.ipynb). And it does not know where its table comes from: that is [chapter 14](14_stepwise.ipynb).
#
# ## Questions to test yourself
#
# 1. Why does the mean of micro-batch means weigh pairs differently?
#
# <details><summary>Answer</summary>
#
# A micro-batch of $m$ pairs gives each of them the weight $1/m$ in its mean, and then all micro-batches weigh the same. So a pair in a short micro-batch weighs more. With 4, 4 and 3 pairs it is $\frac13\cdot\frac13$ against $\frac13\cdot\frac14$; it should be $\frac1{11}$ for all.
#
# </details>
#
# 2. Why must the scaler be undone before clipping?
#
# <details><summary>Answer</summary>
#
# Under fp16 the gradient is multiplied by the scale, which begins at $2^{16}$ and doubles after every 2,000 steps without an overflow. Its norm would be far above `clip` in every step, and each step would be clipped to a norm that depends on the scale, not on the gradient.
#
# </details>
#
# 3. The first look passes. Which mistakes in the reference does it *not* see, and which wrong $\beta$? Where would you look for them?
#
# <details><summary>Answer</summary>
#
# It does not see rows that it does not look at (it reads 32 pairs), nor a table that truthfully says that it is another model's, when you meant this one. And it sees no wrong $\beta$: at margin zero the loss is $\ln 2$ for every $\beta$. Look at `table.kind`, at the recorded hashes, at `config.yaml` of the run, and at how fast the margins grow.
#
# </details>
#
# 4. Why may a folder go on with another `save_every`, but not with another `precision`?
#
# <details><summary>Answer</summary>
#
# `save_every` says when the state is written, and the weights do not depend on it. Another precision rounds every later gradient differently: the stage would end in weights that no single setting gives, and nobody could make them again.
#
# </details>
#
# ## Try this
#
# - Sort the pairs by the reference's gamma, `order = table.gamma(list(pairs)).argsort().tolist()`, and run a stage with `use=pairs.select(order)`, `shuffle=False`, `batch_size=8`. Then in the reverse order. What do `gamma_ref` and the loss do over the steps?
#
# <details><summary>What you should see</summary>
#
# `gamma_ref` climbs from -6.7 to 8.7. The loss does not fall: 0.69, 0.68, 0.69, 0.61, 0.69, 0.59, 0.68, 0.70. Each batch now holds pairs of one kind, and what the model learned from pairs that the reference gets wrong does not help with those that it gets right. In the reverse order the loss stays near 0.69 until the last batch, 0.64. In sorted order, a loss curve shows the order as much as the learning.
#
# </details>
#
# - Define `make_optimizer` again, with a weight decay of 10, then of 100, and run a stage with `batch_size=8, epochs=4`. Watch `margin` and `logratio_chosen`.
#
# <details><summary>What you should see</summary>
#
# Without decay, the last step has a margin of 1.81 and a `logratio_chosen` of 0.72. With 10 it is 1.66 and 0.71: hardly a change. With 100 it is 0.65 and -4.2, and the reward accuracy falls from 1 to 0.63. Each step multiplies the weights by $1 - lr \cdot decay$; after all 32 steps they are some 15 % smaller. Decay pulls to zero, not to the reference, and zero is not a language model.
#
# </details>
#
# - In the cell of the interruption, take `save_every=5` and `stop_at(4)`. (Its assert about seven lines will fail; take it out.) From which step does the stage go on, and does it still end in the same bits?
#
# <details><summary>What you should see</summary>
#
# From the first step. Three lines were written, but no checkpoint: so the file is cut back to nothing, and the stage begins anew. It ends in the same bits: `straight` and `continued` are equal.
#
# </details>
