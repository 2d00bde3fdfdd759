"Adapters: numbers, packing, what lies on disk, runs that are killed, what is refused."
import json, math, os, shutil, signal, subprocess, sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sdpo_nb.folder import load_any, load_exactly, load_stage
from sdpo_nb.logprobs import load_model, load_tokenizer, response_logprobs, score_pairs, weights_hash
from sdpo_nb.lora import (Adapter, adapter_of, adapter_size, add_adapter, join_adapters, merge_adapter, read_adapter, target_layers, unwrapped, write_adapter)
from sdpo_nb.packing import choose_logprobs, packed_logprobs, why_not_packed
from sdpo_nb.plan import StepwiseConfig, changed, make_config
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.report import Run
from sdpo_nb.stepwise import sdpo
from sdpo_nb.trainer import TrainConfig, load_checkpoint, make_accelerator, make_optimizer, memory_plan, read_checkpoint, trained_numbers, trained_weights, train_stage
from sdpo_nb.verify import pack_run, verify
from sdpo_nb.world import load_world
from tiny import rows, write_jsonl

peft = pytest.importorskip("peft")
BASE = load_world().base
SETTINGS = dict(beta=0.3, lr=5e-3, batch_size=8, precision="fp32", max_length=64, eval_share=0.2, save_every=1)
NEAR = dict(rtol=1e-5, atol=2e-4)


def asked(**changes): return SimpleNamespace(**dict(lora_r=4, lora_alpha=0, lora_targets="all-linear", seed=0) | changes)
def S(): return load_model(BASE, "cpu")
def says(model, pairs, f=response_logprobs): return torch.stack(f(model, pairs)).detach()
def config(**changes): return StepwiseConfig(**SETTINGS | dict(lora_r=4) | changes)

def moved(model, size=0.05):
    "Adapters as after some training."
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trained_weights(model): p += size * torch.randn(p.shape, generator=g)
    return model

@pytest.fixture(scope="module")
def pairs():
    found = tokenize_pairs(load_pairs(rows("digest", 24)), load_tokenizer(BASE), "digest").pairs
    return [found[i] for i in range(len(found))]

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "Two sources, as files."
    folder = tmp_path_factory.mktemp("data")
    return {name: str(write_jsonl(folder / f"{name}.jsonl", rows(name, 40))) for name in ("primer", "riddle")}

@pytest.fixture(scope="module")
def runs(two, tmp_path_factory):
    "A run of each kind, made when first asked for."
    folder, made = tmp_path_factory.mktemp("runs"), {}
    def get(stages="merge"):
        if stages not in made: made[stages] = sdpo(BASE, two, config(lora_stages=stages), folder / stages)
        return made[stages]
    return get


# put on

def test_drawn_by_seed_and_stage_alone():
    before = torch.get_rng_state()
    torch.manual_seed(5); a = weights_hash(add_adapter(S(), asked()))
    torch.manual_seed(6); torch.rand(3); state = torch.get_rng_state()
    b = weights_hash(add_adapter(S(), asked()))
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)
    others = [weights_hash(add_adapter(S(), asked(seed=1))), weights_hash(add_adapter(S(), asked(), 2))]
    assert a == b and len({a, *others}) == 3

def test_a_is_drawn_as_peft_draws_it():
    "Of the same law: uniform, up to the root of 1 / inputs."
    theirs = peft.get_peft_model(S(), peft.LoraConfig(r=64, target_modules="all-linear")).base_model.model
    ours = add_adapter(S(), asked(lora_r=64))
    for name, w in ours.named_parameters():
        if "lora_A" not in name: continue
        other = theirs.get_parameter(name)
        assert abs(w.std() / other.std() - 1) < 0.05 and w.abs().max() <= 1 / math.sqrt(w.shape[1]) and w.abs().max() > 0.95 / math.sqrt(w.shape[1])

@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj", "self_attn.o_proj", "model.layers.1.mlp.up_proj"])
def test_size_is_what_peft_makes(targets):
    settings = asked(lora_targets=targets)
    model = add_adapter(S(), settings)
    assert adapter_size(S(), settings) == sum(p.numel() for p in trained_weights(model))
    assert all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert len(target_layers(S(), targets)) == len(adapter_of(model).layers())

@pytest.mark.parametrize("targets, why", [("q_proj,nope", "no linear layer is called 'nope'; this model has down_proj"), ("embed_tokens", "no linear layer is called 'embed_tokens'"),
                                          ("q_proj,", "no linear layer is called ''"), ("self_attn", "called 'self_attn'"), ("lm_head", "also its embedding")])
def test_targets_that_cannot_be(targets, why):
    with pytest.raises(ValueError, match=why): add_adapter(S(), asked(lora_targets=targets))

def test_peft_missing(monkeypatch, two, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"adapters need the library PEFT; pip install 'sdpo_nb\[peft\]'"): sdpo(BASE, two, config(), tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()

def test_no_peft_is_needed_without_adapters_or_to_read_a_run(runs):
    where = str(runs().folder)
    code = "import sys; sys.modules['peft'] = None\nfrom sdpo_nb.report import Run\nrun = Run(sys.argv[1]); run.model, run.tokenizer"
    subprocess.run([sys.executable, "-c", code, where], check=True)


# numbers

KINDS = dict(llama={}, qwen2={}, gpt2=dict(n_embd=32, n_layer=2, n_head=4, n_inner=64), gemma2=dict(head_dim=8, sliding_window=4096), gpt_neox={}, opt=dict(ffn_dim=64, word_embed_proj_dim=32))

def small(kind, **changes):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | KINDS[kind] | changes), dtype=torch.float32)
    from sdpo_nb.logprobs import freeze_dropout
    return freeze_dropout(made).eval()

@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_padded(kind, pairs):
    "Values, and the gradient of every trained weight."
    small_ids = [{k: [3 + i % 60 for i in v] if k.endswith("_ids") else v for k, v in p.items()} for p in pairs[:6]]
    model = moved(add_adapter(small(kind), asked()))
    assert why_not_packed(model, small_ids) is None
    found = []
    for f in (response_logprobs, packed_logprobs):
        chosen, rejected = f(model, small_ids)
        found.append((torch.cat([chosen, rejected]).detach(), torch.cat([g.flatten() for g in torch.autograd.grad((chosen - rejected).sum(), trained_weights(model))])))
    (a, slope), (b, packed_slope) = found
    assert_close(a, b, **NEAR)
    assert (slope - packed_slope).norm() < 1e-4 * slope.norm() and slope.norm() > 0

@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_beside_and_equals_peft(kind, pairs, tmp_path):
    "GPT-2 keeps its matrices the other way round."
    ids = torch.arange(3, 40)[None]
    model = moved(add_adapter(small(kind), asked()))
    adapter = adapter_of(model)
    write_adapter(adapter, tmp_path)
    back = read_adapter(tmp_path)
    assert (back.r, back.alpha, back.targets) == (4, 8, adapter.targets) and back.scale == 2
    assert all(torch.equal(back.state[k], v) for k, v in adapter.state.items()) and set(back.state) == set(adapter.state)
    merged = merge_adapter(small(kind), back)
    theirs = peft.PeftModel.from_pretrained(small(kind), tmp_path)
    with torch.no_grad():
        want = model(ids).logits
        assert (want - small(kind)(ids).logits).abs().max() > 1e-2
        assert_close(merged(ids).logits, want, rtol=1e-4, atol=1e-5)
        assert_close(theirs.eval()(ids).logits, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(merged.parameters(), theirs.merge_and_unload().parameters()): assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not hasattr(merged, "peft_config") and all(p.requires_grad for p in merged.parameters())

def test_merged_in_double_precision():
    "The product does not depend on the order in which it is added up: the same bits with its terms turned round."
    adapter = adapter_of(moved(add_adapter(S(), asked(lora_r=16))))
    turned = Adapter(adapter.r, adapter.alpha, adapter.targets, {k: v.flip(0 if "lora_A" in k else 1) for k, v in adapter.state.items()})
    assert weights_hash(merge_adapter(S(), adapter)) == weights_hash(merge_adapter(S(), turned))

def test_joined(pairs):
    first = adapter_of(moved(add_adapter(S(), asked())))
    policy = moved(add_adapter(merge_adapter(S(), first), asked(), 2), 0.03)
    both = join_adapters(first, adapter_of(policy))
    assert (both.r, both.alpha, both.scale) == (8, 16, first.scale)
    assert_close(says(merge_adapter(S(), both), pairs), says(policy, pairs), **NEAR)
    with pytest.raises(ValueError, match="other scales"): join_adapters(first, Adapter(4, 9, first.targets, first.state))
    with pytest.raises(ValueError, match="other layers"): join_adapters(first, Adapter(4, 8, ["q_proj"], first.state))

def test_an_adapter_of_another_model():
    adapter = adapter_of(add_adapter(S(), asked()))
    with pytest.raises(ValueError, match="is .* in this model, and .* in the adapter"): merge_adapter(small("llama"), adapter)
    with pytest.raises(ValueError, match="no layer model.layers.0.self_attn"): merge_adapter(small("gpt2"), adapter)

@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_head_is_not_packed(pairs, precision):
    small_ids = [{k: [3 + i % 60 for i in v] if k.endswith("_ids") else v for k, v in p.items()} for p in pairs[:6]]
    model = moved(add_adapter(small("llama", tie_word_embeddings=False), asked(lora_targets="q_proj,lm_head")))
    assert why_not_packed(model, small_ids) == "its output layer is adapted, quantised or sharded"
    assert choose_logprobs(model, small_ids, precision=precision) is response_logprobs

def test_the_guard_looks_at_an_adapter_that_has_a_gradient(pairs, monkeypatch):
    "A's gradient is zero at first; a guard that looked there would let anything pass."
    import sdpo_nb.packing as packing
    model = add_adapter(S(), asked())
    assert packing._gradient(model, response_logprobs, pairs[0]).any()
    wrong = lambda model, x: tuple(2 * v - v.detach() for v in packed_logprobs(model, x))        # the values, with twice the gradient
    monkeypatch.setattr(packing, "packed_logprobs", wrong)
    assert "gradient differs" in packing.why_not_packed(model, pairs[:4])


# a stage

def test_only_adapters_are_trained_and_kept(pairs, tmp_path):
    table = score_pairs(S(), pairs)
    settings = TrainConfig(lr=5e-3, beta=0.3, batch_size=8, precision="fp32")
    policy = add_adapter(S(), asked())
    before = {n: p.clone() for n, p in policy.named_parameters()}
    out = train_stage(policy, pairs, table, settings, tmp_path, start=table)
    assert abs(out["first_loss"] - math.log(2)) < 1e-6
    for name, p in policy.named_parameters(): assert torch.equal(p, before[name]) == (".lora_" not in name), name
    saved = read_checkpoint(tmp_path)
    assert set(saved["model"]) == {n for n, p in policy.named_parameters() if p.requires_grad}
    assert saved["state"]["weights"] == weights_hash(policy)
    assert sum(len(g["params"]) for g in saved["optimizer"]["param_groups"]) == len(saved["model"])

def test_a_checkpoint_belongs_on_its_weights(pairs, tmp_path):
    from tiny import perturbed
    settings = TrainConfig(lr=5e-3, batch_size=8, precision="fp32")
    train_stage(add_adapter(S(), asked()), pairs, score_pairs(S(), pairs), settings, tmp_path, start=score_pairs(S(), pairs))
    def load(model): return load_checkpoint(tmp_path, model, make_optimizer(model, settings), make_accelerator().scaler)
    assert load(add_adapter(S(), asked()))["step"] == 3
    with pytest.raises(ValueError, match="its weights, with the frozen ones, are"): load(add_adapter(perturbed(S()), asked()))
    with pytest.raises(ValueError, match="cannot be used"): load(add_adapter(S(), asked(lora_r=8)))
    with pytest.raises(ValueError, match="only in one of checkpoint and model"): load(add_adapter(S(), asked(lora_targets="q_proj")))
    with pytest.raises(ValueError, match="only in one of checkpoint and model"): load(S().train())

def test_a_wrong_table_is_found(pairs, tmp_path):
    "The first look works with adapters as without."
    from tiny import perturbed
    settings = TrainConfig(lr=5e-3, beta=0.3, batch_size=8, precision="fp32")
    wrong = score_pairs(perturbed(S(), 0.3), pairs)
    with pytest.raises(ValueError, match="of other weights, of other pairs"): train_stage(add_adapter(S(), asked()), pairs, wrong, settings, tmp_path, start=wrong)

def test_memory_plan_counts_what_is_trained():
    from sdpo_nb.lora import lora_config
    shape, lora = S().config, lora_config(asked())
    full, thin = (memory_plan(shape, TrainConfig(token_budget=2048), lora=x) for x in (None, lora))
    size = adapter_size(S(), asked())
    assert trained_numbers(shape, lora) == size and trained_numbers(shape) == S().num_parameters()
    assert math.isclose(thin["gradients"] * 2**30, 4 * size) and math.isclose(thin["moments"] * 2**30, 8 * size)
    assert math.isclose((thin["weights"] - full["weights"]) * 2**30, 4 * size, rel_tol=1e-6) and thin["output_gradient"] == 0
    assert lora.target_modules == "all-linear"                      # what was asked for stays what it was


# runs

def test_a_run(runs, pairs, tmp_path):
    run = runs()
    assert [round(s["first_loss"], 5) for s in run.stages] == [0.69315] * 2
    assert all(s["gamma_change"][1] > 0 for s in run.stages)
    for t in (1, 2):
        folder = run.folder / f"stage-{t}"
        adapter = read_adapter(folder / "model")
        assert (adapter.r, adapter.alpha) == (4 * t, 8 * t)
        assert run.stages[t-1]["saved"] == dict(dtype="float32", weights=run.stages[t-1]["end"])
        theirs = peft.PeftModel.from_pretrained(S(), folder / "model").eval()
        mine = load_stage(folder)
        assert weights_hash(mine) == run.stages[t-1]["end"] == weights_hash(load_exactly(folder))
        assert_close(says(mine, pairs), says(theirs, pairs), **NEAR)
        prompt = torch.tensor([pairs[0]["prompt_ids"]])
        a, b = (m.generate(input_ids=prompt, max_new_tokens=12, do_sample=False) for m in (mine, theirs))
        assert torch.equal(a, b)
    assert type(run.model) is type(S()) and len(run.tokenizer) == len(load_tokenizer(BASE))
    assert not list(run.folder.glob("stage-*/checkpoint"))

def test_same_adapter_goes_on(runs, pairs):
    run = runs("same")
    assert [read_adapter(run.model_folder(t)).r for t in (1, 2)] == [4, 4]
    assert [round(s["first_loss"], 4) for s in run.stages] == [0.6931] * 2
    assert run.stages[0]["end"] == runs("merge").stages[0]["end"] and run.stages[1]["end"] != runs("merge").stages[1]["end"]
    assert run.stages[1]["start"] == run.stages[0]["end"] == run.stages[1]["reference_kind"]["weights"]

def test_restarting_from_S(two, tmp_path):
    "Each stage has an adapter of its own on S."
    run = sdpo(BASE, two, config(init_target="S"), tmp_path / "run")
    assert [read_adapter(run.model_folder(t)).r for t in (1, 2)] == [4, 4]
    assert run.stages[1]["start"] == run.config["weights"]

def test_the_optimizer_goes_on_with_the_adapter(two, tmp_path):
    run = sdpo(BASE, two, config(lora_stages="same", restart="never"), tmp_path / "run")
    assert len(run.stages) == 2 and run.stages[1]["first_loss"] == pytest.approx(math.log(2), abs=1e-5)

@pytest.mark.parametrize("settings", [dict(reference="fixed"), dict(chunks=3, lora_targets="q_proj,v_proj"), dict(gradient_checkpointing=True), dict(precision="bf16", lora_stages="same"),
                                      dict(compile="on", lora_alpha=3)])
def test_other_settings(settings, two, tmp_path):
    run = sdpo(BASE, two, config(**settings), tmp_path / "run")
    assert all(weights_hash(load_stage(run.folder / f"stage-{t}")) == s["end"] for t, s in enumerate(run.stages, 1))
    if "reference" not in settings: assert all(abs(s["first_loss"] - math.log(2)) < (1e-4 if settings.get("precision") != "bf16" else 0.02) for s in run.stages)

def test_bf16_on_disk(two, tmp_path, pairs):
    "S in bf16: the adapter is kept in fp32, and given away is a model in bf16 unless fp32 is asked for."
    from sdpo_nb.folder import save_model
    save_model(S(), load_tokenizer(BASE), tmp_path / "half", torch.bfloat16)
    run = sdpo(str(tmp_path / "half"), two, config(), tmp_path / "run")
    assert all(t.dtype == torch.float32 for t in read_adapter(run.model_folder()).state.values())
    assert weights_hash(run.model) == run.stages[-1]["end"]
    out = load_model(str(run.export(tmp_path / "out")), "cpu")
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert weights_hash(out, torch.bfloat16) == weights_hash(run.model, torch.bfloat16)

PROGRAM = """
import json, os, signal, sys
import torch; torch.set_num_threads(1)
from sdpo_nb.plan import StepwiseConfig
from sdpo_nb.stepwise import sdpo
base, sources, settings, folder, stage, step = json.loads(sys.argv[1])
def out(row):
    if (row["stage"], row["step"]) == (stage, step): os.kill(os.getpid(), signal.SIGKILL)
sdpo(base, sources, StepwiseConfig(**settings), folder, on_step=out)
"""

@pytest.mark.parametrize("stages, at", [("merge", (1, 2)), ("merge", (2, 3)), ("same", (2, 1))])
def test_killed_and_resumed(stages, at, runs, two, tmp_path):
    folder, settings = str(tmp_path / "run"), SETTINGS | dict(lora_r=4, lora_stages=stages)
    died = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps([BASE, two, settings, folder, *at])], capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    torch.rand(5)
    run = sdpo(BASE, two, StepwiseConfig(**settings), folder)
    assert [s["end"] for s in run.stages] == [s["end"] for s in runs(stages).stages]

@pytest.mark.parametrize("where", ["save_adapter", "load_merged"])
def test_dies_while_it_saves(where, runs, two, tmp_path, monkeypatch):
    import sdpo_nb.stages as stages
    real = getattr(stages, where)
    def dies(*args, **kw):
        if where == "load_merged": raise KeyboardInterrupt
        real(*args, **kw); raise KeyboardInterrupt
    monkeypatch.setattr(stages, where, dies)
    with pytest.raises(KeyboardInterrupt): sdpo(BASE, two, config(), tmp_path / "run")
    monkeypatch.undo()
    assert [s["end"] for s in sdpo(BASE, two, config(), tmp_path / "run").stages] == [s["end"] for s in runs().stages]

def test_another_adapter_or_another_S(runs, two, tmp_path):
    from safetensors.torch import load_file, save_file
    from sdpo_nb.folder import save_model
    from tiny import perturbed
    save_model(S(), load_tokenizer(BASE), tmp_path / "S")
    run = sdpo(str(tmp_path / "S"), two, config(), tmp_path / "run")
    file = run.model_folder(1) / "adapter_model.safetensors"
    state = load_file(file)
    save_file({k: v * 1.01 for k, v in state.items()}, file, metadata=dict(format="pt"))
    with pytest.raises(ValueError, match="stage-1/model: has weights .* but the stage ended with"): load_stage(run.folder / "stage-1")
    file.write_bytes(b"half")
    with pytest.raises(ValueError, match="stage-1/model: cannot be used .* remove stage-1"): load_stage(run.folder / "stage-1")
    save_model(perturbed(S()), load_tokenizer(BASE), tmp_path / "S")
    with pytest.raises(ValueError, match="adapters of this run belong on S with"): run.model
    shutil.rmtree(tmp_path / "S")
    with pytest.raises(ValueError, match="no such model folder"): run.model

def test_older_folders_go_on(two, tmp_path):
    "A folder from before there were adapters has none of their settings."
    import yaml
    plain = {k: v for k, v in SETTINGS.items()}
    run = sdpo(BASE, two, StepwiseConfig(**plain), tmp_path / "run")
    path = run.folder / "config.yaml"
    old = yaml.safe_load(path.read_text())
    for name in [n for n in old["settings"] if n.startswith("lora_")]: del old["settings"][name]
    path.write_text(yaml.safe_dump(old))
    shutil.rmtree(run.folder / "stage-2")
    assert len(sdpo(BASE, two, StepwiseConfig(**plain), run.folder).stages) == 2
    path.write_text(yaml.safe_dump(old))
    with pytest.raises(ValueError, match="started with lora_r = 0, not 4"): sdpo(BASE, two, config(), run.folder)

def test_settings_of_adapters_may_not_change(runs, two):
    for changes, why in ((dict(lora_r=8), "lora_r = 4, not 8"), (dict(lora_alpha=3), "lora_alpha = 0, not 3"), (dict(lora_targets="q_proj"), "lora_targets = all-linear"), (dict(lora_stages="same"), "lora_stages = merge, not same")):
        with pytest.raises(ValueError, match=why): sdpo(BASE, two, config(**changes), runs().folder)


# handed on

def test_export_verify_and_pack(runs, two, tmp_path):
    run = runs()
    out = run.export(tmp_path / "not yet there" / "out")
    assert weights_hash(load_model(str(out), "cpu")) == run.stages[-1]["end"] and not (out / "adapter_config.json").exists()
    assert "adapters of rank 4 (all-linear), merged" in (out / "README.md").read_text()
    assert "S with the adapter in `stage-2/model`" in (run.folder / "report.md").read_text()
    found = verify(run.folder, two)
    assert set(found["result"].drop("manifest")) == {"ok"}, found
    zipped = pack_run(run.folder, tmp_path / "run.zip")
    assert zipped.stat().st_size < 200_000
    found = verify(zipped, two, str(out))
    assert "DIFFERS" not in set(found["result"]) and found.loc["M_2 asked again", "result"] == "ok"

def test_verify_where_S_is_not_here(two, tmp_path):
    shutil.copytree(BASE, tmp_path / "S")
    run = sdpo(str(tmp_path / "S"), two, config(), tmp_path / "run")
    (tmp_path / "S").rename(tmp_path / "away")
    found = verify(run.folder)
    assert "DIFFERS" not in set(found["result"])
    assert tuple(found.loc["stage 1: weights"]) == ("not checked", "S is not here, on which its adapter belongs")

def test_command_line(two, tmp_path):
    where = [f"{name}={path}" for name, path in two.items()]
    words = ["run", "--model", BASE, "--sources", *where, "--folder", str(tmp_path / "run"), "--lora-r", "2", "--lora-targets", "q_proj,v_proj", "--max-length", "64"]
    subprocess.run([sys.executable, "-m", "sdpo_nb.cli", *words], check=True, capture_output=True)
    run = Run(tmp_path / "run")
    assert read_adapter(run.model_folder(1)).targets == ["q_proj", "v_proj"]
    assert run.config["settings"]["lr"] == 5e-6


# settings

def test_the_default_learning_rate():
    assert StepwiseConfig().lr == 5e-7 and StepwiseConfig(lora_r=16).lr == 5e-6 and StepwiseConfig(lora_r=16, lr=1e-4).lr == 1e-4
    assert changed(StepwiseConfig(), lora_r=4).lr == 5e-6 and changed(StepwiseConfig(lr=5e-7), lora_r=4).lr == 5e-7
    assert replace(StepwiseConfig(lora_r=4), beta=0.2).lr == 5e-6 and make_config(dict(lora_r="8")).lora_r == 8
    later = StepwiseConfig(); later.lr = 1e-3
    assert changed(later, lora_r=4).lr == 1e-3 and changed(later, lora_r=4).max_prompt_length == 512
    assert make_config(dict(seed="9007199254740993")).seed == 9007199254740993 and make_config(dict(batch_size="4.0")).batch_size == 4
    for wrong in (0, -1): 
        with pytest.raises(ValueError, match="lr: must be above 0"): StepwiseConfig(lr=wrong)

@pytest.mark.parametrize("wrong, why", [(dict(lora_alpha=8), "lora_r: is 0"), (dict(lora_targets="q_proj"), "lora_r: is 0"), (dict(lora_stages="same"), "lora_r: is 0"), (dict(lora_r=-1), "at least 0"),
                                        (dict(lora_r=4, lora_stages="other"), "must be one of merge, same"), (dict(lora_r=4, lora_stages="same", init_target="S"), "choose one"),
                                        (dict(lora_r=4, restart="never"), "take lora_stages = same")])
def test_settings_that_exclude_each_other(wrong, why):
    with pytest.raises(ValueError, match=why): StepwiseConfig(**wrong)

def test_low_learning_rate_is_said(two, tmp_path, capsys):
    sdpo(BASE, two, config(lr=5e-7), tmp_path / "run")
    assert "lr = 5e-07 is low for adapters" in capsys.readouterr().out


# wrapped by PEFT

def wrapped(model=None, **changes): return peft.get_peft_model(model or S(), peft.LoraConfig(**dict(r=4, target_modules=["q_proj", "v_proj"]) | changes))

def test_a_fresh_one_says_what_is_wanted(two, tmp_path, pairs):
    user = wrapped(lora_alpha=16)
    before = weights_hash(user)
    first = sdpo(user, two, StepwiseConfig(**SETTINGS), tmp_path / "run", tokenizer=load_tokenizer(BASE))
    again = sdpo(user, two, StepwiseConfig(**SETTINGS), tmp_path / "run", tokenizer=load_tokenizer(BASE))
    assert weights_hash(user) == before and isinstance(user, peft.PeftModel)
    assert not any(p.requires_grad for n, p in user.named_parameters() if ".lora_" not in n)
    typed = sdpo(BASE, two, config(lora_alpha=16, lora_targets="q_proj,v_proj"), tmp_path / "typed")
    assert [s["end"] for s in first.stages] == [s["end"] for s in again.stages] == [s["end"] for s in typed.stages]
    assert_close(says(peft.PeftModel.from_pretrained(load_model(str(tmp_path / "run/base/model"), "cpu"), first.model_folder()), pairs), says(first.model, pairs), **NEAR)

@pytest.mark.parametrize("changes, want", [(dict(target_modules="all-linear"), "all-linear"), (dict(target_modules=["v_proj"]), "v_proj"),
                                           (dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]), "all-linear")])
def test_targets_of_a_wrapped_model(changes, want):
    plain, found = unwrapped(wrapped(**changes))
    assert found["lora_targets"] == want and weights_hash(plain) == weights_hash(S())

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]

def untied():
    "A model whose output layer is not its embedding."
    shape = S().config.to_dict() | dict(tie_word_embeddings=False)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()

def test_no_target_of_a_wrapped_model_is_dropped():
    "All linear layers and one more are not all-linear."
    user = wrapped(untied(), target_modules=[*SEVEN, "lm_head"])
    plain, found = unwrapped(user)
    wanted = sum(p.numel() for n, p in user.named_parameters() if ".lora_" in n)
    assert adapter_size(plain, SimpleNamespace(**found)) == wanted > adapter_size(plain, asked())
    for model, names, why in ((untied(), [*SEVEN, "embed_tokens"], "no linear layer is called 'embed_tokens'"), (S(), [*SEVEN, "lm_head"], "also its embedding")):
        with pytest.raises(ValueError, match=why): unwrapped(wrapped(model, target_modules=names))

def made_by_peft(folder, config):
    "Files of an adapter that has learned something, and the model that they make."
    user = moved(peft.get_peft_model(untied(), config))
    user.save_pretrained(folder)
    return user.eval()

@pytest.mark.parametrize("changes", [{}, dict(target_modules=r".*layers\.[01]\.self_attn\.q_proj"), dict(layers_to_transform=[1], bias="lora_only"), dict(init_lora_weights="gaussian", lora_alpha=5)])
def test_an_adapter_of_peft_is_read(changes, tmp_path, pairs):
    theirs = made_by_peft(tmp_path, peft.LoraConfig(**dict(r=4, target_modules=["q_proj", "v_proj"]) | changes))
    assert_close(says(merge_adapter(untied(), read_adapter(tmp_path)), pairs), says(theirs, pairs), **NEAR)

@pytest.mark.parametrize("changes, why", [(dict(use_rslora=True), "use_rslora = True, .*merge_and_unload"), (dict(use_dora=True), "use_dora"), (dict(rank_pattern={"q_proj": 2}), "rank_pattern"), (dict(alpha_pattern={"q_proj": 2}), "alpha_pattern"),
                                          (dict(modules_to_save=["lm_head"]), "modules_to_save"), (dict(init_lora_weights="pissa"), "init_lora_weights = 'pissa'"), (dict(target_modules=["q_proj", "embed_tokens"]), "holds .*embed_tokens")])
def test_an_adapter_of_another_form_is_not_read(changes, why, tmp_path):
    made_by_peft(tmp_path, peft.LoraConfig(**dict(r=4, target_modules=["q_proj", "v_proj"]) | changes))
    with pytest.raises(ValueError, match=why): read_adapter(tmp_path)

def test_an_adapter_on_a_tied_output_layer_is_not_merged(tmp_path):
    "Merged, it would change the embedding, too. PEFT keeps it beside the layer."
    moved(wrapped(target_modules=["q_proj", "lm_head"])).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ValueError, match="lm_head is also the embedding"): load_any(tmp_path)

def test_matrices_are_read_in_fp32(tmp_path):
    adapter = adapter_of(add_adapter(S(), asked()))
    write_adapter(replace(adapter, state={name: t.half() for name, t in adapter.state.items()}), tmp_path)
    assert {t.dtype for t in read_adapter(tmp_path).state.values()} == {torch.float32}

def test_a_reference_with_the_weights_of_S_and_another_config(two, tmp_path):
    "It is another model: its table is not compared with what the policy says."
    ref = tmp_path / "ref"; shutil.copytree(BASE, ref)
    written = json.loads((ref / "config.json").read_text())
    written["rope_parameters"] = dict(written.get("rope_parameters") or {}, rope_type="dynamic", rope_theta=10000., factor=4.)
    (ref / "config.json").write_text(json.dumps(written | dict(max_position_embeddings=16)))
    one = sdpo(BASE, dict(primer=two["primer"]), config(reference=str(ref)), tmp_path / "run").stages[0]
    assert one["reference_kind"]["weights"] == one["start"] == weights_hash(S()) and abs(one["first_loss"] - math.log(2)) > 1e-2

def test_files_that_are_no_lora(tmp_path):
    from safetensors.torch import load_file, save_file
    made_by_peft(tmp_path / "ia3", peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="is of IA3, and only LoRA"): read_adapter(tmp_path / "ia3")
    made_by_peft(tmp_path, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    for wrong, why in (({}, "holds nothing"), (state | dict(other=torch.zeros(1)), "holds other, which is no matrix"), ({n: t[:2] if "lora_A" in n else t for n, t in state.items()}, "is of rank 2, not 4")):
        save_file({n: t.contiguous() for n, t in wrong.items()}, file)
        with pytest.raises(ValueError, match=why): read_adapter(tmp_path)

def test_tied_weights_stay_tied():
    plain, _ = unwrapped(wrapped())
    assert plain.lm_head.weight is plain.model.embed_tokens.weight and not hasattr(plain, "peft_config")

@pytest.mark.parametrize("changes, why", [(dict(use_dora=True), "use_dora = True"), (dict(use_rslora=True), "use_rslora"), (dict(modules_to_save=["lm_head"]), "modules_to_save"), (dict(bias="lora_only"), "bias"),
                                          (dict(rank_pattern={"q_proj": 2}), "rank_pattern"), (dict(alpha_pattern={"q_proj": 2}), "alpha_pattern"), (dict(init_lora_weights="gaussian"), "init_lora_weights"),
                                          (dict(layers_to_transform=[0]), "layers_to_transform"), (dict(target_modules=".*q_proj"), "is a pattern")])
def test_what_is_not_known_is_refused(changes, why, tmp_path):
    with pytest.raises(ValueError, match=why): sdpo(wrapped(**changes), {}, None, tmp_path / "run", tokenizer=load_tokenizer(BASE))

def test_other_wrappings_are_refused(two, tmp_path):
    def refused(model, why, settings=None):
        with pytest.raises(ValueError, match=why): sdpo(model, two, settings, tmp_path / "run", tokenizer=load_tokenizer(BASE))
    refused(moved(wrapped()), "has been trained; merge it first")
    refused(peft.get_peft_model(S(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])), "IA3Config, and only LoRA")
    many = wrapped(); many.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    refused(many, "has 2 adapters")
    refused(wrapped(), "carries an adapter already", StepwiseConfig(lora_r=4))
    added = S(); added.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    refused(added, "has a PEFT adapter; merge it first")
    refused(str(Run(tmp_path).folder), "is not a model")

def test_dropout_is_said(capsys):
    unwrapped(wrapped(lora_dropout=0.1))
    assert "lora_dropout = 0.1 is not used" in capsys.readouterr().out
