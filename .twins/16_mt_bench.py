# %% [markdown]
# # MT-Bench
# > Eighty questions of two turns each: a model answers, a judge gives marks from 1 to 10, and the files are those of FastChat.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/16_mt_bench.ipynb)
#
# **You should know** what a [chat template](01_preferences.ipynb) is. **Time** an hour to read with its code, half a minute to run.
#
# [Log-probabilities](08_evaluate.ipynb) say which of two given answers a model prefers. They do not say what it writes. MT-Bench (Zheng et al., [arXiv 2306.05685](https://arxiv.org/abs/2306.05685)) asks it to write: ten questions in each of eight categories, with a second turn that goes on from the model's own first answer. A
# stronger model reads each answer and gives a mark from 1 to 10. The paper of this book reports it, as most papers on alignment do.
#
# The numbers can be compared with those of others only if everything else is the same: the questions, the temperatures, what the judge is told. So this chapter keeps to [FastChat](https://github.com/lm-sys/FastChat), where the benchmark comes from. It reads FastChat's files and writes FastChat's files, so that its own scripts go on from here.
#
# ```
# out/model_answer/NAME.jsonl               two answers to each question
# out/model_judgment/JUDGE_single.jsonl     what the judge said about each answer, and the mark
# ```
#
# What is not FastChat's: a call that is killed goes on, question by question; marks come with an interval; and any endpoint that speaks OpenAI's protocol can be the judge, or a function of yours.

# %%
#| default_exp mt_bench

# %%
import importlib.util
if not importlib.util.find_spec("sdpo_nb"):
    source = '"sdpo_nb @ git+https://github.com/sdpo-nb/sdpo_nb@v0.1.0"'
    get_ipython().run_line_magic("pip", f"install -q {source}")
again = "On Colab, choose Runtime > Disconnect and delete runtime, then run this cell again."
assert importlib.util.find_spec("sdpo_nb"), f"pip could not install sdpo_nb, see above. {again}"

import sdpo_nb
version = sdpo_nb.__version__
assert version == "0.1.0", f"This page is made for sdpo_nb 0.1.0, and {version} is installed. {again}"

# %%
#| export
import http.client, json, os, re, time, urllib.error, urllib.request, uuid
from pathlib import Path

import pandas as pd
import torch
from datasets import load_dataset
from transformers import GenerationConfig

from sdpo_nb.evaluate import end_tokens
from sdpo_nb.folder import alone_in, load_any, load_saved_tokenizer
from sdpo_nb.logprobs import autocast, lines_of, pick_precision, progress, weights_hash, write_lines
from sdpo_nb.partition import mean_interval
from sdpo_nb.world import content_hash

# %%
import contextlib, io, shutil, tempfile, threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from sdpo_nb.evaluate import as_text
from sdpo_nb.world import answer, complaint, load_base, load_world, skipped_without, true_reward

torch.set_num_threads(1)
pd.set_option("display.max_colwidth", 90)
w, tmp = load_world(), Path(tempfile.mkdtemp())
S, tok = load_base(w)


# %% [markdown]
# ## A question has two turns
#
# Most benchmarks ask once. People do not: they read the answer and ask for a change, shorter, in another style, with the mistake put right. "Compose an engaging travel blog post about a recent trip to Hawaii" is the first turn of question 81, and "Rewrite your previous response. Start every sentence with the letter A." is the second. A model that cannot
# go on from its own words fails there, however good the first answer was.
#
# The real questions are for real models. So that every cell runs in a second, we ask the model of the [tiny world](00_world.ipynb), which works on short strings, and we ask it what it can. A question is a line of JSON: a number, a category, two turns, and in some categories the answers that are right. The second turn is asked when the first has been answered.

# %%
def question(i):
    "Two prompts of the tiny world as turns; every second question is called mathematics."
    turns = w.test[2*i:2*i+2]
    category = ("writing", "math")[i % 2]
    right = [answer(turn) for turn in turns]
    reference = dict(reference=right) if category == "math" else {}
    return dict(question_id=81 + i, category=category, turns=turns) | reference

asked = [question(i) for i in range(12)]
(tmp / "question.jsonl").write_text("".join(json.dumps(q) + "\n" for q in asked))
asked[1]

# %% [markdown]
# Files of lines come from three places: questions, what the judge is told, and reference answers. They belong to FastChat, and this package does not bring them. The defaults are their addresses; a path works as well, with or without `.gz`.

# %%
#| export
_FASTCHAT = "https://raw.githubusercontent.com/lm-sys/FastChat/main/fastchat/llm_judge/data"
QUESTIONS = f"{_FASTCHAT}/mt_bench/question.jsonl"
JUDGE_PROMPTS = f"{_FASTCHAT}/judge_prompts.jsonl"
REFERENCES = f"{_FASTCHAT}/mt_bench/reference_answer/gpt-4.jsonl"

def load_lines(
    place, # a path or an address of lines of JSON; or a list of them
) -> list[dict]: # without the fields that a line does not have
    "The lines of a file. Raises ValueError in one line for what cannot be read."
    if isinstance(place, list): return place
    if not str(place).startswith("http"): place = Path(place).expanduser()
    if isinstance(place, Path) and not place.is_file():
        raise ValueError(f"{place}: no such file")
    try:
        lines = load_dataset("text", data_files=str(place), split="train")["text"] # "json" would make dates of texts
        rows = [json.loads(line) for line in lines if line.strip()]
        return [{name: value for name, value in row.items() if value is not None} for row in rows]
    except Exception as e:
        why = (str(e.__cause__ or e).splitlines() or [type(e).__name__])[0]
        raise ValueError(f"{place}: cannot be read as lines of JSON ({why})") from e


# %%
assert load_lines(tmp / "question.jsonl") == asked
print(complaint(load_lines, "nowhere.jsonl"))

# %% [markdown]
# ## Two answers
#
# How hot should an answer be? FastChat's temperature depends on the category. Writing may vary; mathematics should not, and gets the likeliest token each time. Whatever else a model's own settings say, such as a penalty on words that were said before, stays as it is there, in both cases.
#
# What the model reads is the conversation so far, in its own chat template: the first question, *its own* first answer, the second question. So a mistake in the first turn is there in the second, as it would be for a reader. And an instruct model that has a default system message in its template gets it, as it does in use.
#
# An answer ends with one of the model's end tokens, or after `max_new` tokens; FastChat's own limit is 1024. A shorter limit is a cheaper benchmark, and another one: answers that are cut in the middle get bad marks. The model's own context is a limit, too. Where the first turn has filled it, the second answer is cut or empty, and is judged as it is; `write_answers` counts those that are empty.

# %%
#| export
TEMPERATURE = dict( # by category; 0: the likeliest token each time
    writing=0.7,
    roleplay=0.7,
    extraction=0.0,
    math=0.0,
    coding=0.0,
    reasoning=0.0,
    stem=0.1,
    humanities=0.1,
)

def _generation(model, tokenizer, temperature, max_new):
    "How tokens are drawn, and where an answer ends."
    drawn = dict(do_sample=True, temperature=temperature)
    return GenerationConfig( # what is not said here is the model's own, as with FastChat
        max_new_tokens=max_new,
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.eos_token_id,
        **(drawn if temperature > 0 else dict(do_sample=False)),
    )

@torch.no_grad()
def answer_turns(
    model,           # a causal language model
    tokenizer,       # with a chat template
    question: dict,  # its category and turns count
    max_new: int=1024, # longest answer, in tokens
    precision: str="fp32", # fp32, bf16 or fp16, as in chapter 02
) -> list[str]:      # one answer per turn, without special tokens
    """A conversation: each turn is answered after the turns and answers before it.

    The same question has the same answers, and the global random state stays as it is.
    Raises ValueError for a tokenizer without a chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template, and MT-Bench asks in turns of a chat")
    temperature = TEMPERATURE.get(question["category"], 0.7)
    longest = getattr(model.config, "max_position_embeddings", None)
    chat, answers = [], []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for turn in question["turns"]:
            chat.append(dict(role="user", content=turn))
            as_ids = dict(add_generation_prompt=True, tokenize=True, return_dict=False)
            ids = tokenizer.apply_chat_template(chat, **as_ids)
            room = min(max_new, longest - len(ids)) if longest else max_new
            said = _said(model, tokenizer, ids, temperature, room, precision) if room > 0 else ""
            answers.append(said)
            chat.append(dict(role="assistant", content=said))
    return answers

def _said(model, tokenizer, ids, temperature, room, precision):
    "What the model writes after these ids."
    row = torch.tensor([ids], device=model.device)
    how = _generation(model, tokenizer, temperature, room)
    with autocast(model.device, precision):
        out = model.generate(input_ids=row, attention_mask=torch.ones_like(row), generation_config=how)
    return tokenizer.decode(out[0, len(ids):], skip_special_tokens=True).strip()


# %% [markdown]
# The tiny model has never seen a second turn. How many of its answers will be right there?

# %%
said = [answer_turns(S, tok, q, max_new=8) for q in asked]
assert said == [answer_turns(S, tok, q, max_new=8) for q in asked]
right = [[a == answer(turn) for turn, a in zip(q["turns"], both)] for q, both in zip(asked, said)]
print("right in turn 1, in turn 2:", pd.DataFrame(right).sum().tolist(), "of", len(asked))
rows = [(turn, a, answer(turn)) for q, both in zip(asked[:3], said) for turn, a in zip(q["turns"], both)]
pd.DataFrame(rows, columns=["turn", "answer of S", "right"]).set_index("turn")


# %% [markdown]
# ## A file that grows
#
# Eighty questions of a large model take hours. So the file is written anew after every question, under another name first, and whole lines are all that it can hold. A second call finds what is there.
#
# The format is FastChat's: an answer has an id of its own, the name of the model, and a list of choices with their turns. (FastChat can ask several times and keep several choices; one is usual.)
#
# There is a trap in going on: the file is called by the *name* of the model. After another training run the name is the same, and the weights are not. And a translated question has the *number* of the English one. So each line also says which weights answered, with which chat template and how many tokens at most, and what was asked. FastChat does not mind a few fields more. Lines that do not fit
# are moved to a file beside it, `NAME.jsonl.old`, and their questions are answered anew.

# %%
#| export
def _read(path):
    "The rows of a file of ours, if it is there. A line that is taken out of it is asked again."
    return lines_of(path.read_bytes(), path) if path.exists() else []

def _keep(path, fits, what):
    "The rows of a file that fit. The others are moved to a file beside it, and a line says so."
    rows = _read(path)
    kept = [row for row in rows if fits(row)]
    gone = [row for row in rows if not fits(row)]
    if gone:
        old = Path(f"{path}.old")
        before = _read(old)
        write_lines(old, before + [row for row in gone if row not in before]) # a call may have died here
        write_lines(path, kept)
        said = f"{path.parent.name}/{path.name}: {len(gone)} of {len(rows)} lines were {what}"
        print(f"{said}; they are in {old.name} now")
    return kept

def write_answers(
    model,          # a causal language model
    tokenizer,      # with a chat template
    questions: list, # as `load_lines` gives them
    path,           # of the answers: model_answer/NAME.jsonl
    max_new: int=1024, # longest answer, in tokens
    precision: str="auto", # fp32, bf16, fp16, or auto
) -> list[dict]:    # the lines for these questions, in FastChat's format
    "Answer what is not answered yet; the file is whole after every question."
    path, precision = Path(path), pick_precision(precision, model.device)
    template = content_hash(tokenizer.chat_template)
    how = dict(weights=weights_hash(model), max_new_token=max_new, precision=precision, template=template)
    asked = {q["question_id"]: content_hash([q["category"], q["turns"]]) for q in questions}

    def fits(row):
        made = dict(row.get("generate_params", {}))
        question = made.pop("question", None)
        return made == how and asked.get(row["question_id"], question) == question

    kept = _keep(path, fits, "answers of other weights, settings or questions")
    there = {row["question_id"]: row for row in kept}
    todo = [q for q in questions if q["question_id"] not in there]
    with progress(len(questions), f"{path.stem} answers", "question", len(questions) - len(todo)) as bar:
        for q in todo:
            turns = answer_turns(model, tokenizer, q, max_new, precision)
            there[q["question_id"]] = dict(
                question_id=q["question_id"],
                answer_id=uuid.uuid4().hex,
                model_id=path.stem,
                choices=[dict(index=0, turns=turns)],
                tstamp=time.time(),
                generate_params=how | dict(question=asked[q["question_id"]]),
            )
            write_lines(path, sorted(there.values(), key=lambda row: row["question_id"]))
            bar.update()
    answers = [there[q["question_id"]] for q in questions]
    empty = sum(row["choices"][0]["turns"].count("") for row in answers)
    if empty: print(f"{path.name}: {empty} answers are empty; the model ended at once, or its context was full")
    return answers


# %% [markdown]
# Two questions are answered, then the call dies. The next one answers the others, and keeps the first two as they are.

# %%
file = tmp / "model_answer/tiny.jsonl"
short = dict(max_new=8, precision="fp32")
first_two = write_answers(S, tok, asked[:2], file, **short)
answers = write_answers(S, tok, asked, file, **short)
assert answers[:2] == first_two
assert [row["choices"][0]["turns"] for row in answers] == said
{name: value for name, value in answers[1].items() if name not in ("answer_id", "tstamp")}

# %% [markdown]
# Now somebody takes a first look with shorter answers, and forgets to give it a name of its own. What happens to the long ones?

# %%
write_answers(S, tok, asked[:1], file, max_new=4, precision="fp32")
assert len(_read(file)) == 1
assert _read(Path(f"{file}.old")) == answers


# %% [markdown]
# ## What the judge is told
#
# The judge of this benchmark sees one answer and gives one mark. (FastChat can also show two answers and ask which is better; [chapter 08](08_evaluate.ipynb) has the win rate.) Marks have an advantage: a new model can be put into an old table, without asking again about all the others.
#
# FastChat's prompts are in a file, one for each of four cases: first or second turn, with or without a reference answer. In mathematics, reasoning and coding a judge makes mistakes of its own, so it gets the right answer to compare with. The second turn is judged with the whole conversation before it.
#
# Where do right answers come from? FastChat takes those of GPT-4, which lie in a file of their own (`REFERENCES`), for all thirty questions of these categories. With FastChat's questions from their address we take this file from its address, too. The questions also bring a `reference`, which FastChat's judge never sees: short notes like "Uncertain.", three of them empty, and none in question 123. They are used where the questions
# are a file of yours and no file of references is given with it. Marks of these categories can then not be compared with those of others. A question without any reference is judged by the prompt without one, and its judgment says which prompt it was.
#
# Prompts have places in braces, such as `{question}` and `{answer_2}`. Here are four short ones with the names and places of FastChat's.

# %%
def prompt(name, text): return dict(name=name, system_prompt="You are a judge.", prompt_template=text)

told = [
    prompt("single-v1", "Q {question}\nA {answer}"),
    prompt("single-v1-multi-turn", "Q {question_1}\nA {answer_1}\nQ {question_2}\nA {answer_2}"),
    prompt("single-math-v1", "R {ref_answer_1}\nQ {question}\nA {answer}"),
    prompt("single-math-v1-multi-turn",
           "R {ref_answer_1}\nR {ref_answer_2}\nQ {question_1}\nA {answer_1}\nQ {question_2}\nA {answer_2}"),
]

# %%
#| export
NEED_REFERENCE = "math", "reasoning", "coding" # categories

def judge_messages(
    question: dict,  # with its category, turns and perhaps reference
    answers: list,   # the two answers
    turn: int,       # 1 or 2: which of them is judged
    prompts: dict,   # name -> a line of the file of judge prompts
) -> tuple[str, list]: # name of the prompt; messages of a chat
    """What a judge is told about one answer.

    A question of a category that needs a reference and has none is judged without, as the name then says.
    Raises ValueError for a prompt with a place that nothing fills.
    """
    reference = question.get("reference") if question["category"] in NEED_REFERENCE else None
    name = f"single{'-math' if reference else ''}-v1{'-multi-turn' if turn == 2 else ''}"
    places = dict(question=question["turns"][0], answer=answers[0])
    for i in range(turn):
        places[f"question_{i+1}"], places[f"answer_{i+1}"] = question["turns"][i], answers[i]
    for i, text in enumerate(reference or []): places[f"ref_answer_{i+1}"] = text
    try: asked = prompts[name]["prompt_template"].format(**places)
    except (KeyError, IndexError) as e:
        what = f"question {question.get('question_id')}: nothing for the place {e} of the judge prompt '{name}'"
        raise ValueError(f"{what}; it has {len(question['turns'])} turns and {len(reference or [])} references") from e
    told = dict(system=prompts[name]["system_prompt"], user=asked)
    return name, [dict(role=role, content=text) for role, text in told.items()]


# %%
prompts = {line["name"]: line for line in told}
name, messages = judge_messages(asked[1], said[1], 2, prompts)
assert name == "single-math-v1-multi-turn"
print(name, messages[1]["content"], sep="\n")
print(complaint(judge_messages, asked[1] | dict(reference=["one"]), said[1], 2, prompts))


# %% [markdown]
# The judge is asked to explain itself, and to end with a mark in double brackets: `[[7]]`. What if it forgets one pair of brackets, or gives no mark at all? FastChat accepts single brackets, and writes -1 where it finds nothing. So do we; and a -1 counts in no mean.

# %%
#| export
def rating_of(
    judgment: str, # what the judge said
) -> float:        # the mark; -1 where there is none
    "The first number in double brackets, or else in single ones."
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", judgment) or re.search(r"\[(\d+\.?\d*)\]", judgment)
    return float(found[1]) if found else -1


# %%
cases = {"Clear and correct. Rating: [[8.5]]": 8.5, "Rating: [7]": 7, "I cannot rate this.": -1}
for text, mark in cases.items(): assert rating_of(text) == mark
[rating_of(text) for text in cases]


# %% [markdown]
# ## Who judges?
#
# A judge is a function: it gets messages and returns text. FastChat's is GPT-4. Servers of open models (vLLM, llama.cpp, Ollama) speak the same protocol, so one small function is enough for all of them. The address and the key come from the environment variables `OPENAI_BASE_URL` and `OPENAI_API_KEY`, as they do in OpenAI's own package.
#
# A request holds the name of the judge and the messages. The temperature is zero, so that a judge asked twice says nearly the same. Busy endpoints answer "429 Too Many Requests" or with a number from 500; that means *later*, and so does an answer that is cut in the middle. Then we ask again, four times, with pauses that double. Any other refusal is final: a wrong key does not become right by waiting. Some refusals are about *one* answer, say a 400 because it is too long for the judge, or stopped by its filter. That answer has no mark then, until another call asks again, and the others are judged all the same.
#
# Whichever judge you take, name it: marks of two judges cannot be compared. A small open model is a judge that you can run for nothing, and it agrees less with people than a large one does. Before you believe its marks, read twenty of its judgments.

# %%
#| export
def openai_judge(
    model: str,          # as the endpoint calls it
    base_url: str=None,  # of the endpoint, up to /v1; none: OPENAI_BASE_URL, or OpenAI's
    api_key: str=None,   # none: OPENAI_API_KEY; a local endpoint may want no key
    pause: float=2.,     # seconds before a second try; doubled each time
):                       # a judge: messages -> text
    """A judge behind an endpoint with OpenAI's protocol: temperature 0, at most 2048 tokens, as in FastChat.

    Raises ValueError for what is no address or no key. The judge raises OSError where the endpoint gives no
    answer, after five tries where it is only busy; ValueError for one without a text where it belongs."""
    base = (base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1").strip()
    key = (api_key or os.environ.get("OPENAI_API_KEY") or "").strip()
    if not re.fullmatch(r"https?://\S+", base):
        raise ValueError(f"judge: an address begins with http:// or https:// and has no blanks; got {base!r}")
    if re.search("[^!-~]", key): # not shown: it is a secret
        raise ValueError("judge: the key holds a character that no key has, such as a blank or a long dash")
    url = f"{base.rstrip('/')}/chat/completions"

    def judge(messages):
        body = dict(model=model, messages=messages, temperature=0, max_tokens=2048)
        got = _post(url, body, key, pause)
        try: return got["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError, TypeError) as e:
            raise ValueError(f"judge: {url} gives no answer where one is expected: {str(got)[:120]}") from e
    judge.__name__ = model
    return judge

class _Refused(OSError):
    "An endpoint does not take this message; it may take others."

def _post(url, body, key, pause, tries=5):
    "What an endpoint says. A busy one is asked again; other errors end in one line."
    head = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), head)
    for i in range(tries):
        found, error = b"nothing", OSError
        try:
            with urllib.request.urlopen(request, timeout=600) as got: found = got.read()
            return json.loads(found)
        except urllib.error.HTTPError as e:
            why, again = f"{e.code} {e.reason}: {_begin_of(e)}", e.code in (408, 429) or e.code >= 500
            if e.code in (400, 413, 422): error = _Refused
        except ValueError as e: # what is cut begins as JSON does; a page of HTML does not
            why, again = f"{type(e).__name__}: {e}", found.lstrip()[:1] in (b"", b"{")
        except (OSError, http.client.HTTPException) as e:
            why, again = f"{type(e).__name__}: {e}", not isinstance(e, http.client.InvalidURL)
        if not again or i + 1 == tries: break
        time.sleep(pause * 2**i)
    raise error(f"judge: {url} answers {' '.join(why.split())}; what is judged already is kept")

def _begin_of(error):
    try: return error.read(200).decode(errors="replace")
    except (OSError, http.client.HTTPException): return "" # it breaks off


# %% [markdown]
# A judge for the tiny world, behind an endpoint on this machine. It knows the true reward of an answer, from 0 to 1, and turns it into a mark from 1 to 10. Its first visitor it sends away with "429 Too Many Requests", as the real ones do.

# %%
class Judge(BaseHTTPRequestHandler):
    visits = 0

    def do_POST(self):
        Judge.visits += 1
        if Judge.visits == 1: return self.send_error(429)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        lines = asked["messages"][-1]["content"].splitlines()
        question = [line[2:] for line in lines if line.startswith("Q ")][-1]
        said = [line[2:] for line in lines if line.startswith("A")][-1]
        mark = 1 + 9 * true_reward(question, said)
        text = f"The right answer is {answer(question)}. Rating: [[{mark:.1f}]]"
        body = json.dumps(dict(choices=[dict(message=dict(role="assistant", content=text))])).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args): pass

server = HTTPServer(("127.0.0.1", 0), Judge)
threading.Thread(target=server.serve_forever, daemon=True).start()
address = f"http://127.0.0.1:{server.server_port}/v1"

# %%
ask = openai_judge("knows-the-truth", address, pause=0.01)
judgment = ask(messages)
assert Judge.visits == 2
print(messages[1]["content"].splitlines()[-1], judgment, rating_of(judgment), sep="\n")


# %% [markdown]
# Somebody who forgets the key, or the `/v1`, should read what is wrong at the first question, and not after a minute of trying again:

# %%
class Closed(Judge):
    def do_POST(self): self.send_error(401)

closed = HTTPServer(("127.0.0.1", 0), Closed)
threading.Thread(target=closed.serve_forever, daemon=True).start()
refused = complaint(openai_judge("any", f"http://127.0.0.1:{closed.server_port}/v1"), messages)
closed.shutdown()
assert "401 Unauthorized" in refused
refused.split(" answers ")[1][:17]


# %% [markdown]
# ## Marks in a file
#
# Judgments cost money, so each is written down as soon as it is there. FastChat has one file for each judge, with the judgments of all models. A judgment belongs to *an answer*, not to a question: when a model has answered anew, the old mark is another answer's. So each line has the `answer_id` as well. And it belongs to a prompt: with another reference or other words, the judge would have been asked something else. Where one of these has changed, the answer is judged anew, and the old line is moved to a file beside it.
#
# All prompts are made before the first is sent. A reference that is missing should be noticed before anybody is paid.

# %%
#| export
def _file_name(name): return re.sub(r"[^\w.@+-]+", "--", name)

def write_judgments(
    judge,           # messages -> text; its __name__ is written down
    questions: list, # as `load_lines` gives them
    answers: list,   # of one model, as `write_answers` gives them
    path,            # of the judgments: model_judgment/JUDGE_single.jsonl
    prompts: dict,   # name -> a line of the file of judge prompts
) -> list[dict]:     # the lines for these answers, in FastChat's format
    """Judge what is not judged yet; the file is whole after every answer. A refused one has -1, and no line in it.

    Raises OSError where every answer is refused or the judge does not answer, ValueError where it returns no text."""
    path, wanted = Path(path), {}
    for turn in (1, 2):
        for q, a in zip(questions, answers):
            if len(q["turns"]) < turn: continue
            name, messages = judge_messages(q, a["choices"][0]["turns"], turn, prompts)
            line = dict(
                question_id=q["question_id"],
                model=a["model_id"],
                judge=[judge.__name__, name],
                user_prompt=messages[1]["content"],
                turn=turn,
                answer_id=a["answer_id"],
            )
            wanted[_place(line)] = line, messages

    def fits(row):
        line, _ = wanted.get(_place(row), (row, None))
        return row | line == line | row # what both say is the same; FastChat's own lines have no answer_id

    kept = _keep(path, fits, "marks of other answers or prompts")
    there = {_place(row): row for row in kept}
    todo = [place for place in wanted if place not in there]
    refused = {}
    with progress(len(wanted), f"{judge.__name__} judges", "answer", len(wanted) - len(todo)) as bar:
        for place in todo:
            line, messages = wanted[place]
            try: said = _asked(judge, messages)
            except _Refused as e: refused[place] = line | dict(judgment=str(e), score=-1)
            else:
                there[place] = line | dict(judgment=said, score=rating_of(said), tstamp=time.time())
                write_lines(path, there.values())
            bar.update()
    if refused:
        first = next(iter(refused.values()))["judgment"]
        if len(refused) == len(wanted): raise OSError(first)
        print(f"{judge.__name__}: {len(refused)} of {len(wanted)} answers were refused and have no mark. {first}")
    return [(there | refused)[place] for place in wanted]

def _asked(judge, messages):
    "What a judge says, as a file can hold it: half an emoji becomes a question mark."
    said = judge(messages)
    if isinstance(said, str): return said.encode("utf-8", "replace").decode()
    raise ValueError(f"judge: {judge.__name__} must return a text, got {type(said).__name__}")

def _place(row): return row["model"], row["question_id"], row["turn"]


# %%
marked = tmp / "model_judgment/knows-the-truth_single.jsonl"
judged = write_judgments(ask, asked, answers, marked, prompts)
visits = Judge.visits
assert len(judged) == 2 * len(asked)
assert write_judgments(ask, asked, answers, marked, prompts) == judged
assert Judge.visits == visits # nothing was asked again
{name: judged[-1][name] for name in ("question_id", "judge", "judgment", "score", "turn")}


# %% [markdown]
# ## The table
#
# A row for each category and one for all of them, a column for each turn and one for both. The mean of ten marks is not sure, so it has an interval, [Student's](05_partition.ipynb), which is cut where the scale ends. The two answers to one question belong together, since a bad first answer spoils the second. So in the column of both turns the unit is the question, whose marks are averaged first.
#
# Answers without a mark count in no mean, and the last column counts them. A judge that forgets its brackets once in a hundred times does no harm. One that forgets them whenever an answer is long makes a table about short answers.
#
# What does such an interval mean? What other *questions* of the same kind would have shown. It does not know how another judge would mark, or the same one on another day.

# %%
#| export
def mt_bench_table(
    judgments: list, # lines of one model, as `write_judgments` gives them
    questions: list, # theirs, for the categories
) -> pd.DataFrame:   # a row a category, and "all": questions; turn 1, turn 2, both (mean, low, high); unrated
    "Marks from 1 to 10 with 95 % intervals over questions; answers without a mark count in no mean."
    category = {q["question_id"]: q["category"] for q in questions}
    marks = pd.DataFrame(judgments)[["question_id", "turn", "score"]]
    marks["category"] = marks["question_id"].map(category)
    groups = {name: marks[marks["category"] == name] for name in marks["category"].unique()} | {"all": marks}
    rows = {}
    for name, group in groups.items():
        rated = group[group["score"] >= 0]
        turns = {f"turn {t}": _mean(rated.loc[rated["turn"] == t, "score"]) for t in (1, 2)}
        both = _mean(rated.groupby("question_id")["score"].mean())
        unrated = len(group) - len(rated)
        rows[name] = dict(questions=group["question_id"].nunique()) | turns | dict(both=both, unrated=unrated)
    return pd.DataFrame(rows, dtype=object).T.rename_axis("category")

def _mean(values):
    if not len(values): return None
    mean, low, high = mean_interval(values.tolist())
    return mean, max(low, min(mean, 1.)), min(high, max(mean, 10.))


# %%
table = mt_bench_table(judged, asked)
by_hand = [1 + 9 * true_reward(q["turns"][0], both[0]) for q, both in zip(asked, said)]
assert abs(table.loc["all", "turn 1"][0] - sum(by_hand) / len(asked)) < 0.06 # the judge gives one digit
table.map(lambda cell: as_text(cell, ".1f") if isinstance(cell, tuple) else cell)


# %% [markdown]
# With six questions in a category the intervals are wide. The ten of MT-Bench are still few: with marks that spread by 2.5, the interval of ten is the mean plus or minus 1.8. So compare models by the row of all.
#
# ## All of it
#
# One call: read, answer, judge, count. The model is not needed any more once its answers are there, but it is loaded all the same, to see whether they are its own.
#
# A `limit` takes some of the questions, for a first look. The file is sorted by category, so its first ten are all about writing. We take the first of every category, then the second, and so on: eight questions are one of each.
#
# What cannot work, a file of other questions, a judge prompt that is missing or one that cannot be filled, is said before the model is loaded.
#
# Without a judge it stops after the answers, and says so. They are worth something alone: FastChat's scripts can judge them, or you read them.

# %%
#| export
def mt_bench(
    model: str,        # folder (a model, or an adapter of PEFT) or hub id
    out,               # folder for model_answer/ and model_judgment/
    questions=QUESTIONS, # FastChat's question.jsonl: a path, an address or its lines
    judge=None,        # messages -> text, as `openai_judge` makes one; none: stop after the answers
    limit: int=None,   # so many questions, taken from the categories in turn; none: all
    name: str=None,    # of the model, in files; none: made of its path
    judge_prompts=JUDGE_PROMPTS, # FastChat's judge_prompts.jsonl
    references=None,   # FastChat's reference_answer/gpt-4.jsonl; none: its own, or what other questions bring
    max_new: int=1024, # longest answer, in tokens
    precision: str="auto", # fp32, bf16, fp16, or auto
) -> pd.DataFrame:     # as `mt_bench_table`; empty without a judge
    """Answers of a model to MT-Bench, and a judge's marks. The same call goes on where it stopped.

    Raises ValueError for files that cannot be read, OSError for a judge that does not answer.
    """
    out, name = Path(out).expanduser(), _file_name(name or _name_of(model))
    if limit is not None and limit < 1: raise ValueError(f"limit: must be at least 1, got {limit}")
    if references is None and questions == QUESTIONS and judge: references = REFERENCES
    asked = _some(_with_references(_questions(questions), references), limit)
    if judge:
        file = f"{_file_name(_judge_name(judge))}_single.jsonl"
        prompts = _prompts(judge_prompts, asked)
    with alone_in(out):
        loaded, tokenizer = load_any(str(model)), load_saved_tokenizer(str(model))
        path = out / f"model_answer/{name}.jsonl"
        answers = write_answers(loaded, tokenizer, asked, path, max_new, precision)
        marks = out / "model_judgment"
        _drop_marks(marks, path)
        if judge is None:
            print(f"questions answered: {len(answers)}, in {path}. "
                  "There are no marks, because no judge was given.")
            return pd.DataFrame()
        return mt_bench_table(write_judgments(judge, asked, answers, marks / file, prompts), asked)

def _name_of(model):
    "The last part of a path that says something: runs/first/stage-2/model is first-stage-2."
    path = Path(str(model)).expanduser()
    if path.name in ("", ".."): path = path.resolve() # of . and .. the folder's own name
    if path.name != "model": return path.name
    return "-".join(path.parts[-3:-1]) or "model"

def _drop_marks(folder, path):
    "Every judge's marks of answers of this file that are not there any more are moved away."
    ids = {row["answer_id"] for row in _read(path)} | {None} # FastChat's own marks have no answer_id
    def fits(row): return row.get("model") != path.stem or row.get("answer_id") in ids
    for file in sorted(folder.glob("*_single.jsonl")): _keep(file, fits, "marks of answers that are gone")

def _judge_name(judge):
    try: return judge.__name__
    except AttributeError as e:
        raise ValueError("judge: has no __name__, which its file is called by; give it one") from e

def _lines_with(fields, place, what):
    "Lines that have these fields. Raises ValueError for others, before a model is loaded."
    lines = load_lines(place)
    for i, line in enumerate(lines, 1):
        absent = fields - set(line)
        if absent: raise ValueError(f"{what}: line {i} has no {', '.join(sorted(absent))}; it has {sorted(line)}")
    return lines

def _questions(place):
    "Questions as FastChat has them; ValueError for others."
    lines = _lines_with({"question_id", "category", "turns"}, place, "questions")
    if not lines: raise ValueError("questions: there are none")
    for i, line in enumerate(lines, 1):
        for field, counts in dict(turns=(1, 2), reference=(0, 1, 2)).items():
            texts = line.get(field) or []
            if isinstance(texts, list) and len(texts) in counts and all(isinstance(t, str) for t in texts): continue
            raise ValueError(f"questions: line {i}: {field} must be a list of one or two texts, got {str(texts)[:60]}")
    ids = [line["question_id"] for line in lines]
    if {type(i) for i in ids} not in ({int}, {str}):
        raise ValueError("questions: question_id must be a number in every line, or a text in every line")
    for i in ids:
        if ids.count(i) > 1: raise ValueError(f"questions: two of them have the question_id {i}")
    return lines

def _prompts(place, questions):
    "Name -> judge prompt. Raises ValueError where one of the four is missing, or a place in it cannot be filled."
    lines = _lines_with({"name", "system_prompt", "prompt_template"}, place, "judge prompts")
    prompts = {line["name"]: line for line in lines}
    for kind in ("", "-math"):
        for turn in ("", "-multi-turn"):
            name = f"single{kind}-v1{turn}"
            if name not in prompts: raise ValueError(f"judge prompts: there is none called '{name}'")
    for q in questions:
        for turn in (1, 2)[:len(q["turns"])]: judge_messages(q, [""] * turn, turn, prompts)
    return prompts

def _with_references(questions, references):
    "Questions with the answers of a file in FastChat's format in place of their own."
    if references is None: return questions
    rows = _lines_with({"question_id", "choices"}, references, "references")
    right = {row["question_id"]: row["choices"][0]["turns"] for row in rows}
    return [q | dict(reference=right.get(q["question_id"], q.get("reference"))) for q in questions]

def _some(questions, limit):
    "The first of every category, then the second, ...: so that a few questions are of many kinds."
    if limit is None: return questions
    place, seen = {}, {}
    for q in questions:
        place[q["question_id"]] = seen.get(q["category"], 0)
        seen[q["category"]] = place[q["question_id"]] + 1
    return sorted(questions, key=lambda q: place[q["question_id"]])[:limit]


# %%
assert _name_of("runs/first/stage-2/model") == "first-stage-2"
assert _name_of("HuggingFaceTB/SmolLM2-135M-Instruct") == "SmolLM2-135M-Instruct"
assert [q["category"] for q in _some(asked, 2)] == ["writing", "math"]

print(complaint(mt_bench, w.base, tmp / "all", [dict(prompt_id=81, prompt=["one", "two"])]))

how = dict(questions=tmp / "question.jsonl", judge_prompts=told, name="S", limit=8, **short)
printed = io.StringIO()
with contextlib.redirect_stdout(printed): nothing = mt_bench(w.base, tmp / "all", **how)
assert nothing.empty
print(printed.getvalue().replace(str(tmp), "."))

# %% [markdown]
# The same call with a judge finds the answers there:

# %%
found = mt_bench(w.base, tmp / "all", judge=ask, **how)
assert found.loc["all", "questions"] == 8
print(sorted(str(p.relative_to(tmp / "all")) for p in (tmp / "all").rglob("*.jsonl")))
found["both"].map(lambda cell: as_text(cell, ".1f")).to_frame()


# %% [markdown]
# From a shell ([chapter 18](18_cli.ipynb)), with a judge of one's own on this machine and, below, with OpenAI's:
#
# ```
# OPENAI_BASE_URL=http://localhost:8000/v1 sdpo mt-bench runs/first/stage-2/model --out mt --judge Qwen2.5-72B-Instruct
# OPENAI_API_KEY=... sdpo mt-bench runs/first/stage-2/model --out mt --judge gpt-4
# ```
#
# The second call finds the answers of the first. Give S and every stage the same `--out`: then all answers lie in one folder, the judge's file holds the marks of all of them, and FastChat's own table compares them. Where the stages were trained with LoRA, their folders hold adapters; each is merged into its base first.
#
# ## A real model, four real questions
#
# SmolLM2-135M-Instruct, with at most 48 tokens an answer so that it takes a minute on a CPU, FastChat's own questions and judge prompts, and a stub for a judge: behind an endpoint on this machine, it gives one mark for every five words. That says nothing about the answers. It shows that every piece fits the real files.

# %%
class CountsWords(Judge):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        said = re.split(r"The Start of Assistant's Answer\]|### Assistant A:", asked)[-1]
        text = f"Rating: [[{min(10, max(1, len(said.split()) // 5))}]]"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(dict(choices=[dict(message=dict(content=text))])).encode())

counting = HTTPServer(("127.0.0.1", 0), CountsWords)
threading.Thread(target=counting.serve_forever, daemon=True).start()

# %%
#| slow
with skipped_without(
    "SmolLM2-135M-Instruct, and MT-Bench's questions and judge prompts (SDPO_DATA), or the network",
    "eight answers and eight marks in FastChat's format",
):
    local = Path(os.environ.get("SDPO_MODEL", "~/.cache/sdpo_nb/smollm2-135m-instruct")).expanduser()
    smol = str(local) if local.exists() else "HuggingFaceTB/SmolLM2-135M-Instruct"
    data = Path(os.environ.get("SDPO_DATA", "../../shared/data")) / "benchmarks"
    here = data.exists()
    real = dict(
        questions=data / "mt_bench_question.jsonl.gz" if here else QUESTIONS,
        judge_prompts=data / "mt_bench_judge_prompts.jsonl.gz" if here else JUDGE_PROMPTS,
        judge=openai_judge("counts-words", f"http://127.0.0.1:{counting.server_port}/v1"),
        name="SmolLM2-135M-Instruct",
        precision="fp32",
    )
    torch.set_num_threads(os.cpu_count())
    found = mt_bench(smol, tmp / "smol", limit=4, max_new=48, **real)
    answers = _read(tmp / "smol/model_answer/SmolLM2-135M-Instruct.jsonl")
    judged = _read(tmp / "smol/model_judgment/counts-words_single.jsonl")
    assert len(answers) == 4
    assert len(judged) == 8
    assert {j["judge"][1] for j in judged} >= {"single-v1", "single-math-v1", "single-math-v1-multi-turn"}
    both = {a["question_id"]: a["choices"][0]["turns"] for a in answers}
    display(pd.DataFrame(both, index=["turn 1", "turn 2"]).T.rename_axis("question"))
    display(found.loc[["all"]].map(lambda cell: as_text(cell, ".1f") if isinstance(cell, tuple) else cell))

# %% [markdown]
# Read the answers before the marks. The second answer to question 81 was to start every sentence with the letter A, and begins with "In": a model of this size has the tone of an answer, and does not do what it is told. The stub gives the second answers 8.8 of 10 on average, because they are as long as they may be. This is what a mark is
# worth that comes from a judge nobody has looked at.

# %%
#| hide
server.shutdown()
counting.shutdown()
shutil.rmtree(tmp)

# %% [markdown]
# ## What this does not show
#
# - A judge has habits. It likes long answers, its own way of writing, and sure words; the paper of MT-Bench measures some of this. A model that was aligned to write more gets better marks for it.
# - Eighty questions are few. If their marks spread by 2.5, the interval of their mean is plus or minus 0.56. A difference of 0.1 between two models is well within what other questions would have shown.
# - The questions are public since 2023, so a newer model may have been trained on them.
#
# ## What you now have
#
# `mt_bench(model, out, judge=...)`: answers and marks in FastChat's files, a table with intervals, and a call that goes on. `openai_judge` makes a judge of any endpoint, and any function that returns text is one, too.
#
# ## Questions to test yourself
#
# 1. Why is the second turn judged with the first one in view?
#
# <details><summary>Answer</summary>
#
# It refers to it: "rewrite your previous response". The same second answer can be right after one first answer and wrong after another.
#
# </details>
#
# 2. Half of a run's answers are there, and then you train the model again and save it under the same name. What does the next call do?
#
# <details><summary>Answer</summary>
#
# It answers all questions anew. Each line says which weights wrote it, and those are not the weights that lie there now. The old lines are moved to a file that ends in `.old`, and the marks of the old answers go the same way, because each belongs to an `answer_id`.
#
# </details>
#
# 3. A judge gives no mark for three answers of a model. Why not count them as 1, the worst?
#
# <details><summary>Answer</summary>
#
# The judge failed there, not the model: perhaps the endpoint cut its text before the mark. But look at the column `unrated`. If it is large for one model and small for another, the two means are of different questions.
#
# </details>
#
# 4. Two models have means of 5.1 [4.5, 5.7] and 5.6 [5.0, 6.2]. Do the intervals say that the second may be no better?
#
# <details><summary>Answer</summary>
#
# They do not say it. Each tells how the mean would vary with other questions. But both models got the *same* questions, so take the difference question by question and look at *its* interval, which is usually much narrower. The marks of each question are in the file of judgments.
#
# </details>
#
# ## Try this
#
# Write a judge as a function: `def strict(messages): return "[[1]]"`. Call `mt_bench` with it on the folder that the other judge has used.
#
# <details><summary>What you should see</summary>
#
# The answers are not written again. A second file lies in `model_judgment`, `strict_single.jsonl`, and its table shows 1.0 with no width.
#
# </details>
