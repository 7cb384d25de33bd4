"""A model's pass turned into a stream of `LayerBatch(layer, a, g)`.

All parameters are frozen while the pass runs and the autograd graph starts at the first tracked
layers, so a pass costs a forward and a gradient-to-activations backward: no weight gradient is ever
computed, and nothing below the first tracked layer is differentiated.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import listed
from ..errors import ModelError, Notice
from . import experts, kinds
from .alone import alone, gradients_on
from .calls import Calls, read_by
from .graph import backward, copied, reshaped, started
from .layer_batch import LayerBatch
from .layers import Layer
from .layouts import Layouts, Swap
from .outputs import product_among, tensors_of
from .products import is_plain
from .reads import Reads
from .rows import Grid, Rows
from .spread import let_go, offloaded

Loss = Callable[[], Tensor]


class Capture:
    """Runs losses of `model` and hands every tracked layer's (a, g) to a consumer, in backward
    order.

    Inputs are referenced, not copied; a layer whose input is changed in place afterwards is found
    after the first forward pass, and copied from then on. One pass at a time runs through a model,
    whatever threads ask for it.

    Args:
        model: any module.
        layers: of `select_layers`.
        swap: two forward passes over the same two examples, in one order and in the other; run
            once, where a layer's shape leaves open which axis holds the sequences.
        believed: what a shape tells is taken for true; else it is tried by `swap`, too.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        swap: Swap | None = None,
        believed: bool = True,
    ):
        self.model, self.layers = model, {x.name: x for x in layers}
        self._layouts = Layouts(model, self.layers, swap, believed)
        self._copied: set[str] = set()
        self._from_inputs = False
        self._started_at: set[str] = set()
        self._experts: dict[str, dict[tuple[str, int], Layer]] = {}
        for layer in layers:
            if layer.parameter is not None and layer.expert is not None:
                key = layer.parameter, layer.expert
                self._experts.setdefault(layer.module, {})[key] = layer
        away = {name.rpartition(".")[0] for name in offloaded(model)} if self._experts else set()
        if away := away & self._experts.keys():
            raise ModelError(
                f"the experts {min(away)} are offloaded: their weights are there in the module's "
                "own forward pass alone. Keep them on a device, or leave them out of `layers`"
            )
        # Modules that make one product a call, until a pass has shown that no other is made.
        linear = (x for x in layers if x.kind == "linear" and x.expert is None)
        modules = {x.name: model.get_submodule(x.module) for x in linear}
        self._unread = {name: module for name, module in modules.items() if is_plain(module)}
        self._verified: set[str] = set()
        self._places: dict[str, int] = {}
        self._anchor = torch.zeros((), requires_grad=True)

    def __call__(
        self, loss: Loss, consume: Callable[[LayerBatch], None], grid: Grid | None = None
    ) -> Tensor:
        """Backward through `loss()`; `consume` gets each layer once. Returns the loss, detached.

        A layer that runs but does not reach the loss has a gradient of zero, with a `Notice`.

        Args:
            loss: a scalar; or several, [N], of one forward pass: as many backward passes.
            grid: sequences and positions of the batch; without it the first axis of every layer
                holds the sequences. Of examples that are several sequences `consume` gets the rows
                of each example.

        Raises:
            ModelError: a tracked layer did not run, its rows cannot be told apart by sequences, or
                it does not compute W x + b of its own parameters.
        """
        with alone(self.model), gradients_on(), let_go(self.model):
            calls, value = self._forward(loss, consume, grid)
            calls.losses = value.numel()
            with self._hooked(calls):
                for number, one in enumerate(value.reshape(-1).unbind()):
                    calls.begin(number)
                    backward(one, retain_graph=not calls.last)
                    calls.settle()
                    for name in self.layers:
                        self._complete(calls, name)
        return value.detach()

    def _forward(
        self, loss: Loss, consume: Callable[[LayerBatch], None], grid: Grid | None
    ) -> tuple[Calls, Tensor]:
        """A forward pass that a backward pass may follow, run again where it has to be."""
        while True:
            calls = Calls(consume, grid, self.layers)
            reads = Reads(self._unread)
            with self._hooked(calls), reads if self._unread else nullcontext():
                value = loss()
            calls.settle()
            changed = calls.changed_in_place() - self._copied
            silent = self.layers.keys() - calls.inputs.keys()
            silent -= {n for n in silent if self.layers[n].module in calls.routes}
            if silent and silent <= calls.without_grad and not self._from_inputs:
                # Run without grad by the model itself, to be run again in the backward pass
                # (reentrant checkpoints), which starts only where an input requires grad.
                self._from_inputs = True
            elif changed:
                self._copied |= changed
            elif calls.unstarted:
                self._started_at |= calls.unstarted
            else:
                break
        silent -= calls.without_grad
        if silent:
            raise ModelError(
                f"layer {listed(sorted(silent))} did not run in the forward pass; leave it out of "
                "`layers`"
            )
        if not calls.without_grad:
            reads.check({name: len(uses) for name, uses in calls.inputs.items()})
            self._unread = {}
        if not value.requires_grad:
            raise ModelError(
                "no tracked layer reaches the loss: "
                + (
                    f"layer {min(calls.without_grad)} runs where the model has switched gradients "
                    "off"
                    if calls.without_grad
                    else "is it computed by the model that the layers belong to?"
                )
            )
        if calls.grid is not None and calls.grid.sequences > 1:
            self._layouts.resolve(calls, calls.grid)
        return calls, value

    @contextmanager
    def _hooked(self, calls: Calls) -> Iterator[None]:
        def forward_hook(layer: Layer) -> Callable:
            def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
                if layer.kind == "linear":
                    x = read_by(module, args, kwargs, output)
                else:
                    x = kinds.read(layer, module, args, kwargs, output)
                    if layer.name not in self._verified:
                        kinds.verify(layer, module, args, kwargs, output)
                        self._verified.add(layer.name)
                return self._ran(calls, layer, module, x, output)

            return hook

        def start(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            own = {k: started(v, self._anchor) for k, v in kwargs.items()}
            return tuple(started(x, self._anchor) for x in args), own

        handles = [
            self.model.get_submodule(name).register_forward_hook(
                forward_hook(layer), with_kwargs=True
            )
            for layer in self.layers.values()
            if layer.expert is None
            for name in (layer.module, *layer.also)
        ]
        handles += [
            self.model.get_submodule(name).register_forward_pre_hook(start, with_kwargs=True)
            for layer in self._started_at
            for name in (layer, *self.layers[layer].also)
        ]
        if self._from_inputs:
            handles.append(self.model.register_forward_pre_hook(start, with_kwargs=True))
            handles += [
                module.register_forward_hook(lambda _, __, output: started(output, self._anchor))
                for module in self.model.modules()
                if isinstance(module, nn.Embedding)
            ]
        with ExitStack() as replaced:
            for name in self._experts:
                module = self.model.get_submodule(name)
                call = partial(self._routed, calls, name, module)
                replaced.enter_context(experts.running(name, module, call))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _routed(
        self,
        calls: Calls,
        name: str,
        module: Any,
        *given: Tensor,
    ) -> Tensor:
        """The forward pass of experts, with the tracked ones recorded."""
        routing = experts.routing_of(name, module, given)
        if torch.is_grad_enabled() and not (calls.backward and name in calls.routes):
            calls.routes.setdefault(name, []).append(routing)

        def record(parameter: str, e: int, x: Tensor, y: Tensor) -> Tensor:
            if (layer := self._experts[name].get((parameter, e))) is None:
                return y
            return self._ran(calls, layer, module, x, y, routing)

        out = experts.forward(module, record, routing, *given)
        if name not in self._verified:
            experts.verify(name, module, given, out)
            self._verified.add(name)
        return out

    def _ran(
        self,
        calls: Calls,
        layer: Layer,
        module: nn.Module,
        x: Tensor,
        output: Any,
        routing: experts.Routing | None = None,
    ) -> Any:
        """The forward hook of a layer; of an expert, by the call of its module."""
        name = layer.name
        if not torch.is_grad_enabled():
            calls.without_grad.add(name)
            return output
        if not isinstance(output, Tensor):
            if not x.requires_grad:
                # What is made of the product inside has to hang on it: the graph starts before.
                calls.unstarted |= {name} - self._started_at
                return output
            if name not in self._places:
                self._places[name] = product_among(layer, module, x, output)
            self._ran(calls, layer, module, x, tensors_of(output)[self._places[name]])
            return output
        if calls.backward and name in calls.inputs and name not in calls.without_grad:
            # A checkpoint computes again what was seen: the same graph, and nothing else.
            return started(output, self._anchor)
        if routing is None and layer.kind == "linear":
            calls.check(layer, module, x, output)
        calls.saw(layer, module, x, output, copy=name in self._copied, routing=routing)
        # A copy, and no leaf: the model may go on to change it in place.
        output = started(output, self._anchor)
        use = len(calls.inputs[name]) - 1
        # A view that is changed in place leaves the graph with its hooks; its base does not.
        base = output._base if output._is_view() else output
        if base is not output and not reshaped(base, output):
            base = output = copied(output)
        shape = output.shape
        base.register_hook(lambda g: self._arrived(calls, name, use, g.reshape(shape)))
        return output

    def _arrived(self, calls: Calls, name: str, use: int, g: Tensor) -> None:
        gradients = calls.gradients.setdefault(name, {})
        gradients[use] = g
        if len(gradients) == len(calls.inputs[name]):
            self._complete(calls, name)

    @torch.no_grad()
    def _complete(self, calls: Calls, name: str) -> None:
        """Hand a layer to the consumer, once; gradients that never came are zero."""
        if name in calls.consumed:
            if calls.gradients.get(name):
                raise ModelError(
                    f"layer {name}: a gradient came after the layer was complete (a checkpoint "
                    "around some of its uses?); leave it out of `layers`"
                )
            return
        layer, inputs = self.layers[name], calls.inputs.get(name)
        if layer.expert is not None and layer.module in calls.routes:
            self._complete_expert(calls, layer)
            return
        if inputs is None:
            raise ModelError(
                f"layer {name} runs where the model has switched gradients off; leave it out of "
                "`layers`"
            )
        calls.consumed.add(name)
        gradients = calls.gradients.pop(name, {})
        if not gradients:
            warnings.warn(
                f"layer {name} does not reach the loss: its gradient is zero", Notice, stacklevel=2
            )
        # A layer used several times has the sum of its uses' gradients: their tokens, end to end.
        uses = []
        for use, x in enumerate(inputs):
            if gradients and use not in gradients:
                continue  # for something that no loss depends on
            g = gradients[use] if gradients else calls.zero(name, use)
            a, g = kinds.operands(layer, calls.modules[name], x, g)
            if (name, use) in calls.turned:
                # Rows that no loss reaches (padding) count for nothing on either side.
                a, g = g, a * (g != 0).any(-1, keepdim=True)
            a = self._layouts.by_sequence(name, a, layer.read, calls.grid)
            uses.append((a, self._layouts.by_sequence(name, g, layer.O, calls.grid)))
        a, g = uses[0]
        if len(uses) > 1:
            # Under autocast a head's output is narrower than an embedding's.
            g = torch.cat([g.to(uses[-1][1]) for _, g in uses], 1)
            a = torch.cat([kinds.beside(a, g) for a, _ in uses], 1)
        grid = calls.grid or Grid(len(a))
        rows = Rows(len(a), uses[0][0].shape[1], len(uses), grid.before, sides=grid.sides)
        if a.shape[1] != rows.positions * rows.uses:
            rows = replace(rows, positions=a.shape[1], uses=1)
        calls.release(name)
        shared, readers = calls.owner(name)
        # Under autocast a layer multiplies its input in the dtype of its output; and on its device.
        calls.consume(LayerBatch(layer, shared, readers, kinds.beside(a, g), g, rows, calls.loss))

    def _complete_expert(self, calls: Calls, layer: Layer) -> None:
        """Hand an expert to the consumer, its rows by sequence; without any, one row of zeros."""
        name, module, e = layer.name, layer.module, layer.expert
        assert e is not None
        if calls.grid is None:
            raise ModelError(
                f"layer {name}: which tokens are of which sequence is known of language models "
                "alone (examples with 'input_ids'); leave experts out of `layers`"
            )
        calls.consumed.add(name)
        gradients, uses = calls.gradients.pop(name, {}), []
        for use, routing in enumerate(calls.routed.get(name, [])):
            g = gradients[use] if use in gradients else calls.zero(name, use)
            uses.append((routing, calls.inputs[name][use], g))
        if not uses:
            first = calls.routes[module][0]
            a, g = (first.like.new_zeros(0, F) for F in (layer.I, layer.O))
            uses = [(first, a, g)]
        sequences = partial(self._layouts.by_sequence, module, features=1, grid=calls.grid)
        a, g, rows = experts.by_sequence(e, uses, sequences)
        rows = replace(rows, before=calls.grid.before, sides=calls.grid.sides)
        calls.release(name)
        calls.consume(LayerBatch(layer, name, 1, a.to(g.dtype), g, rows, calls.loss))
