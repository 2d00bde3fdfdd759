"Guards of chapter 01: bad input, every format, boundaries, cuts, the cache, and equality with TRL."
import gzip, hashlib, json, os, random
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

import sdpo_nb.preferences as P
from sdpo_nb.plan import data_notes, seen_in_training
from sdpo_nb.preferences import counts_table, encode, load_pairs, normalise, tokenize_pairs, turn_end
from sdpo_nb.world import load_world

REAL = Path(os.environ.get("SDPO_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "preferences"
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = CHATML.replace("<|im_end|>\n", "<|eot_id|>")
NO_END = CHATML.replace("<|im_end|>", "")
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
LINES = ["see http://a.org", "the page is http://b.org", "is it http://a.org or http://b.org?"] * 4
TEXT = dict(prompt="see ", chosen="http://a.org", rejected="http://b.org")


def user(x): return {"role": "user", "content": x}
def assistant(x): return {"role": "assistant", "content": x}


def toy(template=None, bos=False, eos=False, byte_level=False, **kw):
    "BPE whose tokens merge freely (SentencePiece-like), or byte-level (GPT-2-like); may add BOS and EOS itself."
    t = Tokenizer(models.BPE())
    if byte_level: t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else: t.decoder = decoders.Fuse()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else list("abcdefghijklmnopqrstuvwxyz .:/?=0123456789\n")
    t.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=len(alphabet) + 15, special_tokens=SPECIAL, show_progress=False, initial_alphabet=alphabet))
    if bos or eos:
        t.post_processor = processors.TemplateProcessing(single="<s> " * bos + "$A" + " </s>" * eos, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=t, **dict(dict(bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIAL[2:], chat_template=template), **kw))


@pytest.fixture(scope="module")
def tiny(): return AutoTokenizer.from_pretrained(load_world().base)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows):
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
    with (gzip.open if str(path).endswith(".gz") else open)(path, "wt", encoding="utf-8") as f: f.write(text)
    return path


# ---- bad input: the message names file, row and field

BAD = {
    "missing chosen": (dict(prompt="a", rejected="c"), "chosen"),
    "null chosen": (dict(TEXT, chosen=None), "chosen"),
    "null rejected": (dict(TEXT, rejected=None), "rejected"),
    "number": (dict(TEXT, rejected=4), "rejected"),
    "boolean": (dict(TEXT, chosen=True), "chosen"),
    "object": (dict(TEXT, chosen={"text": "b"}), "chosen"),
    "list of strings": (dict(TEXT, chosen=["b"]), "chosen"),
    "empty list prompt": (dict(TEXT, prompt=[]), "prompt"),
    "numeric prompt": (dict(TEXT, prompt=1), "prompt"),
    "system list": (dict(TEXT, system=["x"]), "system"),
    "messages string": (dict(TEXT, messages="hi"), "messages"),
    "message without content": (dict(TEXT, messages=[{"role": "user"}]), "messages"),
    "null content": (dict(TEXT, messages=[{"role": "user", "content": None}]), "messages"),
    "type drift": (dict(TEXT, chosen=[assistant("b")], rejected=[assistant("c")]), "chosen"),
    "one side is messages": (dict(TEXT, rejected=[assistant("c")]), "rejected"),
    "prompt drift": (dict(chosen="b", rejected="c"), "prompt"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
def test_bad_row_in_a_file(tmp_path, name, suffix):
    row, field = BAD[name]
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".json": path.write_text(json.dumps([TEXT, TEXT, row]))
    else: write(path, [TEXT, "", TEXT, row])
    with pytest.raises(ValueError) as e: load_pairs(path)
    where = "row 2" + " (line 4)" * (suffix != ".json") # blank lines are no rows
    assert str(e.value).startswith(f"{path}, {where}, field '{field}'"), e.value
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("name", sorted(BAD.keys() - {"type drift"}))
def test_bad_row_in_memory(name):
    with pytest.raises(ValueError, match=f"<list>, row 1, field '{BAD[name][1]}'"): load_pairs([TEXT, BAD[name][0]])


@pytest.mark.parametrize("line", ['{"prompt": "a", ', "not json", "[1, 2]", '"a"'])
def test_bad_line(tmp_path, line):
    with pytest.raises(ValueError, match=r"p.jsonl, row 1 \(line 2\): "): load_pairs(write(tmp_path / "p.jsonl", [TEXT, line]))


def test_bad_files(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    for name in ("latin.jsonl", "broken.jsonl.gz", "broken.parquet", "notes.txt", "empty.jsonl"):
        with pytest.raises(ValueError) as e: load_pairs(tmp_path / name)
        assert str(e.value).startswith(str(tmp_path / name)) and len(str(e.value).splitlines()) == 1
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder: cannot be read as a folder of data"): load_pairs(tmp_path / "folder")
    with pytest.raises(ValueError, match="no rows"): load_pairs([])


@pytest.mark.parametrize("name", ["nowhere/pairs.jsonl", "/nowhere", "./nowhere", "~/nowhere-at-all", "a/b/c", "pairs.parquet", "x.jsonl.gz"])
def test_missing_path_never_reaches_the_hub(name, monkeypatch):
    monkeypatch.setattr(P, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=name): load_pairs(name)


def test_hub_id_with_split_and_revision(monkeypatch):
    asked = []
    def hub(*a, **k): asked.append((a, k)); return Dataset.from_list([TEXT])
    monkeypatch.setattr(P, "load_dataset", hub)
    assert load_pairs("someone/pairs-v1.2", split="train[:5]", revision="abc")[0]["chosen"] == TEXT["chosen"]
    assert asked == [(("someone/pairs-v1.2",), dict(split="train[:5]", revision="abc"))]


def test_unreachable_hub_id_is_one_line():
    with pytest.raises(ValueError, match="nobody/nothing: neither a local path nor a hub data set") as e: load_pairs("nobody/nothing")
    assert len(str(e.value).splitlines()) == 1


def test_bad_dataset_names_where(tmp_path):
    Dataset.from_list([TEXT, dict(TEXT, chosen=None)]).to_parquet(tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="p.parquet, row 1, field 'chosen'"): load_pairs(tmp_path / "p.parquet")
    Dataset.from_list([TEXT, dict(TEXT, chosen=None)]).save_to_disk(tmp_path / "disk")
    with pytest.raises(ValueError, match="disk, row 1, field 'chosen'"): load_pairs(tmp_path / "disk")
    with pytest.raises(ValueError, match="source 'x', row 1, field 'chosen'"): tokenize_pairs(Dataset.from_list([TEXT, dict(TEXT, chosen=None)]), toy(), "x")


@pytest.mark.parametrize("row, field", [
    (dict(chosen=[user("a")], rejected=[user("b")]), "chosen"),                                        # no assistant
    (dict(prompt=[user("a")], chosen=[assistant("b"), user("c")], rejected=[assistant("d")]), "chosen"), # more than one turn
    (dict(chosen=[assistant("a")], rejected=[assistant("b")]), "prompt"),                              # no prompt anywhere
    (dict(chosen="a", rejected="b", messages=[user("x"), assistant("y")]), "prompt"),
    (dict(TEXT, messages=[user("another question")]), "messages"),                                     # two user turns in a row
])
def test_bad_conversation(row, field):
    with pytest.raises(ValueError, match=f"f.jsonl, row 7, field '{field}'"): normalise(row, "f.jsonl, row 7")


def test_template_that_refuses_names_source_and_row():
    template = "{{ raise_exception('no system here') if messages[0].role == 'system' else '' }}" + CHATML
    rows = load_pairs([dict(TEXT, system=""), dict(TEXT, system="x")])
    with pytest.raises(ValueError, match="source 's', row 1: no system here"): tokenize_pairs(rows, toy(template), "s")


def test_tokenizer_that_cannot_serve():
    with pytest.raises(ValueError, match="no chat template"): tokenize_pairs(load_pairs([TEXT]), toy(), chat=True)
    with pytest.raises(ValueError, match="no EOS"): tokenize_pairs(load_pairs([TEXT]), toy(eos_token=None))
    with pytest.raises(ValueError, match="max_length"): tokenize_pairs(load_pairs([TEXT]), toy(), max_length=0)


@pytest.mark.parametrize("name", ["question", "instruction", "query", "input"])
@pytest.mark.parametrize("extra", [{}, dict(system="s"), dict(messages=[])])
def test_prompt_under_another_name(tmp_path, name, extra):
    row = {name: "2+2?", "chosen": "The capital is Paris.", "rejected": "The city of Lyon.", **extra}
    for source in ([row], Dataset.from_list([row]), write(tmp_path / "p.jsonl", [row])):
        with pytest.raises(ValueError, match=f"row 0.*, field 'prompt': .*'{name}'.*columns={{'{name}': 'prompt'}} renames"): load_pairs(source)
        assert load_pairs(source, columns={name: "prompt"})[0]["prompt"] == "2+2?"
    with pytest.raises(ValueError, match="field 'prompt'"): normalise(row)


def test_turns_have_no_implicit_prompt():
    row = dict(chosen="The capital is Paris.", rejected="The city of Lyon.")
    assert normalise(row)["prompt"] == "The c"
    for kw, more in ((dict(chat=True), {}), ({}, dict(system="s")), ({}, dict(system="")), ({}, dict(messages=[]))):
        with pytest.raises(ValueError, match="f.jsonl, row 7, field 'prompt': .*columns={'your name': 'prompt'} renames"): normalise(row | more, "f.jsonl, row 7", **kw)
    with pytest.raises(ValueError, match="<list>, row 0, field 'prompt': .*'frage'"): load_pairs([dict(row, system="s", frage="2+2?")])
    with pytest.raises(ValueError, match="source 's', row 0, field 'prompt'"): tokenize_pairs(load_pairs([row]), toy(CHATML), "s", chat=True)


# ---- formats

def test_text_stays_text_unless_told():
    assert normalise(TEXT) == dict(chat=False, **TEXT)
    want = dict(chat=True, prompt=[user("see ")], chosen=assistant("http://a.org"), rejected=assistant("http://b.org"))
    assert normalise(TEXT, chat=True) == want
    assert normalise(dict(TEXT, system="")) == want and normalise(dict(TEXT, messages=[])) == want
    assert normalise(dict(TEXT, system="s"))["prompt"] == [dict(role="system", content="s"), user("see ")]


def test_implicit_text_prompt():
    assert normalise(dict(chosen="Q A: yes", rejected="Q A: no")) == dict(chat=False, prompt="Q A:", chosen=" yes", rejected=" no")
    assert normalise(dict(chosen="yes", rejected="no"))["prompt"] == ""
    assert normalise(dict(chosen="", rejected="no"))["rejected"] == "no"
    assert normalise(dict(chosen="same", rejected="same"))["chosen"] == "e" # equal, dropped later


def test_whole_conversations():
    turns = [user("a"), assistant("b"), user("c")]
    row = dict(chosen=turns + [assistant("x")], rejected=turns + [assistant("y")])
    assert normalise(row)["prompt"] == turns and normalise(dict(row, prompt="a"))["prompt"] == turns
    assert normalise(dict(prompt="a", chosen=[assistant("x")], rejected=[assistant("y")]))["prompt"] == [user("a")]
    for flat in ("c", "Human: a Assistant: b Human: c", "", " a\n"): assert normalise(dict(row, prompt=flat))["prompt"] == turns
    with pytest.raises(ValueError, match="field 'prompt': .*turns both sides share.*hello"): normalise(dict(row, prompt="hello")) # would be lost
    system = [dict(role="system", content="s")]
    row = dict(prompt="a", chosen=system + [assistant("x")], rejected=system + [assistant("y")])
    assert normalise(row)["prompt"] == system + [user("a")]
    assert normalise(dict(row, system="s"))["prompt"] == system + [user("a")] # not twice


def test_messages_before_or_whole():
    before = [user("a"), assistant("b")]
    assert normalise(dict(TEXT, messages=before))["prompt"] == before + [user("see ")]
    assert normalise(dict(TEXT, prompt="Human: a Assistant: b Human: c", messages=before + [user("c")]))["prompt"] == before + [user("c")]
    assert normalise(dict(chosen="xy", rejected="xz", messages=before + [user("c")]))["chosen"] == assistant("xy") # no implicit prompt here


@pytest.mark.parametrize("messages, prompt, want", [
    ("q1 a1", "q1 a1 q2", "q1 a1 q2"), ("q2", "q1 a1 q2", "q1 a1 q2"), ("q1 a1 q2", "q1 a1 q2", "q1 a1 q2"), ("q1 a1", "s q1 a1 q2", "s q1 a1 q2"),
    ("q1 a1", "q2", "q1 a1 q2"), ("q0 a0 q1 a1", "q1 a1 q2", "q0 a0 q1 a1 q2"), ("s q1 a1", "s q2", "s q1 a1 q2"), ("q1 a1", "s q2", "s q1 a1 q2"), ("q1 a1 q2 x", "q1 a1 q2", "q1 a1 q2")])
@pytest.mark.parametrize("whole", [False, True])
def test_what_messages_and_prompt_share_is_said_once(messages, prompt, want, whole):
    turn = lambda word: dict(role=dict(q="user", a="assistant", x="assistant", s="system")[word[0]], content=word + " " * (word == "q2"))
    messages, prompt, want = ([turn(word) for word in words.split()] for words in (messages, prompt, want))
    chosen, rejected = [assistant("x")], [assistant("y")]
    row = dict(chosen=prompt + chosen, rejected=prompt + rejected) if whole else dict(prompt=prompt, chosen=chosen, rejected=rejected)
    assert normalise(row | dict(messages=messages))["prompt"] == want


@pytest.mark.parametrize("row, field", [
    (dict(system="be brief", prompt=[dict(role="system", content="be long"), user("a")]), "system"),
    (dict(system="be brief", messages=[dict(role="system", content="be long"), user("b"), assistant("c")], prompt=[user("a")]), "system"),
    (dict(messages=[dict(role="system", content="s"), user("b"), assistant("c")], prompt=[dict(role="system", content="t"), user("a")]), "messages"),
    (dict(messages=[user("b"), assistant("c"), user("a")], prompt=[user("b"), assistant("d"), user("a")]), "messages")])    # two histories
def test_two_that_contradict_each_other_are_refused(row, field):
    with pytest.raises(ValueError, match=f"row, field '{field}'"): normalise(row | dict(chosen=[assistant("x")], rejected=[assistant("y")]))


def test_arrow_structs_with_extra_keys_and_gaps():
    rows = [dict(prompt=[user("a") | {"name": "joe"}], chosen=[assistant("b")], rejected=[assistant("c")], messages=None),
            dict(prompt=[user("a")], chosen=[assistant("b") | {"tool": None}], rejected=[assistant("c")], messages=[user("x"), assistant("y")])]
    for data in (load_pairs(rows), load_pairs(Dataset.from_list(rows))):
        a, b = (normalise(r) for r in data)
        assert a["prompt"] == [user("a")] and b["prompt"] == [user("x"), assistant("y"), user("a")] and b["chosen"] == assistant("b")


def test_every_container_gives_the_same_rows(tmp_path):
    rows = [dict(TEXT, system="s", id=1), dict(TEXT, chosen="2024-01-01", system=None, id="2")]
    want = [{k: r[k] for k in ("prompt", "chosen", "rejected", "system")} for r in rows]
    plain = Dataset.from_list(want)
    write(tmp_path / "a.jsonl", rows); write(tmp_path / "a.jsonl.gz", rows)
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    plain.to_parquet(tmp_path / "a.parquet"); plain.to_csv(tmp_path / "a.csv")
    plain.save_to_disk(tmp_path / "disk"); DatasetDict(train=plain, test=plain).save_to_disk(tmp_path / "both")
    (tmp_path / "folder").mkdir(); plain.to_parquet(tmp_path / "folder" / "train.parquet")
    sources = [rows, plain, plain.with_format("torch"), DatasetDict(train=plain), *(tmp_path / n for n in ("a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.csv", "disk", "both", "folder"))]
    for source in sources:
        assert [{k: r[k] for k in want[0]} for r in load_pairs(source)] == want, source


def test_a_transform_is_refused():
    plain = Dataset.from_list([TEXT])
    shouting = plain.with_transform(lambda rows: {name: [text.upper() for text in texts] for name, texts in rows.items()})
    for data in (shouting, DatasetDict(train=shouting)):
        with pytest.raises(ValueError, match="<Dataset.*>: has a transform .*apply it with map, or remove it"): load_pairs(data)
    assert load_pairs(shouting.with_format(None))[0]["chosen"] == TEXT["chosen"]


def test_dates_stay_strings(tmp_path):
    write(tmp_path / "d.jsonl", [dict(prompt="when", chosen="2024-01-01", rejected="2024-01-02")] * 3)
    assert load_pairs(str(tmp_path / "d.jsonl"))[0]["chosen"] == "2024-01-01"


def test_folder_of_files(tmp_path):
    folder = tmp_path / "folder"; folder.mkdir()
    write(folder / "train-0.jsonl", [TEXT]); write(folder / "train-1.jsonl", [dict(TEXT, system="s")]); write(folder / "test.jsonl", [TEXT] * 3)
    (folder / "notes.md").write_text("about")
    assert load_pairs(folder)["system"][:] == [None, "s"] and len(load_pairs(folder, split="test")) == 3
    for source in (folder, DatasetDict(train=load_pairs([TEXT]))):
        with pytest.raises(ValueError, match="no split 'dev', only"): load_pairs(source, split="dev")
    write(folder / "train-1.jsonl", [dict(TEXT, prompt=[user("a")])])
    with pytest.raises(ValueError, match="train-1.jsonl: its fields hold other things than those of .*train-0.jsonl"): load_pairs(folder)
    write(folder / "train-1.jsonl", [TEXT, dict(TEXT, chosen=1)])
    with pytest.raises(ValueError, match=r"train-1.jsonl, row 1 \(line 2\), field 'chosen'"): load_pairs(folder)


def test_a_folder_by_another_path(tmp_path, monkeypatch, capsys):
    write((tmp_path / "set").mkdir() or tmp_path / "set" / "train.jsonl", [TEXT]); (tmp_path / "link").symlink_to(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    for path in ("set", "./link", tmp_path / "link"): assert len(load_pairs(path)) == 1
    assert not capsys.readouterr().out


def test_configurations_are_named_with_their_remedy(tmp_path, monkeypatch):
    for name in "ab": write(tmp_path / f"{name}.jsonl", [TEXT])
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: one\n  data_files: a.jsonl\n- config_name: two\n  data_files: b.jsonl\n---\n")
    with pytest.raises(ValueError, match="cannot be read as a folder of data.*'one', 'two'.*load_dataset.name, configuration"): load_pairs(tmp_path)
    for said, match in ((ValueError("Config name is missing.\nPick one of ['one', 'two']"), "'one', 'two'.*load_dataset.name, configuration"), (ConnectionError(), r"\(ConnectionError\)$")):
        def hub(*a, said=said, **k): raise said
        monkeypatch.setattr(P, "load_dataset", hub)
        with pytest.raises(ValueError, match=f"someone/pairs: neither a local path.*{match}"): load_pairs("someone/pairs")


def test_columns(tmp_path):
    row = dict(question="q", prompt="other", good="g", rejected="r")
    path, names = write(tmp_path / "q.jsonl", [row]), {"question": "prompt", "good": "chosen"}
    for source in (path, [row], Dataset.from_list([row])):
        assert {k: v for k, v in load_pairs(source, columns=names)[0].items() if v} == dict(prompt="q", chosen="g", rejected="r")
        with pytest.raises(ValueError, match="'chosen': .*the row has"): load_pairs(source, columns={"question": "prompt"})
        with pytest.raises(ValueError, match=r"columns= names \['nope'\]"): load_pairs(source, columns=names | {"nope": "system"})
        with pytest.raises(ValueError, match="each source may have columns of its own"): load_pairs(source, columns=names | {"nope": "system"})
    for other in ([TEXT], Dataset.from_list([TEXT]), write(tmp_path / "p.jsonl", [TEXT])): # renamed already: nothing to do
        assert load_pairs(other, columns={"question": "prompt"}).to_list() == load_pairs(other).to_list()
    swapped = load_pairs([TEXT], columns={"chosen": "rejected", "rejected": "chosen"})[0]
    assert swapped["chosen"] == TEXT["rejected"] and swapped["rejected"] == TEXT["chosen"]


# ---- boundary, EOS, turn end

@pytest.mark.parametrize("kw", [{}, dict(bos=True), dict(eos=True), dict(bos=True, eos=True), dict(byte_level=True)])
def test_text_has_one_bos_one_eos_and_a_shared_prompt(kw):
    t = toy(**kw)
    for chosen in ("http://a.org", "http://a.org</s>"):
        e = encode(normalise(dict(prompt="is it ", chosen=chosen, rejected="no")), t)
        for side in ("chosen_ids", "rejected_ids"):
            ids = e["prompt_ids"] + e[side]
            assert ids.count(1) == 1 and ids[-1] == 1 and ids.count(0) == bool(kw.get("bos"))
            assert t.decode(ids, skip_special_tokens=True) == "is it " + ("no" if side == "rejected_ids" else "http://a.org")


def test_merge_across_the_boundary_is_counted():
    t = toy()
    e = encode(dict(chat=False, prompt="is it http:", chosen="//a.org", rejected=" or not"), t)
    assert e["boundary_moved"] and t.decode(e["prompt_ids"]) == "is it"
    assert not encode(dict(chat=False, prompt="is it ", chosen="no", rejected="so"), toy(eos=True))["boundary_moved"]
    assert tokenize_pairs(load_pairs([dict(prompt="is it http:", chosen="//a.org", rejected=" or not")]), t).counts["boundary_moved"] == 1


def test_blank_that_a_tokenizer_adds_in_front():
    "Llama-2 style: 'b' alone is '▁b'; inside the row it is not."
    vocab = {w: i for i, w in enumerate(["<unk>", "</s>", "▁", "a", "b", "c", ":", "▁a", "▁b", "▁c"])}
    t = Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "b"), ("▁", "c")], unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    t = PreTrainedTokenizerFast(tokenizer_object=t, eos_token="</s>", unk_token="<unk>")
    e = encode(dict(chat=False, prompt="a:", chosen="b", rejected="c"), t)
    assert t.convert_ids_to_tokens(e["prompt_ids"] + e["chosen_ids"]) == ["▁a", ":", "b", "</s>"]


def test_turn_end():
    for template, end in ((CHATML, ([], "\n")), (LLAMA3, ([], "")), (NO_END, ([1], "\n")), (CHATML.replace("<|im_end|>\n", " </s>\n\n"), ([], "\n\n"))):
        assert turn_end(toy(template)) == end
    for template, last in ((CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (NO_END, "</s>")):
        t = toy(template, byte_level=True)
        e = encode(normalise(TEXT, chat=True), t)
        assert all(t.decode(e[s][-1:]) == last for s in ("chosen_ids", "rejected_ids"))
        assert t.decode(e["prompt_ids"]).endswith("assistant\n") and not e["boundary_moved"]


def test_turn_end_with_unknown_characters():
    t = Tokenizer(models.WordLevel({"<unk>": 0, "<e>": 1, "<u>": 2}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t = PreTrainedTokenizerFast(tokenizer_object=t, unk_token="<unk>", eos_token="<e>", additional_special_tokens=["<u>"],
                                chat_template="{% for m in messages %}<u> {{ m.content }} <e> {% endfor %}")
    assert turn_end(t) == ([], " ")


def test_what_follows_an_answer_is_cut_as_text():
    "A full stop and the two line feeds after it may be one token, and the full stop is the answer's."
    t = toy(NO_END.replace("m.content }}", "m.content }}\n"), byte_level=True)
    t.add_tokens(".\n\n")                    # stands for a merge
    e = encode(normalise(dict(prompt=[user("is it")], chosen=[assistant("it is.")], rejected=[assistant("it is")])), t)
    assert [t.decode(e[s]) for s in ("chosen_ids", "rejected_ids")] == ["it is.</s>", "it is</s>"] and not e["drop"]


@pytest.mark.parametrize("template, end", [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (NO_END, "</s>")])
def test_an_end_token_in_the_answer_is_there_once(template, end):
    t = toy(template, byte_level=True)
    said = lambda answer: t.decode(encode(normalise(dict(prompt="a", chosen=answer, rejected="no"), chat=True), t)["chosen_ids"])
    for answer in ("yes", "yes" + end, "yes" + end * 2): assert said(answer) == "yes" + end
    assert said("yess") == "yess" + end     # a letter is no end token


def test_a_template_that_leaves_out_a_part_is_refused():
    def rows(**kw): return load_pairs([dict(dict(prompt=[user("1+1"), assistant("<think>2</think>2"), user(" and? ")], chosen=[assistant("<think>so </think>\n\n3")], rejected=[assistant("4")]), **kw)])
    keeps = CHATML.replace("m.content", "m.content | trim")
    forgets = CHATML.replace("m.content", "(m.content.split('</think>')[-1] if m.role == 'assistant' else m.content)")
    spaced = CHATML.replace("m.content", "m.content.replace('<think>', '<think>\n').replace('</think>\n\n', '\n</think>\n\n')")
    no_system = CHATML.replace("{{ m.content }}", "{% if m.role != 'system' or messages[-1].role == 'user' %}{{ m.content }}{% endif %}")   # not above an answer
    for template in (keeps, spaced): assert len(tokenize_pairs(rows(), toy(template, byte_level=True))) == 1
    with pytest.raises(ValueError, match="source 's', row 0: the chat template leaves out.*'assistant'.*<think>so"): tokenize_pairs(rows(), toy(forgets), "s")
    assert len(tokenize_pairs(rows(chosen=[assistant("3")]), toy(forgets, byte_level=True))) == 1       # thoughts of earlier turns may go
    with pytest.raises(ValueError, match="source 's', row 0: the chat template leaves out.*'system'.*be brief"): tokenize_pairs(rows(system="be brief"), toy(no_system), "s")


# ---- cuts and drops

def test_cuts():
    t, pair = toy(), dict(chat=False, prompt="abcdefgh", chosen="klmnop", rejected="uvw")
    full = encode(pair, t)
    assert (len(full["prompt_ids"]), len(full["chosen_ids"]), full["truncated"], full["prompt_truncated"]) == (8, 7, False, False)
    assert not encode(pair, t, 15, 8)["truncated"] and encode(pair, t, 14, 8)["truncated"]
    e = encode(pair, t, 9, 3)
    assert t.decode(e["prompt_ids"]) == "fgh" and t.decode(e["chosen_ids"]) == "klmnop" and t.decode(e["rejected_ids"]) == "uvw</s>"
    assert e["truncated"] and e["prompt_truncated"] and e["key"] != full["key"]


def test_drops_are_counted():
    def row(c, r, p="ab"): return dict(prompt=p, chosen=c, rejected=r)
    rows = [row("x", "y"), row("", "y"), row(" \n", "y"), row("</s>", "y"), row("x", "x"), row("xyzxyzxyz1", "xyzxyzxyz2"), row("x", "y", ""), row("xyzxyzxyz", "y")]
    s = tokenize_pairs(load_pairs(rows), toy(), "s", max_length=8)
    assert s.counts == dict(rows=8, usable=2, empty=3, equal=1, no_prompt=1, no_room=1, chat=0, truncated=1, prompt_truncated=0, boundary_moved=0, duplicates=0, both_labels=0)
    assert len(s) == 2 and s.pairs["truncated"][:] == [False, True]
    assert s.pairs.column_names == ["row", "key", "asked", "prompt_ids", "chosen_ids", "rejected_ids", "truncated"]
    assert counts_table([s]).loc["s", "empty"] == 3 and json.dumps(s.counts)
    with pytest.raises(ValueError, match="source 's': no usable pair among 1 rows.*empty"): tokenize_pairs(load_pairs(rows[1:2]), toy(), "s")
    assert tokenize_pairs(load_pairs([row("x", "y", "")]), toy(bos=True)).counts["usable"] == 1 # BOS is a prompt


def test_pad_is_eos_changes_nothing():
    a, b = (tokenize_pairs(load_pairs([TEXT]), toy(**kw)).pairs.to_list() for kw in ({}, dict(pad_token="</s>")))
    assert a == b and a[0]["chosen_ids"][-1] == 1


# ---- the cache

@pytest.fixture
def counted(monkeypatch):
    calls, real = [], P.encode
    monkeypatch.setattr(P, "encode", lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


def test_tokenised_once(counted, tmp_path):
    path = write(tmp_path / "p.jsonl", [TEXT] * 3)
    tokenize_pairs(load_pairs(path), toy()); tokenize_pairs(load_pairs(path), toy(), "other name"); tokenize_pairs(load_pairs([TEXT] * 3), toy())
    assert len(counted) == 3 # whatever the rows were read from
    for kw in (dict(max_length=9), dict(max_prompt_length=3)): tokenize_pairs(load_pairs(path), toy(), **kw)
    tokenize_pairs(load_pairs(path), toy(bos=True)); tokenize_pairs(load_pairs(path), toy(CHATML)); tokenize_pairs(load_pairs(path), toy(CHATML), chat=True)
    assert len(counted) == 18
    t = toy(pad_token="</s>"); tokenize_pairs(load_pairs(path), t); t(["a", "ab"], padding=True, truncation=True, max_length=5); tokenize_pairs(load_pairs(path), t)
    assert len(counted) == 21 # padding and truncation of an earlier call are no settings


def test_edited_file_is_never_stale(tmp_path):
    path = write(tmp_path / "p.jsonl", [TEXT]); stat = path.stat()
    first = tokenize_pairs(load_pairs(path), toy()).pairs[0]["key"]
    write(path, [dict(TEXT, chosen="http://c.org")]); os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size and path.stat().st_mtime_ns == stat.st_mtime_ns
    assert tokenize_pairs(load_pairs(path), toy()).pairs[0]["key"] != first


def test_python_tokenizer_that_adds_bos():
    "What such a tokenizer adds by itself is in no file that could be hashed."
    class Bytes(ByT5Tokenizer):
        def build_inputs_with_special_tokens(self, a, b=None): return [self.unk_token_id] * self.bos + a
    plain, with_bos = Bytes(), Bytes()
    plain.bos, with_bos.bos = False, True
    a, b = (tokenize_pairs(load_pairs([TEXT]), t).pairs[0]["prompt_ids"] for t in (plain, with_bos))
    assert b == [plain.unk_token_id] + a


def test_interruption_leaves_nothing_broken(tmp_path, monkeypatch):
    real, calls = P.encode, []
    def failing(*a, **k):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        return real(*a, **k)
    monkeypatch.setattr(P, "encode", failing)
    data = load_pairs([dict(TEXT, chosen=f"http://{i}.org") for i in range(5)])
    with pytest.raises(KeyboardInterrupt): tokenize_pairs(data, toy())
    assert not list((tmp_path / "cache" / "sdpo_nb").glob("*.arrow"))
    assert len(tokenize_pairs(data, toy())) == 5


def test_processes():
    rows = [dict(TEXT, chosen=f"http://{i}.org") for i in range(7)]
    one, two = (tokenize_pairs(load_pairs(rows), toy(), num_proc=n).pairs.to_list() for n in (None, 2))
    assert one == two
    with pytest.raises(ValueError, match="source 's', row 5, field 'rejected'"):
        tokenize_pairs(Dataset.from_list(rows[:5] + [dict(TEXT, rejected=None)]), toy(), "s", num_proc=2)


# ---- equality with TRL

def trl_ids(rows, tokenizer):
    "What TRL's DPOTrainer makes of the rows: its own method, without a trainer around it."
    from types import SimpleNamespace
    DPOTrainer = pytest.importorskip("trl", reason="TRL is not installed here").DPOTrainer
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    return DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), Dataset.from_list(rows), tokenizer, args, "train").select_columns(
        ["prompt_ids", "chosen_ids", "rejected_ids"]).to_list()


def our_ids(rows, tokenizer): return tokenize_pairs(load_pairs(rows), tokenizer).pairs.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).to_list()


def conversations(n=20, rng=random.Random(0)):
    def words(): return " ".join(rng.choice(["see", "http://a.org", "the page", "is it", "or", "http:", "42?"]) for _ in range(rng.randint(1, 6)))
    return [dict(prompt=[user(words()), assistant(words()), user(words())][2 * (i % 2):], chosen=[assistant(words() + "x")], rejected=[assistant(words() + "y")]) for i in range(n)]


@pytest.mark.parametrize("kw", [{}, dict(bos=True), dict(eos=True), dict(byte_level=True)])
def test_text_rows_equal_trl(kw):
    rows = [dict(prompt=r["prompt"][0]["content"], chosen=r["chosen"][0]["content"], rejected=r["rejected"][0]["content"]) for r in conversations()]
    rows.append(dict(prompt="is it http:", chosen="//a.org", rejected="//b.org")) # merges across the boundary
    if kw.get("eos"): # TRL writes EOS and the tokenizer another one; here there is one
        assert [r["chosen_ids"] + [1] for r in our_ids(rows, toy(**kw))] == [r["chosen_ids"] for r in trl_ids(rows, toy(**kw))]
    else: assert our_ids(rows, toy(**kw)) == trl_ids(rows, toy(**kw))


def test_implicit_text_prompt_equals_trl():
    rows = [dict(chosen=f"see {a} http://a.org", rejected=f"see {a} or http://b.org") for a in ("it", "the page", "is it")] + [dict(chosen="see it", rejected="see its")]
    assert our_ids(rows, toy()) == trl_ids(rows, toy())


@pytest.mark.parametrize("byte_level", [False, True])
@pytest.mark.parametrize("template, tail", [(LLAMA3, 0), (CHATML, 1)])
def test_conversations_equal_trl(template, tail, byte_level):
    "Equal but for one difference: TRL scores what the template writes after the end token (ChatML's line feed), we do not."
    rows, t = conversations(), toy(template, byte_level=byte_level)
    trl = trl_ids(rows, t)
    if tail: assert all(t.decode(r[s][-1:]) == "\n" for r in trl for s in ("chosen_ids", "rejected_ids"))
    assert our_ids(rows, t) == [{k: v[:len(v) - tail * (k != "prompt_ids")] for k, v in r.items()} for r in trl]
    implicit = [dict(chosen=r["prompt"] + r["chosen"], rejected=r["prompt"] + r["rejected"]) for r in rows]
    assert our_ids(implicit, t) == our_ids(rows, t)


def test_ends_that_trl_leaves_as_they_are():
    "Differences on purpose: no end token gets EOS here and none there; an end token that an answer has is doubled there."
    row = dict(prompt=[user("is it")], chosen=[assistant("yes")], rejected=[assistant("no")])
    t = toy(NO_END, byte_level=True)
    assert [t.decode(ids(([row]), t)[0]["chosen_ids"]) for ids in (trl_ids, our_ids)] == ["yes\n", "yes</s>"]
    t, ended = toy(LLAMA3, byte_level=True), row | dict(chosen=[assistant("yes<|eot_id|>")])
    assert [t.decode(ids(([ended]), t)[0]["chosen_ids"]) for ids in (trl_ids, our_ids)] == ["yes<|eot_id|><|eot_id|>", "yes<|eot_id|>"]


def test_what_trl_keeps_and_we_drop():
    rows = [TEXT, dict(TEXT, chosen="no", rejected="no"), dict(TEXT, chosen="", rejected="no"), dict(TEXT, prompt="", chosen="so", rejected="no")]
    assert len(trl_ids(rows, toy())) == 4 and len(our_ids(rows, toy())) == 1


def test_the_world_equals_trl(tiny):
    rows = load_pairs(load_world().sources["riddle"]).select(range(50)).select_columns(["prompt", "chosen", "rejected"]).to_list()
    assert our_ids(rows, tiny) == trl_ids(rows, tiny)


# ---- real files

@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data in {REAL} (set SDPO_DATA)")
@pytest.mark.parametrize("name, rows, chat", [("orca_dpo_pairs", 361, True), ("ultrafeedback_binarized", 1193, False), ("hh_harmless", 1150, True), ("instruction_politeness", 1094, False)])
def test_real_files(name, rows, chat):
    data, t = load_pairs(REAL / f"{name}.jsonl.gz"), toy(CHATML, byte_level=True)
    assert len(data) == rows
    some = data.select(range(0, rows, 40))
    s = tokenize_pairs(some, t, name, max_length=200_000, max_prompt_length=100_000)
    assert s.counts["usable"] == len(some) and s.counts["chat"] == chat * len(some) and s.counts["truncated"] == 0
    for raw, pair in zip(some, s.pairs):
        text = t.decode(pair["prompt_ids"] + pair["chosen_ids"])
        assert text.endswith(raw["chosen"] + ("<|im_end|>" if chat else "</s>"))
        assert text.count("<|im_start|>") == chat * (2 + (raw["system"] is not None) + len((raw["messages"] or [0])[1:]))
        if name == "hh_harmless": assert "Human:" not in t.decode(pair["prompt_ids"]) # the turns, not the flat copy
    cut = tokenize_pairs(some, t, name, max_length=300, max_prompt_length=200)
    assert all(len(p["prompt_ids"]) <= 200 and len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) <= 300 for p in cut.pairs)
    assert cut.counts["truncated"] > 0 or name == "instruction_politeness"


def test_large_sources_are_tokenised_in_parallel(monkeypatch):
    monkeypatch.setattr(P.os, "cpu_count", lambda: 4)
    assert [P._processes(n) for n in (1, 9_999, 10_000, 35_000, 10**6)] == [None, None, 1, 3, 4]


# ---- found by outsiders: nothing that a model was meant to read is lost, nothing is read twice

TWO_ENDS = CHATML.replace("<|im_end|>\n", "<|eot_id|><|im_end|>")
TOOL = {"type": "function", "function": {"name": "w", "arguments": {}}}
LOST = {
    "tools": (dict(TEXT, tools=[TOOL]), "tools"),
    "images": (dict(TEXT, images=["a.png"]), "images"),
    "alpaca input": (dict(TEXT, input="hello"), "input"),
    "tool call before": (dict(prompt=[user("a"), assistant("") | {"tool_calls": [TOOL]}], chosen=[assistant("b")], rejected=[assistant("c")]), "prompt[1].tool_calls"),
    "tool call chosen": (dict(prompt=[user("a")], chosen=[assistant("") | {"tool_calls": [TOOL]}], rejected=[assistant("c")]), "chosen[0].tool_calls"),
    "reasoning": (dict(prompt=[user("a")], chosen=[assistant("4") | {"reasoning_content": "so"}], rejected=[assistant("4")]), "chosen[0].reasoning_content"),
    "documents": (dict(TEXT, documents=["a text"]), "documents"),
    "history": (dict(TEXT, history=[["q", "a"]]), "history"),
    "system_prompt": (dict(TEXT, system_prompt="be brief"), "system_prompt"),
    "system_message": (dict(TEXT, system_message="be brief", system=None), "system_message"),
    "surrogate": (dict(TEXT, chosen="b \ud83d"), "chosen"),
    "messages as text": (dict(TEXT, chosen=str([assistant("b")]), rejected=str([assistant("c")])), "chosen"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_a_model_should_read_is_not_lost(tmp_path, name):
    row, field = LOST[name]
    first = TEXT if isinstance(row["chosen"], str) else dict(prompt=[user("a")], chosen=[assistant("b")], rejected=[assistant("c")])
    sources = [[first, row], write(tmp_path / "p.jsonl", [first, row])]
    if name != "surrogate": sources.append(Dataset.from_list([{k: None for k in row} | first, row]))
    for source in sources:
        with pytest.raises(ValueError) as e: load_pairs(source)
        assert "row 1" in str(e.value) and f"field '{field}'" in str(e.value), e.value
    harmless = dict(first, tools=None, images=[], input="see ", id=3, score_chosen=None, system_prompt="", history=[])
    if first is TEXT: assert len(load_pairs([harmless])) == 1
    if name == "system_prompt": assert load_pairs([row], columns=dict(system_prompt="system"))[0]["system"] == "be brief"


@pytest.mark.parametrize("sides", ["turns", "strings"])
def test_messages_that_hold_the_answer_are_not_read_twice(sides):
    whole = lambda a: [user("2+2?"), assistant(a)]
    row = dict(prompt="2+2?", chosen="4", rejected="5", messages=whole("4"))
    if sides == "turns": row |= dict(chosen=whole("4"), rejected=whole("5"))
    assert normalise(row)["prompt"] == [user("2+2?")]
    longer = dict(row, messages=[user("hi"), assistant("ho"), *whole("4")])
    assert normalise(longer)["prompt"] == [user("hi"), assistant("ho"), user("2+2?")]
    with pytest.raises(ValueError, match="'messages': holds the prompt"): normalise(dict(row, messages=whole("6")))


def test_a_source_is_a_chat_or_it_is_not(tmp_path):
    rows = [dict(prompt="q", chosen="x", rejected="y", system=s) for s in (None, "be brief", None)]
    (tmp_path / "p.csv").write_text("system,prompt,chosen,rejected\n,q,x,y\nbe brief,q,x,y\n,q,x,y\n")
    for data in (load_pairs(rows), load_pairs(tmp_path / "p.csv"), load_pairs(rows).select([2, 1])):
        s = tokenize_pairs(data, toy(CHATML), "s")
        assert s.counts["chat"] == len(data)
    mixed = [dict(chosen="see x", rejected="see y", system=None), dict(prompt="q", chosen="x", rejected="y", system="s")]
    data = load_pairs([dict(prompt=None) | m for m in mixed[:1]]).to_list() + [mixed[1]]
    with pytest.raises(ValueError, match="source 's', row 0.*row 1 has a system message"): tokenize_pairs(Dataset.from_list(data), toy(CHATML), "s")
    assert tokenize_pairs(load_pairs(rows).select([0]), toy(CHATML), "s").counts["chat"] == 0


def test_a_turn_may_end_with_two_tokens():
    t = toy(TWO_ENDS)
    assert turn_end(t) == ([], "")
    pair = tokenize_pairs(load_pairs([dict(prompt=[user("a")], chosen=[assistant("b")], rejected=[assistant("c")])]), t).pairs[0]
    assert t.decode(pair["chosen_ids"]) == "b<|eot_id|><|im_end|>"
    phi = toy(CHATML.replace("{% if add", "{% if not add_generation_prompt %}</s>{% endif %}{% if add"))   # the end of the text is no end of a turn
    assert turn_end(phi) == ([], "\n</s>")


def test_templates_that_cannot_be_asked(tmp_path):
    chat = [dict(prompt=[user("a")], chosen=[assistant("b")], rejected=[assistant("c")])]
    needs_system = toy("{% if messages[0].role != 'system' %}{{ raise_exception('a system message is needed') }}{% endif %}" + CHATML)
    broken, parts = toy("{% for m in messages %}{{ m.role }"), toy("{% for m in messages %}{{ m.role }}: {% for c in m.content %}{{ c.text }}{% endfor %}<|im_end|>{% endfor %}")
    for t in (needs_system, broken, parts): assert tokenize_pairs(load_pairs([TEXT]), t).counts["usable"] == 1    # text asks no template
    assert tokenize_pairs(load_pairs([dict(TEXT, system="s")]), needs_system).counts["usable"] == 1
    for t, why in ((needs_system, "row 0: a system message"), (broken, "cannot be rendered"), (parts, "content in parts")):
        with pytest.raises(ValueError, match=f"source 's'.*{why}"): tokenize_pairs(load_pairs(chat), t, "s")


def test_a_template_with_a_clock_says_the_same_every_day(monkeypatch):
    t = toy("today {{ strftime_now('%d %b %Y') }}" + CHATML, byte_level=True)
    ids = tokenize_pairs(load_pairs([dict(prompt=[user("a")], chosen=[assistant("b")], rejected=[assistant("c")])]), t).pairs[0]["prompt_ids"]
    assert t.decode(ids).startswith("today 26 Jul 2024")


def test_one_bos_where_the_text_has_one():
    t = toy(bos=True)
    s = tokenize_pairs(load_pairs([dict(prompt="<s>see ", chosen="a", rejected="b"), dict(prompt="see ", chosen="a", rejected="b")]), t)
    assert [p["prompt_ids"] for p in s.pairs][0] == s.pairs[1]["prompt_ids"] and s.counts["duplicates"] == 1


def test_names_with_glob_characters_are_names(tmp_path):
    good, evil = [dict(TEXT)], [dict(prompt="see ", chosen=TEXT["rejected"], rejected=TEXT["chosen"])]
    for kind, save in (("parquet", "to_parquet"), ("csv", "to_csv")):
        for name, rows in (("p1", evil), ("p[1]", good), ("star", evil), ("st*r", good)): getattr(Dataset.from_list(rows), save)(str(tmp_path / f"{name}.{kind}"))
        for name in ("p[1]", "st*r"):
            data = load_pairs(tmp_path / f"{name}.{kind}")
            assert len(data) == 1 and data[0]["chosen"] == TEXT["chosen"]


def test_words_that_a_csv_reader_takes_for_nothing(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,chosen,rejected\nis it so?,None,Yes\nand this?,NA,null\n")
    assert [r["chosen"] for r in load_pairs(tmp_path / "p.csv")] == ["None", "NA"]


def test_a_cell_of_a_csv_is_text(tmp_path):
    long = "x" * 200_000
    words = ["3", "007", "True", "2024-01-01", "1e5", "Yes, it is", "two\nlines", 'a "word"', long] 
    words = (words + ["word"] * 10_000)[:10_000] + ["007", "42"]            # a reader that takes 10,000 rows at once would make numbers of these
    cells = ['"' + word.replace('"', '""') + '"' for word in words]
    for name, opened in (("p.csv", open), ("p.csv.gz", gzip.open)):
        with opened(tmp_path / name, "wt") as f: f.write("prompt,chosen,rejected,\n\n" + "".join(f"is it?,{cell},no\n" for cell in cells))
        assert load_pairs(tmp_path / name)["chosen"][:] == words


@pytest.mark.parametrize("text, said", [
    ('is it?,"two\nlines",no\nis it?,Yes, it is,no\n', r"row 1 \(line 4\): 4 cells"),
    ("is it?,yes,no,more\n" * 2, r"row 0 \(line 2\): 4 cells"),       # a reader that guesses takes the first column for row numbers
    ('\nis it?,yes,no\n\nis it?,"yes,no\n', r"row 1 \(line 5\): not CSV"),
    ('is it?,"yes" or,no\n', r"row 0 \(line 2\): not CSV"),
    ("is it?,yes\n", r"row 0 \(line 2\), field 'rejected'"),
])
def test_a_csv_whose_cells_do_not_fit_names_row_and_line(tmp_path, text, said):
    (tmp_path / "p.csv").write_text("prompt,chosen,rejected\n" + text)
    with pytest.raises(ValueError, match="^" + str(tmp_path / "p.csv") + ", " + said): load_pairs(tmp_path / "p.csv")


def test_a_csv_that_gives_a_name_twice(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,chosen,chosen,rejected\na,b,c,d\n")
    with pytest.raises(ValueError, match="p.csv: the first line gives 'chosen' twice"): load_pairs(tmp_path / "p.csv")


def test_json_in_the_wrong_file(tmp_path):
    for name, rows in (("p.jsonl", [TEXT]), ("p.json", TEXT)):
        (tmp_path / name).write_text(json.dumps(rows, indent=1))
        with pytest.raises(ValueError, match=r"row 0 \(line 1\): not JSON .*line 1 .*expected one object a line, or one list of objects in a .json file"): load_pairs(tmp_path / name)
    (tmp_path / "blanks.json").write_text(" \n" * 1_000 + json.dumps([TEXT]))
    assert len(load_pairs(tmp_path / "blanks.json")) == 1


def test_columns_that_get_one_name():
    row = dict(question="a", instruction="b", chosen="c", rejected="d")
    for source in ([row], Dataset.from_list([row])):
        with pytest.raises(ValueError, match="both 'question' and 'instruction' the name 'prompt'"): load_pairs(source, columns=dict(question="prompt", instruction="prompt"))
    assert load_pairs([dict(question="a", chosen="c", rejected="d")], columns=dict(question="prompt", instruction="prompt"))[0]["prompt"] == "a"


def test_odd_files(tmp_path, capsys):
    Dataset.from_list([TEXT]).select([]).to_parquet(str(tmp_path / "none.parquet"))
    with pytest.raises(ValueError, match="none.parquet: no rows"): load_pairs(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"deep.jsonl, row 1 \(line 2\): not JSON"): load_pairs(write(tmp_path / "deep.jsonl", [TEXT, "[" * 50_000 + "]" * 50_000]))
    with pytest.raises(ValueError, match=r"long.jsonl, row 0 \(line 1\): not JSON"): load_pairs(write(tmp_path / "long.jsonl", ['{"prompt": ' + "1" * 10_000 + "}"]))
    assert len(load_pairs(write(tmp_path / "UPPER.JSONL", [TEXT]))) == 1
    folder = tmp_path / "mixed"; folder.mkdir()
    write(folder / "a.jsonl", [TEXT]), (folder / "c.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    assert len(load_pairs(folder)) == 1 and "not read" in (said := capsys.readouterr().out) and "c.csv" in said


@pytest.mark.parametrize("source", [Dataset.from_list([TEXT]).to_iterable_dataset(), {"prompt": ["a"]}, 3, iter([TEXT])], ids=["iterable", "dict of columns", "number", "iterator"])
def test_other_containers_are_refused(source):
    with pytest.raises(ValueError, match="expected a file, a folder"): load_pairs(source)


def test_a_cache_that_cannot_be_used_is_not_the_files_fault(tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "taken" / "cache")
    path = write(tmp_path / "p.jsonl", [dict(TEXT, prompt=f"unseen {random.random()}")])
    with pytest.raises(ValueError, match="the cache of datasets"): load_pairs(path)


def test_the_prompt_leaves_room(tiny):
    rows = [dict(prompt="copy " + "a" * 60, chosen="ab", rejected="ba"), dict(prompt="copy a", chosen="ab" * 30, rejected="ab" * 30 + "c")]
    s = tokenize_pairs(load_pairs(rows), tiny, "s", max_length=32)
    assert s.counts["usable"] == 1 and s.counts["prompt_truncated"] == 1 and s.dropped() == dict(no_room=1)
    assert len(s.pairs[0]["prompt_ids"]) == 16 and len(s.pairs[0]["chosen_ids"]) == 3
    for given in (32, 40, -1):
        with pytest.raises(ValueError, match="max_prompt_length.*below max_length = 32"): tokenize_pairs(load_pairs(rows), tiny, "s", 32, given)


def test_pairs_of_one_prompt_fall_on_one_side():
    "Wherever the boundary (1) moves. A prompt at whose end nothing merges has the lot of its ids, as it always had."
    t, sides = toy(), [("//a.org", "//b.org"), ("//a.org", " or not?"), ("42", " or not?"), ("so", "no")]
    moving = [dict(prompt=f"is it {i} http:", chosen=c, rejected=r) for i in range(12) for c, r in sides]
    s = tokenize_pairs(load_pairs(moving), t, "moving")
    assert s.counts["boundary_moved"] == 24 and len({tuple(ids) for ids in s.pairs["prompt_ids"]}) == 24
    train, held = P.hold_out(s, 0.5)
    asked = [{moving[i]["prompt"] for i in part.pairs["row"]} for part in (train, held)]
    assert asked[0] and asked[1] and not asked[0] & asked[1]
    assert seen_in_training([held], [train]) == [0] and seen_in_training([held], [s]) == [len(held)]
    odd = P.Source("odd", s.pairs.select(range(0, 48, 4)), {})                # of every prompt the pair in which it is read in another way
    assert seen_in_training([P.Source("other", s.pairs.select(range(2, 48, 4)), {})], [odd]) == [12]

    still = tokenize_pairs(load_pairs([dict(prompt="see " + "a" * i, chosen="b", rejected="c") for i in range(9)]), t, "still", 16, 6)
    assert still.counts["prompt_truncated"] and not still.counts["boundary_moved"]
    by_hand = P.Source("by hand", still.pairs.remove_columns("asked"), {})   # as somebody makes it who has ids
    lots = [int(hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12], 16) / 16**12 for ids in still.pairs["prompt_ids"]]
    for source in (still, by_hand): assert [P._lot(name) for name in source.asked()] == lots
    both = datasets.concatenate_datasets([still.pairs, by_hand.pairs])
    assert P.Source("both", both, {}).asked() == still.asked() * 2 and seen_in_training([by_hand], [still]) == [9]


def test_duplicates_and_both_labels_are_counted(tiny):
    a, b = dict(prompt="copy ab", chosen="ab", rejected="ba"), dict(prompt="copy ab", chosen="ba", rejected="ab")
    counts = tokenize_pairs(load_pairs([a, a, b, dict(a, prompt="copy abc")]), tiny, "s").counts
    assert (counts["duplicates"], counts["both_labels"]) == (1, 3)


def test_a_prompt_that_both_responses_repeat_is_counted_and_warned_of_where_most_do(tiny):
    row = dict(prompt="copy ab", chosen="ab", rejected="ba")
    twice = dict(row, chosen=" copy ab ab", rejected="copy ab ba")
    one_side = dict(row, chosen="copy ab ab")
    for rows, count in (([row, one_side], 0), ([dict(twice, prompt=" ")], 0), ([twice, row], 1), ([twice, twice, row], 2)):
        for chat in (False, True):
            s = tokenize_pairs(load_pairs(rows), tiny, "s", chat=chat)
            assert s.counts.get("prompt_repeated", 0) == count
            assert ("begin with the prompt" in str(data_notes(s))) == (count == 2)
