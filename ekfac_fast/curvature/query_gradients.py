"""Preconditioned query gradients of one layer in weight space, in the form that scores cheapest."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from typing import Self

import torch
from torch import Tensor

from ..ops import dense_scores, low_rank_scores
from ..ops.gradients import with_ones
from ..ops.shapes import Shape
from .choice import contraction
from .lookups import add_products, are_ids
from .memory import free_bytes

# Of the free memory, what queries may take while they are dense for one batch.
SHARE_OF_A_BATCH = 0.1


@dataclass(frozen=True)
class Dense:
    """P [Q,O,J]."""

    P: Tensor

    def __len__(self) -> int:
        return len(self.P)

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """`change` of its tensors."""
        return type(self)(change(self.P))

    def dense(self) -> Tensor:
        """The preconditioned gradients (G + damping)^-1 grad f, the iHVP: [Q,O,J]."""
        return self.P

    def add_scores(self, s: Tensor, g: Tensor, a: Tensor, bias: bool) -> None:
        """s [Q,B] += <P_q, G_b>, or per token, s [Q,B,T].

        With one row per sequence both are the same number, and per token is one product with P
        where per sequence is a gradient for every sequence: 10 times faster (B 256, Q 128).
        """
        if are_ids(a):
            add_products(s, repeat(g, len(s)), self.P, a)
            return
        if s.ndim == 2 and g.shape[1] == 1:
            s = s.view(*s.shape, 1)
        torch.ops.ekfac_fast.dense_scores(s, self.P.to(g.dtype), g, a, bias)

    def laid_out(self) -> Self:
        """The same numbers as scoring wants them in memory: once a stage."""
        return type(self)(dense_scores.laid_out(self.P))

    def against(self, G: Tensor) -> Tensor:
        """<P_q, G_b> of gradients that exist: G [B,O,J] -> [Q,B]."""
        return self.P.to(G.dtype).flatten(1) @ G.flatten(1).mT

    def by_token(self, g: Tensor, a: Tensor, bias: bool) -> Tensor:
        """<P_b, g_bt (a_bt, 1)^T>, a query for each sequence: [B,T]; differentiable in g [B,T,O]
        and a [B,T,I].
        """
        P, I = self.P.to(g.dtype), a.shape[-1]
        each = ((g @ P[:, :, :I]) * a).sum(-1)
        return each + (g @ P[:, :, I:]).squeeze(-1) if bias else each

    def by_output(self, g: Tensor, a: Tensor, bias: bool) -> Tensor:
        """What each row of P_b has of <P_b, G_b>, a query for each sequence: [B,O]."""
        P, I = self.P.to(g.dtype), a.shape[-1]
        x = a @ P[:, :, :I].mT
        return (g * (x + P[:, None, :, I] if bias else x)).sum(1)

    def by_input(self, g: Tensor, a: Tensor, bias: bool) -> Tensor:
        """What each column of P_b has of <P_b, G_b>, the bias's last: [B,J]."""
        y = g @ self.P.to(g.dtype)
        return (y * with_ones(a, bias)).sum(1)


@dataclass(frozen=True)
class LowRank:
    """L [Q,O,K] and R [Q,K,J] with P = L R."""

    L: Tensor
    R: Tensor

    def __len__(self) -> int:
        return len(self.L)

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """`change` of its tensors."""
        return type(self)(change(self.L), change(self.R))

    def dense(self) -> Tensor:
        """The preconditioned gradients (G + damping)^-1 grad f, the iHVP: [Q,O,J]."""
        return self.L @ self.R

    def add_scores(self, s: Tensor, g: Tensor, a: Tensor, bias: bool) -> None:
        """s [Q,B] += <L_q R_q, G_b>, or per token, s [Q,B,T].

        Multiplied out for this one batch where that costs less and there is room.
        """
        if are_ids(a):
            add_products(s, (g @ left.to(g.dtype) for left in self.L), self.R, a)
            return
        L, R = self.L.to(g.dtype), self.R.to(g.dtype)
        (B, T, O), I, (Q, K, J) = g.shape, a.shape[-1], R.shape
        shape = Shape(B=B, T=T, I=I, O=O, Q=Q, K=K, bias=bias)
        if contraction(shape, per_token=s.ndim == 3) == "dense":
            size = Q * O * J * L.element_size()
            if size < SHARE_OF_A_BATCH * free_bytes(g.device):
                Dense(L @ R).add_scores(s, g, a, bias)
                return
        torch.ops.ekfac_fast.low_rank_scores(s, L, R, g, a, bias)

    def laid_out(self) -> Self:
        """The same numbers as scoring wants them in memory: once a stage."""
        return type(self)(*low_rank_scores.laid_out(self.L, self.R))

    def against(self, G: Tensor) -> Tensor:
        """<L_q R_q, G> of one gradient that exists: G [1,O,J] -> [Q,1]."""
        L, R = self.L.to(G.dtype), self.R.to(G.dtype)
        return (L * (G @ R.mT)).sum((1, 2)).unsqueeze(1)

    def by_token(self, g: Tensor, a: Tensor, bias: bool) -> Tensor:
        """<L_b R_b, g_bt (a_bt, 1)^T>, a query for each sequence: [B,T]; differentiable in
        g [B,T,O] and a [B,T,I].
        """
        return ((g @ self.L.to(g.dtype)) * self._read(a, bias)).sum(-1)

    def by_output(self, g: Tensor, a: Tensor, bias: bool) -> Tensor:
        """What each row of L_b R_b has of <L_b R_b, G_b>, a query for each sequence: [B,O]."""
        return (g * (self._read(a, bias) @ self.L.to(g.dtype).mT)).sum(1)

    def by_input(self, g: Tensor, a: Tensor, bias: bool) -> Tensor:
        """What each column of L_b R_b has of <L_b R_b, G_b>, the bias's last: [B,J]."""
        y = (g @ self.L.to(g.dtype)) @ self.R.to(g.dtype)
        return (y * with_ones(a, bias)).sum(1)

    def _read(self, a: Tensor, bias: bool) -> Tensor:
        """R_b (a_bt, 1): [B,T,K]."""
        R, I = self.R.to(a.dtype), a.shape[-1]
        right = a @ R[:, :, :I].mT
        return right + R[:, None, :, I] if bias else right


QueryGradients = Dense | LowRank
