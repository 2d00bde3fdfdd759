# %% [markdown]
# # The command line
# > `sdpo run`, `sdpo partition`, `sdpo report`, `sdpo demo`.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/10_cli.ipynb)

# %%
#| default_exp cli

# %%
#| export
import os
os.environ.setdefault("OMP_WAIT_POLICY", "passive") # threads that spin cost a tiny model a factor of twenty; must precede torch

import argparse, sys, time
from pathlib import Path


# %% [markdown]
# ## Arguments
#
# Every field of `StepwiseConfig` is an option: its help, its default and its choices are written once, there.
# Torch is imported inside the commands, so that `sdpo --help` answers at once.

# %%
#| export
def _add_settings(parser):
    "An option per setting."
    from dataclasses import fields
    from sdpo_nb.stepwise import StepwiseConfig
    for f in fields(StepwiseConfig):
        name, text = "--" + f.name.replace("_", "-"), f.metadata["help"].replace("%", "%%") + f" (default {f.default})"
        if f.type is bool: parser.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=text)
        else: parser.add_argument(name, type=f.type if f.type in (int, float, str) else int, default=None, choices=f.metadata["choices"], help=text)

def _settings(args) -> dict:
    "Settings from --config, then from the command line, which wins."
    import yaml
    from dataclasses import fields
    from sdpo_nb.stepwise import StepwiseConfig
    given = yaml.safe_load(Path(args.config).read_text()) if args.config else {}
    if not isinstance(given or {}, dict): raise ValueError(f"{args.config}: expected a mapping of settings")
    return (given or {}) | {f.name: getattr(args, f.name) for f in fields(StepwiseConfig) if getattr(args, f.name) is not None}


# %%
#| export
def _sources(words, columns, split, revision, chat) -> dict:
    "orca=a.jsonl -> a source called orca."
    out, renames = {}, {}
    for c in columns or []:
        if "=" not in c: raise ValueError(f"--columns: expected theirs=ours, got '{c}'")
        renames.update([c.split("=", 1)])
    for word in words:
        name, _, source = word.partition("=")
        if not source: raise ValueError(f"--sources: expected name=file, folder or hub id, got '{word}'")
        out[name] = dict(source=source, columns=renames or None, split=split, revision=revision, chat=chat)
    return out


# %%
#| export
def _run(args):
    from sdpo_nb.stepwise import make_config, sdpo
    config = make_config(_settings(args))
    run = sdpo(args.model, _sources(args.sources, args.columns, args.split, args.revision, args.chat), config, args.folder)
    _show(run)

def _show(run):
    from sdpo_nb.stepwise import as_markdown
    if (run.folder / "partition.json").exists(): print(as_markdown(run.partition().set_index("source")), "\n")
    if run.stages: print(as_markdown(run.table().T), f"\n\nreport: {run.folder / 'report.md'}\nmodel:  {run.model_folder()}")

def _partition(args):
    from sdpo_nb.stepwise import make_config, partition_only
    config = make_config(_settings(args))
    _show(partition_only(args.model, _sources(args.sources, args.columns, args.split, args.revision, args.chat), config, args.folder))

def _report(args):
    from sdpo_nb.stepwise import Run
    if not (Path(args.folder) / "config.yaml").exists(): raise ValueError(f"{args.folder}: no run here (no config.yaml)")
    run = Run(Path(args.folder)); run.report(); _show(run)


# %% [markdown]
# ## The demo
#
# The whole story in the tiny world, in under two minutes: the partition, DPO with its beta chosen on validation prompts,
# DPO at beta / T, stepwise DPO, and the true reward of each beside the base model at its best temperature.

# %%
#| export
DEMO = dict(lr=1e-4, epochs=3, micro_batch=32, precision="fp32", max_length=64)

def demo(folder="runs/demo",       # one run folder per method goes in here
         betas=(0.1, 0.3, 0.9),    # for DPO; the best on validation prompts is kept
        ):                         # (the stepwise run, a table of true rewards on test prompts)
    "The tiny world from partition to true reward. beta is chosen for DPO, before stepwise DPO is run."
    import torch
    from sdpo_nb.stepwise import StepwiseConfig, sdpo
    from sdpo_nb.world import load_base, load_world
    torch.set_num_threads(1)               # fastest for a model this small
    w = load_world(); S, tok = load_base(w)
    def run(name, **kw): return sdpo(w.base, w.sources, StepwiseConfig(**DEMO | kw), Path(folder) / name)
    dpo = {b: run(f"dpo-{b}", beta=b, chunks=1) for b in betas}
    tau, beta = _best_tau(S, tok, w), max(betas, key=lambda b: _mean_reward(dpo[b].model, tok, w.validation))
    stepwise = run(f"sdpo-{beta}", beta=beta); T = len(stepwise.stages)
    small = dpo.get(round(beta / T, 6)) or run(f"dpo-{beta / T:.3g}", beta=beta / T, chunks=1)
    models = {"S": S, f"DPO({beta})": dpo[beta].model, f"DPO(beta/T = {beta/T:.2g})": small.model, f"sDPO({beta}), T = {T}": stepwise.model,
              f"sDPO(T beta = {beta*T:.2g}), T = {T}": run(f"sdpo-{beta*T:.3g}", beta=beta * T).model}
    return stepwise, _reward_table(models, tok, w.test, tau)


# %%
#| export
def _mean_reward(model, tok, prompts, tau=1.):
    from sdpo_nb.world import mean_interval, true_rewards
    return mean_interval(true_rewards(model, tok, prompts, tau))[0]

def _best_tau(S, tok, w):
    "The sampling temperature at which S does best on validation prompts."
    return max((1.0, 0.8, 0.6, 0.4, 0.2, 0.0), key=lambda t: _mean_reward(S, tok, w.validation, t))

def _reward_table(models, tok, prompts, tau):
    "True reward on test prompts, sampled and greedy, with 95 % intervals; the second row is S at its best temperature."
    import pandas as pd
    from sdpo_nb.world import mean_interval, true_rewards
    def cell(m, t): return "{:.3f} [{:.3f}, {:.3f}]".format(*mean_interval(true_rewards(m, tok, prompts, t, seed=1)))
    rows = [(n, cell(m, 1.0), cell(m, 0.0)) for n, m in models.items()]
    rows.insert(1, (f"S at its best temperature, {tau}", cell(models["S"], tau), rows[0][2]))
    return pd.DataFrame(rows, columns=["model", "true reward, sampled", "true reward, greedy"]).set_index("model")

def _demo(args):
    from sdpo_nb.stepwise import as_markdown
    start = time.time()
    run, table = demo(args.folder)
    _show(run); print("\n" + as_markdown(table), f"\n\n{time.time() - start:.0f} s")


# %% [markdown]
# ## Entry point

# %%
#| export
def _parser():
    p = argparse.ArgumentParser("sdpo", description="Stepwise DPO (arXiv 2403.19270).")
    sub = p.add_subparsers(dest="command", required=True)
    for name, text in (("run", "partition the sources, then one DPO stage per chunk"), ("partition", "only the pass of M_0 and the partition")):
        c = sub.add_parser(name, help=text, description=text)
        c.add_argument("--model", required=True, help="hub id or folder"); c.add_argument("--folder", required=True, help="of the run; the same run continues")
        c.add_argument("--sources", required=True, nargs="+", metavar="NAME=DATA", help="file, folder or hub id")
        c.add_argument("--columns", nargs="+", metavar="THEIRS=OURS", help="column renames"); c.add_argument("--split", default="train"); c.add_argument("--revision")
        c.add_argument("--chat", action="store_true", help="read string fields as turns of a chat"); c.add_argument("--config", help="YAML file of settings")
        if len(sys.argv) > 1 and sys.argv[1] == name: _add_settings(c)
    c = sub.add_parser("report", help="write report.md of a run again and print it"); c.add_argument("folder")
    c = sub.add_parser("demo", help="the tiny world, in two minutes"); c.add_argument("--folder", default="runs/demo")
    return p


# %%
#| export
def _quiet():
    "Keep the progress bars of long work; leave out those of every file that is read or written."
    from transformers.utils import logging
    logging.disable_progress_bar()

def main():
    "The command `sdpo`. Bad input is one line and exit status 2."
    args = _parser().parse_args()
    try:
        _quiet()
        dict(run=_run, partition=_partition, report=_report, demo=_demo)[args.command](args)
    except (ValueError, OSError) as e:
        if os.environ.get("SDPO_TRACEBACK"): raise
        print(f"sdpo: {str(e).splitlines()[0]}", file=sys.stderr); sys.exit(2)


# %%
#| export
if __name__ == "__main__" and __spec__: main()
