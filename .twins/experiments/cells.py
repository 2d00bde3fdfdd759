# %% [markdown]
# # One run, one row
# > A method in a world with a seed is a cell: how it is trained, how it is measured, and how hundreds of cells become one table.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/cells.ipynb)
#
# **You should know** [stepwise DPO](../14_stepwise.ipynb), [how a model is measured](../08_evaluate.ipynb), and the [training data](training_data.ipynb) of the experiments.
#
# **Time** an hour to read, one to two minutes to run.
#
# An experiment asks, say, whether sDPO is better than DPO. To answer it we run both in ten worlds with two seeds. That makes forty runs, and
# all experiments together have some five thousand. A run takes a quarter of a minute, and is thrown away when it has been measured. What stays is
# one row of a table. This page makes such a row.

# %%
#| default_exp cells

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
import copy, functools, io, json, os, random, tempfile, time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from tqdm.auto import tqdm

from sdpo_nb.bodies import build_beginning, build_world
from sdpo_nb.evaluate import kl_along
from sdpo_nb.in_memory import load_S, train_in_memory
from sdpo_nb.logprobs import load_model, pair_tokens, replacing, response_logprobs
from sdpo_nb.plan import load_sources
from sdpo_nb.report import gamma_table
from sdpo_nb.stepwise import StepwiseConfig, sdpo
from sdpo_nb.trainer import TrainConfig, learning_rate
from sdpo_nb.training_data import COMMON_SETTINGS, TRAINING_DATA, true_gap
from sdpo_nb.world import ALPHABET, World, answer, content_hash, load_base, make_prompts, prompt_ids
from sdpo_nb.world import respond_ids
from sdpo_nb.world import sft, text_of, true_reward, true_rewards, world_texts

# %%
import dataclasses, math
from sdpo_nb.world import complaint, misled

# %% [markdown]
# How many numbers will such a row need, if it should answer questions that nobody has asked yet? More than one mean. We keep one number per prompt, so that any two rows can be
# compared prompt by prompt, later, by somebody who does not have the models.
#
# ## A cell
#
# A cell is one method in one world with one seed. The *seed* fixes the order in which pairs are trained on, and the chunks where they are
# random. Its settings are those of `StepwiseConfig`; three relatives have up to three more. DPO is
# stepwise DPO with one chunk. `sDPO` is what `StepwiseConfig` does by itself: three stages, one for each source, easy to hard by the reward accuracy under S.
# Each stage starts from the model of the stage before, has it as its reference, and restarts the learning-rate schedule and the optimizer. The
# other methods of `METHODS` change one of these things each, and that is what makes a comparison say something. If sDPO beats DPO, it might be the chunks, their order, the reference or the start.
#
# - `sDPO, random`: all pairs are shuffled and cut into three, so no chunk is easier than another.
# - `sDPO, hard first`: the same chunks, in the opposite order.
# - `sDPO, fixed reference`: every stage is held near S, and not near the model that it starts from.
# - `sDPO, target S`: every stage *starts* from S again, with $M_{t-1}$ as its reference.
#
# Three more are relatives of sDPO by other people, on all pairs at once. *TR-DPO* ([2404.09656](https://arxiv.org/abs/2404.09656)) moves its reference after every 16 steps: all the way to the model (*hard*), or 0.6 of the way (*soft*). *Pre-DPO* ([2504.15843](https://arxiv.org/abs/2504.15843)) trains twice: the second time it starts from S again, and the model that came out of the first is the reference.
#
# Three methods do without DPO. They are the *baselines*: S as it is; S at the sampling temperature that is best on validation prompts; and S fine-tuned on
# the chosen responses.

# %%
#| export
METHODS = { # name -> settings of StepwiseConfig
    "DPO": dict(chunks=1),
    "sDPO": dict(),
    "sDPO, random": dict(order="random"),
    "sDPO, hard first": dict(order="hard_to_easy"),
    "sDPO, fixed reference": dict(reference="fixed"),
    "sDPO, target S": dict(init_target="S"),
}
BASELINES = ("S", "S, best temperature", "SFT on chosen")
RELATIVES = { # name -> how its reference moves
    "TR-DPO, hard": dict(every=16),             # steps
    "TR-DPO, soft": dict(every=16, share=0.6),  # of the way to the model
    "Pre-DPO": dict(again=True),                # a second run, against the model of the first
}

@dataclass(frozen=True)
class Cell:
    "One run: a method in a world with a seed."
    world: int
    seed: int
    method: str                                  # of METHODS, RELATIVES or BASELINES
    settings: dict = field(default_factory=dict) # of StepwiseConfig; they win over those of the method
    split: str = "test"                          # prompts it is measured on; see `prompts_of_split`
    pairs: int = None                            # of each source; None: all, or chunks are made on the way
    data: tuple = ("sources",)                   # a name in TRAINING_DATA, and what that function asks for
    body: str = "llama"                          # or a name in BODIES

    def __post_init__(self): self.config, self.maker # a method or data that are not there are told at once

    @property
    def config(self) -> dict:
        """The settings as they are written down: the common ones, those of the method, those of the cell.
        Raises ValueError for a method that is not there."""
        known = METHODS | RELATIVES | {name: {} for name in BASELINES}
        if self.method not in known: raise ValueError(f"method: {self.method!r} is none of {', '.join(known)}")
        return COMMON_SETTINGS | known[self.method] | self.settings

    @property
    def maker(self):
        "The function of TRAINING_DATA that makes its data. Raises ValueError for data that are not there."
        kind = self.data[0]
        if kind not in TRAINING_DATA: raise ValueError(f"data: {kind!r} is none of {', '.join(TRAINING_DATA)}")
        return TRAINING_DATA[kind]

    @property
    def key(self) -> str:
        "A hash of all that makes the cell, as it is written: a default of StepwiseConfig, spelt out, makes another key."
        parts = [self.world, self.seed, self.method, self.config, self.split, self.pairs, self.data]
        if self.body != "llama": parts.append(self.body)    # keys are older than other bodies
        return content_hash(parts)


# %% [markdown]
# Which of these four cells have one key?

# %%
usual = Cell(world=1, seed=0, method="sDPO")
spelt_out = Cell(world=1, seed=0, method="sDPO", settings=dict(beta=0.3))   # as in COMMON_SETTINGS
larger_beta = Cell(world=1, seed=0, method="sDPO", settings=dict(beta=0.6))
a_default = Cell(world=1, seed=0, method="sDPO", settings=dict(order="easy_to_hard"))   # of StepwiseConfig

assert usual.key == spelt_out.key
assert usual.key != larger_beta.key
assert usual.key != a_default.key
{"usual": usual.key, "spelt out": spelt_out.key, "larger beta": larger_beta.key, "a default": a_default.key}

# %% [markdown]
# The first two. What is spelt as in `COMMON_SETTINGS`, or as the method has it, makes no difference. The last cell does the same as the first and has a key of its own, since `StepwiseConfig` knows its defaults and the key does not. So two experiments that need the same run find one row if they spell it alike. Where they did not, the run was made twice; that costs time and changes no result.
#
# A misspelt method is another matter. Without settings of its own it would run as sDPO, and stand in the table under the wrong name. So it is refused:

# %%
print(complaint(Cell, 1, 0, "sDPO, hard firts"))


# %% [markdown]
# ## The exam
#
# How good is a model? We give it prompts that nobody trained on and keep one number per prompt: the true reward of its answer. We ask
# twice, once sampled at temperature 1 and once greedily. The third number is the KL from S, the distance in nats that the model has moved, along the
# sampled answers.
#
# First the prompts. Most cells are measured on the `test` prompts of their world, the searches on `validation`. Two kinds of
# prompts are unlike anything that a model of the world has seen: strings of seven letters, and strings of the eleven letters after *k*, which
# occur in no string and no answer. (Six of them occur in the names of the skills. The skill *shift* has no answer there and is left out.) One experiment asks both the strings that S knows and longer ones, half and half.

# %%
#| export
def _with_other_letters(prompt: str) -> str:
    "The same prompt with each letter moved behind the alphabet of the world: a becomes l."
    skill, string = prompt.split()
    return skill + " " + "".join(chr(ord(c) + len(ALPHABET)) for c in string)

@functools.cache
def prompts_of_split(
    world: int,     # its seed
    split: str,     # validation, test, seven letters, up to seven letters, other letters
) -> list[str]:
    """The prompts that a cell is measured on, in the order of its stored rewards.
    Raises ValueError for a split that is not there."""
    if split in ("validation", "test"): return world_texts(world)[split]
    if split == "seven letters": return make_prompts(300, "test", random.Random(world), lengths=(7, 7))
    if split == "up to seven letters":
        longer = prompts_of_split(world, "seven letters")
        return prompts_of_split(world, "test")[:len(longer)] + longer
    if split == "other letters":
        prompts = world_texts(world)["test"]
        return [_with_other_letters(p) for p in prompts if not p.startswith("shift ")]
    raise ValueError(f"split: {split!r} is none of validation, test, seven letters, "
                     "up to seven letters, other letters")


# %%
rows = {}
for split in ("validation", "test", "seven letters", "up to seven letters", "other letters"):
    prompts = prompts_of_split(0, split)
    rows[split] = dict(prompts=len(prompts), first=prompts[0], second=prompts[1])

print(complaint(prompts_of_split, 0, "tset"))
pd.DataFrame(rows).T


# %% [markdown]
# A second kind of question is multiple choice. The paper measures by H4, the mean of four benchmarks ([chapter 15](../15_benchmarks.ipynb)). H4 never lets a model write: it ranks *given* answers by their log-probability. So do we, with four answers. One is right and one follows the wrong rule. Two
# are the right one, spoilt: a letter left out, or two neighbours swapped.

# %%
#| export
def answers_to_choose_from(
    prompt: str, # of a world, with three letters or more
) -> list[str]:  # four different ones: right, by the wrong rule, a letter short, two neighbours swapped
    "The answers of a multiple-choice question; the prompt decides which letters are spoilt."
    right, wrong = answer(prompt), answer(prompt, right=False)
    rng = random.Random(prompt)
    i, j = rng.randrange(len(right)), rng.randrange(len(right) - 1)
    shorter = right[:i] + right[i+1:]
    swapped = right[:j] + right[j+1] + right[j] + right[j+2:]
    return [right, wrong, shorter, swapped]


# %%
for split in ("test", "seven letters", "other letters"):
    for prompt in prompts_of_split(0, split): assert len(set(answers_to_choose_from(prompt))) == 4
{prompt: answers_to_choose_from(prompt) for prompt in prompts_of_split(0, "test")[:3]}


# %% [markdown]
# Now the exam itself. When two students are compared, both should get the same questions. Here they also get the same *luck*: the random
# numbers behind a sampled answer are the same for every method of a world. So a difference between two methods is paired, prompt by
# prompt.

# %%
#| export
@dataclass
class Exam:
    "Questions, and how a model is asked them."
    base: object     # S
    tokenizer: object
    prompts: list
    luck: int        # seed of the random numbers behind sampled answers

    def results(
        self,
        model,
        tau: float = 1., # temperature of the sampled answers; the greedy ones have none
    ) -> dict:           # sampled, greedy: true reward; kl: nats; one number per prompt each
        "Ask a model, at a temperature and greedily."
        responses = respond_ids(model, self.tokenizer, self.prompts, tau, self.luck)
        texts = [text_of(self.tokenizer, response) for response in responses]
        sampled = [true_reward(prompt, text) for prompt, text in zip(self.prompts, texts)]
        greedy = true_rewards(model, self.tokenizer, self.prompts, 0.)
        kl = kl_along(model, self.base, self.tokenizer, self.prompts, responses, tau)
        return dict(
            sampled=np.round(sampled, 4).tolist(),
            greedy=np.round(greedy, 4).tolist(),
            kl=np.round(kl, 3).tolist(),
        )

    @torch.no_grad()
    def first_choices(
        self,
        model,
    ) -> dict:           # choice, choice_per_token: which of the four answers is the likeliest; 0 is the right one
        "Let a model rank `answers_to_choose_from`, by log-probability and by that per token."
        pairs, lengths = [], []
        for prompt in self.prompts:
            asked = prompt_ids(self.tokenizer, prompt)
            given = [self._ids(text) for text in answers_to_choose_from(prompt)]
            lengths.append([len(ids) for ids in given])
            for one, other in (given[:2], given[2:]):           # two answers a row; neither is chosen
                pairs.append(dict(prompt_ids=asked, chosen_ids=one, rejected_ids=other))
        scores = torch.stack(response_logprobs(model, pairs), 1).view(-1, 4)
        per_token = scores / torch.tensor(lengths)
        return {name: score.argmax(1).tolist() for name, score in (("choice", scores), ("choice_per_token", per_token))}

    def choices(
        self,
        model,
    ) -> dict:           # choice, choice_per_token: 1 where the right answer is the likeliest of four, else 0
        "How often a model finds the right answer the likeliest."
        return {name: [int(first == 0) for first in firsts] for name, firsts in self.first_choices(model).items()}

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids + [self.tokenizer.eos_token_id]

    def by_skill(
        self,
        results: dict,   # of one model
        stage: int,      # after which it stands; 0: S
    ) -> pd.DataFrame:   # skill, sampled, greedy, kl, stage
        "Means of the results of one model, skill by skill."
        skills = [prompt.split()[0] for prompt in self.prompts]
        means = pd.DataFrame(results).groupby(skills).mean().round(4)
        return means.rename_axis("skill").reset_index().assign(stage=stage)


# %% [markdown]
# We ask S, and S with half the temperature. How far is S from itself? And will it move when only its temperature changes, and no weight?

# %%
world = build_world(0)
base, tokenizer = load_base(world)
exam = Exam(base, tokenizer, prompts_of_split(0, "validation")[:100], luck=1)

results = {"S": exam.results(base), "S at temperature 0.5": exam.results(base, tau=0.5)}
assert results["S"] == exam.results(base)                       # the same luck, the same answers
assert max(abs(kl) for kl in results["S"]["kl"]) < 1e-9
pd.DataFrame({name: pd.DataFrame(numbers).mean() for name, numbers in results.items()}).T.round(3)

# %% [markdown]
# S is at distance 0 from itself. At half the temperature it answers otherwise, so it is another policy, 0.25 nats away. Its greedy answers are the same, as they have no temperature.
#
# And which of four answers does S find likeliest? Who picks one blindly is right in 25 of 100. (A model that knows nothing does not pick blindly. If all letters are equally likely, the shortest answer always wins, and it is a wrong one; per token all four are tied, and the right one, which stands first, is taken too often.)

# %%
choices = exam.choices(base)
table = pd.DataFrame(choices, index=["misled" if misled(p) else "not misled" for p in exam.prompts])
assert set(table.to_numpy().ravel()) == {0, 1}
table.groupby(level=0).mean().round(2)

# %% [markdown]
# Where S was misled it is right less often than a blind pick, as it finds the wrong rule likelier. Per token nothing changes here: the four answers are nearly equally long.
#
# A mean over all prompts can hide that one skill is lost. So means are kept by skill, too:

# %%
exam.by_skill(results["S"], stage=0)


# %% [markdown]
# ## Equal budgets
#
# A comparison is unfair when one method trains longer. Here every method of DPO sees the same pairs three times, but for Pre-DPO, which has two such runs. Is that all? Nearly. Each stage
# starts a new learning-rate schedule, and every warm-up reaches the peak again. And each chunk may end in a smaller batch, so there are a few more optimizer
# steps. How much learning rate comes together?

# %%
#| export
def learning_rate_sum(
    steps: list, # optimizer steps of each stage
) -> float:
    "Sum of the learning rates of restarted schedules, in units of the peak."
    config = StepwiseConfig(lr=1.0)
    return sum(learning_rate(step, n, config) for n in steps for step in range(n))


# %%
def steps_of(T, pairs=1440): # optimizer steps of each of T stages
    parts = np.array_split(range(pairs), T)
    batches = [math.ceil(len(part) / COMMON_SETTINGS["batch_size"]) for part in parts]
    return [COMMON_SETTINGS["epochs"] * n for n in batches]

budgets = {}
for T in (1, 3, 8):
    steps = steps_of(T)
    budgets[T] = {"sum of learning rates (peaks)": learning_rate_sum(steps), "optimizer steps": sum(steps)}
pd.DataFrame(budgets).rename_axis(columns="stages").round(1)

# %% [markdown]
# For three stages it is little: the sum of learning rates is 5 % larger than for one. For eight it is 19 %, and a method with more of it goes farther from S. So the pages that compare numbers of stages say how much it was.
#
# ## The baselines
#
# What can be had without DPO? A gain of DPO is worth something only if it is more than these three give: S as it is, S at a better temperature, and S fine-tuned on the chosen responses, which learns from the better half of each pair and ignores the other. A baseline is a model, a temperature, and the number of tokens that it was trained on. Fine-tuning takes the chosen responses of all
# sources, and the epochs, batch size and learning rate of its cell.

# %%
#| export
TEMPERATURES = (1., 0.8, 0.6, 0.4, 0.2, 0.1)

def _best_temperature(base, tokenizer, world: World) -> float:
    "The temperature at which S has the highest reward on validation prompts."
    rewards = {}
    for tau in TEMPERATURES: rewards[tau] = np.mean(true_rewards(base, tokenizer, world.validation, tau))
    return max(rewards, key=rewards.get)

def _fine_tuned(cell, base, tokenizer, sources): # -> model, trained tokens
    "S, fine-tuned on the chosen responses."
    config = cell.config
    pairs = [row for rows in sources.values() for row in rows]
    rows = [(row["prompt"][-1]["content"], row["chosen"][-1]["content"]) for row in pairs]
    epochs = config["epochs"]
    model = sft(copy.deepcopy(base), tokenizer, rows, epochs, config["batch_size"], config["lr"], cell.seed)
    tokens = 0
    for prompt, response in rows:
        tokens += len(prompt_ids(tokenizer, prompt)) + len(response) + 1    # one per letter, and EOS
    return model, epochs * tokens

def _run_baseline(cell: Cell, world: World, sources: dict, exam: Exam):
    "A method without DPO: results, what else is kept, tables by stage, tokens."
    model, tau, tokens = exam.base, 1., 0
    if cell.method == "S, best temperature": tau = _best_temperature(exam.base, exam.tokenizer, world)
    if cell.method == "SFT on chosen": model, tokens = _fine_tuned(cell, exam.base, exam.tokenizer, sources)
    results = exam.results(model, tau)
    return results, exam.choices(model), [exam.by_skill(results, 0)], tokens


# %% [markdown]
# Which temperature would you expect to be best, for a model whose most likely answer is often wrong? And what does fine-tuning on 16 pairs of each source
# bring?

# %%
few = {name: rows[:16] for name, rows in TRAINING_DATA["sources"](world, base, tokenizer).items()}
small_world = dataclasses.replace(world, validation=world.validation[:50])

rows = {}
for method in BASELINES:
    cell = Cell(0, 0, method, dict(lr=3e-4))
    results, choices, _, tokens = _run_baseline(cell, small_world, few, exam)
    means = {what: np.mean(numbers) for what, numbers in (results | choices).items()}
    rows[method] = means | dict(tokens=tokens)

print("best temperature:", _best_temperature(base, tokenizer, small_world))
pd.DataFrame(rows).T.round(3)


# %% [markdown]
# S at a low temperature is better than S: its most likely answer is right more often than a sampled one. This costs no training at all, so a method of training has to be
# compared with it.
#
# ## A run of DPO
#
# A run of DPO is one call of `sdpo`. The rest is what we keep of it: the results of its last model, the means by skill of *every* model on the way, the losses, the
# number of steps and pairs in each stage, the mean gamma of each model on each chunk, and the tokens.
#
# Tokens are counted in two columns. `tokens` were trained on. `pass_tokens` were only read, without gradients: by the partition, which reads all pairs
# once under S, and by a moving reference, which reads each chunk but the first. Of relatives they are not counted.

# %%
#| export
def _pass_tokens(run) -> int:
    "Tokens of the partition and of moving references: passes without gradients."
    settings = run.config["settings"]
    in_stage = run.metrics.groupby("stage")["tokens"].sum() / settings["epochs"]
    partition = in_stage.sum()
    partitioned = (run.folder / "partition.json").exists()      # not when a function makes the chunks
    moving = settings["reference"] == "moving"
    references = in_stage.iloc[1:].sum() if moving and partitioned else 0
    return int(partition + references)

def _counting_wrong(make_chunk, wrong: list):
    "A function that makes chunks, watched: the share of wrong labels in each goes into `wrong`."
    def chunk(t, model):
        rows = make_chunk(t, model)
        if rows:
            gaps = [true_gap(row) for row in rows]
            below = [gap < 0 for gap in gaps if gap]            # of equal rewards neither label is wrong
            wrong.append(round(float(np.mean(below)), 4))
        return rows
    return chunk

def _run_dpo(cell: Cell, world: World, sources, exam: Exam):
    """A method of DPO, on sources or on chunks that are made on the way.
    Results, what else is kept, tables by stage, tokens."""
    settings, wrong = cell.config, []
    if callable(sources):
        settings = settings | dict(chunks=_counting_wrong(sources, wrong))
        sources = None
    config = StepwiseConfig(**settings, seed=cell.seed)

    with tempfile.TemporaryDirectory() as folder:
        run = sdpo(world.base, sources, config, Path(folder) / "run")
        results, tables = [], []
        for t in range(1, len(run.stages) + 1):
            model = load_model(str(run.model_folder(t)))
            results.append(exam.results(model))
            tables.append(exam.by_skill(results[-1], t))
        gammas = gamma_table(run).groupby(["model", "chunk"], sort=False)["gamma"].mean().round(4)
        kept = exam.choices(model) | dict(
            pass_tokens=_pass_tokens(run),
            losses=run.metrics["loss"].round(4).tolist(),
            steps=[stage["steps"] for stage in run.stages],
            chunk_pairs=[stage["pairs"] for stage in run.stages],
            gammas=gammas.reset_index().to_json(orient="records"),
        )
        if wrong: kept["wrong_labels"] = wrong
        tokens = int(run.metrics["tokens"].sum())
    return results[-1], kept, tables, tokens


# %% [markdown]
# What must the first loss of a stage be, when the model is its own reference? Then $\gamma_\theta = \gamma_{ref}$, so the loss is $-\log \sigma(0) = \ln 2$. We look for it in the losses.
#
# A small run: three stages on 16 pairs of each source, one epoch each.

# %%
cell = Cell(0, 0, "sDPO", dict(epochs=1, lr=3e-4))
results, kept, tables, tokens = _run_dpo(cell, world, few, exam)

assert kept["chunk_pairs"] == [16, 16, 16]
assert abs(kept["losses"][0] - math.log(2)) < 1e-4          # M_0 is its own reference
print({name: kept[name] for name in ("losses", "steps", "chunk_pairs")})
only_read = kept["pass_tokens"]
print(f"{tokens} tokens trained on")
print(f"{only_read} only read: all pairs once, and two of three chunks once more")
pd.concat(tables).groupby("stage")[["sampled", "greedy", "kl"]].mean().round(3)

# %% [markdown]
# Each row of the table is the model after a stage, each a little farther from S. Each stage has one step here. All first losses are $\ln 2 = 0.693$: a stage starts from its own reference. (To four digits; the last ones may differ.)
#
# `_counting_wrong` watches the functions that write chunks between stages: their labels are made during the run, so this is the only moment at which the wrong ones can be counted. The chunk itself must be the same, watched or not. The judge errs with a probability of 0.2:

# %%
wrong = []
judge = TRAINING_DATA["new"](world, base, tokenizer, "S", "judge", 0.2)
watched = _counting_wrong(judge, wrong)
rows = watched(1, base)
assert rows == judge(1, base)
print(f"{len(rows)} pairs in the chunk; share of wrong labels: {wrong}")


# %% [markdown]
# ## A run of a relative
#
# `sdpo` moves a reference between stages, and TR-DPO moves it within one. So it is trained [in memory](in_memory.ipynb), with the batches and steps of DPO. Pre-DPO could be two calls of `sdpo`; in memory it needs no files.

# %%
#| export
def _run_relative(cell: Cell, world: World, sources: dict, exam: Exam):
    "TR-DPO or Pre-DPO. Results, what else is kept, tables by stage, tokens."
    settings = dict(cell.config)
    moves = {name: settings.pop(name) for name in ("every", "share") if name in settings}
    again = settings.pop("again", False)
    lengths = StepwiseConfig(max_length=settings.pop("max_length"))
    settings.pop("probe")                                       # there are no probes where there is no run
    config = TrainConfig(**settings, seed=cell.seed)

    loaded = load_sources(sources, exam.tokenizer, lengths)
    pairs = [dict(pair) for source in loaded for pair in source.pairs]
    trained = load_S(world.base, pairs, config.precision, "off")
    losses, tables = [], []
    for t in (1, 2) if again else (1,):
        reference = trained.score(pairs)                        # of S; then of the model that came out
        trained.reset()
        losses.append(train_in_memory(trained, pairs, reference, config, t, **moves)["losses"])
        results = exam.results(trained.model)
        tables.append(exam.by_skill(results, t))
    kept = exam.choices(trained.model) | dict(
        losses=[loss for stage in losses for loss in stage],
        steps=[len(stage) for stage in losses],
        chunk_pairs=[len(pairs)] * len(losses),
    )
    prompts = sum(len(pair["prompt_ids"]) for pair in pairs)
    once = int(pair_tokens(pairs).sum()) + prompts              # each response with its prompt
    return results, kept, tables, len(losses) * config.epochs * once


# %% [markdown]
# A TR-DPO whose reference never gets to move is DPO. And where must the loss of the others be $\ln 2$? Three passes over 48 pairs, in batches of 16, make nine steps.

# %%
nine_steps = dict(epochs=3, lr=3e-4, batch_size=16)
curves = {}
for name, method, extra in (
    ("DPO", "DPO", {}),
    ("never moves", "TR-DPO, hard", dict(every=99)),
    ("hard, after every 3", "TR-DPO, hard", dict(every=3)),
    ("soft, after every 3", "TR-DPO, soft", dict(every=3)),
    ("Pre-DPO, second run", "Pre-DPO", {}),
):
    run = _run_relative if method in RELATIVES else _run_dpo
    _, kept, _, _ = run(Cell(0, 0, method, nine_steps | extra), world, few, exam)
    curves[name] = kept["losses"][-9:]
curves = pd.DataFrame(curves).rename_axis("step")

assert (curves["never moves"] - curves["DPO"]).abs().max() < 2e-3
assert (curves["hard, after every 3"][[0, 3, 6]] - math.log(2)).abs().max() < 1e-3
assert curves["Pre-DPO, second run"][0] > math.log(2) + 1e-3
curves.round(3)


# %% [markdown]
# *Never moves* repeats DPO, number by number. With the hard move the loss is back at $\ln 2$ at steps 3 and 6, with the soft one it goes a part of the way. The second run of Pre-DPO starts above: S is not yet where its reference is.
#
# ## From a cell to a row
#
# Now everything is there. `run_cell` builds the world, fetches the data, runs the method and measures it, with one thread, so that the
# result does not depend on the number of cores.

# %%
#| export
def run_cell(
    cell: Cell,              # what to run
    worlds = "runs/worlds",  # folder that keeps worlds
) -> dict:                   # results, what else is kept, stages (JSON), tokens, seconds, weights (hash of S)
    """Train and measure one cell, with one thread; the run itself is thrown away.
    Raises ValueError for a number of pairs where chunks are made on the way."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    world = build_world(cell.world, worlds, cell.body)
    base, tokenizer = load_base(world)

    kind, *asked = cell.data
    sources = cell.maker(world, base, tokenizer, *asked)
    if cell.pairs:
        if callable(sources): raise ValueError(f"pairs: {cell.pairs}, but {kind!r} makes its own chunks; None is right")
        sources = {source: rows[:cell.pairs] for source, rows in sources.items()}

    exam = Exam(base, tokenizer, prompts_of_split(cell.world, cell.split), luck=1 + cell.world)
    run = _run_dpo
    if cell.method in BASELINES: run = _run_baseline
    if cell.method in RELATIVES: run = _run_relative
    results, kept, tables, tokens = run(cell, world, sources, exam)
    return results | kept | dict(
        stages=pd.concat(tables).to_json(orient="records"),
        tokens=tokens,
        seconds=time.perf_counter() - start,
        weights=world.manifest["model"],
    )


# %%
row = run_cell(Cell(0, 0, "DPO", dict(epochs=1, lr=3e-4), "validation", pairs=16))
assert len(row["sampled"]) == len(row["greedy"]) == len(row["kl"]) == len(world.validation)

def short(value): # the first three of a long list, the first letters of a long text
    if isinstance(value, list): return f"{value[:3]} ... {len(value)} numbers" if len(value) > 3 else value
    return value[:40] + " ..." if isinstance(value, str) and len(value) > 40 else value
{name: short(value) for name, value in row.items() if name != "seconds"}

# %% [markdown]
# ## The table of runs
#
# The experiments run for many hours (the [protocol](protocol.ipynb) adds them up), and a machine may stop at any time. So a finished row is written at once, and a grid that is stopped goes on where it was. All experiments share one table, `runs.parquet`, and
# a row is found by the key of its cell. The table is written under another name and then renamed: nobody ever reads half of it. Two grids may run at the same time. Each would read the table, add its row, and write over that of the other; so a lock lets one do all three, and then the other. A key that is there already keeps its row.

# %%
#| export
RESULTS = Path(str(files("sdpo_nb.data"))) / "results"

@functools.lru_cache(maxsize=1)
def _as_written(path, *state): return pd.read_parquet(path)

def read_rows(
    path: Path,  # parquet file
    key: str,    # a column that it has
) -> pd.DataFrame:
    "A table; an empty one with the column `key` where there is no file yet. One that nobody has changed is read once."
    if not path.exists(): return pd.DataFrame({key: []})
    file = path.stat()
    return _as_written(path, file.st_mtime_ns, file.st_size, file.st_ino).copy(deep=False)

def lock_of(
    path: Path,  # of a file that several processes change
) -> FileLock:   # a context
    "Only one process at a time reads the file, changes it and writes it."
    return FileLock(path.with_name(f".{path.name}.lock"))

def add_rows(
    path: Path,   # parquet file
    key: str,     # a column that it has
    *new,         # data frames
) -> pd.DataFrame:
    "The table as it is now, with the rows whose key it does not have yet; one process at a time."
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_of(path):
        rows = read_rows(path, key)
        missing = [table[~table[key].isin(rows[key])] for table in new]
        rows = pd.concat([rows, *missing], ignore_index=True)
        with replacing(path) as unfinished: rows.to_parquet(unfinished, compression="zstd")
    return rows

def read_runs(
    folder = None, # None: the results that travel with the package
) -> pd.DataFrame: # one cell a row
    "The table of runs."
    return read_rows(_runs_file(folder), "key")

def _runs_file(folder): return Path(folder or RESULTS) / "runs.parquet"

def rows_of_cells(
    table: pd.DataFrame, # of runs
    cells: list,         # those asked for
) -> pd.DataFrame:       # one cell a row
    "Those of the cells that are in the table already."
    return table[table["key"].isin({cell.key for cell in cells})]

def stored_rows(
    cells: list,   # those asked for
    folder = None, # None: the results that travel with the package
) -> pd.DataFrame: # one cell a row
    "Those of the cells that are in the table of a folder already."
    return rows_of_cells(read_runs(folder), cells)


# %% [markdown]
# The package carries the rows of all experiments. How many are there, and which of these three cells were run?

# %%
table = read_runs()
asked = [
    Cell(1, 0, "S"),
    Cell(1, 0, "S", split="seven letters"),
    Cell(1, 0, "S", split="validation", body="mamba"),
]
stored = rows_of_cells(table, asked)
print(f"{len(table)} rows; columns: {', '.join(table.columns)}")
stored = stored.assign(reward=stored["sampled"].map(np.mean).round(3))
stored[["world", "seed", "method", "split", "reward"]]


# %% [markdown]
# ## Many cells
#
# Cells are independent of each other, so they run one to a core, each in a process of its own. A process that is *spawned* starts fresh: it does not
# inherit the threads of this one, which can hang after a fork.
#
# They run world by world, so a grid that is stopped has whole worlds. That matters if another machine goes on: it builds the same world a little differently, and the runs of one world must not come from two machines.
#
# When one cell fails, the others go on. The first error is raised at the end, and it says which cell it was.

# %%
#| export
def worker_pool(
    workers: int = None, # None: one for each core
) -> ProcessPoolExecutor:
    "Fresh processes with one thread each, and without progress bars of their own."
    os.environ["TQDM_DISABLE"] = "1"        # for the workers; this process has read it before
    return ProcessPoolExecutor(
        workers or os.cpu_count(),
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )

def _build_beginning(body): build_beginning(body) # a worker sends nothing back

def _build_world(body_and_world):
    body, world = body_and_world
    build_world(world, body=body)

def _build_all(pool, cells):
    "Everything that cells stand on, in the order in which it stands on each other."
    places = sorted({(cell.body, cell.world) for cell in cells})
    bodies = sorted({body for body, _ in places if body != "llama"})
    llamas = [place for place in places if place[0] == "llama"]
    others = [place for place in places if place[0] != "llama"]         # they are tuned to the Llamas
    llamas_first = llamas + others
    list(tqdm(pool.map(_build_beginning, bodies), total=len(bodies), desc="bodies", disable=not bodies))
    list(tqdm(pool.map(_build_world, llamas_first), total=len(llamas_first), desc="worlds"))

def _as_row(cell, results, made_by):
    "What a cell is, what came out, and what made it."
    what = asdict(cell)
    what["settings"] = json.dumps(cell.settings, sort_keys=True)
    what["data"] = json.dumps(cell.data)
    return what | dict(key=cell.key) | results | made_by

def run_grid(
    cells: list,          # each is run once, however often it stands there
    folder = None,        # of the table; None: the results that travel with the package
    desc: str = "cells",  # what the progress bar and the table call it
    workers: int = None,  # processes; None: one for each core
) -> pd.DataFrame:        # one cell a row
    """Run those of the cells that are not in the table yet.
    Raises RuntimeError, after the others are through, where cells failed."""
    path = _runs_file(folder)
    done = read_rows(path, "key")
    known = set(done["key"])
    world_by_world = sorted(cells, key=lambda cell: cell.world)
    todo = {cell.key: cell for cell in world_by_world if cell.key not in known}     # each once
    if not todo: return rows_of_cells(done, cells)

    versions = {package: version(package) for package in ("torch", "transformers")}
    made_by = dict(versions=json.dumps(versions), command=f"python -m sdpo_nb.experiments {desc}")
    failed = []
    with worker_pool(workers) as pool:
        _build_all(pool, todo.values())
        running = {pool.submit(run_cell, cell): cell for cell in todo.values()}
        for future in tqdm(as_completed(running), total=len(todo), desc=desc, unit="cell"):
            cell, error = running[future], future.exception()
            if error:
                failed.append((cell, error))
                continue                                                    # the others go on
            row = _as_row(cell, future.result(), made_by)
            done = add_rows(path, "key", pd.DataFrame([row]))

    if failed:
        cell, error = failed[0]
        raise RuntimeError(f"{len(failed)} of {len(todo)} cells failed, the first is {cell}: {error}; "
                           f"the finished cells are in {path}, run it again") from error
    return rows_of_cells(done, cells)


# %% [markdown]
# Three cells, one of which cannot work: a $\beta$ below zero. (A fresh process cannot see what a notebook defines. So here we take the functions from
# the package, which holds the exported cells of this page.)

# %%
from sdpo_nb.cells import Cell, run_grid

folder = Path(tempfile.mkdtemp())
good = [
    Cell(0, 0, "S", {}, "validation", pairs=16),
    Cell(0, 0, "DPO", dict(epochs=1), "validation", pairs=16),
]
bad = Cell(0, 0, "DPO", dict(beta=-1.0), "validation", pairs=16)
print(complaint(run_grid, [good[0], bad, good[1]], folder, workers=1))

# %% [markdown]
# The two others are in the table. Asked again for those, `run_grid` finds them and starts no process.

# %%
before = (folder / "runs.parquet").stat().st_mtime_ns
rows = run_grid(good, folder).copy()
assert len(rows) == 2
assert (folder / "runs.parquet").stat().st_mtime_ns == before
rows["reward"] = rows["sampled"].map(np.mean).round(3)
rows[["method", "settings", "pairs", "tokens", "reward", "command"]].sort_values("method")


# %% [markdown]
# ## Tables inside a row
#
# Which stage made the gain, and which skill got it? A mean over all prompts cannot tell. So two columns hold a small table each, as JSON: `stages` has the means of every model by skill, `gammas` the mean gamma of every model on every
# chunk. This takes them out again.

# %%
#| export
def unfold_column(
    rows: pd.DataFrame, # of the table of runs
    column: str,        # stages: skill, sampled, greedy, kl, stage; gammas: model, chunk, gamma
) -> pd.DataFrame:      # with world and seed
    "The tables that a column keeps inside each row, one under the other."
    tables = []
    for row in rows.itertuples():
        inner = pd.read_json(io.StringIO(getattr(row, column)))
        tables.append(inner.assign(world=row.world, seed=row.seed))
    return pd.concat(tables, ignore_index=True)


# %%
rows = stored_rows([Cell(world, 0, "sDPO", dict(beta=1.2, lr=1e-4)) for world in (1, 2)])
gammas = unfold_column(rows, "gammas")
gammas.pivot_table("gamma", ["world", "model"], "chunk").round(1)

# %% [markdown]
# Two worlds. From S (`M_0`) to the last model (`M_3`) gamma rises on every chunk: the model prefers the chosen responses more and more.
#
# ## What you now have
#
# - `Cell`: one run, with a key by which it is found.
# - `Exam`: the same questions and the same luck for all methods of a world.
# - `run_cell` and `run_grid`: any setting of stepwise DPO in any world, measured, one row each, and a table that goes on after a stop.
#
# Next: how [two methods are compared](compare.ipynb).
#
# ## Questions to test yourself
#
# 1. Why does the key of a cell hash the settings together with those that all cells have in common, and not only what makes this one different?
#
#    <details><summary>Answer</summary>
#
#    The same run can be written in several ways, with a common setting spelt out or not. Two experiments that need the same run should find one row. (They still find two where one of them spells out a default of `StepwiseConfig`.)
#
#    </details>
# 2. Why do all methods of a world get the same luck?
#
#    <details><summary>Answer</summary>
#
#    Part of the noise of a sampled reward is the random number behind the answer. If both methods have the same number, that part is mostly the same on both sides and falls out of the difference.
#
#    </details>
# 3. A row does not know which version of the code made it. How could one find out that today's code makes other numbers?
#
#    <details><summary>Answer</summary>
#
#    Run a stored cell again and compare the rewards, prompt by prompt. `python -m sdpo_nb.experiments again` does this with one cell of each grid.
#
#    </details>
#
# ## Try this
#
# - Run the small DPO cell above with `seed=1`. Do the rewards change? Does the reward of `S`?
#
#   <details><summary>What you should see</summary>
#
#   The pairs come in another order, so DPO's rewards change a little. S is not trained, and its luck belongs to the world: its row is the same.
#
#   </details>
# - Run the small cell of three stages with the method `sDPO, fixed reference`. Which of its losses are still $\ln 2$?
#
#   <details><summary>What you should see</summary>
#
#   Only that of the first stage. Later stages start from $M_{t-1}$ but are compared with S.
#
#   </details>
