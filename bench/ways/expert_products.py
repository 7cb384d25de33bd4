"""Products by W[e] of a model's experts, as its own code makes them: no hook of ours."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ekfac_fast.model.layers import Layer

PRODUCTS = {nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__}


def own(model: nn.Module, layer: Layer) -> list[nn.Parameter]:
    """Parameters of one layer; of an expert, those of all."""
    module = model.get_submodule(layer.module)
    if layer.expert is None:
        return list(module.parameters(recurse=False))
    name = layer.name.removeprefix(f"{layer.module}.").split(".")[0]
    return [p for n, p in module.named_parameters() if n in (name, f"{name}_bias")]


class Slices(TorchFunctionMode):
    """Products by W[e] of parameters [E,O,I]: which slice each W is, noted where it is taken."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        seen: dict[str, list[tuple[Tensor, Tensor]]],
    ) -> None:
        super().__init__()
        self.names = {(id(own(model, x)[0]), x.expert): x.name for x in layers}
        self.parameters = {parameter for parameter, _ in self.names}
        self.seen = seen

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """One call of a function of torch."""
        if func is torch.bmm and id(args[1]) in self.parameters:
            return self._by_expert(*args)
        result = func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__ and id(args[0]) in self.parameters:
            result.taken_from = self.names.get((id(args[0]), int(args[1])))
        elif func in PRODUCTS and (name := getattr(args[1], "taken_from", None)):
            self.seen[name].append((args[0].detach().clone(), result))
        return result

    def _by_expert(self, x: Tensor, W: Tensor) -> Tensor:
        """x [E,N,I] W [E,I,O] of Llama 4, whose rows of other experts' tokens are zeros."""
        parts = []
        for e, rows in enumerate(x):
            there = rows.any(-1).nonzero()[:, 0]
            a = rows[there]
            y = a @ W[e]
            if (name := self.names.get((id(W), e))) and len(there):
                self.seen[name].append((a.detach().clone(), y))
            parts.append(rows.new_zeros(len(rows), W.shape[-1]).index_put((there,), y))
        return torch.stack(parts)
