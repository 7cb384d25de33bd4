"""What one module needs to precondition a gradient: P = (Qg^T G Qa) / (lam + damping).

Built from kronfluence's storage at the start of a scoring stage, for all its strategies:

    identity   no basis, lam + damping = 1
    diagonal   no basis, mean of G^2
    kfac       eigenvectors, lam = outer(gradient eigenvalues, activation eigenvalues)
    ekfac      eigenvectors, corrected eigenvalues
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from kronfluence.factor.config import FactorStrategy
from kronfluence.utils.constants import (
    ACTIVATION_EIGENVALUES_NAME,
    ACTIVATION_EIGENVECTORS_NAME,
    GRADIENT_EIGENVALUES_NAME,
    GRADIENT_EIGENVECTORS_NAME,
    HEURISTIC_DAMPING_SCALE,
    LAMBDA_MATRIX_NAME,
    NUM_LAMBDA_PROCESSED,
)
from torch import Tensor

from ..ops.shapes import wide
from .eigenvalues import with_ones
from .memory import free_bytes

# Share of a GPU's memory that factors leave to the model, activations, queries and scores. Those
# that would take of it stay in CPU memory, as kronfluence's always do, and travel at each use.
RESERVED_SHARE = 0.5


@dataclass(frozen=True)
class Preconditioner:
    """`Qg` [O,O], `Qa` [J,J] in the operands' dtype, or None; `lam` [O,J], damped, fp32 or fp64."""

    Qg: Tensor | None
    Qa: Tensor | None
    lam: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> "Preconditioner":
        """`change` of its tensors."""
        Qg, Qa = (x if x is None else change(x) for x in (self.Qg, self.Qa))
        return Preconditioner(Qg, Qa, change(self.lam))

    def at(self, device: torch.device) -> "Preconditioner":
        """Itself, on `device`."""
        return self if self.lam.device == device else self.each(lambda x: x.to(device))

    def rotation(self, dtype: torch.dtype) -> "Preconditioner":
        """The basis with every eigenvalue 1, for operands of `dtype`."""
        lam = torch.ones((), dtype=wide(dtype), device=self.lam.device).expand(self.lam.shape)
        if self.Qg is None or self.Qa is None:
            return Preconditioner(None, None, lam)
        return Preconditioner(self.Qg.to(dtype), self.Qa.to(dtype), lam)

    def precondition(self, g: Tensor, a: Tensor, bias: bool) -> Tensor:
        """P [B,O,J] of every example, in the eigenbasis."""
        if self.Qa is None:
            a, bias = with_ones(a, bias), False
        return torch.ops.ekfac_fast.precondition(g, a, self.Qg, self.Qa, self.lam, 0.0, bias)

    def add_self_influence(self, s: Tensor, g: Tensor, a: Tensor, bias: bool) -> None:
        """s_b += sum (Qg^T G_b Qa)^2 / (lam + damping)."""
        if self.Qa is None:
            a, bias = with_ones(a, bias), False
        torch.ops.ekfac_fast.self_influence(s, g, a, self.Qg, self.Qa, self.lam, 0.0, bias)

    def precondition_gradient(self, G: Tensor) -> Tensor:
        """P of gradients that exist already (sums over a dataset): G [B,O,J] -> [B,O,J]."""
        if self.Qg is not None and self.Qa is not None:
            G = self.Qg.mT @ G.to(self.Qg.dtype) @ self.Qa
        return G.to(self.lam.dtype) / self.lam

    def rotate_back(self, P: Tensor) -> Tensor:
        """P [B,O,J] from the eigenbasis to weight space."""
        if self.Qg is None or self.Qa is None:
            return P
        return self.Qg.to(P.dtype) @ P @ self.Qa.to(P.dtype).mT


def damped_eigenvalues(
    storage: dict, strategy: str, damping: float | None, sizes: tuple[int, int]
) -> Tensor:
    """lam + damping in fp64, [O,J]; damping None is 0.1 times the mean eigenvalue.

    Raises:
        ValueError: an eigenvalue is not finite, or no example was counted.
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
        raise ValueError(
            "the eigenvalues contain NaN or infinity: the loss overflowed when the factors were "
            "fitted, or no example was counted. Fit them again, in a wider dtype"
        )
    return lam + (HEURISTIC_DAMPING_SCALE * lam.mean() if damping is None else damping)


def fits(sizes: tuple[int, int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the factors of a module of these sizes may stay on `device`."""
    if device.type != "cuda":
        return True
    O, J = sizes
    needed = (O * O + J * J) * dtype.itemsize + O * J * wide(dtype).itemsize
    return free_bytes(device) - needed > RESERVED_SHARE * torch.cuda.mem_get_info(device)[1]


def build(
    storage: dict,
    strategy: str,
    damping: float | None,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Preconditioner:
    """The preconditioner of one module on `device`, its eigenvectors in `dtype`."""
    lam = damped_eigenvalues(storage, strategy, damping, sizes).to(device, wide(dtype))
    if strategy not in (FactorStrategy.KFAC, FactorStrategy.EKFAC):
        return Preconditioner(None, None, lam)
    Qg, Qa = (
        storage[name].to(device, dtype).contiguous()
        for name in (GRADIENT_EIGENVECTORS_NAME, ACTIVATION_EIGENVECTORS_NAME)
    )
    return Preconditioner(Qg, Qa, lam)
