"""(a, g) of one pass that wait in memory for the next stage."""

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..curvature.memory import free_bytes
from ..model.layer_batch import LayerBatch
from ..model.layers import Layer
from .consumer import Batch
from .run import Run

# Of the free memory, what may wait.
SHARE = 0.25


def token_bytes(layers: Sequence[Layer], itemsize: int) -> int:
    """Of a token's rows; those of experts wait with as many that are none."""
    return itemsize * math.ceil(sum(min(1.0, 2 * x.share) * (x.read + x.O) for x in layers))


class Waiting(dict[int, list[LayerBatch]]):
    """(a, g) of the eigenvalue pass by batch, until there is an eigenbasis."""

    def __init__(self, run: Run, layers: list[Layer], *, wanted: bool = True) -> None:
        super().__init__()
        # A sharded model lets its weights go after one backward pass.
        self._room = int(SHARE * free_bytes(run.device)) if wanted and not run.sharded else 0
        self._taken: set[int] = set()
        self._token = token_bytes(layers, run.dtype.itemsize)

    def takes(self, batch: Batch) -> bool:
        """Whether a batch fits; its room is then taken."""
        if batch.number in self._taken:
            return True
        tokens = batch.grid.sequences * ((batch.grid.positions or 1) + batch.grid.before)
        if tokens * self._token > self._room:
            return False
        self._taken.add(batch.number)
        self._room -= tokens * self._token
        return True

    def keep(self, seen: LayerBatch, batch: Batch) -> None:
        """One layer of a batch; views of larger tensors are copied."""
        own = replace(seen, a=_alone(seen.a), g=_alone(seen.g))
        self.setdefault(batch.number, []).append(own)


def _alone(x: Tensor) -> Tensor:
    """`x` with a storage of its own."""
    return x if x.numel() * x.element_size() == x.untyped_storage().nbytes() else x.clone()
