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
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import tempfile

import pandas as pd
from IPython.display import Markdown

from sdpo_nb.cli import demo
from sdpo_nb.evaluate import answers_beside
from sdpo_nb.figures import plot_gamma, plot_partition
from sdpo_nb.partition import mean_interval
from sdpo_nb.preferences import load_pairs
from sdpo_nb.report import as_markdown, gamma_table
from sdpo_nb.world import load_base, load_world

found = demo(tempfile.mkdtemp())

# %% [markdown]
# ## Which data first?
#
# The three sources are ordered by *reward accuracy* under S: the share of pairs whose chosen response S already finds likelier. S agrees with most labels of `primer`, and with half of those of `riddle`. The line marks chance.

# %%
plot_partition(found.run.partition().reset_index());

# %% [markdown]
# ## Which model is the reference?
#
# The one before. Each table of reference log-probabilities carries a hash of the weights that it came from, so this can be checked. The first loss agrees: a model that is its own reference starts at $\ln 2 = 0.693$.

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
# But at the $\beta$ that is best for DPO, stepwise DPO is *worse* than DPO. It is worse even than DPO at $\beta/T$, a weaker pull to the reference. And at $T\beta$ it equals DPO at $\beta$. Why? A reference that moves up lets the model go further from S, as a smaller $\beta$ does. If all stages saw the same
# prompts and each reached its optimum, [$T$ stages at $\beta$ would be one stage at $\beta/T$](03_loss.ipynb). That argument is about optima. These runs are short, and their sources share skills but no prompt. Here stepwise DPO falls below both.
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
# This is one world and one seed. The [experiments](experiments/protocol.ipynb) ask again in ten worlds with two seeds each, every method at its own best $\beta$ and learning rate; there the two methods are equal. And a tiny world says nothing certain of large models.
