"""Queries refined: (H + damping) x = grad f solved further, from EK-FAC's solution.

H = 1/N sum over examples of J^T H_loss J      Gauss-Newton, of all tracked layers together
x_0 = (EK-FAC + damping)^-1 grad f             and EK-FAC is the preconditioner C

Summed over an example's positions and averaged over examples, as EK-FAC's eigenvalues are. H is
that of a fixed sample of the training data; its blocks between layers are in it.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from ..checks import require, sized, whole
from ..curvature.memory import free_bytes
from ..curvature.solvers import (
    ConjugateGradients,
    Descent,
    Outcome,
    Solver,
    Vectors,
    difference,
    dot,
)
from ..data.examples import Indexable
from ..errors import ArgumentError, Notice
from ..model.alone import alone
from ..model.layers import Layer
from ..model.linearised import Linearised
from ..model.tasks import linear_outputs
from ..store.folder import State, Store
from .factors import Factors, bases
from .run import Run, RunArguments, Stage, accumulator

# Methods and their iterations. LiSSA and ASTRA: those of bergson's published comparison.
ITERATIONS = {"cg": 10, "lissa": 5000, "astra": 300}
EXAMPLES = 256
# Of the descents: examples a step; of ASTRA, rate and momentum.
MINIBATCH, RATE, MOMENTUM = 16, 0.1, 0.9
# Vectors of all layers that exist at a time for a query, and the memory that they share.
VECTORS, VECTOR_BYTES = 8, 4 << 30
# Of a gain, what is rounding.
SLACK = 1e-6
WORDS = {
    Outcome.NEGATIVE_CURVATURE: "negative curvature",
    Outcome.NOT_FINITE: "NaN or infinity",
    Outcome.DIVERGED: "it diverges",
}


@dataclass(frozen=True)
class Refinement:
    """What a refinement on a sample of so many `examples` came to, one number a query: [Q].

    `residual` is ||grad f - (H + damping) x|| / ||grad f|| of the solution that was kept, `before`
    that of EK-FAC's; `iterations` are those that x has taken, `outcomes` how they ended.
    """

    method: str
    examples: int
    residual: Tensor
    before: Tensor
    iterations: Tensor
    outcomes: Tensor

    @property
    def title(self) -> str:
        """What was done, and the largest residual."""
        return (
            f"{self.method} on {self.examples} examples, relative residual at most "
            f"{self.residual.max():.2e} (EK-FAC {self.before.max():.2e})"
        )

    def told(self, q: int) -> str:
        """A query's, in words."""
        outcome, count = Outcome(int(self.outcomes[q])), int(self.iterations[q])
        text = f"residual {self.before[q]:.2e} -> {self.residual[q]:.2e}, {count} iterations"
        if outcome is Outcome.CONVERGED:
            return f"{text}, converged"
        return f"{text}, {_stopped(outcome, count)}" if outcome in WORDS else text


def _stopped(outcome: Outcome, count: int) -> str:
    return f"stopped at iteration {count + 1}: {WORDS[outcome]}"


def method_of(refine: Any) -> tuple[str, int]:
    """("cg", 10) of "cg:10"; a name alone has a number of its own.

    Raises:
        ArgumentError: no such method, or no number of iterations.
    """
    name, _, count = refine.partition(":") if isinstance(refine, str) else ("", "", "")
    known = name in ITERATIONS and (refine == name or (count.isascii() and count.isdigit()))
    names = ", ".join(f"'{x}:{n}'" for x, n in ITERATIONS.items())
    require(known and len(count) < 19, "refine", refine, f"a method and its iterations: {names}")
    steps = int(count or ITERATIONS[name])
    require(steps > 0, "refine", refine, "at least 1 iteration")
    return name, steps


class Sample(Subset):
    """Some examples of a data set, which say where they are from."""

    def source(self, index: int) -> str:
        """Where an example comes from, for messages."""
        tell, at = getattr(self.dataset, "source", None), self.indices[index]
        return str(tell(at)) if callable(tell) else f"number {at} of the training data"


class Refining:
    """Refines the gradients of queries, several at a time.

    Raises:
        ArgumentError: no such method; more examples than there are; the task does not tell its
            outputs; one query at full rank does not fit in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        factors: Factors,
        layers: Sequence[Layer],
        dampings: dict[str, float],
        dataset: Indexable | None,
        refine: str,
        examples: int | None,
        seed: int,
        arguments: RunArguments,
    ) -> None:
        self.method, self.steps = method_of(refine)
        if dataset is None:
            raise ArgumentError("refine needs the training data: give dataset=")
        size, self.seed = sized(dataset), seed
        count = min(size, EXAMPLES) if examples is None else whole("refine_examples", examples)
        if count > size:
            raise ArgumentError(f"refine_examples is {count}, but the data set has {size}")
        chosen = np.random.default_rng(self.seed).choice(size, count, replace=False)
        self.indices: list[int] = sorted(chosen.tolist())
        # In the dtype of the weights: what products round to, no residual goes below.
        whole_set: Any = dataset  # torch's `Subset` asks for a `Dataset`, and takes what has items
        self.run = Run(model, Sample(whole_set, self.indices), {**arguments, "autocast": None})
        self.layers, self.dampings = layers, dampings
        self._check_task()
        self.dtype = accumulator(model)
        self._check_memory()
        self._bases = bases(factors, layers, dampings, self.dtype, self.run.places(layers))
        self._linearised = Linearised(model, layers)
        # A bound on H's largest eigenvalue: of blocks that are positive, at most their sum.
        largest = sum(float(factors[x.name].lam.max()) for x in layers)
        self._scale = largest + max(dampings.values())

    @property
    def facts(self) -> dict[str, Any]:
        """What the refinement depends on, beside what queries do anyway."""
        method = f"{self.method}:{self.steps}"
        data = self.run.batches.fingerprint()
        return {"method": method, "seed": self.seed, "data": data, "examples": self.indices}

    def _check_task(self) -> None:
        """Try the task's outputs on one example: their loss is the training loss."""
        task, model, one = self.run.task, self.run.model, self.run.batches.load([0])
        with alone(model), torch.no_grad():
            y, _ = linear_outputs(task, one, model)
            tell = getattr(task, "compute_output_loss", None)
            if not callable(tell):
                return
            found = float(tell(y, batch=one))
            wanted = float(task.compute_train_loss(batch=one, model=model, sample=False))
        if not abs(found - wanted) <= 1e-3 * abs(wanted) + 1e-6:
            raise ArgumentError(
                f"refine: {type(task).__name__}.compute_output_loss of compute_outputs is "
                f"{found:.6g} for the first example, compute_train_loss is {wanted:.6g}: they have "
                "to be the same sum"
            )

    def _check_memory(self) -> None:
        free = free_bytes(self.run.device)
        if self._bytes > free:
            raise ArgumentError(
                f"refine: one query at full rank needs {self._bytes:,} bytes ({VECTORS} vectors of "
                f"all tracked layers), {free:,} are free: track fewer layers, or leave refine out"
            )

    @property
    def _bytes(self) -> int:
        """Of one query."""
        return VECTORS * self.dtype.itemsize * sum(x.O * x.J for x in self.layers)

    @property
    def at_once(self) -> int:
        """How many queries are refined together; a function of shapes, so that a continued run has
        the same groups.
        """
        return max(1, VECTOR_BYTES // self._bytes)

    def precondition(self, r: Vectors) -> Vectors:
        """C r: EK-FAC's solution."""
        found = {}
        for name, G in r.items():
            basis = self._bases[name].at(G.device)
            found[name] = basis.rotate_back(basis.precondition_gradient(G))
        return found

    def product(self, v: Vectors, examples: Sequence[int] | None = None) -> Vectors:
        """(H + damping) v, with H of the whole sample, or of some of its examples."""
        run, sums = self.run, {name: torch.zeros_like(x) for name, x in v.items()}
        every = range(run.batches.size) if examples is None else examples
        for batch in run.batches.divided(every):
            outputs = partial(linear_outputs, run.task, run.batches.load(batch), run.model)
            self._linearised.add_product(outputs, v, sums)
        return {n: x.div_(len(every)).add_(v[n], alpha=self.dampings[n]) for n, x in sums.items()}

    def minibatch(self, step: int) -> list[int]:
        """The examples of one step of a descent: every epoch has an order of its own."""
        size = self.run.batches.size
        count = min(MINIBATCH, size)
        a_epoch = size // count
        epoch, place = divmod(step, a_epoch)
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(size)
        return sorted(order[place * count : (place + 1) * count].tolist())

    def solve(
        self, b: Vectors, queries: Sequence[int], store: Store | None, name: str
    ) -> tuple[Vectors, dict[str, Tensor]]:
        """x of gradients b [Q,O,J], and what `Refinement` tells of them.

        Args:
            queries: their numbers, for messages.
            store: where the state after every iteration is kept under `name`, as often as its pace
                says; a state that is there is continued.
        """
        run, kept = self.run, State() if store is None else store.load_state(name)
        b = {n: x.to(run.device, self.dtype) for n, x in b.items()}
        run.seconds[Stage.REFINEMENT] = kept.notes.get(
            "seconds", run.seconds.get(Stage.REFINEMENT, 0.0)
        )
        solver = self._solver(b, kept)
        for step in range(len(kept.done), self.steps):
            if not len(solver.live):
                break
            with run.timed(Stage.REFINEMENT):
                self._step(solver, b, step)
            if store is not None and store.due:
                notes = {"seconds": run.seconds[Stage.REFINEMENT]}
                store.save_state(name, solver.tensors, range(step + 1), notes)
            run.report(Stage.REFINEMENT, step + 1, self.steps)
        with run.timed(Stage.REFINEMENT):
            left = difference(b, self.product(solver.x))
        told = {n: solver.tensors[n].cpu() for n in ("before", "iterations", "outcomes")}
        self._warn(queries, told, dot(solver.x, left) + dot(solver.x, b), solver.tensors["gain"])
        return solver.x, told | {"residual": _size(left, b).cpu()}

    def _solver(self, b: Vectors, kept: State) -> Solver:
        """As it was kept, or at its start."""
        kind = ConjugateGradients if self.method == "cg" else Descent
        if kept.tensors:
            return kind({name: x.to(self.run.device) for name, x in kept.tensors.items()})
        with self.run.timed(Stage.REFINEMENT):
            x = self.precondition(b)
            r = difference(b, self.product(x))
            # x^T (r + b) = -2 (x^T H x / 2 - b^T x), of which H x = b makes the most.
            told = {"before": _size(r, b), "gain": dot(x, r) + dot(x, b)}
            solver: Solver
            if self.method == "cg":
                solver = ConjugateGradients.start(x, r, self.precondition)
            else:
                lissa = {n: G / self._scale for n, G in b.items()}
                solver = Descent.start(lissa if self.method == "lissa" else x)
        solver.tensors.update(told)
        return solver

    def _step(self, solver: Solver, b: Vectors, step: int) -> None:
        if isinstance(solver, ConjugateGradients):
            solver.step(self.product, self.precondition)
            return
        assert isinstance(solver, Descent)
        lissa = self.method == "lissa"
        least = min(self.dampings.values())
        # H x = b has no solution longer than this, with no damping or the least one.
        bound = dot(b, b).sqrt() / least if least else torch.full_like(dot(b, b), torch.inf)
        solver.step(
            b,
            partial(self.product, examples=self.minibatch(step)),
            (lambda r: r) if lissa else self.precondition,
            1 / self._scale if lissa else RATE,
            0.0 if lissa else MOMENTUM,
            bound,
            partial(self.precondition, b),
        )

    def _warn(
        self, queries: Sequence[int], told: dict[str, Tensor], gain: Tensor, before: Tensor
    ) -> None:
        """A notice for every query that stopped, or is no better than EK-FAC's."""
        for q, query in enumerate(queries):
            outcome = Outcome(int(told["outcomes"][q]))
            if outcome in WORDS:
                why = _stopped(outcome, int(told["iterations"][q]))
                what = "EK-FAC's solution" if self.method != "cg" else "the solution before it"
                _say(f"query {query}: {self.method} {why}; {what} is kept")
            elif before[q] - gain[q] > SLACK * before[q].abs():
                _say(
                    f"query {query}: after {self.steps} iterations of {self.method} the solution "
                    "is farther from the equation's than EK-FAC's"
                )


def _say(text: str) -> None:
    warnings.warn(text, Notice, stacklevel=4)


def _size(r: Vectors, b: Vectors) -> Tensor:
    """||r|| / ||b||, 0 where b is: [Q]."""
    size = dot(b, b)
    return (dot(r, r) / size.masked_fill(size == 0, 1)).sqrt()
