"""Files that are whole or absent: safetensors and JSON, written atomically; never pickle.

A file appears under its name only when it is complete and on the disk: it is written beside it
under a temporary name, synced, renamed, and the folder is synced. A process killed at any moment
leaves the old file or the new one, and a temporary folder that `Store.open` removes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

PARTIAL = ".partial-"


class StoreError(RuntimeError):
    """A file cannot be written, read or continued; the message names it and says what to do."""


@contextmanager
def writing(path: Path, size: int) -> Iterator[None]:
    """Turn a failed write of `size` bytes into a StoreError that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        folder = next(p for p in path.absolute().parents if p.exists())
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

    The name stands in a folder of its own because safetensors writes temporary files too.
    """
    scratch = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    with writing(path, size):
        scratch.mkdir(parents=True, exist_ok=True)
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
        save_file(ready, partial, metadata=dict(metadata) if metadata else None)


@contextmanager
def _reading_tensors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise missing(path) from None
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"{path}: not a complete safetensors file ({error}): truncated, damaged or of another "
            "format. Delete it and run the step that writes it again"
        ) from error


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; changing them does not change the file."""
    with _reading_tensors(Path(path)):
        return load_file(path)


def load_metadata(path: str | Path) -> dict[str, str]:
    """The metadata that `save_tensors` was given."""
    with _reading_tensors(Path(path)), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def save_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinities are refused (ValueError): they are not JSON."""
    text = (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    with replacing(Path(path), len(text)) as partial:
        partial.write_bytes(text)


def load_json(path: str | Path) -> Any:
    """The value of a JSON file."""
    path = Path(path)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise missing(path) from None
    except json.JSONDecodeError as error:
        raise StoreError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}, column {error.colno}). "
            "Repair it, or delete it and run the step that writes it again"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: cannot be read ({error})") from error


def brief(value: Any) -> str:
    """A value as it stands in a message."""
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def differences(stored: Any, new: Any, name: str = "") -> Iterator[str]:
    """One line for every fact that is not equal, by its dotted name."""
    if isinstance(stored, dict) and isinstance(new, dict):
        for key in sorted(stored | new):
            prefix = f"{name}.{key}" if name else key
            yield from differences(stored.get(key, "(none)"), new.get(key, "(none)"), prefix)
    elif isinstance(stored, list) and isinstance(new, list) and len(stored) == len(new):
        for i, (old, value) in enumerate(zip(stored, new, strict=True)):
            yield from differences(old, value, f"{name}[{i}]")
    elif stored != new:
        yield f"  {name}: stored {brief(stored)}, now {brief(new)}"


def fingerprint(*parts: Any) -> str:
    """16 hex digits of the sha256 of tensors, arrays, numbers, strings, None and nests of them.

    Mappings are taken in the order of their keys; lists, tuples and iterators count alike (an
    iterator is consumed item by item, so data larger than memory can be passed as a generator).
    Raises TypeError for anything else.
    """
    digest = hashlib.sha256()
    _absorb(digest, parts)
    return digest.hexdigest()[:16]


def _absorb(digest: Any, part: Any) -> None:
    """Feed one part; every encoding ends itself, so no two nests collide."""
    match part:
        case None | bool():
            digest.update(f"{part};".encode())
        case Tensor():
            digest.update(f"t{str(part.dtype).removeprefix('torch.')}{list(part.shape)}".encode())
            flat = part.detach().contiguous().reshape(-1).view(torch.uint8)
            for piece in flat.split(1 << 26):  # a device tensor comes to the host in pieces
                digest.update(piece.cpu().numpy())
        case np.ndarray() if part.dtype.kind in "biufc":
            digest.update(f"t{part.dtype.name}{list(part.shape)}".encode())
            digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
        case Integral():
            digest.update(f"i{int(part)};".encode())
        case Real():
            digest.update(f"f{float(part).hex()};".encode())
        case str():
            digest.update(f"s{len(part.encode())};{part}".encode())
        case bytes():
            digest.update(f"y{len(part)};".encode() + part)
        case Mapping():
            digest.update(b"{")
            for key in sorted(part):
                _absorb(digest, key)
                _absorb(digest, part[key])
            digest.update(b"}")
        case Sequence() | Iterator():
            digest.update(b"[")
            for item in part:
                _absorb(digest, item)
            digest.update(b"]")
        case _:
            raise TypeError(f"fingerprint: cannot take a {type(part).__name__}: {part!r:.80}")
