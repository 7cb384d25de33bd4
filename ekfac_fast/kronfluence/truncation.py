"""Rank-K factors L R of preconditioned queries, found in the eigenbasis, rotated back when thin.

A rotation changes neither singular values nor what a truncation loses, so M = Qg^T P Qa is
factorised where it was computed and only L and R travel to weight space. As in kronfluence, L
carries the singular values and R has orthonormal rows.
"""

import torch
from torch import Tensor

from ..curvature.basis import Eigenvectors
from ..curvature.low_rank import POWER_ITERATIONS, rotate_back, truncate, truncate_exactly


def low_rank(
    M: Tensor, rank: int, basis: Eigenvectors, exact: bool, randomised: bool
) -> tuple[Tensor, Tensor]:
    """L [Q,O,K] and R [Q,K,J] in weight space, in the dtype of M (fp32 or fp64).

    Args:
        M: [Q,O,J], preconditioned gradients in the eigenbasis.
        rank: K < min(O, J).
        basis: of M.
        exact: kronfluence's `use_full_svd`.
        randomised: `curvature.low_rank.truncate` instead of either of kronfluence's ways.
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


def truncate_as_kronfluence(M: Tensor, rank: int, basis: Eigenvectors) -> tuple[Tensor, Tensor]:
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
