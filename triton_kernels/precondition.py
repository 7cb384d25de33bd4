"""P_b[o,j] = G_b[o,j] / (lam[o,j] + damping), G_b rotated: divided where the tile was computed.

A program holds 1 / (lam + damping) of its tile for some sequences in turn.
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
    launcher,
    run,
    sequences,
    sides,
)
from .narrow import narrow
from .rotations import operands


@triton.jit
def precondition_kernel(
    P,  # [B,O,J]
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
    P_b,
    P_o,
    P_j,
    lam_o,
    lam_j,
    per_split,
    BLOCK_O: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    COPIES: tl.constexpr,
):
    """One tile of P of `per_split` sequences in turn."""
    p, split = tl.program_id(0), tl.program_id(1)
    o, j = tile_of(p, O, J, BLOCK_O, BLOCK_J)
    inside = inside_of(o, j, O, J, BLOCK_O, BLOCK_J)
    lam = tile_at(lam, o, j, lam_o, lam_j, BLOCK_O, BLOCK_J)
    scale = 1 / (tl.load(lam, mask=inside, other=1.0) + damping)
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
        at = tile_at(P + tl.cast(b, tl.int64) * P_b, o, j, P_o, P_j, BLOCK_O, BLOCK_J)
        tl.store(at, G * scale, mask=inside)


# Narrow layers that `narrow.py` takes apart are not asked for.
config = lru_cache(maxsize=4096)(sequences)


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
        T, B = x.shape[1], max(len(x), len(y))
        by = config(Shape(x.element_size(), B=B, T=T, I=J, O=O), chip(g.device))
        run(
            precondition_kernel,
            by.grid,
            P[part],
            *sides(x, y, by),
            lam,
            damping,
            B,
            T,
            O,
            J,
            *x.stride()[:2],
            *y.stride()[:2],
            *P.stride(),
            *lam.stride(),
            by.per_split,
            **blocks(by, g.dtype),
        )
    return P
