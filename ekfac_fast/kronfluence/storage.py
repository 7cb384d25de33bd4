"""kronfluence's dictionary of factors -> the basis in which one module preconditions.

Built at the start of a scoring stage, for all of kronfluence's strategies:

    identity   no basis, lam + damping = 1
    diagonal   no basis, mean of G^2
    kfac       eigenvectors, lam = outer(gradient eigenvalues, activation eigenvalues)
    ekfac      eigenvectors, corrected eigenvalues
"""

import torch
from kronfluence.factor.config import FactorStrategy
from kronfluence.utils.constants import (
    ACTIVATION_EIGENVALUES_NAME,
    ACTIVATION_EIGENVECTORS_NAME,
    GRADIENT_EIGENVALUES_NAME,
    GRADIENT_EIGENVECTORS_NAME,
    LAMBDA_MATRIX_NAME,
    NUM_LAMBDA_PROCESSED,
)
from torch import Tensor

from ..curvature.basis import HEURISTIC_DAMPING, LEAST_DAMPING, Basis
from ..errors import NotFiniteError
from ..ops.shapes import wide


def damped_eigenvalues(
    storage: dict, strategy: str, damping: float | None, sizes: tuple[int, int]
) -> Tensor:
    """lam + damping in fp64, [O,J]; damping None is 0.1 times the mean eigenvalue.

    Raises:
        NotFiniteError: an eigenvalue is not finite, or no example was counted.
    """
    if strategy == FactorStrategy.IDENTITY:
        return torch.ones((), dtype=torch.float64).expand(sizes)
    if strategy == FactorStrategy.KFAC:
        left, right = (
            storage[name].to(torch.float64)
            for name in (GRADIENT_EIGENVALUES_NAME, ACTIVATION_EIGENVALUES_NAME)
        )
        lam = torch.outer(left, right)
    else:
        lam = storage[LAMBDA_MATRIX_NAME].to(torch.float64)
        lam = lam / storage[NUM_LAMBDA_PROCESSED].to(lam.device)
    if not bool(lam.isfinite().all()):
        raise NotFiniteError(
            "the eigenvalues contain NaN or infinity: the loss overflowed when the factors were "
            "fitted, or no example was counted. Fit them again, in a wider dtype"
        )
    # kronfluence's has no least value; where all are 0 it divides 0 by 0.
    own = HEURISTIC_DAMPING * float(lam.mean()) or LEAST_DAMPING
    return lam + (own if damping is None else damping)


def build(
    storage: dict,
    strategy: str,
    damping: float | None,
    sizes: tuple[int, int],
    dtype: torch.dtype,
) -> Basis:
    """The basis of one module, its eigenvectors in `dtype`; lam is damped already."""
    lam = damped_eigenvalues(storage, strategy, damping, sizes).to(wide(dtype))
    if strategy not in (FactorStrategy.KFAC, FactorStrategy.EKFAC):
        return Basis(None, None, lam)
    Qg, Qa = (
        storage[name].to(dtype).contiguous()
        for name in (GRADIENT_EIGENVECTORS_NAME, ACTIVATION_EIGENVECTORS_NAME)
    )
    return Basis(Qg, Qa, lam)
