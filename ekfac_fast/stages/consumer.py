"""What a stage does with what `Run.each` meets."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.layer_batch import LayerBatch
from ..model.rows import Grid


@dataclass(frozen=True)
class Batch:
    """A batch: its place in the order, its examples, and what the task gets."""

    number: int
    indices: Sequence[int]
    inputs: Any
    grid: Grid


class Consumer:
    """What a stage does with a batch; every method is optional but `add`."""

    def begin(self, batch: Batch) -> None:
        """Before the pass."""

    def add(self, seen: LayerBatch, batch: Batch) -> None:
        """One layer of one batch, in the backward pass."""
        raise NotImplementedError

    def end(self, batch: Batch) -> None:
        """After the pass."""

    def save(self, done: Collection[int]) -> None:
        """Make durable what this pass has done up to here: these batches."""

    def due(self) -> bool:
        """Whether it is time to."""
        return False
