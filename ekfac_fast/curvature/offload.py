"""Bases that do not stay on the device: pinned in CPU memory, on their way before their turn; or
made of mapped files at every use.

Backward passes meet the layers in the same order in every batch. When one takes its basis, that of
the layer that came after it in the batch before departs, on a stream of its own, and travels while
the products of this one run. A wrong guess costs memory and a transfer, never a result.
"""

import functools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..ops.shapes import wide
from .basis import RESERVED_SHARE, Eigenvectors
from .memory import free_bytes, total_bytes

_last = threading.local()
E = TypeVar("E", bound=Eigenvectors)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Transfer(Generic[E]):
    """One layer's basis on its way to `device`."""

    def __init__(self, pinned: E, device: torch.device) -> None:
        self.device = device
        with torch.cuda.stream(_stream(device)):
            self.basis = pinned.each(lambda x: x.to(device, non_blocking=True))
            self.arrival = _stream(device).record_event()

    def arrived(self) -> E:
        """The basis, for use on the current stream from here on."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.arrival)

        def kept(x: Tensor) -> Tensor:
            # Allocated on the other stream, which must not reuse it while this one reads.
            x.record_stream(stream)
            return x

        return self.basis.each(kept)


class Travelling(Generic[E]):
    """What a basis is to its layer, for one that travels at every use."""

    def __init__(self, basis: E) -> None:
        self.pinned = basis.each(Tensor.pin_memory)
        self.transfer: Transfer[E] | None = None
        self.follower: weakref.ref[Travelling[E]] | None = None

    def at(self, device: torch.device) -> E:
        """The basis on `device`; that of the layer that is likely to be next departs."""
        transfer = self.transfer or Transfer(self.pinned, device)
        self.transfer = None
        previous = getattr(_last, "travelling", lambda: None)()
        if previous is not None:
            previous.follower = weakref.ref(self)
        _last.travelling = weakref.ref(self)
        follower = self.follower() if self.follower is not None else None
        if follower is not None and follower.transfer is None:
            follower.transfer = Transfer(follower.pinned, device)
        return transfer.arrived()


@dataclass(frozen=True)
class Mapped(Generic[E]):
    """What a basis is to its layer, for one in files that are mapped: made anew at every use."""

    make: Callable[[], E]

    def at(self, device: torch.device) -> E:
        """The basis on `device`, of which nothing stays."""
        return self.make().at(device)


def fits(
    sizes: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    blocks: int = 1,
    turned: tuple[int, int] | None = None,
) -> bool:
    """Whether the basis of a layer [O,J] may stay on `device` and leave enough to everything else.

    Those that would not wait in CPU memory, as kronfluence's always do, and travel at each use.
    `turned`: rows of the eigenvectors, where a side has none: 0 there.
    """
    if device.type != "cuda":
        return True
    (O, J), (rows, columns) = sizes, turned or sizes
    vectors = (rows**2 + columns**2) // blocks
    needed = vectors * dtype.itemsize + O * J * wide(dtype).itemsize
    return free_bytes(device) - needed > RESERVED_SHARE * total_bytes(device)


def placed(basis: E, sizes: tuple[int, int], device: torch.device) -> E | Travelling[E]:
    """The basis on `device` for good where it fits, else travelling; `at` asks for either."""
    Qg, Qa = basis.Qg, basis.Qa
    dtype = next((x.dtype for x in (Qg, Qa) if x is not None), torch.float32)
    turned = 0 if Qg is None else sizes[0], 0 if Qa is None else sizes[1]
    fitting = fits(sizes, dtype, device, basis.blocks, turned)
    return basis.at(device) if fitting else Travelling(basis)
