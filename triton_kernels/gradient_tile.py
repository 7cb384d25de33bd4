"""The loops that every kernel of this folder is an ending of: one tile of a product, in fp32.

    product_tile   Z[m,n] = sum_k x[m,k] y[k,n]         rows and columns given by pointers
    gradient_tile  G[o,j] = sum_t g[b,t,o] a[b,t,j]     the per-sequence gradient

Pointers of `product_tile`: rows may be gathered over (b, t), columns over (q, k), and operands may
have any strides, with one loop and no copy. `gradient_tile` reads rows at multiples of 16 bytes,
through descriptors where that pays: they leave addresses and bounds to the copy engine, 40
registers a thread less and half as fast again on an H200, but take the host 20 us each a launch.
"""

import triton
import triton.language as tl


@triton.jit
def grouped(p, rows, columns, GROUP: tl.constexpr):
    """Tile p of a rows x columns grid, GROUP rows at a time so that a wave shares them in L2."""
    first = p // (GROUP * columns) * GROUP
    height = min(rows - first, GROUP)
    p %= GROUP * columns
    return first + p % height, p // height


@triton.jit
def tile_of(p, O, J, BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr):
    """First row and column of tile p of [O,J]."""
    row, column = grouped(p, tl.cdiv(O, BLOCK_O), tl.cdiv(J, BLOCK_J), 8)
    return row * BLOCK_O, column * BLOCK_J


@triton.jit
def inside_of(o, j, O, J, BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr):
    """What of the tile from element [o,j] on is in [O,J]. Asked for where it is needed: masks that
    live through a loop take registers.
    """
    return (o + tl.arange(0, BLOCK_O) < O)[:, None] & (j + tl.arange(0, BLOCK_J) < J)[None, :]


@triton.jit
def tile_at(x, row, column, x_row, x_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to a tile of x, from element [row,column] on: [ROWS,COLUMNS].

    Offsets inside a tile are 32-bit (it spans less than 2^31 elements): as 64-bit numbers they take
    half of the registers where odd strides forbid vector loads.
    """
    x += tl.cast(row, tl.int64) * x_row + tl.cast(column, tl.int64) * x_column
    return x + tl.arange(0, ROWS)[:, None] * x_row + tl.arange(0, COLUMNS)[None, :] * x_column


@triton.jit
def product_tile(
    x,  # [M] pointers to x[m,0]
    y,  # [N] pointers to y[0,n]
    x_in,  # [M] rows that exist; the others count as zero
    y_in,  # [N] columns that exist
    K,
    x_k,
    y_k,
    keep,  # pointer to keep[k], or None: terms with a 0 are skipped, whatever they hold
    keep_k,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Z[m,n] = sum_k keep[k] x[m,k] y[k,n]: [M,N] fp32."""
    k = tl.arange(0, BLOCK_K)
    # 64-bit: one step along a strided k can be long.
    xs = x[:, None] + k[None, :].to(tl.int64) * x_k
    ys = y[None, :] + k[:, None].to(tl.int64) * y_k
    Z = tl.zeros((M, N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k_in = k < K - k0
        if keep is not None:
            k_in &= tl.load(keep + (k0 + k).to(tl.int64) * keep_k, mask=k_in, other=0) != 0
        xt = tl.load(xs, mask=x_in[:, None] & k_in[None, :], other=0.0)
        yt = tl.load(ys, mask=y_in[None, :] & k_in[:, None], other=0.0)
        Z = tl.dot(xt, yt, Z, input_precision=PRECISION)
        xs += tl.cast(BLOCK_K, tl.int64) * x_k
        ys += tl.cast(BLOCK_K, tl.int64) * y_k
    return Z


@triton.jit
def column_sums(
    y,  # [N] pointers to y[0,n]
    y_in,
    ones,  # [N] columns that hold an implied 1
    K,
    y_k,
    keep,
    keep_k,
    N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sum_k keep[k] y[k,n], and sum_k keep[k] where `ones`: [N] fp32."""
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K, N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k_in = k < K - k0
        at = (k0 + k).to(tl.int64)
        if keep is not None:
            k_in &= tl.load(keep + at * keep_k, mask=k_in, other=0) != 0
        yt = tl.load(
            y[None, :] + at[:, None] * y_k, mask=y_in[None, :] & k_in[:, None], other=0.0
        ).to(tl.float32)
        total += tl.where(ones[None, :] & k_in[:, None], 1.0, yt)
    return tl.sum(total, 0)


@triton.jit
def piece(
    x,  # descriptor of [B,T,F] with COPIES, else a pointer to it, F without gaps
    b,
    t,
    f,
    T,
    F,
    x_b,
    x_t,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COPIES: tl.constexpr,
):
    """x[b,t:,f:], 0 where there is nothing: [ROWS,COLUMNS]."""
    if COPIES:
        tile = x.load([b, t, f]).reshape(ROWS, COLUMNS)
    else:
        at = x + tl.cast(b, tl.int64) * x_b + tl.cast(t, tl.int64) * x_t + f
        row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        inside = (row < T - t) & (column < F - f)
        tile = tl.load(at + row * x_t + column, mask=inside, other=0.0)
    return tile


@triton.jit
def gradient_tile(
    g,  # [B,T,O], or [1,T,O] for all sequences, as `piece` reads it
    a,  # [B,T,J]
    b_g,
    b_a,
    o,  # first output feature
    j,  # first input feature
    T,
    O,
    J,
    g_b,
    g_t,
    a_b,
    a_t,
    BLOCK_O: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    COPIES: tl.constexpr,
):
    """G[o,j] = sum_t g[b,t,o] a[b,t,j]: [BLOCK_O,BLOCK_J] fp32; 0 outside the layer."""
    G = tl.zeros((BLOCK_O, BLOCK_J), tl.float32)
    for t in range(0, T, BLOCK_T):
        x = piece(g, b_g, t, o, T, O, g_b, g_t, BLOCK_T, BLOCK_O, COPIES)
        y = piece(a, b_a, t, j, T, J, a_b, a_t, BLOCK_T, BLOCK_J, COPIES)
        G = tl.dot(x.T, y, G, input_precision=PRECISION)
    return G
