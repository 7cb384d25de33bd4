"""What tells a model, and a task, from another."""

import dis
import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..store.fingerprint import fingerprint
from .products import LIBRARIES, of_library, own_forward
from .tasks import Task
from .weights import held_tensors

# Of a configuration: where it was read, by whom, and what does not change a pass. (Nor does
# `problem_type`, which a first pass with labels writes: tasks know of it.)
UNTOLD = frozenset(
    {
        "_name_or_path", "transformers_version", "_commit_hash", "use_cache",
        "architectures", "dtype", "torch_dtype",  # written by save_pretrained
    }
)  # fmt: skip


# In evaluation mode they do nothing.
SILENT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity)


def model_fingerprint(model: nn.Module) -> str:
    """Identifies the weights and the configuration, every name, shape and value; and what else a
    pass depends on, as far as it can be told: activations, adapters in force, hooks.
    """

    def parts() -> Iterator[Any]:
        tell = getattr(getattr(model, "config", None), "to_dict", None)
        if callable(tell):
            told = {k: v for k, v in tell().items() if k not in UNTOLD}
            if "problem_type" in told:
                told["problem_type"] = None
            yield repr(sorted(told.items()))
        yield from held_tensors(model)
        yield from map(repr, _behaviour(model))

    return fingerprint(parts())


def _behaviour(model: nn.Module) -> Iterator[tuple]:
    """What modules do beside their weights: of those without any their class and what it prints; of
    classes that are no library's, switches, numbers, words and tensors that no pass changes;
    adapters in force; forward passes and hooks of a user's.
    """
    classes: list[Any] = [type(module) for module in model.modules()]
    changing = frozenset({"training"}).union(*map(_reassigned, classes))
    for name, module in model.named_modules():
        # Sharding makes a class of its own of every module's.
        kind = next(c for c in type(module).__mro__ if not c.__name__.startswith("FSDP"))
        if next(module.parameters(), None) is None and not isinstance(module, SILENT):
            yield name, kind.__qualname__, module.extra_repr()
        if kind.__module__.partition(".")[0] not in LIBRARIES:
            own = {k: x for k, x in vars(module).items() if not k.startswith("_")}
            own |= {k: getattr(module, k) for k in module._non_persistent_buffers_set}
            told = {k: x for k, x in own.items() if k not in changing and _is_plain(x)}
            yield name, *((k, fingerprint(told[k])) for k in sorted(told))
        if isinstance(merged := getattr(module, "merged_adapters", None), list):  # peft's
            tuner: Any = module
            scaling = getattr(module, "scaling", {})
            active = [(x, scaling.get(x)) for x in tuner.active_adapters]
            yield name, active, bool(tuner.disable_adapters), merged
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        for call in (own_forward(module), *(x for x in hooks if not of_library(x))):
            if call is not None:
                yield name, getattr(call, "__qualname__", type(call).__qualname__)


def _is_plain(x: Any) -> bool:
    """Whether an attribute is a value: no module, nothing that is filled as it goes."""
    if isinstance(x, tuple):
        return all(map(_is_plain, x))
    if isinstance(x, Tensor):
        return not x.is_meta
    return x is None or isinstance(x, bool | int | float | str)


@functools.cache
def _reassigned(kind: type[Any]) -> frozenset[str]:
    """Attributes that other methods than `__init__` assign: counts, caches, what was seen last."""
    found = set[str]()
    for owner in kind.__mro__:
        if owner.__module__.partition(".")[0] in (*LIBRARIES, "builtins"):
            continue
        codes = [_code(x) for name, x in vars(owner).items() if name != "__init__"]
        while codes:
            if (code := codes.pop()) is None:
                continue
            codes += [x for x in code.co_consts if isinstance(x, types.CodeType)]
            stored = (x for x in dis.get_instructions(code) if x.opname == "STORE_ATTR")
            found |= {x.argval for x in stored}
            if {"register_buffer", "setattr"} & {*code.co_names}:
                found |= {x for x in code.co_consts if isinstance(x, str)}
    return frozenset(found)


def _code(member: Any) -> types.CodeType | None:
    """Of a method, whatever decorates it."""
    member = getattr(member, "fget", getattr(member, "__func__", member))
    found = getattr(inspect.unwrap(member) if callable(member) else None, "__code__", None)
    return found if isinstance(found, types.CodeType) else None


def switches(model: nn.Module) -> dict[str, Any]:
    """What modules' attributes say of how they compute, by name: truths and words."""
    return {
        f"{name}.{key}".lstrip("."): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | str) and key != "training"
    }


def forward_state(model: nn.Module) -> tuple:
    """What changes a model's own forward pass and is no weight: hooks, another `forward`."""
    own = vars(model).get("forward")
    return (*model._forward_hooks, None, *model._forward_pre_hooks, None, id(own))


def task_state(task: Task) -> dict[str, str]:
    """A task's own values that can be told apart, but for what it counts itself."""
    return {
        name: fingerprint(described(value))
        for name, value in getattr(task, "__dict__", {}).items()
        if name != "_edges"
    }


def described(value: Any, depth: int = 3) -> Any:
    """A value as `fingerprint` takes it: functions by their code and what they hold, modules by
    their weights and settings, others that cannot be told apart by their class.
    """

    def inside(x: Any) -> Any:
        return described(x, depth - 1)

    try:
        fingerprint(value)
    except TypeError:
        pass
    else:
        return value
    kind = type(value).__qualname__
    if not depth:
        return kind
    if isinstance(value, nn.Module):
        own = {k: x for k, x in vars(value).items() if not k.startswith("_") and k != "training"}
        return kind, inside(own), dict(value.state_dict()), [*map(inside, value.children())]
    if isinstance(value, functools.partial):
        return kind, inside(value.func), inside(value.args), inside(value.keywords)
    if isinstance(value, types.MethodType):
        return kind, inside(value.__func__)
    if isinstance(value, types.FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        return kind, inside(value.__code__), inside(held), inside(value.__defaults__)
    if isinstance(value, types.CodeType):
        return value.co_code, value.co_names, [*map(inside, value.co_consts)]
    if isinstance(value, Mapping):
        return {str(k): inside(x) for k, x in value.items()}
    if isinstance(value, list | tuple):
        return [*map(inside, value)]
    return kind
