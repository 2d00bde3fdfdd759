# %% [markdown]
# # Relatives of stepwise DPO
# > Fourteen papers, sorted by two questions: does the reference move, and do the data come in an order? What each changes in the loop, what it reports, and what came out here.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/related.ipynb)
#
# **You should know** the [DPO loss](03_loss.ipynb) and what a [stage](14_stepwise.ipynb) is. **Time**: 30 minutes to read, a minute to run on one CPU core.
#
# Plain DPO takes all pairs at once and measures them against one fixed model, S. Stepwise DPO does two things differently: its *reference moves*, and its *data come in an order*. Most papers near it do one of the two, or both in another way.

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
import torch
import torch.nn.functional as F
from datasets import concatenate_datasets
from IPython.display import Markdown

from sdpo_nb.compare import outcome_values, paired_difference
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.logprobs import score_pairs, weights_hash
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.questions import load_grid
from sdpo_nb.report import gamma_table
from sdpo_nb.stepwise import StepwiseConfig, sdpo
from sdpo_nb.training_data import TRAINING_DATA, true_gap
from sdpo_nb.world import load_base, load_world

torch.set_num_threads(1)
pd.set_option("display.width", 180, "display.max_columns", 20);

# %%
MAP = { # (the reference moves, the data come in an order) -> who, and what is special
    (0, 0): "DPO | beta-DPO: β moves instead | HyPO: clipped at 0 | Reference Policies: which one? "
            "| Do They Differ?: twenty losses | Misspecified: a theorem",
    (1, 0): "| TR-DPO: every few steps | Pre-DPO: once, then anew | AlphaDPO: inside the loss",
    (0, 1): "| Selective DPO: half is left out | Uniform Forgetting*: by objective",
    (1, 1): "stepwise DPO | Curri-DPO: by ratings | 2D-Curri-DPO: by prompts, too "
            "| Staged-Competence: inside stages, too | Self-Rewarding: written on the way",
}
fig, ax = plt.subplots(figsize=(10, 4.8))
for (x, y), entries in MAP.items():
    look = dict(fc="#dbe9f6", ec="tab:blue", lw=2) if x and y else dict(fc="0.96", ec="white")
    ax.add_patch(plt.Rectangle((x + 0.01, y + 0.01), 0.98, 0.98, **look))
    for i, entry in enumerate(entries.split("|")):
        name, _, special = entry.strip().partition(": ")
        weight, size = ("normal", 11) if i else ("bold", 14)
        ax.text(x + 0.06, y + 0.86 - 0.145 * i, name, weight=weight, size=size, va="center")
        ax.text(x + 0.55, y + 0.86 - 0.145 * i, special, color="0.4", size=9.5, va="center")
for at, words in ((0.5, "the reference stays"), (1.5, "the reference moves")):
    ax.text(at, 2.05, words, ha="center", size=12)
for at, words in ((0.5, "all data at once"), (1.5, "data in an order")):
    ax.text(-0.03, at, words, ha="right", va="center", size=12, rotation=90)
ax.set(xlim=(-0.1, 2.01), ylim=(-0.01, 2.12))
ax.axis("off");

# %% [markdown]
# *To see:* stepwise DPO and four others stand where both answers are yes. Below them the reference moves without an order; to the left the data are ordered and the reference stays. (\* Its abstract does not say whether the reference of a stage moves.)
#
# ## What they report
#
# No paper was read in full for this page. *Abstract* means the abstract alone. *Code* means also the authors' code, or that of TRL. *Excerpt* means also a summary by somebody else, which may be wrong. Where there is no number, we could read none.
#
# | relative | its authors report | read |
# |---|---|---|
# | **TR-DPO** [2404.09656](https://arxiv.org/abs/2404.09656) | up to 19 % over DPO by GPT-4 on HH and TL;DR (v1); good models far from S, where DPO is over-optimised (v4) | abstract, [code](https://github.com/huggingface/trl/pull/1593) |
# | **Pre-DPO** [2504.15843](https://arxiv.org/abs/2504.15843) | gains over DPO and SimPO on AlpacaEval 2 and Arena-Hard | abstract, [code](https://github.com/DtYXs/Pre-DPO) |
# | **AlphaDPO** [2410.10148](https://arxiv.org/abs/2410.10148) | 58.7 % on AlpacaEval 2 (length control), 35.7 % on Arena-Hard | abstract, code |
# | **Selective DPO** [2502.09650](https://arxiv.org/abs/2502.09650) | win rates 9 to 16 % above DPO on AlpacaEval 2 | abstract, [code](https://github.com/glorgao/SelectiveDPO) |
# | **Curri-DPO** [2403.07230](https://arxiv.org/abs/2403.07230) | MT-Bench 7.43 with Zephyr-7B; up to 7.5 % over DPO in win rates | abstract, excerpt |
# | **2D-Curri-DPO** [2504.07856](https://arxiv.org/abs/2504.07856) | better than DPO and Curri-DPO on MT-Bench, Vicuna, WizardLM; 89.5 % wins on UltraFeedback (excerpt) | abstract, excerpt |
# | **Staged-Competence**, in "Curriculum Learning for Safety Alignment" [2605.26315](https://arxiv.org/abs/2605.26315) | 16 % fewer harmful answers outside the training distribution, 20 % fewer jailbreaks; the baseline's safety with 75 % of the data | abstract, [code](https://github.com/Sandeep5500/curriculum-learning-for-safety) |
# | **Self-Rewarding** LMs [2401.10020](https://arxiv.org/abs/2401.10020) | Llama 2 70B on AlpacaEval 2: 9.94 % fine-tuned on seed data, 15.38 % after one round, 20.44 % after two (excerpt) | abstract, excerpt |
# | **beta-DPO** [2407.08639](https://arxiv.org/abs/2407.08639) | win rate on HH 57.07, DPO 51.51 (excerpt) | abstract, [code](https://github.com/junkangwu/beta-DPO), excerpt |
# | **HyPO** [2602.11902](https://arxiv.org/abs/2602.11902) | AlpacaEval 2 a relative 41.2 % over DPO; about 45 % of pairs have $\gamma_{ref} < 0$ even under a strong reference (excerpt) | abstract, excerpt |
# | Understanding **Reference Policies** [2407.13709](https://arxiv.org/abs/2407.13709) | DPO is sensitive to $\beta$; a stronger reference helps only if it is similar to the policy | abstract |
# | **Do** Post-Training Algorithms Actually **Differ?** [2603.19335](https://arxiv.org/abs/2603.19335) | none of 20 DPO variants beats DPO (1.5B, 5 seeds, Bonferroni); rankings turn around with size | abstract |
# | Why DPO is a **Misspecified** Estimator [2510.20413](https://arxiv.org/abs/2510.20413) | if the policy class cannot express the reward, what DPO finds depends on which pairs it sees | abstract |
# | Beyond **Uniform Forgetting** [2606.19744](https://arxiv.org/abs/2606.19744) | objectives in sequence, Llama-3.1-8B: from partial loss to gain, depending on how they are related | abstract |
#
# Pre-DPO has the only comparison of stepwise DPO by others that we know of. The notes of this book say AlpacaEval 2 with length control: DPO 10.5, stepwise DPO 12.0, TR-DPO 11.7. We could not read that table again.
#
# ## The loop
#
# Stepwise DPO, with the three places where it can be changed:
#
# ```python
# for t, D_t in enumerate(chunks, 1):        # B: which pairs are next?
#     reference = score_pairs(model, D_t)    # A: who is the reference?
#     train_stage(model, D_t, reference)     # C: what does the loss make of it?
# ```
#
# $$\ell = -\log\sigma\big(\beta\,(\gamma_\theta - \gamma_{M_{t-1}})\big), \qquad \theta \text{ starting at } M_{t-1}, \quad D_1, \dots, D_T \text{ from easy to hard} \tag{1}$$
#
# $\gamma$ is how much likelier a model finds the chosen response than the rejected one, in nats; $\gamma_\theta$ is that of the policy. We run (1) on 64 pairs of each source of the [tiny world](00_world.ipynb), and then change one line at a time.

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
        start, reference = names[stage["start"]], names[stage["reference_kind"]["weights"]]
        rows[f"stage {t}"] = [stage["chunk"], start, reference, round(stage["first_loss"], 3)]
        names[stage["end"]] = f"M_{t}"
    return pd.DataFrame(rows, index=["chunk", "starts at", "reference", "first loss"]).T


# %%
stepwise = align("stepwise")
table = told(stepwise)
assert table["reference"].tolist() == table["starts at"].tolist() == ["S", "M_1", "M_2"]    # (1)
assert (table["first loss"] == 0.693).all()
table

# %% [markdown]
# The column to watch is the last. A stage that starts at its own reference begins at $\ln 2 = 0.693$. Changes of place A or C mostly show here.
#
# ## A: another reference
#
# **TR-DPO.** Why wait for the end of a stage? After every $\tau$ steps the reference takes over a share $\alpha$ of the policy's weights:
#
# $$\theta_{ref} \leftarrow \alpha\,\theta + (1-\alpha)\,\theta_{ref} \quad\text{after every } \tau \text{ steps} \tag{2}$$
#
# With $\alpha = 1$, a "hard" update, this is stepwise DPO with *random* chunks of $\tau$ batches, if optimizer and schedule go on and each pair is seen once. That is a setting. The soft update is not; TRL has it (`sync_ref_model`). Its [defaults](https://github.com/huggingface/trl/pull/5078) put together the paper's $\alpha = 0.6$ of the soft update and $\tau = 512$ of the hard one.

# %%
tr_dpo = align("TR-DPO", chunks=3, order="random", restart="never")     # hard, tau = 2 steps
rates = tr_dpo.metrics["lr"]
assert told(tr_dpo)["reference"].tolist() == ["S", "M_1", "M_2"]         # (2)
assert rates.iloc[rates.argmax():].is_monotonic_decreasing               # one schedule
told(tr_dpo)

# %% [markdown]
# **Pre-DPO.** First DPO as usual. Then S starts *again*, on the same pairs, against the model that came out:
#
# $$\ell = -\log\sigma\big(\beta\,(\gamma_\theta - \gamma_{M_1})\big), \qquad \theta \text{ starting at } S, \quad M_1 = \mathrm{DPO}(S, D), \quad \text{the same } D \tag{3}$$
#
# Will the first loss of the second run be above or below $\ln 2$?

# %%
dpo = align("DPO", chunks=1)
whose[dpo.stages[0]["end"]] = "the model of DPO"
pre_dpo = align("Pre-DPO", chunks=1, reference=str(dpo.model_folder(1)))
stage = pre_dpo.stages[0]
assert abs(stage["first_loss"] - stage["implied_first_loss"]) < 1e-4     # (3)
assert stage["first_loss"] > 1
told(pre_dpo)

# %% [markdown]
# Above: S is asked to beat a model that has seen these pairs. What DPO has learned now weighs more than one half, as $\lambda = \sigma(\beta(\gamma_{M_1} - \gamma_S))$. The same line, with any frozen model $R$ in the place of $M_1$, is the question of **Reference Policies**: $\gamma_\theta - \gamma_R$, for which $R$?
#
# ## B: other pairs, another order
#
# **Curri-DPO** is of the same month. Each prompt has rated answers, best to worst $y_1, \dots, y_4$. Stage by stage the prompts return with a closer opponent, and the reference follows:
#
# $$D_1: (y_1, y_4), \quad D_2: (y_1, y_3), \quad D_3: (y_1, y_2), \qquad \gamma_{ref} = \gamma_{M_{t-1}} \tag{4}$$
#
# Our prompts have two answers. What remains is the order, by the difference of true rewards:

# %%
graded = TRAINING_DATA["sorted"](w, S, tokenizer, "true gap", -1)["all"][::8]
curri_dpo = align("Curri-DPO", {"graded": graded}, order="as_given", chunks=3)
gaps = [abs(true_gap(row)) for row in graded]
assert gaps == sorted(gaps, reverse=True)                                # (4), the order
told(curri_dpo)

# %% [markdown]
# **2D-Curri-DPO** adds the difficulty of the prompt, and walks through a grid of both:
#
# $$\big(\mathrm{sd}_i\,\mathrm{PPL}(y^{(i)}),\; |J(y_w) - J(y_l)|\big), \qquad \gamma_{ref} \text{ follows by a rule on } \mathrm{KL}(\pi_\theta \,\|\, \pi_{ref}) \tag{5}$$
#
# The first number says how much the perplexity of several answers to the prompt varies; $J$ is the mark of a judge. (Both from a summary.) A path through such a grid is `chunks=[["easy, clear"], ["easy, close", "hard, clear"], ["hard, close"]]`, with a source for each cell. A reference that follows by the KL is no setting here.
#
# **Staged-Competence** has three chunks, a reference that moves between them, and an order *inside* a stage. At step $s$ of $n$ only the easiest share $c$ of the chunk may be drawn:
#
# $$c(s) = \sqrt{(1 - c_0^2)\,\tfrac{s}{n} + c_0^2}, \qquad \text{easy: } \cos(e_{\hat y}, e_{y_w}) - \cos(e_{\hat y}, e_{y_l}) \text{ is large} \tag{6}$$
#
# $e$ is the embedding of a text, $\hat y$ what the unaligned model answers, $c_0 = 0.01$. So a pair is easy if the model's own answer resembles the chosen one. We have no embeddings. We take $\gamma_S$, which also asks the model, and the strictest order, pair after pair:

# %%
all_pairs = concatenate_datasets([load_pairs(file).select(range(64)) for file in w.sources.values()])
staged = align("staged", {"all": all_pairs}, chunks=3, shuffle=False)
gammas = gamma_table(staged).query("model == 'M_0'").groupby("chunk")["gamma"]
assert gammas.min()["part 1"] >= gammas.max()["part 2"]                  # (6), the order
told(staged)

# %% [markdown]
# **Selective DPO** leaves the reference where it is. Judges are trained on one half of the pairs, and asked for the loss of those in the *other* half. The easier part is kept, easy pairs first:
#
# $$D' = \text{the half of } D \text{ with the smallest } -\log\sigma\big(\beta\,(\gamma_{J} - \gamma_S)\big), \quad J \text{ trained on other pairs} \tag{7}$$
#
# The loss falls as $\gamma_J - \gamma_S$ rises, so we sort by that. (They train six judges, we one.)

# %%
one_half, other_half = all_pairs.select(range(0, 192, 2)), all_pairs.select(range(1, 192, 2))
judge = align("judge", {"one half": one_half}, chunks=1).model
ids = tokenize_pairs(other_half, tokenizer, "other half", 64, 32).pairs
gain = score_pairs(judge, ids).gamma(ids) - score_pairs(S, ids).gamma(ids)
easiest = gain.argsort(descending=True)[:len(ids) // 2]                  # (7)
kept = other_half.select(easiest.tolist())
assert gain[easiest].min() >= gain.median()
told(align("selective", {"kept": kept}, chunks=1, order="as_given", shuffle=False))


# %% [markdown]
# **Self-Rewarding.** No preference pairs exist beforehand. The model of the stage before writes the answers *and* says which is better:
#
# $$D_t = \{(x, y_w, y_l)\}: \quad y_w, y_l \sim M_{t-1}(\cdot|x), \quad J_{M_{t-1}}(y_w) > J_{M_{t-1}}(y_l) \tag{8}$$
#
# $J_M$ is the mark that $M$ gives when it is asked as a judge. A tiny model cannot be asked. The nearest substitute is the implicit reward, $\log M_{t-1} - \log S$: `chunks=TRAINING_DATA["new"](w, S, tokenizer, "policy", "implicit")`, a function of the model. It runs in [with_new_data](experiments/with_new_data.ipynb).
#
# **Uniform Forgetting** makes each objective a chunk, here `TRAINING_DATA["skills"]`, and watches what a stage does to the one before: $\mathbb E_{D_1}[\gamma_{M_2} - \gamma_{M_1}]$.
#
# ## C: another loss
#
# A loss is [a function](other_losses.ipynb), `loss=`; that is the line of **Do They Differ?**, twenty times. Three losses concern the reference.
#
# **HyPO.** Where $\gamma_S < 0$, DPO is content as soon as the policy is a little less wrong than S. So such a reference does not count (9). **AlphaDPO.** The reference is the uniform distribution $U$, tilted by what the policy has gained, so it moves at every step (10). The bracket is a number, no gradient goes through it; $m$ is a margin. (Their code also takes its mean off the bracket, divides it by its spread, and counts log-probabilities by the token; we leave all three out.)
#
# $$\ell = -\log\sigma\big(\beta\,(\gamma_\theta - \max(0, \gamma_S))\big) \tag{9}$$
#
# $$\hat\pi_{ref} \propto U\,(\pi_\theta/S)^{\alpha}, \qquad \ell = -\log\sigma\big(\beta\,(\gamma_\theta - \alpha\,[\gamma_\theta - \gamma_S] - m)\big) \tag{10}$$

# %%
def hypo(chosen, rejected, ref_chosen, ref_rejected, beta, pairs):
    return F.softplus(-beta * ((chosen - rejected) - (ref_chosen - ref_rejected).clamp(min=0)))

def alpha_dpo(chosen, rejected, ref_chosen, ref_rejected, beta, pairs, alpha=0.1, margin=0.0):
    gamma, gamma_S = chosen - rejected, ref_chosen - ref_rejected
    return F.softplus(-beta * (gamma - alpha * (gamma - gamma_S).detach() - margin))

two, zero = torch.tensor([4.0, -4.0]), torch.zeros(2)                    # gamma_S = gamma, at the start
assert hypo(two, zero, two, zero, 0.3, None).allclose(F.softplus(torch.tensor([0.0, 1.2])))         # (9)
assert alpha_dpo(two, zero, two, zero, 0.3, None).allclose(F.softplus(torch.tensor([-1.2, 1.2])))   # (10)
by_loss = {loss.__name__: told(align(loss.__name__, chunks=1, loss=loss)) for loss in (hypo, alpha_dpo)}
pd.concat(by_loss)

# %% [markdown]
# Neither begins at $\ln 2$, although S is the reference: HyPO ignores it on some pairs, AlphaDPO on all. Does a moving reference get rid of pairs with $\gamma_{ref} < 0$? In our first run, on the last chunk:

# %%
gammas = gamma_table(stepwise).query("chunk == 'riddle'")
negative = gammas.assign(negative=gammas["gamma"] < 0).groupby("model")["negative"].mean()
assert negative["M_0"] > negative["M_2"] > 0.1
negative.round(2).rename("share of riddle with negative gamma").to_frame().T

# %% [markdown]
# It has fewer, and not none: $M_2$ is the reference of this chunk.
#
# **beta-DPO** leaves the reference and moves the leash. Each batch $B$ has its own $\beta$, large where the pairs are already far apart; $\bar\Delta$ is a running mean. (Their code also filters the pairs of a batch, which is left out here.)
#
# $$\beta_B = \beta\,\big(1 + a\,[\,\mathrm{mean}_B(\gamma_\theta - \gamma_S) - \bar\Delta\,]\big) \tag{11}$$
#
# In code `beta * (1 + a * (gain.mean() - running))`. This package cannot train with it, as a loss must be made from one pair alone. Stepwise DPO is a coarse relative: where all stages find the same reward, they are one stage whose $\beta$ falls to [$\beta/T$](03_loss.ipynb).
#
# **Misspecified** changes no line. It says when that theorem fails: if for every $\theta$
#
# $$k\,r(x, y) \ne \beta \log\frac{\pi_\theta(y|x)}{S(y|x)} + c(x), \tag{12}$$
#
# the reward that a stage finds depends on its pairs, and the stages need not find the same one.
#
# ## What came out here
#
# For each relative the stored comparison that is nearest to it, in ten tiny worlds: the difference of mean true reward (0 to 1) with its 95 % interval, and how far both went from S, in nats. None repeats the recipe of a paper.

# %%
NEAREST = { # relative: in words -> page, (grid, row) of both sides of the difference
    "TR-DPO: moving reference − fixed; random chunks": ("why_it_works",
        ("why_it_works", "moving, random, never"), ("why_it_works", "fixed, random, never")),
    "Selective DPO: two thirds that are learned best − at random": ("how_to_partition",
        ("how_to_partition", "DPO on the largest gaps"), ("how_to_partition", "DPO on a random part")),
    "Curri-DPO: chunks by true difference − at random": ("how_to_partition",
        ("how_to_partition", "true gap of pairs"), ("how_to_partition", "random")),
    "Staged-Competence: chunks by γ of S − at random": ("how_to_partition",
        ("how_to_partition", "gamma of pairs"), ("how_to_partition", "random")),
    "Self-Rewarding: labels by implicit reward − by the truth": ("with_new_data",
        ("with_new_data", "policy, implicit"), ("with_new_data", "policy, true")),
    "Reference Policies: against M_2 − against S": ("paper_in_miniature",
        ("paper_in_miniature", "riddle against M_2"), ("paper_in_miniature", "riddle against S")),
    "Uniform Forgetting: a stage per skill − mixed stages": ("stage_by_stage",
        ("stage_by_stage", "skills, easy_to_hard"), ("primary", "sDPO at DPO's beta")),
    "Do They Differ?: stepwise − plain DPO, each tuned": ("protocol",
        ("primary", "sDPO"), ("primary", "DPO")),
}
lines, highs, farther = ["| nearest | true reward | KL from S | page |", "|---|---|---|---|"], [], []
for words, (page, *sides) in NEAREST.items():
    one, other = (load_grid(grid)[row] for grid, row in sides)
    mean, low, high = interval(paired_difference(one, other))
    kl, other_kl = (outcome_values(rows, "kl").mean() for rows in (one, other))
    highs.append(high)
    farther.append(bool(kl > other_kl))
    difference, link = as_text((mean, low, high), "+.3f"), f"[{page}](experiments/{page}.ipynb)"
    lines.append(f"| {words} | {difference} | {kl:.1f}, {other_kl:.1f} | {link} |")
assert max(highs[:7]) < 0
assert -0.02 < low < 0 < high < 0.02                                     # of the last one
assert sum(farther) == 6
Markdown("\n".join(lines))

# %% [markdown]
# *To see:* seven times the first-named has less reward, and six of these seven times it went *farther* from S. Most of these runs share one $\beta$, the best for plain DPO, where farther means too far. So "otherwise" below mostly means "not at the same $\beta$". Many papers ask another question.
#
# | relative | here | why |
# |---|---|---|
# | Do They Differ? | alike | tuned, stepwise and plain DPO are [equal](experiments/protocol.ipynb); their warning about size holds for us |
# | Uniform Forgetting | alike | [what a stage undoes depends on its data](experiments/stage_by_stage.ipynb) |
# | Reference Policies | in part | $\beta$ decides, as there; but $M_1$ and $M_2$, stronger and similar to S, are [no better references](experiments/paper_in_miniature.ipynb) at this $\beta$ |
# | TR-DPO | in part | at one distance, [one stage is not behind three](experiments/how_many_stages.ipynb); tuned, a moving reference gains [0.012](experiments/protocol.ipynb), which is little, and in ten other worlds it is [equal to a fixed one](experiments/tuned_elsewhere.ipynb). But ours moves twice, after three passes over a chunk. With [its own schedule](experiments/tuned_elsewhere.ipynb) a soft update is better than DPO by 0.014, and by 0.007 [-0.002, +0.014] where DPO has a smaller learning rate; of a hard one we cannot tell |
# | Curri-DPO, Staged-Competence | otherwise | [of no sorted split can we say that it beats a random one](experiments/how_to_partition.ipynb); for $\gamma$, little of the harm is left at the settings of stepwise DPO. Those sources share all skills: there is no curriculum to find. Where hard [builds on easy](experiments/builds_on.ipynb), easy first is better by 0.021 with a moving reference and worse by 0.019 with a fixed one, and all at once is better than either |
# | Selective DPO | otherwise | [keeping the hardest instead is worse, too](experiments/how_to_partition.ipynb). Share, judge, order and $\beta$ are not theirs |
# | Self-Rewarding | otherwise | [on its own labels, stage 3 takes back most of what stage 2 gained](experiments/with_new_data.ipynb). A 70B model that reads before it judges is another judge |
# | Pre-DPO | otherwise | with as many passes it is [equal to DPO](experiments/tuned_elsewhere.ipynb), -0.002 [-0.009, +0.004]; its guide was run at the same $\beta$, not tuned. On [a real model](experiments/smollm2.ipynb) it is still to come, with TR-DPO |
# | AlphaDPO, beta-DPO, HyPO, 2D-Curri-DPO, Misspecified | not tried | the runs above show a line, and no more |
#
# ## What this does not show
#
# - **That a method works or fails.** The nearest run in a tiny world is not a recipe. The live runs have at most 192 pairs and one seed; only their first losses mean anything.
# - **What the papers say beyond what was read.** Formulas (2), (6), (10) and (11) follow code, (5) a summary.
# - **All relatives.** Most work that changes only the loss is left out.
#
# ## What you now have
#
# - Two questions that sort a new paper in a minute, and the line of the loop that each of fourteen changes.
# - The first loss as a test: $\ln 2$ means that a stage starts at its own reference.
#
# ## Questions to test yourself
#
# 1. Hard TR-DPO with $\tau$ larger than the number of steps: which method is it?
#
# <details><summary>Answer</summary>
#
# Plain DPO: the reference is never replaced. With sorted chunks, and $\tau$ as long as one, it is stepwise DPO with one schedule for all stages.
#
# </details>
#
# 2. HyPO begins above $\ln 2$. Can it begin below?
#
# <details><summary>Answer</summary>
#
# Not where the policy starts at S. A pair with $\gamma_S \ge 0$ has the loss $\ln 2$, as in DPO. One with $\gamma_S < 0$ has $\log(1 + e^{-\beta\gamma_S})$, which is more.
#
# </details>
#
# 3. A paper reports that a moving reference helps, at one $\beta$. Which control would you ask for?
#
# <details><summary>Answer</summary>
#
# A fixed reference with a smaller $\beta$, at the same distance from S. A moving reference lets the model go farther, and so does a smaller $\beta$ ([smaller_beta](experiments/smaller_beta.ipynb)).
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
