"""Covariances on `covariance`: C += x^T diag(mask) x, one triangle, accumulators never below fp32.

Storage, counts and masks are kronfluence's: the attention mask selects the rows of the inputs and
the counts of both sides, not the rows of the gradients; it is ignored where its size differs.
"""

import weakref

import torch
from kronfluence.module.tracker.factor import CovarianceTracker
from kronfluence.utils.constants import (
    ACTIVATION_COVARIANCE_MATRIX_NAME,
    GRADIENT_COVARIANCE_MATRIX_NAME,
    NUM_ACTIVATION_COVARIANCE_PROCESSED,
    NUM_GRADIENT_COVARIANCE_PROCESSED,
)
from torch import Tensor, nn

from ...ops.shapes import wide
from .base import TokenTracker

_last_mask: list = [None, False]


def is_binary(mask: Tensor) -> bool:
    """Whether all values are 0 or 1; looked at once, although every module asks about each mask."""
    if mask.dtype == torch.bool:
        return True
    source, known = _last_mask
    if source is None or source() is not mask:
        known = bool(((mask == 0) | (mask == 1)).all())
        _last_mask[:] = weakref.ref(mask), known
    return known


class FastCovarianceTracker(TokenTracker, CovarianceTracker):
    """Activation covariance in the forward pass, gradient covariance in the backward pass."""

    def register_hooks(self) -> None:
        """Install the forward hook; it hangs a gradient hook on every output."""
        module = self.module

        @torch.compiler.disable
        @torch.no_grad()
        def forward(_: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
            x = inputs[0].detach()
            # The forward pass may run under autocast, which would round the product.
            with torch.autocast(x.device.type, enabled=False):
                self.add_inputs(x.to(module.factor_args.activation_covariance_dtype))
            self.cached_hooks.append(outputs.register_hook(backward))

        @torch.no_grad()
        def backward(gradient: Tensor) -> None:
            self.cached_hooks.pop().remove()
            g = gradient.detach().to(module.factor_args.gradient_covariance_dtype)
            g = g.reshape(-1, g.shape[-1])
            mask = self.mask(g)
            count = g.shape[0] if mask is None else mask.sum(dtype=torch.int64)
            name, number = GRADIENT_COVARIANCE_MATRIX_NAME, NUM_GRADIENT_COVARIANCE_PROCESSED
            torch.ops.ekfac_fast.covariance(self.sum_for(name, number, g, count), g, None, False)

        self.registered_hooks.append(module.register_forward_hook(forward))

    def add_inputs(self, x: Tensor) -> None:
        """Add the rows of `x`, already in the covariance's dtype."""
        rows = x.reshape(-1, x.shape[-1])
        mask, bias = self.mask(rows), self.bias
        count = rows.shape[0] if mask is None else mask.sum(dtype=torch.int64)
        if mask is not None and not is_binary(self.module.attention_mask):
            # Weights rather than a mask: kronfluence weighs the rows, its ones column included.
            rows, count = self.module.get_flattened_activation(x.clone())
            mask, bias = None, False
        name, number = ACTIVATION_COVARIANCE_MATRIX_NAME, NUM_ACTIVATION_COVARIANCE_PROCESSED
        cov = self.sum_for(name, number, rows, count, bias)
        torch.ops.ekfac_fast.covariance(cov, rows, mask, bias)

    def mask(self, rows: Tensor) -> Tensor | None:
        """The attention mask as [N], where kronfluence would apply it."""
        mask = self.module.attention_mask
        if mask is None or mask.numel() != rows.shape[0]:
            return None
        return mask.reshape(-1).to(rows.device)

    def sum_for(
        self, name: str, number: str, rows: Tensor, count: Tensor | int, bias: bool = False
    ) -> Tensor:
        """The running sum in storage, made at its first use; counts these rows."""
        storage = self.module.storage
        if storage[name] is None:
            J = rows.shape[-1] + bias
            storage[name] = rows.new_zeros(J, J, dtype=wide(rows.dtype))
            device = count.device if isinstance(count, Tensor) else None
            storage[number] = torch.zeros(1, dtype=torch.int64, device=device)
        storage[number].add_(count)
        return storage[name]

    def finished(self, name: str, factor: Tensor) -> Tensor:
        """The sums in the dtypes that the arguments ask for; unscales AMP's gradients."""
        args = self.module.factor_args
        if name == ACTIVATION_COVARIANCE_MATRIX_NAME:
            return factor.to(args.activation_covariance_dtype)
        if name == GRADIENT_COVARIANCE_MATRIX_NAME:
            return (factor * self.module.gradient_scale**2).to(args.gradient_covariance_dtype)
        return factor
