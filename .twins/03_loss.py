# %% [markdown]
# # The DPO loss
# > Bradley-Terry, the KL-regularised objective, its closed form, the loss and its gradient: every line checked.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/03_loss.ipynb)
#
# **You should know** what a log-probability is, and what a gradient does. **Time** under half a minute on one CPU core.
#
# DPO (arXiv 2305.18290) is one line of code and a page of derivation, and it is the derivation that says what $\beta$ does,
# when there is nothing to converge to, and what a *moving* reference adds up to. Here each step of it
# is run in a world where every response can be listed, so "the optimum" is a table of numbers and not a hope.

# %%
#| default_exp loss

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
#| export
import math

import torch
import torch.nn.functional as F
from torch import Tensor

# %%
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from torch.testing import assert_close
from sdpo_nb.world import K, enumerable_world, true_reward

torch.set_num_threads(1)
pd.set_option("display.width", 200, "display.max_columns", 20)


# %% [markdown]
# ## What a preference says about a reward
#
# Bradley-Terry: the chance that $y$ is preferred to $y'$ depends on the difference of their rewards, and on a scale $k$.
#
# $$P(y \succ y' \mid x) = \sigma\big(k\,(r(x,y) - r(x,y'))\big) \tag{1}$$

# %%
#| export
def differences(values: Tensor, # (..., n) one number per response
               ) -> Tensor:     # (..., n, n) that of i minus that of j
    "Every pair at once: rewards become margins, log-probabilities become gammas."
    return values[..., :, None] - values[..., None, :]

def bradley_terry(rewards: Tensor, # (..., n) reward of each response
                  k: float,        # scale: how much a unit of reward weighs in a comparison
                 ) -> Tensor:      # (..., n, n) probability that i is preferred to j
    "sigmoid(k (r_i - r_j)), for all pairs."
    return torch.sigmoid(k * differences(rewards))


# %% [markdown]
# Where would a sigmoid come from? From a judge who sees $k\,r$ plus Gumbel noise and takes the larger. So
# $k$ is how carefully the judge looks. We let 200 000 such judges compare all fourteen responses, and count.

# %%
ew = enumerable_world()
log_S = ew.log_base
torch.manual_seed(0)
judged = K * ew.reward[0] - torch.rand(200_000, 14, dtype=torch.float64).log().neg().log()
counted = torch.stack([(judged[:, [i]] > judged).double().mean(0) for i in range(14)])
P = bradley_terry(ew.reward, K)
off = ~torch.eye(14, dtype=bool)
assert_close(counted[off], P[0][off], atol=0.006, rtol=0)   # (1)
show = [(i, j) for i, j in ((4, 8), (4, 0), (4, 3), (0, 5))]
pd.DataFrame([(ew.responses[i], ew.responses[j], *(ew.reward[0, [i, j]].tolist()), counted[i, j].item(), P[0, i, j].item()) for i, j in show],
             columns=["y", "y'", "r(y)", "r(y')", "share counted", "equation (1)"]).round(3)

# %% [markdown]
# Only differences enter. Adding a constant to every reward of a prompt changes no preference, so preferences can never
# tell us that constant. This freedom is what makes DPO possible, three sections from here.

# %%
assert_close(bradley_terry(ew.reward + torch.tensor([[100.], [-3.]]), K), P)


# %% [markdown]
# ## What alignment asks for
#
# Much reward, and not far from the base model $S$:
#
# $$J(\pi) = \mathbb E_{y\sim\pi}\,[k\,r(x,y)] - \beta\, \mathrm{KL}(\pi \,\|\, S) \tag{2}$$
#
# The reward here is $k\,r$, the one comparisons show. The best $\pi$ is the base model reweighted:
#
# $$\pi^*(y|x) = \frac{S(y|x)\, e^{k\,r(x,y)/\beta}}{Z(x)}, \qquad Z(x) = \sum_y S(y|x)\, e^{k\,r(x,y)/\beta} \tag{3}$$

# %%
#| export
def optimal_policy(log_ref: Tensor, # (..., n) log-probabilities of all responses under the reference, nats
                   rewards: Tensor, # (..., n) reward on the scale of the comparisons, k r
                   beta: float,     # strength of the pull to the reference, > 0
                  ) -> Tensor:      # (..., n) log-probabilities, nats
    "ref exp(reward / beta) / Z: the optimum of the KL-regularised objective (Eq. 4 of the DPO paper)."
    return (log_ref + rewards / beta).log_softmax(-1)


# %% [markdown]
# Why it is the best takes one line. Put (3) into (2), and
#
# $$J(\pi) = \beta \log Z(x) - \beta\, \mathrm{KL}(\pi \,\|\, \pi^*) \tag{4}$$
#
# where only the last term depends on $\pi$, and it is zero at $\pi^*$ alone. An identity must hold for *any* policy, so a random one will do.

# %%
def kl(log_p, log_q): return (log_p.exp() * (log_p - log_q)).sum(-1)
def objective(log_pi, beta): return (log_pi.exp() * K * ew.reward).sum(-1) - beta * kl(log_pi, log_S)   # (2)

beta = 2.0
some = torch.randn(2, 14, dtype=torch.float64).log_softmax(-1)
log_Z = (log_S + K * ew.reward / beta).logsumexp(-1)
assert_close(objective(some, beta), beta * log_Z - beta * kl(some, optimal_policy(log_S, K * ew.reward, beta)))   # (4)


# %% [markdown]
# Identities can be misread, optimisers less easily. Let one climb $J$ from $S$, knowing nothing of (3).

# %%
def lowest(f, start):
    "Where a smooth function is lowest, by L-BFGS."
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([x], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe")
    def closure():
        optimizer.zero_grad(); y = f(x); y.backward(); return y
    optimizer.step(closure)
    return x.detach()


# %%
climbed = {b: lowest(lambda t: -objective(t.log_softmax(-1), b).sum(), log_S).log_softmax(-1) for b in (1., 2., 4.)}
for b, log_pi in climbed.items(): assert_close(log_pi, optimal_policy(log_S, K * ew.reward, b), atol=1e-4, rtol=0)   # (3)
pd.DataFrame({f"beta {b:g}": {"reward r": (p.exp() * ew.reward).sum(-1).mean().item(), "KL to S, nats": kl(p, log_S).mean().item(),
              "largest difference to (3), nats": (p - optimal_policy(log_S, K * ew.reward, b)).abs().max().item()} for b, p in climbed.items()}).T


# %% [markdown]
# ## $Z(x)$ cancels
#
# Nobody can compute $Z$ for a language model: it sums over all texts. Solve (3) for the reward,
#
# $$k\,r(x,y) = \beta \log\frac{\pi^*(y|x)}{S(y|x)} + \beta \log Z(x), \tag{5}$$
#
# and $\beta \log Z(x)$ is just the constant of a prompt that preferences do not see. What remains is the *implicit reward*.
#
# One rule of the whole book belongs here, where policy and reference meet: *the reference follows the policy*. The reference is a table of numbers on the CPU ([chapter 02](02_logprobs.ipynb)), the policy may be on a graphics card. Whatever
# compares the two moves the numbers of the reference, and nobody else has to think of it.

# %%
#| export
def follow(reference,      # numbers of the reference: a tensor, or one number for all
           policy: Tensor, # the same numbers of the policy
          ):               # those of the reference, on the policy's device
    "The reference follows the policy."
    return reference.to(policy.device) if isinstance(reference, Tensor) else reference

def reward(logp: Tensor,     # (n,) log pi_theta(y|x), nats
           logp_ref: Tensor, # (n,) log pi_ref(y|x), nats
           beta: float,      # per nat
          ) -> Tensor:       # (n,) implicit reward, up to a constant of the prompt
    "beta (log pi_theta - log pi_ref)."
    return beta * (logp - follow(logp_ref, logp))


# %%
best = optimal_policy(log_S, K * ew.reward, beta)
implicit = reward(best, log_S, beta)
assert_close(K * ew.reward - implicit, (beta * log_Z)[:, None].expand(2, 14))   # (5)
assert_close(differences(implicit), K * differences(ew.reward))
pd.DataFrame({"Z(x)": log_Z.exp().tolist(), "true k r(ab) - k r(ba)": (K * (ew.reward[:, 3] - ew.reward[:, 4])).tolist(),
              "implicit": (implicit[:, 3] - implicit[:, 4]).tolist()}, index=ew.prompts).round(3)


# %% [markdown]
# ## The loss
#
# Now read (1) backwards. A policy *is* a reward model, its reward is the implicit one, and Bradley-Terry gives the likelihood
# of every label. Maximum likelihood is the DPO loss:
#
# $$L = -\,\mathbb E\, \log \sigma\Big(\beta \log\frac{\pi_\theta(y_w|x)}{\pi_{ref}(y_w|x)} - \beta \log\frac{\pi_\theta(y_l|x)}{\pi_{ref}(y_l|x)}\Big) \tag{6}$$
#
# The four log-probabilities enter only through $\gamma_\pi = \log \pi(y_w|x) - \log \pi(y_l|x)$, one number per model and pair, and so that is what
# the function takes. Its argument `label_smoothing` waits for its own section.

# %%
#| export
def _gain(gamma_theta, gamma_ref):
    "gamma_theta - gamma_ref, pair by pair; unequal shapes would broadcast to every pair against every other."
    if isinstance(gamma_ref, Tensor) and gamma_ref.shape != gamma_theta.shape:
        raise ValueError(f"gamma_theta has shape {tuple(gamma_theta.shape)}, gamma_ref {tuple(gamma_ref.shape)}; they must be equal, one number per pair")
    return gamma_theta - follow(gamma_ref, gamma_theta)

def dpo_loss(gamma_theta: Tensor, # (n,) log-ratio of the policy, nats
             gamma_ref: Tensor,   # (n,) log-ratio of the reference, nats
             beta: float,         # strength of the pull to the reference, > 0, per nat
             label_smoothing: float=0., # assumed share of flipped labels, in [0, 0.5): target 1 - label_smoothing
            ) -> Tensor:          # (n,) loss of each pair
    "-log sigmoid(beta (gamma_theta - gamma_ref)): Eq. 1 of the sDPO paper, Eq. 7 of the DPO paper, per pair. Raises ValueError for unequal shapes."
    z = beta * _gain(gamma_theta, gamma_ref)
    return (1 - label_smoothing) * F.softplus(-z) + label_smoothing * F.softplus(z)


# %% [markdown]
# `softplus(-z)` is $-\log\sigma(z)$ without overflow. A policy that equals its reference has $z = 0$, hence a loss of exactly $\ln 2$
# whatever the data, $\beta$ or smoothing: look for 0.6931 in the first line of any log.

# %%
g = torch.tensor([-38.6, 0.0, 12.5])
for b, eps in ((0.1, 0.), (2., 0.), (0.1, 0.3)): assert_close(dpo_loss(g, g, b, eps), torch.full((3,), math.log(2)))
dpo_loss(torch.tensor([5000., -5000.]), torch.zeros(2), 1.)


# %% [markdown]
# In the enumerable world we need no data set: the expectation in (6) is a sum over all pairs, weighted by how often $i$ beats $j$. The matrix of
# these shares, `wins`, is all a data set can tell the loss; a pair nobody compared is a zero in both places.

# %%
#| export
def population_loss(log_pi: Tensor,  # (m, n) all responses of m prompts under the policy, nats
                    log_ref: Tensor, # (m, n) under the reference, nats
                    wins: Tensor,    # (m, n, n) weight of the comparisons in which i was preferred to j
                    beta: float,     # per nat
                    label_smoothing: float=0.,
                   ) -> Tensor:      # the mean loss
    "The DPO loss over every comparison of an enumerable world."
    losses = dpo_loss(differences(log_pi), differences(log_ref), beta, label_smoothing)
    return (wins * losses).sum() / wins.sum()


# %% [markdown]
# Minimised over all tables, (6) must land on the closed form (3), though it never saw a reward. And if some pairs are compared far more often
# than others, on the same place: at the optimum every pair is satisfied.

# %%
often = torch.rand(2, 14, 14, dtype=torch.float64); often = often + often.mT
fits = {"all pairs alike": P, "some pairs more often": P * often}
off_by = {}
for name, wins in fits.items():
    fitted = lowest(lambda t: population_loss(t.log_softmax(-1), log_S, wins, beta), log_S).log_softmax(-1)
    assert_close(fitted, best, atol=1e-4, rtol=0)   # (6) finds (3)
    off_by[name] = (fitted - best).abs().max().item()
pd.Series(off_by, name="largest difference to (3), nats").to_frame()

# %% [markdown]
# ## Its gradient
#
# With $\Delta = \gamma_\theta - \gamma_{ref}$, the gain of the policy over the reference on a pair,
#
# $$\nabla L = -\beta\; \mathbb E\big[\,\lambda\, (\nabla \log\pi_\theta(y_w|x) - \nabla \log\pi_\theta(y_l|x))\big], \qquad \lambda = \sigma(-\beta\Delta) \tag{7}$$
#
# For a table of logits the bracket is $+1$ at $y_w$ and $-1$ at $y_l$: the softmax cancels. Three ways to the same 28 numbers.

# %%
theta = torch.randn(2, 14, dtype=torch.float64, requires_grad=True)
def loss_at(t): return population_loss(t.log_softmax(-1), log_S, P, beta)

delta = differences(theta.detach().log_softmax(-1)) - differences(log_S)
pull = beta * torch.sigmoid(-beta * delta) * P / P.sum()
formula = -(pull.sum(2) - pull.sum(1))
(autograd,) = torch.autograd.grad(loss_at(theta), theta)
h = 1e-5 * torch.eye(28, dtype=torch.float64).view(28, 2, 14)
finite = torch.stack([(loss_at(theta + e) - loss_at(theta - e)).detach() / 2e-5 for e in h]).view(2, 14)
assert_close(formula, autograd); assert_close(formula, finite, atol=1e-9, rtol=1e-6)
pd.Series({"formula (7) against autograd": (formula - autograd).abs().max().item(), "formula (7) against finite differences": (formula - finite).abs().max().item(),
           "largest entry": formula.abs().max().item()}, name="difference").to_frame()

# %% [markdown]
# The weight $\lambda$ is the chance that the implicit reward gives to the label being wrong. Pairs it ranks right fade away; pairs it ranks wrong pull with full
# force, the mislabelled ones among them. $\beta$ sets how many nats that takes.

# %%
nats = torch.tensor([-40., -10., 0., 10., 40.])
pd.DataFrame({f"beta {b:g}": torch.sigmoid(-b * nats).tolist() for b in (0.01, 0.1, 1.)}, index=pd.Index(nats.tolist(), name="gain Δ, nats")).T.round(3)


# %% [markdown]
# ## What $\beta$ does, and when there is no optimum
#
# One hears two statements: "larger $\beta$ stays closer to the reference" and "larger $\beta$ moves faster". The first is (3), and speaks of the end; the
# second is the $\beta$ in front of (7), and holds for the first steps of an optimiser that keeps it. And sometimes there is no end.

# %% [markdown]
# Ford (1957) said when: the Bradley-Terry estimate exists if the graph "who ever beat whom" is *strongly connected*: from every
# response a chain of wins leads to every other. With a table of logits it is enough that this holds within each group ever compared; then reachability is symmetric.

# %%
def has_optimum(wins):
    "Does every chain of wins have a chain back?"
    reach = wins > 0
    for _ in range(4): reach = reach | (reach.double() @ reach.double() > 0)
    return bool((reach == reach.mT).all())

one_pair = torch.zeros(2, 14, 14, dtype=torch.float64)
for x in range(2): one_pair[x, ew.reward[x].argmax(), log_S[x].argmax()] = 1
labels = {"Bradley-Terry": P, "deterministic": bradley_terry(ew.reward, 1e6), "one pair per prompt": one_pair}
pd.Series({name: has_optimum(wins) for name, wins in labels.items()}, name="a finite optimum").to_frame()


# %% [markdown]
# The second row is a judge who never errs; the third compares each prompt once, as this book's own sources do. In both, some $\Delta$ can always
# grow and lower the loss. (The KL cannot: all mass on one response is a finite KL away.) Plain gradient descent, the same learning rate everywhere:

# %%
def descend(wins, beta, label_smoothing=0., steps=3000, optimizer=torch.optim.SGD, lr=1.0):
    "Gradient descent on a table from S: KL to S and mean gain over the compared pairs, at about even steps of log time."
    theta, rows = log_S.clone().requires_grad_(), []
    optimizer = optimizer([theta], lr=lr)
    for step in range(1, steps + 1):
        (theta.grad,) = torch.autograd.grad(population_loss(theta.log_softmax(-1), log_S, wins, beta, label_smoothing), theta)
        optimizer.step()
        if step in (1, 3, 6, 10, 30, 60, 100, 300, 600, 1000, 3000):
            log_pi = theta.detach().log_softmax(-1)
            gain = differences(log_pi) - differences(log_S)
            rows.append(dict(step=step, kl=kl(log_pi, log_S).mean().item(), gain=((wins * gain).sum() / wins.sum()).item()))
    return pd.DataFrame(rows)


# %%
runs = pd.concat([descend(wins, b).assign(labels=name, beta=b) for name, wins in labels.items() for b in (0.5, 1., 2., 4.)])
def wide(name, what, at): return runs[runs["labels"] == name].pivot(index="beta", columns="step", values=what)[at]

moved = wide("Bradley-Terry", "kl", [3, 30, 300, 3000])
moved["optimum"] = [kl(optimal_policy(log_S, K * ew.reward, b), log_S).mean().item() for b in moved.index]
table = pd.concat({"KL to S, Bradley-Terry": moved, "mean gain Δ, deterministic": wide("deterministic", "gain", [30, 300, 3000]),
                   "mean gain Δ, one pair per prompt": wide("one pair per prompt", "gain", [30, 300, 3000])}, axis=1)
assert moved[3].is_monotonic_increasing and moved["optimum"].is_monotonic_decreasing
for name in ("deterministic", "one pair per prompt"): assert (wide(name, "gain", [30, 300, 3000]).diff(axis=1).iloc[:, 1:] > 0).all(axis=None)
table.round(3)

# %% [markdown]
# Read the left block by columns (nats, after so many steps): after 3 steps larger $\beta$ has moved *more*, at the optimum *less*. The other
# blocks have no such column: $\Delta$ goes on growing, roughly with the logarithm of time.
#
# This book's trainer uses AdamW, which divides each step by the size of past gradients, hence by $\beta$. Adam on the noisy labels of the first block:

# %%
adam = pd.concat([descend(P, b, steps=1000, optimizer=torch.optim.Adam, lr=0.01).assign(beta=b) for b in (0.5, 1., 2., 4.)])
adam_kl = adam.pivot(index="beta", columns="step", values="kl")
assert (adam_kl[[1, 3]].max() / adam_kl[[1, 3]].min() < 1.005).all() and all(adam_kl[step].is_monotonic_decreasing for step in adam_kl if step >= 10)
adam_kl[[1, 3, 30, 100, 1000]].map("{:.2g}".format)

# %% [markdown]
# The first steps go equally far for every $\beta$; after them the order is that of the optima.

# %%
fig, axes = plt.subplots(1, 3, figsize=(11.5, 3.2))
panels = {"noisy labels: the order turns": runs[runs["labels"] == "Bradley-Terry"], "the same with Adam: it never turns": adam}
for ax, (title, drawn) in zip(axes, panels.items()):
    sns.lineplot(drawn, x="step", y="kl", hue="beta", palette="viridis", ax=ax)
    for color, v in zip(sns.color_palette("viridis", 4), moved["optimum"]): ax.axhline(v, color=color, ls=":", lw=1)
    ax.set(xscale="log", yscale="log", ylim=(1e-5, 4), xlabel="gradient steps", ylabel="KL to S (nats)", title=title)
sns.lineplot(runs[runs["beta"] == 2], x="step", y="gain", hue="labels", style="labels", palette="deep", ax=axes[2])
axes[2].set(xscale="log", xlabel="gradient steps", ylabel="mean gain Δ (nats)", title="β = 2: two of three never settle")
for ax, title in zip(axes, ("β (k = 6)", "β (k = 6)", None)): ax.legend(frameon=False, fontsize="small", title=title)
sns.despine(); fig.tight_layout()

# %% [markdown]
# *To see:* left, the curves cross on the way to their dotted optima; in the middle they only part. Right, only Bradley-Terry labels level off.
# With hard labels the pull to the reference is real only as long as training is short, whatever $\beta$ says (IPO, arXiv 2310.12036, makes this point).

# %% [markdown]
# ## Label smoothing
#
# If some labels are flipped, one should not be too sure of any:
#
# $$L_\varepsilon = -\,\mathbb E\big[(1-\varepsilon) \log \sigma(\beta\Delta) + \varepsilon \log \sigma(-\beta\Delta)\big] \tag{8}$$
#
# (8) aims at probability $1-\varepsilon$ instead of 1 (conservative DPO). It is the plain loss on data in which a share $\varepsilon$ has been turned around, so
# every win gets a return match, and Ford's condition holds again.

# %%
eps = 0.1
mixed = (1 - eps) * one_pair + eps * one_pair.mT
assert_close(population_loss(some, log_S, one_pair, beta, eps), population_loss(some, log_S, mixed, beta))   # (8)
assert has_optimum(mixed) and not has_optimum(one_pair)

# %% [markdown]
# It is *not* the likelihood of labels flipped with probability $\varepsilon$, whose mixture stands inside the log. That one falls all the way, as the plain loss
# does; (8) falls and rises.

# %%
z = torch.linspace(-8, 8, 65, dtype=torch.float64)
mixture = -((1 - eps) * z.sigmoid() + eps * (-z).sigmoid()).log()
smoothed = dpo_loss(z, 0 * z, 1., eps)
assert (mixture.diff() < 0).all() and smoothed[:40].diff().max() < 0 < smoothed[-20:].diff().min()
pd.DataFrame({"mixture inside the log": mixture, "equation (8)": smoothed}, index=pd.Index(z.tolist(), name="βΔ")).loc[[-4, 0, 2, 4, 8]].T.round(3)

# %% [markdown]
# For a single pair the optimum is where the slope of (8) is zero: $\Delta = \log\frac{1-\varepsilon}{\varepsilon} \big/ \beta$, a target in nats that $\beta$ sets.

# %%
rows = []
for b in (0.5, 2.):
    fitted = lowest(lambda t: population_loss(t.log_softmax(-1), log_S, one_pair, b, eps), log_S)
    gain = (differences(fitted) - differences(log_S))[one_pair > 0]
    assert_close(gain, torch.full_like(gain, math.log((1 - eps) / eps) / b), atol=1e-4, rtol=0)
    rows.append((b, gain.mean().item(), math.log((1 - eps) / eps) / b))
pd.DataFrame(rows, columns=["beta", "Δ reached, nats", "log((1-ε)/ε)/β"]).round(4)

# %% [markdown]
# ## The same loss in sDPO's words
#
# The DPO paper groups (6) by response: chosen reward minus rejected reward. The sDPO paper (arXiv 2403.19270, Eq. 1) groups it by model:
#
# $$L = -\,\mathbb E\, \log \sigma\big(\beta\,(\gamma_\theta - \gamma_{ref})\big) \tag{9}$$
#
# The number is the same. The view is not: the whole reference has become *one number per pair*, a bar to clear, which may be computed beforehand and stored.

# %%
chosen, rejected, chosen_ref, rejected_ref = -60 + 20 * torch.randn(4, 8, dtype=torch.float64)
by_response = -F.logsigmoid(reward(chosen, chosen_ref, 0.1) - reward(rejected, rejected_ref, 0.1))
assert_close(by_response, dpo_loss(chosen - rejected, chosen_ref - rejected_ref, 0.1))   # (6) is (9)


# %% [markdown]
# Whether a pair clears its bar is the *reward accuracy*. Ties count one half, so a policy that is still its own reference reads 0.5, which is what it knows;
# counted with a strict `>`, it would read 0. NaN is no verdict, and stays NaN.

# %%
#| export
def reward_accuracy(gamma_theta: Tensor,  # (n,) log-ratio of the policy, nats
                    gamma_ref: Tensor|float=0., # (n,) of the reference; 0 reads the policy reference-free
                   ) -> Tensor:           # (n,) 1 right, 0 wrong, 0.5 tie; the mean is the reward accuracy
    "Does the implicit reward rank the chosen response first? Ties count one half, NaN stays NaN."
    delta = _gain(gamma_theta, gamma_ref)
    return (0.5 + 0.5 * delta.sign()).float().where(~delta.isnan(), math.nan)


# %%
bars, policy = torch.tensor([-40., -40., 5.]), torch.tensor([-30., -40., 4.])
got = pd.DataFrame({"gamma_ref": bars, "gamma_theta": policy, "against the reference": reward_accuracy(policy, bars), "reference-free": reward_accuracy(policy)})
assert got["against the reference"].tolist() == [1, 0.5, 0] and got["reference-free"].tolist() == [0, 0, 1]
got


# %% [markdown]
# The two columns disagree on every row. The first pair has been improved by ten nats and is still ranked wrong; the last got worse and is still ranked right.
#
# ## The reference as a lower bound
#
# The sDPO paper calls $\gamma_{ref}$ a lower bound of what training reaches, in words. As an inequality one can test (derived here, by Jensen:
# $-\log\sigma$ is convex):
#
# $$\mathbb E\,\gamma_\theta \;\ge\; \mathbb E\,\gamma_{ref} - \frac1\beta \log\big(e^{L} - 1\big) \tag{10}$$

# %%
#| export
def certificate(loss: float,           # mean plain sigmoid DPO loss of M_t over a set of pairs
                mean_gamma_ref: float, # mean gamma_ref over the same pairs, nats
                beta: float,           # per nat
               ) -> float:             # lower bound of mean gamma_theta over them, nats
    "E gamma_theta >= E gamma_ref - log(e^L - 1) / beta, by Jensen; above E gamma_ref exactly when L < ln 2."
    if loss < 0: raise ValueError(f"loss: {loss} is negative, and a mean of -log sigmoid never is")
    loss = max(loss, torch.finfo(torch.float32).tiny)
    return mean_gamma_ref - (loss + math.log(-math.expm1(-loss))) / beta


# %% [markdown]
# Written as $L + \log(1 - e^{-L})$ it survives a large loss. A loss of exactly zero is always an underflow, and would certify infinity; it is read as the
# smallest normal fp32 number, which certifies less and stays true.

# %%
underflow = dpo_loss(torch.tensor([2000.]), torch.tensor([0.]), 0.1).item()
assert underflow == 0 and 0 < certificate(underflow, 0., 0.1) < 2000 and certificate(5000., 0., 0.1) == -50_000
certificates = pd.Series({L: certificate(L, 0., 0.1) for L in (underflow, 0.1, math.log(2), 1.5, 5000.)})
certificates.rename_axis("loss L").round(1).to_frame("certified mean gain, nats (beta 0.1)")

# %% [markdown]
# Now 500 random data sets of 64 pairs at $\beta = 0.1$, with gains of all signs and spreads, around the mean $\gamma_{ref}$ of $-38.6$ nats that the sDPO paper
# reports for its base model.

# %%
shift, spread = torch.empty(500, 1, dtype=torch.float64).uniform_(-30, 30), torch.empty(500, 1, dtype=torch.float64).uniform_(0, 40)
gamma_ref = -38.6 + 20 * torch.randn(500, 64, dtype=torch.float64)
gamma_theta = gamma_ref + shift + spread * torch.randn(500, 64, dtype=torch.float64)
def bounds(L): return torch.tensor([certificate(l, g, 0.1) for l, g in zip(L.tolist(), gamma_ref.mean(1).tolist())], dtype=torch.float64)

L = dpo_loss(gamma_theta, gamma_ref, 0.1).mean(1)
sets = pd.DataFrame({"loss": L, "gain": (gamma_theta - gamma_ref).mean(1), "below": (gamma_theta < gamma_ref).double().mean(1)})
assert (gamma_theta.mean(1) >= bounds(L) - 1e-9).all()   # (10)
assert (sets.loc[sets["loss"] < math.log(2), "gain"] > 0).all()

# %%
certified = sets[sets["loss"] < math.log(2)]
worst = certified.loc[certified["below"].idxmax()]
fig, ax = plt.subplots(figsize=(6.5, 3.4))
dots = ax.scatter(sets["loss"], sets["gain"], c=100 * sets["below"], cmap="viridis", s=14)
ax.plot(worst["loss"], worst["gain"], "o", ms=11, mfc="none", mec="crimson", label=f"certified, {worst['below']:.0%} of pairs below")
x = torch.linspace(0.03, 4.2, 200).tolist()
ax.plot(x, [certificate(l, 0., 0.1) for l in x], color="crimson", label="certificate (10)")
ax.axvline(math.log(2), color="grey", ls=":", label="ln 2"); ax.axhline(0, color="grey", lw=0.5)
ax.set(xlim=(0, 4.2), ylim=(-44, 42), xlabel="DPO loss L (nats)", ylabel="mean gain $\\gamma_\\theta - \\gamma_{ref}$ (nats)")
fig.colorbar(dots, label="pairs below the reference (%)"); ax.legend(frameon=False); sns.despine()
assert sets["loss"].max() < 4.2 and sets["gain"].abs().max() < 42

# %% [markdown]
# *To see:* no data set lies under the red line; left of $\ln 2$ all lie above zero. But look at the ringed one: the bound is on the *mean*, and says
# nothing about single pairs.

# %%
pd.Series({"data sets with L < ln 2": len(certified), "smallest mean gain, nats": certified["gain"].min(),
           "largest share of pairs below the reference": worst["below"],
           "data sets with a gain but L > ln 2": ((sets["gain"] > 0) & (sets["loss"] >= math.log(2))).sum()}).round(2)

# %% [markdown]
# Its conditions are not decoration. Give it a smoothed loss, or the loss of other pairs, and count what breaks. One promise survives smoothing, for any
# $\varepsilon < \frac12$: (8) is convex too, is $\ln 2$ at zero and falls there, so $L_\varepsilon < \ln 2$ still means a gain.

# %%
given = {"plain, same pairs": L, "smoothed, ε = 0.1": dpo_loss(gamma_theta, gamma_ref, 0.1, 0.1).mean(1),
         "smoothed, ε = 0.3": dpo_loss(gamma_theta, gamma_ref, 0.1, 0.3).mean(1), "plain, other pairs": L.roll(1)}
broken = pd.DataFrame({name: {"inequality (10) is false": (gamma_theta.mean(1) < bounds(l) - 1e-9).sum().item(),
                              "L < ln 2 without a gain": ((l < math.log(2)) & (gamma_theta.mean(1) <= gamma_ref.mean(1))).sum().item()} for name, l in given.items()}).T
assert (broken.iloc[0] == 0).all() and (broken.iloc[1:, 0] > 0).all() and broken.iloc[1:3, 1].sum() == 0 and broken.iloc[3, 1] > 0
broken

# %% [markdown]
# One pair shows why. At $\beta\Delta = -2$ the plain bound is tight; smoothing adds $\varepsilon\beta\Delta < 0$ to the loss, so the bound asks for more than there is.

# %%
pair = torch.tensor([-20.], dtype=torch.float64)
tight, wrong = (certificate(dpo_loss(pair, torch.zeros(1), 0.1, e).item(), 0., 0.1) for e in (0., 0.1))
assert abs(tight + 20) < 1e-9 and wrong > -20 + 1
{"true mean gain": -20.0, "certified, plain": round(tight, 2), "'certified', smoothed": round(wrong, 2)}


# %% [markdown]
# "Same weights" is the third condition: $L$ is that of one model in an evaluation pass. The running training loss averages over models that no longer exist.
#
# ## What $T$ stages add up to
#
# sDPO trains stage $t$ against $M_{t-1}$. If each stage reaches its optimum on the same prompts, (3) is applied $T$ times:
#
# $$M_T \propto M_{T-1}\, e^{k r/\beta} \propto \dots \propto S\, e^{T k r/\beta} \tag{11}$$
#
# That is *one* stage at $\beta/T$. Nothing is gained by moving the reference that a smaller $\beta$ would not give.

# %%
def train_stages(model, size, chunks, beta, minimise=lowest):
    "Each stage to its optimum, from the last model and against it; `model` turns `size` parameters into log-probabilities."
    theta = torch.zeros(size, dtype=torch.float64)
    for wins in chunks:
        log_ref = model(theta)
        theta = minimise(lambda t: population_loss(model(t), log_ref, wins, beta), theta)
    return model(theta)

def table_model(theta): return (log_S + theta.view(2, 14)).log_softmax(-1)


# %%
stages = {T: train_stages(table_model, 28, [P] * T, beta) for T in (1, 2, 3, 4)}
same = pd.Series({T: (m - optimal_policy(log_S, K * ew.reward, beta / T)).abs().max().item() for T, m in stages.items()})
assert same.max() < 1e-6   # (11)
same.rename_axis("T").to_frame("largest difference to one stage at beta/T, nats")


# %% [markdown]
# But sDPO gives each stage *other* prompts. For a table, which shares nothing between prompts, stage 2 then leaves the prompts of stage 1 alone, and each
# prompt has seen one stage at $\beta$.

# %%
def only(wins, x):
    "The comparisons of prompt x alone."
    return wins * (torch.arange(2) == x)[:, None, None]

disjoint = train_stages(table_model, 28, [only(P, 0), only(P, 1)], beta)
assert_close(disjoint, optimal_policy(log_S, K * ew.reward, beta), atol=1e-6, rtol=0)
pd.Series({f"beta {b:g}": (disjoint - optimal_policy(log_S, K * ew.reward, b)).abs().max().item() for b in (beta, beta / 2)},
          name="largest difference to one stage, nats").to_frame()


# %% [markdown]
# A real model shares *something*. So give the table four features of the response, the same for all prompts, that weigh `share` times as much. Two
# stages on disjoint prompts are then worth $c$ stages: the slope of their log-ratios $\log \pi/S$ against those of one stage at $\beta$ on everything.

# %%
def sharing_model(share):
    "A table plus shared features. 0: the table alone; large: shared features move first, and the table still fits the rest."
    return lambda theta: (log_S + theta[:28].view(2, 14) + share * theta[28:] @ ew.features.T).log_softmax(-1)

def worth(log_pi, log_one):
    "Slope through the origin of the gains of one model against those of another."
    u, v = ((differences(m) - differences(log_S)).flatten() for m in (log_pi, log_one))
    return (u @ v / (v @ v)).item()


# %%
def two_prompts(other, share, minimise=lowest):
    "Stages worth of two stages, one on `other` and one on 'sort ba', and what reversing them changes."
    r = torch.tensor([[true_reward(p, y) for y in ew.responses] for p in (other, "sort ba")], dtype=torch.float64)
    wins = bradley_terry(r, K)
    first, second = only(wins, 0), only(wins, 1)
    one, two, back = (train_stages(sharing_model(share), 32, chunks, beta, minimise) for chunks in ([wins], [first, second], [second, first]))
    return dict(other=other, agreement=round(torch.corrcoef(r)[0, 1].item(), 2), share=share, worth=worth(two, one), reversing=(two - back).abs().max().item())

shared = pd.DataFrame([two_prompts(p, s) for p in ("copy ab", "sort bab", "reverse ab") for s in (0., 0.1, 0.25, 0.5, 1., 2., 4., 8.)])
shared.pivot(index=["other", "agreement"], columns="share", values="worth").sort_index(level="agreement", ascending=False).round(2)

# %%
shared["first prompt (its rewards against those of 'sort ba')"] = [f"'{p}' (correlation {a:.2f})" for p, a in zip(shared["other"], shared["agreement"])]
fig, ax = plt.subplots(figsize=(6.5, 3.4))
sns.lineplot(shared, x="share", y="worth", hue=shared.columns[-1], marker="o", palette="deep", ax=ax)
for y, text in ((1, "one stage at β"), (2, "one stage at β/2")):
    ax.axhline(y, color="grey", ls=":"); ax.text(8, y + 0.03, text, ha="right", color="grey")
ax.set_xscale("symlog", linthresh=0.1); ax.set_xticks([0, 0.1, 1, 8], ["0", "0.1", "1", "8"])
ax.set(xlim=(-0.02, 9), ylim=(0.3, 2.25), xlabel="weight of what the prompts share", ylabel="two stages are worth ... stages")
sns.move_legend(ax, "center left", bbox_to_anchor=(0, 0.68), frameon=False, fontsize="small", title_fontsize="small"); sns.despine()

# %% [markdown]
# *To see:* where the prompts agree, two stages lie between one stage at $\beta$ and one at $\beta/2$, and the more is shared the closer to $\beta/2$. Where they want
# opposite things, each stage undoes part of the other and less than one is left. "In between" is what agreement buys, not a law.

# %%
assert_close(torch.tensor(shared.loc[shared["share"] == 0, "worth"].tolist()), torch.ones(3))
between = shared[(shared["agreement"] > 0) & (shared["share"] > 0)]
assert between["worth"].between(1, 2, inclusive="neither").all() and (shared.loc[(shared["agreement"] < 0) & (shared["share"] > 0), "worth"] < 1).all()

# %% [markdown]
# And the *order* of the two stages changes nothing, since (6) sees only what was added to the reference, and additions commute.

# %%
assert shared["reversing"].max() < 1e-5
{"largest change if the stages are reversed, nats": f"{shared['reversing'].max():.0e}"}

# %% [markdown]
# One warning. A table *and* features is more than a stage on one prompt can pin down: many parameters fit it equally well, and differ on the other prompt. L-BFGS
# moves along gradients alone, never along what the stage cannot see, so ours is the nearest.

# %%
model, start = sharing_model(0.25), torch.zeros(32, dtype=torch.float64)
moved_by = lowest(lambda t: population_loss(model(t), log_S, only(P, 0), beta), start)
J = torch.autograd.functional.jacobian(model, start)[0]   # (14, 32) what the stage sees
assert_close(torch.linalg.pinv(J) @ J @ moved_by, moved_by)


# %% [markdown]
# Another optimiser gives other curves:

# %%
def with_adam(f, start):
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.03)
    for _ in range(300):
        optimizer.zero_grad(); f(x).backward(); optimizer.step()
    return x.detach()

optimisers = pd.DataFrame({p: {name: two_prompts(p, 0.25, f)["worth"] for name, f in (("L-BFGS", lowest), ("Adam", with_adam))} for p in ("copy ab", "reverse ab")})
assert (optimisers.diff().iloc[1].abs() > 0.05).all()
optimisers.rename_axis(columns="first prompt, share 0.25").round(2)


# %% [markdown]
# So sDPO must be compared with DPO at $\beta/T$, not only at $\beta$, and an effect of order must come from what this section leaves out: networks that are not
# additive, stages that stop early. These are optima under noisy labels; what real runs do is a question for experiments.
#
# ## Five ways to get it wrong
#
# None of the mistakes below raises an error. Here they are on token log-probabilities, where the mask matters: three prompt tokens, responses of one to
# five, batches of four and of one.

# %%
def total(logp, mask): return (logp * mask).sum(-1)

def right(policy, ref, mask, beta): # (n, 2, L) token log-probs, chosen then rejected
    (w, l), (w_ref, l_ref) = total(policy, mask).T, total(ref, mask).T
    return dpo_loss(w - l, w_ref - l_ref, beta).mean()

def swapped(policy, ref, mask, beta): return right(policy.flip(1), ref.flip(1), mask.flip(1), beta)
def no_beta(policy, ref, mask, beta): return right(policy, ref, mask, 1.0)
def mean_of_tokens(policy, ref, mask, beta):
    n = mask.sum(-1, keepdim=True)
    return right(policy / n, ref / n, mask, beta)
def mask_late(policy, ref, mask, beta): return right(policy, ref, mask.roll(1, -1), beta)
def moving_reference(policy, ref, mask, beta): return right(policy, policy.detach(), mask, beta)


# %%
def tokens(n):
    "Random token log-probabilities of two models, and where the responses are."
    ends = 3 + torch.tensor([[2, 4], [5, 1], [3, 5], [1, 3]])[:n]
    at = torch.arange(9)
    g = torch.Generator().manual_seed(n)
    policy, ref = -torch.rand(2, n, 2, 9, dtype=torch.float64, generator=g) * 4
    return policy, ref, (at >= 3) & (at < ends[..., None])

tokens(4)[2].sum(-1).tolist()


# %% [markdown]
# Seven checks, each of one property that the loss must have. The first is the one everybody makes; the last recomputes the value in plain Python.

# %%
def starts_at_ln2(loss, policy, ref, mask, beta):
    assert_close(loss(ref, ref, mask, beta).item(), math.log(2))

def falls_with_chosen(loss, policy, ref, mask, beta):
    up = torch.zeros_like(policy); up[:, 0] = 0.1
    assert loss(policy + up * mask, ref, mask, beta) < loss(policy, ref, mask, beta)

def beta_is_per_nat(loss, policy, ref, mask, beta):
    assert_close(loss(2 * policy, 2 * ref, mask, beta / 2), loss(policy, ref, mask, beta))

def agreed_token_is_free(loss, policy, ref, mask, beta):
    ref, longer = ref.clone(), mask.clone()
    ref[:, 0, 2], longer[:, 0, 2] = policy[:, 0, 2], True
    assert_close(loss(policy, ref, longer, beta), loss(policy, ref, mask, beta))


# %%
def only_response_counts(loss, policy, ref, mask, beta):
    policy = policy.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(policy, ref, mask, beta), policy)
    assert_close(grad != 0, mask)

def reference_is_read(loss, policy, ref, mask, beta):
    harder = ref.clone(); harder[:, 0] += 0.1 * mask[:, 0]
    assert loss(policy, harder, mask, beta) != loss(policy, ref, mask, beta)

def value_by_hand(loss, policy, ref, mask, beta):
    def s(logp, i, side): return sum(v for v, m in zip(logp[i, side].tolist(), mask[i, side].tolist()) if m)
    z = [beta * (s(policy, i, 0) - s(policy, i, 1) - s(ref, i, 0) + s(ref, i, 1)) for i in range(len(policy))]
    assert_close(loss(policy, ref, mask, beta).item(), sum(math.log(1 + math.exp(-v)) for v in z) / len(z))


# %%
def fires(check, loss, inputs=tokens, beta=0.3):
    "Does a check object to a loss, on a batch of four or of one?"
    try:
        for n in (4, 1): check(loss, *inputs(n), beta)
    except AssertionError: return True
    return False

losses = (right, swapped, no_beta, mean_of_tokens, mask_late, moving_reference)
named = dict(swapped="falls_with_chosen", no_beta="beta_is_per_nat", mean_of_tokens="agreed_token_is_free", mask_late="only_response_counts",
             moving_reference="reference_is_read")   # the check that is made for it
checks = (starts_at_ln2, falls_with_chosen, beta_is_per_nat, agreed_token_is_free, only_response_counts, reference_is_read, value_by_hand)
def mark(table): return table.replace({True: "fires", False: ""})

alarm = pd.DataFrame({l.__name__: {c.__name__: fires(c, l) for c in checks} for l in losses})
assert not alarm["right"].any() and not alarm.loc["starts_at_ln2"].any() and alarm.loc["value_by_hand"].drop("right").all()
assert len(alarm.T.drop_duplicates()) == len(losses) and all(alarm.loc[check, l] for l, check in named.items())
mark(alarm)


# %% [markdown]
# The right loss passes everything. $\ln 2$ at the start, the popular check, is blind to all five. The value by hand sees all five but does not say what is wrong;
# the checks between do: no two mistakes ring the same bells.
#
# A check is only as good as its inputs. The value by hand again, on duller ones:

# %%
def one_token(n): policy, ref, mask = tokens(n); return policy, ref, (torch.arange(9) == 3).expand_as(mask)
def untrained(n): policy, ref, mask = tokens(n); return ref, ref, mask

dull = {"unequal lengths, beta 0.3": (tokens, 0.3), "one-token responses, beta 1": (one_token, 1.0), "policy = reference": (untrained, 0.3)}
seen = pd.DataFrame({l.__name__: {name: fires(value_by_hand, l, *how) for name, how in dull.items()} for l in losses[1:]})
assert seen.sum(axis=1).tolist() == [5, 3, 0]
mark(seen)

# %% [markdown]
# ## What you now have
#
# - `dpo_loss`, `reward`, `reward_accuracy`: the loss from two numbers per pair, equal to its derivation in value, gradient and optimum.
# - `bradley_terry`, `optimal_policy`, `population_loss`: the exact optimum, wherever all responses can be listed.
# - `certificate`: a lower bound on the mean $\gamma_\theta$, with conditions you have seen fail.
#
# ## Questions to test yourself
#
# 1. With plain gradient descent, larger $\beta$ drifted *further* from the base model. Bug, or short training? And with Adam?
# 2. Your log starts at 0.6931. Which of the five mistakes can you rule out?
# 3. Training ends at $L = 0.5$ with $\varepsilon = 0.1$. What may you say about $\mathbb E\,\gamma_\theta$?
# 4. sDPO in three stages beats DPO at the same $\beta$. Which run is missing before you praise the moving reference?
# 5. Equation (7) sees only a difference. Can the log-probability of the *chosen* response fall while the loss falls?
#
# ## Try this
#
# - Give `descend` label smoothing on `one_pair`: where does the curve level off, and does the learning rate matter?
# - Make one error in a thousand in the `deterministic` labels and look for the optimum. How far away is it?
# - Write a sixth mistake, say a reference without its mask, and find which check fires.
