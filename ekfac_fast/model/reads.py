"""Whether a tracked weight is multiplied outside of its own module: that product's gradient is not
seen.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import ModelError

PRODUCTS = {
    F.linear, torch.addmm, torch.baddbmm, torch.bmm, torch.einsum, torch.matmul, torch.mm,
    Tensor.__matmul__, Tensor.__rmatmul__, Tensor.addmm, Tensor.bmm, Tensor.matmul, Tensor.mm,
}  # fmt: skip
# Where a tensor lies, and how much of it there is.
Place = tuple[int, int]


class Reads(TorchFunctionMode):
    """Counts products with the weights of modules while it is entered.

    Weights are known by where they lie, so that one that is transposed or reshaped is known, too.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.products: Counter[Place] = Counter()
        self._names: dict[Place, list[str]] = {}
        for name, module in modules.items():
            if place := _place(module.weight):
                self._names.setdefault(place, []).append(name)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """One call of a function of torch."""
        if func in PRODUCTS and not torch._C._are_functorch_transforms_active():
            places = map(_place, _tensors((*args, *(kwargs or {}).values())))
            self.products.update(place for place in places if place in self._names)
        return func(*args, **(kwargs or {}))

    def check(self, uses: Mapping[str, int]) -> None:
        """Refuse a layer whose weight was in more products than its module made, by name.

        Raises:
            ModelError: names the layer.
        """
        for place, names in self._names.items():
            made = sum(uses.get(name, 0) for name in names)
            if (found := self.products[place]) > made:
                raise ModelError(
                    f"layer {names[0]}: its weight is in {found} products of a forward pass, of "
                    f"which the module makes {made}: the gradient of the others is not seen. Leave "
                    "it out of `layers`"
                )


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    """Those of an argument list, and of lists in it."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from (y for y in x if isinstance(y, Tensor))


def _place(x: Any) -> Place | None:
    """None of a tensor without memory of its own."""
    if type(x) not in (Tensor, nn.Parameter) or x.is_meta or not x.numel():
        return None
    return x.data_ptr(), x.numel()
