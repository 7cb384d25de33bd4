"""Text or any indexable data set -> token examples -> batches by token budget.

An example is a mapping with `input_ids` [T] int, optional `attention_mask` [T] (0: padding),
optional `labels` [T] (Hugging Face: unshifted, -100 ignored, absent = input_ids) and optional `id`.
A data set is anything with `__len__` and `__getitem__` that gives such mappings.
"""

import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from .records import DataError, Split, checked, optional, read

__all__ = [
    "DataError",
    "Example",
    "Indexable",
    "OnLong",
    "Split",
    "Tokens",
    "batch_plan",
    "collate",
    "example",
    "lengths",
    "optional",
    "read",
    "read_queries",
    "tokenize",
]

OnLong = Literal["chunk", "truncate", "refuse"]
IGNORED = -100
TOKENIZED_AT_ONCE = 256


class Indexable(Protocol):
    """A list, a torch data set, a Hugging Face data set."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence without padding: input_ids [T], labels [T], int64; `dropped` tokens were cut.

    `id` is part of the key that samples its labels: the record's "id" where that is an integer, so
    that labels stay the same in another order or a larger data set; else its index.
    """

    input_ids: Tensor
    labels: Tensor
    id: int
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def targets(self) -> int:
        """How many positions have a loss: the first has none, nothing predicts it."""
        return int((self.labels[1:] != IGNORED).sum())


def example(
    dataset: Indexable,
    index: int,
    vocab_size: int | None = None,
    context: int | None = None,
) -> Example:
    """Example `index`, checked and without its padding; DataError names it.

    Longer than `context` tokens: its end is cut off, and counted in `dropped`.
    """
    record, where = dataset[index], f"example {index}"
    if not isinstance(record, Mapping) or "input_ids" not in record:
        raise DataError(f"{where}: is a {type(record).__name__}, not a mapping with 'input_ids'")
    ids = _integers(record["input_ids"], f"{where}: input_ids")
    labels, mask = (
        _beside(ids, record.get(name), f"{where}: {name}") for name in ("labels", "attention_mask")
    )
    labels = ids if labels is None else labels
    real = np.arange(len(ids)) if mask is None else np.flatnonzero(mask)
    if len(real) == 0:
        raise DataError(f"{where}: has no tokens")
    start, stop = int(real[0]), int(real[-1]) + 1
    if stop - start > len(real):
        hole = int(np.flatnonzero(mask[start:stop] == 0)[0]) + start
        raise DataError(f"{where}: attention_mask is 0 at position {hole}, between real tokens")
    dropped = max(0, stop - start - context) if context else 0
    stop -= dropped
    _within(ids[start:stop], vocab_size, start, f"{where}: token id")
    _within(
        np.where(labels == IGNORED, 0, labels)[start:stop], vocab_size, start, f"{where}: label"
    )
    own = record.get("id")
    return Example(
        torch.tensor(ids[start:stop]),
        torch.tensor(labels[start:stop]),
        int(own) if isinstance(own, Integral) else index,
        dropped,
    )


def _integers(values: Any, what: str) -> np.ndarray:
    """values as int64 [T]."""
    values = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if values.ndim != 1 or (values.dtype.kind not in "iub" and len(values)):
        raise DataError(f"{what} must be integers [T], not {values.dtype} {list(values.shape)}")
    return values.astype(np.int64)


def _beside(ids: np.ndarray, values: Any, what: str) -> np.ndarray | None:
    """Optional values, one for each token."""
    if values is None:
        return None
    values = _integers(values, what)
    if len(values) != len(ids):
        raise DataError(f"{what} has {len(values)} positions, input_ids has {len(ids)}")
    return values


def _within(ids: np.ndarray, vocab_size: int | None, start: int, what: str) -> None:
    """Raise DataError at the first id that is negative or not in the vocabulary."""
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size if vocab_size else False))
    if len(outside):
        at = int(outside[0])
        raise DataError(
            f"{what} {ids[at]} at position {at + start} is outside the vocabulary"
            + (f" of {vocab_size}. Is this the model's own tokenizer?" if vocab_size else "")
        )


def lengths(dataset: Indexable) -> list[int]:
    """The number of tokens of each example, padding not counted; no checks."""
    result = []
    for i in range(len(dataset)):
        record = dataset[i]
        mask = record.get("attention_mask")
        result.append(len(record["input_ids"]) if mask is None else int(np.count_nonzero(mask)))
    return result


def batch_plan(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of the batches: (longest length) x (size) <= batch_tokens, or one example alone.

    From the longest to the shortest, ties in order: little padding, and what does not fit in
    memory shows in the first batch. Every index once; a pure function.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    plan, start = [], 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, lengths[order[start]]))
        plan.append(order[start : start + size])
        start += size
    return plan


def collate(
    examples: Sequence[Example], pad_id: int = 0, side: Literal["right", "left"] = "right"
) -> dict[str, Tensor]:
    """input_ids, attention_mask, labels [B,T] int64, padded on `side`; padding has label -100."""

    def pad(rows: list[Tensor], value: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

    return {
        "input_ids": pad([e.input_ids for e in examples], pad_id),
        "attention_mask": pad([torch.ones_like(e.input_ids) for e in examples], 0),
        "labels": pad([e.labels for e in examples], IGNORED),
    }


@dataclass(frozen=True, eq=False)
class Tokens(Dataset):
    """Tokenised records: a data set of examples.

    ids   [all tokens] int32, mapped from a nameless file in TMPDIR: a corpus need not fit in memory
    rows  [N,4] int64: end in ids; tokens at the start that have no label; record; chunk in it
    `truncated` records lost `dropped` tokens, `skipped` ones had nothing to predict.
    """

    records: Indexable
    ids: np.ndarray
    rows: np.ndarray
    truncated: int
    dropped: int
    skipped: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = range(len(self))[index]
        start = self.rows[index - 1, 0] if index else 0
        end, masked = self.rows[index, :2]
        ids = torch.tensor(self.ids[start:end], dtype=torch.int64)
        labels = ids.clone()
        labels[:masked] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def source(self, index: int) -> str:
        """Where example `index` was read: file, line and, from the second on, the chunk of it."""
        record, chunk = (int(n) for n in self.rows[index, 2:])
        source = _source(self.records[record], record)
        return f"{source}, chunk {chunk + 1}" if chunk else source


def tokenize(
    records: Indexable,
    tokenizer: Callable[..., Any],
    context: int,
    *,
    on_long: OnLong = "chunk",
    on_empty: Literal["refuse", "skip"] = "refuse",
    progress: Callable[[int], None] | None = None,
) -> Tokens:
    """Records (`text`, or `prompt` and `completion`) as examples of at most `context` tokens.

    A prompt has labels -100. It is tokenised apart from its completion and put before it, so no
    token reaches over the border. If the tokenizer begins texts with a BOS token, every example
    begins with it; no other special token is added. A longer text is cut into chunks, or its end is
    cut off, or it is refused; one with a prompt is never chunked. Chunks of one token, which
    nothing predicts, are dropped; a record without anything to predict is refused or skipped.
    `progress` is called with the number of records done. Raises DataError, naming the source.
    """
    bos = _bos(tokenizer)
    if context < len(bos) + 2:
        raise ValueError(f"tokenize: a context of {context} tokens is too short")
    rows, end, truncated, dropped, skipped = array("q"), 0, 0, 0, 0
    with tempfile.TemporaryFile() as file:
        for index, record, prompt, text in _encoded(records, tokenizer):
            total = len(bos) + len(prompt) + len(text)
            if total > context and on_long == "refuse":
                raise DataError(f"{record['source']}: {total} tokens, but the context is {context}")
            masked = len(bos) + len(prompt) if prompt else 0
            pieces = _cut(bos, prompt, text, context, on_long == "chunk" and not prompt)
            pieces = [piece for piece in pieces if len(piece) > max(masked, 1)]
            if pieces:
                kept = sum(len(piece) - len(bos) for piece in pieces)
                dropped += len(prompt) + len(text) - kept
                truncated += kept < len(prompt) + len(text)
            elif on_empty == "skip":
                skipped += 1
            else:
                raise DataError(_nothing(record, prompt, text, context))
            for chunk, piece in enumerate(pieces):
                data = np.array(piece, dtype=np.int32)
                file.write(data.data)
                end += len(data)
                rows.extend((end, masked, index, chunk))
            if progress:
                progress(index + 1)
        if not rows:
            raise DataError(f"nothing to predict in {len(records)} records")
        file.flush()
        ids = np.memmap(file, dtype=np.int32, mode="r")
    table = np.frombuffer(rows, dtype=np.int64).reshape(-1, 4)
    return Tokens(records, ids, table, truncated, dropped, skipped)


def _bos(tokenizer: Callable[..., Any]) -> list[int]:
    """The token that the tokenizer puts before a text, as a list; empty if it puts none."""
    return [
        i for i in tokenizer("")["input_ids"][:1] if i == getattr(tokenizer, "bos_token_id", None)
    ]


def _encoded(
    records: Indexable, tokenizer: Callable[..., Any]
) -> Iterator[tuple[int, dict[str, str], list[int], list[int]]]:
    """(index, record, prompt's tokens, text's tokens); many at once, tokenizers run in parallel."""

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    for first in range(0, len(records), TOKENIZED_AT_ONCE):
        part = range(first, min(first + TOKENIZED_AT_ONCE, len(records)))
        values = [records[i] for i in part]
        batch = [checked(v, _source(v, i)) for v, i in zip(values, part, strict=True)]
        prompts = encode([record.get("prompt", "") for record in batch])
        texts = encode([record.get("text", record.get("completion", "")) for record in batch])
        yield from zip(part, batch, prompts, texts, strict=True)


def _source(record: Any, index: int) -> str:
    """Where a record was read."""
    source = record.get("source") if isinstance(record, Mapping) else None
    return f"record {index}" if source is None else str(source)


def _cut(
    bos: list[int], prompt: list[int], text: list[int], context: int, chunk: bool
) -> list[list[int]]:
    """bos + prompt + text, at most `context` tokens of it, or all in chunks of at most that."""
    step = context - len(bos) if chunk else max(1, len(text))
    return [(bos + prompt + text[i : i + step])[:context] for i in range(0, len(text), step)]


def _nothing(record: dict[str, str], prompt: list[int], text: list[int], context: int) -> str:
    name = "completion" if "prompt" in record else "text"
    before = f" after {len(prompt)} of its prompt, the context is {context}" if prompt else ""
    return f"{record['source']}: nothing to predict: its {name} has {len(text)} tokens{before}"


def read_queries(path: str | Path, tokenizer: Callable[..., Any], context: int) -> Tokens:
    """The queries of a file (JSON lines, parquet), each with `prompt` and `completion`.

    Labels are -100 on the prompt. One longer than the context, or whose completion has no tokens,
    is refused: DataError names file and line.
    """
    records = read(path, field=None)
    for i in range(len(records)):  # a .txt has records, but no queries
        checked(records[i], records[i]["source"], None)
    return tokenize(records, tokenizer, context, on_long="refuse", on_empty="refuse")
