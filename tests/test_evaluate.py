"Chapter 08: what must be refused, and equality with other ways to compute the same."
import math

import numpy as np
import pandas as pd
import pytest
import torch

from transformers import GenerationConfig

from sdpo_nb import evaluate as ev, graded
from sdpo_nb.logprobs import LogprobTable, response_logprobs
from sdpo_nb.world import load_base, load_world, prompt_ids, respond, respond_ids


@pytest.fixture(scope="module")
def base():
    torch.set_num_threads(1)
    w = load_world()
    return *load_base(w), w.test[:40]


@pytest.mark.parametrize("values", [[], [math.nan], [1, math.nan], [[1, 2], [3, 4]]])
def test_bootstrap_refuses(values):
    for asked in (ev.bootstrap, ev.interval):
        with pytest.raises(ValueError, match="bootstrap: needs finite numbers"): asked(values)


def test_bootstrap_of_equal_numbers_does_not_wander():
    assert set(ev.bootstrap([2.0] * 5)) == {2.0} and ev.interval([3.0])[0] == 3 and math.isnan(ev.interval([3.0])[1])


def test_bootstrap_draws_on_every_level():
    g = np.random.default_rng(0)
    worlds = np.broadcast_to(g.normal(size=(6, 1, 1)), (6, 4, 50))      # all there is lies between worlds
    assert abs(ev.bootstrap(worlds).std() / (worlds[:, 0, 0].std() / 6**0.5) - 1) < 0.1
    seeds = np.broadcast_to(g.normal(size=(1, 8, 1)), (1, 8, 50))
    assert abs(ev.bootstrap(seeds).std() / (seeds[0, :, 0].std() / 8**0.5) - 1) < 0.1
    prompts = np.broadcast_to(g.normal(size=(1, 1, 50)), (1, 8, 50))    # the same prompts for all seeds: eight seeds do not make them more
    assert abs(ev.bootstrap(prompts).std() / (prompts[0, 0].std() / 50**0.5) - 1) < 0.1


def test_steps_are_the_log_probabilities_of_chapter_02(base):
    model, tok, prompts = base
    ys = respond_ids(model, tok, prompts, seed=3)
    assert len({len(y) for y in ys}) > 2 and len({len(prompt_ids(tok, p)) for p in prompts}) > 2
    got = ev._logp(model, [prompt_ids(tok, p) for p in prompts], ys)
    pairs = [dict(prompt_ids=prompt_ids(tok, p), chosen_ids=y, rejected_ids=y[:1]) for p, y in zip(prompts, ys)]
    with torch.no_grad(): want = response_logprobs(model, pairs)[0]
    torch.testing.assert_close(got.float(), want, atol=1e-4, rtol=1e-5)


def test_kl(base):
    model, tok, prompts = base
    assert ev.response_kl(model, model, tok, prompts).abs().max() < 1e-9
    sharp = ev.response_kl(model, model, tok, prompts, tau=0.5)
    assert sharp.min() > 0 and ev.response_kl(model, model, tok, prompts, tau=0.9).mean() < sharp.mean()
    assert torch.allclose(ev.response_kl(model, model, tok, prompts, tau=0.5, batch=7), sharp, atol=1e-6)


def test_frontier_begins_at_S(base):
    model, tok, prompts = base
    curve = ev.frontier(model, tok, prompts, [1e12, 5.0, 0.1])
    first = curve.set_index("beta").loc[1e12]
    sampled = np.mean([[ev.true_reward(p, y) for p, y in zip(prompts, respond(model, tok, prompts, seed=100 + s))] for s in range(20)])
    assert abs(first["reward"] - sampled) < 0.03 and abs(first["kl"]) < 1e-9 and first["unlisted"] < 0.2
    assert curve.sort_values("beta")["reward"].iloc[0] > 0.98


def test_excess_is_a_difference_at_equal_kl():
    curve = pd.DataFrame(dict(kl=[2.0, 0.0, 1.0], reward=[0.9, 0.5, 0.8]))
    assert ev.excess(0.7, 0.5, curve) == pytest.approx(0.05) and ev.excess(0.9, 2.0, curve) == 0


def test_win_rate_refuses():
    with pytest.raises(ValueError, match="judge: 2.0 for prompt 0"): ev.win_rate(lambda p, a, b: 2, ["x"], ["a"], ["b"])
    with pytest.raises(ValueError, match="2 prompts, 1 of our answers"): ev.win_rate(lambda p, a, b: 1, ["x", "y"], ["a"], ["b", "c"])
    with pytest.raises(ValueError, match="no prompts"): ev.win_rate(lambda p, a, b: 1, [], [], [])


def test_win_rate_counts():
    def longer(p, a, b): return 0.5 + 0.5 * np.sign(len(a) - len(b))
    got = ev.win_rate(longer, ["p"] * 4, ["aa", "a", "a", "aaa"], ["b", "bb", "b", "b"])
    assert got["wins"][0] == 0.625 and got["ties"] == 0.25 and got["contradicted"] == 0
    always = ev.win_rate(lambda p, a, b: 0.9 if a == "w" else 0.1, ["p"] * 20, ["w"] * 20, ["l"] * 20) # 1 - 0.1 is not quite 0.9
    assert always["wins"][0] == pytest.approx(0.9) and always["contradicted"] == 0
    assert ev.win_rate(lambda p, a, b: float(a == "w"), ["p"] * 20, ["w"] * 20, ["l"] * 20)["wins"] == pytest.approx((1, 0.8389, 1), abs=1e-4)


@pytest.mark.parametrize("own", [dict(repetition_penalty=5.0), dict(no_repeat_ngram_size=1), dict(suppress_tokens=[5, 6, 7, 8]), dict(num_beams=4)])
def test_answers_are_those_of_the_model_alone(own, base):
    "Whatever its own settings of generation are; they stay."
    model, tok, prompts = base
    ids = [prompt_ids(tok, p) for p in prompts[:12]]
    def said(): return ev.greedy_answers(model, tok, ids, 8), graded.sampled_ids(model, tok, ids, 0., max_new=8), graded.sampled_ids(model, tok, ids, 1., max_new=8)
    want, before = said(), model.generation_config
    try:
        model.generation_config = GenerationConfig(**own)
        assert said() == want
        assert all(getattr(model.generation_config, name) == value for name, value in own.items())
    finally: model.generation_config = before


def test_held_out_names_columns_and_pairs(base):
    def table(chosen, rejected): return LogprobTable({}, pd.DataFrame(dict(chosen=chosen, rejected=rejected), index=["a", "b", "c"], dtype="float32"))
    pairs = [dict(key=k) for k in "abc"]
    now, before = table([1., 1., 1.], [0., 0., 0.]), table([0., 2., 2.], [1., 1., 0.])   # gamma: 1 1 1, and before -1 1 2
    got = ev.held_out(now, before, pairs, beta=0.5)
    assert got["change of gamma"][0] == pytest.approx(1 / 3) and got["prefers chosen"][0] == 1
    assert got["log-ratio of chosen"][0] == pytest.approx(-1 / 3) and got["log-ratio of rejected"][0] == pytest.approx(-2 / 3)
    assert got["reward accuracy"][0] == pytest.approx(0.5)                               # up, equal, down
    losses = [math.log1p(math.exp(-0.5 * change)) for change in (2, 0, -1)]
    assert got["loss"][0] == pytest.approx(sum(losses) / 3)
    mean, low, high = got["change of gamma"]
    assert high - mean == pytest.approx(4.302653 * np.std([2, 0, -1], ddof=1) / math.sqrt(3), rel=1e-5) and low < mean   # t with 2 degrees of freedom


def test_signs_of_a_run_with_one_stage_and_one_pair():
    gammas = pd.DataFrame(dict(model=["M_0", "M_1"], chunk="a", gamma=[0., 1.]))
    assert ev.failure_signs(gammas, pd.DataFrame(dict(stage=[1], loss=[0.7]))) == []


def test_signs_where_every_stage_began_at_S():
    "Stage 2 has made its own chunk better than S, though the model of stage 1 was better there; it never learned the chunk of stage 1."
    of_S = np.random.default_rng(0).normal(size=200)
    models = dict(M_0=(of_S, of_S), M_1=(of_S + 2, of_S + 3), M_2=(of_S - 1, of_S + 2))
    gammas = pd.concat([pd.DataFrame(dict(model=m, chunk=c, gamma=v)) for m, both in models.items() for c, v in zip("ab", both)])
    metrics = pd.DataFrame(dict(stage=[1, 1, 2, 2], loss=[0.69, 0.5, 0.69, 0.5]))
    assert [s.split(":")[0] for s in ev.failure_signs(gammas, metrics)] == ["forgetting", "made worse"]
    assert ev.failure_signs(gammas, metrics, from_S=True) == []
    assert ev.failure_signs(gammas, metrics[metrics["stage"] == 1], from_S=True) == [] # nothing kept of stage 2


def test_a_loss_that_is_no_number_is_no_good_end():
    loss = pd.Series([0.69, 0.5] + [math.nan] * 6)
    assert math.isnan(ev.ends_above(loss)[0]) and ev.ends_above(pd.Series([0.69, math.inf, 0.5, 0.4, 0.3])) is None and ev.ends_above(loss[:0]) is None
    gammas = pd.DataFrame(dict(model=["M_0", "M_1"], chunk="a", gamma=[0., 1.]))
    assert [s.split(":")[0] for s in ev.failure_signs(gammas, pd.DataFrame(dict(stage=1, loss=loss)))] == ["instability"]


def test_forgetting_is_counted_from_the_best_so_far():
    scores = pd.DataFrame(dict(a=[0.5, 0.9, 0.7, 0.8]))
    assert ev.forgetting(scores)["a"].round(3).tolist() == [0, 0, 0.2, 0.1]


def test_stability_of_a_constant_loss(): assert ev.stability([0.5] * 20) == dict(sd=0.0, robust_sd=0.0, spikes=[])


def test_the_interval_of_a_loss_is_not_negative():
    "Two pairs: Student's formula would go far below zero. The other quantities may be negative, and keep their ends; of one pair there is no interval."
    def table(chosen): return LogprobTable({}, pd.DataFrame(dict(chosen=chosen, rejected=[0., 0.]), index=["a", "b"], dtype="float32"))
    now, before, pairs = table([9., -2.]), table([0., 0.]), [dict(key="a"), dict(key="b")]
    got = ev.held_out(now, before, pairs, beta=0.5)
    mean, low, high = got["loss"]
    losses = [math.log1p(math.exp(-0.5 * change)) for change in (9, -2)]
    half = 12.7062047 * np.std(losses, ddof=1) / math.sqrt(2)
    assert mean == pytest.approx(sum(losses) / 2) and high == pytest.approx(mean + half) and mean - half < low == 0
    assert got["change of gamma"][1] < 0 and got["gamma"][1] < 0
    one = ev.held_out(now, before, pairs[:1], beta=0.5)["loss"]
    assert one[0] == pytest.approx(losses[0]) and math.isnan(one[1]) and math.isnan(one[2])


def test_gamma_per_token_divides_each_response_by_its_own_length():
    table = LogprobTable({}, pd.DataFrame(dict(chosen=[-6., -8.], rejected=[-2., -9.]), index=["a", "b"], dtype="float32"))
    pairs = [dict(key="a"), dict(key="b")]
    got = ev.held_out(table, table, pairs, 0.5, torch.tensor([[6, 1], [4, 3]]))
    assert got["gamma per token"][0] == pytest.approx(((-1 + 2) + (-2 + 3)) / 2) and got["gamma"][0] == pytest.approx((-4 + 1) / 2)
    assert set(got) - set(ev.held_out(table, table, pairs, 0.5)) == {"gamma per token"}
