# %% [markdown]
# # On a free graphics card
# > From an empty Colab runtime to an aligned model, and nothing is lost when the connection is.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/22_colab.ipynb)
#
# **You should know** what [DPO and its stages](welcome.ipynb) are. What the settings mean stands in [Your model](your_model.ipynb). **Time** half an hour to read. Without a graphics card the page runs in a minute, on the [tiny world](00_world.ipynb). With one it aligns a real model, and the bar says how long that takes.
#
# Colab lends you a machine with a graphics card, a T4 with 15 GB, for nothing. There is a price: the machine is taken away again. After some hours, or when you leave the page for too long, everything on it is gone. So the question of this page is not only how to align a model there. It is how to do it so that **a lost machine costs minutes, not the run**.
#
# ## Before the first cell
#
# 1. *File > Save a copy in Drive.* A notebook that was opened from GitHub is not saved when you close it. The copy opens in a new tab; work there.
# 2. *Runtime > Change runtime type > T4 GPU*, then *Save*.
# 3. *Runtime > Run all.* Colab asks whether the notebook may use your Drive. Say yes.
#
# If the machine is taken away: open **your copy** again and do steps 2 and 3 again. That is all. Every cell of this page may run twice, and the run goes on where it was.

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    source = '"sdpo_nb @ git+https://github.com/sdpo-nb/sdpo_nb@v0.1.0"'
    get_ipython().run_line_magic("pip", f"install -q {source}")
again = "On Colab, choose Runtime > Disconnect and delete runtime, then run this cell again."
assert importlib.util.find_spec("sdpo_nb"), f"pip could not install sdpo_nb; why stands above. {again}"

import sdpo_nb
version = sdpo_nb.__version__
assert version == "0.1.0", f"This page is made for sdpo_nb 0.1.0, and {version} is installed. {again}"

# %% [markdown]
# This cell installs the package, in the version for which the page was written. You should see nothing, or a line of pip about restarting, which you need not do. If something goes wrong, the cell stops and says what.

# %%
import json, math, os, shutil, signal, subprocess, sys, tempfile
from pathlib import Path

import pandas as pd
import torch
from huggingface_hub import constants

from sdpo_nb.evaluate import as_text, greedy_answers
from sdpo_nb.figures import plot_gamma
from sdpo_nb.logprobs import load_config, load_model, load_tokenizer
from sdpo_nb.lora import lora_config
from sdpo_nb.report import Run, gamma_table
from sdpo_nb.stepwise import StepwiseConfig, sdpo
from sdpo_nb.trainer import GIB, TrainConfig, memory_plan, read_checkpoint
from sdpo_nb.world import load_world
from transformers import LlamaConfig

# %% [markdown]
# ## What do we have?
#
# A real model needs a graphics card, and the hub to fetch it from. Where one of the two is missing, the same cells take the tiny world.

# %%
offline = constants.HF_HUB_OFFLINE
tiny = offline or not torch.cuda.is_available()
if tiny: torch.set_num_threads(1)                # threads only slow down a model as small as this
"the tiny world, on the processor" if tiny else torch.cuda.get_device_name()

# %% [markdown]
# On Colab you should see `Tesla T4`. If it says *the tiny world*, you have no card: look at step 2 above. (What is stored on this page was made without one.)
#
# ## A folder that stays
#
# Your Drive survives the machine. So the run gets its folder there. On your own machine it is `runs/colab`, and for the tiny world a temporary folder will do.

# %%
on_colab = "google.colab" in sys.modules
if on_colab:
    from google.colab import drive
    drive.mount("/content/drive")
    home = Path("/content/drive/MyDrive/sdpo_nb")
elif tiny:
    home = Path(tempfile.mkdtemp())
else:
    home = Path("runs/colab")
home.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# Colab opens a window and asks for access. Without it the cell stops, and so does the rest of the page.
#
# ## A model and two sources
#
# The model is an id of the [hub](https://huggingface.co/models): here SmolLM2, with 135 million parameters. The sources are two data sets of preference pairs, and of each we take the first thousand pairs. One of them calls its prompts `question`, so that column gets another name. Its rows have a system message, too, so they go through the model's chat template. Plain text without one does so with `chat=True`.

# %%
world = load_world()
if tiny:
    model = world.base
    sources = {name: world.sources[name] for name in ("primer", "riddle")}
    own = dict(beta=0.3, lr=1e-4, epochs=2, max_length=64)
else:
    model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    orca = dict(source="Intel/orca_dpo_pairs", columns={"question": "prompt"}, max_pairs=1000)
    feedback = dict(source="trl-lib/ultrafeedback_binarized", max_pairs=1000)
    sources = {"orca": orca, "feedback": feedback}
    own = dict(beta=0.1, lr=5e-6, epochs=1, max_length=512)
folder = home / Path(model).name

# %% [markdown]
# To take a model of your own, change the id. All of its parameters are trained, so on a T4 it may have about half a billion of them. With `lora_r=16` in `own` (and `%pip install peft`), and no `lr` or a larger one, [adapters](09_lora.ipynb) are trained in their place, and a model of 1.2 billion parameters fits. Each model gets a folder of its own. If you change the sources or the settings after a run has begun, give the folder another name as well.
#
# ## Will it fit?
#
# A T4 has no bf16, so we train in **fp16**: less memory for what the forward pass keeps, and a card that computes much faster. The package scales the loss, so that small gradients do not become zero, and it keeps the weights in fp32 ([chapter 06](06_trainer.ipynb)). The second saving is **gradient checkpointing**: what the forward pass would keep is thrown away and computed again when it is needed.
#
# What does each of them save? The plan is made from the shape of the model, before any weight is loaded; so it can be made without a card, too. This one is for a T4 and 4,096 tokens in a forward pass. Which columns do you expect to stay the same?

# %%
if tiny: # the shape of SmolLM2-135M, which needs no download for this
    shape = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
else:
    shape = load_config(model)
card = 15 * GIB if tiny else torch.cuda.get_device_properties(0).total_memory

def plan_of(precision, recomputed):
    train = TrainConfig(token_budget=4096, gradient_checkpointing=recomputed)
    adapters = lora_config(StepwiseConfig(**own)) # None: all weights are trained
    return memory_plan(shape, train, precision, "padded", card // 16, adapters)


# %%
plans = pd.DataFrame({
    "fp32": plan_of("fp32", False),
    "fp16": plan_of("fp16", False),
    "fp16, recomputed": plan_of("fp16", True),
}).T
plans["all"] = plans.sum(axis=1)
assert plans["activations"].is_monotonic_decreasing
assert plans.loc["fp16, recomputed", "all"] < 0.85 * card / GIB
plans.round(1).rename_axis("GiB").style.format("{:.1f}")

# %% [markdown]
# Weights, gradients and the two moments of AdamW stay as they are: 16 bytes a parameter that is trained, and 4 for one that is not (`lora_r`). Only the activations shrink. If the second `assert` stops you, the model is too large for this card; [Your model](your_model.ipynb) has a table of what fits where. You need not choose the tokens of a forward pass: on a card the package takes as many as fit.
#
# The disk needs a plan, too. A checkpoint holds weights and moments, and each stage leaves its model. Drive has 15 GB for nothing, and a file that is deleted or replaced there may go to the **bin**, where it still counts. So the run should not save too often:

# %%
stages = 2
steps = math.ceil(0.9 * 1000 / 32)                     # of a stage: a tenth of its pairs is held out, 32 pairs a step
save_every = 15
checkpoints = stages * math.ceil(steps / save_every)   # the end of each stage is saved as well
weights, moments = plans.loc["fp16", ["weights", "moments"]]
written = checkpoints * (weights + moments) + stages * weights
print(f"{stages} stages of {steps} steps: {checkpoints} checkpoints and {stages} models, {written:.1f} GiB")

# %% [markdown]
# A checkpoint every fifteen steps fits into an empty Drive, and a lost machine costs fifteen steps at most. For a larger model, or more pairs, take a larger number, and empty the bin on drive.google.com. The last bytes of a file may need some minutes from the machine to Drive. What did not arrive in time is computed again.
#
# ## The rehearsal
#
# "Nothing is lost" is easily said. Before you trust a folder with an hour, try it with a minute: a run of the tiny world, on the same disk, with the same savings. We let another process do it, and kill that process after eight steps of the second stage. It gets signal 9, which no program can catch. A machine that is taken away does not say goodbye either.

# %%
shutil.rmtree(home / "rehearsal", ignore_errors=True)      # of an earlier visit
small = {name: world.sources[name] for name in ("primer", "riddle")}
savings = dict(precision="fp16", gradient_checkpointing=True, eval_share=0.1)
quick = dict(beta=0.3, lr=1e-4, save_every=5, **savings)
asked = torch.get_num_threads(), world.base, small, quick, str(home / "rehearsal")

program = """
import json, os, signal, sys
import torch
from sdpo_nb.stepwise import StepwiseConfig, sdpo

seen = []

def lights_out(row):
    if row["stage"] == 2: seen.append(row)
    if len(seen) == 8: os.kill(os.getpid(), signal.SIGKILL)

threads, model, sources, settings, folder = json.loads(sys.argv[1])
torch.set_num_threads(threads)
sdpo(model, sources, StepwiseConfig(**settings), folder, on_step=lights_out)
"""

# %%
died = subprocess.run([sys.executable, "-c", program, json.dumps(asked)], capture_output=True, text=True)
assert died.returncode == -signal.SIGKILL, died.stderr[-1000:]

left = Run(home / "rehearsal")
made = len((left.folder / "stage-2/metrics.jsonl").read_text().splitlines())
saved = read_checkpoint(left.folder / "stage-2")
kept = saved["state"]["batch"] if saved else 0
assert len(left.stages) == 1
assert made == 8
print(f"killed: 1 stage is finished; of the second, {made} steps were made, {kept} are in its checkpoint")


# %% [markdown]
# The process is dead, and its folder is there. Now the same call, here. And once more into another folder, without a kill.

# %%
def rehearse(folder): return sdpo(world.base, small, StepwiseConfig(**quick), folder)

resumed = rehearse(home / "rehearsal")
with tempfile.TemporaryDirectory() as elsewhere: straight = rehearse(elsewhere).stages[-1]
second = resumed.metrics.query("stage == 2")
taken = ~second["skipped"]                       # in fp16, a step may be skipped; more of that below
assert second["step"].tolist() == taken.cumsum().tolist()
if not resumed.config["not_deterministic"]: assert resumed.stages[-1]["end"] == straight["end"]
pd.Series({
    "made before the kill": made,
    "made again": made - kept,
    "steps in the end": len(second),
    "weights, killed and resumed": resumed.stages[-1]["end"],
    "weights, left alone": straight["end"],
}, name="stage 2").to_frame()

# %% [markdown]
# The last two rows are hashes of the weights, and they are equal: the two models are the same, bit for bit. Three steps were made twice. That was the whole damage.
#
# (On a graphics card a few kernels add up in any order. Where a run meets one of them, it says so, and the two hashes may differ. No step is lost there either.)
#
# ## The run
#
# Now the real one. `eval_share=0.1`, which is in `savings`, keeps a tenth of the prompts aside: they are never trained on, and say afterwards whether it helped.

# %%
settings = StepwiseConfig(**own, **savings, save_every=save_every)
run = sdpo(model, sources, settings, folder)
run.table()

# %% [markdown]
# While it runs, a bar shows the step, the loss and the time that is left. First the model reads all pairs once; then it is trained in two stages. When it has ended, look at three rows of the table:
#
# - *reference*: stage 1 is measured against S, the model that we began with, stage 2 against the model of stage 1.
# - *first loss*: $\ln 2 = 0.693$ in both stages, because each begins as its own reference.
# - *change of gamma*: an interval above zero says that the stage learned to prefer the chosen responses.
#
# In fp16, the first steps of a stage may be skipped: the scale of the loss begins high, and is halved until no gradient overflows ([chapter 06](06_trainer.ipynb)). `run.metrics["skipped"].sum()` counts them. When we tried this page with SmolLM2 and seven pairs a source, the only step of each stage was skipped, and nothing was learned. So a stage should have many more steps than that.

# %%
assert len(run.stages) == 2
assert all(abs(stage["first_loss"] - math.log(2)) < 0.01 for stage in run.stages)

# %% [markdown]
# Ask for the same run again, and it is there at once, because all of it is in the folder. This is what you meet after a lost machine.

# %%
again = sdpo(model, sources, settings, folder)
assert [stage["end"] for stage in again.stages] == [stage["end"] for stage in run.stages]

# %% [markdown]
# ## Did it help?
#
# On pairs that no stage has seen, against S. $\gamma$ says how much likelier, in nats, a model finds the chosen response than the rejected one; brackets are 95 % intervals.

# %%
held = run.held_out().query("against == 'S' and model != 'S'")
measures = ["change of gamma", "reward accuracy", "log-ratio of chosen"]
held[measures].map(as_text).droplevel("against").style

# %% [markdown]
# *Change of gamma* above zero: the model prefers the chosen responses more than S did, on prompts that are new to it. *Reward accuracy* is the share of pairs on which it does. The last column is a warning light: DPO may lower the probability of the **chosen** responses, too, as long as the rejected ones fall faster. Here it falls by less than one nat. A steep fall says that the model goes too far from S: take a larger `beta` or a smaller `lr`.
#
# The picture shows the pairs that *were* trained on, a panel for each source: $M_0$, which is S, then the model of each stage. The boxes should climb from left to right, and most where they become filled: there the source was trained on.

# %%
plot_gamma(gamma_table(run));


# %% [markdown]
# `run.report()`, in a cell of its own, shows everything: the data, the order of the sources, all tables and figures, signs of failure, time and memory. It also lies in the folder, as `report.md`.
#
# ## Replies, before and after
#
# Numbers are not what you wanted. Replies are. Each model has answered four held-out prompts, with the likeliest token each time. (Stored here are those of the tiny world, where you can see at once what is right: `sort` wants the letters in their order, `reverse` from the end, and `shift` the next letter for each. How many of the four does S get right, and how many the last model?)

# %%
def answers_of(model): return json.loads((run.folder / model / "answers.json").read_text())

folders = {"S": "base", "after stage 1": "stage-1", "after stage 2": "stage-2"}
replies = {name: answers_of(where) for name, where in folders.items()}
shown = pd.DataFrame({name: said["answers"] for name, said in replies.items()}, replies["S"]["prompts"])
shown.style.set_properties(**{"white-space": "pre-wrap", "text-align": "left", "vertical-align": "top"})

# %% [markdown]
# (In the tiny world S gets one right, `copy`. After stage 1 it is two, after stage 2 all four.)
#
# And your own questions. Change them; this cell costs seconds.

# %%
questions = ["reverse abc", "sort dcab", "copy feed"] if tiny else [
    "Why is the sky blue? Answer in two sentences.",
    "Write a short, friendly reply to a customer whose parcel is late.",
    "What is 17 + 25?",
]
tokenizer = load_tokenizer(model)

def prompt_of(question):
    message = [dict(role="user", content=question)]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)

def ask(model): return greedy_answers(model, tokenizer, [prompt_of(question) for question in questions])

asked_both = pd.DataFrame({"S": ask(load_model(model)), "aligned": ask(run.model)}, questions)
asked_both.style.set_properties(**{"white-space": "pre-wrap", "text-align": "left", "vertical-align": "top"})


# %% [markdown]
# Read them as a stranger would. Which reply would *you* have chosen? A thousand pairs change a model's manners, not what it knows.
#
# ## What is in the folder now?

# %%
def size_of(path): return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 2**20

parts = [run.folder / name for name in ("base", "stage-1", "stage-2", "figures", "report.md")]
sizes = {path.name: path.stat().st_size / 2**20 if path.is_file() else size_of(path) for path in parts}
pd.Series(sizes, name="MiB").round(2).to_frame()

# %% [markdown]
# `stage-2/model` is the aligned model, an ordinary folder of transformers: `AutoModelForCausalLM.from_pretrained` reads it from your Drive, in any notebook. `run.push("me/aligned")` puts it on the hub, with a card that says how it was made.
#
# ## When something goes wrong
#
# | you see | what to do |
# |---|---|
# | *the tiny world*, though you wanted a card | *Runtime > Change runtime type > T4 GPU*. Sometimes none is free; come back later, the folder waits |
# | *mount failed*, or a window that you closed | run the cell with `drive.mount` again, and say yes |
# | *this run was started with ... not ...* | you changed a setting. Set it back, or give the run another folder |
# | *another process works in this folder* | a second tab runs this page. *Runtime > Manage sessions* shows it; end one of them |
# | *out of memory*, or *memory: training needs ...* | a smaller `max_length`, or a smaller model |
# | *this checkpoint cannot be used* | it was cut off on its way to Drive. Do what the message says: the stage is trained anew |
# | no space left on Drive | empty the bin on drive.google.com, take a larger `save_every`, run all again |
#
# ## What this does not show
#
# The numbers stored on this page are from the tiny world on a processor. The way for a graphics card was tried with SmolLM2 too, on a processor and on a handful of pairs, but not on a T4. How long it takes there, and how far a thousand pairs move this model, is for your run to say. Two stages on two sources are not [better than one](experiments/protocol.ipynb) for being two.

# %%
#| hide
if tiny and not on_colab: shutil.rmtree(home)

# %% [markdown]
# ## What you now have
#
# - A notebook that you may start at any time, and that goes on where it was.
# - An aligned model on your Drive, with a report that says what it learned and against what it was measured.
# - A rehearsal for any machine that you do not trust: kill it on purpose, before it dies on its own.
#
# ## Questions to test yourself
#
# 1. Why is the rehearsal's folder on Drive, and not in a temporary folder?
#
# <details><summary>Answer</summary>
#
# Because the disk is one of the things that could fail. Locks, renaming and reading back must work *there*. A rehearsal on the machine's own disk would only show that the program can resume.
#
# </details>
#
# 2. fp16 makes the activations smaller. Why does it not halve the weights, gradients and moments?
#
# <details><summary>Answer</summary>
#
# Trained weights stay in fp32. Added to a weight in fp16, a step of $5\cdot10^{-6}$ would be rounded away: of the weights of SmolLM2-135M, 92 % would stay what they are (we added it to each and counted). Only the forward and backward passes compute in fp16.
#
# </details>
#
# 3. The machine is taken away in step 29 of a stage, with `save_every=15`. How many steps are made twice?
#
# <details><summary>Answer</summary>
#
# Fourteen: the last checkpoint is of step 15, and the steps 16 to 29 are made again. Their lines are cut from `metrics.jsonl` first, so none appears twice.
#
# </details>
#
# ## Try this
#
# 1. Put `save_every=100` into `quick` and run the rehearsal again. What is the damage now?
#
# <details><summary>What you should see</summary>
#
# `stage-2` has no checkpoint, so all eight steps are made again. The first stage is not touched, because a finished stage is saved in any case. The hashes are equal again.
#
# </details>
#
# 2. After the run, change `lr` in the cell "A model and two sources", and run all.
#
# <details><summary>What you should see</summary>
#
# A refusal that names the setting, with its old value and its new one. Half a run at one rate and half at another is no run. With `folder = home / "second"` it starts.
#
# </details>
