"""
Malformed input in hundreds of ways, through the command line. For each case a test says which of three answers is right: one line that names what
is to blame (exit status 2), a count of what was dropped, or the input is good and is read as it stands. Never a traceback, never silence.

What is combined with what is drawn with random.Random(0). The cheapest command that meets the input is asked; `sdpo data` loads no model.
"""
import contextlib, gzip, hashlib, json, os, random, shutil, sys
from dataclasses import dataclass, fields
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch, yaml
from datasets import Dataset, DatasetDict

import sdpo_nb.logprobs as logprobs, sdpo_nb.report as report, sdpo_nb.trainer as trainer
from sdpo_nb import cli
from sdpo_nb.stepwise import StepwiseConfig
from sdpo_nb.world import load_world
from tiny import metrics, rows, write_jsonl

BASE = load_world().base
RNG = random.Random(0)
CASES = {}  # family -> cases


@dataclass
class Case:
    name: str
    make: object    # tmp -> words of a command
    want: object    # (tmp, status, out, err) -> nothing, or an AssertionError


def family(name):
    "A function that yields cases, as a family of tests."
    def add(f):
        CASES[name] = list(f())
        return f
    return add


def params(name): return pytest.mark.parametrize("case", CASES[name], ids=[c.name for c in CASES[name]])


@pytest.fixture
def ask(monkeypatch, capsys, tmp_path):
    "Run a case and judge the answer."
    def call(case, tmp=tmp_path):
        words = [str(w) for w in case.make(tmp)]
        monkeypatch.setattr(sys, "argv", ["sdpo", *words])
        monkeypatch.delenv("SDPO_TRACEBACK", raising=False)
        capsys.readouterr()
        try: cli.main(); status = 0
        except SystemExit as e: status = e.code or 0
        out, err = capsys.readouterr()
        print(f"sdpo {' '.join(words)}\nstatus {status}\n{out}\n{err}")
        assert "Traceback" not in out + err
        case.want(tmp, status, out, err)
    return call


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "The tokenizer of the tiny world is read once, figures are drawn at once, and nothing here may train."
    load, known = logprobs.load_tokenizer, {}
    def cached(model, revision=None):
        if model != BASE: return load(model, revision)
        return known.setdefault(BASE, load(BASE)) if not known else known[BASE]
    monkeypatch.setattr(logprobs, "load_tokenizer", cached)
    monkeypatch.setattr(report, "_drawn", lambda *a: {name: plt.figure(figsize=(1, 1)) for name in ("loss", "gamma", "drift")})


# ---- the three answers

def refused(*parts, anyway=()):
    "Status 2 and one line with all of these in it; TMP is the case's folder."
    def want(tmp, status, out, err):
        assert status == 2, f"status {status}"
        lines = [line for line in err.splitlines() if line.strip()]
        assert len(lines) == 1 and (lines[0].startswith("sdpo: ") or lines[0].startswith("sdpo ") and ": error: " in lines[0]), f"{len(lines)} lines"
        for part in parts:
            some = part if isinstance(part, tuple) else (part,)
            assert any(p.replace("TMP", str(tmp)) in lines[-1] for p in some), f"{' or '.join(some)} is not named"
    return want


def reads(n, *shown, used=None, dropped=""):
    "Status 0, so many rows read and used, and this is shown; whatever was dropped is counted."
    def want(tmp, status, out, err):
        assert status == 0 and not err, f"status {status}"
        counted = f"{n} rows read, {n if used is None else used} used"
        assert counted + (f", dropped: {dropped}" if dropped else "") in out and ("dropped" in out) == bool(dropped)
        for part in shown: assert part in out, f"{part} is not shown"
    return want


def either(*wants):
    "One of these answers: what `datasets` can read differs with its version."
    def want(*said):
        wrong = []
        for one in wants:
            try: return one(*said)
            except AssertionError as e: wrong.append(e)
        raise wrong[0]
    return want


def drops(n, **why):
    lost = sum(why.values())
    return reads(n, used=n - lost, dropped=", ".join(f"{k} {reason}" for reason, k in why.items()))


def data(*sources, words=()): return ["data", "--model", BASE, "--sources", *sources, *words]


def with_setting(name, tmp, words):
    "The cheapest command that looks at a setting: a tracker is only begun by a run."
    found = data(*lines(tmp, PLAIN), words=words)
    return ["run", *found[1:], "--folder", tmp / "run", "--precision", "fp32"] if name == "log_with" else found


# ---- one field of one row

def user(x): return {"role": "user", "content": x}
def assistant(x): return {"role": "assistant", "content": x}


PLAIN = [dict(prompt=f"copy a{c}", chosen=f"a{c}", rejected=f"{c}a") for c in "bcdefg"]
CHAT = [dict(prompt=[user(r["prompt"])], chosen=[assistant(r["chosen"])], rejected=[assistant(r["rejected"])]) for r in PLAIN]
VALUES = {
    "nothing": [None],
    "empty": [""],
    "blank": [" ", "\n\t", "\u00a0 "],
    "end": ["<|end|>", " <|end|>\n"],
    "text": ["xyz 12", "2024-01-01", "None", "null", "nan", "0", "true", "\U0001f642\u00e9", "x\x00y", "\ufeffxyz", "x\u2028y", "{{ m }}", "{% raise %}", "<|user|>xyz", "x" * 3000, "\u202exyz", "[1, 2]"],
    "half": ["\ud800", "xyz \udfff", "\ud83d xyz"],
    "number": [0, 1, -1, 3.5, float("nan"), float("inf"), 10**30, True, False],
    "object": [{}, {"text": "x"}, user("x"), {"0": "x"}],
    "list": [["x"], [1], [None], [[]], [["user", "x"]], [[user("x")]], [{}], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": None}], [{"role": None, "content": "x"}],
             [{"role": 1, "content": "x"}], [{"role": "user", "content": 5}], [{"role": "user", "content": ["x"]}], [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
             [{"from": "human", "value": "x"}], [{"Role": "user", "Content": "x"}], [user("x"), None], [user("x"), "y"]],
    "no turns": [[]],
    "asked": [[user("xyz")]],
    "answered": [[user("x"), assistant("xyz")]],
    "answer": [[assistant("xyz")]],
    "blank answer": [[assistant("")], [assistant(" \n")], [assistant("<|end|>")]],
    "half a turn": [[user("\ud800")], [assistant("x\udfff")]],
    "lost": [[assistant("xyz") | {"tool_calls": [{"name": "f"}]}], [assistant("xyz") | {"reasoning_content": "so"}], [assistant("xyz") | {"images": ["a.png"]}]],
}
WRONG = {"half", "number", "object", "list", "half a turn", "lost"}     # in whatever field
STRINGS = {"empty", "blank", "end", "text"}


def of_field(chat, field, kind, at):
    "The right answer for a field of row `at` that holds a value of this kind."
    n, row = len(PLAIN), f"row {at}" if at or kind in WRONG else ("row 0", "row 1")   # where the first row is odd, the second may be blamed
    error, good = refused("TMP/a.jsonl", row, f"'{field}"), reads(n, "conversations" if chat or field in ("system", "messages") and kind not in ("nothing",) else "plain text")
    if field in ("chosen", "rejected") and kind in ("nothing", "no turns"): error = refused("TMP/a.jsonl", f"row {at}", f"'{field}'")
    if kind in WRONG: return error
    if field == "system": return good if kind in STRINGS | {"nothing"} else error
    if field == "messages" and kind in ("nothing", "no turns", "answered", "answer", "blank answer"): return good
    if field == "messages": return refused(("TMP/a.jsonl", "source 'a'"), f"row {at}", "'messages")
    if field == "prompt" and not chat:
        if kind == "empty": return drops(n, no_prompt=1)
        return good if kind in STRINGS else refused("TMP/a.jsonl", row, ("'prompt'", "'chosen'"))
    if field == "prompt": return good if kind in ("asked", "answered", "answer", "blank answer") else error
    if not chat: return drops(n, empty=1) if kind in ("empty", "blank", "end") else good if kind == "text" else refused("TMP/a.jsonl", row, ("'chosen'", "'rejected'"))
    if kind == "answer": return good
    if kind == "blank answer": return drops(n, empty=1)
    return refused(("TMP/a.jsonl", "source 'a'"), f"row {at}" if kind in ("asked", "answered") else row, ("'chosen'", "'rejected'"))


@family("rows")
def one_field():
    every = [(chat, field, kind, i) for chat in (False, True) for field in ("prompt", "chosen", "rejected", "system", "messages") for kind, values in VALUES.items() for i in range(len(values))]
    for chat, field, kind, i in RNG.sample(every, 220):
        at = RNG.choice([0, 1, 2, 2])
        def make(tmp, chat=chat, field=field, value=VALUES[kind][i], at=at):
            made = [dict(r) for r in (CHAT if chat else PLAIN)]
            made[at][field] = value
            return data(f"a={write_jsonl(tmp / 'a.jsonl', made)}")
        yield Case(f"{'chat' if chat else 'plain'}-{field}-{kind}-{i}-row{at}", make, of_field(chat, field, kind, at))


# ---- whole rows and schemas

def lines(tmp, made, name="a.jsonl"): return [f"a={write_jsonl(tmp / name, made)}"]


def plain(at=None, row=None):
    made = [dict(r) for r in PLAIN]
    if at is not None: made[at] = row
    return made


@family("schemas")
def schemas():
    def case(name, made, want, *words): return Case(name, lambda tmp: data(*lines(tmp, made), words=words), want)
    renamed = [dict(question=r["prompt"], good=r["chosen"], bad=r["rejected"]) for r in PLAIN]
    for name, row in dict(null=None, number=1, text="x", list=[1], true=True, empty={}, strange={"a": 1}).items():
        yield case(f"row is {name}", plain(2, row), refused("TMP/a.jsonl", "row 2"))
    for field in ("chosen", "rejected"):
        yield case(f"no {field} in one row", plain(2, {k: v for k, v in PLAIN[2].items() if k != field}), refused("TMP/a.jsonl", "row 2", f"'{field}'"))
        yield case(f"no {field} at all", [{k: v for k, v in r.items() if k != field} for r in PLAIN], refused("TMP/a.jsonl", "row 0", f"'{field}'", "columns"))
        yield case(f"{field} is written {field.upper()}", [{k.upper() if k == field else k: v for k, v in r.items()} for r in PLAIN], refused("TMP/a.jsonl", "row 0", f"'{field}'", field.upper()))
    yield case("no prompt at all is an implicit prompt", [dict(chosen="copy ab: ab", rejected="copy ab: ba")] * 3, reads(3, "copy ab:"))
    yield case("prompt under another name", [dict(question=r["prompt"], chosen=r["chosen"], rejected=r["rejected"]) for r in PLAIN], refused("TMP/a.jsonl", "row 0", "'prompt'", "question"))
    yield case("other names", renamed, refused("TMP/a.jsonl", "row 0", "'chosen'", "good", "columns"))
    yield case("other names renamed", renamed, reads(6, "copy ab"), "--columns", "question=prompt", "good=chosen", "bad=rejected")
    yield case("swapped by columns", PLAIN, reads(6, ">>> chosen: ba"), "--columns", "chosen=rejected", "rejected=chosen")
    yield case("a column that is not there", PLAIN, refused("TMP/a.jsonl", "nope"), "--columns", "nope=system")
    yield case("two columns get one name", [r | dict(q="x") for r in renamed], refused("TMP/a.jsonl", "'prompt'"), "--columns", "question=prompt", "q=prompt", "good=chosen", "bad=rejected")
    for word in ("question", "=prompt", "question=", "=", ""): yield case(f"--columns {word!r}", renamed, refused("--columns", repr(word)), "--columns", word)
    yield case("--columns twice", renamed, refused("--columns", "question"), "--columns", "question=prompt", "question=system")
    yield case("only one side differs in kind", plain(2, dict(prompt="copy ad", chosen="ad", rejected=[assistant("da")])), refused("TMP/a.jsonl", "row 2", "'rejected'"))
    yield case("chat among plain", plain(2, CHAT[2]), refused("TMP/a.jsonl", "row 2"))
    yield case("plain among chat", [*CHAT[:2], PLAIN[2], *CHAT[3:]], refused("TMP/a.jsonl", "row 2"))
    yield case("single dicts", [dict(prompt=user("x"), chosen=assistant("y"), rejected=assistant("z"))], refused("TMP/a.jsonl", "row 0", "'prompt'"))
    yield case("ShareGPT", [dict(conversations=[{"from": "human", "value": "x"}], chosen={"from": "gpt", "value": "y"}, rejected={"from": "gpt", "value": "z"})], refused("TMP/a.jsonl", "row 0", "'chosen'"))
    yield case("Alpaca", [dict(instruction="copy", input="ab", chosen="ab", rejected="ba")], refused("TMP/a.jsonl", "row 0", "'prompt'", "instruction"))
    yield case("Alpaca renamed", [dict(instruction="copy", input="ab", chosen="ab", rejected="ba")], refused("TMP/a.jsonl", "row 0", "'input'"), "--columns", "instruction=prompt")
    for lost in ("tools", "images", "videos", "audio", "functions"): yield case(f"{lost} in one row", plain(2, PLAIN[2] | {lost: ["x"]}), refused("TMP/a.jsonl", "row 2", f"'{lost}'"))
    yield case("KTO", [dict(prompt="x", completion="y", label=True)], refused("TMP/a.jsonl", "row 0", "'chosen'"))
    yield case("SFT", [dict(messages=[user("x"), assistant("y")])], refused("TMP/a.jsonl", "row 0", "'chosen'"))
    yield case("all equal", [r | dict(rejected=r["chosen"]) for r in PLAIN], refused("'a'", "6 rows", "equal"))
    yield case("all empty", [r | dict(chosen="") for r in PLAIN], refused("'a'", "6 rows", "empty"))
    yield case("two equal, one empty", plain()[:3] + [r | dict(rejected=r["chosen"]) for r in PLAIN[3:5]] + [PLAIN[5] | dict(chosen=" ")], drops(6, empty=1, equal=2))
    yield case("equal conversations", CHAT[:4] + [r | dict(rejected=r["chosen"]) for r in CHAT[4:]], drops(6, equal=2))
    yield case("duplicates", PLAIN + PLAIN[:2], reads(8, "2 pairs of a occur more than once"))
    inside = [dict(r, chosen=f"{r['prompt']} {r['chosen']}", rejected=f"{r['prompt']} {r['rejected']}") for r in PLAIN]
    yield case("prompt inside both strings", inside, reads(6, "warning: both responses of 6 pairs of a begin with the prompt", "leave the prompt column out"))
    yield case("prompt inside both answers of a chat", inside, reads(6, "begin with the prompt, so it is read twice; take it out of them"), "--chat")
    yield case("both labels", PLAIN + [dict(PLAIN[0], chosen="ba", rejected="ab")], reads(7, "2 pairs of a occur with the opposite label"))
    yield case("extra fields of every kind", [r | dict(id=i if i % 2 else str(i), meta={"a": [i]}, score_chosen=None) for i, r in enumerate(PLAIN)], reads(6, "copy ab"))
    yield case("no room", plain(2, dict(prompt="x" * 30, chosen="y" * 40 + "1", rejected="y" * 40 + "2")), drops(6, no_room=1), "--max-length", "32")
    yield case("cut", plain(2, dict(prompt="x", chosen="y" * 40, rejected="z")), reads(6, "1 cut"), "--max-length", "32")
    yield case("messages as text", [dict(prompt="x", chosen=str([assistant("y")]), rejected=str([assistant("z")]))], refused("TMP/a.jsonl", "row 0", "'chosen'"))
    yield case("turns in a wrong order", [r | dict(chosen=[assistant("x"), user("y")]) for r in CHAT], refused(("TMP/a.jsonl", "source 'a'"), "row 0", "'chosen'"))
    yield case("whole conversations that part early", [dict(chosen=[user("x"), assistant("1"), user("y"), assistant("2")], rejected=[user("x"), assistant("3"), user("y"), assistant("4")])], refused("'a'", "row 0", "'chosen'"))
    yield case("whole conversations", [dict(chosen=[*r["prompt"], *r["chosen"]], rejected=[*r["prompt"], *r["rejected"]]) for r in CHAT], reads(6, "<|user|>copy ab<|end|><|assistant|>\n>>> chosen: ab"))
    yield case("another answer in messages", [dict(r, messages=[user(r["prompt"]), assistant("other")]) for r in PLAIN], refused("'a'", "row 0", "'messages'"))
    yield case("10,000 keys", plain(2, PLAIN[2] | {f"k{i}": i for i in range(10_000)}), reads(6))
    yield case("--max-pairs 0", PLAIN, refused("max_pairs"), "--max-pairs", "0")
    yield case("--max-pairs -1", PLAIN, refused("'a'", "max_pairs"), "--max-pairs", "-1")
    yield case("--max-pairs 4", PLAIN, reads(4), "--max-pairs", "4")
    yield case("--max-pairs x", PLAIN, refused("--max-pairs"), "--max-pairs", "x")
    yield case("--max-pairs beyond", PLAIN, reads(6), "--max-pairs", "100")
    yield case("--chat", PLAIN, reads(6, "<|user|>copy ab<|end|><|assistant|>"), "--chat")
    yield case("--split of a file", PLAIN, reads(6), "--split", "train")


# ---- files

TEXT_LINES = "".join(json.dumps(r) + "\n" for r in PLAIN)
CSV = "prompt,chosen,rejected\n" + "".join(f"{r['prompt']},{r['chosen']},{r['rejected']}\n" for r in PLAIN)


def saved(kind):
    "Bytes of the plain rows in a binary format, made when they are asked for."
    def make(tmp):
        d, p = Dataset.from_list(PLAIN), tmp / "whole" / kind
        p.parent.mkdir(exist_ok=True)
        if kind == "parquet": d.to_parquet(str(p)); return p.read_bytes()
        d.save_to_disk(str(p))
        return next(p.glob("*.arrow")).read_bytes()
    return make


def damaged(content, how, rng):
    "Bytes, damaged."
    n = len(content)
    if how == "empty": return b""
    if how == "cut": return content[:rng.randrange(n // 4, 3 * n // 4)]
    if how == "garbage": return rng.randbytes(max(n // 2, 64))
    if how == "null": return b"null"
    if how == "zeros": return bytes(n)
    if how == "pointer": return b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    if how == "twice": return content + content
    if how == "number":                  # a bit of a log-probability: the numbers of the first column stand at the beginning of a table
        i = rng.randrange(40, 80)
        return content[:i] + bytes([content[i] ^ 64]) + content[i+1:]
    if how == "hole":                    # a block of the disk is lost
        i = rng.randrange(n // 2, 3 * n // 4)
        return content[:i] + bytes(len(content[i:i+4096])) + content[i+4096:]
    if how == "flip":
        i = rng.randrange(n)
        return content[:i] + bytes([content[i] ^ (128 if content[i] < 128 else 1)]) + content[i+1:]
    raise KeyError(how)


@family("files")
def files():
    def case(name, file, content, want, *words):
        def make(tmp):
            (tmp / file).write_bytes(content(tmp) if callable(content) else content if isinstance(content, bytes) else content.encode())
            return data(f"a={tmp / file}", words=words)
        return Case(name, make, want)
    at = lambda n: refused("TMP/a.jsonl", f"row {n}")
    good = reads(6, "copy ab")
    for encoding in ("utf-16", "utf-16-le", "utf-32"): yield case(encoding, "a.jsonl", TEXT_LINES.encode(encoding), refused("TMP/a.jsonl"))
    yield case("latin-1", "a.jsonl", '{"prompt": "caf\u00e9", "chosen": "a", "rejected": "b"}\n'.encode("latin-1"), refused("TMP/a.jsonl"))
    yield case("UTF-8 with a mark", "a.jsonl", TEXT_LINES.encode("utf-8-sig"), good)
    yield case("CRLF", "a.jsonl", TEXT_LINES.replace("\n", "\r\n"), good)
    yield case("blank lines", "a.jsonl", "\n" + TEXT_LINES.replace("\n", "\n\n"), good)
    yield case("no last line feed", "a.jsonl", TEXT_LINES.rstrip(), good)
    yield case("cut in the last line", "a.jsonl", TEXT_LINES[:-20], at(5))
    yield case("cut in the first line", "a.jsonl", TEXT_LINES[:20], at(0))
    yield case("a comma after every row", "a.jsonl", TEXT_LINES.replace("}\n", "},\n"), at(0))
    yield case("two rows a line", "a.jsonl", TEXT_LINES.replace("}\n", "} ", 1), at(0))
    yield case("comments", "a.jsonl", "# rows\n" + TEXT_LINES, at(0))
    yield case("single quotes", "a.jsonl", str(PLAIN[0]), at(0))
    yield case("a list", "a.jsonl", json.dumps(PLAIN), at(0))
    yield case("pretty", "a.jsonl", json.dumps(PLAIN[0], indent=1), at(0))
    yield case("HTML", "a.jsonl", "<!DOCTYPE html><html><body>404</body></html>", at(0))
    yield case("a key twice", "a.jsonl", '{"prompt": "copy ab", "chosen": "ab", "chosen": "xy", "rejected": "ba"}\n', refused("TMP/a.jsonl", "row 0", "'chosen'"))
    yield case("zeros in the middle", "a.jsonl", TEXT_LINES.encode()[:150] + bytes(50) + TEXT_LINES.encode()[200:], refused("TMP/a.jsonl", "row"))
    yield case("deep", "a.jsonl", TEXT_LINES + '{"prompt": ' + "[" * 100_000, at(6))
    yield case("a long number", "a.jsonl", TEXT_LINES + '{"prompt": ' + "1" * 10_000 + "}", at(6))
    yield case("CSV as JSONL", "a.jsonl", CSV, at(0))
    yield case("gz as JSONL", "a.jsonl", gzip.compress(TEXT_LINES.encode()), refused("TMP/a.jsonl"))
    for how in ("empty", "garbage", "null", "zeros", "pointer"): yield case(f"JSONL {how}", "a.jsonl", lambda tmp, how=how: damaged(TEXT_LINES.encode(), how, random.Random(how)), refused("TMP/a.jsonl"))
    yield case("JSONL flip", "a.jsonl", lambda tmp: damaged(TEXT_LINES.encode(), "flip", random.Random(1)), refused("TMP/a.jsonl"))
    yield case("JSONL of spaces", "a.jsonl", " \n\t\n\n", refused("TMP/a.jsonl", "no rows"))
    yield case("JSON list", "a.json", json.dumps(PLAIN), good)
    yield case("JSON list with a mark", "a.json", json.dumps(PLAIN).encode("utf-8-sig"), good)
    yield case("JSON list after blanks", "a.json", "\n  " + json.dumps(PLAIN, indent=1), good)
    yield case("JSON lines", "a.json", TEXT_LINES, good)
    yield case("JSON empty list", "a.json", "[]", refused("TMP/a.json", "no rows"))
    yield case("JSON list cut", "a.json", json.dumps(PLAIN)[:-30], refused("TMP/a.json"))
    yield case("JSON list of strings", "a.json", '["a", "b"]', refused("TMP/a.json", "row 0"))
    yield case("JSON list of lists", "a.json", '[[1], [2]]', refused("TMP/a.json", "row 0"))
    yield case("JSON list with null", "a.json", json.dumps(plain(2, None)), refused("TMP/a.json", "row 2"))
    yield case("JSON wrapped", "a.json", json.dumps(dict(data=PLAIN)), refused("TMP/a.json", "row 0"))
    yield case("JSON columns", "a.json", json.dumps({k: [r[k] for r in PLAIN] for k in PLAIN[0]}), refused("TMP/a.json", "row 0"))
    yield case("JSON wrapped, indented", "a.json", json.dumps(dict(data=PLAIN), indent=1), refused("TMP/a.json"))
    yield case("JSON number", "a.json", "5", refused("TMP/a.json", "row 0"))
    yield case("gz", "a.jsonl.gz", gzip.compress(TEXT_LINES.encode()), good)
    yield case("gz cut", "a.jsonl.gz", gzip.compress(TEXT_LINES.encode())[:-20], refused("TMP/a.jsonl.gz"))
    yield case("gz that is none", "a.jsonl.gz", TEXT_LINES, refused("TMP/a.jsonl.gz"))
    yield case("gz of nothing", "a.jsonl.gz", gzip.compress(b""), refused("TMP/a.jsonl.gz", "no rows"))
    for how in ("empty", "garbage", "flip"): yield case(f"gz {how}", "a.jsonl.gz", lambda tmp, how=how: damaged(gzip.compress(TEXT_LINES.encode(), mtime=0), how, random.Random(4)), refused("TMP/a.jsonl.gz"))
    for kind in ("parquet", "arrow"):
        yield case(f"{kind}", f"a.{kind}", saved(kind), good)
        for how in ("empty", "cut", "garbage", "null", "zeros", "pointer"):
            yield case(f"{kind} {how}", f"a.{kind}", lambda tmp, kind=kind, how=how: damaged(saved(kind)(tmp), how, random.Random(0)), refused(f"TMP/a.{kind}"))
        yield case(f"JSONL as {kind}", f"a.{kind}", TEXT_LINES, refused(f"TMP/a.{kind}"))
        yield case(f"{kind} in gz", f"a.{kind}.gz", lambda tmp, kind=kind: gzip.compress(saved(kind)(tmp)), either(refused(f"TMP/a.{kind}.gz"), reads(6)))
    yield case("parquet as arrow", "a.arrow", saved("parquet"), refused("TMP/a.arrow"))
    yield case("arrow as parquet", "a.parquet", saved("arrow"), refused("TMP/a.parquet"))
    yield case("CSV", "a.csv", CSV, good)
    yield case("CSV with a mark", "a.csv", CSV.encode("utf-8-sig"), good)
    yield case("CSV without a header", "a.csv", CSV.split("\n", 1)[1], refused("TMP/a.csv", "row 0", "'chosen'"))
    yield case("CSV with semicolons", "a.csv", CSV.replace(",", ";"), refused("TMP/a.csv", "row 0", "'chosen'"))
    yield case("CSV with tabs", "a.csv", CSV.replace(",", "\t"), refused("TMP/a.csv", "row 0", "'chosen'"))
    yield case("CSV with a field too many", "a.csv", CSV + "x,y,z,more\n", refused("TMP/a.csv", "row 6 (line 8)", "4 cells"))
    yield case("CSV with a field too many in every row", "a.csv", CSV.replace("\n", ",more\n").replace("rejected,more", "rejected"), refused("TMP/a.csv", "row 0 (line 2)", "4 cells"))
    yield case("CSV with a name twice", "a.csv", CSV.replace("prompt,chosen", "chosen,chosen"), refused("TMP/a.csv", "'chosen' twice"))
    yield case("CSV with blank lines", "a.csv", "\n" + CSV.replace("\n", "\n\n"), good)
    yield case("CSV of old line ends", "a.csv", CSV.replace("\n", "\r"), good)
    yield case("CSV with a field too few", "a.csv", CSV + "x,y\n", refused("TMP/a.csv", "row 6", "'rejected'"))
    yield case("CSV with an open quote", "a.csv", CSV + 'x,"y,z\n', refused("TMP/a.csv", "row 6 (line 8)"))
    yield case("CSV with an empty cell", "a.csv", CSV.replace("ad,da", ",da"), refused("TMP/a.csv", "row 2", "'chosen'"))
    yield case("CSV words for nothing", "a.csv", "prompt,chosen,rejected\nx,None,NA\ny,null,nan\n", reads(2, ">>> chosen: <unk>one", ">>> rejected: nan"))
    yield case("CSV of numbers", "a.csv", "prompt,chosen,rejected\n1,2,3\n4,005,6\n", reads(2, ">>> chosen: 2"))     # every cell is text
    yield case("CSV in UTF-16", "a.csv", CSV.encode("utf-16"), refused("TMP/a.csv"))
    yield case("CSV of messages", "a.csv", 'prompt,chosen,rejected\nx,"[{\'role\': \'assistant\', \'content\': \'y\'}]","[{\'role\': \'assistant\', \'content\': \'z\'}]"\n', refused("TMP/a.csv", "row 0", "'chosen'"))
    yield case("CSV without rows", "a.csv", "prompt,chosen,rejected\n", refused("TMP/a.csv"))
    for how in ("empty", "garbage", "zeros"): yield case(f"CSV {how}", "a.csv", lambda tmp, how=how: damaged(CSV.encode(), how, random.Random(0)), refused("TMP/a.csv"))
    yield case("CSV in gz", "a.csv.gz", gzip.compress(CSV.encode()), good)
    for file in ("a.txt", "a.tsv", "a.xlsx", "a.jsonl.bz2", "a.jsonl.zip", "a.pkl", "a", "jsonl", "a.jsonl.bak", "a.yaml"): yield case(f"file {file}", file, TEXT_LINES, refused(f"TMP/{file}", "cannot read"))
    for file in ("A.JSONL", "a b.jsonl", "\u00e4\U0001f642.jsonl", "a[1].jsonl", "a*.jsonl", "a?.jsonl", "a{1,2}.jsonl", "a%20.jsonl", "a=b.jsonl", "~a.jsonl", "-a.jsonl", "a'\".jsonl", "a.b.jsonl"):
        yield case(f"file name {file}", file, TEXT_LINES, good)
    for kind, content in (("csv", CSV), ("parquet", saved("parquet")), ("arrow", saved("arrow"))):
        for name in ("a[1]", "a*", "a?", "a**", "[ab]"):
            def make(tmp, kind=kind, content=content, name=name):
                for other in ("a1", "ab", "a", "b"): (tmp / f"{other}.{kind}").write_bytes(saved("parquet")(tmp)[:9])
                (tmp / f"{name}.{kind}").write_bytes(content(tmp) if callable(content) else content.encode())
                return data(f"a={tmp / name}.{kind}")
            yield Case(f"file name {name}.{kind}", make, good)


# ---- paths, source names and folders

@family("places")
def places():
    def case(name, make, want, *words): return Case(name, lambda tmp: data(*make(tmp), words=words), want)
    for path in ("nowhere.jsonl", "./nowhere", "/nowhere/a.parquet", "~/nowhere-at-all", "a/b/c", "../nowhere.csv", "nobody/nothing", "nothing", "a b", "", "https://example.org/a.jsonl", "s3://bucket/a.jsonl", "hf://datasets/x"):
        yield case(f"no {path or 'path'}", lambda tmp, path=path: [f"a={path}"], refused(path or "--sources", "a"))
    for word in ("=x.jsonl", "=", "a=", ""): yield case(f"source {word!r}", lambda tmp, word=word: [word], refused("--sources" if word else "''"))
    yield case("one name twice", lambda tmp: [*lines(tmp, PLAIN), *lines(tmp, PLAIN)], refused("--sources", "'a'"))
    yield case("one stem twice", lambda tmp: [write_jsonl(tmp / "a.jsonl", PLAIN), write_jsonl(tmp / "a.json", PLAIN)], refused("--sources", "'a'"))
    yield case("two names, one file", lambda tmp: [f"a={write_jsonl(tmp / 'a.jsonl', PLAIN)}", f"b={tmp / 'a.jsonl'}"], reads(6, "b: 6 rows read"))
    yield case("the second is broken", lambda tmp: [*lines(tmp, PLAIN), f"b={write_jsonl(tmp / 'b.jsonl', [1])}"], refused("'b'", "TMP/b.jsonl", "row 0"))
    for name in ("x y", "a|b", "$x$", "<b>", "../x", "/etc", ".", "\u00e4", "a" * 300, "_", "0", "None"):
        yield case(f"name {name[:9]}", lambda tmp, name=name: [f"{name}={write_jsonl(tmp / 'a.jsonl', PLAIN)}"], reads(6, f"{name}: 6 rows"))
    for name in ("two\nlines", "a\tb", "bell\x07", "\u2028"):
        yield Case(f"name {name!r}", lambda tmp, name=name: ["partition", "--model", BASE, "--sources", f"{name}={write_jsonl(tmp / 'a.jsonl', PLAIN)}", "--folder", tmp / "r"], refused("sources", repr(name)[1:-1]))
    def folder(tmp, **made):
        (tmp / "d").mkdir()
        for name, content in made.items():
            path = tmp / "d" / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [f"a={tmp / 'd'}"]
    bad = refused("TMP/d")
    yield case("folder", lambda tmp: folder(tmp, x_jsonl=TEXT_LINES), reads(6))
    yield case("folder of two", lambda tmp: folder(tmp, x_jsonl=TEXT_LINES, y_jsonl=TEXT_LINES), reads(12))
    yield case("empty folder", lambda tmp: folder(tmp), bad)
    yield case("folder of notes", lambda tmp: folder(tmp, README_md="# about"), bad)
    yield case("folder of a script", lambda tmp: folder(tmp, d_py="print('run')"), bad)
    yield case("folder, one file empty", lambda tmp: folder(tmp, x_jsonl=TEXT_LINES, y_jsonl=""), refused("TMP/d/y.jsonl"))
    yield case("folder, one row broken", lambda tmp: folder(tmp, x_jsonl=TEXT_LINES, y_jsonl=TEXT_LINES[:-9]), refused("TMP/d/y.jsonl", "row 5"))
    yield case("folder of two kinds", lambda tmp: folder(tmp, x_jsonl=TEXT_LINES, y_csv=CSV), reads(6, "not read", "y.csv"))
    yield case("folder, plain and chat", lambda tmp: folder(tmp, x_jsonl=TEXT_LINES, y_jsonl="".join(json.dumps(r) + "\n" for r in CHAT)), refused("TMP/d/"))
    yield case("folder without the split", lambda tmp: folder(tmp, x_jsonl=TEXT_LINES), refused("TMP/d", "'dev'"), "--split", "dev")
    yield case("folder with the split", lambda tmp: folder(tmp, train_jsonl=TEXT_LINES, test_jsonl=TEXT_LINES * 2), reads(12), "--split", "test")
    yield case("folder, README broken", lambda tmp: folder(tmp, README_md="---\nconfigs: [\n---\n", x_jsonl=TEXT_LINES), bad)
    yield case("folder, README names no file", lambda tmp: folder(tmp, README_md="---\nconfigs:\n- config_name: default\n  data_files: none.jsonl\n---\n", x_jsonl=TEXT_LINES), bad)
    yield case("folder, README unpickles", lambda tmp: folder(tmp, README_md="---\nconfigs: !!python/object/apply:os.getcwd []\n---\n", x_jsonl=TEXT_LINES), bad)
    yield case("saved, but empty", lambda tmp: _saved_to_disk(tmp, dict(state="{}", info="{}")), bad)
    for part in ("state", "info", "data"):
        for how in ("empty", "cut", "garbage", "null"):
            yield case(f"saved, {part} {how}", lambda tmp, part=part, how=how: _saved_to_disk(tmp, {part: how}), bad)
    yield case("saved", lambda tmp: _saved_to_disk(tmp, {}), reads(6))
    yield case("saved with splits, not this one", lambda tmp: [DatasetDict(dev=Dataset.from_list(PLAIN)).save_to_disk(str(tmp / "d")), f"a={tmp / 'd'}"][1:], refused("TMP/d", "'train'", "dev"))
    yield case("folder with the name of a file", lambda tmp: [(tmp / "d.jsonl").mkdir(), f"a={tmp / 'd.jsonl'}"][1:], refused("TMP/d.jsonl"))
    yield case("link to nowhere", lambda tmp: [(tmp / "d.jsonl").symlink_to(tmp / "x"), f"a={tmp / 'd.jsonl'}"][1:], refused("TMP/d.jsonl"))
    yield case("link to itself", lambda tmp: [(tmp / "d.jsonl").symlink_to(tmp / "d.jsonl"), f"a={tmp / 'd.jsonl'}"][1:], refused("TMP/d.jsonl"))
    yield case("a link", lambda tmp: [write_jsonl(tmp / "x.jsonl", PLAIN), (tmp / "d.jsonl").symlink_to(tmp / "x.jsonl"), f"a={tmp / 'd.jsonl'}"][2:], reads(6))
    yield case("a device", lambda tmp: ["a=/dev/null"], refused("/dev/null"))


def _saved_to_disk(tmp, broken):
    Dataset.from_list(PLAIN).save_to_disk(str(tmp / "d"))
    for part, how in broken.items():
        path = dict(state=tmp / "d" / "state.json", info=tmp / "d" / "dataset_info.json", data=next((tmp / "d").glob("*.arrow")))[part]
        path.write_bytes(b"{}" if how == "{}" else damaged(path.read_bytes(), how, random.Random(0)))
    return [f"a={tmp / 'd'}"]


# ---- settings, as options and in a file

def said(name): return "--" + name.replace("_", "-")


def beyond(f):
    "Values just outside what a setting allows, and of another kind."
    low, high, choices = (f.metadata[k] for k in ("low", "high", "choices"))
    if choices: return ["", "nonsense", f"{choices[0]}x", f"{choices[0]} "]
    if f.type is bool: return []
    if f.type is str: return ["", "nowhere", "moving "]
    out = ["", "x", "nan", "inf", "-inf", "1e999", "0x10", "1,5", "None"] + (["1.5", "1e3x"] if f.type is int else ["1e-3x"])
    if low is not None: out += [str(low - 1), *([str(low)] if f.metadata["open_low"] else [])]
    return out + ([str(high * 2 + 1)] if high is not None else [])


@family("options")
def options():
    for f in fields(StepwiseConfig):
        if f.name == "chunks": values = ["0", "-1", "1.5", "x", "", "7x", "[a]"]
        else: values = beyond(f)
        for value in RNG.sample(values, min(5, len(values))):
            yield Case(f"{said(f.name)}={value}", lambda tmp, f=f, value=value: with_setting(f.name, tmp, [f"{said(f.name)}={value}"]), refused((f.name, said(f.name))))
        if f.type is bool: yield Case(f"{said(f.name)}=yes", lambda tmp, f=f: data(*lines(tmp, PLAIN), words=[f"{said(f.name)}=yes"]), refused(said(f.name)))
    for words, named in ((["--max-length", "16", "--max-prompt-length", "16"], "max_prompt_length"), (["--max-length", "8", "--max-prompt-length", "20"], "max_prompt_length"),
                         (["--betta", "1"], "beta"), (["--learning-rate", "1"], "lr"), (["--model"], "--model"), (["--sources"], "--sources"), (["--lr"], "--lr"), (["--lr", "1", "2"], "2"), (["extra"], "extra")):
        yield Case(" ".join(words), lambda tmp, words=words: data(*lines(tmp, PLAIN), words=words), refused(named))
    for words in (["--lr", "1e-3"], ["--beta", "1"], ["--no-shuffle"], ["--seed", str(2**63 - 1)], ["--warmup", "0"], ["--warmup", "1"], ["--label-smoothing", "0.4"], ["--max-length", "2000"], ["--chunks", "2"], ["--reference", BASE], ["--epochs", "10000"]):
        yield Case(" ".join(words).replace(BASE, "S"), lambda tmp, words=words: data(*lines(tmp, PLAIN), words=words), reads(6))
    for words, named in (([], "command"), (["nonsense"], "nonsense"), (["data"], "--model"), (["data", "--model", BASE], "--sources"), (["run", "--model", BASE, "--sources", "a=b.jsonl"], "--folder"), (["report"], "folder"),
                         (["report", "/nowhere"], "/nowhere"), (["report", ""], ""), (["demo", "--beta", "1"], "--beta")):
        yield Case(f"sdpo {' '.join(words)}".replace(BASE, "S"), lambda tmp, words=words: words, refused(named))


FILE_VALUES = dict(null=None, list=[1], mapping={"a": 1}, text="nonsense", yes=True, date="2024-01-01", minus=-1, nan=float("nan"), inf=float("inf"), huge=10**400, half=0.5, empty="")


def allows(f, name):
    "Whether a setting may have one of the values above."
    if f.name == "chunks": return name in ("null", "huge")                 # how many pairs there are is seen later
    if f.name == "loss": return name == "null"                             # a function, which no file can hold
    if f.type is bool: return name == "yes"
    if f.metadata["choices"] or f.type is str: return False
    low, high = f.metadata["low"], f.metadata["high"]
    return f.type is float and name == "half" and (low is None or low <= 0.5) and (high is None or 0.5 <= high)


@family("run files")
def run_files():
    def case(name, text, want, *words):
        def make(tmp):
            write_jsonl(tmp / "a.jsonl", PLAIN)
            (tmp / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.replace("TMP", str(tmp)).replace("BASE", BASE).encode())
            return ["data", "--config", tmp / "c.yaml", *(words or ["--model", BASE, "--sources", f"a={tmp / 'a.jsonl'}"])]
        return Case(name, make, want)
    every = [(f, name) for f in fields(StepwiseConfig) for name in FILE_VALUES]
    for f, name in RNG.sample(every, 90):
        def make(tmp, f=f, name=name):
            (tmp / "c.yaml").write_text(yaml.safe_dump({f.name: FILE_VALUES[name]}))
            return with_setting(f.name, tmp, ["--config", tmp / "c.yaml"])
        yield Case(f"{f.name}: {name}", make, reads(6) if allows(f, name) else refused(f.name))
    for name, text in {"syntax": "beta: [", "tab": "beta:\t1\n\tlr: 1", "list": "- beta\n- lr", "words": "just words", "number": "5", "unpickles": "beta: !!python/object/apply:os.getcwd []", "two documents": "beta: 1\n---\nlr: 1",
                       "no mapping in settings": "settings: 5", "list in settings": "settings: [beta]", "twice": "beta: 1\nbeta: 2", "anchor": "beta: *x", "UTF-16": "beta: 1".encode("utf-16"), "latin-1": "beta: \xe9".encode("latin-1"), "zeros": bytes(20)}.items():
        yield case(name, text, refused("TMP/c.yaml"))
    for key in ("betta", "1", "null", "learning_rate", "Beta", "''", "true", "beta ", "[a, b]", "2024-01-01", "per_device_train_batch_size"):
        yield case(f"key {key}", f"{json.dumps(key) if key.endswith(' ') else key}: 1", refused(("setting", "TMP/c.yaml")))
    for text in ("", "null", "{}", "# nothing", "beta: 1", "lr: 1e-4", "lr: '0.001'", "settings: {beta: 1}", "settings:", "batch_size: 4.0"): yield case(f"good {text!r}", text, reads(6))
    for name, sources, want in (("null", "null", "sources"), ("number", "5", "sources"), ("text", "a.jsonl", "sources"), ("list", "[TMP/a.jsonl]", "sources"), ("empty", "{}", "sources"), ("no place", "{a: null}", "'a'"), ("number as place", "{a: 5}", "'a'"),
                                ("list as place", "{a: [TMP/a.jsonl]}", "'a'"), ("no source", "{a: {split: train}}", "'a'"), ("misspelt", "{a: {source: TMP/a.jsonl, colums: {}}}", "colums"), ("columns as list", "{a: {source: TMP/a.jsonl, columns: [x]}}", "'a'"),
                                ("columns to a number", "{a: {source: TMP/a.jsonl, columns: {prompt: 5}}}", "'a'"), ("split as number", "{a: {source: TMP, split: 5}}", "'a'"), ("max_pairs as text", "{a: {source: TMP/a.jsonl, max_pairs: x}}", "max_pairs"),
                                ("max_pairs true", "{a: {source: TMP/a.jsonl, max_pairs: true}}", "max_pairs"), ("source null", "{a: {source: null}}", "'a'"), ("source empty", "{a: {source: ''}}", "'a': ''"),
                                ("chat as text", "{a: {source: TMP/a.jsonl, chat: nonsense}}", "chat"), ("twice", "{a: TMP/a.jsonl, a: TMP/b.jsonl}", "'a'"), ("a number as name", "{1: TMP/nowhere.jsonl}", "'1'")):
        yield case(f"sources {name}", f"model: BASE\nsources: {sources}", refused(want), "--beta", "1")
    if "eval_share" in [f.name for f in fields(StepwiseConfig)]:
        for value in ("x", "null", "2", "1", "-0.1", "[1]", "true", ".nan"): yield case(f"eval_share of a source {value}", f"model: BASE\nsources: {{a: {{source: TMP/a.jsonl, eval_share: {value}}}}}", refused("'a'", "eval_share"), "--beta", "1")
        for value, want in (("TMP/a.jsonl", "held_out"), ("5", "held_out"), ("[TMP/a.jsonl]", "held_out"), ("{h: null}", "'h'"), ("{h: TMP/nowhere.jsonl}", "TMP/nowhere.jsonl"), ("{h: {source: TMP/a.jsonl, chat: 1}}", "'h'")):
            yield case(f"held_out {value}", f"model: BASE\nsources: {{a: TMP/a.jsonl}}\nheld_out: {value}", refused(want), "--beta", "1")
        yield case("held_out good", "model: BASE\nsources: {a: TMP/a.jsonl}\nheld_out: {h: {source: TMP/a.jsonl, max_pairs: 2}}", reads(6, "h: 2 rows read"), "--beta", "1")
    yield case("sources good", "model: BASE\nsources: {a: TMP/a.jsonl, b: {source: TMP/a.jsonl, max_pairs: 2}}", reads(6, "b: 2 rows read"), "--beta", "1")
    for name, model, want in (("null", "null", "--model"), ("number", "5", "5"), ("list", "[BASE]", "model"), ("mapping", "{a: 1}", "model"), ("empty", "''", "--model"), ("nowhere", "/nowhere/model", "/nowhere/model")):
        yield case(f"model {name}", f"model: {model}\nsources: {{a: TMP/a.jsonl}}", refused(want), "--beta", "1")
    for name, folder, want in (("null", "null", "--folder"), ("number", "5", "folder"), ("list", "[TMP/run]", "folder"), ("mapping", "{a: 1}", "folder"), ("a file", "TMP/a.jsonl", "TMP/a.jsonl"), ("inside a file", "TMP/a.jsonl/run", "TMP/a.jsonl")):
        def make(tmp, folder=folder):
            write_jsonl(tmp / "a.jsonl", PLAIN)
            (tmp / "c.yaml").write_text(f"folder: {folder}\nmodel: BASE\nsources: {{a: TMP/a.jsonl}}".replace("TMP", str(tmp)).replace("BASE", BASE))
            return ["partition", "--config", tmp / "c.yaml"]
        yield Case(f"folder {name}", make, refused(want))
    for path in ("/nowhere/c.yaml", "", ".", "/dev/null/x"): yield Case(f"--config {path!r}", lambda tmp, path=path: ["data", "--config", path, "--model", BASE, "--sources", *lines(tmp, PLAIN)], refused(path or ""))


# ---- model folders

def model_folder(tmp, change=None):
    "A copy of S, changed."
    shutil.copytree(BASE, tmp / "m")
    if change: change(tmp / "m")
    return tmp / "m"


def edited(**values): # of config.json; DEL: without this one
    def change(m):
        config = json.loads((m / "config.json").read_text()) | values
        (m / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "DEL"}))
    return change


def put(name, how):
    def change(m):
        path = m / name
        content = path.read_bytes() if path.exists() else b"{}"
        if path.exists(): path.unlink()
        if how == "folder": path.mkdir()
        elif how != "gone": path.write_bytes(how if isinstance(how, bytes) else damaged(content, how, random.Random(0)))
    return change


def tensors(edit):
    def change(m):
        from safetensors.torch import load_file, save_file
        state = load_file(m / "model.safetensors")
        edit(state)
        save_file(state, m / "model.safetensors", metadata={"format": "pt"})
    return change


@family("models")
def models():
    def case(name, change, want, command="partition"):
        rows_of = CHAT if "template" in name or "chat" in name else PLAIN
        def make(tmp): return [command, "--model", model_folder(tmp, change), "--sources", *lines(tmp, rows_of), *(["--folder", tmp / "run", "--precision", "fp32"] if command == "partition" else [])]
        return Case(name, make, want)
    bad = refused("TMP/m")
    good = lambda tmp, status, out, err: _partitioned(status, out, err)
    for how in ("empty", "cut", "garbage", "null", "zeros", "pointer", "gone", "folder", "flip"):
        want = bad
        if how == "flip": continue
        yield case(f"weights {how}", put("model.safetensors", how), want)
    yield case("weights, header flipped", lambda m: put("model.safetensors", (m / "model.safetensors").read_bytes()[:3] + b"\xff" + (m / "model.safetensors").read_bytes()[4:])(m), bad)
    for how in ("empty", "cut", "garbage", "null", "zeros", "pointer", "gone", "folder", "flip"): yield case(f"config.json {how}", put("config.json", how), bad)
    for how in ("empty", "cut", "garbage", "null", "zeros", "pointer", "gone", "folder"): yield case(f"tokenizer.json {how}", put("tokenizer.json", how), bad, "data")
    for how in ("empty", "cut", "garbage", "null", "pointer"): yield case(f"tokenizer_config.json {how}", put("tokenizer_config.json", how), bad, "data")
    yield case("config.json a list", put("config.json", b"[]"), bad)
    yield case("config.json a number", put("config.json", b"5"), bad)
    yield case("config.json {}", put("config.json", b"{}"), bad)
    for key, value in dict(vocab_size=57, hidden_size=64, num_hidden_layers=5, num_attention_heads=5, head_dim=7, intermediate_size=100, model_type="nonsense", hidden_act="nonsense", num_key_value_heads=3).items():
        yield case(f"{key} {value}", edited(**{key: value}), bad)
    for key, value in dict(vocab_size="x", hidden_size=None, rope_parameters="x", model_type=5, vocab_size_=0, max_position_embeddings="x", dtype="float7", num_attention_heads=0, rms_norm_eps="x").items():
        yield case(f"{key.strip('_')} is {value!r}", edited(**{key.rstrip("_"): value}), bad)
    yield case("model_type gone", edited(model_type="DEL"), bad)
    yield case("architectures gone", edited(architectures="DEL"), good)
    yield case("another class", edited(architectures=["LlamaModel"]), good)
    for n in (2, 0, -1): yield case(f"{n} layers", edited(num_hidden_layers=n), lambda tmp, status, out, err: _partitioned(status, out, err, "tensors of the checkpoint are not used"))
    yield case("code of its own", edited(auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}, model_type="evil"), bad)
    yield case("quantised", edited(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), bad)
    yield case("an encoder-decoder", edited(model_type="t5", architectures=["T5ForConditionalGeneration"]), bad)
    yield case("an encoder", edited(model_type="bert", architectures=["BertModel"]), bad)
    yield case("an adapter beside", lambda m: (m / "adapter_config.json").write_text("{}"), bad)
    yield case("only an adapter", lambda m: [p.unlink() for p in m.iterdir()] and (m / "adapter_config.json").write_text("{}"), bad)
    yield case("one tensor gone", tensors(lambda s: s.pop(sorted(s)[3])), bad)
    yield case("all tensors gone", tensors(lambda s: s.clear()), bad)
    yield case("one tensor of another shape", tensors(lambda s: s.__setitem__(sorted(s)[0], torch.zeros(3, 3))), bad)
    yield case("not a number in a tensor", tensors(lambda s: s[sorted(s)[2]].fill_(float("nan"))), refused("not finite"))
    yield case("infinity in a tensor", tensors(lambda s: s[sorted(s)[2]].fill_(float("inf"))), refused("not finite"))
    yield case("integers in a tensor", tensors(lambda s: s.__setitem__(sorted(s)[2], s[sorted(s)[2]].to(torch.int32))), good)
    yield case("a tensor too many", tensors(lambda s: s.__setitem__("extra", torch.zeros(2))), lambda tmp, status, out, err: _partitioned(status, out, err, "extra"))
    yield case("an old .bin that is none", lambda m: [put("model.safetensors", "gone")(m), (m / "pytorch_model.bin").write_bytes(b"no checkpoint")], bad)
    yield case("an index without its files", lambda m: [put("model.safetensors", "gone")(m), (m / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map={"lm_head.weight": "model-1.safetensors"})))], bad)
    yield case("a broken index", lambda m: [put("model.safetensors", "gone")(m), (m / "model.safetensors.index.json").write_text("{")], bad)
    for name, text in {"no syntax": "{% for m in messages %}{{ m.role }", "raises": "{{ raise_exception('no') }}", "endless": "{% for i in range(10**9) %}{{ i }}{% endfor %}", "undefined": "{{ nothing.at.all }}", "private": "{{ messages.__class__.__mro__ }}",
                       "no filter": "{{ messages | nonsense }}", "division": "{{ 1 // 0 }}", "a type": "{{ messages + 1 }}", "says nothing": "x", "parts": "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}", "empty": ""}.items():
        yield case(f"template {name}", lambda m, text=text: (m / "chat_template.jinja").write_text(text), refused("'a'"), "data")
    yield case("no chat template", put("chat_template.jinja", "gone"), refused("'a'", "chat template"), "data")
    yield case("template of zeros", put("chat_template.jinja", b"\xff\xfe\x00"), refused(("TMP/m", "'a'")), "data")
    yield case("tokenizer without an end", lambda m: (m / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in json.loads((m / "tokenizer_config.json").read_text()).items() if k != "eos_token"})), refused("EOS"), "data")
    yield case("tokenizer of another model", lambda m: _more_tokens(m), refused("token", "embedding"))
    yield case("no positions left", edited(model_type="gpt2", n_positions=8), bad)
    for path in ("/nowhere/m", "./nowhere", "~/nowhere-at-all", "a/b/c", "nobody/nothing", "", ".", "/dev/null", "https://huggingface.co/x/y"):
        yield Case(f"model {path!r}", lambda tmp, path=path: ["partition", "--model", path, "--sources", *lines(tmp, PLAIN), "--folder", tmp / "run"], refused(path or "--model"))
    yield Case("model is a file", lambda tmp: ["data", "--model", Path(BASE) / "config.json", "--sources", *lines(tmp, PLAIN)], refused("config.json"))
    for words in (["--reference", "/nowhere"], ["--reference", str(Path(BASE).parent)]):
        yield Case(f"reference {words[1][-9:]}", lambda tmp, words=words: ["partition", "--model", BASE, "--sources", *lines(tmp, PLAIN), "--folder", tmp / "run", *words], refused("reference", words[1]))


def _more_tokens(m):
    from transformers import AutoTokenizer
    t = AutoTokenizer.from_pretrained(m)
    t.add_tokens(["copy"]); t.save_pretrained(m)


def _partitioned(status, out, err, *parts):
    "Status 0 and the accuracy of all six pairs."
    assert status == 0 and not err and "| a | 6 |" in out, f"status {status}"
    for part in parts: assert part in out, f"{part} is not shown"


# ---- damaged run folders

SETTINGS = ["--lr", "1e-3", "--batch-size", "8", "--save-every", "1", "--precision", "fp32", "--max-length", "64"]
PARTS = ["config.yaml", "partition.json", "base/logprobs/kind.json", "base/logprobs/logprobs-00000.parquet", "stage-1/stage.json", "stage-1/metrics.jsonl", "stage-1/model/model.safetensors", "stage-1/model/config.json",
         "stage-1/model/tokenizer.json", "stage-1/logprobs/kind.json", "stage-1/logprobs/logprobs-00000.parquet"]
OPEN = ["stage-2/checkpoint/state.pt", "stage-2/metrics.jsonl"]
CLOSED = ["stage-2/stage.json", "stage-2/metrics.jsonl", "stage-2/model/model.safetensors", "stage-2/model/config.json", "stage-2/logprobs/kind.json", "stage-2/logprobs/logprobs-00000.parquet"]
FLIPPED = [("stopped", "run", "stage-2/checkpoint/state.pt"), ("stopped", "run", "stage-1/model/model.safetensors"), ("finished", "run", "stage-2/model/model.safetensors"),
           *((state, command, f"{folder}/logprobs/logprobs-00000.parquet") for state, command, folder in (("finished", "run", "base"), ("stopped", "run", "stage-1"), ("finished", "report", "stage-1"), ("finished", "report", "stage-2")))]
FLIPS, DAMAGES = 3, ["empty", "cut", "garbage", "flip", "null", "folder", "gone", "zeros", "{}", "[]"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Sources, a finished run of two stages and one that was stopped in stage 2, after its first checkpoint."
    tmp = tmp_path_factory.mktemp("home")
    for name in ("primer", "digest"): write_jsonl(tmp / f"{name}.jsonl", rows(name, 16))
    save, calls = trainer.save_checkpoint, []
    def stop(*args):
        save(*args); calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_drawn", lambda *a: {})
        patch.setattr(trainer, "save_checkpoint", stop)
        with pytest.raises(SystemExit) as e: cli.main([str(w) for w in run_words(tmp, tmp / "stopped")])
        assert e.value.code == 130 and (tmp / "stopped" / "stage-2" / "checkpoint" / "state.pt").exists()
        patch.setattr(trainer, "save_checkpoint", save)
        with open(tmp / "shown.txt", "w") as f, contextlib.redirect_stdout(f): cli.main([str(w) for w in run_words(tmp, tmp / "finished")])
    return tmp


def run_words(home, folder): return ["run", "--model", BASE, "--sources", f"primer={home / 'primer.jsonl'}", f"digest={home / 'digest.jsonl'}", "--folder", folder, *SETTINGS]


def outcome(folder):
    "What two runs must have in common."
    def sha(p): return hashlib.sha256(p.read_bytes()).hexdigest()
    same = {str(p.relative_to(folder)): sha(p) for p in folder.rglob("*") if p.is_file() and p.name in ("model.safetensors", "stage.json", "partition.json")}
    return same | dict(steps=[metrics(folder / f"stage-{t}") for t in (1, 2)])


def shown(out, folder): return [line for line in out.replace(str(folder), "FOLDER").splitlines() if line.startswith(("|", "report", "model"))]


def damage(path, how, rng):
    "Returns whether anything was changed."
    content = path.read_bytes()
    path.unlink()
    if how == "folder": path.mkdir()
    elif how in ("{}", "[]"): path.write_text(how)
    elif how == "a line less": path.write_bytes(b"".join(content.splitlines(True)[:-1]))
    elif how != "gone": path.write_bytes(damaged(content, how, rng))


@family("run folders")
def run_folders():
    "A name says: which folder, which command, which part, how damaged."
    every = [(state, command, part, how) for state, command, parts in (("stopped", "run", PARTS + OPEN), ("finished", "run", PARTS + CLOSED), ("finished", "report", PARTS + CLOSED)) for part in parts for how in DAMAGES]
    picked = RNG.sample(every, 100) + [(*place, "flip") for place in FLIPPED for _ in range(FLIPS)] + [(*place, "hole") for place in FLIPPED[:3]] + [(*place, "number") for place in FLIPPED[3:] for _ in range(FLIPS)] + [("finished", command, f"stage-{t}/metrics.jsonl", "a line less") for command in ("run", "report") for t in (1, 2)] + [("stopped", "run", f"stage-{t}/metrics.jsonl", "a line less") for t in (1, 2)]
    for i, (state, command, part, how) in enumerate(picked): yield Case(f"{i:03}-{state}-{command}-{part}-{how}", (state, command, part, how, i), None)


def _one_stage(out): assert "stage 1" in out and "stage 2" not in out and "M_2" not in out


@params("run folders")
def test_run_folders(ask, home, tmp_path, capsys, case):
    "One line that names the part, or the same run and the same tables as if nothing had happened."
    state, command, part, how, seed = case.make
    folder = tmp_path / "run"
    shutil.copytree(home / state, folder)
    damage(folder / part, how, random.Random(seed))
    words = run_words(home, folder) if command == "run" else ["report", folder]
    def want(tmp, status, out, err):
        if status == 2: return refused((str(folder / part), str((folder / part).parent)))(tmp, status, out, err)
        assert status == 0 and not err, f"status {status}"
        if command == "run" and not (state == "finished" and part == "stage-1/model/model.safetensors"): assert outcome(folder) == outcome(home / "finished")
        if "/model/" in part and command == "run": assert "tokenizer" in part or part.startswith("stage-1") and state == "finished", "a damaged model was passed over"
        if (command, part, how) == ("report", "stage-2/stage.json", "gone"): return _one_stage(out)    # as after a kill
        assert shown(out, folder) == shown((home / "shown.txt").read_text(), home / "finished"), "the tables are others"
        assert report.gamma_table(report.Run(folder)).equals(report.gamma_table(report.Run(home / "finished"))), "the figures are others"
    ask(Case(case.name, lambda tmp: words, want))


@params("rows")
def test_rows(ask, case): ask(case)


@params("schemas")
def test_schemas(ask, case): ask(case)


@params("files")
def test_files(ask, case): ask(case)


@params("places")
def test_places(ask, case): ask(case)


@params("options")
def test_options(ask, case): ask(case)


@params("run files")
def test_run_files(ask, case): ask(case)


@params("models")
def test_models(ask, case): ask(case)


def test_there_are_enough():
    "Three hundred at least, all of different names within a family."
    assert sum(map(len, CASES.values())) >= 300
    for name, cases in CASES.items(): assert len({c.name for c in cases}) == len(cases), name
