"""s_qb += sum_tk (g_bt . L_q[:,k]) (R_q[k,:] . (a_bt, 1)): rank-K queries' scores (Sec. 3.2).

    s     [Q,B] or [Q,B,T]  fp32 (fp64)  running sum over layers; with T, token t's term
    L     [Q,O,K]           operand      left factors, weight space (or the basis of g)
    R     [Q,K,J]           operand      right factors; bias: column J meets a constant 1
    g, a  [B,T,O], [B,T,I]  operands     as in `eigenvalues`

Two products and the reduction over rank and tokens in one pass: no [B,T,Q,K] tensor, and dense
queries L_q R_q are never rebuilt. Scans call `laid_out` on their factors once.

On a GPU few numbers in bf16 are rounded once more, multiplied, before the last sums.

On a CPU bf16 products of few rows or columns, and all of fewer than `LANES` columns, are `mm`
itself; without AVX-512, and on Intel processors, so are all of fp32 of more than 32 rows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .shapes import Cost, Shape, check, wide
from .testing.sampling import Sample, draw, strided

SCHEMA = "(Tensor(a!) s, Tensor L, Tensor R, Tensor g, Tensor a, bool bias=False) -> ()"
SHAPES = "s[Q,B]|[Q,B,T] L[Q,O,K] R[Q,K,J] g[B,T,O] a[B,T,I]"
LANES = 16
torch.library.define("ekfac_fast::low_rank_scores", SCHEMA)


def reference(s: Tensor, L: Tensor, R: Tensor, g: Tensor, a: Tensor, bias: bool = False) -> None:
    """The equation above; products in the operands' dtype, the last sums in the accumulator's."""
    check("low_rank_scores", SHAPES, (s, L, R, g, a), bias=bias)
    left = torch.einsum("bto,qok->qbtk", g, L).to(s.dtype)
    right = torch.einsum("bti,qki->qbtk", a, R[..., : a.shape[-1]]).to(s.dtype)
    if bias:
        right = right + R[:, None, None, :, -1]
    s += torch.einsum("qbtk,qbtk->qbt" if s.ndim == 3 else "qbtk,qbtk->qb", left, right)


torch.library.impl("ekfac_fast::low_rank_scores", "default", reference)


def laid_out(L: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """The same L and R as many calls want them: once per stage, as much memory as they have.

    On a CPU the queries' factors lie side by side, [O,QK] and [J,QK] in memory, and are multiplied
    in place; if there are fewer than `LANES`, one after the other, [QK,O] and [QK,J]. Elsewhere
    [O,QK] and [QK,J], rows at multiples of 16 bytes, as the copy engines of GPUs read them. Any
    layout is right.
    """
    if L.device.type == "cpu":
        if len(L) * L.shape[2] < LANES:
            return L.mT.contiguous().mT, R.contiguous()
        left, right = L.permute(1, 0, 2).contiguous(), R.permute(2, 0, 1).contiguous()
        return left.permute(1, 0, 2), right.permute(1, 2, 0)
    (Q, K, J), unit = R.shape, 16 // R.element_size()
    rows = R.new_empty(Q, K, -(-J // unit) * unit)[..., :J]
    return L.permute(1, 0, 2).contiguous().permute(1, 0, 2), rows.copy_(R)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    """Tile edges in every letter, per sequence and per token, strides, padding, empties."""
    for why, Q, K, B, T, I, O, bias in (
        ("smallest", 1, 1, 1, 1, 1, 1, False),
        ("primes", 5, 3, 3, 37, 67, 131, True),
        ("a tile and one more", 17, 32, 3, 65, 129, 65, False),
        ("a tile less one", 3, 63, 2, 127, 63, 127, True),
        ("rank beyond a tile", 2, 150, 2, 33, 160, 170, True),
        ("more rows than meet columns in place", 3, 5, 9, 30, 40, 50, True),
        ("no queries", 0, 2, 2, 4, 5, 6, True),
        ("no sequences", 3, 2, 0, 4, 5, 6, True),
    ):
        shape = Shape(B=B, T=T, I=I, O=O, Q=Q, K=K, bias=bias)
        for per_token in (False, True):
            s = torch.randn((Q, B, T) if per_token else (Q, B)).to(device, wide(dtype))
            L = draw(Q, O, K, dtype=dtype, device=device)
            R = draw(Q, K, shape.J, dtype=dtype, device=device)
            g, a = (draw(B, T, F, dtype=dtype, device=device) for F in (O, I))
            label = f"{why}{', per token' if per_token else ''}"
            yield Sample(label, shape, (s, L, R, g, a, bias), terms=T * K + O + I)
            if why == "primes":
                views = (strided(L), strided(R), strided(g), strided(a))
                yield Sample(f"strided, {label}", shape, (s, *views, bias), terms=T * K + O + I)


def cost(shape: Shape, itemsize: int = 4) -> Cost:
    """Two products over all rows, one multiply-add to close them; factors and rows read once."""
    N, O, J, Q, K = shape.N, shape.O, shape.J, shape.Q, shape.K
    moved = N * (O + shape.I) + Q * K * (O + J)
    return Cost(2 * N * Q * K * (O + J + 1), moved * itemsize + 2 * 4 * Q * shape.B)
