"""Corrected eigenvalues ("lambda") on `eigenvalues`: no per-example gradient is formed."""

import torch
from kronfluence.factor.config import FactorConfig
from kronfluence.module.tracker.factor import LambdaTracker
from kronfluence.utils.constants import (
    ACTIVATION_EIGENVECTORS_NAME,
    GRADIENT_EIGENVECTORS_NAME,
    LAMBDA_MATRIX_NAME,
    NUM_LAMBDA_PROCESSED,
)
from kronfluence.utils.exceptions import FactorsNotFoundError
from torch import Tensor

from ...curvature.basis import Eigenvectors
from ...ops.shapes import wide
from .base import TokenTracker


class FastLambdaTracker(TokenTracker, LambdaTracker):
    """lambda += sum_b (Qg^T G_b Qa)^2; without eigenvectors (diagonal strategy), sum_b G_b^2."""

    eigenvectors = Eigenvectors(None, None)

    def operand_dtype(self) -> torch.dtype:
        """The wider of the two dtypes that kronfluence would pass through."""
        args = self.module.factor_args
        return torch.promote_types(args.per_sample_gradient_dtype, args.lambda_dtype)

    def offloads(self) -> bool:
        """As `offload_activations_to_cpu` says."""
        return self.module.factor_args.offload_activations_to_cpu

    def consume(self, g: Tensor, a: Tensor) -> None:
        """Add the squares of one batch."""
        storage = self.module.storage
        if storage[LAMBDA_MATRIX_NAME] is None:
            self.prepare(g)
        storage[NUM_LAMBDA_PROCESSED].add_(g.shape[0])
        self.eigenvectors.add_eigenvalues(storage[LAMBDA_MATRIX_NAME], g, a, self.bias)

    def prepare(self, g: Tensor) -> None:
        """Make the sum; bring the eigenvectors to the device and dtype of `g`, once a pass."""
        strategy, storage = self.module.factor_args.strategy, self.module.storage
        storage[NUM_LAMBDA_PROCESSED] = torch.zeros(1, dtype=torch.int64)
        storage[LAMBDA_MATRIX_NAME] = g.new_zeros(self.sizes, dtype=wide(g.dtype))
        self.eigenvectors = Eigenvectors(None, None)
        if FactorConfig.CONFIGS[strategy].requires_eigendecomposition_for_lambda:
            if not self._eigendecomposition_results_exist():
                raise FactorsNotFoundError(
                    f"strategy {strategy!r} needs the eigenvectors of module {self.module.name!r} "
                    "for its eigenvalues: perform the eigendecomposition first"
                )
            self.eigenvectors = Eigenvectors(
                storage[GRADIENT_EIGENVECTORS_NAME].to(g),
                storage[ACTIVATION_EIGENVECTORS_NAME].to(g),
            )

    def finished(self, name: str, factor: Tensor) -> Tensor:
        """The sum in `lambda_dtype`; unscales AMP's gradients."""
        if name != LAMBDA_MATRIX_NAME:
            return factor
        return (factor * self.module.gradient_scale**2).to(self.module.factor_args.lambda_dtype)

    def release_memory(self) -> None:
        """Drop the sum and the eigenvectors."""
        super().release_memory()
        self.eigenvectors = Eigenvectors(None, None)
