"""A case made runnable: our call, kronfluence's contraction, the least work; checks of both."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import kronfluence_order as theirs
import torch
from shapes import Case
from torch import Tensor

from ekfac_fast import ops
from ekfac_fast.ops import parity
from ekfac_fast.ops.sampling import Sample, wide
from ekfac_fast.ops.shapes import ACCUMULATORS, Cost, Shape, parse
from ekfac_fast.queries import OVERSAMPLING, POWER_ITERATIONS, rotate_back, truncate

DAMPING = 0.1
Factors = tuple[Tensor, Tensor]
# The fp64 reference of a larger case takes minutes: it is checked on a smaller one.
CHECKED_FLOPS = 2e10


@dataclass(frozen=True)
class Work:
    """Callables that compute one quantity on the same tensors."""

    ours: Callable[[], Tensor | Factors]
    others: dict[str, Callable[[], Tensor | Factors]]
    cost: Cost
    # What turns our result into theirs.
    same: Callable[[Tensor], Tensor] = Tensor.clone


def arguments(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a case by name; eigenvectors are reflections: orthogonal, dense, and no QR."""
    card = _card(case)
    s = case.shape
    sizes = {letter: getattr(s, letter) for letter in "BTIJOQKN"}
    made = {}
    for name, shapes in parse(card.SHAPES):
        shape = [sizes[letter] for letter in shapes[min(case.per_token, len(shapes) - 1)]]
        if name in ACCUMULATORS:
            fill = torch.rand(shape) + 0.05 if name == "lam" else torch.zeros(shape)
            made[name] = fill.to(wide(dtype))
        elif name in ("Qg", "Qa"):
            v = torch.nn.functional.normalize(torch.randn(shape[0]), dim=0)
            made[name] = (torch.eye(shape[0]) - 2 * torch.outer(v, v)).to(dtype)
        elif name != "mask":
            made[name] = torch.randn(shape).to(dtype)
    return made


def work(case: Case, dtype: torch.dtype, against: bool = True) -> Work:
    """Our call of a case and, if `against`, kronfluence's contractions beside it."""
    made, s = arguments(case, dtype), case.shape
    if case.quantity == "queries":
        return Work(lambda: _queries(made, s), _their_queries(made, s) if against else {}, _cost(s))
    card = _card(case)
    call, args = ops.call(card).default, _call(card, made, s.bias)
    into = card.SCHEMA.startswith("(Tensor(a!)")

    def ours() -> Tensor:
        out = call(*args)
        return args[0] if into else out

    other = {"kronfluence order": _their(case, made)} if against else {}
    found = Work(ours, other, card.cost(s, itemsize=dtype.itemsize))
    if case.quantity != "precondition":
        return found
    # Ours stays in the eigenbasis, theirs is in weight space.
    Qg, Qa = made["Qg"], made["Qa"]
    return replace(found, same=lambda P: Qg @ P.to(Qg.dtype) @ Qa.mT)


def check(case: Case, dtype: torch.dtype) -> Shape:
    """The two-error rule on a case, or on a smaller one of its kind; returns the shape checked.

    Raises:
        AssertionError: the result is wrong.
    """
    card, small = _card(case), case.shape
    for smaller in (
        {"I": min(small.I, 1000), "O": min(small.O, 1100), "Q": min(small.Q, 5)},
        {"B": min(small.B, 2)},
    ):
        if card.cost(small).flops > CHECKED_FLOPS:
            small = replace(small, **smaller)
    args = _call(card, arguments(replace(case, shape=small), dtype), small.bias)
    terms = (
        small.N + small.O * small.J if "scores" in case.quantity else small.N + small.O + small.J
    )
    parity.check(card, Sample(case.label, small, args, terms), ops.call(card))
    return small


def agree(work: Work, dtype: torch.dtype) -> None:
    """Our result against kronfluence's on the very tensors that are timed, from zero accumulators.

    Raises:
        AssertionError: they differ by more than rounding, or our factors keep less energy.
    """
    ours = work.ours()
    if isinstance(ours, tuple):
        if (other := work.others.get("svd_lowrank")) is not None:
            kept, needed = _energy(*ours), _energy(*other())
            assert kept > 0.999 * needed, f"ours keeps {kept:.4e}, svd_lowrank {needed:.4e}"
        return
    ours = work.same(ours)
    for name, other in work.others.items():
        got = other().to(ours.dtype)
        error = ((got - ours).norm() / ours.norm()).item()
        allowed = 8 * torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else 100)
        assert error < allowed, f"{name} and ours differ by {error:.1e} (allowed {allowed:.1e})"


def _card(case: Case):
    name = "precondition" if case.quantity == "queries" else case.quantity
    return getattr(ops, name)


def _call(card, made: dict[str, Tensor], bias: bool) -> tuple:
    """Positional arguments of an op."""
    others = {"mask": None, "damping": DAMPING, "bias": bias, "order": None}
    return tuple((others | made)[a.name] for a in ops.call(card).default._schema.arguments)


def _their(case: Case, made: dict[str, Tensor]) -> Callable[[], Tensor]:
    x, bias = made, case.shape.bias
    inverse = 1 / (x["lam"] + DAMPING).to(x["g"].dtype) if "lam" in x else None
    if case.quantity == "covariance":
        cov = torch.zeros_like(x["cov"], dtype=x["x"].dtype)
        return lambda: theirs.covariance(cov, x["x"], bias)
    if case.quantity == "eigenvalues":
        lam_sum = torch.zeros_like(x["lam_sum"], dtype=x["g"].dtype)
        return lambda: theirs.eigenvalues(lam_sum, x["g"], x["a"], x["Qg"], x["Qa"], bias)
    if case.quantity == "precondition":
        return lambda: theirs.precondition(
            theirs.per_sample_gradients(x["g"], x["a"], bias), x["Qg"], x["Qa"], inverse
        )
    if case.quantity == "self_influence":
        return lambda: theirs.self_influence(x["g"], x["a"], x["Qg"], x["Qa"], inverse, bias)
    factors = [x[name] for name in ("P", "L", "R") if name in x]
    scores = getattr(theirs, case.quantity)
    return lambda: scores(*factors, x["g"], x["a"], bias, case.per_token)


def _energy(L: Tensor, R: Tensor) -> float:
    """||L R||^2 over all queries."""
    L, R = L.double(), R.double()
    return ((L.mT @ L) * (R @ R.mT)).sum().item()


def _queries(x: dict[str, Tensor], s: Shape) -> Factors:
    """Precondition, truncate in the eigenbasis, rotate the thin factors back."""
    P = ops.call(ops.precondition)(x["g"], x["a"], x["Qg"], x["Qa"], x["lam"], DAMPING, s.bias)
    L, R = truncate(P, s.K)
    return rotate_back(L.to(x["g"].dtype), R.to(x["g"].dtype), x["Qg"], x["Qa"])


def _their_queries(x: dict[str, Tensor], s: Shape) -> dict[str, Callable[[], Factors]]:
    inverse = 1 / (x["lam"] + DAMPING).to(x["g"].dtype)

    def run(full: bool) -> Callable[[], Factors]:
        g, a, Qg, Qa = (x[name] for name in ("g", "a", "Qg", "Qa"))
        return lambda: theirs.queries(g, a, Qg, Qa, inverse, s.bias, s.K, full)

    return {"svd_lowrank": run(False), "full SVD": run(True)}


def _cost(s: Shape) -> Cost:
    """`precondition`, the products of `truncate`, two thin rotations; P written and read once."""
    op = ops.precondition.cost(s)
    columns = min(s.K + OVERSAMPLING, s.O, s.J)
    passes = 2 * s.B * s.O * s.J * columns * (2 * POWER_ITERATIONS + 2)
    back = 2 * s.B * s.K * (s.O * s.O + s.J * s.J)
    return Cost(op.flops + passes + back, op.bytes + 4 * s.B * s.O * s.J)
