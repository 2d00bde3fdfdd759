"""How fast is chapter 04? `make bench` writes data/results/packing.json, which the chapter and the README show.

Everything is measured side by side: in one process, step by step in turn, the same pairs, model, optimizer and batch of 8 pairs. A step is forward, backward, clipping and
AdamW. TRL's rows use its own collator, training step and a precomputed reference. "Compiled" rows have compiled layers (chapter 04), ours and TRL's alike, each in a model of its own. All sides first run one step; the best micro-batch of the padded path and the best row
of TRL then go on, with packing, to the 12 measured steps; micro-batch 8 of each, far slower, goes along for the first few, as the table says. Reference passes are timed on the first batches only, operations counted on the first. Memory: one step in a fresh process. The model and the data are looked for in SDPO_MODEL and SDPO_DATA.

    python tests/bench_packing.py all [SOURCE ...]         everything, or these sources, but what is in the file already; timings want an otherwise idle machine
    python tests/bench_packing.py time SOURCE PRECISION    one table of times
    python tests/bench_packing.py memory SIDE SOURCE       peak memory, in GiB, of one step in this process
    python tests/bench_packing.py vocabulary V             memory that log-probabilities add, in MiB, for a model of V tokens (random, hidden size 576)
    python tests/bench_packing.py pairs N                  peak memory, in GiB, of loading and tokenising N pairs and scoring 16 of them
    python tests/bench_packing.py plan SHAPE TOKENS PRECISION RECOMPUTE   peak memory, in GiB beyond the process itself, of training steps of a random model, beside what chapter 06 plans
    python tests/bench_packing.py whole SIDE               a run of two stages, 32 HH and 32 ultrafeedback pairs: seconds, peak memory, losses
    python tests/bench_packing.py show                     the results, as tables
"""
import json, os, platform, resource, shutil, subprocess, sys, tempfile, time
os.environ.setdefault("OMP_WAIT_POLICY", "passive"); os.environ.setdefault("HF_HUB_OFFLINE", "1")
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench_first_look import processor
from sdpo_nb.logprobs import autocast, load_model, load_tokenizer, micro_batches, pick_precision, response_logprobs, score_pairs
from sdpo_nb.packing import choose_logprobs, compile_layers, packed_logprobs
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.timed import made_by
from sdpo_nb.trainer import USUAL_BUDGET, TrainConfig, activation_checkpointing, batch_gradients, make_accelerator, return_large_blocks

MODEL = Path(os.environ.get("SDPO_MODEL", "~/.cache/sdpo_nb/smollm2-135m-instruct")).expanduser()
DATA = Path(os.environ.get("SDPO_DATA", Path(__file__).parents[2] / "shared/data")).resolve() / "preferences"
RESULTS = Path(__file__).parents[1] / "data/results/packing.json"
SOURCES = {"hh_harmless": 384, "ultrafeedback_binarized": 256} # longest prompt; rows are cut at 512
BATCH, STEPS, BETA = 8, int(os.environ.get("STEPS", 12)), 0.1
SIZES = [n for n in (1, 2, 4, 8) if n <= int(os.environ.get("MOST", 8))] # of micro-batches; with MOST=4 a table of times fits into 16 GiB, with 8 it wants 32 for UltraFeedback


def load(source, steps=STEPS):
    model, tok = load_model(str(MODEL), "cpu"), load_tokenizer(str(MODEL))
    pairs = tokenize_pairs(load_pairs(DATA / f"{source}.jsonl.gz").select(range(BATCH * steps + 16)), tok, source, 512, SOURCES[source], chat=True).pairs
    pairs = [pairs[i] for i in range(BATCH * steps)]
    assert len(pairs) == BATCH * steps
    return model, tok, pairs, [pairs[i:i+BATCH] for i in range(0, len(pairs), BATCH)]


def optimizer_of(model): return torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)


class Ours:
    "Chapter 06's gradients, packed or padded; forward passes by a budget in what `logprobs.tokens` counts."
    def __init__(self, model, table, accelerator, precision, logprobs, budget, checkpointing=False):
        self.model, self.table, self.accelerator, self.precision, self.logprobs, self.checkpointing = model, table, accelerator, precision, logprobs, checkpointing
        self.config = TrainConfig(beta=BETA, token_budget=budget)
    def gradients(self, batch):
        return_large_blocks()                            # as a stage does
        activation_checkpointing(self.model.train(), self.checkpointing)
        batch_gradients(self.model, batch, self.table, self.config, self.accelerator, self.precision, self.logprobs)
    def reference(self, batch):
        self.model.eval()
        with torch.no_grad(), autocast("cpu", self.precision):
            for part in micro_batches(batch, self.config.token_budget, self.logprobs): self.logprobs(self.model, part)


class TRL:
    "DPOTrainer, with a precomputed reference."
    def __init__(self, trainer, table, size, checkpointing):
        self.trainer, self.model, self.table, self.size, self.checkpointing = trainer, trainer.model, table, size, checkpointing
    def inputs(self, batch):
        for i in range(0, len(batch), self.size):
            part = batch[i:i+self.size]
            c, r = self.table.lookup(part)
            yield self.trainer.data_collator([{k: list(p[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids")} | dict(ref_chosen_logps=a.item(), ref_rejected_logps=b.item())
                                              for p, a, b in zip(part, c, r)])
    def gradients(self, batch):
        return_large_blocks(32 * 2**20)                  # glibc's own limit
        if self.checkpointing: self.model.gradient_checkpointing_enable(dict(use_reentrant=False))
        else: self.model.gradient_checkpointing_disable()
        self.trainer.current_gradient_accumulation_steps = len(batch) // self.size
        for inputs in self.inputs(batch): self.trainer.training_step(self.model, inputs, None)
    def reference(self, batch):
        for inputs in self.inputs(batch): self.trainer.compute_ref_log_probs(self.model, inputs)


def trl_trainer(model, tok, precision):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    args = DPOConfig(output_dir=tempfile.mkdtemp(), beta=BETA, max_length=512, bf16=precision == "bf16", fp16=False, use_cpu=True, report_to="none", disable_tqdm=True,
                     per_device_train_batch_size=1, precompute_ref_log_probs=True, save_strategy="no")
    rows = [dict(prompt=[dict(role="user", content="Hi")], chosen=[dict(role="assistant", content="Hello.")], rejected=[dict(role="assistant", content="No.")])]
    trainer = DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tok)
    trainer.model = trainer.accelerator.prepare_model(trainer.model)      # as `train` does; without it there is no autocast, and bf16=True computes in fp32
    return trainer


def by_pairs(logprobs): # the same function, its budget counted in pairs
    def counted(model, pairs): return logprobs(model, pairs)
    counted.tokens = len
    return counted


def step(side, optimizer, batch):
    side.gradients(batch)
    torch.nn.utils.clip_grad_norm_(side.model.parameters(), 1.0)
    optimizer.step(); optimizer.zero_grad()


def timed(f, *args):
    start = time.perf_counter(); f(*args)
    return time.perf_counter() - start


def flops(f, *args):
    with FlopCounterMode(display=False) as counter: f(*args)
    return counter.get_total_flops() / BATCH


def made(): # on what, when, from which code
    by = made_by("cpu")
    by["versions"] |= {p: version(p) for p in ("trl", "accelerate")}
    return by | dict(processor=processor(torch.device("cpu")), cores=os.cpu_count(), date=time.strftime("%Y-%m-%d"))


def matmul_peak(precision): # FLOP/s of the best of a few square products
    a, b = torch.randn(2, 2048, 2048, dtype=getattr(torch, dict(fp32="float32", bf16="bfloat16")[precision]))
    return max(2 * 2048**3 / timed(torch.mm, a, b) for _ in range(8))


def interval(ratios, draws=2000): # of the median, by bootstrap over steps
    g = np.random.default_rng(0)
    return [float(np.median(ratios))] + np.quantile([np.median(g.choice(ratios, len(ratios))) for _ in range(draws)], [0.025, 0.975]).tolist()


def measure(source, precision):
    torch.manual_seed(0)
    model, tok, pairs, batches = load(source)
    assert choose_logprobs(model, batches[0]) is packed_logprobs
    table = score_pairs(model, pairs, precision=precision, logprobs=packed_logprobs, token_budget=USUAL_BUDGET)
    accelerator = make_accelerator(precision)
    theirs, theirs_compiled = (trl_trainer(load_model(str(MODEL), "cpu"), tok, precision) for _ in range(2))
    ours_compiled = load_model(str(MODEL), "cpu")
    for m in (ours_compiled, theirs_compiled.model):
        why = compile_layers(m, packed_logprobs, precision)
        assert why is None, why
    optimizers = {id(m): optimizer_of(m) for m in (model, ours_compiled, theirs.model, theirs_compiled.model)}
    sides = {"packed": Ours(model, table, accelerator, precision, packed_logprobs, USUAL_BUDGET)}
    sides["packed, compiled"] = Ours(ours_compiled, table, accelerator, precision, packed_logprobs, USUAL_BUDGET)
    sides |= {f"padded, {n}": Ours(model, table, accelerator, precision, by_pairs(response_logprobs), n) for n in SIZES}
    sides |= {f"TRL, {n}{', checkpointing' if c else ''}": TRL(theirs, table, n, c) for c in (False, True) for n in SIZES}
    sides |= {f"compiled TRL, {n}": TRL(theirs_compiled, table, n, False) for n in (1, 2)}
    run = lambda name, batch: timed(step, sides[name], optimizers[id(sides[name].model)], batch)
    for name in ("packed", "packed, compiled", "TRL, 1", "compiled TRL, 1", "compiled TRL, 2"): run(name, batches[0]) # first steps are slow
    screen = {name: run(name, batches[1]) for name in sides}
    print(source, precision, {k: round(v, 1) for k, v in screen.items()}, file=sys.stderr, flush=True)
    best = lambda start: min((n for n in sides if n.startswith(start)), key=screen.get)
    to_the_end = ["packed", "packed, compiled", best("padded"), best("TRL"), best("compiled TRL")]
    chosen = list(dict.fromkeys([*to_the_end, f"padded, {SIZES[-1]}", f"TRL, {SIZES[-1]}, checkpointing"]))
    seconds, reference, peak = {n: [] for n in chosen}, {n: [] for n in chosen}, []
    for i, batch in enumerate(batches):
        peak.append(matmul_peak(precision))
        now = [n for n in chosen if i < 2 or n in to_the_end]
        for name in now: seconds[name].append(run(name, batch))
        for name in now if i < 4 else []: reference[name].append(timed(sides[name].reference, batch))
        print(source, precision, {n: round(t[-1], 1) for n, t in seconds.items()}, f"{peak[-1] / 1e9:.0f} GFLOP/s", file=sys.stderr, flush=True)
    work = {n: flops(sides[n].gradients, batches[0]) for n in chosen}
    for s in optimizers.values(): s.zero_grad()
    def over(times, n, whom="packed"): return np.divide(times[n], times[whom][:len(times[n])])
    rows = {n: dict(steps=len(seconds[n]), step=float(np.median(seconds[n])), reference=float(np.median(reference[n])), gflop_per_pair=work[n] / 1e9,
                    slower=interval(over(seconds, n)), slower_than_compiled=interval(over(seconds, n, "packed, compiled")), reference_slower=interval(over(reference, n)),
                    of_peak=work[n] * BATCH / seconds[n][0] / peak[0]) for n in chosen}
    return dict(made=made(), screen=screen, rows=rows, best_padded=best("padded"), best_trl=best("TRL"), best_compiled_trl=best("compiled TRL"), matmul_gflops=float(np.median(peak)) / 1e9,
                pairs=len(pairs), tokens_per_pair=float(np.mean([packed_logprobs.tokens([p]) for p in pairs])))


def memory(side, source):
    "Peak memory of one step, the first of this process."
    kind, size, *c = side.split(", ")
    model, tok, pairs, batches = load(source, 2)
    precision, table = "fp32", score_pairs(model, pairs, logprobs=packed_logprobs, token_budget=1024)
    if kind == "TRL": s = TRL(trl_trainer(model, tok, precision), table, int(size), bool(c))
    else: s = Ours(model, table, make_accelerator(), precision, by_pairs({"packed": packed_logprobs, "padded": response_logprobs}[kind]), int(size), bool(c))
    longest = sorted(pairs, key=lambda p: -packed_logprobs.tokens([p]))[:BATCH]
    step(s, optimizer_of(model), longest)
    return peak_resident()


def resident(): # GiB, now
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30

def peak_resident(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 # GiB


def added(f): # MiB that f needs for a while, beyond what is resident before
    Path("/proc/self/clear_refs").write_text("5")                       # the peak starts anew
    before = resident(); f()
    return (next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 2**20 - before) * 1024


def vocabulary(size):
    "What 4 pairs of 128 + 2 x 128 tokens add to weights and gradients, for a vocabulary of this size: log-probabilities alone (score), and with their gradient (step)."
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=int(size), hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True))
    pairs = [dict(key=str(i), prompt_ids=[1] * 128, chosen_ids=[2] * 128, rejected_ids=[3] * 128) for i in range(4)]
    def step(f): c, r = f(model, pairs); (c - r).sum().backward()
    step(lambda m, pairs: packed_logprobs(m, pairs[:1]))                # gradients exist from here on
    out = dict(one_weight_matrix=model.get_output_embeddings().weight.numel() / 2**18)
    for name, f in (("packed", packed_logprobs), ("padded", response_logprobs)):
        with torch.no_grad(): out[f"{name}, score"] = added(lambda: f(model, pairs))
        out[f"{name}, step"] = added(lambda: step(f))
    return out


def shape(name): # of a model with random weights
    from transformers import GPT2Config, LlamaConfig
    if name == "gpt2": return GPT2Config()
    if name == "smol": return LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    return LlamaConfig(vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=8)

PLANS = [("smol", 2048, "fp32", 0), ("smol", 2048, "bf16", 0), ("smol", 4096, "fp32", 1), ("gpt2", 2048, "fp32", 0), ("wide", 2048, "bf16", 1), ("wide", 4096, "fp32", 0)]

def plan(name, tokens, precision, recompute):
    "Two optimizer steps of one full forward pass each, in this fresh process."
    from transformers import AutoModelForCausalLM
    from sdpo_nb.logprobs import LogprobTable
    from sdpo_nb.trainer import make_optimizer, memory_plan, trainable
    import pandas as pd
    config, settings = shape(name), TrainConfig(token_budget=int(tokens), gradient_checkpointing=recompute == "1")
    planned = memory_plan(config, settings, precision)
    before, accelerator, g = resident(), make_accelerator(precision, "cpu"), torch.Generator().manual_seed(0)
    model = trainable(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    activation_checkpointing(model, settings.gradient_checkpointing)
    return_large_blocks()
    def ids(low, high): return torch.randint(0, 30000, (int(torch.randint(low, high, (1,), generator=g)),), generator=g).tolist()
    pairs, room = [], int(tokens)
    while room:                                  # the row is full to the last token
        last = room <= 900
        prompt, *sides = [[1] * (room - 2 * (room // 4)), *[[2] * (room // 4)] * 2] if last else [ids(60, 300), ids(60, 200), ids(60, 200)]
        pairs.append(dict(key=str(len(pairs)), prompt_ids=prompt, chosen_ids=sides[0], rejected_ids=sides[1]))
        room -= packed_logprobs.tokens(pairs[-1:])
    table = LogprobTable({}, pd.DataFrame(-500.0, [p["key"] for p in pairs], ["chosen", "rejected"], "float32"))
    optimizer = make_optimizer(model, settings)
    for _ in range(2):
        batch_gradients(model, pairs, table, settings, accelerator, precision, packed_logprobs)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(); optimizer.zero_grad()
    return dict(planned=sum(planned.values()), measured=peak_resident() - before)


def many_pairs(n):
    "Peak memory of a source of n pairs, tokenised whole and scored in part."
    n, folder = int(n), Path(tempfile.mkdtemp())
    with open(folder / "pairs.jsonl", "w") as f:
        for i in range(n): f.write(json.dumps(dict(prompt=f"What comes after the number {i}?", chosen=f"The number {i + 1} comes after it.", rejected="No number does.")) + "\n")
    os.environ["HF_DATASETS_CACHE"] = str(folder)
    import datasets; datasets.config.HF_DATASETS_CACHE = folder
    model, tok = load_model(str(MODEL), "cpu"), load_tokenizer(str(MODEL))
    source = tokenize_pairs(load_pairs(folder / "pairs.jsonl"), tok, "many", 512, 256, chat=True)
    score_pairs(model, source.pairs.select(range(n // 2, n // 2 + 16)), logprobs=packed_logprobs)
    shutil.rmtree(folder)
    return dict(pairs=len(source), gib=peak_resident())


WHOLE = dict(lr=1e-5, beta=BETA, batch_size=BATCH)

def whole(side):
    "Two stages by `sdpo`, packed or padded, or by hand with TRL; everything from loading the model to the last file counts."
    start, folder = time.perf_counter(), Path(tempfile.mkdtemp())
    raw = {s: load_pairs(DATA / f"{s}.jsonl.gz").select(range(32)) for s in SOURCES}
    if side in ("packed", "padded"):
        from sdpo_nb.stepwise import StepwiseConfig, sdpo
        config = StepwiseConfig(order="as_given", max_length=512, max_prompt_length=384, probe=8, precision="fp32", packing="auto" if side == "packed" else "off", **WHOLE)
        run = sdpo(str(MODEL), {s: dict(source=rows, chat=True) for s, rows in raw.items()}, config, folder)
        losses = run.metrics["loss"].tolist()
    else: losses = by_hand(raw, folder, int(side.split(", ")[1]), "checkpointing" in side)
    shutil.rmtree(folder)
    return dict(made=made(), seconds=time.perf_counter() - start, gib=peak_resident(), losses=losses)


def by_hand(raw, folder, size, checkpointing):
    "The same with TRL: a trainer for each stage, its reference precomputed from the model that comes in."
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    where, losses = str(MODEL), []
    for t, rows in enumerate(raw.values()):
        model, tok = load_model(where, "cpu"), load_tokenizer(where)
        data = tokenize_pairs(rows, tok, str(t), 512, 384, chat=True)        # the pairs that the other sides use; TRL cuts them again
        texts = Dataset.from_list([{k: tok.decode(p[f"{k}_ids"]) for k in ("prompt", "chosen", "rejected")} for p in data.pairs])
        args = DPOConfig(output_dir=str(folder / str(t)), beta=BETA, learning_rate=WHOLE["lr"], max_length=512, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, num_train_epochs=1,
                         per_device_train_batch_size=size, gradient_accumulation_steps=BATCH // size, gradient_checkpointing=checkpointing, precompute_ref_log_probs=True, weight_decay=0.0,
                         precompute_ref_batch_size=size, lr_scheduler_type="linear", warmup_steps=1, logging_steps=1, save_strategy="no")
        trainer = DPOTrainer(model=model, args=args, train_dataset=texts, processing_class=tok)
        trainer.train()
        where = str(folder / f"model-{t}"); trainer.save_model(where); tok.save_pretrained(where)
        losses += [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return losses


def fresh(*words): # a verb in a process of its own; what it prints last
    out = subprocess.run([sys.executable, __file__, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def all_of_it(*sources):
    RESULTS.parent.mkdir(exist_ok=True)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    def keep(name, make, *args): # what is there already is not measured again
        if name in found: return
        found[name] = make(*args); RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    keep("made", lambda: dict(command="make bench", seed=0, model=MODEL.name, python=platform.python_version()) | made())
    precisions = dict.fromkeys(["fp32", pick_precision("auto", "cpu")])
    for source in sources or SOURCES:
        for p in precisions: keep(f"{source} {p}", fresh, "time", source, p)
    sides = [f"{kind}, {n}{c}" for n in (2, 8) for kind, c in (("packed", ""), ("padded", ""), ("TRL", ""), ("packed", ", checkpointing"), ("TRL", ", checkpointing"))]
    keep("memory_gib", lambda: {s: fresh("memory", s, "hh_harmless") for s in sides})
    keep("plan_gib", lambda: {" ".join(map(str, p)): fresh("plan", *p) for p in PLANS})
    keep("vocabulary_mib", lambda: {v: fresh("vocabulary", v) for v in (49_152, 262_144)})
    keep("pairs_gib", lambda: {n: fresh("pairs", n)["gib"] for n in (1_000, 1_000_000)})
    for side in ("packed", "padded", found["hh_harmless fp32"]["best_trl"]): keep(f"whole {side}", fresh, "whole", side)


def show():
    "The results, as tables."
    import pandas as pd
    ratio, found = "{:.2f} [{:.2f}, {:.2f}]".format, json.loads(RESULTS.read_text())
    for name, v in found.items():
        if not isinstance(v, dict) or "rows" not in v: continue
        print(f"\n{name}: {v['pairs']} pairs of {v['tokens_per_pair']:.0f} packed tokens, matmul {v['matmul_gflops']:.0f} GFLOP/s")
        print(pd.DataFrame({side: {"steps": r["steps"], "s/step": round(r["step"], 1), "slower than packed": ratio(*r["slower"]), "reference pass, slower": ratio(*r["reference_slower"]),
                                   "GFLOP/pair": round(r["gflop_per_pair"]), "of matmul peak": f"{r['of_peak']:.0%}"} for side, r in v["rows"].items()}).T.to_string())
    if "memory_gib" in found: print("\npeak memory, GiB\n" + pd.Series(found["memory_gib"]).round(1).to_string())
    for name in ("vocabulary_mib", "pairs_gib"):
        if name in found: print(f"\n{name}\n{pd.DataFrame(found[name]).round(0) if name == 'vocabulary_mib' else pd.Series(found[name]).round(2)}")
    whole = {name: dict(seconds=v["seconds"], gib=v["gib"], losses=" ".join(f"{x:.4f}" for x in v["losses"])) for name, v in found.items() if name.startswith("whole")}
    if whole: print("\n" + pd.DataFrame(whole).T.to_string())


if __name__ == "__main__":
    verb, *rest = sys.argv[1:] or ["all"]
    if verb == "all": all_of_it(*rest)
    elif verb == "time": print(json.dumps(measure(*rest)))
    elif verb in (one := dict(memory=memory, vocabulary=vocabulary, pairs=many_pairs, whole=whole, plan=plan)): print(json.dumps(one[verb](*rest)))
    elif verb == "show": show()
    else: sys.exit(__doc__)
