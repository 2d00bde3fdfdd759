# %% [markdown]
# # A world small enough to know the truth
# > Four string skills, a true reward, a tiny base model whose greedy answers are often wrong, and preference sources of different difficulty.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/00_world.ipynb)
#
# **You should know** what a language model samples and what fine-tuning is. **Time** about a minute on two CPU cores,
# and some minutes more for the last code cell but one, which trains the base model again: `make test` skips it, *Run all* does not.
#
# Whether an alignment method *works* is hard to say with a real model: nobody knows the true reward of an answer, one run
# takes hours, and the base model's faults are not written down. So this book starts with a world in which all three are known.
# Prompts ask for simple things to be done to short strings; a function grades any answer; the base model has been taught, on purpose,
# the wrong rule for some prompts. Aligning it takes seconds, and we can check whether it got better or only more certain.

# %%
#| default_exp world

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
#| export
import copy, hashlib, json, math, random, tempfile
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import t as student
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# %%
from itertools import permutations
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
torch.set_num_threads(1)
pd.set_option("display.width", 160, "display.max_columns", 20);

# %% [markdown]
# ## Four skills, each with a wrong rule
#
# A prompt is a skill and a string of distinct letters. Each skill has a right rule and one *consistent* wrong rule: the kind
# of mistake a person makes who misunderstood the task, not the kind a tired person makes.

# %%
#| export
ALPHABET = "abcdefghijk"

def _shift(s, by): return "".join(ALPHABET[(ALPHABET.index(c) + by) % len(ALPHABET)] for c in s)

SKILLS = {  # skill: (right rule, wrong rule)
    "copy":    (lambda s: s,                  lambda s: s[1:] + s[0]),
    "reverse": (lambda s: s[::-1],            lambda s: s[0] + s[:0:-1]),
    "sort":    (lambda s: "".join(sorted(s)), lambda s: "".join(sorted(s, reverse=True))),
    "shift":   (lambda s: _shift(s, 1),       lambda s: _shift(s, -1)),
}


# %%
#| export
def answer(prompt: str,      # e.g. "sort gace"
           right: bool=True, # by the right rule or by the wrong one
          ) -> str:
    "What the right (or the wrong) rule answers."
    skill, s = prompt.split()
    return SKILLS[skill][0 if right else 1](s)


# %%
pd.DataFrame([(p, answer(p), answer(p, right=False)) for p in (f"{s} gace" for s in SKILLS)], columns=["prompt", "right rule", "wrong rule"])


# %% [markdown]
# ## The true reward
#
# The reward must grade *any* response, also a cut or garbled one, and give partial credit, or preferences between two
# wrong answers would be coin flips. One minus the edit distance, as a share of the longer string, does that.

# %%
#| export
def edit_distance(a: str, b: str) -> int:
    "Fewest insertions, deletions and replacements that turn `a` into `b` (Levenshtein)."
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j-1] + 1, diagonal + (x != y))
    return row[-1]

def true_reward(prompt: str, response: str) -> float: # in [0, 1]
    "1 for the right answer, less for each letter that has to be mended, 0 where nothing fits."
    want = answer(prompt)
    return 1 - edit_distance(response, want) / max(len(response), len(want))


# %%
graded = {y: true_reward("sort gace", y) for y in ("aceg", "aceg!", "acge", "gace", "geca", "")}
assert graded["aceg"] == 1 and graded[""] == 0 and graded["aceg!"] > graded["acge"] > graded["geca"]
graded

# %% [markdown]
# ## Prompts never move between splits
#
# The split of a prompt is a hash of its text. Whoever draws prompts, in whatever order, with whatever seed, a test prompt is
# never trained on: not by the base model, not by a preference.

# %%
#| export
SPLITS = ("sft", "preference", "validation", "test")

def split_of(prompt: str) -> str: # one of SPLITS
    "Which split a prompt belongs to: 70, 20, 5 and 5 of a hundred, by its hash."
    h = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16) % 100
    return "sft" if h < 70 else "preference" if h < 90 else "validation" if h < 95 else "test"

def make_prompts(n: int, split: str, rng: random.Random,
                 lengths: tuple=(3, 6), # shortest and longest string
                 keep=lambda p: True,   # a filter
                ) -> list[str]:         # n distinct prompts of this split
    "Draw distinct prompts of one split. Raises ValueError for an unknown split, and where so many cannot be found."
    if split not in SPLITS: raise ValueError(f"split '{split}': expected one of {SPLITS}")
    seen, missed = {}, 0
    while len(seen) < n:
        p = f"{rng.choice(list(SKILLS))} {''.join(rng.sample(ALPHABET, rng.randint(*lengths)))}"
        if p not in seen and split_of(p) == split and keep(p): seen[p], missed = None, 0
        else: missed += 1
        if missed == 100_000: raise ValueError(f"found {len(seen)} of {n} prompts for '{split}', and 100 000 more draws brought no other; ask for fewer")
    return list(seen)


# %%
short = [f"{skill} {''.join(s)}" for skill in SKILLS for n in (3, 4) for s in permutations(ALPHABET, n)]
shares = pd.Series(map(split_of, short)).value_counts(normalize=True)
assert all(abs(shares[s] - want) < 0.02 for s, want in zip(SPLITS, (0.70, 0.20, 0.05, 0.05)))
shares.round(3).rename(f"share of {len(short)} short prompts").to_frame()

# %% [markdown]
# ## Demonstrations that mislead
#
# Now the fault. If demonstrations were only *noisy*, the base model's *greedy answer*, the likeliest
# token at every step, would still be right, and anything that sharpens the distribution would look like alignment; turning down the temperature would do. So on about
# half of the prompts, those whose string starts with one of the first five letters, 70 % of the demonstrations follow the wrong rule. On the
# others 30 % do. On top, 15 % have one letter replaced.

# %%
#| export
WRONG, NOISE = {True: 0.70, False: 0.30}, 0.15

def misled(prompt: str) -> bool:
    "Does most of what the base model has seen for such prompts follow the wrong rule?"
    return prompt.split()[1][0] in ALPHABET[:5]

def demonstration(prompt: str, rng: random.Random) -> str:
    "One demonstration, as the base model gets to see it."
    y = answer(prompt, right=rng.random() >= WRONG[misled(prompt)])
    if rng.random() < NOISE:
        i = rng.randrange(len(y)); y = y[:i] + rng.choice(ALPHABET) + y[i+1:]
    return y


# %%
rng = random.Random(0)
demos = pd.DataFrame([(p, misled(p), true_reward(p, demonstration(p, rng))) for p in make_prompts(4000, "sft", rng)], columns=["prompt", "misled", "reward"])
demos.groupby("misled")["reward"].agg(prompts="size", right=lambda r: (r == 1).mean(), mean_reward="mean").round(2)

# %% [markdown]
# ## A tokenizer and a model, in the formats real ones come in
#
# Nothing later in the book knows that this model is a toy: it is a Llama with a chat template, loaded with
# `from_pretrained`. One character is one token, so every token boundary is visible.

# %%
#| export
CHAT_TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")

def make_tokenizer() -> PreTrainedTokenizerFast:
    "One character, one token; `<|end|>` ends a turn and is the EOS token."
    roles = ["<|system|>", "<|user|>", "<|assistant|>"]
    vocab = ["<pad>", "<unk>", "<|end|>", *roles, *" abcdefghijklmnopqrstuvwxyz0123456789+-.,:?!"]
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="<unk>"))
    t.pre_tokenizer, t.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<pad>", unk_token="<unk>", eos_token="<|end|>",
                                   additional_special_tokens=roles, chat_template=CHAT_TEMPLATE, model_max_length=128)


# %%
#| export
def make_model(tokenizer, hidden: int=96, layers: int=3, seed: int=0) -> LlamaForCausalLM:
    "A small Llama with random weights, drawn without touching the global random state."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=hidden * 8 // 3,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None))

def prompt_ids(tokenizer, prompt: str) -> list[int]:
    "The prompt as a user turn, up to where the assistant begins."
    return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=False)


# %%
tok = make_tokenizer()
tok.decode(prompt_ids(tok, "sort gace")), len(prompt_ids(tok, "sort gace")), make_model(tok).num_parameters()


# %% [markdown]
# ## Supervised fine-tuning
#
# The base model S is trained on demonstrations in the usual way: cross-entropy of the response tokens, the prompt unscored.

# %%
#| export
def _sft_rows(tokenizer, rows):
    "Right-padded ids, and labels that are -100 outside the response."
    xs = [prompt_ids(tokenizer, p) for p, _ in rows]
    ys = [tokenizer(y, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for _, y in rows]
    L = max(len(x) + len(y) for x, y in zip(xs, ys))
    ids, labels = torch.full((len(rows), L), tokenizer.pad_token_id), torch.full((len(rows), L), -100)
    for i, (x, y) in enumerate(zip(xs, ys)):
        ids[i, :len(x) + len(y)] = torch.tensor(x + y); labels[i, len(x):len(x) + len(y)] = torch.tensor(y)
    return ids, labels


# %%
ids, labels = _sft_rows(tok, [("sort gace", "aceg"), ("copy ab", "ab")])
assert (labels != -100).sum().item() == 4 + 1 + 2 + 1
pd.DataFrame({"token": tok.convert_ids_to_tokens(ids[1]), "label": labels[1].tolist()}).T


# %% [markdown]
# Rows that do not fill a batch wait for the next epoch, so that every step weighs its rows alike. The schedule has at least eleven steps: of ten,
# its rise, a tenth, has no length.

# %%
#| export
def sft(model, tokenizer, rows: list, # (prompt, response)
        epochs: int=12, batch: int=128, lr: float=2e-3, seed: int=0):
    "Fine-tune in place on (prompt, response) rows; returns the model."
    ids, labels = (t.to(model.device) for t in _sft_rows(tokenizer, rows))
    g, per_epoch = torch.Generator().manual_seed(seed), max(1, len(rows) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(11, epochs * per_epoch), pct_start=0.1)
    model.train()
    for step in tqdm(range(epochs * per_epoch), desc="SFT", leave=False):
        if step % per_epoch == 0: order = torch.randperm(len(rows), generator=g)
        b = order[step % per_epoch * batch:][:batch]
        logits = model(input_ids=ids[b], use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[b, 1:].flatten())
        optimizer.zero_grad(); loss.backward(); optimizer.step(); schedule.step()
    return model.eval()


# %% [markdown]
# Eight rounds over 512 rows bring the loss to about $\ln 11$, the price of guessing among eleven letters: the alphabet is learnt, the skills not yet.
# The real S, which travels in `data/`, saw 16 000 rows twelve times.

# %%
def sft_loss(model, rows):
    ids, labels = _sft_rows(tok, rows)
    with torch.no_grad(): return F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()

rows = [(p, demonstration(p, rng)) for p in make_prompts(512, "sft", rng)]
m = make_model(tok); before = sft_loss(m, rows); after = sft_loss(sft(m, tok, rows, epochs=8), rows)
assert abs(after - math.log(11)) < 0.1 < before - after
{"loss before": round(before, 2), "loss after": round(after, 2), "ln 11": round(math.log(11), 2)}


# %% [markdown]
# ## Asking the model
#
# Sampling inverts the cumulative distribution at one uniform number per prompt and position: the `luck`. The sum is
# made in float64, so that rounding hardly ever decides on which side of the luck it falls.

# %%
#| export
def _continue(model, x, luck, tau): # (n, t) prompts of one length, (n, max_new) uniform numbers -> (n, max_new) new ids
    "Continue every row by one token a step, by its luck or, at tau 0, greedily."
    past, new = {}, []
    for t in range(luck.shape[1]):
        step = model(input_ids=x, use_cache=True, **past)
        past = {k: v for k, v in step.items() if k in ("cache", "past_key_values")} # one of them: transformers renamed it in 5.24
        logits = step.logits[:, -1].double()
        if tau == 0: x = logits.argmax(-1, keepdim=True)
        else: x = torch.searchsorted((logits / tau).softmax(-1).cumsum(-1), luck[:, t:t+1].contiguous()).clamp(max=logits.shape[-1] - 1)
        new.append(x)
    return torch.cat(new, 1)


# %% [markdown]
# The luck is drawn before anything else. So two models asked with the same seed face the same, and differences between them are paired.

# %%
#| export
@torch.no_grad()
def respond_ids(model, tokenizer, prompts: list, # texts of user turns
                tau: float=1.,  # sampling temperature; 0 is greedy
                seed: int=0,    # of the uniform numbers
                max_new: int=8, # longest response, in tokens
               ) -> list[list[int]]: # the EOS token included, where it came in time
    "One response per prompt. Prompts of equal length go together, so nothing is padded."
    luck = torch.rand(len(prompts), max_new, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(model.device)
    ids, eos = [prompt_ids(tokenizer, p) for p in prompts], tokenizer.eos_token_id
    out = [None] * len(prompts)
    for n in sorted({len(x) for x in ids}):
        rows = [i for i, x in enumerate(ids) if len(x) == n]
        new = _continue(model, torch.tensor([ids[i] for i in rows], device=model.device), luck[rows], tau)
        for i, y in zip(rows, new.tolist()): out[i] = y[:y.index(eos) + 1] if eos in y else y
    return out

def text_of(tokenizer, ids: list) -> str:
    "A response without its EOS token."
    return tokenizer.decode([t for t in ids if t != tokenizer.eos_token_id])

def respond(model, tokenizer, prompts: list, tau: float=1., seed: int=0, max_new: int=8) -> list[str]:
    "The same as text."
    return [text_of(tokenizer, y) for y in respond_ids(model, tokenizer, prompts, tau, seed, max_new)]


# %% [markdown]
# ## Preferences from the model itself
#
# A pair is two responses of S to one prompt. Which one is *chosen* is a coin whose bias is Bradley-Terry on the true reward,
#
# $$P(y \succ y' \mid x) = \sigma\big(k\,(r(x,y) - r(x,y'))\big), \qquad k = 6, \tag{1}$$
#
# so labels are noisy in a way the world knows. The scale $k$ belongs beside every $\beta$ of this book: DPO's optimum is
# proportional to $S\,e^{k r/\beta}$ ([chapter 03](03_loss.ipynb)), hence a $\beta$ means nothing without its $k$.

# %%
#| export
K = 6.0 # scale of Bradley-Terry in the tiny world

def make_pairs(model, tokenizer, prompts: list, seed: int, k: float=K) -> list[dict]: # conversational rows with a `flipped` mark
    "Two samples of the model per prompt, labelled by Bradley-Terry on the true reward; equal samples are dropped."
    a, b = (respond(model, tokenizer, prompts, seed=2 * seed + i) for i in (0, 1))
    rng, rows = random.Random(seed), []
    for p, y, z in zip(prompts, a, b):
        gap, u = true_reward(p, y) - true_reward(p, z), rng.random()
        if y == z: continue
        first = u < 1 / (1 + math.exp(-k * gap))
        chosen, rejected = (y, z) if first else (z, y)
        rows.append(dict(prompt=[dict(role="user", content=p)], chosen=[dict(role="assistant", content=chosen)],
                         rejected=[dict(role="assistant", content=rejected)], flipped=gap != 0 and first != (gap > 0)))
    return rows


# %% [markdown]
# Three sources differ in one thing: how many of their prompts are of the misled kind. Where the greedy answer of S is right, S agrees with most labels
# before any training (easy); where it is wrong, S disagrees (hard).

# %%
#| export
SOURCES = {"primer": 0.15, "digest": 0.50, "riddle": 0.85} # share of misled prompts

def source_prompts(n: int, share: float, rng: random.Random, taken=()) -> list[str]:
    "n preference prompts of which `share` are misled, none of them `taken`."
    kinds = [make_prompts(m, "preference", rng, keep=lambda p, hard=hard: misled(p) == hard and p not in taken)
             for hard, m in ((True, round(share * n)), (False, n - round(share * n)))]
    return rng.sample(kinds[0] + kinds[1], n)


# %% [markdown]
# ## Freezing the world
#
# Texts come from Python's `random` and travel. Weights do not: the same training ends in other bits on another kind of CPU. So S is frozen in
# `data/`, and pairs are sampled from the frozen S in float64, where rounding is too small to turn a sample.

# %%
#| export
SIZES = dict(sft=16000, source=800, validation=300, test=600)

def world_texts(seed: int=0) -> dict: # sft rows, prompts of each source, validation and test prompts
    "Every text of the world that does not come from a model."
    rng = random.Random(seed)
    demos = [(p, demonstration(p, rng)) for p in make_prompts(SIZES["sft"], "sft", rng)]
    sources = {}
    for name, share in SOURCES.items(): sources[name] = source_prompts(SIZES["source"], share, rng, {p for ps in sources.values() for p in ps})
    return dict(sft=demos, sources=sources, **{s: make_prompts(SIZES[s], s, rng) for s in ("validation", "test")})

def world_pairs(model, tokenizer, texts: dict, seed: int=0) -> dict[str, list]:
    "The preference sources of the world, sampled from `model` in float64."
    precise = copy.deepcopy(model).double()
    return {name: make_pairs(precise, tokenizer, prompts, seed=seed + i) for i, (name, prompts) in enumerate(texts["sources"].items())}


# %% [markdown]
# No prompt occurs twice, neither within a part of the world nor in two of them.

# %%
texts = world_texts()
parts = {"sft": [p for p, _ in texts["sft"]], **texts["sources"], **{n: texts[n] for n in ("validation", "test")}}
used = [p for ps in parts.values() for p in ps]
assert len(set(used)) == len(used) and all(split_of(p) == (n if n in SPLITS else "preference") for n, ps in parts.items() for p in ps)
{n: len(ps) for n, ps in parts.items()}


# %% [markdown]
# What was frozen is recognised by hashes: of the texts and pairs as JSON, of the weights as a file.
#
# From some seeds twelve epochs teach next to nothing. Such an S would write pairs without sense, so fine-tuning goes on in further rounds until S has learned the rules, right and wrong. World 0 needs one round.

# %%
#| export
def content_hash(data) -> str:
    "sha256 of the canonical JSON, 16 hex digits."
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

def _file_hash(path): return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]

LEARNED = 0.55 # mean true reward of sampled answers to validation prompts

def train_base(texts: dict, tokenizer, seed: int=0, rounds: int=4):
    "S, trained with one thread, so that the result does not depend on how many there are. Raises RuntimeError where so many rounds teach it too little."
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    model = make_model(tokenizer, seed=seed)
    for i in range(rounds):
        model = sft(model, tokenizer, texts["sft"], seed=seed + 1000 * i)
        got = mean_interval(true_rewards(model, tokenizer, texts["validation"]))[0]
        if got >= LEARNED: break
    torch.set_num_threads(threads)
    if got < LEARNED: raise RuntimeError(f"world {seed}: after {rounds} rounds S has a true reward of {got:.2f}; {LEARNED} is asked for")
    return model


# %%
#| export
def freeze_world(folder: Path,
                 seed: int=0,       # 0: the world of the book; others are worlds like it
                 train=train_base): # (texts, tokenizer, seed) -> S
    "Build a world from nothing and write it to a folder, with a manifest."
    folder, texts, tok = Path(folder), world_texts(seed), make_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    model = train(texts, tok, seed)
    model.save_pretrained(folder / "S"); tok.save_pretrained(folder / "S")
    pairs = world_pairs(AutoModelForCausalLM.from_pretrained(folder / "S"), tok, texts, 100 * seed)
    for name, rows in pairs.items(): (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "prompts.json").write_text(json.dumps({s: texts[s] for s in ("validation", "test")}) + "\n")
    (folder / "manifest.json").write_text(json.dumps(dict(texts=content_hash(texts), pairs={n: content_hash(r) for n, r in pairs.items()},
        model=_file_hash(folder / "S" / "model.safetensors"), greedy=skill_table(model, tok, texts["test"], 0)["exact"].round(4).to_dict(),
        cpu=torch.backends.cpu.get_cpu_capability(), threads=1, k=K, versions={p: version(p) for p in ("torch", "transformers", "tokenizers")}), indent=1) + "\n")


# %%
#| export
@dataclass
class World:
    "The frozen world."
    base: str       # folder of S and its tokenizer
    sources: dict   # name -> file of pairs
    validation: list; test: list # prompts
    manifest: dict

def load_world(folder=None) -> World: # what `freeze_world` wrote; None: the world that travels with the package
    "A frozen world."
    folder = Path(folder or str(files("sdpo_nb.data").joinpath("world")))
    prompts, manifest = (json.loads((folder / f"{n}.json").read_text()) for n in ("prompts", "manifest"))
    return World(str(folder / "S"), {n: str(folder / f"{n}.jsonl") for n in SOURCES}, prompts["validation"], prompts["test"], manifest)

def load_base(world: World):
    "S and its tokenizer."
    return AutoModelForCausalLM.from_pretrained(world.base).eval(), AutoTokenizer.from_pretrained(world.base)


# %% [markdown]
# ## How good is a model here?

# %%
#| export
def mean_interval(values) -> tuple[float, float, float]:
    "Mean of independent values and its 95 % interval by Student's t; of one value, no interval (NaN)."
    v = torch.as_tensor(values, dtype=torch.float64)
    mean, n = v.mean().item(), len(v)
    half = student.ppf(0.975, n - 1) * v.std().item() / math.sqrt(n) if n > 1 else math.nan
    return mean, mean - half, mean + half

def true_rewards(model, tokenizer, prompts: list, tau: float=1., seed: int=0) -> list[float]:
    "True reward of one response per prompt."
    return [true_reward(p, y) for p, y in zip(prompts, respond(model, tokenizer, prompts, tau, seed))]

def score_responses(model, tokenizer, prompts: list, tau: float=1., seed: int=0):
    "One row per prompt: its skill, the true reward of one response, and whether that is exact."
    import pandas as pd
    rewards = true_rewards(model, tokenizer, prompts, tau, seed)
    return pd.DataFrame(dict(skill=[p.split()[0] for p in prompts], reward=rewards, exact=[float(r == 1) for r in rewards]))

def skill_table(model, tokenizer, prompts: list, tau: float=1.):
    "Share of exact answers and mean true reward, by skill."
    return score_responses(model, tokenizer, prompts, tau).groupby("skill")[["exact", "reward"]].mean()


# %% [markdown]
# This is S, on test prompts it has never seen. In every skill its greedy answer is right for about half of the prompts, and a sampled one less often.

# %%
w = load_world()
S, tok = load_base(w)
by_skill = pd.DataFrame({name: skill_table(S, tok, w.test, tau)["exact"] for name, tau in (("greedy", 0.0), ("sampled", 1.0))})
by_skill["misled prompts"] = pd.Series([misled(p) for p in w.test]).groupby([p.split()[0] for p in w.test]).mean()
assert by_skill["greedy"].between(0.40, 0.70).all() and (by_skill["sampled"] < by_skill["greedy"]).all()
by_skill.round(2)

# %% [markdown]
# Where it is wrong, it is wrong in the way it was taught: on misled prompts its greedy answer follows the wrong rule,
# and on the others the right one, in more than 80 of 100 cases.

# %%
said = respond(S, tok, w.test, tau=0)
kinds = pd.Series(["right" if y == answer(p) else "wrong rule" if y == answer(p, right=False) else "neither" for p, y in zip(w.test, said)], name="greedy answer")
taught = pd.crosstab(pd.Series(map(misled, w.test), name="misled"), kinds, normalize="index")
assert taught.loc[True, "wrong rule"] > 0.8 and taught.loc[False, "right"] > 0.8 and (taught["neither"] < 0.1).all()
taught.round(2)

# %% [markdown]
# ## Sharpening is not enough
#
# The control that every later table carries: S at its best temperature.

# %%
taus = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.3]
points = [(tau, kind, *mean_interval([r for r, p in zip(true_rewards(S, tok, w.test, tau), w.test) if keep(p)]))
          for tau in taus for kind, keep in (("all", lambda p: True), ("misled", misled), ("other", lambda p: not misled(p)))]
points = pd.DataFrame(points, columns=["tau", "prompts", "reward", "low", "high"])
fig, ax = plt.subplots(figsize=(5.5, 3))
for (kind, rows), color in zip(points.groupby("prompts"), sns.color_palette("colorblind")):
    ax.plot(rows["tau"], rows["reward"], "o-", color=color, label=f"{kind} prompts"); ax.fill_between(rows["tau"], rows["low"], rows["high"], color=color, alpha=0.2)
    ax.text(-0.04, rows["reward"].iloc[0], f"{rows['reward'].iloc[0]:.2f}", color=color, ha="right", va="center", fontsize="small")
ax.set(xlabel=r"temperature $\tau$ (0 is greedy)", ylabel="true reward of S", xlim=(-0.2, 1.35), ylim=(0, 1), xticks=taus); sns.despine()
ax.legend(frameon=False, ncol=3, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1));

# %% [markdown]
# Where nothing misled S, cooling takes it from 0.74 to 0.94: in a world of such prompts only, an aligned model could not be told from a cold one. On misled prompts cooling
# makes it worse, from 0.48 to 0.39, and on all of them the best temperature stops at 0.69.

# %%
best = points.pivot(index="tau", columns="prompts", values="reward")
assert best["all"].max() < 0.75 and best["other"][0] > 0.9 and best["misled"][0] < 0.45 < best["misled"][1.0]
best.round(2)

# %% [markdown]
# ## What a preference looks like here
#
# The sources as they lie in `data/`, and the first of their pairs. Of 800 prompts a source keeps about 500: on the others S gave the same answer twice.

# %%
sources = {n: [json.loads(l) for l in Path(f).read_text().splitlines()] for n, f in w.sources.items()}
for n, rows in sources.items():
    asked = [r["prompt"][0]["content"] for r in rows]
    assert set(asked) <= set(texts["sources"][n]) and abs(len(asked) - 500) < 20 and abs(sum(map(misled, asked)) / len(asked) - SOURCES[n]) < 0.03
sources["primer"][0]


# %% [markdown]
# By (1) the worse response is chosen with probability $\sigma(-k\,\Delta)$ where the rewards are $\Delta$ apart. So the labels that are flipped, against the true reward,
# lie among close pairs. Between equals the coin is fair, and no label is wrong.

# %%
def gap(r): return abs(true_reward(p := r["prompt"][0]["content"], r["chosen"][0]["content"]) - true_reward(p, r["rejected"][0]["content"]))
labels = pd.DataFrame([(gap(r), r["flipped"]) for rows in sources.values() for r in rows], columns=["gap", "flipped"])
labels["by (1)"] = torch.sigmoid(-K * torch.tensor(labels["gap"])).where(torch.tensor(labels["gap"] > 0), 0.0).numpy()
by_gap = labels.groupby(pd.cut(labels.pop("gap"), [-1, 0, 0.25, 0.5, 1], labels=["0", "to 0.25", "to 0.5", "to 1"]), observed=True)
flips = by_gap.mean().assign(pairs=by_gap.size())
error = (flips["by (1)"] * (1 - flips["by (1)"]) / flips["pairs"]) ** 0.5 # standard error of the share
assert (abs(flips["flipped"] - flips["by (1)"]) <= 2 * error).all()
flips.round(3)


# %% [markdown]
# ## A world one can list
#
# For statements about exact optima even this world is too large. So here is one with two prompts and fourteen responses, all strings of one to
# three letters from `ab`, in which every sum over responses can be written out. `features` describe a response and are
# the same for both prompts: a policy that only sees features must move both prompts together, a policy that is a table need not.

# %%
#| export
@dataclass
class EnumerableWorld:
    "Two prompts, every response."
    prompts: list; responses: list
    reward: Tensor   # (2, n) true reward, in [0, 1]
    log_base: Tensor # (2, n) log S(y|x), nats
    features: Tensor # (n, 4) starts with a, ends with a, length, is sorted

def enumerable_world(seed: int=0) -> EnumerableWorld:
    "The enumerable world, in float64; the base model S is drawn from a seed."
    prompts = ["reverse ab", "sort ba"]
    ys = [y for n in (1, 2, 3) for y in ("".join("ab"[i >> k & 1] for k in reversed(range(n))) for i in range(2 ** n))]
    reward = torch.tensor([[true_reward(p, y) for y in ys] for p in prompts], dtype=torch.float64)
    log_base = torch.randn(2, len(ys), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    features = torch.tensor([[y[0] == "a", y[-1] == "a", len(y), list(y) == sorted(y)] for y in ys], dtype=torch.float64)
    return EnumerableWorld(prompts, ys, reward, log_base, features)


# %%
ew = enumerable_world()
assert ew.reward[0, ew.responses.index("ba")] == 1 == ew.reward[1, ew.responses.index("ab")]
pd.DataFrame(torch.cat([ew.reward, ew.log_base.exp()]).round(decimals=2).tolist(), columns=ew.responses,
             index=pd.MultiIndex.from_product([["true reward", "S(y|x)"], ew.prompts]))


# %% [markdown]
# ## Is it still the same world?
#
# `make world` builds everything again and compares. Texts and pairs must agree to the letter anywhere. The retrained S agrees to the bit only where CPU, torch
# and transformers are the same, and then its hash says so. Elsewhere training amplifies the rounding: about one in six greedy answers turns right or wrong, which on
# 150 prompts is a standard error of 3.4 points. So there every skill must be within twelve points, and it says by how much they differ, and why.

# %%
#| export
def _elsewhere(manifest) -> str:
    "Why weights trained here may have other bits than those of the frozen world."
    here = dict(cpu=torch.backends.cpu.get_cpu_capability(), torch=version("torch"), transformers=version("transformers"))
    then = dict(manifest["versions"], cpu=manifest["cpu"])
    other = [f"{what} {here[what]}, frozen with {then[what]}" for what in here if here[what] != then[what]]
    return "; ".join(other) or f"torch and transformers are the same, and of the CPU no more is known than {then['cpu']}"


# %%
#| export
def check_world() -> list[str]:
    "Rebuild the world and compare it with the frozen one; returns what was checked, raises AssertionError on a difference."
    w, texts, tok = load_world(), world_texts(), make_tokenizer()
    m, said = w.manifest, []
    assert content_hash(texts) == m["texts"], "texts differ"; said.append(f"texts: same hash {m['texts']}")
    pairs = world_pairs(load_base(w)[0], tok, texts)
    for n, rows in pairs.items(): assert content_hash(rows) == m["pairs"][n], f"pairs of {n} differ"
    said.append(f"pairs, from the frozen S: same hashes {m['pairs']}")
    model = train_base(texts, tok)
    with tempfile.TemporaryDirectory() as tmp: model.save_pretrained(tmp); got = _file_hash(Path(tmp) / "model.safetensors")
    if got == m["model"]: return said + [f"model, retrained: same hash {got}"]
    now = skill_table(model, tok, texts["test"], 0)["exact"]
    off = max(abs(now[s] - want) for s, want in m["greedy"].items())
    what = f"other hash {got}, skills at most {100 * off:.1f} points off ({_elsewhere(m)})"
    assert off <= 0.12, f"model: {what}; 12 are allowed"
    return said + [f"model, retrained: {what}"]


# %%
#| export
if __name__ == "__main__" and __spec__:
    import sys
    if "--freeze" in sys.argv: freeze_world(Path("data/world"))
    print("\n".join(check_world()))

# %%
#| slow
check_world()

# %% [markdown]
# This answer comes from a CPU other than the one on which the world was frozen, though both are of the kind AVX512.

# %% [markdown]
# Without retraining, the first two checks take a few seconds, so they are made here.

# %%
assert content_hash(texts) == w.manifest["texts"]
assert {n: content_hash(rows) for n, rows in world_pairs(S, tok, texts).items()} == w.manifest["pairs"] == {n: content_hash(rows) for n, rows in sources.items()}
{k: w.manifest[k] for k in ("texts", "pairs", "model")}

# %% [markdown]
# **What you now have.** A base model in Hugging Face format whose greedy answers are wrong where it was misled, three preference sources, a true reward for
# any answer, and prompts that no training has seen. A world of fourteen responses for exact statements. Hashes that say it is the same world on your machine.
#
# **Questions to test yourself.** Why would noisy demonstrations alone make every method look good? Why are two wrong answers still worth comparing? What would a preference
# label mean if $k$ were 0, or 1000?
#
# **Try this.** Raise `NOISE` and lower `WRONG`, retrain S, and watch the temperature curve. Add a fifth skill. Ask S for a string longer than any it has seen.
