"Every notebook runs from top to bottom; cells marked slow or cuda are left out. And none has a text still to be written."
import json, re
from pathlib import Path

import pytest
from nbdev.test import test_nb as run_notebook

NOTEBOOKS = sorted(p for p in (Path(__file__).parent.parent / "nbs").rglob("*.ipynb") if not any(q.startswith(("_", ".")) for q in p.parts))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")          # undone afterwards: nbdev exports nothing while it is set
    ok, _ = run_notebook(path, skip_flags=["slow", "cuda"])
    assert ok, f"{path.name} failed; its traceback is above"


PLACEHOLDER = re.compile(r"^[A-Z_]{4,}$|\b(?:TODO|TBD|FIXME|XXX)\b", re.M)     # a line of one word in capitals, or a note to oneself


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_text_is_still_to_be_written(path):
    texts = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown"]
    assert not [word for text in texts for word in PLACEHOLDER.findall(text)]
