"""What a run will cost, from shapes alone: FLOPs, bytes, memory and time of every stage."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import ops
from .hooks import Layer
from .ops.shapes import Shape

# Dense queries above this many bytes a layer are never rebuilt from low-rank factors.
DENSE_BYTES = 1 << 30
# A dense LAPACK eigendecomposition with vectors, and the share of the GEMM rate that it reaches.
EIGH_FLOPS, EIGH_SHARE = 9, 0.15


@dataclass(frozen=True)
class Stage:
    """One stage's work: FLOPs, and seconds at the measured GEMM rate."""

    name: str
    flops: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Costs of a whole run; sizes in bytes."""

    layers: tuple[Layer, ...]
    stages: tuple[Stage, ...]
    factor_bytes: int
    fitting_bytes: int
    query_bytes: int
    batch_tokens: int
    gemm_rate: float


def contraction(layer: Layer, queries: int, rank: int | None, tokens: float) -> str:
    """ "dense" or "low_rank": the cheaper way to score sequences of so many tokens on average.

    FLOPs a sequence: 2 O J (T + Q) through the gradient tile, 2 T Q K (O + J) through the factors.
    Dense needs Q O J numbers in memory, so it is refused above `DENSE_BYTES`.
    """
    if rank is None:
        return "dense"
    O, J = layer.O, layer.J
    if 4 * queries * O * J > DENSE_BYTES:
        return "low_rank"
    return "dense" if O * J * (tokens + queries) < tokens * queries * rank * (O + J) else "low_rank"


def gemm_rate(dtype: torch.dtype = torch.float32, device: str = "cpu", size: int = 1024) -> float:
    """FLOP/s of a square product on this machine, best of five."""
    x = torch.randn(size, size).to(device, dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        y = x @ x
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
    rate: float | None = None,
) -> Plan:
    """Cost of `fit`, `prepare_queries` and `score` for sequences of `tokens` tokens.

    Args:
        layers: what `select_layers` chose (a model on the meta device will do).
        parameters: of the whole model: a pass costs 4 FLOPs a parameter and token, forward and
            gradient to activations.
        rate: FLOP/s; measured here if None.
    """
    rate = rate or gemm_rate()
    one_pass = 4 * parameters * tokens

    def each(card, count: int, Q: int = 0, K: int = 0) -> float:
        shapes = (Shape(B=1, T=tokens, I=x.I, O=x.O, Q=Q, K=K, bias=x.bias) for x in layers)
        return count * sum(card.cost(shape).flops for shape in shapes)

    covariances = fit_sequences * sum(
        ops.covariance.cost(Shape(B=1, T=tokens, I=size, bias=bias)).flops
        for x in layers
        for size, bias in ((x.I, x.bias), (x.O, False))
    )
    eigh = EIGH_FLOPS * sum(x.J**3 + x.O**3 for x in layers) / EIGH_SHARE
    scan = 0.0
    for x in layers:
        how = contraction(x, queries, rank, tokens)
        card = ops.dense_scores if how == "dense" else ops.low_rank_scores
        shape = Shape(B=1, T=tokens, I=x.I, O=x.O, Q=queries, K=rank or 0, bias=x.bias)
        scan += sequences * card.cost(shape).flops
    work = {
        "covariance": covariances + fit_sequences * one_pass,
        "eigendecomposition": eigh,
        "eigenvalues": each(ops.eigenvalues, fit_sequences) + fit_sequences * one_pass,
        "queries": each(ops.precondition, queries) + queries * one_pass,
        "scan": scan + sequences * one_pass,
        "scan: forward and backward alone": float(sequences * one_pass),
    }
    stages = tuple(Stage(name, flops, flops / rate) for name, flops in work.items())
    covariance_bytes = sum(4 * (x.J**2 + x.O**2) for x in layers)
    lambda_bytes = sum(4 * x.O * x.J for x in layers)
    query = sum(
        4 * queries * (x.O * x.J if rank is None else min(rank, x.O, x.J) * (x.O + x.J))
        for x in layers
    )
    return Plan(
        tuple(layers),
        stages,
        factor_bytes=2 * covariance_bytes + lambda_bytes,
        fitting_bytes=covariance_bytes + lambda_bytes,
        query_bytes=query,
        batch_tokens=_batch_tokens(layers, parameters, tokens, query),
        gemm_rate=rate,
    )


def _batch_tokens(layers: Sequence[Layer], parameters: int, tokens: int, query_bytes: int) -> int:
    """Tokens a batch that fit beside the weights: every layer's input and output gradient, and
    about as much again for what autograd keeps, in whole sequences and at least one.
    """
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    per_token = 2 * 4 * sum(x.I + x.O for x in layers)
    room = max(0, free - 4 * parameters - query_bytes)
    return tokens * max(1, int(room / 2 / per_token / tokens))
