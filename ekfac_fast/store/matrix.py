"""A [Q,N] matrix in a .npy file that is written by batches of columns, in any order."""

import errno
import io
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, float64

from ..errors import StoreError
from .files import missing, replacing, writing

MARK = re.compile(rb"(\d+)(?: ([0-9a-f]{8}))?\n")


class Matrix:
    """A [Q,N] matrix in a .npy file, memory-mapped, NaN where nothing was written.

    `values` is the map (numpy.memmap, any numpy reads the file), `done` the batches written, each
    with the CRC-32 of its block. The file is in Fortran order: the columns of a batch are
    scattered over N (batches are made by length), and so each costs one page of disk traffic, not
    Q of them.

    Raises:
        StoreError: the file has another shape or dtype, is truncated, or no room is left.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int] | None,
        dtype: Any,
        *,
        writable: bool,
        checked: bool,
    ) -> None:
        self.path, self.journal, self.writable = path, path.with_suffix(".done"), writable
        if writable and not path.exists() and shape is not None:
            self._create(shape, np.dtype(dtype))
        self.values = self._map()
        holds = f"{list(self.values.shape)} {self.values.dtype}"
        if shape is not None and holds != (asked := f"{list(shape)} {np.dtype(dtype)}"):
            raise StoreError(
                f"{path} holds {holds}, not {asked}. Choose another folder or delete this file"
            )
        self.pending: dict[int, int] = {}
        self.done = self._read_journal()
        if checked and None in self.done.values():
            raise StoreError(
                f"{self.journal}: a batch is marked without a checksum: not by us. Delete it, and "
                f"{self.path.name}, to start the matrix again"
            )

    def _map(self) -> np.memmap:
        try:
            # First to read: opened to write, numpy makes a file that was cut off whole, with zeros.
            found = np.load(self.path, mmap_mode="r")
            if self.path.stat().st_size != found.offset + found.nbytes:
                raise ValueError("its size is not that of its shape")
            if not found.dtype.isnative:
                raise ValueError(f"its numbers, {found.dtype.str}, are not in this byte order")
            with self.path.open("rb") as file:
                if file.read(found.offset) != _header(found.shape, found.dtype):
                    raise ValueError("its header is not as it was written")
            return np.load(self.path, mmap_mode="r+") if self.writable else found
        except FileNotFoundError:
            raise missing(self.path) from None
        except (OSError, MemoryError) as error:
            raise StoreError(f"{self.path}: cannot be read now ({error})") from error
        except Exception as error:  # numpy's parser of headers raises what it meets
            raise StoreError(
                f"{self.path}: not a complete .npy file ({error}). Delete it, and "
                f"{self.journal.name}, to start it again"
            ) from error

    def _create(self, shape: tuple[int, int], dtype: np.dtype) -> None:
        self.journal.unlink(missing_ok=True)  # it would speak of a matrix that is gone
        count = shape[0] * shape[1]
        block = np.full(min(count, 1 << 20), np.nan, dtype)
        # written out in full, never sparse: a full disk is an error here, not a SIGBUS in the map
        with replacing(self.path, count * dtype.itemsize) as partial, partial.open("wb") as file:
            file.write(_header(shape, dtype))
            for start in range(0, count, len(block) or 1):
                file.write(block[: count - start].data)

    def _read_journal(self) -> dict[int, int | None]:
        """The marked batches and their CRCs; a line that a kill has torn is cut off."""
        if not self.journal.exists():
            return {}
        data = self.journal.read_bytes()
        marks, whole = {}, 0
        while match := MARK.match(data, whole):
            marks[int(match[1])] = None if match[2] is None else int(match[2], 16)
            whole = match.end()
        if b"\n" in data[whole:]:
            raise StoreError(
                f"{self.journal}: damaged at byte {whole}. Delete it, and {self.path.name}, to "
                "start the matrix again"
            )
        if self.writable and whole < len(data):
            os.truncate(self.journal, whole)
        return marks

    def marked(self) -> set[int]:
        """The batches that the file of marks names now."""
        return {*self._read_journal()}

    def write(self, batch: int, columns: Sequence[int], values: Tensor | np.ndarray) -> None:
        """values [Q,B] into the columns of a batch; it is marked done at the next commit."""
        if not self.writable:
            raise StoreError(f"{self.path} was opened to read")
        if isinstance(values, Tensor):
            values = values.detach().to("cpu", float64).numpy()
        if values.shape != (len(self.values), len(columns)):  # numpy would broadcast
            raise ValueError(
                f"{self.path}: values {list(values.shape)} for {len(columns)} columns of "
                f"{len(self.values)} rows"
            )
        self.values[:, np.asarray(columns, dtype=np.int64)] = values
        self.pending[batch] = self._crc(columns)

    def _crc(self, columns: Sequence[int]) -> int:
        block = self.values[:, np.asarray(columns, dtype=np.int64)]
        return zlib.crc32(np.ascontiguousarray(block.T).data)

    def verify(self, batches: Sequence[Sequence[int]]) -> None:
        """Compare every batch that is done with its CRC.

        Raises:
            StoreError: one differs, or is none of `batches`.
        """
        for number, crc in self.done.items():
            if number >= len(batches):
                raise StoreError(f"{self.journal}: batch {number} of {len(batches)} does not exist")
            if crc is not None and crc != self._crc(batches[number]):
                raise StoreError(
                    f"{self.path}: the scores of batch {number} are not those that were written: "
                    f"the file is damaged. Delete it, and {self.journal.name}, and score again"
                )

    def commit(self) -> None:
        """Make every write so far durable: first the values, then, appended, their marks."""
        if not self.pending:
            return
        marks = "".join(f"{batch} {crc:08x}\n" for batch, crc in self.pending.items()).encode()
        with writing(self.journal, len(marks)):
            self.values.flush()
            with self.journal.open("ab", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if file.write(marks) < len(marks):
                    os.ftruncate(file.fileno(), size)
                    raise OSError(errno.ENOSPC, "no room for the marks of what is done")
                os.fsync(file.fileno())
        self.done |= self.pending
        self.pending = {}

    def close(self) -> None:
        """Commit; from now on the matrix is read only."""
        if self.writable:
            self.commit()
        self.writable = False


def _header(shape: Sequence[int], dtype: np.dtype) -> bytes:
    """What a .npy file begins with."""
    told = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": True,
        "shape": tuple(shape),
    }
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, told)
    return header.getvalue()
