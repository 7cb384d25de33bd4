"""Which tokens of a sequence carry its influence on a query: output and input tokens.

    D(w, e) = sum over layers l of <P_l, sum_t g_lt (a_lt, 1)^T>     g = (d sum_t w_t L_t / d s_l)^T

L_t is the loss of target t, s_l = W_l (a_l, 1), P the query's preconditioned gradient. At w = 1
D is the sequence's score. It is linear in w, so dD/dw_t is what target t has of it, <P, grad L_t>:
the score that zeroing its loss takes away (paper, Eq. 34-36). e_t dD/de_t is how the score changes
with the scale of token t's embedding (Eq. 37-38). Both come exactly from one backward pass of a
backward pass, for as many pairs of query and sequence as a batch holds: no finite differences.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from . import experts
from .alone import alone, gradients_on
from .calls import Calls
from .layer_batch import LayerBatch
from .layers import Layer
from .linearised import Linearised, explained, twice_differentiable
from .rows import Grid

# (s, a) of a layer's rows by sequence, [B,rows,O] and [B,rows,I] -> the sum of <P_b, s a^T> over
# the sequences b that are asked about.
Contracted = Callable[[Tensor, Tensor], Tensor]
WHAT = "attribution to tokens"


@dataclass(frozen=True)
class TokenInfluence:
    """Of a batch of pairs: `target` [n] is of every loss, in the order of the losses; `input` [B,T]
    of every token.
    """

    target: Tensor
    input: Tensor


class TokenPass(Linearised):
    """A pass that finds what every token has of its sequence's score, beside what `Capture` does.

    asked: at most one query for each sequence at a time, what contracts each layer with it; they
    share the forward pass and its backward pass. To be set before a pass; then `found` has the
    influence for each.
    """

    asked: Sequence[Mapping[str, Contracted]] = ()

    def __call__(
        self,
        loss: Callable[[], Tensor],
        consume: Callable[[LayerBatch], None],
        grid: Grid | None = None,
    ) -> Tensor:
        """The losses [n] of all targets, detached; `consume` gets each layer once, of their sum.

        Args:
            loss: a forward pass: the losses, twice differentiable.
            consume: as in `Capture`.
            grid: sequences and positions.

        Raises:
            ModelError: the model cannot be differentiated twice, its embeddings are not known, or
                as in `Capture`.
        """
        self._attached: dict[str, list[Tensor]] = {}
        self.found: list[TokenInfluence] = []
        with alone(self.model), gradients_on(), twice_differentiable(self.model):
            seen: list[Tensor] = []
            with self._embedded() as embedded:

                def value() -> Tensor:
                    self._attached = {}
                    embedded.clear()
                    y = loss()
                    seen[:] = embedded  # passes that find out where the sequences are may follow
                    return y

                calls, y = self._forward(value, consume, grid)
            if len(seen) != 1:
                raise ModelError(
                    f"the model's embedding ran {len(seen)} times in a pass: which of them are the "
                    "tokens cannot be told"
                )
            e = seen[0]
            w = torch.ones_like(y, requires_grad=True)
            calls.gradients = {}
            with explained(WHAT):
                torch.autograd.grad(y, e, w, create_graph=True, allow_unused=True)
            gradients = calls.gradients
            # Completing a layer lets go of what it is given.
            calls.gradients = {
                name: {use: g.detach() for use, g in uses.items()}
                for name, uses in gradients.items()
            }
            for name in self.layers:
                self._complete(calls, name)
            for number, contracted in enumerate(self.asked, 1):
                D = self._contracted(calls, gradients, contracted)
                self.found.append(self._influence(D, w, e, again=number < len(self.asked)))
            gradients.clear()  # their graph holds the hooks that hold them
            self._attached = {}
        return y.detach()

    def _influence(self, D: Tensor, w: Tensor, e: Tensor, again: bool) -> TokenInfluence:
        """dD/dw and e dD/de, for which the graph is kept if it is needed `again`."""
        with explained(WHAT):
            found = torch.autograd.grad(D, (w, e), retain_graph=again, allow_unused=True)
        target, scale = (
            torch.zeros_like(x) if dx is None else dx for x, dx in zip((w, e), found, strict=True)
        )
        if not self._checked:
            # D is linear in w. Autograd passes by an operation whose backward pass has no
            # derivative, and says nothing.
            self._checked = True
            D = D.detach()
            error, size = float((D - target.sum()).abs()), float(target.abs().sum())
            if error > max(1e-3, 16 * torch.finfo(e.dtype).eps) * max(size, float(D.abs())):
                raise ModelError(
                    f"the model cannot be differentiated twice, which {WHAT} needs: what targets "
                    f"have of a score sums to {float(target.sum()):.6g}, and the score is "
                    f"{float(D):.6g}"
                )
        return TokenInfluence(target, (e.detach() * scale).sum(-1))

    @contextmanager
    def _embedded(self) -> Iterator[list[Tensor]]:
        """What the model's embeddings of tokens give: a beginning of the graph of its own."""
        find = getattr(self.model, "get_input_embeddings", None)
        table = find() if callable(find) else None
        if not isinstance(table, nn.Module):
            raise ModelError("the model has no get_input_embeddings(): which tensor the tokens are "
                             "cannot be told")  # fmt: skip
        found: list[Tensor] = []

        def hook(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
            found.append(output.detach().requires_grad_())
            # The model may go on to change it in place, which a leaf does not bear.
            return found[-1].clone()

        handle = table.register_forward_hook(hook)
        try:
            yield found
        finally:
            handle.remove()

    def _ran(
        self, calls: Calls, layer: Layer, module: nn.Module, x: Tensor, output: Any, *more: Any
    ) -> Any:
        """As in `Capture`; inputs are kept with their graph, too."""
        before = len(calls.inputs.get(layer.name, ()))
        output = super()._ran(calls, layer, module, x, output, *more)
        if len(calls.inputs.get(layer.name, ())) > before:
            self._attached.setdefault(layer.name, []).append(x)
        return output

    def _contracted(
        self,
        calls: Calls,
        gradients: Mapping[str, Mapping[int, Tensor]],
        contracted: Mapping[str, Contracted],
    ) -> Tensor:
        """D, in the graph of w and of the embeddings."""
        total: Tensor | None = None
        for name, uses in gradients.items():
            layer = self.layers[name]
            for use, g in uses.items():
                a = self._attached[name][use]
                s, x = self._rows(calls, layer, use, g, a)
                part = contracted[name](s, x.to(s.dtype))
                total = part if total is None else total + part
        if total is None:
            raise ModelError("no tracked layer reaches the loss")
        return total

    def _rows(
        self, calls: Calls, layer: Layer, use: int, g: Tensor, a: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(g, a) of one use by sequence, [B,rows,O] and [B,rows,I]."""
        if layer.expert is None:
            own = partial(self._layouts.by_sequence, layer.name, grid=calls.grid)
            return own(g, layer.O), own(a, layer.I)
        call = calls.routed[layer.name][use], a, g
        own = partial(self._layouts.by_sequence, layer.module, features=1, grid=calls.grid)
        x, s, _ = experts.by_sequence(layer.expert, [call], own)
        return s, x
