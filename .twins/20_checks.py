# %% [markdown]
# # Checks that name the mistake
# > Seventeen exercises, a check for each, and what each check says about a wrong answer.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/20_checks.ipynb)
#
# **You should know** the [DPO loss](03_loss.ipynb) and [one stage of training](06_trainer.ipynb). Read this chapter if you teach, or if you want to know how the checks of the assignments work. If you only want
# to solve the assignments, you need nothing from here.
#
# **Time** to read: one hour to the end of "The check", which is the mechanism; the exercises behind it are for looking up, two hours and a half if you read them all. To run: under a minute on two CPU cores.
#
# A student writes a function, and a test says that it is wrong. That is little help. The mistakes in this field raise no error, and most of them are made by many people: $\beta$ forgotten, the
# shift forgotten, chosen and rejected exchanged. So a check can do better. It can say *which* mistake it was, and where to read about it.
#
# Three things are wanted of a check:
#
# 1. A right answer always passes, however it is written.
# 2. A wrong answer never passes, and a usual mistake is called by its name.
# 3. What it says is short: what is wrong, why, and where to read.

# %%
#| default_exp checks

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
import contextlib, copy, dis, io, itertools, math, operator, random, re, sys
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Callable

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo_nb import __version__
from sdpo_nb.logprobs import response_logprobs
from sdpo_nb.world import answer, make_model, make_prompts, make_tokenizer, prompt_ids

# %%
import time

import sdpo_nb.loss

torch.set_num_threads(1)
pd.set_option("display.width", 200, "display.max_columns", 30)
pd.set_option("display.max_colwidth", 300, "display.max_rows", 200)


# %% [markdown]
# ## A mistake is a function, too
#
# Here is a DPO loss as a student handed it in. Do you see what is wrong with it?

# %%
def handed_in(gamma_theta, gamma_ref, beta):
    return -beta * F.logsigmoid(gamma_theta - gamma_ref)


# %% [markdown]
# A test with one golden number would say "not equal". Instead we write the loss once more, *crookedly*: one function, with a switch for every mistake that we have seen people make. Without switches it is right.

# %%
def crooked(gamma_theta, gamma_ref, beta, wrong=()):
    gain = gamma_theta - gamma_ref
    if "no_ref" in wrong: gain = gamma_theta
    if "swapped" in wrong: gain = -gain
    if "no_beta" in wrong: beta = 1.0
    if "outside" in wrong: return -beta * F.logsigmoid(gain)
    return -F.logsigmoid(beta * gain)

switches = ("no_ref", "swapped", "no_beta", "outside")

# %% [markdown]
# Each mistake is now a function that can be called. Give it the same random numbers as the student's function, and compare:

# %%
g = torch.Generator().manual_seed(0)
gammas = 10 * torch.randn(2, 4, dtype=torch.float64, generator=g)

answers = {"right": crooked(*gammas, 0.1)}
for switch in switches: answers[switch] = crooked(*gammas, 0.1, wrong=(switch,))
answers["handed in"] = handed_in(*gammas, 0.1)
pd.DataFrame(answers, index=[f"pair {i}" for i in range(4)]).T.round(3)

# %% [markdown]
# The last row is the row `outside`, digit by digit. Four numbers do not agree by chance. So the student has put $\beta$ outside the logarithm: not probably, but exactly.
#
# Whoever makes two mistakes gets the numbers of two switches. So the diagnosis is: *the fewest switches that give exactly the student's numbers*. No switch: the answer is right. No set of one or two switches: the answer
# is wrong in a way that nobody has foreseen, and the check can only show the first number that differs.
#
# That is the whole idea. The rest of the chapter makes it reliable. It asks whether the function is the student's own, whether it returns anything, and whether it returns the right kind of thing; then come the switches; then a few properties
# that ordinary numbers cannot show. Then it applies all that to seventeen exercises.
#
# ## What a check says
#
# A check that fails raises an exception, so that a cell of an assignment stops and a grader notices. A traceback would not help the student: it shows the inside of the check. A notebook asks an exception for `_render_traceback_`
# before it prints one.

# %%
#| export
LIMIT = 300 # characters of a message

class CheckFailed(AssertionError):
    "What is wrong with an answer, in one sentence or two. Notebooks show it without a traceback."
    def __init__(
        self,
        message: str,       # is cut at LIMIT
        mistakes: tuple=(), # their names; or one of empty, form, stopped, own_work, unknown
    ):
        short = message if len(message) <= LIMIT else message[:LIMIT - 3] + "..."
        super().__init__(short)
        self.mistakes = tuple(mistakes)

    def _render_traceback_(self): return [f"CheckFailed: {self}"]


# %% [markdown]
# What a notebook prints, instead of twenty lines:

# %%
print(*CheckFailed("dpo_loss: the two responses are swapped.", ["swapped"])._render_traceback_())


# %% [markdown]
# ## Is it the student's own?
#
# The package holds a solution of nearly every exercise. So a check looks at the code of the function, and at the code of every function that it calls by name. Is one of them from `sdpo_nb`? Then it is not the student's work. Two
# things may be used: the tiny world, and `score`, which the exercises on training need and which earlier chapters have explained.

# %%
#| export
def score(
    model,        # causal LM
    pairs: list,  # n tokenised pairs
) -> tuple[Tensor, Tensor]:  # (n,) log pi(y_w|x) and (n,) log pi(y_l|x), nats
    "Log-probabilities of both responses, for exercises that begin after them."
    return response_logprobs(model, pairs)

GIVEN = {"score"} # of this module, what an answer may use
_HERE = "sdpo_nb.checks"

def _is_foreign(thing) -> bool:
    "Whether something belongs to the package, and is not given."
    if isinstance(thing, dict): return any(map(_is_foreign, thing.values()))
    name = getattr(thing, "__name__", "")
    home = getattr(thing, "__module__", None) or ""
    if home == _HERE: return name not in GIVEN
    if isinstance(thing, ModuleType): home = "" if name == _HERE else name
    return home.split(".")[0] == "sdpo_nb" and home != "sdpo_nb.world"


# %%
some = (sdpo_nb.loss, sdpo_nb.loss.dpo_loss, F.logsigmoid, handed_in)
{thing.__name__: _is_foreign(thing) for thing in some}


# %% [markdown]
# What does a function use? Its compiled code says it, step by step. We follow the points, too, so that `F.logsigmoid` is one thing.

# %%
#| export
def _names_used(code: CodeType):
    "Names that a code object looks up outside of itself, each with the attributes that are taken from it."
    path = []
    for step in dis.get_instructions(code):
        if path and step.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"):
            path.append(step.argval)
            continue
        if path: yield path
        path = [step.argval] if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME") else []
    for const in code.co_consts:
        if isinstance(const, CodeType): yield from _names_used(const)


# %%
list(_names_used(handed_in.__code__))


# %% [markdown]
# Each path leads to something: a module, a function of the package, or another function of the student's, which is looked at in turn.

# %%
#| export
def _things_used(f: FunctionType):
    "(name, thing) of all that a function uses from outside of itself."
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or ()):
        with contextlib.suppress(ValueError): yield name, cell.cell_contents    # it may be empty
    for name, *attributes in _names_used(f.__code__):
        thing = f.__globals__.get(name, sys.modules.get(name))
        for attribute in attributes:
            if not isinstance(thing, ModuleType): break
            name, thing = attribute, getattr(thing, attribute, None)
        yield name, thing

def _plain(f):
    "The Python function inside a partial, a method or an object that can be called."
    if isinstance(f, partial): return _plain(f.func)
    if isinstance(f, MethodType): return f.__func__
    if isinstance(f, (FunctionType, type)): return f
    return getattr(type(f), "__call__", None)

def foreign_name(
    f,               # a function
    seen: set=None,  # functions that were looked at before
) -> str|None:       # the name under which it is used, or None
    "The first thing that a function uses from the package, and that is not given to students."
    seen = set() if seen is None else seen
    f = _plain(f)
    if f is score or id(f) in seen: return None
    seen.add(id(f))
    if _is_foreign(f): return f.__name__
    if not isinstance(f, FunctionType): return None
    for name, thing in _things_used(f):
        if _is_foreign(thing): return name
        inner = _plain(thing)
        own = isinstance(inner, FunctionType) and inner.__globals__ is f.__globals__
        found = foreign_name(inner, seen) if own else None
        if found: return found


# %% [markdown]
# Four functions. Three of them hide the package's own: one behind another name, one behind a helper, one behind an import. The fourth is honest.

# %%
from sdpo_nb.loss import dpo_loss as theirs

def renamed(*args): return theirs(*args)
def helper(*args): return sdpo_nb.loss.dpo_loss(*args)
def behind(*args): return helper(*args)
def late(*args):
    from sdpo_nb.loss import dpo_loss
    return dpo_loss(*args)

found = {f.__name__: foreign_name(f) for f in (renamed, behind, late, handed_in)}
assert found["handed_in"] is None
assert all(found[name] for name in ("renamed", "behind", "late"))
found


# %% [markdown]
# This keeps honest people honest. Somebody who copies the text of the package into the cell passes. The point of a check is to teach.
#
# ## Does it return anything, and what?
#
# An assignment is handed out with `...` where the answer belongs. Such a function returns nothing. And a function that returns the mean of a batch, where one number per pair is wanted, needs another sentence than a
# function that computes a wrong number. So every exercise has a *form*: a function that turns an answer into numbers that can be compared, or says why that cannot be done.

# %%
#| export
class WrongForm(ValueError):
    "An answer of another kind than was asked for."
    def __init__(
        self,
        message: str,  # what is wrong with it
        about: str="", # the part that it is about, where an answer has parts
    ):
        super().__init__(message)
        self.about = about

def per_pair(
    answer,           # what the student's function returned
    inputs: tuple,    # what it was called with; the first has a row per pair
    each: str="pair", # what a number belongs to, for the message
) -> Tensor:          # (n,) float64, detached
    "The form of one number per pair. Raises WrongForm, saying what is wrong with it."
    n = len(inputs[0])
    if not isinstance(answer, Tensor): raise WrongForm(f"it returns {_kind(answer)}, not a tensor")
    shape = tuple(answer.shape)
    if shape == ():
        raise WrongForm(f"one number for all {each}s; return one per {each}, the mean is taken later")
    if shape == (n, n) and n > 1:
        raise WrongForm(f"shape {shape}: unequal shapes broadcast to every {each} against every other")
    if shape != (n,): raise WrongForm(f"it returns shape {shape} for {n} {each}s, not ({n},)")
    return answer.detach().double()

def _kind(thing) -> str: return f"a {type(thing).__name__}"


# %%
three = (torch.zeros(3),)
for strange in (0.5, torch.tensor(0.5), torch.zeros(3, 3), torch.zeros(3, 1)):
    try: per_pair(strange, three)
    except WrongForm as e: print(e)


# %% [markdown]
# Other exercises ask for a number, a whole number, or lists of row numbers:

# %%
#| export
def one_number(
    answer,        # what the student's function returned
    inputs: tuple, # what it was called with
) -> float:
    "The form of a single number. Raises WrongForm, saying what is wrong with it."
    if isinstance(answer, Tensor) and answer.numel() != 1:
        raise WrongForm(f"it returns shape {tuple(answer.shape)}, not one number")
    if isinstance(answer, Tensor): answer = answer.detach()
    try: return float(answer)
    except (TypeError, ValueError): raise WrongForm(f"it returns {_kind(answer)}, not a number") from None

def whole_number(
    answer,        # what the student's function returned
    inputs: tuple, # what it was called with
) -> int:
    "The form of a count. Raises WrongForm, saying what is wrong with it."
    try: return operator.index(answer)
    except TypeError: raise WrongForm(f"it returns {_kind(answer)}, not a whole number") from None

def lists_of_rows(
    answer,        # what the student's function returned
    inputs: tuple, # what it was called with
) -> list:
    "The form of a partition. Raises WrongForm, saying what is wrong with it."
    try: return [[operator.index(row) for row in chunk] for chunk in answer]
    except TypeError: raise WrongForm(f"it returns {_kind(answer)}, not lists of row numbers") from None

def as_it_is(
    answer,        # what was seen
    inputs: tuple, # what the function was called with
):
    "No form at all."
    return answer


# %%
assert one_number(torch.tensor(2.5), ()) == 2.5
assert lists_of_rows((range(2), torch.tensor([5, 4])), ()) == [[0, 1], [5, 4]]
whole_number(torch.tensor(3), ())


# %% [markdown]
# When are two answers the same? A student may compute in fp32, where the check has fp64. So four digits decide. The mistakes of this chapter are all farther apart than that.

# %%
#| export
def alike(
    a, # an answer in its form: tensor, number, list or dict
    b, # another
) -> bool:
    "Whether two answers agree to 1e-4. NaN agrees with NaN."
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape: return False
        return torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-4, equal_nan=True)
    if isinstance(a, float) and isinstance(b, float): return alike(torch.tensor(a), torch.tensor(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b


# %%
assert alike([torch.tensor([1., math.nan])], [torch.tensor([1.00001, math.nan])])
assert not alike(torch.zeros(3), torch.zeros(3, 1))
alike(1.0, 1.01)


# %% [markdown]
# ## An exercise
#
# Everything that a check needs to know stands in one place: the crooked function, the numbers to call it with, the sentence for each mistake, and the section of the book that explains it. A new exercise is a new `Exercise`, and nothing else.

# %%
#| export
def call(
    f,             # the student's function, or the crooked one
    inputs: tuple, # are copied first, so that no function can change them
):
    "What a function returns."
    return f(*copy.deepcopy(inputs))

@dataclass
class Exercise:
    "What students write, and how it goes wrong."
    name: str               # of the function
    crooked: Callable       # (*inputs, wrong) -> the answer of somebody who makes these mistakes
    says: dict              # mistake -> what was done, and why that is wrong
    read: tuple             # chapter and heading
    draw: Callable=None     # (generator, n, beta) -> inputs; None: only `edges` are looked at
    form: Callable=per_pair # (answer, inputs) -> the answer, comparable; WrongForm where it has another form
    observe: Callable=call  # (f, inputs) -> what is compared
    edges: dict=field(default_factory=dict)     # mistake -> (f, generator) -> whether f makes it
    elsewhere: dict=field(default_factory=dict) # mistake -> chapter and heading, if it is explained elsewhere
    tries: int=6            # batches
    telling: tuple=()       # edges that are looked at, too, when nobody knows the numbers
    parts: tuple=()         # of an answer that has parts; what is wrong with a part begins with its name
    by_hand: str=""         # an example with a result, to try
    each: str="pair"        # what a number of the answer belongs to
    # what is said where nothing came back
    idle: str="returns None: either the `return` is missing, or the `...` is still there"

    @property
    def mistakes(self) -> list:
        "Those that show in the numbers."
        return [mistake for mistake in self.says if mistake not in self.edges]


# %% [markdown]
# The loss is our example. It takes the four log-probabilities, as a student of [chapter 03](03_loss.ipynb) would write it.

# %%
#| export
def _dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, wrong=()):
    gamma, gamma_ref = chosen - rejected, ref_chosen - ref_rejected
    if "swapped" in wrong: gamma, gamma_ref = -gamma, -gamma_ref
    if "no_ref" in wrong: gamma_ref = 0 * gamma_ref
    if "plus_ref" in wrong: gamma_ref = -gamma_ref
    if "detached" in wrong: gamma = gamma.detach()

    inside, before = beta, 1.
    if "no_beta" in wrong: inside = 1.
    if "half_beta" in wrong: inside = beta / 2
    if "inverse" in wrong: inside = 1 / beta
    if "outside" in wrong: inside, before = 1., beta
    gain = gamma - gamma_ref
    if "rejected_added" in wrong: gain = (chosen - ref_chosen) - (ref_rejected - rejected)
    z = inside * gain
    if "one_beta" in wrong: z = inside * gamma - gamma_ref

    loss = F.softplus(-z)
    if "clamped" in wrong: loss = -torch.sigmoid(z).clamp(1e-8).log()
    if "unstable" in wrong: loss = -torch.sigmoid(z).log()
    if "no_log" in wrong: loss = -torch.sigmoid(z)
    if "no_minus" in wrong: loss = -loss
    return before * loss

def _draw_logps(g, n, beta):
    "Log-probabilities of n pairs under two models."
    four = -40 + 10 * torch.randn(4, n, dtype=torch.float64, generator=g)
    return *four, beta


# %%
inputs = _draw_logps(torch.Generator().manual_seed(0), 3, 0.1)
assert alike(_dpo_loss(*inputs), theirs(inputs[0] - inputs[1], inputs[2] - inputs[3], 0.1))
_dpo_loss(*inputs), _dpo_loss(*inputs, wrong=["swapped"])


# %% [markdown]
# Three mistakes do not show in ordinary numbers, or not always. `log(sigmoid(z))` is right until $z$ is below about $-700$ (fp64), where the sigmoid becomes zero and its logarithm minus infinity. Who mends this with `.clamp(1e-8)` has a loss that stops growing at 18, and a pair beyond it no longer
# pulls. And a `.detach()` in the wrong place leaves the value right and kills the gradient. For these an exercise has *edges*: functions that try the extreme case.

# %%
#| export
def _dies_far_away(f, g):
    "A policy that is 9000 nats behind its reference."
    near, far = torch.zeros(2).double(), torch.tensor([-9000., 9000.]).double()
    return not f(far, near, near, near, 0.1).isfinite().all()

def _stops_growing(f, g):
    "Policies that are 50, 6000 and 9000 nats behind their reference."
    zero = torch.zeros(1).double()
    def loss_at(gain): return f(zero + gain, zero, zero, zero, 0.1).item()
    near, far, farther = map(loss_at, (-50, -6000, -9000))
    return near < far == farther < math.inf

def _has_no_gradient(f, g):
    *logps, beta = _draw_logps(g, 3, 0.1)
    for logp in logps[:2]: logp.requires_grad_()
    return not f(*logps, beta).requires_grad

DPO_LOSS = Exercise(
    name="dpo_loss",
    crooked=_dpo_loss,
    draw=_draw_logps,
    read=("03", "The loss"),
    says=dict(
        no_beta="beta is missing, so a nat counts as one whatever beta is.",
        outside="beta stands outside the logarithm; it must scale the gain inside.",
        half_beta="half of beta is used.",
        inverse="the gain is divided by beta; it must be multiplied.",
        swapped="chosen and rejected are swapped, so it trains the wrong answers.",
        no_ref="the reference is not used.",
        plus_ref="the log-ratio of the reference is added; it must be subtracted.",
        no_minus="the minus is missing, so training would make it worse.",
        no_log="the logarithm is missing: the loss is -log(sigmoid(z)).",
        one_beta="only the policy is multiplied by beta; put brackets around the gain.",
        rejected_added="the rejected answer counts with the wrong sign; write (c - rc) - (r - rr).",
        clamped="it stops growing at some gain: it is clamped. Use F.logsigmoid(z).",
        unstable="it is infinite at a gain of -9000 nats; F.logsigmoid(z) is not.",
        detached="no gradient reaches the policy: something is detached.",
    ),
    edges=dict(unstable=_dies_far_away, clamped=_stops_growing, detached=_has_no_gradient),
    telling=("clamped",),
    by_hand="gain 0.6, beta 0.5 give 0.554",
    elsewhere=dict(
        rejected_added=("03", "The same loss in sDPO's words"),
        no_ref=("03", "The same loss in sDPO's words"),
        plus_ref=("03", "The same loss in sDPO's words"),
        detached=("03", "Its gradient"),
    ),
)

# %%
DPO_LOSS.mistakes

# %% [markdown]
# ## Numbers that can tell
#
# A check is only as good as its inputs: [chapter 03](03_loss.ipynb) shows how five wrong losses pass a test with a policy that is its own reference. So there are six batches. One has a single pair, where a sum is a mean. No $\beta$ is 1. The
# batches come from a seed, and the seed is fresh at every call. So nobody can write the expected numbers into the function; and whoever wants the same batches again passes the printed seed.

# %%
#| export
SIZES = (3, 1, 2, 5, 4, 6)                # pairs of a batch; three first, which makes shapes plain
BETAS = (0.1, 0.5, 0.05, 2., 0.3, 0.2)

def draw_batches(
    exercise: Exercise, # whose inputs
    seed: int,          # of the numbers
) -> list:              # tuples of inputs
    "The inputs of a check."
    g = torch.Generator().manual_seed(seed)
    sizes = list(zip(SIZES, BETAS))[:exercise.tries]
    return [exercise.draw(g, n, beta) for n, beta in sizes]

def _answer(exercise, f, inputs):
    "What f does with these inputs, comparable."
    seen = exercise.observe(f, inputs)
    return exercise.form(seen, inputs)


# %%
batches = draw_batches(DPO_LOSS, seed=1)
pd.DataFrame([(len(b[0]), b[-1]) for b in batches], columns=["pairs", "beta"]).T


# %% [markdown]
# And now the search: no mistake, every single one, every two.

# %%
#| export
def _explains(exercise, wrong, batches, seen) -> bool:
    "Whether these mistakes give exactly these answers."
    f = partial(exercise.crooked, wrong=wrong)
    try: return all(alike(_answer(exercise, f, inputs), answer) for inputs, answer in zip(batches, seen))
    except Exception: return False        # two mistakes together may stop where the student's code did not

def find_mistakes(
    exercise: Exercise, # that the answers belong to
    batches: list,      # of `draw_batches`
    seen: list,         # an answer for each, comparable
    most: int=2,        # mistakes at once
) -> tuple|None:        # their names; () if all is right; None if nobody knows
    "The fewest mistakes that give exactly these answers."
    for count in range(most + 1):
        for wrong in itertools.combinations(exercise.mistakes, count):
            if _explains(exercise, wrong, batches, seen): return wrong
    return None


# %% [markdown]
# Three students. One is right. One multiplies at the end and has the sign of the reference wrong, too. One has an idea of his own: a loss that is twice as large.

# %%
def right(c, r, rc, rr, beta): return -F.logsigmoid(beta * (c - r - rc + rr))
def two_at_once(c, r, rc, rr, beta): return -beta * F.logsigmoid(c - r + rc - rr)
def twice(c, r, rc, rr, beta): return 2 * right(c, r, rc, rr, beta)

diagnoses = {}
for f in (right, two_at_once, twice):
    diagnoses[f.__name__] = find_mistakes(DPO_LOSS, batches, [f(*b) for b in batches])
assert diagnoses == dict(right=(), two_at_once=("outside", "plus_ref"), twice=None)
diagnoses


# %% [markdown]
# ## The check
#
# All together, in the order in which a student should hear it. What comes earlier would make nonsense of what comes later: there is no use in comparing the numbers of a function that stops with an error.
#
# 1. There is an answer, and it is a function.
# 2. It is the student's own.
# 3. It does not stop, returns something, and that has the right form.
# 4. The numbers.
# 5. The edges.

# %%
#| export
def is_empty(
    answer, # what should be an answer
) -> bool:
    "Whether it is what an assignment was handed out with."
    return answer is None or answer is ...

_IDLE_STEPS = {"RESUME", "NOP", "POP_TOP", "LOAD_CONST", "RETURN_CONST", "RETURN_VALUE"}

def is_stub(
    f, # a student's function
) -> bool:
    "Whether its body is still `...`: it returns at once, without looking at anything."
    code = getattr(_plain(f), "__code__", None)
    return code is not None and {step.opname for step in dis.get_instructions(code)} <= _IDLE_STEPS

def _read(place) -> str: return f'Read chapter {place[0]}, "{place[1]}".'

def _with_example(exercise, text) -> str:
    "A message, and the example worked by hand where there is room for it."
    longer = f"{text}. Try: {exercise.by_hand}."
    return longer if exercise.by_hand and len(longer) <= LIMIT else text

def _shapes(inputs) -> str:
    "What a function was called with, in a few words."
    def word(x):
        if isinstance(x, Tensor): return str(tuple(x.shape))
        return f"{x:.4g}" if isinstance(x, float) else type(x).__name__
    return ", ".join(map(word, inputs))

def _failed(exercise, kind, text, about="") -> CheckFailed:
    "The exception for an answer without numbers to compare."
    place = exercise.elsewhere.get(about, exercise.read)
    return CheckFailed(f"{exercise.name}{text}. {_read(place)}", [kind])

def _empty(exercise, f=None):
    "The exception where nothing came back: not begun, or begun and not returned."
    begun = f is not None and not is_stub(f)
    what = exercise.idle if begun else "returns nothing yet: replace the `...` by your code"
    return _failed(exercise, "empty", f" {what}")

def _stopped(exercise, inputs, e):
    "The exception for a function that stops with an error."
    what = f"{type(e).__name__}: {e}".splitlines()[0][:90].removesuffix(": ")
    if "bitwise_xor" in what or "for ^" in what: what += " (in Python, a power is `**`)"
    called = f"It was called with {_shapes(inputs)}"[:80]
    return _failed(exercise, "stopped", f" stops with {what}. {called}")

def _run(exercise, f, inputs):
    "The answer of a student's function to one batch. Raises CheckFailed where there is none."
    try:
        seen = exercise.observe(f, inputs)
        if seen is ...: raise _empty(exercise)
        if seen is None: raise _empty(exercise, f)
        return exercise.form(seen, inputs)
    except CheckFailed: raise
    except WrongForm as e: raise _failed(exercise, "form", f": {e}", e.about) from None
    except (Exception, SystemExit) as e: raise _stopped(exercise, inputs, e) from None


# %% [markdown]
# A function that adds up words, one that takes a power as in a formula, one that is still empty, and one that computes everything and forgets the `return`:

# %%
def words(c, r, rc, rr, beta): return c + "beta"
def power(c, r, rc, rr, beta): return c^2
def stub(c, r, rc, rr, beta): ...
def kept_for_itself(c, r, rc, rr, beta): loss = crooked(c - r, rc - rr, beta)

for f in (words, power, stub, kept_for_itself):
    try: _run(DPO_LOSS, f, batches[0])
    except CheckFailed as e: print(e)


# %% [markdown]
# The sentences of a diagnosis. Where nobody knows the mistake, the first difference must do.

# %%
#| export
def _first_difference(exercise, batches, seen) -> str:
    "Where an answer first differs from the right one."
    for inputs, got in zip(batches, seen):
        want = _answer(exercise, exercise.crooked, inputs)
        if alike(got, want): continue
        if isinstance(got, Tensor) and isinstance(want, Tensor) and got.shape == want.shape and got.dim():
            far = ~torch.isclose(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)
            i = int(far.nonzero()[0, 0])
            return f"{exercise.each} {i} of {len(want)}: {got[i].item():.5g}, right is {want[i].item():.5g}"
        return f"{_short(got)}, right is {_short(want)}"

def _short(thing) -> str: return (f"{thing:.5g}" if isinstance(thing, float) else str(thing))[:50]

def _diagnosis(exercise, mistakes, seed, exactly=True, also=()) -> CheckFailed:
    "The exception for known mistakes; `also` are other parts that are wrong."
    what = " Also: ".join(exercise.says[mistake] for mistake in mistakes)
    place = exercise.elsewhere.get(mistakes[0], exercise.read)
    these = "these mistakes" if len(mistakes) > 1 else "this mistake"
    sure = f"Your numbers are exactly those of {these}; " if exactly else ""
    more = f" Wrong, too: {', '.join(also)}." if also else ""
    text = f"{exercise.name}: {what}{more} {_read(place)} {sure}seed={seed}"
    return CheckFailed(_with_example(exercise, text) if exactly else text, mistakes)

def _unknown(exercise, batches, seen, seed) -> CheckFailed:
    where = _first_difference(exercise, batches, seen)
    text = f"{exercise.name} is not right, and not in a way that this check knows. First difference: {where}."
    return CheckFailed(_with_example(exercise, f"{text} {_read(exercise.read)} seed={seed}"), ["unknown"])


# %%
print(_diagnosis(DPO_LOSS, diagnoses["two_at_once"], seed=1))
print(_unknown(DPO_LOSS, batches, [twice(*b) for b in batches], seed=1))


# %%
#| export
def _is_at_edge(test, f, seed) -> bool:
    "Whether f makes a mistake in an extreme case; stopping there counts."
    g = torch.Generator().manual_seed(seed)
    try: return bool(test(f, g))
    except Exception: return True

@contextlib.contextmanager
def _one_thread():
    "Numbers as small as these gain nothing from threads, which wait for each other where a machine is busy."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try: yield
    finally: torch.set_num_threads(before)

@_one_thread()
def diagnose(
    exercise: Exercise, # what f should do
    f,                  # a function, whoever wrote it
    seed: int,          # of the numbers
):
    "Look at a function without asking whose it is. Raises CheckFailed where it is not right."
    if exercise.draw is None: _run(exercise, f, ())
    else:
        batches = draw_batches(exercise, seed)
        seen = [_run(exercise, f, inputs) for inputs in batches]
        wrong = find_mistakes(exercise, batches, seen)
        if wrong: raise _diagnosis(exercise, wrong, seed)
        if wrong is None:
            for mistake in exercise.telling:
                makes_it = _is_at_edge(exercise.edges[mistake], f, seed)
                if makes_it: raise _diagnosis(exercise, [mistake], seed, exactly=False)
            raise _unknown(exercise, batches, seen, seed)
    made = [mistake for mistake, test in exercise.edges.items() if _is_at_edge(test, f, seed)]
    if not made: return
    also = [part for part in exercise.parts if part in made and not made[0].startswith(part)]
    raise _diagnosis(exercise, made[:1], seed, exactly=False, also=also)


# %% [markdown]
# `run_check` puts the first two questions in front of it. Every exercise is kept in `EXERCISES`, under its name.

# %%
#| export
EXERCISES = {DPO_LOSS.name: DPO_LOSS}

def run_check(
    name: str,  # of the exercise
    f,          # the answer
    seed: int,  # of the numbers; None: fresh ones
) -> int:       # the seed
    "Check an answer, print that it passed, or raise CheckFailed."
    exercise = EXERCISES[name]
    if is_empty(f): raise _empty(exercise)
    foreign = foreign_name(f)
    if not callable(f):
        if exercise.draw: raise _failed(exercise, "form", f": {_kind(f)}, not a function")
        f = partial(copy.deepcopy, f)                    # numbers or a table, not a function that makes them
    if foreign: raise _failed(exercise, "own_work", f": {foreign} is the package's own; write it yourself")
    if seed is None: seed = random.SystemRandom().randrange(1_000_000)
    diagnose(exercise, f, seed)
    print(f"check_{name}: passed (seed {seed})")
    return seed

def check_dpo_loss(
    f,              # (chosen, rejected, ref_chosen, ref_rejected, beta) -> (n,) loss of each pair
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check a DPO loss of four log-probabilities a pair, (n,) each, in nats."
    return run_check("dpo_loss", f, seed)


# %% [markdown]
# Now we are students. Nine answers, and what is said to each. (`said` is for this chapter: it returns the message. In an assignment, the message stands under the cell.)

# %%
def said(check, f, seed=1):
    try: check(f, seed=seed)
    except CheckFailed as e: return str(e)
    return "passed"

def log_of_sigmoid(c, r, rc, rr, beta): return -torch.sigmoid(beta * (c - r - rc + rr)).log()
def clamped(c, r, rc, rr, beta): return -torch.sigmoid(beta * (c - r - rc + rr)).clamp(1e-6).log()
def mean(*args): return right(*args).mean()
def broadcast(c, r, rc, rr, beta): return right(c[:, None], r[:, None], rc, rr, beta)
def their_own(c, r, rc, rr, beta): return theirs(c - r, rc - rr, beta)

with contextlib.redirect_stdout(io.StringIO()):
    heard = {f.__name__: said(check_dpo_loss, f)
             for f in (right, two_at_once, log_of_sigmoid, clamped, mean, broadcast, twice, their_own, stub)}
for name, message in heard.items(): print(f"{name:14} {message}\n")


# %% [markdown]
# The other sixteen exercises are data of the same kind. Each section below has a crooked function, the sentences, a check, and a wrong answer to try it on. You may read those that you are curious about, and skip to
# "The catalogue".
#
# ## A loss from four numbers
#
# ### The log-probability of a response
#
# The first exercise of the first assignment is the one with most ways to get it wrong. The answer has four steps: shift, gather, mask, sum ([chapter 02](02_logprobs.ipynb)). In `late` the shift goes in the wrong direction, and in `late_cut` also, but the mask is cut the right way; in `mask_unshifted` logits and
# ids are shifted and the mask is not.

# %%
#| export
def _sequence_logps(logits, ids, mask, wrong=()):
    if "all_tokens" in wrong: mask = torch.ones_like(mask)
    if "no_eos" in wrong: mask = mask & mask.roll(-1, 1)
    if "detached" in wrong: logits = logits.detach()
    if logits.dtype == torch.bfloat16 and "half" not in wrong: logits = logits.float()

    dim = 1 if "vocab_dim" in wrong else -1
    scores = logits.log_softmax(dim)
    if "unstable" in wrong: scores = logits.softmax(dim).log()
    if "probs" in wrong: scores = logits.softmax(dim)
    if "raw" in wrong: scores = logits

    before, after = slice(None, -1), slice(1, None)
    scores_at, ids_at, mask_at = before, after, after
    if "mask_unshifted" in wrong: mask_at = before
    if "late" in wrong: scores_at, ids_at, mask_at = after, before, before
    if "late_cut" in wrong: scores_at, ids_at, mask_at = after, before, after
    if "no_shift" in wrong: scores_at = ids_at = mask_at = slice(None)
    scores, ids, mask = scores[:, scores_at], ids[:, ids_at], mask[:, mask_at]

    picked = scores.gather(-1, ids[..., None]).squeeze(-1)
    total = (picked * mask).sum(1)
    if "negative" in wrong: total = -total
    return total / mask.sum(1) if "mean" in wrong else total

def _draw_rows(g, n, beta, shortest=2, longest=6):
    "Logits, ids and response mask of n padded rows of unequal lengths. No response has a single token."
    prompt = torch.randint(1, 5, (n, 1), generator=g)
    response = torch.randint(shortest, longest, (n, 1), generator=g)
    at = torch.arange(int((prompt + response).max()) + n % 2)
    mask = (at >= prompt) & (at < prompt + response)
    logits = 3 * torch.randn(*mask.shape, 7, dtype=torch.float64, generator=g)
    ids = torch.randint(7, mask.shape, generator=g)
    return logits, ids, mask


# %%
logits, ids, mask = _draw_rows(torch.Generator().manual_seed(0), 3, 0.1)
mask.int()


# %% [markdown]
# The edges: 40 tokens in bf16, which must be added up in fp32; a gradient; and a logit so low that its probability is zero.

# %%
#| export
def _sums_in_half(f, g):
    logits, ids, mask = _draw_rows(g, 3, 0.1, 40, 41)
    logits = logits.bfloat16()
    right = _sequence_logps(logits.double(), ids, mask)
    return not torch.allclose(f(logits, ids, mask).double(), right, atol=1e-2)

def _logps_have_no_gradient(f, g):
    logits, ids, mask = _draw_rows(g, 3, 0.1)
    return not f(logits.requires_grad_(), ids, mask).requires_grad

def _logps_die_far_away(f, g):
    logits, ids, mask = _draw_rows(g, 3, 0.1)
    return not f(1000 * logits, ids, mask).isfinite().all()

EXERCISES["sequence_logps"] = Exercise(
    name="sequence_logps",
    crooked=_sequence_logps,
    draw=_draw_rows,
    form=partial(per_pair, each="row"),
    each="row",
    read=("02", "One response, by hand"),
    says=dict(
        no_shift="the shift is missing: logits at position i speak about token i+1.",
        late="the shift goes the wrong way: token i+1 is scored by logits i.",
        late_cut="the shift of logits and ids goes the wrong way; that of the mask is right.",
        negative="it has the wrong sign: cross_entropy is minus the log-probability.",
        mask_unshifted="logits and ids are shifted, the mask is not; it belongs to the ids.",
        mean="it is the mean over tokens; the log-probability is the sum.",
        all_tokens="prompt and padding are counted, too; the mask says which count.",
        no_eos="the last response token is left out; to stop is an answer, too.",
        probs="probabilities are added; add their logarithms.",
        raw="raw logits are added; take log_softmax first.",
        vocab_dim="the softmax runs over positions; it must run over the vocabulary.",
        half="with bf16 logits it loses digits: compute in fp32.",
        detached="no gradient reaches the logits: something is detached.",
        unstable="log(softmax) is -inf for unlikely tokens; log_softmax is not.",
    ),
    edges=dict(half=_sums_in_half, detached=_logps_have_no_gradient, unstable=_logps_die_far_away),
    elsewhere=dict(
        mean=("02", "Sum or mean?"),
        half=("02", "Why is the sum made in fp32?"),
        all_tokens=("02", "A batch"),
        no_eos=("02", "A batch"),
        mask_unshifted=("02", "A batch"),
    ),
)

def check_sequence_logps(
    f,              # (logits (n, L, V), ids (n, L), mask (n, L)) -> (n,) log-probability of each response
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check the log-probability of responses. The mask is true at the response tokens themselves."
    return run_check("sequence_logps", f, seed)


# %% [markdown]
# A right answer of another kind, with a loop, and a wrong one that forgets the shift:

# %%
def with_a_loop(logits, ids, mask):
    sums = []
    for row, tokens, counted in zip(logits, ids, mask):
        at = counted.nonzero()[:, 0]
        sums.append(-F.cross_entropy(row[at - 1].float(), tokens[at], reduction="sum"))
    return torch.stack(sums)

def unshifted(logits, ids, mask):
    each = -F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    return (each * mask).sum(1)

check_sequence_logps(with_a_loop, seed=1)
said(check_sequence_logps, unshifted)


# %% [markdown]
# ### Its slope, and another loss
#
# The derivative of the loss of a pair in $\gamma_\theta$ is $-\beta\,\sigma(-\beta\Delta)$, equation (7) of [chapter 03](03_loss.ipynb). It has to be written as a formula: called where nothing can be differentiated, a solution with autograd stops.
#
# IPO (arXiv 2310.12036) has the loss $(\Delta - \frac{1}{2\beta})^2$. It is not in the package, so nobody can look it up there.

# %%
#| export
def _gradient(gamma_theta, gamma_ref, beta, wrong=()):
    gain = gamma_theta if "no_ref" in wrong else gamma_theta - gamma_ref
    z = gain if "no_beta_inside" in wrong else beta * gain
    weight = torch.sigmoid(z if "other_side" in wrong else -z)
    if "no_log" in wrong: weight = torch.sigmoid(z) * torch.sigmoid(-z)
    slope = -weight if "no_beta" in wrong else -beta * weight
    if "no_minus" in wrong: slope = -slope
    if "mean" in wrong: slope = slope / len(z)
    if "autograd" in wrong and torch.is_inference_mode_enabled(): raise RuntimeError("no gradients here")
    return slope

def _ipo(gamma_theta, gamma_ref, beta, wrong=()):
    gain = gamma_theta if "no_ref" in wrong else gamma_theta - gamma_ref
    if "dpo" in wrong: return F.softplus(-beta * gain)
    goal = 1 / (2 * beta)
    if "no_half" in wrong: goal = 1 / beta
    if "no_brackets" in wrong: goal = 1 / 2 * beta
    if "times_beta" in wrong: gain, goal = beta * gain, 0.5
    if "plus" in wrong: goal = -goal
    off = gain - goal
    if "hinge" in wrong: off = off.clamp(max=0)
    return off.abs() if "abs" in wrong else off ** 2

def _draw_gammas(g, n, beta):
    return *(5 * torch.randn(2, n, dtype=torch.float64, generator=g)), beta

def _needs_autograd(f, g):
    with torch.inference_mode(): f(*_draw_gammas(g, 3, 0.1))
    return False                                         # to stop counts


# %%
gamma_theta, gamma_ref, beta = _draw_gammas(torch.Generator().manual_seed(0), 3, 0.1)
gamma_theta.requires_grad_()
loss = F.softplus(-beta * (gamma_theta - gamma_ref)).sum()
(slope,) = torch.autograd.grad(loss, gamma_theta)
assert alike(slope, _gradient(gamma_theta, gamma_ref, beta).detach())
slope

# %%
#| export
EXERCISES["gradient"] = Exercise(
    name="gradient",
    crooked=_gradient,
    draw=_draw_gammas,
    read=("03", "Its gradient"),
    says=dict(
        no_beta="the beta in front is missing.",
        no_beta_inside="the beta inside the sigmoid is missing.",
        no_ref="the reference is not used.",
        no_log="this is the derivative of sigmoid(z); that of log(sigmoid(z)) is sigmoid(-z).",
        no_minus="the minus is missing: the loss falls as gamma rises.",
        other_side="it is sigmoid(+z); the weight is large where the pair is ranked wrong.",
        mean="it is divided by the number of pairs; one slope per pair is wanted.",
        autograd="it uses autograd; write the formula.",
    ),
    edges=dict(autograd=_needs_autograd),
    by_hand="gain 0.6, beta 0.5 give -0.213",
)
EXERCISES["ipo"] = Exercise(
    name="ipo",
    crooked=_ipo,
    draw=_draw_gammas,
    read=("03", "When there is no optimum"),
    by_hand="gain 0.6, beta 0.5 give 0.16",
    says=dict(
        no_brackets="`1/2*beta` is beta/2 in Python; write 1/(2*beta).",
        plus="1/(2 beta) is added to the gain; it must be subtracted.",
        hinge="a gain above 1/(2 beta) costs nothing here; IPO punishes it, too.",
        no_half="the gain should reach 1/(2 beta), not 1/beta.",
        times_beta="it is (beta gain - 1/2)^2; IPO compares the gain itself with 1/(2 beta).",
        no_ref="the reference is not used.",
        abs="it is the distance; IPO takes its square.",
        dpo="this is the loss of DPO.",
    ),
)

def check_gradient(
    f,              # (gamma_theta (n,), gamma_ref (n,), beta) -> (n,) slope of the loss of each pair
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check the derivative of the DPO loss of a pair in gamma_theta."
    return run_check("gradient", f, seed)

def check_ipo(
    f,              # (gamma_theta (n,), gamma_ref (n,), beta) -> (n,) (gain - 1 / (2 beta))^2
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check the loss of IPO."
    return run_check("ipo", f, seed)


# %%
def by_autograd(gamma_theta, gamma_ref, beta):
    gamma_theta = gamma_theta.clone().requires_grad_()
    loss = F.softplus(-beta * (gamma_theta - gamma_ref)).sum()
    return torch.autograd.grad(loss, gamma_theta)[0]

print(said(check_gradient, by_autograd))
print(said(check_gradient, lambda t, r, beta: -beta * torch.sigmoid(beta * (t - r))))
print(said(check_ipo, lambda t, r, beta: (beta * (t - r) - 0.5) ** 2))

# %% [markdown]
# ### Predictions
#
# Seven numbers that a student should know before any code runs. They are not functions, so there is nothing to draw. But a wrong number has its usual reasons, too: a logarithm of another base, the other side of a sigmoid, a $\beta$ in the wrong
# place. Every one of them is a number that we can list.

# %%
#| export
PREDICTIONS = dict(
    first_loss=math.log(2),              # of a policy that is its own reference
    loss=math.log1p(math.exp(-2)),       # at a gain of 20 nats, beta 0.1
    weight=1 / (1 + math.exp(2)),        # lambda there
    settles=math.log(9) / 0.5,           # gain at which smoothing 0.1 settles one pair, beta 0.5, nats
    nearer=4.,                           # which beta, 1 or 4, ends nearer to S
    farther_sgd=4.,                      # which has moved farther after 3 steps of plain descent
    farther_adam=0.,                     # the same with Adam; 0: neither
)
_ROUNDED = ("first_loss", "loss", "weight", "settles") # no whole numbers
_NEAR = dict(                            # mistake -> key, the wrong number, why it is wrong
    first_loss_base_10=("first_loss", math.log10(2), "this is log 2 to base 10; take the natural logarithm."),
    first_loss_bits=("first_loss", 1., "this is in bits; the book counts in nats."),
    first_loss_half=("first_loss", 0.5, "this is sigmoid(0); the loss is minus its logarithm."),
    first_loss_zero=("first_loss", 0., "the gain is 0; the loss is -log(sigmoid(0))."),
    loss_bits=("loss", math.log2(1 + math.exp(-2)), "this is in bits; the book counts in nats."),
    loss_sign=("loss", math.log1p(math.exp(2)), "this is the loss at a gain of -20."),
    loss_no_beta=("loss", math.log1p(math.exp(-20)), "beta is missing."),
    weight_other_side=("weight", 1 / (1 + math.exp(-2)), "this is sigmoid(+2); lambda is sigmoid(-2) here."),
    weight_slope=("weight", 0.1 / (1 + math.exp(2)), "this is beta times lambda, the slope of the loss."),
    settles_bits=("settles", math.log2(9) / 0.5, "this is in bits; the book counts in nats."),
    settles_base_10=("settles", math.log10(9) / 0.5, "this is to base 10; take the natural logarithm."),
    settles_no_beta=("settles", math.log(9), "beta is missing: beta times the gain is log 9."),
    settles_times_beta=("settles", math.log(9) * 0.5, "log 9 must be divided by beta."),
    settles_sign=("settles", -math.log(9) / 0.5, "the sign is wrong: smoothing stops a rise."),
    nearer_1=("nearer", 1., "at the optimum a larger beta stays nearer to S."),
    farther_sgd_1=("farther_sgd", 1., "the slope has a beta in front, so a larger beta starts faster."),
    farther_adam_4=("farther_adam", 4., "Adam divides the beta in front of the slope out again."),
    farther_adam_1=("farther_adam", 1., "Adam's first steps have the same length for every beta."),
)


# %% [markdown]
# An answer is right within one percent. So an exact reason needs a number of its own, farther away than that:

# %%
#| export
def _close(a, b) -> bool: return math.isclose(a, b, rel_tol=0.01, abs_tol=1e-6)

def _predictions(wrong=()):
    answers = dict(PREDICTIONS)
    for mistake in wrong:
        key = mistake.removesuffix("_digits")
        if mistake in _NEAR: answers[_NEAR[mistake][0]] = _NEAR[mistake][1]
        elif key in _ROUNDED and key != mistake: answers[key] = 1.03 * PREDICTIONS[key]
        else: answers[mistake] = -77.
    return answers

def _seven_numbers(answers, inputs) -> dict:
    "The form of predictions."
    if not isinstance(answers, dict): raise WrongForm(f"a dict is wanted, not {_kind(answers)}")
    absent = [key for key in PREDICTIONS if key not in answers]
    empty = [key for key in PREDICTIONS if key not in absent and is_empty(answers[key])]
    if absent: raise WrongForm(f"{_are(absent)} missing", absent[0])
    if empty: raise WrongForm(f"{_are(empty)} nothing yet: replace the `...` by a number", empty[0])
    return {key: _one_prediction(key, answers[key]) for key in PREDICTIONS}

def _are(keys) -> str: return f"{', '.join(keys)} {'are' if len(keys) > 1 else 'is'}"

def _one_prediction(key, value) -> float:
    "The number of a prediction. Raises WrongForm, with its key, where there is none."
    quotes = "; leave out the quotes" if isinstance(value, str) else ""
    try: return one_number(value, ())
    except WrongForm: raise WrongForm(f"{key} is {_kind(value)}, not a number{quotes}", key) from None

def _prediction_edges() -> dict:
    "A test for every near miss, then one for everything else."
    def near(key, value, f, g): return _close(one_number(f()[key], ()), value)
    def far(key, f, g): return not near(key, PREDICTIONS[key], f, g)
    def rough(key, f, g):
        off = one_number(f()[key], ()) / PREDICTIONS[key] - 1
        return far(key, f, g) and abs(off) <= 0.05
    tests = {mistake: partial(near, key, value) for mistake, (key, value, _) in _NEAR.items()}
    tests |= {f"{key}_digits": partial(rough, key) for key in _ROUNDED}
    return tests | {key: partial(far, key) for key in PREDICTIONS}

def _prediction_places() -> dict:
    "Where the book explains a prediction, by the beginning of its key."
    begins = dict(settles="Label smoothing", weight="Its gradient")
    begins["nearer"] = begins["farther"] = r"What $\beta$ does"
    found = {}
    for mistake in (*_NEAR, *(f"{key}_digits" for key in _ROUNDED), *PREDICTIONS):
        for begin, heading in begins.items():
            if mistake.startswith(begin): found[mistake] = "03", heading
    return found


# %%
values = {key: [v for k, v, _ in _NEAR.values() if k == key] for key in PREDICTIONS}
for key, near in values.items():
    for a, b in itertools.combinations([PREDICTIONS[key], *near], 2): assert not _close(a, b)
{key: round(value, 4) for key, value in PREDICTIONS.items()}

# %%
#| export
EXERCISES["predictions"] = Exercise(
    name="predictions",
    crooked=_predictions,
    form=_seven_numbers,
    read=("03", "The line, on one pair"),
    says={mistake: f"{key}: {why}" for mistake, (key, _, why) in _NEAR.items()}
    | {f"{key}_digits": f"{key} is near; one percent is allowed, so give three digits." for key in _ROUNDED}
    | {key: f"{key} is wrong, in a way that this check does not know." for key in PREDICTIONS},
    edges=_prediction_edges(),
    parts=tuple(PREDICTIONS),
    elsewhere=_prediction_places(),
)

def check_predictions(
    answers: dict,  # the keys of PREDICTIONS -> numbers; or a function that returns them
    seed: int=None, # is not used here
) -> int:           # the seed
    "Check seven predicted numbers, within one percent."
    return run_check("predictions", answers, seed)


# %%
guess = dict(
    first_loss=0.693,
    loss=0.127,
    weight=0.119,
    settles=6.34,
    nearer=4,
    farther_sgd=4,
    farther_adam=0,
)
print(said(check_predictions, guess))
print(said(check_predictions, guess | dict(settles=4.39, loss=0.13, nearer=1)))


# %% [markdown]
# ## Which data first
#
# The second assignment is about tokens and counting ([chapter 01](01_preferences.ipynb) and [chapter 05](05_partition.ipynb)). Whole numbers are compared like all others.
#
# ### Where the response begins
#
# Three lists of ids: the prompt alone, and the prompt together with each response. How many tokens do all three share?

# %%
#| export
def _common(*rows) -> int:
    "Length of the longest common prefix."
    n = 0
    while all(len(row) > n for row in rows) and len({row[n] for row in rows}) == 1: n += 1
    return n

def _boundary(prompt, chosen, rejected, wrong=()):
    n = _common(prompt, chosen, rejected)
    if "prompt_length" in wrong: n = len(prompt)
    if "chosen_only" in wrong: n = _common(prompt, chosen)
    if "responses_only" in wrong: n = _common(chosen, rejected)
    if "characters" in wrong: n = _common(*map(str, (prompt, chosen, rejected)))
    if "off_by_one" in wrong: return n - 1
    return n + 1 if "one_more" in wrong else n

def _draw_ids(g, n, beta):
    "A prompt whose last tokens merge with both responses, or with one of them. The merged token is 50."
    prompt = torch.randint(10, 50, (n + 4,), generator=g).tolist()
    k = int(torch.randint(1, len(prompt), (1,), generator=g))
    whole = len(prompt)
    kept = {2: (whole, k), 4: (k, whole), 1: (whole, whole)}.get(n, (k, k))
    chosen, rejected = ([*prompt[:end], 50, *range(side, side + n)] for end, side in zip(kept, (60, 70)))
    return prompt, chosen, rejected


# %%
_draw_ids(torch.Generator().manual_seed(1), 2, 0.1)

# %%
#| export
EXERCISES["boundary"] = Exercise(
    name="boundary",
    crooked=_boundary,
    draw=_draw_ids,
    form=whole_number,
    read=("01", "Where does the prompt end?"),
    by_hand="[5, 6, 7], [5, 6, 9, 2], [5, 6, 7, 4, 2] give 2",
    says=dict(
        prompt_length="it is the length of the prompt; its last tokens may merge with a response.",
        chosen_only="only the chosen row is compared; the boundary must serve both.",
        responses_only="the two rows are compared with each other, not with the prompt.",
        characters="characters are counted; count tokens.",
        off_by_one="it is one token too few.",
        one_more="it is one token too many.",
    ),
)

def check_boundary(
    f,              # (prompt, chosen, rejected) -> how many tokens all three lists of ids share
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check where the prompt ends in two rows, each tokenised together with it."
    return run_check("boundary", f, seed)


# %%
print(said(check_boundary, lambda prompt, chosen, rejected: len(prompt)))
print(said(check_boundary, lambda prompt, chosen, rejected: _common(prompt, chosen, rejected) - 1))


# %% [markdown]
# ### Right, wrong, tie
#
# The gammas of this exercise are whole numbers, so that there are ties.

# %%
#| export
def _accuracy(gamma, gamma_ref, wrong=()):
    if "no_ref" in wrong: gamma_ref = torch.zeros_like(gamma)
    gain = gamma - gamma_ref
    if "worse" in wrong: gain = -gain
    tie = dict(strict=0., weak=1.)
    half = next((value for mistake, value in tie.items() if mistake in wrong), 0.5)
    verdict = (gain > 0).double() + half * (gain == 0)
    if "soft" in wrong: verdict = torch.sigmoid(gain)
    return verdict if "nan" in wrong else verdict.where(~gain.isnan(), math.nan)

def _draw_whole_gammas(g, n, beta):
    return tuple(torch.randint(-2, 3, (2, 2 * n), generator=g).double())

def _judges_nan(f, g):
    verdict = f(torch.tensor([math.nan, 1.]), torch.tensor([0., 0.]))
    return not verdict.isnan().tolist() == [True, False]

def _by_prompt(right, prompt_id, wrong=()):
    groups = {}
    for value, prompt in zip(right.tolist(), prompt_id.tolist()): groups.setdefault(prompt, []).append(value)
    if "by_pair" in wrong: return right.mean().item()
    if "singles_dropped" in wrong: groups = {p: values for p, values in groups.items() if len(values) > 1}
    each = [sum(values) / len(values) for values in groups.values()]
    if "last_pair" in wrong: each = [values[-1] for values in groups.values()]
    if "any" in wrong: each = [max(values) for values in groups.values()]
    return sum(each) / len(each)

def _draw_prompts(g, n, beta):
    "Verdicts on pairs of four prompts: one has a single pair, one has at least two, the others what comes."
    more = torch.tensor([3, 5, 7])[torch.randint(3, (n + 3,), generator=g)]
    prompt = torch.cat([torch.tensor([11, 3, 3]), more])
    order = torch.randperm(len(prompt), generator=g)
    right = torch.randint(3, (len(prompt),), generator=g) / 2
    return right.double(), prompt[order]


# %%
_draw_prompts(torch.Generator().manual_seed(0), 1, 0.1)

# %%
#| export
EXERCISES["accuracy"] = Exercise(
    name="accuracy",
    crooked=_accuracy,
    draw=_draw_whole_gammas,
    read=("03", "The same loss in sDPO's words"),
    by_hand="(2.5, -1, 3), (1, 0.5, 3) give (1, 0, 0.5)",
    says=dict(
        strict="a tie counts as wrong; it counts one half.",
        weak="a tie counts as right; it counts one half.",
        no_ref="the reference is not used.",
        worse="right and wrong are exchanged.",
        soft="it is a sigmoid; a verdict is 0, 1/2 or 1.",
        nan="NaN gets a verdict; it must stay NaN, or a broken model looks like a bad one.",
    ),
    edges=dict(nan=_judges_nan),
)
EXERCISES["by_prompt"] = Exercise(
    name="by_prompt",
    crooked=_by_prompt,
    draw=_draw_prompts,
    form=one_number,
    read=("05", "How sure is a share?"),
    by_hand="[1, 1, 1, 0], [7, 7, 7, 3] give 0.5",
    says=dict(
        by_pair="it is the mean over pairs, so a prompt with many pairs counts more.",
        last_pair="only the last pair of each prompt is used.",
        singles_dropped="prompts with a single pair are left out.",
        any="a prompt counts as right if any of its pairs is; take their mean.",
    ),
)

def check_accuracy(
    f,              # (gamma (n,), gamma_ref (n,)) -> (n,) 1 right, 0 wrong, 0.5 tie, NaN stays NaN
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check the verdicts of the reward accuracy."
    return run_check("accuracy", f, seed)

def check_by_prompt(
    f,              # (right (n,), prompt_id (n,)) -> mean over prompts of the mean over their pairs
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check an accuracy in which every prompt counts the same."
    return run_check("by_prompt", f, seed)


# %%
print(said(check_accuracy, lambda gamma, gamma_ref: (gamma > gamma_ref).float()))
print(said(check_accuracy, lambda gamma, gamma_ref: (gamma > gamma_ref) + 0.5 * (gamma == gamma_ref)))
print(said(check_by_prompt, lambda right, prompt_id: right.mean()))


# %% [markdown]
# ### Chunks
#
# Sources with an accuracy and a number of pairs each go into $T$ chunks, easy sources first. Pairs are numbered source after source, in the order given. If $T$ is the number of sources, each source is a chunk; otherwise the ordered rows are cut into
# $T$ parts as equal as possible, the longer ones first. That is what `partition` of chapter 05 does.

# %%
#| export
def _partition(accuracy, sizes, T, wrong=()):
    places = range(len(sizes))
    ranks = sorted(places, key=lambda i: -accuracy[i])
    if "ties" in wrong: ranks = sorted(reversed(places), key=lambda i: -accuracy[i])
    if "ascending" in wrong: ranks = sorted(places, key=lambda i: accuracy[i])
    if "unsorted" in wrong: ranks = list(places)

    starts = [sum(sizes[:i]) for i in places]
    sources = [list(range(starts[i], starts[i] + sizes[i])) for i in ranks]
    rows = sum(sources, [])
    n, each = len(rows), len(rows) // T
    ends = list(itertools.accumulate(each + (k < n % T) for k in range(T)))
    if "lost" in wrong or "uneven" in wrong: ends = [each * k for k in range(1, T + 1)]
    if "uneven" in wrong: ends[-1] = n
    chunks = [rows[start:end] for start, end in zip([0, *ends], ends)]
    if "count" in wrong: chunks = [rows[start:start + each] for start in range(0, n, each)]
    if T == len(sizes) and "always_cut" not in wrong: chunks = sources

    if "twice" in wrong: chunks = _overlapping(chunks)
    if "order" in wrong: chunks = [sorted(chunk) for chunk in chunks]
    return chunks

def _overlapping(chunks):
    "Each chunk begins with the last row of the one before."
    before = [[], *(chunk[-1:] for chunk in chunks)]
    return [last + chunk for last, chunk in zip(before, chunks)]

def _draw_sources(g, n, beta):
    "Four sources, two of them equally easy; three times out of six as many chunks as sources."
    sizes = torch.randint(2, 6, (4,), generator=g)
    accuracy = 0.5 + torch.randperm(4, generator=g).double() / 8
    accuracy[int(torch.randint(1, 4, (1,), generator=g))] = accuracy[0]
    return accuracy.tolist(), sizes.tolist(), {1: 4, 2: 4, 4: 4, 3: 3, 5: 5, 6: 2}[n]


# %%
accuracy, sizes, T = _draw_sources(torch.Generator().manual_seed(0), 3, 0.1)
print(dict(accuracy=accuracy, sizes=sizes, T=T))
_partition(accuracy, sizes, T)

# %%
#| export
EXERCISES["partition"] = Exercise(
    name="partition",
    crooked=_partition,
    draw=_draw_sources,
    form=lists_of_rows,
    read=("05", "Chunks"),
    says=dict(
        lost="the rows that do not divide by T are lost.",
        twice="each chunk begins with the last row of the one before.",
        ascending="hard sources come first; a high accuracy is easy.",
        ties="equally easy sources change places; they keep the order given.",
        unsorted="the sources are not sorted.",
        order="the rows of a chunk are sorted by number, so easy is no longer first.",
        uneven="the last chunk takes all that is left; sizes differ by one at most.",
        count="chunks of n // T rows give more than T chunks.",
        always_cut="with as many chunks as sources, each source is a chunk.",
    ),
    elsewhere={mistake: ("05", "From numbers to an order") for mistake in ("ascending", "ties", "unsorted")},
)

def check_partition(
    f,              # (accuracy, sizes, T) -> T lists of row numbers
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check chunks, easy sources first. Row numbers count source after source, in the order given."
    return run_check("partition", f, seed)


# %%
def in_the_order_given(accuracy, sizes, T):
    rows = list(range(sum(sizes)))
    if T == len(sizes): return [rows[sum(sizes[:i]):sum(sizes[:i + 1])] for i in range(T)]
    return [chunk.tolist() for chunk in torch.tensor(rows).tensor_split(T)]

said(check_partition, in_the_order_given)


# %% [markdown]
# ## One stage, half the precision
#
# Now the exercises in which the *way* matters and not only the result: gradients that are added up, weights that move, a scaler that is called in the right order. What is compared then is no return value. `observe` runs the function among
# spies and reports what they saw. The crooked function goes through the same spies, and the search is the one that you know.
#
# ### Accumulation
#
# The function is given a model, pairs, a function that computes losses, and a size. It must add the gradient of the mean loss to what is in `.grad`, with at most `size` pairs in memory. The spy is `loss_of`: it sees how many pairs it is
# asked for, and whether the backward pass of the part before is done.

# %%
#| export
def _accumulation(model, pairs, loss_of, size, wrong=()):
    n = len(pairs)
    step = n if "too_many" in wrong else size
    parts = [pairs[i:i + step] for i in range(0, n, step)]
    if "lost" in wrong: parts = [part for part in parts if len(part) == step]
    if "clears" in wrong: model.zero_grad()
    kept = []
    for part in parts:
        losses = loss_of(model, part)
        share = losses.sum() / n
        if "mean_of_means" in wrong: share = losses.mean() / len(parts)
        if "sum_of_means" in wrong: share = losses.mean()
        if "sum" in wrong: share = losses.sum()
        if "last_only" in wrong: model.zero_grad()
        if "kept" in wrong: kept.append(share)
        else: share.backward()
    if kept: sum(kept).backward()

def _draw_parts(g, n, beta):
    "Weights, rows, size: two full parts and one of a single row."
    size = n % 3 + 2
    rows = torch.randn(2 * size + 1, 3, dtype=torch.float64, generator=g)
    return torch.randn(1, 3, dtype=torch.float64, generator=g), rows, size

def _watch_accumulation(f, inputs):
    "The gradient that f leaves, and how it went about it."
    start, rows, size = inputs
    model = torch.nn.Linear(3, 1, bias=False).double()
    model.weight.data = start.clone()
    model.weight.grad = torch.ones_like(start)
    asked, done, waiting = [], [], []

    def loss_of(model, part):
        waiting.append(len(asked) - len(done))
        asked.append(len(part))
        losses = F.softplus(-model(torch.stack(list(part)))[:, 0])
        losses.register_hook(lambda grad: done.append(1))
        return losses

    f(model, list(rows), loss_of, size)
    if not asked: return None
    grad = model.weight.grad
    return dict(
        grad=torch.zeros_like(start) if grad is None else grad,
        too_many=max(asked) > size,
        kept=max(waiting) > 0,
    )


# %%
inputs = _draw_parts(torch.Generator().manual_seed(0), 3, 0.1)
for wrong in ((), ("mean_of_means",), ("kept",)):
    print(wrong, _watch_accumulation(partial(_accumulation, wrong=wrong), inputs))

# %% [markdown]
# The mean of means gives another gradient. Keeping all parts gives the same gradient, and the spy has noticed.

# %%
#| export
EXERCISES["accumulation"] = Exercise(
    name="accumulation",
    crooked=_accumulation,
    draw=_draw_parts,
    form=as_it_is,
    observe=_watch_accumulation,
    tries=3,
    idle="does nothing: `loss_of` was never called",
    read=("06", "Accumulation: divide by pairs"),
    says=dict(
        mean_of_means="it is the mean of means; a pair of a short part counts more.",
        sum_of_means="the means of the parts are added; divide sums by all pairs.",
        sum="the losses are added; divide by the number of pairs.",
        last_only="gradients are cleared between parts, so only the last part counts.",
        lost="the last, short part is left out.",
        too_many="a part has more pairs than `size`.",
        kept="all parts are kept until one backward pass, so nothing is saved.",
        clears="it clears the gradient that was there; add to it.",
    ),
)

def check_accumulation(
    f,              # (model, pairs, loss_of, size): adds to .grad; loss_of(model, part) -> (m,) losses
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    """Check the gradient of the mean loss, in parts of at most `size` pairs.
    What the function returns does not matter."""
    return run_check("accumulation", f, seed)


# %%
def one_backward(model, pairs, loss_of, size):
    losses = [loss_of(model, pairs[i:i + size]) for i in range(0, len(pairs), size)]
    torch.cat(losses).mean().backward()

print(said(check_accumulation, one_backward))
print(said(check_accumulation, lambda model, pairs, loss_of, size: ...))


# %% [markdown]
# ### The reference table
#
# One pass, no gradient, no dropout, and everything left as it was found. The model of this exercise is a spy, too. It is a dropout layer, and its `score` gives other numbers where dropout is on.

# %%
#| export
def _reference_table(model, pairs, score, wrong=()):
    mode = model.training
    if "random_state" in wrong: torch.manual_seed(0)
    if "dropout" not in wrong: model.eval()
    with torch.set_grad_enabled("grad" in wrong): chosen, rejected = score(model, pairs)
    if "left_in_eval" not in wrong: model.train(mode)
    if "half" in wrong: chosen, rejected = chosen.bfloat16(), rejected.bfloat16()
    if "swapped" in wrong: chosen, rejected = rejected, chosen
    keys = range(len(pairs)) if "by_position" in wrong else [pair["key"] for pair in pairs]
    return {key: numbers for key, *numbers in zip(keys, chosen.tolist(), rejected.tolist())}

def _draw_keys(g, n, beta):
    "Keys with two log-probabilities each, and whether the model comes in train mode."
    numbers = -40 + 10 * torch.randn(n, 2, generator=g)
    names = torch.randint(10**6, (n,), generator=g).tolist()
    return {f"pair-{name}": row for name, row in zip(names, numbers.tolist())}, n != 2

def _watch_scoring(f, inputs):
    "The table that f makes, and what it did to the model and to the random numbers."
    numbers, training = inputs
    model = torch.nn.Dropout(0.5).train(training)
    seen = dict(training=False, grad=False)

    def score(model, pairs):
        seen["training"] |= model.training
        seen["grad"] |= torch.is_grad_enabled()
        rows = torch.tensor([numbers[pair["key"]] for pair in pairs])
        return tuple(rows.T)

    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        table = f(model, [dict(key=key) for key in numbers], score)
        same_luck = torch.equal(before, torch.get_rng_state())
    if is_empty(table): return None
    if not isinstance(table, dict): raise WrongForm(f"a dict is wanted, not {_kind(table)}")
    if seen["training"]: return "scored with dropout"
    return dict(
        table={key: [one_number(value, ()) for value in row] for key, row in table.items()},
        grad=seen["grad"],
        mode_kept=model.training == training,
        luck_kept=same_luck,
    )


# %%
inputs = _draw_keys(torch.Generator().manual_seed(0), 2, 0.1)
_watch_scoring(_reference_table, inputs)

# %%
#| export
EXERCISES["reference_table"] = Exercise(
    name="reference_table",
    crooked=_reference_table,
    draw=_draw_keys,
    form=as_it_is,
    observe=_watch_scoring,
    tries=3,
    read=("02", "The pass"),
    says=dict(
        dropout="the model is in train mode, so dropout changes its numbers.",
        left_in_eval="the model is left in another mode than it came in.",
        grad="gradients are recorded; nobody needs them here.",
        random_state="the global random state is changed; others draw from it.",
        by_position="rows are found by position; use the key of the pair.",
        half="the numbers are rounded to 16 bits; keep fp32.",
        swapped="chosen and rejected are swapped.",
    ),
    elsewhere=dict(
        dropout=("02", "Where does dropout hide?"),
        half=("02", "Why is the sum made in fp32?"),
        by_position=("02", "What is in the table?"),
    ),
)

def check_reference_table(
    f,              # (model, pairs, score) -> {key: (chosen, rejected)}
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check a table of reference log-probabilities, in nats; score(model, pairs) -> chosen, rejected."
    return run_check("reference_table", f, seed)


# %%
def careless(model, pairs, score):
    model.eval()
    chosen, rejected = score(model, pairs)
    return {pair["key"]: (c, r) for pair, c, r in zip(pairs, chosen, rejected)}

said(check_reference_table, careless)


# %% [markdown]
# ### A step in fp16
#
# Six calls in the right order: scale and go backwards, unscale, clip, step, update, clear. The scaler is a real `GradScaler`. Three losses tell the mistakes apart. The first has a gradient above the clip, the second one below, and the third overflows: then no weight may
# move, and the scale must be halved.

# %%
#| export
def _fp16_step(loss, parameters, optimizer, scaler, clip, wrong=()):
    (loss if "no_scale" in wrong else scaler.scale(loss)).backward()
    if "clip_scaled" not in wrong: scaler.unscale_(optimizer)
    if "no_clip" not in wrong: torch.nn.utils.clip_grad_norm_(parameters, clip)
    if "direct" in wrong: optimizer.step()
    else: scaler.step(optimizer)
    if "no_update" not in wrong: scaler.update()
    if "no_zero_grad" not in wrong: optimizer.zero_grad()

def _draw_slopes(g, n, beta):
    "Three gradients, and the clip between the norms of the first two."
    slope = torch.randn(3, generator=g)
    slope = slope / slope.norm()
    return 5 * slope, 0.3 * slope.flip(0), 1e38 * slope, 1.0

def _watch_step(f, inputs):
    "Where the weights are after each step, and what became of the scale."
    *slopes, clip = inputs
    weights = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weights], lr=0.1)
    places, scales = [], []
    for slope in slopes:
        scaler = torch.amp.GradScaler("cpu", init_scale=16.)
        scaler.scale(torch.zeros(1))                     # or unscale_ stops where no loss was scaled
        f((weights * slope).sum(), [weights], optimizer, scaler, clip)
        places.append(weights.detach().clone())
        scales.append(scaler.get_scale())
    untouched = not torch.stack(places).any() and weights.grad is None
    return None if untouched else dict(places=places, scales=scales)


# %%
inputs = _draw_slopes(torch.Generator().manual_seed(0), 3, 0.1)
for wrong in ((), ("direct",)):
    print(wrong, _watch_step(partial(_fp16_step, wrong=wrong), inputs))

# %% [markdown]
# `direct` calls the optimizer and not the scaler. Nothing is wrong with it until something overflows. Then the weights are NaN.

# %%
#| export
EXERCISES["fp16_step"] = Exercise(
    name="fp16_step",
    crooked=_fp16_step,
    draw=_draw_slopes,
    form=as_it_is,
    observe=_watch_step,
    tries=2,
    idle="does nothing: no weight moved, and there is no gradient",
    read=("06", "Half precision, full weights"),
    says=dict(
        no_scale="the loss is not scaled before the backward pass.",
        clip_scaled="it clips before unscaling, so the norm is that of the scaled gradient.",
        direct="optimizer.step() steps after an overflow, too: NaN. Use scaler.step.",
        no_update="scaler.update() is missing; the scale never falls.",
        no_clip="the gradient is not clipped.",
        no_zero_grad="the gradient is not cleared, so steps add up.",
    ),
    elsewhere=dict(
        clip_scaled=("06", "One step"),
        direct=("06", "One step"),
        no_clip=("06", "One step"),
        no_zero_grad=("06", "Six lines"),
    ),
)

def check_fp16_step(
    f,              # (loss, parameters, optimizer, scaler, clip): backward pass and step
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check one optimizer step with a GradScaler. What the function returns does not matter."
    return run_check("fp16_step", f, seed)


# %%
def forgets_to_unscale(loss, parameters, optimizer, scaler, clip):
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    torch.nn.utils.clip_grad_norm_(parameters, clip)
    scaler.step(optimizer)
    scaler.update()

said(check_fp16_step, forgets_to_unscale)


# %% [markdown]
# ### A stage
#
# The loop of [chapter 06](06_trainer.ipynb): a model, pairs of the tiny world, a table, AdamW without weight decay. It returns the loss of every step. The model is small, has random weights and comes in bf16, as many models do. The table is
# not its own, so the first loss is *not* $\ln 2$. Whoever takes the policy for its reference gets $\ln 2$ everywhere, and that shows.

# %%
#| export
def _train(model, pairs, table, beta, lr, batch, wrong=()):
    if "bf16_weights" not in wrong: model.float()
    if "eval_mode" not in wrong: model.train()
    method = torch.optim.SGD if "sgd" in wrong else partial(torch.optim.AdamW, weight_decay=0.)
    optimizer = method(model.parameters(), lr=lr)
    if "shuffled" in wrong: pairs = pairs[::-1]
    end = len(pairs) - len(pairs) % batch if "last_batch_lost" in wrong else len(pairs)
    losses = []
    for start in range(0, end, batch):
        part = pairs[start:start + batch]
        chosen, rejected = score(model, part)
        ref_chosen, ref_rejected = torch.tensor([table[pair["key"]] for pair in part]).T
        if "swapped_table" in wrong: ref_chosen, ref_rejected = ref_rejected, ref_chosen
        if "moving_reference" in wrong: ref_chosen, ref_rejected = chosen.detach(), rejected.detach()
        each = _dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
        loss = each.sum() if "summed" in wrong else each.mean()
        loss.backward()
        optimizer.step()
        if "no_zero_grad" not in wrong: optimizer.zero_grad()
        losses.append(loss.item())
    return losses

def _encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]

def _draw_stage(g, n, beta):
    "A small model in bf16, seven pairs of the tiny world, and the numbers of another model."
    seed = int(torch.randint(10**6, (1,), generator=g))
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, hidden=16, layers=1, seed=seed).bfloat16().eval()
    pairs, table = [], {}
    for prompt in make_prompts(7, "preference", random.Random(seed)):
        pairs.append(dict(
            key=prompt,
            prompt_ids=prompt_ids(tokenizer, prompt),
            chosen_ids=_encode(tokenizer, answer(prompt)),
            rejected_ids=_encode(tokenizer, answer(prompt, right=False)),
        ))
        table[prompt] = (-20 + 5 * torch.randn(2, generator=g)).tolist()
    return model, pairs, table, 5 * beta, 0.002, 3       # so small a rate hides AdamW's own weight decay


# %%
model, pairs, table, *settings = _draw_stage(torch.Generator().manual_seed(0), 3, 0.1)
started = time.perf_counter()
losses = _train(copy.deepcopy(model), pairs, table, *settings)
assert time.perf_counter() - started < 5
[round(loss, 4) for loss in losses]


# %% [markdown]
# Some mistakes would bury the others, so they are looked for first. In bf16 every number depends on how the batch was padded; and shuffled pairs give losses that no other run gives. So the spy looks at weights and mode while the model is used, and
# a first run, with batches of one pair and a learning rate of zero, shows the order. Where it finds something there, it reports nothing else.

# %%
#| export
@contextlib.contextmanager
def _watching(model):
    "Notes mode and kind of weights at every forward pass that can be differentiated."
    seen = []
    def look(module, args, kwargs):
        half = any(p.dtype in (torch.bfloat16, torch.float16) for p in module.parameters())
        if torch.is_grad_enabled(): seen.append((module.training, half))
    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try: yield seen
    finally: handle.remove()

def _losses(f, model, *args):
    "The losses of a stage as numbers, and what was seen of the model."
    model = copy.deepcopy(model)
    with _watching(model) as seen: losses = f(model, *args)
    if is_empty(losses): return None, seen
    if not isinstance(losses, (list, tuple)): raise WrongForm(f"a list is wanted, not {_kind(losses)}")
    return [one_number(loss, ()) for loss in losses], seen

@torch.no_grad()
def _untrained_losses(model, pairs, table, beta) -> list:
    "The loss of each pair before anything is trained."
    chosen, rejected = score(copy.deepcopy(model).float(), pairs)
    references = torch.tensor([table[pair["key"]] for pair in pairs]).T
    return _dpo_loss(chosen, rejected, *references, beta).tolist()

def _watch_training(f, inputs):
    "The losses of two runs; where these say nothing, why."
    model, pairs, table, beta, lr, batch = inputs
    still, _ = _losses(f, model, list(pairs), dict(table), beta, 0., 1)
    if still is None: return None
    losses, seen = _losses(f, model, list(pairs), dict(table), beta, lr, batch)
    if any(half for _, half in seen): return "half weights"
    if not all(training for training, _ in seen): return "eval mode"

    want = _untrained_losses(model, pairs, table, beta)
    if alike(sorted(still), sorted(want)) and not alike(still, want): return "another order"
    return dict(still=still, losses=losses)


# %%
inputs = _draw_stage(torch.Generator().manual_seed(0), 3, 0.1)
def watched(*wrong): return _watch_training(partial(_train, wrong=wrong), inputs)

print("moving_reference:", [round(loss, 4) for loss in watched("moving_reference")["losses"]])
print("shuffled:", watched("shuffled", "no_zero_grad"))
print("bf16_weights:", watched("bf16_weights"))

# %%
#| export
EXERCISES["train"] = Exercise(
    name="train",
    crooked=_train,
    draw=_draw_stage,
    form=as_it_is,
    observe=_watch_training,
    tries=2,
    read=("06", "Six lines"),
    says=dict(
        moving_reference="all losses are ln 2: the policy is its own reference.",
        swapped_table="chosen and rejected of the table are swapped.",
        summed="it is the sum over a batch; take the mean.",
        no_zero_grad="gradients are not cleared between steps.",
        sgd="it steps with SGD; use AdamW.",
        eval_mode="the model trains in eval mode; call model.train().",
        bf16_weights="the weights stay in bf16; call model.float() first.",
        shuffled="the pairs come in another order; keep theirs.",
        last_batch_lost="the last, short batch is left out.",
    ),
    elsewhere=dict(
        bf16_weights=("06", "Half precision, full weights"),
        eval_mode=("06", "Half precision, full weights"),
        shuffled=("06", "The order of the data"),
        sgd=("06", "One step"),
        moving_reference=("03", "Five ways to get it wrong"),
    ),
)

def check_train(
    f,              # (model, pairs, table, beta, lr, batch) -> losses, one a step
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    """Check a stage of DPO: fp32 weights, train mode, AdamW without weight decay, batches in the order given.
    The table is {key: (chosen, rejected)}, in nats. `score(model, pairs)` of this module may be used."""
    return run_check("train", f, seed)


# %%
def own_reference(model, pairs, table, beta, lr, batch):
    model = model.float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for i in range(0, len(pairs), batch):
        chosen, rejected = score(model, pairs[i:i + batch])
        gamma = chosen - rejected
        loss = -F.logsigmoid(beta * (gamma - gamma.detach())).mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss)
    return losses

said(check_train, own_reference)


# %% [markdown]
# ## Stages
#
# ### The loop of sDPO
#
# Which model is the reference of which stage? Nothing has to be trained to find out. `score`, `train` and `copy` are spies, and a model is a list of what it was trained on. The function must leave S as it is.

# %%
#| export
class _Model:
    "A model that remembers which chunks it was trained on."
    def __init__(self, seen=()): self.seen = tuple(seen)

def _stepwise(S, chunks, score, train, copy, wrong=()):
    base = copy(S)                                       # S itself may be trained below
    model = S if "S_trained" in wrong else copy(S)
    if "reversed" in wrong: chunks = chunks[::-1]
    if "chunks" in wrong: chunks = chunks[:-1]
    older = copy(S)
    for chunk in chunks:
        reference = copy(model)
        if "lag" in wrong: reference = older
        if "fixed" in wrong: reference = base
        older = copy(model)
        table = score(reference, chunks[0] if "table" in wrong else chunk)
        if "live" in wrong: table = model
        if "from_S" in wrong: model = copy(base)
        train(model, chunk, table)
    return S if "returned" in wrong else model

def _draw_stages(g, n, beta): return (n + 1,)

def _watch_stages(f, inputs):
    "Who was trained on what against which table."
    S, log, trained = _Model(), [], []

    def score(model, chunk): return ("table", model.seen, chunk)
    def copy(model): return _Model(model.seen)
    def train(model, chunk, table):
        reference = table if isinstance(table, tuple) else _kind(table)
        log.append([model.seen, chunk, reference])
        trained.append(model)
        model.seen += (chunk,)
        return model

    last = f(S, [f"D_{t}" for t in range(1, inputs[0] + 1)], score, train, copy)
    if is_empty(last) and not log: return None
    return dict(log=log, S_kept=S.seen == (), returned=bool(trained) and last is trained[-1])


# %%
pd.DataFrame(_watch_stages(_stepwise, (3,))["log"], columns=["trained before on", "now on", "against"])

# %% [markdown]
# With two stages, a reference that is always S and one that lags behind by a stage are the same. So the spies look at up to seven stages before anything is named.

# %%
#| export
EXERCISES["stepwise"] = Exercise(
    name="stepwise",
    crooked=_stepwise,
    draw=_draw_stages,
    form=as_it_is,
    observe=_watch_stages,
    read=("13", "The method in four lines"),
    says=dict(
        S_trained="S itself is trained; copy it first.",
        live="the reference is the live model, so the loss stays at ln 2; score first.",
        fixed="the reference is S in every stage; it must be M_{t-1}.",
        lag="the reference of stage t is M_{t-2}; it must be M_{t-1}.",
        table="the table is of another chunk than the training.",
        from_S="every stage starts from S; it must start from M_{t-1}.",
        reversed="the chunks come in reverse order.",
        chunks="the last chunk is left out.",
        returned="it does not return the model of the last stage.",
    ),
    elsewhere=dict(fixed=("13", "Why not S?"), from_S=("13", "Where the policy starts")),
)

def check_stepwise(
    f,              # (S, chunks, score, train, copy) -> the last model
    seed: int=None, # is not used here: nothing is drawn
) -> int:           # the seed
    "Check the loop of sDPO: score(model, chunk) -> table, train(model, chunk, table), copy(model) -> model."
    return run_check("stepwise", f, seed)


# %%
def lags(S, chunks, score, train, copy):
    reference, model = copy(S), copy(S)
    for chunk in chunks:
        table = score(reference, chunk)
        reference = copy(model)
        train(model, chunk, table)
    return model

said(check_stepwise, lags)


# %% [markdown]
# ### Two numbers of a stage
#
# What a loss guarantees (equation (10) of [chapter 03](03_loss.ipynb)), and what the first loss of a stage must be when the policy does not start as its own reference.

# %%
#| export
def _certificate(loss, mean_gamma_ref, beta, wrong=()):
    bound = math.log(loss) if "log_of_loss" in wrong else loss + math.log(-math.expm1(-loss))
    if "overflow" in wrong: bound = math.log(math.exp(loss) - 1)
    if "times_beta" in wrong: bound = bound * beta
    elif "no_beta" not in wrong: bound = bound / beta
    if "sign" in wrong: bound = -bound
    return -bound if "no_ref" in wrong else mean_gamma_ref - bound

def _draw_loss(g, n, beta):
    loss, ref = torch.rand(2, dtype=torch.float64, generator=g).tolist()
    return 0.05 + 2 * loss, -40 + 50 * ref, beta

def _dies_of_a_large_loss(f, g):
    bound = one_number(f(5000., -38.6, 0.1), ())
    return not math.isclose(bound, -50038.6, rel_tol=1e-6)

def _first_loss(gamma_start, gamma_ref, beta, wrong=()):
    gain = gamma_start - gamma_ref
    if "swapped" in wrong: gain = -gain
    if "no_ref" in wrong: gain = gamma_start
    if "no_beta" in wrong: beta = 1.
    if "mean_inside" in wrong: gain = gain.mean(0, keepdim=True)
    if "always_ln2" in wrong: gain = 0 * gain
    losses = F.softplus(-beta * gain)
    if "outside" in wrong: losses = beta * F.softplus(-gain)
    if "no_minus" in wrong: losses = -losses
    return (losses.sum() if "sum" in wrong else losses.mean()).item()


# %%
[round(_certificate(loss, 0., 0.1), 2) for loss in (0.3, math.log(2), 5000.)]

# %%
#| export
EXERCISES["certificate"] = Exercise(
    name="certificate",
    crooked=_certificate,
    draw=_draw_loss,
    form=one_number,
    read=("03", "The reference as a lower bound"),
    says=dict(
        sign="the sign is wrong: a smaller loss must certify more.",
        log_of_loss="it takes log(L); equation (10) has log(exp(L) - 1).",
        no_beta="it does not divide by beta.",
        times_beta="it multiplies by beta; divide by it.",
        no_ref="the mean gamma of the reference is not added.",
        overflow="exp(L) overflows at a loss of 5000; use L + log(1 - exp(-L)).",
    ),
    edges=dict(overflow=_dies_of_a_large_loss),
    by_hand="loss 0.5, reference 2, beta 0.1 give 6.33",
)
EXERCISES["first_loss"] = Exercise(
    name="first_loss",
    crooked=_first_loss,
    draw=_draw_gammas,
    form=one_number,
    read=("06", "Six lines"),
    says=dict(
        mean_inside="it is the loss of the mean gain; take the mean of the losses.",
        no_beta="beta is missing.",
        swapped="start and reference are swapped.",
        no_ref="the reference is not used.",
        always_ln2="it is ln 2, which is right only where the policy is its reference.",
        outside="beta stands outside the logarithm; it must scale the gain inside.",
        no_minus="the minus is missing: a loss is not negative.",
        sum="it is the sum over pairs; the log shows the mean.",
    ),
    by_hand="(1, 3), (1, 1), beta 0.5 give 0.503",
    elsewhere=dict(mean_inside=("03", "The reference as a lower bound")),
)

def check_certificate(
    f,              # (loss, mean_gamma_ref, beta) -> lower bound of the mean gamma of the policy, nats
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check what a mean loss guarantees."
    return run_check("certificate", f, seed)

def check_first_loss(
    f,              # (gamma_start (n,), gamma_ref (n,), beta) -> mean loss before the first step
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check the first loss of a stage."
    return run_check("first_loss", f, seed)


# %%
print(said(check_certificate, lambda loss, ref, beta: ref - math.log(math.exp(loss) - 1) / beta))
print(said(check_first_loss, lambda start, ref, beta: -F.logsigmoid(beta * (start - ref).mean())))

# %% [markdown]
# ### An experiment
#
# The last exercise is no function but a table of runs. Has sDPO been compared with what it must be compared with? By [chapter 03](03_loss.ipynb), $T$ stages at $\beta$ may be worth one stage at $\beta/T$, so a run of plain DPO at
# $\beta/T$ must be there. $\beta$ is picked on validation prompts. There are at least two seeds. And the interval of the difference to S is paired ([chapter 08](08_evaluate.ipynb)).
#
# One run is one row: `method` (S, DPO or sDPO), `beta`, `stages`, `seed`, `picked_on` (the split on which beta was chosen), `rewards` (a list, one number a test prompt), and `low` and `high`, the 95 % interval of the mean of rewards minus those of S
# with the same seed.

# %%
#| export
COLUMNS = ("method", "beta", "stages", "seed", "picked_on", "rewards", "low", "high")

def difference_interval(
    a,            # rewards of one model, one a prompt
    b,            # those of the other, for the same prompts
    paired=True,  # prompt by prompt, or as if the prompts were others
) -> tuple[float, float]:  # low, high, 95 %
    "Interval of the mean of a - b."
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    variance = (a - b).var() if paired else a.var() + b.var()
    mean, half = (a - b).mean().item(), 1.96 * math.sqrt(variance.item() / len(a))
    return mean - half, mean + half

def _experiment(wrong=()):
    "A table of runs, with rewards that were never measured."
    g = torch.Generator().manual_seed(0)
    methods = [("S", math.nan, 0), ("DPO", 0.3, 1), ("DPO", 0.1, 1), ("sDPO", 0.3, 3)]
    if "no_baseline" in wrong: del methods[2]
    if "no_dpo" in wrong: del methods[1]
    rows = []
    for seed in range(1 if "one_seed" in wrong else 2):
        hard = torch.rand(50, generator=g)
        for method, beta, stages in methods:
            rewards = 0.7 * hard + 0.3 * torch.rand(50, generator=g)
            if method == "S": base = rewards
            low, high = difference_interval(rewards, base, paired="unpaired" not in wrong)
            if "interval" in wrong: low, high = -0.1, 0.1
            picked_on = "test" if "picked_on_test" in wrong else "validation"
            rows.append([method, beta, stages, seed, picked_on, rewards.tolist(), low, high])
    return pd.DataFrame(rows, columns=COLUMNS)


# %%
_experiment().drop(columns="rewards").round(3)


# %% [markdown]
# Each mistake is a property of the table.

# %%
#| export
def _table_of_runs(runs, inputs) -> pd.DataFrame:
    "The form of an experiment."
    if not isinstance(runs, pd.DataFrame): raise WrongForm(f"a DataFrame is wanted, not {_kind(runs)}")
    absent = [name for name in COLUMNS if name not in runs.columns]
    if absent: raise WrongForm(f"columns are missing: {', '.join(absent)}")
    for method in ("S", "sDPO"):
        if method not in set(runs["method"]): raise WrongForm(f"there is no run of {method}")
    return runs

def _lacks_dpo(stages_of, f, g) -> bool:
    "Whether a run of sDPO has no run of DPO beside it, at its beta over some number, with the same seed."
    runs = f()
    for run in runs[runs["method"] == "sDPO"].itertuples():
        beside = runs[(runs["method"] == "DPO") & (runs["seed"] == run.seed)]
        wanted = run.beta / stages_of(run)
        if not any(math.isclose(beta, wanted, rel_tol=0.01) for beta in beside["beta"]): return True
    return False

def _picks_on_test(f, g): return not (f()["picked_on"] == "validation").all()

def _has_one_seed(f, g): return any(rows["seed"].nunique() < 2 for _, rows in f().groupby("method"))

def _interval_is(paired, f) -> bool:
    "Whether all intervals are those of this kind, to 5 % of their width."
    runs = f()
    base = runs[runs["method"] == "S"].set_index("seed")["rewards"]
    for run in runs[runs["method"] != "S"].itertuples():
        low, high = difference_interval(run.rewards, base[run.seed], paired)
        off = max(abs(run.low - low), abs(run.high - high))
        if off > 0.05 * (high - low): return False
    return True


# %%
def without_baseline(): return _experiment(["no_baseline"])

{
    "DPO at beta/T is missing": _lacks_dpo(operator.attrgetter("stages"), without_baseline, None),
    "beta was picked on test prompts": _picks_on_test(without_baseline, None),
    "the intervals are paired": _interval_is(True, without_baseline),
}

# %%
#| export
EXERCISES["experiment"] = Exercise(
    name="experiment",
    crooked=_experiment,
    form=_table_of_runs,
    read=("08", "Was the distance worth it?"),
    says=dict(
        no_baseline="there is no DPO at beta/T beside sDPO, for every seed.",
        no_dpo="there is no DPO at the beta of sDPO, for every seed.",
        picked_on_test="beta was picked on test prompts; use validation prompts.",
        one_seed="there is one seed; another may say the opposite.",
        unpaired="the interval is unpaired; both models had the same prompts.",
        interval="low and high are not the 95 % interval of rewards minus those of S.",
    ),
    edges=dict(
        no_baseline=partial(_lacks_dpo, operator.attrgetter("stages")),
        no_dpo=partial(_lacks_dpo, lambda run: 1),
        picked_on_test=_picks_on_test,
        one_seed=_has_one_seed,
        unpaired=lambda f, g: _interval_is(False, f) and not _interval_is(True, f),
        interval=lambda f, g: not _interval_is(True, f),
    ),
    elsewhere=dict(
        no_baseline=("03", "What $T$ stages add up to"),
        unpaired=("08", "Ask both models the same prompts"),
        interval=("08", "Ask both models the same prompts"),
        one_seed=("08", "Ask both models the same prompts"),
    ),
)

def check_experiment(
    runs,           # data frame with COLUMNS, one run a row; or a function that makes it
    seed: int=None, # is not used here
) -> int:           # the seed
    "Check that sDPO was compared fairly. Raises CheckFailed for a table that is not enough to say so."
    return run_check("experiment", runs, seed)


# %%
mine = _experiment()
mine["low"], mine["high"] = mine["low"] - 0.04, mine["high"] + 0.04
print(said(check_experiment, mine))
print(said(check_experiment, _experiment(["unpaired"])))
print(said(check_experiment, mine[mine["beta"] != 0.1]))


# %% [markdown]
# ## The catalogue
#
# Every mistake of every exercise, made on purpose. The check must call each by its own name. (`diagnose` is a check without the question whose function it is; the crooked functions are the package's own.)

# %%
def named(exercise, wrong, seed=1):
    "The mistakes that a check finds in a function that makes these."
    try: diagnose(exercise, partial(exercise.crooked, wrong=wrong), seed)
    except CheckFailed as e: return e.mistakes, str(e)
    return (), ""

rows = []
for exercise in EXERCISES.values():
    assert named(exercise, ()) == ((), "")
    for mistake in exercise.says:
        found, message = named(exercise, (mistake,))
        assert found == (mistake,), (exercise.name, mistake, found)
        rows.append((exercise.name, mistake, *found, exercise.says[mistake], len(message)))

columns = ["check", "mistake made", "mistake named", "what is said", "characters"]
catalogue = pd.DataFrame(rows, columns=columns).set_index(["check", "mistake made"])
catalogue


# %% [markdown]
# And as in [chapter 03](03_loss.ipynb), mistakes down and checks across, for four of the checks. Three mistakes can be made in two of these exercises; then each check names its own.

# %%
def marks(names):
    "Which check names which mistake."
    table = catalogue.loc[names, "mistake named"].reset_index()
    return pd.crosstab(table["mistake made"], table["check"]).replace({0: "", 1: "named"})

marks(["dpo_loss", "gradient", "accuracy", "by_prompt"])

# %% [markdown]
# Two mistakes at once? No pair may pass. Some pairs are named by one of the two: who does not use the reference cannot have its sign wrong. A few fit another mistake of the list exactly, or stop with an error.

# %%
verdicts = {}
for exercise in EXERCISES.values():
    if exercise.name == "train": continue                # some seconds more; tests/test_checks.py does it
    for two in itertools.combinations(exercise.mistakes, 2):
        found, _ = named(exercise, two)
        assert found, (exercise.name, two)
        kind = "both" if found == two else "one of the two" if set(found) < set(two) else "something else"
        verdicts[exercise.name, two] = kind

pairs_named = pd.Series(verdicts, name="named").rename_axis(["check", "two mistakes"])
counts = {"singles": len(catalogue), "longest message": int(catalogue["characters"].max())}
counts | pairs_named.value_counts().to_dict()


# %% [markdown]
# ## No false alarm
#
# A check that accuses a right answer is worse than none. Here are right answers to two exercises, each written in two other ways, one of them in fp32. A hundred seeds each. (`tests/test_checks.py` does this for every exercise.)

# %%
def with_exp(c, r, rc, rr, beta): return torch.logaddexp(torch.zeros_like(c), -beta * ((c - rc) - (r - rr)))
def in_fp32(*args): return right(*[a.float() if isinstance(a, torch.Tensor) else a for a in args])
def by_sign(gamma, gamma_ref): return ((gamma - gamma_ref).sign() + 1) / 2 + 0 * (gamma - gamma_ref)
def by_comparing(gamma, gamma_ref):
    verdict = (gamma > gamma_ref) + 0.5 * (gamma == gamma_ref)
    return torch.where(gamma.isnan() | gamma_ref.isnan(), math.nan, verdict.float())

alarms = 0
for check, ways in ((check_dpo_loss, (with_exp, in_fp32)), (check_accuracy, (by_sign, by_comparing))):
    for f, seed in itertools.product(ways, range(100)):
        with contextlib.redirect_stdout(io.StringIO()): alarms += said(check, f, seed) != "passed"
assert alarms == 0
f"{alarms} false alarms in 400 checks"

# %% [markdown]
# ## The last cell of an assignment
#
# In an assignment each question has a cell with its check, and the cell says what it is worth:
#
# ```python
# #| question q2 4 check_dpo_loss dpo_loss
# try_check(check_dpo_loss, dpo_loss)
# ```
#
# The first line names the question, its points, the check, and what is checked. `try_check`, of the next chapter, prints what the check says and lets the notebook go on. A question that a person marks has the word `manual` in the place of the check.
#
# `report` gets these lines as text, with or without their beginning `#| question`. So it counts every question, also one whose cell was not run. (Without the text it reads the cells that were run, and knows only these.) It calls each check once more, on what the name means *now*, with one
# seed for all, and says how far one has come. What the checks say is printed in full, because a table shows 50 characters of it. It never raises, whatever the notebook holds.

# %%
#| export
_MARK, _ASKED = r"#\s*\|\s*question +", r"(\w+) +(\d+) +(\w+)(?: +(\w+))?"
_QUESTION = re.compile(f"^{_MARK}{_ASKED}", re.M)            # in a cell
_LISTED = re.compile(f"^(?:{_MARK})?{_ASKED}", re.M)         # in a list of questions

def _asked_for(names, questions) -> dict:
    "question -> points, check and what is checked."
    if questions: return {q: rest for q, *rest in _LISTED.findall(questions)}
    cells = names.get("In") or []
    text = "\n".join(cell for cell in cells if isinstance(cell, str))
    return {q: rest for q, *rest in _QUESTION.findall(text)}

def _try_check(check, names, name, seed) -> tuple[bool, str]:
    "Whether an answer passes, and what is missing."
    if check not in globals() or not check.startswith("check_"): return False, f"there is no {check}"
    if name not in names: return False, f"{name} is not defined: run its cell"
    try:
        with contextlib.redirect_stdout(io.StringIO()): globals()[check](names[name], seed=seed)
    except CheckFailed as e: return False, str(e)
    except (Exception, SystemExit) as e: return False, f"{check} itself stopped: {e!r}"[:LIMIT]
    return True, ""

def report(
    names: dict,         # globals() of the notebook
    questions: str=None, # a line each: name, points, check, what is checked; None: those that were run
    seed: int=None,      # of all checks; None: a fresh one
) -> pd.DataFrame:       # question, answer, points, of, missing
    "Points so far and what is missing; prints the sum, and what the checks say. Never raises."
    if seed is None: seed = random.SystemRandom().randrange(1_000_000)
    rows = []
    for q, (points, check, name) in _asked_for(names, questions).items():
        passed, missing = False, "a person marks this one"
        if check != "manual": passed, missing = _try_check(check, names, name, seed)
        rows.append((q, name or "by hand", passed * int(points), int(points), missing))
    columns = ["question", "answer", "points", "of", "missing"]
    table = pd.DataFrame(rows, columns=columns).set_index("question")
    points, of = table["points"].sum(), table["of"].sum()
    print(f"{points} of {of} points so far (seed {seed}, sdpo_nb {__version__})")
    checked = table[table["answer"] != "by hand"]
    for q, missing in checked["missing"].items():
        if missing: print(f"{q}: {missing}")
    return table


# %% [markdown]
# A student's notebook after an hour. One question is solved, one is wrong, one is empty, one was not reached, and one is for a person:

# %%
QUESTIONS = """
q1 4 check_sequence_logps sequence_logps
q2 4 check_dpo_loss dpo_loss
q3 2 check_gradient slope
q4 3 check_ipo ipo_loss
q6 3 manual
"""
def slope(gamma_theta, gamma_ref, beta): ...

student = dict(sequence_logps=with_a_loop, dpo_loss=two_at_once, slope=slope)
points = report(student, QUESTIONS, seed=1)
assert points["points"].sum() == 4
points

# %% [markdown]
# From its own cells, as a notebook keeps them in `In`:

# %%
cells = ["", "#| question q1 4 check_sequence_logps sequence_logps\ncheck_sequence_logps(sequence_logps)"]
report(student | dict(In=cells), seed=1)

# %% [markdown]
# ## What this does not show
#
# - A check knows the mistakes that somebody has thought of. A new one is "not in a way that this check knows", with the first number that differs. Then add a switch: one line in the crooked function, one sentence.
# - It sees numbers, not understanding. A student who tries switches until the check is silent has learned something else than the loss. The questions by hand are for that.
# - It runs in the student's own process, where everything can be patched. So points are given elsewhere, by a grader that starts the checks in a process of its own.
#
# ## What you now have
#
# - Seventeen checks, `check_sequence_logps` to `check_experiment`. Each takes the student's function, prints that it passed and returns the seed, or raises `CheckFailed` with one message.
# - `Exercise`, `find_mistakes` and `diagnose`: a new check is a crooked function, a drawing of inputs and a dictionary of sentences.
# - `report`, the last cell of an assignment.
#
# ## Questions to test yourself
#
# 1. Why does no batch have $\beta = 1$?
#
# <details><summary>Answer</summary>
#
# With $\beta = 1$ a forgotten $\beta$ is right, and so is one that stands outside the logarithm. The switches `no_beta`, `outside` and `inverse` would give the right numbers.
#
# </details>
#
# 2. A student's function passes with the seed that she was given, but fails with a fresh one. What has she done?
#
# <details><summary>Answer</summary>
#
# Written something that fits one set of numbers: the numbers themselves, or a special case such as batches of one size. Fresh numbers are there for that.
#
# </details>
#
# 3. Why are the fewest mistakes taken, and not all sets that fit?
#
# <details><summary>Answer</summary>
#
# A mistake may make another irrelevant. Who does not use the reference has exactly the numbers of `no_ref`, of `no_ref` with `plus_ref`, and of every other set that changes only the reference. Only the first is something to tell a student.
#
# </details>
#
# 4. `log(sigmoid(z))` gives the right numbers in all six batches. Why is it refused?
#
# <details><summary>Answer</summary>
#
# Training reaches numbers that no random batch has. At a gain of $-9000$ nats the sigmoid is zero in floating point, its logarithm minus infinity, and the gradient NaN. Edges look at such cases.
#
# </details>
#
# ## Try this
#
# Add a switch `clipped` to a copy of `_dpo_loss`, which cuts the gain to $[-5, 5]$ nats, and a sentence to `says`. Which seeds name it?
#
# <details><summary>What you should see</summary>
#
# All of them: the gains have a standard deviation of 20 nats, so among the 21 pairs of a check many are beyond 5.
#
# </details>
