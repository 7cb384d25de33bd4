"""Linear layers and attention of a frozen model on the products that are fastest on this machine.

y = x W^T + b        dx = g W        and no gradient of W

On x86 with AVX-512, PyTorch gives fp32 products to MKL; oneDNN, which it carries too, has been as
fast or faster on every processor measured: 1.05 to 1.3 times, three times where MKL does not know
the vendor. With AVX2 alone they are alike, and neither multiplies bf16 or fp16: PyTorch's own loops
do, at a sixth of the rate of fp32, or at a 140th where W^T is contiguous (Hugging Face's `Conv1D`),
so there the numbers are widened. Which product it is depends on dtype and shape alone, so a
continued run ends in the same bits; `ekfac-fast doctor` shows the rates.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .attention import attention, pays

Operands = tuple[Tensor, Tensor, Tensor | None]

# Below so many FLOPs a product is over before the call of a Python function is.
WORTHWHILE = 1 << 24
# Numbers of 16 bytes; FLOPs of which what is left over is a small part on a GPU, launches included.
EVEN, WORTHWHILE_ODD = 8, 10**10


def onednn(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN: x [N,I] and W [O,I] fp32 -> [N,O]; W or W^T is contiguous."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")
    return y


def widened(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x W^T + b of 16-bit x [N,I], W [O,I] and b [O], multiplied in fp32 and rounded: [N,O]."""
    with torch.autocast("cpu", enabled=False):
        y = F.linear(x.float(), W.float(), None if b is None else b.float())
    return y.to(x.dtype)


@cache
def available() -> bool:
    """Whether oneDNN is here, on a processor on which it has been measured."""
    known = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    has = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return known and has


@cache
def multiplied(dtype: torch.dtype) -> bool:
    """Whether PyTorch has products of this dtype here, and not plain loops."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())


def product(dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """The product of a CPU's matrices that is faster here than `F.linear`, if one is."""
    if dtype == torch.float32:
        return onednn if available() else None
    return None if multiplied(dtype) else widened


def in_even_parts(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x W^T + b of 16-bit x [N,I], W [O,I] and b [O] of odd widths, on a GPU: [N,O], no gradient.

    Tensor cores multiply whole 16 bytes. Of matrices that end in less (GPT-2's 50257 words) cuBLAS
    multiplies everything at a fifth of its rate: here only what is left over.
    """
    (O, I), o, i = W.shape, len(W) // EVEN * EVEN, W.shape[1] // EVEN * EVEN
    if i < I:
        x = x.new_empty(len(x), i + EVEN)[:, :I].copy_(x)
    y = x.new_empty(len(x), -(-O // EVEN) * EVEN)[:, :O]
    for columns in (slice(o), slice(o, O)):
        part, these = y[:, columns], W[columns].t()
        if i < I:  # what is left over first: it is rounded, the long sum once
            torch.mm(x[:, i:], these[i:], out=part)
            part.addmm_(x[:, :i], these[:i])
        else:
            torch.mm(x, these, out=part)
    return y if b is None else y.add_(b)


def linear(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x W^T + b on whichever product is fastest: x [...,I], W [O,I] -> [...,O]."""
    if x.is_cuda:
        return in_even_parts(x, W, b) if _is_odd(x, W) else F.linear(x, W, b)
    these = _taken(x, W, b)
    return _multiply(*these) if these else F.linear(x, W, b)


def _is_odd(x: Tensor, W: Tensor) -> bool:
    """Whether a product on a GPU is one for `in_even_parts`."""
    return (
        x.ndim == 2
        and x.element_size() == 2
        and x.dtype == W.dtype
        and any(n % EVEN for n in W.shape)
        and 2 * x.numel() * len(W) >= WORTHWHILE_ODD
        and not torch.is_grad_enabled()
    )


def _plain(x: Any) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.is_floating_point()


def _pays(x: Any, W: Any, b: Any) -> bool:
    return (
        _plain(x)
        and _plain(W)
        and (b is None or (_plain(b) and b.ndim == 1))
        and x.ndim >= 2
        and W.ndim == 2
        and 2 * x.numel() * W.shape[0] >= WORTHWHILE
    )


def _dtype(*given: Tensor | None) -> torch.dtype | None:
    """In which these are multiplied on a CPU, under autocast or not; None if they do not match."""
    found = {x.dtype for x in given if x is not None}
    if torch.is_autocast_enabled("cpu") and torch.float64 not in found:
        return torch.get_autocast_dtype("cpu")
    return found.pop() if len(found) == 1 else None


def _taken(x: Tensor, W: Tensor, b: Tensor | None) -> Operands | None:
    """x, W and b as `product` multiplies them; None where `F.linear` is as fast."""
    if not _pays(x, W, b) or not (dtype := _dtype(x, W, b)) or not product(dtype):
        return None
    return x.to(dtype), W.to(dtype), None if b is None else b.to(dtype)


def _multiply(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x W^T + b of what `_taken` has taken."""
    some = product(x.dtype)
    assert some
    return some(x, W, b)


class _Linear(torch.autograd.Function):
    """x W^T + b of weights that need no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        ctx.W = W
        return _multiply(x.contiguous(), W, b)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:
        # A layer itself, so that a backward pass can be differentiated.
        return _Linear.apply(grad_outputs[0], ctx.W.t(), None), None, None


class Products(TorchFunctionMode):
    """While it is entered, frozen linear layers run on `product`, attention on `attention`.

    No module is touched: `nn.Linear` calls `F.linear`, Hugging Face's `Conv1D` calls `torch.addmm`.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """One call of a function of torch."""
        if func is F.scaled_dot_product_attention and (here := _attention(*args, **(kwargs or {}))):
            return here()
        if not kwargs:
            if func is F.linear and (these := _frozen(*args)):
                return _Linear.apply(*these)
            if func is torch.addmm and (these := _frozen(args[1], args[2].t(), args[0])):
                return _Linear.apply(*these)
        return func(*args, **(kwargs or {}))


def products_for(model: nn.Module) -> AbstractContextManager:
    """`Products`; nothing for a model that is all on GPUs, where no other product is faster, and
    looking at every function that it calls is half of what its host has to do.
    """
    return nullcontext() if all(p.is_cuda for p in model.parameters()) else Products()


def _frozen(x: Tensor, W: Tensor, b: Tensor | None = None) -> Operands | None:
    """What `_Linear` takes; None unless it is faster, and only the input's gradient is wanted."""
    wanted = W.requires_grad or (b is not None and b.requires_grad)
    if wanted or torch._C._are_functorch_transforms_active():
        return None
    return _taken(x, W, b)


def _attention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Callable[[], Tensor] | None:
    """What is called in the place of PyTorch's function; None where nothing else pays."""
    if not torch.backends.cuda.flash_sdp_enabled():
        return None  # fused attention is not wanted, here nor on a CPU
    if (
        any(type(x) is not Tensor or x.device.type != "cpu" for x in (Q, K, V))
        or dropout_p
        or not (dtype := _dtype(Q, K, V))
        or torch._C._are_functorch_transforms_active()
    ):
        return None
    if not multiplied(dtype):
        how = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return partial(_widened_attention, dtype, Q, K, V, attn_mask, **how)
    if dtype != torch.bfloat16 or not pays(Q, K, V, attn_mask, enable_gqa):
        return None
    Q, K, V = (x.to(dtype) for x in (Q, K, V))
    if enable_gqa:
        K, V = (x.repeat_interleave(Q.shape[1] // x.shape[1], 1) for x in (K, V))
    return partial(attention, Q, K, V, attn_mask, is_causal, scale)


def _widened_attention(
    dtype: torch.dtype, Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None, **how: Any
) -> Tensor:
    """Attention of what has been rounded to `dtype`, in fp32, rounded again."""
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    with torch.autocast("cpu", enabled=False):
        Q, K, V = (x.to(dtype).float() for x in (Q, K, V))
        return F.scaled_dot_product_attention(Q, K, V, mask, **how).to(dtype)
