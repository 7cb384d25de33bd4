"""cov[i,j] += sum_n keep[n] x[n,i] x[n,j]: tiles on and below the diagonal, written twice.

The gradient tile with x on both sides and rows as tokens. Tiles above the diagonal are not
launched; the lower triangle of cov is read, both are written, so cov stays exactly symmetric. Rows
are split between programs where the triangle does not fill the chip. The bias row is column sums.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gradient_tile import column_sums, product_tile, tile_at
from .launch import (
    Chip,
    Config,
    Shape,
    cdiv,
    chip,
    launcher,
    options,
    precision,
    run,
    splits,
    tile,
)


@triton.jit
def triangle(p):
    """Row and column of the p-th tile of a triangle, row by row: p = row (row + 1) / 2 + column."""
    row = ((tl.sqrt((8 * p + 1).to(tl.float32)) - 1) / 2).to(tl.int32)
    # The root is rounded: one step either way corrects it.
    row = tl.where(row * (row + 1) // 2 > p, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= p, row + 1, row)
    return row, p - row * (row + 1) // 2


@triton.jit
def grouped_triangle(p, rows, GROUP: tl.constexpr):
    """The p-th tile with row >= column, in bands of GROUP rows that share their columns in L2."""
    row, _ = triangle(p)
    band = row // GROUP * GROUP
    height = min(rows - band, GROUP)
    p -= band * (band + 1) // 2
    beside, below = triangle(tl.maximum(p - band * height, 0))
    in_square = p < band * height
    row = tl.where(in_square, band + p % height, band + beside)
    return row, tl.where(in_square, p // height, band + below)


@triton.jit
def halves(Z, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The upper and the lower half of a tile."""
    return tl.split(tl.permute(tl.reshape(Z, (2, ROWS // 2, COLUMNS)), (1, 2, 0)))


@triton.jit
def add_both(cov, Z, row, column, J, cov_i, cov_j, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """cov[i,j] += Z[i,j] for i >= j, and cov[j,i] = cov[i,j], from element [row,column] on."""
    i, j = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    at = tile_at(cov, row, column, cov_i, cov_j, ROWS, COLUMNS)
    inside = (i < J) & (i >= j)
    Z += tl.load(at, mask=inside, other=0.0)
    tl.store(at, Z, mask=inside)
    i, j = row + tl.arange(0, ROWS)[None, :], column + tl.arange(0, COLUMNS)[:, None]
    at = tile_at(cov, column, row, cov_i, cov_j, COLUMNS, ROWS)
    tl.store(at, tl.trans(Z), mask=(i < J) & (i > j))


@triton.jit
def covariance_kernel(
    out,  # cov [J,J], or parts [S,tiles,BLOCK,BLOCK]
    x,  # [N,I]
    keep,  # [N] or None
    N,
    I,
    J,
    tiles,
    out_i,
    out_j,
    x_n,
    x_i,
    keep_n,
    per_split,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the triangle over `per_split` rows: into cov (ADD), or into its part."""
    p, split = tl.program_id(0), tl.program_id(1)
    row, column = grouped_triangle(p, tl.cdiv(J, BLOCK), 8)
    here = tl.arange(0, BLOCK)
    i, j = row * BLOCK + here, column * BLOCK + here
    first = split.to(tl.int64) * per_split
    n = min(N - first, per_split).to(tl.int32)
    x += first * x_n
    if keep is not None:
        keep += first * keep_n
    xi, xj = x + i.to(tl.int64) * x_i, x + j.to(tl.int64) * x_i
    # A tile row that holds the bias only has no product to make.
    terms = tl.where(row * BLOCK < I, n, 0)
    Z = product_tile(
        xi, xj, i < I, j < I, terms, x_n, x_n, keep, keep_n, BLOCK, BLOCK, BLOCK_N, PRECISION
    )
    if BIAS:
        terms = tl.where((row + 1) * BLOCK > I, n, 0)
        sums = column_sums(xj, j < I, j == I, terms, x_n, keep, keep_n, BLOCK, BLOCK_N)
        Z = tl.where(i[:, None] == I, sums[None, :], Z)
    if ADD:
        # In halves: all addresses of a tile at once do not fit registers.
        upper, lower = halves(Z, BLOCK, BLOCK)
        i, j = row * BLOCK, column * BLOCK
        H: tl.constexpr = BLOCK // 2
        add_both(out, upper, i, j, J, out_i, out_j, H, BLOCK)
        add_both(out, lower, i + H, j, J, out_i, out_j, H, BLOCK)
    else:
        out += (split * tiles + p).to(tl.int64) * (BLOCK * BLOCK)
        tl.store(out + here[:, None] * BLOCK + here[None, :], Z)


@triton.jit
def covariance_fold_kernel(
    cov,  # [J,J]
    parts,  # [S,tiles,BLOCK,BLOCK]
    S,
    J,
    tiles,
    cov_i,
    cov_j,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Sum the parts of PIECE rows of a tile, always in the same order, and write both triangles."""
    p, piece = tl.program_id(0), tl.program_id(1)
    row, column = grouped_triangle(p, tl.cdiv(J, BLOCK), 8)
    here = tl.arange(0, PIECE)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    parts += p.to(tl.int64) * (BLOCK * BLOCK) + piece * (PIECE * BLOCK)
    Z = tl.zeros((PIECE, BLOCK), tl.float32)
    for _ in range(S):
        Z += tl.load(parts + here)
        parts += tl.cast(tiles, tl.int64) * (BLOCK * BLOCK)
    add_both(cov, Z, row * BLOCK + piece * PIECE, column * BLOCK, J, cov_i, cov_j, PIECE, BLOCK)


@lru_cache(maxsize=4096)
def config(shape: Shape, chip: Chip) -> Config:
    """Tiles of the triangle, over all rows or parts of them."""
    # Two accumulators' tiles are square, as a triangle of them must be.
    by = tile(shape.I, shape.I, shape.itemsize, chip)
    rows, steps = cdiv(shape.J, by.rows), cdiv(shape.N, by.step)
    tiles = rows * (rows + 1) // 2
    per_split = cdiv(steps, splits(tiles, shape.N, steps, chip)) * by.step
    parts = cdiv(shape.N, per_split)
    return Config(by, (tiles, parts), parts, per_split)


@launcher
def covariance(cov: Tensor, x: Tensor, mask: Tensor | None = None, bias: bool = False) -> None:
    """The op `ekfac_fast::covariance` on a GPU; reads the lower triangle of the symmetric cov."""
    N, I = x.shape
    if N == 0:
        return
    by = config(Shape(x.element_size(), B=N, I=I, bias=bias), chip(x.device))
    J, BLOCK, (tiles, S) = I + bias, by.tile.rows, by.grid
    # A transposed accumulator is the same matrix: its lower triangle is read along rows.
    cov = cov if cov.stride(1) <= cov.stride(0) else cov.T
    out = cov if S == 1 else torch.empty((S, tiles, BLOCK, BLOCK), device=x.device)
    run(
        covariance_kernel,
        by.grid,
        out,
        x,
        mask,
        N,
        I,
        J,
        tiles,
        *cov.stride(),
        *x.stride(),
        0 if mask is None else mask.stride(0),
        by.per_split,
        ADD=S == 1,
        BIAS=bias,
        BLOCK=BLOCK,
        BLOCK_N=by.tile.step,
        PRECISION=precision(x.dtype),
        **by.tile.options,
    )
    if S > 1:
        grid = (tiles, BLOCK // 16)
        sizes = (S, J, tiles, *cov.stride())
        run(covariance_fold_kernel, grid, cov, out, *sizes, BLOCK=BLOCK, PIECE=16, **options(4))
