"""What layers of other kinds than linear ones read, and what arrives at them, as rows of (a, g).

convolution   y = W patch + b: a row is a patch of the input, and a position of the output
embedding     y = W^T x: of a row x of one 1 is kept where that stands, never V numbers
vector        y = f(x, p), each element with its own of p: a = 1, and g times dy/dp (`ia3`, `dora`)
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ModelError
from . import dora, ia3
from .calls import given
from .layers import Layer
from .products import is_conv1d, is_plain, near

# Norms whose code multiplies by a vector that cannot be given row by row: what that multiplies.
NORMS: dict[Any, Any] = {
    nn.LayerNorm.forward: lambda m, x: F.layer_norm(x, m.normalized_shape, eps=m.eps),
    nn.RMSNorm.forward: lambda m, x: F.rms_norm(x, m.normalized_shape, eps=m.eps),
}


@torch.no_grad()
def read(layer: Layer, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor:
    """What is kept of a call until its gradient arrives: what it is given, or of a vector dy/dp, in
    the shape of y.

    Raises:
        ModelError: of y it cannot be told what each element of p does.
    """
    x = given(args, kwargs)
    if not isinstance(output, Tensor):
        raise _refused(layer, module, f"returns a {type(output).__name__}")
    if layer.kind != "vector":
        return x
    if ia3.is_ia3(module):
        return ia3.multiplied(module, str(layer.parameter), x)
    if dora.is_dora(module):
        return dora.multiplied(module, x, kwargs, output)
    if _is_linear(module):
        return output.new_ones(()).expand(output.shape)
    if (normalised := NORMS.get(type(module).forward)) is not None:
        known = layer.parameter == "weight"
        return normalised(module, x) if known else output.new_ones(()).expand(output.shape)
    with torch.enable_grad():
        p = _by_row(layer, module, output).requires_grad_()
        y = _run(layer, module, p, args, kwargs)
        if y.shape != output.shape or not y.requires_grad:
            raise _refused(layer, module, "computes nothing of it row by row")
        (u,) = torch.autograd.grad(y, p, torch.ones_like(y))
    return u


@torch.no_grad()
def verify(layer: Layer, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
    """Refuse a layer that computes something else than its kind says.

    Raises:
        ModelError: names it.
    """
    if layer.kind == "vector":
        _verify_vector(layer, module, args, kwargs, output)
        return
    x = given(args, kwargs)
    W: Any = module.weight
    b: Any = module.bias if layer.bias else None
    if layer.kind == "convolution":
        if x.ndim != W.ndim:
            raise _refused(layer, module, f"is given {list(x.shape)}, without an axis of examples")
        y = F.linear(_patches(module, x[:1]), W.flatten(1), b).mT.reshape(output[:1].shape)
        right = bool(near(y, output[:1]))
    else:
        table: Any = module
        plain = table.max_norm is None and not table.scale_grad_by_freq
        right = plain and bool(near(W[x] * _scale(module), output))
    if not right:
        raise _refused(layer, module, "does not compute what its class says")


def as_rows(layer: Layer, x: Tensor) -> Tensor:
    """What a layer is given as [...,F], where any axis but the last may hold the sequences."""
    if layer.kind == "convolution":
        return x.flatten(1).unsqueeze(1)
    return x.unsqueeze(-1) if layer.kind == "embedding" else x


def beside(a: Tensor, g: Tensor) -> Tensor:
    """What a layer reads, in the dtype of `g` and on its device; ids stay integers."""
    return a.to(g) if a.is_floating_point() else a.to(g.device)


def operands(layer: Layer, module: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(a, g), [...,F], of what `read` kept and the gradient of the output."""
    if layer.kind == "convolution":
        return _patches(module, x), g.flatten(2).mT
    if layer.kind == "embedding":
        return x.unsqueeze(-1), _looked_up(module, x, g)
    if layer.kind == "vector":
        g = ia3.arriving(module, x, g) if ia3.is_ia3(module) else g
        return x.new_ones(()).expand(*x.shape[:-1], 1), g * x
    return x, g


def product(layer: Layer, module: nn.Module, x: Tensor, dW: Tensor) -> Tensor:
    """dy of a change dW [O,J] of the layer, before it has the shape of the output."""
    if layer.kind == "convolution":
        a, I = _patches(module, x).to(dW.dtype), layer.I
        return F.linear(a, dW[:, :I], dW[:, I] if layer.bias else None).mT
    if layer.kind == "embedding":
        return _looked_up(module, x, dW.mT[x])
    dy = dW[:, 0] * x
    return ia3.moved(module, dy) if ia3.is_ia3(module) else dy


def _patches(module: Any, x: Tensor) -> Tensor:
    """[N,C,*S] -> [N,P,I]: what the kernel sees of every output position."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    sizes = module.kernel_size, module.dilation, module.stride
    if x.ndim == 3:
        x = x.unsqueeze(2)
    kernel, dilation, stride = ((1, *size)[-2:] for size in sizes)
    return F.unfold(x, kernel, dilation=dilation, stride=stride).mT


def _looked_up(module: Any, ids: Tensor, y: Tensor) -> Tensor:
    """Rows of an embedding, or their gradients, [...,d] as they count: scaled, no padding."""
    y = y * _scale(module)
    return (
        y
        if module.padding_idx is None
        else y.masked_fill((ids == module.padding_idx).unsqueeze(-1), 0)
    )


def _scale(module: nn.Module) -> float | Tensor:
    """What transformers' scaled embeddings multiply their rows by."""
    scale: Any = getattr(module, "embed_scale", 1.0)
    return scale


def _verify_vector(
    layer: Layer, module: nn.Module, args: tuple, kwargs: dict, output: Tensor
) -> None:
    """Refuse a vector that, given to every row anew, does something else, or to other rows, too."""
    if _is_linear(module) or type(module).forward in NORMS:
        return
    if ia3.is_ia3(module):
        l = module.get_parameter(str(layer.parameter)).flatten()
        u = ia3.multiplied(module, str(layer.parameter), given(args, kwargs))
        if not near(ia3.output(module, l * u), output):
            raise _refused(layer, module, "does not multiply by it (merged, or not active?)")
        return
    if dora.is_dora(module):
        if not module.get_parameter(str(layer.parameter)).all():
            raise _refused(layer, module, "has magnitudes that are zero, which hide what they do")
        return
    p = _by_row(layer, module, output)
    y = _run(layer, module, p, args, kwargs)
    generator = torch.Generator().manual_seed(0)
    some = (torch.rand(output.shape, generator=generator) < 0.5).to(output.device)
    other = _run(layer, module, p + some.to(p.dtype), args, kwargs)
    if not near(y, output) or not near(torch.where(some, y, other), y):
        raise _refused(layer, module, "does not multiply by it, or add it, row by row")


def _is_linear(module: nn.Module) -> bool:
    """Whether the vector is the bias of a plain linear layer."""
    return (isinstance(module, nn.Linear) or is_conv1d(module)) and is_plain(module)


def _by_row(layer: Layer, module: nn.Module, output: Tensor) -> Tensor:
    """p of every row of the output, in the output's shape."""
    p = module.get_parameter(str(layer.parameter)).detach()
    if isinstance(module, nn.Linear) or output.shape[-1] != len(p):
        raise _refused(layer, module, "is not one that has one number a feature of its output")
    return p.expand(output.shape)


def _run(layer: Layer, module: nn.Module, p: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """The module's own code, with other numbers in the place of the vector."""
    twin: Any = copy.copy(module)
    twin.__dict__["_parameters"] = module._parameters | {str(layer.parameter): p}
    own = [x.detach() if isinstance(x, Tensor) else x for x in args]
    named = {k: x.detach() if isinstance(x, Tensor) else x for k, x in kwargs.items()}
    try:
        y: Tensor = twin.forward(*own, **named)
    except (RuntimeError, ValueError, TypeError) as error:
        raise _refused(layer, module, f"takes no vector of each row's own ({error})") from error
    return y


def _refused(layer: Layer, module: nn.Module, why: str) -> ModelError:
    return ModelError(
        f"layer {layer.name} ({layer.kind}): {type(module).__name__} {why}; leave it out of "
        "`layers`"
    )
