# %% [markdown]
# # sdpo_nb
# > Stepwise DPO (sDPO): preference alignment in stages with a reference model that moves up. A book that computes; its cells are the package.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/index.ipynb)
#
# **sDPO** is *stepwise DPO* (Kim et al., ["sDPO: Don't Use Your Data All at Once"](https://arxiv.org/abs/2403.19270)): cut the preference data into chunks, easy ones first, train with DPO on one
# after the other, and let the model that leaves one stage be the reference of the next. It is not *Self-Distillation Policy Optimization* or another method shortened to SDPO.
#
# Here its equations are derived and checked, cell by cell, in notebooks; the cells marked for export are the package `sdpo_nb`, which does the same to your model. Two commands,
# with Python 3.11 to 3.13, pip, make and git:
#
# ```
# make demo    # sets up, then a tiny world from partition to true reward: a minute or two
# make test    # every notebook, every check
# ```

# %%
#| hide
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    get_ipython().system("pip install -q git+https://github.com/sdpo-nb/sdpo_nb")

# %% [markdown]
# ## Five minutes with sDPO
#
# The [tiny world](00_world.ipynb) has four string skills, a base model S that learned the wrong rule for half of the prompts, and a *true reward*, so that we can see whether alignment worked. This cell
# is the whole demo: it chooses $\beta$ for plain DPO on validation prompts, then runs stepwise DPO with it.

# %%
import tempfile
import pandas as pd
from IPython.display import Markdown
from sdpo_nb.cli import demo
from sdpo_nb.figures import plot_gamma, plot_partition
from sdpo_nb.preferences import load_pairs
from sdpo_nb.stepwise import as_markdown, gamma_table
from sdpo_nb.world import load_world, mean_interval

found = demo(tempfile.mkdtemp())

# %% [markdown]
# **Which data first?** Reward accuracy under S orders the sources. S agrees with most labels of `primer` and with half of those of `riddle`.

# %%
plot_partition(found.run.partition().reset_index());

# %% [markdown]
# **Which model is the reference?** The one before: each table of reference log-probabilities carries a hash of the weights that it came from. The first loss agrees, since a model that is its own
# reference starts at $\ln 2 = 0.693$.

# %%
stages = found.run.stages
assert [s["reference_kind"]["weights"] for s in stages] == [found.run.config["weights"]] + [s["end"] for s in stages[:-1]]
Markdown(as_markdown(found.run.table()))

# %% [markdown]
# **What happens?** The mean of $\gamma$, the log-ratio of chosen to rejected, climbs from model to model on every chunk, also on those that have not been trained on yet (hollow boxes). So the bar of
# a stage is higher than S would have set it.

# %%
gammas = gamma_table(found.run)
means = gammas.groupby(["chunk", "model"])["gamma"].mean().unstack()
assert (means.diff(axis=1).iloc[:, 1:] > 0).all(axis=None)
plot_gamma(gammas);

# %% [markdown]
# **Which $\beta$?** The one that is best for plain DPO on validation prompts, so that stepwise DPO has to beat a tuned opponent.

# %%
Markdown(as_markdown(found.choice.to_frame()))

# %% [markdown]
# **Did it help?** Here is the true reward on test prompts, with 95 % intervals over prompts.

# %%
Markdown(as_markdown(found.table()))

# %% [markdown]
# Both methods are far above S, at any temperature: this is alignment, not sharpening. But at the $\beta$ that is best for DPO, stepwise DPO is *worse* than DPO. It comes out below even DPO at
# $\beta/T$, a weaker pull; and at $T\beta$ it equals DPO at $\beta$. If all stages saw the same prompts, the [closed form](03_loss.ipynb) would make $T$ stages at $\beta$ one stage at $\beta/T$. These sources share no
# prompt, but they share skills; chapter 03 shows that such stages add up only in part. This is one world and one seed. The cell below holds the page to what it says.

# %%
prompts = [{str(row["prompt"]) for row in load_pairs(file)} for file in load_world().sources.values()]
assert len(set.union(*prompts)) == sum(map(len, prompts))
reward = found.rewards["sampled"]
S, sharp, dpo, small, stepwise, large = reward.columns
assert reward[[dpo, small, stepwise, large]].mean().min() > reward[[S, sharp]].mean().max() + 0.05
differences = {f"{a} minus {b}": mean_interval(reward[a] - reward[b]) for a, b in ((stepwise, dpo), (stepwise, small), (large, dpo))}
assert [high < 0 for _, _, high in differences.values()] == [True, True, False] and abs(differences[f"{large} minus {dpo}"][0]) < 0.01
Markdown(as_markdown(pd.DataFrame(differences, index=["mean", "low", "high"]).T))

# %% [markdown]
# ## What is true about it?
#
# One world and one seed prove little. The [experiments](experiments/protocol.ipynb) ask again in ten worlds with two seeds each, every method at its own best $\beta$ and learning rate; the questions were fixed before the answers were seen. Differences
# of mean true reward (from 0 to 1), with 95 % intervals; "equal" means that the whole interval lies within $\pm 0.02$.

# %%
from sdpo_nb.experiments import claims_table

found = claims_table().set_index("claim")
Markdown(as_markdown(found.assign(where=found["where"].map("[{0}](experiments/{0}.ipynb)".format))))

# %% [markdown]
# Tuned alike, the two methods are equal where the paper reports a gain, in five architectures, and the order of the data does not matter. What does is that a stage starts where the last one ended. At one and the same $\beta$ the methods are
# far apart, as in the demo above, and which of them wins depends on the $\beta$ that one picks: a stage is mostly another way to say how far the model may move from S, and at the same distance [one stage is no worse than three](experiments/how_many_stages.ipynb). Numbers, baselines and the search are on the page of the [protocol](experiments/protocol.ipynb); this is a tiny world, and says nothing certain of large models.
#
# ## Faster, with the same gradients
#
# The trainer reads each prompt once and pads nothing ([04](04_packing.ipynb)); where a model does not allow it, it falls back to padded batches and says so. Seconds per optimizer step of 8 pairs, SmolLM2-135M-Instruct, fp32, two CPU cores,
# against TRL's `DPOTrainer` with a precomputed reference at its fastest micro-batch and at micro-batch 8 (`make bench`):

# %%
import json
from importlib.resources import files

bench = json.loads((files("sdpo_nb.data") / "results/packing.json").read_text())
seconds, ratio, lines = "{:.1f} s".format, "{:.1f} x [{:.1f}, {:.1f}]".format, {}
for key, name in {"hh_harmless fp32": "HH-RLHF harmless", "ultrafeedback_binarized fp32": "UltraFeedback"}.items():
    r = bench[key]["rows"]
    best, eight = r[bench[key]["best_trl"]], next(v for side, v in r.items() if side.startswith("TRL, 8"))
    lines[name] = {"packed": seconds(r["packed"]["step"]), "TRL at its best": seconds(best["step"]), "slower by": ratio(*best["slower"]), "TRL, 8 pairs": seconds(eight["step"]), "slower by ": ratio(*eight["slower"])}
Markdown(as_markdown(pd.DataFrame(lines).T))

# %% [markdown]
# And on one NVIDIA H200, bf16, 32 pairs a step, against TRL at its best micro-batch of 4, 8, 16 and 32 (`make bench-gpu`, random weights in the shape of SmolLM2-135M and Llama-3.2-1B). Small models wait for Python on such a card, and gain less:

# %%
gpu = json.loads((files("sdpo_nb.data") / "results/gpu.json").read_text())
lines = {}
for name, setting in gpu["settings"].items():
    ours, theirs = setting["rows"]["ours, compiled"], setting["rows"][setting["best_trl"]]
    lines[name] = {"packed, compiled": f"{ours['step']:.2f} s", "TRL at its best": f"{theirs['step']:.2f} s", "tokens a second, x": f"{ours['times_trl']:.2f}", "memory": f"{ours['peak_gib']:.0f} GiB", "TRL's": f"{theirs['peak_gib']:.0f} GiB", "of the card's bf16 peak": f"{ours['of_peak']:.0%}"}
Markdown(as_markdown(pd.DataFrame(lines).T))

# %% [markdown]
# ## What fits?
#
# Full fine-tuning keeps weights, gradients and two moments of AdamW in fp32: 16 bytes a parameter, before a token is read. The rest of the memory decides how many tokens a forward pass may have ([06](06_trainer.ipynb) counts them, on models that are not loaded). Planned, not yet measured on a card; "recomputed" is
# `gradient_checkpointing`. `sdpo run` prints its plan, and stops at once where it cannot fit.

# %%
from transformers import LlamaConfig
from sdpo_nb.trainer import tokens_that_fit

def shape(hidden, inner, layers, heads, key_heads, vocabulary):
    return LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads, vocab_size=vocabulary, tie_word_embeddings=True)

models = {"135M": shape(576, 1536, 30, 9, 3, 49152), "360M": shape(960, 2560, 32, 15, 5, 49152), "1.2B": shape(2048, 8192, 16, 32, 8, 128256)}
cards = {"T4, 15 GB, fp16": (15, "fp16", "padded"), "L4, 24 GB, bf16": (24, "bf16", "flash"), "A100 or H100, 80 GB, bf16": (80, "bf16", "flash")}

def fitting(model, gib, precision, kernel):
    kept, recomputed = (tokens_that_fit(model, gib * 2**30, precision, kernel, again) for again in (False, True))
    return f"{kept:,} ({recomputed:,} recomputed)" if recomputed else "does not fit"

Markdown(as_markdown(pd.DataFrame({card: {name: fitting(model, *how) for name, model in models.items()} for card, how in cards.items()}).rename_axis("tokens in a forward pass")))

# %% [markdown]
# ## Your model, your pairs
#
# ```
# pip install git+https://github.com/sdpo-nb/sdpo_nb
# sdpo run --model HuggingFaceTB/SmolLM2-135M-Instruct --sources orca=Intel/orca_dpo_pairs uf=trl-lib/ultrafeedback_binarized \
#          --columns question=prompt --folder runs/first
# ```
#
# or, in Python,
#
# ```python
# from sdpo_nb.stepwise import StepwiseConfig, sdpo
#
# run = sdpo(model="HuggingFaceTB/SmolLM2-135M-Instruct",
#            sources={"orca": dict(source="Intel/orca_dpo_pairs", columns={"question": "prompt"}),
#                     "uf": "trl-lib/ultrafeedback_binarized"},
#            config=StepwiseConfig(beta=0.1, lr=5e-6, eval_share=0.05), folder="runs/first")
# run.report()    # held-out pairs, answers, data, partition, stages, figures
# run.model       # an ordinary transformers model
# run.push("me/aligned")  # to the hub, with a model card
# ```
#
# Sources are files (JSONL, Parquet, ...), folders or hub ids, in [any of the usual formats](01_preferences.ipynb). `sdpo data` shows what would be read, dropped and scored, and trains nothing. Plain text stays plain text; `--chat` sends it through the model's chat template. `eval_share` keeps some prompts aside, which every stage is
# then measured on; `--log-with tensorboard` (or `wandb`, `trackio`) tells a tracker of every step. The same run can stand in one YAML file, where each source may have a split and columns of its own:
#
# ```yaml
# model: HuggingFaceTB/SmolLM2-135M-Instruct
# folder: runs/first
# sources:
#   orca: {source: Intel/orca_dpo_pairs, columns: {question: prompt}, max_pairs: 2000}
#   uf: {source: trl-lib/ultrafeedback_binarized, split: train}
# lr: 5.0e-6
# eval_share: 0.05
# ```
#
# `sdpo run --config first.yaml` starts it, and the same command goes on after whatever stopped it. A run that is killed and started again ends in the same weights, bit for bit, on the same kind of CPU with as many threads and the same versions; where one of them differs, it goes on and says so.

# %% [markdown]
# ## The chapters
#
# A number is a place in the reading order and a floor in the import order: modules import only from lower numbers.
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
# | [09 stepwise](09_stepwise.ipynb) | the loop over stages, and the folder that survives |
# | [10 cli](10_cli.ipynb) | the command line and the demo |
# | [experiments/protocol](experiments/protocol.ipynb) | ten worlds, eight questions fixed beforehand, and their answers |
# | [experiments/paper_in_miniature](experiments/paper_in_miniature.ipynb) | the paper's tables and figures, redone where the truth is known |
# | [experiments/why_it_works](experiments/why_it_works.ipynb) | reference, order and schedule, each switched alone |
# | [experiments/smaller_beta](experiments/smaller_beta.ipynb) | are $T$ stages at $\beta$ one stage at $\beta/T$? |
# | [experiments/how_to_partition](experiments/how_to_partition.ipynb) | which measure, which direction, which pairs |
# | [experiments/how_many_stages](experiments/how_many_stages.ipynb) | one to eight, at one $\beta$ and at one that grows with their number |
# | [experiments/which_architecture](experiments/which_architecture.ipynb) | stepwise against plain DPO in GPT-2, OPT, BLOOM, Llama and Qwen |
# | [experiments/stage_by_stage](experiments/stage_by_stage.ipynb) | what each stage gains, and what it undoes |
# | [experiments/new_domain](experiments/new_domain.ipynb) | a skill without pairs, longer strings, another alphabet |
# | [experiments/with_new_data](experiments/with_new_data.ipynb) | pairs that the model before wrote; labels by a judge, or by the model |
#
# ## From the paper to cells
#
# | in arXiv 2403.19270 | here |
# |---|---|
# | Eq. 1, the loss in terms of $\gamma$ | [03, "The same loss in sDPO's words"](03_loss.ipynb) |
# | the reference as a lower bound, in prose | [03, "The reference as a lower bound"](03_loss.ipynb): an inequality one can test, and its conditions |
# | the algorithm: $M_{t-1}$ is reference and start of stage $t$ | [09, equation (1) and "One stage"](09_stepwise.ipynb) |
# | easy to hard, by reward accuracy under $M_0$ | [05](05_partition.ipynb): the definition, its two readings, its bias by length |
# | Table 1, DPO with different reference models | `reference="folder/of/a/model"` in [09](09_stepwise.ipynb) |
# | Table 3, easy-to-hard against a random split | `order="random"`, with the same chunk sizes, in [05](05_partition.ipynb) |
# | Figure 2, mean $\gamma_{ref}$ by reference | the stage table and `plot_gamma` above |
# | Figure 3, stage 2 starting from S or from $M_1$ | [09, "Where the target starts"](09_stepwise.ipynb) |
#
# The paper's benchmark tables are not reproduced here; its comparisons are, in the [tiny worlds](experiments/protocol.ipynb), with the controls that it lacks.
