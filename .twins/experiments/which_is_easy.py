# %% [markdown]
# # Which source is easy?
# > Easy to hard by the sum of log-probabilities, or per token? On real pairs the two orders differ, and this page asks whether it matters.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/which_is_easy.ipynb)
#
# **Orca is the easiest of three sources by the sum of log-probabilities, and the hardest per token.** So the recipe "easy to hard" does not say where to begin before it says which of the two it means. What decides is length: the chosen responses of Orca are mostly the shorter ones. Whether the order matters for *training* is asked at the end and has not been answered.
#
# **You should know** the [partition](../05_partition.ipynb), and how [SmolLM2 is trained in draws](smollm2.ipynb). **Time** 20 minutes to read, a few seconds to run.
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
import numpy as np
import pandas as pd

from sdpo_nb.partition import wilson
from sdpo_nb.smollm2 import ARMS

# %%
import matplotlib.pyplot as plt
import seaborn as sns
from scipy.stats import spearmanr
from sdpo_nb.cells import RESULTS
from sdpo_nb.evaluate import as_text
from sdpo_nb.smollm2 import DRAWS, MARGINS, grid_of


# %% [markdown]
# ## The pairs, as S sees them
#
# SmolLM2-135M-Instruct has read the pairs with up to 1,024 tokens, at most 512 of them the prompt. What it said is stored: two log-probabilities a pair, and the lengths of both responses in tokens. From these come both readings of $\gamma$.

# %%
#| export
def with_gaps(
    pairs: pd.DataFrame, # chosen, rejected: log-probabilities, nats; chosen_tokens, rejected_tokens
) -> pd.DataFrame:       # the same, with sum and per token
    "How much likelier is the chosen response, by the sum and per token (nats)?"
    by_token = pairs["chosen"] / pairs["chosen_tokens"] - pairs["rejected"] / pairs["rejected_tokens"]
    return pairs.assign(**{"sum": pairs["chosen"] - pairs["rejected"], "per token": by_token})

MEASURES = ("sum", "per token")
NAMES = dict(orca="Orca", uf="UltraFeedback", hh="HH")

# %%
pairs = with_gaps(pd.read_parquet(RESULTS / "which_is_easy_pairs.parquet"))
pairs["chosen longer"] = pairs["chosen_tokens"] > pairs["rejected_tokens"]
pairs.groupby("source", sort=False)[["chosen_tokens", "rejected_tokens", "sum", "per token"]].median().round(2)

# %% [markdown]
# These are all pairs of the three files. Reading them takes half an hour on two cores that multiply in bf16; `python -m sdpo_nb.experiments which_is_easy --longest 1024 --folder LONG --data DIR --model DIR` begins with such a pass, and `scored_pairs` of [real cells](real_cells.ipynb) reads what it has. The experiment at the end of this page is run with shorter pairs, so it needs another folder.

# %%
assert len(pairs) == 2704
pairs["source"].value_counts().rename(NAMES).to_frame("pairs")

# %% [markdown]
# They were read in bf16. Does that change a sign? Some of Orca and of UltraFeedback were also read in fp32:

# %%
both = pairs.dropna(subset="chosen_fp32")
exact = with_gaps(both.assign(chosen=both["chosen_fp32"], rejected=both["rejected_fp32"]))
flipped = {measure: int((np.sign(exact[measure]) != np.sign(both[measure])).sum()) for measure in MEASURES}
furthest = (exact["sum"] - both["sum"]).abs().max()
assert max(flipped.values()) <= 0.02 * len(both)
print({NAMES[source]: n for source, n in both["source"].value_counts().items()}, "pairs")
print(f"signs that differ: {flipped}; gamma differs by {furthest:.1f} nats at most")


# %% [markdown]
# By the sum no sign changes, and per token one. No pair of HH was read twice.
#
# ## Two orders
#
# The *reward accuracy* of a source under S is the share of its pairs with $\gamma > 0$. The partition sorts sources by it. What order will come out by the sum, and what order per token?

# %%
#| export
def easy_table(
    pairs: pd.DataFrame, # of `with_gaps`
) -> pd.DataFrame:       # source and measure: the index; n, share, low, high
    "The share of pairs whose chosen response S prefers, with Wilson's interval."
    rows = {}
    for source, of_source in pairs.groupby("source", sort=False):
        for measure in MEASURES:
            share = float((0.5 + 0.5 * np.sign(of_source[measure])).mean())
            low, high = wilson(share, len(of_source))
            rows[source, measure] = dict(n=len(of_source), share=share, low=low, high=high)
    return pd.DataFrame(rows).T

def easy_order(
    table: pd.DataFrame, # of `easy_table`
    measure: str,        # of MEASURES
) -> list[str]:
    "Sources, easy to hard."
    shares = table.xs(measure, level=1)["share"]
    return shares.sort_values(ascending=False, kind="stable").index.tolist()


# %%
table = easy_table(pairs)
orders = {measure: easy_order(table, measure) for measure in MEASURES}
shown = {}
for (source, measure), row in table.iterrows():
    shown.setdefault(NAMES[source], {})[measure] = as_text((row["share"], row["low"], row["high"]), ".2f")
longer = pairs.groupby("source")["chosen longer"].mean().rename(NAMES).map("{:.0%}".format)
print({measure: " → ".join(NAMES[source] for source in order) for measure, order in orders.items()})
pd.DataFrame(shown).T.assign(**{"chosen is longer": longer})

# %% [markdown]
# The figure shows the same. A line that falls from left to right is a source that is easy by the sum and hard per token.

# %%
COLOURS = dict(orca="C0", uf="C1", hh="C2")
LABEL_AT = dict(orca=-3, uf=4, hh=-11)      # points above the dot: two of them lie close together
fig, ax = plt.subplots(figsize=(6, 3.8))
for k, source in enumerate(COLOURS):
    of_source = table.loc[source].loc[list(MEASURES)]
    x = np.arange(2) + 0.02 * (k - 1)
    below, above = of_source["share"] - of_source["low"], of_source["high"] - of_source["share"]
    ax.errorbar(x, of_source["share"], yerr=[below, above], color=COLOURS[source], marker="o", capsize=3)
    ax.annotate(NAMES[source], (x[1], of_source["share"].iloc[1]), xytext=(10, LABEL_AT[source]),
                textcoords="offset points", color=COLOURS[source])
ax.axhline(0.5, color="0.6", lw=1, ls=":")
ax.set(xticks=[0, 1], xticklabels=["by the sum", "per token"], xlim=(-0.3, 1.6), ylim=(0, 1))
ax.set_ylabel("pairs whose chosen response\nS prefers        easier →")
sns.despine()

# %%
assert orders["sum"][0] == "orca"
assert orders["per token"][-1] == "orca"
assert table.loc[("orca", "sum"), "low"] > 0.5
assert table.loc[("orca", "per token"), "high"] < 0.5


# %% [markdown]
# Orca is the easiest source by the sum, and by far the hardest per token: both intervals are on their side of one half. HH comes before UltraFeedback by the sum; per token their intervals overlap.
#
# ## How sure is an order?
#
# Another sample of pairs might have given another order. We draw 200 samples with replacement, of each source as many as there are, and sort each.

# %%
#| export
def bootstrap_orders(
    pairs: pd.DataFrame, # of `with_gaps`
    times: int = 200,    # samples
    seed: int = 0,       # of the sampling
) -> pd.DataFrame:       # a sample a line: the order by each of MEASURES, as text
    "Orders of resampled sources."
    rng, found = np.random.default_rng(seed), []
    groups = [rows for _, rows in pairs.groupby("source", sort=False)]
    for _ in range(times):
        drawn = pd.concat([rows.iloc[rng.integers(0, len(rows), len(rows))] for rows in groups])
        resampled = easy_table(drawn)
        found.append({measure: ", ".join(easy_order(resampled, measure)) for measure in MEASURES})
    return pd.DataFrame(found)


# %%
samples = bootstrap_orders(pairs)
counts = samples.apply(lambda column: column.value_counts(normalize=True)).fillna(0.)
counts.sort_values("sum", ascending=False).map("{:.0%}".format)


# %%
def place_of_orca(order): return order.split(", ").index("orca")

places = samples.map(place_of_orca)
first = (places["sum"] == 0).mean()
last = (places["per token"] == 2).mean()
same = {measure: (samples[measure] == ", ".join(order)).mean() for measure, order in orders.items()}
assert first > 0.95
assert last > 0.95
print(f"Orca is first by the sum in {first:.0%}, last per token in {last:.0%} of the samples")
print({measure: f"order as in the table in {share:.0%}" for measure, share in same.items()})

# %% [markdown]
# So it is sure where Orca stands, and that the two measures disagree about it. Which of the other two is harder per token, we cannot tell from these pairs.
#
# ## It is the length
#
# Every token costs log-probability, so a sum favours the shorter response. What happens to both measures where the chosen response is the longer one?

# %%
groups = pairs.groupby(["source", "chosen longer"], sort=False)
by_length = groups[list(MEASURES)].agg(lambda gaps: (gaps > 0).mean())
by_length = by_length.join(groups.size().rename("pairs"))
for source in COLOURS:
    assert by_length.loc[(source, True), "sum"] < by_length.loc[(source, False), "sum"]
by_length.rename(NAMES, level=0).round(2)

# %%
pairs["longer by"] = pairs["chosen_tokens"] - pairs["rejected_tokens"]
ranks = {}
for source, of_source in pairs.groupby("source", sort=False):
    longer = of_source["longer by"]
    ranks[NAMES[source]] = {measure: spearmanr(longer, of_source[measure]).statistic for measure in MEASURES}
ranks = pd.DataFrame(ranks).T.rename_axis("rank correlation with the difference of lengths")
assert (ranks["sum"] < -0.5).all()
ranks.round(2)

# %% [markdown]
# By the sum, $\gamma$ is above all a comparison of lengths, in all three sources. Per token the sign turns, in UltraFeedback most: there the tokens of a longer response are likelier. So neither measure is free of length.
#
# In Orca the chosen response is the shorter one in most pairs. Is that what makes it easy? We keep only pairs whose two responses differ by less than a fifth in length:

# %%
longest = pairs[["chosen_tokens", "rejected_tokens"]].max(axis=1)
near = easy_table(pairs[pairs["longer by"].abs() < longest / 5])
assert near.loc[("orca", "sum"), "share"] < 0.5
shown = {}
for (source, measure), row in near.iterrows():
    line = shown.setdefault(NAMES[source], {"pairs": int(row["n"])})
    line[measure] = as_text((row["share"], row["low"], row["high"]), ".2f")
pd.DataFrame(shown).T

# %% [markdown]
# Then Orca is not easy by either measure. The paper does not say which of the two it means. What follows for its recipe: *the order of sources can be decided by how long their chosen responses are*.
#
# ## Does the order matter for training?
#
# Three sources: Orca, HH and UltraFeedback. So three stages, easy to hard by either measure, and each order the other way round. Beside them stands plain DPO on the same pairs. In the table above the two measures give opposite orders. If the pool says so too, `sum, hard first` and `per token` are one arm, and five arms are three. The first question then asks whether Orca should come first or last, and cannot tell which measure is better in general.
#
# The roles of pairs, the eight draws, the grid of the search and the outcome (the cross-fitted gain) are those of [the first experiment](smollm2.ipynb); here the pairs of HH are trained on and measured, too (950 in the pool, 200 held out). The margins are the same.

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
#
# `python -m sdpo_nb.experiments which_is_easy --minutes 8 --folder OUT --data DIR` runs it, on a graphics card if there is one; rows that are brought back are shown here. Without a card there is a *smaller version*, as of the first experiment: the same two questions, three draws, the first 241 pairs of each source with up to 384 tokens, one setting for all arms and no search. The orders are those of the table above, which is about all pairs. All arms see every pair once. Three draws can never say *different*: their smallest p-value is 0.25. *Equal* needs a standard error below 0.005 nats. So this version shows that everything runs and how large the differences are; it will probably say *we cannot tell*.

# %%
#| export
def one_by_one(
    sources: list, # names, in their order
) -> list:         # stages: (pairs, start, reference)
    "A stage for each source. The next stage starts at the model that this one made, and has it as its reference."
    first, *others = sources
    return [(first, "S", "S"), *((source, "before", "before") for source in others)]

CPU_EASY_ARMS = { # name -> stages
    "DPO": ARMS["DPO"],
    "sum": one_by_one(["orca", "hh", "uf"]),
    "per token": one_by_one(["uf", "hh", "orca"]),
}
CPU_EASY_PAIRS = 241    # the first of each source

# %%
for measure in MEASURES: assert CPU_EASY_ARMS[measure] == one_by_one(orders[measure])

# %%
from sdpo_nb.real import arrange
from sdpo_nb.smollm2 import answer_questions, assay, on_the_edge, without_words_before_the_end
from sdpo_nb.timed import read_results

found = {name: arrange(name, read_results(name)) for name in ("which_is_easy_cpu", "which_is_easy")}
for name, there in found.items():
    print(f"{name}, cells missing: {'all' if there.missing is None else there.missing}")
    for draw, mix in there.left_out.items(): print(f"draw {draw} is left out; {mix}")
    if there.chosen and name == "which_is_easy":
        edges = {arm: on_the_edge(settings, grid_of(arm)) for arm, settings in there.chosen.items()}
        display(pd.DataFrame(there.chosen).T.assign(edge=pd.Series(edges)))
    if len(there.draws_of(EASY_PRIMARY)) > 1:
        print(there.origin)
        display(assay(there.rows, there.S, NAMES).round(3))
        answers = answer_questions(there.rows, there.S, EASY_PRIMARY, "cross-fitted gain", NAMES)
        display(without_words_before_the_end(answers, there.missing).round(3))

# %% [markdown]
# ## What this does not show
#
# - One model. Another S may find other responses likely.
# - A sample of each data set.
# - That an order is better. The table says how S reads the pairs; training with a search and eight draws waits for a graphics card.
#
# ## What you now have
#
# - `with_gaps` and `easy_table`: a partition by two measures, with intervals.
# - `bootstrap_orders`: how often another sample would give another order.
#
# ## Questions to test yourself
#
# 1. A source has chosen responses that are right and short, and rejected ones that are wrong and long. Which measure calls it easy?
#
#    <details><summary>Answer</summary>
#
#    The sum, whatever S knows about right and wrong: the shorter response has fewer factors below one.
#
#    </details>
# 2. Is the order per token the better one, then?
#
#    <details><summary>Answer</summary>
#
#    It is not free of length, either: in a long response most tokens follow from those before, so their mean is likelier. And DPO's own loss uses the sum. It is another order, and the page shows that the choice matters to the result of the partition.
#
#    </details>
#
# ## Try this
#
# - Swap the two responses of all pairs of Orca (exchange the columns of chosen and rejected), and make the table again. Where does Orca stand then?
#
#   <details><summary>What you should see</summary>
#
#   Every share becomes one minus itself: Orca is last by the sum and first per token. The order depends on which responses are called chosen, and here these are the short ones.
#
#   </details>
