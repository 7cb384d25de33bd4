"""The Triton launchers on the CPU, run by Triton's interpreter: numbers, not speed.

Interpretation is decided when a kernel is decorated, so these cases have a process of their own:
`test_triton_interpreter.py` starts it.
"""

import importlib
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_triton_interpreter.py, in its own process", allow_module_level=True)

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from ekfac_fast import ops
from ekfac_fast.ops.gradients import cheapest_order
from ekfac_fast.ops.shapes import Shape
from ekfac_fast.ops.testing import parity
from ekfac_fast.ops.testing.sampling import Sample, draw, layers, orthogonal, strided

# Padding is garbage on purpose, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

# A small chip splits little; one as wide as an H100 splits wherever it can, and takes wide tiles.
CHIPS = {"small": (80, 4, 166912), "wide": (90, 132, 232448), "little memory": (89, 128, 101376)}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def kernels(name: str):
    return importlib.import_module(f"ekfac_fast.triton_kernels.{name}")


# A chip that has a copy engine uses it, however small the call.
kernels("launch").LEAST_FLOPS = 0


def launcher(card):
    return getattr(kernels(ops.stem(card)), ops.stem(card))


def use_chip(monkeypatch, name: str) -> None:
    chip = kernels("launch").Chip(*CHIPS[name])
    for name in (*map(ops.stem, ops.ALL), "narrow", "closed"):
        monkeypatch.setattr(kernels(name), "chip", lambda device: chip)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Fill new memory with NaN; mend bf16, interpreted wrongly: dots, and rounding by cutting."""
    dot, trunc = InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest),
    )

    def rounded(self, x, to):
        if to.scalar != tl.bfloat16 or x.dtype.scalar != tl.float32:
            return trunc(self, x, to)
        bits = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.int16)
        return TensorHandle(bits.numpy().view(np.uint16), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", rounded)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def agree(card, samples, call) -> int:
    """Check every sample, report all that fail."""
    failures, count = [], 0
    for sample in samples:
        count += 1
        try:
            parity.check(card, sample, call)
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, "\n".join(failures)
    return count


# What a launcher chooses depends on the size of a number, not on which 16 bits they are: every
# sample once, and chips and sizes crossed on some.
@pytest.mark.parametrize(
    ("chip", "dtype", "first", "step"),
    [
        ("small", DTYPES[0], 0, 2),
        ("wide", DTYPES[1], 1, 2),
        ("wide", DTYPES[0], 2, 4),
        ("small", DTYPES[2], 3, 4),
    ],
)
@pytest.mark.parametrize("card", ops.ALL, ids=ops.stem)
def test_parity(card, chip, dtype, first, step, monkeypatch):
    use_chip(monkeypatch, chip)
    # Sums in parts are the CPU's; of 8449 rows, interpreting takes longer than all other samples.
    samples = [x for x in card.samples(dtype) if x.why != "sum in parts"]
    assert agree(card, samples[first::step], launcher(card)) * step >= 10


@pytest.mark.parametrize("card", ops.ALL, ids=ops.stem)
def test_fp64_is_the_reference(card):
    for sample in card.samples(torch.float64):
        want = parity.run(card.reference, sample.args)
        assert torch.equal(want, parity.run(launcher(card), sample.args)), sample.why


@pytest.mark.parametrize("card", ops.ALL, ids=ops.stem)
def test_second_run_is_bitwise_equal(card, monkeypatch):
    use_chip(monkeypatch, "wide")
    for sample in list(card.samples(torch.float16))[1::4]:
        first, second = (parity.run(launcher(card), sample.args) for _ in range(2))
        assert torch.equal(first, second), sample.why


@pytest.mark.parametrize("chip", ["small", "wide"])
def test_products_of_cublas_are_closed(chip, monkeypatch):
    use_chip(monkeypatch, chip)
    monkeypatch.setattr(kernels("low_rank_scores"), "WIDE", {2: 0, 4: 0})
    monkeypatch.setattr(kernels("closed"), "LEAST_STEPS", 1)
    for chunk, first in ((4000, 0), (1 << 20, 1)):  # some tokens of a sequence; some sequences
        monkeypatch.setattr(kernels("closed"), "CHUNK_BYTES", chunk)
        for dtype in DTYPES[:2]:
            samples = list(ops.low_rank_scores.samples(dtype))[first::2]
            agree(ops.low_rank_scores, samples, launcher(ops.low_rank_scores))


@pytest.mark.parametrize("card", [c for c in ops.ALL if hasattr(c, "order")], ids=ops.stem)
def test_gradients_rotated_a_sequence_at_a_time(card, monkeypatch):
    monkeypatch.setattr(kernels("rotations"), "CHUNK_BYTES", 1)
    agree(card, card.samples(torch.float32), launcher(card))


DIVISIONS = pytest.mark.parametrize(
    "card", [ops.precondition, ops.self_influence], ids=["precondition", "self_influence"]
)


@pytest.mark.parametrize("way", ["in strips", "rotated by cuBLAS"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@DIVISIONS
def test_both_ways_of_narrow_layers(card, dtype, way, monkeypatch):
    """On every sample, whatever its tokens: the choice between the two is one of cost."""
    use_chip(monkeypatch, "wide")
    narrow, launched = kernels("narrow"), []
    config, run = narrow.config, narrow.narrow_kernel.run

    def choose(shape, chip):
        return config(shape._replace(T=max(shape.T, 512)), chip) if way == "in strips" else None

    def count(*args, **options):
        launched.append(options)
        return run(*args, **options)

    monkeypatch.setattr(narrow, "config", choose)
    monkeypatch.setattr(narrow.narrow_kernel, "run", count)
    assert agree(card, card.samples(dtype), launcher(card)) >= 10
    assert bool(launched) == (way == "in strips")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("O", "I"), [(512, 256), (200, 512), (150, 130), (512, 40), (5, 7)])
@DIVISIONS
def test_strips_of_every_width(card, O, I, bias, monkeypatch):
    use_chip(monkeypatch, "wide")
    shape = Shape(B=2, T=150, I=I, O=O, bias=bias)
    launch = kernels("launch")
    taken = launch.Shape(2, B=2, T=150, I=I, O=O, bias=bias)
    assert kernels("narrow").config(taken, launch.Chip(*CHIPS["wide"]))
    g, a = draw(2, 150, O, dtype=torch.float16) / 8, draw(2, 150, I, dtype=torch.float16)
    Qg, Qa = orthogonal(O, torch.float16), orthogonal(shape.J, torch.float16)
    lam, s = torch.rand(O, shape.J) + 0.05, torch.rand(2)
    args = (g, a, Qg, Qa, lam, 0.1, bias)
    args = args if card is ops.precondition else (s, *args)
    agree(card, [Sample("strips", shape, args, 150 + O + I)], launcher(card))


@pytest.mark.parametrize(
    ("way", "dtype"),
    [("few_queries", DTYPES[1]), ("many_queries", DTYPES[1]), ("many_queries", DTYPES[0])],
)
def test_both_ways_of_dense_scores(way, dtype, monkeypatch):
    dense = kernels("dense_scores")
    monkeypatch.setattr(dense, "FEW_QUERIES", 100 if way == "few_queries" else 0)
    monkeypatch.setattr(dense, "STRIP_BYTES", 4000)  # some rows
    # Scores per token have one way.
    samples = (x for x in ops.dense_scores.samples(dtype) if x.args[0].ndim == 2)
    assert agree(ops.dense_scores, samples, dense.dense_scores) >= 7


@pytest.mark.parametrize("B", [4, 8])
def test_sequences_side_by_side_on_a_tile(B, monkeypatch):
    use_chip(monkeypatch, "little memory")
    shape = Shape(B=B, T=20, I=150, O=600, Q=3, bias=True)
    g, a = draw(B, 20, 600, dtype=torch.float16) / 8, draw(B, 20, 150, dtype=torch.float16)
    Qg, Qa = orthogonal(600, torch.float16), orthogonal(151, torch.float16)
    lam, P = torch.rand(600, 151) + 0.05, draw(3, 600, 151, dtype=torch.float16)
    for card, args in (
        (ops.precondition, (g, a, Qg, Qa, lam, 0.1, True)),
        (ops.self_influence, (torch.rand(B), g, a, Qg, Qa, lam, 0.1, True)),
        (ops.dense_scores, (torch.rand(3, B), P, g, a, True)),
    ):
        agree(card, [Sample(f"{B} sequences", shape, args, 20 + 600 + 151)], launcher(card))


def test_strided_accumulators():
    B, T, I, O, Q, K = 3, 9, 21, 35, 18, 5
    g, a = draw(B, T, O, dtype=torch.float32), draw(B, T, I, dtype=torch.float32)
    L, R = draw(Q, O, K, dtype=torch.float32), draw(Q, K, I, dtype=torch.float32)
    shape = Shape(B=B, T=T, I=I, O=O, Q=Q, K=K)
    lam, scores = strided(torch.rand(O, I)), strided(torch.rand(Q, B))
    tokens = strided(torch.rand(Q, B, T))
    for card, args in (
        (ops.eigenvalues, (lam, g, a, None, None)),
        (ops.self_influence, (scores[0], g, a, None, None, lam, 0.1)),
        (ops.dense_scores, (scores, L @ R, g, a)),
        (ops.dense_scores, (tokens, L @ R, g, a)),
        (ops.low_rank_scores, (scores, L, R, g, a)),
        (ops.low_rank_scores, (tokens, L, R, g, a)),
    ):
        agree(card, [Sample("strided accumulator", shape, args, T + O + I)], launcher(card))


def test_triangle_of_many_tiles(monkeypatch):
    # 21 rows of tiles: two whole bands of the grouped order and a part of one.
    use_chip(monkeypatch, "little memory")
    x = draw(24, 1300, dtype=torch.float16)
    sample = Sample("many tiles", Shape(B=24, I=1300, bias=True), (torch.zeros(1301, 1301), x), 24)
    sample = Sample(sample.why, sample.shape, (*sample.args, None, True), 24)
    found = []

    def kept(cov, *rest):
        launcher(ops.covariance)(cov, *rest)
        found.append(cov)

    agree(ops.covariance, [sample], kept)
    assert torch.equal(found[0], found[0].T)


def test_no_tokens():
    lam = torch.ones(3, 4)
    P = launcher(ops.precondition)(torch.ones(2, 0, 3), torch.ones(2, 0, 4), None, None, lam, 0.1)
    assert torch.equal(P, torch.zeros(2, 3, 4))
    launcher(ops.eigenvalues)(lam, torch.ones(2, 0, 3), torch.ones(2, 0, 4), None, None)
    assert torch.equal(lam, torch.ones(3, 4))


def test_contraction_order_is_the_card_s():
    rotations = kernels("rotations")
    for T, O, I in ((t, o, i) for t in (1, 7, 8, 9) for o in (7, 8, 9) for i in (7, 8, 9)):
        for bias in (False, True):
            shape = Shape(T=T, O=O, I=I, bias=bias)
            assert rotations.cheapest_order(T, O, shape.J) == cheapest_order(shape)


@pytest.mark.parametrize("card", ops.ALL, ids=ops.stem)
def test_wrong_arguments_are_refused_as_by_the_reference(card):
    sample = next(iter(card.samples(torch.float32)))
    tensors = [n for n, x in enumerate(sample.args) if isinstance(x, torch.Tensor)]
    for n in tensors:
        x = sample.args[n]
        for wrong in (x[None, None], x.to(torch.int16), torch.cat([x, x, x], -1)):
            args = (*sample.args[:n], wrong, *sample.args[n + 1 :])
            with pytest.raises((ValueError, TypeError)) as ours:
                launcher(card)(*args)
            with pytest.raises((ValueError, TypeError)) as theirs:
                card.reference(*args)
            assert str(ours.value) == str(theirs.value)
            assert ops.stem(card) in str(ours.value)


def test_wrong_scalars_are_refused():
    case = next(iter(layers(torch.float32)))
    args = (case.g, case.a, case.Qg, case.Qa, case.lam)
    with pytest.raises(ValueError, match="damping is -1"):
        launcher(ops.precondition)(*args, -1.0)
    with pytest.raises(ValueError, match="order is 'rows'"):
        launcher(ops.precondition)(*args, 0.1, False, "rows")


def test_devices_must_agree():
    with pytest.raises(RuntimeError, match="x is on meta but cov is on cpu"):
        launcher(ops.covariance)(torch.zeros(3, 3), torch.zeros(2, 3, device="meta"))
