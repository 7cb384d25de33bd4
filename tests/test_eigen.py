"""Eigendecompositions in fp32 where their error allows it, in fp64 where not."""

import pytest
import torch
from torch import Tensor

from ekfac_fast.curvature import eigen
from ekfac_fast.curvature.eigen import (
    FP32_ERROR,
    FP32_FROM,
    Job,
    cheap_eigendecomposition,
    eigendecompositions,
)


def covariance(n: int, rank: int) -> Tensor:
    x = torch.randn(rank, n, generator=torch.Generator().manual_seed(n)).double()
    return x.mT @ (torch.logspace(0, -6, rank, dtype=torch.float64).unsqueeze(1) * x)


def error(C: Tensor, values: Tensor, vectors: Tensor) -> float:
    residual = (C @ vectors - vectors * values).norm() / C.norm()
    orthogonality = (vectors.mT @ vectors - torch.eye(len(C)).double()).norm() / len(C) ** 0.5
    return max(residual.item(), orthogonality.item())


@pytest.mark.parametrize("rank", [40, 2 * FP32_FROM])
def test_large_ones_are_fp32_and_right(rank, monkeypatch):
    C, dtypes = covariance(FP32_FROM, rank), []
    own = eigen.eigendecomposition
    monkeypatch.setattr(eigen, "eigendecomposition", lambda x: (dtypes.append(x.dtype), own(x))[1])
    assert error(C, *cheap_eigendecomposition(C)) < FP32_ERROR
    assert dtypes == [torch.float32]


@pytest.mark.parametrize(("rows", "said"), [(40, 40), (128, 128), (40, 128)])
def test_of_few_rows_the_span_is_decomposed(rows, said, monkeypatch):
    C, sizes, own = covariance(FP32_FROM, rows), [], eigen.eigendecomposition
    monkeypatch.setattr(eigen, "eigendecomposition", lambda x: (sizes.append(len(x)), own(x))[1])
    values, vectors = cheap_eigendecomposition(C, said)
    assert sizes == [said + eigen.OVERSAMPLING]
    assert error(C, values, vectors) < 1e-12
    right, directions = torch.linalg.eigh(C)
    torch.testing.assert_close(values, right, rtol=0, atol=1e-12 * right[-1].item())
    # eigenvectors, up to their signs, of eigenvalues that are apart
    assert (vectors.mT @ directions).diagonal()[-10:].abs().min() > 1 - 1e-9


def test_more_rank_than_rows_is_seen():
    C = covariance(FP32_FROM, 300)
    assert error(C, *cheap_eigendecomposition(C, 100)) < 1e-12


@pytest.mark.parametrize("each", [eigen._one_by_one, eigen._in_batches])
def test_every_matrix_has_its_own_rows(each):
    cpu, x = torch.device("cpu"), torch.randn(60, FP32_FROM, generator=torch.Generator())
    jobs = [Job(x[:rows].mT @ x[:rows], torch.tensor(rows), "x") for rows in (30, 60)]
    found = list(each(jobs, cpu, torch.float64, cheap_eigendecomposition))
    for job, (values, vectors) in zip(jobs, found, strict=True):
        C = job.mean(cpu, torch.float64)
        assert error(C, values.double(), vectors.double()) < 1e-5
        assert int((values > 1e-4 * values[-1]).sum()) == int(job.count)


def test_small_ones_are_fp64():
    C = covariance(FP32_FROM - 1, 900)
    assert error(C, *cheap_eigendecomposition(C)) < 1e-12


@pytest.mark.parametrize("what", ["values", "vectors", "orthogonality"])
def test_an_error_is_seen_and_fp64_takes_over(what, monkeypatch):
    C, own = covariance(FP32_FROM, 900), eigen.eigendecomposition

    def wrong(matrix):
        values, vectors = own(matrix)
        if matrix.dtype == torch.float32:
            if what == "values":
                values[-1] *= 1.01
            elif what == "vectors":
                vectors[:, -2:] = vectors[:, -2:].flip(1)
            else:
                vectors[:, 0] *= 1.1  # of an eigenvalue of nothing: no residual shows it
        return values, vectors

    monkeypatch.setattr(eigen, "eigendecomposition", wrong)
    assert error(C, *cheap_eigendecomposition(C)) < 1e-12


def test_a_dead_layer_has_a_basis():
    job = Job(torch.zeros(FP32_FROM, FP32_FROM), torch.tensor(3), "nothing")
    ((values, vectors),) = eigendecompositions([job], torch.device("cpu"), None, settle=True)
    assert not bool(values.any())
    assert vectors.dtype == job.sum.dtype
    assert error(torch.eye(FP32_FROM).double(), torch.ones(FP32_FROM), vectors.double()) < 1e-6


def test_of_a_count_below_the_rank_nothing_is_taken_for_0():
    """As where a task's mask leaves out rows whose gradients are summed."""
    C = covariance(60, 40)
    job = Job(C * 20, torch.tensor(20), "x")
    ((values, vectors),) = eigendecompositions([job], torch.device("cpu"), settle=True)
    assert error(C, values, vectors) < 1e-12


@pytest.mark.parametrize(
    ("n", "rows", "rank"),
    [(40, 25, 25), (40, 60, 30), (40, 25, 20), (600, 60, 60), (600, 500, 500)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounding_does_not_choose_the_eigenvectors_to_0(n, rows, rank, dtype):
    """Sums in another order have the same eigenvectors where these stand for nothing."""
    cpu, found = torch.device("cpu"), []
    x = torch.randn(rank, n, generator=torch.Generator().manual_seed(n), dtype=dtype)
    x = torch.cat([x, x[: rows - rank]])
    for order in (range(rows), reversed(range(rows))):
        total = sum(torch.outer(x[i], x[i]) for i in order)
        job = Job(total, torch.tensor(rows), "x")
        ((values, vectors),) = eigendecompositions([job], cpu, None, settle=True)
        assert error(total.double() / rows, values.double(), vectors.double()) < FP32_ERROR
        found.append(vectors.double())
    zeros = slice(0, n - rank)
    apart = (found[0][:, zeros] - found[1][:, zeros]).abs().max()
    assert apart < (1e-10 if dtype == torch.float64 and n < FP32_FROM else 2e-3)
