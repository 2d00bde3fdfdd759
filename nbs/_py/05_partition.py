# %% [markdown]
# # Which data first?
# > Reward accuracy of each source under the base model, and the chunks that follow from it.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/05_partition.ipynb)

# %%
#| default_exp partition

# %%
#| export
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, concatenate_datasets

from sdpo_nb.logprobs import LogprobTable
from sdpo_nb.loss import reward_accuracy
from sdpo_nb.preferences import Source


# %%
#| export
def wilson(p: float, # a share in [0, 1]; ties may have counted one half
           n: int,   # of how many
           z: float=1.96, # normal quantile; 1.96 gives 95 %
          ) -> tuple[float, float]: # lower and upper end
    "Wilson's score interval of a share."
    mid, half = p + z*z / (2*n), z * math.sqrt(p * (1 - p) / n + z*z / (4*n*n))
    return (mid - half) / (1 + z*z/n), (mid + half) / (1 + z*z/n)


# %%
#| export
def measure_source(source: Source,        # tokenised pairs
                   table: LogprobTable,   # of M_0
                   reference: LogprobTable=None, # reads the reward against this model instead of reference-free
                  ) -> dict:              # one row of the partition table
    "Reward accuracy of one source under M_0, with what a careful reader wants beside it."
    rows = [source.pairs[i] for i in range(len(source))]
    chosen, rejected = table.lookup(rows)
    g = chosen - rejected
    right = reward_accuracy(g, reference.gamma(rows) if reference else 0.)
    nw, nl = (torch.tensor([len(r[f"{s}_ids"]) for r in rows]).float() for s in ("chosen", "rejected"))
    accuracy = right.mean().item(); low, high = wilson(accuracy, len(rows))
    per_token = reward_accuracy(chosen / nw - rejected / nl)
    return dict(source=source.name, n=len(rows), accuracy=accuracy, low=low, high=high, ties=int((right == 0.5).sum()),
                accuracy_per_token=per_token.mean().item(),
                decided_by_length=(reward_accuracy(g) != per_token).float().mean().item(),
                truncated=float(np.mean([r["truncated"] for r in rows])), mean_gamma=g.mean().item())


# %%
#| export
ORDERS = ("easy_to_hard", "hard_to_easy", "as_given", "random")

@dataclass
class Partition:
    "Which pairs each stage trains on."
    measures: pd.DataFrame # one source a row, in the order of training
    chunks: list           # T lists of row numbers of `pairs`
    names: list            # T names
    pairs: Dataset         # all pairs of all sources, in the order given

    def chunk(self, t: int) -> Dataset: return self.pairs.select(self.chunks[t])


# %%
#| export
def partition(sources: list,        # `Source`s in the order given
              table: LogprobTable,  # of M_0
              order: str="easy_to_hard", # one of ORDERS
              chunks: int=None,     # T; None: one per source
              seed: int=0,          # of the random order
              reference: LogprobTable=None, # other reading of the reward
             ) -> Partition:
    "Chunks of the paper: sources by descending reward accuracy under M_0; ties keep the order given."
    if order not in ORDERS: raise ValueError(f"order: {order!r} is none of {', '.join(ORDERS)}")
    pairs = concatenate_datasets([s.pairs for s in sources])
    T = chunks or len(sources)
    if not 1 <= T <= len(pairs): raise ValueError(f"chunks: {T} chunks cannot be cut from {len(pairs)} pairs")
    measures = pd.DataFrame([measure_source(s, table, reference) for s in sources])
    ranks = _source_order(measures["accuracy"].tolist(), "easy_to_hard" if order == "random" else order)
    starts = np.cumsum([0] + [len(s) for s in sources])
    rows = [np.arange(starts[i], starts[i+1]) for i in ranks]
    if len(sources) == 1 and T > 1: rows = [_pair_order(pairs, table, order)]
    if T != len(sources): rows = np.array_split(np.concatenate(rows), T)
    names = [sources[i].name for i in ranks] if T == len(sources) else [f"part {t+1}" for t in range(T)]
    if order == "random":
        shuffled = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).numpy()
        rows, names = np.split(shuffled, np.cumsum([len(r) for r in rows])[:-1]), [f"random {t+1}" for t in range(T)]
    return Partition(measures.iloc[ranks].reset_index(drop=True), [r.tolist() for r in rows], names, pairs)


# %%
#| export
def _source_order(accuracy, order):
    idx = list(range(len(accuracy)))
    if order == "easy_to_hard": idx.sort(key=lambda i: -accuracy[i])
    if order == "hard_to_easy": idx.sort(key=lambda i: accuracy[i])
    return idx

def _pair_order(pairs, table, order):
    g = table.gamma([pairs[i] for i in range(len(pairs))]).numpy()
    if order in ("as_given", "random"): return np.arange(len(g))
    return np.argsort(-g if order == "easy_to_hard" else g, kind="stable")
