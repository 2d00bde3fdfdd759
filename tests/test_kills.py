"""
Forty kills with SIGKILL, each at a place of its own: the same call goes on, and ends as if nothing had happened.

A kill comes at an event (just before a file is opened to be written, renamed or removed, before a folder is made or removed), in the middle of a
write (the system kills a process whose file grows beyond a limit), or some milliseconds after an event. All are drawn with the seed that is printed.
Events are counted in a run that is left alone, so that no kill comes too late.

A process that has imported everything, and computed nothing, forks every run: torch takes seconds to import.
"""
import hashlib, json, os, random, resource, select, shutil, signal, subprocess, sys, threading, time, traceback
from pathlib import Path

import pytest

import sdpo_nb
from sdpo_nb.world import load_world
from tiny import SETTINGS, metrics, rows

try: import fcntl
except ImportError: pytest.skip("no fork here", allow_module_level=True)

CONFIG = dict(SETTINGS, batch_size=4, save_every=2)
SOURCES = {n: rows(n, 12) for n in ("primer", "digest")}     # 3 steps a stage
RUNS = {
    "defaults": {},
    "one optimizer over all stages": dict(restart="never"),
    "fixed reference": dict(reference="fixed"),
    "every stage from S": dict(init_target="S"),
    "1 random chunk": dict(chunks=1, order="random"),
    "2 random chunks": dict(chunks=2, order="random"),
    "3 random chunks": dict(chunks=3, order="random"),
    "fp16": dict(precision="fp16"),
    "bf16": dict(precision="bf16"),
    "recomputed and padded": dict(gradient_checkpointing=True, packing="off"),
    "2 epochs unshuffled": dict(epochs=2, shuffle=False),
    "a function and a loaded model": dict(chunks="function"),
    "S in bf16": dict(dtype="bfloat16"),
}
HOW = "event", "write", "moment"
KILLS = [(run, how) for run in RUNS for how in HOW] + [("defaults", "event")]
CLOCK = "| time of the stages", "| peak memory"  # lines of a report that no two runs share
TOO_LONG = 60 # seconds


# ---- in the process that forks

def call(folder, chunks=None, dtype=None, **changes):
    "One run, as a user calls it."
    import torch
    from sdpo_nb.logprobs import load_model, load_tokenizer
    from sdpo_nb.stepwise import StepwiseConfig, sdpo
    base, sources = load_world().base, SOURCES
    loaded = load_model(base) if chunks == "function" or dtype else None
    if dtype: loaded.to(getattr(torch, dtype))
    if chunks == "function": chunks, sources = lambda t, model: list(SOURCES.values())[t-1] if t <= 2 else None, None
    sdpo(base if loaded is None else loaded, sources, StepwiseConfig(**CONFIG | changes, chunks=chunks), folder, tokenizer=loaded and load_tokenizer(base))


class Events:
    "An audit hook: what is about to change in a folder, event by event; `act` is called at one of them."
    def __init__(self, folder, at=None, act=None): self.folder, self.at, self.act, self.seen, self.inside = str(folder) + os.sep, at, act, [], False

    def __call__(self, event, args):
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)): return
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"): return
        path = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else ""
        ours = path.startswith(self.folder)
        if event == "shutil.rmtree": self.inside = ours
        below = event in ("os.remove", "os.rmdir") and args[-1] >= 0 and self.inside   # a part of a tree that goes, by its bare name
        if not (ours or below): return
        self.seen.append((event, path.removeprefix(self.folder), _bytes(path) if event == "os.rename" else 0))
        if len(self.seen) == self.at: self.act()


def _bytes(path):
    "Of a file, or of the largest file in a folder."
    files = [Path(path), *Path(path).rglob("*")]
    return max((p.stat().st_size for p in files if p.is_file()), default=0)


def child(job, tell):
    "One run, killed or not; never returns."
    import torch
    try:
        torch.set_num_threads(1)                                            # first, in one thread: two that meet a forked pool at once break it
        out = os.open(os.devnull if job.get("how") == "write" else job["log"], os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1); os.dup2(out, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)                       # Python ignores it, and gets an error instead
        act = dict(event=lambda: os.kill(os.getpid(), signal.SIGKILL), moment=lambda: os.write(tell, b"x"),
                   write=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], resource.RLIM_INFINITY))).get(job.get("how"))
        events = Events(job["folder"], job.get("at"), act)
        sys.addaudithook(events)
        call(job["folder"], **RUNS[job["run"]])
        if "events" in job: Path(job["events"]).write_text(json.dumps(events.seen))
        os._exit(0)
    except BaseException: traceback.print_exc()
    finally: os._exit(1)


def wait(pid):
    "Its return code; a process that hangs is killed with a signal that no test wants."
    end = time.monotonic() + TOO_LONG
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGQUIT)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def serve():
    "Jobs come in and return codes go out, a line each. What every run does first is done here, once, as long as it starts no thread."
    import torch
    import accelerate.accelerator, matplotlib.pyplot as plt, sdpo_nb.logprobs, sdpo_nb.stepwise, tqdm
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0                                          # a thread
    sdpo_nb.logprobs.load_model(load_world().base), sdpo_nb.logprobs.load_tokenizer(load_world().base)
    def drawn(*args): return {name: plt.figure(figsize=(1, 1)) for name in ("loss", "gamma", "drift", "partition")}
    sdpo_nb.stepwise._drawn, sdpo_nb.stepwise.failure_signs = drawn, lambda gammas, metrics: [] # half of the time of a small run
    for fig in drawn().values(): fig.savefig(os.devnull, format="png", bbox_inches="tight"); plt.close(fig)
    assert threading.active_count() == 1
    for line in sys.stdin:
        job = json.loads(line)
        hear, tell = os.pipe()
        pid = os.fork()
        if not pid: child(job, tell)
        os.close(tell)                                                      # so that the end of the child is heard, too
        if job.get("how") == "moment" and select.select([hear], [], [], TOO_LONG)[0] and os.read(hear, 1):
            time.sleep(job["later"])
            os.kill(pid, signal.SIGKILL)
        os.close(hear)
        print(wait(pid), flush=True)


# ---- in the process that tests

@pytest.fixture(scope="module")
def fork():
    "job -> return code of a process."
    path = os.pathsep.join([str(Path(sdpo_nb.__file__).parent.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen([sys.executable, "-c", "import test_kills; test_kills.serve()"], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              env=os.environ | dict(PYTHONPATH=path, OPENBLAS_NUM_THREADS="1"))
    def ask(**job):
        print(json.dumps(job), file=server.stdin, flush=True)
        return int(server.stdout.readline())
    yield ask
    server.stdin.close(); server.wait(); server.stdout.close()


@pytest.fixture(scope="module")
def alone(fork, tmp_path_factory):
    "run -> (its folder, its events) of a run that nobody killed, made when it is first asked for."
    made = {}
    def get(run):
        if run not in made:
            folder, events = tmp_path_factory.mktemp("alone") / "run", tmp_path_factory.mktemp("events") / "events.json"
            finish(fork, run, folder, events=str(events))
            made[run] = folder, json.loads(events.read_text())
        return made[run]
    return get


def finish(fork, run, folder, **more):
    "The run goes to its end."
    log = folder.parent / "finished.txt"
    assert fork(run=run, folder=str(folder), log=str(log), **more) == 0, log.read_text()[-3000:]


def draw(how, events, seed):
    "Where a process is killed: settings of a job, and words. Every kind of file has its turn."
    rng = random.Random(seed)
    if how == "write":
        kinds = writes(events)
        at, path, size = rng.choice(kinds[seed // len(HOW) % len(kinds)])
        limit = rng.randrange(1, size)
        return dict(at=at, limit=limit), f"in a write: byte {limit} of {size}, {path}"
    last = max(i for i, (_, path, _) in enumerate(events) if path.startswith("stage-")) if how == "moment" else len(events) - 1
    at = rng.randrange(last + 1)                                           # after a moment, the report is still to come
    event, path, _ = events[at]
    if how == "event": return dict(at=at + 1), f"at event {at + 1} of {len(events)}: {event} {path}"
    later = rng.uniform(0, 0.02)
    return dict(at=at + 1, later=later), f"{1000 * later:.1f} ms after event {at + 1} of {len(events)}: {event} {path}"


def writes(events):
    "[(number of the event that begins it, path, bytes), ...] of what is written and then renamed, and of the first steps' lines; one list for each kind of file."
    found, begun = {}, {}
    for at, (event, path, size) in enumerate(events, 1):
        if event in ("open", "os.mkdir"): begun.setdefault(path, at)
        kind = path.split("/")[0 if path.startswith("figures") else -1]
        if event == "open" and kind == "metrics.jsonl": found.setdefault(kind, []).append((at, path, 1000))
        if event == "os.rename" and path in begun: found.setdefault(kind, []).append((begun.pop(path), path, size))
    return [same for _, same in sorted(found.items())]


def story(folder):
    "What two runs must have in common: every model, stage and step, the partition, the report, and the names of all files."
    def sha(p): return hashlib.sha256(p.read_bytes()).hexdigest()
    files = [p for p in sorted(folder.rglob("*")) if p.suffix != ".parquet"]         # a table may lie in more pieces
    same = {str(p.relative_to(folder)): sha(p) for p in files if p.name in ("model.safetensors", "stage.json", "partition.json")}
    return same | dict(steps=[metrics(p.parent) for p in files if p.name == "metrics.jsonl"], files=[str(p.relative_to(folder)) for p in files],
                       report=[line.replace(str(folder), "FOLDER") for line in (folder / "report.md").read_text().splitlines() if not line.startswith(CLOCK)])


@pytest.mark.parametrize("run", RUNS)
def test_alone(alone, run):
    "What the others are compared with has trained, in every stage, and left nothing behind but what belongs there."
    from sdpo_nb.logprobs import load_model, weights_hash
    folder, events = alone(run)
    stages = [json.loads(p.read_text()) for p in sorted(folder.glob("stage-*/stage.json"))]
    assert len(stages) == RUNS[run].get("chunks", 2) or RUNS[run].get("chunks") == "function"
    assert len({stages[0]["start"], *(s["end"] for s in stages)}) == len(stages) + 1
    for s in stages:
        model = load_model(str(folder / f"stage-{s['stage']}" / "model"))
        assert weights_hash(model, getattr(__import__("torch"), s["saved"]["dtype"])) == s["saved"]["weights"]
    assert len(events) > 50 and {e for e, *_ in events} >= {"open", "os.rename", "os.mkdir"} and len(writes(events)) >= 9
    assert not list(folder.rglob("*.tmp")) and bool(list(folder.rglob("checkpoint"))) == (run == "one optimizer over all stages")


@pytest.mark.parametrize("seed, run, how", [(i, *kill) for i, kill in enumerate(KILLS)], ids=[f"{i:02}-{how}-{run}" for i, (run, how) in enumerate(KILLS)])
def test_killed(fork, alone, tmp_path, seed, run, how):
    whole, events = alone(run)
    where, words = draw(how, events, seed)
    print(f"seed {seed}: {run}, killed {words}")
    folder, log = tmp_path / "run", tmp_path / "killed.txt"
    code = fork(run=run, folder=str(folder), how=how, log=str(log), **where)
    assert code == -(signal.SIGXFSZ if how == "write" else signal.SIGKILL), f"the run was to be killed, and ended with {code}: {log.exists() and log.read_text()[-3000:]}"
    finish(fork, run, folder)
    assert story(folder) == story(whole)


def test_forty(): assert len(KILLS) == len(set(enumerate(KILLS))) == 40 and {how for _, how in KILLS} == set(HOW) and {run for run, _ in KILLS} == set(RUNS)
