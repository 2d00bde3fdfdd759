"The runs on real models, on the tiny world: roles, draws, a stage in memory, a killed command that goes on, rows that are read in."
import gzip, json, os, signal, subprocess, sys, time
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from sdpo_nb import folder, in_memory, real, smollm2, timed
from sdpo_nb.logprobs import weights_hash
from sdpo_nb.trainer import TrainConfig, all_batches, train_stage
from sdpo_nb.world import load_world
from tiny import rows

WORLD = load_world()
NAMES = dict(zip(real.SOURCE_FILES, ("primer", "digest", "riddle")))
TWO = ("orca", "uf")


def pack(folder, source, found):
    (folder / "preferences").mkdir(exist_ok=True)
    text = "\n".join(json.dumps(row) for row in found)
    (folder / "preferences" / f"{real.SOURCE_FILES[source]}.jsonl.gz").write_bytes(gzip.compress(text.encode()))


def plain(row, **more): return {k: row[k] for k in ("prompt", "chosen", "rejected")} | more


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A folder like the real one: the second source says itself which pairs are held out."
    folder = tmp_path_factory.mktemp("data")
    for source, name in NAMES.items():
        found = rows(name, 60)
        if source == "uf": found = [plain(r, id=str(i), meta=dict(split="eval" if i % 5 == 0 else "train")) for i, r in enumerate(found)]
        pack(folder, source, [plain(r) if source != "uf" else r for r in found])
    return folder


@pytest.fixture(scope="module")
def pairs(data): return real.prepare_ids(data, WORLD.base, data / "ids.parquet", longest=64, most=60)


@pytest.fixture(scope="module")
def base(pairs): return in_memory.load_S(WORLD.base, pairs, "fp32")


def prompts(pairs, source): return {(source, *p["prompt_ids"]) for p in pairs if p["source"] == source}


# ---- pairs

def test_roles_are_kept_and_given_ones_are_respected(data, pairs):
    again = real.read_ids(data / "ids.parquet")
    assert again == pairs
    roles = pd.DataFrame(pairs).groupby(["source", "role"]).size().unstack()
    assert roles.loc["uf", "held out"] == 12 and 12 <= roles.loc["orca", "held out"] <= 14 and (roles["validation"] > 0).all()


def test_no_prompt_is_on_two_sides(pairs):
    for draw in (0, 1):
        trained = real.drawn(pairs, draw, TWO)
        asked = [pairs[i] for i in real.measured(pairs, draw, TWO)]
        for source in TWO:
            given = source == "uf"                       # who holds out by row may do otherwise
            seen = [p for p in asked if p["source"] == source and not (given and p["role"] == "held out")]
            assert not prompts(trained, source) & prompts(seen, source)
        assert {p["role"] for p in trained} == {"pool"} and {p["role"] for p in asked if p["source"] == "hh"} == {"held out"}
        left_out = [p for p in asked if p["role"] == "pool"]
        assert len(left_out) + len(trained) == sum(p["role"] == "pool" and p["source"] in TWO for p in pairs) and left_out


def test_draws_differ_and_random_chunks_have_the_sizes_of_the_sources(pairs):
    zero, one = (real.drawn(pairs, draw, TWO) for draw in (0, 1))
    assert {p["key"] for p in zero} != {p["key"] for p in one}
    size = {name: len(real.chunk_of(zero, name, 0)) for name in ("orca", "uf", "random 1", "random 2")}
    assert size["random 1"] == size["orca"] and size["random 2"] == size["uf"]
    keys = [sorted(p["key"] for name in names for p in real.chunk_of(zero, name, 0)) for names in (("random 1", "random 2"), ("orca", "uf"), ("all",))]
    assert keys[0] == keys[1] == keys[2]
    assert {p["source"] for p in real.chunk_of(zero, "random 1", 0)} == set(TWO)


def test_missing_data_and_ids_are_one_line_that_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="--data names the folder"): real.prepare_ids(tmp_path, WORLD.base, tmp_path / "ids.parquet")
    with pytest.raises(ValueError, match="ids.parquet: not there; give --data"): real.read_ids(tmp_path / "ids.parquet")
    with pytest.raises(ValueError, match="none of smollm2, smollm2_cpu, which_is_easy, which_is_easy_cpu, rehearsal"): real.design_of("smolm2", "")


def test_too_few_pairs_to_hold_out_are_refused_with_their_number(tmp_path):
    for source, name in NAMES.items(): pack(tmp_path, source, [plain(r) for r in rows(name, 30)])
    with pytest.raises(ValueError, match="orca: 30 usable pairs, and 60 are to be held out"): real.prepare_ids(tmp_path, WORLD.base, tmp_path / "ids.parquet", 64)


# ---- training

@pytest.mark.parametrize("settings", [dict(), dict(epochs=2, warmup=0.5), dict(shuffle=False)])
def test_a_stage_in_memory_has_the_bits_of_train_stage(pairs, base, tmp_path, settings):
    chunk = real.drawn(pairs, 0, TWO)
    base.reset()
    table = base.score(chunk)
    config = TrainConfig(beta=0.3, lr=1e-4, batch_size=8, precision="fp32", seed=3, **settings)
    made = in_memory.train_in_memory(base, chunk, table, config, stage=2)
    here = weights_hash(base.model)
    base.reset()
    train_stage(base.model, chunk, table, config, tmp_path, stage=2, logprobs=base.logprobs)
    assert here == weights_hash(base.model) != base.hash
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert made["losses"] == [round(line["loss"], 4) for line in logged]


def test_a_reference_that_follows_every_two_steps_is_ln_2_there(pairs, base):
    chunk = real.drawn(pairs, 0, TWO)
    base.reset()
    table = base.score(chunk)
    config = TrainConfig(beta=0.3, lr=1e-3, batch_size=8, precision="fp32")
    fixed = in_memory.train_in_memory(base, chunk, table, config)["losses"]
    base.reset()
    follows = in_memory.train_in_memory(base, chunk, table, config, every=2)["losses"]
    assert follows[:2] == fixed[:2] and follows[2:] != fixed[2:]
    assert all(abs(loss - np.log(2)) < 1e-3 for loss in follows[::2])
    assert all(abs(loss - np.log(2)) > 1e-3 for loss in fixed[2:])


def test_fine_tuning_raises_the_chosen_responses(pairs, base):
    chunk = real.drawn(pairs, 0, TWO)
    base.reset()
    before, config = base.score(chunk), TrainConfig(lr=3e-4, batch_size=8, precision="fp32", epochs=2)
    first = [chunk[i] for i in all_batches(len(chunk), config, 1)[0][1]]
    losses = in_memory.train_in_memory(base, chunk, None, config)["losses"]
    tokens = sum(len(p["chosen_ids"]) for p in first)
    assert losses[0] == pytest.approx(-before.lookup(first)[0].sum().item() / tokens, abs=1e-3)
    assert base.score(chunk).lookup(chunk)[0].mean() > before.lookup(chunk)[0].mean()


def test_a_table_of_another_model_is_refused(pairs, base):
    base.reset()
    table = base.score(pairs)
    table.rows["chosen"] += 3.
    cell = real.make_cell("DPO", 0, [("all", "S", "S")], dict(beta=0.3, lr=1e-4, batch_size=8), TWO, "x")
    with pytest.raises(ValueError, match="stage 1: the first loss is .* not of this model"): real.run_real_cell(cell, base, pairs, table)


def test_arms_that_begin_alike_share_the_stage_and_nothing_changes(pairs, monkeypatch):
    base = in_memory.load_S(WORLD.base, pairs, "fp32")
    table, made = base.score(pairs), []
    train = in_memory.train_in_memory
    monkeypatch.setattr(in_memory, "train_in_memory", lambda *a, **kw: made.append(1) or train(*a, **kw))
    def run(arm, draw=0, **settings):
        cell = real.make_cell(arm, draw, smollm2.ARMS[arm], dict(beta=0.3, lr=1e-4, batch_size=8) | settings, TWO, "x")
        row = real.run_real_cell(cell, base, pairs, table)
        assert row["settings"] == dict(cell.settings), "whatever was set is in the row, and in the key"
        return row
    run("sDPO")
    shared = run("sDPO, fixed reference")
    assert len(made) == 3, "stage 1 was trained once"
    base.begun.clear()
    assert run("sDPO, fixed reference") == shared and len(made) == 5
    assert run("sDPO, fixed reference", batch_size=16) != shared and len(made) == 7, "other settings begin otherwise"
    run("sDPO", draw=1); run("DPO", draw=1)
    assert len(base.begun) == real.KEPT and len(made) == 10


def test_the_small_design_is_fixed():
    design = real.design_of("smollm2_cpu", "x")
    assert [arm for arm in design.arms] == list(smollm2.CPU_ARMS) and list(design.draws) == [0, 1, 2]
    assert design.fixed == dict(beta=0.1, lr=1e-5, batch_size=16) and design.search(dict()) == []
    planned = design.plan([dict(key=design.start.key)])
    assert len(planned) == 1 + 4 * 3 and [cell.draw for cell in planned[1:5]] == [0] * 4


def test_keys_say_what_is_done_and_not_how_it_is_called():
    def key(arm="DPO", draw=0, stages=(("all", "S", "S"),), **settings): return real.make_cell(arm, draw, stages, settings, TWO, "x").key
    assert key(beta=0.1) == key("another", beta=0.1) and key("S", 0, ()) == key("S", 5, ())
    assert len({key(beta=0.1), key(beta=0.2), key(draw=1, beta=0.1), key(stages=(("uf", "S", "S"),), beta=0.1)}) == 4


# ---- the whole of it

def command(folder, data, *more):
    env = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1", SDPO_COMMIT="abc1234")
    words = ["rehearsal", "--folder", folder, "--data", data, "--model", WORLD.base, "--longest", "64", "--most", "60", "--precision", "fp32", *more]
    return subprocess.Popen([sys.executable, "-m", "sdpo_nb.experiments", *map(str, words)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def without_seconds(path): return [{k: v for k, v in row.items() if k != "seconds"} for row in timed.read_lines(path)[0]]


def test_the_command_is_killed_and_goes_on_to_the_same_rows(data, tmp_path):
    path, limit = tmp_path / "killed/rehearsal.jsonl", time.time() + 300
    process = command(tmp_path / "killed", data)
    while not (path.exists() and path.read_bytes().count(b"\n") >= 2) and process.poll() is None and time.time() < limit: time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_bytes()
    with open(path, "ab") as f: f.write(b'{"key": "torn')
    said = command(tmp_path / "killed", data).communicate(timeout=300)[0]
    assert path.read_bytes().startswith(before[:before.rfind(b"\n") + 1]), said
    command(tmp_path / "whole", data).communicate(timeout=300)
    rows = without_seconds(path)
    assert rows == without_seconds(tmp_path / "whole/rehearsal.jsonl") and len(rows) == 9, said
    assert {row["commit"] for row in rows} == {"abc1234"}
    left = {p.name for p in (tmp_path / "whole").rglob("*") if p.is_file() and not p.name.startswith("logprobs-")}
    assert left == {"ids.parquet", "rehearsal.jsonl", "kind.json", ".lock"}              # no model
    assert len(real.scored_pairs(tmp_path / "whole")) == len(real.read_ids(tmp_path / "whole/ids.parquet"))


def test_a_folder_keeps_its_length_its_number_of_pairs_and_its_precision(data, tmp_path):
    def call(longest=64, most=60, precision="fp32", name="rehearsal", minutes=0):
        return real.run_real(name, tmp_path, minutes, data, WORLD.base, precision, longest, most)
    call()
    with pytest.raises(ValueError, match="ids.parquet: made with longest = 64, not 32; use another folder"): call(longest=32)
    with pytest.raises(ValueError, match="made with most = 60, not None"): call(most=None)
    with pytest.raises(ValueError, match="made with longest = 64, not 384"): call(name="smollm2_cpu")
    path, table = tmp_path / "rehearsal.jsonl", sorted((tmp_path / "S").iterdir())
    path.write_text('{"key": "x", "precision": "bf16", "reads": "packed_logprobs"}\n')
    before = [file.read_bytes() for file in table]
    with pytest.raises(ValueError, match="has rows with precision = bf16, not fp32"): call()
    assert [file.read_bytes() for file in table] == before, "refused before S reads anything"
    pd.DataFrame(real.read_ids(tmp_path / "ids.parquet")).to_parquet(tmp_path / "ids.parquet")      # of an older version
    with pytest.raises(ValueError, match="made with longest = unknown"): call()


def test_a_draw_that_mixes_cards_or_precisions_is_left_out_and_missing():
    design = real.design_of("rehearsal", "x")
    planned = design.plan([dict(key=design.start.key)])
    made = [dict(key=cell.key, about="x", card="A", commit="c", precision="bf16", reads="packed", stages=[1] if cell.stages else []) for cell in planned]
    assert real.arrange("rehearsal", made).missing == 0
    for name, other in (("card", "B"), ("precision", "fp32"), ("reads", "padded")):
        found = real.arrange("rehearsal", [*made[:-1], made[-1] | {name: other}])
        assert list(found.left_out) == [1] and name in found.left_out[1] and found.missing == 4
        assert all(list(by_draw) == [0] for by_draw in found.rows.values())
    assert real.arrange("rehearsal", [made[0] | dict(card="B"), *made[1:]]).missing == 0, "S is trained on nothing"


def test_no_time_is_no_cell_and_a_wrong_name_is_a_usage(data, tmp_path):
    said = command(tmp_path, data, "--minutes", "0.001").communicate(timeout=300)[0]
    assert "0 new rows" in said and "1 cells are left" in said
    out = subprocess.run([sys.executable, "-m", "sdpo_nb.experiments", "smolm2", "--folder", "x"], capture_output=True, text=True)
    assert out.returncode and "smollm2|smollm2_cpu|which_is_easy|which_is_easy_cpu|rehearsal" in out.stderr


# ---- reading and deciding

def invented(draws=8, shift=0.):
    "Rows of a design whose answer is known: sDPO adds `shift` times more than DPO, in units of the signal."
    g, n = np.random.default_rng(0), 400
    truth = g.normal(0.4, 1., n)
    zero = dict(chosen=[0.] * n, rejected=[0.] * n)
    S = dict(pairs=list(range(n)), source=["orca", "uf"] * (n // 2), role=["validation" if i % 10 == 0 else "held out" for i in range(n)], models=[zero])
    def row(strength): return S | dict(models=[dict(chosen=(strength * truth + g.normal(0, 0.3, n)).tolist(), rejected=[0.] * n)])
    return S, {"DPO": {d: row(1.) for d in range(draws)}, "sDPO": {d: row(1. + shift) for d in range(draws)}}


def test_a_temperature_makes_scale_no_matter_and_finds_it():
    g = np.random.default_rng(0)
    delta = g.normal(0.5, 1., 2000)
    c = smollm2.fit_temperature(delta)
    assert smollm2.fit_temperature(7 * delta) == pytest.approx(c / 7, rel=1e-2) and smollm2.fit_temperature(-delta) == 0
    losses = [smollm2.log_losses(delta, x * c).mean() for x in (0.8, 1., 1.25)]
    assert losses[1] == min(losses) < np.log(2)


def test_equal_arms_are_equal_and_an_assay_that_shows_nothing_is_refused():
    S, rows = invented()
    asked = pd.DataFrame([("same", "sDPO", "DPO")], columns=["question", "a", "b"])
    answer = smollm2.answer_questions(rows, S, asked).iloc[0]
    assert answer["word"] == "equal" and answer["low"] < 0 < answer["high"] and answer["draws"] == 8
    assert smollm2.assay(rows, S)["counts"].all()
    nothing = {"DPO": {d: S for d in range(8)}}
    assert not smollm2.assay(nothing, S)["counts"].any()


def test_the_standard_error_of_a_crossed_design():
    "Of draws alone, of pairs alone: the textbook's."
    g = np.random.default_rng(0)
    draws, pairs = g.normal(0, 1, (8, 1)), g.normal(0, 1, 300)
    assert smollm2.crossed(np.repeat(draws, 300, 1))[1] == pytest.approx(draws.std(ddof=1) / 8**0.5, rel=1e-2)
    assert smollm2.crossed(np.repeat(pairs[None], 8, 0))[1] == pytest.approx(pairs.std(ddof=1) / 300**0.5, rel=1e-2)
    holes = np.where(g.random((8, 300)) < 0.5, np.nan, 1.)
    assert smollm2.crossed(holes) == (1., 0.)


def test_the_smallest_validation_loss_is_chosen_and_the_first_of_equals():
    S, rows = invented(1)
    good, none = rows["DPO"][0], S
    tried = [("A", dict(beta=1), none), ("A", dict(beta=2), good), ("A", dict(beta=3), good), ("B", dict(beta=1), none), ("B", dict(beta=2), none)]
    losses = [(arm, settings, smollm2.validation_loss(row, S)) for arm, settings, row in tried]
    assert smollm2.choose_settings(losses) == {"A": dict(beta=2), "B": dict(beta=1)}


def test_the_search_completes_the_plan(monkeypatch):
    monkeypatch.setattr(real, "validation_loss", lambda row, S: 0.)
    monkeypatch.setattr(real, "choose_settings", lambda tried: {arm: settings for arm, settings, _ in tried})
    design = real.design_of("smollm2", "x")
    assert [cell.arm for cell in design.plan([])] == ["S"]
    have = [dict(key=design.start.key)]
    search = design.plan(have)[1:]
    assert len(search) == 66 and {cell.draw for cell in search} == {smollm2.SEARCH_DRAW} and {cell.only for cell in search} == {"validation"}
    have += [dict(key=cell.key) for cell in search]
    assert len(design.plan(have[:-1])) == 67
    main = design.plan(have)[67:]
    assert len(main) == 11 * 8 and [cell.draw for cell in main[:12]] == [0] * 11 + [1]
    half = next(cell for cell in main if cell.arm == "DPO at beta/2")
    assert dict(half.settings) == dict(beta=0.5, lr=1e-5)


def test_rows_are_read_from_all_kinds_of_files_once(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir(); b.mkdir()
    (a / "toy.jsonl").write_text('{"key": "1", "from": "a"}\n{"key": "torn"')
    (b / "toy-2.jsonl.gz").write_bytes(gzip.compress(b'{"key": "1", "from": "b"}\n{"key": "2", "from": "b"}\n'))
    pd.DataFrame([dict(key="3", pairs=[1, 2])]).to_parquet(b / "toy-h200.parquet")
    (b / "toys.jsonl").write_text('{"key": "4"}\n')
    found = timed.read_results("toy", [a, tmp_path / "none", b])
    assert [(row["key"], row.get("from"), row["file"]) for row in found] == [("1", "a", "toy.jsonl"), ("2", "b", "toy-2.jsonl.gz"), ("3", None, "toy-h200.parquet")]
    assert list(found[2]["pairs"]) == [1, 2]


def test_a_torn_file_is_read_and_a_broken_one_is_named(tmp_path):
    torn = b'{"key": "1"}\n{"key": "2", "failed": 0}\n{"key": "3", "error": "no memory"}\n{"key": "4", "ga'
    (tmp_path / "toy.jsonl.gz").write_bytes(gzip.compress(torn))
    assert [row["key"] for row in timed.read_results("toy", [tmp_path])] == ["1", "2"]
    (tmp_path / "toy-2.jsonl").write_bytes(torn + b'{"key": "5"}\n')
    with pytest.raises(ValueError, match="toy-2.jsonl, line 4: not JSON"): timed.read_results("toy", [tmp_path])
    (tmp_path / "toy-2.jsonl").unlink()
    (tmp_path / "toy-2.jsonl.gz").write_bytes(gzip.compress(os.urandom(2000))[:-20])
    with pytest.raises(ValueError, match="toy-2.jsonl.gz: not a whole .gz"): timed.read_results("toy", [tmp_path])


def of_keys(keys): return lambda rows: [SimpleNamespace(key=key) for key in keys]


def test_a_folder_is_worked_in_by_one_call(tmp_path):
    "A second call would cut off the row that the first one has written meanwhile."
    def run(cell):
        with pytest.raises(ValueError, match="another process works in this folder"): timed.run_timed("x", of_keys("b"), lambda cell: {}, tmp_path)
        return {}
    assert [row["key"] for row in timed.run_timed("x", of_keys("a"), run, tmp_path)] == ["a"]


def test_a_cell_that_fails_is_tried_twice_and_the_others_go_on(tmp_path, capsys):
    ran = []
    def run(cell):
        ran.append(cell.key)
        if cell.key in "bfg": raise RuntimeError(f"{cell.key} is too large\nfor this card")
        return {}
    def call(keys, run=run):
        ran.clear()
        return timed.run_timed("x", of_keys(keys), run, tmp_path)
    with pytest.raises(ValueError, match="1 failed; .*RuntimeError: b is too large$"): call("abc")
    assert ran == ["a", "b", "c"] and "1 cells are left" in capsys.readouterr().out
    with pytest.raises(ValueError, match="1 failed"): call("abc")
    assert ran == ["b"] and "are left" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="1 failed"): call("abcd")
    assert ran == ["d"]
    with pytest.raises(ValueError, match="2 failed"): call("afge")
    assert ran == ["f", "g"], "two in a row: it is not the cell"
    path = tmp_path / "x.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "error" not in line))
    assert [row["key"] for row in call("abcd", lambda cell: {})] == ["a", "c", "d", "b"]


def test_no_minutes_are_no_cell_and_no_guess(tmp_path, capsys):
    assert timed.run_timed("x", of_keys("ab"), None, tmp_path, minutes=0) == []
    assert "2 cells are left of what is planned so far; call it again" in capsys.readouterr().out


def test_the_commit_is_that_of_the_package_and_says_what_was_changed(tmp_path, monkeypatch):
    monkeypatch.delenv("SDPO_COMMIT", raising=False)
    def git(*words): return subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True, text=True).stdout.strip()
    package = tmp_path / "venv/sdpo_nb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / ".gitignore").write_text("venv\n")
    git("init"); git("add", "."); git("commit", "-m", "somebody's project")
    monkeypatch.setattr(folder.sdpo_nb, "__file__", str(package / "__init__.py"))
    def told(): return timed.made_by("cpu")["commit"], folder.versions.__wrapped__()["sdpo_nb"]
    alone = metadata.version("sdpo_nb")
    assert told() == ("unknown", alone)
    git("add", "-f", "venv"); git("commit", "-m", "a checkout")
    head = git("rev-parse", "--short", "HEAD")
    assert told() == (head, f"{alone} at {head}")
    (package / "__init__.py").write_text("changed = 1\n")
    assert told() == (head + "+", f"{alone} at {head}+")


def test_a_processor_has_a_name_and_its_instructions():
    name = timed.card_name("cpu")
    assert name.startswith("CPU, ") and name.endswith(torch.backends.cpu.get_cpu_capability()) and name.count(",") >= 2


def test_a_cell_that_may_not_end_in_time_is_not_begun(tmp_path):
    clock, ran = SimpleNamespace(now=0.), []
    cells = [SimpleNamespace(key=str(i), cost=cost) for i, cost in enumerate((1, 1, 4, 1))]
    def run(cell): ran.append(cell.key); clock.now += (40 if cell.key == "0" else 10) * cell.cost; return {}
    def call(minutes): timed.run_timed("x", lambda rows: cells, run, tmp_path, minutes, used=lambda: clock.now)
    call(1.6)                                            # 50 of 96 s are gone, and the third may need 4 x 12
    assert ran == ["0", "1"]
    clock.now = 0.
    call(2)
    assert ran == ["0", "1", "2", "3"]


def test_a_link_is_not_written_through(tmp_path):
    (tmp_path / "other").write_text("")
    (tmp_path / "x.jsonl").symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match="is a link"): timed.run_timed("x", lambda rows: [], None, tmp_path)


def test_which_is_easy_orders_by_its_own_measure():
    "A source of short chosen responses is easy by the sum and hard per token."
    S = dict(source=["orca", "uf", "hh"] * 20, role=["pool"] * 60, chosen_tokens=[1, 4, 4] * 20, rejected_tokens=[4, 4, 1] * 20,
             models=[dict(chosen=[-3., -4., -9.] * 20, rejected=[-8., -4., -8.] * 20)])
    arms = real.easy_arms(S)
    def names(arm): return [name for name, _, _ in arms[arm]]
    assert names("sum") == ["orca", "uf", "hh"] and names("per token") == ["hh", "uf", "orca"] == names("sum, hard first")
    assert arms["DPO"] == [("all", "S", "S")] and [r for _, _, r in arms["sum"]] == ["S", "before", "before"]


def test_the_small_version_of_which_is_easy_has_three_arms():
    design = real.design_of("which_is_easy_cpu", "x")
    planned = design.plan([dict(key=design.start.key)])
    assert [(cell.arm, cell.draw) for cell in planned[1:]] == [(arm, draw) for draw in range(3) for arm in ("DPO", "sum", "per token")]
    assert [len(cell.stages) for cell in planned[1:4]] == [1, 3, 3] and all(dict(cell.settings) == smollm2.CPU_SETTINGS for cell in planned[1:])


def test_a_cross_fitted_gain_never_uses_a_temperature_that_saw_the_pair():
    n, g = 200, np.random.default_rng(0)
    S = dict(pairs=list(range(n)), source=["orca"] * n, role=["pool"] * (n - 20) + ["validation"] * 20, models=[dict(chosen=[0.] * n, rejected=[0.] * n)])
    delta = g.normal(0.5, 1., n)
    def gain(delta): return smollm2.outcome_of(S | dict(models=[dict(chosen=delta.tolist(), rejected=[0.] * n)]), S, "cross-fitted gain").to_numpy()
    before, moved = gain(delta), delta.copy()
    moved[10] += 5.
    changed = np.flatnonzero(np.abs(gain(moved) - before) > 1e-9)
    assert len(before) == n - 20 and set(changed) == {10, *range(1, n - 20, 2)}, "the even half has its c from the odd one"
    moved[n - 20:] += 5.
    assert (gain(moved)[20:] == gain(np.where(np.arange(n) < n - 20, moved, delta))[20:]).all(), "settings were chosen by the validation pairs"


def test_beside_the_answers_stand_the_draws_that_measured_the_kl():
    S, rows = invented(3)
    for row in rows["DPO"].values(): row["stages"] = [dict(chunk="all", losses=[0.7, 0.6, 0.5])]
    S["chosen_tokens"] = S["rejected_tokens"] = [1] * len(S["pairs"])
    S["source"] = ["orca", "uf", "hh", "uf"] * (len(S["pairs"]) // 4)
    rows["DPO"][1]["kl"], rows["DPO"][2]["kl"] = [0.2, 0.4], [0.5]
    beside = smollm2.secondary_outcomes(dict(DPO=rows["DPO"]), S).loc["DPO"]
    assert beside["KL of 48 tokens (nats)"] == pytest.approx(0.4) and beside["draws with a KL"] == 2


def test_nothing_is_concluded_before_the_last_cell():
    answers = pd.DataFrame([dict(question="q", mean=0.1, low=0., high=0.2, p=0.1, holm=0.2, p_equal=0.3, holm_equal=0.4, word="x", says="y")])
    assert smollm2.without_words_before_the_end(answers, 0).equals(answers)
    for missing in (1, None): assert list(smollm2.without_words_before_the_end(answers, missing)) == ["question", "mean", "low", "high"]
