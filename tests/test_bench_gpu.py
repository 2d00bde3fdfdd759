"tests/bench_gpu.py, on a CPU: its `dry` verb, and that a new file of results has all that is read from the stored one."
import json, os, subprocess, sys
from pathlib import Path

import pytest

from sdpo_nb.trainer import USUAL_BUDGET

pytest.importorskip("trl", reason="TRL is not installed here")
TESTS = Path(__file__).parent
STORED = TESTS.parent / "data/results/gpu.json"
READ = ["step", "steps", "tokens", "tokens_per_second", "times_trl", "of_peak", "peak_gib", "first"] # of a row, in 04, 06 and README; "compile" and "reference" where they are
DRY = """if True:
    import json, runpy, sys, torch
    import sdpo_nb.logprobs as logprobs
    compile, reset, same_bits, rows, switches = torch.nn.Module.compile, torch.compiler.reset, logprobs.same_bits, [], set()
    def begins(): rows.append(reset())                                    # once in each compiled row; the third one is TRL's
    def traced(module, **how):
        if len(rows) == 3: compile(module, backend="eager", **how)        # guarded, but no code is generated; the others would take five seconds each
    torch.compiler.reset, torch.nn.Module.compile = begins, traced
    def noted(device, *switch):
        switches.add(switch)
        return same_bits(device, *switch)
    logprobs.same_bits = noted
    script, stored, sys.argv = sys.argv[1], sys.argv[2], [sys.argv[1], "dry", "no file", "1"]
    show = runpy.run_path(script, run_name="__main__")["show"]
    show(stored)
    print(json.dumps(sorted(switches)))
"""


def test_a_dry_run_stores_what_the_book_reads(tmp_path):
    path = tmp_path / "gpu.json"
    before = STORED.read_bytes()
    out = subprocess.run([sys.executable, "-c", DRY, str(TESTS / "bench_gpu.py"), str(STORED)], capture_output=True, text=True, env=os.environ | dict(SDPO_RESULTS=str(path)))
    assert out.returncode == 0, out.stderr[-3000:]
    assert STORED.read_bytes() == before and "Traceback" not in out.stderr, out.stderr[-3000:]
    assert json.loads(out.stdout.splitlines()[-1]) == [[], [False, False], [True, True]] # scoring always warns; rows named "same bits" ask for the strict form

    old, new = (json.loads(p.read_text()) for p in (STORED, path))
    assert set(old) <= set(new) and set(old["card"]) - {"cuda"} <= set(new["card"]) and set(old["versions"]) == set(new["versions"])
    (theirs, *_), (ours,) = old["settings"].values(), new["settings"].values()
    assert set(theirs) <= set(ours) and set(new["settings"]) == {"hh_harmless, tiny"}
    names = {name.replace("TRL, 16", "TRL, 4").replace("TRL, 8", "TRL, 2"): name for name in theirs["rows"] if name not in ("TRL, 32", "TRL, 4")}
    assert set(ours["rows"]) == set(names) | {"TRL, 4, compiled"}
    for name, row in ours["rows"].items():
        was = theirs["rows"][names.get(name, "TRL, 16")]
        assert not row.get("why") and set(READ) <= set(was) <= set(row), (name, row)
        assert ("compile" in row) == ("compiled" in name)
    rows = ours["rows"]
    theirs = rows["TRL, 4, compiled"]
    assert theirs["recompilations"] == len(theirs["recompiled"]) > 0 == sum(row["recompilations"] for name, row in rows.items() if row is not theirs)
    assert "grad_mode" in theirs["recompiled"][0] and theirs["compiler"]["compile"]["graphs"] > 1
    assert ours["best_trl"] in ("TRL, 4", "TRL, 2") and rows[ours["best_trl"]]["times_trl"] == 1
    losses = [row["loss"] for row in rows.values()]
    assert max(losses) - min(losses) < 5e-4              # one batch, the same weights, before any step: three steps change it by 2e-3
    assert ours["budget"] == rows["ours"]["budget"] == USUAL_BUDGET # a CPU does not choose; `fit` does it by a card's memory
    assert [name for name, row in rows.items() if row.get("strict")] == ["ours, compiled, same bits", "ours, same bits"]
    assert all(row["same_bits_again"] for name, row in rows.items() if name.startswith("ours"))
