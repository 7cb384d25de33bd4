"""Queries as they are kept: gradients preconditioned or refined, truncated, in weight space."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checks import Whole, check_json, instance, listed, path, require, whole
from ..curvature.query_gradients import Dense, LowRank, QueryGradients
from ..errors import StoreError
from ..model.identity import model_fingerprint
from ..model.layers import Layer
from ..store.files import load_json, load_tensors, mark_of, save_json, save_tensors
from ..store.fingerprint import fingerprint
from .directions import as_parameters, moved
from .factors import check_loss, check_same
from .refine import Refinement

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


@dataclass(frozen=True, repr=False, eq=False)
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

    def __repr__(self) -> str:
        rank = "full rank" if self.rank is None else f"rank {self.rank}"
        more = "" if self.refinement is None else f", refined by {self.refinement.method}"
        return f"Queries({len(self)} of {rank}, {len(self.layers)} layers{more})"

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
            ArgumentError: no such layer; names those there are.
        """
        named = {x.layer.name: x for x in self.layers}
        require(layer in named, "layer", layer, f"one of {listed(list(named))}")
        return named[layer].dense()

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
        """ArgumentError where they were prepared on another model, or with another tokenizer; or
        for another loss of the training data, where a run has one.
        """
        check_same(self.facts, facts, f"{asked}: the queries were prepared", "prepare them")
        if "task" in facts:
            check_loss((self.facts or {}).get("fitted"), facts, asked)

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
        save_json(Path(folder) / FACTS, told | {"tensors": mark_of(Path(folder) / TENSORS)})

    @classmethod
    def load(cls, folder: str | Path) -> "Queries":
        """Read what `save` wrote; StoreError names a missing or damaged file."""
        told = load_json(Path(folder) / FACTS)
        # Older versions wrote neither facts nor checksums.
        ours = isinstance(told, dict) and "facts" in told
        told = load_json(Path(folder) / FACTS, ours=ours)
        check_json(told, SCHEMA, Path(folder) / FACTS, "Prepare the queries again")
        tensors = load_tensors(Path(folder) / TENSORS, ours=ours)
        if told.get("tensors") not in (None, found := mark_of(Path(folder) / TENSORS)):
            raise StoreError(
                f"{Path(folder) / TENSORS} is not the file that {FACTS} was written with (its "
                f"checksum is {found}, there {told['tensors']}): one of them is of other queries. "
                "Put the folder's own back, or prepare the queries again"
            )
        try:
            layers = tuple(
                layer_from(
                    Layer(**(layer | {"also": tuple(layer.get("also", ()))})), tensors, f"{at}."
                )
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
                refinement_from(told.get("facts"), tensors, "refinement."),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{Path(folder) / FACTS}: does not fit {TENSORS} ({error!r}). Prepare the queries "
                "again"
            ) from error


def _told(refinement: Refinement | None) -> dict[str, Tensor]:
    """The tensors of a refinement."""
    named = {} if refinement is None else vars(refinement)
    return {name: x for name, x in named.items() if isinstance(x, Tensor)}


def refinement_from(
    facts: dict[str, Any] | None, tensors: dict[str, Tensor], prefix: str
) -> Refinement | None:
    """A refinement from tensors by name; None where there was none."""
    if not facts or "refine" not in facts:
        return None
    names = ("residual", "before", "iterations", "outcomes")
    told, found = facts["refine"], (tensors[f"{prefix}{n}"] for n in names)
    return Refinement(told["method"], len(told["examples"]), *found)


def layer_from(layer: Layer, tensors: dict[str, Tensor], prefix: str) -> LayerQueries:
    """One layer's queries, from tensors by name."""
    L, R, P = (tensors.get(f"{prefix}{part}") for part in ("L", "R", "P"))
    return LayerQueries(layer, L, R, P, tensors[f"{prefix}energy"])
