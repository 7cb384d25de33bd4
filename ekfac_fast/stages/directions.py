"""A query's preconditioned gradient, the iHVP, as a direction in the model's own parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..checks import is_number, require
from ..errors import ArgumentError
from ..model import experts
from ..model.alone import alone, restored
from ..model.layers import Layer
from ..model.packed import refuse_packed
from ..model.products import is_conv1d
from ..model.weights import check_changeable


def as_parameters(model: nn.Module, layers: Mapping[Layer, Tensor]) -> dict[str, Tensor]:
    """Matrices [O,J] of layers as tensors with the names and shapes of a checkpoint's parameters.

    Of experts that are not among the layers the slices are zero.

    Raises:
        ArgumentError: the model has no such layer, one of another size, or a quantised one.
    """
    held = dict(model.named_parameters(remove_duplicate=False))
    # A parameter of several modules goes by one name in a checkpoint, the first.
    first = {id(p): name for name, p in model.named_parameters()}
    refuse_packed(model, [*layers], "parameters")
    found: dict[str, Tensor] = {}
    for layer, matrix in layers.items():
        try:
            module = model.get_submodule(layer.module)
        except AttributeError as error:
            raise ArgumentError(f"model has no layer {layer.name}: it is another model") from error
        W, b = matrix[:, : layer.I], matrix[:, layer.I] if layer.bias else None
        if layer.kind == "vector":
            names, turned, W = (layer.name, ""), False, W[:, 0]
        elif layer.expert is None:
            names = f"{layer.name}.weight", f"{layer.name}.bias"
            turned = is_conv1d(module) or layer.kind == "embedding"
        else:
            names = (stem := f"{layer.module}.{layer.parameter}"), f"{stem}_bias"
            turned = experts.transposed(module)
        for name, part in zip(names, (W.T if turned else W, b), strict=True):
            if part is None:
                continue
            if name not in held:
                raise ArgumentError(f"model has no parameter {name}: it is another model")
            name = first[id(held[name])]
            like = held[name] if layer.expert is None else held[name][layer.expert]
            if layer.kind in ("convolution", "vector") and part.numel() == like.numel():
                part = part.reshape(like.shape)
            if part.shape != like.shape:
                raise ArgumentError(
                    f"{layer.name} is {list(like.shape)} in the model, {list(part.shape)} in the "
                    "queries: it is another model"
                )
            if layer.expert is None:
                found[name] = part.contiguous()
            else:
                found.setdefault(name, part.new_zeros(held[name].shape))[layer.expert] = part
    return found


@contextmanager
def moved(model: nn.Module, direction: Mapping[str, Tensor], alpha: float) -> Iterator[None]:
    """The model's parameters plus alpha x direction; afterwards they are bitwise what they were.

    Raises:
        ArgumentError: alpha is no finite number; a parameter is offloaded.
    """
    require(is_number(alpha), "alpha", alpha, "a finite number")
    held = dict(model.named_parameters(remove_duplicate=False))
    check_changeable(model, [held[name] for name in direction], "apply")
    with restored(held[name] for name in direction):
        with alone(model), torch.no_grad():
            for name, step in direction.items():
                held[name].add_(step.to(held[name]), alpha=alpha)
        yield
