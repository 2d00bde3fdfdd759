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
import ctypes, hashlib, json, math, numbers, os, sys, time, zipfile
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

try: import resource
except ImportError: resource = None # Windows

from sdpo_nb.logprobs import Clock, LogprobTable, ahead, autocast, freeze_dropout, gamma, micro_batches, pair_tokens, pairs_hash, pick_precision, prepared, progress, replacing, response_logprobs, same_bits, weights_hash
from sdpo_nb.loss import dpo_loss, follow, reward, reward_accuracy
from sdpo_nb.packing import PARTS, REFUSED, choose_logprobs, compile_layers, flash_plan, of_row, pack, padded_plan, piece_bytes, recompute_alike, try_out

# %%
import copy, tempfile
from importlib.resources import files
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from sdpo_nb.logprobs import load_model, load_tokenizer, score_pairs
from sdpo_nb.packing import packed_logprobs
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
table.rows.head(3).round(3)


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
# loop: at zero margin every $\lambda$ is one half, and a gradient there cannot see how pairs are weighted.

# %%
def plain_gradient(model, batch, table, beta=0.5):
    model.zero_grad()
    dpo_loss(gamma(*response_logprobs(model, batch)), table.gamma(batch), beta).mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}

def difference(a, b): # largest relative difference over all tensors
    return max(((a[n] - b[n]).norm() / b[n].norm()).item() for n in b)

batch = [pairs[i] for i in range(11)]
want = plain_gradient(policy, batch, table)
round(sum(g.norm()**2 for g in want.values()).sqrt().item(), 3)


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
# Since the sum does not care about order, pairs may be cut into micro-batches in any way. `micro_batches` of [chapter 02](02_logprobs.ipynb) fills each up to a budget of tokens.

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
    beta: float = setting(0.1, "strength of the pull to the reference, per nat", 0, 1e6, open_low=True)
    lr: float = setting(5e-7, "peak learning rate of AdamW", 0, 1e3, open_low=True)
    batch_size: int = setting(32, "pairs per optimizer step", 1)
    token_budget: int = setting(0, "tokens per forward pass: memory and speed, not the gradient; 0: what suits the device", 0)
    packing: str = setting("auto", "packed rows where they give the model's own numbers, or off: padded batches", choices=("auto", "off"))
    epochs: int = setting(1, "passes over a chunk per stage", 1, 10_000)
    warmup: float = setting(0.1, "share of the steps in which the learning rate rises", 0, 1)
    clip: float = setting(1.0, "largest gradient norm", 0, open_low=True)
    label_smoothing: float = setting(0.0, "assumed share of flipped labels: the target is 1 minus it", 0, 0.499)
    precision: str = setting("auto", "precision of the forward pass; weights stay fp32", choices=("auto", "bf16", "fp16", "fp32"))
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, more time")
    compile: str = setting("auto", "compile the layers: auto on a graphics card, on, or off", choices=("auto", "on", "off"))
    deterministic: bool = setting(True, "on a graphics card: the same bits every time, for some of the speed")
    shuffle: bool = setting(True, "a new order of the chunk in every epoch; off keeps the partition's order")
    seed: int = setting(0, "seed of the data order", 0, 2**63 - 1)
    save_every: int = setting(50, "optimizer steps between checkpoints", 1)

    def __post_init__(self): check_settings(self)


# %% [markdown]
# A number may come as `4.0` from YAML or as a numpy scalar; whatever fits is stored in the field's own type, or `range`, the seed of the data order and the written
# configuration would each take it in a way of their own.

# %%
#| export
def _fits(v, kind) -> bool:
    "Whether a value is one of this type. A whole number may be written 4.0; a truth value is no number."
    if kind not in (int, float): return isinstance(v, kind)
    if not isinstance(v, numbers.Real) or isinstance(v, bool): return False
    try: return math.isfinite(v) and (kind is float or v == int(v))
    except OverflowError: return False           # a whole number of hundreds of digits

def check_settings(config):
    "Give every value its field's type. Raises ValueError, naming the setting and what would be right, for an impossible one."
    for f in fields(config):
        v, low, high, choices = getattr(config, f.name), *(f.metadata[k] for k in ("low", "high", "choices"))
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(f.type)
        if kind and not _fits(v, f.type): raise ValueError(f"{f.name}: must be {kind}, got {v!r}")
        if choices and v not in choices: raise ValueError(f"{f.name}: must be one of {', '.join(choices)}; got {v!r}")
        if low is not None and (v < low or f.metadata["open_low"] and v == low):
            raise ValueError(f"{f.name}: must be {'above' if f.metadata['open_low'] else 'at least'} {low}, got {v}")
        if high is not None and v > high: raise ValueError(f"{f.name}: must be at most {high}, got {v}")
        if kind: setattr(config, f.name, f.type(v))


# %%
def complaint(**kw):
    try: TrainConfig(**kw)
    except ValueError as e: return str(e)

[complaint(beta=0), complaint(lr="fast"), complaint(batch_size=2.5), complaint(precision="half"), complaint(seed=2**63)]

# %%
assert repr(TrainConfig(batch_size=4.0, seed=0.0, lr=1)) == repr(TrainConfig(batch_size=4, seed=0, lr=1.0))


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
    ref_chosen, ref_rejected = follow(ref_chosen, chosen), follow(ref_rejected, rejected)
    gamma_theta, gamma_ref = gamma(chosen, rejected), gamma(ref_chosen, ref_rejected)
    loss = dpo_loss(gamma_theta, gamma_ref, config.beta, config.label_smoothing).sum()
    with torch.no_grad():
        up, down = reward(chosen, ref_chosen, config.beta), reward(rejected, ref_rejected, config.beta)
        per_pair = dict(reward_chosen=up, reward_rejected=down, margin=up - down, reward_accuracy=reward_accuracy(gamma_theta, gamma_ref),
                        logratio_chosen=chosen - ref_chosen, logratio_rejected=rejected - ref_rejected, gamma=gamma_theta, gamma_ref=gamma_ref)
        tenth = (10 * torch.sigmoid(down - up)).long().clamp(0, 9) # no histogram: a graphics card has no deterministic one
        return dict(loss=loss, **{k: v.sum() for k, v in per_pair.items()}, lambda_hist=F.one_hot(tenth, 10).sum(0).float())


# %% [markdown]
# ## Half precision, full weights
#
# Before computing in bf16, look at what happens to *weights* in bf16. A folder saved in bf16 is loaded in bf16, and an AdamW step of
# $5\cdot10^{-7}$ is smaller than the distance of most of them to the next bf16 number. The loss starts at $\ln 2$, and everything looks well.

# %%
def share_changed(model, steps=10, lr=5e-7):
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(steps):
        dpo_loss(gamma(*response_logprobs(model, batch)), table.gamma(batch), 0.5).mean().backward()
        optimizer.step(); optimizer.zero_grad()
    old, new = (torch.cat([p.detach().flatten().float() for p in ps]) for ps in (before, model.parameters()))
    moved = old != new
    return pd.Series({"share that moved": moved.float().mean().item(), "largest that moved": old[moved].abs().max().item(), "largest of all": old.abs().max().item()})

with tempfile.TemporaryDirectory() as folder:
    load_model(w.base).bfloat16().save_pretrained(folder)
    in_bf16, in_fp32 = load_model(folder).bfloat16(), load_model(folder)
moved = pd.DataFrame({"bf16 weights": share_changed(in_bf16), "fp32 weights": share_changed(in_fp32)})
assert moved.loc["share that moved", "bf16 weights"] < 0.01 < 0.999 < moved.loc["share that moved", "fp32 weights"]
assert moved.loc["largest that moved", "bf16 weights"] < 2.5e-4
moved.map("{:.2g}".format)


# %% [markdown]
# In bf16 only weights up to $2.4\cdot10^{-4}$, 0.5 % of all, could move: their neighbours are near enough. Hence one rule: trained weights are fp32, whatever the folder
# says, and only the forward pass runs at half precision, under autocast. Dropout is off, too: with it, target and reference would differ before the first step.

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
# Accelerate starts the backward pass, clips, and will carry several processes. It also has a precision, but one for the whole process, which a launcher or another trainer may have set; asked for fp16 on a CPU it agrees and makes no scaler, so that the first overflow is final. So the precision stays ours, by hand as above:
# autocast around the forward pass, and PyTorch's own scaler in Accelerate's place for one, which does nothing unless it is fp16. One more trap: every loss is divided by a number of accumulation steps that an environment variable can set, over any argument. The model itself is not wrapped: Accelerate would turn all logits into fp32.
#
# A launcher may start several processes. Without a graphics card Accelerate takes each of them for the only one, and all would write the same files. So we ask the variable by which the launcher tells a process how many there are.

# %%
#| export
def check_one_process():
    "Raise ValueError where a launcher such as torchrun started several processes."
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started > 1: raise ValueError(f"{started} processes were started (WORLD_SIZE), but sdpo_nb trains in one process so far; start it without a launcher")

def make_accelerator(precision: str="fp32", # fp32, bf16 or fp16
                     device: str="cpu",     # of the model
                    ) -> Accelerator:       # its `scaler` works in fp16 only, and passes everything through otherwise
    "An Accelerator whose scaler is ours; a process may make several, one after the other."
    check_one_process()
    accelerator = Accelerator()
    accelerator.gradient_accumulation_steps = 1 # `backward` divides by it, and ACCELERATE_GRADIENT_ACCUMULATION_STEPS is stronger than the argument
    accelerator.scaler = torch.amp.GradScaler(torch.device(device).type, enabled=precision == "fp16")
    return accelerator


# %%
os.environ["WORLD_SIZE"] = "2"
try: make_accelerator()
except ValueError as e: print(e)
finally: del os.environ["WORLD_SIZE"]


# %%
#| export
def batch_gradients(model, batch: list,   # tokenised pairs of one optimizer batch
                    table: LogprobTable,  # of the reference
                    config: TrainConfig, accelerator: Accelerator,
                    precision: str="fp32",
                    logprobs=response_logprobs, # (model, pairs) -> (chosen, rejected)
                    parts: list=None,     # the micro-batches, where they have been made: (pairs, what `logprobs` takes for them)
                   ) -> dict:             # every metric, as a mean over the batch; lambda_hist as counts
    "Add the gradient of the batch's mean loss to the parameters."
    total = {}
    for pairs, inputs in parts or prepared(model, cut(batch, config, logprobs), logprobs):
        with autocast(model.device, precision): chosen, rejected = logprobs(model, inputs)
        sums = measure(chosen, rejected, *table.lookup(pairs), config)
        accelerator.backward(sums["loss"] / len(batch))
        for k, v in sums.items(): total[k] = total.get(k, 0) + v.detach()
    histogram = total.pop("lambda_hist").tolist()
    sums = torch.stack(list(total.values())).tolist()                   # one transfer from a graphics card, not ten
    return {name: value / len(batch) for name, value in zip(total, sums)} | dict(lambda_hist=histogram)

USUAL_BUDGET = 1536 # tokens in a forward pass with gradients, where no setting says otherwise and no graphics card has room for more

def cut(batch: list, config: TrainConfig, logprobs) -> list[list]:
    "Micro-batches of an optimizer batch."
    return micro_batches(batch, config.token_budget or USUAL_BUDGET, logprobs)


# %%
def with_accelerate(model, batch, precision, **kw):
    accelerator = make_accelerator(precision)
    model.zero_grad()
    metrics = batch_gradients(model, batch, table, TrainConfig(beta=0.5, **kw), accelerator, precision)
    return {n: p.grad / accelerator.scaler.get_scale() for n, p in model.named_parameters()}, metrics

got = {(p, m): difference(with_accelerate(policy, batch, p, token_budget=m)[0], by_hand(policy, batch, p)) for p in ("fp32", "bf16", "fp16") for m in (4096, 200)}
assert all(d < (1e-5 if p == "fp32" else 0.3 * rounding[p]) for (p, m), d in got.items())
pd.Series(got, name="relative difference to the version by hand").map("{:.0e}".format).unstack().rename_axis("precision").rename_axis("tokens per forward", axis=1)


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
# Layers must be recomputed with the attention of their forward pass ([chapter 04](04_packing.ipynb)). transformers renamed the switch in version 5; older ones know it by the old name.
#
# On a CPU there is a second half to it. The C library keeps freed memory for the next request, and requests of ever other sizes do not fit into what it kept; the process holds up to twice what the tensors need. Told to, it returns large blocks at once, and a stage on a CPU tells it. That costs nothing that could be measured: six steps of SmolLM2-135M on HH pairs took 0.97 [0.80, 1.04] times as long.

# %%
#| export
def return_large_blocks(size: int=2**20):
    "Let the C library return freed blocks of this many bytes to the system at once; where it is not glibc, nothing happens."
    M_MMAP_THRESHOLD = -3
    try: ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, size)
    except OSError: pass

def activation_checkpointing(model, on: bool):
    "Switch gradient checkpointing, not reentrant, on or off; it acts in train mode only."
    new = hasattr(model, "activation_checkpointing_enable")
    how = {"use_reentrant": False, "context_fn": lambda: recompute_alike(model)}
    if on: (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)(how)
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
batch = list(tokenize_pairs(load_pairs(data), tok, "uf", 384, 256, chat=True).pairs.select(range(4)))
table = score_pairs(model, batch, token_budget=1024)
activation_checkpointing(trainable(model), sys.argv[1] == "on")
return_large_blocks()
batch_gradients(model, batch, table, TrainConfig(token_budget=4096), make_accelerator(), "fp32")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
peak = {c: float(subprocess.run([sys.executable, "-c", program, c], capture_output=True, text=True, check=True).stdout) for c in ("off", "on")}
assert peak["on"] < peak["off"]
pd.Series(peak, name="peak memory, GiB").rename_axis("checkpointing").round(1)

# %% [markdown]
# ## What fits?
#
# Weights, gradients and the two moments of AdamW are four numbers of four bytes for each parameter: 16 bytes, before a single token is read. Activations come on top, and they grow with the tokens of a forward pass. One need not load a model to know how much. PyTorch can run it on *fake tensors*, which have a shape
# and a dtype and no memory; we let it read a row of pairs, and add up what autograd would keep.

# %%
#| export
GIB = 2**30
KERNELS = dict(cpu=lambda row: None, padded=padded_plan, flash=flash_plan) # how a row attends; see chapter 04

def kept_bytes(config,          # of a transformers model
               tokens: int,     # of a packed row: pairs of 256 + 128 + 128
               precision: str="fp32",
               kernel: str="cpu", # cpu, padded or flash
               recompute: bool=False, # gradient checkpointing
              ) -> tuple[int, int]: # parameters, bytes
    "What a forward pass with gradients leaves in memory for the backward pass, counted on fake tensors. Copies of weights in half precision are part of it."
    kept, sizes = [], {}
    def note(x):
        kept.append(x)                           # alive, or its address would be given away again
        sizes[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x
    pair = dict(zip(PARTS, ([1] * 256, [1] * 128, [1] * 128)))
    row = pack([pair] * max(1, tokens // 512))
    row.plan = KERNELS[kernel](row)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
        activation_checkpointing(freeze_dropout(model), recompute)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), autocast("cpu", precision):
            try: of_row(model, row)
            except REFUSED:                      # a model that cannot be packed reads both responses in rows of their own
                kept.clear(), sizes.clear()
                model(input_ids=torch.ones(max(1, tokens // 384), 384, dtype=torch.long), use_cache=False)
        for p in model.parameters(): sizes.pop(p.untyped_storage()._cdata, None)
        return sum(p.numel() for p in model.parameters()), sum(sizes.values())

def memory_plan(config,        # of a transformers model
                train: TrainConfig,
                precision: str="fp32",
                kernel: str="cpu", # how it attends: cpu, padded or flash
                piece: int=None, # bytes of one piece of logits; default: a CPU's
               ) -> dict:      # name -> GiB
    "Memory of a training step, beyond the process itself."
    tokens = train.token_budget or USUAL_BUDGET
    n, kept = kept_bytes(config, tokens, precision, kernel, train.gradient_checkpointing)
    layer = 0                                    # what a recomputed layer keeps while its turn lasts; the logits are gone by then
    if train.gradient_checkpointing: layer = kept_bytes(config, tokens, precision, kernel)[1] / config.get_text_config().num_hidden_layers
    text = config.get_text_config()
    vocabulary = text.vocab_size
    logits = min(4 * vocabulary * tokens // 2, piece or piece_bytes("cpu"))
    output_matrix = 4 * vocabulary * text.hidden_size
    beyond = max(0, layer - 3 * logits - output_matrix)
    found = dict(weights=4 * n, gradients=4 * n, moments=8 * n, activations=kept + beyond, logits=3 * logits, output_gradient=output_matrix)
    return {name: size / GIB for name, size in found.items()}


# %%
from transformers import LlamaConfig
smol_shape = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
plans = {f"{tokens} tokens, {precision}{', recomputed' if again else ''}": memory_plan(smol_shape, TrainConfig(token_budget=tokens, gradient_checkpointing=again), precision)
         for tokens, precision, again in ((2048, "fp32", False), (4096, "fp32", False), (2048, "bf16", False), (2048, "fp32", True))}
plans = pd.DataFrame(plans).T
plans["all"] = plans.sum(axis=1)
assert abs(plans["weights"] - 0.5).max() < 0.01 and plans["all"].iloc[1] > plans["all"].iloc[0] > plans["all"].iloc[2] > plans["all"].iloc[3]
plans.style.format("{:.2f}")

# %% [markdown]
# Is it true? The peak of a fresh process that makes two optimizer steps, beyond what the process holds before it has a model (`make bench`, on a CPU):

# %%
measured = pd.DataFrame(json.loads((files("sdpo_nb.data") / "results/packing.json").read_text())["plan_gib"]).T
measured["planned / measured"] = measured["planned"] / measured["measured"]
assert measured["planned / measured"].between(0.85, 1.15).all()
measured.rename_axis("model, tokens, precision, recomputed").style.format("{:.2f}")

# %% [markdown]
# From it follow the tokens of a forward pass on a graphics card: as many as fit into the part of its memory that the parameters leave, and activations are recomputed where not even the longest pair would. It goes by the card's memory, not by what is free at the moment, so that a run that goes on computes
# as it did before. On a CPU longer passes are no faster: one of 1,536 tokens took 1.01 [0.92, 1.04] times as long for the same pairs as one of 2,048, and a whole run then needs less memory than TRL with one pair at a time ([chapter 04](04_packing.ipynb)).

# %%
#| export
MOST = 65_536 # tokens in a forward pass; more are not faster

def fit(model, pairs, config: TrainConfig, precision: str, logprobs) -> TrainConfig:
    "The config with a token budget, where the card is to choose it; says so where activations must be recomputed for it."
    if config.token_budget or model.device.type != "cuda": return config
    memory = torch.cuda.get_device_properties(model.device).total_memory
    longest = max(sum(len(pairs[i][part]) for part in PARTS) for i in range(min(len(pairs), 256)))
    kernel = "flash" if getattr(logprobs, "attention", "") == "flash" else "padded"
    for recompute in sorted({config.gradient_checkpointing, True}):
        budget = tokens_that_fit(model.config, memory, precision, kernel, recompute)
        if budget >= longest: break
    if recompute and not config.gradient_checkpointing: print(f"activations are recomputed: without that, {memory / GIB:.0f} GiB do not hold the longest pair, {longest} tokens")
    return replace(config, token_budget=max(budget, 1), gradient_checkpointing=recompute)

def tokens_that_fit(config, memory: int, precision: str, kernel: str, recompute: bool=False) -> int:
    "Tokens of a forward pass with gradients that go into this many bytes; in thousands, at most `MOST`."
    def need(tokens): return GIB * sum(memory_plan(config, TrainConfig(token_budget=tokens, gradient_checkpointing=recompute), precision, kernel, memory // 16).values())
    few, many = need(2048), need(4096)
    each = (many - few) / 2048
    room = 0.85 * memory - few
    return min(MOST, max(0, 1024 * int((2048 + room / each) // 1024)))


# %%
cards = {"T4, 15 GB": 15 * 2**30, "H100, 80 GB": 80 * 2**30}
shapes = {"135M": smol_shape, "1.2B": LlamaConfig(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True)}
def row_of(memory, shape, kernel, precision): return {f"{'recomputed' if again else 'kept'}": tokens_that_fit(shape, memory, precision, kernel, again) for again in (False, True)}
fits = pd.DataFrame({(card, name): row_of(memory, shape, *(("flash", "bf16") if "H100" in card else ("padded", "fp16"))) for card, memory in cards.items() for name, shape in shapes.items()}).T
fits


# %% [markdown]
# Zero says that not even the parameters fit: 1.2 billion of them, trained in full, want 20 GB. There the way is LoRA or a smaller model. It is better to know that before an hour of scoring than after it, so a run asks first.

# %%
#| export
def free_memory(device) -> int: # bytes
    "What a process could still have: of a card, or of the machine and its container."
    if torch.device(device).type == "cuda": return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if not limit.exists() or not limit.read_text().strip().isdigit(): return free
    used = int((group / "memory.current").read_text())
    parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    cache = int(parts["inactive_file"]) + int(parts["active_file"]) # files read before; the system drops them when memory is wanted
    return min(free, int(limit.read_text()) - used + cache)

def peak_memory(device) -> int: # bytes
    "The most that this process has had: of a card, or of the machine; 0 where the system does not say."
    if torch.device(device).type == "cuda": return torch.cuda.max_memory_allocated(device)
    if resource is None: return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def plan_for(config,         # of a transformers model
             train: TrainConfig, precision: str, device) -> dict: # name -> GiB
    "The memory plan on this device. On a card that chooses its own token budget, that of the smallest useful one."
    if torch.device(device).type != "cuda": return memory_plan(config, train, precision)
    half = precision != "fp32" and torch.cuda.get_device_capability(device) >= (8, 0)
    memory = torch.cuda.get_device_properties(device).total_memory
    return memory_plan(config, train, precision, "flash" if half else "padded", memory // 16)

def as_line(plan: dict) -> str:
    "A memory plan in words."
    return f"about {sum(plan.values()):.1f} GiB: " + ", ".join(f"{name.replace('_', ' ')} {size:.1f}" for name, size in plan.items())

def check_memory(plan: dict,  # name -> GiB
                 device,
                 loaded: bool=True): # whether the weights are in memory already
    "Raise ValueError for what cannot fit."
    need = sum(plan.values()) - loaded * plan["weights"]
    free = free_memory(device) / GIB
    if need <= free: return
    raise ValueError(f"memory: training needs {as_line(plan)}; {free:.1f} GiB are free on {torch.device(device).type}. Take gradient_checkpointing, a smaller token_budget or a smaller model")


# %%
try: check_memory({name: 1e6 for name in plans.columns[:-1]}, "cpu")
except ValueError as e: print(str(e).split("; ")[0])


# %% [markdown]
# ## Compiled layers
#
# On a graphics card the layers are compiled ([chapter 04](04_packing.ipynb)), unless a setting says otherwise. On a CPU it does not pay, but can be asked for.

# %%
#| export
def wants_compiling(config: TrainConfig, device) -> bool:
    "Whether the layers should be compiled on this device."
    return config.compile == "on" or config.compile == "auto" and torch.device(device).type == "cuda"

def compile_for(model, logprobs, precision: str, config: TrainConfig):
    "Compile the layers of a model once, and say so where it cannot be done."
    if why := compile_layers(model, logprobs, precision, config.gradient_checkpointing): print(f"compile is off: {why}")


# %% [markdown]
# ## The same bits on a card
#
# `same_bits` of [chapter 02](02_logprobs.ipynb) asks every kernel for its deterministic form. Does every operation of *this* model have one? A pass over two short pairs, in the strict form of the switch, finds out before the run begins, and a run writes down what it found. Where all have one, training uses the strict form: in the other, which only warns, the flash kernel still adds its gradients in any order. (Seen on an H200: no gradient came out the same twice.)

# %%
#| export
def why_not_same_bits(model, logprobs, precision: str) -> str|None:
    "Which operation of this model has no deterministic form on its device, or None, as on every CPU."
    if model.device.type != "cuda": return None
    try:
        with same_bits(model.device, strict=True): try_out(model, logprobs, precision)
    except RuntimeError as e:
        if "deterministic" not in str(e): raise
        return str(e).split(". ")[0]


# %%
assert why_not_same_bits(policy.train(), response_logprobs, "fp32") is None  # a CPU always computes the same bits


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
pd.Series({i: lrs[i] for i in (0, 1, 2, 3, 4, 20, 39)}, name="learning rate").rename_axis("step").map("{:.1e}".format)


# %% [markdown]
# ## One step
#
# Set the rate, add gradients, look at the loss before anything is changed, clip, step. A gradient that is not finite must not reach AdamW: one step makes every weight
# NaN, and the next checkpoint keeps them. Under fp16 the scaler skips such a step, which is reported; elsewhere it is an error.

# %%
#| export
def make_optimizer(model, config: TrainConfig):
    "AdamW without weight decay."
    return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)

def one_step(model, batch, table, config, accelerator, optimizer, lr: float, precision="fp32", logprobs=response_logprobs,
             look=lambda batch, loss: None, # sees the loss before the update, may raise
             parts=None,             # as for `batch_gradients`
            ) -> dict:               # metrics of the batch
    "One optimizer step. Raises ValueError where the gradient is not finite and no scaler skips the step."
    for group in optimizer.param_groups: group["lr"] = lr
    metrics = batch_gradients(model, batch, table, config, accelerator, precision, logprobs, parts)
    look(batch, metrics["loss"])
    scaler = accelerator.scaler
    scale = scaler.get_scale()
    scaler.unscale_(optimizer)                   # before clipping, or the norm would be that of the scaled gradient
    norm = accelerator.clip_grad_norm_(model.parameters(), config.clip).item()
    finite = math.isfinite(norm)
    if not finite and not scaler.is_enabled():
        raise ValueError(f"the gradient is not finite in {precision}, the loss is {metrics['loss']:.5g}; no weight was changed. Look at this batch, or lower lr")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return metrics | dict(grad_norm=norm if finite else None, lr=lr, skipped=scaler.get_scale() < scale)


# %% [markdown]
# ## Before the first update
#
# A wrong reference does not raise an error. The loss falls, the model learns something, and nobody knows against what. The first batch is the last moment to notice, since nothing has been changed yet. Two questions can be asked.
#
# **Is the model the same twice?** Score the batch once more, by the same function, in the same micro-batches, without gradients and in eval mode. Shapes are equal, so roundings are equal, and the loss must be the same *exactly*, in any precision. It is not where something in the model is random in training:
# dropout under a name that nobody knew, noise in a router.

# %%
#| export
@torch.no_grad()
def batch_logprobs(model, batch: list, # tokenised pairs of one optimizer batch
                   config: TrainConfig,
                   precision: str="fp32",
                   logprobs=response_logprobs, # (model, pairs) -> (chosen, rejected)
                  ) -> Tensor:         # (n, 2) log-probabilities of chosen and rejected, nats
    "What the model says about a batch, in the micro-batches that it is trained in, in eval mode."
    said, was_training = {}, model.training
    model.eval()
    try:
        for pairs, inputs in prepared(model, cut(batch, config, logprobs), logprobs):
            with autocast(model.device, precision): both = torch.stack(logprobs(model, inputs), 1)
            said |= zip([p["key"] for p in pairs], both.cpu())
    finally: model.train(was_training)
    return torch.stack([said[p["key"]] for p in batch])


# %%
first = [pairs[i] for i in range(16)]
for precision in ("fp32", "bf16"):
    _, metrics = with_accelerate(policy.train(), first, precision)
    said = batch_logprobs(policy, first, TrainConfig(), precision)
    assert abs(dpo_loss(gamma(*said.T), table.gamma(first), 0.5).mean().item() - metrics["loss"]) < 1e-6


# %% [markdown]
# **Is the table this model's?** A table that carries the hash of this model's weights must hold the numbers that the model says. But it was made in batches of another shape, and in half precision that changes every number ([chapter 02](02_logprobs.ipynb)). How far may they be apart? No constant can say it:
# it depends on the model, the precision and the length of the responses. So we measure. How far half precision is from fp32, on these very responses, is one pass away. Errors of tokens are nearly independent, so the error of a response grows with the root of its length, and it is compared
# as nats per root of a token:
#
# $$\sigma^2 = \frac{1}{2n}\sum_{i,\,y} \frac{(\log\pi^{half}(y) - \log\pi^{fp32}(y))^2}{|y|}, \qquad
# d^2 = \frac{1}{2n}\sum_{i,\,y} \frac{(\log\pi^{table}(y) - \log\pi^{half}(y))^2}{|y|}, \qquad d \le 1.25\,\sigma\,\Big(1 + \frac{6}{2n}\Big) \tag{1}$$
#
# Two healthy passes have the rounded weights in common, so they are *nearer* to each other than to fp32. A look takes 32 pairs, if there are as many; the last factor is for fewer, where $\sigma$ itself is a guess.

# %%
#| export
def per_root_token(off: Tensor, # (n, 2) differences of log-probabilities, nats
                   batch: list, # n pairs
                  ) -> float:   # root mean square, nats per root of a token
    "How far log-probabilities are apart, whatever the lengths: equation (1)."
    tokens = torch.tensor([[len(p["chosen_ids"]), len(p["rejected_ids"])] for p in batch])
    return (off.square() / tokens.to(off.device)).mean().sqrt().item()

SLACK = 1.25 # how many times the measured rounding a healthy table may be off; below is measured what healthy and wrong ones are

def rounding_limit(said: Tensor,  # (n, 2) log-probabilities in the precision of training
                   exact: Tensor, # (n, 2) the same in fp32
                   batch: list,
                  ) -> float:     # nats per root of a token
    "How far a healthy table may be from what the model says: equation (1). In fp32, where nothing is rounded but the last digits, a thousandth of a nat and 1e-5 of the number."
    last_digits = per_root_token(1e-3 + 1e-5 * exact.abs(), batch)
    return max(last_digits, SLACK * per_root_token(said - exact, batch) * (1 + 6 / (2 * len(batch))))


# %% [markdown]
# Where the table says that it is another model's, there is nothing to compare it with: a moving reference and a target that starts at S differ, and should. Then `table.kind` says whose it is. And rows that no look falls on are not seen.

# %%
#| export
def check_table(table: LogprobTable, # one that claims to be of this model
                batch: list,
                said: Tensor,        # (n, 2) what the model says about the batch
                limit: float,        # nats per root of a token
                precision: str="fp32",
               ) -> float:           # how far they are apart, nats per root of a token
    "Raise ValueError unless the table holds what the model says."
    off = said - torch.stack(table.lookup(batch), 1)
    apart = per_root_token(off, batch)
    if apart <= limit: return apart
    nats = off.square().mean().sqrt().item()
    raise ValueError(f"the table of reference log-probabilities is {nats:.2g} nats a response from what this model says in {precision}, {apart / limit:.0f} times as far as rounding allows: "
                     "it is of other weights, of other pairs, or was changed. Remove it (in a run, the folder logprobs or reference that holds it) and start again: it is computed anew")


# %% [markdown]
# Does it cry wolf, and does it see the wolf? `make bench-first-look` makes many first looks with SmolLM2-135M-Instruct and real pairs. Two kinds of tables are healthy: the model's own, in rows of another shape, and (stricter than anything that happens in a run) the one that padded batches give. Five kinds are wrong: the weights after
# *one* step of AdamW at $10^{-4}$; the reference of another stage, $M_1$ after an epoch on Orca at $5\cdot10^{-6}$; the numbers of the next pair; chosen and rejected swapped; pairs cut at three quarters. How far is each from what the model says, in units of the limit?

# %%
looks = pd.DataFrame(json.loads((files("sdpo_nb.data") / "results/first_look.json").read_text())["looks"])
called = dict(healthy="its own", padded="its own, padded", M1="another stage", step="one step later", short="cut otherwise", swapped="swapped", others="other pairs")
off = looks.rename(columns=called).melt(["precision", "source", "length", "pairs"], list(called.values()), var_name="table", value_name="off").dropna()
fig, ax = plt.subplots(figsize=(7, 3.4))
sns.stripplot(off.assign(off=off["off"].clip(lower=1e-2)), x="off", y="table", hue="pairs", palette="colorblind", dodge=True, size=2.5, jitter=0.3, ax=ax)
sns.move_legend(ax, "center left", bbox_to_anchor=(1, 0.5), title="pairs in the look", frameon=False)
ax.axvline(1, color="black", lw=1); ax.set_xscale("log")
ax.set(xlabel="distance, in units of the limit (right of the line: stopped)", ylabel=""); sns.despine()

# %%
right = off["table"].isin(["its own", "its own, padded"])
counted = off.assign(stopped=off["off"] > 1).groupby(["table", "precision", "length", "pairs"])["stopped"].agg(["sum", "size"])
counted = counted.apply(lambda r: f"{r['sum']} of {r['size']}", axis=1)
assert not off[right]["off"].gt(1).any() and off[~right & (off["pairs"] == 32)]["off"].gt(1).all()
assert off[~right & (off["table"] != "another stage")]["off"].gt(1).all()
counted.rename("stopped").unstack(["precision", "length", "pairs"]).fillna("").loc[list(called.values())]


# %% [markdown]
# No healthy table is stopped, in none of 327 looks, and with 32 pairs every wrong one is. With eight pairs, which is all that a chunk of eight has, one kind of wrong table can pass: $M_1$ on a source that it was not trained on. One epoch on Orca hardly changed what it says about HH,
# and a table that wrong is wrong by little more than its own rounding. (In a run such a table is refused before, by the hash of its weights.) The factor 1.25 was chosen with 67 other looks in view, at pairs drawn from the same 96 of each source. None of 327 means a rate below 0.9 % (95 %), not zero. Not shown: other models, and half precision on a graphics card; fp16 has few looks, as a CPU has no hardware for it. `make bench-first-look` goes on.

# %%
#| export
def check_same_twice(loss: float,  # of the first batch, in training
                     again: float, # of the same batch, scored once more
                     precision: str="fp32",
                     near: float=1e-4):
    "Raise ValueError unless a batch has the same loss twice. A large beta makes a large loss, whose last digits are larger, too."
    if abs(loss - again) <= near * max(1, abs(again)): return
    raise ValueError(f"the first batch has a loss of {loss:.5f} in training and of {again:.5f} when it is scored once more, both in {precision}: something in this model is random in training mode. Look for dropout or noise in its config")


# %% [markdown]
# ## Checkpoints
#
# Everything the next step depends on goes into one file, which is whole or not there (`replacing`, [chapter 02](02_logprobs.ipynb)), with the hash of the weights.

# %%
#| export
def save_checkpoint(folder, model, optimizer, scaler, state: dict):
    "Model, optimizer, scaler and position of a stage, in folder/checkpoint/state.pt."
    path = Path(folder) / "checkpoint"; path.mkdir(parents=True, exist_ok=True)
    state = state | dict(weights=weights_hash(model))
    all_of_it = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), state=state)
    with replacing(path / "state.pt") as tmp, open(tmp, "xb") as f: torch.save(all_of_it, f) # through a file of Python's, which keeps the system's error


# %% [markdown]
# Disks and copies change bits. PyTorch loads such a file without a word. But the file is a zip archive with a checksum for each tensor, so we can ask, the moments of the optimizer included.

# %%
#| export
def read_checkpoint(folder, # of a stage
                   ) -> dict|None: # model, optimizer, scaler, state; None where there is no checkpoint
    "What a checkpoint holds. Raises ValueError, saying what to do, where it cannot be read or was changed."
    path = Path(folder) / "checkpoint" / "state.pt"
    if not path.exists(): return None
    with _useless(path):
        if damaged := zipfile.ZipFile(path).testzip(): raise ValueError(f"{damaged} in it was changed")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if absent := {"model", "optimizer", "scaler", "state"} - set(saved): raise ValueError(f"it has no {', '.join(sorted(absent))}")
    return saved

@contextmanager
def _useless(path):
    "Any exception means that the checkpoint cannot be used."
    try: yield
    except Exception as e:
        why = str(e).strip().splitlines() or [type(e).__name__]
        end = path.parent.parent / "stage.json"
        also = f" and {end.name} beside its folder" if end.exists() else ""
        raise ValueError(f"{path}: this checkpoint cannot be used ({why[0]}); remove it{also}, and run again: the stage is trained anew, to the same bits") from e


# %% [markdown]
# A checkpoint belongs to one stage. Loaded under another learning rate or with other pairs it would go on as a mixture, or be found finished, and nothing would be
# trained. So it carries what the weights depend on, and refuses anything else. Left out are the settings of how a gradient is computed, and of how often the stage is
# saved.

# %%
#| export
COMPUTED_ALIKE = {"save_every", "token_budget", "packing", "gradient_checkpointing"}

def _identity(pairs, table, config, precision, stage, schedule) -> dict:
    "What the weights of a stage depend on; `precision` is the one that was picked."
    settings = {f.name: getattr(config, f.name) for f in fields(TrainConfig) if f.name not in COMPUTED_ALIKE}
    return settings | dict(precision=precision, pairs=pairs_hash(pairs), reference=table.kind["weights"], stage=stage, schedule=list(schedule))

def load_checkpoint(folder, model, optimizer, scaler, identity: dict=None) -> dict|None:
    "Put the last checkpoint back; returns the position, or None where there is none. Raises ValueError, naming what differs, if it is of another identity."
    saved = read_checkpoint(folder)
    if saved is None: return None
    path, state = Path(folder) / "checkpoint" / "state.pt", saved["state"]
    old = state.get("identity") or {}
    differs = [f"{k} = {old.get(k)}, not {v}" for k, v in (identity or {}).items() if old.get(k) != v]
    if differs: raise ValueError(f"{path}: this stage was started with {'; '.join(differs)}; use that or another folder")
    with _useless(path):
        model.load_state_dict(saved["model"]); optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        if (found := weights_hash(model)) != state.get("weights", found): raise ValueError(f"its weights are {found}, not {state['weights']}")
    return state


# %%
def complaint_of(change): # what is said of a checkpoint after this change of its bytes
    with tempfile.TemporaryDirectory() as tmp:
        save_checkpoint(tmp, policy, torch.optim.AdamW(policy.parameters()), torch.amp.GradScaler("cpu"), dict(batch=3))
        assert read_checkpoint(tmp)["state"] == dict(batch=3, weights=weights_hash(policy))
        path = Path(tmp, "checkpoint/state.pt")
        path.write_bytes(change(path.read_bytes()))
        try: read_checkpoint(tmp)
        except ValueError as e: return str(e).removeprefix(tmp).split(";")[0]

def flip(data): return data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]

[complaint_of(flip), complaint_of(lambda data: data[:1000]), complaint_of(lambda data: b"")]


# %% [markdown]
# The metrics are a file that only grows. On resume it is cut back to the length it had at the checkpoint, so no step appears twice.

# %%
#| export
class MetricsLog:
    "metrics.jsonl: one optimizer step a line."
    def __init__(self, path, size: int=0): # cut back to `size` bytes first
        if Path(path).is_symlink(): raise ValueError(f"{path}: is a link, which a run does not write through; remove it")
        self.file = open(path, "ab")
        if (found := self.size) < size: self.close(); raise ValueError(f"{path}: {found} bytes, but {size} at the checkpoint; lines were lost, use another folder")
        self.file.truncate(size)
    def add(self, row: dict): self.file.write((json.dumps(row) + "\n").encode()); self.file.flush()
    @property
    def size(self): return self.file.seek(0, os.SEEK_END)
    def close(self): self.file.close()


# %% [markdown]
# ## The stage
#
# What is left is bookkeeping: where to start, when to save, what to say. `previous` and `schedule` serve [chapter 09](09_stepwise.ipynb), where one optimizer may span
# stages.

# %%
#| export
def train_stage(model,               # causal LM, trained in place
                pairs,               # tokenised pairs of the chunk
                table: LogprobTable, # of the reference, with these pairs
                config: TrainConfig,
                folder,              # metrics.jsonl and checkpoint/; an interrupted stage goes on
                stage: int=1,        # enters the seed of the data order
                start: LogprobTable=None, # of the model as it comes in; None: `table`, if it is this model's
                logprobs=None,       # (model, pairs) -> (chosen, rejected); None: packed where `config.packing` allows and the guard agrees
                previous=None,       # folder of the stage whose optimizer goes on; None: a new one
                schedule: tuple=None, # (steps before this stage, steps in all); None: this stage alone
                clock: Clock=None,   # of the run; None: of this stage
                on_step=None,        # called after each step, with its line of metrics.jsonl as a dict
               ) -> dict:            # steps, first loss, the loss it had to be, precision
    "Train one stage of DPO against a table of reference log-probabilities. Raises ValueError for a folder of another stage, a wrong first loss or a gradient that is not finite."
    if not len(pairs): raise ValueError("pairs: none; a stage needs at least one")
    folder = Path(folder); folder.mkdir(parents=True, exist_ok=True)
    precision, batches = pick_precision(config.precision, model.device), all_batches(len(pairs), config, stage)
    done, total = schedule or (0, len(batches))
    logprobs = logprobs or choose_logprobs(model, [pairs[i] for i in batches[0][1]], config.packing, precision)
    identity = _identity(pairs, table, config, precision, stage, (done, total))
    config = fit(model, pairs, config, precision, logprobs)
    accelerator = make_accelerator(precision, model.device)
    optimizer = _begin(model, config, accelerator, previous, logprobs, precision)
    state = dict(identity=identity, batch=0, step=0, skips=0, log=0, first_loss=None, implied=None)
    state = load_checkpoint(folder, model, optimizer, accelerator.scaler, identity) or state
    def look(batch, loss):
        if state["batch"] == 0: state.update(first_loss=loss, implied=_first_look(loss, model, batch, pairs, table, start, config, precision, logprobs))
    def step(batch, parts, lr): return one_step(model, batch, table, config, accelerator, optimizer, lr, precision, logprobs, look, parts)
    def ready(epoch_rows): # made while the batch before it is computed
        batch = [pairs[i] for i in epoch_rows[1]]
        return epoch_rows[0], batch, list(prepared(model, cut(batch, config, logprobs), logprobs))
    todo, tokens = batches[state["batch"]:], TRAINING * pair_tokens(pairs)
    todo_tokens = sum(tokens[rows].sum() for _, rows in todo)
    if clock: clock.skip(config.epochs * tokens.sum() - todo_tokens)
    else: clock = Clock(todo_tokens)
    strict = config.deterministic and why_not_same_bits(model.train(), logprobs, precision) is None # the flash kernel is deterministic in the strict form only
    bar = progress(len(batches), f"stage {stage}", "step", state["batch"], leave=True)
    with bar, closing(MetricsLog(folder / "metrics.jsonl", state["log"])) as log, same_bits(model.device, config.deterministic, strict):
        for epoch, batch, parts in ahead(ready, todo):
            row = _advance(state, step, batch, parts, epoch, learning_rate(done + state["step"], total, config), log, clock)
            bar.set_postfix_str(f"loss {row['loss']:.3f}, accuracy {row['reward_accuracy']:.2f}, margin {row['margin']:+.2f}, lr {row['lr']:.1e}, {clock}", refresh=False)
            bar.update()
            if on_step: on_step(row)
            if state["batch"] % config.save_every == 0 or state["batch"] == len(batches):
                save_checkpoint(folder, model, optimizer, accelerator.scaler, state | dict(log=log.size))
    activation_checkpointing(model, False); model.eval()
    return dict(steps=state["step"], skipped=len(batches) - state["step"], first_loss=state["first_loss"], implied_first_loss=state["implied"], precision=precision)


# %% [markdown]
# A few skipped steps are the scaler looking for its scale. It halves it each time, from $2^{16}$; after twenty in a row the scale is not the reason.

# %%
#| export
MAX_SKIPS = 20
TRAINING = 3 # times as long as a forward pass alone: the backward pass computes two products for each of its one

def _advance(state, step, batch, parts, epoch, lr, log, clock):
    "Train on one batch, count it, write its line; returns the line."
    start = time.perf_counter()
    metrics = step(batch, parts, lr)
    seconds, skipped = time.perf_counter() - start, metrics["skipped"]
    clock.tick(TRAINING * pair_tokens(batch).sum(), seconds)
    state.update(batch=state["batch"] + 1, step=state["step"] + (not skipped), skips=state["skips"] + 1 if skipped else 0)
    row = dict(step=state["step"], epoch=epoch, pairs=len(batch), **metrics, **_speed(batch, seconds))
    log.add(row)
    if state["skips"] == MAX_SKIPS:
        raise ValueError(f"{MAX_SKIPS} steps in a row were skipped, the loss is {metrics['loss']:.5g}: no scale makes the gradient finite; use bf16 or fp32")
    return row

def _speed(batch, seconds):
    "Tokens of the batch, each response with its prompt, and how many went through in a second."
    tokens = sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in batch)
    return dict(tokens=tokens, tokens_per_second=round(tokens / seconds, 1))


# %%
#| export
def _begin(model, config, accelerator, previous, logprobs, precision):
    "Model and optimizer as the first step needs them. Gradients that an interrupted call left behind go."
    trainable(model).zero_grad()
    activation_checkpointing(model, config.gradient_checkpointing)
    if model.device.type == "cpu": return_large_blocks()
    if wants_compiling(config, model.device): compile_for(model, logprobs, precision, config)
    optimizer = make_optimizer(model, config)
    if previous:
        saved = read_checkpoint(previous)
        if saved is None: raise ValueError(f"{previous}: its checkpoint is missing, whose optimizer was to go on; put it back or use another folder")
        optimizer.load_state_dict(saved["optimizer"])
        accelerator.scaler.load_state_dict(saved["scaler"])
    return optimizer

LOOK_AT = 32 # pairs; with fewer, rounding can only be guessed at

def _first_look(loss, model, batch, pairs, table, start, config, precision, logprobs):
    "Both checks; returns the first loss by the tables. A small batch borrows pairs from the chunk for the second one."
    said = batch_logprobs(model, batch, config, precision, logprobs)
    own = start or (table if table.kind["weights"] == weights_hash(model) else None)
    again, gamma_ref = gamma(*said.T), table.gamma(batch)
    def implied(gamma_start): return dpo_loss(gamma_start, gamma_ref, config.beta, config.label_smoothing).mean().item()
    more = batch if len(batch) >= LOOK_AT else [pairs[i] for i in range(min(LOOK_AT, len(pairs)))]
    if more is not batch: said = batch_logprobs(model, more, config, precision, logprobs)
    exact = said if precision == "fp32" else batch_logprobs(model, more, config, "fp32", getattr(logprobs, "exact", logprobs))
    limit = rounding_limit(said, exact, more)
    check_same_twice(loss, implied(again), precision, _near(limit, batch, config, precision, model.device))
    if own is None: return implied(again)
    check_table(own, more, said, limit, precision)
    return implied(own.gamma(batch))

def _near(limit, batch, config, precision, device):
    "How near two losses must be. Two compiled graphs, with gradients and without, round half precision each in its own way."
    if precision == "fp32" or not wants_compiling(config, device): return 1e-4
    tokens = [len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in batch]
    return 1e-4 + config.beta * limit * (sum(tokens) / len(tokens)) ** 0.5


# %% [markdown]
# ## The checks, once more
#
# The stage without its refinements (one micro-batch, no warm-up, no clipping) must be the plain loop. It is: the same four losses.

# %%
def run(model, table, folder=None, use=pairs, **kw):
    kw = dict(beta=0.5, lr=1e-4, batch_size=16, precision="fp32") | kw
    with tempfile.TemporaryDirectory() as tmp:
        summary = train_stage(model, use, table, TrainConfig(**{k: v for k, v in kw.items() if k != "logprobs"}), folder or tmp, logprobs=kw.get("logprobs"))
        return summary, pd.read_json(Path(folder or tmp) / "metrics.jsonl", lines=True)

def constant_rate(step, total, config): return config.lr
rate, learning_rate = learning_rate, constant_rate
summary, metrics = run(load_model(w.base), table, shuffle=False, warmup=0, clip=1e9)
learning_rate = rate
torch.testing.assert_close(metrics["loss"].tolist(), losses, rtol=1e-4, atol=1e-5)
pd.DataFrame({"plain loop": losses, "stage": metrics["loss"]}).round(5)

# %% [markdown]
# A wrong table that claims to be this model's is caught before the first update. Here chosen and rejected of the reference are swapped. Under another hash the same
# numbers pass: they might well be another model's. If you meant this model, read `kind`, or notice that the first loss is not $\ln 2$.

# %%
swapped = table.rows.rename(columns={"chosen": "rejected", "rejected": "chosen"})
try: message = run(load_model(w.base), LogprobTable(table.kind, swapped))
except ValueError as e: message = str(e)
passed, _ = run(load_model(w.base), LogprobTable(table.kind | dict(weights="another"), swapped))
assert "other weights" in message and abs(passed["first_loss"] - math.log(2)) > 0.05
{"hash of this model": message, "another hash": {k: round(passed[k], 5) for k in ("first_loss", "implied_first_loss")}}


# %% [markdown]
# A skipped step, on purpose: one batch whose gradient overflows. Neither the step count nor the learning rate may move, and the third batch must meet the weights that
# the second one met.

# %%
def overflow_at(call):
    def logprobs(model, batch):
        c, r = response_logprobs(model, batch)
        if not model.training: return c, r                       # the first look
        logprobs.met.append(weights_hash(model))
        return (c + (c - c.detach()) * 1e38, r) if len(logprobs.met) == call else (c, r)   # same value, gradient beyond any float
    logprobs.met = []
    return logprobs

overflow = overflow_at(2)
_, metrics = run(load_model(w.base), table, precision="fp16", logprobs=overflow)
assert metrics["skipped"].tolist() == [False, True, False, False] and metrics["lr"][1] == metrics["lr"][2] and metrics["step"].tolist() == [1, 1, 2, 3]
assert [a == b for a, b in zip(overflow.met, overflow.met[1:])] == [False, True, False]
metrics[["step", "skipped", "lr", "loss"]].round(5).assign(weights=overflow.met)


# %% [markdown]
# Interrupted and continued, the stage ends in the same bits. The interruption is an exception in the middle of the eighth of eight steps. The last checkpoint is of
# the sixth, so one finished step is lost and made again, and its line must not appear twice. Asked to go on with another learning rate, the folder refuses.

# %%
def stop_at(call):
    calls = 0
    def logprobs(model, batch):
        nonlocal calls
        calls += model.training          # not those of the first look
        if calls == call: raise KeyboardInterrupt
        return packed_logprobs(model, batch)
    return logprobs

with tempfile.TemporaryDirectory() as tmp:
    straight, broken, continued = load_model(w.base), load_model(w.base), load_model(w.base)
    run(straight, table, tmp + "/a", batch_size=8, save_every=2)
    try: run(broken, table, tmp + "/b", batch_size=8, save_every=2, logprobs=stop_at(8))
    except KeyboardInterrupt: lines = len(Path(tmp + "/b/metrics.jsonl").read_text().splitlines())
    _, m = run(continued, table, tmp + "/b", batch_size=8, save_every=2)
    try: run(load_model(w.base), table, tmp + "/b", batch_size=8, lr=2e-4)
    except ValueError as e: refusal = str(e).split(": ", 1)[1]
assert weights_hash(continued) == weights_hash(straight) != weights_hash(broken) and lines == 7 and m["step"].tolist() == list(range(1, 9))
dict(straight=weights_hash(straight), continued=weights_hash(continued), lines_when_stopped=lines, lines_in_the_end=len(m), other_lr=refusal)

# %% [markdown]
# ## What training looks like from inside
#
# Each pair's gradient is weighted by $\lambda = \sigma(-\beta\Delta)$: how wrong the policy still is about it. At first every pair has one half. All pairs of one
# source, four epochs, white lines between them:

# %%
more = tokenize_pairs(load_pairs(w.sources["digest"]), tok, "digest").pairs
summary, metrics = run(load_model(w.base), score_pairs(load_model(w.base), more), use=more, batch_size=32, epochs=4)
counts = pd.DataFrame(metrics["lambda_hist"].tolist())   # ten bins of lambda, one step a row
fig, ax = plt.subplots(figsize=(6, 2.8))
sns.heatmap(counts.div(metrics["pairs"], axis=0).T, vmax=0.4, cmap="viridis", cbar_kws=dict(label="share of the batch", extend="max"), ax=ax)
for step in metrics.index[metrics["epoch"].diff() == 1]: ax.axvline(step, color="white", lw=1.2)
steps, edges = range(0, len(metrics) + 1, 8), range(0, 11, 2)
ax.set_xticks(steps, steps, rotation=0); ax.set_yticks(edges, [i / 10 for i in edges], rotation=0); ax.invert_yaxis()
ax.set(xlabel="optimizer step", ylabel=r"$\lambda = \sigma(-\beta\Delta)$");

# %%
last = counts[metrics["epoch"] == 3].sum() / metrics["pairs"][metrics["epoch"] == 3].sum()
shares = pd.Series({"below 0.3": last[:3].sum(), "0.3 to 0.5": last[3:5].sum(), "above 0.5": last[5:].sum()}, name="share of the pairs, last epoch").rename_axis("lambda")
assert shares["below 0.3"] > 0.6 and 0 < shares["above 0.5"] < 0.15
shares.round(2)

# %% [markdown]
# Most pairs are settled and hardly pull any more. A few, 8 %, stand above one half: the policy prefers their chosen response *less* than the reference does. A mean loss
# that falls does not speak for every pair.
#
# ## What you now have
#
# - `train_stage`, which trains any causal LM against a table, at any precision, and survives being killed. Without its refinements it is six lines, and agrees with them.
# - A folder that belongs to one stage, and refuses other settings, pairs or another reference.
# - A look at the first batch, before anything is changed: the model must say the same twice, and a table that claims to be this model's must hold what it says, as near as rounding allows.
# - `memory_plan`, which knows what fits before a weight is loaded.
#
# ## Questions to test yourself
#
# 1. Why does the mean of micro-batch means weigh pairs differently?
# 2. Why must the scaler be undone before clipping?
# 3. The first look passes. Which mistakes in the reference does it *not* see, and which wrong $\beta$? Where would you look for them?
# 4. Why may a folder go on with another `save_every`, but not with another `precision`?
#
# ## Try this
#
# - Put `shuffle=False` and feed the pairs sorted by gamma.
# - Give `make_optimizer` weight decay and watch `logratio_chosen`.
# - Make `save_every` larger and the interruption earlier. From which step does the stage go on?
