"""P_b = (Qg^T G_b Qa) / (lam + damping), in the eigenbasis: the damped inverse of EK-FAC (Eq. 21).

    g, a, Qg, Qa, bias, order   as in `eigenvalues`
    lam      [O,J]  fp32 (fp64)  mean corrected eigenvalues
    damping  >= 0                absolute, added to every eigenvalue
    returns  [B,O,J] fp32 (fp64); Qg P Qa^T is the preconditioned gradient in weight space

The divide happens on the gradient tile while it is in cache. Truncation (`queries.truncate`)
follows in the eigenbasis, so that only thin factors are ever rotated back.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .gradients import cheapest_order, flops, rotated_gradients
from .shapes import Cost, Shape, check
from .testing.sampling import Sample, layers

SCHEMA = (
    "(Tensor g, Tensor a, Tensor? Qg, Tensor? Qa, Tensor lam, float damping, bool bias=False, "
    "str? order=None) -> Tensor"
)
SHAPES = "g[B,T,O] a[B,T,I] Qg[O,O] Qa[J,J] lam[O,J]"
torch.library.define("ekfac_fast::precondition", SCHEMA)


def reference(
    g: Tensor,
    a: Tensor,
    Qg: Tensor | None,
    Qa: Tensor | None,
    lam: Tensor,
    damping: float,
    bias: bool = False,
    order: str | None = None,
) -> Tensor:
    """The equation above; the quotient in the dtype of `lam`."""
    check("precondition", SHAPES, (g, a, Qg, Qa, lam), bias=bias, damping=damping, order=order)
    G = rotated_gradients(g, a, Qg, Qa, bias, order)
    return G.to(lam.dtype) / (lam + damping)


torch.library.impl("ekfac_fast::precondition", "default", reference)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    """Every layer of `sampling.layers`; no damping where the eigenvalues allow it."""
    for case in layers(dtype, device):
        damping = 0.0 if case.order is None else 0.1
        yield case.sample(
            case.g, case.a, case.Qg, case.Qa, case.lam, damping, case.bias, case.order
        )


def cost(shape: Shape, itemsize: int = 4) -> Cost:
    """Rotations and product in the cheapest order, one divide; P written once."""
    B, O, J = shape.B, shape.O, shape.J
    moved = shape.N * (O + shape.I) + O * O + J * J
    return Cost(flops(shape) + B * O * J, moved * itemsize + 4 * (B + 1) * O * J)


order = cheapest_order
