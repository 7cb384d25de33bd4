"""What a run will cost, from shapes alone: FLOPs, memory, disk and time of every stage."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops
from ..checks import is_number, require, whole
from ..curvature.blocks import block_rows
from ..curvature.choice import Contraction, contraction
from ..curvature.eigen import eigendecomposition_bytes, eigendecomposition_flops
from ..curvature.memory import free_bytes
from ..data.batches import default_tokens
from ..errors import ArgumentError
from ..model.head import LOGITS, LOGITS_GPU
from ..model.layers import Layer
from ..model.weights import usual_device
from ..ops.gradients import flops as gradient_flops
from ..ops.products import multiplied
from ..ops.shapes import Card, Shape
from .budget import ACTIVATIONS, SUMS, check_room, fitting_bytes, partitions
from .disk import check_stored, fit_bytes, keeps_covariances, matrix_bytes
from .factors import block_facts
from .measured import dense_bytes
from .processes import dealt
from .run import Stage
from .sample import sample_facts, sample_of
from .sums import BATCHES_A_FOLD
from .waiting import SHARE as WAITING
from .waiting import token_bytes

# The share of the GEMM rate that an eigendecomposition reaches.
EIGH_SHARE = 0.15
# FLOP/s of one on the largest GPUs, whatever their products reach: half of it is bound by memory.
EIGH_MOST = 1.3e12
FP32 = 4
# What `bench/memory.py` finds: of a token a pass keeps what `token_width` counts and as much of
# norms, attention and functions; of logits some tensors exist at once, and of a query's dense
# gradients, beside what the ops keep for their next call (`csrc/cpu/scratch.h`).
TOKENS_KEPT, LOGITS_AT_ONCE, DENSE_AT_ONCE = 2, 8, 3
OPS_KEEP = 192 << 20
# The least that a scan takes, as if it were a stage.
FLOOR = "scan: forward and backward alone"


@dataclass(frozen=True)
class StageCost:
    """One stage's work in each process: FLOPs, seconds at the measured GEMM rate, bytes that it
    takes beside mapped files, and bytes that it sends to the others.
    """

    name: str
    flops: float
    seconds: float
    memory: int = 0
    sent: int = 0


@dataclass(frozen=True)
class Plan:
    """Costs of a whole run; sizes in bytes.

    partitions          parts that the layers are fitted in, each with passes of its own
    factor_bytes        of the factors on disk; `disk_bytes` at most, while they are fitted
    keeps_covariances   whether `covariance_bytes` of them are covariances
    """

    layers: tuple[Layer, ...]
    scored_by: tuple[Contraction, ...]
    stages: tuple[StageCost, ...]
    partitions: int
    factor_bytes: int
    disk_bytes: int
    covariance_bytes: int
    keeps_covariances: bool
    query_bytes: int
    batch_tokens: int
    gemm_rate: float


def gemm_rate(
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    size: int = 1024,
    product: Callable[[Tensor, Tensor], Tensor] = torch.mm,
) -> float:
    """FLOP/s of a square product on this machine, best of five."""
    x = torch.randn(size, size).to(device, dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        y = product(x, x)
        if y.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times[1:])


@dataclass(frozen=True)
class _Asked:
    """What is asked of `plan`."""

    layers: Sequence[Layer]
    parameters: int
    width: int
    sequences: int
    tokens: int
    fit_sequences: int
    corrected: int
    queries: int
    rank: int | None
    blocks: int
    processes: int
    sharded: bool
    dtype: torch.dtype
    head: int
    memory: int

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def device(self) -> torch.device:
        return usual_device()

    @property
    def weights(self) -> int:
        return self.itemsize * self.parameters // (self.processes if self.sharded else 1)

    @property
    def batch_tokens(self) -> int:
        """Whole sequences, at least one, whose activations fit beside the weights."""
        room = ACTIVATIONS * max(0, self.memory - self.weights) / (self.itemsize * self.width)
        most = min(default_tokens(self.device), room)
        return self.tokens * max(1, int(most / self.tokens))

    @property
    def batches(self) -> int:
        """Of a fit's pass, in each process."""
        return self.each(-(-self.fit_sequences * self.tokens // self.batch_tokens))

    @property
    def narrow(self) -> bool:
        """Whether weights are widened to be multiplied."""
        return self.device.type == "cpu" and not multiplied(self.dtype)

    def batch(self, sequences: int, *, predicted: bool = True) -> int:
        """Bytes of weights, of activations of a batch of so many sequences, and of logits where
        every token is predicted.
        """
        tokens = min(self.batch_tokens, self.each(sequences) * self.tokens)
        found = self.weights + TOKENS_KEPT * self.itemsize * self.width * tokens
        found += FP32 * self.head * self.narrow
        logits = LOGITS if self.device.type == "cpu" else LOGITS_GPU
        return found + LOGITS_AT_ONCE * logits * predicted

    def waiting(self, some: Sequence[Layer]) -> int:
        """Bytes of the second draw's rows of some layers, as far as they may wait."""
        if self.sharded or self.corrected < self.fit_sequences:
            return 0
        rows = self.each(self.fit_sequences) * self.tokens * token_bytes(some, self.itemsize)
        return min(rows, int(WAITING * max(0, self.memory - self.weights)))

    @property
    def parts(self) -> list[list[Layer]]:
        """The layers that are fitted at once."""
        room = int(SUMS * max(0, self.memory - self.weights))
        return partitions(self.layers, room, FP32, self.blocks)

    @property
    def sides(self) -> list[list[int]]:
        """The rows of every covariance's blocks, the smaller blocks last; 0 of a diagonal one."""
        every = (n for x in self.layers for n in x.turned)
        return [[len(range(n)[rows]) for rows in block_rows(n, self.blocks)] for n in every]

    def came(self, layer: Layer) -> int:
        """Tokens of a sequence that a layer sees."""
        return max(1, round(layer.share * self.tokens))

    def shape(self, x: Layer, B: int = 1, Q: int = 0, K: int = 0) -> Shape:
        return Shape(B=B, T=self.came(x), I=x.read, O=x.O, Q=Q, K=K, bias=x.bias)

    def passes(self, sequences: int) -> float:
        """FLOPs of forward and backward, to activations alone, in each process."""
        # Of experts only those that a token meets run; untracked ones are counted in full.
        idle = sum((1 - x.share) * x.O * x.J for x in self.layers)
        return 4 * (self.parameters - idle) * self.tokens * self.each(sequences)

    def each(self, count: int) -> int:
        """Of so many, those of the process that has the most."""
        return -(-count // self.processes)

    def rotated(self, card: Card, count: int) -> float:
        """FLOPs of an op that rotates, whose rotations skip what lies between blocks."""
        shapes = [self.shape(x) for x in self.layers]
        saved = (1 - 1 / self.blocks) * sum(
            gradient_flops(x) - gradient_flops(x, False, False) for x in shapes
        )
        for x, shape in zip(self.layers, shapes, strict=True):
            saved += gradient_flops(shape) - gradient_flops(shape, *map(bool, x.turned[::-1]))
        return self.each(count) * (sum(card.cost(shape).flops for shape in shapes) - saved)

    def way(self, x: Layer) -> Contraction:
        """How a layer is scored; with an embedding's queries tokens are looked up, as they are."""
        if x.kind == "embedding":
            return "low_rank" if self.rank else "dense"
        return contraction(self.shape(x, self.sequences, self.queries, self.rank or 0))


def plan(
    layers: Sequence[Layer],
    *,
    parameters: int,
    sequences: int,
    tokens: int,
    fit_sequences: int,
    queries: int,
    rank: int | None = 32,
    blocks: int = 1,
    keep_covariances: bool | None = None,
    eigenvectors: torch.dtype | None = None,
    eigenvalue_examples: int | None = None,
    width: int | None = None,
    head: int = 0,
    memory: int | None = None,
    processes: int = 1,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
    rate: float | None = None,
) -> Plan:
    """Cost of `fit`, `prepare_queries` and `score` for sequences of `tokens` tokens.

    Args:
        layers: what `select_layers` chose (a model on the meta device will do).
        parameters: of the whole model: a pass costs 4 FLOPs a parameter and token, forward and
            gradient to activations.
        blocks, keep_covariances, eigenvectors, eigenvalue_examples: as in `fit`.
        width: values that a pass keeps of a token (`token_width`); None for what the layers read
            and write, twice.
        head: values of the head's weight, where it is known: widened on a CPU that has no products
            of the dtype.
        memory: the budget of each process; None for what is free here.
        processes: that share the run; `sharded`: and the weights.
        dtype: of weights and passes; factors and queries are fp32.
        rate: FLOP/s of each process; measured here if None.

    Raises:
        ArgumentError: a layer does not fit into the memory; says what it takes. Of a convolution it
            is not known how many positions it sees.
    """
    if unknown := [x.name for x in layers if x.kind == "convolution"]:
        raise ArgumentError(
            f"plan: how many positions {unknown[0]} sees is not known from tokens: leave "
            "convolutions out"
        )
    counts = {"sequences": sequences, "tokens": tokens, "fit_sequences": fit_sequences}
    counts |= {"queries": queries, "rank": rank or 1, "processes": processes}
    for name, count in counts.items():
        whole(name, count)
    corrected = sample_of(sample_facts(eigenvalue_examples, fit_sequences)) or fit_sequences
    block_facts(blocks, layers)
    width = width or 2 * round(sum(x.share * (x.read + x.O) for x in layers))
    memory = free_bytes(usual_device()) if memory is None else whole("memory", memory)
    job = _Asked(
        layers, parameters, width, sequences, tokens, fit_sequences, corrected, queries, rank,
        blocks, processes, sharded, dtype, head, memory,
    )  # fmt: skip
    check_room(job.weights, job.memory)
    right = rate is None or (is_number(rate) and rate > 0)
    require(right, "rate", rate, "FLOP/s, more than 0")
    rate = rate or gemm_rate()
    covariances = matrix_bytes(layers, FP32)
    eigenvalues = sum(FP32 * x.O * x.J for x in layers)
    ways = tuple(map(job.way, layers))
    stages = [*_fitting(job, covariances // blocks, eigenvalues), *_asking(job, ways)]
    check_stored(eigenvectors)
    keeps = keeps_covariances(keep_covariances, layers, FP32)
    kept, most = fit_bytes(
        job.parts, itemsize=FP32, blocks=blocks, vectors=(eigenvectors or torch.float32).itemsize,
        keep=keeps, processes=processes, folds=1 + (job.batches > BATCHES_A_FOLD),
    )  # fmt: skip
    return Plan(
        tuple(layers),
        ways,
        tuple(replace(x, seconds=x.flops / _reached(x, rate)) for x in stages),
        partitions=len(job.parts),
        factor_bytes=kept,
        disk_bytes=most,
        covariance_bytes=covariances,
        keeps_covariances=keeps,
        query_bytes=_query_bytes(job),
        batch_tokens=job.batch_tokens,
        gemm_rate=rate,
    )


def _fitting(job: _Asked, covariances: int, eigenvalues: int) -> list[StageCost]:
    """The stages of `fit`; every part of the layers takes passes of its own."""
    parts, passes = job.parts, job.passes(job.fit_sequences)
    # Before the first fold a sum is one tensor, of what is counted as two.
    tensors = 1 + (job.batches > BATCHES_A_FOLD)
    summed = [sum(fitting_bytes(x, FP32, job.blocks) for x in some) for some in parts]
    waits = [job.waiting(some) for some in parts]
    held = max(tensors * a // 2 + b for a, b in zip(summed, waits, strict=True))
    sums = job.each(job.fit_sequences) * sum(
        ops.covariance.cost(Shape(B=1, T=job.came(x), I=size)).flops
        for at, sizes in enumerate(job.sides)
        for x in [job.layers[at // 2]]
        for size in sizes
    )
    matrices = [
        (size, job.fit_sequences * job.came(job.layers[at // 2]))
        for at, sizes in enumerate(job.sides)
        for size in sizes
    ]
    solved = [eigendecomposition_bytes(*x) for x in matrices]
    work = sorted((eigendecomposition_flops(*x) for x in matrices), reverse=True)
    loads = [sum(work[i] for i in own) for own in dealt(work, job.processes)]
    several = job.processes > 1
    at_once = torch.get_num_threads() if job.device.type == "cpu" else 1
    solving = sum(sorted(solved)[-at_once:])
    return [
        StageCost(
            Stage.COVARIANCE, sums + len(parts) * passes, 0, job.batch(job.fit_sequences) + held,
            several * covariances,
        ),
        StageCost(
            Stage.EIGENDECOMPOSITION, max(loads), 0, job.weights + max(waits) + solving,
        ),
        StageCost(
            Stage.EIGENVALUE,
            job.rotated(ops.eigenvalues, job.corrected) + len(parts) * job.passes(job.corrected), 0,
            job.batch(job.corrected) + held, several * eigenvalues,
        ),
    ]  # fmt: skip


def _asking(job: _Asked, ways: Sequence[Contraction]) -> list[StageCost]:
    """The stages of `prepare_queries` and `score`."""
    scan = 0.0
    for x, way in zip(job.layers, ways, strict=True):
        card = ops.dense_scores if way == "dense" else ops.low_rank_scores
        scan += card.cost(job.shape(x, job.each(job.sequences), job.queries, job.rank or 0)).flops
    queries, passes = _query_bytes(job), job.passes(job.sequences)
    dense = max(FP32 * x.O * x.J for x in job.layers)
    work = job.rotated(ops.precondition, job.queries) + job.passes(job.queries)
    P = min(max(dense_bytes(job.device), dense), job.queries * dense)
    made = DENSE_AT_ONCE * P + min(OPS_KEEP, 2 * P)
    if job.narrow:  # eigenvectors are rounded, and widened to be multiplied
        most = max(sum(n**2 for n in x.turned) for x in job.layers)
        made += (job.itemsize + FP32) * most
    scores = FP32 * job.queries * job.each(job.sequences)
    alone = job.batch(job.sequences)
    return [
        StageCost(Stage.QUERIES, work, 0, job.batch(job.queries, predicted=False) + queries + made),
        StageCost(Stage.SCAN, scan + passes, 0, alone + queries, (job.processes > 1) * scores),
        StageCost(FLOOR, passes, 0, alone),
    ]


def _reached(stage: StageCost, rate: float) -> float:
    """FLOP/s of a stage."""
    decomposing = stage.name == Stage.EIGENDECOMPOSITION
    return min(EIGH_SHARE * rate, EIGH_MOST) if decomposing else rate


def _query_bytes(job: _Asked) -> int:
    return sum(
        FP32
        * job.queries
        * (x.O * x.J if job.rank is None else min(job.rank, x.O, x.J) * (x.O + x.J))
        for x in job.layers
    )
