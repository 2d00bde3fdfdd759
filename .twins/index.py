# %% [markdown]
# # sdpo_nb
# > Stepwise DPO (sDPO): preference alignment in stages with a reference model that moves up. A book that computes; its cells are the package.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/index.ipynb)
#
# People compare two answers of a language model; alignment teaches the model to prefer the one that they chose. **sDPO**, *stepwise DPO* (Kim et al., ["sDPO: Don't Use Your Data All at Once"](https://arxiv.org/abs/2403.19270)), does so in stages: easy pairs first, and the model that leaves
# one stage is the reference of the next. Here its equations are derived and checked, cell by cell, in notebooks, and the cells marked for export are the package `sdpo_nb`, which does the same to your model.
#
# (It is not *Self-Distillation Policy Optimization* or another method shortened to SDPO.)
#
# ## What it does
#
# A [tiny world](00_world.ipynb) with four skills on short strings, and a start model S that learned the wrong rule for half of the prompts. Three stages on preference pairs, at $\beta = 0.9$, three times the best of three that the demo tries for plain DPO; then both models answer test prompts. (At 0.3, in the [demo](demo.ipynb), fewer of these answers come out right.)

# %%
#| hide
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
#| hide
import json, tempfile
from importlib.resources import files

import pandas as pd
import torch
from IPython.display import Markdown

from sdpo_nb.evaluate import answers_beside, as_text
from sdpo_nb.report import as_markdown
from sdpo_nb.stepwise import StepwiseConfig, sdpo
from sdpo_nb.world import load_base, load_world

torch.set_num_threads(1);

# %%
#| echo: false
world = load_world()
S, tokenizer = load_base(world)
settings = StepwiseConfig(beta=0.9, lr=1e-4, epochs=3, precision="fp32", max_length=64)
run = sdpo(world.base, world.sources, settings, tempfile.mkdtemp())
Markdown(as_markdown(answers_beside(S, run.model, tokenizer, world.test)))

# %% [markdown]
# These prompts were picked by a rule, not by us. For each skill it is the first test prompt that S gets wrong. The last row is the first that S gets right and the aligned model gets wrong.
#
# ## Two commands
#
# With Python 3.11 to 3.13, pip, make and git:
#
# ```
# git clone https://github.com/sdpo-nb/sdpo_nb && cd sdpo_nb
# make demo    # sets up, then the tiny world from partition to true reward: a minute or two
# make test    # every notebook, every check: twenty minutes or so
# ```
#
# ## Your model, your pairs
#
# ```
# pip install "sdpo_nb[peft,eval] @ git+https://github.com/sdpo-nb/sdpo_nb"   # the extras are for adapters and for benchmarks
# sdpo run --model HuggingFaceTB/SmolLM2-135M-Instruct --folder runs/first --lr 5e-6 --eval-share 0.05 --columns question=prompt \
#          --sources orca=Intel/orca_dpo_pairs uf=argilla/ultrafeedback-binarized-preferences-cleaned
# ```
#
# Files, folders or hub ids, each with a `max_pairs` of its own where you want one; one bar per pass and the time left for the run; a report that begins with held-out pairs. After a kill, run the same command to continue: on the same kind of CPU, with the same versions, the result is the same, bit for bit; on a graphics card the run says where it is not. How, and with which settings:
# [your model, your pairs](your_model.ipynb). Another loss than that of DPO is a function of a few lines: [other losses](other_losses.ipynb). `--lora-r 16` trains [adapters](09_lora.ipynb) in place of all weights, and `sdpo eval runs/first --tasks h4` asks [public benchmarks](15_benchmarks.ipynb) of S and of every stage. If you train with TRL and want to stay there: [the same loop with TRL](with_trl.ipynb), from the chunks to the gamma table.
#
# ## Does it help?
#
# In tiny worlds the true reward of every answer is known. With models of 340 thousand parameters, each method at its own best settings:
#
# - **Stepwise and plain DPO are equally good.** sDPO gains +1.6 [-3.1, +5.8] % more than DPO does (in the paper's one run, 52 %). In [ten other worlds, with a finer search](experiments/tuned_elsewhere.ipynb), it is +0.007 [-0.004, +0.018] of reward (to call that equal, p = 0.056), and -0.001 [-0.006, +0.004] against DPO at the learning rate of sDPO. At settings that are best for DPO, sDPO is worse (-0.052), at those best for sDPO it is better (+0.041): a reference that moves up lets a model go farther, as a smaller $\beta$ does. [From 86 thousand to 5.3 million parameters](experiments/model_size.ipynb) the difference neither grows nor shrinks: -0.003 [-0.016, +0.010] for ten times as many, equal to 0.
# - **A reference that moves up matters little.** Against a fixed one it gains 0.012 [0.006, 0.018], and 0.005 [-0.002, 0.012] in the ten other worlds, where the two are equal. A stage that *starts* at S again loses 0.062.
# - **The order of sources that share all skills does not matter.** Where labels get worse from the easy to the hard source, [it does not either](experiments/when_order_matters.ipynb) with a moving reference (easy first minus hard first -0.007 [-0.013, 0.000], equal; asked by multiple choice, as the paper's benchmarks ask, -0.020 [-0.028, -0.012]); with a fixed one, ending on the bad labels costs 0.051 [0.029, 0.075].
# - **Where the hard source [builds on the easy one](experiments/builds_on.ipynb), order matters.** S could not have written it. With a moving reference easy first is better by 0.021 [0.013, 0.029] (by 0.004 in the five worlds of the choice), with a fixed one hard first is, by 0.019 [0.003, 0.034] (by multiple choice easy first is). But all pairs at once are better than any order, by 0.025 to 0.055.
# - **Of three variants of DPO's relatives that were tested, one is better**, TR-DPO with a soft update, by 0.014 [0.007, 0.022]; at DPO's smaller rate that is 0.007 [-0.002, 0.014].
#
# On a real model of 135 million parameters the questions are [fixed](experiments/smollm2.ipynb): a smaller version for a processor (three draws, one setting, about 400 pairs) has been run and can show no difference, the large one has not been run. What is easy for that model [depends on how one asks](experiments/which_is_easy.ipynb).
#
# Numbers are differences of mean true reward (0 to 1) if nothing else is said, with 95 % intervals. "Equal" and "little" mean that the interval lies within $\pm 0.02$. On the pages after the protocol, and on the 135M model (in nats a pair), "equal" also wants a p-value of being equal below 0.05. $\beta$ says how tightly a model is held to its reference. Comparisons with a p-value were fixed before their results were seen; in the protocol the tests of being equal came later. Both are corrected for the number of comparisons (Holm's method). The others are *exploratory*.

# %%
#| echo: false
import pandas as pd
from sdpo_nb.experiments import claims_table

table = claims_table()
real = table["model"].str.startswith("135M")
tiny = [
    "sDPO is better than DPO (table 3)",
    "easy to hard is better than a random split (table 3), of sources that share all skills",
    "a reference that moves up is better than a fixed one",
    "a reference that moves up is better than a fixed one, tuned and measured in new worlds",
    "a stage that starts at $M_{t-1}$ is better than one that starts at S (figure 3)",
    "sDPO is as near to S as DPO, each tuned",
    "sDPO is as near to S as DPO, both at the rate of sDPO",
    "sDPO is better than DPO at one $\\beta$ and rate, the best for DPO",
    "sDPO is better than DPO at one $\\beta$ and rate, the best for sDPO",
]
said = { # claim -> what the text above says of it
    "sDPO is better than DPO at one $\\beta$ and rate, the best for DPO": "-0.052",
    "sDPO is better than DPO at one $\\beta$ and rate, the best for sDPO": "+0.041",
    "a stage that starts at $M_{t-1}$ is better than one that starts at S (figure 3)": "+0.062",
    "sDPO is better than DPO, tuned and measured in new worlds": "+0.007 [-0.004, +0.018]",
    "a reference that moves up is better than a fixed one": "+0.012 [+0.006, +0.018]",
    "a reference that moves up is better than a fixed one, tuned and measured in new worlds": "+0.005 [-0.002, +0.012]",
    "easy to hard is better than hard to easy, where the hard source builds on the easy one": "+0.021 [+0.013, +0.029]",
    "easy to hard is better than hard to easy, where the hard source builds on the easy one; with a fixed reference":
        "-0.019 [-0.034, -0.003]",
    "sDPO is better than DPO at its rate, tuned and measured in new worlds": "-0.001 [-0.006, +0.004]",
    "sDPO gains more over DPO, the larger the model": "-0.003 [-0.016, +0.010]",
    "TR-DPO with a soft update is better than DPO": "+0.014 [+0.007, +0.022]",
    "TR-DPO with a soft update is better than DPO at the smaller of two rates": "+0.007 [-0.002, +0.014]",
    "easy to hard is better than hard to easy by multiple choice, where hard sources have bad labels":
        "-0.020 [-0.028, -0.012]",
}
for claim, number in said.items(): assert table.set_index("claim").loc[claim, "what we found"].startswith(number), claim
found = pd.concat([table[real].set_index("claim"), table[~real].set_index("claim").loc[tiny]])
pages = found["where"].map("[{0}](experiments/{0}.ipynb)".format)
Markdown(as_markdown(found.assign(where=pages), formulas=True))

# %% [markdown]
# All of it is on the page of the [protocol](experiments/protocol.ipynb), and the [demo](demo.ipynb) shows one world step by step. TR-DPO, Curri-DPO, Pre-DPO and eleven other papers, and which line of the loop each changes: [relatives](related.ipynb).
#
# ## Faster, with the same gradients
#
# The trainer reads each prompt once and pads nothing ([04](04_packing.ipynb)). Where a model does not allow it, it falls back to padded batches and says so. Seconds per optimizer step against TRL's `DPOTrainer` with a precomputed reference, at its fastest micro-batch: SmolLM2-135M-Instruct in fp32, or in bf16 with compiled layers (`--compile on`), on two CPU cores, 8 pairs per
# step (`make bench`); and random weights in the shape of SmolLM2-135M and Llama-3.2-1B in bf16 on one NVIDIA H200, 32 pairs per step (`make bench-gpu`, medians of three or four steps). On the card only our layers are compiled (without that, 1.1 to 1.5 times as fast), and neither side promises the same bits twice; the stricter default (`deterministic`) has not been timed yet. Memory there is that of TRL's fastest micro-batch. A model of 135M parameters keeps such a card waiting for Python, under either trainer.

# %%
#| echo: false
results = files("sdpo_nb.data") / "results"
cpu = json.loads((results / "packing.json").read_text())
gpu = json.loads((results / "gpu.json").read_text())

data = {"hh_harmless": "HH-RLHF harmless", "ultrafeedback_binarized": "UltraFeedback"}
rows = {}
for key, name in data.items():
    setting = cpu[f"{key} fp32"]
    ours = setting["rows"]["packed"]
    theirs = setting["rows"][setting["best_trl"]]
    rows[f"CPU: {name}, 135M"] = {
        "sdpo_nb": f"{ours['step']:.1f} s",
        "TRL": f"{theirs['step']:.1f} s",
        "times as fast": as_text(theirs["slower"], ".1f"),
        "memory": "",
        "TRL's memory": "",
    }
for key, name in data.items():
    half = cpu[f"{key} bf16"]
    ours = half["rows"]["packed, compiled"]
    for who, best in (("", "best_trl"), (", TRL, too", "best_compiled_trl")):
        theirs = half["rows"][half[best]]
        rows[f"CPU in bf16, compiled{who}: {name}, 135M"] = {
            "sdpo_nb": f"{ours['step']:.1f} s",
            "TRL": f"{theirs['step']:.1f} s",
            "times as fast": as_text(theirs["slower_than_compiled"], ".1f"),
            "memory": "",
            "TRL's memory": "",
        }
for name, setting in gpu["settings"].items():
    ours = setting["rows"]["ours, compiled"]
    theirs = setting["rows"][setting["best_trl"]]
    key, size = name.split(", ")
    rows[f"H200: {data[key]}, {size}"] = {
        "sdpo_nb": f"{ours['step']:.2f} s",
        "TRL": f"{theirs['step']:.2f} s",
        "times as fast": f"{ours['times_trl']:.1f}",
        "memory": f"{ours['peak_gib']:.0f} GiB",
        "TRL's memory": f"{theirs['peak_gib']:.0f} GiB",
    }
Markdown(as_markdown(pd.DataFrame(rows).T.rename_axis("per step")))

# %% [markdown]
# ## What fits
#
# Full fine-tuning keeps weights, gradients and two moments of AdamW in fp32: 16 bytes per parameter, before a token is read. What is left of a card's memory decides how many tokens a forward pass may have; more of them are faster, and the gradient is the same. If the longest pair does not fit, activations are *recomputed*: less is kept, more is computed. This is planned on models that are
# not loaded ([06](06_trainer.ipynb); within 15 % of six peaks on a CPU and of six on an H200), for pairs half of whose tokens are responses. A run prints its own plan, chooses the budget by it, and stops at once where it cannot fit.

# %%
#| hide
from transformers import LlamaConfig

from sdpo_nb.lora import lora_config
from sdpo_nb.trainer import TrainConfig, memory_plan, tokens_that_fit

def shape(hidden, inner, layers, heads, key_heads, vocabulary):
    "A model that is only described."
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )

models = {
    "135M": shape(576, 1536, 30, 9, 3, 49152),
    "360M": shape(960, 2560, 32, 15, 5, 49152),
    "1.2B": shape(2048, 8192, 16, 32, 8, 128256),
}
cards = { # GB, precision, kernel of attention
    "T4, 15 GB": (15, "fp16", "padded"), # too old for flash attention
    "L4, 24 GB": (24, "bf16", "flash"),
    "A100 or H100, 80 GB": (80, "bf16", "flash"),
}

def fitting(model, gib, *how):
    "Tokens of a forward pass, in words."
    kept, recomputed = (tokens_that_fit(model, gib * 2**30, *how, recompute) for recompute in (False, True))
    if kept: return f"{kept:,} tokens ({recomputed:,} recomputed)"
    if recomputed: return f"{recomputed:,} recomputed"
    adapters = lora_config(StepwiseConfig(lora_r=16)) # needs PEFT
    return f"with adapters: {tokens_that_fit(model, gib * 2**30, *how, lora=adapters):,} tokens"


# %%
#| slow
#| echo: false
rows = {}
for name, model in models.items():
    plan = memory_plan(model, TrainConfig(), "bf16")
    always = sum(plan[part] for part in ("weights", "gradients", "moments"))
    rows[name] = {"before a token": f"{always:.1f} GiB"} | {card: fitting(model, *how) for card, how in cards.items()}
Markdown(as_markdown(pd.DataFrame(rows).T.rename_axis("parameters")))

# %% [markdown]
# ## The chapters
#
# New to DPO? [Start here](welcome.ipynb): what alignment is for, what each symbol means, and what to read in five hours. To use the package: [your model](your_model.ipynb), then 01, 05, 08, 10. A number is a place in the reading order and a floor of the code: modules import only from lower numbers (the command line also imports the demo).
#
# | chapter | the idea |
# |---|---|
# | [00 world](00_world.ipynb) | a world small enough to know the truth |
# | [01 preferences](01_preferences.ipynb) | what a preference is, and which tokens count |
# | [02 logprobs](02_logprobs.ipynb) | what a model says about a response; the reference is a table |
# | [03 loss](03_loss.ipynb) | the derivation, executed; what $\beta$ does; what $T$ stages add up to |
# | [04 packing](04_packing.ipynb) | the same numbers from fewer tokens: shared prompts, no padding |
# | [05 partition](05_partition.ipynb) | which data first |
# | [06 trainer](06_trainer.ipynb) | one stage, grown from six lines |
# | [07 figures](07_figures.ipynb) | the pictures of a run |
# | [08 evaluate](08_evaluate.ipynb) | did it work? held-out pairs, true reward, distance from S, signs of failure |
# | [09 lora](09_lora.ipynb) | adapters in place of weights: what a stage trains, saves and merges |
# | [10 folder](10_folder.ipynb) | a run is a folder that knows what it is |
# | [11 report](11_report.ipynb) | what a run says, and a model with a card |
# | [12 plan](12_plan.ipynb) | what is asked of a run: settings, sources, chunks, checked before anything is computed |
# | [13 stages](13_stages.ipynb) | one stage: ask the reference, train, measure, save |
# | [14 stepwise](14_stepwise.ipynb) | stepwise DPO: the loop over stages, and what it does |
# | [15 benchmarks](15_benchmarks.ipynb) | what a benchmark asks of a model, how sure its answer is, and what is computed twice |
# | [16 mt_bench](16_mt_bench.ipynb) | two turns, a judge, and marks with intervals |
# | [17 verify](17_verify.ipynb) | what somebody else can check of a run |
# | [18 cli](18_cli.ipynb) | the command line |
# | [19 mistakes](19_mistakes.ipynb) | a mistake is a function, too: how a check can name it |
# | [20 checks](20_checks.ipynb) | seventeen exercises, and what goes wrong in each |
# | [21 course](21_course.ipynb) | a notebook for students, and points for it |
# | [22 colab](22_colab.ipynb) | from an empty runtime to an aligned model |
#
# To teach with it: [a course of six sessions](teaching.ipynb), with four assignments that run on Colab: [1](assignments/a1.ipynb), [2](assignments/a2.ipynb), [3](assignments/a3.ipynb), [4](assignments/a4.ipynb).
#
# | question | in tiny worlds, most of them in ten |
# |---|---|
# | [protocol](experiments/protocol.ipynb) | eight questions fixed beforehand, and their answers |
# | [paper_in_miniature](experiments/paper_in_miniature.ipynb) | two of the paper's tables and two of its figures, redone where the truth is known |
# | [why_it_works](experiments/why_it_works.ipynb) | reference, order and schedule, each switched alone |
# | [smaller_beta](experiments/smaller_beta.ipynb) | are $T$ stages at $\beta$ one stage at $\beta/T$? |
# | [finite_data](experiments/finite_data.ipynb) | how many pairs a stage needs for that: a law, derived and simulated |
# | [finite_data_tested](experiments/finite_data_tested.ipynb) | its predictions for these worlds: they fail where pairs are known by heart; with three passes two of them hold, but restarts could do that, too |
# | [tuned_elsewhere](experiments/tuned_elsewhere.ipynb) | DPO, stepwise DPO, TR-DPO and Pre-DPO at settings that were chosen in other worlds: with a soft update TR-DPO is better than DPO as it was tuned; at another learning rate of DPO, chosen against by a hair, little is left |
# | [when_order_matters](experiments/when_order_matters.ipynb) | easy or hard first where hard sources have bad labels: equal with a moving reference; with a fixed one, end on the good labels |
# | [builds_on](experiments/builds_on.ipynb) | easy or hard first where hard builds on easy and a teacher wrote it: with a moving reference easy first, with a fixed one hard first; all at once is better than either |
# | [when_sizes_differ](experiments/when_sizes_differ.ipynb) | a small source and one five times as large: whichever first, cut so or in halves or not at all, it is equal |
# | [how_to_partition](experiments/how_to_partition.ipynb) | which measure, which direction, which pairs |
# | [how_many_stages](experiments/how_many_stages.ipynb) | one to eight, at one $\beta$ and at one that grows with their number |
# | [which_architecture](experiments/which_architecture.ipynb) | stepwise against plain DPO in tiny GPT-2, OPT, BLOOM, Llama and Qwen |
# | [model_size](experiments/model_size.ipynb) | the same from 86 thousand to 5.3 million parameters: the difference neither grows nor shrinks |
# | [stage_by_stage](experiments/stage_by_stage.ipynb) | what each stage gains, and what it undoes |
# | [new_domain](experiments/new_domain.ipynb) | a skill without pairs, longer strings, another alphabet |
# | [with_new_data](experiments/with_new_data.ipynb) | pairs that the model before wrote; labels by a judge, or by the model |
# | how it was done | [worlds and bodies](experiments/bodies.ipynb), [training data](experiments/training_data.ipynb), [a stage in memory](experiments/in_memory.ipynb), [one run and many](experiments/cells.ipynb), [comparing them](experiments/compare.ipynb), [every question as a grid](experiments/questions.ipynb) |
#
# | question | on a real model, SmolLM2-135M-Instruct |
# |---|---|
# | [smollm2](experiments/smollm2.ipynb) | the paper's first experiment, repeated in draws: a smaller version for a processor has been run and cannot decide, the large one waits for a card |
# | [which_is_easy](experiments/which_is_easy.ipynb) | easy to hard, by the sum of log-probabilities or per token? The two orders differ |
# | [known_truth](experiments/known_truth.ipynb) | the eight questions of the tiny worlds, where a program grades and hard builds on easy: fixed, not yet answered |
# | how it is done | [one run on real pairs](experiments/real_cells.ipynb), [tasks that a program grades](experiments/graded_tasks.ipynb), [one run on them](experiments/graded_cells.ipynb), [runs in eight minutes](experiments/timed.ipynb) |
#
# ## From the paper to cells
#
# | in arXiv 2403.19270 | here |
# |---|---|
# | Eq. 1, the loss in terms of $\gamma$ | [03, "The same loss in sDPO's words"](03_loss.ipynb) |
# | the reference as a lower bound, in prose | [03, "The reference as a lower bound"](03_loss.ipynb): an inequality one can test |
# | the algorithm: $M_{t-1}$ is reference and start of stage $t$ | [14, equation (1)](14_stepwise.ipynb), [13, "Ask the reference"](13_stages.ipynb) |
# | easy to hard, by reward accuracy under $M_0$ | [05](05_partition.ipynb): the definition, its two readings, its bias by length |
# | Table 1, DPO with different reference models | [paper_in_miniature](experiments/paper_in_miniature.ipynb); for your model, `reference="folder/of/a/model"` |
# | Table 3, easy-to-hard against a random split | `order="random"`, with the same chunk sizes, in [05](05_partition.ipynb) |
# | Figure 2, mean $\gamma_{ref}$ by reference | [demo, "What happens to the bar?"](demo.ipynb) |
# | Figure 3, stage 2 starting from S or from $M_1$ | [14, "Where the policy starts"](14_stepwise.ipynb) |
#
# The paper's benchmark tables are not reproduced here; its comparisons are redone in tiny worlds, with the controls that it lacks. The benchmarks themselves can be asked of any run: [15](15_benchmarks.ipynb), [16](16_mt_bench.ipynb).
