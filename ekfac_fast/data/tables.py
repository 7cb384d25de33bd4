"""Files of rows and columns: parquet, arrow, and values separated by commas or tabs."""

import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..errors import DataError
from ..extras import optional
from .arrow import mapped_table
from .fields import BESIDE, Columns
from .forms import REFERENCES
from .unpacking import text_of_file

# What separates the values of a line, by a file's ending.
SEPARATORS = {".csv": ",", ".tsv": "\t"}


class Table(Dataset):
    """A file of rows, of which columns are read."""

    def __init__(self, path: Path, columns: Columns) -> None:
        self.path, self.columns = path, columns

    def among(self, names: Sequence[str]) -> list[str]:
        """Which of a file's columns are read."""
        asked = self.columns.among(names, str(self.path)).values()
        wanted = {*(x for parts in asked for x in parts), *BESIDE, "against", *self.columns.keep}
        return [name for name in names if name in wanted]

    def source(self, index: int) -> str:
        """File and row of a record."""
        return f"{self.path}, row {index + 1}"

    def record(self, table: Any, at: int, index: int) -> dict[str, Any]:
        """Record `index`, a table's row `at`."""
        source = self.source(index)
        try:
            (row,) = table.slice(at, 1).to_pylist()
        except ValueError as error:  # not UTF-8, or fewer rows than the file says
            raise DataError(f"{source}: cannot be read ({error})") from error
        return self.columns.record(row, source)


class Rows(Table):
    """The rows of a parquet file; one row group is held at a time."""

    def __init__(self, path: Path, columns: Columns) -> None:
        super().__init__(path, columns)
        with self._file() as file:
            self.names = self.among(file.schema_arrow.names)
            groups = range(file.num_row_groups)
            sizes = [file.metadata.row_group(group).num_rows for group in groups]
        self.starts = np.cumsum([0, *sizes])
        self.held: tuple[int, Any] = (-1, None)

    @contextmanager
    def _file(self) -> Iterator[Any]:
        parquet = optional("pyarrow.parquet", "hf")
        try:
            with parquet.ParquetFile(self.path) as file:
                yield file
        except (optional("pyarrow", "hf").ArrowException, OSError) as error:
            raise DataError(f"{self.path}: not a complete parquet file ({error})") from error

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        if self.held[0] != group:
            with self._file() as file:
                self.held = (group, file.read_row_group(group, columns=self.names))
        return self.record(self.held[1], index - int(self.starts[group]), index)


class Cells(Table):
    """The rows of an arrow file, memory-mapped."""

    def __init__(self, path: Path, columns: Columns) -> None:
        super().__init__(path, columns)
        table = mapped_table(path)
        self.table = table.select(self.among(table.column_names))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        return self.record(self.table, index, index)


class Written(str):
    """A text of a file that has no numbers: it may stand for one."""

    @property
    def number(self) -> int | float | None:
        """Which."""
        for kind in (int, float):
            try:
                return kind(self) if "_" not in self else None
            except ValueError:
                pass
        return None


class Separated(Dataset):
    """The rows of a file of separated values (RFC 4180), its names in the first; all of it is in
    memory.

    Values are texts, as they stand there; of a label, which may be a number's, it is known that it
    was `Written`. A label, a name or a second text without a character is missing. Tabs separate
    without quotes.
    """

    def __init__(self, path: Path, columns: Columns, separator: str) -> None:
        self.path, self.columns = path, columns
        self.rows: list[list[Any]] = []
        self.lines: list[int] = []
        with _long_fields():
            how: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if separator == "\t" else {}
            text = StringIO(text_of_file(path), newline="")
            self._read(csv.reader(text, delimiter=separator, strict=True, **how))
        given = columns.fields or {}
        for name in ("label", "text_pair", *REFERENCES):
            self._change(given.get(name, name), Written)
        self._change("name", str)

    def _change(self, name: str, kind: Callable[[str], str]) -> None:
        """A column, if there is one; None where nothing is written."""
        if name in self.names:
            at = self.names.index(name)
            for row in self.rows:
                row[at] = kind(row[at]) if row[at].strip() else None

    def _read(self, reader: Any) -> None:
        self.names: list[str] = []
        begins = 1
        try:
            for row in reader:
                if row and not self.names:
                    self.names = self._named(row)
                elif row:
                    if len(row) != len(self.names):
                        raise DataError(
                            f"{self.path}, line {begins}: {len(row)} values, but {len(self.names)} "
                            "columns; values that hold a separator or a quote stand in quotes"
                        )
                    self.rows.append(row)
                    self.lines.append(begins)
                begins = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{self.path}, line {begins}: cannot be read ({error})") from error

    def _named(self, names: list[str]) -> list[str]:
        if twice := sorted({x for x in names if x and names.count(x) > 1}):
            raise DataError(f"{self.path}: two columns are named {twice[0]!r}")
        self.columns.among(names, str(self.path))
        return names

    def __len__(self) -> int:
        return len(self.rows)

    def source(self, index: int) -> str:
        """File and line of a record."""
        return f"{self.path}, line {self.lines[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(zip(self.names, self.rows[index], strict=True))
        return self.columns.record(row, self.source(index))


@contextmanager
def _long_fields() -> Iterator[None]:
    """Values of any length: Python stops at 128 KiB."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
