"""
No public function mixes devices, and this is seen without a graphics card: fake tensors claim to lie on one.

They have a shape, a type and a device but no numbers, and PyTorch refuses to mix them as it does real ones. The policy is on the card, the numbers
of a reference are on the CPU, and the reference follows the policy (chapter 03). Nothing requires a gradient: without a card, autograd ends the
whole process on a fake tensor that does. The backward passes that this package writes itself are called by hand.
"""
from dataclasses import replace
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from sdpo_nb import benchmarks, evaluate, graded, in_memory, logprobs, lora, loss, mt_bench, packing, trainer, verify, world

torch.set_num_threads(1)
CARD, MIXED, REAL = "cuda:0", "same device|two (different )?devices", torch.zeros(2)
PAIRS = [dict(key=str(i), prompt_ids=[3] * x, chosen_ids=[4] * c, rejected_ids=[5] * r) for i, (x, c, r) in enumerate([(9, 5, 7), (3, 6, 2)])]
TABLE = logprobs.LogprobTable(dict(weights="0"), pd.DataFrame(dict(chosen=-1., rejected=-2.), index=["0", "1"]))
PROMPTS, TOK, CONFIG = ["sort ba", "copy ab"], world.make_tokenizer(), trainer.TrainConfig(precision="bf16", shuffle=False)


# What a fake tensor is asked and cannot know, and what PyTorch refuses to do on a card without CUDA.

def number(x):
    "True, 0.0 or 20 for the number in a fake tensor; 20 is a token, and longer than any row here."
    if not isinstance(x, FakeTensor): return x.item()
    return True if x.dtype == torch.bool else 0. if x.is_floating_point() else 20

def array(x, *args, **kw):
    "Zeros for what a fake tensor holds. As with real ones, there is no array of a tensor on the card."
    if x.is_cuda: raise TypeError("two devices: numpy reads the CPU only")
    with unset_fake_temporarily(): return (torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, FakeTensor) else x).numpy()

def at(x, index):
    "x[index]. A mask is true everywhere."
    dim, tensors = 0, {}
    for i in index if isinstance(index, tuple) else (index,):
        if isinstance(i, (list, np.ndarray)): i = torch.as_tensor(i)
        if isinstance(i, Tensor) and i.is_cuda and not x.is_cuda: raise RuntimeError("two devices: an index on the card into a tensor on the CPU")
        if isinstance(i, int): x = x.select(dim, i); continue
        if i is Ellipsis: dim = x.ndim - sum(j is not None for j in index[index.index(i) + 1:]) - 1
        elif i is None: x = x.unsqueeze(dim)
        elif isinstance(i, slice): x = torch.ops.aten.slice(x, dim, i.start, i.stop, i.step or 1)
        elif i.dtype == torch.bool: x = x.flatten(dim, dim + i.ndim - 1)
        else: tensors[dim] = i
        dim += 1
    return torch.ops.aten.index(x, [tensors.get(d) for d in range(dim)]) if tensors else x

def real(array):
    "A tensor whose numbers are known, since a plan is made of them."
    with unset_fake_temporarily(): return torch.as_tensor(array)

def arange(*args, **kw): return torch.arange(*(number(a) if isinstance(a, Tensor) else a for a in args), **kw)
def no_backward(loss, *args, **kw): pass
def copied(x, numbers, *args):
    "x.copy_(numbers), which may come from another device."
    assert torch.broadcast_shapes(x.shape, numbers.shape) == x.shape
    return x
def moves(weight, cast):
    "`model.float()` and `layer.to(device)`: a fake weight moves, and otherwise stays as it is."
    weight.fake_device = cast.fake_device

def check(f, *given):
    "What a custom operation (varlen_attn) asks of its tensors; fake ones do not ask it there."
    if len(devices := {str(x.device) for x in tree_leaves(given) if isinstance(x, Tensor)}) > 1: raise RuntimeError(f"two devices: {f} is given {devices}")

ANSWERS = {Tensor.item: number, Tensor.__int__: number, Tensor.__bool__: number, Tensor.numpy: array, Tensor.__array__: array, Tensor.__getitem__: at,
           Tensor.__invert__: torch.bitwise_not, Tensor.contiguous: torch.clone, Tensor.backward: no_backward, Tensor.copy_: copied, torch.arange: arange}

class Answering(TorchFunctionMode):
    def __torch_function__(self, f, types, args=(), kwargs=None):
        if isinstance(f, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)): check(f, args, kwargs)
        return ANSWERS.get(f, f)(*args, **(kwargs or {}))

@pytest.fixture
def card(monkeypatch):
    "Fake tensors, and the little that is asked of the card itself."
    asks_the_driver = torch.version.cuda and torch.__version__ < TorchVersion("2.14")
    if asks_the_driver and not torch.cuda.is_available(): pytest.skip("this CUDA build of PyTorch wants a card for fake tensors, too")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    for ask, answer in dict(is_bf16_supported=True, get_device_capability=(9, 0), get_device_properties=SimpleNamespace(total_memory=2**36)).items():
        monkeypatch.setattr(torch.cuda, ask, lambda *args, answer=answer, **kw: answer)
    monkeypatch.setattr(torch, "from_numpy", real)
    monkeypatch.setattr(trainer, "trained_weights", lambda model: list(model.parameters()))   # fake weights want no gradient
    monkeypatch.setattr(torch.utils, "swap_tensors", moves)
    for module in (logprobs, packing):           # a fake weight is a FakeTensor, not a Parameter
        monkeypatch.setattr(module, "is_plain", lambda head: type(head) is torch.nn.Linear, raising=False)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), Answering(): yield


# What the functions are given.

def policy(*shape): return torch.zeros(shape, device=CARD)
def reference(*shape): return torch.zeros(shape)
def ids(*shape): return torch.zeros(shape, dtype=torch.long, device=CARD)

def model(kind="llama", layers=1, **kw):
    "A small model on the card."
    usual = dict(vocab_size=len(TOK), hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, tie_word_embeddings=False)
    with torch.device("meta"): m = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **usual | kw)).eval()
    def moved(t): return torch.zeros(t.shape, dtype=t.dtype, device=CARD)
    for part in m.modules():
        part._parameters.update({k: torch.nn.Parameter(moved(p), requires_grad=False) for k, p in part._parameters.items() if p is not None})
        part._buffers.update({k: moved(b) for k, b in part._buffers.items() if b is not None})
    return m

def capped(): return model("gemma2", 2, head_dim=8, sliding_window=4, attn_logit_softcapping=0.5, final_logit_softcapping=0.5)
def stretched(): return model(max_position_embeddings=4, rope_parameters=dict(rope_type="dynamic", factor=2., rope_theta=1e4))
def scored(f):
    m = model()
    with logprobs.autocast(m.device, "bf16"): return f(m, PAIRS)
def wide(m, pairs):
    with logprobs.fp32_logits(m): return m(input_ids=ids(1, 4)).logits
def in_pieces(f):
    with patch.object(packing, "PIECE", 1): return f()
def row(plan=lambda row: None):
    "A packed row on the card."
    out = packing.pack(PAIRS); out.plan = plan(out)
    return packing.to_device(out, CARD)
def qkv(heads_last=False): return [policy(*((32, h, 8) if heads_last else (h, 32, 8))) for h in (4, 2, 2)]
def by_plan(plan): r = row(plan); return r.plan.attend(*qkv(), r, 1., 4, None)
def by_flash(**kw): r = row(packing.flash_plan); r.plan = replace(r.plan, **kw); q, k, v = qkv(True); return packing.flash(q, r.plan.keys(k), r.plan.keys(v), r.plan, 1., 4)
def said(): return trainer.batch_logprobs(model(), PAIRS, CONFIG, "bf16", packing.packed_logprobs)

def saved(*tensors): return SimpleNamespace(saved_tensors=tensors, needs_input_grad=(True, True), places=1)
def copies_backward(): c = row(packing.flash_plan).plan.keys; return packing._Copy.backward(saved(c.first, c.second), policy(len(c.take), 2, 8))[0]
def wide_backward(): return logprobs._WideLinear.backward(saved(policy(5, 32).bfloat16(), policy(49, 32).bfloat16()), policy(5, 49))[:2]

def own_loss(c, r, rc, rr, beta, pairs): return beta * ((r - rr) - (c - rc))
OPTIONS = [([5, 6, 7, 8], [9, 5]), ([5, 6, 7, 8], [4, 6, 7]), ([5, 6, 9], [4])] # prompt, option
def read_options(reader): return [reader.after((5, 6, 7)), *reader.within([[5, 6], [7, 8, 9]])]

def gradients(f): return trainer.batch_gradients(model(), PAIRS, TABLE, CONFIG, trainer.make_accelerator("bf16"), "bf16", f)
def step():
    m, accelerator = model(), trainer.make_accelerator("bf16")
    for p in m.parameters(): p.grad = torch.zeros_like(p)
    steps = trainer.Trainer(m, TABLE, CONFIG, accelerator, trainer.make_optimizer(m, CONFIG), "bf16", packing.packed_logprobs)
    return steps.update(steps.gradients(PAIRS, steps.prepare(PAIRS)), 1e-3)
def stage():
    with TemporaryDirectory() as folder, patch.object(trainer, "save_checkpoint"):
        return trainer.train_stage(model(), PAIRS, TABLE, replace(CONFIG, compile="off", deterministic=False), folder, start=TABLE)


def halves():
    m = model()
    with logprobs.autocast(m.device, "bf16"): return logprobs.half_weight(m)


# Adapters, cells in memory, and answers.

THIN = SimpleNamespace(lora_r=2, lora_alpha=4, lora_targets="q_proj,up_proj", seed=0)
def adapted(): return lora.add_adapter(model(), THIN)
def on_disk(folder):
    "An adapter of the model, with real numbers, in the two files of PEFT."
    with unset_fake_temporarily():
        sizes = {"self_attn.q_proj": (32, 32), "mlp.up_proj": (32, 64)}
        state = {f"model.layers.0.{name}.lora_{side}.weight": torch.ones(shape) for name, (i, o) in sizes.items() for side, shape in dict(A=(2, i), B=(o, 2)).items()}
        lora.write_adapter(lora.Adapter(2, 4, ["q_proj", "up_proj"], state), folder)
    return folder
def real_file(path, load=lora.load_file):
    with unset_fake_temporarily(): return load(path)
def read():
    with TemporaryDirectory() as folder, patch.object(lora, "load_file", real_file): return lora.read_adapter(on_disk(folder))
def written():
    "The adapter of a model on the card lies on the CPU, where its file is made."
    with TemporaryDirectory() as folder, patch.object(lora, "save_file", lambda state, *args, **kw: [array(x) for x in state.values()]): lora.write_adapter(lora.adapter_of(adapted()), folder)
def answers(m): return packing.packed_logprobs(m, PAIRS)

def base():
    "The trial for the same bits asks for gradients; it is walked on its own."
    with patch.object(in_memory, "load_model", lambda *args: model()), patch.object(in_memory, "why_not_same_bits", lambda *args: None):
        return in_memory.load_S("S", PAIRS, "bf16", "off")
def in_place(table, **kw):
    shared, config = base(), replace(CONFIG, batch_size=1, deterministic=False)
    for p in shared.model.parameters(): p.grad = torch.zeros_like(p)
    return in_memory.train_in_memory(shared, PAIRS, table, config, **kw)
def cells():
    shared, config = base(), replace(CONFIG, deterministic=False)
    for p in shared.model.parameters(): p.grad = torch.zeros_like(p)
    with patch.object(torch.optim.AdamW, "zero_grad", lambda optimizer: None):       # or the second stage would find no gradient
        return [number for number, *_ in in_memory.train_stages(shared, [("a", "S", "S"), ("a", "before", "before")], lambda name: PAIRS, TABLE, config)]

QUESTION = dict(category="writing", turns=["sort ba", "copy ab"])  # of a temperature above 0


# The walk. A name is that of a public function; what follows a comma tells cases of one function apart.

CASES = {
    "logprobs.collate": lambda: logprobs.collate(PAIRS, CARD),
    "logprobs.token_logprobs": lambda: logprobs.token_logprobs(policy(5, 9), ids(5)),
    "logprobs.gamma": lambda: logprobs.gamma(policy(2), policy(2)),
    "logprobs.half_weight": halves,
    "logprobs.fp32_logits": lambda: scored(wide),
    "logprobs.fp32_logits, backward": wide_backward,
    "logprobs.response_logprobs": lambda: logprobs.response_logprobs(model(), PAIRS),
    "logprobs.response_logprobs, read alone": lambda: logprobs.response_logprobs(stretched(), PAIRS),
    "logprobs.response_logprobs, bf16": lambda: scored(logprobs.response_logprobs),
    "logprobs.weights_hash": lambda: bool(logprobs.weights_hash(model(), torch.bfloat16)),
    "logprobs.check_model": lambda: logprobs._looks_ahead(model()),
    "logprobs.table_kind": lambda: logprobs.table_kind(model(), "bf16", packing.packed_logprobs),
    "logprobs.LogprobTable": lambda: [loss.reward(policy(2), numbers, 0.1) for numbers in TABLE.lookup(PAIRS)],
    "logprobs.LogprobTable, gamma": lambda: loss.dpo_loss(policy(2), TABLE.gamma(PAIRS), 0.1),
    "logprobs.prepared": lambda: [packing.packed_logprobs(model(), made) for _, made in logprobs.prepared(model(), [PAIRS, PAIRS], packing.packed_logprobs)],
    "logprobs.score_pairs": lambda: logprobs.score_pairs(model(), PAIRS).gamma(PAIRS).numpy(),
    "logprobs.score_pairs, flash": lambda: logprobs.score_pairs(model(), PAIRS, None, "bf16", packing.flash_logprobs).gamma(PAIRS).numpy(),
    "loss.differences": lambda: loss.differences(policy(2, 5)),
    "loss.bradley_terry": lambda: loss.bradley_terry(policy(2, 5), 6.),
    "loss.optimal_policy": lambda: loss.optimal_policy(policy(2, 5), policy(2, 5), 0.1),
    "loss.follow": lambda: loss.follow(reference(2), policy(2)),
    "loss.reward": lambda: loss.reward(policy(2), reference(2), 0.1),
    "loss.dpo_loss": lambda: loss.dpo_loss(policy(2), reference(2), 0.1, 0.1),
    "loss.reward_accuracy": lambda: loss.reward_accuracy(policy(2), reference(2)),
    "loss.reward_accuracy, no reference": lambda: loss.reward_accuracy(policy(2)),
    "loss.population_loss": lambda: loss.population_loss(policy(2, 5), reference(2, 5), policy(2, 5, 5), 0.1),
    "packing.pack": lambda: packing.packed_logprobs(model(), packing.pack(PAIRS)),
    "packing.visible": lambda: packing.visible(row(), slice(0, 9), 4),
    "packing.by_blocks": lambda: packing.by_blocks(*qkv(), row(), 1., 4, 0.5),
    "packing.packed_attention": lambda: packing.packed_attention(None, *(x[None] for x in qkv()), None, row=row()),
    "packing.head_logprobs": lambda: packing.head_logprobs(model(), policy(5, 32), ids(5)),
    "packing.head_logprobs, in pieces": lambda: in_pieces(lambda: packing.head_logprobs(model(), policy(5, 32), ids(5))),
    "packing.packed_logprobs": lambda: packing.packed_logprobs(model(), PAIRS),
    "packing.packed_logprobs, bf16": lambda: scored(packing.packed_logprobs),
    "packing.packed_logprobs, window and soft-cap": lambda: packing.packed_logprobs(capped(), PAIRS),
    "packing.packed_logprobs, read alone": lambda: packing.packed_logprobs(stretched(), PAIRS),
    "packing.packed_row": lambda: packing.of_row(model(), packing.packed_row(model(), PAIRS)),
    "packing.of_row": lambda: packing.of_row(model(), packing.pack(PAIRS)),
    "packing.of_row, window and soft-cap": lambda: packing.of_row(capped(), packing.pack(PAIRS)),
    "packing.to_device": lambda: packing.to_device(reference(2), CARD),
    "packing.Copies": lambda: row(packing.flash_plan).plan.keys(policy(32, 2, 8)),
    "packing.Copies, backward": copies_backward,
    "packing.copies": lambda: packing.to_device(packing.copies(np.arange(3), 3), CARD)(policy(3)),
    "packing.FlashPlan": lambda: by_plan(packing.flash_plan),
    "packing.flash_plan": lambda: packing.of_row(model(), row(packing.flash_plan)),
    "packing.flash": by_flash,
    "packing.flash_row": lambda: scored(lambda m, pairs: packing.of_row(m, packing.flash_row(m, pairs))),
    "packing.flash_logprobs": lambda: scored(packing.flash_logprobs),
    "packing.Padded": lambda: row(packing.padded_plan).plan.rejected.attend(policy(32, 4, 8), policy(32, 4, 8), policy(32, 4, 8), 1., 4, 0.5),
    "packing.PaddedPlan": lambda: by_plan(packing.padded_plan),
    "packing.padded_plan": lambda: packing.of_row(model(), row(packing.padded_plan)),
    "packing.try_out": lambda: packing.try_out(model(), packing.packed_logprobs, "bf16"),
    "packing.why_not_packed": lambda: packing.why_not_packed(model(), PAIRS),
    "packing.why_not_flash": lambda: packing.why_not_flash(model(), PAIRS, "bf16"),
    "packing.choose_logprobs": lambda: bool(packing.choose_logprobs(model(), PAIRS, "auto", "bf16").attention), # padding has none
    "trainer.pair_losses": lambda: trainer.pair_losses(policy(2), policy(2), reference(2), reference(2), CONFIG, PAIRS),
    "trainer.pair_losses, a function": lambda: trainer.pair_losses(policy(2), policy(2), reference(2), reference(2), replace(CONFIG, loss=own_loss), PAIRS),
    "trainer.measure": lambda: trainer.measure(policy(2), policy(2), reference(2), reference(2), CONFIG),
    "trainer.trainable": lambda: trainer.trainable(model()).device,
    "trainer.batch_gradients": lambda: gradients(logprobs.response_logprobs),
    "trainer.batch_gradients, flash": lambda: gradients(packing.flash_logprobs),
    "trainer.fit": lambda: trainer.fit(model(), PAIRS, CONFIG, "bf16", packing.packed_logprobs),
    "trainer.why_not_same_bits": lambda: trainer.why_not_same_bits(model(), packing.packed_logprobs, "bf16"),
    "trainer.make_optimizer": lambda: trainer.make_optimizer(model(), CONFIG).step(),
    "trainer.Trainer": step,
    "trainer.batch_logprobs": lambda: said().numpy(),
    "trainer.per_root_token": lambda: trainer.per_root_token(said(), PAIRS),
    "trainer.rounding_limit": lambda: trainer.rounding_limit(said(), said(), PAIRS),
    "trainer.check_table": lambda: trainer.check_table(TABLE, PAIRS, said(), 1.),
    "trainer.train_stage": stage,
    "evaluate.held_out": lambda: evaluate.held_out(TABLE, TABLE, PAIRS, 0.1),
    "evaluate.held_out, tokens": lambda: evaluate.held_out(TABLE, TABLE, PAIRS, 0.1, torch.ones(len(PAIRS), 2)),
    "evaluate.greedy_answers": lambda: bool(evaluate.greedy_answers(model(), TOK, [[5, 6, 7]], 3)),
    "evaluate.answers_beside": lambda: bool(len(evaluate.answers_beside(model(), model(), TOK, PROMPTS))),
    "evaluate.kl_along": lambda: evaluate.kl_along(model(), model(), TOK, PROMPTS, [[5, 6], [7]]).numpy(),
    "evaluate.response_kl": lambda: evaluate.response_kl(model(), model(), TOK, PROMPTS).numpy(),
    "evaluate.frontier": lambda: evaluate.frontier(model(), TOK, PROMPTS, [0.1], 1),
    "benchmarks.Reader": lambda: read_options(benchmarks.Reader(model())),
    "benchmarks.score_options": lambda: [bool(answer) for answer in benchmarks.score_options(model(), OPTIONS, 64)],
    "benchmarks.why_not_shared": lambda: benchmarks.why_not_shared(model(), OPTIONS, 64),
    "lora.add_adapter": lambda: answers(adapted()),
    "lora.adapter_of": lambda: answers(lora.merge_adapter(model(), lora.adapter_of(adapted()))),
    "lora.write_adapter": written,
    "lora.read_adapter": lambda: bool(read().state),
    "lora.merge_adapter": lambda: answers(lora.merge_adapter(model(), read())),
    "lora.join_adapters": lambda: answers(lora.merge_adapter(model(), lora.join_adapters(read(), lora.adapter_of(adapted())))),
    "lora.put_back": lambda: answers(lora.put_back(model(), read(), THIN)),
    "in_memory.load_S": lambda: answers(base().reset()),
    "in_memory.Base": lambda: base().score(PAIRS).gamma(PAIRS).numpy(),
    "in_memory.train_in_memory": lambda: in_place(TABLE),
    "in_memory.train_in_memory, fine-tuning": lambda: in_place(None),
    "in_memory.train_in_memory, the reference becomes the model": lambda: in_place(TABLE, every=1),
    "in_memory.train_in_memory, the reference moves": lambda: in_place(TABLE, every=1, share=0.5),
    "in_memory.train_stages": cells,
    "graded.sampled_ids": lambda: bool(graded.sampled_ids(model(), TOK, [[5, 6, 7], [5]], max_new=3)),
    "graded.sampled_ids, greedy": lambda: bool(graded.sampled_ids(model(), TOK, [[5, 6, 7]], 0., max_new=3)),
    "graded.answers_to": lambda: bool(graded.answers_to(model(), TOK, graded.example_problems("add", 4)[:2], max_new=2)),
    "mt_bench.answer_turns": lambda: bool(mt_bench.answer_turns(model(), TOK, QUESTION, 2, "bf16")),
    "world.sft": lambda: world.sft(model(), TOK, [(p, "ab") for p in PROMPTS], 1, 2),
    "world.respond_ids": lambda: world.respond_ids(model(), TOK, PROMPTS),
    "world.respond_ids, greedy": lambda: world.respond_ids(model(), TOK, PROMPTS, 0.),
    "world.respond": lambda: world.respond(model(), TOK, PROMPTS),
    "world.make_pairs": lambda: world.make_pairs(model(), TOK, PROMPTS, 0),
    "world.world_pairs": lambda: world.world_pairs(model(), TOK, dict(sources=dict(riddle=PROMPTS))),
    "world.true_rewards": lambda: world.true_rewards(model(), TOK, PROMPTS),
    "world.score_responses": lambda: world.score_responses(model(), TOK, PROMPTS),
    "world.skill_table": lambda: world.skill_table(model(), TOK, PROMPTS)}

FAULTS = {} # found by the walk and still there: name -> what mixes

NOT_WALKED = {
    "no model and no tensor of a policy": """check_prompts padded_tokens autocast load_model load_config stored_dtype load_tokenizer pick_precision memory_ended keys_of pair_tokens Clock progress pairs_hash write_json write_lines lines_of read_table
        micro_batches ahead certificate Row packed_tokens piece_bytes setting TrainConfig check_settings check_one_process make_accelerator cut kept_bytes trained_numbers memory_plan share_of_responses tokens_that_fit return_large_blocks free_memory peak_memory
        plan_for as_line check_memory wants_compiling epoch_order all_batches learning_rate check_same_twice MetricsLog bootstrap interval as_text excess plot_frontier win_rate
        forgetting stability failure_signs ends_above answer edit_distance true_reward split_of make_prompts misled demonstration make_tokenizer make_model prompt_ids text_of source_prompts
        world_texts content_hash complaint skipped_without World load_world load_base EnumerableWorld enumerable_world""",
    "asks the harness, or reads what it said": """harness quiet ask_harness plain_lm sharing_lm by_prompt shared_tokens option_mask Benchmark local_dataset write_tasks Score read_score score_model
        find_benchmarks question_differences Evaluation plot_benchmarks evaluate_run evaluate_folders""",
    "sets or reads attributes, computes nothing": "has_adapter trained_weights is_plain must_read_alone check_rows dropouts freeze_dropout best_device same_bits attention recompute_alike uncompile activation_checkpointing generating own_config end_tokens",
    "the compiler wants a CUDA build": "compile_layers compile_for",
    "files hold real numbers": "replacing save_checkpoint read_checkpoint load_checkpoint",
    "trains until real numbers are good enough": "train_base freeze_world check_world",
    "loads models, and loads them to the CPU": "verify recomputed read_evidence Evidence pack_run",
    "asks whether the numbers of an adapter are zero": "unwrapped",
    "reads layers, settings, texts or numbers": """target_layers adapter_size lora_config Adapter is_adapter is_wrapped Problem split_of_content grade example_problems messages_of make_problems ids_of answer_text label_pairs
        teacher_pairs Calibration load_lines judge_messages rating_of openai_judge write_judgments mt_bench_table""",
    "answers by sampled_ids or answer_turns, and grades or keeps the texts": "calibrate run_calibration calibration store_calibration write_answers mt_bench"}


FLASH = {"scale", "window_size"} <= set(getattr(packing, "KNOWN", ()))

@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor") # by deepcopy
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xfail(reason=FAULTS[n], strict=True, raises=RuntimeError)) if n in FAULTS else n for n in CASES])
def test_devices_are_not_mixed(card, name):
    if "flash" in name.lower() and not FLASH: pytest.skip("this PyTorch has no varlen_attn to walk")
    result = CASES[name]()
    assert not isinstance(result, str), result   # why it is refused
    for x in tree_leaves(result): assert not isinstance(x, Tensor) or x.is_cuda

def test_every_public_function_is_walked_or_says_why_not():
    public = [name for module in (logprobs, loss, packing, trainer, evaluate, benchmarks, world, lora, in_memory, graded, mt_bench, verify) for name in module.__all__ if callable(getattr(module, name))]
    walked, listed = {name.split(",")[0].split(".")[1] for name in CASES}, " ".join(NOT_WALKED.values()).split()
    assert sorted(public) == sorted([*walked, *listed])

MIXES = {
    "two tensors": lambda: policy(2) - reference(2),
    "a real tensor": lambda: policy(2) - REAL,
    "an index": lambda: reference(2)[ids(2)],
    "numpy": lambda: np.asarray(policy(2)),
    "a custom operation": lambda: by_flash(key_starts=torch.zeros(5, dtype=torch.int32)),
    "tokens": lambda: model()(input_ids=ids(1, 4).cpu()),
    "dpo_loss without follow": lambda: patch.object(loss, "follow", lambda reference, policy: reference)(loss.dpo_loss)(policy(2), reference(2), 0.1)}

@pytest.mark.parametrize("name", MIXES)
def test_the_walk_sees_what_is_mixed(card, name):
    if name == "a custom operation" and not FLASH: pytest.skip("this PyTorch has no varlen_attn to walk")
    with pytest.raises((RuntimeError, TypeError), match=MIXED): MIXES[name]()
