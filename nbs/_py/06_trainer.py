# %% [markdown]
# # One stage of DPO
# > A plain loop, then accumulation, mixed precision, checkpointing, a schedule, metrics and exact resume; each step equal to the one before.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/06_trainer.ipynb)

# %%
#| default_exp trainer

# %%
#| export
import hashlib, json, math, os, time
from dataclasses import dataclass, field, fields, asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from tqdm.auto import tqdm

from sdpo_nb.logprobs import LogprobTable, autocast, freeze_dropout, pick_precision, response_logprobs, score_pairs, weights_hash, write_json
from sdpo_nb.loss import dpo_loss, reward, reward_accuracy


# %% [markdown]
# ## Settings

# %%
#| export
def setting(default, help, low=None, high=None, choices=None, open_low=False):
    "A dataclass field that knows its help text and its range."
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices, open_low=open_low))

@dataclass
class TrainConfig:
    "Settings of one stage. The defaults are the paper's where it names any."
    beta: float = setting(0.1, "strength of the pull to the reference, per nat", 0, open_low=True)
    lr: float = setting(5e-7, "peak learning rate of AdamW", 0, open_low=True)
    batch_size: int = setting(32, "pairs per optimizer step", 1)
    micro_batch: int = setting(4, "pairs per forward pass; changes memory and speed, not the gradient", 1)
    epochs: int = setting(1, "passes over a chunk per stage", 1)
    warmup: float = setting(0.1, "share of the steps in which the learning rate rises", 0, 1)
    clip: float = setting(1.0, "largest gradient norm", 0, open_low=True)
    label_smoothing: float = setting(0.0, "probability that a label is flipped", 0, 0.499)
    precision: str = setting("auto", "of the forward pass; weights stay fp32", choices=("auto", "bf16", "fp16", "fp32"))
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, more time")
    shuffle: bool = setting(True, "new order of a chunk in every epoch; off keeps the order of the partition")
    seed: int = setting(0, "of the data order", 0)
    save_every: int = setting(50, "optimizer steps between checkpoints", 1)

    def __post_init__(self): check_settings(self)


# %%
#| export
def check_settings(config):
    "Raise ValueError, naming the setting, for a value that is impossible."
    for f in fields(config):
        m, v = f.metadata, getattr(config, f.name)
        if f.type in (int, float) and (isinstance(v, bool) or not isinstance(v, (int, float)) or (f.type is int and v != int(v)) or not math.isfinite(v)):
            raise ValueError(f"{f.name}: expected {'a whole number' if f.type is int else 'a number'}, got {v!r}")
        if m.get("choices") and v not in m["choices"]: raise ValueError(f"{f.name}: {v!r} is none of {', '.join(map(str, m['choices']))}")
        if m.get("low") is not None and (v < m["low"] or (m["open_low"] and v == m["low"])):
            raise ValueError(f"{f.name}: must be {'above' if m['open_low'] else 'at least'} {m['low']}, got {v}")
        if m.get("high") is not None and v > m["high"]: raise ValueError(f"{f.name}: must be at most {m['high']}, got {v}")


# %% [markdown]
# ## Order of the data

# %%
#| export
def epoch_order(n: int,     # pairs in the chunk
                seed: int, stage: int, epoch: int,
                shuffle: bool=True,
               ) -> list[int]:
    "The order of one epoch: from a generator of its own, never from the global state."
    if not shuffle: return list(range(n))
    own = int(hashlib.sha256(f"{seed} {stage} {epoch}".encode()).hexdigest()[:15], 16)
    return torch.randperm(n, generator=torch.Generator().manual_seed(own)).tolist()

def all_batches(n, config, stage): # -> list of (epoch, row numbers)
    return [(e, rows[i:i+config.batch_size]) for e in range(config.epochs)
            for rows in [epoch_order(n, config.seed, stage, e, config.shuffle)] for i in range(0, n, config.batch_size)]

def learning_rate(step: int, total: int, config) -> float:
    "Linear warm-up over the first share of the steps, then linearly to zero."
    warm = math.ceil(config.warmup * total)
    return config.lr * ((step + 1) / (warm + 1) if step < warm else (total - step) / max(1, total - warm))


# %% [markdown]
# ## One optimizer batch

# %%
#| export
def micro_batches(batch: list, size: int): # pairs of like length together, so that little is padded
    by_length = sorted(batch, key=lambda p: -len(p["prompt_ids"]) - max(len(p["chosen_ids"]), len(p["rejected_ids"])))
    return [by_length[i:i+size] for i in range(0, len(by_length), size)]


# %%
#| export
def measure(chosen, rejected, ref_chosen, ref_rejected, config) -> dict: # sums over pairs, as tensors
    "The loss of a micro-batch and every metric, as sums, to be divided once by the pairs of the optimizer batch."
    gamma_theta, gamma_ref = chosen - rejected, ref_chosen - ref_rejected
    sums = dict(loss=dpo_loss(gamma_theta, gamma_ref, config.beta, config.label_smoothing).sum())
    with torch.no_grad():
        delta = config.beta * (gamma_theta - gamma_ref)
        up, down = reward(chosen, ref_chosen, config.beta), reward(rejected, ref_rejected, config.beta)
        sums |= {k: v.sum() for k, v in dict(reward_chosen=up, reward_rejected=down, margin=up - down, gamma=gamma_theta, gamma_ref=gamma_ref,
            reward_accuracy=reward_accuracy(gamma_theta, gamma_ref), logratio_chosen=chosen - ref_chosen, logratio_rejected=rejected - ref_rejected).items()}
        sums["lambda_hist"] = torch.histc(torch.sigmoid(-delta), 10, 0, 1)
    return sums


# %%
#| export
def batch_gradients(model, batch: list, table: LogprobTable, config, accelerator, logprobs=response_logprobs) -> dict: # means over the batch
    "Accumulate the gradient of the mean loss of an optimizer batch; returns the batch's metrics."
    total = {}
    for part in micro_batches(batch, config.micro_batch):
        with autocast(model.device, accelerator.mixed_precision if accelerator.mixed_precision != "no" else "fp32"):
            chosen, rejected = logprobs(model, part)
        ref_chosen, ref_rejected = (x.to(chosen.device) for x in table.lookup(part))
        sums = measure(chosen, rejected, ref_chosen, ref_rejected, config)
        accelerator.backward(sums["loss"] / len(batch))
        for k, v in sums.items(): total[k] = total.get(k, 0) + v.detach()
    return {k: v.tolist() if k == "lambda_hist" else (v / len(batch)).item() for k, v in total.items()}


# %% [markdown]
# ## Checkpoints

# %%
#| export
def save_checkpoint(folder, model, optimizer, scaler, state: dict):
    "Everything the next step depends on, in one file, under a temporary name and then renamed."
    path = Path(folder) / "checkpoint"; path.mkdir(parents=True, exist_ok=True)
    what = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict() if scaler else None, state=state)
    torch.save(what, path / "state.tmp"); os.replace(path / "state.tmp", path / "state.pt")

def load_checkpoint(folder, model, optimizer, scaler):
    "Put the last checkpoint back; returns its state, or None where there is none."
    path = Path(folder) / "checkpoint" / "state.pt"
    if not path.exists(): return None
    what = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(what["model"]); optimizer.load_state_dict(what["optimizer"])
    if scaler: scaler.load_state_dict(what["scaler"])
    return what["state"]


# %% [markdown]
# ## The stage

# %%
#| export
def make_accelerator(precision="fp32") -> Accelerator:
    "An Accelerator of this precision; one process may make several, one after another."
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision)

def make_optimizer(model, config, accelerator):
    fused = accelerator.mixed_precision != "fp16"    # a fused step hides from the scaler that it was skipped
    return accelerator.prepare_optimizer(torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0, fused=fused))

def trainable(model):
    "Master weights in fp32, no dropout, train mode, no cache."
    return freeze_dropout(model.float()).train()


# %%
#| export
class ReferenceError_(ValueError):
    "The first loss is not the one that the reference table implies."

def check_first_loss(loss, gamma_start, gamma_ref, config, precision):
    "Before the first update the loss must be E softplus(-beta (gamma_start - gamma_ref)); raises ReferenceError_."
    want = dpo_loss(gamma_start, gamma_ref, config.beta, config.label_smoothing).mean().item()
    tolerance = 1e-4 if precision == "fp32" else 0.05 * config.beta
    if not abs(loss - want) <= tolerance:
        raise ReferenceError_(f"first loss {loss:.6f}, but the reference table implies {want:.6f}: the table does not belong to this model and these pairs")
    return want


# %%
#| export
def train_stage(model,              # causal LM; trained in place
                pairs,              # tokenised pairs of the chunk
                table: LogprobTable,# of the reference, for these pairs
                config: TrainConfig,
                folder,             # metrics.jsonl and checkpoint/ go here; an interrupted stage continues
                stage: int=1,       # enters the seed of the data order
                start: LogprobTable=None, # of the model as it comes in; None: scored for the first batch
                logprobs=response_logprobs, # (model, pairs) -> (chosen, rejected)
                previous=None,      # folder of the stage whose optimizer goes on here; None: a new optimizer
                schedule=None,      # (steps done before this stage, steps of the schedule); None: this stage's own
               ) -> dict:           # summary of the stage
    "One stage of DPO against a table."
    folder = Path(folder); folder.mkdir(parents=True, exist_ok=True)
    precision = pick_precision(config.precision, model.device)
    accelerator = make_accelerator(precision)
    trainable(model)
    if config.gradient_checkpointing: model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(model, config, accelerator)
    if previous: optimizer.load_state_dict(torch.load(Path(previous) / "optimizer.pt", weights_only=True))
    batches = all_batches(len(pairs), config, stage)
    before, total = schedule or (0, len(batches))
    state = load_checkpoint(folder, model, optimizer, accelerator.scaler) or dict(batch=0, step=0, bytes=0, first_loss=None, expected=None)
    log = open_log(folder / "metrics.jsonl", state["bytes"])
    bar = tqdm(total=len(batches), initial=state["batch"], desc=f"stage {stage}", unit="step")
    for number in range(state["batch"], len(batches)):
        epoch, rows = batches[number]
        batch, began = [pairs[i] for i in rows], time.perf_counter()
        for group in optimizer.param_groups: group["lr"] = learning_rate(before + state["step"], total, config)
        metrics = batch_gradients(model, batch, table, config, accelerator, logprobs)
        if number == 0: state |= first_loss(model, batch, metrics["loss"], table, start, config, precision, logprobs)
        norm = accelerator.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step(); optimizer.zero_grad()
        skipped = bool(accelerator.optimizer_step_was_skipped)
        state |= dict(batch=number + 1, step=state["step"] + (not skipped))
        tokens = sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in batch)
        write_line(log, dict(step=state["step"], epoch=epoch, pairs=len(batch), **metrics, grad_norm=norm.item(), skipped=skipped,
            lr=optimizer.param_groups[0]["lr"], tokens=tokens, tokens_per_second=round(tokens / (time.perf_counter() - began), 1)))
        bar.set_postfix(loss=f"{metrics['loss']:.4f}", accuracy=f"{metrics['reward_accuracy']:.2f}"); bar.update()
        if state["step"] % config.save_every == 0 or number + 1 == len(batches):
            save_checkpoint(folder, model, optimizer, accelerator.scaler, state | dict(bytes=log.tell()))
    bar.close(); log.close()
    if config.gradient_checkpointing: model.gradient_checkpointing_disable()
    model.eval()
    return dict(steps=state["step"], batches=len(batches), first_loss=state["first_loss"], expected_first_loss=state["expected"], precision=precision)


# %%
#| export
def first_loss(model, batch, loss, table, start, config, precision, logprobs):
    "Compare the first loss with the one that the tables imply; part of the stage's state."
    if start is None: start = score_pairs(model, batch, precision=precision, logprobs=logprobs)
    want = check_first_loss(loss, start.gamma(batch), table.gamma(batch), config, precision)
    return dict(first_loss=loss, expected=want)

def open_log(path, size):
    "metrics.jsonl, cut back to the checkpoint."
    log = open(path, "ab"); log.truncate(size); log.seek(size)
    return log

def write_line(log, row): log.write((json.dumps(row) + "\n").encode()); log.flush()
