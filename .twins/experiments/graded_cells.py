# %% [markdown]
# # One run on graded tasks
# > What S writes once for each draw, how an arm is trained on it and asked, and the row that stays.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/graded_cells.ipynb)
#
# **You should know** what is [asked](known_truth.ipynb), the [tasks](graded_tasks.ipynb), and [one run on a real model](real_cells.ipynb). **Time** 30 minutes to read, a minute to run.
#
# The experiment with a known truth has two kinds of cells. In a *writing* cell S answers the problems of a draw, twice. In a *training* cell an arm is trained on the pairs of these answers, and then asked the test problems of the draw. Both become rows of one file. So what S wrote is kept with the results, and a run that goes on elsewhere trains on the same pairs.
#
# We follow one draw from its problems to an answer: problems, what S writes, pairs, training, the exam, the row. Then come the plan of all cells, and the way from rows to answers. The model of this page is tiny and has random weights. What it shows is that each part does what it should.

# %%
#| default_exp graded_cells

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

# %% [markdown]
# Tasks and grading come from `graded`, the arms and questions from `known_truth`, the training loop from `real`. New on this page is what joins them.

# %%
#| export
import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

from sdpo_nb.compare import verdict
from sdpo_nb.evaluate import kl_along
from sdpo_nb.graded import TASKS, answer_text, answers_to, grade, ids_of, label_pairs, make_problems
from sdpo_nb.graded import messages_of, sampled_ids, teacher_pairs
from sdpo_nb.in_memory import load_S, train_stages
from sdpo_nb.known_truth import ARMS, BORROWED, COMMON, DRAWS, PROMPTS, QUESTIONS, SEARCH_DRAW, SOURCES
from sdpo_nb.known_truth import CPU_ARMS, CPU_BORROWED, CPU_DRAWS, CPU_SAMPLES, TEST, VALIDATION
from sdpo_nb.known_truth import LONGEST_PAIR, MARGIN, draw_contrasts, graded_grid, stored_levels
from sdpo_nb.logprobs import load_model, load_tokenizer, pairs_hash
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.real import chunk_of
from sdpo_nb.smollm2 import choose_settings
from sdpo_nb.timed import check_alike, mixed_draws, read_results, run_timed
from sdpo_nb.trainer import TrainConfig
from sdpo_nb.world import content_hash

# %%
import contextlib, io, json, tempfile
from dataclasses import replace
from pathlib import Path
from sdpo_nb.world import complaint, make_model, make_tokenizer


# %% [markdown]
# ## The problems of a draw
#
# A draw has problems of three sources for training, and others for the test (the search has those of the validation split in their place). All tasks have the same share. The number of the draw is the seed.
#
# Problems are not stored. They are made from the split, the draw, the levels and `n`, so whoever knows these four has the same problems. Small tasks do not have enough different questions for a large `n`; then questions come again.

# %%
#| export
def draw_problems(
    draw: int,     # its number
    split: str,    # of graded.SPLITS
    levels: dict,  # source -> task -> size
    n: int,        # of each task and source
) -> dict:         # source -> problems, mixed
    "The problems of a draw; the same ones whenever they are asked for."
    problems = {}
    for source, sizes in levels.items():
        rng = random.Random(f"{split} {draw} {source}")
        drawn = []
        for task, size in sizes.items(): drawn += make_problems(n, task, size, split, rng, again=True)
        problems[source] = rng.sample(drawn, len(drawn))
    return problems


# %% [markdown]
# What do the problems of draw 1 look like? For this page two tasks are enough, with a size for each source. The assertions ask for draw 1 twice, and for draw 2.

# %%
LEVELS = { # for this page only
    "easy": dict(add=3, reverse=2),
    "middle": dict(add=4, reverse=3),
    "hard": dict(add=6, reverse=4),
}
problems = draw_problems(1, "train", LEVELS, 12)
assert problems == draw_problems(1, "train", LEVELS, 12)
assert problems != draw_problems(2, "train", LEVELS, 12)
pd.DataFrame({source: [p.question for p in found[:3]] for source, found in problems.items()})


# %% [markdown]
# A column is a source, with its first three questions of 24. The tasks are mixed. The harder a source, the more digits and the more words. Draw 1 is the same when it is asked for again, and draw 2 has other problems.
#
# ## Cells
#
# The key of a cell is a hash of all that it does. If an arm with borrowed settings happens to be one that was run already, it has its key.
#
# A training cell contains its writing cell, and the key of the one enters the key of the other. So with another S, or another way of sampling, all keys are others. The name of the arm is for people and does not enter. The cost is a guess, in units of one exam; [`run_timed`](timed.ipynb) uses it to tell whether a cell still fits into the time.

# %%
#| export
@dataclass(frozen=True)
class WritingCell:
    "S answers the training problems of a draw."
    draw: int       # its number
    n: int          # problems of each task and source
    about: str      # hash of S, the levels, and how answers are sampled
    cost = 3        # in units of an exam
    @property
    def key(self) -> str: return content_hash(["writing", self.draw, self.n, self.about])
    def __str__(self): return f"S writes, draw {self.draw}"

@dataclass(frozen=True)
class GradedCell:
    "An arm, trained on what S wrote in a draw, and asked."
    arm: str        # its name, for people
    stages: tuple   # of (pairs, start, reference)
    settings: tuple # of (name, value): beta, lr
    split: str      # test or validation
    tests: int      # problems of each task and level
    teacher: bool   # whether the program wrote the chosen answers
    written: WritingCell
    @property
    def cost(self) -> int: return 4 if self.stages else 1
    @property
    def draw(self) -> int: return self.written.draw
    @property
    def key(self) -> str:
        parts = [self.written.key, self.stages, self.settings, self.split, self.tests]
        return content_hash(parts + [self.teacher] if self.stages else parts)   # S is trained on no pairs
    def __str__(self):
        settings = ", ".join(f"{name} {value:g}" for name, value in self.settings)
        return f"{self.arm}, draw {self.draw}" + (f", {settings}" if settings else "")


# %% [markdown]
# Does the key forget the name, and does it remember who wrote the chosen answers?

# %%
written = WritingCell(1, 12, "a toy")
dpo = GradedCell("DPO", (("all", "S", "S"),), (("beta", 0.3), ("lr", 1e-5)), "test", 4, False, written)
assert dpo.key == replace(dpo, arm="another name").key
assert dpo.key != replace(dpo, teacher=True).key
print(dpo, "|", written)


# %% [markdown]
# It does both. The line is how the two cells are called in the log of a run.
#
# ## S, three times
#
# A process holds S three times. One copy is trained, and on a card its layers are compiled. One answers, and gets the weights of whatever was trained. One stays as it is, for the KL. At 135 million parameters this is little.
#
# Why not one? Training and writing need a model in different ways: the trained one is set up to read whole pairs, the writer makes one token after the other. With a copy for each, neither has to be set up again.
#
# `load_graded` must choose how pairs are read before S has written anything. It makes a few pairs for this, the right answer against the answer "no". They are only read to try the model out, and are never trained on.
#
# `about` is a hash of the weights of S, the levels, how answers are sampled, and the settings of every run. It is in every key.

# %%
#| export
@dataclass
class Graded:
    "What all cells of a process share."
    base: object         # in_memory.Base: its model is trained
    S: object            # as it is, in eval mode
    writer: object       # answers; gets the weights of what was trained
    tokenizer: object
    levels: dict         # source -> task -> size
    n: int = PROMPTS // len(TASKS)   # training problems of each task and source
    tests: int = TEST                # test problems of each task and level
    validation: int = VALIDATION     # those of the search
    how: dict = field(default_factory=dict)       # max_new, batch of `sampled_ids`
    settings: dict = field(default_factory=lambda: dict(COMMON)) # of TrainConfig, in every run
    rows: dict = field(default_factory=dict)      # key -> row: what is there already
    tables: dict = field(default_factory=dict)    # of the last draw: pairs, and what S says about them

    @property
    def about(self) -> str:
        return content_hash([self.base.hash, self.levels, self.how, self.settings])

    def become(self, model): # -> the writer, with these weights
        with torch.no_grad(): self.writer.load_state_dict(model.state_dict())
        return self.writer

def load_graded(
    model,                     # hub id or folder of S
    levels: dict = None,       # source -> task -> size; None: those that were chosen
    precision: str = "auto",   # of the training passes
    **others,                  # n, tests, validation, how, settings
) -> Graded:
    "Load S three times. Answers are computed in fp32 where `how` names no other precision."
    levels, tokenizer = levels or stored_levels(), load_tokenizer(str(model))
    problems = draw_problems(0, "train", levels, 3)
    tried = []
    for source, found in problems.items():
        tried += _tokenised(teacher_pairs(found, ["no"] * len(found)), tokenizer, source)
    base = load_S(str(model), tried, precision)
    device = str(base.model.device)
    S, writer = (load_model(str(model), device) for _ in range(2))
    return Graded(base, S, writer, tokenizer, levels, **others)

def _tokenised(rows, tokenizer, source): # usable pairs, each with its source
    if not rows: return []
    kept = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    longest_prompt = LONGEST_PAIR * 3 // 4
    found = tokenize_pairs(load_pairs(kept), tokenizer, source, LONGEST_PAIR, longest_prompt, chat=True)
    return [pair | dict(source=source) for pair in found.pairs]


# %% [markdown]
# Our stand-in for SmolLM2 is a tiny Llama with random weights and the tokenizer of the tiny world. Its answers are noise, which is all that this page needs.

# %%
folder = Path(tempfile.mkdtemp())
tok = make_tokenizer()
tok.model_max_length = 1024                     # a letter is a token, and prompts are long here
model = make_model(tok, hidden=32, layers=2)
model.config.max_position_embeddings = 1024
model.save_pretrained(folder / "S")
tok.save_pretrained(folder / "S")

SMALL = dict(n=12, tests=4, validation=4, how=dict(max_new=6), settings=dict(epochs=1, batch_size=8))
graded = load_graded(folder / "S", LEVELS, "fp32", **SMALL)
graded.base.precision, graded.base.logprobs.__name__


# %% [markdown]
# The model that will be trained computes in fp32, as asked, and reads packed pairs.
#
# ## S writes
#
# The row of a writing cell holds two answers to each problem, and how often they were right. The problems need not be kept: the draw makes them again.
#
# There are two kinds of pairs, and both come from the same row:
#
# - *Two answers of S.* The program grades both. The better one is likelier to be chosen, but not certain to be: the label is drawn, as a person may err. Pairs with equal scores are dropped, and so are empty answers.
# - *Teacher.* The program's right answer is chosen, and the first answer of S rejected. It is dropped where S was right, or wrote nothing.

# %%
#| export
def _scores(problems, answers): return [grade(problem, answer) for problem, answer in zip(problems, answers)]

def run_writing(
    cell: WritingCell,  # of one draw
    graded: Graded,     # what the process shares
) -> dict:              # draw, answers: source -> two lists of texts; right: source -> share
    "S answers the training problems of a draw twice."
    writer, answers, right = graded.become(graded.S), {}, {}
    problems = draw_problems(cell.draw, "train", graded.levels, cell.n)
    for i, (source, asked) in enumerate(problems.items()):
        seed = 10_000 * cell.draw + 2 * i
        both = [answers_to(writer, graded.tokenizer, asked, 1., seed + j, **graded.how) for j in range(2)]
        answers[source] = both
        right[source] = float(np.mean([score == 1 for texts in both for score in _scores(asked, texts)]))
    return dict(kind="writing", draw=cell.draw, about=cell.about, answers=answers, right=right)

def pairs_of(
    cell: GradedCell, # what is trained and asked
    graded: Graded,   # with the row of the writing cell among its rows
) -> list[dict]:      # tokenized pairs with source, easy first
    "The pairs of a draw: of what S wrote, or of what the program wrote against it."
    answers = graded.rows[cell.written.key]["answers"]
    problems = draw_problems(cell.draw, "train", graded.levels, cell.written.n)
    pairs = []
    for source, asked in problems.items():
        first, second = answers[source]
        if cell.teacher: rows = teacher_pairs(asked, first)
        else: rows = label_pairs(asked, first, second, seed=cell.draw)
        pairs += _tokenised(rows, graded.tokenizer, source)
    return pairs


# %% [markdown]
# How many pairs does each kind have? The row goes through JSON first, as it would on its way to a file and back. The pairs are made twice, and must be the same.

# %%
written = WritingCell(1, graded.n, graded.about)
graded.rows[written.key] = json.loads(json.dumps(run_writing(written, graded)))     # as from a file
dpo = GradedCell("DPO", tuple(ARMS["DPO"]), (("beta", 0.3), ("lr", 1e-3)), "test", 4, False, written)
sizes = {}
for teacher in (False, True):
    pairs = pairs_of(replace(dpo, teacher=teacher), graded)
    assert pairs == pairs_of(replace(dpo, teacher=teacher), graded)
    kind = "teacher" if teacher else "two answers of S"
    sizes[kind] = pd.Series([p["source"] for p in pairs]).value_counts()
pd.DataFrame(sizes).loc[list(SOURCES)]


# %% [markdown]
# Each source has 24 problems. All 24 give a pair with the teacher. Of pairs with two answers of S there are only 2 to 6: in the others the scores were equal, or an answer was empty. So below the arms are trained on the teacher's pairs.
#
# ## The exam
#
# Each test problem gives three numbers: the score of a sampled answer, the score of the greedy one, and the KL from S along the sampled one. The luck belongs to the draw, so two arms whose probabilities are the same give the same answers, and a difference of two arms is due to them. Answers are computed in fp32 whatever the training was computed in: in bf16 a token near the edge of its piece of the ruler may become another one. (The smaller version for a processor takes that into account and answers in bf16, which is part of its keys.)

# %%
#| export
def graded_exam(
    model,           # as it answers now
    graded: Graded,  # S, the tokenizer, how answers are sampled
    problems: list,  # n of them
    seed: int,       # of the luck
) -> dict:           # sampled, greedy: scores; kl: nats; n numbers each
    "Ask a model, at temperature 1 and greedily."
    prompts = [ids_of(graded.tokenizer, messages_of(problem)) for problem in problems]
    responses = sampled_ids(model, graded.tokenizer, prompts, 1., seed, **graded.how)
    greedy = sampled_ids(model, graded.tokenizer, prompts, 0., seed, **graded.how)
    kl = kl_along(model, graded.S, graded.tokenizer, prompts, responses, batch=16)

    def scores(answers):
        texts = [answer_text(graded.tokenizer, ids) for ids in answers]
        return np.round(_scores(problems, texts), 4).tolist()
    return dict(sampled=scores(responses), greedy=scores(greedy), kl=np.round(kl.numpy(), 3).tolist())


# %% [markdown]
# We ask S itself. There are 24 test problems: two tasks, three levels, four of each. The writer with the weights of S and S itself must give the same results, and the KL of S from S must be 0.

# %%
problems = [p for found in draw_problems(1, "test", LEVELS, 4).values() for p in found]
results = graded_exam(graded.become(graded.S), graded, problems, seed=1)
assert results == graded_exam(graded.S, graded, problems, seed=1)
assert max(map(abs, results["kl"])) < 1e-6                      # S is at no distance from itself
pd.DataFrame(results).mean().round(3).to_dict()


# %% [markdown]
# As it should be, the KL is 0. The mean score is 0.01 for sampled answers and 0 for greedy ones: this S cannot do the tasks.
#
# ## Training
#
# Nothing is written while an arm is trained. If the process is killed, the arm is lost, and nothing else: a run takes less time than writing its checkpoints would. The first loss of a stage that is its own reference must be $\log 2$, as everywhere in this book; we look for it below.
#
# The loop is that of [real cells](real_cells.ipynb): a stage in memory, no file. What S says about the pairs of a draw is computed once for all its arms. From it comes the order that the paper's recipe would take: sources by the share of pairs with $\gamma > 0$ under S.
#
# This order is only noted in the row. The arms take easy, middle and hard as they were made. So one can see later whether the recipe would have found the same order.
#
# The table is kept for one draw and one kind of pairs at a time, and dropped when the next one comes. The arm S has no stages: it trains on nothing, and goes to the exam as it is. Every row of a trained arm holds the hash of its pairs. A draw whose arms had different ones is left out of the answers.

# %%
#| export
def _pairs_and_table(cell, graded): # of a draw, kept for the next arm
    name = (cell.written.key, cell.teacher)
    if name not in graded.tables:
        pairs = pairs_of(cell, graded)
        graded.base.reset()
        graded.tables.clear()
        graded.tables[name] = pairs, graded.base.score(pairs)
    return graded.tables[name]

def _measured_order(pairs, table): # source -> share of pairs with gamma > 0 under S
    gamma = table.gamma(pairs)
    prefers = {}
    for pair, value in zip(pairs, gamma.tolist()): prefers.setdefault(pair["source"], []).append(value > 0)
    return {source: round(float(np.mean(found)), 4) for source, found in prefers.items()}

def _trained(cell, graded, pairs, table_S): # -> stages, for the row; base.model is then the last model
    base = graded.base
    config = TrainConfig(**graded.settings | dict(cell.settings), seed=cell.draw, precision=base.precision)
    def chunk_named(name): return chunk_of(pairs, name, cell.draw)
    stages = []
    for t, chunk, made in train_stages(base, cell.stages, chunk_named, table_S, config):
        stages.append(dict(chunk=cell.stages[t - 1][0], pairs=len(chunk), losses=made["losses"]))
    return stages

def run_graded(
    cell: GradedCell, # what is trained and asked
    graded: Graded,     # with the row of the writing cell among its rows
) -> dict:              # what the cell is; stages; sampled, greedy, kl, of each test problem
    "Train an arm on the pairs of its draw, and ask it."
    stages, kept = [], {}
    model = graded.S
    if cell.stages:
        pairs, table_S = _pairs_and_table(cell, graded)
        stages = _trained(cell, graded, pairs, table_S)
        model = graded.base.model
        kept = dict(prefers=_measured_order(pairs, table_S), trained_on=pairs_hash(pairs))
    problems = draw_problems(cell.draw, cell.split, graded.levels, cell.tests)
    asked = [problem for source in SOURCES for problem in problems[source]]
    results = graded_exam(graded.become(model), graded, asked, seed=1 + cell.draw)
    return kept | results | dict(
        kind="arm",
        arm=cell.arm,
        draw=cell.draw,
        settings=dict(cell.settings),
        teacher=cell.teacher,
        split=cell.split,
        about=cell.written.about,
        precision=graded.base.precision,
        reads=graded.base.logprobs.__name__,
        stages=stages,
    )


# %% [markdown]
# Four arms are trained on the teacher's pairs of draw 1; they and S are asked. Which stages must begin at $\log 2$? And which of the five should be at no distance from S?

# %%
rows = {}
for arm in ("S", "SFT on chosen", "DPO", "sDPO", "sDPO, fixed reference"):
    settings = dpo.settings if arm not in ("S", "SFT on chosen") else dpo.settings[1:]
    cell = replace(dpo, arm=arm, stages=tuple(ARMS[arm]), settings=settings, teacher=True)
    rows[arm] = run_graded(cell, graded)

first = {arm: [stage["losses"][0] for stage in row["stages"]] for arm, row in rows.items()}
for arm in ("DPO", "sDPO"):
    for loss in first[arm]: assert abs(loss - np.log(2)) < 1e-3
assert abs(first["sDPO, fixed reference"][1] - np.log(2)) > 1e-3
kl = {arm: np.mean(row["kl"]) for arm, row in rows.items()}
assert kl["S"] < 1e-6 < min(kl[arm] for arm in rows if arm != "S")
first


# %% [markdown]
# A stage that is its own reference begins at $\log 2 = 0.693$, and the arm with a fixed reference does so once.
#
# Its next stages begin at 0.469 and 0.295. The first batch of a new source is lower there, because the stages before have moved the model away from S towards such chosen answers. The first loss of fine-tuning, 3.93, is minus the mean log-probability of a token and has another scale. The assertions on the KL hold: S is at no distance from itself, and each of the other four has moved.
#
# ## The plan
#
# Why a plan, and not a list? The settings of the arms are not known before the search is complete. The plan is asked again after each cell, with all rows that are there. So a process that is begun anew, on another machine perhaps, needs nothing but the file.
#
# First S writes for the search, and the search is run. When it is complete, the draws come one after the other: S writes, then all arms. So whatever is finished is a number of whole draws and a part of one.
#
# The settings of an arm are those with the highest mean score on the validation problems, sampled answers. Some arms borrow instead. *sDPO at DPO's beta* and *DPO at beta/T* have settings of DPO, with beta as it is or divided by three. The ladder has sDPO at four other betas around its best one. It is needed for a comparison at equal KL, further down.

# %%
#| export
def _cell(arm, stages, settings, split, tests, teacher, written):
    stages, settings = tuple(map(tuple, stages)), tuple(sorted(settings.items()))
    return GradedCell(arm, stages, settings, split, tests, teacher, written)

def search_cells(
    graded: Graded,   # what the process shares
    arms: tuple,      # names of ARMS
    teacher: bool,    # whether the program wrote the chosen answers
) -> list[GradedCell]:
    "Every arm at every setting of its grid, on validation problems of the search draw."
    written = WritingCell(SEARCH_DRAW, graded.n, graded.about)
    cells = []
    for arm in arms:
        for settings in graded_grid(arm):
            cells.append(_cell(arm, ARMS[arm], settings, "validation", graded.validation, teacher, written))
    return cells

def arms_of_a_draw(
    draw: int,        # its number
    chosen: dict,     # arm -> settings
    graded: Graded,   # what the process shares
    arms: tuple,      # names of ARMS
    teacher: bool,    # whether the program wrote the chosen answers
    borrowed = tuple(BORROWED), # names of BORROWED
) -> dict:            # name -> cell
    "Every arm at its settings, and those with borrowed ones."
    written = WritingCell(draw, graded.n, graded.about)
    wanted = {arm: (arm, chosen.get(arm, {})) for arm in arms}
    for name in borrowed:
        arm, lender, factor = BORROWED[name]
        if arm in arms and lender in arms:
            wanted[name] = arm, chosen[lender] | dict(beta=factor * chosen[lender]["beta"])
    return {name: _cell(name, ARMS[arm], settings, "test", graded.tests, teacher, written)
            for name, (arm, settings) in wanted.items()}

def graded_plan(
    graded: Graded,   # what the process shares
    arms: tuple = tuple(ARMS),  # names
    draws = DRAWS,              # numbers
    teacher: bool = False,      # whether the program wrote the chosen answers
    settings: dict = None,      # of all arms, without a search; None: search
    borrowed = tuple(BORROWED), # names of arms with borrowed settings
):                              # rows -> cells, as `run_timed` asks for
    "What is wanted, in order, given the rows that are there."
    search = [] if settings else search_cells(graded, arms, teacher)
    def plan(rows):
        graded.rows = {row["key"]: row for row in rows}
        cells = [search[0].written, *search] if search else []
        if not all(cell.key in graded.rows for cell in search): return cells
        tried = [(cell.arm, dict(cell.settings), -np.mean(graded.rows[cell.key]["sampled"])) for cell in search]
        chosen = _same_for_all(arms, settings) if settings else choose_settings(tried)
        for draw in draws:
            found = arms_of_a_draw(draw, chosen, graded, arms, teacher, borrowed)
            cells += [WritingCell(draw, graded.n, graded.about), *found.values()]
        return cells
    return plan

def _same_for_all(arms, settings): # a rehearsal has no search
    grids = {arm: graded_grid(arm) for arm in arms}
    return {arm: {name: settings[name] for name in grid[0]} if grid else {} for arm, grid in grids.items()}


# %% [markdown]
# How many cells does the real plan have, before the search and after it? We invent the rows of a search.
#
# No model is run for this. The scores are made up, so the settings that win mean nothing; only the cells are counted. The assertion says that no cell is there twice.

# %%
plan = graded_plan(graded)
search = plan([])
rows = [dict(key=cell.key, sampled=[i % 7]) for i, cell in enumerate(search)]
everything = plan(rows)
assert len({cell.key for cell in everything}) == len(everything)
print(f"{len(search)} cells of the search; {len(everything) - len(search)} in {len(DRAWS)} draws")


# %% [markdown]
# The search has one cell in which S writes, 3 for fine-tuning, and 12 for each of six arms: 76. A draw has 15: S writes, then eight arms, and six with borrowed settings. The real number can be smaller. If two arms end up with the same stages and settings, they share a cell.
#
# ## From rows to answers
#
# Rows are arranged by arm and draw. An arm whose settings are those of another has no row of its own; it is found by its key. Then each question is one number per draw.
#
# Why one number per draw? The test problems of a draw are all answered by one trained model, so their scores are not independent. Each draw has pairs, training and luck of its own. The unit that is counted is the draw.
#
# One arm is never trained: *sDPO at the KL of DPO*. In each draw we take the KL and the score of sDPO at its five betas, and read off the score where the KL is that of DPO, on straight lines between the five points. Outside of them the nearest point counts.

# %%
#| export
@dataclass
class FoundArms:
    "What is there of an experiment."
    rows: dict = field(default_factory=dict)    # arm -> draw -> row
    chosen: dict = field(default_factory=dict)  # arm -> settings, once the search is complete
    written: dict = field(default_factory=dict) # draw -> row of the writing cell
    missing: int = None                         # planned cells that are not there, or left out; None: nothing is there
    left_out: dict = field(default_factory=dict) # draw -> what it mixes, of `mixed_draws`

def arrange_graded(
    rows: list,            # of `read_results`
    n: int = PROMPTS // len(TASKS), # training problems of each task and source
    tests: int = TEST,              # test problems of each task and level
    validation: int = VALIDATION,   # those of the search
    **wanted,              # of `graded_plan`: arms, draws, teacher, settings, borrowed
) -> FoundArms:
    """The rows of an experiment. Where they are about several S, those with most rows.
    A draw whose arms were trained on different pairs, on several cards or in several precisions is left out."""
    if not rows: return FoundArms()
    about = pd.Series([row["about"] for row in rows]).mode()[0]
    design = SimpleNamespace(about=about, n=n, tests=tests, validation=validation, rows={})
    planned = graded_plan(design, **wanted)(rows)
    by_key = design.rows
    there = [cell for cell in planned if cell.key in by_key]
    found = FoundArms(missing=len(planned) - len(there))
    for cell in there:
        row = by_key[cell.key]
        if isinstance(cell, WritingCell): found.written[cell.draw] = row
        elif cell.split == "test": found.rows.setdefault(cell.arm, {})[cell.draw] = row
    found.left_out = mixed_draws(found.rows, ("trained_on", "card", "precision", "reads"))
    for draw in found.left_out:
        found.missing += sum(by_draw.pop(draw, None) is not None for by_draw in found.rows.values())
    if planned and isinstance(planned[-1], GradedCell) and planned[-1].split == "validation": return found
    found.chosen = {cell.arm: dict(cell.settings) for cell in planned
                    if isinstance(cell, GradedCell) and cell.split == "test"}
    return found

def draw_means(
    found: FoundArms, # of `arrange_graded`
    arm: str,         # a name, or 'sDPO at the KL of DPO'
    outcome: str,     # sampled, greedy, kl
    level: str = "",  # of SOURCES; "": all problems
) -> dict:            # draw -> mean
    "One number for each draw of an arm; 'sDPO at the KL of DPO' is read off its ladder."
    if arm == "sDPO at the KL of DPO": return _at_the_kl(found, outcome)
    third = SOURCES.index(level) if level else slice(None)
    means = {}
    for draw, row in found.rows.get(arm, {}).items():
        values = np.array_split(row[outcome], len(SOURCES))
        means[draw] = float(np.mean(values[third] if level else row[outcome]))
    return means

def _ladders(found, outcome):
    "Draw -> the KL of DPO, and KL and outcome of sDPO at its five betas, nearest to S first."
    rungs = ["sDPO", *(name for name in BORROWED if name.startswith("sDPO, "))]
    kls, scores = ([draw_means(found, rung, what) for rung in rungs] for what in ("kl", outcome))
    ladders = {}
    for draw, kl in draw_means(found, "DPO", "kl").items():
        if not all(draw in rung for rung in kls): continue
        x, y = (np.array([rung[draw] for rung in what]) for what in (kls, scores))
        order = x.argsort()
        ladders[draw] = kl, x[order], y[order]
    return ladders

def _at_the_kl(found, outcome): # outside: the nearest end
    return {draw: float(np.interp(*ladder)) for draw, ladder in _ladders(found, outcome).items()}

def draws_off_the_ladder(
    found: FoundArms, # of `arrange_graded`
) -> list[int]:
    "The draws in which DPO is nearer to S than sDPO at all five betas, or farther."
    return [draw for draw, (kl, kls, _) in _ladders(found, "kl").items() if not kls[0] <= kl <= kls[-1]]

def question_differences(
    found: FoundArms, # of `arrange_graded`
    questions: pd.DataFrame = QUESTIONS, # question, a, b, outcome
) -> dict:             # question -> (draws,) a minus b, in the draws that have both
    "One number for each question and draw."
    differences = {}
    for asked in questions.itertuples():
        a, b = (draw_means(found, arm, asked.outcome) for arm in (asked.a, asked.b))
        both = sorted(a.keys() & b.keys())
        differences[asked.question] = np.array([a[draw] - b[draw] for draw in both])
    return differences

def common_draws(
    found: FoundArms, # of `arrange_graded`
    questions: pd.DataFrame = QUESTIONS, # question, a, b, outcome
) -> list[int]:
    "The draws that have S and all arms of the questions."
    arms = {"S", *questions["a"], *questions["b"]}
    return sorted(set.intersection(*[set(draw_means(found, arm, "sampled")) for arm in arms]))


# %% [markdown]
# A question whose outcome is not sensitive is not answered: if DPO minus S does not exceed twice the margin, nothing is said about the arms.
#
# Why this rule? If DPO itself has learned nothing that the outcome can see, all arms may look equal. That would be a finding about the outcome, and not about the arms.

# %%
#| export
def graded_answers(
    found: FoundArms, # of `arrange_graded`
    questions: pd.DataFrame = QUESTIONS, # question, a, b, outcome
) -> pd.DataFrame:     # of `draw_contrasts`, with `says`
    "The answer to each question that two draws or more have."
    differences = question_differences(found, questions)
    table = draw_contrasts({asked: values for asked, values in differences.items() if len(values) > 1})
    outcomes = questions.set_index("question")["outcome"]
    says = []
    for _, row in table.iterrows():
        DPO, S = (draw_means(found, arm, outcomes[row["question"]]) for arm in ("DPO", "S"))
        gain = np.mean([DPO[draw] - S[draw] for draw in DPO if draw in S])
        says.append(verdict(row) if gain > 2 * MARGIN else "this outcome cannot tell")
    return table.assign(says=says)

def graded_means(
    found: FoundArms, # of `arrange_graded`
) -> pd.DataFrame:    # an arm a line: sampled, greedy, of each source (sampled), right (share), kl (nats)
    "What stands beside the answers: means over the draws of an arm, without a test."
    def mean(arm, *asked): return np.mean(list(draw_means(found, arm, *asked).values()))
    table = {}
    for arm, by_draw in found.rows.items():
        if not by_draw: continue
        right = [np.mean(np.array(row["sampled"]) == 1) for row in by_draw.values()]
        means = {outcome: mean(arm, outcome) for outcome in ("sampled", "greedy", "kl")}
        levels = {level: mean(arm, "sampled", level) for level in SOURCES}
        table[arm] = means | levels | dict(right=np.mean(right))
    return pd.DataFrame(table).T


# %% [markdown]
# Two draws of a toy: three arms without a search, and what is borrowed from them. With one setting for all, `sDPO at DPO's beta` is `sDPO` itself: it has no row, and is found.

# %%
toy = dict(arms=("S", "DPO", "sDPO"), draws=(1, 2), teacher=True, settings=dict(beta=0.3, lr=1e-3))
plan, made = graded_plan(graded, **toy), []
while todo := [cell for cell in plan(made) if cell.key not in graded.rows]:
    run = run_writing if isinstance(todo[0], WritingCell) else run_graded
    made.append(dict(key=todo[0].key, card="CPU") | run(todo[0], graded))

sizes = {name: SMALL[name] for name in ("n", "tests", "validation")}
found = arrange_graded(made, **sizes, **toy)
assert found.missing == 0
assert found.rows["sDPO at DPO's beta"] == found.rows["sDPO"]
answered = QUESTIONS[QUESTIONS["b"].str.startswith("DPO")]
assert all(len(values) == 2 for values in question_differences(found, answered).values())
assert common_draws(found, answered[:1]) == [1, 2]
print(len(made), "rows of the toy")
graded_answers(found, answered)[["question", "mean", "low", "high", "p", "p_equal", "says"]].round(3)

# %% [markdown]
# The arms are random models that have learned a little; the numbers say nothing. What counts is that every question is asked of the right rows.
#
# A draw has nine rows: S writes, three arms, and five of the six arms with borrowed settings, since one is found under sDPO. Two draws make 18. The four questions that the toy can answer all end with *this outcome cannot tell*: DPO has gained too little on S. Look at the greedy line. Its difference is 0.000 and its `p_equal` is 0.000, so without the rule it would be called equal.
#
# Beside the answers stand each level by itself, the share of right answers, and the KL.

# %%
graded_means(found).round(3)

# %% [markdown]
# In which draws does DPO lie outside the ladder, so that the nearest end was taken? And what if one arm of draw 2 had been trained on other pairs?

# %%
print(draws_off_the_ladder(found))
elsewhere = [*made[:-1], made[-1] | dict(trained_on="other pairs")]
mixed = arrange_graded(elsewhere, **sizes, **toy)
assert common_draws(mixed, answered[:1]) == [1]
assert mixed.missing == 9
mixed.left_out[2].split(":")[0]

# %% [markdown]
# In both: DPO is nearer to S than sDPO at any of its betas, so here the third question is not asked at equal KL. The page with the answers says in how many draws it is so. And the draw with other pairs is left out. Its nine rows count as missing, so nothing is concluded.
#
# ## The command
#
# `python -m sdpo_nb.experiments known_truth --minutes 8 --folder OUT` goes on with the plan for some minutes, on whatever device there is. Everything of `run_timed` holds: a finished cell is written at once, and what does not fit is not begun. `known_truth_teacher` is the same with the teacher's pairs, for DPO and three arms of stages. `known_truth_cpu` is the [smaller version](known_truth.ipynb) for a processor. `known_truth_rehearsal` tries all parts on few problems, without a search.
#
# If you have a card for some minutes only, you call it again and again, with the same folder. The file of rows is all that a call needs from the one before.

# %%
#| export
TEACHER_ARMS = ("S", "SFT on chosen", "DPO", "sDPO", "sDPO, random", "sDPO, hard first")
SETTLED = dict(beta=0.1, lr=1e-5)   # where there is no search
REHEARSAL = dict(n=2, tests=1, settings=COMMON | dict(epochs=1))
PLANS = { # name -> of `graded_plan`, of `load_graded`
    "known_truth": (dict(), dict()),
    "known_truth_teacher": (dict(arms=TEACHER_ARMS, teacher=True), dict()),
    "known_truth_cpu": (dict(arms=CPU_ARMS, draws=CPU_DRAWS, settings=SETTLED, borrowed=CPU_BORROWED), CPU_SAMPLES),
    "known_truth_rehearsal": (dict(arms=("S", "DPO"), draws=(1,), settings=SETTLED), REHEARSAL),
}

def run_known_truth(
    name: str,               # of PLANS
    folder,                  # for the rows
    minutes: float = None,   # from the start of the process; None: until all is done
    model = "HuggingFaceTB/SmolLM2-135M-Instruct", # hub id or folder of S
    precision: str = "auto", # bf16, fp16, fp32, or what suits the device
    **others,                # of `load_graded`: levels, n, tests, how, settings
) -> list[dict]:             # rows
    "Go on with an experiment for some minutes. Raises ValueError for another name."
    if name not in PLANS: raise ValueError(f"experiment: {name!r} is none of {', '.join(PLANS)}")
    wanted, loaded = PLANS[name]
    graded = load_graded(model, precision=precision, **loaded | others)
    check_alike(name, folder, precision=graded.base.precision, reads=graded.base.logprobs.__name__)

    def run(cell):
        if isinstance(cell, WritingCell): return run_writing(cell, graded)
        return run_graded(cell, graded)
    return run_timed(name, graded_plan(graded, **wanted), run, folder, minutes, graded.base.model.device)

def read_known_truth(
    name: str,    # of PLANS
) -> FoundArms:
    "The rows of an experiment, from the results that travel with the package or were brought back."
    wanted, loaded = PLANS[name]
    sizes = {what: loaded[what] for what in ("n", "tests", "validation") if what in loaded}
    return arrange_graded(read_results(name), **sizes, **wanted)


# %% [markdown]
# The rehearsal on the tiny S, from the first cell to the last. And what does a name say that does not exist, here with a blank in place of the underscore?

# %%
with contextlib.redirect_stdout(io.StringIO()) as said:
    name = "known_truth_rehearsal"
    rows = run_known_truth(name, folder, None, folder / "S", "fp32", levels=LEVELS, **SMALL)
assert "4 new rows" in said.getvalue()
assert [row.get("arm", "S writes") for row in rows] == ["S writes", "S", "DPO", "DPO at beta/T"]
print(complaint(run_known_truth, "known truth", folder))

# %% [markdown]
# It made four rows: S writes, S, DPO, and DPO at a third of its beta. The wrong name gets one line that lists the right ones.
#
# ## What you now have
#
# - `WritingCell` and `GradedCell`: what S wrote, and what an arm made of it, as rows of one file.
# - `run_known_truth`: the plan, worked off for some minutes, on a card or a processor.
# - `arrange_graded` and `question_differences`: from rows to one number for each question and draw; `graded_means`: what stands beside them.
#
# ## Questions to test yourself
#
# 1. Why are the answers of S rows of their own, and not made again by every arm?
#
#    <details><summary>Answer</summary>
#
#    Another card may round otherwise, and one other token makes another pair. All arms of a draw must train on the same pairs, wherever they are run. So a second machine must be given the file of rows. If it is not, S writes again there, and `arrange_graded` leaves out the draws that mix both.
#
#    </details>
# 2. Why does the key of the arm S not depend on the kind of pairs?
#
#    <details><summary>Answer</summary>
#
#    S is trained on none. Its row answers for both kinds.
#
#    </details>
#
# ## Try this
#
# - Ask for the cells of the plan with `teacher=True` and compare their keys with those of the plan without. How many cells do both have?
#
#   <details><summary>What you should see</summary>
#
#   With the rows of a search given, as above: the writing cells of all draws and S in each of them, 21 in all with that of the search.
#
#   </details>
