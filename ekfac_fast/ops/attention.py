"""Attention in bf16 on a CPU: PyTorch's fused forward, and a backward of matrix products.

O = P V,  P = exp(scale Q K^T + mask - lse)        per head; lse is kept by the forward

dV = P^T dO,  dS = P * (dO V^T - rowsum(dO * O)),  dQ = scale dS K,  dK = scale dS^T Q

Q K^T is multiplied anew in fp32, as the fused forward sums it, so P is as exact as there; the other
products are bf16. PyTorch's own backward goes through small tiles one by one: both passes take 1.4
(T = 128) to 2 times (T = 32) as long, and as long or less from T = 256 on, and in fp32 always.
"""

from typing import Any

import torch
from torch import Tensor

# Of queries and keys.
LONGEST = 192
# Of P at a time: what stays in a core's cache.
ELEMENTS = 1 << 17


def available() -> bool:
    """Whether PyTorch has the fused forward under the name by which it is called here."""
    return hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


def attention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """O [B,H,T,D] of Q [B,H,T,D], K and V [B,H,S,D], bf16.

    `mask` is added, or True where a position is seen, and broadcasts to [B,H,T,S]; `scale` is
    D^-1/2 unless given. Wants a gradient of Q, K and V alone.
    """
    O: Tensor = _Attention.apply(Q, K, V, mask, causal, scale)
    return O


def pays(Q: Any, K: Any, V: Any, mask: Any = None, grouped: bool = False) -> bool:
    """Whether `attention` is for these arguments, and faster; `grouped`: with K and V repeated."""
    return (
        all(type(x) is Tensor and x.device.type == "cpu" and x.ndim == 4 for x in (Q, K, V))
        and Q.shape[0] == K.shape[0] == V.shape[0]
        and K.shape[1] == V.shape[1]
        and (Q.shape[1] % K.shape[1] == 0 if grouped else Q.shape[1] == K.shape[1])
        and Q.shape[3] == K.shape[3] == V.shape[3]
        and max(Q.shape[2], K.shape[2]) <= LONGEST
        and (mask is None or (type(mask) is Tensor and not mask.requires_grad and mask.ndim == 4))
        and any(x.requires_grad for x in (Q, K, V))
        and available()
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        Q: Tensor,
        K: Tensor,
        V: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
    ) -> Tensor:
        ctx.causal, ctx.scale = causal, Q.shape[-1] ** -0.5 if scale is None else scale
        added = mask
        if mask is not None and mask.dtype == torch.bool:
            added = torch.zeros(mask.shape, dtype=Q.dtype).masked_fill_(~mask, -torch.inf)
        O: Tensor
        O, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            Q, K, V, 0.0, causal, attn_mask=added, scale=ctx.scale
        )
        ctx.save_for_backward(Q, K, V, added, O, lse)
        return O

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        dO = grad_outputs[0]
        Q, K, V, added, O, lse = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (Q, K, V)]
        B, H, T, _ = Q.shape
        # A row that sees nothing has lse -inf, and no gradient.
        lse = lse.masked_fill(lse.isinf(), 0).neg_().unsqueeze(-1)
        along = torch.einsum("bhtd,bhtd->bht", dO.float(), O.float()).neg_().unsqueeze(-1)
        some = max(1, ELEMENTS // (H * T * K.shape[2]))
        with torch.autocast("cpu", enabled=False):
            for b in range(0, B, some):
                mask = None if added is None else added[b : b + some] if len(added) > 1 else added
                parts = (x[b : b + some] for x in (Q, K, V, dO, lse, along, *grads))
                _gradients(*parts, mask=mask, causal=ctx.causal, scale=ctx.scale)
        return *grads, None, None, None


def _gradients(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    dO: Tensor,
    lse: Tensor,
    along: Tensor,
    dQ: Tensor,
    dK: Tensor,
    dV: Tensor,
    *,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> None:
    """Write dQ, dK and dV of some sequences; `lse` and `along` [B,H,T,1] are negative."""

    def flat(x: Tensor) -> Tensor:
        return x.float().flatten(0, 1)

    shape = (*Q.shape[:3], K.shape[2])
    P = torch.baddbmm(flat(lse), flat(Q) * scale, flat(K).mT).view(shape)
    if mask is not None:
        P += mask
    P.exp_()
    if causal:
        P.tril_()
    dV.copy_(P.to(Q.dtype).mT @ dO)
    P *= torch.baddbmm(flat(along), flat(dO), flat(V).mT).view(shape)
    dS = P.to(Q.dtype)
    dQ.copy_((dS @ K).mul_(scale))
    dK.copy_((dS.mT @ Q).mul_(scale))
