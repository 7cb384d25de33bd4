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
    ((values, vectors),) = eigendecompositions([job], torch.device("cpu"), None)
    assert not bool(values.any())
    assert vectors.dtype == job.sum.dtype
    assert error(torch.eye(FP32_FROM).double(), torch.ones(FP32_FROM), vectors.double()) < 1e-6
