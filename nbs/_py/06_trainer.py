# %% [markdown]
# # One stage of DPO
# > A plain loop, then accumulation, mixed precision, a schedule, checkpoints and exact resume: each refinement equal to the version before it.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/06_trainer.ipynb)
#
# **You should know** the [loss](03_loss.ipynb), the [log-probability table](02_logprobs.ipynb) and what an optimizer does. **Time** under a minute on two CPU cores.
#
# Six lines train a model with DPO. The other lines of a trainer are there so that the same thing happens with less memory, at half
# precision, across an interruption. Each of them is a chance to change the gradient without a word. So this chapter grows the trainer from the six lines,
# and after every addition asks for the same gradient again.

# %%
#| default_exp trainer

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
#| export
import hashlib, json, math, os, time
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tqdm.auto import tqdm

from sdpo_nb.logprobs import LogprobTable, autocast, freeze_dropout, gamma, pick_precision, response_logprobs, score_pairs, weights_hash
from sdpo_nb.loss import dpo_loss, reward, reward_accuracy

# %%
import copy, tempfile
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from sdpo_nb.logprobs import load_model, load_tokenizer
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.world import load_world
torch.set_num_threads(1);

# %% [markdown]
# ## Six lines
#
# The data: 64 pairs of the tiny world. The reference: not a second model but a table of its log-probabilities, here those of S itself.

# %%
w = load_world()
tok = load_tokenizer(w.base)
pairs = tokenize_pairs(load_pairs(w.sources["digest"]), tok, "digest").pairs.select(range(64))
table = score_pairs(load_model(w.base), pairs)
table.rows.head(3)


# %% [markdown]
# Here is the trainer that everything below has to agree with.

# %%
def plain_loop(model, pairs, table, beta=0.5, lr=1e-4, batch=16):
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0), []
    for i in range(0, len(pairs), batch):
        b = list(pairs.select(range(i, min(i + batch, len(pairs)))))
        loss = dpo_loss(gamma(*response_logprobs(model, b)), table.gamma(b), beta).mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    return losses


# %%
policy = load_model(w.base)
losses = plain_loop(policy, pairs, table)
assert abs(losses[0] - math.log(2)) < 1e-4 and losses[-1] < losses[0]
[round(l, 4) for l in losses]


# %% [markdown]
# The first loss is $\ln 2$, because target and reference are the same model; the last is not. From here on `policy` is the model *after* this
# loop: a check at zero margin would see neither a wrong sign nor a wrong beta.

# %%
def plain_gradient(model, batch, table, beta=0.5):
    model.zero_grad()
    dpo_loss(gamma(*response_logprobs(model, batch)), table.gamma(batch), beta).mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}

def difference(a, b): # largest relative difference over all tensors
    return max(((a[n] - b[n]).norm() / b[n].norm()).item() for n in b)

batch = [pairs[i] for i in range(11)]
want = plain_gradient(policy, batch, table)
sum(g.norm()**2 for g in want.values()).sqrt().item()


# %% [markdown]
# ## Accumulation: divide by pairs
#
# A batch that does not fit is cut into micro-batches whose gradients add up. If each micro-batch contributes its own *mean*, the pairs of
# a short last one count more. Eleven pairs in fours show it.

# %%
def accumulated(model, batch, size, divide):
    model.zero_grad()
    for i in range(0, len(batch), size):
        b = batch[i:i+size]
        divide(dpo_loss(gamma(*response_logprobs(model, b)), table.gamma(b), 0.5), len(batch), math.ceil(len(batch) / size)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}

means = accumulated(policy, batch, 4, lambda l, n, parts: l.mean() / parts)
by_pairs = accumulated(policy, batch, 4, lambda l, n, parts: l.sum() / n)
assert difference(by_pairs, want) < 1e-4 < 1e-2 < difference(means, want)
pd.Series({"mean of means": difference(means, want), "sum / pairs": difference(by_pairs, want)}, name="relative difference of the gradient").map("{:.1e}".format)


# %% [markdown]
# Since the sum does not care about order, pairs of like length may share a micro-batch, which leaves less padding.

# %%
#| export
def micro_batches(batch: list, # tokenised pairs of one optimizer batch
                  size: int,   # pairs per forward pass
                 ) -> list[list]:
    "Cut an optimizer batch into micro-batches of pairs of like length."
    by_length = sorted(batch, key=lambda p: -len(p["prompt_ids"]) - max(len(p["chosen_ids"]), len(p["rejected_ids"])))
    return [by_length[i:i+size] for i in range(0, len(by_length), size)]


# %% [markdown]
# ## Settings
#
# A dataclass holds them. Each knows its help text and its range, so that one place serves the error messages, the table of defaults and the command line.

# %%
#| export
def setting(default, help: str, low=None, high=None, choices=None, open_low=False):
    "A dataclass field that knows what it means and which values are possible."
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices, open_low=open_low))

@dataclass
class TrainConfig:
    "Settings of one stage. The defaults are the sDPO paper's where it names any."
    beta: float = setting(0.1, "strength of the pull to the reference, per nat", 0, open_low=True)
    lr: float = setting(5e-7, "peak learning rate of AdamW", 0, open_low=True)
    batch_size: int = setting(32, "pairs per optimizer step", 1)
    micro_batch: int = setting(4, "pairs per forward pass: memory and speed, not the gradient", 1)
    epochs: int = setting(1, "passes over a chunk per stage", 1)
    warmup: float = setting(0.1, "share of the steps in which the learning rate rises", 0, 1)
    clip: float = setting(1.0, "largest gradient norm", 0, open_low=True)
    label_smoothing: float = setting(0.0, "assumed probability that a label is flipped", 0, 0.499)
    precision: str = setting("auto", "of the forward pass; weights stay fp32", choices=("auto", "bf16", "fp16", "fp32"))
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, more time")
    shuffle: bool = setting(True, "a new order of the chunk in every epoch; off keeps the partition's order")
    seed: int = setting(0, "of the data order", 0)
    save_every: int = setting(50, "optimizer steps between checkpoints", 1)

    def __post_init__(self): check_settings(self)


# %%
#| export
def check_settings(config):
    "Raise ValueError, naming the setting and what would be right, for an impossible value."
    for f in fields(config):
        v, low, high, choices = getattr(config, f.name), *(f.metadata[k] for k in ("low", "high", "choices"))
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(f.type)
        ok = isinstance(v, f.type) if f.type in (bool, str) else isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) and (f.type is float or v == int(v))
        if kind and not ok: raise ValueError(f"{f.name}: must be {kind}, got {v!r}")
        if choices and v not in choices: raise ValueError(f"{f.name}: must be one of {', '.join(choices)}; got {v!r}")
        if low is not None and kind and (v < low or f.metadata["open_low"] and v == low):
            raise ValueError(f"{f.name}: must be {'above' if f.metadata['open_low'] else 'at least'} {low}, got {v}")
        if high is not None and v > high: raise ValueError(f"{f.name}: must be at most {high}, got {v}")


# %%
def complaint(**kw):
    try: TrainConfig(**kw)
    except ValueError as e: return str(e)

[complaint(beta=0), complaint(lr="fast"), complaint(batch_size=2.5), complaint(precision="half")]


# %% [markdown]
# ## What is measured
#
# Metrics are sums over pairs, divided once, at the end; a mean of means would be wrong for them, too. Chosen and rejected are kept apart, since the
# loss only sees their gap: both log-ratios may fall while it goes down.

# %%
#| export
def measure(chosen, rejected,         # (n,) log pi_theta of both responses, nats
            ref_chosen, ref_rejected, # (n,) the same of the reference
            config) -> dict:          # name -> sum over the pairs; `loss` carries the gradient
    "The loss of some pairs and every metric, as sums."
    gamma_theta, gamma_ref = gamma(chosen, rejected), gamma(ref_chosen, ref_rejected)
    loss = dpo_loss(gamma_theta, gamma_ref, config.beta, config.label_smoothing).sum()
    with torch.no_grad():
        up, down = reward(chosen, ref_chosen, config.beta), reward(rejected, ref_rejected, config.beta)
        means = dict(reward_chosen=up, reward_rejected=down, margin=up - down, reward_accuracy=reward_accuracy(gamma_theta, gamma_ref),
                     logratio_chosen=chosen - ref_chosen, logratio_rejected=rejected - ref_rejected, gamma=gamma_theta, gamma_ref=gamma_ref)
        return dict(loss=loss, **{k: v.sum() for k, v in means.items()}, lambda_hist=torch.histc(torch.sigmoid(down - up).float(), 10, 0, 1))


# %% [markdown]
# ## Half precision, full weights
#
# Before computing in bf16, look at what happens to *weights* in bf16. A folder saved in bf16 is loaded in bf16, and an AdamW step of
# $5\cdot10^{-7}$ is smaller than the distance to the next bf16 number: the loss starts at $\ln 2$, everything looks well, and nothing is learned.

# %%
def share_changed(model, steps=10, lr=5e-7):
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(steps):
        dpo_loss(gamma(*response_logprobs(model, batch)), table.gamma(batch), 0.5).mean().backward()
        optimizer.step(); optimizer.zero_grad()
    moved = [(a != b).float().mean().item() for a, b in zip(before, model.parameters())]
    return pd.Series({"weights that moved": sum(m * p.numel() for m, p in zip(moved, before)) / sum(p.numel() for p in before), "tensors that moved": sum(m > 0 for m in moved) / len(moved)})

with tempfile.TemporaryDirectory() as folder:
    load_model(w.base).bfloat16().save_pretrained(folder)
    in_bf16, in_fp32 = load_model(folder).bfloat16(), load_model(folder)
moved = pd.DataFrame({"bf16 weights": share_changed(in_bf16), "fp32 weights": share_changed(in_fp32)})
assert moved.loc["weights that moved", "bf16 weights"] < 0.05 and moved.loc["tensors that moved", "fp32 weights"] == 1
moved.map("{:.1%}".format)


# %% [markdown]
# Hence one rule: trained weights are fp32, whatever the folder says, and only the forward pass runs at half precision, under autocast. Dropout is off, too:
# with it, target and reference would differ before the first step.

# %%
#| export
def trainable(model):
    "fp32 weights, no dropout, train mode; returns the model."
    return freeze_dropout(model.float()).train()


# %% [markdown]
# What autocast costs in accuracy, by hand. fp16 has few exponent bits, so small gradients vanish; the loss is scaled up first and the gradient down
# afterwards. If it overflows, the step is skipped and the scale halved.

# %%
def by_hand(model, batch, precision):
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    model.zero_grad()
    with autocast("cpu", precision): chosen, rejected = response_logprobs(model, batch)
    scaler.scale(dpo_loss(gamma(chosen, rejected), table.gamma(batch), 0.5).mean()).backward()
    return {n: p.grad / scaler.get_scale() for n, p in model.named_parameters()}

rounding = {p: difference(by_hand(policy, batch, p), want) for p in ("fp32", "bf16", "fp16")}
assert rounding["fp32"] < 1e-6 < rounding["fp16"] < rounding["bf16"] < 0.3
pd.Series(rounding, name="relative difference of the gradient").map("{:.1e}".format)


# %% [markdown]
# ## The same, with Accelerate
#
# Accelerate knows the device, owns the scaler, and unscales before clipping. Two traps. It keeps the precision in a process-wide state that must be
# reset to make a second one; and asked for fp16 on a CPU it agrees but makes no scaler, so that the first overflow is final. The model itself is not
# wrapped: Accelerate would turn all logits into fp32.

# %%
#| export
def make_accelerator(precision: str="fp32", # fp32, bf16 or fp16
                    ) -> Accelerator:
    "An Accelerator of this precision; a process may make several, one after the other."
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    if precision == "fp16" and accelerator.scaler is None:
        accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler(accelerator.device.type), True
    if accelerator.num_processes > 1: raise ValueError("sdpo_nb trains in one process so far; start it without a launcher")
    return accelerator


# %%
#| export
def batch_gradients(model, batch: list,   # tokenised pairs of one optimizer batch
                    table: LogprobTable,  # of the reference
                    config: TrainConfig, accelerator: Accelerator,
                    precision: str="fp32",
                    logprobs=response_logprobs, # (model, pairs) -> (chosen, rejected)
                   ) -> dict:             # every metric, as a mean over the batch; lambda_hist as counts
    "Add the gradient of the batch's mean loss to the parameters."
    total = {}
    for part in micro_batches(batch, config.micro_batch):
        with autocast(model.device, precision): chosen, rejected = logprobs(model, part)
        sums = measure(chosen, rejected, *(x.to(chosen.device) for x in table.lookup(part)), config)
        accelerator.backward(sums["loss"] / len(batch))
        for k, v in sums.items(): total[k] = total.get(k, 0) + v.detach()
    return {k: v.tolist() if k == "lambda_hist" else v.item() / len(batch) for k, v in total.items()}


# %%
def with_accelerate(model, batch, precision, **kw):
    accelerator = make_accelerator(precision)
    model.zero_grad()
    metrics = batch_gradients(model, batch, table, TrainConfig(beta=0.5, **kw), accelerator, precision)
    scale = accelerator.scaler.get_scale() if accelerator.scaler else 1.
    return {n: p.grad / scale for n, p in model.named_parameters()}, metrics

got = {(p, m): difference(with_accelerate(policy, batch, p, micro_batch=m)[0], by_hand(policy, batch, p)) for p in ("fp32", "bf16", "fp16") for m in (11, 4)}
assert all(d < (1e-5 if p == "fp32" else 0.3 * rounding[p]) for (p, m), d in got.items())
pd.Series(got, name="relative difference to the version by hand").map("{:.0e}".format).unstack().rename_axis("precision").rename_axis("pairs per forward", axis=1)


# %% [markdown]
# In fp32 the two agree. At half precision what is left is far below the rounding of the table before: the order of a sum and the *shape* of a batch round
# differently, which is [chapter 02's](02_logprobs.ipynb) lesson again, and no error.
#
# ## Gradient checkpointing
#
# Activations kept for the backward pass can be thrown away and computed again. The gradient must stay the same and the bytes that autograd keeps must fall.

# %%
def kept_bytes(model, batch):
    kept = 0
    def pack(x):
        nonlocal kept
        kept += x.numel() * x.element_size()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): g = plain_gradient(model, batch, table)
    return kept, g


# %% [markdown]
# transformers renamed the switch in version 5; older ones know it by the old name.

# %%
#| export
def activation_checkpointing(model, on: bool):
    "Switch gradient checkpointing, not reentrant, on or off; it acts in train mode only."
    new = hasattr(model, "activation_checkpointing_enable")
    if on: (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)({"use_reentrant": False})
    else: (model.activation_checkpointing_disable if new else model.gradient_checkpointing_disable)()


# %%
trainable(policy)
plain, g_plain = kept_bytes(policy, batch)
activation_checkpointing(policy, True)
less, g_less = kept_bytes(policy, batch)
activation_checkpointing(policy, False)
assert difference(g_less, g_plain) < 1e-5 and less < 0.7 * plain
pd.Series({"MB kept": plain / 2**20, "MB kept with checkpointing": less / 2**20}).round(1)

# %% [markdown]
# In a real process: the peak memory of one batch of four real pairs, at most 384 tokens each, with SmolLM2-135M in fp32; each number from a process of its own. (The cell
# is skipped in tests, its output is kept.)

# %%
#| slow
import os, subprocess, sys
program = """
import os, resource, sys, torch
from pathlib import Path
from sdpo_nb.trainer import *
from sdpo_nb.logprobs import load_model, load_tokenizer, score_pairs
from sdpo_nb.preferences import load_pairs, tokenize_pairs
folder = str(Path(os.environ.get("SDPO_MODEL", "~/.cache/sdpo_nb/smollm2-135m-instruct")).expanduser())
data = Path(os.environ.get("SDPO_DATA", "../../shared/data")) / "preferences/ultrafeedback_binarized.jsonl.gz"
model, tok = load_model(folder, "cpu"), load_tokenizer(folder)
batch = [tokenize_pairs(load_pairs(data), tok, "uf", 384, 256, chat=True).pairs[i] for i in range(4)]
table = score_pairs(model, batch, batch_size=1)
activation_checkpointing(trainable(model), sys.argv[1] == "on")
batch_gradients(model, batch, table, TrainConfig(micro_batch=4), make_accelerator(), "fp32")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
peak = {c: float(subprocess.run([sys.executable, "-c", program, c], capture_output=True, text=True, check=True).stdout) for c in ("off", "on")}
assert peak["on"] < peak["off"]
pd.Series(peak, name="peak memory, GiB").rename_axis("checkpointing").round(1)


# %% [markdown]
# ## The order of the data
#
# It comes from a generator seeded by (seed, stage, epoch). Drawing it from the global state would let a logging call, or an extra evaluation, change what is learned.

# %%
#| export
def epoch_order(n: int, # pairs in the chunk
                seed: int, stage: int, epoch: int, shuffle: bool=True) -> list[int]:
    "Row numbers in the order of one epoch."
    if not shuffle: return list(range(n))
    own = int(hashlib.sha256(f"{seed} {stage} {epoch}".encode()).hexdigest()[:15], 16)
    return torch.randperm(n, generator=torch.Generator().manual_seed(own)).tolist()

def all_batches(n: int, config: TrainConfig, stage: int) -> list[tuple[int, list[int]]]: # (epoch, row numbers)
    "Every optimizer batch of a stage; the last one of an epoch may be short."
    return [(e, rows[i:i+config.batch_size]) for e in range(config.epochs)
            for rows in [epoch_order(n, config.seed, stage, e, config.shuffle)] for i in range(0, n, config.batch_size)]


# %%
before = torch.get_rng_state()
b = all_batches(70, TrainConfig(epochs=2), stage=1)
assert torch.equal(torch.get_rng_state(), before) and sorted(sum((r for e, r in b if e == 0), [])) == list(range(70))
assert b == all_batches(70, TrainConfig(epochs=2), 1) != all_batches(70, TrainConfig(epochs=2), 2)
[(e, len(rows), rows[:4]) for e, rows in b]


# %% [markdown]
# ## The schedule
#
# Up in the first tenth of the steps, then straight down; each stage has its own. As a plain function of the step it needs no state that a checkpoint could forget.

# %%
#| export
def learning_rate(step: int,  # optimizer steps made so far
                  total: int, # of the schedule
                  config: TrainConfig) -> float:
    "Linear warm-up over a share of the steps, then linearly towards zero."
    warm = math.ceil(config.warmup * total)
    if step < warm: return config.lr * (step + 1) / warm
    return config.lr * (total - step) / max(1, total - warm)


# %%
lrs = [learning_rate(i, 40, TrainConfig(lr=1e-5)) for i in range(40)]
assert max(lrs) == 1e-5 and lrs.index(max(lrs)) == 3 and 0 < lrs[-1] < 1e-6
fig, ax = plt.subplots(figsize=(5, 2.2))
ax.plot(lrs + lrs, ".-"); ax.axvline(40, color="grey", lw=0.7)
ax.set(xlabel="optimizer step (two stages)", ylabel="learning rate");


# %% [markdown]
# ## One step
#
# Set the rate, add gradients, look at the loss before anything is changed, clip, step. A step that fp16 skips is reported as skipped.

# %%
#| export
def make_optimizer(model, config: TrainConfig, accelerator: Accelerator):
    "AdamW without weight decay. Under fp16 it is not fused: a fused step hides from the scaler that it was skipped."
    adam = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0, fused=accelerator.scaler is None)
    return accelerator.prepare_optimizer(adam)

def one_step(model, batch, table, config, accelerator, optimizer, lr: float, precision="fp32", logprobs=response_logprobs,
             look=lambda loss: None, # sees the loss before the update, may raise
            ) -> dict:               # metrics of the batch
    "One optimizer step."
    for group in optimizer.param_groups: group["lr"] = lr
    metrics = batch_gradients(model, batch, table, config, accelerator, precision, logprobs)
    look(metrics["loss"])
    norm = accelerator.clip_grad_norm_(model.parameters(), config.clip).item()
    optimizer.step(); optimizer.zero_grad()
    return metrics | dict(grad_norm=norm if math.isfinite(norm) else None, lr=lr, skipped=bool(accelerator.optimizer_step_was_skipped))


# %% [markdown]
# ## The first loss knows whether the reference is right
#
# Before the first update the loss must be $\mathbb{E}\,\mathrm{softplus}(-\beta(\gamma_{start} - \gamma_{ref}))$, and both gammas are in tables. When the weights
# hash of the table is the policy's own, both are the same column and the loss must be $\ln 2$; a table of another model, of other tokens, or with a shifted row misses it.

# %%
#| export
def check_first_loss(loss: float,       # of the first batch, before any update
                     gamma_start,       # (n,) of the model that training starts from, nats
                     gamma_ref,         # (n,) of the reference, nats
                     config: TrainConfig,
                     precision: str="fp32",
                    ) -> float:         # the loss that the tables imply
    "Raise ValueError unless the first loss is the implied one: to 1e-4 in fp32, to 0.05 beta at half precision."
    want = dpo_loss(gamma_start, gamma_ref, config.beta, config.label_smoothing).mean().item()
    if not abs(loss - want) <= (1e-4 if precision == "fp32" else 0.05 * config.beta):
        raise ValueError(f"the first loss is {loss:.5f} but the reference table implies {want:.5f}: the table does not belong to this model and these pairs")
    return want


# %% [markdown]
# ## Checkpoints
#
# Everything the next step depends on goes into one file, written under another name and renamed, so that a kill leaves the old one or the new one.

# %%
#| export
def save_checkpoint(folder, model, optimizer, scaler, state: dict):
    "Model, optimizer, scaler and position of a stage, in folder/checkpoint/state.pt."
    path = Path(folder) / "checkpoint"; path.mkdir(parents=True, exist_ok=True)
    torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler and scaler.state_dict(), state=state), path / "state.tmp")
    os.replace(path / "state.tmp", path / "state.pt")

def load_checkpoint(folder, model, optimizer, scaler) -> dict|None:
    "Put the last checkpoint back; returns the position, or None where there is none."
    path = Path(folder) / "checkpoint" / "state.pt"
    if not path.exists(): return None
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(saved["model"]); optimizer.load_state_dict(saved["optimizer"])
    if scaler: scaler.load_state_dict(saved["scaler"])
    return saved["state"]


# %% [markdown]
# The metrics are a file that only grows. On resume it is cut back to the length it had at the checkpoint, so no step appears twice.

# %%
#| export
class MetricsLog:
    "metrics.jsonl: one optimizer step a line."
    def __init__(self, path, size: int=0): # cut back to `size` bytes first
        self.file = open(path, "ab"); self.file.truncate(size)
    def add(self, row: dict): self.file.write((json.dumps(row) + "\n").encode()); self.file.flush()
    @property
    def size(self): return self.file.seek(0, os.SEEK_END)


# %% [markdown]
# ## The stage
#
# What is left is bookkeeping: where to start, when to save, what to say.

# %%
#| export
def train_stage(model,               # causal LM, trained in place
                pairs,               # tokenised pairs of the chunk
                table: LogprobTable, # of the reference, with these pairs
                config: TrainConfig,
                folder,              # metrics.jsonl and checkpoint/; an interrupted stage goes on
                stage: int=1,        # enters the seed of the data order
                start: LogprobTable=None, # of the model as it comes in; None: `table` if it is this model's, else the first batch is scored
                logprobs=response_logprobs, # (model, pairs) -> (chosen, rejected)
                previous=None,       # folder of the stage whose optimizer goes on; None: a new one
                schedule: tuple=None, # (steps before this stage, steps in all); None: this stage alone
               ) -> dict:            # steps, first loss, the loss it had to be, precision
    "Train one stage of DPO against a table of reference log-probabilities."
    Path(folder).mkdir(parents=True, exist_ok=True)
    precision = pick_precision(config.precision, model.device)
    accelerator, batches = make_accelerator(precision), all_batches(len(pairs), config, stage)
    optimizer = _begin(model, config, accelerator, previous)
    state = load_checkpoint(folder, model, optimizer, accelerator.scaler) or dict(batch=0, step=0, log=0, first_loss=None, implied=None)
    log, (done, total) = MetricsLog(Path(folder) / "metrics.jsonl", state["log"]), schedule or (0, len(batches))
    def look(loss):
        if state["batch"] == 0: state.update(first_loss=loss, implied=_implied(loss, model, batch, table, start, config, precision, logprobs))
    for epoch, rows in tqdm(batches[state["batch"]:], initial=state["batch"], total=len(batches), desc=f"stage {stage}", unit="step"):
        batch, clock = [pairs[i] for i in rows], time.perf_counter()
        metrics = one_step(model, batch, table, config, accelerator, optimizer, learning_rate(done + state["step"], total, config), precision, logprobs, look)
        state.update(batch=state["batch"] + 1, step=state["step"] + (not metrics["skipped"]))
        log.add(dict(step=state["step"], epoch=epoch, pairs=len(batch), **metrics, **_speed(batch, clock)))
        if state["batch"] % config.save_every == 0 or state["batch"] == len(batches):
            save_checkpoint(folder, model, optimizer, accelerator.scaler, state | dict(log=log.size))
    activation_checkpointing(model, False); model.eval()
    return dict(steps=state["step"], skipped=len(batches) - state["step"], first_loss=state["first_loss"], implied_first_loss=state["implied"], precision=precision)


# %%
#| export
def _begin(model, config, accelerator, previous):
    "Model and optimizer as the first step needs them."
    trainable(model)
    activation_checkpointing(model, config.gradient_checkpointing)
    optimizer = make_optimizer(model, config, accelerator)
    if previous: optimizer.load_state_dict(torch.load(Path(previous) / "checkpoint" / "state.pt", weights_only=True)["optimizer"])
    return optimizer

def _implied(loss, model, batch, table, start, config, precision, logprobs):
    "The first loss by the tables. Where the table says that it is this very model's, it stands for both sides and implies ln 2."
    if start is None: start = table if table.kind["weights"] == weights_hash(model) else score_pairs(model, batch, precision=precision, logprobs=logprobs)
    return check_first_loss(loss, start.gamma(batch), table.gamma(batch), config, precision)

def _speed(batch, clock):
    "Tokens of the batch, each response with its prompt, and how many went through in a second."
    tokens = sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in batch)
    return dict(tokens=tokens, tokens_per_second=round(tokens / (time.perf_counter() - clock), 1))


# %% [markdown]
# ## The checks, once more
#
# The stage without its refinements (one micro-batch, no warm-up, no clipping) must be the plain loop. It is: the same four losses.

# %%
def run(model, folder=None, use=pairs, **kw):
    kw = dict(beta=0.5, lr=1e-4, batch_size=16, micro_batch=16, precision="fp32") | kw
    with tempfile.TemporaryDirectory() as tmp:
        summary = train_stage(model, use, table, TrainConfig(**{k: v for k, v in kw.items() if k != "logprobs"}), folder or tmp, logprobs=kw.get("logprobs", response_logprobs))
        return summary, pd.read_json(Path(folder or tmp) / "metrics.jsonl", lines=True)

def constant_rate(step, total, config): return config.lr
rate, learning_rate = learning_rate, constant_rate
summary, metrics = run(load_model(w.base), shuffle=False, warmup=0, clip=1e9)
learning_rate = rate
torch.testing.assert_close(metrics["loss"].tolist(), losses, rtol=1e-4, atol=1e-5)
pd.DataFrame({"plain loop": losses, "stage": metrics["loss"]}).round(5)

# %% [markdown]
# A wrong table is caught before the first update. Here chosen and rejected of the reference are swapped.

# %%
wrong = LogprobTable(table.kind, table.rows.rename(columns={"chosen": "rejected", "rejected": "chosen"}))
try:
    with tempfile.TemporaryDirectory() as tmp: train_stage(load_model(w.base), pairs, wrong, TrainConfig(precision="fp32"), tmp)
    message = None
except ValueError as e: message = str(e)
assert "does not belong" in message
message


# %% [markdown]
# A skipped step, on purpose: one batch whose gradient overflows. Neither the step count nor the learning rate may move, and the model must be the one that
# never saw this batch's update.

# %%
def overflow_at(call):
    calls = 0
    def logprobs(model, batch):
        nonlocal calls
        calls += 1
        c, r = response_logprobs(model, batch)
        return (c + (c - c.detach()) * 1e38, r) if calls == call else (c, r)   # same value, gradient beyond any float
    return logprobs

_, metrics = run(load_model(w.base), precision="fp16", logprobs=overflow_at(2))
assert metrics["skipped"].tolist() == [False, True, False, False] and metrics["lr"][1] == metrics["lr"][2] and metrics["step"].tolist() == [1, 1, 2, 3]
metrics[["step", "skipped", "lr", "loss"]].round(6)


# %% [markdown]
# Interrupted and continued, the stage ends in the same bits. The interruption is an exception in the middle of the seventh of eight steps; the last checkpoint is two steps older.

# %%
def stop_at(call):
    calls = 0
    def logprobs(model, batch):
        nonlocal calls
        calls += 1
        if calls == call: raise KeyboardInterrupt
        return response_logprobs(model, batch)
    return logprobs

with tempfile.TemporaryDirectory() as tmp:
    straight, broken, continued = load_model(w.base), load_model(w.base), load_model(w.base)
    run(straight, tmp + "/a", batch_size=8, save_every=2)
    try: run(broken, tmp + "/b", batch_size=8, save_every=2, logprobs=stop_at(7))
    except KeyboardInterrupt: lines = len(Path(tmp + "/b/metrics.jsonl").read_text().splitlines())
    _, m = run(continued, tmp + "/b", batch_size=8, save_every=2)
assert weights_hash(continued) == weights_hash(straight) != weights_hash(broken) and m["step"].tolist() == list(range(1, 9))
dict(straight=weights_hash(straight), continued=weights_hash(continued), lines_when_stopped=lines, lines_in_the_end=len(m))

# %% [markdown]
# ## What training looks like from inside
#
# Each pair's gradient is weighted by $\lambda = \sigma(-\beta\Delta)$: how wrong the policy still is about it. At first every pair has one half. Then most are
# settled, and a few stay wrong. All pairs of one source, four epochs:

# %%
more = tokenize_pairs(load_pairs(w.sources["digest"]), tok, "digest").pairs
table = score_pairs(load_model(w.base), more)
summary, metrics = run(load_model(w.base), use=more, batch_size=32, micro_batch=32, epochs=4)
fig, ax = plt.subplots(figsize=(6, 2.6))
hist = pd.DataFrame(metrics["lambda_hist"].tolist()).div(metrics["pairs"], axis=0).T.iloc[::-1]
sns.heatmap(hist, cmap="viridis", cbar_kws=dict(label="share of the batch"), xticklabels=8, yticklabels=[f"{0.05 + i / 10:.2f}" for i in range(10)][::-1], ax=ax)
ax.set(xlabel="optimizer step", ylabel=r"$\lambda = \sigma(-\beta\Delta)$");

# %% [markdown]
# **What you now have.** `train_stage`, which trains any causal LM against a table, at any precision, and survives being killed. Six lines that it
# agrees with. A first loss that cannot be right by accident.
#
# **Questions to test yourself.** Why does the mean of micro-batch means weigh pairs differently? Why must the scaler be undone before clipping? The
# first loss is $\ln 2$ whenever policy and reference agree: which mistakes does it therefore *not* see? (Try a wrong $\beta$.)
#
# **Try this.** Put `shuffle=False` and feed the pairs sorted by gamma. Give `make_optimizer` weight decay and watch `logratio_chosen`. Make
# `save_every` larger and the interruption earlier.
