"""Which layers, and a model's pass turned into a stream of `LayerBatch(name, a, g)`.

All parameters are frozen while the pass runs and the autograd graph starts at the first tracked
layers, so a pass costs a forward and a gradient-to-activations backward: no weight gradient is ever
computed, and nothing below the first tracked layer is differentiated.
"""

import difflib
import fnmatch
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .ops.gradients import rotate_activations

# A component of an MLP's name, below a numbered block: GPT-2, GPT-NeoX, Llama, Qwen, Mistral,
# OLMo, Gemma say `mlp`; OPT has fc1 and fc2 in the block itself.
MLP = re.compile(r"\.\d+\.(?:.*\.)?(?:mlp|ffn|ff|feed_forward|feedforward)\.|\.\d+\.fc[12]$")


@dataclass(frozen=True)
class Layer:
    """A tracked linear layer: y = W x (+ b) with W [O,I]."""

    name: str
    I: int
    O: int
    bias: bool

    @property
    def J(self) -> int:
        """Inputs with the constant 1 of a bias."""
        return self.I + self.bias


@dataclass(frozen=True)
class LayerBatch:
    """One layer's inputs and output gradients in one batch.

    `shared` names the first layer that reads the very same input tensor: gate and up, or q, k and
    v, share what depends on `a` alone.
    """

    layer: Layer
    shared: str
    readers: int  # how many layers share `a`
    a: Tensor  # [B,T,I]
    g: Tensor  # [B,T,O], gradient of the summed loss


def linear_layers(model: nn.Module) -> dict[str, Layer]:
    """Every layer that can be tracked: `nn.Linear` and Hugging Face's `Conv1D`, by name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = Layer(
                name, module.in_features, module.out_features, module.bias is not None
            )
        elif _is_conv1d(module):
            I, O = module.weight.shape
            found[name] = Layer(name, I, O, module.bias is not None)
    return found


def select_layers(model: nn.Module, patterns: str | Sequence[str] | None = None) -> list[Layer]:
    """The layers that `patterns` name, in the model's order.

    Args:
        model: any module.
        patterns: None or "mlp" for the MLP matrices of every block (the paper's choice); "all" for
            every linear layer; else names or globs, e.g. "*.attn.c_attn".

    Raises:
        ValueError: a pattern matches no layer; names the nearest ones.
    """
    layers = linear_layers(model)
    wanted = (
        ["mlp"] if patterns is None else [patterns] if isinstance(patterns, str) else list(patterns)
    )
    names: set[str] = set()
    for pattern in wanted:
        if pattern == "all":
            matched = set(layers)
        elif pattern == "mlp":
            matched = {name for name in layers if MLP.search(name)}
        else:
            matched = set(fnmatch.filter(layers, pattern))
        if not matched:
            near = difflib.get_close_matches(pattern, layers, n=3, cutoff=0.3) or list(layers)[:3]
            raise ValueError(
                f"layers: no linear layer matches {pattern!r}; the nearest are {', '.join(near)}"
            )
        names |= matched
    return [layer for name, layer in layers.items() if name in names]


class Capture:
    """Runs losses of `model` and hands every tracked layer's (a, g) to a consumer, in backward
    order.

    Inputs are referenced, not copied; a layer whose input is changed in place afterwards is found
    after the first forward pass, and copied from then on.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]):
        self.model, self.layers = model, {layer.name: layer for layer in layers}
        self._copied: set[str] = set()
        self._anchor = torch.zeros((), requires_grad=True)

    def __call__(self, loss: Callable[[], Tensor], consume: Callable[[LayerBatch], None]) -> Tensor:
        """Backward through `loss()`; `consume` gets each layer once. Returns the loss, detached.

        Raises:
            RuntimeError: a tracked layer did not run, or does not see one row per sequence.
        """
        with _frozen(self.model):
            while True:
                calls = _Calls()
                with self._hooked(calls, consume):
                    value = loss()
                changed = calls.changed_in_place() - self._copied
                if not changed:
                    break
                self._copied |= changed
            silent = self.layers.keys() - calls.inputs.keys()
            if silent:
                raise RuntimeError(
                    f"layer {min(silent)} did not run in the forward pass; leave it out of `layers`"
                )
            value.backward()
        return value.detach()

    @contextmanager
    def _hooked(self, calls: "_Calls", consume: Callable[[LayerBatch], None]) -> Iterator[None]:
        def forward_hook(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
                if not torch.is_grad_enabled():
                    return output
                x = args[0] if args else next(iter(kwargs.values()))
                calls.saw(name, x, copy=name in self._copied)
                if not output.requires_grad:
                    # Not a leaf: the model may go on to change it in place.
                    output = _Start.apply(output, self._anchor)
                use = len(calls.inputs[name]) - 1
                output.register_hook(lambda g: self._arrived(calls, consume, name, use, g))
                return output

            return hook

        handles = [
            self.model.get_submodule(name).register_forward_hook(
                forward_hook(name), with_kwargs=True
            )
            for name in self.layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _arrived(
        self, calls: "_Calls", consume: Callable[[LayerBatch], None], name: str, use: int, g: Tensor
    ) -> None:
        gradients = calls.gradients.setdefault(name, {})
        gradients[use] = g
        if len(gradients) < len(calls.inputs[name]):
            return
        layer = self.layers[name]
        # A layer used several times has the sum of its uses' gradients: their tokens, end to end.
        uses = [
            (_by_sequence(x, layer.I, name), _by_sequence(gradients[use], layer.O, name))
            for use, x in enumerate(calls.inputs[name])
        ]
        a = torch.cat([a for a, _ in uses], 1) if len(uses) > 1 else uses[0][0]
        g = torch.cat([g for _, g in uses], 1) if len(uses) > 1 else uses[0][1]
        calls.release(name)
        # Under autocast a layer multiplies its input in the dtype of its output.
        shared = calls.shared[name]
        readers = sum(reader == shared for reader in calls.shared.values())
        consume(LayerBatch(layer, shared, readers, a.to(g.dtype), g))


class SharedRotation:
    """Rotated activations of layers that read the same tensor, computed once a batch."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[Tensor, int]] = {}

    def __call__(self, seen: LayerBatch, Qa: Tensor) -> tuple[Tensor, Tensor | None, bool]:
        """(a, Qa, bias) for an op: rotated already if others share it and tokens are the cheap
        side.

        Alone, a layer's rotation is left to the op, which chooses the cheapest order.
        """
        bias = seen.layer.bias
        if seen.readers == 1 or seen.a.shape[1] >= seen.layer.O:
            return seen.a, Qa, bias
        rotated, left = self._held.pop(seen.shared, (None, seen.readers))
        if rotated is None:
            rotated = rotate_activations(seen.a, Qa.to(seen.a.dtype), bias)
        if left > 1:
            self._held[seen.shared] = (rotated, left - 1)
        return rotated, None, False


class _Calls:
    """What one pass has seen so far."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.gradients: dict[str, dict[int, Tensor]] = {}
        self.shared: dict[str, str] = {}
        self._versions: dict[str, list[tuple[Tensor, int]]] = {}
        self._readers: dict[int, str] = {}

    def saw(self, name: str, x: Tensor, copy: bool) -> None:
        self._versions.setdefault(name, []).append((x, x._version))
        first_use = name not in self.inputs
        self.inputs.setdefault(name, []).append(x.detach().clone() if copy else x.detach())
        # Tensors in `_versions` stay alive until the pass ends, so ids are unique.
        reader = self._readers.setdefault(id(x), name)
        self.shared[name] = reader if first_use and not copy else name

    def changed_in_place(self) -> set[str]:
        changed = {
            name
            for name, seen in self._versions.items()
            if any(x._version != version for x, version in seen)
        }
        self._versions.clear()
        return changed

    def release(self, name: str) -> None:
        self.inputs[name] = []
        self.gradients.pop(name, None)


class _Start(torch.autograd.Function):
    """The identity, with an output that requires grad."""

    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None]:
        return None, None


def _by_sequence(x: Tensor, features: int, name: str) -> Tensor:
    """[B, ..., F] -> [B,T,F]; [B,F] -> [B,1,F]."""
    if x.ndim < 2 or x.shape[-1] != features:
        raise RuntimeError(
            f"layer {name}: a tensor of shape {list(x.shape)}, expected [B,T,{features}]"
        )
    return x.reshape(x.shape[0], -1, features)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires grad, and the model is in evaluation mode; both are restored."""
    required = [p for p in model.parameters() if p.requires_grad]
    training = [m for m in model.modules() if m.training]
    for p in required:
        p.requires_grad_(False)
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for p in required:
            p.requires_grad_(True)
        for m in training:
            m.training = True


def _is_conv1d(module: nn.Module) -> bool:
    # No transformers module can exist before transformers is imported.
    if "transformers" not in sys.modules:
        return False
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
