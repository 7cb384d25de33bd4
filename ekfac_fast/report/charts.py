"""Numbers -> geometry of the drawings. The templates turn geometry into SVG.

Heat maps are quantised: one path and one class for each level and sign, so that a map of 9 x 512
cells costs a few kilobytes and takes its colours, light or dark, from the style sheet.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from . import statistics
from .statistics import NoFit, PowerLaw
from .text import number, tick

WIDTH, HEIGHT = 320, 190
LEFT, RIGHT, TOP, BOTTOM = 38, 308, 10, 158


def levels(values: ArrayLike, steps: int = 8) -> np.ndarray:
    """Signed intensity in -steps ... steps, linear, the largest |value| at the end."""
    v = np.nan_to_num(np.asarray(values, dtype=np.float64), posinf=0, neginf=0)
    largest = np.abs(v).max(initial=0.0)
    return np.rint(steps * (v / largest if largest > 0 else v)).astype(int)


def tone(level: int) -> str:
    """CSS class of a level: p1 ... p8 positive, n1 ... n8 negative, nothing for 0."""
    return f"{'p' if level > 0 else 'n'}{abs(level)}" if level else ""


@dataclass(frozen=True)
class Bars:
    """Strokes from the axis, 100 = the largest; `low` and `high` bound them."""

    positive: str
    negative: str
    low: int
    high: int


def bars(values: ArrayLike, across: bool = False) -> Bars:
    """One stroke for each value: upward bars along x, or (`across`) rightward bars along y."""
    heights = levels(values, 100).tolist()
    stroke = "M0 {}.5h{}" if across else "M{}.5 0v{}"
    up = 1 if across else -1  # the y axis of SVG points down

    def drawn(sign: int) -> str:
        return "".join(stroke.format(i, up * h) for i, h in enumerate(heights) if h * sign > 0)

    return Bars(drawn(1), drawn(-1), min([0, *heights]), max([0, *heights]))


@dataclass(frozen=True)
class HeatMap:
    """`paths` are (class, path data); row 0 is drawn on top."""

    rows: int
    columns: int
    paths: tuple[tuple[str, str], ...]


def heat_map(values: ArrayLike, steps: int = 4) -> HeatMap:
    """values [rows, columns]; equal neighbours in a row become one stroke."""
    grid = levels(values, steps)
    rows, columns = grid.shape
    strokes: dict[int, list[str]] = {}
    for y, row in enumerate(grid):
        changes = np.diff(row, prepend=row[0] + 1) if columns else row
        starts = np.flatnonzero(changes)
        for x, run in zip(starts, np.diff(starts, append=columns), strict=True):
            if row[x]:
                strokes.setdefault(int(row[x]), []).append(f"M{x} {y}h{run}")
    scale = 8 // steps
    paths = tuple((tone(level * scale), "".join(strokes[level])) for level in sorted(strokes))
    return HeatMap(rows, columns, paths)


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Histogram:
    """`bars` are (x, y, width, height, negative?, what it counts); the count axis is log(1 + n)."""

    bars: tuple[tuple[float, float, float, float, bool, str], ...]
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]


def histogram(scores: ArrayLike, bins: int = 44) -> Histogram | None:
    """Scores [N] with zero on the edge of a bin; None where fewer than two differ."""
    s = statistics.scanned(scores)
    if len(s) == 0 or s[0] == s[-1]:
        return None
    width = (s[-1] - s[0]) / bins
    edges = np.arange(math.floor(s[0] / width), math.ceil(s[-1] / width) + 1) * width
    counts, _ = np.histogram(s, edges)
    x = np.interp(edges, edges[[0, -1]], [LEFT, RIGHT])
    tops = BOTTOM - (BOTTOM - TOP) * np.log1p(counts) / np.log1p(counts.max())
    drawn = tuple(
        (
            round(x[i], 1),
            round(tops[i], 1),
            round(x[i + 1] - x[i] - 0.6, 1),
            round(BOTTOM - tops[i], 1),
            edges[i + 1] < width / 2,
            f"{counts[i]:,} from {number(edges[i], 2)} to {number(edges[i + 1], 2)}",
        )
        for i in np.flatnonzero(counts)
    )
    decades = 10 ** np.arange(int(math.log10(counts.max())) + 1)
    across = [
        Tick(round(float(np.interp(v, edges[[0, -1]], [LEFT, RIGHT])), 1), tick(v))
        for v in round_numbers(edges[0], edges[-1])
    ]
    up = [
        Tick(round(BOTTOM - (BOTTOM - TOP) * math.log1p(n) / math.log1p(counts.max()), 1), f"{n:,}")
        for n in decades.tolist()
    ]
    return Histogram(drawn, tuple(across), tuple(up))


def round_numbers(low: float, high: float, wanted: int = 4) -> list[float]:
    """Multiples of 1, 2 or 5 x 10^k between low and high, zero exact."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


@dataclass(frozen=True)
class Tail:
    """Points (x, y) of the log-log CCDF, the line of the fit (or None), and the fit itself."""

    points: str
    line: tuple[float, float, float, float] | None
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    fit: PowerLaw | NoFit
    top_one_percent: float


def tail(scores: ArrayLike) -> Tail | None:
    """P(X >= x) of the positive scores on log-log axes; None where fewer than two differ."""
    x, p = statistics.ccdf_points(scores)
    if len(x) < 2 or x[-1] * 1e-4 > x[-2]:
        return None
    fit = statistics.power_law(scores)
    # The lowest scores stretch over many decades and say nothing of the tail.
    seen = x >= x[-1] * 1e-4
    x, p = x[seen], p[seen]
    bounds_x, bounds_y = np.log10(x[[0, -1]]), np.log10(p[[-1, 0]])

    def place_x(value: ArrayLike) -> np.ndarray:
        return np.round(np.interp(np.log10(value), bounds_x, [LEFT, RIGHT]), 1)

    def place_y(value: ArrayLike) -> np.ndarray:
        return np.round(np.interp(np.log10(value), bounds_y, [BOTTOM, TOP]), 1)

    # strokes of no length with round caps are dots
    dots = zip(place_x(x).tolist(), place_y(p).tolist(), strict=True)
    line = None
    if isinstance(fit, PowerLaw):
        # to the end of the tail or of the drawing, whichever comes first
        floor = 10 ** bounds_y[0]
        last = min(x[-1], fit.xmin * (fit.fraction / floor) ** (1 / fit.ccdf_exponent))
        ends = np.array([fit.xmin, last])
        (x1, x2), (y1, y2) = place_x(ends).tolist(), place_y(fit.ccdf(ends)).tolist()
        line = (x1, y1, x2, y2)
    return Tail(
        points="".join(f"M{i} {j}h0" for i, j in dots),
        line=line,
        x=tuple(Tick(float(place_x(v)), tick(v)) for v in log_ticks(*bounds_x)),
        y=tuple(Tick(float(place_y(v)), tick(v)) for v in log_ticks(*bounds_y)),
        fit=fit,
        top_one_percent=statistics.top_share(scores, 0.01),
    )


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between 10^low and 10^high; 1, 2, 5 x 10^k where there are fewer than two."""
    decades = range(math.ceil(low), math.floor(high) + 1)
    if len(decades) > 1:
        return [10.0**k for k in decades]
    fine = (m * 10.0**k for k in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5))
    return [v for v in fine if low <= math.log10(v) <= high]
