"A run that was killed with SIGKILL, wherever, ends with the weights of one that was left alone; a finished one trains nothing."
import json, os, shutil, signal, stat, subprocess, sys, time
from pathlib import Path

import pytest
import torch, yaml

import sdpo_nb, sdpo_nb.folder, sdpo_nb.report, sdpo_nb.stages as stages, sdpo_nb.stepwise as stepwise
from sdpo_nb.logprobs import load_model, weights_hash
from sdpo_nb.packing import packed_logprobs
from sdpo_nb.folder import alone_in, check_fresh, code_hash, load_stage
from sdpo_nb.report import Run, gamma_table
from sdpo_nb.stepwise import StepwiseConfig, sdpo
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
    deadline = time.time() + 600
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
    for t in range(1, len(a.stages) + 1):
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
def test_killed_with_compiled_layers(tmp_path):
    "A process that goes on compiles again, and meets another batch first; the kernels must be the same. In bf16, where compiled layers round otherwise than others do; one stage, since compiling takes most of the time."
    config = CONFIG | dict(compile="on", precision="bf16", chunks=[["primer"]])
    def finish(folder):
        said = start(folder, tmp_path, config).communicate()[1].decode()
        return Run(folder) if (folder / "report.md").exists() else pytest.fail(said[-2000:])
    killed = tmp_path / "killed"
    start_and_kill(killed, lambda: lines(killed / "stage-1" / "metrics.jsonl") >= 5, tmp_path, config)
    whole = finish(tmp_path / "whole")
    same_run(finish(killed), whole)
    (stage,) = whole.stages
    assert stage["end"] != stage["start"] and stage["reference_kind"]["precision"] == "bf16"


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
    monkeypatch.setattr(stages, "train_stage", never)
    again = run(alone.folder)
    assert again.stages == alone.stages and seen(names) == before


def test_settings_that_change_no_weight_may_differ(alone, monkeypatch):
    monkeypatch.setattr(stages, "train_stage", lambda *a, **kw: pytest.fail("a finished run trained again"))
    assert run(alone.folder, save_every=7).stages == alone.stages


@pytest.mark.parametrize("name, value", [("beta", 0.2), ("lr", 2e-3), ("seed", 1), ("order", "random"), ("reference", "fixed"), ("init_target", "S"), ("max_length", 48), ("probe", 7)])
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


# ---- a folder that was changed in between

def copy_of(alone, tmp_path, finished=2):
    "The run after so many stages: stage 2 is not begun, or all is finished."
    folder = tmp_path / "run"
    shutil.copytree(alone.folder, folder)
    if finished == 1: shutil.rmtree(folder / "stage-2")
    return folder


def complaint(call, *args, **kw):
    with pytest.raises((ValueError, OSError)) as e: call(*args, **kw)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


@pytest.mark.parametrize("lost", ["kind.json", "pieces", "everything", "another device"])
def test_a_lost_table_of_the_last_model_is_made_again(alone, tmp_path, capsys, lost):
    "Also of the chunks that stage 2 does not train on, and in the same batches, so to the same bits."
    folder = copy_of(alone, tmp_path, 1); table = folder / "stage-1" / "logprobs"
    kind = json.loads((table / "kind.json").read_text())
    if lost == "another device": (table / "kind.json").write_text(json.dumps(kind | dict(device="cuda")))
    if lost == "kind.json": (table / lost).unlink()
    if lost == "everything": shutil.rmtree(table)
    if lost == "pieces":
        for piece in table.glob("*.parquet"): piece.unlink()
    same_run(run(folder), alone)
    assert gamma_table(Run(folder)).equals(gamma_table(alone)) and (folder / "report.md").exists()


def test_a_lost_table_of_a_finished_run_is_named(alone, tmp_path):
    folder = copy_of(alone, tmp_path)
    for piece in (folder / "stage-1" / "logprobs").glob("*.parquet"): piece.unlink()
    said = complaint(Run(folder).report)
    assert f"{folder / 'stage-1' / 'logprobs'}: the table of M_1 lacks" in said and "remove stage-1" in said
    shutil.rmtree(folder / "stage-1"); shutil.rmtree(folder / "stage-2")     # as it says
    same_run(run(folder), alone)


def test_a_model_that_was_replaced_is_not_trained_on(alone, tmp_path):
    one, two = copy_of(alone, tmp_path / "a", 1), copy_of(alone, tmp_path / "b")
    model = load_model(str(one / "stage-1" / "model"))
    with torch.no_grad(): next(model.parameters())[0] *= 1.01
    for folder in (one / "stage-1", two / "stage-2"):
        model.save_pretrained(folder / "model")
        said = complaint(run, folder.parent)
        assert f"{folder / 'model'}: has weights {weights_hash(model)}" in said and f"remove {folder.name}" in said
    assert not (one / "stage-2").exists()
    assert complaint(lambda: Run(two).model) == said
    shutil.rmtree(one / "stage-1")
    same_run(run(one), alone)


@pytest.mark.parametrize("left", ["base", "stage-1", "partition.json"])
def test_parts_of_a_run_without_its_settings(alone, tmp_path, left):
    folder = tmp_path / "run"
    shutil.copytree(alone.folder, folder, ignore=lambda path, names: [n for n in names if Path(path) == alone.folder and n != left])
    said = complaint(run, folder, lr=1e-2)
    assert f"{folder}: not empty and not a run, there is {left}" in said and not (folder / "config.yaml").exists()


@pytest.mark.parametrize("name", ["report.md", "figures", "held_out.json"])
def test_files_of_somebody_else_are_not_written_over(tmp_path, name):
    (tmp_path / name).mkdir() if name == "figures" else (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"not a run, there is {name} but no config.yaml"): check_fresh(tmp_path)


def test_what_a_kill_leaves_of_a_base_is_no_part_of_a_run(tmp_path):
    for name in ("model", ".model.tmp", ".model.old.tmp"): (tmp_path / "base" / name).mkdir(parents=True)
    check_fresh(tmp_path)


def test_another_config_of_the_base(alone, tmp_path):
    "Its weights are the same, its numbers are not."
    S, folder = tmp_path / "S", tmp_path / "run"
    shutil.copytree(load_world().base, S)
    stepwise.sdpo_partition(str(S), SOURCES, StepwiseConfig(**CONFIG), folder)
    config = json.loads((S / "config.json").read_text())
    (S / "config.json").write_text(json.dumps(config | dict(rope_theta=500.0, rope_parameters=dict(rope_theta=500.0, rope_type="default"))))
    assert "started with a config of S with the hash" in complaint(stepwise.sdpo_partition, str(S), SOURCES, StepwiseConfig(**CONFIG), folder)


def test_the_number_of_a_stage_counts(alone, tmp_path):
    folder = copy_of(alone, tmp_path)
    shutil.copytree(folder / "stage-1", folder / "stage-1-backup")
    shutil.copytree(folder / "stage-1", folder / "stage-old")
    same_run(run(folder), alone)
    shutil.rmtree(folder / "stage-1")
    got = Run(folder)
    assert got.model_folder() == folder / "stage-2" / "model" and weights_hash(got.model) == alone.stages[-1]["end"]
    missing = f"{folder / 'stage-1' / 'stage.json'}: is missing, but stage 2 is finished"
    for call in (lambda: run(folder), got.report, lambda: got.stages, lambda: got.metrics): assert missing in complaint(call)


NO_SETTINGS = "model: S\nweights: a\nsources: {}\npairs: a\ndevice: cpu\nversions: {}\nsettings:\n"
BROKEN = {"config.yaml": ["", "null", "a: [", "a: 1\na: 2", b"\xff\xfe", "{}", NO_SETTINGS, None], "partition.json": ["", "null", '{"names": ["', "{}", '{"measures": [], "names": ["a"], "chunks": [[0, 1]]}', None],
          "stage-1/stage.json": ["", "null", "[]", '{"stage": 1}', b"\x00\xff", None], "stage-1/metrics.jsonl": ["", "null", '{"step"', b"\x00\xff", None]}


@pytest.mark.parametrize("name, content", [(name, content) for name, contents in BROKEN.items() for content in contents])
def test_a_broken_file_is_named(alone, tmp_path, name, content):
    "None: a folder lies in its place."
    folder = copy_of(alone, tmp_path); path = folder / name
    path.unlink()
    if content is None: path.mkdir()
    else: path.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = complaint(run, folder)
    assert said.startswith(f"{path}: cannot be used (") and ("remove" in said or "use another folder" in said)


def test_a_partition_is_made_again(alone, tmp_path):
    folder = copy_of(alone, tmp_path, 1)
    (folder / "partition.json").unlink()
    same_run(run(folder), alone)


def test_a_full_disk_while_a_model_is_saved(alone, tmp_path):
    import resource
    folder = copy_of(alone, tmp_path, 1); size = (folder / "stage-1" / "model" / "model.safetensors").stat().st_size
    save = stages.save_model
    def full(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
        try: save(*args)
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "save_model", full)
        assert complaint(run, folder) == f"{folder / 'stage-2' / 'model'}: could not be written (disk full?)"
    assert not list(folder.rglob("*.tmp"))
    same_run(run(folder), alone)


def test_two_processes_in_one_folder(alone, tmp_path):
    "The second one is refused, and the lock of one that was killed is free."
    folder, refused = tmp_path / "run", []
    def meet():
        if lines(folder / "stage-1" / "metrics.jsonl") < 3: return False
        refused.append(complaint(run, folder))
        return True
    start_and_kill(folder, meet, tmp_path)
    assert refused == [f"{folder}: another process works in this folder; wait until it has ended, or use another folder"]
    same_run(run(folder), alone)


def test_a_folder_is_free_again_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), alone_in(tmp_path): raise KeyError


def test_where_there_are_no_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(sdpo_nb.folder, "fcntl", None)
    with alone_in(tmp_path), alone_in(tmp_path): pass


def test_two_processes_of_a_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes were started" in complaint(run, tmp_path / "run") and not (tmp_path / "run").exists()


def test_another_machine_goes_on_and_says_so(alone, tmp_path, capsys):
    folder = copy_of(alone, tmp_path, 1); path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    assert config["machine"] == dict(threads=torch.get_num_threads(), cpu=torch.backends.cpu.get_cpu_capability())
    config["machine"]["threads"] += 6; config["versions"]["accelerate"] = "0.1"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    capsys.readouterr()
    same_run(run(folder), alone)
    said = [line for line in capsys.readouterr().out.splitlines() if "goes on" in line]
    assert len(said) == 1 and f"goes on with {torch.get_num_threads()} thread" in said[0] and "started with 0.1" in said[0] and said[0].endswith("the last bits may differ")
    run(folder)
    assert "goes on" not in capsys.readouterr().out, "a finished run does not go on"


def test_a_seed_that_cannot_be_does_not_mark_a_folder(tmp_path):
    assert complaint(run, tmp_path / "run", seed=99999999999999999999, order="random") == "seed: must be at most 9223372036854775807, got 99999999999999999999"
    assert not (tmp_path / "run").exists()


def test_colleagues_may_read_the_models(alone):
    for t in (1, 2):
        modes = {stat.S_IMODE(p.stat().st_mode) for p in alone.model_folder(t).iterdir()}
        assert len(modes) == 1 and modes == {stat.S_IMODE((alone.folder / "config.yaml").stat().st_mode)}


def test_a_cut_model_of_a_stage_cannot_be_downloaded(alone, tmp_path):
    folder = copy_of(alone, tmp_path); path = folder / "stage-2" / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3000])
    assert "put it back, or remove stage-2 and the stages after it" in complaint(load_stage, folder / "stage-2")


def test_nothing_is_written_through_a_link(alone, tmp_path):
    folder, victim, victims = copy_of(alone, tmp_path, 1), tmp_path / "victim", tmp_path / "victims"
    victim.write_text("mine"); victims.mkdir()
    (folder / "stage-2" / "checkpoint").mkdir(parents=True)
    for name in ("report.md", "figures/loss.png"): (folder / name).unlink()
    for name in ("report.md", ".report.md.tmp", "figures/loss.png", "figures/.loss.png.tmp", "stage-2/.stage.json.tmp", "stage-2/checkpoint/.state.pt.tmp"): (folder / name).symlink_to(victim)
    (folder / "stage-2" / ".model.tmp").symlink_to(victims)
    same_run(run(folder), alone)
    assert victim.read_text() == "mine" and not list(victims.iterdir())
    shutil.rmtree(folder / "figures"); (folder / "figures").symlink_to(victims)
    run(folder)
    assert not list(victims.iterdir()) and (folder / "figures" / "loss.png").exists()


def test_a_finished_run_on_a_disk_that_can_only_be_read(alone, tmp_path, monkeypatch, capsys):
    "Its tables are shown; that there is no new report takes one line."
    def read_only(path): raise OSError(30, "Read-only file system")
    folder = copy_of(alone, tmp_path)
    monkeypatch.setattr(sdpo_nb.report, "replacing", read_only)
    monkeypatch.setattr(sdpo_nb.folder, "_open_lock", lambda path: None)
    capsys.readouterr()
    assert run(folder).table().equals(alone.table())
    assert "no new report: [Errno 30] Read-only file system" in capsys.readouterr().out


NAMES = ["a$\\frac{$", "$x$", "a|b", "<script>", "![](http://x)", "_y"]


def test_names_are_only_names(tmp_path):
    folder = tmp_path / "run"
    got = sdpo(load_world().base, {name: rows("primer", 4, 4 * i) for i, name in enumerate(NAMES)}, StepwiseConfig(**CONFIG), folder)
    assert list(got.partition().index) and sorted(got.partition().index) == sorted(NAMES)
    text = (folder / "report.md").read_text()
    assert r"a\|b" in text and r"\<script>" in text and r"!\[](http://x)" in text and "a|b" not in text.replace(r"a\|b", "") and "| <script>" not in text
    for part in ("## Partition under S", "## Stages"):
        table = [line.replace(r"\|", "") for line in text.split(part)[1].split("##")[0].splitlines() if line.startswith("| ")]
        assert len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize("name", ["two\nlines", "a\tb", "bell\x07", "\ud800"])
def test_names_that_cannot_be_printed(tmp_path, name):
    said = complaint(sdpo, load_world().base, {name: rows("primer", 4)}, StepwiseConfig(**CONFIG), tmp_path / "run")
    assert said.startswith(f"sources: the name {name!r} has a control character") and not (tmp_path / "run" / "config.yaml").exists()


# ---- a loss of one's own

def ipo(c, r, rc, rr, beta, pairs): return ((c - r) - (rc - rr) - 1 / (2 * beta)) ** 2
def other(c, r, rc, rr, beta, pairs): return -beta * ((c - r) - (rc - rr))


def test_a_run_with_its_own_loss_goes_on_and_refuses_another(tmp_path, monkeypatch):
    straight = run(tmp_path / "a", loss=ipo, lr=1e-4)
    calls = []
    def stops(model, pairs):
        calls.append(model.training)
        if sum(calls) == 20: raise KeyboardInterrupt
        return packed_logprobs(model, pairs)
    stops.tokens, stops.attention, stops.__name__ = packed_logprobs.tokens, packed_logprobs.attention, "packed_logprobs"
    config = StepwiseConfig(**CONFIG | dict(loss=ipo, lr=1e-4))
    with pytest.raises(KeyboardInterrupt): sdpo(load_world().base, SOURCES, config, tmp_path / "b", logprobs=stops)
    assert yaml.safe_load((tmp_path / "b/config.yaml").read_text())["settings"]["loss"] == "ipo"
    for wrong in (None, other):
        with pytest.raises(ValueError, match="started with loss = ipo, not"): run(tmp_path / "b", loss=wrong, lr=1e-4)
    again = run(tmp_path / "b", loss=ipo, lr=1e-4)
    assert [s["end"] for s in again.stages] == [s["end"] for s in straight.stages]
    for s in straight.stages: assert s["first_loss"] == pytest.approx(25, abs=0.01) and s["implied_first_loss"] == pytest.approx(25, abs=0.01)
    report = (tmp_path / "a/report.md").read_text()
    assert "a loss of its own, the function `ipo`" in report and "| loss | ipo |" in report


def test_another_body_of_a_loss_is_told(tmp_path, capsys):
    "Its name is the same, so the run goes on; the same body, as another process compiles it, is no other."
    first = "def mine(c, r, rc, rr, beta, pairs):\n    return ((c - r) - (rc - rr) - 1 / (2 * beta)) ** 2 if beta in {0.5, 'a', 'b'} else (c - r).abs()\n"
    def compiled(text):
        exec(text, found := {})
        return found["mine"]
    def call(loss, stage):
        def stop(row):
            if row["stage"] == stage: raise KeyboardInterrupt
        config = StepwiseConfig(**CONFIG | dict(loss=loss, lr=1e-4))
        try: sdpo(load_world().base, SOURCES, config, tmp_path / "run", on_step=stop)
        except KeyboardInterrupt: pass
        return capsys.readouterr().out
    call(compiled(first.replace("abs", "exp")), 1)                       # no update is saved yet
    for _ in range(2): assert "code of loss" not in call(compiled(first), 1)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["loss_code"] == code_hash(compiled(first))
    call(compiled(first), 2)
    assert "code of loss" not in call(compiled("# moved\n\n" + first), 2)
    assert "the code of loss mine is not that which it was started with" in call(compiled(first.replace("abs", "exp")), 0)
    ask = f"exec({first!r}); from sdpo_nb.folder import code_hash; print(code_hash(mine))"
    hashes = {subprocess.run([sys.executable, "-c", ask], env=os.environ | dict(PYTHONHASHSEED=str(seed)), capture_output=True, text=True).stdout for seed in range(2)}
    assert hashes == {code_hash(compiled(first)) + "\n"}


def test_a_folder_from_before_there_were_schedules_has_the_old_one(tmp_path):
    stepwise.sdpo_partition(load_world().base, SOURCES, StepwiseConfig(**CONFIG), tmp_path)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    for name in ("schedule", "order_by", "loss"): del written["settings"][name]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    for wrong in (dict(schedule="cosine"), dict(order_by="gamma_per_token"), dict(loss=ipo)):
        with pytest.raises(ValueError, match=f"started with {list(wrong)[0]} ="): stepwise.sdpo_partition(load_world().base, SOURCES, StepwiseConfig(**CONFIG | wrong), tmp_path)
    stepwise.sdpo_partition(load_world().base, SOURCES, StepwiseConfig(**CONFIG), tmp_path)


@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), PermissionError(13, "Permission denied", "a")])
def test_what_says_nothing_about_a_file_is_not_blamed_on_it(error):
    with pytest.raises(type(error)) as e, sdpo_nb.folder.naming(Path("stage.json")): raise error
    assert e.value is error
