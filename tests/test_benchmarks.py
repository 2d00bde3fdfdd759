"Benchmarks: the numbers of the harness's own class to rounding, nothing asked twice, errors that name file and field."
import gc, gzip, inspect, json, math, os, shutil, weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from sdpo_nb import benchmarks as B
from sdpo_nb import cli
from sdpo_nb.evaluate import interval
from sdpo_nb.logprobs import load_model, load_tokenizer
from sdpo_nb.stepwise import StepwiseConfig, sdpo
from sdpo_nb.world import load_world
from tiny import SETTINGS, perturbed, rows, write_jsonl

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("SDPO_DATA", ROOT.parent / "shared/data")) / "benchmarks"
TEXT = [p.read_text() for p in [ROOT / "CONTRIBUTING.md", ROOT / "LICENSE"] if p.exists()]


def make_tokenizer(bos=False):
    "Byte-level BPE like that of real models; with `bos`, a first token is added."
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<s>"]
    t.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    if bos: t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", t.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|end|>", pad_token="<|end|>", **dict(bos_token="<s>") if bos else {})


def make_model(tokenizer, kind="llama", length=256, **kw):
    usual = dict(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=length)
    config = AutoConfig.for_model(kind, **usual | kw, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters(): p.data.normal_(0, 0.15)
    return model


def requests():
    "Requests as benchmarks make them: shared examples, shared prompts, options of one token and of many, odd ones."
    few = "Question: What is a notebook? Answer: a file.\n\n"
    out = []
    for i in range(4):
        context = f"{few}Question: Which of the {i} tests runs the package?\nAnswer:"
        out += [(context, option) for option in (" A", " B", " the trainer", " a notebook, which is run", " the trainer")]
    out += [("", "no context at all"), ("", "<|end|>begins with the end"), ("a context with blanks   ", "and an option")]
    out += [("word" * 120, " too long for the model"), ("word" * 120, " so"), ("x", " y"), ("the license", " " + "of a notebook " * 30)]
    out += [("<s>has its first token", " already"), ("mer", "ging tokens"), ("license", "d")]
    return out


def ask(lm, pairs): return lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True)


@pytest.fixture(scope="module", params=[False, True], ids=["no BOS", "BOS"])
def both(request):
    tokenizer = make_tokenizer(request.param)
    return make_model(tokenizer, length=128), tokenizer


def test_equals_the_harness(both):
    pairs = requests()
    ours, theirs = (ask(make(*both), pairs) for make in (B.sharing_lm, B.plain_lm))
    for pair, (a, g), (b, h) in zip(pairs, ours, theirs):
        assert math.isclose(a, b, abs_tol=1e-4, rel_tol=1e-5), pair
        assert g == h, pair
    assert len({round(a, 3) for a, _ in ours}) > 20


def test_fewer_tokens_are_read(both, monkeypatch):
    model, tokenizer = both
    read, forward = [], model.forward
    def counted(*args, **kw):
        read.append(kw.get("input_ids", args[0] if args else None).numel())
        return forward(*args, **kw)
    counted.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(model, "forward", counted)
    monkeypatch.setattr(B, "why_not_shared", lambda *a: None)
    tokens = {}
    for make in (B.sharing_lm, B.plain_lm):
        ask(make(model, tokenizer), requests()[:20])
        tokens[make] = sum(read)
        read.clear()
    assert tokens[B.sharing_lm] < 0.4 * tokens[B.plain_lm]


def test_greedy_is_seen(both):
    model, tokenizer = both
    lm = B.sharing_lm(model, tokenizer)
    context = "The license"
    ids = torch.tensor([lm.tok_encode(context)])
    likeliest = model(ids).logits[0, -1].argmax().item()
    (_, greedy), (_, other) = lm._loglikelihood_tokens([((context, "?"), ids[0].tolist(), [likeliest]), ((context, "!"), ids[0].tolist(), [likeliest - 1])])
    assert greedy and not other


def test_rolling_and_generated_answers_equal_the_harness(both):
    asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate([TEXT[0][:600], "short", TEXT[0][:90]])]
    ours, theirs = (make(*both).loglikelihood_rolling(asked, disable_tqdm=True) for make in (B.sharing_lm, B.plain_lm))
    assert np.allclose(ours, theirs, rtol=1e-5)
    how = dict(until=["\n\n", "e"], max_gen_toks=12, do_sample=False)
    asked = [Instance("generate_until", {}, (text, how), i) for i, text in enumerate(["The license", "A", "of the notebooks that"])]
    ours, theirs = (make(*both).generate_until(asked, disable_tqdm=True) for make in (B.sharing_lm, B.plain_lm))
    assert ours == theirs and any(ours)


@pytest.mark.parametrize("kind, settings, reason", [
    ("bloom", dict(n_layer=2, n_head=4), "forward pass"),
    ("mistral", dict(sliding_window=16, num_key_value_heads=2), "window of 16"),
    ("llama", dict(length=32, rope_parameters=dict(rope_type="dynamic", factor=2., rope_theta=1e4)), "rotary"),
])
def test_what_cannot_share_asks_alone_and_says_so(kind, settings, reason, capsys):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, kind, **settings)
    pairs = [p for p in requests()[:7] + [("x", " y")]]
    theirs = ask(B.plain_lm(model, tokenizer), pairs)
    capsys.readouterr()
    ours = ask(B.sharing_lm(model, tokenizer), pairs)
    said = capsys.readouterr().err
    assert "prompts are not shared" in said and reason in said
    assert ours == theirs


def test_a_model_that_shares_wrongly_is_noticed():
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    asked = [(tokenizer.encode(x), tokenizer.encode(o)) for x, o in requests()[:9]]
    assert B.why_not_shared(model, asked, 256) is None
    forward = model.forward
    def deaf(*args, attention_mask=None, **kw): return forward(*args, **kw)   # options see each other
    deaf.__signature__ = inspect.signature(forward)
    model.forward = deaf
    assert "differ from its own" in B.why_not_shared(model, asked, 256)


# Scores that are kept.

def question_file(path, n=12, short=False):
    from sdpo_nb.world import answer
    prompts = [p for p in load_world().test if answer(p) != answer(p, right=False)][:n]
    made = [dict(question=f"<|user|>{p}<|end|><|assistant|>", choices=[answer(p), answer(p, right=False), answer(p)[:2] + "k"], label=i % 2) for i, p in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.fixture
def strings(tmp_path):
    "A benchmark of twelve questions of the tiny world."
    told = dict(task="strings", dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(question_file(tmp_path / "q.jsonl")))), output_type="multiple_choice",
                test_split="test", target_delimiter="", doc_to_text="{{question}}", doc_to_choice="{{choices}}", doc_to_target="{{label}}",
                metric_list=[dict(metric=m, aggregation="mean", higher_is_better=True) for m in ("acc", "acc_norm")])
    (tmp_path / "strings.yaml").write_text(yaml.safe_dump(told))
    return B.Benchmark("strings", "Strings", str(tmp_path / "strings.yaml"), shots=0, metric="acc")


BASE = load_world().base
TOK = load_tokenizer(BASE)


class Counted:
    "A model that counts its forward passes, and fails after some."
    def __init__(self, fails_after=10**9):
        self.model, self.passes = load_model(BASE, "cpu"), 0
        forward = self.model.forward
        def counted(*args, **kw):
            self.passes += 1
            if self.passes > fails_after: raise KeyboardInterrupt
            return forward(*args, **kw)
        counted.__signature__ = inspect.signature(forward)
        self.model.forward = counted
    def __call__(self): return self.model


def test_a_killed_evaluation_goes_on(strings, tmp_path, monkeypatch):
    monkeypatch.setattr(B, "why_not_shared", lambda *a: None)
    whole = Counted()
    once = B.score_model(whole, TOK, "w", tmp_path / "a", [strings])["strings"]
    killed = Counted(fails_after=10)
    with pytest.raises(KeyboardInterrupt): B.score_model(killed, TOK, "w", tmp_path / "b", [strings])
    rest = Counted()
    again = B.score_model(rest, TOK, "w", tmp_path / "b", [strings])["strings"]
    assert whole.passes == 24 and rest.passes == 24 - 10         # two passes a question: its prompt, its options
    assert [i["score"] for i in again.items] == [i["score"] for i in once.items] and again.value == once.value
    never = lambda: pytest.fail("nothing is left to ask")
    assert B.score_model(never, TOK, "w", tmp_path / "b", [strings])["strings"].items == again.items


def test_what_is_asked_again_and_what_is_not(strings, tmp_path, monkeypatch):
    monkeypatch.setattr(B, "why_not_shared", lambda *a: None)
    B.score_model(Counted(), TOK, "w", tmp_path / "a", [strings], limit=4)
    more = Counted()
    assert len(B.score_model(more, TOK, "w", tmp_path / "a", [strings], limit=6)["strings"].items) == 6
    assert more.passes == 2 * 2                                  # the first four are known
    other = Counted()
    B.score_model(other, TOK, "of other weights", tmp_path / "a", [strings], limit=6)
    assert other.passes == 2 * 6


def test_another_metric_definition_or_tokenizer_is_another_question(strings, tmp_path, monkeypatch):
    "Answers that are known stay known; a score is of this metric, these questions and these ids."
    monkeypatch.setattr(B, "why_not_shared", lambda *a: None)
    def ask(b=strings, tokenizer=TOK):
        counted = Counted()
        return B.score_model(counted, tokenizer, "w", tmp_path / "a", [b])["strings"], counted.passes
    made = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    def write(rows): (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write([row | dict(choices=[row["choices"][0], row["choices"][0][:-1]], label=0) for row in made])
    by_sum, passes = ask()
    by_mean, again = ask(replace(strings, metric="acc_norm"))
    assert (passes, again) == (24, 0) and by_sum.value == 0 and by_mean.value > 0.5
    write([row | dict(choices=[row["choices"][0], row["choices"][0][:-1]], label=1) for row in made])
    assert ask()[0].value == 1
    defined = Path(strings.definition)
    defined.write_text(defined.read_text().replace("{{label}}", "{{1 - label}}"))
    assert ask()[0].value == 0 and ask()[1] == 0
    (tmp_path / "base.yaml").write_text(defined.read_text())
    defined.write_text("include: base.yaml\ntask: strings\n")
    assert ask()[0].value == 0
    (tmp_path / "base.yaml").write_text((tmp_path / "base.yaml").read_text().replace("{{1 - label}}", "{{label}}"))
    assert ask()[0].value == 1
    other = load_tokenizer(BASE)
    other.add_tokens(["zz"])
    assert ask(tokenizer=other)[1] == 24 and len(list((tmp_path / "a").glob("requests-*.db"))) == 2


def test_own_groups_and_filters(strings, tmp_path):
    told = yaml.safe_load(Path(strings.definition).read_text())
    filters = [dict(name=name, filter=[dict(function="take_first")]) for name in ("strict", "loose")]
    told |= dict(output_type="generate_until", doc_to_choice=None, doc_to_target="{{choices[label]}}", metric_list=[dict(metric="exact_match", aggregation="mean", higher_is_better=True)],
                 generation_kwargs=dict(max_gen_toks=4, until=["b"], do_sample=False))
    for name, of in ("part_1", filters[:1]), ("part_2", filters[:1]), ("both", filters):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(told | dict(task=name, filter_list=of)))
    def ask(b): return B.score_model(Counted(), TOK, "w", tmp_path / "a", [b], limit=3)[b.task]
    def own(task, file, metric="exact_match"): return B.Benchmark(task, task, str(tmp_path / file), shots=0, metric=metric)
    group = ask(own("group", "part_*.yaml"))
    assert len(group.items) == 6 and {i["task"] for i in group.items} == {"part_1", "part_2"} and math.isclose(group.value, group.scores.mean())
    with pytest.raises(ValueError, match="both: its metric is called 'exact_match', and the harness reports exact_match,strict, exact_match,loose"): ask(own("both", "both.yaml"))
    assert len(ask(own("both", "both.yaml", "exact_match,loose")).items) == 3
    for task, file, said in ("x", "nowhere.yaml", "x: there is no definition"), ("x", "nowhere_*.yaml", "x: there is no definition"), ("part_1", "part_*.yaml", "part_1: one of the tasks"):
        with pytest.raises(ValueError, match=said): B.score_model(lambda: pytest.fail("loaded"), TOK, "w", tmp_path / "a", [own(task, file)])
    with pytest.raises(ValueError, match="strings: files and fields are for arc_challenge"):
        B.score_model(lambda: pytest.fail("loaded"), TOK, "w", tmp_path / "a", [replace(strings, files=dict(test="mine"))], data=tmp_path)


def test_names_and_benchmarks_together(strings):
    assert [b.task for b in B.find_benchmarks(["mmlu", strings, "h4"])] == ["mmlu", "strings", "arc_challenge", "hellaswag", "truthfulqa_mc2"]
    with pytest.raises(ValueError, match="tasks: there are none"): B.find_benchmarks([])
    with pytest.raises(ValueError, match="two of them are called 'strings'"): B.find_benchmarks([strings, replace(strings, metric="acc_norm")])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whose_fault_it_is(strings, tmp_path, monkeypatch):
    "A full disk, a hub without words, files of the user's own, a data base that is none: each is named."
    def ask(error=None, data=None):
        def fails(*a): raise error
        with monkeypatch.context() as m:
            if error: m.setattr(B, "ask_harness", fails)
            B.score_model(Counted(), TOK, "w", tmp_path / "a", [strings], limit=2, data=data)
    with pytest.raises(OSError, match=f"{tmp_path}/a: disk full?"): ask(OSError(28, "No space left on device"))
    with pytest.raises(ValueError, match=r"questions cannot be read \(ConnectionError\); --data"): ask(ConnectionError())
    with pytest.raises(ValueError, match=r"questions cannot be read \(gone\)$"): ask(FileNotFoundError("gone"), data=tmp_path)
    ask()
    (tmp_path / "a/strings.json").unlink()
    kept, = (tmp_path / "a").glob("requests-*.db")
    kept.write_bytes(b"garbage" * 100)
    with pytest.raises(ValueError, match=f"{kept}: .*not a database.*remove this file"): ask()
    kept.unlink(); ask()


def test_a_cut_file_says_what_to_do(strings, tmp_path):
    B.score_model(Counted(), TOK, "w", tmp_path / "a", [strings], limit=2)
    (tmp_path / "a/strings.json").write_text('{"task": "str')
    with pytest.raises(ValueError, match="strings.json: cannot be read.*remove it"): B.score_model(Counted(), TOK, "w", tmp_path / "a", [strings], limit=2)


def test_value_and_standard_error_are_those_of_the_items(strings, tmp_path):
    found = B.score_model(Counted(), TOK, "w", tmp_path / "a", [strings])["strings"]
    assert len(found.items) == 12 and 0 < found.value < 1
    assert math.isclose(found.value, found.scores.mean()) and math.isclose(found.stderr, found.scores.std(ddof=1) / 12**0.5)


# Several models.

def evaluation(**models):
    "An Evaluation of made-up scores: model -> a list of four lists."
    four = B.find_benchmarks(["h4"])
    scores = {}
    for model, parts in models.items():
        scores[model] = {}
        for b, values in zip(four, parts):
            items = [dict(task=b.task, number=i, hash=str(i), score=v) for i, v in enumerate(values)]
            v = np.array(values, float)
            scores[model][b.task] = B.Score(b.task, v.mean(), v.std(ddof=1) / len(v) ** 0.5, items, {})
    return B.Evaluation(scores, four)


def test_h4_is_the_mean_of_four_and_differences_are_paired():
    g = np.random.default_rng(0)
    S = [g.integers(0, 2, n).tolist() for n in (50, 400, 30, 80)]
    M = [[max(a, b) for a, b in zip(part, g.integers(0, 2, len(part)) * (g.random(len(part)) < 0.2))] for part in S]
    found = evaluation(S=S, M_1=M)
    table = found.table()
    assert math.isclose(table.loc["M_1", ("H4", "points")], 100 * np.mean([np.mean(p) for p in M]))
    error = 100 * np.sqrt(sum(np.var(p, ddof=1) / len(p) for p in M)) / 4
    assert math.isclose(table.loc["M_1", ("H4", "standard error")], error)
    mean, low, high = found.difference("M_1", "S", "H4")
    d = [np.subtract(m, s) for m, s in zip(M, S)]
    assert math.isclose(mean, 100 * np.mean([x.mean() for x in d]))
    half = 1.96 * 100 * np.sqrt(sum(x.var(ddof=1) / len(x) for x in d)) / 4
    assert abs((high - low) / 2 - half) < 0.15 * half
    both = np.hypot(error, table.loc["S", ("H4", "standard error")])
    assert half < 0.7 * 1.96 * both                              # pairing is worth something
    assert found.difference("M_1", "S", "MMLU") == interval(100 * d[2])


def test_other_questions_are_refused():
    found = evaluation(S=[[0, 1]] * 4, M_1=[[0, 1]] * 4)
    found.scores["M_1"]["mmlu"].items[0]["hash"] = "another"
    with pytest.raises(ValueError, match="mmlu: the two models were not asked the same questions"): found.difference("M_1", "S", "H4")


def test_h4_only_of_all_four(): assert "H4" not in B.Evaluation(evaluation(S=[[0, 1]] * 4).scores, B.find_benchmarks(["mmlu"])).table()


def test_one_question_has_no_interval():
    found = evaluation(S=[[0, 1], [1, 1], [0, 1], [0, 0]], M_1=[[1, 1]] * 4)
    for scores in found.scores.values(): del scores["mmlu"].items[1:]
    for name in ("MMLU", "H4"):
        mean, low, high = found.difference("M_1", "S", name)
        assert mean > 0 and math.isnan(low) and math.isnan(high)
    found.figure()


def test_a_score_that_is_no_number_is_named():
    found = evaluation(S=[[0, 1]] * 4, M_1=[[0, 1]] * 3 + [[math.nan, 1]])
    assert found.difference("M_1", "S", "MMLU")[0] == 0
    for name in ("TruthfulQA", "H4"):
        with pytest.raises(ValueError, match="M_1: a score of TruthfulQA is not a number"): found.difference("M_1", "S", name)


def test_one_model_at_a_time(strings, tmp_path, monkeypatch):
    alive, before = [], []
    def counted(where):
        gc.collect()
        before.append(sum(model() is not None for model in alive))
        model = load_model(where, "cpu")
        alive.append(weakref.ref(model))
        return model
    monkeypatch.setattr(B, "load_any", counted)
    B.evaluate_folders({"a": BASE, "b": BASE, "c": BASE}, tmp_path / "o", [strings], limit=2)
    assert before == [0] * 6                                     # each to be hashed, then to be asked


def test_an_adapter_has_the_scores_of_its_merged_model(strings, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(load_model(BASE, "cpu"), peft.LoraConfig(r=4, target_modules="all-linear"))
    for name, p in adapted.named_parameters():
        if "lora_B" in name: p.data.normal_(0, 0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    TOK.save_pretrained(tmp_path / "merged")
    found = B.evaluate_folders({"S": BASE, "adapter": tmp_path / "adapter", "merged": tmp_path / "merged"}, tmp_path / "o", [strings]).scores
    of = {name: scores["strings"].scores.tolist() for name, scores in found.items()}
    assert of["adapter"] == of["merged"] != of["S"]


def test_paths_may_begin_with_a_tilde(strings, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BASE, tmp_path / "model")
    B.evaluate_folders({"S": "~/model"}, "~/o", [strings], limit=1)
    assert (tmp_path / "o/S/strings.json").exists() and not (tmp_path / "~").exists()
    with pytest.raises(ValueError, match=f"{tmp_path}/data/mmlu_test.jsonl.gz: is missing"): B.evaluate_folders({"S": BASE}, "~/o", ["mmlu"], data="~/data")


def test_places_are_looked_at_before_anything_is_loaded(strings, tmp_path, monkeypatch):
    monkeypatch.setattr(B, "load_any", lambda *a: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="nowhere: no such model folder"): B.evaluate_folders({"a": BASE, "b": tmp_path / "nowhere"}, tmp_path / "o", [strings])


def test_limit_must_be_positive(strings, tmp_path):
    with pytest.raises(ValueError, match="limit: must be at least 1, got 0"): B.evaluate_folders({"S": BASE}, tmp_path / "o", [strings], limit=0)


def test_one_model_has_no_differences():
    found = evaluation(S=[[0, 1]] * 4)
    assert not len(found.differences())
    with pytest.raises(ValueError, match="nothing to be compared"): found.figure()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    sources = {name: write_jsonl(folder / f"{name}.jsonl", rows(name, 8)) for name in ("primer", "digest")}
    return sdpo(BASE, {k: str(v) for k, v in sources.items()}, StepwiseConfig(**SETTINGS), folder / "run").folder


def test_all_models_of_a_run(run_folder, strings, monkeypatch):
    found = B.evaluate_run(run_folder, [strings])
    assert list(found.scores) == ["S", "M_1", "M_2"] and len(found.differences()) == 3   # M_1 and M_2 against S, M_2 against M_1
    kept = run_folder / "eval"
    assert (kept / "M_2/strings.json").exists() and (kept / "benchmarks.png").exists() and "Strings" in (kept / "benchmarks.csv").read_text()
    monkeypatch.setattr(B, "load_model", lambda *a: pytest.fail("loaded"))
    monkeypatch.setattr(B, "load_stage", lambda *a: pytest.fail("loaded"))
    assert B.evaluate_run(run_folder, [strings]).table().equals(found.table())


def test_other_weights_in_the_place_of_S_are_refused(run_folder, strings, tmp_path, monkeypatch):
    monkeypatch.setattr(B, "load_model", lambda *a: perturbed(load_model(BASE, "cpu")))
    with pytest.raises(ValueError, match="is not the S of this run"): B.evaluate_run(run_folder, [strings], limit=3)


def test_no_run(tmp_path):
    with pytest.raises(ValueError): B.evaluate_run(tmp_path)


# Local files.

def gz(path, rows):
    with gzip.open(path, "wt") as f: f.writelines(json.dumps(r) + "\n" for r in rows)


@pytest.fixture
def mmlu(tmp_path):
    "Local files of two subjects, five questions and two."
    B._rows.cache_clear()
    def row(subject, i): return dict(subject=subject, question=f"What is {i}?", choices=["a", "b", "c", "d"], label=i % 4)
    gz(tmp_path / "mmlu_test.jsonl.gz", [row("anatomy", i) for i in range(5)] + [row("virology", i) for i in range(2)])
    gz(tmp_path / "mmlu_dev.jsonl.gz", [row(s, 10 * i) for s in ("anatomy", "virology") for i in range(5)])
    yield tmp_path
    B._rows.cache_clear()


def test_mmlu_counts_questions_and_not_subjects(mmlu, tmp_path):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, length=2048)
    found = B.score_model(lambda: model, tokenizer, "w", tmp_path / "s", B.find_benchmarks(["mmlu"]), data=mmlu)["mmlu"]
    assert len(found.items) == 7 and {i["task"] for i in found.items} == {"mmlu_anatomy", "mmlu_virology"}
    assert math.isclose(found.value, found.scores.mean())


def test_other_files_are_asked_again(mmlu, tmp_path):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, length=2048)
    def asked(): return B.score_model(lambda: model, tokenizer, "w", tmp_path / "s", B.find_benchmarks(["mmlu"]), data=mmlu)["mmlu"]
    before = asked()
    gz(mmlu / "mmlu_test.jsonl.gz", [dict(subject="anatomy", question="Another?", choices=["a", "b", "c", "d"], label=1)] * 3)
    B._rows.cache_clear()
    after = asked()
    assert len(after.items) == 3 and after.asked["data"] != before.asked["data"]


@pytest.mark.parametrize("task, file", [("arc_challenge", "arc_challenge_test"), ("hellaswag", "hellaswag_validation"), ("truthfulqa_mc2", "truthfulqa_mc"), ("eq_bench", "eq_bench_v2")])
def test_errors_name_file_row_and_field(tmp_path, task, file):
    B._rows.cache_clear()
    with pytest.raises(ValueError, match=f"{file}.jsonl.gz: is missing"): B.local_dataset(task, tmp_path)
    gz(tmp_path / f"{file}.jsonl.gz", [dict(nothing=1)])
    with pytest.raises(ValueError, match=f"{file}.jsonl.gz: row 0: '.+' of the task cannot be made of it"): B.local_dataset(task, tmp_path)
    (tmp_path / f"{file}.jsonl.gz").write_bytes(b"no gzip")
    B._rows.cache_clear()
    with pytest.raises(ValueError, match=f"{file}.jsonl.gz: cannot be read"): B.local_dataset(task, tmp_path)


def test_a_missing_file_is_said_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="arc_challenge_test.jsonl.gz: is missing"):
        B.score_model(lambda: pytest.fail("loaded"), TOK, "w", tmp_path / "s", B.find_benchmarks(["h4"]), data=tmp_path)


def test_without_a_connection(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="questions cannot be read.*arc.*--data"):
        B.score_model(Counted(), TOK, "w", tmp_path / "s", B.find_benchmarks(["arc_challenge"]), limit=1)


def test_the_hub_stays_where_it_was(tmp_path):
    "Without local files a definition changes the number of examples, and nothing else."
    B.write_tasks(tmp_path)
    told = {p.stem: yaml.safe_load(p.read_text()) for p in tmp_path.glob("*.yaml")}
    assert len(told) == 4 + 57 + 1
    for name, d in told.items():
        if name == "mmlu": continue
        assert set(d) == {"include", "task", "num_fewshot"} and Path(d["include"]).exists()
    assert {n: told[n]["num_fewshot"] for n in ("arc_challenge", "hellaswag", "mmlu_anatomy", "truthfulqa_mc2")} == dict(arc_challenge=25, hellaswag=10, mmlu_anatomy=5, truthfulqa_mc2=0)


def test_without_the_harness(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ValueError, match="pip install"): B.harness()


@pytest.mark.parametrize("task, examples, marks", [("arc_challenge", 25, "Question: "), ("hellaswag", 10, None), ("mmlu_anatomy", 5, "Answer:"), ("truthfulqa_mc2", 0, None)])
def test_real_local_files(task, examples, marks, tmp_path):
    if not (DATA / "mmlu_test.jsonl.gz").exists(): pytest.skip(f"no local benchmarks in {DATA}; SDPO_DATA names another folder")
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, length=16384)
    B.write_tasks(tmp_path, DATA)
    lm, asked = B.plain_lm(model, tokenizer), []
    lm._loglikelihood_tokens = lambda requests, **kw: [asked.append(r) or (0., False) for r in requests]
    found = B.ask_harness(lm, [task], tmp_path, limit=2)
    context = asked[0][0][0]
    if marks: assert context.count(marks) == examples + 1
    blocks = context.strip().split("\n\n")
    if task == "hellaswag": assert len(blocks) == examples + 1
    question = found["samples"][task][0]["doc"]
    assert (question.get("query") or question["question"]).strip()[:40] in blocks[-1]


def test_the_command(run_folder, mmlu, capsys, monkeypatch):
    def sdpo_says(*words):
        capsys.readouterr()
        try: cli.main(["eval", *map(str, words)]); status = 0
        except SystemExit as e: status = e.code
        return status, *capsys.readouterr()
    for words in ((), (run_folder, "--models", BASE)):
        status, out, err = sdpo_says(*words)
        assert status == 2 and "one of them" in err and out == ""
    status, _, err = sdpo_says(run_folder, "--tasks", "gsm8k")
    assert status == 2 and "'gsm8k' is not known" in err
    status, out, err = sdpo_says(run_folder, "--tasks", "mmlu", "--data", mmlu, "--limit", 2)
    assert status == 0, err
    assert "M_2 against M_1" in out and "MMLU" in out and (run_folder / "eval/S/mmlu.json").exists()
