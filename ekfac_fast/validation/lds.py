"""LDS: do scores, summed over a subset, say how a model trained on it measures?

    predicted_qS = sum over i in S of score_qi
    LDS_q        = Spearman over subsets S of (predicted_qS, -measurement_q(model trained on S))

Minus, because a positive score says that a sequence lowers the measurement (of a language model the
loss of the completion). Linear datamodeling score: Ilyas et al. 2022, Park et al. 2023.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..checks import instance, whole
from ..errors import ArgumentError, DataError, StoreError
from .bank import RetrainingBank
from .scores_of import AnyScores, scores_of

# Fewer subsets make no rank correlation: of 7 numbers one in 20 pairs has |rho| > .78 by chance.
FEWEST, MOST_DRAWS = 8, 100_000


class Interval(NamedTuple):
    """A mean, and from `low` to `high` its 95 % interval.

    It covers the choice of queries and that of subsets (the latter by bootstrap).
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class LDS:
    """How well scores predict the outcomes of `retrainings` subsets.

    per_query [Q], and under every draw of the bootstrap, redrawn [D,Q].
    """

    name: str
    per_query: np.ndarray
    redrawn: np.ndarray = field(repr=False)
    retrainings: int

    @property
    def mean(self) -> float:
        """Over queries."""
        return self.interval[0]

    @cached_property
    def interval(self) -> Interval:
        """Of the mean over queries."""
        return _interval(self.per_query, self.redrawn)

    @property
    def line(self) -> str:
        """In words."""
        return f"LDS {self.interval}, {len(self.per_query)} queries, {self.retrainings} retrainings"

    def over(self, other: "LDS") -> Interval:
        """How much better than another method on the same bank, under the same draws.

        Narrower than the two intervals would have it: what is hard to predict is hard for both.

        Raises:
            ArgumentError: the two are of other queries, subsets or draws.
        """
        if self.redrawn.shape != other.redrawn.shape or self.retrainings != other.retrainings:
            raise ArgumentError(
                f"{self.name!r} and {other.name!r} are of other banks or draws: compare what one "
                "call of validate returned"
            )
        return _interval(self.per_query - other.per_query, self.redrawn - other.redrawn)


def validate(
    bank: RetrainingBank | str | Path,
    scores: Mapping[str, AnyScores],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> list[LDS]:
    """The LDS of several methods on one bank, under the same draws of the bootstrap.

    Args:
        bank: from `retrain`, or its folder.
        scores: by name; see `scores_of` for what they can be.
        draws: of the bootstrap.
        seed: of its choices.

    Raises:
        StoreError: scores are of other data or queries than the bank; it has too few retrainings.
        DataError: a matrix has another shape, or is not finite.
    """
    bank = bank if isinstance(bank, RetrainingBank) else RetrainingBank(bank)
    instance("scores", scores, Mapping, "a mapping from names to scores")
    return [lds(bank, one, name=name, draws=draws, seed=seed) for name, one in scores.items()]


def lds(
    bank: RetrainingBank,
    scores: AnyScores,
    *,
    name: str = "scores",
    draws: int = 1000,
    seed: int = 0,
) -> LDS:
    """The LDS of one method; see `validate`."""
    whole("draws", draws, 1, MOST_DRAWS)
    whole("seed", seed, 0)
    kept, measured = bank.by_subset
    S = len(kept)
    if S < FEWEST:
        raise StoreError(
            f"{bank.folder} has {S} retrainings, LDS needs at least {FEWEST}: a rank correlation "
            "of fewer is chance. Retrain more subsets"
        )
    outcome = -measured.mean(1).T
    _check_varies(bank, outcome.T)
    matrix = scores_of(scores, (bank.queries, bank.examples), name, bank.check)
    predicted = matrix @ kept.T.astype(np.float64)
    found = spearman(predicted, outcome)
    counts = np.random.default_rng(seed).multinomial(S, np.full(S, 1 / S), draws)
    again = np.stack(
        [correlations(x, y, counts) for x, y in zip(predicted, outcome, strict=True)], axis=1
    )
    return LDS(name, found, again, S)


def _check_varies(bank: RetrainingBank, measured: np.ndarray) -> None:
    """DataError where a query's measurement in retrainings, measured [S,Q], is always the same."""
    flat = np.flatnonzero(np.ptp(measured, axis=0) == 0)
    if len(flat):
        raise DataError(
            f"{bank.folder}: the measurement of query {flat[0]} is the same in every retraining: "
            "nothing can predict it. Leave the query out"
        )


def _interval(found: np.ndarray, again: np.ndarray) -> Interval:
    """Of the mean of found [Q], over queries and subsets; again [D,Q] are redraws of subsets.

        V = V_queries + V_subsets - V_both        what both hold is counted once
        mean +- 1.96 sqrt(V)

    (Cameron, Gelbach & Miller 2011.)
    """
    Q = len(found)
    of_queries = found.var(ddof=1) / Q if Q > 1 else 0.0
    of_subsets = again.mean(1).var()
    both = again.var(0).sum() / Q**2
    reach = 1.96 * np.sqrt(max(of_queries + of_subsets - both, of_queries, of_subsets))
    mean = float(found.mean())
    return Interval(mean, float(mean - reach), float(mean + reach))


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rank correlation of every row of x [Q,S] with that of y [Q,S]: [Q]."""
    once = np.ones((1, x.shape[1]))
    return np.array([correlations(a, b, once)[0] for a, b in zip(x, y, strict=True)])


def correlations(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Spearman of x [S] and y [S] in samples that hold pair s counts[d,s] times: [D].

    0 where one of them is flat.
    """
    a, b = (_midranks(z, counts) - (counts.sum(1, keepdims=True) + 1) / 2 for z in (x, y))
    size = np.sqrt((counts * a * a).sum(1) * (counts * b * b).sum(1))
    return np.divide((counts * a * b).sum(1), size, out=np.zeros(len(a)), where=size > 0)


def _midranks(x: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Ranks from 1 of x [S] in every sample, equal values at the middle of theirs: [D,S]."""
    _, group = np.unique(x, return_inverse=True)
    sizes = counts @ np.eye(group.max() + 1)[group]
    return (sizes.cumsum(1) - (sizes - 1) / 2)[:, group]


def reliability(bank: RetrainingBank) -> float | None:
    """How well outcomes would be predicted by other trainings of the same subsets: LDS's ceiling.

        r    = mean over queries and pairs of seeds of Spearman(outcomes, outcomes)
        r_K  = K r / (1 + (K - 1) r)         of the mean of K seeds (Spearman-Brown)
        ceiling = sqrt(r_K)

    What a method that knew the expected outcome of every subset would reach against this bank's
    own. None with one seed a subset: nothing tells the data's part from the seed's.

    Raises:
        DataError: a query's measurement is the same in every retraining of a seed.
    """
    _, measured = bank.by_subset
    S, K, _ = measured.shape
    if K < 2 or S < FEWEST:
        return None
    for k in range(K):
        _check_varies(bank, measured[:, k])
    pairs = [
        spearman(measured[:, i].T, measured[:, j].T).mean() for i in range(K) for j in range(i)
    ]
    r = max(0.0, float(np.mean(pairs)))
    return float(np.sqrt(K * r / (1 + (K - 1) * r)))
