"""Where a model's weights are: on one device, on several, offloaded, or sharded over processes."""

import sys
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import listed
from ..errors import ArgumentError, ModelError
from .spread import is_spread, offloaded


def usual_device() -> torch.device:
    """Where models are whose place nobody has named: on a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def refuse_compiled(model: nn.Module) -> None:
    """Refuse what torch.compile has made: its layers do not run as modules."""
    for name, module in model.named_modules():
        compiled = type(module).__name__ == "OptimizedModule"
        if compiled or getattr(module, "_compiled_call_impl", None) is not None:
            raise ModelError(
                f"{name or type(model).__name__} is compiled (torch.compile): what its layers read "
                "is not to be seen. Give the model as it was before"
            )


def check_weights(model: nn.Module) -> None:
    """Refuse a model without weights, compiled, or whose weights are where a pass cannot find
    them.
    """
    if next(model.parameters(), None) is None:
        raise ArgumentError(f"model is a {type(model).__name__} without parameters")
    refuse_compiled(model)
    there = offloaded(model)
    for name, weight in model.named_parameters():
        if weight.is_meta and name not in there:
            raise ArgumentError(
                f"weight {name} is on the meta device (never loaded, or offloaded by other hooks "
                "than accelerate's): load the model with its weights"
            )
        if is_shard(weight) and not _is_fsdp(model):
            raise ArgumentError(
                f"weight {name} lies in several processes, but the model is not sharded by "
                "fully_shard: a tensor-parallel model's (tp_plan) layers compute parts of W x. "
                "Load it whole and use fully_shard (--shard)"
            )
    if getattr(model, "_tp_size", None) not in (None, 1):
        raise ArgumentError(
            f"the model lies in {model._tp_size} processes: a tensor-parallel model's (tp_plan) "
            "layers compute parts of W x. Load it whole and use fully_shard (--shard)"
        )
    devices = {str(p.device) for p in model.parameters() if not p.is_meta}
    if len(devices) > 1 and "hf_device_map" not in vars(model):
        raise ArgumentError(
            f"the model's weights lie on {', '.join(sorted(devices))}: put it on one device, "
            "spread it by a device_map (--device-map auto), or shard it over processes "
            "(fully_shard; --shard)"
        )


def check_changeable(model: nn.Module, weights: Iterable[Tensor], what: str) -> None:
    """ArgumentError where weights that `what` changes are offloaded: every pass brings them as they
    were.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    if away := [names[id(w)] for w in weights if w.is_meta]:
        raise ArgumentError(
            f"{what} changes weights of the model, and {listed(away, 2)} are offloaded: every pass "
            "brings them as they were. Load the model on one device"
        )


def held_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The names and values of `state_dict`, by name: a pass may put a parameter in anew, behind the
    others (peft's `target_parameters`). What is offloaded is read, what is sharded gathered, one
    after the other.
    """
    there = offloaded(model)
    for name, weight in sorted(model.state_dict().items(), key=itemgetter(0)):
        if name in there:
            weights, own = there[name]
            yield name, weights[own]
        else:
            yield name, whole_tensor(weight).detach()


def resident_bytes(model: nn.Module) -> int:
    """Of the device that has most of them, bytes of the weights that stay there."""
    sizes: dict[torch.device, int] = {}
    for p in model.parameters():
        sizes[p.device] = sizes.get(p.device, 0) + p.numel() * p.element_size()
    sizes.pop(torch.device("meta"), None)
    return max(sizes.values(), default=0)


def lets_go(model: nn.Module) -> str | None:
    """Why a pass cannot be differentiated twice, or None."""
    if is_sharded(model):
        return (
            "the model is sharded over processes: it lets go of its weights after one backward pass"
        )
    if is_spread(model):
        return "the model is spread by a device_map: its weights are not there, or not together"
    return None


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


def _is_fsdp(model: nn.Module) -> bool:
    there = sys.modules.get("torch.distributed.fsdp")
    return there is not None and any(isinstance(x, there.FSDPModule) for x in model.modules())
