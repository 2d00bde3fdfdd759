# %% [markdown]
# # LoRA
# > Two thin matrices beside each weight are trained, and the weight is not: where they go, what a stage saves of them, and what they save.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/09_lora.ipynb)
#
# **You should know** how [a stage is trained](06_trainer.ipynb) against a table, and what [packing](04_packing.ipynb) does. **Time** forty minutes to read with its code, half a minute to run.
#
# A model that is trained in full needs 16 bytes for each of its parameters: the weight, its gradient, and two moments of AdamW. The last three are 12 of the 16. LoRA ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)) does without nearly all of them. The weights stay as they are. Beside each matrix it puts two thin ones, the *adapter*, and only these are trained.
#
# The library [PEFT](https://github.com/huggingface/peft) does the work. This chapter answers four questions that it leaves open for stepwise DPO:
#
# 1. What is an adapter, and why is the first loss of a stage still $\ln 2$?
# 2. Does [packing](04_packing.ipynb) still give the right numbers?
# 3. What is $M_t$, when all that a stage trains is an adapter?
# 4. What does it save, in memory and in time?

# %%
#| default_exp lora

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    source = '"sdpo_nb[peft] @ git+https://github.com/sdpo-nb/sdpo_nb@v0.1.0"'
    get_ipython().run_line_magic("pip", f"install -q {source}")
again = "On Colab, choose Runtime > Disconnect and delete runtime, then run this cell again."
assert importlib.util.find_spec("sdpo_nb"), f"pip could not install sdpo_nb, see above. {again}"

import sdpo_nb
version = sdpo_nb.__version__
assert version == "0.1.0", f"This page is made for sdpo_nb 0.1.0, and {version} is installed. {again}"

# %%
#| export
import copy, hashlib, json, math, warnings
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from sdpo_nb.packing import uncompile

# %%
import shutil, tempfile
from importlib.resources import files
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from sdpo_nb.logprobs import gamma, load_model, load_tokenizer, response_logprobs, score_pairs, weights_hash
from sdpo_nb.packing import choose_logprobs, packed_logprobs
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.trainer import TrainConfig, train_stage, trained_weights
from sdpo_nb.world import complaint, load_world

torch.set_num_threads(1)

# %% [markdown]
# ## One layer
#
# Take one matrix of S, the model of the [tiny world](00_world.ipynb): the query projection of its first layer.

# %%
w, tmp = load_world(), Path(tempfile.mkdtemp())
S, tok = load_model(w.base, "cpu"), load_tokenizer(w.base)
layer = S.model.layers[0].self_attn.q_proj
layer

# %% [markdown]
# Call the matrix $W$. It has $m$ rows, one for each output, and $n$ columns, one for each input. LoRA puts $A$, with $r$ rows and $n$ columns, and $B$, with $m$ rows and $r$ columns, beside it:
#
# $$W x + \frac{\alpha}{r}\, B A\, x \;=\; \Bigl(W + \frac{\alpha}{r}\, B A\Bigr)\, x. \tag{1}$$
#
# Here $x$ is the input of the layer. $r$ is the *rank*, a small number such as 16. $\alpha$ is a constant that says how much the adapter counts. The left side is how an adapted layer computes. The right side says that the adapter can be *merged*: added to the weight, and then it is gone.

# %%
m, n = layer.weight.shape
r, alpha = 4, 8
generator = torch.Generator().manual_seed(0)
A, B, x = (torch.randn(shape, generator=generator) for shape in ((r, n), (m, r), (n,)))

W = layer.weight.detach()
beside = W @ x + alpha / r * (B @ (A @ x))
merged = (W + alpha / r * B @ A) @ x
assert_close(beside, merged, rtol=1e-4, atol=1e-3)             # (1)
(beside - merged).abs().max().item()

# %% [markdown]
# The two differ by rounding. How many numbers are trained?
#
# $$r\,(m + n) \quad\text{instead of}\quad m\,n. \tag{2}$$

# %%
adapter, weight = A.numel() + B.numel(), W.numel()
assert adapter == r * (m + n)                                   # (2)
assert weight == m * n
{"in the adapter": adapter, "in W": weight, "share": f"{adapter / weight:.1%}"}

# %% [markdown]
# This $W$ is tiny. In a model of seven billion parameters a matrix has 4,096 rows and columns, and an adapter of rank 16 has 0.8 % of its numbers.
#
# ## Which layers?
#
# Every linear layer may carry an adapter. PEFT takes `all-linear`, or a list of names: `q_proj` means the layer of that name in every block. A run has these settings, which [chapter 12](12_plan.ipynb) checks:

# %%
settings = SimpleNamespace(lora_r=4, lora_alpha=0, lora_targets="all-linear", seed=0)


# %% [markdown]
# `lora_alpha=0` stands for $\alpha = 2r$, which many people take. What can go wrong is a name. PEFT ignores a name that fits no layer, as long as another one fits. And many models use *one* matrix as input embedding and as output layer: an adapter on the output layer, merged, would change both. `target_layers` raises an error for either.

# %%
#| export
def target_layers(
    model,        # causal LM without adapters
    targets: str, # all-linear: all but the output layer; or names of layers, with commas between them
) -> dict:        # name -> layer
    """The layers that get an adapter.

    Raises ValueError for a name that no linear layer has, and for an output layer that is also
    the embedding."""
    linear = {name: m for name, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
    if targets == "all-linear":
        return {name: m for name, m in linear.items() if m is not model.get_output_embeddings()}
    wanted = _names(targets)
    for name in wanted:
        if not any(_fits(layer, name) for layer in linear):
            known = sorted({layer.split(".")[-1] for layer in linear})
            raise ValueError(f"lora_targets: no linear layer is called {name!r}; "
                             f"this model has {', '.join(known)}")
    found = {layer: m for layer, m in linear.items() if any(_fits(layer, name) for name in wanted)}
    if _tied_head(model) in found.values():
        raise ValueError("lora_targets: the output layer of this model is also its embedding, "
                         "and an adapter would change both when it is merged; leave it out")
    return found

def _tied_head(model):
    "The output layer, if its matrix is also the input embedding."
    head = model.get_output_embeddings()
    return head if head is not None and head.weight is model.get_input_embeddings().weight else None

def _names(targets): return [name.strip() for name in targets.split(",")]

def _fits(layer, name):
    "What PEFT means by a name: the whole name of a layer, or its end."
    return layer == name or layer.endswith(f".{name}")


# %%
print({targets: len(target_layers(S, targets)) for targets in ("all-linear", "q_proj, v_proj")})
for targets in ("q_proj,w_proj", "lm_head"): print(complaint(target_layers, S, targets))


# %% [markdown]
# The numbers of all adapters, by (2), before any of them is made:

# %%
#| export
def adapter_size(
    model,    # causal LM without adapters
    settings, # has lora_r, lora_targets
) -> int:
    "How many numbers the adapters of a model have, equation (2). Raises ValueError as `target_layers` does."
    layers = target_layers(model, settings.lora_targets).values()
    return sum(settings.lora_r * sum(layer.weight.shape) for layer in layers)


# %%
size = adapter_size(S, settings)
print(f"{size:,} of {S.num_parameters():,} parameters: {size / S.num_parameters():.0%}")


# %% [markdown]
# ## Put it on
#
# PEFT puts adapters into the model *in place*: the class of the model stays the same, so everything that reads it goes on working. Two things are ours.
#
# **The draw.** $A$ begins at random. In a run that is killed and goes on, stage 2 must begin with the same $A$, whatever the process has drawn before. So it comes from a generator of its own, made from the seed and the number of the stage, as [the order of the data](06_trainer.ipynb) does. PEFT's own draw, from the global generator, is undone.
#
# **The compiled layers.** A layer that [was compiled](06_trainer.ipynb) without an adapter is another layer now.

# %%
#| export
def _peft():
    "The library PEFT. Raises ValueError, saying how to get it, where it is not installed."
    try: import peft
    except ImportError as e:
        raise ValueError("lora_r: adapters need the library PEFT; pip install 'sdpo_nb[peft]'") from e
    return peft

def lora_config(
    settings, # has lora_r, lora_alpha, lora_targets
):            # a LoraConfig of PEFT; None where lora_r is 0
    "What PEFT must know. There is no dropout: a policy is scored and trained without any."
    if not settings.lora_r: return None
    targets = settings.lora_targets
    return _peft().LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_r,
        target_modules=targets if targets == "all-linear" else _names(targets),
        task_type="CAUSAL_LM",
    )

def add_adapter(
    model,        # causal LM without adapters; it is changed
    settings,     # has lora_r, lora_alpha, lora_targets, seed
    stage: int=1, # enters the draw of A
):                # the same model; only its adapters are trained
    "Put new adapters into a model, in place. Raises ValueError as `target_layers` does."
    target_layers(model, settings.lora_targets)
    config = lora_config(settings)
    uncompile(model)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        _peft().inject_adapter_in_model(config, model)
    _draw(model, settings.seed, stage)
    return model

@torch.no_grad()
def _draw(model, seed, stage):
    "A as PyTorch draws a linear layer, B zero."
    digits = hashlib.sha256(f"lora {seed} {stage}".encode()).hexdigest()[:15]
    generator = torch.Generator().manual_seed(int(digits, 16))
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            drawn = torch.empty(weight.shape)
            torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            weight.copy_(drawn)
        if "lora_B" in name: weight.zero_()


# %%
def fresh(stage=1, **changes):
    return add_adapter(load_model(w.base, "cpu"), SimpleNamespace(**vars(settings) | changes), stage)

before = torch.get_rng_state()
policy = fresh()
assert torch.equal(torch.get_rng_state(), before)
assert type(policy) is type(S)
assert sum(p.numel() for p in trained_weights(policy)) == size
assert weights_hash(policy) == weights_hash(fresh())
assert weights_hash(policy) != weights_hash(fresh(stage=2))
policy.model.layers[0].self_attn.q_proj

# %% [markdown]
# ## Why does B begin at zero?
#
# The first loss of a stage must be $\ln 2$: the policy begins as its own reference ([chapter 03](03_loss.ipynb)). With $B = 0$ equation (1) adds nothing, so the policy says what it said without the adapter, to the bit. Could $A$ be zero as well? Look at the gradients before you read on:

# %%
pairs = list(tokenize_pairs(load_pairs(w.sources["digest"]), tok, "digest").pairs.select(range(24)))
chosen, rejected = response_logprobs(policy, pairs[:8])
assert_close(torch.stack([chosen, rejected]), torch.stack(response_logprobs(S, pairs[:8])), rtol=0, atol=0)

loss = -torch.nn.functional.logsigmoid(chosen - rejected - gamma(chosen, rejected).detach()).mean()
loss.backward()
first = policy.model.layers[0].self_attn.q_proj
A, B = first.lora_A["default"].weight, first.lora_B["default"].weight
print(f"loss {loss.item():.4f}; gradient of A {A.grad.norm().item():.2g}, of B {B.grad.norm().item():.2g}")


# %% [markdown]
# $A$ has no gradient in the first step, because $B$ is zero in front of it. If both were zero, neither would ever move. So one of them is drawn, and the other one begins at zero.
#
# ## The same numbers, packed
#
# Packing ([chapter 04](04_packing.ipynb)) calls the decoder and the output layer by itself. An adapter inside the decoder does not notice. Values and gradients must be those of padded batches; we let every $B$ be different from zero, or the check would see nothing.

# %%
def moved(model, size=0.05):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trained_weights(model): p.add_(size * torch.randn(p.shape, generator=generator))
    return model

def values_and_gradients(model, logprobs):
    chosen, rejected = logprobs(model, pairs[:8])
    gradients = torch.autograd.grad((chosen - rejected).sum(), trained_weights(model))
    return torch.cat([chosen, rejected]).detach(), torch.cat([g.flatten() for g in gradients])

policy = moved(fresh())
padded, its_slope = values_and_gradients(policy, response_logprobs)
packed, slope = values_and_gradients(policy, packed_logprobs)
apart = (packed - padded).abs().max().item()
slopes_apart = ((slope - its_slope).norm() / its_slope.norm()).item()
assert apart < 1e-4
assert slopes_apart < 1e-5
assert choose_logprobs(policy, pairs) is packed_logprobs
print(f"values at most {apart:.1g} nats apart; gradients {slopes_apart:.1g} of their length")

# %% [markdown]
# An adapter on the *output layer* is another matter: packing calls that layer by itself, and in half precision it reads the layer's own weight, without what lies beside it. The guard of chapter 04 trusts a plain layer only, and takes padded batches. (Our S shares that layer with its embedding, so here is a model that does not.)

# %%
shape = S.config.to_dict() | dict(tie_word_embeddings=False)
untied = LlamaForCausalLM(LlamaConfig(**shape)).eval()
add_adapter(untied, SimpleNamespace(**vars(settings) | dict(lora_targets="q_proj,lm_head")))
choose_logprobs(untied, pairs).__name__

# %% [markdown]
# ## A stage
#
# `train_stage` of [chapter 06](06_trainer.ipynb) trains whatever wants a gradient, against a table. Nothing in it is new: the table of S is the reference, and no adapter is ever "switched off" to play that part.

# %%
config = TrainConfig(lr=5e-3, beta=0.3, batch_size=8, precision="fp32")
table = score_pairs(S, pairs)
policy = fresh()
one = train_stage(policy, pairs, table, config, tmp / "one", start=table)
assert abs(one["first_loss"] - math.log(2)) < 1e-6
{name: one[name] for name in ("steps", "first_loss")}

# %% [markdown]
# The checkpoint holds the adapter and its moments, and of the weights beneath only the hash. How large is it, beside one of full training?

# %%
whole = load_model(w.base, "cpu")
train_stage(whole, pairs, table, config, tmp / "whole")

def kilobytes(path): return round(path.stat().st_size / 1000)
sizes = {name: kilobytes(tmp / name / "checkpoint/state.pt") for name in ("one", "whole")}
assert sizes["one"] < 0.2 * sizes["whole"]
sizes


# %% [markdown]
# ## On disk
#
# PEFT keeps an adapter as two files: `adapter_config.json` says what it is, `adapter_model.safetensors` holds the matrices. Who has S and these files has the model. We read and write the same two files.

# %%
#| export
@dataclass
class Adapter:
    "An adapter as it lies on disk."
    r: int        # rank
    alpha: float  # the scale is alpha / r
    targets: list # names of layers
    state: dict   # name of a matrix -> fp32 tensor, on the CPU

    @property
    def scale(self) -> float: return self.alpha / self.r

    def layers(self) -> dict: # name of a layer -> (A, B)
        "The two matrices of each layer."
        found, end = {}, ".lora_A.weight"
        for name, A in self.state.items():
            if not name.endswith(end): continue
            layer = name.removesuffix(end)
            found[layer] = A, self.state[f"{layer}.lora_B.weight"]
        return found

def adapter_of(
    model, # with adapters
) -> Adapter:
    "The adapter that a model carries, copied."
    config = model.peft_config["default"]
    state = {}
    for name, weight in model.named_parameters():
        if ".lora_" in name: state[name.replace(".default", "")] = weight.detach().cpu().clone()
    return Adapter(config.r, config.lora_alpha, sorted(config.target_modules), state)


# %%
first = adapter_of(policy)
A, B = first.layers()["model.layers.0.self_attn.q_proj"]
first.r, first.alpha, len(first.layers()), tuple(A.shape), tuple(B.shape)

# %%
#| export
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model." # of every name in PEFT's file

def write_adapter(
    adapter: Adapter,
    folder,             # that exists
    base: str=None,     # folder or hub id of the model that it belongs on
    revision: str=None, # of a hub id
):
    "The two files of PEFT."
    config = _peft().LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        target_modules=adapter.targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
    )
    config.save_pretrained(folder)
    state = {PREFIX + name: tensor.contiguous() for name, tensor in adapter.state.items()}
    save_file(state, Path(folder) / WEIGHTS_FILE, metadata=dict(format="pt"))

def is_adapter(
    folder, # a path
) -> bool:
    "Whether a folder holds an adapter, and not a whole model."
    return (Path(folder) / CONFIG_FILE).exists()

TAKEN = ["r", "lora_alpha", "target_modules"]
HARMLESS = [ # of a LoraConfig: changes no number here
    "task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "fan_in_fan_out", "lora_dropout", "runtime_config", "megatron_core",
]
SEEN = [ # of one on disk: what it did shows in the matrices, or it is a detail of something that is off
    "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "qalora_group_size",
]
AS_IT_WAS = [True, False, "gaussian", "orthogonal"] # `init_lora_weights` that leave the weight beneath as it is

def read_adapter(
    folder, # with the two files
) -> Adapter:
    "What `write_adapter`, or PEFT, wrote. Raises ValueError for an adapter that is not as in (1)."
    config = json.loads((Path(folder) / CONFIG_FILE).read_text())
    state = load_file(Path(folder) / WEIGHTS_FILE)
    state = {name.removeprefix(PREFIX): tensor.float() for name, tensor in state.items()}
    _check_read(config, state)
    targets = config["target_modules"]
    targets = [targets] if isinstance(targets, str) else sorted(targets)
    return Adapter(config["r"], config["lora_alpha"], targets, state)

def _check_read(config, state):
    merged = "merge it with PEFT's merge_and_unload(), and give the merged model"
    kind = config.get("peft_type")
    if kind != "LORA": raise ValueError(f"adapter: it is of {kind}, and only LoRA is known here; {merged}")
    for name, value in config.items():
        if name in TAKEN + HARMLESS + SEEN or not value: continue
        if name == "init_lora_weights" and value in AS_IT_WAS: continue
        raise ValueError(f"adapter: {CONFIG_FILE} has {name} = {value!r}, which is not known here; {merged}")
    if not state: raise ValueError(f"adapter: {WEIGHTS_FILE} holds nothing")
    for name, tensor in state.items():
        if not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ValueError(f"adapter: {WEIGHTS_FILE} holds {name}, which is no matrix of (1); {merged}")
        rank = tensor.shape[0 if "lora_A" in name else 1]
        if rank != config["r"]: raise ValueError(f"adapter: {name} is of rank {rank}, not {config['r']}")


# %% [markdown]
# Does PEFT agree? It puts the files on S, and must answer as our policy does:

# %%
def says(model): return torch.stack(response_logprobs(model, pairs)).detach()
near = dict(rtol=1e-5, atol=1e-4) # nats: what rounding in fp32 does

(tmp / "adapter").mkdir()
write_adapter(first, tmp / "adapter", w.base)
theirs = PeftModel.from_pretrained(load_model(w.base, "cpu"), tmp / "adapter").eval()
back = read_adapter(tmp / "adapter")
assert all(torch.equal(back.state[name], tensor) for name, tensor in first.state.items())
assert_close(says(theirs), says(policy), **near)
sorted(p.name for p in (tmp / "adapter").iterdir())

# %% [markdown]
# PEFT knows many more ways than (1): scales of another form, matrices that are decomposed, layers that are trained in full. Their files look much the same. In the file of *rank-stabilised* LoRA even the matrices have the same names and shapes, and only the scale is another one, $\alpha/\sqrt r$. Read as plain LoRA it would be a wrong model, and nothing would say so. So whatever we would drop is refused by its name. The cure is to let PEFT merge what PEFT has made.

# %%
rooted = get_peft_model(load_model(w.base, "cpu"), LoraConfig(r=4, target_modules=["q_proj"], use_rslora=True))
rooted.save_pretrained(tmp / "rooted")
print(complaint(read_adapter, tmp / "rooted"))


# %% [markdown]
# ## Merge
#
# The right side of (1). One line of care: a [hash of the weights](02_logprobs.ipynb) says which model this is, and a run may go on on another machine. There, a product of matrices is added up in another order, and differs in its last bits. So the product is computed in double precision, and rounded once, at the end. Then two machines nearly always agree: only a weight whose double-precision value lies within its own last bits of a rounding border could still be rounded to the other side.

# %%
#| export
@torch.no_grad()
def merge_adapter(
    model,            # the one that the adapter belongs on; it is changed
    adapter: Adapter,
):                    # the same model, plain
    "Add an adapter to the weights: the right side of (1). Raises ValueError where it does not fit the model."
    tied = _tied_head(model)
    for name, (A, B) in adapter.layers().items():
        layer = _layer(model, name)
        if layer is tied:
            raise ValueError(f"adapter: {name} is also the embedding of this model, and would change both when it "
                             "is merged; no plain model does the same")
        change = adapter.scale * (B.double() @ A.double())
        if isinstance(layer, Conv1D): change = change.T       # it keeps its matrix the other way round
        if change.shape != layer.weight.shape:
            raise ValueError(f"adapter: {name} is {tuple(layer.weight.shape)} in this model, "
                             f"and {tuple(change.shape)} in the adapter; it belongs on another model")
        layer.weight.copy_(layer.weight.double() + change.to(layer.weight.device))
    return model

def _layer(model, name):
    try: return model.get_submodule(name)
    except AttributeError as e:
        raise ValueError(f"adapter: this model has no layer {name}; it belongs on another model") from e


# %%
M_1 = merge_adapter(load_model(w.base, "cpu"), first)
theirs = theirs.merge_and_unload()
off = max((a - b).abs().max().item() for a, b in zip(M_1.parameters(), theirs.parameters()))
assert off < 1e-6
assert_close(says(M_1), says(policy), **near)
print(f"weights at most {off:.1g} from those of PEFT's merge_and_unload")

# %% [markdown]
# Some adapters cannot be merged. PEFT puts one on the output layer of S, with a warning, though this layer is also the embedding. Beside the layer it changes what comes out. Merged, it would also change what goes in, and that is another model:

# %%
with warnings.catch_warnings(action="ignore"):
    on_head = get_peft_model(load_model(w.base, "cpu"), LoraConfig(r=4, target_modules=["lm_head"]))
on_head.save_pretrained(tmp / "head", save_embedding_layers=False)
print(complaint(merge_adapter, load_model(w.base, "cpu"), read_adapter(tmp / "head")))


# %% [markdown]
# $M_1$ is an ordinary model again, of the ordinary class. It can be scored, packed, hashed, and be the reference of stage 2.
#
# ## Two stages
#
# What is $M_2$? There are two ways to go on, and both are settings of a run:
#
# - **merge** (the default): stage 2 puts a *new* adapter on $M_1$, the merged model. Each stage has $r$ new directions of its own.
# - **same**: the adapter of stage 1 goes on, on S. All stages share $r$ directions.
#
# In the first way, what should stage 2 save? Its own adapter belongs on $M_1$, and a folder that holds only this one is a trap: who puts it on S gets a model that never was. So the stage saves an adapter that does what both do together. Put $A_2$ under $A_1$ and $B_2$ beside $B_1$; then the product adds up:
#
# $$\begin{pmatrix} B_1 & B_2 \end{pmatrix} \begin{pmatrix} A_1 \\ A_2 \end{pmatrix} = B_1 A_1 + B_2 A_2. \tag{3}$$
#
# Its rank is $2r$. With $2\alpha$ in the place of $\alpha$ its scale stays $\alpha / r$.

# %%
#| export
def join_adapters(
    first: Adapter,  # of the stages before
    second: Adapter, # of a new stage, on the model that the first was merged into
) -> Adapter:        # of higher rank, on the model that the first belongs on
    """One adapter that does what two do one after the other: equation (3).

    Raises ValueError for unequal scales or layers."""
    if first.scale != second.scale or first.targets != second.targets:
        raise ValueError("adapter: these two have other scales or other layers, and cannot be joined")
    state = {}
    for name, tensor in first.state.items():
        dim = 0 if "lora_A" in name else 1
        state[name] = torch.cat([tensor, second.state[name]], dim)
    return Adapter(first.r + second.r, first.alpha + second.alpha, first.targets, state)


# %%
table_1 = score_pairs(M_1, pairs)
policy = add_adapter(merge_adapter(load_model(w.base, "cpu"), first), settings, stage=2)
two = train_stage(policy, pairs, table_1, config, tmp / "two", stage=2, start=table_1)
assert abs(two["first_loss"] - math.log(2)) < 1e-6

both = join_adapters(first, adapter_of(policy))
M_2 = merge_adapter(load_model(w.base, "cpu"), both)           # (3)
assert_close(says(M_2), says(policy), **near)
{"first loss": round(two["first_loss"], 4), "rank": both.r, "alpha": both.alpha}

# %% [markdown]
# The first loss is $\ln 2$ again, because the reference is the table that $M_1$ wrote. And now the trap, so that you have seen it. We put the adapter of stage 2 alone on S:

# %%
trap = merge_adapter(load_model(w.base, "cpu"), adapter_of(policy))
off = (says(trap) - says(M_2)).square().mean().sqrt().item()
assert off > 0.1
print(f"{off:.2f} nats a response from M_2")


# %% [markdown]
# So this is the definition: **$M_t$ is S with the adapter of `stage-t/model` merged into it.** A stage that has ended builds its model in this way, from the disk, in a run that lives as in a run that goes on after a kill. So both have the same bits.
#
# With *same*, stage 2 begins with the adapter of stage 1:

# %%
#| export
@torch.no_grad()
def put_back(
    model,            # the one that the adapter belongs on; it is changed
    adapter: Adapter, # one that goes on
    settings,         # has lora_r, lora_alpha, lora_targets, seed: those that the adapter was made with
):                    # the same model; only the adapter is trained
    "Put an adapter on a model as it was, to be trained further."
    add_adapter(model, settings)
    for name, weight in model.named_parameters():
        if ".lora_" in name: weight.copy_(adapter.state[name.replace(".default", "")])
    return model


# %%
policy = put_back(load_model(w.base, "cpu"), first, settings)
on = train_stage(policy, pairs, table_1, config, tmp / "same", stage=2, start=table_1)
assert abs(on["first_loss"] - math.log(2)) < 1e-5
{"first loss": round(on["first_loss"], 4), "rank": adapter_of(policy).r}


# %% [markdown]
# ## A model that somebody has wrapped
#
# Users of PEFT come with a model that carries an adapter already: `get_peft_model(model, LoraConfig(...))`. If the adapter is fresh, it says two things, which model is S and what the settings are, and no more. So both are read off it. The model of the user stays as it is: S is made of the same tensors in new modules.
#
# Here, too, every field of a `LoraConfig` that is not at its default, and that we would drop without a word, is refused by its name. So is a layer that can have no adapter here. And an adapter that has been trained is a model of its own: merge it first, and that is S.

# %%
#| export
def is_wrapped(
    model, # anything
) -> bool:
    "Whether this is a model in PEFT's wrapping."
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")

def unwrapped(
    model,         # what `get_peft_model` returns, with a fresh adapter; it is not changed
) -> tuple:        # S, plain, with the same tensors; settings: lora_r, lora_alpha, lora_targets
    "What a wrapped model asks for. Raises ValueError for what cannot be had here, naming it."
    _check_wrapped(model)
    config = model.peft_config[model.active_adapter]
    dropout = config.lora_dropout
    if dropout: print(f"lora_dropout = {dropout} is not used: a policy is trained without dropout")
    plain = _without(model)
    carry = {name for name, m in model.get_base_model().named_modules() if hasattr(m, "base_layer")}
    every = carry == set(target_layers(plain, "all-linear"))
    targets = "all-linear" if every else ",".join(sorted(config.target_modules))
    odd = carry ^ set(target_layers(plain, targets))
    if odd: raise ValueError(f"model: {sorted(odd)[0]} cannot have its adapter here; leave it out of target_modules")
    return plain, dict(lora_r=config.r, lora_alpha=config.lora_alpha, lora_targets=targets)

def _check_wrapped(model):
    peft = _peft()
    if len(model.peft_config) != 1:
        raise ValueError(f"model: has {len(model.peft_config)} adapters; give a model with one fresh adapter")
    config = model.peft_config[model.active_adapter]
    if type(config) is not peft.LoraConfig:
        raise ValueError(f"model: its adapter is of {type(config).__name__}, and only LoRA is known here; "
                         "merge it first, or take a LoraConfig")
    usual = peft.LoraConfig()
    for f in fields(config):
        if f.name in TAKEN + HARMLESS: continue
        value = getattr(config, f.name)
        if value != getattr(usual, f.name):
            raise ValueError(f"model: its LoraConfig has {f.name} = {value!r}, which is not known here; "
                             "leave it out")
    if isinstance(config.target_modules, str):
        raise ValueError(f"model: target_modules = {config.target_modules!r} is a pattern; "
                         "give a list of names")
    if any(p.any() for name, p in model.named_parameters() if "lora_B" in name):
        raise ValueError("model: its adapter has been trained; merge it first: merge_and_unload(), "
                         "and give lora_r for a new one")

def _without(model):
    "The model inside, in new modules that hold the same tensors."
    shared = {id(p): torch.nn.Parameter(p.detach()) for p in model.parameters()}
    shared |= {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, shared).unload()


# %%
def wrapped(**changes):
    asked = dict(r=4, target_modules=["q_proj", "v_proj"]) | changes
    return get_peft_model(load_model(w.base, "cpu"), LoraConfig(**asked))

user = wrapped()
plain, asked = unwrapped(user)
assert weights_hash(plain) == weights_hash(S)
assert type(plain) is type(S)
assert all(p.requires_grad for p in plain.parameters())
assert isinstance(user, PeftModel) and len(user.peft_config) == 1
asked

# %% [markdown]
# What is refused:

# %%
for changes in (dict(use_dora=True), dict(use_rslora=True), dict(bias="all")):
    print(complaint(unwrapped, wrapped(**changes)))
print(complaint(unwrapped, moved(wrapped())))
print(complaint(unwrapped, wrapped(target_modules=["q_proj", "embed_tokens"])))

# %% [markdown]
# ## In a run
#
# All of this happens by itself when a run has `lora_r`. We borrow the call of [chapter 14](14_stepwise.ipynb), for two stages of forty pairs:

# %%
from sdpo_nb.stepwise import StepwiseConfig, sdpo

few = {name: dict(source=w.sources[name], max_pairs=40) for name in ("primer", "riddle")}
adapted = dict(lora_r=4, lr=5e-3, beta=0.3, batch_size=8, precision="fp32", max_length=64, save_every=1)
run = sdpo(w.base, few, StepwiseConfig(**adapted), tmp / "run")
assert all(abs(stage["first_loss"] - math.log(2)) < 1e-6 for stage in run.stages)
run.table().loc[["reference", "first loss", "change of gamma, 95 %"]]

# %% [markdown]
# Somebody who knows nothing of this package loads `stage-2/model` onto S with PEFT alone. Is it the model that `run.model` gives?

# %%
theirs = PeftModel.from_pretrained(load_model(w.base, "cpu"), run.model_folder(2)).eval()
ids = tok("sort dcab", return_tensors="pt").input_ids
with torch.no_grad(): off = (theirs(ids).logits - run.model(ids).logits).abs().max().item()
assert off < 1e-4
assert_close(says(theirs), says(run.model), **near)
print(f"logits at most {off:.1g} apart")


# %% [markdown]
# And a run that dies in its second stage? Here it is stopped after three steps of it, and something else draws random numbers before the same call is made again.

# %%
def lights_out(row):
    if (row["stage"], row["step"]) == (2, 3): raise KeyboardInterrupt

try: sdpo(w.base, few, StepwiseConfig(**adapted), tmp / "died", on_step=lights_out)
except KeyboardInterrupt: torch.rand(1000)
resumed = sdpo(w.base, few, StepwiseConfig(**adapted), tmp / "died")

def hashes(run): return [stage["end"] for stage in run.stages]

ends = pd.DataFrame({"left alone": hashes(run), "died and went on": hashes(resumed)}, index=["M_1", "M_2"])
assert ends["left alone"].equals(ends["died and went on"])
ends.rename_axis("hash of")

# %% [markdown]
# The same bits. To give the model away without PEFT, `run.export(folder)` writes it with the adapter merged, as [chapter 11](11_report.ipynb) says. Who wants the adapter takes `stage-2/model` as it is.
#
# ## What does it save?
#
# On a real model: SmolLM2-135M-Instruct, adapters of rank 16 on all linear layers, two stages of 4 real pairs each (`make bench-lora`, on one thread of a CPU; other work went on beside it, so seconds say little, and ratios more). First memory. What do you expect, if weights, gradients and moments are 4, 4 and 8 bytes a parameter?

# %%
results = json.loads((files("sdpo_nb.data") / "results/lora.json").read_text())
sides = {"full": "all weights", "lora": "adapters"}
memory = pd.DataFrame({name: results[f"plan {side}"]["parts"] for side, name in sides.items()}).T
memory["planned"] = memory.sum(axis=1)
memory["measured"] = [results[f"plan {side}"]["measured"] for side in sides]
assert (memory["planned"] / memory["measured"]).between(0.8, 1.2).all()
assert memory.loc["adapters", "measured"] < memory.loc["all weights", "measured"]
memory.rename_axis("GiB, a row of 2,048 tokens").style.format("{:.2f}")

# %% [markdown]
# The first six columns are the plan of [chapter 06](06_trainer.ipynb), which knows of adapters; the last is the peak of a fresh process, beyond what it holds before it has a model. Gradients and moments are nearly gone. The *activations* are not: the backward pass still goes through every layer, and each adapter keeps what went into it. In a model this small they are the larger part, so the saving is modest. Twelve bytes a parameter go, so it grows with the model. Here is the same plan for a model of 1.2 billion parameters beside it. What is left, once gradients and moments are gone?

# %%
four = {}
for model, key in (("135 million parameters", "plan"), ("1.2 billion parameters", "larger")):
    for side, name in sides.items(): four[f"{model}, {name}"] = results[f"{key} {side}"]["parts"]
bars = pd.DataFrame(four).T[::-1].rename(columns=dict(output_gradient="gradient of the output layer"))
ax = bars.plot.barh(stacked=True, figsize=(8, 2.6), width=0.75, colormap="viridis")
ax.set_xlabel("GiB planned for a row of 2,048 tokens in fp32 (less is better)")
ax.legend(frameon=False, ncols=2, loc="upper right")
plt.show()

# %% [markdown]
# Weights and activations. The larger model needs less than half, and so it fits where it did not. Tokens of a forward pass on a T4 with 15 GB, in fp16 with [recomputed activations](06_trainer.ipynb); zero says that not even the weights and what belongs to them fit:

# %%
fitting = {name: results[f"larger {side}"]["on_a_T4"] for side, name in sides.items()}
assert fitting["all weights"] == 0
fitting

# %% [markdown]
# And time? Both sides in one process, step by step in turn, on the same batches. The backward pass need not compute the gradient of the weights, but adapters cost multiplications of their own.

# %%
steps = results["steps"]
seconds, ratios = steps["seconds"], steps["ratios"]
print(f"a step: {seconds['full']:.2f} s with all weights, {seconds['lora']:.2f} s with adapters")
print(f"adapters take {steps['ratio']:.2f} of the time", [round(ratio, 2) for ratio in ratios])

# %%
#| hide
shutil.rmtree(tmp)

# %% [markdown]
# And a whole run of two stages, with adapters:

# %%
lora = results["whole lora"]
for loss in lora["first_loss"]: assert abs(loss - math.log(2)) < 1e-4
pd.Series({
    "first loss of stage 1": lora["first_loss"][0],
    "first loss of stage 2": lora["first_loss"][1],
    "a checkpoint, MB": lora["checkpoint_mb"],
    "the adapter of stage 1 on disk, MB": lora["model_mb"][0],
    "the adapter of stage 2 on disk, MB": lora["model_mb"][1],
    "S in fp32, as planned, MB": memory.loc["all weights", "weights"] * 2**30 / 1e6,
}, name="SmolLM2-135M-Instruct").to_frame().style.format("{:.4g}")

# %% [markdown]
# PEFT alone loads `stage-2/model` of this run onto S. Are its logits, and its answers to three questions, those of `run.model`?

# %%
assert lora["logits_off"] < 1e-3
assert lora["same_answers"] == lora["asked"]
same, asked = lora["same_answers"], lora["asked"]
print(f"logits at most {lora['logits_off']:.1g} apart; {same} of {asked} answers are the same")

# %% [markdown]
# ## What this does not show
#
# That adapters learn as much as full training does. On a small model, or with a learning rate that is not theirs, they may not. Nor which of *merge* and *same* is better: a new adapter in each stage has more directions, and no measurement here says that they help. The memory and the times are those of one model on one processor; nothing on this page was measured on a graphics card.
#
# ## What you now have
#
# - `add_adapter`, `put_back`: adapters put on a model in place, drawn from the seed and the stage. What trains, packs, scores and hashes a model goes on as before.
# - `adapter_of`, `write_adapter`, `read_adapter`: the two files of PEFT.
# - `merge_adapter`, `join_adapters`: the model of a stage is S with its adapter merged, the same bits whoever builds it.
# - `lora_r` and three more settings of a run; `get_peft_model(...)` is understood where it says no more than these.
#
# ## Questions to test yourself
#
# 1. Some trainers need no reference model with LoRA: they switch the adapter off, and the model underneath is the reference. What would go wrong with that in stage 2, when one adapter goes on?
#
# <details><summary>Answer</summary>
#
# Underneath is S. So stage 2 would be trained against S, and not against $M_1$. Its first loss would not be $\ln 2$, since the policy begins as $M_1$. With a new adapter on merged weights it would be right. The table is right in both.
#
# </details>
#
# 2. Why does stage 2 save an adapter of rank $2r$, though it trained one of rank $r$?
#
# <details><summary>Answer</summary>
#
# Its own adapter belongs on $M_1$. Loaded onto S, it gives a model that never was. The joined one, equation (3), belongs on S, as that of stage 1 does.
#
# </details>
#
# 3. With $B = 0$, the first step changes nothing in $A$. Does AdamW move $A$ all the same?
#
# <details><summary>Answer</summary>
#
# No. The gradient of $A$ is exactly zero, so its moments stay zero, and zero divided by a small constant is zero. And there is no weight decay here, which would shrink $A$ without any gradient. From the second step on $B$ is different from zero, and $A$ moves.
#
# </details>
#
# ## Try this
#
# In `_draw`, leave out the line for `lora_B`, and draw it as `lora_A` is drawn. Run the notebook from there.
#
# <details><summary>What you should see</summary>
#
# The first check under "Why does B begin at zero?" fails: the policy no longer says what S says. Without that check, `train_stage` would stop as well. It looks at the first batch before the first update, and finds that the table is not what the model says.
#
# </details>
