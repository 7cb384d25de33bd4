"""The contractions that kronfluence 1.0.1 computes for each of our quantities, in plain torch.

Only its arithmetic: no hooks, no copies of inputs, eigenvectors and reciprocal eigenvalues already
on the device and in the dtype. Its names: x [B,T,J] is the input with ones appended, d [B,T,O] the
output's gradient, G [B,O,J] per-sample gradients, which it always forms.
"""

from functools import cache

import torch
from opt_einsum import DynamicProgramming, contract_path
from torch import Tensor


def with_ones(a: Tensor, bias: bool) -> Tensor:
    """x: a layer's input, concatenated with ones where it has a bias."""
    return torch.cat([a, a.new_ones((*a.shape[:-1], 1))], dim=-1) if bias else a


def per_sample_gradients(g: Tensor, a: Tensor, bias: bool) -> Tensor:
    """G, materialised."""
    return torch.einsum("b...i,b...o->bio", g, with_ones(a, bias))


def precondition(G: Tensor, Qg: Tensor, Qa: Tensor, inverse: Tensor) -> Tensor:
    """Rotate, divide, rotate back: four products on gradients. `inverse` is 1 / (lam + damping)."""
    rotated = torch.matmul(Qg.t(), torch.matmul(G, Qa)).mul_(inverse)
    return torch.matmul(Qg, torch.matmul(rotated, Qa.t()))


def covariance(cov: Tensor, x: Tensor, bias: bool) -> Tensor:
    """The full square, both triangles."""
    rows = with_ones(x, bias)
    return cov.addmm_(rows.t(), rows)


def eigenvalues(
    lam_sum: Tensor, g: Tensor, a: Tensor, Qg: Tensor, Qa: Tensor, bias: bool
) -> Tensor:
    """Gradients rotated, squared, summed over the batch."""
    G = per_sample_gradients(g, a, bias)
    rotated = torch.matmul(Qg.t(), torch.matmul(G, Qa))
    return lam_sum.add_(rotated.square_().sum(dim=0))


def self_influence(
    g: Tensor, a: Tensor, Qg: Tensor, Qa: Tensor, inverse: Tensor, bias: bool
) -> Tensor:
    """The gradient times the preconditioned gradient, rotated back."""
    G = per_sample_gradients(g, a, bias)
    return precondition(G, Qg, Qa, inverse).mul_(G).sum(dim=(1, 2))


def queries(
    g: Tensor, a: Tensor, Qg: Tensor, Qa: Tensor, inverse: Tensor, bias: bool, rank: int, full: bool
) -> tuple[Tensor, Tensor]:
    """Preconditioned gradients as low-rank factors: `svd_lowrank`, or every singular vector."""
    P = precondition(per_sample_gradients(g, a, bias), Qg, Qa, inverse).float().contiguous()
    if full:
        U, S, V = torch.linalg.svd(P, full_matrices=False)
        left, right = U[:, :, :rank] @ torch.diag_embed(S[:, :rank]), V[:, :rank].clone()
    else:
        U, S, V = torch.svd_lowrank(P, q=rank)
        left, right = U @ torch.diag_embed(S), V.transpose(1, 2)
    return left.to(g.dtype), right.to(g.dtype)


def dense_scores(P: Tensor, g: Tensor, a: Tensor, bias: bool, per_token: bool) -> Tensor:
    """One einsum along the path of fewest FLOPs."""
    expression = "qio,bti,bto->qbt" if per_token else "qio,b...i,b...o->qb"
    return einsum(expression, P, g, with_ones(a, bias))


def low_rank_scores(
    L: Tensor, R: Tensor, g: Tensor, a: Tensor, bias: bool, per_token: bool
) -> Tensor:
    """One einsum along the path of fewest FLOPs, which may rebuild the dense queries."""
    expression = "qik,qko,bti,bto->qbt" if per_token else "qik,qko,b...i,b...o->qb"
    return einsum(expression, L, R, g, with_ones(a, bias))


def einsum(expression: str, *operands: Tensor) -> Tensor:
    """An einsum along opt_einsum's path of fewest FLOPs."""
    path = _path(expression, *(x.shape for x in operands))
    return torch._VF.einsum(expression, operands, path=path)


@cache
def _path(expression: str, *shapes: tuple[int, ...]) -> list[int]:
    """kronfluence's choice of path; it too computes it once and keeps it."""
    best = DynamicProgramming(search_outer=True, minimize="flops")
    pairs = contract_path(expression, *shapes, shapes=True, optimize=best)[0]
    return [operand for pair in pairs for operand in pair]
