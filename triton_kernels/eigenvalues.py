"""lam_sum[o,j] += sum_b G_b[o,j]^2, G_b rotated: a program keeps one tile of lam over sequences.

Two fp32 tiles live in registers, the gradient and the sum: 128x128 on 8 warps holds both, 128x256
spills, and is no faster. Sequences are split between programs where tiles do not fill the chip.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gradient_tile import gradient_tile, inside_of, tile_at, tile_of
from .launch import (
    Chip,
    Config,
    Shape,
    blocks,
    cdiv,
    chip,
    copies,
    fold,
    hopper,
    launcher,
    run,
    sides,
    splits,
    tile,
)
from .rotations import operands


@triton.jit
def eigenvalues_kernel(
    out,  # lam_sum [O,J], or parts [S,O,J]
    g,  # [B,T,O], as `piece` reads it
    a,  # [B,T,J]
    each_g,  # 0 if all sequences have the same
    each_a,
    B,
    T,
    O,
    J,
    g_b,
    g_t,
    a_b,
    a_t,
    out_s,
    out_o,
    out_j,
    per_split,
    ADD: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    COPIES: tl.constexpr,
):
    """One tile of lam over `per_split` sequences; ADD: onto what is there."""
    p, split = tl.program_id(0), tl.program_id(1)
    o, j = tile_of(p, O, J, BLOCK_O, BLOCK_J)
    lam = tl.zeros((BLOCK_O, BLOCK_J), tl.float32)
    first = split * per_split
    for b in tl.range(first, min(B, first + per_split), flatten=COPIES):
        G = gradient_tile(
            g,
            a,
            b * each_g,
            b * each_a,
            o,
            j,
            T,
            O,
            J,
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
        lam += G * G
    inside = inside_of(o, j, O, J, BLOCK_O, BLOCK_J)
    at = tile_at(out + split.to(tl.int64) * out_s, o, j, out_o, out_j, BLOCK_O, BLOCK_J)
    if ADD:
        lam += tl.load(at, mask=inside)
    tl.store(at, lam, mask=inside)


@lru_cache(maxsize=4096)
def config(shape: Shape, chip: Chip) -> Config:
    """Tiles of lam on rotated inputs, over all sequences or parts of them."""
    by = tile(shape.O, shape.J, shape.itemsize, chip)
    engine = copies(2.0 * shape.N * shape.O * shape.J, chip)
    few = cdiv(shape.O, 128) * cdiv(shape.J, 128) < 2 * chip.processors
    if by.rows == 128 and engine and few and hopper(chip):
        by = by._replace(rows=64, warps=4)  # more of them, rather than a second launch
    if by.rows == 128 and not engine and shape.J % 4:
        by = by._replace(rows=64)  # addresses of odd rows take registers
    tiles = cdiv(shape.O, by.rows) * cdiv(shape.J, by.columns)
    per_split = cdiv(shape.B, splits(tiles, shape.N, shape.B, chip))
    parts = cdiv(shape.B, per_split)
    return Config(by, (tiles, parts), parts, per_split, engine)


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
    (O, J), T, B = lam_sum.shape, g.shape[1], max(len(g), len(a))
    by = config(Shape(g.element_size(), B=B, T=T, I=J, O=O), chip(g.device))
    out = lam_sum[None] if by.parts == 1 else torch.empty((by.parts, O, J), device=g.device)
    run(
        eigenvalues_kernel,
        by.grid,
        out,
        *sides(g, a, by),
        B,
        T,
        O,
        J,
        *g.stride()[:2],
        *a.stride()[:2],
        *out.stride(),
        by.per_split,
        ADD=by.parts == 1,
        **blocks(by, g.dtype),
    )
    if by.parts > 1:
        fold(lam_sum, out)
