"""Scores of all held queries against a training batch, on `dense_scores` and `low_rank_scores`."""

import torch
from kronfluence.module.tracked_module import ModuleMode
from kronfluence.module.tracker.pairwise_score import PairwiseScoreTracker
from kronfluence.utils.constants import (
    ACCUMULATED_PRECONDITIONED_GRADIENT_NAME,
    AGGREGATED_GRADIENT_NAME,
    PAIRWISE_SCORE_MATRIX_NAME,
    PRECONDITIONED_GRADIENT_NAME,
)
from torch import Tensor

from ...curvature.query_gradients import Dense, LowRank, QueryGradients
from ...ops.shapes import wide
from .base import ScoreTracker
from .queries import FastPreconditionTracker


class FastPairwiseScoreTracker(ScoreTracker, PairwiseScoreTracker):
    """s [Q,B] of one batch, or [Q,B,T] per token; uses of a shared module add up."""

    joins_uses = False
    partial: Tensor | None = None

    def operand_dtype(self) -> torch.dtype:
        """kronfluence's `score_dtype`."""
        return self.module.score_args.score_dtype

    def register_hooks(self) -> None:
        """Begin a pass: join the held queries, install the hook."""
        queries = self.module._trackers[ModuleMode.PRECONDITION_GRADIENT]
        if isinstance(queries, FastPreconditionTracker):
            queries.join_held()
        self.lay_out()
        super().register_hooks()

    def lay_out(self) -> None:
        """Put the held queries as scoring wants them, once a pass."""
        storage, name = self.module.storage, ACCUMULATED_PRECONDITIONED_GRADIENT_NAME
        if storage[name] is not None:
            queries = held(storage[name]).laid_out()
            storage[name] = [queries.L, queries.R] if isinstance(queries, LowRank) else queries.P

    def consume(self, g: Tensor, a: Tensor) -> None:
        """Score one batch (one use of a shared module)."""
        module = self.module
        queries = held(module.storage[ACCUMULATED_PRECONDITIONED_GRADIENT_NAME])
        (B, T, _), Q = g.shape, len(queries)
        per_token = module.score_args.compute_per_token_scores and self.input_ndim == 3
        s = g.new_zeros((Q, B, T) if per_token else (Q, B), dtype=wide(g.dtype))
        queries.add_scores(s, g, a, self.bias)
        if module.gradient_scale != 1.0:
            s *= module.gradient_scale
        if module.factor_args.has_shared_parameters:
            self.partial = s if self.partial is None else self.partial + s
        else:
            module.storage[PAIRWISE_SCORE_MATRIX_NAME] = s

    @torch.no_grad()
    def finalize_iteration(self) -> None:
        """End of a batch of a shared module: its uses have added up."""
        super().finalize_iteration()
        if self.partial is not None:
            self.module.storage[PAIRWISE_SCORE_MATRIX_NAME] = self.partial
            self.partial = None

    @torch.no_grad()
    def finalize_all_iterations(self) -> None:
        """End of a pass: score the summed training gradient if there is one; drop the queries."""
        storage = self.module.storage
        G = storage[AGGREGATED_GRADIENT_NAME]
        if G is not None:
            # Kept for the next queries, which must not take it for a sum of queries.
            self.module.aggregate_is_train = True
            queries = held(storage[ACCUMULATED_PRECONDITIONED_GRADIENT_NAME])
            storage[PAIRWISE_SCORE_MATRIX_NAME] = queries.against(G)
        storage[ACCUMULATED_PRECONDITIONED_GRADIENT_NAME] = None
        storage[PRECONDITIONED_GRADIENT_NAME] = None
        self.clear_all_cache()

    def release_memory(self) -> None:
        """Drop the scores of the batch."""
        super().release_memory()
        self.partial = None


def held(stored: Tensor | list[Tensor]) -> QueryGradients:
    """Queries as kronfluence stores them: dense, or [L, R]."""
    return LowRank(*stored) if isinstance(stored, list) else Dense(stored)
