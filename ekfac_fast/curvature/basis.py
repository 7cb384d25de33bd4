"""A layer's eigenbasis on its device: eigenvalues, preconditioning, self-influence, rotation back.

G' = Qg^T G Qa        G in the eigenbasis         lam += G'^2         (Eq. 20)
P  = G' / (lam + damping)                          preconditioned      (Eq. 21)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import torch
from torch import Tensor

from ..ops.gradients import cheapest_order, with_ones
from ..ops.shapes import Shape, wide
from .blocks import BlockDiagonal, Matrix, blocks_in, rotate
from .lookups import Lookups, are_ids

# A tenth of the mean eigenvalue: the damping of the paper and of kronfluence. Its least value is
# far below that of any gradient and far above the square of what rounding leaves of one that is
# zero: a layer of such takes part as zero.
HEURISTIC_DAMPING, LEAST_DAMPING = 0.1, 1e-16
# Share of a GPU's memory that bases leave to the model, activations, queries and scores.
RESERVED_SHARE = 0.5
Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def relative_damping(lam: Tensor, share: float) -> float:
    """A share of the mean eigenvalue, at least `LEAST_DAMPING`."""
    return max(share * lam.double().mean().item(), LEAST_DAMPING)


@dataclass(frozen=True)
class Eigenvectors:
    """`Qg` [O,O] and `Qa` [J,J], eigenvectors in columns; None where a side is not rotated.

    Inputs `a` [B,T,I], or ids [B,T,1] where they are rows of one 1 (`lookups`): their Qa is None.
    """

    Qg: Matrix | None
    Qa: Matrix | None

    @property
    def blocks(self) -> int:
        """On the diagonal of each side: 1, or of covariances that were cut, how many."""
        return len(self.Qg.blocks) if isinstance(self.Qg, BlockDiagonal) else 1

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """`change` of its tensors."""
        changed: dict[str, Matrix] = {}
        for name, x in vars(self).items():
            if isinstance(x, Tensor):
                changed[name] = change(x)
            elif isinstance(x, BlockDiagonal):
                changed[name] = x.each(change)
        return replace(self, **changed)

    def at(self, device: torch.device) -> Self:
        """Itself, on `device`."""
        here = (x.device == device for x in vars(self).values() if isinstance(x, Matrix))
        return self if all(here) else self.each(lambda x: x.to(device))

    def add_eigenvalues(self, lam_sum: Tensor, g: Tensor, a: Tensor, bias: bool) -> None:
        """lam_sum [O,J] += sum_b (Qg^T G_b Qa)^2."""
        if are_ids(a):
            self._lookups(g, a).add_squares(lam_sum)
            return
        for rows, columns, operands, ones in self._for(g, a, bias):
            torch.ops.ekfac_fast.eigenvalues(lam_sum[rows, columns], *operands, ones)

    def rotate_back(self, P: Tensor) -> Tensor:
        """P [B,O,J] from the eigenbasis to weight space: Qg P Qa^T."""
        if self.Qg is not None:
            P = self.Qg.to(P.dtype) @ P
        return P if self.Qa is None else P @ self.Qa.to(P.dtype).mT

    def _lookups(self, g: Tensor, ids: Tensor) -> Lookups:
        """Qg^T G_b of an embedding."""
        assert self.Qg is None or isinstance(self.Qg, Tensor)  # diagonal sides have no blocks
        return Lookups.of(g, ids, self.Qg)

    def _for(
        self, g: Tensor, a: Tensor, bias: bool
    ) -> Iterator[tuple[slice, slice, Operands, bool]]:
        """(rows, columns) of lam and (g, a, Qg, Qa), bias for an op, in the dtype of g. Blocks are
        rotated here where that is on tokens, and where it is on the gradient each for itself.
        """
        Qg, Qa = (x if x is None else x.to(g.dtype) for x in (self.Qg, self.Qa))
        if Qa is None:
            a, bias = with_ones(a, bias), False
        if self.blocks > 1:
            by = cheapest_order(Shape(T=g.shape[1], I=a.shape[-1], O=g.shape[-1], bias=bias))
            if Qg is not None and by in ("tokens", "g_tokens"):
                g, Qg = g @ Qg, None
            if Qa is not None and by in ("tokens", "a_tokens"):
                a, Qa, bias = rotate(a, Qa, bias), None, False
        I = a.shape[-1]
        for rows, q in blocks_in(Qg):
            for columns, p in blocks_in(Qa):
                last = columns.stop is None or columns.stop > I
                yield rows, columns, (g[..., rows], a[..., columns], q, p), bias and last


@dataclass(frozen=True)
class Basis(Eigenvectors):
    """Eigenvectors with `lam` [O,J], fp32 or fp64, and the damping that is added to it."""

    lam: Tensor
    damping: float = 0.0

    def precondition(self, g: Tensor, a: Tensor, bias: bool) -> Tensor:
        """P [B,O,J] of every sequence, in the eigenbasis."""
        lam, P = self.lam.to(wide(g.dtype)), None
        if are_ids(a):
            return self._lookups(g, a).quotients(lam, self.damping)
        for rows, columns, operands, ones in self._for(g, a, bias):
            own = lam[rows, columns]
            part = torch.ops.ekfac_fast.precondition(*operands, own, self.damping, ones)
            if own.shape == lam.shape:
                return part
            P = lam.new_empty(len(g), *lam.shape) if P is None else P
            P[:, rows, columns] = part
        assert P is not None
        return P

    def add_self_influence(self, s: Tensor, g: Tensor, a: Tensor, bias: bool) -> None:
        """s [B] += sum (Qg^T G_b Qa)^2 / (lam + damping)."""
        lam = self.lam.to(wide(g.dtype))
        if are_ids(a):
            self._lookups(g, a).add_quotients(s, lam, self.damping)
            return
        for rows, columns, operands, ones in self._for(g, a, bias):
            own = lam[rows, columns]
            torch.ops.ekfac_fast.self_influence(s, *operands, own, self.damping, ones)

    def precondition_gradient(self, G: Tensor) -> Tensor:
        """P of gradients that exist already (sums over a data set): G [B,O,J] -> [B,O,J]."""
        if self.Qg is not None:
            G = self.Qg.mT @ G.to(self.Qg.dtype)
        if self.Qa is not None:
            G = G.to(self.Qa.dtype) @ self.Qa
        return G.to(self.lam.dtype) / (self.lam + self.damping)

    def rotation(self, dtype: torch.dtype) -> "Basis":
        """The basis with every eigenvalue 1, for operands of `dtype`."""
        lam = torch.ones((), dtype=wide(dtype), device=self.lam.device).expand(self.lam.shape)
        Qg, Qa = (x if x is None else x.to(dtype) for x in (self.Qg, self.Qa))
        return Basis(Qg, Qa, lam)


E = TypeVar("E", bound=Eigenvectors)


class SharedRotation:
    """Rotated activations of layers that read the same tensor, computed once a batch."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[Tensor | None, int]] = {}

    def __call__(
        self, basis: E, g: Tensor, a: Tensor, bias: bool, owner: str, readers: int
    ) -> tuple[E, Tensor, bool]:
        """(basis, a, bias) for `Basis`: rotated already where others share `a` and tokens are the
        cheap side. Alone, a layer's rotation is left to the op, which chooses the cheapest order.

        Args:
            owner: the same for all layers that share `a`; `readers` counts them.
        """
        if readers == 1 or basis.Qa is None:
            return basis, a, bias
        rotated, left = self._held.pop(owner, (None, readers))
        itself = a.shape[1] >= g.shape[-1]
        if rotated is None and not itself:
            rotated = rotate(a, basis.Qa.to(a.dtype), bias)
        # Every reader counts, also one too narrow to want it: the next batch begins anew.
        if left > 1:
            self._held[owner] = (rotated, left - 1)
        if itself:
            return basis, a, bias
        assert rotated is not None
        return replace(basis, Qa=None), rotated, False
