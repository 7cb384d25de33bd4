"""Linear layers and attention of a frozen model on the products that are fastest on this machine.

y = x W^T + b        dx = g W        and no gradient of W

On x86 with AVX-512, PyTorch gives fp32 products to MKL; oneDNN, which it carries too, has been as
fast or faster on every processor measured: 1.05 to 1.3 times, three times where MKL does not know
the vendor. Which one it is depends on dtype and shape alone, so a continued run ends in the same
bits; `ekfac-fast doctor` shows both rates.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .attention import attention, pays

# Below so many FLOPs a product is over before the call of a Python function is.
WORTHWHILE = 1 << 24


def onednn(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN: x [N,I] and W [O,I] fp32 -> [N,O]; W or W^T is contiguous."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")
    return y


@cache
def available() -> bool:
    """Whether oneDNN is here, on a processor on which it has been measured."""
    known = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    has = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return known and has


def linear(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x W^T + b on whichever product is fastest: x [...,I], W [O,I] -> [...,O]."""
    return onednn(x, W, b) if _pays(x, W, b) else F.linear(x, W, b)


def _plain(x: Any) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32


def _pays(x: Any, W: Any, b: Any) -> bool:
    return (
        _plain(x)
        and _plain(W)
        and (b is None or _plain(b))
        and x.device.type == "cpu"
        and x.ndim >= 2
        and W.ndim == 2
        and 2 * x.numel() * W.shape[0] >= WORTHWHILE
        and not torch.is_autocast_enabled("cpu")
        and available()
    )


class _Linear(torch.autograd.Function):
    """x W^T + b of weights that need no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        ctx.W = W
        return onednn(x.contiguous(), W, b)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:
        # A layer itself, so that a backward pass can be differentiated.
        return _Linear.apply(grad_outputs[0], ctx.W.t(), None), None, None


class Products(TorchFunctionMode):
    """While it is entered, frozen linear layers run on `linear`, attention on `attention`.

    No module is touched: `nn.Linear` calls `F.linear`, Hugging Face's `Conv1D` calls `torch.addmm`.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """One call of a function of torch."""
        if func is F.scaled_dot_product_attention and (here := _attention(*args, **(kwargs or {}))):
            return attention(*here)
        if not kwargs:
            if func is F.linear and _frozen(*args):
                return _Linear.apply(args[0], args[1], args[2] if len(args) > 2 else None)
            if func is torch.addmm and args[0].ndim == 1 and _frozen(args[1], args[2].t(), args[0]):
                return _Linear.apply(args[1], args[2].t(), args[0])
        return func(*args, **(kwargs or {}))


def _frozen(x: Tensor, W: Tensor, b: Tensor | None = None) -> bool:
    """Whether `_Linear` is this layer: worth it, and only the input's gradient is wanted."""
    return (
        _pays(x, W, b)
        and not W.requires_grad
        and (b is None or not b.requires_grad)
        and not torch._C._are_functorch_transforms_active()
    )


def _attention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Any, ...] | None:
    """What `attention` takes in the place of PyTorch's function; None where it does not pay."""
    if not torch.backends.cuda.flash_sdp_enabled():
        return None  # fused attention is not wanted, here nor on a CPU
    cast = torch.is_autocast_enabled("cpu") and Q.device.type == "cpu"
    dtype = torch.get_autocast_dtype("cpu") if cast else Q.dtype
    if (
        dropout_p
        or dtype != torch.bfloat16
        or not (cast or Q.dtype == K.dtype == V.dtype)
        or not pays(Q, K, V, attn_mask, enable_gqa)
        or torch._C._are_functorch_transforms_active()
    ):
        return None
    Q, K, V = (x.to(dtype) for x in (Q, K, V))
    if enable_gqa:
        K, V = (x.repeat_interleave(Q.shape[1] // x.shape[1], 1) for x in (K, V))
    return Q, K, V, attn_mask, is_causal, scale
