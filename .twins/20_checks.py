# %% [markdown]
# # Seventeen exercises and their mistakes
# > What students are asked to write, how it goes wrong, and what the check says then.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/20_checks.ipynb)
#
# **You should know** how a check finds a mistake ([chapter 19](19_mistakes.ipynb)): each mistake is a switch in a *crooked* function, and the fewest switches that give exactly the student's numbers are the diagnosis. If you only want to solve the assignments, you need nothing from here.
#
# **Time**: this is a chapter to look things up in. An exercise takes about ten minutes to read with its code, a third of that without; "The catalogue" and "The last cell of an assignment" take a quarter of an hour. To run: under a minute on two CPU cores.
#
# The seventeen exercises belong to four assignments. Each section below is about one of them and has the same parts:
#
# 1. the question, as a student meets it;
# 2. the crooked function, and how its inputs are drawn, so that the mistakes can be told apart;
# 3. where numbers are not enough, the *edges* or the *spies*;
# 4. the sentences, and the check;
# 5. two or three wrong answers, and what is said to each.
#
# If you teach, read 1 and 5 of the exercises that you hand out. The last line of a section, *Ask*, is a question for the class when several students have heard the same message.

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
import contextlib, copy, dataclasses, io, itertools, math, operator, random, re
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import t as student_t
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sdpo_nb import __version__
from sdpo_nb.mistakes import (               # some of them only to be found here by assignments and graders
    BETAS, DPO_LOSS, GIVEN, LIMIT, SIZES, CheckFailed, Exercise, WrongForm, alike, call,
    check_dpo_loss, diagnose, draw_batches, find_mistakes, foreign_name, is_empty, is_stub, kind_of,
    per_pair, run_check, score
)
from sdpo_nb.world import answer, make_model, make_prompts, make_tokenizer, prompt_ids

# %%
import time

torch.set_num_threads(1)
pd.set_option("display.width", 200, "display.max_columns", 30)
pd.set_option("display.max_colwidth", 300, "display.max_rows", 200)


# %% [markdown]
# ## Forms of an answer
#
# The loss of chapter 19 has one number per pair. Other exercises ask for a single number, a count, or lists of row numbers. A *form* turns what a student returned into something that can be compared, and is generous where nothing is learned from strictness: a float, a tensor with one element and a NumPy number are the same answer.

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
    try: return float(None if isinstance(answer, (str, bytes)) else answer)      # float("0.5") is one half
    except (TypeError, ValueError): raise WrongForm(f"it returns {kind_of(answer)}, not a number") from None

def whole_number(
    answer,        # what the student's function returned
    inputs: tuple, # what it was called with
) -> int:
    "The form of a count. Raises WrongForm, saying what is wrong with it."
    try: return operator.index(answer)
    except TypeError: raise WrongForm(f"it returns {kind_of(answer)}, not a whole number") from None

def lists_of_rows(
    answer,        # what the student's function returned
    inputs: tuple, # what it was called with
) -> list:
    "The form of a partition. Raises WrongForm, saying what is wrong with it."
    try: return [[operator.index(row) for row in chunk] for chunk in answer]
    except TypeError: raise WrongForm(f"it returns {kind_of(answer)}, not lists of row numbers") from None

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
# The third form takes any iterable of iterables, and the second anything that can be an index, but no float: 3.0 tokens would be a sign that somebody has divided.
#
# `said` is for this page. It returns the message that would stand under the student's cell.

# %%
#| export
EXERCISES = {DPO_LOSS.name: DPO_LOSS}


# %%
def said(check, f, seed=1):
    try: check(f, seed=seed)
    except CheckFailed as e: return str(e)
    return "passed"

said(check_dpo_loss, torch.ones(3))


# %% [markdown]
# ## A loss from four numbers
#
# Assignment 1, after chapters [02](02_logprobs.ipynb) and [03](03_loss.ipynb). The DPO loss itself is its second question; chapter 19 has taken that apart.
#
# ### The log-probability of a response
#
# **The question.** Rows of logits, token ids and a mask that is true at the response tokens. What is $\log\pi(y|x)$, one number a row?
#
# The answer has four steps: shift, gather, mask, sum. Each can go wrong alone, so there are many mistakes. Five of them are about the shift. Logits at position $i$ speak about token $i+1$. In `no_shift` they are read as if they spoke about token $i$; in `late` the shift goes in the wrong direction, with the mask going along or (`late_cut`) cut the right way; in `mask_unshifted` logits and ids are shifted
# and the mask is forgotten; and whoever cuts the response out first, and shifts inside of it, never scores its first token (`no_first`). All of them give negative numbers of a likely size, and a model that is trained with them gets a falling loss.
#
# The others are about one step each. `raw` adds logits that were never normalised, and `probs` adds probabilities, so a long response gets a large number. `vocab_dim` takes the softmax over positions, where the shapes allow it and nobody complains. `negative` comes from `cross_entropy`, which is *minus* the log-probability; a loss of such numbers trains the rejected responses. And `no_eos` leaves out the last token. Where a
# response ends is a choice of the model, too: a policy that is never told to stop learns to go on.

# %%
#| export
def _sequence_logps(logits, ids, mask, wrong=()):
    if "all_tokens" in wrong: mask = torch.ones_like(mask)
    if "no_eos" in wrong: mask = mask & mask.roll(-1, 1)
    if "no_first" in wrong: mask = mask & mask.roll(1, 1)
    if "detached" in wrong: logits = logits.detach()
    if logits.dtype == torch.bfloat16 and "half" not in wrong: logits = logits.float()

    dim = 1 if "vocab_dim" in wrong else -1
    scores = logits.log_softmax(dim)
    if "unstable" in wrong: scores = logits.softmax(dim).log()
    if "floored" in wrong: scores = (logits.softmax(dim) + 1e-10).log()
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


# %% [markdown]
# Unequal lengths are what tells these apart. Where all prompts are equally long and nothing is padded, `all_tokens` differs by a constant and looks like a trained model. And no response has a single token, since there the mean is the sum, and to leave out the last token would leave nothing.

# %%
logits, ids, mask = _draw_rows(torch.Generator().manual_seed(0), 3, 0.1)
mask.int()


# %% [markdown]
# The edges: 40 tokens in bf16, which must be added up in fp32 (bf16 keeps about three digits, and the check allows a hundredth of a nat); a gradient; and a logit so low that its probability is zero, where `log(softmax)` is minus infinity. Whoever mends that with `+ 1e-10` or a `.clamp` gives the same number to all tokens that are unlikely enough. So logits are made a thousand and two thousand times as large: with the second, an unlikely token must have become less likely still.

# %%
#| export
def _sums_in_half(f, g):
    logits, ids, mask = _draw_rows(g, 3, 0.1, 40, 41)
    logits = logits.bfloat16()
    right = _sequence_logps(logits.double(), ids, mask)
    return not torch.allclose(f(logits, ids, mask).double(), right, atol=1e-2)

def _logps_have_no_gradient(f, g):
    logits, ids, mask = _draw_rows(g, 3, 0.1)
    return not f(1 * logits.requires_grad_(), ids, mask).requires_grad        # 1 *: it may be changed in place

def _logps_die_far_away(f, g):
    logits, ids, mask = _draw_rows(g, 3, 0.1)
    return not f(1000 * logits, ids, mask).isfinite().all()

def _logps_stop_falling(f, g):
    logits, ids, mask = _draw_rows(g, 8, 0.1)
    near, far, farther = (f(times * logits, ids, mask) for times in (1, 1000, 2000))
    return ((far < near - 1) & torch.isclose(far, farther) & farther.isfinite()).any()


# %%
def makes(test, *wrong):
    g = torch.Generator().manual_seed(0)
    return bool(test(partial(_sequence_logps, wrong=wrong), g))

edges = dict(
    half=_sums_in_half, detached=_logps_have_no_gradient, unstable=_logps_die_far_away, floored=_logps_stop_falling)
print("right:", [makes(test) for test in edges.values()])
print("wrong:", [makes(test, mistake) for mistake, test in edges.items()])

# %% [markdown]
# The sentences. Most of the mistakes are explained in "One response, by hand", those of the mask in "A batch", and the sum and fp32 have sections of their own; `elsewhere` says so, and the message sends the student there.

# %%
#| export
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
        no_first="the first response token is left out; logits at the last prompt token score it.",
        probs="probabilities are added; add their logarithms.",
        raw="raw logits are added; take log_softmax first.",
        vocab_dim="the softmax runs over positions; it must run over the vocabulary.",
        half="with bf16 logits it loses digits: compute in fp32.",
        detached="no gradient reaches the logits: something is detached.",
        unstable="log(softmax) is -inf for unlikely tokens; log_softmax is not.",
        floored="all very unlikely tokens count the same: clamped, or something is added. Use log_softmax.",
    ),
    edges=dict(
        half=_sums_in_half,
        detached=_logps_have_no_gradient,
        unstable=_logps_die_far_away,
        floored=_logps_stop_falling,
    ),
    telling=("floored",),
    elsewhere=dict(
        mean=("02", "Sum or mean?"),
        half=("02", "Why is the sum made in fp32?"),
        all_tokens=("02", "A batch"),
        no_eos=("02", "A batch"),
        mask_unshifted=("02", "A batch"),
    ),
)


# %% [markdown]
# What a student calls. The comment of `f` is the whole specification: what comes in, with shapes, and what is wanted.

# %%
#| export
def check_sequence_logps(
    f,              # (logits (n, L, V), ids (n, L), mask (n, L)) -> (n,) log-probability of each response
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check the log-probability of responses. The mask is true at the response tokens themselves."
    return run_check(EXERCISES["sequence_logps"], f, seed)


# %% [markdown]
# A right answer of another kind, with a loop and in fp32; one that forgets the shift; and one that takes the mean, which is another method ([chapter 02](02_logprobs.ipynb) says when one may want it):

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

def averaged(logits, ids, mask): return with_a_loop(logits, ids, mask) / mask.sum(1)

for f in (with_a_loop, unshifted, averaged): print(said(check_sequence_logps, f))


# %% [markdown]
# *Ask:* a model gives token 1 the probability 3/4 after the prompt. In which row of the logits does that stand?
#
# ### The slope of the loss
#
# **The question.** What is the derivative of the loss of a pair in $\gamma_\theta$? Write the formula, $-\beta\,\sigma(-\beta\Delta)$, equation (7) of [chapter 03](03_loss.ipynb).
#
# It is one line, and it has three places for an error. $\beta$ stands in it twice, and either can be lost. The sigmoid has a sign, and `other_side` gives the largest weight to the pairs that are ranked right already: such a "gradient" pulls hardest where nothing is left to do. And `no_log` is the derivative of $\sigma(z)$, not of its logarithm; it vanishes on *both* sides, so the worst pairs are not
# trained.

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
    if "autograd" in wrong: torch.ones(1, requires_grad=True).exp()              # keeps a tensor
    return slope

def _draw_gammas(g, n, beta):
    return *(5 * torch.randn(2, n, dtype=torch.float64, generator=g)), beta


# %% [markdown]
# Is the formula the derivative? Autograd says so, and the crooked function is right without switches:

# %%
gamma_theta, gamma_ref, beta = _draw_gammas(torch.Generator().manual_seed(0), 3, 0.1)
gamma_theta.requires_grad_()
loss = F.softplus(-beta * (gamma_theta - gamma_ref)).sum()
(slope,) = torch.autograd.grad(loss, gamma_theta)
assert alike(slope, _gradient(gamma_theta, gamma_ref, beta).detach())
slope


# %% [markdown]
# A student could let autograd do it, and the numbers would be right. But the formula is what is asked for: it shows why a pair that is far enough ahead stops pulling. To go backwards, torch must keep tensors of the way forwards, and it can be told to ask us before it keeps one. So the edge says no. A formula does not notice, because none of its inputs asks for a gradient. A solution with autograd stops, whichever of torch's functions it calls. (A finite difference passes, and so does a derivative in forward mode: they keep nothing.)

# %%
#| export
def _needs_autograd(f, g):
    def refuse(tensor): raise RuntimeError("no gradients here")
    try:
        with torch.autograd.graph.saved_tensors_hooks(refuse, refuse): f(*_draw_gammas(g, 3, 0.1))
    except RuntimeError: return True
    return False


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

def check_gradient(
    f,              # (gamma_theta (n,), gamma_ref (n,), beta) -> (n,) slope of the loss of each pair
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check the derivative of the DPO loss of a pair in gamma_theta."
    return run_check(EXERCISES["gradient"], f, seed)


# %%
def by_autograd(gamma_theta, gamma_ref, beta):
    gamma_theta = gamma_theta.clone().requires_grad_()
    loss = F.softplus(-beta * (gamma_theta - gamma_ref)).sum()
    return torch.autograd.grad(loss, gamma_theta)[0]

print(said(check_gradient, by_autograd))
print(said(check_gradient, lambda t, r, beta: -beta * torch.sigmoid(beta * (t - r))))


# %% [markdown]
# The first has no line "Your numbers are exactly ...": its numbers are right, and what is wrong is the way. *Ask:* for a gain of $-20$, $0$ and $+20$ nats at $\beta = 0.1$, which slope is the steepest? (At $-20$: the pair that is most wrong.)
#
# ### Another loss: IPO
#
# **The question.** IPO (arXiv 2310.12036) wants the gain of every pair to be $\frac{1}{2\beta}$, and punishes what is off by its square: $(\Delta - \frac{1}{2\beta})^2$. Write it.
#
# The loss is not in the package, so nobody can look it up there. What goes wrong is mostly the goal: `1/2*beta` is $\beta/2$ in Python; some remember $1/\beta$; and $(\beta\Delta - \frac12)^2$ has its minimum at the same gain, but is $\beta^2$ times as large, so that $\beta$ becomes a learning rate. `hinge` is a thoughtful mistake: why should a gain that is too *large* cost anything? Because IPO is meant to stop there. That is its
# main difference from DPO, which always wants more.

# %%
#| export
def _ipo(gamma_theta, gamma_ref, beta, wrong=()):
    if "detached" in wrong: gamma_theta = gamma_theta.detach()
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


# %%
gamma_theta = torch.linspace(0, 20, 5)
ways = {wrong: _ipo(gamma_theta, 0.0, 0.1, (wrong,)) for wrong in ("right", "times_beta", "hinge", "dpo")}
pd.DataFrame(ways, index=[f"gain {gain:.0f}" for gain in gamma_theta]).round(2)


# %% [markdown]
# The right loss is zero at a gain of $1/(2\beta) = 5$ nats and rises on both sides. `times_beta` is zero there too, and a hundredth of it elsewhere. `hinge` agrees up to 5 nats, so a check whose gains were all small would call it right: these have a standard deviation of seven nats, and $1/(2\beta)$ lies between 0.25 and 10. And the loss of DPO falls for ever.

# %%
#| export
def _ipo_has_no_gradient(f, g):
    gamma_theta, *others = _draw_gammas(g, 3, 0.1)
    return not f(1 * gamma_theta.requires_grad_(), *others).requires_grad

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
        detached="no gradient reaches gamma_theta: something is detached.",
    ),
    edges=dict(detached=_ipo_has_no_gradient),
)

def check_ipo(
    f,              # (gamma_theta (n,), gamma_ref (n,), beta) -> (n,) (gain - 1 / (2 beta))^2
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check the loss of IPO."
    return run_check(EXERCISES["ipo"], f, seed)


# %%
print(said(check_ipo, lambda t, r, beta: (t - r - 1/2*beta) ** 2))
print(said(check_ipo, lambda t, r, beta: (beta * (t - r) - 0.5) ** 2))
print(said(check_ipo, lambda t, r, beta: (1 / (2 * beta) - (t - r)).clamp(min=0) ** 2))

# %% [markdown]
# *Ask:* which of the two losses, DPO or IPO, has a minimum for a single pair, and where?
#
# ### Predictions
#
# **The question.** Seven numbers that a student should know before any code runs: the first loss of a policy that is its own reference; loss and weight at a gain of 20 nats and $\beta = 0.1$; the gain at which smoothing 0.1 settles one pair; and three comparisons of $\beta=1$ with $\beta=4$: which ends nearer to S, and which has moved farther after three steps, of plain descent and of Adam.
#
# These are no functions, so there is nothing to draw. But a wrong number has its usual reasons, too: a logarithm of another base, the other side of a sigmoid, a $\beta$ in the wrong place. Each reason gives *a* wrong number, and we can list it. That is the idea of chapter 19 once more, with numbers in the place of functions.
#
# How the right ones come about, for a class that wants to see it on the board:
#
# - `first_loss`: the gain is 0, so the loss is $-\log\sigma(0) = \log 2$.
# - `loss` and `weight`: $\beta\Delta = 2$, so the loss is $\log(1+e^{-2})$, and the weight of the pair in the gradient $\lambda = \sigma(-2)$. They are nearly equal, because $\log(1+x)\approx x$ for a small $x$. A student who notices this has looked at the formulas.
# - `settles`: smoothing 0.1 wants $\sigma(\beta\Delta) = 0.9$, and therefore $\beta\Delta = \log 9$.
# - `nearer`: at the optimum, $\beta$ is the price of leaving S, so the larger one stays nearer. `farther_sgd`: in the first steps it is the other way round, for the slope has a $\beta$ in front. `farther_adam`: Adam divides the size of the gradient out again, so neither. These three stand next to each other on purpose. Together they say that "what does $\beta$ do?" has no answer without "when?".

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
# An answer is right within one percent. So each reason needs a number of its own, farther than that from the right one and from the others; otherwise the check could name the wrong reason. The assertion under the next cell says that this holds. A number within five percent that is none of these has only been rounded too far, and hears that.

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
    if not isinstance(answers, dict): raise WrongForm(f"a dict is wanted, not {kind_of(answers)}")
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
    except WrongForm: raise WrongForm(f"{key} is {kind_of(value)}, not a number{quotes}", key) from None


# %%
values = {key: [v for k, v, _ in _NEAR.values() if k == key] for key in PREDICTIONS}
for key, near in values.items():
    for a, b in itertools.combinations([PREDICTIONS[key], *near], 2): assert not _close(a, b)
{key: round(value, 4) for key, value in PREDICTIONS.items()}


# %% [markdown]
# What is looked at, in order: the near misses, then digits, then "wrong, in a way that this check does not know". An answer has seven parts, so the message begins with the part, and lists what else is wrong. Otherwise a student would run the check seven times.

# %%
#| export
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
    return run_check(EXERCISES["predictions"], answers, seed)


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
# The guess of the first line has a logarithm to base 2 in `settles`: $\log_2 9 / 0.5 = 6.34$. In the second, `loss` is named among the others; on its own it would hear that 0.13 has too few digits. *Ask:* why is the first loss 0.693 for every model, every data set and every $\beta$?
#
# ## Which data first
#
# Assignment 2 is about tokens and counting ([chapter 01](01_preferences.ipynb) and [chapter 05](05_partition.ipynb)). Its answers are whole numbers and shares, and are compared like all others.
#
# ### Where the response begins
#
# **The question.** Three lists of ids: the prompt alone, and the prompt together with each response. How many tokens do all three share?
#
# It looks as if the answer were the length of the prompt. It is not, because a tokenizer may merge the end of the prompt with the beginning of a response: "the" and "re" become "there". Then the last prompt token is another one than in the prompt alone, and a boundary at `len(prompt)` cuts a token that belongs to the response, or counts one that nobody chose. And the two responses may merge at different
# places; the boundary must serve both, for it is one prompt.

# %%
#| export
def _common(*rows) -> int:
    "Length of the longest common prefix."
    n = 0
    while all(len(row) > n for row in rows) and len({row[n] for row in rows}) == 1: n += 1
    return n

def _boundary(prompt, chosen, rejected, wrong=()):
    n = _common(prompt, chosen, rejected)
    if "larger" in wrong: n = max(_common(prompt, chosen), _common(prompt, rejected))
    if "no_break" in wrong: n = sum(len(set(ids)) == 1 for ids in zip(prompt, chosen, rejected))
    if "prompt_length" in wrong: n = len(prompt)
    if "chosen_only" in wrong: n = _common(prompt, chosen)
    if "rejected_only" in wrong: n = _common(prompt, rejected)
    if "responses_only" in wrong: n = _common(chosen, rejected)
    if "characters" in wrong: n = _common(*map(str, (prompt, chosen, rejected)))
    if "off_by_one" in wrong: return n - 1
    return n + 1 if "one_more" in wrong else n

def _draw_ids(g, n, beta):
    """A prompt, one of whose tokens is another one in both rows, or in one of them: there it is 50.
    Behind it, the ids are those of the prompt again. In one batch it is the last token of the prompt."""
    prompt = torch.randint(10, 50, (n + 4,), generator=g).tolist()
    whole = len(prompt)
    k = whole - 1 if n == 6 else int(torch.randint(1, whole - 1, (1,), generator=g))
    kept = {2: (whole, k), 4: (k, whole), 1: (whole, whole)}.get(n, (k, k))
    ends = [[50, *prompt[end + 1:]] for end in kept]
    chosen, rejected = ([*prompt[:end], *rest, *range(side, side + n)] for end, rest, side in zip(kept, ends, (60, 70)))
    return prompt, chosen, rejected


# %% [markdown]
# So the prompt is changed in both rows, or in one of them, or in none, and at a place that is drawn. Behind that place the ids are equal again: whoever counts equal positions, and does not stop at the first that differs, must get another number. In this one the chosen row keeps the whole prompt of six tokens, and the
# rejected row differs at one token:

# %%
_draw_ids(torch.Generator().manual_seed(1), 2, 0.1)

# %% [markdown]
# The boundary is where the 50 stands in the rejected row. Who compares the prompt with the chosen row only says 6, and so does who counts the prompt. Who counts the equal positions says 5.
#
# `characters` is what comes out when texts are compared, and not ids. In the tiny world every token is one character, so a test there could not tell the two apart; these ids have two digits.

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
        no_break="ids that agree behind the first difference are counted, too; stop there.",
        larger="it is the longer of the two common beginnings; take the shorter.",
        prompt_length="it is the length of the prompt; its last tokens may merge with a response.",
        chosen_only="only the chosen row is compared; the boundary must serve both.",
        rejected_only="only the rejected row is compared; the boundary must serve both.",
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
    return run_check(EXERCISES["boundary"], f, seed)


# %%
print(said(check_boundary, lambda prompt, chosen, rejected: len(prompt)))
print(said(check_boundary, lambda prompt, chosen, rejected: _common(prompt, chosen, rejected) - 1))


# %% [markdown]
# *Ask:* what is trained, and on what condition, if the boundary of a pair is one token too late?
#
# ### Right, wrong, tie
#
# **The question.** From $\gamma$ and $\gamma_{ref}$, one verdict a pair: 1 where the policy finds the chosen response likelier than its reference does, 0 where it does not, one half at a tie.
#
# Why a half? At the first step of a stage the policy *is* its reference, so every pair is a tie. If a tie counts as wrong, the accuracy begins at 0.0 and jumps in the first step; if it counts as right, it begins at 1.0. Neither is news about the model.
#
# `soft` takes $\sigma(\gamma-\gamma_{ref})$ for the verdict. That is a sensible number, a probability in fact, but its mean is no share of pairs: one pair that is right by 30 nats would count as much as one that is right by five, and both nearly twice as much as one that is right by a tenth.

# %%
#| export
def _accuracy(gamma, gamma_ref, wrong=()):
    if "no_ref" in wrong: gamma_ref = torch.zeros_like(gamma)
    gain = gamma - gamma_ref
    if "near" in wrong: gain = gain * ~torch.isclose(gamma, gamma_ref)
    if "worse" in wrong: gain = -gain
    tie = dict(strict=0., weak=1.)
    half = next((value for mistake, value in tie.items() if mistake in wrong), 0.5)
    verdict = (gain > 0).double() + half * (gain == 0)
    if "soft" in wrong: verdict = torch.sigmoid(gain)
    return verdict if "nan" in wrong else verdict.where(~gain.isnan(), math.nan)      # in either of the two

def _draw_whole_gammas(g, n, beta):
    return tuple(torch.randint(-2, 3, (2, 2 * n), generator=g).double())


# %% [markdown]
# Random real numbers are never equal, so with the inputs of the other exercises `strict` and `weak` would both be right. Here the gammas are whole numbers from $-2$ to 2, so ties are common.

# %%
gamma, gamma_ref = _draw_whole_gammas(torch.Generator().manual_seed(1), 3, 0.1)
ways = {wrong: _accuracy(gamma, gamma_ref, (wrong,)) for wrong in ("right", "strict", "weak", "no_ref")}
pd.DataFrame(ways).T


# %% [markdown]
# Look at the pairs where `strict` and `weak` differ. Only there is a tie, and only there can a check tell the two from the right answer. In the last row the reference is zero, and some verdicts happen to be the same; that is why one batch is not enough.
#
# One edge is NaN. Each comparison with NaN is false, so `gamma > gamma_ref` turns a broken model into one that is wrong about everything. A verdict must stay NaN, or the mistake is found a day later. The reference may be the broken one, so NaN stands once in $\gamma$ and once in $\gamma_{ref}$. The other edge are two numbers that are nearly
# equal. With `isclose`, or in 16 bits, they are a tie; but a tie means that nothing was learned, and here something was. (They are 100 and 100.0005, so a tolerance below 0.0005 passes.)

# %%
#| export
def _judges_nan(f, g):
    gamma, gamma_ref = torch.tensor([[math.nan, 1., 1.], [0., math.nan, 0.]], dtype=torch.float64)
    return not f(gamma, gamma_ref).isnan().tolist() == [True, True, False]

def _calls_near_a_tie(f, g):
    near = torch.tensor([100., 100.0005], dtype=torch.float64)
    return not f(near, near.flip(0)).tolist() == [0., 1.]


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
        nan="NaN in gamma or gamma_ref gets a verdict; it must stay NaN, or a broken model looks bad.",
        near="nearly equal numbers are called a tie (isclose? 16 bits?).",
    ),
    edges=dict(nan=_judges_nan, near=_calls_near_a_tie),
)

def check_accuracy(
    f,              # (gamma (n,), gamma_ref (n,)) -> tensor (n,): 1 right, 0 wrong, 0.5 tie, NaN stays NaN
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check the verdicts of the reward accuracy."
    return run_check(EXERCISES["accuracy"], f, seed)


# %%
print(said(check_accuracy, lambda gamma, gamma_ref: (gamma > gamma_ref).float()))
print(said(check_accuracy, lambda gamma, gamma_ref: (gamma > gamma_ref) + 0.5 * (gamma == gamma_ref)))


# %% [markdown]
# *Ask:* a library logs an accuracy of 0.0 at step 0 and of 0.55 at step 1. Did the model learn that fast?
#
# ### Every prompt counts the same
#
# **The question.** Verdicts, and for each pair the number of its prompt. What is the mean over prompts of the mean over their pairs?
#
# Some data sets have ten pairs for one prompt and one for another. In a mean over pairs, the first prompt counts ten times. And pairs of one prompt are alike, so an interval that takes them for independent is too narrow ([chapter 05](05_partition.ipynb)).

# %%
#| export
def _by_prompt(right, prompt_id, wrong=()):
    groups = {}
    for value, prompt in zip(right.tolist(), prompt_id.tolist()): groups.setdefault(prompt, []).append(value)
    if "by_pair" in wrong: return right.mean().item()
    if "gaps" in wrong: return math.nan
    if "runs" in wrong:
        neighbours = itertools.groupby(zip(prompt_id.tolist(), right.tolist()), key=operator.itemgetter(0))
        groups = {i: [value for _, value in run] for i, (_, run) in enumerate(neighbours)}
    if "singles_dropped" in wrong: groups = {p: values for p, values in groups.items() if len(values) > 1}
    if "negative" in wrong: groups = {p: values for p, values in groups.items() if p >= 0}
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


# %% [markdown]
# For this to show, prompts must have different numbers of pairs. One prompt here has a single pair and one has at least two, in whatever order; what comes on top is drawn.

# %%
_draw_prompts(torch.Generator().manual_seed(0), 1, 0.1)


# %% [markdown]
# The numbers of the prompts have gaps (3, 5, 7, 11), and equal ones need not be neighbours. `gaps` is a `bincount`, which also counts the prompts 0, 1 and 2: their mean is 0/0. `runs` is a `groupby` without sorting. Verdicts may be one half, as in the exercise before. `singles_dropped` is a mistake of habit: a `groupby` that keeps only prompts with "enough" pairs changes which prompts are asked about at all. And `any` answers another question: is there *a* pair on which the model is right? That number rises with the number of pairs.
#
# The edge are numbers below zero. Who counts with a `bincount` and mends the gaps is right until then.

# %%
#| export
def _needs_numbers_from_zero(f, g):
    right, prompt = torch.tensor([1., 0., 0.], dtype=torch.float64), torch.tensor([-2, -2, 5])
    return not math.isclose(one_number(f(right, prompt), ()), 0.25)

EXERCISES["by_prompt"] = Exercise(
    name="by_prompt",
    crooked=_by_prompt,
    draw=_draw_prompts,
    form=one_number,
    read=("05", "How sure is a share?"),
    by_hand="[1, 1, 1, 0], [7, 7, 7, 3] give 0.5",
    says=dict(
        by_pair="it is the mean over pairs. (Tensors as keys of a dict are all different: use .tolist().)",
        gaps="it is NaN: numbers without a pair count as prompts (0/0).",
        runs="only neighbours are grouped; pairs of one prompt may stand anywhere.",
        last_pair="only the last pair of each prompt is used.",
        singles_dropped="prompts with a single pair are left out.",
        any="a prompt counts as right if any of its pairs is; take their mean.",
        negative="the number of a prompt may be any number, also one below zero.",
    ),
    edges=dict(negative=_needs_numbers_from_zero),
)

def check_by_prompt(
    f,              # (right (n,), prompt_id (n,)) -> mean over prompts of the mean over their pairs
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check an accuracy in which every prompt counts the same."
    return run_check(EXERCISES["by_prompt"], f, seed)


# %%
def overwrites(right, prompt_id):
    last = dict(zip(prompt_id.tolist(), right.tolist()))
    return sum(last.values()) / len(last)

print(said(check_by_prompt, lambda right, prompt_id: right.mean()))
print(said(check_by_prompt, overwrites))


# %% [markdown]
# The second keeps a dictionary in which each pair overwrites the one before. *Ask:* two sources have the same accuracy by pairs, and another by prompts. Which number would you sort by? (The chunk is trained pair by pair, but what the number is meant to say is how hard the *source* is. There is no single answer; a good one says which question it answers.)
#
# ### Chunks
#
# **The question.** Sources with an accuracy and a number of pairs each go into $T$ chunks, easy sources first. Pairs are numbered source after source, in the order given. If $T$ is the number of sources, each source is a chunk; otherwise the ordered rows are cut into $T$ parts as equal as possible, the longer ones first. That is what `partition` of chapter 05 does.

# %%
#| export
def _partition(accuracy, sizes, T, wrong=()):
    places = range(len(sizes))
    ranks = sorted(places, key=lambda i: -accuracy[i])
    if "ties" in wrong: ranks = sorted(reversed(places), key=lambda i: -accuracy[i])
    if "ascending" in wrong: ranks = sorted(places, key=lambda i: accuracy[i])
    if "unsorted" in wrong: ranks = list(places)

    starts = [sum(sizes[:i]) for i in places]
    if "renumbered" in wrong: starts = _starts_after_sorting(ranks, sizes)
    sources = [list(range(starts[i], starts[i] + sizes[i])) for i in ranks]
    rows = sum(sources, [])
    n, each = len(rows), len(rows) // T
    larger = [k < n % T for k in range(T)]
    if "larger_last" in wrong: larger = larger[::-1]
    ends = list(itertools.accumulate(each + one_more for one_more in larger))
    if "spread" in wrong: ends = [n * k // T for k in range(1, T + 1)]
    if "lost" in wrong or "uneven" in wrong: ends = [each * k for k in range(1, T + 1)]
    if "uneven" in wrong: ends[-1] = n
    chunks = [rows[start:end] for start, end in zip([0, *ends], ends)]
    if "ceil" in wrong: each = math.ceil(n / T)
    if "ceil" in wrong or "count" in wrong: chunks = [rows[start:start + each] for start in range(0, n, each)]
    if T == len(sizes) and "always_cut" not in wrong: chunks = sources

    if "twice" in wrong: chunks = _overlapping(chunks)
    if "order" in wrong: chunks = [sorted(chunk) for chunk in chunks]
    return chunks

def _starts_after_sorting(ranks, sizes):
    "First rows of the sources, counted in the order of training."
    ends = itertools.accumulate(sizes[i] for i in ranks)
    return {i: end - sizes[i] for i, end in zip(ranks, ends)}

def _overlapping(chunks):
    "Each chunk begins with the last row of the one before."
    before = [[], *(chunk[-1:] for chunk in chunks)]
    return [last + chunk for last, chunk in zip(before, chunks)]

def _draw_sources(g, n, beta):
    """Four sources, two of them equally easy; three times out of six as many chunks as sources.
    Of five chunks, two or three are the larger ones. In one batch sizes differ, and sorting changes their order."""
    sizes = torch.randint(2, 6, (4,), generator=g)
    while n == 5 and sizes.sum() % 5 not in (2, 3): sizes[0] += 1
    if n == 4: sizes = 2 + torch.randperm(4, generator=g)                # all different
    accuracy = 0.5 + torch.randperm(4, generator=g).double() / 8
    accuracy[int(torch.randint(1, 4, (1,), generator=g))] = accuracy[0]
    if n == 4 and (accuracy.diff() <= 0).all(): accuracy = accuracy.flip(0)       # not sorted already
    return accuracy.tolist(), sizes.tolist(), {1: 4, 2: 4, 4: 4, 3: 3, 5: 5, 6: 2}[n]

def _sources_in_words(accuracy, sizes, T): return f"accuracy {accuracy}, sizes {sizes}, T {T}"


# %% [markdown]
# There are four kinds of mistake in it. Wrong order: hard first, not sorted at all, or two equally easy sources in exchanged places (a sort that is not stable, or one that is reversed). Lost rows: `n // T` rows a chunk lose the rest, or give one chunk more. Sizes that are wrong or in another order: `ceil(n / T)` rows a chunk leave a short last chunk or none, and
# `rows[n*t//T:n*(t+1)//T]` is fair, but has its larger chunks anywhere. And rows that are right and then destroyed: the numbers of a chunk are sorted "to be tidy", or counted anew after sorting.

# %%
accuracy, sizes, T = _draw_sources(torch.Generator().manual_seed(0), 3, 0.1)
print(dict(accuracy=accuracy, sizes=sizes, T=T))
_partition(accuracy, sizes, T)

# %% [markdown]
# Accuracies 0.875, 0.625, 0.875 and 0.75: the first and the third source are equally easy and keep their order. Their rows, 0, 1 and 7 to 9, come first; then rows 10 and 11 of the fourth. There are always two equal sources, and half of the batches have as many chunks as sources. Sizes rarely divide by $T$, so lost rows show, and in the batch with five chunks they never do: there two or three rows are left over, because with one left over several of these mistakes are the same. And because the rows of a chunk come from several sources, an order that was destroyed shows, too.

# %%
#| export
EXERCISES["partition"] = Exercise(
    name="partition",
    crooked=_partition,
    draw=_draw_sources,
    form=lists_of_rows,
    shown=_sources_in_words,
    names={"": "chunks", "[]": "chunk {}", "[][]": "place {1} of chunk {0}"},
    by_hand="accuracy [0.6, 0.9], sizes [3, 2], T 2 give [[3, 4], [0, 1, 2]]",
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
        ceil="chunks of ceil(n / T) rows: the last is too short, or missing; sizes differ by one at most.",
        larger_last="the larger chunks come last; they come first.",
        spread="the sizes are right, but the larger chunks must come first.",
        renumbered="rows are numbered after sorting; their numbers count in the order given.",
        always_cut="with as many chunks as sources, each source is a chunk.",
    ),
    elsewhere={mistake: ("05", "From numbers to an order") for mistake in ("ascending", "ties", "unsorted")},
)

def check_partition(
    f,              # (accuracy, sizes, T) -> T lists of row numbers
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check chunks, easy sources first. Row numbers count source after source, in the order given."
    return run_check(EXERCISES["partition"], f, seed)


# %%
def in_the_order_given(accuracy, sizes, T):
    rows = list(range(sum(sizes)))
    if T == len(sizes): return [rows[sum(sizes[:i]):sum(sizes[:i + 1])] for i in range(T)]
    return [chunk.tolist() for chunk in torch.tensor(rows).tensor_split(T)]

said(check_partition, in_the_order_given)


# %% [markdown]
# For rows that fit no switch, the message holds the first row that differs, what the function was called with, and an example. *Ask:* why must two runs of the same command never differ in the order of a tie? (Because each stage begins where the one before it ended: another order of two chunks is another model.)
#
# ## One stage, half the precision
#
# Assignment 3, after [chapter 06](06_trainer.ipynb). Here the *way* matters and not only the result: gradients that are added up, weights that move, a scaler that is called in the right order. A return value would not show it. So `observe` runs the function among spies and reports what they saw; the crooked function goes through the same spies, and the search is the one that you know.
#
# ### Accumulation
#
# **The question.** A model, pairs, a function that computes losses, and a size. Add the gradient of the mean loss to what is in `.grad`, with at most `size` pairs in memory at once.
#
# The classical mistake is the mean of means: each part is divided by its own length, so a pair in a short last part counts more. Well-known trainers had it. The costly mistake is `kept`: all parts are computed, their sum goes backwards once, the gradient is right, and not a byte is saved, since the graphs of all parts wait for that one backward pass.
#
# The other mistakes are found by anybody who writes down what is in `.grad` after two parts. `sum_of_means` is too large by the number of parts, `sum` by the number of pairs: with a clip at 1.0, as in this book, such a run looks almost right, because clipping cuts every large gradient to the same length. `last_only` and `clears` put a `zero_grad` where it does not belong.

# %%
#| export
def _accumulation(model, pairs, loss_of, size, wrong=()):
    n = len(pairs)
    step = n if "too_many" in wrong else size
    parts = [pairs[i:i + step] for i in range(0, n, step)]
    if "lost" in wrong: parts = [part for part in parts if len(part) == step]
    if "empty_part" in wrong and n % step == 0: parts.append([])
    if "few" in wrong and n < step: parts = []
    if "clears" in wrong: model.zero_grad()
    kept = []
    for part in parts:
        losses = loss_of(model, part)
        share = losses.sum() / n
        if "mean_of_means" in wrong: share = losses.mean() / len(parts)
        if "full_parts" in wrong: share = losses.mean() / (n // size)
        if "by_size" in wrong: share = losses.sum() / size
        if "sum_of_means" in wrong: share = losses.mean()
        if "sum" in wrong or "scaled_old" in wrong: share = losses.sum()
        if "last_only" in wrong: model.zero_grad()
        if "kept" in wrong: kept.append(share)
        else: share.backward()
    if kept: sum(kept).backward()
    if "scaled_old" in wrong: model.weight.grad /= n
    if "steps" in wrong: model.weight.data -= 0.1 * model.weight.grad


# %% [markdown]
# The inputs have two full parts and, but for one batch, one of a single row. Where there is none, `range(n // size + 1)` asks for a part without pairs. The spy is `loss_of`: it sees how many pairs it is asked for, and how many parts are still waiting for their backward pass. It does not care how a solution loops. In `.grad` lie ones from the beginning, so that clearing shows, and a call that replaces instead of adding.

# %%
#| export
def _draw_parts(g, n, beta):
    "Weights, rows, size: two full parts, and one of a single row unless n is 1."
    size = n % 3 + 2
    rows = torch.randn(2 * size + (n > 1), 3, dtype=torch.float64, generator=g)
    return torch.randn(1, 3, dtype=torch.float64, generator=g), rows, size

def _watch_accumulation(f, inputs):
    "The gradient that f leaves, and how it went about it."
    start, rows, size = inputs
    model = torch.nn.Linear(3, 1, bias=False).double()
    model.weight.data = start.clone()
    model.weight.grad = torch.ones_like(start)
    asked, graphs, done, waiting = [], [], [], []

    def loss_of(model, part):
        asked.append(len(part))
        part = torch.stack(list(part)) if len(part) else start[:0]
        losses = F.softplus(-model(part)[:, 0])
        if not losses.requires_grad: return losses       # no graph, so nothing waits
        waiting.append(len(graphs) - len(done))
        graphs.append(1)
        losses.register_hook(lambda grad: done.append(1))
        return losses

    f(model, list(rows), loss_of, size)
    if not asked: return None
    grad = model.weight.grad
    return dict(
        grad=torch.zeros_like(start) if grad is None else grad,
        too_many=max(asked) > size,
        empty_part=min(asked) == 0,
        kept=max(waiting, default=0) > 0,
        moved=not torch.equal(model.weight, start),
    )

def _leaves_out_few(f, g):
    start, rows, size = _draw_parts(g, 2, 0.1)
    inputs = start, rows[:size - 1], size
    return not alike(_watch_accumulation(f, inputs), _watch_accumulation(_accumulation, inputs))


# %%
inputs = _draw_parts(torch.Generator().manual_seed(0), 3, 0.1)
for wrong in ((), ("mean_of_means",), ("kept",)):
    print(wrong, _watch_accumulation(partial(_accumulation, wrong=wrong), inputs))

# %% [markdown]
# The mean of means gives another gradient. Keeping all parts gives the same gradient, and the spy has noticed. What is compared is the whole dictionary, so "right gradient, but all parts kept" is an answer of its own, and has its own switch. The edge is a batch of fewer pairs than `size`, as the last one of an epoch may be.

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
        full_parts="means are divided by the number of full parts; divide sums by all pairs.",
        by_size="sums are divided by `size`; divide by the number of all pairs.",
        sum_of_means="the means of the parts are added; divide sums by all pairs.",
        sum="the losses are added; divide by the number of pairs.",
        last_only="gradients are cleared between parts, so only the last part counts.",
        lost="the last, short part is left out.",
        too_many="a part has more pairs than `size`.",
        empty_part="where `size` divides the number of pairs, a part without pairs comes last.",
        kept="all parts are kept until one backward pass, so nothing is saved.",
        clears="it clears the gradient that was there; add to it.",
        scaled_old="the gradient that was there is divided, too; divide the losses.",
        steps="it moves the weights; only the gradient is wanted.",
        few="a batch of fewer than `size` pairs is one short part.",
    ),
    edges=dict(few=_leaves_out_few),
    names={
        "grad[][]": "number {1} of the gradient",
        "too_many": "a part has more than `size` pairs",
        "empty_part": "a part has no pairs",
        "kept": "parts wait for one backward pass",
        "moved": "the weights were moved",
    },
)

def check_accumulation(
    f,              # (model, pairs, loss_of, size): adds to .grad; loss_of(model, part) -> (m,) losses
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    """Check the gradient of the mean loss, in parts of at most `size` pairs.
    What the function returns does not matter."""
    return run_check(EXERCISES["accumulation"], f, seed)


# %%
def one_backward(model, pairs, loss_of, size):
    losses = [loss_of(model, pairs[i:i + size]) for i in range(0, len(pairs), size)]
    torch.cat(losses).mean().backward()

print(said(check_accumulation, one_backward))
print(said(check_accumulation, lambda model, pairs, loss_of, size: ...))


# %% [markdown]
# In the first answer, the gradient is right to the last digit. *Ask:* a batch of 33 pairs is computed in parts of 16. By which factor does the last pair count too much in a mean of means? (Eleven: a third, and not a thirty-third.)
#
# ### The reference table
#
# **The question.** Write what the reference says about each pair: one pass, no gradient, no dropout, keys of the pairs, and everything left as it was found.
#
# A table is computed once and believed for the rest of the run, so what is wrong here is wrong quietly. With dropout on, the reference is another model for each pair, and the first loss is near $\ln 2$ but not equal to it. Rows found by position are right until somebody shuffles. And a pass that seeds the global generator, "to be reproducible", makes everything that is drawn afterwards depend on it.
#
# `left_in_eval` is the mirror image: the numbers of the table are right, and the training after it runs without dropout, or without gradient checkpointing, which works only in train mode. `half` rounds to 16 bits; near 200 nats that moves a log-probability by up to half a nat, while the gain that one wants to measure begins at zero.

# %%
#| export
def _reference_table(model, pairs, score, wrong=()):
    mode = model.training
    if "random_state" in wrong: torch.manual_seed(0)
    if "dropout" not in wrong: model.eval()
    with torch.set_grad_enabled("grad" in wrong): chosen, rejected = score(model, pairs)
    if "left_in_eval" not in wrong: model.train(mode)
    if "left_in_train" in wrong: model.train()
    if "frozen" in wrong: model.requires_grad_(False)
    if "switched_off" in wrong: torch.set_grad_enabled(False)
    if "half" in wrong: chosen, rejected = chosen.bfloat16(), rejected.bfloat16()
    if "fp16" in wrong: chosen, rejected = chosen.half(), rejected.half()
    if "rounded" in wrong: chosen, rejected = chosen.detach().round(decimals=4), rejected.detach().round(decimals=4)
    if "swapped" in wrong: chosen, rejected = rejected, chosen
    keys = range(len(pairs)) if "by_position" in wrong else [pair["key"] for pair in pairs]
    return {key: numbers for key, *numbers in zip(keys, chosen.tolist(), rejected.tolist())}

def _draw_keys(g, n, beta):
    "Keys with two log-probabilities each, and whether the model comes in train mode."
    numbers = -40 + 10 * torch.randn(n, 2, generator=g)
    names = torch.randint(10**6, (n,), generator=g).tolist()
    return {f"pair-{name}": row for name, row in zip(names, numbers.tolist())}, n != 2


# %% [markdown]
# The model of this exercise is a spy, too: a dropout layer inside of another module, with one weight. The mode of both is read at every call: dropout asks for its own mode and not for that of the whole, which is all that `model.training = False` changes. It comes in train mode in two batches and in eval mode in the other, so that neither "leave it in eval" nor "put it into train" is right by luck. Whether a gradient is recorded is asked of what `score` returns: `torch.no_grad()` is not the only way to prevent
# it. But two of the ways leave something behind, and the training that comes next would stand still: weights that are frozen, and gradients that are switched off for everybody.

# %%
#| export
def _watch_scoring(f, inputs):
    "The table that f makes, and what it did to the model and to the random numbers."
    numbers, training = inputs
    model = torch.nn.Sequential(torch.nn.Dropout(0.5)).train(training)
    model.weight = torch.nn.Parameter(torch.zeros(1))
    seen = dict(training=False, grad=False)

    def in_train(model): return [module.training for module in model.modules()]

    def score(model, pairs):
        seen["training"] |= any(in_train(model))
        rows = torch.tensor([numbers[pair["key"]] for pair in pairs]) + 0 * model.weight
        seen["grad"] |= rows.requires_grad
        return tuple(rows.T)

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        before = torch.get_rng_state()
        table = f(model, [dict(key=key) for key in numbers], score)
        same_luck = torch.equal(before, torch.get_rng_state())
        still_on = torch.is_grad_enabled()
    if is_empty(table): return None
    if not isinstance(table, dict): raise WrongForm(f"a dict is wanted, not {kind_of(table)}")
    if seen["training"]: return "scored with dropout"
    ends_in_train = all(in_train(model)) if training else any(in_train(model))
    table = {key: _two_numbers(key, row) for key, row in table.items()}
    return dict(
        table=table,
        rounded=any(_is_rounded(row, numbers.get(key)) for key, row in table.items()),
        grad=seen["grad"],
        mode="train" if ends_in_train else "eval",
        luck_kept=same_luck,
        frozen=not model.weight.requires_grad,
        switched_off=not still_on,
    )

def _two_numbers(key, row) -> list:
    "A row of the table. Raises WrongForm, with its key, where it is something else."
    if isinstance(row, Tensor): row = row.tolist()
    wanted = f"each row must be (chosen, rejected), two numbers; that of {key!r}"
    if isinstance(row, (dict, str)) or not hasattr(row, "__len__"): raise WrongForm(f"{wanted} is {kind_of(row)}")
    if len(row) != 2: raise WrongForm(f"{wanted} has {len(row)}")
    try: return [one_number(value, ()) for value in row]
    except WrongForm as e: raise WrongForm(f"{wanted} holds {str(e).removeprefix('it returns ')}") from None

def _is_rounded(row, right) -> bool:
    "Whether a row is right to four digits, but not as the model gave it."
    if right is None or not alike(row, right): return False
    return not all(math.isclose(a, b, rel_tol=5e-7) for a, b in zip(row, right))


# %%
inputs = _draw_keys(torch.Generator().manual_seed(0), 2, 0.1)
_watch_scoring(_reference_table, inputs)

# %% [markdown]
# What is compared: the numbers by key, whether they were rounded, whether a gradient was recorded, the mode in which the model was left, whether the global generator stands where it stood, and whether weights are frozen or gradients switched off. A model that was scored in train mode reports only that, since its numbers depend on luck.

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
        dropout="the model, or a part of it, is in train mode, so dropout changes its numbers.",
        left_in_eval="the model, or a part of it, is left in eval mode, although it came in train mode.",
        left_in_train="the model, or a part of it, is left in train mode, although it came in eval mode.",
        grad="gradients are recorded; nobody needs them here.",
        random_state="the global random state is changed; others draw from it.",
        by_position="rows are found by position; use the key of the pair.",
        half="the numbers are rounded to 16 bits (bf16); keep fp32.",
        fp16="the numbers are rounded to 16 bits (fp16); keep fp32.",
        rounded="the numbers are rounded; keep all their digits.",
        frozen="requires_grad of the weights is left False; use torch.no_grad().",
        switched_off="gradients are off for all that follows; use `with torch.no_grad():`.",
        swapped="chosen and rejected are swapped.",
    ),
    elsewhere=dict(
        dropout=("02", "Where does dropout hide?"),
        half=("02", "Why is the sum made in fp32?"),
        fp16=("02", "Why is the sum made in fp32?"),
        by_position=("02", "What is in the table?"),
    ),
    names={
        "table[]": "the row of {}",
        "table[][]": "the row of {0}, number {1} (0: chosen, 1: rejected)",
        "rounded": "numbers are rounded",
        "grad": "a gradient is recorded",
        "mode": "the mode in which the model is left",
        "luck_kept": "the global random state is as before",
        "frozen": "the weights are frozen",
        "switched_off": "gradients are switched off",
    },
)

def check_reference_table(
    f,              # (model, pairs, score) -> {key: (chosen, rejected)}
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check a table of reference log-probabilities, in nats; score(model, pairs) -> chosen, rejected."
    return run_check(EXERCISES["reference_table"], f, seed)


# %%
def by_row(model, pairs, score):
    before = model.training
    model.eval()
    with torch.no_grad(): chosen, rejected = score(model, pairs)
    model.train(before)
    return {i: (c, r) for i, (c, r) in enumerate(zip(chosen, rejected))}

def careless(model, pairs, score):
    model.eval()
    chosen, rejected = score(model, pairs)
    return {pair["key"]: (c, r) for pair, c, r in zip(pairs, chosen, rejected)}

print(said(check_reference_table, careless))
print(said(check_reference_table, by_row))


# %% [markdown]
# *Ask:* after which of these mistakes would the loss of the first step still be exactly $\ln 2$? (After all that leave the numbers alone; so $\ln 2$ proves less than one may think.)
#
# ### A step in fp16
#
# **The question.** A loss, parameters, an optimizer, a `GradScaler` and a clip. Make one step: scale and go backwards, unscale, clip, step, update, clear.
#
# Small gradients are zero in fp16, so the loss is multiplied by a large number first, and the gradients are divided by it afterwards.
#
# The order of the six calls is the lesson. `scale` before `backward`, or there is nothing to unscale. `unscale_` before the clip, because a clip compares a norm with a number in the units of the *true* gradient. `scaler.step` and not `optimizer.step`, because only the scaler knows whether something is infinite. `update` last, because it decides about the next step. Here all nine mistakes run without an error. Two of them are silent until the day on which something overflows.

# %%
#| export
def _fp16_step(loss, parameters, optimizer, scaler, clip, wrong=()):
    if "no_scaler" in wrong: scaler = torch.amp.GradScaler("cpu", enabled=False)
    (loss if "no_scale" in wrong else scaler.scale(loss)).backward()
    if "clip_scaled" not in wrong: scaler.unscale_(optimizer)
    together = [parameters]
    if "no_clip" in wrong: together = []
    if "clip_each" in wrong: together = [[p] for p in parameters]
    if "clip_first" in wrong: together = [parameters[:1]]
    for some in together: torch.nn.utils.clip_grad_norm_(some, clip)
    if "direct" in wrong: optimizer.step()
    else: scaler.step(optimizer)
    if "no_update" not in wrong: scaler.update()
    if "no_zero_grad" not in wrong: optimizer.zero_grad()

def _draw_slopes(g, n, beta):
    "Gradients of three losses for two parameters, 3 and 2 numbers; the clip is between the norms of the first two."
    a, b = torch.randn(3, generator=g), torch.randn(2, generator=g)
    slope = torch.cat([0.6 * a / a.norm(), 0.8 * b / b.norm()])
    return 5 * slope, 0.3 * slope.flip(0), 1e38 * slope, 1.0

def _watch_step(f, inputs):
    "By what the loss was multiplied, where the weights are after each step, and what became of the scale."
    *slopes, clip = inputs
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 2)]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    factors, places, scales = [], [], []
    for slope in slopes:
        scaler = torch.amp.GradScaler("cpu", init_scale=16.)
        scaler.scale(torch.zeros(1))                     # or unscale_ stops where no loss was scaled
        loss = (torch.cat(parameters) * slope).sum()
        loss.register_hook(lambda grad: factors.append(grad.item()))
        f(loss, list(parameters), optimizer, scaler, clip)
        places.append(torch.cat(parameters).detach().clone())
        scales.append(scaler.get_scale())
    untouched = not torch.stack(places).any() and all(p.grad is None for p in parameters)
    return None if untouched else dict(factors=factors, places=places, scales=scales)


# %% [markdown]
# The scaler is a real one, and three losses tell the mistakes apart. The first has a gradient above the clip, so clipping shows. The second is below it, so a clip of the *scaled* gradient shows, which cuts it by mistake. The third overflows: no weight may move, and the scale must be halved. (Without a scaler nothing overflows there, and the clip makes the gradient zero; so a hook notes by what each loss was multiplied.) There are two parameters, because the norm is that of both together; with a single one, nobody could see who clips each by itself.

# %%
inputs = _draw_slopes(torch.Generator().manual_seed(0), 3, 0.1)
for wrong in ((), ("direct",)):
    print(wrong, _watch_step(partial(_fp16_step, wrong=wrong), inputs))

# %% [markdown]
# The right step first: after the third loss the weights are where they were, and the scale has gone from 16 to 8. `direct` calls the optimizer and not the scaler. It is right twice. Then something overflows, and four of the five weights are NaN. From here on every loss is NaN, so in a real run the mistake is found a long time after the line that made it.

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
        no_scaler="the scaler is not used: call scale, unscale_, step and update.",
        no_scale="the loss is not scaled before the backward pass.",
        clip_scaled="it clips before unscaling, or never unscales: the norm is that of the scaled gradient.",
        clip_each="each parameter is clipped by itself; clip the norm of all together.",
        clip_first="only the first parameter is clipped; clip the norm of all together.",
        direct="optimizer.step() steps after an overflow, too: NaN. Use scaler.step.",
        no_update="scaler.update() is missing; the scale never falls.",
        no_clip="the gradient is not clipped.",
        no_zero_grad="the gradient is not cleared, so steps add up.",
    ),
    names={
        "factors": "backward passes",
        "factors[]": "factor of loss {}",
        "places[][]": "weight {1} after loss {0}",
        "scales[]": "the scale after loss {}",
    },
    elsewhere=dict(
        clip_scaled=("06", "One step"),
        clip_each=("06", "One step"),
        clip_first=("06", "One step"),
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
    return run_check(EXERCISES["fp16_step"], f, seed)


# %%
def forgets_to_unscale(loss, parameters, optimizer, scaler, clip):
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    torch.nn.utils.clip_grad_norm_(parameters, clip)
    scaler.step(optimizer)
    scaler.update()

said(check_fp16_step, forgets_to_unscale)


# %% [markdown]
# *Ask:* why must clipping come after unscaling, when both are only multiplications? (The clip multiplies only where the norm is too large, and the norm of the scaled gradient nearly always is.)
#
# ### A stage
#
# **The question.** A model, pairs of the tiny world, a table, $\beta$, a learning rate and a batch size. Train with AdamW without weight decay, in the order given, and return the loss of every step.
#
# This is the loop of [chapter 06](06_trainer.ipynb) with all its details. The model is small, has random weights and comes in bf16, as many models do: whoever does not call `.float()` adds steps that are smaller than a bf16 weight can notice. The table is *not* that of the model, so the first loss is not $\ln 2$. Whoever takes the policy for its own reference gets $\ln 2$ in every step, and that shows.
#
# Some mistakes do not show in the losses. AdamW's own weight decay of 0.01 moves no loss by a digit that is compared, so the spy reads the setting from the optimizer when it steps. And whoever trains a copy has the right losses, while the model that came in is still untrained; so the loss of each pair is computed once more afterwards, with *that* model.

# %%
#| export
def _mean_loss(chosen, rejected, ref_chosen, ref_rejected, beta, wrong):
    "The loss of a batch, from its log-probabilities."
    if "swapped_table" in wrong: ref_chosen, ref_rejected = ref_rejected, ref_chosen
    if "moving_reference" in wrong: ref_chosen, ref_rejected = chosen.detach(), rejected.detach()
    if "chosen_only" in wrong: rejected = ref_rejected = torch.zeros_like(chosen)
    four = [chosen, rejected, ref_chosen, ref_rejected]
    if "mean_inside" in wrong: four = [logps.mean(0, keepdim=True) for logps in four]
    each = DPO_LOSS.crooked(*four, beta, wrong=[name for name in wrong if name in ("no_ref", "no_beta")])
    return each.sum() if "summed" in wrong else each.mean()

def _train(model, pairs, table, beta, lr, batch, wrong=()):
    if "copied" in wrong: model = copy.deepcopy(model)
    if "bf16_weights" not in wrong: model.float()
    if "eval_mode" not in wrong: model.train()
    decay = 0.01 if "decay" in wrong else 0.
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    if "sgd" in wrong: optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    rows = list(table.values())
    if "by_position" not in wrong: rows = [table[pair["key"]] for pair in pairs]
    if "shuffled" in wrong: pairs, rows = pairs[::-1], rows[::-1]
    end = len(pairs) - len(pairs) % batch if "last_batch_lost" in wrong else len(pairs)
    losses = []
    for start in range(0, end, batch):
        part = slice(start, start + batch)
        with torch.set_grad_enabled(lr > 0):             # without a rate nothing moves
            chosen, rejected = score(model, pairs[part])
        loss = _mean_loss(chosen, rejected, *torch.tensor(rows[part]).T, beta, wrong)
        losses.append(loss.item())
        if lr == 0: continue
        loss.backward()
        optimizer.step()
        if "no_zero_grad" not in wrong: optimizer.zero_grad()
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
    keys = list(table)
    table = {key: table[key] for key in keys[3:] + keys[:3]}
    return model, pairs, table, 5 * beta, 0.002, 3


# %% [markdown]
# The losses of three steps, seven pairs in batches of three; the table has its rows in another order than the pairs. The second loss already says that the step was made: a wrong optimizer, a sum instead of a mean or a gradient that was not cleared give another second loss.
#
# Pairs are dictionaries with ids, as everywhere in the book, and a student may use `score` or write the forward pass anew.

# %%
model, pairs, table, *settings = _draw_stage(torch.Generator().manual_seed(0), 3, 0.1)
started = time.perf_counter()
losses = _train(copy.deepcopy(model), pairs, table, *settings)
assert time.perf_counter() - started < 5
[round(loss, 4) for loss in losses]


# %% [markdown]
# Some mistakes would bury the others, so they are looked for first. In bf16 every number depends on how the batch was padded; and shuffled pairs give losses that no other run gives, so that no comparison could say more than "different". So the spy looks at weights and mode while the model is used. It looks only at forward passes that record a gradient. Whoever measures something in between, in eval mode and without a gradient, does nothing wrong.

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

@contextlib.contextmanager
def _reading_decay():
    "Notes the weight decay of every optimizer that makes a step."
    found = []
    def look(optimizer, args, kwargs):
        found.extend(float(group.get("weight_decay") or 0) for group in optimizer.param_groups)
    handle = register_optimizer_step_pre_hook(look)
    try: yield found
    finally: handle.remove()

def _losses(f, model, *args):
    "The losses of a stage as numbers, what was seen of the model, and the model afterwards."
    model = copy.deepcopy(model)
    with _watching(model) as seen: losses = f(model, *args)
    if is_empty(losses): return None, seen, model
    if not isinstance(losses, (list, tuple)): raise WrongForm(f"a list is wanted, not {kind_of(losses)}")
    return [one_number(loss, ()) for loss in losses], seen, model


# %% [markdown]
# And a first run, with batches of one pair and a learning rate of zero, shows the order: untrained, the loss of each pair is known. Where one of these finds something, nothing else is reported.

# %%
#| export
@torch.no_grad()
def _losses_now(model, pairs, table, beta) -> list:
    "The loss of each pair with the model as it is."
    chosen, rejected = score(copy.deepcopy(model).float(), pairs)
    references = torch.tensor([table[pair["key"]] for pair in pairs]).T
    return DPO_LOSS.crooked(chosen, rejected, *references, beta).tolist()

def _losses_at_rest(f, inputs) -> dict:
    "The losses of a run that cannot move, one pair a batch."
    model, pairs, table, beta, *_ = inputs
    still, *_ = _losses(f, model, list(pairs), dict(table), beta, 0., 1)
    return dict(still=still)

def _watch_training(f, inputs):
    "The losses of two runs and those afterwards; where these say nothing, why."
    model, pairs, table, beta, lr, batch = inputs
    still = _losses_at_rest(f, inputs)["still"]
    if still is None: return None
    with _reading_decay() as decay:
        losses, seen, trained = _losses(f, model, list(pairs), dict(table), beta, lr, batch)
    if losses is None: return None
    if any(half for _, half in seen): return "half weights"
    if not all(training for training, _ in seen): return "eval mode"

    want = _losses_now(model, pairs, table, beta)
    if alike(sorted(still), sorted(want)) and not alike(still, want): return "another order"
    return dict(
        still=still,
        losses=losses,
        decay=max(decay, default=0.),
        after=_losses_now(trained, pairs, table, beta),
    )


# %%
inputs = _draw_stage(torch.Generator().manual_seed(0), 3, 0.1)
def watched(*wrong): return _watch_training(partial(_train, wrong=wrong), inputs)

print("moving_reference:", [round(loss, 4) for loss in watched("moving_reference")["losses"]])
print("shuffled:", watched("shuffled", "no_zero_grad"))
print("bf16_weights:", watched("bf16_weights"))

# %% [markdown]
# `moving_reference` gives losses, and they are $\ln 2$ to the last digit. The other two give a word instead: there is no use in comparing their numbers.

# %%
#| export
EXERCISES["train"] = Exercise(
    name="train",
    crooked=_train,
    draw=_draw_stage,
    form=as_it_is,
    observe=_watch_training,
    glance=_losses_at_rest,                              # decides about most of the pairs of mistakes
    tries=2,
    read=("06", "Six lines"),
    says=dict(
        moving_reference="all losses are ln 2: the policy is its own reference.",
        swapped_table="chosen and rejected of the table are swapped, or the sign of gamma_ref is wrong.",
        no_ref="the table is not used; subtract the gamma of the reference.",
        no_beta="beta is missing.",
        mean_inside="it is the loss of the mean gain; take the mean of the losses.",
        chosen_only="only the chosen answers are used; gamma is chosen minus rejected.",
        by_position="rows of the table are found by position; use the key of the pair.",
        decay="weight_decay is 0.01, which is AdamW's own; write weight_decay=0.0.",
        copied="a copy was trained; the model that came in is still untrained.",
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
        mean_inside=("03", "The reference as a lower bound"),
        by_position=("02", "What is in the table?"),
    ),
    names={
        "still": "losses before training, one pair a batch",
        "still[]": "loss of pair {} before training",
        "losses": "losses of the steps",
        "losses[]": "loss of step {}, the first being 0",
        "decay": "weight_decay",
        "after[]": "loss of pair {} with the trained model",
    },
)

def check_train(
    f,              # (model, pairs, table, beta, lr, batch) -> losses, one a step
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    """Check a stage of DPO: fp32 weights, train mode, AdamW without weight decay, batches in the order given.
    The table is {key: (chosen, rejected)}, in nats. `score(model, pairs)` of this module may be used."""
    return run_check(EXERCISES["train"], f, seed)


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
# *Ask:* a log begins with 0.6931, and stays there. Name two different reasons. (The live model as its own reference; or weights in bf16 that do not move.)
#
# ## Stages
#
# Assignment 4, after the end of chapter 03 and chapters [08](08_evaluate.ipynb), [13](13_stages.ipynb) and [14](14_stepwise.ipynb).
#
# ### The loop of sDPO
#
# **The question.** S, chunks, and three functions: `score(model, chunk)` writes a table, `train(model, chunk, table)` trains, `copy(model)` copies. Write stepwise DPO, return the last model, and leave S as it is.
#
# Which model is the reference of which stage? This is the question of the whole book, and nothing has to be trained to answer it. The three functions are spies, and a model is a list of what it was trained on.
#
# A solution may keep one model and train it on, or keep a list of models, and it may return the last one or a copy of it. All of that leads to the same log. What may not happen is that the reference changes while the policy is trained, or that S does. `train` changes the model in place and returns nothing, as the question says.

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
    if "first_chunk" in wrong: chunks = chunks[1:]
    older = copy(S)
    for t, chunk in enumerate(chunks):
        reference = copy(model)
        if "lag" in wrong: reference = older
        if "fixed" in wrong: reference = base
        older = copy(model)
        asked = chunk
        if "table" in wrong: asked = chunks[0]
        if "table_before" in wrong: asked = chunks[t - 1]
        table = score(reference, asked)
        if "live" in wrong: table = model
        if "from_S" in wrong: model = copy(base)
        train(model, chunk, table)
    return S if "returned" in wrong else model

def _draw_stages(g, n, beta): return (n + 1,)

def _watch_stages(f, inputs):
    "Who was trained on what against which table."
    S, log = _Model(), []
    def past(model):
        if isinstance(model, _Model): return model.seen
        raise WrongForm(f"a model is wanted, not {kind_of(model)}; train returns nothing, it changes the model")

    def score(model, chunk): return ("table", past(model), chunk)
    def copy(model): return _Model(past(model))
    def train(model, chunk, table):
        reference = table if isinstance(table, tuple) else kind_of(table)
        log.append(dict(before=past(model), chunk=chunk, against=reference))
        model.seen += (chunk,)

    last = f(S, [f"D_{t}" for t in range(1, inputs[0] + 1)], score, train, copy)
    if is_empty(last) and not log: return None
    ended = (*log[-1]["before"], log[-1]["chunk"]) if log else ()
    return dict(log=log, S_kept=S.seen == (), returned=isinstance(last, _Model) and last.seen == ended)


# %% [markdown]
# What a right answer does, seen by the spies. Read the last column: each table was written by a model with the same past as the one that is trained, and about the chunk that it is trained on.

# %%
pd.DataFrame(_watch_stages(_stepwise, (3,))["log"])

# %% [markdown]
# With two stages, a reference that is always S and one that lags behind by a stage are the same. So the spies look at up to seven stages before anything is named. `live` needs no numbers either: the reference is then not a table but a model, and a model that is its own reference at every step has the loss $\ln 2$ for ever.

# %%
#| export
EXERCISES["stepwise"] = Exercise(
    name="stepwise",
    crooked=_stepwise,
    draw=_draw_stages,
    form=as_it_is,
    observe=_watch_stages,
    read=("14", "The method in four lines"),
    says=dict(
        S_trained="S itself is trained; copy it first.",
        live="the reference is the live model, so the loss stays at ln 2; score first.",
        fixed="the reference is S in every stage; it must be M_{t-1}.",
        lag="the reference of stage t is M_{t-2}; it must be M_{t-1}.",
        table="the table is of the first chunk in every stage; it must be of the chunk of the stage.",
        table_before="the table is of the chunk before; it must be of the chunk of the stage.",
        from_S="every stage starts from S; it must start from M_{t-1}.",
        reversed="the chunks come in reverse order.",
        chunks="the last chunk is left out.",
        first_chunk="the first chunk is left out.",
        returned="it does not return the model of the last stage.",
    ),
    elsewhere=dict(fixed=("14", "Why not S?"), from_S=("14", "Where the policy starts")),
    names={
        "log": "calls of train",
        "log[][]": "call {0} of train, {1}",
        "S_kept": "S is as it was",
        "returned": "the last model is returned",
    },
)

def check_stepwise(
    f,              # (S, chunks, score, train, copy) -> the last model
    seed: int=None, # is not used here: nothing is drawn
) -> int:           # the seed
    "Check the loop of sDPO: score(model, chunk) -> table, train(model, chunk, table), copy(model) -> model."
    return run_check(EXERCISES["stepwise"], f, seed)


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
# *Ask:* in which of these wrong loops would the first loss of stage 2 not be $\ln 2$?
#
# ### What a loss guarantees
#
# **The question.** From the mean loss, the mean $\gamma_{ref}$ and $\beta$, a lower bound for the mean $\gamma$ of the policy: equation (10) of [chapter 03](03_loss.ipynb), $\bar\gamma_{ref} - \frac1\beta\log(e^{L}-1)$.
#
# At $L=\ln2$ the logarithm is zero, so a policy that has learned nothing is guaranteed the level of its reference and no more. A smaller loss must guarantee more; an answer with the sign wrong says the opposite and looks just as smooth.

# %%
#| export
def _certificate(loss, mean_gamma_ref, beta, wrong=()):
    bound = math.log(loss) if "log_of_loss" in wrong else loss + math.log(-math.expm1(-loss))
    if "overflow" in wrong: bound = math.log(math.exp(loss) - 1)
    if "capped" in wrong: bound = math.log(math.expm1(min(loss, 30.)))
    if "no_one" in wrong: bound = loss
    if "no_loss" in wrong: bound = math.log(-math.expm1(-loss))
    if "times_beta" in wrong: bound = bound * beta
    elif "no_beta" not in wrong: bound = bound / beta
    if "sign" in wrong: bound = -bound
    if "brackets" in wrong: return (mean_gamma_ref - bound * beta) / beta
    return -bound if "no_ref" in wrong else mean_gamma_ref - bound

def _draw_loss(g, n, beta):
    loss, ref = torch.rand(2, dtype=torch.float64, generator=g).tolist()
    return 0.05 + 2 * loss, -40 + 50 * ref, beta


# %% [markdown]
# A loss of 0.3 certifies 10.5 nats above the reference at $\beta = 0.1$; $\ln 2$ certifies nothing; and a loss of 5000 says that the policy may be 50,000 nats below:

# %%
[round(_certificate(loss, 0., 0.1), 2) for loss in (0.3, math.log(2), 5000.)]


# %% [markdown]
# The edge are large losses, 800 and 5000. `math.exp` of either is an `OverflowError`, and in a tensor it is infinity. $L + \log(1-e^{-L})$ is the same number without it. Whoever cuts the loss at 30 instead has a number, and a guarantee that is not true.

# %%
#| export
def _dies_of_a_large_loss(f, g):
    try: return not all(math.isfinite(one_number(f(loss, -38.6, 0.1), ())) for loss in (800., 5000.))
    except OverflowError: return True

def _cuts_a_large_loss(f, g):
    far, farther = (one_number(f(loss, -38.6, 0.1), ()) for loss in (800., 5000.))
    return not (math.isclose(far, -8038.6, rel_tol=1e-6) and math.isclose(farther, -50038.6, rel_tol=1e-6))


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
        brackets="the mean gamma of the reference is divided by beta, too; mind the brackets.",
        no_one="the -1 is missing: it is log(exp(L) - 1).",
        no_loss="the L in front is missing: log(exp(L) - 1) is L + log(1 - exp(-L)).",
        overflow="exp(L) overflows at a large loss, as 800; use L + log(1 - exp(-L)).",
        capped="a large loss is cut off, and its bound is too high; use L + log(1 - exp(-L)).",
    ),
    edges=dict(overflow=_dies_of_a_large_loss, capped=_cuts_a_large_loss),
    by_hand="loss 0.5, reference 2, beta 0.1 give 6.33",
)

def check_certificate(
    f,              # (loss, mean_gamma_ref, beta) -> lower bound of the mean gamma of the policy, nats
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check what a mean loss guarantees."
    return run_check(EXERCISES["certificate"], f, seed)


# %%
print(said(check_certificate, lambda loss, ref, beta: ref - math.log(loss) / beta))
print(said(check_certificate, lambda loss, ref, beta: ref - math.log(math.exp(loss) - 1) / beta))


# %% [markdown]
# *Ask:* a run reports a loss of 0.8. What does that guarantee? (At $\beta=0.1$, that the mean $\gamma$ of the policy is at most about two nats below that of its reference. It is not much, and it is not nothing.)
#
# ### The first loss of a stage
#
# **The question.** $\gamma$ of the model from which a stage starts, $\gamma_{ref}$ of its reference, and $\beta$. What will the first loss be, as a mean over pairs?
#
# In sDPO the start is the reference, and the answer is $\ln 2$. If it starts from S against $M_1$, as in the paper's figure 3, it is not, and a log can be checked against two tables before any training. Who answers "always $\ln 2$" has learned the rule and not its reason; `mean_inside` takes the loss of the mean gain, which is smaller than the mean of the losses wherever the gains differ.

# %%
#| export
def _first_loss(gamma_start, gamma_ref, beta, wrong=()):
    gain = gamma_start - gamma_ref
    if "swapped" in wrong: gain = -gain
    if "no_ref" in wrong: gain = gamma_start
    if "no_beta" in wrong: beta = 1.
    if "divided" in wrong: beta = 1 / beta
    if "mean_inside" in wrong: gain = gain.mean(0, keepdim=True)
    if "always_ln2" in wrong: gain = 0 * gain
    losses = F.softplus(-beta * gain)
    if "outside" in wrong: losses = beta * F.softplus(-gain)
    if "log_of_mean" in wrong: losses = -torch.sigmoid(beta * gain).mean(0, keepdim=True).log()
    if "no_minus" in wrong: losses = -losses
    return (losses.sum() if "sum" in wrong else losses.mean()).item()


# %%
g = torch.Generator().manual_seed(0)
gamma_start, gamma_ref, beta = _draw_gammas(g, 4, 0.5)
print("gains:", [round(gain, 1) for gain in (gamma_start - gamma_ref).tolist()])
told = {}
for wrong in ("right", "mean_inside", "no_ref", "always_ln2"):
    told[wrong] = round(_first_loss(gamma_start, gamma_ref, beta, (wrong,)), 3)
told

# %% [markdown]
# Four pairs at $\beta=0.5$. The loss of the mean gain is 0.456, below $\ln 2$: on average the start is ahead of its reference. But a few pairs are far behind, and the mean of the losses is 1.901. Whoever expects 0.456 would take a correct run for a broken one.

# %%
#| export
EXERCISES["first_loss"] = Exercise(
    name="first_loss",
    crooked=_first_loss,
    draw=_draw_gammas,
    form=one_number,
    read=("06", "Six lines"),
    says=dict(
        mean_inside="it is the loss of the mean gain; take the mean of the losses.",
        log_of_mean="it is the logarithm of the mean sigmoid; take the logarithm first, then the mean.",
        no_beta="beta is missing.",
        divided="the gain is divided by beta; it must be multiplied.",
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

def check_first_loss(
    f,              # (gamma_start (n,), gamma_ref (n,), beta) -> mean loss before the first step
    seed: int=None, # of the numbers; None: fresh ones
) -> int:           # the seed
    "Check the first loss of a stage."
    return run_check(EXERCISES["first_loss"], f, seed)


# %%
print(said(check_first_loss, lambda start, ref, beta: -F.logsigmoid(beta * (start - ref).mean())))
print(said(check_first_loss, lambda start, ref, beta: math.log(2)))

# %% [markdown]
# *Ask:* can the first loss be below $\ln 2$ although nothing has been trained in this stage? (Yes, where the stage starts from a better model than its reference.)
#
# ### An experiment
#
# **The question.** Plan and run a comparison in the tiny world that could convince a sceptic that sDPO is better than DPO. A function `measure` trains, if need be, and returns rewards; write `experiment(measure)`, which returns a table of runs.
#
# Has sDPO been compared with what it must be compared with? By [chapter 03](03_loss.ipynb), $T$ stages at $\beta$ may be worth one stage at $\beta/T$, so a run of plain DPO at $\beta/T$ must be there. $\beta$ is picked on validation prompts, for DPO, with one seed, and stays the same for all. There are at least two seeds. And the interval of
# the difference to S is paired ([chapter 08](08_evaluate.ipynb)).
#
# One run is one row: `method` (S, DPO or sDPO), `beta`, `stages`, `seed`, `picked_on` (the split on which beta was chosen), `rewards` (a list, one number a test prompt), and `low` and `high`, the 95 % interval of the mean of rewards minus those of S with the same seed.
#
# How $\beta$ was picked cannot be read off the table: a student may pick on test prompts and write "validation". So the check brings its own `measure`, with rewards that are made up. In it, the better $\beta$ is another one for each split, method and seed, and from one batch to the next. A rule that differs from the wanted one picks another $\beta$ in some batch, and the six picks together say
# which rule it was. In `_LARGER`, a 1 stands for a batch in which the larger $\beta$ is the better.

# %%
#| export
COLUMNS = ("method", "beta", "stages", "seed", "picked_on", "rewards", "low", "high")
STAGES = dict(S=0, DPO=1, sDPO=3)

_LARGER = {
    ("DPO", 0, "validation"): "101001",   # the one that counts
    ("DPO", 0, "test"): "110010",
    ("sDPO", 0, "validation"): "100110",
    ("sDPO", 0, "test"): "111000",
    ("DPO", 1, "validation"): "011011",   # seed 1 has larger differences, and decides about a mean over seeds
    ("DPO", 1, "test"): "001011",
    ("sDPO", 1, "validation"): "010011",
    ("sDPO", 1, "test"): "101110",
}

def _draw_measure(g, n, beta):
    "A `measure` with made-up rewards of a few prompts."
    batch, prompts = SIZES.index(n), n + 6
    start = int(torch.randint(10**6, (1,), generator=g))

    def measure(method, beta, stages, seed, split):
        if split not in ("validation", "test"):
            raise WrongForm(f'the splits are "validation" and "test", not {split!r}')
        how = "" if method == "S" else f"{float(beta):.6g} {stages}"
        luck = random.Random(f"{start} {method} {how} {seed} {split}")
        hard = random.Random(f"{start} {seed} {split}")
        rewards = [0.3 + 0.3 * hard.random() + 0.1 * luck.random() for _ in range(prompts)]
        if method == "S": return rewards
        side = 1 if _LARGER[method, seed % 2, split][batch] == "1" else -1
        wanted = 0.5 + side * (0.3 if seed % 2 else 0.15) * beta / (1 + beta)
        shift = wanted - sum(rewards) / prompts
        return [reward + shift for reward in rewards]

    return (measure,)


# %% [markdown]
# No two rules may have the same picks, nor one the opposite of another, because of those who take the worst for the best:

# %%
picks = list(_LARGER.values())
opposite = ["".join("10"[int(larger)] for larger in pick) for pick in picks]
assert len({*picks, *opposite, "000000", "111111"}) == 2 * len(_LARGER) + 2

(measure,) = _draw_measure(torch.Generator().manual_seed(0), 3, 0.1)
for beta in (0.3, 0.9):
    rewards = measure("DPO", beta, 1, 0, "validation")
    print(beta, "mean reward", round(sum(rewards) / len(rewards), 3))


# %% [markdown]
# In the first batch 0.9 is to be picked. The answer of the catalogue, with its switches:

# %%
#| export
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

def _pick(measure, seed, wrong):
    "The beta that is best for DPO with seed 0 on validation prompts, or what some take for it."
    method = "sDPO" if "by_sdpo" in wrong else "DPO"
    split = "test" if "on_test" in wrong else "validation"
    seeds = [seed if "each_seed" in wrong else 0]
    if "both_seeds" in wrong: seeds = [0, 1]
    totals = {}
    for beta in (0.3, 0.9):
        totals[beta] = sum(sum(measure(method, beta, STAGES[method], seed, split)) for seed in seeds)
    return (min if "worst" in wrong else max)(totals, key=totals.get)

def _intervals_as(low, high, n, wrong):
    "Low and high as somebody writes them who makes these mistakes."
    middle, half = (low + high) / 2, (high - low) / 2
    if "std_by_n" in wrong: half *= math.sqrt((n - 1) / n)
    if "no_root" in wrong: half *= math.sqrt(n)
    if "rounded" in wrong: return round(middle - half, 3), round(middle + half, 3)
    if "interval" in wrong: return -0.1, 0.1
    return middle - half, middle + half

def _experiment(measure=None, wrong=()):
    "A table of runs."
    if measure is None: (measure,) = _draw_measure(torch.Generator().manual_seed(0), 3, 0.1)
    rows = []
    for seed in range(1 if "one_seed" in wrong else 2):
        best = 0.3 if "not_picked" in wrong else _pick(measure, seed, wrong)
        methods = [("S", math.nan), ("DPO", best), ("DPO", best / 3), ("sDPO", best)]
        if "no_baseline" in wrong: del methods[2]
        if "no_dpo" in wrong: del methods[1]
        for method, beta in methods:
            split = "validation" if "rewards_validation" in wrong else "test"
            rewards = measure(method, beta, STAGES[method], seed, split)
            if method == "S": base = rewards
            low, high = difference_interval(rewards, base, paired="unpaired" not in wrong)
            low, high = _intervals_as(low, high, len(rewards), wrong)
            picked_on = "validation"
            if "picked_on_test" in wrong: picked_on = "test"
            if "picked_on" in wrong and method == "S": picked_on = None
            rows.append([method, beta, STAGES[method], seed, picked_on, rewards, low, high])
    return pd.DataFrame(rows, columns=COLUMNS)


# %%
_experiment().drop(columns="rewards").round(3)


# %% [markdown]
# The rewards are invented, and so the intervals say nothing; what counts is the form of the table. It has the four methods for each of two seeds, and S is in it because all others are compared with it.
#
# What must be true of any such table is its *form*: the columns, one run of S for each seed, and a list of rewards in each row. Of a function that was given a `measure` more is compared: the $\beta$ of sDPO for each seed, and whose rewards are in the table.

# %%
#| export
def _table_of_runs(runs, inputs) -> pd.DataFrame:
    "The form of a table of runs."
    if not isinstance(runs, pd.DataFrame): raise WrongForm(f"a DataFrame is wanted, not {kind_of(runs)}")
    absent = [name for name in COLUMNS if name not in runs.columns]
    if absent: raise WrongForm(f"columns are missing: {', '.join(absent)}")
    for method in ("S", "sDPO"):
        if method not in set(runs["method"]): raise WrongForm(f"there is no run of {method}")
    for run in runs.itertuples():
        if not hasattr(run.rewards, "__len__") or isinstance(run.rewards, str) or getattr(run.rewards, "ndim", 1) != 1:
            kind = kind_of(run.rewards)
            raise WrongForm(f"rewards must be a list, one number a prompt; in the row of {run.method} it is {kind}")
    for seed, rows in runs.groupby("seed"):
        count = int((rows["method"] == "S").sum())
        if count != 1: raise WrongForm(f"for seed {seed} there are {count} runs of S; one is wanted, on test prompts")
        prompts = rows["rewards"].map(len).unique()
        if len(prompts) > 1: raise WrongForm(f"the models of seed {seed} have rewards of {prompts} prompts; take the same prompts")
    return runs

def _measured_on(runs, measure) -> str:
    "The split that the rewards of all rows belong to."
    for split in ("test", "validation"):
        pairs = []
        for run in runs.itertuples():
            want = measure(run.method, run.beta, run.stages, int(run.seed), split)
            pairs.append(alike(torch.as_tensor(run.rewards), torch.tensor(want)))
        if all(pairs): return split
    return "others than `measure` returned"

def _choices(runs, inputs) -> pd.DataFrame|dict:
    "The form of an experiment: which beta was picked for each seed, and on which prompts it was measured."
    runs = _table_of_runs(runs, inputs)
    if not inputs: return runs
    for run in runs.itertuples():
        if run.method not in STAGES: raise WrongForm(f'methods are "S", "DPO" and "sDPO", not {run.method!r}')
        want = STAGES[run.method]
        if run.stages != want: raise WrongForm(f"{run.method} has {run.stages} stages; {want} are asked for")
    stepwise = runs[runs["method"] == "sDPO"]
    betas = {seed: sorted({float(beta) for beta in rows["beta"]}) for seed, rows in stepwise.groupby("seed")}
    if 0 not in betas: raise WrongForm("there is no run of sDPO with seed 0")
    first = betas[0]
    return dict(first=first, second=betas.get(1, first), rewards=_measured_on(runs, *inputs))


# %%
_choices(_experiment(measure), (measure,))


# %% [markdown]
# All other mistakes are properties of the table, so they are edges. None looks at whether sDPO *won*. A check that rewards a result would teach to find it. `_interval_is` computes the interval from the rewards of the row itself and allows a thousandth of its width, or 0.0001 where that is more. An interval with Student's $t$ in the place of 1.96 passes, and so does one that was rounded to four digits; one that was rounded to three, or typed in, does not.
#
# A table that somebody has at hand can be checked, too. Then there is no function to be watched, and the table is believed where it says how $\beta$ was picked.

# %%
#| export
def _is_a_table(f) -> bool:
    "Whether it is a table that somebody has at hand, or one that `run_check` has made a function of."
    return not callable(f) or getattr(f, "func", None) is copy.deepcopy

def _on_a_table(test):
    "A test of a table as a test of whoever makes it."
    def edge(f, g):
        inputs = () if _is_a_table(f) else _draw_measure(g, 3, 0.1)
        return test(_table_of_runs(f(*inputs), inputs))
    return edge

def _lacks_dpo(stages_of, runs) -> bool:
    "Whether a run of sDPO has no run of DPO beside it, at its beta over some number, with the same seed."
    for run in runs[runs["method"] == "sDPO"].itertuples():
        beside = runs[(runs["method"] == "DPO") & (runs["seed"] == run.seed)]
        wanted = run.beta / stages_of(run)
        if not any(math.isclose(beta, wanted, rel_tol=0.01) for beta in beside["beta"]): return True
    return False

def _says_test(runs): return (runs["picked_on"] == "test").any()

def _says_something_else(runs): return not (runs["picked_on"] == "validation").all()

def _has_one_seed(runs): return any(rows["seed"].nunique() < 2 for _, rows in runs.groupby("method"))

def _never_looks(f, g) -> bool:
    "Whether the same beta is picked, whatever was measured."
    if _is_a_table(f): return False
    picked = [_choices(f(*inputs), inputs) for inputs in (_draw_measure(g, n, 0.1) for n in SIZES)]
    return len({(*choice["first"], *choice["second"]) for choice in picked}) == 1

def _interval_is(wrong, runs) -> bool:
    "Whether all intervals are right but for these mistakes, to a thousandth of their width or to 0.0001."
    base = runs[runs["method"] == "S"].set_index("seed")["rewards"]
    for run in runs[runs["method"] != "S"].itertuples():
        n = len(run.rewards)
        low, high = difference_interval(run.rewards, base[run.seed], paired="unpaired" not in wrong)
        middle, half = (low + high) / 2, (high - low) / 2
        fits = False
        for z in (1.96, student_t.ppf(0.975, n - 1)):
            wide = z / 1.96 * half
            low, high = _intervals_as(middle - wide, middle + wide, n, wrong)
            fits |= max(abs(run.low - low), abs(run.high - high)) <= max(0.002 * half, 1e-4)
        if not fits: return False
    return True


# %% [markdown]
# A student who did everything else right, and left out DPO at $\beta/T$. Only one of the three tests should object:

# %%
without_baseline = _experiment(wrong=["no_baseline"])

{
    "DPO at beta/T is missing": _lacks_dpo(operator.attrgetter("stages"), without_baseline),
    "beta was picked on test prompts": _says_test(without_baseline),
    "the intervals are paired": _interval_is((), without_baseline),
}


# %%
#| export
def _wrong_interval(*wrong): return _on_a_table(lambda runs: _interval_is(wrong, runs) and not _interval_is((), runs))

EXERCISES["experiment"] = Exercise(
    name="experiment",
    crooked=_experiment,
    draw=_draw_measure,
    form=_choices,
    read=("08", "Was the distance worth it?"),
    says=dict(
        on_test="beta was picked on test prompts; use validation prompts.",
        worst="beta is the one with the lowest reward; take the highest.",
        by_sdpo="beta was picked for sDPO; pick it for DPO, and give it to both.",
        each_seed="each seed has a beta of its own; pick it with seed 0 for all.",
        both_seeds="beta was picked over all seeds; pick it with seed 0.",
        rewards_validation="the rewards are those of validation prompts; hand in those of test prompts.",
        not_picked="beta is the same whatever `measure` says; pick it by its rewards.",
        no_baseline="there is no DPO at beta/T (T: the stages of sDPO) beside sDPO, for every seed.",
        no_dpo="there is no DPO at the beta of sDPO, for every seed.",
        picked_on_test="picked_on is \"test\"; pick beta on validation prompts.",
        picked_on="picked_on must be \"validation\" in every row, in those of S, too.",
        one_seed="there is one seed; another may say the opposite.",
        unpaired="the interval is unpaired; both models had the same prompts.",
        std_by_n="the standard deviation is divided by n; divide by n - 1.",
        no_root="the standard deviation is not divided by sqrt(n).",
        rounded="low and high are rounded; round when you show them.",
        interval="low and high are not the mean of rewards minus those of S, -/+ 1.96 s / sqrt(n).",
    ),
    edges=dict(
        not_picked=_never_looks,
        no_baseline=_on_a_table(partial(_lacks_dpo, operator.attrgetter("stages"))),
        no_dpo=_on_a_table(partial(_lacks_dpo, lambda run: 1)),
        picked_on_test=_on_a_table(_says_test),
        picked_on=_on_a_table(_says_something_else),
        one_seed=_on_a_table(_has_one_seed),
        unpaired=_wrong_interval("unpaired"),
        std_by_n=_wrong_interval("std_by_n"),
        no_root=_wrong_interval("no_root"),
        rounded=_wrong_interval("rounded"),
        interval=_on_a_table(lambda runs: not _interval_is((), runs)),
    ),
    telling=("not_picked",),
    names={
        "first": "betas of sDPO with seed 0",
        "first[]": "beta of sDPO with seed 0",
        "second": "betas of sDPO with seed 1",
        "second[]": "beta of sDPO with seed 1",
        "rewards": "prompts of the rewards",
    },
    elsewhere=dict(
        no_baseline=("03", "What $T$ stages add up to"),
        unpaired=("08", "Ask both models the same prompts"),
        std_by_n=("08", "Ask both models the same prompts"),
        no_root=("08", "Ask both models the same prompts"),
        rounded=("08", "Ask both models the same prompts"),
        interval=("08", "Ask both models the same prompts"),
        one_seed=("08", "Ask both models the same prompts"),
    ),
)

def check_experiment(
    runs,           # (measure) -> data frame with COLUMNS, one run a row; or such a table itself
    seed: int=None, # of the made-up rewards; None: fresh ones
) -> int:           # the seed
    """Check that sDPO was compared fairly. Raises CheckFailed for a table that is not enough to say so.
    measure(method, beta, stages, seed, split) returns a list of rewards. Only a function can be asked how beta
    was picked; of a table, `picked_on` is believed."""
    exercise = EXERCISES["experiment"]
    if _is_a_table(runs): exercise = dataclasses.replace(exercise, draw=None)
    return run_check(exercise, runs, seed)


# %%
mine = _experiment()
mine["low"], mine["high"] = mine["low"] - 0.04, mine["high"] + 0.04
print(said(check_experiment, mine))
print(said(check_experiment, _experiment(wrong=["unpaired"])))
print(said(check_experiment, _experiment(wrong=["no_baseline"])))

def picks_on_test(measure):
    def mean_reward(beta): return sum(measure("DPO", beta, 1, 0, "test"))
    best, rows = max((0.3, 0.9), key=mean_reward), []
    for seed in (0, 1):
        for method, beta in (("S", math.nan), ("DPO", best), ("DPO", best / 3), ("sDPO", best)):
            stages = STAGES[method]
            rewards = measure(method, beta, stages, seed, "test")
            if method == "S": base = rewards
            low, high = difference_interval(rewards, base)
            rows.append([method, beta, stages, seed, "validation", rewards, low, high])
    return pd.DataFrame(rows, columns=COLUMNS)

print(said(check_experiment, picks_on_test))


# %% [markdown]
# The first table has intervals that were shifted, the second has intervals for prompts that would differ between the models, and the third compares sDPO with DPO at the same $\beta$ alone. The last one is a function. It writes "validation" into its table, and the check has seen what it did. *Ask:* sDPO at $\beta=0.3$ with three stages beats DPO at $\beta=0.3$. What have you learned?
#
# ## The catalogue
#
# Every mistake of every exercise, made on purpose. The check must call each by its own name. (`diagnose` is a check without the question whose function it is; the crooked functions are the package's own.) The column *what is said* is the sentence alone; *characters* counts the whole message, with the section to read and the seed. The limit is 300, and the longest has 296.

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
# And as in [chapter 03](03_loss.ipynb), mistakes down and checks across, for four of the checks. Read it by rows: three mistakes can be made in two or three of these exercises, and then each check names its own.

# %%
def marks(names):
    "Which check names which mistake."
    table = catalogue.loc[names, "mistake named"].reset_index()
    return pd.crosstab(table["mistake made"], table["check"]).replace({0: "", 1: "named"})

marks(["dpo_loss", "gradient", "accuracy", "by_prompt"])

# %% [markdown]
# Two mistakes at once? No pair may pass. Some pairs are named by one of the two: who does not use the reference cannot have its sign wrong. A few fit another mistake of the list exactly, or stop with an error. (`train` takes some seconds more; `tests/test_checks.py` does it.)

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
# Of 632 pairs, 464 are named as they were made and 159 by the one that is left of them. The last nine are worth a look. One stops with an error. One has a better name: with the mask unshifted and the last token left out, it is the first token that is missing. And seven fit another pair exactly: in `accumulation`, to add *means* and leave out the last, short part gives the gradient of dividing sums by `size` and leaving it out, for all other parts have `size` pairs. The message is then wrong about one word, and right about the second.
#
# ## No false alarm
#
# A check that accuses a right answer is worse than none. Here are right answers to two exercises, each written in two other ways, with a hundred seeds each. `tests/test_checks.py` does this for fourteen exercises, in four ways and with 200 seeds: 11,200 checks without an alarm. `train` has four seeds there, since each of them trains two stages; predictions and experiments draw nothing.

# %%
def expanded(t, r, beta): return (t - r) ** 2 - (t - r) / beta + 1 / (4 * beta ** 2)
def in_fp32(t, r, beta): return F.mse_loss((t - r).float(), torch.full(t.shape, 0.5 / beta), reduction="none")
def by_sign(gamma, gamma_ref): return ((gamma - gamma_ref).sign() + 1) / 2 + 0 * (gamma - gamma_ref)
def by_comparing(gamma, gamma_ref):
    verdict = (gamma > gamma_ref) + 0.5 * (gamma == gamma_ref)
    return torch.where(gamma.isnan() | gamma_ref.isnan(), math.nan, verdict.float())

alarms = 0
for check, ways in ((check_ipo, (expanded, in_fp32)), (check_accuracy, (by_sign, by_comparing))):
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
# `report` gets these lines as text, with or without their beginning `#| question`. So it counts every question, also one whose cell was not run. (Without the text it reads the cells that were run, and knows only these.)

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


# %% [markdown]
# It calls each check once more, on what the name means *now*: a function that passed an hour ago and was changed since is not a pass. There is one seed for all, so that the table can be made again. Whatever the notebook holds, it never raises, for it is the cell that a student in trouble runs.

# %%
#| export
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
def two_at_once(c, r, rc, rr, beta): return -beta * F.logsigmoid(c - r + rc - rr)
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
# What the checks say is printed in full above the table, because a table cuts its cells. From its own cells, as a notebook keeps them in `In`:

# %%
cells = ["", "#| question q1 4 check_sequence_logps sequence_logps\ncheck_sequence_logps(sequence_logps)"]
report(student | dict(In=cells), seed=1)

# %% [markdown]
# ## What this does not show
#
# - A check knows the mistakes that somebody has thought of. A new one is "not in a way that this check knows", with the first number that differs. Then [add a switch](19_mistakes.ipynb): one line in the crooked function, one sentence.
# - Which of these mistakes are common. The catalogue comes from this project's own work, from what others report about their trainers, and from a few readers. It was not counted in a class.
# - Whether a student has understood. The questions by hand are for that.
#
# ## What you now have
#
# - Seventeen checks, `check_sequence_logps` to `check_experiment`. Each takes the student's function, prints that it passed and returns the seed, or raises `CheckFailed` with one message.
# - `EXERCISES`: the catalogue, as data. [Teaching](teaching.ipynb) prints it as a bank of questions.
# - `report`, the last cell of an assignment.
#
# ## Questions to test yourself
#
# 1. Why are the gammas of `accuracy` whole numbers?
#
# <details><summary>Answer</summary>
#
# So that there are ties. With random real numbers no two are equal, and all ways to treat a tie would be right.
#
# </details>
#
# 2. `accumulation` compares a gradient. Why is it not enough to compare the gradient?
#
# <details><summary>Answer</summary>
#
# The gradient of `kept` and of `too_many` is right. What is wrong is the memory: all graphs are alive at once, or a part is larger than allowed. Only somebody who watches the calls can see that.
#
# </details>
#
# 3. Why does the exercise `train` use a table that is not that of the model?
#
# <details><summary>Answer</summary>
#
# With its own table the first loss is $\ln 2$ for everybody, also for somebody who takes the live policy as the reference, and swapping chosen and rejected in the table changes nothing. It is the test at zero gain of chapter 03, which is blind.
#
# </details>
#
# ## Try this
#
# Draw other inputs for `accuracy`: real numbers, `draw=_draw_gammas` without its $\beta$, in a copy made by `dataclasses.replace`. Which mistakes does `diagnose` still name?
#
# <details><summary>What you should see</summary>
#
# `worse`, `soft` and `nan` are named, and so is `no_ref`, but not with every seed: with seed 13 the reference changes no verdict. `strict` and `weak` pass with every seed, since no pair is a tie.
#
# </details>
