"""EK-FAC with less, or in another basis: folders of factors that every stage takes as `fit`'s.

K-FAC       the same eigenvectors; lam = T lam_g lam_a^T, products of covariances' eigenvalues
diagonal    no eigenvectors; lam = mean over sequences of G^2, the Fisher's diagonal in parameters
Shampoo     eigenvectors of sum_b G_b G_b^T and sum_b G_b^T G_b of sequences' gradients

All but K-FAC have eigenvalues corrected in their basis, lam = mean over sequences of (Qg^T G Qa)^2,
summed with the labels that `fit` sums its own with. T is the mean number of tokens of a sequence:
covariances are means over tokens, eigenvalues over sequences, so that a damping means the same to
all of them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..checks import path
from ..curvature.basis import Eigenvectors
from ..curvature.eigen import eigendecomposition
from ..curvature.sums import Sum
from ..data.examples import Indexable
from ..errors import ArgumentError, StoreError
from ..model.layer_batch import LayerBatch
from ..model.layers import Layer, select_layers
from ..ops.gradients import gradients
from ..stages.consumer import Batch
from ..stages.factors import (
    EIGENVALUES,
    EIGENVECTORS,
    LAMBDA,
    LAMBDA_COUNT,
    TOKEN_COUNTS,
    Factors,
)
from ..stages.fit import COVARIANCE_DRAW, EIGENVALUE_DRAW
from ..stages.moments import Eigenvalues
from ..stages.run import Run, RunArguments, Stage, accumulator
from ..stages.sums import Sums
from ..store.files import load_tensors, save_tensors
from ..store.folder import Store

# By side ("activation", "gradient") and layer.
Vectors = Mapping[str, Mapping[str, Tensor]]


def kfac_factors(factors: Factors, out: str | Path) -> Factors:
    """K-FAC's factors, made of EK-FAC's: no further pass.

    Raises:
        StoreError: `factors` were not fitted by this version of ekfac_fast.
    """
    out, source = path("out", out), factors.folder
    if factors.facts is None:
        raise StoreError(f"{source}: not by this version of fit, so of a model unknown: fit again")
    vectors = {name: factors.stored(name) for name in EIGENVECTORS.values()}
    lam_a, lam_g = (factors.stored(EIGENVALUES[side]) for side in EIGENVECTORS)
    # Of an expert, those that were routed to it.
    tokens = {
        n: int(x) / factors.sequences
        for n, x in load_tensors(source / TOKEN_COUNTS["activation"]).items()
    }
    lam = {
        n: tokens[n] * torch.outer(lam_g[n].clamp(min=0), lam_a[n].clamp(min=0)) for n in factors
    }  # fmt: skip
    facts = factors.facts | {"strategy": "kfac"}
    with Store.open(out, kind="factors", facts=facts) as store:
        if not store.finished:
            for name, tensors in vectors.items():
                save_tensors(out / name, tensors)
            _save_eigenvalues(out, lam, factors.sequences, factors.tokens, factors.sequences)
            store.finish(seconds=factors.seconds)
    return Factors(out)


@torch.inference_mode(False)
def diagonal_factors(
    model: nn.Module,
    dataset: Indexable,
    *,
    out: str | Path,
    layers: str | list[str] | None = None,
    **arguments: Unpack[RunArguments],
) -> Factors:
    """The Fisher's diagonal: identities are the eigenvectors.

    They are on disk as whole matrices: for models of a size to compare methods on.
    """
    tracked, run = select_layers(model, layers), Run(model, dataset, arguments)

    def identities(store: Store) -> Vectors:
        return {side: {x.name: torch.eye(_size(side, x)) for x in tracked} for side in EIGENVECTORS}

    return _corrected(run, tracked, path("out", out), {"strategy": "diagonal"}, identities)


@torch.inference_mode(False)
def shampoo_factors(
    model: nn.Module,
    dataset: Indexable,
    *,
    out: str | Path,
    layers: str | list[str] | None = None,
    **arguments: Unpack[RunArguments],
) -> Factors:
    """Shampoo's eigenvectors (Gupta et al. 2018) of every sequence's gradient, corrected.

    A sequence's own, not a batch's: the result does not depend on the batch size.

    Raises:
        ArgumentError: a layer is an embedding.
    """
    tracked, run = select_layers(model, layers), Run(model, dataset, arguments)
    if tables := [x.name for x in tracked if x.kind == "embedding"]:
        raise ArgumentError(
            f"layer {tables[0]} is an embedding: G^T G would be one number for every two words of "
            "its vocabulary; leave it out of `layers`"
        )

    def of_products(store: Store) -> Vectors:
        consumer = GradientProducts(run, store, tracked)
        _pass(run, store, tracked, consumer, Stage.COVARIANCE, COVARIANCE_DRAW)
        return {
            side: {name: _eigenvectors(x.value().cpu()) for name, x in sums.items()}
            for side, sums in consumer.products.items()
        }

    return _corrected(run, tracked, path("out", out), {"strategy": "shampoo"}, of_products)


class GradientProducts(Sums):
    """Sums over sequences of G^T G [J,J] and G G^T [O,O]."""

    def __init__(self, run: Run, store: Store, layers: list[Layer]) -> None:
        super().__init__(run, store, Stage.COVARIANCE)
        places = run.places(layers)
        self.products = {
            side: {
                x.name: self.found(f"{side} {x.name}", *[_size(side, x)] * 2, at=places[x.name])
                for x in layers
            }
            for side in EIGENVECTORS
        }

    def add(self, seen: LayerBatch, batch: Batch) -> None:
        """Of a batch: rows of G, and its columns, as a covariance's."""
        G = gradients(seen.g, seen.a, seen.layer.bias)
        for side, rows in (("activation", G), ("gradient", G.mT)):
            total = self.products[side][seen.layer.name].rest
            torch.ops.ekfac_fast.covariance(total, rows.reshape(-1, rows.shape[-1]), None, False)

    def sums(self) -> Mapping[str, Sum]:
        """Of both sides."""
        return {f"{s} {n}": x for s, part in self.products.items() for n, x in part.items()}


def _size(side: str, layer: Layer) -> int:
    return layer.J if side == "activation" else layer.O


def _eigenvectors(cov: Tensor) -> Tensor:
    """In columns, in its dtype."""
    return eigendecomposition(cov.double())[1].to(cov.dtype)


def _corrected(
    run: Run,
    layers: list[Layer],
    out: Path,
    facts: Mapping[str, Any],
    vectors: Callable[[Store], Vectors],
) -> Factors:
    """Factors with these eigenvectors, and eigenvalues summed in their basis."""
    names = [x.name for x in layers]
    known = run.facts() | {"layers": names, "shared_parameters": False, **facts}
    with Store.open(out, kind="factors", facts=known) as store:
        if not store.finished:
            dtype = accumulator(run.model)
            found = vectors(store)
            Qa, Qg = ({n: found[s][n].to(dtype).contiguous() for n in names} for s in EIGENVECTORS)
            for file, tensors in zip(EIGENVECTORS.values(), (Qa, Qg), strict=True):
                save_tensors(out / file, tensors)
            bases = {n: Eigenvectors(Qg[n].to(run.dtype), Qa[n].to(run.dtype)) for n in names}
            consumer = Eigenvalues(run, store, layers, bases)
            _pass(run, store, layers, consumer, Stage.EIGENVALUE, EIGENVALUE_DRAW)
            lam = {name: x.value().cpu() for name, x in consumer.lam.items()}
            size, tokens = run.batches.size, run.batches.tokens(range(run.batches.size))
            _save_eigenvalues(out, lam, size, tokens)
            store.finish(seconds=run.seconds)
        for stage in (Stage.COVARIANCE, Stage.EIGENVALUE):
            store.remove_state(f"{stage}_state")
    return Factors(out)


def _pass(
    run: Run, store: Store, layers: list[Layer], consumer: Sums, stage: Stage, draw: int
) -> None:
    run.each(
        stage,
        layers,
        store.batches(run.batches.divided),
        consumer,
        done=consumer.state.done,
        loss=lambda batch: run.train_loss(batch, draw),
    )


def _save_eigenvalues(
    out: Path, lam: dict[str, torch.Tensor], sequences: int, tokens: int, times: int = 1
) -> None:
    """Sums over sequences, and what they hold; `lam` times so many is the sum."""
    save_tensors(out / LAMBDA, {name: x * times for name, x in lam.items()})
    for file, count in ((LAMBDA_COUNT, sequences), (TOKEN_COUNTS["activation"], tokens)):
        save_tensors(out / file, {name: torch.tensor([count]) for name in lam})
