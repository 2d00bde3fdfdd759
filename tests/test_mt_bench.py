"MT-Bench: FastChat's files, one question at a time, a judge behind an endpoint, and what goes wrong in one line."
import functools, io, json, math, os, sys, threading, urllib.error, urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pandas as pd
import pytest
import torch

from sdpo_nb import cli, mt_bench as module
from sdpo_nb.logprobs import load_model, load_tokenizer
from sdpo_nb.mt_bench import answer_turns, judge_messages, mt_bench, mt_bench_table, openai_judge, rating_of, load_lines
from sdpo_nb.mt_bench import write_answers, write_judgments
from sdpo_nb.world import load_world
from tiny import perturbed, write_jsonl

W = load_world()
BASE = W.base
DATA = Path(os.environ.get("SDPO_DATA", Path(__file__).parents[2] / "shared/data")) / "benchmarks"
CATEGORIES = "writing", "math", "stem"
ASKED = [dict(question_id=i, category=CATEGORIES[i % 3], turns=W.test[2*i:2*i+2]) | (dict(reference=["R1", "R2"]) if i % 3 == 1 else {}) for i in range(6)]


def prompt(name, text): return dict(name=name, type="single", system_prompt=f"sys {name}", prompt_template=text, output_format="[[rating]]")
TOLD = [prompt("single-v1", "{question}|{answer}"), prompt("single-v1-multi-turn", "{question_1}|{answer_1}|{question_2}|{answer_2}"),
        prompt("single-math-v1", "{ref_answer_1}|{question}|{answer}"),
        prompt("single-math-v1-multi-turn", "{ref_answer_1}|{ref_answer_2}|{question_1}|{answer_1}|{question_2}|{answer_2}")]
PROMPTS = {line["name"]: line for line in TOLD}
HOW = dict(questions=ASKED, judge_prompts=TOLD, name="tiny", max_new=6, precision="fp32")


def lines(path): return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
def seven(messages): return "good [[7]]"


@pytest.fixture
def endpoint():
    "An endpoint on this machine: what it was asked, and a list of what to answer (a status, or a text)."
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append((self.path, self.headers.get("Authorization"), body))
            answer = server.answers.pop(0) if server.answers else "fine [[6]]"
            if isinstance(answer, int): return self.send_error(answer)
            self.send_response(200)
            if answer is None: self.send_header("Content-Length", "400")             # cut: none of them comes
            self.end_headers()
            if answer is None: return
            self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(dict(choices=[dict(message=dict(content=answer))])).encode())
        def log_message(self, *args): pass
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answers = [], []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_paths_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "q.jsonl", ASKED[:2])
    write_jsonl(tmp_path / "p.jsonl", TOLD)
    table = mt_bench(BASE, "~/out", judge=seven, **HOW | dict(questions="~/q.jsonl", judge_prompts="~/p.jsonl"))
    assert table.loc["all", "both"][0] == 7 and (tmp_path / "out/model_answer/tiny.jsonl").exists() and not (tmp_path / "~").exists()


def test_fastchats_formats(tmp_path, endpoint):
    "The fields that FastChat's own code reads: answers, judgments, names of files and prompts."
    table = mt_bench(BASE, tmp_path, judge=openai_judge("org/judge-1", endpoint.url, "key"), **HOW)
    answers = lines(tmp_path / "model_answer/tiny.jsonl")
    assert [a["question_id"] for a in answers] == list(range(6)) and {a["model_id"] for a in answers} == {"tiny"}
    assert len({a["answer_id"] for a in answers}) == 6 and all(isinstance(a["tstamp"], float) for a in answers)
    assert all(list(c) == ["index", "turns"] and c["index"] == 0 and len(c["turns"]) == 2 for a in answers for c in a["choices"])
    judged = lines(tmp_path / "model_judgment/org--judge-1_single.jsonl")
    assert len(judged) == 12
    for j in judged:
        q, a = ASKED[j["question_id"]], answers[j["question_id"]]["choices"][0]["turns"]
        math_, multi = ("-math" if q["category"] == "math" else ""), ("-multi-turn" if j["turn"] == 2 else "")
        assert j["judge"] == ["org/judge-1", f"single{math_}-v1{multi}"] and j["model"] == "tiny" and j["score"] == 6
        told = [q["turns"][0], a[0]] + ([q["turns"][1], a[1]] if multi else [])
        assert j["user_prompt"] == "|".join((["R1", "R2"][:j["turn"]] if math_ else []) + told) and j["judgment"] == "fine [[6]]"
    path, key, body = endpoint.asked[0]
    assert path == "/v1/chat/completions" and key == "Bearer key"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("org/judge-1", 0, 2048)
    assert body["messages"] == [dict(role="system", content="sys single-v1"), dict(role="user", content=judged[0]["user_prompt"])]
    assert table.loc["all", "turn 1"] == (6, 6, 6) and table["questions"].to_dict() == dict(writing=2, math=2, stem=2, all=6)


def test_no_judge_no_marks(tmp_path, capsys):
    assert mt_bench(BASE, tmp_path, **HOW).empty
    assert "questions answered: 6, in" in (out := capsys.readouterr().out) and "no judge was given" in out
    assert not (tmp_path / "model_judgment").exists()


def test_a_killed_call_goes_on(tmp_path, monkeypatch):
    "Killed at the third question, then in the judge's fifth; what was there stays as it was, and nothing is asked twice."
    true, calls = module.answer_turns, []
    def dies(model, tok, q, *a):
        calls.append(q["question_id"])
        if len(calls) == 3: raise KeyboardInterrupt
        return true(model, tok, q, *a)
    monkeypatch.setattr(module, "answer_turns", dies)
    with pytest.raises(KeyboardInterrupt): mt_bench(BASE, tmp_path, **HOW)
    two = lines(tmp_path / "model_answer/tiny.jsonl")
    assert len(two) == 2
    asked = []
    def judge(messages):
        asked.append(messages[1]["content"])
        if len(asked) == 5: raise KeyboardInterrupt
        return "[[3]]"
    with pytest.raises(KeyboardInterrupt): mt_bench(BASE, tmp_path, judge=judge, **HOW)
    assert lines(tmp_path / "model_answer/tiny.jsonl")[:2] == two and calls == [0, 1, 2, 2, 3, 4, 5]
    assert len(lines(tmp_path / "model_judgment/judge_single.jsonl")) == 4
    table = mt_bench(BASE, tmp_path, judge=judge, **HOW)
    assert len(asked) == 13 and table.loc["all", "both"][0] == 3 and calls == [0, 1, 2, 2, 3, 4, 5]
    assert not list(tmp_path.rglob("*.tmp"))


def test_answers_of_other_weights_are_written_anew(tmp_path):
    mt_bench(BASE, tmp_path, judge=seven, **HOW)
    old, marks = (lines(tmp_path / f) for f in ("model_answer/tiny.jsonl", "model_judgment/seven_single.jsonl"))
    other = tmp_path / "other"
    perturbed(load_model(BASE, "cpu"), 0.5).save_pretrained(other); load_tokenizer(BASE).save_pretrained(other)
    mt_bench(other, tmp_path, judge=seven, **HOW)
    new = lines(tmp_path / "model_answer/tiny.jsonl")
    assert len(new) == 6 and not {a["answer_id"] for a in old} & {a["answer_id"] for a in new}
    assert [a["choices"] for a in old] != [a["choices"] for a in new]
    judged = lines(tmp_path / "model_judgment/seven_single.jsonl")
    assert len(marks) == len(judged) == 12 and {j["answer_id"] for j in judged} == {a["answer_id"] for a in new}, "one mark for each answer that is there"
    by_another = [j | dict(model="another") for j in marks]
    write_jsonl(tmp_path / "model_judgment/seven_single.jsonl", by_another + judged)
    assert mt_bench(other, tmp_path, judge=seven, **HOW | dict(max_new=2)).loc["all", "both"][0] == 7
    assert lines(tmp_path / "model_answer/tiny.jsonl")[0]["generate_params"]["max_new_token"] == 2
    assert lines(tmp_path / "model_judgment/seven_single.jsonl")[:12] == by_another


def folder_of(tmp_path, rows, name="model_answer/tiny.jsonl"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(tmp_path / name, rows)
    return tmp_path / name


def test_what_no_longer_fits_is_moved_beside(tmp_path, capsys):
    "A first look under the same name loses nothing: answers and their marks, of every judge, lie in files beside; marks of others stay."
    mt_bench(BASE, tmp_path, judge=seven, **HOW)
    answers, marks = tmp_path / "model_answer/tiny.jsonl", tmp_path / "model_judgment/seven_single.jsonl"
    old, judged = lines(answers), lines(marks)
    by_fastchat = [{k: v for k, v in j.items() if k != "answer_id"} for j in judged]
    stay = by_fastchat + [judged[0] | dict(model="another")]
    folder_of(tmp_path, judged + stay, "model_judgment/another-judge_single.jsonl")
    capsys.readouterr()
    mt_bench(BASE, tmp_path, limit=1, **HOW | dict(max_new=2))
    assert len(lines(answers)) == 1 and lines(f"{answers}.old") == old
    assert not lines(marks) and lines(f"{marks}.old") == judged and lines(tmp_path / "model_judgment/another-judge_single.jsonl") == stay
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "model_answer/tiny.jsonl: 6 of 6 lines were answers of other weights, settings or questions; they are in tiny.jsonl.old now"
    assert len(rest) == 3 and all("12 of " in line and "marks of answers that are gone" in line for line in rest[:2])
    mt_bench(BASE, tmp_path, **HOW)
    assert len(lines(f"{answers}.old")) == 7 and [a["choices"] for a in lines(answers)] == [a["choices"] for a in old]


def test_marks_that_fastchat_made_of_our_answers_count(tmp_path):
    mt_bench(BASE, tmp_path, judge=seven, **HOW)
    marks = tmp_path / "model_judgment/seven_single.jsonl"
    write_jsonl(marks, [{k: v for k, v in j.items() if k != "answer_id"} for j in lines(marks)])
    def never(messages): pytest.fail("asked again")
    never.__name__ = "seven"
    assert mt_bench(BASE, tmp_path, judge=never, **HOW).loc["all", "both"][0] == 7


def test_other_questions_references_and_prompts_are_asked_anew(tmp_path, monkeypatch):
    calls = []
    def judge(messages): return calls.append(messages[1]["content"]) or "[[3]]"
    def visits(**other):
        calls.clear()
        mt_bench(BASE, tmp_path, judge=judge, **HOW | other)
        return len(calls)
    assert (visits(), visits()) == (12, 0)
    translated = [ASKED[0] | dict(turns=W.test[50:52]), *ASKED[1:]]
    assert visits(questions=translated) == 2 and calls[0].startswith(W.test[50])
    assert visits(references=[dict(question_id=1, choices=[dict(turns=["A1", "A2"])])]) == 2 + 2     # the first question is the old one again
    assert visits(judge_prompts=[line | dict(prompt_template="NEW " + line["prompt_template"]) for line in TOLD]) == 12
    true = module.load_saved_tokenizer
    def other_template(place):
        tok = true(place)
        tok.chat_template = tok.chat_template + " "
        return tok
    monkeypatch.setattr(module, "load_saved_tokenizer", other_template)
    assert visits() == 12
    assert visits(questions=ASKED[:2]) == 0 and visits() == 0                    # what is not asked now, stays


def test_a_reference_that_is_missing_is_said_before_anything_is_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_any", lambda *a: pytest.fail("a model was loaded"))
    one = [q | dict(reference=["R1"]) if "reference" in q else q for q in ASKED]
    with pytest.raises(ValueError, match="question 1: nothing for the place 'ref_answer_2' of the judge prompt 'single-math-v1-multi-turn'.* 1 references"):
        mt_bench(BASE, tmp_path, judge=seven, **HOW | dict(questions=one))
    with pytest.raises(ValueError, match="question 0: nothing for the place"): mt_bench(BASE, tmp_path, judge=seven, **HOW | dict(judge_prompts=[t | dict(prompt_template="{}") for t in TOLD]))
    with pytest.raises(ValueError, match="judge: has no __name__"): mt_bench(BASE, tmp_path, judge=functools.partial(seven), **HOW)
    with pytest.raises(ValueError, match="questions: there are none"): mt_bench(BASE, tmp_path, **HOW | dict(questions=[]))
    assert not list(tmp_path.iterdir())


def test_references_come_from_where_the_questions_come_from(tmp_path, monkeypatch):
    there = {module.QUESTIONS: ASKED, module.REFERENCES: [dict(question_id=i, choices=[dict(turns=["A1", "A2"])]) for i in (1, 4)], module.JUDGE_PROMPTS: TOLD}
    read = []
    def reads(place): return read.append(place) or (place if isinstance(place, list) else there[place])
    monkeypatch.setattr(module, "load_lines", reads)
    mt_bench(BASE, tmp_path, judge=seven, **HOW | dict(questions=module.QUESTIONS, judge_prompts=module.JUDGE_PROMPTS))
    assert {j["user_prompt"].split("|")[0] for j in lines(tmp_path / "model_judgment/seven_single.jsonl") if "math" in j["judge"][1]} == {"A1"}
    mt_bench(BASE, tmp_path / "own", judge=seven, **HOW)
    assert read.count(module.REFERENCES) == 1


def test_ends_of_lines_that_json_leaves_as_they_are(tmp_path, monkeypatch):
    odd = "one\u2028two\u2029three\u0085four\x0b"
    monkeypatch.setattr(module, "answer_turns", lambda *a: [odd, odd])
    calls = []
    def judge(messages): return calls.append(1) or f"{odd} [[4]]"
    for _ in range(2): assert mt_bench(BASE, tmp_path, judge=judge, **HOW).loc["all", "both"][0] == 4
    assert len(calls) == 12


@pytest.mark.parametrize("damage", ['{"question_id": 81, "gen', b"\xff"])
def test_a_damaged_line_is_named(tmp_path, damage):
    path = folder_of(tmp_path, [dict(question_id=1)])
    with open(path, "ab") as f: f.write(b"\n" + (damage if isinstance(damage, bytes) else damage.encode()))
    with pytest.raises(ValueError, match="tiny.jsonl, line 3: not JSON; take the line out"): mt_bench(BASE, tmp_path, **HOW)


def test_a_models_own_way_of_drawing_stays(monkeypatch):
    "FastChat says the temperature, and nothing else."
    model, seen = load_model(BASE, "cpu"), []
    model.generation_config.top_k = 20
    true = model._get_logits_processor
    def spied(generation_config, *a, **kw):
        seen.append((generation_config.top_k, generation_config.temperature))
        return true(generation_config, *a, **kw)
    monkeypatch.setattr(model, "_get_logits_processor", spied)
    answer_turns(model, load_tokenizer(BASE), dict(category="writing", turns=W.test[:1]), 2)
    assert seen == [(20, 0.7)]


def test_names_of_folders(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir(); monkeypatch.chdir(tmp_path / "mine")
    assert [module._name_of(place) for place in (".", "..", "org/name", "first/stage-2/model", "model")] == ["mine", tmp_path.name, "name", "first-stage-2", "model"]


def test_turns_are_a_conversation_and_seeded():
    "The second turn sees the first; hot answers vary with the seed only, and the global random state is left alone."
    model, tok = load_model(BASE, "cpu"), load_tokenizer(BASE)
    q = dict(category="math", turns=W.test[:2])
    torch.manual_seed(5); luck = torch.rand(1); torch.manual_seed(5)
    first, second = answer_turns(model, tok, q, 6)
    assert torch.rand(1) == luck
    chat = [dict(role="user", content=q["turns"][0]), dict(role="assistant", content=first), dict(role="user", content=q["turns"][1])]
    ids = tok.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=6, do_sample=False,
                         eos_token_id=tok.eos_token_id, pad_token_id=tok.eos_token_id)
    assert second == tok.decode(out[0, len(ids):], skip_special_tokens=True).strip()
    hot = [answer_turns(model, tok, dict(category="writing", turns=[p]), 6) for p in W.test[:12]]
    assert hot == [answer_turns(model, tok, dict(category="writing", turns=[p]), 6) for p in W.test[:12]]
    assert hot != [answer_turns(model, tok, dict(category="math", turns=[p]), 6) for p in W.test[:12]]
    tok.chat_template = None
    with pytest.raises(ValueError, match="no chat template"): answer_turns(model, tok, q, 6)


def test_a_row_that_is_full_has_no_answer(tmp_path, capsys):
    model, tok = load_model(BASE, "cpu"), load_tokenizer(BASE)
    long = dict(category="math", turns=["copy " + "a" * model.config.max_position_embeddings, "copy a"])
    assert answer_turns(model, tok, long, 6) == ["", ""]
    write_answers(model, tok, [long | dict(question_id=1), ASKED[1] | dict(question_id=2)], tmp_path / "a.jsonl", 6, "fp32")
    assert "a.jsonl: 2 answers are empty; the model ended at once, or its context was full" in capsys.readouterr().out


@pytest.mark.parametrize("text, mark", [("[[8]]", 8), ("I give [[8.5]], not [3]", 8.5), ("Rating: [4]", 4), ("ten out of ten", -1), ("", -1), ("[[a]] [b]", -1)])
def test_marks(text, mark): assert rating_of(text) == mark


def test_answers_without_a_mark_count_in_no_mean():
    judged = [dict(question_id=i, turn=t, score=s) for i, both in enumerate([(4, -1), (8, 6), (-1, -1)]) for t, s in zip((1, 2), both)]
    table = mt_bench_table(judged, [dict(question_id=i, category="math") for i in range(3)])
    assert table.loc["all", "turn 1"][0] == 6 and table.loc["all", "turn 2"][0] == 6 and math.isnan(table.loc["all", "turn 2"][1])
    assert table.loc["math", "both"][0] == (4 + 7) / 2 and table.loc["all", "unrated"] == 3
    of_five = mt_bench_table([dict(question_id=i, turn=1, score=s) for i, s in enumerate([10, 10, 10, 10, 3])], [dict(question_id=i, category="math") for i in range(5)])
    assert of_five.loc["all", "turn 1"] == pytest.approx((8.6, 4.71, 10), abs=0.01), "no mark is above ten"
    none = mt_bench_table([dict(question_id=0, turn=1, score=-1)], [dict(question_id=0, category="math")])
    assert pd.isna(none.loc["all", "both"]) and none.loc["all", "unrated"] == 1


def test_references(tmp_path):
    "Those of FastChat's file win; a question without any is judged without, and the name of its prompt says so."
    given = write_jsonl(tmp_path / "gpt-4.jsonl", [dict(question_id=1, choices=[dict(index=0, turns=["A1", "A2"])])])
    mt_bench(BASE, tmp_path, judge=seven, references=given, **HOW)
    of = {(j["question_id"], j["turn"]): j for j in lines(tmp_path / "model_judgment/seven_single.jsonl")}
    assert of[1, 1]["user_prompt"].startswith("A1|") and of[4, 1]["user_prompt"].startswith("R1|")
    assert judge_messages(dict(category="coding", turns=["q", "r"]), ["a", "b"], 2, PROMPTS)[0] == "single-v1-multi-turn"


def test_what_cannot_work_is_said_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_any", lambda *a: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="none called 'single-math-v1-multi-turn'"): mt_bench(BASE, tmp_path, judge=seven, **HOW | dict(judge_prompts=TOLD[:3]))
    with pytest.raises(ValueError, match="limit: must be at least 1, got 0"): mt_bench(BASE, tmp_path, **HOW, limit=0)
    with pytest.raises(ValueError, match="line 2 has no question_id, turns"): mt_bench(BASE, tmp_path, **HOW | dict(questions=[ASKED[0], dict(prompt_id=81, category="x", prompt=["a"])]))
    fields = {"questions": "choices", "references": "choices", "judge prompts": "system_prompt"}
    for what, absent in fields.items():
        rows = [{k: v for k, v in line.items() if k != absent} for line in (TOLD if "prompts" in what else ASKED if what == "references" else [dict(question_id=1)])]
        with pytest.raises(ValueError, match=f"{what}: line 1 has no "): mt_bench(BASE, tmp_path, judge=seven, **HOW | {what.replace(" ", "_"): rows})
    for odd in (dict(turns="copy abc"), dict(turns=[]), dict(turns=W.test[:3]), dict(turns=[1, 2]), dict(reference="42")):
        field, = odd
        with pytest.raises(ValueError, match=f"line 2: {field} must be a list of one or two texts"): mt_bench(BASE, tmp_path, **HOW | dict(questions=[ASKED[0], ASKED[1] | odd]))
    with pytest.raises(ValueError, match="two of them have the question_id 1"): mt_bench(BASE, tmp_path, **HOW | dict(questions=[*ASKED, ASKED[1] | dict(turns=W.test[90:92])]))
    with pytest.raises(ValueError, match="a number in every line, or a text in every line"): mt_bench(BASE, tmp_path, **HOW | dict(questions=[ASKED[0], ASKED[1] | dict(question_id="x2")]))
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_merged(tmp_path, monkeypatch):
    "What a stage with LoRA leaves behind answers as its merged model does."
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load_model(BASE, "cpu"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad(): merged = model.merge_and_unload()
    mt_bench(tmp_path / "adapter", tmp_path, **HOW | dict(questions=ASKED[1:2]))
    assert lines(tmp_path / "model_answer/tiny.jsonl")[0]["choices"][0]["turns"] == answer_turns(merged, load_tokenizer(BASE), ASKED[1], 6)


def answers_of(n): return [dict(question_id=i, answer_id=f"a{i}", model_id="m", choices=[dict(index=0, turns=[f"x{i}", f"y{i}"])]) for i in range(n)]


def test_an_answer_that_is_refused_does_not_stop_the_others(tmp_path, endpoint, capsys):
    "It has no mark and no line, and the next call asks for it again; where nothing else was told, the refusal is the error."
    marks = tmp_path / "model_judgment/j_single.jsonl"
    ask = openai_judge("j", endpoint.url, pause=0.001)
    endpoint.answers += ["[[5]]", 400, "[[5]]", "[[5]]"]
    judged = write_judgments(ask, ASKED[:2], answers_of(2), marks, PROMPTS)
    assert [j["score"] for j in judged] == [5, -1, 5, 5] and len(lines(marks)) == 3 and len(endpoint.asked) == 4
    assert "j: 1 of 4 answers were refused and have no mark. judge: " in (out := capsys.readouterr().out) and "400 Bad Request" in out
    assert mt_bench_table(judged, ASKED).loc["all", "unrated"] == 1
    assert [j["score"] for j in write_judgments(ask, ASKED[:2], answers_of(2), marks, PROMPTS)] == [5, 6, 5, 5] and len(endpoint.asked) == 5
    endpoint.answers += [422] * 4
    with pytest.raises(OSError, match="422"): write_judgments(ask, ASKED[:2], answers_of(2), tmp_path / "none_single.jsonl", PROMPTS)
    endpoint.answers += [404]
    with pytest.raises(OSError, match="404"): write_judgments(ask, ASKED[:2], answers_of(2), tmp_path / "none_single.jsonl", PROMPTS)
    assert len(endpoint.asked) == 10, "an address that is wrong is wrong for all"


def test_what_a_judge_says_can_be_written(tmp_path):
    def cut(messages): return "nice \ud83d [[5]]"
    assert write_judgments(cut, ASKED[:1], answers_of(1), tmp_path / "j.jsonl", PROMPTS)[0] == lines(tmp_path / "j.jsonl")[0]
    def silent(messages): return None
    with pytest.raises(ValueError, match="judge: silent must return a text, got NoneType"): write_judgments(silent, ASKED[:1], answers_of(1), tmp_path / "s.jsonl", PROMPTS)


def test_a_call_that_dies_while_it_moves_lines(tmp_path, monkeypatch):
    path, true, calls = folder_of(tmp_path, [dict(a=1), dict(a=2)]), module.write_lines, []
    def dies(*a):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        true(*a)
    monkeypatch.setattr(module, "write_lines", dies)
    with pytest.raises(KeyboardInterrupt): module._keep(path, lambda row: False, "gone")
    module._keep(path, lambda row: False, "gone")
    assert lines(f"{path}.old") == [dict(a=1), dict(a=2)] and not lines(path)


def test_a_busy_endpoint_is_asked_again_and_a_closed_one_is_not(endpoint):
    ask = openai_judge("m", endpoint.url, pause=0.001)
    endpoint.answers += [429, 503, "yes [[5]]"]
    assert ask([]) == "yes [[5]]" and len(endpoint.asked) == 3 and endpoint.asked[0][1] is None
    endpoint.answers += [401]
    with pytest.raises(OSError, match="401 Unauthorized") as e: ask([])
    assert len(endpoint.asked) == 4 and "\n" not in str(e.value)
    endpoint.answers += [500] * 9
    with pytest.raises(OSError, match="500"): ask([])
    assert len(endpoint.asked) == 9
    endpoint.answers[:] = [b'{"error": "no model"}']
    with pytest.raises(ValueError, match="no model"): ask([])
    endpoint.answers[:] = [None, "cut before [[5]]"]
    assert ask([]) == "cut before [[5]]" and len(endpoint.asked) == 12
    endpoint.answers[:] = [b"<html>"]
    with pytest.raises(OSError, match="judge"): ask([])
    assert len(endpoint.asked) == 13
    endpoint.answers[:] = [b'{"choices": [{"message": {"con', b"", '{"choices": "\u00e9'.encode()[:-1], "cut thrice [[5]]"]
    assert ask([]) == "cut thrice [[5]]" and len(endpoint.asked) == 17, "of no length that anybody has said"


def test_a_refusal_that_breaks_off(monkeypatch):
    "Its number counts: 503 is asked again, 401 is not."
    class Broken(io.BytesIO):
        def read(self, *a): raise ConnectionResetError(104, "Connection reset by peer")
    codes = [503, 401]
    def opened(*a, **kw): raise urllib.error.HTTPError("http://there", codes.pop(0), "Sorry", {}, Broken())
    monkeypatch.setattr(urllib.request, "urlopen", opened)
    with pytest.raises(OSError, match="judge: .* answers 401 Sorry"): openai_judge("m", "http://there", pause=0.001)([])


def test_address_and_key_from_the_environment(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url + "/"); monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert openai_judge("m")([]) == "fine [[6]]"
    assert endpoint.asked[0][:2] == ("/v1/chat/completions", "Bearer secret")


def test_addresses_and_keys_that_cannot_be(endpoint):
    "Said at once; and what is wrong with a key is said without the key."
    assert openai_judge("m", f" {endpoint.url}\n", "secret\n")([]) == "fine [[6]]" and endpoint.asked[0][1] == "Bearer secret"
    for key in ("sec\nret", "sec\u2013ret"):
        with pytest.raises(ValueError, match="judge: the key holds a character") as e: openai_judge("m", endpoint.url, key)
        assert "sec" not in str(e.value)
    for address in ("localhost:8000/v1", "http://127.0.0.1:1/v1 x"):
        with pytest.raises(ValueError, match=f"begins with http:// or https://.*{address}"): openai_judge("m", address)
    with pytest.raises(OSError, match="InvalidURL"): openai_judge("m", "http://127.0.0.1:eighty/v1", pause=60)([])


def test_nobody_there():
    with pytest.raises(OSError, match="127.0.0.1:9/v1/chat/completions"): openai_judge("m", "http://127.0.0.1:9/v1", pause=0.001)([])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="no such file"): load_lines(tmp_path / "none.jsonl")
    dated = dict(question_id=1, reference=["2020-01-01", "one\u2028two"])
    assert load_lines(write_jsonl(tmp_path / "dates.jsonl", [dated | dict(none=None)])) == [dated], "a text stays a text"
    (tmp_path / "bad.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match="bad.jsonl: cannot be read") as e: load_lines(tmp_path / "bad.jsonl")
    assert "\n" not in str(e.value)


def test_the_command(tmp_path, endpoint, monkeypatch, capsys):
    questions, told = write_jsonl(tmp_path / "q.jsonl", ASKED), write_jsonl(tmp_path / "p.jsonl", TOLD)
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["sdpo", "mt-bench", BASE, "--out", str(tmp_path / "out"), "--questions", str(questions), "--name", "t", "--max-new", "4", *words])
        try: cli.main(); status = 0
        except SystemExit as e: status = e.code
        return status, *capsys.readouterr()
    status, out, err = call("--limit", "3")
    assert status == 0 and "no judge was given" in out, err
    assert [a["question_id"] for a in lines(tmp_path / "out/model_answer/t.jsonl")] == [0, 1, 2]
    status, out, err = call("--limit", "3", "--judge", "j", "--judge-prompts", str(told))
    assert status == 0 and "| all | 3 | 6.0 [6.0, 6.0] | 6.0 [6.0, 6.0] | 6.0 [6.0, 6.0] | 0 |" in out, err
    status, out, err = call("--judge", "j", "--judge-prompts", "nowhere.jsonl")
    assert status == 2 and err.strip() == "sdpo: nowhere.jsonl: no such file"


@pytest.mark.skipif(not (DATA / "mt_bench_question.jsonl.gz").exists(), reason="no MT-Bench files (SDPO_DATA)")
def test_the_real_files(tmp_path):
    "All 80 questions with FastChat's own prompts: every place of a prompt is filled."
    questions = load_lines(DATA / "mt_bench_question.jsonl.gz")
    prompts = {line["name"]: line for line in load_lines(DATA / "mt_bench_judge_prompts.jsonl.gz")}
    assert len(questions) == 80 and {q["category"] for q in questions} == set(module.TEMPERATURE)
    names = [judge_messages(q, ["ONE", "TWO"], t, prompts) for q in questions for t in (1, 2)]
    counts = {name: sum(n == name for n, _ in names) for name in {n for n, _ in names}}
    assert counts == {"single-v1": 51, "single-v1-multi-turn": 51, "single-math-v1": 29, "single-math-v1-multi-turn": 29}   # 123 has no reference of its own
    assert all("ONE" in m[1]["content"] and ("TWO" in m[1]["content"]) == ("multi" in n) for n, m in names)
    assert [q["category"] for q in module._some(questions, 8)] == list(dict.fromkeys(q["category"] for q in questions))
