"Packed rows give the numbers of the padded path, or the guard refuses."
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

import sdpo_nb.packing as packing
from sdpo_nb import logprobs, trainer
from sdpo_nb.logprobs import autocast, freeze_dropout, load_model, micro_batches, response_logprobs, table_kind
from sdpo_nb.packing import choose_logprobs, compile_layers, pack, packed_logprobs, packed_tokens, visible, why_not_packed
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.stepwise import StepwiseConfig, sdpo
from sdpo_nb.trainer import activation_checkpointing
from sdpo_nb.world import load_base, load_world
from tiny import SETTINGS, rows

USUAL = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=0)
WINDOW = dict(use_sliding_window=True, sliding_window=4, max_window_layers=0)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)


def model_of(kind, **kw):
    torch.manual_seed(0)
    eager = dict(attn_implementation="eager") if kind == "gemma2" else {} # some versions of transformers drop its soft-cap in the other
    model = freeze_dropout(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **USUAL | kw), **eager)).eval()
    for p in model.parameters():
        if p.ndim > 1: torch.nn.init.normal_(p, std=0.3)
    return model


def pair(*sizes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randint(2, 96, (n,), generator=g).tolist() for k, n in zip(("prompt_ids", "chosen_ids", "rejected_ids"), sizes)}


PAIRS = [pair(*s, seed=i) for i, s in enumerate([(9, 7, 12), (3, 15, 2), (1, 1, 6), (12, 5, 5), (300, 40, 9)])]


def both(model, pairs, logprobs):
    model.zero_grad()
    c, r = logprobs(model, pairs)
    (c.sum() - 2 * r.sum()).backward()
    return torch.cat([c, r]).detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, pairs=PAIRS, logprobs=packed_logprobs):
    (a, g), (b, h) = both(model, pairs, response_logprobs), both(model, pairs, logprobs)
    assert_close(b, a, atol=2e-4, rtol=1e-5)
    top = max(x.norm() for x in g.values())
    for n in g: assert (g[n] - h[n]).norm() <= 1e-4 * top, n


@pytest.mark.parametrize("kind, bites, without", [
    ("mistral", dict(sliding_window=4), dict(sliding_window=None)),
    ("mixtral", EXPERTS | dict(sliding_window=4), EXPERTS | dict(sliding_window=None)),
    ("qwen2", WINDOW, dict(use_sliding_window=False)),
    ("qwen3", WINDOW | dict(head_dim=8), dict(use_sliding_window=False, head_dim=8)),
    ("phi3", dict(sliding_window=4), dict(sliding_window=None)),
    ("gemma2", dict(head_dim=8, sliding_window=4, attn_logit_softcapping=0.05, final_logit_softcapping=0.05), dict(head_dim=8, sliding_window=4, attn_logit_softcapping=None, final_logit_softcapping=0.05)),
    ("granite", dict(logits_scaling=8.0), dict(logits_scaling=1.0)),
    ("cohere", dict(logit_scale=8.0), dict(logit_scale=1.0))])
def test_settings_that_bite(kind, bites, without):
    model, plain = model_of(kind, **bites), model_of(kind, **without)
    assert_close(sum(p.sum() for p in model.parameters()), sum(p.sum() for p in plain.parameters())) # the same weights
    with torch.no_grad(): assert (response_logprobs(model, PAIRS)[0] - response_logprobs(plain, PAIRS)[0]).abs().max() > 1e-3, "the setting does not bite"
    assert_same(model)
    assert why_not_packed(model, PAIRS) is None


def test_a_window_that_does_not_reach_the_attention_is_refused(monkeypatch):
    "Also where the rows are too short to show it."
    model, real = model_of("mistral", sliding_window=64), packing.packed_attention
    monkeypatch.setitem(packing.AttentionInterface._global_mapping, "sdpo_packed", lambda *a, sliding_window=None, **kw: real(*a, **kw))
    assert "window of 64 does not reach" in why_not_packed(model, PAIRS[:4])


@pytest.mark.parametrize("kind, kw", [("bloom", dict(n_layer=2, n_head=4)), ("falcon", {}), ("gpt_neo", dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]))])
def test_models_without_the_interface_are_caught(kind, kw, capsys):
    model = model_of(kind, **kw)
    before = model.config._attn_implementation
    assert choose_logprobs(model, PAIRS[:4]) is response_logprobs
    said = capsys.readouterr().out
    assert said.startswith("packing is off: ") and said.count("\n") == 1
    assert model.config._attn_implementation == before and "forward" not in vars(model.get_decoder())


def test_the_output_layer_is_looked_at():
    model = model_of("llama")
    class Adapted(torch.nn.Linear): pass
    head = Adapted(32, 96, bias=False); head.weight = model.lm_head.weight
    model.lm_head = head
    assert "output layer" in why_not_packed(model, PAIRS)


def test_layers_that_are_no_attention():
    model = model_of("llama"); model.config.layer_types = ["full_attention", "linear_attention"]
    assert "linear_attention" in why_not_packed(model, PAIRS)


def test_wrong_numbers_are_caught(monkeypatch):
    "Each half of the comparison by numbers, with an error put in."
    model = model_of("llama")
    monkeypatch.setattr(packing, "of_row", lambda m, row, f=packing.of_row: tuple(x + 0.01 for x in f(m, row)))
    assert "log-probabilities differ" in why_not_packed(model, PAIRS)
    monkeypatch.undo()
    monkeypatch.setattr(packing, "packed_logprobs", lambda m, pairs, f=packed_logprobs: tuple(x * 1.01 for x in f(m, pairs)))
    assert "gradient differs" in why_not_packed(model, PAIRS)
    monkeypatch.undo()
    for side in (0, 1): # one response gives no gradient, or a wrong one
        for share in (0, 1.01):
            def wrong(m, pairs, f=packed_logprobs): return tuple(x.detach() * (1 - share) + share * x if i == side else x for i, x in enumerate(f(m, pairs)))
            monkeypatch.setattr(packing, "packed_logprobs", wrong)
            assert "gradient differs" in why_not_packed(model, PAIRS), (side, share)
            monkeypatch.undo()


def test_gradients_that_cancel_are_not_taken_for_wrong_ones():
    "All tokens alike: the gradient of two of them is twice that of one."
    model, alike = model_of("llama"), dict(prompt_ids=[5, 5], chosen_ids=[5, 5], rejected_ids=[5])
    gradient = packing._gradient(model, response_logprobs, alike)
    assert (gradient[0] - 2 * gradient[1]).norm() < 1e-4 * gradient.norm()
    assert why_not_packed(model, [alike]) is None


def test_experts_that_are_balanced_in_training():
    "Neither path computes the loss that balances them, which is not asked for."
    model = model_of("mixtral", output_router_logits=True, router_aux_loss_coef=100.0, **EXPERTS).train()
    assert why_not_packed(model, PAIRS) is None
    assert_same(model)
    alone = model_of("mixtral", **EXPERTS)
    for f in (response_logprobs, packed_logprobs):
        for a, b in zip(both(alone, PAIRS, f)[1].values(), both(model, PAIRS, f)[1].values()): assert torch.equal(a, b)


def test_a_model_that_begins_with_a_tower_for_images():
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    text = USUAL | dict(vocab_size=99, head_dim=8, sliding_window=4)
    model = model_of("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=96, boi_token_index=97, eoi_token_index=98)
    assert "vision" in next(iter(dict(model.named_parameters())))
    assert why_not_packed(model, PAIRS) is None
    assert_same(model)


def test_half_weights_and_no_pairs_are_told_in_words():
    for dtype in ("bfloat16", "float16"): assert why_not_packed(model_of("llama").to(getattr(torch, dtype)), PAIRS) == f"its weights are {dtype}, and the check needs fp32"
    with pytest.raises(ValueError, match="pairs: none"): choose_logprobs(model_of("llama"), [])


def too_much(*args): torch.empty(2**60)
def card_is_full(*args): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.")

@pytest.mark.parametrize("ends", [too_much, card_is_full])
def test_memory_that_ends_is_no_reason_not_to_pack(monkeypatch, ends):
    "The way out would need more of it."
    model = model_of("llama")
    with pytest.raises(RuntimeError, match="allocate"): compile_layers(model, ends)
    assert all(m._compiled_call_impl is None for m in model.modules())
    monkeypatch.setattr(packing, "_gradient", ends)
    with pytest.raises(RuntimeError, match="allocate"): packing._flash_numbers_refuse(model, PAIRS[:2], "bf16")
    with pytest.raises(RuntimeError, match="allocate"): choose_logprobs(model, PAIRS)


def test_the_guard_makes_no_logits_for_prompts():
    model, sizes = model_of("llama"), []
    model.lm_head.register_forward_hook(lambda module, given, logits: sizes.append(logits.numel() // 96))
    plain = packing._plain_pairs(model, PAIRS)
    assert max(sizes) == 40 + 1                  # of the longest response, and one that is not read
    assert_close(plain, response_logprobs(model, PAIRS))


def test_the_guard_sees_the_windows_of_compiled_layers():
    model = model_of("mistral", sliding_window=4)
    for layer in packing._layers(model): layer.compile(backend="eager", dynamic=True)
    packed_logprobs(model, PAIRS[:4])
    assert why_not_packed(model, PAIRS[:4]) is None
    assert all(layer._compiled_call_impl for layer in packing._layers(model))


def test_a_forward_of_its_own_is_given_back():
    "As hooks set it, on the decoder and on the output layer."
    model, calls = model_of("llama"), []
    for module in (model.get_decoder(), model.lm_head):
        def hooked(*args, usual=module.forward, **kw): calls.append(usual); return usual(*args, **kw)
        module.forward = hooked
    with autocast("cpu", "bf16"): packed_logprobs(model, PAIRS[:2])
    for module in (model.get_decoder(), model.lm_head): assert vars(module)["forward"].__name__ == "hooked"
    assert calls


@pytest.mark.parametrize("piece", [4 * 96 * 4, 2**26])
def test_an_empty_response_says_nothing(monkeypatch, piece):
    monkeypatch.setattr(packing, "PIECE", piece)
    for module in (packing, logprobs): monkeypatch.setattr(module, "check_prompts", lambda pairs: None)
    pairs = [dict(pair(5, 3, 4), rejected_ids=[]), pair(6, 4, 5, seed=1), dict(pair(5, 3, 4), chosen_ids=[])]
    for f in (packed_logprobs, by_plan(packing.padded_plan)): assert_same(model_of("llama"), pairs, f)


def test_places_and_tokens_of_unequal_number():
    "In pieces, too, a place more than there are tokens is an error."
    model, size = model_of("llama"), packing.PIECE
    for packing.PIECE in (4 * 96 * 4, size):
        with pytest.raises(ValueError): packing.head_logprobs(model, torch.zeros(13, 32), torch.zeros(12, dtype=torch.long))


def test_a_card_without_flash_counts_the_cells_that_attention_pads(monkeypatch):
    monkeypatch.setattr(packing, "why_not_packed", lambda *args: None)
    on_card = choose_logprobs(SimpleNamespace(device=torch.device("cuda")), PAIRS)
    skewed = [pair(600, 300, 300)] + [pair(14, 7, 7, seed=i) for i in range(101)]
    def cells(f): return max(packing.padded_plan(pack(part)).chosen.queries.take.numel() for part in micro_batches(skewed, 4096, f))
    assert cells(packed_logprobs) > 20 * 4096 > 20 * cells(on_card)
    assert len(micro_batches([pair(64, 32, 32)] * 32, 4096, on_card)) == 1     # alike pairs share a row, as before
    model = model_of("llama")
    assert table_kind(model, "fp32", on_card) == table_kind(model, "fp32", packed_logprobs)
    assert packing.flash_logprobs.exact is on_card


def test_no_weight_that_trains_and_no_state_left():
    model = model_of("llama").requires_grad_(False)
    assert why_not_packed(model, PAIRS) is None
    model.requires_grad_(True)
    assert why_not_packed(model, PAIRS) is None and all(p.grad is None for p in model.parameters())


def test_off_and_kind():
    model = model_of("llama")
    assert choose_logprobs(model, PAIRS, "off") is response_logprobs and choose_logprobs(model, PAIRS) is packed_logprobs
    assert table_kind(model, "fp32", packed_logprobs) != table_kind(model, "fp32", response_logprobs)


@pytest.mark.parametrize("piece", [1, 4 * 96 * 7, 2**26])
def test_pieces_of_the_output_layer(monkeypatch, piece):
    monkeypatch.setattr(packing, "PIECE", piece)
    assert_same(model_of("gemma2", head_dim=8, final_logit_softcapping=5.0))


def test_no_more_logits_than_a_piece_are_kept_for_the_backward_pass(monkeypatch):
    "What autograd keeps does not grow with the vocabulary, beyond one hidden state a token."
    def kept(vocab):
        monkeypatch.setattr(packing, "PIECE", 4 * vocab * 20)
        model, sizes = model_of("llama", vocab_size=vocab), []
        def note(x): sizes.append(x.numel()); return x
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x): packed_logprobs(model, PAIRS)
        return max(s for s in sizes if s != vocab * 32)    # the weight itself is no copy
    assert kept(20_000) == kept(500)


def test_gradient_checkpointing():
    model = model_of("mistral", sliding_window=4).train()
    activation_checkpointing(model, True)
    assert_same(model)


def by_plan(make): # what a graphics card does, anywhere
    def logprobs(model, pairs):
        row = pack(pairs)
        row.plan = make(row)
        return packing.of_row(model, row)
    return logprobs


@pytest.fixture(scope="module")
def in_fp32():
    "S, 64 pairs of two sources each, in batches, and what S says about them."
    S, tok = load_base(load_world())
    pairs = [p for name in ("primer", "digest") for p in list(tokenize_pairs(load_pairs(load_world().sources[name]), tok, name).pairs)[:64]]
    return S, pairs, numbers(S, pairs, response_logprobs)


def numbers(model, pairs, logprobs):
    with torch.no_grad(): return torch.cat([torch.cat(logprobs(model, pairs[i:i+32])) for i in range(0, len(pairs), 32)])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("way", [packed_logprobs, by_plan(packing.padded_plan)], ids=["blocks", "padded inside attention"])
def test_half_precision_is_as_near_to_fp32_as_padding_is(in_fp32, precision, way):
    "Blocks are what a CPU attends in; the other way is that of a card without a flash kernel, such as a T4. Measured on 64 to 256 pairs of each source: 0.98 to 1.03 times the error of padding; logits rounded to half precision make it 1.12."
    model, pairs, exact = in_fp32
    with autocast("cpu", precision): padded, packed = (numbers(model, pairs, f) for f in (response_logprobs, way))
    error, allowed = ((x - exact).square().mean().sqrt().item() for x in (packed, padded))
    assert packed.dtype == torch.float32 and 0 < error <= 1.1 * allowed, (error, allowed)


@pytest.mark.parametrize("kind, more", [("llama", {}), ("mistral", dict(sliding_window=4)), ("gemma2", dict(head_dim=8, sliding_window=4, attn_logit_softcapping=0.05)), ("gpt2", {})])
def test_padded_inside_attention(kind, more):
    usual = dict(n_embd=32, n_layer=2, n_head=4) if kind == "gpt2" else {}
    assert_same(model_of(kind, **usual, **more), PAIRS[:4] if kind == "gpt2" else PAIRS, by_plan(packing.padded_plan))


def by_hand(q, k, v, plan, scaling, window=None):
    "What the flash kernel promises: each sequence causal, aligned at the end."
    out = []
    for a, b, c, d in zip(plan.query_starts, plan.query_starts[1:], plan.key_starts, plan.key_starts[1:]):
        assert b - a <= plan.most_queries and d - c <= plan.most_keys
        ahead = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        hidden = (ahead < 0) | (ahead >= window if window else False)
        scores = torch.einsum("qhd,khd->hqk", q[a:b].float(), k[c:d].float().repeat_interleave(q.shape[1] // k.shape[1], 1)) * scaling
        weights = scores.masked_fill(hidden, -1e30).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v[c:d].float().repeat_interleave(q.shape[1] // v.shape[1], 1)))
    return torch.cat(out)


@pytest.mark.parametrize("kind, more", [("llama", {}), ("mistral", dict(sliding_window=4)), ("granite", dict(attention_multiplier=0.3))])
def test_the_plan_of_the_flash_kernel(monkeypatch, kind, more):
    monkeypatch.setattr(packing, "flash", by_hand)
    def fp32(model, pairs):
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            torch.set_autocast_dtype("cpu", torch.float32)
            return packing.flash_logprobs(model, pairs)
    assert_same(model_of(kind, **more), PAIRS, fp32)
    assert type(packing.flash_plan(pack(PAIRS)).most_queries) is int, "a compiled layer takes numpy's numbers for tensors"


def test_a_soft_cap_is_refused_by_the_flash_kernel():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(NotImplementedError, match="soft-cap"): packing.flash_logprobs(model_of("gemma2", head_dim=8, attn_logit_softcapping=5.0), PAIRS)


def test_rows_made_beforehand():
    model = model_of("llama")
    assert_close(packed_logprobs(model, packed_logprobs.prepare(model, PAIRS)), packed_logprobs(model, PAIRS))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no compiler")
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers(recompute):
    model = model_of("llama").train()
    activation_checkpointing(model, recompute)
    assert compile_layers(model, packed_logprobs, recompute=recompute) is None and model.training
    assert_same(model, PAIRS)
    packing.uncompile(model)
    assert_same(model, PAIRS)


def test_what_cannot_be_compiled_falls_back_and_says_why(monkeypatch):
    model = model_of("llama")
    def broken(model, pairs, *rest): raise RuntimeError("no kernel\nand more")
    assert compile_layers(model, broken) == "no kernel" and all(m._compiled_call_impl is None for m in model.modules())


def test_a_row_of_one_pair_equals_the_row_of_many():
    model = model_of("llama")
    together = torch.stack(packed_logprobs(model, PAIRS), 1)
    for p, want in zip(PAIRS, together): assert_close(torch.cat(packed_logprobs(model, [p])), want, atol=2e-4, rtol=1e-5)


def test_visible_and_blocks():
    row = pack(PAIRS)
    assert sum(row.blocks) == packed_tokens(PAIRS) == len(row.ids) and row.blocks[-1] == 349 and len(row.blocks) == 2
    sees = visible(row, slice(0, sum(row.blocks[:-1])))
    assert sees.diag().all() and not sees.triu(1).any()
    for i, j in [(20, 12), (30, 5)]: assert not sees[i, j]     # rejected sees chosen; another pair
    assert visible(row, slice(0, 28), 3).sum(1).max() == 3


def test_a_pair_without_a_prompt():
    for f in (packed_logprobs, response_logprobs):
        with pytest.raises(ValueError, match="without a prompt token"): f(model_of("llama"), [pair(0, 3, 4)])


def test_budget():
    parts = micro_batches(PAIRS, 60, packed_logprobs)
    assert [packed_tokens(p) for p in parts if len(p) > 1] and all(packed_tokens(p) <= 60 or len(p) == 1 for p in parts)
    assert sum(map(len, parts)) == len(PAIRS)


def test_a_run_packed_and_padded(tmp_path):
    "Two stages on the tiny world: the same losses step by step, and another folder for another way."
    a, b = (sdpo(load_world().base, {n: rows(n, 24) for n in ("primer", "digest")}, StepwiseConfig(**SETTINGS, packing=p), tmp_path / p) for p in ("auto", "off"))
    assert [s["reference_kind"]["logprobs"] for s in a.stages + b.stages] == ["packed_logprobs"] * 2 + ["response_logprobs"] * 2
    assert a.metrics["loss"].nunique() > 4 and abs(a.metrics["loss"] - b.metrics["loss"]).max() < 1e-3


def test_real_pairs_of_the_world_agree_with_their_tokenizer():
    S, tok = load_base(load_world())
    pairs = list(tokenize_pairs(load_pairs(load_world().sources["primer"]), tok, "primer").pairs)[:40]
    assert_same(S, pairs)


def test_layers_are_compiled_under_the_switches_that_they_will_meet(monkeypatch):
    "Another switch for deterministic kernels has PyTorch compile again, in the first step."
    said, model = [], load_model(load_world().base, "cpu")
    def noted(device, *switch):
        said.append(switch)
        return nullcontext()
    monkeypatch.setattr(packing, "same_bits", noted)
    monkeypatch.setattr(packing, "try_out", lambda model, *_: said.append(model.training))
    assert compile_layers(model, packed_logprobs, "fp32", False, True, True) is None
    assert said == [(), False, (True, True), True]       # as `score_pairs` reads, as a stage trains
    compile_layers(model, packed_logprobs, "fp32", False, True, True)
    assert len(said) == 4
    compile_layers(model, packed_logprobs, "fp32", False, False, False)
    assert said[4:] == [(), False, (False, False), True]
    packing.uncompile(model)


@pytest.mark.parametrize("deterministic,why,switches", [(True, None, (True, True)), (True, "an operation", (True, False)), (False, None, (False, False))])
def test_a_stage_compiles_with_its_own_switches(monkeypatch, deterministic, why, switches):
    model, seen = load_model(load_world().base, "cpu").eval(), []
    monkeypatch.setattr(trainer, "why_not_same_bits", lambda model, *_: why if model.training else pytest.fail("asked in eval mode"))
    monkeypatch.setattr(trainer, "compile_layers", lambda *how: seen.append(how[3:]))
    trainer.compile_for(model, packed_logprobs, "bf16", trainer.TrainConfig(deterministic=deterministic))
    assert seen == [(False, *switches)] and not model.training
