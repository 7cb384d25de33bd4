"""Factors that do not stay on the device: pinned in CPU memory, on their way before their turn.

Backward passes meet the modules in the same order in every batch. When one takes its factors, those
of the module that came after it in the batch before depart, on a stream of their own, and travel
while the products of this one run. A wrong guess costs memory and a transfer, never a result.
"""

import functools
import threading
import weakref

import torch
from torch import Tensor

from .preconditioner import Preconditioner

_last = threading.local()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Transfer:
    """One module's factors on their way to `device`."""

    def __init__(self, pinned: Preconditioner, device: torch.device) -> None:
        self.device = device
        with torch.cuda.stream(_stream(device)):
            self.factors = pinned.each(lambda x: x.to(device, non_blocking=True))
            self.arrival = _stream(device).record_event()

    def arrived(self) -> Preconditioner:
        """The factors, for use on the current stream from here on."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.arrival)

        def kept(x: Tensor) -> Tensor:
            # Allocated on the other stream, which must not reuse it while this one reads.
            x.record_stream(stream)
            return x

        return self.factors.each(kept)


class Travelling:
    """What a `Preconditioner` is to its module, for one whose factors travel at every use."""

    def __init__(self, factors: Preconditioner) -> None:
        self.pinned = factors.each(Tensor.pin_memory)
        self.transfer: Transfer | None = None
        self.follower: weakref.ref[Travelling] | None = None

    def at(self, device: torch.device) -> Preconditioner:
        """The factors on `device`; those of the module that is likely to be next depart."""
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
