"""Languages: does a text in one teach what is asked in another (paper 5.3.1)?

A file of JSON lines asks ({"topic", "language", "prompt", "completion"}) and holds paragraphs that
say the same ({"topic", "language", "text"}), one of each for every topic in every language.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from torch import nn

from ..checks import instance, path
from ..data.tokens import Tokens
from ..errors import DataError
from ..stages.factors import Factors
from ..stages.run import RunArguments
from .lines import SHIPPED, drawing, is_question, read_lines, texts_of, write_result
from .scored import asked, uncut

FILE = SHIPPED / "languages.jsonl"
# What a tokenizer with byte tokens calls them.
BYTE = "<0x"


@dataclass(frozen=True)
class Languages:
    """Influence by language of the question (rows) and of the paragraph (columns).

    same    [M,M] raw, mean over topics: of the paragraph that says what is asked
    other   [M,M] of the paragraphs of all other topics; NaN where there is one topic
    broken  share of a language's tokens that are unknown, or a part of a character: what the
            tokenizer cannot say in words
    log_p   of the completions in a language, nats a question
    """

    languages: tuple[str, ...]
    same: np.ndarray
    other: np.ndarray
    broken: dict[str, float]
    log_p: dict[str, float]

    def across(self, language: str, *, other: bool = False) -> float:
        """Influence of paragraphs in other languages over that of the same language's, of questions
        in one; NaN where the latter is not above 0.

        With `other`, of paragraphs there that say something else: what `across` has over it is
        meaning, and no surprise at a language.
        """
        at = self.languages.index(language)
        values = self.other if other else self.same
        own, others = self.same[at, at], np.delete(values[at], at)
        return float(others.mean() / own) if own > 0 else float("nan")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """For JSON lines, one a language of questions."""
        return [
            {
                "question": language,
                "same topic": dict(zip(self.languages, self.same[at].tolist(), strict=True)),
                "other topics": dict(zip(self.languages, self.other[at].tolist(), strict=True)),
                "across over same language": self.across(language),
                "across, on other topics": self.across(language, other=True),
                "unknown or broken tokens": self.broken[language],
                "log p": self.log_p[language],
            }
            for at, language in enumerate(self.languages)
        ]

    def draw(self, file: Path) -> None:
        """A heat map, each row over its own language's paragraph; beside it other topics."""
        diagonal = np.abs(np.diagonal(self.same))[:, None]
        unit = np.where(diagonal > 0, diagonal, 1.0)
        size = 1.2 + 0.5 * len(self.languages)
        with drawing(file, 2 * size + 1, size + 0.5) as figure:
            panels = figure.subplots(1, 2)
            titles = ("paragraph says what is asked", "paragraphs of other topics")
            for panel, values, title in zip(panels, (self.same, self.other), titles, strict=True):
                shares = np.nan_to_num(values / unit)
                panel.imshow(shares, cmap="RdBu", vmin=-1, vmax=1)
                panel.set_xticks(range(len(self.languages)), self.languages)
                panel.set_yticks(range(len(self.languages)), self.languages)
                for (y, x), value in np.ndenumerate(shares):
                    ink = "white" if abs(value) > 0.6 else "black"
                    panel.text(
                        x, y, f"{value:.2f}", ha="center", va="center", fontsize=6, color=ink
                    )  # fmt: skip
                panel.set_title(title)
                panel.set_xlabel("language of the paragraph")
            panels[0].set_ylabel("language of the question")


def languages(
    model: nn.Module,
    tokenizer: Any,
    factors: Factors,
    *,
    out: str | Path,
    file: str | Path = FILE,
    rank: int | None = 32,
    damping: float | str | None = None,
    **arguments: Unpack[RunArguments],
) -> Languages:
    """Influence of parallel paragraphs in every language on questions in every language.

    `out` gets queries and scores (a rerun continues), `languages.jsonl` and `languages.svg`.

    Args:
        model, factors, rank, damping, arguments: see `prepare_queries`.
        tokenizer: the model's.
        file: see `read_parallel`.
    """
    instance("factors", factors, Factors, "what fit returns, or Factors(folder)")
    out = path("out", out)
    topics, names, asks, texts = read_parallel(file)
    questions = uncut(asks, tokenizer)
    data = uncut(texts, tokenizer)
    prepared, found = asked(
        model, factors, questions, data, out, rank=rank, damping=damping, **arguments
    )  # fmt: skip
    P, M = len(topics), len(names)
    by = found.total.reshape(P, M, P, M)
    own = np.eye(P, dtype=bool)
    same = by.transpose(0, 2, 1, 3)[own].mean(0)
    other = by.transpose(0, 2, 1, 3)[~own].mean(0) if P > 1 else np.full((M, M), np.nan)
    measured = prepared.measurements.numpy().reshape(P, M).mean(0)
    result = Languages(
        tuple(names),
        same,
        other,
        {name: broken(data, range(at, P * M, M), tokenizer) for at, name in enumerate(names)},
        {name: -float(measured[at]) for at, name in enumerate(names)},
    )
    write_result(out, "languages", result)
    return result


def read_parallel(
    file: str | Path = FILE,
) -> tuple[list[str], list[str], list[dict[str, Any]], list[dict[str, Any]]]:
    """Topics, languages, and questions and paragraphs of each topic in each language.

    Raises:
        DataError: a field is missing or empty, there is one language, a topic is asked or told
            twice in a language, or not at all; names file and line, or topic and language.
    """
    file = path("file", file)
    asks: dict[tuple[str, str], dict[str, Any]] = {}
    texts: dict[tuple[str, str], dict[str, Any]] = {}
    for line in read_lines(file):
        topic, language = texts_of(line, "topic", "language")
        asking = is_question(line)
        texts_of(line, *(("prompt", "completion") if asking else ("text",)))
        into = asks if asking else texts
        if (topic, language) in into:
            what = "question" if asking else "text"
            raise DataError(f"{line['source']}: a second {what} of {topic!r} in {language!r}")
        into[topic, language] = line
    topics = [*dict.fromkeys(topic for topic, _ in (*asks, *texts))]
    names = [*dict.fromkeys(language for _, language in (*asks, *texts))]
    if len(names) < 2:
        raise DataError(f"{file}: {names[0]!r} is its only language: nothing to compare with")
    every = [(topic, language) for topic in topics for language in names]
    for what, there in (("question", asks), ("parallel text", texts)):
        for topic, language in every:
            if (topic, language) not in there:
                raise DataError(
                    f"{file}: language {language!r} has no {what} of topic {topic!r}: add it, or "
                    "leave the language or the topic out"
                )
    return topics, names, [asks[pair] for pair in every], [texts[pair] for pair in every]


def broken(data: Tokens, indices: range, tokenizer: Any) -> float:
    """The share of tokens that are unknown, or a part of a character."""
    ids = np.concatenate([data[i]["input_ids"].numpy() for i in indices])
    kinds, counts = np.unique(ids, return_counts=True)
    unknown = getattr(tokenizer, "unk_token_id", None)

    def whole(token: int) -> bool:
        said = tokenizer.convert_ids_to_tokens(token)
        text = tokenizer.decode([token])
        return token != unknown and not str(said).startswith(BYTE) and "\ufffd" not in text

    bad = np.array([not whole(int(token)) for token in kinds])
    return float(counts[bad].sum() / counts.sum())
