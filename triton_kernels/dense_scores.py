"""s[q,b] += sum_oj P_q[o,j] G_b[o,j], and per token s[q,b,t] += sum_j (g_bt P_q)[j] (a_bt, 1)[j].

One or two queries: each gradient tile meets every P_q in registers, one number a tile, query and
sequence, summed by a second launch. Of more every P_q would come from L2 again for every sequence:
strips of G are contracted with all queries at once, two products of cuBLAS.
Per token: a program closes tiles of g P_q with a before they leave registers.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from .closed import product
from .gradient_tile import gradient_tile, inside_of, product_tile, tile_at, tile_of
from .launch import (
    Chip,
    Config,
    Shape,
    aligned,
    blocks,
    cdiv,
    chip,
    describable,
    even,
    fold,
    launcher,
    precision,
    readable,
    run,
    sequences,
    splits,
    tile,
)

# Beyond these, fetching P_q for every sequence takes longer than writing G (H200: 1.9 to 1.6 ms).
FEW_QUERIES = 2
# Products of shorter strips take two to three times as long in all: their sums are too short.
STRIP_BYTES = 256 << 20


@triton.jit
def dense_scores_kernel(
    out,  # s [Q,B], or parts [tiles,Q,B]
    P,  # [Q,O,>=I]
    g,  # [B,T,O], as `piece` reads it
    a,  # [B,T,I]
    Q,
    B,
    T,
    O,
    I,
    g_b,
    g_t,
    a_b,
    a_t,
    out_tile,
    out_q,
    out_b,
    P_q,
    P_o,
    P_i,
    per_split,
    ADD: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    COPIES: tl.constexpr,
):
    """The share of one tile in the scores of `per_split` sequences in turn, for all queries."""
    p, split = tl.program_id(0), tl.program_id(1)
    o, i = tile_of(p, O, I, BLOCK_O, BLOCK_J)
    inside = inside_of(o, i, O, I, BLOCK_O, BLOCK_J)
    tile = tile_at(P, o, i, P_o, P_i, BLOCK_O, BLOCK_J)
    out += p.to(tl.int64) * out_tile
    first = split * per_split
    for b in tl.range(first, min(B, first + per_split)):
        G = gradient_tile(
            g,
            a,
            b,
            b,
            o,
            i,
            T,
            O,
            I,
            g_b,
            g_t,
            a_b,
            a_t,
            BLOCK_O,
            BLOCK_J,
            BLOCK_T,
            PRECISION,
            COPIES,
        )
        for q in range(Q):
            query = tl.load(tile + tl.cast(q, tl.int64) * P_q, mask=inside, other=0.0)
            value = tl.sum(G * query.to(tl.float32))
            at = out + tl.cast(q, tl.int64) * out_q + tl.cast(b, tl.int64) * out_b
            if ADD:
                value += tl.load(at)
            tl.store(at, value)


@triton.jit
def dense_token_scores_kernel(
    out,  # [S,Q,B,T] by strides: s, or parts of it
    P,  # [Q,O,>=J], zeros past J
    g,  # [B,T,O]
    a,  # [B,T,I]
    N,
    T,
    O,
    I,
    J,
    out_s,
    out_q,
    out_b,
    out_t,
    P_q,
    P_o,
    P_j,
    g_b,
    g_t,
    g_o,
    a_b,
    a_t,
    a_i,
    per_split,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of ROWS tokens (of all sequences) by one query, `per_split` columns of P_q."""
    split = tl.program_id(1)
    blocks = tl.cdiv(N, ROWS)
    q = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    b, t = (n // T).to(tl.int64), (n % T).to(tl.int64)
    rows, activations = g + b * g_b + t * g_t, a + b * a_b + t * a_t
    score = tl.zeros((ROWS,), tl.float32)
    for first in range(split * per_split, min(J, (split + 1) * per_split), COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        H = product_tile(
            rows,
            P + q * P_q + j.to(tl.int64) * P_j,
            n < N,
            j < J,
            O,
            g_o,
            P_o,
            None,
            0,
            ROWS,
            COLUMNS,
            BLOCK,
            PRECISION,
        )
        at = (activations[:, None] + tl.cast(first, tl.int64) * a_i) + (j - first)[None, :] * a_i
        A = tl.load(at, mask=(n < N)[:, None] & (j < I)[None, :], other=0.0).to(tl.float32)
        # Column I exists only with a bias, and meets a 1; columns of H past J are zero.
        score += tl.sum(H * tl.where(j[None, :] == I, 1.0, A), 1)
    at = out + split.to(tl.int64) * out_s + q * out_q + b * out_b + t * out_t
    if ADD:
        score += tl.load(at, mask=n < N, other=0.0)
    tl.store(at, score, mask=n < N)


@lru_cache(maxsize=4096)
def config(shape: Shape, chip: Chip) -> Config:
    """Rows of tokens by columns of P, or tiles of a gradient.

    `parts` are, per token, parts of those columns, else tiles.
    """
    if shape.per_token:
        J = even(shape.J)  # of P when it is `aligned`
        by = tile(shape.N, J, shape.itemsize, chip)
        if chip.capability >= 100:
            by = by._replace(step=min(by.step, 32))  # 64 spills, here only
        programs, steps = cdiv(shape.N, by.rows) * shape.Q, cdiv(J, by.columns)
        per_split = cdiv(steps, splits(programs, steps * shape.O, steps, chip)) * by.columns
        parts = cdiv(J, per_split)
        return Config(by, (programs, parts), parts, per_split)
    return sequences(shape._replace(bias=False), chip)


@launcher
def dense_scores(s: Tensor, P: Tensor, g: Tensor, a: Tensor, bias: bool = False) -> None:
    """The op `ekfac_fast::dense_scores` on a GPU; s [Q,B] or, per token, [Q,B,T]."""
    (B, T, I), (Q, O, _), tokens = a.shape, P.shape, s.ndim == 3
    if 0 in (Q, B, T):
        return
    shape = Shape(g.element_size(), B=B, T=T, I=I, O=O, Q=Q, bias=bias, per_token=tokens)
    if tokens:
        per_token(s, aligned(P), g, a, config(shape, chip(g.device)))
        return
    if Q > FEW_QUERIES:
        many_queries(s, P, g, pad(a, (0, 1), value=1.0) if bias else a)
        return
    few_queries(s, aligned(P), g, a, config(shape, chip(g.device)))
    if bias:
        # The ones: one number a query and output feature.
        s += P[..., -1].float() @ g.sum(1, dtype=torch.float32).T


def few_queries(s: Tensor, P: Tensor, g: Tensor, a: Tensor, by: Config) -> None:
    """One launch over tiles and sequences, one over their numbers: s [Q,B], without the ones."""
    (B, T, I), (Q, O, _) = a.shape, P.shape
    g, a = describable(g), describable(a)
    out = s[None] if by.parts == 1 else torch.empty((by.parts, Q, B), device=g.device)
    run(
        dense_scores_kernel,
        by.grid,
        out,
        P,
        readable(g, by.tile.step, by.tile.rows, by.copies),
        readable(a, by.tile.step, by.tile.columns, by.copies),
        Q,
        B,
        T,
        O,
        I,
        *g.stride()[:2],
        *a.stride()[:2],
        *out.stride(),
        *P.stride(),
        by.per_split,
        ADD=by.parts == 1,
        **blocks(by, g.dtype),
    )
    if by.parts > 1:
        fold(s, out)


def many_queries(s: Tensor, P: Tensor, g: Tensor, x: Tensor) -> None:
    """s [Q,B] += P_q . G_b, G in strips: some output features of all sequences; x with its ones."""
    (B, _, O), J = g.shape, x.shape[2]
    rows = max(1, STRIP_BYTES // (B * J * g.element_size()))
    for first in range(0, O, rows):
        some = slice(first, first + rows)
        G = torch.bmm(g[..., some].mT, x)
        s += product(P[:, some].flatten(1), G.flatten(1).T)


def per_token(s: Tensor, P: Tensor, g: Tensor, a: Tensor, by: Config) -> None:
    """Rows of all sequences by tiles, columns of P_q in turn: s [Q,B,T]."""
    (B, T, I), (Q, O, J) = a.shape, P.shape
    g, a = describable(g), describable(a)  # loaded number by number, odd rows spill
    out = s[None] if by.parts == 1 else torch.empty((by.parts, Q, B, T), device=g.device)
    run(
        dense_token_scores_kernel,
        by.grid,
        out,
        P,
        g,
        a,
        B * T,
        T,
        O,
        I,
        J,
        *out.stride(),
        *P.stride(),
        *g.stride(),
        *a.stride(),
        by.per_split,
        ADD=by.parts == 1,
        ROWS=by.tile.rows,
        COLUMNS=by.tile.columns,
        BLOCK=by.tile.step,
        PRECISION=precision(g.dtype),
        **by.tile.options,
    )
    if by.parts > 1:
        fold(s, out)
