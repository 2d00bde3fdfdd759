# %% [markdown]
# # Five minutes with sDPO
# > The whole book in one run: order the data, train in stages, and ask whether it helped, in a world where that can be known.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/demo.ipynb)
#
# **You should know** what [DPO and its stages](welcome.ipynb) are. **Time** 10 minutes to read, one or two to run.
#
# The [tiny world](00_world.ipynb) has four skills on short strings (copy, reverse, sort, shift), and a start model S that learned the wrong rule for half of the prompts. It also has a *true reward*: of every answer we know how good it is, from 0 to 1. So we can see whether alignment worked.
#
# This cell is what `sdpo demo` does. It chooses $\beta$ for plain DPO on validation prompts, and then runs stepwise DPO with it, so that stepwise DPO has to beat a tuned opponent.

# %%
#| default_exp demo

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
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from sdpo_nb.evaluate import as_text
from sdpo_nb.partition import mean_interval
from sdpo_nb.stepwise import Run, StepwiseConfig, sdpo
from sdpo_nb.world import load_base, load_world, true_rewards

# %%
import tempfile

from IPython.display import Markdown

from sdpo_nb.demo import demo
from sdpo_nb.evaluate import answers_beside
from sdpo_nb.figures import plot_gamma, plot_partition
from sdpo_nb.preferences import load_pairs
from sdpo_nb.report import as_markdown, gamma_table

found = demo(tempfile.mkdtemp())

# %% [markdown]
# ## Which data first?
#
# The three sources are ordered by *reward accuracy* under S: the share of pairs whose chosen response S already finds likelier. S agrees with most labels of `primer`, and with half of those of `riddle`. The line marks chance. A whisker is a 95 % interval. A diamond is the same share by the *mean* log-probability of a token instead of the sum; here the two say the same.

# %%
plot_partition(found.run.partition().reset_index());

# %% [markdown]
# ## Which model is the reference?
#
# The one before. Each table of reference log-probabilities carries a hash of the weights that it came from, so this can be checked. The first loss agrees: a model that is its own reference starts at $\ln 2 = 0.693$. Three rows matter now, `reference`, `first loss` and `change of gamma`; [chapter 11](11_report.ipynb) explains the others.

# %%
stages = found.run.stages
before = [found.run.config["weights"]] + [s["end"] for s in stages[:-1]]
assert [s["reference_kind"]["weights"] for s in stages] == before
Markdown(as_markdown(found.run.table()))

# %% [markdown]
# ## What happens to the bar?
#
# $\gamma$ says how much likelier the chosen response is than the rejected one. The $\gamma$ of its reference is the *bar* of a stage: what counts is how far the policy gets above it. The mean of $\gamma$ climbs from model to model on every chunk, also on those that have not been trained on yet (hollow boxes). So the bar of a stage is higher than S would have set it.

# %%
gammas = gamma_table(found.run)
means = gammas.groupby(["chunk", "model"])["gamma"].mean().unstack()
assert (means.diff(axis=1).iloc[:, 1:] > 0).all(axis=None)
plot_gamma(gammas);

# %% [markdown]
# ## Did it help?
#
# $\beta$ was chosen before, for plain DPO:

# %%
Markdown(as_markdown(found.choice.to_frame()))

# %% [markdown]
# And here is the true reward on test prompts, with 95 % intervals over prompts. *S at its best temperature* shows what sharpening alone gives: S says what it already knows, more often.

# %%
Markdown(as_markdown(found.table()))

# %% [markdown]
# All four trained models are far above S, at any temperature. This is alignment, not sharpening.
#
# But at the $\beta$ that is best for DPO, stepwise DPO is *worse* than DPO. It is worse even than DPO at $\beta/T$, a weaker pull to the reference. And at $T\beta$ it equals DPO at $\beta$. Why? A reference that moves up lets the model go further from S, as a smaller $\beta$ does ([measured](experiments/paper_in_miniature.ipynb) in ten worlds). If every stage found the same
# reward and reached its optimum, [$T$ stages at $\beta$ would be one stage at $\beta/T$](03_loss.ipynb). That argument is about optima. These runs are short, and their sources share skills but no prompt. Here stepwise DPO falls below both.
#
# The cell below holds this page to what it says.

# %%
files = load_world().sources.values()
prompts = [{str(row["prompt"]) for row in load_pairs(file)} for file in files]
assert len(set.union(*prompts)) == sum(map(len, prompts))       # no prompt is shared

reward = found.rewards["sampled"]
S, sharp, dpo, small, stepwise, large = reward.columns
trained = reward[[dpo, small, stepwise, large]].mean()
assert trained.min() > reward[[S, sharp]].mean().max() + 0.05

# %%
asked = ((stepwise, dpo), (stepwise, small), (large, dpo))
differences = {f"{a} minus {b}": mean_interval(reward[a] - reward[b]) for a, b in asked}
worse = [high < 0 for _, _, high in differences.values()]
assert worse == [True, True, False]
assert abs(differences[f"{large} minus {dpo}"][0]) < 0.01
Markdown(as_markdown(pd.DataFrame(differences, index=["mean", "low", "high"]).T))

# %% [markdown]
# ## What do the answers look like?
#
# The rule for picking prompts: of each skill, the first test prompt that S gets wrong; then the first that S gets right and the aligned model gets wrong.

# %%
base, tokenizer = load_base(load_world())
answers_beside(base, found.run.model, tokenizer, load_world().test)


# %% [markdown]
# ## What this does not show
#
# This is one world and one seed. The [experiments](experiments/protocol.ipynb) ask again in ten worlds with two seeds each, every method at its own best $\beta$ and learning rate; there the two methods are equal. And a tiny world says nothing certain of large models; its sources share all skills, so there is no curriculum to find.

# %% [markdown]
# ## How the demo is made
#
# You may stop here. What follows is the program of this page. It has one rule: stepwise DPO must beat a *tuned* opponent. So $\beta$ is chosen for plain DPO, on validation prompts, and only then stepwise DPO is run with it. Three controls decide what the result means:
#
# - *S at its best temperature* shows what sharpening alone would give: S already knows some answers, and says them more often when it is less random;
# - *DPO at* $\beta/T$ shows what a weaker pull to the reference would give;
# - *sDPO at* $T\beta$ cancels the weaker pull: $T$ stages at $T\beta$ hold the model about as tightly as one stage at $\beta$.
#
# First, how one model is asked. All models answer the same prompts with the same random numbers, so their differences are paired.

# %%
#| export
def demo_rewards(
    S,      # the base model
    models: dict, # name -> trained model
    tokenizer,    # of all of them
    prompts: list, # test prompts
    tau: float,    # the best temperature of S, chosen on validation prompts
) -> dict: # sampled, greedy -> data frame of true rewards: one row per prompt, one column per model
    "What S and the trained models earn on test prompts, sampled and greedy."
    def ask(model, tau): return true_rewards(model, tokenizer, prompts, tau, seed=1)
    best = f"S at its best temperature, {tau}"
    sampled = {"S": ask(S, 1.0), best: ask(S, tau)}
    greedy = {"S": ask(S, 0.0)}
    greedy[best] = greedy["S"]
    for name, model in models.items():
        sampled[name] = ask(model, 1.0)
        greedy[name] = ask(model, 0.0)
    return dict(sampled=pd.DataFrame(sampled), greedy=pd.DataFrame(greedy))


# %%
few = load_world().test[:20]
rewards = demo_rewards(base, {"sDPO": found.run.model}, tokenizer, few, tau=0.2)
rewards["sampled"].head(3).round(3)


# %% [markdown]
# The rewards are kept prompt by prompt, and become means with intervals only where they are shown. The intervals say how sure we are about *these* models on new prompts. They say nothing about other training seeds or other worlds.

# %%
#| export
def reward_table(
    rewards: dict, # of `demo_rewards`
) -> pd.DataFrame: # model: the index
    "Means with 95 % intervals, and the paired difference to the first trained model, the third column."
    def show(values, digits=".3f"): return as_text(mean_interval(values.tolist()), digits)
    sampled, greedy = rewards["sampled"], rewards["greedy"]
    first = sampled.columns[2]
    rows = {}
    for name in sampled:
        minus = show(sampled[name] - sampled[first], "+.3f")
        rows[name] = {
            "sampled": show(sampled[name]),
            "greedy": show(greedy[name]),
            f"sampled, minus {first}": "" if name == first else minus,
        }
    return pd.DataFrame(rows).T.rename_axis("model")


# %% [markdown]
# With invented rewards of four prompts: the fourth model is a little better than the third on each of them. The intervals of the two overlap widely, but that of their *difference* does not contain zero. This is why differences are taken prompt by prompt.

# %%
made_up = pd.DataFrame({
    "S": [0.1, 0.4, 0.5, 0.8],
    "S, sharp": [0.1, 0.4, 0.5, 0.8],
    "DPO": [0.2, 0.5, 0.6, 0.9],
    "sDPO": [0.23, 0.54, 0.63, 0.94],
})
reward_table(dict(sampled=made_up, greedy=made_up))


# %% [markdown]
# The program itself. Each run has a folder of its own, so a demo that is stopped goes on where it was.

# %%
#| export
@dataclass
class Demo:
    "What the demo found."
    run: Run          # the stepwise run, at the beta that was best for DPO
    beta: float       # that beta; k = 6
    choice: pd.Series # mean true reward of DPO on validation prompts, by beta
    rewards: dict     # of `demo_rewards`

    def table(self) -> pd.DataFrame: return reward_table(self.rewards)

SETTINGS = dict(lr=1e-4, epochs=3, precision="fp32", max_length=64)
TEMPERATURES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0) # tried for S

def demo(
    folder="runs/demo",    # of the runs, one inside it for each
    betas=(0.1, 0.3, 0.9), # tried for DPO; a factor of T apart, so that DPO at beta / T is mostly one of them
) -> Demo:
    "The tiny world from partition to true reward."
    torch.set_num_threads(1) # fastest for a model this small
    w = load_world()
    S, tokenizer = load_base(w)

    def run(beta, chunks=None): # with chunks = 1 it is plain DPO
        config = StepwiseConfig(beta=round(beta, 6), chunks=chunks, **SETTINGS)
        name = f"T-{chunks or len(w.sources)}-beta-{beta:.3g}"
        return sdpo(w.base, w.sources, config, Path(folder) / name)

    def earned(model, tau=1.0): # mean true reward of one response per validation prompt
        return mean_interval(true_rewards(model, tokenizer, w.validation, tau))[0]

    by_beta = {beta: earned(run(beta, chunks=1).model) for beta in betas}
    choice = pd.Series(by_beta, name="DPO: mean true reward, validation").rename_axis("beta")
    beta = float(choice.idxmax())
    stepwise = run(beta)
    T = len(stepwise.stages)
    models = {
        f"DPO({beta:.2g})": run(beta, chunks=1).model,
        f"DPO(beta/T = {beta/T:.2g})": run(beta / T, chunks=1).model,
        f"sDPO({beta:.2g})": stepwise.model,
        f"sDPO(T beta = {T*beta:.2g})": run(T * beta).model,
    }
    by_tau = {tau: earned(S, tau) for tau in TEMPERATURES}
    tau = max(by_tau, key=by_tau.get)
    return Demo(stepwise, beta, choice, demo_rewards(S, models, tokenizer, w.test, tau))


# %%
assert found.table().equals(reward_table(found.rewards)) # the table above
found.beta, len(found.run.stages), list(found.choice.index)
