"""s[q,b] += sum_tk (g_bt . L_q[:,k]) (R_q[k,:] . (a_bt, 1)): two products, closed in registers.

A program holds two fp32 tiles, U = g L and V = (a, 1) R^T, of the same rows (tokens) and columns
(query, rank), multiplies them and sums over rank, then over tokens: no [B,T,Q,K] tensor. Rows are
tokens of one sequence, or of all sequences where one would leave a tile empty or tokens are kept.
Queries lie side by side, [O,QK] and [QK,J]: factors that lie so in memory, [Q,O,K] with the strides
of [O,Q,K], are read where they are, others are copied. Ranks that are no power of two are padded,
so that a tile holds whole queries, or one query takes several. Wide layers are left to `closed.py`.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from .closed import closed
from .gradient_tile import grouped, piece
from .launch import (
    Chip,
    Shape,
    Tile,
    cdiv,
    chip,
    copies,
    describable,
    fold,
    hopper,
    launcher,
    precision,
    readable,
    run,
    tile,
)

# From so many features, input and output together, on cuBLAS gains more than U and V cost: of
# 16-bit numbers a tenth of the products, of fp32 a third.
WIDE = {2: 3072, 4: 256}


@triton.jit
def low_rank_scores_kernel(
    out,  # [S,Q,B,T] by strides: s, or parts of it
    L,  # [1,O,QK], as `piece` reads it
    R,  # [1,QK,I]
    last,  # the column of R that meets the ones, [QK]
    g,  # [B,T,O], or [1,BT,O] with PER_TOKEN
    a,  # [B,T,I], or [1,BT,I]
    Q,
    B,
    T,
    O,
    I,
    chunks,
    blocks,
    L_o,
    R_n,
    g_b,
    g_t,
    a_b,
    a_t,
    out_s,
    out_q,
    out_b,
    out_t,
    RANK: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    COPIES: tl.constexpr,
):
    """Scores of ROWS tokens by COLUMNS / RANK queries, summed over tokens unless PER_TOKEN."""
    QUERIES: tl.constexpr = COLUMNS // RANK
    # `blocks` row tiles a sequence; per token, one sequence of B T rows. `chunks` of the rank.
    sequences = 1 if PER_TOKEN else B
    length = B * T if PER_TOKEN else T
    row, column = grouped(tl.program_id(0), sequences * blocks, tl.cdiv(Q, QUERIES) * chunks, 8)
    sequence, first, c = row // blocks, row % blocks * ROWS, column * COLUMNS
    N = Q * chunks * RANK
    U = tl.zeros((ROWS, COLUMNS), tl.float32)
    for o in range(0, O, BLOCK):
        x = piece(g, sequence, first, o, length, O, g_b, g_t, ROWS, BLOCK, COPIES)
        left = piece(L, 0, o, c, O, N, 0, L_o, BLOCK, COLUMNS, COPIES)
        U = tl.dot(x, left, U, input_precision=PRECISION)
    V = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(0, I, BLOCK):
        x = piece(a, sequence, first, i, length, I, a_b, a_t, ROWS, BLOCK, COPIES)
        right = piece(R, 0, c, i, N, I, 0, R_n, COLUMNS, BLOCK, COPIES)
        V = tl.dot(x, right.T, V, input_precision=PRECISION)
    if BIAS:
        n = c + tl.arange(0, COLUMNS)
        V += tl.load(last + n.to(tl.int64) * R_n, mask=n < N, other=0.0)[None, :]
    q = (column // chunks * QUERIES + tl.arange(0, QUERIES)).to(tl.int64)
    part = column % chunks
    if PER_TOKEN:
        n = first + tl.arange(0, ROWS)
        b, t = (n // T).to(tl.int64), (n % T).to(tl.int64)
        score = tl.sum(tl.reshape(U * V, (ROWS, QUERIES, RANK)), 2)
        at = (b * out_b + t * out_t)[:, None] + q[None, :] * out_q
        inside = (n < length)[:, None] & (q < Q)[None, :]
    else:
        score = tl.sum(tl.reshape(tl.sum(U * V, 0), (QUERIES, RANK)), 1)
        part = part * blocks + row % blocks
        at = sequence.to(tl.int64) * out_b + q * out_q
        inside = q < Q
    at += out + part.to(tl.int64) * out_s
    if ADD:
        score += tl.load(at, mask=inside, other=0.0)
    tl.store(at, score, mask=inside)


class Config(NamedTuple):
    """Tile and programs; ranks of a tile's queries, and how many tiles take one; tiles of rows.

    `flat`: rows are those of all sequences, `rows` of them in all, else in each sequence. `copies`
    as in `launch.Config`.
    """

    tile: Tile
    grid: tuple[int]
    rank: int
    chunks: int
    rows: int
    flat: bool
    copies: bool


@lru_cache(maxsize=4096)
def config(shape: Shape, chip: Chip) -> Config:
    """Tiles of tokens by queries and ranks."""
    rank = 1 << (shape.K - 1).bit_length()
    by = tile(shape.N, shape.Q * rank, shape.itemsize, chip)
    # Four tensors to describe, and addresses lose less: a fourth counts.
    engine = copies(0.5 * shape.N * shape.Q * rank * (shape.O + shape.I), chip)
    if engine and hopper(chip) and by.rows == 128:
        by = by._replace(stages=5)  # long sums: 700 of an H200's 750 TFLOP/s, with 4 stages 645
    chunks = max(1, rank // by.columns)
    rank = min(rank, by.columns)
    columns = cdiv(shape.Q, by.columns // rank) * chunks
    # Sequences shorter than a tile share tiles, as if scores were wanted per token.
    flat = shape.per_token or by.rows > shape.T
    rows = cdiv(shape.N if flat else shape.T, by.rows)
    programs = rows * (1 if flat else shape.B) * columns
    return Config(by, (programs,), rank, chunks, rows, flat, engine)


def beside(L: Tensor, R: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of all queries side by side, [1,O,Q rank] and [1,Q rank,J]; copied if they must."""
    (Q, O, K), J = L.shape, R.shape[2]
    if rank > K:
        L, R = pad(L, (0, rank - K)), pad(R, (0, 0, 0, rank - K))
    return (
        describable(L.permute(1, 0, 2).reshape(1, O, Q * rank)),
        describable(R.reshape(1, Q * rank, J)),
    )


@launcher
def low_rank_scores(
    s: Tensor, L: Tensor, R: Tensor, g: Tensor, a: Tensor, bias: bool = False
) -> None:
    """The op `ekfac_fast::low_rank_scores` on a GPU; s [Q,B] or, per token, [Q,B,T]."""
    (B, T, O), (Q, K, _), I, tokens = g.shape, R.shape, a.shape[-1], s.ndim == 3
    if 0 in (B, T, Q, K):
        return
    shape = Shape(g.element_size(), B, T, I, O, Q, K, bias, per_token=tokens)
    least = WIDE[g.element_size()]
    if least <= O + I:
        closed(s, L.permute(1, 0, 2).reshape(O, Q * K), R.reshape(Q * K, -1), g, a, bias)
        return
    by = config(shape, chip(g.device))
    left, right = beside(L, R, by.rank * by.chunks)
    whole = by.chunks == 1 and (tokens or (not by.flat and by.rows == 1))
    if whole:
        out = s[None] if tokens else s[None, ..., None]
    elif tokens:
        out = parts = torch.empty((by.chunks, Q, B, T), device=g.device)
    elif by.flat:
        parts = torch.empty((Q, B, by.chunks * T), device=g.device)
        out, parts = parts.view(Q, B, by.chunks, T).permute(2, 0, 1, 3), parts.permute(2, 0, 1)
    else:
        parts = torch.empty((by.chunks * by.rows, Q, B), device=g.device)
        out = parts[..., None]
    g, a = (describable(x.reshape(1, B * T, -1) if by.flat else x) for x in (g, a))
    rows, columns, step, *_ = by.tile
    run(
        low_rank_scores_kernel,
        by.grid,
        out,
        readable(left, step, columns, by.copies),
        readable(right[..., :I], columns, step, by.copies),
        right[0, :, -1],
        readable(g, rows, step, by.copies),
        readable(a, rows, step, by.copies),
        Q,
        B,
        T,
        O,
        I,
        by.chunks,
        by.rows,
        left.stride(1),
        right.stride(1),
        *g.stride()[:2],
        *a.stride()[:2],
        *out.stride(),
        RANK=by.rank,
        PER_TOKEN=by.flat,
        ADD=whole,
        BIAS=bias,
        ROWS=rows,
        COLUMNS=columns,
        BLOCK=step,
        PRECISION=precision(g.dtype),
        COPIES=by.copies,
        **by.tile.options,
    )
    if not whole:
        fold(s, parts)
