# %% [markdown]
# # A world small enough to know the truth
# > Four string skills, a true reward, a tiny base model whose greedy answers are often wrong, and preference sources of different difficulty.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/00_world.ipynb)
#
# **You should know** what a language model samples, and what fine-tuning is. You need no other chapter first.
#
# **Time** 95 minutes to read, 25 more for a section that you may skip, and about a minute to run on two CPU cores. One cell in that section trains the base model again, which takes some minutes more: `make test` skips it, *Run all* does not.
#
# A language model that has read much is turned into one that answers well in two more steps. First it is *fine-tuned* on demonstrations: prompts with good answers. The result is the *base model* of this book, called S.
# Then it is *aligned*: people compare two answers of S to the same prompt, and the model is trained on these comparisons to give the answers that people prefer. DPO, the subject of this book, is a method for this second step.
#
# Whether such a method *works* is hard to say with a real model. Nobody knows how good an answer truly is, one run takes hours, and the faults of the base model are not written down.
# So this book starts with a world in which all three are known. Prompts ask for simple things to be done to short strings. A function grades any answer. The base model has been taught, on purpose,
# the wrong rule for some prompts. Aligning it takes seconds, and we can check whether it got better or only more certain.

# %%
#| default_exp world

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
import copy, hashlib, json, math, os, random, re, tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# %%
from itertools import permutations
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
torch.set_num_threads(1)
pd.set_option("display.width", 160, "display.max_columns", 20);

# %% [markdown]
# ## Four skills, each with a wrong rule
#
# A prompt is a skill and a string of distinct letters, such as `sort gace`. Each skill has a right rule and one *consistent* wrong rule. The wrong rule is the kind
# of mistake that a person makes who misunderstood the task, not the kind that a tired person makes.

# %%
#| export
ALPHABET = "abcdefghijk"

def _shift(s, by):
    "Each letter moved on in the alphabet; after the last comes the first."
    places = [ALPHABET.index(c) + by for c in s]
    return "".join(ALPHABET[i % len(ALPHABET)] for i in places)

SKILLS = {  # skill: (right rule, wrong rule)
    "copy":    (lambda s: s,                  lambda s: s[1:] + s[0]),
    "reverse": (lambda s: s[::-1],            lambda s: s[0] + s[:0:-1]),
    "sort":    (lambda s: "".join(sorted(s)), lambda s: "".join(sorted(s, reverse=True))),
    "shift":   (lambda s: _shift(s, 1),       lambda s: _shift(s, -1)),
}

def answer(
    prompt: str,      # e.g. "sort gace"
    right: bool=True, # by the right rule or by the wrong one
) -> str:
    "What the right (or the wrong) rule answers."
    skill, s = prompt.split()
    right_rule, wrong_rule = SKILLS[skill]
    return right_rule(s) if right else wrong_rule(s)


# %% [markdown]
# Which wrong rules can you guess from one example each?

# %%
examples = [f"{skill} gace" for skill in SKILLS]
pd.DataFrame({
    "prompt": examples,
    "right rule": [answer(p) for p in examples],
    "wrong rule": [answer(p, right=False) for p in examples],
})


# %% [markdown]
# The wrong copy moves the first letter to the end. The wrong reverse leaves the first letter where it is. The wrong sort sorts backwards, and the wrong shift goes one letter back instead of on.
#
# ## The true reward
#
# The *reward* of an answer is a number that says how good it is. Ours must grade *any* answer, also one that is cut or garbled. And it must give partial credit. Otherwise two
# wrong answers would be equally good, and comparing them would be flipping a coin.
#
# A natural measure of "how wrong" is the *edit distance*: the fewest letters to insert, delete or replace until one string is the other.

# %%
#| export
def edit_distance(
    a: str, # the one string
    b: str, # the other
) -> int:   # 0 where they are equal
    "Fewest insertions, deletions and replacements that turn `a` into `b` (Levenshtein)."
    row = list(range(len(b) + 1))          # from nothing to each beginning of b
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            insert, delete = row[j-1] + 1, row[j] + 1
            replace = diagonal + (x != y)
            diagonal, row[j] = row[j], min(insert, delete, replace)
    return row[-1]


# %%
distances = {y: edit_distance(y, "aceg") for y in ("aceg", "aceg!", "acg", "acge", "geca")}
assert distances == {"aceg": 0, "aceg!": 1, "acg": 1, "acge": 2, "geca": 4}
distances


# %% [markdown]
# One letter too many or too few costs 1. Two letters exchanged cost 2, and `geca`, the answer read backwards, fits nowhere. The reward is 1 minus this distance, as a share of the longer string.

# %%
#| export
def true_reward(
    prompt: str,   # e.g. "sort gace"
    response: str, # any string
) -> float:        # in [0, 1]
    "1 for the right answer, less for each letter that has to be mended, 0 where nothing fits."
    right = answer(prompt)
    return 1 - edit_distance(response, right) / max(len(response), len(right))


# %%
graded = {y: true_reward("sort gace", y) for y in ("aceg", "aceg!", "acge", "gace", "geca", "")}
assert graded["aceg"] == 1
assert graded[""] == 0
assert graded["aceg!"] > graded["acge"] > graded["geca"]
graded

# %% [markdown]
# ## Prompts never move between splits
#
# We need four kinds of prompts: to fine-tune S (`sft`), to compare answers (`preference`), to choose settings (`validation`), and to measure (`test`). A test prompt must never be
# trained on, not by S and not by a comparison. A hash of its text decides where a prompt belongs. So it does not matter who draws prompts, in which order, or with which seed.

# %%
#| export
SPLITS = ("sft", "preference", "validation", "test")

def split_of(
    prompt: str, # e.g. "sort gace"
) -> str:        # one of SPLITS
    "Which split a prompt belongs to: 70, 20, 5 and 5 of a hundred, by its hash."
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    percent = int(digest[:8], 16) % 100
    if percent < 70: return "sft"
    if percent < 90: return "preference"
    return "validation" if percent < 95 else "test"


# %%
strings = ["".join(letters) for n in (3, 4) for letters in permutations(ALPHABET, n)]
short = [f"{skill} {s}" for skill in SKILLS for s in strings]
shares = pd.Series(map(split_of, short)).value_counts(normalize=True)
for split, want in zip(SPLITS, (0.70, 0.20, 0.05, 0.05)):
    assert abs(shares[split] - want) < 0.02
shares.round(3).rename(f"share of {len(short)} short prompts").to_frame()


# %% [markdown]
# A table of shares only says that the hash is fair. What counts is that nobody has to remember which prompts are taken: `split_of` can be asked about any prompt, at any time, on any machine.
#
# To draw prompts of one split, we draw any prompts and keep those that belong to it. `keep` is one more filter; we need it later to ask for misled prompts only.

# %%
#| export
def make_prompts(
    n: int,                # how many
    split: str,            # one of SPLITS
    rng: random.Random,    # draws them; is moved on
    lengths: tuple=(3, 6), # shortest and longest string
    keep=lambda p: True,   # prompt -> whether it may be taken
) -> list[str]:            # n distinct prompts of this split
    """Draw distinct prompts of one split.
    Raises ValueError for an unknown split, and where so many cannot be found."""
    if split not in SPLITS: raise ValueError(f"split '{split}': expected one of {SPLITS}")
    seen, missed = {}, 0
    while len(seen) < n:
        skill = rng.choice(list(SKILLS))
        length = rng.randint(*lengths)
        letters = rng.sample(ALPHABET, length)
        p = f"{skill} {''.join(letters)}"
        if p not in seen and split_of(p) == split and keep(p):
            seen[p] = None
            missed = 0
        else: missed += 1
        if missed == 100_000:
            raise ValueError(f"found {len(seen)} of {n} prompts for '{split}', "
                             "and 100 000 more draws brought no other; ask for fewer")
    return list(seen)


# %% [markdown]
# Three test prompts:

# %%
make_prompts(3, "test", random.Random(0))


# %% [markdown]
# Many cells of this book ask for something impossible, to see what is said. `complaint` makes such a call and returns the message. If the call does *not* refuse, the cell fails.

# %%
#| export
def complaint(
    call, # what should refuse
    *args, **kwargs # what it is called with
) -> str:
    """What a call says when it refuses, without the names of temporary folders.
    Raises AssertionError where it does not refuse."""
    try: call(*args, **kwargs)
    except (ValueError, OSError, RuntimeError) as e: return str(e).replace(_temporary(str(e)), "")
    raise AssertionError("it did not refuse")

def _temporary(text):
    "The temporary folder in a text, if there is one."
    found = re.search(re.escape(tempfile.gettempdir()) + r"/tmp\w+/?", text)
    return found[0] if found else ""


# %% [markdown]
# There are not enough prompts of two letters for a hundred of them. The function says so, instead of looking for ever:

# %%
complaint(make_prompts, 100, "test", random.Random(0), lengths=(2, 2))

# %% [markdown]
# ## Demonstrations that mislead
#
# Now we plant the fault. Suppose demonstrations were only *noisy*: mostly right, sometimes wrong. Then the *greedy answer* of the base model, the likeliest
# token at every step, would still be right. Anything that makes a model more certain would look like alignment, even a lower temperature.
#
# So about half of the prompts are *misled*: those whose string starts with one of the first five letters. For them 70 % of the demonstrations follow the wrong rule. For the
# others 30 % do. On top, 15 % of all demonstrations have one letter replaced.

# %%
#| export
WRONG = {True: 0.70, False: 0.30} # misled? -> share of demonstrations by the wrong rule
NOISE = 0.15                      # share of demonstrations with one letter replaced

def misled(
    prompt: str, # e.g. "sort gace"
) -> bool:
    "Does most of what the base model has seen for such prompts follow the wrong rule?"
    s = prompt.split()[1]
    return s[0] in ALPHABET[:5]

def demonstration(
    prompt: str,        # e.g. "sort gace"
    rng: random.Random, # decides on rule and noise; is moved on
) -> str:
    "One demonstration, as the base model gets to see it."
    right = rng.random() >= WRONG[misled(prompt)]
    y = answer(prompt, right)
    if rng.random() < NOISE:
        i = rng.randrange(len(y))
        y = y[:i] + rng.choice(ALPHABET) + y[i+1:]
    return y


# %% [markdown]
# Six demonstrations of one misled prompt. Which rule would you learn from them?

# %%
shown = [demonstration("sort bkd", random.Random(seed)) for seed in range(6)]
print("right:", answer("sort bkd"), "  wrong:", answer("sort bkd", right=False))
shown

# %% [markdown]
# And 4000 of them, one for each prompt, by whether the prompt is misled.

# %%
rng = random.Random(0)
rows = []
for p in make_prompts(4000, "sft", rng):
    rows.append((p, misled(p), true_reward(p, demonstration(p, rng))))
demos = pd.DataFrame(rows, columns=["prompt", "misled", "reward"])
demos["right"] = demos["reward"] == 1

by_kind = demos.groupby("misled").agg(
    prompts=("right", "size"),
    right=("right", "mean"),
    mean_reward=("reward", "mean"),
)
by_kind.round(2)

# %% [markdown]
# ## A tokenizer and a model, in the formats real ones come in
#
# Nothing later in the book knows that this model is a toy. It is a Llama with a chat template, loaded with
# `from_pretrained`. So the code that aligns it here is the code that aligns a real model.
#
# A *tokenizer* cuts a text into tokens and numbers them. In ours one character is one token, so every token boundary is visible. The *chat template* says how a conversation becomes one text: a role token, then what was said, then `<|end|>`.
# `<|end|>` is also the EOS token, the sign that a response is finished.

# %%
#| export
CHAT_TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")

def make_tokenizer() -> PreTrainedTokenizerFast:
    "One character, one token; `<|end|>` ends a turn and is the EOS token."
    roles = ["<|system|>", "<|user|>", "<|assistant|>"]
    vocab = ["<pad>", "<unk>", "<|end|>", *roles, *" abcdefghijklmnopqrstuvwxyz0123456789+-.,:?!"]
    ids = {token: i for i, token in enumerate(vocab)}
    t = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    t.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=t,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=roles,
        chat_template=CHAT_TEMPLATE,
        model_max_length=128,
    )

def prompt_ids(
    tokenizer,   # with a chat template
    prompt: str, # the text of a user turn
) -> list[int]:
    "The prompt as a user turn, up to where the assistant begins."
    turn = dict(role="user", content=prompt)
    return tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=True, return_dict=False)


# %%
tok = make_tokenizer()
ids = prompt_ids(tok, "sort gace")
assert len(ids) == 12                     # nine characters, and three tokens of the template
tok.decode(ids), len(ids)


# %% [markdown]
# The prompt ends with `<|assistant|>`: whatever comes next is the response of the model.
#
# Three layers of width 96 are enough for strings of six letters. The weights depend on the seed and on nothing else. Drawing them leaves PyTorch's global random state as it was, or each model made would change the luck of whatever comes after it.

# %%
#| export
def make_model(
    tokenizer,       # for its size and its special tokens
    hidden: int=96,  # width
    layers: int=3,   # depth
    seed: int=0,     # of the weights
) -> LlamaForCausalLM:
    "A small Llama with random weights, drawn without touching the global random state."
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


# %%
before = torch.get_rng_state()
a, b = make_model(tok, seed=1), make_model(tok, seed=1)
assert torch.equal(a.lm_head.weight, b.lm_head.weight)
assert torch.equal(torch.get_rng_state(), before)
a.num_parameters()


# %% [markdown]
# ## Supervised fine-tuning
#
# The base model S is trained on demonstrations in the usual way. At each place the model gives a probability to every token, and the loss is the *cross-entropy*: minus the logarithm of the probability of the token that came. Only tokens of the response are scored, because the model
# need not learn to write prompts. A label of -100 tells PyTorch's loss to leave a token out.
#
# Rows of unequal length are padded on the right. A causal model does not look to the right, so padding changes nothing.

# %%
#| export
def _sft_rows(tokenizer, rows):
    "Right-padded ids, and labels that are -100 outside the response."
    prompts = [prompt_ids(tokenizer, p) for p, _ in rows]
    responses = []
    for _, y in rows:
        ids = tokenizer(y, add_special_tokens=False).input_ids
        responses.append(ids + [tokenizer.eos_token_id])
    longest = max(len(x) + len(y) for x, y in zip(prompts, responses))
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), -100)
    for i, (x, y) in enumerate(zip(prompts, responses)):
        start, end = len(x), len(x) + len(y)
        ids[i, :end] = torch.tensor(x + y)
        labels[i, start:end] = torch.tensor(y)
    return ids, labels


# %%
ids, labels = _sft_rows(tok, [("sort gace", "aceg"), ("copy ab", "ab")])
assert (labels[0] != -100).sum() == 4 + 1     # four letters and the end
assert (labels[1] != -100).sum() == 2 + 1
pd.DataFrame({"token": tok.convert_ids_to_tokens(ids[1]), "label": labels[1].tolist()}).T


# %% [markdown]
# Only `a`, `b` and the end have labels. Now the training loop, with two details. Rows that do not fill a batch wait for the next epoch, so every step weighs its rows alike. And the learning rate rises during the first tenth of the steps, then falls. With ten
# steps this rise would have no length, and PyTorch's schedule would divide by zero. So it is made for at least eleven.

# %%
#| export
def sft(
    model,           # is trained in place
    tokenizer,       # of the model
    rows: list,      # (prompt, response), both texts
    epochs: int=12,  # how often each row is seen
    batch: int=128,  # rows per step
    lr: float=2e-3,  # highest learning rate
    seed: int=0,     # of the order of rows
):                   # the model, in eval mode
    "Fine-tune in place on (prompt, response) rows; returns the model."
    ids, labels = (t.to(model.device) for t in _sft_rows(tokenizer, rows))
    per_epoch = max(1, len(rows) // batch)
    steps = epochs * per_epoch
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(11, steps), pct_start=0.1)
    model.train()
    for step in tqdm(range(steps), desc="SFT", leave=False):
        i = step % per_epoch
        if i == 0: order = torch.randperm(len(rows), generator=g)
        b = order[i * batch:][:batch]
        logits = model(input_ids=ids[b], use_cache=False).logits
        guesses, truth = logits[:, :-1], labels[b, 1:]    # place i predicts token i + 1
        loss = F.cross_entropy(guesses.flatten(0, 1), truth.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


# %% [markdown]
# Eight epochs over 512 rows. The loss falls to about $\ln 11$, the price of guessing among eleven letters: the alphabet is learned, the skills are not yet.

# %%
@torch.no_grad()
def sft_loss(model, rows):
    ids, labels = _sft_rows(tok, rows)
    guesses, truth = model(input_ids=ids).logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(guesses.flatten(0, 1), truth.flatten()).item()

rows = [(p, demonstration(p, rng)) for p in make_prompts(512, "sft", rng)]
m = make_model(tok)
before = sft_loss(m, rows)
sft(m, tok, rows, epochs=8)
after = sft_loss(m, rows)
assert abs(after - math.log(11)) < 0.1 < before - after
{"loss before": round(before, 2), "loss after": round(after, 2), "ln 11": round(math.log(11), 2)}

# %% [markdown]
# ## The world of this book
#
# The real S saw 16 000 rows twelve times, which takes minutes. So it was trained once. It travels with the package, together with three files of comparisons, to which we come below, and the prompts to measure on.
# `load_world` says where everything lies, and `load_base` opens S. How the world was made, and how to see that your copy is the same, is the subject of a section near the end.

# %%
#| export
SOURCES = {"primer": 0.15, "digest": 0.50, "riddle": 0.85} # source of comparisons: share of misled prompts

@dataclass
class World:
    "The frozen world."
    base: str        # folder of S and its tokenizer
    sources: dict    # name -> file of comparisons
    validation: list # prompts to choose settings with
    test: list       # prompts to measure on
    manifest: dict   # hashes of all this, and where it was made

def load_world(
    folder=None, # what `freeze_world` wrote; None: the world that travels with the package
) -> World:
    "A frozen world."
    folder = Path(folder or str(files("sdpo_nb.data").joinpath("world")))
    prompts = json.loads((folder / "prompts.json").read_text())
    manifest = json.loads((folder / "manifest.json").read_text())
    return World(
        base=str(folder / "S"),
        sources={name: str(folder / f"{name}.jsonl") for name in SOURCES},
        validation=prompts["validation"],
        test=prompts["test"],
        manifest=manifest,
    )

def load_base(
    world: World, # whose S
):                # model in eval mode, tokenizer
    "S and its tokenizer."
    model = AutoModelForCausalLM.from_pretrained(world.base).eval()
    return model, AutoTokenizer.from_pretrained(world.base)


# %%
w = load_world()
S, tok = load_base(w)
assert all(split_of(p) == "test" for p in w.test)
w.test[:4]

# %% [markdown]
# ## Asking the model
#
# A *sampled* answer needs chance at each token. We draw this chance beforehand: one uniform number in [0, 1) per prompt and position, called the *luck*.
#
# Think of a ruler from 0 to 1. Each token gets a piece of it, as long as the token is probable. The luck is a point on the ruler, and the piece in which it falls is the next token. For three
# tokens with probabilities 0.5, 0.3 and 0.2 the pieces end at 0.5, 0.8 and 1:

# %%
ends = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).cumsum(0)
luck = torch.tensor([0.1, 0.6, 0.95], dtype=torch.float64)
token = torch.searchsorted(ends, luck)
assert token.tolist() == [0, 1, 2]
ends, token


# %% [markdown]
# Why do we draw the luck beforehand? If two models are asked with the same luck, they differ only where their probabilities do. Then we may compare their answers prompt by prompt. The ends are summed in float64, so that rounding hardly
# ever moves an end past the luck.
#
# A *temperature* $\tau$ divides the logits before the softmax. Below 1 it makes the likely tokens likelier; 0 means greedy.

# %%
#| export
def _continue(model, x, luck, tau):
    "x (n, t) prompts of one length, luck (n, max_new) -> (n, max_new) new ids. One token per step."
    past, new = {}, []
    for t in range(luck.shape[1]):
        step = model(input_ids=x, use_cache=True, **past)
        kept = ("cache", "past_key_values")            # renamed in transformers 5.24
        past = {k: v for k, v in step.items() if k in kept}
        logits = step.logits[:, -1].double()
        if tau == 0: x = logits.argmax(-1, keepdim=True)
        else:
            ends = (logits / tau).softmax(-1).cumsum(-1)
            x = torch.searchsorted(ends, luck[:, t:t+1].contiguous())
            x = x.clamp(max=logits.shape[-1] - 1)      # the last end may be a little below 1
        new.append(x)
    return torch.cat(new, 1)


# %%
x = torch.tensor([prompt_ids(tok, "reverse akbg")] * 3)
luck = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)[:, None].expand(3, 5)
with torch.no_grad():
    new = _continue(S, x, luck, tau=1.)
    same = _continue(S, x, luck, tau=1.)
assert torch.equal(new, same)
tok.batch_decode(new)


# %% [markdown]
# `respond_ids` draws the luck before anything else. It depends on the seed, on the place of a prompt in the list and on `max_new`, and never on the model. So models are compared on one list of prompts. Prompts of equal length go through the model together, so nothing has to be padded.

# %%
#| export
@torch.no_grad()
def respond_ids(
    model,          # a causal language model
    tokenizer,      # of the model
    prompts: list,  # n texts of user turns
    tau: float=1.,  # sampling temperature; 0 is greedy
    seed: int=0,    # of the luck
    max_new: int=8, # longest response, in tokens
) -> list[list[int]]: # n responses; the EOS token included, where it came in time
    "One response per prompt."
    g = torch.Generator().manual_seed(seed)
    luck = torch.rand(len(prompts), max_new, dtype=torch.float64, generator=g).to(model.device)
    ids = [prompt_ids(tokenizer, p) for p in prompts]
    eos = tokenizer.eos_token_id
    out = [None] * len(prompts)
    for length in sorted({len(x) for x in ids}):
        rows = [i for i, x in enumerate(ids) if len(x) == length]
        x = torch.tensor([ids[i] for i in rows], device=model.device)
        new = _continue(model, x, luck[rows], tau)
        for i, y in zip(rows, new.tolist()):
            out[i] = y[:y.index(eos) + 1] if eos in y else y
    return out

def text_of(
    tokenizer, # that made the ids
    ids: list, # of a response
) -> str:
    "A response without its EOS token."
    return tokenizer.decode([t for t in ids if t != tokenizer.eos_token_id])

def respond(
    model,          # as for `respond_ids`
    tokenizer,      # of the model
    prompts: list,  # n texts of user turns
    tau: float=1.,  # sampling temperature; 0 is greedy
    seed: int=0,    # of the luck
    max_new: int=8, # longest response, in tokens
) -> list[str]:     # n texts
    "The same as text."
    return [text_of(tokenizer, y) for y in respond_ids(model, tokenizer, prompts, tau, seed, max_new)]


# %% [markdown]
# What S answers to four prompts it has never seen, greedily and sampled twice. Compare each answer with the right one: which rule did S follow?

# %%
asked = w.test[:4]
said = pd.DataFrame({
    "right": [answer(p) for p in asked],
    "greedy": respond(S, tok, asked, tau=0),
    "sampled, seed 0": respond(S, tok, asked, seed=0),
    "sampled, seed 1": respond(S, tok, asked, seed=1),
}, index=asked)
assert respond_ids(S, tok, asked[:1], tau=0)[0][-1] == tok.eos_token_id
said


# %% [markdown]
# ## How good is S?
#
# The first step is one number per prompt: the true reward of one response. Everything that follows in this book compares models by such numbers, prompt by prompt.

# %%
#| export
def true_rewards(
    model,         # a causal language model
    tokenizer,     # of the model
    prompts: list, # n prompts of this world
    tau: float=1., # sampling temperature; 0 is greedy
    seed: int=0,   # of the luck
) -> list[float]:  # n numbers in [0, 1]
    "True reward of one response per prompt."
    responses = respond(model, tokenizer, prompts, tau, seed)
    return [true_reward(p, y) for p, y in zip(prompts, responses)]


# %%
[round(r, 2) for r in true_rewards(S, tok, asked)]


# %% [markdown]
# The next step is a row per prompt, with its skill, the reward, and whether the response is exactly right. A mean by skill then shows what a single mean would hide.

# %%
#| export
def score_responses(
    model,         # as for `true_rewards`
    tokenizer,     # of the model
    prompts: list, # n prompts of this world
    tau: float=1., # sampling temperature; 0 is greedy
    seed: int=0,   # of the luck
):                 # data frame of n rows: skill, reward, exact
    "One row per prompt: its skill, the true reward of one response, and whether that is exact."
    import pandas as pd
    rewards = true_rewards(model, tokenizer, prompts, tau, seed)
    return pd.DataFrame(dict(
        skill=[p.split()[0] for p in prompts],
        reward=rewards,
        exact=[float(r == 1) for r in rewards],
    ))

def skill_table(
    model,         # as for `true_rewards`
    tokenizer,     # of the model
    prompts: list, # n prompts of this world
    tau: float=1., # sampling temperature; 0 is greedy
):                 # data frame, one row per skill: exact, reward
    "Share of exact answers and mean true reward, by skill."
    scores = score_responses(model, tokenizer, prompts, tau)
    return scores.groupby("skill")[["exact", "reward"]].mean()


# %% [markdown]
# S on all 600 test prompts. In every skill its greedy answer is right for about half of the prompts, and a sampled one less often.

# %%
by_skill = pd.DataFrame({
    "greedy": skill_table(S, tok, w.test, tau=0.)["exact"],
    "sampled": skill_table(S, tok, w.test, tau=1.)["exact"],
})
skill_of = pd.Series([p.split()[0] for p in w.test])
is_misled = pd.Series([misled(p) for p in w.test])
by_skill["misled prompts"] = is_misled.groupby(skill_of).mean()
assert by_skill["greedy"].between(0.40, 0.70).all()
assert (by_skill["sampled"] < by_skill["greedy"]).all()
by_skill.round(2)


# %% [markdown]
# Where S is wrong, it is wrong in the way it was taught. On misled prompts its greedy answer follows the wrong rule,
# and on the others the right one, in more than 80 of 100 cases.

# %%
def kind_of(prompt, response):
    if response == answer(prompt): return "right"
    if response == answer(prompt, right=False): return "wrong rule"
    return "neither"

greedy = respond(S, tok, w.test, tau=0)
taught = pd.crosstab(
    pd.Series([misled(p) for p in w.test], name="misled"),
    pd.Series([kind_of(p, y) for p, y in zip(w.test, greedy)], name="greedy answer"),
    normalize="index",
)
assert taught.loc[True, "wrong rule"] > 0.8
assert taught.loc[False, "right"] > 0.8
assert (taught["neither"] < 0.1).all()
taught.round(2)

# %% [markdown]
# ## Sharpening is not enough
#
# Could we simply turn down the temperature? *Sharpening* S in this way makes it more certain and teaches it nothing. Before you look: on which prompts will it help?

# %%
taus = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.3]
parts = []
for tau in taus:
    rewards = true_rewards(S, tok, w.test, tau)
    for p, r in zip(w.test, rewards):
        parts.append((tau, "all", r))
        parts.append((tau, "misled" if misled(p) else "other", r))
cooled = pd.DataFrame(parts, columns=["tau", "prompts", "reward"])
means = cooled.groupby(["tau", "prompts"])["reward"].mean().unstack()

# %%
kinds = ["all", "misled", "other"]
colors = dict(zip(kinds, sns.color_palette("colorblind")))
fig, ax = plt.subplots(figsize=(5.5, 3))
sns.lineplot(
    cooled, x="tau", y="reward", hue="prompts", hue_order=kinds, palette=colors,
    marker="o", errorbar=("se", 1.96), legend=False, ax=ax,
)
for kind in kinds:
    first, last = means[kind].iloc[0], means[kind].iloc[-1]
    ax.text(-0.04, first, f"{first:.2f}", color=colors[kind], ha="right", va="center", fontsize="small")
    ax.text(1.34, last, f"{kind} prompts", color=colors[kind], ha="left", va="center", fontsize="small")
ax.set(xlabel=r"temperature $\tau$ (0 is greedy)", ylabel="true reward of S\nbetter  →")
ax.set(xlim=(-0.2, 1.35), ylim=(0, 1), xticks=taus)
sns.despine()

# %% [markdown]
# Lines are means, bands their 95 % intervals. Where nothing misled S, cooling takes it from 0.74 to 0.94. In a world of such prompts only, an aligned model could not be told from a cold one. On misled prompts cooling
# makes it worse, from 0.48 to 0.39. On all of them together the best temperature stops at 0.69. This number is a control for whatever training brings: S at its best temperature. The [demo](demo.ipynb) and the [experiments of the protocol](experiments/protocol.ipynb) carry it.

# %%
assert means["all"].max() < 0.75
assert means["other"][0] > 0.9
assert means["misled"][0] < 0.45 < means["misled"][1.0]
means.round(2)

# %% [markdown]
# ## Preferences from the model itself
#
# Now the comparisons. Let S answer one prompt twice. Someone says which answer is better: that one is called *chosen*, the other *rejected*, and the two with their prompt are a *preference pair*. Which of the two was chosen is the pair's *label*.
#
# People do not always agree on labels, so ours are noisy, too. The larger the difference of the rewards, the surer the better answer wins. The usual model for this is *Bradley-Terry*:
#
# $$P(y \succ y' \mid x) = \sigma\big(k\,(r(x,y) - r(x,y'))\big), \qquad k = 6. \tag{1}$$
#
# In words: the probability that $y$ is chosen over $y'$, for the prompt $x$, is a function of the difference of their rewards $r$. The function $\sigma(z) = 1/(1+e^{-z})$, the *sigmoid*, turns any number into a probability: 0 becomes one half. The scale $k$ says how reliable
# the labels are. So labels here are wrong now and then, in a way the world knows.
#
# Keep this $k$ in mind. Later chapters train with a number $\beta$ that says how strongly the model is held back to S. What counts there is $k/\beta$, as [chapter 03](03_loss.ipynb) shows. So a $\beta$ means nothing without its $k$.

# %%
#| export
K = 6.0 # scale of Bradley-Terry in the tiny world

def _turn(role, text): return [dict(role=role, content=text)]

def make_pairs(
    model,           # that answers twice
    tokenizer,       # of the model
    prompts: list,   # of this world
    seed: int,       # of the answers and of the labels
    k: float=K,      # scale of Bradley-Terry
) -> list[dict]:     # rows of messages: prompt, chosen, rejected; and `flipped`: the better one was rejected
    """Two samples of the model per prompt, labelled by Bradley-Terry on the true reward.
    Equal samples are dropped."""
    first = respond(model, tokenizer, prompts, seed=2 * seed)
    second = respond(model, tokenizer, prompts, seed=2 * seed + 1)
    rng = random.Random(seed)
    rows = []
    for p, y, z in zip(prompts, first, second):
        gap = true_reward(p, y) - true_reward(p, z)
        coin = rng.random()                          # one per prompt, also where the pair is dropped
        if y == z: continue
        y_wins = coin < 1 / (1 + math.exp(-k * gap)) # (1)
        chosen, rejected = (y, z) if y_wins else (z, y)
        rows.append(dict(
            prompt=_turn("user", p),
            chosen=_turn("assistant", chosen),
            rejected=_turn("assistant", rejected),
            flipped=gap != 0 and y_wins != (gap > 0),
        ))
    return rows


# %% [markdown]
# The same 300 prompts with three values of $k$. At $k=0$ a label is a coin flip; at $k=100$ none of these is wrong.

# %%
def flipped_share(k):
    pairs = make_pairs(S, tok, w.validation, seed=3, k=k)
    return float(np.mean([row["flipped"] for row in pairs]))

by_k = {k: round(flipped_share(k), 2) for k in (0, 6, 100)}
assert by_k[0] > by_k[6] > by_k[100] == 0
by_k


# %% [markdown]
# With $k=0$ this is less than one half, because pairs of equal rewards have no wrong label.
#
# ### Three sources
#
# Three *sources* of pairs differ in one thing only: how many of their prompts are misled. Where the greedy answer of S is right, S agrees with most labels
# before any training (easy). Where it is wrong, S disagrees (hard). `SOURCES` above has the shares.

# %%
#| export
def source_prompts(
    n: int,             # how many
    share: float,       # of them are misled, in [0, 1]
    rng: random.Random, # draws them; is moved on
    taken=(),           # prompts that may not come again
) -> list[str]:         # n distinct prompts of the split "preference", mixed
    "n preference prompts of which `share` are misled, none of them `taken`."
    hard = round(share * n)

    def draw(count, kind):
        return make_prompts(count, "preference", rng, keep=lambda p: misled(p) == kind and p not in taken)

    prompts = draw(hard, True) + draw(n - hard, False)
    return rng.sample(prompts, n)


# %%
for name, share in SOURCES.items():
    drawn = source_prompts(20, share, random.Random(0))
    assert sum(map(misled, drawn)) == round(20 * share)
    print(name, drawn[:4])

# %% [markdown]
# The sources as they lie in `data/`, and the first of their pairs. Of 800 prompts a source keeps about 500: on the others S gave the same answer twice.

# %%
sources = {}
for name, file in w.sources.items():
    sources[name] = [json.loads(line) for line in Path(file).read_text().splitlines()]
    of_source = [row["prompt"][0]["content"] for row in sources[name]]
    assert abs(len(of_source) - 500) < 20
    assert abs(np.mean([misled(p) for p in of_source]) - SOURCES[name]) < 0.03
sources["primer"][0]


# %% [markdown]
# By (1) the worse response is chosen with probability $\sigma(-k\,\Delta r)$ where the rewards are a gap $\Delta r$ apart. So we expect the flipped labels among close pairs. Between equals the coin is fair, and no label is wrong. Is it so?

# %%
def gap(row):
    p = row["prompt"][0]["content"]
    chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
    return abs(true_reward(p, chosen) - true_reward(p, rejected))

rows = [(gap(row), row["flipped"]) for pairs in sources.values() for row in pairs]
labels = pd.DataFrame(rows, columns=["gap", "flipped"])
expected = torch.sigmoid(-K * torch.tensor(labels["gap"])).numpy()
labels["by (1)"] = np.where(labels["gap"] > 0, expected, 0.0)

# %%
ranges = pd.cut(labels.pop("gap"), [-1, 0, 0.25, 0.5, 1], labels=["0", "to 0.25", "to 0.5", "to 1"])
by_gap = labels.groupby(ranges, observed=True)
flips = by_gap.mean()
flips["pairs"] = by_gap.size()
error = (flips["by (1)"] * (1 - flips["by (1)"]) / flips["pairs"]) ** 0.5 # standard error of the share
assert (abs(flips["flipped"] - flips["by (1)"]) <= 2 * error).all()
flips.round(3)


# %% [markdown]
# The flipped labels are where (1) puts them, to within what chance allows.
#
# ## A world one can list
#
# The chapters that derive DPO make exact statements: "this is the best model", "these two models are equal". To check such a statement, one must sum over *all* responses to a prompt. There are far too many here: of eight
# tokens one can make more than a trillion.
#
# So here is a second world, small enough to list. It has two prompts and fourteen responses: all strings of one to three letters from `ab`. There is no network in it. A model is just a table: one probability for each
# response to each prompt. In this book such a rule for answering, table or network, is called a *policy*. The base model S of this world is a table of random probabilities. We write $S(y|x)$ for the probability of the response $y$ when the prompt is $x$.
#
# Each response also has four *features*: does it start with a, does it end with a, how long is it, is it sorted? They are the same for both prompts. A policy that is a table can change its answers to one prompt and keep
# those to the other. A policy that sees features only must move both together, as a network does in part. [Chapter 03](03_loss.ipynb) adds such features to the table, and asks what training on one prompt then does to the other.

# %%
#| export
@dataclass
class EnumerableWorld:
    "Two prompts, every response."
    prompts: list    # 2 texts
    responses: list  # n = 14 texts
    reward: Tensor   # (2, n) true reward, in [0, 1]
    log_base: Tensor # (2, n) log S(y|x), nats
    features: Tensor # (n, 4) starts with a, ends with a, length, is sorted

def enumerable_world(
    seed: int=0, # of S
) -> EnumerableWorld:
    "The enumerable world, in float64; the base model S is drawn from a seed."
    prompts = ["reverse ab", "sort ba"]
    responses = ["".join(letters) for n in (1, 2, 3) for letters in product("ab", repeat=n)]
    reward = [[true_reward(p, y) for y in responses] for p in prompts]
    features = []
    for y in responses:
        is_sorted = list(y) == sorted(y)
        features.append([y[0] == "a", y[-1] == "a", len(y), is_sorted])
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, len(responses), dtype=torch.float64, generator=g)
    return EnumerableWorld(
        prompts=prompts,
        responses=responses,
        reward=torch.tensor(reward, dtype=torch.float64),
        log_base=logits.log_softmax(-1),
        features=torch.tensor(features, dtype=torch.float64),
    )


# %% [markdown]
# The whole world on one page.

# %%
ew = enumerable_world()
assert ew.reward[0, ew.responses.index("ba")] == 1
assert ew.reward[1, ew.responses.index("ab")] == 1
whole = torch.cat([ew.reward, ew.log_base.exp()]).round(decimals=2)
names = pd.MultiIndex.from_product([["true reward", "S(y|x)"], ew.prompts])
pd.DataFrame(whole.tolist(), columns=ew.responses, index=names)

# %% [markdown]
# Read the two rows of rewards: the best answer to `reverse ab` is `ba`, and to `sort ba` it is `ab`. S knows nothing of this. It gives most of its probability to other strings, because its table is random.
#
# A mean over all responses is now a sum, and nothing is left to luck. The mean reward of S, for each prompt:

# %%
assert torch.allclose(ew.log_base.exp().sum(1), torch.ones(2, dtype=torch.float64))
mean_reward = (ew.log_base.exp() * ew.reward).sum(1)
dict(zip(ew.prompts, mean_reward.round(decimals=3).tolist()))

# %% [markdown]
# ## Is it still the same world?
#
# *You may skip this section and go on at "What this world does not show". It is about machinery: how the world was made, and how your copy of it is checked.*
#
# All numbers of this book were measured on one frozen world. Its texts come from Python's `random`, which draws the same everywhere. Trained weights do not travel like this: the same training ends in other bits on another kind of CPU. So S is stored in
# `data/`. The pairs are sampled from the stored S in float64, where rounding is too small to change a sample.
#
# ### Texts and pairs

# %%
#| export
SIZES = dict(sft=16000, source=800, validation=300, test=600) # prompts

def world_texts(
    seed: int=0, # of every draw
) -> dict:       # sft: (prompt, demonstration) rows; sources: name -> prompts; validation, test: prompts
    "Every text of the world that does not come from a model."
    rng = random.Random(seed)
    demos = [(p, demonstration(p, rng)) for p in make_prompts(SIZES["sft"], "sft", rng)]
    sources, taken = {}, set()
    for name, share in SOURCES.items():
        sources[name] = source_prompts(SIZES["source"], share, rng, taken)
        taken |= set(sources[name])
    validation = make_prompts(SIZES["validation"], "validation", rng)
    test = make_prompts(SIZES["test"], "test", rng)
    return dict(sft=demos, sources=sources, validation=validation, test=test)

def world_pairs(
    model,       # S
    tokenizer,   # of S
    texts: dict, # from `world_texts`
    seed: int=0, # of the first source; the next have the next
) -> dict[str, list]: # name -> rows of `make_pairs`
    "The preference sources of the world, sampled from `model` in float64."
    precise = copy.deepcopy(model).double()
    pairs = {}
    for i, (name, prompts) in enumerate(texts["sources"].items()):
        pairs[name] = make_pairs(precise, tokenizer, prompts, seed=seed + i)
    return pairs


# %% [markdown]
# No prompt occurs twice, neither within a part of the world nor in two of them, and each is in its split.

# %%
texts = world_texts()
parts = {
    "sft": [p for p, _ in texts["sft"]],
    **texts["sources"],
    "validation": texts["validation"],
    "test": texts["test"],
}
used = [p for prompts in parts.values() for p in prompts]
assert len(set(used)) == len(used)
for name, prompts in parts.items():
    split = "preference" if name in SOURCES else name
    assert all(split_of(p) == split for p in prompts)
for name, rows in sources.items():
    assert {row["prompt"][0]["content"] for row in rows} <= set(texts["sources"][name])
{name: len(prompts) for name, prompts in parts.items()}


# %% [markdown]
# ### Hashes
#
# What was frozen is recognised by a short hash: of the JSON of texts and pairs, and of the file of weights. A hash changes when one letter changes. So a world with the same hashes is the same world, and the numbers measured on it may be compared.

# %%
#| export
def content_hash(
    data, # anything JSON can hold
) -> str:
    "sha256 of the canonical JSON, 16 hex digits."
    text = json.dumps(data, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

def _file_hash(path): return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


# %%
assert content_hash(dict(a=1, b=2)) == content_hash(dict(b=2, a=1))    # the order of keys is no content
assert content_hash(dict(a=1, b=2)) != content_hash(dict(a=2, b=1))
assert content_hash(texts) == w.manifest["texts"]
assert _file_hash(Path(w.base) / "model.safetensors") == w.manifest["model"]
w.manifest["texts"], w.manifest["model"]

# %% [markdown]
# ### Training S
#
# From some seeds, twelve epochs teach next to nothing. Such an S would write pairs without sense. So fine-tuning goes on in further rounds, until S has learned the rules, right and wrong. World 0, the one of the book, needs one round.

# %%
#| export
LEARNED = 0.55 # mean true reward of sampled answers to validation prompts

def train_base(
    texts: dict,   # from `world_texts`
    tokenizer,     # from `make_tokenizer`
    seed: int=0,   # of the weights and of the order of rows
    rounds: int=4, # at most, of twelve epochs each
):                 # S, in eval mode
    """S, trained with one thread, so that the result does not depend on how many there are.
    Raises RuntimeError where so many rounds teach it too little."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = make_model(tokenizer, seed=seed)
    for i in range(rounds):
        model = sft(model, tokenizer, texts["sft"], seed=seed + 1000 * i)
        rewards = true_rewards(model, tokenizer, texts["validation"])
        got = torch.tensor(rewards, dtype=torch.float64).mean().item()
        if got >= LEARNED: break
    torch.set_num_threads(threads)
    if got < LEARNED:
        raise RuntimeError(f"world {seed}: after {rounds} rounds S has a true reward of {got:.2f}; "
                           f"{LEARNED} is asked for")
    return model


# %% [markdown]
# 64 rows are too few, and one round is all they get:

# %%
few = dict(sft=texts["sft"][:64], validation=texts["validation"][:50])
complaint(train_base, few, tok, rounds=1)


# %% [markdown]
# ### Freezing
#
# `freeze_world` writes a world to a folder: S, the pairs, the prompts, and a *manifest* with all hashes. It also notes how good each skill of S is, and on which machine S was trained.

# %%
#| export
def freeze_world(
    folder: Path,      # where to; made if it does not exist
    seed: int=0,       # 0: the world of the book; others are worlds like it
    train=train_base,  # (texts, tokenizer, seed) -> S
):
    "Build a world from nothing and write it to a folder, with a manifest."
    folder = Path(folder)
    texts, tok = world_texts(seed), make_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    model = train(texts, tok, seed)
    model.save_pretrained(folder / "S")
    tok.save_pretrained(folder / "S")

    stored = AutoModelForCausalLM.from_pretrained(folder / "S")
    pairs = world_pairs(stored, tok, texts, 100 * seed)
    for name, rows in pairs.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))

    prompts = {split: texts[split] for split in ("validation", "test")}
    (folder / "prompts.json").write_text(json.dumps(prompts) + "\n")

    manifest = dict(
        texts=content_hash(texts),
        pairs={name: content_hash(rows) for name, rows in pairs.items()},
        model=_file_hash(folder / "S" / "model.safetensors"),
        greedy=skill_table(model, tok, texts["test"], 0)["exact"].round(4).to_dict(),
        cpu=torch.backends.cpu.get_cpu_capability(),
        threads=1,
        k=K,
        versions={package: version(package) for package in ("torch", "transformers", "tokenizers")},
    )
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


# %% [markdown]
# We freeze the world once more, with the S we have instead of a new training. Texts, pairs and weights must be the same to the letter.

# %%
with tempfile.TemporaryDirectory() as folder:
    freeze_world(folder, train=lambda texts, tokenizer, seed: S)
    again = load_world(folder)
    written = sorted(path.name for path in Path(folder).iterdir())
for what in ("texts", "pairs", "model"):
    assert again.manifest[what] == w.manifest[what], what
assert again.test == w.test
assert {name: content_hash(rows) for name, rows in sources.items()} == w.manifest["pairs"]
written

# %%
{what: w.manifest[what] for what in ("texts", "pairs", "model")}


# %% [markdown]
# ### The whole check
#
# `make world` does everything again, the training of S included, and compares. Texts and pairs must agree to the letter anywhere. The retrained S agrees to the bit only where CPU, torch
# and transformers are the same. Elsewhere training amplifies the rounding: about one in six greedy answers turns right or wrong. On
# 150 prompts this is a standard error of three to four points. So there every skill must be within twelve points, and the check says by how much they differ, and why.

# %%
#| export
def _elsewhere(manifest) -> str:
    "Why weights trained here may have other bits than those of the frozen world."
    here = dict(
        cpu=torch.backends.cpu.get_cpu_capability(),
        torch=version("torch"),
        transformers=version("transformers"),
    )
    then = dict(manifest["versions"], cpu=manifest["cpu"])
    other = []
    for what in here:
        if here[what] != then[what]: other.append(f"{what} {here[what]}, frozen with {then[what]}")
    if other: return "; ".join(other)
    return f"torch and transformers are the same, and of the CPU no more is known than {then['cpu']}"


# %%
elsewhere = w.manifest | dict(cpu="another kind")
assert "frozen with another kind" in _elsewhere(elsewhere)


# %%
#| export
def check_world() -> list[str]: # what was checked, one sentence each
    "Rebuild the world and compare it with the frozen one. Raises AssertionError on a difference."
    w, texts, tok = load_world(), world_texts(), make_tokenizer()
    frozen = w.manifest

    assert content_hash(texts) == frozen["texts"], "texts differ"
    said = [f"texts: same hash {frozen['texts']}"]

    base, _ = load_base(w)
    for name, rows in world_pairs(base, tok, texts).items():
        assert content_hash(rows) == frozen["pairs"][name], f"pairs of {name} differ"
    said.append(f"pairs, from the frozen S: same hashes {frozen['pairs']}")

    model = train_base(texts, tok)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        got = _file_hash(Path(folder) / "model.safetensors")
    if got == frozen["model"]: return said + [f"model, retrained: same hash {got}"]

    now = skill_table(model, tok, texts["test"], 0)["exact"]
    off = max(abs(now[skill] - share) for skill, share in frozen["greedy"].items())
    what = f"other hash {got}, skills at most {100 * off:.1f} points off ({_elsewhere(frozen)})"
    assert off <= 0.12, f"model: {what}; 12 are allowed"
    return said + [f"model, retrained: {what}"]


# %% [markdown]
# Some cells of this book need what is not there on every machine: a large model, a file of pairs, some minutes. They are marked `#| slow`, and the tests leave them out. Somebody who runs a whole page must not be stopped by them. So each stands in a `with` that lets nothing through: where its cell cannot be run, it says why, and what the cell showed where it was run. Authors set `SLOW`, and then it fails like any other cell.

# %%
#| export
@contextmanager
def skipped_without(
    needed: str, # what the cell needs
    showed: str, # what it showed where it was run
    strict: bool=None, # fail all the same; None: where SLOW is set
):
    "Run a slow cell; where it cannot be run, say in one line why, and what it showed."
    if strict is None: strict = bool(os.environ.get("SLOW"))
    threads = torch.get_num_threads()
    try: yield
    except Exception as e:
        if strict: raise
        reason = (str(e).splitlines() or [""])[0] or type(e).__name__
        print(f"not run here: {reason[:120].rstrip('.')}. It needs {needed}. Where it was run, it showed: {showed}")
    finally: torch.set_num_threads(threads)


# %%
with skipped_without("a connection", "the model's size", strict=False):
    raise OSError("the hub does not answer")

# %% [markdown]
# Is it still the same world here?

# %%
#| slow
with skipped_without(
    "some minutes, and a CPU like the one on which the world was frozen",
    "the same texts and pairs; S, trained again, at most 5 points off",
):
    display(check_world())

# %% [markdown]
# This answer comes from a CPU other than the one on which the world was frozen, though both are of the kind AVX512.
#
# From the command line, `python -m sdpo_nb.world` makes this check, and with `--freeze` it builds the world anew first.

# %%
#| export
if __name__ == "__main__" and __spec__:
    import sys
    if "--freeze" in sys.argv: freeze_world(Path("data/world"))
    print("\n".join(check_world()))

# %% [markdown]
# ## What this world does not show
#
# - There is one right answer to each prompt. Real prompts have many good answers, and people disagree about what makes them good.
# - All answers are short. Effects of length, which are strong in real data, are nearly absent here.
# - The two answers of a pair come from S itself. Real pairs often come from other models, and S may find both of them unlikely.
# - A model of 337 thousand weights learns in seconds. How much one must train, and with which learning rate, does not carry over to real models.
#
# So this world can show that a method does *not* do what it promises, and it can show why. Whether a method helps a real model is a question for real models.
#
# ## What you now have
#
# - A base model S in Hugging Face format, whose greedy answers are wrong where it was misled.
# - A true reward for any answer, and prompts that no training has seen.
# - Three sources of preference pairs, from easy to hard, with labels whose errors are known.
# - A world of two prompts and fourteen responses, for exact statements.
# - Hashes that say it is the same world on your machine.
#
# ## Questions to test yourself
#
# 1. Why would noisy demonstrations alone make every method look good?
#
# <details><summary>Answer</summary>
#
# The likeliest token would still be the right one. Then every method that only makes the model more certain raises the reward, and so does a lower temperature.
#
# </details>
#
# 2. Why is it still worth comparing two wrong answers?
#
# <details><summary>Answer</summary>
#
# Because the reward gives partial credit: one of the two is nearer to the right answer, and the label says which, more often than not.
#
# </details>
#
# 3. What would a preference label mean if $k$ were 0, or 100?
#
# <details><summary>Answer</summary>
#
# At 0 nothing: it is a coin flip. At 100 the better answer is nearly always chosen, also where the difference is small; so the label says next to nothing about how large it is. ($\sigma(100\,d)$ is above 0.99 from a difference $d$ of 0.05 on.)
#
# </details>
#
# 4. Why are the labels of a hard source not noisier than those of an easy one?
#
# <details><summary>Answer</summary>
#
# Labels come from the true reward and (1), in every source. What is hard about a hard source is that S disagrees with its labels, not that the labels are wrong.
#
# </details>
#
# ## Try this
#
# - Ask S for strings of seven and eight letters, longer than any it has seen. Give `respond` a larger `max_new`, or it cuts the answers.
#
# <details><summary>What you should see</summary>
#
# No answer is right by either rule, and none has the right length: S stops after six letters at most, often after leaving some out. With six letters, the longest it has seen, it follows one of the two rules in almost 90 of 100 cases.
#
# </details>
#
# - Call `flipped_share(1)`. Before you look: more or fewer flipped labels than at $k=6$?
#
# <details><summary>What you should see</summary>
#
# 0.32 instead of 0.07. The smaller $k$, the less a difference of rewards decides, and at 0 it decides nothing.
#
# </details>
