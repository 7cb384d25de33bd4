"""What a pass does to the autograd graph: where it starts, and how it runs back."""

from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError


def backward(value: Tensor, retain_graph: bool) -> None:
    """A backward pass.

    Raises:
        ModelError: the model has one of its own, which asserts something else.
    """
    try:
        value.backward(retain_graph=retain_graph)
    except AssertionError as error:
        raise ModelError(
            f"the model's own backward pass does not run in evaluation mode: {error}"
        ) from error


def reshaped(base: Tensor | None, view: Tensor) -> bool:
    """Whether a view holds all of its base, in the same order, and has its gradient."""
    if base is None or not base.requires_grad or base.numel() != view.numel():
        return False
    return base.is_contiguous() and view.is_contiguous()


def copied(x: Tensor) -> Tensor:
    """A copy, with a gradient of its own."""
    copy: Tensor = _Copy.apply(x)
    return copy


def started(x: Any, anchor: Tensor) -> Any:
    """`x`, or where it is a floating point tensor without grad, a copy that requires it.

    A view could not be changed in place by the model.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.requires_grad:
        return x
    return _Start.apply(x, anchor)


class _Copy(torch.autograd.Function):
    """A copy, with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0]


class _Start(torch.autograd.Function):
    """A copy that requires grad. (A view could not be changed in place by the model.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[None, None]:
        return None, None
