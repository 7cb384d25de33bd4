"""The kernels and launchers of csrc/cuda on a CPU: the same source, run lane by lane.

A host compiler builds them on `emulated_gpu.h`, as `torch.ops.ekfac_fast_cuda.*` for CPU tensors.
Index maps, tile edges, copies, barriers and second stages are those of a GPU; only the instructions
are not. Whatever the emulated GPU leaves open differs from call to call, so equal bits mean more
here than on a GPU.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_cases import CARDS, DTYPES, call, layer_sample, samples
from torch.utils.cpp_extension import include_paths, library_paths

from ekfac_fast import ops
from ekfac_fast.ops.testing import parity

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
EACH = pytest.mark.parametrize("card", CARDS, ids=ops.stem)

if COMPILER is None:
    pytest.skip("no host compiler to build csrc/cuda with", allow_module_level=True)
if hasattr(torch.ops.ekfac_fast_cuda, "eigenvalues"):
    pytest.skip("the extension has the real csrc/cuda", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def emulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    sources = [*sorted(CSRC.glob("cuda/*.cu")), CSRC / "cuda" / "rotations.cpp", CSRC / "check.cpp"]
    # One translation unit: torch's headers take longest.
    sources = [ROOT / "tests" / "emulated_gpu.h", *sources]
    (folder / "all.cpp").write_text("".join(f'#include "{path}"\n' for path in sources))
    library = folder / "emulated.so"
    done = subprocess.run(
        [
            *(COMPILER, "-std=c++20", "-O1", "-Wall", "-Wno-unknown-pragmas", "-Werror"),
            *("-shared", "-fPIC", "-U_FORTIFY_SOURCE"),  # which forbids to jump between stacks
            *(f"-isystem{path}" for path in include_paths()),
            *(folder / "all.cpp", "-o", library),
            *(f"-L{path}" for path in library_paths()),
            *("-ltorch", "-ltorch_cpu", "-lc10"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(library)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH
def test_parity(card, dtype):
    for sample in samples(card, dtype):
        parity.check(card, sample, call(card))


@EACH
def test_nothing_of_fresh_memory_is_used(card, poisoned):
    parity.check(card, layer_sample(card, torch.bfloat16, O=130, I=66), call(card))


@EACH
def test_order_of_threads_and_copies_does_not_matter(card):
    sample = layer_sample(card, torch.bfloat16, O=130, I=200)
    first, *others = (parity.run(call(card), sample.args) for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


@EACH
def test_other_dtypes_are_refused(card):
    sample = layer_sample(card, torch.float32, O=8, I=8)
    with pytest.raises(TypeError, match="expected bfloat16 or float16"):
        call(card)(*sample.args)


def test_full_rank_queries_per_token_are_refused():
    s, P, g, a, bias = layer_sample(ops.dense_scores, torch.float16, O=8, I=8).args
    with pytest.raises(ValueError, match=r"expected \[Q,B\]"):
        call(ops.dense_scores)(s[..., None].expand(-1, -1, g.shape[1]).clone(), P, g, a, bias)
