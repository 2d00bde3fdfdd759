"Do the notebooks still say the same numbers? `python .ci/outputs.py REVISION [NAME ...]` lists stored outputs of a revision that are in no notebook now."
import json, re, subprocess, sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
NUMBER = re.compile(r"[-+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?")


def git(*command):
    return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True).stdout


def outputs(notebook):
    "The text of every output; figures are looked at, not compared."
    for cell in json.loads(notebook)["cells"]:
        for out in cell.get("outputs", []):
            data = out.get("data", {"text/plain": out.get("text", "")})
            text = "".join(data.get("text/markdown") or data.get("text/plain", ""))
            if not text.startswith("<Figure"): yield text


def numbers(text):
    return tuple(NUMBER.findall(text))


def main(revision, *names):
    old = [p for p in git("ls-tree", "-r", "--name-only", revision, "nbs").splitlines() if p.endswith(".ipynb")]
    new = Counter(numbers(x) for p in ROOT.glob("nbs/**/*.ipynb") for x in outputs(p.read_text()))
    gone = 0
    for path in old:
        if names and Path(path).stem not in names: continue
        for text in outputs(git("show", f"{revision}:{path}")):
            key = numbers(text)
            if not key or new[key] > 0:
                new[key] -= 1
                continue
            gone += 1
            print(f"--- {path}: these numbers are shown nowhere now\n{text[:1200]}")
    print(f"{gone} outputs whose numbers are gone")


if __name__ == "__main__": main(*sys.argv[1:])
