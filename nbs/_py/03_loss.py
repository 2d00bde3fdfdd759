# %% [markdown]
# # The DPO loss
# > Bradley-Terry, the KL-regularised objective, its closed form, the loss and its gradient: every line checked.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/03_loss.ipynb)

# %%
#| default_exp loss

# %%
#| export
import math

import torch
import torch.nn.functional as F
from torch import Tensor


# %%
#| export
def dpo_loss(gamma_theta: Tensor, # (n,) log-ratio of the policy, nats
             gamma_ref: Tensor,   # (n,) log-ratio of the reference, nats
             beta: float,         # strength of the pull to the reference, > 0, per nat
             label_smoothing: float=0., # probability that a label is flipped, in [0, 0.5)
            ) -> Tensor:          # (n,) loss of each pair
    "-log sigmoid(beta (gamma_theta - gamma_ref)): Eq. 1 of the sDPO paper, Eq. 7 of the DPO paper, per pair."
    delta = beta * (gamma_theta - gamma_ref)
    return (1 - label_smoothing) * F.softplus(-delta) + label_smoothing * F.softplus(delta)


# %%
#| export
def reward_accuracy(gamma_theta: Tensor,  # (n,) log-ratio of the policy, nats
                    gamma_ref: Tensor|float=0., # (n,) of the reference; 0 reads the policy reference-free
                   ) -> Tensor:           # (n,) 1 right, 0 wrong, 0.5 tie; the mean is the reward accuracy
    "Does the implicit reward rank the chosen response first? Ties count one half."
    delta = gamma_theta - gamma_ref
    return (delta > 0).float() + 0.5 * (delta == 0).float()


# %%
#| export
def reward(logp: Tensor,     # (n,) log pi_theta(y|x), nats
           logp_ref: Tensor, # (n,) log pi_ref(y|x), nats
           beta: float,      # per nat
          ) -> Tensor:       # (n,) implicit reward, up to a constant of the prompt
    "beta (log pi_theta - log pi_ref)."
    return beta * (logp - logp_ref)


# %%
#| export
def certificate(loss: float,           # mean plain sigmoid DPO loss of M_t over a set of pairs
                mean_gamma_ref: float, # mean gamma_ref over the same pairs, nats
                beta: float,           # per nat
               ) -> float:             # lower bound of mean gamma_theta over them, nats
    "E gamma_theta >= E gamma_ref - log(e^L - 1) / beta, by Jensen; above E gamma_ref exactly when L < ln 2."
    return mean_gamma_ref - math.log(math.expm1(loss)) / beta
