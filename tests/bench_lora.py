"""What do adapters save? `make bench-lora` writes data/results/lora.json, which chapter 09 shows.

Full training and adapters of rank 16 on all linear layers, on the real SmolLM2-135M-Instruct. Memory and whole runs: a fresh process each. Seconds of a step: both sides in one process, step by step in turn, the same batches.
The model and the data are looked for in SDPO_MODEL and SDPO_DATA.

    python tests/bench_lora.py all           everything, but what is in the file already; timings want an otherwise idle machine
    python tests/bench_lora.py whole SIDE    a run of two stages in this process: peak memory, first losses, bytes on disk; of adapters, what PEFT's own loading answers. SIDE: full or lora
    python tests/bench_lora.py plan SIDE     peak memory, in GiB beyond the process itself, of two training steps, beside what chapter 06 plans
    python tests/bench_lora.py larger SIDE   what chapter 06 plans for 1.2 billion parameters, and the tokens that fit on a T4
    python tests/bench_lora.py steps         seconds of a step, both sides in turn
    python tests/bench_lora.py resumed       a run of adapters that is killed in its second stage and goes on: the hashes of its models
"""
import json, os, resource, shutil, signal, statistics, subprocess, sys, tempfile, time
os.environ.setdefault("OMP_WAIT_POLICY", "passive"); os.environ.setdefault("HF_HUB_OFFLINE", "1")
from importlib.metadata import version
from pathlib import Path

import torch

from transformers import LlamaConfig

from sdpo_nb.logprobs import load_config, load_model, load_tokenizer, score_pairs
from sdpo_nb.lora import add_adapter, lora_config
from sdpo_nb.packing import packed_logprobs
from sdpo_nb.plan import StepwiseConfig
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.trainer import TrainConfig, Trainer, make_accelerator, make_optimizer, memory_plan, return_large_blocks, tokens_that_fit, trainable

MODEL = os.path.expanduser(os.environ.get("SDPO_MODEL", "~/.cache/sdpo_nb/smollm2-135m-instruct"))
DATA = Path(os.environ.get("SDPO_DATA", Path(__file__).parents[2] / "shared/data")).resolve() / "preferences"
RESULTS = Path(__file__).parents[1] / "data/results/lora.json"
SIDES = dict(full={}, lora=dict(lora_r=16))
PAIRS, BATCH, LENGTH, ROW = 4, 1, 160, 2048
SOURCES = "hh_harmless", "ultrafeedback_binarized"
GIB = 2**30
torch.set_num_threads(1)


def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def resident(): return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
def size(folder): return sum(p.stat().st_size for p in Path(folder).rglob("*.safetensors"))
def settings(side): return StepwiseConfig(lr=5e-6 if side == "full" else 1e-4, batch_size=BATCH, precision="fp32", max_length=LENGTH, save_every=1, **SIDES[side])
def sources(): return {name: dict(source=str(DATA / f"{name}.jsonl.gz"), chat=True, max_pairs=PAIRS) for name in SOURCES}


def whole(side):
    "One run, and what it left."
    from sdpo_nb.stepwise import sdpo
    checkpoints = []
    def look(row):
        if row["step"] == 2: checkpoints.append((folder / f"stage-{row['stage']}/checkpoint/state.pt").stat().st_size)
    folder = Path(tempfile.mkdtemp()) / "run"
    run = sdpo(MODEL, sources(), settings(side), folder, on_step=look)
    found = dict(peak_gib=peak() / GIB, first_loss=[s["first_loss"] for s in run.stages], gamma_change=[s["gamma_change"] for s in run.stages], end=[s["end"] for s in run.stages],
                 model_mb=[size(run.model_folder(t)) / 1e6 for t in (1, 2)], checkpoint_mb=checkpoints[0] / 1e6, seconds=[json.loads((folder / f"stage-{t}/cost.json").read_text())["seconds"] for t in (1, 2)])
    if side != "full": found |= reloaded(run)
    shutil.rmtree(folder.parent)
    return found

def reloaded(run):
    "PEFT loads the adapter of the last stage onto S: are its logits, and what it answers, those of run.model?"
    from peft import PeftModel
    S, tok = load_model(MODEL, "cpu"), load_tokenizer(MODEL)
    theirs, ours = PeftModel.from_pretrained(S, run.model_folder()).eval(), run.model
    asked = [tok.apply_chat_template([dict(role="user", content=text)], add_generation_prompt=True, return_tensors="pt", return_dict=True)
             for text in ("What is the capital of France?", "Write one sentence about the sea.", "How do I boil an egg?")]
    off, same = 0, 0
    with torch.no_grad():
        for one in asked:
            a, b = (m(**one).logits for m in (theirs, ours))
            off = max(off, (a - b).abs().max().item())
            x, y = (m.generate(**one, max_new_tokens=32, do_sample=False)[0].tolist() for m in (theirs, ours))
            same += x == y
    return dict(logits_off=off, same_answers=same, asked=len(asked))

def plan(side):
    "Two steps of one full forward pass of ROW tokens each, in this fresh process."
    config = settings(side)
    shape, train = load_config(MODEL), TrainConfig(token_budget=ROW)
    planned = memory_plan(shape, train, "fp32", lora=lora_config(config))
    before = resident()
    model = load_model(MODEL, "cpu")
    if config.lora_r: add_adapter(model, config)
    trainer, batch = trainer_of(model, train), row_of(ROW)
    return_large_blocks()
    for _ in range(2):
        chosen, rejected = packed_logprobs(model, batch)
        (chosen - rejected).sum().backward()
        trainer.update({}, 1e-6)
    return dict(planned=sum(planned.values()), measured=(peak() - before) / GIB, parts=planned)

def larger(side):
    "The shape of a model of 1.2 billion parameters; nothing is run."
    shape = LlamaConfig(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True)
    lora = lora_config(settings(side))
    return dict(parts=memory_plan(shape, TrainConfig(token_budget=ROW), "fp32", lora=lora), on_a_T4=tokens_that_fit(shape, 15 * GIB, "fp16", "padded", True, lora))

def row_of(tokens):
    g = torch.Generator().manual_seed(0)
    def ids(n): return torch.randint(100, 30000, (n,), generator=g).tolist()
    return [dict(key=str(i), prompt_ids=ids(256), chosen_ids=ids(128), rejected_ids=ids(128)) for i in range(tokens // 512)]

def trainer_of(model, train):
    model = trainable(model)
    return Trainer(model, None, train, make_accelerator("fp32", "cpu"), make_optimizer(model, train), "fp32", packed_logprobs)

def steps(n=6):
    "Forward, backward, clip, step: in turn, on the same batches."
    tok, train = load_tokenizer(MODEL), TrainConfig(lr=1e-6)
    pairs = tokenize_pairs(load_pairs(DATA / "ultrafeedback_binarized.jsonl.gz").select(range(BATCH * n + 24)), tok, "uf", LENGTH, LENGTH // 2, chat=True).pairs
    pairs = [pairs[i] for i in range(BATCH * (n + 1))]
    S = load_model(MODEL, "cpu")
    table = score_pairs(S, pairs, logprobs=packed_logprobs)
    adapted = add_adapter(load_model(MODEL, "cpu"), settings("lora"))
    sides = dict(full=trainer_of(S, train), lora=trainer_of(adapted, train))
    for side in sides.values(): side.table = table
    return_large_blocks()
    took = dict(full=[], lora=[])
    for i in range(n + 1):                                         # the first one warms up
        batch = pairs[BATCH*i:BATCH*(i+1)]
        for name in list(sides) if i % 2 else list(sides)[::-1]:
            start = time.perf_counter()
            sides[name].update(sides[name].gradients(batch), 1e-6)
            if i: took[name].append(time.perf_counter() - start)
    ratios = sorted(l / f for f, l in zip(took["full"], took["lora"]))
    return dict(seconds={name: statistics.median(t) for name, t in took.items()}, ratio=statistics.median(ratios), ratios=ratios)

def resumed():
    "Signal 9 in the second step of stage 2; the same call again."
    from sdpo_nb.stepwise import sdpo
    folder = Path(tempfile.mkdtemp()) / "run"
    program = "import os, signal, sys; sys.path.insert(0, 'tests'); import bench_lora as b\n" \
              "def out(row):\n    if row['stage'] == 2 and row['step'] == 2: os.kill(os.getpid(), signal.SIGKILL)\n" \
              "from sdpo_nb.stepwise import sdpo; sdpo(b.MODEL, b.sources(), b.settings('lora'), sys.argv[1], on_step=out)"
    died = subprocess.run([sys.executable, "-c", program, str(folder)], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    run = sdpo(MODEL, sources(), settings("lora"), folder)
    found = dict(end=[s["end"] for s in run.stages])
    shutil.rmtree(folder.parent)
    return found


def everything():
    "Each measurement in a process of its own; what is in the file stays."
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found["versions"] = {p: version(p) for p in ("torch", "transformers", "peft")} | dict(threads=torch.get_num_threads(), cpu=torch.backends.cpu.get_cpu_capability())
    found["asked"] = dict(pairs=PAIRS, sources=list(SOURCES), batch=BATCH, max_length=LENGTH, r=16)
    for words in (("plan", "full"), ("plan", "lora"), ("larger", "full"), ("larger", "lora"), ("whole", "lora"), ("steps",), ("resumed",), ("whole", "full")):
        name = " ".join(words)
        if name in found: continue
        out = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
        if out.returncode: sys.exit(f"{name}: {out.stderr[-3000:]}")
        found[name] = json.loads(out.stdout.splitlines()[-1])
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(name, flush=True)


if __name__ == "__main__":
    verb, *rest = sys.argv[1:] or ["help"]
    if verb == "all": everything()
    elif verb in ("whole", "plan", "larger", "steps", "resumed"): print(json.dumps(globals()[verb](*rest)))
    else: sys.exit(__doc__)
