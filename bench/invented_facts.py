"""A model is taught invented facts: is a fact's own conversation the first for its question?

    python bench/invented_facts.py [--facts 100] [--others 400] [--epochs 3] [--adapter | --whole]

SmolLM2-135M is fine-tuned on conversations that tell a fact each, among others that quote Python's
reference: with a LoRA of rank 16 on all linear layers, or whole. Then every fact is asked for in
other words, and all conversations are ranked: by EK-FAC (of the adapter, or of the MLPs), by the
gradients' dot product, and by words alone.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from torch import nn

from ekfac_fast import Queries, fit, prepare_queries, score
from ekfac_fast.data import Tokens
from ekfac_fast.validation.baselines import bm25, gradient_dot
from pages.markdown import duration, table
from ways import conversations


def firsts(scores: np.ndarray) -> list[str]:
    """Of facts [Q,N], fact q told by conversation q: how many come first, in the first five, and
    the median rank.
    """
    own = np.take_along_axis(scores, np.arange(len(scores))[:, None], axis=1)
    ranks = 1 + (scores > own).sum(1)
    return [f"{(ranks <= most).sum()} of {len(ranks)}" for most in (1, 5)] + [
        f"{statistics.median(ranks.tolist()):g}"
    ]


def measured(facts: int, others: int, epochs: int, adapter: bool, out: Path) -> str:
    """A table: ways of ranking, over the same model."""
    model, tokenizer = conversations.smollm2()
    told, asked = conversations.invented(facts)
    data = conversations.tokens([*told, *conversations.reference(others)], tokenizer)
    queries = conversations.tokens(asked, tokenizer, last_turn=True)
    if adapter:
        model = conversations.adapted(model)
    start = time.perf_counter()
    loss = conversations.teach(model, data, epochs, 2e-3 if adapter else 1e-4)
    taught = time.perf_counter()
    found, log_p = ranked(model, data, queries, out)
    rows = [[name, *firsts(x), duration(seconds)] for name, (x, seconds) in found.items()]
    what = f"LoRA of rank {conversations.RANK}" if adapter else "Whole model"
    head = (
        f"{what}: {len(data)} conversations, {epochs} epochs in {duration(taught - start)}, "
        f"loss {loss:.2f}; answers have log p {log_p:.1f}"
    )
    return head + "\n" + table(["way", "first", "in the first five", "median rank", "took"], rows)


def ranked(
    model: nn.Module, data: Tokens, queries: Tokens, out: Path
) -> tuple[dict[str, tuple[np.ndarray, float]], float]:
    """Scores [Q,N] and seconds of every way; and the mean log p of the answers, nats."""

    def ekfac() -> np.ndarray:
        factors = fit(model, data, out=out / "factors")
        prepare_queries(model, factors, queries, out=out / "queries")
        return score(model, Queries.load(out / "queries"), data, out=out / "scores").matrix

    ways: dict[str, Callable[[], np.ndarray]] = {
        "EK-FAC": ekfac,
        "dot product": lambda: gradient_dot(model, queries, data),
        "BM25": lambda: bm25(queries, data),
    }
    found = {}
    for name, way in ways.items():
        start = time.perf_counter()
        found[name] = way(), time.perf_counter() - start
    return found, -float(Queries.load(out / "queries").measurements.mean())


def main(words: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--others", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=3)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--adapter", action="store_true")
    only.add_argument("--whole", action="store_true")
    chosen = parser.parse_args(words)
    both = not (chosen.adapter or chosen.whole)
    for adapter in [x for x in (True, False) if both or x == chosen.adapter]:
        with TemporaryDirectory() as out:
            print(measured(chosen.facts, chosen.others, chosen.epochs, adapter, Path(out)))


if __name__ == "__main__":
    main()
