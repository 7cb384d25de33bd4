"""The registered kernels on a real GPU, through the dispatcher: parity, graphs, streams, bits, and
compute-sanitizer over all of them.

Small calls are products of PyTorch's (`csrc/cuda/small.cpp`), larger ones tiles of Triton's: tests
of an `engine` ask for one of them whatever the size, the others for what the op chooses.
"""

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip(
        "no GPU: the interpreter and the compiler test the kernels", allow_module_level=True
    )

from ekfac_fast import ops
from ekfac_fast.ops.shapes import Shape
from ekfac_fast.ops.testing import parity
from ekfac_fast.ops.testing.sampling import Sample, draw, orthogonal

HERE = Path(__file__).parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SANITIZER = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
)
# Which op an engine is, and constants of its sizes.
ENGINES = {
    "copied": ("tiled", {"launch.LEAST_FLOPS": 0}),
    "addressed": ("tiled", {"launch.LEAST_FLOPS": float("inf")}),
    "closed": ("tiled", {"low_rank_scores.WIDE": {2: 0, 4: 0}}),
    "small": ("small", {}),
}
# Every kernel at two small sizes: one tile cut on all sides, and several.
SANITIZED = """
import torch
from test_triton_gpu import ENGINES, layer_sample, set_engine
from ekfac_fast import ops
for name in ENGINES:
    engine = set_engine(name)
    for card in ops.ALL:
        for dtype in (torch.bfloat16, torch.float16):
            for sizes in (dict(B=2, T=37, O=19, I=21, Q=3, K=5), dict(B=2, T=70, O=200, I=135)):
                engine(card)(*layer_sample(card, dtype, **sizes).args)
torch.cuda.synchronize()
"""
CARDS = pytest.mark.parametrize("card", ops.ALL, ids=ops.stem)
BOTH = pytest.mark.parametrize("way", ["small", "tiled"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def kernels(name: str):
    return importlib.import_module(f"ekfac_fast.triton_kernels.{name}")


def op_of(card, way: str) -> Callable:
    """An op in one of its two ways; defaults are those of the card's schema."""
    op = getattr(torch.ops.ekfac_fast, f"{way}_{ops.stem(card)}")
    declared = ops.call(card).default._schema.arguments
    return lambda *args: op(*args, *(x.default_value for x in declared[len(args) :]))


def set_engine(name: str, put: Callable = setattr) -> Callable:
    """Let layers be computed in one of the ways that there are; the op of a card by that way."""
    way, constants = ENGINES[name]
    for path, value in constants.items():
        module, constant = path.split(".")
        put(kernels(module), constant, value)
    forget()
    return lambda card: op_of(card, way)


def forget() -> None:
    """What is kept of earlier calls' sizes."""
    for card in ops.ALL:
        kernels(ops.stem(card)).config.cache_clear()


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """All ways, whatever the size of a call."""
    yield set_engine(request.param, monkeypatch.setattr)
    monkeypatch.undo()
    forget()


def layer_sample(card, dtype, B=8, T=96, I=300, O=272, Q=12, K=16, bias=True) -> Sample:
    """One call of an op on a layer of several tiles: large enough to split, small to check."""
    shape = Shape(B=B, T=T, I=I, O=O, Q=Q, K=K, bias=bias)
    J, device = shape.J, "cuda"
    g, a = (draw(B, T, F, dtype=dtype, device=device) for F in (O, I))
    Qg, Qa = (orthogonal(n, dtype, device) for n in (O, J))
    lam, s = torch.rand(O, J, device=device) + 0.05, torch.zeros(Q, B, device=device)
    L, R = draw(Q, O, K, dtype=dtype, device=device), draw(Q, K, J, dtype=dtype, device=device)
    args = {
        "covariance": (torch.zeros(J, J, device=device), a.view(-1, I), None, bias),
        "eigenvalues": (torch.zeros(O, J, device=device), g, a, Qg, Qa, bias),
        "precondition": (g, a, Qg, Qa, lam, 0.1, bias),
        "self_influence": (s[0].clone(), g, a, Qg, Qa, lam, 0.1, bias),
        "dense_scores": (s, L @ R, g, a, bias),
        "low_rank_scores": (s, L, R, g, a, bias),
    }[ops.stem(card)]
    return Sample("layer", shape, args, terms=B * T + O + J)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CARDS
def test_parity_of_what_the_op_chooses(card, dtype):
    for sample in card.samples(dtype, "cuda"):
        parity.check(card, sample, ops.call(card))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@CARDS
def test_parity(card, dtype, engine):
    for sample in card.samples(dtype, "cuda"):
        parity.check(card, sample, engine(card))


@CARDS
def test_parity_in_tf32(card):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        # Both make TF32 products of 10-bit operands, which Triton cuts off and cuBLAS rounds.
        sample = layer_sample(card, torch.float32)
        exact = tuple(x.double() if isinstance(x, torch.Tensor) else x for x in sample.args)
        exact = parity.run(card.reference, exact)
        got, reference = (
            (parity.run(op, sample.args).double() - exact).square().mean().sqrt()
            for op in (ops.call(card), card.reference)
        )
        floor = 2 * torch.finfo(torch.float16).eps * exact.square().mean().sqrt()
        assert got <= 2 * reference + floor
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@CARDS
def test_parity_on_a_layer_of_many_tiles(card, dtype, engine):
    parity.check(card, layer_sample(card, dtype), engine(card))


@pytest.mark.parametrize(("O", "I"), [(100, 128), (256, 200), (200, 512)])
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("card", [ops.precondition, ops.self_influence], ids=ops.stem)
def test_parity_on_a_narrow_layer(card, dtype, O, I):
    op = op_of(card, "tiled")
    sample = layer_sample(card, dtype, B=8, T=300, I=I, O=O)
    parity.check(card, sample, op)
    first, second = (parity.run(op, sample.args) for _ in range(2))
    assert torch.equal(first, second)


@CARDS
def test_second_run_is_bitwise_equal(card, engine):
    sample = layer_sample(card, torch.bfloat16, B=24, T=200, I=768, O=1024)
    first, second = (parity.run(engine(card), sample.args) for _ in range(2))
    assert torch.equal(first, second)


@BOTH
@CARDS
def test_cuda_graph(card, way):
    sample = layer_sample(card, torch.bfloat16)
    want = parity.run(op_of(card, way), sample.args)  # compiles, too
    into = sample.args[0].clone()
    args = (into, *sample.args[1:])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op_of(card, way)(*args)
    if out is None:
        into.copy_(sample.args[0])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(into if out is None else out, want)


@BOTH
@CARDS
def test_another_stream(card, way):
    sample = layer_sample(card, torch.float16)
    want = parity.run(op_of(card, way), sample.args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # A kernel that started on the default stream would read the copies before they are made.
        torch.cuda._sleep(20_000_000)
        got = parity.run(op_of(card, way), sample.args)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, want)


@BOTH
@CARDS
def test_nothing_synchronises(card, way):
    sample = layer_sample(card, torch.bfloat16)
    op_of(card, way)(*sample.args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        op_of(card, way)(*sample.args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@CARDS
def test_compiled(card):
    sample = layer_sample(card, torch.bfloat16)

    def call(*args):
        return ops.call(card)(*args)

    want = parity.run(call, sample.args)
    assert torch.equal(parity.run(torch.compile(call, fullgraph=True), sample.args), want)


@CARDS
def test_no_tensor_of_all_gradients(card):
    if card is ops.precondition:
        pytest.skip("its output is one")
    sample = layer_sample(card, torch.bfloat16, B=192, T=64, I=2048, O=2048, Q=4, bias=False)
    ops.call(card)(*sample.args)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.call(card)(*sample.args)
    extra = torch.cuda.max_memory_allocated() - before
    s = sample.shape
    rotated, gradients = 2 * s.N * (s.O + s.J), 2 * s.B * s.O * s.I
    # Dense scores of several queries form strips of them, of 256 MiB whatever there are.
    most = 0.2 if card is ops.dense_scores else 0.05
    assert extra - rotated <= most * gradients


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@CARDS
def test_another_device(card):
    sample = layer_sample(card, torch.bfloat16)
    want = parity.run(ops.call(card), sample.args)
    args = tuple(x.to("cuda:1") if isinstance(x, torch.Tensor) else x for x in sample.args)
    assert torch.equal(parity.run(ops.call(card), args).to("cuda:0"), want)


@pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer on this machine")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitized(tool):
    done = subprocess.run(
        [SANITIZER, f"--tool={tool}", "--error-exitcode=9", sys.executable, "-c", SANITIZED],
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
