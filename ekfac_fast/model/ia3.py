"""IA3 as peft puts it into a model: y = l * (W x + b), of feed-forward layers y = W (l * x) + b.

A row of l's gradient is u times what arrives at l * u: u is W x + b, or x, with the vectors of the
other active adapters. What arrives is the gradient of y, or W^T of it.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

# peft's dictionary of vectors, one an adapter: it is no module that runs.
HELD = ".ia3_l."


def is_ia3(module: nn.Module) -> bool:
    """Whether a module is a linear layer with IA3's vectors."""
    # No module of peft's can exist before peft is imported.
    if "peft" not in sys.modules:
        return False
    from peft.tuners.ia3.layer import IA3Layer

    return isinstance(module, IA3Layer) and bool(module.get_base_layer().weight.ndim == 2)


def split(name: str) -> str:
    """The module of a vector of this name; empty where it is none of IA3's."""
    module, held, _ = name.rpartition(HELD)
    return module if held else ""


def vectors(name: str, module: Any) -> dict[str, int]:
    """Numbers in each adapter's vector, by name."""
    return {f"{name}{HELD}{adapter}": l.numel() for adapter, l in module.ia3_l.items()}


def multiplied(module: Any, parameter: str, x: Tensor) -> Tensor:
    """u, of what the module is given."""
    _, _, adapter = parameter.partition(".")
    u: Tensor = x if module.is_feedforward else module.get_base_layer().forward(x)
    for other in module.active_adapters:
        if other != adapter and other in module.ia3_l:
            u = u * module.ia3_l[other].flatten()
    return u


def output(module: Any, product: Tensor) -> Tensor:
    """y of l * u."""
    y: Tensor = module.get_base_layer().forward(product) if module.is_feedforward else product
    return y


def arriving(module: Any, u: Tensor, g: Tensor) -> Tensor:
    """The gradient of l * u, of that of y."""
    if not module.is_feedforward:
        return g
    with torch.enable_grad():
        # y is linear in it: where the derivative is taken makes no difference.
        product = u.detach().requires_grad_()
        (found,) = torch.autograd.grad(output(module, product), product, g)
    return found


def moved(module: Any, step: Tensor) -> Tensor:
    """dy of a step of l * u."""
    y = output(module, step)
    return y - output(module, torch.zeros_like(step[:1])) if module.is_feedforward else y
