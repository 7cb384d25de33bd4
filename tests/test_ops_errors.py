"""Bad calls: the C++ check and the Python check refuse alike, word for word."""

import pytest
import torch
from torch import Tensor
from torch._C import DispatchKey

from ekfac_fast import ops
from ekfac_fast.ops import eigenvalues, precondition
from ekfac_fast.ops.shapes import ACCUMULATORS, parse

each_card = pytest.mark.parametrize("card", ops.ALL, ids=ops.stem)


def call(card) -> dict:
    """A legal call by name: B=2 T=3 I=4 O=5 Q=6 K=7, with a bias; N=8 rows."""
    sizes = {"B": 2, "T": 3, "I": 4, "J": 5, "O": 6, "Q": 7, "K": 8, "N": 9}
    args = {
        name: torch.zeros([sizes[letter] for letter in shapes[0]])
        for name, shapes in parse(card.SHAPES)
    }
    schema = ops.call(card).default._schema.arguments
    return args | {a.name: 0.5 for a in schema if a.name == "damping"} | {"bias": True}


def refusal(card, args: dict) -> str:
    """The one text with which every tier refuses `args`, of the same exception type."""
    ordered = [args.get(a.name, a.default_value) for a in ops.call(card).default._schema.arguments]
    op = ops.call(card)
    kernels = [lambda *x: card.reference(*x), op]
    if ops.coverage()[ops.stem(card)]["cpu"]:
        # Tensors on two devices would be dispatched to the reference.
        kernels.append(lambda *x: op.default._op_dk(DispatchKey.CPU, *x))
    raised = []
    for kernel in kernels:
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            kernel(*ordered)
        raised.append((caught.type, str(caught.value)))
    assert raised == [raised[0]] * len(kernels)
    assert raised[0][1].startswith(f"{ops.stem(card)}: ")
    return f"{raised[0][0].__name__}: {raised[0][1]}"


def tensors(card) -> list[str]:
    return [name for name, _ in parse(card.SHAPES)]


@each_card
def test_the_good_call_is_good(card):
    args = call(card)
    ops.call(card)(*(args[a.name] for a in ops.call(card).default._schema.arguments[: len(args)]))
    card.reference(*args.values())


@each_card
def test_wrong_rank(card):
    for name in tensors(card):
        for wrong in (call(card)[name][None, None], call(card)[name].sum()):
            text = refusal(card, call(card) | {name: wrong})
            assert f"{name} has shape {list(wrong.shape)}, expected [" in text
            assert text.startswith("ValueError")


@each_card
def test_wrong_size(card):
    for name in tensors(card):
        for dim in range(call(card)[name].ndim):
            good = call(card)[name]
            longer = torch.cat([good, good.narrow(dim, 0, 1)], dim)
            text = refusal(card, call(card) | {name: longer})
            # Either this argument is blamed, or one that contradicts it.
            assert str(list(longer.shape)) in text
            assert " with " in text
            assert " (from " in text


@each_card
def test_wrong_dtype(card):
    for name in tensors(card):
        if name == "mask":
            continue
        for dtype in (torch.int32, torch.int64, torch.bool, torch.float64, torch.bfloat16):
            if (card, name, dtype) == (ops.covariance, "x", torch.bfloat16):
                continue  # the only operand: a bf16 layer's covariance in fp32
            text = refusal(card, call(card) | {name: call(card)[name].to(dtype)})
            assert text.startswith("TypeError")
            assert str(dtype) in text
            if name in ACCUMULATORS:
                assert f"{name} is {dtype}, expected torch.float32" in text


@each_card
def test_wrong_device(card):
    for name in tensors(card)[1:]:
        text = refusal(card, call(card) | {name: call(card)[name].to("meta")})
        first = tensors(card)[0]
        assert text.startswith("RuntimeError")
        assert f"{name} is on meta but {first} is on cpu; move one" in text


def test_damping_bias_and_order():
    for damping, printed in (
        (-0.25, "-0.25"),
        (-1.0, "-1"),
        (float("nan"), "nan"),
        (-1e-9, "-1e-09"),
    ):
        assert refusal(precondition, call(precondition) | {"damping": damping}) == (
            f"ValueError: precondition: damping is {printed}, expected a number >= 0"
        )
    assert refusal(eigenvalues, call(eigenvalues) | {"order": "token"}) == (
        "ValueError: eigenvalues: order is 'token', expected one of tokens, a_tokens, g_tokens, "
        "gradient"
    )
    assert "bias=True but Qa is None" in refusal(eigenvalues, call(eigenvalues) | {"Qa": None})


def test_messages_name_op_argument_and_both_shapes():
    args = call(eigenvalues)
    assert refusal(eigenvalues, args | {"Qa": torch.zeros(4, 4)}) == (
        "ValueError: eigenvalues: Qa has shape [4, 4], expected [J,J] with J=5 "
        "(from lam_sum [6, 5], J = I + 1 because bias=True)"
    )
    assert refusal(eigenvalues, args | {"a": torch.zeros(2, 8, 4)}) == (
        "ValueError: eigenvalues: a has shape [2, 8, 4], expected [B,T,I] with T=3 "
        "(from g [2, 3, 6])"
    )
    scores = call(ops.dense_scores) | {"s": torch.zeros(7)}
    assert refusal(ops.dense_scores, scores) == (
        "ValueError: dense_scores: s has shape [7], expected [Q,B] or [Q,B,T]"
    )


def test_refused_calls_change_nothing():
    for card in ops.ALL:
        args = call(card)
        last = tensors(card)[-1]
        bad = args | {last: torch.ones(1, 1, 1, 1)}
        refusal(card, bad)
        assert all(not x.any() for n, x in bad.items() if isinstance(x, Tensor) and n != last)
