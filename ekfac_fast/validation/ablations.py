"""EK-FAC with less: folders of factors that every stage takes as it takes `fit`'s.

K-FAC       the same eigenvectors; lam = T lam_g lam_a^T, products of covariances' eigenvalues
diagonal    no eigenvectors; lam = mean over sequences of G^2, the Fisher's diagonal in parameters

T is the mean number of tokens of a sequence: covariances are means over tokens, eigenvalues over
sequences, so that a damping means the same to all three.
"""

from pathlib import Path
from typing import Unpack

import torch
from torch import nn

from ..checks import path
from ..curvature.basis import Eigenvectors
from ..data.examples import Indexable
from ..errors import StoreError
from ..model.layers import select_layers
from ..stages.factors import (
    EIGENVALUES,
    EIGENVECTORS,
    LAMBDA,
    LAMBDA_COUNT,
    TOKEN_COUNT,
    Factors,
)
from ..stages.fit import EIGENVALUE_DRAW, Eigenvalues
from ..stages.run import Run, RunArguments, Stage
from ..store.files import load_tensors, save_tensors
from ..store.folder import Store


def kfac_factors(factors: Factors, out: str | Path) -> Factors:
    """K-FAC's factors, made of EK-FAC's: no further pass.

    Raises:
        StoreError: `factors` were not fitted by this version of ekfac_fast.
    """
    out, source = path("out", out), factors.folder
    if factors.facts is None:
        raise StoreError(f"{source}: not by this version of fit, so of a model unknown: fit again")
    vectors = {name: load_tensors(source / name) for name in EIGENVECTORS.values()}
    lam_a, lam_g = (load_tensors(source / EIGENVALUES[side]) for side in EIGENVECTORS)
    tokens = factors.tokens / factors.sequences
    lam = {
        n: tokens * torch.outer(lam_g[n].clamp(min=0), lam_a[n].clamp(min=0)) for n in factors
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
    """The Fisher's diagonal, from the pass of `fit` that sums eigenvalues, with its labels.

    The eigenvectors on disk are whole identities: for models of a size to compare methods on.
    """
    out = path("out", out)
    tracked = select_layers(model, layers)
    run = Run(model, dataset, arguments)
    names = [x.name for x in tracked]
    facts = run.facts() | {"layers": names, "shared_parameters": False, "strategy": "diagonal"}
    with Store.open(out, kind="factors", facts=facts) as store:
        if not store.finished:
            batches = store.batches(run.batches.divided)
            own = {x.name: Eigenvectors(None, None) for x in tracked}
            consumer = Eigenvalues(run, store, tracked, own)
            run.each(
                Stage.EIGENVALUE,
                tracked,
                batches,
                consumer,
                done=consumer.state.done,
                loss=lambda batch: run.train_loss(batch, EIGENVALUE_DRAW),
            )
            for side, file in EIGENVECTORS.items():
                sizes = {x.name: x.J if side == "activation" else x.O for x in tracked}
                save_tensors(out / file, {name: torch.eye(n) for name, n in sizes.items()})
            lam = {name: x.value().cpu() for name, x in consumer.lam.items()}
            size, tokens = run.batches.size, run.batches.tokens(range(run.batches.size))
            _save_eigenvalues(out, lam, size, tokens)
            store.finish(seconds=run.seconds)
        store.remove_state(f"{Stage.EIGENVALUE}_state")
    return Factors(out)


def _save_eigenvalues(
    out: Path, lam: dict[str, torch.Tensor], sequences: int, tokens: int, times: int = 1
) -> None:
    """Sums over sequences, and what they hold; `lam` times so many is the sum."""
    save_tensors(out / LAMBDA, {name: x * times for name, x in lam.items()})
    for file, count in ((LAMBDA_COUNT, sequences), (TOKEN_COUNT, tokens)):
        save_tensors(out / file, {name: torch.tensor([count]) for name in lam})
