"""Where something comes from that is not finite: which example, and which layer."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from ..data.examples import named
from ..model.capture import Capture
from ..model.layer_batch import LayerBatch

if TYPE_CHECKING:
    from .consumer import Batch
    from .run import Loss, Run


def origin(run: "Run", capture: Capture, loss: "Loss", batches: Iterable["Batch"]) -> str:
    """A sentence on the first that can be found, by passing through these batches again.

    An input that is not finite makes all gradients so: it comes first, of the earliest layer;
    then a gradient, of the latest. Where every number is finite a product of them was not, and
    the largest are named.
    """
    inputs: list[tuple[str, int]] = []
    gradients: list[tuple[str, int]] = []
    largest = (0.0, "", 0)
    for batch in batches:

        def look(seen: LayerBatch, indices: tuple[int, ...] = tuple(batch.indices)) -> None:
            nonlocal largest
            name, used = seen.layer.name, (seen.g != 0).any(-1)
            for found, x in ((inputs, seen.a), (gradients, seen.g)):
                bad = (~x.isfinite().all(-1) & used).any(-1).nonzero().flatten().tolist()
                found.extend((name, indices[b]) for b in bad[:1])
            inputs_there = seen.a if seen.a.is_floating_point() else torch.ones_like(seen.a)
            a, g = (x.double().flatten(1).norm(dim=1) for x in (inputs_there, seen.g))
            size, b = (x.item() for x in (a * g).max(0))
            largest = max(largest, (size, name, indices[int(b)]))

        run.captured(capture, batch, loss, look)
        for found, at, what in ((inputs, -1, "input"), (gradients, 0, "gradient")):
            if found:
                name, index = found[at]
                return (
                    f". First seen in {named(run.batches.dataset, index)}: the {what} of layer "
                    f"{name} is not finite"
                )
    _, name, index = largest
    return (
        f". All inputs and gradients are finite; the largest are those of layer {name} in "
        f"{named(run.batches.dataset, index)}"
    )
