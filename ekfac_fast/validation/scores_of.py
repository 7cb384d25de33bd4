"""Scores from anywhere, as one matrix [Q,N] in fp64."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checks import path, shown
from ..errors import DataError, StoreError
from ..stages.scores import Scores
from ..store.files import load_tensors
from ..store.manifest import MANIFEST

# Kronfluence's name of the sum over its modules.
ALL_MODULES = "all_modules"
AnyScores = Scores | np.ndarray | Tensor | Mapping[str, Tensor] | str | Path


def scores_of(
    scores: AnyScores,
    shape: tuple[int, int],
    name: str = "scores",
    check: Callable[[str | None, str | None, str], None] | None = None,
) -> np.ndarray:
    """Scores of Q queries and N sequences: [Q,N], positive = lowers the measurement.

    Args:
        scores: `Scores` or their folder; a matrix [Q,N], a tensor or the .npy file of one; a
            safetensors file of kronfluence's pairwise scores, or what it loads from it: one matrix
            a module, or a token's each [Q,N,T], which are summed. A sequence that was never
            scanned (of `Scores` with candidates) counts as 0.
        shape: (Q, N).
        name: for messages.
        check: refuses fingerprints of data and queries that are not the right ones.

    Raises:
        StoreError: `Scores` of other data or queries, or a damaged file.
        DataError: another shape, or NaN; names query and sequence.
    """
    if isinstance(scores, str | os.PathLike):
        scores = _read(path(name, scores))
    if isinstance(scores, Scores):
        if check:
            facts, state = scores.store.facts, scores.store.state
            check(facts.get("data"), state.get("asked"), f"{name} ({scores.folder})")
        matrix = np.asarray(scores.matrix, dtype=np.float64)
        matrix = np.where(np.isnan(matrix), 0.0, matrix)
    elif isinstance(scores, Mapping):
        parts = [scores[ALL_MODULES]] if ALL_MODULES in scores else list(scores.values())
        matrices = [_matrix(part, name) for part in parts]
        if len({x.shape for x in matrices}) != 1:
            raise DataError(f"{name}: matrices of {sorted({x.shape for x in matrices})}, not one")
        matrix = np.sum(matrices, axis=0)
    else:
        matrix = _matrix(scores, name)
    if matrix.shape != shape:
        raise DataError(
            f"{name}: scores are {list(matrix.shape)}, expected {list(shape)}: {shape[0]} queries "
            f"and {shape[1]} training examples"
        )
    wrong = np.argwhere(~np.isfinite(matrix))
    if len(wrong):
        q, i = wrong[0]
        raise DataError(f"{name}: the score of query {q} and example {i} is {matrix[q, i]}")
    return matrix


def _read(file: Path) -> AnyScores:
    if os.path.exists(file / MANIFEST):
        return Scores(file)
    if file.suffix == ".safetensors":
        return load_tensors(file)
    if file.suffix == ".npy":
        try:
            return np.load(file)
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(f"{file}: not a complete .npy file ({error})") from error
    raise StoreError(
        f"{file}: no scores: give a folder that score has written, a .npy matrix [Q,N], or "
        "kronfluence's .safetensors"
    )


def _matrix(values: object, name: str) -> np.ndarray:
    """[Q,N] of a tensor or an array, tokens summed."""
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} is {shown(values)}, expected scores [Q,N]") from error
    return found.sum(2) if found.ndim == 3 else found
