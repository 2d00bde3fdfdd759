# %% [markdown]
# # How many stages?
# > T from 1 to 8, with the same pairs, steps and learning rates, and what each more costs.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/how_many_stages.ipynb)
#
# ANSWER
#
# **You should know** [stepwise DPO](../09_stepwise.ipynb) and the [protocol](protocol.ipynb). **Time** a few seconds; the grid behind it took HOURS (`make experiments`).

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from sdpo_nb.evaluate import as_text, interval
from sdpo_nb.experiments import choices, load_grid, outcome

# %% [markdown]
# The paper has two stages, one per source, and asks what more would do. Here the pairs of the three sources, easy first, are cut into $T$ equal parts. Pairs, passes, optimizer steps and learning rates are the same for every $T$; $\beta$ is the one that is
# best for three stages, and again for every $T$ divided so that $\beta/T$ stays what it is at $T = 3$.
