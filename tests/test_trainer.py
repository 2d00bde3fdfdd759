"""One stage: every precision, from every kind of folder, interrupted anywhere."""
import json, math, resource, shutil, time
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset
from transformers import AutoConfig

from sdpo_nb.logprobs import LogprobTable, load_model, load_tokenizer, response_logprobs, score_pairs, weights_hash
from sdpo_nb.packing import packed_logprobs
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb import trainer
from sdpo_nb.trainer import MOST, TrainConfig, all_batches, check_memory, check_same_twice, check_table, fit, free_memory, learning_rate, memory_plan, per_root_token, plan_for, rounding_limit, share_of_responses, tokens_that_fit, train_stage, trainable
from sdpo_nb.world import load_world
from bench_packing import PLANS, RESULTS, shape
from tiny import perturbed


@pytest.fixture(scope="module")
def pairs():
    torch.set_num_threads(1)
    w = load_world()
    return tokenize_pairs(load_pairs(w.sources["digest"]), load_tokenizer(w.base), "digest").pairs.select(range(45))


def stage(folder, pairs, model=None, table=None, logprobs=response_logprobs, **kw):
    "Train; returns the model, the summary and the metrics."
    model = model or load_model(load_world().base, "cpu")
    config = TrainConfig(**dict(beta=0.5, lr=1e-4, batch_size=8, token_budget=200, precision="fp32") | kw)
    table = table or score_pairs(model, pairs, precision=config.precision)
    summary = train_stage(model, pairs, table, config, folder, logprobs=logprobs)
    return model, summary, pd.read_json(folder / "metrics.jsonl", lines=True)


def with_dropout(model):
    for layer in model.model.layers: layer.self_attn.attention_dropout = 0.1
    return model.train()


class Stop(Exception): pass


def stops_at(call):
    def logprobs(model, batch):
        logprobs.calls += model.training
        if logprobs.calls == call: raise Stop
        return response_logprobs(model, batch)
    logprobs.calls, logprobs.__name__ = 0, "response_logprobs"
    return logprobs


def overflows_at(*calls):
    def logprobs(model, batch):
        c, r = response_logprobs(model, batch)
        logprobs.calls += model.training
        return (c + (c - c.detach()) * 1e38, r) if logprobs.calls in calls else (c, r)
    logprobs.calls, logprobs.__name__ = 0, "response_logprobs"
    return logprobs


def test_ten_steps_from_a_bf16_folder_change_every_tensor(pairs, tmp_path):
    load_model(load_world().base, "cpu").bfloat16().save_pretrained(tmp_path / "half")
    before = load_model(str(tmp_path / "half"), "cpu").state_dict()
    model, summary, _ = stage(tmp_path / "s", pairs, model=load_model(str(tmp_path / "half"), "cpu"), lr=5e-7, batch_size=5, precision="bf16")
    assert summary["steps"] == 9 and all(p.dtype == torch.float32 for p in model.parameters())
    assert all((before[n] != p).any() for n, p in model.named_parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("call", [3, 8, 12])
def test_interrupted_anywhere_ends_in_the_same_bits(pairs, tmp_path, precision, call):
    kw = dict(precision=precision, save_every=2, epochs=2)
    straight, *_, m = stage(tmp_path / "a", pairs, **kw)
    with pytest.raises(Stop): stage(tmp_path / "b", pairs, logprobs=stops_at(call), **kw)
    continued, summary, n = stage(tmp_path / "b", pairs, **kw)
    assert weights_hash(straight) == weights_hash(continued)
    drop = ["tokens_per_second"]
    pd.testing.assert_frame_equal(m.drop(columns=drop), n.drop(columns=drop))
    assert summary["first_loss"] == pytest.approx(m["loss"][0])


def test_fp16_skips_and_neither_schedule_nor_counter_moves(pairs, tmp_path):
    "Batches 2 and 3 overflow; each batch is two forward passes."
    model, summary, m = stage(tmp_path, pairs.select(range(40)), precision="fp16", logprobs=overflows_at(3, 6))
    assert m["skipped"].tolist() == [False, True, True, False, False] and m["step"].tolist() == [1, 1, 1, 2, 3]
    config = TrainConfig(lr=1e-4)
    assert m["lr"].tolist() == pytest.approx([learning_rate(i, 5, config) for i in (0, 1, 1, 1, 2)])
    assert summary["steps"] == 3 and summary["skipped"] == 2 and all(p.isfinite().all() for p in model.parameters())


def test_a_skipped_step_changes_no_weight(pairs, tmp_path):
    model, summary, _ = stage(tmp_path, pairs.select(range(8)), precision="fp16", logprobs=overflows_at(1))
    assert summary["skipped"] == 1 and weights_hash(model) == weights_hash(load_model(load_world().base, "cpu"))


@pytest.mark.parametrize("other", [dict(token_budget=1), dict(token_budget=150), dict(token_budget=4096), dict(gradient_checkpointing=True), dict(logprobs=packed_logprobs), dict(logprobs=packed_logprobs, gradient_checkpointing=True)])
def test_same_weights_however_the_batch_is_computed(pairs, tmp_path, other):
    a, b = stage(tmp_path / "a", pairs)[0], stage(tmp_path / "b", pairs, **other)[0]
    start = load_model(load_world().base, "cpu")
    moved = sum((p - q).abs().sum() for p, q in zip(a.parameters(), start.parameters()))
    apart = sum((p - q).abs().sum() for p, q in zip(a.parameters(), b.parameters()))
    assert apart < 0.01 * moved


def test_metrics_are_means_over_pairs(pairs, tmp_path):
    "The first step of a batch of five, in micro-batches of two, against the same pairs one by one."
    model = load_model(load_world().base, "cpu")
    table = score_pairs(model, pairs)
    other = LogprobTable(table.kind | dict(weights="another"), table.rows + torch.linspace(-3, 3, len(table.rows)).numpy()[:, None] * [1.0, -0.5])
    *_, m = stage(tmp_path, pairs.select(range(5)), table=other, batch_size=5, token_budget=100)
    rows = [(*table.lookup([p]), *other.lookup([p])) for p in pairs.select(range(5))]
    c, r, rc, rr = (torch.cat(x) for x in zip(*rows))
    margin = 0.5 * ((c - rc) - (r - rr))
    assert margin.abs().min() > 0.01
    want = dict(loss=torch.nn.functional.softplus(-margin).mean(), margin=margin.mean(), reward_accuracy=(margin > 0).float().mean(), logratio_chosen=(c - rc).mean(),
                reward_rejected=0.5 * (r - rr).mean(), gamma=(c - r).mean(), gamma_ref=(rc - rr).mean())
    for k, v in want.items(): assert m[k][0] == pytest.approx(v.item(), abs=1e-4), k
    assert sum(m["lambda_hist"][0]) == 5


def test_a_table_of_another_model_under_this_name_is_refused(pairs, tmp_path):
    model = load_model(load_world().base, "cpu")
    table = score_pairs(model, pairs)
    wrong = LogprobTable(table.kind, table.rows + [0.5, -0.5])
    with pytest.raises(ValueError, match="table of reference"): stage(tmp_path, pairs, model=model, table=wrong)
    assert weights_hash(model) == weights_hash(load_model(load_world().base, "cpu"))


def test_one_pair(pairs, tmp_path):
    *_, m = stage(tmp_path, pairs.select([0]))
    assert len(m) == 1 and m["pairs"][0] == 1


def test_an_empty_chunk_is_refused(pairs, tmp_path):
    with pytest.raises(ValueError, match="pairs"): stage(tmp_path, pairs.select([]))


# ---- settings

@pytest.mark.parametrize("given, plain", [(dict(batch_size=4.0), 4), (dict(seed=0.0), 0), (dict(epochs=np.int64(2)), 2), (dict(lr=np.float64(1e-5)), 1e-5), (dict(beta=1), 1.0)])
def test_numbers_become_the_type_of_their_field(given, plain):
    config, (name,) = TrainConfig(**given), given
    assert getattr(config, name) == plain and type(getattr(config, name)) is type(plain)
    assert yaml.safe_load(yaml.safe_dump(asdict(config))) == asdict(config) and all_batches(9, config, 1) == all_batches(9, TrainConfig(**{name: plain}), 1)


@pytest.mark.parametrize("given", [dict(batch_size=True), dict(batch_size=np.float64(2.5)), dict(lr=float("nan")), dict(beta="1"), dict(shuffle=1), dict(seed=float("inf"))])
def test_what_does_not_fit_is_refused(given):
    with pytest.raises(ValueError, match=f"^{next(iter(given))}: must be"): TrainConfig(**given)


# ---- the first loss

@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("n", [1, 2, 8, 45])
def test_a_table_made_in_another_shape_is_accepted(pairs, tmp_path, precision, n):
    "Of every size of batch, by the packed function, while the table was made by the padded one, pair by pair."
    model = load_model(load_world().base, "cpu")
    table = score_pairs(model, pairs, precision=precision, token_budget=1)
    *_, m = stage(tmp_path, pairs.select(range(n)), model=model, table=table, logprobs=packed_logprobs, precision=precision, batch_size=n)
    assert m["loss"][0] == pytest.approx(math.log(2), abs=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("wrong", ["other weights", "other pairs", "swapped"])
def test_a_wrong_table_is_stopped_before_the_first_update(pairs, tmp_path, precision, wrong):
    model = load_model(load_world().base, "cpu")
    other = perturbed(load_model(load_world().base, "cpu"), 0.1) if wrong == "other weights" else model
    table, rows = score_pairs(model, pairs, precision=precision), score_pairs(other, pairs, precision=precision).rows
    if wrong == "other pairs": rows = pd.DataFrame(np.roll(rows.to_numpy(), 1, axis=0), rows.index, rows.columns)
    if wrong == "swapped": rows = rows.rename(columns={"chosen": "rejected", "rejected": "chosen"})
    with pytest.raises(ValueError, match=f"in {precision}.*computed anew"): stage(tmp_path, pairs, model=model, table=LogprobTable(table.kind, rows), precision=precision)
    assert weights_hash(model) == weights_hash(load_model(load_world().base, "cpu")) and not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_that_is_random_in_training_is_stopped(pairs, tmp_path, precision):
    def noisy(model, batch):
        c, r = response_logprobs(model, batch)
        return (c + 0.5 * torch.randn(len(c)), r) if model.training else (c, r)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=f"both in {precision}: something in this model is random"): stage(tmp_path, pairs, logprobs=noisy, precision=precision)


def test_a_table_of_weights_in_half_precision_is_refused(pairs, tmp_path):
    "Its hash is not that of the fp32 weights which are trained, so nobody would compare a number of it."
    model = load_model(load_world().base, "cpu").bfloat16()
    table = score_pairs(model, pairs, precision="bf16")
    for _ in range(2):                               # the refused call changed nothing, or the second one would pass
        with pytest.raises(ValueError, match="^table: .*half precision.*trainable"): stage(tmp_path, pairs, model=model, table=table)
    before = weights_hash(trainable(model))
    swapped = LogprobTable(table.kind | dict(weights=before), table.rows.rename(columns={"chosen": "rejected", "rejected": "chosen"}))
    with pytest.raises(ValueError, match="other weights"): stage(tmp_path, pairs, model=model.bfloat16(), table=swapped)
    assert weights_hash(model) == before


@pytest.mark.parametrize("change", [lambda model: model.bfloat16(), with_dropout], ids=["bf16", "dropout"])
def test_pairs_are_packed_for_a_model_that_is_not_trainable_yet(pairs, tmp_path, capsys, change):
    model = change(load_model(load_world().base, "cpu"))
    stage(tmp_path, pairs.select(range(8)), model=model, table=score_pairs(load_model(load_world().base, "cpu"), pairs), logprobs=None)
    assert "packing is off" not in capsys.readouterr().out


@pytest.mark.parametrize("loss, again", [(math.nan, math.nan), (0.7, math.inf), (math.inf, 0.7)])
def test_a_loss_that_is_not_finite_is_not_blamed_on_dropout(loss, again):
    with pytest.raises(ValueError, match="nothing can be learned") as e: check_same_twice(loss, again, "fp16")
    assert "dropout" not in str(e.value)


def test_a_loss_that_looks_at_its_micro_batch_is_told_so(pairs, tmp_path):
    def centred(c, r, rc, rr, beta, pairs): return F.softplus(-beta * (c - r - (c - r).mean()))
    with pytest.raises(ValueError, match="each pair alone"): stage(tmp_path, pairs, loss=centred)


def test_the_first_look_is_no_training_time(pairs, tmp_path, monkeypatch):
    def slow(*args):
        time.sleep(1)
        return math.log(2)
    monkeypatch.setattr(trainer, "_first_look", slow)
    row = stage(tmp_path, pairs.select(range(8)))[2].iloc[0]
    assert row["tokens"] / row["tokens_per_second"] < 1


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_table_that_is_trusted_may_be_compared_in_fp32(precision):
    "Where rounding may have raised the alarm. In fp32 there is no other way than a right table."
    batch, table = [dict(of_length(1, 4, 9), key="a")], LogprobTable({}, pd.DataFrame(dict(chosen=-1., rejected=-2.), index=["a"]))
    with pytest.raises(ValueError, match=f"in {precision}.*start again: it is computed anew") as e: check_table(table, batch, torch.zeros(1, 2), 0.1, precision)
    assert ("go on with precision = fp32" in str(e.value)) == (precision != "fp32")


def test_the_limit_by_hand():
    batch = [dict(chosen_ids=[1] * 4, rejected_ids=[1] * 16), dict(chosen_ids=[1] * 9, rejected_ids=[1] * 25)]
    off = torch.tensor([[2.0, -4.0], [3.0, 5.0]])            # one nat per root of a token, everywhere
    assert per_root_token(off, batch) == pytest.approx(1)
    exact = torch.zeros(2, 2)
    assert rounding_limit(exact + off, exact, batch) == pytest.approx(2 ** 0.5 * (1 + 6 / 4))
    assert rounding_limit(exact, exact, batch) == pytest.approx(per_root_token(torch.full((2, 2), 1e-3), batch))


# ---- memory

def test_memory_plan_counts_parameters_and_grows_with_tokens():
    model = load_model(load_world().base, "cpu")
    n = sum(p.numel() for p in model.parameters()) / 2**30
    one, two = (memory_plan(model.config, TrainConfig(token_budget=tokens)) for tokens in (512, 1024))
    assert one["weights"] == one["gradients"] == one["moments"] / 2 == pytest.approx(4 * n) and two["activations"] == pytest.approx(2 * one["activations"], rel=0.05)
    assert memory_plan(model.config, TrainConfig(token_budget=1024, gradient_checkpointing=True))["activations"] < 0.7 * two["activations"]
    for kernel, precision in (("padded", "fp32"), ("flash", "bf16")): assert memory_plan(model.config, TrainConfig(token_budget=512), precision, kernel)["activations"] > 0


@pytest.mark.parametrize("kind", ["bloom", "falcon", "gptj"])
def test_models_that_cannot_be_packed_have_a_plan_too(kind):
    sizes = dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4) if kind == "gptj" else dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    plan = memory_plan(AutoConfig.for_model(kind, vocab_size=96, **sizes), TrainConfig(token_budget=1024))
    assert 0 < plan["activations"] < 1 and plan["weights"] < 0.01


@pytest.mark.parametrize("name, tokens, precision, recomputed", PLANS)
def test_today_s_plan_is_near_the_peaks_that_were_measured(name, tokens, precision, recomputed):
    "`make bench` stored them. The plan of that day is stored, too, and says nothing about today's."
    measured = json.loads(RESULTS.read_text())["plan_gib"][f"{name} {tokens} {precision} {recomputed}"]["measured"]
    plan = memory_plan(shape(name), TrainConfig(token_budget=tokens, gradient_checkpointing=bool(recomputed)), precision)
    assert sum(plan.values()) == pytest.approx(measured, rel=0.15), plan


def test_what_cannot_fit_is_refused_with_the_number(monkeypatch):
    plan = memory_plan(load_model(load_world().base, "cpu").config, TrainConfig())
    check_memory(plan, "cpu")
    with pytest.raises(ValueError, match=f"memory: training needs about {1024 * len(plan)}.. GiB: .*GiB are free on cpu"): check_memory({k: 1024.0 for k in plan} | dict(weights=1024.0), "cpu", loaded=False)


def test_more_memory_holds_more_tokens():
    config = load_model(load_world().base, "cpu").config
    some = [tokens_that_fit(config, gib * 2**30, "bf16", "flash") for gib in (0.05, 0.2, 1)]
    assert some == sorted(some) and some[0] < some[-1] and all(n % 1024 == 0 for n in some)
    assert tokens_that_fit(config, 2**20, "fp32", "padded") == 0


def test_on_a_cpu_the_budget_is_left_alone(pairs):
    config = TrainConfig()
    assert fit(load_model(load_world().base, "cpu"), pairs, config, "fp32", packed_logprobs) is config


@pytest.fixture
def card(monkeypatch):
    "What is asked of a graphics card of `card.memory` bytes, of which `card.free` are free."
    card = SimpleNamespace(memory=2**30, free=2**29, reserved=0, allocated=0)
    for name, answer in dict(
        is_available=lambda: True,
        get_device_capability=lambda device: (7, 5),
        get_device_properties=lambda device: SimpleNamespace(total_memory=card.memory),
        mem_get_info=lambda device: (card.free, card.memory),
        memory_reserved=lambda device: card.reserved,
        memory_allocated=lambda device: card.allocated,
    ).items(): monkeypatch.setattr(torch.cuda, name, answer)
    return card


def of_length(x, c, r): return dict(prompt_ids=[1] * x, chosen_ids=[1] * c, rejected_ids=[1] * r)


@pytest.mark.parametrize("logprobs", [packed_logprobs, response_logprobs])
def test_the_longest_pair_decides_wherever_it_stands(card, capsys, logprobs):
    "On a card that holds more tokens if they are recomputed. A budget counts padded cells where there are any."
    config = load_model(load_world().base, "cpu").config
    card.memory = 2**27
    kept, most = (tokens_that_fit(config, card.memory, "fp32", "padded", recompute) for recompute in (False, True))
    def asked(long):
        fitted = fit(SimpleNamespace(device=torch.device("cuda"), config=config), [of_length(9, 9, 9)] * 300 + [long], TrainConfig(), "fp32", logprobs)
        return fitted.token_budget, fitted.gradient_checkpointing, capsys.readouterr().out.splitlines()
    assert 1024 < kept < most < MOST
    padded = logprobs is response_logprobs
    assert asked(of_length(kept - 300, 100, 100))[:2] == ((most, True) if padded else (kept, False))
    assert asked(of_length(kept, 100, 100))[:2] == (most, True)
    _, recomputed, (first, second) = asked(of_length(most, 100, 100))
    assert recomputed and first.startswith("activations are recomputed") and second.startswith("memory may not be enough") and str(most) in second


def test_a_plan_knows_how_many_tokens_are_responses(card):
    mostly_prompts, mostly_responses = [of_length(18, 1, 1)] * 9, [of_length(2, 8, 10), of_length(4, 7, 9)]
    assert share_of_responses(mostly_prompts) == 0.1 and share_of_responses(mostly_responses) == 34 / 40
    assert share_of_responses(Dataset.from_list(mostly_responses)) == 34 / 40
    config = AutoConfig.for_model("llama", vocab_size=50_000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    few, many = (memory_plan(config, TrainConfig(token_budget=1024), piece=2**40, responses=share) for share in (0.1, 0.85))
    assert many["logits"] == pytest.approx(8.5 * few["logits"], rel=1e-3) and {k: v for k, v in few.items() if k != "logits"} == {k: v for k, v in many.items() if k != "logits"}
    assert plan_for(config, TrainConfig(), "fp32", "cuda", responses=0.85)["logits"] > plan_for(config, TrainConfig(), "fp32", "cuda", responses=0.1)["logits"]
    card.memory = 12 * 2**30
    small, large = (fit(SimpleNamespace(device=torch.device("cuda"), config=config), pairs, TrainConfig(), "fp32", packed_logprobs).token_budget for pairs in (mostly_responses, mostly_prompts))
    assert small == tokens_that_fit(config, card.memory, "fp32", "padded", responses=0.85) < large == tokens_that_fit(config, card.memory, "fp32", "padded", responses=0.1)


@pytest.mark.parametrize("said", [None, "an operation has no deterministic form"])
def test_whether_the_bits_are_the_same_is_tried_once(monkeypatch, said):
    "And again where the answer may be another: of a function, a precision, a mode."
    tried, model = [], torch.nn.Linear(2, 2)
    model.device = torch.device("cuda")
    def try_out(*how):
        tried.append(how)
        if said: raise RuntimeError(said + ". You can")
    monkeypatch.setattr(trainer, "try_out", try_out)
    def why(*how): return trainer.why_not_same_bits(model, *how)
    assert why(packed_logprobs, "bf16") == why(packed_logprobs, "bf16") == said and len(tried) == 1
    assert why(packed_logprobs, "fp16") == why(response_logprobs, "fp16") == said and len(tried) == 3
    model.eval()
    assert why(response_logprobs, "fp16") == said and len(tried) == 4


def test_a_plan_recomputes_where_the_card_would(card):
    config = load_model(load_world().base, "cpu").config
    def plan(**changes): return plan_for(config, TrainConfig(**changes), "fp32", "cuda")
    kept, card.memory = plan(), 2**24
    assert plan(token_budget=1536)["activations"] == kept["activations"]
    assert plan() == plan(gradient_checkpointing=True) != kept


def test_what_pytorch_holds_for_reuse_is_free(card):
    card.reserved, card.allocated = 2**28, 2**27
    assert free_memory("cuda") == 2**29 + 2**27


# ---- gradients that are not finite

@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_reaches_no_weight(pairs, tmp_path, precision):
    model = load_model(load_world().base, "cpu")
    with pytest.raises(ValueError, match="not finite.*no weight was changed"): stage(tmp_path, pairs, model=model, precision=precision, logprobs=overflows_at(3, 4))
    assert all(p.isfinite().all() for p in model.parameters()) and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "checkpoint").exists()


def test_skipping_for_ever_is_an_error(pairs, tmp_path):
    with pytest.raises(ValueError, match="20 steps in a row"): stage(tmp_path, pairs.select(range(25)), precision="fp16", batch_size=1, logprobs=overflows_at(*range(1, 99)))


def test_gradients_left_by_a_refused_call_are_not_added(pairs, tmp_path):
    model = load_model(load_world().base, "cpu")
    table = score_pairs(model, pairs)
    with pytest.raises(ValueError, match="table of reference"): stage(tmp_path / "a", pairs, model=model, table=LogprobTable(table.kind, table.rows + [5.0, -5.0]))
    assert weights_hash(stage(tmp_path / "b", pairs, model=model)[0]) == weights_hash(stage(tmp_path / "c", pairs)[0])


def test_accumulation_steps_of_the_environment_do_not_divide(pairs, tmp_path, monkeypatch):
    want = stage(tmp_path / "a", pairs.select(range(8)))[2]["grad_norm"][0]
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert stage(tmp_path / "b", pairs.select(range(8)))[2]["grad_norm"][0] == want


# ---- a folder belongs to one stage

@pytest.mark.parametrize("named, other", [("lr = 0.0001, not 0.0002", dict(lr=2e-4)), ("beta", dict(beta=0.4)), ("precision = fp32, not bf16", dict(precision="bf16")), ("pairs", dict(n=15))])
def test_a_folder_of_another_stage_is_refused(pairs, tmp_path, named, other):
    stage(tmp_path, pairs.select(range(16)))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    model, other = load_model(load_world().base, "cpu"), dict(other)
    with pytest.raises(ValueError, match=named): stage(tmp_path, pairs.select(range(other.pop("n", 16))), model=model, **other)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before and weights_hash(model) == weights_hash(load_model(load_world().base, "cpu"))


def test_a_folder_with_another_reference_is_refused(pairs, tmp_path):
    some, model = pairs.select(range(8)), load_model(load_world().base, "cpu")
    table = score_pairs(model, some)
    stage(tmp_path, some)
    with pytest.raises(ValueError, match="reference"): stage(tmp_path, some, table=LogprobTable(table.kind | dict(weights="another"), table.rows))


@pytest.mark.parametrize("other", [dict(save_every=1), dict(gradient_checkpointing=True)])
def test_a_finished_folder_is_found_finished(pairs, tmp_path, other):
    some = pairs.select(range(16))
    first, *_ = stage(tmp_path, some)
    again, summary, m = stage(tmp_path, some, **other)
    assert weights_hash(first) == weights_hash(again) and summary["steps"] == len(m) == 2


def test_a_log_that_lost_lines_is_refused(pairs, tmp_path):
    some = pairs.select(range(16))
    model, *_ = stage(tmp_path, some)
    (tmp_path / "metrics.jsonl").write_bytes(b"{}\n")
    (tmp_path / "stage.json").touch()
    with pytest.raises(ValueError, match=f"lines were lost; remove {tmp_path / 'checkpoint'} and {tmp_path / 'stage.json'}, and run again"): stage(tmp_path, some)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"{}\n"
    shutil.rmtree(tmp_path / "checkpoint")
    again, _, m = stage(tmp_path, some)
    assert weights_hash(again) == weights_hash(model) and len(m) == 2


def test_the_scaler_goes_on_with_the_optimizer(pairs, tmp_path):
    "The first stage halves its scale once; the second one begins there."
    some = pairs.select(range(16))
    model, *_ = stage(tmp_path / "1", some, precision="fp16", logprobs=overflows_at(1))
    table = score_pairs(model, some, precision="fp16")
    train_stage(model, some, table, TrainConfig(beta=0.5, lr=1e-4, batch_size=8, precision="fp16"), tmp_path / "2", 2, previous=tmp_path / "1")
    scale = [torch.load(tmp_path / t / "checkpoint" / "state.pt", weights_only=True)["scaler"]["scale"] for t in "12"]
    assert scale[0] == scale[1] == 2 ** 15


# ---- what lies on the disk

def interrupted(folder, pairs, call=9):
    "A stage that was stopped, with a checkpoint after every second step."
    with pytest.raises(Stop): stage(folder, pairs, save_every=2, logprobs=stops_at(call))
    return folder / "checkpoint" / "state.pt"


def flipped(data, at): return data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]


@pytest.mark.parametrize("change", [lambda d: b"", lambda d: d[:len(d) // 2], lambda d: b"null", lambda d: bytes(len(d)), lambda d: flipped(d, len(d) // 4), lambda d: flipped(d, 3 * len(d) // 4)],
                         ids=["empty", "cut", "null", "zeros", "a bit of the model", "a bit of the moments"])
def test_a_broken_checkpoint_is_one_line_and_can_be_removed(pairs, tmp_path, change):
    path = interrupted(tmp_path / "s", pairs)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match="cannot be used.*remove it") as e: stage(tmp_path / "s", pairs)
    assert str(path) in str(e.value) and len(str(e.value).splitlines()) == 1
    path.unlink()
    assert weights_hash(stage(tmp_path / "s", pairs)[0]) == weights_hash(stage(tmp_path / "alone", pairs)[0])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError(), PermissionError(13, "denied")])
def test_a_checkpoint_is_not_blamed_for_what_the_machine_lacks(pairs, tmp_path, monkeypatch, error):
    interrupted(tmp_path, pairs)
    def refuse(*args): raise error
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", refuse)
    with pytest.raises(type(error)) as e: stage(tmp_path, pairs)
    assert e.value is error


def test_weights_that_are_not_those_of_the_checkpoint(pairs, tmp_path):
    "A whole file, with checksums that agree, in which somebody changed a weight."
    path = interrupted(tmp_path, pairs)
    saved = torch.load(path, weights_only=True)
    next(iter(saved["model"].values())).view(-1)[0] += 1
    torch.save(saved, path)
    with pytest.raises(ValueError, match="its weights are .*, not "): stage(tmp_path, pairs)


def test_a_full_disk_at_a_checkpoint(pairs, tmp_path):
    "One line; the checkpoint before it stays, nothing half-written does, and the stage goes on to the same bits."
    path = interrupted(tmp_path / "s", pairs)
    before, whole = path.read_bytes(), (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, resource.RLIM_INFINITY))
    try:
        with pytest.raises(OSError) as e: stage(tmp_path / "s", pairs, save_every=2)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, whole)
    assert str(e.value) == f"{path}: could not be written (disk full?)"
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["state.pt"]
    assert weights_hash(stage(tmp_path / "s", pairs)[0]) == weights_hash(stage(tmp_path / "alone", pairs)[0])


def test_links_are_not_written_through(pairs, tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "s"
    victim.write_text("mine")
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint" / ".state.pt.tmp").symlink_to(victim)
    stage(folder, pairs)
    (tmp_path / "t").mkdir(); (tmp_path / "t" / "metrics.jsonl").symlink_to(victim)
    with pytest.raises(ValueError, match="metrics.jsonl: is a link"): stage(tmp_path / "t", pairs)
    assert victim.read_text() == "mine"


def test_one_optimizer_wants_the_checkpoint_before_it(pairs, tmp_path):
    config = TrainConfig(precision="fp32")
    model = load_model(load_world().base, "cpu")
    with pytest.raises(ValueError, match=f"{tmp_path / 'gone'}: its checkpoint is missing"): train_stage(model, pairs, score_pairs(model, pairs), config, tmp_path / "s", 2, previous=tmp_path / "gone", schedule=(1, 3))


@pytest.mark.parametrize("given", [dict(seed=2**63), dict(seed=99999999999999999999), dict(beta=1e7), dict(lr=1e39), dict(epochs=100_000_000)])
def test_what_could_not_be_computed_is_refused_at_once(given):
    name = next(iter(given))
    with pytest.raises(ValueError, match=f"^{name}: must be at most"): TrainConfig(**given)


@pytest.mark.parametrize("beta", [1e4, 1e6])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_large_beta_makes_no_false_alarm(pairs, tmp_path, beta, precision):
    "Against its own table, and against another model's, where the loss has five digits before the point."
    model = load_model(load_world().base, "cpu")
    own = score_pairs(model, pairs, precision=precision)
    stage(tmp_path / "own", pairs, model=model, table=own, beta=beta, precision=precision)
    model = load_model(load_world().base, "cpu")
    away = LogprobTable(own.kind | dict(weights="another"), own.rows + [0.5, -0.5])
    stage(tmp_path / "away", pairs, model=model, table=away, beta=beta, precision=precision)


# ---- a loss of one's own, and schedules

def gain(c, r, rc, rr): return (c - r) - (rc - rr)
def written_out(c, r, rc, rr, beta, pairs): return F.softplus(-beta * gain(c, r, rc, rr))
def ipo(c, r, rc, rr, beta, pairs): return (gain(c, r, rc, rr) - 1 / (2 * beta)) ** 2
def with_sft(c, r, rc, rr, beta, pairs): return written_out(c, r, rc, rr, beta, pairs) - c / torch.tensor([len(p["chosen_ids"]) for p in pairs])
def one_number(c, r, rc, rr, beta, pairs): return (r - c).mean()
def a_list(c, r, rc, rr, beta, pairs): return [0.0] * len(c)
def in_numpy(c, r, rc, rr, beta, pairs): return (r - c).detach().numpy()
def detached(c, r, rc, rr, beta, pairs): return (r - c).detach()
def four(c, r, rc, rr): return r - c


def test_the_default_written_out_trains_the_same_bits(pairs, tmp_path):
    a, one, m = stage(tmp_path / "a", pairs)
    b, two, n = stage(tmp_path / "b", pairs, loss=written_out)
    assert weights_hash(a) == weights_hash(b) and one == two
    pd.testing.assert_frame_equal(*(x.drop(columns="tokens_per_second") for x in (m, n)))


@pytest.mark.parametrize("logprobs", [response_logprobs, packed_logprobs])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_look_predicts_the_first_loss_of_any_function(pairs, tmp_path, precision, logprobs):
    "The policy starts beside its reference, so the loss is not the one at gain zero."
    model = load_model(load_world().base, "cpu")
    start = score_pairs(model, pairs, precision=precision, logprobs=logprobs)
    moved = LogprobTable(start.kind | dict(weights="another"), start.rows + np.linspace(-2, 2, len(pairs))[:, None] * [1.0, -0.5])
    config = dict(loss=with_sft, precision=precision, batch_size=16)
    table = score_pairs(model, pairs)
    first = [pairs[i] for i in all_batches(len(pairs), TrainConfig(batch_size=16), 1)[0][1]]
    want = with_sft(*table.lookup(first), *moved.lookup(first), 0.5, first).mean().item()
    plain = written_out(*table.lookup(first), *moved.lookup(first), 0.5, first).mean().item()
    (tmp_path / "s").mkdir()
    summary = train_stage(model, pairs, moved, TrainConfig(**dict(beta=0.5, lr=1e-4, token_budget=200) | config), tmp_path / "s", start=start, logprobs=logprobs)
    near = 1e-4 if precision == "fp32" else 0.05
    assert summary["implied_first_loss"] == pytest.approx(want, abs=near) and summary["first_loss"] == pytest.approx(want, abs=near)
    assert abs(want - plain) > 0.1


def test_ipo_starts_at_one_over_four_beta_squared(pairs, tmp_path):
    for beta in (0.5, 0.05):
        _, summary, _ = stage(tmp_path / str(beta), pairs.select(range(8)), loss=ipo, beta=beta)
        assert summary["first_loss"] == pytest.approx(1 / (4 * beta**2), rel=1e-4) == summary["implied_first_loss"]


@pytest.mark.parametrize("loss, said", [(one_number, r"one_number must return one number per pair, a tensor of shape \(\d,\); it returned torch.Size\(\[\]\)"),
                                        (a_list, "it returned list"), (in_numpy, "it returned ndarray"), (detached, "what detached returns has no gradient")])
def test_a_function_that_returns_something_else_is_named(pairs, tmp_path, loss, said):
    with pytest.raises(ValueError, match=said): stage(tmp_path, pairs, loss=loss)


@pytest.mark.parametrize("loss, said", [("ipo", "which only Python can give; got 'ipo'"), (lambda *six: six, "with a name"), (four, r"four must take \(chosen, rejected"), (7, "got 7"),
                                        (torch.add, r"add must take \(chosen, rejected")])
def test_what_cannot_be_a_loss_is_refused_beforehand(loss, said):
    with pytest.raises(ValueError, match=f"loss: .*{said}"): TrainConfig(loss=loss)


def test_label_smoothing_belongs_to_the_default():
    with pytest.raises(ValueError, match="label_smoothing"): TrainConfig(loss=ipo, label_smoothing=0.1)


def test_a_stage_goes_on_with_its_own_loss_only(pairs, tmp_path):
    kw = dict(loss=ipo, save_every=2, lr=1e-5)
    straight = stage(tmp_path / "a", pairs, **kw)[0]
    with pytest.raises(Stop): stage(tmp_path / "b", pairs, logprobs=stops_at(12), **kw)
    for other in (None, with_sft):
        with pytest.raises(ValueError, match="loss = ipo, not"): stage(tmp_path / "b", pairs, **kw | dict(loss=other))
    assert weights_hash(stage(tmp_path / "b", pairs, **kw)[0]) == weights_hash(straight)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("total, warmup", [(1, 0.1), (10, 0.0), (10, 0.25), (37, 0.1), (10, 1.0)])
def test_schedules_are_those_of_transformers_after_warmup(schedule, total, warmup):
    from transformers import get_scheduler
    warm = math.ceil(warmup * total)
    config = TrainConfig(lr=3e-4, warmup=warmup, schedule=schedule)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    theirs, scheduler = [], get_scheduler(schedule, optimizer, warm, total)
    for _ in range(total):
        theirs.append(scheduler.get_last_lr()[0]); optimizer.step(); scheduler.step()
    ours = [learning_rate(step, total, config) for step in range(total)]
    assert ours[warm:] == pytest.approx(theirs[warm:], rel=1e-9) and ours[:warm] == pytest.approx([3e-4 * (i + 1) / warm for i in range(warm)])
    assert all(rate > 0 for rate in ours)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_schedule_goes_on_where_it_was_and_no_other_may(pairs, tmp_path, schedule):
    kw = dict(schedule=schedule, save_every=2)
    straight, _, m = stage(tmp_path / "a", pairs, **kw)
    with pytest.raises(Stop): stage(tmp_path / "b", pairs, logprobs=stops_at(12), **kw)
    with pytest.raises(ValueError, match=f"schedule = {schedule}, not linear"): stage(tmp_path / "b", pairs, **kw | dict(schedule="linear"))
    continued, _, n = stage(tmp_path / "b", pairs, **kw)
    assert weights_hash(continued) == weights_hash(straight) and n["lr"].tolist() == m["lr"].tolist()
    assert weights_hash(stage(tmp_path / "c", pairs)[0]) != weights_hash(straight)


def test_a_checkpoint_from_before_there_were_schedules_goes_on(pairs, tmp_path):
    "Its identity had `schedule` for what is `steps` now, and neither schedule nor loss."
    with pytest.raises(Stop): stage(tmp_path, pairs, logprobs=stops_at(12), save_every=2)
    path = tmp_path / "checkpoint/state.pt"
    saved = torch.load(path, weights_only=True)
    identity = saved["state"]["identity"]
    identity["schedule"] = identity.pop("steps"); del identity["loss"]
    torch.save(saved, path)
    with pytest.raises(ValueError, match="schedule = linear, not cosine"): stage(tmp_path, pairs, save_every=2, schedule="cosine")
    assert stage(tmp_path, pairs, save_every=2)[1]["steps"] == 6


def test_a_schedule_that_there_is_not():
    with pytest.raises(ValueError, match="schedule: must be one of linear, cosine, constant; got 'polynomial'"): TrainConfig(schedule="polynomial")
