"""Word order: synthetic sequences, held against a question whose gradient is kept (paper 5.3.4).

A file of JSON lines asks ({"fact", "prompt", "completion"}) and holds sequences of groups
({"fact", "group", "text"}). The paper's two invented facts are in `data/word_order.jsonl`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from torch import nn

from ..checks import instance, listed, path
from ..errors import DataError
from ..stages.factors import Factors
from ..stages.run import RunArguments
from .lines import COLOURS, SHIPPED, drawing, is_question, read_lines, texts_of, write_result
from .scored import asked, uncut

FIRST, REMOVED, CHANGED, IRRELEVANT, FLIPPED, FLIPPED_ALONE = GROUPS = (
    "prompt first", "completion removed", "meaning changed", "irrelevant", "order flipped",
    "flipped, prompt removed",
)  # fmt: skip
FILE = SHIPPED / "word_order.jsonl"


@dataclass(frozen=True)
class Facts:
    """What a file holds: a question a fact, and each fact's sequences, by group."""

    questions: dict[str, dict[str, Any]]
    sequences: dict[tuple[str, str], list[dict[str, Any]]]

    @property
    def groups(self) -> list[str]:
        """In the order in which they first stand in the file."""
        return [*dict.fromkeys(group for _, group in self.sequences)]


def read_facts(file: str | Path = FILE, reference: str = FIRST) -> Facts:
    """Questions and groups of a file.

    Raises:
        DataError: a field is missing or empty, a fact has no question, two, or no sequence in a
            group that others have, or nobody has the group `reference`; names file and line, or
            fact and group.
    """
    file = path("file", file)
    found = Facts({}, {})
    for line in read_lines(file):
        (fact,) = texts_of(line, "fact")
        if is_question(line):
            texts_of(line, "prompt", "completion")
            if fact in found.questions:
                raise DataError(f"{line['source']}: fact {fact!r} has a question already")
            found.questions[fact] = line
            continue
        (group,) = texts_of(line, "group")
        texts_of(line, "text")
        found.sequences.setdefault((fact, group), []).append(line)
    facts = dict.fromkeys([*found.questions, *(fact for fact, _ in found.sequences)])
    for fact in facts:
        if fact not in found.questions:
            raise DataError(f"{file}: fact {fact!r} has no question: a line with prompt and "
                            "completion")  # fmt: skip
        for group in dict.fromkeys([reference, *found.groups]):
            if (fact, group) not in found.sequences:
                raise DataError(
                    f"{file}: fact {fact!r} has no sequence in group {group!r}"
                    + (", which the others are compared with" if group == reference else "")
                    + f"; its groups are {listed([g for f, g in found.sequences if f == fact])}"
                )
    return found


@dataclass(frozen=True)
class Group:
    """Influence of a group's sequences: their mean, and that over the reference group's.

    `ratio` is NaN where the reference's own mean is not above 0.
    """

    fact: str
    group: str
    sequences: int
    mean: float
    ratio: float


@dataclass(frozen=True)
class WordOrder:
    """Raw scores of every sequence, and what they come to in groups."""

    groups: tuple[Group, ...]
    scores: dict[tuple[str, str], tuple[float, ...]]
    texts: dict[tuple[str, str], tuple[str, ...]]
    reference: str

    def ratio(self, fact: str, group: str) -> float:
        """A group's mean over the reference's."""
        return next(x.ratio for x in self.groups if (x.fact, x.group) == (fact, group))

    def ordering(self, fact: str) -> dict[str, bool]:
        """What the paper found, of a file with its six groups: which of it holds for a fact.

        (1) prompt first > (3) meaning changed > (2) completion removed and (4) irrelevant;
        (5) order flipped and (6) without the prompt: both are less than half of (1), and nearer
        to each other than to (1).
        """
        first, removed, changed, irrelevant, flipped, alone = (
            self.ratio(fact, group) for group in GROUPS
        )
        return {
            "prompt first above meaning changed": first > changed,
            "meaning changed above completion removed and irrelevant": changed
            > max(removed, irrelevant),
            "flipped is less than half": max(flipped, alone) < first / 2,
            "flipped is as without the prompt": abs(flipped - alone) < first - max(flipped, alone),
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        """For JSON lines: groups, then every sequence."""
        sequences = [
            {"fact": fact, "group": group, "text": text, "score": score}
            for (fact, group), scores in self.scores.items()
            for text, score in zip(self.texts[fact, group], scores, strict=True)
        ]
        return [*map(asdict, self.groups), *sequences]

    def draw(self, file: Path) -> None:
        """A bar a sequence, over the reference's mean, and a panel a fact (paper Fig. 23, 24)."""
        facts = [*dict.fromkeys(fact for fact, _ in self.scores)]
        groups = [*dict.fromkeys(group for _, group in self.scores)]
        most = max(sum(len(s) for (f, _), s in self.scores.items() if f == x) for x in facts)
        with drawing(file, 5.0 * len(facts), 1.0 + 0.13 * most) as figure:
            panels = figure.subplots(1, len(facts), squeeze=False)[0]
            for fact, panel in zip(facts, panels, strict=True):
                panel.set_title(fact)
                at = 0
                for number, group in enumerate(groups):
                    scores = np.array(self.scores[fact, group])
                    (unit,) = (x.mean for x in self.groups if (x.fact, x.group) ==
                               (fact, self.reference))  # fmt: skip
                    places = np.arange(at, at + len(scores))
                    panel.barh(places, scores / unit if unit > 0 else scores,
                               color=COLOURS[number % len(COLOURS)], label=group)  # fmt: skip
                    at += len(scores) + 1
                panel.invert_yaxis()
                panel.set_yticks([])
                panel.axvline(0, color="black", linewidth=0.6)
                panel.set_xlabel(f"influence / mean of {self.reference!r}")
            figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center",
                          ncols=3)  # fmt: skip


def word_order(
    model: nn.Module,
    tokenizer: Any,
    factors: Factors,
    *,
    out: str | Path,
    file: str | Path = FILE,
    reference: str = FIRST,
    before: str = "",
    rank: int | None = 32,
    damping: float | str | None = None,
    **arguments: Unpack[RunArguments],
) -> WordOrder:
    """Influence of every sequence of a file on its fact's completion, and the mean of every group
    over that of `reference`.

    `out` gets queries and scores (a rerun continues), `word-order.jsonl` and `word-order.svg`.

    Args:
        model, factors, rank, damping, arguments: see `prepare_queries`.
        tokenizer: the model's.
        file: see `read_facts`.
        before: put before every sequence. Nothing predicts the first token of a text: a sequence
            that begins with the completion's first word says nothing about it, unless something
            stands before, be it a line end.

    Raises:
        DataError: see `read_facts`; a text is longer than 512 tokens.
    """
    instance("factors", factors, Factors, "what fit returns, or Factors(folder)")
    instance("before", before, str, "a text")
    out, facts = path("out", out), read_facts(file, reference)
    lines = [line for group in facts.sequences.values() for line in group]
    questions = uncut([*facts.questions.values()], tokenizer)
    texts = [line | {"text": before + line["text"]} for line in lines]
    data = uncut(texts, tokenizer)
    _, found = asked(
        model, factors, questions, data, out, rank=rank, damping=damping, **arguments
    )  # fmt: skip
    result = _grouped(facts, found.total, reference)
    write_result(out, "word-order", result)
    return result


def _grouped(facts: Facts, total: np.ndarray, reference: str) -> WordOrder:
    """Scores [facts, sequences] by fact and group."""
    row = {fact: at for at, fact in enumerate(facts.questions)}
    scores: dict[tuple[str, str], tuple[float, ...]] = {}
    texts, at = {}, 0
    for (fact, group), lines in facts.sequences.items():
        scores[fact, group] = tuple(total[row[fact], at : at + len(lines)].tolist())
        texts[fact, group] = tuple(str(line["text"]) for line in lines)
        at += len(lines)

    def mean(of: Sequence[float]) -> float:
        return float(np.mean(of))

    groups = []
    for (fact, group), own in scores.items():
        unit = mean(scores[fact, reference])
        ratio = mean(own) / unit if unit > 0 else float("nan")
        groups.append(Group(fact, group, len(own), mean(own), ratio))
    return WordOrder(tuple(groups), scores, texts, reference)
