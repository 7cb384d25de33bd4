"""Files of text as records: {"text", "source"}, or {"prompt", "completion", "source"}.

Records are read where they stand, one at a time, so that a file larger than memory works: of a
text file the byte offsets are kept, of a parquet file the row counts.
"""

import json
from array import array
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from torch.utils.data import ConcatDataset, Dataset

Split = Literal["file", "paragraph", "line"]
SUFFIXES = (".jsonl", ".txt", ".parquet")
BOM = b"\xef\xbb\xbf"


class DataError(ValueError):
    """An input is wrong; the message names the file and line, or the example, and what to do."""


def optional(name: str, extra: str) -> ModuleType:
    """Import a module that only an extra installs; ImportError says which."""
    if find_spec(name.partition(".")[0]) is None:
        raise ImportError(f"{name} is not installed: pip install 'ekfac-fast[{extra}]'")
    return import_module(name)


def checked(value: Any, source: str, field: str | None = "text") -> dict[str, str]:
    """A record from a mapping with `field`, or `prompt` and `completion`; its `name` if it has one.

    Raises DataError.
    """
    if not isinstance(value, Mapping):
        raise DataError(f"{source}: holds a {type(value).__name__}, not an object with fields")
    names = _fields(list(value), source, field)
    for name in names:
        if not isinstance(value[name], str):
            raise DataError(f"{source}: {name!r} is a {type(value[name]).__name__}, not a string")
    kept = {"name": str(value["name"])} if value.get("name") is not None else {}
    if names == [field]:
        return {"text": value[field], "source": source, **kept}
    return {**{name: value[name] for name in names}, "source": source, **kept}


def _fields(present: list[str], source: str, field: str | None) -> list[str]:
    """The fields to read: [field] where it is there, else prompt and completion."""
    if field in present:
        return [field]
    pair = ["prompt", "completion"]
    if not set(pair) <= set(present):
        wanted = "needs 'prompt' and 'completion'"
        wanted += f", or {field!r}" if field else ""
        raise DataError(f"{source}: {wanted}; it has {', '.join(map(repr, present)) or 'nothing'}")
    return pair


class Lines(Dataset):
    """Spans of a text file: lines, paragraphs (between blank lines) or the whole; no blank ones."""

    def __init__(self, path: Path, split: Split, field: str | None) -> None:
        self.path, self.split, self.field = path, split, field
        self.starts, self.stops, self.lines = array("q"), array("q"), array("q")
        with path.open("rb") as file:
            end = len(BOM) if file.read(len(BOM)) == BOM else 0
            if split == "file":
                self._add(end, path.stat().st_size, 1)
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

    def _add(self, start: int, stop: int, line: int) -> None:
        self.starts.append(start)
        self.stops.append(stop)
        self.lines.append(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, str]:
        line = self.lines[index]
        source = str(self.path) if self.split == "file" else f"{self.path}, line {line}"
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            data = file.read(self.stops[index] - self.starts[index])
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            line += data.count(b"\n", 0, error.start)
            raise DataError(f"{self.path}, line {line}: not UTF-8 ({error.reason})") from error
        if self.path.suffix != ".jsonl":
            return {"text": text.replace("\r\n", "\n").rstrip("\n"), "source": source}
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{source}: malformed JSON ({error.msg}, column {error.colno})"
            ) from error
        return checked(value, source, self.field)


class Rows(Dataset):
    """The rows of a parquet file; one row group is held at a time."""

    def __init__(self, path: Path, field: str | None) -> None:
        self.path = path
        with self._file() as file:
            self.fields = _fields(file.schema_arrow.names, str(path), field)
            groups = range(file.num_row_groups)
            sizes = [file.metadata.row_group(group).num_rows for group in groups]
        self.field, self.starts = field, np.cumsum([0, *sizes])
        self.held: tuple[int, Any] = (-1, None)

    def _file(self) -> Any:
        parquet = optional("pyarrow.parquet", "hf")
        try:
            return parquet.ParquetFile(self.path)
        except (optional("pyarrow", "hf").ArrowInvalid, OSError) as error:
            raise DataError(f"{self.path}: not a complete parquet file ({error})") from error

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, str]:
        index = range(len(self))[index]
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        if self.held[0] != group:
            with self._file() as file:
                self.held = (group, file.read_row_group(group, columns=self.fields))
        (row,) = self.held[1].slice(index - int(self.starts[group]), 1).to_pylist()
        return checked(row, f"{self.path}, row {index + 1}", self.field)


def read(
    path: str | Path, *, split: Split = "file", field: str | None = "text"
) -> "ConcatDataset[dict[str, str]]":
    """The records of a .jsonl, .txt or .parquet file, or of all of those in a folder, by name.

    `split` says what one record of a .txt file is; `field` is the text's name in the others, where
    `prompt` and `completion` may stand instead (field=None: must). Raises DataError.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    supported = ", ".join(SUFFIXES)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        files = [p for p in files if not any(q.startswith(".") for q in p.relative_to(path).parts)]
        if not files:
            raise DataError(f"{path}: no file of a kind that can be read ({supported}) in it")
    elif path.suffix in SUFFIXES:
        files = [path]
    else:
        raise DataError(f"{path}: cannot be read; the kinds that can are {supported}")
    parts = [
        Rows(file, field)
        if file.suffix == ".parquet"
        else Lines(file, "line" if file.suffix == ".jsonl" else split, field)
        for file in files
    ]
    if not any(len(part) for part in parts):
        raise DataError(f"{path}: holds no record")
    return ConcatDataset(parts)
