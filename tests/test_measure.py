"What `sdpo measure` says of models from anywhere: the numbers of a plain forward pass, paired with the first model."
import sys
from pathlib import Path

import pytest
import torch

from sdpo_nb import cli, stepwise
from sdpo_nb.folder import load_any, load_saved_tokenizer
from sdpo_nb.logprobs import load_model, load_tokenizer, response_logprobs
from sdpo_nb.partition import mean_interval
from sdpo_nb.plan import StepwiseConfig
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.stepwise import changes_of, measure_models
from sdpo_nb.world import load_world
from tiny import perturbed, rows, write_jsonl

BASE = load_world().base
FP32 = StepwiseConfig(precision="fp32")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    "A model that is no run's, saved as any trainer saves it."
    folder = tmp_path_factory.mktemp("other")
    perturbed(load_model(BASE, "cpu")).save_pretrained(folder)
    load_tokenizer(BASE).save_pretrained(folder)
    return folder


def test_numbers_are_those_of_a_plain_pass(tmp_path, other):
    sources = dict(a=rows("primer", 30), b=rows("riddle", 20))
    got = measure_models(dict(S=BASE, theirs=other), sources, FP32, tmp_path)
    assert got.index.tolist() == [("a", "S"), ("a", "theirs"), ("b", "S"), ("b", "theirs")]
    for name, data in sources.items():
        pairs = list(tokenize_pairs(load_pairs(data), load_tokenizer(BASE)).pairs)
        def gamma(place):
            with torch.no_grad(): chosen, rejected = response_logprobs(load_model(place, "cpu"), pairs)
            return chosen - rejected
        before, after = gamma(BASE), gamma(other)
        mine = got.loc[(name, "theirs")]
        assert mine["pairs"] == len(data)
        assert mine["gamma"] == pytest.approx(mean_interval(after), abs=1e-4)
        assert mine["change of gamma"] == pytest.approx(mean_interval(after - before), abs=1e-4)
        assert mine["prefers chosen"][0] == pytest.approx((after > 0).float().mean().item())
        assert mine["reward accuracy"][0] == pytest.approx((after > before).float().mean().item())
        assert (after - before).abs().mean() > 0.05, "two models that say the same show nothing"
        assert got.loc[(name, "S"), "change of gamma"] is None
    change = changes_of(got)
    assert change["model"].tolist() == ["theirs"] * 2 and change["mean"][1] == got.loc[("b", "theirs"), "change of gamma"][0]


def test_a_killed_call_goes_on(tmp_path, other, monkeypatch):
    models, sources, read = dict(S=BASE, theirs=other), dict(a=rows("primer", 12)), []
    true = stepwise.Context.score_to
    def counted(self, folder, *a, **kw):
        read.append(Path(folder).name)
        if len(read) == 2: raise KeyboardInterrupt
        return true(self, folder, *a, **kw)
    monkeypatch.setattr(stepwise.Context, "score_to", counted)
    with pytest.raises(KeyboardInterrupt): measure_models(models, sources, FP32, tmp_path)
    first = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet")}
    assert len(first) == 1
    measure_models(models, sources, FP32, tmp_path)
    now = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet")}
    assert first.items() <= now.items() and len(now) == 2
    measure_models(dict(theirs=other, S=BASE), sources, FP32, tmp_path)          # another order: nothing is read again
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet")} == now


def test_another_vocabulary_is_refused(tmp_path, other):
    tok = load_tokenizer(BASE)
    wider = tmp_path / "wider"
    load_model(BASE, "cpu").save_pretrained(wider)
    tok.add_tokens(["zebra"]); tok.save_pretrained(wider)
    with pytest.raises(ValueError, match="'S' has another vocabulary than 'wider': 1 tokens"):
        measure_models(dict(wider=wider, S=BASE), dict(a=rows("primer", 8)), FP32, tmp_path / "m")
    for none, said in (({}, "models: none"), ([BASE], "models: \\['.*expected {'name'")):
        with pytest.raises(ValueError, match=said): measure_models(none, dict(a=rows("primer", 8)), FP32, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_nothing_is_held_out(tmp_path):
    "The sources or the settings of a run: its training pairs would count among the held-out ones."
    part, half = dict(a=dict(source=rows("primer", 12), eval_share=0.5)), StepwiseConfig(precision="fp32", eval_share=0.5)
    for sources, config in ((part, FP32), (dict(a=rows("primer", 12)), half)):
        with pytest.raises(ValueError, match="^eval_share: every pair"): measure_models(dict(S=BASE), sources, config, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["sdpo", *map(str, words)])
    try: cli.main(); status = 0
    except SystemExit as e: status = e.code
    return status, *capsys.readouterr()


def test_the_command(tmp_path, other, monkeypatch, capsys):
    a = write_jsonl(tmp_path / "a.jsonl", [dict(question=r["prompt"], chosen=r["chosen"], rejected=r["rejected"]) for r in rows("primer", 12)])
    words = ["measure", "--models", f"S={BASE}", other, "--sources", a, "--columns", "question=prompt", "--folder", tmp_path / "m", "--precision", "fp32"]
    status, out, err = call(monkeypatch, capsys, *words)
    assert status == 0, err
    table = (tmp_path / "m" / "measure.md").read_text()
    assert table in out and f"| a, {other} | 12 |" in table and "| a, S | 12 |" in table
    assert (tmp_path / "m" / "measure.png").stat().st_size > 5000
    status, out, err = call(monkeypatch, capsys, *words[:2], f"S={BASE}", "S=x", *words[4:])
    assert status == 2 and "--models: 'S' is given twice" in err
    status, out, err = call(monkeypatch, capsys, *words, "--beta", "1")
    assert status == 2 and "--beta" in err
    status, out, err = call(monkeypatch, capsys, *words[:3], tmp_path / "nowhere", *words[4:])
    assert status == 2 and "nowhere" in err and err.count("\n") == 1


def test_an_adapter_is_its_merged_model(tmp_path, monkeypatch):
    "As PEFT saves it: a folder with an adapter, no tokenizer, and the name of its base."
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(load_model(BASE, "cpu"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    load_tokenizer(BASE).save_pretrained(tmp_path / "merged")
    monkeypatch.setenv("HOME", str(tmp_path))
    models = dict(S=BASE, adapter="~/adapter", merged="~/merged")
    got = measure_models(models, dict(a=rows("primer", 12)), FP32, tmp_path / "tables")
    assert got.loc[("a", "adapter"), "gamma"] == pytest.approx(got.loc[("a", "merged"), "gamma"], abs=1e-4)
    assert abs(got.loc[("a", "adapter"), "change of gamma"][0]) > 0.01, "the adapter changed nothing"

    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"base_model_name_or_path": "{BASE}"', '"base_model_name_or_path": null'))
    with pytest.raises(ValueError, match="does not name its base"): measure_models(models, dict(a=rows("primer", 12)), FP32, tmp_path / "tables")
    for damaged in ("{", "[1]"):
        config.write_text(damaged)
        for load in (load_any, load_saved_tokenizer):
            with pytest.raises(ValueError, match=r"adapter_config.json: cannot be used \(.+\); put it back, or make it again"): load("~/adapter")
