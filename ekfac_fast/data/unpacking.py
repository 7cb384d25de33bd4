"""Compressed files, unpacked beside, into nameless files."""

import gzip
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import IO

from ..errors import DataError
from ..extras import optional

COMPRESSED = (".gz", ".zst")


def is_packed(path: Path) -> bool:
    """Whether a file's ending says that it is compressed."""
    return path.suffix.lower() in COMPRESSED


def unpacked(path: Path) -> IO[bytes]:
    """A nameless file of a compressed file's content. Raises DataError."""
    target = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path) as source:
                shutil.copyfileobj(source, target, 1 << 20)
        else:
            with optional("pyarrow", "hf").input_stream(str(path), compression="zstd") as source:
                shutil.copyfileobj(source, target, 1 << 20)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a complete {path.suffix} file ({error})") from error
    target.seek(0)
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
