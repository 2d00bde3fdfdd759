# %% [markdown]
# # Your model, your pairs
# > From a file of preference pairs to an aligned model with a report: what to type, what fits, what to look at.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/your_model.ipynb)
#
# **You should know** what [DPO and its stages](welcome.ipynb) are. **Time** 10 minutes to read, a few seconds to run.
#
# ## What to type
#
# ```
# pip install git+https://github.com/sdpo-nb/sdpo_nb
# sdpo run --model HuggingFaceTB/SmolLM2-135M-Instruct --folder runs/first --lr 5e-6 --eval-share 0.05 --columns question=prompt \
#          --sources orca=Intel/orca_dpo_pairs uf=argilla/ultrafeedback-binarized-preferences-cleaned
# ```
#
# or, in Python,
#
# ```python
# from sdpo_nb.stepwise import StepwiseConfig, sdpo
#
# run = sdpo(
#     model="HuggingFaceTB/SmolLM2-135M-Instruct",
#     sources={
#         "orca": dict(source="Intel/orca_dpo_pairs", columns={"question": "prompt"}),
#         "uf": dict(source="argilla/ultrafeedback-binarized-preferences-cleaned", max_pairs=5000),  # its first 5,000 rows
#     },
#     config=StepwiseConfig(beta=0.1, lr=5e-6, eval_share=0.05),
#     folder="runs/first",
# )
# run.report()            # held-out pairs, answers, data, partition, stages, figures
# run.model               # an ordinary transformers model
# run.push("me/aligned")  # to the hub, with a model card
# ```
#
# **Sources** are files (JSONL, Parquet, ...), folders or hub ids, in [any of the usual formats](01_preferences.ipynb). Look before you train: `sdpo data`, with the same options, shows what would be read, dropped and scored. Plain text stays plain text; `--chat` sends it through the
# model's chat template. A source with system messages, such as Orca, goes through it in any case.
#
# **The learning rate.** The default, $5\cdot10^{-7}$ (ten times that with adapters), is for models of billions of parameters and tens of thousands of pairs. A small model and a few thousand pairs want ten times as much; with a few hundred pairs the default changes nothing, and the report says so.
#
# **Held-out pairs.** `eval_share=0.05` keeps the pairs of a twentieth of the prompts aside. Every stage is measured on them, and they lead the report. Without them you only know that the model learned its training pairs.
#
# **Another loss** than that of DPO is a function in Python, `StepwiseConfig(loss=...)`: [other losses](other_losses.ipynb) has IPO, a term that keeps chosen responses likely, and DPO by the token.
#
# **Following a run.** `--log-with tensorboard` (or `wandb`, `trackio`) tells a tracker of every step. `metrics.jsonl` in each stage's folder has the same numbers.
#
# **Another trainer.** `sdpo partition --export chunks` writes the chunks as files that TRL reads, and `sdpo measure --models S=BASE mine=FOLDER --sources pairs.jsonl` compares any models on pairs. [The same loop with TRL](with_trl.ipynb) shows both.
#
# **What it writes.** `sdpo mt-bench runs/first/stage-2/model --out mt --judge gpt-4` lets the model answer [MT-Bench](16_mt_bench.ipynb); without `--judge` you get the answers.
#
# ## A run as one file
#
# The same run can stand in one YAML file, where each source may have a split, columns and a `max_pairs` of its own (its first so many rows; `--columns` and `--max-pairs` on the command line are for all sources alike, and each source must have the old or the new name of a column):
#
# ```yaml
# model: HuggingFaceTB/SmolLM2-135M-Instruct
# folder: runs/first
# sources:
#   orca: {source: Intel/orca_dpo_pairs, columns: {question: prompt}, max_pairs: 2000}
#   uf: {source: argilla/ultrafeedback-binarized-preferences-cleaned, split: train, max_pairs: 5000}
# lr: 5.0e-6
# eval_share: 0.05
# ```
#
# `sdpo run --config first.yaml` starts it, and the same command goes on after whatever stopped it.
#
# **What "goes on" means.** A run that is killed and started again ends in the same weights, bit for bit: on the same kind of CPU, with as many threads and the same versions. Where one of these differs, it goes on and says so. On a graphics card, some kernels never compute the same bits twice; then the run says that, too.

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
import pandas as pd

from sdpo_nb.plan import defaults_table

# %% [markdown]
# ## All settings

# %%
pd.set_option("display.max_colwidth", None)
defaults_table()

# %% [markdown]
# ## What fits?
#
# Full fine-tuning keeps 16 bytes per parameter, before a single token is read, and what is left of the memory decides how many tokens a forward pass may have: the [first page](index.ipynb) has a table of models and cards. A card chooses this budget itself. `sdpo run` prints its plan, and stops at once where it cannot fit.

# %% [markdown]
# ## What to look at afterwards
#
# 1. **Held-out pairs**, the first table of the report. Is the interval of *change of gamma* above zero? Then the model prefers chosen responses more than S did, on prompts that it never saw.
# 2. **Answers** of S and of each stage to the same prompts. Read them. No number replaces this.
# 3. **Log-ratio of chosen**: does the probability of the *chosen* responses fall? In DPO it may, while that of the rejected ones falls faster. A steep fall means that the leash is too long: a larger $\beta$, a smaller learning rate, or fewer epochs.
# 4. **Signs of failure**, with how often they are false alarms.
# 5. **The last stage against the first.** If held-out $\gamma$ falls from stage to stage on the first source, later stages undo what the first one learned.
#
# ## What if
#
# | it says | what to do |
# |---|---|
# | out of memory, or *memory: training needs about ...* | `--lora-r 16` ([adapters](09_lora.ipynb)), `--gradient-checkpointing`, a smaller `--max-length`, a smaller `--token-budget` (the gradient stays the same) |
# | many pairs dropped or cut | a larger `--max-length`; see `sdpo data` |
# | minimal improvement | a larger `--lr` |
# | this run was started with beta = 0.1, not 0.2 | another `--folder`: half a run at each is no run |
# | *packing is off: ...* | the model does not give its own numbers in packed rows; padded batches are slower and right |
