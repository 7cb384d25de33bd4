"""Adapters as peft puts them into a model: which layers they are made of."""

import sys
import warnings
from collections.abc import Collection

from torch import nn

from ..checks import listed
from ..errors import ArgumentError, Notice


def adapter_layers(model: nn.Module, layers: Collection[str]) -> list[str] | None:
    """Which of these layers are of the active adapters or of modules saved with them; None of a
    model without adapters.

    Raises:
        ArgumentError: an adapter is made of other things.
    """
    # No module of peft's can exist before peft is imported.
    if "peft" not in sys.modules:
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    found: list[str] = []
    others: dict[str, int] = {}
    wrapped: list[str] = []
    kinds: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            kinds.add(type(module).__module__.split(".")[2])
            parts = [*module.adapter_layer_names]
            if type(module).__name__ == "ParamWrapper":
                wrapped.append(name)  # of a parameter itself: nothing of it runs as a layer
                continue
        elif isinstance(module, ModulesToSaveWrapper):
            parts = ["modules_to_save"]
        else:
            continue
        active = module.active_adapters
        tuned = [f"{name}.{part}.{adapter}" for part in parts for adapter in active]
        own = [x for x in layers if any(x == t or x.startswith(f"{t}.") for t in tuned)]
        found += own
        for n, p in module.named_parameters(prefix=name):
            part = any(n == t or n.startswith(f"{t}.") for t in tuned)
            if part and not {n, n.rpartition(".")[0]} & {*own}:
                others[n] = p.numel()
    configs = getattr(model, "peft_config", None) or {}
    kinds |= {x.peft_type.value.lower() for x in configs.values() if x.is_prompt_learning}
    if not kinds:
        return None
    if not found:
        raise ArgumentError(
            f"layers: the model has an adapter ({listed(sorted(kinds))}) without a layer that "
            "can be tracked, and its frozen base is no default. Name the layers you want"
        )
    for name in wrapped:
        module = model.get_submodule(name)
        others |= {n: p.numel() for n, p in module.named_parameters(prefix=name) if ".lora_" in n}
    others |= _biases(model, {getattr(x, "bias", "none") for x in configs.values()}, found)
    if others:
        warnings.warn(
            f"{sum(others.values()):,} parameters of the adapter are no linear layers "
            f"({listed(list(others), 2)}) and are not tracked",
            Notice,
            stacklevel=5,
        )
    return found


def _biases(model: nn.Module, trained: Collection[str], tracked: Collection[str]) -> dict[str, int]:
    """The base's biases that train with an adapter, by peft's names for which: "all" of them,
    "none", or those of the layers that it is put into.
    """
    if not {*trained} - {"none"}:
        return {}
    which = ".bias" if "all" in trained else ".base_layer.bias"
    return {
        name: p.numel()
        for name, p in model.named_parameters()
        if name.endswith(which) and name.rpartition(".")[0] not in tracked
    }
