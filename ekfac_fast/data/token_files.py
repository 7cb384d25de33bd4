"""Files of token ids as data sets: `.bin` of nanoGPT and llm.c, arrow, parquet, JSON lines."""

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..checks import choice, require, whole
from ..checks import path as argument_path
from ..errors import ArgumentError, DataError
from .arrow import arrow_tokens, mapped_table, parquet_names, parquet_tokens, saved_files
from .fields import KINDS
from .json_tokens import are_lines, first_record, json_tokens
from .mapped import MappedTokens, Part

TokenType = Literal["uint8", "uint16", "uint32"]
# Headers of llm.c: (magic, version) -> the type of the tokens that follow 1024 bytes.
HEADERS = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
HEADER = 1024
# Values by which a file of another type is told.
SAMPLED = 1 << 16


def open_tokens(
    path: str | Path,
    context: int | None = None,
    *,
    ends: NDArray | None = None,
    dtype: TokenType | None = None,
    keep: Sequence[str] = (),
) -> MappedTokens:
    """A corpus of token ids as a data set, mapped into memory.

    `.bin` (nanoGPT, llm.c): the ids are cut into sequences of `context` tokens, the last of what is
    left; or every sequence ends where `ends` says ([N], the last at the end of the file). `dtype`:
    of the ids. None: what the header says (llm.c), else uint16; a file that looks like one of
    uint32 is refused.
    A folder that `datasets` saved (`save_to_disk`), an arrow or a parquet file or one of JSON lines
    (`.jsonl`, packed or not), or a folder of parquet or of JSON lines: a row a sequence, of the
    columns `input_ids`, and where there are `labels`, `attention_mask` and `position_ids`; none may
    be longer than `context`. `keep`: further columns, for `MappedTokens.column`. Parquet and JSON
    lines are unpacked into a nameless file in TMPDIR.

    Raises:
        DataError: the file is damaged, empty or cut off, or looks like one of another type.
        ArgumentError: an argument is not for a file of that kind.
    """
    path = argument_path("path", path)
    if path.suffix.lower() == ".bin":
        require(not keep, "keep", keep, "nothing: a file of ids has no columns")
        return _flat_file(path, context, ends, dtype)
    if ends is not None or dtype is not None:
        raise ArgumentError(f"{path}: ends and dtype are of a .bin")
    files = token_files(path)
    if files is None:
        raise DataError(
            f"{path}: no tokens: a .bin, or arrow, parquet or JSON lines with 'input_ids'; text is "
            "read by read(), and tokenised by tokenize()"
        )
    of_parquet = files[0].suffix.lower() == ".parquet"
    if are_lines(files[0]):
        found = json_tokens(files, keep)
    else:
        found = (parquet_tokens if of_parquet else arrow_tokens)(files, keep)
    if context is not None:
        for begins, part in zip(found.starts, found.parts, strict=False):
            lengths = np.diff(part.ends, prepend=0)
            if (over := np.flatnonzero(lengths > context)).size:
                raise DataError(
                    f"{found.source(begins + int(over[0]))}: {lengths[over[0]]} tokens, but the "
                    f"context is {context}: rows of tokens are not cut; give a longer context"
                )
    return found


def token_files(path: Path) -> list[Path] | None:
    """The files of a corpus of token ids; None where it is no such, but text, or nothing."""
    if path.is_dir():
        files = saved_files(path)
        if files is None:
            every = sorted(x for x in path.iterdir() if not x.name.startswith("."))
            kinds = {"lines" if are_lines(x) else x.suffix.lower() for x in every}
            files = every if kinds in ({"lines"}, {".parquet"}) else []
    else:
        kind = path.suffix.lower()
        if kind == ".bin":
            return [path]
        known = kind in (".arrow", ".parquet") or are_lines(path)
        files = [path] if known and path.is_file() else []
    if not files:
        return None
    return files if "input_ids" in _columns(files[0]) else None


def are_tokens(path: Path) -> bool:
    """Whether a corpus is of token ids, and has no text beside them to be tokenised."""
    files = token_files(path)
    if files is None or files[0].suffix.lower() == ".bin":
        return files is not None
    return not any({*kind} <= {*_columns(files[0])} for kind in KINDS)


def _columns(path: Path) -> list[str]:
    """Of an arrow or a parquet file, or of JSON lines."""
    if are_lines(path):
        return [*first_record(path)]
    if path.suffix.lower() == ".parquet":
        return parquet_names(path)
    return list(mapped_table(path).column_names)


def _flat_file(
    path: Path, context: int | None, ends: NDArray | None, dtype: TokenType | None
) -> MappedTokens:
    """One file of ids."""
    if (context is None) == (ends is None):
        raise ArgumentError("open_tokens: give context, or ends, and not both")
    if dtype is not None:
        choice("dtype", dtype, get_args(TokenType))
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise DataError(f"{path}: no file of tokens ({error})") from error
    ids = _ids(path, mapped, dtype)
    if ends is None:
        step = whole("context", context, 2)
        ends = np.minimum(np.arange(step, len(ids) + step, step), len(ids))
    require(isinstance(ends, np.ndarray), "ends", ends, "an array [N] of integers")

    def release() -> None:
        mapped.madvise(mmap.MADV_DONTNEED)

    return MappedTokens([Part(ids, np.asarray(ends), path=path, release=release)])


def _ids(path: Path, mapped: mmap.mmap, dtype: TokenType | None) -> NDArray:
    """The tokens of a file. Raises DataError."""
    told = _header(path, mapped)
    if told and dtype not in (None, told):
        raise DataError(f"{path}: its header says {told}, not {dtype}")
    own, start = np.dtype(told or dtype or "uint16"), HEADER if told else 0
    if (len(mapped) - start) % own.itemsize or len(mapped) == start:
        raise DataError(f"{path}: {len(mapped)} bytes are no tokens of {own.name}")
    ids = np.frombuffer(mapped, own, offset=start)
    if told is None and dtype is None:
        low, high = ids[:SAMPLED:2], ids[1:SAMPLED:2]
        if len(high) > 1 and (not high.any() or (high.max() < 32 and low.max() >= 4096)):
            raise DataError(
                f"{path}: every second value is next to nothing, as in a file of uint32: give "
                "dtype='uint32', or dtype='uint16' if that is what it holds"
            )
    return ids


def _header(path: Path, mapped: mmap.mmap) -> str | None:
    """The type that llm.c's header tells of; None without one."""
    if len(mapped) < HEADER:
        return None
    magic, version, count = (int(x) for x in np.frombuffer(mapped, np.int32, 3))
    kind = HEADERS.get((magic, version))
    if kind and len(mapped) != (needed := HEADER + count * np.dtype(kind).itemsize):
        raise DataError(
            f"{path}: {len(mapped)} bytes, but its header speaks of {count} tokens, {needed} "
            "bytes: the file is cut off, or damaged"
        )
    return kind
