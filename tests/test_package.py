"One description of the package, and a wheel that contains what it should and nothing else."
import ast, configparser, os, shutil, subprocess, sys, tomllib, zipfile
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if shutil.which("git") is None or not (ROOT / ".git").exists(): pytest.skip("not a git checkout", allow_module_level=True)


def files():
    "What belongs to the tree: tracked, or new and not ignored; not what was deleted."
    out = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted({f for f in out.split("\0") if f and (ROOT / f).is_file()})


def settings():
    ini = configparser.ConfigParser(delimiters=["="]); ini.read(ROOT / "settings.ini")
    return ini["DEFAULT"]


def test_settings_and_pyproject_agree():
    ini, toml = settings(), tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = toml["project"]
    assert project["name"] == ini["lib_name"] and project["requires-python"] == f">={ini['min_python']}"
    assert dict(apache2="Apache-2.0")[ini["license"]] == project["license"]
    assert toml["tool"]["nbdev"] == {k: ini[k] for k in ("lib_path", "nbs_path", "tst_flags")}
    fixed = {"name", "requires-python", "license", "license-files", "dynamic"}
    assert set(project) == fixed, "whatever else pyproject.toml says, settings.ini says too: let it be dynamic"
    assert {"version", "dependencies", "optional-dependencies", "scripts"} <= set(project["dynamic"])


def test_settings_keep_clear_of_what_breaks():
    "Each of these cost somebody a day (nbdev 2 rewrites pyproject.toml; flags with | run the slow cells; Colab's versions must do)."
    ini = settings()
    assert ini["update_pyproject"] == "False" and "|" not in ini["tst_flags"]
    needed = ini["requirements"].split()
    assert not [r for r in needed if "==" in r or "<" in r or r.startswith("nbdev")], "a run-time requirement with an upper bound changes Colab"
    assert {"torch", "transformers", "datasets", "accelerate"} <= {r.split(">")[0] for r in needed}


def modules():
    "module -> its syntax tree"
    return {p.stem: ast.parse(p.read_text()) for p in sorted((ROOT / "sdpo_nb").glob("*.py")) if p.stem not in ("__init__", "_modidx")}


def test_what_is_imported_is_used():
    "An import that only a cell of the notebook needs belongs to the imports of the notebook."
    unused = {}
    for name, tree in modules().items():
        if name == "checks": continue                                   # assignments and graders look there for what `mistakes` has
        nodes = list(ast.walk(tree))
        imported = {(a.asname or a.name).split(".")[0] for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
        if idle := sorted(imported - {n.id for n in nodes if isinstance(n, ast.Name)}): unused[name] = idle
    assert not unused


def test_what_is_imported_is_required():
    "At the top of a module: what another requirement happens to bring along may be gone with its next version."
    needed = {r.split(">")[0] for r in settings()["requirements"].split()} | {"sdpo_nb", *sys.stdlib_module_names}
    names = dict(yaml="pyyaml")
    absent = {}
    for name, tree in modules().items():
        named = [a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names]
        named += [n.module for n in tree.body if isinstance(n, ast.ImportFrom) and not n.level]
        tops = {top for top in (m.split(".")[0] for m in named) if names.get(top, top) not in needed}
        if tops: absent[name] = sorted(tops)
    assert not absent


def test_version():
    import sdpo_nb
    assert sdpo_nb.__version__ == settings()["version"] == version("sdpo_nb")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Built from a copy of the tree, so that no build/ is left behind and none is picked up."
    tree, out = tmp_path_factory.mktemp("tree") / "sdpo_nb", tmp_path_factory.mktemp("dist")
    for f in files():
        (tree / f).parent.mkdir(parents=True, exist_ok=True); shutil.copy2(ROOT / f, tree / f)
    try: here = int(version("setuptools").split(".")[0]) >= 77
    except Exception: here = False
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    built = subprocess.run([sys.executable, "-m", "build", "--wheel", *(["--no-isolation"] if here else []), "--outdir", out, tree], capture_output=True, text=True, env=env, timeout=300)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    path, = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_contains_the_modules_and_the_world_and_nothing_else(wheel):
    names = {n for n in wheel.namelist() if not n.endswith("/")}
    about = f"sdpo_nb-{settings()['version']}.dist-info"
    want = {f for f in files() if f.startswith("sdpo_nb/") and f.endswith(".py")} | {f"sdpo_nb/{f}" for f in files() if f.startswith("data/")}
    want |= {f"{about}/{f}" for f in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE")}
    assert names == want, f"missing: {sorted(want - names)}; unexpected: {sorted(names - want)}"
    assert {"sdpo_nb/cli.py", "sdpo_nb/data/__init__.py", "sdpo_nb/data/world/S/model.safetensors", "sdpo_nb/data/world/manifest.json"} <= names
    assert sum(wheel.getinfo(n).file_size for n in names) < 1.5e7    # the results are most of it, 2 KB for each of four thousand runs


def test_wheel_carries_the_world_byte_for_byte(wheel):
    world = [f for f in files() if f.startswith("data/world/")]
    assert len(world) > 8
    for f in world: assert wheel.read(f"sdpo_nb/{f}") == (ROOT / f).read_bytes(), f


def test_wheel_metadata(wheel):
    ini, about = settings(), f"sdpo_nb-{settings()['version']}.dist-info"
    meta = Parser().parsestr(wheel.read(f"{about}/METADATA").decode())
    assert meta["Name"] == ini["lib_name"] and meta["Version"] == ini["version"] and meta["Requires-Python"] == f">={ini['min_python']}"
    assert meta["License-Expression"] == "Apache-2.0" and meta["Summary"] == ini["description"]
    needed = [r for r in meta.get_all("Requires-Dist") if "extra ==" not in r]
    assert sorted(needed) == sorted(ini["requirements"].split())
    assert "dev" in meta.get_all("Provides-Extra")
    points = configparser.ConfigParser(delimiters=["="]); points.read_string(wheel.read(f"{about}/entry_points.txt").decode())
    assert points["console_scripts"]["sdpo"] == "sdpo_nb.cli:main" and points["nbdev"]["sdpo_nb"] == "sdpo_nb._modidx:d"
