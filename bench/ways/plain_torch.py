"""The best ways to each quantity in plain torch: the gradients are written to memory.

Same arguments as our ops, and as few operations: each side is rotated by tokens where that is
cheaper. Written to be compiled by torch.compile, too. x is the input with ones appended.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .kronfluence_order import einsum, with_ones


def gradients(g: Tensor, a: Tensor, Qg: Tensor | None, Qa: Tensor | None, bias: bool) -> Tensor:
    """Qg^T G_b Qa of every sequence: one bmm, [B,O,J]."""
    (B, T, O), J = g.shape, a.shape[-1] + bias
    if Qg is not None and T < J:
        g, Qg = g @ Qg, None
    if Qa is not None and T < O:
        rows = a.flatten(0, 1)
        a = (torch.addmm(Qa[-1], rows, Qa[:-1]) if bias else rows @ Qa).view(B, T, J)
        Qa, bias = None, False
    G = torch.bmm(g.mT, with_ones(a, bias))
    G = G if Qa is None else G @ Qa
    return G if Qg is None else Qg.mT @ G


def einsum_gradients(g: Tensor, a: Tensor, Qg: Tensor, Qa: Tensor, bias: bool) -> Tensor:
    """The same, contracted along opt_einsum's path of fewest FLOPs."""
    return einsum("bto,bti,op,ij->bpj", g, with_ones(a, bias), Qg, Qa)


def covariance(cov: Tensor, x: Tensor, mask: None = None, bias: bool = False) -> None:
    """One GEMM onto the full square; on a GPU 16-bit operands are summed in fp32."""
    rows = with_ones(x, bias)
    if rows.dtype == cov.dtype:
        cov.addmm_(rows.mT, rows)
    elif rows.is_cuda:
        torch.addmm(cov, rows.mT, rows, out_dtype=cov.dtype, out=cov)
    else:
        cov.add_(rows.mT @ rows)


def eigenvalues(
    lam_sum: Tensor,
    g: Tensor,
    a: Tensor,
    Qg: Tensor | None,
    Qa: Tensor | None,
    bias: bool = False,
    order: None = None,
    form: Callable[..., Tensor] = gradients,
) -> None:
    """Gradients, squared, summed over sequences."""
    lam_sum += form(g, a, Qg, Qa, bias).to(lam_sum.dtype).square().sum(0)


def precondition(
    g: Tensor,
    a: Tensor,
    Qg: Tensor | None,
    Qa: Tensor | None,
    lam: Tensor,
    damping: float,
    bias: bool = False,
    order: None = None,
    form: Callable[..., Tensor] = gradients,
) -> Tensor:
    """Gradients, divided."""
    return form(g, a, Qg, Qa, bias) / (lam + damping)


def self_influence(
    s: Tensor,
    g: Tensor,
    a: Tensor,
    Qg: Tensor | None,
    Qa: Tensor | None,
    lam: Tensor,
    damping: float,
    bias: bool = False,
    order: None = None,
    form: Callable[..., Tensor] = gradients,
) -> None:
    """Gradients, squared, divided, summed over both features."""
    squares = form(g, a, Qg, Qa, bias).to(lam.dtype).square()
    s += (squares / (lam + damping)).sum((1, 2))


def dense_scores(s: Tensor, P: Tensor, g: Tensor, a: Tensor, bias: bool = False) -> None:
    """Gradients, then one GEMM with all queries; per token a product with every query."""
    x = with_ones(a, bias)
    if s.ndim == 2:
        s += P.flatten(1) @ torch.bmm(g.mT, x).flatten(1).mT
    else:
        s += ((g.flatten(0, 1) @ P).view(len(P), *x.shape) * x).sum(-1, dtype=s.dtype)


def arranged(L: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of all queries side by side, once and for all calls: [O,QK] and [J,QK]."""
    return L.permute(1, 0, 2).flatten(1).contiguous(), R.flatten(0, 1).mT.contiguous()


def low_rank_scores(
    s: Tensor, left: Tensor, right: Tensor, g: Tensor, a: Tensor, bias: bool = False
) -> None:
    """Two GEMMs with `arranged` factors, one reduction."""
    (B, T, _), Q = g.shape, len(s)
    rows = a.flatten(0, 1)
    V = torch.addmm(right[-1], rows, right[:-1]) if bias else rows @ right
    terms = ((g.flatten(0, 1) @ left) * V).view(B, T, Q, -1)
    if s.ndim == 2:
        s += terms.sum((1, 3), dtype=s.dtype).mT
    else:
        s += terms.sum(3, dtype=s.dtype).permute(2, 0, 1)


def ways(quantity: str, rotated: bool, compiled: bool) -> dict[str, Callable]:
    """Everything that computes `quantity`, by the name it has in a row.

    Args:
        quantity: the stem of an op; `low_rank_scores` takes `arranged` factors.
        rotated: g and a are in the eigenbasis, so that no path is left to choose.
        compiled: torch.compile them, too.
    """
    function = globals()[quantity]
    if quantity == "covariance":
        return {"addmm": function}  # nothing to fuse
    if quantity.endswith("_scores"):
        # kronfluence's own contraction of scores is opt_einsum's path.
        found = {"GEMMs + reduction": function}
    else:
        found = {"bmm + pointwise": function}
        if not rotated:
            found["opt_einsum"] = partial(function, form=einsum_gradients)
    if compiled:
        found[f"{next(iter(found))}, compiled"] = torch.compile(function, dynamic=False)
    return found
