"""Query gradients: preconditioned on `precondition`, truncated in the eigenbasis, held until used.

A query is stored as kronfluence stores it: P [Q,O,J] or [L [Q,O,K], R [Q,K,J]] in weight space,
in `score_dtype`. The batches held for one pass over the training data are joined once, when that
pass begins, rather than at every batch.
"""

import torch
from kronfluence.module.tracker.precondition import PreconditionTracker
from kronfluence.utils.constants import (
    ACCUMULATED_PRECONDITIONED_GRADIENT_NAME,
    AGGREGATED_GRADIENT_NAME,
    PRECONDITIONED_GRADIENT_NAME,
)
from torch import Tensor, nn

from ...curvature.basis import Basis
from ...ops.shapes import wide
from ..truncation import low_rank
from .base import ScoreTracker


class FastPreconditionTracker(ScoreTracker, PreconditionTracker):
    """P = (Qg^T G Qa) / (lam + damping) of every query, then low rank, then weight space."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        # Query batches that wait for the next pass over the training data.
        self.held: list[Tensor | list[Tensor]] = []

    def consume(self, g: Tensor, a: Tensor) -> None:
        """Precondition one batch of queries."""
        basis = self.module.basis_on(g.device)
        P = basis.precondition(g, a, self.bias)
        scale = self.module.gradient_scale
        self.keep(P if scale == 1.0 else P * scale, basis)

    def keep(self, P: Tensor, basis: Basis) -> None:
        """Store a batch P [Q,O,J], given in the eigenbasis."""
        args, storage = self.module.score_args, self.module.storage
        rank = args.query_gradient_low_rank
        if rank is not None and min(P.shape[1:]) > rank:
            factors = low_rank(
                P.to(wide(args.query_gradient_svd_dtype)),
                rank,
                basis,
                exact=args.use_full_svd,
                randomised=self.module.options.truncation == "randomised",
            )
            query: Tensor | list[Tensor] = [x.to(args.score_dtype).contiguous() for x in factors]
        elif self.module.scores_measurement:
            # Meets one training gradient only: rotating that one costs less than rotating P back.
            query = P
        else:
            query = basis.rotate_back(P).to(args.score_dtype)
        storage[PRECONDITIONED_GRADIENT_NAME] = query

    def accumulate_iterations(self) -> None:
        """Hold this batch for the next pass over the training data."""
        self.held.append(self.module.storage[PRECONDITIONED_GRADIENT_NAME])
        self.module.storage[PRECONDITIONED_GRADIENT_NAME] = None

    def join_held(self) -> None:
        """Join what is held into kronfluence's storage."""
        if not self.held:
            return
        pairs = [x for x in self.held if isinstance(x, list)]
        dense = [x for x in self.held if isinstance(x, Tensor)]
        self.held.clear()
        joined = torch.cat(dense) if dense else [torch.cat(x) for x in zip(*pairs, strict=True)]
        self.module.storage[ACCUMULATED_PRECONDITIONED_GRADIENT_NAME] = joined

    def exist(self) -> bool:
        """Whether any query is stored or held."""
        return bool(self.held) or super().exist()

    @torch.no_grad()
    def finalize_all_iterations(self) -> None:
        """Precondition the sum of the query gradients, where queries are aggregated."""
        storage, args = self.module.storage, self.module.score_args
        G = storage[AGGREGATED_GRADIENT_NAME]
        if G is None:
            return
        if self.module.aggregate_is_train:
            # kronfluence preconditions the sum of the training gradients here and drops the
            # result; what that draws is drawn, for the same random columns in the next partition.
            rank = args.query_gradient_low_rank
            if rank is not None and min(G.shape[1:]) > rank and not args.use_full_svd:
                dtype = args.query_gradient_svd_dtype
                torch.randn(min(G.shape[1:]), rank, dtype=dtype, device=G.device)
            return
        storage[AGGREGATED_GRADIENT_NAME] = None
        basis = self.module.basis_on(G.device)
        self.keep(basis.precondition_gradient(G), basis)
        self.accumulate_iterations()

    def release_memory(self) -> None:
        """Drop all queries."""
        super().release_memory()
        self.held.clear()
