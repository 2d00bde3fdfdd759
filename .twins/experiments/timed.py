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
import gzip, os, platform, time, zlib
from collections import Counter
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import psutil
import torch

from sdpo_nb.cells import RESULTS
from sdpo_nb.folder import alone_in, package_commit
from sdpo_nb.logprobs import lines_of
from sdpo_nb.trainer import MetricsLog

# %%
import tempfile
from dataclasses import dataclass
from types import SimpleNamespace
from sdpo_nb.world import complaint


# %% [markdown]
# ## A line is there in full, or not at all
#
# The file has one row a line, in JSON. If the machine stops while a line is written, half of it stays. What is a whole line? One that ends. So we read up to the last end of a line, and remember how many bytes that were: the next row is written there, over the rest. A line that ends and cannot be read is something else: two files, put together after one was torn, have such a line.

# %%
#| export
def _whole_lines(found, path):
    "Rows of the lines that end, and the bytes that they take."
    size = found.rfind(b"\n") + 1
    return lines_of(found[:size], path), size

def read_lines(
    path,                     # of a .jsonl file, which need not be there
) -> tuple[list[dict], int]:  # rows, and the bytes that they take
    "The whole lines of a file. What a killed process left of a line does not count. Raises ValueError for a bad line."
    path = Path(path)
    return _whole_lines(path.read_bytes() if path.exists() else b"", path)


# %%
folder = Path(tempfile.mkdtemp())
path = folder / "toy.jsonl"
path.write_bytes(b'{"key": "a"}\n{"key": "b"}\n{"key": "c", "ga')
rows, size = read_lines(path)
assert [row["key"] for row in rows] == ["a", "b"]

joined = folder / "joined.jsonl"
joined.write_bytes(path.read_bytes() + b'{"key": "d"}\n')
print(complaint(read_lines, joined))
rows, size


# %% [markdown]
# ## What made a row
#
# Rows come from several machines. So each says which card or processor it was, which [commit of this package](../10_folder.ipynb), and which versions. Where git does not know it, the commit is taken from `SDPO_COMMIT`.

# %%
#| export
def card_name(
    device, # of a model
) -> str:
    "What computes: the name of the card; of a processor its name and the instructions that PyTorch uses."
    if torch.device(device).type == "cuda": return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")                        # of Linux
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = (names or [platform.processor() or platform.machine()])[0]
    return f"CPU, {name}, {torch.backends.cpu.get_cpu_capability()}"

def made_by(
    device, # of the model
) -> dict:  # card, commit, versions
    "What a row says about its origin."
    commit = os.environ.get("SDPO_COMMIT") or package_commit() or "unknown"
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
#
# A folder is worked in by one call at a time: a second one would run the same cells, and cut off what the first has just written. And the rows of a file belong together. If they are computed in bf16, a call that would go on in fp32 is refused, by `check_alike`.
#
# A cell may also fail: it does not fit into memory, or a number is not finite. Then a line with its error is written in place of a row, and the next cell has its turn. The next call tries it once more, and after that it is left alone: take its lines out of the file if it is to be tried again. Where two cells in a row fail, it is hardly the cells, so the call ends. What needs the row of a failed cell has to wait, as the draws do for a search. The call says at its end what failed, and its exit code says it too.

# %%
#| export
SLOWER = 1.2 # a cell may take so many times what the slowest one took

def _seconds_used(): return time.time() - psutil.Process().create_time()

def _cost(cell): return getattr(cell, "cost", 1)

def _results(rows): return [row for row in rows if "error" not in row]

def _todo(plan, rows):
    "Cells of the plan that have no row and have not failed twice, each once."
    results = _results(rows)
    failed = Counter(row["key"] for row in rows if "error" in row)
    known = {row["key"] for row in results} | {key for key, times in failed.items() if times > 1}
    return list({cell.key: cell for cell in plan(results) if cell.key not in known}.values())

def _expected(cell, paces):
    "Seconds that a cell will take at most; `paces` are seconds for a unit of cost, in the order of the cells."
    slowest = max(paces[1:] or paces or [0.])
    return SLOWER * slowest * _cost(cell)

def check_alike(
    name: str, # of the experiment
    folder,    # where its file is, or will be
    **alike,   # field -> the value that all rows must have, as precision
):
    "Raise ValueError where a row was computed otherwise than the next one would be."
    path = Path(folder) / f"{name}.jsonl"
    for row in read_lines(path)[0]:
        for field, value in alike.items():
            if row.get(field, value) == value: continue
            raise ValueError(f"{path}: has rows with {field} = {row[field]}, not {value}; use that, or another folder")

def _tried(run, cell): # -> what the cell made, or its error
    try: return run(cell)
    except Exception as e: return dict(error=f"{type(e).__name__}: {e}".split("\n")[0][:300])

def _two_failed(new): return len(new) > 1 and not _results(new[-2:])

def _raise_for_failed(path, plan, rows):
    "Raise ValueError for cells that have an error in place of a row."
    errors = {row["key"]: row["error"] for row in rows if "error" in row}
    failed = [f"{cell}: {errors[cell.key]}" for cell in _todo(plan, _results(rows)) if cell.key in errors]
    if failed: raise ValueError(f"{path}: {len(failed)} failed; {'; '.join(failed)}")

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
    Ends before a cell that would not be ready in time. Raises ValueError where another process works in the folder,
    and, at its end, for cells that failed."""
    path = Path(folder) / f"{name}.jsonl"
    with alone_in(path.parent):
        rows, size = read_lines(path)
        origin, new, paces = made_by(device), [], []
        with closing(MetricsLog(path, size)) as log:
            while todo := [cell for cell in _todo(plan, rows) if cell.key not in {row["key"] for row in new}]:
                cell, before = todo[0], used()
                late = minutes is not None and before + _expected(cell, paces) > 60 * minutes
                if late or _two_failed(new): break
                made = _tried(run, cell)
                seconds = used() - before
                row = dict(key=cell.key) | made | origin | dict(seconds=round(seconds, 2))
                log.add(row)
                rows.append(row)
                new.append(row)
                if "error" not in row: paces.append(seconds / _cost(cell))
                print(f"{seconds:6.1f} s  {cell}; {row.get('error', f'{len(todo) - 1} to go')}", flush=True)

    mib = path.stat().st_size / 2**20
    left = _todo(plan, rows)
    print(f"{name}: {len(paces)} new rows, {len(_results(rows))} in {path.name} ({mib:.2f} MiB)")
    if left:
        more = sum(_cost(cell) for cell in left) * sum(paces) / max(1, len(paces)) / 60
        about = f", about {more:.1f} minutes" if paces else ""
        print(f"{len(left)} cells are left of what is planned so far{about}; call it again")
    _raise_for_failed(path, plan, rows)
    return _results(rows)


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
# And a cell that fails? Of three cells in another file, the first does not fit into memory. How often will it be tried in three calls?

# %%
def without_a(cell):
    if cell.key == "a": raise MemoryError("a card of 8 GiB")
    return toy_run(cell)

def three(rows): return toy_plan(rows)[:3]
tries = [complaint(run_timed, "fails", three, without_a, folder) for _ in range(3)]
lines, _ = read_lines(folder / "fails.jsonl")
assert [row["key"] for row in lines] == ["a", "b", "c", "a"]
assert len(set(tries)) == 1
tries[-1]


# %% [markdown]
# Twice: once in the first call, which goes on with `b` and `c`, and once in the second. All three calls say that it is missing.
#
# Two things are refused: a second call while the first one runs, and rows of two precisions in one file. And in no minutes nothing is begun.

# %%
def one(rows): return toy_plan(rows)[:1]
def calls_again(cell): return dict(said=complaint(run_timed, "busy", one, toy_run, folder / "busy"))
said = run_timed("busy", one, calls_again, folder / "busy")[0]["said"]

def run_half(cell): return dict(precision="bf16")
run_timed("half", one, run_half, folder)
print(said)
print(complaint(check_alike, "half", folder, precision="fp32"))

assert run_timed("none", toy_plan, toy_run, folder, minutes=0) == []


# %% [markdown]
# ## Rows from elsewhere
#
# Results come back as small files. The package carries those that this book shows, in `data/results`. Others are looked for in `../shared/results`, beside the checkout, or in the folder that `SDPO_RESULTS` names. A file may be the `.jsonl` of a run, the same packed (`.jsonl.gz`), or a `.parquet` table. A row is found by its key; if two files have it, the first one counts. Packed or not, a line is whole when it ends, and the errors of cells that failed are no rows.
#
# Rows of one draw may come from two cards, which round differently, or from two precisions. Then a difference of two arms is also one of the machines. `mixed_draws` finds such draws, and the pages leave them out.

# %%
#| export
def result_folders() -> list[Path]:
    "Where results may lie: those of the package first."
    beside = RESULTS.parents[2] / "shared" / "results"
    elsewhere = os.environ.get("SDPO_RESULTS") or beside
    return [RESULTS, Path(elsewhere)]

def _rows_of(path):
    if path.suffix == ".parquet": return pd.read_parquet(path).to_dict("records")
    if path.suffix != ".gz": return read_lines(path)[0]
    try: found = gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as e: raise ValueError(f"{path}: not a whole .gz; bring it again") from e
    return _whole_lines(found, path)[0]

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
                for row in _results(_rows_of(path)): rows.setdefault(row["key"], row | dict(file=path.name))
    return list(rows.values())

def mixed_draws(
    rows: dict,  # arm -> draw -> row
    names = ("card", "precision", "reads"), # of fields that all trained arms of a draw must agree in
) -> dict:       # draw -> what it mixes, in words
    "The draws whose trained arms were not made alike."
    mixed = {}
    for draw in sorted({draw for by_draw in rows.values() for draw in by_draw}):
        trained = [by_draw[draw] for by_draw in rows.values() if draw in by_draw and len(by_draw[draw]["stages"])]
        for name in names:
            values = sorted({str(row[name]) for row in trained})
            if len(values) > 1: mixed.setdefault(draw, f"{name}: {' and '.join(values)}")
    return mixed


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
# In which of two draws were DPO and sDPO not made alike?

# %%
def made_on(card): return dict(card=card, precision="bf16", reads="packed_logprobs", stages=["one"])
toys = {
    "DPO": {0: made_on("A100"), 1: made_on("H100")},
    "sDPO": {0: made_on("H100"), 1: made_on("H100")},
}
assert list(mixed_draws(toys)) == [0]
mixed_draws(toys)

# %% [markdown]
# ## What you now have
#
# - `run_timed`: a plan, worked off in calls of some minutes, one line for each finished cell.
# - `read_results`: the rows of an experiment, wherever they were made; `mixed_draws`: those that must not be compared.
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
# 3. Why is a cell that failed tried once more, and not ten times?
#
#    <details><summary>Answer</summary>
#
#    A card may be full because of somebody else, so one try says little. What fails twice will mostly fail again, and each try takes minutes from the others.
#
#    </details>
#
# ## Try this
#
# - Give the toy cells a `cost`: let `e` cost 5. Call it three times from the beginning, with 2.5 minutes each. Where does each call stop?
#
#   <details><summary>What you should see</summary>
#
#   The first stops in front of `c`, as above. The second runs `c` and `d`, and stops in front of `e`: five times 72 seconds are more than there are. The third has no cell to go by, so it begins `e`, however long that takes.
#
#   </details>
