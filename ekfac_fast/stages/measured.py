"""A pass over queries: what each measures, and its gradient; preconditioned, truncated in the
eigenbasis and rotated back as thin factors, or as it is.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..curvature.basis import Eigenvectors, SharedRotation
from ..curvature.low_rank import captured_energy, rotate_back, truncate
from ..errors import NotFiniteError
from ..model.layer_batch import LayerBatch
from ..model.layers import Layer
from ..model.tasks import LanguageModelTask
from ..ops.gradients import gradients
from ..ops.shapes import wide
from .consumer import Batch, Consumer
from .factors import LayerFactors, bases
from .outgoing import Outgoing
from .run import Run

# Dense preconditioned gradients of this size exist at a time, before they are truncated.
DENSE_BYTES = 1 << 30


class Measuring(Consumer):
    """Every query's measurement, and what `add` finds beside it, kept a batch at a time."""

    def __init__(self, run: Run, keep: Callable[[int, dict[str, Tensor]], None]) -> None:
        self.run, self.keep = run, keep
        self.found: Outgoing[str] = Outgoing()

    def loss(self, batch: Batch) -> Tensor:
        """The measurement, summed over the batch; each query's own value is kept."""
        task, model = self.run.task, self.run.model
        if isinstance(task, LanguageModelTask) and measures_each(task):
            values = task.negative_log_likelihoods(batch.inputs, model)
            self.found["measurements"] = values.detach().float()
            return values.sum()
        value = task.compute_measurement(batch=batch.inputs, model=model)
        self.found["measurements"] = self._alone(batch, value)
        return value

    def _alone(self, batch: Batch, value: Tensor) -> Tensor:
        """A task measures sums: each query's own value takes a pass of its own."""
        if len(batch.indices) == 1:
            return value.detach().float().reshape(1)
        with torch.no_grad():
            each = [
                self.run.task.compute_measurement(
                    batch=self.run.batches.load([index]), model=self.run.model
                )
                for index in batch.indices
            ]
        return torch.stack([x.detach().float().reshape(()) for x in each])

    def end(self, batch: Batch) -> None:
        """Keep the batch."""
        found = self.found.take()
        for name, x in found.items():
            finite = x.isfinite().flatten(1).all(1) if x.ndim > 1 else x.isfinite()
            if not bool(finite.all()):
                query = batch.indices[int((~finite).nonzero()[0])]
                raise NotFiniteError(
                    f"query {query}: {name} is not finite: its gradient overflowed, or is NaN "
                    "where the measurement is not. Look at the query, or leave it out"
                )
        self.keep(batch.number, found)


class Gradients(Measuring):
    """G = sum_t g_t (a_t, 1)^T of every query, whole: [B,O,J] of every layer."""

    def add(self, seen: LayerBatch, batch: Batch) -> None:
        """One layer of a batch of queries."""
        dtype = wide(seen.g.dtype)
        G = gradients(seen.g.to(dtype), seen.a.to(dtype), seen.layer.bias)
        self.found[seen.layer.name] = G


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

    def add(self, seen: LayerBatch, batch: Batch) -> None:
        """One layer of a batch of queries, a gigabyte of dense gradients at a time."""
        name, g = seen.layer.name, seen.g
        whole = self.bases[name].at(g.device)
        basis, a, bias = self.rotate(whole, g, seen.a, seen.layer.bias, seen.shared, seen.readers)
        some = max(1, DENSE_BYTES // (4 * seen.layer.O * seen.layer.J))
        parts = [
            represented(
                basis.precondition(g[b : b + some], a[b : b + some], bias), whole, self.rank
            )
            for b in range(0, len(g), some)
        ]
        for part in parts[0]:
            self.found[f"{name} {part}"] = torch.cat([x[part] for x in parts])


def measures_each(task: LanguageModelTask) -> bool:
    """Whether the measurement is the sum of `negative_log_likelihoods`, and not a class's own."""
    return type(task).compute_measurement is LanguageModelTask.compute_measurement


def represented(P: Tensor, vectors: Eigenvectors, rank: int | None) -> dict[str, Tensor]:
    """P [Q,O,J] of the eigenbasis in weight space, whole or as L and R."""
    if rank is None:
        return {"P": vectors.rotate_back(P), "energy": torch.ones(len(P))}
    L, R = truncate(P, rank)
    energy = captured_energy(P, L, R).float()
    if vectors.Qg is not None and vectors.Qa is not None:
        L, R = rotate_back(L, R, vectors.Qg.to(P.dtype), vectors.Qa.to(P.dtype))
    return {"L": L, "R": R, "energy": energy}
