"""What a run will cost, from shapes alone: FLOPs, bytes, memory and time of every stage."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..checks import whole
from ..curvature.blocks import block_rows
from ..curvature.choice import Contraction, contraction
from ..curvature.memory import free_bytes
from ..model.layers import Layer
from ..ops.gradients import flops as gradient_flops
from ..ops.shapes import Card, Shape
from .factors import block_facts

# A dense LAPACK eigendecomposition with vectors, and the share of the GEMM rate that it reaches.
EIGH_FLOPS, EIGH_SHARE = 9, 0.15


@dataclass(frozen=True)
class StageCost:
    """One stage's work: FLOPs, and seconds at the measured GEMM rate."""

    name: str
    flops: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Costs of a whole run; sizes in bytes."""

    layers: tuple[Layer, ...]
    scored_by: tuple[Contraction, ...]
    stages: tuple[StageCost, ...]
    factor_bytes: int
    fitting_bytes: int
    query_bytes: int
    batch_tokens: int
    gemm_rate: float


def gemm_rate(
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    size: int = 1024,
    product: Callable[[Tensor, Tensor], Tensor] = torch.mm,
) -> float:
    """FLOP/s of a square product on this machine, best of five."""
    x = torch.randn(size, size).to(device, dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        y = product(x, x)
        if y.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times[1:])


def plan(
    layers: Sequence[Layer],
    *,
    parameters: int,
    sequences: int,
    tokens: int,
    fit_sequences: int,
    queries: int,
    rank: int | None = 32,
    blocks: int = 1,
    rate: float | None = None,
) -> Plan:
    """Cost of `fit`, `prepare_queries` and `score` for sequences of `tokens` tokens.

    Args:
        layers: what `select_layers` chose (a model on the meta device will do).
        parameters: of the whole model: a pass costs 4 FLOPs a parameter and token, forward and
            gradient to activations.
        blocks: diagonal blocks of every covariance, as in `fit`.
        rate: FLOP/s; measured here if None.
    """
    counts = {"sequences": sequences, "tokens": tokens, "fit_sequences": fit_sequences}
    for name, count in (counts | {"queries": queries, "rank": rank or 1}).items():
        whole(name, count)
    block_facts(blocks, layers)
    rate = rate or gemm_rate()
    # Of experts only those that a token meets run; untracked ones are counted in full.
    idle = sum((1 - x.share) * x.O * x.J for x in layers)
    one_pass = 4 * (parameters - idle) * tokens
    came = {x.name: max(1, round(x.share * tokens)) for x in layers}

    # Of every side, the rows of its blocks.
    sides = [
        (x, [len(range(n)[rows]) for rows in block_rows(n, blocks)])
        for x in layers
        for n in (x.J, x.O)
    ]

    def rotated(card: Card, count: int) -> float:
        shapes = [Shape(B=1, T=came[x.name], I=x.I, O=x.O, bias=x.bias) for x in layers]
        saved = (1 - 1 / blocks) * sum(
            gradient_flops(x) - gradient_flops(x, False, False) for x in shapes
        )
        return count * (sum(card.cost(shape).flops for shape in shapes) - saved)

    covariances = fit_sequences * sum(
        ops.covariance.cost(Shape(B=1, T=came[x.name], I=size)).flops
        for x, sizes in sides
        for size in sizes
    )
    eigh = EIGH_FLOPS * sum(size**3 for _, sizes in sides for size in sizes) / EIGH_SHARE
    scan = 0.0
    ways = []
    for x in layers:
        T, K = came[x.name], rank or 0
        shape = Shape(B=sequences, T=T, I=x.I, O=x.O, Q=queries, K=K, bias=x.bias)
        ways.append(contraction(shape))
        card = ops.dense_scores if ways[-1] == "dense" else ops.low_rank_scores
        scan += card.cost(shape).flops
    work = {
        "covariance": covariances + fit_sequences * one_pass,
        "eigendecomposition": eigh,
        "eigenvalues": rotated(ops.eigenvalues, fit_sequences) + fit_sequences * one_pass,
        "queries": rotated(ops.precondition, queries) + queries * one_pass,
        "scan": scan + sequences * one_pass,
        "scan: forward and backward alone": float(sequences * one_pass),
    }
    stages = tuple(StageCost(name, flops, flops / rate) for name, flops in work.items())
    covariance_bytes = sum(4 * (x.J**2 + x.O**2) for x in layers)
    lambda_bytes = sum(4 * x.O * x.J for x in layers)
    query = sum(
        4 * queries * (x.O * x.J if rank is None else min(rank, x.O, x.J) * (x.O + x.J))
        for x in layers
    )
    return Plan(
        tuple(layers),
        tuple(ways),
        stages,
        factor_bytes=2 * covariance_bytes + lambda_bytes,
        # Of many batches: a total and a rest.
        fitting_bytes=2 * (covariance_bytes // blocks + lambda_bytes),
        query_bytes=query,
        batch_tokens=_batch_tokens(layers, parameters, tokens, query),
        gemm_rate=rate,
    )


def _batch_tokens(layers: Sequence[Layer], parameters: int, tokens: int, query_bytes: int) -> int:
    """Tokens a batch that fit beside the weights: every layer's input and output gradient, and
    about as much again for what autograd keeps, in whole sequences and at least one.
    """
    free = free_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    per_token = 2 * 4 * sum(x.share * (x.I + x.O) for x in layers)
    room = max(0, free - 4 * parameters - query_bytes)
    return tokens * max(1, int(room / 2 / per_token / tokens))
