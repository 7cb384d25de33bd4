"""Query gradients: preconditioned, truncated in the eigenbasis, rotated back as thin factors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .batches import Batches
from .data import Indexable
from .factors import Factors, Progress
from .hooks import Capture, Layer, LayerBatch, SharedRotation
from .ops.shapes import wide
from .store import load_json, load_tensors, save_json, save_tensors
from .tasks import LanguageModelTask, Task

OVERSAMPLING = 16
POWER_ITERATIONS = 2
# Dense preconditioned gradients of this size exist at a time, before they are truncated.
DENSE_BYTES = 1 << 30
# Elements of a query whose squares are summed in fp64 at a time.
ENERGY_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class LayerQueries:
    """One layer's preconditioned query gradients in weight space: L R of rank K, or P dense.

    L [Q,O,K] and R [Q,K,J], or P [Q,O,J]; `energy` [Q] is the share of ||P||^2 that L R keeps.
    """

    layer: Layer
    L: Tensor | None
    R: Tensor | None
    P: Tensor | None
    energy: Tensor

    def dense(self) -> Tensor:
        """The preconditioned gradients (G + damping)^-1 grad f, the iHVP: [Q,O,J]."""
        return self.L @ self.R if self.P is None else self.P


@dataclass(frozen=True)
class Queries:
    """Preconditioned gradients of every query in every layer.

    `measurements` [Q] are the measured values, -log p(completion | prompt) for language models;
    `examples` the queries' token ids and labels (empty for other tasks); `damping` one a layer.
    """

    layers: tuple[LayerQueries, ...]
    rank: int | None
    damping: tuple[float, ...]
    measurements: Tensor
    examples: tuple[tuple[Tensor, Tensor], ...]

    def __len__(self) -> int:
        return len(self.measurements)

    def preconditioned(self, layer: str) -> Tensor:
        """(G + damping)^-1 grad f of one layer: [Q,O,J].

        Raises:
            KeyError: no such layer; names those there are.
        """
        for queries in self.layers:
            if queries.layer.name == layer:
                return queries.dense()
        raise KeyError(f"{layer}: the layers are {', '.join(q.layer.name for q in self.layers)}")

    def save(self, folder: str | Path) -> None:
        """Write `queries.safetensors` and `queries.json` into `folder`."""
        tensors = {"measurements": self.measurements}
        for at, queries in enumerate(self.layers):
            parts = {name: getattr(queries, name) for name in ("L", "R", "P", "energy")}
            tensors |= {f"{at}.{n}": x.contiguous() for n, x in parts.items() if x is not None}
        for at, (ids, labels) in enumerate(self.examples):
            tensors |= {f"ids.{at}": ids, f"labels.{at}": labels}
        save_tensors(Path(folder) / "queries.safetensors", tensors)
        layers = [vars(queries.layer) for queries in self.layers]
        facts = {"layers": layers, "rank": self.rank, "damping": self.damping}
        save_json(Path(folder) / "queries.json", facts)

    @classmethod
    def load(cls, folder: str | Path) -> "Queries":
        """Read what `save` wrote; StoreError names a missing or damaged file."""
        tensors = load_tensors(Path(folder) / "queries.safetensors")
        facts = load_json(Path(folder) / "queries.json")
        layers = tuple(
            LayerQueries(
                Layer(**layer), *(tensors.get(f"{at}.{n}") for n in ("L", "R", "P", "energy"))
            )
            for at, layer in enumerate(facts["layers"])
        )
        count = sum(name.startswith("ids.") for name in tensors)
        examples = tuple((tensors[f"ids.{i}"], tensors[f"labels.{i}"]) for i in range(count))
        damping = tuple(facts["damping"])
        return cls(layers, facts["rank"], damping, tensors["measurements"], examples)


def prepare_queries(
    model: nn.Module,
    factors: Factors,
    queries: Indexable,
    *,
    task: Task | None = None,
    rank: int | None = 32,
    damping: float | None = None,
    batch_tokens: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Queries:
    """Precondition the gradient of every query's measurement (Eq. 21), layer by layer.

    Args:
        model: the model that `factors` were fitted on.
        factors: from `fit`, or `Factors(folder)`.
        queries: examples whose `labels` are -100 on the prompt.
        task: None for `LanguageModelTask`.
        rank: K of the factors that represent a query; None keeps full rank.
        damping: absolute, added to every eigenvalue; None: a tenth of each layer's mean eigenvalue.

    Raises:
        ValueError: the factors belong to another model, or a measurement is not finite.
    """
    task = task or LanguageModelTask()
    layers = factors.layers(model)
    batches = Batches(queries, model, batch_tokens=batch_tokens, batch_size=batch_size)
    capture, rotate = Capture(model, layers), SharedRotation()
    dampings = {layer.name: factors[layer.name].damping(damping) for layer in layers}
    found: dict[str, dict[int, tuple[Tensor, ...]]] = {layer.name: {} for layer in layers}
    measured: dict[int, Tensor] = {}
    plan = batches.plan()
    for number, indices in enumerate(plan, 1):
        batch = batches.load(indices)

        def consume(seen: LayerBatch, indices=indices) -> None:
            layer, own = seen.layer, factors[seen.layer.name]
            Qg, lam = own.Qg.to(seen.g), own.lam.to(seen.g.device, wide(seen.g.dtype))
            a, q, bias = rotate(seen, own.Qa.to(seen.g))
            some = max(1, DENSE_BYTES // (lam.element_size() * lam.numel()))
            for b in range(0, len(indices), some):
                P = torch.ops.ekfac_fast.precondition(
                    seen.g[b : b + some], a[b : b + some], Qg, q, lam, dampings[layer.name], bias
                )
                for index, parts in zip(
                    indices[b : b + some], _represented(P, own, rank), strict=True
                ):
                    found[layer.name][index] = parts

        def loss(batch=batch, indices=indices) -> Tensor:
            if isinstance(task, LanguageModelTask):
                values = task.negative_log_likelihoods(batch, model)
                measured.update(zip(indices, values.detach().cpu(), strict=True))
                return values.sum()
            value = task.compute_measurement(batch=batch, model=model)
            measured.update({i: value.detach().cpu() / len(indices) for i in indices})
            return value

        value = capture(loss, consume)
        if not torch.isfinite(value):
            raise ValueError(f"the measurement is {value.item()} for queries {indices[:8]}")
        if progress:
            progress("queries", number, len(plan))
    every = range(batches.size)
    stacked = []
    for layer in layers:
        parts = [found[layer.name][i] for i in every]
        columns = [torch.stack(column) for column in zip(*parts, strict=True)]
        if rank is None:
            stacked.append(LayerQueries(layer, None, None, columns[0], columns[1]))
        else:
            stacked.append(LayerQueries(layer, columns[0], columns[1], None, columns[2]))
    examples = ()
    if batches.language:
        loaded = [batches.example(i) for i in every]
        examples = tuple((e.input_ids, e.labels) for e in loaded)
    values = torch.stack([measured[i].float() for i in every])
    return Queries(tuple(stacked), rank, tuple(dampings[x.name] for x in layers), values, examples)


def _represented(P: Tensor, own, rank: int | None) -> Sequence[tuple[Tensor, ...]]:
    """Each query's (P, energy) or (L, R, energy) in weight space, on the CPU."""
    Qg, Qa = own.Qg.to(P), own.Qa.to(P)
    if rank is None:
        dense = (Qg @ P @ Qa.mT).cpu()
        return list(zip(dense, torch.ones(len(P)), strict=True))
    L, R = truncate(P, rank)
    energy = captured_energy(P, L, R).float().cpu()
    L, R = rotate_back(L, R, Qg, Qa)
    return list(zip(L.cpu(), R.cpu(), energy, strict=True))


def truncate(P: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rank-K factors L R ~ P of every query, by randomised SVD (Halko et al. 2011, Alg. 4.4, 5.1).

    The range is found from K + 16 random columns and two power iterations, all of them matrix
    products; bases are orthonormalised through an fp64 Gram matrix, whose square root costs less
    than a QR and is as accurate as the range needs. `captured_energy` tells what was kept.

    Args:
        P: [Q,O,J], fp32 or fp64.
        rank: K >= 1; K >= min(O, J) gives exact factors.
        seed: of the random columns; equal seeds give equal factors, whatever the batch of queries.

    Returns:
        L [Q,O,K] and R [Q,K,J] with K = min(rank, O, J), in the dtype of P.

    Raises:
        ValueError: P is not 3-D, or rank < 1.
    """
    if P.ndim != 3:
        raise ValueError(f"truncate: P has shape {list(P.shape)}, expected [Q,O,J]")
    if rank < 1:
        raise ValueError(f"truncate: rank is {rank}, expected at least 1")
    Q, O, J = P.shape
    if rank >= O <= J:
        return torch.eye(O, dtype=P.dtype, device=P.device).expand(Q, O, O).contiguous(), P
    if rank >= J:
        return P, torch.eye(J, dtype=P.dtype, device=P.device).expand(Q, J, J).contiguous()
    columns = min(rank + OVERSAMPLING, O, J)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(J, columns, generator=generator, dtype=torch.float64).to(P)
    basis = _orthonormal(P @ basis)
    for _ in range(POWER_ITERATIONS):
        basis = _orthonormal(P @ _orthonormal(P.mT @ basis))
    small = basis.mT @ P
    # Left singular vectors of the small matrix, largest first (eigh is ascending).
    wide = small.double()
    directions = torch.linalg.eigh(wide @ wide.mT)[1].flip(-1)[..., :rank].to(P.dtype)
    return basis @ directions, directions.mT @ small


def captured_energy(P: Tensor, L: Tensor, R: Tensor) -> Tensor:
    """Share of ||P_q||^2 that the factors from `truncate` keep: [Q], 1 where P_q is zero.

    Far below 1 means a flat spectrum: low rank does not represent this query, use a higher one.
    """
    # A few rows at a time: a copy of P in fp64 would take longer than `truncate`.
    some = P.split(max(1, ENERGY_ELEMENTS // max(1, P.shape[2])), dim=1)
    total = sum(torch.linalg.vector_norm(x.double(), dim=(1, 2)).square() for x in some)
    # ||L R||^2 = <L^T L, R R^T>, for any factors.
    L, R = L.double(), R.double()
    kept = ((L.mT @ L) * (R @ R.mT)).sum((1, 2))
    return torch.where(total > 0, kept / total, 1.0)


def rotate_back(L: Tensor, R: Tensor, Qg: Tensor, Qa: Tensor) -> tuple[Tensor, Tensor]:
    """Thin factors from the eigenbasis to weight space: Qg L [Q,O,K] and R Qa^T [Q,K,J]."""
    # All queries side by side: `Qg @ L` would read Qg once a query.
    Q, O, K = L.shape
    left = Qg @ L.permute(1, 0, 2).reshape(O, Q * K)
    return left.view(-1, Q, K).permute(1, 0, 2).contiguous(), R @ Qa.mT


def _orthonormal(Y: Tensor) -> Tensor:
    """Columns spanning the columns of Y [Q,n,k], orthonormal; zero where Y is rank deficient."""
    wide = Y.double()
    values, vectors = torch.linalg.eigh(wide.mT @ wide)
    floor = values[..., -1:] * torch.finfo(torch.float64).eps * Y.shape[-1]
    scale = torch.where(values > floor, values, torch.inf).rsqrt()
    return (wide @ (vectors * scale.unsqueeze(-2))).to(Y.dtype)
