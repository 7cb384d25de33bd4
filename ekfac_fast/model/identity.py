"""What tells a model, and a task, from another."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..store.fingerprint import fingerprint
from .products import LIBRARIES, of_library, own_forward
from .tasks import Task
from .weights import held_tensors

# Of a configuration: where it was read, by whom, and what does not change a pass.
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
            yield repr(sorted((k, v) for k, v in tell().items() if k not in UNTOLD))
        yield from held_tensors(model)
        yield from map(repr, _behaviour(model))

    return fingerprint(parts())


def _behaviour(model: nn.Module) -> Iterator[tuple]:
    """What modules do beside their weights: of those without any their class and what it prints; of
    classes that are no library's, switches, numbers (whole ones may be counts) and words; adapters
    in force; forward passes and hooks of a user's.
    """
    for name, module in model.named_modules():
        # Sharding makes a class of its own of every module's.
        kind = next(c for c in type(module).__mro__ if not c.__name__.startswith("FSDP"))
        if next(module.parameters(), None) is None and not isinstance(module, SILENT):
            yield name, kind.__qualname__, module.extra_repr()
        if kind.__module__.partition(".")[0] not in LIBRARIES:
            own = {k: x for k, x in vars(module).items() if not k.startswith("_")}
            told = {k: x for k, x in own.items() if isinstance(x, bool | float | str)}
            yield name, *sorted((k, x) for k, x in told.items() if k != "training")
        if isinstance(merged := getattr(module, "merged_adapters", None), list):  # peft's
            tuner: Any = module
            scaling = getattr(module, "scaling", {})
            active = [(x, scaling.get(x)) for x in tuner.active_adapters]
            yield name, active, bool(tuner.disable_adapters), merged
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        for call in (own_forward(module), *(x for x in hooks if not of_library(x))):
            if call is not None:
                yield name, getattr(call, "__qualname__", type(call).__qualname__)


def forward_state(model: nn.Module) -> tuple:
    """What changes a model's own forward pass and is no weight: hooks, another `forward`."""
    own = vars(model).get("forward")
    return (*model._forward_hooks, None, *model._forward_pre_hooks, None, id(own))


def task_state(task: Task) -> dict[str, str]:
    """A task's own values that can be told apart, but for what it counts itself."""
    state = {}
    for name, value in getattr(task, "__dict__", {}).items():
        if name == "_edges":
            continue
        try:
            state[name] = fingerprint(value)
        except TypeError:
            state[name] = type(value).__qualname__
    return state
