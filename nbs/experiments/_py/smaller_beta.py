# %% [markdown]
# # Is stepwise DPO just DPO with a smaller beta?
# > T stages at beta against one at beta / T: theory has two answers, and real chunks lie between them.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/smaller_beta.ipynb)
#
# ANSWER

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.experiments import STAGES, choices, load_grid, outcome, plot_contrasts
from sdpo_nb.loss import differences, optimal_policy
from sdpo_nb.world import K, enumerable_world

# %% [markdown]
# ## What theory says
#
# A stage that identifies the true reward $r$ of every response and is trained to its optimum multiplies its reference by $e^{kr/\beta}$ ([chapter 03](../03_loss.ipynb)). So $T$ stages on the *same* prompts end in
#
# $$M_T \propto S\,e^{T k r/\beta}, \tag{1}$$
#
# which is one stage at $\beta/T$, whatever the order. If every stage has prompts of its *own*, and nothing learned on one prompt carries over to another, each prompt is tilted once, and $T$ stages at $\beta$ are one
# stage at $\beta$. Both can be computed exactly where all responses can be listed.

# %%
w, beta = enumerable_world(), 6.0
def stage(log_ref, prompts): # the optimum on some prompts; the others keep the reference
    new = log_ref.clone(); new[prompts] = optimal_policy(log_ref[prompts], K * w.reward[prompts], beta)
    return new

def stages(chunks):
    log_pi = w.log_base
    for prompts in chunks: log_pi = stage(log_pi, prompts)
    return log_pi

both, one_each = stages([[0, 1]] * 2), stages([[0], [1]])
torch.testing.assert_close(both, optimal_policy(w.log_base, K * w.reward, beta / 2))
torch.testing.assert_close(one_each, optimal_policy(w.log_base, K * w.reward, beta))
pd.DataFrame({name: (p.exp() * w.reward).sum(1) for name, p in {"S": w.log_base, "two stages, same prompts": both, "one stage at beta/2": optimal_policy(w.log_base, K * w.reward, beta / 2),
              "two stages, one prompt each": one_each, "one stage at beta": optimal_policy(w.log_base, K * w.reward, beta)}.items()}, index=w.prompts).T.round(4)

# %% [markdown]
# ## What happens in the tiny world
#
# Chunks of the tiny world share no prompt, but they share skills, and three passes over hard labels are far from an optimum. So neither answer need hold. All pairs are cut at random into $T$ chunks; $\beta$ and learning rate are those
# that the search chose for DPO, and DPO at $\beta/T$ sees the same pairs in as many steps.

# %%
found = load_grid("smaller_beta")
assert all(len(rows) == len(next(iter(found.values()))) for rows in found.values())
def point(name): return {what: interval(outcome(found[name], what)) for what in ("sampled", "greedy", "kl")}

points = pd.DataFrame([dict(T=T, method=method, **point(name)) for T in STAGES for method, name in (("DPO at beta/T", f"DPO at beta/{T}"), ("sDPO at beta, T stages", f"sDPO, T = {T}")) if name in found])
points.set_index(["method", "T"]).sort_index().map(as_text)
