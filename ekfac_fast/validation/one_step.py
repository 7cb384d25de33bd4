"""One small gradient step on a training sequence: does the completion become more likely?"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..data.batches import Batches
from ..data.examples import Indexable
from ..model.alone import evaluating, restored
from ..model.layers import parameters_of, select_layers
from ..model.packed import refuse_packed
from ..model.spread import device_of
from ..model.tasks import LanguageModelTask
from ..model.weights import check_changeable
from ..stages.queries import Queries
from ..stages.scores import Scores
from .measure import measurements

# A step of this size along one sequence's gradient: small against the distance trained.
STEP = 1e-3


@contextmanager
def stepped(
    weights: Sequence[nn.Parameter], loss: Callable[[], Tensor], steps: int = 1, size: float = STEP
) -> Iterator[None]:
    """The model after so many steps down a loss, each of this length; afterwards as it was.

    w <- w - size grad L / ||grad L||        of all `weights` together
    """
    with restored(weights):
        for _ in range(steps):
            gradients = torch.autograd.grad(
                loss(), weights, allow_unused=True, materialize_grads=True
            )
            length = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
            with torch.no_grad():
                for weight, g in zip(weights, gradients, strict=True):
                    weight.sub_(size / length.clamp(min=1e-30) * g)
        yield


def step_check(
    model: nn.Module, queries: Queries, scores: Scores, data: Indexable
) -> list[tuple[float, float]]:
    """Change of each completion's log-probability after one small gradient step on its top and its
    bottom sequence, in nats: the first should be positive, the second negative.
    """
    task = LanguageModelTask()
    asked = [{"input_ids": ids, "labels": labels} for ids, labels in queries.examples]
    every = Batches(data, model, device=device_of(model))
    layers = select_layers(model, scores.layers)
    refuse_packed(model, layers, "a step")
    # Experts are parts of one parameter.
    weights = [*{id(w): w for w in (parameters_of(model, x)[0] for x in layers)}.values()]
    check_changeable(model, weights, "a step")
    changes = []
    with evaluating(model):
        for q, one in enumerate(asked):
            before = float(measurements(model, [one], task))
            pair = []
            for lowest in (False, True):
                ((index, _),) = scores.top(q, 1, lowest=lowest)
                loss = partial(task.compute_train_loss, every.load([index]), model)
                with stepped(weights, loss):
                    pair.append(before - float(measurements(model, [one], task)))
            changes.append((pair[0], pair[1]))
    return changes
