"""s[q,b] += sum_tk (g_bt . L_q[:,k]) (R_q[k,:] . (a_bt, 1)): two products, closed in registers.

A program holds two fp32 tiles, U = g L and V = (a, 1) R^T, of the same rows (tokens) and columns
(query, rank), multiplies them and sums over rank, then over tokens: no [B,T,Q,K] tensor. Rows are
tokens of one sequence, or of all sequences where one would leave a tile empty or tokens are kept.
Ranks are padded to a power of two, so that a tile holds whole queries, or one query takes several.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gradient_tile import grouped, product_tile
from .launch import Chip, Shape, Tile, aligned, cdiv, chip, fold, launcher, precision, tile


@triton.jit
def low_rank_scores_kernel(
    out,  # [S,Q,B,T] by strides: s, or parts of it
    L,  # [Q,O,K]
    R,  # [Q,K,>=I]
    last,  # R[:,:,I] [Q,K], the column that meets the ones
    g,  # [B,T,O]
    a,  # [B,T,I]
    Q,
    K,
    B,
    T,
    O,
    I,
    blocks,
    out_s,
    out_q,
    out_b,
    out_t,
    L_q,
    L_o,
    L_k,
    R_q,
    R_k,
    R_i,
    last_q,
    last_k,
    g_b,
    g_t,
    g_o,
    a_b,
    a_t,
    a_i,
    RANK: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of ROWS tokens by COLUMNS / RANK queries, summed over tokens unless PER_TOKEN."""
    QUERIES: tl.constexpr = COLUMNS // RANK
    # `blocks` row tiles a sequence; per token, one sequence of B T rows. `chunks` of the rank.
    sequences = 1 if PER_TOKEN else B
    length = B * T if PER_TOKEN else T
    chunks = tl.cdiv(K, RANK)
    row, column = grouped(tl.program_id(0), sequences * blocks, tl.cdiv(Q, QUERIES) * chunks, 8)
    within = row % blocks * ROWS + tl.arange(0, ROWS)
    n = row // blocks * length + within
    n_in = within < length
    b, t = (n // T).to(tl.int64), (n % T).to(tl.int64)
    c = tl.arange(0, COLUMNS)
    q = (column // chunks * QUERIES + c // RANK).to(tl.int64)
    k = column % chunks * RANK + c % RANK
    c_in = (q < Q) & (k < K)
    U = product_tile(
        g + b * g_b + t * g_t,
        L + q * L_q + k * L_k,
        n_in,
        c_in,
        O,
        g_o,
        L_o,
        None,
        0,
        ROWS,
        COLUMNS,
        BLOCK,
        PRECISION,
    )
    V = product_tile(
        a + b * a_b + t * a_t,
        R + q * R_q + k * R_k,
        n_in,
        c_in,
        I,
        a_i,
        R_i,
        None,
        0,
        ROWS,
        COLUMNS,
        BLOCK,
        PRECISION,
    )
    if BIAS:
        V += tl.load(last + q * last_q + k * last_k, mask=c_in, other=0.0)[None, :]
    q = (column // chunks * QUERIES + tl.arange(0, QUERIES)).to(tl.int64)
    part = column % chunks
    if PER_TOKEN:
        score = tl.sum(tl.reshape(U * V, (ROWS, QUERIES, RANK)), 2)
        at = (b * out_b + t * out_t)[:, None] + q[None, :] * out_q
        inside = n_in[:, None] & (q < Q)[None, :]
    else:
        score = tl.sum(tl.reshape(tl.sum(U * V, 0), (QUERIES, RANK)), 1)
        part = part * blocks + row % blocks
        at = (row // blocks).to(tl.int64) * out_b + q * out_q
        inside = q < Q
    at += out + part.to(tl.int64) * out_s
    if ADD:
        score += tl.load(at, mask=inside, other=0.0)
    tl.store(at, score, mask=inside)


class Config(NamedTuple):
    """Tile and programs; ranks of a tile's queries, and how many tiles take one; tiles of rows.

    `flat`: rows are those of all sequences, `rows` of them in all, else in each sequence.
    """

    tile: Tile
    grid: tuple[int]
    rank: int
    chunks: int
    rows: int
    flat: bool


@lru_cache(maxsize=4096)
def config(shape: Shape, chip: Chip) -> Config:
    """Tiles of tokens by queries and ranks."""
    rank = 1 << (shape.K - 1).bit_length()
    by = tile(shape.N, shape.Q * rank, shape.itemsize, chip, accumulators=2)
    rank = min(rank, by.columns)
    chunks = cdiv(shape.K, rank)
    columns = cdiv(shape.Q, by.columns // rank) * chunks
    # Sequences shorter than a tile share tiles, as if scores were wanted per token.
    flat = shape.per_token or by.rows > shape.T
    rows = cdiv(shape.N if flat else shape.T, by.rows)
    programs = rows * (1 if flat else shape.B) * columns
    return Config(by, (programs,), rank, chunks, rows, flat)


@launcher
def low_rank_scores(
    s: Tensor, L: Tensor, R: Tensor, g: Tensor, a: Tensor, bias: bool = False
) -> None:
    """The op `ekfac_fast::low_rank_scores` on a GPU; s [Q,B] or, per token, [Q,B,T]."""
    (B, T, O), (Q, K, _), I, tokens = g.shape, R.shape, a.shape[-1], s.ndim == 3
    if 0 in (B, T, Q, K):
        return
    shape = Shape(g.element_size(), B, T, I, O, Q, K, bias, per_token=tokens)
    by, R = config(shape, chip(g.device)), aligned(R, bias)
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
    low_rank_scores_kernel[by.grid](
        out,
        L,
        R,
        R[..., I if bias else 0],
        g,
        a,
        Q,
        K,
        B,
        T,
        O,
        I,
        by.rows,
        *out.stride(),
        *L.stride(),
        *R.stride(),
        *R.stride()[:2],
        *g.stride(),
        *a.stride(),
        RANK=by.rank,
        PER_TOKEN=by.flat,
        ADD=whole,
        BIAS=bias,
        ROWS=by.tile.rows,
        COLUMNS=by.tile.columns,
        BLOCK=by.tile.step,
        PRECISION=precision(g.dtype),
        **by.tile.options,
    )
    if not whole:
        fold(s, parts)


torch.library.impl("ekfac_fast::low_rank_scores", "cuda", low_rank_scores)
