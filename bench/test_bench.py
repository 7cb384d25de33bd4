"""The benches on small shapes under pytest-benchmark: `pytest bench --benchmark-only`."""

import json

import pytest
import run
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


def test_a_row_tells_everything():
    case = next(layers("small"))
    row = run.row(case, torch.bfloat16, repeats=2, against=True)
    assert set(row.seconds) == {"ours", "kronfluence order", "own fp32", "GEMM"}
    assert all(1 <= len(taken) <= 2 for taken in row.samples.values())
    record = json.loads(json.dumps(row.record(run.environment())))
    rate = record["roofs"]["flops_per_second"]
    assert row.times("GEMM roof") == pytest.approx(row.flop_rate / rate)
    assert row.times("own fp32") == row.seconds["own fp32"] / row.seconds["ours"]
    for word in (case.label, " us", "GFLOP/s", "GB/s", "% of GEMM roof", "x kronfluence order"):
        assert word in str(row)


def test_wrong_results_are_not_timed(monkeypatch):
    case = next(case for case in layers("small") if case.quantity == "eigenvalues")
    monkeypatch.setattr("kronfluence_order.eigenvalues", lambda lam_sum, *rest: lam_sum + 1)
    with pytest.raises(AssertionError, match="kronfluence order and ours differ"):
        run.row(case, torch.float32, repeats=1, against=True)


def test_acceptance_names_rows_that_are_timed():
    timed = {"svd_lowrank", "full SVD", "kronfluence order", "own fp32", "GEMM roof"}
    assert {need.against for need in ACCEPTANCE} == timed
    for need in ACCEPTANCE:
        assert (need.against == "own fp32") == (need.dtype == "bfloat16")
