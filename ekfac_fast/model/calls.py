"""What one pass through a model has seen: inputs, gradients, who shares an input with whom."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .experts import Routing
from .layers import Layer
from .products import is_plain, seems_product
from .rows import Grid


class Calls:
    """What one pass has seen so far."""

    def __init__(
        self, consume: Callable[[Any], None], grid: Grid | None, layers: Mapping[str, Layer]
    ) -> None:
        self.layers = layers
        self.consume, self.grid, self.backward = consume, grid, False
        self.loss, self.losses = 0, 1
        self._late: set[str] = set()
        # Uses that multiplied by W^T, and not by W: of embeddings.
        self.turned: set[tuple[str, int]] = set()
        self._looked_at: set[nn.Module] = set()
        self.inputs: dict[str, list[Tensor]] = {}
        self.modules: dict[str, nn.Module] = {}
        self.gradients: dict[str, dict[int, Tensor]] = {}
        # Calls of modules of experts, and for each use of an expert its call.
        self.routes: dict[str, list[Routing]] = {}
        self.routed: dict[str, list[Routing]] = {}
        self.without_grad: set[str] = set()
        # Layers to be run again, in a graph that starts with their input.
        self.unstarted: set[str] = set()
        self.consumed: set[str] = set()
        # Of every use the output's size, dtype and device.
        self._outputs: dict[str, list[tuple[torch.Size, torch.dtype, torch.device]]] = {}
        self._versions: dict[str, list[tuple[Tensor, int]]] = {}
        self._checks: list[tuple[str, str, Tensor]] = []
        self._first: dict[tuple[int, int, bool], str] = {}
        self._shared: dict[str, str] = {}
        self._groups: dict[str, str] | None = None
        self._sizes: Counter[str] = Counter()

    def check(self, layer: Layer, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """Look whether a layer of a class of its own computes W x + b; `settle` refuses it."""
        if module in self._looked_at or is_plain(module) or not x.numel():
            return
        self._looked_at.add(module)
        computes = seems_product(module, x, output, layer.I, layer.O)
        self._checks.append((layer.name, type(module).__name__, computes))

    def settle(self) -> None:
        """Refuse a layer that was seen to compute something else than W x + b.

        Of all layers at once: the host waits for the device once.
        """
        checks, self._checks = self._checks, []
        if not checks:
            return
        device = checks[-1][2].device
        found = torch.stack([computes.to(device) for _, _, computes in checks])
        for (name, kind, _), computes in zip(checks, found.tolist(), strict=True):
            if not computes:
                raise ModelError(
                    f"layer {name} ({kind}) does not compute W x + b of its own weight and bias; "
                    "leave it out of `layers`"
                )

    def saw(
        self,
        layer: Layer,
        module: nn.Module,
        x: Tensor,
        output: Tensor,
        copy: bool,
        routing: Routing | None = None,
    ) -> None:
        """Note one use of a layer."""
        name = layer.name
        self.modules[name] = module
        if routing is not None:
            self.routed.setdefault(name, []).append(routing)
        if layer.kind == "linear" and isinstance(module, nn.Embedding):
            self.turned.add((name, len(self.inputs.get(name, ()))))
        self._versions.setdefault(name, []).append((x, x._version))
        self.inputs.setdefault(name, []).append(x.detach().clone() if copy else x.detach())
        told = output.shape, output.dtype, output.device
        self._outputs.setdefault(name, []).append(told)
        # Tensors in `_versions` stay alive until the pass ends, so ids are unique.
        key = id(x), x._version, layer.bias
        # Others read a tensor each in a way of its own.
        first = self._first.setdefault(key, name) if layer.kind == "linear" else name
        self._shared[name] = name if copy else first
        self._groups = None

    def owner(self, name: str) -> tuple[str, int]:
        """The layer that a layer shares its input with, and how many do; of several uses none."""
        if self._groups is None:
            self._groups = {
                n: o for n, o in self._shared.items() if not self._again(n) and not self._again(o)
            }
            self._sizes = Counter(self._groups.values())
        owner = self._groups.get(name, name)
        return owner, max(1, self._sizes[owner])

    def _again(self, name: str) -> bool:
        return len(self._outputs[name]) > 1

    def zero(self, name: str, use: int) -> Tensor:
        """The gradient of an output that reaches no loss: one number, in the output's shape."""
        shape, dtype, device = self._outputs[name][use]
        return torch.zeros((), dtype=dtype, device=device).expand(shape)

    def changed_in_place(self) -> set[str]:
        """Layers whose input is no longer what they read."""
        changed = {
            name
            for name, seen in self._versions.items()
            if any(x._version != version for x, version in seen)
        }
        self._versions.clear()
        return changed

    def begin(self, loss: int) -> None:
        """The backward pass of one of the losses; nothing has arrived yet."""
        if not self.backward:
            # Layers that run in the backward pass only: once more in each.
            self._late = self.without_grad - self.inputs.keys()
        self.backward, self.loss = True, loss
        self.consumed.clear()
        self.gradients.clear()
        for name in self._late:
            for seen in (self.inputs, self._outputs, self._shared, self.routed):
                seen.pop(name, None)
            self.routes.pop(self.layers[name].module, None)
        self._groups = None
        self._first = {k: name for k, name in self._first.items() if name not in self._late}

    @property
    def last(self) -> bool:
        """Whether no other loss follows."""
        return self.loss == self.losses - 1

    def release(self, name: str) -> None:
        """Drop what a layer has read, once no loss asks for it."""
        if self.last:
            self.inputs[name] = []


def given(args: tuple, kwargs: dict) -> Tensor:
    """What a module was called with."""
    return args[0] if args else next(iter(kwargs.values()))


def read_by(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    """What a layer reads, [...,I]; of an embedding, ids as rows of one 1, [...,O].

    An embedding looks up y = W^T x of such rows x, so its gradient is x g^T: of a layer W with the
    same weight, x stands where gradients stand, and the gradient of y where inputs do.
    """
    x = given(args, kwargs)
    if not isinstance(module, nn.Embedding):
        return x
    rows = output.new_zeros(*x.shape, module.num_embeddings).scatter_(-1, x.unsqueeze(-1), 1)
    if module.padding_idx is not None:
        rows[..., module.padding_idx] = 0
    return rows.detach()


def inputs_of(model: nn.Module, names: list[str], run: Callable[[], Any]) -> dict[str, Tensor]:
    """Inputs of the last use of modules in a forward pass."""
    found: dict[str, Tensor] = {}

    def hook_of(name: str) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict, __: Any) -> None:
            found[name] = given(args, kwargs).detach().clone()

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(hook_of(name), with_kwargs=True)
        for name in names
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found
