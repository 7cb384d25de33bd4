"""A case made runnable: our call, the other ways beside it, the least work; checks of them all."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from ekfac_fast import ops
from ekfac_fast.curvature.low_rank import OVERSAMPLING, POWER_ITERATIONS, rotate_back, truncate
from ekfac_fast.ops.gradients import flops
from ekfac_fast.ops.shapes import ACCUMULATORS, Cost, Shape, parse, wide
from ekfac_fast.ops.testing import parity
from ekfac_fast.ops.testing.sampling import Sample
from ekfac_fast.triton_kernels import launch, narrow
from ekfac_fast.triton_kernels.launch import Chip, chip

from . import kronfluence_order as theirs
from . import plain_torch
from .shapes import Case

DAMPING = 0.1
Factors = tuple[Tensor, Tensor]
Call = Callable[[], Tensor | Factors]
# The fp64 reference of a larger case takes minutes, or memory: it is checked on a smaller one.
CHECKED_FLOPS = {"cpu": 2e10, "cuda": 1e12}
# Larger matrices are not given to a full SVD: one takes minutes.
SVD_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Ways:
    """Which others are timed beside ours; `compiled` adds torch.compile to plain torch."""

    kronfluence: bool = True
    plain: bool = True
    compiled: bool = False


@dataclass(frozen=True)
class Work:
    """Callables that compute one quantity on the same tensors; `beside` computes less."""

    ours: Call
    others: dict[str, Call]
    cost: Cost
    beside: dict[str, Call] = field(default_factory=dict)
    # What turns our result into kronfluence's.
    same: Callable[[Tensor], Tensor] = Tensor.clone


def arguments(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor | None]:
    """Tensors of a case by name; eigenvectors are reflections: orthogonal, dense, and no QR."""
    card, s = _card(case), case.shape
    sizes = {letter: getattr(s, letter) for letter in "BTIJOQKN"}
    made = {}
    for name, shapes in parse(card.SHAPES):
        shape = [sizes[letter] for letter in shapes[min(case.per_token, len(shapes) - 1)]]
        if name in ACCUMULATORS:
            make = torch.rand if name == "lam" else torch.zeros
            made[name] = (make(shape, device=device) + 0.05 * (name == "lam")).to(wide(dtype))
        elif name in ("Qg", "Qa"):
            made[name] = None if case.rotated else reflection(shape[0], device).to(dtype)
        elif name != "mask":
            made[name] = torch.randn(shape, device=device).to(dtype)
    return made


def reflection(n: int, device: torch.device) -> Tensor:
    """An orthogonal [n,n] matrix without a zero, fp32."""
    v = torch.nn.functional.normalize(torch.randn(n, device=device), dim=0)
    return torch.eye(n, device=device) - 2 * torch.outer(v, v)


def work(case: Case, dtype: torch.dtype, device: torch.device, ways: Ways) -> Work:
    """Our call of a case and the chosen ways beside it."""
    made, s = arguments(case, dtype, device), case.shape
    if case.quantity == "queries":
        others = _their_queries(made, s) if ways.kronfluence else {}
        return Work(lambda: _queries(made, s), others, _queries_cost(s))
    card = _card(case)
    if case.quantity == "low_rank_scores":
        # As scans hold them: laid out once and for all calls, for every way.
        made |= dict(zip("LR", ops.low_rank_scores.laid_out(made["L"], made["R"]), strict=True))
    args = _call(card, made, s.bias)
    call = partial(_called, args=args, into=card.SCHEMA.startswith("(Tensor(a!)"))
    others, beside = {}, {}
    if ways.kronfluence and not case.rotated:
        others["kronfluence order"] = _their(case, made)
    if ways.plain:
        plain = args
        if case.quantity == "low_rank_scores":
            plain = (args[0], *plain_torch.arranged(*args[1:3]), *args[3:])
        for name, way in plain_torch.ways(case.quantity, case.rotated, ways.compiled).items():
            others[name] = call(way, args=plain)
        if case.quantity in ("eigenvalues", "self_influence"):
            inputs = (made["g"], made["a"], made["Qg"], made["Qa"], s.bias)
            beside["bare bmm"] = lambda: plain_torch.gradients(*inputs)
    if device.type == "cuda" and in_one_launch(case, dtype, chip(device)):
        forced = (*args[:-1], card.order(s))
        others["three launches"] = call(ops.call(card).default, args=forced)
    found = Work(call(ops.call(card).default), others, _cost(card, case, dtype), beside)
    if case.quantity != "precondition":
        return found
    # Ours stays in the eigenbasis, kronfluence's is in weight space.
    Qg, Qa = made["Qg"], made["Qa"]
    return replace(found, same=lambda P: Qg @ P.to(Qg.dtype) @ Qa.mT)


def check(case: Case, dtype: torch.dtype, device: torch.device) -> Shape:
    """The two-error rule on a case, or on a smaller one of its kind; returns the shape checked.

    Raises:
        AssertionError: the result is wrong.
    """
    card, small, most = _card(case), case.shape, CHECKED_FLOPS[device.type]
    while card.cost(small).flops > most and small.B > 2 and small.N > 1024:
        small = replace(small, B=small.B // 2)
    if card.cost(small).flops > most:
        small = replace(small, I=min(small.I, 1000), O=min(small.O, 1100), Q=min(small.Q, 5))
    args = _call(card, arguments(replace(case, shape=small), dtype, device), small.bias)
    terms = (
        small.N + small.O * small.J if "scores" in case.quantity else small.N + small.O + small.J
    )
    parity.check(card, Sample(case.label, small, args, terms), ops.call(card))
    return small


def agree(work: Work, dtype: torch.dtype) -> dict[str, str]:
    """Our result against the others on the very tensors that are timed, from zero accumulators.

    Returns:
        Those of the others that could not run, and why: a way that runs out of memory, say.

    Raises:
        AssertionError: they differ by more than rounding, or our factors keep less energy.
    """
    ours, failed = work.ours(), {}
    for name, other in work.others.items():
        try:
            got = other()
        except Exception as error:
            failed[name] = str(error).partition("\n")[0]
            continue
        if isinstance(ours, tuple):
            kept, needed = energy(*ours), energy(*got)
            # The full SVD is the optimum, which ours only approaches.
            if name == "svd_lowrank":
                assert kept > 0.999 * needed, f"ours keeps {kept:.4e}, svd_lowrank {needed:.4e}"
            continue
        want = work.same(ours) if name == "kronfluence order" else ours
        error = ((got.to(want.dtype) - want).norm() / want.norm()).item()
        allowed = tolerance(dtype)
        assert error < allowed, f"{name} and ours differ by {error:.1e} (allowed {allowed:.1e})"
    return failed


def in_one_launch(case: Case, dtype: torch.dtype, chip: Chip) -> bool:
    """Whether the Triton tier rotates and divides in strips unless an order is forced."""
    if case.rotated or case.quantity not in ("precondition", "self_influence"):
        return False
    return narrow.config(launch.Shape(dtype.itemsize, **asdict(case.shape)), chip) is not None


def _card(case: Case) -> ModuleType:
    name = "precondition" if case.quantity == "queries" else case.quantity
    return getattr(ops, name)


def _called(function: Callable, args: tuple, into: bool) -> Callable[[], Tensor]:
    """`function` on `args`, with an accumulator of its own where it has one."""
    args = (args[0].clone(), *args[1:]) if into else args

    def run() -> Tensor:
        out = function(*args)
        return args[0] if into else out

    return run


def _call(card: ModuleType, made: dict[str, Tensor | None], bias: bool) -> tuple:
    """Positional arguments of an op."""
    others = {"mask": None, "damping": DAMPING, "bias": bias, "order": None}
    return tuple((others | made)[a.name] for a in ops.call(card).default._schema.arguments)


def _cost(card: ModuleType, case: Case, dtype: torch.dtype) -> Cost:
    """The card's; of rotated inputs without the rotations."""
    s = case.shape
    whole = card.cost(s, itemsize=dtype.itemsize)
    if not case.rotated:
        return whole
    rotations = flops(s) - flops(s, rotate_g=False, rotate_a=False)
    return Cost(whole.flops - rotations, whole.bytes - dtype.itemsize * (s.O**2 + s.J**2))


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


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference that rounding explains between two right results in `dtype`."""
    return 8 * torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else 100)


def energy(L: Tensor, R: Tensor) -> float:
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

    ways = {"svd_lowrank": run(False)}
    return ways | ({"full SVD": run(True)} if s.O * s.J <= SVD_ELEMENTS else {})


def _queries_cost(s: Shape) -> Cost:
    """`precondition`, the products of `truncate`, two thin rotations; P written and read once."""
    op = ops.precondition.cost(s)
    columns = min(s.K + OVERSAMPLING, s.O, s.J)
    passes = 2 * s.B * s.O * s.J * columns * (2 * POWER_ITERATIONS + 2)
    back = 2 * s.B * s.K * (s.O * s.O + s.J * s.J)
    return Cost(op.flops + passes + back, op.bytes + 4 * s.B * s.O * s.J)
