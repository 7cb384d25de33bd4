"""cov += x^T diag(mask) x: the uncentred second moment of inputs or gradients (Eq. 16).

    cov   [J,J]  fp32 (fp64)  running sum over rows, symmetric; both triangles are current on return
    x     [N,I]  operand      one row per token
    mask  [N]    bool or 0/1  rows with 0 contribute nothing, not even a NaN; None keeps every row
    bias                      the rows are (x, 1): J = I + 1, the last row of cov is the column sum

Kernels skip masked rows, compute one triangle and accumulate in fp32 whatever the operands are. On
a CPU an fp32 covariance of one tile (J <= 144) or of few rows (N <= 32) is `addmm` itself; without
AVX-512 of two tiles (J <= 272) or of 128 rows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .shapes import Cost, Shape, check
from .testing.sampling import Sample, draw, spd, strided

SCHEMA = "(Tensor(a!) cov, Tensor x, Tensor? mask=None, bool bias=False) -> ()"
SHAPES = "cov[J,J] x[N,I] mask[N]"
torch.library.define("ekfac_fast::covariance", SCHEMA)


def reference(cov: Tensor, x: Tensor, mask: Tensor | None = None, bias: bool = False) -> None:
    """The equation above, in the accumulator's dtype."""
    check("covariance", SHAPES, (cov, x, mask), bias=bias)
    x = x.to(cov.dtype)
    if mask is not None:
        x = torch.where(mask.bool().unsqueeze(-1), x, 0)
    I = x.shape[1]
    cov[:I, :I] += x.T @ x
    if bias:
        cov[I, :I] += x.sum(0)
        cov[:I, I] += x.sum(0)
        cov[I, I] += x.shape[0] if mask is None else mask.bool().sum()


torch.library.impl("ekfac_fast::covariance", "default", reference)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    """Tile edges, bias, masks over NaN, strides, empties, onto a cov that is not zero."""
    for why, N, I, bias in (
        ("one row", 1, 5, False),
        ("primes", 257, 131, True),
        ("a tile and one more", 129, 257, False),
        ("a tile less one", 63, 255, True),
        ("long sum", 4096, 48, False),
        ("sum in parts", 8449, 15, True),
        ("no rows", 0, 7, True),
    ):
        shape = Shape(B=N, I=I, bias=bias)
        x = draw(N, I, dtype=dtype, device=device)
        yield Sample(why, shape, (spd(shape.J, x), x, None, bias), terms=max(N, 1))
    shape = Shape(B=200, I=70, bias=True)
    x, cov = draw(200, 70, dtype=dtype, device=device), spd(71, draw(1, dtype=dtype, device=device))
    for why, mask in (
        ("boolean mask", torch.arange(200, device=device) % 3 > 0),
        ("integer mask", (torch.arange(200, device=device) % 2).long()),
        ("everything masked", torch.zeros(200, dtype=torch.bool, device=device)),
    ):
        poisoned = torch.where(mask.bool().unsqueeze(-1), x, torch.nan)
        yield Sample(f"{why} over NaN", shape, (cov.clone(), poisoned, mask, True), terms=200)
    yield Sample("strided", shape, (cov.clone(), strided(x), None, True), terms=200)
    yield Sample("transposed cov", shape, (cov.clone().T, x, None, True), terms=200)
    yield Sample("large values", shape, (cov.clone(), x * 64, None, True), terms=200)


def cost(shape: Shape, itemsize: int = 4) -> Cost:
    """One triangle of the product; x read once, both triangles of cov read and written."""
    N, J = shape.N, shape.J
    return Cost(N * J * (J + 1), N * shape.I * itemsize + 2 * 4 * J * J)
