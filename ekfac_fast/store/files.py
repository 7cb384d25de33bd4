"""Files that are whole or absent: safetensors and JSON, written atomically; never pickle.

A file appears under its name only when it is complete and on the disk: it is written beside it
under a temporary name, synced, renamed, and the folder is synced. A process killed at any moment
leaves the old file or the new one, and a temporary folder that `Store.open` removes. Each file of
ours holds a checksum of its content, which is compared whenever it is read.
"""

import errno
import json
import os
import shutil
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import StoreError
from .fingerprint import as_bytes

PARTIAL = ".partial-"
# Bytes, of torch's own memory on a CPU.
ALIGNMENT = 64
CHECKSUM, METADATA = "checksum", "ekfac_fast"
BROKEN = (
    "truncated, damaged or of another format. Delete it and run the step that writes it again (of "
    "a run that is finished, delete the folder)"
)


@contextmanager
def writing(path: Path, size: int) -> Iterator[None]:
    """Turn a failed write of `size` bytes into a StoreError that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        folder = next(p for p in path.absolute().parents if os.path.exists(p))
        free = shutil.disk_usage(folder).free
        raise StoreError(
            f"{path}: cannot be written ({error}). It needs {size:,} bytes, {free:,} are free in "
            f"{folder}. What was written before is intact: put that right and start again"
        ) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path, size: int) -> Iterator[Path]:
    """Yield a name to write to; it becomes `path`, durably, or nothing changes.

    The name stands in a folder of its own, which nobody else can have made before, because
    safetensors writes temporary files too.
    """
    if os.path.exists(path) and not path.is_file():
        # A rename would put a file in the place of a device or a pipe.
        raise StoreError(f"{path}: is there and no file: nothing is written. Choose another name")
    scratch = path.with_name(f"{PARTIAL}{os.getpid()}-{threading.get_ident()}-{path.name}")
    with writing(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir(mode=0o700)
        try:
            partial = scratch / path.name
            partial.touch()
            mode = partial.stat().st_mode  # the user's umask; safetensors makes files 0600
            yield partial
            partial.chmod(mode)
            _sync(partial)
            os.replace(partial, path)
            _sync(path.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Remove what processes that are gone have left half written in `folder`, and nowhere below."""
    for scratch in folder.glob(f"{PARTIAL}*"):
        process = scratch.name.removeprefix(PARTIAL).partition("-")[0]
        if not process.isdigit() or not _alive(int(process)):
            shutil.rmtree(scratch, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True


def missing(path: Path) -> StoreError:
    """The error for a file that is not there."""
    return StoreError(f"{path}: no such file. Check the folder, or run the step that writes it")


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically; tensors may be on any device, share memory, be views."""
    ready: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses two names for one memory
        ready[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    size = sum(tensor.nbytes for tensor in ready.values())
    with replacing(Path(path), size) as partial:
        notes = dict(metadata or {})
        told = json.dumps(notes | {CHECKSUM: _checksum(ready, notes)}, sort_keys=True)
        # One key: of several the order in the file is random.
        save_file(ready, partial, metadata={METADATA: told})


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 of names, dtypes, shapes, values and notes (4 GB/s: as fast as the file is read)."""
    total = zlib.crc32(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), total)
        total = zlib.crc32(as_bytes(tensor).numpy().data, total)
    return f"{total:08x}"


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """StoreError for a file that is missing, that cannot be read now, or that is broken."""
    try:
        yield
    except FileNotFoundError:
        raise missing(path) from None
    except (OSError, MemoryError) as error:
        raise StoreError(f"{path}: cannot be read now ({error}); the file may be whole") from error
    except (SafetensorError, ValueError, AttributeError) as error:
        raise StoreError(f"{path}: not a complete safetensors file ({error}): {BROKEN}") from error


def _identity(path: Path) -> tuple[int, int]:
    """Tells a file from another that has been put in its place."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def aligned(tensor: Tensor) -> Tensor:
    """`tensor` where torch would have put it: libraries' sums round by where their memory begins,
    and a run that is continued goes on in the same bits.
    """
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def load_tensors(path: str | Path, *, ours: bool = False) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped; changing them does not change the file.

    A checksum is compared where there is one; a file that is `ours` must have it.
    """
    return load_noted(path, ours=ours)[0]


def load_noted(path: str | Path, *, ours: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata that `save_tensors` was given."""
    path, before = Path(path), None
    with _reading(path):
        # safetensors opens a file twice: between, a run may have put another in its place.
        while before != (before := _identity(path)):
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = dict(file.metadata() or {})
    if METADATA not in metadata and not ours:
        if any(CHECKSUM in note for note in metadata.values()):
            raise StoreError(f"{path}: the name of its checksum is damaged: {BROKEN}")
        return tensors, metadata
    with _reading(path):
        metadata = json.loads(metadata.get(METADATA, "{}"))
        stored = metadata.pop(CHECKSUM, None)
    if stored != (found := _checksum(tensors, metadata)):
        raise StoreError(f"{path}: its checksum is {stored}, its content's {found}: {BROKEN}")
    return tensors, metadata


def mark_of(path: Path) -> str:
    """What tells a file of ours from another run's: its checksum, of others that of their bytes;
    "" of a file of safetensors that is not ours.
    """
    if path.suffix != ".safetensors":
        return f"{zlib.crc32(path.read_bytes()):08x}"
    with _reading(path), safe_open(path, framework="pt") as file:
        return str(json.loads((file.metadata() or {}).get(METADATA, "{}")).get(CHECKSUM, ""))


def save_json(path: str | Path, value: Any, *, checksum: bool = True) -> None:
    """Write JSON atomically, an object with its checksum; NaN is refused (ValueError): no JSON."""
    if checksum and isinstance(value, dict):
        value = value | {CHECKSUM: _json_checksum(value)}
    text = _json_text(value)
    with replacing(Path(path), len(text)) as partial:
        partial.write_bytes(text)


def _json_text(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _json_checksum(value: dict[str, Any]) -> str:
    plain = {k: v for k, v in json.loads(json.dumps(value)).items() if k != CHECKSUM}
    return f"{zlib.crc32(json.dumps(plain, sort_keys=True).encode()):08x}"


def load_json(path: str | Path, *, ours: bool = False) -> Any:
    """The value of a JSON file, compared with its checksum where it has one, or must as `ours`."""
    path = Path(path)
    try:
        text = path.read_bytes()
        value = json.loads(text)
    except FileNotFoundError:
        raise missing(path) from None
    except json.JSONDecodeError as error:
        raise StoreError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}, column {error.colno}). "
            "Repair it, or delete it and run the step that writes it again"
        ) from error
    except UnicodeDecodeError as error:
        raise StoreError(f"{path}: not UTF-8 ({error}): {BROKEN}") from error
    except (OSError, MemoryError, RecursionError, ValueError) as error:  # too many digits
        raise StoreError(f"{path}: cannot be read ({error})") from error
    if isinstance(value, dict) and (ours or CHECKSUM in value):
        stored, found = value.pop(CHECKSUM, None), _json_checksum(value)
        if stored != found:
            raise StoreError(f"{path}: its checksum is {stored}, its content's {found}: {BROKEN}")
        if text != _json_text(value | {CHECKSUM: stored}):
            raise StoreError(f"{path}: the same values, but not as they were written: {BROKEN}")
    return value
