"""JSON lines of token ids, {"input_ids": [...], "labels": [...]}, as a mapped table."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..extras import optional
from .arrow import TOKENS, mapped_table, tokens_of
from .mapped import MappedTokens

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
# A record lies in one block, or in two beside each other.
BLOCK = 1 << 24


def are_lines(path: Path) -> bool:
    """Whether a file's name says that it holds JSON lines, packed or not."""
    return path.name.lower().endswith(LINES)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The bytes of a file, unpacked on the way. Raises DataError."""
    pa = optional("pyarrow", "hf")
    packing = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    try:
        with pa.input_stream(str(path), compression=packing) as stream:
            yield stream
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as JSON lines of token ids ({error})") from error


def first_record(path: Path) -> dict[str, Any]:
    """The first record of a file; empty where it has none, or it is no JSON object."""
    with _opened(path) as stream:
        text = stream.read(BLOCK)
    lines = (x for x in text.removeprefix(b"\xef\xbb\xbf").splitlines() if x.strip())
    try:
        record = json.loads(next(lines, b"{}"))
    except ValueError:  # text readers say what is wrong with it
        return {}
    return record if isinstance(record, dict) else {}


def json_tokens(files: Sequence[Path], keep: Sequence[str] = ()) -> MappedTokens:
    """`arrow_tokens` of files of JSON lines, which are unpacked beside, into nameless files.

    Raises:
        DataError: a value is of another kind than in the first record; names file and row.
    """
    return tokens_of(((path, _table(path, keep)) for path in files), keep)


def _table(path: Path, keep: Sequence[str]) -> Any:
    """A mapped table of the columns that a record has; of texts and numbers, that the first has."""
    pa, reader, ipc = (optional(f"pyarrow{x}", "hf") for x in ("", ".json", ".ipc"))
    first = first_record(path)
    kinds = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
    fields = [pa.field(name, pa.list_(pa.int64())) for name in TOKENS]
    for name in (x for x in first if x in keep and x not in TOKENS):
        kind = kinds.get(type(first[name]))
        if kind is None:
            raise DataError(
                f"{path}: {name!r} holds a {type(first[name]).__name__}: only texts and numbers "
                "can be kept beside tokens"
            )
        fields.append(pa.field(name, kind))
    schema = pa.schema(fields)
    how = reader.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    with tempfile.TemporaryFile() as target, _opened(path) as stream:
        blocks = reader.open_json(stream, reader.ReadOptions(block_size=BLOCK), how)
        with ipc.new_stream(target, schema) as writer:
            for block in blocks:
                writer.write_batch(block.select(schema.names))
        target.flush()
        table = mapped_table(Path(f"/proc/self/fd/{target.fileno()}"))
    nowhere = [x for x in TOKENS if table[x].null_count == len(table)]
    return table.drop_columns(nowhere)
