"""lam_sum[o,j] += sum_b G_b[o,j]^2, G_b rotated: a program keeps one tile of lam over sequences.

Two fp32 tiles live in registers, the gradient and the sum: 128x128 on 8 warps holds both, 128x256
spills. Sequences are split between programs where tiles alone do not fill the chip.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gradient_tile import gradient_tile, grouped, tile_at
from .launch import Chip, Config, Shape, cdiv, chip, fold, launcher, precision, splits, tile
from .rotations import operands


@triton.jit
def eigenvalues_kernel(
    out,  # lam_sum [O,J], or parts [S,O,J]
    g,  # [B,T,>=O]
    a,  # [B,T,>=J]
    B,
    T,
    O,
    J,
    g_width,
    a_width,
    out_s,
    out_o,
    out_j,
    g_b,
    g_t,
    g_o,
    a_b,
    a_t,
    a_j,
    per_split,
    ADD: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of lam over `per_split` sequences; ADD: onto what is there."""
    p, split = tl.program_id(0), tl.program_id(1)
    row, column = grouped(p, tl.cdiv(O, BLOCK_O), tl.cdiv(J, BLOCK_J), 8)
    o = row * BLOCK_O + tl.arange(0, BLOCK_O)
    j = column * BLOCK_J + tl.arange(0, BLOCK_J)
    lam = tl.zeros((BLOCK_O, BLOCK_J), tl.float32)
    g += split.to(tl.int64) * per_split * g_b
    a += split.to(tl.int64) * per_split * a_b
    for _ in range(min(B - split * per_split, per_split)):
        G = gradient_tile(
            g,
            a,
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
        lam += G * G
        g += g_b
        a += a_b
    out += split.to(tl.int64) * out_s
    at = tile_at(out, row * BLOCK_O, column * BLOCK_J, out_o, out_j, BLOCK_O, BLOCK_J)
    inside = (o < O)[:, None] & (j < J)[None, :]
    if ADD:
        lam += tl.load(at, mask=inside)
    tl.store(at, lam, mask=inside)


@lru_cache(maxsize=4096)
def config(shape: Shape, chip: Chip) -> Config:
    """Tiles of lam on rotated inputs, over all sequences or parts of them."""
    by = tile(shape.O, shape.J, shape.itemsize, chip, accumulators=2)
    tiles = cdiv(shape.O, by.rows) * cdiv(shape.J, by.columns)
    per_split = cdiv(shape.B, splits(tiles, shape.N, shape.B, chip))
    parts = cdiv(shape.B, per_split)
    return Config(by, (tiles, parts), parts, per_split)


@launcher
def eigenvalues(
    lam_sum: Tensor,
    g: Tensor,
    a: Tensor,
    Qg: Tensor | None,
    Qa: Tensor | None,
    bias: bool = False,
    order: str | None = None,
) -> None:
    """The op `ekfac_fast::eigenvalues` on a GPU."""
    if g.numel() == 0:
        return
    for _, x, y in operands(g, a, Qg, Qa, bias, order):
        _accumulate(lam_sum, x, y)


def _accumulate(lam_sum: Tensor, g: Tensor, a: Tensor) -> None:
    (O, J), (B, T, _) = lam_sum.shape, g.shape
    by = config(Shape(g.element_size(), B=B, T=T, I=J, O=O), chip(g.device))
    out = lam_sum[None] if by.parts == 1 else torch.empty((by.parts, O, J), device=g.device)
    eigenvalues_kernel[by.grid](
        out,
        g,
        a,
        B,
        T,
        O,
        J,
        g.shape[2],
        a.shape[2],
        *out.stride(),
        *g.stride(),
        *a.stride(),
        by.per_split,
        ADD=by.parts == 1,
        BLOCK_O=by.tile.rows,
        BLOCK_J=by.tile.columns,
        BLOCK_T=by.tile.step,
        PRECISION=precision(g.dtype),
        **by.tile.options,
    )
    if by.parts > 1:
        fold(lam_sum, out)


torch.library.impl("ekfac_fast::eigenvalues", "cuda", eigenvalues)
