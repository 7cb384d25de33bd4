"""Token ids that stay in their files: a corpus of any size, mapped into memory.

What is known of every sequence is where it ends, 8 bytes or fewer; a sequence costs its own pages
when it is read.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ..checks import place
from ..errors import DataError
from ..store.fingerprint import Digest, fingerprint
from .examples import Survey
from .survey import Block, spans, survey


@dataclass(frozen=True, eq=False)
class Part:
    """Sequences that follow each other in one array.

    ids     [tokens] integers
    ends    [sequences] integers: where in `ids` each ends; the first begins at 0
    labels  [tokens] or None for the ids; `beside`: further values, one a token
    path    the file, where `before` sequences stand before these
    release lets pages go that were read
    """

    ids: NDArray
    ends: NDArray
    labels: NDArray | None = None
    beside: Mapping[str, NDArray] = field(default_factory=dict)
    path: Path | None = None
    before: int = 0
    release: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        where, ids, ends = f"{self.path}: " if self.path else "", self.ids, self.ends
        for name, x in (("ids", ids), ("ends", ends), ("labels", self.labels)):
            if x is not None and (not isinstance(x, np.ndarray) or x.ndim != 1
                                  or x.dtype.kind not in "iu" or not x.dtype.isnative):  # fmt: skip
                raise DataError(f"{where}{name} must be a flat array of integers, not {_kind(x)}")
        if len(ends) and (falls := np.flatnonzero(ends[1:] < ends[:-1])).size:
            at = int(falls[0]) + 1
            raise DataError(f"{where}ends[{at}] is {ends[at]}, before ends[{at - 1}]")
        stop = int(ends[-1]) if len(ends) else 0
        if stop != len(ids) or (len(ends) and ends[0] < 0):
            raise DataError(f"{where}sequences end at token {stop}, there are {len(ids)} tokens")
        for name, x in {"labels": self.labels, **self.beside}.items():
            if x is not None and len(x) != len(ids):
                raise DataError(f"{where}{len(x)} {name} for {len(ids)} tokens")

    def bounds(self, row: int) -> tuple[int, int]:
        """Where a sequence begins and ends."""
        return int(self.ends[row - 1]) if row else 0, int(self.ends[row])


class MappedTokens(Dataset):
    """A data set of the sequences of `parts`, one after the other.

    It is surveyed by whole arrays. Its fingerprint covers every stored value, whatever a model's
    positions cut off; it is not that of the same tokens in a list.
    """

    tokenizer_fingerprint: str | None = None

    def __init__(self, parts: Sequence[Part], columns: Mapping[str, Any] | None = None) -> None:
        self.parts, self.columns = parts, columns or {}
        self.starts = np.cumsum([0, *(len(part.ends) for part in parts)]).tolist()
        names = {(x.ids.dtype, getattr(x.labels, "dtype", None), *sorted(x.beside)) for x in parts}
        if len(names) > 1:
            raise DataError(f"parts of one data set differ in their columns or types: {names}")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _place(self, index: int) -> tuple[Part, int]:
        index = place(index, len(self))
        at = bisect_right(self.starts, index) - 1
        return self.parts[at], index - self.starts[at]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        part, row = self._place(index)
        start, stop = part.bounds(row)
        found = {"input_ids": part.ids, "labels": part.labels, **part.beside}
        return {
            name: torch.from_numpy(x[start:stop].astype(np.int64))
            for name, x in found.items()
            if x is not None
        }

    def source(self, index: int) -> str:
        """File and place of a sequence, from 1."""
        part, row = self._place(index)
        return f"{part.path or 'tokens in memory'}, sequence {part.before + row + 1}"

    def column(self, name: str) -> Sequence[Any]:
        """What every sequence has in a column that was kept.

        Raises:
            DataError: none of that name was.
        """
        if name not in self.columns:
            raise DataError(f"{self.source(0)}: no column {name!r} was kept")
        return self.columns[name].to_pylist()

    def record(self, index: int) -> None:
        """Nothing: it was token ids already."""
        return None

    def survey(self, size: int, vocab_size: int | None, context: int | None) -> Survey | None:
        """By whole arrays (`Surveyed`); None where there is padding, or more beside the ids."""
        if (blocks := self.blocks(size)) is None:
            return None
        ids, labels, lengths = Digest(), Digest(), Digest()

        def add(block: Block) -> None:
            ids.add_values(block.ids)
            lengths.add_values(block.lengths)
            if block.labels is not None:
                labels.add_values(block.labels)

        found = survey(self, blocks, size, vocab_size, context, add)
        first = self.parts[0]
        told = (first.ids.dtype.name, getattr(first.labels, "dtype", np.dtype("O")).name)
        name = fingerprint("tokens", *told, ids.hex(), labels.hex(), lengths.hex())
        return replace(found, fingerprint=name)

    def blocks(self, size: int) -> Iterator[Block] | None:
        """The first `size` sequences, many at a time; None where `survey` gives None."""
        own = type(self).__getitem__ is MappedTokens.__getitem__
        for part in self.parts:
            padded = not all(np.all(x) for x in part.beside.values())
            own &= not padded and part.beside.keys() <= {"attention_mask"}
        return self._blocks(size) if own else None

    def _blocks(self, size: int) -> Iterator[Block]:
        for begins, part in zip(self.starts, self.parts, strict=False):
            ends = part.ends[: max(0, size - begins)]
            for first, last in spans(ends):
                start, stop = part.bounds(first)[0], int(ends[last - 1])
                labels = None if part.labels is None else part.labels[start:stop]
                own = ends[first:last].astype(np.int64) - start
                yield Block(begins + first, part.ids[start:stop], labels, own)
                if part.release:
                    part.release()


def _kind(x: Any) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__
