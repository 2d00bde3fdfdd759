"""Chapter 15's times: the harness's own class against ours, and the two commands, on the same questions; into data/results/benchmarks.json.

    python tests/bench_benchmarks.py classes     each benchmark by both classes, in both orders
    python tests/bench_benchmarks.py commands    `sdpo eval` and `lm_eval` on the same files, in both orders
    python tests/bench_benchmarks.py tokens      how many tokens are read for twenty questions of each; needs no model

Needs the local benchmarks (SDPO_DATA) and SmolLM2-135M-Instruct (SDPO_MODEL). Some ten minutes each on two idle cores; what is there is not measured again.
"""
import gzip, json, os, subprocess, sys, tempfile, time
os.environ.setdefault("OMP_WAIT_POLICY", "passive"); os.environ.setdefault("HF_HUB_OFFLINE", "1")
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sdpo_nb.benchmarks import ask_harness, by_prompt, find_benchmarks, plain_lm, shared_tokens, sharing_lm, write_tasks
from sdpo_nb.logprobs import load_model, load_tokenizer, write_json

DATA = Path(os.environ.get("SDPO_DATA", Path(__file__).parent.parent.parent / "shared/data")) / "benchmarks"
MODEL = os.environ.get("SDPO_MODEL", str(Path.home() / ".cache/sdpo_nb/smollm2-135m-instruct"))
OUT = Path(__file__).parent.parent / "data/results/benchmarks.json"
QUESTIONS = {"arc_challenge": 2, "hellaswag": 3, "mmlu_anatomy": 8, "truthfulqa_mc2": 3, "eq_bench": 2}
LIMIT = 2      # of the commands, of each task
SUBJECTS = 3   # of MMLU's 57, for the commands
TASKS = ["arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "eq_bench"]


def answers_of(found):
    "Metrics of each question, and what was answered to each request."
    samples = [s for task in found["samples"].values() for s in task]
    scores = [[s[m] for m in s["metrics"]] for s in samples]
    return scores, [r[0] for s in samples for r in s["resps"]]


def cpu_seconds():
    "Of this process and those that it started and that have ended."
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def timed(call):
    "What it returns; seconds by the clock and of the processor, which do not depend on what else is at work."
    clock, cpu = time.time(), cpu_seconds()
    found = call()
    return found, [round(time.time() - clock, 1), round(cpu_seconds() - cpu, 1)]


def few_subjects(folder):
    "The local files, but of MMLU only some subjects."
    folder.mkdir()
    for path in DATA.glob("*.jsonl.gz"):
        if not path.name.startswith("mmlu"): (folder / path.name).symlink_to(path.resolve())
    kept = None
    for name in ("mmlu_test", "mmlu_dev"):
        rows = [json.loads(line) for line in gzip.open(DATA / f"{name}.jsonl.gz", "rt")]
        kept = kept or sorted({row["subject"] for row in rows})[::9][:SUBJECTS]
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as f: f.writelines(json.dumps(row) + "\n" for row in rows if row["subject"] in kept)
    return folder


def classes(found):
    model, tokenizer = load_model(MODEL, "cpu"), load_tokenizer(MODEL)
    lms = {"harness": plain_lm(model, tokenizer), "ours": sharing_lm(model, tokenizer)}
    with tempfile.TemporaryDirectory() as tasks:
        write_tasks(tasks, DATA)
        for task, n in QUESTIONS.items():
            if task in found: continue
            seconds, answers = {name: [] for name in lms}, {}
            for order in (list(lms), list(lms)[::-1]):
                for name in order:
                    asked, took = timed(lambda: ask_harness(lms[name], [task], tasks, limit=n))
                    answers[name] = answers_of(asked)
                    seconds[name].append(took)
            (ours, said), (theirs, they_said) = answers["ours"], answers["harness"]
            texts = isinstance(said[0], str)
            off = 0. if texts else max(abs(a - b) for (a, _), (b, _) in zip(said, they_said))
            found[task] = dict(
                questions=n,
                requests=len(said),
                seconds=seconds,
                same_text_or_greedy=said == they_said if texts else [g for _, g in said] == [g for _, g in they_said],
                nats_apart=off,
                scores_apart=max(abs(a - b) for x, y in zip(ours, theirs) for a, b in zip(x, y)),
            )
            save(classes=found)
            print(task, found[task], flush=True)


def commands(found):
    "Both commands on the same files, each as a process of its own."
    with tempfile.TemporaryDirectory() as tmp:
        tasks, data = Path(tmp, "tasks"), few_subjects(Path(tmp, "data"))
        write_tasks(tasks, data)
        lines = {
            "sdpo": ["-m", "sdpo_nb.cli", "eval", "--models", f"S={MODEL}", "--tasks", *TASKS, "--data", str(data), "--limit", str(LIMIT)],
            "lm_eval": ["-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={MODEL},dtype=float32", "--device", "cpu",
                        "--include_path", str(tasks), "--tasks", ",".join(TASKS), "--limit", str(LIMIT), "--batch_size", "1"],
        }
        metric = {b.task: b.metric for b in find_benchmarks(TASKS)}
        runs = found.setdefault("runs", [])
        for i, name in enumerate([*lines, *list(lines)[::-1]]):
            if i < len(runs): continue
            out = Path(tmp, f"{name}-{i}")
            line = [sys.executable, *lines[name], "--out" if name == "sdpo" else "--output_path", str(out)]
            _, seconds = timed(lambda: subprocess.run(line, check=True, capture_output=True))
            if name == "sdpo":
                scores = {task: json.loads((out / "S" / f"{task}.json").read_text()) for task in TASKS}
                said = {task: [scores[task]["value"], scores[task]["stderr"]] for task in TASKS}
            else:
                results = json.loads(next(out.rglob("results*.json")).read_text())["results"]
                said = {task: [results[task][f"{metric[task]}{what},none"] for what in ("", "_stderr")] for task in TASKS}
            runs.append(dict(command=name, threads=torch.get_num_threads(), seconds=seconds, said=said))
            found |= dict(limit=LIMIT, subjects=SUBJECTS)
            save(commands=found)
            print(runs[-1], flush=True)


def tokens(found):
    "Tokens that each class reads, for twenty questions of each benchmark."
    tokenizer = load_tokenizer(MODEL)
    tiny = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, max_position_embeddings=8192))
    with tempfile.TemporaryDirectory() as tasks:
        write_tasks(tasks, DATA)
        for task in [t for t in QUESTIONS if t != "eq_bench"]:
            lm, asked = plain_lm(tiny, tokenizer), []
            def collect(requests, **how):
                asked.extend((x, o) for _, x, o in requests)
                return [(0., False)] * len(requests)
            lm._loglikelihood_tokens = collect
            ask_harness(lm, [task], tasks, limit=20)
            rows = {(*x, *o[:-1]) for x, o in asked}                 # the harness reads equal rows once
            options = sum(len(o) - 1 for _, o in asked)
            prompts, shared, last = list(by_prompt(asked, 8192)), 0, ()
            for prompt in prompts:
                shared += len(prompt) - min(shared_tokens(prompt, last), len(prompt) - 1)
                last = prompt
            found[task] = dict(questions=20, options=len(asked), alone=sum(len(x) + len(o) - 1 for x, o in asked), harness=sum(map(len, rows)),
                               prompt_shared=options + sum(map(len, prompts)), ours=options + shared)
            print(task, found[task], flush=True)
    save(tokens=found)


def read(): return json.loads(OUT.read_text()) if OUT.exists() else {}

def save(**part):
    machine = dict(cpu=torch.backends.cpu.get_cpu_capability())
    write_json(OUT, read() | part | dict(machine=machine))


if __name__ == "__main__":
    what = sys.argv[1]
    dict(classes=classes, commands=commands, tokens=tokens)[what](read().get(what, {}))
