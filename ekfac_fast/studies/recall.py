"""Memorisation: does a passage that a model knows by heart come first (paper 5.3.3)?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from torch import nn

from ..checks import instance, path
from ..data.examples import Corpus
from ..data.tokens import Tokens
from ..errors import DataError
from ..stages.factors import Factors
from ..stages.run import RunArguments
from .lines import COLOURS, SHIPPED, drawing, read_lines, texts_of, write_result
from .scored import Joined, asked, per_token, told, uncut

FILE = SHIPPED / "passages.jsonl"


@dataclass(frozen=True)
class Recalled:
    """One passage among all sequences of the corpus and the other passages.

    log_p    of its completion after its prompt, nats a token
    rank     1 = nothing has more influence on the completion
    holding  sequences of the corpus that hold the completion word for word; they are not in `rank`
    score    its own, raw; `next` that of the best sequence that is not the passage
    """

    passage: str
    log_p: float
    rank: int
    sequences: int
    holding: int
    score: float
    next: float


@dataclass(frozen=True)
class Memory:
    """All passages."""

    passages: tuple[Recalled, ...]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """For JSON lines."""
        return [*map(asdict, self.passages)]

    def draw(self, file: Path) -> None:
        """Each passage's influence beside the best other sequence's; its rank beside the name."""
        with drawing(file, 6.0, 1.0 + 0.4 * len(self.passages)) as figure:
            panel = figure.subplots()
            places = np.arange(len(self.passages))
            unit = np.array([max(abs(x.score), abs(x.next)) or 1.0 for x in self.passages])
            for shift, name, label in ((-0.2, "score", "the passage"), (0.2, "next", "next best")):
                values = np.array([getattr(x, name) for x in self.passages]) / unit
                panel.barh(places + shift, values, 0.38, label=label,
                           color=COLOURS[0 if name == "score" else 1])  # fmt: skip
            named = [f"{x.passage} (rank {x.rank} of {x.sequences})" for x in self.passages]
            panel.set_yticks(places, named)
            panel.invert_yaxis()
            panel.set_xlabel("influence on the completion, the larger = 1")
            figure.legend(loc="outside lower center", ncols=2)


def memorisation(
    model: nn.Module,
    tokenizer: Any,
    factors: Factors,
    data: Corpus,
    *,
    out: str | Path,
    file: str | Path = FILE,
    rank: int | None = 32,
    damping: float | str | None = None,
    **arguments: Unpack[RunArguments],
) -> Memory:
    """The rank of every passage of a file among the corpus, for its own completion.

    `out` gets queries and scores (a rerun continues), `memorisation.jsonl` and
    `memorisation.svg`.

    Args:
        model, factors, rank, damping, arguments: see `prepare_queries`.
        tokenizer: the model's.
        data: the corpus; the passages are put behind it.
        file: JSON lines: {"name", "prompt", "completion", "text"}, the text holding both.

    Raises:
        DataError: a line of `file` lacks a field, or its text does not hold its completion.
    """
    instance("factors", factors, Factors, "what fit returns, or Factors(folder)")
    out, passages = path("out", out), read_passages(file)
    questions, texts = tokenized(passages, tokenizer)
    prepared, found = asked(
        model, factors, questions, Joined((data, texts)), out, rank=rank, damping=damping,
        **arguments,
    )  # fmt: skip
    result = recalled(found.total, per_token(prepared), passages, data, tokenizer)
    write_result(out, "memorisation", result)
    return result


def read_passages(file: str | Path = FILE) -> list[dict[str, Any]]:
    """Passages of a file; DataError names a line that lacks a field."""
    lines = read_lines(path("file", file))
    for line in lines:
        prompt, completion, text = texts_of(line, "prompt", "completion", "text")
        if prompt + completion not in text:
            raise DataError(f"{line['source']}: the text does not hold prompt and completion")
    return lines


def tokenized(passages: Sequence[dict[str, Any]], tokenizer: Any) -> tuple[Tokens, Tokens]:
    """What is asked of passages, and they themselves."""
    asks = [{name: x for name, x in line.items() if name != "text"} for line in passages]
    texts = [{"text": line["text"], "source": line["source"]} for line in passages]
    questions = uncut(asks, tokenizer)
    return questions, uncut(texts, tokenizer)


def recalled(
    total: np.ndarray,
    log_p: Sequence[float],
    passages: Sequence[dict[str, Any]],
    data: Corpus,
    tokenizer: Any,
) -> Memory:
    """`memorisation` of scores [P,N+P], the passages last, and of log p a token."""
    N, found = len(data), []
    texts = [tokenizer.decode(data[i]["input_ids"]) for i in range(N)]
    for at, (line, name) in enumerate(zip(passages, told(passages), strict=True)):
        completion = line["completion"].strip()
        holding = np.array([completion in text for text in texts] + [False] * len(passages))
        holding[N + at] = True
        others, own = total[at][~holding], float(total[at, N + at])
        found.append(
            Recalled(
                passage=name,
                log_p=log_p[at],
                rank=1 + int((others > own).sum()),
                sequences=1 + len(others),
                holding=int(holding.sum()) - 1,
                score=own,
                next=float(others.max()),
            )
        )
    return Memory(tuple(found))
