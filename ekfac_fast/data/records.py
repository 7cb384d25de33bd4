"""Files of text as records (`fields` says what they hold).

Records are read where they stand, one at a time, so that a file larger than memory works: of a
text file the byte offsets are kept, of a parquet file the row counts.
"""

import json
import os
import stat
import warnings
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, get_args

from torch.utils.data import ConcatDataset, Dataset

from ..checks import are_texts, choice, listed, require, sized
from ..checks import path as argument_path
from ..errors import ArgumentError, DataError, Notice
from .arrow import saved_files
from .choices import Split
from .examples import Indexable
from .fields import Columns
from .tables import SEPARATORS, Cells, Rows, Separated
from .unpacking import COMPRESSED, content, is_packed, text_of_file, unpacked

SUFFIXES = (".jsonl", ".json", ".txt", *SEPARATORS, ".parquet", ".arrow")
BOM = b"\xef\xbb\xbf"


class Lines(Dataset):
    """Spans of a text file: lines, paragraphs (between blank lines) or the whole; no blank ones."""

    def __init__(self, path: Path, split: Split, columns: Columns, json_lines: bool) -> None:
        self.path, self.split, self.columns, self.json_lines = path, split, columns, json_lines
        self.starts, self.stops, self.lines = array("q"), array("q"), array("q")
        self._unpacked: int | None = None
        if is_packed(path):
            with unpacked(path) as file:
                self._unpacked = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._unpacked)
        with self._opened() as file:
            end = len(BOM) if file.read(len(BOM)) == BOM else 0
            if split == "file":
                self._add(end, file.seek(0, os.SEEK_END), 1)
                return
            file.seek(end)
            inside = False
            for number, line in enumerate(file, 1):
                start, end = end, end + len(line)
                if not line.strip():
                    inside = False
                elif inside and split == "paragraph":
                    self.stops[-1] = end
                else:
                    self._add(start, end, number)
                    inside = True

    def _opened(self) -> IO[bytes]:
        if self._unpacked is None:
            return self.path.open("rb")
        return open(f"/proc/self/fd/{self._unpacked}", "rb")

    def _add(self, start: int, stop: int, line: int) -> None:
        self.starts.append(start)
        self.stops.append(stop)
        self.lines.append(line)

    def __len__(self) -> int:
        return len(self.starts)

    def source(self, index: int) -> str:
        """File and line of a record."""
        if self.split == "file":
            return str(self.path)
        return f"{self.path}, line {self.lines[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        line, source = self.lines[index], self.source(index)
        with self._opened() as file:
            file.seek(self.starts[index])
            data = file.read(self.stops[index] - self.starts[index])
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            line += data.count(b"\n", 0, error.start)
            raise DataError(f"{self.path}, line {line}: not UTF-8 ({error.reason})") from error
        if self.json_lines:
            return self.columns.record(_parsed(text, source), source)
        if not self.columns.texts:
            return self.columns.record({"text": text}, source)  # refused
        return {"text": text.replace("\r\n", "\n").rstrip("\n"), "source": source}


class Objects(Dataset):
    """The objects of a JSON array; all of it is in memory."""

    def __init__(self, path: Path, columns: Columns) -> None:
        self.path, self.columns = path, columns
        self.values = _parsed(text_of_file(path), str(path))
        if not isinstance(self.values, list):
            self.values = [self.values]

    def __len__(self) -> int:
        return len(self.values)

    def source(self, index: int) -> str:
        """File and place of a record."""
        return f"{self.path}, item {index + 1}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.columns.record(self.values[index], self.source(index))


def _parsed(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise DataError(
            f"{source}: malformed JSON ({error.msg}, {where}column {error.colno})"
        ) from error
    except (RecursionError, ValueError) as error:  # too deep, a number of too many digits
        raise DataError(f"{source}: JSON that cannot be read ({error})") from error


class Given(Dataset):
    """Records that are in memory already: mappings, those of a `datasets.Dataset`, say."""

    def __init__(self, values: Indexable, columns: Columns) -> None:
        self.values, self.columns, self.size = values, columns, sized(values)

    def __len__(self) -> int:
        return self.size

    def source(self, index: int) -> str:
        """Which record it is."""
        return f"record {index}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.columns.record(self.values[index], self.source(index))


class Records(ConcatDataset):
    """The records of several files, one after the other."""

    def source(self, index: int) -> str:
        """Where a record stands, without reading it."""
        part = bisect_right(self.cumulative_sizes, index)
        before = self.cumulative_sizes[part - 1] if part else 0
        records: Any = self.datasets[part]
        return records.source(index - before)

    @property
    def has_text(self) -> bool:
        """Whether a file is plain text."""
        return any(isinstance(x, Lines) and not x.json_lines for x in self.datasets)


def read(
    path: str | Path,
    *,
    split: Split = "file",
    fields: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
) -> Records:
    """The records of a file of JSON lines, JSON, text, separated values (.csv, .tsv), parquet or
    arrow, or of all in a folder, by name; of a folder that `datasets` saved, of its files in their
    order.

    Endings count in any case, `.gz` and `.zst` may follow (not on parquet), folders may be links;
    files of other kinds in a folder are left out with a `Notice`. `split` says what one record of
    a .txt file is. The others hold `text`, `messages`, or `prompt` and `completion`, under these
    names or as `fields` maps them (`Columns`): {"text": "body"}, {"prompt": "question",
    "completion": "answer"}, {"user": "instruction+input", "assistant": "output"}. `keep`: further
    fields of every record, for `Tokens.column`. Raises DataError; ArgumentError for a `split` where
    no file is a .txt.
    """
    require(are_texts(keep) and all(keep), "keep", keep, "a list of names")
    found = read_columns(path, split, Columns(fields, keep=tuple(keep)))
    if split != "file" and not found.has_text:
        raise ArgumentError(f"split is {split!r}: {path} holds no .txt, whose records it makes")
    return found


def read_columns(path: str | Path | Indexable, split: Split, columns: Columns) -> Records:
    """`read`, where it is known what makes a record; or records that are in memory."""
    if not isinstance(path, str | os.PathLike):
        records = Given(path, columns)
        if not len(records):
            raise DataError("there is no record")
        return Records([records])
    path = argument_path("path", path)
    choice("split", split, get_args(Split))
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(f"{path}: no such file or folder ({error.strerror})") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise DataError(f"{path}: a pipe or a device, not a file: it is read more than once")
    supported = ", ".join((*SUFFIXES, *(f".jsonl{ending}" for ending in COMPRESSED)))
    if path.is_dir():
        every = saved_files(path) or sorted(_files(path))
        files = [file for file in every if _kind(file)]
        if not files:
            raise DataError(f"{path}: no file of a kind that can be read ({supported}) in it")
        if left := [str(file.relative_to(path)) for file in every if not _kind(file)]:
            warnings.warn(
                f"{path}: left out {listed(left)}: not of a kind that can be read",
                Notice,
                stacklevel=2,
            )
    elif _kind(path):
        files = [path]
    else:
        raise DataError(f"{path}: cannot be read; the kinds that can are {supported}")
    parts = [_records(file, split, columns) for file in files]
    if not any(len(part) for part in parts):
        raise DataError(f"{path}: holds no record")
    return Records(parts)


def _files(folder: Path) -> Iterator[Path]:
    """Files below a folder, through links, once each, without hidden ones."""
    seen: set[Path] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = Path(root).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(root) / name for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def _kind(path: Path) -> str | None:
    """The ending that says how a file is read; None where it cannot be."""
    endings = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = bool(endings) and endings[-1] in COMPRESSED
    kind = endings[-2] if packed and len(endings) == 2 else endings[-1] if endings else ""
    return kind if kind in SUFFIXES and not (packed and kind in (".parquet", ".arrow")) else None


def _records(
    path: Path, split: Split, columns: Columns
) -> Lines | Objects | Rows | Cells | Separated:
    """The records of one file."""
    kind = _kind(path)
    if kind == ".arrow":
        return Cells(path, columns)
    if kind == ".parquet":
        return Rows(path, columns)
    if kind in SEPARATORS:
        return Separated(path, columns, SEPARATORS[kind])
    if kind == ".json" and _begins_an_array_or_spans_lines(path):
        return Objects(path, columns)
    return Lines(path, split if kind == ".txt" else "line", columns, kind != ".txt")


def _begins_an_array_or_spans_lines(path: Path) -> bool:
    """Whether a .json file is one value; many call files of JSON lines so, too."""
    lines = [line for line in content(path).removeprefix(BOM).splitlines() if line.strip()]
    if not lines or lines[0].lstrip().startswith(b"["):
        return True
    try:
        json.loads(lines[0])
    except ValueError:
        return True
    return False
