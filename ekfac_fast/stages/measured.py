"""A pass over queries: what each measures, and its gradient; preconditioned, truncated in the
eigenbasis and rotated back as thin factors, or as it is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..checks import listed
from ..curvature.basis import Basis, Eigenvectors, SharedRotation
from ..curvature.lookups import Lookups, are_ids
from ..curvature.low_rank import captured_energy, rotate_back, truncate
from ..errors import NotFiniteError
from ..model.layer_batch import LayerBatch
from ..model.layers import Layer
from ..model.tasks import Task, summed
from ..model.text_tasks import TextTask
from ..ops.gradients import gradients
from ..ops.shapes import wide
from .consumer import Batch, Consumer
from .factors import LayerFactors, bases
from .outgoing import Outgoing
from .run import Run, accumulator
from .trial import check_is_sum

# Dense preconditioned gradients of this size exist at a time, before they are truncated. On a CPU
# they stay in its cache, and under the 32 MiB from which on malloc maps every block anew.
DENSE_BYTES = {"cpu": 28 << 20}
DEVICE_DENSE_BYTES = 1 << 30


def dense_bytes(device: torch.device) -> int:
    """What preconditioned gradients may take at a time."""
    return DENSE_BYTES.get(device.type, DEVICE_DENSE_BYTES)


class Measuring(Consumer):
    """Every query's measurement, and what `add` finds beside it, kept a batch at a time."""

    def __init__(self, run: Run, keep: Callable[[int, dict[str, Tensor]], None]) -> None:
        self.run, self.keep = run, keep
        self.found: Outgoing[str] = Outgoing()

    def loss(self, batch: Batch) -> Tensor:
        """The measurement, summed over the batch; each query's own value is kept."""
        task, model = self.run.task, self.run.model
        if measures_each(task):
            values = task.measurements(batch.inputs, model)
            self.found["measurements"] = values.detach().float()
            return values.sum()
        value = task.compute_measurement(batch=batch.inputs, model=model)
        value = summed(value, task, "compute_measurement")
        self.found["measurements"] = self._alone(batch, value)
        return value

    def _alone(self, batch: Batch, value: Tensor) -> Tensor:
        """A task measures sums: each query's own value takes a pass of its own.

        Raises:
            ArgumentError: what it measures of the batch is not their sum.
        """
        if len(batch.indices) == 1:
            return value.detach().float().reshape(1)
        with torch.no_grad():
            each = [
                self.run.task.compute_measurement(
                    batch=self.run.batches.load([index]), model=self.run.model
                )
                for index in batch.indices
            ]
        found = torch.stack([x.detach().float().reshape(()) for x in each])
        check_is_sum(
            self.run, "compute_measurement", value.item(), found.tolist(),
            f"queries {listed([*map(str, batch.indices)])}", mean=True,
        )  # fmt: skip
        return found

    def basis(self, layer: str, device: torch.device) -> Any:
        """What `dense` and `kept` of a layer need; it may travel, so that it is asked for once."""

    def dense(self, seen: LayerBatch, basis: Any, together: bool) -> Iterator[Tensor]:
        """[b,O,J] of one layer, some queries at a time; all `together`, their sum, [1,O,J]."""
        raise NotImplementedError

    def kept(self, layer: str, basis: Any, dense: Tensor) -> dict[str, Tensor]:
        """What is kept of it, by the names of a piece."""
        raise NotImplementedError

    def add(self, seen: LayerBatch, batch: Batch) -> None:
        """One layer of a batch of queries."""
        name, basis = seen.layer.name, self.basis(seen.layer.name, seen.g.device)
        parts = [self.kept(name, basis, x) for x in self.dense(seen, basis, together=False)]
        for name in parts[0]:
            self.found[name] = torch.cat([x[name] for x in parts])

    def end(self, batch: Batch) -> None:
        """Keep the batch."""
        self.run.inputs.check()
        self.keep(batch.number, self.checked(batch))

    def checked(self, batch: Batch) -> dict[str, Tensor]:
        """What was found in a batch.

        Raises:
            NotFiniteError: something is not finite; names the query.
        """
        found = self.found.take()
        for name, x in found.items():
            finite = x.isfinite().flatten(1).all(1) if x.ndim > 1 else x.isfinite()
            if not bool(finite.all()):
                query = batch.indices[int((~finite).nonzero()[0])]
                raise NotFiniteError(
                    f"query {query}: {name} is not finite: its gradient overflowed, or is NaN "
                    "where the measurement is not. Look at the query, or leave it out"
                )
        return found


class Gradients(Measuring):
    """G = sum_t g_t (a_t, 1)^T of every query, whole: [B,O,J] of every layer."""

    def dense(self, seen: LayerBatch, basis: Any, together: bool) -> Iterator[Tensor]:
        """The gradients."""
        g, a = (_as_one(x, together) for x in (seen.g, seen.a))
        g = g.to(wide(g.dtype))
        if are_ids(a):
            yield Lookups.of(g, a).whole(seen.layer.I)
        else:
            yield gradients(g, a.to(g.dtype), seen.layer.bias)

    def kept(self, layer: str, basis: Any, dense: Tensor) -> dict[str, Tensor]:
        """As they are."""
        return {layer: dense}


class Preconditioning(Measuring):
    """P = (Qg^T G Qa) / (lam + damping) of every query, low rank, in weight space."""

    def __init__(
        self,
        run: Run,
        factors: Mapping[str, LayerFactors],
        layers: Sequence[Layer],
        damping: dict[str, float],
        rank: int | None,
        keep: Callable[[int, dict[str, Tensor]], None],
    ) -> None:
        super().__init__(run, keep)
        self.rank = rank
        self.bases = bases(factors, layers, damping, run.dtype, run.places(layers))
        self.rotate = SharedRotation()

    def basis(self, layer: str, device: torch.device) -> Basis:
        """The layer's own."""
        return self.bases[layer].at(device)

    def dense(self, seen: LayerBatch, basis: Basis, together: bool) -> Iterator[Tensor]:
        """Preconditioned, `dense_bytes` of them at a time."""
        basis, a, bias = self.rotate(
            basis, seen.g, seen.a, seen.layer.bias, seen.shared, seen.readers
        )
        g, a = (_as_one(x, together) for x in (seen.g, a))
        some = max(1, dense_bytes(seen.g.device) // (4 * seen.layer.O * seen.layer.J))
        for b in range(0, len(g), some):
            yield basis.precondition(g[b : b + some], a[b : b + some], bias)

    def kept(self, layer: str, basis: Basis, dense: Tensor) -> dict[str, Tensor]:
        """In weight space, of low rank."""
        found = represented(dense, basis, self.rank)
        return {f"{layer} {part}": x for part, x in found.items()}


class Summing(Consumer):
    """The sum over the queries of a pass of what another consumer finds of each: a set that is one
    query. Gradients add up, and preconditioning is linear; a rank is taken of the sum.
    """

    def __init__(self, each: Measuring, layers: Sequence[Layer]) -> None:
        self.each, run = each, each.run
        self.loss = each.loss
        dtype, places = accumulator(run.model), run.places(layers)
        self.sums = {
            x.name: torch.zeros(1, x.O, x.J, dtype=dtype, device=places[x.name]) for x in layers
        }
        self.measured = torch.zeros(1, dtype=torch.float64)

    def add(self, seen: LayerBatch, batch: Batch) -> None:
        """One layer of a batch of the set."""
        basis = self.each.basis(seen.layer.name, seen.g.device)
        for x in self.each.dense(seen, basis, together=True):
            self.sums[seen.layer.name] += x

    def end(self, batch: Batch) -> None:
        """Add the measurements up."""
        self.measured += self.each.checked(batch)["measurements"].double().sum()

    def collected(self, divisor: int) -> dict[str, Tensor]:
        """The piece of the set, over `divisor`, in the first process; nothing elsewhere.

        Raises:
            NotFiniteError: a sum is not finite; names the layer.
        """
        processes, found = self.each.run.processes, dict[str, Tensor]()
        for name, x in self.sums.items():
            total = processes.summed(x) / divisor
            if not processes.first:
                continue
            if not bool(total.isfinite().all()):
                raise NotFiniteError(f"the sum of a set of queries overflowed in layer {name}")
            kept = self.each.kept(name, self.each.basis(name, total.device), total)
            found |= {part: y.cpu() for part, y in kept.items()}
        measured = torch.stack(processes.gathered(self.measured)).sum(0)
        return found | {"measurements": (measured / divisor).float()} if processes.first else {}


def _as_one(x: Tensor, together: bool) -> Tensor:
    """[B,rows,F] as it is, or as one sequence [1,B * rows,F]."""
    return x.flatten(0, 1).unsqueeze(0) if together else x


def measures_each(task: Task) -> TypeGuard[TextTask]:
    """Whether the measurement is the sum of `measurements`, and not a class's own."""
    own = TextTask.compute_measurement
    return isinstance(task, TextTask) and type(task).compute_measurement is own


def represented(P: Tensor, vectors: Eigenvectors, rank: int | None) -> dict[str, Tensor]:
    """P [Q,O,J] of the eigenbasis in weight space, whole or as L and R."""
    if rank is None:
        return {"P": vectors.rotate_back(P), "energy": torch.ones(len(P))}
    L, R = truncate(P, rank)
    energy = captured_energy(P, L, R).float()
    Qg, Qa = (x if x is None else x.to(P.dtype) for x in (vectors.Qg, vectors.Qa))
    L, R = rotate_back(L, R, Qg, Qa)
    return {"L": L, "R": R, "energy": energy}
