"""The benches on small shapes under pytest-benchmark: `pytest bench --benchmark-only`."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import ops
from ekfac_fast.triton_kernels.launch import Chip
from measure.rows import append, read
from ways.op_ways import Ways, agree, check, in_one_launch, work
from ways.shapes import ACCEPTANCE, GRADIENTS, ROOF, Case, layers

DTYPES = (torch.float32, torch.bfloat16)
CPU = torch.device("cpu")
H100 = Chip(90, 132, 232448)
BENCH = Path(ops.__file__).parent
SMALL = ["--shapes", "small", "--op", "covariance", "--repeats", "1", "--device", "cpu"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*layers("small")], ids=lambda case: case.label)
def test_small_shapes(benchmark, case: Case, dtype: torch.dtype):
    torch.manual_seed(0)
    assert check(case, dtype, CPU) == case.shape
    job = work(case, dtype, CPU, Ways())
    assert agree(job, dtype) == {}
    benchmark.group = f"{case.label} {dtype}"
    benchmark(job.ours)


@pytest.mark.parametrize("quantity", ["eigenvalues", "precondition", "self_influence"])
def test_rotated_inputs_cost_no_rotations(quantity: str):
    shape = next(layers("small")).shape
    whole, rotated = (
        Case("", quantity, type(shape)(B=3, T=33, I=96, O=161), rotated=rotated)
        for rotated in (False, True)
    )
    costs = [work(case, torch.float32, CPU, Ways()).cost for case in (whole, rotated)]
    assert costs[0].flops - costs[1].flops == 2 * 3 * 33 * (96**2 + 161**2)
    assert costs[0].bytes - costs[1].bytes == 4 * (96**2 + 161**2)
    assert check(rotated, torch.float32, CPU) == rotated.shape
    job = work(rotated, torch.float32, CPU, Ways())
    assert set(job.others) == {"bmm + pointwise"}
    assert agree(job, torch.float32) == {}


def test_a_row_tells_everything(tmp_path):
    case = next(case for case in layers("small") if case.quantity == "eigenvalues")
    row = ops.measured(case, torch.bfloat16, 2, Ways())
    ways = {"kronfluence order", "bmm + pointwise", "opt_einsum", "bare bmm"}
    assert set(row.seconds) == {"ours", "own fp32", "GEMM"} | ways
    assert all(1 <= len(taken) <= 2 for taken in row.samples.values())
    assert ops.against(row, ROOF) == row.flop_rate / row.roofs["flops_per_second"]
    assert ops.against(row, "own fp32") == row.seconds["own fp32"] / row.seconds["ours"]
    assert row.shape == {**asdict(case.shape), "per_token": False, "rotated": False}
    assert row.details == {"checked": "itself"}
    append(tmp_path / "rows.jsonl", [row])
    assert read(tmp_path / "rows.jsonl") == [row]
    for word in (case.label, " us", "GFLOP/s", "GB/s", f"% of {ROOF}", "x kronfluence order"):
        assert word in ops.line(row)


def test_plain_torch_can_be_compiled():
    case = next(case for case in layers("small") if case.quantity == "self_influence")
    job = work(case, torch.float32, CPU, Ways(kronfluence=False, compiled=True))
    assert set(job.others) == {"bmm + pointwise", "opt_einsum", "bmm + pointwise, compiled"}
    # Compiled in another process: what torch's compiler warns about is not ours to fail on.
    program = f"""
import torch
from ways.op_ways import Ways, agree, work
from ways.shapes import Case, Shape
case = Case("", "self_influence", {case.shape!r})
job = work(case, torch.float32, torch.device("cpu"), Ways(False, True, True))
with torch.no_grad():
    assert agree(job, torch.float32) == {{}}
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=BENCH, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_wrong_results_are_not_timed(monkeypatch):
    case = next(case for case in layers("small") if case.quantity == "eigenvalues")
    monkeypatch.setattr("ways.kronfluence_order.eigenvalues", lambda lam_sum, *rest: lam_sum + 1)
    with pytest.raises(AssertionError, match="kronfluence order and ours differ"):
        ops.measured(case, torch.float32, 1, Ways(plain=False))


def test_what_cannot_run_is_told(monkeypatch):
    case = next(case for case in layers("small") if case.quantity == "covariance")

    def fails(cov, x, bias):
        raise torch.OutOfMemoryError("out of memory\nand more")

    monkeypatch.setattr("ways.kronfluence_order.covariance", fails)
    row = ops.measured(case, torch.float32, 1, Ways())
    assert row.failed == {"kronfluence order": "out of memory"}
    assert "kronfluence order failed: out of memory" in ops.line(row)
    assert ops.against(row, "kronfluence order") == 0


def test_acceptance_names_rows_that_are_timed():
    against = {name: {need.against for need in needs} for name, needs in ACCEPTANCE.items()}
    assert against["cpu"] == {"svd_lowrank", "full SVD", "kronfluence order", "own fp32", ROOF}
    ways = {"kronfluence order", "addmm", "bare bmm", "GEMMs + reduction"}
    assert against["cuda"] == {ROOF, GRADIENTS, "three launches"} | ways
    for need in ACCEPTANCE["cpu"]:
        assert (need.against == "own fp32") == (need.dtype == "bfloat16")
    for need in ACCEPTANCE["cuda"]:
        assert need.dtype == "bfloat16"
        if need.against == "three launches":
            assert in_one_launch(need.case, torch.bfloat16, H100)
            assert not in_one_launch(need.case, torch.float32, H100)
        elif need.against not in (ROOF, GRADIENTS):
            small = type(need.case.shape)(B=2, T=3, I=8, O=5, Q=need.case.shape.Q, K=2)
            case = Case("", need.case.quantity, small, rotated=need.case.rotated)
            job = work(case, torch.bfloat16, CPU, Ways())
            assert need.against in job.others | job.beside


def test_memory_is_the_one_bound_from_above():
    met = {need.against: need.met(need.ratio + 1) for need in ACCEPTANCE["cuda"]}
    assert met.pop(GRADIENTS) is False
    assert all(met.values())


def test_the_command(capsys, tmp_path):
    out = tmp_path / "new" / "ops.jsonl"
    with torch.no_grad():
        ops.main([*SMALL, "--out", str(out)])
    rows = read(out)
    assert [row.dtype for row in rows] == ["float32", "float32"]
    assert rows[0].environment["device"] == "cpu"
    assert "roof: float32 GEMM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--op", "nothing"], "invalid choice: 'nothing'"),
        (["--shapes", "gpt7"], "invalid choice: 'gpt7'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_wrong_arguments_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        ops.main(words)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_missing_gpu_is_told():
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        ops.main(["--device", "cuda"])


def test_going_on_past_a_wrong_row(monkeypatch, capsys):
    monkeypatch.setattr("ways.kronfluence_order.covariance", lambda cov, x, bias: cov + 1)
    with pytest.raises(AssertionError):
        ops.main(SMALL)
    with pytest.raises(SystemExit, match="2 rows are wrong"):
        ops.main([*SMALL, "--keep-going"])
    assert capsys.readouterr().out.count("WRONG") == 2


def test_an_interrupt_ends_with_what_there_is(monkeypatch, capsys):
    case = ACCEPTANCE["cpu"][0].case

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "measured", interrupted)
    words = ["--shapes", "acceptance", "--op", "eigenvalues", "--device", "cpu"]
    with pytest.raises(SystemExit, match="interrupted after 0 of 4 rows"):
        ops.main([*words, "--threads", str(torch.get_num_threads())])
    shown = capsys.readouterr().out
    assert f"{case.label} float32 | kronfluence order | required 5.50x" in shown
    assert shown.count("measured nothing: the row failed or did not run | NOT MET") == 5
