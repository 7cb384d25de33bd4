"""A model's outputs linearised in its tracked layers: products with J^T H J, Gauss and Newton's.

dy = J dW = sum over layers l of (dy / ds_l) dW_l (a_l, 1)      s_l = W_l (a_l, 1), all else fixed
u = H dy                                                        H the loss's Hessian in y
(J^T u)_l = sum over rows of g_l (a_l, 1)^T                     g_l = (dy / ds_l)^T u

J^T is a backward pass. It is linear in u, so J is the backward pass of that backward pass: twice
differentiated, any model gives both, and all queries share one forward pass and one graph.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import ModelError
from . import kinds
from .alone import alone, gradients_on
from .calls import Calls
from .capture import Capture
from .head import Hessian
from .weights import lets_go

# (y, H): outputs of any shape, and H of a stack of vectors of that shape.
Outputs = Callable[[], tuple[Tensor, Hessian]]
# Bytes of dy that exist at a time.
OUTPUT_BYTES = 1 << 28
# Attention of Hugging Face that is differentiable twice, the second one as PyTorch's own "math".
TWICE = ("eager", "sdpa")


class Linearised(Capture):
    """Gauss-Newton products of `model` in `layers`, a batch at a time."""

    _checked = False

    def add_product(
        self, outputs: Outputs, directions: Mapping[str, Tensor], sums: Mapping[str, Tensor]
    ) -> None:
        """sums[l] [Q,O,J] += (J^T H J dW)_l of every query, summed over the batch.

        Args:
            outputs: a forward pass: y, and its loss's Hessian as a function of vectors [Q,*y].
            directions: dW of every layer, [Q,O,J].

        Raises:
            ModelError: the model cannot be differentiated twice, or as in `Capture`.
        """
        with alone(self.model), gradients_on(), twice_differentiable(self.model):
            hessians: list[Hessian] = []

            def forward() -> Tensor:
                y, hessian = outputs()
                hessians.append(hessian)
                return y

            calls, y = self._forward(forward, lambda _: None, None)
            some = max(1, OUTPUT_BYTES // max(1, y.numel() * y.element_size()))
            with explained("refinement"):
                w = torch.zeros_like(y, requires_grad=True)
                transposed = self._backward(calls, y, w, create_graph=True)
                for at in range(0, len(next(iter(directions.values()))), some):
                    part = {name: dW[at : at + some] for name, dW in directions.items()}
                    dy = torch.stack(_forwards(calls, transposed, w, part))
                    for q, u in enumerate(hessians[-1](dy), at):
                        found = self._backward(calls, y, u.to(y.dtype))
                        if not self._checked:
                            one = {name: dW[q] for name, dW in directions.items()}
                            self._check(calls, dy[q - at], u, found, one)
                        _add_gradients(calls, found, {n: x[q] for n, x in sums.items()})
            calls.gradients = {}  # their graph holds the hooks that hold them

    def _check(
        self,
        calls: Calls,
        dy: Tensor,
        u: Tensor,
        found: dict[str, dict[int, Tensor]],
        directions: dict[str, Tensor],
    ) -> None:
        """<u, J dW> = <J^T u, dW>, once: autograd passes by an operation whose backward pass has no
        derivative, and says nothing.
        """
        forward = float((dy.double() * u.double()).sum())
        backward = sum(
            float((_product(calls, n, use, directions[n], g).double() * g.double()).sum())
            for n, uses in found.items()
            for use, g in uses.items()
        )
        self._checked = forward != 0 or backward != 0
        tolerance = max(1e-3, 16 * torch.finfo(dy.dtype).eps)
        if abs(forward - backward) > tolerance * (abs(forward) + abs(backward)):
            raise ModelError(
                "the model cannot be differentiated twice, which refinement needs: the backward "
                "pass of some operation has no derivative (products with its Jacobian and with "
                f"that one's transpose differ: {forward:.6g} and {backward:.6g})"
            )

    def _backward(
        self, calls: Calls, y: Tensor, u: Tensor, create_graph: bool = False
    ) -> dict[str, dict[int, Tensor]]:
        """g of every use of every layer for one u: what does not reach y has none."""
        calls.gradients = {}
        torch.autograd.grad(
            y, self._anchor, u, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        return calls.gradients

    def _arrived(self, calls: Calls, name: str, use: int, g: Tensor) -> None:
        calls.gradients.setdefault(name, {})[use] = g


def _forwards(
    calls: Calls, transposed: dict[str, dict[int, Tensor]], w: Tensor, directions: dict[str, Tensor]
) -> list[Tensor]:
    """J dW of every query, by the backward pass of g(w)."""
    # No gradient: a layer that reaches the outputs by nothing that moves them.
    live = [
        (name, use, g)
        for name, uses in transposed.items()
        for use, g in uses.items()
        if g.requires_grad
    ]
    gs, found = [g for _, _, g in live], []
    for q in range(len(next(iter(directions.values())))):
        ts = [_product(calls, n, use, directions[n][q], g) for n, use, g in live]
        (dy,) = torch.autograd.grad(gs, w, ts, retain_graph=True, allow_unused=True)
        found.append(torch.zeros_like(w) if dy is None else dy)
    return found


@torch.no_grad()
def _product(calls: Calls, name: str, use: int, dW: Tensor, like: Tensor) -> Tensor:
    """dW (a, 1) of one use: [...,I] and [O,J] -> the shape and dtype of the layer's output."""
    a, dW = calls.inputs[name][use], dW.to(like.dtype)
    if (layer := calls.layers[name]).kind != "linear":
        return kinds.product(layer, calls.modules[name], a, dW).to(like.dtype).reshape(like.shape)
    a = a.to(like.dtype)
    if (name, use) in calls.turned:
        dW = dW.mT
    # Not by `linear`: oneDNN takes seconds for rows that lie J apart.
    s = a @ dW[:, : a.shape[-1]].mT
    if dW.shape[1] > a.shape[-1]:
        s += dW[:, -1]
    return s.view_as(like)


@torch.no_grad()
def _add_gradients(
    calls: Calls, found: dict[str, dict[int, Tensor]], sums: dict[str, Tensor]
) -> None:
    """sums[l] [O,J] += sum over rows of g (a, 1)^T."""
    for name, uses in found.items():
        G, layer, module = sums[name], calls.layers[name], calls.modules[name]
        for use, g in uses.items():
            a, g = kinds.operands(layer, module, calls.inputs[name][use], g)
            a, g = a.flatten(0, -2), g.flatten(0, -2).to(G.dtype)
            if not a.is_floating_point():
                G.index_add_(1, a.squeeze(-1), g.mT)
                continue
            a = a.to(G.dtype)
            if (name, use) in calls.turned:
                a, g = g, a
            I = a.shape[-1]
            G[:, :I].addmm_(g.mT, a)
            if G.shape[1] > I:
                G[:, -1] += g.sum(0)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """ModelError for what autograd says of an operation that it cannot differentiate twice."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError | ModelError):
            raise
        raise ModelError(
            f"the model cannot be differentiated twice, which {what} needs: {error}"
        ) from error


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Attention as matrix products: fused ones are differentiable once.

    Raises:
        ModelError: the model is sharded, or spread over devices.
    """
    if why := lets_go(model):
        raise ModelError(f"{why}, and this takes several. Load it whole, on one device")
    used = getattr(getattr(model, "config", None), "_attn_implementation", None)
    switch: Any = getattr(model, "set_attn_implementation", None)
    other = used not in (None, *TWICE) and callable(switch)
    if other:
        switch("eager")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        if other:
            switch(used)
