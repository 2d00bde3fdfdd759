"The command line: bad input is exit status 2 and one line that says what to do; good input does what the functions do."
import json, os, shutil, subprocess, sys
from pathlib import Path

import pytest
import yaml

import sdpo_nb
from sdpo_nb import cli, plan, stages, stepwise
from sdpo_nb.world import load_world
from tiny import SETTINGS, rows, write_jsonl

BASE = load_world().base


@pytest.fixture
def sdpo(monkeypatch, capsys):
    "Run `sdpo ...` in this process: (exit status, stdout, stderr)."
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["sdpo", *map(str, words)])
        monkeypatch.delenv("SDPO_TRACEBACK", raising=False)
        capsys.readouterr()
        try: cli.main(); status = 0
        except SystemExit as e: status = e.code or 0
        return status, *capsys.readouterr()
    return call


@pytest.fixture
def bad(sdpo, tmp_path, monkeypatch):
    "`sdpo run` with good arguments except the given ones; returns the one line it says, and sees to it that nothing was trained."
    monkeypatch.setattr(stages, "train_stage", lambda *a, **kw: pytest.fail("bad input reached the trainer"))
    def call(*words, model=BASE, sources=None, command="run"):
        sources = sources or [f"a={write_jsonl(tmp_path / 'a.jsonl', rows('primer', 8))}"]
        status, out, err = sdpo(command, "--model", model, "--sources", *sources, "--folder", tmp_path / "run", "--precision", "fp32", *words)
        assert status == 2, f"exit status {status}: {out}{err}"
        assert "Traceback" not in err and out == ""
        said = [line for line in err.splitlines() if line.strip()]
        assert len(said) == 1 and said[0].startswith("sdpo: "), f"expected one line, got:\n{err}"
        return said[0]
    return call


def config(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    return "--config", tmp_path / "c.yaml"


@pytest.mark.parametrize("text, meant", [("bata: 0.1", "beta"), ("learnig_rate: 1.0e-5\nordr: random", "order"), ("batchsize: 4", "batch_size"), ("max_len: 4", "max_length")])
def test_unknown_setting_names_the_near_miss(bad, tmp_path, text, meant):
    said = bad(*config(tmp_path, text))
    assert "unknown setting" in said and (f"'{meant}'" in said or text.startswith("learnig") and "lr" in said)


@pytest.mark.parametrize("beta", ["0", "-0.1", "nan", "inf"])
def test_beta_must_be_positive(bad, beta):
    said = bad(f"--beta={beta}")
    assert "beta" in said and (beta in said or float(beta) == float(said.rsplit(" ", 1)[-1]))


@pytest.mark.parametrize("words, name", [(("--batch-size", "0"), "batch_size"), (("--warmup", "1.5"), "warmup"), (("--label-smoothing", "0.5"), "label_smoothing"),
                                         (("--epochs", "0"), "epochs"), (("--lr", "0"), "lr"), (("--chunks", "-1"), "chunks")])
def test_settings_out_of_range_are_named(bad, words, name): assert name in bad(*words)


def test_more_chunks_than_pairs(bad):
    said = bad("--chunks", "100")
    assert "chunks" in said and "100" in said and "8 pairs" in said


def test_zero_chunks(bad): assert "chunks" in bad("--chunks", "0")


def test_missing_model_folder(bad):
    for model in ("/nowhere/model", "./nowhere", "runs/none/model"): assert model in bad(model=model)


def test_folder_that_is_no_model(bad, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in bad(model=tmp_path / "empty") and not (tmp_path / "run" / "config.yaml").exists()


def test_missing_source_file(bad):
    for source in ("/nowhere/a.jsonl", "nowhere.jsonl", "./nowhere", "nowhere.jsonl.gz", "nowhere.parquet"):
        said = bad(sources=[f"a={source}"])
        assert source in said and "no such file" in said.lower()


def test_source_without_a_place(bad):
    said = bad(sources=["a="])
    assert "--sources" in said and "'a='" in said and "name=" in said.lower()


def test_source_without_a_name_is_called_by_its_own(bad): assert "source 'a'" in bad(sources=["nowhere/a.jsonl.gz"])


def test_a_path_that_is_there_is_not_cut_at_its_equals_sign(sdpo, tmp_path, monkeypatch):
    "`runs/lr=1e-4` is a place; `a=...` is a name and a place."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1e-4/stage-1").mkdir(parents=True)
    model = shutil.copytree(BASE, "lr=1e-4/stage-1/model")
    write_jsonl(tmp_path / "lr=1e-4/a.jsonl", rows("primer", 8))
    assert cli._places(["lr=1e-4/a.jsonl", model, f"b={model}"], "--x") == {"a": "lr=1e-4/a.jsonl", "lr=1e-4-stage-1": model, "b": model}
    status, out, err = sdpo("measure", "--models", model, f"S={BASE}", "--sources", "lr=1e-4/a.jsonl", "--precision", "fp32")
    assert status == 0 and f"a, {model}" in out, err


# ---- a run as one file, and what a newcomer types

def test_a_run_as_one_file(sdpo, tmp_path, monkeypatch):
    a, b = (write_jsonl(tmp_path / f"{n}.jsonl", rows(n, 12)) for n in ("primer", "digest"))
    run = dict(model=BASE, folder=str(tmp_path / "run"), sources=dict(easy=str(a), hard=dict(source=str(b), max_pairs=10)), lr=1e-3, max_length=64, precision="fp32")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    status, out, err = sdpo("partition", "--config", tmp_path / "run.yaml")
    assert status == 0 , err
    assert json.loads((tmp_path / "run/partition.json").read_text())["counts"][1]["rows"] == 10
    written = tmp_path / "run" / "config.yaml"                     # what a run writes is such a file
    assert yaml.safe_load(written.read_text())["sources"]["hard"] == dict(source=str(b), max_pairs=10)
    assert sdpo("partition", "--config", written, "--folder", tmp_path / "run")[0] == 0
    status, _, err = sdpo("partition", "--config", written, "--folder", tmp_path / "run", "--lr", "1e-2")
    assert status == 2 and "lr = 0.001, not 0.01" in err           # an option wins
    del run["model"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    status, _, err = sdpo("partition", "--config", tmp_path / "run.yaml")
    assert status == 2 and "--model: is missing" in err


def test_data_shows_what_is_scored(sdpo, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows("primer", 8) + [rows("primer", 1)[0] | dict(rejected=[{"role": "assistant", "content": ""}])])
    status, out, err = sdpo("data", "--model", BASE, "--sources", path)
    assert status == 0 and "a: 9 rows read, 8 used, dropped: 1 empty; conversations" in out and "warning: 11% of a are dropped" in out, err
    assert out.count(">>> chosen: ") == 3 and rows("primer", 1)[0]["chosen"][0]["content"] in out and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("typed, meant", [("--learning-rate", "lr"), ("--num_train_epochs", "epochs"), ("--max-grad-norm", "clip"), ("--betta", "beta"), ("--max_length", "max-length"), ("--heldout", "held-out")])
def test_options_that_others_have_are_understood(sdpo, tmp_path, typed, meant):
    status, _, err = sdpo("run", "--model", BASE, "--sources", "a=a.jsonl", "--folder", tmp_path / "run", typed, "1")
    assert status == 2 and f"did you mean '--{meant}'" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("typed, why", [("--warmup-steps", "warmup is a share"), ("--max_completion_length", "max_length"), ("--weight-decay=0.1", "without it")])
def test_of_an_option_that_others_have_and_a_run_has_not_it_is_said_why(sdpo, tmp_path, typed, why):
    status, _, err = sdpo("run", "--model", BASE, "--sources", "a=a.jsonl", "--folder", tmp_path / "run", *typed.split("="))
    assert status == 2 and why in err and "did you mean" not in err and len(err.splitlines()) == 1


def test_an_option_of_another_command_is_not_suggested(sdpo):
    status, _, err = sdpo("measure", "--models", BASE, "--sources", "a.jsonl", "--beta", "0.3")
    assert status == 2 and "did you mean" not in err and "sdpo measure --help" in err


def test_a_file_of_a_run_leaves_open_what_the_run_filled_in(sdpo, tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", rows("primer", 8))
    assert sdpo("partition", "--model", BASE, "--sources", a, "--folder", tmp_path / "run")[0] == 0
    again = cli._run_file(tmp_path / "run/config.yaml")["settings"]
    parser = cli._parser(words := ["run", "--lora-r", "4", "--max-length", "256"])
    config = cli._config(parser.parse_args(words), again)
    assert (config.lr, config.max_prompt_length) == (5e-6, 128)
    status, _, err = sdpo("run", "--config", tmp_path / "run/config.yaml", "--folder", tmp_path / "other", "--max-pairs", "4")
    assert status == 2 and "--max-pairs: counts for --sources" in err and not (tmp_path / "other").exists()


def test_version(sdpo):
    status, out, _ = sdpo("--version")
    assert status == 0 and out.startswith("sdpo_nb ") and "torch" in out


def test_a_fault_that_nobody_expected_is_one_line(sdpo, tmp_path, monkeypatch):
    def broken(*a, **kw): raise KeyError("x")
    monkeypatch.setattr(plan, "load_sources", broken)
    status, _, err = sdpo("run", "--model", BASE, "--sources", "a=a.jsonl", "--folder", tmp_path / "run")
    assert status == 1 and "KeyError" in err and "SDPO_TRACEBACK" in err and "Traceback" not in err


def test_vanishing_pairs_are_announced(sdpo, tmp_path):
    long = [r | dict(prompt=[{"role": "user", "content": "copy " + "a" * 90}], chosen=[{"role": "assistant", "content": "ab" * 30}], rejected=[{"role": "assistant", "content": "ab" * 30 + "c"}]) for r in rows("primer", 4)]
    path = write_jsonl(tmp_path / "a.jsonl", rows("primer", 8) + long)
    status, out, err = sdpo("partition", "--model", BASE, "--sources", path, "--folder", tmp_path / "run", "--max-length", "48", "--precision", "fp32")
    assert status == 0 and "4 no_room" in out and "33% of a are dropped; a larger max_length keeps more" in out, err
    status, _, err = sdpo("partition", "--model", BASE, "--sources", path, "--folder", tmp_path / "other", "--max-length", "48", "--max-prompt-length", "48")
    assert status == 2 and "max_prompt_length" in err and "leaves no room" in err and not (tmp_path / "other" / "config.yaml").exists()


def test_two_sources_of_one_name(bad, tmp_path):
    a, b = (write_jsonl(tmp_path / f"{n}.jsonl", rows(n, 8)) for n in ("primer", "digest"))
    assert "'x'" in bad(sources=[f"x={a}", f"x={b}"])


def test_chat_rows_but_no_chat_template(bad, tmp_path):
    shutil.copytree(BASE, tmp_path / "model"); (tmp_path / "model" / "chat_template.jinja").unlink()
    said = bad(model=tmp_path / "model")
    assert "chat template" in said and "'a'" in said


def test_no_usable_pair(bad, tmp_path):
    same = [r | dict(rejected=r["chosen"]) for r in rows("primer", 8)]
    said = bad(sources=[f"twins={write_jsonl(tmp_path / 's.jsonl', same)}"])
    assert "'twins'" in said and "no usable pair" in said and "8" in said


def test_empty_source(bad, tmp_path):
    assert "void" in bad(sources=[f"void={write_jsonl(tmp_path / 'void.jsonl', [])}"])


def test_row_that_is_no_json(bad, tmp_path):
    path = write_jsonl(tmp_path / "a1.jsonl", rows("primer", 8))
    lines = path.read_text().splitlines(); lines[5] = lines[5][:40]
    path.write_text("\n".join(lines) + "\n")
    said = bad(sources=[f"a={path}"])
    assert str(path) in said and "row 5" in said and "JSON" in said


@pytest.mark.parametrize("field, value", [("chosen", None), ("rejected", None), ("chosen", 5), ("rejected", "text beside messages"),
                                          ("prompt", 7), ("chosen", [{"role": "user", "content": "not an answer"}])])
def test_row_that_is_no_preference(bad, tmp_path, field, value):
    data = rows("primer", 8); data[3][field] = value
    path = write_jsonl(tmp_path / "a2.jsonl", data)
    said = bad(sources=[f"broken={path}"])
    assert (str(path) in said or "'broken'" in said) and "row 3" in said and f"'{field}'" in said


def test_no_such_column(bad, tmp_path):
    path = write_jsonl(tmp_path / "a3.jsonl", [dict(prompt="x", better="y", worse="z")] * 3)
    said = bad(sources=[f"a={path}"])
    assert str(path) in said and "'chosen'" in said and "better" in said and "columns" in said
    assert "nope" in bad("--columns", "nope=system", "better=chosen", "worse=rejected", sources=[f"a={path}"])
    assert "--columns" in bad("--columns", "better", sources=[f"a={path}"])


@pytest.mark.parametrize("text", ["- beta\n- lr", "beta: [", "just words"])
def test_config_that_is_no_mapping(bad, tmp_path, text): assert "c.yaml" in bad(*config(tmp_path, text))


def test_config_that_is_not_there(bad, tmp_path):
    for path in ("none.yaml", tmp_path): assert f"--config: {path}: cannot be read" in bad("--config", path)


def test_what_would_be_ignored_is_refused(bad, sdpo, tmp_path):
    assert "--revision: is a commit on the hub" in bad("--revision", "abc") and "--model-revision" in bad("--model-revision", "abc")
    status, _, err = sdpo("push", tmp_path, "--export", tmp_path / "y", "--public")
    assert status == 2 and "--public: counts for --to" in err


def test_a_list_of_sources_in_a_file(bad, tmp_path): assert "c.yaml: sources: expected lines" in bad(*config(tmp_path, "sources: [a.jsonl]"))


def test_a_folder_that_cannot_be_made(bad, tmp_path): assert "a.jsonl/run: cannot be made" in bad("--folder", tmp_path / "a.jsonl/run")


def test_text_that_is_not_utf8(bad, tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é", "chosen": "a", "rejected": "b"}'.encode("latin-1"))
    assert "latin.jsonl: is not text in UTF-8" in bad(sources=[f"a={tmp_path / 'latin.jsonl'}"])


@pytest.mark.parametrize("text, name", [("beta: high", "beta"), ("shuffle: 3", "shuffle"), ("epochs: 1.5", "epochs"), ("order: upwards", "order"), ("reference: 3", "reference")])
def test_config_values_of_the_wrong_kind(bad, tmp_path, text, name): assert name in bad(*config(tmp_path, text))


def test_reference_that_is_no_model(bad):
    said = bad("--reference", "/nowhere/model")
    assert "/nowhere/model" in said


@pytest.mark.parametrize("wrong", [("--chunks", "100"), ("--reference", "/nowhere/model"), ("--reference", str(Path(BASE).parent))], ids=["chunks", "no reference", "no model"])
def test_a_refused_call_leaves_nothing_behind(sdpo, bad, tmp_path, wrong):
    "What is impossible is said before the pass of M_0, which takes hours with a real model, and the corrected call may use the folder."
    source = f"a={write_jsonl(tmp_path / 'a.jsonl', rows('primer', 8))}"
    bad(*wrong, sources=[source])
    passed = list((tmp_path / "run").rglob("*.parquet"))
    status, out, err = sdpo("partition", "--model", BASE, "--sources", source, "--folder", tmp_path / "run", "--precision", "fp32", "--chunks", "2")
    assert status == 0, f"the corrected call was refused: {err}"
    assert not passed, "all pairs were scored before the mistake was seen"


def test_a_folder_with_another_setting(sdpo, bad, tmp_path):
    source = f"a={write_jsonl(tmp_path / 'a.jsonl', rows('primer', 8))}"
    assert sdpo("partition", "--model", BASE, "--sources", source, "--folder", tmp_path / "run", "--precision", "fp32")[0] == 0
    said = bad("--beta", "0.7", sources=[source])
    assert "beta" in said and str(tmp_path / "run") in said and "0.7" in said and "0.1" in said


def test_ctrl_c_is_no_traceback(sdpo, tmp_path, monkeypatch):
    def stop(*a, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(stages, "train_stage", stop)
    source = f"a={write_jsonl(tmp_path / 'a.jsonl', rows('primer', 8))}"
    status, out, err = sdpo("run", "--model", BASE, "--sources", source, "--folder", tmp_path / "run", "--precision", "fp32")
    assert status == 130 and err.splitlines()[-1] == "sdpo: stopped; the same command goes on" and "Traceback" not in err


def test_report_without_a_run(sdpo, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        status, out, err = sdpo("report", folder)
        assert status == 2 and len(err.splitlines()) == 1 and str(folder) in err and "run" in err.replace(str(folder), "")


def test_report_before_the_first_stage(sdpo, tmp_path):
    "After `sdpo partition` there is a partition to report, and no stage."
    source = f"a={write_jsonl(tmp_path / 'a.jsonl', rows('primer', 8))}"
    assert sdpo("partition", "--model", BASE, "--sources", source, "--folder", tmp_path / "run", "--precision", "fp32")[0] == 0
    status, out, err = sdpo("report", tmp_path / "run")
    assert status in (0, 2) and "Traceback" not in err and ("primer" in out or "| a |" in out or len(err.splitlines()) == 1)


@pytest.mark.parametrize("words, said", [(("--order", "upwards"), "easy_to_hard"), (("--beta", "much"), "--beta"), (("--no-such",), "unrecognized arguments: --no-such"), (("--chunks", "two"), "--chunks")])
def test_what_argparse_refuses(sdpo, tmp_path, words, said):
    status, out, err = sdpo("run", "--model", BASE, "--sources", "a=b.jsonl", "--folder", tmp_path / "run", *words)
    assert status == 2 and "Traceback" not in err and said in err.splitlines()[-1]


def test_no_command(sdpo):
    status, out, err = sdpo()
    assert status == 2 and "command" in err.splitlines()[-1]


@pytest.mark.parametrize("text, want", [("lr: 1e-4", 1e-4), ("lr: 0.0001", 1e-4), ("beta: 1", 1.0)])
def test_numbers_as_people_write_them(sdpo, tmp_path, text, want):
    "YAML 1.1 reads 1e-4 as a string; a settings file may say it all the same."
    source = f"a={write_jsonl(tmp_path / 'a.jsonl', rows('primer', 8))}"
    status, out, err = sdpo("partition", "--model", BASE, "--sources", source, "--folder", tmp_path / "run", "--precision", "fp32", *config(tmp_path, text))
    assert status == 0, err
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["settings"][text.split(":")[0]] == want


def test_partition_then_run_then_report(sdpo, tmp_path, monkeypatch):
    files = [f"{n}={write_jsonl(tmp_path / f'{n}.jsonl', rows(n, 16))}" for n in ("riddle", "primer")]
    given = config(tmp_path, yaml.safe_dump(SETTINGS | dict(beta=0.3, epochs=2)))
    call = ["--model", BASE, "--sources", *files, "--folder", tmp_path / "run", *given, "--beta", "0.5"]
    status, out, err = sdpo("partition", *call)
    assert status == 0 and "riddle" in out and "primer" in out and "accuracy" in out, err
    tables = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "base").rglob("*.parquet")}
    assert tables and not list((tmp_path / "run").glob("stage-*"))
    status, out, err = sdpo("run", *call)
    assert status == 0 and "report.md" in out and "M_1" in out, err
    assert {p: p.stat().st_mtime_ns for p in tables} == tables, "the pass of M_0 was made again"
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["settings"]
    assert settings["beta"] == 0.5 and settings["epochs"] == 2 and settings["lr"] == SETTINGS["lr"]
    assert len(stepwise.Run(tmp_path / "run").stages) == 2 and (tmp_path / "run" / "stage-2" / "model" / "config.json").exists()
    (tmp_path / "run" / "report.md").unlink(); shutil.rmtree(tmp_path / "run" / "figures")
    status, again, err = sdpo("report", tmp_path / "run")
    assert status == 0 and "M_1" in again and (tmp_path / "run" / "report.md").exists()
    report = (tmp_path / "run" / "report.md").read_text()
    assert all((tmp_path / "run" / f).exists() for f in [w.split(")")[0] for w in report.split("](")[1:]]) and report.count("](figures/") >= 3
    def full(path): raise OSError(28, "No space left on device")
    monkeypatch.setattr(sdpo_nb.report, "replacing", full)
    (tmp_path / "run" / "report.md").unlink()
    status, out, err = sdpo("report", tmp_path / "run")
    assert status == 2 and "M_1" in out and "report:" not in out.replace("no new report:", "") and "there is no new report" in err


def test_help_needs_no_torch():
    "In processes of their own: `sdpo --help` answers at once."
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(Path(sdpo_nb.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]))
    code = "import sys, sdpo_nb.cli; heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'pandas', 'matplotlib'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    ran = subprocess.run([sys.executable, "-X", "importtime", "-m", "sdpo_nb.cli", "--help"], env=env, capture_output=True, text=True)
    assert ran.returncode == 0 and all(c in ran.stdout for c in ("run", "partition", "report", "demo"))
    assert "sdpo_nb" in ran.stderr and not any(line.rsplit("|")[-1].strip() == "torch" for line in ran.stderr.splitlines())


def test_run_help_names_every_setting(sdpo):
    from dataclasses import fields
    status, out, err = sdpo("run", "--help")
    assert status == 0
    for f in fields(stepwise.StepwiseConfig): assert "--" + f.name.replace("_", "-") in out and str(f.default) in out


def test_a_loss_is_for_python_only(bad, tmp_path):
    for words in (("--loss", "ipo"), config(tmp_path, "loss: ipo")):
        said = bad(*words)
        assert "loss: must be a function" in said and "only Python" in said


def test_a_file_may_say_that_there_is_no_loss_of_its_own(sdpo, tmp_path):
    source = f"a={write_jsonl(tmp_path / 'a.jsonl', rows('primer', 4))}"
    status, out, err = sdpo("data", "--model", BASE, "--sources", source, *config(tmp_path, "loss: null\nschedule: cosine"))
    assert status == 0 and "4 used" in out, err
