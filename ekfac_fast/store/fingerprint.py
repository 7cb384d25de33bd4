"""What tells two runs apart: fingerprints of data and weights, and the facts that differ."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


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


class Digest:
    """A running sha256 of tensors, arrays, numbers, strings, None and nests of them."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def add(self, part: Any) -> None:
        """Take one part; TypeError for what has no bytes of its own."""
        _absorb(self._sha, part)

    def add_values(self, values: NDArray) -> None:
        """Take an array's bytes alone: in several calls as in one."""
        self._sha.update(np.ascontiguousarray(values).data.cast("B"))

    def add_rows(
        self, columns: Sequence[NDArray[np.int64]], ends: NDArray[np.int64], first: int
    ) -> None:
        """As `add((*values, number, {}))` for one row after the other: every column's values of
        the row, [T] each; its number, from `first` on.

        columns  flat [all values]; `ends`: where in them every row ends
        """
        held = [np.ascontiguousarray(x).data.cast("B") for x in columns]
        parts: list[bytes | memoryview] = []
        start = 0
        for number, end in enumerate(ends.tolist(), first):
            head = b"tint64[%d]" % (end - start)
            parts.append(b"[")
            for x in held:
                parts += (head, x[8 * start : 8 * end])
            parts.append(b"i%d;{}]" % number)
            start = end
        self._sha.update(b"".join(parts))

    def hex(self) -> str:
        """16 hex digits of what was added so far."""
        return self._sha.hexdigest()[:16]


def fingerprint(*parts: Any) -> str:
    """16 hex digits that tell parts apart: tensors, arrays, numbers, strings, None, nests of them.

    Mappings are taken in the order of their keys; lists, tuples and iterators count alike (an
    iterator is consumed item by item, so data larger than memory can be passed as a generator).
    Raises TypeError for anything else.
    """
    digest = Digest()
    digest.add(parts)
    return digest.hex()


def as_bytes(x: Tensor) -> Tensor:
    """The bytes of a tensor, in the order of its values."""
    flat = x.contiguous().reshape(-1)
    if flat.stride(0) != 1:  # one value, which counts as contiguous whatever its stride
        flat = flat[0].reshape(1)
    return flat.view(torch.uint8)


def _absorb(digest: Any, part: Any) -> None:
    """Feed one part; every encoding ends itself, so no two nests collide."""
    match part:
        case None | bool():
            digest.update(f"{part};".encode())
        case Tensor() if hasattr(part, "__tensor_flatten__"):
            # A tensor that holds others (torchao's): they say what it is.
            inside = {name: getattr(part, name) for name in part.__tensor_flatten__()[0]}
            _absorb(digest, (type(part).__name__, str(part.dtype), list(part.shape), inside))
        case Tensor():
            digest.update(f"t{str(part.dtype).removeprefix('torch.')}{list(part.shape)}".encode())
            flat = as_bytes(part.detach())
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
