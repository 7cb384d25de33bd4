"""s[b] += sum_oj G_b[o,j]^2 / (lam[o,j] + damping), G_b rotated: each tile leaves one number.

Those numbers, [tiles,B], are summed by a second launch in a fixed order: no atomics.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gradient_tile import gradient_tile, tile_at, tile_of
from .launch import Chip, Config, Shape, cdiv, chip, fold, launcher, precision, side_by_side, tile
from .narrow import narrow
from .rotations import operands


@triton.jit
def self_influence_kernel(
    out,  # s [B], or parts [tiles,B]
    g,  # [B,T,>=O]
    a,  # [B,T,>=J]
    lam,  # [O,J]
    damping,
    T,
    O,
    J,
    g_width,
    a_width,
    out_tile,
    out_b,
    g_b,
    g_t,
    g_o,
    a_b,
    a_t,
    a_j,
    lam_o,
    lam_j,
    ADD: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The share of one tile in one sequence's score; padding as in `precondition_kernel`."""
    rows, columns = tl.cdiv(O, BLOCK_O), tl.cdiv(J, BLOCK_J)
    b, tile, row, column = tile_of(tl.program_id(0), rows, columns, TOGETHER)
    o = row * BLOCK_O + tl.arange(0, BLOCK_O)
    j = column * BLOCK_J + tl.arange(0, BLOCK_J)
    G = gradient_tile(
        g + b * g_b,
        a + b * a_b,
        o,
        j,
        T,
        g_width,
        a_width,
        g_t,
        g_o,
        a_t,
        a_j,
        False,
        BLOCK_O,
        BLOCK_J,
        BLOCK_T,
        PRECISION,
    )
    inside = (o < O)[:, None] & (j < J)[None, :]
    at = tile_at(lam, row * BLOCK_O, column * BLOCK_J, lam_o, lam_j, BLOCK_O, BLOCK_J)
    scale = tl.load(at, mask=inside, other=1.0) + damping
    value = tl.sum(tl.where(inside, G * G / scale, 0.0))
    at = out + tile * out_tile + b * out_b
    if ADD:
        value += tl.load(at)
    tl.store(at, value)


@lru_cache(maxsize=4096)
def config(shape: Shape, chip: Chip) -> Config:
    """Tiles of every sequence on rotated inputs; narrow layers that `narrow.py` takes apart."""
    by = tile(shape.O, shape.J, shape.itemsize, chip, accumulators=1)
    tiles = cdiv(shape.O, by.rows) * cdiv(shape.J, by.columns)
    return Config(by, (tiles * shape.B,), parts=tiles, together=side_by_side(shape.B))


@launcher
def self_influence(
    s: Tensor,
    g: Tensor,
    a: Tensor,
    Qg: Tensor | None,
    Qa: Tensor | None,
    lam: Tensor,
    damping: float,
    bias: bool = False,
    order: str | None = None,
) -> None:
    """The op `ekfac_fast::self_influence` on a GPU."""
    if g.numel() == 0:
        return
    O, J = lam.shape
    if narrow(s, g, a, Qg, Qa, lam, damping, bias, order):
        return
    for part, x, y in operands(g, a, Qg, Qa, bias, order):
        B, T = x.shape[:2]
        by = config(Shape(x.element_size(), B=B, T=T, I=J, O=O), chip(g.device))
        out = s[None, part] if by.parts == 1 else torch.empty((by.parts, B), device=g.device)
        self_influence_kernel[by.grid](
            out,
            x,
            y,
            lam,
            damping,
            T,
            O,
            J,
            x.shape[2],
            y.shape[2],
            *out.stride(),
            *x.stride(),
            *y.stride(),
            *lam.stride(),
            ADD=by.parts == 1,
            TOGETHER=by.together,
            BLOCK_O=by.tile.rows,
            BLOCK_J=by.tile.columns,
            BLOCK_T=by.tile.step,
            PRECISION=precision(g.dtype),
            **by.tile.options,
        )
        if by.parts > 1:
            fold(s[part], out)


torch.library.impl("ekfac_fast::self_influence", "cuda", self_influence)
