"""What a scan keeps of every score: a matrix, or the best of each query; from all processes."""

from collections.abc import Collection, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from ..store.folder import Store
from .heap import Heap
from .processes import Processes
from .scores import HEAP

COLUMNS = "columns"


class WholeMatrix:
    """A matrix [Q,N], by the columns of batches.

    The first process writes it. Others leave pieces, which it takes in where a run begins and where
    it ends, whoever left them.
    """

    def __init__(
        self,
        processes: Processes,
        store: Store,
        batches: Sequence[Sequence[int]],
        shape: tuple[int, int],
        kind: str,
    ) -> None:
        self.processes, self.store, self.batches, self.queries = processes, store, batches, shape[0]
        self.seconds: float = store.state.get("scan_seconds", 0.0)
        self._matrix = store.matrix(shape, kind) if processes.first else None
        self._waiting: dict[int, Tensor] = {}
        if self._matrix is not None:
            self._matrix.verify(batches)
            self._take_in(store.pieces(COLUMNS).done)
        marked = () if self._matrix is None else tuple(self._matrix.done)
        self.done: frozenset[int] = frozenset(processes.from_first(marked))
        self._saved = set(self.done)

    def take(self, number: int, indices: Sequence[int], s: Tensor) -> None:
        """Scores [Q,B] of some of a batch; its other columns are NaN."""
        whole = self.batches[number]
        place = {index: at for at, index in enumerate(whole)}
        columns = torch.full((len(s), len(whole)), torch.nan, dtype=s.dtype)
        columns[:, [place[i] for i in indices]] = s
        self._waiting[number] = columns

    def save(self, done: Collection[int], seconds: float) -> None:
        """Make these batches durable; one without scores has nobody's candidate in it."""
        for number in sorted({*done} - self._saved - self._waiting.keys()):
            self.take(number, (), torch.empty(self.queries, 0))
        if self._matrix is not None:
            self._write(self._waiting)
            self.store.commit(scan_seconds=seconds)
        elif self._waiting:
            piece = {str(number): x for number, x in self._waiting.items()}
            self.store.pieces(COLUMNS).write(min(self._waiting), piece)
        self._saved |= self._waiting.keys()
        self._waiting = {}

    def collect(self, seconds: float) -> None:
        """What the other processes have left, into the matrix."""
        if self.processes.size == 1:
            return
        every = self.processes.gathered(tuple(self.store.pieces(COLUMNS).done))
        if self._matrix is not None:
            self._take_in({index for some in every for index in some})
            self.store.commit(scan_seconds=seconds)

    def counted(self) -> Collection[int]:
        """The batches that the folder holds, as written there; asked of the first process."""
        assert self._matrix is not None
        return self._matrix.marked()

    def _write(self, columns: Mapping[int, Tensor]) -> None:
        assert self._matrix is not None
        for number, x in columns.items():
            self._matrix.write(number, self.batches[number], x)

    def _take_in(self, indices: Collection[int]) -> None:
        """Pieces into the matrix; they go when it is durable."""
        pieces = self.store.pieces(COLUMNS)
        for index in sorted(indices):
            self._write({int(number): x for number, x in pieces.read(index).items()})
        self.store.commit()
        pieces.done = {*indices}
        pieces.remove()


class Best:
    """The best scores of every query: of each process its own, until the end."""

    def __init__(self, processes: Processes, store: Store, heap: Heap) -> None:
        self.processes, self.store, self.heap = processes, store, heap
        state = store.load_state(HEAP)
        self.seconds: float = state.notes.get("seconds", 0.0)
        first = processes.from_first(state.done)
        # What the first has taken in is no other's any more.
        mine = processes.first or not state.done <= first
        self._before = state.done if mine else frozenset()
        if mine and state.tensors:
            self.heap = Heap(**state.tensors)
        # Of processes that are gone: the first takes them in.
        left = [n for n in store.states(HEAP) if n >= processes.size] if processes.first else []
        states = [store.load_state(HEAP, n) for n in left]
        self._left = [x for x in states if not x.done <= first]
        known = self._before.union(*(x.done for x in self._left))
        self.done: frozenset[int] = frozenset().union(*processes.gathered(known))

    def take(self, number: int, indices: Sequence[int], s: Tensor) -> None:
        """Scores [Q,B] of some of a batch."""
        self.heap.push(s, torch.tensor(indices))

    def save(self, done: Collection[int], seconds: float) -> None:
        """Make the best after these batches durable."""
        self._before = self._before.union(done)
        tensors = {"values": self.heap.values, "indices": self.heap.indices}
        self.store.save_state(HEAP, tensors, self._before, {"seconds": seconds})

    def collect(self, seconds: float) -> None:
        """The best of all processes, in the first."""
        every = self.processes.gathered((self.heap.values, self.heap.indices, self._before))
        if not self.processes.first or (len(every) == 1 and not self._left):
            return
        for values, indices, _ in every[1:]:
            self.heap.merge(Heap(values, indices))
        for state in self._left:
            self.heap.merge(Heap(**state.tensors))
        done = (x for _, _, x in every[1:]), (x.done for x in self._left)
        self.save(frozenset().union(*chain(*done)), seconds)
        self.store.remove_state(HEAP, others=True)

    def counted(self) -> Collection[int]:
        """The batches that the folder holds, as written there; asked of the first process."""
        return self.store.load_state(HEAP).done
