"What a user sees of a run: before, while it goes on, and in its report."
import json, os, re, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import sdpo_nb.report as report, sdpo_nb.stages as stages
from sdpo_nb import cli
from sdpo_nb.logprobs import Clock, load_model, load_tokenizer, pair_tokens, progress, score_pairs
from sdpo_nb.plan import data_notes
from sdpo_nb.preferences import Source, hold_out, load_pairs, tokenize_pairs
from sdpo_nb.report import Run, model_card, undecided
from sdpo_nb.stepwise import StepwiseConfig, sdpo, sdpo_partition
from sdpo_nb.world import load_world
from tiny import SETTINGS, metrics, rows, write_jsonl

BASE = load_world().base
TWO = {name: rows(name, 24) for name in ("primer", "digest")}


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    "A run with pairs held out of its sources, and a source of its own that is only measured."
    seen = SimpleNamespace(steps=[], stages=[])
    seen.run = sdpo(BASE, TWO, StepwiseConfig(**SETTINGS, eval_share=0.3), tmp_path_factory.mktemp("held") / "run", held_out=dict(riddle=rows("riddle", 9)),
                    on_step=seen.steps.append, on_stage=lambda run: seen.stages.append(len(run.stages)))
    return seen


# ---- held-out pairs

def test_held_out_pairs_are_not_trained_on(held):
    kept = {key for source in json.loads((held.run.folder / "held_out.json").read_text()).values() for key in source["keys"]}
    trained = {key for stage in held.run.stages for probe in stage["probes"].values() for key in probe}
    assert kept and trained and not kept & trained
    assert sum(s["pairs"] for s in held.run.stages) == len(trained)


def test_the_prompt_decides(tmp_path):
    "Two pairs of one prompt fall on one side, in whatever source; more rows move no other."
    twice = TWO["primer"] + [dict(r, chosen=r["rejected"], rejected=r["chosen"]) for r in TWO["primer"]]
    tok = load_tokenizer(BASE)
    sides = [hold_out(tokenize_pairs(load_pairs(r), tok), 0.3) for r in (twice, TWO["primer"])]
    prompts = [[{tuple(x) for x in part.pairs["prompt_ids"]} for part in parts] for parts in sides]
    assert prompts[0] == prompts[1] and not prompts[0][0] & prompts[0][1]


def test_the_table_says_what_the_models_say(held):
    "One cell, computed from the models and not from the run's tables."
    table = held.run.held_out()
    assert set(table.index.get_level_values("source")) == {"primer", "digest", "riddle"}
    pairs = tokenize_pairs(load_pairs(rows("riddle", 9)), load_tokenizer(BASE), max_length=64, max_prompt_length=32).pairs
    gamma_S, gamma_1, gamma_2 = (score_pairs(m, pairs).gamma(pairs) for m in (load_model(BASE), load_model(str(held.run.model_folder(1))), held.run.model))
    assert table.loc[("riddle", "after stage 2", "S"), "change of gamma"][0] == pytest.approx((gamma_2 - gamma_S).mean().item(), abs=1e-3)
    assert table.loc[("riddle", "after stage 2", "stage 1"), "change of gamma"][0] == pytest.approx((gamma_2 - gamma_1).mean().item(), abs=1e-3)
    assert abs((gamma_2 - gamma_1).mean()) > 1e-2


def test_held_out_pairs_lead_the_report(held):
    text = (held.run.folder / "report.md").read_text()
    order = [text.index(f"## {part}") for part in ("Held-out pairs", "Answers", "Data", "Partition under S", "Stages", "Signs of failure", "How it was run", "Settings")]
    assert order == sorted(order) and "riddle (9 pairs" in text


@pytest.mark.parametrize("change, word", [(dict(eval_share=0.2), "eval_share"), (dict(held_out=dict(riddle=rows("riddle", 8))), "held-out pairs"), (dict(held_out=None), "held-out pairs")])
def test_a_folder_keeps_what_is_held_out(held, change, word):
    asked = dict(eval_share=0.3, held_out=dict(riddle=rows("riddle", 9))) | change
    with pytest.raises(ValueError, match=word): sdpo(BASE, TWO, StepwiseConfig(**SETTINGS, eval_share=asked["eval_share"]), held.run.folder, held_out=asked["held_out"])


def test_a_refused_held_out_source_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="'primer' is also the name of a source"):
        sdpo(BASE, TWO, StepwiseConfig(**SETTINGS, eval_share=0.3), tmp_path / "run", held_out=dict(primer=rows("riddle", 4)))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_source_may_have_its_own_share(tmp_path):
    run = sdpo(BASE, dict(primer=dict(source=TWO["primer"], eval_share=0.5), digest=TWO["digest"]), StepwiseConfig(**SETTINGS), tmp_path / "run")
    assert list(json.loads((run.folder / "held_out.json").read_text())) == ["primer"]


def test_a_share_that_draws_nothing(tmp_path, capsys):
    "It is told, and counts stay whole numbers, also where only one source has a share."
    sources = dict(riddle=rows("riddle", 40), primer=rows("primer", 3))
    run = sdpo_partition(BASE, sources, StepwiseConfig(**SETTINGS, eval_share=0.1), tmp_path / "run")
    assert "warning: of primer no pair is held out" in capsys.readouterr().out
    held, = json.loads((run.folder / "held_out.json").read_text()).values()
    table = report._data_text(run)[1]
    assert "| rows | 40 | 3 |" in table and f"| held_out | {len(held['keys'])} | 0 |" in table
    run = sdpo_partition(BASE, sources | dict(riddle=dict(source=sources["riddle"], eval_share=0.1)), StepwiseConfig(**SETTINGS), tmp_path / "own")
    table = report._data_text(run)[1]
    assert "| rows | 40 | 3 |" in table and f"| held_out | {len(held['keys'])} |  |" in table and "NaN" not in (run.folder / "partition.json").read_text()
    made = Source("by hand", tokenize_pairs(load_pairs(sources["riddle"]), load_tokenizer(BASE)).pairs, {})
    assert data_notes(hold_out(made, 0.5)[0]) == []


def test_held_out_sources_are_written_down(tmp_path):
    "config.yaml is enough to run it again, and they may lie elsewhere then."
    file = write_jsonl(tmp_path / "mine.jsonl", rows("riddle", 6))
    asked = BASE, dict(primer=str(file)), StepwiseConfig(**SETTINGS)
    run = sdpo_partition(*asked, tmp_path / "a", held_out=dict(mine=file))
    cli.main(["partition", "--config", str(run.folder / "config.yaml"), "--folder", str(tmp_path / "b")])
    for folder in ("a", "b"): assert Run(tmp_path / folder).config["held_out"] == dict(mine=str(file)) and (tmp_path / folder / "held_out.json").exists()
    sdpo_partition(*asked, tmp_path / "a", held_out=dict(mine=write_jsonl(tmp_path / "elsewhere.jsonl", rows("riddle", 6))))


def test_prompts_that_are_trained_on_are_told(tmp_path, capsys):
    sdpo(BASE, TWO, StepwiseConfig(**SETTINGS), tmp_path / "run", held_out=dict(seen=TWO["primer"][:5] + rows("riddle", 3)))
    assert "5 of the 8 held-out pairs of seen have a prompt that is trained on" in capsys.readouterr().out


@pytest.mark.parametrize("share", [0.95, -0.1, float("nan")])
def test_an_impossible_share(share):
    with pytest.raises(ValueError, match="eval_share"): StepwiseConfig(eval_share=share)


def test_nothing_left_to_train_on():
    source = tokenize_pairs(load_pairs(TWO["primer"][:1]), load_tokenizer(BASE), "one")
    with pytest.raises(ValueError, match="source 'one': eval_share = 0.999999 holds out all of its 1 pairs"): hold_out(source, 0.999999)


# ---- who is told

def test_callbacks(held):
    lines = [dict(stage=t) | line for t in (1, 2) for line in metrics(held.run.folder / f"stage-{t}")]
    assert [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in held.steps] == lines and held.stages == [1, 2]


def test_a_tracker_gets_every_step(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = sdpo(BASE, TWO, StepwiseConfig(**SETTINGS, log_with="tensorboard"), tmp_path / "run")
    logs = [events.EventAccumulator(str(p.parent)).Reload() for p in (run.folder / "tracker").rglob("events.out*")]
    losses = [e for log in logs if "loss" in log.Tags()["scalars"] for e in log.Scalars("loss")]
    assert [e.step for e in losses] == list(range(1, len(run.metrics) + 1))
    assert [e.value for e in losses] == pytest.approx(run.metrics["loss"].tolist())


@pytest.mark.parametrize("name", ["paper", "comet_ml"])
def test_no_such_tracker(tmp_path, name):
    with pytest.raises(ValueError, match="^log_with: "): sdpo(BASE, TWO, StepwiseConfig(**SETTINGS, log_with=name), tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


# ---- bars

LOGGED = """
import time, sdpo_nb.logprobs as logprobs
logprobs.EVERY = 0.01
for leave in (True, False):
    with logprobs.progress(3, "S reads digest", "pair", leave=leave) as bar:
        for _ in range(3):
            time.sleep(0.02)
            bar.set_postfix_str("loss 0.693, 00:12 left", refresh=False)
            bar.update()
"""

def test_no_control_characters_in_a_log():
    "In a process of its own, whose errors go into a pipe."
    said = subprocess.run([sys.executable, "-c", LOGGED], env={k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}, capture_output=True, text=True).stderr
    assert said.splitlines() == [f"S reads digest: {n} of 3 pairs, loss 0.693, 00:12 left" for n in (1, 2, 3)] * 2


def test_no_bar_for_nothing():
    assert progress(5, "", "pair", done=5).disable


def test_the_clock_counts_all_that_is_left():
    "A pass that is there already is not waited for."
    S, tok = load_model(BASE), load_tokenizer(BASE)
    pairs = tokenize_pairs(load_pairs(TWO["primer"]), tok).pairs
    tokens = pair_tokens(pairs)
    clock = Clock(left=2.0 * tokens.sum())
    score_pairs(S, pairs, clock=clock)
    assert clock.left == tokens.sum() == clock.done and clock.spent > 0


def test_the_clock_of_a_run_ends_near_zero(tmp_path, monkeypatch):
    left = []
    plain = stages.train_stage
    def watched(*args, **kw):
        left.append(kw["clock"].left)
        out = plain(*args, **kw)
        left.append(kw["clock"].left)
        return out
    monkeypatch.setattr(stages, "train_stage", watched)
    sdpo(BASE, TWO, StepwiseConfig(**SETTINGS), tmp_path / "run")
    measured = sum(pair_tokens(tokenize_pairs(load_pairs(r), load_tokenizer(BASE), max_length=64, max_prompt_length=32).pairs).sum() for r in TWO.values())
    assert left == sorted(left, reverse=True) and left[-1] == measured   # the last pass over the probes


# ---- the report

def test_every_model_answers_the_same_prompts(held):
    parts = [json.loads((held.run.folder / f / "answers.json").read_text()) for f in ("base", "stage-1", "stage-2")]
    assert len({tuple(p["prompts"]) for p in parts}) == 1 and all(len(p["answers"]) == stages.ASKED for p in parts)


def test_the_report_says_how_it_was_run(held):
    text = (held.run.folder / "report.md").read_text()
    for what in ("command", "version of sdpo_nb", "version of torch", "tokens read in training", "time of the stages", "peak memory", "threads"): assert f"| {what} |" in text
    assert f"| tokens read in training | {held.run.metrics['tokens'].sum():,} (" in text
    assert int(text.split("| time of the stages | ")[1].split(" min")[0]) < 10


def test_a_part_that_is_gone_is_left_out(held, tmp_path):
    import shutil
    folder = shutil.copytree(held.run.folder, tmp_path / "copy")
    for name in ("answers.json", "cost.json"): (folder / "stage-1" / name).unlink()
    (folder / "base" / "answers.json").unlink()
    Run(folder).report()
    answers = (folder / "report.md").read_text().split("## Answers")[1].split("## ")[0]
    assert "| after stage 2 |" in answers and "| S |" not in answers, "what a model says is headed by its own name"
    (folder / "stage-2" / "cost.json").write_text("null")
    with pytest.raises(ValueError, match="cost.json: cannot be used .*; remove it: the report does without"): Run(folder).report()


def test_a_model_to_give_away(held, tmp_path):
    folder = held.run.export(tmp_path / "not yet there" / "out")
    assert load_model(str(folder)) and load_tokenizer(str(folder)) and (folder / "figures" / "change.png").exists()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and "Held-out pairs" in card and "- dpo" in card and str(Path(BASE).parent) not in card
    with pytest.raises(ValueError, match="is there already"): held.run.export(folder)


def test_an_export_takes_nothing_of_yours_away(held, tmp_path):
    (tmp_path / "model-1.tmp").mkdir()
    held.run.export(tmp_path / "model-1.5")
    assert (tmp_path / "model-1.tmp").is_dir()


def test_a_run_without_a_finished_stage_says_so(tmp_path):
    (tmp_path / "stage-1").mkdir()
    for call in (lambda: Run(tmp_path).metrics, Run(tmp_path).report, Run(tmp_path).signs):
        with pytest.raises(ValueError, match="no stage is finished"): call()


@pytest.mark.parametrize("order, by_token", [("easy_to_hard", [0.6, 0.4]), ("hard_to_easy", [0.4, 0.6])])
def test_equal_accuracies_follow_the_order_that_was_asked_for(order, by_token):
    measures = pd.DataFrame(dict(accuracy=[0.5, 0.5], low=[0.49, 0.49], high=[0.51, 0.51], accuracy_per_token=by_token), index=["a", "b"])
    assert not any("mean log-probability" in line for line in undecided(measures, order))
    assert "b, a" in undecided(measures.assign(accuracy_per_token=by_token[::-1]), order)[-1]


def test_pushed_is_what_is_exported(held, monkeypatch):
    sent = {}
    class Hub:
        def create_repo(self, repo_id, private, exist_ok): sent.update(repo=repo_id, private=private); return f"https://hub/{repo_id}"
        def upload_folder(self, repo_id, folder_path, commit_message): sent.update(files={str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()})
    monkeypatch.setattr(report, "HfApi", Hub)
    assert held.run.push("me/aligned") == "https://hub/me/aligned"
    assert sent["repo"] == "me/aligned" and sent["private"] and {"README.md", "config.json", "model.safetensors", "tokenizer.json", "figures/change.png"} <= sent["files"]


def test_a_card_names_what_others_can_find(held, monkeypatch):
    config = held.run.config | dict(model="some/model", sources=dict(a="some/data", b=str(Path("/nowhere/x.jsonl")), c=dict(source="other/data", split="train")))
    monkeypatch.setattr(Run, "config", config)
    about = model_card(held.run).data
    assert about.base_model == "some/model" and about.datasets == ["some/data", "other/data"]


def test_a_report_says_where_held_out_prompts_were_trained_on():
    assert report._seen_text(dict(mine=dict(seen=3), other=dict(seen=0), old=dict())) == ["Of these pairs, some have a prompt that was trained on: 3 of mine. They say less."]


@pytest.mark.parametrize("part, told", [
    ([], "holds no names"), (dict(keys=["a"]), "lacks tokens"), (dict(keys=["a"], tokens=dict(chosen=1)), "lacks the tokens of a side"),
    (dict(keys=["a"], tokens=dict(chosen=1, rejected=1), lengths=dict(chosen=[1])), "the lengths of both")])
def test_a_damaged_list_of_held_out_pairs_is_named(part, told):
    with pytest.raises(ValueError, match=told): report._check_held("mine", part)
