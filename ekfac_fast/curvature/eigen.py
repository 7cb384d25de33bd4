"""Many covariances -> eigenvectors: validated, largest first, several at once.

C = (sum / count, symmetrised) = Q diag(values) Q^T, values ascending
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import NotFiniteError
from .blocks import block_rows
from .memory import free_bytes
from .threads import spread

# Matrix, its symmetrised copy, eigenvectors and LAPACK's workspace (2 n^2), in matrices; in the
# span of few rows there is no workspace.
WORKSPACE, SPAN_WORKSPACE = 5, 3.5
# A batch beyond this size gains nothing, but postpones the progress bar. Larger matrices fill a GPU
# alone: side by side, those of GPT-2's MLPs took an H200 twice as long as one after another.
LARGEST_BATCH, LARGEST_BESIDE = 16, 256

# From this size on fp32 pays: half of the time, the check included (n = 1536).
FP32_FROM = 512
# Beyond this error fp64 takes over; fp32 has 1e-6 to 1e-5 on covariances of language models.
FP32_ERROR, PROBES = 1e-4, 8
# A matrix of so many times as many columns as rows went into it is decomposed in their span.
WIDE, OVERSAMPLING = 4, 8
# Eigenvalues so many times those that are 0, or the largest one's rounding, are 0, too.
NOISE = 8

Solved = tuple[Tensor, Tensor]
Solve = Callable[[Tensor, int], Solved]


@dataclass(frozen=True)
class Job:
    """A covariance as a sum [J,J] over `count` rows; `label` names it in messages."""

    sum: Tensor
    count: Tensor
    label: str

    def in_blocks(self, blocks: int) -> list["Job"]:
        """One job a block on the diagonal, all of them checked."""
        self.check()
        if blocks == 1:
            return [self]
        return [
            Job(self.sum[rows, rows], self.count, f"block {i + 1} of {blocks} of {self.label}")
            for i, rows in enumerate(block_rows(len(self.sum), blocks))
        ]

    def of_diagonal(self) -> dict[str, Tensor]:
        """`values` and `vectors`, [J] each, of a covariance that is a diagonal: its sum is [J]."""
        self.check()
        return {"values": self.sum / self.count, "vectors": torch.ones_like(self.sum)}

    def check(self) -> None:
        """NotFiniteError where the sum holds NaN or infinity, or counts no rows."""
        if int(self.count) <= 0:
            raise NotFiniteError(
                f"{self.label} counts no rows: the attention mask was 0 everywhere, or the layer "
                "took no part in the forward pass. Check get_attention_mask and the data"
            )
        if not bool(self.sum.isfinite().all()):
            raise NotFiniteError(
                f"{self.label} contains NaN or infinity: the loss or an activation overflowed "
                "while the covariances were fitted. Fit them again in a wider dtype, or leave the "
                "layer out"
            )

    def mean(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The covariance [J,J], exactly symmetric."""
        # Moved as it is: to(device, dtype) of both would convert, and move more, on the CPU.
        cov = self.sum.to(device).to(dtype) / self.count.to(device)
        return (cov + cov.mT) / 2


def united(parts: Iterable[Mapping[str, Tensor]], blocks: int) -> Iterator[Mapping[str, Tensor]]:
    """`values` and `vectors` of every matrix from those of its diagonal blocks, one after the
    other.
    """
    for own in zip(*[iter(parts)] * blocks, strict=True):
        if blocks == 1:
            yield own[0]
        else:
            values, vectors = ([x[name] for x in own] for name in ("values", "vectors"))
            yield {"values": torch.cat(values), "vectors": torch.block_diag(*vectors)}


def largest_first(jobs: Sequence[Job]) -> list[int]:
    """The order in which jobs are solved: memory shows at once, threads end together."""
    return sorted(range(len(jobs)), key=lambda i: -len(jobs[i].sum))


def eigendecompositions(
    jobs: Sequence[Job],
    device: torch.device,
    dtype: torch.dtype | None = torch.float64,
    settle: bool = False,
) -> Iterator[Solved]:
    """(eigenvalues [J] ascending, eigenvectors [J,J] in columns) of every job, in their order.

    On a CPU as many at a time as there are threads; on a GPU small ones of equal sizes in one
    call. Results are on the CPU, in the sum's dtype; eigenvalues that rounding made negative are 0.

    Args:
        dtype: of the computation; None for whichever is fast and good enough, see
            `cheap_eigendecomposition`.
        settle: eigenvectors as `settled`.
    """
    if not jobs:
        return
    each = _one_by_one if device.type == "cpu" else _in_batches
    how = (lambda x, _: eigendecomposition(x)) if dtype else cheap_eigendecomposition
    yield from each(jobs, device, dtype or torch.float64, how, settle)


def eigendecomposition(matrix: Tensor) -> Solved:
    """Eigenvalues (ascending) and eigenvectors (columns) of a symmetric matrix.

    Where `eigh` does not converge, the singular value decomposition of the same matrix is taken:
    slower, and robust.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        vectors, values, _ = torch.linalg.svd(matrix)
        values, vectors = values.flip(-1), vectors.flip(-1)
    return values, vectors


def cheap_eigendecomposition(matrix: Tensor, rows: int | None = None) -> Solved:
    """`eigendecomposition` of fp64 matrices [...,n,n], each a sum over `rows` rows: in the span of
    few, else large ones in fp32, where the error allows.

    Error: ||C Q - Q diag(values)||_F / ||C||_F and ||Q^T Q - 1||_F / sqrt(n), both estimated in
    fp64 from what is left of `PROBES` random vectors (E ||R x||^2 = ||R||_F^2).
    """
    n = matrix.shape[-1]
    if n >= FP32_FROM:
        if rows is not None and are_few(rows, n):
            solved = in_span(matrix, rows)
        else:
            solved = eigendecomposition(matrix.float())
        values, vectors = (x.double() for x in solved)
        if bool((_estimated(matrix, values, vectors) <= FP32_ERROR).all()):
            return values, vectors
    return eigendecomposition(matrix)


def in_span(matrix: Tensor, rank: int) -> Solved:
    """`eigendecomposition` of positive semi-definite matrices [...,n,n] of at most `rank`, in
    about 8 n^2 rank FLOPs.

    C times random vectors, some more than its rank, spans its range (Halko, Martinsson and Tropp
    2011, section 4); within, the problem is small, and any basis of the rest is one of eigenvectors
    to 0.
    """
    n, sampled = matrix.shape[-1], rank + OVERSAMPLING
    x = _random(n, sampled, matrix)
    basis = torch.linalg.qr(matrix @ x, mode="complete").Q
    span, rest = basis[..., :sampled], basis[..., sampled:]
    values, turned = eigendecomposition(span.mT @ (matrix @ span))
    zeros = values.new_zeros(*values.shape[:-1], n - sampled)
    return torch.cat([zeros, values], -1), torch.cat([rest, span @ turned], -1)


def settled(values: Tensor, vectors: Tensor, rows: int, dtype: torch.dtype) -> Solved:
    """An eigendecomposition [n] of a sum over `rows` rows made in `dtype`, its eigenvectors to 0
    chosen by the span of the others alone, in place.

    Any basis is one there, and rounding chooses. But later gradients have parts in that space, too:
    without this the order of a sum would show in scores. How large 0 is, is seen of the n - rows
    that are, where rows are fewer; unless they are not (a task's mask may count fewer than are
    summed).
    """
    n = len(values)
    rounding = NOISE * torch.finfo(dtype).eps * float(values[-1])
    known = float(values[: n - rows].abs().max()) if rows < n else 0.0
    floor = max(rounding, NOISE * known if known <= rounding else 0.0)
    zeros = int((values <= floor).sum())
    if zeros < 2:
        return values, vectors  # up to a sign there is one
    span = vectors[:, zeros:]
    drawn = span @ (span.mT @ _random(n, n - zeros, span).to(span.dtype))
    vectors[:, :zeros] = torch.linalg.qr(drawn, mode="complete").Q[:, n - zeros :]
    return values, vectors


def are_few(rows: int, n: int) -> bool:
    """Whether a matrix [n,n] is decomposed in the span of so many rows."""
    return n >= FP32_FROM and WIDE * rows <= n


def eigendecomposition_flops(n: int, rows: int) -> float:
    """What `cheap_eigendecomposition` takes: dense LAPACK 9 n^3, with vectors."""
    return 8 * n**2 * rows if are_few(rows, n) else 9 * n**3


def eigendecomposition_bytes(n: int, rows: int) -> int:
    """What it holds at a time, in fp64."""
    return int(8 * n**2 * (SPAN_WORKSPACE if are_few(rows, n) else WORKSPACE))


def _estimated(matrix: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """Of a decomposition, estimated: of C, and of orthogonality."""
    n = matrix.shape[-1]
    x = _random(n, PROBES, matrix)
    rotated = vectors @ x
    residual = matrix @ rotated - vectors @ (values.unsqueeze(-1) * x)
    sizes = [torch.linalg.matrix_norm(e) for e in (residual, matrix, vectors.mT @ rotated - x)]
    return torch.stack([sizes[0] / sizes[1], sizes[2] / n**0.5]) / PROBES**0.5


def _random(n: int, count: int, beside: Tensor) -> Tensor:
    """The same normal vectors [n,count] at every call."""
    x = torch.randn(n, count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x.to(beside.device)


def _stored(job: Job, solved: Solved, settle: bool) -> Solved:
    """In the memory and dtype that results have; LAPACK's vectors lie column by column, and are
    turned where they were computed.
    """
    if settle:
        solved = settled(*solved, int(job.count), job.sum.dtype)
    values, vectors = (x.to(job.sum.dtype).contiguous().cpu() for x in solved)
    return values.clamp(min=0), vectors


def _room(n: int, device: torch.device, dtype: torch.dtype) -> int:
    """How many n x n problems fit into half of the free memory, at least one."""
    return max(1, free_bytes(device) // (2 * WORKSPACE * n * n * dtype.itemsize))


def _one_by_one(
    jobs: Sequence[Job],
    device: torch.device,
    dtype: torch.dtype,
    solve: Solve,
    settle: bool = False,
) -> Iterator[Solved]:
    most = _room(max(len(job.sum) for job in jobs), device, dtype)

    def solved(job: Job) -> Solved:
        return _stored(job, solve(job.mean(device, dtype), int(job.count)), settle)

    yield from spread(solved, jobs, most=most)


def _in_batches(
    jobs: Sequence[Job],
    device: torch.device,
    dtype: torch.dtype,
    solve: Solve,
    settle: bool = False,
) -> Iterator[Solved]:
    """Small ones of equal sizes in one call, as many as fit; else one by one."""
    for n, equals in itertools.groupby(jobs, key=lambda job: len(job.sum)):
        group, most = list(equals), LARGEST_BATCH if n <= LARGEST_BESIDE else 1
        take = min(_room(n, device, dtype), most)
        for start in range(0, len(group), take):
            some = group[start : start + take]
            stack = torch.stack([job.mean(device, dtype) for job in some])
            rows = max(int(job.count) for job in some)
            solved: Iterable[Solved]
            try:
                solved = zip(*solve(stack, rows), strict=True)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                solved = (solve(x, rows) for x in stack)
            yield from map(partial(_stored, settle=settle), some, solved)
