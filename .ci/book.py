"""Keep the book in step: notebooks -> modules, percent scripts, README; run notebooks and store their outputs.

    python .ci/book.py sync          clean, export, build the assignments, write the twins and README.md
    python .ci/book.py check         the same, then puts every file back: fails and names those that would change
    python .ci/book.py run [NB ...]  run notebooks as nbdev_test would, store outputs, then sync
    python .ci/book.py edit [PY ...] take edits made in .twins/**/*.py into the notebooks, then sync
"""
import base64, hashlib, json, os, re, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_WAIT_POLICY", "passive")      # threads that spin make a tiny model twenty times slower beside other work
os.chdir(ROOT)
NBS, TWINS = Path("nbs"), Path(".twins")
LINK = re.compile(r"\]\((?!http|#)([\w/]+\.ipynb)")
COLAB = "https://colab.research.google.com/github/{user}/{repo}/blob/{branch}/{path}"


def notebooks():
    return sorted(p for p in NBS.rglob("*.ipynb") if not any(q.startswith(("_", ".")) for q in p.parts))


def twin(nb):
    return TWINS / nb.relative_to(NBS).with_suffix(".py")


def text(out):
    return "".join(out) if isinstance(out, list) else out


def readme():
    "README.md and its pictures, as {path: bytes}, from nbs/index.ipynb"
    files, parts = {}, []
    for cell in json.loads((NBS / "index.ipynb").read_text())["cells"]:
        src = text(cell["source"])
        if re.search(r"^#\s*\|\s*hide\b", src, re.M):
            continue
        if cell["cell_type"] == "markdown":
            parts.append(LINK.sub(r"](nbs/\1", src))
            continue
        shown = not re.search(r"^#\s*\|\s*echo:\s*false", src, re.M)
        src = "\n".join(l for l in src.splitlines() if not re.match(r"#\s*\|", l)).strip()
        if src and shown:
            parts.append(f"```python\n{src}\n```")
        for out in cell.get("outputs", []):
            data = out.get("data", {"text/plain": out.get("text", "")})
            if "image/png" in data:
                path = f"nbs/index_files/{len(files) + 1}.png"
                files[path] = base64.b64decode(text(data["image/png"]))
                parts.append(f"![]({path})")
            elif "text/markdown" in data:
                parts.append(LINK.sub(r"](nbs/\1", text(data["text/markdown"])))
            elif text(data.get("text/plain", "")).strip():
                parts.append("\n".join("    " + l for l in text(data["text/plain"]).rstrip().splitlines()))
    files["README.md"] = ("\n\n".join(p.strip() for p in parts) + "\n").encode()
    return files


def sync(only=()):
    "Clean, export, twins, README; `only` limits the twins that are written to those notebooks."
    from nbdev.clean import nbdev_clean
    from nbdev.doclinks import nbdev_export
    os.environ.pop("IN_TEST", None)
    nbdev_clean()
    nbdev_export()
    subprocess.run([sys.executable, "-m", "sdpo_nb.course", "build", NBS / "course", NBS / "assignments"], check=True, stdout=subprocess.DEVNULL)
    for nb in notebooks():
        if only and nb.stem not in {Path(p).stem for p in only}:
            continue
        twin(nb).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "jupytext", "-q", "--to", "py:percent", "-o", twin(nb), nb], check=True)
    written = readme()
    for old in NBS.glob("index_files/*"):
        if str(old) not in written:
            old.unlink()
    for path, data in written.items():
        Path(path).parent.mkdir(exist_ok=True)
        if not Path(path).exists() or Path(path).read_bytes() != data:
            Path(path).write_bytes(data)


def watched():
    files = [*notebooks(), *TWINS.rglob("*.py"), *Path("sdpo_nb").glob("*.py"), *NBS.glob("index_files/*"), Path("README.md")]
    return {p: p.read_bytes() for p in files if p.exists()}


def check():
    import configparser
    before = watched()
    try:
        sync()
        after = watched()
    finally:
        for p in watched().keys() - before.keys():
            p.unlink()
        for p, data in before.items():
            p.parent.mkdir(exist_ok=True)
            p.write_bytes(data)
    wrong = sorted(str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    twins = {twin(nb) for nb in notebooks()}
    modules = {json.loads(nb.read_text())["cells"] and m.group(1) for nb in notebooks()
               for m in [re.search(r"#\|\s*default_exp (\w+)", nb.read_text())] if m}
    extra = [str(p) for p in Path("sdpo_nb").glob("*.py") if p.stem not in modules | {"__init__", "_modidx"}]
    extra += [str(p) for p in TWINS.rglob("*.py") if p not in twins]
    ini = configparser.ConfigParser(delimiters=["="]); ini.read("settings.ini"); ini = ini["DEFAULT"]
    for nb in notebooks():
        want = COLAB.format(user=ini["user"], repo=ini["repo"], branch=ini["branch"], path=nb)
        found = re.findall(r"https://colab\.research\.google\.com/github/[^\s)\\\"]+", nb.read_text())
        if found and found != [want]:
            extra.append(f"{nb}: its Colab badge should open {want}")
    errors = [f"{p}: would change (make sync)" for p in wrong] + [f"{p}: belongs to no notebook" if p.endswith(".py") else p for p in extra]
    errors += [error for nb in notebooks() for error in [*wrong_pins(nb, ini["version"]), *lost_words(nb)]]
    print("\n".join(errors) if errors else f"check: {len(before)} files in step")
    sys.exit(bool(errors))


def lost_words(nb):
    "Cells that print and end in a semicolon: execnb keeps nothing of what such a cell prints."
    cells = [text(cell["source"]) for cell in json.loads(nb.read_text())["cells"] if cell["cell_type"] == "code"]
    return [f"{nb}: the output of a cell is lost, it prints and ends in ';': {source.splitlines()[-1]}"
            for source in cells if "print(" in source and source.rstrip().endswith(";")]


def wrong_pins(nb, version):
    "What is wrong with the install cell of a notebook: it installs one version and asks for it, that of settings.ini."
    for cell in json.loads(nb.read_text())["cells"]:
        source = text(cell["source"])
        if cell["cell_type"] != "code" or 'find_spec("sdpo_nb")' not in source:
            continue
        pinned = re.findall(r"sdpo_nb@v([\w.]+)", source)
        named = set(re.findall(r"\d+\.\d+\.\d+", source))
        asked = f'== "{version}"' in source
        if not (pinned == [version] and named == {version} and asked):
            return [f"{nb}: its install cell should install version {version} of settings.ini, and ask for it"]
    return []


def run(paths):
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    from nbdev.process import NBProcessor
    import pandas
    os.environ.update(TQDM_DISABLE="1", IN_TEST="1", HF_HUB_OFFLINE="1", MPLBACKEND="module://matplotlib_inline.backend_inline")
    flags = set() if os.environ.get("SLOW") else set(get_config().tst_flags.split())
    for path in paths or [nb for nb in notebooks() if nb.parent.name not in ("assignments", "course")]: # these are kept without outputs
        path, start = Path(path).resolve(), time.time()
        proc = NBProcessor(path, process=True)      # reads the #| directives of every cell
        pandas.reset_option("display")              # what an earlier notebook set would change what this one shows
        pandas.set_option("display.width", 180, "display.max_columns", 30)
        nb = read_nb(path)
        shell = CaptureShell(mpl_format="png")
        os.chdir(path.parent); sys.path.insert(0, str(path.parent))
        for cell, seen in zip(nb.cells, proc.nb.cells):
            if cell.cell_type != "code":
                continue
            d = getattr(seen, "directives_", {})
            if d.get("eval:", [""])[0].lower() == "false" or flags & set(d):
                continue                            # keeps the outputs it has
            cell["outputs"] = []
            outs = shell.run(cell.source)
            if shell.exc:
                os.chdir(ROOT)
                sys.exit(f"{path.name}: {shell.exc!r}\nin the cell\n{cell.source}\n" + "\n".join(text(o.get('traceback', '')) for o in outs))
            cell["outputs"] = [tidy(o) for o in outs if o.get("name") != "stderr"]
            cell["execution_count"] = None
        os.chdir(ROOT)
        write_nb(nb, path)
        print(f"{path.name}: {time.time() - start:.0f} s", flush=True)
    os.environ.pop("IN_TEST")


def tidy(out):
    out = dict(out)
    if "metadata" in out:
        out["metadata"] = {}
    out.pop("execution_count", None)
    if out["output_type"] == "execute_result":
        out["execution_count"] = None
    html = text(out.get("data", {}).get("text/html", ""))
    bare = re.sub(r"\bT_[0-9a-f]{5}", "T_", html)      # pandas draws a new table id every time; one made from the table stays
    if bare != html:
        own = "T_" + hashlib.sha256(bare.encode()).hexdigest()[:5]
        out["data"] = out["data"] | {"text/html": re.sub(r"\bT_[0-9a-f]{5}", own, html).splitlines(True)}
    return out


def edit(paths):
    for script in map(Path, paths or sorted(TWINS.rglob("*.py"))):
        nb = NBS / script.resolve().relative_to(ROOT / TWINS).with_suffix(".ipynb")
        same = nb.exists() and subprocess.run([sys.executable, "-m", "jupytext", "-q", "--to", "py:percent", "-o", "-", nb],
                                              capture_output=True, check=True).stdout == script.read_bytes()
        if not same:
            update = ["--update"] if nb.exists() else []
            subprocess.run([sys.executable, "-m", "jupytext", "-q", *update, "--to", "ipynb", "-o", nb, script], check=True)
            print(f"{script} -> {nb}")


if __name__ == "__main__":
    verb, *rest = sys.argv[1:] or ["check"]
    if verb == "edit":
        edit(rest); sync(rest)
    elif verb == "sync":
        sync()
    elif verb == "run":
        run(rest); sync(rest)
    elif verb == "check":
        check()
    else:
        sys.exit(__doc__)
