"""lam_sum += sum_b (Qg^T G_b Qa)^2, G_b = sum_t g_bt (a_bt, 1)^T: corrected eigenvalues (Eq. 20).

The square is taken per sequence, after the sum over its tokens.

    lam_sum  [O,J]    fp32 (fp64)  running sum over sequences
    g        [B,T,O]  operand      gradient of the summed loss at the output; padding: zero rows
    a        [B,T,I]  operand      the layer's input
    Qg, Qa   [O,O], [J,J]          eigenvectors in columns; None: that side is already rotated
                                   (then a has J features and bias is False)
    order                          contraction order (`gradients.py`); None: the cheapest

Kernels square the gradient tile where it was computed; no [B,O,J] tensor exists.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .gradients import cheapest_order, flops, rotated_gradients
from .shapes import Cost, Shape, check
from .testing.sampling import Sample, layers

SCHEMA = (
    "(Tensor(a!) lam_sum, Tensor g, Tensor a, Tensor? Qg, Tensor? Qa, bool bias=False, "
    "str? order=None) -> ()"
)
SHAPES = "lam_sum[O,J] g[B,T,O] a[B,T,I] Qg[O,O] Qa[J,J]"
torch.library.define("ekfac_fast::eigenvalues", SCHEMA)


def reference(
    lam_sum: Tensor,
    g: Tensor,
    a: Tensor,
    Qg: Tensor | None,
    Qa: Tensor | None,
    bias: bool = False,
    order: str | None = None,
) -> None:
    """The equation above; the square and the sum in the accumulator's dtype."""
    check("eigenvalues", SHAPES, (lam_sum, g, a, Qg, Qa), bias=bias, order=order)
    G = rotated_gradients(g, a, Qg, Qa, bias, order)
    lam_sum += G.to(lam_sum.dtype).square().sum(0)


torch.library.impl("ekfac_fast::eigenvalues", "default", reference)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    """Every layer of `sampling.layers`, accumulated onto a lam_sum that is not zero."""
    for case in layers(dtype, device):
        lam_sum = torch.rand_like(case.lam) * case.shape.N
        yield case.sample(lam_sum, case.g, case.a, case.Qg, case.Qa, case.bias, case.order)


def cost(shape: Shape, itemsize: int = 4) -> Cost:
    """Rotations and product in the cheapest order, square and add; lam_sum read and written."""
    B, O, J = shape.B, shape.O, shape.J
    moved = shape.N * (O + shape.I) + O * O + J * J
    return Cost(flops(shape) + 2 * B * O * J, moved * itemsize + 2 * 4 * O * J)


order = cheapest_order
