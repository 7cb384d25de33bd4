"""Gradients summed over a dataset: G [1,O,J] = sum over all tokens of g a^T, never per example."""

import torch
from kronfluence.module.tracker.gradient import GradientTracker
from kronfluence.utils.constants import AGGREGATED_GRADIENT_NAME
from torch import Tensor

from ...ops.shapes import wide
from .base import ScoreTracker


class FastGradientTracker(ScoreTracker, GradientTracker):
    """One product over all rows of a batch, into an accumulator that is never below fp32."""

    joins_uses = False

    def operand_dtype(self) -> torch.dtype:
        """kronfluence's `per_sample_gradient_dtype`."""
        return self.module.score_args.per_sample_gradient_dtype

    def consume(self, g: Tensor, a: Tensor) -> None:
        """Add one batch."""
        storage, (O, J) = self.module.storage, self.sizes
        accumulator = wide(g.dtype)
        G = storage[AGGREGATED_GRADIENT_NAME]
        if G is None:
            G = storage[AGGREGATED_GRADIENT_NAME] = g.new_zeros(1, O, J, dtype=accumulator)
        g, a = g.flatten(0, 1).to(accumulator), a.flatten(0, 1).to(accumulator)
        scale = self.module.gradient_scale
        G[0, :, : a.shape[1]].addmm_(g.T, a, alpha=scale)
        if self.bias:
            G[0, :, -1].add_(g.sum(0), alpha=scale)

    def release_memory(self) -> None:
        """Drop the sum."""
        super().release_memory()
        self.module.aggregate_is_train = False
