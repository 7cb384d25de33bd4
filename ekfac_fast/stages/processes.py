"""The processes that share a run: those of torch.distributed's default group, or this one alone.

Every one of them calls the same stages with the same arguments, takes its part of the batches, and
gets the same results. What they exchange is little: who has done which batches, sums at the end of
a pass. The first writes what a stage comes to.
"""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ArgumentError, Error, Notice, ProcessError
from ..store.fingerprint import differences

T = TypeVar("T")
# Rows of a symmetric matrix that travel at a time, from the diagonal on.
ROWS = 512
FAILED = "ekfac_fast/failed"
# Seconds that a process waits before it says so.
PATIENCE = 60
# Meetings of this process so far: the same number in all of them.
_meetings = 0


class Processes:
    """This process, `rank` of `size`, and what it does together with the others.

    `meet`, `led`, `gathered`, `told`, `same` and `summed` wait for all processes, and raise
    `ProcessError` where one of them has failed.
    """

    def __init__(self, rank: int = 0, size: int = 1, keys: dist.Store | None = None) -> None:
        self.rank, self.size = rank, size
        # The group's own keys and counters: to ask them waits for nobody.
        self._keys = keys
        # How many take each batch together, and their group.
        self.shards, self._group = 1, None

    @classmethod
    def here(cls) -> Self:
        """All processes of the default group, where it is initialised."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        keys = dist.distributed_c10d._get_default_store()
        return cls(dist.get_rank(), dist.get_world_size(), keys)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes results."""
        return self.rank == 0

    @property
    def beside(self) -> int:
        """How many of them are on this machine, as torchrun says; else all."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part: every `size`-th; of those that take each batch together, theirs."""
        return items[self.rank // self.shards :: self.size // self.shards]

    @contextmanager
    def sharing(self, shards: int) -> Iterator[None]:
        """In a block, so many processes take each batch together: a mesh, batches by `shards`.

        Raises:
            ArgumentError: the processes cannot be divided so.
        """
        if self.size % shards:
            raise ArgumentError(
                f"query_shards is {shards}, which does not divide {self.size} processes"
            )
        if shards == 1:
            yield
            return
        ranks = [range(first, first + shards) for first in range(0, self.size, shards)]
        with self._reaching():
            groups = [dist.new_group([*some]) for some in ranks]  # all are made by everyone
        self.shards, self._group = shards, groups[self.rank // shards]
        try:
            yield
        finally:
            dist.destroy_process_group(self._group)
            self.shards, self._group = 1, None

    @property
    def shard(self) -> int:
        """Which of those that take each batch together this one is; the first keeps the results."""
        return self.rank % self.shards

    def part(self, n: int) -> slice:
        """Of n things, those of this shard: as many as of the others, or one more."""
        return slice(n * self.shard // self.shards, n * (self.shard + 1) // self.shards)

    def joined(self, x: Tensor) -> Tensor | None:
        """[n,...] of those that take a batch together, end to end, in the first; elsewhere None."""
        if self.shards == 1:
            return x
        self.check()
        found: list[Any] | None = None if self.shard else [None] * self.shards
        with self._reaching():
            dist.gather_object(x, found, dst=self.rank - self.shard, group=self._group)
        return torch.cat(found) if found else None

    def meet(self) -> None:
        """Go on when all are here."""
        if self._keys is None:
            return
        global _meetings
        _meetings += 1
        place, wait = f"ekfac_fast/meeting {_meetings}", 0.001
        came, since = self._add(place, 1), time.monotonic()
        while came < self.size:
            self.check()
            if time.monotonic() - since > PATIENCE:
                since = math.inf
                warnings.warn(
                    f"process {self.rank} has waited {PATIENCE} s: {self.size - came} of "
                    f"{self.size} are not here yet. In a process group every process makes the "
                    "same calls",
                    Notice,
                    stacklevel=2,
                )
            time.sleep(wait)
            came, wait = self._add(place, 0), min(2 * wait, 0.1)

    @contextmanager
    def led(self) -> Iterator[None]:
        """The first process goes through a block before the others."""
        if not self.first:
            self.meet()
        yield
        if self.first:
            self.meet()

    def check(self) -> None:
        """ProcessError with its message where another process has failed; waits for nobody."""
        if self._keys is None:
            return
        with self._reaching():
            said = self._keys.get(FAILED).decode() if self._keys.check([FAILED]) else None
        if said is not None:
            raise ProcessError(said)

    def counter(self, what: str) -> Callable[[int], int]:
        """Adds to a counter of all processes, which begins at 0, and says what it has come to.

        To add waits for nobody, and `check`s.
        """
        if self._keys is None:
            steps = [0]

            def alone(more: int) -> int:
                steps[0] += more
                return steps[0]

            return alone
        name = f"ekfac_fast/{_meetings} {what}"

        def counted(more: int) -> int:
            self.check()
            return self._add(name, more)

        return counted

    def _add(self, name: str, more: int) -> int:
        assert self._keys is not None
        with self._reaching():
            return self._keys.add(name, more)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """ProcessError where the others cannot be reached."""
        try:
            yield
        except RuntimeError as error:
            raise ProcessError(
                f"process {self.rank} of {self.size} can no longer reach the others ({error}): one "
                "of them has ended. Look at what it said, and start all again: they continue"
            ) from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what only all can finish: where one fails, the others do, with its message."""
        try:
            yield
        except ProcessError:
            raise
        except BaseException as error:
            if isinstance(error, RuntimeError):
                # In a sharded model's own exchange: its partner may have failed before.
                self.check()
            if self._keys is not None and not self._keys.check([FAILED]):
                kind = "" if isinstance(error, Error) else f"{type(error).__name__}: "
                self._keys.set(FAILED, f"process {self.rank} of {self.size}: {kind}{error}")
            raise

    def gathered(self, value: T) -> list[T]:
        """The value of every process, in their order."""
        if self.size == 1:
            return [value]
        self.meet()
        found: list[Any] = [None] * self.size
        with self._reaching():
            dist.all_gather_object(found, value)
        return found

    def from_first(self, value: T) -> T:
        """The first process's value."""
        found: list[Any] = self.gathered(value if self.first else None)
        return found[0]

    def same(self, facts: Mapping[str, Any], what: str) -> None:
        """ProcessError that names each fact in which a process differs from the first."""
        for rank, theirs in enumerate(every := self.gathered(dict(facts))):
            if lines := list(differences(every[0], theirs)):
                raise ProcessError(
                    f"{what}: process {rank} has another run than process 0:\n"
                    + "\n".join(x.replace(": stored ", ": process 0 ", 1) for x in lines)
                    + f"\n(now: process {rank}). Give all processes the same model, data and "
                    "arguments"
                )

    def summed(self, x: Tensor, *, symmetric: bool = False) -> Tensor:
        """The sum over processes, in the first; elsewhere nothing that means anything.

        In place. Of a symmetric matrix hardly more than one triangle travels.
        """
        if self.size == 1:
            return x
        self.meet()
        with self._reaching():
            self._reduce(x, symmetric)
        return x

    def _reduce(self, x: Tensor, symmetric: bool) -> None:
        if not symmetric:
            dist.reduce(x, 0)
            return
        for start in range(0, len(x), ROWS):
            stop = start + ROWS
            part = x[start:stop, start:].contiguous()
            dist.reduce(part, 0)
            if self.first:
                x[start:stop, start:] = part
                x[stop:, start:stop] = part[:, ROWS:].mT


ALONE = Processes()


def dealt(costs: Sequence[float], processes: int) -> list[list[int]]:
    """Jobs by their costs, in order, to processes: each goes to whoever has least yet."""
    parts: list[list[int]] = [[] for _ in range(processes)]
    loads = [0.0] * processes
    for job, cost in enumerate(costs):
        least = loads.index(min(loads))
        loads[least] += cost
        parts[least].append(job)
    return parts
