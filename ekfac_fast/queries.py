"""Query gradients: preconditioned, truncated in the eigenbasis, rotated back as thin factors."""

import torch
from torch import Tensor

OVERSAMPLING = 16
POWER_ITERATIONS = 2


def truncate(P: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rank-K factors L R ~ P of every query, by randomised SVD (Halko et al. 2011, Alg. 4.4, 5.1).

    The range is found from K + 16 random columns and two power iterations, all of them matrix
    products; bases are orthonormalised through an fp64 Gram matrix, whose square root costs less
    than a QR and is as accurate as the range needs. L has orthonormal columns, so
    `R.square().sum() / P.square().sum()` is the share of the energy kept: see `captured_energy`.

    Args:
        P: [Q,O,J], fp32 or fp64.
        rank: K >= 1; K >= min(O, J) gives exact factors.
        seed: of the random columns; equal seeds give equal factors, whatever the batch of queries.

    Returns:
        L [Q,O,K] and R [Q,K,J] with K = min(rank, O, J), in the dtype of P.

    Raises:
        ValueError: P is not 3-D, or rank < 1.
    """
    if P.ndim != 3:
        raise ValueError(f"truncate: P has shape {list(P.shape)}, expected [Q,O,J]")
    if rank < 1:
        raise ValueError(f"truncate: rank is {rank}, expected at least 1")
    Q, O, J = P.shape
    if rank >= O <= J:
        return torch.eye(O, dtype=P.dtype, device=P.device).expand(Q, O, O).contiguous(), P
    if rank >= J:
        return P, torch.eye(J, dtype=P.dtype, device=P.device).expand(Q, J, J).contiguous()
    columns = min(rank + OVERSAMPLING, O, J)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(J, columns, generator=generator, dtype=torch.float64).to(P)
    basis = _orthonormal(P @ basis)
    for _ in range(POWER_ITERATIONS):
        basis = _orthonormal(P @ _orthonormal(P.mT @ basis))
    small = basis.mT @ P
    # Left singular vectors of the small matrix, largest first (eigh is ascending).
    wide = small.double()
    directions = torch.linalg.eigh(wide @ wide.mT)[1].flip(-1)[..., :rank].to(P.dtype)
    return basis @ directions, directions.mT @ small


def captured_energy(P: Tensor, R: Tensor) -> Tensor:
    """Share of ||P_q||^2 that the factors from `truncate` keep: [Q], 1 where P_q is zero.

    Far below 1 means a flat spectrum: low rank does not represent this query, use a higher one.
    """
    total = P.double().square().sum((1, 2))
    return torch.where(total > 0, R.double().square().sum((1, 2)) / total, 1.0)


def rotate_back(L: Tensor, R: Tensor, Qg: Tensor, Qa: Tensor) -> tuple[Tensor, Tensor]:
    """Thin factors from the eigenbasis to weight space: Qg L [Q,O,K] and R Qa^T [Q,K,J]."""
    return Qg @ L, R @ Qa.mT


def _orthonormal(Y: Tensor) -> Tensor:
    """Columns spanning the columns of Y [Q,n,k], orthonormal; zero where Y is rank deficient."""
    wide = Y.double()
    values, vectors = torch.linalg.eigh(wide.mT @ wide)
    floor = values[..., -1:] * torch.finfo(torch.float64).eps * Y.shape[-1]
    scale = torch.where(values > floor, values, torch.inf).rsqrt()
    return (wide @ (vectors * scale.unsqueeze(-2))).to(Y.dtype)
