"""The proximal Bregman response: what influence functions stand for, by optimisation.

    theta(eps) = argmin  1/N sum_i D(y_i(theta), y_i(theta_s)) + eps L(z, theta)
                         + sum over layers of damping / 2 ||theta - theta_s||^2        (Eq. 7)
    D(y, y_s)  = L(y) - L(y_s) - <grad L(y_s), y - y_s>      Bregman divergence of the loss in y
    response   = -(f(theta(eps)) - f(theta(-eps))) / (2 eps)                          [Q] of every z

Started from the trained weights theta_s, in the tracked layers alone. Small eps make it
grad f^T (H + damping)^-1 grad L(z) with H the Gauss-Newton matrix of those layers (Eq. 9): scores
of any method can be correlated with it, and no model is trained again (Bae et al. 2022).
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import is_number, require, whole
from ..data.batches import Batches
from ..data.examples import IGNORED, Indexable
from ..errors import ArgumentError, NotFiniteError, Notice
from ..model.alone import restored
from ..model.layers import parameters_of, select_layers
from ..model.packed import refuse_packed
from ..model.tasks import LanguageModelTask, Task, checked_task, draws_several
from ..model.text_tasks import form_of
from ..model.weights import check_changeable
from .measure import measurements

# Of the first gradient, what may be left of it; of more than LEFT a notice tells.
SOLVED, LEFT = 1e-6, 1e-3
HISTORY = 50


def responses(
    model: nn.Module,
    queries: Indexable,
    dataset: Indexable,
    examples: Sequence[int],
    *,
    damping: float | Mapping[str, float],
    layers: str | list[str] | None = None,
    weight: float | None = None,
    steps: int = 1000,
    task: Task | None = None,
    batch_tokens: int | None = None,
    batch_size: int | None = None,
) -> np.ndarray:
    """Responses of every query to every one of `examples`: [Q,len(examples)], in units of scores.

    Args:
        model: trained; a copy in fp64 is optimised.
        examples: indices of the sequences z that are weighted up, and down.
        damping: of every layer, or by its name, as the scores were made with.
        layers: those that move; see `fit`.
        weight: eps; None for 1/N. Where the response bends with it, it is no derivative.
        steps: of L-BFGS, at most, for each z and sign; a notice tells where they were too few.

    Raises:
        ArgumentError: the task does not tell its outputs (see `refine`), or no such example.
        NotFiniteError: an optimisation diverged; names the example.
    """
    task = checked_task(task) or LanguageModelTask()
    check_changeable(model, model.parameters(), "a response")
    own = copy.deepcopy(model).double().eval()
    batches = Batches(
        dataset, own, batch_tokens=batch_tokens, batch_size=batch_size, form=form_of(task, own)
    )
    for index in examples:
        require(0 <= index < batches.size, "examples", index, f"indices of {batches.size} examples")
    eps = 1 / batches.size if weight is None else weight
    require(is_number(eps) and eps > 0, "weight", eps, "a number > 0")
    whole("steps", steps)
    problem = _Proximal(own, task, batches, damping, layers)
    found = np.empty((len(queries), len(examples)))
    for column, index in enumerate(examples):
        ends = []
        for sign in (1, -1):
            with problem.solved(index, sign * eps, steps):
                ends.append(measurements(own, queries, task).numpy())
        found[:, column] = -(ends[0] - ends[1]) / (2 * eps)
        if not np.isfinite(found[:, column]).all():
            raise NotFiniteError(
                f"example {index}: the optimisation diverged: a larger damping or smaller weight"
            )
    return found


class _Proximal:
    """The objective around the weights that a model has now."""

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        batches: Batches,
        damping: float | Mapping[str, float],
        layers: str | list[str] | None,
    ) -> None:
        self.model, self.task, self.batches = model, task, batches
        self.weights: list[nn.Parameter] = []
        self.dampings: list[float] = []
        for layer in select_layers(model, layers):
            if layer.expert is not None:
                raise ArgumentError(
                    f"layer {layer.name} is a part of a parameter, whose damping is one: leave "
                    "routed experts out of `layers`"
                )
            each = damping[layer.name] if isinstance(damping, Mapping) else damping
            refuse_packed(model, [layer], "a response")
            own = parameters_of(model, layer)
            self.weights += own
            self.dampings += [float(each)] * len(own)
        for w in model.parameters():
            w.requires_grad_(False)
        for w in self.weights:
            w.requires_grad_(True)
        self.before = [w.detach().clone() for w in self.weights]
        self.inputs = [batches.load(some) for some in batches.divided()]
        self.started = [self._linear(batch) for batch in self.inputs]

    def outputs(self, batch: Any) -> Tensor:
        """What the loss is a function of."""
        if hasattr(self.task, "compute_outputs"):
            return self.task.compute_outputs(batch=batch, model=self.model)
        if draws_several(self.task):  # its loss is the language models' own
            return self.task.logits(batch, self.model)
        raise ArgumentError(
            f"{type(self.task).__name__} does not tell its outputs: give it compute_outputs and "
            "compute_output_loss, as a refinement needs them"
        )

    def loss(self, y: Tensor, batch: Any) -> Tensor:
        """Summed over the batch."""
        if hasattr(self.task, "compute_output_loss"):
            return self.task.compute_output_loss(y, batch=batch)
        labels = batch["labels"][:, 1:].flatten()
        return F.cross_entropy(
            y[:, :-1].flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum"
        )

    def _linear(self, batch: Any) -> tuple[Tensor, Tensor]:
        """(y_s, grad L(y_s))."""
        with torch.no_grad():
            y = self.outputs(batch)
        y.requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.loss(y, batch), y)
        return y.detach(), gradient

    def value(self, z: Any, eps: float) -> Tensor:
        """The objective; without its constant L(y_s)."""
        total = eps * self.loss(self.outputs(z), z)
        for batch, (start, gradient) in zip(self.inputs, self.started, strict=True):
            y = self.outputs(batch)
            bregman = self.loss(y, batch) - (gradient * (y - start)).sum()
            total = total + bregman / self.batches.size
        for w, was, damping in zip(self.weights, self.before, self.dampings, strict=True):
            total = total + damping / 2 * (w - was).square().sum()
        return total

    @contextmanager
    def solved(self, index: int, eps: float, steps: int) -> Iterator[None]:
        """The model at the optimum for one example; afterwards as it was."""
        z = self.batches.load([index])
        # Where it starts, the gradient is that of z alone; in units of it, as L-BFGS of PyTorch
        # forgets what it has seen of curvature where gradients are small.
        first = torch.autograd.grad(eps * self.loss(self.outputs(z), z), self.weights)
        unit = max(g.abs().max().item() for g in first) or 1.0
        moved = [torch.zeros_like(w, requires_grad=True) for w in self.weights]

        def closure() -> float:
            with torch.no_grad():
                for w, was, u in zip(self.weights, self.before, moved, strict=True):
                    w.copy_(was + unit * u)
            value = self.value(z, eps)
            gradients = torch.autograd.grad(value, self.weights)
            for u, g in zip(moved, gradients, strict=True):
                u.grad = g / unit
            return value.item() / unit**2

        with restored(self.weights):
            # Where the objective's change drowns in its rounding, its gradient does not yet.
            for search in ("strong_wolfe", None):
                torch.optim.LBFGS(
                    moved, max_iter=steps, max_eval=2 * steps, history_size=HISTORY,
                    line_search_fn=search, tolerance_grad=SOLVED, tolerance_change=0,
                ).step(closure)  # fmt: skip
            closure()
            left = max(float(u.grad.abs().max()) for u in moved if u.grad is not None)
            if left > LEFT:
                warnings.warn(
                    f"example {index}: after {steps} steps {left:.1e} of the gradient is "
                    "left, so the response is not the optimum's: give more steps, or a larger "
                    "damping",
                    Notice,
                    stacklevel=5,
                )
            yield
