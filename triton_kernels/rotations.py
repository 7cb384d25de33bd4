"""Rotation into the eigenbasis, left to cuBLAS, so that one gradient tile finishes the product.

`operands` reduces Qg^T G_b Qa to sum_t x_t y_t^T whatever the contraction order: sides rotated by
tokens are rotated first; where a side is rotated on the gradient, the last such rotation is itself
a sum of that form, its "tokens" being the rows of the eigenvectors. Kernels need one loop, then.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .launch import aligned, describable, padded

# Gradients rotated as such are formed a few sequences at a time: what is written stays in L2.
CHUNK_BYTES = 32 << 20


def cheapest_order(T: int, O: int, J: int) -> str:
    """Contraction order of least FLOPs; `ekfac_fast/ops/gradients.py` computes the same."""
    return ("tokens" if T < J else "a_tokens") if T < O else "g_tokens" if T < J else "gradient"


def rotate(x: Tensor, Q: Tensor, bias: bool) -> Tensor:
    """(x, 1) Q without the ones column: x [B,T,I], Q [J,J] -> [B,T,J], rows `even(J)` apart.

    Made in that width: cuBLAS multiplies odd ones at a sixth of its rate, however their rows lie.
    """
    J, Q = Q.shape[1], aligned(Q)
    rows = x.reshape(-1, x.shape[-1])
    out = torch.addmm(Q[-1], rows, Q[:-1]) if bias else rows @ Q
    return out.view(*x.shape[:-1], -1)[..., :J]


def operands(
    g: Tensor,
    a: Tensor,
    Qg: Tensor | None,
    Qa: Tensor | None,
    bias: bool,
    order: str | None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Sequences with the x [b,t,O] and y [b,t,J] for which sum_t x_t y_t^T = Qg^T G_b Qa.

    Both are `describable`; a side that is the same for all sequences has b = 1.
    """
    B, T, O = g.shape
    J = a.shape[-1] + bias
    by = order or cheapest_order(T, O, J)
    if Qg is not None and by in ("tokens", "g_tokens"):
        g, Qg = rotate(g, Qg, False), None
    if Qa is not None and by in ("tokens", "a_tokens"):
        a, Qa, bias = rotate(a, Qa, bias), None, False
    if Qg is None and Qa is None:
        yield slice(0, B), describable(g), describable(a)
        return
    step = max(1, CHUNK_BYTES // (g.element_size() * O * padded(J)))
    for first in range(0, B, step):
        part = slice(first, min(first + step, B))
        if Qa is None:
            yield part, describable(Qg[None]), _gradients(g[part], a[part], bias)
        elif Qg is None:
            G = _gradients(g[part], a[part], bias, transposed=True)
            yield part, G, describable(Qa[None])
        else:
            yield part, describable(Qg[None]), rotate(_gradients(g[part], a[part], bias), Qa, False)


def _gradients(g: Tensor, a: Tensor, bias: bool, *, transposed: bool = False) -> Tensor:
    """sum_t g_bt (a_bt, 1)^T in the operands' dtype: [b,O,J], or [b,J,O]; rows `padded` apart."""
    (b, _, O), I = g.shape, a.shape[-1]
    rows, columns = (I + bias, O) if transposed else (O, I + bias)
    out = g.new_empty(b, rows, padded(columns))[..., :columns]
    G = out.mT if transposed else out
    torch.bmm(g.mT, a, out=G[..., :I])
    if bias:
        torch.sum(g, 1, out=G[..., I])
    return out
