"""Every op, tier and dtype against the reference in fp64, over the samples of its card."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from ekfac_fast import ops
from ekfac_fast.ops import eigenvalues, precondition, self_influence
from ekfac_fast.ops.shapes import ORDERS, Shape
from ekfac_fast.ops.testing import parity
from ekfac_fast.ops.testing.sampling import Sample, draw, orthogonal, strided

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROTATING = (eigenvalues, precondition, self_influence)
SOURCES = Path(__file__).parents[1] / "csrc" / "cpu"

each_card = pytest.mark.parametrize("card", ops.ALL, ids=ops.stem)
each_rotating = pytest.mark.parametrize("card", ROTATING, ids=ops.stem)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def samples(card, dtype=torch.float32, but=()):
    """The samples of a card whose reasons do not contain any of `but`."""
    return [s for s in card.samples(dtype) if not any(word in s.why for word in but)]


def problem(B=2, T=40, I=48, O=24, bias=True, dtype=torch.float32, Q=3):
    """Arguments by name, for every op."""
    J = I + bias
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "lam_sum": torch.rand(O, J, dtype=wide),
        "s": torch.rand(B, dtype=wide),
        "scores": torch.rand(Q, B, dtype=wide),
        "g": draw(B, T, O, dtype=dtype),
        "a": draw(B, T, I, dtype=dtype),
        "Qg": orthogonal(O, dtype),
        "Qa": orthogonal(J, dtype),
        "lam": torch.rand(O, J, dtype=wide) + 0.05,
        "P": draw(Q, O, J, dtype=dtype),
        "L": draw(Q, O, 2, dtype=dtype),
        "R": draw(Q, 2, J, dtype=dtype),
    }


def rotating(card, x, order=None, bias=True):
    """Arguments of one of the ops that rotate a gradient, from `problem`."""
    names = {
        eigenvalues: ("lam_sum", "g", "a", "Qg", "Qa"),
        precondition: ("g", "a", "Qg", "Qa", "lam"),
        self_influence: ("s", "g", "a", "Qg", "Qa", "lam"),
    }[card]
    damping = () if card is eigenvalues else (0.1,)
    return (*(x[name] for name in names), *damping, bias, order)


def all_calls(x, bias=True):
    """One call of each op but `covariance`, from `problem`."""
    scores = ops.dense_scores, ops.low_rank_scores
    yield from ((card, rotating(card, x, bias=bias)) for card in ROTATING)
    yield scores[0], (x["scores"], x["P"], x["g"], x["a"], bias)
    yield scores[1], (x["scores"], x["L"], x["R"], x["g"], x["a"], bias)


def test_the_tiers_are_those_of_this_leg(request):
    cpu = {tiers["cpu"] for tiers in ops.coverage().values()}
    assert cpu == {not request.config.getoption("--without-extension")}
    assert all(tiers["reference"] for tiers in ops.coverage().values())


@each_dtype
@each_card
def test_parity(card, dtype):
    failures = []
    for sample in card.samples(dtype):
        try:
            parity.check(card, sample, ops.call(card))
        except AssertionError as failure:
            failures.append(str(failure))
    assert not failures, "\n".join(failures)


@pytest.mark.skipif(not ops.coverage()["eigenvalues"]["cpu"], reason="made by the extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_card
def test_small_calls_of_a_gpu_agree(card, dtype):
    """What they do there, done here: `csrc/cuda/small.cpp`."""
    op = getattr(torch.ops.ekfac_fast, f"small_{ops.stem(card)}")
    for sample in card.samples(dtype):
        parity.check(card, sample, op)
        first, second = (parity.run(op, sample.args) for _ in range(2))
        assert torch.equal(first, second), sample.why


@pytest.mark.skipif(not ops.coverage()["eigenvalues"]["cpu"], reason="made by the extension")
def test_calls_of_a_gpu_on_odd_widths_agree():
    """So large that matrices are copied into an even width."""
    B, T, O, I = 64, 16, 705, 704
    x = problem(B=B, T=T, I=I, O=O, dtype=torch.bfloat16)
    for card, args in all_calls(x):
        op = getattr(torch.ops.ekfac_fast, f"small_{ops.stem(card)}")
        shape = Shape(B=B, T=T, I=I, O=O, Q=len(x["P"]), bias=True)
        parity.check(card, Sample("odd", shape, args, T + O + I), op)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("O", "I"), [(530, 40), (40, 1100), (600, 530)])
def test_layers_of_several_library_products(O, I, dtype):
    """Wider than what is multiplied at once where the library's products are the fastest."""
    for T in (3, 40, 140):
        shape = Shape(B=3, T=T, I=I, O=O, Q=3, bias=True)
        for card, args in all_calls(problem(B=3, T=T, I=I, O=O, dtype=dtype)):
            parity.check(card, Sample(f"{T} tokens", shape, args, T + O + I), ops.call(card))


@each_dtype
@pytest.mark.parametrize("rotated", [False, True], ids=["in the eigenbasis", "to be rotated"])
@pytest.mark.parametrize(("B", "O", "I"), [(1, 40, 60), (7, 130, 20), (150, 70, 300)])
def test_gradients_of_one_token(B, O, I, rotated, dtype):
    """Outer products, whose squares and norms are products of the squared sides."""
    bias = rotated
    x = problem(B=B, T=1, I=I, O=O, bias=bias, dtype=dtype)
    if not rotated:
        x |= {"Qg": None, "Qa": None}
    shape = Shape(B=B, T=1, I=I, O=O, bias=bias)
    for card in ROTATING:
        sample = Sample("one token", shape, rotating(card, x, bias=bias), O + I)
        parity.check(card, sample, ops.call(card))


@pytest.mark.parametrize("T", [1, 5])
def test_an_eigenvalue_whose_reciprocal_is_no_number(T):
    x = problem(B=3, T=T) | {"Qg": None, "Qa": None}
    x["lam"] = torch.full_like(x["lam"], 1e-39)
    x["a"] = torch.cat([x["a"], torch.ones(3, T, 1)], dim=2)
    x |= {name: x[name] * 1e-9 for name in ("g", "a")}
    x["s"].zero_()
    args = (*(x[name] for name in ("s", "g", "a", "Qg", "Qa", "lam")), 0.0, False, None)
    ops.call(self_influence)(*args)
    gradients = torch.einsum("bto,bti->boi", x["g"].double(), x["a"].double())
    torch.testing.assert_close(
        x["s"].double(), gradients.square().sum((1, 2)) / 1e-39, rtol=1e-2, atol=0
    )


def test_parity_refuses_wrong_results():
    sample = samples(eigenvalues)[2]

    def off(factor):
        def op(lam_sum, *rest):
            before = lam_sum.clone()
            eigenvalues.reference(lam_sum, *rest)
            lam_sum[1, 2] += factor * (lam_sum[1, 2] - before[1, 2])

        return op

    parity.check(eigenvalues, sample, off(0.0))
    with pytest.raises(AssertionError, match=r"primes.*\(1, 2\)"):
        parity.check(eigenvalues, sample, off(0.05))
    with pytest.raises(AssertionError, match="max error inf"):
        parity.check(eigenvalues, sample, off(float("nan")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_card
def test_opcheck(card, dtype):
    for sample in samples(card, dtype)[1::5]:
        args = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in sample.args)
        torch.library.opcheck(ops.call(card).default, args)


@each_dtype
@each_card
def test_results_repeat_bitwise(card, dtype, threads):
    for n in (1, 2):
        threads(n)
        for sample in samples(card, dtype, but=("smallest", "no ", "one "))[:4]:
            first, second = (parity.run(ops.call(card), sample.args) for _ in range(2))
            assert torch.equal(first, second), sample.why


@each_card
def test_threads_change_nothing_but_rounding(card, threads):
    for sample in samples(card, but=("no ",)):
        for n in (1, 2, 3):
            threads(n)
            parity.check(card, sample, ops.call(card))
    # fp64 leaves rounding no room to hide a race in.
    for sample in samples(card, torch.float64, but=("no ",)):
        threads(1)
        one = parity.run(ops.call(card), sample.args)
        threads(2)
        torch.testing.assert_close(parity.run(ops.call(card), sample.args), one)


@each_rotating
def test_contraction_orders_agree(card):
    for bias in (False, True):
        x = problem(B=3, T=30, I=37, O=23, bias=bias, dtype=torch.float64)
        results = [
            parity.run(op, rotating(card, x, order, bias))
            for order in (None, *ORDERS)
            for op in (ops.call(card), card.reference)
        ]
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("T", [22, 23, 24, 30, 31, 32, 33])
@each_rotating
def test_kernels_follow_the_order_of_the_card(card, T):
    # Orders round differently: only the one that was taken gives the same bits.
    for I, O, bias in ((30, 23, True), (31, 23, False), (23, 31, False), (22, 31, True)):
        # Many sequences: one number each is all that self_influence returns.
        x = problem(B=16, T=T, I=I, O=O, bias=bias)
        chosen = card.order(Shape(B=16, T=T, I=I, O=O, bias=bias))
        for op in (ops.call(card), card.reference):
            results = {o: parity.run(op, rotating(card, x, o, bias)) for o in (None, *ORDERS)}
            same = [o for o in ORDERS if torch.equal(results[o], results[None])]
            assert same == [chosen]


def test_order_takes_the_fewest_operations():
    for T, I, O in ((1, 9, 7), (7, 9, 7), (8, 9, 7), (9, 9, 7), (9, 7, 9), (20, 9, 7)):
        shape = Shape(T=T, I=I, O=O)
        sides = {"a": {True: T * I * I, False: O * I * I}, "g": {True: T * O * O, False: O * O * I}}
        cost = {
            order: sides["a"][order in ("tokens", "a_tokens")]
            + sides["g"][order in ("tokens", "g_tokens")]
            for order in ORDERS
        }
        assert cost[eigenvalues.order(shape)] == min(cost.values())
        assert eigenvalues.cost(shape).flops == 2 * (min(cost.values()) + T * O * I) + 2 * O * I


@each_card
def test_accumulators_are_added_to(card):
    if card is precondition:
        return  # returns a new tensor
    for sample in samples(card, torch.float64, but=("NaN",)):
        into, *rest = sample.args
        start, zero = into.clone(), torch.zeros_like(into)
        ops.call(card)(zero, *rest)
        for _ in range(2):
            ops.call(card)(into, *rest)
        torch.testing.assert_close(into, start + 2 * zero, rtol=1e-9, atol=1e-9)
        assert into.numel() == 0 or zero.abs().sum() > 0 or "no " in sample.why


def test_accumulators_may_be_views():
    x = problem()
    for card, (into, *rest) in all_calls(x):
        if card is precondition:
            continue
        holder = torch.full((*into.shape, 2), 7.0).transpose(0, into.ndim - 1)
        view = holder.transpose(0, into.ndim - 1)[..., 0]
        view.copy_(into)
        ops.call(card)(view, *rest)
        card.reference(into, *rest)
        torch.testing.assert_close(view, into, rtol=1e-4, atol=1e-4)
        assert (holder.transpose(0, into.ndim - 1)[..., 1] == 7).all(), "wrote beside the view"


def test_expanded_operands():
    """What autograd hands back for a sum: one number with strides of 0."""
    x = problem()
    x["g"] = torch.tensor(0.5).expand(2, 40, 24)
    dense = x | {"g": x["g"].contiguous()}
    for (card, args), (_, copied) in zip(all_calls(x), all_calls(dense), strict=True):
        got, expected = parity.run(ops.call(card), args), parity.run(card.reference, copied)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@each_dtype
@pytest.mark.parametrize("Q", [1, 3, 40])
def test_queries_laid_out_score_the_same(dtype, Q):
    """`laid_out` changes strides only, and every op takes them, also a slice of the queries."""
    x = problem(B=9, T=20, I=70, O=33, Q=Q, dtype=dtype)
    P, factors = ops.dense_scores.laid_out(x["P"]), ops.low_rank_scores.laid_out(x["L"], x["R"])
    for card, plain, laid in (
        (ops.dense_scores, (x["P"],), (P,)),
        (ops.low_rank_scores, (x["L"], x["R"]), factors),
    ):
        for before, after in zip(plain, laid, strict=True):
            assert torch.equal(before, after)
        for rows in (slice(None), slice(Q // 2, None)):
            for s in (torch.zeros(Q, 9), torch.zeros(Q, 9, 20)):
                s = s.to(x["s"].dtype)[rows]
                args = (s, *(y[rows] for y in laid), x["g"], x["a"], True)
                sample = Sample("laid out", Shape(), args, terms=20 * 2 + 70 * 33)
                parity.check(card, sample, ops.call(card))


@pytest.mark.parametrize("empty", ["B", "T"])
def test_nothing_in_adds_nothing(empty):
    x = problem(**{empty: 0})
    for card, args in all_calls(x):
        out = parity.run(ops.call(card), args)
        if card is precondition:
            assert torch.equal(out, torch.zeros(x["g"].shape[0], 24, 49))
        else:
            assert torch.equal(out, args[0])


def test_masked_rows_are_never_read():
    x, mask = torch.randn(50, 9), torch.arange(50) % 4 == 0
    expected = x[mask].T @ x[mask]
    x[~mask] = torch.nan
    for values in (
        mask,
        mask.int(),
        mask.to(torch.uint8),
        mask.float(),
        strided(mask[None].T)[:, 0],
    ):
        cov = torch.zeros(9, 9)
        torch.ops.ekfac_fast.covariance(cov, x, values)
        torch.testing.assert_close(cov, expected)


def test_accumulation_is_not_narrowed():
    """A bf16 sum of 2000 ones stays at 256; ours is exact."""
    ones = torch.ones(1, 1, 4, dtype=torch.bfloat16)
    lam_sum, cov, s = torch.zeros(4, 4), torch.zeros(4, 4), torch.zeros(1)
    for _ in range(2000):
        torch.ops.ekfac_fast.eigenvalues(lam_sum, ones, ones, None, None)
        torch.ops.ekfac_fast.covariance(cov, ones[0])
        torch.ops.ekfac_fast.self_influence(s, ones, ones, None, None, torch.ones(4, 4), 0.0)
    assert (lam_sum == 2000).all()
    assert (cov == 2000).all()
    assert (s == 32000).all()
    long = torch.ones(1, 5120, 4, dtype=torch.bfloat16)
    assert (torch.ops.ekfac_fast.precondition(long, long, None, None, cov, 0.0) == 2.56).all()


def test_fp32_precision_follows_torch():
    x = problem(T=64, I=64, O=64, bias=False)
    args = rotating(eigenvalues, x, "tokens", bias=False)
    sample = dataclasses.replace(samples(eigenvalues)[0], args=args, terms=192)
    exact = parity.measure(eigenvalues, sample, ops.call(eigenvalues)).max
    torch.set_float32_matmul_precision("medium")
    try:
        medium = parity.run(ops.call(eigenvalues), args)
    finally:
        torch.set_float32_matmul_precision("highest")
    truth = parity.run(eigenvalues.reference, tuple(_double(x) for x in args))
    error = (medium.double() - truth).abs().max().item()
    # bf16 products where the CPU has them, else no change: never worse than bf16.
    assert exact < 1e-3
    assert error < 0.05 * truth.max().item()
    assert error > 0.9 * exact


def _double(x):
    return x.double() if isinstance(x, torch.Tensor) else x


@each_card
def test_cost_counts_what_the_call_touches(card):
    """Bytes are at least those of operands and result; FLOPs grow with what is summed."""
    small, large = Shape(B=2, T=8, I=16, O=12, Q=3, K=2), Shape(B=4, T=8, I=16, O=12, Q=3, K=2)
    assert card.cost(large).flops > 1.5 * card.cost(small).flops
    operands = 4 * small.N * small.I
    assert card.cost(small).bytes > operands
    assert card.cost(small, itemsize=2).bytes < card.cost(small).bytes


@each_card
def test_shape_lines_are_equal_in_python_and_cpp(card):
    source = (SOURCES / f"{ops.stem(card)}.cpp").read_text()
    (found,) = re.findall(r'\bcheck\(\s*"(\w+)",\s*"([^"]+)"', source)
    assert found == (ops.stem(card), card.SHAPES)
