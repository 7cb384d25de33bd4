"""Self-influence on `self_influence`; with a measurement, on `precondition` twice."""

import torch
from kronfluence.module.tracker.self_score import SelfScoreTracker, SelfScoreWithMeasurementTracker
from kronfluence.utils.constants import PRECONDITIONED_GRADIENT_NAME, SELF_SCORE_VECTOR_NAME
from torch import Tensor

from ...curvature.basis import Basis
from ...ops.shapes import wide
from .base import ScoreTracker


class _Scores(ScoreTracker):
    """What both kinds share: a vector a batch, and factors that stay where they are."""

    def release_memory(self) -> None:
        """Drop the scores of the batch. kronfluence moves all factors to the CPU here."""
        self.clear_all_cache()
        self.module.storage[SELF_SCORE_VECTOR_NAME] = None


class FastSelfScoreTracker(_Scores, SelfScoreTracker):
    """s_b = sum (Qg^T G_b Qa)^2 / (lam + damping): no rotation back."""

    def consume(self, g: Tensor, a: Tensor) -> None:
        """Score one batch."""
        s = g.new_zeros(g.shape[0], dtype=wide(g.dtype))
        self.module.basis_on(g.device).add_self_influence(s, g, a, self.bias)
        # Quadratic in the gradient, as in kronfluence.
        scale = self.module.gradient_scale
        self.module.storage[SELF_SCORE_VECTOR_NAME] = s if scale == 1.0 else s * scale**2


class FastSelfScoreWithMeasurementTracker(_Scores, SelfScoreWithMeasurementTracker):
    """s_b = sum_oj P_b[o,j] (Qg^T G_b Qa)[o,j], P_b the preconditioned measurement of example b."""

    joins_uses = False

    def operand_dtype(self) -> torch.dtype:
        """Never below the measurement's: a basis rounded to `score_dtype` would cost precision."""
        return torch.promote_types(super().operand_dtype(), self.module.score_args.score_dtype)

    def consume(self, g: Tensor, a: Tensor) -> None:
        """Score one batch (one use of a shared module).

        The two gradients of an example meet in the eigenbasis, where the measurement's already
        is; the op that took it there, with every eigenvalue 1, takes the loss's there as well.
        """
        storage = self.module.storage
        P, rotation = storage[PRECONDITIONED_GRADIENT_NAME], self.module.basis_on(g.device)
        if not self.module.scores_measurement:
            # Outside kronfluence's own loop: `FastPreconditionTracker` rotated P back.
            rotation = Basis(None, None, rotation.lam)
        G = rotation.rotation(g.dtype).precondition(g, a, self.bias)
        s = G.mul_(P).sum((1, 2)) * self.module.gradient_scale
        known = storage[SELF_SCORE_VECTOR_NAME]
        storage[SELF_SCORE_VECTOR_NAME] = s if known is None else known + s

    def finalize_iteration(self) -> None:
        """End of a batch of a shared module."""
        super().finalize_iteration()
        self.module.storage[PRECONDITIONED_GRADIENT_NAME] = None

    def accumulate_iterations(self) -> None:
        """Drop the scores and the measurement's gradients."""
        super().accumulate_iterations()
        self.module.storage[PRECONDITIONED_GRADIENT_NAME] = None
