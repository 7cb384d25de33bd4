"""Which of several outputs of a module is its product W x + b."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError
from .layers import Layer
from .products import is_product


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors of a tuple, a list or a mapping; of anything else, none."""
    given = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [t for t in given if isinstance(t, Tensor)] if isinstance(given, Iterable) else []


def product_among(layer: Layer, module: nn.Module, x: Tensor, outputs: Any) -> int:
    """Which of the tensors of a layer's outputs is W x + b, with all others made of that one.

    A router returns its logits and what it has made of them. The gradient that arrives at the
    logits is the layer's if whatever else was made of the product was made of that very tensor.

    Raises:
        ModelError: there is none, or more than one, or something was made of the product before.
    """
    tensors = tensors_of(outputs)
    found = [at for at, t in enumerate(tensors) if _is_product(layer, module, x, t)]
    if len(found) != 1:
        raise ModelError(
            _refusal(layer, module, outputs, f"{len(found)} of its outputs are W x + b")
        )
    product = tensors[found[0]].grad_fn
    inside = {*_nodes([product], {x.grad_fn})} - {product}
    others = [t.grad_fn for t in tensors]
    if inside & {*_nodes(others, {x.grad_fn, product})}:
        raise ModelError(
            _refusal(layer, module, outputs, "another output is made of W x + b beside it")
        )
    return found[0]


def _refusal(layer: Layer, module: nn.Module, outputs: Any, why: str) -> str:
    return (
        f"layer {layer.name} ({type(module).__name__}) returns a {type(outputs).__name__}, not the "
        f"product alone, and {why}: what is made of it inside cannot be tracked; leave it out of "
        "`layers`"
    )


def _is_product(layer: Layer, module: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether y has the shape, the graph and the numbers of the product."""
    fits = y.requires_grad and y.shape == (*x.shape[:-1], layer.O)
    return fits and bool(is_product(module, x, y))


def _nodes(roots: Sequence[Any], without: set[Any]) -> Iterator[Any]:
    """Nodes of the graph that lead to these, as far as others stand in the way."""
    seen, left = {None, *without}, [*roots]
    while left:
        if (node := left.pop()) not in seen:
            seen.add(node)
            yield node
            left.extend(n for n, _ in node.next_functions)
