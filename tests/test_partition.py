"""Orders, cuts and readings of the partition, on hand-made tables."""
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
@pytest.mark.parametrize("T", [None, 1, 2, 3, 7, 20])
def test_every_pair_is_in_one_chunk(order, T):
    sources, table = world(a=[1] * 5, b=[-1] * 9, c=[1, -1] * 3)
    p = partition(sources, table, order, T)
    sizes = [len(c) for c in p.chunks]
    assert sorted(sum(p.chunks, [])) == list(range(20)) and len(p.names) == len(p.chunks) == (T or 3) and min(sizes) > 0
    assert T in (None, 3) or max(sizes) - min(sizes) <= 1


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


@pytest.mark.parametrize("wrong", [dict(chunks=0), dict(chunks=5), dict(chunks=1.5), dict(order="upwards")])
def test_impossible(wrong):
    sources, table = world(a=[1, 2], b=[3, 4])
    with pytest.raises(ValueError, match=next(iter(wrong))): partition(sources, table, **wrong)
