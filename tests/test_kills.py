"""
Forty kills with SIGKILL, each at a place of its own: the same call goes on, and ends as if nothing had happened.

A kill comes at an event (just before a file is opened to be written, renamed or removed, before a folder is made or removed), in the middle of a
write (the system kills a process whose file grows beyond a limit), or some milliseconds after an event. All are drawn with the seed that is printed.
Events are counted in a run that is left alone, so that no kill comes too late.

A process that has imported everything, and computed nothing, forks workers, and they every run: torch takes seconds to import.
"""
import hashlib, json, os, queue, random, select, signal, subprocess, sys, threading, time, traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import sdpo_nb
from sdpo_nb.world import load_world
from tiny import SETTINGS, metrics, rows

resource = pytest.importorskip("resource", reason="no limits and no fork here")

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
DEATHS = dict(event=-signal.SIGKILL, write=-signal.SIGXFSZ, moment=-signal.SIGKILL)
XDIST = "PYTEST_XDIST_WORKER" in os.environ      # each of its workers has a part of the tests, and learns of it bit by bit
HOW, WORKERS = list(DEATHS), 1 if XDIST else 2
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


def serve(*pipes): # (where jobs are read, where return codes are written): one pair for each worker
    "What every run does first is done here, once, as long as it starts no thread; then come the workers."
    import torch
    import accelerate.accelerator, matplotlib.pyplot as plt, sdpo_nb.logprobs, sdpo_nb.report, sdpo_nb.stages, sdpo_nb.stepwise, tqdm
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0                                          # a thread
    sdpo_nb.logprobs.load_model(load_world().base), sdpo_nb.logprobs.load_tokenizer(load_world().base)
    def drawn(*args): return {name: plt.figure(figsize=(1, 1)) for name in ("loss", "gamma", "drift", "partition")}
    sdpo_nb.report._drawn, sdpo_nb.report.failure_signs = drawn, lambda *args: [] # half of the time of a small run
    sdpo_nb.stages.ASKED = 1
    for fig in drawn().values(): fig.savefig(os.devnull, format="png", bbox_inches="tight"); plt.close(fig)
    assert threading.active_count() == 1
    for jobs, codes in pipes:
        if not os.fork(): work(os.fdopen(jobs), os.fdopen(codes, "w"))
    for _ in pipes: os.wait()


def work(jobs, codes):
    "Jobs come in and return codes go out, a line each."
    for line in jobs:
        job = json.loads(line)
        hear, tell = os.pipe()
        pid = os.fork()
        if not pid: child(job, tell)
        os.close(tell)                                                      # so that the end of the child is heard, too
        if job.get("how") == "moment" and select.select([hear], [], [], TOO_LONG)[0] and os.read(hear, 1):
            time.sleep(job["later"])
            os.kill(pid, signal.SIGKILL)
        os.close(hear)
        print(wait(pid), file=codes, flush=True)
    os._exit(0)


# ---- in the process that tests

@pytest.fixture(scope="module")
def fork():
    "job -> return code of a process; two may ask at once."
    path = os.pathsep.join([str(Path(sdpo_nb.__file__).parent.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    jobs, codes = [os.pipe() for _ in range(WORKERS)], [os.pipe() for _ in range(WORKERS)]
    theirs = [(j[0], c[1]) for j, c in zip(jobs, codes)]
    server = subprocess.Popen([sys.executable, "-c", f"import test_kills; test_kills.serve(*{theirs})"], pass_fds=sum(theirs, ()), env=os.environ | dict(PYTHONPATH=path, OPENBLAS_NUM_THREADS="1"))
    for fd in sum(theirs, ()): os.close(fd)
    free = queue.SimpleQueue()
    for j, c in zip(jobs, codes): free.put((os.fdopen(j[1], "w"), os.fdopen(c[0])))
    def ask(**job):
        worker = free.get()
        try:
            print(json.dumps(job), file=worker[0], flush=True)
            return int(worker[1].readline())
        finally: free.put(worker)
    yield ask
    for _ in range(WORKERS):
        for end in free.get(): end.close()
    server.wait()


@pytest.fixture(scope="module")
def begun(fork, request, tmp_path_factory):
    "Two functions, for a run that nobody killed and for one that was; what the chosen tests need is begun in their order, before they ask."
    pool, found = ThreadPoolExecutor(WORKERS), {}
    def whole(run):
        if run not in found: found[run] = pool.submit(left_alone, fork, run, tmp_path_factory.mktemp("alone"))
        return found[run]
    def kill(seed, run, how):
        alone = whole(run)
        if seed not in found: found[seed] = pool.submit(killed, fork, tmp_path_factory.mktemp("killed"), alone, seed, run, how)
        return found[seed]
    chosen = [item.callspec.params for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    for c in chosen if not XDIST else []: whole(c["run"])
    for c in chosen if not XDIST else []: kill(**c) if "seed" in c else None
    yield whole, kill
    pool.shutdown(cancel_futures=True)


def left_alone(fork, run, tmp):
    "A run that goes to its end, and what it did to its folder."
    finish(fork, run, tmp / "run", events=str(tmp / "events.json"))
    return tmp / "run", json.loads((tmp / "events.json").read_text())


def killed(fork, tmp, alone, seed, run, how):
    "A run that is killed and goes on: (where it was killed, its return code, what it said, its folder)."
    where, words = draw(how, alone.result()[1], seed)
    code = fork(run=run, folder=str(tmp / "run"), how=how, log=str(tmp / "killed.txt"), **where)
    if code == DEATHS[how]: finish(fork, run, tmp / "run")
    return words, code, (tmp / "killed.txt").read_text()[-3000:] if (tmp / "killed.txt").exists() else "", tmp / "run"


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
        if event == "os.rename": found.setdefault(kind, []).append((begun.pop(path, at - 1), path, size))   # Parquet is opened unseen
    return [same for _, same in sorted(found.items())]


def story(folder):
    "What two runs must have in common: every model, stage and step, the partition, the report, and the names of all files."
    def sha(p): return hashlib.sha256(p.read_bytes()).hexdigest()
    files = [p for p in sorted(folder.rglob("*")) if p.suffix != ".parquet"]         # a table may lie in more pieces
    same = {str(p.relative_to(folder)): sha(p) for p in files if p.name in ("model.safetensors", "stage.json", "partition.json")}
    return same | dict(steps=[metrics(p.parent) for p in files if p.name == "metrics.jsonl"], files=[str(p.relative_to(folder)) for p in files],
                       report=[line.replace(str(folder), "FOLDER") for line in (folder / "report.md").read_text().splitlines() if not line.startswith(CLOCK)])


@pytest.mark.parametrize("run", RUNS)
def test_alone(begun, run):
    "What the others are compared with has trained, in every stage, and left nothing behind but what belongs there."
    from sdpo_nb.logprobs import load_model, weights_hash
    folder, events = begun[0](run).result()
    stages = [json.loads(p.read_text()) for p in sorted(folder.glob("stage-*/stage.json"))]
    assert len(stages) == RUNS[run].get("chunks", 2) or RUNS[run].get("chunks") == "function"
    assert len({stages[0]["start"], *(s["end"] for s in stages)}) == len(stages) + 1
    for s in stages:
        model = load_model(str(folder / f"stage-{s['stage']}" / "model"))
        assert weights_hash(model, getattr(__import__("torch"), s["saved"]["dtype"])) == s["saved"]["weights"]
    assert len(events) > 50 and {e for e, *_ in events} >= {"open", "os.rename", "os.mkdir"} and len(writes(events)) >= 9
    assert not list(folder.rglob("*.tmp")) and bool(list(folder.rglob("checkpoint"))) == (run == "one optimizer over all stages")


@pytest.mark.parametrize("seed, run, how", [(i, *kill) for i, kill in enumerate(KILLS)], ids=[f"{i:02}-{how}-{run}" for i, (run, how) in enumerate(KILLS)])
def test_killed(begun, seed, run, how):
    whole, _ = begun[0](run).result()
    words, code, said, folder = begun[1](seed, run, how).result()
    print(f"seed {seed}: {run}, killed {words}")
    assert code == DEATHS[how], f"the run was to be killed, and ended with {code}: {said}"
    assert story(folder) == story(whole)


def test_every_kind_of_file_is_cut_in_a_write(begun):
    "There are as many kills in a write as there are runs, which must be enough for all kinds."
    events = begun[0]("defaults").result()[1]
    cut = {draw(how, events, seed)[0]["at"] for seed, (_, how) in enumerate(KILLS) if how == "write"}
    for same in writes(events): assert cut & {at for at, _, _ in same}, f"no kill comes in the middle of {same[0][1]}"
