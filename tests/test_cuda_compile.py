"""Kernels and launchers of csrc/cuda compiled for GPUs that are not here.

nvcc compiles the launchers as they are, so with every kernel they can choose; what it leaves tells
registers, stack and instructions. `test_cuda_emulated.py` runs the same source, and checks the
shared memory of every launch.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME, include_paths

ROOT = Path(__file__).parents[1]
NVCC = f"{CUDA_HOME}/bin/nvcc" if CUDA_HOME else shutil.which("nvcc")
CHIPS = ("80", "90")
# For each dtype two tilings, and of gradient_tile_kernel three endings.
KERNELS = {"eigenvalues": 4, "gradient_tile": 12, "low_rank_scores": 4, "fold": 1}


def cuobjdump(*args) -> str:
    """Its output: from the toolkit, or from Triton's package, which has nvdisasm beside it."""
    tool = shutil.which("cuobjdump", path=NVCC and str(Path(NVCC).parent))
    if tool is None:
        import triton

        tool = triton.knobs.nvidia.cuobjdump.path
    path = os.pathsep.join([str(Path(tool).parent), os.environ["PATH"]])
    return subprocess.run(
        [tool, *args], capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}
    ).stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    """The code for every chip, from one PTX: nothing in csrc/cuda asks which chip it is for.

    Launchers are parsed with their kernels, not translated.
    """
    if NVCC is None:
        pytest.skip("no nvcc to compile csrc/cuda with")
    if shutil.which("cuobjdump") is None and find_spec("triton") is None:
        pytest.skip("neither a CUDA toolkit nor Triton has cuobjdump here")
    folder = tmp_path_factory.mktemp("compiled")
    # One translation unit: torch's headers take longest. Those of a CPU build lack one, which says
    # how torch itself was compiled.
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    (folder / "all.cu").write_text("".join(f'#include "{path}"\n' for path in sources))
    missing = folder / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    missing.parent.mkdir(parents=True)
    missing.touch()
    done = subprocess.run(
        [
            *(NVCC, "-fatbin", "--threads=0", "-std=c++20", "-O3", "--expt-relaxed-constexpr"),
            "-Werror=all-warnings",
            f"-gencode=arch=compute_{CHIPS[0]},code=[{','.join(f'sm_{sm}' for sm in CHIPS)}]",
            *(f"-isystem={path}" for path in (*include_paths(), folder)),
            *(folder / "all.cu", "-o", folder / "all.fatbin"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "all.fatbin"


def kernel(symbol: str) -> str:
    """The kernel's name in a mangled one."""
    return re.search(r"\d([a-z_]+)_kernel", symbol)[1]


@pytest.mark.parametrize("sm", CHIPS)
def test_nothing_is_spilled(compiled, sm):
    used = cuobjdump("--dump-resource-usage", f"--gpu-architecture=sm_{sm}", compiled)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", used)
    assert Counter(kernel(symbol) for symbol, _, _ in found) == KERNELS
    for symbol, registers, stack in found:
        assert stack == "0", f"{symbol} on sm_{sm}: {stack} bytes spilled, {registers} registers"


@pytest.mark.parametrize("sm", CHIPS)
def test_products_are_pipelined_on_tensor_cores(compiled, sm):
    code = cuobjdump("-sass", f"--gpu-architecture=sm_{sm}", compiled)
    _, *functions = re.split(r"Function : (?=\S+)", code)
    assert len(functions) == sum(KERNELS.values())
    for function in functions:
        symbol = function.split()[0]
        if kernel(symbol) == "fold":
            continue
        dtype = ".BF16" if "Bf16" in symbol else ""
        for instruction in (f"HMMA.16816.F32{dtype} ", "LDGSTS.E.BYPASS", "LDSM.16."):
            assert instruction in function, f"{symbol} on sm_{sm} has no {instruction}"


@pytest.mark.skipif(bool(torch.version.cuda), reason="this torch has CUDA: the build goes ahead")
def test_a_build_that_cannot_have_cuda_says_so():
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | {"EKFAC_FAST_CUDA": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode
    assert "EKFAC_FAST_CUDA=1 needs a torch with CUDA, and nvcc" in done.stderr
