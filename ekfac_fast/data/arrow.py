"""Arrow tables, memory-mapped: what `datasets` saves, as files and as lists of token ids."""

import json
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import listed
from ..errors import DataError, Notice
from ..extras import optional
from .mapped import MappedTokens, Part

# Of a sequence: one number a token.
TOKENS = ("input_ids", "labels", "attention_mask", "position_ids")
FILE_MAGIC = b"ARROW1"


def saved_files(folder: Path) -> list[Path] | None:
    """The arrow files of a folder that `save_to_disk` wrote, in order; None of any other folder.

    Raises:
        DataError: it holds several splits, or rows in another order than that of its files.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise DataError(f"{folder}: holds the splits {listed(splits)}: give the folder of one")
    state = folder / "state.json"
    if not state.is_file() or not any(folder.glob("*.arrow")):
        return None
    try:
        told = json.loads(state.read_bytes())
        files = [folder / str(one["filename"]) for one in told["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state}: not the state of a saved data set ({error!r})") from error
    if told.get("_indices_data_files") or told.get("_indices_files"):
        raise DataError(
            f"{folder}: its rows stand in another order than in its files: save it again after "
            "flatten_indices()"
        )
    return files


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """DataError where pyarrow cannot read a file."""
    try:
        yield
    except (optional("pyarrow", "hf").ArrowException, OSError) as error:
        raise DataError(f"{path}: not a complete {path.suffix} file ({error})") from error


def mapped_table(path: Path) -> Any:
    """A pyarrow table of an arrow file or stream, memory-mapped. Raises DataError."""
    pa, ipc = optional("pyarrow", "hf"), optional("pyarrow.ipc", "hf")
    with reading(path):
        source = pa.memory_map(str(path))
        is_file = source.read(len(FILE_MAGIC)) == FILE_MAGIC
        source.seek(0)
        return (ipc.open_file if is_file else ipc.open_stream)(source).read_all()


def arrow_tokens(files: Sequence[Path], keep: Sequence[str] = ()) -> MappedTokens:
    """Sequences of the columns `input_ids`, and where there are `labels`, `attention_mask` and
    `position_ids`, of arrow files, one after the other; `keep`: further columns, for `column`.

    Raises:
        DataError: a file is damaged or has no `input_ids`, a column holds other values.
    """
    return tokens_of(((path, mapped_table(path)) for path in files), keep)


def tokens_of(tables: Iterable[tuple[Path, Any]], keep: Sequence[str] = ()) -> MappedTokens:
    """`arrow_tokens` of tables, and the files that they are of."""
    pa, parts, kept, left = optional("pyarrow", "hf"), [], [], set()
    for path, table in tables:
        names = table.column_names
        if absent := [name for name in ("input_ids", *keep) if name not in names]:
            raise DataError(f"{path}: has no column {absent[0]!r}; it has {listed(names)}")
        left |= {x.name for x in table.schema if _is_list(x.type)} - {*TOKENS, *keep}
        kept.append(table.select(list(keep)))
        before = 0
        for batch in table.select([name for name in TOKENS if name in names]).to_batches():
            if len(batch):
                parts.append(_part(batch, path, before))
            before += len(batch)
    if not parts:
        raise DataError("the data set is empty")
    if left:
        warnings.warn(
            f"{parts[0].path}: left out {listed(sorted(left))}: of a sequence only "
            f"{listed(TOKENS)} are read",
            Notice,
            stacklevel=3,
        )
    table = pa.concat_tables(kept)
    return MappedTokens(parts, {name: table.column(name) for name in keep})


def _is_list(kind: Any) -> bool:
    types = optional("pyarrow.types", "hf")
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _part(batch: Any, path: Path, before: int) -> Part:
    """The sequences of one record batch, without a copy."""
    ids, ends = _flat(batch.column("input_ids"), "input_ids", path, before)
    beside = {}
    for name in batch.schema.names[1:]:
        beside[name], own = _flat(batch.column(name), name, path, before)
        if (differ := np.flatnonzero(own != ends)).size:
            row = before + int(differ[0]) + 1
            raise DataError(f"{path}, sequence {row}: {name} and input_ids differ in length")
    return Part(ids, ends, beside.pop("labels", None), beside, path, before)


def _flat(column: Any, name: str, path: Path, before: int) -> tuple[NDArray, NDArray]:
    """A column of lists as one array of integers, and where each list ends."""
    types = optional("pyarrow.types", "hf")
    if not _is_list(column.type) or not types.is_integer(column.type.value_type):
        raise DataError(f"{path}: {name} holds {column.type}, not lists of integers")
    if column.null_count:
        row = before + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0]) + 1
        raise DataError(f"{path}, sequence {row}: has no {name}")
    if types.is_fixed_size_list(column.type):
        size = column.type.list_size
        values, ends = column.flatten(), np.arange(1, len(column) + 1) * size
    else:
        offsets = column.offsets.to_numpy()
        values = column.values.slice(offsets[0], offsets[-1] - offsets[0])
        ends = offsets[1:] - offsets[0]
    if values.null_count:
        raise DataError(f"{path}: a value of {name} is null")
    return values.to_numpy(zero_copy_only=True), ends


def parquet_names(path: Path) -> list[str]:
    """The columns of a parquet file. Raises DataError."""
    with reading(path):
        return list(optional("pyarrow.parquet", "hf").read_schema(path).names)


def parquet_tokens(files: Sequence[Path], keep: Sequence[str] = ()) -> MappedTokens:
    """`arrow_tokens` of parquet files, unpacked beside, into nameless files."""
    ipc, parquet = optional("pyarrow.ipc", "hf"), optional("pyarrow.parquet", "hf")

    def unpacked(path: Path) -> Any:
        with tempfile.TemporaryFile() as target, reading(path):
            with parquet.ParquetFile(path) as file:
                wanted = [x for x in file.schema_arrow.names if x in {*TOKENS, *keep}]
                if "input_ids" not in wanted:
                    raise DataError(f"{path}: has no column 'input_ids'")
                batches = file.iter_batches(columns=wanted)
                first = next(batches, None)
                schema = file.schema_arrow if first is None else first.schema
                with ipc.new_stream(target, schema) as writer:
                    for batch in chain([first] if first is not None else [], batches):
                        writer.write_batch(batch)
            target.flush()
            return mapped_table(Path(f"/proc/self/fd/{target.fileno()}"))

    return tokens_of(((path, unpacked(path)) for path in files), keep)
