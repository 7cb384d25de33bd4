"""Many covariances -> eigenvectors: validated, largest first, several at once.

C = (sum / count, symmetrised) = Q diag(values) Q^T, values ascending
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NotFiniteError
from .memory import free_bytes
from .threads import spread

# Matrix, its symmetrised copy, eigenvectors and LAPACK's workspace (2 n^2), in matrices.
WORKSPACE = 5
# A batch beyond this size gains nothing, but postpones the progress bar.
LARGEST_BATCH = 16

Solved = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Job:
    """A covariance as a sum [J,J] over `count` rows; `label` names it in messages."""

    sum: Tensor
    count: Tensor
    label: str

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
        cov = self.sum.to(device, dtype) / self.count.to(device)
        return (cov + cov.mT) / 2


def largest_first(jobs: Sequence[Job]) -> list[int]:
    """The order in which jobs are solved: memory shows at once, threads end together."""
    return sorted(range(len(jobs)), key=lambda i: -len(jobs[i].sum))


def eigendecompositions(
    jobs: Sequence[Job], device: torch.device, dtype: torch.dtype = torch.float64
) -> Iterator[Solved]:
    """(eigenvalues [J] ascending, eigenvectors [J,J] in columns) of every job, in their order.

    On a CPU as many at a time as there are threads; on a GPU equal sizes, side by side, in one
    call. Results are on the CPU, in `dtype`; eigenvalues that rounding made negative are 0.
    """
    if not jobs:
        return
    solve = _one_by_one if device.type == "cpu" else _in_batches
    for values, vectors in solve(jobs, device, dtype):
        yield values.clamp(min=0).cpu(), vectors.cpu().contiguous()


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


def _room(n: int, device: torch.device, dtype: torch.dtype) -> int:
    """How many n x n problems fit into half of the free memory, at least one."""
    return max(1, free_bytes(device) // (2 * WORKSPACE * n * n * dtype.itemsize))


def _one_by_one(jobs: Sequence[Job], device: torch.device, dtype: torch.dtype) -> Iterator[Solved]:
    largest = max(len(job.sum) for job in jobs)

    def solve(job: Job) -> Solved:
        return eigendecomposition(job.mean(device, dtype))

    yield from spread(solve, jobs, most=_room(largest, device, dtype))


def _in_batches(jobs: Sequence[Job], device: torch.device, dtype: torch.dtype) -> Iterator[Solved]:
    """Equal sizes in one call, as many as fit; one by one where they do not after all."""
    for n, equals in itertools.groupby(jobs, key=lambda job: len(job.sum)):
        group, take = list(equals), min(_room(n, device, dtype), LARGEST_BATCH)
        for start in range(0, len(group), take):
            stack = torch.stack([job.mean(device, dtype) for job in group[start : start + take]])
            try:
                values, vectors = eigendecomposition(stack)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                for cov in stack:
                    values, vectors = eigendecomposition(cov)
                    yield values.cpu(), vectors.cpu()
            else:
                yield from zip(values, vectors, strict=True)
