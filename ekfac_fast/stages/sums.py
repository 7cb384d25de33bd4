"""A pass that sums over batches, and continues where it was."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ..curvature.sums import Sum
from ..errors import NotFiniteError
from ..store.folder import State, Store
from .consumer import Batch, Consumer
from .run import Run, Stage, accumulator

# Batches that are summed before their sum joins the total. A constant: results depend on it.
BATCHES_A_FOLD = 64
# The part of a sum that its state keeps beside the rest.
TOTAL = "total "


class Sums(Consumer):
    """A pass that sums over batches: its sums and the batches in them are one file.

    Of several processes each has its own, and `collected` adds them up. What a process has summed
    whose number nobody has any more (a run goes on with fewer) is added then.
    """

    # Whether what is summed is symmetric.
    symmetric = False

    def __init__(self, run: Run, store: Store, stage: Stage) -> None:
        self.run, self.store, self.stage, self.name = run, store, stage, f"{stage}_state"
        self.state: State = store.load_state(self.name)
        left = [n for n in store.states(self.name) if n >= run.processes.size]
        self._left = [n for n in left if n % run.processes.size == run.processes.rank]
        others = [store.load_state(self.name, n) for n in self._left]
        mine = self.state.done.union(*(x.done for x in others))
        self._left_edges = sum(x.notes.get("edge_draws", 0) for x in others)
        # Of all processes.
        self.done: frozenset[int] = frozenset().union(*run.processes.gathered(mine))
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

    def found(self, name: str, *shape: int, at: torch.device | None = None) -> Sum:
        """A sum as it was kept, or of nothing yet; on a device, or where batches are."""
        kept, device = self.state.tensors, at or self.run.device
        if name not in kept:
            return Sum.zero(*shape, dtype=accumulator(self.run.model), device=device)
        total = kept.pop(TOTAL + name, None)
        return Sum(kept.pop(name).to(device), None if total is None else total.to(device))

    def end(self, batch: Batch) -> None:
        """After so many batches, whatever was killed and continued between: fold."""
        self._batches += 1
        if self._batches % BATCHES_A_FOLD == 0:
            for x in self.sums().values():
                x.fold()

    def save(self, done: Collection[int]) -> None:
        """All sums after these batches."""
        sums = self.sums()
        device = self.run.device
        every = [torch.isfinite(x.value()).all().to(device) for x in sums.values()]
        finite = torch.stack(every)
        for name, right in zip(sums, finite.tolist(), strict=True):
            if not right:
                raise NotFiniteError(
                    f"the {self.stage} sum of {name} is not finite: a gradient or an activation "
                    "overflowed, or is NaN where the loss is not. Look at the model's weights, or "
                    "leave the layer out"
                )
        notes = {"seconds": self.run.seconds[self.stage], "edge_draws": self._drawn}
        kept = {name: x.rest for name, x in sums.items()} | dict(self.counts())
        kept |= {TOTAL + name: x.total for name, x in sums.items() if x.total is not None}
        self.store.save_state(self.name, kept, self.state.done.union(done), notes)

    def collected(self) -> dict[str, Tensor]:
        """What all processes have summed and counted, by name, in the first; nothing elsewhere."""
        processes = self.run.processes
        found = {name: x.value() for name, x in self.sums().items()} | dict(self.counts())
        for number in self._left:
            for name, x in _values(self.store.load_state(self.name, number).tensors).items():
                found[name] = found[name] + x.to(found[name].device) if name in found else x
        here = {name: (tuple(x.shape), x.dtype) for name, x in found.items()}
        names = {name: told for every in processes.gathered(here) for name, told in every.items()}
        for name, (shape, dtype) in names.items():
            mine = found.pop(name, None)
            if processes.size == 1 and mine is not None:
                found[name] = mine
                continue
            if mine is None:
                mine = torch.zeros(shape, dtype=dtype, device=self.run.device)
            square = len(shape) == 2 and shape[0] == shape[1]
            total = processes.summed(mine.to(self.run.device), symmetric=square and self.symmetric)
            if processes.first:
                found[name] = total
        return found if processes.first else {}

    @property
    def edge_draws(self) -> int:
        """Labels of this pass, in all processes, that rounding could flip."""
        return sum(self.run.processes.gathered(self._drawn + self._left_edges))

    @property
    def _drawn(self) -> int:
        return self._edges + self._counted()


def _values(kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums and counts of a state by name, each rounded once."""
    sums = {name: Sum(x, kept.get(TOTAL + name)) for name, x in kept.items()}
    return {name: x.value() for name, x in sums.items() if not name.startswith(TOTAL)}
