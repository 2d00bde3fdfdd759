# %% [markdown]
# # The same loop with TRL
# > Stepwise DPO with TRL's `DPOTrainer`: the chunks from here, the training there, and how to see that each stage has the right reference.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/with_trl.ipynb)
#
# **You should know** what [a stage and its reference](14_stepwise.ipynb) are, and how DPO training with TRL looks. **Time** 20 minutes to read, a minute to run.
#
# [TRL](https://github.com/huggingface/trl) trains on many cards, with quantised models, with everything that its users have added. It has no stages. [Issue 1824](https://github.com/huggingface/trl/issues/1824) asks for them: a reference that "is updated with the previous trained checkpoint", and it names the paper of this
# book. The loop is short, and this page runs it. The one thing to get right is the reference, and the first loss of a stage shows whether it is: where policy and reference are the same model, it is $-\log\sigma(0) = \ln 2$.
#
# The page has four parts: the loop; the same run with `sdpo` beside it; the models of both, measured on the same pairs; and what goes wrong.
#
# ```
# pip install "sdpo_nb @ git+https://github.com/sdpo-nb/sdpo_nb" trl peft
# ```

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
import math, shutil, tempfile
from pathlib import Path

import pandas as pd
import torch
from datasets import disable_progress_bars, load_dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, get_linear_schedule_with_warmup
from transformers.utils import logging

from sdpo_nb.evaluate import as_text
from sdpo_nb.figures import plot_models
from sdpo_nb.stepwise import StepwiseConfig, changes_of, export_chunks, measure_models, sdpo, sdpo_partition
from sdpo_nb.trainer import learning_rate, make_optimizer
from sdpo_nb.world import load_world, skipped_without

torch.set_num_threads(1)
pd.set_option("display.max_colwidth", 90)
disable_progress_bars()
logging.disable_progress_bar()

# %% [markdown]
# TRL and peft are not part of this package. Where they are missing, each cell that needs them says so, and what it showed here.

# %%
needed = "TRL and peft: pip install trl peft"
there = all(importlib.util.find_spec(name) for name in ("trl", "peft"))
if there:
    from peft import LoraConfig, PeftModel
    from trl import DPOConfig, DPOTrainer
    print("TRL and peft are here")

def require_trl():
    if not there: raise ModuleNotFoundError("TRL and peft are not both installed")


# %% [markdown]
# ## The chunks
#
# The model and the three sources are those of the [tiny world](00_world.ipynb), 256 pairs of each. `sdpo partition --export` decides the order and writes each chunk as a file; here is the same in Python. Each line of a file is a pair as it stood in its source. It is whole: how long a row may be is a setting of whoever trains, `max_length` in both.

# %%
w, tmp = load_world(), Path(tempfile.mkdtemp())
sources = {name: dict(source=file, max_pairs=256) for name, file in w.sources.items()}
settings = dict(beta=0.3, lr=1e-4, precision="fp32", max_length=64)
parted = sdpo_partition(w.base, sources, StepwiseConfig(**settings), tmp / "run")
files = export_chunks(parted, tmp / "chunks")
print(files[0].read_text().splitlines()[0])
parted.partition()[["n", "accuracy", "low", "high"]].round(3)

# %% [markdown]
# ## The loop
#
# One stage reads a model from a folder, trains, and saves into the next folder. Without a reference of its own, TRL loads one from where the model came from. That is the folder of the stage before, and just what a moving reference is.
#
# The last five settings are there for the comparison below, and are not needed otherwise: no bf16, no graphics card, nothing computed twice, the rows in their order, and a line for every step.

# %%
tokenizer = AutoTokenizer.from_pretrained(w.base)

def trained(model, file, out, lr=1e-4, **more):
    "TRL's trainer after one stage; its model is saved in a folder."
    args = DPOConfig(
        output_dir=str(out),
        beta=0.3,
        learning_rate=lr,
        warmup_steps=0.1, # a share, as it is below 1
        per_device_train_batch_size=32,
        num_train_epochs=1,
        max_length=64,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        logging_steps=1,
    )
    pairs = load_dataset("json", data_files=str(file), split="train")
    trainer = DPOTrainer(model, args=args, train_dataset=pairs, processing_class=tokenizer, **more)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(out))
    return trainer

def losses(trainer): return [row["loss"] for row in trainer.state.log_history if "loss" in row]


# %%
first_losses = {}
with skipped_without(needed, "a first loss of 0.6931 in all three stages", strict=there):
    require_trl()
    model = w.base
    for t, file in enumerate(files, 1):
        trainer = trained(str(model), file, tmp / f"trl-{t}")
        model = tmp / f"trl-{t}"
        first_losses[f"stage {t}"] = losses(trainer)[0]
    for loss in first_losses.values(): assert abs(loss - math.log(2)) < 1e-5
    display(pd.Series(first_losses, name="first loss").round(4).to_frame())

# %% [markdown]
# That is stepwise DPO. TRL keeps the reference in memory as a second model. With `precompute_ref_log_probs=True` it asks the reference once, before the first step, which is [what this package does](02_logprobs.ipynb).
#
# ## The same run with `sdpo`
#
# The folder is already partitioned, so `sdpo` goes on from there. The pairs, their order, $\beta$, the learning rate and the batches are the same. Will the weights be the same?

# %%
run = sdpo(w.base, sources, StepwiseConfig(**settings), tmp / "run")

def distance(one, other):
    "Between the weights of two models: the norm of the difference."
    a, b = (AutoModelForCausalLM.from_pretrained(m).state_dict() for m in (one, other))
    return math.sqrt(sum(((a[name] - b[name]) ** 2).sum().item() for name in a))


# %%
with skipped_without(needed, "weights two fifths as far from each other as from S", strict=there):
    require_trl()
    apart = {f"stage {t}": distance(tmp / f"trl-{t}", run.model_folder(t)) for t in (1, 2, 3)}
    moved = {f"stage {t}": distance(w.base, run.model_folder(t)) for t in (1, 2, 3)}
    assert all(apart[t] < 0.5 * moved[t] for t in apart)
    display(pd.DataFrame({"TRL from sdpo": apart, "sdpo from S": moved}).round(4))


# %% [markdown]
# Not the same. The cause is the schedule: "a warm-up of 10 %" has two readings. TRL's first step has a learning rate of zero and changes nothing. Ours does not waste it. A stage has eight steps here, so one step is much.

# %%
def theirs(total):
    "Learning rates of a stage by the linear schedule of transformers, in parts of the peak."
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(0.1 * total), total)
    rates = []
    for _ in range(total):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    return rates

ours = [learning_rate(step, 8, StepwiseConfig(**settings)) / settings["lr"] for step in range(8)]
sums = {"TRL": sum(theirs(8)), "sdpo": sum(ours)}
assert abs(sums["TRL"] / sums["sdpo"] - 4 / 5) < 1e-6
print([round(rate, 2) for rate in theirs(8)], [round(rate, 2) for rate in ours], sep="\n")
{name: round(total, 3) for name, total in sums.items()}


# %% [markdown]
# All steps of TRL together are four fifths of ours. With hundreds of steps nobody would notice. To compare trainers, and not schedules, give TRL our optimizer with our schedule; it takes both.

# %%
def as_sdpo(model, n):
    "Our optimizer and schedule, as TRL takes them."
    config, total = StepwiseConfig(**settings), math.ceil(n / 32)
    optimizer = make_optimizer(model, config)
    return optimizer, LambdaLR(optimizer, lambda step: learning_rate(step, total, config) / config.lr)


# %%
with skipped_without(needed, "weights that differ by 7e-4, of 0.3 that they moved", strict=there):
    require_trl()
    place, apart, steps = w.base, {}, []
    for t, file in enumerate(files, 1):
        model = AutoModelForCausalLM.from_pretrained(place)
        both = as_sdpo(model, len(file.read_text().splitlines()))
        place = tmp / f"alike-{t}"
        trainer = trained(model, file, place, optimizers=both)
        steps += losses(trainer)
        apart[f"stage {t}"] = distance(place, run.model_folder(t))
    worst = max(abs(a - b) for a, b in zip(steps, run.metrics["loss"], strict=True))
    assert worst < 1e-4
    assert all(apart[t] < 0.01 * moved[t] for t in apart)
    print(f"the losses of {len(steps)} steps differ by {worst:.0e} at most")
    display(pd.DataFrame({"TRL from sdpo": apart, "sdpo from S": moved}).map("{:.0e}".format))

# %% [markdown]
# Two trainers with different code for pairs, loss and batches come to weights that differ by less than a hundredth of what was learned. So it does not matter for the result which of them you use. What differs is around it: TRL does not write down which model was the reference, and a loop that dies in its third stage is yours to continue.
#
# ## The models, measured
#
# `sdpo measure` compares models of any trainer on pairs. In a shell:
#
# ```
# sdpo measure --models S=BASE "TRL, stage 3=out/trl-3" "sdpo, stage 3=runs/first/stage-3/model" --sources riddle.jsonl
# ```
#
# Here the pairs are those that were trained on, so the table says that the two agree, and not that they are good.

# %%
with skipped_without(needed, "a change of gamma on riddle of 1.03 nats by TRL and 1.36 by sdpo after three stages", strict=there):
    require_trl()
    models = {"S": w.base}
    for t in (1, 2, 3):
        models[f"TRL, stage {t}"] = tmp / f"trl-{t}"
        models[f"sdpo, stage {t}"] = run.model_folder(t)
    models = {name: str(place) for name, place in models.items()}
    measured = measure_models(models, sources, StepwiseConfig(**settings), tmp / "measure")
    change = changes_of(measured).pivot(index="model", columns="source", values="mean").loc[list(models)[1:]]
    for t in (1, 2, 3):
        ratio = change.loc[f"TRL, stage {t}"] / change.loc[f"sdpo, stage {t}"]
        assert ratio.between(0.6, 1.4).all(), ratio
    shown = measured.loc["riddle", ["gamma", "prefers chosen", "change of gamma"]]
    display(shown.map(lambda cell: as_text(cell, ".2f") if cell else ""))

# %%
with skipped_without(needed, "both trainers further from S at every stage", strict=there):
    require_trl()
    plot_models(changes_of(measured), "S")


# %% [markdown]
# What to see: each stage is further to the right, also on the sources that came later, and whoever trained it. The points of TRL lie to the left of those of `sdpo`, because these are the models of its own schedule, with four fifths of the steps.
#
# ## What goes wrong
#
# The loop above goes through folders, which looks like a detour: why not keep the model in memory? And with LoRA, why not go on with the same adapter? Each row below is a second stage, or a third, that somebody might write. Before you run it: which of them begin at $\ln 2$?

# %%
def outcome(start):
    "The first loss of a stage, or the first line of the error that it ends in."
    try: return f"{losses(start())[0]:.4f}"
    except Exception as e: return f"{type(e).__name__}: {str(e).splitlines()[0][:70]}".replace(str(tmp), ".")

def lora(): return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")

def adapter(out):
    "Stage 1 with LoRA, and its adapter in a folder."
    trainer = trained(w.base, files[0], tmp / out, lr=2e-3, peft_config=lora())
    return trainer.model

def second(model, **more): return trained(model, files[1], tmp / "second", lr=2e-3, **more)

def base(): return AutoModelForCausalLM.from_pretrained(w.base)


# %% [markdown]
# First without LoRA. The model in memory is $M_1$, but its config still says where it came from, and that is S. TRL believes the config.

# %%
found = {}
with skipped_without(needed, "0.6797 for the model in memory, whose reference was S, and 0.6931 for its folder", strict=there):
    require_trl()
    M_1 = trained(w.base, files[0], tmp / "in-memory").model
    found["the model in memory"] = outcome(lambda: trained(M_1, files[1], tmp / "second"))
    found["its folder"] = outcome(lambda: trained(str(tmp / "in-memory"), files[1], tmp / "second"))
    assert found["its folder"] == "0.6931"
    assert float(found["the model in memory"]) < 0.69
    display(pd.Series(found, name="second stage begins at").to_frame())

# %% [markdown]
# A first loss *below* $\ln 2$ looks like good news: the policy is ahead of its reference from the start. It is ahead of S, from which it has learned for a stage, and this is the fixed reference of [chapter 14](14_stepwise.ipynb).
#
# Now LoRA. An adapter is a small difference to a model that stays as it is. Older releases of TRL, and trainers made after them, get the reference by switching the adapter off. In stage 1 this is right. In stage 2 the model without the adapter is S, not $M_1$. TRL 1.16 copies the adapter that it is given, under the name `ref`, and takes
# the copy as the reference. What comes of that?

# %%
found = {}
with skipped_without(needed, "0.6786 against S, 0.6931 for a copied adapter, an error in the stage after it", strict=there):
    require_trl()
    S_1 = adapter("lora-1")
    found["S as ref_model"] = outcome(lambda: second(S_1, ref_model=base()))
    found["the same adapter goes on"] = outcome(lambda: second(S_1))
    found["... and on, in stage 3"] = outcome(lambda: trained(S_1, files[2], tmp / "third", lr=2e-3))
    assert float(found["S as ref_model"]) < 0.69
    assert found["the same adapter goes on"] == "0.6931"
    assert "'ref' already exists" in found["... and on, in stage 3"]
    display(pd.Series(found, name="the stage begins at").to_frame())

# %%
with skipped_without(needed, "three errors", strict=there):
    require_trl()
    S_1 = adapter("lora-1")
    errors = {
        "a new adapter on top": outcome(lambda: second(S_1, peft_config=lora())),
        "the folder of the adapter": outcome(lambda: second(str(tmp / "lora-1"))),
        "the adapter, loaded to be used": outcome(lambda: second(PeftModel.from_pretrained(base(), tmp / "lora-1"))),
    }
    for what, said in errors.items():
        assert "Error" in said
        print(f"{what}\n    {said}")

# %% [markdown]
# The errors are the friendly outcomes. The first row of the table before is the one to fear: it trains, and nothing complains. Where the adapter has learned more, it shows in the log as a loss near 0 and an accuracy of 1 from the first lines on, as in [issue 8974](https://github.com/hiyouga/LlamaFactory/issues/8974) of
# LLaMA-Factory.
#
# One way is right in every version, and it is the same for every stage: **merge the adapter into the model, save it, and give the next stage the folder and a new adapter.** Then $M_1$ is an ordinary model. With its new adapter switched off, what is left is $M_1$ itself.

# %%
with skipped_without(needed, "0.6931 in all three stages", strict=there):
    require_trl()
    merged, starts = w.base, {}
    for t, file in enumerate(files, 1):
        trainer = trained(str(merged), file, tmp / f"adapter-{t}", lr=2e-3, peft_config=lora())
        merged = tmp / f"merged-{t}"
        trainer.model.merge_and_unload().save_pretrained(merged)
        tokenizer.save_pretrained(merged)
        starts[f"stage {t}"] = losses(trainer)[0]
    for loss in starts.values(): assert abs(loss - math.log(2)) < 1e-5
    display(pd.Series(starts, name="first loss").round(4).to_frame())

# %% [markdown]
# And the merged folders are models like any other, so they can be measured. (The adapters had a learning rate twenty times as large. They have few weights, and want a larger one.)

# %%
with skipped_without(needed, "gamma grows with every stage", strict=there):
    require_trl()
    lora_models = {"S": w.base} | {f"LoRA, stage {t}": str(tmp / f"merged-{t}") for t in (1, 2, 3)}
    by_lora = measure_models(lora_models, sources, StepwiseConfig(**settings), tmp / "measure")
    means = changes_of(by_lora).pivot(index="model", columns="source", values="mean")
    assert (means.diff().iloc[1:] > 0).all(axis=None)
    display(means.round(2))

# %%
#| hide
shutil.rmtree(tmp)

# %% [markdown]
# ## What you now have
#
# - The loop: `export_chunks`, then a `DPOTrainer` for each file that starts from the folder of the stage before.
# - One check for every stage: the first loss is $\ln 2$.
# - One rule for LoRA: merge, save, and begin the next stage with a new adapter.
# - `measure_models`, to compare what came out with anything else.
#
# ## Questions to test yourself
#
# 1. A second stage begins at a loss of 0.68 and falls. Is it broken?
#
# <details><summary>Answer</summary>
#
# It trains, but not as was meant. The policy is ahead of its reference before the first step, so the reference is an older model, most likely S. The pairs that stage 1 has already moved count less, as they do with a fixed reference.
#
# </details>
#
# 2. Why is a merged model safer than a copied adapter, when both begin at $\ln 2$?
#
# <details><summary>Answer</summary>
#
# The copy depends on what the trainer does with a given adapter, which has changed between versions, and the stage after that ends in an error. A merged model is a folder. There is nothing to switch off, and whoever loads it gets $M_1$.
#
# </details>
#
# 3. Why are the rows of a file in the order of the first epoch, and not in the order of the source?
#
# <details><summary>Answer</summary>
#
# So that a trainer that does not shuffle sees the same batches as `sdpo`. Only then can two trainers be compared step by step, as above. A trainer that shuffles does not care.
#
# </details>
#
# ## Try this
#
# Leave `train_sampling_strategy` out, so that TRL shuffles, and run the loop again.
#
# <details><summary>What you should see</summary>
#
# The first loss of every stage is still $\ln 2$: it does not depend on the batch. The weights of stage 3 are now about as far from those of `sdpo` as a run with another seed would be.
#
# </details>
