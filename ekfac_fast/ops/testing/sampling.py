"""Inputs that the cards hand to tests: drawn, orthogonal, strided; every case with a reason."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..shapes import ORDERS, Shape, wide


@dataclass(frozen=True)
class Sample:
    """One call of an op: why it is tested, sizes, arguments, the terms of its longest sum."""

    why: str
    shape: Shape
    args: tuple
    terms: int


@dataclass(frozen=True)
class Layer:
    """What one linear layer hands to the ops that rotate a gradient."""

    why: str
    shape: Shape
    g: Tensor
    a: Tensor
    Qg: Tensor | None
    Qa: Tensor | None
    lam: Tensor
    bias: bool = False
    order: str | None = None

    def sample(self, *args: Any) -> Sample:
        """`args` as a sample; the longest sum runs over tokens and both widths."""
        return Sample(self.why, self.shape, args, self.shape.T + self.shape.O + self.shape.J)


def draw(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Standard normal numbers from the global generator."""
    return torch.randn(*shape, dtype=torch.float32).to(device, dtype)


def orthogonal(n: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """A random orthogonal matrix, rounded to `dtype`."""
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0].to(device, dtype)


def spd(n: int, like: Tensor) -> Tensor:
    """A symmetric [n,n] accumulator that is not zero, for operands such as `like`."""
    x = draw(n, n, dtype=torch.float32, device=str(like.device))
    return (x + x.T).to(wide(like.dtype))


def strided(x: Tensor) -> Tensor:
    """The values of `x` in a view with unusual strides: last two axes swapped, elements skipped."""
    holder = x.new_full((*x.shape[:-2], 2 * x.shape[-1], x.shape[-2] + 3), torch.nan)
    view = holder.mT[..., 2:-1, ::2]
    view.copy_(x)
    return view


def layers(dtype: torch.dtype, device: str = "cpu") -> Iterator[Layer]:
    """Layers at the edges of tiles and of the contraction orders."""

    def layer(
        why: str, B: int, T: int, I: int, O: int, bias: bool = False, **changes: Any
    ) -> Layer:
        shape = Shape(B=B, T=T, I=I, O=O, bias=bias)
        made = {
            "g": draw(B, T, O, dtype=dtype, device=device) / 8,
            "a": draw(B, T, I, dtype=dtype, device=device),
            "Qg": orthogonal(O, dtype, device),
            "Qa": orthogonal(shape.J, dtype, device),
            "lam": torch.rand(O, shape.J, dtype=torch.float64).to(device, wide(dtype)) + 0.05,
        }
        return Layer(why, shape, bias=bias, **(made | changes))

    yield layer("smallest", 1, 1, 1, 1)
    yield layer("one token, bias", 3, 1, 7, 5, bias=True)
    yield layer("primes, few tokens", 2, 13, 67, 131, bias=True)
    yield layer("primes, many tokens", 3, 211, 61, 37, bias=True)
    yield layer("a tile and one more", 2, 33, 129, 65)
    yield layer("a tile less one", 2, 65, 127, 255, bias=True)
    yield layer("more rows than meet columns in place", 9, 30, 40, 50, bias=True)
    yield layer("wide eigenvectors that few rows meet", 4, 60, 300, 50, bias=True)
    yield layer("no sequences", 0, 16, 8, 12, bias=True)
    for order in ORDERS:
        yield layer(f"forced order {order}", 2, 40, 48, 24, bias=True, order=order)
    yield layer("already rotated", 2, 40, 48, 24, Qg=None, Qa=None)
    yield layer("only a rotated before", 2, 40, 48, 24, Qa=None)
    yield layer("only g rotated before", 2, 40, 48, 24, bias=True, Qg=None)
    case = layer("strided", 2, 40, 48, 24, bias=True)
    views = {name: strided(getattr(case, name)) for name in ("g", "a", "Qg", "Qa", "lam")}
    yield layer("strided", 2, 40, 48, 24, bias=True, **views)
    padded = case.g.clone()
    padded[:, 29:] = 0
    yield layer("padding is zero rows of g", 2, 40, 48, 24, bias=True, g=padded)
    yield layer("large values", 2, 40, 48, 24, a=case.a * 64)
