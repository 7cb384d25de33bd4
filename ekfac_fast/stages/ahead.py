"""Batches that are read before their turn, so that no device waits for a data set."""

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from ..data.batches import Batches
from ..data.collate import moved


class Ahead:
    """The batches of these examples, one after the other.

    `read` is called when the device has been given all of a batch's work: the next batch is then
    put together while it computes.
    """

    def __init__(self, batches: Batches, order: Iterable[Sequence[int]]) -> None:
        self._device = batches.device
        self._unread, self._read = map(batches.gathered, order), deque[Any]()

    def read(self) -> None:
        """One more, if there is one."""
        self._read.extend(islice(self._unread, 1))

    def take(self) -> Any:
        """The next, on the model's device."""
        if not self._read:
            self.read()
        return moved(self._read.popleft(), self._device)
