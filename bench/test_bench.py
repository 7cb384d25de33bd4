"""The benches on small shapes under pytest-benchmark: `pytest bench --benchmark-only`."""

import pytest
import torch
from shapes import ACCEPTANCE, Case, layers
from work import agree, check, work

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*layers("small")], ids=lambda case: case.label)
def test_small_shapes(benchmark, case: Case, dtype: torch.dtype):
    torch.manual_seed(0)
    assert check(case, dtype) == case.shape
    job = work(case, dtype)
    agree(job, dtype)
    benchmark.group = f"{case.label} {dtype}"
    benchmark(job.ours)


def test_acceptance_names_rows_that_are_timed():
    timed = {"svd_lowrank", "full SVD", "kronfluence order", "own fp32", "GEMM roof"}
    assert {need.against for need in ACCEPTANCE} == timed
    for need in ACCEPTANCE:
        assert (need.against == "own fp32") == (need.dtype == "bfloat16")
