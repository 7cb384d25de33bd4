"""Models whose modules lie on several devices, or wait in memory and files until they run: what
accelerate makes of a `device_map`.

Its hooks carry activations from device to device, and bring an offloaded module's weights for the
time of its forward pass. What they are is read here from the hooks themselves.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Where an offloaded weight waits: a mapping, and its name there.
Waits = tuple[Mapping[str, Tensor], str]


def is_spread(model: nn.Module) -> bool:
    """Whether weights lie on several devices, or some wait elsewhere."""
    devices = {p.device for p in model.parameters() if not p.is_meta}
    return len(devices) > 1 or any(True for _ in offloading(model))


def offloading(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """(name, module, hook) of every module whose weights come for its forward pass alone."""
    for name, module in model.named_modules(remove_duplicate=False):
        hook: Any = vars(module).get("_hf_hook")  # a module takes long to say that it has none
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "offload", False) and one.weights_map is not None:
                yield name, module, one


def offloaded(model: nn.Module) -> dict[str, Waits]:
    """Where every offloaded weight waits, by its name in the model."""
    found: dict[str, Waits] = {}
    for name, module, hook in offloading(model):
        for own, _ in module.named_parameters(recurse=hook.place_submodules):
            found[f"{name}.{own}" if name else own] = hook.weights_map, own
    return found


def device_of(model: nn.Module, name: str = "") -> torch.device:
    """Where a module computes: where its first weight lies, or will when it comes."""
    module = model.get_submodule(name)
    first = next(module.parameters())
    if not first.is_meta:
        return first.device
    for _, owner, hook in offloading(model):
        if any(p is first for p in owner.parameters(recurse=hook.place_submodules)):
            return torch.device(hook.execution_device)
    return first.device


def tied(model: nn.Module) -> dict[str, str]:
    """Of a model that is spread, parameters that are another: tied ones are then copies, which
    only the model's own list tells.
    """
    return dict(getattr(model, "all_tied_weights_keys", None) or {}) if is_spread(model) else {}


@contextmanager
def let_go(model: nn.Module) -> Iterator[None]:
    """An offloaded weight that a backward pass needs is brought again, not kept from the forward
    pass on: no more of them are there at a time than one module's.
    """
    waiting = offloaded(model)
    if not waiting:
        yield
        return
    held = [(*name.rpartition(".")[::2], waits) for name, waits in waiting.items()]
    owners = [(model.get_submodule(name), own, waits) for name, own, waits in held]

    def pack(x: Tensor) -> Any:
        if x.requires_grad or x.is_meta:
            return x
        place = x.untyped_storage().data_ptr()
        for module, own, (weights, name) in owners:
            weight = module._parameters[own]
            assert weight is not None
            if not weight.is_meta and weight.untyped_storage().data_ptr() == place:
                return weights, name, x.device, (x.shape, x.stride(), x.storage_offset())
        return x

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        weights, name, device, shape = kept
        found: Tensor = weights[name].to(device).as_strided(*shape)
        return found

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
