"How dense is each notebook? `python .ci/density.py [REVISION]` counts what a reader must hold at once, here or at a revision."
import ast, json, statistics, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def files(revision):
    "Name and text of every notebook."
    if revision is None:
        paths = sorted(ROOT.glob("nbs/**/*.ipynb"))
        return {str(p.relative_to(ROOT)): p.read_text() for p in paths}
    listed = git("ls-tree", "-r", "--name-only", revision, "nbs").splitlines()
    return {p: git("show", f"{revision}:{p}") for p in listed if p.endswith(".ipynb")}


def git(*command):
    return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True).stdout


def nodes_of(source):
    "Expressions and statements of each line that carries code; docstrings are not code."
    lines = {}
    tree = ast.parse(source)
    told = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            told |= {body[0], body[0].value}
    for node in ast.walk(tree):
        if isinstance(node, (ast.expr, ast.stmt)) and node not in told:
            lines[node.lineno] = lines.get(node.lineno, 0) + 1
    return list(lines.values())


def parameters(source):
    "Of the public functions: how many parameters, and how many have a comment on their line."
    lines = source.splitlines()
    count = told = 0
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"): continue
        for arg in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            own = [a for a in ast.walk(node.args) if isinstance(a, ast.arg) and a.lineno == arg.lineno]
            count += 1
            told += "#" in lines[arg.lineno - 1] and len(own) == 1
    return count, told


def longest_run(cells):
    "Exported cells in a row, and their lines, before a cell that uses something."
    best, run = (0, 0), (0, 0)
    for exported, source in cells:
        size = len([x for x in source.splitlines() if x.strip()])
        run = (run[0] + 1, run[1] + size) if exported else (0, 0)
        best = max(best, run)
    return best


def measure(text):
    notebook = json.loads(text)
    code, prose, words = [], 0, 0
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            prose += len(source)
            words += len(source.split())
        if cell["cell_type"] == "code": code.append(source)
    cells = [("#| export" in source, source) for source in code if not source.startswith(("#| default_exp", "#| hide"))]
    plain = ["\n".join(x for x in s.splitlines() if not x.startswith("%")) for s in code]
    lines = [x for s in plain for x in s.splitlines() if x.strip()]
    nodes = [n for s in plain for n in nodes_of(s)]
    counts = [parameters(s) for e, s in cells if e]
    run = longest_run(cells)
    return {
        "lines": len(lines),
        "nodes a line": sum(nodes) / max(1, len(nodes)),
        "over 20 nodes %": 100 * sum(n > 20 for n in nodes) / max(1, len(nodes)),
        "over 110 characters %": 100 * sum(len(x) > 110 for x in lines) / max(1, len(lines)),
        "widest": max(map(len, lines), default=0),
        "exports in a row": run[0],
        "their lines": run[1],
        "parameters": sum(c for c, _ in counts),
        "told %": 100 * sum(t for _, t in counts) / max(1, sum(c for c, _ in counts)),
        "minutes to read": round(words / 150 + len(lines) / 8),
        "prose/code": prose / max(1, sum(map(len, plain))),
    }


def main(revision=None):
    rows = {name.removeprefix("nbs/").removesuffix(".ipynb"): measure(text) for name, text in files(revision).items()}
    head = list(next(iter(rows.values())))
    print(f"| notebook | {' | '.join(head)} |")
    print("|---" * (len(head) + 1) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{v:.2f}" if k == "prose/code" else f"{v:.1f}" if isinstance(v, float) else str(v) for k, v in row.items()) + " |")
    readme = (ROOT / "README.md").read_text() if revision is None else git("show", f"{revision}:README.md")
    print(f"\nREADME: {len(readme):,} characters, {readme.find('## The chapters'):,} before the chapters")


if __name__ == "__main__": main(*sys.argv[1:])
