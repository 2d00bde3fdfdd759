# %% [markdown]
# # The pictures of a run
# > Partition bars, the loss over stages, the distribution of gamma, the drift of chosen and rejected: one function, one figure.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/07_figures.ipynb)

# %%
#| default_exp figures

# %%
#| export
import math

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns


# %%
#| export
def plot_partition(measures: pd.DataFrame, # one source a row: source, accuracy, low, high, accuracy_per_token
                  ) -> plt.Figure:
    "Reward accuracy of each source under M_0 with its 95 % interval, in the order of training."
    fig, ax = plt.subplots(figsize=(6, 0.6 * len(measures) + 1.2))
    y = range(len(measures))
    err = [measures["accuracy"] - measures["low"], measures["high"] - measures["accuracy"]]
    ax.barh(y, measures["accuracy"], xerr=err, color=sns.color_palette()[0], alpha=0.8, capsize=3, label="sum over tokens")
    ax.plot(measures["accuracy_per_token"], y, "D", color=sns.color_palette()[1], label="mean per token")
    ax.axvline(0.5, color="grey", ls=":", label="chance")
    ax.set(yticks=list(y), yticklabels=[f"{t+1}. {s}" for t, s in enumerate(measures["source"])], xlim=(0, 1),
           xlabel="reward accuracy under $M_0$ (share of pairs)")
    ax.invert_yaxis(); ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncol=3, frameon=False, fontsize="small")
    return fig


# %%
#| export
def plot_loss(metrics: pd.DataFrame, # stage, loss; one optimizer step a row
             ) -> plt.Figure:
    "Loss of each optimizer step, stages side by side; ln 2 is where a stage starts when target = reference."
    fig, ax = plt.subplots(figsize=(6.5, 3))
    m = metrics.reset_index(drop=True)
    window = max(1, len(m) // 30)
    for i, (stage, rows) in enumerate(m.groupby("stage")):
        ax.plot(rows.index, rows["loss"], color=sns.color_palette()[i % 10], alpha=0.3)
        ax.plot(rows.index, rows["loss"].rolling(window, min_periods=1, center=True).median(), color=sns.color_palette()[i % 10], label=f"stage {stage}")
    ax.axhline(math.log(2), color="grey", ls=":", label="ln 2")
    ax.set(xlabel="optimizer step", ylabel="DPO loss (nats)"); ax.legend(frameon=False, ncol=4, fontsize="small")
    return fig


# %%
#| export
def plot_gamma(gammas: pd.DataFrame, # model, chunk, gamma: one pair a row
              ) -> plt.Figure:
    "Distribution of gamma under every model of a run, one panel per chunk."
    chunks = list(dict.fromkeys(gammas["chunk"]))
    fig, axes = plt.subplots(1, len(chunks), figsize=(3.2 * len(chunks) + 0.5, 3), sharey=True, squeeze=False)
    for ax, chunk in zip(axes[0], chunks):
        sns.boxplot(gammas[gammas["chunk"] == chunk], x="model", y="gamma", hue="model", palette="viridis", showfliers=False, legend=False, ax=ax)
        ax.axhline(0, color="grey", ls=":"); ax.set(title=chunk, xlabel="", ylabel=r"$\gamma$ (nats)")
    fig.tight_layout()
    return fig


# %%
#| export
def plot_drift(metrics: pd.DataFrame, # stage, logratio_chosen, logratio_rejected
              ) -> plt.Figure:
    "log pi_theta / pi_ref of chosen and of rejected responses: DPO needs the gap, not a rise of the chosen."
    fig, ax = plt.subplots(figsize=(6.5, 3))
    m = metrics.reset_index(drop=True)
    for side, color in (("chosen", sns.color_palette()[2]), ("rejected", sns.color_palette()[3])):
        for i, (_, rows) in enumerate(m.groupby("stage")):
            ax.plot(rows.index, rows[f"logratio_{side}"].rolling(max(1, len(m) // 30), min_periods=1).mean(), color=color, label=side if i == 0 else None)
    for start in m.groupby("stage").head(1).index[1:]: ax.axvline(start, color="grey", lw=0.5)
    ax.axhline(0, color="grey", ls=":")
    ax.set(xlabel="optimizer step", ylabel=r"$\log\,\pi_\theta/\pi_{ref}$ (nats)"); ax.legend(frameon=False, fontsize="small")
    return fig
