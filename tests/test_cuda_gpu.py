"""csrc/cuda on a real GPU, beside the Triton kernels, and compute-sanitizer over both."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_cases import CARDS, DTYPES, call, layer_sample, samples

from ekfac_fast import ops
from ekfac_fast.ops.testing import parity

if not torch.cuda.is_available():
    pytest.skip(
        "no GPU: csrc/cuda is compiled and emulated by other tests", allow_module_level=True
    )

HERE = Path(__file__).parent
BUILT = pytest.mark.skipif(
    not hasattr(torch.ops.ekfac_fast_cuda, "eigenvalues"),
    reason="csrc/cuda is not in this build: EKFAC_FAST_CUDA=1 python setup.py build_ext --inplace",
)
EACH = pytest.mark.parametrize("card", CARDS, ids=ops.stem)
SANITIZER = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
)

# Every kernel at two small sizes: one tile cut on all sides, and several.
SANITIZED = """
import sys
import torch
from cuda_cases import CARDS, DTYPES, call, layer_sample
from ekfac_fast import ops
for card in CARDS:
    op = call(card) if sys.argv[1] == "cuda" else ops.call(card)
    for dtype in DTYPES:
        for sizes in (dict(B=2, T=37, O=19, I=21, Q=3, K=5), dict(B=2, T=70, O=200, I=135)):
            op(*layer_sample(card, dtype, "cuda", **sizes).args)
if sys.argv[1] == "triton":
    x = torch.randn(70, 135, device="cuda", dtype=torch.bfloat16)
    ops.call(ops.covariance)(torch.zeros(136, 136, device="cuda"), x, None, True)
torch.cuda.synchronize()
"""


@BUILT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH
def test_parity(card, dtype):
    for sample in samples(card, dtype, "cuda"):
        parity.check(card, sample, call(card))


@BUILT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH
def test_parity_on_tiles_of_128(card, dtype):
    # Enough of them on any chip: smaller layers are cut in tiles of 64.
    sample = layer_sample(card, dtype, "cuda", B=24, T=200, O=2056, I=2304, Q=16, K=128)
    if card is ops.precondition:
        sample = layer_sample(card, dtype, "cuda", B=8, T=200, O=1032, I=1024)
    parity.check(card, sample, call(card))


@BUILT
@EACH
def test_second_run_is_bitwise_equal(card):
    sample = layer_sample(card, torch.bfloat16, "cuda", B=16, T=200, I=768, O=1024)
    first, *others = (parity.run(call(card), sample.args) for _ in range(5))
    assert all(torch.equal(first, other) for other in others)


@BUILT
@EACH
def test_another_stream(card):
    sample = layer_sample(card, torch.float16, "cuda")
    want = parity.run(call(card), sample.args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # A kernel that started on the default stream would read the copies before they are made.
        torch.cuda._sleep(20_000_000)
        got = parity.run(call(card), sample.args)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, want)


@BUILT
@EACH
def test_cuda_graph(card):
    sample = layer_sample(card, torch.bfloat16, "cuda")
    want = parity.run(call(card), sample.args)
    into = sample.args[0].clone()
    args = (into, *sample.args[1:])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(card)(*args)
    if out is None:
        into.copy_(sample.args[0])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(into if out is None else out, want)


@BUILT
@EACH
def test_nothing_synchronises(card):
    sample = layer_sample(card, torch.bfloat16, "cuda")
    call(card)(*sample.args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(card)(*sample.args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer on this machine")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("tier", ["triton", pytest.param("cuda", marks=BUILT)])
def test_sanitized(tier, tool):
    done = subprocess.run(
        [SANITIZER, f"--tool={tool}", "--error-exitcode=9", sys.executable, "-c", SANITIZED, tier],
        cwd=HERE,
        env=os.environ
        | {
            # Without its cache torch allocates each tensor alone: an access beyond one is seen.
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
