"""Qg^T G_b Qa / (lam + damping) of a narrow layer in one launch: P, or each program's share of s.

A program holds a strip of the rotated gradient, all of the layer's narrower side wide. With x the
rows of the wider side and y those of the narrower, whichever of g and a they are,

    S[r,w] = sum_t (x_t Qx)[r] y[t,w]      its columns of Qx stay on chip, x and y pass once
    R[r,c] = sum_w S[r,w] Qy[w,c]          divided by lam[r,c] + damping where it was computed

so nothing is computed twice and nothing but the result is written; elsewhere cuBLAS rotates, and
three launches follow one another through memory. That is faster for wider layers and for more
strips than processors: every strip reads both sides of its sequence again. What lost, by registers
spilled: y of 512 features with a bias; Qx reread from L2 in an inner loop.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Chip, Shape, cdiv, chip, fold, options, run

ROWS, BLOCK = 64, 32


class Strip(NamedTuple):
    """Widths of the two sides, padded to powers of two, options and programs of the launch."""

    height: int
    width: int
    warps: int
    stages: int
    grid: tuple[int]


@lru_cache(maxsize=4096)
def config(shape: Shape, chip: Chip) -> Strip | None:
    """How a layer is cut into strips; None where three launches are taken.

    One side is rotated by tokens, the other on the gradient, whatever is cheapest: of sequences of
    few tokens that is many times the least FLOPs, more than launches saved are worth. fp32 products
    keep plain cores busy for longer than any launch takes.
    """
    T, I, O = shape.T, shape.I, shape.O
    X, Y = (O, shape.J) if O >= I else (shape.J, O)
    programs = shape.B * cdiv(X, ROWS)
    here = T * X * X + T * X * Y + X * Y * Y
    least = X * X * min(T, Y) + T * X * Y + Y * Y * min(T, X)
    if shape.itemsize > 2 or here > 4 * least or programs > chip.processors:
        return None
    sizes = ((128, 128, 4, 3), (256, 256, 8, 3), (512, 256, 8, 2))
    for height, width, warps, most in sizes:
        room = chip.shared - 2048 - ROWS * height * shape.itemsize
        stages = min(most, room // ((height + width) * BLOCK * shape.itemsize))
        if max(O, I) <= height and min(O, I) <= width and stages > 1:
            return Strip(height, width, warps, stages, (programs,))
    return None


@triton.jit
def narrow_kernel(
    out,  # P [B,X,Y] by strides; s or parts of it, [B,strips,1]
    x,  # [B,T,M]
    y,  # [B,T,N]
    Qx,  # [X,X], X = M + 1 with BIAS_X
    Qy,  # [Y,Y]
    lam,  # [X,Y]
    damping,
    strips,
    T,
    M,
    N,
    X,
    Y,
    out_b,
    out_x,
    out_y,
    x_b,
    x_t,
    x_m,
    y_b,
    y_t,
    y_n,
    Qx_m,
    Qx_x,
    Qy_n,
    Qy_y,
    lam_x,
    lam_y,
    SCORE: tl.constexpr,
    ADD: tl.constexpr,
    BIAS_X: tl.constexpr,
    BIAS_Y: tl.constexpr,
    ROWS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows of one sequence's P, or what they add to its score."""
    b, at = (tl.program_id(0) // strips).to(tl.int64), tl.program_id(0) % strips
    r, block = at * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    m, n = tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    r_in, m_in, n_in = r < X, m < M, n < N
    into = tl.load(
        Qx + r[:, None] * Qx_x + m[None, :] * Qx_m, mask=r_in[:, None] & m_in[None, :], other=0.0
    )
    if BIAS_X:
        last = tl.load(Qx + M * Qx_m + r * Qx_x, mask=r_in, other=0.0).to(tl.float32)
    xs = x + b * x_b + block.to(tl.int64)[None, :] * x_t + m.to(tl.int64)[:, None] * x_m
    ys = y + b * y_b + block.to(tl.int64)[:, None] * y_t + n.to(tl.int64)[None, :] * y_n
    S = tl.zeros((ROWS, WIDTH), tl.float32)
    ones = tl.zeros((ROWS,), tl.float32)
    for t in range(0, T, BLOCK):
        t_in = block < T - t
        xt = tl.load(xs, mask=m_in[:, None] & t_in[None, :], other=0.0)
        yt = tl.load(ys, mask=t_in[:, None] & n_in[None, :], other=0.0)
        Z = tl.dot(into, xt)
        if BIAS_X:
            Z += last[:, None]
        Z = Z.to(xt.dtype)
        if BIAS_Y:
            ones += tl.sum(Z.to(tl.float32), 1)
        S = tl.dot(Z, yt, S)
        xs += tl.cast(BLOCK, tl.int64) * x_t
        ys += tl.cast(BLOCK, tl.int64) * y_t
    rotated = S.to(y.dtype.element_ty)
    score = tl.zeros((ROWS,), tl.float32)
    for first in range(0, Y, BLOCK):
        c = first + block
        c_in = c < Y
        inside = r_in[:, None] & c_in[None, :]
        turn = tl.load(
            Qy + n[:, None] * Qy_n + c[None, :] * Qy_y,
            mask=n_in[:, None] & c_in[None, :],
            other=0.0,
        )
        R = tl.dot(rotated, turn)
        if BIAS_Y:
            row = tl.load(Qy + N * Qy_n + c * Qy_y, mask=c_in, other=0.0).to(tl.float32)
            R += ones[:, None] * row[None, :]
        scale = tl.load(lam + r[:, None] * lam_x + c[None, :] * lam_y, mask=inside, other=1.0)
        scale += damping
        if SCORE:
            score += tl.sum(tl.where(inside, R * R / scale, 0.0), 1)
        else:
            P = out + b * out_b + r.to(tl.int64)[:, None] * out_x + c.to(tl.int64)[None, :] * out_y
            tl.store(P, R / scale, mask=inside)
    if SCORE:
        s = out + b * out_b + at * out_x
        value = tl.sum(score)
        if ADD:
            value += tl.load(s)
        tl.store(s, value)


def narrow(
    out: Tensor,
    g: Tensor,
    a: Tensor,
    Qg: Tensor | None,
    Qa: Tensor | None,
    lam: Tensor,
    damping: float,
    bias: bool,
    order: str | None,
) -> bool:
    """Fill P [B,O,J] or add to s [B], if the layer is narrow and no order is forced; whether so."""
    if order or Qg is None or Qa is None:
        return False
    (B, T, O), I = g.shape, a.shape[2]
    by = config(Shape(g.element_size(), B, T, I, O, bias=bias), chip(g.device))
    if by is None:
        return False
    sides, lam = [(g, Qg, False), (a, Qa, bias)], lam if O >= I else lam.mT
    (x, Qx, bias_x), (y, Qy, bias_y) = sides if O >= I else sides[::-1]
    strips = cdiv(len(Qx), ROWS)
    score = out.ndim == 1
    if not score:
        to = out if O >= I else out.mT
    elif strips == 1:
        to = out[:, None, None]
    else:
        to = torch.empty((strips, len(out)), device=out.device).T[..., None]
    run(
        narrow_kernel,
        by.grid,
        to,
        x,
        y,
        Qx,
        Qy,
        lam,
        damping,
        strips,
        T,
        x.shape[2],
        y.shape[2],
        *lam.shape,
        *to.stride(),
        *x.stride(),
        *y.stride(),
        *Qx.stride(),
        *Qy.stride(),
        *lam.stride(),
        SCORE=score,
        ADD=score and strips == 1,
        BIAS_X=bias_x,
        BIAS_Y=bias_y,
        ROWS=ROWS,
        HEIGHT=by.height,
        WIDTH=by.width,
        BLOCK=BLOCK,
        **options(by.warps, by.stages),
    )
    if score and strips > 1:
        fold(out, to[..., 0].T)
    return True
