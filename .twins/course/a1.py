# %% [markdown]
# # Assignment 1: a loss from four numbers
# > Write the DPO loss, its slope and a rival, and say before you compute what they will do.
#
# <!-- badge -->
#
# **First: File > Save a copy in Drive.** A notebook that was opened from GitHub is not saved when you close it.
#
# **Goal.** A model gives four log-probabilities for a pair of answers, two of its own and two of the reference. From these four numbers come the loss, its gradient, and everything that DPO does. You write the functions; a check tells
# you what is wrong with them, if something is.
# **Before you start**, read [chapter 02](https://github.com/sdpo-nb/sdpo_nb/blob/main/nbs/02_logprobs.ipynb), part 1, and [chapter 03](https://github.com/sdpo-nb/sdpo_nb/blob/main/nbs/03_loss.ipynb) to the end of "What $\beta$ does", and "Label smoothing".
# **Time**: 105 minutes for reading the two chapters, then 90 here. All cells together run in less than a minute. **Runtime**: CPU (*Runtime > Change runtime type > CPU*). **Points**: 20.
#
# **How it works.** Each question has a function with `...` in it. Replace the `...`, run the cell, and run the check under it. As long as the `...` is there, the check says "nothing yet". You may run a check as often as you like: it draws new numbers each time.
# To get the same numbers again, pass the seed of a message, `try_check(check_ipo, ipo, seed=528380)`, and put a `print` into your function. A question gives all its points or none. Keep the names of the functions, and leave the lines that begin with `#| question` as they are. A check may send you to a section
# that you were not asked to read. You can work the question out without it; it is there in case you are stuck.

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    source = '"sdpo_nb @ git+https://github.com/sdpo-nb/sdpo_nb@v0.1.0"'
    get_ipython().run_line_magic("pip", f"install -q {source}")
again = "Choose Runtime > Disconnect and delete runtime, then run this cell again."
assert importlib.util.find_spec("sdpo_nb"), f"pip could not install sdpo_nb, see above. {again}"

import sdpo_nb
version = sdpo_nb.__version__
assert version == "0.1.0", f"This assignment is made for sdpo_nb 0.1.0, and {version} is installed. {again}"

import math

import torch
import torch.nn.functional as F

from sdpo_nb.checks import check_dpo_loss, check_gradient, check_ipo, check_predictions, check_sequence_logps
from sdpo_nb.checks import report
from sdpo_nb.course import try_check


# %% [markdown]
# ## Question 1. How likely is this answer? (4 points)
#
# A language model gives, at every position, *logits*: a score for each token that could come next. The log-probability of an answer $y$ to a prompt $x$ is the sum over its tokens,
#
# $$\log \pi(y|x) = \sum_t \log \pi(y_t \mid x, y_{<t}).$$
#
# Two things are easy to forget. The logits at position $i$ speak about the token at position $i+1$. And only the tokens of the *answer* count, not those of the prompt and not the padding; `mask` is true for them.
#
# The result is in *nats*, the unit of the natural logarithm. Logits may come in bf16, which keeps about three digits: convert them to fp32 before the softmax.
#
# *By hand.* Three tokens, the first is the prompt; a vocabulary of two. At position 0 the logits are $(0, \ln 3)$, so token 1 has the probability 3/4. At position 1 they are $(0, 0)$: one half each. For `ids = [0, 1, 0]`
# the sum is $\ln\frac34 + \ln\frac12 = -0.981$. What stands at position 2 is never read.

# %%
def sequence_logps(
    logits, # (n, L, V): n rows of L positions, a score for each of V tokens; any float dtype
    ids,    # (n, L): the tokens of each row
    mask,   # (n, L) bool: true where a token belongs to the answer
):          # -> (n,): log-probability of each answer, in nats; computed in fp32 or better
    "Sum of the log-probabilities of the answer's tokens, one number a row."
    ### BEGIN SOLUTION
    logits, ids, mask = logits[:, :-1], ids[:, 1:], mask[:, 1:]  # shift
    wide = logits if logits.dtype == torch.float64 else logits.float()
    each = wide.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return (each * mask).sum(-1)
    ### END SOLUTION


# %%
#| teacher
example = torch.tensor([[[0., math.log(3)], [0., 0.], [5., -5.]]])
by_hand = sequence_logps(example, torch.tensor([[0, 1, 0]]), torch.tensor([[False, True, True]]))
assert round(by_hand.item(), 3) == -0.981

# %%
#| question q1 4 check_sequence_logps sequence_logps
try_check(check_sequence_logps, sequence_logps)


# %% [markdown]
# ## Question 2. The loss (4 points)
#
# The *policy* is the model in training, the *reference* a frozen model, usually the one that training started from. Of one pair we know how likely the policy finds the chosen answer $y_w$ and the rejected answer $y_l$, and how likely the reference finds them. The loss is
#
# $$L = -\log\sigma\big(\beta\,\Delta\big), \qquad \Delta = \big(\log\pi(y_w|x) - \log\pi(y_l|x)\big) - \big(\log\pi_{ref}(y_w|x) - \log\pi_{ref}(y_l|x)\big).$$
#
# $\Delta$ is the *gain*: how much more than the reference the policy prefers the chosen answer. Return one number for each pair; the mean over a batch is taken later. It must also work for $\Delta = -9000$ nats, where
# $\sigma$ is 0 in floating point.
#
# *By hand.* Policy $-2.0$ and $-3.0$, reference $-2.5$ and $-2.9$, $\beta = 0.5$. Then $\Delta = 1.0 - 0.4 = 0.6$ and $L = -\log\sigma(0.3) = 0.554$.

# %%
def dpo_loss(
    chosen,       # (n,) log pi(y_w|x) of the policy, nats
    rejected,     # (n,) log pi(y_l|x) of the policy, nats
    ref_chosen,   # (n,) log pi_ref(y_w|x), nats
    ref_rejected, # (n,) log pi_ref(y_l|x), nats
    beta,         # a number > 0, per nat
):                # -> (n,): the loss of each pair
    "-log sigmoid(beta gain), one number a pair."
    ### BEGIN SOLUTION
    gain = (chosen - rejected) - (ref_chosen - ref_rejected)
    return -F.logsigmoid(beta * gain)
    ### END SOLUTION


# %%
#| teacher
four = [torch.tensor([v]) for v in (-2.0, -3.0, -2.5, -2.9)]
assert round(dpo_loss(*four, 0.5).item(), 3) == 0.554

# %%
#| question q2 4 check_dpo_loss dpo_loss
try_check(check_dpo_loss, dpo_loss)


# %% [markdown]
# ## Question 3. The slope (2 points)
#
# From here on two numbers per pair are enough: $\gamma_\theta = \log\pi(y_w|x) - \log\pi(y_l|x)$ of the policy, and $\gamma_{ref}$, the same of the reference. So $\Delta = \gamma_\theta - \gamma_{ref}$.
#
# How does the loss of a pair change with $\gamma_\theta$? Take the derivative on paper; $\frac{d}{dz}\log\sigma(z) = \sigma(-z)$ helps. Then write it down. Do not use autograd: this function is about knowing the formula.
#
# *By hand.* Gain 0.6 and $\beta = 0.5$: the slope is $-0.213$. At gain 0 it is $-\beta/2 = -0.25$.

# %%
def gradient(
    gamma_theta, # (n,) gamma of the policy, nats
    gamma_ref,   # (n,) gamma of the reference, nats
    beta,        # a number > 0, per nat
):               # -> (n,): derivative of each pair's loss in gamma_theta
    "The derivative of -log sigmoid(beta (gamma_theta - gamma_ref)) in gamma_theta."
    ### BEGIN SOLUTION
    pull = torch.sigmoid(-beta * (gamma_theta - gamma_ref))
    return -beta * pull
    ### END SOLUTION


# %%
#| teacher
assert round(gradient(torch.tensor([1.0]), torch.tensor([0.4]), 0.5).item(), 3) == -0.213

# %%
#| question q3 2 check_gradient gradient
try_check(check_gradient, gradient)


# %% [markdown]
# ## Question 4. A rival (3 points)
#
# The DPO loss never stops asking for more gain: it falls for ever. IPO (arXiv 2310.12036) asks for a certain gain, and punishes more than that, too:
#
# $$L_{IPO} = \Big(\Delta - \frac{1}{2\beta}\Big)^2.$$
#
# This loss is not in the package; you are on your own.
#
# *By hand.* Gain 0.6 and $\beta = 0.5$: the wanted gain is 1, so $L_{IPO} = (0.6 - 1)^2 = 0.16$.

# %%
def ipo(
    gamma_theta, # (n,) gamma of the policy, nats
    gamma_ref,   # (n,) gamma of the reference, nats
    beta,        # a number > 0, per nat
):               # -> (n,): the loss of each pair, nats squared
    "Squared distance of the gain from 1 / (2 beta)."
    ### BEGIN SOLUTION
    wanted = 1 / (2 * beta)
    return (gamma_theta - gamma_ref - wanted) ** 2
    ### END SOLUTION


# %%
#| teacher
assert round(ipo(torch.tensor([1.0]), torch.tensor([0.4]), 0.5).item(), 2) == 0.16

# %%
#| question q4 3 check_ipo ipo
try_check(check_ipo, ipo)

# %% [markdown]
# ## Question 5. Say it before you see it (4 points)
#
# Whoever trains models looks at a log and must know what is normal. Seven predictions; work them out with paper and a calculator, and write numbers with three digits, or expressions such as `math.log(3)`.
# The grader reads what stands in this cell, and does not call functions of your own: write the numbers here, and not into a later cell.
#
# - `first_loss`: the loss in the first step, if the policy begins as a copy of the reference. (It does not depend on $\beta$.)
# - `loss` and `weight`: a pair has reached a gain of 20 nats at $\beta = 0.1$. What is its loss? And its weight $\lambda = \sigma(-\beta\Delta)$, which says how hard it still pulls?
# - `settles`: *label smoothing* $s$ says that a share $s$ of the labels is wrong. The loss becomes $-(1-s)\log\sigma(\beta\Delta) - s\log\sigma(-\beta\Delta)$, and the gain of a pair no longer rises for ever. At which gain, in nats, does it settle for $s = 0.1$ and $\beta = 0.5$?
# - `nearer`: two runs on many pairs, some with wrong labels (so that there is an end to reach), one with $\beta = 1$ and one with $\beta = 4$, both trained until nothing changes any more. Which of the two ends nearer to its reference? Write 1 or 4.
# - `farther_sgd`: the same two runs after three steps of plain gradient descent, with the same learning rate. Which has moved farther? Write 1 or 4.
# - `farther_adam`: the same with Adam at a small learning rate. Write 1 or 4, or 0 if the two differ by less than one percent.
#
# *By hand*, as a model: a pair with a gain of 10 nats at $\beta = 0.1$ has $\beta\Delta = 1$, the loss $\ln(1 + e^{-1}) = 0.313$, and the weight $1/(1 + e) = 0.269$.

# %%
predictions = {
    "first_loss": math.log(2), ### SOLUTION "first_loss": ...,
    "loss": math.log(1 + math.exp(-2)), ### SOLUTION "loss": ...,
    "weight": 1 / (1 + math.exp(2)), ### SOLUTION "weight": ...,
    "settles": math.log(9) / 0.5, ### SOLUTION "settles": ...,
    "nearer": 4, ### SOLUTION "nearer": ...,
    "farther_sgd": 4, ### SOLUTION "farther_sgd": ...,
    "farther_adam": 0, ### SOLUTION "farther_adam": ...,
}

# %%
#| question q5 4 check_predictions predictions
try_check(check_predictions, predictions)

# %% [markdown]
# <!-- question q6 3 manual -->
# ## Question 6. In words (3 points)
#
# Write $S$ for the reference and $r(x,y)$ for the reward of an answer (chapter 03 writes $k\,r$). RLHF looks for the policy with the highest mean reward that stays near $S$; $\beta$ is the price of going away. The best one is
# $\pi^*(y|x) = S(y|x)\,e^{r(x,y)/\beta} / Z(x)$, and nobody can compute $Z(x)$, a sum over all texts. The DPO loss has no $Z$ in it. Why not? Explain it in at most 120 words to somebody who knows what a
# softmax is. Say what $Z$ depends on and what it does not depend on, and where exactly it disappears. What would go wrong if the two answers of a pair belonged to different prompts?
#
# *Your answer. Double-click this cell and write here, not in a new cell. Keep the line `<!-- question q6 ... -->` at its top.*
#
# ### BEGIN SOLUTION
# Solve the formula for the reward: $r(x,y) = \beta\log\frac{\pi^*(y|x)}{S(y|x)} + \beta\log Z(x)$. $Z$ is a sum over all answers to the prompt, so it depends on the prompt $x$ and on no single answer. Bradley-Terry says that the chance of
# preferring one answer is $\sigma$ of the *difference* of two rewards. Both answers of a pair belong to one prompt, so $\beta\log Z(x)$ stands in both rewards and cancels in the difference. If the answers belonged to different prompts
# $x$ and $x'$, the term $\beta\log Z(x) - \beta\log Z(x')$ would stay, and nobody could compute the loss.
#
# *Marking:* 1 point: $Z$ depends on $x$ only. 1 point: comparisons see a difference of rewards, and it cancels there. 1 point: with two prompts it does not.
# ### END SOLUTION

# %% [markdown]
# ## Hand in
#
# The last cell calls every check once more and adds up. Run it, then *File > Download > Download .ipynb*, and hand in this file. The grader runs your functions with new numbers, so there is no need to keep the outputs. Question 6 is marked by a person, so its points are not in the sum yet.

# %%
report(globals())
