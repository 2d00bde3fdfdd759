"A run that was killed with SIGKILL, wherever, ends with the weights of one that was left alone; a finished one trains nothing."
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch

import sdpo_nb, sdpo_nb.stepwise as stepwise
from sdpo_nb.logprobs import load_model, weights_hash
from sdpo_nb.packing import packed_logprobs
from sdpo_nb.stepwise import Run, StepwiseConfig, sdpo
from sdpo_nb.world import load_world
from tiny import SETTINGS, metrics, perturbed, rows

SOURCES = {n: rows(n, 64) for n in ("primer", "digest")}
CONFIG = dict(SETTINGS, batch_size=4, save_every=3)   # 16 steps a stage

# The child is slow, so that the kill always finds it at work; the function has the name of the one it wraps, which is part of a table's kind.
CHILD = """
import json, sys, time, torch
torch.set_num_threads(1)
from sdpo_nb.packing import packed_logprobs as real
from sdpo_nb.stepwise import StepwiseConfig, sdpo
def packed_logprobs(model, pairs):
    time.sleep(0.08)
    return real(model, pairs)
packed_logprobs.tokens, packed_logprobs.attention = real.tokens, real.attention
a = json.load(open(sys.argv[1]))
sdpo(a["model"], a["sources"], StepwiseConfig(**a["config"]), a["folder"], logprobs=packed_logprobs)
"""


def start(folder, tmp, config=CONFIG):
    "The run in a process of its own."
    args = Path(tmp) / "args.json"
    args.write_text(json.dumps(dict(model=load_world().base, sources=SOURCES, config=config, folder=str(folder))))
    path = os.pathsep.join([str(Path(sdpo_nb.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen([sys.executable, "-c", CHILD, str(args)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ | dict(PYTHONPATH=path))


def start_and_kill(folder, when, tmp, config=CONFIG):
    "Start the run and kill it with SIGKILL as soon as `when()` holds."
    child = start(folder, tmp, config)
    deadline = time.time() + 90
    while not when():
        if child.poll() is not None: pytest.fail(f"the run ended before it could be killed:\n{child.stderr.read().decode()[-2000:]}")
        if time.time() > deadline: child.kill(); pytest.fail("the run never came to where it was to be killed")
        time.sleep(0.005)
    child.kill(); child.wait(); child.stderr.close()
    assert child.returncode == -signal.SIGKILL


def lines(path): return path.read_bytes().count(b"\n") if path.exists() else 0


def run(folder, **changes): return sdpo(load_world().base, SOURCES, StepwiseConfig(**CONFIG | changes), folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory): return run(tmp_path_factory.mktemp("alone") / "run")


def same_run(a, b):
    "Two run folders tell the same story, down to the bits of the weights."
    for x, y in zip(a.stages, b.stages, strict=True): assert x == y
    for t in (1, 2):
        assert metrics(a.folder / f"stage-{t}") == metrics(b.folder / f"stage-{t}")
        assert weights_hash(load_model(str(a.model_folder(t)))) == weights_hash(load_model(str(b.model_folder(t)))) == a.stages[t-1]["end"]
    assert (a.folder / "partition.json").read_text() == (b.folder / "partition.json").read_text()


def test_alone(alone):
    "What the others are compared with is a run that learns: the later tests could not fail otherwise."
    ends = [s["start"] for s in alone.stages] + [alone.stages[-1]["end"]]
    assert len(set(ends)) == 3 and [len(metrics(alone.folder / f"stage-{t}")) for t in (1, 2)] == [16, 16]
    assert [m["step"] for m in metrics(alone.folder / "stage-2")] == list(range(1, 17))
    assert not list(alone.folder.rglob("*.tmp"))


def test_killed_in_the_middle_of_stage_2(alone, tmp_path):
    folder = tmp_path / "run"; log = folder / "stage-2" / "metrics.jsonl"
    start_and_kill(folder, lambda: lines(log) >= 5, tmp_path)
    assert 5 <= lines(log) < 16 and not (folder / "stage-2" / "stage.json").exists() and (folder / "stage-1" / "stage.json").exists()
    with open(log, "ab") as f: f.write(b'{"step": 6, "epo')      # a line that was cut in two
    same_run(run(folder), alone)


def test_killed_three_times(alone, tmp_path):
    "During the pass of M_0, after the last step of stage 1 and before its model is saved, and in stage 2 before its first checkpoint."
    folder = tmp_path / "run"
    start_and_kill(folder, lambda: (folder / "base" / "logprobs" / "kind.json").exists(), tmp_path)
    assert not (folder / "partition.json").exists()
    start_and_kill(folder, lambda: lines(folder / "stage-1" / "metrics.jsonl") >= 16 and (folder / "stage-1" / "logprobs").exists(), tmp_path)
    assert not (folder / "stage-1" / "stage.json").exists()
    start_and_kill(folder, lambda: lines(folder / "stage-2" / "metrics.jsonl") >= 1, tmp_path)
    assert not (folder / "stage-2" / "checkpoint" / "state.pt").exists()
    same_run(run(folder), alone)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no compiler")
def test_killed_with_compiled_layers(alone, tmp_path):
    "A process that goes on compiles again, and meets another batch first; the kernels must be the same."
    compiled = CONFIG | dict(compile="on")
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    def finish(folder):
        said = start(folder, tmp_path, compiled).communicate()[1].decode()
        return Run(folder) if (folder / "report.md").exists() else pytest.fail(said[-2000:])
    start_and_kill(folder, lambda: lines(folder / "stage-2" / "metrics.jsonl") >= 5, tmp_path, compiled)
    same_run(finish(folder), finish(whole))
    assert abs(Run(whole).metrics["loss"] - alone.metrics["loss"]).max() < 1e-3


def test_one_optimizer_over_all_stages_resumes_too(tmp_path):
    "restart='never': the moments of stage 1 are those with which an interrupted stage 2 goes on."
    class Stop(Exception): pass
    def broken(model, pairs):
        if model.training and lines(tmp_path / "b" / "stage-2" / "metrics.jsonl") >= 5: raise Stop
        return packed_logprobs(model, pairs)
    broken.__name__, broken.tokens, broken.attention = "packed_logprobs", packed_logprobs.tokens, packed_logprobs.attention
    whole = run(tmp_path / "a", restart="never")
    with pytest.raises(Stop): sdpo(load_world().base, SOURCES, StepwiseConfig(**CONFIG, restart="never"), tmp_path / "b", logprobs=broken)
    same_run(run(tmp_path / "b", restart="never"), whole)


def test_the_global_random_state_plays_no_part(alone, tmp_path):
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    same_run(run(tmp_path / "run"), alone)
    assert torch.equal(before, torch.get_rng_state())


def test_a_finished_folder_trains_nothing(alone, monkeypatch):
    def seen(names): return {p: (p.read_bytes(), p.stat().st_mtime_ns if p.parent != alone.folder else None) for p in alone.folder.rglob("*") if p.name in names}
    names = ("metrics.jsonl", "model.safetensors", "stage.json", "logprobs-00000.parquet", "partition.json", "config.yaml")
    before = seen(names)
    assert len(before) == 2 * 4 + 1 + 2
    def never(*a, **kw): raise AssertionError("a finished run trained again")
    monkeypatch.setattr(stepwise, "train_stage", never)
    again = run(alone.folder)
    assert again.stages == alone.stages and seen(names) == before


def test_settings_that_change_no_weight_may_differ(alone, monkeypatch):
    monkeypatch.setattr(stepwise, "train_stage", lambda *a, **kw: pytest.fail("a finished run trained again"))
    assert run(alone.folder, save_every=7).stages == alone.stages


@pytest.mark.parametrize("name, value", [("beta", 0.2), ("lr", 2e-3), ("seed", 1), ("order", "random"), ("reference", "fixed"), ("init_target", "S"), ("max_length", 32), ("probe", 7)])
def test_a_setting_that_differs_is_named(alone, name, value):
    with pytest.raises(ValueError) as e: run(alone.folder, **{name: value})
    assert name in str(e.value) and str(alone.folder) in str(e.value) and str(value) in str(e.value)


def test_other_pairs_or_another_model_are_named(alone, tmp_path):
    fewer = SOURCES | dict(digest=SOURCES["digest"][1:])
    with pytest.raises(ValueError, match="pairs") as e: sdpo(load_world().base, fewer, StepwiseConfig(**CONFIG), alone.folder)
    assert str(alone.folder) in str(e.value)
    shutil.copytree(load_world().base, tmp_path / "other")
    perturbed(load_model(load_world().base)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="model|weights") as e: sdpo(str(tmp_path / "other"), SOURCES, StepwiseConfig(**CONFIG), alone.folder)
    assert str(alone.folder) in str(e.value)


def test_a_checkpoint_that_outlived_its_stage_is_removed(alone, tmp_path):
    "Killed after stage.json was written and before the checkpoint, three times the size of the model, was gone."
    shutil.copytree(alone.folder, tmp_path / "run")
    (tmp_path / "run" / "stage-1" / "checkpoint").mkdir()
    same_run(run(tmp_path / "run"), alone)
    assert not list((tmp_path / "run").rglob("checkpoint"))


def test_save_every_changes_nothing(alone, tmp_path):
    same_run(run(tmp_path / "run", save_every=1), alone)
