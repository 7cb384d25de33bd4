"""Triton kernels compiled for GPUs that are not here: registers, shared memory, tensor cores.

The launchers run on meta tensors with a driver that only names an architecture; each launch is
compiled as it would be on that GPU, with its real tile, strides and alignment, and not started.
"""

import importlib
import os
import re
import subprocess
from collections import defaultdict
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("no Triton compiler in this process", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ekfac_fast import ops

# sm -> multiprocessors and bytes of shared memory a program of A100, H100 and B200.
CHIPS = {80: (108, 166912), 90: (132, 232448), 100: (148, 232448)}
# 16-bit operands as layers have them; with a bias, so odd rows; narrower than a wide tile; fp32.
CASES = {
    "wide": (torch.bfloat16, "ieee", {}),
    "wide with bias": (torch.bfloat16, "ieee", {"bias": True}),
    "narrow": (torch.bfloat16, "ieee", {"O": 64, "I": 48, "bias": True, "Q": 1, "K": 2, "B": 2}),
    "fp16": (torch.float16, "ieee", {}),
    "tf32": (torch.float32, "tf32", {}),
    "fp32": (torch.float32, "ieee", {}),
}
HELPERS = ("fold_kernel", "covariance_fold_kernel")


def module(name: str):
    return importlib.import_module(f"ekfac_fast.triton_kernels.{name}")


def launch_all(dtype, T=512, O=4096, I=4096, B=16, Q=4, K=32, bias=False) -> None:
    """Every op once, scores per sequence and per token, with meta tensors of one layer."""

    def operand(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    def wide(*shape):
        return torch.empty(shape, device="meta")

    J = I + bias
    g, a, Qg, Qa = operand(B, T, O), operand(B, T, I), operand(O, O), operand(J, J)
    mask = torch.empty(B * T, dtype=torch.bool, device="meta")
    module("covariance").covariance(wide(J, J), a.view(-1, I), mask, bias)
    module("eigenvalues").eigenvalues(wide(O, J), g, a, Qg, Qa, bias)
    module("precondition").precondition(g, a, Qg, Qa, wide(O, J), 0.1, bias)
    module("self_influence").self_influence(wide(B), g, a, Qg, Qa, wide(O, J), 0.1, bias)
    many = 16 * Q
    L, R = operand(many, O, K), operand(many, K, J)
    for tokens in ((), (T,)):
        module("dense_scores").dense_scores(wide(Q, B, *tokens), operand(Q, O, J), g, a, bias)
        module("low_rank_scores").low_rank_scores(wide(many, B, *tokens), L, R, g, a, bias)


@pytest.fixture
def compiled(monkeypatch):
    """compiled(sm, case) -> [(kernel's name, launch options, compiled kernel)] of all ops."""
    run, launches = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launches.append((self.__name__, options, kernel))

    def all_ops(sm: int, case: str):
        dtype, precision, sizes = CASES[case]
        target = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", sm, 32),
            get_current_device=lambda: f"sm_{sm}",
            get_current_stream=lambda device: 0,
        )
        chip = module("launch").Chip(sm, *CHIPS[sm])
        monkeypatch.setattr(driver, "_active", target)
        monkeypatch.setattr(JITFunction, "run", compile_only)
        for card in ops.ALL:
            monkeypatch.setattr(module(ops.stem(card)), "chip", lambda device: chip)
        torch.backends.cuda.matmul.fp32_precision = precision
        launch_all(dtype, **sizes)
        return launches

    before = torch.backends.cuda.matmul.fp32_precision
    yield all_ops
    torch.backends.cuda.matmul.fp32_precision = before


def resources(kernel, tmp_path) -> tuple[int, int]:
    """Registers and bytes of stack of a compiled kernel."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    out = subprocess.run(
        [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    return tuple(int(x) for x in re.search(r"REG:(\d+) STACK:(\d+)", out).groups())


def tensor_core_instruction(sm: int, case: str) -> str:
    return {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[sm]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sm", CHIPS)
def test_every_configuration_fits(compiled, sm, case, tmp_path):
    launches = compiled(sm, case)
    mains = {name for name, _, _ in launches} - set(HELPERS)
    assert len(mains) == 7, "one kernel an op, two for dense_scores"
    for name, options, kernel in launches:
        registers, stack = resources(kernel, tmp_path)
        where = f"{name} on sm_{sm}, {case}, {options}"
        assert stack == 0, f"{where}: {stack} bytes spilled, {registers} registers"
        assert kernel.metadata.shared <= CHIPS[sm][1], where
        if name not in HELPERS and case != "fp32":
            assert tensor_core_instruction(sm, case) in kernel.asm["ptx"], where
            if case in ("wide", "fp16", "tf32"):
                assert "cp.async" in kernel.asm["ptx"], f"{where}: loads are not pipelined"


@pytest.mark.parametrize("sm", CHIPS)
def test_nothing_is_chosen_that_is_not_compiled(sm):
    """Over all shapes, three tiles at most a kernel and chip; the cases above reach each."""
    launch = module("launch")
    chip = launch.Chip(sm, *CHIPS[sm])
    sizes = (1, 16, 48, 64, 65, 128, 129, 256, 769, 1024, 4096, 14336)
    for accumulators in (1, 2):
        reachable = {
            launch.tile(rows, columns, itemsize, chip, accumulators=accumulators)
            for rows in sizes
            for columns in sizes
            for itemsize in (2, 4)
        }
        reached = {
            launch.tile(*size, chip, accumulators=accumulators)
            for size in ((4096, 4096, 2), (4096, 4097, 2), (64, 49, 2), (4096, 4096, 4))
        }
        assert reachable == reached
        assert len(reachable) <= 3


def test_launchers_run_on_the_dispatcher_s_cuda_key():
    assert all(tiers["cuda"] for tiers in ops.coverage().values())


def test_splits_fill_the_chip_and_no_more():
    launch = module("launch")
    chip = launch.Chip(90, 132, 232448)
    # 1024 tiles fill 132 processors; 36 do not, unless the sum is too short to be worth a launch.
    assert launch.splits(1024, 8192, 16, chip) == 1
    assert launch.splits(36, 8192, 16, chip) >= 3
    assert launch.splits(36, 64, 16, chip) == 1
    assert launch.splits(1, 10**6, 4, chip) == 4
    # However long the sum, parts are a few waves of tiles.
    assert launch.splits(200, 10**6, 64, chip) * 200 <= 4 * 132


def test_one_launch_an_op_once_rotated(compiled):
    """On a layer that fills the chip: a main kernel each, and a fold where parts are summed."""
    counts = defaultdict(int)
    for name, _, _ in compiled(90, "wide"):
        counts[name] += 1
    assert counts.pop("fold_kernel", 0) <= 4
    assert counts.pop("covariance_fold_kernel", 0) == 0
    assert set(counts.values()) <= {1, 2}
