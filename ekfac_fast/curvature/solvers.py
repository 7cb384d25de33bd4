"""Iterations that solve H x = b for many queries at once, from products with H alone.

conjugate gradients   x minimises x^T H x / 2 - b^T x over the directions seen so far, with C, an
                      approximate inverse of H, as the preconditioner (Hestenes & Stiefel 1952)
descent               v <- momentum v + rate C (b - H_k x),  x <- x + v,  H_k of a few examples:
                      LiSSA (C = 1; Agarwal et al. 2017), ASTRA (C = EK-FAC; Wang et al. 2025)

A vector is one matrix a layer, for every query: `Vectors` are layer -> [Q,O,J], an inner product is
a sum over all layers. A query whose iteration fails takes no further part and keeps a good x.
"""

from collections.abc import Callable, Mapping
from enum import IntEnum

import torch
from torch import Tensor

Vectors = dict[str, Tensor]
Operator = Callable[[Vectors], Vectors]
# A residual of so many roundings of the first one is zero; one so much larger is no rounding.
ROUNDINGS, GROWTH = 10, 100


class Outcome(IntEnum):
    """How the iterations of a query ended; beyond CONVERGED they failed."""

    DONE = 0
    CONVERGED = 1
    NEGATIVE_CURVATURE = 2
    NOT_FINITE = 3
    DIVERGED = 4


def dot(x: Vectors, y: Vectors) -> Tensor:
    """Inner products of every query over all layers, summed in fp64: [Q]."""
    parts = [(a * y[name]).flatten(1).sum(1, dtype=torch.float64) for name, a in x.items()]
    return torch.stack(parts).sum(0)


def difference(x: Vectors, y: Vectors) -> Vectors:
    """x - y."""
    return {name: a - y[name] for name, a in x.items()}


def _rows(x: Vectors, rows: Tensor) -> Vectors:
    return {name: a[rows] for name, a in x.items()}


def _scaled(scale: Tensor, x: Vectors) -> Vectors:
    return {name: scale.to(a.dtype).view(-1, 1, 1) * a for name, a in x.items()}


class Solver:
    """A state, and steps that change it in place: `tensors` are all of it, so that a solver made of
    them goes on in the same bits.
    """

    PARTS: tuple[str, ...] = ("x",)

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.vectors: dict[str, Vectors] = {part: {} for part in self.PARTS}
        for name, x in tensors.items():
            part, _, layer = name.partition(" ")
            if layer:
                self.vectors[part][layer] = x
        self.x = self.vectors["x"]
        # [Q] int64
        self.iterations, self.outcomes = tensors["iterations"], tensors["outcomes"]

    @staticmethod
    def begun(parts: Mapping[str, Vectors], **more: Tensor) -> dict[str, Tensor]:
        """The tensors of a solver before its first step."""
        first = next(iter(parts["x"].values()))
        none = torch.zeros(len(first), dtype=torch.int64, device=first.device)
        told = {f"{part} {n}": x for part, some in parts.items() for n, x in some.items()}
        return told | {"iterations": none, "outcomes": none.clone()} | more

    @property
    def live(self) -> Tensor:
        """The queries that go on."""
        return (self.outcomes == Outcome.DONE).nonzero().flatten()

    def _end(self, rows: Tensor, which: Tensor, outcome: Outcome) -> None:
        """Those of the live `rows` that are `which` end here, where nothing else has ended them."""
        ending = rows[which & (self.outcomes[rows] == Outcome.DONE)]
        self.outcomes[ending] = int(outcome)


class ConjugateGradients(Solver):
    """x, its residual r, the direction p; rz = r^T C r now and `first`."""

    PARTS = ("x", "r", "p")

    @classmethod
    def start(cls, x: Vectors, r: Vectors, precondition: Operator) -> "ConjugateGradients":
        """From x, with r = b - H x."""
        z = precondition(r)
        rz = dot(r, z)
        return cls(cls.begun({"x": x, "r": r, "p": z}, rz=rz, first=rz.clone()))

    def step(self, product: Operator, precondition: Operator) -> None:
        """One iteration of every live query; `product` and `precondition` are given those alone."""
        x, r, p = (self.vectors[part] for part in self.PARTS)
        rz, first, live = self.tensors["rz"], self.tensors["first"], self.live
        direction = _rows(p, live)
        turned = product(direction)
        curved = dot(direction, turned)
        self._end(live, rz[live] == 0, Outcome.CONVERGED)
        self._end(live, ~curved.isfinite(), Outcome.NOT_FINITE)
        self._end(live, curved <= 0, Outcome.NEGATIVE_CURVATURE)
        good = self.outcomes[live] == Outcome.DONE
        live, direction, turned = live[good], _rows(direction, good), _rows(turned, good)
        alpha = rz[live] / curved[good]
        new = difference(_rows(r, live), _scaled(alpha, turned))
        z = precondition(new)
        after = dot(new, z)
        self._end(live, ~after.isfinite(), Outcome.NOT_FINITE)
        self._end(live, after > GROWTH**2 * first[live], Outcome.DIVERGED)
        good = self.outcomes[live] == Outcome.DONE
        live, after, direction = live[good], after[good], _rows(direction, good)
        moved = _scaled(alpha[good], direction)
        onward = _scaled(after / rz[live], direction)
        for name in x:
            x[name][live] += moved[name]
            r[name][live] = new[name][good]
            p[name][live] = z[name][good] + onward[name]
        rz[live] = after
        self.iterations[live] += 1
        eps = torch.finfo(next(iter(x.values())).dtype).eps
        self._end(live, after <= (ROUNDINGS * eps) ** 2 * first[live], Outcome.CONVERGED)


class Descent(Solver):
    """x and the step v that led there."""

    PARTS = ("x", "v")

    @classmethod
    def start(cls, x: Vectors) -> "Descent":
        """From x, at rest."""
        return cls(cls.begun({"x": x, "v": {n: torch.zeros_like(a) for n, a in x.items()}}))

    def step(
        self,
        b: Vectors,
        product: Operator,
        precondition: Operator,
        rate: float,
        momentum: float,
        bound: Tensor,
        fallback: Callable[[], Vectors],
    ) -> None:
        """One iteration of every live query.

        Args:
            b: right-hand sides, of all queries.
            bound: [Q], a norm that x has only where it diverges.
            fallback: what x becomes then.
        """
        x, v, live = self.x, self.vectors["v"], self.live
        r = difference(_rows(b, live), product(_rows(x, live)))
        for name, step in precondition(r).items():
            v[name][live] = momentum * v[name][live] + rate * step
            x[name][live] += v[name][live]
        size = dot(_rows(x, live), _rows(x, live)).sqrt()
        self._end(live, ~size.isfinite(), Outcome.NOT_FINITE)
        self._end(live, size > bound[live], Outcome.DIVERGED)
        failed = live[self.outcomes[live] != Outcome.DONE]
        if len(failed):
            for name, good in fallback().items():
                x[name][failed] = good[failed]
        self.iterations[live[self.outcomes[live] == Outcome.DONE]] += 1
