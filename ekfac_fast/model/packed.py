"""Weights that are quantised: known by what they are, whichever library packed them.

A tracked layer needs no weight: its gradient is made of what it reads and of what arrives at its
output. Both are those of the model as it runs, so what quantisation rounds is in them.
"""

import warnings
from collections.abc import Sequence

from torch import nn

from ..checks import listed
from ..errors import ArgumentError, Notice
from .layers import Layer
from .weights import is_packed


def _packed(model: nn.Module, layers: Sequence[Layer]) -> dict[str, str]:
    """Those of the layers whose weight is packed, and as what."""
    found = {}
    for layer in layers:
        module = model.get_submodule(layer.module)
        weight = getattr(module, "weight", None)
        if layer.expert is None and is_packed(weight):
            plain = type(module) is nn.Linear
            found[layer.name] = type(weight if plain else module).__name__
    return found


def tell_of_packed(model: nn.Module, layers: Sequence[Layer]) -> None:
    """A `Notice` that tracked layers are quantised."""
    if found := _packed(model, layers):
        warnings.warn(
            f"{len(found)} of {len(layers)} tracked layers are quantised "
            f"({listed(sorted({*found.values()}))}; the first is {next(iter(found))}): their "
            "gradients are those of the model as it runs, by what they read and what arrives at "
            "their outputs. They differ from those of the weights before quantisation by as much "
            "as its forward pass does",
            Notice,
            stacklevel=3,
        )


def refuse_packed(model: nn.Module, layers: Sequence[Layer], what: str) -> None:
    """ArgumentError where weights of these layers cannot be moved."""
    for name, kind in _packed(model, layers).items():
        raise ArgumentError(
            f"{what}: the weight of {name} is quantised ({kind}), and no direction can be added to "
            "it. Track an adapter, or load the model with plain weights"
        )
