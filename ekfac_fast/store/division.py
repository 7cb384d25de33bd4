"""Which examples form a batch, of how many examples whatever: two arrays."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Division(Sequence[list[int]]):
    """Batches as a sequence of lists of indices, each made when it is asked for.

    indices  [N] int64: the examples, batch after batch
    ends     [B] int64: where in `indices` every batch ends
    Equal to any sequence of the same batches.
    """

    def __init__(self, indices: ArrayLike, sizes: ArrayLike) -> None:
        self.indices: NDArray[np.int64] = np.asarray(indices, dtype=np.int64)
        self.ends: NDArray[np.int64] = np.cumsum(sizes, dtype=np.int64)

    @classmethod
    def of(cls, batches: Iterable[Sequence[int]]) -> "Division":
        """The same batches as arrays."""
        if isinstance(batches, cls):
            return batches
        every = list(batches)
        indices = np.fromiter(chain.from_iterable(every), np.int64)
        return cls(indices, np.fromiter(map(len, every), np.int64, len(every)))

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where in `indices` every batch begins: [B]."""
        return self.ends - self.sizes

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Examples of every batch: [B]."""
        return np.diff(self.ends, prepend=0)

    @property
    def places(self) -> NDArray[np.int64]:
        """Where in `indices` every example stands: [N]."""
        return self.indices.argsort(kind="stable")

    def only(self, wanted: NDArray[np.bool_]) -> "Division":
        """The same batches without the examples that are not `wanted` [examples]."""
        kept = wanted[self.indices]
        before = np.concatenate([[0], np.cumsum(kept)])
        return Division(self.indices[kept], before[self.ends] - before[self.starts])

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[n] for n in range(len(self))[number]]
        number = range(len(self))[number]
        start = self.ends[number - 1] if number else 0
        return self.indices[start : self.ends[number]].tolist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Division):
            if not isinstance(other, Sequence):
                return NotImplemented
            other = Division.of(other)
        same = (np.array_equal(a, b) for a, b in zip(vars(self).values(), vars(other).values(),
                strict=True))  # fmt: skip
        return all(same)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Division({len(self.indices)} examples in {len(self)} batches)"
