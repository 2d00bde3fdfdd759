# %% [markdown]
# # Runs in eight minutes
# > A list of runs that is worked off in short calls: what is finished is kept, what does not fit is not begun.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/timed.ipynb)
#
# **You should know** that an experiment is a list of [cells](cells.ipynb), each of which becomes one row of a table. **Time** 15 minutes to read, a few seconds to run.
#
# A graphics card is often lent for some minutes at a time. A process may end in the middle of anything, and what can be carried away is small. So the runs on real models follow three rules: a finished cell is written at once, as one line of a file; a cell that does not fit into the minutes that are left is not begun; no model is written.

# %%
#| default_exp timed

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
import gzip, json, os, platform, subprocess, time
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import psutil
import torch

from sdpo_nb.cells import RESULTS
from sdpo_nb.trainer import MetricsLog

# %%
import tempfile
from dataclasses import dataclass
from types import SimpleNamespace
from sdpo_nb.world import complaint


# %% [markdown]
# ## A line is there in full, or not at all
#
# The file has one row a line, in JSON. If the machine stops while a line is written, half of it stays. What is a whole line? One that ends. So we read up to the last end of a line, and remember how many bytes that were: the next row is written there, over the rest.

# %%
#| export
def read_lines(
    path,                     # of a .jsonl file, which need not be there
) -> tuple[list[dict], int]:  # rows, and the bytes that they take
    "The whole lines of a file. What a killed process left of a line does not count."
    path = Path(path)
    found = path.read_bytes() if path.exists() else b""
    size = found.rfind(b"\n") + 1
    return [json.loads(line) for line in found[:size].splitlines()], size


# %%
folder = Path(tempfile.mkdtemp())
path = folder / "toy.jsonl"
path.write_bytes(b'{"key": "a"}\n{"key": "b"}\n{"key": "c", "ga')
rows, size = read_lines(path)
assert [row["key"] for row in rows] == ["a", "b"]
rows, size


# %% [markdown]
# ## What made a row
#
# Rows come from several machines. So each says which card or processor it was, which commit of this package, and which versions. Where there is no git, the commit is taken from `SDPO_COMMIT`.

# %%
#| export
def _git(*words):
    "What git says about the checkout that holds the package; empty where there is none."
    here = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
    try: said = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True)
    except OSError: return ""
    return said.stdout.strip()

def card_name(
    device, # of a model
) -> str:
    "What computes: the name of the card, or of the processor's kind."
    if torch.device(device).type == "cuda": return torch.cuda.get_device_name(device)
    return f"CPU, {platform.machine()}"

def made_by(
    device, # of the model
) -> dict:  # card, commit, versions
    "What a row says about its origin."
    commit = os.environ.get("SDPO_COMMIT") or _git("rev-parse", "--short", "HEAD") or "unknown"
    versions = {package: version(package) for package in ("torch", "transformers", "sdpo_nb")}
    return dict(card=card_name(device), commit=commit, versions=versions)


# %%
sorted(made_by("cpu"))

# %% [markdown]
# ## The loop
#
# A *plan* is a function. It gets the rows that are there and returns the cells that are wanted, in order. Why not a list? A search comes first, and the settings that it chooses make the cells after it.
#
# How long will the next cell take? At most as long as the slowest one so far, for each unit of its `cost`, and a little more. The first cell of a process does not count where there are others: it compiles. With no cell yet to go by, one is begun. The minutes count from the start of the process, so that the import of PyTorch is inside.

# %%
#| export
SLOWER = 1.2 # a cell may take so many times what the slowest one took

def _seconds_used(): return time.time() - psutil.Process().create_time()

def _cost(cell): return getattr(cell, "cost", 1)

def _todo(plan, rows):
    "Cells of the plan that have no row, each once."
    known = {row["key"] for row in rows}
    return list({cell.key: cell for cell in plan(rows) if cell.key not in known}.values())

def _expected(cell, paces):
    "Seconds that a cell will take at most; `paces` are seconds for a unit of cost, in the order of the cells."
    slowest = max(paces[1:] or paces or [0.])
    return SLOWER * slowest * _cost(cell)

def run_timed(
    name: str,             # of the experiment: the file is NAME.jsonl
    plan,                  # rows -> cells that are wanted, in order; a cell has a `key`, and may have a `cost`
    run,                   # cell -> dict that JSON can hold
    folder,                # where the file is, or will be
    minutes: float = None, # from the start of the process; None: until all is done
    device = "cpu",        # what the rows say they were run on
    used = _seconds_used,  # () -> seconds that are gone already
) -> list[dict]:           # the rows, old and new
    """Run the cells that have no row yet, one after the other, each written when it is finished.
    Ends before a cell that would not be ready in time."""
    path = Path(folder) / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, size = read_lines(path)
    origin, paces = made_by(device), []
    with closing(MetricsLog(path, size)) as log:
        while todo := _todo(plan, rows):
            cell = todo[0]
            if minutes and used() + _expected(cell, paces) > 60 * minutes: break
            before = used()
            made = run(cell)
            seconds = used() - before
            paces.append(seconds / _cost(cell))
            row = dict(key=cell.key) | made | origin | dict(seconds=round(seconds, 2))
            log.add(row)
            rows.append(row)
            print(f"{seconds:6.1f} s  {cell}; {len(todo) - 1} to go", flush=True)

    mib = path.stat().st_size / 2**20
    left = _todo(plan, rows)
    print(f"{name}: {len(paces)} new rows, {len(rows)} in {path.name} ({mib:.2f} MiB)")
    if left:
        each = sum(paces) / max(1, len(paces))
        more = sum(_cost(cell) for cell in left) * each / 60
        print(f"{len(left)} cells are left of what is planned so far, about {more:.1f} minutes; call it again")
    return rows


# %% [markdown]
# A toy: cells that take a minute of an invented clock each. The file is the one above, with rows `a`, `b` and half of `c`. How many cells will be run in two minutes and a half?

# %%
clock = SimpleNamespace(seconds=0.)

@dataclass(frozen=True)
class Toy:
    key: str

def toy_plan(rows): return [Toy(key) for key in "abcdef"]
def toy_run(cell):
    clock.seconds += 60
    return dict(gain=1)
def toy(minutes): return run_timed("toy", toy_plan, toy_run, folder, minutes, used=lambda: clock.seconds)

rows = toy(minutes=2.5)
assert [row["key"] for row in rows] == list("abcd")
assert path.read_bytes().count(b"\n") == 4             # the half line is gone


# %% [markdown]
# Two: after the second, 120 of 150 seconds are gone, and a third might need 72. The next call has its own minutes. Here its second cell is killed:

# %%
def killed_at_f(cell):
    if cell.key == "f": raise KeyboardInterrupt("the machine stops")
    return toy_run(cell)

try: run_timed("toy", toy_plan, killed_at_f, folder)
except KeyboardInterrupt as stop: print(stop)

clock.seconds = 0
rows = toy(minutes=2.5)
assert [row["key"] for row in rows] == list("abcdef")
pd.DataFrame(rows).reindex(columns=["key", "gain", "card", "seconds"])


# %% [markdown]
# The first two rows are those that were written by hand, so they have a key and nothing else.
#
# ## Rows from elsewhere
#
# Results come back as small files. The package carries those that this book shows, in `data/results`. Others are looked for in `../shared/results`, beside the checkout, or in the folder that `SDPO_RESULTS` names. A file may be the `.jsonl` of a run, the same packed (`.jsonl.gz`), or a `.parquet` table. A row is found by its key; if two files have it, the first one counts.

# %%
#| export
def result_folders() -> list[Path]:
    "Where results may lie: those of the package first."
    beside = RESULTS.parents[2] / "shared" / "results"
    elsewhere = os.environ.get("SDPO_RESULTS") or beside
    return [RESULTS, Path(elsewhere)]

def _rows_of(path):
    if path.suffix == ".parquet": return pd.read_parquet(path).to_dict("records")
    if path.suffix == ".gz": return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    return read_lines(path)[0]

def read_results(
    name: str,        # of the experiment
    folders = None,   # None: `result_folders`; those that are missing are passed over
) -> list[dict]:      # rows, each with the `file` that it comes from
    "The rows of an experiment, from NAME.jsonl, NAME-*.jsonl, the same with .gz, and .parquet."
    kinds = (".jsonl", ".jsonl.gz", ".parquet")
    rows = {}
    for folder in folders or result_folders():
        for kind in kinds:
            files = [*Path(folder).glob(name + kind), *sorted(Path(folder).glob(f"{name}-*{kind}"))]
            for path in files:
                for row in _rows_of(path): rows.setdefault(row["key"], row | dict(file=path.name))
    return list(rows.values())


# %% [markdown]
# Half of our file is packed, as somebody might bring it from a card. Are all rows there, each once?

# %%
lines = path.read_bytes().splitlines(keepends=True)
(folder / "toy-card.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[3:])))
path.write_bytes(b"".join(lines[:4]))

found = read_results("toy", [folder, folder / "not there"])
assert [row["key"] for row in found] == list("abcdef")
assert read_results("toy", [folder / "not there"]) == []
{row["key"]: row["file"] for row in found}

# %% [markdown]
# ## What you now have
#
# - `run_timed`: a plan, worked off in calls of some minutes, one line for each finished cell.
# - `read_results`: the rows of an experiment, wherever they were made.
#
# ## Questions to test yourself
#
# 1. Why is the plan asked again after every cell?
#
#    <details><summary>Answer</summary>
#
#    The last run of a search completes it. From then on the settings are known, and the plan can name the cells that use them.
#
#    </details>
# 2. What is lost when a process is killed?
#
#    <details><summary>Answer</summary>
#
#    The cell that was being run, and nothing else. Its half line is cut off by the next call.
#
#    </details>
#
# ## Try this
#
# - Give the toy cells a `cost`: let `e` cost 5. Where does a call of 2.5 minutes stop then, from the beginning?
#
#   <details><summary>What you should see</summary>
#
#   In front of `e`, whatever is left: five times 72 seconds are more than there are. A call with `minutes=None` runs it.
#
#   </details>
