"""What `capture` costs a training loop: steps of SmolLM2-135M with and without, in turn.

    python bench/training_loop.py [--sequences 4] [--tokens 128] [--queries 8] [--turns 5]

A step is a forward pass, a backward pass with all weight gradients, and AdamW, in fp32; tracked are
the MLPs of all blocks. Queries are random and of rank 32. Gradients are seen to be bitwise the same
before anything is timed; medians of wall time.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ekfac_fast import Queries, capture
from ekfac_fast.cli.demo_pretrained import packaged
from ekfac_fast.cli.inputs import load
from ekfac_fast.model.layers import select_layers
from ekfac_fast.stages.queries import LayerQueries
from pages.markdown import table

RANK = 32


def drawn(model: nn.Module, count: int) -> Queries:
    """Random queries of low rank for every MLP matrix."""
    layers = []
    for x in select_layers(model):
        K = min(RANK, x.O, x.J)
        L, R = torch.randn(count, x.O, K), torch.randn(count, K, x.J)
        layers.append(LayerQueries(x, L, R, None, torch.ones(count)))
    return Queries(tuple(layers), RANK, (0.0,) * len(layers), torch.zeros(count), ())


def gradients(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """Of every parameter, from one pass."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def measured(model: nn.Module, sequences: int, tokens: int, queries: int, turns: int) -> str:
    """A table: a row for every way."""
    ids = torch.randint(0, model.config.vocab_size, (sequences, tokens))  # type: ignore
    asked = drawn(model, queries)
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "the loop alone": nullcontext,
        f"scores, {queries} queries": lambda: capture(model, queries=asked),
        "covariances": lambda: capture(model),
    }
    before = gradients(model, ids)
    for way in ways.values():
        with way():
            after = gradients(model, ids)
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    del before, after
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            with way() as captured:
                start = time.perf_counter()
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if captured is not None and captured.sums_covariances:
                    captured.take_covariances()
                elif captured is not None:
                    captured.take_scores()
                found[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(x) for name, x in found.items()}
    first = seconds["the loop alone"]
    rows = [[n, f"{x:.2f} s", f"+{100 * (x / first - 1):.0f}%"] for n, x in seconds.items()]
    return table(["", "a step", "over the loop alone"], rows)


def main(words: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("sequences", 4), ("tokens", 128), ("queries", 8), ("turns", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    print(
        measured(load(str(packaged()), False, device="cpu").model, **vars(parser.parse_args(words)))
    )


if __name__ == "__main__":
    main()
