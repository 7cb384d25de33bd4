"""What a fit leaves on disk, and what it takes there meanwhile.

Covariances C serve nobody once they are decomposed but kronfluence, whose folder holds them. Where
they are kept, a folder is kronfluence's own, every tensor under every layer's name. Where they are
not, what is the same for several layers (all that read one tensor) is stored once, and the
manifest's `shared` says for whom.
"""

from collections.abc import Sequence

import torch

from ..checks import flag
from ..errors import ArgumentError, StoreError
from ..model.layers import Layer
from ..store.folder import Store
from ..store.results import check_results
from .export import FILES
from .factors import COVARIANCES, DROPPED

# Covariances of fewer bytes are kept.
KEPT_BELOW = 1 << 30


def matrix_bytes(layers: Sequence[Layer], itemsize: int) -> int:
    """Of a matrix [J,J] and one [O,O] for every layer: its covariances, or its eigenvectors; [J] or
    [O] of those that are a diagonal.
    """
    return itemsize * sum(sum(x.covariance_sizes) for x in layers)


def keeps_covariances(asked: bool | None, layers: Sequence[Layer], itemsize: int) -> bool:
    """Whether a fit that begins now keeps its covariances: as asked, else where they are small."""
    if asked is not None:
        flag("keep_covariances", asked)
    return matrix_bytes(layers, itemsize) < KEPT_BELOW if asked is None else asked


def settle_covariances(
    store: Store, asked: bool | None, layers: Sequence[Layer], itemsize: int
) -> None:
    """Note in a fit's folder whether its covariances are kept; one that is continued has said so.

    Raises:
        StoreError: they are to be kept, and are not.
    """
    now = keeps_covariances(asked, layers, itemsize)
    begun = store.state.get("keep_covariances", True if store.finished else None)
    if begun is None:
        store.update(keep_covariances=now)
    elif asked and (not begun or store.state.get("covariances") == DROPPED):
        raise StoreError(
            f"{store.folder}: keep_covariances, but this fit drops its covariances once they are "
            "decomposed: they are not there to be kept. Fit again in a new folder with "
            "keep_covariances (--keep-covariances)"
        )


def results_of(store: Store) -> list[str]:
    """The files that a fit is for, by name."""
    return [*(COVARIANCES.values() if store.state["keep_covariances"] else ()), *FILES]


def check_fit(store: Store) -> None:
    """StoreError where a finished fit lacks one of them, or has another's; covariances may have
    been dropped since.
    """
    dropped = store.state.get("covariances") == DROPPED
    check_results(store, but=COVARIANCES.values() if dropped else ())


def drop_covariances(store: Store) -> None:
    """Delete them, and say so in the manifest first: a killed run deletes them again."""
    if store.state.get("covariances") != DROPPED:
        store.update(covariances=DROPPED)
    for name in COVARIANCES.values():
        (store.folder / name).unlink(missing_ok=True)


def check_stored(dtype: torch.dtype | None) -> dict[str, str]:
    """The fact that eigenvectors are stored rounded; none where they are not.

    Raises:
        ArgumentError: another dtype than bf16.
    """
    if dtype is None:
        return {}
    if dtype is not torch.bfloat16:
        raise ArgumentError(
            f"eigenvectors is {dtype!r}, expected torch.bfloat16, or None for the dtype of sums"
        )
    return {"eigenvectors": "bfloat16"}


def fit_bytes(
    parts: Sequence[Sequence[Layer]],
    *,
    itemsize: int,
    blocks: int = 1,
    vectors: int | None = None,
    keep: bool = True,
    processes: int = 1,
    folds: int = 2,
) -> tuple[int, int]:
    """(bytes of the finished factors, bytes at most while they are fitted), shared inputs counted
    for every layer that reads them.

    C  covariances         V  eigenvectors, with their eigenvalues         L  corrected eigenvalues

    Args:
        parts: the layers that are fitted at once.
        vectors: bytes of a number of an eigenvector.
        keep: whether C stays.
        processes: each has sums of its own in the folder, and while they are saved the last ones.
        folds: tensors of a sum: 2 of more than 64 batches, a total and a rest.
    """

    def sizes(layers: Sequence[Layer]) -> tuple[int, int, int]:
        V = matrix_bytes(layers, vectors or itemsize) + itemsize * sum(x.J + x.O for x in layers)
        return matrix_bytes(layers, itemsize), V, itemsize * sum(x.O * x.J for x in layers)

    ended = most = 0
    for some in parts:
        C, V, L = sizes(some)
        kept, sums = C if keep else 0, processes * folds
        most = max(
            most,
            ended + 2 * sums * C // blocks,  # a state, and the one before it
            ended + sums * C // blocks + C,  # its file
            ended + C + V // blocks,  # eigenvectors, matrix by matrix
            ended + kept + V // blocks + V,  # and in one file
            ended + kept + V + 2 * sums * L,
        )
        ended += kept + V + L
    if len(parts) > 1:  # files of all parts are put together one by one
        layers = [x for some in parts for x in some]
        C, V, L = sizes(layers)
        side = max(map(sum, zip(*(x.covariance_sizes for x in layers), strict=True)))
        file = max(side * (itemsize if keep else vectors or itemsize), L)
        most = max(most, ended + file)
    return ended, most
