"""What the kernels of csrc/cuda are called with, on a GPU and emulated."""

from collections.abc import Iterator

import torch

from ekfac_fast import ops
from ekfac_fast.ops.shapes import Shape
from ekfac_fast.ops.testing.sampling import Sample, draw, orthogonal

# The ops that csrc/cuda has, and the dtypes that its tensor cores take.
CARDS = tuple(card for card in ops.ALL if card is not ops.covariance)
DTYPES = (torch.bfloat16, torch.float16)


def call(card):
    """The CUDA C++ kernel of a card."""
    return getattr(torch.ops.ekfac_fast_cuda, ops.stem(card))


def layer_sample(
    card, dtype, device="cpu", B=3, T=70, O=600, I=265, Q=12, K=32, bias=True
) -> Sample:
    """One call of an op on a layer of many tiles in rows and columns, the last ones cut."""
    shape = Shape(B=B, T=T, I=I, O=O, Q=Q, K=K, bias=bias)
    J, s = shape.J, torch.rand(Q, B, device=device)
    g, a = (draw(B, T, F, dtype=dtype, device=device) for F in (O, I))
    Qg, Qa = (orthogonal(n, dtype, device) for n in (O, J))
    lam = torch.rand(O, J, device=device) + 0.05
    L, R = draw(Q, O, K, dtype=dtype, device=device), draw(Q, K, J, dtype=dtype, device=device)
    args = {
        "eigenvalues": (lam.clone(), g, a, Qg, Qa, bias),
        "precondition": (g, a, Qg, Qa, lam, 0.1, bias),
        "self_influence": (s[0].clone(), g, a, Qg, Qa, lam, 0.1, bias),
        "dense_scores": (s, L @ R, g, a, bias),
        "low_rank_scores": (s, L, R, g, a, bias),
    }[ops.stem(card)]
    return Sample(f"layer of {O} x {J}, rank {K}", shape, args, terms=B * T + O + J)


def samples(card, dtype, device="cpu") -> Iterator[Sample]:
    """Those of the card, and layers of many tiles; ranks of several tiles."""
    for sample in card.samples(dtype, device):
        # Per token, full-rank queries are Triton's alone.
        if card is not ops.dense_scores or sample.args[0].ndim == 2:
            yield sample
    yield layer_sample(card, dtype, device)
    if card in (ops.precondition, ops.self_influence, ops.dense_scores):
        # Fours of sequences side by side on a tile.
        yield layer_sample(card, dtype, device, B=8, T=20, O=300, I=140, Q=2)
    if card is ops.low_rank_scores:
        yield layer_sample(card, dtype, device, O=70, I=64, Q=3, K=200)
        yield layer_sample(card, dtype, device, B=1, T=20, O=70, I=64, Q=2, K=100)
