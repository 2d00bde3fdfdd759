"""One stage: every precision, from every kind of folder, interrupted anywhere."""
import pandas as pd
import pytest
import torch

from sdpo_nb.logprobs import LogprobTable, load_model, load_tokenizer, response_logprobs, score_pairs, weights_hash
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.trainer import TrainConfig, learning_rate, train_stage
from sdpo_nb.world import load_world


@pytest.fixture(scope="module")
def pairs():
    torch.set_num_threads(1)
    w = load_world()
    return tokenize_pairs(load_pairs(w.sources["digest"]), load_tokenizer(w.base), "digest").pairs.select(range(45))


def stage(folder, pairs, model=None, table=None, logprobs=response_logprobs, **kw):
    "Train; returns the model, the summary and the metrics."
    model = model or load_model(load_world().base, "cpu")
    config = TrainConfig(**dict(beta=0.5, lr=1e-4, batch_size=8, micro_batch=4, precision="fp32") | kw)
    table = table or score_pairs(model, pairs, precision=config.precision)
    summary = train_stage(model, pairs, table, config, folder, logprobs=logprobs)
    return model, summary, pd.read_json(folder / "metrics.jsonl", lines=True)


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


@pytest.mark.parametrize("other", [dict(micro_batch=1), dict(micro_batch=3), dict(micro_batch=8), dict(gradient_checkpointing=True)])
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
    *_, m = stage(tmp_path, pairs.select(range(5)), table=other, batch_size=5, micro_batch=2)
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
    with pytest.raises(ValueError, match="first loss"): stage(tmp_path, pairs, model=model, table=wrong)
    assert weights_hash(model) == weights_hash(load_model(load_world().base, "cpu"))


def test_one_pair(pairs, tmp_path):
    *_, m = stage(tmp_path, pairs.select([0]))
    assert len(m) == 1 and m["pairs"][0] == 1
