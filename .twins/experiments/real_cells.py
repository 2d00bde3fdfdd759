# %% [markdown]
# # One run on a real model
# > Which pairs a draw trains on, how an arm is trained without writing a model, and the row that stays.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sdpo-nb/sdpo_nb/blob/main/nbs/experiments/real_cells.ipynb)
#
# **You should know** [what is asked of SmolLM2](smollm2.ipynb), [a stage in memory](in_memory.ipynb) and [runs in eight minutes](timed.ipynb). **Time** 40 minutes to read, a minute to run.
#
# The experiments on SmolLM2 need a model of 135 million parameters and real pairs. This page makes their parts, and tries each on the [tiny world](../00_world.ipynb), which has a model and three sources, too.
#
# The parts come in the order in which a run uses them: pairs with roles, the pairs of one draw, the model, one stage of training, one run (a *cell*), the list of all cells, and the call that works the list off. Each part is tried in the cell under it. The numbers on this page come from tiny models, so they show that the parts work, and answer no question about SmolLM2.

# %%
#| default_exp real

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

# %% [markdown]
# Parts that the package has already:

# %%
#| export
import gzip, hashlib, json, math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from sdpo_nb.evaluate import kl_along
from sdpo_nb.graded import answer_text, sampled_ids
from sdpo_nb.in_memory import Base, load_S, train_stages
from sdpo_nb.logprobs import LogprobTable, lines_of, load_model, load_tokenizer
from sdpo_nb.logprobs import pair_tokens, pairs_hash, read_table, replacing
from sdpo_nb.packing import PARTS
from sdpo_nb.preferences import load_pairs, tokenize_pairs
from sdpo_nb.smollm2 import ARMS, BORROWED, CPU_ARMS, CPU_DRAWS, CPU_LONGEST, CPU_PAIRS, CPU_SETTINGS
from sdpo_nb.smollm2 import DRAWN, DRAWS, HELD_OUT, LONGEST, SEARCH_DRAW, VALIDATION
from sdpo_nb.smollm2 import choose_settings, grid_of, validation_loss
from sdpo_nb.timed import check_alike, mixed_draws, run_timed
from sdpo_nb.trainer import TrainConfig
from sdpo_nb.which_is_easy import CPU_EASY_ARMS, CPU_EASY_PAIRS, EASY_ARMS, one_by_one, with_gaps
from sdpo_nb.world import content_hash

# %%
import io, tempfile
from contextlib import redirect_stdout
from unittest.mock import patch
from sdpo_nb import real
from sdpo_nb.world import complaint, load_world

# %% [markdown]
# ## A small file of ids
#
# The machine with the card may have neither the data nor a tokenizer. So pairs are tokenised once, into a file of token ids of some two MiB, which can be carried. It holds no text.
#
# Each pair has a role for good. A *lot* decides: a number from 0 to 1 that is a hash of the pair's prompt and of what it is drawn for. Pairs of one prompt have the same lot, so where lots decide, no prompt of a source is on both sides.
#
# Where do the pairs come from? They belong to others and are not part of this book. `--data DIR` names a folder with three files, `DIR/preferences/NAME.jsonl.gz`, one JSON object a line:
#
# - `orca_dpo_pairs`: tasks with a system message, where the answer of a stronger model is chosen. The set on the hub is `Intel/orca_dpo_pairs`.
# - `ultrafeedback_binarized`: instructions of many kinds, where GPT-4 has scored the answers; `HuggingFaceH4/ultrafeedback_binarized`.
# - `hh_harmless`: the test part of the harmless dialogues of `Anthropic/hh-rlhf`, labelled by people.
#
# Each line has the texts `prompt`, `chosen` and `rejected`. It may have `system`, a text, and `messages`, earlier turns with `role` and `content`. Where `meta` is `{"split": "eval"}`, the makers of the set held the pair out. Ours are samples of these sets, so other samples give other pairs, and the key of each row says so.
#
# There are three roles:
#
# - *held out*: never trained on, in no draw. UltraFeedback comes with such pairs, and those are taken. For the others we take the pairs with the smallest lots.
# - *validation*: a tenth of the rest, for choosing settings.
# - *pool*: all others. A draw takes its training pairs from here.
#
# Why a hash, and not a random generator? A hash does not depend on the order of the rows, and needs no state. If some rows are added to a source, a pair keeps its lots.

# %%
#| export
SOURCE_FILES = dict(orca="orca_dpo_pairs", uf="ultrafeedback_binarized", hh="hh_harmless") # in preferences/

def lot(
    pair: dict,  # with prompt_ids
    what: str,   # what is drawn
) -> float:      # from 0 to 1
    "A number that only this prompt and this purpose have."
    ids = [int(i) for i in pair["prompt_ids"]]
    digits = hashlib.sha256(json.dumps([ids, what]).encode()).hexdigest()[:12]
    return int(digits, 16) / 16**12

def _read_rows(data, source):
    "Rows of a source, as the data have them."
    path = Path(data) / "preferences" / f"{SOURCE_FILES[source]}.jsonl.gz"
    if not path.exists():
        raise ValueError(f"{path}: not there; --data names the folder that has preferences/, "
                         "with prompt, chosen and rejected in each line")
    return lines_of(gzip.decompress(path.read_bytes()), path)

def _given(row): # held out by those who made the data
    return (row.get("meta") or {}).get("split") == "eval"

def _fields(row): return {name: row[name] for name in row if name not in ("id", "meta")}

def _tokenised(rows, tokenizer, source, longest):
    "Usable pairs of some rows."
    if not rows: return []
    found = tokenize_pairs(load_pairs([_fields(row) for row in rows]), tokenizer, source, longest, chat=True)
    return list(found.pairs)

def _with_roles(pairs, held, source):
    "About so many pairs are held out; of the rest a tenth is for validation."
    if held >= len(pairs):
        raise ValueError(f"{source}: {len(pairs)} usable pairs, and {held} are to be held out; "
                         "bring more pairs, or say with --most how many to take of each source")
    last = sorted(lot(pair, "held out") for pair in pairs)[held - 1] if held else -1
    for pair in pairs:
        role = "validation" if lot(pair, "validation") < VALIDATION else "pool"
        if lot(pair, "held out") <= last: role = "held out"
        yield pair | dict(source=source, role=role)

def prepare_ids(
    data,                   # folder with preferences/
    model,                  # hub id or folder of S; only its tokenizer is read
    file,                   # a parquet file that will be written
    longest: int = LONGEST, # tokens of prompt and response; of the prompt half
    most: int = None,       # pairs of each source, of which a fifth is held out; None: all
) -> list[dict]:            # pairs: source, role, key, and three lists of ids
    "Tokenise all sources, give every pair its role, and write the ids."
    tokenizer, pairs = load_tokenizer(str(model)), []
    for source, held in HELD_OUT.items():
        rows = _read_rows(data, source)[:most]
        given = _tokenised([row for row in rows if _given(row)], tokenizer, source, longest)
        others = _tokenised([row for row in rows if not _given(row)], tokenizer, source, longest)
        pairs += [pair | dict(source=source, role="held out") for pair in given]
        if given: held = 0
        elif most: held = most // 5
        pairs += _with_roles(others, held, source)

    table = pd.DataFrame(pairs)[["source", "role", "key", *PARTS]]
    for part in PARTS: table[part] = [np.array(ids, "uint32") for ids in table[part]]
    table.attrs = dict(longest=longest, most=most)      # parquet keeps them
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as tmp: table.to_parquet(tmp, compression="zstd")
    return read_ids(file)

def read_ids(
    file, # of `prepare_ids`
) -> list[dict]: # pairs: source, role, key, and three lists of ids
    "The pairs of a file of ids. Raises ValueError where there is none."
    if not Path(file).exists():
        raise ValueError(f"{file}: not there; give --data and --model, and it is made")
    pairs = pd.read_parquet(file).to_dict("records")
    for pair in pairs:
        for part in PARTS: pair[part] = pair[part].tolist()
    return pairs

def _check_ids(file, **asked):
    "Raise ValueError where a file of ids was made with other settings."
    made = pd.read_parquet(file, columns=["key"]).attrs
    for name, value in asked.items():
        was = made.get(name, "unknown")
        if was != value: raise ValueError(f"{file}: made with {name} = {was}, not {value}; use another folder")


# %% [markdown]
# How many pairs have which role? We need files in the form of the real data, so we write 80 rows of each source of the tiny world, under the names of Orca, UltraFeedback and HH. With `most=80` a fifth of them is to be held out.

# %%
world = load_world()
folder = Path(tempfile.mkdtemp())
(folder / "preferences").mkdir()
for file, name in zip(SOURCE_FILES.values(), world.sources):
    lines = Path(world.sources[name]).read_text().splitlines()[:80]
    rows = [json.dumps({k: json.loads(line)[k] for k in ("prompt", "chosen", "rejected")}) for line in lines]
    (folder / "preferences" / f"{file}.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))

pairs = prepare_ids(folder, world.base, folder / "ids.parquet", longest=64, most=80)
pd.DataFrame(pairs).pivot_table("key", "source", "role", aggfunc="count", sort=False)


# %% [markdown]
# A row is a source, and each row adds up to 80, so every pair was usable. A fifth of 80 is 16. Of the 64 that are left, 5 to 7 are for validation: about a tenth, as lots fall.
#
# ## Which pairs belong to a draw
#
# A draw trains on 80 % of the pool. The number of the draw is part of what the lot is drawn for, so another draw leaves out other pairs.
#
# An arm names its chunks: `all`, a source, or `random 1` and so on (see the [arms](smollm2.ipynb)). `chunk_of` looks the names up. The random split has chunks of the same sizes as the sources. So *sDPO, random* differs from *sDPO* only in which pairs meet in a stage, not in how many.
#
# `measured` is the other side: of the sources that are trained on, every pair that this draw has not trained on; of other sources those held out.

# %%
#| export
def drawn(
    pairs: list,   # with source and role
    draw: int,     # its number
    sources,       # names of those that are trained on
) -> list[dict]:   # in the order of the sources
    "The pairs that a draw trains on."
    def lucky(pair): return pair["role"] == "pool" and lot(pair, f"draw {draw}") < DRAWN
    return [pair for source in sources for pair in pairs if pair["source"] == source and lucky(pair)]

def chunk_of(
    trained: list, # pairs of `drawn`
    name: str,     # all, a source, or random 1, random 2, ...
    draw: int,     # its number; it decides what is random
) -> list[dict]:   # pairs
    "One chunk of a draw."
    if name == "all": return trained
    if not name.startswith("random"): return [pair for pair in trained if pair["source"] == name]
    sources = dict.fromkeys(pair["source"] for pair in trained)
    ends = np.cumsum([len(chunk_of(trained, source, draw)) for source in sources])
    shuffled = sorted(trained, key=lambda pair: lot(pair, f"split {draw}"))
    return np.split(np.array(shuffled, object), ends[:-1])[int(name.split()[1]) - 1].tolist()

def measured(
    pairs: list,   # with source and role
    draw: int,     # its number
    sources,       # names of those that are trained on
) -> list[int]:    # numbers of pairs
    "The pairs that a model of a draw is measured on: held out, validation, left out; of other sources those held out."
    seen = {pair["key"] for pair in drawn(pairs, draw, sources)}
    def asked(pair):
        if pair["source"] not in sources: return pair["role"] == "held out"
        return pair["key"] not in seen
    return [i for i, pair in enumerate(pairs) if asked(pair)]


# %% [markdown]
# Are the random chunks as large as the sources? And is a model of draw 0 asked about a prompt that it was trained on? HH is not among the two sources here.

# %%
two = ("orca", "uf")
trained = drawn(pairs, 0, two)
sizes = {name: len(chunk_of(trained, name, 0)) for name in ("all", "orca", "uf", "random 1", "random 2")}
assert sizes["random 1"] == sizes["orca"]
assert sizes["random 1"] + sizes["random 2"] == sizes["all"]

asked = [pairs[i] for i in measured(pairs, 0, two)]
prompts = {tuple(pair["prompt_ids"]) for pair in trained}
assert not [pair for pair in asked if tuple(pair["prompt_ids"]) in prompts and pair["source"] in two]
sizes, {"measured": len(asked)}

# %% [markdown]
# The draw trains on 91 of the 115 pairs in the two pools, 48 of Orca and 43 of UltraFeedback, and the random chunks have these sizes. It is measured on 85: the 69 other pairs of the two sources, and the 16 held out of HH. The assertion finds no trained prompt among the measured pairs of the two sources.

# %% [markdown]
# ## The model
#
# One model serves all cells. `load_S` loads it and decides how it reads pairs; a cell begins by putting the weights of S back, and its stages are trained [in memory](in_memory.ipynb).

# %%
base = load_S(world.base, pairs, "fp32")
table_S = base.score(pairs)
base.precision, base.logprobs.__name__, len(table_S.rows)


# %% [markdown]
# ## A cell
#
# A cell is an arm in a draw with its settings. Its key is made of what is done, not of the arm's name: if two arms have the same stages and the same settings, they are one run.
#
# The stages of an arm are trained by [`train_stages`](in_memory.ipynb).
#
# After every stage the model is measured. Of each measured pair the row keeps two numbers, the log-probabilities of the two responses, and no accuracy or gain. Those are computed from the rows later, so another outcome needs no new run. What is the same for all rows, such as sources, roles and lengths, stands in the row of S only.
#
# *sDPO* and *sDPO, fixed reference* begin with the same stage: the same pairs, from S, held near S. So do others. The last two first stages are put aside, and an arm that begins like one of them goes on from there.
#
# `_check_first_loss` looks at stages that begin at their own reference, and raises where the first loss is more than 0.1 away from $\log 2$. With the table of another model the loss may fall all the same, and nobody would notice.

# %%
#| export
@dataclass(frozen=True)
class RealCell:
    "One run: stages, in a draw, with settings."
    arm: str            # its name, for people
    draw: int           # its number; -1 for S, which is in every draw
    stages: tuple       # of (pairs, start, reference)
    settings: tuple     # of (name, value): beta, lr, and whatever else is not the default of TrainConfig
    sources: tuple      # that are trained on
    about: str          # hash of the pairs and the weights of S
    only: str = ""      # a role: only these pairs are measured; "": all that the draw has not seen

    @property
    def key(self) -> str:
        "A hash of all that makes the run."
        draw = self.draw if self.stages else -1
        return content_hash([draw, self.stages, self.settings, self.sources, self.about, self.only])

    @property
    def cost(self) -> int:
        "Passes over the pairs, about."
        names = [name for name, _, _ in self.stages]
        return max(1, names.count("all"))

    def __str__(self):
        settings = ", ".join(f"{name} {value}" for name, value in self.settings)
        return f"{self.arm}, draw {self.draw}" + (f", {settings}" if settings else "")

def _rounded(values): return [round(value, 3) for value in values.tolist()]

def _as_numbers(table, pairs):
    "What a model says about pairs, in nats, as lists."
    chosen, rejected = table.lookup(pairs)
    return dict(chosen=_rounded(chosen), rejected=_rounded(rejected))

def _described(pairs):
    "What a reader must know of all pairs: it stands in the row of S."
    return dict(
        source=[pair["source"] for pair in pairs],
        role=[pair["role"] for pair in pairs],
        chosen_tokens=[len(pair["chosen_ids"]) for pair in pairs],
        rejected_tokens=[len(pair["rejected_ids"]) for pair in pairs],
    )

KEPT = 2 # first stages that are put aside at a time: each is as large as S

def _beginning(cell, config): return content_hash([cell.draw, cell.stages[0], cell.sources, cell.about, cell.only, repr(config)])

def _keep(cell, config, base, stages, models):
    "Put aside what the first stage of a cell has made."
    while len(base.begun) >= KEPT: del base.begun[next(iter(base.begun))]
    weights = {name: value.detach().clone() for name, value in base.model.state_dict().items()}
    base.begun[_beginning(cell, config)] = dict(weights=weights, stage=stages[0], model=models[0])

def _take_up(cell, config, base, stages, models):
    "Go on from a first stage that was put aside; whether there was one."
    kept = base.begun.get(_beginning(cell, config))
    if kept is None: return False
    with torch.no_grad(): base.model.load_state_dict(kept["weights"])
    stages.append(kept["stage"])
    models.append(kept["model"])
    return True

def run_real_cell(
    cell: RealCell,
    base: Base,            # S; afterwards its model is the last one of the cell
    pairs: list,           # of `read_ids`
    table_S: LogprobTable, # of S, with all of them
) -> dict:                 # what the cell is; per stage: losses, grad_norms; per model: chosen, rejected of `pairs`
    "Train a cell, and measure it after every stage. A first stage that another cell has just made is taken from there."
    trained = drawn(pairs, cell.draw, cell.sources)
    numbers = measured(pairs, cell.draw, cell.sources)
    if not cell.stages: numbers = list(range(len(pairs)))
    if cell.only: numbers = [i for i in numbers if pairs[i]["role"] == cell.only]
    asked = [pairs[i] for i in numbers]
    config = TrainConfig(**dict(cell.settings), seed=cell.draw % 2**31, precision=base.precision)

    stages, models = [], []
    def chunk_named(name): return chunk_of(trained, name, cell.draw)
    begun = int(bool(cell.stages) and _take_up(cell, config, base, stages, models))
    for t, chunk, made in train_stages(base, cell.stages, chunk_named, table_S, config, begun):
        name, start, reference = cell.stages[t - 1]
        _check_first_loss(made["losses"][0], start, reference, t)
        stages.append(dict(chunk=name, pairs=len(chunk), tokens=int(pair_tokens(chunk).sum()), **made))
        models.append(_as_numbers(base.score(asked), asked))
        if t == 1: _keep(cell, config, base, stages, models)
    if not cell.stages: models.append(_as_numbers(table_S, asked))
    described = {} if cell.stages else _described(pairs)
    return described | dict(
        arm=cell.arm,
        draw=cell.draw,
        settings=dict(cell.settings),
        about=cell.about,
        precision=base.precision,
        reads=base.logprobs.__name__,
        pairs=numbers,
        stages=stages,
        models=models,
    )

def _check_first_loss(loss, start, reference, t):
    "A model that is its own reference begins at ln 2."
    own = reference == start or t == 1 and reference.startswith("every")
    if own and abs(loss - math.log(2)) > 0.1:
        raise ValueError(f"stage {t}: the first loss is {loss:.3f}, not ln 2 = 0.693; "
                         "the table of the reference is not of this model")


# %% [markdown]
# Every arm once, on the tiny pairs, in draw 0. Where must the first loss be $\log 2 = 0.693$? Where a stage starts from its own reference. Before you look: which three arms, beside fine-tuning, have a stage that does not?

# %%
about = content_hash([pairs_hash(pairs), base.hash])
found = {}
for arm, stages in ARMS.items():
    settings = (("lr", 1e-4),) if arm == "SFT on chosen" else (("beta", 0.3), ("lr", 1e-4))
    settings += (("batch_size", 8),)
    cell = RealCell(arm, 0, tuple(stages), settings if stages else (), two, about)
    found[arm] = run_real_cell(cell, base, pairs, table_S)

first = {arm: [stage["losses"][0] for stage in row["stages"]] for arm, row in found.items()}
for arm in ("DPO", "sDPO", "sDPO, random", "TR-DPO"):
    for loss in first[arm]: assert abs(loss - math.log(2)) < 1e-3
for arm in ("sDPO, fixed reference", "sDPO, target S", "Pre-DPO"):
    assert abs(first[arm][1] - math.log(2)) > 1e-3
first

# %% [markdown]
# There is one number for each stage. S has no stage. The loss of fine-tuning, 0.3798, is of another kind and has nothing to do with $\log 2$. Three second stages begin elsewhere: those of *fixed reference*, *target S* and *Pre-DPO*.
#
# The second stage of *target S* begins at S and is held near $M_1$, that of *fixed reference* the other way round. Both begin where the two models differ. *Pre-DPO* does what *target S* does, with all pairs in both stages.
#
# ## What it writes
#
# Log-probabilities of given responses do not show what a model would write. So every model of the main part also answers some held-out prompts, four of each source, with up to 48 tokens: once greedily, to be read, and once at temperature 1, to see along that reply how far the model is from S. With four replies a source this is a rough figure.

# %%
#| export
REPLIES, LONGEST_REPLY = 4, 48 # to held-out prompts of each source; tokens

def replies_of(
    model,                   # as it writes now
    S,                       # as it is
    tokenizer,               # of both
    pairs: list,             # with source, role and prompt_ids
    precision: str = "fp32", # in which replies are written
) -> dict:                   # asked: numbers of pairs; replies: greedy texts; kl: nats along sampled replies
    "What a model writes to the first held-out prompts of each source."
    asked = {pair["source"]: [] for pair in pairs}
    for number, pair in enumerate(pairs):
        of_source = asked[pair["source"]]
        if pair["role"] == "held out" and len(of_source) < REPLIES: of_source.append(number)
    numbers = sum(asked.values(), [])
    prompts = [[int(i) for i in pairs[number]["prompt_ids"]] for number in numbers]
    how = dict(max_new=LONGEST_REPLY, precision=precision)
    greedy = sampled_ids(model, tokenizer, prompts, 0., **how)
    sampled = sampled_ids(model, tokenizer, prompts, 1., **how)
    kl = kl_along(model, S, tokenizer, prompts, sampled, batch=4)
    texts = [answer_text(tokenizer, ids) for ids in greedy]
    return dict(asked=numbers, replies=texts, kl=np.round(kl.numpy(), 3).tolist())


# %% [markdown]
# The base of the tiny world and the model of the last arm, on two prompts. S is at no distance from itself.

# %%
tokenizer, S = load_tokenizer(world.base), load_model(world.base).eval()
last = replies_of(base.model.eval(), S, tokenizer, pairs)
own = replies_of(S, S, tokenizer, pairs)
assert max(own["kl"]) == 0
assert min(last["kl"]) > 0
pd.DataFrame({"prompt": own["asked"], "S": own["replies"], arm: last["replies"], "KL": last["kl"]}).head(4)


# %% [markdown]
# ## The plan
#
# S first; then the search; then, when the search is complete, all arms draw by draw. So whatever is finished is a number of whole draws, and a part of one.
#
# Why is this not a plain list? What comes later depends on rows that are not there yet: an arm's settings on the search, and in one design the arms themselves on S. So `Design.plan` is a function of the rows. It is asked again after every cell, and names what is known by then.
#
# The search has a draw of its own, number 100, and its models are measured on validation pairs only. An arm in `BORROWED` is not searched: it takes the settings of another arm, with beta times a factor.
#
# The order within the main part matters when time runs out. All arms of draw 0 come before any arm of draw 1, because two arms can be compared only in draws that both have.

# %%
#| export
def make_cell(
    arm: str,         # its name
    draw: int,        # its number; -1 for S
    stages: list,     # of (pairs, start, reference)
    settings: dict,   # beta, lr
    sources,          # that are trained on
    about: str,       # hash of the pairs and of S
    only: str = "",   # a role: only these pairs are measured
) -> RealCell:
    "A cell, from what people write."
    settings = tuple(sorted(settings.items()))
    return RealCell(arm, draw, tuple(map(tuple, stages)), settings, tuple(sources), about, only)

def search_cells(
    arms: dict,       # name -> stages, of those that are searched
    sources,          # that are trained on
    about: str,       # hash of the pairs and of S
) -> list[RealCell]:
    "Every arm at every setting of its grid, measured on validation pairs."
    cells = []
    for arm, stages in arms.items():
        for settings in grid_of(arm):
            cells.append(make_cell(arm, SEARCH_DRAW, stages, settings, sources, about, "validation"))
    return cells

def settings_of(
    arm: str,         # a name
    chosen: dict,     # arm -> settings, of those that were searched
) -> dict:            # beta, lr
    "The settings that an arm runs with."
    if arm not in BORROWED: return chosen[arm]
    lender, factor = BORROWED[arm]
    return chosen[lender] | dict(beta=factor * chosen[lender]["beta"])

@dataclass
class Design:
    "An experiment: arms, sources, draws, and the pairs and the model that it is about."
    arms: object            # name -> stages; or a function that makes this of the row of S
    sources: tuple          # that are trained on
    about: str              # hash of the pairs and of S
    draws: object = DRAWS   # numbers
    fixed: dict = None      # settings of all arms; None: they are searched

    @property
    def start(self) -> RealCell:
        "The cell of S."
        return make_cell("S", -1, [], {}, self.sources, self.about)

    def stages_of(
        self,
        S: dict, # the row of S
    ) -> dict:
        "Name -> stages of every arm that is trained."
        arms = self.arms(S) if callable(self.arms) else self.arms
        return {arm: stages for arm, stages in arms.items() if stages}

    def search(
        self,
        S: dict, # the row of S
    ) -> list[RealCell]:
        "The cells of the search."
        if self.fixed: return []
        arms = {arm: stages for arm, stages in self.stages_of(S).items() if arm not in BORROWED}
        return search_cells(arms, self.sources, self.about)

    def chosen(
        self,
        rows: dict, # key -> row, the search complete
    ) -> dict:
        "Arm -> settings."
        S = rows[self.start.key]
        if self.fixed: return {arm: self.fixed for arm in self.stages_of(S)}
        tried = [(cell.arm, dict(cell.settings), validation_loss(rows[cell.key], S)) for cell in self.search(S)]
        chosen = choose_settings(tried)
        return {arm: settings_of(arm, chosen) for arm in self.stages_of(S)}

    def cells(
        self,
        rows: dict, # key -> row, the search complete
    ) -> dict:
        "Arm -> draw -> cell."
        chosen, cells = self.chosen(rows), {}
        for arm, stages in self.stages_of(rows[self.start.key]).items():
            same = stages, chosen[arm], self.sources, self.about
            cells[arm] = {draw: make_cell(arm, draw, *same) for draw in self.draws}
        return cells

    def plan(
        self,
        rows: list, # that are there
    ) -> list[RealCell]:
        "What `run_timed` asks for: all cells that are known to be wanted, in order."
        by_key = {row["key"]: row for row in rows}
        if self.start.key not in by_key: return [self.start]
        search = self.search(by_key[self.start.key])
        if not all(cell.key in by_key for cell in search): return [self.start, *search]
        by_arm = self.cells(by_key)
        main = [by_arm[arm][draw] for draw in self.draws for arm in by_arm]
        return [self.start, *search, *main]


# %% [markdown]
# How many runs are known of the [first experiment](smollm2.ipynb), before S has been asked, and before the search is complete? We have the row of S already, from the cell with all arms.

# %%
design = Design(ARMS, two, about)
known = [dict(key=design.start.key) | found["S"]]
assert len(design.plan([])) == 1
assert len(design.plan(known)) == 1 + 66
print(design.plan(known)[1])


# %% [markdown]
# Without any row the plan is one cell, S. With it there are 66 more, the search: fine-tuning has 2 settings, and 8 other arms have 8 each. The line that is printed is the first of them. The main part is not known yet.
#
# The arms of [which is easy](which_is_easy.ipynb) are orders of sources, so they are known when S has read the pairs. A source is easier if S prefers the chosen response in a larger share of its pairs. There are two ways to say "prefers": by the sum over the tokens, or by the mean per token. Each way gives an order, and each order is also run backwards. What is easy is decided once, on the pool, so it does not change from draw to draw.

# %%
#| export
def gaps_under_S(
    S: dict,             # the row of S
) -> pd.DataFrame:       # a pair a line: source, role, sum, per token (nats), and lengths
    "How much likelier does S find the chosen responses?"
    columns = {name: S[name] for name in ("source", "role", "chosen_tokens", "rejected_tokens")}
    return with_gaps(pd.DataFrame(columns | S["models"][0]))

def easy_arms(
    S: dict,     # the row of S
) -> dict:       # name -> stages
    "The arms of which_is_easy, as stages."
    gaps = gaps_under_S(S)
    gaps, arms = gaps[gaps["role"] == "pool"], {"S": []}
    for arm, rule in EASY_ARMS.items():
        if rule is None:
            arms[arm] = ARMS["DPO"]
            continue
        measure, direction = rule
        prefers = 0.5 + 0.5 * np.sign(gaps[measure])
        shares = prefers.groupby(gaps["source"], sort=False).mean()
        arms[arm] = one_by_one((-direction * shares).sort_values(kind="stable").index)
    return arms


# %% [markdown]
# Which order do the tiny sources get? An arm is printed with the chunks of its stages.

# %%
for arm, stages in easy_arms(found["S"]).items():
    print(f"{arm:24}{' → '.join(name for name, _, _ in stages)}")

# %% [markdown]
# Here both measures give the same order, Orca, UltraFeedback, HH, and *hard first* is its reverse. Then *sum* and *per token* have the same stages, and at the same settings the same key: they would be trained once. On real pairs the two measures may disagree, and the page is about that.
#
# ## From a folder to rows
#
# The designs by name. *smollm2_cpu* is the [smaller version](smollm2.ipynb) for a processor, and *which_is_easy_cpu* is that of [the other page](which_is_easy.ipynb). *rehearsal* is for whoever wants to see that everything works: its arms and settings, in two draws. Its rows are kept apart from the others.
#
# `run_real` is all of this page in one call. It makes the ids if they are not there, loads S, lets S read all pairs, and hands the plan to [`run_timed`](timed.ipynb), which writes each row when its cell is finished. The hash `about` joins the pairs and the weights of S, and is part of every key. So rows that were made with other data are never taken for these. The precision is in no key: a folder with rows in bf16 is gone on with in bf16, and anything else is refused. So is a folder whose ids were cut at another length, or made of another number of pairs.

# %%
#| export
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
THREE = tuple(SOURCE_FILES)
ON_CPU = dict(smollm2_cpu=CPU_PAIRS, which_is_easy_cpu=CPU_EASY_PAIRS) # design -> pairs of each source

def design_of(
    name: str,   # smollm2, which_is_easy, one of ON_CPU, or rehearsal
    about: str,  # hash of the pairs and of S
) -> Design:
    "A design by its name. Raises ValueError for another."
    few = {arm: ARMS[arm] for arm in CPU_ARMS}
    designs = dict(
        smollm2=Design(ARMS, THREE[:2], about),
        smollm2_cpu=Design(few, THREE[:2], about, CPU_DRAWS, CPU_SETTINGS),
        which_is_easy=Design(easy_arms, THREE, about),
        which_is_easy_cpu=Design(CPU_EASY_ARMS, THREE, about, CPU_DRAWS, CPU_SETTINGS),
        rehearsal=Design(few, THREE[:2], about, range(2), dict(beta=0.1, lr=1e-5)),
    )
    if name not in designs: raise ValueError(f"design: {name!r} is none of {', '.join(designs)}")
    return designs[name]

def run_real(
    name: str,              # of `design_of`
    folder,                 # for ids.parquet, S and the rows
    minutes: float = None,  # from the start of the process; None: until all is done
    data = None,            # folder with preferences/; needed where folder has no ids.parquet
    model = SMOLLM2,        # hub id or folder of S
    precision: str = "auto",# bf16, fp16, fp32, or what suits the device
    longest: int = LONGEST, # tokens of a prompt with its response, where ids are made
    most: int = None,       # pairs of each source, where ids are made; None: all
) -> list[dict]:            # rows
    """What the command line does: go on with an experiment for some minutes. Raises ValueError where the folder's
    ids have another `longest` or `most`, or its rows another precision."""
    folder = Path(folder)
    file = folder / "ids.parquet"
    on_cpu = name in ON_CPU
    if on_cpu: longest, most = CPU_LONGEST, ON_CPU[name]
    if data and not file.exists(): prepare_ids(data, model, file, longest, most)
    pairs = read_ids(file)
    _check_ids(file, longest=longest, most=most)
    base = load_S(model, pairs, precision, "on" if on_cpu else "auto")
    check_alike(name, folder, precision=base.precision, reads=base.logprobs.__name__)
    about = content_hash([pairs_hash(pairs), base.hash])
    table_S = base.score(pairs, folder / "S")
    design = design_of(name, about)
    tokenizer = load_tokenizer(str(model))
    S, writer = (load_model(str(model), str(base.model.device)).eval() for _ in range(2)) # layers of base may be compiled

    def run(cell):
        row = run_real_cell(cell, base, pairs, table_S)
        if cell.only: return row
        trained = base.model if cell.stages else S
        with torch.no_grad(): writer.load_state_dict(trained.state_dict())
        return row | replies_of(writer, S, tokenizer, pairs, base.precision)
    return run_timed(name, design.plan, run, folder, minutes, base.model.device)


# %% [markdown]
# Is anything lost when a run is killed? A rehearsal on the tiny pairs is killed in its fourth cell and called again. A run that was never killed must have the same rows. Only the seconds may differ, so they are left out of the comparison.

# %%
class Killed(BaseException): pass

def dies_at_the_fourth(cell, *args, calls=[], **kw):
    calls.append(cell)
    if len(calls) == 4: raise Killed
    return run_real_cell(cell, *args, **kw)

def rehearse(where):
    how = dict(precision="fp32", longest=64, most=80)
    return real.run_real("rehearsal", where, data=folder, model=world.base, **how)

with patch.object(real, "run_real_cell", dies_at_the_fourth), redirect_stdout(io.StringIO()):
    try: rehearse(folder / "killed")
    except Killed: pass

with redirect_stdout(io.StringIO()):
    gone_on = rehearse(folder / "killed")
    at_once = rehearse(folder / "whole")

def without_seconds(rows): return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
assert without_seconds(gone_on) == without_seconds(at_once)
print(len(at_once), "rows, the same")

# %% [markdown]
# Nine rows: S, and four arms in two draws. The second call took the first three from the file and made the other six, with the same losses and the same log-probabilities.
#
# And a call in the same folder that asks for longer pairs, or for another precision?

# %%
asked = dict(name="rehearsal", folder=folder / "whole", model=world.base, most=80)
print(complaint(real.run_real, **asked, precision="fp32", longest=128))
print(complaint(real.run_real, **asked, precision="bf16", longest=64))


# %% [markdown]
# Both are told what the folder has.
#
# What S has said so far about the pairs lies in the folder, too, and can be read while the pass over them is not yet at its end. The table of [which is easy](which_is_easy.ipynb) is made of such a folder.

# %%
#| export
def scored_pairs(
    folder,         # of `run_real`
) -> pd.DataFrame:  # a pair a line: source, role, chosen, rejected (nats), chosen_tokens, rejected_tokens
    "The pairs that S has read so far."
    table = read_table(Path(folder) / "S")
    pairs = [pair for pair in read_ids(Path(folder) / "ids.parquet") if pair["key"] in table.rows.index]
    chosen, rejected = table.lookup(pairs)
    described = pd.DataFrame(_described(pairs))
    return described.assign(chosen=chosen.numpy(), rejected=rejected.numpy())


# %% [markdown]
# The run is complete, so all pairs must be there. How likely does S find the two responses, on average?

# %%
scored = scored_pairs(folder / "whole")
assert len(scored) == len(pairs)
scored.groupby("source", sort=False)[["chosen", "rejected"]].mean().round(2)


# %% [markdown]
# These are sums over the tokens of a response, in nats. In every source the chosen responses are likelier on average. The gap is largest in Orca, 1.8 nats, and smallest in HH, 0.7. The order of the arms above goes by the share of pairs, and is the same here.
#
# ## Rows by arm and draw
#
# For the pages with answers: the rows of a design by arm and draw. Rows of other pairs, or of another S, are not among them.
#
# `arrange` makes the plan again from the rows, and looks up each cell by its key. So it also knows what is missing, and an arm that shares its run with another one finds it. As long as the search is not complete, no arm has a row here.

# %%
#| export
@dataclass
class Found:
    "What is there of a design."
    S: dict = None         # its row
    rows: dict = field(default_factory=dict)    # arm -> draw -> row
    chosen: dict = field(default_factory=dict)  # arm -> settings, once the search is complete
    missing: int = None    # cells that are planned and not there, or of a draw that is left out; None: nothing is there
    origin: list = field(default_factory=list)  # cards and commits
    left_out: dict = field(default_factory=dict) # draw -> what it mixes, of `mixed_draws`

    def draws_of(
        self,
        asked: pd.DataFrame, # questions, with arms a and b
    ) -> set:
        "The draws that have all arms of the questions."
        arms = {*asked["a"], *asked["b"]}
        return set.intersection(*[set(self.rows.get(arm, {})) for arm in arms])

def arrange(
    name: str,    # of the design
    rows: list,   # of `read_results`
) -> Found:
    """The rows of a design. Where they are about several S or several sets of pairs, those with most rows.
    A draw whose arms were made on several cards, or in several precisions, is left out and named."""
    if not rows: return Found()
    design = design_of(name, pd.Series([row["about"] for row in rows]).mode()[0])
    by_key = {row["key"]: row for row in rows}
    planned = design.plan(rows)
    there = [by_key[cell.key] for cell in planned if cell.key in by_key]
    origin = sorted({f"{row['card']}, commit {row['commit']}" for row in there})
    found = Found(by_key.get(design.start.key), missing=len(planned) - len(there), origin=origin)
    if found.S is None or any(cell.key not in by_key for cell in design.search(found.S)): return found

    found.chosen = design.chosen(by_key)
    for arm, cells in design.cells(by_key).items():
        found.rows[arm] = {draw: by_key[cell.key] for draw, cell in cells.items() if cell.key in by_key}
    found.left_out = mixed_draws(found.rows)
    for draw in found.left_out:
        found.missing += sum(by_draw.pop(draw, None) is not None for by_draw in found.rows.values())
    return found


# %% [markdown]
# We give it the nine rows of the rehearsal, then only the first four, then none.

# %%
seen = arrange("rehearsal", at_once)
assert seen.missing == 0
assert sorted(seen.rows["sDPO"]) == [0, 1]
assert arrange("rehearsal", at_once[:4]).missing == 5
assert arrange("rehearsal", []).missing is None
{arm: list(by_draw) for arm, by_draw in seen.rows.items()}

# %% [markdown]
# Every arm has both draws. S is not in this table; its one row is `seen.S`. With four rows, five cells are missing. With no row nothing can be said, not even what is missing, and `missing` is `None`.
#
# What if the last row had been made on a card, and those before it on a processor?

# %%
on_a_card = [*at_once[:-1], at_once[-1] | dict(card="H100")]
mixed = arrange("rehearsal", on_a_card)
assert all(list(by_draw) == [0] for by_draw in mixed.rows.values())
assert mixed.missing == 4
list(mixed.left_out)

# %% [markdown]
# Then draw 1 is left out, and its four rows count as missing. Take the lines of one of the two machines out of the file, and they are made again.
#
# ## What you now have
#
# - `prepare_ids`: pairs with roles, as a small file of ids.
# - `run_real_cell`: an arm in a draw, measured after every stage; `replies_of`: what it then writes.
# - `run_real`: an experiment that goes on for some minutes; `arrange`: its rows by arm and draw.
#
# ## Questions to test yourself
#
# 1. Why is the lot of a pair drawn by its prompt, and not by the pair?
#
#    <details><summary>Answer</summary>
#
#    Two pairs with one prompt would otherwise fall on both sides now and then, and a model would be measured on a prompt that it was trained on.
#
#    </details>
# 2. Why may two arms share a run?
#
#    <details><summary>Answer</summary>
#
#    The key holds what is done: stages, settings, draw, pairs, S. If the search gives sDPO the settings of DPO, *sDPO at DPO's settings* is sDPO itself, and is not trained twice.
#
#    </details>
#
# ## Try this
#
# - Train the arm `DPO` of draw 0 twice, with `every=2` in `train_in_memory` the second time (`from sdpo_nb.in_memory import train_in_memory`). Which losses differ?
#
#   <details><summary>What you should see</summary>
#
#   The first two are equal. From the third on the reference is a model that has moved; the loss of the third step is $\ln 2$ again.
#
#   </details>
