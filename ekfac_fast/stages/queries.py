"""Queries prepared: gradients preconditioned or refined, then truncated, kept in weight space."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, get_args

import torch
from torch import Tensor, nn

from ..checks import Whole, check_json, choice, instance, path, whole
from ..curvature.basis import Eigenvectors
from ..curvature.query_gradients import Dense, LowRank, QueryGradients
from ..data.choices import OnLongExample
from ..data.examples import Indexable, tokenized_by
from ..errors import ArgumentError, DataError, StoreError
from ..model.identity import model_fingerprint
from ..model.layers import Layer
from ..store.files import load_json, load_tensors, save_json, save_tensors
from ..store.fingerprint import fingerprint
from ..store.folder import Pieces, Store
from .directions import as_parameters, moved
from .factors import Factors, check_damping, check_same, tell_of_zeros
from .measured import Gradients, Measuring, Preconditioning, represented
from .refine import Refinement, Refining
from .run import Run, RunArguments, Stage

TENSORS, FACTS = "queries.safetensors", "queries.json"
# Of a run under way: what the pass over the queries found, and what a refinement made of it.
PIECES = ("shard", "refined")
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
    `facts` what they were prepared from (empty where they were put together by hand); `refinement`
    what one came to.
    """

    layers: tuple[LayerQueries, ...]
    rank: int | None
    damping: tuple[float, ...]
    measurements: Tensor
    examples: tuple[tuple[Tensor, Tensor], ...]
    facts: dict[str, Any] | None = None
    refinement: Refinement | None = None

    def __len__(self) -> int:
        return len(self.measurements)

    @property
    def identity(self) -> str:
        """Names these queries: by what they were prepared from, or by their values."""
        if self.facts:
            return fingerprint(self.facts)
        return fingerprint([(x.L, x.R, x.P) for x in self.layers])

    @property
    def residual(self) -> Tensor | None:
        """||grad f - (H + damping) x|| / ||grad f|| of every refined query: [Q]."""
        return None if self.refinement is None else self.refinement.residual

    def preconditioned(self, layer: str) -> Tensor:
        """(G + damping)^-1 grad f of one layer: [Q,O,J].

        Raises:
            KeyError: no such layer; names those there are.
        """
        for queries in self.layers:
            if queries.layer.name == layer:
                return queries.dense()
        raise KeyError(f"{layer}: the layers are {', '.join(q.layer.name for q in self.layers)}")

    def parameters(self, model: nn.Module, query: int = 0) -> dict[str, Tensor]:
        """(G + damping)^-1 grad f of one query, by the names and in the shapes of the checkpoint's
        parameters: `weight - alpha * ihvp` raises log p(completion | prompt) where alpha is small.

        Raises:
            ArgumentError: no such query; the queries were prepared on another model.
        """
        instance("model", model, nn.Module, "a torch module")
        whole("query", query, 0, len(self) - 1)
        same = {"model": model_fingerprint(model), "tokenizer": None}
        self.check_run(same, "parameters")
        each = ((x.layer, x.gradients.each(lambda t: t[query : query + 1])) for x in self.layers)
        return as_parameters(model, {layer: own.dense()[0] for layer, own in each})

    def export(self, file: str | Path, model: nn.Module, query: int = 0) -> Path:
        """Write `parameters` as a safetensors file; it has a checksum, and says which query."""
        file = path("file", file)
        save_tensors(file, self.parameters(model, query), {"query": str(query)})
        return file

    def apply(self, model: nn.Module, alpha: float, query: int = 0) -> AbstractContextManager[None]:
        """`with queries.apply(model, alpha):` the weights are theta + alpha x iHVP; afterwards they
        are bitwise what they were. alpha < 0 raises log p(completion | prompt).
        """
        return moved(model, self.parameters(model, query), alpha)

    def check_run(self, facts: Mapping[str, Any], asked: str) -> None:
        """ArgumentError where they were prepared on another model, or with another tokenizer."""
        check_same(self.facts, facts, f"{asked}: the queries were prepared", "prepare them")

    def save(self, folder: str | Path) -> None:
        """Write `queries.safetensors` and `queries.json` into `folder`."""
        tensors = {"measurements": self.measurements}
        for at, queries in enumerate(self.layers):
            parts = {name: getattr(queries, name) for name in ("L", "R", "P", "energy")}
            tensors |= {f"{at}.{n}": x.contiguous() for n, x in parts.items() if x is not None}
        for at, (ids, labels) in enumerate(self.examples):
            tensors |= {f"ids.{at}": ids, f"labels.{at}": labels}
        tensors |= {f"refinement.{n}": x for n, x in _told(self.refinement).items()}
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
                _refinement(told.get("facts"), tensors, "refinement."),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{Path(folder) / FACTS}: does not fit {TENSORS} ({error!r}). Prepare the queries "
                "again"
            ) from error


@torch.inference_mode(False)
def prepare_queries(
    model: nn.Module,
    factors: Factors,
    queries: Indexable,
    *,
    rank: int | None = 32,
    damping: float | None = None,
    refine: str | None = None,
    dataset: Indexable | None = None,
    refine_examples: int | None = None,
    refine_seed: int = 0,
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
        refine: "cg:10" goes on from there by so many conjugate gradient steps on the Gauss-Newton
            matrix of all tracked layers together, before a rank is taken; also "lissa:5000" and
            "astra:300". See `stages/refine.py`.
        dataset: the training data, of which a refinement takes a sample.
        refine_examples: how many examples of it (256, or all where there are fewer).
        refine_seed: of the choice.
        out: a folder to keep what is prepared, and to continue in after a kill.
        arguments: see `RunArguments`.

    Raises:
        ArgumentError: the factors belong to another model, or a refinement cannot be (see
            `Refining`).
        DataError: a query is longer than the model has positions, or has nothing to measure.
        NotFiniteError: a measurement or a gradient is not finite.
    """
    rank = None if rank is None else whole("rank", rank)
    damping = check_damping(damping)
    instance("factors", factors, Factors, "what fit returns, or Factors(folder)")
    out = None if out is None else path("out", out)
    whole("refine_seed", refine_seed, 0, 2**64 - 1)
    if refine is None and (dataset is not None or refine_examples is not None):
        raise ArgumentError(
            "dataset and refine_examples are a refinement's: give refine, or no such"
        )
    layers = factors.layers(model)
    choice("on_long", arguments.get("on_long", "refuse"), get_args(OnLongExample))
    run = Run(model, queries, {**arguments, "on_long": "refuse"})
    facts = (
        run.facts()
        | {
            "factors": factors.identity,
            "layers": [layer.name for layer in layers],
            "rank": rank,
            "damping": damping,
        }
        | ({"blocks": factors.blocks} if factors.blocks > 1 else {})
    )
    factors.check_run(facts, "prepare_queries")
    _check_targets(run)
    job = _Preparation(run, factors, layers, factors.dampings(layers, damping), rank)
    if refine is not None:
        job.refining = Refining(
            model, factors, layers, job.dampings, dataset, refine, refine_examples, refine_seed,
            arguments,
        )  # fmt: skip
        same = {"model": facts["model"], "tokenizer": tokenized_by(dataset)}
        factors.check_run(same, "prepare_queries, the data to refine on")
        facts["refine"] = job.refining.facts
    if out is None:
        return job.prepared(run.batches.divided(), facts, lambda _: _Held(), None)
    with Store.open(out, kind="queries", facts=facts) as store:
        if not store.finished:
            batches = store.batches(run.batches.divided)
            job.prepared(batches, facts, store.pieces, store).save(out)
            store.finish(seconds=run.seconds)
        for name in PIECES:
            store.pieces(name).remove()
    return Queries.load(out)


class _Held:
    """Pieces of a folder, where there is none."""

    def __init__(self) -> None:
        self.held: dict[int, dict[str, Tensor]] = {}
        self.done: set[int] = set()
        self.write, self.read = self.held.__setitem__, self.held.__getitem__


@dataclass
class _Preparation:
    """One run of `prepare_queries`."""

    run: Run
    factors: Factors
    layers: Sequence[Layer]
    dampings: dict[str, float]
    rank: int | None
    refining: Refining | None = None

    def prepared(
        self,
        batches: Sequence[Sequence[int]],
        facts: dict[str, Any],
        pieces_of: Callable[[str], Pieces | _Held],
        store: Store | None,
    ) -> Queries:
        """The pass over the queries, and what is made of it."""
        found = pieces_of(PIECES[0])
        consumer: Measuring = Gradients(self.run, found.write)
        if self.refining is None:
            consumer = Preconditioning(
                self.run, self.factors, self.layers, self.dampings, self.rank, found.write
            )
        self.run.each(
            Stage.QUERIES, self.layers, batches, consumer, done=tuple(found.done),
            loss=consumer.loss, what="measurement",
        )  # fmt: skip
        parts = [found.read(number) for number in range(len(batches))]
        if self.refining is not None:
            every = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            order = [i for batch in batches for i in batch]
            batches, parts = self._refined(self.refining, every, order, pieces_of(PIECES[1]), store)
        return self._put_together(batches, parts, facts)

    def _refined(
        self,
        refining: Refining,
        every: dict[str, Tensor],
        order: Sequence[int],
        pieces: Pieces | _Held,
        store: Store | None,
    ) -> tuple[list[list[int]], list[dict[str, Tensor]]]:
        """Groups of queries, and what became of each."""
        some, parts = refining.at_once, []
        groups = [list(order[at : at + some]) for at in range(0, len(order), some)]
        for number, group in enumerate(groups):
            if number not in pieces.done:
                mine, name = slice(number * some, (number + 1) * some), f"refinement_{number}_state"
                b = {x.name: every[x.name][mine] for x in self.layers}
                solved, told = refining.solve(b, group, store, name)
                part = {f"refined {n}": x for n, x in told.items()}
                for layer, x in solved.items():
                    for form, y in represented(x, Eigenvectors(None, None), self.rank).items():
                        part[f"{layer} {form}"] = y.cpu()
                pieces.write(number, part | {"measurements": every["measurements"][mine]})
                if store is not None:
                    store.remove_state(name)
            parts.append(pieces.read(number))
        self.run.seconds |= refining.run.seconds
        return groups, parts

    def _put_together(
        self,
        batches: Sequence[Sequence[int]],
        parts: Sequence[dict[str, Tensor]],
        facts: dict[str, Any],
    ) -> Queries:
        """The queries of all batches, in their own order."""
        run, order = self.run, torch.tensor([i for batch in batches for i in batch]).argsort()
        every = {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}
        examples: tuple[tuple[Tensor, Tensor], ...] = ()
        if run.batches.language:
            loaded = map(run.batches.example, range(run.batches.size))
            examples = tuple((x.input_ids, x.labels) for x in loaded)
        found = tuple(_layer(x, every, f"{x.name} ") for x in self.layers)
        form = "P" if self.rank is None else "L"
        # That no query is routed to an expert is no fault of anyone's.
        dense = [x for x in self.layers if x.expert is None]
        tell_of_zeros(((x.name, every[f"{x.name} {form}"]) for x in dense), "every query")
        damping = tuple(self.dampings[x.name] for x in self.layers)
        refinement = _refinement(facts, every, "refined ")
        return Queries(
            found, self.rank, damping, every["measurements"], examples, facts, refinement
        )


def _told(refinement: Refinement | None) -> dict[str, Tensor]:
    """The tensors of a refinement."""
    named = {} if refinement is None else vars(refinement)
    return {name: x for name, x in named.items() if isinstance(x, Tensor)}


def _refinement(
    facts: dict[str, Any] | None, tensors: dict[str, Tensor], prefix: str
) -> Refinement | None:
    """A refinement from tensors by name; None where there was none."""
    if not facts or "refine" not in facts:
        return None
    names = ("residual", "before", "iterations", "outcomes")
    told, found = facts["refine"], (tensors[f"{prefix}{n}"] for n in names)
    return Refinement(told["method"], len(told["examples"]), *found)


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
