"""Removal: the model trained again without a query's top sequences. Does it forget?

rise_q = measurement_q(trained without them) - measurement_q(trained on all)

Beside the removal of as many at random, and of those that the scores put last.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import instance, is_number, path, require, sized, whole
from ..data.examples import Indexable
from .bank import RetrainingBank, check_examples, drawn, made_of, retrain
from .scores_of import AnyScores, scores_of
from .workers import Train

CONTROLS = "controls"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+=-]*")


@dataclass(frozen=True)
class Removal:
    """Rise of every query's measurement without `count` sequences: [Q] each.

    top      those that this method puts first for the query
    lowest   those that it puts last
    random   drawn, the mean of several draws
    """

    name: str
    count: int
    top: np.ndarray
    lowest: np.ndarray
    random: np.ndarray

    @property
    def line(self) -> str:
        """In words."""
        return (
            f"without the top {self.count} {self.top.mean():+.3f}, without as many at random "
            f"{self.random.mean():+.3f}, without the lowest {self.lowest.mean():+.3f}"
        )


def removals(
    folder: str | Path,
    train: Train,
    dataset: Indexable,
    queries: Indexable,
    scores: Mapping[str, AnyScores],
    *,
    shares: Sequence[float] = (0.01, 0.05),
    draws: int = 4,
    seeds: int = 1,
    seed: int = 0,
    **settings: Any,
) -> list[Removal]:
    """What becomes of every query without its top sequences, method by method, share by share.

    Each method has a bank of its own in `folder`, with a subset a query, share and end; "controls"
    has the whole data and the random draws. All are continued after a kill.

    Args:
        train, dataset, queries, settings: see `retrain`.
        scores: by name, which is that of a folder too; see `scores_of`.
        shares: of the data, that are left out.
        draws: random subsets of every share.
        seeds: trainings of every subset; outcomes are their means.
        seed: of the random draws.

    Raises:
        ArgumentError: a name is no name of a folder, or a share none of the data.
        StoreError, DataError: scores are not of these queries and data; see `retrain` too.
    """
    folder, N, Q = path("folder", folder), sized(dataset), sized(queries)
    instance("scores", scores, Mapping, "a mapping from names to scores")
    for name in scores:
        right = isinstance(name, str) and NAME.fullmatch(name) and name != CONTROLS
        require(bool(right), "the name of scores", name, f"letters, digits, not {CONTROLS!r}")
    for share in shares:
        require(is_number(share) and 0 < share < 1, "shares", share, "shares between 0 and 1")
    whole("draws", draws)
    counts = [min(max(round(share * N), 1), N - 1) for share in shares]
    check = partial(check_examples, made_of(dataset, queries), folder)
    matrices = {name: scores_of(one, (Q, N), name, check) for name, one in scores.items()}

    def bank(name: str, masks: np.ndarray) -> RetrainingBank:
        subsets = [np.flatnonzero(row).tolist() for row in masks]
        return retrain(
            folder / name, train, dataset, queries, subsets=subsets, seeds=seeds, **settings
        )

    masks = [
        drawn(N, draws, 1 - count / N, seed + number) for number, count in enumerate(counts)
    ]  # fmt: skip
    controls = _outcomes(bank(CONTROLS, np.concatenate([np.ones((1, N), dtype=bool), *masks])))
    whole_data, without = controls[0], controls[1:].reshape(len(counts), draws, Q)
    found = []
    for name, matrix in matrices.items():
        ends = _outcomes(bank(name, _without(matrix, counts))).reshape(len(counts), 2, Q, Q)
        rises = np.diagonal(ends, axis1=2, axis2=3) - whole_data
        found += [
            Removal(name, count, top, lowest, random - whole_data)
            for count, (top, lowest), random in zip(counts, rises, without.mean(1), strict=True)
        ]
    return found


def _without(matrix: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Masks [shares, ends, queries, N] in rows: everything but a query's top, or lowest."""
    (Q, N), best = matrix.shape, np.argsort(-matrix, axis=1, kind="stable")
    masks = np.ones((len(counts), 2, Q, N), dtype=bool)
    for at, count in enumerate(counts):
        np.put_along_axis(masks[at, 0], best[:, :count], False, axis=1)
        np.put_along_axis(masks[at, 1], best[:, N - count :], False, axis=1)
    return masks.reshape(-1, N)


def _outcomes(bank: RetrainingBank) -> np.ndarray:
    """[subsets,Q], means over seeds."""
    return bank.by_subset[1].mean(1)
