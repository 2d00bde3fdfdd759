"""Orders, cuts and readings of the partition, on hand-made tables."""
import json, math

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset

from sdpo_nb.logprobs import LogprobTable
from sdpo_nb.partition import ORDERS, measure_source, partition, wilson
from sdpo_nb.preferences import Source


def source(name, gammas, chosen=3, rejected=3):
    "A source whose pairs have these gammas: (Source, rows of a table)."
    keys = [f"{name}-{i}" for i in range(len(gammas))]
    pairs = Dataset.from_list([dict(key=k, prompt_ids=[1], chosen_ids=[2] * chosen, rejected_ids=[3] * rejected, truncated=i == 0) for i, k in enumerate(keys)])
    return Source(name, pairs, {}), pd.DataFrame(dict(chosen=gammas, rejected=[0.0] * len(gammas)), index=keys, dtype="float32")


def world(**gammas):
    made = {n: source(n, g) for n, g in gammas.items()}
    return [s for s, _ in made.values()], LogprobTable({}, pd.concat([r for _, r in made.values()]))


@pytest.mark.parametrize("p, n, want", [(0.5, 10, (0.2366, 0.7634)), (0.9, 50, (0.7864, 0.9565)), (0.0, 20, (0.0, 0.1611)), (1.0, 1, (0.2065, 1.0))])
def test_wilson_known_values(p, n, want): assert wilson(p, n) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("p, n", [(0.5, 0), (math.nan, 5), (1.5, 5), (-0.1, 5)])
def test_no_share_no_interval(p, n):
    with pytest.raises(ValueError, match=f"p = {p}, n = {n}"): wilson(p, n)


def test_equal_accuracy_keeps_the_given_order_both_ways():
    sources, table = world(a=[1, -1], b=[1, 1], c=[2, -2], d=[-1, -1])
    assert partition(sources, table).names == ["b", "a", "c", "d"]
    assert partition(sources, table, "hard_to_easy").names == ["d", "a", "c", "b"]
    assert partition(sources, table, "as_given").names == ["a", "b", "c", "d"]


def test_ties_count_one_half():
    (s,), table = world(a=[0, 0, 1, -1, 1])
    m = measure_source(s, table)
    assert (m["accuracy"], m["ties"], m["n"], m["truncated"]) == (pytest.approx(0.6), 2, 5, pytest.approx(0.2))


def test_random_keeps_sizes_and_follows_its_seed():
    sources, table = world(a=[1] * 5, b=[-1] * 9, c=[1, -1] * 3)
    ordered, one, two = partition(sources, table), partition(sources, table, "random", seed=1), partition(sources, table, "random", seed=2)
    state = torch.get_rng_state()
    assert [len(c) for c in one.chunks] == [len(c) for c in ordered.chunks] == [5, 6, 9]
    assert one.chunks == partition(sources, table, "random", seed=1).chunks != two.chunks
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("T", [None, 1, np.int64(2), 3, 7, 20])
def test_every_pair_is_in_one_chunk(order, T):
    sources, table = world(a=[1] * 5, b=[-1] * 9, c=[1, -1] * 3)
    p = partition(sources, table, order, T)
    sizes = [len(c) for c in p.chunks]
    assert sorted(sum(p.chunks, [])) == list(range(20)) and len(p.names) == len(p.chunks) == (T or 3) and min(sizes) > 0
    assert T in (None, 3) or max(sizes) - min(sizes) <= 1


def test_measures_stand_in_the_order_of_training_and_easy_to_hard_for_random():
    sources, table = world(b=[1, -1], a=[1, 1], c=[-1, -1])
    for order, want in dict(easy_to_hard="abc", hard_to_easy="cba", as_given="bac", random="abc").items():
        assert "".join(partition(sources, table, order).measures["source"]) == want


def test_other_T_cuts_the_ordered_rows():
    sources, table = world(hard=[-1, -2], easy=[1, 2, 3, 4])
    assert partition(sources, table, chunks=3).chunks == [[2, 3], [4, 5], [0, 1]]
    assert partition(sources, table, chunks=1).chunks == [[2, 3, 4, 5, 0, 1]]


def test_a_single_source_is_ordered_by_gamma():
    sources, table = world(a=[0.5, 3, -2, 1])
    assert partition(sources, table, chunks=2).chunks == [[1, 3], [0, 2]]
    assert partition(sources, table, "hard_to_easy", chunks=2).chunks == [[2, 0], [3, 1]]
    assert partition(sources, table, "as_given", chunks=2).chunks == [[0, 1], [2, 3]]


def test_the_other_reading_takes_the_reference_off():
    (a, b), table = world(a=[1, 2, 3], b=[-1, -2, -3])
    reference = LogprobTable({}, table.rows.assign(chosen=[2, 3, 4, -2, -3, -4]).astype("float32"))
    assert [measure_source(s, table)["accuracy"] for s in (a, b)] == [1, 0]
    assert [measure_source(s, table, reference)["accuracy"] for s in (a, b)] == [0, 1]
    assert partition([a, b], table, reference=reference).names == ["b", "a"]


def test_length():
    s, rows = source("a", [-1.0, -1.0], chosen=9, rejected=2)
    table = LogprobTable({}, rows.assign(chosen=-9.0, rejected=-8.0))
    m = measure_source(s, table)
    assert (m["accuracy"], m["accuracy_per_token"], m["decided_by_length"], m["mean_gamma"]) == (0, 1, 1, -1)


@pytest.mark.parametrize("wrong", [dict(chunks=0), dict(chunks=5), dict(chunks=1.5), dict(chunks=True), dict(order="upwards")])
def test_impossible(wrong):
    sources, table = world(a=[1, 2], b=[3, 4])
    with pytest.raises(ValueError, match=next(iter(wrong))): partition(sources, table, **wrong)


@pytest.mark.parametrize("n", [1, 7, 12, 22, 1000, 10**6])
def test_wilson_stays_inside_mirrors_and_solves_its_equation(n):
    for p in (0, 1e-9, 0.3, 0.5, 0.95, 1):
        low, high = wilson(p, n)
        assert 0 <= low <= p <= high <= 1           # a whisker of -1e-16 ends a run's report: "'xerr' must not contain negative values"
        assert wilson(1 - p, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)
    for end in wilson(0.3, n): assert abs(0.3 - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / n))


def test_equal_shares_of_unequal_sources_tie():
    "3 of 6 and 2 of 4, 1 of 3 and 2 of 6: shares must be equal as floats, whatever n."
    sources, table = world(b=[1, 1, 1, -1, -1, -1], c=[1, -1, -1], a=[1, 1, -1, -1], d=[1, 1, -1, -1, -1, -1])
    assert partition(sources, table).names == ["b", "a", "c", "d"] and partition(sources[::-1], table).names == ["a", "b", "d", "c"]


def test_equal_margins_keep_the_given_order_both_ways():
    sources, table = world(a=[0, 3, -2, 3, 1, -2, 0])
    flat = {o: sum(partition(sources, table, o, 3).chunks, []) for o in ORDERS}
    assert flat["easy_to_hard"] == [1, 3, 4, 0, 6, 2, 5] and flat["hard_to_easy"] == [2, 5, 0, 6, 4, 1, 3] and flat["as_given"] == list(range(7))


def test_the_reference_also_orders_the_pairs_of_one_source():
    sources, table = world(a=[1, 2, 3])
    reference = LogprobTable({}, table.rows.assign(chosen=[1, 7, 12]).astype("float32"))   # gamma - gamma_ref = 0, -5, -9
    assert partition(sources, table, chunks=3).chunks == [[2], [1], [0]] and partition(sources, table, chunks=3, reference=reference).chunks == [[0], [1], [2]]


def test_the_model_as_its_own_reference_ties_whatever_the_rounding():
    s, rows = source("a", [-math.log(49)] * 3, chosen=3, rejected=7)
    table = LogprobTable({}, rows.assign(rejected=-math.log(49) / 3).astype("float32"))
    m = measure_source(s, table, table)
    assert (m["accuracy"], m["accuracy_per_token"], m["ties"]) == (0.5, 0.5, 3) and m["mean_gamma"] == measure_source(s, table)["mean_gamma"] != 0


def test_a_selection_keeps_its_own_lengths():
    "Lengths are read through the indices of `select`, not from the table below it."
    pairs = Dataset.from_dict(dict(key=list("abcd"), prompt_ids=[[1]] * 4, chosen_ids=[[2] * n for n in (1, 2, 3, 4)], rejected_ids=[[3] * n for n in (4, 3, 2, 1)],
                                   truncated=[True, False, False, True]))
    table = LogprobTable({}, pd.DataFrame(dict(chosen=-6.0, rejected=-12.0), index=list("abcd"), dtype="float32"))
    m = measure_source(Source("s", pairs.select([3, 0]), {}), table)   # per token -1.5 > -12, and -6 < -3
    assert (m["n"], m["truncated"], m["accuracy"], m["accuracy_per_token"], m["decided_by_length"]) == (2, 1, 1, 0.5, 0.5)


def test_more_pairs_than_one_block_and_plain_python_numbers():
    (s,), table = world(a=[1, -1, 1] * 8000)
    m = measure_source(s, table)
    assert (m["n"], m["accuracy"], m["decided_by_length"]) == (24000, 2 / 3, 0) and json.loads(json.dumps(m)) == m
    assert all(type(i) is int for c in partition([s], table, "random", 4).chunks for i in c)


def test_a_missing_pair_and_an_empty_source_are_named():
    (s,), table = world(a=[1, 2])
    with pytest.raises(ValueError, match="1 of 2 pairs are not in the table.*a-1"): measure_source(s, LogprobTable({}, table.rows.iloc[:1]))
    with pytest.raises(ValueError, match="source 'a': no pairs"): measure_source(Source("a", s.pairs.select([]), {}), table)
    with pytest.raises(ValueError, match="at least one"): partition([], table)


def of_lengths(name, rows):
    "A source of pairs (chosen nats, rejected nats, chosen tokens, rejected tokens), and rows of a table."
    keys = [f"{name}-{i}" for i in range(len(rows))]
    pairs = Dataset.from_list([dict(key=k, prompt_ids=[1], chosen_ids=[2] * c, rejected_ids=[3] * r, truncated=False) for k, (_, _, c, r) in zip(keys, rows)])
    return Source(name, pairs, {}), pd.DataFrame([r[:2] for r in rows], columns=["chosen", "rejected"], index=keys, dtype="float32")


def test_sources_are_ordered_by_the_token_where_that_is_asked():
    "short: chosen has few, expensive tokens; long: many, cheap ones."
    made = [of_lengths("long", [(-10, -8, 20, 4)] * 3), of_lengths("short", [(-4, -9, 2, 9)] * 3)]
    sources, table = [s for s, _ in made], LogprobTable({}, pd.concat([r for _, r in made]))
    assert partition(sources, table).names == partition(sources, table, order_by="gamma").names == ["short", "long"]
    by_token = partition(sources, table, order_by="gamma_per_token")
    assert by_token.names == ["long", "short"] and partition(sources, table, "hard_to_easy", order_by="gamma_per_token").names == ["short", "long"]
    assert partition(sources, table, "as_given", order_by="gamma_per_token").names == ["long", "short"]
    assert by_token.measures["accuracy"].tolist() == [0, 1] and by_token.measures["accuracy_per_token"].tolist() == [1, 0]
    assert partition(sources, table, "random", seed=3, order_by="gamma_per_token").chunks == partition(sources, table, "random", seed=3).chunks


def test_a_single_source_is_cut_by_the_token():
    rows = [(-10, -8, 20, 4), (-4, -9, 2, 9), (-6, -6, 3, 6)]                    # gamma -2 5 0; per token 1.5 -1 -1
    source, table = of_lengths("one", rows)
    table = LogprobTable({}, table)
    assert partition([source], table, chunks=3).chunks == [[1], [2], [0]]
    assert partition([source], table, chunks=3, order_by="gamma_per_token").chunks == [[0], [1], [2]]
    reference = LogprobTable({}, pd.DataFrame(dict(chosen=[-40., 0, 0], rejected=[0., 0, 0]), index=table.rows.index, dtype="float32"))
    chunks = partition([source], table, "hard_to_easy", 3, reference=reference, order_by="gamma_per_token").chunks
    assert chunks == [[1], [2], [0]]                                             # 30/20 + 8/4, and as before


def test_what_cannot_be_ordered_by_is_named():
    sources, table = world(a=[1], b=[2])
    with pytest.raises(ValueError, match="order_by: 'length' is none of gamma, gamma_per_token"): partition(sources, table, order_by="length")
