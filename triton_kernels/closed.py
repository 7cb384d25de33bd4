"""Low-rank scores of wide layers: U = g L and V = a R^T are cuBLAS's, fp32, and are closed here.

A kernel multiplies the products, adds the ones and sums over rank, then over tokens. They are made
some tokens at a time: no [B,T,Q,K] tensor exists. Cheaper than two tiles in registers where what is
written takes less time than cuBLAS's products gain. An H200, Q=64, K=32, B=8, T=512: 406 us to 442
at 4096 x 14336, 122 to 178 at 768 x 3072.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Chip, Shape, cdiv, chip, fold, options, run

# Of both products at a time.
CHUNK_BYTES = 64 << 20
# Steps of a part of a sequence, and programs a processor: alone on it, one waits for its loads.
LEAST_STEPS, PROGRAMS = 4, 8


@triton.jit
def close_kernel(
    out,  # [S,Q,B,T] by strides: s, or parts of it; T = 1 unless PER_TOKEN
    U,  # [BT,QK]
    V,  # [BT,QK]
    last,  # what the ones add to V, [QK]
    Q,
    T,
    K,
    last_n,
    out_s,
    out_q,
    out_b,
    out_t,
    per_split,
    QUERIES: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Scores of one sequence, or of `per_split` of its tokens, by QUERIES queries."""
    column, b, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, t = tl.arange(0, QUERIES * RANK), tl.arange(0, ROWS)
    k = n % RANK
    q = column * QUERIES + tl.arange(0, QUERIES)
    n = (column * QUERIES + n // RANK).to(tl.int64) * K + k
    first, width = tl.cast(b, tl.int64) * T, tl.cast(Q, tl.int64) * K
    out += split.to(tl.int64) * out_s + tl.cast(b, tl.int64) * out_b
    out += q.to(tl.int64) * out_q
    total = tl.zeros((ROWS, QUERIES * RANK), tl.float32)
    for t0 in range(split * per_split, min(T, (split + 1) * per_split), ROWS):
        at = (first + t0 + t)[:, None] * width
        for k0 in range(0, K, RANK):
            here = (k < K - k0) & (n < width)
            inside = (t < T - t0)[:, None] & here[None, :]
            u = tl.load(U + at + (n + k0)[None, :], mask=inside, other=0.0)
            v = tl.load(V + at + (n + k0)[None, :], mask=inside, other=0.0)
            if BIAS:
                v += tl.load(last + (n + k0) * last_n, mask=here, other=0.0).to(tl.float32)[None, :]
            total += u * v
        if PER_TOKEN:
            score = tl.sum(tl.reshape(total, (ROWS, QUERIES, RANK)), 2)
            tokens = (t0 + t).to(tl.int64)[:, None] * out_t
            inside = (t < T - t0)[:, None] & (q < Q)[None, :]
            score += tl.load(out[None, :] + tokens, mask=inside, other=0.0)
            tl.store(out[None, :] + tokens, score, mask=inside)
            total = tl.zeros((ROWS, QUERIES * RANK), tl.float32)
    if not PER_TOKEN:
        score = tl.sum(tl.reshape(tl.sum(total, 0), (QUERIES, RANK)), 1)
        if ADD:
            score += tl.load(out, mask=q < Q, other=0.0)
        tl.store(out, score, mask=q < Q)


class Config(NamedTuple):
    """How products of some sequences are closed: queries, ranks and tokens of a tile; programs over
    queries, sequences and parts of a sequence, `per_split` tokens each.
    """

    queries: int
    rank: int
    rows: int
    grid: tuple[int, int, int]
    per_split: int


@lru_cache(maxsize=4096)
def config(shape: Shape, chip: Chip) -> Config:
    """Tiles of 4096 numbers; sequences in parts where there are too few to fill the chip."""
    rank = min(128, 1 << (shape.K - 1).bit_length())
    queries = max(1, min(128 // rank, 1 << (shape.Q - 1).bit_length()))
    rows = min(4096 // (queries * rank), max(1, 1 << (shape.T - 1).bit_length()))
    columns, steps = cdiv(shape.Q, queries), cdiv(shape.T, rows)
    parts = max(1, min(steps // LEAST_STEPS, PROGRAMS * chip.processors // (columns * shape.B)))
    per_split = cdiv(steps, parts) * rows
    return Config(queries, rank, rows, (columns, shape.B, cdiv(shape.T, per_split)), per_split)


def pieces(B: int, T: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Sequences and tokens whose two products, rows of `width` numbers, are `CHUNK_BYTES`."""
    rows = max(1, CHUNK_BYTES // (8 * width))
    some, tokens = max(1, rows // T), min(T, rows)
    for b in range(0, B, some):
        for t in range(0, T, tokens):
            yield slice(b, b + some), slice(t, t + tokens)


def product(x: Tensor, y: Tensor) -> Tensor:
    """x y in fp32."""
    if x.device.type == "cpu":  # Triton's interpreter; torch has no such product there
        return x.float() @ y.float()
    return x @ y if x.dtype == torch.float32 else torch.mm(x, y, out_dtype=torch.float32)


def closed(s: Tensor, left: Tensor, right: Tensor, g: Tensor, a: Tensor, bias: bool) -> None:
    """s [Q,B] or [Q,B,T] += its terms; factors side by side, left [O,QK] and right [QK,J]."""
    (B, T, O), I, QK = g.shape, a.shape[2], len(right)
    for some, tokens in pieces(B, T, QK):
        U = product(g[some, tokens].reshape(-1, O), left)
        V = product(a[some, tokens].reshape(-1, I), right[:, :I].T)
        into = s[:, some, tokens] if s.ndim == 3 else s[:, some]
        _close(into, U, V, right[:, -1], QK // len(s), bias)


def _close(s: Tensor, U: Tensor, V: Tensor, last: Tensor, K: int, bias: bool) -> None:
    """s [Q,b] or [Q,b,t] += sum_k U (V + last), and over tokens."""
    Q, B, per_token = *s.shape[:2], s.ndim == 3
    T = len(U) // B
    by = config(Shape(4, B=B, T=T, Q=Q, K=K), chip(U.device))
    parts = by.grid[2]
    whole = per_token or parts == 1
    out = s if whole else torch.empty((parts, Q, B), device=U.device)
    run(
        close_kernel,
        by.grid,
        out,
        U,
        V,
        last,
        Q,
        T,
        K,
        last.stride(0),
        0 if whole else out.stride(0),
        out.stride(-3 if per_token else -2),
        out.stride(-2 if per_token else -1),
        out.stride(-1) if per_token else 0,
        by.per_split,
        QUERIES=by.queries,
        RANK=by.rank,
        ROWS=by.rows,
        PER_TOKEN=per_token,
        ADD=whole,
        BIAS=bias,
        **options(4),
    )
    if not whole:
        fold(s, out)
