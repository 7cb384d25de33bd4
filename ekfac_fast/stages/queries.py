"""Query gradients: preconditioned, truncated in the eigenbasis, rotated back as thin factors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, get_args

import torch
from torch import Tensor, nn

from ..checks import Whole, check_json, choice, instance, path, whole
from ..curvature.basis import Basis, SharedRotation
from ..curvature.low_rank import captured_energy, rotate_back, truncate
from ..curvature.query_gradients import Dense, LowRank, QueryGradients
from ..data.batches import Indexable
from ..data.choices import OnLongExample
from ..errors import ArgumentError, DataError, NotFiniteError, StoreError
from ..model.capture import LayerBatch
from ..model.layers import Layer
from ..model.tasks import LanguageModelTask
from ..store.files import load_json, load_tensors, save_json, save_tensors
from ..store.fingerprint import fingerprint
from ..store.folder import Store
from .factors import Factors, LayerFactors, bases, check_damping
from .outgoing import Outgoing
from .run import Batch, Consumer, Run, RunArguments, Stage

# Dense preconditioned gradients of this size exist at a time, before they are truncated.
DENSE_BYTES = 1 << 30
TENSORS, FACTS = "queries.safetensors", "queries.json"
SCHEMA = {
    "layers": [{"name": str, "I": Whole(1), "O": Whole(1), "bias": bool}],
    "rank": (None, Whole(1)),
    "damping": [float],
}


@dataclass(frozen=True)
class LayerQueries:
    """One layer's preconditioned query gradients in weight space: L R of rank K, or P dense.

    L [Q,O,K] and R [Q,K,J], or P [Q,O,J]; `energy` [Q] is the share of ||P||^2 that L R keeps.
    """

    layer: Layer
    L: Tensor | None
    R: Tensor | None
    P: Tensor | None
    energy: Tensor

    @property
    def gradients(self) -> QueryGradients:
        """As they are kept."""
        if self.P is not None:
            return Dense(self.P)
        assert self.L is not None
        assert self.R is not None
        return LowRank(self.L, self.R)

    def dense(self) -> Tensor:
        """The preconditioned gradients (G + damping)^-1 grad f, the iHVP: [Q,O,J]."""
        return self.gradients.dense()


@dataclass(frozen=True)
class Queries:
    """Preconditioned gradients of every query in every layer.

    `measurements` [Q] are the measured values, -log p(completion | prompt) for language models;
    `examples` the queries' token ids and labels (empty for other tasks); `damping` one a layer;
    `facts` what they were prepared from (empty where they were put together by hand).
    """

    layers: tuple[LayerQueries, ...]
    rank: int | None
    damping: tuple[float, ...]
    measurements: Tensor
    examples: tuple[tuple[Tensor, Tensor], ...]
    facts: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.measurements)

    @property
    def identity(self) -> str:
        """Names these queries: by what they were prepared from, or by their values."""
        if self.facts:
            return fingerprint(self.facts)
        return fingerprint([(x.L, x.R, x.P) for x in self.layers])

    def preconditioned(self, layer: str) -> Tensor:
        """(G + damping)^-1 grad f of one layer: [Q,O,J].

        Raises:
            KeyError: no such layer; names those there are.
        """
        for queries in self.layers:
            if queries.layer.name == layer:
                return queries.dense()
        raise KeyError(f"{layer}: the layers are {', '.join(q.layer.name for q in self.layers)}")

    def check_model(self, model: str, asked: str) -> None:
        """ArgumentError where they were prepared on other weights than those of `model`."""
        if self.facts and self.facts["model"] != model:
            raise ArgumentError(
                f"{asked}: the queries were prepared on a model of fingerprint "
                f"{self.facts['model']}, this one's is {model}: other weights or another "
                "configuration. Use the model that they were prepared on, or prepare them again"
            )

    def save(self, folder: str | Path) -> None:
        """Write `queries.safetensors` and `queries.json` into `folder`."""
        tensors = {"measurements": self.measurements}
        for at, queries in enumerate(self.layers):
            parts = {name: getattr(queries, name) for name in ("L", "R", "P", "energy")}
            tensors |= {f"{at}.{n}": x.contiguous() for n, x in parts.items() if x is not None}
        for at, (ids, labels) in enumerate(self.examples):
            tensors |= {f"ids.{at}": ids, f"labels.{at}": labels}
        save_tensors(Path(folder) / TENSORS, tensors)
        layers = [vars(queries.layer) for queries in self.layers]
        told = {"layers": layers, "rank": self.rank, "damping": self.damping, "facts": self.facts}
        save_json(Path(folder) / FACTS, told)

    @classmethod
    def load(cls, folder: str | Path) -> "Queries":
        """Read what `save` wrote; StoreError names a missing or damaged file."""
        told = load_json(Path(folder) / FACTS)
        # Older versions wrote neither facts nor checksums.
        ours = isinstance(told, dict) and "facts" in told
        told = load_json(Path(folder) / FACTS, ours=ours)
        check_json(told, SCHEMA, Path(folder) / FACTS, "Prepare the queries again")
        tensors = load_tensors(Path(folder) / TENSORS, ours=ours)
        try:
            layers = tuple(
                _layer(Layer(**(layer | {"also": tuple(layer.get("also", ()))})), tensors, f"{at}.")
                for at, layer in enumerate(told["layers"])
            )
            count = sum(name.startswith("ids.") for name in tensors)
            examples = tuple((tensors[f"ids.{i}"], tensors[f"labels.{i}"]) for i in range(count))
            return cls(
                layers,
                told["rank"],
                tuple(told["damping"]),
                tensors["measurements"],
                examples,
                told.get("facts"),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{Path(folder) / FACTS}: does not fit {TENSORS} ({error!r}). Prepare the queries "
                "again"
            ) from error


def prepare_queries(
    model: nn.Module,
    factors: Factors,
    queries: Indexable,
    *,
    rank: int | None = 32,
    damping: float | None = None,
    out: str | Path | None = None,
    **arguments: Unpack[RunArguments],
) -> Queries:
    """Precondition the gradient of every query's measurement (Eq. 21), layer by layer.

    Args:
        model: the model that `factors` were fitted on.
        factors: from `fit`, or `Factors(folder)`.
        queries: examples whose `labels` are -100 on the prompt.
        rank: K of the factors that represent a query; None keeps full rank.
        damping: absolute, added to every eigenvalue; None: a tenth of each layer's mean eigenvalue.
        out: a folder to keep what is prepared, and to continue in after a kill.
        arguments: see `RunArguments`.

    Raises:
        ArgumentError: the factors belong to another model.
        DataError: a query is longer than the model has positions, or has nothing to measure.
        NotFiniteError: a measurement or a gradient is not finite.
    """
    rank = None if rank is None else whole("rank", rank)
    damping = check_damping(damping)
    instance("factors", factors, Factors, "what fit returns, or Factors(folder)")
    out = None if out is None else path("out", out)
    layers = factors.layers(model)
    choice("on_long", arguments.get("on_long", "refuse"), get_args(OnLongExample))
    run = Run(model, queries, {**arguments, "on_long": "refuse"})
    facts = run.facts() | {
        "factors": factors.identity,
        "layers": [layer.name for layer in layers],
        "rank": rank,
        "damping": damping,
    }
    factors.check_model(facts["model"], "prepare_queries")
    _check_targets(run)
    dampings = factors.dampings(layers, damping)
    if out is None:
        held: dict[int, dict[str, Tensor]] = {}
        batches = run.batches.divided()
        _precondition(run, factors, layers, dampings, rank, batches, (), held.__setitem__)
        parts = [held[number] for number in range(len(batches))]
        return _put_together(run, layers, dampings, rank, batches, parts, facts)
    with Store.open(out, kind="queries", facts=facts) as store:
        pieces = store.pieces()
        if not store.finished:
            batches = store.batches(run.batches.divided)
            done, keep = tuple(pieces.done), pieces.write
            _precondition(run, factors, layers, dampings, rank, batches, done, keep)
            parts = [pieces.read(number) for number in range(len(batches))]
            _put_together(run, layers, dampings, rank, batches, parts, facts).save(out)
            store.finish(seconds=run.seconds)
        pieces.remove()
    return Queries.load(out)


def _precondition(
    run: Run,
    factors: Factors,
    layers: Sequence[Layer],
    dampings: dict[str, float],
    rank: int | None,
    batches: Sequence[Sequence[int]],
    done: Sequence[int],
    keep: Callable[[int, dict[str, Tensor]], None],
) -> None:
    """The pass over the queries."""
    consumer = Preconditioning(run, factors, layers, dampings, rank, keep)
    run.each(
        Stage.QUERIES,
        layers,
        batches,
        consumer,
        done=done,
        loss=consumer.loss,
        what="measurement",
    )


def _put_together(
    run: Run,
    layers: Sequence[Layer],
    dampings: dict[str, float],
    rank: int | None,
    batches: Sequence[Sequence[int]],
    parts: Sequence[dict[str, Tensor]],
    facts: dict[str, Any],
) -> Queries:
    """The queries of all batches, in their own order."""
    order = torch.tensor([i for batch in batches for i in batch]).argsort()
    every = {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}
    examples: tuple[tuple[Tensor, Tensor], ...] = ()
    if run.batches.language:
        loaded = map(run.batches.example, range(run.batches.size))
        examples = tuple((x.input_ids, x.labels) for x in loaded)
    found = tuple(_layer(x, every, f"{x.name} ") for x in layers)
    damping = tuple(dampings[x.name] for x in layers)
    return Queries(found, rank, damping, every["measurements"], examples, facts)


def _layer(layer: Layer, tensors: dict[str, Tensor], prefix: str) -> LayerQueries:
    """One layer's queries, from tensors by name."""
    L, R, P = (tensors.get(f"{prefix}{part}") for part in ("L", "R", "P"))
    return LayerQueries(layer, L, R, P, tensors[f"{prefix}energy"])


def _check_targets(run: Run) -> None:
    """Refuse queries that measure nothing."""
    if not run.batches.language or not run.batches.without_targets:
        return
    for index in range(run.batches.size):
        if not run.batches.example(index).targets:
            raise DataError(
                f"query {index}: no token of it is measured (labels are -100 throughout, or only "
                "at the first token, which nothing predicts)"
            )


class Preconditioning(Consumer):
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
        self.run, self.rank, self.keep = run, rank, keep
        self.bases = bases(factors, layers, damping, run.dtype, run.device)
        self.rotate = SharedRotation()
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

    def end(self, batch: Batch) -> None:
        """Keep the batch."""
        found = self.found.take()
        for name, x in found.items():
            finite = x.isfinite().flatten(1).all(1) if x.ndim > 1 else x.isfinite()
            if not bool(finite.all()):
                query = batch.indices[int((~finite).nonzero()[0])]
                raise NotFiniteError(
                    f"query {query}: {name} is not finite: its gradient overflowed, or is NaN "
                    "where the measurement is not"
                )
        self.keep(batch.number, found)


def measures_each(task: LanguageModelTask) -> bool:
    """Whether the measurement is the sum of `negative_log_likelihoods`, and not a class's own."""
    return type(task).compute_measurement is LanguageModelTask.compute_measurement


def represented(P: Tensor, basis: Basis, rank: int | None) -> dict[str, Tensor]:
    """P [Q,O,J] of the eigenbasis in weight space, whole or as L and R."""
    if rank is None:
        return {"P": basis.rotate_back(P), "energy": torch.ones(len(P))}
    assert basis.Qg is not None
    assert basis.Qa is not None
    L, R = truncate(P, rank)
    energy = captured_energy(P, L, R).float()
    L, R = rotate_back(L, R, basis.Qg.to(P.dtype), basis.Qa.to(P.dtype))
    return {"L": L, "R": R, "energy": energy}
