"""The same numbers as TRL 1.16's DPOTrainer and as the original DPO code, where policy and reference differ.

What agrees: token ids (conversational and plain rows, truncated or not), loss, both rewards, margin, the gradient of every tensor.
What does not, and is tested as a difference: TRL counts ties as wrong (a policy that equals its reference reads accuracy 0.0, here 0.5);
TRL scores what a chat template writes after the turn's end token (the tiny world's template writes nothing there), this package does not.
"""
import copy, math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.testing import assert_close
from transformers import AutoTokenizer

pytest.importorskip("trl", reason="TRL is not installed here")
from trl import DPOConfig, DPOTrainer

from sdpo_nb.logprobs import response_logprobs, score_pairs
from sdpo_nb.loss import dpo_loss, reward
from sdpo_nb.packing import packed_logprobs
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.trainer import TrainConfig, batch_gradients, make_accelerator, trainable
from sdpo_nb.world import load_base, load_world
from tiny import perturbed, rows

BETA = 0.3
MIXED = rows("primer", 6) + rows("digest", 6) + rows("riddle", 6)
PLAIN = [dict(prompt=r["prompt"][0]["content"], chosen=" " + r["chosen"][0]["content"], rejected=" " + r["rejected"][0]["content"]) for r in MIXED]


@pytest.fixture(scope="module")
def world():
    S, tok = load_base(load_world())
    return S, perturbed(copy.deepcopy(S)), tok


def trl_trainer(policy, reference, tok, data, folder, max_length=64):
    args = DPOConfig(output_dir=str(folder), beta=BETA, per_device_train_batch_size=len(data), max_length=max_length, gradient_checkpointing=False,
                     bf16=False, fp16=False, disable_dropout=True, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True)
    return DPOTrainer(model=copy.deepcopy(policy), ref_model=copy.deepcopy(reference), args=args, train_dataset=Dataset.from_list(data), processing_class=tok)


def trl_step(trainer, which=None):
    "Loss, metrics and gradients of one batch, by TRL's own collator and loss."
    data = trainer.train_dataset
    batch = trainer.data_collator([data[i] for i in (which or range(len(data)))])
    trainer.model.zero_grad(); trainer.model.train(); trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {k: v[-1] for k, v in trainer._metrics["train"].items()}, {n: p.grad.clone() for n, p in trainer.model.named_parameters()}


def our_step(policy, reference, pairs, token_budget=250, logprobs=response_logprobs):
    "The same through a reference table, accumulated over micro-batches."
    model = trainable(copy.deepcopy(policy))
    table = score_pairs(reference, pairs)
    got = batch_gradients(model, pairs, table, TrainConfig(beta=BETA, precision="fp32", token_budget=token_budget), make_accelerator(), logprobs=logprobs)
    return got["loss"], got, {n: p.grad.clone() for n, p in model.named_parameters()}


def our_pairs(data, tok, max_length=64):
    return list(tokenize_pairs(load_pairs(data), tok, "both", max_length, max_length - 1).pairs)


def ids(pairs): return [tuple(tuple(p[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids")) for p in pairs]


@pytest.mark.parametrize("logprobs", [response_logprobs, packed_logprobs])
@pytest.mark.parametrize("data", [MIXED, PLAIN], ids=["conversational", "plain"])
def test_loss_rewards_and_gradients(world, tmp_path, data, logprobs):
    S, policy, tok = world
    pairs, trainer = our_pairs(data, tok), trl_trainer(policy, S, tok, data, tmp_path)
    assert ids(pairs) == ids(trainer.train_dataset)
    assert len({len(p["prompt_ids"]) for p in pairs}) > 2 and any(len(p["chosen_ids"]) != len(p["rejected_ids"]) for p in pairs)
    loss, theirs, their_grad = trl_step(trainer)
    our_loss, ours, our_grad = our_step(policy, S, pairs, logprobs=logprobs)
    assert abs(theirs["rewards/margins"]) > 0.01 and abs(loss - math.log(2)) > 1e-3, "at zero margin the comparison sees neither beta nor sign"
    for name, a, b in [("loss", our_loss, loss), *((k, ours[m], theirs[k]) for k, m in {"rewards/chosen": "reward_chosen",
                       "rewards/rejected": "reward_rejected", "rewards/margins": "margin", "rewards/accuracies": "reward_accuracy"}.items())]:
        assert abs(a - b) < 1e-4, f"{name}: {a} here, {b} in TRL"
    assert our_grad.keys() == their_grad.keys() and len(our_grad) > 10
    for name, g in their_grad.items():
        assert g.norm() > 0, name
        assert (our_grad[name] - g).norm() <= 1e-4 * g.norm(), f"gradient of {name}"


def test_each_pair_alone(world, tmp_path):
    "Means over a batch could hide two errors that cancel: loss and rewards of single pairs."
    S, policy, tok = world
    pairs, trainer = our_pairs(MIXED, tok), trl_trainer(policy, S, tok, MIXED, tmp_path)
    for i, pair in enumerate(pairs):
        loss, theirs, _ = trl_step(trainer, [i])
        our_loss, ours, _ = our_step(policy, S, [pair])
        got = torch.tensor([our_loss, ours["reward_chosen"], ours["reward_rejected"], ours["reward_accuracy"]])
        assert_close(got, torch.tensor([loss, theirs["rewards/chosen"], theirs["rewards/rejected"], theirs["rewards/accuracies"]]), atol=1e-4, rtol=0)


def test_truncated_responses(world, tmp_path):
    "max_length cuts the tail of the response on both sides."
    S, policy, tok = world
    long = max(len(p["prompt_ids"]) for p in our_pairs(MIXED, tok)) + 2
    pairs, trainer = our_pairs(MIXED, tok, long), trl_trainer(policy, S, tok, MIXED, tmp_path, long)
    kept = [i for i, p in enumerate(ids(trainer.train_dataset)) if p[1][:long - len(p[0])] != p[2][:long - len(p[0])]]   # cut to equality: dropped here
    assert 0 < sum(p["truncated"] for p in pairs) and len(pairs) == len(kept)
    loss, theirs, grad = trl_step(trainer, kept)
    our_loss, ours, our_grad = our_step(policy, S, pairs)
    assert abs(our_loss - loss) < 1e-4 and abs(ours["reward_chosen"] - theirs["rewards/chosen"]) < 1e-4 and abs(ours["reward_rejected"] - theirs["rewards/rejected"]) < 1e-4
    for name, g in grad.items(): assert (our_grad[name] - g).norm() <= 1e-4 * g.norm(), f"gradient of {name}"


def test_ties_count_one_half_here_and_nothing_in_trl(world, tmp_path):
    S, _, tok = world
    loss, theirs, _ = trl_step(trl_trainer(S, S, tok, MIXED, tmp_path))
    pairs = our_pairs(MIXED, tok)
    our_loss, ours, _ = our_step(S, S, pairs, token_budget=4096)
    assert abs(loss - math.log(2)) < 1e-6 and abs(our_loss - math.log(2)) < 1e-4
    model = trainable(copy.deepcopy(S))
    same = score_pairs(model, pairs)     # scored in the training batch's shape: exact ties
    tied = batch_gradients(model, pairs, same, TrainConfig(beta=BETA, precision="fp32"), make_accelerator())
    assert theirs["rewards/accuracies"] == 0.0 and tied["reward_accuracy"] == 0.5 and tied["margin"] == 0.0


def test_what_a_template_writes_after_the_turn(world, tmp_path):
    "A template that writes a blank after the end token (ChatML: a line feed): TRL scores the blank, this package does not."
    S, policy, _ = world
    tok = AutoTokenizer.from_pretrained(load_world().base)
    tok.chat_template = tok.chat_template.replace("<|end|>", "<|end|> ")
    blank = tok.convert_tokens_to_ids(" ")
    trainer, pairs = trl_trainer(policy, S, tok, MIXED, tmp_path), our_pairs(MIXED, tok)
    assert ids(trainer.train_dataset) == [(x, y + (blank,), z + (blank,)) for x, y, z in ids(pairs)]
    assert all(p[1][-1] == p[2][-1] == tok.eos_token_id for p in ids(pairs))
    longer = [p | dict(chosen_ids=[*p["chosen_ids"], blank], rejected_ids=[*p["rejected_ids"], blank]) for p in pairs]
    loss = trl_step(trainer)[0]
    assert abs(our_step(policy, S, pairs)[0] - loss) > 1e-4 and abs(our_step(policy, S, longer)[0] - loss) < 1e-4


# The original DPO code, in its own order of operations: two log-ratios between the responses, their difference, a smoothed logistic loss.
def original_dpo(pi_w, pi_l, ref_w, ref_l, beta, eps):
    h = (pi_w - pi_l) - (ref_w - ref_l)
    losses = -(1 - eps) * F.logsigmoid(beta * h) - eps * F.logsigmoid(-beta * h)
    return losses, beta * (pi_w - ref_w), beta * (pi_l - ref_l)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0, 5.0])
def test_the_original_formula(beta, eps):
    g = torch.Generator().manual_seed(1)
    theirs = [(-40 * torch.rand(200, generator=g, dtype=torch.float64)).requires_grad_() for _ in range(4)]
    ours = [x.detach().clone().requires_grad_() for x in theirs]
    losses, up, down = original_dpo(*theirs, beta, eps)
    w, l, rw, rl = ours
    mine = dpo_loss(w - l, rw - rl, beta, eps)
    assert_close(mine, losses); assert_close(reward(w, rw, beta), up); assert_close(reward(l, rl, beta), down)
    losses.mean().backward(); mine.mean().backward()
    for a, b in zip(ours, theirs): assert_close(a.grad, b.grad)
    assert losses.std() > 0.1 and (eps == 0 or not torch.allclose(losses, original_dpo(*theirs, beta, 0)[0]))
