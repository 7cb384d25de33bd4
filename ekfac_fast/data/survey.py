"""All examples of a data set looked at by whole arrays, as `examples.example` looks at one."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .examples import IGNORED, Indexable, Survey, example

# Tokens that are looked at together: what is made of them stays in a CPU's cache.
BLOCK = 1 << 18


@dataclass(frozen=True, eq=False)
class Block:
    """Examples that follow each other: `first` is the number of the first.

    ids     [tokens] integers; labels [tokens], None where they are the ids
    ends    [examples] int64: where in them every example ends
    """

    first: int
    ids: NDArray
    labels: NDArray | None
    ends: NDArray[np.int64]

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where every example begins."""
        return np.concatenate([[0], self.ends[:-1]])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every example."""
        return np.diff(self.ends, prepend=0)

    def cut(self, kept: NDArray[np.int64]) -> "Block":
        """The first `kept` tokens of every example."""
        if (kept == self.lengths).all():
            return self
        ends = np.cumsum(kept)
        places = np.arange(ends[-1]) + np.repeat(self.starts - (ends - kept), kept)
        labels = None if self.labels is None else self.labels[places]
        return Block(self.first, self.ids[places], labels, ends)


def spans(ends: NDArray, start: int = 0) -> Iterator[tuple[int, int]]:
    """Examples (from, to) whose tokens make a block, or one of more.

    ends: where every example ends, `start` where the first begins.
    """
    first = 0
    while first < len(ends):
        last = int(ends.searchsorted(start + BLOCK, side="right"))
        last = min(max(last, first + 1), len(ends))
        yield first, last
        start, first = int(ends[last - 1]), last


def checked(
    dataset: Indexable, blocks: Iterable[Block], vocab_size: int | None, context: int | None
) -> Iterator[tuple[Block, Block]]:
    """Every block of a data set, whole and as `context` cuts its examples, checked as `example`
    does: DataError for the first example that is wrong.
    """
    for block in blocks:
        kept = block.lengths if context is None else np.minimum(block.lengths, context)
        cut = block.cut(kept)
        for bad in _wrong(cut, vocab_size):
            example(dataset, block.first + bad, vocab_size, context)
        yield block, cut


def survey(
    dataset: Indexable,
    blocks: Iterable[Block],
    size: int,
    vocab_size: int | None,
    context: int | None,
    add: Callable[[Block], None],
) -> Survey:
    """`checked`, and what `Survey` tells of `size` examples; the fingerprint is left empty.

    add: called with every block, uncut.
    """
    lengths = np.empty(size, dtype=np.int64)
    truncated = without = 0
    longest: int | None = None
    for block, cut in checked(dataset, blocks, vocab_size, context):
        lengths[block.first : block.first + len(cut.ends)] = cut.lengths
        over = cut.lengths < block.lengths
        if longest is None and over.any():
            longest = block.first + int(over.argmax())
        truncated += int(over.sum())
        without += int((_targets(cut) == 0).sum())
        add(block)
    return Survey(lengths, "", truncated, longest, without)


def _wrong(block: Block, vocab_size: int | None) -> Iterator[int]:
    """Which examples of a block `example` refuses."""
    bad = block.lengths == 0
    for values in (block.ids, block.labels):
        if values is None or not len(values):
            continue
        if values.min() >= 0 and (not vocab_size or values.max() < vocab_size):
            continue
        outside = values < 0
        if values is block.labels:
            outside &= values != IGNORED
        if vocab_size:
            outside |= values >= vocab_size
        bad[block.ends.searchsorted(np.flatnonzero(outside), side="right")] = True
    yield from np.flatnonzero(bad).tolist()


def _targets(block: Block) -> NDArray[np.int64]:
    """Positions of every example that have a loss: all but the first, where labels say so."""
    if block.labels is None:
        return block.lengths - 1
    counted = np.concatenate([[0], np.cumsum(block.labels != IGNORED)])
    return counted[block.ends] - counted[block.starts + 1]
