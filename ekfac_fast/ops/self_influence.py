"""s_b += sum_oj (Qg^T G_b Qa)^2 / (lam + damping): the influence of a sequence on itself.

    s        [B]  fp32 (fp64)   running sum over layers
    g, a, Qg, Qa, bias, order   as in `eigenvalues`
    lam, damping                as in `precondition`

The rotations are orthogonal, so g^T (G + damping)^-1 g needs no rotation back; kernels reduce the
gradient tile where it was computed.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .gradients import cheapest_order, flops, rotated_gradients
from .shapes import Cost, Shape, check
from .testing.sampling import Sample, layers

SCHEMA = (
    "(Tensor(a!) s, Tensor g, Tensor a, Tensor? Qg, Tensor? Qa, Tensor lam, float damping, "
    "bool bias=False, str? order=None) -> ()"
)
SHAPES = "s[B] g[B,T,O] a[B,T,I] Qg[O,O] Qa[J,J] lam[O,J]"
torch.library.define("ekfac_fast::self_influence", SCHEMA)


def reference(
    s: Tensor,
    g: Tensor,
    a: Tensor,
    Qg: Tensor | None,
    Qa: Tensor | None,
    lam: Tensor,
    damping: float,
    bias: bool = False,
    order: str | None = None,
) -> None:
    """The equation above; squares, quotient and sum in the dtype of `lam`."""
    check("self_influence", SHAPES, (s, g, a, Qg, Qa, lam), bias=bias, damping=damping, order=order)
    G = rotated_gradients(g, a, Qg, Qa, bias, order)
    s += (G.to(lam.dtype).square() / (lam + damping)).sum((1, 2))


torch.library.impl("ekfac_fast::self_influence", "default", reference)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    """Every layer of `sampling.layers`, accumulated onto scores that are not zero."""
    for case in layers(dtype, device):
        s = torch.rand_like(case.lam[0, 0].expand(case.shape.B))
        damping = 0.0 if case.order is None else 0.1
        yield case.sample(
            s, case.g, case.a, case.Qg, case.Qa, case.lam, damping, case.bias, case.order
        )


def cost(shape: Shape, itemsize: int = 4) -> Cost:
    """Rotations and product in the cheapest order; square, divide, add; lam read once."""
    B, O, J = shape.B, shape.O, shape.J
    moved = shape.N * (O + shape.I) + O * O + J * J
    return Cost(flops(shape) + 3 * B * O * J, moved * itemsize + 4 * O * J)


order = cheapest_order
