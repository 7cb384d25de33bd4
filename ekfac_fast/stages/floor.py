"""What a scan costs a model, whatever is made of it."""

from collections.abc import Sequence
from typing import Unpack

from torch import nn

from ..data.examples import Indexable
from ..model.layer_batch import LayerBatch
from ..model.layers import Layer
from .consumer import Batch, Consumer
from .run import Run, RunArguments, Stage


def floor_seconds(
    model: nn.Module, dataset: Indexable, layers: Sequence[Layer], **arguments: Unpack[RunArguments]
) -> float:
    """Seconds of a forward and gradient-to-activations backward over a scan's batches, no more."""
    run = Run(model, dataset, arguments)
    run.each(Stage.SCAN, layers, run.batches.divided(), _Nothing())
    return run.seconds[Stage.SCAN]


class _Nothing(Consumer):
    def add(self, seen: LayerBatch, batch: Batch) -> None:
        """Nothing."""
