"The protocol's bookkeeping, on tables whose answer is known; and every kind of cell once."
import io, json, random
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock, Timeout

from sdpo_nb import bodies, cells, compare, experiments, questions, training_data
from sdpo_nb.world import SKILLS, load_base, make_tokenizer


def rows(values, method="m"): # (worlds, seeds, prompts)
    return pd.DataFrame([dict(world=w + 1, seed=s, method=method, weights=f"w{w}", sampled=list(v), greedy=list(v), kl=list(10 * v))
                         for w, per in enumerate(values) for s, v in enumerate(per)]).sample(frac=1, random_state=0)


def test_outcome_puts_worlds_seeds_and_prompts_in_order():
    values = np.random.default_rng(0).normal(size=(3, 2, 5))
    np.testing.assert_allclose(compare.outcome_values(rows(values), "sampled"), values)
    np.testing.assert_allclose(compare.outcome_values(rows(values), "kl"), 10 * values)


def test_outcome_refuses_a_hole():
    r = rows(np.zeros((3, 2, 5)))
    with pytest.raises(ValueError, match="5 rows for 3 worlds and 2 seeds"): compare.outcome_values(r.iloc[1:], "sampled")


def test_a_difference_is_of_runs_that_were_asked_the_same():
    one, other = rows(np.ones((3, 2, 5))), rows(np.zeros((3, 2, 5)))
    assert (compare.paired_difference(one, other) == 1).all()
    apart = (one.assign(world=one["world"] + 3), one[one["world"] == 2], one[one["seed"] == 0], one.assign(weights="another"))
    for unlike in apart:
        with pytest.raises(ValueError, match="'rows_b' was run in other worlds"): compare.paired_difference(unlike, other)
        with pytest.raises(ValueError, match="'b' was run in other worlds"): compare.weighted_sum({"a": 1, "b": -1}, dict(a=unlike, b=other, c=one))
    with pytest.raises(ValueError, match="1 of rows_a and 5 of rows_b"): compare.paired_difference(rows(np.ones((3, 2, 1))), other)
    assert (compare.weighted_sum({"a": 1, "c": -1}, dict(a=one, b=apart[0], c=other)) == 1).all()      # b was not asked for


def test_a_ladder_is_read_between_its_steps():
    ladder = [rows(np.full((2, 1, 3), v)) for v in (0.5, 0.2, 0.4)]       # kl is ten times the reward
    assert compare.reward_at_kl(ladder, np.array([[[3.0]], [[4.5]]])).ravel().round(6).tolist() == [0.3, 0.45]
    with pytest.raises(ValueError, match="6.00 nats is outside the ladder, 2.00 to 5.00"): compare.reward_at_kl(ladder, np.full((2, 1, 1), 6.0))


def test_contrasts_find_what_was_planted_and_refuse_other_draws():
    g = np.random.default_rng(0)
    world, luck = g.normal(0, 0.2, (10, 1, 1)), lambda: g.normal(0, 0.01, (10, 2, 50))
    found = dict(a=rows(world + 0.1 + luck()), b=rows(world + luck()), c=rows(world + luck()))
    asked = pd.DataFrame([("planted", "a", "b", "sampled"), ("nothing", "b", "c", "greedy")], columns=["question", "a", "b", "outcome"])
    there, nothing = questions.primary_contrasts(found, asked).itertuples()
    assert there.low > 0.08 and there.high < 0.12 and there.holm < 0.01 and nothing.low < 0 < nothing.high and nothing.holm > 0.05 and (there.worlds, there.seeds) == (10, 2)
    found["b"] = found["b"][found["b"]["world"] != 3]
    with pytest.raises(ValueError, match="'b' was run in other worlds"): questions.primary_contrasts(found, asked)


def test_a_grid_is_refused_with_a_missing_cell_or_two_S_in_one_world(monkeypatch, tmp_path):
    rows = cells.stored_rows(sum(questions.grid_cells("stage_by_stage").values(), []))
    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    rows.to_parquet(tmp_path / "runs.parquet")
    assert {len(rows) for rows in questions.load_grid("stage_by_stage").values()} == {20}
    gone = rows[rows["key"] != questions.grid_cells("stage_by_stage")["skills, easy_to_hard"][0].key]
    gone.to_parquet(tmp_path / "runs.parquet")
    with pytest.raises(ValueError, match="stage_by_stage: 1 cells have not been run, of skills, easy_to_hard"): questions.load_grid("stage_by_stage")
    rows.assign(weights=rows["weights"].where(rows.index != rows.index[rows["world"] == 3][0], "another")).to_parquet(tmp_path / "runs.parquet")
    with pytest.raises(ValueError, match="stage_by_stage: world 3 .llama. was run with more than one S"): questions.load_grid("stage_by_stage")


def test_finite_data_compares_equal_pairs_and_steps_at_one_beta_over_T():
    grid = questions.finite_data_grid()
    by = {tuple(int(w) for w in name.replace("T = ", "").replace(" pairs", "").split(", ")): c for name, c in grid.items()}
    assert set(by) == {(T, total) for T, totals in {1: questions.FINITE_PAIRS, **questions.FINITE_STAGES}.items() for total in totals}
    for (T, total), c in by.items():
        assert c.settings["beta"] / T == pytest.approx(0.4) and c.settings["epochs"] * total == 3 * 1440 and c.settings["label_smoothing"] == 0.05
        assert c.pairs == by[1, total].pairs and c.settings["lr"] == by[1, total].settings["lr"] and c.settings.get("chunks", 1) == T
    drawn = questions.grid_cells("finite_data")
    assert all({(x.world, x.seed) for x in xs} == {(w, s) for w in questions.WORLDS for s in questions.SEEDS} for xs in drawn.values())
    assert len({x.key for xs in drawn.values() for x in xs}) == 20 * len(grid)
    for name, far in questions.finite_data_apart_grid().items():             # DPO where stages that share nothing would be
        T, total = (int(w) for w in name.replace("T = ", "").replace(" pairs", "").split(", "))
        near = by[1, total]
        assert far.method == "DPO" and far.pairs == near.pairs and far.settings == near.settings | dict(beta=T * near.settings["beta"])


def test_arms_of_a_ladder_differ_in_what_they_are_named_after_and_nothing_else():
    ladders = questions.order_ladders()
    assert len(ladders) == 9
    for arm, ladder in ladders.items():
        asked = {}
        if "first" in arm or "random" in arm: asked["order"] = questions.ORDERS[arm.split(", ")[0]]
        if "fixed" in arm: asked["reference"] = "fixed"
        assert ladder.settings == asked and ladder.rates == (1e-4,) and ladder.method == ("DPO" if arm == "all at once" else "sDPO")
        assert ladder.data == (("sources",) if "without noise" in arm else ("graded noise", 0., 0.15, 0.35))
    elsewhere = questions.elsewhere_ladders()
    assert set(elsewhere) == {"DPO", "DPO, six passes", "DPO, smaller rate", "sDPO", "sDPO, fixed reference", *cells.RELATIVES}
    assert all(ladder.method == arm.split(", s")[0] or ladder.method == arm for arm, ladder in elsewhere.items())
    assert all(ladder.rates == ((1e-4,) if "smaller" in arm else (1e-4, 3e-4)) for arm, ladder in elsewhere.items())
    assert not any(ladder.settings for arm, ladder in elsewhere.items() if arm != "DPO, six passes")
    assert elsewhere["DPO, six passes"].settings == dict(epochs=6)
    builds_on = questions.builds_on_ladders()
    assert len(builds_on) == 7 and builds_on.pop("all at once").data == ("taught letters", 7, 7)
    for arm, ladder in builds_on.items():
        assert ladder.data[0] == ("taught letters first" if arm.startswith("taught first") else "taught letters")
        assert (ladder.data[1:], ladder.split) == (((3, 6), "test") if "short" in arm else ((7, 7), "up to seven letters")) and ladder.rates == (1e-4, 3e-4)
        assert ladder.settings == dict(order="as_given") | (dict(reference="fixed") if "fixed" in arm else {})
        assert ladder.rung(1., 1e-4).split == ladder.split
    sizes = questions.size_ladders()
    assert len(sizes) == 6 and sizes["all at once"].data == ("sources",)
    for arm, ladder in sizes.items():
        assert ladder.rates == (1e-4,) and ladder.split == "test" and ladder.method == ("DPO" if arm == "all at once" else "sDPO")
        if arm == "all at once": continue
        assert ladder.data == (("small and large", 2) if "halves" in arm else ("small and large" if arm.startswith("small") else "large and small", 6))
        assert ladder.settings == dict(order="as_given") | (dict(reference="fixed") if "fixed" in arm else {})
    for ladder in [*ladders.values(), *elsewhere.values(), *builds_on.values(), *sizes.values()]: assert 5 <= len(ladder.betas) <= 7 and np.allclose(np.diff(np.log2(ladder.betas)), 1)


def test_settings_are_chosen_where_nothing_is_measured():
    for grid, arms in ((grid, make()) for grid, make in questions.LADDERS.items()):
        tried, worlds = questions.ladder_cells(grid), (14, 15) if grid == "model_size" else range(11, 16)
        assert {c.world for c in tried} == set(worlds)
        asked = [(arm.data, arm.method, b, lr, str(arm.settings), arm.body) for arm in arms.values() for b in arm.betas for lr in arm.rates]
        assert len({c.key for c in tried}) == len(worlds) * len(set(asked)) and len(tried) == len(worlds) * len(asked)
        measured, _ = questions.OTHER_DRAWS.get(grid, (questions.WORLDS, questions.SEEDS))
        assert not set(measured) & set(worlds)
    assert not set(questions.OTHER_DRAWS["tuned_elsewhere"][0]) & {w for g in questions.GRIDS if g != "tuned_elsewhere" for c in questions.all_cells_of(g) for w in [c.world]}


def test_the_top_of_a_ladder_is_read_between_its_rungs_and_refused_at_its_ends():
    parabola = lambda top: {b: 0.8 - 0.03 * np.log2(b / top) ** 2 for b in (0.1, 0.2, 0.4, 0.8, 1.6)}
    for top in (0.15, 0.25, 0.4, 0.5, 1.0): assert questions.top_of_ladder(parabola(top)) == pytest.approx((top, 0.8), rel=2e-3)
    for top in (0.05, 3.0):
        with pytest.raises(ValueError, match="arm: its best beta, (0.1|1.6), is at an end of its ladder"): questions.top_of_ladder(parabola(top), "arm")


def test_a_rate_that_falls_behind_needs_no_top():
    def ladder(low): # of an arm: rate 1e-4 has its top in the middle, rate 3e-4 rises to the end of its ladder, `low` below
        rows = []
        for arm, l in questions.elsewhere_ladders().items():
            for beta in l.betas:
                octaves = np.log2(beta / l.betas[2])
                for lr, reward in zip((1e-4, 3e-4)[:len(l.rates)], (0.8 - 0.02 * octaves ** 2, 0.8 - low - 0.01 * (2 - octaves))):
                    rows += [dict(key=c.key, sampled=[reward]) for c in l.rung(beta, lr).cells(questions.CHOICE_WORLDS, (0,))]
        return pd.DataFrame(rows)
    chosen = questions.choose_on_ladders("tuned_elsewhere", ladder(0.03))
    assert all(c == dict(beta=pytest.approx(l.betas[2], rel=2e-3), lr=1e-4) for c, l in zip(chosen.values(), questions.elsewhere_ladders().values()))
    with pytest.raises(ValueError, match="DPO at rate 0.0003: its best beta, 1.6, is at an end"): questions.choose_on_ladders("tuned_elsewhere", ladder(0.01))


def test_what_was_chosen_becomes_the_grid(monkeypatch, tmp_path):
    monkeypatch.setattr(questions, "RESULTS", tmp_path)
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    assert questions.tuned_grid("tuned_elsewhere") == {} == questions.chosen_on_ladders("tuned_elsewhere")
    best = {arm: (3e-4, ladder.betas[2] * 1.2) for arm, ladder in questions.elsewhere_ladders().items()}
    rows = []
    for arm, ladder in questions.elsewhere_ladders().items():
        for lr in ladder.rates:
            for beta in ladder.betas:
                reward = 0.8 - 0.02 * np.log2(beta / best[arm][1]) ** 2 - 0.01 * (lr != best[arm][0])
                rows += [dict(key=c.key, sampled=[reward], seconds=1.) for c in ladder.rung(beta, lr).cells(questions.CHOICE_WORLDS, (0,))]
    monkeypatch.setattr(experiments, "run_grid", lambda cells, desc: pd.DataFrame(rows))
    experiments.run_experiment("choose_tuned_elsewhere")
    grid = questions.tuned_grid("tuned_elsewhere")
    assert set(grid) == set(best) and questions.tuned_grid("when_order_matters") == {}
    for arm, condition in grid.items():
        assert condition.settings["lr"] == (1e-4 if "smaller" in arm else 3e-4) and condition.settings["beta"] == pytest.approx(best[arm][1], rel=2e-3)
        assert condition.method == questions.elsewhere_ladders()[arm].method and condition.settings.get("epochs", 3) == (6 if "six" in arm else 3)


def test_one_choice_at_a_time_is_written(monkeypatch, tmp_path):
    "Two processes would each read what was chosen, add their own, and write over that of the other."
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    read = []
    def chosen(grid):
        with pytest.raises(Timeout): FileLock(tmp_path / ".tuned.json.lock", timeout=0).acquire()
        read.append(grid)
        return {}
    monkeypatch.setattr(experiments, "chosen_on_ladders", chosen)
    monkeypatch.setattr(experiments, "choose_on_ladders", lambda grid, rows: dict(DPO=dict(beta=1.)))
    monkeypatch.setattr(experiments, "run_grid", lambda cells, desc: pd.DataFrame(dict(seconds=[1.])))
    experiments.run_experiment("choose_tuned_elsewhere")
    assert "tuned_elsewhere" in read and json.loads((tmp_path / "tuned.json").read_text())["tuned_elsewhere"] == dict(DPO=dict(beta=1))


def test_questions_of_the_ladders_are_differences_of_arms():
    for asked, grid in ((questions.ORDER_QUESTIONS, "when_order_matters"), (questions.BUILDS_ON_QUESTIONS, "builds_on"), (questions.SIZE_QUESTIONS, "when_sizes_differ"), (questions.ELSEWHERE_QUESTIONS, "tuned_elsewhere")):
        for arms in asked.values(): assert sum(arms.values()) == 0 and set(arms) <= set(questions.LADDERS[grid]())
    g = np.random.default_rng(0)
    found = {arm: rows(0.8 + g.normal(0, 0.005, (10, 2, 20))) for arm in questions.order_ladders()}
    found["easy first, moving"] = rows(0.85 + g.normal(0, 0.005, (10, 2, 20)))
    answers = questions.answer_together(questions.ORDER_QUESTIONS, found)
    assert answers["verdict"].tolist() == ["better", "better", "equal", "better"]
    found["all at once"] = found["all at once"].assign(weights="another")
    with pytest.raises(ValueError, match="was run in other worlds"): questions.answer_together(questions.ORDER_QUESTIONS, found)


def test_the_choice_is_the_likeliest_of_four_and_short_answers_lose_their_advantage_per_token():
    world = bodies.build_world(0)
    base, tokenizer = load_base(world)
    prompts = world.test[:30]
    exam = cells.Exam(base, tokenizer, prompts, luck=1)
    found = exam.choices(base)
    from sdpo_nb.logprobs import response_logprobs
    for i, prompt in enumerate(prompts):
        per = []
        for text in cells.answers_to_choose_from(prompt):
            ids = tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
            pair = dict(prompt_ids=cells.prompt_ids(tokenizer, prompt), chosen_ids=ids, rejected_ids=ids)
            per.append((response_logprobs(base, [pair])[0].item(), len(ids)))
        assert found["choice"][i] == (per[0][0] == max(x for x, _ in per)) and found["choice_per_token"][i] == (per[0][0] / per[0][1] == max(x / n for x, n in per))
    assert 0 < sum(found["choice"]) < 30


def test_graded_noise_swaps_the_share_that_was_asked_for_and_nothing_else():
    world = bodies.build_world(0)
    plain, noisy = (training_data.TRAINING_DATA[k](world, None, None, *a) for k, a in (("sources", ()), ("graded noise", (0., 0.15, 0.35))))
    for (name, rows), share in zip(plain.items(), (0., 0.15, 0.35)):
        swapped = [a["chosen"] == b["rejected"] and a["rejected"] == b["chosen"] for a, b in zip(rows, noisy[name])]
        assert all(a == b or s for a, b, s in zip(rows, noisy[name], swapped)) and len(rows) == len(noisy[name])
        assert abs(np.mean(swapped) - share) < 0.06
    with pytest.raises(ValueError): training_data.TRAINING_DATA["graded noise"](world, None, None, 0.1)


def test_a_grid_that_was_not_run_is_not_run_again(monkeypatch):
    monkeypatch.setattr(experiments, "GRIDS", {"there": None, "half": None, "not there": None})
    stored = questions.all_cells_of("stage_by_stage")[:2]
    other = cells.Cell(0, 0, "DPO", dict(beta=77))
    asked = {"there": stored, "half": [stored[0], other], "not there": [other]}
    monkeypatch.setattr(experiments, "all_cells_of", asked.get)
    assert experiments._complete_grids() == ["there"]


def test_a_stored_cell_run_again_is_the_same_and_a_changed_one_is_seen(monkeypatch, tmp_path):
    toy = {f"sDPO, {b:g}": [cells.Cell(0, 0, "sDPO", dict(epochs=1, beta=b), "validation", 16)] for b in (0.3, 0.6)}
    monkeypatch.setattr(experiments, "GRIDS", toy)
    monkeypatch.setattr(experiments, "all_cells_of", lambda grid: toy[grid])
    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    made = cells.run_grid(sum(toy.values(), []), tmp_path)
    made.at[made.index[0], "sampled"] = [x + 0.5 for x in made["sampled"].iloc[0]]
    made.to_parquet(tmp_path / "runs.parquet")
    found = experiments.rerun_stored_cells()
    assert sorted(found["other_rewards"]) == [0, 1] and found["same_S"].all()


def test_holm():
    assert compare.holm_p_values([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and compare.holm_p_values([0.5, 0.9]) == [1, 1]


def test_p_value_is_exact():
    assert compare.sign_flip_p_value(np.ones((10, 2, 3))) == 2 / 2**10 and compare.sign_flip_p_value(np.ones((5, 1, 1))) == 2 / 2**5
    assert compare.sign_flip_p_value(np.array([1., -1., 2., -2.]).reshape(4, 1, 1)) == 1
    g = np.random.default_rng(0)
    assert 0.02 < np.mean([compare.sign_flip_p_value(g.normal(size=(8, 1, 1))) <= 0.05 for _ in range(400)]) < 0.08      # false alarms


def test_variances_are_told_apart():
    g = np.random.default_rng(0)
    v = compare.standard_deviations(g.normal(0, 0.3, (200, 1, 1)) + g.normal(0, 0.1, (200, 6, 1)) + np.zeros((1, 1, 3)))
    assert abs(v["worlds"] - 0.3) < 0.03 and abs(v["seeds"] - 0.1) < 0.01
    for shape in ((10, 1, 50), (1, 2, 50)):
        with pytest.raises(ValueError, match="two or more of each"): compare.standard_deviations(g.normal(size=shape))


def invented_search(*tried, world=0): return pd.DataFrame([dict(method=m, settings=json.dumps(dict(beta=b)), sampled=[x], world=world, seed=0, weights=f"w{world}") for m, b, x in tried])


def test_choose_takes_the_best_of_each_method():
    r = invented_search(("a", 1, 0.2), ("a", 2, 0.4), ("a", 2, 0.3), ("a", 3, 0.1), ("b", 1, 0.5), ("b", 2, 0.8), ("b", 3, 0.7))
    assert questions.choose_settings(r) == dict(a=dict(beta=2), b=dict(beta=2))


def test_choose_refuses_the_edge():
    with pytest.raises(ValueError, match="b: its best beta, 3, is on the edge"): questions.choose_settings(invented_search(("b", 1, 0.5), ("b", 2, 0.6), ("b", 3, 0.7)))


def test_half_a_search_chooses_nothing(monkeypatch):
    tried = ("a", 1, 0.2), ("a", 2, 0.4), ("a", 3, 0.1)
    easier = invented_search(("a", 1, 0.5), ("a", 3, 0.4), world=1)               # the mean of 2 would lack the easy world
    with pytest.raises(ValueError, match=r"'a ..beta.: 2.' was run in other worlds"): questions.choose_settings(pd.concat([invented_search(*tried), easier]))
    stored = questions.stored_rows
    monkeypatch.setattr(questions, "stored_rows", lambda cells: stored(cells).iloc[1:])
    with pytest.raises(ValueError, match="gpt2: 47 of 48 cells of its search"): questions.chosen_for_body("gpt2")


def test_a_grid_without_settings_is_refused_in_words(monkeypatch):
    monkeypatch.setitem(questions.GRIDS, "tuned_elsewhere", dict)
    with pytest.raises(ValueError, match="tuned_elsewhere: no settings yet; .* choose_tuned_elsewhere"): questions.load_grid("tuned_elsewhere")


def test_a_number_of_pairs_is_refused_where_chunks_are_made_on_the_way():
    cell = cells.Cell(0, 0, "sDPO", dict(epochs=1, order="as_given"), "validation", 16, ("new", "S", "implicit"))
    with pytest.raises(ValueError, match="pairs: 16, but 'new' makes its own chunks"): cells.run_cell(cell)


def test_every_method_runs_and_a_second_call_adds_nothing(tmp_path):
    asked = experiments.small_cells()
    everything = cells.run_grid(asked, tmp_path)
    found = everything[(everything["data"] == '["sources"]') & (everything["split"] == "validation")].set_index("method")
    before = (tmp_path / "runs.parquet").stat().st_mtime_ns
    assert len(cells.run_grid(asked, tmp_path)) == len(asked) and (tmp_path / "runs.parquet").stat().st_mtime_ns == before
    assert set(found.index) == {*cells.METHODS, *cells.BASELINES, *cells.RELATIVES} and max(map(abs, found.loc["S", "kl"])) < 1e-9
    trained = found.loc[list(cells.METHODS)]
    assert (trained["kl"].map(np.mean) > 0).all() and trained["tokens"].nunique() == 1       # equal budgets
    assert found.loc["TR-DPO, hard", "tokens"] == found.loc["TR-DPO, soft", "tokens"] == found.loc["Pre-DPO", "tokens"] / 2 == found.loc["DPO", "tokens"]
    assert len({tuple(found.loc[m, "losses"]) for m in ("DPO", "TR-DPO, hard", "TR-DPO, soft")}) == 3 and all(len(r.choice) == len(r.sampled) for r in everything.itertuples())
    assert len({tuple(x) for x in trained["sampled"]}) > 3                                     # and not one and the same method
    assert {json.loads(d)[0] for d in everything["data"]} == set(training_data.TRAINING_DATA)
    assert {len(r.sampled) for r in everything.itertuples() if r.split == "other letters"} != {len(found.loc["S", "sampled"])}
    stages = pd.read_json(io.StringIO(found.loc["sDPO", "stages"]))
    assert set(stages["stage"]) == {1, 2, 3} and set(stages["skill"]) == set(SKILLS)
    assert found.loc["sDPO", "pass_tokens"] > found.loc["DPO", "pass_tokens"] == found.loc["DPO", "tokens"]  # one epoch: the partition's pass reads what training reads


def test_a_cell_that_fails_is_named_after_the_others_are_through(tmp_path):
    good, bad = cells.Cell(0, 0, "S", {}, "validation", 8), cells.Cell(0, 0, "DPO", dict(beta=-1.0), "validation", 8)
    with pytest.raises(RuntimeError, match="1 of 2 cells failed.*beta"): cells.run_grid([bad, good], tmp_path)
    assert cells.stored_rows([bad, good], tmp_path)["method"].tolist() == ["S"]


def texts(world, base, tok, *data): return training_data.TRAINING_DATA[data[0]](world, base, tok, *data[1:])


@pytest.fixture(scope="module")
def world():
    w = bodies.build_world(0)
    return w, *load_base(w)


def test_data_by_skill_and_without_one(world):
    skills, without = texts(*world, "skills"), texts(*world, "without", "sort")
    assert set(skills) == set(SKILLS) and all(r["prompt"][0]["content"].startswith("copy ") for r in skills["copy"])
    assert set(without) == set(world[0].sources) and sum(map(len, without.values())) == sum(map(len, skills.values())) - len(skills["sort"])


def test_sorted_both_ways(world):
    there, back = (texts(*world, "sorted", "true gap", sign)["all"] for sign in (1, -1))
    gaps = [training_data.pair_measure(r, "true gap") for r in there]
    assert gaps == sorted(gaps) and gaps[0] < gaps[-1] and [training_data.pair_measure(r, "true gap") for r in back] == gaps[::-1]
    with pytest.raises(ValueError, match="'size' is none of length"): texts(*world, "sorted", "size", 1)


@pytest.mark.parametrize("data, says", [
    (("without", "srot"), "skill: 'srot' is none of 'copy', 'reverse', 'sort', 'shift'"),
    (("sorted", "length", 0), "sign: 0 is none of 1, -1"),
    (("selected", "smalest", 0.3, 1e-4), "keep: 'smalest' is none of 'smallest', 'largest', 'random'"),
    (("new", "polcy", "true"), "writer: 'polcy' is none of 'S', 'policy', 'S, as many'"),
    (("new", "S", "ture"), "label: 'ture' is none of 'true', 'judge', 'implicit'"),
    (("new", "S", "judge", 5.), "error: 5 is not between 0 and 1"),
    (("new", "S", "implicit", 0.2), "error: only a judge makes one, and the label is 'implicit'"),
    (("graded noise", 0., 2., 0.1), "share of digest: 2 is not between 0 and 1"),
], ids=lambda v: " ".join(map(str, v)) if isinstance(v, tuple) else "")
def test_a_misspelt_word_is_refused_and_gives_no_other_data(world, data, says):
    with pytest.raises(ValueError, match=says): texts(*world, *data)


def test_a_judge_errs_as_often_as_stated():
    rows = [dict(prompt=[dict(content="copy abc")], chosen=[dict(content="abc" if i % 2 else "cba")], rejected=[dict(content="cba" if i % 2 else "abc")]) for i in range(4000)]
    def right(error): return np.mean([r["chosen"][0]["content"] == "abc" for r in training_data._labelled_by_judge(rows, error, random.Random(0))])
    assert right(0.) == 1 and abs(right(0.2) - 0.8) < 0.02


def test_same_prompts_in_every_part(world):
    parts = texts(*world, "same prompts", 8)
    prompts = [{r["prompt"][0]["content"] for r in rows} for rows in parts.values()]
    assert len(parts) == 8 and len(set.union(*prompts)) <= 300 and len(prompts[0] & prompts[1]) > 0.4 * len(prompts[0])
    assert parts["part 1"] != parts["part 2"]


def test_implicit_gap_is_zero_for_S_itself(world):
    w, base, tok = world
    rows = training_data.all_pairs(w)
    assert all(r["chosen"][0]["content"] and r["rejected"][0]["content"] for r in rows)
    assert training_data._implicit_gap(base, base, tok, rows).abs().max() == 0          # as many numbers as rows
    with pytest.raises(ValueError, match="1 of 3 pairs cannot be used"): training_data._implicit_gap(base, base, tok, [*rows[:2], rows[2] | dict(chosen=[dict(role="assistant", content="")])])


def test_a_model_of_another_size_is_a_llama_of_that_width():
    tokenizer = make_tokenizer()
    for body, width in bodies.SIZES.items():
        model, same = (bodies.make_body(body, tokenizer, seed=3) for _ in range(2))
        assert model.config.model_type == "llama" and model.config.hidden_size == width and model.config.num_hidden_layers == 3
        assert torch.equal(model.lm_head.weight, same.lm_head.weight)
    assert set(questions.MODEL_SIZES) == {"llama", *bodies.SIZES} and questions.MODEL_SIZES == sorted(questions.MODEL_SIZES, key=lambda body: bodies.make_body(body, tokenizer).config.hidden_size if body in bodies.SIZES else 96)


def test_sizes_are_chosen_where_they_are_not_measured():
    ladders = questions.model_size_ladders()
    assert {body for body in questions.MODEL_SIZES} == {ladder.body for ladder in ladders.values()}
    for ladder in ladders.values(): assert ladder.rates == ((3e-5,) if ladder.body == "llama-384" else ()) + (1e-4, 3e-4)
    chosen = {cell.world for cell in questions.ladder_cells("model_size")}
    measured = {world for world in questions.OTHER_DRAWS["model_size"][0]}
    assert chosen == {14, 15} and measured == {11, 12, 13}
    known = {cell.key for cell in questions.ladder_cells("tuned_elsewhere")}
    for cell in questions.ladder_cells("model_size"): assert (cell.key in known) == (cell.body == "llama")


def test_a_folder_that_another_process_made_first_is_taken(tmp_path):
    def make(path): # while the other is quicker
        (path / "mine").touch()
        (tmp_path / "7").mkdir()
        (tmp_path / "7" / "theirs").touch()
    assert [p.name for p in bodies._made_once(tmp_path / "7", make).iterdir()] == ["theirs"]
    assert [p.name for p in tmp_path.iterdir()] == ["7"]


def test_a_folder_is_left_whole_and_open_or_not_at_all(tmp_path):
    def fail(path): raise RuntimeError("half-way")
    with pytest.raises(RuntimeError, match="half-way"): bodies._made_once(tmp_path / "7", fail)
    assert not list(tmp_path.iterdir())
    (tmp_path / "open").mkdir()
    assert bodies._made_once(tmp_path / "7", lambda path: None).stat().st_mode == (tmp_path / "open").stat().st_mode


def test_an_unknown_body_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="body: 'mamba' is none of llama, gpt2, opt, bloom, qwen3, llama-48, llama-192, llama-384"): bodies.build_world(1, tmp_path, "mamba")
    with pytest.raises(ValueError, match="kind: 'bert' is none of gpt2, opt, bloom, qwen3, llama-48, llama-192, llama-384"): bodies.build_beginning("bert", tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_processes_that_add_rows_lose_none(tmp_path):
    path, keys = tmp_path / "results" / "runs.parquet", [f"{name}-{i}" for i in range(25) for name in "ab"]
    tables = [pd.DataFrame([dict(key=key, x=list(range(600)))]) for key in keys]
    with ProcessPoolExecutor(2, get_context("fork")) as pool: list(pool.map(partial(cells.add_rows, path, "key"), tables))
    assert sorted(pd.read_parquet(path)["key"]) == sorted(keys)


def test_a_key_that_is_there_keeps_its_row(tmp_path):
    path, one = tmp_path / "runs.parquet", pd.DataFrame([dict(key="a", x=1)])
    cells.add_rows(path, "key", one)
    twice = pd.DataFrame([dict(key="b", x=3)] * 2)                  # a frontier has many rows of one world, all at once
    assert cells.add_rows(path, "key", one.assign(x=2), twice)["x"].tolist() == pd.read_parquet(path)["x"].tolist() == [1, 3, 3]


def test_an_unknown_method_is_refused_before_anything_is_made():
    with pytest.raises(ValueError, match="method: 'sDPO, hard firts' is none of DPO, .*S, best temperature"): cells.Cell(0, 0, "sDPO, hard firts")
    with pytest.raises(ValueError, match="data: 'sklls' is none of sources, one source, skills"): cells.Cell(0, 0, "sDPO", data=("sklls",))
    later = cells.Cell(0, 0, "DPO", split="validation")
    object.__setattr__(later, "method", "smooth")                  # as in a fresh process, which does not know what a notebook added
    with pytest.raises(ValueError, match="'smooth' is none of"): cells.run_cell(later)
    later = cells.Cell(0, 0, "DPO", split="validation")
    object.__setattr__(later, "data", ("sklls",))
    with pytest.raises(ValueError, match="data: 'sklls' is none of"): cells.run_cell(later)


def test_an_unknown_split_is_refused(world):
    with pytest.raises(ValueError, match="'tset' is none of"): cells.prompts_of_split(0, "tset")
