"""What scores say: spans, layer groups, tails.

Pure functions on numpy arrays. Letters: N scanned sequences, T tokens, L tracked layers in the
order of the forward pass. Scores are raw (not divided by the size of the training set); NaN marks
a sequence that was never scanned.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ArgumentError
from ..extras import optional

Array = NDArray[np.float64]

GROUPS = 9
SMALLEST_TAIL = 20


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `stop` (excluded), and their share of all the weight."""

    start: int
    stop: int
    share: float


def spans(
    weights: ArrayLike, *, width: int = 32, share: float = 0.8, limit: int = 3
) -> tuple[Span, ...]:
    """Where the weight of a sequence lies, in reading order.

    weights [T] >= 0: |influence|, or its positive part. Windows of `width` tokens are taken
    greedily, heaviest first and centred on what they hold, until they carry `share` of the weight
    or there are `limit` of them; windows that touch become one span.
    """
    w = np.asarray(weights, dtype=np.float64)
    if w.ndim != 1 or not np.all(w >= 0):
        raise ArgumentError(f"spans: weights must be [T] and >= 0, got shape {w.shape}")
    if width < 1 or limit < 1:
        raise ArgumentError(f"spans: width and limit must be at least 1, got {width} and {limit}")
    T, total = len(w), w.sum()
    if width >= T or total == 0:
        return (Span(0, min(T, width), float(width >= T)),) if T else ()
    left, inside = w.copy(), np.zeros(T, dtype=bool)
    for _ in range(limit):
        heads = np.concatenate([[0.0], np.cumsum(left)])
        start = int(np.argmax(heads[width:] - heads[:-width]))
        held = start + np.flatnonzero(left[start : start + width])
        middle = (held[0] + held[-1] + 1) // 2
        start = int(np.clip(middle - width // 2, 0, T - width))
        inside[start : start + width] = True
        left[inside] = 0
        if left.sum() <= (1 - share) * total:
            break
    edges = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]])))
    pairs = edges.reshape(-1, 2).tolist()
    return tuple(Span(i, j, float(w[i:j].sum() / total)) for i, j in pairs)


def layer_groups(per_layer: ArrayLike, groups: int = GROUPS) -> Array:
    """Scores [L, ...] -> [min(groups, L), ...]: sums over equal groups of layers, lowest first.

    A layer on the edge of two groups is divided in proportion, so that equal layers give equal
    groups for any L. The sum is kept.
    """
    s = np.asarray(per_layer, dtype=np.float64)
    L = len(s)
    if groups >= L:
        return s.copy()
    heads = np.concatenate([np.zeros_like(s[:1]), np.cumsum(s, axis=0)])
    edges = np.linspace(0, L, groups + 1)
    below = np.minimum(edges.astype(int), L - 1)
    part = (edges - below).reshape(-1, *[1] * (s.ndim - 1))
    return np.diff(heads[below] + part * s[below], axis=0)


def layer_shares(per_layer: ArrayLike, groups: int = GROUPS) -> Array:
    """Signed shares of the groups: sum of |shares| = 1, or all 0 for an all-zero score."""
    sums = layer_groups(per_layer, groups)
    total = np.abs(sums).sum()
    return sums / total if total > 0 else sums


def centre_of_mass(per_layer: ArrayLike) -> float:
    """Depth of the |influence|: 0 = the lowest layer, 1 = the highest; NaN where all are zero."""
    w = np.abs(np.asarray(per_layer, dtype=np.float64))
    if w.sum() == 0:
        return math.nan
    depth = np.linspace(0, 1, len(w)) if len(w) > 1 else np.array([0.5])
    return float(w @ depth / w.sum())


@dataclass(frozen=True)
class PowerLaw:
    """Density ~ x^-alpha above `xmin` (Clauset et al. 2009; the convention of the paper's text).

    count      scores in the tail, all above xmin
    fraction   of the scanned sequences which are in the tail
    ks         largest distance between the tail and its fit
    p_value    of `ks`, by parametric bootstrap: above 0.1 the power law is plausible
    """

    alpha: float
    xmin: float
    count: int
    fraction: float
    ks: float
    p_value: float

    @property
    def ccdf_exponent(self) -> float:
        """P(X >= x) ~ x^-(alpha - 1): the convention of the paper's Eq. 32."""
        return self.alpha - 1

    def ccdf(self, x: ArrayLike) -> Array:
        """P(X >= x) for a scanned sequence, x >= xmin."""
        return self.fraction * (np.asarray(x, dtype=np.float64) / self.xmin) ** (1 - self.alpha)

    def scan_for(self, count: int, x: float) -> float:
        """Sequences to scan until `count` of them are expected to reach `x` (paper 5.2)."""
        return count / float(self.ccdf(x))


@dataclass(frozen=True)
class NoFit:
    """Why no power law was fitted."""

    reason: str


def scanned(scores: ArrayLike) -> Array:
    """The finite scores, ascending: NaN (never scanned) is left out."""
    s = np.asarray(scores, dtype=np.float64).ravel()
    return np.sort(s[np.isfinite(s)])


def power_law(
    scores: ArrayLike, *, tail: int | None = None, draws: int = 1000, seed: int = 0
) -> PowerLaw | NoFit:
    """Maximum likelihood on the `tail` largest scores (None: the top 500, at most 10 % of x > 0).

        alpha = 1 + n / sum ln(x_i / xmin),   xmin = the largest score outside the tail

    Logarithms of a power law are exponential, so test and bootstrap happen there. Each of the
    `draws` synthetic tails is fitted again before its distance counts (Clauset et al. 2009, 4.1).
    """
    s = scanned(scores)
    positive = s[s > 0]
    n = min(500, len(positive) // 10) if tail is None else tail
    if n < SMALLEST_TAIL or len(positive) <= n:
        needed = 10 * SMALLEST_TAIL if tail is None else max(tail, SMALLEST_TAIL) + 1
        return NoFit(
            f"{len(positive)} positive scores, a tail of {n}: a fit needs at least {needed} "
            f"positive scores and {SMALLEST_TAIL} in the tail"
        )
    xmin = positive[-n - 1]
    logs = np.log(positive[-n:] / xmin)
    if logs[-1] == 0:
        return NoFit(f"the {n} largest scores are all equal")
    stats = optional("scipy.stats", "report")
    test = stats.goodness_of_fit(
        stats.expon,
        logs,
        known_params={"loc": 0},
        statistic="ks",
        n_mc_samples=draws,
        rng=np.random.default_rng(seed),
    )
    return PowerLaw(
        alpha=float(1 + n / logs.sum()),
        xmin=float(xmin),
        count=n,
        fraction=n / len(s),
        ks=float(test.statistic),
        p_value=float(test.pvalue),
    )


def ccdf_points(scores: ArrayLike, limit: int = 200) -> tuple[Array, Array]:
    """x and P(X >= x) of the positive scores, ascending, thinned evenly in log P to `limit`."""
    s = scanned(scores)
    x, first = np.unique(s, return_index=True)
    p = (len(s) - first) / max(len(s), 1)
    x, p = x[x > 0], p[x > 0]
    if len(x) > limit:
        at = np.searchsorted(-p, -np.geomspace(p[0], p[-1], limit))
        keep = np.unique(np.minimum(at, len(x) - 1))
        x, p = x[keep], p[keep]
    return x, p


def top_share(scores: ArrayLike, fraction: float = 0.01) -> float:
    """Share of the positive influence in the top `fraction` of scanned sequences (paper Fig. 9)."""
    s = np.maximum(scanned(scores), 0)
    total = s.sum()
    return float(s[len(s) - math.ceil(fraction * len(s)) :].sum() / total) if total > 0 else 0.0
