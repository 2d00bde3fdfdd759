"Guards of chapter 02: bad input, kills, tables of another kind, equality with other computations."
import copy, errno, json, os, shutil, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM, set_seed

from sdpo_nb import logprobs
from sdpo_nb.benchmarks import quiet
from sdpo_nb.logprobs import (LogprobTable, autocast, best_device, check_model, check_rows, collate, dropouts, freeze_dropout, gamma, load_config, load_model, load_tokenizer,
                              must_read_alone, pick_precision, read_table, replacing, response_logprobs, score_pairs, stored_dtype, table_kind, token_logprobs, weights_hash, write_json)
from sdpo_nb.packing import choose_logprobs, packed_logprobs
from sdpo_nb.world import load_world

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


@pytest.mark.parametrize("f", [response_logprobs, packed_logprobs])
def test_nothing_to_score(model, f):
    "A sum of nothing would be 0, the log-probability of certainty."
    with pytest.raises(ValueError, match="pairs: none"): f(model, [])
    for side in ("chosen_ids", "rejected_ids"):
        with pytest.raises(ValueError, match="with an empty response"): f(model, make_pairs(2) + [make_pairs(1)[0] | {side: []}])


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


@pytest.mark.parametrize("kind, settings", [("phimoe", {}), ("mixtral", dict(router_jitter_noise=0.1)), ("phimoe", dict(input_jitter_noise=0.1))])
def test_noise_of_experts_is_off(kind, settings):
    "bugs F9. What eval mode computes stays as it was: PhiMoE reads the same number there."
    set_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, num_key_value_heads=2, num_local_experts=4, pad_token_id=0, initializer_range=0.5, **settings)
    model, pairs = AutoModelForCausalLM.from_config(config).eval(), make_pairs(9)
    before = torch.cat(response_logprobs(model, pairs))
    noisy = copy.deepcopy(model).train()
    assert not torch.equal(torch.cat(response_logprobs(noisy, pairs)), torch.cat(response_logprobs(noisy, pairs)))
    quiet = copy.deepcopy(freeze_dropout(freeze_dropout(model))).train()
    for _ in range(2): assert torch.equal(torch.cat(response_logprobs(quiet, pairs)), before)
    assert quiet.training and max(len(m._forward_pre_hooks) for m in quiet.modules()) == 1


# rows that change their neighbours

LONGROPE = dict(rope_type="longrope", short_factor=[1.] * 4, long_factor=[8., 16., 32., 64.])
STRETCHED = {"phi3": dict(num_key_value_heads=4, max_position_embeddings=256, original_max_position_embeddings=32, rope_scaling=LONGROPE),
             "llama": dict(max_position_embeddings=32, rope_parameters=dict(rope_type="dynamic", factor=4., rope_theta=1e4))}
SHORT = dict(key="short", prompt_ids=[*range(3, 9)], chosen_ids=[*range(9, 16)], rejected_ids=[*range(20, 26)])
LONG = dict(key="long", prompt_ids=[*range(3, 23)], chosen_ids=[*range(9, 39)], rejected_ids=[*range(5, 33)])

@pytest.mark.parametrize("kind", STRETCHED)
def test_rotary_positions_do_not_depend_on_neighbours(kind):
    "bugs F8: padded, packed and scored, in any order, against plain rows of a model that has read nothing yet."
    set_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2, **STRETCHED[kind])).eval()
    fresh = copy.deepcopy(model)
    want = {p["key"]: [by_cross_entropy(copy.deepcopy(fresh), [p], s).item() for s in ("chosen_ids", "rejected_ids")] for p in (SHORT, LONG)}
    def near(got, pairs): assert_close(torch.stack(got, 1), torch.tensor([want[p["key"]] for p in pairs]), atol=1e-3, rtol=0)
    for pairs in ([SHORT, LONG], [LONG, SHORT], [SHORT], [LONG], [SHORT, LONG]):
        assert must_read_alone(model, pairs) == (LONG in pairs)
        for f in (response_logprobs, packed_logprobs): near(f(model, pairs), pairs)
    near(score_pairs(model, [SHORT, LONG], logprobs=packed_logprobs).lookup([LONG, SHORT]), [LONG, SHORT])
    gamma(*response_logprobs(model, [SHORT, LONG])).sum().backward()
    assert choose_logprobs(model, [SHORT, LONG]) is response_logprobs and choose_logprobs(model, [SHORT]) is packed_logprobs


def test_other_models_are_read_in_one_batch(model, asked):
    assert not must_read_alone(model, [LONG]) and not must_read_alone(make("gpt2"), [LONG])
    response_logprobs(model, [SHORT, LONG])
    assert asked == [2]


# loading, hashing, precision

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"

@pytest.fixture
def broken(tmp_path):
    "Makes a copy of S with one file changed: other text, other bytes, other settings, or gone."
    def make_broken(file, content=None, **settings):
        folder = tmp_path / "broken"
        shutil.copytree(load_world().base, folder)
        if settings: content = json.dumps(json.loads((folder / file).read_text()) | settings)
        if content is None: (folder / file).unlink()
        elif isinstance(content, bytes): (folder / file).write_bytes(content)
        else: (folder / file).write_text(content)
        return str(folder)
    return make_broken

def refused(load, folder):
    "The only line of the ValueError, without the folder that it begins with."
    with pytest.raises(ValueError) as e: load(folder)
    said = str(e.value)
    assert said.startswith(f"{folder}: ") and "\n" not in said and len(said) < 600, said
    return said[len(folder) + 2:]

@pytest.mark.parametrize("content, word", [(POINTER, "Git-LFS pointer.*git lfs pull"), (b"", "not complete"), (b"\x01" * 99, "not complete")])
def test_broken_weights(broken, content, word):
    "bugs F16, trust F7"
    said = refused(load_model, broken("model.safetensors", content))
    assert said.startswith("model.safetensors is ") and pd.Series([said]).str.contains(word).all()

def test_half_of_the_weights(broken):
    "bugs F16"
    whole = (Path(load_world().base) / "model.safetensors").read_bytes()
    assert "model.safetensors is broken or not complete" in refused(load_model, broken("model.safetensors", whole[:len(whole) // 2]))

def test_a_file_that_may_not_be_read_is_not_called_broken(monkeypatch):
    "Root may read every file, so the right is taken away here."
    def denied(path, *a, **kw):
        if "config" not in str(path): raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(logprobs, "_is_pointer", denied)
    monkeypatch.setattr(logprobs.AutoModelForCausalLM, "from_pretrained", denied)
    with pytest.raises(PermissionError, match="S/model.safetensors: you have no right to read this file"): load_model(load_world().base)

@pytest.mark.parametrize("settings, words", [
    (dict(vocab_size=57), "embed_tokens.weight is (50, 96) in the checkpoint, but config.json asks for (57, 96)"), (dict(hidden_size=64), "asks for (50, 64)"),
    (dict(num_attention_heads=7), "not a multiple"), (dict(vocab_size="many"), "expected int"), (dict(hidden_act="none such"), "none such"), (dict(model_type="none such"), "does not recognize"),
    (dict(quantization_config=dict(quant_method="bitsandbytes", load_in_4bit=True)), "bitsandbytes")])
def test_config_that_does_not_belong_to_the_weights(broken, settings, words):
    "bugs F17, trust F7"
    assert words in refused(load_model, broken("config.json", **settings))

@pytest.mark.parametrize("load", [load_model, load_tokenizer, load_config, stored_dtype])
@pytest.mark.parametrize("content", ["[]", POINTER, "{"])
def test_broken_config(broken, load, content): refused(load, broken("config.json", content))

@pytest.mark.parametrize("content, words", [(POINTER, "tokenizer.json is a Git-LFS pointer"), ("{", "tokenizer.json is broken"), ("{}", "added_tokens"), (None, "has no tokenizer")])
def test_broken_tokenizer(broken, content, words):
    "bugs F40, trust F7"
    folder = broken("tokenizer.json", content)
    if content is None: os.remove(f"{folder}/tokenizer_config.json")
    assert words in refused(load_tokenizer, folder)

def test_weights_are_not_blamed_for_a_tokenizer(broken):
    folder = broken("model.safetensors", POINTER)
    load_tokenizer(folder)
    os.remove(f"{folder}/tokenizer.json"); os.remove(f"{folder}/tokenizer_config.json")
    assert "has no tokenizer" in refused(load_tokenizer, folder)

def test_weights_that_no_checkpoint_holds(broken, tmp_path):
    "trust F7: a pickle, and no weights at all"
    folder = broken("model.safetensors")
    assert "no file named model.safetensors" in refused(load_model, folder)
    (tmp_path / "broken" / "pytorch_model.bin").write_text("hello")
    assert "pytorch_model.bin is broken" in refused(load_model, folder)

@pytest.mark.parametrize("settings, words", [(dict(hidden_act="none such"), "none such"), (dict(model_type="none such"), "does not recognize")])
def test_files_that_nobody_reads_are_not_blamed(broken, settings, words):
    "A trainer's settings, which are a pickle; a log of lines; the pointer of a format that is not taken; a tokenizer, for the model."
    folder = Path(broken("config.json", **settings))
    for name, content in {"training_args.bin": b"\x80\x04", "trainer_log.json": b"{}\n{}\n", "pytorch_model.bin": POINTER.encode(), "tokenizer.json": b"{"}.items(): (folder / name).write_bytes(content)
    assert words in refused(load_model, str(folder))
    (folder / "model.safetensors").unlink(); (folder / "pytorch_model.bin").unlink()
    shutil.copy(f"{load_world().base}/config.json", folder)
    assert "no file named model.safetensors" in refused(load_model, str(folder))
    (folder / "tokenizer.json").unlink(); (folder / "tokenizer_config.json").unlink()
    assert "has no tokenizer" in refused(load_tokenizer, str(folder))

def test_half_of_a_sharded_checkpoint(broken):
    folder = Path(broken("model.safetensors"))
    load_model(load_world().base).save_pretrained(folder, max_shard_size="500KB")
    for name, content, said in (("model.safetensors.index.json", "{", "broken or not complete"), ("model-00002-of-00003.safetensors", POINTER, "a Git-LFS pointer")):
        (folder / name).write_text(content)
        assert refused(load_model, str(folder)).startswith(f"{name} is {said}")

@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_hub_that_cannot_be_reached(load, monkeypatch):
    "trust F7"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "hub cannot be reached" in refused(load, "nobody/nothing-here")

@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_errors_are_not_the_folder_s_fault(monkeypatch, error):
    def full(*args, **kw): raise error
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", full)
    with pytest.raises(type(error)) as e: load_tokenizer(load_world().base)
    assert e.value is error

@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_no_output_layer(kind, tmp_path):
    "bugs F10: a decoder alone, and a reward model"
    kind.from_config(AutoConfig.for_model("llama", **SMALL)).save_pretrained(tmp_path)
    assert "the checkpoint has no lm_head.weight (1 missing)" in refused(load_model, str(tmp_path))

def test_missing_and_unused_tensors(broken, capsys):
    "trust F2: more layers than there are, and fewer; tied weights are not missing"
    folder = broken("config.json", num_hidden_layers=5)
    assert "has no model.layers.3.input_layernorm.weight (18 missing)" in refused(load_model, folder)
    capsys.readouterr()
    load_model(load_world().base)
    assert capsys.readouterr().out == ""
    shutil.rmtree(folder)
    load_model(broken("config.json", num_hidden_layers=2))
    assert capsys.readouterr().out == f"{folder}: 9 tensors of the checkpoint are not used, the first is model.layers.2.input_layernorm.weight\n"

def test_code_of_a_model_is_never_run(broken, tmp_path, monkeypatch):
    "trust F12, bugs F30: not even where somebody would say yes"
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    own = dict(AutoConfig="evil.Config", AutoModelForCausalLM="evil.Model")
    folder = broken("config.json", model_type="evil", auto_map=own)
    (tmp_path / "broken" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for load in (load_model, load_config, stored_dtype): assert "Python code of its own" in refused(load, folder)
    with pytest.raises(ValueError): load_tokenizer(broken_tokenizer(tmp_path / "tokenizer"))
    assert not (tmp_path / "ran").exists()

def broken_tokenizer(folder):
    "A tokenizer that only its own code could load."
    shutil.copytree(load_world().base, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | dict(tokenizer_class="Evil", auto_map=dict(AutoTokenizer=["evil.Evil", None]))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')"); (folder / "tokenizer.json").unlink()
    return str(folder)

def test_revision_reaches_the_hub(monkeypatch):
    "A folder has none."
    seen = []
    def noted(model, **kw): seen.append((model, kw.get("revision", "none"), kw["trust_remote_code"])); raise OSError("asked")
    for kind in (AutoTokenizer, AutoConfig, AutoModelForCausalLM): monkeypatch.setattr(kind, "from_pretrained", noted)
    for load in (load_model, load_tokenizer, load_config, stored_dtype):
        for kw in ({}, dict(revision="v1")):
            with pytest.raises(ValueError, match="asked"): load("some/model", **kw)
            with pytest.raises(ValueError, match="asked"): load(str(load_world().base), **kw)
    base = str(load_world().base)
    assert seen == [("some/model", "none", False), (base, "none", False), ("some/model", "v1", False), (base, "none", False)] * 4


# a model in memory

def test_a_sound_model_passes():
    for kind in KINDS: check_model(make(kind))
    check_model(load_model(load_world().base).train())
    check_model(make().bfloat16())

@pytest.mark.parametrize("how", ["PeftModel", "add_adapter"])
def test_adapters_in_memory(how):
    "bugs F21"
    model = SimpleNamespace(peft_config={}) if how == "PeftModel" else make()
    if how == "add_adapter": model._hf_peft_config_loaded = True
    with pytest.raises(ValueError, match="PEFT adapter; merge it first: merge_and_unload"): check_model(model)

@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("gone", [(), ("config.json", "model.safetensors")])
def test_adapters_in_a_folder(broken, load, gone):
    "bugs F22"
    folder = broken("adapter_config.json", "{}")
    for file in gone: os.remove(f"{folder}/{file}")
    assert "PEFT adapter; merge it first: merge_and_unload" in refused(load, folder)

def test_frozen_weights():
    "bugs F23; a table that never requires a gradient is not meant"
    model = make()
    model.model.embed_tokens.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight has requires_grad=False \(1 such\), and would be trained all the same"): check_model(model)
    check_model(model.requires_grad_(True))
    check_model(AutoModelForCausalLM.from_config(AutoConfig.for_model("pegasus", vocab_size=64, d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, is_decoder=True)))

def test_classes_that_would_not_come_back(monkeypatch):
    "bugs F30"
    class Mine(LlamaForCausalLM): pass
    config = AutoConfig.for_model("llama", **SMALL)
    with pytest.raises(ValueError, match="Mine comes back as LlamaForCausalLM: a model with code of its own"): check_model(Mine(config))
    class Config(type(config)): model_type = "known-to-this-test"
    with pytest.raises(ValueError, match="Mine cannot be loaded again"): check_model(Mine(Config(**SMALL)))
    class Registered(LlamaForCausalLM): config_class = Config      # a class that this program knows comes back; one that came with a model does not
    AutoConfig.register(Config.model_type, Config); AutoModelForCausalLM.register(Config, Registered)
    check_model(Registered(Config(**SMALL)))
    Registered.__module__ = "transformers_modules.somebody.modeling_mine"
    monkeypatch.setitem(sys.modules, Registered.__module__, sys.modules[__name__])
    with pytest.raises(ValueError, match="cannot be loaded again: a model with code of its own"): check_model(Registered(Config(**SMALL)))

@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_a_model_that_reads_the_answer(kind):
    "bugs F36, trust F11"
    set_seed(0)
    def build(**kw): return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **kw)).train()
    bad = build()
    with pytest.raises(ValueError, match="is not causal"): check_model(bad)
    assert bad.training
    check_model(build(is_decoder=True))

def test_rows_beyond_the_positions(capsys):
    "bugs F18, trust F4: a table ends, rotation does not"
    rows = [dict(prompt_ids=[5] * n, chosen_ids=[6], rejected_ids=[7]) for n in (31, 46)]
    for model in (make("gpt2", n_positions=32), make("opt", max_position_embeddings=32), make("mpt", max_seq_len=32)):
        check_rows(model, 32, 63)
        response_logprobs(model, rows[:1])
        with pytest.raises((IndexError, RuntimeError)): response_logprobs(model, rows[1:])
        with pytest.raises(ValueError, match="rows of up to 47 tokens, but it has 32 positions; set max_length=32"): check_rows(model, 47, 63)
    check_rows(make("bloom"), 4000, 63)
    assert capsys.readouterr().out == ""
    S = load_model(load_world().base)
    check_rows(S, 128, 49)
    assert capsys.readouterr().out == ""
    check_rows(S, 500, 49)
    assert capsys.readouterr().out == "model: rows of up to 500 tokens go beyond the 128 that it was made for; max_length=128 keeps within\n"

@pytest.mark.parametrize("kind", KINDS)
def test_tokens_beyond_the_embedding(kind):
    "bugs F19, trust F4"
    check_rows(make(kind), 9, 63)
    with pytest.raises(ValueError, match="token 64 is in the pairs, but the embedding has 64 rows"): check_rows(make(kind), 9, 64)

def test_a_saved_model_keeps_its_table(broken, tmp_path):
    "trust F1: saving writes the class into the config; what changes a number is still told apart"
    folder = broken("config.json", architectures=None, id2label={"0": "good"}, label2id={"good": 0})
    base = load_model(folder)
    def kind(model): return table_kind(model, "fp32", response_logprobs)
    before = kind(base)
    base.save_pretrained(tmp_path / "saved")
    assert kind(base) == before == kind(load_model(tmp_path / "saved")) == kind(load_model(load_world().base))
    base.config.rope_parameters["rope_theta"] = 500.
    assert kind(base)["config"] != before["config"]
    nested = AutoConfig.for_model("gemma3")
    nested.text_config.architectures, other = ["one"], copy.deepcopy(nested)
    other.text_config.architectures = ["another"]
    assert nested.to_dict() != other.to_dict() and logprobs._of_numbers(nested.to_dict()) == logprobs._of_numbers(other.to_dict())

def test_the_numbers_of_S_are_what_they_were():
    S = load_model(load_world().base, "cpu")
    assert weights_hash(S) == "deaa236d6026a690"

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


@pytest.mark.parametrize("there", [True, False])
def test_a_tiny_model_stays_on_the_cpu_beside_a_card(monkeypatch, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    def of_size(n):
        with torch.device("meta"): return torch.nn.Linear(n, 1, bias=False)
    assert best_device(load_model(load_world().base, "cpu")) == best_device(of_size(logprobs.SMALL - 1)) == "cpu"
    assert best_device(of_size(logprobs.SMALL)) == ("cuda" if there else "cpu")


def test_a_model_is_loaded_to_the_best_device_unless_one_is_named(monkeypatch):
    moved = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(LlamaForCausalLM, "to", lambda model, device: moved.append(device) or model)
    load_model(load_world().base)
    monkeypatch.setattr(logprobs, "SMALL", 1)        # now the tiny world is a large one
    for device in (None, "cpu"): load_model(load_world().base, device)
    assert moved == ["cpu", "cuda", "cpu"]


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
    (tmp_path / ".logprobs-00001.parquet.tmp").write_bytes(b"PAR1 half")
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
    (tmp_path / "file").write_text("")
    for name in ("nowhere", "file"):
        with pytest.raises(ValueError, match="no table"): read_table(tmp_path / name)
    score_pairs(model, make_pairs(3), tmp_path)
    (tmp_path / "logprobs-00000.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="logprobs-00000.parquet: cannot be read"): read_table(tmp_path)


def test_a_bit_that_flipped_in_a_table_is_noticed(tmp_path):
    rows = pd.DataFrame(dict(chosen=[-1., -2.], rejected=[-4., -1.]), index=["a", "b"], dtype="float32")
    logprobs._write_piece(tmp_path, rows)
    piece = tmp_path / "logprobs-00000.parquet"
    assert logprobs._read_pieces(tmp_path).equals(rows)
    flipped = bytearray(piece.read_bytes())
    flipped[flipped.index(np.float32(-4.).tobytes()) + 2] ^= 1     # where the piece keeps its -4
    piece.write_bytes(flipped)
    assert pd.read_parquet(piece)["rejected"].tolist() == [-4.03125, -1.]     # without the checksum nothing is said
    with pytest.raises(ValueError, match="logprobs-00000.parquet: cannot be read .*delete this file and run again"): logprobs._read_pieces(tmp_path)


def test_half_precision_is_not_called_fp32():
    model, pairs = make().bfloat16(), make_pairs(3)
    with pytest.raises(ValueError, match=r"fp32, but the model has weights in torch.bfloat16 .* call model.float\(\)"): score_pairs(model, pairs)
    assert score_pairs(model, pairs, precision="bf16").kind["precision"] == "bf16"
    assert score_pairs(model.float(), pairs).kind["precision"] == "fp32"


def test_a_copy_that_something_else_made_is_no_reason_to_stop(model, asked, tmp_path):
    score_pairs(model, make_pairs(5), tmp_path); asked.clear()
    for name in ("logprobs-00000 (1).parquet", "logprobs-copy.parquet"): shutil.copy(tmp_path / "logprobs-00000.parquet", tmp_path / name)
    table = score_pairs(model, make_pairs(5) + make_pairs(3, seed=1), tmp_path)
    assert sum(asked) == 3 and len(table.rows) == len(read_table(tmp_path).rows) == 8 and (tmp_path / "logprobs-00001.parquet").exists()


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


def test_a_full_disk_is_told_from_other_errors():
    "Python says it with a number, a library in Rust in its text."
    in_python = OSError(errno.ENOSPC, "No space left on device")
    in_rust = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    another = PermissionError(errno.EACCES, "Permission denied")
    assert [logprobs._why(e) for e in (in_python, in_rust, another)] == ["disk full?", "disk full?", "Permission denied"]


def test_write_json_leaves_no_temporary_file(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1}); write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 2} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def fill(folder, text):
    (folder / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"): (folder / name).write_text(text)

def read_all(folder): return sorted((p.name, p.read_text()) for p in folder.rglob("*") if p.is_file())

def test_a_kill_while_the_old_folder_goes(tmp_path, monkeypatch):
    "Whichever of the two is there, it is whole."
    path = tmp_path / "model"
    fill(path, "old")
    def killed(folder): next(p for p in folder.rglob("*") if p.is_file()).unlink(); raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        with replacing(path) as tmp: fill(tmp, "new")
    assert read_all(path) == [("a", "new"), ("b", "new")]
    with replacing(path) as tmp: fill(tmp, "newer")
    assert read_all(path) == [("a", "newer"), ("b", "newer")] and list(tmp_path.iterdir()) == [path]


def test_it_lies_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    "A power cut must not leave a name without contents."
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.fstat(file).st_ino))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("renamed"), replace(old, new)))
    write_json(tmp_path / "x.json", 1)
    assert done == [(tmp_path / "x.json").stat().st_ino, "renamed"]
    done.clear()
    with replacing(tmp_path / "model") as tmp: fill(tmp, "new")
    assert set(done[:-1]) == {(tmp_path / "model" / name).stat().st_ino for name in ("a", "inner/b")} and done[-1] == "renamed"


def test_a_name_that_ends_like_a_temporary_one(tmp_path):
    path = tmp_path / "notes.tmp"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"), replacing(path) as tmp: raise OSError(errno.ENOSPC, "")
    assert tmp != path and path.read_text() == "old"
    with replacing(tmp_path / "model.tmp") as tmp: fill(tmp, "new")
    assert read_all(tmp_path / "model.tmp") == [("a", "new"), ("b", "new")] and len(list(tmp_path.iterdir())) == 2


def test_a_log_goes_on_while_the_harness_is_silenced(capsys):
    lines = logprobs._Lines()
    with quiet(): lines.write("\r1 of 2 options, 00:07 left")
    assert capsys.readouterr().err == "1 of 2 options, 00:07 left\n"


def test_reading_a_folder_shows_no_bar():
    "Its bar is switched off while a folder is read, and on again for a download."
    code = ("from transformers.utils import logging as bars; bars.enable_progress_bar()\n"
            "from sdpo_nb.logprobs import load_model; from sdpo_nb.world import load_base, load_world; w = load_world()\n"
            "import sys; {0}; print('MARK', file=sys.stderr); assert bars.is_progress_bar_enabled()")
    env = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"} | dict(PYTHONPATH=str(Path(logprobs.__file__).parent.parent))
    def said(call): return subprocess.run([sys.executable, "-c", code.format(call)], env=env, capture_output=True, text=True, check=True).stderr
    assert "Loading weights" in said("load_base(w)")       # the test can see a bar
    assert "Loading weights" not in said("load_model(w.base)")
