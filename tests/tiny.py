"What several test files need: a few rows of the tiny world, settings that train in a second, a table read from disk without the package's help."
import json
from pathlib import Path

import pandas as pd
import torch

from sdpo_nb.world import load_world

torch.set_num_threads(1)
SETTINGS = dict(lr=1e-3, batch_size=8, precision="fp32", max_length=64, max_prompt_length=32)


def rows(source, n, start=0):
    "n conversational rows of a source of the tiny world."
    with open(load_world().sources[source]) as f:
        return [json.loads(line) for line in f][start:start + n]


def write_jsonl(path, rows):
    Path(path).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return Path(path)


def perturbed(model, size=0.1, seed=0):
    "The model with every weight moved at random, by a share of its tensor's spread."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += size * p.abs().mean() * torch.randn(p.shape, generator=g)
    return model


def gammas(folder):
    "gamma of every pair in a table on disk, by key."
    t = pd.concat([pd.read_parquet(p) for p in sorted(Path(folder).glob("logprobs-*.parquet"))])
    return t["chosen"] - t["rejected"]


def metrics(folder):
    "metrics.jsonl as a list of dicts, without what a clock wrote."
    out = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if k != "tokens_per_second"} for m in out]
