# %% [markdown]
# # A mistake is a function, too
# > How a check can say which mistake was made, built for one exercise from the first idea to the last message.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/19_mistakes.ipynb)
#
# **You should know** the [DPO loss](03_loss.ipynb): four log-probabilities for a pair of responses, the gain, and $\beta$. Read this chapter if you write exercises of your own, or if you want to know where the messages of the assignments come from. To solve
# the assignments you need nothing from here.
#
# **Time** to read with its code: an hour and a half. To run: a few seconds.
#
# A student writes a function, and a test says that it is wrong. That is little help. The mistakes in this field raise no error: $\beta$ is forgotten, the shift is forgotten, chosen and rejected are exchanged, and a loss comes out all the same.
# So a check should do better. It should say *which* mistake it was, and where to read about it.
#
# Three things are wanted of a check:
#
# 1. A right answer always passes, however it is written.
# 2. A wrong answer never passes, and a usual mistake is called by its name.
# 3. What it says is short: what is wrong, why, and where to read.
#
# This chapter builds such a check for one exercise, the DPO loss. The [next one](20_checks.ipynb) holds sixteen more, and for them nothing new is needed: an exercise is data.

# %%
#| default_exp mistakes

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
import contextlib, copy, dis, itertools, math, random, sys
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo_nb.logprobs import response_logprobs

# %%
import dataclasses, io

import pandas as pd

import sdpo_nb.loss
from sdpo_nb.loss import dpo_loss as theirs

torch.set_num_threads(1)
pd.set_option("display.width", 180, "display.max_columns", 20)


# %% [markdown]
# ## One mistake, one switch
#
# The exercise: from the four log-probabilities of a pair, compute the loss $-\log\sigma(\beta\,\Delta)$ with the gain $\Delta = (\log\pi_w - \log\pi_l) - (\log\pi^{ref}_w - \log\pi^{ref}_l)$. Here is the answer of a student. Do you see what is wrong with it?

# %%
def handed_in(chosen, rejected, ref_chosen, ref_rejected, beta):
    gain = (chosen - rejected) - (ref_chosen - ref_rejected)
    return -beta * F.logsigmoid(gain)


# %% [markdown]
# A test with one golden number would say "not equal". Instead we write the loss once more, *crookedly*: one function, with a switch for every mistake that we have seen people make. Without switches it is right.

# %%
def crooked(chosen, rejected, ref_chosen, ref_rejected, beta, wrong=()):
    gain = (chosen - rejected) - (ref_chosen - ref_rejected)
    if "no_ref" in wrong: gain = chosen - rejected
    if "swapped" in wrong: gain = -gain
    if "no_beta" in wrong: beta = 1.0
    if "outside" in wrong: return -beta * F.logsigmoid(gain)
    return -F.logsigmoid(beta * gain)

switches = ("no_ref", "swapped", "no_beta", "outside")

# %% [markdown]
# So each mistake is now a function that can be called. Give all of them the same random numbers, the student's function too, and compare:

# %%
g = torch.Generator().manual_seed(0)
four = -40 + 10 * torch.randn(4, 4, dtype=torch.float64, generator=g)   # a row each: c, r, rc, rr

answers = {"right": crooked(*four, 0.1)}
for switch in switches: answers[switch] = crooked(*four, 0.1, wrong=(switch,))
answers["handed in"] = handed_in(*four, 0.1)
assert torch.equal(answers["handed in"], answers["outside"])
pd.DataFrame(answers, index=[f"pair {i}" for i in range(4)]).T.round(3)


# %% [markdown]
# The last row is the row `outside`, digit by digit, and no other row is near it. Four numbers do not agree by chance. So the student has put $\beta$ outside the logarithm: not probably, but exactly.
#
# Notice what this asks of us, and what it does not. We need not read the student's code, so it does not matter how the code is written. We need only a list of mistakes, each as a line that can be executed. The first check is six lines long:

# %%
def first_try(f, inputs):
    "The switches that give the numbers of f: none, or one."
    numbers = f(*inputs)
    for wrong in ((), *((switch,) for switch in switches)):
        if torch.allclose(numbers, crooked(*inputs, wrong=wrong)): return wrong
    return "nobody knows"

first_try(handed_in, (*four, 0.1))


# %% [markdown]
# ## Five ways past it
#
# Would you hand this to a class? Here are five students. One has not begun. One calls the package. One takes the logarithm of a sigmoid, which is right on paper. One forgot $\beta$, on a day when the test draws $\beta = 1$. And one has made two mistakes, $\beta$ outside and the sign of the reference. What does the first
# try say about each of them?

# %%
def stub(c, r, rc, rr, beta): ...
def borrowed(c, r, rc, rr, beta): return theirs(c - r, rc - rr, beta)
def log_of_sigmoid(c, r, rc, rr, beta): return -torch.sigmoid(beta * (c - r - rc + rr)).log()
def without_beta(c, r, rc, rr, beta): return -F.logsigmoid(c - r - rc + rr)
def two_at_once(c, r, rc, rr, beta): return -beta * F.logsigmoid(c - r + rc - rr)

def hear(f, beta=0.1):
    try: return first_try(f, (*four, beta))
    except Exception as e: return f"{type(e).__name__}: {e}"

heard = {f.__name__: hear(f) for f in (stub, borrowed, log_of_sigmoid, two_at_once)}
heard["without_beta"] = hear(without_beta, beta=1.0)
for name, told in heard.items(): print(f"{name:15} {str(told)[:80]}")


# %% [markdown]
# None of the five hears what would help. `()` means "right", so three of them pass: the borrowed function, the one that will be infinite in training, and the forgotten $\beta$. The stub gets a sentence about `allclose`, and two mistakes at once are nobody's.
#
# Each of the five is a question, and each question a section of this chapter:
#
# 1. Did anything come back, and is it the right kind of thing?
# 2. Is it the student's own work?
# 3. Do the numbers tell the mistakes apart?
# 4. What do ordinary numbers never show?
# 5. Which mistakes, if there is more than one?
#
# ## Does it return anything, and what?
#
# A function that returns the mean of a batch, where one number per pair is wanted, needs another sentence than a function that computes a wrong number. So every exercise has a *form*: a function that turns an answer into numbers that can be compared, or says why that cannot be done. This is the form of the loss:

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

def kind_of(
    thing, # that came back
) -> str:
    "What kind of thing it is, for a message."
    return f"a {type(thing).__name__}"

def per_pair(
    answer,           # what the student's function returned
    inputs: tuple,    # what it was called with; the first has a row per pair
    each: str="pair", # what a number belongs to, for the message
) -> Tensor:          # (n,) float64, detached
    "The form of one number per pair. Raises WrongForm, saying what is wrong with it."
    n = len(inputs[0])
    if not isinstance(answer, Tensor): raise WrongForm(f"it returns {kind_of(answer)}, not a tensor")
    shape = tuple(answer.shape)
    if shape == ():
        raise WrongForm(f"one number for all {each}s; return one per {each}, the mean is taken later")
    if shape == (n, n) and n > 1:
        raise WrongForm(f"shape {shape}: unequal shapes broadcast to every {each} against every other")
    if shape != (n,): raise WrongForm(f"it returns shape {shape} for {n} {each}s, not ({n},)")
    return answer.detach().double()


# %%
three = (torch.zeros(3),)
for strange in (0.5, torch.tensor(0.5), torch.zeros(3, 3), torch.zeros(3, 1)):
    try: per_pair(strange, three)
    except WrongForm as e: print(e)


# %% [markdown]
# The third one is the treacherous one. Log-probabilities of shape (3, 1) and (3,) subtract without an error, and give nine differences: every pair against every other. Their mean is a plausible loss. Only the shape betrays it, and that is why an exercise asks for one number per pair and never for the mean.
#
# When are two answers the same? A student may compute in fp32, where the check has fp64, and may add up in another order. So about four digits decide. The mistakes of this exercise are all farther apart than that, and so are those of the others; the catalogue of the next chapter shows it.

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
    if isinstance(a, Tensor) or isinstance(b, Tensor): return False
    return a == b


# %%
assert alike([torch.tensor([1., math.nan])], [torch.tensor([1.00001, math.nan])])
assert not alike(torch.zeros(3), torch.zeros(3, 1))
assert alike(torch.zeros(3), 0.) is False
in_fp32 = crooked(*four.float(), 0.1)
alike(in_fp32, answers["right"]), alike(in_fp32, answers["outside"])


# %% [markdown]
# The shapes are compared first, because `torch.allclose` broadcasts as well: for it, three zeros and a column of three zeros are equal.
#
# ## Is it the student's own?
#
# The package holds a solution of nearly every exercise. A student who imports it has the right numbers, and no comparison of numbers can object. So a check looks at the *code* of the function, and at the code of every function that it calls by name. Is one of them from `sdpo_nb`? Then it is not
# the student's work. Two things may be used: the tiny world, and `score`, which the exercises on training need and which earlier chapters have explained.

# %%
#| export
def score(
    model,        # causal LM
    pairs: list,  # n tokenised pairs
) -> tuple[Tensor, Tensor]:  # (n,) log pi(y_w|x) and (n,) log pi(y_l|x), nats
    "Log-probabilities of both responses, for exercises that begin after them."
    return response_logprobs(model, pairs)

GIVEN = {"score"} # of these modules, what an answer may use
_HOMES = {"sdpo_nb.mistakes", "sdpo_nb.checks"}

def _is_foreign(thing) -> bool:
    "Whether something belongs to the package, and is not given."
    if isinstance(thing, dict): return any(map(_is_foreign, thing.values()))
    name = getattr(thing, "__name__", "")
    home = getattr(thing, "__module__", None) or ""
    if home in _HOMES: return name not in GIVEN
    if isinstance(thing, ModuleType): home = "" if name in _HOMES else name
    return home.split(".")[0] == "sdpo_nb" and home != "sdpo_nb.world"


# %%
some = (sdpo_nb.loss, sdpo_nb.loss.dpo_loss, F.logsigmoid, handed_in)
{thing.__name__: _is_foreign(thing) for thing in some}


# %% [markdown]
# What does a function use? Searching its text for `sdpo_nb` would miss `borrowed`, where the name is `theirs`. Its compiled code is more honest: there, each step that looks up a name says so. We follow the points, too, so that `F.logsigmoid` is one thing.

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
for f in (handed_in, borrowed): print(f.__name__, list(_names_used(f.__code__)))


# %% [markdown]
# Each path leads to something: a module, a function of the package, or another function of the student's, which is looked at in turn. Functions from elsewhere (torch, pandas) are not opened. They may be used, and looking into them would take long.

# %%
#| export
def _things_used(f: FunctionType):
    "(name, thing) of all that a function uses from outside of itself."
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or ()):
        with contextlib.suppress(ValueError): yield name, cell.cell_contents    # it may be empty
    defaults = [*(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values()]
    for thing in defaults: yield getattr(thing, "__name__", "a default"), thing
    for name, *attributes in _names_used(f.__code__):
        thing = f.__globals__.get(name, sys.modules.get(name))
        for attribute in attributes:
            if not isinstance(thing, ModuleType): break
            name, thing = attribute, getattr(thing, attribute, thing) # `import a.b as c` looks for b in a.b
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
# Five functions. Four of them hide the package's own: one behind another name, one behind a helper, one behind an import inside the function, one in a default. The fifth is honest.

# %%
def renamed(*args): return theirs(*args)
def helper(*args): return sdpo_nb.loss.dpo_loss(*args)
def behind(*args): return helper(*args)
def late(*args):
    from sdpo_nb.loss import dpo_loss
    return dpo_loss(*args)
def default(*args, loss=theirs): return loss(*args)

found = {f.__name__: foreign_name(f) for f in (renamed, behind, late, default, handed_in)}
assert found["handed_in"] is None
assert all(found[name] for name in ("renamed", "behind", "late", "default"))
found

# %% [markdown]
# This keeps honest people honest. Somebody who copies the text of the package into the cell passes, and so does somebody who looks a function up by a string, or keeps it in a list or in an object of their own. We could chase these, too, and would accuse right answers on the way. The point of a check is to teach.
#
# ## Numbers that can tell
#
# `without_beta` passed because $\beta$ happened to be 1. A check is only as good as its inputs: [chapter 03](03_loss.ipynb) shows how five wrong losses pass a test in which the policy is its own reference, since every gain is zero there. What must the inputs of a check be like?
#
# - *Six batches*, not one. What is the same in one batch by accident differs in another.
# - *One of a single pair*, where a sum is a mean; and one of three first, because three makes shapes plain.
# - *No $\beta$ is 1*, and the six are different, on both sides of 1.
# - *Four independent numbers a pair*, with a spread of 10 nats. So gains are of both signs and of all sizes.
# - *From a seed that is fresh at every call*. So nobody can write the expected numbers into the function. The seed is printed, and whoever wants the same batches again passes it.

# %%
#| export
SIZES = (3, 1, 2, 5, 4, 6)                # pairs of a batch; three first, which makes shapes plain
BETAS = (0.1, 0.5, 0.05, 2., 0.3, 0.2)

def _draw_logps(g, n, beta):
    "Log-probabilities of n pairs under two models."
    four = -40 + 10 * torch.randn(4, n, dtype=torch.float64, generator=g)
    return *four, beta


# %%
assert 1.0 not in BETAS
g = torch.Generator().manual_seed(1)
gains = []
for n, beta in zip(SIZES, BETAS):
    c, r, rc, rr, _ = _draw_logps(g, n, beta)
    gains.append(c - r - rc + rr)
gains = torch.cat(gains)
low, high, negative = gains.min().item(), gains.max().item(), (gains < 0).sum().item()
print(f"{len(gains)} pairs; gains from {low:.0f} to {high:.0f} nats, {negative} of them negative")


# %% [markdown]
# ## An exercise is data
#
# Now everything that a check needs to know can stand in one place: the crooked function, how its inputs are drawn, the form of an answer, a sentence for each mistake, and the section of the book that explains it. The first six fields are those; the others have a default and come up when an exercise needs them, most of them in the next chapter.

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
    names: dict=field(default_factory=dict)     # a part of what is compared -> what it is called in a message
    glance: Callable=None   # (f, inputs) -> a part of what is compared (a dict) that is quickly had
    shown: Callable=None    # (*inputs) -> the inputs in a few words, where they are short
    # what is said where nothing came back
    idle: str="returns None: the `return` is missing or not reached on every path, or the `...` is still there"

    @property
    def mistakes(self) -> list:
        "Those that show in the numbers."
        return [mistake for mistake in self.says if mistake not in self.edges]


# %% [markdown]
# Here is the crooked loss of the course. It has all the switches that we know by now: `half_beta` and `inverse` are what people make of a $\beta$ that they remember vaguely, `one_beta` is a bracket in the wrong place, and `rejected_added` a sign lost when the four terms are reordered.

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


# %%
inputs = _draw_logps(torch.Generator().manual_seed(0), 3, 0.1)
assert alike(_dpo_loss(*inputs), theirs(inputs[0] - inputs[1], inputs[2] - inputs[3], 0.1))
_dpo_loss(*inputs), _dpo_loss(*inputs, wrong=["swapped"])


# %% [markdown]
# Without switches it is the loss of chapter 03. The crooked function is the only place where the right answer is written, so this comparison is worth its line.
#
# ## What ordinary numbers never show
#
# Three mistakes do not show in random batches, or not always.
#
# - `unstable`: `log(sigmoid(z))` is right until $z$ is below about $-700$ (fp64). There the sigmoid becomes zero, its logarithm minus infinity, and the first such pair fills all weights with NaN. A `torch.where` or a `nan_to_num` around it mends the loss, and its gradient is NaN all the same.
# - `clamped`: who mends this with `.clamp(1e-8)` has a loss that stops growing at 18. A pair beyond that no longer pulls, though it is the one that is most wrong.
# - `detached`: a `.detach()` in the wrong place leaves the value right and kills the gradient, of both responses or of one.
#
# For these an exercise has *edges*: functions that go to the extreme case and say whether the mistake is there.

# %%
#| export
def _dies_far_away(f, g):
    "A policy that is 9000 nats behind its reference: its loss, and the gradient of it."
    near, far = torch.zeros(2).double(), torch.tensor([-9000., 9000.]).double().requires_grad_()
    loss = f(1 * far, near, near, near, 0.1)
    if not loss.isfinite().all(): return True
    if not loss.requires_grad: return False
    (slope,) = torch.autograd.grad(loss.sum(), far, allow_unused=True)
    return slope is not None and not slope.isfinite().all()

def _stops_growing(f, g):
    "Policies that are 50, 20,000 and 30,000 nats behind their reference."
    zero = torch.zeros(1).double()
    def loss_at(gain): return f(zero + gain, zero, zero, zero, 0.1).item()
    near, far, farther = map(loss_at, (-50, -20_000, -30_000))
    return near < far == farther < math.inf

def _has_no_gradient(f, g):
    "Whether nothing flows back to one of the two log-probabilities of the policy."
    *logps, beta = _draw_logps(g, 3, 0.1)
    policy = [logp.requires_grad_() for logp in logps[:2]]
    loss = f(*(1 * logp for logp in logps), beta)        # 1 *: a leaf may not be changed in place, this may
    if not loss.requires_grad: return True
    slopes = torch.autograd.grad(loss.sum(), policy, allow_unused=True)
    return any(slope is None or not slope.any() for slope in slopes)


# %%
edges = dict(unstable=_dies_far_away, clamped=_stops_growing, detached=_has_no_gradient)
fires = {}
for wrong in ((), *((mistake,) for mistake in edges)):
    f = partial(_dpo_loss, wrong=wrong)
    g = torch.Generator().manual_seed(0)
    fires[" ".join(wrong) or "right"] = {name: bool(test(f, g)) for name, test in edges.items()}
pd.DataFrame(fires).T

# %% [markdown]
# Read it by rows: each mistake sets off its own edge and no other, and the right loss none. `_stops_growing` needs its three distances for that. A log of a sigmoid is infinite at 20,000 and at 30,000 nats, and equal there, so it asks for a finite loss; and a loss that does not depend on the gain at all is equal everywhere, so it asks that the loss has grown before.
#
# Now the exercise in full. A sentence says what was done and, where there is room, why it is wrong or what to write. It does not say "error in line 3": the student finds the line.

# %%
#| export
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
        plus_ref="gamma of the reference is added; it must be subtracted.",
        no_minus="the minus is missing, so training would make it worse.",
        no_log="the logarithm is missing: the loss is -log(sigmoid(z)).",
        one_beta="only the policy is multiplied by beta; put brackets around the gain.",
        rejected_added="the rejected answer counts with the wrong sign; write (c - rc) - (r - rr).",
        clamped="it stops growing at some gain: it is clamped. Use F.logsigmoid(z).",
        unstable="at a gain of -9000 nats it or its gradient is infinite or NaN; F.logsigmoid(z) is not.",
        detached="no gradient reaches chosen, rejected or both: something is detached.",
    ),
    edges=dict(unstable=_dies_far_away, clamped=_stops_growing, detached=_has_no_gradient),
    telling=("clamped", "unstable"),
    by_hand="gain 0.6, beta 0.5 give 0.554",
    elsewhere=dict(
        rejected_added=("03", "The same loss in sDPO's words"),
        no_ref=("03", "The same loss in sDPO's words"),
        plus_ref=("03", "The same loss in sDPO's words"),
        detached=("03", "Its gradient"),
    ),
)

# %%
print(len(DPO_LOSS.says), "mistakes,", len(DPO_LOSS.mistakes), "of them in the numbers:", *DPO_LOSS.mistakes)


# %% [markdown]
# ## The fewest mistakes that fit
#
# Two steps: draw the batches, and hear what a function says about each, in its form.

# %%
#| export
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
# And the search. Whoever makes two mistakes gets the numbers of two switches, so we try no switch, then every single one, then every two, and stop at the first set that fits all six batches. It is the *fewest* mistakes that explain the answer. That matters, because larger sets fit as well: who does not use the reference has the numbers of
# `no_ref`, and just as exactly those of `no_ref` with `plus_ref`. Only the first is something to tell a student.

# %%
#| export
def _gives(exercise, f, inputs, answer) -> bool:
    "Whether f gives this answer; where a glance shows that it does not, nothing else is computed."
    if exercise.glance and isinstance(answer, dict):
        part = exercise.glance(f, inputs)
        if not alike(part, {key: answer[key] for key in part}): return False
    return alike(_answer(exercise, f, inputs), answer)

def _explains(exercise, wrong, batches, seen) -> bool:
    "Whether these mistakes give exactly these answers."
    f = partial(exercise.crooked, wrong=wrong)
    try: return all(_gives(exercise, f, inputs, answer) for inputs, answer in zip(batches, seen))
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
# Four students. One is right. One has forgotten $\beta$; no batch has $\beta=1$ now. One multiplies at the end and has the sign of the reference wrong, too. One has an idea of his own: a loss that is twice as large.

# %%
def right(c, r, rc, rr, beta): return -F.logsigmoid(beta * (c - r - rc + rr))
def twice(c, r, rc, rr, beta): return 2 * right(c, r, rc, rr, beta)

diagnoses = {}
for f in (right, without_beta, two_at_once, twice):
    diagnoses[f.__name__] = find_mistakes(DPO_LOSS, batches, [f(*b) for b in batches])
assert diagnoses["right"] == ()
assert diagnoses["two_at_once"] == ("outside", "plus_ref")
assert diagnoses["twice"] is None
diagnoses

# %% [markdown]
# `()` is right, a name is a mistake, and `None` is a wrong answer that nobody has foreseen. With eleven switches, up to 67 functions are called on six batches. That takes less than a tenth of a second, so nobody waits. Three mistakes at once would be 165 functions more, and a student who has made three is better helped by hearing two.
#
# ## What is said
#
# A check that fails raises an exception, so that a cell of an assignment stops and a grader notices. A traceback would not help the student: it shows the inside of the check. A notebook asks an exception for `_render_traceback_` before it prints one, so ours returns one line. And the line is short. 300 characters are three or four
# lines on a screen, which is about what people read.

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


# %%
print(*CheckFailed("dpo_loss: the two responses are swapped.", ["swapped"])._render_traceback_())


# %% [markdown]
# The sentences of a diagnosis: what was done, where to read, how sure the check is, and the seed. Where nobody knows the mistake, the first difference must do, and an example that can be worked by hand.

# %%
#| export
def _read(place) -> str: return f'Read chapter {place[0]}, "{place[1]}".'

def _with_example(exercise, text, inputs=None) -> str:
    "A message, with what the function was called with and the example worked by hand, where there is room."
    more = []
    if inputs and exercise.shown: more.append(f"Called with {exercise.shown(*inputs)}.")
    if exercise.by_hand: more.append(f"Try: {exercise.by_hand}.")
    end = ". "
    for sentence in more:
        if len(text + end + sentence) <= LIMIT: text, end = text + end + sentence, " "
    return text

def _diagnosis(exercise, mistakes, seed, exactly=True, also=(), inputs=None) -> CheckFailed:
    "The exception for known mistakes; `also` are other parts that are wrong."
    what = " Also: ".join(exercise.says[mistake] for mistake in mistakes)
    place = exercise.elsewhere.get(mistakes[0], exercise.read)
    these = "these mistakes" if len(mistakes) > 1 else "this mistake"
    sure = f"Your numbers are exactly those of {these}; " if exactly else ""
    more = f" Wrong, too: {', '.join(also)}." if also else ""
    text = f"{exercise.name}: {what}{more} {_read(place)} {sure}seed={seed}"
    return CheckFailed(_with_example(exercise, text, inputs) if exactly else text, mistakes)


# %%
print(_diagnosis(DPO_LOSS, diagnoses["two_at_once"], seed=1))


# %%
#| export
def _pieces(got, want) -> list:
    "(name, piece of an answer, piece of the right one), where both are of the same kind and have pieces."
    if isinstance(got, dict) and isinstance(want, dict):
        return [(key, got.get(key, "nothing"), want.get(key, "nothing")) for key in want | got]
    both = [type(got), type(want)]
    same_shape = both == [Tensor, Tensor] and got.shape == want.shape and got.dim() > 0
    if both == [list, list] or same_shape: return list(zip(itertools.count(), got, want))
    return []

def _first_unequal(got, want, path=()) -> tuple:
    "(path, piece, right piece) of the first place where two answers differ."
    for name, a, b in _pieces(got, want):
        if not alike(a, b): return _first_unequal(a, b, (*path, name))
    if isinstance(got, list) and isinstance(want, list): return path, f"{len(got)} of them", len(want)
    return path, got, want


# %% [markdown]
# An answer may be a dictionary of lists of numbers, and "they differ" is no help there. So we walk down to the first single thing that differs:

# %%
mine = dict(losses=[0.7, 0.5, 0.3], mode="train")
_first_unequal(mine, dict(losses=[0.7, 0.5, 0.2], mode="train"))


# %% [markdown]
# The path of it, `("losses", 2)`, means something to us and nothing to a student. So an exercise has *names*: `"losses[]"` is what an element of `losses` is called in a message, for example "the loss of step {}".

# %%
#| export
def _short(thing) -> str:
    if isinstance(thing, Tensor) and thing.dim() == 0: thing = thing.item()
    return (f"{thing:.5g}" if isinstance(thing, float) else str(thing))[:50]

def _place(exercise, path, count) -> str:
    "What the place of a difference is called; `count` is how many numbers the answer has."
    head, rest = (path[0], path[1:]) if path and isinstance(path[0], str) else ("", path)
    name = exercise.names.get(head + "[]" * len(rest))
    if name: return name.format(*rest)
    if len(path) == 1 and not head: return f"{exercise.each} {path[0]} of {count}"
    return " ".join(map(str, path))

def _first_difference(exercise, inputs, got) -> str:
    "Where an answer first differs from the right one; \"\" where it does not."
    want = _answer(exercise, exercise.crooked, inputs)
    if alike(got, want): return ""
    path, a, b = _first_unequal(got, want)
    place = _place(exercise, path, len(want) if path else 0)
    return f"{place}: {_short(a)}, right is {_short(b)}".removeprefix(": ")

def _unknown(exercise, batches, seen, seed) -> CheckFailed:
    "The exception for a wrong answer that nobody has foreseen."
    places = ((inputs, _first_difference(exercise, inputs, got)) for inputs, got in zip(batches, seen))
    inputs, where = next(found for found in places if found[1])
    text = f"{exercise.name} is not right, and not in a way that this check knows. First difference: {where}."
    text = f"{text} {_read(exercise.read)} seed={seed}"
    return CheckFailed(_with_example(exercise, text, inputs), ["unknown"])


# %%
print(_unknown(DPO_LOSS, batches, [twice(*b) for b in batches], seed=1))


# %% [markdown]
# Look at the two numbers of the second message: one is twice the other. A student who sees that needs no name for the mistake.
#
# Then there are answers without any numbers to compare. An assignment is handed out with `...` where the answer belongs, so such a function has not been begun, and "wrong" would be the wrong word. How do we know? Its compiled code does nothing: it loads a constant and returns it. A function that computes everything and forgets the `return` gives `None` too, and must hear another sentence.

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


# %%
def kept_for_itself(c, r, rc, rr, beta): loss = right(c, r, rc, rr, beta)

is_stub(stub), is_stub(kept_for_itself)


# %% [markdown]
# A function may also stop with an error. Then the student hears the class of the error, its text, and the shapes and kinds of numbers that the function was called with, for most such errors are about these.

# %%
#| export
def _shapes(inputs) -> str:
    "What a function was called with, in a few words."
    def word(x):
        if isinstance(x, Tensor):
            where = "" if x.device.type == "cpu" else f" on {x.device}"
            return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}{where}"
        return f"{x:.4g}" if isinstance(x, float) else getattr(x, "__name__", type(x).__name__)
    return ", ".join(map(word, inputs)) or "nothing"

def _failed(exercise, kind, text, about="") -> CheckFailed:
    "The exception for an answer without numbers to compare."
    place = exercise.elsewhere.get(about, exercise.read)
    return CheckFailed(f"{exercise.name}{text}. {_read(place)}", [kind])

def _empty(exercise, f=None):
    "The exception where nothing came back: not begun, or begun and not returned."
    begun = f is not None and not is_stub(f)
    what = exercise.idle if begun else "returns nothing yet: replace the `...` by your code"
    return _failed(exercise, "empty", f" {what}")

def _in_words(e) -> str: return f"{type(e).__name__}: {e}".splitlines()[0][:90].rstrip(": ")

def _stopped(exercise, inputs, e):
    "The exception for a function that stops with an error."
    what = _in_words(e)
    if "bitwise_xor" in what or "for ^" in what: what += " (in Python, a power is `**`)"
    called = f"It was called with {_shapes(inputs)}"[:100]
    return _failed(exercise, "stopped", f" stops with {what}. {called}")

def _stopped_at_edge(exercise, mistake, e):
    "The exception for a function that stops, or returns another kind of thing, in an extreme case only."
    if isinstance(e, WrongForm): return _failed(exercise, "form", f": {e}", mistake)
    tried = exercise.says[mistake].removesuffix(".")
    return _failed(exercise, "stopped", f" stops with {_in_words(e)}. It was tried for this: {tried}", mistake)

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
# A function that adds up words, one that takes a power as in a formula, one that is still empty, and one that keeps its result for itself:

# %%
def words(c, r, rc, rr, beta): return c + "beta"
def power(c, r, rc, rr, beta): return c^2

for f in (words, power, stub, kept_for_itself):
    try: _run(DPO_LOSS, f, batches[0])
    except CheckFailed as e: print(e)


# %% [markdown]
# ## The check
#
# All together, in the order in which a student should hear of it: is there an answer, is it the student's own, has it the right form, are the numbers right, and what happens at the edges? What comes earlier would make nonsense of what comes later: there is no use in comparing the numbers of a function that stops with an error, and none in trying the edge of a function whose ordinary numbers are wrong. One exception to the last: a clamped loss may show in the batches with numbers that fit no
# switch, since we do not know where the student has cut. So may a log of a sigmoid in fp32, which is infinite there much sooner than ours in fp64. So edges that are `telling` are looked at, too, before a check says that it does not know.
#
# A function may stop with an error at an edge, and nowhere else. That need not be the mistake that the edge looks for: NumPy, for example, has no bf16. So the student hears the error, and what was tried.
#
# `diagnose` does this without asking whose function it is. Not asking is useful: the crooked functions can be diagnosed, too, and so the checks themselves be tested.

# %%
#| export
def _is_at_edge(test, f, seed) -> bool|BaseException:
    "Whether f makes a mistake in an extreme case; the error, where it stops there."
    g = torch.Generator().manual_seed(seed)
    try: return bool(test(f, g))
    except (Exception, SystemExit) as e: return e

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
        if wrong: raise _diagnosis(exercise, wrong, seed, inputs=batches[0])
        if wrong is None:
            for mistake in exercise.telling:
                makes_it = _is_at_edge(exercise.edges[mistake], f, seed)
                if makes_it is True: raise _diagnosis(exercise, [mistake], seed, exactly=False)
            raise _unknown(exercise, batches, seen, seed)
    found = {mistake: _is_at_edge(test, f, seed) for mistake, test in exercise.edges.items()}
    made = [mistake for mistake in found if found[mistake]]
    if not made: return
    if found[made[0]] is not True: raise _stopped_at_edge(exercise, made[0], found[made[0]])
    also = [part for part in exercise.parts if part in made and not made[0].startswith(part)]
    raise _diagnosis(exercise, made[:1], seed, exactly=False, also=also)


# %%
caught = {}
for mistake in DPO_LOSS.says:
    try: diagnose(DPO_LOSS, partial(_dpo_loss, wrong=(mistake,)), seed=1)
    except CheckFailed as e: caught[mistake] = e.mistakes
assert caught == {mistake: (mistake,) for mistake in DPO_LOSS.says}
print(f"{len(caught)} mistakes made on purpose, each named as itself")


# %% [markdown]
# `run_check` puts the first two questions in front of it: is there an answer, and is it the student's own? It also draws the seed. A check of the course is then one line, with a signature that tells the student what is wanted.

# %%
#| export
def run_check(
    exercise: Exercise, # what is asked for
    f,          # the answer
    seed: int,  # of the numbers; None: fresh ones
) -> int:       # the seed
    "Check an answer, print that it passed, or raise CheckFailed."
    if is_empty(f): raise _empty(exercise)
    foreign = foreign_name(f)
    if not callable(f):
        if exercise.draw: raise _failed(exercise, "form", f": {kind_of(f)}, not a function")
        f = partial(copy.deepcopy, f)                    # numbers or a table, not a function that makes them
    if foreign: raise _failed(exercise, "own_work", f": {foreign} is the package's own; write it yourself")
    if seed is None: seed = random.SystemRandom().randrange(1_000_000)
    diagnose(exercise, f, seed)
    print(f"check_{exercise.name}: passed (seed {seed})")
    return seed

def check_dpo_loss(
    f,              # (chosen, rejected, ref_chosen, ref_rejected, beta) -> (n,) loss of each pair
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check a DPO loss of four log-probabilities a pair, (n,) each, in nats."
    return run_check(DPO_LOSS, f, seed)


# %% [markdown]
# ## The five again
#
# Now we are students. First the five who came past the first try, then four more: two that are wrong in form, one with a clamp at another place than ours, and the one with the double loss. (`said` is for this chapter: it returns the message. In an assignment, the message stands under the cell.)

# %%
def said(check, f, seed=1):
    try: check(f, seed=seed)
    except CheckFailed as e: return str(e)
    return "passed"

def mean(*args): return right(*args).mean()
def broadcast(c, r, rc, rr, beta): return right(c[:, None], r[:, None], rc, rr, beta)
def clamped(c, r, rc, rr, beta): return -torch.sigmoid(beta * (c - r - rc + rr)).clamp(1e-6).log()

five = (stub, borrowed, without_beta, log_of_sigmoid, two_at_once)
with contextlib.redirect_stdout(io.StringIO()):
    heard = {f.__name__: said(check_dpo_loss, f) for f in (*five, mean, broadcast, clamped, twice, right)}
assert [name for name, message in heard.items() if message == "passed"] == ["right"]
for name, message in heard.items(): print(f"{name:14} {message}\n")


# %% [markdown]
# Each of the five hears another sentence, and the sentence is about what *this* student did. `clamped` cuts at 1e-6, where our switch cuts at 1e-8: no switch has its numbers, and the edge finds it all the same.
#
# And right answers? One line of a formula can be written in many ways, and a check that accuses one of them is worse than none. Three other ways, one of them in fp32, with a hundred seeds each:

# %%
def with_exp(c, r, rc, rr, beta): return torch.logaddexp(torch.zeros_like(c), -beta * ((c - rc) - (r - rr)))
def with_softplus(c, r, rc, rr, beta): return F.softplus(beta * (rc - c) - beta * (rr - r))
def in_single(*args): return right(*[a.float() if isinstance(a, Tensor) else a for a in args])

alarms = 0
for f, seed in itertools.product((with_exp, with_softplus, in_single), range(100)):
    with contextlib.redirect_stdout(io.StringIO()): alarms += said(check_dpo_loss, f, seed) != "passed"
assert alarms == 0
f"{alarms} false alarms in 300 checks"


# %% [markdown]
# ## A mistake that nobody knew
#
# Suppose that a second student hands in the double loss. Then it is a usual mistake, and deserves a name. That takes one line in the crooked function and one sentence:

# %%
def with_twice(*args, wrong=()): return _dpo_loss(*args, wrong=wrong) * (2 if "twice" in wrong else 1)

wiser = dataclasses.replace(
    DPO_LOSS,
    crooked=with_twice,
    says=DPO_LOSS.says | dict(twice="it is twice the loss."),
)
try: diagnose(wiser, twice, seed=1)
except CheckFailed as e: print(e)

# %% [markdown]
# The new switch also enters all pairs, so "twice, and $\beta$ forgotten" is known from now on as well. A catalogue of mistakes grows in this way: first a message with two numbers, then a look at the student's code, then a switch. The switches `one_beta`, `rejected_added` and `clamped` were not in the first list, and came like this.
#
# ## What this does not show
#
# - A check knows the mistakes that somebody has thought of. How many of a class's mistakes those are, only a class can say.
# - Two different mistakes may have the same numbers in all batches. Then the check names the one that it tries first. It is right about the numbers, and may be wrong about what the student thought.
# - It sees numbers, not understanding. A student who tries things until the check is silent has learned something else than the loss. The questions by hand are for that.
# - It runs in the student's own process, where everything can be patched. So points are given [elsewhere](21_course.ipynb), by a grader that starts the checks in a process of its own.
#
# ## What you now have
#
# - `Exercise`: a crooked function, a drawing of inputs, a form, edges, and a sentence for each mistake.
# - `find_mistakes`: the fewest switches that give exactly the student's numbers.
# - `diagnose` and `run_check`: the questions in their order, and one `CheckFailed` with at most 300 characters.
# - `check_dpo_loss`, the first check of the course.
#
# ## Questions to test yourself
#
# 1. Why does no batch have $\beta = 1$?
#
# <details><summary>Answer</summary>
#
# With $\beta = 1$ a forgotten $\beta$ is right, and so is one that stands outside the logarithm. The switches `no_beta`, `outside`, `inverse` and `one_beta` would give the right numbers.
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
# Make an exercise like `wiser` with a switch `clipped`, which cuts the gain to $[-5, 5]$ nats, and a sentence for it. Which seeds name it?
#
# <details><summary>What you should see</summary>
#
# All of them: the gains have a standard deviation of 20 nats, so among the 21 pairs of a check many are beyond 5.
#
# </details>
