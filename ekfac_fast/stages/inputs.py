"""What a run reads as it goes and does not copy: weights, and files that data is mapped from."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from ..data.mapped import MappedTokens
from ..errors import DataError, ModelError

# Values of a weight that are compared: a file that is written over, and training, change them all.
GLIMPSED = 1024


class Inputs:
    """A model and a data set as a run begins with them.

    A weights file that is mapped into memory (`from_pretrained` maps its own) changes the model
    when it is written over, as does another thread that trains it.
    """

    def __init__(self, model: nn.Module, dataset: Any) -> None:
        self.model = model
        self._weights = _glimpses(model)
        while isinstance(dataset, Subset):
            dataset = dataset.dataset
        parts = dataset.parts if isinstance(dataset, MappedTokens) else ()
        self._files = {x.path: _state(x.path) for x in parts if x.path is not None}

    def check(self) -> None:
        """Refuse what was computed if they are others now.

        Raises:
            ModelError, DataError: the weights or a file have changed since; names it.
        """
        for name, now in _glimpses(self.model).items():
            was = self._weights.get(name)
            if was is not None and not torch.equal(was, now):
                raise ModelError(
                    f"the model's {name} has changed while it was run: its file was written over, "
                    "or it was trained. Load it again, and run into a new folder"
                )
        for path, then in self._files.items():
            if _state(path) != then:
                raise DataError(
                    f"{path} has changed while it was read: run again, into a new folder, and "
                    "write changed data under another name"
                )


def _glimpses(model: nn.Module) -> dict[str, Tensor]:
    """Some values of every weight that is there, by name."""
    found = {}
    for name, weight in model.named_parameters():
        local = getattr(weight, "to_local", None)  # of a weight that is sharded
        own = (local() if callable(local) else weight).detach()
        if type(own) in (Tensor, nn.Parameter) and not own.is_meta and own.numel():
            flat = own.reshape(-1) if own.is_contiguous() else own[0].reshape(-1)
            some = flat[:: max(1, flat.numel() // GLIMPSED)].clone()
            found[name] = some.view(torch.uint8)  # NaN, too, is what it was
    return found


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
