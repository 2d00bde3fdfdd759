"Guards of chapter 00: prompts that do not exist, few rows, and what the check of the world asks."
import copy, json, random
from pathlib import Path

import pytest
import torch

import sdpo_nb.world as W
from sdpo_nb.world import check_world, load_base, load_world, make_model, make_prompts, make_tokenizer, sft


@pytest.mark.parametrize("n, split, kw, said", [
    (1, "train", {}, "split 'train': expected one of"),
    (10 ** 6, "test", dict(lengths=(1, 1)), "of 1000000 prompts for 'test'"),
    (1, "test", dict(keep=lambda p: False), "found 0 of 1 prompts"),
])
def test_prompts_that_do_not_exist(n, split, kw, said):
    with pytest.raises(ValueError, match=said): make_prompts(n, split, random.Random(0), **kw)


def test_all_prompts_of_a_split_can_be_drawn():
    every = {f"{s} {a}{b}" for s in W.SKILLS for a in W.ALPHABET for b in W.ALPHABET if a != b}
    test = {p for p in every if W.split_of(p) == "test"}
    assert set(make_prompts(len(test), "test", random.Random(0), lengths=(2, 2))) == test


@pytest.mark.parametrize("rows, epochs", [(1, 1), (3, 2), (3, 10), (127, 3)])
def test_fewer_rows_than_a_batch(rows, epochs):
    tok = make_tokenizer(); model = make_model(tok, hidden=8, layers=1); before = copy.deepcopy(model.state_dict())
    sft(model, tok, [("copy ab", "ab")] * rows, epochs=epochs)
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.fixture
def world_check(monkeypatch):
    "The check without its minutes: pairs as frozen, and S 'retrained' to nearly the frozen one."
    w = load_world(); S, _ = load_base(w)
    with torch.no_grad(): next(S.parameters()).mul_(1 + 1e-6)
    monkeypatch.setattr(W, "world_pairs", lambda *a: {n: [json.loads(l) for l in Path(f).read_text().splitlines()] for n, f in w.sources.items()})
    monkeypatch.setattr(W, "train_base", lambda *a: S)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: w.manifest["cpu"])
    monkeypatch.setattr(W, "version", w.manifest["versions"].get)
    return w


def test_same_weights_have_the_same_hash(world_check, monkeypatch):
    monkeypatch.setattr(W, "train_base", lambda *a: load_base(world_check)[0])
    assert "same hash" in check_world()[-1]


@pytest.mark.parametrize("package, said", [("torch", "torch 0.1, frozen with"), ("transformers", "transformers 0.1, frozen with"), (None, "torch and transformers are the same")])
def test_other_weights_are_compared_by_skill(world_check, monkeypatch, package, said):
    monkeypatch.setattr(W, "version", lambda p: "0.1" if p == package else world_check.manifest["versions"][p])
    assert "skills at most 0.0 points off (" + said in check_world()[-1]


def test_a_model_that_answers_otherwise_is_not_the_same(world_check, monkeypatch):
    monkeypatch.setattr(W, "train_base", lambda texts, tok: make_model(tok))
    with pytest.raises(AssertionError, match="12 are allowed"): check_world()
