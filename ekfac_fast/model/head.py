"""The head and the loss of a causal language model as one piece: its logits never exist whole.

z_t = W h_t + b
loss_t = logsumexp(z_t) - z_t[y_t]        d loss_t / d h_t = softmax(z_t) W - W[y_t]
Hessian in h_t = W^T (diag p - p p^T) W                    p = softmax(z_t)

A batch's logits are its largest tensor by far (1024 tokens x 49152: 200 MB, of which a backward
pass holds three); here they live a few rows at a time, only where a token is predicted, and the
gradient is made with them. Several draws of labels share all products.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.products import linear
from ..ops.shapes import wide
from .products import is_plain
from .sampling import inverted

# A matrix by its product with a stack of vectors.
Hessian = Callable[[Tensor], Tensor]
# Logits that exist at a time, in bytes; on a CPU they stay in its last cache between their steps.
LOGITS, LOGITS_GPU = 1 << 25, 1 << 28
# Sequence and position of each label.
Places = tuple[Tensor, Tensor]
# Heads of models that were seen to return W h + b as their logits, with nothing after it.
_last: "weakref.WeakKeyDictionary[nn.Module, nn.Linear]" = weakref.WeakKeyDictionary()


def inspect_head(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Find out whether a model's logits are its head's output as it is, by two more passes.

    In one the head is made to return numbers of all sizes, so that a soft cap or a scale behind it
    shows; in the other it returns no row.
    """
    _last.pop(model, None)
    outputs = getattr(model, "get_output_embeddings", None)
    head = outputs() if callable(outputs) else None
    if type(head) is not nn.Linear or not is_plain(head):
        return
    told: list[Tensor] = []

    def tell(_: nn.Module, __: tuple, y: Tensor) -> Tensor:
        sizes = torch.logspace(-3, 4, y.numel())
        sizes[1::2].neg_()
        told.append(sizes.to(y).view(y.shape))
        return told[-1]

    handle = head.register_forward_hook(tell)
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    if len(told) != 1 or logits.dtype.itemsize < told[0].dtype.itemsize:
        return
    if not torch.equal(logits, told[0].to(logits.dtype)):
        return
    try:
        whole = _states(model, head, inputs) is not None
    except Exception:  # whatever a model says of logits without rows: it gets them whole
        return
    if whole:
        _last[model] = head


def states(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[nn.Linear, Tensor] | None:
    """(head, h [B,T,D]) of a model whose logits are head(h); None where they have to be whole.

    So they have to be before `inspect_head` has seen it, and where the head's own gradient or
    output is wanted.
    """
    head = _last.get(model)
    if head is None or model.get_output_embeddings() is not head:  # type: ignore[operator]
        return None
    watched = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks
    # An offloaded one has its weight only while it runs.
    if (
        watched
        or not is_plain(head)
        or any(p.requires_grad or p.is_meta for p in head.parameters())
    ):
        return None
    h = _states(model, head, inputs)
    return None if h is None else (head, h)


def _states(model: nn.Module, head: nn.Linear, inputs: Mapping[str, Any]) -> Tensor | None:
    """What the head reads, of a pass in which it is given no row."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple) -> tuple:
        seen.append(args[0])
        return (args[0][..., :0, :], *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        model(**inputs)
    finally:
        handle.remove()
    return seen[0] if len(seen) == 1 and seen[0].ndim == 3 else None


def predicting(labels: Tensor) -> Places:
    """The positions [n] of labels [B,T] that predict one.

    To be asked before the model's pass: how many they are, the host learns from the device only
    when that has done all it was given.
    """
    b, t = (labels >= 0).nonzero(as_tuple=True)
    return b, t


def softmax_hessian(p: Tensor, u: Tensor) -> Tensor:
    """(diag p - p p^T) u, the Hessian of -log p of whichever label: p [n,V], u [...,n,V]."""
    pu = p * u
    return pu.addcmul_(p, pu.sum(-1, keepdim=True), value=-1)


def _some(h: Tensor, W: Tensor) -> Iterator[slice]:
    """Rows of h [n,D], as many at a time as may have logits."""
    some = max(1, (LOGITS if h.device.type == "cpu" else LOGITS_GPU) // (4 * len(W)))
    return (slice(at, at + some) for at in range(0, len(h), some))


def token_hessian(h: Tensor, head: nn.Linear, u: Tensor) -> Tensor:
    """W^T (diag p - p p^T) W u, the Hessian of `token_losses` in h: h [n,D], u [Q,n,D]."""
    W, b, found = head.weight, head.bias, torch.empty_like(u)
    for rows in _some(h, W):
        p = linear(h[rows], W, b).softmax(-1, dtype=wide(h.dtype))
        for each, out in zip(u[:, rows], found[:, rows], strict=True):
            curved = softmax_hessian(p, linear(each, W).to(p.dtype))
            out.copy_(linear(curved.to(W.dtype), W.t()))
    return found


def token_losses(
    h: Tensor, head: nn.Linear, labels: Tensor, places: Places, uniform: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """-log p of the labels, or of labels drawn from the model, at every position that has one.

    Args:
        h: what the head reads, [B,T,D].
        labels: what each position predicts, [B,T]; negative where nothing.
        places: where something, by `predicting`.
        uniform: fp64 [N,B,T]; gives N draws of labels in place of `labels`, which only say where.

    Returns:
        Losses [N,B,T] in nats, fp32 or wider, 0 where nothing is predicted (N = 1 without draws),
        and how many drawn labels rounding could flip.
    """
    here, there = labels.device, head.weight.device
    h, labels, b, t = (x.to(there) for x in (h, labels, *places))
    draws = None if uniform is None else uniform.to(h.device)[:, b, t]
    losses, edges = _Losses.apply(h[b, t], head.weight, head.bias, labels[b, t], draws)
    whole = losses.new_zeros(len(losses), *labels.shape)
    whole[:, b, t] = losses
    return whole.to(here), edges.to(here)


class _Losses(torch.autograd.Function):
    """Losses [N,n] of rows h [n,D], and their gradients on the way."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, W: Tensor, b: Tensor | None, labels: Tensor, draws: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dtype, device = h.dtype, h.device.type
        if torch.is_autocast_enabled(device):
            autocast = torch.get_autocast_dtype(device)
            h, W, b = h.to(autocast), W.to(autocast), None if b is None else b.to(autocast)
        chosen = labels.repeat(1 if draws is None else len(draws), 1)
        losses = h.new_zeros(chosen.shape, dtype=wide(h.dtype))
        first = torch.empty_like(h)  # gradients of the first draw's losses
        edges = chosen.new_zeros(())
        for rows in _some(h, W):
            log_p = linear(h[rows], W, b).to(losses.dtype).log_softmax(-1)
            p = log_p
            if draws is not None:
                p = log_p.exp()
                chosen[:, rows], near = inverted(p, draws[:, rows])
                edges += near
            y = chosen[:, rows].mT
            losses[:, rows] = -log_p.gather(1, y).mT
            if ctx.needs_input_grad[0]:
                if p is log_p:
                    p.exp_()
                p.scatter_add_(1, y[:, :1], p.new_full((1, 1), -1).expand(len(p), 1))
                first[rows] = linear(p.to(W.dtype), W.t())
        ctx.dtype = dtype
        ctx.save_for_backward(first, W, chosen)
        ctx.mark_non_differentiable(edges)
        return losses, edges

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None, None, None]:
        first, W, chosen = ctx.saved_tensors
        g = grad_outputs[0].to(W.dtype).unsqueeze(-1)
        dh = g.sum(0) * first
        for each, labels in zip(g[1:], chosen[1:], strict=True):
            dh += each * (W[chosen[0]] - W[labels])
        return dh.to(ctx.dtype), None, None, None, None
