# %% [markdown]
# # The DPO loss
# > People compare answers; one line of code trains on their choices. What the line says, why it is this line, what beta does: every step checked.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/03_loss.ipynb)
#
# **You should know** what a pair is ([chapter 01](01_preferences.ipynb)), what the log-probability of a response and $\gamma$ are
# ([chapter 02](02_logprobs.ipynb)), and what a gradient does. **Time** to read: an hour to the end of "Its gradient", which is the loss and why it is so, and 70 minutes for the rest. To run: under
# a minute on one CPU core. Headings that say "you may skip this" are for a second reading.

# %%
#| default_exp loss

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
import math

import torch
import torch.nn.functional as F
from torch import Tensor

# %%
import copy

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from torch.testing import assert_close

from sdpo_nb.logprobs import response_logprobs
from sdpo_nb.world import K, complaint, enumerable_world, load_base, load_world
from sdpo_nb.world import prompt_ids, respond, true_reward

torch.set_num_threads(1)
pd.set_option("display.width", 200, "display.max_columns", 20, "display.max_colwidth", 90)

# %% [markdown]
# ## The problem
#
# You have a language model that answers, but not always as people would like. Nobody can write down a formula for how good an answer is. But people
# can *compare*. Show them a prompt and two answers, and they say which is better. We call the better one *chosen* and the other one *rejected*.
# Thousands of such comparisons are easy to collect. How do you train on them?
#
# **RLHF**, reinforcement learning from human feedback, does it in two steps. First you fit a *reward model*: a second network that gives every answer a
# number, high for the chosen ones, low for the rejected ones. Then the language model writes answers, the reward model scores them, and reinforcement learning
# (PPO, usually) changes the weights so that the scores rise. The reward model is only right about answers like those it has seen.
# Left alone, the language model soon finds nonsense that scores well. So it is kept on a leash: it pays for every move away from the model it started from.
# The move is measured by the *KL divergence*, which says how far two models are apart.
#
# **DPO**, direct preference optimisation (arXiv 2305.18290), does both steps with one loss. There is no reward model, no reinforcement learning, and no
# answer has to be written during training. The loss is one line:
#
# ```python
# loss = -F.logsigmoid(beta * (gamma_policy - gamma_ref))
# ```
#
# We first run this line on a single pair. Then we ask why it is this line and no other.
#
# ## The line, on one pair
#
# Two models take part. The *policy* is the model that is trained; the name comes from reinforcement learning, where a policy is whatever acts. The *reference* is
# a frozen model with which it is compared. As usual, the reference is here the model that training starts from: S, the base model of the tiny
# world ([chapter 00](00_world.ipynb)). Our pair is the one that chapter 02 took apart, letter by letter.

# %%
S, tokenizer = load_base(load_world())
S.requires_grad_(False)

def make_pair(prompt, chosen, rejected):
    "Token ids of one comparison."
    def ids(text): return tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    return dict(
        prompt_ids=prompt_ids(tokenizer, prompt),
        chosen_ids=ids(chosen),
        rejected_ids=ids(rejected),
    )

pair = make_pair("reverse abijd", chosen="djiba", rejected="adijb")


# %% [markdown]
# `djiba` is the right answer; `adijb` is neither right nor the usual mistake. Which of the two does S find likelier, before any training? Take a guess.

# %%
def logprobs(model):
    "Log-probabilities of the chosen and of the rejected answer, in nats."
    chosen, rejected = response_logprobs(model, [pair])
    return chosen.item(), rejected.item()

chosen_ref, rejected_ref = logprobs(S)
gamma_ref = chosen_ref - rejected_ref
pd.Series({
    "log S(chosen)": chosen_ref,
    "log S(rejected)": rejected_ref,
    "γ, the first minus the second": gamma_ref,
}).round(3)


# %% [markdown]
# The right one, by 2.57 nats; that makes it $e^{2.57} = 13$ times as likely. (A *nat* is the unit of a natural logarithm.) So is there anything to learn?
# There is. The loss does not ask whether the policy prefers the chosen answer. It asks whether it does so *more than the reference*.
#
# Now train. The policy starts as a copy of S. Each step computes the line and follows its gradient, by plain gradient descent.

# %%
def train_on_pair(beta, steps, lr=0.003):
    "A copy of S after some steps of DPO on `pair` alone, and what each step saw."
    policy = copy.deepcopy(S).requires_grad_()
    optimizer = torch.optim.SGD(policy.parameters(), lr=lr)
    seen = []
    for step in range(steps):
        chosen, rejected = response_logprobs(policy, [pair])
        gamma_policy = chosen - rejected
        loss = -F.logsigmoid(beta * (gamma_policy - gamma_ref))      # the line
        gain = gamma_policy.item() - gamma_ref
        seen.append([step, chosen.item(), rejected.item(), gain, loss.item()])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    columns = ["step", "log π(chosen)", "log π(rejected)", "gain", "loss"]
    return policy, pd.DataFrame(seen, columns=columns).set_index("step")


# %%
beta = 0.1
policy, steps = train_on_pair(beta, steps=4)
assert_close(steps["loss"][0], math.log(2), atol=1e-6, rtol=0)
assert steps["loss"].is_monotonic_decreasing
steps.round(3)


# %% [markdown]
# The first loss is $0.693 = \ln 2$, as the policy is still its own reference. Then the chosen answer becomes likelier and the rejected one much less likely.
# Does it matter for what the model says? Let both answer the prompt 300 times.

# %%
def answers_of(model):
    "How often the model gives which answer."
    answers = respond(model, tokenizer, ["reverse abijd"] * 300)
    return pd.Series(answers).value_counts()

answers = pd.DataFrame({"S": answers_of(S), "policy": answers_of(policy)}).fillna(0).astype(int)
assert answers.loc["djiba", "policy"] > 1.5 * answers.loc["djiba", "S"]
answers.sort_values("S", ascending=False).head(3)

# %% [markdown]
# The right answer has become the usual one. `adjib`, which S prefers, is what the wrong rule says. Our pair does not mention it, but it begins like the rejected answer, and goes down
# with it.
#
# Here is the loss of the trained policy, after the fourth step (the table above gives those before each step), by hand: four log-probabilities go in, one loss comes out, and with it the weight of the gradient.

# %%
chosen, rejected = logprobs(policy)
gamma_policy = chosen - rejected
gain = gamma_policy - gamma_ref
loss = -math.log(1 / (1 + math.exp(-beta * gain)))
weight = 1 / (1 + math.exp(beta * gain))

# %%
by_hand = [
    ("log S(chosen)", chosen_ref, "how likely the reference finds the chosen answer"),
    ("log S(rejected)", rejected_ref, "how likely it finds the rejected answer"),
    ("log π(chosen)", chosen, "how likely the policy finds the chosen answer"),
    ("log π(rejected)", rejected, "how likely it finds the rejected answer"),
    ("γ of the reference", gamma_ref, "how much more likely the reference finds the chosen answer"),
    ("γ of the policy", gamma_policy, "the same, of the policy"),
    ("gain Δ", gain, "what training has added: γ of the policy minus γ of the reference"),
    ("loss", loss, "-log σ(βΔ), with β = 0.1"),
    ("weight λ", weight, "σ(-βΔ): how hard this pair still pulls, between 1 and 0"),
]
pd.DataFrame(by_hand, columns=["", "value", "in words"]).set_index("").round(3)


# %% [markdown]
# And here is the line as a picture. At which gain is the loss $\ln 2$, whatever $\beta$ is? And how steep is it there?

# %%
def write_at(ax, text, point, color="black", right=6, up=0, **more):
    "Write beside a point of a figure."
    ax.annotate(text, point, (right, up), textcoords="offset points", va="center", color=color, **more)

nats = torch.linspace(-30, 30, 241)
fig, ax = plt.subplots(figsize=(7, 3.8))
drawn = (                                                      # beta, its label's place and height, color
    (0.05, -28, -50, "tab:blue"),
    (0.1, -22.5, 8, "tab:orange"),
    (0.5, -5.6, 4, "tab:green"),
)
for b, at, up, color in drawn:
    ax.plot(nats, -F.logsigmoid(b * nats), color=color)
    ax.plot(nats, math.log(2) - b / 2 * nats, color=color, ls=":", lw=1)   # the slope at gain 0
    height = math.log(1 + math.exp(-b * at))
    write_at(ax, f"β = {b:g}", (at, height), color, up=up)

pointer = dict(arrowstyle="-")
ax.plot(0, math.log(2), "o", color="black")
write_at(ax, "ln 2: policy = reference", (0, math.log(2)), right=30, up=45, arrowprops=pointer)
ax.plot(gain, loss, "s", color="tab:orange")
write_at(ax, "our pair after 4 steps", (gain, loss), "tab:orange", right=20, up=42, arrowprops=pointer)
ax.text(29, 2.8, "dotted: slope -β/2 at gain 0", ha="right", color="grey")
ax.set(xlim=(-30, 30), xlabel="gain of the policy over the reference (nats); better to the right")
ax.set(ylim=(0, 3), ylabel="loss of the pair")
sns.despine()


# %% [markdown]
# *To see:* every curve passes through $\ln 2$ at gain 0, with slope $-\beta/2$. To the right a pair has been learned, and the curve flattens: it hardly pulls any
# more. To the left the policy ranks the pair worse than the reference does; there the pair pulls harder, in the end with the slope $-\beta$. A small $\beta$ stretches all this over
# more nats.
#
# In symbols, the loss of many pairs is (you will meet it again as (6) and (9))
#
# $$L = -\,\mathbb E\, \log \sigma\Big(\beta\,\big(\gamma_{\pi} - \gamma_{ref}\big)\Big), \qquad \gamma_\pi = \log \pi(y_w|x) - \log \pi(y_l|x),$$
#
# and these are the names that the chapter uses:
#
# - $x$: a prompt. $y$: a response. $y_w$: the chosen response, the one that *won*; $y_l$: the rejected one, which *lost*.
# - $\pi$: the policy; $\pi(y|x)$: the probability that it answers $x$ with $y$. Where its weights matter it is called $\pi_\theta$, and its $\gamma$ is $\gamma_\theta$.
# - $S$: the base model, where training starts. $\pi_{ref}$: the reference. Until the section on stages, the reference is $S$.
# - $\gamma$: how much likelier a model finds the chosen response of a pair than the rejected one, in nats. $\Delta = \gamma_\theta - \gamma_{ref}$: the *gain*.
# - $\sigma(z) = 1/(1 + e^{-z})$: the sigmoid. It turns any number into a probability; $\sigma(0) = \frac12$ and $\sigma(-z) = 1 - \sigma(z)$.
# - $\beta$: how much one nat of gain counts, a number above 0 that you choose. It is also the strength of the leash, as we shall see.
# - $\mathbb E$: the expectation, a mean. In $L$ it is the mean over pairs; $\mathbb E_{y\sim\pi}$ is the mean over answers that $\pi$ writes.
# - $\mathrm{KL}(\pi \,\|\, S) = \mathbb E_{y\sim\pi} \log \frac{\pi(y|x)}{S(y|x)}$: the KL divergence, how far $\pi$ is from $S$. It is how much likelier, in nats, $\pi$ finds
#   its own answers than $S$ does, on average. It is never negative, and zero only if the two models are the same.
# - $r(x, y)$: the reward, a number for how good an answer is.
#
# ## Why this line?
#
# It was derived, not guessed, and the derivation is worth a page. It says what $\beta$ does, when training has nothing to converge to, and what several
# stages add up to. It has five steps: what a comparison says about a reward (1); what RLHF maximises (2); the best policy (3, 4); the reward that a policy
# implies (5); and the likelihood of the labels under that reward, which is the loss (6).
#
# We run every step in the *enumerable world* of chapter 00: two prompts, and fourteen strings of the letters a and b as the only responses. There a
# policy is a table of probabilities, an expectation is a sum, and "the optimum" is a list of numbers that we can compare with.
#
# ## What a comparison says about a reward
#
# Suppose every answer has a reward, hidden from us. How often is $y$ preferred to $y'$? The model of Bradley and Terry (1952) says: it depends on the difference of the two
# rewards, the *margin*, and on a scale $k$.
#
# $$P(y \succ y' \mid x) = \sigma\big(k\,(r(x,y) - r(x,y'))\big) \tag{1}$$
#
# Read $y \succ y'$ as "$y$ is preferred to $y'$". We shall need all pairs of responses at once, so we take all differences at once.

# %%
#| export
def differences(
    values: Tensor,  # (..., n) one number per response
) -> Tensor:         # (..., n, n) that of i minus that of j
    "Every pair at once: rewards become margins, log-probabilities become gammas."
    return values[..., :, None] - values[..., None, :]


# %%
small = enumerable_world()
log_S = small.log_base                                        # (2, 14) log-probabilities under S
four = [small.responses.index(y) for y in ("ba", "aba", "a", "ab")]
names = [small.responses[i] for i in four]
margins = differences(small.reward[0, four])                   # prompt 0 is 'reverse ab'
pd.DataFrame(margins.numpy(), index=names, columns=names).round(3)


# %% [markdown]
# To `reverse ab` the right answer is `ba`, with reward 1. `ab` is all wrong, with reward 0: the margin of the first over the second is 1, and the other way round -1.

# %%
#| export
def bradley_terry(
    rewards: Tensor,  # (..., n) reward of each response
    k: float,         # scale: how much a unit of reward weighs in a comparison
) -> Tensor:          # (..., n, n) probability that i is preferred to j
    "sigmoid(k (r_i - r_j)), for all pairs."
    return torch.sigmoid(k * differences(rewards))


# %% [markdown]
# The people of the tiny world judge with $k = 6$:

# %%
P = bradley_terry(small.reward, K)
assert_close(P + P.mT, torch.ones_like(P))                     # one of the two is preferred
shown = P[0][four][:, four]
pd.DataFrame(shown.numpy(), index=names, columns=names).round(3)

# %% [markdown]
# The right answer wins against a half-right one (`a`, reward 0.5) in 95 of 100 comparisons; in the other five the label is "wrong". People err, and
# the smaller the margin the more often.
#
# Only differences enter (1). Add a constant to all rewards of a prompt, and no preference changes. So comparisons can never tell us that constant. Keep
# this in mind: it is what makes DPO possible.

# %%
raised = small.reward + torch.tensor([[100.], [-3.]])
assert_close(bradley_terry(raised, K), P)

# %% [markdown]
# ### Where the sigmoid comes from (you may skip this)
#
# Imagine a judge who sees $k\,r$ of both answers, each blurred by noise of its own, and takes the larger. If the noise is of the kind called Gumbel, which is
# $-\log(-\log u)$ of a uniform random number $u$, then (1) holds exactly. So $k$ says how carefully the judge looks. We let 200 000 such judges compare all
# fourteen responses, and count.

# %%
torch.manual_seed(0)
uniform = torch.rand(200_000, 14, dtype=torch.float64)
noise = -(-uniform.log()).log()
judged = K * small.reward[0] + noise                           # (judges, responses)

shares = []
for i in range(14):
    preferred = judged[:, [i]] > judged
    shares.append(preferred.double().mean(0))
counted = torch.stack(shares)

others = ~torch.eye(14, dtype=bool)
assert_close(counted[others], P[0][others], atol=0.006, rtol=0)   # (1)

# %%
rows = []
for y, z in (("ba", "aba"), ("ba", "a"), ("ba", "ab"), ("a", "bb")):
    i, j = small.responses.index(y), small.responses.index(z)
    r_y, r_z = small.reward[0, [i, j]].tolist()
    share, chance = counted[i, j].item(), P[0, i, j].item()
    rows.append((y, z, r_y, r_z, share, chance))
pd.DataFrame(rows, columns=["y", "y'", "r(y)", "r(y')", "share counted", "equation (1)"]).round(3)


# %% [markdown]
# ## What RLHF maximises
#
# Much reward, and not far from the base model $S$. Both wishes in one number, for one prompt:
#
# $$J(\pi) = \mathbb E_{y\sim\pi}\,[k\,r(x,y)] - \beta\, \mathrm{KL}(\pi \,\|\, S) \tag{2}$$
#
# The first term is the mean reward of what $\pi$ writes, in the unit of the comparisons: we write $k\,r$, because labels only reveal this product (twice the reward at half the $k$ gives the same labels). The second is the leash. $\beta$ is the price: every
# nat of KL costs $\beta$ of reward. The best policy can be written down. It is the base model *reweighted*:
#
# $$\pi^*(y|x) = \frac{S(y|x)\, e^{k\,r(x,y)/\beta}}{Z(x)}, \qquad Z(x) = \sum_y S(y|x)\, e^{k\,r(x,y)/\beta} \tag{3}$$
#
# Only the quotient $k/\beta$ enters: doubling $k$ does to the best policy what halving $\beta$ does. Each answer starts with the probability that $S$ gives it, and is multiplied up by its reward. $Z(x)$, one number for each prompt, makes the sum 1 again. In logarithms
# we add, and `log_softmax` takes care of $Z$.

# %%
#| export
def optimal_policy(
    log_ref: Tensor,  # (..., n) log-probabilities of all responses under the reference, nats
    rewards: Tensor,  # (..., n) reward on the scale of the comparisons, k r
    beta: float,      # strength of the pull to the reference, > 0
) -> Tensor:          # (..., n) log-probabilities, nats
    "ref exp(reward / beta) / Z: the optimum of the KL-regularised objective (Eq. 4 of the DPO paper)."
    return (log_ref + rewards / beta).log_softmax(-1)


# %% [markdown]
# Before you look: with a small $\beta$ the leash is long. Which answer takes over?

# %%
kr = K * small.reward                                          # (2, 14) on the scale of the comparisons
chances = {"reward r": small.reward[0, four], "S": log_S[0, four].exp()}
for b in (4., 2., 0.5):
    chances[f"best policy, β = {b:g}"] = optimal_policy(log_S, kr, b)[0, four].exp()
pd.DataFrame(chances, index=pd.Index(names, name="'reverse ab'")).round(3)


# %% [markdown]
# The right answer takes over, and the smaller $\beta$ is the more so. But why is (3) the best? Because (2) can be rewritten:
#
# $$J(\pi) = \beta \log Z(x) - \beta\, \mathrm{KL}(\pi \,\|\, \pi^*) \tag{4}$$
#
# Only the last term depends on $\pi$. It is smallest, zero, at $\pi = \pi^*$ and nowhere else.
#
# <details><summary>From (2) to (4), step by step</summary>
#
# Take the logarithm of (3) and solve it for the reward: $k\,r = \beta \log \pi^* - \beta \log S + \beta \log Z$, for every answer. Put this into (2), and write the KL out:
#
# $$J(\pi) = \sum_y \pi\,\big[\beta \log \pi^* - \beta \log S + \beta \log Z\big] - \beta \sum_y \pi\,\big[\log \pi - \log S\big]$$
#
# The terms with $\log S$ cancel. $\log Z$ does not depend on $y$, and $\sum_y \pi = 1$. What is left:
#
# $$J(\pi) = \beta \log Z - \beta \sum_y \pi\,\big[\log \pi - \log \pi^*\big] = \beta \log Z - \beta\,\mathrm{KL}(\pi \,\|\, \pi^*)$$
#
# </details>
#
# (4) must hold for *any* policy, so a random one is a good test.

# %%
def kl(log_p, log_q):
    "KL(p || q) of each prompt, nats."
    return (log_p.exp() * (log_p - log_q)).sum(-1)

def objective(log_pi, beta):
    "J of each prompt, equation (2)."
    mean_reward = (log_pi.exp() * K * small.reward).sum(-1)
    return mean_reward - beta * kl(log_pi, log_S)


# %%
beta = 2.0                                                     # from here on, unless said otherwise
best = optimal_policy(log_S, kr, beta)
log_Z = (log_S + kr / beta).logsumexp(-1)
some = torch.randn(2, 14, dtype=torch.float64).log_softmax(-1)
assert_close(objective(some, beta), beta * log_Z - beta * kl(some, best))   # (4)


# %% [markdown]
# Algebra can be misread. An optimiser cannot: let one climb $J$ from $S$, knowing nothing of (3). We use L-BFGS, a standard method that goes to the bottom of a small
# smooth problem with many digits.

# %%
def lowest(f, start):
    "Where a smooth function is lowest, by L-BFGS."
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x],
        max_iter=2000,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )
    def value():
        optimizer.zero_grad()
        y = f(x)
        y.backward()
        return y
    optimizer.step(value)
    return x.detach()

def climb(beta):
    "The policy with the largest J, found from S."
    def loss(logits): return -objective(logits.log_softmax(-1), beta).sum()
    return lowest(loss, log_S).log_softmax(-1)

def apart(a, b):
    "The largest difference."
    return (a - b).abs().max().item()


# %%
climbed = {}
for b in (1., 2., 4.):
    log_pi, closed = climb(b), optimal_policy(log_S, kr, b)
    assert_close(log_pi, closed, atol=1e-4, rtol=0)            # (3)
    climbed[f"beta {b:g}"] = {
        "reward r": (log_pi.exp() * small.reward).sum(-1).mean().item(),
        "KL to S, nats": kl(log_pi, log_S).mean().item(),
        "largest difference to (3), nats": apart(log_pi, closed),
    }
pd.DataFrame(climbed).T

# %% [markdown]
# The optimiser lands on (3). And the table shows the bargain: a smaller $\beta$ buys more reward, and pays with more KL.
#
# ## $Z(x)$ cancels
#
# For a language model nobody can compute (3): $Z$ is a sum over all texts. So turn (3) around. Solve it for the reward,
#
# $$k\,r(x,y) = \beta \log\frac{\pi^*(y|x)}{S(y|x)} + \beta \log Z(x). \tag{5}$$
#
# The last term is the same for all answers to a prompt. It is the constant that comparisons cannot see. What remains is called the *implicit reward*: the
# reward for which a policy would be the best one. We can read it off from two log-probabilities, one of the policy and one of the reference.
#
# Does the best policy imply the true reward? Up to one constant for each prompt it does, and all margins are the true ones.

# %%
implicit = beta * (best - log_S)
constant = (beta * log_Z)[:, None].expand(2, 14)
assert_close(kr - implicit, constant)                          # (5)
assert_close(differences(implicit), differences(kr))

# %%
ab, ba = small.responses.index("ab"), small.responses.index("ba")
pd.DataFrame({
    "Z(x)": log_Z.exp().tolist(),
    "true k r(ab) - k r(ba)": (kr[:, ab] - kr[:, ba]).tolist(),
    "implicit": (implicit[:, ab] - implicit[:, ba]).tolist(),
}, index=small.prompts).round(3)


# %% [markdown]
# ## The loss
#
# Now read (1) backwards. Any policy $\pi_\theta$ is the best policy (3) for *some* reward, and (5), with $\pi_\theta$ for $\pi^*$ and $\pi_{ref}$ for $S$, says which: its implicit reward. Put it into (1), and the policy says how probable each label of the data is. Then train it as
# one trains any model of probabilities: make the labels that people gave as probable as possible. This is maximum likelihood, and minus
# its logarithm is the DPO loss. The constant with $Z$ stands on both sides of the difference, and is gone:
#
# $$L = -\,\mathbb E\, \log \sigma\Big(\beta \log\frac{\pi_\theta(y_w|x)}{\pi_{ref}(y_w|x)} - \beta \log\frac{\pi_\theta(y_l|x)}{\pi_{ref}(y_l|x)}\Big) \tag{6}$$
#
# Sort the four logarithms by model instead of by response, and this is the line of the beginning, $-\log\sigma(\beta(\gamma_\theta - \gamma_{ref}))$. The derivation is complete.
#
# ### In code
#
# Two numbers per pair are enough, so two numbers are what our functions take. Both must be on one device before one is subtracted from the other. The reference comes from a table on the CPU (chapter 02), and
# the policy may be on a graphics card. One rule for the whole book: *the reference follows the policy*. And there must be as many of the one as of the other.

# %%
#| export
def follow(
    reference,       # numbers of the reference: a tensor, or one number for all
    policy: Tensor,  # the same numbers of the policy
):                   # those of the reference, on the policy's device
    "The reference follows the policy."
    return reference.to(policy.device) if isinstance(reference, Tensor) else reference


# %%
#| export
def _gain(gamma_theta, gamma_ref):
    "gamma_theta - gamma_ref, pair by pair; unequal shapes would broadcast to every pair against every other."
    if isinstance(gamma_ref, Tensor) and gamma_ref.shape != gamma_theta.shape:
        shapes = f"gamma_theta has shape {tuple(gamma_theta.shape)}, gamma_ref {tuple(gamma_ref.shape)}"
        raise ValueError(f"{shapes}; they must be equal, one number per pair")
    return gamma_theta - follow(gamma_ref, gamma_theta)


# %% [markdown]
# Why so strict? A stray axis is easily made, and PyTorch would not complain: it would subtract every reference from every policy, and the mean of the nine losses of three pairs looks
# like a loss. (The first assert is about `follow`: PyTorch's device `meta` stands in for a graphics card.)

# %%
gammas, column = torch.tensor([1., 2., 3.]), torch.zeros(3, 1)
assert follow(column, gammas.to("meta")).device.type == "meta"
print("plain subtraction has shape", tuple((gammas - column).shape))
print(complaint(_gain, gammas, column))


# %% [markdown]
# Now the loss of each pair. With `label_smoothing` at 0 it is the line of the beginning; the setting has a section of its own below.

# %%
#| export
def dpo_loss(
    gamma_theta: Tensor,        # (n,) gamma of the policy, nats
    gamma_ref: Tensor,          # (n,) gamma of the reference, nats
    beta: float,                # strength of the pull to the reference, > 0, per nat
    label_smoothing: float=0.,  # assumed share of flipped labels, in [0, 0.5): target 1 - label_smoothing
) -> Tensor:                    # (n,) loss of each pair
    """-log sigmoid(beta (gamma_theta - gamma_ref)), per pair.
    Eq. 1 of the sDPO paper, Eq. 7 of the DPO paper.
    Raises ValueError for unequal shapes."""
    z = beta * _gain(gamma_theta, gamma_ref)
    return (1 - label_smoothing) * F.softplus(-z) + label_smoothing * F.softplus(z)


# %% [markdown]
# Does it say what we computed by hand?

# %%
by_function = dpo_loss(torch.tensor([gamma_policy]), torch.tensor([gamma_ref]), 0.1)
assert_close(by_function.item(), loss, atol=1e-5, rtol=0)
round(by_function.item(), 4)

# %% [markdown]
# `softplus(-z)` is $\log(1 + e^{-z}) = -\log\sigma(z)$, and it does not overflow. A pair that is 5000 nats right costs nothing, one that is 5000 nats wrong costs 5000:

# %%
dpo_loss(torch.tensor([5000., -5000.]), torch.zeros(2), 1.)

# %% [markdown]
# A policy that equals its reference has gain 0, hence a loss of exactly $\ln 2$. Data, $\beta$ and smoothing do not matter. Look for 0.693 in the first
# line of the log of every DPO run that starts at its own reference. (In half precision the third digit may differ.)

# %%
g = torch.tensor([-38.6, 0.0, 12.5])
ln2 = torch.full((3,), math.log(2))
for b, smoothing in ((0.1, 0.), (2., 0.), (0.1, 0.3)):
    assert_close(dpo_loss(g, g, b, smoothing), ln2)


# %% [markdown]
# In the enumerable world we need no data set. The mean over all comparisons in (6) is a sum over all pairs of responses, weighted by how often $i$ beats $j$.
# We call these weights `wins`. They are all that a data set can tell the loss; a pair that nobody compared has a zero in both places.
# (A response that is compared with itself wins half the time. That adds $\ln 2$ to the sum and moves nothing.)

# %%
#| export
def population_loss(
    log_pi: Tensor,             # (m, n) all responses of m prompts under the policy, nats
    log_ref: Tensor,            # (m, n) under the reference, nats
    wins: Tensor,               # (m, n, n) weight of the comparisons in which i was preferred to j
    beta: float,                # per nat
    label_smoothing: float=0.,  # assumed share of flipped labels, in [0, 0.5)
) -> Tensor:                    # the mean loss
    "The DPO loss over every comparison of an enumerable world."
    losses = dpo_loss(differences(log_pi), differences(log_ref), beta, label_smoothing)
    return (wins * losses).sum() / wins.sum()


# %% [markdown]
# Now the derivation as a whole. Minimise (6) over all tables of probabilities: it must land on the best policy (3), although it never saw a reward. And if some
# pairs are compared far more often than others? On the same place: at the optimum the policy's probability for each label is exactly the share of judges who gave it.

# %%
def fit(wins, beta, label_smoothing=0.):
    "The policy with the lowest DPO loss, found from S."
    def loss(logits): return population_loss(logits.log_softmax(-1), log_S, wins, beta, label_smoothing)
    return lowest(loss, log_S).log_softmax(-1)

often = torch.rand(2, 14, 14, dtype=torch.float64)
often = often + often.mT                                       # how often a pair is compared

# %%
off_by = {}
for name, wins in {"all pairs alike": P, "some pairs more often": P * often}.items():
    fitted = fit(wins, beta)
    assert_close(fitted, best, atol=1e-4, rtol=0)              # (6) finds (3)
    off_by[name] = apart(fitted, best)
pd.Series(off_by, name="largest difference to (3), nats").to_frame()

# %% [markdown]
# ## Its gradient
#
# How does one pair change the policy? With $\Delta = \gamma_\theta - \gamma_{ref}$, the gain,
#
# $$\nabla L = -\beta\; \mathbb E\big[\,\lambda\, (\nabla \log\pi_\theta(y_w|x) - \nabla \log\pi_\theta(y_l|x))\big], \qquad \lambda = \sigma(-\beta\Delta) \tag{7}$$
#
# A step against the gradient pushes the chosen response up and the rejected one down. $\lambda$ is the weight: how hard this pair pushes.
#
# <details><summary>From (6) to (7), step by step</summary>
#
# First the sigmoid. $\sigma(z) = 1/(1 + e^{-z})$ has the derivative $e^{-z}/(1 + e^{-z})^2$. That is $\frac{1}{1 + e^{-z}} \cdot \frac{e^{-z}}{1 + e^{-z}}$, so
#
# $$\sigma'(z) = \sigma(z)\,\big(1 - \sigma(z)\big).$$
#
# The loss of a pair is $-\log\sigma(z)$ with $z = \beta\Delta$. By the chain rule its derivative in $z$ is
#
# $$-\frac{\sigma'(z)}{\sigma(z)} = -\big(1 - \sigma(z)\big) = -\sigma(-z) = -\lambda.$$
#
# And $z = \beta\,\big(\log\pi_\theta(y_w|x) - \log\pi_\theta(y_l|x)\big) - \beta\gamma_{ref}$. The last term does not depend on $\theta$, so
#
# $$\nabla z = \beta\,\big(\nabla\log\pi_\theta(y_w|x) - \nabla\log\pi_\theta(y_l|x)\big).$$
#
# Multiply the two, and take the mean over pairs: (7).
#
# </details>
#
# For a table of logits the bracket is simply $+1$ at $y_w$ and $-1$ at $y_l$, as the normalisation of the softmax cancels in the difference. So we can get the same
# 28 numbers in three ways: by the formula, by autograd, and by finite differences, which move one logit at a time and look at the loss.

# %%
theta = torch.randn(2, 14, dtype=torch.float64, requires_grad=True)
def loss_at(logits): return population_loss(logits.log_softmax(-1), log_S, P, beta)

delta = differences(theta.detach().log_softmax(-1)) - differences(log_S)
weights = torch.sigmoid(-beta * delta)                         # λ of every pair
pull = beta * weights * P / P.sum()
formula = -(pull.sum(2) - pull.sum(1))                         # pull as winner, minus pull as loser
(autograd,) = torch.autograd.grad(loss_at(theta), theta)

# %%
moves = 1e-5 * torch.eye(28, dtype=torch.float64).view(28, 2, 14)
slopes = []
for move in moves:
    up, down = loss_at(theta + move), loss_at(theta - move)
    slopes.append((up - down).detach() / 2e-5)
finite = torch.stack(slopes).view(2, 14)

assert_close(formula, autograd)                                # (7)
assert_close(formula, finite, atol=1e-9, rtol=1e-6)
pd.Series({
    "formula (7) against autograd": apart(formula, autograd),
    "formula (7) against finite differences": apart(formula, finite),
    "largest entry": formula.abs().max().item(),
}, name="difference").to_frame()

# %% [markdown]
# The weight $\lambda$ is the chance, according to the implicit reward, that the label is wrong. A pair that is ranked right fades away. A pair that is ranked
# wrong pulls with full force, and mislabelled pairs are among those. $\beta$ sets how many nats that takes:

# %%
nats = torch.tensor([-40., -10., 0., 10., 40.])
fading = {f"beta {b:g}": torch.sigmoid(-b * nats).tolist() for b in (0.01, 0.1, 1.)}
pd.DataFrame(fading, index=pd.Index(nats.tolist(), name="gain Δ, nats")).T.round(3)

# %% [markdown]
# One thing that (7) does *not* promise. It looks at a difference. Can the log-probability of the *chosen* response fall while the loss falls? Take our pair from
# the beginning once more, with a larger $\beta$ and hence a longer first step.

# %%
_, steps = train_on_pair(beta=0.5, steps=4)
assert steps["loss"].is_monotonic_decreasing
assert (steps["log π(chosen)"][1:] < steps["log π(chosen)"][0]).all()
steps.round(3)

# %% [markdown]
# It can. The long first step takes both answers down, and the rejected one farther. The loss asks for no more. So look at both log-probabilities in your logs, and
# not only at the loss.
#
# ## What $\beta$ does
#
# $\beta$ is counted per nat. The weight $\lambda$ of a pair has fallen to 0.27 after a gain of 10 nats at $\beta = 0.1$, and after 1 nat at $\beta = 1$.
#
# You will hear two statements: "a larger $\beta$ stays closer to the reference" and "a larger $\beta$ moves faster". They contradict each other, and both are
# right. The first is (3), and speaks of the end of training. The second is the $\beta$ in front of (7), and speaks of its first steps. Which one do you meet in practice? Watch
# plain gradient descent, with one learning rate for all.

# %%
LOOK = (1, 3, 6, 10, 30, 60, 100, 300, 600, 1000, 3000)        # about even steps of log time

def descend(wins, beta, label_smoothing=0., steps=3000, method=torch.optim.SGD, lr=1.0):
    "Gradient descent on a table, from S: KL to S and mean gain over the compared pairs."
    theta = log_S.clone().requires_grad_()
    optimizer = method([theta], lr=lr)
    rows = []
    for step in range(1, steps + 1):
        loss = population_loss(theta.log_softmax(-1), log_S, wins, beta, label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in LOOK:
            log_pi = theta.detach().log_softmax(-1)
            gains = differences(log_pi) - differences(log_S)
            gain = (wins * gains).sum() / wins.sum()
            rows.append(dict(step=step, kl=kl(log_pi, log_S).mean().item(), gain=gain.item(), beta=beta))
    return pd.DataFrame(rows)


# %%
BETAS = (0.5, 1., 2., 4.)
plain = pd.concat([descend(P, b) for b in BETAS])
moved = plain.pivot(index="beta", columns="step", values="kl")[[3, 30, 300, 3000]]
moved["optimum"] = [kl(optimal_policy(log_S, kr, b), log_S).mean().item() for b in BETAS]
assert moved[3].is_monotonic_increasing
assert moved["optimum"].is_monotonic_decreasing
moved.round(3)

# %% [markdown]
# These are distances from $S$, as KL in nats, after so many steps. Read by columns. After 3 steps the largest $\beta$ has moved *most*; at the optimum it
# has moved *least*. Somewhere between the order turns.
#
# The trainer of this book uses AdamW. Adam divides each step by the size of past gradients. The $\beta$ in front of (7) makes all gradients larger, so Adam divides it out.
# What will the first steps look like?

# %%
adam = pd.concat([descend(P, b, steps=1000, method=torch.optim.Adam, lr=0.01) for b in BETAS])
adam_kl = adam.pivot(index="beta", columns="step", values="kl")
early = adam_kl[[1, 3]]
assert (early.max() / early.min() < 1.005).all()
for step in (10, 30, 60, 100, 300, 600, 1000):
    assert adam_kl[step].is_monotonic_decreasing
adam_kl[[1, 3, 30, 100, 1000]].map("{:.2g}".format)


# %% [markdown]
# The first steps go equally far for every $\beta$. After them the order is that of the optima.

# %%
def draw_kl(ax, runs, title):
    "KL to S along training, a line for each beta, its optimum dotted."
    for color, b in zip(sns.color_palette("viridis", 4), BETAS):
        run = runs[runs["beta"] == b]
        ax.plot(run["step"], run["kl"], color=color)
        ax.axhline(moved["optimum"][b], color=color, ls=":", lw=1)
        end = run.iloc[-1]
        write_at(ax, f"β = {b:g}", (end["step"], end["kl"]), color)
    ax.set(xscale="log", xlim=(0.8, 1.1 * runs["step"].max()), xlabel="gradient steps")
    ax.set(yscale="log", ylim=(1e-5, 6), title=title)
    ax.text(1, 2.8, "dotted: optimum", color="grey")

fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), sharey=True)
draw_kl(axes[0], plain, "plain gradient descent: the order turns")
draw_kl(axes[1], adam, "Adam: it never turns")
axes[0].set_ylabel("KL to S (nats)\nfarther from S  →")
sns.despine()
fig.tight_layout(w_pad=4)

# %% [markdown]
# *To see:* left, the four lines cross on the way to their dotted optima. Right, they start as one line and part in the right order.
#
# ## When there is no optimum
#
# So far the judges erred now and then. What if they never do? We call such labels *deterministic*. Or if each prompt is compared only once, as in this book's own
# sources? Then the same side of a pair always wins.

# %%
one_pair = torch.zeros(2, 14, 14, dtype=torch.float64)
for x in range(2):
    correct, likeliest = small.reward[x].argmax(), log_S[x].argmax()
    one_pair[x, correct, likeliest] = 1                        # the right answer beat what S says most

never_wrong = bradley_terry(small.reward, 1e6)                 # a judge with an enormous k
labels = {"Bradley-Terry": P, "deterministic": never_wrong, "one pair per prompt": one_pair}

# %%
hard = {}
for name in ("deterministic", "one pair per prompt"):
    runs = pd.concat([descend(labels[name], b) for b in BETAS])
    hard[name] = runs.pivot(index="beta", columns="step", values="gain")
    seen = hard[name][[30, 300, 3000]]
    assert (seen.diff(axis=1).iloc[:, 1:] > 0).all(axis=None)  # still growing
shown = {f"mean gain Δ, {name}": gain[[30, 300, 3000]] for name, gain in hard.items()}
pd.concat(shown, axis=1).round(3)

# %%
fig, ax = plt.subplots(figsize=(6.5, 3.2))
curves = {name: gain.loc[2] for name, gain in hard.items()}
curves["Bradley-Terry"] = plain[plain["beta"] == 2].set_index("step")["gain"]
for name, curve in curves.items():
    (line,) = ax.plot(curve.index, curve)
    write_at(ax, name, (3000, curve[3000]), line.get_color())
ax.set(xscale="log", xlabel="gradient steps", ylabel="mean gain Δ (nats)")
ax.set_title("β = 2: only labels with errors settle")
sns.despine()


# %% [markdown]
# *To see:* with Bradley-Terry labels the gain levels off. With the other two it goes on growing, roughly with the logarithm of time. Every further nat still
# lowers the loss, because nothing ever says "too much". Then the leash is real only as long as training is short, whatever $\beta$ says (IPO, arXiv 2310.12036, makes this
# point). With such labels, $\beta$ sets how slowly the gain grows, and the number of steps decides where it ends. It is the *gain* that grows without end. The KL does not: even a policy that always gives one answer is a finite KL away from $S$.
#
# ### Which labels have an optimum? (you may skip this)
#
# Ford (1957) answered it. Draw an arrow from every winner to everything it ever beat. The Bradley-Terry estimate exists if you can walk along arrows from every response
# to every other one and back: the graph is *strongly connected*. If a response never loses, nothing stops its reward from growing.
#
# A table of logits needs a little less: responses that were never compared, not even through others, need no path. It is enough that every walk has a way back.

# %%
def has_optimum(wins):
    "Does every chain of wins have a chain back?"
    reach = wins > 0
    for _ in range(4):                                         # chains of 2, 4, 8, 16 wins
        longer = reach.double() @ reach.double() > 0
        reach = reach | longer
    return bool((reach == reach.mT).all())

pd.Series({name: has_optimum(wins) for name, wins in labels.items()}, name="a finite optimum").to_frame()

# %% [markdown]
# ## Label smoothing
#
# If some labels are wrong, one should not be too sure of any. *Label smoothing* assumes that a share $\varepsilon$ of the labels is flipped (with DPO
# this is called conservative DPO):
#
# $$L_\varepsilon = -\,\mathbb E\big[(1-\varepsilon) \log \sigma(\beta\Delta) + \varepsilon \log \sigma(-\beta\Delta)\big] \tag{8}$$
#
# The plain loss aims at probability 1 for every label. (8) aims at $1-\varepsilon$; this number is the *target*. It is the plain loss on data in which a share
# $\varepsilon$ has been turned around. So every win gets a return match, and there is an optimum again (`has_optimum` is the test of the section that you
# may have skipped).

# %%
eps = 0.1
mixed = (1 - eps) * one_pair + eps * one_pair.mT
smoothed_loss = population_loss(some, log_S, one_pair, beta, eps)
plain_loss = population_loss(some, log_S, mixed, beta)
assert_close(smoothed_loss, plain_loss)                        # (8)
assert has_optimum(mixed)
assert not has_optimum(one_pair)

# %% [markdown]
# Where is it? For a single pair the slope of (8) is zero where $\sigma(\beta\Delta) = 1 - \varepsilon$. Solved for the gain, $\Delta = \log\frac{1-\varepsilon}{\varepsilon} \big/ \beta$. So smoothing
# stops the gain at a certain number of nats, and $\varepsilon$ and $\beta$ set it.

# %%
rows = []
for b in (0.5, 2.):
    gains = differences(fit(one_pair, b, eps)) - differences(log_S)
    reached = gains[one_pair > 0]                              # one pair of each prompt
    expected = math.log((1 - eps) / eps) / b
    assert_close(reached, torch.full_like(reached, expected), atol=1e-4, rtol=0)
    rows.append((b, reached.mean().item(), expected))
pd.DataFrame(rows, columns=["beta", "Δ reached, nats", "log((1-ε)/ε)/β"]).round(4)


# %% [markdown]
# ## The same loss in sDPO's words
#
# The DPO paper groups (6) by response: the reward of the chosen one minus the reward of the rejected one. The sDPO paper (arXiv 2403.19270, Eq. 1) groups it by model:
#
# $$L = -\,\mathbb E\, \log \sigma\big(\beta\,(\gamma_\theta - \gamma_{ref})\big) \tag{9}$$
#
# The number is the same. The view is not. The whole reference has become *one number per pair*, which can be computed beforehand and stored. It is like the bar in
# the high jump: whether a pair has been learned is judged by whether $\gamma_\theta$ clears $\gamma_{ref}$, however high or low that lies.
#
# The implicit reward (5) as a function, and then both groupings of eight random pairs:

# %%
#| export
def reward(
    logp: Tensor,      # (n,) log pi_theta(y|x), nats
    logp_ref: Tensor,  # (n,) log pi_ref(y|x), nats
    beta: float,       # per nat
) -> Tensor:           # (n,) implicit reward, up to a constant of the prompt
    "beta (log pi_theta - log pi_ref)."
    return beta * (logp - follow(logp_ref, logp))


# %%
won, lost, won_ref, lost_ref = -60 + 20 * torch.randn(4, 8, dtype=torch.float64)
margin = reward(won, won_ref, 0.1) - reward(lost, lost_ref, 0.1)
by_response = -F.logsigmoid(margin)
by_model = dpo_loss(won - lost, won_ref - lost_ref, 0.1)
assert_close(by_response, by_model)                            # (6) is (9)


# %% [markdown]
# The share of pairs that clear their bar is the *reward accuracy*. A tie counts one half, so a policy that is still its own reference reads 0.5, which
# is what it knows; with a strict `>` it would read 0. NaN is no verdict, and stays NaN.

# %%
#| export
def reward_accuracy(
    gamma_theta: Tensor,         # (n,) gamma of the policy, nats
    gamma_ref: Tensor|float=0.,  # (n,) of the reference; 0 reads the policy reference-free
) -> Tensor:                     # (n,) 1 right, 0 wrong, 0.5 tie; the mean is the reward accuracy
    "Does the implicit reward rank the chosen response first? Ties count one half, NaN stays NaN."
    delta = _gain(gamma_theta, gamma_ref)
    return (0.5 + 0.5 * delta.sign()).float().where(~delta.isnan(), math.nan)


# %%
bars = torch.tensor([-40., -40., 5.])
gammas = torch.tensor([-30., -40., 4.])
verdicts = pd.DataFrame({
    "gamma_ref": bars,
    "gamma_theta": gammas,
    "against the reference": reward_accuracy(gammas, bars),
    "reference-free": reward_accuracy(gammas),
})
assert verdicts["against the reference"].tolist() == [1, 0.5, 0]
assert verdicts["reference-free"].tolist() == [0, 0, 1]
verdicts

# %% [markdown]
# The two columns disagree on every row. The first pair has been improved by ten nats, and its rejected response is still the likelier one. The last pair got worse, and its
# chosen response is still the likelier one.
#
# ## The reference as a lower bound
#
# The sDPO paper calls $\gamma_{ref}$ a lower bound: what training reaches should lie above it. The paper says so in words. Can we make it an inequality, and test it?
#
# $$\mathbb E\,\gamma_\theta \;\ge\; \mathbb E\,\gamma_{ref} - \frac1\beta \log\big(e^{L} - 1\big) \tag{10}$$
#
# From the loss alone you get a number that the mean $\gamma_\theta$ cannot be below. At $L = \ln 2$ this number is the mean $\gamma_{ref}$; with a smaller
# loss it lies higher. It holds for any policy, and it rests on one fact: the loss curve $f(z) = -\log\sigma(z)$ bends upwards everywhere (it is *convex*).
# On such a curve the mean of the values is at least the value at the mean. This is Jensen's inequality. Two pairs show it:

# %%
gains = torch.tensor([-20., 30.])
losses = dpo_loss(gains, torch.zeros(2), 0.1)
at_the_mean = dpo_loss(gains.mean()[None], torch.zeros(1), 0.1)
mean = losses.mean()
assert mean > at_the_mean
pd.Series({"mean of the two losses": mean.item(), "loss at the mean gain": at_the_mean.item()}).round(3)


# %% [markdown]
# <details><summary>From convexity to (10), step by step</summary>
#
# $f(z) = -\log\sigma(z) = \log(1 + e^{-z})$ has the slope $-\sigma(-z)$ and the second derivative $\sigma(z)\,\sigma(-z)$, which is positive. So $f$ is convex, and Jensen says
#
# $$L = \mathbb E\, f(\beta\Delta) \;\ge\; f(\beta\,\mathbb E\,\Delta) = \log\big(1 + e^{-\beta\,\mathbb E\Delta}\big).$$
#
# Take the exponential of both sides and subtract 1: $\;e^L - 1 \ge e^{-\beta\,\mathbb E\Delta}$.
#
# Take the logarithm: $\;\log(e^L - 1) \ge -\beta\,\mathbb E\,\Delta$. Divide by $-\beta$, which turns the sign around: $\;\mathbb E\,\Delta \ge -\frac1\beta \log(e^L - 1)$.
#
# And $\mathbb E\,\Delta = \mathbb E\,\gamma_\theta - \mathbb E\,\gamma_{ref}$: (10).
#
# </details>
#
# The right side of (10) is a function. We call it the *certificate* of a loss: what the loss alone guarantees.

# %%
#| export
def certificate(
    loss: float,            # mean plain sigmoid DPO loss of M_t over a set of pairs
    mean_gamma_ref: float,  # mean gamma_ref over the same pairs, nats
    beta: float,            # per nat
) -> float:                 # lower bound of mean gamma_theta over them, nats
    """E gamma_theta >= E gamma_ref - log(e^L - 1) / beta, by Jensen; above E gamma_ref exactly when L < ln 2.
    Raises ValueError for a negative loss."""
    if loss < 0: raise ValueError(f"loss: {loss} is negative, and a mean of -log sigmoid never is")
    loss = max(loss, torch.finfo(torch.float32).tiny)
    return mean_gamma_ref - (loss + math.log(-math.expm1(-loss))) / beta


# %% [markdown]
# Our two pairs have a mean gain of 5 nats. What does the bound say, knowing only their loss?

# %%
bound = certificate(losses.mean().item(), 0., 0.1)
assert bound < gains.mean()
round(bound, 2)

# %% [markdown]
# It says less than the truth, as a lower bound should. It even allows a negative mean gain, because the loss is above $\ln 2$.
#
# (The code writes $\log(e^L - 1)$ as $L + \log(1 - e^{-L})$: the same number, and $e^L$ of a large loss does not overflow. A loss of exactly zero is always an underflow, and would certify
# infinity. It is read as the smallest normal fp32 number, which certifies less and stays true.)
#
# Does (10) hold? We make 500 random data sets of 64 pairs, with $\beta = 0.1$ and gains of all signs and spreads. The mean $\gamma_{ref}$ is $-38.6$ nats, the
# number that the sDPO paper reports for its base model.

# %%
shift = torch.empty(500, 1, dtype=torch.float64).uniform_(-30, 30)
spread = torch.empty(500, 1, dtype=torch.float64).uniform_(0, 40)
gammas_ref = -38.6 + 20 * torch.randn(500, 64, dtype=torch.float64)
gammas_theta = gammas_ref + shift + spread * torch.randn(500, 64, dtype=torch.float64)

def bounds(losses):
    "The certificate of each data set."
    pairs = zip(losses.tolist(), gammas_ref.mean(1).tolist())
    return torch.tensor([certificate(loss, ref, 0.1) for loss, ref in pairs], dtype=torch.float64)


# %%
L = dpo_loss(gammas_theta, gammas_ref, 0.1).mean(1)
sets = pd.DataFrame({
    "loss": L,
    "gain": (gammas_theta - gammas_ref).mean(1),
    "below": (gammas_theta < gammas_ref).double().mean(1),     # share of pairs under their bar
})
certified = sets[sets["loss"] < math.log(2)]
assert (gammas_theta.mean(1) >= bounds(L) - 1e-9).all()        # (10)
assert (certified["gain"] > 0).all()

# %%
worst = certified.loc[certified["below"].idxmax()]
x = torch.linspace(0.03, 4.2, 200).tolist()

fig, ax = plt.subplots(figsize=(7, 3.8))
dots = ax.scatter(sets["loss"], sets["gain"], c=100 * sets["below"], cmap="viridis", s=14)
ax.plot(x, [certificate(loss, 0., 0.1) for loss in x], color="crimson")
ax.text(2.1, -31, "lower bound (10)", color="crimson", ha="right")
ax.axvline(math.log(2), color="grey", ls=":")
ax.text(math.log(2) + 0.05, 37, "ln 2", color="grey")
ax.axhline(0, color="grey", lw=0.5)
ax.plot(worst["loss"], worst["gain"], "o", ms=11, mfc="none", mec="crimson")
ax.annotate(
    f"certified, yet {worst['below']:.0%} of\nits pairs are below",
    (worst["loss"], worst["gain"]),
    xytext=(1.6, 29),
    color="crimson",
    arrowprops=dict(arrowstyle="-", color="crimson"),
)
ax.set(xlim=(0, 4.2), xlabel="DPO loss L (lower is better)")
ax.set(ylim=(-44, 42), ylabel="mean gain (nats; higher is better)")
fig.colorbar(dots, label="pairs below the reference (%)")
sns.despine()
assert sets["loss"].max() < 4.2
assert sets["gain"].abs().max() < 42

# %% [markdown]
# *To see:* each dot is a data set. None lies under the red line, and left of $\ln 2$ all lie above zero. But look at the one in the ring: the bound is about the *mean*, and
# says nothing about single pairs.

# %%
gained = sets["gain"] > 0
not_certified = sets["loss"] >= math.log(2)
pd.Series({
    "data sets with L < ln 2": len(certified),
    "smallest mean gain, nats": certified["gain"].min(),
    "largest share of pairs below the reference": worst["below"],
    "data sets with a gain but L > ln 2": (gained & not_certified).sum(),
}).round(2)

# %% [markdown]
# The bound has three conditions: the plain loss, of the same pairs, of the same weights. The first two can be broken here. Give it a smoothed loss, or the loss of other
# pairs, and count what fails.

# %%
given = {
    "plain, same pairs": L,
    "smoothed, ε = 0.1": dpo_loss(gammas_theta, gammas_ref, 0.1, 0.1).mean(1),
    "smoothed, ε = 0.3": dpo_loss(gammas_theta, gammas_ref, 0.1, 0.3).mean(1),
    "plain, other pairs": L.roll(1),
}
no_gain = gammas_theta.mean(1) <= gammas_ref.mean(1)
broken = {}
for name, losses in given.items():
    too_low = gammas_theta.mean(1) < bounds(losses) - 1e-9
    misleading = (losses < math.log(2)) & no_gain
    broken[name] = {
        "inequality (10) is false": too_low.sum().item(),
        "L < ln 2 without a gain": misleading.sum().item(),
    }
broken = pd.DataFrame(broken).T

assert (broken.loc["plain, same pairs"] == 0).all()
assert (broken["inequality (10) is false"].iloc[1:] > 0).all()
assert (broken["L < ln 2 without a gain"].iloc[1:3] == 0).all()
assert broken.loc["plain, other pairs", "L < ln 2 without a gain"] > 0
broken

# %% [markdown]
# One promise survives smoothing, for any $\varepsilon < \frac12$. (8) is convex too, is $\ln 2$ at gain zero and falls there. So $L_\varepsilon < \ln 2$ still means a gain; only
# its size is not certified. A single pair shows why. At $\beta\Delta = -2$ the plain bound is exactly the truth. Smoothing adds $\varepsilon\beta\Delta < 0$ to the loss, so the
# bound claims more than there is.

# %%
one, zero = torch.tensor([-20.], dtype=torch.float64), torch.zeros(1)
tight = certificate(dpo_loss(one, zero, 0.1).item(), 0., 0.1)
wrong = certificate(dpo_loss(one, zero, 0.1, label_smoothing=0.1).item(), 0., 0.1)
assert abs(tight + 20) < 1e-9
assert wrong > -20 + 1
{"true mean gain": -20.0, "certified, plain": round(tight, 2), "'certified', smoothed": round(wrong, 2)}


# %% [markdown]
# The third condition, "same weights", means an evaluation pass: $L$ has to be the loss of *one* model. The loss that a training log shows is a mean over models that
# no longer exist.
#
# ## What $T$ stages add up to
#
# sDPO, the subject of this book, cuts the data into chunks and trains in *stages*. Stage $t$ starts from the model of the stage before, $M_{t-1}$, and takes it as reference
# too; stage 1 starts from $M_0 = S$. What does a moving reference bring? Suppose first that all stages find the same reward, as they do on the same prompts, and that each is
# trained to its optimum. Then (3) is applied $T$ times:
#
# $$M_T \propto M_{T-1}\, e^{k r/\beta} \propto \dots \propto S\, e^{T k r/\beta} \tag{11}$$
#
# ($\propto$ means "equal up to the factor $1/Z$".) That is *one* stage at $\beta/T$. Nothing is gained by moving the reference that a smaller $\beta$ would not give.

# %%
def train_stages(model, size, chunks, beta):
    "Each stage to its optimum, from the last model and against it; `model(theta)` are log-probabilities."
    theta = torch.zeros(size, dtype=torch.float64)
    for wins in chunks:
        log_ref = model(theta)
        def loss(t): return population_loss(model(t), log_ref, wins, beta)
        theta = lowest(loss, theta)
    return model(theta)

def table_model(theta): return (log_S + theta.view(2, 14)).log_softmax(-1)


# %%
off_by = {}
for T in (1, 2, 3, 4):
    last = train_stages(table_model, 28, [P] * T, beta)
    one_stage = optimal_policy(log_S, kr, beta / T)
    off_by[T] = apart(last, one_stage)
assert max(off_by.values()) < 1e-6                             # (11)
pd.Series(off_by).rename_axis("T").to_frame("largest difference to one stage at beta/T, nats")


# %% [markdown]
# But sDPO gives each stage *other* prompts. Take the opposite extreme: a table, in which prompts share nothing. Stage 2 then leaves the prompts of stage 1
# alone, and each prompt has seen one stage, at $\beta$.

# %%
def only(wins, x):
    "The comparisons of prompt x alone."
    keep = torch.arange(2) == x
    return wins * keep[:, None, None]

disjoint = train_stages(table_model, 28, [only(P, 0), only(P, 1)], beta)
assert_close(disjoint, best, atol=1e-6, rtol=0)

off_by = {}
for b in (beta, beta / 2):
    off_by[f"beta {b:g}"] = apart(disjoint, optimal_policy(log_S, kr, b))
pd.Series(off_by, name="largest difference to one stage, nats").to_frame()


# %% [markdown]
# A language model shares *something* between prompts. So the *optimum* should lie between "one stage at $\beta$" and "one stage at $\beta/T$" (short runs that reach no optimum need not, as the [demo](demo.ipynb) shows). In the tiny case below it
# does, as long as the prompts agree about what is good. Where they want opposite things, each stage undoes part of the other.
#
# So compare sDPO with DPO at $\beta/T$, and not only with DPO at $\beta$. The part below, for a second reading, shows where the "in between" comes from.
#
# ### How much do stages on different prompts add? (you may skip this)
#
# We need a model that shares something, and a way to count stages.
#
# *The model.* Give the table four extra parameters that act on all prompts alike. Each belongs to a feature of the response: does it start with a, does it end with a,
# how long is it, is it sorted. `share` says how strongly they act. At 0 there is only the table. At a large value the shared features move first.

# %%
def sharing_model(share):
    "A table plus shared features; the table still fits what the features cannot."
    def model(theta):
        table = theta[:28].view(2, 14)
        features = theta[28:] @ small.features.T
        return (log_S + table + share * features).log_softmax(-1)
    return model


# %% [markdown]
# *Counting stages.* Train one stage on everything at $\beta$, and write down the gain on every pair of responses. Train two stages, one prompt each, and write down the gains
# again. If they are the same, the two stages are worth one; if they are twice as large, worth two. In general we fit one factor between the two lists of gains.

# %%
def worth(log_pi, log_one):
    "How many times the gains of one model are those of another: the slope of a line through the origin."
    gains = (differences(log_pi) - differences(log_S)).flatten()
    gains_one = (differences(log_one) - differences(log_S)).flatten()
    return (gains @ gains_one / (gains_one @ gains_one)).item()

twice = optimal_policy(log_S, kr, beta / 2)                    # by (11), two stages on the same prompts
round(worth(twice, best), 6)


# %%
def two_prompts(other, share):
    "Stages worth of two stages, one on `other` and one on 'sort ba', and what reversing them changes."
    prompts = (other, "sort ba")
    r = torch.tensor([[true_reward(p, y) for y in small.responses] for p in prompts], dtype=torch.float64)
    wins = bradley_terry(r, K)
    first, second = only(wins, 0), only(wins, 1)

    def train(*chunks): return train_stages(sharing_model(share), 32, chunks, beta)
    one, two, back = train(wins), train(first, second), train(second, first)
    return dict(
        other=other,
        agreement=round(torch.corrcoef(r)[0, 1].item(), 2),    # correlation of the rewards of the two prompts
        share=share,
        worth=worth(two, one),
        reversing=apart(two, back),
    )


# %%
SHARES = (0., 0.1, 0.25, 0.5, 1., 2., 4., 8.)
shared = pd.DataFrame([two_prompts(p, s) for p in ("copy ab", "sort bab", "reverse ab") for s in SHARES])
worths = shared.pivot(index=["other", "agreement"], columns="share", values="worth")
worths = worths.sort_index(level="agreement", ascending=False)
worths.round(2)

# %%
fig, ax = plt.subplots(figsize=(7.5, 3.8))
for (other, agreement), row in worths.iterrows():
    (line,) = ax.plot(SHARES, row, marker="o")
    write_at(ax, f"'{other}', {agreement:+.2f}", (8, row[8.]), line.get_color(), right=10)
for y, text in ((1, "as one stage at β"), (2, "as one stage at β/2")):
    ax.axhline(y, color="grey", ls=":")
    ax.text(8, y + 0.03, text, color="grey", ha="right")
ax.set_xscale("symlog", linthresh=0.1)
ax.set_xticks([0, 0.1, 1, 8], ["0", "0.1", "1", "8"])
ax.set(xlim=(-0.02, 9), xlabel="share: how strongly the common features act")
ax.set(ylim=(0.3, 2.25), ylabel="worth of two stages (in stages at β)")
ax.set_title("right: first prompt, correlation of its rewards with those of 'sort ba'", fontsize="medium")
sns.despine()

# %% [markdown]
# *To see:* each line is another first prompt; the second is always `sort ba`. The number beside it is the correlation of their rewards. Where the two agree, two stages lie between one stage at $\beta$ and one at
# $\beta/2$, and the more is shared, the closer to $\beta/2$. Where they want opposite things, less than one stage is left. So "in between" is what agreement buys, not a law.

# %%
nothing_shared = shared.loc[shared["share"] == 0, "worth"]
assert_close(torch.tensor(nothing_shared.tolist()), torch.ones(3))
something = shared[shared["share"] > 0]
agreeing = something.loc[something["agreement"] > 0, "worth"]
opposed = something.loc[something["agreement"] < 0, "worth"]
assert agreeing.between(1, 2, inclusive="neither").all()
assert (opposed < 1).all()

# %% [markdown]
# Does the *order* of the two stages matter? Not here. The loss sees only what is added to the reference, and it does not matter in which order two things are added.

# %%
assert shared["reversing"].max() < 1e-5
{"largest change if the stages are reversed, nats": f"{shared['reversing'].max():.0e}"}


# %% [markdown]
# So if real runs show an effect of order, it comes from what this section leaves out: networks in which parameters do not simply add up, and stages that stop early. And these are
# optima under noisy labels, and those of one optimiser: many settings of table and features fit one prompt equally well and differ on the other. L-BFGS ends at one of them, another optimiser may
# end elsewhere. What real runs do is a question for experiments.

# %% [markdown]
# ## Five ways to get it wrong
#
# The loss is one line, and it is still easy to get wrong: none of the mistakes below raises an error. We make them on token log-probabilities, because there the mask matters.
# Each row has three prompt tokens and a response of one to five.

# %%
def tokens(n):
    "Random token log-probabilities of two models, and where the responses are: each (n, 2, 9)."
    lengths = torch.tensor([[2, 4], [5, 1], [3, 5], [1, 3]])[:n]
    at = torch.arange(9)
    mask = (at >= 3) & (at < 3 + lengths[..., None])
    g = torch.Generator().manual_seed(n)
    policy, ref = -torch.rand(2, n, 2, 9, dtype=torch.float64, generator=g) * 4
    return policy, ref, mask

policy, ref, mask = tokens(4)
mask.sum(-1).tolist()                                          # response tokens: chosen, rejected


# %% [markdown]
# The right loss, and five wrong ones. Can you say what each does wrong, before you read on?

# %%
def total(logp, mask): return (logp * mask).sum(-1)

def right(policy, ref, mask, beta):                            # chosen responses first, then rejected
    chosen, rejected = total(policy, mask).T
    chosen_ref, rejected_ref = total(ref, mask).T
    return dpo_loss(chosen - rejected, chosen_ref - rejected_ref, beta).mean()

def swapped(policy, ref, mask, beta): return right(policy.flip(1), ref.flip(1), mask.flip(1), beta)

def no_beta(policy, ref, mask, beta): return right(policy, ref, mask, 1.0)

def mean_of_tokens(policy, ref, mask, beta):
    n = mask.sum(-1, keepdim=True)
    return right(policy / n, ref / n, mask, beta)

def mask_late(policy, ref, mask, beta): return right(policy, ref, mask.roll(1, -1), beta)

def moving_reference(policy, ref, mask, beta): return right(policy, policy.detach(), mask, beta)

losses = (right, swapped, no_beta, mean_of_tokens, mask_late, moving_reference)


# %% [markdown]
# Chosen and rejected exchanged; $\beta$ forgotten; the mean over tokens instead of the sum; a mask that begins, and ends, one token late; and the policy as its own reference, at every step.
#
# Now seven checks. Each is about one property that the loss must have. The first is the one that everybody makes:

# %%
def starts_at_ln2(loss, policy, ref, mask, beta):
    "A policy that is its own reference has a loss of ln 2."
    assert_close(loss(ref, ref, mask, beta).item(), math.log(2))

def falls_with_chosen(loss, policy, ref, mask, beta):
    "A likelier chosen response means a lower loss."
    up = torch.zeros_like(policy)
    up[:, 0] = 0.1
    likelier = policy + up * mask
    assert loss(likelier, ref, mask, beta) < loss(policy, ref, mask, beta)

def beta_is_per_nat(loss, policy, ref, mask, beta):
    "Twice the nats at half the beta are the same."
    stretched = loss(2 * policy, 2 * ref, mask, beta / 2)
    assert_close(stretched, loss(policy, ref, mask, beta))

def agreed_token_is_free(loss, policy, ref, mask, beta):
    "One more token, on which both models agree, changes nothing."
    ref, longer = ref.clone(), mask.clone()
    ref[:, 0, 2] = policy[:, 0, 2]
    longer[:, 0, 2] = True
    assert_close(loss(policy, ref, longer, beta), loss(policy, ref, mask, beta))


# %%
def only_response_counts(loss, policy, ref, mask, beta):
    "The gradient is zero outside the responses, and nowhere else."
    policy = policy.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(policy, ref, mask, beta), policy)
    assert_close(grad != 0, mask)

def reference_is_read(loss, policy, ref, mask, beta):
    "Another reference, another loss."
    harder = ref.clone()
    harder[:, 0] += 0.1 * mask[:, 0]
    assert loss(policy, harder, mask, beta) != loss(policy, ref, mask, beta)

def value_by_hand(loss, policy, ref, mask, beta):
    "The value, in plain Python."
    def s(logp, i, side):
        values, kept = logp[i, side].tolist(), mask[i, side].tolist()
        return sum(v for v, keep in zip(values, kept) if keep)
    by_hand = 0
    for i in range(len(policy)):
        gamma_theta = s(policy, i, 0) - s(policy, i, 1)
        gamma_ref = s(ref, i, 0) - s(ref, i, 1)
        by_hand += math.log(1 + math.exp(-beta * (gamma_theta - gamma_ref)))
    assert_close(loss(policy, ref, mask, beta).item(), by_hand / len(policy))

checks = (
    starts_at_ln2,
    falls_with_chosen,
    beta_is_per_nat,
    agreed_token_is_free,
    only_response_counts,
    reference_is_read,
    value_by_hand,
)


# %% [markdown]
# Run each check on each loss, with a batch of four pairs and with a batch of one, and see where it fires.

# %%
def fires(check, loss, inputs=tokens, beta=0.3):
    "Does a check object to a loss, on a batch of four or of one?"
    for n in (4, 1):
        try: check(loss, *inputs(n), beta)
        except AssertionError: return True
    return False

alarm = {}
for loss in losses:
    alarm[loss.__name__] = {check.__name__: fires(check, loss) for check in checks}
alarm = pd.DataFrame(alarm)

def mark(table): return table.replace({True: "fires", False: ""})
mark(alarm)

# %% [markdown]
# The right loss passes everything. $\ln 2$ at the start, the popular check, is blind to all five mistakes. The value by hand sees all five, but does not say what is wrong. The checks
# in between do: no two mistakes set off the same checks.

# %%
made_for = dict(
    swapped="falls_with_chosen",
    no_beta="beta_is_per_nat",
    mean_of_tokens="agreed_token_is_free",
    mask_late="only_response_counts",
    moving_reference="reference_is_read",
)
assert not alarm["right"].any()
assert not alarm.loc["starts_at_ln2"].any()
assert alarm.loc["value_by_hand"].drop("right").all()
assert len(alarm.T.drop_duplicates()) == len(losses)
for mistake, check in made_for.items(): assert alarm.loc[check, mistake]


# %% [markdown]
# A check is only as good as its inputs. Here is the value by hand again, on duller ones:

# %%
def one_token(n):
    policy, ref, mask = tokens(n)
    return policy, ref, (torch.arange(9) == 3).expand_as(mask)

def untrained(n):
    policy, ref, mask = tokens(n)
    return ref, ref, mask

inputs = {
    "unequal lengths, beta 0.3": (tokens, 0.3),
    "one-token responses, beta 1": (one_token, 1.0),
    "policy = reference": (untrained, 0.3),
}
seen = {}
for loss in losses[1:]:
    seen[loss.__name__] = {name: fires(value_by_hand, loss, draw, b) for name, (draw, b) in inputs.items()}
seen = pd.DataFrame(seen)
assert seen.sum(axis=1).tolist() == [5, 3, 0]
mark(seen)

# %% [markdown]
# With one-token responses the mean is the sum; with $\beta = 1$ a forgotten $\beta$ is the right one; and a policy that is its own reference hides everything. So test with
# unequal lengths, a $\beta$ that is not 1, and two models that differ.
#
# ## What you now have
#
# - `dpo_loss`, `reward`, `reward_accuracy`: the loss from two numbers per pair, equal to its derivation in value, gradient and optimum.
# - `bradley_terry`, `optimal_policy`, `population_loss`: the exact optimum, wherever all responses can be listed.
# - `certificate`: a lower bound on the mean $\gamma_\theta$, with conditions you have seen fail.
# - Seven checks for a DPO loss, which you can hold against your own.
#
# ## Questions to test yourself
#
# 1. With plain gradient descent, a larger $\beta$ drifted *further* from the base model. Is this a bug, or short training? And with Adam?
#
# <details><summary>Answer</summary>
#
# Short training. The $\beta$ in front of (7) makes the first steps longer; only near the optimum does a larger $\beta$ stay closer. Adam divides $\beta$ out of its steps, so with Adam
# you should see no difference at first and the order of the optima later. Further with a larger $\beta$ would be suspicious there.
#
# </details>
#
# 2. Your log starts at 0.6931. Which of the five mistakes can you rule out?
#
# <details><summary>Answer</summary>
#
# None. All five give $\ln 2$ when the policy equals its reference: see the first row of the table.
#
# </details>
#
# 3. Training ends at $L = 0.5$ with $\varepsilon = 0.1$. What may you say about $\mathbb E\,\gamma_\theta$?
#
# <details><summary>Answer</summary>
#
# If $L$ is the loss of one model on these pairs, and not the running loss of the log: that $\mathbb E\,\gamma_\theta > \mathbb E\,\gamma_{ref}$, because a smoothed loss below $\ln 2$ still means a gain. How
# large it is you may not say; (10) is for the plain loss.
#
# </details>
#
# 4. sDPO in three stages beats DPO at the same $\beta$. Which run is missing before you praise the moving reference?
#
# <details><summary>Answer</summary>
#
# DPO at $\beta/3$. By (11) three stages may be worth up to three times the gain of one, and a smaller $\beta$ gives that without any stages.
#
# </details>
#
# 5. Equation (7) sees only a difference. Can the log-probability of the *chosen* response fall while the loss falls?
#
# <details><summary>Answer</summary>
#
# Yes, if that of the rejected response falls farther. You saw it on our pair, with $\beta = 0.5$.
#
# </details>
#
# ## Try this
#
# - Give `descend` label smoothing on `one_pair`: `descend(one_pair, 2., label_smoothing=0.1)`. Where does the gain level off, and does the learning rate matter?
#
# <details><summary>What you should see</summary>
#
# The gain levels off at $1.0986 = \log(9)/2$ nats, the value of the formula. The learning rates 0.3, 1 and 3 end at the same place; they only get there at different speeds.
#
# </details>
#
# - Make one error in a thousand in the `deterministic` labels (`0.999 * wins + 0.001 * wins.mT`) and look for the optimum with `fit`. How far away is it?
#
# <details><summary>What you should see</summary>
#
# There is an optimum now (`has_optimum` says so), but a distant one: at $\beta = 2$ the two prompts end 1.40 and 1.85 nats of KL from $S$. With the noisy Bradley-Terry labels it is
# 0.20 and 0.28. Almost certain labels ask for an almost certain policy.
#
# </details>
#
# - Write a sixth mistake, say a reference that is summed without its mask, and find which check fires.
#
# <details><summary>What you should see</summary>
#
# `starts_at_ln2`, `agreed_token_is_free` and `value_by_hand` fire. Here the popular check does help: a policy that equals its reference no longer has gain 0.
#
# </details>
