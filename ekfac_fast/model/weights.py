"""Where a model's weights are: on one device, or sharded over processes."""

import sys
from typing import Any

import torch
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


def computes_in(model: nn.Module) -> torch.dtype:
    """The dtype of a model's passes: of its first weight that is not packed into integers."""
    dtypes = [p.dtype for p in model.parameters()]
    return next((x for x in dtypes if x.is_floating_point), torch.float32)


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights lie in several processes: a pass is then one of all of them together."""
    return any(map(is_shard, model.parameters()))


def whole_tensor(x: Tensor) -> Tensor:
    """A tensor whose shards lie in several processes, gathered in each; any other as it is."""
    whole: Any = x
    return whole.full_tensor() if is_shard(x) else x


def is_shard(x: Tensor) -> bool:
    """Whether a tensor is a part of one that lies in several processes."""
    # Its import takes a second, and who has a DTensor has imported it.
    there = sys.modules.get("torch.distributed.tensor")
    return there is not None and isinstance(x, there.DTensor)


def is_packed(weight: Any) -> bool:
    """Whether a weight is no matrix of numbers: of integers (bitsandbytes), or a tensor that holds
    others (torchao).
    """
    if not isinstance(weight, Tensor):
        return False
    wraps = hasattr(weight, "__tensor_flatten__") and not is_shard(weight)
    packed = getattr(weight, "quant_state", None) is not None
    return packed or wraps or not weight.is_floating_point()
