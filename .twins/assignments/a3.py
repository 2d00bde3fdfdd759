# %% [markdown]
# # Assignment 3: one stage, half the precision
# > The training loop, its reference table, accumulation, and a step in 16 bits; then what it costs on a graphics card.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/assignments/a3.ipynb)
#
# **First: File > Save a copy in Drive.** A notebook that was opened from GitHub is not saved when you close it.
#
# **Goal.** A stage of DPO is a loop of six lines, and five places where it goes wrong without an error. You write the parts, put them together, and measure on a T4 what 16 bits and checkpointing buy.
# **Before you start**, read [chapter 06](https://github.com/sdpo-nb/sdpo_nb/blob/main/nbs/06_trainer.ipynb), "Six lines" to "Half precision, full weights" and "One step" (leave out the section on Accelerate), and [chapter 02](https://github.com/sdpo-nb/sdpo_nb/blob/main/nbs/02_logprobs.ipynb), the first paragraph of "Where does dropout hide?".
# **Time**: 50 minutes for reading in the two chapters, then 90 here, and 15 more for the cells on a graphics card, which give no points. **Runtime**: CPU for the questions; T4 for the section "On a graphics card" (*Runtime > Change runtime type > T4 GPU*; this starts the notebook anew, so do it at the end and run all cells). **Points**: 20.
#
# **How it works.** Each question has a function with `...` in it. Replace the `...`, run the cell, and run the check under it. As long as the `...` is there, the check says "nothing yet". You may run a check as often as you like: it draws new numbers each time.
# To get the same numbers again, pass the seed of a message, `try_check(check_accumulation, accumulation, seed=528380)`, and put a `print` into your function. A question gives all its points or none. Keep the names of the functions, and leave the lines that begin with `#| question` as they are. A check may send you to a section
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

import time

import pandas as pd
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from sdpo_nb.checks import check_accumulation, check_fp16_step, check_reference_table, check_train
from sdpo_nb.checks import report, score
from sdpo_nb.course import try_check
from sdpo_nb.trainer import TrainConfig, memory_plan


# %% [markdown]
# ## Question 1. A large batch in small parts (4 points)
#
# A batch of $n$ pairs does not fit into memory. So it is cut into parts of at most `size` pairs; each part has a forward and a backward pass, and PyTorch adds the gradients up in `.grad`. We want the gradient of the *mean* loss over all $n$ pairs:
#
# $$\nabla \frac1n\sum_{i=1}^n \ell_i = \sum_m \nabla \sum_{i \in m} \frac{\ell_i}{n},$$
#
# where $m$ runs over the parts. Do the backward pass of a part before the next part begins: otherwise all parts are kept in memory, and nothing is saved. Add to the gradient that is there; do not clear it.
#
# *By hand.* Five losses $1, 2, 3, 4, 10$ in parts of two: the mean is 4. The mean of the means of the parts, $(1.5 + 3.5 + 10)/3 = 5$, is another number, because the last part is short.

# %%
def accumulation(
    model,   # a torch module
    pairs,   # list of n pairs
    loss_of, # (model, part) -> (m,) the loss of each pair of a part
    size,    # int: most pairs of a part
):           # returns nothing; the gradient is added to .grad
    "Add the gradient of the mean loss, part by part."
    ...


# %%
#| question q1 4 check_accumulation accumulation
try_check(check_accumulation, accumulation)


# %% [markdown]
# ## Question 2. The reference is a table (4 points)
#
# Of the reference only two numbers per pair are ever needed. So they are computed once, before training, and the second model can go. A row is found by the key of its pair, `pair["key"]`, because batches are shuffled later.
#
# Three things are easily forgotten. Dropout must be off (`model.eval()`), or the numbers are random (chapter 02 says why this is not always enough: some models hide dropout elsewhere. For the model here it is); afterwards the model must be in the mode in which it came. No gradient is needed (`torch.no_grad()`). And keep the numbers as they are; do not round them to 16 bits.
#
# *By hand.* For two pairs with keys `"a"` and `"b"`, and a `score` that returns the tensors $(-3, -5)$ for chosen and $(-4, -9)$ for rejected, the table is `{"a": (-3.0, -4.0), "b": (-5.0, -9.0)}`.

# %%
def reference_table(
    model, # the reference
    pairs, # list of n dicts; pair["key"] is its name
    score, # (model, pairs) -> (n,) log pi(y_w|x) and (n,) log pi(y_l|x), nats
):         # -> dict: key -> (chosen, rejected), two numbers in nats
    "What a model says about pairs, by their key."
    ...


# %%
#| question q2 4 check_reference_table reference_table
try_check(check_reference_table, reference_table)


# %% [markdown]
# ## Question 3. A step in fp16 (5 points)
#
# The smallest number above zero in fp16 is $6\cdot10^{-8}$, so small gradients become zero. A *scaler* multiplies the loss by a large number before the backward pass, and divides the gradient by it before the step. If the gradient overflows (inf or NaN), the scaler leaves the step out and halves
# its number. Write one step, with `scaler.scale`, `scaler.unscale_`, `scaler.step` and `scaler.update`, and clip the norm of the *true* gradient to `clip`. Clear the gradient afterwards.
#
# *By hand.* Scale 16, true gradient $(3, 4)$ with norm 5, clip 1. After the backward pass `.grad` is $(48, 64)$, after unscaling $(3, 4)$, after clipping $(0.6, 0.8)$. Who clips before unscaling gets $(0.6, 0.8)/16$: the step is sixteen times too short.

# %%
def fp16_step(
    loss,       # scalar tensor
    parameters, # list of parameters
    optimizer,  # of these parameters
    scaler,     # torch.amp.GradScaler
    clip,       # float: largest norm of the true gradient
):              # returns nothing
    "Backward pass and one optimizer step, with a scaled loss."
    ...


# %%
#| question q3 5 check_fp16_step fp16_step
try_check(check_fp16_step, fp16_step)


# %% [markdown]
# ## Question 4. The stage (5 points)
#
# Now the loop. The model may come in bf16 and in eval mode, as many do: train its weights in fp32 (`model.float()`), in train mode. It has no dropout, so there is nothing to switch off. Use `torch.optim.AdamW` with `weight_decay=0.0`. Take the pairs in their order, in batches of `batch`; the last one may be short. The loss of a batch is the mean of
# $-\log\sigma(\beta(\gamma_\theta - \gamma_{ref}))$, where $\gamma$ is the log-probability of the chosen answer minus that of the rejected one: $\gamma_\theta$ of the policy, $\gamma_{ref}$ from the table. Log-probabilities are in *nats*, the unit of the natural logarithm. Return the losses, one number a step. `score(model, pairs)`, imported above, gives the log-probabilities of the policy.
#
# *By hand.* Seven pairs in batches of three are three steps, with 3, 3 and 1 pairs. If the table is that of the model itself, the first loss is $\ln 2 = 0.693$; the table of the check is that of another model, so expect another number.

# %%
def train(
    model, # a causal LM; is changed
    pairs, # list of tokenised pairs; pair["key"] is its name
    table, # dict: key -> (chosen, rejected) of the reference, nats
    beta,  # float > 0, per nat
    lr,    # float: learning rate
    batch, # int: pairs of a step
):         # -> list of floats: the mean loss of each step
    "One stage of DPO."
    ...


# %%
#| question q4 5 check_train train
try_check(check_train, train)

# %% [markdown]
# ## On a graphics card (no points)
#
# A model of the size of SmolLM2-135M, with random weights, so that nothing is downloaded: time and memory are the same. It is trained for some steps, with your `fp16_step` (a scaler that is switched off leaves fp32 as it is), on rows of 512 tokens, in fp32 and in fp16, with and without *checkpointing*, which forgets the activations of a layer and computes them again in the
# backward pass. Expect a few minutes on a T4. Without a card, the next cell measures nothing.
#
# The second table is for those without a card. It is *arithmetic*, not a measurement: it is the plan that chapter 06 makes before it trains. Weights, gradients and the two moments of AdamW cost $4 + 4 + 8 = 16$ bytes a parameter, whatever the precision of the forward pass. Activations depend on precision, checkpointing and the number of
# tokens, here 2048 as above. No seconds are given, because they were not measured. As a rule: checkpointing computes every forward pass twice, so expect about a third more time; a T4 multiplies fp16 matrices several times faster than fp32 ones.

# %%
SMOLLM2_135M = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
)

def cost(half, checkpointing, device="cuda", sizes=SMOLLM2_135M, rows=4, tokens=512, steps=5):
    "Seconds of a step and, on a card, GiB at the peak."
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(device).train()
    if checkpointing: model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    scaler = torch.amp.GradScaler(device, enabled=half)
    ids = torch.randint(sizes["vocab_size"], (rows, tokens), device=device)
    on_card = device == "cuda"
    if on_card: torch.cuda.reset_peak_memory_stats()
    for step in range(steps):
        if step == 2:                       # the first two warm up
            if on_card: torch.cuda.synchronize()
            begun = time.perf_counter()
        with torch.autocast(device, torch.float16, enabled=half):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        fp16_step(loss, list(model.parameters()), optimizer, scaler, clip=1.0)   # yours
    if on_card: torch.cuda.synchronize()
    seconds = (time.perf_counter() - begun) / (steps - 2)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_card else float("nan")
    precision = "fp16" if half else "fp32"
    return dict(precision=precision, checkpointing=checkpointing, seconds=seconds, peak_GiB=peak)

ways = [(half, checkpointing) for half in (False, True) for checkpointing in (False, True)]
found = [cost(*way) for way in ways] if torch.cuda.is_available() else []
pd.DataFrame(found).round(2) if found else "no graphics card here: use the table below"


# %%
def planned(half, checkpointing):
    "The memory plan of chapter 06 for 4 rows of 512 tokens, GiB."
    train_config = TrainConfig(token_budget=2048, gradient_checkpointing=checkpointing)
    precision = "fp16" if half else "fp32"
    plan = memory_plan(LlamaConfig(**SMOLLM2_135M), train_config, precision, "padded")
    return dict(precision=precision, checkpointing=checkpointing, **plan, sum=sum(plan.values()))

pd.DataFrame([planned(*way) for way in ways]).round(2)

# %% [markdown]
# <!-- question q5 2 manual -->
# ## Question 5. In words (2 points)
#
# Take the table of your card, or the planned one. (a) Which part of the memory does fp16 make smaller, which part does it leave alone, and why? (b) What does checkpointing save, what does it cost, and for which of these four settings would a model of 1 billion parameters fit on a T4 with 15 GiB? At most 120 words.
#
# *Your answer. Double-click this cell and write here, not in a new cell. Keep the line `<!-- question q5 ... -->` at its top.*
#
# ...

# %% [markdown]
# ## Hand in
#
# The last cell calls every check once more and adds up. Run it, then *File > Download > Download .ipynb*, and hand in this file. The grader runs your functions with new numbers, so there is no need to keep the outputs. Question 5 is marked by a person, so its points are not in the sum yet.

# %%
report(globals(), """
q1 4 check_accumulation accumulation
q2 4 check_reference_table reference_table
q3 5 check_fp16_step fp16_step
q4 5 check_train train
q5 2 manual
""")
