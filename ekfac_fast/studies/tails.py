"""Sparsity: how heavy the tail of influence is, and what a filter by words misses (paper 5.2)."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import listed, path, whole
from ..data.examples import Indexable
from ..errors import DataError
from ..extras import optional
from ..report.statistics import NoFit, PowerLaw, ccdf_points, power_law, scanned, top_share
from ..validation.baselines import tfidf
from .lines import COLOURS, drawing, write_result

Density = Callable[[np.ndarray], np.ndarray]
Starts = tuple[tuple[float, ...], ...]
# As in the paper: the tenth best of a tenth of the sequences, chosen by TF-IDF.
PLACE, SHARE = 10, 0.1


@dataclass(frozen=True)
class Against:
    """Likelihood ratio of the power law over another law of the same tail (Vuong's test).

    ratio    sum of log-likelihoods' differences: above 0 the power law is the likelier
    p_value  of a ratio at least so far from 0 where both laws are equally good
    """

    ratio: float
    p_value: float


@dataclass(frozen=True)
class Tail:
    """One question's scores.

    law            the power law of the largest scores, or why there is none
    against        what it was compared with; empty without a law
    top_percent    share of the positive influence in the top 1 % of the sequences
    filtered       recall of the best PLACE by the sequences that TF-IDF would have kept
    tenth          the PLACE-th best score among those
    needed         sequences to draw at random until PLACE of them are expected to reach `tenth`:
                   by the law where it is in the tail, else by the share of all that reach it
    """

    question: str
    law: PowerLaw | NoFit
    against: dict[str, Against]
    top_percent: float
    filtered: float
    tenth: float
    needed: float


@dataclass(frozen=True)
class Tails:
    """Of every question; of N sequences TF-IDF keeps `candidates`."""

    questions: tuple[Tail, ...]
    sequences: int
    candidates: int
    points: tuple[tuple[np.ndarray, np.ndarray], ...]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """For JSON lines, one a question."""
        about = {"sequences": self.sequences, "candidates": self.candidates}
        return [asdict(x) | about for x in self.questions]

    def draw(self, file: Path) -> None:
        """P(X >= x) of every question's positive scores, over its law's least; dashed the laws."""
        with drawing(file, 6.0, 4.0) as figure:
            panel = figure.subplots()
            for n, (one, (x, p)) in enumerate(zip(self.questions, self.points, strict=True)):
                if not len(x):
                    continue
                fitted = isinstance(one.law, PowerLaw)
                unit = one.law.xmin if isinstance(one.law, PowerLaw) else x[-1]
                style = {"color": COLOURS[n % len(COLOURS)], "linewidth": 0.9}
                panel.loglog(x / unit, p, "-" if fitted else ":", label=one.question, **style)
                if isinstance(one.law, PowerLaw):
                    ends = np.array([unit, x[-1]])
                    panel.loglog(ends / unit, one.law.ccdf(ends), "--", **style)
            panel.set_xlim(left=0.1)
            panel.set_xlabel("influence, the least of the tail = 1")
            panel.set_ylabel("share of sequences with at least so much")
            panel.legend(ncols=2, fontsize=6)


def tail(
    matrix: np.ndarray,
    questions: Indexable,
    data: Indexable,
    names: Sequence[str],
    *,
    out: str | Path,
    candidates: int | None = None,
    largest: int | None = None,
    draws: int = 1000,
) -> Tails:
    """`tails`, kept: `out` gets `tail.jsonl` and `tail.svg`."""
    out = path("out", out)
    found = tails(matrix, questions, data, names, candidates=candidates, largest=largest,
                  draws=draws)  # fmt: skip
    write_result(out, "tail", found)
    return found


def tails(
    matrix: np.ndarray,
    questions: Indexable,
    data: Indexable,
    names: Sequence[str],
    *,
    candidates: int | None = None,
    largest: int | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Tails:
    """Laws of the tail of each row of scores [Q,N], and what TF-IDF would have kept of it.

    Args:
        matrix: raw scores; NaN marks a sequence that was never scanned.
        questions, data: tokens of both, for TF-IDF.
        names: of the questions.
        candidates: that TF-IDF keeps of a question; None: a tenth of the sequences.
        largest: scores in the tail; None: the top 500, at most a tenth of the positive ones.
        draws: of the Monte-Carlo p-value.

    Raises:
        DataError: questions, names or data are not as many as were scored.
    """
    Q, N = np.shape(matrix)
    if (len(questions), len(data), len(names)) != (Q, N, Q):
        raise DataError(
            f"scores are {[Q, N]}, but there are {len(questions)} questions ({listed(names)}) and "
            f"{len(data)} sequences"
        )
    count = max(PLACE, round(SHARE * N)) if candidates is None else whole("candidates", candidates)
    if not PLACE <= count <= N:
        raise DataError(
            f"{count} candidates of {N} sequences: at least {PLACE} are compared, at most all"
        )
    kept = np.argsort(-tfidf(questions, data), axis=1, kind="stable")[:, :count]
    rows = np.where(np.isnan(matrix), -np.inf, np.asarray(matrix, dtype=np.float64))
    found = [
        _tail(name, row, own, power_law(row, tail=largest, draws=draws, seed=seed))
        for name, row, own in zip(names, rows, kept, strict=True)
    ]
    return Tails(tuple(found), N, count, tuple(ccdf_points(row) for row in rows))


def _tail(name: str, row: np.ndarray, kept: np.ndarray, law: PowerLaw | NoFit) -> Tail:
    """One question's."""
    best = np.argsort(-row, kind="stable")[:PLACE]
    tenth = float(np.sort(row[kept])[-PLACE])
    seen = scanned(row)
    needed = PLACE / float((seen >= tenth).mean())
    against: dict[str, Against] = {}
    if isinstance(law, PowerLaw):
        against = compared(seen[-law.count :], law)
        if tenth >= law.xmin:
            needed = law.scan_for(PLACE, tenth)
    return Tail(
        question=name,
        law=law,
        against=against,
        top_percent=top_share(row),
        filtered=float(np.isin(best, kept).mean()),
        tenth=tenth,
        needed=needed,
    )


def compared(x: np.ndarray, law: PowerLaw) -> dict[str, Against]:
    """A power law against others, each fitted to the same tail x > xmin by maximum likelihood."""
    special, found = optional("scipy.special", "studies"), {}
    logs = np.log(x / law.xmin)
    own = np.log(law.alpha - 1) - law.alpha * logs  # densities of x / xmin
    for name, (density, starts) in _alternatives(logs).items():
        difference = own - _likeliest(density, starts)
        ratio, spread = float(difference.sum()), float(difference.std() * np.sqrt(len(x)))
        p = special.erfc(abs(ratio) / (np.sqrt(2) * spread)) if spread > 0 else 1.0
        found[name] = Against(ratio, float(p))
    return found


def _alternatives(logs: np.ndarray) -> dict[str, tuple[Density, Starts]]:
    """Log densities of x = exp(logs), given x > 1, by parameters; and where to begin.

    exponential  P(X > x) = exp(-r (x - 1))                  r
    Weibull      P(X > x) = exp(-r (x^c - 1))                c, r
    log-normal   ln X normal, of mean m and deviation s      m, s
    """
    norm, x = optional("scipy.stats", "studies").norm, np.exp(logs)

    def exponential(theta: np.ndarray) -> np.ndarray:
        return theta[0] - np.exp(theta[0]) * (x - 1)

    def weibull(theta: np.ndarray) -> np.ndarray:
        c, r = np.exp(theta)
        return theta.sum() + (c - 1) * logs - r * np.expm1(c * logs)

    def lognormal(theta: np.ndarray) -> np.ndarray:
        m, s = theta[0], np.exp(theta[1])
        return norm.logpdf(logs, m, s) - logs - norm.logsf(0, m, s)

    rate = -float(np.log((x - 1).mean()))
    spread = float(np.log(logs.std() + 1e-9))
    return {
        "exponential": (exponential, ((rate,),)),
        "Weibull": (weibull, ((0.0, rate), (-1.0, rate))),
        "log-normal": (lognormal, ((0.0, spread), (float(logs.mean()), spread))),
    }


def _likeliest(density: Density, starts: Starts) -> np.ndarray:
    """Log densities where their sum is largest."""
    minimise = optional("scipy.optimize", "studies").minimize

    def loss(theta: np.ndarray) -> float:
        # Far from the data a density overflows: nothing to go to.
        with np.errstate(all="ignore"):
            value = -density(theta).sum()
        return float(value) if np.isfinite(value) else 1e300

    options = {"maxiter": 4000, "xatol": 1e-7, "fatol": 1e-9}
    found = [minimise(loss, start, method="Nelder-Mead", options=options) for start in starts]
    return density(min(found, key=lambda one: one.fun).x)
