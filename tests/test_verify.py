"A run that was handed in: nothing differs in an honest one, and each way of tampering is found once."
import json, shutil, sys, zipfile

import pandas as pd
import pytest
import torch
import yaml

from sdpo_nb import cli, logprobs
from sdpo_nb import verify as verify_module
from sdpo_nb.folder import read_part, save_model
from sdpo_nb.logprobs import load_model, load_tokenizer, pairs_hash, read_table, write_json
from sdpo_nb.plan import StepwiseConfig
from sdpo_nb.report import Run, report_text
from sdpo_nb.stepwise import sdpo as train
from sdpo_nb.verify import DIFFERS, NOT_CHECKED, OK, pack_run, verify
from sdpo_nb.world import load_world
from tiny import SETTINGS, rows

BASE = load_world().base
SOURCES = {name: rows(name, 24) for name in ("primer", "digest")}


def differing(found): return found.index[found["result"] == DIFFERS].tolist()


def unchecked(found): return found.index[found["result"] == NOT_CHECKED].tolist()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Folders of an honest run with held-out pairs, and of one whose reference was fixed."
    tmp = tmp_path_factory.mktemp("runs")
    train(BASE, SOURCES, StepwiseConfig(**SETTINGS, eval_share=0.2), tmp / "good")
    train(BASE, SOURCES, StepwiseConfig(**SETTINGS, reference="fixed"), tmp / "fixed")
    return tmp


@pytest.fixture
def good(runs, tmp_path):
    "A copy that a test may change."
    return shutil.copytree(runs / "good", tmp_path / "good")


def write_again(folder): (folder / "report.md").write_text(report_text(Run(folder)), encoding="utf-8") # without its figures


def change(folder, t, **values):
    path = folder / f"stage-{t}/stage.json"
    write_json(path, read_part(path) | values)


# ---- honest runs

def test_nothing_differs_in_an_honest_run(runs):
    found = verify(runs / "good", SOURCES)
    assert differing(found) == [] and unchecked(found) == ["manifest"]
    assert found.loc["stage 2: numbers", "note"] == "10 numbers, and gamma_ref of 3 steps"
    for row in ("data: partition", "data: held-out pairs", "held-out pairs", "pairs", "report.md"): assert found.loc[row, "result"] == OK
    for t in (0, 1, 2): assert found.loc[f"M_{t} asked again", "note"].startswith("32 pairs")


def test_without_weights_and_data_this_is_said(runs, tmp_path):
    found = verify(pack_run(runs / "good", tmp_path / "a.zip"))
    assert differing(found) == []
    assert unchecked(found) == ["stage 1: weights", "stage 2: weights", "data"] and found.loc["manifest", "result"] == OK


def test_a_fixed_reference_is_no_fault(runs):
    found = verify(runs / "fixed", SOURCES)
    assert differing(found) == [] and unchecked(found) == ["manifest", "held-out pairs"]
    assert "by the tables" in found.loc["stage 2: first loss", "note"]


@pytest.mark.parametrize("settings", [
    dict(reference="fixed", init_target="S"), dict(init_target="S", label_smoothing=0.1), dict(chunks=1, order="as_given"), dict(chunks=3, order="random"),
    dict(epochs=2, restart="never"), dict(chunks=[["digest"], ["primer"], ["digest"]]), dict(probe=10, eval_share=0.2)])
def test_every_kind_of_run(tmp_path, settings):
    train(BASE, SOURCES, StepwiseConfig(**SETTINGS | settings), tmp_path / "run")
    found = verify(tmp_path / "run", SOURCES)
    assert differing(found) == []
    assert set(unchecked(found)) <= {"manifest", "held-out pairs"}
    if "probe" in settings:                                    # without the data, the chunks are not known whole
        alone = verify(tmp_path / "run")
        assert differing(alone) == [] and "pairs" in unchecked(alone) and "as far as" in alone.loc["held-out pairs", "note"]


def test_half_precision_on_disk(tmp_path):
    half = tmp_path / "half"
    save_model(load_model(BASE, "cpu"), load_tokenizer(BASE), half, torch.bfloat16)
    train(str(half), SOURCES, StepwiseConfig(**SETTINGS | dict(precision="bf16")), tmp_path / "run")
    found = verify(tmp_path / "run", SOURCES)
    assert differing(found) == [] and unchecked(found) == ["manifest", "held-out pairs"]
    assert read_part(tmp_path / "run/stage-2/stage.json")["saved"]["dtype"] == "bfloat16"


def test_chunks_that_a_function_makes(tmp_path):
    def makes(t, model): return rows("primer", 12, 12 * t) if t <= 2 else None
    train(BASE, None, StepwiseConfig(**SETTINGS, chunks=makes), tmp_path / "run", held_out=dict(aside=rows("riddle", 10)))
    found = verify(tmp_path / "run")
    assert differing(found) == [] and unchecked(found) == ["manifest", "pairs"]
    assert found.loc["M_2 asked again", "note"].startswith("24 pairs") # those of the two chunks that it has read
    assert verify(tmp_path / "run", dict(aside=rows("riddle", 10))).loc["data: held-out pairs", "result"] == OK


def test_a_loaded_model_and_a_reference_from_elsewhere(runs, tmp_path):
    config = StepwiseConfig(**SETTINGS, reference=str(runs / "good/stage-2/model"))
    train(load_model(BASE, "cpu"), SOURCES, config, tmp_path / "run", tokenizer=load_tokenizer(BASE))
    moved = shutil.move(tmp_path / "run", tmp_path / "moved")
    found = verify(moved, SOURCES)
    assert differing(found) == [] and unchecked(found) == ["manifest", "held-out pairs"]


def test_an_unfinished_run(good):
    shutil.rmtree(good / "stage-2")
    found = verify(good)
    assert "stages" in unchecked(found) and found.loc["stages", "note"] == "only 1 of 2 are finished"
    assert differing(found) == ["report.md"]                   # it was written after two stages


# ---- tampered ones

def better_accuracy(folder): change(folder, 2, accuracy=0.99)


def better_accuracy_in_the_report_too(folder):
    change(folder, 2, accuracy=0.99)
    Run(folder).report()


def foreign_weights(folder):
    shutil.rmtree(folder / "stage-2/model")
    shutil.copytree(BASE, folder / "stage-2/model")


def foreign_weights_and_their_hash(folder):
    foreign_weights(folder)
    saved = read_part(folder / "stage-2/stage.json")["saved"]
    change(folder, 2, saved=saved | dict(weights=read_part(folder / "config.yaml")["weights"]))


def cut_log(folder):
    path = folder / "stage-2/metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def half_a_line(folder):
    path = folder / "stage-2/metrics.jsonl"
    path.write_text(path.read_text()[:-30])


def lines_in_another_order(folder):
    path = folder / "stage-2/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "".join(lines[:0:-1]))


def another_first_loss(folder): change(folder, 1, first_loss=0.6)


def swapped_value(folder):
    key = read_part(folder / "stage-2/stage.json")["probes"]["primer" if "primer" == read_part(folder / "stage-2/stage.json")["chunk"] else "digest"][3]
    for path in (folder / "stage-2/logprobs").glob("*.parquet"):
        table = pd.read_parquet(path)
        if key in table.index: table.loc[key, ["chosen", "rejected"]] = table.loc[key, ["rejected", "chosen"]].to_numpy()
        table.to_parquet(path, write_page_checksum=True)


def held_out_pair_dropped(folder):
    path = folder / "held_out.json"
    held = read_part(path)
    held["primer"]["keys"].pop()
    for lengths in held["primer"]["lengths"].values(): lengths.pop()
    write_json(path, held)
    Run(folder).report()


def better_report(folder):
    path = folder / "report.md"
    said = read_part(folder / "stage-2/stage.json")["gamma"]
    text = path.read_text()
    assert f" {said:.3f} |" in text
    path.write_text(text.replace(f" {said:.3f} |", f" {said + 1:.3f} |"))


def better_answer_on_held_out_pairs(folder):
    path = folder / "report.md"
    line = next(line for line in path.read_text().splitlines() if line.startswith("| primer, after stage 2 |"))
    better = line.replace("| primer, after stage 2 | ", "| primer, after stage 2 | 1")
    path.write_text(path.read_text().replace(line, better))


@pytest.mark.parametrize("tamper, row", [
    (better_accuracy, "stage 2: numbers"), (better_accuracy_in_the_report_too, "stage 2: numbers"), (foreign_weights, "stage 2: weights"),
    (foreign_weights_and_their_hash, "stage 2: weights"),
    (cut_log, "stage 2: log"), (half_a_line, "stage 2: log"), (lines_in_another_order, "stage 2: numbers"), (another_first_loss, "stage 1: first loss"),
    (swapped_value, "stage 2: numbers"), (held_out_pair_dropped, "held-out pairs"), (better_report, "report.md"), (better_answer_on_held_out_pairs, "report.md")])
def test_each_tampering_is_found_once(good, tamper, row):
    tamper(good)
    assert differing(verify(good)) == [row]


def test_a_fixed_reference_that_is_said_to_move(runs, tmp_path):
    folder = shutil.copytree(runs / "fixed", tmp_path / "fixed")
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("reference: fixed", "reference: moving"))
    for t in (1, 2): change(folder, t, reference=f"M_{t-1}")
    write_again(folder)
    found = verify(folder)
    assert differing(found) == ["stage 2: reference"] and found.loc["stage 2: reference", "note"].endswith("that of M_0")


def test_a_swapped_pair_of_the_data(runs):
    other = [row | dict(chosen=row["rejected"], rejected=row["chosen"]) if i == 5 else row for i, row in enumerate(SOURCES["primer"])]
    found = verify(runs / "good", SOURCES | dict(primer=other))
    assert differing(found) == ["data: pairs"] and "M_0 asked again" not in found.index


def test_a_table_that_is_made_up_is_found_by_asking(good):
    for path in (good / "base/logprobs").glob("*.parquet"):
        table = pd.read_parquet(path)
        (table - [0.01, 0]).to_parquet(path, write_page_checksum=True)
    found = verify(good, SOURCES)
    assert "M_0 asked again" in differing(found) and "M_1 asked again" not in differing(found)


def test_a_missing_table_is_no_pass(good):
    shutil.rmtree(good / "stage-2/logprobs")
    assert {"stage 2: table", "stage 2: numbers"} <= set(differing(verify(good)))


@pytest.mark.parametrize("name, value", [("probes", []), ("reference_kind", "M_0"), ("pairs", "many"), ("gamma_change", 3), ("first_loss", None), ("start", {})])
def test_nonsense_in_a_stage_is_no_traceback(good, name, value):
    change(good, 2, **{name: value})
    assert differing(verify(good))


def test_what_may_not_be_read_is_not_checked(good, monkeypatch):
    "A file of another user is no forgery. Root may read it, so the right is taken away here."
    def denied(*a, **kw): raise PermissionError(13, "Permission denied", "model.safetensors")
    monkeypatch.setattr(logprobs.AutoModelForCausalLM, "from_pretrained", denied)
    monkeypatch.setattr(logprobs, "_is_pointer", denied)
    found = verify(good, SOURCES)
    assert differing(found) == []
    rows = ["S: weights", *(f"stage {t}: weights" for t in (1, 2)), *(f"M_{t} asked again" for t in (0, 1, 2))]
    assert set(rows) <= set(unchecked(found)) and "no right to read" in found.loc["stage 1: weights", "note"]

    (good / "stage-2/chunk").mkdir()
    monkeypatch.setattr(verify_module, "load_from_disk", denied)
    assert verify(good).loc["data", "result"] == NOT_CHECKED
    monkeypatch.setattr(logprobs.pd, "read_parquet", denied)
    assert differing(verify(good)) == []


def test_any_model_of_the_run_may_come_beside_it(runs, tmp_path):
    packed = pack_run(runs / "good", tmp_path / "a.zip")
    found = verify(packed, SOURCES, model=str(runs / "good/stage-2/model"))
    assert differing(found) == [] and found.loc["the model given", "note"] == "it is M_2"
    assert found.loc["M_2 asked again", "result"] == OK and found.loc["M_1 asked again", "result"] == NOT_CHECKED
    assert differing(verify(packed, SOURCES, model=str(runs / "fixed/stage-2/model"))) == ["the model given"]


# ---- zip and command line

def test_paths_may_begin_with_a_tilde(good, say, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert pack_run("~/good", "~/a.zip") == tmp_path / "a.zip" and not (tmp_path / "~").exists()
    shutil.copytree(BASE, tmp_path / "S")
    config = yaml.safe_load((good / "config.yaml").read_text())
    (good / "config.yaml").write_text(yaml.safe_dump(config | dict(model="~/S")))
    found = verify("~/good", model="~/S")
    assert found.loc["S: weights", "result"] == OK and found.loc["the model given", "note"] == "it is M_0"
    assert say("verify", "~/a.zip")[0] == 0


@pytest.fixture
def say(monkeypatch, capsys):
    "Run `sdpo ...` in this process: (exit status, stdout, stderr)."
    def call(*words):
        monkeypatch.delenv("SDPO_TRACEBACK", raising=False)
        capsys.readouterr()
        try: cli.main([str(word) for word in words]); status = 0
        except SystemExit as e: status = e.code or 0
        return status, *capsys.readouterr()
    return call


def rewritten(packed, out, name, text):
    "The zip with another content of one file; none takes it out."
    with zipfile.ZipFile(packed) as old, zipfile.ZipFile(out, "w") as new:
        for file in old.namelist():
            if file.endswith(name) and text is None: continue
            new.writestr(file, text if file.endswith(name) else old.read(file))
    return out


def test_the_zip_has_no_weights_and_no_lock(runs, tmp_path):
    folder = shutil.copytree(runs / "good", tmp_path / "good")
    for left in (".model.tmp", ".model.old.tmp"): shutil.copytree(folder / "stage-1" / "model", folder / "stage-1" / left) # by a kill
    with zipfile.ZipFile(pack_run(folder, tmp_path / "a.zip")) as z: names = z.namelist()
    assert not [name for name in names if ".tmp/" in name]
    assert not [name for name in names if "/model/" in name or "/checkpoint/" in name or name.endswith((".lock", ".tmp"))]
    assert {"good/MANIFEST.json", "good/config.yaml", "good/stage-2/metrics.jsonl", "good/report.md"} <= set(names)


@pytest.mark.parametrize("text", ["{}", None])
def test_a_changed_or_missing_file_is_found_by_the_manifest(runs, tmp_path, text):
    packed = pack_run(runs / "good", tmp_path / "a.zip")
    found = verify(rewritten(packed, tmp_path / "b.zip", "stage-1/cost.json", text))
    assert differing(found) == ["manifest"] + (["report.md"] if text else []) # a cost.json without costs makes no report
    assert "stage-1/cost.json" in found.loc["manifest", "note"]


def test_pack_and_verify_on_the_command_line(runs, good, say, tmp_path):
    status, out, err = say("pack", good)
    assert status == 0 and str(tmp_path / "good.zip") in out and "MB" in out, err
    status, out, err = say("verify", tmp_path / "good.zip")
    assert status == 0 and "0 DIFFERS" in out and "| stage 2: first loss | ok |" in out, err
    better_accuracy(good)
    status, out, err = say("verify", good)
    assert status == 1 and "1 DIFFERS" in out and "Traceback" not in err


@pytest.mark.parametrize("size", [0, 100, 5000, 60_000])
def test_a_cut_zip_is_one_line(runs, say, tmp_path, size):
    packed = pack_run(runs / "good", tmp_path / "a.zip")
    packed.write_bytes(packed.read_bytes()[:size])
    status, out, err = say("verify", packed)
    assert status == 2 and out == "" and err.count("\n") == 1 and "a.zip" in err


def test_a_damaged_zip_is_one_line(runs, say, tmp_path):
    packed = pack_run(runs / "good", tmp_path / "a.zip")
    data = bytearray(packed.read_bytes())
    for i in range(2000, 2050): data[i] ^= 0xff
    packed.write_bytes(data)
    status, out, err = say("verify", packed)
    assert status == 2 and out == "" and err.count("\n") == 1


def test_what_cannot_be_used_is_status_2(runs, say, tmp_path):
    (tmp_path / "text.txt").write_text("a run")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"): pass
    good, packed = runs / "good", pack_run(runs / "good", tmp_path / "a.zip")
    for words in (["verify", tmp_path / "none"], ["verify", tmp_path / "text.txt"], ["verify", tmp_path / "empty.zip"], ["verify", BASE], ["pack", tmp_path / "none"],
                  ["pack", BASE], ["pack", good, "--out", tmp_path], ["pack", good, "--out", tmp_path / "none/a.zip"], ["verify", good, "--sources", "primer=a.jsonl"],
                  ["verify", good, "--sources", "a=b", "primer=a.jsonl", "digest=b.jsonl"], ["verify", good, "--model", tmp_path / "none"],
                  ["verify", packed, "--sources", "primer=none.jsonl", "digest=none.jsonl"]):
        status, out, err = say(*words)
        assert status == 2 and out == "" and err.count("\n") == 1, (words, status, out, err)


def test_a_run_that_is_going_on_is_not_packed(good, tmp_path):
    from sdpo_nb.folder import alone_in
    with alone_in(good), pytest.raises(ValueError, match="another process"): pack_run(good)
    assert not (tmp_path / "good.zip").exists()


# ---- a loss of one's own

def ipo(c, r, rc, rr, beta, pairs): return ((c - r) - (rc - rr) - 1 / (2 * beta)) ** 2


def test_of_a_loss_of_its_own_only_the_first_loss_is_not_checked(tmp_path):
    settings = SETTINGS | dict(loss=ipo, lr=1e-4, schedule="cosine", order_by="gamma_per_token", eval_share=0.2)
    train(BASE, SOURCES, StepwiseConfig(**settings), tmp_path / "own")
    found = verify(tmp_path / "own", SOURCES)
    assert differing(found) == [] and unchecked(found) == ["manifest", "stage 1: first loss", "stage 2: first loss"]
    assert "ipo, which is not in the folder" in found.loc["stage 1: first loss", "note"]
    change(tmp_path / "own", 1, first_loss=0.6931)
    assert "stage 1: first loss" in differing(verify(tmp_path / "own"))       # the log says something else


def test_lengths_of_held_out_responses_are_checked(good):
    path = good / "held_out.json"
    held = read_part(path)
    held["primer"]["lengths"]["chosen"][0] += 5
    write_json(path, held)
    assert set(differing(verify(good, SOURCES))) == {"report.md", "data: held-out pairs"}
    held["primer"]["lengths"]["chosen"].pop()
    write_json(path, held)
    assert "report.md" in differing(verify(good, SOURCES))


# ---- what follows from the folder, whoever wrote the report anew

def set_in_config(folder, **values):
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(config | dict(settings=config["settings"] | values), sort_keys=False))


@pytest.mark.parametrize("values, row, note", [
    (dict(lr=5e-7), "stage 1: log", "learning rate"), (dict(warmup=0.9), "stage 1: log", "learning rate"), (dict(schedule="constant"), "stage 1: log", "learning rate"),
    (dict(chunks=1), "stages", "ask for 1"), (dict(chunks=5), "stages", "ask for 5"), (dict(order="hard_to_easy"), "stages", "hard_to_easy"), (dict(order="as_given"), "stages", "as_given"),
    (dict(precision="bf16"), "stage 1: first loss", "bf16, fp32"), (dict(lora_r=16), "stage 1: weights", "a whole model lies there")])
def test_a_setting_that_the_folder_contradicts(good, values, row, note):
    set_in_config(good, **values)
    write_again(good)
    found = verify(good)
    assert row in differing(found) and note in found.loc[row, "note"]
    assert {name.split(": ")[-1] for name in differing(found)} == {row.split(": ")[-1]}


def test_a_precision_that_only_the_stage_claims(good):
    change(good, 2, precision="bf16", first_loss=0.70)
    path = good / "stage-2/metrics.jsonl"
    first, *rest = map(json.loads, path.read_text().splitlines())
    path.write_text("".join(json.dumps(line) + "\n" for line in [first | dict(loss=0.70), *rest]))
    write_again(good)
    assert differing(verify(good)) == ["stage 2: first loss"]


def test_settings_that_no_run_has_are_named(good):
    for name, value in (("batch_size", 0), ("beta", "abc")):
        set_in_config(good, **{name: value})
        with pytest.raises(ValueError, match=f"config.yaml: cannot be used .{name}: must be"): verify(good)
        set_in_config(good, batch_size=SETTINGS["batch_size"])


def test_a_cut_line_of_a_log_is_named(good):
    half_a_line(good)
    assert verify(good).loc["stage 2: log", "note"] == "stage-2/metrics.jsonl: line 3 is cut or damaged"


@pytest.mark.parametrize("old, new", [
    ("| reference | M_0 | M_1 |", "| reference | M_0 | M_0 |"), ("| pairs | 19 |", "| pairs | 1900 |"), ("| usable | 24 |", "| usable | 2400 |"), ("| beta | ", "| beta | 1"),
    ("in 2 stages", "in 30 stages"), ("## Signs of failure\n", "## Signs of failure\n\nNone that matters.\n"), ("primer (", "primer (1"),
    ("\n| primer, after stage 2 |", "\n| primer, after stage 3 | 9.999 |\n| primer, after stage 2 |")])
def test_a_line_that_the_report_would_not_have(good, old, new):
    path = good / "report.md"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert differing(verify(good)) == ["report.md"]


def test_a_shorter_report_is_not_checked_and_one_in_another_order_differs(good):
    path = good / "report.md"
    before, after = path.read_text().split("## Answers")
    path.write_text(before)
    assert differing(verify(good)) == [] and "report.md" in unchecked(verify(good))
    path.write_text("## Answers" + after + before)
    assert differing(verify(good)) == ["report.md"]


def test_a_table_without_what_was_forgotten(good):
    first = read_part(good / "stage-1/stage.json")
    for path in (good / "stage-2/logprobs").glob("*.parquet"):
        table = pd.read_parquet(path)
        table.drop(index=[key for key in first["probes"][first["chunk"]] if key in table.index]).to_parquet(path, write_page_checksum=True)
    found = verify(good)
    assert "stage 2: table" in differing(found) and found.loc["stage 2: table", "note"].startswith("19 pairs")


def test_held_out_parts_under_each_others_name(good):
    path = good / "held_out.json"
    held = read_part(path)
    held["primer"], held["digest"] = held["digest"], held["primer"]
    write_json(path, held)
    config = good / "config.yaml"
    said = read_part(config)["held_out_pairs"]
    config.write_text(config.read_text().replace(said, pairs_hash([dict(key=key) for part in held.values() for key in part["keys"]])))
    write_again(good)
    assert differing(verify(good, SOURCES)) == ["data: held-out pairs"]


def test_probes_are_those_that_a_run_draws_for_every_chunk(good):
    stage = read_part(good / "stage-2/stage.json")
    first = read_part(good / "stage-1/stage.json")["chunk"]
    change(good, 2, probes=stage["probes"] | {first: stage["probes"][first][:-2]})
    write_again(good)
    assert differing(verify(good)) == ["stage 2: numbers"]


def test_what_says_how_weights_are_used(good):
    path = good / "stage-2/model/config.json"
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | dict(rms_norm_eps=0.1)))
    assert differing(verify(good)) == ["stage 2: weights"]
    path.write_text(whole)
    (good / "stage-2/model/chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert differing(verify(good)) == ["stage 2: weights"]


def test_another_model_where_S_lay_is_no_fault_of_the_run(runs, tmp_path, monkeypatch):
    folder = shutil.copytree(runs / "good", tmp_path / "good")
    shutil.copytree(folder / "stage-2/model", tmp_path / "S")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | dict(model="S"), sort_keys=False))
    write_again(folder)
    monkeypatch.chdir(tmp_path)
    found = verify(folder, SOURCES)
    assert differing(found) == [] and str(tmp_path / "S") in found.loc["S: weights", "note"] and found.loc["data: pairs", "result"] == OK


def test_what_lies_beside_a_run_is_not_taken_away(good, tmp_path):
    (tmp_path / "good.tmp").mkdir()
    pack_run(good)
    assert (tmp_path / "good.tmp").is_dir()
