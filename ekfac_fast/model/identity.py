"""What tells a model, and a task, from another."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..store.fingerprint import fingerprint
from .tasks import Task
from .weights import held_tensors

# Of a configuration: where it was read, by whom, and what does not change a pass.
UNTOLD = frozenset(
    {
        "_name_or_path", "transformers_version", "_commit_hash", "use_cache",
        "architectures", "dtype", "torch_dtype",  # written by save_pretrained
    }
)  # fmt: skip


def model_fingerprint(model: nn.Module) -> str:
    """Identifies the weights and the configuration: every name, shape and value."""

    def parts() -> Iterator[Any]:
        tell = getattr(getattr(model, "config", None), "to_dict", None)
        if callable(tell):
            yield repr(sorted((k, v) for k, v in tell().items() if k not in UNTOLD))
        yield from held_tensors(model)

    return fingerprint(parts())


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
