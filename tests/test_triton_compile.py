"""Triton kernels compiled for GPUs that are not here: registers, shared memory, tensor cores.

The launchers run on meta tensors with a driver that only names an architecture; each launch is
compiled as it would be on that GPU, with its real tile, strides and alignment, and not started.
"""

import importlib
import itertools
import os
import re
import subprocess
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("no Triton compiler in this process", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ekfac_fast import ops

# sm -> multiprocessors and bytes of shared memory a program of A100, H100 and B200.
CHIPS = {80: (108, 166912), 90: (132, 232448), 100: (148, 232448)}
# 16-bit operands as layers have them; with a bias, so odd rows; narrower than a wide tile; a number
# of sequences that does not divide by four; fp32.
CASES = {
    "wide": (torch.bfloat16, "ieee", {}),
    "wide with bias": (torch.bfloat16, "ieee", {"bias": True}),
    "narrow": (torch.bfloat16, "ieee", {"O": 64, "I": 48, "bias": True, "Q": 1, "K": 2, "B": 2}),
    "slender": (torch.bfloat16, "ieee", {"I": 128}),
    "odd": (torch.bfloat16, "ieee", {"I": 769}),
    "short": (torch.bfloat16, "ieee", {"T": 16}),
    "short and odd": (torch.bfloat16, "ieee", {"T": 16, "I": 769}),
    "fp16": (torch.float16, "ieee", {"B": 15}),
    "tf32": (torch.float32, "tf32", {}),
    "fp32": (torch.float32, "ieee", {}),
}
# Layers narrow enough for strips, by which side is wider and where the bias is.
STRIPS = {
    f"{O} x {I}" + " with bias" * bias: (
        torch.bfloat16,
        "ieee",
        {"B": 4, "O": O, "I": I, "bias": bias},
    )
    for widths in ((128, 96), (256, 192), (512, 256))
    for O, I in (widths, widths[::-1])
    for bias in (False, True)
}
# What kernels call rows, columns and step of their tile.
NAMES = (
    ("BLOCK_O", "BLOCK_J", "BLOCK_T"),
    ("ROWS", "COLUMNS", "BLOCK"),
    ("BLOCK", "BLOCK", "BLOCK_N"),
)
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
    module("eigenvalues").eigenvalues(wide(O, J), g, a, Qg, Qa, bias, "tokens")
    launch_divisions(dtype, T, O, I, B, bias, order="tokens")
    many = 16 * Q
    L, R = operand(many, O, K), operand(many, K, J)
    for tokens in ((), (T,)):
        # Per sequence, one query is closed in its tiles; several meet strips of cuBLAS's.
        P = operand(Q if tokens else 1, O, J)
        module("dense_scores").dense_scores(wide(len(P), B, *tokens), P, g, a, bias)
        module("low_rank_scores").low_rank_scores(wide(many, B, *tokens), L, R, g, a, bias)


def launch_closed(dtype, T=512, O=4096, I=4096, B=16, Q=4, K=32, bias=False) -> None:
    """Low-rank scores of a wide layer, per sequence and per token: cuBLAS's products, closed."""
    left, right, g, a = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape in ((O, 16 * Q * K), (16 * Q * K, I + bias), (B, T, O), (B, T, I))
    )
    for tokens in ((), (T,)):
        s = torch.empty((16 * Q, B, *tokens), device="meta")
        module("closed").closed(s, left, right, g, a, bias)


def chosen(sm, dtype, T=512, O=4096, I=4096, B=16, Q=4, K=32, bias=False) -> set:
    """(kernel's name, tile, whether by the copy engine) of every main launch of `launch_all`."""
    launch, found = module("launch"), set()
    chip = launch.Chip(sm, *CHIPS[sm])
    for stem in map(ops.stem, ops.ALL):
        shape = launch.Shape(dtype.itemsize, B, T, I, O, Q, K, bias)
        if stem == "covariance":
            shape = launch.Shape(dtype.itemsize, B=B * T, I=I, bias=bias)
        if stem == "low_rank_scores":
            shape = shape._replace(Q=16 * Q)
        for tokens in (False, True)[: 1 + stem.endswith("scores")]:
            dense = stem == "dense_scores" and tokens
            name = "dense_token_scores" if dense else stem
            config = module(stem).config(shape._replace(per_token=tokens), chip)
            found.add((f"{name}_kernel", config.tile, getattr(config, "copies", False)))
    return found


def launched(name: str, options: dict) -> tuple:
    """(kernel's name, tile, whether by the copy engine) of a launch."""
    names = next(names for names in NAMES if set(names) <= options.keys())
    sizes = (*(options[x] for x in names), options["num_warps"], options["num_stages"])
    return name, module("launch").Tile(*sizes), options.get("COPIES", False)


def launch_divisions(dtype, T=512, O=4096, I=4096, B=16, bias=False, order=None) -> None:
    """The two ops that divide by eigenvalues: in strips where no order is forced."""
    g, a, Qg, Qa = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape in ((B, T, O), (B, T, I), (O, O), (I + bias, I + bias))
    )
    lam, s = torch.empty(O, I + bias, device="meta"), torch.empty(B, device="meta")
    module("precondition").precondition(g, a, Qg, Qa, lam, 0.1, bias, order)
    module("self_influence").self_influence(s, g, a, Qg, Qa, lam, 0.1, bias, order)


@pytest.fixture
def compiled(monkeypatch):
    """compiled(sm, case) -> [(kernel's name, launch options, compiled kernel)] of all launches."""
    run, launches = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launches.append((self.__name__, options, kernel))

    def compile(sm: int, case: str, call: Callable = launch_all):
        dtype, precision, sizes = (CASES | STRIPS)[case]
        target = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", sm, 32),
            get_current_device=lambda: f"sm_{sm}",
            get_current_stream=lambda device: 0,
        )
        chip = module("launch").Chip(sm, *CHIPS[sm])
        monkeypatch.setattr(driver, "_active", target)
        monkeypatch.setattr(JITFunction, "run", compile_only)
        for name in (*map(ops.stem, ops.ALL), "narrow", "closed"):
            monkeypatch.setattr(module(name), "chip", lambda device: chip)
        monkeypatch.setattr(module("low_rank_scores"), "WIDE", {2: 1 << 30, 4: 1 << 30})
        torch.backends.cuda.matmul.fp32_precision = precision
        call(dtype, **sizes)
        return launches

    before = torch.backends.cuda.matmul.fp32_precision
    yield compile
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
    dtype, _, sizes = CASES[case]
    mains = {launched(name, options) for name, options, _ in launches if name not in HELPERS}
    assert mains == chosen(sm, dtype, **sizes)
    for name, options, kernel in launches:
        registers, stack = resources(kernel, tmp_path)
        where = f"{name} on sm_{sm}, {case}, {options}"
        assert kernel.metadata.shared <= CHIPS[sm][1], where
        if name not in HELPERS and case != "fp32":
            assert tensor_core_instruction(sm, case) in kernel.asm["ptx"], where
        assert stack <= 8, f"{where}: {stack} bytes spilled, {registers} registers"
        if name not in HELPERS and case in ("wide", "fp16", "tf32"):
            assert "cp.async" in kernel.asm["ptx"], f"{where}: loads are not pipelined"


@pytest.mark.parametrize(
    ("sm", "case"),
    [(sm, case) for sm in CHIPS for case in STRIPS if sm == 90 or "bias" not in case],
)
def test_narrow_layers_take_one_launch_that_fits(compiled, sm, case, tmp_path):
    launches = compiled(sm, case, launch_divisions)
    assert [name for name, _, _ in launches] == ["narrow_kernel"] * 2 + ["fold_kernel"]
    for _, options, kernel in launches[:2]:
        registers, stack = resources(kernel, tmp_path)
        where = f"on sm_{sm}, {case}, {options}"
        assert stack == 0, f"{where}: {stack} bytes spilled, {registers} registers"
        assert kernel.metadata.shared <= CHIPS[sm][1], where
        assert tensor_core_instruction(sm, case) in kernel.asm["ptx"], where
        assert "cp.async" in kernel.asm["ptx"], f"{where}: loads are not pipelined"


def test_strips_are_for_narrow_layers():
    chips = {sm: module("launch").Chip(sm, *CHIPS[sm]) for sm in CHIPS}
    chips[89] = module("launch").Chip(89, 128, 101376)
    widths = (1, 64, 128, 256, 257, 512, 513, 1024)

    def strip(B, T, O, I, bias, itemsize, chip):
        return module("narrow").config(
            module("launch").Shape(itemsize, B, T, I, O, bias=bias), chip
        )

    for chip in chips.values():
        found = {
            (O, I): strip(8, 512, O, I, True, 2, chip)
            for O in widths
            for I in widths
            if O * I > 4096
        }
        for (O, I), by in found.items():
            assert by is None or (max(O, I) <= by.height and min(O, I) <= by.width), (O, I)
        assert found[256, 256]
        assert found[128, 64]
        assert bool(found[512, 256]) == (chip.shared > 101376), "S, Qx and loads are on chip"
        assert not any(by for (O, I), by in found.items() if max(O, I) > 512 or min(O, I) > 256)
        assert len({by._replace(grid=()) for by in found.values() if by}) <= 3
    assert strip(8, 8, 256, 256, True, 2, chips[90]) is None, "few tokens: rotate them"
    assert strip(8, 512, 256, 256, True, 4, chips[90]) is None, "fp32"
    assert strip(33, 512, 256, 256, False, 2, chips[90])
    assert strip(34, 512, 256, 256, False, 2, chips[90]) is None, "more strips than processors"


@pytest.mark.parametrize("sm", CHIPS)
def test_nothing_is_chosen_that_is_not_compiled(sm):
    """Over all shapes, five tiles at most a kernel and chip; the cases above reach each."""
    reached, reachable = defaultdict(set), defaultdict(set)
    for dtype, _, sizes in CASES.values():
        for name, tile, _ in chosen(sm, dtype, **sizes):
            reached[name].add(tile)
    widths = (1, 16, 48, 64, 65, 128, 129, 256, 769, 1024, 4096, 14336)
    for O, I, bias, dtype, (B, T, Q, K) in itertools.product(
        widths,
        widths,
        (False, True),
        (torch.bfloat16, torch.float32),
        ((1, 1, 1, 1), (1, 48, 4, 32), (16, 512, 1, 200), (15, 512, 8, 8)),
    ):
        for name, tile, _ in chosen(sm, dtype, T=T, O=O, I=I, B=B, Q=Q, K=K, bias=bias):
            reachable[name].add(tile)
    assert reachable == reached
    assert all(len(tiles) <= 5 for tiles in reachable.values())


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


def test_a_known_launch_is_not_looked_up_again(monkeypatch):
    """Other scalars, dtypes and alignments are other launches; floats and addresses are not."""
    launch, looked, started = module("launch"), [], []

    class Known(CompiledKernel):
        def __init__(self):
            pass

        def __del__(self):
            pass

        def __getitem__(self, grid):
            return lambda *args, stream: started.append((grid, args, stream))

    def look(self, *args, grid, warmup, **options):
        looked.append(args)
        return Known()

    here = SimpleNamespace(get_current_stream=lambda device: "the current stream")
    monkeypatch.setattr(driver, "_active", here)
    monkeypatch.setattr(JITFunction, "run", look)
    monkeypatch.setattr(launch, "_compiled", {})
    x, kernel = torch.zeros(64), module("precondition").precondition_kernel
    first = kernel.arg_names.index("BLOCK_O")
    named = kernel.arg_names[first:]
    fixed = {name: i for i, name in enumerate(reversed(named))} | {"num_warps": 4}

    def run(tensor, damping, B):
        launch.run(kernel, (7,), tensor, damping, B, *range(first - 3), **fixed)

    run(x, 0.1, 8)
    run(x[4:], 0.2, 8)
    assert len(looked) == 1
    # By position: every argument, then the constants in the order of the signature.
    grid, args, stream = started.pop()
    assert (grid, args[1:3], stream) == ((7, 1, 1), (0.2, 8), "the current stream")
    assert list(args[first:]) == [fixed[name] for name in named]
    for other in ((x, 0.1, 9), (x[1:], 0.1, 8), (x.double(), 0.1, 8)):
        run(*other)
    assert len(looked) == 4
    assert not started


@pytest.mark.parametrize("case", ["wide with bias", "narrow", "short"])
@pytest.mark.parametrize("sm", CHIPS)
def test_products_are_closed_in_registers(compiled, sm, case, tmp_path):
    launches = compiled(sm, case, launch_closed)
    assert {name for name, _, _ in launches} <= {"close_kernel", "fold_kernel"}
    for name, options, kernel in launches:
        registers, stack = resources(kernel, tmp_path)
        assert stack <= 8, f"{name}, {options}: {stack} bytes spilled, {registers} registers"


def test_one_launch_an_op_once_rotated(compiled):
    """On a layer that fills the chip: a main kernel each, and a fold where parts are summed."""
    counts = defaultdict(int)
    for name, _, _ in compiled(90, "wide"):
        counts[name] += 1
    assert counts.pop("fold_kernel", 0) <= 4
    assert counts.pop("covariance_fold_kernel", 0) == 0
    assert set(counts.values()) <= {1, 2}
