# %% [markdown]
# # Other losses
# > A loss is a function of a few lines. Three that people ask for, on one small run each: IPO, DPO with a term for the chosen response, DPO by the token.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/other_losses.ipynb)
#
# **You should know** the [DPO loss](03_loss.ipynb) and what a [run](14_stepwise.ipynb) is. **Time**: 25 minutes to read, a minute to run on two CPU cores.
#
# Papers change the loss of DPO more often than anything else. So it is no list of names to choose from. It is a function, and you can write it:
#
# ```python
# def my_loss(chosen, rejected, ref_chosen, ref_rejected, beta, pairs):
#     ...
#     return losses  # one number per pair
#
# sdpo(model, sources, StepwiseConfig(loss=my_loss), folder)
# ```
#
# | argument | what it is |
# |---|---|
# | `chosen`, `rejected` | $\log\pi_\theta$ of the two responses, one number per pair, in nats; the gradient goes through them |
# | `ref_chosen`, `ref_rejected` | the same numbers of the reference, out of its table |
# | `beta` | the setting $\beta$; the function says what it means |
# | `pairs` | the tokenised pairs themselves, as dictionaries: `chosen_ids`, `rejected_ids`, `prompt_ids` |
#
# A batch is [cut into micro-batches](06_trainer.ipynb), so a function sees some pairs of it at a time. The loss of a pair must be made from this pair alone.

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

from sdpo_nb.evaluate import as_text, held_out
from sdpo_nb.folder import read_part
from sdpo_nb.logprobs import read_table
from sdpo_nb.preferences import load_pairs
from sdpo_nb.stepwise import StepwiseConfig, sdpo
from sdpo_nb.verify import verify
from sdpo_nb.world import complaint, load_world

torch.set_num_threads(1)
pd.set_option("display.width", 180, "display.max_columns", 20);


# %% [markdown]
# ## DPO, written out
#
# We begin with the loss that we know. Written as a function it must train the same model, to the bit:

# %%
def dpo(chosen, rejected, ref_chosen, ref_rejected, beta, pairs):
    gain = (chosen - rejected) - (ref_chosen - ref_rejected)
    return F.softplus(-beta * gain)


# %% [markdown]
# Every run of this page trains one stage on the first 200 pairs of each source of the tiny world. The next 100 of each are held out.

# %%
world, runs = load_world(), Path(tempfile.mkdtemp())
trained = {name: dict(source=file, max_pairs=200) for name, file in world.sources.items()}
unseen = concatenate_datasets([load_pairs(file).select(range(200, 300)) for file in world.sources.values()])

def run_with(loss, beta=0.9, folder=None):
    settings = dict(chunks=1, lr=1e-4, epochs=3, precision="fp32", max_length=64)
    config = StepwiseConfig(loss=loss, beta=beta, **settings)
    folder = folder or runs / f"{getattr(loss, '__name__', 'default')}-{beta}"
    return sdpo(world.base, trained, config, folder, held_out=dict(unseen=unseen))

def end(run): return run.stages[-1]["end"]


# %%
plain, written_out = run_with(None), run_with(dpo)
assert end(plain) == end(written_out)
dict(default=end(plain), written_out=end(written_out))


# %% [markdown]
# ## IPO: stop when it is enough
#
# The DPO loss never ends. Where the labels agree with each other, it pushes $\Delta = \gamma_\theta - \gamma_{ref}$ on for ever, a little less each time. IPO (arXiv 2310.12036) names a target instead:
#
# $$\ell = \Big(\Delta - \frac{1}{2\beta}\Big)^2 \tag{1}$$
#
# - $\Delta$: the gain of the pair, in nats, as in DPO;
# - $\frac1{2\beta}$: where it should go. Beyond it, the gradient points *back*.

# %%
def ipo(chosen, rejected, ref_chosen, ref_rejected, beta, pairs):
    gain = (chosen - rejected) - (ref_chosen - ref_rejected)
    return (gain - 1 / (2 * beta)) ** 2

gain = torch.tensor([0.0, 0.5, 1.0, 2.0], requires_grad=True)
zero = torch.zeros(4)
slope, = torch.autograd.grad(ipo(gain, zero, zero, zero, 0.5, None).sum(), gain)   # target: 1 nat
assert slope[2] == 0 and slope[3] > 0                                             # (1)
slope.tolist()

# %% [markdown]
# What must the first loss of a run be? Policy and reference are the same model, $\Delta = 0$, so by (1) it is $1/4\beta^2$, and not $\ln 2$. The [first look](06_trainer.ipynb) of a stage knows that: it puts the numbers of the table into *your* function, and compares.

# %%
by_ipo = run_with(ipo)
first, must = by_ipo.stages[0]["first_loss"], by_ipo.stages[0]["implied_first_loss"]
assert abs(must - 1 / (4 * 0.9**2)) < 1e-4
assert abs(first - must) < 1e-4
dict(first_loss=round(first, 4), by_the_table=round(must, 4))


# %% [markdown]
# ## DPO that keeps the chosen response likely
#
# In DPO the chosen response may become less likely, as long as the rejected one falls faster. If you do not want that, add what fine-tuning on the chosen responses would ask for. The weight $\alpha$ is a number in your function:
#
# $$\ell = -\log\sigma(\beta\Delta) - \alpha\,\frac{\log\pi_\theta(y_w|x)}{|y_w|} \tag{2}$$
#
# The second term is the mean over the tokens of $y_w$, of which there are $|y_w|$. The pairs know how many.

# %%
def tokens(pairs, side, like):
    "How long the responses are: one number per pair, beside the log-probabilities."
    return torch.tensor([len(p[f"{side}_ids"]) for p in pairs], device=like.device)

def dpo_and_sft(chosen, rejected, ref_chosen, ref_rejected, beta, pairs, alpha=1.0):
    losses = dpo(chosen, rejected, ref_chosen, ref_rejected, beta, pairs)
    return losses - alpha * chosen / tokens(pairs, "chosen", chosen)

three_tokens = [dict(chosen_ids=[5, 6, 7])]
one = torch.tensor([-6.0])
ln_2 = F.softplus(torch.tensor(0.0))
assert dpo_and_sft(one, one, one, one, 0.9, three_tokens).item() == ln_2 + 2     # (2)
by_dpo_and_sft = run_with(dpo_and_sft)


# %% [markdown]
# ## DPO by the token
#
# $\gamma$ is a difference of sums, so a long response weighs more than a short one. One can divide first:
#
# $$\ell = -\log\sigma\Big(\beta\,\Big[\frac{1}{|y_w|}\log\frac{\pi_\theta(y_w|x)}{\pi_{ref}(y_w|x)} - \frac{1}{|y_l|}\log\frac{\pi_\theta(y_l|x)}{\pi_{ref}(y_l|x)}\Big]\Big) \tag{3}$$

# %%
def per_token(chosen, rejected, ref_chosen, ref_rejected, beta, pairs):
    gain_chosen = (chosen - ref_chosen) / tokens(pairs, "chosen", chosen)
    gain_rejected = (rejected - ref_rejected) / tokens(pairs, "rejected", rejected)
    return F.softplus(-beta * (gain_chosen - gain_rejected))


# %% [markdown]
# By hand: two gains of 6 nats, one over three tokens and one over six, differ by 2 - 1 = 1 nat per token.

# %%
lengths = [dict(chosen_ids=[1] * 3, rejected_ids=[1] * 6)]
six, none = torch.tensor([6.0]), torch.tensor([0.0])
by_hand = per_token(six, six, none, none, 0.9, lengths)
assert by_hand.allclose(F.softplus(torch.tensor(-0.9)))                          # (3)
by_hand.item()

# %% [markdown]
# $\beta$ now counts nats *per token*. The responses of the tiny world have about six tokens. So the old $\beta$ is a leash about six times as long. We try it, and six times as large:

# %%
per_token_09, per_token_54 = run_with(per_token), run_with(per_token, beta=5.4)

# %% [markdown]
# ## What they do
#
# All runs saw the same pairs in the same order. What has each done to pairs that it never saw? Before you look: which of them has changed $\gamma$ the most, and which the least?

# %%
compared = {
    "DPO": plain,
    "IPO": by_ipo,
    "DPO + SFT": by_dpo_and_sft,
    "by the token": per_token_09,
    "by the token, β = 5.4": per_token_54,
}
measures = ["change of gamma", "log-ratio of chosen", "log-ratio of rejected", "prefers chosen"]

def told(run): return run.held_out().loc[("unseen", "after stage 1", "S"), measures]

found = pd.DataFrame({name: told(run) for name, run in compared.items()}).T
found.map(as_text)

# %%
fig, ax = plt.subplots(figsize=(6.5, 2.8))
chosen_color, rejected_color = sns.color_palette("colorblind")[:2]
for y, (name, row) in enumerate(found.iterrows()):
    for side, color in (("chosen", chosen_color), ("rejected", rejected_color)):
        mean, low, high = row[f"log-ratio of {side}"]
        ax.plot([low, high], [y, y], color=color, lw=2)
        ax.plot(mean, y, "o", color=color)
        if y == 0: ax.text(mean, -0.35, side, color=color, ha="center")
ax.axvline(0, color="grey", ls=":", lw=1)
ax.text(0.1, 4.45, "S", color="grey")
what = "change of log-probability since S (nats, 95 % interval)"
ax.set(ylim=(4.7, -0.8), xlabel=f"{what}\n←  less likely than under S")
ax.set_yticks(range(len(found)), found.index)
sns.despine()


# %%
def mean_of(name, measure): return found.loc[name, measure][0]

change = {name: mean_of(name, "change of gamma") for name in found.index}
assert change["IPO"] == min(change.values())
assert change["by the token"] == max(change.values())
assert abs(change["by the token, β = 5.4"] - change["DPO"]) < 0.5
assert change["IPO"] < 0.5 * 1 / (2 * 0.9)
assert mean_of("DPO + SFT", "log-ratio of chosen") > mean_of("DPO", "log-ratio of chosen")
target = 1 / (2 * 0.9)
dict(target_of_ipo=round(target, 3), change={name: round(value, 2) for name, value in change.items()})


# %% [markdown]
# *To see*, from top to bottom:
#
# - IPO moved $\gamma$ least: on these held-out pairs, by less than half of its target. Beyond the target its loss pushes back. At the same $\beta$ it is much tighter than DPO. Two losses at one $\beta$ are not comparable: choose $\beta$ for each ([demo](demo.ipynb) shows how).
# - With the SFT term both responses fell a little less than under DPO. In the figure the intervals overlap. Pair by pair the difference can be told, below.
# - By the token and with the old $\beta$, both responses fell the farthest. With six times the $\beta$ it is nearly DPO again: here all responses are about equally long, so a division by the length is a division of $\beta$. With real pairs the two differ where lengths do.
#
# Is the chosen response of the *same* pair likelier with the SFT term than without? `held_out` compares any two models pair by pair:

# %%
def said_by(run): return read_table(run.folder / "stage-1/logprobs")

keys = read_part(plain.folder / "held_out.json")["unseen"]["keys"]
against_dpo = held_out(said_by(by_dpo_and_sft), said_by(plain), [dict(key=key) for key in keys], beta=0.9)
assert against_dpo["log-ratio of chosen"][1] > 0
as_text(against_dpo["log-ratio of chosen"])

# %% [markdown]
# It is: the whole interval is above zero. It is also small. A larger $\alpha$ does more.
#
# **What this does not show.** One world, one seed, one stage: no loss is better than another by this table.
#
# ## What a run knows of your function
#
# A function cannot be written into a file; its name can. The name goes into `config.yaml`, and the folder refuses another one. (It cannot see that you changed the *body* of a function. Then take another name, or another folder.)

# %%
print(by_ipo.config["settings"]["loss"])
print(complaint(run_with, loss=dpo, folder=by_ipo.folder).replace(f"{by_ipo.folder}: ", ""))


# %% [markdown]
# What cannot work is refused before anything is computed. A function needs a name, and the right arguments. A text is no function, so neither a file nor the command line can give one:

# %%
def too_few(chosen, rejected): return rejected - chosen

for wrong in (lambda *six: six, too_few, "ipo"): print(complaint(StepwiseConfig, loss=wrong))

# %% [markdown]
# The report says whose loss it shows. Its *other* losses, on held-out pairs and in the table of stages, are DPO's all the same, so that runs can be compared; and the [certificate](03_loss.ipynb) holds for every model, whatever it was trained with. `sdpo verify` checks all of these, and says what it cannot check:

# %%
print(by_ipo.report().path.read_text().split("\n\n")[2])
checked = verify(by_ipo.folder)
assert "DIFFERS" not in checked["result"].tolist()
for name in ("stage 1: numbers", "stage 1: first loss"): print(name, *checked.loc[name], sep=" | ")

# %% [markdown]
# ## What you now have
#
# - A loss as a function of four log-probabilities, $\beta$ and the pairs; three of them.
# - A first look that knows what your first loss must be.
#
# ## Questions to test yourself
#
# 1. Why may a loss not divide by the mean over the pairs that it is given?
#
# <details><summary>Answer</summary>
#
# It is given a micro-batch, and how a batch is cut depends on `token_budget` and on the device. The same settings would then train another model on another machine.
#
# </details>
#
# 2. A stage starts at S, its reference is $M_1$. Is the first loss of IPO still $1/4\beta^2$?
#
# <details><summary>Answer</summary>
#
# No. Then $\Delta = \gamma_S - \gamma_{M_1}$ is not zero. The tables of S and of $M_1$ say how large it is for each pair, and the first look puts both into the function.
#
# </details>
#
# 3. Which $\beta$ would you begin with, if you train by the token on responses of 200 tokens?
#
# <details><summary>Answer</summary>
#
# With 0.1 by the sum, $\beta = 0.1 \cdot 200 = 20$ by the token holds a response of this length as tightly. Then look at how far the held-out log-ratios move.
#
# </details>
#
# ## Try this
#
# - Write `dpo_and_much_sft`, which calls `dpo_and_sft` with `alpha=4.0`, and run it. What happens to the two log-ratios?
#
# <details><summary>What you should see</summary>
#
# That of chosen is -0.005, with an interval from -0.10 to 0.09: the chosen responses stay where they were. That of rejected is -0.81, and was -1.20 without the term. The change of $\gamma$ is 0.81: keeping the chosen ones costs some of what DPO learns.
#
# </details>
