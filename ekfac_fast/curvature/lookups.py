"""Gradients of an embedding, whose inputs are rows of one 1: never V numbers a token.

G_b = sum_t g_bt e(i_bt)^T [O,V] has a column for every id i that the sequence holds, the sum of its
tokens' g; all others are zero. Inputs are covaried by counts, diag(n_i), whose eigenvectors are the
identity: that side is never rotated. Inputs `a` are integers [B,T,1]: where the 1 stands.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..ops.shapes import wide


def are_ids(a: Tensor) -> bool:
    """Whether inputs are rows of one 1, told by where it stands."""
    return not a.is_floating_point()


@dataclass(frozen=True)
class Lookups:
    """The columns of G_b that are not zero: `values` [B,T,O], of the first token of every id; zero
    at its others. `ids` [B,T].
    """

    values: Tensor
    ids: Tensor

    @classmethod
    def of(cls, g: Tensor, a: Tensor, Qg: Tensor | None = None) -> Self:
        """Of g [B,T,O] and ids [B,T,1]; with Qg, of Qg^T G_b."""
        ids = a.squeeze(-1)
        same = ids.unsqueeze(2) == ids.unsqueeze(1)
        first = same.int().argmax(2) == torch.arange(ids.shape[1], device=ids.device)
        # A product: its sums have an order, which a scatter's have not on a GPU.
        values = (same & first.unsqueeze(2)).to(g.dtype) @ g
        return cls(values if Qg is None else values @ Qg.to(g.dtype), ids)

    @property
    def squares(self) -> Tensor:
        """[B,T,O], fp32 or fp64."""
        return self.values.to(wide(self.values.dtype)).square()

    def add_squares(self, lam_sum: Tensor) -> None:
        """lam_sum [O,V] += sum_b G_b^2."""
        _add_columns(lam_sum, (self.ids.flatten(),), self.squares.flatten(0, 1))

    def add_quotients(self, s: Tensor, lam: Tensor, damping: float) -> None:
        """s [B] += sum G_b^2 / (lam + damping)."""
        s += (self.squares / (lam.mT[self.ids] + damping)).sum((1, 2))

    def quotients(self, lam: Tensor, damping: float) -> Tensor:
        """G_b / (lam + damping), whole: [B,O,V]."""
        values = self.values.to(lam.dtype) / (lam.mT[self.ids] + damping)
        return self._whole(values, lam.shape[1])

    def whole(self, V: int) -> Tensor:
        """G_b: [B,O,V]."""
        return self._whole(self.values, V)

    def _whole(self, values: Tensor, V: int) -> Tensor:
        B, T, O = values.shape
        G = values.new_zeros(B, O, V)
        sequence = torch.arange(B, device=values.device).unsqueeze(1).expand(B, T)
        _add_columns(G, (sequence, self.ids), values)
        return G


def add_products(s: Tensor, left: Iterable[Tensor], M: Tensor, a: Tensor) -> None:
    """s [Q,B], or [Q,B,T] per token, += <x_qbt, M_q[:, i_bt]>: x_q [B,T,K] of every query, M
    [Q,K,V].
    """
    ids = a.squeeze(-1)
    for row, x, m in zip(s, left, M, strict=True):
        each = (x.to(s.dtype) * m.mT[ids]).sum(-1)
        row += each if s.ndim == 3 else each.sum(1)


def _add_columns(G: Tensor, at: tuple[Tensor, ...], values: Tensor) -> None:
    """G[..., column] += values, in an order of its own on any device."""
    G.mT.index_put_(at, values.to(G.dtype), accumulate=True)
