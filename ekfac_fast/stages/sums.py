"""A pass that sums over batches, and continues where it was."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ..curvature.sums import Sum
from ..errors import NotFiniteError
from ..store.folder import State, Store
from .run import Batch, Consumer, Run, Stage, accumulator

# Batches that are summed before their sum joins the total. A constant: results depend on it.
BATCHES_A_FOLD = 64


class Sums(Consumer):
    """A pass that sums over batches: its sums and the batches in them are one file."""

    def __init__(self, run: Run, store: Store, stage: Stage) -> None:
        self.run, self.store, self.stage, self.name = run, store, stage, f"{stage}_state"
        self.state: State = store.load_state(self.name)
        self._batches = len(self.state.done)
        run.seconds[stage] = self.state.notes.get("seconds", 0.0)
        # Of the task's own count, what this pass adds.
        self._edges = self.state.notes.get("edge_draws", 0) - self._counted()

    def _counted(self) -> int:
        return getattr(self.run.task, "edge_draws", 0)

    def due(self) -> bool:
        """When the folder's pace says so."""
        return self.store.due

    def sums(self) -> Mapping[str, Sum]:
        """What is summed, by name."""
        raise NotImplementedError

    def counts(self) -> Mapping[str, Tensor]:
        """What is counted, by name."""
        return {}

    def found(self, name: str, *shape: int) -> Sum:
        """A sum as it was kept, or of nothing yet."""
        kept, device = self.state.tensors, self.run.device
        if name not in kept:
            return Sum.zero(*shape, dtype=accumulator(self.run.model), device=device)
        total = kept.pop(f"total {name}", None)
        # Aligned as new memory is: a library rounds otherwise where a sum lies otherwise.
        rest = kept.pop(name).to(device, copy=True)
        return Sum(rest, None if total is None else total.to(device, copy=True))

    def end(self, batch: Batch) -> None:
        """After so many batches, whatever was killed and continued between: fold."""
        self._batches += 1
        if self._batches % BATCHES_A_FOLD == 0:
            for x in self.sums().values():
                x.fold()

    def save(self, done: Collection[int]) -> None:
        """All sums after these batches."""
        sums = self.sums()
        finite = torch.stack([torch.isfinite(x.value()).all() for x in sums.values()])
        for name, right in zip(sums, finite.tolist(), strict=True):
            if not right:
                raise NotFiniteError(
                    f"the {self.stage} sum of {name} is not finite: a gradient or an activation "
                    "overflowed, or is NaN where the loss is not. Look at the model's weights, or "
                    "leave the layer out"
                )
        notes = {"seconds": self.run.seconds[self.stage], "edge_draws": self.edge_draws}
        kept = {name: x.rest for name, x in sums.items()} | dict(self.counts())
        kept |= {f"total {name}": x.total for name, x in sums.items() if x.total is not None}
        self.store.save_state(self.name, kept, done, notes)

    @property
    def edge_draws(self) -> int:
        """Labels of this pass that rounding could flip."""
        return self._edges + self._counted()
