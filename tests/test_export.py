"What `sdpo partition --export` writes: the rows of the run and no others, in the order of training, as TRL reads them."
import json

import pytest
from datasets import load_dataset

import sdpo_nb.stepwise as stepwise
from sdpo_nb.logprobs import load_model, load_tokenizer, write_lines
from sdpo_nb.plan import StepwiseConfig
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.stepwise import Run, export_chunks, sdpo, sdpo_partition
from sdpo_nb.trainer import epoch_order
from sdpo_nb.world import load_world
from tiny import SETTINGS, rows, write_jsonl

BASE = load_world().base
EMPTY = rows("primer", 1)[0] | dict(rejected=[{"role": "assistant", "content": ""}])


def plain(r): return dict(prompt=r["prompt"][0]["content"], chosen=" " + r["chosen"][0]["content"], rejected=" " + r["rejected"][0]["content"])
def lines(path): return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
def as_text(row): return json.dumps({k: row[k] for k in ("prompt", "chosen", "rejected")}, sort_keys=True, ensure_ascii=False)


def config(**kw): return StepwiseConfig(**SETTINGS | kw)


def test_rows_as_they_were_without_those_dropped_and_held_out(tmp_path):
    "Conversational rows, one of them empty, some held out; columns that sdpo does not know are not in the file."
    data = [r | dict(id=i, note="x") for i, r in enumerate(rows("primer", 20))]
    data[7] = EMPTY | dict(id=7, note="x")
    path = write_jsonl(tmp_path / "a.jsonl", data)
    run = sdpo_partition(BASE, dict(a=str(path), b=rows("riddle", 9)), config(eval_share=0.3), tmp_path / "run")
    sources = dict(b=rows("riddle", 9), a=str(path))                       # in another order
    files = export_chunks(run, tmp_path / "out", sources)
    assert [f.name for f in files] == ["chunk-1.jsonl", "chunk-2.jsonl"]
    held = json.loads((run.folder / "held_out.json").read_text())
    known = {as_text(r): n for n, rs in dict(a=data, b=rows("riddle", 9)).items() for r in rs}
    names = json.loads((run.folder / "partition.json").read_text())["names"]
    for name, file in zip(names, files):
        found = [as_text(row) for row in lines(file)]
        assert all(set(row) == {"prompt", "chosen", "rejected"} for row in lines(file))
        assert all(known[row] == name for row in found) and as_text(data[7]) not in found
        usable = (19 if name == "a" else 9) - len(held[name]["keys"])
        assert len(found) == usable and 0 < usable < 19
        keys = tokenize_pairs(load_pairs(str(file)), load_tokenizer(BASE), max_length=64, max_prompt_length=32).pairs["key"]
        assert not set(keys) & set(held[name]["keys"])


@pytest.mark.parametrize("how", ["conversational", "plain", "chat"])
@pytest.mark.parametrize("order", ["easy_to_hard", "random"])
def test_the_batches_of_the_run(tmp_path, order, how):
    "Read from top to bottom, a file has the batches of the stage: trained on without shuffling, it gives the same steps."
    data = [rows("primer", 12) + [EMPTY], rows("digest", 11)]
    if how != "conversational": data = [[plain(r) for r in some] for some in data]
    sources = {n: dict(source=some, chat=how == "chat") for n, some in zip("ab", data)}
    run = sdpo(BASE, sources, config(order=order), tmp_path / "run")
    files = export_chunks(run, tmp_path / "out", sources)
    as_given = {f"c{t}": str(f) for t, f in enumerate(files, 1)}
    again = sdpo(BASE, as_given, config(order="as_given", shuffle=False), tmp_path / "again")
    assert again.metrics["tokens"].tolist() == run.metrics["tokens"].tolist() and len(run.metrics) == 4
    for column in ("loss", "logratio_chosen", "logratio_rejected"):
        assert again.metrics[column].tolist() == pytest.approx(run.metrics[column].tolist(), abs=1e-3)
    assert isinstance(lines(files[0])[0]["prompt"], str) == (how == "plain")


def test_columns_system_and_earlier_turns(tmp_path):
    "Renamed columns have the name that TRL knows; a system message and earlier turns stand in the prompt."
    r = rows("primer", 4)
    data = [dict(system="be brief", question=x["prompt"][0]["content"], chosen=x["chosen"][0]["content"], rejected=x["rejected"][0]["content"]) for x in r]
    path = write_jsonl(tmp_path / "a.jsonl", data)
    source = dict(source=str(path), columns={"question": "prompt"})
    run = sdpo_partition(BASE, dict(a=source), config(), tmp_path / "run")
    file, = export_chunks(run, tmp_path / "out")
    for row in lines(file):
        assert set(row) == {"prompt", "chosen", "rejected"}
        assert [m["role"] for m in row["prompt"]] == ["system", "user"] and row["prompt"][0]["content"] == "be brief"
        asked = [x for x in data if x["question"] == row["prompt"][1]["content"] and x["chosen"] == row["chosen"][0]["content"]]
        assert asked and row["chosen"] == [dict(role="assistant", content=asked[0]["chosen"])]


def test_groups_of_sources_and_parts(tmp_path):
    sources = {n: rows(n, 6) for n in ("primer", "digest", "riddle")}
    run = sdpo_partition(BASE, sources, config(chunks=["riddle", ["primer", "digest"]]), tmp_path / "run")
    files = export_chunks(run, tmp_path / "out", sources)
    assert sorted(map(as_text, lines(files[0]))) == sorted(map(as_text, sources["riddle"]))
    assert sorted(map(as_text, lines(files[1]))) == sorted(map(as_text, sources["primer"] + sources["digest"]))
    run = sdpo_partition(BASE, sources, config(chunks=4), tmp_path / "parts")
    with pytest.raises(ValueError, match="out/chunk-|other chunks") as e:
        (tmp_path / "out" / "chunk-9.jsonl").write_text("")
        export_chunks(run, tmp_path / "out", sources)
    assert "chunk-9.jsonl" in str(e.value)
    files = export_chunks(run, tmp_path / "four", sources)
    assert [len(lines(f)) for f in files] == [5, 5, 4, 4]


def test_what_cannot_be_written_is_said(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows("primer", 8))
    run = sdpo_partition(BASE, dict(a=str(path)), config(), tmp_path / "run")
    write_jsonl(path, rows("primer", 8, start=3))
    with pytest.raises(ValueError, match="give other pairs now"): export_chunks(run, tmp_path / "out")
    with pytest.raises(ValueError, match="the run has a, and b are given"): export_chunks(run, tmp_path / "out", dict(b=str(path)))
    with pytest.raises(ValueError, match="sources: expected {'name': data}, got \\['a'\\]"): export_chunks(run, tmp_path / "out", ["a"])
    memory = sdpo_partition(BASE, dict(a=rows("primer", 8)), config(), tmp_path / "memory")
    with pytest.raises(ValueError, match="give the sources"): export_chunks(memory, tmp_path / "out")
    made = sdpo(BASE, None, config(chunks=lambda t, model: rows("primer", 8) if t == 1 else None), tmp_path / "made")
    with pytest.raises(ValueError, match="partition.json"): export_chunks(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_after_the_run_was_moved(tmp_path, monkeypatch):
    "config.yaml names base/model as the run was called; its tokenizer lies in the folder."
    monkeypatch.chdir(tmp_path)
    sources = dict(a=rows("primer", 6))
    sdpo_partition(load_model(BASE), sources, config(), "runs/a", tokenizer=load_tokenizer(BASE))
    moved = Run((tmp_path / "runs/a").rename(tmp_path / "runs/b"))
    assert len(lines(export_chunks(moved, "out", sources)[0])) == 6 and moved.model_folder(0) == tmp_path / "runs/b/base/model"
    (tmp_path / "named/base/model").mkdir(parents=True)                     # as a refused call with a loaded model leaves it
    assert str(sdpo_partition(BASE, sources, config(), tmp_path / "named").model_folder(0)) == BASE


def test_a_tokenizer_of_ones_own(tmp_path):
    own = load_tokenizer(BASE)
    own.chat_template = own.chat_template.replace("{{", '{{ "a" }}{{', 1)
    sources = dict(a=rows("primer", 6))
    run = sdpo_partition(BASE, sources, config(), tmp_path / "run", tokenizer=own)
    with pytest.raises(ValueError, match="or its tokenizer"): export_chunks(run, tmp_path / "out", sources)
    assert len(lines(export_chunks(run, tmp_path / "out", sources, tokenizer=own)[0])) == 6


def test_a_call_that_dies_leaves_no_mix_of_two_exports(tmp_path, monkeypatch):
    sources = {n: rows(n, 6) for n in ("primer", "digest")}
    run = sdpo_partition(BASE, sources, config(), tmp_path / "run")
    export_chunks(run, tmp_path / "out", sources)
    def dies(path, rows):
        if path.name == "chunk-2.jsonl": raise KeyboardInterrupt
        write_lines(path, rows)
    monkeypatch.setattr(stepwise, "write_lines", dies)
    with pytest.raises(KeyboardInterrupt): export_chunks(run, tmp_path / "out", sources)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["chunk-1.jsonl"]


def with_history(r):
    "A row as some data sets have it: system message, earlier turns, and the prompt as a string."
    earlier = [dict(role="user", content="copy ab"), dict(role="assistant", content="ab")]
    return dict(system="be brief", messages=earlier, prompt=r["prompt"][0]["content"], chosen=r["chosen"][0]["content"], rejected=r["rejected"][0]["content"])


@pytest.mark.parametrize("how", ["conversational", "plain", "history"])
def test_trl_reads_it(tmp_path, how):
    "TRL's own preparation of the file gives the token ids that the stage trains on, pair by pair."
    pytest.importorskip("trl", reason="TRL is not installed here")
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer
    as_asked = dict(conversational=dict, plain=plain, history=with_history)[how]
    data = [as_asked(r) for r in rows("primer", 10)]
    run = sdpo_partition(BASE, dict(a=data), config(), tmp_path / "run")
    file, = export_chunks(run, tmp_path / "out", dict(a=data))
    tok = load_tokenizer(BASE)
    args = DPOConfig(output_dir=str(tmp_path / "trl"), max_length=64, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
    read = load_dataset("json", data_files=str(file), split="train")
    assert read.column_names == ["prompt", "chosen", "rejected"]
    trainer = DPOTrainer(model=AutoModelForCausalLM.from_pretrained(BASE), args=args, train_dataset=read, processing_class=tok)
    order = epoch_order(10, 0, 1, 0)
    trained_on = tokenize_pairs(load_pairs(data), tok, "a", 64, 63).pairs.select(order)     # from the source, not from the file
    pairs = tokenize_pairs(load_pairs(str(file)), tok, "a", 64, 63).pairs
    assert pairs["key"][:] == trained_on["key"][:]
    fields = ("prompt_ids", "chosen_ids", "rejected_ids")
    assert [[list(p[k]) for k in fields] for p in trainer.train_dataset] == [[p[k] for k in fields] for p in pairs]
    assert len(pairs) == 10


@pytest.mark.parametrize("held", [False, True], ids=["trained on", "held out"])
def test_no_source_of_the_run_is_overwritten(tmp_path, monkeypatch, held):
    "Neither a source file nor what lies in a source folder, also where the chunk is written through a link."
    out = tmp_path / "out"; out.mkdir()
    path = write_jsonl(out / "chunk-1.jsonl", [r | dict(id=i) for i, r in enumerate(rows("primer", 8))])
    before = path.read_text()
    mine = dict(a=rows("riddle", 8)) if held else dict(a=str(path))
    run = sdpo_partition(BASE, mine, config(), tmp_path / "run", held_out=dict(b=str(path)) if held else None)
    (tmp_path / "link").symlink_to(out)
    for place in (out, tmp_path / "link"):
        with pytest.raises(ValueError, match=f"^{place}/chunk-1.jsonl: is source '[ab]' or lies in its folder"): export_chunks(run, place, mine)
    folder = sdpo_partition(BASE, dict(a=dict(source=str(out))), config(), tmp_path / "folder")
    (out / "new").mkdir()
    with pytest.raises(ValueError, match="lies in its folder"): export_chunks(folder, out / "new")
    assert path.read_text() == before
