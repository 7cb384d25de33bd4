"""Layers: how deep in the model influence lies, by kinds of question (paper 5.3.2)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from torch import nn

from ..checks import instance, path, whole
from ..data.examples import Corpus
from ..errors import ArgumentError, DataError
from ..report.statistics import GROUPS, centre_of_mass, layer_groups, layer_shares
from ..stages.factors import Factors
from ..stages.run import RunArguments
from .lines import COLOURS, SHIPPED, drawing, read_lines, texts_of, write_result
from .overlap import overlaps
from .scored import LayerScores, asked, told, uncut

FILE = SHIPPED / "questions.jsonl"
# Sequences that a question's profile is the mean of, and those whose tokens are compared.
TOP, BEST = 50, 10
THIRDS = ("lower", "middle", "upper")


@dataclass(frozen=True)
class Profile:
    """Where the influence on one question, or on a kind of questions, lies.

    shares    signed shares of groups of layers, lowest first: of every top sequence (the sum of
              |shares| is 1), averaged
    centre    depth of |influence|, 0 = the lowest layer, 1 = the highest, averaged
    overlap   token overlap of the question with the sequences that are best by "all" layers and by
              those of a third, and with an average sequence of the "corpus"; see `overlaps`
    kept      how many of the best by all layers are among the best by a third
    """

    kind: str
    question: str | None
    shares: list[float]
    centre: float
    overlap: dict[str, float]
    kept: dict[str, float]


@dataclass(frozen=True)
class Layers:
    """Profiles of questions, and their means by kind."""

    questions: tuple[Profile, ...]
    kinds: tuple[Profile, ...]
    top: int

    @property
    def rows(self) -> list[dict[str, Any]]:
        """For JSON lines: kinds, then questions."""
        return [*map(asdict, self.kinds), *map(asdict, self.questions)]

    def draw(self, file: Path) -> None:
        """Shares of the groups, a line a question; token overlap of thirds, a group a kind."""
        Q = len(self.questions)
        with drawing(file, 9.0, 1.6 + 0.16 * Q) as figure:
            left, right = figure.subplots(1, 2)
            shares = np.array([x.shares for x in self.questions])
            most = np.abs(shares).max()
            image = left.imshow(shares, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
            left.set_yticks(range(Q), [f"{x.kind}: {x.question}" for x in self.questions])
            left.set_xticks([0, shares.shape[1] - 1], ["lowest layers", "highest"])
            left.set_title(f"share of influence, mean of the top {self.top}")
            figure.colorbar(image, ax=left)
            for at, name in enumerate((*THIRDS, "all", "corpus")):
                places = np.arange(len(self.kinds)) + 0.16 * (at - 2)
                heights = [x.overlap[name] for x in self.kinds]
                right.bar(places, heights, 0.15, label=name, color=COLOURS[(at + 1) % 8])
            right.set_xticks(range(len(self.kinds)), [x.kind for x in self.kinds])
            right.set_title(f"question's tokens in the best {BEST} by layers")
            right.legend(ncols=5, fontsize=6)


def layers(
    model: nn.Module,
    tokenizer: Any,
    factors: Factors,
    data: Corpus,
    *,
    out: str | Path,
    file: str | Path = FILE,
    top: int = TOP,
    rank: int | None = 32,
    damping: float | str | None = None,
    **arguments: Unpack[RunArguments],
) -> Layers:
    """Shares of nine groups of layers in the influence of each question's top sequences, and what
    ranking by the lower, the middle or the upper third alone would put first.

    `out` gets queries and scores by layer (a rerun continues), `layers.jsonl` and `layers.svg`.

    Args:
        model, factors, rank, damping, arguments: see `prepare_queries`.
        tokenizer: the model's.
        data: the corpus.
        file: JSON lines: {"name", "kind", "prompt", "completion"}.
        top: sequences of a question.

    Raises:
        DataError: a line of `file` lacks a field, or the corpus has fewer than `top` sequences.
    """
    instance("factors", factors, Factors, "what fit returns, or Factors(folder)")
    out, lines = path("out", out), read_questions(file)
    if len(data) < whole("top", top):
        raise DataError(f"the corpus has {len(data)} sequences, fewer than the top {top}")
    questions = uncut(lines, tokenizer)
    _, found = asked(
        model, factors, questions, data, out, rank=rank, damping=damping, **arguments
    )  # fmt: skip
    kinds = [line["kind"] for line in lines]
    result = profiles(found, questions, data, told(lines), kinds, top)
    write_result(out, "layers", result)
    return result


def read_questions(file: str | Path = FILE) -> list[dict[str, Any]]:
    """Questions of kinds; DataError names a line that lacks a field."""
    lines = read_lines(path("file", file))
    for line in lines:
        texts_of(line, "kind", "prompt", "completion")
    return lines


def profiles(
    found: LayerScores,
    questions: Corpus,
    data: Corpus,
    names: Sequence[str],
    kinds: Sequence[str],
    top: int = TOP,
) -> Layers:
    """`layers` of scores that are there; ArgumentError if there are fewer layers than thirds."""
    if len(found.values) < len(THIRDS):
        raise ArgumentError(f"{len(found.values)} tracked layers have no lower, middle and upper")
    shared = overlaps(questions, data)
    each = [
        _profile(found.values[:, q], shared[q], name, kind, top)
        for q, (name, kind) in enumerate(zip(names, kinds, strict=True))
    ]
    means = [
        _mean(kind, [x for x in each if x.kind == kind]) for kind in dict.fromkeys(kinds)
    ]  # fmt: skip
    return Layers(tuple(each), tuple(means), top)


def _profile(values: np.ndarray, shared: np.ndarray, name: str, kind: str, top: int) -> Profile:
    """One question's [L,N]."""
    ways = {
        "all": values.sum(0),
        **dict(zip(THIRDS, layer_groups(values, len(THIRDS)), strict=True)),
    }
    order = {way: np.argsort(-scores, kind="stable") for way, scores in ways.items()}
    leading = [values[:, i] for i in order["all"][:top]]
    best = {way: indices[:BEST] for way, indices in order.items()}
    overlap = {way: float(shared[indices].mean()) for way, indices in best.items()}
    kept = {way: float(np.isin(best["all"], own).sum()) for way, own in best.items()}
    return Profile(
        kind,
        name,
        np.mean([layer_shares(x, GROUPS) for x in leading], axis=0).tolist(),
        float(np.mean([centre_of_mass(x) for x in leading])),
        overlap | {"corpus": float(shared.mean())},
        kept,
    )


def _mean(kind: str, some: Sequence[Profile]) -> Profile:
    """The mean of profiles."""

    def each(dicts: Sequence[dict[str, float]]) -> dict[str, float]:
        return {name: float(np.mean([x[name] for x in dicts])) for name in dicts[0]}

    shares = np.mean([x.shares for x in some], axis=0).tolist()
    centre = float(np.mean([x.centre for x in some]))
    overlap, kept = each([x.overlap for x in some]), each([x.kept for x in some])
    return Profile(kind, None, shares, centre, overlap, kept)
