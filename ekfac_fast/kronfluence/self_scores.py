"""Self-influence on `self_influence`; with a measurement, on `dense_scores` example by example."""

import torch
from kronfluence.module.tracker.self_score import SelfScoreTracker, SelfScoreWithMeasurementTracker
from kronfluence.utils.constants import PRECONDITIONED_GRADIENT_NAME, SELF_SCORE_VECTOR_NAME
from torch import Tensor

from ..ops.gradients import rotate_activations
from .capture import TokenTracker, wide


class _Scores(TokenTracker):
    """What both kinds share: a vector a batch, and factors that stay where they are."""

    def offloads(self) -> bool:
        """As `offload_activations_to_cpu` says."""
        return self.module.score_args.offload_activations_to_cpu

    def release_memory(self) -> None:
        """Drop the scores of the batch. kronfluence moves all factors to the CPU here."""
        self.clear_all_cache()
        self.module.storage[SELF_SCORE_VECTOR_NAME] = None


class FastSelfScoreTracker(_Scores, SelfScoreTracker):
    """s_b = sum (Qg^T G_b Qa)^2 / (lam + damping): no rotation back."""

    def operand_dtype(self) -> torch.dtype:
        """The wider of the two dtypes that kronfluence would pass through."""
        args = self.module.score_args
        return torch.promote_types(args.per_sample_gradient_dtype, args.precondition_dtype)

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
        """kronfluence's `score_dtype`."""
        return self.module.score_args.score_dtype

    def consume(self, g: Tensor, a: Tensor) -> None:
        """Score one batch (one use of a shared module).

        Each side of the basis is left to P or taken by the tokens, whichever is cheaper: the same
        choice as in `ops.gradients`.
        """
        storage, bias = self.module.storage, self.bias
        P = storage[PRECONDITIONED_GRADIENT_NAME]
        basis = self.module.basis_on(g.device)
        (B, T, O), J = g.shape, P.shape[-1]
        Qg, Qa = basis.Qg, basis.Qa
        if self.module.scores_measurement and Qg is not None and Qa is not None:
            if T < O:
                a, bias = rotate_activations(a, Qa.to(a.dtype), bias), False
            else:
                P = P @ Qa.to(P.dtype).mT
            if T < J:
                g = g @ Qg.to(g.dtype)
            else:
                P = Qg.to(P.dtype) @ P
        P = P.to(g.dtype)
        s = g.new_zeros(B, 1, 1, dtype=wide(g.dtype))
        for b in range(B):
            one = slice(b, b + 1)
            torch.ops.ekfac_fast.dense_scores(s[b], P[one], g[one], a[one], bias)
        s = s.flatten() * self.module.gradient_scale
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
