# %% [markdown]
# # Relatives of stepwise DPO
# > Fourteen papers, sorted by two questions: does the reference move, and do the data come in an order? What each changes in the loop, what it reports, and what came out here.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/related.ipynb)
#
# **You should know** the [DPO loss](03_loss.ipynb) and what a [stage](14_stepwise.ipynb) is. **Time**: 25 minutes to read, a minute to run on one CPU core.
#
# Plain DPO takes all pairs at once and measures them against one fixed model, S. Stepwise DPO does two things differently: its *reference moves*, and its *data come in an order*. Most papers near it do one of the two, or both in another way. So two questions are enough to sort them:

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
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from datasets import concatenate_datasets
from IPython.display import Markdown

from sdpo_nb.compare import outcome_values, paired_difference
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.logprobs import score_pairs, weights_hash
from sdpo_nb.loss import bradley_terry, population_loss
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.questions import load_grid
from sdpo_nb.report import gamma_table
from sdpo_nb.stepwise import StepwiseConfig, sdpo
from sdpo_nb.training_data import TRAINING_DATA, true_gap
from sdpo_nb.world import K, enumerable_world, load_base, load_world, make_pairs

torch.set_num_threads(1)
pd.set_option("display.width", 180, "display.max_columns", 20, "display.max_colwidth", 120);

# %% [markdown]
# Methods and studies, one a line. *Read* says what was read of each for this page, and no paper was read in full:
#
# - *abstract*: the abstract, and no number from elsewhere;
# - *code*: besides, the authors' own code, or that of TRL;
# - *excerpt*: besides, a summary by somebody else, which may be wrong.
#
# *Here* says how it came out in this book. The reasons are [below](#What-came-out-here).

# %%
COLUMNS = ["name", "arXiv", "reference", "data", "special", "read", "here"]
RELATIVES = pd.DataFrame([
    ("TR-DPO", "2404.09656", "moves", "at once", "every few steps", "abstract, code", "otherwise"),
    ("Pre-DPO", "2504.15843", "moves", "at once", "once; then from S again", "abstract, code", "not tried"),
    ("AlphaDPO", "2410.10148", "moves", "at once", "inside the loss", "abstract, code", "not tried"),
    ("Selective DPO", "2502.09650", "stays", "in an order", "and half is left out", "abstract, code", "otherwise"),
    ("Curri-DPO", "2403.07230", "moves", "in an order", "by ratings", "abstract, excerpt", "otherwise"),
    ("2D-Curri-DPO", "2504.07856", "moves", "in an order", "prompts, too", "abstract, excerpt", "not tried"),
    ("Staged-Competence", "2605.26315", "moves", "in an order", "inside stages, too", "abstract, code", "otherwise"),
    ("Self-Rewarding", "2401.10020", "moves", "in an order", "written on the way", "abstract, excerpt", "otherwise"),
    ("beta-DPO", "2407.08639", "stays", "at once", "β moves instead", "abstract, code, excerpt", "not tried"),
    ("HyPO", "2602.11902", "stays", "at once", "clipped at 0", "abstract, excerpt", "not tried"),
    ("Reference Policies", "2407.13709", "stays", "at once", "study: which one?", "abstract", "in part"),
    ("Do They Differ?", "2603.19335", "stays", "at once", "study: 20 losses", "abstract", "alike"),
    ("Misspecified", "2510.20413", "stays", "at once", "theory", "abstract", "alike"),
    ("Uniform Forgetting", "2606.19744", "not said", "in an order", "study; moves? not said", "abstract", "alike"),
], columns=COLUMNS)
assert len(RELATIVES) == 14
assert RELATIVES["name"].is_unique and RELATIVES["arXiv"].is_unique

# %%
VERDICTS = {                                    # as it came out here -> color, in words
    "alike": ("C0", "came out alike here"),
    "in part": ("C4", "in part"),
    "otherwise": ("C1", "came out otherwise"),
    "not tried": ("0.45", "not tried here"),
}
PLACES = {("stays", "at once"): (0, 0), ("moves", "at once"): (1, 0),
          ("stays", "in an order"): (0, 1), ("moves", "in an order"): (1, 1)}

def write_names(ax, rows, x, top, step=0.125):
    "One line for each relative, downwards."
    for i, row in enumerate(rows.itertuples()):
        color, y = VERDICTS[row.here][0], top - i * step
        ax.text(x, y, row.name, color=color, fontsize=11, va="center")
        ax.text(x + 0.47, y, row.special, color="0.45", fontsize=9, va="center")

fig, ax = plt.subplots(figsize=(9.5, 5.2))
sns.set_palette("colorblind")
for (reference, data), (left, bottom) in PLACES.items():
    shade = "0.92" if (reference, data) == ("moves", "in an order") else "0.98"
    ax.add_patch(plt.Rectangle((left, bottom), 1, 1, fc=shade, ec="white", lw=4))
    here = RELATIVES.query("reference == @reference and data == @data")
    write_names(ax, here, left + 0.07, bottom + 0.7)
write_names(ax, RELATIVES.query("reference == 'not said'"), 0.07, 1.2)
corner = plt.Rectangle((1.01, 1.01), 0.98, 0.98, fill=False, ec="black", lw=2)
ax.add_patch(corner)
ax.text(1.07, 1.86, "stepwise DPO", fontsize=14, weight="bold", va="center")
ax.text(0.07, 0.86, "DPO", fontsize=14, weight="bold", va="center")
for x, words in ((0.5, "the reference stays"), (1.5, "the reference moves")):
    ax.text(x, 2.06, words, ha="center", fontsize=12)
for y, words in ((0.5, "all data at once"), (1.5, "data in an order")):
    ax.text(-0.04, y, words, rotation=90, ha="center", va="center", fontsize=12)
for x, (color, words) in zip((0.0, 0.62, 0.9, 1.46), VERDICTS.values()):
    ax.text(x, -0.09, words, color=color, fontsize=10, va="center")
ax.set(xlim=(-0.08, 2.02), ylim=(-0.14, 2.14))
ax.axis("off");

# %% [markdown]
# *To see:* stepwise DPO stands in the corner where both answers are yes, and four others with it. Below it the reference moves without an order, beside it the data are ordered without a move. The colors say what came out in the tiny worlds of this book; orange does not mean refuted. (Of *Uniform Forgetting* the abstract does not say whether the reference of a stage moves.)
#
# ## The loop
#
# Here is stepwise DPO once more, with the three places where it can be changed:
#
# ```python
# for t, D_t in enumerate(chunks, 1):        # B: which pairs are next?
#     reference = score_pairs(model, D_t)    # A: who is the reference?
#     train_stage(model, D_t, reference)     # C: what does the loss make of it?
# ```
#
# $$\ell = -\log\sigma\big(\beta\,(\gamma_\theta - \gamma_{M_{t-1}})\big), \qquad \theta \text{ starting at } M_{t-1}, \quad D_1, \dots, D_T \text{ from easy to hard} \tag{1}$$
#
# $\gamma$ is how much likelier a model finds the chosen response than the rejected one, in nats; $\gamma_\theta$ is that of the policy. We run this on 64 pairs of each source of the [tiny world](00_world.ipynb), and then change one line at a time.

# %%
w, runs = load_world(), Path(tempfile.mkdtemp())
S, tokenizer = load_base(w)
few = {name: dict(source=file, max_pairs=64) for name, file in w.sources.items()}
quick = dict(beta=0.3, lr=3e-4, precision="fp32", max_length=64, probe=64)
whose = {weights_hash(S): "S"}

def align(name, sources=few, **settings):
    "A run of the loop; `settings` are what differs."
    return sdpo(w.base, sources, StepwiseConfig(**quick | settings), runs / name)

def told(run):
    "Stage by stage: its chunk, where it starts, its reference, and the first loss."
    names, rows = dict(whose), {}
    for t, stage in enumerate(run.stages, 1):
        rows[f"stage {t}"] = {
            "chunk": stage["chunk"],
            "starts at": names[stage["start"]],
            "reference": names[stage["reference_kind"]["weights"]],
            "first loss": round(stage["first_loss"], 3),
        }
        names[stage["end"]] = f"M_{t}"
    return pd.DataFrame(rows).T


# %%
stepwise = align("stepwise")
table = told(stepwise)
assert table["reference"].tolist() == table["starts at"].tolist() == ["S", "M_1", "M_2"]    # (1)
assert (table["first loss"] == 0.693).all()
table

# %% [markdown]
# The column to watch is the last. Where a stage starts at its own reference, the first loss is $\ln 2 = 0.693$. A relative that changes place A or C mostly shows it here.
#
# ## The reference moves, the data do not
#
# **TR-DPO.** Why wait for the end of a stage? After every $\tau$ steps the reference takes over a share $\alpha$ of the weights of the policy:
#
# $$\theta_{ref} \leftarrow \alpha\,\theta + (1-\alpha)\,\theta_{ref} \quad\text{after every } \tau \text{ steps} \tag{2}$$
#
# With $\alpha = 1$ (a "hard" update) this is stepwise DPO with *random* chunks of $\tau$ batches, if optimizer and schedule go on from chunk to chunk and each pair is seen once. That is a setting. The soft update, $\alpha < 1$, is not; [TRL has both](https://github.com/huggingface/trl/pull/1593), as `sync_ref_model`.

# %%
tr_dpo = align("TR-DPO", chunks=3, order="random", restart="never")     # hard, tau = 2 steps
table = told(tr_dpo)
rates = tr_dpo.metrics["lr"]
assert table["reference"].tolist() == ["S", "M_1", "M_2"]                # (2)
assert rates.iloc[rates.argmax():].is_monotonic_decreasing               # one schedule
table

# %% [markdown]
# *Reported*: "up to 19 %" better than DPO by GPT-4 on HH and TL;DR (abstract of the first version); that it stays good far from S, where DPO is over-optimised (abstract of version 4, without a number). Its recommended settings are $\alpha = 0.6$, $\tau = 512$, $\beta = 0.05$ ([as noted in TRL](https://github.com/huggingface/trl/pull/5078)).
#
# **Pre-DPO.** First comes DPO as usual. Then S starts *again*, on the same pairs, against the model that came out:
#
# $$\ell = -\log\sigma\big(\beta\,(\gamma_\theta - \gamma_{M_1})\big), \qquad \theta \text{ starting at } S, \quad M_1 = \mathrm{DPO}(S, D), \quad \text{the same } D \tag{3}$$
#
# Will the first loss of the second run be above or below $\ln 2$?

# %%
dpo = align("DPO", chunks=1)
whose[dpo.stages[0]["end"]] = "the model of DPO"
pre_dpo = align("Pre-DPO", chunks=1, reference=str(dpo.model_folder(1)))
first, must = pre_dpo.stages[0]["first_loss"], pre_dpo.stages[0]["implied_first_loss"]
assert abs(first - must) < 1e-4                                          # (3)
assert first > 1.1 * told(dpo)["first loss"].iloc[0]
told(pre_dpo)


# %% [markdown]
# Above: S is asked to beat a model that has seen these pairs. In the words of the paper the reference has become a "data weight adjuster": pairs that DPO has learned weigh more, since $\lambda = \sigma(\beta(\gamma_{M_1} - \gamma_\theta))$ is above one half for them.
#
# *Reported*: gains over DPO and SimPO on AlpacaEval 2 and Arena-Hard (abstract, no number). The notes of this book have one table from it, which we could not read again: on one data set in two halves, AlpacaEval 2 with length control gives DPO 10.5, stepwise DPO 12.0, TR-DPO 11.7. It is the only comparison of stepwise DPO by others that we know of.
#
# **AlphaDPO.** The reference need not be a model. Take a uniform one, and tilt it by what the policy has gained so far. The policy is then always held against a share of itself:
#
# $$\hat\pi_{ref} \propto U \Big(\frac{\pi_\theta}{S}\Big)^{\alpha}, \qquad \ell = -\log\sigma\big(\beta\,(\gamma_\theta - \alpha\,[\gamma_\theta - \gamma_S] - m)\big) \tag{4}$$
#
# - $U$: the uniform distribution, whose $\gamma$ is 0; $m$: a margin;
# - the bracket is a number: no gradient goes through it. The authors' code also divides it by its spread over the last batches, which we leave out.

# %%
def alpha_dpo(chosen, rejected, ref_chosen, ref_rejected, beta, pairs, alpha=0.1, margin=0.0):
    gamma, gamma_S = chosen - rejected, ref_chosen - ref_rejected
    moving_part = alpha * (gamma - gamma_S).detach()
    return F.softplus(-beta * (gamma - moving_part - margin))

zero, gamma = torch.zeros(2), torch.tensor([0.0, 10.0], requires_grad=True)
slope, = torch.autograd.grad(alpha_dpo(gamma, zero, zero, zero, 0.3, None).sum(), gamma)
by_hand = -0.3 * torch.sigmoid(-0.3 * torch.tensor([0.0, 9.0]))          # the bracket is 0 and 10
assert slope.allclose(by_hand)                                           # (4)
told(align("AlphaDPO", chunks=1, loss=alpha_dpo))

# %% [markdown]
# The first loss is not $\ln 2$, although S is the reference in the table: at the start the bracket is 0, and what is left is $\gamma_S$ itself.
#
# *Reported*: 58.7 % on AlpacaEval 2 with length control and 35.7 % on Arena-Hard, "without multi-stage training" (abstract).
#
# ## The data come in an order, the reference stays
#
# **Selective DPO.** Pairs beyond a model's capacity do harm, so leave them out. Train judges on one half of the pairs, and ask for the loss of each pair of the *other* half. Then keep the easier part, easy pairs first:
#
# $$D' = \text{the half of } D \text{ with the smallest } -\log\sigma\big(\beta\,(\gamma_{J} - \gamma_S)\big), \quad J \text{ trained on pairs that are not in it} \tag{5}$$
#
# The loss falls where the gain $\gamma_J - \gamma_S$ rises, so sorting by either is the same.

# %%
all_pairs = concatenate_datasets([load_pairs(file).select(range(64)) for file in w.sources.values()])
one_half, other_half = all_pairs.select(range(0, 192, 2)), all_pairs.select(range(1, 192, 2))
judge = align("judge", {"one half": one_half}, chunks=1).model

ids = tokenize_pairs(other_half, tokenizer, "other half", 64, 32).pairs
gain = score_pairs(judge, ids).gamma(ids) - score_pairs(S, ids).gamma(ids)
easiest = gain.argsort(descending=True)[:len(ids) // 2]                  # (5)
kept = other_half.select(easiest.tolist())
assert gain[easiest].min() >= gain.median()

# %%
selective = align("selective", {"kept": kept}, chunks=1, order="as_given", shuffle=False)
assert selective.stages[0]["pairs"] == 48
told(selective)

# %% [markdown]
# `shuffle=False` is the order: a stage normally shuffles its chunk. *Reported*: 9 to 16 % better than DPO in win rates on AlpacaEval 2 (abstract). That the kept half comes in an order, and that six judges are trained, stands in the [authors' repository](https://github.com/glorgao/SelectiveDPO).
#
# ## Both: the corner of stepwise DPO
#
# **Curri-DPO.** The closest one, and of the same month. Each prompt has several rated answers, best to worst $y_1, \dots, y_4$. Stage by stage the same prompts return with a closer opponent:
#
# $$D_1: (y_1, y_4), \quad D_2: (y_1, y_3), \quad D_3: (y_1, y_2), \qquad \gamma_{ref} = \gamma_{M_{t-1}} \tag{6}$$
#
# Our prompts have two answers. What remains of the idea is the order, by the difference of their true rewards:

# %%
graded = TRAINING_DATA["sorted"](w, S, tokenizer, "true gap", -1)["all"][::8]
curri_dpo = align("Curri-DPO", {"graded": graded}, order="as_given", chunks=3)
third = len(graded) // 3
gaps = [sum(abs(true_gap(row)) for row in graded[i:i + third]) / third for i in (0, third, 2 * third)]
assert gaps == sorted(gaps, reverse=True)                                # (6)
told(curri_dpo).assign(mean_gap=[round(gap, 2) for gap in gaps])

# %% [markdown]
# *Reported*: 7.43 on MT-Bench with Zephyr-7B, and up to 7.5 % more wins than DPO (abstract). Stepwise DPO sorts *sources* by what S finds easy; Curri-DPO sorts pairs by what raters find easy.
#
# **2D-Curri-DPO** adds a second difficulty, that of the prompt, and walks through a grid:
#
# $$\big(\mathrm{sd}_i\,\mathrm{PPL}(y^{(i)}),\; |J(y_w) - J(y_l)|\big), \qquad \gamma_{ref} \text{ follows when } \mathrm{KL}(\pi_\theta \,\|\, \pi_{ref}) \text{ says so} \tag{7}$$
#
# - the first number: how much the perplexity of several answers to the prompt varies; $J$: the mark of a judge.
#
# A path through such a grid is a list of lists of source names. A reference that follows when the policy is far enough away is no setting here.

# %%
path = StepwiseConfig(chunks=["easy, clear", ["easy, close", "hard, clear"], "hard, close"]).chunks
assert path == [["easy, clear"], ["easy, close", "hard, clear"], ["hard, close"]]    # (7), the order only
path

# %% [markdown]
# *Reported*: better than DPO and Curri-DPO on MT-Bench, Vicuna and WizardLM (abstract, no number); 89.5 % wins on UltraFeedback (excerpt).
#
# **Staged-Competence** ("Curriculum Learning for Safety Alignment") has three chunks, a moving reference, and an order *inside* a stage. At step $s$ of $n$ only the easiest share $c$ of the chunk may be drawn:
#
# $$c(s) = \sqrt{(1 - c_0^2)\,\tfrac{s}{n} + c_0^2}, \qquad \text{easy: } \cos(e_{\hat y}, e_{y_w}) - \cos(e_{\hat y}, e_{y_l}) \text{ is large} \tag{8}$$
#
# - $e$: the embedding of a text; $\hat y$: what the model answers by itself; $c_0 = 0.01$.
#
# So a pair is easy if the model's own answer resembles the chosen one. We have no embeddings. We take $\gamma_S$, which also asks the model, and the strictest order, one pair after the other:

# %%
staged = align("staged", {"all": all_pairs}, chunks=3, shuffle=False)
gammas = gamma_table(staged).query("model == 'M_0'").groupby("chunk", sort=False)["gamma"]
assert gammas.min()["part 1"] >= gammas.max()["part 2"]                  # (8), the order only
assert gammas.min()["part 2"] >= gammas.max()["part 3"]
told(staged).assign(mean_gamma_S=gammas.mean().round(1).tolist())

# %% [markdown]
# *Reported*: 16 % fewer harmful answers outside the training distribution, 20 % fewer successful jailbreaks, the safety of the baseline with 75 % of the data; means of three model families (abstract). Formula (8) is from the [authors' code](https://github.com/Sandeep5500/curriculum-learning-for-safety).
#
# **Self-Rewarding Language Models.** Here no data exist beforehand. The model of the stage before writes the answers *and* says which is better:
#
# $$D_t = \{(x, y_w, y_l)\}: \quad y_w, y_l \sim M_{t-1}(\cdot|x), \quad J_{M_{t-1}}(y_w) > J_{M_{t-1}}(y_l) \tag{9}$$
#
# $J_M$ is the mark that $M$ gives when it is asked as a judge. A tiny model cannot be asked. Its nearest substitute is the implicit reward, $\log M_{t-1} - \log S$. A chunk is then a function of the model:

# %%
prompts = [row["prompt"][-1]["content"] for row in load_pairs(w.sources["primer"]).select(range(120))]

def swapped(row): return row | dict(chosen=row["rejected"], rejected=row["chosen"])

def written(t, model):
    "Sixty prompts, answered by the model; from stage 2 on it labels them, too."
    if t > 2: return None
    rows = make_pairs(model, tokenizer, prompts[t - 1::2], seed=t)       # labels by the truth
    if t == 1: return rows
    ids = tokenize_pairs(load_pairs(rows), tokenizer, "written", 64, 32).pairs
    gain = score_pairs(model, ids).gamma(ids) - score_pairs(S, ids).gamma(ids)
    own_labels.extend((gain < 0).tolist())
    return [swapped(row) if turned else row for row, turned in zip(rows, own_labels)]

own_labels = []
self_rewarding = align("self-rewarding", None, chunks=written)
assert told(self_rewarding)["reference"].tolist() == ["S", "M_1"]        # (9)
assert 0 < sum(own_labels) < len(own_labels)
print(f"of its {len(own_labels)} pairs M_1 labels {sum(own_labels)} against the truth's label")
told(self_rewarding)


# %% [markdown]
# *Reported*: Llama 2 70B, win rates on AlpacaEval 2 after three rounds 9.94, 15.38 and 20.44 % (excerpt; the abstract has no numbers). The stepwise paper names such data as a partner of its stages.
#
# ## Neither: one reference, all at once
#
# These two change place C. A loss is [a function](other_losses.ipynb).
#
# **HyPO.** Where S prefers the rejected response, $\gamma_S < 0$, DPO is content as soon as the policy is a little less wrong than S. So such a reference does not count:
#
# $$\ell = -\log\sigma\big(\beta\,(\gamma_\theta - \max(0, \gamma_S))\big) \tag{10}$$

# %%
def hypo(chosen, rejected, ref_chosen, ref_rejected, beta, pairs):
    return F.softplus(-beta * ((chosen - rejected) - (ref_chosen - ref_rejected).clamp(min=0)))

two = torch.tensor([4.0, -4.0])                                          # gamma_S, and gamma at the start
losses = hypo(two, torch.zeros(2), two, torch.zeros(2), 0.3, None)
assert losses[0] == F.softplus(torch.tensor(0.0))                        # (10): as DPO
assert losses[1] == F.softplus(torch.tensor(1.2))                        # (10): as without a reference
told(align("HyPO", chunks=1, loss=hypo))

# %% [markdown]
# *Reported*: higher win rates (abstract); 41.2 % over DPO, relatively, on AlpacaEval 2, and that about 45 % of pairs are of this kind even under a strong reference (excerpt). The second concerns us: does a moving reference get rid of such pairs?

# %%
gammas = gamma_table(stepwise).query("chunk == 'riddle'")
negative = gammas.assign(negative=gammas["gamma"] < 0).groupby("model")["negative"].mean()
assert negative["M_0"] > negative["M_2"] > 0.1
negative.round(2).rename("share of riddle with negative gamma").to_frame().T

# %% [markdown]
# In this run fewer, and not none: that is before the stage on `riddle` ($M_2$), where it matters, and after it ($M_3$).
#
# **beta-DPO** leaves the reference and moves the leash. Each batch $B$ has a $\beta$ of its own, large where the pairs are already far apart:
#
# $$\beta_B = \beta\,\big(1 + a\,[\,\mathrm{mean}_B(\gamma_\theta - \gamma_S) - \bar\Delta\,]\big) \tag{11}$$
#
# - $\bar\Delta$: the running mean over the batches so far; $a = 0.6$ in their example. They also leave out a fifth of each batch.
#
# This package cannot train with it, as [a loss must be made from one pair alone](other_losses.ipynb). But the tables say which $\beta$ three batches of `digest` would get, with $M_1$ in the role of the policy. The running mean starts at the first batch, so that one keeps $\beta$:

# %%
named = gamma_table(stepwise).query("chunk == 'digest'")
of = {model: torch.tensor(rows["gamma"].tolist()) for model, rows in named.groupby("model")}
batches = (of["M_1"] - of["M_0"]).split(22)
mean, betas = batches[0].mean(), []
for delta in batches:
    mean = 0.9 * mean + 0.1 * delta.mean()
    betas.append(0.3 * (1 + 0.6 * (delta.mean() - mean)).item())         # (11)
assert abs(betas[0] - 0.3) < 1e-6
assert 0.3 < min(betas[1:])
[round(beta, 3) for beta in betas]

# %% [markdown]
# *Reported*: GPT-4 win rates on HH of 57.07 where DPO has 51.51 (excerpt). Stepwise DPO is a coarse relative of this: by (11) of [chapter 03](03_loss.ipynb), stages on the same reward are one stage whose $\beta$ falls from $\beta$ to $\beta/T$.
#
# ## Four studies
#
# **Understanding Reference Policies** asks which frozen model $R$ should stand in $\gamma_\theta - \gamma_R$. Its answers (abstract): DPO is sensitive to $\beta$; a reference is needed; a stronger one helps, "but only when it is similar to the model being fine-tuned". The line is that of Pre-DPO, `reference="folder/of/a/model"`.
#
# **Do Post-Training Algorithms Actually Differ?** trains twenty losses in one framework with five seeds each at 1.5B. None is better than DPO after Bonferroni's correction; and rankings turn around between 1.5B and 7B (abstract). The line is `loss=`.
#
# **Beyond Uniform Forgetting** trains one objective after the other, and measures all after every stage, $\mathbb E_{D_1}[\gamma_{M_2} - \gamma_{M_1}]$ for the first. There is no single pattern: from partial loss to gain, depending on how the objectives are related (abstract). The line is the choice of chunks, `TRAINING_DATA["skills"]`.
#
# **Why DPO is a Misspecified Estimator.** If the true reward cannot be written as the policy class asks,
#
# $$k\,r(x, y) \ne \beta \log\frac{\pi_\theta(y|x)}{S(y|x)} + c(x) \quad\text{for every } \theta, \tag{12}$$
#
# then what DPO finds depends on *which pairs* are in the data (abstract). This touches a theorem of this book: where every stage finds the same reward, $T$ stages at $\beta$ are one at $\beta/T$. It can be looked at, in the [enumerable world](03_loss.ipynb). The chunks compare the same answers; one has mostly short answers, the other mostly long ones. A *table* can express every reward. Four *features* cannot. Which of the two will notice the chunks?

# %%
world, beta = enumerable_world(), 0.5
log_S = world.log_base
wins = bradley_terry(world.reward, K)
short = torch.tensor([len(y) <= 2 for y in world.responses])
both_short = short[:, None] & short[None, :]
mostly_short = wins * torch.where(both_short, 10.0, 1.0)
mostly_long = wins * torch.where(both_short, 1.0, 10.0)

def table_model(theta): return (log_S + theta.view(2, 14)).log_softmax(-1)
def feature_model(theta): return (log_S + theta.view(2, 4) @ world.features.T).log_softmax(-1)

def lowest(f, start):
    "Where a smooth function is lowest, by L-BFGS."
    x = start.clone().requires_grad_()
    settings = dict(max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16)
    optimizer = torch.optim.LBFGS([x], line_search_fn="strong_wolfe", **settings)
    def value():
        optimizer.zero_grad()
        y = f(x)
        y.backward()
        return y
    optimizer.step(value)
    return x.detach()


# %%
def in_stages(model, size, chunks, beta):
    "Each stage to its optimum, from the last model and against it."
    theta = torch.zeros(size, dtype=torch.float64)
    for comparisons in chunks:
        log_ref = model(theta)
        theta = lowest(lambda x: population_loss(model(x), log_ref, comparisons, beta), theta)
    return model(theta)

def apart(log_pi, other): return (log_pi - other).abs().max().item()

found = {}
for name, model, size in (("table", table_model, 28), ("four features", feature_model, 8)):
    A, B = (in_stages(model, size, [chunk], beta) for chunk in (mostly_short, mostly_long))
    AB = in_stages(model, size, [mostly_short, mostly_long], beta)
    BA = in_stages(model, size, [mostly_long, mostly_short], beta)
    one = in_stages(model, size, [wins], beta / 2)
    found[name] = {
        "one chunk or the other": apart(A, B),
        "two stages or one at beta/2": apart(AB, one),
        "one order or the other": apart(AB, BA),
    }
found = pd.DataFrame(found)
assert found["table"].max() < 1e-5
assert found["four features"].iloc[:2].min() > 0.5                       # (12)
assert found["four features"].iloc[2] < 1e-5
found.map(lambda nats: f"{nats:.1g}" if nats < 1e-3 else f"{nats:.2f}").rename_axis("largest difference, nats")

# %% [markdown]
# The table does not notice. With features, each chunk says something else, and two stages are no longer one at $\beta/2$. The *order* still changes nothing: each stage adds what it found, and additions commute. So misspecification alone does not make a curriculum; stages that stop early, or a network in which parameters do not add up, must come in.
#
# ## What came out here
#
# Now the colors. Each row is a comparison from the stored runs in ten tiny worlds, the one that is nearest to a relative: the difference of mean true reward (0 to 1) with its 95 % interval. None of them repeats the recipe of a paper.

# %%
NEAREST = { # relative -> page, (grid, row) of both sides of the difference
    "TR-DPO": ("why_it_works",
        ("why_it_works", "moving, random, never"), ("why_it_works", "fixed, random, never")),
    "Selective DPO": ("how_to_partition",
        ("how_to_partition", "DPO on the largest gaps"), ("how_to_partition", "DPO on a random part")),
    "Curri-DPO": ("how_to_partition",
        ("how_to_partition", "true gap of pairs"), ("how_to_partition", "random")),
    "Staged-Competence": ("how_to_partition",
        ("how_to_partition", "gamma of pairs"), ("how_to_partition", "random")),
    "Self-Rewarding": ("with_new_data",
        ("with_new_data", "policy, implicit"), ("with_new_data", "policy, true")),
    "Reference Policies": ("paper_in_miniature",
        ("paper_in_miniature", "riddle against M_2"), ("paper_in_miniature", "riddle against S")),
    "Do They Differ?": ("protocol", ("primary", "sDPO"), ("primary", "DPO")),
    "Uniform Forgetting": ("stage_by_stage",
        ("stage_by_stage", "skills, easy_to_hard"), ("primary", "sDPO at DPO's beta")),
}
IN_WORDS = {
    "TR-DPO": "the reference moves twice, or stays; random chunks, one schedule",
    "Selective DPO": "two thirds: those that a model learns best, or random ones",
    "Curri-DPO": "chunks by true difference, clear pairs first, or random chunks",
    "Staged-Competence": "chunks by γ of S, easy first, or random chunks",
    "Self-Rewarding": "labels by the model's implicit reward, or by the truth",
    "Reference Policies": "S trained against $M_2$, or against S",
    "Do They Differ?": "stepwise or plain DPO, each tuned",
    "Uniform Forgetting": "four stages of one skill each, or three of all skills",
}

# %%
lines, found = ["| relative | nearest here | true reward | KL from S | page |", "|---|---|---|---|---|"], {}
for name, (page, *sides) in NEAREST.items():
    one, other = (load_grid(grid)[row] for grid, row in sides)
    mean, low, high = interval(paired_difference(one, other))
    farther, nearer = (outcome_values(rows, "kl").mean() for rows in (one, other))
    found[name] = dict(low=low, high=high, farther=farther > nearer)
    text, distance = as_text((mean, low, high), "+.3f"), f"{farther:.1f}, {nearer:.1f}"
    link = f"[{page}](experiments/{page}.ipynb)"
    lines.append(f"| {name} | {IN_WORDS[name]} | {text} | {distance} | {link} |")
found = pd.DataFrame(found).T.astype(dict(low=float, high=float, farther=int))

worse = found.drop(index=["Do They Differ?"])
assert (worse["high"] < 0).all()
assert found.loc["Do They Differ?", ["low", "high"]].abs().max() < 0.02
assert worse["farther"].sum() >= 6
Markdown("\n".join(lines))

# %% [markdown]
# *To see:* in each line the first-named has less reward, but for the tuned methods, which are equal. And the first-named has nearly always gone *farther* from S. Most of these runs share one $\beta$, the best for plain DPO, and at that $\beta$ going farther means beyond the best distance. So read the orange names as "not at the same $\beta$", which is not the question that most of the papers ask.
#
# - **TR-DPO: otherwise.** It claims to be better at the same distance. Here a moving reference costs 0.028 where all have the $\beta$ of DPO; tuned, it is better by [0.012](experiments/protocol.ipynb), which is little; and at one distance [one stage is not behind three](experiments/how_many_stages.ipynb). But our reference moves twice in a run, and each pair is seen three times before it does. A reference that moves every few steps is an arm of the [first experiment on a real model](experiments/smollm2.ipynb), not run yet.
# - **Pre-DPO: not tried.** [Stages that start at S](experiments/protocol.ipynb) lose 0.062 against those that go on, but on other pairs in each stage, which is another design. It is an arm of the same experiment.
# - **AlphaDPO, beta-DPO, HyPO, 2D-Curri-DPO: not tried.** Above are single small runs; they show the line, and no more.
# - **Selective DPO: otherwise.** Leaving out what a model learns worst is behind as many pairs at random, and so is [leaving out the rest](experiments/how_to_partition.ipynb). Share, judge and $\beta$ are not theirs.
# - **Curri-DPO, Staged-Competence: otherwise.** [No sorted split](experiments/how_to_partition.ipynb) was better than a random one. For $\gamma$, little of the harm is left at the $\beta$ of stepwise DPO. Our sources share all skills, so there is no curriculum to find; and jailbreaks, or strings from elsewhere, were not measured there.
# - **Self-Rewarding: otherwise.** With labels of its own on its own answers, [the third stage takes back most of the second's gain](experiments/with_new_data.ipynb). A model of 70B that reads an answer before it judges is another judge.
# - **Reference Policies: in part.** $\beta$ decides here as there. That a stronger *and* similar reference helps did not come out: $M_1$ and $M_2$ descend from S, and as references they are [no better](experiments/paper_in_miniature.ipynb) at this $\beta$.
# - **Do They Differ?: alike.** [Tuned, stepwise and plain DPO are equal](experiments/protocol.ipynb). Their warning holds for us: our models are tiny, and rankings turn around with size.
# - **Uniform Forgetting: alike.** [What a stage undoes depends on its data](experiments/stage_by_stage.ipynb): stages of one skill each undo each other.
# - **Misspecified: alike**, in the table of the section before, and with the limit that it puts on [our theorem](experiments/smaller_beta.ipynb).
#
# ## What this does not show
#
# - **That a method fails or works.** The colors compare with the nearest runs of this book, in tiny worlds, not with the papers' recipes. The live runs have 192 pairs and one seed; no number of theirs but the first loss means anything.
# - **What the papers say beyond their abstracts.** Formulas (2), (4), (8) and (11) are from code, (7) from a summary. Where no number stands, we could not read one.
# - **All relatives.** Work that changes only the loss is left out, but for the few that touch the reference.
#
# ## What you now have
#
# - Two questions that sort a new paper in a minute, and a third for its loss.
# - The line of the loop that each of fourteen relatives changes, most of them as a setting.
# - The first loss as a test: $\ln 2$ means that the policy starts at its own reference.
#
# ## Questions to test yourself
#
# 1. A paper trains on easy pairs first and replaces the reference at the end of every epoch. Where does it stand?
#
# <details><summary>Answer</summary>
#
# In the corner of stepwise DPO: data in an order, and a reference that moves. It sees every pair against several references, where stepwise DPO sees it against one.
#
# </details>
#
# 2. Hard TR-DPO with $\tau$ larger than the number of steps: which method is it?
#
# <details><summary>Answer</summary>
#
# Plain DPO. The reference is never replaced. With $\tau$ equal to the steps of a stage and sorted chunks it is stepwise DPO with one schedule for all stages.
#
# </details>
#
# 3. HyPO begins above $\ln 2$. Can it begin below?
#
# <details><summary>Answer</summary>
#
# Not where the policy starts at S. A pair with $\gamma_S \ge 0$ has the loss $\ln 2$, as in DPO. One with $\gamma_S < 0$ has $\log(1 + e^{-\beta\gamma_S})$, which is more.
#
# </details>
#
# 4. Two papers report that a moving reference helps, both at one $\beta$. Which control would you ask for?
#
# <details><summary>Answer</summary>
#
# DPO with a smaller $\beta$, and both methods at the same distance from S. A moving reference lets the model go farther, and so does a smaller $\beta$ ([smaller_beta](experiments/smaller_beta.ipynb)).
#
# </details>
#
# ## Try this
#
# - Put HyPO and a moving reference together: `align("both", loss=hypo)`. What are the first losses of the three stages?
#
# <details><summary>What you should see</summary>
#
# 0.820, 0.914 and 0.821, all above $\ln 2 = 0.693$. A stage starts at its reference here too, but pairs on which $M_{t-1}$ still prefers the rejected response begin as if there were no reference. A moving reference does not remove them.
#
# </details>
