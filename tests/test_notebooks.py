"Every notebook runs from top to bottom; cells marked slow or cuda are left out."
import os
from pathlib import Path

import pytest
from nbdev.test import test_nb as run_notebook

NOTEBOOKS = sorted(p for p in (Path(__file__).parent.parent / "nbs").rglob("*.ipynb") if not any(q.startswith(("_", ".")) for q in p.parts))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")          # undone afterwards: nbdev exports nothing while it is set
    ok, _ = run_notebook(path, skip_flags=["slow", "cuda"])
    assert ok, f"{path.name} failed; its traceback is above"
