# %% [markdown]
# # Assignment 2: which data first
# > Find where an answer begins, measure how easy a source is, and cut the data into stages.
#
# <!-- badge -->
#
# **First: File > Save a copy in Drive.** A notebook that was opened from GitHub is not saved when you close it.
#
# **Goal.** Stepwise DPO trains on easy data first. But what is easy? You measure it, from the token ids up to the list of rows that each stage trains on, and learn where the measure deceives.
# **Before you start**, read [chapter 01](https://github.com/sdpo-nb/sdpo_nb/blob/main/nbs/01_preferences.ipynb), the section on the boundary, and [chapter 05](https://github.com/sdpo-nb/sdpo_nb/blob/main/nbs/05_partition.ipynb) to the end of "The blind spot: length".
# **Time**: 45 minutes for reading in the two chapters, then 75 here. All cells together run in less than a minute. **Runtime**: CPU (*Runtime > Change runtime type > CPU*). **Points**: 20.
#
# **How it works.** Each question has a function with `...` in it. Replace the `...`, run the cell, and run the check under it. As long as the `...` is there, the check says "nothing yet". You may run a check as often as you like: it draws new numbers each time.
# To get the same numbers again, pass the seed of a message, `try_check(check_accuracy, accuracy, seed=528380)`, and put a `print` into your function. A question gives all its points or none. Keep the names of the functions, and leave the lines that begin with `#| question` as they are. A check may send you to a section
# that you were not asked to read. You can work the question out without it; it is there in case you are stuck.

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    source = '"sdpo_nb @ git+https://github.com/sdpo-nb/sdpo_nb@v0.1.0"'
    get_ipython().run_line_magic("pip", f"install -q {source}")
again = "Choose Runtime > Disconnect and delete runtime, then run this cell again."
assert importlib.util.find_spec("sdpo_nb"), f"pip could not install sdpo_nb, see above. {again}"

import sdpo_nb
version = sdpo_nb.__version__
assert version == "0.1.0", f"This assignment is made for sdpo_nb 0.1.0, and {version} is installed. {again}"

import random

import pandas as pd
import torch

from sdpo_nb.checks import check_accuracy, check_boundary, check_by_prompt, check_partition, report
from sdpo_nb.course import try_check
from sdpo_nb.logprobs import score_pairs
from sdpo_nb.partition import measure_source
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.world import answer, load_base, load_world


# %% [markdown]
# ## Question 1. Where does the answer begin? (3 points)
#
# A model reads token ids, one row for the prompt with the chosen answer and one for the prompt with the rejected answer. Only tokens of the answer are scored, so we must know where it begins. The length of the prompt is not
# the answer: a tokenizer may merge the end of the prompt with the beginning of an answer into one token. The *boundary* is the number of tokens that the prompt shares with *both* rows,
#
# $$n = \min\big(\mathrm{lcp}(x, z_w),\ \mathrm{lcp}(x, z_l)\big),$$
#
# where $x$ are the ids of the prompt alone, $z_w$ and $z_l$ those of the two full rows, and lcp is the length of the longest common prefix.
#
# *By hand.* Prompt `[5, 6, 7]`, chosen row `[5, 6, 9, 2]` (here 7 was merged with what follows), rejected row `[5, 6, 7, 4, 2]`: the prefixes have 2 and 3 tokens, so $n = 2$.

# %%
def boundary(
    prompt,   # list of ids: the prompt alone
    chosen,   # list of ids: prompt and chosen answer
    rejected, # list of ids: prompt and rejected answer
):            # -> int: number of tokens before the answers
    "The number of tokens that the prompt shares with both rows."
    ### BEGIN SOLUTION
    def shared(row):
        same = 0
        for a, b in zip(prompt, row):
            if a != b: break
            same += 1
        return same
    return min(shared(chosen), shared(rejected))
    ### END SOLUTION


# %%
#| teacher
assert boundary([5, 6, 7], [5, 6, 9, 2], [5, 6, 7, 4, 2]) == 2

# %%
#| question q1 3 check_boundary boundary
try_check(check_boundary, boundary)


# %% [markdown]
# ## Question 2. Right, wrong, tie (4 points)
#
# Write $\gamma = \log\pi(y_w|x) - \log\pi(y_l|x)$ for how much likelier a model finds the chosen answer than the rejected one, in *nats*, the unit of the natural logarithm. A model is right about a pair if it prefers the chosen answer more than the reference does: $\gamma > \gamma_{ref}$. It is wrong if $\gamma < \gamma_{ref}$. A tie counts one half. And if one of the numbers is NaN, we do not
# know: the result is NaN, too, so that nobody takes a broken number for a wrong answer.
#
# *By hand.* $\gamma = (2.5, -1, 3)$ against $\gamma_{ref} = (1, 0.5, 3)$ gives $(1, 0, 0.5)$, and the mean is the reward accuracy, 0.5.

# %%
def accuracy(
    gamma,     # tensor (n,), gamma of the model, nats
    gamma_ref, # tensor (n,), of the same dtype: gamma of the reference, nats; zeros: no reference
):             # -> tensor (n,): 1 right, 0 wrong, 0.5 tie, NaN unknown
    "Is the model right about each pair?"
    ### BEGIN SOLUTION
    gain = gamma - gamma_ref
    return 0.5 + 0.5 * gain.sign() + 0 * gain
    ### END SOLUTION


# %%
#| teacher
three = accuracy(torch.tensor([2.5, -1., 3.]), torch.tensor([1., 0.5, 3.]))
assert three.tolist() == [1, 0, 0.5]

# %%
#| question q2 4 check_accuracy accuracy
try_check(check_accuracy, accuracy)


# %% [markdown]
# ## Question 3. One prompt, many pairs (4 points)
#
# In many data sets a prompt has several pairs. Pairs of one prompt are alike, so a prompt with fifty pairs would decide about the whole source. The accuracy *by prompt* gives each prompt the same weight: first the mean over the pairs of a prompt,
# then the mean over prompts. This measure is not in the package.
#
# *By hand.* `right = [1, 1, 1, 0]`, `prompt_id = [7, 7, 7, 3]`: prompt 7 has the mean 1, prompt 3 the mean 0, so the accuracy by prompt is 0.5. By pair it would be 0.75.

# %%
def by_prompt(
    right,     # (n,) float: 1 right, 0 wrong, 0.5 tie
    prompt_id, # (n,) int: which prompt a pair belongs to; any numbers, in any order
):             # -> float
    "Mean over prompts of the mean over the pairs of a prompt."
    ### BEGIN SOLUTION
    means = [right[prompt_id == p].mean() for p in prompt_id.unique()]
    return torch.stack(means).mean().item()
    ### END SOLUTION


# %%
#| teacher
assert by_prompt(torch.tensor([1., 1., 1., 0.]), torch.tensor([7, 7, 7, 3])) == 0.5

# %%
#| question q3 4 check_by_prompt by_prompt
try_check(check_by_prompt, by_prompt)


# %% [markdown]
# ## Question 4. Cut it into stages (5 points)
#
# Now the partition. There are several sources, with `sizes[i]` pairs each. Their rows are numbered through: source 0 has the rows 0 to `sizes[0] - 1`, source 1 the next ones, and so on. Sort the *sources* from easy to hard, that is, by falling accuracy; equal
# accuracies keep the order in which they were given. Put their rows one source after the other. Now cut. If `T` is the number of sources, each source is a part, whatever its size. Otherwise cut the whole into `T` parts that are as equal as possible: sizes differ by one at most, and the larger parts come first.
#
# *By hand.* Two sources with the accuracies 0.6 and 0.9, and 3 and 2 pairs: source 1 comes first, its rows are 3 and 4; then the rows 0, 1, 2. So `partition([0.6, 0.9], [3, 2], 3)` is `[[3, 4], [0, 1], [2]]`, and
# `partition([0.6, 0.9], [3, 2], 2)` is `[[3, 4], [0, 1, 2]]`.

# %%
def partition(
    accuracy, # list of floats: how easy each source is
    sizes,    # list of ints: pairs of each source
    T,        # int: number of stages, at most the number of pairs
):            # -> list of T lists of row numbers
    "Rows of each stage, easy sources first."
    ### BEGIN SOLUTION
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    order = sorted(range(len(sizes)), key=lambda i: -accuracy[i])
    by_source = [list(range(starts[i], starts[i] + sizes[i])) for i in order]
    if T == len(sizes): return by_source
    rows = sum(by_source, [])
    small, larger = divmod(len(rows), T)
    parts, begin = [], 0
    for t in range(T):
        end = begin + small + (t < larger)
        parts.append(rows[begin:end])
        begin = end
    return parts
    ### END SOLUTION


# %%
#| teacher
assert partition([0.6, 0.9], [3, 2], 2) == [[3, 4], [0, 1, 2]]
assert partition([0.6, 0.9], [3, 2], 3) == [[3, 4], [0, 1], [2]]

# %%
#| question q4 5 check_partition partition
try_check(check_partition, partition)

# %% [markdown]
# ## Five sources
#
# For the last question we measure five sources with S, the base model of the [tiny world](https://github.com/sdpo-nb/sdpo_nb/blob/main/nbs/00_world.ipynb). You need not change the next cell. `primer`, `digest` and `riddle` come with the world. `noisy` is `primer` with a label in three turned around, more exactly 30 %. In `terse` both answers of
# each pair are wrong, and the shorter one is called chosen.

# %%
world = load_world()
S, tokenizer = load_base(world)
draw = random.Random(0)
rows = {name: list(load_pairs(world.sources[name])) for name in ("primer", "digest", "riddle")}

def turned(row): return row | dict(chosen=row["rejected"], rejected=row["chosen"])
rows["noisy"] = [turned(row) if draw.random() < 0.3 else row for row in rows["primer"]]

short = [answer(p) for p in world.validation if len(answer(p)) in (3, 4)]
long = [answer(p) for p in world.validation if len(answer(p)) in (5, 6)]
drawn = [(p, draw.choice(short), draw.choice(long)) for p in world.validation]
rows["terse"] = [dict(prompt=p, chosen=a, rejected=b) for p, a, b in drawn if answer(p) not in (p, a, b)]

sources = []
for name, of_one in rows.items():
    plain = dict(chat=True) if name == "terse" else {}
    sources.append(tokenize_pairs(load_pairs(of_one), tokenizer, name, **plain))
measured = pd.DataFrame([measure_source(s, score_pairs(S, s.pairs)) for s in sources])
shown = ["source", "n", "accuracy", "low", "high", "accuracy_per_token", "decided_by_length", "mean_gamma"]
measured[shown].round(3)

# %% [markdown]
# <!-- question q5 4 manual -->
# ## Question 5. In words (4 points)
#
# (a) In which order would easy-to-hard train on the five sources? (b) `noisy` has the same prompts and answers as `primer`. Why does it look harder, and is it what you would call hard? (c) Which column warns you about `terse`, and how? Would you begin with it?
# (d) Name one thing about a source that matters for training and that none of these numbers tells. At most 200 words.
#
# *Your answer. Double-click this cell and write here, not in a new cell. Keep the line `<!-- question q5 ... -->` at its top.*
#
# ### BEGIN SOLUTION
# (a) By accuracy: `terse` 0.81, `primer` 0.72, `noisy` 0.60, `digest` 0.59, `riddle` 0.48. The intervals of `noisy` and `digest` overlap, so their order is not certain.
#
# (b) Turning a label turns right into wrong: 0.7 of the pairs keep their verdict, 0.3 get the opposite one, and $0.7 \cdot 0.717 + 0.3 \cdot 0.283 = 0.587$; measured is 0.598. Nothing became harder to answer. The labels became wrong, and the number cannot tell a hard pair from a wrong label.
#
# (c) `accuracy_per_token` is 0.515, a coin, and 0.30 of the verdicts are `decided_by_length`: S prefers the short answers because a sum over fewer tokens is larger. Both answers are wrong, so there is nothing to learn but to be short. I would leave it out, or at least not begin with it.
#
# (d) For example: whether the answers are good at all (in `terse` both are wrong); how much the pairs differ from what the model will be asked; how many labels are wrong; how diverse the prompts are.
#
# *Marking:* one point for each part.
# ### END SOLUTION

# %% [markdown]
# ## Hand in
#
# The last cell calls every check once more and adds up. Run it, then *File > Download > Download .ipynb*, and hand in this file. The grader runs your functions with new numbers, so there is no need to keep the outputs. Question 5 is marked by a person, so its points are not in the sum yet.

# %%
report(globals())
