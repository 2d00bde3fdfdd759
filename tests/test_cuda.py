"On a graphics card: the numbers of chapter 02, the same bits after a kill, every precision. Skipped where there is none; tests/test_devices.py walks the same functions on tensors that pretend."
import pytest
import torch

from sdpo_nb.logprobs import autocast, load_model, response_logprobs, weights_hash
from sdpo_nb.packing import _packed_on_card, choose_logprobs, compile_layers, flash_logprobs, packed_logprobs, uncompile, why_not_flash
from sdpo_nb.stepwise import StepwiseConfig, sdpo
from sdpo_nb.trainer import activation_checkpointing, why_not_same_bits
from sdpo_nb.world import load_world
from test_packing import PAIRS, assert_same, model_of
from tiny import SETTINGS, rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no graphics card")
SOURCES = {n: rows(n, 48) for n in ("primer", "digest")}
WIDE = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2)
HALF = ["fp16"] + ["bf16"] * (torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False))


@pytest.mark.parametrize("kind, more", [("llama", {}), ("mistral", dict(sliding_window=4)), ("gemma2", dict(head_dim=8, sliding_window=4, attn_logit_softcapping=0.05))])
def test_packed_equals_padded_in_fp32(kind, more):
    model = model_of(kind, **more).cuda()
    assert choose_logprobs(model, PAIRS) is _packed_on_card     # the same numbers; it counts cells that attention pads
    assert_same(model, PAIRS)


@pytest.mark.parametrize("precision", HALF)
def test_half_precision_is_as_near_to_fp32_as_padding_is(precision):
    model = model_of("llama", **WIDE).cuda()
    with torch.no_grad(): exact = torch.cat(response_logprobs(model, PAIRS))
    ways = [response_logprobs, choose_logprobs(model, PAIRS, "auto", precision)]
    with torch.no_grad(), autocast("cuda", precision): off = [(torch.cat(f(model, PAIRS)) - exact).square().mean().sqrt().item() for f in ways]
    assert ways[1] in (_packed_on_card, flash_logprobs) and off[1] < 1.2 * off[0] + 0.02


@pytest.mark.parametrize("precision", HALF)
def test_flash_where_the_card_has_it(precision):
    model, why = model_of("llama", **WIDE).cuda(), None
    if torch.cuda.get_device_capability() < (8, 0): why = "this graphics card does not have it"
    assert why_not_flash(model, PAIRS, precision) == why
    assert why_not_flash(model, PAIRS, "fp32") == "it does not know fp32"


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers(recompute):
    precision = HALF[-1]
    model = model_of("llama", **WIDE).cuda().train()
    logprobs = choose_logprobs(model, PAIRS, "auto", precision)
    activation_checkpointing(model, recompute)
    def ask(f, precision):
        with autocast("cuda", precision): c, r = f(model, PAIRS)
        model.zero_grad(); (c.sum() - 2 * r.sum()).backward()
        return torch.cat([c, r]).detach(), torch.cat([p.grad.flatten() for p in model.parameters()])
    exact, true_slope = ask(packed_logprobs, "fp32")
    plain, slope = ask(logprobs, precision)
    assert compile_layers(model, logprobs, precision, recompute) is None
    compiled, other = ask(logprobs, precision)
    uncompile(model)
    assert (compiled - exact).square().mean() < 1.5 * (plain - exact).square().mean() + 0.01
    assert (other - true_slope).norm() < 1.2 * (slope - true_slope).norm() + 0.01 * true_slope.norm() # compiled layers round elsewhere, and no more


@pytest.mark.parametrize("precision", ["fp32"] + HALF)
@pytest.mark.parametrize("compile", ["off", "on"])
def test_killed_and_resumed_ends_in_the_same_bits(tmp_path, precision, compile):
    config = StepwiseConfig(**SETTINGS | dict(precision=precision, device="cuda", compile=compile, save_every=2))
    whole = sdpo(load_world().base, SOURCES, config, tmp_path / "whole")
    assert whole.config["device"] == "cuda" and whole.config["not_deterministic"] is None
    def stops(row):
        if (row["stage"], row["step"]) == (2, 3): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): sdpo(load_world().base, SOURCES, config, tmp_path / "killed", on_step=stops)
    assert (tmp_path / "killed" / "stage-2" / "checkpoint" / "state.pt").exists()
    again = sdpo(load_world().base, SOURCES, config, tmp_path / "killed")
    assert [s["end"] for s in again.stages] == [s["end"] for s in whole.stages]


@pytest.mark.parametrize("precision", ["fp32"] + HALF)
def test_every_operation_has_a_deterministic_form(precision):
    model = model_of("llama", **WIDE).cuda().train()
    assert why_not_same_bits(model, choose_logprobs(model, PAIRS, "auto", precision), precision) is None


def test_the_tiny_world_stays_on_the_cpu(tmp_path):
    assert load_model(load_world().base).device.type == "cpu"
    run = sdpo(load_world().base, SOURCES, StepwiseConfig(**SETTINGS), tmp_path / "run")
    assert run.config["device"] == "cpu" and weights_hash(run.model) == run.stages[-1]["end"]
