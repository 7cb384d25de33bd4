"""What rows of routed experts cost: ours, beside the same rows shared out evenly, and padded.

    python bench/expert_rows.py [--sequences 4] [--tokens 128] [--experts 8] [--top 2]

A block of Mixtral with random weights routes random text. Its (a, g) go through the ops of three
stages, once as `fit` and `score` take them, once with every sequence given an equal share of an
expert's rows (the same FLOPs, dense), and once with every expert padded to the widest. Medians of
five turns, one after the other, of this thread's time on one thread.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch.nn.functional import pad
from transformers import MixtralConfig, MixtralForCausalLM

from ekfac_fast.curvature.basis import Eigenvectors, SharedRotation
from ekfac_fast.curvature.query_gradients import LowRank
from ekfac_fast.model.capture import Capture
from ekfac_fast.model.layer_batch import LayerBatch
from ekfac_fast.model.layers import select_layers
from ekfac_fast.model.rows import Grid
from ekfac_fast.stages.parts import add_scores, rotated
from pages.markdown import table

TURNS, QUERIES, RANK = 5, 8, 32
HIDDEN, INNER = 512, 1024


def captured(sequences: int, tokens: int, experts: int, top: int) -> list[LayerBatch]:
    """(a, g) of every expert's matrices in one batch."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=512, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, num_local_experts=experts,
        num_experts_per_tok=top,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    ids = torch.randint(0, 512, (sequences, tokens))
    seen: list[LayerBatch] = []

    def swap() -> tuple[Callable, Callable]:
        return (lambda: model(ids[:2])), (lambda: model(ids[:2].flip(0)))

    Capture(model, select_layers(model), swap)(
        lambda: model(input_ids=ids, labels=ids).loss, seen.append, Grid(sequences, tokens)
    )
    return seen


def shared_out(seen: LayerBatch) -> LayerBatch:
    """As many rows, in sequences of one length."""
    B, rows = len(seen.g), sum(seen.rows.counts or ())
    a, g = (torch.randn(B, -(-rows // B), x.shape[-1]) for x in (seen.a, seen.g))
    return replace(seen, a=a, g=g, rows=replace(seen.rows, counts=None, filled=None))


def widened(seen: LayerBatch, width: int) -> LayerBatch:
    """Padded to the widest expert."""
    a, g = (pad(x, (0, 0, 0, width - x.shape[1])) for x in (seen.a, seen.g))
    return replace(seen, a=a, g=g, rows=replace(seen.rows, counts=None, filled=None))


def stages(seen: Sequence[LayerBatch]) -> dict[str, Callable[[Sequence[LayerBatch]], None]]:
    """The ops of a batch, as the stages call them."""
    rotate, bases, sums, queries = SharedRotation(), {}, {}, {}
    for x in seen:
        O, J = x.layer.O, x.layer.J
        Qg, Qa = (torch.linalg.qr(torch.randn(n, n))[0] for n in (O, J))
        bases[x.layer.name] = Eigenvectors(Qg, Qa)
        sums[x.layer.name] = torch.zeros(O, J), torch.zeros(O, O), torch.zeros(J, J)
        queries[x.layer.name] = LowRank(
            torch.randn(QUERIES, O, RANK), torch.randn(QUERIES, RANK, J)
        )

    def covariances(batch: Sequence[LayerBatch]) -> None:
        for x in batch:
            for cov, side in zip(sums[x.layer.name][1:], (x.g, x.a), strict=True):
                torch.ops.ekfac_fast.covariance(cov, x.tokens(side), None, False)

    def eigenvalues(batch: Sequence[LayerBatch]) -> None:
        for x in batch:
            for _, basis, g, a, bias in rotated(x, bases[x.layer.name], rotate):
                basis.add_eigenvalues(sums[x.layer.name][0], g, a, bias)

    def scores(batch: Sequence[LayerBatch]) -> None:
        for x in batch:
            add_scores(torch.zeros(QUERIES, len(x.g)), queries[x.layer.name], x)

    return {"covariances": covariances, "eigenvalues": eigenvalues, "scores": scores}


def timed(
    stage: Callable[[Sequence[LayerBatch]], None], ways: dict[str, Sequence[LayerBatch]]
) -> dict[str, float]:
    """Medians in seconds, the ways in turn."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, batch in ways.items():
            start = time.thread_time()
            stage(batch)
            found[name].append(time.thread_time() - start)
    return {name: statistics.median(x) for name, x in found.items()}


def measured(sequences: int, tokens: int, experts: int, top: int) -> str:
    """A table: a row for every stage."""
    seen = captured(sequences, tokens, experts, top)
    width = max(x.g.shape[1] for x in seen)
    ways: dict[str, Sequence[LayerBatch]] = {
        "ours": seen,
        "dense": [shared_out(x) for x in seen],
        "widest": [widened(x, width) for x in seen],
    }
    rows = []
    for name, stage in stages(seen).items():
        found = timed(stage, ways)
        rows.append(
            [
                name,
                f"{1e3 * found['ours']:.0f} ms",
                f"{found['ours'] / found['dense']:.2f}",
                f"{found['widest'] / found['ours']:.2f}x",
            ]
        )
    return table(["", "ours", "over as many rows, dense", "faster than padded to the widest"], rows)


def main(words: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("sequences", 4), ("tokens", 128), ("experts", 8), ("top", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    torch.set_num_threads(1)
    print(measured(**vars(parser.parse_args(words))))


if __name__ == "__main__":
    main()
