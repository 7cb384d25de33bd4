"""One result folder: a manifest, the batches, pieces, a matrix, states; atomic and resumable.

A run killed at any moment is continued by opening its folder again. POSIX only (flock, folder
sync).
"""

import fcntl
import json
import os
import re
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import Notice, StoreError
from . import manifest
from .division import Division
from .files import (
    aligned,
    load_noted,
    load_tensors,
    mark_of,
    remove_abandoned,
    save_json,
    save_tensors,
    writing,
)
from .fingerprint import fingerprint
from .matrix import Matrix

_locks: set[int] = set()


class Pace:
    """When to make progress durable: after `seconds`, and so rarely that it costs under 5 %.

    Work done since the last time is repeated after a kill, so this never changes a result.
    `seconds` = 0: after every batch.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.cost, self.since = seconds, 0.0, time.monotonic()

    @property
    def due(self) -> bool:
        """Whether enough time has passed."""
        wait = max(self.seconds, 20 * self.cost) if self.seconds else 0.0
        return time.monotonic() - self.since >= wait

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Around the work that makes progress durable."""
        start = time.monotonic()
        yield
        self.since = time.monotonic()
        self.cost = self.since - start


@dataclass(frozen=True)
class State:
    """What a fold over batches has come to: tensors, the batches in them, and small notes."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    done: frozenset[int] = frozenset()
    notes: dict[str, Any] = field(default_factory=dict)


class Pieces:
    """Numbered files of tensors in a folder, each whole by itself, written in any order."""

    def __init__(self, store: "Store", name: str) -> None:
        self._store, self._name = store, name
        pattern = re.compile(rf"{re.escape(name)}_(\d{{6,}})\.safetensors")
        found = (pattern.fullmatch(path.name) for path in store.folder.iterdir())
        self.done = {int(match[1]) for match in found if match}

    def _path(self, index: int) -> Path:
        return self._store.folder / f"{self._name}_{index:06d}.safetensors"

    def write(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write piece `index`; from now on it is in `done`."""
        self._store.check_writable()
        save_tensors(self._path(index), tensors)
        self.done.add(index)

    def read(self, index: int) -> dict[str, Tensor]:
        """The tensors of piece `index`."""
        return load_tensors(self._path(index), ours=self._store.checked)

    def remove(self) -> None:
        """Delete all pieces: what they were for is kept elsewhere."""
        self._store.check_writable()
        for index in self.done:
            self._path(index).unlink(missing_ok=True)
        self.done.clear()


class Store:
    """One result folder: `manifest.json`, the batches, pieces, a matrix, states.

    `with Store.open(...) as store:` holds the folder for this process alone until the block ends.
    Three kinds of progress, each whole by itself: `pieces`, the columns of a `matrix` (its own
    `done`), and a `save_state` that replaces the one before.

    Where several processes share a run, process 0 opens the folder as one would alone, and then
    each other one as its own number: it has states of its own and writes pieces, but neither
    matrices nor the manifest.
    """

    def __init__(
        self,
        folder: Path,
        told: dict[str, Any],
        pace: Pace | None,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.folder, self._manifest, self._pace = folder, told, pace
        self.process, self._processes = process, processes
        self._matrix: Matrix | None = None
        self._release: Callable[[], Any] | None = None
        self._held = ExitStack()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        kind: str,
        facts: Mapping[str, Any],
        seconds: float = 1.0,
        process: int = 0,
        processes: int = 1,
    ) -> "Store":
        """Start a folder, or continue one of the same kind and facts (JSON values).

        At most about `seconds` of finished batches are lost in a kill. Raises StoreError naming
        each fact that differs, a folder that is not ours, or one that another run writes to.
        """
        folder = Path(folder)
        new = json.loads(json.dumps(facts, allow_nan=False))  # tuples become lists, as on disk
        with writing(folder / manifest.MANIFEST, 4096):
            folder.mkdir(parents=True, exist_ok=True)
            own = folder / _of(manifest.LOCK, process)
            lock = os.open(own, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it on any death
        except OSError as error:
            os.close(lock)
            raise StoreError(
                f"{folder}: another run is writing here. Wait for it, end it, or choose another "
                "folder"
                if isinstance(error, BlockingIOError)
                else f"{folder}: cannot be locked ({error}); choose a folder on another file system"
            ) from None
        _locks.add(lock)
        try:
            if process == 0:
                remove_abandoned(folder)
                told = manifest.begin(folder, kind, new, processes)
            else:
                told = manifest.read(folder, kind)
            store = cls(folder, told, Pace(seconds), process, processes)
        except BaseException:
            _unlock(lock)
            raise
        store._release = weakref.finalize(store, _unlock, lock)
        return store

    @classmethod
    def load(cls, folder: str | Path, *, kind: str | None = None) -> "Store":
        """Open an existing folder to read, finished or not, even while a run writes to it."""
        return cls(Path(folder), manifest.read(Path(folder), kind), None)

    def __enter__(self) -> "Store":
        if not self.finished:
            self._held.enter_context(self.threads())
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()
        self.close()

    @contextmanager
    def threads(self) -> Iterator[None]:
        """Torch on as many threads as the folder was begun on; a Notice where it had others.

        PyTorch's and the libraries' sums round otherwise under another number of threads: a run
        that was killed ends as one that nobody disturbed. On another number of processes it could
        not.
        """
        now = torch.get_num_threads()
        alike = self.state.get("processes", 1) == self._processes
        began = self.state.get("threads", now) if alike else now
        if began != now:
            warnings.warn(
                f"{self.folder} was begun on {began} threads and is continued on as many, not on "
                f"{now}: another number would round otherwise. Choose a new folder to use them",
                Notice,
                stacklevel=4,
            )
            torch.set_num_threads(began)
        try:
            yield
        finally:
            torch.set_num_threads(now)

    def close(self) -> None:
        """Commit the matrix and let the folder go."""
        try:
            if self._matrix is not None:
                self._matrix.close()
        finally:
            if self._release:
                self._release()
            self._pace = None

    @property
    def checked(self) -> bool:
        """Whether every file of the folder has a checksum: older versions wrote none."""
        return self._manifest["format"] == manifest.FORMAT

    @property
    def facts(self) -> dict[str, Any]:
        """What the folder was made from."""
        return self._manifest["facts"]

    @property
    def state(self) -> dict[str, Any]:
        """What `update` and `finish` have stored."""
        return self._manifest["state"]

    @property
    def finished(self) -> bool:
        """Whether `finish` was called."""
        return self._manifest["finished"] is not None

    @property
    def due(self) -> bool:
        """Whether it is time to make progress durable."""
        return self.check_writable().due

    def check_writable(self) -> Pace:
        """StoreError in a folder that is open to read."""
        if self._pace is None:
            raise StoreError(f"{self.folder} is open to read, or closed: Store.open it to write")
        return self._pace

    def update(self, **state: Any) -> None:
        """Store small JSON values in the manifest."""
        self._save_manifest(state=self.state | state)

    def finish(self, results: Sequence[str] = (), **state: Any) -> None:
        """Commit everything, store the last values and mark the folder finished; the manifest notes
        which its `results` are, files by name.
        """
        self.commit()
        if results and self.process == 0:
            state["files"] = {name: mark_of(self.folder / name) for name in results}
        self._save_manifest(state=self.state | state, finished=manifest.now())

    def _save_manifest(self, **changes: Any) -> None:
        self.check_writable()
        told = self._manifest | changes
        if self.process == 0:
            save_json(self.folder / manifest.MANIFEST, told)
        self._manifest = told

    def batches(self, divide: Callable[[], Sequence[Sequence[int]]] | None = None) -> Division:
        """The batches of the folder; divided and stored the first time, so a rerun keeps them.

        Raises:
            StoreError: an index stands in two batches.
        """
        path = self.folder / "plan.safetensors"
        if self._pace and divide and not path.exists():
            plan = Division.of(divide())
            told = {"indices": plan.indices, "sizes": plan.sizes}
            save_tensors(path, {name: torch.from_numpy(x) for name, x in told.items()})
        stored = {x: t.numpy() for x, t in load_tensors(path, ours=self.checked).items()}
        indices, sizes = stored["indices"], stored["sizes"]
        twice = (np.diff(np.sort(indices)) == 0).any()
        if twice or len(indices) != sizes.sum() or (sizes < 0).any():
            raise StoreError(f"{path}: an example stands in two batches, or in none: damaged")
        return Division(indices, sizes)

    def pieces(self, name: str = "shard") -> Pieces:
        """The numbered files of that name."""
        return Pieces(self, name)

    def matrix(self, shape: tuple[int, int] | None = None, dtype: Any = np.float32) -> Matrix:
        """The [Q,N] matrix scores.npy; created if a shape is given and it is not there."""
        if self._matrix is None:
            path, writable = self.folder / "scores.npy", self._pace is not None
            self._matrix = Matrix(path, shape, dtype, writable=writable, checked=self.checked)
        return self._matrix

    def commit(self, **state: Any) -> None:
        """Make what was written to the matrix durable, then, if any, small JSON values."""
        with self.check_writable().measured():
            if self._matrix is not None:
                self._matrix.commit()
            if state:
                self.update(**state)

    def save_state(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        done: Collection[int],
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Replace a state: one file holds tensors, batches and notes, or the old one stays."""
        with self.check_writable().measured():
            batches = torch.tensor(sorted(done), dtype=torch.int64)
            save_tensors(
                self._state(name, self.process),
                {**{f"sum {key}": x for key, x in tensors.items()}, "done": batches},
                {"notes": json.dumps(dict(notes or {})), "of": fingerprint(self.facts)},
            )

    def load_state(self, name: str, process: int | None = None) -> State:
        """The last `save_state` of this process, or of another; empty before the first."""
        path = self._state(name, self.process if process is None else process)
        if not path.exists():
            return State()
        tensors, metadata = load_noted(path, ours=self.checked)
        if metadata.get("of") not in (None, fingerprint(self.facts)):
            raise StoreError(
                f"{path} is of another run than {manifest.MANIFEST}: put the folder's own back, or "
                "delete the folder and run again"
            )
        if "batches" in tensors:  # format 1: the first so many
            done = frozenset(range(int(tensors.pop("batches"))))
            return State(tensors, done)
        done = frozenset(tensors.pop("done").tolist())
        named = {key.removeprefix("sum "): aligned(x) for key, x in tensors.items()}
        return State(named, done, json.loads(metadata["notes"]))

    def states(self, name: str) -> list[int]:
        """The processes that have saved a state of that name, ascending."""
        pattern = re.compile(rf"{re.escape(name)}(?:-(\d+))?\.safetensors")
        found = (pattern.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1] or 0) for match in found if match)

    def remove_state(self, name: str, *, others: bool = False) -> None:
        """Delete a state that is no longer needed, whoever saved it, or only those of others."""
        self.check_writable()
        for process in self.states(name):
            if not others or process != self.process:
                self._state(name, process).unlink(missing_ok=True)

    def _state(self, name: str, process: int) -> Path:
        return self.folder / f"{_of(name, process)}.safetensors"


def _of(name: str, process: int) -> str:
    """What a process calls its own; of process 0 as of one that is alone."""
    return f"{name}-{process}" if process else name


def _unlock(lock: int) -> None:
    if lock in _locks:
        _locks.discard(lock)
        os.close(lock)


def _forget_locks() -> None:
    """In a forked child: a lock is its parent's, and ends with it."""
    for lock in list(_locks):
        _unlock(lock)


os.register_at_fork(after_in_child=_forget_locks)
