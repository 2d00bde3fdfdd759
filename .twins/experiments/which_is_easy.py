# %% [markdown]
# # Which source is easy?
# > Easy to hard by the summed log-ratio, or by the log-ratio per token? On real pairs the two orders differ, and this page asks whether it matters.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/which_is_easy.ipynb)
#
# **There are no answers yet.** This page says what is asked, and was committed before anything was run.
#
# **You should know** the [partition](../05_partition.ipynb), and how [SmolLM2 is trained in draws](smollm2.ipynb). **Time** ten minutes to read, a few seconds to run.
#
# Stepwise DPO begins with the source that is easiest for S: the one with the largest share of pairs in which S finds the chosen response likelier than the rejected one. *Likelier* can be read in two ways: by the sum over the tokens of a response, or per token. A sum favours short responses, whatever they say.

# %%
#| default_exp which_is_easy

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
import pandas as pd

from sdpo_nb.smollm2 import DRAWS, MARGINS, grid_of

# %% [markdown]
# ## Does the order matter for training?
#
# Three sources: Orca, HH and UltraFeedback. So three stages, easy to hard by either measure, and each order the other way round. If the two measures give exactly opposite orders, `sum, hard first` and `per token` are one arm, and it is run once. Beside them stands plain DPO on the same pairs.
#
# The roles of pairs, the eight draws, the grid of the search and the outcome are those of [the first experiment](smollm2.ipynb); here the pairs of HH are trained on and measured, too (950 in the pool, 200 held out). The margins are the same.

# %%
#| export
EASY_ARMS = { # name -> order of the sources, under S
    "DPO": None,                    # all at once
    "sum": ("sum", 1),              # by the share of pairs with a positive sum, easy first
    "sum, hard first": ("sum", -1),
    "per token": ("per token", 1),
    "per token, hard first": ("per token", -1),
}
EASY_PRIMARY = pd.DataFrame([
    ("easy first by sum against per token", "sum", "per token"),
    ("easy first by sum against plain", "sum", "DPO"),
], columns=["question", "a", "b"])

# %%
EASY_PRIMARY.set_index("question")

# %%
runs = len(EASY_ARMS) * (len(grid_of("DPO")) + len(DRAWS))
print(f"at most {runs} runs; margins: {MARGINS}")

# %% [markdown]
# The same assay rule holds: the outcome counts only if DPO minus S exceeds twice its margin.
