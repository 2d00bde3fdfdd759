"The protocol's bookkeeping, on tables whose answer is known; and every kind of cell once."
import json

import numpy as np
import pandas as pd
import pytest

from sdpo_nb import experiments as ex


def rows(values, method="m"): # (worlds, seeds, prompts)
    return pd.DataFrame([dict(world=w + 1, seed=s, method=method, sampled=list(v), greedy=list(v), kl=list(10 * v))
                         for w, per in enumerate(values) for s, v in enumerate(per)]).sample(frac=1, random_state=0)


def test_outcome_puts_worlds_seeds_and_prompts_in_order():
    values = np.random.default_rng(0).normal(size=(3, 2, 5))
    np.testing.assert_allclose(ex.outcome(rows(values), "sampled"), values)
    np.testing.assert_allclose(ex.outcome(rows(values), "kl"), 10 * values)


def test_outcome_refuses_a_hole():
    r = rows(np.zeros((3, 2, 5)))
    with pytest.raises(ValueError, match="5 rows for 3 worlds and 2 seeds"): ex.outcome(r.iloc[1:], "sampled")


def test_a_ladder_is_read_between_its_steps():
    ladder = [rows(np.full((2, 1, 3), v)) for v in (0.5, 0.2, 0.4)]       # kl is ten times the reward
    assert ex.at_kl(ladder, np.array([[[3.0]], [[4.5]]])).ravel().round(6).tolist() == [0.3, 0.45]
    with pytest.raises(ValueError, match="6.00 nats is outside the ladder, 2.00 to 5.00"): ex.at_kl(ladder, np.full((2, 1, 1), 6.0))


def test_holm():
    assert ex.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and ex.holm([0.5, 0.9]) == [1, 1]


def test_p_value_is_exact():
    assert ex.p_value(np.ones((10, 2, 3))) == 2 / 2**10 and ex.p_value(np.ones((5, 1, 1))) == 2 / 2**5
    assert ex.p_value(np.array([1., -1., 2., -2.]).reshape(4, 1, 1)) == 1
    g = np.random.default_rng(0)
    assert 0.02 < np.mean([ex.p_value(g.normal(size=(8, 1, 1))) <= 0.05 for _ in range(400)]) < 0.08      # false alarms


def test_variances_are_told_apart():
    g = np.random.default_rng(0)
    v = ex.variances(g.normal(0, 0.3, (200, 1, 1)) + g.normal(0, 0.1, (200, 6, 1)) + np.zeros((1, 1, 3)))
    assert abs(v["worlds"] - 0.3) < 0.03 and abs(v["seeds"] - 0.1) < 0.01


def test_choose_takes_the_best_of_each_method():
    r = pd.DataFrame([dict(method=m, settings=json.dumps(dict(beta=b)), sampled=[x]) for m, b, x in (("a", 1, 0.2), ("a", 2, 0.4), ("a", 2, 0.1), ("b", 1, 0.9), ("b", 2, 0.8))])
    assert ex.choose(r) == dict(a=dict(beta=2), b=dict(beta=1))


def test_every_method_runs_and_a_second_call_adds_nothing(tmp_path):
    cells = ex.small_cells()
    found = ex.run_grid(cells, tmp_path).set_index("method")
    before = (tmp_path / "runs.parquet").stat().st_mtime_ns
    assert len(ex.run_grid(cells, tmp_path)) == len(cells) and (tmp_path / "runs.parquet").stat().st_mtime_ns == before
    assert set(found.index) == {*ex.METHODS, *ex.BASELINES} and max(map(abs, found.loc["S", "kl"])) < 1e-9
    trained = found.loc[list(ex.METHODS)]
    assert (trained["kl"].map(np.mean) > 0).all() and trained["tokens"].nunique() == 1       # equal budgets
    assert len({tuple(x) for x in trained["sampled"]}) > 3                                     # and not one and the same method


def test_a_cell_that_fails_is_named_after_the_others_are_through(tmp_path):
    good, bad = ex.Cell(0, 0, "S", {}, "validation", 8), ex.Cell(0, 0, "DPO", dict(beta=-1.0), "validation", 8)
    with pytest.raises(RuntimeError, match="beta"): ex.run_grid([bad, good], tmp_path)
    assert ex.rows_of([bad, good], tmp_path)["method"].tolist() == ["S"]
