"Tasks that a program grades: graders, prompts, pairs, and the experiment on them."
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sdpo_nb import graded, graded_cells, known_truth
from sdpo_nb.compare import verdict
from sdpo_nb.graded import EXAMPLES, SPLITS, TASKS, Problem, grade, make_problems, messages_of
from sdpo_nb.timed import read_lines
from sdpo_nb.world import load_base, load_world, make_model, make_tokenizer

torch.set_num_threads(1)
SUM = Problem("add", 6, "612 + 722 =", "612 + 722 = 1334", "add 612 722")
SORT = Problem("sort", 3, "Sort: sea, arm, oil", "arm, oil, sea", "words arm oil sea")
JSON = Problem("json", 2, 'JSON with the keys "sun", "moon", in alphabetical order', '{"moon": 1, "sun": 2}', "json moon sun")
LEVELS = dict(easy=dict(add=3, reverse=2), middle=dict(add=4, reverse=3), hard=dict(add=6, reverse=4))
SMALL = dict(levels=LEVELS, n=8, tests=3, validation=3, how=dict(max_new=6), settings=dict(epochs=1, batch_size=8))
COUNT = Problem("count", 3, "Write exactly 3 words about: rain", "grey wet cold", "count rain")


@pytest.mark.parametrize("problem, answer, score", [
    (SUM, "1334", 1), (SUM, "612 + 722 = 1334", 1), (SUM, "The sum is 1,334.", 1), (SUM, "1334.", 1), (SUM, "12 and then 1334!", 1),
    (SUM, "1344", 0.75), (SUM, "1,344", 0.75), (SUM, "334", 0.75), (SUM, "13340", 0.8), (SUM, "1334 or 7", 0), (SUM, "", 0), (SUM, "many", 0),
    (SUM, "1,33,4", 0.25),                               # no separators of thousands: the last number is 4
    (SORT, "arm, oil, sea", 1), (SORT, "Arm oil sea.", 1), (SORT, "arm\noil\nsea", 1), (SORT, "arm, oil and sea", 0.75), (SORT, "arm, sea, oil", 1 / 3),
    (SORT, "arm, oil", 2 / 3), (SORT, "sorted: arm, oil, sea", 0.75), (SORT, "", 0), (SORT, "armoilsea", 0),
    (JSON, '{"moon": 1, "sun": 2}', 1), (JSON, '{"moon": [{}], "sun": null}', 1), (JSON, '```json\n{"moon": 1, "sun": 2}\n```', 1),
    (JSON, '```\n{"moon": 1, "sun": 2}\n```', 1), (JSON, ' {"moon": 1,\n "sun": 2}\n', 1), (JSON, '{"sun": 1}', 0.5), (JSON, '{"sun": 1, "moon": 2}', 0),
    (JSON, '{"moon": 1, "sky": 2, "sun": 3}', 2 / 3), (JSON, '{"moon": 1, "moon": 2, "sun": 3}', 2 / 3), (JSON, '{"moon": 1, "Sun": 2}', 0.5), (JSON, "{}", 0),
    (JSON, '["moon", "sun"]', 0), (JSON, '{"moon": 1, "sun": 2', 0), (JSON, 'Here: {"moon": 1, "sun": 2}', 0), (JSON, "", 0), (JSON, "[" * 100000, 0),
    (JSON, '```json\n{"moon": 1, "sun": 2}\n``` Done.', 0), (JSON, '{"moon": 1, "sun": 2} {"sun": 1}', 0),
    (COUNT, "Rain is wet", 1), (COUNT, "rain-drops fall, softly.", 1), (COUNT, "wet", 1 / 3), (COUNT, "a b c d e f", 0.5), (COUNT, "", 0), (COUNT, "... !", 0),
])
def test_grades(problem, answer, score):
    assert grade(problem, answer) == pytest.approx(score)


@pytest.mark.parametrize("task", TASKS)
def test_what_the_program_writes_is_right_and_fits(task):
    for size in graded.CANDIDATES[task]:
        for problem in make_problems(8, task, size, "train", random.Random(size)):
            assert grade(problem, problem.right) == 1
            assert 0 <= grade(problem, problem.question) <= 1 and 0 <= grade(problem, "x" * 50) <= 1


def test_addition_has_as_many_digits_as_its_size():
    for size, digits in ((2, {1}), (3, {1, 2}), (4, {2}), (5, {2, 3}), (6, {3})):
        for problem in make_problems(20, "add", size, "train", random.Random(0)):
            a, b = problem.question.removesuffix(" =").split(" + ")
            assert {len(a), len(b)} == digits and problem.right.endswith(f"= {int(a) + int(b)}")


@pytest.mark.parametrize("task", TASKS)
def test_no_content_stands_in_two_splits_or_in_an_example(task):
    size = 3
    examples = {p.content for p in graded.example_problems(task, size)}
    assert len(examples) == EXAMPLES
    found = {split: {p.content for p in make_problems(25, task, size, split, random.Random(7))} for split in SPLITS}
    for split in SPLITS:
        assert not found[split] & examples
        assert all(graded.split_of_content(content) == split for content in found[split])
    assert not found["train"] & found["test"] and not found["train"] & found["validation"] and not found["validation"] & found["test"]


def test_order_does_not_change_the_content():
    rng = random.Random(0)
    sums = {}
    for _ in range(3000):
        problem = TASKS["add"](2, rng)
        sums.setdefault(problem.content, set()).add(problem.question)
    assert max(map(len, sums.values())) == 2                 # 3 + 4 and 4 + 3
    words = [TASKS[task](3, random.Random(5)) for task in ("sort", "reverse")]
    assert words[0].content == words[1].content


def test_the_same_seed_draws_the_same_problems_and_another_does_not():
    draw = lambda seed: [p for task in TASKS for p in make_problems(6, task, 3, "train", random.Random(seed))]
    assert draw(1) == draw(1) and draw(1) != draw(2)
    problem = draw(1)[0]
    assert messages_of(problem) == messages_of(problem)
    assert [turn["role"] for turn in messages_of(problem)] == ["user", "assistant"] * EXAMPLES + ["user"]


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="add, size 2: .*ask for fewer"): make_problems(300, "add", 2, "test", random.Random(0))
    with pytest.raises(ValueError, match="task 'divide': expected one of"): make_problems(1, "divide", 2, "test", random.Random(0))
    with pytest.raises(ValueError, match="split 'tset': expected one of"): make_problems(1, "add", 2, "tset", random.Random(0))


def test_a_question_comes_again_only_when_there_is_no_other():
    few = make_problems(60, "add", 2, "test", random.Random(0), again=True)
    different = {p.question for p in few}
    assert len(few) == 60 and 10 < len(different) < 25
    assert len({p.question for p in few[:len(different)]}) == len(different)
    assert len({p.question for p in make_problems(40, "json", 1, "test", random.Random(0), again=True)}) == 40


def test_pairs_follow_the_scores():
    n = 2000
    rows = graded.label_pairs([SORT] * n, ["arm, oil, sea"] * n, ["arm, oil, cat"] * n, seed=1)
    share = np.mean([row["flipped"] for row in rows])
    assert len(rows) == n and abs(share - 1 / (1 + math.exp(2))) < 0.025
    for row in rows[:50]:
        better = grade(SORT, row["chosen"][0]["content"]) > grade(SORT, row["rejected"][0]["content"])
        assert better != row["flipped"]
    assert rows == graded.label_pairs([SORT] * n, ["arm, oil, sea"] * n, ["arm, oil, cat"] * n, seed=1)
    assert graded.label_pairs([SORT] * 2, ["arm", ""], ["oil", "sea"], seed=1) == []     # equal scores; an empty answer
    many = graded.label_pairs([SORT] * 9, ["arm, oil, sea"] * 9, ["x"] * 9, seed=1, k=1000)
    assert not any(row["flipped"] for row in many)


def test_teacher_pairs_have_the_right_answer_chosen():
    rows = graded.teacher_pairs([SUM, SORT, JSON, COUNT], ["7", "arm, oil, sea", "", "wet"])
    assert [(row["task"], row["chosen"][0]["content"]) for row in rows] == [("add", SUM.right), ("count", COUNT.right)]


def test_batches_do_not_change_an_answer():
    S, tokenizer = load_base(load_world())
    prompts = [graded.ids_of(tokenizer, [dict(role="user", content=p)]) for p in load_world().test[:30]]
    for tau in (0., 1.):
        alone = graded.sampled_ids(S, tokenizer, prompts, tau, seed=5, max_new=8, batch=1)
        assert alone == graded.sampled_ids(S, tokenizer, prompts, tau, seed=5, max_new=8, batch=30)
    S.train()
    graded.sampled_ids(S, tokenizer, prompts[:1], max_new=1)
    assert S.training
    assert all(len(y) == 3 for y in graded.sampled_ids(S.eval(), tokenizer, prompts[:4], max_new=3))


def test_sizes_are_chosen_by_the_rule():
    right = {1: 45, 2: 29, 3: 10, 4: 2, 5: 0}
    assert known_truth.choose_sizes(right, dict.fromkeys(right, 48)) == dict(easy=2, middle=3, hard=4)
    with pytest.raises(ValueError, match="at least three"): known_truth.choose_sizes({1: 3, 2: 1}, {1: 4, 2: 4})


def test_verdicts_need_all_they_ask_for():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.004, 10)
    table = known_truth.draw_contrasts({"same": noise - noise.mean(), "far": noise + 0.1, "near": 0.012 + noise / 4, "wild": 20 * noise})
    words = dict(zip(table["question"], table.apply(verdict, axis=1)))
    assert words == {"same": "equal", "far": "better", "near": "better, but little", "wild": "we cannot tell"}
    assert (table["holm"] >= table["p"]).all() and (table["holm_equal"] >= table["p_equal"]).all()


@pytest.fixture(scope="module")
def S(tmp_path_factory):
    "A random Llama that reads letters, in a folder."
    folder, tokenizer = tmp_path_factory.mktemp("graded") / "S", make_tokenizer()
    tokenizer.model_max_length = 1024
    model = make_model(tokenizer, hidden=32, layers=2)
    model.config.max_position_embeddings = 1024
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_in(folder): return read_lines(folder / "known_truth_rehearsal.jsonl")[0]


def test_a_killed_run_goes_on_to_the_same_rows(S, tmp_path, monkeypatch):
    run = lambda folder, **others: graded_cells.run_known_truth("known_truth_rehearsal", folder, None, S, "fp32", **SMALL | others)
    whole = run(tmp_path / "whole")
    assert [row.get("arm") for row in whole] == [None, "S", "DPO", "DPO at beta/T"]

    real = graded_cells.run_graded
    def killed(cell, world):
        if cell.arm == "DPO": raise KeyboardInterrupt
        return real(cell, world)
    monkeypatch.setattr(graded_cells, "run_graded", killed)
    with pytest.raises(KeyboardInterrupt): run(tmp_path / "killed")
    monkeypatch.undo()
    assert [row.get("arm") for row in rows_in(tmp_path / "killed")] == [None, "S"]
    with open(tmp_path / "killed" / "known_truth_rehearsal.jsonl", "a") as f: f.write('{"key": "half a li')
    run(tmp_path / "killed")
    without_clock = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert without_clock(rows_in(tmp_path / "killed")) == without_clock(rows_in(tmp_path / "whole"))

    other = run(tmp_path / "killed", tests=2)             # another exam is another cell; what S wrote is found again
    assert len(other) == 7


def test_answers_of_S_are_those_of_its_row_wherever_it_goes_on(S, tmp_path):
    graded_world = graded_cells.load_graded(S, precision="fp32", **SMALL)
    written = graded_cells.WritingCell(1, 8, graded_world.about)
    row = graded_cells.run_writing(written, graded_world)
    assert json.loads(json.dumps(row)) == row
    row["answers"]["easy"][0] = ["8 + 48 = 56"] * len(row["answers"]["easy"][0])           # as if another card had written it
    graded_world.rows[written.key] = row
    cell = graded_cells.GradedCell("DPO", (("all", "S", "S"),), (("beta", 0.3), ("lr", 1e-3)), "test", 3, True, written)
    pairs = graded_cells.pairs_of(cell, graded_world)
    rejected = {tuple(pair["rejected_ids"]) for pair in pairs if pair["source"] == "easy"}
    assert len(rejected) == 1


def test_problems_of_a_draw_are_its_own():
    of = lambda draw, split="train": {p.question for found in graded_cells.draw_problems(draw, split, LEVELS, 20).values() for p in found}
    assert of(1) == of(1) and len(of(1) & of(2)) < 0.3 * len(of(1))
    contents = {split: {p.content for found in graded_cells.draw_problems(1, split, LEVELS, 20).values() for p in found} for split in SPLITS}
    assert not contents["train"] & contents["test"] and not contents["validation"] & contents["test"]


def test_questions_name_arms_and_are_read_off_the_right_rows():
    names = {*known_truth.ARMS, *known_truth.BORROWED, "sDPO at the KL of DPO"}
    assert {*known_truth.QUESTIONS["a"], *known_truth.QUESTIONS["b"]} <= names
    row = lambda score, kl: {1: dict(sampled=[score] * 6, greedy=[score / 2] * 6, kl=[kl] * 6)}
    rows = {"DPO": row(0.5, 2.), "sDPO": row(0.6, 3.), "sDPO, random": row(0.1, 1.)}
    rows |= {f"sDPO, {factor:g} beta": row(0.4, 1.) for factor in (2, 4)} | {f"sDPO, {factor:g} beta": row(0.7, 9.) for factor in (0.25, 0.5)}
    found = graded_cells.FoundArms(rows=rows)
    differences = graded_cells.question_differences(found)
    assert differences["stepwise against plain"] == pytest.approx([0.1])
    assert differences["the same, greedy"] == pytest.approx([0.05])
    assert differences["the same, at the KL of plain"] == pytest.approx([0.])      # halfway from 0.4 to 0.6
    assert differences["easy first against random order"] == pytest.approx([0.5])
    assert len(differences["easy first against hard first"]) == 0
    assert graded_cells.draws_off_the_ladder(found) == []
    for kl, end in ((20., 0.2), (0.5, -0.1)):                                        # beyond the ladder: its end
        found.rows["DPO"] = row(0.5, kl)
        assert graded_cells.question_differences(found)["the same, at the KL of plain"] == pytest.approx([end])
        assert graded_cells.draws_off_the_ladder(found) == [1]


def test_a_draw_whose_arms_had_other_pairs_is_left_out():
    wanted, loaded = graded_cells.PLANS["known_truth_cpu"]
    shared = SimpleNamespace(about="x", n=loaded["n"], tests=loaded["tests"], validation=1, rows={})
    made = []
    for cell in graded_cells.graded_plan(shared, **wanted)([]):
        row = dict(key=cell.key, about="x", card="A", precision="bf16", reads="packed", stages=[])
        if getattr(cell, "stages", ()): row |= dict(stages=[1], trained_on=f"pairs of draw {cell.draw}")
        made.append(row | dict(sampled=[0.5] * 6, greedy=[1.] * 6, kl=[0.] * 6))
    def arranged(rows): return graded_cells.arrange_graded(rows, n=loaded["n"], tests=loaded["tests"], validation=1, **wanted)
    whole = arranged(made)
    assert whole.missing == 0 and whole.left_out == {} and graded_cells.common_draws(whole, known_truth.CPU_QUESTIONS) == list(range(1, 9))
    means = graded_cells.graded_means(whole).loc["DPO"]
    assert means["sampled"] == means["hard"] == 0.5 and means["greedy"] == 1 and means["right"] == means["kl"] == 0
    for name in ("trained_on", "card", "precision"):
        mixed = arranged([*made[:-1], made[-1] | {name: "another"}])
        assert list(mixed.left_out) == [8] and mixed.left_out[8].startswith(name) and mixed.missing == 6
        assert graded_cells.common_draws(mixed, known_truth.CPU_QUESTIONS) == list(range(1, 8))


def test_the_smaller_version_has_four_questions_and_eight_draws():
    wanted, loaded = graded_cells.PLANS["known_truth_cpu"]
    shared = SimpleNamespace(about="x", n=loaded["n"], tests=loaded["tests"], validation=1, rows={})
    cells = graded_cells.graded_plan(shared, **wanted)([])
    of_a_draw = [getattr(cell, "arm", "S writes") for cell in cells if cell.draw == 1]
    assert of_a_draw == ["S writes", "S", "DPO", "sDPO", "sDPO, hard first", "sDPO at DPO's beta", "DPO at beta/T"]
    assert len({cell.key for cell in cells}) == 8 * 6, "sDPO at DPO's beta is sDPO itself where there is one setting"
    assert len(known_truth.CPU_QUESTIONS) == 4
    assert graded_cells.arrange_graded([]).missing is None
