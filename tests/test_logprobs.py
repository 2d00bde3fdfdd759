"Guards of chapter 02: bad input, kills, tables of another kind, equality with other computations."
import json

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from sdpo_nb.logprobs import (LogprobTable, autocast, collate, dropouts, freeze_dropout, gamma, load_model, load_tokenizer, pick_precision,
                              read_table, response_logprobs, score_pairs, table_kind, token_logprobs, weights_hash, write_json)

torch.set_num_threads(1)
SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
KINDS = {"llama": SMALL, "opt": SMALL | dict(ffn_dim=64, word_embed_proj_dim=32), "bloom": dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
         "gpt2": dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4), "mpt": dict(vocab_size=64, d_model=32, n_layers=2, n_heads=4)}


def make(kind="llama", seed=0, **settings):
    set_seed(seed)
    config = AutoConfig.for_model(kind, **KINDS[kind], **dict(pad_token_id=0, bos_token_id=1, eos_token_id=2) | settings)
    return freeze_dropout(AutoModelForCausalLM.from_config(config)).eval()


def make_pairs(n=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    def ids(low, high): return torch.randint(0, 64, (int(torch.randint(low, high, (), generator=g)),), generator=g).tolist()
    return [dict(key=f"k{seed}-{i}", prompt_ids=ids(1, 9), chosen_ids=ids(1, 9), rejected_ids=ids(1, 9)) for i in range(n)]


@pytest.fixture(scope="module")
def model(): return make()


@pytest.fixture
def asked(model):
    "Pairs the model was asked about, one number a forward."
    seen = []
    handle = model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(len(kwargs["input_ids"]) // 2), with_kwargs=True)
    yield seen
    handle.remove()


def by_cross_entropy(model, pairs, side):
    "Another way to the same number: summed cross-entropy with labels of -100 outside the response, one row at a time."
    out = []
    for p in pairs:
        ids = torch.tensor([p["prompt_ids"] + p[side]])
        labels = torch.tensor([[-100] * len(p["prompt_ids"]) + p[side]])
        out.append(-F.cross_entropy(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1], labels[0, 1:], reduction="sum"))
    return torch.stack(out)


# log-probabilities

@pytest.mark.parametrize("kind", KINDS)
def test_padded_equals_cross_entropy(kind):
    model, pairs = make(kind), make_pairs(7)
    pairs.append(dict(key="long", prompt_ids=[3] * 20, chosen_ids=[5, 0, 2], rejected_ids=list(range(40)))) # one long row; pad and eos ids as ordinary tokens
    for got, side in zip(response_logprobs(model, pairs), ("chosen_ids", "rejected_ids")):
        assert_close(got, by_cross_entropy(model, pairs, side), atol=1e-4, rtol=1e-5)


def test_gradient_equals_cross_entropy():
    model, pairs = make(), make_pairs(5)
    chosen, rejected = response_logprobs(model, pairs)
    gamma(chosen, rejected).sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    (by_cross_entropy(model, pairs, "chosen_ids") - by_cross_entropy(model, pairs, "rejected_ids")).sum().backward()
    for n, p in model.named_parameters(): assert_close(got[n], p.grad, atol=1e-4, rtol=1e-4)


def test_batch_of_one(model):
    pair = make_pairs(1)
    assert [t.shape for t in response_logprobs(model, pair)] == [(1,), (1,)]
    assert_close(response_logprobs(model, pair)[1], by_cross_entropy(model, pair, "rejected_ids"))


def test_collate_reads_lengths_not_ids():
    ids, seen, scored = collate([dict(prompt_ids=[0, 0], chosen_ids=[0], rejected_ids=[0, 0, 0])])
    assert ids.sum() == 0 and seen.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert scored.tolist() == [[False, False, True, False, False], [False, False, True, True, True]]


def test_bf16_logits_are_summed_in_fp32():
    logits, ids = torch.randn(400, 64).bfloat16(), torch.randint(0, 64, (400,))
    got = token_logprobs(logits, ids)
    assert got.dtype == torch.float32
    assert_close(got.sum().double(), logits.double().log_softmax(-1)[torch.arange(400), ids].sum(), atol=1e-3, rtol=0)
    model = make()
    with autocast("cpu", "bf16"): assert response_logprobs(model, make_pairs(3))[0].dtype == torch.float32


# dropout

@pytest.mark.parametrize("kind", KINDS)
def test_no_dropout_survives(kind):
    model, pairs = make(kind).train(), make_pairs(4)
    for owner, name in dropouts(model):
        if isinstance(getattr(owner, name), float): setattr(owner, name, 0.5)
    freeze_dropout(model)
    assert dropouts(model) and all(getattr(o, n) == 0 for o, n in dropouts(model))
    assert torch.equal(response_logprobs(model, pairs)[0], response_logprobs(model, pairs)[0])


def test_nested_config_is_found():
    model = make("mpt")
    assert any(o is model.config.attn_config for o, _ in dropouts(model))


def test_dropout_module_written_by_hand():
    class Odd(torch.nn.Module):
        def __init__(self): super().__init__(); self.a, self.encoder_layerdrop, self.p, self.drop_path_rate = torch.nn.Dropout1d(0.3), 0.2, 0.7, 0.1
    odd = freeze_dropout(Odd())
    assert (odd.a.p, odd.encoder_layerdrop, odd.drop_path_rate, odd.p) == (0, 0, 0, 0.7)      # `p` of another module is not dropout


# loading, hashing, precision

@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_what_is_no_model_is_said_before_the_hub_is_asked(load, tmp_path):
    (tmp_path / "empty").mkdir(); (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="without config.json"): load(str(tmp_path / "empty"))
    for bad in (tmp_path / "missing", tmp_path / "file", "./missing", "runs/first/stage-9/model", "~/no-such-folder-here"):
        with pytest.raises(ValueError, match="no such model folder"): load(str(bad))


def test_bf16_folder_comes_back_in_fp32(tmp_path):
    make().bfloat16().save_pretrained(tmp_path)
    loaded = load_model(tmp_path, "cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32} and not loaded.training


@pytest.mark.parametrize("tied", [True, False])
def test_weights_hash(tied, tmp_path):
    model = make(tie_word_embeddings=tied)
    before = weights_hash(model)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, "cpu")
    assert weights_hash(again) == before
    again.lm_head.weight.data.view(torch.int32)[3, 5] ^= 1
    assert weights_hash(again) != before
    assert weights_hash(make(tie_word_embeddings=not tied)) != before


def test_weights_hash_of_a_scalar_parameter():
    m = torch.nn.Module(); m.s = torch.nn.Parameter(torch.tensor(1.0))
    assert len(weights_hash(m)) == 16


def test_pick_precision(monkeypatch):
    with pytest.raises(ValueError, match="float8"): pick_precision("float8")
    for p in ("bf16", "fp16", "fp32"): assert pick_precision(p, "cuda:1") == p
    for cpu, want in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: cpu)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert pick_precision("auto", torch.device("cpu")) == want
    for real, want in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: real or including_emulation) # a T4 says yes by emulation
        assert pick_precision("auto", "cuda") == want


# tables

def test_table_equals_direct_computation(model, tmp_path):
    pairs = make_pairs()
    table = score_pairs(model, pairs, tmp_path / "t", token_budget=200, piece=7)
    for t in (table, read_table(tmp_path / "t")):
        assert_close(t.lookup(pairs), tuple(by_cross_entropy(model, pairs, s).detach() for s in ("chosen_ids", "rejected_ids")), atol=1e-4, rtol=1e-5)
        assert t.gamma(pairs).dtype == torch.float32 and set(t.rows.dtypes) == {pd.Series(dtype="float32").dtype}
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["kind.json"] + [f"logprobs-0000{i}.parquet" for i in range(4)]


def test_killed_pass_continues(model, asked, tmp_path, monkeypatch):
    pairs, calls = make_pairs(), []
    def fours(model, part): # its budget counts pairs
        calls.append(len(part))
        if len(calls) == 10: raise KeyboardInterrupt # six calls are the whole pass
        return response_logprobs(model, part)
    fours.tokens = len
    whole = score_pairs(model, pairs, logprobs=fours, token_budget=4, piece=8)
    with pytest.raises(KeyboardInterrupt): score_pairs(model, pairs, tmp_path, logprobs=fours, token_budget=4, piece=8)
    assert len(read_table(tmp_path).rows) == 8
    (tmp_path / "logprobs-00001.tmp").write_bytes(b"PAR1 half")
    asked.clear()
    table = score_pairs(model, pairs, tmp_path, logprobs=fours, token_budget=4, piece=8)
    assert sum(asked) == 16 and not list(tmp_path.glob("*.tmp"))
    pd.testing.assert_frame_equal(table.rows, whole.rows, check_exact=True)


def test_lost_piece_is_scored_again_and_no_other_is_overwritten(model, asked, tmp_path):
    pairs = make_pairs()
    before = score_pairs(model, pairs, tmp_path, piece=8)
    (tmp_path / "logprobs-00000.parquet").unlink(); asked.clear()
    after = score_pairs(model, pairs, tmp_path, piece=8)
    assert sum(asked) == 8 and len(read_table(tmp_path).rows) == 24
    pd.testing.assert_frame_equal(after.rows.sort_index(), before.rows.sort_index(), check_exact=True)


def test_more_pairs_are_added(model, asked, tmp_path):
    score_pairs(model, make_pairs(5), tmp_path); asked.clear()
    table = score_pairs(model, make_pairs(5) + make_pairs(3, seed=1), tmp_path)
    assert sum(asked) == 3 and len(table.rows) == len(read_table(tmp_path).rows) == 8


def test_duplicates_are_scored_once(model, asked, tmp_path):
    pairs = make_pairs(5)
    table = score_pairs(model, pairs + pairs[:3], tmp_path)
    assert sum(asked) == 5 and table.rows.index.is_unique
    assert len(table.gamma(pairs + pairs[:3])) == 8
    (tmp_path / "logprobs-00001.parquet").write_bytes((tmp_path / "logprobs-00000.parquet").read_bytes())
    assert read_table(tmp_path).rows.index.is_unique


def test_table_of_another_kind_is_computed_again(model, asked, tmp_path, capsys):
    pairs = make_pairs(6)
    score_pairs(model, pairs, tmp_path)
    assert capsys.readouterr().out == ""
    asked.clear()
    half = score_pairs(model, pairs, tmp_path, precision="bf16")
    assert sum(asked) == 6 and "precision fp32 -> bf16" in capsys.readouterr().out
    assert read_table(tmp_path).kind == half.kind and half.kind["precision"] == "bf16"
    other = make(seed=1)
    table = score_pairs(other, pairs, tmp_path, precision="bf16")
    said = capsys.readouterr().out
    assert f"weights {weights_hash(model)} -> {weights_hash(other)}" in said and "precision" not in said
    assert len(read_table(tmp_path).rows) == 6 and not torch.equal(table.gamma(pairs), half.gamma(pairs))


@pytest.mark.parametrize("kind", [None, "", '{"weights": "12', "[]", '{"weights": "an older version"}'])
def test_pieces_of_unknown_kind_are_not_trusted(model, asked, tmp_path, capsys, kind):
    pairs = make_pairs(6)
    score_pairs(model, pairs, tmp_path)
    (tmp_path / "kind.json").unlink() if kind is None else (tmp_path / "kind.json").write_text(kind)
    asked.clear()
    score_pairs(model, pairs, tmp_path)
    assert sum(asked) == 6 and "computed again" in capsys.readouterr().out
    assert read_table(tmp_path).kind == table_kind(model, "fp32", response_logprobs)


def test_no_pairs(model, asked, tmp_path):
    assert len(score_pairs(model, []).rows) == 0
    table = score_pairs(model, [], tmp_path)
    assert len(read_table(tmp_path).rows) == 0 and not asked
    assert [t.shape for t in table.lookup([])] == [(0,), (0,)]


def test_missing_pair_is_named(model):
    table = score_pairs(model, make_pairs(3))
    with pytest.raises(ValueError, match="1 of 2 pairs .* k1-0"): table.lookup(make_pairs(1) + make_pairs(1, seed=1))
    with pytest.raises(ValueError, match="not in the table"): LogprobTable({}, pd.DataFrame()).gamma(make_pairs(1))


def test_unreadable_tables_are_named(model, tmp_path):
    with pytest.raises(ValueError, match="no table"): read_table(tmp_path / "nowhere")
    score_pairs(model, make_pairs(3), tmp_path)
    (tmp_path / "logprobs-00000.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="logprobs-00000.parquet: cannot be read"): read_table(tmp_path)


def test_weights_that_are_not_numbers(tmp_path):
    broken, pairs = make(), make_pairs(3)
    broken.lm_head.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="not finite"): score_pairs(broken, pairs, tmp_path)
    assert not list(tmp_path.glob("logprobs-*"))


def test_mode_and_random_state_are_left_alone(model):
    model.train(); state = torch.get_rng_state()
    score_pairs(model, make_pairs(3))
    assert model.training and torch.equal(torch.get_rng_state(), state)
    model.eval(); score_pairs(model, make_pairs(3)); assert not model.training


def test_a_dataset_is_scored_like_a_list(model):
    from datasets import Dataset
    pairs = make_pairs(9)
    assert_close(score_pairs(model, Dataset.from_list(pairs)).gamma(pairs), score_pairs(model, pairs).gamma(pairs), atol=0, rtol=0)


def test_write_json_leaves_no_temporary_file(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1}); write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 2} and [p.name for p in tmp_path.iterdir()] == ["a.json"]
