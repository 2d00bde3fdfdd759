"The checks of the course: no right answer is accused, no wrong one passes, each mistake has its name, and what is said can be found in the book."
import contextlib, copy, io, itertools, json, math, re
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sdpo_nb.checks as checks
import sdpo_nb.loss
import sdpo_nb.mistakes as mistakes
from sdpo_nb.checks import EXERCISES, LIMIT, PREDICTIONS, CheckFailed, diagnose, draw_batches, find_mistakes, foreign_name, report, score
from sdpo_nb.mistakes import _answer, _diagnosis, _is_at_edge
from sdpo_nb.loss import dpo_loss as theirs
from sdpo_nb.loss import certificate as their_certificate

BOOK = Path(__file__).parent.parent / "nbs"
SINGLES = [(name, mistake) for name, exercise in EXERCISES.items() for mistake in exercise.says]
TABLE = {   # of the specification
    "sequence_logps": "no_shift late mask_unshifted mean all_tokens no_eos probs raw vocab_dim half detached unstable",
    "dpo_loss": "no_beta outside half_beta inverse swapped no_ref plus_ref no_minus no_log unstable detached",
    "gradient": "no_beta no_minus other_side mean", "ipo": "no_half times_beta no_ref abs dpo", "predictions": " ".join(PREDICTIONS),
    "boundary": "prompt_length chosen_only characters off_by_one", "accuracy": "strict weak no_ref worse soft nan",
    "by_prompt": "by_pair last_pair singles_dropped any", "partition": "lost twice ascending ties unsorted order uneven count",
    "accumulation": "mean_of_means sum_of_means sum last_only lost too_many kept clears",
    "reference_table": "dropout left_in_eval grad random_state by_position half",
    "fp16_step": "no_scale clip_scaled direct no_update no_clip no_zero_grad",
    "train": "moving_reference swapped_table summed no_zero_grad eval_mode bf16_weights shuffled last_batch_lost",
    "stepwise": "S_trained live fixed lag table from_S chunks returned", "certificate": "sign log_of_loss no_beta no_ref overflow",
    "first_loss": "mean_inside no_beta swapped", "experiment": "no_baseline picked_on_test unpaired one_seed",
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check_of(name): return getattr(checks, f"check_{name}")


def heard(check, f, seed=1):
    "The exception of a check, or None where it passes."
    with contextlib.redirect_stdout(io.StringIO()):
        try: check(f, seed=seed)
        except CheckFailed as e: return e


def headings():
    "chapter -> the headings of its notebook"
    found = {}
    for path in BOOK.glob("[0-9][0-9]_*.ipynb"):
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown"]
        lines = "\n".join("".join(c["source"]) for c in cells).splitlines()
        found[path.name[:2]] = {re.sub(r"^#+ ", "", line).removesuffix(" (you may skip this)") for line in lines if re.match(r"#+ ", line)}
    return found


def assert_can_be_read(message, book=headings()):
    assert len(message) <= LIMIT, message
    place = re.search(r'Read chapter (\d\d), "(.*?)"\.', message)
    assert place, f"no place to read, or it was cut off: {message}"
    chapter, heading = place.groups()
    assert chapter in book, message
    assert heading in book[chapter], f"chapter {chapter} has no heading {heading!r}"
    assert "..." not in message.replace("`...`", ""), message


# ---- right answers, each in four ways ----------------------------------------------------------------------------------

def logps_by_rows(logits, ids, mask):
    out = []
    for row, tokens, m in zip(logits, ids, mask):
        at = m.nonzero()[:, 0]
        out.append(-F.cross_entropy(row[at - 1].float(), tokens[at], reduction="sum"))
    return torch.stack(out)

def logps_ce(logits, ids, mask):
    nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return -(nll * mask[:, 1:]).sum(-1)

def logps_labels(logits, ids, mask):
    labels = ids.masked_fill(~mask, -100)[:, 1:]
    x = logits[:, :-1].to(torch.float32)
    each = -F.cross_entropy(x.reshape(-1, x.shape[-1]), labels.reshape(-1), ignore_index=-100, reduction="none")
    return each.view(labels.shape).sum(1)

def logps_lse(logits, ids, mask):
    logits = logits.double()
    picked = logits[:, :-1].gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2) - torch.logsumexp(logits[:, :-1], -1)
    return torch.where(mask[:, 1:], picked, torch.zeros_like(picked)).sum(1)

def dpo_a(c, r, rc, rr, beta): return -F.logsigmoid(beta * ((c - r) - (rc - rr)))
def dpo_b(c, r, rc, rr, beta): return F.softplus(beta * (rc - c) - beta * (rr - r))
def dpo_c(c, r, rc, rr, beta): return dpo_a(*(x.float() for x in (c, r, rc, rr)), beta)
def dpo_d(c, r, rc, rr, beta): return torch.logaddexp(torch.zeros_like(c), beta * (r - rr) - beta * (c - rc))

def slope_a(t, r, beta): return -beta * torch.sigmoid(-beta * (t - r))
def slope_b(t, r, beta): return -beta / (1 + torch.exp(beta * (t - r)))
def slope_c(t, r, beta): return beta * (torch.sigmoid(beta * (t.float() - r.float())) - 1)
def slope_d(t, r, beta): return torch.stack([-beta / (1 + (beta * (a - b)).exp()) for a, b in zip(t, r)])

def ipo_a(t, r, beta): return (t - r - 1 / (2 * beta)) ** 2
def ipo_b(t, r, beta): return F.mse_loss(t - r, torch.full_like(t, 0.5 / beta), reduction="none")
def ipo_c(t, r, beta): return (t - r).pow(2) - (t - r) / beta + 1 / (4 * beta**2)
def ipo_d(t, r, beta): return torch.square((2 * beta * (t - r) - 1) / (2 * beta))

def boundary_a(p, c, r):
    n = 0
    while n < min(len(p), len(c), len(r)) and p[n] == c[n] == r[n]: n += 1
    return n
def boundary_b(p, c, r): return next((i for i, t in enumerate(zip(p, c, r)) if len(set(t)) > 1), min(map(len, (p, c, r))))
def boundary_c(p, c, r):
    def lcp(a, b):
        same = [x == y for x, y in zip(a, b)]
        return same.index(False) if False in same else len(same)
    return min(lcp(p, c), lcp(p, r))
def boundary_d(p, c, r):
    n = min(len(p), len(c), len(r)); p, c, r = (torch.tensor(x[:n]) for x in (p, c, r))
    return ((p == c) & (p == r)).cumprod(0).sum()

def acc_a(g, r): return torch.where((g - r).isnan(), math.nan, (0.5 + 0.5 * (g - r).sign()).float())
def acc_b(g, r): return ((g > r) + 0.5 * (g == r)) + 0 * (g - r)
def acc_c(g, r): return torch.tensor([math.nan if a != a or b != b else 1. if a > b else 0.5 if a == b else 0. for a, b in zip(g.tolist(), r.tolist())])
def acc_d(g, r): return torch.heaviside(g - r, torch.tensor(0.5, dtype=g.dtype)).where(~(g - r).isnan(), math.nan)

def prompt_a(right, ids): return pd.Series(right.numpy()).groupby(ids.numpy()).mean().mean()
def prompt_b(right, ids): return sum(right[ids == i].mean() for i in ids.unique()) / len(ids.unique())
def prompt_c(right, ids):
    _, where, n = ids.unique(return_inverse=True, return_counts=True)
    return (torch.zeros(len(n)).index_add(0, where, right.float()) / n).mean()
def prompt_d(right, ids):
    seen = {}
    for x, i in zip(right, ids): seen.setdefault(int(i), []).append(float(x))
    return sum(sum(v) / len(v) for v in seen.values()) / len(seen)

def part_a(accuracy, sizes, T):
    order = sorted(range(len(sizes)), key=lambda i: (-accuracy[i], i))
    per = [[sum(sizes[:i]) + j for j in range(sizes[i])] for i in order]
    if T == len(sizes): return per
    flat = [x for s in per for x in s]; n = len(flat)
    out, at = [], 0
    for t in range(T):
        k = n // T + (t < n % T)
        out.append(flat[at:at + k]); at += k
    return out
def part_b(accuracy, sizes, T):
    ends = torch.tensor(sizes).cumsum(0).tolist()
    order = sorted(range(len(sizes)), key=accuracy.__getitem__, reverse=True)
    per = [torch.arange(ends[i] - sizes[i], ends[i]) for i in order]
    return [p.tolist() for p in (per if T == len(sizes) else torch.cat(per).tensor_split(T))]
def part_c(accuracy, sizes, T):
    import numpy as np
    order = np.argsort(-np.array(accuracy), kind="stable"); starts = np.cumsum([0, *sizes])
    per = [np.arange(starts[i], starts[i + 1]) for i in order]
    return per if T == len(sizes) else np.array_split(np.concatenate(per), T)
def part_d(accuracy, sizes, T): return tuple(map(tuple, part_a(accuracy, sizes, T)))

def acc_grad_a(model, pairs, loss_of, size):
    for i in range(0, len(pairs), size): (loss_of(model, pairs[i:i + size]).sum() / len(pairs)).backward()
def acc_grad_b(model, pairs, loss_of, size):
    total = 0.
    for part in (pairs[i:i + size] for i in range(0, len(pairs), size)):
        loss = loss_of(model, part).mean() * (len(part) / len(pairs)); loss.backward(); total += loss.item()
    return total
def acc_grad_c(model, pairs, loss_of, size):
    for pair in pairs: loss_of(model, [pair]).div(len(pairs)).sum().backward()
def acc_grad_d(model, pairs, loss_of, size):
    rest, n = list(pairs), len(pairs)
    while rest:
        part, rest = rest[:size], rest[size:]
        losses = loss_of(model, part); losses.backward(torch.full_like(losses, 1 / n))

def table_a(model, pairs, score):
    mode = model.training; model.eval()
    with torch.no_grad(): c, r = score(model, pairs)
    model.train(mode)
    return {p["key"]: (a, b) for p, a, b in zip(pairs, c.tolist(), r.tolist())}
def table_b(model, pairs, score):
    mode, out = model.training, {}; model.eval()
    with torch.inference_mode():
        for p in pairs:
            c, r = score(model, [p]); out[p["key"]] = [c.item(), r.item()]
    model.train(mode)
    return out
@torch.no_grad()
def table_c(model, pairs, score):
    mode = model.training
    try: return {p["key"]: numbers for p, *numbers in zip(pairs, *score(model.eval(), pairs))}
    finally: model.train(mode)
def table_d(model, pairs, score):
    modes = {m: m.training for m in model.modules()}; model.train(False)
    with torch.no_grad(): rows = torch.stack(score(model, pairs), 1).double()
    for m, t in modes.items(): m.training = t
    return dict(zip([p["key"] for p in pairs], rows.tolist()))

def step_a(loss, parameters, optimizer, scaler, clip):
    optimizer.zero_grad(); scaler.scale(loss).backward(); scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(parameters, clip); scaler.step(optimizer); scaler.update()
def step_b(loss, parameters, optimizer, scaler, clip):
    scaler.scale(loss).backward(); scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, max_norm=clip); scaler.step(optimizer); scaler.update(); optimizer.zero_grad(set_to_none=False)
    return norm
def step_c(loss, parameters, optimizer, scaler, clip):
    for p in parameters: p.grad = None
    scaler.scale(loss).backward(); scaler.unscale_(optimizer)
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    for p in parameters: p.grad *= min(1., clip / (norm.item() + 1e-6))
    scaler.step(optimizer); scaler.update()
def step_d(loss, parameters, optimizer, scaler, clip):
    (scaler.get_scale() * loss).backward(); scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(parameters, clip); scaler.step(optimizer); scaler.update(); optimizer.zero_grad()

def train_a(model, pairs, table, beta, lr, batch):
    model.float().train(); opt, losses = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.), []
    for i in range(0, len(pairs), batch):
        part = pairs[i:i + batch]; c, r = score(model, part); rc, rr = torch.tensor([table[p["key"]] for p in part]).T
        loss = -F.logsigmoid(beta * (c - r - rc + rr)).mean(); opt.zero_grad(); loss.backward(); opt.step(); losses.append(loss.item())
    return losses
def train_b(model, pairs, table, beta, lr, batch):     # without score: a row at a time
    model = model.train().to(torch.float32); opt, out = torch.optim.Adam(model.parameters(), lr), []
    def logp(x, y):
        row = torch.tensor([list(x) + list(y)]); scores = model(input_ids=row).logits[0].log_softmax(-1)
        return scores[len(x) - 1:-1].gather(1, torch.tensor(y)[:, None]).sum()
    for i in range(0, len(pairs), batch):
        losses = []
        for p in pairs[i:i + batch]:
            c, r = (logp(p["prompt_ids"], p[f"{side}_ids"]) for side in ("chosen", "rejected")); rc, rr = table[p["key"]]
            losses.append(F.softplus(-beta * (c - r - (rc - rr))))
        loss = sum(losses) / len(losses); loss.backward(); opt.step(); opt.zero_grad(); out.append(loss)
    return out
def train_c(model, pairs, table, beta, lr, batch):     # every pair a backward pass of its own
    model.float(); model.train(); opt = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0); losses = []
    for part in [pairs[i:i + batch] for i in range(0, len(pairs), batch)]:
        total = 0.
        for p in part:
            c, r = score(model, [p]); ref = table[p["key"]][0] - table[p["key"]][1]
            loss = -F.logsigmoid(beta * (c - r - ref)).sum() / len(part); loss.backward(); total += loss.item()
        opt.step(); opt.zero_grad(); losses.append(total)
    return losses
def train_d(model, pairs, table, beta, lr, batch):     # in fp64
    model.train(); model.double(); opt = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0); losses = []
    for i in range(math.ceil(len(pairs) / batch)):
        part = pairs[i * batch:(i + 1) * batch]; c, r = score(model, part); ref = torch.tensor([table[p["key"]] for p in part]).double()
        z = beta * (c - r) - beta * (ref[:, 0] - ref[:, 1]); loss = torch.log1p(torch.exp(-z)).mean()
        loss.backward(); opt.step(); opt.zero_grad(); losses.append(loss.detach())
    return losses

def stages_a(S, chunks, score, train, copy):
    M = copy(S)
    for D in chunks: train(M, D, score(M, D))
    return M
def stages_b(S, chunks, score, train, copy):
    models = [copy(S)]
    for D in chunks:
        reference = models[-1]; target = copy(reference); train(target, D, score(reference, D)); models.append(target)
    return models[-1]
def stages_c(S, chunks, score, train, copy):
    if not chunks: return copy(S)
    M = stages_c(S, chunks[:-1], score, train, copy); table = score(M, chunks[-1]); train(M, chunks[-1], table)
    return M
def stages_d(S, chunks, score, train, copy):
    import copy as c
    reference = c.deepcopy(S)
    for t in range(len(chunks)):
        policy = copy(reference); table = score(copy(reference), chunks[t]); train(policy, chunks[t], table); reference = policy
    return copy(reference)

def bound_a(loss, ref, beta): return ref - (loss + math.log(-math.expm1(-loss))) / beta
def bound_b(loss, ref, beta): return ref - (loss + torch.log1p(-torch.exp(torch.tensor(-loss, dtype=torch.float64)))) / beta
def bound_c(loss, ref, beta): return ref - (math.log(math.expm1(loss)) if loss < 30 else loss) / beta
def bound_d(loss, ref, beta): return torch.tensor(ref + (-loss - math.log(1 - math.exp(-loss))) / beta, dtype=torch.float64)

def first_a(s, r, beta): return -F.logsigmoid(beta * (s - r)).mean()
def first_b(s, r, beta): return sum(math.log1p(math.exp(-beta * (a - b))) for a, b in zip(s.tolist(), r.tolist())) / len(s)
def first_c(s, r, beta): return float(F.softplus(beta * (r - s).float()).sum() / r.numel())
def first_d(s, r, beta): return F.binary_cross_entropy_with_logits(beta * (s - r), torch.ones_like(s))

WAYS = dict(
    sequence_logps=(logps_by_rows, logps_ce, logps_labels, logps_lse), dpo_loss=(dpo_a, dpo_b, dpo_c, dpo_d), gradient=(slope_a, slope_b, slope_c, slope_d),
    ipo=(ipo_a, ipo_b, ipo_c, ipo_d), boundary=(boundary_a, boundary_b, boundary_c, boundary_d), accuracy=(acc_a, acc_b, acc_c, acc_d),
    by_prompt=(prompt_a, prompt_b, prompt_c, prompt_d), partition=(part_a, part_b, part_c, part_d), accumulation=(acc_grad_a, acc_grad_b, acc_grad_c, acc_grad_d),
    reference_table=(table_a, table_b, table_c, table_d), fp16_step=(step_a, step_b, step_c, step_d), train=(train_a, train_b, train_c, train_d),
    stepwise=(stages_a, stages_b, stages_c, stages_d), certificate=(bound_a, bound_b, bound_c, bound_d), first_loss=(first_a, first_b, first_c, first_d),
)
SEEDS = {name: range(200) for name in WAYS} | dict(train=(0, 1, 2, 114))     # two stages are trained for each; 114 once accused AdamW's own weight decay


@pytest.mark.parametrize("name", WAYS)
def test_right_answers_are_never_accused(name):
    assert len(WAYS[name]) == 4
    for f, seed in itertools.product(WAYS[name], SEEDS[name]):
        assert heard(check_of(name), f, seed) is None, f"{f.__name__}, seed {seed}: {heard(check_of(name), f, seed)}"


def by_the_book(measure, betas=(0.3, 0.9), pick=max, method="DPO", split="validation", seeds=lambda seed: (0,), s=("S", math.nan, 0), told="validation",
                rewards_of="test", half=lambda s, n: 1.96 * s / math.sqrt(n), digits=None):
    "An experiment; every setting is one that somebody may get wrong."
    def value(beta, seed): return sum(sum(measure(method, beta, checks.STAGES[method], one, split)) for one in seeds(seed))
    rows = []
    for seed in (0, 1):
        best = pick(betas, key=lambda beta: value(beta, seed))
        for row in (s, ("DPO", best, 1), ("sDPO", best, 3), ("DPO", best / 3, 1)):
            rewards = measure(*row, seed, rewards_of)
            if row[0] == "S": base = rewards
            d = torch.tensor(rewards) - torch.tensor(base); middle, h = d.mean().item(), half(d.std().item(), len(d))
            low, high = (middle - h, middle + h) if digits is None else (round(middle - h, digits), round(middle + h, digits))
            rows.append(dict(method=row[0], beta=row[1], stages=row[2], seed=seed, picked_on=told, rewards=rewards, low=low, high=high))
    return pd.DataFrame(rows)


@pytest.mark.parametrize("mistake,settings", dict(
    on_test=dict(split="test"), worst=dict(pick=min), by_sdpo=dict(method="sDPO"), each_seed=dict(seeds=lambda seed: (seed,)), both_seeds=dict(seeds=lambda seed: (0, 1)),
    not_picked=dict(betas=(0.9,)), picked_on=dict(told="val"), picked_on_test=dict(told="test"), rewards_validation=dict(rewards_of="validation"),
    std_by_n=dict(half=lambda s, n: 1.96 * s * math.sqrt((n - 1) / n) / math.sqrt(n)), no_root=dict(half=lambda s, n: 1.96 * s),
    rounded=dict(digits=3), interval=dict(half=lambda s, n: 2.02 * s / math.sqrt(n))).items())
def test_what_an_experiment_measures_is_watched(mistake, settings):
    "The table says 'validation', whatever was done; so the check brings a measure of its own."
    for seed in range(3):
        e = heard(checks.check_experiment, lambda measure: by_the_book(measure, **settings), seed)
        assert e is not None and e.mistakes == (mistake,), e
        assert_can_be_read(str(e))


def test_an_experiment_of_another_form_is_told_what_is_wanted():
    def but(**columns): return lambda measure: by_the_book(measure).assign(**columns)
    def told(f): return str(heard(checks.check_experiment, f))
    assert "rewards must be a list" in told(lambda measure: by_the_book(measure).assign(rewards=lambda runs: runs["rewards"].map(lambda r: sum(r) / len(r))))
    assert "S has 1 stages; 0 are asked for" in told(but(stages=lambda runs: runs["stages"].replace({0: 1})))
    assert "sDPO has 2 stages; 3 are asked for" in told(but(stages=lambda runs: runs["stages"].replace({3: 2})))
    assert "for seed 0 there are 2 runs of S" in told(lambda measure: pd.concat([by_the_book(measure)] * 2))
    assert "picked_on must be" in told(but(picked_on=lambda runs: runs["picked_on"].where(runs["method"] != "S", None)))
    assert "It was called with measure" in told(lambda measure: {}["S"])
    assert re.search("stops with TypeError: .*It was called with measure", told(lambda: by_the_book(max)))      # nobody could see what it did
    assert 'not \'valid\'' in told(lambda measure: by_the_book(measure, split="valid"))


def test_right_predictions_and_experiments_in_four_ways():
    digits = [{k: round(v, n) for k, v in PREDICTIONS.items()} for n in (3, 4)]
    for answers in (PREDICTIONS, *digits, {k: torch.tensor(v) for k, v in PREDICTIONS.items()}, lambda: PREDICTIONS):
        assert heard(checks.check_predictions, answers) is None
    runs = checks._experiment()
    swapped = runs.sample(frac=1, random_state=0)
    t_interval = runs.copy()                                   # Student's t instead of 1.96
    middle, half = (runs["low"] + runs["high"]) / 2, (runs["high"] - runs["low"]) / 2
    half *= {9: 2.306}[len(runs["rewards"][0])] / 1.96         # of 8 degrees of freedom
    t_interval["low"], t_interval["high"] = middle - half, middle + half
    arrays = runs.assign(rewards=[torch.tensor(r) for r in runs["rewards"]])
    for answer in (runs, swapped, t_interval, arrays):
        assert heard(checks.check_experiment, answer) is None
    def of_a_function(measure):
        "The same four ways, and S measured in any way."
        runs = by_the_book(measure)
        for way in (runs, runs.sample(frac=1, random_state=1), runs.assign(rewards=[torch.tensor(r) for r in runs["rewards"]])): yield way
        yield by_the_book(measure, s=("S", 0.0, 0))
        yield by_the_book(measure, digits=4)
    for way, seed in itertools.product(range(5), range(5)):
        assert heard(checks.check_experiment, lambda measure: list(of_a_function(measure))[way], seed) is None


# ---- wrong answers -----------------------------------------------------------------------------------------------------

def test_the_catalogue_holds_what_was_asked_for():
    assert set(TABLE) == set(EXERCISES)
    assert len(EXERCISES) == 17
    for name, mistakes in TABLE.items():
        assert set(mistakes.split()) <= set(EXERCISES[name].says), name
        assert callable(check_of(name))


@pytest.mark.parametrize("name,mistake", SINGLES)
def test_every_mistake_is_named_as_itself(name, mistake):
    exercise = EXERCISES[name]
    with pytest.raises(CheckFailed) as e: diagnose(exercise, partial(exercise.crooked, wrong=(mistake,)), seed=2)
    assert e.value.mistakes == (mistake,)
    assert_can_be_read(str(e.value))
    assert exercise.says[mistake] in str(e.value)


@pytest.mark.parametrize("name", EXERCISES)
def test_no_pair_passes(name):
    exercise = EXERCISES[name]
    if exercise.draw is None: return                           # edges only: tested one by one above
    for seed in (0, 1):
        batches = draw_batches(exercise, seed)[:1 if name == "train" else None]
        right = [_answer(exercise, exercise.crooked, b) for b in batches]
        for two in itertools.combinations(exercise.says, 2):
            f = partial(exercise.crooked, wrong=two)
            try: seen = [_answer(exercise, f, b) for b in batches]
            except Exception: continue                         # the student hears that it stops
            passes = all(map(checks.alike, seen, right)) and not any(_is_at_edge(test, f, seed) for test in exercise.edges.values())
            assert not passes, two
        if name == "train": return


@pytest.mark.parametrize("name", [name for name, e in EXERCISES.items() if e.draw and name != "train"])
def test_a_pair_is_named_by_its_own_or_by_fewer(name):
    "What is said of two mistakes gives exactly the same numbers; and it fits into the message."
    exercise, by_both = EXERCISES[name], 0
    batches = draw_batches(exercise, 3)
    for two in itertools.combinations(exercise.mistakes, 2):
        try: seen = [_answer(exercise, partial(exercise.crooked, wrong=two), b) for b in batches]
        except Exception: continue
        found = find_mistakes(exercise, batches, seen)
        assert 1 <= len(found) <= 2
        by_both += found == two
        assert_can_be_read(str(_diagnosis(exercise, found, 999_999)))
    assert by_both >= 2


def test_every_two_sentences_fit_into_a_message():
    for exercise in EXERCISES.values():
        for two in itertools.permutations(exercise.says, 2):
            if exercise.draw is None: continue
            assert_can_be_read(str(_diagnosis(exercise, two, 999_999)))


@pytest.mark.parametrize("name", EXERCISES)
def test_a_stub_is_nothing_yet(name):
    def stub(*args): ...
    def ellipsis(*args): return ...
    def with_words(*args):
        "What it should do."
        ...
    for f in (..., None, stub, ellipsis, with_words, lambda *args: None):
        e = heard(check_of(name), f)
        assert "returns nothing yet" in str(e), (f, e)
        assert e.mistakes == ("empty",)
        assert_can_be_read(str(e))


@pytest.mark.parametrize("name", EXERCISES)
def test_a_forgotten_return_is_not_called_an_empty_answer(name):
    def forgets(*args): found = len(args)
    e = heard(check_of(name), forgets)
    assert "nothing yet" not in str(e)
    assert ("does nothing" if name in ("accumulation", "fp16_step") else "the `return` is missing or not reached on every path") in str(e), e
    assert e.mistakes == ("empty",)
    assert_can_be_read(str(e))


def test_a_hat_for_a_power_is_an_error_with_a_hint():
    "torch raises NotImplementedError there, which once passed for an empty answer; torch 2.6 raises RuntimeError."
    def tensor_hat(t, r, beta): return (t - r - 1 / (2 * beta))^2
    def float_hat(t, r, beta): return (t - r - 1 / (2 * beta^2)) ** 2
    def not_implemented(*args): raise NotImplementedError
    for f, words in ((tensor_hat, ("NotImplementedError: ", "RuntimeError: ")), (float_hat, ("TypeError: ",))):
        e = heard(checks.check_ipo, f)
        assert any(f"stops with {word}" in str(e) for word in words) and "a power is `**`" in str(e), e
        assert e.mistakes == ("stopped",)
        assert_can_be_read(str(e))
    e = heard(checks.check_ipo, not_implemented)
    assert "stops with NotImplementedError. " in str(e) and "**" not in str(e)


def test_an_empty_prediction_is_nothing_yet():
    e = heard(checks.check_predictions, PREDICTIONS | dict(weight=...))
    assert "weight is nothing yet" in str(e)
    assert 'Read chapter 03, "Its gradient"' in str(e)
    assert_can_be_read(str(e))
    e = heard(checks.check_predictions, PREDICTIONS | dict(loss=..., settles=...))
    assert "loss, settles are nothing yet" in str(e)
    without = {key: value for key, value in PREDICTIONS.items() if key != "settles"}
    for answers in (without, PREDICTIONS | dict(settles=...)):
        e = heard(checks.check_predictions, answers)
        assert "settles is" in str(e) and 'Read chapter 03, "Label smoothing"' in str(e)
        assert_can_be_read(str(e))


def test_a_prediction_in_quotes_or_with_two_digits_is_told_so():
    e = heard(checks.check_predictions, PREDICTIONS | dict(first_loss="math.log(2)"))
    assert "first_loss is a str, not a number; leave out the quotes" in str(e) and e.mistakes == ("form",)
    e = heard(checks.check_predictions, PREDICTIONS | dict(loss=0.13, first_loss=0.69))
    assert "loss is near; one percent is allowed, so give three digits" in str(e) and e.mistakes == ("loss_digits",)


def test_all_wrong_predictions_are_named_at_once():
    e = heard(checks.check_predictions, PREDICTIONS | dict(loss=5., settles=math.log(9), farther_sgd=1))
    assert e.mistakes == ("settles_no_beta",)
    assert "settles: beta is missing" in str(e) and "Wrong, too: loss, farther_sgd. " in str(e), e
    e = heard(checks.check_predictions, dict.fromkeys(PREDICTIONS, 50.))
    assert "Wrong, too: loss, weight, settles, nearer, farther_sgd, farther_adam. " in str(e), e
    assert_can_be_read(str(e))
    e = heard(checks.check_predictions, PREDICTIONS | dict(loss=5.))
    assert "Wrong, too" not in str(e)


def test_mistakes_of_students_that_were_not_known_at_first():
    def named(name, f, seed=1): return heard(check_of(name), f, seed).mistakes
    def plus_ce(logits, ids, mask): return -logps_ce(logits, ids, mask)
    def late_cut(logits, ids, mask):
        each = logits[:, 1:].float().log_softmax(-1).gather(-1, ids[:, :-1, None])[..., 0]
        return (each * mask[:, 1:]).sum(1)
    assert named("sequence_logps", plus_ce) == ("negative",)
    assert named("sequence_logps", late_cut) == ("late_cut",)
    assert named("dpo_loss", lambda c, r, rc, rr, beta: -F.logsigmoid(beta * (c - r) - (rc - rr))) == ("one_beta",)
    assert named("dpo_loss", lambda c, r, rc, rr, beta: -F.logsigmoid(beta * ((c - rc) - (rr - r)))) == ("rejected_added",)
    assert named("gradient", lambda a, b, beta: -beta * torch.sigmoid(-(a - b))) == ("no_beta_inside",)
    assert named("gradient", lambda a, b, beta: -beta * torch.sigmoid(-beta * a)) == ("no_ref",)
    assert named("gradient", lambda a, b, beta: -beta * torch.sigmoid(beta * (a - b)) * torch.sigmoid(-beta * (a - b))) == ("no_log",)
    assert named("ipo", lambda a, b, beta: (a - b - 1/2*beta) ** 2) == ("no_brackets",)
    assert named("ipo", lambda a, b, beta: (a - b + 1 / (2 * beta)) ** 2) == ("plus",)
    assert named("ipo", lambda a, b, beta: F.relu(1 / (2 * beta) - (a - b)) ** 2) == ("hinge",)
    for seed, small in itertools.product(range(20), (1e-4, 1e-8, 1e-12)):        # whatever the cut, and whether the batches show it or not
        f = lambda c, r, rc, rr, beta: -torch.sigmoid(beta * ((c - r) - (rc - rr))).clamp(small).log()
        assert named("dpo_loss", f, seed) == ("clamped",)
    assert "Try" not in str(heard(checks.check_dpo_loss, f))      # the example comes out right there
    constant = lambda c, *rest: torch.full_like(c, 0.7)
    assert named("dpo_loss", constant) == named("dpo_loss", lambda *a: 2 * dpo_a(*a)) == ("unknown",)


def test_the_example_by_hand_is_right_and_fits():
    four = [torch.tensor([v]).double() for v in (-2.0, -3.0, -2.5, -2.9)]
    two = [torch.tensor([v]).double() for v in (1.0, 0.4)]
    for name, inputs in (("dpo_loss", four), ("gradient", two), ("ipo", two)):
        assert EXERCISES[name].by_hand == f"gain 0.6, beta 0.5 give {EXERCISES[name].crooked(*inputs, 0.5).item():.3g}", name
    def right(name, *inputs): return EXERCISES[name].crooked(*map(torch.tensor, inputs))
    assert f"{right('first_loss', [1., 3.], [1., 1.], 0.5):.3f}" == "0.503" and "(1, 3), (1, 1), beta 0.5 give 0.503" == EXERCISES["first_loss"].by_hand
    assert f"{EXERCISES['certificate'].crooked(0.5, 2, 0.1):.2f}" == "6.33" and EXERCISES["certificate"].by_hand == "loss 0.5, reference 2, beta 0.1 give 6.33"
    assert right("accuracy", [2.5, -1., 3.], [1., 0.5, 3.]).tolist() == [1, 0, 0.5] and EXERCISES["accuracy"].by_hand == "(2.5, -1, 3), (1, 0.5, 3) give (1, 0, 0.5)"
    assert right("by_prompt", [1., 1., 1., 0.], [7, 7, 7, 3]) == 0.5 and EXERCISES["by_prompt"].by_hand == "[1, 1, 1, 0], [7, 7, 7, 3] give 0.5"
    assert checks._boundary([5, 6, 7], [5, 6, 9, 2], [5, 6, 7, 4, 2]) == 2 and EXERCISES["boundary"].by_hand == "[5, 6, 7], [5, 6, 9, 2], [5, 6, 7, 4, 2] give 2"
    assert checks._partition([0.6, 0.9], [3, 2], 2) == [[3, 4], [0, 1, 2]] and EXERCISES["partition"].by_hand == "accuracy [0.6, 0.9], sizes [3, 2], T 2 give [[3, 4], [0, 1, 2]]"
    with_example = [name for name, exercise in EXERCISES.items() if exercise.by_hand]
    assert len(with_example) == 9
    for name in with_example:
        if name == "partition": continue                       # its answers are lists; tested below
        e = heard(check_of(name), lambda *all: 3 * WAYS[name][0](*all) + 3)
        assert e.mistakes == ("unknown",) and str(e).endswith(f". Try: {EXERCISES[name].by_hand}.") and len(str(e)) <= LIMIT, e


def test_rows_are_called_rows():
    assert "First difference: row 0 of 3" in str(heard(checks.check_sequence_logps, lambda *all: 2 * logps_ce(*all)))
    assert "one per row" in str(heard(checks.check_sequence_logps, lambda *all: logps_ce(*all).mean()))
    assert "First difference: pair 0 of 3" in str(heard(checks.check_dpo_loss, lambda *all: 2 * dpo_a(*all)))


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exception_is_named_with_its_class(name):
    def breaks(*args): return {}["gamma of the policy, a key with a long name" * 9]
    e = heard(check_of(name), breaks)
    assert "stops with KeyError: " in str(e)
    assert e.mistakes == ("stopped",)
    assert_can_be_read(str(e).replace("...", ""))


def test_an_exception_with_nothing_to_say_and_one_that_leaves():
    def silent(*args): raise AssertionError
    def leaves(*args): raise SystemExit(3)
    assert "stops with AssertionError" in str(heard(checks.check_ipo, silent))
    assert "stops with SystemExit: 3" in str(heard(checks.check_ipo, leaves))


@pytest.mark.parametrize("name", EXERCISES)
def test_what_is_no_function_is_told_so(name):
    e = heard(check_of(name), 3.5)
    assert e.mistakes == ("form",)
    assert "float" in str(e)
    assert_can_be_read(str(e))


@pytest.mark.parametrize("name,right", [("sequence_logps", logps_ce), ("dpo_loss", dpo_a), ("gradient", slope_a), ("ipo", ipo_a), ("accuracy", acc_a)])
def test_broadcasting_and_other_shapes_are_named(name, right):
    says = {
        "broadcast": lambda *a: right(*a)[:, None] + 0 * right(*a)[None],
        "the mean is taken later": lambda *a: right(*a).mean(),
        "not (": lambda *a: right(*a)[:, None],
        "not a tensor": lambda *a: right(*a).tolist(),
    }
    for words, f in says.items():
        e = heard(check_of(name), f)
        assert words in str(e), e
        assert e.mistakes == ("form",)
        assert_can_be_read(str(e))


def test_unsqueezed_references_broadcast():
    e = heard(checks.check_dpo_loss, lambda c, r, rc, rr, beta: -F.logsigmoid(beta * (c - r - (rc - rr)[:, None])))
    assert "every pair against every other" in str(e)


def test_what_nobody_foresaw_shows_the_first_difference():
    for f, name in ((lambda *a: 2 * dpo_a(*a), "dpo_loss"), (lambda *a: 7, "boundary"), (lambda *a: [[0]], "partition"),
                    (lambda *a: 0.25, "certificate"), (lambda m, p, l, size: (l(m, p[:size]).sum() * 3).backward(), "accumulation"),
                    (lambda m, p, s: {x["key"]: (0., 0.) for x in p}, "reference_table")):
        e = heard(check_of(name), f)
        assert e.mistakes == ("unknown",), (name, e)
        assert "First difference" in str(e)
        assert_can_be_read(str(e).replace("...", ""))


@pytest.mark.parametrize("name", EXERCISES)
def test_every_place_to_read_exists(name, book=headings()):
    exercise = EXERCISES[name]
    for chapter, heading in (exercise.read, *exercise.elsewhere.values()): assert heading in book.get(chapter, ()), (name, chapter, heading)
    assert set(exercise.elsewhere) <= set(exercise.says) | set(exercise.parts)


def zipped(p, c, r): return min(sum(x == y for x, y in zip(p, c)), sum(x == y for x, y in zip(p, r)))
def zipped_at_once(p, c, r): return sum(x == y == z for x, y, z in zip(p, c, r))
def nan_of_gamma(g, r): return acc_b(g, r.nan_to_num()).where(~g.isnan(), math.nan)
def by_isclose(g, r): return torch.where(torch.isclose(g, r), 0.5, (g > r).double()) + 0 * (g - r)
def in_fp16(g, r): return acc_b(g.half(), r.half())
def each_clipped(loss, parameters, optimizer, scaler, clip, some=slice(None)):
    optimizer.zero_grad(); scaler.scale(loss).backward(); scaler.unscale_(optimizer)
    for p in parameters[some]: nn.utils.clip_grad_norm_(p, clip)
    scaler.step(optimizer); scaler.update()
def ceil_chunks(accuracy, sizes, T):
    per = part_b(accuracy, sizes, len(sizes))
    return per if T == len(sizes) else [c.tolist() for c in torch.cat([torch.tensor(p) for p in per]).chunk(T)]
def floor_chunks(accuracy, sizes, T):
    per = part_b(accuracy, sizes, len(sizes)); rows = sum(per, []); N = len(rows)
    return per if T == len(sizes) else [rows[N * i // T:N * (i + 1) // T] for i in range(T)]
def within_the_response(logits, ids, mask):
    return torch.stack([-F.cross_entropy(x[m][:-1].float(), t[m][1:], reduction="sum") for x, t, m in zip(logits, ids, mask)])
def floored(logits, ids, mask, log=lambda p: (p + 1e-10).log()):
    return (log(logits[:, :-1].float().softmax(-1)).gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(1)
def from_z(loss): return lambda c, r, rc, rr, beta: loss(beta * (c - r - rc + rr))
def torch_func(t, r, beta): return torch.func.grad(lambda x: F.softplus(-beta * (x - r)).sum())(t)
def grad_enabled(t, r, beta):
    with torch.inference_mode(False), torch.enable_grad():
        x = t.clone().requires_grad_()
        return torch.autograd.grad(F.softplus(-beta * (x - r.clone())).sum(), x)[0]
def ipo_of_numbers(t, r, beta): return torch.tensor([(a - b - 1 / (2 * beta)) ** 2 for a, b in zip(t.tolist(), r.tolist())])
def last_that_agrees(p, c, r): return max(i for i, ids in enumerate(zip(p, c, r)) if len(set(ids)) == 1) + 1
def no_scaler(loss, parameters, optimizer, scaler, clip):
    loss.backward(); nn.utils.clip_grad_norm_(parameters, clip); optimizer.step(); optimizer.zero_grad()
def grad_by(share):
    def f(model, pairs, loss_of, size):
        for i in range(0, len(pairs), size): share(loss_of(model, pairs[i:i + size]), len(pairs), size).backward()
    return f
def grad_in(count):
    def f(model, pairs, loss_of, size):
        for k in range(count(len(pairs), size)): (loss_of(model, pairs[k * size:(k + 1) * size]).sum() / len(pairs)).backward()
    return f
def grad_full_then_rest(model, pairs, loss_of, size):
    for k in range(len(pairs) // size): (loss_of(model, pairs[k * size:(k + 1) * size]).sum() / len(pairs)).backward()
    if pairs[(k + 1) * size:]: (loss_of(model, pairs[(k + 1) * size:]).sum() / len(pairs)).backward()
def by_the_flag(scored, left):                                   # of the module itself: what is inside keeps its own
    def f(model, pairs, score):
        mode = model.training; scored(model)
        with torch.no_grad(): c, r = score(model, pairs)
        left(model, mode)
        return {p["key"]: (a, b) for p, a, b in zip(pairs, c.tolist(), r.tolist())}
    return f
def set_flag(model, mode=False): model.training = mode
def bincount_without_gaps(right, ids):
    n = torch.bincount(ids)
    return (torch.zeros(len(n), dtype=right.dtype).scatter_add(0, ids, right)[n > 0] / n[n > 0]).mean()
def after_sorting(accuracy, sizes, T):
    order = sorted(range(len(sizes)), key=lambda i: -accuracy[i])
    return part_a(sorted(accuracy, reverse=True), [sizes[i] for i in order], T)


@pytest.mark.parametrize("name,f,mistake", [
    ("boundary", zipped, "no_break"), ("boundary", zipped_at_once, "no_break"), ("boundary", lambda p, c, r: max(checks._common(p, c), checks._common(p, r)), "larger"),
    ("accuracy", nan_of_gamma, "nan"), ("accuracy", by_isclose, "near"), ("accuracy", in_fp16, "near"),
    ("fp16_step", each_clipped, "clip_each"), ("fp16_step", partial(each_clipped, some=slice(1)), "clip_first"),
    ("partition", ceil_chunks, "ceil"), ("partition", floor_chunks, "spread"), ("partition", after_sorting, "renumbered"),
    ("by_prompt", lambda right, ids: (torch.bincount(ids, right) / torch.bincount(ids)).mean(), "gaps"),
    ("by_prompt", lambda right, ids: torch.stack([right[a:b].mean() for a, b in itertools.pairwise([0, *ids.unique_consecutive(return_counts=True)[1].cumsum(0)])]).mean(), "runs"),
    ("certificate", lambda loss, ref, beta: (ref - math.log(math.exp(min(loss, 30)) - 1)) / beta, "brackets"),
    ("certificate", lambda loss, ref, beta: ref - math.log(math.exp(min(loss, 30)) - 1) / beta, "capped"),
    ("first_loss", lambda s, r, beta: -torch.sigmoid(beta * (s - r)).mean().log(), "log_of_mean"),
    ("sequence_logps", within_the_response, "no_first"), ("sequence_logps", floored, "floored"), ("sequence_logps", partial(floored, log=lambda p: (p + 1e-6).log()), "floored"),
    ("sequence_logps", partial(floored, log=lambda p: p.clamp(min=1e-12).log()), "floored"),
    ("dpo_loss", from_z(lambda z: torch.where(z > 0, torch.log1p(torch.exp(-z)), torch.log1p(torch.exp(z)) - z)), "unstable"),
    ("dpo_loss", from_z(lambda z: -torch.sigmoid(z).log().nan_to_num()), "unstable"), ("dpo_loss", from_z(lambda z: -torch.sigmoid(z.float()).log()), "unstable"),
    ("dpo_loss", from_z(lambda z: -torch.sigmoid(z).clamp(min=torch.finfo(z.dtype).tiny).log()), "clamped"), ("dpo_loss", from_z(lambda z: -F.logsigmoid(z.clamp(-1000, 1000))), "clamped"),
    ("dpo_loss", lambda c, r, rc, rr, beta: dpo_a(c.detach(), r, rc, rr, beta), "detached"), ("dpo_loss", lambda c, r, rc, rr, beta: dpo_a(c, r.detach(), rc, rr, beta), "detached"),
    ("gradient", torch_func, "autograd"), ("gradient", grad_enabled, "autograd"), ("ipo", ipo_of_numbers, "detached"),
    ("boundary", lambda p, c, r: checks._common(p, r), "rejected_only"), ("boundary", last_that_agrees, "unknown"), ("fp16_step", no_scaler, "no_scaler"),
    ("accumulation", grad_by(lambda losses, n, size: losses.mean() / (n // size)), "full_parts"), ("accumulation", grad_by(lambda losses, n, size: losses.sum() / size), "by_size"),
    ("accumulation", grad_in(lambda n, size: n // size + 1), "empty_part"), ("accumulation", grad_in(lambda n, size: 3), "empty_part"), ("accumulation", grad_full_then_rest, "stopped"),
    ("accumulation", lambda m, p, l, size: acc_grad_a(m, p, l, size) if len(p) >= size else l(m, p[:1]).sum().backward(), "few"),
    ("reference_table", by_the_flag(set_flag, set_flag), "dropout"), ("reference_table", by_the_flag(lambda model: model.eval(), set_flag), "left_in_eval"),
    ("by_prompt", bincount_without_gaps, "stopped"), ("by_prompt", lambda right, ids: prompt_a(right[ids > 0], ids[ids > 0]), "negative"),
    ("certificate", lambda loss, ref, beta: ref - (loss if loss > 1000 else math.log(math.exp(loss) - 1)) / beta, "overflow"),
], ids=lambda x: getattr(x, "__name__", str(x)[:9]))
def test_wrong_answers_that_once_passed_or_had_no_name(name, f, mistake):
    for seed in range(30):
        batches = draw_batches(EXERCISES[name], seed)
        with pytest.raises(CheckFailed) as e: diagnose(EXERCISES[name], f, seed)
        assert e.value.mistakes == (mistake,), e.value
        assert_can_be_read(str(e.value))


def in_place(logits, ids, mask):
    logits = logits.double(); logits -= logits.logsumexp(-1, keepdim=True)
    return (logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(1)
def dpo_in_place(c, r, rc, rr, beta): c -= r; rc -= rr; c -= rc; return F.softplus(-beta * c)
def acc_put(g, r):
    gain = g - r; verdict = torch.zeros(len(g), dtype=torch.float64)
    verdict[gain > 0] = 1.; verdict[gain == 0] = 0.5; verdict[gain.isnan()] = gain[gain.isnan()]
    return verdict
def looks_first(model, pairs, loss_of, size):
    with torch.no_grad(): sum(loss_of(model, pairs[i:i + size]).sum() for i in range(0, len(pairs), size))
    acc_grad_a(model, pairs, loss_of, size)


@pytest.mark.parametrize("name,f", [("sequence_logps", in_place), ("dpo_loss", dpo_in_place), ("accuracy", acc_put), ("accumulation", looks_first)])
def test_right_answers_that_once_were_accused(name, f):
    for seed in range(30): assert heard(check_of(name), f, seed) is None


def test_a_function_that_stops_at_an_edge_hears_the_error_and_what_was_tried():
    def by_numpy(logits, ids, mask): return logps_ce(torch.from_numpy(logits.detach().numpy()), ids, mask)
    def refuses_nan(g, r):
        if (g - r).isnan().any(): raise ValueError("NaN")
        return acc_b(g, r)
    def leaves(loss, ref, beta): return bound_a(loss, ref, beta) if loss < 100 else exit()
    def silent(loss, ref, beta): return bound_a(loss, ref, beta) if loss < 100 else "too large"
    for name, f, kind, words in (
        ("sequence_logps", by_numpy, "stopped", "stops with TypeError: Got unsupported ScalarType BFloat16. It was tried for this: with bf16 logits"),
        ("accuracy", refuses_nan, "stopped", "stops with ValueError: NaN. It was tried for this: NaN in gamma or gamma_ref gets a verdict"),
        ("certificate", leaves, "stopped", "stops with SystemExit"), ("certificate", silent, "form", "it returns a str, not a number")):
        e = heard(check_of(name), f)
        assert e.mistakes == (kind,) and words in str(e), e
        assert_can_be_read(str(e))
    for exercise in EXERCISES.values():
        for mistake in exercise.edges: assert_can_be_read(str(mistakes._stopped_at_edge(exercise, mistake, ValueError("x" * 200))))


def test_a_text_is_no_number():
    for name in ("first_loss", "by_prompt", "certificate"): assert "it returns a str, not a number" in str(heard(check_of(name), lambda *all: str(float(WAYS[name][0](*all)))))
    assert "first_loss is a str, not a number; leave out the quotes" in str(heard(checks.check_predictions, PREDICTIONS | dict(first_loss="0.693")))


def a_stage(gain=lambda c, r, rc, rr: c - r - (rc - rr), rows=lambda table, part, i, batch: [table[p["key"]] for p in part], beside=lambda model: model, loss_of=lambda beta, gain: -F.logsigmoid(beta * gain).mean(), end=lambda model: None, **settings):
    def train(model, pairs, table, beta, lr, batch):
        model = beside(model).float().train(); opt, losses = torch.optim.AdamW(model.parameters(), lr=lr, **({"weight_decay": 0.} | settings)), []
        for i in range(0, len(pairs), batch):
            part = pairs[i:i + batch]; loss = loss_of(beta, gain(*score(model, part), *torch.tensor(rows(table, part, i, batch)).T))
            opt.zero_grad(); loss.backward(); opt.step(); losses.append(loss.item())
        end(model)
        return losses
    return train


def one_up(model):
    with torch.no_grad():
        for p in model.parameters(): p += 1


@pytest.mark.parametrize("mistake,settings", [
    ("by_position", dict(rows=lambda table, part, i, batch: list(table.values())[i:i + batch])), ("decay", dict(weight_decay=0.01)), ("copied", dict(beside=copy.deepcopy)), ("unknown", dict(end=one_up)),
    ("swapped_table", dict(gain=lambda c, r, rc, rr: c - r + (rc - rr))), ("no_ref", dict(gain=lambda c, r, rc, rr: c - r)), ("chosen_only", dict(gain=lambda c, r, rc, rr: c - rc)),
    ("no_beta", dict(loss_of=lambda beta, gain: -F.logsigmoid(gain).mean())), ("mean_inside", dict(loss_of=lambda beta, gain: -F.logsigmoid(beta * gain.mean())))])
def test_a_stage_that_once_passed_or_had_no_name(mistake, settings, monkeypatch):
    if mistake == "unknown": monkeypatch.setattr(mistakes, "find_mistakes", lambda *all: None)      # some seconds: every pair of mistakes is tried
    e = heard(checks.check_train, a_stage(**settings))
    assert e.mistakes == (mistake,), e
    assert_can_be_read(str(e))
    if mistake == "unknown": assert "First difference: loss of pair 0 with the trained model: " in str(e)


def table_but(before=lambda model: None, after=lambda model: None, row=lambda a, b: (a, b)):
    def f(model, pairs, score):
        mode = model.training; model.eval(); before(model)
        with torch.no_grad(): c, r = score(model, pairs)
        model.train(mode); after(model)
        return {p["key"]: row(a, b) for p, a, b in zip(pairs, c.tolist(), r.tolist())}
    return f


def test_the_first_difference_is_a_thing_with_a_name():
    def told(name, f): e = heard(check_of(name), f); assert_can_be_read(str(e)); return e
    table = told("reference_table", table_but(row=lambda a, b: (a, b + 1)))
    assert re.search(r"First difference: the row of pair-\d+, number 1 \(0: chosen, 1: rejected\): -\d+\.\d+, right is -\d+\.\d+\. Read", str(table)), table
    assert "place 0 of chunk 0: 7, right is 0" in told("partition", lambda a, s, T: [[7]]).args[0].replace("right is " + str(part_a(*draw_batches(EXERCISES["partition"], 1)[0])[0][0]), "right is 0")
    assert "number 0 of the gradient" in str(told("accumulation", lambda m, p, l, size: [(l(m, p[i:i + size]).sum() * 7 / len(p)).backward() for i in range(0, len(p), size)]))
    assert "Called with accuracy [" in str(told("partition", lambda *a: [[3]])) and "Try: accuracy [0.6, 0.9]" in str(told("partition", lambda *a: [[3]]))
    for e in (heard(check_of("reference_table"), table_but(after=lambda model: model.train())),): assert e.mistakes == ("left_in_train",) and "came in eval mode" in str(e)


def test_a_table_is_told_what_is_wrong_with_it():
    def told(**what): return heard(checks.check_reference_table, table_but(**what))
    assert "two numbers; that of 'pair-" in str(told(row=lambda a, b: a - b)) and told(row=lambda a, b: a - b).mistakes == ("form",)
    assert re.search(r"two numbers; that of 'pair-\d+' holds shape \(2,\), not one number", str(told(row=lambda a, b: (torch.zeros(2), torch.zeros(2)))))
    assert re.search(r"two numbers; that of 'pair-\d+' has 3", str(told(row=lambda a, b: (a, b, a))))
    assert "it is a dict" in str(told(row=lambda a, b: dict(chosen=a, rejected=b))) or "is a dict" in str(told(row=lambda a, b: dict(chosen=a, rejected=b)))
    assert told(row=lambda a, b: (round(a, 4), round(b, 4))).mistakes == ("rounded",)
    assert told(after=lambda model: model.requires_grad_(False)).mistakes == ("frozen",)
    assert told(after=lambda model: torch.set_grad_enabled(False)).mistakes == ("switched_off",)
    assert torch.is_grad_enabled()
    def no_graph(model, pairs, score):                          # another way to record nothing
        mode = model.training; model.eval(); model.requires_grad_(False); c, r = score(model, pairs); model.requires_grad_(True); model.train(mode)
        return {p["key"]: (a, b) for p, a, b in zip(pairs, c.tolist(), r.tolist())}
    assert heard(checks.check_reference_table, no_graph) is None


def test_what_was_called_is_told_with_its_kind():
    e = heard(checks.check_accuracy, lambda g, r: torch.heaviside(g - r, torch.tensor(0.5)))
    assert "It was called with (6,) float64, (6,) float64" in str(e), e
    assert "It was called with nothing" in str(heard(checks.check_predictions, lambda must: 3))


def test_train_of_the_loop_returns_nothing_and_a_copy_of_the_last_model_is_right():
    def uses(S, chunks, score, train, copy):
        m = copy(S)
        for D in chunks: m = train(m, D, score(m, D))
        return m
    assert "train returns nothing" in str(heard(checks.check_stepwise, uses))
    assert heard(checks.check_stepwise, lambda S, chunks, score, train, copy: copy(stages_a(S, chunks, score, train, copy))) is None
    def from_1(S, chunks, score, train, copy): return stages_a(S, chunks[1:], score, train, copy)
    assert heard(checks.check_stepwise, from_1).mistakes == ("first_chunk",)


# ---- whose is it? ------------------------------------------------------------------------------------------------------

def renamed(c, r, rc, rr, beta): return theirs(c - r, rc - rr, beta)
def by_module(c, r, rc, rr, beta): return sdpo_nb.loss.dpo_loss(c - r, rc - rr, beta)
def by_helper(*args): return renamed(*args)
def inside(c, r, rc, rr, beta):
    from sdpo_nb.loss import dpo_loss
    return dpo_loss(c - r, rc - rr, beta)
def in_a_lambda(c, r, rc, rr, beta): return (lambda: theirs(c - r, rc - rr, beta))()
def from_the_mechanism(c, r, rc, rr, beta): return mistakes._dpo_loss(c, r, rc, rr, beta)
def from_the_catalogue(c, r, rc, rr, beta): return checks._gradient(c - r, rc - rr, beta)
def of_the_catalogue(*args): return EXERCISES["dpo_loss"].crooked(*args)
def catalogue_inside(*args):
    from sdpo_nb.mistakes import _dpo_loss
    return _dpo_loss(*args)
def by_long_path(*args): return sdpo_nb.mistakes._dpo_loss(*args)
def by_another_path(*args): return sdpo_nb.checks._gradient(*args)
class Callable:
    def __call__(self, c, r, rc, rr, beta): return theirs(c - r, rc - rr, beta)
    def method(self, c, r, rc, rr, beta): return theirs(c - r, rc - rr, beta)
def closed_over(f=theirs):
    g = theirs
    def inner(c, r, rc, rr, beta): return g(c - r, rc - rr, beta)
    return inner


def with_default(c, r, rc, rr, beta, loss=theirs): return loss(c - r, rc - rr, beta)
def with_named_default(c, r, rc, rr, beta, *, loss=theirs): return loss(c - r, rc - rr, beta)
def imported_as(c, r, rc, rr, beta):
    import sdpo_nb.loss as L
    return L.dpo_loss(c - r, rc - rr, beta)


@pytest.mark.parametrize("f", [with_default, with_named_default, imported_as, renamed, by_module, by_helper, inside, in_a_lambda, from_the_mechanism, from_the_catalogue, of_the_catalogue, catalogue_inside, by_long_path, by_another_path, mistakes._dpo_loss, partial(mistakes._dpo_loss),
                               Callable(), Callable().method, closed_over(), partial(renamed)], ids=lambda f: getattr(f, "__name__", type(f).__name__))
def test_the_package_s_own_function_is_refused(f):
    e = heard(checks.check_dpo_loss, f)
    assert "the package's own" in str(e), e
    assert e.mistakes == ("own_work",)
    assert_can_be_read(str(e))


@pytest.mark.parametrize("name", EXERCISES)
def test_every_check_refuses_what_the_package_holds(name):
    assert "the package's own" in str(heard(check_of(name), EXERCISES[name].crooked))
    assert "the package's own" in str(heard(check_of(name), their_certificate))


def test_the_world_and_score_may_be_used():
    from sdpo_nb.world import true_reward
    def honest(model, pairs): return score(model, pairs), true_reward, checks.score, mistakes.score
    def attribute(x): return x.theirs, x.dpo_loss              # a name behind a point is no global
    assert foreign_name(honest) is None
    assert foreign_name(attribute) is None
    assert foreign_name(len) is None
    def given_inside(model, pairs):
        from sdpo_nb.checks import score as s
        return s(model, pairs), sdpo_nb.checks.score(model, pairs), F.cross_entropy
    def own_names(theirs, dpo_loss):                           # captured by the lambda; the globals of these names are others
        renamed = theirs
        return lambda x: renamed(theirs(x), [dpo_loss for _ in x])
    def imported_as(model, pairs, reward=true_reward):
        import sdpo_nb.world as W, torch.nn.functional as G
        return W.true_reward, G.cross_entropy
    assert foreign_name(given_inside) is None
    assert foreign_name(imported_as) is None
    assert foreign_name(own_names) is None
    assert foreign_name(own_names(len, len)) is None


def test_what_was_in_one_module_is_still_found_there():
    "Assignments, graders and private checks import from sdpo_nb.checks, whichever chapter explains a name."
    for name in mistakes.__all__: assert getattr(checks, name) is getattr(mistakes, name), name
    for name in "one_number whole_number lists_of_rows as_it_is EXERCISES PREDICTIONS COLUMNS difference_interval report".split(): assert hasattr(checks, name)
    assert EXERCISES["dpo_loss"] is mistakes.DPO_LOSS


# ---- the rest ----------------------------------------------------------------------------------------------------------

def test_a_check_returns_its_seed_prints_it_and_draws_fresh_ones(capsys):
    assert checks.check_dpo_loss(dpo_a, seed=123) == 123
    assert capsys.readouterr().out == "check_dpo_loss: passed (seed 123)\n"
    assert len({checks.check_dpo_loss(dpo_a) for _ in range(4)}) > 1


def test_a_check_leaves_random_numbers_threads_and_modes_alone():
    state = torch.get_rng_state()
    torch.set_num_threads(2)
    for name in ("reference_table", "train", "dpo_loss"): assert heard(check_of(name), WAYS[name][0]) is None
    assert heard(checks.check_dpo_loss, lambda *a: 0) is not None
    assert torch.get_num_threads() == 2
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_a_function_that_changes_its_inputs_does_not_change_those_of_others():
    def greedy(c, r, rc, rr, beta):
        out = dpo_a(c, r, rc, rr, beta); c.data.zero_(); return out
    assert heard(checks.check_dpo_loss, greedy) is None


def test_no_traceback_in_a_notebook():
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell()
    shell.user_ns.update(check=checks.check_ipo, f=lambda *a: None)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out): shell.run_cell("check(f)")
    assert "returns nothing yet" in out.getvalue()
    assert "Traceback" not in out.getvalue()


QUESTIONS = """#| question q1 4 check_dpo_loss dpo_loss
#| question q2 3 check_ipo ipo_loss
#|question q3 2 check_gradient slope
# | question q4 5 check_nothing nothing
#| question q5 1 report report
#| question q6 3 manual
"""


def test_the_report_counts_says_what_is_missing_and_never_raises(capsys):
    class Odd:
        def __call__(self, *args): raise KeyboardInterrupt if False else RecursionError
        def __getattr__(self, name): raise ValueError(name)
    names = dict(dpo_loss=dpo_a, slope=Odd())
    table = report(names, QUESTIONS, seed=5)
    assert list(table["points"]) == [4, 0, 0, 0, 0, 0]
    assert list(table["of"]) == [4, 3, 2, 5, 1, 3]
    assert table.loc["q1", "missing"] == ""
    assert "not defined" in table.loc["q2", "missing"]
    assert "there is no check_nothing" in table.loc["q4", "missing"]
    assert "a person" in table.loc["q6", "missing"]
    first, *said = capsys.readouterr().out.splitlines()
    assert first == f"4 of 18 points so far (seed 5, sdpo_nb {sdpo_nb.__version__})"
    assert said == [f"{q}: {table.loc[q, 'missing']}" for q in ("q2", "q3", "q4", "q5")]      # in full, and not what a person marks
    for nothing in ({}, dict(In=None), dict(In=["", 3]), dict(In="text")): assert len(report(nothing)) == 0


def test_the_report_counts_questions_whose_cells_were_not_run(capsys):
    listed = "\n".join(line.split("question ")[1] for line in QUESTIONS.splitlines())
    assert report(dict(In=[""], dpo_loss=dpo_a), listed, seed=5).equals(report(dict(dpo_loss=dpo_a), QUESTIONS, seed=5))
    printed = capsys.readouterr().out
    assert printed.startswith("4 of 18 points")
    long = str(heard(checks.check_dpo_loss, lambda c, r, rc, rr, beta: F.logsigmoid(beta * (c - r)), 5))
    report(dict(dpo_loss=lambda c, r, rc, rr, beta: F.logsigmoid(beta * (c - r))), "q1 4 check_dpo_loss dpo_loss", seed=5)
    assert f"q1: {long}\n" in capsys.readouterr().out


def test_the_report_reads_the_cells_that_were_run():
    run = ["", "import torch", QUESTIONS.splitlines()[0] + "\ncheck_dpo_loss(dpo_loss)", "report(globals())"]
    assert report(dict(In=run, dpo_loss=dpo_b))["points"].sum() == 4
    assert report(dict(In=run, dpo_loss=...))["points"].sum() == 0
