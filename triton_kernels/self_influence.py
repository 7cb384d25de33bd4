"""s[b] += sum_oj G_b[o,j]^2 / (lam[o,j] + damping), G_b rotated: each tile leaves one number.

Those numbers, [tiles,B], are summed by a second launch in a fixed order: no atomics.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gradient_tile import gradient_tile, inside_of, tile_at, tile_of
from .launch import (
    Shape,
    blocks,
    chip,
    fold,
    launcher,
    run,
    sequences,
    sides,
)
from .narrow import narrow
from .rotations import operands


@triton.jit
def self_influence_kernel(
    out,  # s [B], or parts [tiles,B]
    g,  # [B,T,O], as `piece` reads it
    a,  # [B,T,J]
    each_g,  # 0 if all sequences have the same
    each_a,
    lam,  # [O,J]
    damping,
    B,
    T,
    O,
    J,
    g_b,
    g_t,
    a_b,
    a_t,
    out_tile,
    out_b,
    lam_o,
    lam_j,
    per_split,
    ADD: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    COPIES: tl.constexpr,
):
    """The share of one tile in the scores of `per_split` sequences in turn."""
    p, split = tl.program_id(0), tl.program_id(1)
    o, j = tile_of(p, O, J, BLOCK_O, BLOCK_J)
    inside = inside_of(o, j, O, J, BLOCK_O, BLOCK_J)
    lam = tile_at(lam, o, j, lam_o, lam_j, BLOCK_O, BLOCK_J)
    scale = tl.where(inside, 1 / (tl.load(lam, mask=inside, other=1.0) + damping), 0.0)
    out += p.to(tl.int64) * out_tile
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
        value = tl.sum(G * G * scale)
        at = out + tl.cast(b, tl.int64) * out_b
        if ADD:
            value += tl.load(at)
        tl.store(at, value)


# Narrow layers that `narrow.py` takes apart are not asked for.
config = lru_cache(maxsize=4096)(sequences)


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
        T, B = x.shape[1], max(len(x), len(y))
        by = config(Shape(x.element_size(), B=B, T=T, I=J, O=O), chip(g.device))
        out = s[None, part] if by.parts == 1 else torch.empty((by.parts, B), device=g.device)
        run(
            self_influence_kernel,
            by.grid,
            out,
            *sides(x, y, by),
            lam,
            damping,
            B,
            T,
            O,
            J,
            *x.stride()[:2],
            *y.stride()[:2],
            *out.stride(),
            *lam.stride(),
            by.per_split,
            ADD=by.parts == 1,
            **blocks(by, g.dtype),
        )
        if by.parts > 1:
            fold(s[part], out)
