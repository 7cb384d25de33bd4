"""What a stage does with every layer of a pass: with our ops, as the package does it, and in plain
torch, as well as one can.

Both start from the same `Start` and leave their results in `found`, by layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ekfac_fast.curvature.basis import SharedRotation
from ekfac_fast.curvature.choice import contraction
from ekfac_fast.curvature.low_rank import captured_energy, rotate_back, truncate
from ekfac_fast.model.capture import LayerBatch
from ekfac_fast.model.layers import Layer
from ekfac_fast.ops.shapes import wide
from ekfac_fast.stages.queries import DENSE_BYTES

from . import plain_torch
from .op_ways import energy, reflection, tolerance

STAGES = ("covariance", "eigenvalues", "queries", "scoring")
DAMPING = 0.1
ops = torch.ops.ekfac_fast


@dataclass(frozen=True)
class Start:
    """What a stage starts from: shapes, and random tensors in place of an earlier stage's results.

    Eigenvectors are reflections, one for all layers that read the same tensor (`owners`). Queries'
    factors are (P,) or (L, R), and `arranged` the same as plain torch wants them.
    """

    layers: dict[str, Layer]
    owners: dict[str, str]
    Qa: dict[str, Tensor]
    Qg: dict[str, Tensor]
    lam: dict[str, Tensor]
    factors: dict[str, tuple[Tensor, ...]]
    arranged: dict[str, tuple[Tensor, ...]]
    sequences: int
    queries: int
    rank: int


def start(
    stage: str,
    layers: list[Layer],
    owners: dict[str, str],
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Start:
    """Only what `stage` needs; sizes: sequences, tokens, queries, rank."""
    B, T, Q, K = sizes
    Qa, Qg, lam, factors, arranged = {}, {}, {}, {}, {}
    for x in layers:
        if stage in ("eigenvalues", "queries"):
            # In the accumulators' dtype: `fit` holds them so.
            if owners[x.name] == x.name:
                Qa[x.name] = reflection(x.J, device).to(wide(dtype))
            Qg[x.name] = reflection(x.O, device).to(wide(dtype))
        if stage == "queries":
            lam[x.name] = (torch.rand(x.O, x.J, device=device) + 0.05).to(wide(dtype))
        if stage == "scoring":
            own = factors[x.name] = _factors(x, Q, K, T, dtype, device)
            arranged[x.name] = plain_torch.arranged(*own) if len(own) == 2 else own
    named = {x.name: x for x in layers}
    return Start(named, owners, Qa, Qg, lam, factors, arranged, B, Q, K)


def _factors(
    layer: Layer, Q: int, K: int, T: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """(P,) or (L, R), as `score` chooses."""
    K = min(K, layer.O, layer.J)
    L = normalize(torch.randn(Q, layer.O, K, device=device), dim=1)
    R = normalize(torch.randn(Q, K, layer.J, device=device), dim=2)
    if contraction(layer, Q, K, T) == "low_rank":
        return L.to(dtype), R.to(dtype)
    return ((L @ R).to(dtype),)


class Side:
    """One way to do a stage; `consume` takes each layer of each batch."""

    def __init__(self, stage: str, start: Start):
        self.stage, self.start = stage, start
        self.consume: Callable[[LayerBatch], None] = getattr(self, stage)
        self.found: dict[str, Tensor | tuple[Tensor, Tensor]] = {}

    def sums(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """The accumulator of that name, zero at first."""
        if name not in self.found:
            self.found[name] = like.new_zeros(shape, dtype=wide(like.dtype))
        return self.found[name]

    def scores(self, like: Tensor) -> Tensor:
        """[Q,B], summed over layers."""
        return self.sums("scores", like, self.start.queries, self.start.sequences)


class Ours(Side):
    """As `fit`, `prepare_queries` and `score` do it, without their files."""

    def __init__(self, stage: str, start: Start):
        super().__init__(stage, start)
        self.rotate = SharedRotation()

    def covariance(self, seen: LayerBatch) -> None:
        """Inputs once for all that read them, gradients; one triangle each."""
        x = seen.layer
        if seen.shared == x.name:
            A = self.sums(f"A {x.name}", seen.a, x.J, x.J)
            ops.covariance(A, seen.a.flatten(0, 1), None, x.bias)
        ops.covariance(self.sums(f"S {x.name}", seen.g, x.O, x.O), seen.g.flatten(0, 1))

    def eigenvalues(self, seen: LayerBatch) -> None:
        """Activations rotated once for all that read them."""
        x = seen.layer
        a, Qa, bias = self.rotate(seen, self.start.Qa[self.start.owners[x.name]])
        Qg, Qa = self.start.Qg[x.name].to(seen.g), None if Qa is None else Qa.to(seen.g)
        ops.eigenvalues(self.sums(x.name, seen.g, x.O, x.J), seen.g, a, Qg, Qa, bias)

    def queries(self, seen: LayerBatch) -> None:
        """Precondition, truncate in the eigenbasis, rotate the thin factors back."""
        x, lam = seen.layer, self.start.lam[seen.layer.name]
        Qg, Qa = self.start.Qg[x.name], self.start.Qa[self.start.owners[x.name]]
        a, q, bias = self.rotate(seen, Qa.to(seen.g))
        parts = []
        some = max(1, DENSE_BYTES // (lam.element_size() * lam.numel()))
        for b in range(0, len(a), some):
            here = slice(b, b + some)
            P = ops.precondition(seen.g[here], a[here], Qg.to(seen.g), q, lam, DAMPING, bias)
            L, R = truncate(P, self.start.rank)
            captured_energy(P, L, R).cpu()
            parts.append([y.cpu() for y in rotate_back(L, R, Qg.to(P), Qa.to(P))])
        L, R = (torch.cat(y) for y in zip(*parts, strict=True))
        self.found[x.name] = L, R

    def scoring(self, seen: LayerBatch) -> None:
        """One op a layer."""
        factors, s = self.start.factors[seen.layer.name], self.scores(seen.g)
        op = ops.dense_scores if len(factors) == 1 else ops.low_rank_scores
        op(s, *factors, seen.g, seen.a, seen.layer.bias)


class Plain(Side):
    """Plain torch: gradients in memory, full squares, GEMMs and reductions; no copy it can spare.

    Compiled, its pointwise parts are fused by torch.compile.
    """

    def __init__(self, stage: str, start: Start, compiled: bool):
        super().__init__(stage, start)
        names = ("covariance", "eigenvalues", "precondition", "dense_scores", "low_rank_scores")
        ways = {name: getattr(plain_torch, name) for name in names}
        if compiled:
            ways = {name: torch.compile(way, dynamic=False) for name, way in ways.items()}
        self.ways = ways

    def covariance(self, seen: LayerBatch) -> None:
        """One GEMM for each covariance."""
        x = seen.layer
        if seen.shared == x.name:
            A = self.sums(f"A {x.name}", seen.a, x.J, x.J)
            self.ways["covariance"](A, seen.a.flatten(0, 1), None, x.bias)
        S = self.sums(f"S {x.name}", seen.g, x.O, x.O)
        self.ways["covariance"](S, seen.g.flatten(0, 1))

    def eigenvalues(self, seen: LayerBatch) -> None:
        """Two rotations, one bmm, squares and their sum."""
        x = seen.layer
        Qg, Qa = self.start.Qg[x.name], self.start.Qa[self.start.owners[x.name]]
        lam_sum = self.sums(x.name, seen.g, x.O, x.J)
        self.ways["eigenvalues"](lam_sum, seen.g, seen.a, Qg.to(seen.g), Qa.to(seen.g), x.bias)

    def queries(self, seen: LayerBatch) -> None:
        """The same gradients through torch.svd_lowrank."""
        x, lam = seen.layer, self.start.lam[seen.layer.name]
        Qg, Qa = self.start.Qg[x.name], self.start.Qa[self.start.owners[x.name]]
        parts = []
        some = max(1, DENSE_BYTES // (lam.element_size() * lam.numel()))
        for b in range(0, len(seen.a), some):
            g, a = seen.g[b : b + some], seen.a[b : b + some]
            P = self.ways["precondition"](g, a, Qg.to(g), Qa.to(g), lam, DAMPING, x.bias)
            U, S, V = torch.svd_lowrank(P, q=min(self.start.rank, x.O, x.J))
            L, R = U * S.unsqueeze(-2), V.mT
            parts.append([(Qg @ L).cpu(), (R @ Qa.mT).cpu()])
        L, R = (torch.cat(y) for y in zip(*parts, strict=True))
        self.found[x.name] = L, R

    def scoring(self, seen: LayerBatch) -> None:
        """Products with all queries side by side, then a sum."""
        factors, s = self.start.arranged[seen.layer.name], self.scores(seen.g)
        way = self.ways["dense_scores" if len(factors) == 1 else "low_rank_scores"]
        way(s, *factors, seen.g, seen.a, seen.layer.bias)


def agree(ours: Side, plain: Side, dtype: torch.dtype) -> float:
    """Relative difference of all results together; of queries, energy that ours lacks.

    Raises:
        AssertionError: it is more than rounding, or than a tenth of a percent of the energy.
    """
    assert ours.found.keys() == plain.found.keys()
    if ours.stage == "queries":
        kept, needed = (sum(energy(*lr) for lr in side.found.values()) for side in (ours, plain))
        error, allowed = max(0.0, 1 - kept / needed), 1e-3
    else:
        difference = sum(_norm(x - plain.found[name]) ** 2 for name, x in ours.found.items())
        error = (difference / sum(_norm(x) ** 2 for x in ours.found.values())) ** 0.5
        allowed = tolerance(dtype)
    assert error < allowed, (
        f"{ours.stage}: ours and plain torch differ by {error:.1e} (allowed {allowed:.1e})"
    )
    return error


def _norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x, dtype=torch.float64).item()
