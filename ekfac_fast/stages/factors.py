"""EK-FAC factors on disk: eigenvectors (Eq. 16) and corrected eigenvalues (Eq. 20) of every layer.

Files have kronfluence's names and layout, so factors travel both ways.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import Whole, check_json, listed, path, whole
from ..curvature.basis import Basis
from ..curvature.blocks import Matrix, block_rows, in_blocks
from ..curvature.memory import free_bytes
from ..curvature.offload import Mapped, Travelling, placed
from ..errors import ArgumentError, NotFiniteError, Notice, StoreError
from ..model.layers import Layer, select_layers
from ..ops.shapes import wide
from ..store.files import load_tensors
from ..store.fingerprint import fingerprint
from ..store.folder import Store
from ..store.manifest import MANIFEST
from ..store.results import check_result
from .damping import layer_damping, layer_dampings
from .sample import FACT, sample_of

COVARIANCES = {
    "activation": "activation_covariance.safetensors",
    "gradient": "gradient_covariance.safetensors",
}
EIGENVECTORS = {
    "activation": "activation_eigenvectors.safetensors",
    "gradient": "gradient_eigenvectors.safetensors",
}
EIGENVALUES = {
    "activation": "activation_eigenvalues.safetensors",
    "gradient": "gradient_eigenvalues.safetensors",
}
# Tokens that each covariance was summed over.
TOKEN_COUNTS = {
    "activation": "num_activation_covariance_processed.safetensors",
    "gradient": "num_gradient_covariance_processed.safetensors",
}
# What a fit's manifest says of its covariances: in their files, or deleted once decomposed.
SUMMED, DROPPED = "summed", "dropped"
# Of the free memory of a CPU, what bases may take.
SHARE = 0.5
SCHEMA = {
    "model": str, "layers": [str], "shared_parameters": bool, "blocks": Whole(1),
    "eigenvectors": (str, None), FACT: (int, None),
}  # fmt: skip
LAMBDA, LAMBDA_COUNT = "lambda_matrix.safetensors", "num_lambda_processed.safetensors"


def blocks_of(facts: Mapping[str, Any] | None) -> int:
    """The diagonal blocks of factors with these facts; 1 where they say nothing."""
    return int((facts or {}).get("blocks", 1))


def block_facts(blocks: int, layers: Sequence[Layer]) -> dict[str, int]:
    """What `blocks_of` reads; a `Notice` says how a side is cut that they do not divide.

    Raises:
        ArgumentError: no whole number, or a side has fewer rows or is diagonal; names the layer.
    """
    if (blocks := whole("blocks", blocks)) > 1 and (
        odd := [x.name for x in layers if 0 in x.turned]
    ):
        raise ArgumentError(
            f"blocks is {blocks}, but {listed(odd, 3)} have a side that is diagonal already: fit "
            "them apart"
        )
    sides = [(x, what, n) for x in layers for what, n in (("inputs", x.J), ("outputs", x.O))]
    for layer, what, n in sides:
        if blocks > n:
            raise ArgumentError(
                f"blocks is {blocks}, but layer {layer.name} has {n} {what}: give at most "
                f"{min(n for _, _, n in sides)}, or leave small layers out of `layers`"
            )
    uneven = [(x, what, n) for x, what, n in sides if n % blocks]
    for layer, what, n in uneven[:1]:
        sizes = [len(range(n)[rows]) for rows in block_rows(n, blocks)]
        larger = sizes.count(sizes[0])
        bias = ", the bias's among them," if layer.bias and what == "inputs" else ""
        warnings.warn(
            f"{blocks} blocks do not divide {len(uneven)} of {len(sides)} sides: the {n} {what} of "
            f"{layer.name}{bias} are cut into {larger} of {sizes[0]} and {blocks - larger} of "
            f"{sizes[-1]}, the others alike",
            Notice,
            stacklevel=3,
        )
    return {"blocks": blocks} if blocks > 1 else {}


def diagonal_facts(layers: Sequence[Layer]) -> dict[str, list[str]]:
    """Layers of which output gradients are covaried by a diagonal alone, where there are any."""
    names = [x.name for x in layers if x.diagonal]
    return {"diagonal": names} if names else {}


def turning(Q: Tensor, blocks: int, *where: Any) -> Matrix | None:
    """Eigenvectors that were kept, as a basis has them: None of a diagonal [n], the identity's."""
    return None if Q.ndim == 1 else in_blocks(Q, blocks).to(*where)


@dataclass(frozen=True)
class LayerFactors:
    """Qa [J,J], Qg [O,O] with eigenvectors in columns, and lam [O,J], the mean over sequences.

    Qa and Qg are zero outside of so many `blocks` on their diagonal; that of a covariance that is
    diagonal is the identity's, [J] or [O]. Read from a folder they are
    the mapped files: only `lam` is memory, while it is used.

    Args:
        squares: the sum of squared gradients [O,J] over `count` sequences.

    Raises:
        StoreError: shapes disagree, or something is not zero there; names the layer.
        NotFiniteError: a value is not finite; names the layer.
    """

    name: str
    Qa: Tensor
    Qg: Tensor
    squares: Tensor
    count: int = 1
    blocks: int = 1

    @property
    def lam(self) -> Tensor:
        """The corrected eigenvalues [O,J]."""
        return self.squares if self.count == 1 else self.squares / self.count

    def __post_init__(self) -> None:
        (O, J), a, g = self.squares.shape, tuple(self.Qa.shape), tuple(self.Qg.shape)
        if a not in ((J, J), (J,)) or g not in ((O, O), (O,)):
            raise StoreError(
                f"layer {self.name}: lam is [{O},{J}] but Qa is {list(a)} and Qg is {list(g)}; "
                "expected lam [O,J], Qa [J,J], Qg [O,O]"
            )
        for name, x in (("Qa", self.Qa), ("Qg", self.Qg), ("lam", self.squares)):
            if not torch.isfinite(x).all():
                raise NotFiniteError(
                    f"layer {self.name}: {name} holds NaN or infinity; fit it again"
                )
        for name, Q in (("Qa", self.Qa), ("Qg", self.Qg)) if self.blocks > 1 else ():
            own = sum(Q[rows, rows].count_nonzero() for rows in block_rows(len(Q), self.blocks))
            if own != Q.count_nonzero():
                raise StoreError(
                    f"layer {self.name}: {name} was fitted in {self.blocks} diagonal blocks but is "
                    "not zero outside of them: its file is another fit's. Fit again"
                )

    def damping(self, damping: float | str | None = None) -> float:
        """Of this layer; see `check_damping`."""
        return layer_damping(self.lam, damping)

    def copied_bytes(self, dtype: torch.dtype) -> int:
        """What a `basis` takes beside the mapped files."""
        same = self.Qa.dtype == dtype
        vectors = 0 if same else self.Qa.numel() + self.Qg.numel()
        return vectors * dtype.itemsize + self.squares.numel() * wide(dtype).itemsize

    def basis(self, damping: float, dtype: torch.dtype) -> Basis:
        """What preconditions gradients of `dtype`."""
        Qg, Qa = (turning(x, self.blocks, dtype) for x in (self.Qg, self.Qa))
        return Basis(Qg, Qa, self.lam.to(wide(dtype)), damping)


class Factors(Mapping[str, LayerFactors]):
    """The factors of every layer, read from a folder written by `fit` (or by kronfluence)."""

    def __init__(self, folder: str | Path):
        """Open a factor folder; layers are read when first asked for.

        Raises:
            StoreError: a file is missing or damaged, or the fit is not finished; names it.
        """
        self.folder = path("folder", folder)
        # kronfluence's folders have no manifest, ours of format 1 no checksums.
        self._store = Store.load(folder, kind="factors") if self._is_ours() else None
        if self._store and not self._store.finished:
            raise StoreError(f"{folder}: the fit is not finished; run it again to continue")
        if self.facts is not None:
            check_json(
                {"blocks": 1, "eigenvectors": None, FACT: None} | self.facts,
                SCHEMA,
                self.folder / MANIFEST,
                "Fit again",
            )
        self._counts = self._load(LAMBDA_COUNT)
        if not self._counts:
            raise StoreError(f"{self.folder / LAMBDA_COUNT} holds no layer; fit again")
        corrected = max(int(x) for x in self._counts.values())
        self.sequences = self.facts["examples"] if self.sample and self.facts else corrected
        self.tokens = max(int(x) for x in self._load(TOKEN_COUNTS["activation"]).values())

    def __repr__(self) -> str:
        return f"Factors({len(self)} layers, {self.sequences} sequences, in {self.folder})"

    def _is_ours(self) -> bool:
        return os.path.exists(self.folder / MANIFEST)  # whatever the path: no error

    def _load(self, name: str) -> dict[str, Tensor]:
        # Each may have been replaced by one of kronfluence's, which has no checksum.
        found = load_tensors(self.folder / name)
        if self._store:
            check_result(self._store, name)
        if self._store and name.startswith("activation"):
            shared = self._store.state.get("shared", {})
            found |= {n: found[o] for n, o in shared.items() if n not in found and o in found}
        return found

    def stored(self, file: str) -> dict[str, Tensor]:
        """The tensors of one of the folder's files by layer, mapped; layers that read one tensor
        have one covariance of it and one eigenbasis, stored once.

        Raises:
            StoreError: the file is missing or damaged; covariances were dropped.
        """
        if file in COVARIANCES.values() and not self.has_covariances:
            raise StoreError(
                f"{self.folder / file}: the covariances of this fit were dropped once they were "
                "decomposed. Fit again in a new folder with keep_covariances (--keep-covariances)"
            )
        return self._load(file)

    @cached_property
    def _layers(self) -> dict[str, LayerFactors]:
        files = {name: self._load(name) for name in (*EIGENVECTORS.values(), LAMBDA)}
        for name, tensors in files.items():
            if missing := set(self._counts) - set(tensors):
                raise StoreError(f"{self.folder / name} has no layer {min(missing)}; fit again")
        Qa, Qg, lam = files.values()
        for name, count in self._counts.items():
            if int(count) <= 0:
                raise StoreError(f"{self.folder / LAMBDA_COUNT}: layer {name} counts {int(count)}")
        return {
            n: LayerFactors(n, Qa[n], Qg[n], lam[n], int(count), self.blocks)
            for n, count in self._counts.items()
        }

    def __getitem__(self, name: str) -> LayerFactors:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    @cached_property
    def facts(self) -> dict[str, Any] | None:
        """What the factors were fitted from; None where kronfluence or format 1 does not say."""
        return self._store.facts if self._store and self._store.checked else None

    @property
    def blocks(self) -> int:
        """Diagonal blocks of every covariance: beyond 1, an approximation of EK-FAC's own."""
        return blocks_of(self.facts)

    @property
    def diagonal(self) -> list[str]:
        """Layers of which output gradients are covaried by a diagonal alone."""
        return list((self.facts or {}).get("diagonal", []))

    @property
    def eigenvectors(self) -> str | None:
        """The dtype that eigenvectors were rounded to; None where they were not."""
        return (self.facts or {}).get("eigenvectors")

    @property
    def sample(self) -> int | None:
        """How many of the examples the eigenvalues are from; None where that is all of them."""
        return sample_of(self.facts)

    @property
    def has_covariances(self) -> bool:
        """Whether they are in the folder, and were not dropped once they were decomposed."""
        return not self._store or self._store.state.get("covariances") != DROPPED

    @property
    def seconds(self) -> dict[str, float]:
        """What every stage of the fit took; empty where that is not known."""
        return self._store.state["seconds"] if self._store and self._store.checked else {}

    @property
    def share(self) -> float | None:
        """Of the model's parameters, those of these layers; None where that is not known."""
        counts = self._store.state.get("parameters") if self._store else None
        return None if counts is None else counts[0] / counts[1]

    @cached_property
    def identity(self) -> str:
        """Names these factors: by what they were fitted from, or, of others, by their values."""
        if self.facts is not None:
            return fingerprint(self.facts)
        return fingerprint({n: (x.Qa, x.Qg, x.lam) for n, x in self._layers.items()})

    def layers(self, model: nn.Module) -> list[Layer]:
        """The model's layers that these factors belong to.

        Raises:
            ArgumentError: the model has no such layer, or one of another size; names it.
        """
        shared = bool(self.facts and self.facts["shared_parameters"])
        layers = select_layers(model, list(self._counts), shared=shared)
        layers = [replace(x, diagonal=self[x.name].Qg.ndim == 1) for x in layers]
        for layer in layers:
            sizes = self[layer.name].squares.shape
            if tuple(sizes) != (layer.O, layer.J):
                raise ArgumentError(
                    f"layer {layer.name} is [{layer.O},{layer.J}] in the model but the factors in "
                    f"{self.folder} are {list(sizes)}: they belong to another model"
                )
        return layers

    def dampings(self, layers: Sequence[Layer], damping: float | str | None) -> dict[str, float]:
        """Of every layer; see `check_damping`."""
        return layer_dampings({x.name: self[x.name].lam for x in layers}, damping)

    def check_run(self, facts: Mapping[str, Any], asked: str) -> None:
        """ArgumentError where they were fitted on another model, or with another tokenizer."""
        check_same(self.facts, facts, f"{asked}: the factors in {self.folder} were fitted", "fit")


def check_same(
    made: Mapping[str, Any] | None, facts: Mapping[str, Any], what: str, again: str
) -> None:
    """ArgumentError where the model or the tokenizer that something was made with is not a run's.

    What is not known of either (tokens without a tokenizer, factors of kronfluence) is not asked.
    """
    for name, other in (
        ("model", "other weights or another configuration"),
        ("tokenizer", "another vocabulary, or text is divided otherwise"),
    ):
        then, now = (made or {}).get(name), facts[name]
        if None not in (then, now) and then != now:
            raise ArgumentError(
                f"{what} on a {name} of fingerprint {then}, this one's is {now}: {other}. Use the "
                f"{name} that they are from, or {again} again"
            )


def check_loss(fitted: str | None, facts: Mapping[str, Any], asked: str) -> None:
    """ArgumentError where the loss of a run's training data is not that of the task `fitted`, if it
    is known.
    """
    if fitted not in (None, facts["task"]):
        raise ArgumentError(
            f"{asked}: the factors were fitted with the loss of {fitted}, and the training data's "
            f"is that of {facts['task']} here: give the task that fit was given"
        )


def bases(
    factors: Mapping[str, LayerFactors],
    layers: Sequence[Layer],
    damping: Mapping[str, float],
    dtype: torch.dtype,
    places: Mapping[str, torch.device],
) -> dict[str, Basis | Travelling[Basis] | Mapped[Basis]]:
    """What preconditions each layer's gradients of `dtype`, in its place or on its way there.

    On a CPU, those that would take more than a share of the free memory stay in their files.
    """

    def of(layer: Layer) -> Basis:
        return factors[layer.name].basis(damping[layer.name], dtype)

    here = [x for x in layers if places[x.name].type == "cpu"]
    taken = sum(factors[x.name].copied_bytes(dtype) for x in here)
    mapped = bool(here) and taken > SHARE * free_bytes(torch.device("cpu"))
    return {
        x.name: Mapped(partial(of, x))
        if mapped and places[x.name].type == "cpu"
        else placed(of(x), (x.O, x.J), places[x.name])
        for x in layers
    }


def tell_of_zeros(found: Iterable[tuple[str, Tensor]], what: str) -> None:
    """A `Notice` that names the layers of which everything found is exactly zero."""
    some = {name: x.any() for name, x in found}
    moves = torch.stack([*some.values()]).tolist() if some else []
    if dead := [name for name, moved in zip(some, moves, strict=True) if not moved]:
        warnings.warn(
            f"layers {listed(dead)}: the gradient of {what} is exactly zero throughout (a weight "
            "of zeros behind them, or numbers too small for their dtype)",
            Notice,
            stacklevel=2,
        )
