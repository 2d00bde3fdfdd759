# %% [markdown]
# # Training data
# > The kinds of preference pairs that a run may ask for: sources, skills, sorted, made noisy, selected, or written on the way.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/training_data.ipynb)
#
# **You should know** the [tiny world](../00_world.ipynb) and its pairs, [gamma](../02_logprobs.ipynb) and what a [stage](../14_stepwise.ipynb) is.
#
# **Time** 45 minutes to read, about a minute to run.
#
# A *pair* is a prompt with two responses, one chosen and one rejected. The experiments differ in which pairs they train on, and in which
# order. This page makes every kind once and looks at it. A kind has a name, and a run asks for it by that name; so a row of the results
# says which data it saw. You may skip what you do not need and come back from the experiment that uses it.

# %%
#| default_exp training_data

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
import copy, json, random, tempfile
from pathlib import Path

from torch import Tensor

from sdpo_nb.logprobs import score_pairs
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.stepwise import StepwiseConfig, sdpo
from sdpo_nb.world import SKILLS, World, answer, edit_distance, make_pairs, make_prompts, respond, true_reward

# %%
import numpy as np
import pandas as pd
from sdpo_nb.bodies import build_world
from sdpo_nb.world import ALPHABET, complaint, load_base, sft


# %% [markdown]
# ## Every pair of a world
#
# A world keeps its pairs in three files, its *sources*: `primer` has few prompts on which S was misled, `riddle` has many. We read all of them into
# one list, and note at each row where it came from. A pair with an empty response is left out here, as the tokenisation of a run would leave it
# out: so we count what will really be trained on.

# %%
#| export
def _prompt(row): return row["prompt"][-1]["content"]
def _chosen(row): return row["chosen"][-1]["content"]
def _rejected(row): return row["rejected"][-1]["content"]
def _skill(row): return _prompt(row).split()[0]

def _without_empty(rows: list) -> list:
    "The rows in which both responses say something."
    return [row for row in rows if _chosen(row).strip() and _rejected(row).strip()]

def all_pairs(
    world: World, # of any body
) -> list[dict]: # conversational rows, with `source`, and `flipped` where the label is wrong
    "Every usable pair of a world, source by source."
    rows = []
    for source, file in world.sources.items():
        for line in Path(file).read_text().splitlines():
            rows.append(json.loads(line) | dict(source=source))
    return _without_empty(rows)


# %%
world = build_world(0)
base, tokenizer = load_base(world)
pairs = all_pairs(world)

first = pd.DataFrame([dict(
    prompt=_prompt(row),
    chosen=_chosen(row),
    rejected=_rejected(row),
    source=row["source"],
    wrong_label=row["flipped"],
) for row in pairs[:5]])
print(len(pairs), "pairs; the first five:")
first


# %% [markdown]
# ## The first four kinds
#
# A *kind* is a function that takes the world, S and its tokenizer, and returns sources: a dictionary from a name to a list of pairs. Stepwise
# DPO makes one stage of each source, so the grouping matters. Here are four groupings of the same pairs:
#
# - `sources`: as the world has them, the usual case;
# - `one source`: all in one, to be cut later;
# - `skills`: one source for each skill, so that a stage can unlearn what another taught;
# - `without`: as `sources`, but one skill has no pairs at all.
#
# What is asked for is stored beside the results. A misspelt word must not give other pairs than it says, so `_check_word` refuses it.

# %%
#| export
def _check_word(name: str, word, words) -> None:
    "Raises ValueError for a word that is none of those that are there."
    if word not in words: raise ValueError(f"{name}: {word!r} is none of {', '.join(map(repr, words))}")

def _grouped(rows: list, key) -> dict: # key(row) -> rows, in order of first appearance
    groups = {}
    for row in rows: groups.setdefault(key(row), []).append(row)
    return groups

def _source(row): return row["source"]

def _by_source(world, base, tokenizer): return _grouped(all_pairs(world), _source)

def _in_one_source(world, base, tokenizer): return {"all": all_pairs(world)}

def _by_skill(world, base, tokenizer): return _grouped(all_pairs(world), _skill)

def _without_skill(world, base, tokenizer, skill):
    _check_word("skill", skill, SKILLS)
    kept = [row for row in all_pairs(world) if _skill(row) != skill]
    return _grouped(kept, _source)

# name -> function (world, S, tokenizer, what else is asked for) -> sources, or a function that makes chunks
TRAINING_DATA = {
    "sources": _by_source,
    "one source": _in_one_source,
    "skills": _by_skill,
    "without": _without_skill,
}


# %%
def sizes(kind, *asked): # pairs in each source
    sources = TRAINING_DATA[kind](world, base, tokenizer, *asked)
    return {name: len(rows) for name, rows in sources.items()}

print("sources:       ", sizes("sources"))
print("one source:    ", sizes("one source"))
print("skills:        ", sizes("skills"))
print("without 'sort':", sizes("without", "sort"))
assert sum(sizes("skills").values()) == len(pairs)
assert sum(sizes("without", "sort").values()) == len(pairs) - sizes("skills")["sort"]
print(complaint(sizes, "without", "srot"))


# %% [markdown]
# ## The same prompts in every part
#
# In theory it makes a difference whether stages share their prompts ([smaller beta](smaller_beta.ipynb)). So there is a kind whose
# $T$ parts all have the same prompts, every $T$-th of the world, each answered anew. S writes the answers in double precision, as when the world
# was made; then the last bit of a logit cannot change an answer.

# %%
#| export
def _same_prompts(world, base, tokenizer, T): # T sources of fresh pairs
    precise = copy.deepcopy(base).double()
    prompts = [_prompt(row) for row in all_pairs(world)][::T]
    parts = {}
    for t in range(T):
        rows = make_pairs(precise, tokenizer, prompts, seed=10_000 + t)
        parts[f"part {t+1}"] = _without_empty(rows)
    return parts

TRAINING_DATA["same prompts"] = _same_prompts

# %% [markdown]
# Three parts. How many prompts do the first two share, and how many pairs? Two equal answers make no pair, so the prompts are not exactly the same.

# %%
parts = TRAINING_DATA["same prompts"](world, base, tokenizer, 3)
one, two = parts["part 1"], parts["part 2"]
shared_prompts = {_prompt(row) for row in one} & {_prompt(row) for row in two}
shared_pairs = [row for row in one if row in two]
assert len(shared_prompts) > 0.4 * len(one)
assert len(shared_pairs) < 0.3 * len(one)
{
    "pairs": {name: len(rows) for name, rows in parts.items()},
    "prompts in both": len(shared_prompts),
    "pairs in both": len(shared_pairs),
}


# %% [markdown]
# ## Sorted by what is known of a pair
#
# Which pairs are easy? We could say: those with short responses, or those whose responses differ much, or those whose true rewards are far apart. The last is a
# measure that nobody else can have, as it needs the true reward. One pair at a time:

# %%
#| export
def true_gap(
    row: dict,  # conversational pair
) -> float:     # -1 to 1; below 0 where the label is wrong
    "True reward of the chosen response minus that of the rejected one."
    prompt = _prompt(row)
    return true_reward(prompt, _chosen(row)) - true_reward(prompt, _rejected(row))

def pair_measure(
    row: dict,  # conversational pair
    what: str,  # length (letters of both), distance (edits between them), true gap (without its sign)
) -> float:
    "What is known of a pair without a model. Raises ValueError for another measure."
    chosen, rejected = _chosen(row), _rejected(row)
    if what == "length": return len(chosen) + len(rejected)
    if what == "distance": return edit_distance(chosen, rejected)
    if what == "true gap": return abs(true_gap(row))
    raise ValueError(f"measure: {what!r} is none of length, distance, true gap")


# %% [markdown]
# A pair with a wrong label has a negative true gap, always: that is what "wrong" means. Let us see two pairs of each kind.

# %%
wrong = [row for row in pairs if row["flipped"]]
right = [row for row in pairs if not row["flipped"]]
for row in wrong: assert true_gap(row) < 0
for row in right: assert true_gap(row) >= 0

examples = [*right[:2], *wrong[:2]]
shown = pd.DataFrame([dict(
    prompt=_prompt(row),
    chosen=_chosen(row),
    rejected=_rejected(row),
    gap=round(true_gap(row), 2),
    length=pair_measure(row, "length"),
    distance=pair_measure(row, "distance"),
) for row in examples])
print(complaint(pair_measure, wrong[0], "size"))
shown


# %% [markdown]
# The kind `sorted` puts all pairs in the order of a measure. Many pairs have equal measures. They are shuffled first, so that ties do not stand in
# the order of the sources.

# %%
#| export
def _sorted(world, base, tokenizer, what, sign): # one source; sign 1: from small to large, -1: the other way
    _check_word("sign", sign, (1, -1))
    rows = all_pairs(world)
    shuffled = random.Random(0).sample(rows, len(rows))
    return {"all": sorted(shuffled, key=lambda row: sign * pair_measure(row, what))}

TRAINING_DATA["sorted"] = _sorted

# %%
easy_first = TRAINING_DATA["sorted"](world, base, tokenizer, "true gap", -1)["all"]
thirds = np.array_split([abs(true_gap(row)) for row in easy_first], 3)
wrong_in = np.array_split([row["flipped"] for row in easy_first], 3)
assert thirds[0].min() >= thirds[1].max() >= thirds[2].max()
pd.DataFrame({
    "smallest gap": [part.min() for part in thirds],
    "largest gap": [part.max() for part in thirds],
    "share of wrong labels": [part.mean() for part in wrong_in],
}, index=["first third", "second third", "last third"]).round(2)


# %% [markdown]
# Labels are drawn by Bradley-Terry, so they are wrong most often where two rewards are close: in the last third.
#
# ## Noise graded by source
#
# In the world all three sources have equally good labels. Those of real sources are not: one was labelled by experts, another by whoever clicked. And where it is hard to say which answer is better, people disagree. The kind `graded noise` swaps the two responses in a given share of the pairs of each source, drawn at random. The prompts and responses stay as they are. (So does `flipped`: it speaks of the label as it was made.)

# %%
#| export
def _swapped(row): return row | dict(chosen=row["rejected"], rejected=row["chosen"])

def _check_share(name: str, share: float) -> None:
    "Raises ValueError for a share that is not between 0 and 1."
    if not 0 <= share <= 1: raise ValueError(f"{name}: {share:g} is not between 0 and 1")

def _with_graded_noise(world, base, tokenizer, *shares): # of pairs that are swapped, source by source
    noisy = {}
    for (name, rows), share in zip(_by_source(world, base, tokenizer).items(), shares, strict=True):
        _check_share(f"share of {name}", share)
        rng = random.Random(name)
        noisy[name] = [_swapped(row) if rng.random() < share else row for row in rows]
    return noisy

TRAINING_DATA["graded noise"] = _with_graded_noise


# %% [markdown]
# 0, 15 and 35 % are swapped. What does that do to the labels that we know to be wrong, and to how often S is on the side of the label? The second is what stepwise DPO orders sources by.

# %%
def wrong_share(rows):
    gaps = [true_gap(row) for row in rows]
    return np.mean([gap < 0 for gap in gaps if gap])       # of equal rewards neither label is wrong

def share_S_prefers(rows):
    pairs = tokenize_pairs(load_pairs(rows), tokenizer, "pairs", 64, 32).pairs
    return (score_pairs(base, pairs).gamma(pairs) > 0).double().mean().item()

as_made = TRAINING_DATA["sources"](world, base, tokenizer)
noisy = TRAINING_DATA["graded noise"](world, base, tokenizer, 0., 0.15, 0.35)
assert noisy["primer"] == as_made["primer"]
table = {}
for name, rows in noisy.items():
    table[name] = {
        "wrong labels, as made": wrong_share(as_made[name]),
        "wrong labels, with noise": wrong_share(rows),
        "S prefers chosen, as made": share_S_prefers(as_made[name]),
        "S prefers chosen, with noise": share_S_prefers(rows),
    }
pd.DataFrame(table).T.round(2)


# %% [markdown]
# With noise 38 % of the labels in the hard source are wrong. Where labels are swapped, S comes closer to one half. The order of the sources stays the same in this world, but only by 0.55 against 0.51.
#
# ## A source that S could not have written
#
# All pairs so far were written by S, so every chosen response is one that S gives now and then. Real sources are often not like that: a stronger model or a person may have written the chosen response. The kind `taught letters` has two sources. *Own* is the middle source of the world: both responses by S, strings of three to six letters. In *taught* the chosen response is the right answer, and the rejected one is what S wrote; where S was right, the prompt is left out.
#
# The strings of the taught source may be longer than any in the demonstrations of S. With seven letters it can build on the other source. To answer seven letters well, a model needs the right rule and must go on after the sixth letter. Own pairs teach the rule, and [for sort and shift](new_domain.ipynb) that carries over to seven letters; for copy and reverse it did not. Going on is taught by seven letters alone.

# %%
#| export
def _with_taught_letters(world, base, tokenizer, *lengths): # shortest and longest taught string
    own, taught = _by_source(world, base, tokenizer)["digest"], []
    used = {_prompt(row) for row in own}
    rng = random.Random(_prompt(own[0]))        # so that every world has prompts of its own
    prompts = make_prompts(len(own), "preference", rng, lengths, keep=lambda prompt: prompt not in used)
    for prompt, written in zip(prompts, respond(base, tokenizer, prompts, seed=30_000)):
        if written == answer(prompt): continue
        taught.append(dict(
            prompt=[dict(role="user", content=prompt)],
            chosen=[dict(role="assistant", content=answer(prompt))],
            rejected=[dict(role="assistant", content=written)],
            flipped=False,
        ))
    return dict(own=own, taught=_without_empty(taught))

def _turned(kind): # the same sources, the last one first
    return lambda *asked: dict(reversed(kind(*asked).items()))

TRAINING_DATA["taught letters"] = _with_taught_letters
TRAINING_DATA["taught letters first"] = _turned(_with_taught_letters)

# %% [markdown]
# How often is S on the side of the label? Among its own pairs in more than half. And where a teacher wrote the chosen response, with seven letters, or with three to six?

# %%
seven = TRAINING_DATA["taught letters"](world, base, tokenizer, 7, 7)
short = TRAINING_DATA["taught letters"](world, base, tokenizer, 3, 6)
assert list(TRAINING_DATA["taught letters first"](world, base, tokenizer, 7, 7)) == ["taught", "own"]
assert not {_prompt(row) for row in short["own"]} & {_prompt(row) for row in short["taught"]}
kinds = {"own": seven["own"], "taught, seven letters": seven["taught"], "taught, three to six": short["taught"]}
table = {}
for name, rows in kinds.items():
    asked = tokenize_pairs(load_pairs(rows), tokenizer, "pairs", 64, 32).pairs
    gamma = score_pairs(base, asked).gamma(asked)
    letters = [sum(c in ALPHABET for c in _rejected(row)) for row in rows]
    prefers = (gamma > 0).double().mean().item()
    table[name] = {
        "pairs": len(rows),
        "S prefers chosen": prefers,
        "mean gamma (nats)": gamma.mean().item(),
        "longest rejected response (letters)": max(letters),
    }
assert table["own"]["S prefers chosen"] > 0.5
assert table["taught, seven letters"]["S prefers chosen"] < 0.1
assert table["taught, seven letters"]["mean gamma (nats)"] < -3
pd.DataFrame(table).T.round(2)

# %%
for row in seven["taught"][:3]: print(f"{_prompt(row)}: {_chosen(row)} rather than {_rejected(row)}")


# %% [markdown]
# Seven letters are hard for S as nothing else in this book is: it is on the side of the label in no pair. The same teacher with short strings is about as hard as own pairs. There are fewer of them, since S is right in four of ten answers to short strings.

# %% [markdown]
# ## A small source and a large one
#
# The paper's first source has 12 thousand pairs, and its second one 60 thousand. The kind `small and large` draws the small source at random from all pairs of the world, here a sixth of them. The large one is the rest, so nothing but size tells the two apart.

# %%
#| export
def _small_and_large(world, base, tokenizer, parts): # the small source is one of so many equal parts
    rows = all_pairs(world)
    shuffled = random.Random(0).sample(rows, len(rows))
    n = len(rows) // parts
    return dict(small=shuffled[:n], large=shuffled[n:])

TRAINING_DATA["small and large"] = _small_and_large
TRAINING_DATA["large and small"] = _turned(_small_and_large)

# %%
uneven = TRAINING_DATA["small and large"](world, base, tokenizer, 6)
turned = TRAINING_DATA["large and small"](world, base, tokenizer, 6)
assert list(turned.items()) == [("large", uneven["large"]), ("small", uneven["small"])]
assert 5 * len(uneven["small"]) <= len(uneven["large"]) < 5 * len(uneven["small"]) + 6
table = {}
for name, rows in uneven.items():
    table[name] = {"pairs": len(rows), "S prefers chosen": share_S_prefers(rows), "wrong labels": wrong_share(rows)}
pd.DataFrame(table).T.round(2)

# %% [markdown]
# ## What is the same in all runs
#
# A model that selects or labels pairs must first be trained or at least read them, so settings come in here. These are the ones of every
# run of the experiments. A run changes those that it is about, mostly $\beta$, the weight that holds a model near its reference, and the learning rate.

# %%
#| export
COMMON_SETTINGS = dict( # of StepwiseConfig, in every run of the experiments unless a cell says otherwise
    beta=0.3,
    lr=1e-4,
    epochs=3,
    batch_size=32,
    max_length=64,
    precision="fp32",
    probe=64,
)

# %%
config = StepwiseConfig(**COMMON_SETTINGS, chunks=1)
config.beta, config.lr, config.epochs, config.reference


# %% [markdown]
# ## Selected by a model
#
# Two published ways to *select* pairs contradict each other. One keeps the pairs with the smallest implicit reward gap of a trained model
# ([2508.04149](https://arxiv.org/abs/2508.04149)); the other drops the hardest ([2502.09650](https://arxiv.org/abs/2502.09650)), and those are the same pairs again. The *implicit reward* of a response is what a
# model has added to its log-probability, against S. So the gap of a pair is gamma of the model minus gamma of S, in nats. It has a sign here: it is
# smallest where the model orders a pair against its label.

# %%
#| export
def _implicit_gap(
    model,
    base,       # S
    tokenizer,
    rows: list, # n conversational pairs
) -> Tensor:    # (n,) nats
    "Gamma of the model minus gamma of S. Raises ValueError where a pair cannot be used."
    longest = COMMON_SETTINGS["max_length"]
    pairs = tokenize_pairs(load_pairs(rows), tokenizer, "pairs", longest, longest // 2).pairs
    if len(pairs) != len(rows):
        raise ValueError(f"implicit gap: {len(rows) - len(pairs)} of {len(rows)} pairs cannot be used")
    return score_pairs(model, pairs).gamma(pairs) - score_pairs(base, pairs).gamma(pairs)


# %% [markdown]
# S has added nothing to itself, so its gap is 0. A model that was fine-tuned on the chosen responses has raised them. Then where are the wrong labels?

# %%
some = pairs[::3]
assert _implicit_gap(base, base, tokenizer, some).abs().max() == 0

chosen_responses = [(_prompt(row), _chosen(row)) for row in pairs]
model = sft(copy.deepcopy(base), tokenizer, chosen_responses, epochs=3, batch=32, lr=3e-4)
gap = _implicit_gap(model, base, tokenizer, some).numpy()
wrong = np.array([row["flipped"] for row in some])
smallest, largest = np.argsort(gap)[:len(some) // 3], np.argsort(-gap)[:len(some) // 3]
assert wrong[smallest].mean() > wrong[largest].mean()
pd.DataFrame({
    "mean gap (nats)": [gap[smallest].mean(), gap[largest].mean()],
    "share of wrong labels": [wrong[smallest].mean(), wrong[largest].mean()],
}, index=["third with the smallest gaps", "third with the largest gaps"]).round(2)

# %% [markdown]
# Among the smallest gaps. A wrong label makes a worse response the chosen one, and to that the model gives less.
#
# A gap needs both responses. A pair with an empty one is refused:

# %%
broken = some[0] | dict(chosen=[dict(role="assistant", content="")])
print(complaint(_implicit_gap, base, base, tokenizer, [some[1], some[2], broken]))


# %% [markdown]
# The kind `selected` trains such a model on all pairs, one epoch of DPO, and keeps two thirds of the pairs. What would be a fair comparison? Three passes over two
# thirds and one pass over all are together three passes over all. So a run on selected pairs has read as many pairs as a run on all of them, though the tokens of the model that
# selects are not in the table of results. Beside the smallest and the largest gaps stand two thirds at random.

# %%
#| export
def _selected(world, base, tokenizer, keep, beta, lr): # keep: smallest or largest gaps, or random
    _check_word("keep", keep, ("smallest", "largest", "random"))
    rows = all_pairs(world)
    n = 2 * len(rows) // 3
    if keep == "random": return {"all": random.Random(0).sample(rows, n)}

    settings = COMMON_SETTINGS | dict(beta=beta, lr=lr, chunks=1, epochs=1)
    with tempfile.TemporaryDirectory() as folder:
        model = sdpo(world.base, {"all": rows}, StepwiseConfig(**settings), folder).model
    gap = _implicit_gap(model, base, tokenizer, rows)
    order = gap.argsort(descending=keep == "largest").tolist()
    return {"all": [rows[i] for i in order[:n]]}

TRAINING_DATA["selected"] = _selected

# %%
part = TRAINING_DATA["selected"](world, base, tokenizer, "random", 0.6, 3e-4)["all"]
assert part == TRAINING_DATA["selected"](world, base, tokenizer, "random", 0.6, 3e-4)["all"]
print(f"{len(part)} of {len(pairs)} pairs, the same ones whenever you ask")


# %% [markdown]
# ## Written between the stages
#
# Nearly all pairs so far were written by S, and all before the training. But by stage 2 the model is no longer S, so why not let it write the pairs itself? Then chunks cannot be
# given in advance. `StepwiseConfig(chunks=...)` takes a function for this: it gets the number of the stage and the model that the stage starts from, and returns
# the pairs of that stage, or None when there are no more stages.
#
# Somebody must also label them: say which of two answers is chosen. We have three ways:
#
# - *true*: Bradley-Terry on the true reward, as everywhere in this book;
# - *judge*: the better answer is chosen, but with a stated probability the other one;
# - *implicit*: the answer that $M_{t-1}$ has raised more against S, by $\log M_{t-1} - \log S$. It asks nobody and costs nothing. In stage 1 there is no such
#   model yet, so labels are true there.
#
# First the judge. An error of 0.2 should give 20 % wrong labels, among pairs whose rewards differ.

# %%
#| export
def _labelled_by_judge(
    rows: list,
    error: float,        # probability that the worse response is chosen
    rng: random.Random,
) -> list:
    labelled = []
    for row in rows:
        wrong, err = true_gap(row) < 0, rng.random() < error
        labelled.append(_swapped(row) if wrong != err else row)
    return labelled

def _labelled_by_model(rows: list, model, base, tokenizer) -> list:
    "The response is chosen that the model has raised more against S."
    gaps = _implicit_gap(model, base, tokenizer, rows)
    return [_swapped(row) if gap < 0 else row for row, gap in zip(rows, gaps)]


# %%
different = [row for row in pairs if true_gap(row)]
def share_wrong(rows): return np.mean([true_gap(row) < 0 for row in rows])

labels = {
    "Bradley-Terry": different,
    "judge, never wrong": _labelled_by_judge(different, 0., random.Random(0)),
    "judge, 20 % wrong": _labelled_by_judge(different, 0.2, random.Random(0)),
    "implicit reward of the model above": _labelled_by_model(different, model, base, tokenizer),
}
shares = {name: share_wrong(rows) for name, rows in labels.items()}
assert shares["judge, never wrong"] == 0
assert abs(shares["judge, 20 % wrong"] - 0.2) < 0.04
pd.Series(shares, name="share of wrong labels").round(2).to_frame()


# %% [markdown]
# Now the function that makes the chunks. A third of the prompts belongs to each of three stages. The *writer* is S in all stages, or from stage 2 on the
# model that the stage starts from (`policy`). A sharper model gives two equal answers more often, and equal answers make no pair, so it writes fewer pairs. Is a difference then due to the
# writer, or to the number? A third writer, `S, as many`, is S with as many pairs as the policy would have written.

# %%
#| export
def _written_on_the_way(
    world, base, tokenizer,
    writer: str,          # S; policy; or "S, as many": of S as many pairs as the policy would write
    label: str,           # true, judge, implicit
    error: float = 0.,    # of the judge
    stages: int = 3,
):
    _check_word("writer", writer, ("S", "policy", "S, as many"))
    _check_word("label", label, ("true", "judge", "implicit"))
    _check_share("error", error)
    if error and label != "judge": raise ValueError(f"error: only a judge makes one, and the label is {label!r}")
    prompts = [_prompt(row) for row in all_pairs(world)]

    def write(t, model):
        precise = copy.deepcopy(model).double()
        return _without_empty(make_pairs(precise, tokenizer, prompts[t-1::stages], seed=20_000 + t))

    def chunk(t, model): # the pairs of stage t; None after the last
        if t > stages: return None
        later = t > 1                                  # in stage 1 the policy is S
        rows = write(t, model if writer == "policy" and later else base)
        if writer == "S, as many" and later:
            n = min(len(rows), len(write(t, model)))
            rows = random.Random(t).sample(rows, n)
        if label == "judge": return _labelled_by_judge(rows, error, random.Random(t))
        if label == "implicit" and later: return _labelled_by_model(rows, model, base, tokenizer)
        return rows

    return chunk

TRAINING_DATA["new"] = _written_on_the_way


# %% [markdown]
# We ask for the chunk of stage 2, with the fine-tuned model from above in the role of $M_1$:

# %%
def chunk_2(writer, label, *error):
    chunk = TRAINING_DATA["new"](world, base, tokenizer, writer, label, *error)
    return chunk(2, model)

chunks = {
    "S, true": chunk_2("S", "true"),
    "policy, true": chunk_2("policy", "true"),
    "S, as many, true": chunk_2("S, as many", "true"),
    "policy, implicit": chunk_2("policy", "implicit"),
}
def share_wrong_where_different(rows): return share_wrong([row for row in rows if true_gap(row)])

assert len(chunks["S, as many, true"]) == len(chunks["policy, true"])
assert TRAINING_DATA["new"](world, base, tokenizer, "S", "true")(4, model) is None
written = {}
for name, rows in chunks.items():
    share = share_wrong_where_different(rows)
    written[name] = {"pairs": len(rows), "share of wrong labels": round(share, 2)}
pd.DataFrame(written).T.astype({"pairs": int})

# %% [markdown]
# The policy writes fewer pairs, as expected. And its own labels of its own answers are wrong in two of five: it is sure of what it writes, right or wrong.
#
# ## What you now have
#
# - `TRAINING_DATA`: eleven kinds of pairs, by name.
# - `true_gap` and `pair_measure`: what a world knows of a pair that nobody else could know.
# - A function that writes and labels pairs between stages.
#
# Next: [one run](cells.ipynb) on such data, and a table of runs.
#
# ## Questions to test yourself
#
# 1. Why are pairs with an empty response left out *before* they are counted?
#
#    <details><summary>Answer</summary>
#
#    The tokenisation of a run drops them. If we sorted, selected or cut the pairs with them, parts that look equal would be trained on different numbers of pairs.
#
#    </details>
# 2. A judge who errs in 20 % and Bradley-Terry may have a similar share of wrong labels. What is different?
#
#    <details><summary>Answer</summary>
#
#    The judge errs anywhere, also where one response is right and the other is nonsense. Bradley-Terry errs where the two rewards are close, so its errors say little that is false.
#
#    </details>
# 3. The implicit reward labels pairs by what the model already prefers. What can training on such labels still change?
#
#    <details><summary>Answer</summary>
#
#    It makes the model surer of what it prefers, right or wrong. That helps where it is mostly right, and cannot correct it where it is wrong.
#
#    </details>
#
# ## Try this
#
# - Sort by `length` with sign 1 and look at the share of wrong labels in the thirds. Are short pairs easy?
#
#   <details><summary>What you should see</summary>
#
#   The last third has more wrong labels than the first, but the difference is smaller than with the true gap: long strings have more letters in which two answers can nearly agree.
#
#   </details>
# - Let the judge err in half of the pairs. What do its labels say?
#
#   <details><summary>What you should see</summary>
#
#   About half of the labels are wrong: they say nothing, whichever response is better.
#
#   </details>
