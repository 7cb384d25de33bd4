"""Nameless files in TMPDIR, and compressed files unpacked into them."""

import errno
import gzip
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ..errors import DataError
from ..extras import optional

COMPRESSED = (".gz", ".zst")
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def is_packed(path: Path) -> bool:
    """Whether a file's ending says that it is compressed."""
    return path.suffix.lower() in COMPRESSED


@contextmanager
def in_tmpdir(what: str) -> Iterator[None]:
    """DataError where TMPDIR has no room for what is written there meanwhile."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DataError(
            f"no room for {what} in {tempfile.gettempdir()} ({error.strerror}): name a folder that "
            "has by the variable TMPDIR"
        ) from error


def unpacked(path: Path) -> IO[bytes]:
    """A nameless file of a compressed file's content. Raises DataError."""
    with in_tmpdir(f"the content of {path}"):
        return _unpacked(path)


def _unpacked(path: Path) -> IO[bytes]:
    target = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path) as source:
                shutil.copyfileobj(source, target, 1 << 20)
        else:
            with optional("pyarrow", "hf").input_stream(str(path), compression="zstd") as source:
                shutil.copyfileobj(source, target, 1 << 20)
        target.seek(0)
    except (OSError, EOFError, zlib.error) as error:
        with suppress(OSError):
            target.close()
        if getattr(error, "errno", None) in FULL:
            raise
        raise DataError(f"{path}: not a complete {path.suffix} file ({error})") from error
    return target


def content(path: Path) -> bytes:
    """All of a file, unpacked. Raises DataError."""
    if not is_packed(path):
        return path.read_bytes()
    with unpacked(path) as file:
        return file.read()


def text_of_file(path: Path) -> str:
    """All of a file, unpacked, without its byte order mark. Raises DataError."""
    try:
        return content(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason})") from error
