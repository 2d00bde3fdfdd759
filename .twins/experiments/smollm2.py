# %% [markdown]
# # The paper's first experiment, on a real model
# > Stepwise against plain DPO on SmolLM2-135M-Instruct, in draws: what is asked, with which margins, fixed before there is an answer.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/smollm2.ipynb)
#
# **A smaller version has been run, and cannot decide; the large one waits for a graphics card.** In three draws, at one setting, sDPO minus DPO is -0.006 [-0.032, +0.019] nats a pair, Orca first minus a random split +0.002 [-0.020, +0.024], a moving minus a fixed reference -0.008 [-0.020, +0.004]. Three draws can show no difference, and after Holm's correction none of these is equal (the third interval alone lies within the margin). Nearly all of the gain is on Orca: on UltraFeedback no arm knows more than S. Questions, margins, arms and the rule of the search were committed before any run of the designs, after a pilot of one seed (commit `198a5e2`; the smaller version in `48ef080`; that *different* needs the interval, too, in `739b16e`).
#
# **You should know** [stepwise DPO](../14_stepwise.ipynb) and the [protocol](protocol.ipynb) of the tiny worlds. **Time** 35 minutes to read, a few seconds to run.
#
# Table 3 of the paper compares stepwise DPO with plain DPO and with a random split, on a model of 10.7 billion parameters, once each, without error bars. Here the same arms are compared, with a model of 135 million parameters and real pairs of the same two families of data. The outcome is another one: how well unseen pairs are told apart, not benchmarks. Eight draws are planned, and three of a smaller version, to say how sure we are.
#
# <details><summary>Words used on this page</summary>
#
# - **S** is the model before alignment, SmolLM2-135M-Instruct. **DPO** trains it on all pairs at once. **Stepwise DPO** (sDPO) trains in *stages*, one for each *chunk* of the pairs; the model of the stage before is where a stage starts, and its *reference*, the model that it is held near.
# - **$\gamma$** of a pair is how much more likely, in nats (natural logarithms), a model finds the chosen response than the rejected one. $\gamma_\theta - \gamma_S$ is what training has added to it.
# - **Easy** is a source where S often finds the chosen response the likelier one; by the sum over tokens that is Orca, per token it is [the other way round](which_is_easy.ipynb).
# - **$\beta$** says how hard a model is held at its reference; **lr** is the learning rate.
# - **Orca**: 361 pairs, instructions with a system message; the chosen response is that of a stronger model. **UltraFeedback** (UF): 1,193 pairs of many kinds, labelled by GPT-4. **HH**: 1,150 pairs of HH-RLHF harmless dialogue, labelled by people; nobody trains on them here.
#
# </details>

# %%
#| default_exp smollm2

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
import itertools, math

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar

from sdpo_nb.compare import equality_test, sign_flip_p_value, verdict, with_holm
from sdpo_nb.evaluate import stability

# %% [markdown]
# ## The arms
#
# An *arm* is one way to train. It is a list of stages, and a stage says three things: which pairs it trains on, where it starts, and what its reference is. `before` is the model that the stage before has left.
#
# Two arms come from elsewhere. *Pre-DPO* ([2504.15843](https://arxiv.org/abs/2504.15843)) trains twice on the same pairs: the second time it starts from S again, with the aligned model as its reference. *TR-DPO* ([2404.09656](https://arxiv.org/abs/2404.09656)) is one pass in which the reference is replaced by the model itself every few steps. We replace it every 8 steps, which is about as long as the first stage of sDPO is. All arms see every pair once, but for Pre-DPO, which sees it twice.

# %%
#| export
ARMS = { # name -> stages: (pairs, start, reference)
    "S": [],
    "SFT on chosen": [("all", "S", "none")],
    "DPO": [("all", "S", "S")],
    "DPO at beta/2": [("all", "S", "S")],
    "sDPO": [("orca", "S", "S"), ("uf", "before", "before")],
    "sDPO, random": [("random 1", "S", "S"), ("random 2", "before", "before")],
    "sDPO, hard first": [("uf", "S", "S"), ("orca", "before", "before")],
    "sDPO, fixed reference": [("orca", "S", "S"), ("uf", "before", "S")],
    "sDPO, target S": [("orca", "S", "S"), ("uf", "S", "before")],
    "sDPO at DPO's settings": [("orca", "S", "S"), ("uf", "before", "before")],
    "Pre-DPO": [("all", "S", "S"), ("all", "S", "before")],
    "TR-DPO": [("all", "S", "every 8 steps")],
}


# %%
def in_words(stages):
    return " → ".join(f"{pairs} (from {start}, against {reference})" for pairs, start, reference in stages)

for arm, stages in ARMS.items(): print(f"{arm:24}{in_words(stages)}")

# %% [markdown]
# The two chunks of the random split have the sizes of Orca and UltraFeedback. `none` stands for no reference at all: fine-tuning.
#
# ## The unit is a draw
#
# If the paper's experiment were repeated, other pairs would have been collected, and they would have come in another order. We can repeat only a part of this. Our unit is a *draw*: 80 % of one pool of pairs, chosen by a hash, and a seed for the order. All arms of a draw share both; the order itself depends on the chunks, too. Draws of one pool are more alike than new data would be, so our intervals are about this pool, and are too narrow for another.
#
# There are eight draws. Eight is the smallest number that can answer four questions: if all eight differences have one sign, the exact p-value is $2/2^8 = 0.008$, and Holm's correction for four questions multiplies the smallest by 4.
#
# There is one S. What another base model would do is in no interval.
#
# Every pair has one role, for good, by a hash of its prompt:
#
# - *held out*: 60 pairs of Orca, and the 199 pairs of UltraFeedback whose makers held them out;
# - *validation*: a tenth of the others; no draw trains on them;
# - *pool*: the rest. A draw trains on 80 % of it. The other fifth is *left out* of this draw, and measured in it;
# - *transfer*: 200 pairs of HH.

# %%
#| export
DRAWS = range(8)
SEARCH_DRAW = 100                          # its pairs and order are used by the search, and reported nowhere
DRAWN = 0.8                                # share of the pool that a draw trains on
VALIDATION = 0.1                           # share of the pairs that are not held out
HELD_OUT = dict(orca=60, uf=199, hh=200)   # pairs; those of uf are given by the data
LONGEST = 512                              # tokens of prompt and response; of the prompt 256

# %%
p = 2 / 2 ** len(DRAWS)
assert 4 * p < 0.05
assert 4 * 2 / 2 ** 7 > 0.05            # seven draws could not answer
print(f"smallest p-value {p:.4f}, after Holm {4 * p:.3f}")

# %% [markdown]
# ## The search
#
# Every arm is searched on the same grid, in one draw that is reported nowhere, and gets the settings with the smallest log-loss on the validation pairs. (One temperature is fitted on one half of these pairs and applied to the other half, both ways.) On a tie the first of the grid is taken. The grid is not extended where the best lies on its edge; the page will say where it does. (Of two learning rates each is an edge.)
#
# Three arms are not searched. *DPO at beta/2* has half of the $\beta$ of sDPO and its learning rate, since that is the model which theory expects two stages to be ([smaller beta](smaller_beta.ipynb)). *sDPO at DPO's settings* is the paper's way to compare: one setting for both. S has no settings. Fine-tuning has no $\beta$.
#
# Everything else is the paper's: one pass, batches of 32 pairs, a linear schedule with 10 % warm-up in each stage, AdamW without weight decay.

# %%
#| export
BETAS = (0.03, 0.1, 0.3, 1.0)
LEARNING_RATES = (2e-6, 1e-5)
BORROWED = { # arm -> the arm whose settings it takes, and the factor of beta
    "DPO at beta/2": ("sDPO", 1 / 2),
    "sDPO at DPO's settings": ("DPO", 1),
}
SEARCHED = [arm for arm in ARMS if arm != "S" and arm not in BORROWED]

def grid_of(
    arm: str,     # of SEARCHED
) -> list[dict]:  # settings, in the order of the search
    "The settings that are tried for an arm."
    if arm == "SFT on chosen": return [dict(lr=lr) for lr in LEARNING_RATES]
    return [dict(beta=beta, lr=lr) for beta, lr in itertools.product(BETAS, LEARNING_RATES)]

def on_the_edge(
    settings: dict, # that were chosen
    grid: list,     # settings that were tried
) -> str:           # names
    "Which of the chosen settings are the smallest or the largest of their grid."
    tried = {name: [others[name] for others in grid] for name in settings}
    return ", ".join(name for name, value in settings.items() if value in (min(tried[name]), max(tried[name])))


# %%
assert on_the_edge(dict(beta=0.03, lr=1e-5), grid_of("DPO")) == "beta, lr"
assert on_the_edge(dict(beta=0.3, lr=1e-5), grid_of("DPO")) == "lr"
runs = sum(len(grid_of(arm)) for arm in SEARCHED)
main = len(ARMS) * len(DRAWS)
print(f"{len(SEARCHED)} arms are searched: {runs} runs; then {len(ARMS)} arms in {len(DRAWS)} draws: {main} rows")

# %% [markdown]
# ## Four questions
#
# Only these four are *primary*: their p-values are corrected together, by Holm. Everything else on the page of answers is exploratory.

# %%
#| export
PRIMARY = pd.DataFrame([
    ("stepwise against plain", "sDPO", "DPO"),
    ("easy first against random split", "sDPO", "sDPO, random"),
    ("moving against fixed reference", "sDPO", "sDPO, fixed reference"),
    ("stepwise at beta against plain at beta/2", "sDPO", "DPO at beta/2"),
], columns=["question", "a", "b"])

# %%
PRIMARY.set_index("question")

# %% [markdown]
# The *outcome* is how well a model knows which response of a pair was chosen, for pairs that it has not seen: those held out and those left out of the draw, of Orca and UltraFeedback together. A model says it by $c\,(\gamma_\theta - \gamma_S)$: the probability that it gives to the chosen response is
#
# $$p = \sigma\big(c\,(\gamma_\theta - \gamma_S)\big), \tag{1}$$
#
# with one number $c \ge 0$ for each model. The log-loss is the mean of $-\log p$. S itself has $\log 2$, as it has added nothing. So the *gain* of a model is $\log 2$ minus its log-loss, in nats a pair: more is better. Below zero a model is surer than it should be, which is worse than saying nothing. Log-loss is the primary outcome, as it is less noisy than a count of signs. The *accuracy*, the share of pairs with $\gamma_\theta > \gamma_S$, stands beside it.
#
# Where does $c$ come from? The pairs are cut in two halves, by their number, and each half gets the $c$ that fits the other half best (*cross-fitted*). First $c$ was to come from the validation pairs alone. In the smaller version these are 49, and a referee who had seen one draw of it found that their luck can change a difference by 0.01 to 0.016, with one sign in all draws. So the large design, of which no row exists, uses the new $c$. The smaller version keeps the old one, which it had begun with, and shows the new one beside it. The validation pairs are in neither outcome: the search has chosen settings by them, so a searched arm would look better on them than it is. (The cross-fitted gain had them at first. They were taken out for this reason, before the large design had a row.)
#
# One $c$ removes a factor that all pairs share. If an arm is too sure on one source and not sure enough on another, it pays for that. A model that went farther from S pays nothing: the gain does not know the KL.
#
# Differences are paired, by draw and by pair. Their intervals know about draws and test pairs: the same held-out pairs are measured in every draw, so more draws do not make them more. They do not know how $c$ was found.
#
# ## What is too small to count
#
# A margin needs a reason. In a pilot on one GPU a DPO model had $\gamma_\theta > \gamma_S$ in 0.95 of the held-out pairs of Orca and in 0.62 of UltraFeedback. If all pairs of a source were equally sure, and each source had its own $c$, what would DPO gain? And how much more would stepwise DPO gain, if it were as far ahead as in the paper, where table 3 has +1.64 on top of +3.16?

# %%
#| export
MARGINS = { # of an outcome: what is too small to count
    "gain": 0.02,               # nats a pair; c from the validation pairs
    "cross-fitted gain": 0.02,  # nats a pair; c from the other half of the pairs
    "accuracy": 0.03,           # share of pairs
}

# %%
train = np.array([301, 994])                            # pairs of Orca and UltraFeedback
weights = train / train.sum()
pilot = np.array([0.95, 0.62])
entropy = -pilot * np.log(pilot) - (1 - pilot) * np.log(1 - pilot)

of_dpo = {"gain": weights @ (math.log(2) - entropy), "accuracy": weights @ pilot - 0.5}
ahead = 1.64 / 3.16
of_sdpo = {outcome: ahead * gained for outcome, gained in of_dpo.items()}
expected = pd.DataFrame({"DPO over S": of_dpo, "sDPO over DPO, as in the paper": of_sdpo})
expected["margin"] = MARGINS
for outcome in of_dpo:
    assert expected.loc[outcome, "DPO over S"] > 4 * MARGINS[outcome]
    assert expected.loc[outcome, "sDPO over DPO, as in the paper"] > 3 * MARGINS[outcome]
expected.round(3)

# %% [markdown]
# So the margins are a seventh of what DPO should gain, and less than a third of what the paper's result would be here, if its ratio carried over from benchmark points to nats. In the smaller version half of the pairs are Orca's, so DPO should gain about 0.26 there, and the margin is a thirteenth of that.
#
# The words are those of the [protocol](protocol.ipynb), with one improvement: *equal* has a p-value, too. Two one-sided tests (TOST) ask whether the difference is above minus the margin and below the margin.
#
# - *different*: the p-value of the exact sign-flip test over draws is below 0.05 after Holm, and the interval leaves out 0;
# - *equal*: the larger p-value of the two one-sided tests is below 0.05 after Holm;
# - both: the difference is there, and small. Neither: we cannot tell.
#
# In the tables *different* is written *better* or *worse* (the first arm against the second), and both together *better, but little*. `p` and `p_equal` are the two p-values, `holm` and `holm_equal` the same after Holm's correction.
#
# **Assay sensitivity.** At 135 million parameters an outcome may be unable to show anything. So an outcome counts only if DPO minus S exceeds twice its margin. If it does not, we say *this outcome cannot tell*, whatever the differences between arms are.
#
# *Secondary*, without correction: accuracy; $\gamma_\theta > 0$ by sum and per token; log-probability of the chosen responses against S; all of it by source; HH, to which a gain may carry over; what stage 2 forgets of Orca; how steady the losses are.

# %% [markdown]
# ## A smaller version, for a processor
#
# The whole design would take two processor cores days. So there is a version that they can run in some hours: the arms of the first three questions, in three draws, with some 400 pairs to train on instead of 930, and up to 384 tokens. It was fixed in commit `48ef080`, before its first row.
#
# - *Pairs*: the first 361 rows of each source, in the order of the file, as many as Orca has. Of each source a fifth (72) is held out: none of these rows of UltraFeedback is among those that its makers held out.
# - *No search*: all arms have $\beta = 0.1$ and a learning rate of $10^{-5}$, which are in the middle of the grid and at its upper end. In the pilot (81 steps, longer pairs) the share of Orca pairs with more $\gamma$ than under S was 0.95 at every rate from $5 \cdot 10^{-6}$ to $5 \cdot 10^{-5}$. One setting for both is the paper's way to compare. In the tiny worlds such a comparison came out at -0.052 at one setting and at +0.041 at another. So what is found here is about this setting, and not about the methods. The control *DPO at beta/2* is missing, too.
# - *Batches* of 16 pairs, so that a run has about as many steps as one of the large design.
# - The same margins, assay and words, with Holm over three questions. The outcome has $c$ from the validation pairs.
#
# *Easy first against random split* also mixes order with pure chunks. Without the arm *hard first*, which is left out here, it cannot speak of order alone.
#
# What can three draws say? Never *different*: their smallest p-value is $2/2^3 = 0.25$. *Equal* only with luck: with two degrees of freedom the interval is 4.3 standard errors to each side, and Holm asks for 5.3 in the first question. *We cannot tell* is what to expect. It is no evidence for equality, and none against it.

# %%
#| export
CPU_ARMS = ("S", "DPO", "sDPO", "sDPO, random", "sDPO, fixed reference")
CPU_SETTINGS = dict(beta=0.1, lr=1e-5, batch_size=16)
CPU_DRAWS = range(3)
CPU_PAIRS = 361         # the first of each source
CPU_LONGEST = 384       # tokens of prompt and response
CPU_PRIMARY = PRIMARY[PRIMARY["b"].isin(CPU_ARMS)]

# %%
assert set(CPU_PRIMARY["a"]) | set(CPU_PRIMARY["b"]) <= set(CPU_ARMS)
CPU_PRIMARY.set_index("question")


# %% [markdown]
# ## From log-probabilities to a gain
#
# A row of results holds what a model says about pairs that it has not seen: two numbers a pair. The row of S has them for all pairs, and says where each pair comes from. All outcomes are computed from these.

# %%
#| export
def added(
    row: dict,        # of a model
    S: dict,          # the row of S, which has all pairs
    stage: int = -1,  # after which stage, from 0; -1: the last
) -> pd.DataFrame:    # a pair a line: number, source, role, delta (nats), chosen (log pi_theta - log pi_S of it)
    "gamma_theta - gamma_S of every pair that the model was asked."
    numbers = np.array(row["pairs"])
    now = pd.DataFrame(row["models"][stage])
    was = pd.DataFrame(S["models"][0]).iloc[numbers].reset_index(drop=True)
    moved = now - was
    return pd.DataFrame(dict(
        number=numbers,
        source=np.array(S["source"])[numbers],
        role=np.array(S["role"])[numbers],
        delta=moved["chosen"] - moved["rejected"],
        chosen=moved["chosen"],
    ))

def log_losses(
    delta,       # (n,) gamma_theta - gamma_S, nats
    c: float,    # temperature of (1), at least 0
) -> np.ndarray: # (n,) nats
    "-log p of the chosen responses, equation (1)."
    return np.logaddexp(0, -c * np.asarray(delta))

def fit_temperature(
    delta,     # (n,) of validation pairs, nats
) -> float:    # c of (1); 0 where the model is wrong in the mean
    "The c with the smallest mean log-loss."
    if np.mean(delta) <= 0: return 0.
    def loss(log_c): return log_losses(delta, math.exp(log_c)).mean()
    found = minimize_scalar(loss, bounds=(-10, 5), method="bounded")
    return math.exp(found.x)

def outcome_of(
    row: dict,                  # of a model
    S: dict,                    # the row of S
    outcome: str,               # of MARGINS
    sources = ("orca", "uf"),   # whose pairs count
    stage: int = -1,            # after which stage, from 0; -1: the last
) -> pd.Series:                 # number of the pair -> value
    "One number for each pair that the model has not seen, without the validation pairs: settings were chosen by them."
    pairs = added(row, S, stage)
    of_sources = pairs[pairs["source"].isin(sources)].set_index("number")
    test = of_sources[of_sources["role"] != "validation"]
    if outcome == "cross-fitted gain": return _cross_fitted(test["delta"])
    if outcome == "accuracy": return 0.5 + 0.5 * np.sign(test["delta"])
    c = fit_temperature(pairs.loc[pairs["role"] == "validation", "delta"])
    return math.log(2) - pd.Series(log_losses(test["delta"], c), test.index)

def _cross_fitted(delta): # by the number of the pair
    odd, gain = delta.index.to_numpy() % 2 == 1, pd.Series(0., delta.index)
    for half in (odd, ~odd): gain[half] = math.log(2) - log_losses(delta[half], fit_temperature(delta[~half]))
    return gain


# %% [markdown]
# An invented model: what it adds is the truth, but in units that are ten times too large. What must the fitted $c$ do, and what is the gain of S itself?

# %%
rng = np.random.default_rng(0)
n = 4000
S = dict(
    pairs=list(range(n)),
    source=["orca"] * n,
    role=["validation"] * (n // 2) + ["pool"] * (n // 2),
    models=[dict(chosen=[0.] * n, rejected=[0.] * n)],
)
def invented_model(delta): return S | dict(models=[dict(chosen=delta.tolist(), rejected=[0.] * n)])

logit = rng.normal(1., 1., n)                             # of the first response being chosen
first_chosen = rng.random(n) < 1 / (1 + np.exp(-logit))
good = invented_model(10 * np.where(first_chosen, logit, -logit))
weak = invented_model(rng.normal(0., 1., n))

c = fit_temperature(good["models"][0]["chosen"])
assert abs(c - 0.1) < 0.02
assert abs(outcome_of(S, S, "gain")).max() == 0            # S has log 2: no gain
for outcome in MARGINS: assert list(outcome_of(good, S, outcome).index) == list(range(n // 2, n))     # no validation pair
means = {outcome: float(outcome_of(good, S, outcome).mean().round(3)) for outcome in MARGINS}
assert abs(means["gain"] - means["cross-fitted gain"]) < 0.02
assert abs(outcome_of(weak, S, "cross-fitted gain").mean()) < 0.01
means | {"c": round(c, 3)}


# %% [markdown]
# The search takes the settings with the smallest log-loss on validation pairs. The temperature of one half is used on the other.

# %%
#| export
def validation_loss(
    row: dict,  # of a run of the search
    S: dict,    # the row of S
) -> float:     # nats a pair
    "Mean log-loss of the validation pairs, each half with the temperature of the other."
    pairs = added(row, S)
    delta = pairs.loc[pairs["role"] == "validation", "delta"].to_numpy()
    halves = delta[0::2], delta[1::2]
    losses = [log_losses(here, fit_temperature(there)) for here, there in (halves, halves[::-1])]
    return float(np.concatenate(losses).mean())

def choose_settings(
    tried: list,  # (arm, settings, loss on validation data), in the order of the search
) -> dict:        # arm -> settings
    "The settings with the smallest loss; on a tie the first."
    best = {}
    for arm, settings, loss in tried:
        if arm not in best or loss < best[arm][0]: best[arm] = loss, settings
    return {arm: settings for arm, (_, settings) in best.items()}


# %%
rows = {0.1: weak, 0.3: good, 1.: good}
chosen = choose_settings([("A", dict(beta=beta), validation_loss(row, S)) for beta, row in rows.items()])
assert chosen == {"A": dict(beta=0.3)}
chosen


# %% [markdown]
# ## Intervals that know draws and pairs
#
# A difference of two arms is a table with a line for each draw and a column for each pair, with holes where a draw has trained on the pair. Other draws would differ, and so would other pairs. Let $e_{dp}$ be an entry minus the mean, and $N$ the number of entries. The entries of a draw share its luck, so they are added before they are squared, and so are those of a pair. What is in both sums is taken away once:
#
# $$\text{SE}^2 = \frac{1}{N^2} \Big( \sum_d \big(\textstyle\sum_p e_{dp}\big)^2 + \sum_p \big(\sum_d e_{dp}\big)^2 - \sum_{dp} e_{dp}^2 \Big). \tag{2}$$
#
# (Clustering in two ways: Cameron, Gelbach and Miller, 2011. The code corrects for the number of draws and pairs, and takes the larger where one of the parts alone is larger.) The interval is Student's, with as many degrees of freedom as there are draws, less one.

# %%
#| export
def difference_array(
    rows_a: dict,              # draw -> row
    rows_b: dict,              # draw -> row of another arm
    S: dict,                   # the row of S
    outcome: str,              # of MARGINS
    sources = ("orca", "uf"),  # whose pairs count
) -> np.ndarray:               # (draws, pairs), NaN where a draw did not measure the pair
    "a minus b, in the draws that both have, pair by pair."
    lines = []
    for draw in sorted(set(rows_a) & set(rows_b)):
        a, b = (outcome_of(rows[draw], S, outcome, sources) for rows in (rows_a, rows_b))
        lines.append((a - b).dropna().rename(draw))
    return pd.concat(lines, axis=1).T.to_numpy()

def crossed(
    values: np.ndarray,   # (draws, pairs), NaN where there is nothing; two draws or more
) -> tuple[float, float]: # mean, standard error
    "The mean, and how much it would vary with other draws and other pairs: equation (2)."
    there = ~np.isnan(values)
    mean = values[there].mean()
    rest = np.where(there, values - mean, 0.)
    draws, pairs = values.shape
    of_draws = (rest.sum(1)**2).sum() * draws / (draws - 1)
    of_pairs = (rest.sum(0)**2).sum() * pairs / (pairs - 1)
    both = of_draws + of_pairs - (rest**2).sum()
    variance = max(both, of_draws, of_pairs) / there.sum()**2
    return float(mean), float(variance**0.5)

def compared(
    values: np.ndarray,  # (draws, pairs), NaN where there is nothing; two draws or more
    margin: float,       # what is too small to count
) -> dict:               # mean, low, high, p (of a difference), p_equal (the larger of two one-sided tests)
    "What is said about one difference."
    mean, error = crossed(values)
    found = equality_test(mean, error, len(values) - 1, margin)
    return found | dict(p=sign_flip_p_value(np.nanmean(values, 1)))


# %% [markdown]
# Do they keep their promises? We invent differences with luck of the draw, luck of the pair, and holes, three hundred times. In how many does the interval hold the true difference? How often is a difference called equal that is as large as the margin, and how often is one called different that is zero?

# %%
def invented(shift, rng, draws=8, fixed=50, others=200):
    of_draw = rng.normal(0, 0.006, (draws, 1))
    of_pair = rng.normal(0, 0.05, fixed + others)
    values = shift + of_draw + of_pair + rng.normal(0, 0.10, (draws, fixed + others))
    trained_on = rng.random((draws, others)) < 0.8
    values[:, fixed:][trained_on] = np.nan
    return values

rng = np.random.default_rng(1)
said = []
for _ in range(300):
    at_margin = compared(invented(0.02, rng), margin=0.02)
    at_zero = compared(invented(0., rng), margin=0.02)
    beyond = not at_zero["low"] <= 0 <= at_zero["high"]
    said.append({
        "the interval holds the truth": at_margin["low"] < 0.02 < at_margin["high"],
        "equal, at the margin": at_margin["p_equal"] < 0.05,
        "different by p alone, at zero": at_zero["p"] < 0.05,
        "different by p and interval, at zero": at_zero["p"] < 0.05 and beyond,
    })
shares = pd.DataFrame(said).mean()
assert shares["the interval holds the truth"] > 0.93
assert shares["equal, at the margin"] < 0.07
assert shares["different by p alone, at zero"] > 0.08
assert shares["different by p and interval, at zero"] < 0.05
shares.map("{:.0%}".format).to_frame("of 300 trials")


# %% [markdown]
# The interval and the test of equality keep theirs, as long as draws are independent of each other. The sign-flip test alone does not: it asks what other draws would show, and all draws share the held-out pairs, whose luck has one sign in all of them. That is why *different* needs the interval, too.
#
# Now all questions at once, with the words that were promised:

# %%
#| export
def answer_questions(
    rows: dict,                 # arm -> draw -> row
    S: dict,                    # the row of S
    asked: pd.DataFrame,        # question, a, b
    outcome: str = "gain",      # of MARGINS
    sources = ("orca", "uf"),   # whose pairs count
) -> pd.DataFrame:              # question, draws, mean, low, high, p, holm, p_equal, holm_equal, word
    "Every question, with p-values that hold for all at once."
    found = []
    for question, a, b in asked[["question", "a", "b"]].itertuples(index=False):
        values = difference_array(rows[a], rows[b], S, outcome, sources)
        found.append(dict(question=question, draws=len(values)) | compared(values, MARGINS[outcome]))
    table = with_holm(pd.DataFrame(found))
    return table.assign(word=table.apply(verdict, axis=1))

def _of_S(row, S): # the row of S, asked only what another row was asked
    said = {side: [S["models"][0][side][i] for i in row["pairs"]] for side in ("chosen", "rejected")}
    return row | dict(models=[said])

def assay(
    rows: dict,                 # arm -> draw -> row
    S: dict,                    # the row of S
    sources = ("orca", "uf"),   # whose pairs count
) -> pd.DataFrame:              # for each outcome: DPO minus S with its interval, what is needed, counts
    "May an outcome be used? Only if DPO minus S exceeds twice its margin."
    start = {draw: _of_S(row, S) for draw, row in rows["DPO"].items()}
    table = {}
    for outcome, margin in MARGINS.items():
        found = compared(difference_array(rows["DPO"], start, S, outcome, sources), margin)
        table[outcome] = {name: found[name] for name in ("mean", "low", "high")}
        table[outcome] |= dict(needed=2 * margin, counts=found["mean"] > 2 * margin)
    return pd.DataFrame(table).T


# %% [markdown]
# On invented rows, three draws of two arms that differ clearly:

# %%
toys = {"DPO": {draw: weak for draw in range(3)}, "sDPO": {draw: good for draw in range(3)}}
asked = pd.DataFrame([
    ("good against weak", "sDPO", "DPO"),
    ("an arm against itself", "sDPO", "sDPO"),
], columns=["question", "a", "b"])
words = answer_questions(toys, S, asked, sources=["orca"])
assert words["word"].tolist() == ["we cannot tell", "equal"]      # three draws: p is 0.25 at best
assert not assay(toys, S, sources=["orca"])["counts"].any()       # the weak one is S with noise
words.round(3)


# %% [markdown]
# ## What stands beside the answers
#
# The secondary outcomes of an arm, as means over its draws. *Forgotten* is the accuracy on Orca after the stage that trained on it, minus that at the end; it exists where other stages come after. *Loss sd* says how far the losses of a stage scatter about their running median ([chapter 08](../08_evaluate.ipynb)).

# %%
#| export
def _absolute(row, S): # test pairs of Orca and UltraFeedback: does the model itself prefer the chosen response?
    numbers = np.array(row["pairs"])
    said = pd.DataFrame(row["models"][-1])
    names = ("source", "role", "chosen_tokens", "rejected_tokens")
    about = pd.DataFrame({name: S[name] for name in names}).iloc[numbers].reset_index(drop=True)
    test = (about["role"] != "validation") & about["source"].isin(["orca", "uf"])
    by_token = said["chosen"] / about["chosen_tokens"] - said["rejected"] / about["rejected_tokens"]
    return (said["chosen"] > said["rejected"])[test].mean(), (by_token > 0)[test].mean()

def _forgotten(row, S): # of Orca, by the stages after it; NaN where there are none
    trained = [stage["chunk"] for stage in row["stages"]]
    if trained[:1] != ["orca"]: return math.nan
    after, at_end = (outcome_of(row, S, "accuracy", ["orca"], stage).mean() for stage in (0, -1))
    return after - at_end

def _beside(row, S):
    pairs = added(row, S)
    test = pairs[(pairs["role"] != "validation") & pairs["source"].isin(["orca", "uf"])]
    by_sum, by_token = _absolute(row, S)
    return {
        "gain, after stage 1": outcome_of(row, S, "gain", stage=0).mean(),
        "gain, Orca": outcome_of(row, S, "gain", ["orca"]).mean(),
        "gain, UF": outcome_of(row, S, "gain", ["uf"]).mean(),
        "accuracy": outcome_of(row, S, "accuracy").mean(),
        "accuracy, HH": outcome_of(row, S, "accuracy", ["hh"]).mean(),
        "prefers chosen": by_sum,
        "per token": by_token,
        "chosen - S (nats)": test["chosen"].mean(),
        "KL of 48 tokens (nats)": np.mean(row.get("kl", math.nan)),
        "forgotten": _forgotten(row, S),
        "loss sd": np.mean([stability(stage["losses"])["sd"] for stage in row["stages"]]),
    }

def secondary_outcomes(
    rows: dict,        # arm -> draw -> row
    S: dict,           # the row of S
) -> pd.DataFrame:     # an arm a line
    "Means over the draws of an arm that measured something, without intervals; of the KL with the number of these draws."
    table = {}
    for arm, by_draw in rows.items():
        lines = pd.DataFrame([_beside(row, S) for row in by_draw.values()])
        if len(lines): table[arm] = dict(lines.mean()) | {"draws with a KL": lines["KL of 48 tokens (nats)"].count()}
    return pd.DataFrame(table).T

def without_words_before_the_end(
    answers: pd.DataFrame, # a question a line
    missing: int,          # planned cells that are not there
) -> pd.DataFrame:
    "While a cell is missing, nothing is concluded: no p-value and no word is shown."
    if missing == 0: return answers
    return answers.drop(columns=["p", "holm", "p_equal", "holm_equal", "word", "says"], errors="ignore")


# %% [markdown]
# ## The answers
#
# They come from files of results, wherever these were made. What is there, of the smaller version and of the large one?

# %%
from sdpo_nb.compare import plot_contrasts
from sdpo_nb.evaluate import as_text
from sdpo_nb.real import arrange
from sdpo_nb.timed import read_results

small, found = (arrange(name, read_results(name)) for name in ("smollm2_cpu", "smollm2"))
for name, seen, asked in (("the smaller version", small, CPU_PRIMARY), ("the large one", found, PRIMARY)):
    cells = "all cells are" if seen.missing is None else f"{seen.missing} cells are"
    left_out = [f"draw {draw} is left out ({mix})" for draw, mix in seen.left_out.items()]
    print(f"{name}: {len(seen.draws_of(asked))} whole draws, {cells} missing", *seen.origin, *left_out, sep="; ")

# %% [markdown]
# ### The smaller version
#
# How much does each arm gain, draw by draw? S itself gains nothing. Look first how far the draws of one arm lie apart.

# %%
sides = ("better: the second", "better: the first")
gains = {}
for arm, by_draw in small.rows.items():
    gains[arm] = {f"draw {draw}": outcome_of(row, small.S, "gain").mean() for draw, row in by_draw.items()}
pd.DataFrame(gains).T.round(4)

# %%
if len(small.draws_of(CPU_PRIMARY)) > 1:
    display(assay(small.rows, small.S).round(3))
    of_small = answer_questions(small.rows, small.S, CPU_PRIMARY)
    display(without_words_before_the_end(of_small, small.missing).round(3).set_index("question"))
    plot_contrasts(of_small, "difference of gain (nats a pair)", MARGINS["gain"], sides=sides)


# %% [markdown]
# *We cannot tell*, three times, as was to be expected. It is evidence neither for a difference nor against one. What can be read off: the intervals are about as wide as the margin, and the paper's effect, half of what DPO gains, would be 0.12 here. It is outside of all three.
#
# Draws of one arm differ by 0.06, and differences between arms by less, since all arms share a draw. (Draw 0, but for the fixed reference, was run on another kind of processor, which rounds otherwise: what S says there differs by 0.45 nats of $\gamma$ from pair to pair. Measured against the other S, no difference of arms in draw 0 moves by more than 0.001.)
#
# The same with $c$ from the other half of the pairs, and by source. Neither was planned, and both came after draw 0 had been seen.

# %%
def differences(outcome, sources=("orca", "uf")):
    answers = answer_questions(small.rows, small.S, CPU_PRIMARY, outcome, sources)
    return {answer.question: as_text((answer.mean, answer.low, answer.high), "+.3f") for answer in answers.itertuples()}

def DPO_over_S(outcome, sources=("orca", "uf")):
    found = assay(small.rows, small.S, sources).loc[outcome]
    return {"DPO over S": as_text((found["mean"], found["low"], found["high"]), "+.3f")}

if len(small.draws_of(CPU_PRIMARY)) > 1:
    ways = {
        "as planned": ("gain",),
        "cross-fitted": ("cross-fitted gain",),
        "cross-fitted, Orca alone": ("cross-fitted gain", ["orca"]),
        "cross-fitted, UltraFeedback alone": ("cross-fitted gain", ["uf"]),
    }
    display(pd.DataFrame({way: DPO_over_S(*asked) | differences(*asked) for way, asked in ways.items()}).T)
    by_source = {source: assay(small.rows, small.S, [source]).loc["cross-fitted gain"] for source in ("orca", "uf")}
    assert by_source["orca"]["mean"] > 0.3
    assert not by_source["uf"]["counts"]

# %% [markdown]
# Where $c$ comes from does not matter much. But look at the last two lines. Nearly all of the gain is on Orca. On UltraFeedback the outcome does not pass its own assay: no arm there knows more than S. So the words above are about Orca, and say nothing about pairs as hard as those of UltraFeedback. In Orca the chosen responses are those of a stronger model. In UltraFeedback a judge prefers one of two, and 200 such pairs have not taught the model what it prefers.
#
# Beside the answers stand the secondary outcomes, as means of the draws. Draw 0 measured no KL, so that line is the mean of the two draws that did.

# %%
if small.rows: display(secondary_outcomes(small.rows, small.S).round(3).T)


# %% [markdown]
# What did the second stage add to the gain, beyond the first one?

# %%
def second_stage(arm): # mean over the draws
    gains = [[outcome_of(row, small.S, "gain", stage=t).mean() for t in (0, 1)] for row in small.rows[arm].values()]
    return float(np.mean(np.diff(gains)))

if small.rows:
    moving, fixed = map(second_stage, ("sDPO", "sDPO, fixed reference"))
    assert 0 < moving < fixed < MARGINS["gain"]
    print(f"moving reference: {moving:+.3f}; fixed: {fixed:+.3f}")


# %% [markdown]
# What do the models write? Greedy replies of one draw to held-out prompts, cut after 48 tokens, two of each source. (The prompts belong to the data sets and are not part of this book.)

# %%
def wrote(arm): return [draw for draw, row in small.rows.get(arm, {}).items() if "replies" in row]

both = sorted(set(wrote("DPO")) & set(wrote("sDPO")))
if both and "replies" in small.S:
    beside = {"source": [small.S["source"][number] for number in small.S["asked"]], "S": small.S["replies"]}
    for arm in ("DPO", "sDPO"): beside[arm] = small.rows[arm][both[0]]["replies"]
    with pd.option_context("display.max_colwidth", None): display(pd.DataFrame(beside).set_index("source")[::2])

# %% [markdown]
# ### The large one
#
# As long as a draw is missing, nothing is concluded. What is there is shown:

# %%
if found.chosen:
    edges = {arm: on_the_edge(found.chosen[arm], grid_of(arm)) for arm in SEARCHED}
    display(pd.DataFrame(found.chosen).T.assign(edge=pd.Series(edges)))

# %%
if len(found.draws_of(PRIMARY)) > 1:
    display(assay(found.rows, found.S).round(3))
    answers = answer_questions(found.rows, found.S, PRIMARY, "cross-fitted gain")
    display(without_words_before_the_end(answers, found.missing).round(3).set_index("question"))
    plot_contrasts(answers, "difference of gain (nats a pair)", MARGINS["gain"], sides=sides)

# %%
if len(found.draws_of(PRIMARY)) > 1:
    of_signs = answer_questions(found.rows, found.S, PRIMARY, "accuracy")
    display(without_words_before_the_end(of_signs, found.missing).round(3).set_index("question"))
    display(secondary_outcomes(found.rows, found.S).round(3))

# %% [markdown]
# To run the smaller version: `python -m sdpo_nb.experiments smollm2_cpu --folder SMALL --data DIR --model DIR --precision bf16`, an hour and three quarters a draw on one core that multiplies in bf16, and it goes on where it was stopped. To run the large one: `python -m sdpo_nb.experiments smollm2 --minutes 8 --folder OUT --data DIR --model DIR`, in another folder, again and again, until no cell is left. [Real cells](real_cells.ipynb) say what `DIR` must hold. On an H100 a run took 12 to 13 seconds in the pilot, with pairs twice as long as here. Then `OUT/smollm2.jsonl` belongs into `data/results`, and this page is run again.
#
# ## What this does not show
#
# - **The large design has not been run.** The smaller one has three draws and one setting.
# - **What a second stage does when it learns something.** Stage 2 has 12 to 14 steps, on UltraFeedback. With a moving reference it adds 0.011 to the gain, with a fixed one 0.019, after the 0.2 of the first stage. So the two had little to do, and finding them alike says little about longer training.
# - One base model, with 135 million parameters, and 1,165 pairs or so in the pool. The paper's has 10.7 billion and 72,000.
# - One pool of pairs. Its luck is in every draw, and in no interval.
# - One pass, as in the paper. Three passes may be another matter.
# - Little is generated: 48 tokens to four held-out prompts of each source. No comparison at equal distance from S, no benchmark. The gain is about pairs.
#
# ## What you now have
#
# - Twelve arms, eight draws, one search, four questions, two margins: fixed before the first run.
# - `answer_questions`: the answers with their words, and `assay`, which says whether an outcome may be used.
#
# ## Questions to test yourself
#
# 1. Why are the left-out pairs of a draw worth more than a larger number of draws with the same held-out pairs?
#
#    <details><summary>Answer</summary>
#
#    The held-out pairs are the same in every draw, and their luck does not average out. Each draw leaves out other pairs, so over eight draws five of six pairs of the pool are measured by some model that has not seen them.
#
#    </details>
# 2. Why is a temperature fitted for every model?
#
#    <details><summary>Answer</summary>
#
#    $\beta$ and learning rate decide how large $\gamma_\theta - \gamma_S$ becomes. Without a temperature a model with the right signs could lose to another only because its numbers are larger or smaller.
#
#    </details>
#
# ## Try this
#
# - Take seven draws instead of eight. Which assertion fires? And how many questions could eight draws answer?
#
#   <details><summary>What you should see</summary>
#
#   Seven draws: the smallest p-value is 0.0156, and four times that is 0.0625, so nothing could be called different. With eight draws six questions would still do ($6 \cdot 0.0078 = 0.047$), and seven would not.
#
#   </details>
