# %% [markdown]
# # Worlds and bodies
# > Where the experiments run: small worlds drawn from a seed, and five architectures and four sizes that start equally well.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/bodies.ipynb)
#
# **You should know** how the [tiny world](../00_world.ipynb) is made: four string skills, a true reward, and a small model S that is fine-tuned on imperfect demonstrations.
#
# **Time** half an hour to read, less than a minute to run.
#
# The experiments compare ways to train. One comparison in one world proves little, because that world is a draw: other demonstrations
# make another S, and another S writes other pairs. So we need many worlds. We also want to know whether an answer holds for more than
# one architecture and one size. All are made on this page, and nothing is trained on preferences yet. If you only want the answers, read the
# [protocol](protocol.ipynb).

# %%
#| default_exp bodies

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
import copy, os, tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sdpo_nb.logprobs import load_model
from sdpo_nb.world import World, freeze_world, load_base, load_world, make_model, make_tokenizer
from sdpo_nb.world import sft, true_rewards, world_texts

# %%
from sdpo_nb.evaluate import as_text
from sdpo_nb.partition import mean_interval
from sdpo_nb.world import complaint, respond, true_reward


# %% [markdown]
# ## A world is made once
#
# A *world* is a seed. The seed draws the demonstrations, S is trained on them, and S writes the preference pairs. [Chapter 00](../00_world.ipynb) is
# world 0, and it travels with the package. Worlds 1, 2, ... are made in the same way, when they are first asked for. Each takes two to
# eight core minutes, so a world is kept in a folder, `runs/worlds`.
#
# What if the machine stops half-way? Half a world must never look like a whole one. So a folder is filled under another name, and renamed
# when it is complete. And if two processes make the same world? The folder of the first to finish stays, and the other takes it.

# %%
#| export
def _made_once(folder: Path, make) -> Path: # make(path) fills a new folder
    "The folder, made where it is not there yet: in full or not at all."
    if folder.exists(): return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as unfinished:
        made = Path(unfinished, folder.name)
        made.mkdir()                                # the temporary folder itself is closed to other users
        make(made)
        try: os.replace(made, folder)
        except OSError:
            if not folder.exists(): raise           # if it does, another process was quicker
    return folder


# %% [markdown]
# Let us break it on purpose. The first call stops in the middle, the second finishes, the third has nothing to do:

# %%
calls = []

def fill(path): # a world of two files, which fails at its first trial
    calls.append(path)
    Path(path, "first").write_text("one")
    if len(calls) == 1: raise KeyboardInterrupt("the machine stops")
    Path(path, "second").write_text("two")

folder = Path(tempfile.mkdtemp()) / "worlds" / "7"
try: _made_once(folder, fill)
except KeyboardInterrupt as stop: print(f"{stop}: is the folder there? {folder.exists()}")
assert not list(folder.parent.iterdir())        # nothing half made is left either

_made_once(folder, fill)
_made_once(folder, fill)
names = sorted(file.name for file in folder.iterdir())
print(f"afterwards it holds {names}, and `fill` was called {len(calls)} times")
assert len(calls) == 2

# %% [markdown]
# ## Four other bodies
#
# S is a Llama with three layers of width 96. The paper aligns one kind of model and asks whether others behave alike. So we make four more, of
# nearly the same size. We say *body* for the architecture of S, as the skills that it learns are the same. The four differ in how they know
# the position of a token: GPT-2 and OPT learn a vector for each position, BLOOM has a slope in its attention (ALiBi), Qwen3 rotates its queries and keys, as
# the Llama does. They differ in norms, activations and biases, too.
#
# And three more are Llamas of another width: half of 96, twice, four times. The number of parameters grows with the square.

# %%
#| export
BODIES = { # name in transformers -> settings of its config; the Llama of the world is not among them
    "gpt2": dict(
        n_embd=96,
        n_layer=3,
        n_head=4,
        n_positions=128,
        resid_pdrop=0.,
        embd_pdrop=0.,
        attn_pdrop=0.,
    ),
    "opt": dict(
        hidden_size=96,
        num_attention_heads=4,
        num_hidden_layers=3,
        ffn_dim=384,
        word_embed_proj_dim=96,
        max_position_embeddings=128,
        dropout=0.,
    ),
    "bloom": dict(
        hidden_size=96,
        n_layer=3,
        n_head=4,
    ),
    "qwen3": dict(
        hidden_size=96,
        num_attention_heads=4,
        num_hidden_layers=3,
        num_key_value_heads=4,
        head_dim=24,
        intermediate_size=256,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    ),
}

SIZES = {"llama-48": 48, "llama-192": 192, "llama-384": 384} # name -> width of a Llama
TUNING_RATES = {"llama-384": 5e-4}                         # highest learning rate of fine-tuning, if not 2e-3

def make_body(
    kind: str,     # a name in BODIES or SIZES
    tokenizer,     # of the world
    seed: int = 0, # of the random weights
) -> AutoModelForCausalLM:
    """A small model of this kind with random weights, drawn without touching the global random state.
    Raises ValueError for a kind that is not there."""
    if kind in SIZES: return make_model(tokenizer, hidden=SIZES[kind], seed=seed)
    if kind not in BODIES: raise ValueError(f"kind: {kind!r} is none of {', '.join((*BODIES, *SIZES))}")
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **BODIES[kind],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)

def untrained(
    body: str, # llama, or a name in BODIES or SIZES
    tokenizer, # of the world
) -> AutoModelForCausalLM:
    "Random weights, as S of any body begins; the Llama of the worlds, too. Raises ValueError as `make_body` does."
    return make_model(tokenizer) if body == "llama" else make_body(body, tokenizer)


# %% [markdown]
# Are the four of one size, and how large are the three? The number of parameters of each, beside the Llama:

# %%
tokenizer = make_tokenizer()
small = {kind: untrained(kind, tokenizer) for kind in ("llama", *BODIES, *SIZES)}
parameters = {kind: model.num_parameters() for kind, model in small.items()}
for kind in BODIES: assert abs(parameters[kind] / parameters["llama"] - 1) < 0.05, kind
for kind, width in SIZES.items(): assert abs(np.log2(parameters[kind] / parameters["llama"]) / 2 - np.log2(width / 96)) < 0.02
{kind: f"{n:,}" for kind, n in parameters.items()}


# %% [markdown]
# ## Training until a reward is reached
#
# Which body should be fine-tuned longer, one that learns fast or one that learns slowly? If all had the same number of steps, they would
# start the experiments with different skill, and a worse S leaves more to be gained. So we do not fix the steps. We fix the reward: another body is
# fine-tuned until its mean true reward on the validation prompts is that of the world's Llama, within 0.01.
#
# One sampling of 300 answers is too noisy for that. `_validation_reward` takes the mean of four.

# %%
#| export
def _validation_reward(model, tokenizer, prompts: list) -> float:
    "Mean true reward of sampled answers, over four samplings."
    samplings = [true_rewards(model, tokenizer, prompts, seed=s) for s in range(4)]
    return np.mean(samplings)

def tuning_to_reward(
    target: float,         # mean true reward on the validation prompts, 0 to 1
    start,                 # the model to begin with; it is copied
    within: float = 0.01,  # how near is near enough
    most: int = 60,        # epochs
    lr: float = 2e-3,      # highest learning rate, of the first epochs
): # -> a function (texts, tokenizer, seed) -> S, as `freeze_world` asks for
    """Fine-tuning that goes on, epoch by epoch, until a validation reward is reached.
    An epoch that overshoots is taken back and tried at half its learning rate.
    The function raises RuntimeError where `most` epochs do not suffice."""
    def train(texts, tokenizer, seed):
        torch.set_num_threads(1)                    # the same result on any number of cores
        model, now = copy.deepcopy(start), lr
        for epoch in range(most):
            before = copy.deepcopy(model.state_dict())
            sft(model, tokenizer, texts["sft"], epochs=1, lr=now, seed=seed + 1000 * epoch)
            reward = _validation_reward(model, tokenizer, texts["validation"])
            if abs(reward - target) <= within: return model
            if reward > target:
                model.load_state_dict(before)
                now /= 2
        kind = model.config.model_type
        raise RuntimeError(f"world {seed}: after {most} epochs a {kind} has a true reward of {reward:.3f}; "
                           f"{target:.3f} is asked for")
    return train


# %% [markdown]
# Let us ask for something small. S of world 0 has a reward of 0.64 or so. We show it demonstrations without errors, 640 per epoch, until it has
# 0.70 within 0.02; and then we ask for 0.99 in two epochs, which is too much.

# %%
world = load_world()
S, tokenizer = load_base(world)
demonstrations = world_texts()["sft"]
right = [(prompt, text) for prompt, text in demonstrations if true_reward(prompt, text) == 1]
texts = dict(sft=right[:640], validation=world.validation[:100])

tuned = tuning_to_reward(0.70, S, within=0.02)(texts, tokenizer, 0)
rewards = {
    "S": _validation_reward(S, tokenizer, texts["validation"]),
    "tuned": _validation_reward(tuned, tokenizer, texts["validation"]),
}
assert abs(rewards["tuned"] - 0.70) <= 0.02
{name: round(float(reward), 3) for name, reward in rewards.items()}

# %%
train = tuning_to_reward(0.99, S, most=2)
print(complaint(train, texts, tokenizer, 0))

# %% [markdown]
# ## Where a body begins
#
# Most epochs go by before a body sees the rules at all, BLOOM's above all. It would be a waste to repeat them in every world. So they are
# spent once for each body, in a world that is used for nothing but searches, up to a reward of 0.40 to 0.50. All worlds of this body
# go on from there. The widest body is fine-tuned at a quarter of the usual learning rate: it reached 0.31 in six epochs at 2e-3, and 0.44 in one
# at 5e-4.

# %%
#| export
SEARCH_WORLDS = (101, 102) # settings are searched there, and nothing is reported of them

def build_beginning(
    body: str,               # a name in BODIES or SIZES
    worlds = "runs/worlds",  # folder that keeps worlds and beginnings
): # -> model
    """Where all worlds of a body begin:
    random weights, fine-tuned in a search world to a true reward of 0.4 to 0.5."""
    def make(folder):
        tokenizer, world = make_tokenizer(), SEARCH_WORLDS[0]
        train = tuning_to_reward(0.45, make_body(body, tokenizer), within=0.05, lr=TUNING_RATES.get(body, 2e-3))
        train(world_texts(world), tokenizer, world).save_pretrained(folder)
    folder = _made_once(Path(worlds) / f"begun-{body}", make)
    return load_model(str(folder))

def tuning_to_world(
    world: World,            # of the Llama
    body: str,               # a name in BODIES or SIZES
    worlds = "runs/worlds",  # folder that keeps worlds and beginnings
): # -> a function (texts, tokenizer, seed) -> S
    "How S of another body is trained: to the validation reward of this world's S."
    base, tokenizer = load_base(world)
    target = _validation_reward(base, tokenizer, world.validation)
    return tuning_to_reward(target, build_beginning(body, worlds), lr=TUNING_RATES.get(body, 2e-3))


# %% [markdown]
# A beginning takes two to ten core minutes, so we do not make one here. But we can see that a stored one is taken as it is. Here is a GPT-2 with
# random weights where the beginning should lie:

# %%
folder = Path(tempfile.mkdtemp())
planted = make_body("gpt2", tokenizer, seed=1)
planted.save_pretrained(folder / "begun-gpt2")
found = build_beginning("gpt2", folder)
assert torch.equal(found.lm_head.weight.cpu(), planted.lm_head.weight)
found.config.model_type, respond(found.to("cpu"), tokenizer, ["copy abc"], 0)


# %% [markdown]
# It answers as random weights do.
#
# ## A world of any body
#
# Now we can ask for a world by seed and body. Worlds of one seed have the same prompts and the same demonstrations. Each body has an S
# of its own, and that S writes its own pairs.

# %%
#| export
def build_world(
    seed: int,               # 0: the world that travels with the package
    worlds = "runs/worlds",  # folder that keeps the others
    body: str = "llama",     # or a name in BODIES or SIZES
) -> World:
    """A world, made where it is not there yet.
    S of another body is as good as the Llama of this seed, on the same demonstrations.
    It writes its own pairs. Raises ValueError for a body that is not there."""
    known = ("llama", *BODIES, *SIZES)
    if body not in known: raise ValueError(f"body: {body!r} is none of {', '.join(known)}")
    if body == "llama":
        if seed == 0: return load_world()
        return load_world(_made_once(Path(worlds) / str(seed), lambda folder: freeze_world(folder, seed)))

    def make(folder):
        llama = build_world(seed, worlds)
        freeze_world(folder, seed, tuning_to_world(llama, body, worlds))
    return load_world(_made_once(Path(worlds) / f"{seed}-{body}", make))


# %%
world = build_world(0)
base, tokenizer = load_base(world)
rewards = true_rewards(base, tokenizer, world.test)
print(f"pairs of {', '.join(world.sources)}; {len(world.test)} test prompts")
print("true reward of S, sampled:", as_text(mean_interval(rewards)))
assert build_world(0).manifest == load_world().manifest

# %% [markdown]
# A body that is not there is refused at once, before minutes go into the Llama of its world:

# %%
print(complaint(build_world, 1, folder, "mamba"))

# %% [markdown]
# ## What you now have
#
# - `build_world`: a world of any seed and any of eight bodies, made once and kept.
# - `make_body`: four other architectures of the size of the Llama, and Llamas of three other sizes.
# - `tuning_to_reward`: fine-tuning to a reward, not for a number of steps.
#
# Next: which [pairs](training_data.ipynb) a run may train on.
#
# ## Questions to test yourself
#
# 1. Why is the folder of a world renamed at the end, and not filled in place?
#
#    <details><summary>Answer</summary>
#
#    A folder that is filled in place exists from its first file on. After an interruption the next call would take half a world for a whole one. Renaming is one step: the folder is there in full or not at all.
#
#    </details>
# 2. Why is another body tuned to the reward of the Llama, and not for as many steps?
#
#    <details><summary>Answer</summary>
#
#    We want to compare how two methods of training act on each body. A worse S leaves more to be gained, so bodies of different skill would differ before the first pair is seen.
#
#    </details>
# 3. Why does each body write its own pairs?
#
#    <details><summary>Answer</summary>
#
#    DPO starts from pairs that the model could have written itself, and the paper's order depends on how often *this* S prefers the chosen response. Pairs of the Llama would be foreign to the others, in different degrees.
#
#    </details>
#
# ## Try this
#
# - Ask for a reward *below* that of S in the cell with 0.70, say 0.50. What happens?
#
#   <details><summary>What you should see</summary>
#
#   Every epoch overshoots, is taken back, and is tried at half the learning rate. The reward never falls to 0.50: a RuntimeError after 60 epochs. (Use `most=5`.) The function climbs to a target; it cannot go down to one.
#
#   </details>
# - Give `make_body("bloom", tokenizer)` a second seed and compare the parameters. Which of them are equal?
#
#   <details><summary>What you should see</summary>
#
#   Those that are not random: norms begin at one, biases at zero. All matrices differ.
#
#   </details>
