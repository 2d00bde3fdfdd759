# %% [markdown]
# # The command line
# > `sdpo data`, `sdpo partition`, `sdpo run`, `sdpo report`, `sdpo measure`, `sdpo eval`, `sdpo mt-bench`, `sdpo push`, `sdpo pack`, `sdpo verify` and `sdpo demo`.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/18_cli.ipynb)
#
# **You should know** what [a run](14_stepwise.ipynb) is. If you only want to use the commands, [your model, your pairs](your_model.ipynb) is the page for you. **Time** 65 minutes to read with its code, half a minute to run.
#
# | command | what it does |
# |---|---|
# | `sdpo data` | reads the pairs as a run would, says what is lost, shows three of them; needs no model but its tokenizer |
# | `sdpo partition` | lets S read all pairs, and says in which order the sources would come |
# | `sdpo run` | the same, and then one DPO stage per chunk; the same command goes on where it stopped |
# | `sdpo report` | writes the report of a run again |
# | `sdpo measure` | what any models, also those of another trainer, say about pairs, each compared with the first |
# | `sdpo mt-bench` | lets a model answer MT-Bench's questions, and a judge give marks |
# | `sdpo push` | uploads the last model with a card, or writes both into a folder |
# | `sdpo eval` | asks public benchmarks of S and every $M_t$ of a run, or of any models |
# | `sdpo pack` | makes one small file of a run, without its weights, to hand in |
# | `sdpo verify` | checks that what a run says follows from what its folder, or such a file, holds |
# | `sdpo demo` | the [tiny world](demo.ipynb), from partition to true reward |
#
# A command line is a way in and nothing more, so it has no settings of its own. Every setting of a run becomes an option, generated from `StepwiseConfig`, with its meaning, its choices and its default. Its bounds are checked where a Python call's are, in `StepwiseConfig`. A setting that is added in [chapter 12](12_plan.ipynb) is an option at once. The few options that are written by hand here say where the model, the data and the run are. And because a wrong option is what people meet first, bad input ends in one line that says what to do.

# %%
#| default_exp cli

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

# %% [markdown]
# ## Seven things people do
#
# ```
# sdpo data --model M --sources a.jsonl b.jsonl --max-length 512      # what would be lost, and three pairs of each
# sdpo run --model M --sources a.jsonl b.jsonl --folder runs/mine     # a run; the same line again after a crash
# sdpo run --config runs/mine/config.yaml --folder runs/other --beta 0.3   # the same again, with another beta
# sdpo run ... --eval-share 0.1                                       # keep a tenth of the prompts aside, and measure on them
# sdpo run ... --chunks 1 --order as_given                            # plain DPO on all pairs, to compare with
# sdpo run ... > run.log 2>&1                                         # plain lines, one every few steps, no bars
# sdpo measure --models S=M mine=out/checkpoint --sources c.jsonl     # models of any trainer on the same pairs
# ```
#
# The third line needs a word. A run writes down everything it was asked for in its `config.yaml`, and that file can be read as a request. So an old run can be repeated from its folder alone, as long as its model and its files are where they were.
#
# Two environment variables stand above everything, because they must be set before torch is imported. Without the first one, threads spin while they wait, and a tiny model becomes twenty times slower as soon as another
# process wants a core. The second keeps the tokenizers from warning about processes.
#
# Torch itself takes seconds to import. So nothing heavy is imported at the top of this module, only inside the commands, and `sdpo --help` answers at once. (That is also why the imports of this chapter stand in strange places.)

# %%
#| export
import os
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse, sys, time
from pathlib import Path

# %%
import contextlib, io, json, shlex, tempfile

from sdpo_nb.world import complaint, load_world

w, tmp = load_world(), Path(tempfile.mkdtemp())

# %% [markdown]
# A notebook can call what the shell calls. This helper does, and catches what would be printed.

# %%
from sdpo_nb import cli

def sdpo_says(line):
    "Exit status of a command, and what it printed."
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: cli.main(shlex.split(line))
        except SystemExit as e: status = e.code
    return status, (out if status == 0 else err).getvalue().strip()


# %% [markdown]
# The command to begin with is `sdpo data`. It reads pairs as a run would, trains nothing, and shows where each prompt ends: only what stands after `>>>` counts.

# %%
riddle = f"--sources riddle={w.sources['riddle']}"
status, text = sdpo_says(f"data --model {w.base} {riddle} --max-pairs 1 --max-length 64")
assert status == 0
print(text)


# %% [markdown]
# ## Settings become options
#
# `max_length` becomes `--max-length`. A setting that is true or false becomes two options, `--shuffle` and `--no-shuffle`. No option has a default of its own: what nobody types is None, so that a file, and after it `StepwiseConfig`, can say it.

# %%
#| export
def _add_settings(parser, only=None):
    "One option per field of StepwiseConfig, or for those that are named."
    from dataclasses import fields
    from sdpo_nb.plan import StepwiseConfig
    for f in fields(StepwiseConfig):
        if only and f.name not in only: continue
        text = f"{f.metadata['help']} (default: {f.default})"
        how = dict(default=None, help=text.replace("%", "%%"))
        if f.type is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:
            here = dict(chunks=int, loss=str) # chunks can only be a number here; a loss is refused, with the reason
            how["type"] = here.get(f.name, f.type)
            how["choices"] = f.metadata["choices"]
        parser.add_argument("--" + f.name.replace("_", "-"), **how)


# %%
parser = argparse.ArgumentParser("sdpo run")
_add_settings(parser)
given = parser.parse_args(["--beta", "0.3", "--init-target", "S"])
{name: value for name, value in vars(given).items() if value is not None}

# %% [markdown]
# ## A run as one file
#
# A run is a model, sources, settings and a folder. All of it can stand in one YAML file, where each source may have its own split and columns. `revision` there is the commit of the model; a source has its own inside its braces. A line that is no setting is answered with the name of the file, and with what was probably meant.

# %%
#| export
PLACES = "model", "revision", "sources", "held_out", "folder" # lines of a run's file that are no settings

def _check_line(name, path):
    "Raise ValueError for a line that is no setting: the file, and what was probably meant."
    from dataclasses import fields
    from difflib import get_close_matches
    from sdpo_nb.plan import OF_A_SOURCE, StepwiseConfig, no_such_setting
    known = [f.name for f in fields(StepwiseConfig)]
    if name in known: return
    if name in OF_A_SOURCE:
        raise ValueError(f"{path}: {name}: belongs to one source; "
                         f"write NAME: {{source: DATA, {name}: ...}} under sources")
    near = get_close_matches(str(name), [*known, *PLACES], 1)
    if near and near[0] in PLACES:
        raise ValueError(f"{path}: unknown line '{name}'; did you mean '{near[0]}'?")
    raise ValueError(f"{path}: {no_such_setting(name)}")


# %%
for name in ("bta", "modle", "model_revision", "max_pairs"): print(complaint(_check_line, name, "run.yaml"))


# %% [markdown]
# The `config.yaml` that a run writes into its folder is such a file, too. What it adds (weights, versions, ...) is skipped. And one thing more: a run also writes down what it filled in itself, such as the learning rate that follows from `lora_r`. If we took that as given, `--lora-r 16` would train adapters with the learning rate for all weights. So what a run would have filled in is left open again.

# %%
#| export
def _left_open(settings):
    "The settings of a run without those that it would fill in itself, so that they follow the options again."
    from sdpo_nb.plan import make_config
    given = {name: settings[name] for name in ("lora_r", "max_length") if name in settings}
    filled = make_config(given)
    follow = dict(lr=filled.lr, max_prompt_length=filled.max_prompt_length)
    if isinstance(settings.get("chunks"), list): follow["order"] = "as_given"
    return {name: value for name, value in settings.items() if name not in follow or value != follow[name]}

def _run_file(path) -> dict:
    "model, revision, sources, held_out, folder and settings from a YAML file, as far as they are there."
    from sdpo_nb.folder import RECORDED, read_yaml
    if path is None: return dict(settings={})
    try: given = read_yaml(Path(path).expanduser()) or {}
    except OSError as e:
        raise ValueError(f"--config: {path}: cannot be read ({e.strerror}); "
                         "give a YAML file, as the config.yaml of a run is one") from e
    if not isinstance(given, dict): raise ValueError(f"{path}: expected lines of the form 'setting: value'")
    found = {name: given.pop(name) for name in PLACES if name in given}
    for name in ("model", "revision", "folder"):
        if not isinstance(found.get(name) or "", str):
            raise ValueError(f"{path}: {name}: must be text, got {found[name]!r}")
    for name in ("sources", "held_out"):
        if not isinstance(found.get(name) or {}, dict):
            raise ValueError(f"{path}: {name}: expected lines of the form 'NAME: DATA', got {found[name]!r}")
    nested = given.pop("settings", None) or {}
    if not isinstance(nested, dict):
        raise ValueError(f"{path}: settings: expected lines of the form 'setting: value'")
    of_a_run = "versions" in given
    written = RECORDED if of_a_run else () # a device that somebody else wrote is a setting
    settings = nested | {name: value for name, value in given.items() if name not in written}
    for name in settings: _check_line(name, path)
    return found | dict(settings=_left_open(settings) if of_a_run else settings)


# %%
file = tmp / "run.yaml"
file.write_text("""
model: HuggingFaceTB/SmolLM2-135M-Instruct
sources:
  orca: {source: Intel/orca_dpo_pairs, columns: {question: prompt}}
beta: 0.2
""")
_run_file(file)


# %% [markdown]
# An option on the command line is stronger than a line of the file. And every value, from wherever it came, goes through the checks of `StepwiseConfig`.

# %%
#| export
def _config(args, settings):
    "StepwiseConfig from a file's settings and from options; options win."
    from dataclasses import fields
    from sdpo_nb.plan import StepwiseConfig, make_config
    typed = {f.name: getattr(args, f.name, None) for f in fields(StepwiseConfig)}
    options = {name: value for name, value in typed.items() if value is not None}
    return make_config(settings | options)


# %%
config = _config(given, dict(beta=0.2, lr=1e-5))
config.beta, config.lr, config.init_target

# %% [markdown]
# A run trained all weights with the defaults, so its file says `lr: 5e-07`. Somebody repeats it with `--lora-r 16`. Which learning rate should that be?

# %%
old = dict(lora_r=0, max_length=1024, lr=5e-7, max_prompt_length=512, beta=0.2)
again = _left_open(old)
typed = parser.parse_args(["--lora-r", "16"])
assert again == dict(lora_r=0, max_length=1024, beta=0.2)
assert _config(typed, again).lr == 5e-6
_config(typed, old).lr, _config(typed, again).lr


# %% [markdown]
# On the command line a source is `name=data`, or data alone, which is then called by its own name. `Qwen/Qwen2.5-0.5B` is `Qwen2.5-0.5B`, so a name does not end at its first dot. And every stage keeps its model in a folder `model`, so there the two folders above give the name. A path may have `=` in it, too: what exists as it is written has no name before it. A split, column renames and the rest apply to all sources given there.

# %%
#| export
def _parted(word, option):
    "'a=b' -> ('a', 'b')"
    name, _, value = word.partition("=")
    if not (name and value): raise ValueError(f"{option}: expected NAME=VALUE, got '{word}'")
    return name, value

def _by_name(pairs, option) -> dict:
    "[('a', 'b'), ...] -> {'a': 'b', ...}"
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{option}: '{name}' is given twice; give each a name of its own, NAME=VALUE")
    return dict(pairs)

def _pairs_of(words, option) -> dict:
    "['a=b', ...] -> {'a': 'b', ...}"
    return _by_name([_parted(word, option) for word in words], option)

ENDINGS = ".gz", ".jsonl", ".json", ".parquet", ".arrow", ".csv" # of data files

def _own_name(place):
    "What comes without a name is called this: runs/a/stage-2/model is a-stage-2."
    parts = Path(place).resolve().parts
    if parts[-1] == "model": return "-".join(parts[-3:-1])
    name = parts[-1]
    for ending in ENDINGS: name = name.removesuffix(ending)
    return name

def _places(words, option, called=_own_name) -> dict:
    "Name -> data or model. Those without a name have their own; so has a path with = in it that is there."
    def named(word):
        whole = "=" not in word or _lies_here(word)
        return (called(word), word) if whole else _parted(word, option)
    return _by_name(list(map(named, words)), option)

def _sources(args, words, option) -> dict:
    "What `sdpo` takes as sources, from the words after an option."
    asked = dict(
        split=args.split,
        revision=args.revision,
        columns=_pairs_of(args.columns, "--columns") or None,
        chat=args.chat or None,
        max_pairs=args.max_pairs,
    )
    how = {name: value for name, value in asked.items() if value is not None}
    places = _places(words, option)
    if args.revision and all(map(_lies_here, places.values())):
        raise ValueError(f"--revision: is a commit on the hub, and the data of {option} lie here; leave it out")
    return {name: dict(source=data, **how) for name, data in places.items()}

def _lies_here(place): return os.path.exists(os.path.expanduser(place)) # false, too, for what no path can be


# %% [markdown]
# Which names do these four get?

# %%
words = ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "runs/a/stage-1/model", "a.jsonl.gz"]
print(list(_places(words, "--models")))
print(complaint(_places, ["a/train.jsonl", "b/train.jsonl"], "--sources"))

# %%
args = argparse.Namespace(columns=["question=prompt"], split=None, revision=None, chat=True, max_pairs=None)
_sources(args, ["orca=a.jsonl", "trl-lib/ultrafeedback_binarized"], "--sources")


# %% [markdown]
# ## What was asked
#
# File and options together are what `sdpo` takes. One function gathers them for `run`, `partition` and `data`, and says what is missing. It also refuses what would be ignored: `--max-pairs` says how the sources *of the command line* are read, so beside a file's sources it would do nothing, and a trial on 24 pairs would become the whole run. A commit says nothing of data or of a model that lie here. And another model than the file's does not take over the commit of the file's.

# %%
#| export
def _what(args, needed=("model", "sources", "folder")) -> dict:
    "What `sdpo` takes, from the file and the options: model, sources, config, folder, ..."
    given = _run_file(args.config)
    if args.model and args.model != given.get("model"): given.pop("revision", None)
    for name in ("model", "folder", "model_revision"):
        if getattr(args, name, None): given[name.removeprefix("model_")] = getattr(args, name)
    _check_reading(args)
    if args.sources: given["sources"] = _sources(args, args.sources, "--sources")
    if args.held_out: given["held_out"] = _sources(args, args.held_out, "--held-out")
    for name in needed:
        if not given.get(name):
            raise ValueError(f"--{name}: is missing; give it, or write it into the file of --config")
    if args.model_revision and _lies_here(given["model"]):
        raise ValueError(f"--model-revision: is a commit on the hub, and {given['model']} lies here; leave it out")
    return dict(
        model=given["model"],
        sources=given["sources"],
        config=_config(args, given["settings"]),
        folder=given.get("folder"),
        revision=given.get("revision"),
        held_out=given.get("held_out"),
    )

def _check_reading(args):
    "Raise ValueError for an option about reading where nothing is read that it counts for."
    if args.sources or args.held_out: return
    for name in ("columns", "chat", "split", "revision", "max_pairs"):
        if not getattr(args, name, None): continue
        raise ValueError(f"--{name.replace('_', '-')}: counts for --sources and --held-out, and neither is given; "
                         "in the file of --config it belongs to each source")


# %% [markdown]
# The file from above names a model and a source, but no folder, so one is given as an option. `--beta 0.3` wins over the file's 0.2.

# %%
args = argparse.Namespace(**vars(given) | dict(
    config=file, model=None, model_revision=None, folder="runs/mine", sources=None, held_out=None))
asked = _what(args)
print(asked["model"], asked["sources"], asked["config"].beta)

args.max_pairs = 24
print(complaint(_what, args))
args.max_pairs, args.folder = None, None
print(complaint(_what, args))


# %% [markdown]
# ## The commands
#
# Each command is a few lines: gather what was asked, call the package, print what it found. First the two that compute, and what they show.

# %%
#| export
def _run(args):
    from sdpo_nb.stepwise import sdpo
    _show(sdpo(**_what(args)))

def _partition(args):
    from sdpo_nb.stepwise import export_chunks, sdpo_partition
    what = _what(args)
    run = sdpo_partition(**what)
    _show(run)
    files = export_chunks(run, args.export, what["sources"]) if args.export else []
    for file in files:
        with open(file, encoding="utf-8") as lines: print(f"{file}: {sum(1 for _ in lines)} pairs")

def _show(run):
    "Print what a run folder holds."
    from sdpo_nb.report import as_markdown
    if (run.folder / "partition.json").exists():
        print(f"Partition under S\n\n{as_markdown(run.partition())}\n")
    if run.stages:
        print(f"Stages\n\n{as_markdown(run.table())}\n")
        report = run.folder / "report.md"
        if report.exists(): print(f"report: {report}")
        print(f"model:  {run.model_folder()}")


# %% [markdown]
# One source of the tiny world, measured but not trained on. `--export` writes [its chunks as files](14_stepwise.ipynb), here two:

# %%
start = f"--model {w.base} {riddle} --folder {tmp}/run --max-length 64 --precision fp32"
status, text = sdpo_says(f"partition {start} --chunks 2 --export {tmp}/chunks")
assert status == 0
print(text.replace(str(tmp), "."))


# %% [markdown]
# `sdpo data` is the one that you met above. It needs the tokenizer, and no weights.

# %%
#| export
def _data(args):
    "Print what would be read and scored, without a model."
    from sdpo_nb.logprobs import load_tokenizer
    from sdpo_nb.plan import data_notes, read_sources
    what = _what(args, needed=("model", "sources"))
    tokenizer = load_tokenizer(what["model"], what["revision"])
    sources, held = read_sources(what["sources"], what["held_out"], tokenizer, what["config"])
    own = [s for s in held if s.counts] # of a source that was parted, the counts are told once
    for source in sources + own:
        print("\n".join(data_notes(source, bool(tokenizer.chat_template))))
        print("  the first pairs; what stands after >>> is scored")
        _print_pairs(source, tokenizer)

def _print_pairs(source, tokenizer):
    from sdpo_nb.preferences import decoded
    for i, pair in enumerate(decoded(source, tokenizer)):
        print(f"\n--- {source.name}, pair {i}\n{pair['prompt']}")
        for side in ("chosen", "rejected"): print(f">>> {side}: {pair[side]}")


# %% [markdown]
# Prompts that are nearly as long as a row leave little room. Then the first line says what is lost:

# %%
status, text = sdpo_says(f"data --model {w.base} {riddle} --max-length 16 --max-prompt-length 15")
print("\n".join(text.splitlines()[:2]))


# %% [markdown]
# The others begin where a run has ended. `sdpo push` gives the model away; with `--export` it writes into a folder what would be uploaded, so that you can look first.

# %%
#| export
def _finished(args):
    from sdpo_nb.report import Run
    run = Run(Path(args.folder))
    if not run.stages: raise ValueError(f"{args.folder}: no finished stage of a run in this folder")
    return run

def _report(args):
    run = _finished(args)
    report = run.report()
    _show(run)
    if not report.new: raise OSError(f"{report.path}: there is no new report, see above")

def _push(args):
    if args.export and args.public: raise ValueError("--public: counts for --to; --export uploads nothing")
    run = _finished(args)
    if args.to: print(f"pushed to {run.push(args.to, private=not args.public)}")
    else: print(f"written to {run.export(args.export)}, as it would be pushed")

def _demo(args):
    from sdpo_nb.demo import demo
    from sdpo_nb.report import as_markdown
    start, found = time.time(), demo(args.folder)
    _show(found.run)
    print(f"\nbeta = {found.beta:.2g} was chosen for DPO on validation prompts (k = 6), "
          "before stepwise DPO was run\n")
    print(as_markdown(found.choice.to_frame()))
    print("\nTrue reward on test prompts, with 95 % intervals\n")
    print(as_markdown(found.table()))
    print(f"\n{time.time() - start:.0f} s")


# %% [markdown]
# The folder of before holds a partition, but no stage. There is nothing to report yet, and the command says so:

# %%
status, text = sdpo_says(f"report {tmp}/run")
assert status == 2
print(text.replace(str(tmp), "."))


# %% [markdown]
# `sdpo eval` calls [chapter 15](15_benchmarks.ipynb). It takes a run, or any models, and local files or the hub. What was asked is kept, so the same command goes on where it stopped.

# %%
#| export
def _eval(args):
    from sdpo_nb.benchmarks import evaluate_folders, evaluate_run
    from sdpo_nb.evaluate import as_text
    from sdpo_nb.report import as_markdown
    how = dict(tasks=args.tasks, limit=args.limit, data=args.data)
    if bool(args.run) == bool(args.models):
        raise ValueError("eval: give the folder of a run, before all options, or --models A B; one of them")
    if args.run: where, found = Path(args.run) / "eval", evaluate_run(args.run, **how)
    else: where, found = Path(args.out), evaluate_folders(_places(args.models, "--models"), args.out, **how)
    print(f"Points, and their standard errors\n\n{as_markdown(_with_errors(found.table()))}\n")
    differences = found.differences()
    if len(differences):
        differences.index = [f"{model} against {against}" for model, against in differences.index]
        shown = differences.map(lambda cell: as_text(cell, "+.2f"))
        print(f"Differences on the same questions, with 95 % intervals\n\n{as_markdown(shown)}\n")
    print(f"kept in {where}")

def _with_errors(table):
    "Points and standard error in one cell."
    import pandas as pd
    names = dict.fromkeys(name for name, _ in table.columns)
    def cell(row, name): return f"{row[name, 'points']:.2f} ({row[name, 'standard error']:.2f})"
    rows = [{name: cell(row, name) for name in names} for _, row in table.iterrows()]
    return pd.DataFrame(rows, index=table.index)


# %% [markdown]
# An option such as `--tasks` takes every word behind it. So the folder of a run comes first. Behind `--tasks` it would be one task more, and no run would be left:

# %%
for line in ("eval", "eval --tasks arc_challenge runs/mine"):
    status, text = sdpo_says(line)
    assert status == 2
    print(text)



# %% [markdown]
# `sdpo measure` asks [models from elsewhere](14_stepwise.ipynb). A model is a folder or a hub id, with a name before it where that is too long for a table. What was printed lies in the folder, too, and with two models or more also a figure.
#
# Look at *change of gamma*, which is paired, and whether its interval holds 0. The first model is what the others are compared with, so let it be S, or whatever you would use if you did not train. And take pairs that none of the models was trained on: on its own pairs, every model looks good. The same call again reads nothing anew, also with one model more.

# %%
#| export
def _measure(args):
    import matplotlib.pyplot as plt
    from sdpo_nb.figures import plot_models
    from sdpo_nb.logprobs import replacing
    from sdpo_nb.report import as_markdown
    from sdpo_nb.stepwise import changes_of, measure_models
    models = _places(args.models, "--models", called=str)
    sources, folder = _sources(args, args.sources, "--sources"), Path(args.folder).expanduser()
    measured = measure_models(models, sources, _config(args, {}), folder)
    changes = changes_of(measured)
    measured.index = [f"{source}, {model}" for source, model in measured.index]
    table = as_markdown(_in_words(measured.rename_axis("source, model"), ".2f"))
    print(f"{table}\n")
    with replacing(folder / "measure.md") as tmp: tmp.write_text(table + "\n", encoding="utf-8")
    picture = folder / "measure.png"
    if len(models) == 1:
        picture.unlink(missing_ok=True) # that of an earlier call shows other models
        print(f"table: {folder}")
        return
    figure = plot_models(changes, next(iter(models)))
    with replacing(picture) as tmp: figure.savefig(tmp, format="png", dpi=120)
    plt.close(figure)
    print(f"table and figure: {folder}")

def _in_words(frame, digits=".1f"):
    "The same table with intervals as text, and nothing where there is none."
    from sdpo_nb.evaluate import as_text
    return frame.map(lambda cell: as_text(cell, digits) if isinstance(cell, tuple) else cell).fillna("")


# %% [markdown]
# S against itself. The change must be nothing:

# %%
twice = f"--models S={w.base} again={w.base}"
status, text = sdpo_says(f"measure {twice} {riddle} --max-pairs 40 --folder {tmp}/measure")
assert status == 0
print(text.replace(str(tmp), "."))


# %% [markdown]
# `sdpo mt-bench` lets a model answer [MT-Bench](16_mt_bench.ipynb). A judge is named as its endpoint calls it, and its address and key come from the environment: a key on a command line would stay in the shell's history. Without a judge the command stops after the answers. They are in FastChat's format, so its own scripts can go on from there.

# %%
#| export
def _mt_bench(args):
    from sdpo_nb.mt_bench import JUDGE_PROMPTS, QUESTIONS, mt_bench, openai_judge
    from sdpo_nb.report import as_markdown
    marks = mt_bench(
        args.model,
        args.out,
        questions=args.questions or QUESTIONS,
        judge=openai_judge(args.judge) if args.judge else None,
        limit=args.limit,
        name=args.name,
        judge_prompts=args.judge_prompts or JUDGE_PROMPTS,
        references=args.references,
        max_new=args.max_new,
        precision=args.precision,
    )
    if len(marks): print(as_markdown(_in_words(marks)))


# %%
(tmp / "question.jsonl").write_text(json.dumps(dict(question_id=81, category="math", turns=w.test[:2])))
short = f"--questions {tmp}/question.jsonl --name S --max-new 8"
status, text = sdpo_says(f"mt-bench {w.base} {short} --out {tmp}/mt")
assert status == 0
print(text.replace(str(tmp), "."))


# %% [markdown]
# Two commands are for handing a run in, and for whoever gets it: `sdpo pack` and `sdpo verify`, which call [chapter 17](17_verify.ipynb). The second must be of use in a script that grades fifty runs. Its exit status is 0 if nothing differs, 1 if anything does, and 2 if what was handed in is no run or cannot be opened. A fault of the program is 1 as well. So before you call a run false, look at the standard output: a run that differs has a table there with DIFFERS in it, and a fault has none. What could not be checked is counted, and is no fault; a run of which little can be checked passes, so read the counts, too.

# %%
#| export
def _pack(args):
    from sdpo_nb.verify import pack_run
    out = pack_run(args.folder, args.out)
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, without weights")

def _verify(args):
    from sdpo_nb.report import as_markdown
    from sdpo_nb.verify import DIFFERS, NOT_CHECKED, OK, verify
    found = verify(args.run, _places(args.sources, "--sources"), args.model)
    print(as_markdown(found))
    counts = found["result"].value_counts()
    print("\n" + ", ".join(f"{counts.get(answer, 0)} {answer}" for answer in (OK, DIFFERS, NOT_CHECKED)))
    if DIFFERS in counts: sys.exit(1)


# %% [markdown]
# A folder with a partition alone has nothing to hand in, and a text file is no run:

# %%
for line in (f"pack {tmp}/run", f"verify {tmp}/run.yaml"):
    status, text = sdpo_says(line)
    assert status == 2
    print(text.replace(str(tmp), "."))

# %% [markdown]
# So train on twenty-four pairs, pack, and verify what was packed.

# %%
small = f"--folder {tmp}/small --max-length 64 --precision fp32 --max-pairs 24 --lr 1e-3"
train = f"--model {w.base} {riddle} {small}"
for line in (f"run {train}", f"pack {tmp}/small", f"verify {tmp}/small.zip {riddle} --model {w.base}"):
    status, text = sdpo_says(line)
    assert status == 0
print(text.replace(str(tmp), "."))


# %% [markdown]
# ## The way in
#
# What is left is the parser: a command, where its model, data and run are, and the settings. An unknown option is answered with the option *of this command* that was probably meant. It may have the name that [another trainer](12_plan.ipynb) gives it, or a `_` in place of a `-`.

# %%
#| export
def _no_such_option(word, command):
    "The option of this command that is nearest to a word, or where all of them stand."
    from difflib import get_close_matches
    from sdpo_nb.plan import ABSENT, CALLED
    name = word.removeprefix("--").split("=")[0].replace("-", "_")
    meant = "--" + CALLED.get(name, name).replace("_", "-")
    known = list(command._option_string_actions)
    if name in ABSENT and "--beta" in known: return ABSENT[name]
    near = [meant] if meant in known else get_close_matches(meant, known, 1, cutoff=0.7)
    if near: return f"did you mean '{near[0]}'?"
    return f"{command.prog} has no such option; '{command.prog} --help' shows all"

class _Parser(argparse.ArgumentParser):
    "Says in one line what is wrong; of an unknown option, which one was probably meant."
    asked = None # the parser of the command that was typed

    def error(self, message):
        words = message.removeprefix("unrecognized arguments: ").split()
        unknown = [word for word in words if word.startswith("--")]
        if message.startswith("unrecognized arguments: ") and unknown and self.asked:
            message += f"; {_no_such_option(unknown[0], self.asked)}"
        self.exit(2, f"{self.prog}: error: {message}\n")


# %%
for word in ("--max_length", "--learning-rate", "--betta", "--output_dir"):
    print(f"{word:16} {_no_such_option(word, parser)}")


# %% [markdown]
# `sdpo --version` says what computes: it is the first thing to copy into a question to us.

# %%
#| export
class _Version(argparse.Action):
    "Print the versions of what computes, and end."
    def __call__(self, parser, *_):
        from importlib.metadata import version
        packages = ("sdpo_nb", "torch", "transformers", "datasets", "accelerate")
        print(", ".join(f"{p} {version(p)}" for p in packages))
        parser.exit()


# %% [markdown]
# Three commands take the same words: where model, data and folder are, how data are read, and the settings. The settings come from `StepwiseConfig`, which imports torch. So they are added only for the command that was typed; that is why `_parser` gets `argv` to see.

# %%
#| export
COMMANDS = { # those that take settings
    "run": "partition the sources, then train one DPO stage per chunk",
    "partition": "only measure and partition; `run` with the same options goes on",
    "data": "show what would be read, dropped and scored, and three pairs of each source; computes nothing",
}

def _parser(argv):
    about = ("Stepwise DPO (sDPO, arXiv 2403.19270): align a model on chunks of preference data, "
             "the reference moving up.")
    p = _Parser("sdpo", description=about)
    versions = "versions of sdpo_nb and of what it is built on"
    p.add_argument("--version", action=_Version, nargs=0, help=versions)
    sub = p.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = sub.add_parser(name, help=text, description=text)
        _add_places(command)
        if name == "partition": _add_export(command)
        if argv[:1] == [name]: _add_settings(command)
    _add_measure(sub, argv)
    _add_mt_bench(sub)
    sub.add_parser("report", help="write the report of a run again, and print it").add_argument("folder")
    _add_push(sub)
    _add_eval(sub)
    _add_hand_in(sub)
    demo = sub.add_parser("demo", help="the tiny world, from partition to true reward, in a minute or two")
    demo.add_argument("--folder", default="runs/demo",
                      help="for its runs; the same call on it continues (default: runs/demo)")
    p.asked = sub.choices.get(argv[0]) if argv else None
    return p

def _add_places(command):
    "Where model, data and run are."
    add = command.add_argument
    add("--config", metavar="FILE",
        help="YAML file: model, sources, folder and settings, any of them; options win")
    add("--model", help="hub id or folder")
    add("--model-revision", help="commit of a model on the hub")
    add("--sources", nargs="+", metavar="NAME=DATA", help="files, folders or hub ids of preference pairs")
    add("--held-out", nargs="+", metavar="NAME=DATA",
        help="pairs that are never trained on and measured after every stage; see also --eval-share")
    add("--folder", help="of the run; the same call on it continues")
    _add_reading(command)

def _add_reading(command):
    "How sources are read."
    add = command.add_argument
    add("--columns", nargs="+", default=[], metavar="THEIRS=OURS",
        help="columns that have another name in the data; for all sources alike, in --config for each")
    add("--chat", action="store_true", help="read string fields as turns of a chat")
    add("--split", help="of hub data (default: train)")
    add("--revision", help="commit of hub data")
    add("--max-pairs", type=int, metavar="N", help="the first N rows of each source")

def _add_export(partition):
    about = "write the chunks there, too: chunk-1.jsonl, ..., which TRL reads as they are"
    partition.add_argument("--export", metavar="FOLDER", help=about)


# %% [markdown]
# `measure` trains nothing, so it takes only the settings that say how pairs are read. `mt-bench` takes none: its words are those of FastChat.

# %%
#| export
READING = "max_length", "max_prompt_length", "precision", "packing", "token_budget", "device" # settings

def _add_measure(sub, argv):
    short = "what any models say about pairs: gamma, reward accuracy, and the change against the first model"
    measure = sub.add_parser("measure", help=short, description=short)
    add = measure.add_argument
    add("--models", nargs="+", required=True, metavar="NAME=MODEL",
        help="folders or hub ids; the others are compared with the first")
    add("--sources", nargs="+", required=True, metavar="NAME=DATA",
        help="files, folders or hub ids of preference pairs")
    add("--folder", default="runs/measure", help="for what is computed; the same call on it continues")
    _add_reading(measure)
    if argv[:1] == ["measure"]: _add_settings(measure, READING)

def _add_mt_bench(sub):
    short = "answers to MT-Bench in FastChat's files, and a judge's marks"
    command = sub.add_parser("mt-bench", help=short, description=short)
    add = command.add_argument
    add("model", help="folder or hub id")
    add("--out", required=True, metavar="FOLDER",
        help="for model_answer/ and model_judgment/; the same call goes on")
    add("--judge", metavar="MODEL",
        help="as an endpoint with OpenAI's protocol calls it (OPENAI_BASE_URL, OPENAI_API_KEY); none: answers only")
    add("--questions", metavar="FILE", help="FastChat's question.jsonl (default: from GitHub)")
    add("--judge-prompts", metavar="FILE", help="FastChat's judge_prompts.jsonl (default: from GitHub)")
    add("--references", metavar="FILE",
        help="FastChat's reference_answer/gpt-4.jsonl (default: from GitHub, or what --questions bring)")
    add("--limit", type=int, metavar="N", help="so many questions, of the categories in turn")
    add("--name", help="of the model in the files (default: made of its path)")
    add("--max-new", type=int, default=1024, metavar="N", help="longest answer in tokens (default: 1024)")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"),
        help="of the forward pass (default: auto)")


# %% [markdown]
# The rest begins with a finished run. `push` must be told where to, and either of its two answers excludes the other.

# %%
#| export
def _add_push(sub):
    about = "Upload the model of the last stage, with a card that says what it was made of and what came out."
    short = "upload the model of the last stage with a model card"
    push = sub.add_parser("push", help=short, description=about)
    push.add_argument("folder", help="of the run")
    where = push.add_mutually_exclusive_group(required=True)
    where.add_argument("--to", metavar="USER/NAME",
                       help="repository on the hub; made, and private, if it is not there")
    where.add_argument("--export", metavar="FOLDER", help="only write there what would be uploaded")
    push.add_argument("--public", action="store_true", help="make a new repository public")

def _add_eval(sub):
    short = "ask public benchmarks of the models of a run, or of any models"
    about = f"{short.capitalize()}. The same command goes on where it stopped. Needs lm_eval."
    command = sub.add_parser("eval", help=short, description=about)
    add = command.add_argument
    add("run", nargs="?", 
        help="folder of a run, before all options; S and every M_t are asked, and scores are kept in its folder eval")
    add("--models", nargs="+", default=[], metavar="[NAME=]MODEL",
        help="folders or hub ids; the others are compared with the first")
    add("--tasks", nargs="+", default=["h4"], metavar="TASK",
        help="h4, arc_challenge, hellaswag, mmlu, truthfulqa_mc2, eq_bench (default: h4)")
    add("--limit", type=int, metavar="N", help="only the first N questions of each task (of each subject of MMLU)")
    add("--data", metavar="FOLDER", help="local files of the benchmarks; default: from the hub")
    add("--out", default="runs/eval", metavar="FOLDER", help="with --models: where scores are kept (default: runs/eval)")


# %% [markdown]
# And the two for handing in, each with what its exit status means in its help.

# %%
#| export
def _add_hand_in(sub):
    "To pack a run, and to check one."
    short = "make one file of a run, without its weights, to hand in"
    pack = sub.add_parser("pack", help=short, description=short)
    pack.add_argument("folder", help="of the run")
    pack.add_argument("--out", metavar="FILE.zip", help="default: beside the folder, with its name")
    short = "check that what a run says follows from what its folder holds"
    answers = "Each check is ok, DIFFERS or not checked; the exit status is 1 if any DIFFERS."
    about = f"{short.capitalize()}. {answers}"
    check = sub.add_parser("verify", help=short, description=about)
    check.add_argument("run", help="folder of a run, or what `sdpo pack` made of it; before all options")
    check.add_argument("--sources", nargs="+", default=[], metavar="NAME=DATA",
                       help="where the pairs of the run lie; their other options are those of the run")
    check.add_argument("--model", help="folder or hub id of any model of the run, which is asked again")


# %% [markdown]
# Two sources, one with a name and one without. Does `--beta` end the list of sources?

# %%
words = ["run", "--model", "S", "--sources", "a.jsonl", "b=c.jsonl", "--beta", "0.3"]
args = _parser(words).parse_args(words)
args.command, args.model, args.sources, args.beta


# %% [markdown]
# Whatever goes wrong ends in one line. Wrong input, a missing file and a full disk are errors of kinds that we know and name ourselves; they have status 2. Any other exception is a fault of this package or of one below it, and
# says so, with the way to see where it happened.

# %%
#| export
def main(
    argv: list=None, # what was typed after `sdpo`; none: of this process
):
    """The command `sdpo`.

    Bad input ends in one line and exit status 2, any other fault in one and 1, Ctrl-C in one and 130;
    SDPO_TRACEBACK=1 shows where it came from.
    """
    argv = sys.argv[1:] if argv is None else argv
    commands = dict(
        run=_run,
        partition=_partition,
        data=_data,
        report=_report,
        measure=_measure,
        **{"mt-bench": _mt_bench},
        push=_push,
        eval=_eval,
        pack=_pack,
        verify=_verify,
        demo=_demo,
    )
    try:
        args = _parser(argv).parse_args(argv)
        from transformers.utils import logging
        logging.disable_progress_bar() # those of every file read; the bars of long work stay
        if not sys.stderr.isatty(): _as_a_log()
        commands[args.command](args)
    except BrokenPipeError: # sdpo data ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()) # nothing more is written
        sys.exit(141)
    except (Exception, KeyboardInterrupt) as e:
        if os.environ.get("SDPO_TRACEBACK"): raise
        status, said = _last_words(e)
        print(f"sdpo: {said}", file=sys.stderr)
        sys.exit(status)

def _as_a_log():
    "No bars of other libraries, and each line is written when it is said."
    import datasets
    datasets.disable_progress_bars()
    if hasattr(sys.stdout, "reconfigure"): sys.stdout.reconfigure(line_buffering=True)

def _last_words(e) -> tuple[int, str]:
    "Exit status and the line."
    if isinstance(e, KeyboardInterrupt): return 130, "stopped; the same command goes on"
    lines = str(e).strip().splitlines() or [type(e).__name__]
    if isinstance(e, (ValueError, OSError)): return 2, lines[0]
    whose = "not your input's fault, as far as sdpo can tell; SDPO_TRACEBACK=1 shows where"
    return 1, f"{type(e).__name__}: {lines[0]} ({whose})"


# %% [markdown]
# The *exit status* is for programs that call `sdpo`: a shell script, a job scheduler. What was asked for goes to the standard output, so that it can be kept in a file; bars and complaints go to the standard error.
#
# | status | what happened | what to do |
# |---|---|---|
# | 0 | all is done | read the report |
# | 2 | the input cannot work, a file is missing, the disk is full | read the line; the same command, mended, goes on |
# | 1 | of `sdpo verify`: something DIFFERS | read the table |
# | 1 | of any command: a fault of the program | `SDPO_TRACEBACK=1` shows where; the folder is as it was after the last file that was written |
# | 130 | stopped with Ctrl-C | the same command goes on |
# | 137, 143 | killed from outside: by the scheduler, or because the memory was full. No line is printed | the same command goes on, from the last checkpoint (`--save-every`) |
# | 141 | whoever read the output has read enough, as in `sdpo data ... \| head` | nothing |

# %%
for e in (ValueError("beta: must be above 0, got 0.0"), KeyError("gamma"), KeyboardInterrupt()):
    print(*_last_words(e))

# %%
#| export
if __name__ == "__main__" and __spec__: main() # not in a notebook

# %% [markdown]
# ## Six mistakes
#
# These are the mistakes that people meet first. Before you run the cell: which of them can be seen without reading the pairs, and which not? Each must end in one line, and must leave no run in the folder, so that the corrected call can use it.

# %%
(tmp / "settings.yaml").write_text("bta: 0.2\n")
start = f"run --model {w.base} {riddle} --folder {tmp}/other"
wrong = {
    "beta of zero": f"{start} --beta 0",
    "a misspelt setting": f"{start} --config {tmp}/settings.yaml",
    "too many stages": f"{start} --chunks 1000 --max-length 64",
    "a name people know": f"{start} --learning-rate 1e-5",
    "no sources": start.replace(riddle, ""),
    "no such model": start.replace(w.base, "./nowhere"),
}

# %%
data = str(Path(w.base).parent)
for what, line in wrong.items():
    status, text = sdpo_says(line)
    assert status == 2
    assert len(text.splitlines()) == 1
    assert not (tmp / "other" / "config.yaml").exists()
    print(f"{what:20} {text.replace(data, 'data').replace(str(tmp), '.')}")

# %% [markdown]
# Only *too many stages* needs the pairs: how many are left depends on how many were dropped.

# %%
#| hide
import shutil; shutil.rmtree(tmp)

# %% [markdown]
# ## What you now have
#
# Eleven commands, and no setting that the library does not have.
#
# ## Questions to test yourself
#
# 1. Why does `--config` go through the same checks as Python code?
#
# <details><summary>Answer</summary>
#
# Because both end in `StepwiseConfig`. A second set of checks would sooner or later allow something that the first refuses.
#
# </details>
#
# 2. `sdpo run --config runs/mine/config.yaml --folder runs/other --lora-r 16`: the file says `lr: 5e-07`. With which learning rate are the adapters trained, and why?
#
# <details><summary>Answer</summary>
#
# With 5e-6. The run had filled in 5e-7 itself, because it had no adapters. What a run filled in is left open again, and follows from the new options. Had somebody asked for `--lr 1e-5`, the file would say so, and it would stay.
#
# </details>
#
# 3. A script grades by the exit status of `sdpo verify` alone. When is it unfair?
#
# <details><summary>Answer</summary>
#
# When the program fails: that is status 1, too. A run that differs has a table on the standard output, and a fault has none. And status 0 with many *not checked* is no praise: the counts say how much was looked at.
#
# </details>
#
# ## Try this
#
# Start `sdpo demo`, stop it half-way with Ctrl-C, and start it again.
#
# <details><summary>What you should see</summary>
#
# `sdpo: stopped; the same command goes on`. The second call skips the runs that are finished, goes on in the one that was interrupted, and prints the same table.
#
# </details>
