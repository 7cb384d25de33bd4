"""One result folder: a manifest, the batch plan, shards, a matrix, states; atomic and resumable.

With `files` the only code that writes results. A run killed at any moment is continued by opening
its folder again. POSIX only (flock, folder sync).
"""

import fcntl
import json
import os
import re
import shutil
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .files import (
    PARTIAL,
    StoreError,
    brief,
    differences,
    fingerprint,
    load_json,
    load_metadata,
    load_tensors,
    missing,
    replacing,
    save_json,
    save_tensors,
    writing,
)

__all__ = [
    "Matrix",
    "Pace",
    "Store",
    "StoreError",
    "fingerprint",
    "load_json",
    "load_metadata",
    "load_tensors",
    "save_json",
    "save_tensors",
]

FORMAT = 1
MANIFEST = "manifest.json"
LOCK = ".lock"


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


class Matrix:
    """A [Q,N] matrix in a .npy file, memory-mapped, NaN where nothing was written.

    `values` is the map (numpy.memmap, any numpy reads the file), `done` the batches written. The
    file is in Fortran order: the columns of a batch are scattered over N (batches are made by
    length), and so each costs one page of disk traffic, not Q of them.
    Raises StoreError if the file has another shape or dtype, is truncated, or no room is left.
    """

    def __init__(
        self, path: Path, shape: tuple[int, int] | None, dtype: Any, pace: Pace | None
    ) -> None:
        self.path, self.journal, self._pace = path, path.with_suffix(".done"), pace
        if pace and not path.exists() and shape is not None:
            self._create(shape, np.dtype(dtype))
        try:
            self.values: np.memmap = np.load(path, mmap_mode="r+" if pace else "r")
        except FileNotFoundError:
            raise missing(path) from None
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(
                f"{path}: not a complete .npy file ({error}). Delete it to start it again"
            ) from error
        holds = f"{list(self.values.shape)} {self.values.dtype}"
        if shape is not None and holds != (asked := f"{list(shape)} {np.dtype(dtype)}"):
            raise StoreError(
                f"{path} holds {holds}, not {asked}. Choose another folder or delete this file"
            )
        self._pending: list[int] = []
        self.done = self._read_journal()

    def _create(self, shape: tuple[int, int], dtype: np.dtype) -> None:
        self.journal.unlink(missing_ok=True)  # it would speak of a matrix that is gone
        count = shape[0] * shape[1]
        block = np.full(min(count, 1 << 20), np.nan, dtype)
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": True,
            "shape": tuple(shape),
        }
        # written out in full, never sparse: a full disk is an error here, not a SIGBUS in the map
        with replacing(self.path, count * dtype.itemsize) as partial, partial.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, count, len(block) or 1):
                file.write(block[: count - start].data)

    def _read_journal(self) -> set[int]:
        """The marked batches; a line that a kill has torn is cut off, its batch is not done."""
        if not self.journal.exists():
            return set()
        data = self.journal.read_bytes()
        whole = re.match(rb"(?:\d+\n)*", data).end()
        if self._pace and whole < len(data):
            os.truncate(self.journal, whole)
        return {int(line) for line in data[:whole].split()}

    def write(self, batch: int, columns: Sequence[int], values: Tensor | np.ndarray) -> None:
        """values [Q,B] into the columns of a batch; it is marked done at the next commit."""
        if not self._pace:
            raise StoreError(f"{self.path} was opened to read")
        if isinstance(values, Tensor):
            values = values.detach().to("cpu", torch.float64).numpy()
        if values.shape != (len(self.values), len(columns)):  # numpy would broadcast
            raise ValueError(
                f"{self.path}: values {list(values.shape)} for {len(columns)} columns of "
                f"{len(self.values)} rows"
            )
        self.values[:, np.asarray(columns, dtype=np.int64)] = values
        self._pending.append(batch)
        if self._pace.due:
            self.commit()

    def commit(self) -> None:
        """Make every write so far durable: first the values, then, appended, their marks."""
        if not self._pending:
            return
        marks = "".join(f"{batch}\n" for batch in self._pending).encode()
        with self._pace.measured(), writing(self.journal, len(marks)):
            self.values.flush()
            with self.journal.open("ab", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if file.write(marks) < len(marks):
                    os.truncate(self.journal, size)
                    raise OSError("no space left for the whole record")
                os.fsync(file.fileno())
        self.done.update(self._pending)
        self._pending = []

    def close(self) -> None:
        """Commit; from now on the matrix is read only."""
        self.commit()
        self._pace = None


class Store:
    """One result folder: `manifest.json`, the batch plan, shards, a matrix, states.

    `with Store.open(...) as store:` holds the folder for this process alone until the block ends.
    Three kinds of progress, each whole by itself: shards (`write`, `done`), the columns of a
    `matrix` (its own `done`), and a `save_state` that replaces the one before.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], pace: Pace | None) -> None:
        self.folder, self._manifest, self._pace = folder, manifest, pace
        self._matrices: dict[str, Matrix] = {}
        self._release: Callable[[], Any] | None = None
        found = (re.fullmatch(r"shard_(\d{6,})\.safetensors", p.name) for p in folder.iterdir())
        self.done = {int(match[1]) for match in found if match}

    @classmethod
    def open(
        cls, folder: str | Path, *, kind: str, facts: Mapping[str, Any], seconds: float = 1.0
    ) -> "Store":
        """Start a folder, or continue one of the same kind and facts (JSON values).

        At most about `seconds` of finished batches are lost in a kill. Raises StoreError naming
        each fact that differs, a folder that is not ours, or one that another run writes to.
        """
        folder = Path(folder)
        new = json.loads(json.dumps(facts, allow_nan=False))  # tuples become lists, as on disk
        with writing(folder / MANIFEST, 4096):
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it on any death
        except BlockingIOError:
            os.close(lock)
            raise StoreError(
                f"{folder}: another run is writing here. Wait for it, end it, or choose another "
                "folder"
            ) from None
        try:
            for partial in folder.rglob(f"{PARTIAL}*"):
                shutil.rmtree(partial, ignore_errors=True)
            store = cls(folder, _begin(folder, kind, new), Pace(seconds))
        except BaseException:
            os.close(lock)
            raise
        store._release = weakref.finalize(store, os.close, lock)
        return store

    @classmethod
    def load(cls, folder: str | Path, *, kind: str | None = None) -> "Store":
        """Open an existing folder to read, finished or not, even while a run writes to it."""
        return cls(Path(folder), _manifest(Path(folder), kind), None)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Commit the matrices and let the folder go."""
        try:
            for matrix in self._matrices.values():
                matrix.close()
        finally:
            if self._release:
                self._release()
            self._pace = None

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
        """Whether it is time for the next `save_state`."""
        return self._writer.due

    @property
    def _writer(self) -> Pace:
        if self._pace is None:
            raise StoreError(f"{self.folder} is open to read, or closed: Store.open it to write")
        return self._pace

    def update(self, **state: Any) -> None:
        """Store small JSON values in the manifest."""
        self._save_manifest(state=self.state | state)

    def finish(self, **state: Any) -> None:
        """Commit everything, store the last values and mark the folder finished."""
        for matrix in self._matrices.values():
            matrix.commit()
        self._save_manifest(state=self.state | state, finished=_now())

    def _save_manifest(self, **changes: Any) -> None:
        _ = self._writer
        manifest = self._manifest | changes
        save_json(self.folder / MANIFEST, manifest)
        self._manifest = manifest

    def plan(self, make: Callable[[], list[list[int]]]) -> list[list[int]]:
        """The batch plan of the folder; made and stored the first time, so a rerun keeps it."""
        path = self.folder / "plan.safetensors"
        if self._pace and not path.exists():
            batches = make()
            indices = torch.tensor([i for batch in batches for i in batch], dtype=torch.int64)
            sizes = torch.tensor([len(batch) for batch in batches], dtype=torch.int64)
            save_tensors(path, {"indices": indices, "sizes": sizes})
        stored = load_tensors(path)
        return [b.tolist() for b in stored["indices"].split(stored["sizes"].tolist())]

    def _shard(self, index: int) -> Path:
        return self.folder / f"shard_{index:06d}.safetensors"

    def write(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write shard `index`; from now on it is in `done`."""
        _ = self._writer
        save_tensors(self._shard(index), tensors)
        self.done.add(index)

    def read(self, index: int) -> dict[str, Tensor]:
        """The tensors of shard `index`."""
        return load_tensors(self._shard(index))

    def matrix(
        self, shape: tuple[int, int] | None = None, dtype: Any = np.float32, name: str = "scores"
    ) -> Matrix:
        """The [Q,N] matrix `name`.npy; created if a shape is given and it is not there."""
        if name not in self._matrices:
            path = self.folder / f"{name}.npy"
            self._matrices[name] = Matrix(
                path, shape, dtype, self._pace and Pace(self._pace.seconds)
            )
        return self._matrices[name]

    def save_state(self, batches: int, tensors: Mapping[str, Tensor], name: str = "state") -> None:
        """Replace the state after `batches` batches: one file holds both, or the old one stays.

        A tensor of the name `batches` is the count itself.
        """
        with self._writer.measured():
            path = self.folder / f"{name}.safetensors"
            save_tensors(path, {**tensors, "batches": torch.tensor(batches)})

    def load_state(self, name: str = "state") -> tuple[int, dict[str, Tensor]] | None:
        """(batches done, tensors) of the last `save_state`; None before the first."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        tensors = load_tensors(path)
        return int(tensors.pop("batches")), tensors


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _manifest(folder: Path, kind: str | None) -> dict[str, Any]:
    """Read and check a manifest; raises StoreError."""
    if not (folder / MANIFEST).exists():
        raise StoreError(f"{folder}: no {MANIFEST} there, so no result of ours. Check the path")
    manifest = load_json(folder / MANIFEST)
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise StoreError(
            f"{folder} has format {version}, this version of ekfac_fast reads {FORMAT}: "
            "use the version that wrote it, or choose another folder"
        )
    if kind not in (None, manifest["kind"]):
        raise StoreError(f"{folder} holds {manifest['kind']!r}, not {kind!r}. Check the path")
    return manifest


def _begin(folder: Path, kind: str, facts: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a locked folder: checked against the facts, or new."""
    if (folder / MANIFEST).exists():
        manifest = _manifest(folder, None)
        stored = {"kind": manifest["kind"], **manifest["facts"]}
        if lines := list(differences(stored, {"kind": kind, **facts})):
            raise StoreError(
                f"{folder} holds the results of another run:\n"
                + "\n".join(lines)
                + "\nChoose another folder or delete this one"
            )
        return manifest
    foreign = [p.name for p in folder.iterdir() if p.name != LOCK]
    if foreign:
        raise StoreError(
            f"{folder} holds files ({brief(sorted(foreign))}) but no {MANIFEST}: it is not a "
            "result of ours. Choose an empty or a new folder"
        )
    manifest = {
        "kind": kind,
        "format": FORMAT,
        "created": _now(),
        "versions": {
            "ekfac_fast": sys.modules[__package__].__version__,
            "torch": torch.__version__,
        },
        "facts": facts,
        "state": {},
        "finished": None,
    }
    save_json(folder / MANIFEST, manifest)
    return manifest
