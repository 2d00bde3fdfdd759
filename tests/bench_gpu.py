"""How fast is one graphics card? `make bench-gpu` writes data/results/gpu.json: optimizer steps of this package beside TRL's DPOTrainer, in at most eight minutes.

Needed: the package, TRL, one card and a small file of token ids. No model, no tokenizer and no network: weights are random, in the shape of a real model.

    python tests/bench_gpu.py prepare [FILE]   where tokenizer and data are (SDPO_MODEL, SDPO_DATA): writes runs/gpu_ids.parquet, 1.3 MiB, in ten seconds; needs no card
    python tests/bench_gpu.py all [FILE]       on the card; SDPO_RESULTS names another file for the results, SDPO_COMMIT the commit where there is no git
    python tests/bench_gpu.py dry [FILE [N]]   the same path on a CPU, in two or three minutes: a tiny model, few pairs, random ids where FILE is missing; the first N settings, if not both; results in a temporary file or SDPO_RESULTS
    python tests/bench_gpu.py show [RESULTS]   the results, as tables

On an H200 it took 249 s of 465: HH on 135M 88 s, UltraFeedback on 135M 59 s, on 1.2B 82 s. Since then a row of TRL with compiled layers has come, and the strict form of the same bits is compiled
for itself: some 20 s more in each are expected, not measured yet. Rows are printed and stored as they come. What does not fit is stored as "skipped: time": optional rows (TRL compiled, checkpointing,
and the same bits without compiling) past their setting's share, and any row that would leave later settings less than 70 % of theirs. A row that gets slow times fewer steps.

What is compared. A step is plan or collator, copies to the card, forward, backward, clipping and fused AdamW on 32 pairs, from lists of ids; fp32 weights, bf16 autocast.
The reference is precomputed on both sides: uniform over the vocabulary, -n ln V, so that no pair is scored before its turn. TRL runs as its `train` runs it: the model is prepared by
its Accelerator (without that there is no autocast), its own collator and training step; its metrics are part of it. Our token budget is the one that a run would choose from the card's memory
("budget"; one set by hand is not measured). "TRL, 32, compiled" has layers compiled as ours are; "x TRL" goes by the best of TRL's other rows, which is what its users have.
Batches: pairs are sorted by length, and every batch gets one of each stratum. So all batches have nearly the same tokens, but other lengths: each timed step's batch is new to its side.
Sides take disjoint batches until all pairs are used; then pairs are dealt anew into other batches (`dealt` counts that; optional rows come last). Shared by all sides are the weights, which every
row has anew, and the warm-up batch, whose loss before any step ("loss") shows that all sides compute the same; and two batches of the reference pass, the first untimed. Micro-batches of other
sizes are other shapes: no plan of cuDNN is inherited.
"Useful" work is 6 x parameters x packed tokens, for TRL too; rows are compared by tokens a second. "first" is the warm-up step, "new" the first timed one, "plan" what is made on the host;
"compile" is cold in the first row of a new machine, later rows find the compiler's files; "again" counts recompilations, whose phases and reasons are stored ("compiler", "recompiled"), and said below a row.
One is known: where tokens x hidden size pass 5 x 2^20, Inductor wants other kernels (mix-order reductions; 9,103 tokens of 135M, 2,560 of 1.2B), and `compile_layers` tries a row of 151.
"Same bits" asks whether a gradient comes out alike twice. Rows named so run in the strict form where the model can bear it, as a stage does; else "why_not_strict" says which operation has none.
GiB is the peak of a step, weights included.
CUBLAS_WORKSPACE_CONFIG is set throughout: on an H100 it is what PyTorch takes anyway.
"""
import contextlib, gc, json, logging, math, os, re, signal, subprocess, sys, tempfile, time, traceback, warnings
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ |= dict(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
BEGAN = time.perf_counter()
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch._dynamo.utils import compile_times, counters
from transformers import LlamaConfig, LlamaForCausalLM

from sdpo_nb.logprobs import LogprobTable, autocast, pick_precision, prepared, response_logprobs, same_bits, write_json
from sdpo_nb.packing import choose_logprobs, compile_layers, packed_logprobs, packed_tokens
from sdpo_nb.trainer import USUAL_BUDGET, TrainConfig, activation_checkpointing, batch_gradients, cut, fit, make_accelerator, trainable, why_not_same_bits

SECONDS = 465                                            # for everything, so that eight minutes hold the start of Python, too
ROW_SECONDS = 60                                         # for one row: after half of them no further step is timed, after all of them it is given up
SEED, BETA, LR, CLIP = 0, 0.1, 1e-6, 1.0
HERE = Path(__file__).resolve().parents[1]
IDS = HERE / "runs/gpu_ids.parquet"
RESULTS = Path(os.environ.get("SDPO_RESULTS", HERE / "data/results/gpu.json"))
SOURCES = {"hh_harmless": (1100, 384), "ultrafeedback_binarized": (1000, 256)} # pairs, longest prompt; rows are cut at 512
GIB = 2**30
warnings.filterwarnings("ignore", category=FutureWarning) # transformers renames its settings

SHAPES = {
    "135M": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                 max_position_embeddings=8192, initializer_range=0.041666, rope_parameters=dict(rope_type="default", rope_theta=100_000.)), # SmolLM2-135M
    "1.2B": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
                 max_position_embeddings=8192, rope_parameters=dict(rope_type="default", rope_theta=500_000.)),                             # Llama-3.2-1B
    "tiny": dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
}

@dataclass
class Setting:
    source: str
    shape: str
    steps: int              # timed
    share: int              # seconds; past them optional rows are skipped, and rows that would take most of a later setting's
    batch: int = 32         # pairs of an optimizer step
    sizes: tuple = (16, 8, 32, 4) # micro-batches of TRL

ON_CARD = [Setting("hh_harmless", "135M", 4, 120), Setting("ultrafeedback_binarized", "135M", 4, 150), Setting("ultrafeedback_binarized", "1.2B", 3, 160)]
DRY = [Setting("hh_harmless", "tiny", 2, 300, 4, (4, 2)), Setting("ultrafeedback_binarized", "tiny", 1, 0, 4, (4, 2))] # no time for the second one's optional rows

class TimeUp(BaseException): "No Exception: the package would take it for a compiler's."

@contextlib.contextmanager
def limit(seconds):
    "Raise TimeUp in the middle of what takes longer."
    def stop(*_): raise TimeUp
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds), 5) # again, where somebody has caught the first one
    try: yield
    finally: signal.setitimer(signal.ITIMER_REAL, 0)

def time_left(): return SECONDS - (time.perf_counter() - BEGAN)

def timed(f, *args):
    "(seconds, result); the card has finished before and after."
    if torch.cuda.is_available(): torch.cuda.synchronize()
    start = time.perf_counter()
    out = f(*args)
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter() - start, out

class Compiler(logging.Handler):
    "What torch.compile does while a row is measured: graphs and seconds of each phase, and why something was compiled again."
    def __init__(self):
        super().__init__()
        torch._logging.set_logs(recompiles=True)         # what TORCH_LOGS=recompiles prints comes here instead
        log = logging.getLogger("torch._dynamo.guards.__recompiles")
        log.handlers, log.propagate = [self], False
        self.begin()
    def begin(self): self.phases, self.again, self.phase, self.since = {}, [], "compile", self.now()
    def now(self):
        "Graphs, seconds with and without Dynamo; some versions count anew after a reset."
        seconds = dict(zip(*compile_times(repr="csv", aggregate=True)))
        return counters["stats"]["unique_graphs"], *(float(seconds.get(name) or 0) for name in ("_compile.compile_inner", "compile_fx_inner"))
    def at(self, phase):
        "This phase begins, and the one before has ended."
        now = self.now()
        graphs, seconds, inductor = (b - a if b >= a else b for a, b in zip(self.since, now))
        if graphs or inductor: self.phases[self.phase] = dict(graphs=graphs, seconds=seconds, inductor=inductor)
        self.phase, self.since = phase, now
    def emit(self, record):
        first, *rest = [" ".join(line.strip(" -").split()) for line in record.getMessage().splitlines()]
        failed = [line.partition("#") for line in rest if re.match(r"\d+/\d+: ", line)] # the graphs there were, and the guard of each that failed
        reasons = [guard.strip()[:160] + f" #{where[-90:]}" * bool(where) for guard, _, where in failed] or rest
        self.again.append(f"{self.phase}: {first.removeprefix('Recompiling function ').split(' in ')[0]}: {'; '.join(reasons)}")
    def about(self):
        self.at(None)
        return dict(recompilations=len(self.again), recompiled=self.again, compiler=self.phases)

def free():
    gc.collect()
    if torch.cuda.is_available(): torch.cuda.empty_cache()

def allocated(peak=False): # GiB
    if not torch.cuda.is_available(): return None
    return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / GIB


# The ids

def prepare(path=IDS):
    from sdpo_nb.logprobs import load_tokenizer
    from sdpo_nb.preferences import load_pairs, tokenize_pairs
    model = os.environ.get("SDPO_MODEL", "~/.cache/sdpo_nb/smollm2-135m-instruct")
    data = Path(os.environ.get("SDPO_DATA", HERE.parent / "shared/data")) / "preferences"
    tok, found = load_tokenizer(str(Path(model).expanduser())), []
    for source, (n, longest) in SOURCES.items():
        raw = load_pairs(data / f"{source}.jsonl.gz")
        pairs = tokenize_pairs(raw.select(range(min(n, len(raw)))), tok, source, 512, longest, chat=True).pairs
        found += [dict(source=source, key=p["key"], **{k: np.array(p[k], "uint16") for k in ("prompt_ids", "chosen_ids", "rejected_ids")}) for p in pairs]
    path = Path(path); path.parent.mkdir(exist_ok=True)
    table = pd.DataFrame(found)
    table.to_parquet(path, compression="zstd")
    tokens = [packed_tokens([p]) for p in found]
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB; packed tokens a pair:", pd.Series(tokens).groupby(table["source"]).describe()[["count", "mean", "min", "max"]].round().T.to_dict())

def load(path, source, vocabulary):
    "Pairs of a source as lists of ids; without a file, random ones."
    if Path(path).exists():
        table = pd.read_parquet(path)
        rows = table[table["source"] == source].to_dict("records")
        return [dict(key=r["key"]) | {k: (r[k].astype(int) % vocabulary).tolist() for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for r in rows]
    g = np.random.default_rng(SEED)
    def ids(): return g.integers(3, vocabulary, int(g.integers(8, 200))).tolist()
    return [dict(key=f"{source} {i}", prompt_ids=ids(), chosen_ids=ids(), rejected_ids=ids()) for i in range(96)]

def deal(pairs, size, seed):
    "Batches of much the same tokens: one pair of every stratum of length each, in random order."
    g, count = np.random.default_rng(seed), len(pairs) // size
    some = g.permutation(len(pairs))[:count * size]
    by_length = sorted(some, key=lambda i: packed_tokens([pairs[i]]))
    strata = g.permuted(np.reshape(by_length, (size, count)), axis=1)
    return [[pairs[i] for i in g.permutation(batch)] for batch in strata.T]

class Batches:
    "Always one that has not been there."
    def __init__(self, pairs, size): self.pairs, self.size, self.dealt, self.left = pairs, size, 0, []
    def __call__(self):
        if not self.left:
            self.left = deal(self.pairs, self.size, SEED + self.dealt)
            self.dealt += 1
        return self.left.pop()


# The sides

def random_model(shape, device):
    torch.manual_seed(SEED)
    with torch.device(device): return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, **SHAPES[shape]))

def uniform_table(pairs, vocabulary):
    "The reference that finds all tokens alike."
    numbers = {side: [-len(p[f"{side}_ids"]) * math.log(vocabulary) for p in pairs] for side in ("chosen", "rejected")}
    return LogprobTable({}, pd.DataFrame(numbers, index=[p["key"] for p in pairs], dtype="float32"))

def compiling(model, logprobs, precision, *how):
    "Compile the layers; seconds. Nothing of the side before helps, but for the compiler's files."
    torch.compiler.reset()
    seconds, why = timed(compile_layers, model, logprobs, precision, *how)
    if why: raise RuntimeError(f"not compiled: {why}")
    return seconds

class Ours:
    "The package's way through a step, in the order of `train_stage`. Its API, but for the choice of `logprobs` and of the budget, is used here only."
    def __init__(self, model, table, precision, logprobs, config, compiled=False, deterministic=False):
        self.model, self.table, self.precision, self.logprobs, self.deterministic = trainable(model), table, precision, logprobs, deterministic
        self.config = replace(config)                    # a copy: `smaller` changes it
        self.accelerator = make_accelerator(precision, model.device)
        activation_checkpointing(model, config.gradient_checkpointing)
        self.about = dict(logprobs=logprobs.__name__, budget=config.token_budget or USUAL_BUDGET, checkpointing=config.gradient_checkpointing)
        why = why_not_same_bits(model.train(), logprobs, precision) if deterministic else None
        self.strict = deterministic and why is None      # the flash kernel computes the same bits in the strict form only
        if compiled: self.about["compile"] = compiling(model, logprobs, precision, config.gradient_checkpointing, deterministic, self.strict)
        if deterministic: self.about |= dict(strict=self.strict, why_not_strict=why)
    def ready(self, batch): return batch
    def parts(self, batch): return prepared(self.model, cut(batch, self.config, self.logprobs), self.logprobs)
    def plan(self, batch): return list(self.parts(batch))
    def gradients(self, batch):
        self.model.train()
        with same_bits(self.model.device, self.deterministic, self.strict):
            return batch_gradients(self.model, batch, self.table, self.config, self.accelerator, self.precision, self.logprobs)["loss"]
    def reference(self, batch):
        self.model.eval()
        with torch.no_grad(), same_bits(self.model.device), autocast(self.model.device, self.precision):
            for _, inputs in self.parts(batch): self.logprobs(self.model, inputs)
    def smaller(self):
        "After memory has ended: half the budget, if that can help."
        self.config.token_budget = self.about["budget"] = self.about["budget"] // 2
        return self.about["budget"] >= 1024

class TRL:
    "DPOTrainer, with a precomputed reference. `ready` is what its dataset holds, and is not timed."
    def __init__(self, trainer, table, size, compiled=None): # compiled: the precision for which its layers are
        self.trainer, self.model, self.table, self.size, self.about = trainer, trainer.model, table, size, {}
        if compiled: self.about["compile"] = compiling(self.model, response_logprobs, compiled)
    def ready(self, batch):
        references = zip(*(x.tolist() for x in self.table.lookup(batch)))
        return [p | dict(ref_chosen_logps=c, ref_rejected_logps=r) for p, (c, r) in zip(batch, references)]
    def plan(self, rows): return [self.trainer.data_collator(rows[i:i+self.size]) for i in range(0, len(rows), self.size)]
    def gradients(self, rows):
        self.trainer.current_gradient_accumulation_steps = len(rows) // self.size
        return sum(self.trainer.training_step(self.model, self.trainer.data_collator(rows[i:i+self.size])) for i in range(0, len(rows), self.size))
    def reference(self, rows):
        for i in range(0, len(rows), self.size):
            inputs = self.trainer._prepare_inputs(self.trainer.data_collator(rows[i:i+self.size]))
            self.trainer.compute_ref_log_probs(self.model, inputs)
    def smaller(self): return False

def tokenizer():
    "Words and an end, enough for the one row that a DPOTrainer must be given."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c"])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")

def trl_trainer(model, precision):
    import datasets
    from accelerate.state import AcceleratorState
    from trl import DPOConfig, DPOTrainer
    AcceleratorState._reset_state(reset_partial_state=True)
    cpu = model.device.type == "cpu"
    args = DPOConfig(output_dir=tempfile.mkdtemp(), beta=BETA, max_length=512, bf16=precision == "bf16", fp16=precision == "fp16", use_cpu=cpu, report_to="none", disable_tqdm=True,
                     per_device_train_batch_size=1, gradient_checkpointing=False, precompute_ref_log_probs=True, save_strategy="no")
    row = datasets.Dataset.from_list([dict(prompt="a", chosen=" b </s>", rejected=" c </s>")])
    small = random_model("tiny", "cpu" if cpu else "cuda") # scores that one row; TRL hashes all weights of its reference
    trainer = DPOTrainer(model=model, ref_model=small, args=args, train_dataset=row, processing_class=tokenizer())
    trainer.ref_model = None
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model) # autocast, as in `train`
    return trainer


# The measurements

def matmul_peak(device): # TFLOP/s in bf16, the best of a few square products
    n = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    return max(2 * n**3 / timed(torch.mm, a, b)[0] for _ in range(20)) / 1e12

@torch.no_grad()
def equality(model, pairs, precision, logprobs):
    "Nats between ways to compute the log-probabilities of some pairs, max and root mean square over both responses; none of them in TF32."
    torch.set_float32_matmul_precision("highest")
    def ask(f, precision):
        with autocast(model.device, precision): return torch.cat(f(model.eval(), pairs)).double()
    exact = ask(response_logprobs, "fp32")
    ways = {"packed, fp32": (packed_logprobs, "fp32"), f"padded, {precision}": (response_logprobs, precision), f"{logprobs.__name__}, {precision}": (logprobs, precision)}
    off = {name: ask(*way) - exact for name, way in ways.items()}
    return dict(largest=exact.abs().max().item(), nats={name: dict(max=d.abs().max().item(), rms=d.square().mean().sqrt().item()) for name, d in off.items()})

def same_twice(side, batch):
    "Whether the gradient of a batch has the same bits again."
    def gradient():
        side.model.zero_grad(); side.gradients(batch)
        return [p.grad for p in side.model.parameters()]
    first, second = gradient(), gradient()
    return all(torch.equal(a, b) for a, b in zip(first, second))

def measure_steps(row, compiler, side, warm, batches, steps, references):
    "Put the numbers of a side into its row, as they come."
    began, seconds, tokens = time.perf_counter(), [], []
    optimizer = torch.optim.AdamW(side.model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    def step(batch):
        loss = side.gradients(batch)
        torch.nn.utils.clip_grad_norm_(side.model.parameters(), CLIP)
        optimizer.step(); optimizer.zero_grad()
        return loss
    compiler.at("first step")
    first, loss = timed(step, side.ready(warm))
    compiler.at("steps")
    row.update(first=first)
    row.setdefault("loss", float(loss))                  # of the untouched weights, also where memory ended later and all begins again
    if torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
    while len(seconds) < steps and not (seconds and time.perf_counter() - began > ROW_SECONDS / 2):
        batch = batches()
        seconds.append(timed(step, side.ready(batch))[0])
        tokens.append(packed_tokens(batch))
    median, rate = float(np.median(seconds)), float(np.median(np.divide(tokens, seconds)))
    row.update(step=median, steps=seconds, tokens=tokens, first_new=seconds[0], pairs_per_second=len(warm) / median, tokens_per_second=rate, peak_gib=allocated(peak=True))
    row.update(plan=timed(side.plan, side.ready(batch))[0])
    compiler.at("reference")
    for batch in references: row.update(reference=timed(side.reference, side.ready(batch))[0]) # the last one stays
    compiler.at("same bits")
    if isinstance(side, Ours): row.update(same_bits_again=same_twice(side, side.ready(warm)))

def make_row(seconds, compiler, make, *args):
    "One row, whatever happens: memory that ends, an error, time that is up. `make` builds the side; what was measured before the end stays."
    side, row, began = None, dict(step=None), time.perf_counter()
    compiler.begin()
    try:
        with limit(seconds):
            side = make()
            while True:
                try: measure_steps(row, compiler, side, *args); break
                except torch.OutOfMemoryError:
                    if row["step"] or not side.smaller(): raise
                side.model.zero_grad(); free()
    except torch.OutOfMemoryError: row["why"] = "out of memory"
    except TimeUp: row["why"] = f"given up after {time.perf_counter() - began:.0f} s"
    except Exception as e:
        traceback.print_exc()
        row["why"] = f"{type(e).__name__}: {e}".splitlines()[0][:200]
    if side:
        side.model.zero_grad()
        row.update(side.about)
    return row | compiler.about() | dict(all_seconds=time.perf_counter() - began)


# The table

COLUMNS = {"s/step": ("step", "{:.3f}"), "pairs/s": ("pairs_per_second", "{:.1f}"), "TFLOP/s": ("useful_tflops", "{:.2f}"), "of peak": ("of_peak", "{:.1%}"), "GiB": ("peak_gib", "{:.1f}"), "first": ("first", "{:.2f}"),
           "compile": ("compile", "{:.1f}"), "again": ("recompilations", "{}"), "new": ("first_new", "{:.3f}"), "reference": ("reference", "{:.3f}"), "plan": ("plan", "{:.4f}"), "same bits": ("same_bits_again", "{}"), "loss": ("loss", "{:.4f}"), "x TRL": ("times_trl", "{:.2f}")}

def say(*words): print(*words, flush=True)
def head(name): say(f"\n{name}\n{'':32}" + "".join(f"{c:>10}" for c in COLUMNS))

def line(name, row):
    if row["step"] is None: return f"{name:32}{row['why']}" + ("" if row.get("first") is None else f"; first step {row['first']:.2f} s")
    cells = ["" if row.get(key) is None else form.format(row[key]) for key, form in COLUMNS.values()]
    return f"{name:32}" + "".join(f"{c:>10}" for c in cells) + (f"  {row['why']}" if row.get("why") else "")

def compare(found):
    "TRL's best row as TRL comes, not compiled, and how many times its tokens a second every row makes."
    rates = {name: r["tokens_per_second"] for name, r in found["rows"].items() if r["step"]}
    theirs = {name: rate for name, rate in rates.items() if name.startswith("TRL") and not name.endswith("compiled")}
    if not theirs: return
    found["best_trl"] = max(theirs, key=theirs.get)
    for name, rate in rates.items(): found["rows"][name]["times_trl"] = rate / theirs[found["best_trl"]]

def ratios(found):
    against = {name: f"{r['times_trl']:.2f}" for name, r in found["rows"].items() if r.get("times_trl")}
    say(f"times {found.get('best_trl', 'TRL, of which nothing was measured')}: {against}; pairs dealt {found['dealt']} time(s), {found['seconds']:.0f} s")

def show(path=RESULTS):
    found = json.loads(Path(path).read_text())
    say(json.dumps({k: v for k, v in found.items() if k not in ("settings", "equality")}, indent=1))
    for name, e in found["equality"].items(): say(equal(name, e))
    for name, s in found["settings"].items():
        head(name)
        for side, row in s["rows"].items(): say(line(side, row))
        ratios(s)

def equal(name, e):
    return f"{name}, nats from padded fp32 (largest {e['largest']:.0f}): " + "; ".join(f"{way} max {n['max']:.2g}, rms {n['rms']:.2g}" for way, n in e["nats"].items())


# Everything

def card(device):
    if device == "cpu": return dict(name="CPU", capability=None, memory_gib=None)
    p = torch.cuda.get_device_properties(0)
    return dict(name=p.name, capability=f"{p.major}.{p.minor}", memory_gib=p.total_memory / GIB, cuda=torch.version.cuda)

def installed(package):
    try: return version(package)
    except PackageNotFoundError: return None

def commit():
    git = subprocess.run(["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return os.environ.get("SDPO_COMMIT") or git.stdout.strip() or None

def made(device, precision):
    versions = {p: installed(p) for p in ("torch", "transformers", "trl", "accelerate", "sdpo_nb")}
    return dict(command=" ".join(["python tests/bench_gpu.py", *sys.argv[1:]]), seed=SEED, date=time.strftime("%Y-%m-%d"), commit=commit(), precision=precision, card=card(device), versions=versions)

def survive(found, keep, seconds, f, *args):
    "An error outside of the rows is noted, and does not end the others."
    try:
        with limit(seconds) if seconds else contextlib.nullcontext(): f(*args)
    except (Exception, TimeUp) as e:
        traceback.print_exc()
        found.setdefault("errors", []).append(f"{f.__name__}: {type(e).__name__}: {e}"[:300])
    free(); keep()

def run(settings, path, results, device):
    torch.manual_seed(SEED)
    compiler, precision = Compiler(), pick_precision("auto", device)
    found = made(device, precision) | dict(matmul_tflops=matmul_peak(device), equality={}, settings={})
    def keep(): found["seconds"] = time.perf_counter() - BEGAN; write_json(results, found)
    keep()
    say(found["card"], found["versions"], f"bf16 matmul {found['matmul_tflops']:.1f} TFLOP/s; {found['seconds']:.0f} s so far")
    def compare_ways(s):
        pairs, model = load(path, s.source, SHAPES[s.shape]["vocab_size"])[:8], random_model(s.shape, device)
        found["equality"][s.source] = equality(model, pairs, precision, choose_logprobs(model, pairs, "auto", precision))
        say(equal(s.source, found["equality"][s.source]))
    for s in settings[:2]: survive(found, keep, 30, compare_ways, s)
    for i, s in enumerate(settings):
        later = 0.7 * sum(t.share for t in settings[i+1:])
        survive(found, keep, None, measure, s, path, found, keep, device, precision, later, compiler)
    say(f"\n{results}: {time.perf_counter() - BEGAN:.0f} s in all")

def measure(s, path, found, keep, device, precision, later, compiler):
    "All rows of a setting: what matters first, then what is optional. So many seconds are left to later settings."
    began = time.perf_counter()
    vocabulary = SHAPES[s.shape]["vocab_size"]
    pairs = load(path, s.source, vocabulary)
    table, batches = uniform_table(pairs, vocabulary), Batches(pairs, s.batch)
    warm, *references = [batches() for _ in range(3)]
    model = random_model(s.shape, device)
    n = sum(p.numel() for p in model.parameters())
    with limit(ROW_SECONDS):
        guard, logprobs = timed(choose_logprobs, model, warm, "auto", precision)
        configs = [fit(model, pairs, TrainConfig(beta=BETA, gradient_checkpointing=c), precision, logprobs) for c in (False, True)] # as a run lets the card choose
    del model; free()
    here = dict(parameters=n, pairs=len(pairs), batch=s.batch, budget=configs[0].token_budget or USUAL_BUDGET, guard=guard, tokens_per_batch=float(np.mean([packed_tokens([p]) for p in pairs]) * s.batch), rows={})
    found["settings"][f"{s.source}, {s.shape}"] = here
    head(f"{s.source}, {s.shape}: {n / 1e6:.0f}M parameters, {s.batch} pairs of {here['tokens_per_batch']:.0f} tokens a step, {logprobs.__name__} by {here['budget']} tokens, guard {guard:.1f} s")

    def keep_row(name, make, references=(), optional=False):
        seconds = min(ROW_SECONDS, time_left() - later)
        late = seconds < 10 or optional and time.perf_counter() - began > s.share
        row = dict(step=None, why="skipped: time") if late else make_row(seconds, compiler, make, warm, batches, s.steps, references)
        if row["step"]:
            useful = 6 * n * row["tokens_per_second"] / 1e12
            row |= dict(useful_tflops=useful, of_peak=useful / found["matmul_tflops"])
        free()
        row["left_gib"] = allocated()
        here["rows"][name] = row
        compare(here)
        here.update(dealt=batches.dealt, seconds=time.perf_counter() - began)
        keep(); say(line(name, row))
        for why in row.get("recompiled", []):
            if not why.startswith("compile: "): say(f"    compiled again in {why[:250]}") # in "compile", once for eval and once for train mode

    def ours(checkpointing=False, **kind): return lambda: Ours(random_model(s.shape, device), table, precision, logprobs, configs[checkpointing], **kind)
    keep_row("ours, compiled", ours(compiled=True), references)
    keep_row("ours, compiled, same bits", ours(compiled=True, deterministic=True), references)
    keep_row("ours", ours(), references)
    theirs = []                                          # one trainer for all sizes of micro-batch
    def trl(size, compiled=None):
        if not theirs: theirs.append(trl_trainer(random_model(s.shape, device), precision))
        theirs[0].model.load_state_dict(random_model(s.shape, device).state_dict()) # every row begins with the same weights
        free()
        return TRL(theirs[0], table, size, compiled)
    for size in s.sizes: keep_row(f"TRL, {size}", lambda: trl(size), references)
    keep_row(f"TRL, {s.batch}, compiled", lambda: trl(s.batch, precision), references, optional=True)
    theirs.clear(); free()
    keep_row("ours, same bits", ours(deterministic=True), optional=True)
    keep_row("ours, compiled, checkpointing", ours(compiled=True, checkpointing=True), optional=True)
    ratios(here)


if __name__ == "__main__":
    verb, *rest = sys.argv[1:] or ["all"]
    file = rest[0] if rest else IDS
    if verb == "prepare": prepare(file)
    elif verb == "all":
        if not torch.cuda.is_available(): sys.exit("no graphics card; `dry` is for a CPU")
        if not Path(file).exists(): sys.exit(f"{file} is missing: `prepare` makes it where tokenizer and data are")
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        run(ON_CARD, file, RESULTS, "cuda")
    elif verb == "dry":
        torch.set_num_threads(1)
        ROW_SECONDS, SECONDS = 300, 900                  # a busy machine may be slow; nobody pays for it
        run(DRY[:int(rest[1])] if rest[1:] else DRY, file, Path(os.environ.get("SDPO_RESULTS") or Path(tempfile.mkdtemp()) / "gpu.json"), "cpu")
    elif verb == "show": show(*rest)
    else: sys.exit(__doc__)
