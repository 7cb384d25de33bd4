"""(a, g) of tracked layers out of passes that somebody else runs: a training loop's.

Nothing of the loop's graph is changed: a hook on a layer's output only reads the gradient that
arrives there, and what the layer read is kept as autograd keeps tensors, by a node beside the graph
(`_Kept`), so that a checkpoint drops it and computes it again as it does its own.
"""

import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ModelError, Notice
from .calls import given
from .graph import reshaped
from .layer_batch import LayerBatch
from .layers import Layer
from .outputs import tensors_of
from .own_loss import ASK, check_own_loss, logits_of, only_loss, own_loss, predicts
from .products import is_plain, seems_product
from .rows import Grid, Layout, Rows, arranged, trusted


class Pass:
    """One forward pass of the loop, and what its backward pass has brought so far.

    `inputs` are those of the model, by name; `factor` is what the gradients are multiplied with to
    be those of the summed loss.
    """

    def __init__(self, number: int, inputs: Mapping[str, Any]) -> None:
        self.number, self.inputs, self.grid = number, inputs, _grid(inputs)
        self.running, self.over = True, False
        self.factor: Tensor | float | None = None
        # Its loss's divisor, until the gradient of the loss arrives.
        self.divisor: Tensor | float | None = None
        self.without_grad: set[str] = set()
        # What keeps what each layer read (`_kept`) and a zero like its output, until its gradient
        # arrives.
        self.read: dict[str, tuple[Tensor, Tensor]] = {}
        self.arrived: set[str] = set()
        # Layers whose output the model may change without their hook.
        self.unsure: set[str] = set()
        self.handles: list[Any] = []
        self.result: Any = None

    @property
    def mask(self) -> Tensor | None:
        """Real positions [B,T]; None where the model was given no mask.

        Raises:
            ModelError: it was given another kind of mask.
        """
        mask = self.inputs.get("attention_mask")
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.ndim != 2 or len(mask) != self.grid.sequences:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ModelError(
                f"the attention mask is {shape}, and which positions are padding cannot be told; "
                "give the model one of [sequences, positions], or capture scores alone"
            )
        return mask


class Watch:
    """Hands every tracked layer's (a, g) of the passes of `model` to `consume`, in backward order.

    Args:
        model: what the loop calls.
        layers: of `select_layers`.
        consume: called with a layer's batch and its pass, whose `factor` is known.
        settled: called with a pass that is complete.
        apart: whether rows have to be told apart by sequences.
        scale: the factor, when asked; None where the model's own loss tells it.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        consume: Callable[[LayerBatch, Pass], None],
        settled: Callable[[Pass], None],
        apart: bool,
        scale: Callable[[], Tensor | float | None],
    ) -> None:
        self.model, self.layers, self.apart = model, {x.name: x for x in layers}, apart
        self._consume, self._settled, self._scale = consume, settled, scale
        self._current: Pass | None = None
        self._passes = 0
        # Held by the hooks of their graphs: a pass whose loss is dropped is dropped with it.
        self._open: weakref.WeakSet[Pass] = weakref.WeakSet()
        self._arriving: list[Pass] = []
        self._layouts: dict[str, Layout] = {}
        self._looked_at: set[str] = set()
        self._checked = False
        self._hooks: list[Any] = []
        self._anchor = torch.zeros((), requires_grad=True)

    def start(self) -> None:
        """Put the hooks in."""
        for layer in self.layers.values():
            module = self.model.get_submodule(layer.name)
            hook = partial(self._ran, layer, module)
            self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))
        self._hooks += [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end),
        ]

    def stop(self) -> None:
        """Take all hooks out, those in graphs, too."""
        for handle in (*self._hooks, *(h for p in self._open for h in p.handles)):
            handle.remove()
        self._hooks.clear()
        self._current = None

    def settle(self) -> None:
        """Complete the passes whose gradients have come.

        A layer without one has a gradient of zero, with a `Notice`.

        Raises:
            ModelError: a layer did not run in one of them.
        """
        passes, self._arriving = self._arriving, []
        for one in sorted(passes, key=lambda one: one.number):
            if not one.arrived:
                self._scaled(one)
            for name, layer in self.layers.items():
                if name in one.arrived:
                    continue
                if name not in one.read or name in one.unsure:
                    why = "did not run in the loop's forward pass"
                    if name in one.without_grad:
                        why += " with gradients on"
                    if name in one.unsure:
                        why = "has an output that is changed in place"
                    raise ModelError(f"layer {name} {why}; leave it out of `layers`")
                warnings.warn(
                    f"layer {name} does not reach the loop's loss: its gradient is zero",
                    Notice,
                    stacklevel=2,
                )
                self._hand_on(one, layer, one.read[name][1])
            one.over = True
            self._settled(one)

    def _begin(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pass begins."""
        if not torch.is_grad_enabled() or _in_backward():
            return
        self.settle()
        self._passes += 1
        self._current = Pass(self._passes, _by_name(self.model, args, kwargs))
        self._open.add(self._current)

    def _end(self, _: nn.Module, __: tuple, output: Any) -> None:
        """A forward pass ends: its loss tells the factor, and its outputs hold on to it."""
        one = self._current
        if one is None or not one.running or _in_backward() or not torch.is_grad_enabled():
            return
        one.running = False
        if self._scale() is None and (found := own_loss(one.inputs, output)) is not None:
            loss, one.divisor = found
            if not self._checked and predicts(one.inputs):
                check_own_loss(one.inputs, output, *found)
                self._checked = True
                if (logits := logits_of(output)) is not None:
                    alone = only_loss(one.inputs, logits)
                    self._hook(one, logits, partial(_alone, one, alone))
            self._hook(one, loss, partial(_divided, one))
        parts = vars(output) if hasattr(output, "__dict__") else output
        for x in [output] if isinstance(output, Tensor) else tensors_of(parts):
            if x.requires_grad:
                self._hook(one, x, partial(self._returns, one))

    def _returns(self, one: Pass, _: Tensor) -> None:
        """The backward pass of a pass begins; whose outputs are never gone back from is dropped."""
        if one not in self._arriving and not one.over:
            self._arriving.append(one)

    def _hook(self, one: Pass, x: Tensor, hook: Callable[[Tensor], None]) -> None:
        one.handles.append(x.register_hook(hook))

    def _ran(
        self, layer: Layer, own: nn.Module, module: nn.Module, args: tuple, kwargs: dict, y: Any
    ) -> None:
        """The forward hook of a layer."""
        name, one = layer.name, self._current
        if not torch.is_grad_enabled():
            if one is not None and one.running:
                one.without_grad.add(name)
            return
        if module is not own:
            raise ModelError(f"layer {name} is a replica (DataParallel): capture one a process")
        x = given(args, kwargs)
        if _in_backward():
            read = _kept(x, self._anchor)  # a checkpoint counts what is kept, both times
            one = self._computed_again(name)
            if one is None:
                return
        elif one is None or not one.running:
            raise ModelError(
                f"layer {name} ran outside of a pass of the {type(self.model).__name__} that is "
                "captured: give `capture` the module that the loop calls"
            )
        else:
            read = _kept(x, self._anchor)
        if name in one.read or name in one.arrived:
            raise ModelError(
                f"layer {name} ran twice in a forward pass: whose gradient is whose is known in "
                "passes of our own alone (`score`, `fit`); leave it out of `layers`"
            )
        self._check(layer, module, x, y)
        one.read[name] = read, y.new_zeros(()).expand(y.shape)
        # A view that is changed in place leaves the graph with its hooks; its base does not.
        base, shape = y._base if y._is_view() else y, y.shape
        if base is None or (base is not y and not reshaped(base, y)):
            base = y
            one.unsure.add(name)
        self._hook(one, base, lambda g: self._arrived(one, layer, g.reshape(shape)))

    def _computed_again(self, name: str) -> Pass | None:
        """The pass that a checkpoint runs a layer of, which ran without gradients at first; None
        where it ran with them, and is only computed again.
        """
        late = (one for one in self._open if name in one.without_grad)
        passes = [one for one in late if name not in {*one.read, *one.arrived}]
        if len(passes) > 1:
            raise ModelError(
                f"layer {name} is in a reentrant checkpoint, and several forward passes wait for "
                "their backward pass: whose it is cannot be told. Use use_reentrant=False"
            )
        return passes[0] if passes else None

    def _check(self, layer: Layer, module: nn.Module, x: Tensor, y: Any) -> None:
        """Refuse a layer whose gradient is not that of W x + b; of W itself once."""
        name = layer.name
        if not isinstance(y, Tensor):
            raise ModelError(
                f"layer {name} returns a {type(y).__name__}, not the product alone; leave it out "
                "of `layers`"
            )
        if not y.requires_grad:
            raise ModelError(
                f"layer {name} has no gradient in this loop: neither it nor anything before it "
                "trains; leave it out of `layers`"
            )
        if name in self._looked_at or is_plain(module) or not x.numel():
            return
        self._looked_at.add(name)
        if not seems_product(module, x, y, layer.I, layer.O):
            raise ModelError(
                f"layer {name} ({type(module).__name__}) does not compute W x + b of its own "
                "weight and bias; leave it out of `layers`"
            )

    def _arrived(self, one: Pass, layer: Layer, g: Tensor) -> None:
        """A layer's gradient has come."""
        name = layer.name
        if name in one.arrived:
            raise ModelError(
                f"layer {name}: two backward passes through one forward pass; add the losses up, "
                "and go back once"
            )
        if not one.arrived:
            self._scaled(one)
        self._returns(one, g)
        self._hand_on(one, layer, g)

    def _scaled(self, one: Pass) -> None:
        """The factor of a pass whose first gradient comes."""
        if (scale := self._scale()) is not None:
            one.factor = scale
        if one.factor is None:
            why = "has no loss of its labels" if one.divisor is None else "lost its own loss"
            raise ModelError(f"the output of the model {why} in this loop: {ASK}")

    @torch.no_grad()
    def _hand_on(self, one: Pass, layer: Layer, g: Tensor) -> None:
        """Give a layer's batch to the consumer."""
        name = layer.name
        one.arrived.add(name)
        kept, _ = one.read.pop(name)
        try:
            (x,) = cast(Any, kept.grad_fn).saved_tensors
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise ModelError(
                f"layer {name}: what it read was changed in place after it; leave it out of "
                "`layers`"
            ) from error
        a, g = (self._rows(one, layer, t, F) for t, F in ((x.detach(), layer.I), (g, layer.O)))
        with torch.autocast(g.device.type, enabled=False):
            rows = Rows(a.shape[0], a.shape[1])
            self._consume(LayerBatch(layer, name, 1, a.to(g.dtype), g, rows), one)

    def _rows(self, one: Pass, layer: Layer, x: Tensor, features: int) -> Tensor:
        """[B,rows,F] of an input or a gradient; [1,rows,F] where sequences do not matter."""
        grid = one.grid if self.apart or one.mask is not None else Grid(1)
        layout = trusted(tuple(x.shape[:-1]), grid) if grid.sequences > 1 else None
        if layout is not None:
            self._layouts[layer.name] = layout
        return arranged(layer.name, x, features, grid, self._layouts.get(layer.name))


def _divided(one: Pass, c: Tensor) -> None:
    """The gradient of a pass's own loss has come."""
    assert one.divisor is not None
    one.factor = one.divisor / c.detach()


def _alone(one: Pass, check: Callable[[Tensor, float], None], g: Tensor) -> None:
    """The gradient of a pass's logits has come, after its loss's where that is in it."""
    if one.factor is not None:
        check(g, float(1 / one.factor))


def _in_backward() -> bool:
    """Whether this is called in a backward pass: a checkpoint computes again."""
    return torch._C._current_graph_task_id() != -1


def _by_name(model: nn.Module, args: tuple, kwargs: dict) -> Mapping[str, Any]:
    """What a model is called with, by the names of its arguments."""
    if len(args) == 1 and isinstance(args[0], Mapping) and not kwargs:
        return args[0]
    signature = inspect.signature(model.forward)
    given = signature.bind_partial(*args, **kwargs).arguments
    for name, kind in signature.parameters.items():
        if kind.kind is kind.VAR_KEYWORD:
            given |= given.pop(name, {})
        elif kind.kind is kind.VAR_POSITIONAL:
            given |= {f"{name}{i}": x for i, x in enumerate(given.pop(name, ()))}
    return given


def _grid(inputs: Mapping[str, Any]) -> Grid:
    """Sequences and positions of a batch: of token ids, or of the first tensor there is."""
    first = next((inputs[n] for n in ("input_ids", "inputs_embeds") if n in inputs), None)
    tensors = (first, *inputs.values())
    x = next((x for x in tensors if isinstance(x, Tensor) and x.ndim), None)
    if x is None:
        raise ModelError(
            "the model is called without a tensor: how many sequences a batch holds is not known"
        )
    tokens = "input_ids" in inputs or "inputs_embeds" in inputs
    positions = x.ndim > 1 and (tokens or (x.ndim == 2 and not x.is_floating_point()))
    return Grid(len(x), x.shape[1] if positions else None)


def _kept(x: Tensor, anchor: Tensor) -> Tensor:
    """A number whose node keeps x, in its `saved_tensors`, for as long as the number is there. It
    hangs on nothing of the graph of x.
    """
    kept: Tensor = _Kept.apply(x.detach(), anchor)
    return kept


class _Kept(torch.autograd.Function):
    """Keeps x as every operation keeps its operands: by reference, or as saved tensor hooks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[None, None]:
        return None, None
