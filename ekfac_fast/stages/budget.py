"""What fits into a memory budget: tokens of a batch, layers that are fitted at once."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from torch import nn

from ..errors import ArgumentError
from ..model.layers import Layer, linear_layers
from ..model.weights import computes_in, resident_bytes

# Of what a budget leaves beside the weights, what a batch's activations may take.
ACTIVATIONS = 0.25
# Of the free memory, what the sums of a fit may take; the second draw's rows wait in another part.
SUMS = 0.5


def fitting_tokens(model: nn.Module, memory: int, most: int) -> int:
    """Tokens of a batch whose activations fit beside the weights: a pass keeps about what every
    matrix reads and writes. Logits are never whole.

    Raises:
        ArgumentError: the weights alone need more; says how much.
    """
    weights = resident_bytes(model)
    each = token_width(model) * computes_in(model).itemsize
    check_room(weights, memory)
    return max(1, min(most, int(ACTIVATIONS * (memory - weights) / max(1, each))))


def check_room(weights: int, memory: int) -> None:
    """ArgumentError where the weights leave nothing of the memory."""
    if weights >= memory:
        raise ArgumentError(
            f"memory is {memory:,} bytes, but the model's weights alone are {weights:,}: give "
            f"at least {2 * weights:,}, or load the model in a narrower dtype"
        )


def token_width(model: nn.Module) -> int:
    """Values that a pass keeps of a token: what every matrix but the head's reads and writes."""
    head = _head(model)
    layers = (x for x in linear_layers(model).values() if model.get_submodule(x.module) is not head)
    return round(sum(x.share * (x.I + x.O) for x in layers))


def head_size(model: nn.Module) -> int:
    """Values of the head's weight; 0 where the model names no head."""
    weight = getattr(_head(model), "weight", None)
    return 0 if weight is None else weight.numel()


def _head(model: nn.Module) -> nn.Module | None:
    return getattr(model, "get_output_embeddings", lambda: None)()


def fitting_bytes(layer: Layer, itemsize: int, blocks: int = 1) -> int:
    """Bytes that a layer takes while it is fitted: first its covariances, then its eigenvalues.

    Of many batches a sum is two tensors, a total and a rest.
    """
    return 2 * itemsize * max(sum(layer.covariance_sizes) // blocks, layer.O * layer.J)


def partitions(
    layers: Sequence[Layer], room: int, itemsize: int, blocks: int = 1
) -> list[list[Layer]]:
    """Layers that are fitted at once, as equal in bytes as their order allows.

    Layers of one module stay together where they fit: those that read one tensor share its sums.

    Raises:
        ArgumentError: a layer alone needs more than `room`; names it, and says how much.
    """

    def size(some: Sequence[Layer]) -> int:
        return sum(fitting_bytes(x, itemsize, blocks) for x in some)

    for layer in layers:
        if (needed := size([layer])) > room:
            raise ArgumentError(
                f"layer {layer.name} takes {needed:,} bytes while it is fitted, and {room:,} may "
                f"be taken: give a memory of {int(needed / SUMS):,} bytes beside the model and "
                "what its passes take, fit in `blocks`, or leave the layer out"
            )
    count = max(1, -(-size(layers) // max(1, room)))
    each, parts = size(layers) / count, list[list[Layer]]([[]])
    for some in _together(layers, room, size):
        now = size(parts[-1])
        full = now + size(some) > room or now + size(some) / 2 > each
        if parts[-1] and full:
            parts.append([])
        parts[-1] += some
    return parts


def _together(
    layers: Sequence[Layer], room: int, size: Callable[[Sequence[Layer]], int]
) -> Iterator[list[Layer]]:
    """Layers of one module, or, where they do not fit, one by one."""
    for _, group in groupby(layers, key=lambda x: x.module.rpartition(".")[0]):
        some = list(group)
        yield from [some] if size(some) <= room else ([x] for x in some)
