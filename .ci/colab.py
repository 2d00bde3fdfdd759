"""Run notebooks as a reader on Colab would: the package as a wheel, each notebook alone in an empty folder.

    .venv-colab/bin/python .ci/colab.py install     build the wheel, install it; says what pip added beside it
    .venv-colab/bin/python .ci/colab.py run [NB ...]    every cell but slow and cuda ones; with SLOW=1 all, as "Run all" does

`make test-colab` makes .venv-colab from constraints-colab.txt and calls both.
"""
import os, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = re.compile(r"^#\s*\|\s*(slow|cuda)\b", re.M)
NEVER = re.compile(r"^#\s*\|\s*eval:\s*false", re.M)
LONGEST = 1200 # seconds of one cell


def pip(*command):
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True)
    if done.returncode: sys.exit(f"pip {' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def tree(folder):
    "A copy of what belongs to the project: built in the tree itself, a wheel leaves build/ behind and finds it next time."
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in files:
        if not (ROOT / name).is_file(): continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def install():
    with tempfile.TemporaryDirectory() as tmp:
        source, wheels = Path(tmp, "source"), Path(tmp, "wheels")
        source.mkdir()
        tree(source)
        pip("wheel", "-q", "--no-deps", "-w", str(wheels), str(source))
        wheel, = wheels.glob("*.whl")
        pip("uninstall", "-q", "-y", "sdpo_nb")
        before = set(pip("freeze").splitlines())
        pip("install", "-q", "-c", str(ROOT / "constraints-colab.txt"), f"{wheel}[peft,eval]")
        added = set(pip("freeze").splitlines()) - before
    print("installed:", ", ".join(sorted(line.split(" @")[0] for line in added)))


def run_notebook(path, slow):
    "What went wrong, in words, or None."
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    book = nbformat.read(path, 4)
    for cell in book.cells:
        left_out = LEFT_OUT.search(cell.source) and not slow
        if cell.cell_type == "code" and (left_out or NEVER.search(cell.source)): cell.source = ""
        if cell.cell_type == "code": cell.outputs = []
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy2(path, folder)
        where = {"metadata": {"path": folder}}
        client = NotebookClient(book, timeout=LONGEST, kernel_name="python3", resources=where)
        try: client.execute()
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
            return f"{_cell(book)}: {_reason(e)}"


def _cell(book):
    "Number, from 0, and first line of the cell that was run last."
    ran = [i for i, cell in enumerate(book.cells) if cell.get("execution_count") or cell.get("outputs")]
    i = ran[-1] if ran else 0
    lines = [line for line in book.cells[i].source.splitlines() if line.strip()]
    return f"cell {i} ({lines[0] if lines else 'empty'})"


def _reason(e):
    if getattr(e, "ename", ""): return f"{e.ename}: {' '.join(str(e.evalue).split())[:300]}"
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


def run(paths):
    slow = bool(os.environ.get("SLOW"))
    os.environ.pop("PYTHONPATH", None)                   # the wheel, not the tree
    os.environ.pop("SLOW", None)                         # a reader has not set it
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.update(OMP_WAIT_POLICY="passive", TOKENIZERS_PARALLELISM="false", JUPYTER_PREFER_ENV_PATH="1",
                      PYDEVD_DISABLE_FILE_VALIDATION="1")
    paths = [Path(p).resolve() for p in paths] or sorted((ROOT / "nbs").rglob("*.ipynb"))
    paths = [p for p in paths if not any(part.startswith(("_", ".")) for part in p.relative_to(ROOT).parts)]
    failed = 0
    for path in paths:
        start = time.time()
        wrong = run_notebook(path, slow)
        failed += wrong is not None
        name = path.relative_to(ROOT / "nbs").with_suffix("")
        print(f"{name}: {f'FAILED in {wrong}' if wrong else 'passed'}, {time.time() - start:.0f} s", flush=True)
    print(f"{len(paths) - failed} of {len(paths)} passed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    verb, *rest = sys.argv[1:] or [""]
    if verb == "install": install()
    elif verb == "run": run(rest)
    else: sys.exit(__doc__)
