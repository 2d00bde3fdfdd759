# %% [markdown]
# # How much data does a stage need?
# > T stages at beta are one stage at beta / T if every stage finds the same reward. From few pairs each finds a reward that is too large, and a moving reference adds these.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/finite_data.ipynb)
#
# **A law, derived and simulated.** A reward that is fitted to few comparisons is too large. DPO at $\beta/T$ fits one reward to all pairs. $T$ stages fit $T$ rewards, each to a $T$-th of the pairs, and add them. So they go too far: by a share $(1 - 1/T)\, c/n$, where $n$ is the number of pairs of a stage and $c$ a constant, here about five pairs. Its predictions for the tiny worlds, written down before the runs, [fail](finite_data_tested.ipynb) where the model knows its pairs by heart: this is a law for models with fewer features than pairs. With three passes over the pairs two of them hold, which restarts of the schedule could do as well.
#
# **You should know** the [DPO loss](../03_loss.ipynb) with its closed form, and [smaller beta](smaller_beta.ipynb), which left the question open. **Time** 55 minutes to read, a minute to run.
#
# <details><summary>Words used on this page</summary>
#
# - **S** is the model before alignment. **DPO** trains it on all pairs at once, with S as its *reference*, the fixed model that the loss measures from. **Stepwise DPO** trains in $T$ stages, one for each *chunk* of the pairs; the model of the stage before is the next reference, so the reference *moves*.
# - **$\beta$** says how strongly a model is held at its reference.
# - **KL** is the distance of a model from S, in nats.
# - **Overshoot** is the length of the sum of the stages, divided by that of one stage at $\beta/T$, minus 1. Length is that of the reward's weights.
# - **0.11 [0.10, 0.12]** is a mean and its 95 % interval.
#
# </details>

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
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from torch.testing import assert_close
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.loss import bradley_terry, optimal_policy, population_loss

# %% [markdown]
# ## A world in which everything can be computed
#
# We want a model in which prompts share what they teach, as in a language model, and which is still simple enough for exact answers. Each response $y$ to a prompt $x$ has five *features* $\phi(x, y)$. The true reward is a weighted sum of them, $w \cdot \phi$. The policy moves along the same features:
#
# $$\pi_\theta(y|x) \propto S(y|x)\, e^{\theta \cdot \phi(x, y)}.$$
#
# S has $\theta = 0$. Here are twelve prompts with eight responses each.

# %%
PROMPTS, RESPONSES, FEATURES = 12, 8, 5
COUNTS = (1, 2, 3, 6)                                   # numbers of stages T

generator = torch.Generator().manual_seed(0)
def normal(*shape): return torch.randn(*shape, dtype=torch.float64, generator=generator)

phi = normal(PROMPTS, RESPONSES, FEATURES)
w = normal(FEATURES)
w = w / w.norm()
log_S = normal(PROMPTS, RESPONSES).log_softmax(-1)
reward = phi @ w
wins = bradley_terry(reward, 1.)                        # how often each response beats each other
wins = wins * (1 - torch.eye(RESPONSES, dtype=torch.float64))

def policy(theta): return (log_S + phi @ theta).log_softmax(-1)


# %% [markdown]
# ## A stage is a logistic regression
#
# The loss of a stage sees $\gamma_\theta - \gamma_{ref}$, the change of $\gamma$. What is that here? $S$ and $Z$ cancel. What is left is $(\theta - \theta_{ref}) \cdot \Delta\phi$, where $\Delta\phi$ is the difference of the features of the chosen and the rejected response. Call $u = \beta (\theta - \theta_{ref})$. Then the loss of stage $t$ is
#
# $$L_t = \mathbb E \log\left(1 + e^{-u \cdot \Delta\phi}\right), \tag{1}$$
#
# a logistic regression of the labels on $\Delta\phi$. Nothing in it depends on the reference or on $\beta$. So is it the same number as the DPO loss of this book, for any reference?

# %%
pair_features = phi[:, :, None] - phi[:, None]          # (prompts, i, j, features)

def logistic_loss(u, weights):
    "Equation (1), over every comparison."
    losses = torch.nn.functional.softplus(-(pair_features @ u))
    return (weights * losses).sum() / weights.sum()

theta, theta_ref = normal(FEATURES), normal(FEATURES)
for beta in (0.3, 2.):
    dpo = population_loss(policy(theta), policy(theta_ref), wins, beta)
    assert_close(dpo, logistic_loss(beta * (theta - theta_ref), wins))     # (1)
round(dpo.item(), 4)


# %% [markdown]
# It is. Write $\hat w_t$ for the minimum of (1) on chunk $t$: the reward that this chunk teaches. A stage that reaches its optimum moves by $\hat w_t / \beta$ from its reference, wherever that stands. So
#
# $$\theta_T = \frac{1}{\beta} \sum_{t=1}^T \hat w_t \quad\text{(moving)}, \qquad \theta_T = \frac{1}{\beta}\, \hat w_T \quad\text{(fixed)}. \tag{2}$$
#
# A moving reference *adds* $T$ rewards. A fixed reference keeps none of the earlier ones: each stage is free to go anywhere, and ends at the fit of its own chunk.
#
# ## Enough labels: one stage at beta / T
#
# Suppose each chunk has every comparison as often as Bradley-Terry draws it, and its $\Delta\phi$ point in all directions. Then every stage finds the same reward, $\hat w_t = w$, and (2) becomes
#
# $$M_T \propto S\, e^{T\, r/\beta} \quad\text{(moving)}, \qquad M_T \propto S\, e^{r/\beta} \quad\text{(fixed)}. \tag{3}$$
#
# The stages need not share a prompt. Below each has prompts of its own. Stages are *trained*, on the DPO loss, and not computed.

# %%
def train_stage(theta, theta_ref, weights, beta):
    "DPO from `theta`, against `theta_ref`, to the optimum."
    new, log_ref = theta.clone().requires_grad_(), policy(theta_ref)
    optimizer = torch.optim.LBFGS([new], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16,
                                  line_search_fn="strong_wolfe")
    def closure():
        optimizer.zero_grad()
        loss = population_loss(policy(new), log_ref, weights, beta)
        loss.backward()
        return loss
    optimizer.step(closure)
    return new.detach()

def train_stages(chunks, beta, moving=True):
    S = theta = torch.zeros(FEATURES, dtype=torch.float64)
    for weights in chunks: theta = train_stage(theta, theta if moving else S, weights, beta)
    return theta

def own_prompts(weights, T):
    "T chunks; chunk t has every T-th prompt."
    number = torch.arange(PROMPTS) % T
    return [weights * (number == t)[:, None, None] for t in range(T)]

def apart(theta, expected): return (policy(theta) - expected).abs().max().item()


# %% [markdown]
# First (2), with labels that were counted: each comparison came up a few times, or never. The reward of each chunk is fitted alone, from S and at another $\beta$. Then are stages their sum, or the last of them?

# %%
beta = 2.
counted = torch.poisson(3 * wins, generator=generator)
chunks = own_prompts(counted, 3)
alone = [train_stages([chunk], 1.) for chunk in chunks]                    # beta = 1: theta is the reward
assert_close(train_stages(chunks, beta), sum(alone) / beta, atol=1e-6, rtol=0)                # (2), moving
assert_close(train_stages(chunks, beta, moving=False), alone[-1] / beta, atol=1e-6, rtol=0)   # (2), fixed
rows = {f"fitted to chunk {t + 1}": u.numpy() for t, u in enumerate(alone)}
pd.DataFrame(rows | {"true w": w.numpy()}).round(2).T

# %% [markdown]
# Each chunk has a reward of its own, roughly $w$, and both halves of (2) hold to 1e-6. Now labels without end, and (3):

# %%
errors = {}
for T in COUNTS:
    chunks = own_prompts(wins, T)
    errors[f"T = {T}"] = {
        "moving reference, from one stage at beta/T": apart(
            train_stages(chunks, beta), optimal_policy(log_S, reward, beta / T)),
        "fixed reference, from one stage at beta": apart(
            train_stages(chunks, beta, moving=False), optimal_policy(log_S, reward, beta)),
    }
errors = pd.DataFrame(errors).rename_axis("largest error of a log-probability, nats")
assert errors.max(axis=None) < 1e-6                                        # (3)
errors.map("{:.0e}".format)


# %% [markdown]
# Moving is $\beta/T$, fixed is $\beta$, on the same chunks. Why does the fixed one stand still after its first stage? Because it fits what is *left*, as boosting does, and nothing is left. The moving one begins each stage as if nothing had been learned: every pair has the weight one half again. So how large is the gradient when stage 2 begins, compared with stage 1?

# %%
def gradient(theta, theta_ref, weights):
    theta = theta.clone().requires_grad_()
    loss = population_loss(policy(theta), policy(theta_ref), weights, beta)
    return torch.autograd.grad(loss, theta)[0].norm().item()

zero = torch.zeros(FEATURES, dtype=torch.float64)
first, second = own_prompts(wins, 2)
after = train_stage(zero, zero, first, beta)
seen = {
    "stage 1": gradient(zero, zero, first),
    "stage 2, moving reference": gradient(after, after, second),
    "stage 2, fixed reference": gradient(after, zero, second),
}
assert seen["stage 2, fixed reference"] < 1e-6
assert seen["stage 2, moving reference"] > 0.5 * seen["stage 1"]
pd.Series(seen, name="size of the gradient at the start").map("{:.1g}".format).to_frame()

# %% [markdown]
# ### When stages find different rewards
#
# The condition is about the reward, not about prompts. Let the first half of the prompts differ only in features 1 to 3, and the other half only in features 4 and 5. Each stage then finds a part of the reward that the other cannot see. Is it still $\beta/2$?

# %%
all_phi, all_reward = phi, reward
visible = torch.zeros(PROMPTS, 1, FEATURES, dtype=torch.float64)
visible[0::2, :, :3] = 1
visible[1::2, :, 3:] = 1
phi = all_phi * visible
reward = phi @ w
part_wins = bradley_terry(reward, 1.)
theta = train_stages(own_prompts(part_wins, 2), beta)
found = {
    "one stage at beta": apart(theta, optimal_policy(log_S, reward, beta)),
    "one stage at beta/2": apart(theta, optimal_policy(log_S, reward, beta / 2)),
}
phi, reward = all_phi, all_reward
assert found["one stage at beta"] < 1e-6
assert found["one stage at beta/2"] > 0.1
pd.Series(found, name="largest distance, nats").map("{:.0e}".format).to_frame()

# %% [markdown]
# No: two stages that share nothing are one stage at $\beta$. That is the table of [smaller beta](smaller_beta.ipynb), in which no prompt says anything about another.
#
# ## Few labels: every reward is too large
#
# Real labels are counted, not known. Let a chunk have $n$ comparisons, each drawn once. Then $\hat w$ is an estimate. Two things are known of it in the long run. It scatters, by about $1/\sqrt n$. And its mean is off by about $1/n$:
#
# $$\mathbb E\, \hat w = w + \frac{b}{n} + \dots \tag{4}$$
#
# (The general form is by Cox and Snell, *A general definition of residuals*, 1968; for logistic regression see Firth, *Bias reduction of maximum likelihood estimates*, 1993.) Which way does $b$ point? Let $p$ be the probability of a label under $w$, $A = \mathbb E\, p(1-p)\, \Delta\phi\, \Delta\phi^\top$ and $h = p(1-p)\, \Delta\phi^\top A^{-1} \Delta\phi$. Then $b = A^{-1}\, \mathbb E\, h\, (p - \frac12)\, \Delta\phi$, and so
#
# $$w \cdot A\, b = \mathbb E\, h\, \left(p - \tfrac12\right) (w \cdot \Delta\phi) \ge 0. \tag{5}$$
#
# Term by term: $p$ is above one half exactly where $w \cdot \Delta\phi$ is above zero. So in the measure of $A$, and to this order, the mean fit is *too long*. In words: from few labels a model finds clean splits that are luck, and believes them.
#
# From very few hard labels the fit can even be infinite, where some direction separates them all. So from here on we smooth labels by 5 %, as one does in practice. Then an optimum always exists. Smoothing changes the reward that is found from infinitely many labels, but alike for every stage.
#
# Now many worlds at once. `fit` is Newton's method for (1), in all worlds together.

# %%
SMOOTHING = 0.05
def sigmoid(z): return 1 / (1 + np.exp(-z))

def mean_product(weight, X):
    "Mean of weight * X X^T over the comparisons of each world: (worlds, features, features)."
    return np.swapaxes(X * weight[..., None], 1, 2) @ X / X.shape[1]

def fit(X, labels, smoothing=SMOOTHING):
    "The minimum of (1) in each world. X: (worlds, n, features); labels: (worlds, n), 1 where the first won."
    target = smoothing + (1 - 2 * smoothing) * labels
    def loss(u):
        z = np.einsum("bnd,bd->bn", X, u)
        return (np.logaddexp(0, z) - target * z).mean(1)

    u = np.zeros((len(X), X.shape[2]))
    for _ in range(50):
        p = sigmoid(np.einsum("bnd,bd->bn", X, u))
        slope = np.einsum("bnd,bn->bd", X, p - target) / X.shape[1]
        if abs(slope).max() < 1e-9: return u
        curve = mean_product(p * (1 - p), X)
        step = np.linalg.solve(curve + 1e-10 * np.eye(X.shape[2]), slope[..., None])[..., 0]
        length, before = np.ones((len(X), 1)), loss(u)
        for _ in range(20):                             # halve the step where it goes too far
            worse = loss(u - length * step) > before + 1e-14
            if not worse.any(): break
            length[worse] /= 2
        u = u - length * step
    raise ValueError(f"fit: slope {abs(slope).max():.0e} after 50 steps")


# %% [markdown]
# Does it find the optimum of the DPO loss? The one world from above, with infinitely many labels, smoothed: Newton's reward over $\beta$ must be where L-BFGS ends.

# %%
i, j = np.triu_indices(RESPONSES, 1)
X = pair_features[:, i, j].reshape(1, -1, FEATURES).numpy()
u = fit(X, wins[:, i, j].reshape(1, -1).numpy())

smoothed = (1 - 2 * SMOOTHING) * wins + SMOOTHING * (wins + wins.mT)
theta = train_stages([smoothed], beta)
assert_close(torch.tensor(u[0]) / beta, theta, atol=1e-6, rtol=0)
pd.DataFrame({"true w": w.numpy(), "found from smoothed labels": u[0]}).round(3).T

# %% [markdown]
# Smoothing makes the reward shorter. Every stage finds this same shorter one. So what counts below is the comparison with one stage on all pairs, which is smoothed, too.
#
# ### Are (4) and (5) right?
#
# Four hundred worlds for each number of comparisons per prompt. Each world has features, a true reward and labels of its own.

# %%
PER_PROMPT = (6, 12, 24, 48, 192)       # comparisons; twelve prompts, so 72 to 2,304 pairs in all

def draw_worlds(per_prompt, worlds=400, seed=0):
    "Features, log S, true reward, differences of features of drawn pairs, labels."
    rng = np.random.default_rng([seed, per_prompt])
    phi = rng.normal(size=(worlds, PROMPTS, RESPONSES, FEATURES))
    w = rng.normal(size=(worlds, FEATURES))
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    scores = rng.normal(size=(worlds, PROMPTS, RESPONSES))
    log_S = scores - np.log(np.exp(scores).sum(-1, keepdims=True))

    shape = (worlds, PROMPTS, per_prompt)
    one = rng.integers(RESPONSES, size=shape)
    other = (one + rng.integers(1, RESPONSES, size=shape)) % RESPONSES
    world, prompt = np.arange(worlds)[:, None, None], np.arange(PROMPTS)[None, :, None]
    X = phi[world, prompt, one] - phi[world, prompt, other]
    labels = rng.random(shape) < sigmoid(np.einsum("bpnd,bd->bpn", X, w))
    return phi, log_S, w, X, labels.astype(float)

drawn = {per_prompt: draw_worlds(per_prompt) for per_prompt in PER_PROMPT}


# %% [markdown]
# The mean error $b/n$ can be computed from the features and the true reward, without drawing a label. With smoothing (5) gets a second term, because smoothed labels are not exactly those of a logistic model. `first_order` has both.

# %%
def every_comparison(phi, w):
    "Differences of features and chance of winning, for every pair of responses of every prompt."
    i, j = np.triu_indices(RESPONSES, 1)
    X = (phi[:, :, i] - phi[:, :, j]).reshape(len(phi), -1, FEATURES)
    return X, sigmoid(np.einsum("bnd,bd->bn", X, w))

def first_order(phi, w, smoothing=SMOOTHING):
    "The reward u that infinitely many labels give, and n times the mean error of a fit to n of them."
    X, chance = every_comparison(phi, w)
    u = fit(X, chance, smoothing)
    p = sigmoid(np.einsum("bnd,bd->bn", X, u))
    target = smoothing + (1 - 2 * smoothing) * chance
    square = chance * (1 - smoothing - p) ** 2 + (1 - chance) * (smoothing - p) ** 2

    inverse = np.linalg.inv(mean_product(p * (1 - p), X))
    scatter = inverse @ mean_product(square, X) @ inverse       # n times the covariance of a fit
    def size(middle): return (X @ middle * X).sum(-1)           # of each comparison, as measured by a matrix
    pull = p * (1 - p) * ((p - 0.5) * size(scatter) - (target - p) * size(inverse))
    bias = inverse @ (X * pull[..., None]).mean(1)[..., None]
    return u, bias[..., 0]


# %% [markdown]
# First (5), in every world:

# %%
def along(a, b): return (a * b).sum(1)

def true_curve(phi, w):
    "A of each world."
    X, p = every_comparison(phi, w)
    return mean_product(p * (1 - p), X)

phi_, _, w_, _, _ = drawn[192]
u, bias = first_order(phi_, w_, smoothing=0.)
assert abs(u - w_).max() < 1e-6
assert (along(w_, (true_curve(phi_, w_) @ bias[..., None])[..., 0]) > 0).all()         # (5)
f"longer in {len(w_)} of {len(w_)} worlds"

# %% [markdown]
# Then (4), with hard labels, along $w$: how much too long are fits to $n$ drawn labels, times $n$? By (4) that tends to $w \cdot b$, whatever $n$ is. The scatter would hide it. Its largest part is $A^{-1}$ times the mean of $(\text{label} - p)\, \Delta\phi$, which is zero on average, so we take it off.

# %%
too_long = {}
for per_prompt in (24, 48, 192):
    phi_, _, w_, X, labels = drawn[per_prompt]
    n = PROMPTS * per_prompt
    X, labels = X.reshape(len(X), n, FEATURES), labels.reshape(len(X), n)
    surprise = labels - sigmoid(np.einsum("bnd,bd->bn", X, w_))
    mean_surprise = (X * surprise[..., None]).mean(1)[..., None]
    scatter = np.linalg.solve(true_curve(phi_, w_), mean_surprise)[..., 0]
    measured = interval(n * along(fit(X, labels, smoothing=0.) - w_ - scatter, w_))
    computed = along(first_order(phi_, w_, smoothing=0.)[1], w_).mean()
    too_long[n] = {"measured": as_text(measured, ".1f"), "w · b": round(computed, 1)}
assert measured[1] < computed < measured[2]                                # (4), at the largest n
assert measured[1] > 0
pd.DataFrame(too_long).T.rename_axis("n").rename_axis("n times what is too long", axis=1)


# %% [markdown]
# ## T stages inherit it
#
# Take $T$ stages at $T\beta$ and compare them with one stage at $\beta$: by (3) they should be equal. By (2) the stages end at the *mean* of $T$ rewards over $\beta$, each from $n = N/T$ of the $N$ pairs. A mean of $T$ independent fits scatters as little as one fit to all pairs. But it is off by as much as each of them. With (4),
#
# $$\frac{|\theta_{\text{stages}}|}{|\theta_{\text{one}}|} - 1 \;\approx\; \frac{w \cdot b}{|w|^2}\left(\frac1n - \frac1N\right) = \left(1 - \frac1T\right) \frac{c}{n} = (T - 1)\, \frac{c}{N}, \qquad c = \frac{w \cdot b}{|w|^2}. \tag{6}$$
#
# This is the law of this page. At a fixed total $N$ the overshoot grows like $T - 1$. At fixed pairs per stage $n$ it stays below $c/n$, however many stages there are. And it vanishes with $n$.
#
# To test it, every world is cut into 1, 2, 3 and 6 chunks of prompts.

# %%
def mean_reward(X, labels, T, smoothing=SMOOTHING):
    "The mean of the rewards that T stages find, each from every T-th prompt: (worlds, features)."
    found = []
    for t in range(T):
        rows, won = X[:, t::T], labels[:, t::T]
        found.append(fit(rows.reshape(len(X), -1, FEATURES), won.reshape(len(X), -1), smoothing))
    return np.mean(found, axis=0)


# %%
rewards = {}                            # (per prompt, T) -> (worlds, features)
for per_prompt, (_, _, _, X, labels) in drawn.items():
    for T in COUNTS: rewards[per_prompt, T] = mean_reward(X, labels, T)

def length(u): return np.linalg.norm(u, axis=1)

overshoot = []
for (per_prompt, T), u in rewards.items():
    if T == 1: continue
    ratio = length(u) / length(rewards[per_prompt, 1])
    mean, low, high = interval(ratio - 1)
    pairs = PROMPTS * per_prompt
    overshoot.append(dict(per_prompt=per_prompt, T=T, pairs=pairs, n=pairs // T, mean=mean, low=low, high=high))
overshoot = pd.DataFrame(overshoot)

# %%
shown = overshoot.assign(text=[as_text(row, "+.3f") for row in overshoot[["mean", "low", "high"]].to_numpy()])
shown = shown.pivot(index=["per_prompt", "pairs"], columns="T", values="text")
assert (overshoot["low"] > 0).all()
shown.rename_axis(index=["comparisons per prompt", "in all"], columns="overshoot, T =")

# %% [markdown]
# Every interval is above zero. From left to right, more stages on the same pairs go farther beyond $\beta/T$. From top to bottom, more labels take it away.
#
# Is it (6)? The constant $c$ need not be fitted, since `first_order` computes $b$.

# %%
constants = {}
for smoothing in (0., SMOOTHING):
    phi_, _, w_, _, _ = drawn[192]
    u, bias = first_order(phi_, w_, smoothing)
    constants[smoothing] = np.mean(along(u, bias) / along(u, u))
c = constants[SMOOTHING]
assert c > 0
pd.Series(constants, name="c, in pairs").round(1).rename_axis("smoothing").to_frame()

# %% [markdown]
# So two stages of $n$ pairs overshoot by about half of $c/n$. Before you look at the picture: on the left, each number of stages has a curve. On the right, each overshoot is divided by $1 - 1/T$. What should the three curves do there, if (6) holds?

# %%
fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.9), sharex=True, sharey=True, constrained_layout=True)
n = np.array([10, 1400])
for T, rows in overshoot.groupby("T"):
    for ax, by in zip(axes, (1, 1 - 1 / T)):
        color = f"C{COUNTS.index(T) - 1}"
        middle = rows["mean"] / by
        ax.fill_between(rows["n"], rows["low"] / by, rows["high"] / by, color=color, alpha=0.25, lw=0)
        ax.plot(rows["n"], middle, "o-", color=color, ms=5)
        if by == 1: ax.annotate(f"T = {T}", (rows["n"].iloc[-1], middle.iloc[-1]), xytext=(7, -3),
                                textcoords="offset points", color=color)
axes[1].plot(n, c / n, color="black", ls="--", lw=1.2)
axes[1].annotate("c / n, computed\nwithout a label", (15, 0.035))
axes[0].set_ylabel("overshoot over one stage at β/T\ntoo far →")
axes[0].set_title("as measured", fontsize="medium")
axes[1].set_title("divided by 1 - 1/T: one curve", fontsize="medium")
ticks = {0.003: "0.3 %", 0.01: "1 %", 0.03: "3 %", 0.1: "10 %", 0.3: "30 %", 1: "100 %"}
for ax in axes:
    ax.set(xscale="log", yscale="log", xlabel="pairs per stage", xlim=(10, 2200))
    ax.set_yticks(list(ticks), list(ticks.values()))
    ax.set_xticks([12, 48, 192, 1152], ["12", "48", "192", "1,152"])
    ax.minorticks_off()
sns.despine(fig)

# %% [markdown]
# *To see:* three curves become one, and it nears $c/n$, to which nothing was fitted. Below some fifty pairs per stage it bends upward; there the dots of (4) count. So what matters is how many pairs a stage has. The number of stages enters by $1 - 1/T$ alone.

# %% [markdown]
# How near is it in numbers? One thing has to be taken off first. The chunks have different prompts, and from *smoothed* labels different prompts give slightly different rewards, even when labels never end. (Without smoothing they do not: that is (3), and checked here in 400 worlds.)

# %%
phi_, _, w_, _, _ = drawn[192]
X, chance = every_comparison(phi_, w_)
X, chance = X.reshape(len(X), PROMPTS, -1, FEATURES), chance.reshape(len(X), PROMPTS, -1)
rest = {}
for T in COUNTS[1:]:
    hard = mean_reward(X, chance, T, smoothing=0.)
    assert abs(hard - w_).max() < 1e-6                                      # (3)
    ratio = length(mean_reward(X, chance, T)) / length(mean_reward(X, chance, 1))
    rest[T] = ratio.mean() - 1
assert max(rest.values()) < 0.003
rest_shown = pd.Series(rest, name="overshoot, infinitely many smoothed labels").map("{:+.4f}".format)
rest_shown.rename_axis("T").to_frame().T

# %%
overshoot["law"] = (1 - 1 / overshoot["T"]) * c / overshoot["n"]
overshoot["over"] = (overshoot["mean"] - overshoot["T"].map(rest)) / overshoot["law"]
enough = overshoot[overshoot["n"] >= 90]
few = overshoot[overshoot["n"] <= 24]
assert enough["over"].between(0.75, 1.4).all()
assert (few["over"] > 1.5).all()
table = overshoot.pivot(index="n", columns="T", values="over").round(2).astype(object)
table.where(table.notna(), "").rename_axis(index="pairs per stage", columns="measured, in units of (6); T =")

# %% [markdown]
# From a hundred pairs on, (6) is right to about a quarter. With twelve or twenty-four pairs per stage the overshoot is larger than first order says, more than twice (6) at twelve.

# %% [markdown]
# ### Is it only the distance?
#
# Stages go too far. Do they also go in a worse *direction*? So we compare twice. First as they are. Then at equal KL: the reward of one stage is stretched until its policy is as far from S as the stages are. (Here $\beta = 0.5$ for one stage, and $T/2$ for $T$ stages.)

# %%
ONE_BETA = 0.5

def kl_and_reward(phi, log_S, w, u):
    "Mean KL from S and true reward of S exp(u phi / ONE_BETA), in each world."
    tilt = np.einsum("bprd,bd->bpr", phi, u) / ONE_BETA
    log_pi = log_S + tilt
    log_pi -= np.log(np.exp(log_pi).sum(-1, keepdims=True))
    pi = np.exp(log_pi)
    kl = (pi * (log_pi - log_S)).sum(-1).mean(-1)
    reward = (pi * np.einsum("bprd,bd->bpr", phi, w)).sum(-1).mean(-1)
    return kl, reward

def stretched(phi, log_S, w, u, kl):
    "The reward of `u`, stretched to a policy at this KL; by bisection."
    low, high = np.zeros(len(u)), np.full(len(u), 20.)
    for _ in range(40):
        middle = (low + high) / 2
        too_far = kl_and_reward(phi, log_S, w, middle[:, None] * u)[0] > kl
        low, high = np.where(too_far, low, middle), np.where(too_far, middle, high)
    return kl_and_reward(phi, log_S, w, middle[:, None] * u)[1]

prices, lost = {}, []
for per_prompt in (6, 12, 48):
    phi_, log_S_, w_, _, _ = drawn[per_prompt]
    one_kl, one_reward = kl_and_reward(phi_, log_S_, w_, rewards[per_prompt, 1])
    for T in COUNTS[1:]:
        kl, got = kl_and_reward(phi_, log_S_, w_, rewards[per_prompt, T])
        same_kl = stretched(phi_, log_S_, w_, rewards[per_prompt, 1], kl)
        lost.append(interval(got - same_kl))
        prices[per_prompt, T] = {
            "KL, one stage": f"{one_kl.mean():.2f}",
            "KL, minus one stage": as_text(interval(kl - one_kl), "+.3f"),
            "reward, one stage": f"{one_reward.mean():.2f}",
            "reward, minus one stage": as_text(interval(got - one_reward), "+.3f"),
            "at the same KL": as_text(lost[-1], "+.3f"),
        }
assert max(high for mean, low, high in lost) < 0
pd.DataFrame(prices).T.rename_axis(["comparisons per prompt", "T"])

# %% [markdown]
# As they are, the stages have *more* reward here: in these worlds farther is better. At the same KL they have less, in every row. So part of the price is direction. It is small where a stage has dozens of pairs or more, and large where it has twelve.
#
# In one sentence: *if a model can express the reward, sDPO at $T\beta$ is DPO at $\beta$, estimated from $T$ times less data per stage; at the same KL it loses, and the loss vanishes with data.*
#
# ## What this does not show
#
# - **That a language model obeys the law.** Its stages stop early, and a network need not add up rewards. The [test](finite_data_tested.ipynb) says: not where its pairs are passed so often that it knows them by heart.
# - **What happens when the model cannot express the reward.** Then even with infinite labels each chunk has a best fit of its own, and the order of chunks can matter ([DPO is misspecified](https://arxiv.org/abs/2510.20413)).
# - **The constant for another model.** Here $c$ is about five pairs, with five features. The mean of $h$ in (5) is the number of features, so with more of them expect more.
# - **Fewer pairs than features.** There (6) says nothing.
#
# ## What you now have
#
# - Equation (2): a moving reference adds $T$ rewards, a fixed one fits what is left.
# - The condition under which $T$ stages at $\beta$ are one at $\beta/T$: every stage finds the same reward. Prompts need not be shared.
# - Equation (6), the price of few pairs per stage, with a constant that was computed and not fitted.
#
# Next: [do the tiny worlds obey it](finite_data_tested.ipynb)?
#
# ## Questions to test yourself
#
# 1. A mean of $T$ fits has less scatter than each of them. Why does it not help against the overshoot?
#
#    <details><summary>Answer</summary>
#
#    All of them are too long in the same way. A mean takes away errors that point in different directions, not one that all share.
#
#    </details>
# 2. You have 1,000 pairs and double the number of stages from 10 to 20. By (6), what happens to the overshoot? And if you double the pairs as well?
#
#    <details><summary>Answer</summary>
#
#    It goes from $9c/N$ to $19c/N$, about twice as much. With twice the pairs as well it stays at 100 pairs per stage: from $0.9\,c/100$ to $0.95\,c/100$, nearly the same.
#
#    </details>
# 3. Where does (3) need that the chunks' $\Delta\phi$ point in all directions?
#
#    <details><summary>Answer</summary>
#
#    Otherwise (1) does not change along some direction, the chunk says nothing about the reward there, and $\hat w_t$ is not $w$. The two halves that shared no feature were such chunks.
#
#    </details>
#
# ## Try this
#
# - Set `SMOOTHING = 0.2` and run from `fit` on. What happens to $c$ and to the overshoot?
#
#   <details><summary>What you should see</summary>
#
#   $c$ falls to 1.8, and with six or twelve comparisons per prompt the overshoot falls to less than half: labels that are hardly believed are hardly believed too much. In the last row it is no smaller, because there most of it is what different prompts make of smoothed labels. (Some assertions object; they are about 5 %.)
#
#   </details>
# - In `train_stages`, give the second of two stages on own prompts three times the first one's $\beta$. Which single stage are they?
#
#   <details><summary>What you should see</summary>
#
#   With infinitely many labels one stage at $\frac34 \beta$: by (2) they add up to $w/\beta + w/(3\beta)$.
#
#   </details>
