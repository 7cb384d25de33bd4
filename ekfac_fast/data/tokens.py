"""Records of text -> token examples: chunks, completions after their prompts, queries."""

import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..checks import callback, choice, place, require, shown, sized, whole
from ..errors import ArgumentError, DataError
from ..store.fingerprint import Digest
from .choices import OnLong
from .conversations import encode, is_conversation
from .encoding import PIECE, encoded, tokenizer_fingerprint
from .examples import IGNORED, Indexable, Survey
from .fields import Columns
from .survey import Block, spans, survey
from .unpacking import in_tmpdir

TOKENIZED_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Tokens(Dataset):
    """Tokenised records: a data set of examples.

    ids   [all tokens] int32, of a token without a label ~id; mapped from a nameless file in TMPDIR:
          a corpus need not fit in memory
    rows  [N,3] int64: end in ids; record; chunk in it
    `truncated` records lost `dropped` tokens, `skipped` ones had nothing to predict.
    `tokenizer_fingerprint` tells the tokenizer from others; None where that is not known.
    """

    records: Indexable
    ids: np.ndarray
    rows: np.ndarray
    truncated: int
    dropped: int
    skipped: int
    tokenizer_fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = place(index, len(self))
        start = self.rows[index - 1, 0] if index else 0
        marked = torch.tensor(self.ids[start : self.rows[index, 0]], dtype=torch.int64)
        silent = marked < 0
        ids = torch.where(silent, ~marked, marked)
        return {"input_ids": ids, "labels": marked.masked_fill_(silent, IGNORED)}

    def survey(self, size: int, vocab_size: int | None, context: int | None) -> Survey | None:
        """By whole arrays, with the fingerprint that the examples have one by one (`Surveyed`)."""
        if (blocks := self.blocks(size)) is None:
            return None
        digest = Digest()

        def add(block: Block) -> None:
            assert block.labels is not None
            digest.add_rows((block.ids, block.labels), block.ends, block.first)

        found = survey(self, blocks, size, vocab_size, context, add)
        return replace(found, fingerprint=digest.hex())

    def blocks(self, size: int) -> Iterator[Block] | None:
        """The first `size` examples, many at a time; None of a class that reads its own."""
        own = type(self).__getitem__ is Tokens.__getitem__
        return self._blocks(size) if own else None

    def _blocks(self, size: int) -> Iterator[Block]:
        ids, ends = np.asarray(self.ids), self.rows[:size, 0]
        for first, last in spans(ends):
            start = int(ends[first - 1]) if first else 0
            marked = ids[start : int(ends[last - 1])].astype(np.int64)
            silent = marked < 0
            values, labels = np.where(silent, ~marked, marked), np.where(silent, IGNORED, marked)
            yield Block(first, values, labels, ends[first:last] - start)

    def column(self, name: str) -> list[Any]:
        """What the record of every example has in a column that was kept (`read(keep=...)`).

        Raises:
            DataError: a record has no such column; names it.
        """
        return column_of(self.records, self.rows[:, 1].tolist(), name)

    def record(self, index: int) -> Mapping[str, Any]:
        """What an example was made of."""
        return self.records[int(self.rows[index, 1])]

    def source(self, index: int) -> str:
        """Where example `index` was read: file, line and, from the second on, the chunk of it."""
        record, chunk = (int(n) for n in self.rows[index, 1:])
        # Where a record came from is known without reading it again: it may be long.
        find = getattr(self.records, "source", None)
        source = find(record) if callable(find) else _source(self.records[record], record)
        return f"{source}, chunk {chunk + 1}" if chunk else source


def column_of(records: Indexable, numbers: Iterable[int], name: str) -> list[Any]:
    """What these records have in a column that was kept; DataError names one that has none."""
    found = []
    for record in numbers:
        value = records[record]
        kept = value.get("columns", value)
        if name not in kept:
            of_file = "columns" in value or callable(getattr(records, "source", None))
            raise DataError(
                f"{_source(value, record)}: "
                + (f"no column {name!r} was kept; read(path, keep=[{name!r}]) keeps it" if of_file
                   else f"has no {name!r}: give it in every record, None where there is none")
            )  # fmt: skip
        found.append(kept[name])
    return found


def tokenize(
    records: Indexable,
    tokenizer: Callable[..., Any],
    context: int,
    *,
    on_long: OnLong = "chunk",
    on_empty: Literal["refuse", "skip"] = "refuse",
    last_turn: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Tokens:
    """Records (text, prompt and completion, messages) as examples of at most `context` tokens.

    Where a record was read its `source` says; of a list without, its place.

    A prompt has labels -100. Prompt and completion are tokenised together, as the model has seen
    text; a token that reaches over the border belongs to the completion. If the tokenizer begins
    texts with a BOS token, every example begins with one; no other special token is added.
    Messages are what the tokenizer's chat template makes of them, and only what the assistant says
    has labels, with `last_turn` only in the last of its turns (`conversations.encode`).
    A longer text is cut into chunks, or its end is cut off, or it is refused; one with a prompt and
    a conversation are never chunked. Chunks of one token, which nothing predicts, are dropped; a
    record without anything to predict is refused or skipped.
    `progress` is called with the number of records done. Raises DataError, naming the source.
    """
    whole("context", context)
    choice("on_long", on_long, get_args(OnLong))
    choice("on_empty", on_empty, ("refuse", "skip"))
    callback("progress", progress)
    require(callable(tokenizer), "tokenizer", tokenizer, "a tokenizer of transformers' kind")
    sized(records)
    bos = _bos(tokenizer)
    if context < len(bos) + 2:
        raise ArgumentError(f"tokenize: a context of {context} tokens is too short")
    rows, end, truncated, dropped, skipped = array("q"), 0, 0, 0, 0
    with in_tmpdir("tokens"), tempfile.TemporaryFile() as file:
        for index, (record, ids) in enumerate(_encoded(records, tokenizer, last_turn)):
            # A text may bring its BOS token along; a conversation begins as its template does.
            silent = len(ids) > 0 and ids[0] < 0
            start = _silent(bos) if silent else bos
            if bos and ids[:1] in (bos, _silent(bos)):
                start, ids = ids[:1], ids[1:]
            elif is_conversation(record):
                start = bos[:0]
            total = len(start) + len(ids)
            if total > context and on_long == "refuse":
                raise DataError(f"{record['source']}: {total} tokens, but the context is {context}")
            chunked = on_long == "chunk" and not (silent or is_conversation(record))
            pieces = [x for x in _cut(start, ids, context, chunked) if max(x[1:], default=-1) >= 0]
            if pieces:
                kept = sum(len(piece) - len(start) for piece in pieces)
                dropped += len(ids) - kept
                truncated += kept < len(ids)
            elif on_empty == "skip":
                skipped += 1
            else:
                raise DataError(_nothing(record, ids, context))
            for chunk, piece in enumerate(pieces):
                file.write(memoryview(piece))
                end += len(piece)
                rows.extend((end, index, chunk))
            if progress:
                progress(index + 1)
        if not rows:
            raise DataError(f"nothing to predict in {len(records)} records")
        file.flush()
        mapped = np.memmap(file, dtype=np.int32, mode="r")
    table = np.frombuffer(rows, dtype=np.int64).reshape(-1, 3)
    told_by = tokenizer_fingerprint(tokenizer)
    return Tokens(records, mapped, table, truncated, dropped, skipped, told_by)


def _bos(tokenizer: Callable[..., Any]) -> array:
    """The token that the tokenizer puts before a text, or none."""
    try:
        first = list(tokenizer("")["input_ids"][:1])
    except Exception as error:  # whatever was given
        raise ArgumentError(
            f"tokenizer is {shown(tokenizer)}, which makes no 'input_ids' of a text ({error!r})"
        ) from error
    return array("i", (i for i in first if i == getattr(tokenizer, "bos_token_id", None)))


def _together(records: Indexable) -> Iterator[list[dict[str, Any]]]:
    """Records, checked, as many as are tokenised at once."""
    group, size = [], 0
    for index in range(len(records)):
        value = records[index]
        group.append(Columns().record(value, _source(value, index)))
        size += sum(len(x) for x in group[-1].values() if isinstance(x, str))
        if len(group) == TOKENIZED_AT_ONCE or size > PIECE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encoded(
    records: Indexable, tokenizer: Callable[..., Any], last_turn: bool
) -> Iterator[tuple[dict[str, Any], array]]:
    """(record, its ids, ~id without a label); many at once, tokenizers run in parallel."""
    for batch in _together(records):
        texts = [record for record in batch if not is_conversation(record)]
        found = _texts(texts, tokenizer) if texts else iter(())
        for record in batch:
            talk = is_conversation(record)
            yield record, encode(tokenizer, record, last_turn) if talk else next(found)


def _texts(batch: list[dict[str, str]], tokenizer: Callable[..., Any]) -> Iterator[array]:
    """Ids of texts, and of completions after their prompts.

    A prompt and its completion are one text to the tokenizer. A token that holds characters of
    both counts as the completion's: it is measured.
    """
    fast = getattr(tokenizer, "is_fast", False)
    prompts = [record.get("prompt", "") for record in batch]
    texts = [record.get("text", p + record.get("completion", "")) for p, record in
             zip(prompts, batch, strict=True)]  # fmt: skip
    asked = any(prompts)
    found = encoded(tokenizer, texts, ends=asked and fast)
    if not asked:
        borders = [0] * len(batch)
    elif fast:
        borders = [
            sum(end <= len(p) for end in x.ends) for x, p in zip(found, prompts, strict=True)
        ]
    else:
        alone = encoded(tokenizer, prompts)
        borders = [_common(p.ids, x.ids) for p, x in zip(alone, found, strict=True)]
    for record, prompt, one, border in zip(batch, prompts, found, borders, strict=True):
        if prompt and not border and fast:
            # One token holds all of the prompt: nothing would be left to predict it from.
            yield _silent(encoded(tokenizer, [prompt])[0].ids) + _continued(record, tokenizer)
        else:
            yield _silent(one.ids[:border]) + one.ids[border:]


def _silent(ids: array) -> array:
    """Ids without labels."""
    return array("i", (~i for i in ids))


def _continued(record: dict[str, str], tokenizer: Callable[..., Any]) -> array:
    """A completion's tokens as of a text that goes on: after a line end, which joins nothing."""
    (found,) = encoded(tokenizer, ["\n" + record["completion"]], ends=True)
    return array("i", (i for i, end in zip(found.ids, found.ends, strict=True) if end > 1))


def _common(one: array, other: array) -> int:
    """How many tokens two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _source(record: Any, index: int) -> str:
    """Where a record was read, as it says itself."""
    source = record.get("source") if isinstance(record, Mapping) else None
    return f"record {index}" if source is None else str(source)


def _cut(bos: array, ids: array, context: int, chunk: bool) -> list[array]:
    """bos + ids, at most `context` tokens of it, or all in chunks of at most that."""
    step = context - len(bos)
    stop = len(ids) if chunk else min(len(ids), step)
    return [bos + ids[i : min(i + step, stop)] for i in range(0, stop, step)]


def _nothing(record: dict[str, Any], ids: array, context: int) -> str:
    """Why a record has nothing to predict."""
    if is_conversation(record):
        return (
            f"{record['source']}: nothing to predict: the assistant says nothing in the first "
            f"{context} tokens of {len(ids)}"
        )
    silent = sum(i < 0 for i in ids)
    name = "completion" if "prompt" in record else "text"
    told = f"its {name} has {len(ids) - silent} tokens"
    before = f" after {silent} of its prompt, the context is {context}" if silent else ""
    return f"{record['source']}: nothing to predict: {told}{before}"
