"""P_b[o,j] = G_b[o,j] / (lam[o,j] + damping), G_b rotated: divided where the tile was computed."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gradient_tile import gradient_tile, tile_at, tile_of
from .launch import Chip, Config, Shape, cdiv, chip, launcher, precision, side_by_side, tile
from .narrow import narrow
from .rotations import operands


@triton.jit
def precondition_kernel(
    P,  # [B,O,J]
    g,  # [B,T,>=O]
    a,  # [B,T,>=J]
    lam,  # [O,J]
    damping,
    T,
    O,
    J,
    g_width,
    a_width,
    P_b,
    P_o,
    P_j,
    g_b,
    g_t,
    g_o,
    a_b,
    a_t,
    a_j,
    lam_o,
    lam_j,
    TOGETHER: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one sequence's P; `g` and `a` may be wider than O and J, padded by anything."""
    rows, columns = tl.cdiv(O, BLOCK_O), tl.cdiv(J, BLOCK_J)
    b, _, row, column = tile_of(tl.program_id(0), rows, columns, TOGETHER)
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
    at = tile_at(P + b * P_b, row * BLOCK_O, column * BLOCK_J, P_o, P_j, BLOCK_O, BLOCK_J)
    tl.store(at, G / scale, mask=inside)


@lru_cache(maxsize=4096)
def config(shape: Shape, chip: Chip) -> Config:
    """Tiles of every sequence on rotated inputs; narrow layers that `narrow.py` takes apart."""
    by = tile(shape.O, shape.J, shape.itemsize, chip, accumulators=2)
    tiles = cdiv(shape.O, by.rows) * cdiv(shape.J, by.columns)
    return Config(by, (tiles * shape.B,), together=side_by_side(shape.B))


@launcher
def precondition(
    g: Tensor,
    a: Tensor,
    Qg: Tensor | None,
    Qa: Tensor | None,
    lam: Tensor,
    damping: float,
    bias: bool = False,
    order: str | None = None,
) -> Tensor:
    """The op `ekfac_fast::precondition` on a GPU: [B,O,J] fp32."""
    (B, T, _), (O, J) = g.shape, lam.shape
    P = torch.empty((B, O, J), device=g.device)
    if B == 0 or T == 0:
        return P.zero_()
    if narrow(P, g, a, Qg, Qa, lam, damping, bias, order):
        return P
    for part, x, y in operands(g, a, Qg, Qa, bias, order):
        B, T = x.shape[:2]
        by = config(Shape(x.element_size(), B=B, T=T, I=J, O=O), chip(g.device))
        precondition_kernel[by.grid](
            P[part],
            x,
            y,
            lam,
            damping,
            T,
            O,
            J,
            x.shape[2],
            y.shape[2],
            *P.stride(),
            *x.stride(),
            *y.stride(),
            *lam.stride(),
            TOGETHER=by.together,
            BLOCK_O=by.tile.rows,
            BLOCK_J=by.tile.columns,
            BLOCK_T=by.tile.step,
            PRECISION=precision(g.dtype),
            **by.tile.options,
        )
    return P


torch.library.impl("ekfac_fast::precondition", "cuda", precondition)
