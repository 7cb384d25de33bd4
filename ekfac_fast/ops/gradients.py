"""The per-sequence gradient in the eigenbasis, G_b = Qg^T (sum_t g_bt a_bt^T) Qa, in plain torch.

Three ops are this product with different endings. Each side is rotated either token by token,
before the product, or on the gradient, after it: four orders, one result, different costs (FLOPs
a sequence, besides the 2 T O J of the product itself):

    side         on tokens     on the gradient    so: on tokens iff
    a by Qa      2 T J^2       2 O J^2            T < O
    g by Qg      2 T O^2       2 O^2 J            T < J

On a CPU rotations of bf16 on tokens are `mm` itself, and bf16 gradients that are rotated `bmm`;
without AVX-512 so are those of fp32 (on Intel processors with it, too), and the last product, of
squares that stay in cache. On a GPU small gradients are products of the library's
(`csrc/cuda/small.cpp`), and narrow layers take the middle way in one launch, whichever is cheapest
(`triton_kernels/narrow.py`), unless an order is forced.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .shapes import Shape


def cheapest_order(shape: Shape) -> str:
    """The contraction order of least FLOPs; `csrc/check.h` computes the same."""
    a, g = shape.T < shape.O, shape.T < shape.J
    return "tokens" if a and g else "a_tokens" if a else "g_tokens" if g else "gradient"


def flops(shape: Shape, rotate_g: bool = True, rotate_a: bool = True) -> int:
    """FLOPs of all B rotated gradients in the cheapest order."""
    T, O, J = shape.T, shape.O, shape.J
    rotations = rotate_a * J * J * min(T, O) + rotate_g * O * O * min(T, J)
    return 2 * shape.B * (rotations + T * O * J)


def with_ones(a: Tensor, bias: bool) -> Tensor:
    """(a, 1), for products that want the ones column: a [...,I] -> [...,J]."""
    return pad(a, (0, 1), value=1.0) if bias else a


def rotate_activations(a: Tensor, Qa: Tensor, bias: bool) -> Tensor:
    """(a, 1) Qa without forming the ones column: a [...,I], Qa [J,J] -> [...,J]."""
    return a @ Qa[:-1] + Qa[-1] if bias else a @ Qa


def gradients(g: Tensor, a: Tensor, bias: bool) -> Tensor:
    """Per-sequence gradients sum_t g_bt (a_bt, 1)^T: g [B,T,O], a [B,T,I] -> [B,O,J]."""
    G = g.mT @ a
    return torch.cat([G, g.sum(1).unsqueeze(-1)], dim=-1) if bias else G


def rotated_gradients(
    g: Tensor, a: Tensor, Qg: Tensor | None, Qa: Tensor | None, bias: bool, forced: str | None
) -> Tensor:
    """Qg^T G_b Qa of every sequence, in the `forced` or the cheapest order: [B,O,J], as `g`."""
    (B, T, O), I = g.shape, a.shape[-1]
    by = forced or cheapest_order(Shape(B=B, T=T, I=I, O=O, bias=bias))
    if Qg is not None and by in ("tokens", "g_tokens"):
        g, Qg = g @ Qg, None
    if Qa is not None and by in ("tokens", "a_tokens"):
        a, Qa, bias = rotate_activations(a, Qa, bias), None, False
    G = gradients(g, a, bias)
    G = G if Qa is None else G @ Qa
    return G if Qg is None else Qg.mT @ G
