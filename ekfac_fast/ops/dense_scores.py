"""s_qb += sum_oj P_q[o,j] G_b[o,j], G_b = sum_t g_bt (a_bt, 1)^T: full-rank queries' scores.

    s     [Q,B] or [Q,B,T]  fp32 (fp64)  running sum over layers; with T, token t's term
    P     [Q,O,J]           operand      preconditioned query gradients, in the basis of g and a
    g, a  [B,T,O], [B,T,I]  operands     as in `eigenvalues`; bias: column J of P meets a constant 1

Per sequence, kernels contract each gradient tile with all queries while it is in cache; per token
(Eq. 31) they contract P_q with the longer of g and a and close the sum with the other. No [B,O,J]
or [Q,B,T,O] tensor exists. Scans call `laid_out` on P once.

On a CPU gradients of at least 32 tokens are `bmm` itself, of a few sequences at a time, in bf16 or
of narrow layers; so are fp32 products per token of narrow inputs and fewer than four queries `mm`.
Without AVX-512 all fp32 products are `bmm` and `mm`, of blocks that stay in the last-level cache;
with it so are they on an Intel processor, but of two to seven sequences, or as few tokens.
On a GPU gradients that meet more than two queries are formed, 256 MiB of them at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .gradients import gradients
from .shapes import Cost, Shape, check, wide
from .testing.sampling import Sample, draw, strided

SCHEMA = "(Tensor(a!) s, Tensor P, Tensor g, Tensor a, bool bias=False) -> ()"
SHAPES = "s[Q,B]|[Q,B,T] P[Q,O,J] g[B,T,O] a[B,T,I]"
torch.library.define("ekfac_fast::dense_scores", SCHEMA)


def reference(s: Tensor, P: Tensor, g: Tensor, a: Tensor, bias: bool = False) -> None:
    """The equation above; products in the operands' dtype, the last sum in the accumulator's."""
    check("dense_scores", SHAPES, (s, P, g, a), bias=bias)
    if s.ndim == 2:
        G = gradients(g, a, bias).to(s.dtype)
        s += P.to(s.dtype).flatten(1) @ G.flatten(1).mT
        return
    gP = torch.einsum("qoj,bto->qbtj", P, g).to(s.dtype)
    s += (gP[..., : a.shape[-1]] * a).sum(-1)
    if bias:
        s += gP[..., -1]


torch.library.impl("ekfac_fast::dense_scores", "default", reference)


def laid_out(P: Tensor) -> Tensor:
    """The same P as many calls want it: once per stage, as much memory as P.

    Contiguous: rows of P are read in order and multiplied in place. Any layout is right.
    """
    return P.contiguous()


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    """Tile edges in every letter, per sequence and per token, strides, padding, empties."""
    for why, Q, B, T, I, O, bias in (
        ("smallest", 1, 1, 1, 1, 1, False),
        ("primes", 5, 3, 37, 67, 131, True),
        ("a tile and one more", 17, 9, 65, 129, 65, False),
        ("a tile less one", 7, 2, 127, 63, 127, True),
        ("many queries of narrow layers", 21, 13, 6, 17, 9, True),
        ("narrow inputs", 5, 3, 40, 17, 60, True),
        ("a query of narrow inputs", 1, 3, 11, 20, 30, True),
        ("few queries", 6, 9, 5, 140, 30, True),
        ("few queries of narrow layers", 6, 9, 33, 30, 20, False),
        ("one token", 4, 19, 1, 70, 40, True),
        ("no queries", 0, 2, 4, 5, 6, True),
        ("no sequences", 3, 0, 4, 5, 6, True),
    ):
        for per_token in (False, True):
            Q, B = (min(Q, 8), min(B, 3)) if per_token else (Q, B)
            shape = Shape(B=B, T=T, I=I, O=O, Q=Q, bias=bias)
            s = torch.randn((Q, B, T) if per_token else (Q, B)).to(device, wide(dtype))
            P = draw(Q, O, shape.J, dtype=dtype, device=device)
            g, a = (draw(B, T, F, dtype=dtype, device=device) for F in (O, I))
            label = f"{why}{', per token' if per_token else ''}"
            yield Sample(label, shape, (s, P, g, a, bias), terms=T + O * I)
            if why == "primes":
                views = (strided(P), strided(g), strided(a))
                yield Sample(f"strided, {label}", shape, (s, *views, bias), terms=T + O * I)


def cost(shape: Shape, itemsize: int = 4) -> Cost:
    """Gradient tiles once, one dot product a query and sequence; P read once."""
    B, T, O, J, Q = shape.B, shape.T, shape.O, shape.J, shape.Q
    moved = shape.N * (O + shape.I) + Q * O * J
    return Cost(2 * B * O * J * (T + Q), moved * itemsize + 2 * 4 * Q * B)
