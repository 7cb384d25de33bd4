"""Results that layers leave on the device, brought to the CPU together."""

from collections.abc import Hashable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Name = TypeVar("Name", bound=Hashable)
# Bytes that gather on a device before they are brought in.
GATHERED = 1 << 30


class Outgoing(Generic[Name]):
    """Tensors of a batch by name, on their way to the CPU.

    They come a gigabyte at a time, each dtype in one copy: the host waits for the device once, not
    at every tensor, and the device has the next layer's work meanwhile.
    """

    def __init__(self) -> None:
        self._there: dict[Name, Tensor] = {}
        self._here: dict[Name, Tensor] = {}
        self._bytes = 0

    def __setitem__(self, name: Name, x: Tensor) -> None:
        if x.device.type == "cpu":
            self._here[name] = x
            return
        self._there[name] = x
        self._bytes += x.nbytes
        if self._bytes > GATHERED:
            self._bring()

    def __getitem__(self, name: Name) -> Tensor:
        """A tensor, wherever it is."""
        return self._there[name] if name in self._there else self._here[name]

    def take(self) -> dict[Name, Tensor]:
        """Every tensor, on the CPU; nothing is left."""
        self._bring()
        here, self._here = self._here, {}
        return here

    def _bring(self) -> None:
        alike: dict[tuple[torch.device, torch.dtype], dict[Name, Tensor]] = {}
        for name, x in self._there.items():
            alike.setdefault((x.device, x.dtype), {})[name] = x
        self._there, self._bytes = {}, 0
        for some in alike.values():
            values = torch.cat([x.flatten() for x in some.values()]).cpu()
            parts = values.split([x.numel() for x in some.values()])
            for (name, x), part in zip(some.items(), parts, strict=True):
                self._here[name] = part.view(x.shape)
