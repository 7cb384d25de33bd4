"""Records of two sides -> examples that are pairs: what is preferred and what is not, a completion
and what it is held against.

    {"prompt", "chosen", "rejected"}    {"prompt", "completion", "against"}

Sides are texts after their prompt, messages after the prompt's, or whole conversations, of which
what the assistant says last counts. A prompt is optional: what both sides begin with cancels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..checks import place, require, whole
from ..errors import DataError
from .choices import OnLong, Split
from .conversations import encode, is_conversation
from .encoding import tokenizer_fingerprint
from .examples import Indexable
from .fields import SPEAKERS, Columns, Named, text_of
from .forms import REFERENCES, Form, number, pair_form
from .labelled import tokens_of
from .recorded import Recorded
from .records import Records, read_columns
from .tables import Written
from .tokens import Tokens, tokenize

PREFERENCES = ("chosen", "rejected")
CONTRAST = ("completion", "against")


@dataclass(frozen=True, eq=False)
class Pairs(Recorded):
    """Examples that are pairs: both `sides` of every record, and what else is said of each.

    `truncated` records lost `dropped` tokens of one side or both.
    """

    sides: tuple[Indexable, Indexable]
    values: Mapping[str, Sequence[float]]
    truncated: int = 0
    dropped: int = 0
    tokenizer_fingerprint: str | None = None

    @property
    def form(self) -> Form:
        """What is read of an example."""
        return pair_form(self.values)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = place(index, len(self))
        both = [side[index] for side in self.sides]
        joined = {name: torch.cat([x[name] for x in both]) for name in both[0]}
        said = {name: values[index] for name, values in self.values.items()}
        return joined | {"sides": [len(x["input_ids"]) for x in both]} | said


def read_pairs(
    path: str | Path | Indexable,
    tokenizer: Callable[..., Any],
    context: int,
    *,
    special_tokens: bool = False,
    split: Split = "line",
    fields: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    on_long: OnLong = "truncate",
) -> Pairs:
    """Preferences as pairs of at most `context` tokens a side, chosen first; labels of -100 on the
    prompt. `ref_chosen_logps` and `ref_rejected_logps` are kept where records have them.

    Args:
        path: a file or folder, or records that are in memory.
        special_tokens: texts are encoded with what the tokenizer puts around a text, as for a model
            that classifies: for `RewardTask`.
        fields: {"prompt": ..., "chosen": ..., "rejected": ...} to a file's own names.
        on_long: "refuse" what is longer than the context; else its end is cut off.

    Raises:
        DataError: a record lacks a side, both are the same, one has nothing to predict or is too
            long, or some have reference values and others not; names file and line.
    """
    columns = Named(
        fields, keep=tuple(keep), wanted=PREFERENCES, more=("prompt", *REFERENCES),
        foreign=("completion", "text"),
    )  # fmt: skip
    records = read_columns(path, split, columns)
    return _pairs(records, PREFERENCES, tokenizer, context, on_long, special_tokens)


def read_queries(
    path: str | Path | Indexable,
    tokenizer: Callable[..., Any],
    context: int,
    *,
    keep: Sequence[str] = (),
) -> Tokens | Pairs:
    """The queries of a file (JSON lines, parquet), or records that are in memory: `prompt` and
    `completion`, or `messages`; with `against`, another completion, log p(completion) -
    log p(against) is asked about.

    Labels are -100 on the prompt, and on all but what the assistant says last. One longer than the
    context, or whose completion has no tokens, is refused: DataError names file and line. `keep`
    as in `read`.
    """
    records = read_columns(path, "file", _Questions(texts=False, keep=tuple(keep)))
    contrasts = ["against" in records[index] for index in range(len(records))]
    if any(contrasts) and not all(contrasts):
        odd = contrasts.index(not contrasts[0])
        raise DataError(
            f"{records.source(odd)}: {'has' if contrasts[odd] else 'lacks'} 'against', unlike "
            f"{records.source(0)}: give questions of two kinds in files of their own"
        )
    if contrasts[0]:
        return _pairs(records, CONTRAST, tokenizer, context, "refuse", False)
    return tokenize(records, tokenizer, context, on_long="refuse", last_turn=True)


@dataclass(frozen=True)
class _Questions(Columns):
    """Queries: a completion may have another that it is held against."""

    def among(self, present: Sequence[str], source: str) -> dict[str, list[str]]:
        """Our names to those of the file that hold them."""
        found = super().among(present, source)
        if "against" not in present:
            return found
        if "completion" not in found:
            raise DataError(f"{source}: 'against' stands beside 'prompt' and 'completion'")
        return found | {"against": ["against"]}


def _pairs(
    records: Records,
    names: tuple[str, str],
    tokenizer: Callable[..., Any],
    context: int,
    on_long: OnLong,
    special_tokens: bool,
) -> Pairs:
    """Both sides tokenised, and checked to differ."""
    whole("context", context, 2)
    require(callable(tokenizer), "tokenizer", tokenizer, "a tokenizer of transformers' kind")
    values: dict[str, list[float]] = {name: [] for name in REFERENCES if name in records[0]}
    for index in range(len(records)):
        record = records[index]
        first, second = (record[name] for name in names)
        if first == second:
            raise DataError(
                f"{record['source']}: {names[0]!r} and {names[1]!r} are the same: there is nothing "
                "to compare"
            )
        for name in REFERENCES:
            if (name in record) != (name in values):
                raise DataError(
                    f"{record['source']}: {'has' if name in record else 'lacks'} {name!r}, unlike "
                    f"{records.source(0)}: give it in all records, or in none"
                )
            if name in values:
                value = record[name]
                value = value.number if isinstance(value, Written) else value
                values[name].append(float(number(value, f"{record['source']}: {name}")))
    if len(values) == 1:
        raise DataError(f"{records.source(0)}: has one of {' and '.join(REFERENCES)}: give both")
    cut: OnLong = "truncate" if on_long == "chunk" else on_long
    both: list[tuple[Indexable, int, int]] = []
    for name in names:
        side = _Side(records, name)
        if special_tokens:
            both.append(_whole(side, tokenizer, context, cut))
        else:
            own = tokenize(side, tokenizer, context, on_long=cut, last_turn=True)
            both.append((own, own.truncated, own.dropped))
    first, second = both
    told_by = tokenizer_fingerprint(tokenizer)
    cuts = first[1] + second[1], first[2] + second[2]
    return Pairs(records, (first[0], second[0]), values, *cuts, told_by)


class _Side(Dataset):
    """One side of every pair, as a record of its own."""

    def __init__(self, records: Records, name: str) -> None:
        self.records, self.name = records, name

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        said, prompt, beside = record[self.name], record.get("prompt"), {"source": record["source"]}
        if record.get("tools"):
            beside["tools"] = record["tools"]
        if not isinstance(said, list):
            text_of(said, self.name, record["source"])
            if prompt is None:
                return {"text": said} | beside
            text_of(prompt, "prompt", record["source"])
            return {"prompt": prompt, "completion": said} | beside
        first = said[0] if said and isinstance(said[0], Mapping) else {}
        answers = "assistant" in (first.get("role"), SPEAKERS.get(first.get("from", "")))
        if isinstance(prompt, str) and answers:
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, list):
            return {"prompt": prompt, "completion": said} | beside
        return {"messages": said} | beside


def _whole(
    side: _Side, tokenizer: Callable[..., Any], context: int, on_long: OnLong
) -> tuple[list[dict[str, Tensor]], int, int]:
    """Every text or conversation as a model that rates it sees it; records cut, tokens lost."""
    found, losses = [], []
    for index in range(len(side)):
        record = Columns().record(one := side[index], one["source"])
        if is_conversation(record):
            ids = [i if i >= 0 else ~i for i in encode(tokenizer, record, last=True)]
            lost = max(0, len(ids) - context)
        else:
            text = record.get("text", record.get("prompt", "") + record.get("completion", ""))
            made, lost = tokens_of(tokenizer, record["source"], context, text)
            ids = made["input_ids"]
        if lost and on_long == "refuse":
            raise DataError(f"{record['source']}: {len(ids) + lost} tokens of {side.name!r}, but "
                            f"the context is {context}")  # fmt: skip
        kept = torch.tensor(ids[:context], dtype=torch.int64)
        found.append({"input_ids": kept, "labels": kept})
        losses.append(lost)
    return found, sum(map(bool, losses)), sum(losses)
