"""Where a model's weights are: on one device, or sharded over processes."""

import sys
from typing import Any

from torch import Tensor, nn

from ..errors import ArgumentError


def check_weights(model: nn.Module) -> None:
    """Refuse a model without weights, or whose weights are not in memory."""
    if next(model.parameters(), None) is None:
        raise ArgumentError(f"model is a {type(model).__name__} without parameters")
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise ArgumentError(
                f"weight {name} is on the meta device (offloaded, or never loaded): load the model "
                "with all of its weights in memory"
            )
    if len(devices := {str(p.device) for p in model.parameters()}) > 1:
        raise ArgumentError(
            f"the model's weights lie on {', '.join(sorted(devices))}: put it on one device, or "
            "shard it over processes (fully_shard; --shard)"
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights lie in several processes: a pass is then one of all of them together."""
    return any(map(_is_shard, model.parameters()))


def whole_tensor(x: Tensor) -> Tensor:
    """A tensor whose shards lie in several processes, gathered in each; any other as it is."""
    whole: Any = x
    return whole.full_tensor() if _is_shard(x) else x


def _is_shard(x: Tensor) -> bool:
    # Its import takes a second, and who has a DTensor has imported it.
    there = sys.modules.get("torch.distributed.tensor")
    return there is not None and isinstance(x, there.DTensor)
