# %% [markdown]
# # What a benchmark asks of a model
# > Multiple choice by log-probabilities, few-shot examples, standard errors, paired differences; and the same numbers as lm-evaluation-harness from a part of its tokens.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/15_benchmarks.ipynb)
#
# **You should know** what the [log-probability of a response](02_logprobs.ipynb) is, and what a [run](14_stepwise.ipynb) leaves behind.
#
# **Time** two and a half hours to read with its code, an hour if you skip the cells that begin with `#| export`; two minutes to run on two CPU cores, without the cell marked slow.
#
# You have aligned a model. Has it become better at anything that others measure, too? The paper of stepwise DPO answers with *H4*: the mean of four public benchmarks, ARC, HellaSwag, MMLU and TruthfulQA. People trust such numbers because everybody computes them with the same program, [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness). So do we. We write no benchmark of our own.
#
# But three things are ours to explain, and one to improve. What does a benchmark *ask*? How sure is its answer? How sure is the *difference* of two models, which is what you want to know? And how much of the computing is done twice?
#
# The way through: one question, asked by hand. The same question as a task of the harness. Examples before the question. The error of a score, and of a difference. Then the tokens that are read again and again, and a class that reads them once. In the end, the benchmarks themselves, for all models of a run.

# %%
#| default_exp benchmarks

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
# The harness is an extra of the package, `pip install sdpo_nb[eval]`, since most people who train do not need it.

# %%
if not importlib.util.find_spec("lm_eval"):
    get_ipython().run_line_magic("pip", "install -q lm_eval")

# %%
#| export
import contextlib, gzip, hashlib, importlib, inspect, io, json, logging, math, os, sqlite3, sys, tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import yaml
from datasets import Dataset
from torch import Tensor
from transformers import DynamicCache

from sdpo_nb.evaluate import bootstrap, interval
from sdpo_nb.folder import alone_in, folder_of, load_any, load_saved_tokenizer, load_stage, saved_as
from sdpo_nb.logprobs import (
    FULL, load_model, load_tokenizer, must_read_alone, progress, replacing, weights_hash, write_json
)
from sdpo_nb.preferences import _backend
from sdpo_nb.report import Run

# %%
import random, shutil

from IPython.display import display
from importlib.resources import files
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from sdpo_nb.evaluate import as_text
from sdpo_nb.logprobs import token_logprobs
from sdpo_nb.stepwise import StepwiseConfig, sdpo
from sdpo_nb.world import ALPHABET, answer, complaint, load_world, skipped_without

torch.set_num_threads(1)
pd.set_option("display.width", 180, "display.max_columns", 20);

# %% [markdown]
# ## One question
#
# A language model does not tick boxes. How does one ask it a multiple-choice question? Each option is taken as a *continuation* of the question, and the model says how likely it is. The likeliest option is its answer.
#
# Note what is not asked: the model need not write anything, and nobody must find an answer in what it wrote. That makes such benchmarks cheap and their scores exact. It is also their weakness, because nobody uses a model like this.
#
# Here is a question of the [tiny world](00_world.ipynb), with three options: the answer by the right rule, the one by the wrong rule, and the right one with a wrong letter.

# %%
w, tmp = load_world(), Path(tempfile.mkdtemp())
S, tok = load_model(w.base, "cpu"), load_tokenizer(w.base)
rng = random.Random(0)

def with_wrong_letter(text):
    "The text with one letter replaced."
    i = rng.randrange(len(text))
    others = [x for x in ALPHABET if x != text[i]]
    return text[:i] + rng.choice(others) + text[i+1:]

def make_question(prompt):
    "A question, its options, and the number of the right one."
    right, wrong = answer(prompt), answer(prompt, right=False)
    options = [right, wrong, with_wrong_letter(right)]
    rng.shuffle(options)
    text = f"<|user|>{prompt}<|end|><|assistant|>"
    return dict(question=text, choices=options, label=options.index(right))

has_two_rules = [p for p in w.test if answer(p) != answer(p, right=False)]
questions = [make_question(p) for p in has_two_rules]
questions[0]


# %% [markdown]
# What does S answer? It reads the question and an option, and only the log-probabilities of the option's tokens count. With $o_k$ the $k$-th option, $x$ the question and $\pi$ the model, its answer is
#
# $$\hat k = \operatorname*{argmax}_k \log\pi(o_k \mid x). \tag{1}$$

# %%
def option_logprob(model, question, option):
    "log pi(option | question), in nats: the plain way, one row of tokens."
    x, o = tok.encode(question), tok.encode(option)
    with torch.no_grad(): logits = model(torch.tensor([x + o])).logits[0, len(x)-1:-1]
    return token_logprobs(logits, torch.tensor(o)).sum().item()

def option_logprobs(model, q):
    return np.array([option_logprob(model, q["question"], option) for option in q["choices"]])

first = questions[0]
nats = option_logprobs(S, first)
chosen = int(nats.argmax())                    # equation (1)
table = pd.DataFrame({"option": first["choices"], "log-probability": nats.round(2)})
table["right"] = table.index == first["label"]
table


# %% [markdown]
# S takes the answer by the wrong rule; chapter 00 tells how it was misled. One question says little, of course. *Accuracy*, `acc`, is the share of questions in which $\hat k$ is the right option. Let us take the first sixty.

# %%
def accuracy(model, questions, length=lambda option: 1):
    "Share of right answers; `length` says what a log-probability is divided by."
    right = []
    for q in questions:
        lengths = np.array([length(option) for option in q["choices"]])
        nats = option_logprobs(model, q)
        right.append((nats / lengths).argmax() == q["label"])
    return np.mean(right)

sixty = questions[:60]
acc = accuracy(S, sixty)
print(f"acc {acc:.3f}; by guessing {1/3:.3f}")


# %% [markdown]
# ### Sum or mean?
#
# Now a fourth option: the right answer without its last letter. It is wrong. What will (1) make of it?
#
# Think of `bca` and `bc`. To write `bca`, a model must write `bc` first. So $\log\pi(\text{bca}\mid x)$ is $\log\pi(\text{bc}\mid x)$ plus the log-probability of one letter more, and that is never above 0. The shorter option cannot lose.

# %%
def with_short(q):
    right = q["choices"][q["label"]]
    return q | dict(choices=[*q["choices"], right[:-1]])

harder = [with_short(q) for q in sixty]
acc = accuracy(S, harder)
assert acc == 0
print(f"acc with the short option: {acc:.3f}")

# %% [markdown]
# Not one right answer. A sum over more tokens is lower, so options of different lengths are no fair choice. The remedy of the harness is to divide by length, and its length is the number of *characters*, which does not depend on a tokenizer:
#
# $$\hat k_{norm} = \operatorname*{argmax}_k \frac{\log\pi(o_k \mid x)}{\text{characters of } o_k}. \tag{2}$$

# %%
acc_norm = accuracy(S, harder, length=len)     # equation (2)
assert acc_norm > 0.3
print(f"acc_norm with the short option: {acc_norm:.3f}")

# %% [markdown]
# So a benchmark is a set of questions *and* a rule. For ARC and HellaSwag the rule is (2), `acc_norm`. In MMLU the options are the letters A to D, of one token each, and (1) is the same as (2). TruthfulQA has several true options: its score, MC2, is the share of the probability that they get together,
#
# $$\text{MC2} = \frac{\sum_{k\ \text{true}} \pi(o_k\mid x)}{\sum_k \pi(o_k\mid x)}. \tag{3}$$
#
# With several true options there is no single right one, so no question is simply right or wrong, and a score of 0.4 means that the true options have 40 % of what all options of the question have together.
#
# ## A question is a task of the harness
#
# Nobody should believe a score that was computed by code like ours above. A blank in front of an option, another word in the prompt, a sum for a mean: each moves a score by points, and two papers that do it differently cannot be compared. This is what the harness is for.
#
# The harness describes a benchmark by a short file. Ours has our questions in a file of its own, and says which field is what. An option follows the question directly here (`target_delimiter`); in most benchmarks a blank stands between them.

# %%
strings = tmp / "strings.jsonl"
lines = [json.dumps(with_short(q)) + "\n" for q in questions]
strings.write_text("".join(lines))
definition = dict(
    task="strings",
    dataset_path="json",
    dataset_kwargs=dict(data_files=dict(test=str(strings))),
    output_type="multiple_choice",
    test_split="test",
    fewshot_split="test",
    fewshot_config=dict(sampler="first_n"),
    fewshot_delimiter="<|end|>",
    target_delimiter="",
    doc_to_text="{{question}}",
    doc_to_choice="{{choices}}",
    doc_to_target="{{label}}",
    metric_list=[dict(metric=m, aggregation="mean", higher_is_better=True) for m in ("acc", "acc_norm")],
)

def define(name="strings", **other):
    "A folder with the definition of one task."
    folder = Path(tempfile.mkdtemp(dir=tmp))
    text = yaml.safe_dump(definition | dict(task=name) | other)
    (folder / f"{name}.yaml").write_text(text)
    return folder

zero_shot = define()
print((zero_shot / "strings.yaml").read_text().replace(str(tmp), "."))


# %% [markdown]
# We import the harness only where it is used, and say in one line what to do where it is missing.

# %%
#| export
def harness(
    name: str="lm_eval", # of one of its modules
):                       # the module
    "lm-evaluation-harness. Raises ValueError where it is not installed."
    try: return importlib.import_module(name)
    except ImportError as e:
        raise ValueError("benchmarks need lm-evaluation-harness (no module named "
                         f"{e.name}): pip install lm_eval") from e


# %%
complaint(harness, "lm_eval.of_next_year")


# %% [markdown]
# It speaks a lot: a bar for each step, warnings, notes on what it overrides. Beside a bar of our own this would be noise. Errors come through.

# %%
#| export
@contextlib.contextmanager
def quiet():
    "For a while, neither bars nor warnings nor prints of the harness; errors come through."
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers: logger.setLevel(logging.ERROR)
    nowhere = io.StringIO()
    try:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere): yield
    finally:
        for logger, level in zip(loggers, levels): logger.setLevel(level)


# %% [markdown]
# `ask_harness` asks one model some tasks. The harness draws few-shot examples with a seed of its own; we leave it at its default, so that the questions are those of everybody else.

# %%
#| export
def ask_harness(
    lm,              # a model class of the harness
    tasks: list,     # names of tasks, or of groups of tasks
    folder,          # with the definitions, as `write_tasks` writes them
    limit: int=None, # so many questions of each task, the first ones; None: all
    kept=None,       # file for the answers to single requests; None: nowhere
) -> dict:           # as `simple_evaluate` returns it
    "Ask the questions of some tasks. Global random states stay as they are."
    manager = harness("lm_eval.tasks").TaskManager(include_path=str(folder), include_defaults=False)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))
    with quiet():
        return harness().simple_evaluate(
            model=lm,
            tasks=tasks,
            task_manager=manager,
            limit=limit,
            use_cache=kept and str(kept),
            **seeds,
        )


# %% [markdown]
# `limit` is how one looks at a benchmark before one pays for it: the first so many questions. What we call a *model class* is an object with a method `loglikelihood`, which is given pairs of a context and a continuation, and answers with log-probabilities. All that is known about the model is hidden in it. The harness's own is `HFLM`. Does it find what we found by hand?

# %%
#| export
def plain_lm(
    model,     # a causal LM
    tokenizer, # its tokenizer
):             # what the harness takes for a model
    "The harness's own class for models of transformers."
    with quiet(): return harness("lm_eval.models.huggingface").HFLM(pretrained=model, tokenizer=tokenizer)


# %%
found = ask_harness(plain_lm(S, tok), ["strings"], zero_shot, limit=60)
theirs = found["results"]["strings"]
assert theirs["acc,none"] == acc
assert theirs["acc_norm,none"] == acc_norm
{name: theirs[name] for name in ("acc,none", "acc_norm,none")}

# %% [markdown]
# To the last digit. So the formulas above are what is computed, and from here on the harness asks.
#
# ## Few-shot examples
#
# A model that only continues texts does not know what is wanted of it. So most benchmarks put solved examples before the question, the same way in each: *five-shot* is five of them. The examples come from another part of the data, with their answers.
#
# Here is what a model reads for a question with two examples. (Ours come from the questions themselves; the harness takes care that no question is its own example.)

# %%
two_shot = ask_harness(plain_lm(S, tok), ["strings"], define(num_fewshot=2), limit=3)
sample = two_shot["samples"]["strings"][2]
context, option = sample["arguments"][0]
print(context.replace("<|user|>", "\n<|user|>"), "\n\nand one of its options:", option)

# %% [markdown]
# S was never trained on more than one turn, so examples cannot help it. Real models gain from them, and the benchmarks of H4 fix their number: 25 in ARC, 10 in HellaSwag, 5 in MMLU, none in TruthfulQA.
#
# Where do they come from? MMLU has five fixed ones for each of its subjects. ARC and HellaSwag draw theirs anew for each question, with a seed that is the same for everybody. So a score belongs to its examples, too: other examples, other score.
#
# Examples are what makes a benchmark slow. In ARC a prompt has some 1,050 tokens, and nearly all of them are the 25 examples.
#
# ## How sure is a score?
#
# A score is a mean over $n$ questions, and other questions of the same kind would have given another. Its *standard error* is
#
# $$\text{SE} = s / \sqrt{n}, \tag{4}$$
#
# with $s$ the standard deviation of the scores of the single questions. To have two models, we train a small run: two stages, on 500 pairs each.

# %%
settings = dict(beta=0.3, lr=5e-5, batch_size=32, precision="fp32", max_length=64)
sources = {name: dict(source=w.sources[name], max_pairs=500) for name in ("primer", "digest")}
run = sdpo(w.base, sources, StepwiseConfig(**settings), tmp / "run")
M_2 = load_stage(folder_of(run.folder, 2))

def question_scores(model, metric="acc_norm"):
    "The score of each question, in their order."
    found = ask_harness(plain_lm(model, tok), ["strings"], zero_shot, limit=200)
    return np.array([sample[metric] for sample in found["samples"]["strings"]]), found["results"]["strings"]

of_S, told = question_scores(S)
of_M, _ = question_scores(M_2)

def standard_error(scores): return scores.std(ddof=1) / np.sqrt(len(scores)) # equation (4)

assert_close(standard_error(of_S), told["acc_norm_stderr,none"])
for name, scores in {"S": of_S, "M_2": of_M}.items():
    print(f"{name}: {scores.mean():.3f}, standard error {standard_error(scores):.3f}")

# %% [markdown]
# Is $M_2$ better than S? If the two scores came from two sets of questions, their errors would add up: the difference would have the standard error $\sqrt{\text{SE}_1^2 + \text{SE}_2^2}$.
#
# But they come from the *same* questions. Some are easy for both models, some hard for both, and this drops out when one takes the difference question by question. So the error of the difference is (4) of the differences $d_i$:
#
# $$\text{SE}_{paired} = s_d / \sqrt{n}. \tag{5}$$

# %%
d = of_M - of_S
apart = np.hypot(standard_error(of_S), standard_error(of_M))
paired = standard_error(d)                     # equation (5)
assert paired < 0.9 * apart
agree = (d == 0).mean()
print(f"difference {d.mean():+.3f}; standard error {apart:.3f} if unpaired, {paired:.3f} paired")
print(f"on {agree:.0%} of the questions both are right, or both are wrong")

# %% [markdown]
# The first error would leave the question open in many a case in which the second one answers it. How many more questions would an unpaired comparison need for an error as small? The error falls with $\sqrt n$, so the factor is the square of the ratio. And the more alike two models are, the larger it is. Models before and after a stage of DPO are *very* alike.

# %%
factor = (apart / paired) ** 2
print(f"{factor:.1f} times as many")

# %% [markdown]
# What does (4) say of the real benchmarks? Right or wrong with a share $p$ of right answers has the standard deviation $\sqrt{p(1-p)}$, at most one half. So the number of questions alone says how small an error can become, and how large a paired difference must be to be seen. Let two models agree on nine of ten questions; in the tenth, one of them is right. Then $s_d = \sqrt{0.1}$ if they are equally good.

# %%
sizes = {"ARC-Challenge": 1172, "HellaSwag": 10042, "MMLU": 14042, "TruthfulQA": 817}
n = pd.Series(sizes, name="questions")
errors = pd.DataFrame({
    "questions": n,
    "error of a score": 100 * 0.5 / np.sqrt(n),                # points, equation (4)
    "of a paired difference": 100 * np.sqrt(0.1) / np.sqrt(n), # points, equation (5)
})
h4 = np.sqrt((errors.drop(columns="questions") ** 2).sum()) / 4 # of a mean of four
errors.loc["H4"] = [n.sum(), *h4]
errors.round(2)


# %% [markdown]
# H4 of all 26,073 questions has an error of 0.6 points, and a paired difference of H4 one of 0.4 points. A difference below 0.7 points, two such errors, cannot be told from chance. ARC and TruthfulQA, the small ones, make most of it. Keep this table in mind when you read that one method has 0.5 points more than another. And these errors are about *questions* only: another training seed is another model, and moves scores as well.
#
# ## What is computed twice
#
# What must the model read for one question? The harness asks every option by itself: examples, question, option; examples, question, next option. Two things are read again and again. All options of a question have the same *prompt*. And in many benchmarks all questions have the same *examples*.
#
# We count tokens, with more and more examples, three ways. The requests of the harness are pairs of a context and a continuation; we collect them with a class that answers nothing.

# %%
def requests_of(folder, limit):
    "(prompt ids, option ids) of everything the harness asks."
    lm, asked = plain_lm(S, tok), []

    def collect(requests, **how):
        asked.extend((x, o) for _, x, o in requests)
        return [(0.0, False)] * len(requests)

    lm._loglikelihood_tokens = collect
    ask_harness(lm, ["strings"], folder, limit)
    return asked

asked = requests_of(define(num_fewshot=2), 3)
[(len(x), len(o)) for x, o in asked[:4]]


# %% [markdown]
# Each entry is one request: 56 tokens of examples and question, and up to four of an option.
#
# Requests with the same prompt belong together. `by_prompt` groups them, and sorts the prompts like words in a dictionary: then neighbours share the longest beginnings. What is too long for the model loses its beginning, as in the harness.

# %%
#| export
def by_prompt(
    requests: list,  # (prompt ids, option ids) of each request
    max_length: int, # tokens that the model can read
) -> dict:           # prompt -> numbers of the requests with it; neighbours share much
    "Group requests by what they share. Of a row that is too long the beginning is left out."
    groups = {}
    for i, (prompt, option) in enumerate(requests):
        row = [*prompt, *option][-(max_length + 1):]
        kept = tuple(row[:-len(option)])
        groups.setdefault(kept, []).append(i)
    return dict(sorted(groups.items()))

def shared_tokens(
    a: tuple, # token ids
    b: tuple, # token ids
) -> int:
    "How many tokens two prompts have in common, from the beginning."
    for n, (x, y) in enumerate(zip(a, b)):
        if x != y: return n
    return min(len(a), len(b))


# %%
groups = by_prompt(asked, max_length=128)
prompts = list(groups)
assert shared_tokens((1, 2, 3), (1, 2, 4, 5)) == 2
grouped = [i for numbers in groups.values() for i in numbers]
assert sorted(grouped) == list(range(len(asked)))
shared = [shared_tokens(a, b) for a, b in zip(prompts, prompts[1:])]
{"requests": len(asked), "prompts": len(prompts), "shared by neighbours": shared}


# %% [markdown]
# The count: the last token of an option is never read, since nothing after it is asked. Of a prompt that is a neighbour's in full, one token is read again, because its logits are needed.

# %%
def count_tokens(requests, max_length):
    "Tokens that are read: each option alone; options share their prompt; prompts share their beginning, too."
    groups = by_prompt(requests, max_length)
    alone = sum(len(x) + len(o) - 1 for x, o in requests)
    options = sum(len(o) - 1 for _, o in requests)
    shared, last = 0, ()
    for prompt in groups:
        shared += len(prompt) - min(shared_tokens(prompt, last), len(prompt) - 1)
        last = prompt
    return [alone, options + sum(map(len, groups)), options + shared]

ways = ["each option alone", "options share their prompt", "prompts share their examples, too"]
counts = {shots: count_tokens(requests_of(define(num_fewshot=shots), 40), 10**6) for shots in (0, 2, 5, 10)}
table = pd.DataFrame(counts, index=ways).T.rename_axis("examples")
assert (table[ways[2]] <= table[ways[1]]).all()
assert table.loc[10, ways[0]] > 10 * table.loc[10, ways[2]]
table

# %%
fig, ax = plt.subplots(figsize=(6, 3))
for way, color in zip(ways, sns.color_palette("viridis", 3)):
    per_question = table[way] / 40
    ax.plot(per_question, "o-", color=color)
    ax.text(10.3, per_question.iloc[-1], way, color=color, va="center")
ax.set(xlabel="examples before each question", ylim=(0, None))
ax.set_ylabel("tokens that are read\nfor one question\n←  cheaper")
sns.despine(fig);

# %% [markdown]
# Four options in one reading are a quarter of the tokens. And examples that are the same for all questions cost next to nothing: the bottom line is nearly flat.
#
# How much is it for the real benchmarks? Here are twenty questions of each, in tokens of SmolLM2. (MMLU: one subject.) Where an option is a single token, as in MMLU, the harness reads the prompt once for all options already; the second column knows this.

# %%
measured = json.loads((files("sdpo_nb.data") / "results/benchmarks.json").read_text())
titles = {
    "arc_challenge": "ARC-Challenge",
    "hellaswag": "HellaSwag",
    "mmlu_anatomy": "MMLU",
    "truthfulqa_mc2": "TruthfulQA",
}
tokens = pd.DataFrame(measured["tokens"]).T.rename(index=titles)
per_question = tokens[["alone", "harness", "prompt_shared", "ours"]].div(tokens["questions"], axis=0)
per_question.columns = ["each option alone", "the harness", "options share", "examples, too"]
fewer = per_question["the harness"] / per_question["examples, too"]
assert (fewer > 3).all()
per_question.round(0).astype(int).assign(**{"times fewer than the harness": fewer.round(1)})


# %% [markdown]
# In ARC and HellaSwag it is the options that count. Their examples are drawn anew for each question, so there is little else to share. In MMLU it is the examples, and in TruthfulQA both: each question has seven options on average, and the same six solved questions before it.
#
# ## Share them
#
# Chapter [04](04_packing.ipynb) packs a prompt with two responses into one row. Here a prompt has any number of options, and another prompt has the same beginning. What we need for this is a *cache*: while a model reads, it keeps keys and values of each token, and later tokens look at these. Libraries use it to generate. Nothing prevents us from going *back*: to forget the last tokens, and to read on in another way.
#
# (Could the rows of chapter 04 do it? They could hold one prompt with many options. But they have no cache, and so each row would read the examples anew. With a cache, an ordinary mask is enough, and no attention of our own is needed.)
#
# What does it cost in exactness? Nothing that counts. A token sees the same tokens at the same distances as before, so it computes the same sums. Only their order may differ, as it does between two batch sizes.
#
# What does it cost in memory? One prompt in the cache at a time. That is little, compared with the batches by which others fill a graphics card.
#
# So the model reads a prompt, and we note the logits of its last token, which predict the first token of every option. Then it reads all options at once, one behind the other, and each must not see the others. A mask says who sees whom.

# %%
#| export
def option_mask(
    before: int,   # tokens of the prompt
    lengths: list, # tokens of each option
) -> Tensor:       # (n, before + n) bool; [i, j]: token i of the options sees token j of the row
    "An option sees the prompt and itself, up to where it is; not the other options."
    blocks = [torch.ones(n, n).tril() for n in lengths]
    own = torch.block_diag(*blocks).bool()
    prompt = torch.ones(len(own), before, dtype=torch.bool)
    return torch.cat([prompt, own], 1)


# %%
mask = option_mask(4, [2, 3])
assert mask.sum() == 5 * 4 + 3 + 6
fig, ax = plt.subplots(figsize=(4.2, 2.2))
sns.heatmap(mask, cbar=False, cmap=["white", "#4878d0"], linewidths=0.5, linecolor="0.8", ax=ax)
ax.set(xlabel="is seen", ylabel="sees", title="two options behind a prompt of four tokens")
ax.set_xticks(np.arange(9) + 0.5, [*"xxxx", *"aa", *"bbb"])
ax.set_yticks(np.arange(5) + 0.5, [*"aa", *"bbb"], rotation=0);


# %% [markdown]
# A `Reader` is a model that remembers the prompt which it has read last. Asked the next one, it forgets what the two do not share, and reads the rest. Only the logits that are needed are computed: of a prompt those of its last token. With a vocabulary of 49,152 and a prompt of 1,000 tokens, all logits would be 200 MB.
#
# The tokens of all options have the positions that they would have directly behind the prompt; and after they were read, they are forgotten, too, so that the next prompt finds a clean cache.

# %%
#| export
def _cache_name(model):
    "What the forward pass of this model calls its cache, or None."
    known = inspect.signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache") if name in known), None)

@dataclass
class Reader:
    "A causal LM, and the keys and values of the prompt that it has read last."
    model: object    # a causal LM
    prompt: tuple = ()   # that lies in the cache
    cache: object = None # its keys and values
    tokens: int = 0      # that were read so far

    def _read(self, ids, keep, **how):
        "(keep, vocabulary) logits of the last `keep` of these tokens."
        how[_cache_name(self.model)] = self.cache
        self.tokens += len(ids)
        ids = torch.tensor([ids], device=self.model.device)
        with torch.no_grad():
            out = self.model(input_ids=ids, use_cache=True, logits_to_keep=keep, **how)
        return out.logits[0].float()

    def after(
        self,
        prompt: tuple, # token ids, at least one
    ) -> Tensor:       # (1, vocabulary) logits of the token that follows
        "Read a prompt, but for what it shares with the last one."
        keep = min(shared_tokens(prompt, self.prompt), len(prompt) - 1)
        if keep: self.cache.crop(keep - len(self.prompt)) # so many are forgotten
        else: self.cache = DynamicCache()
        self.prompt = prompt
        return self._read(prompt[keep:], 1)

    def within(
        self,
        options: list, # token ids of each
    ) -> list[Tensor]: # (tokens - 1, vocabulary) logits of what follows each token but the last
        "Read options behind the prompt, all at once, and forget them."
        n, lengths = len(self.prompt), [len(o) - 1 for o in options]
        ids = [token for o in options for token in o[:-1]]
        if not ids: return [None] * len(options)
        position = torch.cat([torch.arange(n, n + k) for k in lengths])
        sees = option_mask(n, [k for k in lengths if k])
        dtype = self.model.dtype
        mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
        where = dict(position_ids=position[None], attention_mask=mask[None, None])
        where = {name: value.to(self.model.device) for name, value in where.items()}
        logits = self._read(ids, len(ids), **where)
        self.cache.crop(-len(ids))
        return list(logits.split(lengths))


# %% [markdown]
# The first question, asked this way and by hand. Nothing is approximated, so the numbers must be the same but for rounding, that is, for the order in which a processor adds.

# %%
reader = Reader(S)
x = tuple(tok.encode(first["question"]))
options = [tok.encode(o) for o in first["choices"]]
start, rest = reader.after(x), reader.within(options)
got = [token_logprobs(torch.cat([start, r]), torch.tensor(o)).sum().item() for r, o in zip(rest, options)]
assert_close(torch.tensor(got), torch.tensor(nats, dtype=torch.float32))
alone = sum(len(x) + len(o) - 1 for o in options)
print(f"{reader.tokens} tokens read, instead of {alone}")


# %% [markdown]
# The harness wants one thing more of each option: would the model have written it by itself, taking the likeliest token each time? That is `is_greedy`. We have the logits of all places, so it costs nothing.
#
# `score_options` goes through the prompts in their order, and gives each answer away as soon as it is known. So whoever calls it can write it down, or draw a bar.

# %%
#| export
def score_options(
    model,           # a causal LM
    requests: list,  # (prompt ids, option ids) of each
    max_length: int, # tokens that the model can read
):                   # yields (number of the request, (log-probability in nats, is_greedy))
    "Score options, prompt by prompt, so that nothing is read twice that two neighbours share."
    reader = Reader(model)
    for prompt, numbers in by_prompt(requests, max_length).items():
        options = [requests[i][1] for i in numbers]
        start = reader.after(prompt)
        for i, option, rest in zip(numbers, options, reader.within(options)):
            logits = start if rest is None else torch.cat([start, rest])
            ids = torch.tensor(option, device=logits.device)
            logp = logits.log_softmax(-1)
            total = logp.gather(1, ids[:, None]).sum().item()
            greedy = (logp.argmax(-1) == ids).all().item()
            yield i, (total, greedy)


# %%
answers = dict(score_options(S, [(list(x), o) for o in options], 128))
assert [round(total, 4) for total, _ in answers.values()] == [round(n, 4) for n in got]
answers


# %% [markdown]
# ### When sharing would be wrong
#
# A cache and a mask are not understood by every model in the same way. BLOOM reads positions out of the mask. A model with a *sliding window* sees only the last so many tokens, and our mask knows nothing of it. So, as in chapter 04, sharing is used only after it has been seen to give the model's own numbers, on short prompts of the very requests. Where it does not, the harness's way is taken, and you are told why.

# %%
#| export
def _plain(model, prompt, option):
    "The same as `score_options`, for one request, by one plain forward pass."
    ids = torch.tensor([[*prompt, *option]], device=model.device)
    with torch.no_grad(): logits = model(input_ids=ids[:, :-1]).logits[0, len(prompt)-1:]
    return logits.float().log_softmax(-1).gather(1, ids[0, len(prompt):, None]).sum().item()

def _shortened(requests):
    "Prompts of two questions, and options, cut to some tokens: quickly asked in two ways."
    def short(prompt, option): return [*prompt[:12], *prompt[-6:]], [*option, *prompt][:4]
    return [short(*request) for request in requests[:4] + requests[-2:]]

def why_not_shared(
    model,           # a causal LM
    requests: list,  # (prompt ids, option ids) of each
    max_length: int, # tokens that the model can read
) -> str|None:       # a reason, or None
    "Why prompts cannot be shared by this model, on these requests."
    known = inspect.signature(model.forward).parameters
    wanted = {"position_ids", "logits_to_keep"} - set(known)
    if wanted or not _cache_name(model): return "its forward pass does not take all that is needed"
    longest = min(max_length, max(len(x) + len(o) for x, o in requests))
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window and longest >= window: return f"a row of {longest} tokens is longer than its window of {window}"
    row = dict(prompt_ids=range(longest), chosen_ids=[], rejected_ids=[])
    if must_read_alone(model, [row]): return "its rotary positions depend on the longest row"

    few = _shortened(requests)
    try: shared = dict(score_options(model, few, max_length))
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, IndexError) as e:
        return f"it cannot be computed: {str(e).splitlines()[0]}"
    own = [_plain(model, *request) for request in few]
    off = max(abs(shared[i][0] - own[i]) for i in range(len(few)))
    near = off <= 1e-3 + 1e-5 * max(map(abs, own)) # what is not a number is not near
    if not near: return f"log-probabilities differ from its own by {off:.2g} nats"


# %% [markdown]
# What "seen to give the model's own numbers" costs is some passes over twenty tokens, before thousands of long ones. The check looks at the whole way: two prompts with a common beginning, several options, each of several tokens.
#
# Some architectures, small and with random weights. Which of them can share?

# %%
small = dict(
    vocab_size=len(tok),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
)
kinds = {
    "llama": small,
    "qwen3": small | dict(head_dim=8, num_key_value_heads=2),
    "mistral": small | dict(num_key_value_heads=2, sliding_window=16),
    "gpt_neox": small,
    "gpt2": dict(vocab_size=len(tok), n_embd=32, n_layer=2, n_head=4),
    "bloom": dict(vocab_size=len(tok), hidden_size=32, n_layer=2, n_head=4),
}

def random_model(kind):
    "A small model with random weights."
    config = AutoConfig.for_model(kind, **kinds[kind], bos_token_id=None, eos_token_id=None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for p in model.parameters(): p.data.normal_(0, 0.2)
    return model

verdicts = {kind: why_not_shared(random_model(kind), asked, 128) for kind in kinds}
assert verdicts["llama"] is None
assert "window" in verdicts["mistral"]
assert verdicts["bloom"]
pd.Series(verdicts).fillna("shares").to_frame("")


# %% [markdown]
# ### A model class for the harness
#
# The harness asks through a class. Ours is theirs, with one method in another form: so the splitting of a text into prompt and option, the first token of a text, and what is cut away are theirs to the letter. Generated answers (EQ-Bench wants them) are theirs, too; we only draw the bar.

# %%
#| export
def sharing_lm(
    model,            # a causal LM
    tokenizer,        # its tokenizer
    desc: str="asked", # what the bar says
):                    # what the harness takes for a model
    "The harness's class for models of transformers, which reads what requests share only once."
    HFLM = harness("lm_eval.models.huggingface").HFLM
    seen_by_user = sys.stderr

    def bar(total, unit):
        with contextlib.redirect_stderr(seen_by_user): return progress(total, desc, unit)

    class SharingLM(HFLM):
        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            asked = [(prompt, option) for _, prompt, option in requests]
            why = why_not_shared(self.model, asked, self.max_length)
            if why:
                print(f"prompts are not shared: {why}; every option is asked alone", file=seen_by_user)
                return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            answers = {}
            with bar(len(asked), "option") as shown:
                for i, found in score_options(self.model, asked, self.max_length):
                    answers[i] = found
                    text = requests[i][0]
                    if text is not None: self.cache_hook.add_partial("loglikelihood", text, found)
                    shown.update()
            return [answers[i] for i in range(len(asked))]

        def generate_until(self, requests, disable_tqdm=False):
            texts = []
            with bar(len(requests), "answer") as shown:
                for request in requests:
                    texts += super().generate_until([request], disable_tqdm=True)
                    shown.update()
            return texts

    with quiet(): return SharingLM(pretrained=model, tokenizer=tokenizer)


# %% [markdown]
# One line is easily overlooked: `cache_hook.add_partial`. It hands every answer to the harness at once, and the harness writes it into a file if it was given one. We need that below.
#
# The same task by both classes, with three examples. Scores must be equal; log-probabilities to rounding.

# %%
def by_class(make):
    "Scores of the questions, and (log-probability, greedy) of all requests."
    found = ask_harness(make(M_2, tok), ["strings"], define(num_fewshot=3), limit=40)["samples"]["strings"]
    answers = [r[0] for sample in found for r in sample["resps"]]
    return [sample["acc_norm"] for sample in found], answers

(scores, ours), (their_scores, theirs) = by_class(sharing_lm), by_class(plain_lm)
assert scores == their_scores
assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
off = max(abs(a - b) for (a, _), (b, _) in zip(ours, theirs))
assert off < 1e-4
print(f"{len(ours)} options, at most {off:.0e} nats apart")


# %% [markdown]
# ## The benchmarks
#
# Which tasks, how many examples, which number? One table holds it, in the definition of the Open LLM Leaderboard in its first version, which the paper uses. It also says how local files are read, for machines without a connection: under which name a part of the data lies, and how its fields become those of the harness's task.

# %%
#| export
@dataclass
class Benchmark:
    "A task of the harness, how it is asked, and how a local copy of its data is read."
    task: str        # its name in the harness
    title: str       # for people
    definition: str  # its file: relative to the tasks of the harness, or absolute; * for a group of files
    shots: int       # solved examples before each question
    metric: str      # the number that is reported; "NAME,FILTER" where a task has several filters
    scale: float = 100. # what turns it into points
    files: dict = field(default_factory=dict)    # of those below: part of the data -> local file, .jsonl.gz
    fields: dict = field(default_factory=dict)   # field of the task -> of a local row: a name, or a function
    settings: dict = field(default_factory=dict) # of the definition, that local files need otherwise

def _letters(row): return list("ABCDEFGH"[:len(row["choices"])])

BENCHMARKS = [
    Benchmark(
        "arc_challenge", "ARC-Challenge", "arc/arc_challenge.yaml", shots=25, metric="acc_norm",
        files=dict(test="arc_challenge_test", validation="arc_challenge_validation"),
        fields=dict(
            question="question",
            choices=lambda row: dict(text=row["choices"], label=_letters(row)),
            answerKey=lambda row: _letters(row)[row["label"]],
        ),
        settings=dict(training_split=None, fewshot_split="validation"), # no local training questions
    ),
    Benchmark(
        "hellaswag", "HellaSwag", "hellaswag/hellaswag.yaml", shots=10, metric="acc_norm",
        files=dict(validation="hellaswag_validation"),
        fields=dict(query="query", choices="choices", label="label"),   # cleaned already
        settings=dict(training_split=None, fewshot_split="validation", process_docs=None),
    ),
    Benchmark(
        "mmlu", "MMLU", "mmlu/default/mmlu_*.yaml", shots=5, metric="acc",
        files=dict(test="mmlu_test", dev="mmlu_dev"),
        fields=dict(question="question", choices="choices", answer="label"),
    ),
    Benchmark(
        "truthfulqa_mc2", "TruthfulQA", "truthfulqa/truthfulqa_mc2.yaml", shots=0, metric="acc",
        files=dict(validation="truthfulqa_mc"),
        fields=dict(question="question", mc1_targets="mc1_targets", mc2_targets="mc2_targets"),
    ),
    Benchmark(
        "eq_bench", "EQ-Bench", "eq_bench/default.yaml", shots=0, metric="eqbench", scale=1.,
        files=dict(validation="eq_bench_v2"),
        fields=dict(
            prompt="prompt",
            reference_answer_fullscale=lambda row: repr(row["reference_answer_fullscale"]),
        ),
    ),
]
H4 = ["arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2"]

# %%
pd.DataFrame([vars(b) for b in BENCHMARKS]).set_index("task")[["title", "shots", "metric", "files"]]


# %% [markdown]
# H4 is the mean of the first four. Four remarks, for those who compare with published numbers:
#
# - The leaderboard ran a version of the harness of 2023. Prompts have changed a little since, so expect differences of some tenths of a point.
# - MMLU has 57 subjects. The leaderboard took the mean over subjects; the harness today takes it over questions, and so do we. With `limit`, which takes as many of each subject, there is no difference up to 100, the size of the smallest subjects.
# - ARC and HellaSwag draw their examples from *training* questions. The local files have none. Then the examples come from the validation part, and in HellaSwag never include the question itself. Scores move a little, for all models alike.
# - EQ-Bench is the harness's: the questions of its second version, without the part in which a model revises its answer, and without a chat template. An answer that cannot be read counts as 0. The original asks again, and leaves out what still cannot be read. So weak models score lower here than on its leaderboard.
#
# ### Local files
#
# Where no hub can be reached, the data must come from files. Those that we use hold one question a line, with the fields `question`, `choices` and `label` in most of them. The harness's tasks want other names, and other forms: ARC numbers its options by letters, EQ-Bench wants its reference as text. The table above translates. A field of a task is either the name of a field of the row, or a function of the row.
#
# Each row is translated before anything is computed, and what cannot be translated is an error with file, row and field.

# %%
#| export
@lru_cache(4)
def _rows(path):
    "The rows of a .jsonl.gz file. Raises ValueError with file and row."
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: is missing; without --data, benchmarks are read from the hub")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines: return [json.loads(line) for line in lines]
    except (OSError, EOFError, ValueError) as e: raise ValueError(f"{path}: cannot be read ({e})") from e

def _field(name, how, row, where):
    try: return how(row) if callable(how) else row[how]
    except (KeyError, IndexError, TypeError) as e:
        why = f"{type(e).__name__}: {e}"
        raise ValueError(f"{where}: '{name}' of the task cannot be made of it ({why})") from e

def local_dataset(
    benchmark: str,     # name of one in `BENCHMARKS`
    folder: str,        # with the local files
    subject: str=None,  # of MMLU
    **other,            # what the harness says beside; not used
) -> dict:              # part of the data -> its rows, with the fields of the task
    "Local files as the harness's task wants them. Raises ValueError: file, row and field."
    b = {b.task: b for b in BENCHMARKS}[benchmark]
    parts = {}
    for part, name in b.files.items():
        path = Path(folder) / f"{name}.jsonl.gz"
        made = []
        for i, row in enumerate(_rows(str(path))):
            if subject and row.get("subject") != subject: continue
            where = f"{path}: row {i}"
            made.append({name: _field(name, how, row, where) for name, how in b.fields.items()})
        if not made: raise ValueError(f"{path}: no rows" + (f" of the subject {subject}" if subject else ""))
        parts[part] = Dataset.from_list(made)
    return parts


# %% [markdown]
# A made-up file of two questions, in the second of which something is missing:

# %%
local = tmp / "local"
local.mkdir()

def write_rows(name, rows):
    lines = [json.dumps(row) + "\n" for row in rows]
    with gzip.open(local / f"{name}.jsonl.gz", "wt") as f: f.writelines(lines)

arc = dict(question="Which is hot?", choices=["ice", "fire", "snow"], label=1)
write_rows("arc_challenge_test", [arc, dict(question="Which is cold?", label=0)])
print(complaint(local_dataset, "arc_challenge", local).replace(str(tmp), "."))
write_rows("arc_challenge_test", [arc, arc])
_rows.cache_clear()
print(complaint(local_dataset, "arc_challenge", local).replace(str(tmp), "."))

# %%
write_rows("arc_challenge_validation", [arc] * 26)
dataset = local_dataset("arc_challenge", local)
dataset["test"][0]

# %% [markdown]
# `write_tasks` writes a folder of definitions. (Of MMLU, it takes the subjects that the local files have.) Each includes the harness's own and changes two things: the number of examples, and, for local files, where the data come from. The command line of the harness reads the same folder with `--include_path`, so both ask the same questions.

# %%
#| export
LOCAL = "custom_dataset: !function sdpo_nb.benchmarks.local_dataset\n"

def _definitions(b):
    "Name of each task of a benchmark -> its definition. Raises ValueError where there is none."
    where = Path(harness("lm_eval.tasks").__file__).parent / b.definition # an absolute path stays what it is
    if "*" not in where.name: found = {b.task: where}
    else: found = {path.stem: path for path in sorted(where.parent.glob(where.name))}
    if not found or not all(path.is_file() for path in found.values()):
        raise ValueError(f"{b.task}: there is no definition {where}")
    if "*" in where.name and b.task in found:
        raise ValueError(f"{b.task}: one of the tasks of this group has its name; give the group another one")
    return found

def _there(b, found, data):
    "Those of the definitions of a group whose subject is in the local files."
    path = Path(data) / f"{b.files['test']}.jsonl.gz"
    subjects = {row.get("subject") for row in _rows(str(path))}
    there = {name: path for name, path in found.items() if name.removeprefix(f"{b.task}_") in subjects}
    if not there: raise ValueError(f"{path}: no rows of a subject of {b.title}")
    return there

def write_tasks(
    folder,                 # where to; made where it is missing
    data=None,              # folder with local files; None: the data come from the hub
    benchmarks=BENCHMARKS,  # which
) -> list[str]:             # names of the tasks and groups that can be asked
    "Definitions for `ask_harness`, and for `lm_eval --include_path`."
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for b in benchmarks:
        found, local = _definitions(b), data is not None and b.files
        if local and len(found) > 1: found = _there(b, found, data)
        for name, path in found.items():
            told = dict(include=str(path), task=name, num_fewshot=b.shots)
            if local:
                subject = name.removeprefix(f"{b.task}_") if "*" in b.definition else None
                how = dict(benchmark=b.task, folder=str(Path(data).resolve()), subject=subject)
                told |= b.settings | dict(dataset_kwargs=how)
            text = yaml.safe_dump(told, sort_keys=False) + (LOCAL if local else "")
            (folder / f"{name}.yaml").write_text(text)
        if "*" in b.definition:
            over_questions = [dict(metric=b.metric.split(",")[0], weight_by_size=True)]
            group = dict(group=b.task, task=list(found), aggregate_metric_list=over_questions)
            (folder / f"{b.task}.yaml").write_text(yaml.safe_dump(group, sort_keys=False))
    return [b.task for b in benchmarks]


# %%
names = write_tasks(tmp / "tasks", local, BENCHMARKS[:1])
text = (tmp / "tasks/arc_challenge.yaml").read_text()
package = str(Path(harness().__file__).parent)
print(text.replace(str(tmp), ".").replace(package, "lm_eval"))

# %% [markdown]
# Does the harness take it? S knows no English, and no capital letter is in its vocabulary. But it can be asked.

# %%
found = ask_harness(sharing_lm(S, tok), ["arc_challenge"], tmp / "tasks", limit=2)
sample = found["samples"]["arc_challenge"][0]
context, option = sample["arguments"][1]
assert context.count("Question:") == 26
print(context[-60:] + option)


# %% [markdown]
# ## Scores that are kept
#
# H4 of a model of seven billion parameters takes hours, and of a run with three stages four times as long. So every answer to a single request is written down at once, in a small data base that the harness knows how to fill (`use_cache`). When all is asked, each benchmark gets a file with the score of each question. Whoever stops it and starts it again loses one request.

# %%
#| export
@dataclass
class Score:
    "What a model scored in a benchmark."
    task: str      # name in the harness
    value: float   # as the harness says it
    stderr: float  # its standard error, as the harness says it; NaN for one question
    items: list    # of each question: task, number, hash of question and prompt, score
    asked: dict    # what was asked of whom: hash of the weights, limit, data, ...

    @property
    def scores(self) -> np.ndarray: # (n,)
        return np.array([item["score"] for item in self.items])

def _score(found, b, asked):
    "A Score of what `simple_evaluate` returned."
    result = (found.get("groups", {}) | found["results"])[b.task]
    metric, filtered = _reported(result, b)
    items = []
    for name in _definitions(b):
        for s in found["samples"].get(name, []):
            if s["filter"] != filtered: continue
            question = f"{s['doc_hash']}{s['prompt_hash']}"
            short = hashlib.sha256(question.encode()).hexdigest()[:16]
            items.append(dict(task=name, number=s["doc_id"], hash=short, score=float(s[metric])))
    error = result.get(f"{metric}_stderr,{filtered}")
    stderr = float(error) if isinstance(error, (int, float)) else math.nan
    return Score(b.task, float(result[f"{metric},{filtered}"]), stderr, items, asked)

def _reported(result, b):
    "Metric and filter, by which the harness calls a number. Raises ValueError where it is not one of them."
    names = [name for name in result if "," in name and "_stderr," not in name]
    meant = [name for name in names if b.metric in (name, name.split(",")[0])]
    if len(meant) == 1: return meant[0].split(",")
    raise ValueError(f"{b.task}: its metric is called {b.metric!r}, and the harness reports {', '.join(names)}; "
                     "name one of these, and the answers, which are kept, are counted again")

def read_score(
    path,             # of a file that `score_model` wrote
    asked: dict=None, # what should have been asked; None: whatever it was
) -> Score|None:      # None where it is missing, or something else was asked
    "A finished benchmark of a model. Raises ValueError for a file that cannot be read."
    path = Path(path)
    if not path.exists(): return None
    try: found = Score(**json.loads(path.read_text()))
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path}: cannot be read ({e}); remove it, and the benchmark is asked again") from e
    return found if asked in (None, found.asked) else None


# %% [markdown]
# Why keep the score of each question, and not the mean alone? Because paired differences need them, also with models that are trained next year. And the hashes say whether next year's questions are still the same.
#
# `asked` says what a score belongs to: weights, tokenizer, data, limit, examples, metric, version of the harness. If any of it is different today, the benchmark is asked again. What was asked before, at a smaller `limit` or for another metric, is in the data base of requests, and only the rest is computed.
#
# Of a benchmark of your own, the definition is hashed, with the files that it names and the functions beside it. So when you mend a question, it is asked again.

# %%
#| export
def _fingerprint(b, data):
    "What the questions are made of: a hash of the local files, or of a definition of one's own, or the hub."
    if data is not None and b.files: paths = _local_files(b, data)
    elif Path(b.definition).is_absolute(): paths = [file for path in _definitions(b).values() for file in _made_of(path)]
    else: return "hub"
    h = hashlib.sha256()
    for path in paths: h.update(path.read_bytes())
    return h.hexdigest()[:16]

def _local_files(b, data):
    "Those of a benchmark of the table. Raises ValueError for another benchmark, and where one is missing."
    if (b.files, b.fields) not in [(known.files, known.fields) for known in BENCHMARKS if known.task == b.task]:
        raise ValueError(f"{b.task}: files and fields are for {', '.join(known.task for known in BENCHMARKS)}; "
                         "data of one's own are named in the definition (dataset_kwargs: data_files)")
    paths = [Path(data) / f"{name}.jsonl.gz" for name in b.files.values()]
    for path in paths:
        if path.exists(): continue
        raise ValueError(f"{path}: is missing; without --data, benchmarks are read from the hub")
    return paths

def _made_of(path):
    "The files of a definition: itself, the functions beside it, and those that it names."
    words = [token.value for token in yaml.scan(path.read_text()) if isinstance(token, yaml.ScalarToken)]
    named = [folder / word for word in words for folder in (path.parent, Path.cwd())]
    return [path, *sorted(path.parent.glob("*.py")), *filter(os.path.isfile, named)]

def _hash_of(tokenizer):
    "Of what decides the ids of a text."
    decides = [_backend(tokenizer), tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:16]

@contextlib.contextmanager
def _explained(requests, data):
    "What goes wrong while the harness reads questions and keeps answers, in one line."
    try: yield
    except sqlite3.DatabaseError as e:
        what = f"{requests}_rank0.db: answers cannot be kept there ({e})"
        if isinstance(e, sqlite3.OperationalError): raise OSError(what) from e # full, locked, read-only
        raise ValueError(f"{what}; remove this file, and they are computed again") from e
    except OSError as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        if e.errno in FULL: raise OSError(f"{requests.parent}: disk full? ({reason})") from e
        cure = "" if data is not None else "; --data FOLDER reads local files"
        raise ValueError(f"questions cannot be read ({reason}){cure}") from e

def score_model(
    load,            # nothing -> model; called where something is left to ask
    tokenizer,       # of this model
    weights: str,    # hash of its weights
    folder,          # where its scores are kept
    benchmarks=BENCHMARKS, # which
    limit: int=None, # so many questions of each task, the first ones; None: all
    data=None,       # folder with local files; None: the hub
    desc: str="",    # name of the model, for the bar
) -> dict[str, Score]: # by task
    "Ask one model, go on where an earlier call stopped, and keep what it scored."
    folder = Path(folder)
    ids, version = _hash_of(tokenizer), harness().__version__
    asked = {}
    for b in benchmarks:
        how = dict(limit=limit, shots=b.shots, metric=b.metric, data=_fingerprint(b, data))
        asked[b.task] = dict(weights=weights, tokenizer=ids, harness=version) | how
    found = {task: read_score(folder / f"{task}.json", what) for task, what in asked.items()}
    left = [b for b in benchmarks if found[b.task] is None]
    if not left: return found

    lm = sharing_lm(load(), tokenizer, desc)
    folder.mkdir(parents=True, exist_ok=True)
    requests = folder / f"requests-{weights}-{ids}"
    with tempfile.TemporaryDirectory() as tasks:
        names = write_tasks(tasks, data, left)
        with _explained(requests, data): answers = ask_harness(lm, names, tasks, limit, requests)
    for b in left:
        found[b.task] = _score(answers, b, asked[b.task])
        write_json(folder / f"{b.task}.json", vars(found[b.task]))
    return found


# %% [markdown]
# Our own task as a `Benchmark`. So whoever has a benchmark of their own, described for the harness, needs one line to have it here: the path of its definition, which also says where its data are, and the metric. The second call loads no model: nothing is left to ask.

# %%
ours = Benchmark("strings", "Strings", str(zero_shot / "strings.yaml"), shots=0, metric="acc_norm")
loads = []

def load_S():
    loads.append("S")
    return S

once = score_model(load_S, tok, weights_hash(S), tmp / "scores", [ours], limit=100)
again = score_model(load_S, tok, weights_hash(S), tmp / "scores", [ours], limit=100)
assert loads == ["S"]
assert once == again
print(f"{once['strings'].value:.2f}, standard error {once['strings'].stderr:.3f}")


# %% [markdown]
# And if it is killed half-way? A question takes two forward passes, one for its prompt and one for its options. We let the model fail after a hundred, and count what the next call needs. In either call, ten passes belong to the look at whether prompts can be shared.

# %%
class Stops(Exception): pass

def stopping_after(n, count):
    "S, which fails in its n-th forward pass and counts them."
    model = load_model(w.base, "cpu")
    forward = model.forward

    def counted(*args, **kw):
        count.append(1)
        if len(count) > n: raise Stops
        return forward(*args, **kw)

    counted.__signature__ = inspect.signature(forward)
    model.forward = counted
    return model

def try_it(n, count):
    load = lambda: stopping_after(n, count)
    return score_model(load, tok, weights_hash(S), tmp / "killed", [ours], limit=100)

first_try, second_try = [], []
try: try_it(100, first_try)
except Stops: print("stopped")
resumed = try_it(10**6, second_try)
assert resumed["strings"].items == once["strings"].items
assert len(first_try) - 1 + len(second_try) == 2 * 100 + 2 * 10
print(f"forward passes: {len(first_try)}, then {len(second_try)}")


# %% [markdown]
# ## Models side by side
#
# Of several models on the same questions we want three things: their scores, their paired differences, and a picture. In a run of stepwise DPO the models are S, $M_1$, $M_2$ and so on, and two differences of each are of interest: from S (did the run help so far?) and from the model before (did this stage help?).
#
# First the choice of benchmarks by name; `h4` stands for four of them.

# %%
#| export
def find_benchmarks(
    names: list, # of benchmarks, or benchmarks; "h4" stands for four
) -> list[Benchmark]:
    "Benchmarks by name. Raises ValueError for a name that is none."
    known, found = {b.task: b for b in BENCHMARKS}, {}
    for name in names:
        for b in H4 if name == "h4" else [name]:
            if not isinstance(b, Benchmark):
                if b not in known: raise ValueError(f"tasks: {b!r} is not known; known are h4, {', '.join(known)}")
                b = known[b]
            if found.setdefault(b.task, b) != b: raise ValueError(f"tasks: two of them are called {b.task!r}")
    if not found: raise ValueError("tasks: there are none")
    return list(found.values())


# %%
print([b.title for b in find_benchmarks(["h4", "eq_bench", "mmlu"])])
complaint(find_benchmarks, ["gsm8k"])


# %% [markdown]
# A paired difference needs the same questions in the same order. The hashes of the questions know whether it is so.

# %%
#| export
def question_differences(
    ours: Score,   # of one model
    theirs: Score, # of another
) -> np.ndarray:   # (n,) ours minus theirs, question by question
    "Paired differences. Raises ValueError where the questions were not the same."
    same = [a["hash"] for a in ours.items] == [b["hash"] for b in theirs.items]
    if not same:
        raise ValueError(f"{ours.task}: the two models were not asked the same questions; ask both again")
    return ours.scores - theirs.scores


# %%
fewer = score_model(load_S, tok, weights_hash(S), tmp / "fewer", [ours], limit=50)
print(complaint(question_differences, once["strings"], fewer["strings"]))


# %% [markdown]
# The interval of a difference is the one of [chapter 08](08_evaluate.ipynb): questions are drawn anew 2,000 times, and the mean difference of each draw is noted. H4 is a mean of four means. So each of the four is drawn anew, and the four means are averaged, draw by draw.

# %%
#| export
@dataclass
class Evaluation:
    "Scores of several models on the same questions; the others are compared with the first."
    scores: dict     # model -> task -> Score
    benchmarks: list # in the order of the table

    def _by_name(self):
        "What stands in a column -> the benchmarks it is the mean of."
        columns = {b.title: [b] for b in self.benchmarks}
        four = [b for b in self.benchmarks if b.task in H4]
        return columns | {"H4": four} if len(four) == len(H4) else columns

    def table(self) -> pd.DataFrame: # model: index; benchmark, (points, standard error): columns
        "What each model scored, in points."
        rows = {}
        for model, scores in self.scores.items():
            row = rows[model] = {}
            for name, parts in self._by_name().items():
                values = [b.scale * scores[b.task].value for b in parts]
                errors = [b.scale * scores[b.task].stderr for b in parts]
                row[name, "points"] = np.mean(values)
                row[name, "standard error"] = np.sqrt(np.sum(np.square(errors))) / len(parts)
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")

    def difference(
        self,
        model: str,   # which
        against: str, # another one
        name: str,    # title of a benchmark, or H4
    ) -> tuple[float, float, float]: # mean, low, high
        """Paired difference in points, with its 95 % interval.

        Raises ValueError where the questions were not the same, and for a score that is not a number."""
        ours, theirs = self.scores[model], self.scores[against]
        parts = self._by_name()[name]
        for who in (model, against):
            for b in parts:
                if np.isfinite(self.scores[who][b.task].scores).all(): continue
                raise ValueError(f"{who}: a score of {b.title} is not a number, so it cannot be compared")
        differences = [b.scale * question_differences(ours[b.task], theirs[b.task]) for b in parts]
        if len(parts) == 1: return interval(differences[0])
        mean = float(np.mean([d.mean() for d in differences]))
        if min(map(len, differences)) == 1: return mean, math.nan, math.nan # one question has no error
        draws = np.mean([bootstrap(d, seed=i) for i, d in enumerate(differences)], axis=0)
        low, high = np.quantile(draws, [0.025, 0.975]).tolist()
        return mean, low, high

    def differences(self) -> pd.DataFrame: # model, against: index; one column per benchmark
        "(mean, low, high) of each model against the first, and against the one before it."
        models, names, rows = list(self.scores), self._by_name(), {}
        for i, model in enumerate(models[1:], 1):
            for against in dict.fromkeys([models[0], models[i-1]]):
                rows[model, against] = {name: self.difference(model, against, name) for name in names}
        if not rows: return pd.DataFrame() # of a single model
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["model", "against"])

    def figure(self) -> plt.Figure: return plot_benchmarks(self)


# %% [markdown]
# S and $M_2$ on a hundred of our questions:

# %%
def load_M_2(): return M_2

of_M_2 = score_model(load_M_2, tok, weights_hash(M_2), tmp / "scores_of_M_2", [ours], limit=100)
two = Evaluation({"S": once, "M_2": of_M_2}, [ours])
print(two.table().round(1))
print("difference", as_text(two.difference("M_2", "S", "Strings"), "+.1f"))


# %% [markdown]
# Look at the errors. Each score has one of five points, and a reader who compares them would not dare to see a difference. The paired interval is clear of zero.
#
# The figure shows differences from the first model only. Scores themselves belong into the table: in a picture from 0 to 100, what training changed could not be seen.

# %%
#| export
def plot_benchmarks(
    found: Evaluation, # of two models or more
) -> plt.Figure:
    """Paired differences from the first model, with 95 % intervals, benchmark by benchmark.

    Raises ValueError for a single model, and as `difference` does."""
    first, *others = found.scores
    if not others: raise ValueError("plot_benchmarks: one model has nothing to be compared with")
    names = list(found._by_name())
    colors = sns.color_palette("viridis", len(found.scores))[1:]
    fig, ax = plt.subplots(figsize=(6.5, 0.6 * len(names) + 1.4))
    for i, (model, color) in enumerate(zip(others, colors)):
        beside = 0.5 * ((i + 1) / (len(others) + 1) - 0.5)
        rows = [found.difference(model, first, name) for name in names]
        mean, low, high = np.array(rows).T
        whiskers = np.maximum(0, [mean - low, high - mean]) # rounding may put a bound beyond the mean
        y = np.arange(len(names)) + beside
        ax.errorbar(mean, y, xerr=whiskers, fmt="o", color=color, capsize=3, label=model)
    ax.axvline(0, color="black", lw=1, ls=":")
    ax.set(yticks=range(len(names)), yticklabels=names)
    ax.set_xlabel(f"difference from {first}, same questions (points)\nworse  ←  →  better")
    ax.invert_yaxis()
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize="small", ncol=len(others))
    sns.despine(fig)
    return fig


# %%
print(complaint(plot_benchmarks, Evaluation({"S": once}, [ours])))


# %% [markdown]
# What is left are two ways in, and what they share: scores are kept in a folder, which belongs to one process at a time, and table and figure lie beside them.

# %%
#| export
def _evaluate(models, folder, tasks, limit, data):
    "models: name -> (load, tokenizer, weights)."
    benchmarks = find_benchmarks(tasks)
    if limit is not None and limit < 1: raise ValueError(f"limit: must be at least 1, got {limit}")
    folder, data = Path(folder).expanduser(), data and Path(data).expanduser()
    with alone_in(folder):
        asked = dict(benchmarks=benchmarks, limit=limit, data=data)
        scores = {name: score_model(*model, folder / name, desc=name, **asked)
                  for name, model in models.items()}
        found = Evaluation(scores, benchmarks)
        with replacing(folder / "benchmarks.csv") as tmp: found.table().to_csv(tmp)
        if len(models) > 1:
            figure = found.figure()
            with replacing(folder / "benchmarks.png") as tmp:
                figure.savefig(tmp, format="png", bbox_inches="tight")
            plt.close(figure)
    return found


# %%
_evaluate({"S": (load_S, tok, weights_hash(S))}, tmp / "again", [ours], 10, None)
sorted(str(path.relative_to(tmp / "again")) for path in (tmp / "again").rglob("*.*s*"))


# %% [markdown]
# The two ways in: for the models of a run, S and every $M_t$, whose hashes the run knows; and for any folders or hub ids.

# %%
#| export
def evaluate_run(
    folder,             # of a run with a finished stage
    tasks: list=("h4",), # names of benchmarks, or benchmarks
    limit: int=None,    # so many questions of each task, the first ones; None: all
    data=None,          # folder with local files; None: the hub
) -> Evaluation:        # its first model is S
    """Score S and every M_t. Scores are kept in the folder of the run, under eval.
    Raises ValueError where there is no finished stage, or other weights lie in the place of a model."""
    run = Run(folder)
    if not run.stages: raise ValueError(f"{folder}: no finished stage of a run in this folder")
    config = run.config
    where, revision = run.model_folder(0).as_posix(), config.get("revision") # the run may have been moved
    tokenizer = load_tokenizer(where, revision)

    def load_S():
        model = load_model(where, None, revision)
        if weights_hash(model) != config["weights"]: raise ValueError(f"{where}: is not the S of this run")
        return model

    models = {"S": (load_S, tokenizer, config["weights"])}
    for t, stage in enumerate(run.stages, 1):
        load = lambda t=t: load_stage(folder_of(run.folder, t))
        models[f"M_{t}"] = load, tokenizer, saved_as(stage)["weights"]
    return _evaluate(models, run.folder / "eval", tasks, limit, data)

def evaluate_folders(
    models: dict,       # name -> folder or hub id, or folder of an adapter; the others are compared with the first
    folder,             # where scores are kept
    tasks: list=("h4",), # names of benchmarks, or benchmarks
    limit: int=None,    # so many questions of each task, the first ones; None: all
    data=None,          # folder with local files; None: the hub
) -> Evaluation:
    "Score models that lie anywhere, one in memory at a time. Each is loaded once more to know its weights."
    tokenizers = {name: load_saved_tokenizer(where) for name, where in models.items()} # of all, before the long work
    found = {}
    for name, where in models.items():
        load = lambda where=where: load_any(where)
        found[name] = load, tokenizers[name], weights_hash(load())
    return _evaluate(found, folder, tasks, limit, data)


# %% [markdown]
# The run from above. To have more than one benchmark, each skill of the world becomes one.

# %%
def skill_benchmark(skill):
    "The questions of one skill as a benchmark."
    mine = [line for line in lines if f">{skill} " in line]
    file = tmp / f"{skill}.jsonl"
    file.write_text("".join(mine))
    folder = define(skill, dataset_kwargs=dict(data_files=dict(test=str(file))))
    return Benchmark(skill, skill, str(folder / f"{skill}.yaml"), shots=0, metric="acc_norm")

skills = [skill_benchmark(skill) for skill in ("copy", "reverse", "sort", "shift")]
evaluation = evaluate_run(run.folder, skills)
evaluation.table().round(1)

# %%
differences = evaluation.differences()
differences.map(lambda cell: as_text(cell, "+.1f"))

# %%
evaluation.figure();

# %% [markdown]
# What to see: a dot right of the line is a gain over S, and where its whisker crosses the line, chance could have made it. Three skills gain, and nothing can be said of `copy`.
#
# Twelve intervals of 95 % are many: with no difference anywhere, nearly every second such table would have one that misses zero. So decide beforehand which comparison you believe. For a run it is that of the last model with S in H4.
#
# From the command line it is `sdpo eval RUN --tasks h4 --limit 50` ([18](18_cli.ipynb)).
#
# ## A real model, and the harness's own command
#
# Is it all the same in the end? We gave the same files to `sdpo eval` and to the harness's own command, `lm_eval --include_path`, with the folder of `write_tasks`: SmolLM2-135M-Instruct in fp32 on a CPU, two questions of each task (of MMLU two of each of three subjects). So few questions say nothing about the model. But a wrong blank, a lost first token or another example would show in them. (`tests/bench_benchmarks.py commands` does it again.)

# %%
runs = pd.DataFrame(measured["commands"]["runs"])
values = {}
for _, one in runs.drop_duplicates("command").iterrows():
    said = {b.title: b.scale * one["said"][b.task][0] for b in BENCHMARKS}
    said["H4"] = np.mean([said[b.title] for b in find_benchmarks(["h4"])])
    values["sdpo eval" if one["command"] == "sdpo" else one["command"]] = said
compared = pd.DataFrame(values)
off = (compared["sdpo eval"] - compared["lm_eval"]).abs()
assert (compared["sdpo eval"].map("{:.4f}".format) == compared["lm_eval"].map("{:.4f}".format)).all()
compared.assign(apart=off).style.format("{:.4f}").format("{:.0e}", subset=["apart"])

# %% [markdown]
# The same to the last digit that either of them prints. Where options are only counted as right or wrong, the numbers are the same to the last bit. MC2 is made of probabilities, and there rounding remains. EQ-Bench is 0 in both: in what this small model wrote, no four emotions with scores could be found. So in EQ-Bench two questions show little; but its answers are generated by the harness's own code in either case.
#
# And the time? Each command was run twice, once as the first and once as the second. The machine had other work to do, so the clock says little. What the processor spent, loading and imports included, says more:

# %%
runs["clock"], runs["processor"] = zip(*runs["seconds"])
runs["command"] = runs["command"].replace("sdpo", "sdpo eval")
spent = runs.groupby("command")["processor"].mean()
assert spent["lm_eval"] > 2 * spent["sdpo eval"]
runs[["command", "threads", "clock", "processor"]].style.format("{:.0f} s", subset=["clock", "processor"])

# %% [markdown]
# Less than half. And a part of it is not what we changed: importing, loading, and in `lm_eval` a search through all definitions of the harness. With more questions only the tokens count, and their table stands above.
#
# Here is what is printed, with five questions of TruthfulQA. The score is far too uncertain to mean anything.

# %%
#| slow
data = Path(os.environ.get("SDPO_DATA", "../../shared/data")) / "benchmarks"
smol = os.environ.get("SDPO_MODEL", str(Path.home() / ".cache/sdpo_nb/smollm2-135m-instruct"))
with skipped_without(
    "local benchmarks and SmolLM2-135M-Instruct",
    "a score of 31.6 points, with a standard error of 19.7",
):
    real = evaluate_folders({"SmolLM2-135M": smol}, tmp / "real", ["truthfulqa_mc2"], limit=5, data=data)
    display(real.table().round(1))

# %%
#| hide
shutil.rmtree(tmp)

# %% [markdown]
# ## What this does not show
#
# - A benchmark measures what can be asked with options. Whether answers are pleasant, or true when nobody offers options, it does not say.
# - Questions of public benchmarks may have been in the training data of a model. Differences between S and $M_t$ suffer less from this than scores do: both have seen the same.
# - The intervals are about questions. Another training seed would have given another $M_t$.
#
# ## What you now have
#
# - `ask_harness`: any task of lm-evaluation-harness, with its own definitions.
# - `sharing_lm`: its model class, which reads only once what requests share.
# - `write_tasks`: the benchmarks of H4, from the hub or from local files, for this package and for the command `lm_eval`.
# - `evaluate_run`, `evaluate_folders`: scores with standard errors, paired differences with intervals, a figure; nothing is asked twice.
#
# ## Questions to test yourself
#
# 1. Why is `acc` in our task 0 as soon as the short option is there, and why does dividing by the number of characters help?
#
# <details><summary>Answer</summary>
#
# The short option is the beginning of the right one, so its log-probability contains fewer terms, none of which is positive: it can never be lower. Divided by characters, the right answer wins where its last letter is likelier than its letters are on average.
#
# </details>
#
# 2. Two models have scores of 31.0 and 32.0 points, each with a standard error of 1.4. Is the second better?
#
# <details><summary>Answer</summary>
#
# Nobody can say from these numbers. If the models are alike, the paired interval may lie above zero; it needs the scores of the single questions.
#
# </details>
#
# 3. In ARC the 25 examples are drawn anew for each question. What can be shared there, and what not?
#
# <details><summary>Answer</summary>
#
# The options of a question share its prompt, so about a quarter of the tokens is read. The prompts of two questions have only their first word in common.
#
# </details>
#
# ## Try this
#
# Train the run harder, on fewer pairs: `lr=3e-4` and `max_pairs=250`. Before you look: does pairing still help as much?
#
# <details><summary>What you should see</summary>
#
# The assertion fails: 0.049 unpaired and 0.049 paired. Now both models are right, or both wrong, on 52 % of the questions only, hardly more than by chance. Pairing helps as far as models are alike. A stage of DPO on a real model, with its small learning rate, leaves them very much alike.
#
# </details>
