"""The two-error rule: the one measure by which tests and benches accept a kernel.

A kernel may err, against the reference in fp64, at most twice as much as the reference does in the
kernel's own dtype, plus a floor of c eps sqrt(n) x the size of the result, without which a correct
kernel fails on inputs where the reference is lucky. Both the largest and the root mean square error
count.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..shapes import Card
from .sampling import Sample

C = 2.0


@dataclass(frozen=True)
class Error:
    """Errors against fp64, what was allowed, and where the largest is."""

    max: float
    rms: float
    allowed_max: float
    allowed_rms: float
    worst: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """Within the rule; a NaN is not."""
        return self.max <= self.allowed_max and self.rms <= self.allowed_rms


def run(op: Callable, args: tuple) -> Tensor:
    """The result of one call on copies of its arguments: the output, or the first argument if
    none."""
    # Strides are kept: they are part of what is tested.
    copies = tuple(_copy(x) if isinstance(x, Tensor) else x for x in args)
    out = op(*copies)
    return copies[0] if out is None else out


def measure(card: Card, sample: Sample, op: Callable) -> Error:
    """Compare `op` with the card's reference in fp64 and in the sample's own dtype."""
    exact_args = tuple(
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in sample.args
    )
    exact = run(card.reference, exact_args)
    floats = (x for x in sample.args if isinstance(x, Tensor) and x.is_floating_point())
    operand = min(floats, key=Tensor.element_size)
    if operand.dtype == torch.float64:
        allowed_max = allowed_rms = 0.0
    else:
        allowed_max, allowed_rms, _ = _errors(run(card.reference, sample.args), exact)
    worst_max, rms, worst = _errors(run(op, sample.args), exact)
    result = torch.float64 if operand.dtype == torch.float64 else torch.float32
    eps = torch.finfo(result).eps * sample.terms**0.5
    if operand.element_size() == 2:
        # Rotated operands are rounded to 16 bits, in the reference as in a kernel, each its own
        # way.
        eps += torch.finfo(operand.dtype).eps / 4
    floor = C * eps * (exact.square().mean().sqrt().item() if exact.numel() else 0.0)
    peak = exact.abs().max().item() if exact.numel() else 0.0
    return Error(
        worst_max, rms, 2 * allowed_max + max(floor, C * eps * peak), 2 * allowed_rms + floor, worst
    )


def check(card: Card, sample: Sample, op: Callable) -> Error:
    """`measure`, refusing a kernel outside the rule.

    Raises:
        AssertionError: names the sample, both errors and the worst coordinate.
    """
    error = measure(card, sample, op)
    if not error.ok:
        raise AssertionError(
            f"{card.__name__}, {sample.why}: max error {error.max:.3e} (allowed "
            f"{error.allowed_max:.3e}) at {error.worst}, rms {error.rms:.3e} (allowed "
            f"{error.allowed_rms:.3e})"
        )
    return error


def _copy(x: Tensor) -> Tensor:
    """A copy with the strides of `x`, also where they have gaps."""
    if 0 in x.stride() or not x.numel():
        return x.clone()
    holder = x.new_empty(sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1)
    return holder.as_strided(x.shape, x.stride()).copy_(x)


def _errors(got: Tensor, exact: Tensor) -> tuple[float, float, tuple[int, ...]]:
    if not exact.numel():
        return 0.0, 0.0, ()
    error = (got.double() - exact).abs()
    error = torch.where(error.isnan(), torch.inf, error)
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    return error.max().item(), error.square().mean().sqrt().item(), worst
