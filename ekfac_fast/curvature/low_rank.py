"""Rank-K factors L R of preconditioned gradients, found in the eigenbasis, rotated back when thin.

A rotation changes neither singular values nor what a truncation loses.
"""

from functools import lru_cache, partial

import torch
from torch import Tensor

from .blocks import Matrix
from .threads import eigh

OVERSAMPLING = 16
POWER_ITERATIONS = 2
# Below this ratio of singular values, squaring them in fp64 costs more than 1e-11 of the largest.
RESOLVED = 1e-5


def truncate(P: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rank-K factors L R ~ P of every query, by randomised SVD (Halko et al. 2011, Alg. 4.4, 5.1).

    The range is found from K + 16 random columns and two power iterations, all of them matrix
    products; bases are orthonormalised through an fp64 Gram matrix, whose Cholesky factor costs
    less than a QR and is as accurate as the range needs. `captured_energy` tells what was kept.

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
    basis = _orthonormal(P @ _random(J, columns, seed, P.dtype, P.device))
    for _ in range(POWER_ITERATIONS):
        basis = _orthonormal(P @ _orthonormal(P.mT @ basis))
    small = basis.mT @ P
    # Left singular vectors of the small matrix, largest first (eigh is ascending).
    wide = small.double()
    directions = torch.linalg.eigh(wide @ wide.mT)[1].flip(-1)[..., :rank].to(P.dtype)
    return basis @ directions, directions.mT @ small


def captured_energy(P: Tensor, L: Tensor, R: Tensor) -> Tensor:
    """Share of ||P_q||^2 that the factors from `truncate` keep: [Q], 1 where P_q is zero.

    Far below 1 means a flat spectrum: low rank does not represent this query, use a higher one.
    """
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    if P.device.type == "cpu":
        # One after the other: of several at once PyTorch makes copies in fp64.
        total = torch.tensor([norm(x) for x in P], dtype=torch.float64).square()
    else:
        total = norm(P, dim=(1, 2)).square()
    # ||L R||^2 = <L^T L, R R^T>, for any factors.
    L, R = L.double(), R.double()
    kept = ((L.mT @ L) * (R @ R.mT)).sum((1, 2))
    return torch.where(total > 0, kept / total, 1.0)


def rotate_back(
    L: Tensor, R: Tensor, Qg: Matrix | None, Qa: Matrix | None
) -> tuple[Tensor, Tensor]:
    """Thin factors from the eigenbasis to weight space: Qg L [Q,O,K] and R Qa^T [Q,K,J]; None where
    a side is not rotated.
    """
    if Qg is not None:
        # All queries side by side: `Qg @ L` would read Qg once a query.
        Q, O, K = L.shape
        left = Qg @ L.permute(1, 0, 2).reshape(O, Q * K)
        L = left.view(-1, Q, K).permute(1, 0, 2).contiguous()
    return L, R if Qa is None else R @ Qa.mT


@lru_cache(maxsize=16)
def _random(J: int, columns: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random columns [J,columns], normal: the same for every batch, drawn and moved once."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(J, columns, generator=generator, dtype=torch.float64)
    return drawn.to(device, dtype)


def _orthonormal(Y: Tensor) -> Tensor:
    """Columns spanning those of Y [Q,n,k], orthonormal; near zero where Y is rank deficient.

    Y C^-T with C C^T = Y^T Y, shifted by what rounding makes of its zeros: no eigendecomposition,
    for which the host would wait on a GPU.
    """
    wide = Y.double()
    gram, eps = wide.mT @ wide, torch.finfo(torch.float64)
    one = torch.eye(Y.shape[-1], dtype=wide.dtype, device=Y.device)
    shift = gram.diagonal(dim1=-2, dim2=-1).sum(-1) * (eps.eps * len(one)) + eps.tiny
    C, _ = torch.linalg.cholesky_ex(gram + shift[:, None, None] * one)
    inverse = torch.linalg.solve_triangular(C, one.expand_as(C), upper=False)
    return (wide @ inverse.mT).to(Y.dtype)


def truncate_exactly(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-K factors, as from a full SVD, through the Gram matrix of the smaller side.

    Its fp64 eigenvectors give the directions to 1.5e-8 of the largest singular value or better:
    exact for fp32. In fp64, a query whose K-th singular value is below `RESOLVED` of its first is
    handed to LAPACK's SVD. One eigh replaces an SVD that costs 3 to 100 times as much.
    """
    tall = M.shape[1] > M.shape[2]
    A = M.mT if tall else M
    wide = A.double()
    values, vectors = eigh(wide @ wide.mT)
    directions = vectors[..., -rank:].flip(-1).to(M.dtype)
    rows = directions.mT @ A
    scale = rows.norm(dim=-1, keepdim=True)
    L, R = (rows.mT, directions.mT) if tall else _scaled(directions, rows, scale)
    if M.dtype == torch.float64:
        for q in (values[:, -rank] < RESOLVED**2 * values[:, -1]).nonzero().flatten().tolist():
            U, S, Vh = torch.linalg.svd(M[q], full_matrices=False)
            L[q], R[q] = U[:, :rank] * S[:rank], Vh[:rank]
    return L, R


def _scaled(directions: Tensor, rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Move the singular values from the rows of R to the columns of L."""
    return directions * scale.mT, torch.where(scale > 0, rows / scale, 0)
