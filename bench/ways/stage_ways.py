"""What a stage does with every layer of a pass: the package's own consumers, and plain torch, as
well as one can.

Both start from the same `Start` and leave their results in `found`, by layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ekfac_fast.curvature.basis import Eigenvectors
from ekfac_fast.curvature.query_gradients import LowRank, QueryGradients
from ekfac_fast.model.layer_batch import LayerBatch
from ekfac_fast.model.layers import Layer
from ekfac_fast.ops.shapes import wide
from ekfac_fast.stages import scan
from ekfac_fast.stages.consumer import Batch, Consumer
from ekfac_fast.stages.factors import LayerFactors
from ekfac_fast.stages.fit import COVARIANCE_DRAW, EIGENVALUE_DRAW
from ekfac_fast.stages.measured import Preconditioning, dense_bytes
from ekfac_fast.stages.moments import Covariances, Eigenvalues
from ekfac_fast.stages.queries import LayerQueries, Queries
from ekfac_fast.stages.run import Run
from ekfac_fast.stages.waiting import Waiting
from ekfac_fast.store.folder import Store

from . import plain_torch
from .op_ways import energy, reflection, tolerance

STAGES = ("covariance", "eigenvalues", "queries", "scoring")
DAMPING = 0.1
Found = dict[str, Tensor | tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Start:
    """What a stage starts from: shapes, and random tensors in place of an earlier stage's results.

    Eigenvectors are reflections, one for all layers that read the same tensor (`owners`). Queries'
    gradients are as `score` holds them, and `arranged` the same as plain torch wants them.
    """

    layers: dict[str, Layer]
    owners: dict[str, str]
    Qa: dict[str, Tensor]
    Qg: dict[str, Tensor]
    lam: dict[str, Tensor]
    gradients: dict[str, QueryGradients]
    arranged: dict[str, tuple[Tensor, ...]]
    sequences: int
    queries: int
    rank: int


def made_run(model: nn.Module, inputs: dict[str, Tensor]) -> Run:
    """The package's run over the sequences of a batch, all in one."""
    names = ("input_ids", "labels")
    data = [
        dict(zip(names, (x.cpu() for x in pair), strict=True))
        for pair in zip(*(inputs[name] for name in names), strict=True)
    ]
    return Run(model, data, {"batch_tokens": inputs["input_ids"].numel()})


def start(
    stage: str, layers: list[Layer], owners: dict[str, str], run: Run, Q: int, K: int
) -> Start:
    """Only what `stage` needs."""
    device, dtype = run.device, run.dtype
    Qa, Qg, lam, gradients, arranged = {}, {}, {}, {}, {}
    for x in layers:
        if stage in ("eigenvalues", "queries"):
            # In the accumulators' dtype: `fit` holds them so.
            if owners[x.name] == x.name:
                Qa[x.name] = reflection(x.J, device).to(wide(dtype))
            Qg[x.name] = reflection(x.O, device).to(wide(dtype))
        if stage == "queries":
            lam[x.name] = (torch.rand(x.O, x.J, device=device) + 0.05).to(wide(dtype))
    if stage == "scoring":
        held = tuple(_factors(x, Q, K, device) for x in layers)
        made = Queries(held, K, (DAMPING,) * len(layers), torch.zeros(Q), ())
        # Private, but the choice between dense and low rank is not to be made here again.
        gradients = scan.on_device(run, made)
        for name, own in gradients.items():
            low = isinstance(own, LowRank)
            arranged[name] = plain_torch.arranged(own.L, own.R) if low else (own.P,)
    named = {x.name: x for x in layers}
    return Start(named, owners, Qa, Qg, lam, gradients, arranged, run.batches.size, Q, K)


def _factors(layer: Layer, Q: int, K: int, device: torch.device) -> LayerQueries:
    """Queries of a layer, truncated."""
    K = min(K, layer.O, layer.J)
    L = normalize(torch.randn(Q, layer.O, K, device=device), dim=1)
    R = normalize(torch.randn(Q, K, layer.J, device=device), dim=2)
    return LayerQueries(layer, L, R, None, torch.ones(Q))


class Ours:
    """The consumer of `fit`, `prepare_queries` or `score`; what it would write stays in memory."""

    def __init__(self, stage: str, start: Start, run: Run, store: Store, inputs: dict[str, Tensor]):
        self.stage, self.start, self.run = stage, start, run
        indices = range(run.batches.size)
        self.batch = Batch(0, indices, inputs, run.grid(inputs, indices))
        self.consumer = self._consumer(store)
        self.consumer.begin(self.batch)

    def _consumer(self, store: Store) -> Consumer:
        """Made as the stage makes it."""
        begun, layers = self.start, list(self.start.layers.values())
        if self.stage == "covariance":
            return Covariances(self.run, store, layers, Waiting(self.run, layers))
        if self.stage == "eigenvalues":
            dtype = self.run.dtype
            Qa = {name: x.to(dtype) for name, x in begun.Qa.items()}
            bases = {
                name: Eigenvectors(Qg.to(dtype), Qa[begun.owners[name]])
                for name, Qg in begun.Qg.items()
            }
            return Eigenvalues(self.run, store, layers, bases)
        if self.stage == "queries":
            factors = {
                name: LayerFactors(name, begun.Qa[begun.owners[name]], begun.Qg[name], lam)
                for name, lam in begun.lam.items()
            }
            damping = dict.fromkeys(factors, DAMPING)
            return Preconditioning(
                self.run, factors, layers, damping, begun.rank, lambda number, tensors: None
            )
        batches = [list(self.batch.indices)]
        add = scan.adding(begun.gradients)
        return scan.Scan(self.run, store, begun.queries, batches, None, None, add)

    def loss(self) -> Tensor:
        """The stage's own."""
        if isinstance(self.consumer, Preconditioning):
            return self.consumer.loss(self.batch)
        draws = {"covariance": COVARIANCE_DRAW, "eigenvalues": EIGENVALUE_DRAW}
        return self.run.train_loss(self.batch, draws.get(self.stage))

    def consume(self, seen: LayerBatch) -> None:
        """One layer of the batch."""
        self.consumer.add(seen, self.batch)

    @property
    def found(self) -> Found:
        """What the consumer holds."""
        own = self.consumer
        if isinstance(own, Covariances):
            A, S = own.cov["activation"], own.cov["gradient"]
            found = {f"A {n}": x for n, x in A.items()} | {f"S {n}": x for n, x in S.items()}
            return {name: x.value() for name, x in found.items()}
        if isinstance(own, Eigenvalues):
            return {name: x.value() for name, x in own.lam.items()}
        if isinstance(own, Preconditioning):
            return {
                name: (own.found[f"{name} L"], own.found[f"{name} R"]) for name in self.start.lam
            }
        assert isinstance(own, scan.Scan)
        return {"scores": own.tally.total().to(self.run.device)}


class Plain:
    """Plain torch: gradients in memory, full squares, GEMMs and reductions; no copy it can spare.

    Compiled, its pointwise parts are fused by torch.compile.
    """

    def __init__(self, stage: str, start: Start, compiled: bool):
        self.stage, self.start = stage, start
        self.consume: Callable[[LayerBatch], None] = getattr(self, stage)
        self.found: Found = {}
        names = ("covariance", "eigenvalues", "precondition", "dense_scores", "low_rank_scores")
        ways = {name: getattr(plain_torch, name) for name in names}
        if compiled:
            ways = {name: torch.compile(way, dynamic=False) for name, way in ways.items()}
        self.ways = ways

    def sums(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """The accumulator of that name, zero at first."""
        if name not in self.found:
            self.found[name] = like.new_zeros(shape, dtype=wide(like.dtype))
        return self.found[name]

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
        some = max(1, dense_bytes(lam.device) // (4 * lam.numel()))
        for b in range(0, len(seen.a), some):
            g, a = seen.g[b : b + some], seen.a[b : b + some]
            P = self.ways["precondition"](g, a, Qg.to(g), Qa.to(g), lam, DAMPING, x.bias)
            U, S, V = torch.svd_lowrank(P, q=min(self.start.rank, x.O, x.J))
            L, R = U * S.unsqueeze(-2), V.mT
            parts.append([Qg @ L, R @ Qa.mT])
        L, R = (torch.cat(y) for y in zip(*parts, strict=True))
        self.found[x.name] = L, R

    def scoring(self, seen: LayerBatch) -> None:
        """Products with all queries side by side, then a sum."""
        factors = self.start.arranged[seen.layer.name]
        s = self.sums("scores", seen.g, self.start.queries, self.start.sequences)
        way = self.ways["dense_scores" if len(factors) == 1 else "low_rank_scores"]
        way(s, *factors, seen.g, seen.a, seen.layer.bias)


def agree(ours: Ours | Plain, plain: Ours | Plain, dtype: torch.dtype) -> float:
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
