"""Where the sequences of a batch are in the rows of every layer, found out once."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError
from . import experts, kinds
from .calls import Calls, inputs_of
from .layers import Layer
from .rows import ONE_BY_ONE, Grid, Layout, arranged, probed, trusted

# Two forward passes over the same two examples, in one order and in the other.
Swap = Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]


class Layouts:
    """The layouts of a model's tracked layers, by name; of experts by their module's.

    Args:
        swap: asked where a shape leaves open which axis holds the sequences.
        believed: what a shape tells is taken for true; else it is tried by `swap`, too.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, Layer], swap: Swap | None, believed: bool
    ) -> None:
        self.model, self.layers = model, layers
        self._swap, self._believed = swap, believed or swap is None
        self._known: dict[str, Layout] = {}

    def by_sequence(self, name: str, x: Tensor, features: int, grid: Grid | None) -> Tensor:
        """[B,T,F] of a layer's input or gradient, by example."""
        if grid is None:
            return arranged(name, x, features, None, None)
        layout = self._known.get(name) or trusted(tuple(x.shape[:-1]), grid)
        return grid.folded(arranged(name, x, features, grid, layout))

    def resolve(self, calls: Calls, grid: Grid) -> None:
        """Know the layouts of all layers, after a forward pass over a batch.

        Raises:
            ModelError: one cannot be told; names the layer.
        """
        told: dict[str, Layout] = {}
        unknown: dict[str, list[int]] = {}
        late = {name for name, x in self.layers.items() if x.expert is None} - calls.inputs.keys()
        for name in late - self._known.keys():
            unknown[name] = []  # to run in the backward pass only: nothing is known of it
        # The last use: DoRA's matrices run on an identity first, for their norm.
        shapes = {
            name: tuple(kinds.as_rows(self.layers[name], uses[-1]).shape)
            for name, uses in calls.inputs.items()
            if self.layers[name].expert is None
        }
        # Of experts it is the rows that they share out.
        shapes |= {name: tuple(routes[0].shape) for name, routes in calls.routes.items()}
        for name, size in shapes.items():
            leading = size[:-1]
            if name in self._known and self._known[name].fits(leading, grid):
                continue
            known = trusted(leading, grid)
            if known is not None:
                told[name] = known
            if known is None or not self._believed:
                unknown[name] = list(size)
            else:
                self._known[name] = known
        if unknown:
            self._probe(unknown, told, grid)
        self._check_alone(shapes, grid)

    def _probe(
        self, unknown: Mapping[str, list[int]], told: Mapping[str, Layout], grid: Grid
    ) -> None:
        """Run two examples in one order and in the other; `told` is what the shapes say."""
        if self._swap is None:
            first, shape = next(iter(unknown.items()))
            raise ModelError(
                f"layer {first}: its input is {shape} for {grid.sequences} sequences of "
                f"{grid.positions} positions; which rows belong to which sequence cannot be told"
            )
        of = {n: self._module(n) for n in unknown}
        one, other = (inputs_of(self.model, [*of.values()], run) for run in self._swap())
        for name, shape in unknown.items():
            there, back = (self._rows(name, found.get(of[name])) for found in (one, other))
            expected = told.get(name)
            if expected is None or (there is not None and back is not None):
                self._known[name] = probed(name, there, back, shape, expected)
            else:
                self._known[name] = expected

    def _check_alone(self, shapes: Mapping[str, tuple[int, ...]], grid: Grid) -> None:
        """Refuse a batch whose examples have other numbers of rows in the same axis (images of
        several sizes): which are whose is not told by their sum.
        """
        merged = {name: self._known[name] for name in shapes if self._known[name].rows > 1}
        if not merged or grid.positions is not None or grid.alone is None:
            return
        of = [self._module(name) for name in merged]
        for number in range(grid.sequences):
            found = inputs_of(self.model, of, partial(grid.alone, number))
            for name, layout in merged.items():
                x = self._rows(name, found.get(self._module(name)))
                if x is None or x.shape[layout.axis] != layout.rows:
                    raise ModelError(
                        f"layer {name}: its input is {list(shapes[name])} for {grid.sequences} "
                        f"examples, and {None if x is None else list(x.shape)} for one of them "
                        "alone: which rows belong to which cannot be told. Give "
                        f"{ONE_BY_ONE[False]}, so that every example is alone in its batch"
                    )

    def _module(self, name: str) -> str:
        """Experts are known by their module's name."""
        return self.layers[name].module if name in self.layers else name

    def _rows(self, name: str, x: Tensor | None) -> Tensor | None:
        """A module's input as rows."""
        if x is None:
            return None
        if name in self.layers:
            return kinds.as_rows(self.layers[name], x)
        return experts.tokens_of(self.model.get_submodule(name), x)
