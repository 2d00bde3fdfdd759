# %% [markdown]
# # Tasks that a program grades
# > Additions, words to sort and to reverse, JSON, answers of n words: a real model writes, and a program says how right it is.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/graded_tasks.ipynb)
#
# **You should know** the [tiny world](../00_world.ipynb): its true reward, its luck, and how its pairs are made. **Time** 30 minutes to read, some seconds to run.
#
# In the tiny world we know how right every answer is. But its model has 337 thousand parameters, and was made for us. Can we have the same with a real model? Yes, if we ask it for things that a program can grade. This page makes such tasks, in sizes from easy to hard, and the preference pairs of them. The model is SmolLM2-135M-Instruct. The question that all this is for is on the page [known truth](known_truth.ipynb).

# %%
#| default_exp graded

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
import hashlib, json, math, random, re
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from sdpo_nb.cells import RESULTS
from sdpo_nb.evaluate import generating
from sdpo_nb.logprobs import load_model, load_tokenizer
from sdpo_nb.timed import run_timed
from sdpo_nb.world import K, edit_distance

# %%
import pandas as pd
from sdpo_nb.world import complaint, load_base, load_world, respond_ids
torch.set_num_threads(1);


# %% [markdown]
# ## A problem
#
# A *problem* is a task, a size, a question, and a right answer as the program would write it. It also has a *content*: what it is about, in a form that does not depend on the order. `3 + 4` and `4 + 3` have the same content, and so do sorting three words and reversing them. The content decides, by its hash, whether a problem belongs to training, to validation or to test. So no sum is trained in one order and tested in the other.

# %%
#| export
@dataclass(frozen=True)
class Problem:
    "Something to ask, which a program can grade."
    task: str     # of TASKS
    size: int     # how large it is: see TASKS
    question: str # what the user says
    right: str    # a right answer; where there are several, one of them
    content: str  # what decides on its split

SPLITS = ("train", "validation", "test")

def split_of_content(
    content: str, # of a problem
) -> str:         # of SPLITS
    "Where a problem belongs: 60, 20 and 20 of a hundred, by the hash of its content."
    percent = int(hashlib.sha256(content.encode()).hexdigest()[:8], 16) % 100
    if percent < 60: return "train"
    return "validation" if percent < 80 else "test"


# %% [markdown]
# Here are the words that all tasks draw from. They are short, common, and each is one token of SmolLM2.

# %%
#| export
WORDS = """
air animal apple arm art baby back ball bank beach bear bed bell bird blood board boat body bone
book bottle box boy bread bridge brother building bus cake camera car card cat chair child church
circle city clock cloud coat coffee color corn country cow cup dance daughter desk dinner doctor dog
door dream dress ear earth egg engine eye face family farm father feather field finger fire fish
floor flower food foot forest friend fruit game garden girl glass gold grass hair hand hat head
heart hill horse hospital hotel house ice island jacket key king kitchen knife lake lamp leaf leg
letter light lion machine map market meat milk mirror money moon morning mother mountain mouth music
name neck night nose ocean office oil orange page paint paper park party pen phone picture plant
plate pool queen rain ring river road rock room rose salt sand school sea seed sheep ship shirt shoe
shop sister skin sky snow soap sock song soup spoon spring star stone storm street sugar summer sun
table tail teacher tea tent tiger tooth town toy train tree truck village voice wall watch water
week wheel wind window wine winter woman wood world year
""".split()

# %%
assert len(set(WORDS)) == len(WORDS)
assert all(word.isalpha() and word.islower() for word in WORDS)
len(WORDS)


# %% [markdown]
# ## Five tasks
#
# Why these five? Each has one rule that a program can check, a size that can grow, and an answer of a few tokens. They ask for different things: numbers, an order that must be known (the alphabet), an order that stands in the question, a form, and a length. A method that only teaches a form, say, cannot hide behind the mean.
#
# Each task is a function that draws a problem of a size. What is a size? For additions it is the digits of both numbers together; else the number of words or keys. A larger problem holds a smaller one: who adds three digits has to add one digit three times, and who sorts four words has to know how three are sorted. JSON builds on sorting, too, as its keys are wanted in alphabetical order. In this sense a level builds on the one before it.

# %%
#| export
def _addition(size, rng): # digits of both numbers together
    digits = (size + 1) // 2, size // 2
    a, b = (rng.randrange(10 ** (n - 1), 10 ** n) for n in digits)
    if rng.random() < 0.5: a, b = b, a
    content = "add " + " ".join(map(str, sorted([a, b])))
    return Problem("add", size, f"{a} + {b} =", f"{a} + {b} = {a + b}", content)

def _words(task, size, rng):
    words = rng.sample(WORDS, size)
    answer = sorted(words) if task == "sort" else words[::-1]
    content = "words " + " ".join(sorted(words))
    return Problem(task, size, f"{task.capitalize()}: {', '.join(words)}", ", ".join(answer), content)

def _sorting(size, rng): return _words("sort", size, rng)
def _reversing(size, rng): return _words("reverse", size, rng)

def _json(size, rng): # keys
    keys = rng.sample(WORDS, size)
    quoted = ", ".join(f'"{key}"' for key in keys)
    right = json.dumps({key: rng.randint(1, 9) for key in sorted(keys)})
    question = f"JSON with the keys {quoted}, in alphabetical order"
    return Problem("json", size, question, right, "json " + " ".join(sorted(keys)))

def _counting(size, rng): # words of the answer
    topic = rng.choice(WORDS)
    right = " ".join(rng.sample(WORDS, size))
    return Problem("count", size, f"Write exactly {size} words about: {topic}", right, f"count {topic}")

TASKS = { # name -> (size, random.Random) -> Problem
    "add": _addition,       # size: digits of both numbers together
    "sort": _sorting,       # words
    "reverse": _reversing,  # words
    "json": _json,          # keys
    "count": _counting,     # words that the answer should have
}

# %%
drawn = [draw(3, random.Random(0)) for draw in TASKS.values()]
pd.DataFrame([vars(problem) | dict(split=split_of_content(problem.content)) for problem in drawn])


# %% [markdown]
# ## The grader
#
# The grader gives a number from 0 to 1. As in the tiny world there is partial credit: comparing two wrong answers would else be tossing a coin. What counts, and what does not?
#
# - *add*: the last number of the answer counts, so words around it do no harm. `1,234` is one number. The score is that of the tiny world, letter by letter: 1 minus the edit distance as a share of the longer string.
# - *sort* and *reverse*: all words of the answer, in their order, without regard to capitals and punctuation. The same score, word by word. So each word that does not belong there costs something.
# - *json*: the answer must be one JSON object; a code fence around it does no harm, and anything else does: then the score is 0. Else it is the same score again, key by key: which keys, and in which order. Values are free.
# - *count*: 1 minus the distance of the number of words to the number wanted, as a share of the larger one. Only the number counts, not the sense.

# %%
#| export
def _likeness(given, wanted): # strings, or lists of words
    "1 where they are equal, less for each letter (or word) that has to be mended."
    return 1 - edit_distance(given, wanted) / max(len(given), len(wanted), 1)

def _last_number(text):
    found = re.findall(r"\d+(?:,\d{3})+(?!\d)|\d+", text)
    return found[-1].replace(",", "") if found else ""

def _words_of(text): return re.findall(r"[\w'-]*\w", text.lower())

def _grade_number(problem, response): return _likeness(_last_number(response), _last_number(problem.right))

def _grade_words(problem, response): return _likeness(_words_of(response), _words_of(problem.right))

def _pairs_of(text):
    "(key, value) pairs of one JSON object, in a code fence or without; None for anything else."
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text.strip(), re.DOTALL)
    try: found = json.loads(fenced[1] if fenced else text, object_pairs_hook=lambda pairs: ("object", pairs))
    except (ValueError, RecursionError): return None
    return found[1] if isinstance(found, tuple) else None

def _grade_json(problem, response):
    wanted, found = list(json.loads(problem.right)), _pairs_of(response)
    return 0. if found is None else _likeness([key for key, _ in found], wanted)

def _grade_count(problem, response):
    n = len(_words_of(response))
    return 1 - abs(n - problem.size) / max(n, problem.size)

GRADERS = dict(
    add=_grade_number,
    sort=_grade_words,
    reverse=_grade_words,
    json=_grade_json,
    count=_grade_count,
)

def grade(
    problem: Problem, # what was asked
    response: str,    # any text
) -> float:           # in [0, 1]; 1: right
    "How right an answer is; a program decides, and always in the same way."
    return GRADERS[problem.task](problem, response)


# %% [markdown]
# One could think of other rules, and each has its price. A rule that forgives more is harder to foresee: if any number in the answer were accepted, a model could list ten of them. A rule that forgives less leaves no partial credit, and on a hard level all answers would be equal. What a model is trained towards is the rule, and not what we had in mind. So the rules are few and short, and stand here before anything is trained on them.
#
# Before you look at the scores: which of these answers are right?

# %%
JSON_QUESTION = 'JSON with the keys "sun", "moon", in alphabetical order'
ASKED = {
    "add": Problem("add", 6, "612 + 722 =", "612 + 722 = 1334", "add 612 722"),
    "sort": Problem("sort", 3, "Sort: sea, arm, oil", "arm, oil, sea", "words arm oil sea"),
    "json": Problem("json", 2, JSON_QUESTION, '{"moon": 1, "sun": 2}', "json moon sun"),
    "count": Problem("count", 3, "Write exactly 3 words about: rain", "grey wet cold", "count rain"),
}
ANSWERS = [
    ("add", "The sum is 1,334."),
    ("add", "612 + 722 = 1344"),
    ("sort", "Arm, oil and sea"),
    ("sort", "arm, sea, oil"),
    ("json", '```json\n{"moon": [], "sun": null}\n```'),
    ("json", '{"sun": 1, "moon": 2}'),
    ("json", '{"moon": 1}'),
    ("json", 'Here it is: {"moon": 1, "sun": 2}'),
    ("count", "Rain is wet."),
    ("count", "Wet"),
]
scores = [grade(ASKED[task], response) for task, response in ANSWERS]
for problem in ASKED.values(): assert grade(problem, problem.right) == 1
for (task, _), score in zip(ANSWERS, scores): assert 0 <= score <= 1, task
table = pd.DataFrame(ANSWERS, columns=["task", "answer"])
table["score"] = scores
assert table.loc[table["score"] == 1].index.tolist() == [0, 4, 8]
table.round(2)

# %% [markdown]
# ## Examples come first
#
# Asked for `7 + 7`, SmolLM2 may well write an essay about adding. What we want to measure is whether it can add, and not whether it guesses the form of the answer. So a prompt begins with three examples, each a question and its right answer as two turns of a conversation. All prompts of one task and size have the same examples, and a problem with the content of an example is never drawn.

# %%
#| export
EXAMPLES = 3 # turns of question and answer before the question

def _draw(task, size, split, rng, without=()):
    "A problem of a split, with none of these contents. Raises ValueError where none is found."
    for _ in range(10_000):
        problem = TASKS[task](size, rng)
        if split_of_content(problem.content) == split and problem.content not in without: return problem
    raise ValueError(f"{task}, size {size}: no problem is left in '{split}'; "
                     "ask for fewer, or for larger ones")

def example_problems(
    task: str, # of TASKS
    size: int, # of the problems
) -> list[Problem]:
    "The examples of a task and size: always the same ones."
    rng, taken = random.Random(f"examples of {task} {size}"), []
    for _ in range(EXAMPLES): taken.append(_draw(task, size, "train", rng, [p.content for p in taken]))
    return taken

def _turn(role, text): return dict(role=role, content=text)

def messages_of(
    problem: Problem, # what is asked
) -> list[dict]:      # turns with role and content, the question last
    "The prompt of a problem: examples, then the question."
    turns = []
    for example in example_problems(problem.task, problem.size):
        turns += [_turn("user", example.question), _turn("assistant", example.right)]
    return turns + [_turn("user", problem.question)]

def make_problems(
    n: int,              # how many
    task: str,           # of TASKS
    size: int,           # of the problems
    split: str,          # of SPLITS
    rng: random.Random,  # draws them; is moved on
    again: bool = False, # whether questions may come again, once there are no others
) -> list[Problem]:      # n problems, as different as they can be
    """Draw problems of one split, none with the content of an example.
    Raises ValueError for an unknown task or split, and where so many different ones cannot be found."""
    if task not in TASKS: raise ValueError(f"task '{task}': expected one of {tuple(TASKS)}")
    if split not in SPLITS: raise ValueError(f"split '{split}': expected one of {SPLITS}")
    examples = {problem.content for problem in example_problems(task, size)}
    found, missed = {}, 0
    while len(found) < n and missed < 1000:
        problem = _draw(task, size, split, rng, examples)
        missed = missed + 1 if problem.question in found else 0
        found.setdefault(problem.question, problem)
    problems = list(found.values())
    if len(problems) < n and not again:
        raise ValueError(f"{task}, size {size}: found {len(problems)} of {n} problems "
                         f"for '{split}'; ask for fewer")
    return problems + rng.choices(problems, k=n - len(problems))


# %% [markdown]
# One prompt, and a request for more than there is:

# %%
problem = make_problems(1, "reverse", 3, "test", random.Random(0))[0]
for turn in messages_of(problem): print(f"{turn['role']:>9}: {turn['content']}")
print(complaint(make_problems, 300, "add", 2, "test", random.Random(0)))

# %% [markdown]
# Are the splits apart? We draw from all three, and compare contents:

# %%
contents = {}
for split in SPLITS:
    rng = random.Random(1)
    drawn = [p for task in TASKS for p in make_problems(10, task, 4, split, rng)]
    contents[split] = {p.content for p in drawn}
    assert {split_of_content(c) for c in contents[split]} == {split}

shown = {c for task in TASKS for c in (p.content for p in example_problems(task, 4))}
assert not any(contents[split] & shown for split in SPLITS)
assert not contents["train"] & contents["test"]
{split: sorted(found)[:2] for split, found in contents.items()}

# %% [markdown]
# ## Asking the model
#
# Answers are sampled with *luck*, as in the tiny world: one number from 0 to 1 for each prompt and place, drawn beforehand. Two models with the same luck differ only where their probabilities do. Here this is a small object that transformers' `generate` takes: it looks up on which token the luck falls, and forbids all others. `generate` does the rest: prompts of unequal length in one batch, padded on the left, and an end as soon as all answers are finished.

# %%
#| export
LONGEST = 32 # tokens of an answer

class _Luck(LogitsProcessor):
    "Leaves the one token on which the luck falls: the ruler of chapter 00."
    def __init__(self, luck, tau, start): self.luck, self.tau, self.start = luck, tau, start
    def __call__(self, ids, scores):
        place = ids.shape[1] - self.start
        ends = (scores.double() / self.tau).softmax(-1).cumsum(-1)
        token = torch.searchsorted(ends, self.luck[:, place, None].contiguous())
        token = token.clamp(max=scores.shape[-1] - 1)  # the last end may be a little below 1
        return torch.full_like(scores, -math.inf).scatter(1, token, 0.)

def ids_of(
    tokenizer,         # with a chat template
    messages: list,    # turns with role and content
) -> list[int]:
    "A conversation as token ids, up to where the assistant begins."
    how = dict(add_generation_prompt=True, tokenize=True, return_dict=False)
    return tokenizer.apply_chat_template(messages, **how)

def _batches(rows, batch): # lists of numbers of rows, of like length
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[i:i + batch] for i in range(0, len(order), batch)]

def sampled_ids(
    model,                 # a causal language model; stays in the mode it was in
    tokenizer,             # of the model
    prompts: list,         # n lists of token ids
    tau: float = 1.,       # sampling temperature; 0 is greedy
    seed: int = 0,         # of the luck
    max_new: int = LONGEST,# longest response, in tokens
    batch: int = 64,       # prompts at a time
    precision: str = "fp32", # fp32, bf16 or fp16, as in chapter 02
) -> list[list[int]]:      # n responses; the EOS token included, where it came in time
    "One response per prompt, in batches padded on the left."
    g = torch.Generator().manual_seed(seed)
    luck = torch.rand(len(prompts), max_new, dtype=torch.float64, generator=g).to(model.device)
    eos, out = tokenizer.eos_token_id, [None] * len(prompts)
    how = dict(do_sample=False, max_new_tokens=max_new, eos_token_id=eos, pad_token_id=eos)
    with generating(model, precision, **how):
        for rows in _batches(prompts, batch):
            width = max(len(prompts[i]) for i in rows)
            pads = [width - len(prompts[i]) for i in rows]
            ids = torch.tensor([[eos] * pad + prompts[i] for i, pad in zip(rows, pads)], device=model.device)
            seen = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=model.device)
            choose = LogitsProcessorList([_Luck(luck[rows], tau, width)] if tau else [])
            new = model.generate(input_ids=ids, attention_mask=seen, logits_processor=choose)
            for i, y in zip(rows, new[:, width:].tolist()):
                out[i] = y[:y.index(eos) + 1] if eos in y else y
    return out


# %% [markdown]
# The tiny world has this already, for prompts of equal length (chapter 00). The same luck must give the same answers here, also with all lengths in one batch:

# %%
w = load_world()
S, tok = load_base(w)
asked = w.test[:40]
as_turns = [ids_of(tok, [_turn("user", prompt)]) for prompt in asked]
assert len(set(map(len, as_turns))) > 3
for tau in (1., 0.):
    here = sampled_ids(S, tok, as_turns, tau, seed=3, max_new=8)
    assert here == respond_ids(S, tok, asked, tau, seed=3)
print(tok.batch_decode(here[:3], skip_special_tokens=True))


# %% [markdown]
# ## Pairs
#
# Pairs are made as in the tiny world: S answers twice, and the label is drawn by Bradley-Terry on the two scores. With scores $r_1$ and $r_2$, the first answer is chosen with probability
#
# $$P(y_1 \succ y_2) = \sigma\big(k\,(r_1 - r_2)\big), \qquad k = 6. \tag{1}$$
#
# Two answers with equal scores say nothing, and are dropped. So are empty ones. On a hard level S is hardly ever right, and most pairs compare two wrong answers. So there is another kind, off the policy: the *teacher*. There the chosen answer is the right one, written by the program, and the rejected one is what S wrote, if it was not right.

# %%
#| export
def answer_text(
    tokenizer,  # that made the ids
    ids: list,  # of a response
) -> str:
    "A response as text, without special tokens and without blanks at its ends."
    return tokenizer.decode(ids, skip_special_tokens=True).strip()

def answers_to(
    model,                  # as for `sampled_ids`
    tokenizer,              # of the model
    problems: list,         # n of them
    tau: float = 1.,        # sampling temperature; 0 is greedy
    seed: int = 0,          # of the luck
    **how,                  # max_new, batch, precision
) -> list[str]:             # n texts
    "One answer per problem, as text."
    prompts = [ids_of(tokenizer, messages_of(problem)) for problem in problems]
    return [answer_text(tokenizer, ids) for ids in sampled_ids(model, tokenizer, prompts, tau, seed, **how)]

def _pair(problem, chosen, rejected, flipped):
    return dict(
        prompt=messages_of(problem),
        chosen=[_turn("assistant", chosen)],
        rejected=[_turn("assistant", rejected)],
        flipped=flipped,
        task=problem.task,
        size=problem.size,
    )

def label_pairs(
    problems: list, # n of them
    first: list,    # n answers
    second: list,   # n other answers to the same problems
    seed: int,      # of the labels
    k: float = K,   # scale of Bradley-Terry
) -> list[dict]:    # rows of messages: prompt, chosen, rejected; flipped: the better one was rejected
    "Two answers to each problem, labelled by (1). Equal scores and empty answers are dropped."
    rng, rows = random.Random(seed), []
    for problem, y, z in zip(problems, first, second):
        gap, coin = grade(problem, y) - grade(problem, z), rng.random()
        if not gap or not y or not z: continue
        y_wins = coin < 1 / (1 + math.exp(-k * gap))
        chosen, rejected = (y, z) if y_wins else (z, y)
        rows.append(_pair(problem, chosen, rejected, y_wins != (gap > 0)))
    return rows

def teacher_pairs(
    problems: list, # n of them
    answers: list,  # n answers of S
) -> list[dict]:    # as of `label_pairs`
    "The right answer against what S wrote, where that was neither right nor empty."
    return [_pair(problem, problem.right, answer, False)
            for problem, answer in zip(problems, answers) if answer and grade(problem, answer) < 1]


# %% [markdown]
# A thousand invented pairs of answers to one problem, with scores 1 and 2/3. Equation (1) says how often the better one is chosen: $\sigma(6 \cdot 1/3) = 0.88$.

# %%
sorting = ASKED["sort"]
n = 1000
right_one, nearly = "arm, oil, sea", "arm, oil, cat"
rows = label_pairs([sorting] * n, [right_one] * n, [nearly] * n, seed=0)
share = sum(row["flipped"] for row in rows) / n
assert abs(share - 1 / (1 + math.exp(2))) < 0.03
assert label_pairs([sorting], [nearly], ["arm, oil, car"], seed=0) == []         # equal scores
assert len(teacher_pairs([sorting] * 3, [right_one, nearly, ""])) == 1
print(f"wrong labels: {share:.3f}")

# %% [markdown]
# ## How large is hard?
#
# Which sizes does S pass in about 60, 20 and 3 of a hundred answers? That must be measured. A *calibration* asks S for two sampled answers to some problems of one task and one size, and keeps all scores. They are problems of the training split, drawn with a seed that no draw of the experiment has.

# %%
#| export
CANDIDATES = { # task -> sizes that are tried
    "add": (2, 3, 4, 5, 6),
    "sort": (2, 3, 4),
    "reverse": (2, 3, 4),
    "json": (1, 2, 3, 4),
    "count": (1, 2, 3, 5, 8),
}

@dataclass(frozen=True)
class Calibration:
    "One task in one size, asked of S."
    task: str      # of TASKS
    size: int      # of the problems
    n: int = 24    # problems
    seed: int = 0  # of the problems and of the luck
    @property
    def key(self) -> str: return f"{self.task} {self.size} {self.n} {self.seed}"

def calibrate(
    model,             # S
    tokenizer,         # of S
    what: Calibration, # task, size, number of problems, seed
    **how,             # max_new, batch, precision of `sampled_ids`
) -> dict:             # task, size, n, seed, first and second: scores; examples: question and answer
    "The scores of two sampled answers to each problem of one task and size."
    rng = random.Random(f"calibration {what.key}")
    problems = make_problems(what.n, what.task, what.size, "train", rng)
    answers = answers_to(model, tokenizer, problems * 2, 1., what.seed, **how)
    scores = [round(grade(problem, answer), 4) for problem, answer in zip(problems * 2, answers)]
    return vars(what) | dict(
        first=scores[:what.n],
        second=scores[what.n:],
        examples=[[problem.question, answer] for problem, answer in zip(problems[:4], answers)],
    )

def run_calibration(
    folder,                    # holds known_truth_levels.jsonl
    model: str,                # folder of S and its tokenizer
    minutes: float = None,     # from the start of the process; None: until all is done
    candidates = CANDIDATES,   # task -> sizes
    n: int = 24,               # problems of each
    device: str = "cpu",       # where S computes, in bf16: a calibration need not be exact
) -> list[dict]:               # a row per task and size
    "Every candidate that has no row yet, one after the other."
    S, tokenizer = load_model(model, device).bfloat16(), load_tokenizer(model)
    def plan(rows): return [Calibration(task, size, n) for task in candidates for size in candidates[task]]
    def run(what): return calibrate(S, tokenizer, what)
    return run_timed("known_truth_levels", plan, run, folder, minutes, device)


# %% [markdown]
# The real one takes some minutes (`python -m sdpo_nb.graded FOLDER_OF_S FOLDER`), so its rows are stored. Here is what it does, with the S of the tiny world, which knows no such tasks:

# %%
tok.model_max_length = 1024                    # a letter is a token, and prompts are long here
toy = calibrate(S, tok, Calibration("reverse", 2, n=4), max_new=6)
assert len(toy["first"]) == len(toy["second"]) == 4
toy["first"], toy["examples"][0]


# %%
#| export
def calibration() -> list[dict]: # task, size, n, first, second: scores; examples, card, versions
    "What S made of each task and size, as it was committed. Raises ValueError where there is nothing."
    path = RESULTS / "known_truth_levels.json"
    if not path.exists(): raise ValueError(f"{path}: not there; `python -m sdpo_nb.graded` makes it")
    return json.loads(path.read_text())

def store_calibration(
    rows: list, # of `run_calibration`
):
    "Write the rows to where `calibration` reads them."
    kept = [row | dict(examples=row["examples"][:2]) for row in rows]
    text = ",\n".join(json.dumps(row) for row in kept)
    (RESULTS / "known_truth_levels.json").write_text(f"[{text}]\n")

if __name__ == "__main__" and __spec__:
    import sys
    if len(sys.argv) != 3: raise SystemExit("usage: python -m sdpo_nb.graded FOLDER_OF_S FOLDER")
    store_calibration(run_calibration(sys.argv[2], sys.argv[1]))

# %% [markdown]
# Before you look at the table: which of these tasks is easiest for a language model, and what does it do when it fails?

# %%
rows = calibration()
shown = []
for row in rows:
    scores = row["first"] + row["second"]
    question, answer = row["examples"][0]
    right = sum(score == 1 for score in scores)
    counted = dict(task=row["task"], size=row["size"], right=right, answers=len(scores))
    shown.append(counted | dict(question=question, answer=answer))
for row in shown: assert 0 <= row["right"] <= row["answers"] == 48
with pd.option_context("display.max_colwidth", 60): display(pd.DataFrame(shown).set_index(["task", "size"]))

# %% [markdown]
# An answer that fails is mostly of the right form: S has understood what is asked, and cannot do it. Which of these sizes become the sources is decided on the page [known truth](known_truth.ipynb).
#
# ## What this does not show
#
# - The score of *count* is about the number of words only. An S that learns to write `a a a` has a score of 1.
# - Three examples stand in every prompt. Without them S is much worse, mostly because it writes another form. So these are tasks for a model that has been shown the form.
#
# ## What you now have
#
# - `make_problems` and `grade`: problems of five tasks in any size, and how right an answer is.
# - `sampled_ids`: answers of any causal language model, in batches, with the luck of chapter 00.
# - `label_pairs` and `teacher_pairs`: preference pairs with known truth.
# - `calibrate`: how hard a size is for a model.
#
# ## Questions to test yourself
#
# 1. Why does the split depend on the content, and not on the question?
#
#    <details><summary>Answer</summary>
#
#    `3 + 4` and `4 + 3` are two questions with one content. If they could be in two splits, a model could be tested on a sum that it has learned by heart.
#
#    </details>
# 2. An answer to an addition is `7 + 5 = 12 and 3`. What is its score, and is that fair?
#
#    <details><summary>Answer</summary>
#
#    0: the last number is 3. A rule that takes the best number would reward a model that lists many. A rule must be simple enough that one can see what it rewards.
#
#    </details>
# 3. On a hard level most pairs have two wrong answers. What can DPO learn from them?
#
#    <details><summary>Answer</summary>
#
#    The nearer one is chosen more often: the form, the length, the first digits. That is the use of partial credit.
#
#    </details>
#
# ## Try this
#
# - Give `label_pairs` a `k` of 1 in the cell with the thousand pairs. Before you look: how many labels are wrong?
#
#   <details><summary>What you should see</summary>
#
#   $1 - \sigma(1/3) = 0.42$ instead of 0.12.
#
#   </details>
