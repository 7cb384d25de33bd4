"""The letters of every op, and the one check of its arguments.

A card states its tensors in one line, e.g. `s[Q,B]|[Q,B,T] P[Q,O,J] g[B,T,O] a[B,T,I]`: each name
with its shape, alternatives separated by `|`. `check` binds the letters left to right and refuses
the first argument that contradicts them. `csrc/check.h` reads the same line the same way.

    B sequences  T tokens  I input features  O output features  Q queries  K rank  N rows
    J = I + 1 where the layer has a bias, else I
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, bfloat16, float16, float32, float64

FLOATS = (float32, bfloat16, float16, float64)
# fp32 (fp64 for fp64 inputs) whatever the inputs are: sums, eigenvalues, scores.
ACCUMULATORS = frozenset({"cov", "lam", "lam_sum", "s"})
# Contraction orders (`gradients.py`), named after what is rotated by tokens.
ORDERS = ("tokens", "a_tokens", "g_tokens", "gradient")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The accumulators' dtype for operands of `dtype`."""
    return float64 if dtype == float64 else float32


@dataclass(frozen=True)
class Shape:
    """Sizes of one call, in the letters above; `bias` says whether the layer has one."""

    B: int = 1
    T: int = 1
    I: int = 1
    O: int = 1
    Q: int = 0
    K: int = 0
    bias: bool = False

    @property
    def J(self) -> int:
        """Input features with the bias column."""
        return self.I + int(self.bias)  # a bool is no summand of a symbolic size

    @property
    def N(self) -> int:
        """Flattened rows."""
        return self.B * self.T


@dataclass(frozen=True)
class Cost:
    """Least work of one call: floating point operations, and bytes read and written once each."""

    flops: int
    bytes: int


class Card(Protocol):
    """What every module of `ops.ALL` holds: an op in one page."""

    @property
    def __name__(self) -> str:
        """The module; its last part is the stem."""
        ...

    @property
    def SCHEMA(self) -> str:
        """Its declaration to PyTorch."""
        ...

    @property
    def SHAPES(self) -> str:
        """Its tensors and their letters."""
        ...

    @property
    def reference(self) -> Callable[..., Tensor | None]:
        """The equation in plain torch."""
        ...

    @property
    def samples(self) -> Callable[..., Iterator[Any]]:
        """Inputs for tests, the edges included."""
        ...

    @property
    def cost(self) -> Callable[..., Cost]:
        """Least work of one call."""
        ...


@cache
def parse(line: str) -> tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]:
    """`cov[J,J] x[N,I]` -> (("cov", (("J", "J"),)), ("x", (("N", "I"),)))."""
    return tuple(
        (name, tuple(tuple(s.split(",")) for s in re.findall(r"\[([^\]]+)\]", shapes)))
        for name, shapes in re.findall(r"(\w+)((?:\|?\[[^\]]+\])+)", line)
    )


def check(
    op: str,
    line: str,
    args: tuple[Tensor | None, ...],
    *,
    bias: bool = False,
    damping: float = 0.0,
    order: str | None = None,
) -> dict[str, int]:
    """Bind the letters of `line` to the sizes of `args`; return them.

    An argument that is None is skipped. J is I + 1 with a bias, else I. Where `Qa` is None
    the activations are already in the eigenbasis: their features count as J, `bias` must be False.

    Raises:
        ValueError: a rank, size, damping or order is wrong; names op, argument and both shapes.
        TypeError: a dtype is wrong, or dtypes that must agree differ.
        RuntimeError: tensors are on different devices.
    """
    letters: dict[str, int] = {}
    where: dict[str, str] = {}
    first: Tensor | None = None
    operand: tuple[str, Tensor] | None = None
    named = [
        (name, alternatives, x) for (name, alternatives), x in zip(parse(line), args, strict=True)
    ]
    if bias and any(name == "Qa" and x is None for name, _, x in named):
        raise ValueError(
            f"{op}: bias=True but Qa is None. Activations already in the eigenbasis include the "
            "bias row of Qa: pass them with bias=False"
        )
    ones = int(bias)  # of a symbolic size no bool can be subtracted
    for name, alternatives, x in named:
        if x is None:
            continue
        shape = next((s for s in alternatives if len(s) == x.ndim), None)
        if shape is None:
            expected = " or ".join(f"[{','.join(s)}]" for s in alternatives)
            raise ValueError(f"{op}: {name} has shape {list(x.shape)}, expected {expected}")
        for letter, size in zip(shape, x.shape, strict=True):
            # I and J are one letter apart from the bias, so either may be seen first.
            key, value = ("I", size - ones) if letter == "J" else (letter, size)
            if letters.setdefault(key, value) != value:
                wanted = letters[key] + (ones if letter == "J" else 0)
                raise ValueError(
                    f"{op}: {name} has shape {list(x.shape)}, expected [{','.join(shape)}] with "
                    f"{letter}={wanted} (from {where[key]}"
                    f"{', J = I + 1 because bias=True' if bias and key == 'I' else ''})"
                )
            where.setdefault(key, f"{name} {list(x.shape)}")
        first = x if first is None else first
        if x.device != first.device:
            raise RuntimeError(
                f"{op}: {name} is on {x.device} but {named[0][0]} is on {first.device}; move one"
            )
        if name not in ACCUMULATORS and name != "mask":
            if x.dtype not in FLOATS:
                raise TypeError(
                    f"{op}: {name} is {x.dtype}, expected float32, bfloat16, float16 or float64"
                )
            if operand is None:
                operand = (name, x)
            elif x.dtype != operand[1].dtype:
                raise TypeError(
                    f"{op}: {name} is {x.dtype} but {operand[0]} is {operand[1].dtype}; "
                    "operands share one dtype"
                )
    assert operand is not None
    narrow = operand[1].dtype
    for name, _, x in named:
        if x is not None and name in ACCUMULATORS and x.dtype != wide(narrow):
            raise TypeError(
                f"{op}: {name} is {x.dtype}, expected {wide(narrow)} (operands are {narrow})"
            )
    if not damping >= 0:
        raise ValueError(f"{op}: damping is {damping:g}, expected a number >= 0")
    if order is not None and order not in ORDERS:
        raise ValueError(f"{op}: order is '{order}', expected one of {', '.join(ORDERS)}")
    letters["J"] = letters["I"] + ones
    return letters
