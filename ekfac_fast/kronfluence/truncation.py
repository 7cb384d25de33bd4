"""Rank-K factors L R of preconditioned queries, found in the eigenbasis, rotated back when thin.

A rotation changes neither singular values nor what a truncation loses, so M = Qg^T P Qa is
factorised where it was computed and only L and R travel to weight space. As in kronfluence, L
carries the singular values and R has orthonormal rows.
"""

import torch
from torch import Tensor

from ..queries import rotate_back, truncate
from .preconditioner import Preconditioner
from .threads import eigh

POWER_ITERATIONS = 2
# Below this ratio of singular values, squaring them in fp64 costs more than 1e-11 of the largest.
RESOLVED = 1e-5


def low_rank(
    M: Tensor, rank: int, basis: Preconditioner, exact: bool, randomised: bool
) -> tuple[Tensor, Tensor]:
    """L [Q,O,K] and R [Q,K,J] in weight space, in the dtype of M (fp32 or fp64).

    Args:
        M: [Q,O,J], preconditioned gradients in the eigenbasis.
        rank: K < min(O, J).
        basis: of M.
        exact: kronfluence's `use_full_svd`.
        randomised: `queries.truncate` instead of either of kronfluence's ways.
    """
    if randomised:
        L, R = truncate(M, rank)
    elif exact:
        L, R = truncate_exactly(M, rank)
    else:
        L, R = truncate_as_kronfluence(M, rank, basis)
    if basis.Qg is None or basis.Qa is None:
        return L, R
    return rotate_back(L, R, basis.Qg.to(M.dtype), basis.Qa.to(M.dtype))


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


def truncate_as_kronfluence(M: Tensor, rank: int, basis: Preconditioner) -> tuple[Tensor, Tensor]:
    """`torch.svd_lowrank(P, q=K)` of P = Qg M Qa^T, without P.

    The random columns are drawn as there (same shape, dtype and generator) and rotated into the
    eigenbasis: with the generator in the same state the factors are those of kronfluence, up to
    rounding. No oversampling, two power iterations.
    """
    wide_side = M.shape[1] < M.shape[2]
    A, Q = (M.mT, basis.Qg) if wide_side else (M, basis.Qa)
    draw = torch.randn(A.shape[-1], rank, dtype=M.dtype, device=M.device)
    if Q is not None:
        draw = Q.to(M.dtype).mT @ draw
    columns = torch.linalg.qr(A @ draw).Q
    for _ in range(POWER_ITERATIONS):
        columns = torch.linalg.qr(A.mT @ columns).Q
        columns = torch.linalg.qr(A @ columns).Q
    U, S, Vh = torch.linalg.svd(columns.mT @ A, full_matrices=False)
    U = columns @ U
    if wide_side:
        return Vh.mT * S.unsqueeze(-2), U.mT
    return U * S.unsqueeze(-2), Vh


def _scaled(directions: Tensor, rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Move the singular values from the rows of R to the columns of L."""
    return directions * scale.mT, torch.where(scale > 0, rows / scale, 0)
