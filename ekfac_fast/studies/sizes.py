"""Scale: do larger models share fewer words with what influences them (paper 5.3.1)?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import path, whole
from ..data.examples import Indexable
from ..errors import DataError
from .lines import COLOURS, drawing, write_result
from .overlap import overlaps

TOP = 10


@dataclass(frozen=True)
class Scan:
    """One model's scores [Q,N] of questions and data, in its own tokens."""

    model: str
    parameters: int
    matrix: np.ndarray
    questions: Indexable
    data: Indexable


@dataclass(frozen=True)
class Size:
    """Token overlap of questions with their top sequences, and with an average sequence.

    `top` and `corpus` are means over the questions, `each` the questions' own of the top; see
    `overlaps`.
    """

    model: str
    parameters: int
    top: float
    corpus: float
    each: dict[str, float]


@dataclass(frozen=True)
class Sizes:
    """Models, smallest first."""

    models: tuple[Size, ...]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """For JSON lines."""
        return [*map(asdict, self.models)]

    def draw(self, file: Path) -> None:
        """Overlap against the number of parameters."""
        with drawing(file, 5.0, 3.2) as figure:
            panel = figure.subplots()
            x = [one.parameters for one in self.models]
            for name in self.models[0].each:
                panel.plot(x, [one.each[name] for one in self.models], color=COLOURS[3], lw=0.6)
            panel.plot(x, [one.top for one in self.models], "o-", color=COLOURS[0],
                       label=f"top {TOP}")  # fmt: skip
            panel.plot(x, [one.corpus for one in self.models], "o--", color=COLOURS[4],
                       label="corpus")  # fmt: skip
            panel.set_xscale("log")
            panel.set_ylim(bottom=0)
            panel.set_xlabel("parameters")
            panel.set_ylabel("share of the question's tokens")
            panel.legend()


def scale(scans: Sequence[Scan], names: Sequence[str], *, out: str | Path, top: int = TOP) -> Sizes:
    """Token overlap of every model's questions with its `top` sequences.

    `out` gets `scale.jsonl` and `scale.svg`.

    Args:
        scans: the same questions to every model, of the same text.
        names: of the questions.

    Raises:
        DataError: scores are of other questions or sequences than those given.
    """
    out = path("out", out)
    whole("top", top)
    if not scans:
        raise DataError("no model to compare")
    found = []
    for one in sorted(scans, key=lambda scan: scan.parameters):
        Q, N = one.matrix.shape
        if (len(one.questions), len(one.data), len(names)) != (Q, N, Q):
            raise DataError(
                f"{one.model}: scores are {[Q, N]}, but there are {len(names)} names, "
                f"{len(one.questions)} questions and {len(one.data)} sequences: ask every model "
                "the same"
            )
        shared = overlaps(one.questions, one.data)
        best = np.argsort(-np.nan_to_num(one.matrix, nan=-np.inf), axis=1, kind="stable")[:, :top]
        own = np.take_along_axis(shared, best, axis=1).mean(1)
        each = dict(zip(names, own.tolist(), strict=True))
        found.append(Size(one.model, one.parameters, float(own.mean()), float(shared.mean()), each))
    result = Sizes(tuple(found))
    write_result(out, "scale", result)
    return result
