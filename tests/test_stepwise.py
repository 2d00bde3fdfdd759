"What the paper's experiments turn on: the order of the chunks, which model is the reference, what a stage starts from, and how chunks are given."
import functools, json, math, shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch, yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import sdpo_nb.report as report, sdpo_nb.plan as plan, sdpo_nb.stages as stages, sdpo_nb.stepwise as stepwise, sdpo_nb.trainer as trainer
from sdpo_nb import cli
from sdpo_nb.logprobs import load_model, load_tokenizer, read_table, response_logprobs, score_pairs, weights_hash
from sdpo_nb.packing import packed_logprobs
from sdpo_nb.preferences import Source, load_pairs, tokenize_pairs
from sdpo_nb.stepwise import Run, StepwiseConfig, sdpo_partition, sdpo
from sdpo_nb.trainer import GIB, as_line, plan_for, share_of_responses, train_stage
from sdpo_nb.world import load_base, load_world
from tiny import SETTINGS, gammas, metrics, perturbed, rows, write_jsonl

BASE, LN2 = load_world().base, math.log(2)
SOURCES = {"digest": rows("digest", 16), "riddle": rows("riddle", 8), "primer": rows("primer", 24)}   # neither order given is an order of difficulty
TWO = {"primer": rows("primer", 24), "digest": rows("digest", 24)}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch): monkeypatch.setattr(report, "write_report", lambda run: None)   # most of the time of a small run


@pytest.fixture
def trained(monkeypatch):
    "The keys of the pairs that every stage was trained on, in order."
    seen, real = [], stages.train_stage
    def spy(model, pairs, *args, **kw):
        seen.append([p["key"] for p in pairs])
        return real(model, pairs, *args, **kw)
    monkeypatch.setattr(stages, "train_stage", spy)
    return seen


def run(folder, sources=TWO, **settings): return sdpo(BASE, None if callable(settings.get("chunks")) else sources, StepwiseConfig(**SETTINGS | settings), folder)


def tokenised(data, name="x"): return tokenize_pairs(load_pairs(data), AutoTokenizer.from_pretrained(BASE), name, 64, 32).pairs


def keys(data): return tokenised(data)["key"][:]


@pytest.fixture(scope="module")
def accuracy():
    "Share of pairs that S gets right, by source, from nothing but log-probabilities."
    S, out = load_model(BASE), {}
    for name, data in SOURCES.items():
        with torch.no_grad(): chosen, rejected = response_logprobs(S, list(tokenised(data)))
        out[name] = (chosen > rejected).float().mean().item()
    assert len(set(out.values())) == 3
    return out


# ---- order

@pytest.mark.parametrize("order", ["easy_to_hard", "hard_to_easy", "as_given"])
def test_order(tmp_path, trained, accuracy, order):
    got = run(tmp_path / "run", SOURCES, order=order)
    want = dict(as_given=list(SOURCES), easy_to_hard=sorted(SOURCES, key=lambda n: -accuracy[n]), hard_to_easy=sorted(SOURCES, key=accuracy.get))[order]
    assert [s["chunk"] for s in got.stages] == want == json.loads((tmp_path / "run" / "partition.json").read_text())["names"]
    assert trained == [keys(SOURCES[n]) for n in want]
    assert got.partition()["accuracy"].to_dict() == pytest.approx(accuracy, abs=1e-6)
    for t, n in enumerate(want, 1): assert sum(m["pairs"] for m in metrics(tmp_path / "run" / f"stage-{t}")) == len(SOURCES[n])


def test_orders_differ():
    "Or the tests above would not tell them apart."
    S = load_model(BASE)
    right = {n: (score_pairs(S, tokenised(d)).gamma(list(tokenised(d))) > 0).float().mean().item() for n, d in SOURCES.items()}
    easy = sorted(SOURCES, key=lambda n: -right[n])
    assert list(SOURCES) not in (easy, easy[::-1])


def test_random_order_has_the_sizes_of_the_ordered_one(tmp_path, trained, accuracy):
    run(tmp_path / "a", SOURCES, order="random")
    everything = [k for d in SOURCES.values() for k in keys(d)]
    assert [len(c) for c in trained] == [len(SOURCES[n]) for n in sorted(SOURCES, key=lambda n: -accuracy[n])]
    assert sorted(k for c in trained for k in c) == sorted(everything)
    for chunk in trained: assert sum(bool(set(chunk) & set(keys(d))) for d in SOURCES.values()) > 1, "a random chunk holds a single source"
    def drawn(folder, seed):
        sdpo_partition(BASE, SOURCES, StepwiseConfig(**SETTINGS, order="random", seed=seed), folder)
        return json.loads((folder / "partition.json").read_text())["chunks"]
    assert drawn(tmp_path / "b", 0) == drawn(tmp_path / "c", 0) != drawn(tmp_path / "d", 1)


def test_shuffle_off_keeps_the_order_of_the_chunk(tmp_path, monkeypatch):
    seen = []
    def spy(model, pairs):
        if model.training: seen.extend(p["key"] for p in pairs)
        return response_logprobs(model, pairs)
    one = {"primer": TWO["primer"]}
    sdpo(BASE, one, StepwiseConfig(**SETTINGS | dict(batch_size=1), shuffle=False), tmp_path / "a", logprobs=spy)
    assert seen == keys(TWO["primer"])
    seen.clear()
    sdpo(BASE, one, StepwiseConfig(**SETTINGS | dict(batch_size=1), epochs=2), tmp_path / "b", logprobs=spy)
    first, second = seen[:24], seen[24:]
    assert sorted(first) == sorted(second) == sorted(keys(TWO["primer"])) and first != second and keys(TWO["primer"]) not in (first, second)


# ---- reference and start

WHOLE = dict(batch_size=24, token_budget=250, epochs=3) # the first batch is the whole chunk, so the first loss is a mean over it


@pytest.fixture(scope="module")
def S_hash(): return weights_hash(load_model(BASE))


def implied(theta, ref, of, beta=0.1):
    "E softplus(-beta (gamma_theta - gamma_ref)) over a chunk, from two tables on disk."
    a, b = (torch.tensor(gammas(folder).loc[of].to_numpy()) for folder in (theta, ref))
    return torch.log1p(torch.exp(-beta * (a - b))).mean().item()


def chunk_of(got, t): return keys(TWO[got.stages[t-1]["chunk"]])


def test_moving_reference(tmp_path, S_hash):
    got = run(tmp_path / "run", **WHOLE); one, two = got.stages
    assert one["start"] == one["reference_kind"]["weights"] == S_hash
    assert two["start"] == two["reference_kind"]["weights"] == one["end"] != S_hash and two["end"] not in (one["end"], S_hash)
    assert (one["reference"], two["reference"]) == ("M_0", "M_1")
    for s in got.stages: assert abs(s["first_loss"] - LN2) < 1e-5
    for t in (1, 2): assert weights_hash(load_model(str(got.model_folder(t)))) == got.stages[t-1]["end"]
    assert metrics(tmp_path / "run" / "stage-2")[-1]["loss"] < LN2


def test_each_stage_starts_from_the_base(tmp_path, S_hash):
    "init_target='S': the reference moves up, the target does not; the first loss tells."
    got = run(tmp_path / "run", init_target="S", beta=0.5, **WHOLE); one, two = got.stages; folder = tmp_path / "run"
    assert two["start"] == S_hash and two["reference_kind"]["weights"] == one["end"] != S_hash
    want = implied(folder / "base" / "logprobs", folder / "stage-1" / "logprobs", chunk_of(got, 2), 0.5)
    assert abs(two["first_loss"] - want) < 1e-4 and abs(want - LN2) > 1e-2 and abs(one["first_loss"] - LN2) < 1e-5
    assert abs(metrics(folder / "stage-2")[0]["loss"] - want) < 1e-4


@pytest.mark.parametrize("made", [False, True])
def test_what_a_stage_changed_is_counted_from_where_it_starts(tmp_path, made):
    "From S, also where S has not read the pairs before, since a function made them."
    data = list(TWO.values())
    chunks = (lambda t, model: data[t-1] if t <= 2 else None) if made else ["primer", "digest"]
    got = run(tmp_path / "run", init_target="S", chunks=chunks)
    S, M_2 = (gammas(got.folder / f / "logprobs").loc[keys(data[1])] for f in ("base", "stage-2"))
    assert got.stages[1]["gamma_change"][0] == pytest.approx((M_2 - S).mean(), abs=1e-4)
    assert got.table().loc["accuracy of S on D_t", "stage 2"] == round((S > 0).mean(), 3)
    assert "accuracy of M_t-1 on D_t" not in got.table().index


def test_fixed_reference(tmp_path, S_hash):
    got = run(tmp_path / "run", reference="fixed", beta=0.5, **WHOLE); one, two = got.stages; folder = tmp_path / "run"
    assert two["reference_kind"]["weights"] == S_hash and two["start"] == one["end"] != S_hash
    want = implied(folder / "stage-1" / "logprobs", folder / "base" / "logprobs", chunk_of(got, 2), 0.5)
    assert abs(two["first_loss"] - want) < 1e-4 and abs(want - LN2) > 1e-2
    moving = run(tmp_path / "moving", beta=0.5, **WHOLE).stages
    assert moving[0]["end"] == one["end"] and moving[1]["end"] != two["end"], "stage 1 is the same, stage 2 is not"


def test_fixed_reference_and_base_start_is_dpo_on_the_last_chunk(tmp_path, S_hash):
    "Nothing is left of stage 1: stage 2 equals DPO on its chunk alone, but for the stage's number in the data order."
    got = run(tmp_path / "run", reference="fixed", init_target="S", shuffle=False, **WHOLE)
    name = got.stages[1]["chunk"]
    alone = run(tmp_path / "alone", {name: TWO[name]}, shuffle=False, **WHOLE)
    assert got.stages[1]["end"] == alone.stages[0]["end"] and got.stages[1]["start"] == S_hash


def test_a_folder_as_reference(tmp_path, S_hash):
    S, tok = load_base(load_world())
    other = perturbed(S); other.save_pretrained(tmp_path / "other"); tok.save_pretrained(tmp_path / "other")
    theirs = weights_hash(other)
    got = run(tmp_path / "run", reference=str(tmp_path / "other"), beta=0.5, **WHOLE)
    assert [s["reference_kind"]["weights"] for s in got.stages] == [theirs, theirs] and theirs != S_hash
    assert got.stages[0]["start"] == S_hash and got.stages[1]["start"] == got.stages[0]["end"]
    for t, theta in ((1, "base"), (2, "stage-1")):
        pairs = list(tokenised(TWO[got.stages[t-1]["chunk"]]))
        ref = score_pairs(load_model(str(tmp_path / "other")), pairs).gamma(pairs).double()
        mine = torch.tensor(gammas(tmp_path / "run" / theta / "logprobs").loc[[p["key"] for p in pairs]].to_numpy()).double()
        want = torch.log1p(torch.exp(-0.5 * (mine - ref))).mean().item()
        assert abs(got.stages[t-1]["first_loss"] - want) < 1e-4 and abs(want - LN2) > 1e-3


@pytest.fixture
def other(tmp_path):
    "The folder of another model with the same tokenizer."
    S, tok = load_base(load_world())
    perturbed(S).save_pretrained(tmp_path / "other"); tok.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_a_reference_with_another_vocabulary(tmp_path, other):
    "Our ids would be other texts to it, and its log-probabilities finite nonsense."
    path = other / "tokenizer.json"; data = json.loads(path.read_text()); vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="reference.*vocabulary.*'a'"): run(tmp_path / "run", reference=str(other))
    for p in other.glob("tokenizer*"): p.unlink()
    with pytest.raises(ValueError, match="reference.*(tokenizer|vocabulary)"): run(tmp_path / "run", reference=str(other))
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("size, said", [(dict(n_positions=16), "has 16 positions"), (dict(vocab_size=20), "the embedding has 20 rows")])
def test_a_reference_without_room(tmp_path, size, said):
    from transformers import GPT2Config, GPT2LMHeadModel
    tok = load_tokenizer(BASE)
    GPT2LMHeadModel(GPT2Config(**dict(vocab_size=len(tok), n_positions=64, n_embd=16, n_layer=1, n_head=2) | size)).save_pretrained(tmp_path / "small")
    tok.save_pretrained(tmp_path / "small"); small = str(tmp_path / "small")
    with pytest.raises(ValueError, match=f"^reference: {small}: .*{said}"): run(tmp_path / "run", reference=small)
    assert not (tmp_path / "run" / "config.yaml").exists()
    with pytest.raises(ValueError, match=said): run(tmp_path / "made", chunks=lambda t, model: rows("primer", 8), reference=small)


def test_the_guard_looks_at_a_reference_from_elsewhere(tmp_path, other, monkeypatch):
    "One of the class of S may have a config with which it cannot be packed."
    asked, real = [], stages.choose_logprobs
    def spy(model, *args):
        asked.append(weights_hash(model))
        return real(model, *args)
    monkeypatch.setattr(stages, "choose_logprobs", spy)
    run(tmp_path / "run", {"primer": TWO["primer"]}, reference=str(other))
    assert weights_hash(load_model(str(other))) in asked


def test_another_reference_at_the_same_path(tmp_path, other):
    sdpo_partition(BASE, TWO, StepwiseConfig(**SETTINGS, reference=str(other)), tmp_path / "run")
    perturbed(load_model(str(other)), seed=1).save_pretrained(other)
    with pytest.raises(ValueError, match="reference_weights"): run(tmp_path / "run", reference=str(other))


# ---- one optimizer or several

def test_restart(tmp_path):
    once, each = (run(tmp_path / r, restart=r, epochs=2, batch_size=4, warmup=0.25) for r in ("never", "stage"))
    lr = {r.folder.name: [[m["lr"] for m in metrics(r.folder / f"stage-{t}")] for t in (1, 2)] for r in (once, each)}
    assert [len(x) for x in lr["never"]] == [12, 12]
    assert lr["stage"][0] == lr["stage"][1] and max(lr["stage"][0]) == SETTINGS["lr"]
    whole = lr["never"][0] + lr["never"][1]
    top = whole.index(max(whole))
    assert 4 <= top <= 7 and whole[:top+1] == sorted(whole[:top+1]) and whole[top:] == sorted(whole[top:], reverse=True) and len(set(whole[top+1:])) == 23 - top
    assert min(whole) > 0 and lr["never"][1][0] < lr["never"][0][-1]
    assert once.stages[1]["start"] == once.stages[0]["end"] and once.stages[1]["end"] != each.stages[1]["end"]
    saved = torch.load(once.folder / "stage-2" / "checkpoint" / "state.pt", weights_only=True)["optimizer"]["state"]
    assert {int(s["step"]) for s in saved.values()} == {24}, "stage 2 went on with the optimizer of stage 1"


# ---- how chunks are given

@pytest.mark.parametrize("T", [1, 3, 5])
def test_a_number_of_chunks(tmp_path, trained, T):
    got = run(tmp_path / "run", chunks=T)
    assert len(got.stages) == len(trained) == T and sum(map(len, trained)) == 48 and max(map(len, trained)) - min(map(len, trained)) <= 1
    easy_first = [k for s in got.partition().index for k in keys(TWO[s])]
    assert [k for c in trained for k in c] == easy_first


def test_one_source_in_chunks_goes_by_margin(tmp_path, trained):
    "A single source is cut by gamma under S, the easiest pairs first."
    run(tmp_path / "run", {"primer": TWO["primer"]}, chunks=3)
    g = gammas(tmp_path / "run" / "base" / "logprobs")
    order = [k for c in trained for k in c]
    assert list(g.loc[order]) == sorted(g.loc[order], reverse=True) and [len(c) for c in trained] == [8, 8, 8]


def test_lists_of_source_names(tmp_path, trained):
    got = run(tmp_path / "run", SOURCES, chunks=[["primer"], ["riddle", "digest"]])
    assert trained == [keys(SOURCES["primer"]), keys(SOURCES["riddle"]) + keys(SOURCES["digest"])] and len(got.stages) == 2
    assert "| rows | 24 | 24 |" in report._data_text(got)[1] and "| chat | 24 | 24 |" in report._data_text(got)[1]
    with pytest.raises(ValueError, match="primr"): run(tmp_path / "wrong", SOURCES, chunks=[["primr"]])


def test_a_source_that_is_named_twice(tmp_path, trained):
    "Its second chunk has a name of its own, or tables, signs and probes would go by the first."
    got = run(tmp_path / "run", chunks=["primer", "primer", ["digest", "primer"]])
    names = ["primer", "primer (2)", "digest+primer"]
    assert [s["chunk"] for s in got.stages] == list(got.stages[-1]["probes"]) == list(got.partition().index) == names
    assert trained == [keys(TWO["primer"]), keys(TWO["primer"]), keys(TWO["digest"]) + keys(TWO["primer"])]
    mean = report.gamma_table(got).groupby(["chunk", "model"])["gamma"].mean()
    for t, s in enumerate(got.stages, 1):
        assert mean[s["chunk"], f"M_{t}"] - mean[s["chunk"], f"M_{t-1}"] == pytest.approx(s["gamma_change"][0], abs=1e-4)
    def named(chunks): return [s.name for s in plan.check_chunks(chunks, plan.load_sources({"a": TWO["primer"], "a (2)": TWO["digest"]}, load_tokenizer(BASE), StepwiseConfig(**SETTINGS)))]
    assert named([["a"], ["a (2)"], ["a"], ["a"]]) == ["a", "a (2)", "a (3)", "a (4)"]


def test_a_source_that_no_chunk_names_is_told(tmp_path, capsys):
    "Nothing trains on it, so neither report nor card name it."
    sources = {n: str(write_jsonl(tmp_path / f"{n}.jsonl", d)) for n, d in TWO.items()}
    got = run(tmp_path / "run", sources, chunks=["primer"])
    assert "warning: no chunk names digest, so it is not trained on" in capsys.readouterr().out
    assert "primer.jsonl" in report.report_text(got) and "digest" not in report.report_text(got)
    hub = dict(model="m", sources=dict(a="me/a", b="me/b"), settings=dict(chunks=[["b"]]))
    assert report._hub_ids(hub)[1] == ["me/b"]


@pytest.mark.parametrize("chunks", [[], (), [[]], [1], [("a", 2)], ["a", None], [{"a": 1}], "two", True, 0, 1.5])
def test_impossible_chunks(chunks):
    with pytest.raises(ValueError, match="chunks"): StepwiseConfig(chunks=chunks)


def test_tuples_are_lists_and_names_are_groups():
    assert StepwiseConfig(chunks=("a", ("b", "c"))).chunks == StepwiseConfig(chunks=[["a"], ["b", "c"]]).chunks == [["a"], ["b", "c"]]


def test_given_chunks_are_in_the_order_given(tmp_path):
    "config.yaml and the report do not say easy_to_hard of an order that nobody measured."
    run(tmp_path / "run", SOURCES, chunks=[["riddle"], ["primer"]])
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["settings"]["order"] == "as_given" == json.loads((tmp_path / "run" / "partition.json").read_text())["order"]
    with pytest.raises(ValueError, match="order"): StepwiseConfig(chunks=[["riddle"]], order="random")


def test_the_partition_that_was_written_is_the_one_that_is_trained(tmp_path, trained):
    "Another machine may measure accuracies that tie differently; the chunks of a run do not move."
    config, path = StepwiseConfig(**SETTINGS), tmp_path / "run" / "partition.json"
    sdpo_partition(BASE, TWO, config, tmp_path / "run")
    data = json.loads(path.read_text()); path.write_text(json.dumps(data | dict(chunks=data["chunks"][::-1], names=data["names"][::-1])))
    written = path.read_text()
    got = sdpo(BASE, TWO, config, tmp_path / "run")
    assert [s["chunk"] for s in got.stages] == data["names"][::-1] and trained == [keys(TWO[n]) for n in data["names"][::-1]] and path.read_text() == written


def test_precision_is_recorded_as_what_it_meant(tmp_path, monkeypatch):
    meant = "fp32"
    monkeypatch.setattr(stages, "pick_precision", lambda precision, device: meant)
    sdpo_partition(BASE, TWO, StepwiseConfig(**SETTINGS | dict(precision="auto")), tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["settings"]["precision"] == "fp32"
    sdpo(BASE, TWO, StepwiseConfig(**SETTINGS | dict(precision="auto")), tmp_path / "run")
    meant = "bf16"
    with pytest.raises(ValueError, match="precision = fp32, not bf16"): sdpo_partition(BASE, TWO, StepwiseConfig(**SETTINGS | dict(precision="auto")), tmp_path / "run")


def test_before_the_first_update_a_run_may_be_computed_otherwise(tmp_path, capsys):
    "The partition is measured anew; what is trained may not change."
    def config(**kw): return StepwiseConfig(**SETTINGS | kw)
    sdpo_partition(BASE, TWO, config(precision="bf16"), tmp_path / "run")
    with pytest.raises(ValueError, match="lr = 0.001, not 0.002"): sdpo_partition(BASE, TWO, config(precision="fp32", lr=2e-3), tmp_path / "run")
    changed = sdpo(BASE, TWO, config(precision="fp32", token_budget=300), tmp_path / "run")
    assert "nothing was trained here yet; goes on with token_budget = 300, precision = fp32" in capsys.readouterr().out
    fresh = sdpo(BASE, TWO, config(precision="fp32", token_budget=300), tmp_path / "fresh")
    assert [s["end"] for s in changed.stages] == [s["end"] for s in fresh.stages] and changed.partition().equals(fresh.partition())


def test_a_run_that_was_stopped_by_the_first_look_goes_on_in_another_precision(tmp_path, monkeypatch):
    "As it happens to somebody whose model does something in half precision that nobody foresaw."
    monkeypatch.setattr(trainer, "rounding_limit", lambda said, exact, batch: -1.0 if said is not exact else 1.0)
    with pytest.raises(ValueError, match="table of reference log-probabilities.* if you trust it, go on with precision = fp32"): sdpo(BASE, TWO, StepwiseConfig(**SETTINGS | dict(precision="bf16")), tmp_path / "run")
    assert len(sdpo(BASE, TWO, StepwiseConfig(**SETTINGS | dict(precision="fp32")), tmp_path / "run").stages) == 2


BUDGET = 65536 # tokens in a forward pass, so that the plan of a tiny model is no row of zeros
def wide_plan():
    share = max(share_of_responses(tokenised(TWO[name], name)) for name in TWO)
    assert abs(share - 0.5) > 0.01                       # or the plan would not show that it was asked for
    return plan_for(load_model(BASE, "cpu").config, StepwiseConfig(**SETTINGS, token_budget=BUDGET), "fp32", "cpu", responses=share)


def test_a_large_model_s_run_says_what_memory_it_needs(tmp_path, monkeypatch, capsys):
    run(tmp_path / "tiny")
    assert "memory on" not in capsys.readouterr().out
    monkeypatch.setattr(stages, "SMALL", 0)
    run(tmp_path / "large", token_budget=BUDGET)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory")]
    assert len(said) == 1 and said[0].startswith(f"memory on cpu: {as_line(wide_plan())}; ") and said[0].endswith(" GiB are free")


@pytest.mark.parametrize("spare, fits", [(-1e-6, False), (1e-6, True)])
def test_what_cannot_fit_is_refused_before_a_file_is_written(tmp_path, monkeypatch, trained, spare, fits):
    "With the number. The weights are there already; the rest must find room."
    monkeypatch.setattr(stages, "SMALL", 0)
    plan, wide = wide_plan(), dict(token_budget=BUDGET)
    needed = sum(plan.values()) - plan["weights"]
    assert needed > 1
    for module in (stages, trainer): monkeypatch.setattr(module, "free_memory", lambda device: (needed + spare) * GIB)
    if fits: return run(tmp_path / "run", **wide) and None
    with pytest.raises(ValueError) as e: run(tmp_path / "run", **wide)
    assert str(e.value).startswith(f"memory: training needs {as_line(plan)}; {needed:.1f} GiB are free on cpu. ")
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"] and not trained


class Maker:
    "A function with something large inside, such as a judge."
    def __deepcopy__(self, memo): raise AssertionError("the settings were copied")
    def __call__(self, t, model): return rows("primer", 8, 8 * t) if t <= 2 else None


@pytest.mark.parametrize("make", [Maker, lambda: functools.partial(lambda n, t, model: rows("primer", n, n * t) if t <= 2 else None, 8)], ids=["object", "partial"])
def test_a_function_of_any_kind_goes_on(tmp_path, make):
    "Its address is not in config.yaml, or every second call would be refused."
    ends = [[s["end"] for s in run(tmp_path / "run", chunks=make()).stages] for _ in range(2)]
    assert ends[0] == ends[1] and "0x" not in (tmp_path / "run" / "config.yaml").read_text()


def test_a_function_and_sources_do_not_go_together(tmp_path):
    with pytest.raises(ValueError, match="sources"): sdpo(BASE, TWO, StepwiseConfig(**SETTINGS, chunks=lambda t, model: None), tmp_path / "run")


def test_a_function_makes_the_chunks(tmp_path, trained, S_hash):
    asked, data = [], [rows("primer", 12), rows("digest", 8)]
    def chunks(t, model):
        asked.append((t, weights_hash(model)))
        return data[t-1] if t <= 2 else None
    got = run(tmp_path / "run", chunks=chunks)
    assert trained == [keys(d) for d in data] and len(got.stages) == 2
    assert asked == [(1, S_hash), (2, got.stages[0]["end"]), (3, got.stages[1]["end"])]
    assert got.stages[1]["reference_kind"]["weights"] == got.stages[0]["end"] and abs(got.stages[1]["first_loss"] - LN2) < 1e-5


def test_a_function_and_the_prompts_that_are_answered(tmp_path):
    "Every model answers what S answered, though later chunks bring other prompts; an answer stands under its own prompt, also in an older folder."
    got = run(tmp_path / "run", chunks=lambda t, model: rows(("primer", "digest")[t-1], 8) if t <= 2 else None)
    said = [json.loads((got.folder / f / "answers.json").read_text()) for f in ("base", "stage-1", "stage-2")]
    assert len({tuple(s["prompts"]) for s in said}) == 1
    path, text = got.folder / "stage-2" / "answers.json", report._answers_text(got)
    path.write_text(json.dumps({name: part[::-1] for name, part in said[2].items()}))
    assert report._answers_text(got) == text
    path.write_text(json.dumps(dict(prompts=["another"], answers=["x"])))
    assert "after stage 2" in "".join(text) and "after stage 2" not in "".join(report._answers_text(got))


def test_a_function_and_a_fixed_reference(tmp_path, S_hash):
    "S has not seen the pairs that the function makes for stage 2, and is asked about them then."
    data = [rows("primer", 12), rows("digest", 24)]
    got = run(tmp_path / "run", chunks=lambda t, model: data[t-1] if t <= 2 else None, reference="fixed", beta=0.5, **WHOLE)
    assert [s["reference_kind"]["weights"] for s in got.stages] == [S_hash, S_hash] and got.stages[1]["start"] == got.stages[0]["end"]
    pairs = list(tokenised(data[1])); gamma = {t: score_pairs(load_model(m), pairs).gamma(pairs) for t, m in ((0, BASE), (1, str(got.model_folder(1))))}
    want = torch.log1p(torch.exp(-0.5 * (gamma[1] - gamma[0]))).mean().item()
    assert abs(got.stages[1]["first_loss"] - want) < 1e-4 and abs(want - LN2) > 1e-3


def test_a_function_and_a_folder_as_reference(tmp_path):
    S, tok = load_base(load_world())
    other = perturbed(S); other.save_pretrained(tmp_path / "other"); tok.save_pretrained(tmp_path / "other")
    got = run(tmp_path / "run", chunks=lambda t, model: rows("primer", 8, 8 * t) if t <= 2 else None, reference=str(tmp_path / "other"))
    assert [s["reference_kind"]["weights"] for s in got.stages] == [weights_hash(other)] * 2


def test_a_function_is_not_asked_twice_for_a_chunk(tmp_path):
    "A run that goes on keeps the pairs the function returned the first time, whatever it would return now."
    class Stop(Exception): pass
    def chunks(t, model):
        if t == 3: raise Stop
        return rows("primer", 8, 8 * t)
    with pytest.raises(Stop): run(tmp_path / "run", chunks=chunks)
    first = [s["end"] for s in stepwise.Run(tmp_path / "run").stages]
    asked = []
    def chunks(t, model):
        asked.append(t)
        return None if t > 3 else rows("digest", 8)
    got = run(tmp_path / "run", chunks=chunks)
    assert asked == [3, 4] and [s["end"] for s in got.stages][:2] == first and len(got.stages) == 3


@pytest.mark.parametrize("stage", [1, 2])
def test_pairs_of_an_earlier_call_are_told_and_what_to_remove_is_enough(tmp_path, capsys, stage):
    "The function was wrong when the run was killed in its stage; without what the line names, the run is that of the right function."
    def right(t, model): return rows("primer", 8, 8 * t) if t <= 2 else None
    def wrong(t, model): return rows("digest", 8) if t == stage else right(t, model)
    wrong.__qualname__ = right.__qualname__ # the same function, corrected
    def stop(row):
        if row["stage"] == stage: raise KeyboardInterrupt
    folder, straight = tmp_path / "run", run(tmp_path / "straight", chunks=right)
    def call(chunks, **how): return sdpo(BASE, None, StepwiseConfig(**SETTINGS, save_every=1, chunks=chunks), folder, **how)
    with pytest.raises(KeyboardInterrupt): call(wrong, on_step=stop)
    assert "earlier call" not in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt): call(right, on_step=stop)
    named = folder / "stage-2" if stage == 2 else folder
    assert f"stage {stage} goes on with the pairs that an earlier call made; remove {named} to make them anew\n" in capsys.readouterr().out
    shutil.rmtree(named)
    got = call(right)
    assert "earlier call" not in capsys.readouterr().out and [s["end"] for s in got.stages] == [s["end"] for s in straight.stages]
    said = [(folder / f / "answers.json").read_text() for f in ("base", "stage-1", "stage-2")]
    assert said == [(straight.folder / f / "answers.json").read_text() for f in ("base", "stage-1", "stage-2")]


@pytest.mark.parametrize("change", [lambda m: m.bfloat16().float(), lambda m: m.half(), perturbed], ids=["rounds", "dtype", "trains"])
def test_a_function_does_not_change_the_model(tmp_path, S_hash, change):
    careless = [True]
    def chunks(t, model):
        if t == 2 and careless: change(model)
        return rows("primer", 8, 8 * t) if t <= 2 else None
    with pytest.raises(ValueError, match="^chunks, stage 2: the function changed the model; work on a copy"): run(tmp_path / "run", chunks=chunks)
    careless.clear()
    got = run(tmp_path / "run", chunks=chunks)
    assert got.stages[1]["start"] == got.stages[0]["end"]


@pytest.mark.parametrize("chunks", [lambda t: None, lambda t, model, more: None, lambda t, *, model: None])
def test_a_function_that_takes_other_arguments(chunks):
    with pytest.raises(ValueError, match=r"^chunks: the function must take \(t, model\)"): StepwiseConfig(chunks=chunks)


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda chunk: (chunk / "state.json").unlink()], ids=["missing", "damaged"])
def test_a_chunk_of_a_finished_stage_is_not_made_again(tmp_path, damage):
    def chunks(t, model):
        assert model is not None
        return rows("primer", 8) if t == 1 else None
    got = run(tmp_path / "run", chunks=chunks)
    chunk = got.folder / "stage-1" / "chunk"
    damage(chunk)
    with pytest.raises(ValueError, match=f"^{chunk}: cannot be used.*remove stage-1"): run(tmp_path / "run", chunks=chunks)


def test_a_function_without_pairs(tmp_path):
    with pytest.raises(ValueError, match="chunks"): run(tmp_path / "run", chunks=lambda t, model: None)
    with pytest.raises(ValueError, match="^chunks, stage 1: .*no rows"): run(tmp_path / "run", chunks=lambda t, model: [])
    with pytest.raises(ValueError, match="eval_share"): StepwiseConfig(chunks=lambda t, model: None, eval_share=0.1)
    with pytest.raises(ValueError, match="^chunks, stage 1: nothing is held out"): run(tmp_path / "run", chunks=lambda t, model: dict(source=rows("primer", 8), eval_share=0.1))
    with pytest.raises(ValueError, match="there is none: .*a function"): sdpo_partition(BASE, None, StepwiseConfig(**SETTINGS, chunks=lambda t, model: None), tmp_path / "looked").partition()


def test_a_function_returns_what_a_source_may_be(tmp_path, trained):
    "With chat = True in a dict, plain rows get the chat template, as the note advises."
    plain = [dict(prompt=r["prompt"][0]["content"], chosen=r["chosen"][0]["content"], rejected=r["rejected"][0]["content"]) for r in rows("primer", 8)]
    run(tmp_path / "run", chunks=lambda t, model: dict(source=plain, chat=True) if t == 1 else None)
    assert trained == [keys(rows("primer", 8))]


def test_a_function_and_one_schedule_do_not_go_together(tmp_path):
    with pytest.raises(ValueError, match="restart"): run(tmp_path / "run", chunks=lambda t, model: None if t > 1 else rows("primer", 8), restart="never")


# ---- what goes in

def test_a_loaded_model(tmp_path, S_hash):
    S, tok = load_base(load_world())
    config = StepwiseConfig(**SETTINGS)
    got = sdpo(S, TWO, config, tmp_path / "loaded", tokenizer=tok)
    assert [s["end"] for s in got.stages] == [s["end"] for s in run(tmp_path / "folder").stages]
    assert got.stages[0]["start"] == S_hash
    assert S.device.type == "cpu" and weights_hash(S) == S_hash, "the caller's model is left alone"
    with pytest.raises(ValueError, match="tokenizer"): sdpo(S, TWO, config, tmp_path / "none")
    assert not (tmp_path / "none" / "config.yaml").exists()


def test_another_loaded_model_is_refused(tmp_path, S_hash):
    S, tok = load_base(load_world()); config = StepwiseConfig(**SETTINGS)
    sdpo_partition(S, TWO, config, tmp_path / "run", tokenizer=tok)
    with pytest.raises(ValueError, match="weights") as e: sdpo(perturbed(load_model(BASE)), TWO, config, tmp_path / "run", tokenizer=tok)
    assert str(tmp_path / "run") in str(e.value)
    assert sdpo(S.to(torch.float32), TWO, config, tmp_path / "run", tokenizer=tok).stages[0]["start"] == S_hash


def test_a_refused_call_does_not_leave_its_model_to_the_next(tmp_path, S_hash):
    S, tok = load_base(load_world()); config = StepwiseConfig(**SETTINGS)
    with pytest.raises(ValueError, match="no rows"): sdpo(perturbed(load_model(BASE)), {"a": []}, config, tmp_path / "run", tokenizer=tok)
    assert sdpo(S, TWO, config, tmp_path / "run", tokenizer=tok).stages[0]["start"] == S_hash


def test_a_loaded_bf16_model_may_go_on(tmp_path):
    S, tok = load_base(load_world()); S.to(torch.bfloat16)
    for _ in range(2): sdpo_partition(S, TWO, StepwiseConfig(**SETTINGS), tmp_path / "run", tokenizer=tok)
    assert S.dtype == torch.bfloat16


@pytest.mark.parametrize("sources, said", [(["a.jsonl"], "sources"), ("a.jsonl", "sources"), (None, "sources"), ({"a": dict(source=TWO["primer"], colums={})}, "'a'.*columns.*colums"),
                                           ({"a": dict(columns={})}, "'a'.*source"), ({"a": dict(source=TWO["primer"], columns=["prompt"])}, "'a': columns must be"),
                                           ({"a": Source("a", tokenize_pairs(load_pairs(TWO["primer"]), load_tokenizer(BASE)).pairs.select([]), {})}, "'a': no pairs")])
def test_sources_of_the_wrong_shape(tmp_path, sources, said):
    with pytest.raises(ValueError, match=said): run(tmp_path / "run", sources)


def test_rows_files_and_tokenised_sources_are_the_same(tmp_path):
    from datasets import Dataset, DatasetDict
    from tiny import write_jsonl
    ways = dict(rows=TWO, files={n: str(write_jsonl(tmp_path / f"{n}.jsonl", d)) for n, d in TWO.items()},
                dataset={n: Dataset.from_list(d) for n, d in TWO.items()}, splits={n: DatasetDict(train=Dataset.from_list(d)) for n, d in TWO.items()},
                renamed={n: dict(source=[dict(question=r["prompt"], chosen=r["chosen"], rejected=r["rejected"]) for r in d], columns={"question": "prompt"}) for n, d in TWO.items()})
    assert len({run(tmp_path / n, sources).stages[1]["end"] for n, sources in ways.items()}) == 1


def test_no_sources(tmp_path):
    with pytest.raises(ValueError, match="sources"): run(tmp_path / "run", {})


# ---- T = 1

def test_one_stage_is_plain_dpo(tmp_path):
    "sDPO with T = 1 equals a direct call of the stage trainer, to the bit; the result is an ordinary model."
    one, settings = {"primer": TWO["primer"]}, SETTINGS | dict(epochs=2, beta=0.3)
    got = run(tmp_path / "run", one, chunks=1, **{k: settings[k] for k in ("epochs", "beta")})
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32); pairs = tokenised(TWO["primer"])
    table = score_pairs(load_model(BASE), pairs, logprobs=packed_logprobs)
    train_stage(model, pairs, table, StepwiseConfig(**settings, chunks=1), tmp_path / "direct")
    assert weights_hash(model) == got.stages[0]["end"] != got.stages[0]["start"]
    assert metrics(tmp_path / "direct") == metrics(tmp_path / "run" / "stage-1")
    plain = AutoModelForCausalLM.from_pretrained(got.model_folder(), dtype="auto")
    assert weights_hash(plain) == got.stages[0]["end"] and plain.dtype == torch.float32
    tok = AutoTokenizer.from_pretrained(got.model_folder())
    chat = tok.apply_chat_template([dict(role="user", content="sort gace")], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert plain.generate(**chat, max_new_tokens=4, do_sample=False).shape[1] > chat["input_ids"].shape[1]
    assert weights_hash(got.model) == got.stages[0]["end"]


@pytest.fixture
def half(tmp_path):
    "S, as a folder in bf16."
    S, tok = load_base(load_world())
    S.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tok.save_pretrained(tmp_path / "half")
    return str(tmp_path / "half")


def test_a_bf16_folder_is_trained_in_fp32(tmp_path, half):
    "transformers loads a bf16 folder in bf16, where small updates vanish: here the weights are fp32 and all of them move."
    got = sdpo(half, {"primer": TWO["primer"]}, StepwiseConfig(**SETTINGS | dict(lr=5e-7, save_dtype="fp32")), tmp_path / "run")
    before, after = load_model(half), got.model
    moved = [(a != b).float().mean().item() for a, b in zip(before.parameters(), after.parameters())]
    assert {p.dtype for p in after.parameters()} == {torch.float32} and min(moved) > 0.5


def test_models_are_saved_in_the_dtype_of_S(tmp_path, half, capsys):
    got = sdpo(half, TWO, StepwiseConfig(**SETTINGS), tmp_path / "run")
    for s, stage in zip(got.stages, (1, 2)):
        folder = got.model_folder(stage)
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16 and json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
        saved = load_model(str(folder), "cpu")
        assert s["saved"]["dtype"] == "bfloat16" and s["saved"]["weights"] == weights_hash(saved, torch.bfloat16) and s["end"] != weights_hash(saved)
    assert got.stages[0]["end"] == got.stages[1]["start"] == got.stages[1]["reference_kind"]["weights"], "M_1 is the fp32 model, not the file"
    sizes = [sum(p.stat().st_size for p in Path(f).glob("*.safetensors")) for f in (half, got.model_folder(2))]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02) and not list((tmp_path / "run").glob("stage-*/checkpoint"))
    capsys.readouterr()
    sdpo(half, {"primer": TWO["primer"]}, StepwiseConfig(**SETTINGS | dict(lr=5e-7)), tmp_path / "small")
    assert "save_dtype = fp32 keeps the rest" in capsys.readouterr().out


def test_a_bf16_run_that_goes_on_starts_from_the_exact_weights(tmp_path, half, monkeypatch):
    whole = sdpo(half, TWO, StepwiseConfig(**SETTINGS), tmp_path / "whole")
    train, calls = stages.train_stage, []
    def once(*args, **kw):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return train(*args, **kw)
    monkeypatch.setattr(stages, "train_stage", once)
    with pytest.raises(KeyboardInterrupt): sdpo(half, TWO, StepwiseConfig(**SETTINGS), tmp_path / "killed")
    assert (tmp_path / "killed/stage-1/checkpoint/state.pt").exists()
    again = sdpo(half, TWO, StepwiseConfig(**SETTINGS), tmp_path / "killed")
    assert [s["end"] for s in again.stages] == [s["end"] for s in whole.stages]


def test_a_bf16_run_does_not_go_on_from_rounded_weights(tmp_path, half, monkeypatch):
    "The exact ones lie in the checkpoint of the last stage; where it is gone, no table is overwritten."
    real = stepwise.run_stage
    def stops(t, *args):
        if t == 2: raise KeyboardInterrupt
        return real(t, *args)
    monkeypatch.setattr(stepwise, "run_stage", stops)
    with pytest.raises(KeyboardInterrupt): sdpo(half, TWO, StepwiseConfig(**SETTINGS), tmp_path / "run")
    monkeypatch.setattr(stepwise, "run_stage", real)
    stage = tmp_path / "run" / "stage-1"
    table = read_table(stage / "logprobs").kind
    shutil.rmtree(stage / "checkpoint")
    with pytest.raises(ValueError, match=f"{stage / 'checkpoint'}: is missing.* remove stage-1"): sdpo(half, TWO, StepwiseConfig(**SETTINGS), tmp_path / "run")
    assert read_table(stage / "logprobs").kind == table
    shutil.rmtree(stage)                                                      # as the message says
    again = sdpo(half, TWO, StepwiseConfig(**SETTINGS), tmp_path / "run").stages
    assert again[0]["end"] == again[1]["start"] == again[1]["reference_kind"]["weights"] == table["weights"]


def test_a_bf16_run_whose_function_has_more_pairs_later(tmp_path, half):
    n = 1
    def more(t, model): return rows("primer", 8, 8 * t) if t <= n else None
    config = StepwiseConfig(**SETTINGS, chunks=more)
    sdpo(half, None, config, tmp_path / "run")
    n = 2
    one, two = sdpo(half, None, config, tmp_path / "run").stages
    assert one["end"] == two["start"] == two["reference_kind"]["weights"]


@pytest.mark.parametrize("other", ["model", "checkpoint"])
def test_a_bf16_run_does_not_go_on_from_another_model(tmp_path, half, monkeypatch, other):
    "The model on disk is rounded, the checkpoint beside it is exact: each is compared with a hash of its own."
    train = stages.train_stage
    def one_stage(*args, **kw):
        if (tmp_path / "run/stage-1/stage.json").exists(): raise KeyboardInterrupt
        return train(*args, **kw)
    monkeypatch.setattr(stages, "train_stage", one_stage)
    with pytest.raises(KeyboardInterrupt): sdpo(half, TWO, StepwiseConfig(**SETTINGS), tmp_path / "run")
    stage = tmp_path / "run" / "stage-1"
    if other == "model": perturbed(load_model(half)).to(torch.bfloat16).save_pretrained(stage / "model")
    else:
        saved = torch.load(stage / "checkpoint" / "state.pt", weights_only=True)
        next(iter(saved["model"].values())).view(-1)[0] += 1e-6                  # rounding swallows it
        torch.save(saved, stage / "checkpoint" / "state.pt")
    with pytest.raises(ValueError, match=f"{stage / other}: has weights"): sdpo(half, TWO, StepwiseConfig(**SETTINGS), tmp_path / "run")


def test_a_source_may_have_a_name_of_its_own(tmp_path):
    tok = load_tokenizer(load_world().base)
    made = plan.load_sources(dict(inner=TWO["primer"][:8]), tok, StepwiseConfig(**SETTINGS))
    run = sdpo_partition(load_world().base, dict(outer=made[0]), StepwiseConfig(**SETTINGS), tmp_path / "run")
    assert run.config["sources"] == dict(inner=None) and run.partition().index.tolist() == ["inner"]


# ---- the report

def test_report(tmp_path, monkeypatch):
    monkeypatch.undo()
    got = run(tmp_path / "run", lr=5e-7)
    text = (tmp_path / "run" / "report.md").read_text()
    for word in ("M_0", "M_1", "primer", "digest", "| beta | 0.1", "| lr | 5e-07", "![](figures/loss.png)"): assert word in text
    for name in ("loss", "change", "drift", "partition"): assert (tmp_path / "run" / "figures" / f"{name}.png").stat().st_size > 5000
    table = got.table()
    assert list(table.columns) == ["stage 1", "stage 2"] and list(table.loc["chunk"]) == [s["chunk"] for s in got.stages]
    assert set(got.metrics["stage"]) == {1, 2} and len(got.metrics) == 6


def test_a_run_is_read_while_a_stage_is_unfinished(tmp_path):
    got = run(tmp_path / "run", epochs=2)
    assert list(Run(str(got.folder)).metrics.columns) == list(got.metrics.columns) and Run(str(got.folder)).model_folder() == got.folder / "stage-2" / "model"
    (got.folder / "stage-2" / "stage.json").unlink()
    with open(got.folder / "stage-2" / "metrics.jsonl", "ab") as f: f.write(b'{"step": 6, "epo')
    assert set(got.metrics["stage"]) == {1} and got.model_folder() == got.folder / "stage-1" / "model"
    assert str(got.model_folder(0)) == BASE


def test_a_held_out_source_has_no_eval_share(tmp_path):
    held = dict(mine=dict(source=TWO["primer"], eval_share=0.5))
    with pytest.raises(ValueError, match="held_out, source 'mine': every pair of it is held out; leave out its eval_share"):
        sdpo(BASE, TWO, StepwiseConfig(**SETTINGS), tmp_path / "run", held_out=held)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_has_the_dropout_and_the_generation_settings_of_S(tmp_path, monkeypatch, dtype):
    "Also in versions of transformers that refuse to save generation settings which they have loaded, as 5.15 does."
    model = load_model(BASE, "cpu").to(dtype)
    model.config.attention_dropout = 0.1
    model.save_pretrained(tmp_path / "S")
    load_tokenizer(BASE).save_pretrained(tmp_path / "S")
    own = dict(temperature=0.9, top_p=0.6)
    (tmp_path / "S" / "generation_config.json").write_text(json.dumps(own))
    save = GenerationConfig.save_pretrained
    def strict(self, *args, **kw):
        self.validate(strict=True)
        return save(self, *args, **kw)
    monkeypatch.setattr(GenerationConfig, "save_pretrained", strict)
    with pytest.raises(ValueError, match="do_sample"): load_model(tmp_path / "S", "cpu").save_pretrained(tmp_path / "refused")

    run = sdpo(str(tmp_path / "S"), TWO, StepwiseConfig(**SETTINGS), tmp_path / "run")
    folder = tmp_path / "run" / "stage-2" / "model"
    saved = json.loads((folder / "generation_config.json").read_text())
    assert own.items() <= saved.items()
    assert json.loads((folder / "config.json").read_text())["attention_dropout"] == 0.1
    assert run.model.config.attention_dropout == 0 and load_model(folder, "cpu").config.attention_dropout == 0


def test_few_held_out_pairs_are_told(tmp_path):
    "One sentence names the sources with fewer than 20, and no loss of theirs has an interval below zero."
    held = dict(many=rows("riddle", 20), few=rows("riddle", 19, 20), two=rows("riddle", 2, 40))
    got = sdpo(BASE, TWO, StepwiseConfig(**SETTINGS | dict(lr=1e-3, epochs=4)), tmp_path / "run", held_out=held)
    told = [part for part in report._held_out_text(got) if "Fewer than" in part]
    assert told == ["Fewer than 20 pairs of few, two are held out, so their intervals say little; "
                    "a larger `eval_share`, or a larger held-out source, would help."]
    found = got.held_out().xs("two")
    low = found["loss"].dropna().map(lambda cell: cell[1])
    assert len(low) == 3 and min(low) == 0 and all(found["gamma"].map(lambda cell: cell[1] < 0))
    without = sdpo(BASE, TWO, StepwiseConfig(**SETTINGS), tmp_path / "without", held_out=dict(many=held["many"]))
    assert not any("Fewer than" in part for part in report._held_out_text(without))


def test_two_sources_of_one_name_are_refused(tmp_path):
    tok = load_tokenizer(load_world().base)
    one = plan.load_sources(dict(inner=TWO["primer"][:8]), tok, StepwiseConfig(**SETTINGS))[0]
    with pytest.raises(ValueError, match="two of them are called 'inner'"): sdpo(BASE, dict(a=one, b=one), StepwiseConfig(**SETTINGS), tmp_path / "run")


def test_a_name_that_is_no_text(tmp_path):
    "In JSON it would be another one, found out when everything is trained."
    with pytest.raises(ValueError, match="the name 2023 is no text"): run(tmp_path / "run", {2023: TWO["primer"]})
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("how", ["python", "file"])
def test_each_source_has_a_max_pairs_of_its_own(tmp_path, how):
    sources = dict(primer=dict(source=load_world().sources["primer"], max_pairs=16), digest=dict(source=load_world().sources["digest"], max_pairs=8))
    if how == "python": run = sdpo_partition(load_world().base, sources, StepwiseConfig(**SETTINGS), tmp_path / "run")
    else:
        file = dict(model=load_world().base, folder=str(tmp_path / "run"), sources=sources, **SETTINGS)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(file))
        cli.main(["partition", "--config", str(tmp_path / "run.yaml")])
        run = Run(tmp_path / "run")
    assert run.partition()["n"].to_dict() == dict(primer=16, digest=8)
    assert {name: what["max_pairs"] for name, what in run.config["sources"].items()} == dict(primer=16, digest=8)


def test_the_settings_say_what_is_easy(tmp_path):
    "long: short chosen responses, which cost less as a sum. wordy: the same, swapped."
    pairs = [(p, "ab", "abcdefgh") for p in ("copy abc", "copy bcd", "copy cde", "copy abd")]
    made = dict(terse=[dict(prompt=p, chosen=a, rejected=b) for p, a, b in pairs], wordy=[dict(prompt=p, chosen=b, rejected=a) for p, a, b in pairs])
    by = {o: sdpo_partition(load_world().base, made, StepwiseConfig(**SETTINGS, order_by=o), tmp_path / o) for o in ("gamma", "gamma_per_token")}
    for order_by, column in (("gamma", "accuracy"), ("gamma_per_token", "accuracy_per_token")):
        assert by[order_by].partition()[column].is_monotonic_decreasing
        assert by[order_by].config["settings"]["order_by"] == order_by


def test_a_run_does_not_lie_in_its_source(tmp_path):
    "Its own json files would be rows of the source in the next call."
    write_jsonl(tmp_path / "a.jsonl", rows("primer", 8))
    for given in (dict(sources=dict(a=str(tmp_path))), dict(sources=TWO, held_out=dict(b=dict(source=tmp_path)))):
        with pytest.raises(ValueError, match="run: is source '[ab]' or lies in its folder"):
            sdpo_partition(BASE, config=StepwiseConfig(**SETTINGS), folder=tmp_path / "run", **given)
    assert not list(tmp_path.rglob("*.json"))
    with pytest.raises(ValueError, match="lies in its folder"): stepwise.measure_models(dict(S=BASE), dict(a=str(tmp_path)), folder=tmp_path / "m")


def test_a_folder_in_the_users_home(tmp_path, monkeypatch):
    "No folder is called ~."
    monkeypatch.setenv("HOME", str(tmp_path)); monkeypatch.chdir(tmp_path)
    got = sdpo_partition(BASE, dict(a=rows("primer", 8)), StepwiseConfig(**SETTINGS), "~/run")
    files = stepwise.export_chunks(stepwise.Run("~/run"), "~/out", dict(a=rows("primer", 8)))
    stepwise.measure_models(dict(S=BASE), dict(a=rows("primer", 8)), StepwiseConfig(**SETTINGS), "~/measure")
    assert got.folder == tmp_path / "run" and files == [tmp_path / "out" / "chunk-1.jsonl"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["measure", "out", "run"]


def test_names_and_numbers_of_numpy(tmp_path):
    "config.yaml holds plain ones, and a second call finds the same run."
    x, path = np.str_("x"), np.str_(write_jsonl(tmp_path / "x.jsonl", rows("primer", 24)))
    spec = dict(source=path, columns=OrderedDict(prompt=np.str_("prompt")), max_pairs=np.int64(20), eval_share=np.float32(0.3))
    asked = {x: spec, np.str_("y"): path}
    config = StepwiseConfig(**SETTINGS | dict(chunks=[[x], (np.str_("y"),)], device=np.str_("cpu"), beta=np.float32(0.1)))
    for _ in range(2): got = sdpo_partition(BASE, asked, config, tmp_path / "run", held_out={np.str_("z"): path})
    assert got.config["sources"] == dict(x=dict(source=str(path), columns=dict(prompt="prompt"), max_pairs=20, eval_share=pytest.approx(0.3)), y=str(path))
    assert got.config["settings"]["chunks"] == [["x"], ["y"]] and list(got.config["held_out"]) == ["z"]
    assert got.partition().loc["x", "n"] < 20 == len(stepwise.read_rows("x", spec))
    for wrong in (dict(max_pairs=np.float64(3)), dict(max_pairs=True), dict(eval_share=True)):
        with pytest.raises(ValueError, match=next(iter(wrong))): stepwise.read_rows("x", spec | wrong)


def test_a_graphics_card_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config, S, tok = StepwiseConfig(**SETTINGS, device="cuda"), *load_base(load_world())
    with pytest.raises(ValueError, match="^device: there is no graphics card here; take auto or cpu"): sdpo(S, TWO, config, tmp_path / "run", tokenizer=tok)
    with pytest.raises(ValueError, match="^device: there is no graphics card"): stepwise.measure_models(dict(S=BASE), TWO, config, tmp_path / "m")
    assert not (tmp_path / "run" / "base").exists() and not (tmp_path / "m").exists()
