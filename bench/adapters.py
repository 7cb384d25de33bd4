"""What a fit and a scan of a LoRA cost, beside the model's forward and backward passes alone.

    python bench/adapters.py [--conversations 200] [--queries 8] [--turns 3] [--on "q, v"]

SmolLM2-135M under a LoRA of rank 16, on the attention's queries and values (peft's default) and on
all linear layers. The passes alone are those of training, adapters' gradients included: the
unmodified model's forward and backward over the conversations, once for the fit and once for the
scan. In turns; medians of wall time.
"""

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ekfac_fast import fit, prepare_queries, score
from ekfac_fast.data import Tokens
from ekfac_fast.data.batches import Batches
from pages.markdown import duration, table
from ways import conversations

TARGETS: dict[str, Any] = {"q, v": ["q_proj", "v_proj"], "all linear": "all-linear"}


def passes(model: nn.Module, data: Tokens) -> float:
    """Seconds of a sweep over the batches that `fit` and `score` make of the data."""
    batches = Batches(data, model)
    start = time.perf_counter()
    for indices in batches.divided():
        model(**batches.load(indices), use_cache=False).loss.backward()
    for p in model.parameters():
        p.grad = None
    return time.perf_counter() - start


def job(model: nn.Module, data: Tokens, queries: Tokens) -> dict[str, float]:
    """Seconds by stage."""
    with TemporaryDirectory() as out:
        factors = fit(model, data, out=Path(out) / "factors")
        start = time.perf_counter()
        prepared = prepare_queries(model, factors, queries)
        asked = time.perf_counter() - start
        scores = score(model, prepared, data, out=Path(out) / "scores")
        return factors.seconds | {"queries": asked} | scores.stages


def measured(name: str, count: int, asked: int, turns: int) -> list[str]:
    """A row of the table."""
    torch.manual_seed(0)
    model, tokenizer = conversations.smollm2()
    model = conversations.adapted(model, TARGETS[name], begun=True)
    told, questions = conversations.invented(asked)
    records = [*told, *conversations.reference(count - asked)]
    data = conversations.tokens(records, tokenizer)
    queries = conversations.tokens(questions, tokenizer, last_turn=True)
    alone, stages = [], []
    for _ in range(turns):
        alone.append(passes(model, data) + passes(model, data))
        stages.append(job(model, data, queries))
    own = {x: statistics.median(turn[x] for turn in stages) for x in stages[0]}
    total = statistics.median(sum(turn.values()) for turn in stages)
    told_by_stage = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in own.items())
    base = statistics.median(alone)
    return [name, duration(base), duration(total), f"{total / base:.2f}x", told_by_stage]


def main(words: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("conversations", 200), ("queries", 8), ("turns", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--on", nargs="+", choices=TARGETS, default=[*TARGETS])
    chosen = parser.parse_args(words)
    rows = [measured(x, chosen.conversations, chosen.queries, chosen.turns) for x in chosen.on]
    head = ["LoRA on", "passes alone", "fit, queries and scan", "over the passes", "by stage"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
