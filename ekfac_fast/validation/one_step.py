"""One small gradient step on a training sequence: does the completion become more likely?"""

import torch
from torch import Tensor, nn

from ..data.batches import Batches
from ..data.examples import Indexable
from ..model.tasks import LanguageModelTask
from ..stages.queries import Queries
from ..stages.scores import Scores

# A step of this size along one sequence's gradient: small against the distance trained.
STEP = 1e-3


def step_check(
    model: nn.Module, queries: Queries, scores: Scores, data: Indexable
) -> list[tuple[float, float]]:
    """Change of each completion's log-probability after one small gradient step on its top and its
    bottom sequence, in nats: the first should be positive, the second negative.
    """
    task = LanguageModelTask()
    asked = [{"input_ids": ids, "labels": labels} for ids, labels in queries.examples]
    every, ask = Batches(data, model), Batches(asked, model)
    weights = [model.get_parameter(f"{name}.weight") for name in scores.layers]
    changes = []
    for q in range(len(queries)):
        batch = ask.load([q])
        before = _log_probability(task, batch, model)
        pair = []
        for lowest in (False, True):
            ((index, _),) = scores.top(q, 1, lowest=lowest)
            loss = task.compute_train_loss(every.load([index]), model)
            gradients = torch.autograd.grad(loss, weights)
            size = STEP / torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
            with torch.no_grad():
                for weight, g in zip(weights, gradients, strict=True):
                    weight.sub_(size * g)
                pair.append(_log_probability(task, batch, model) - before)
                for weight, g in zip(weights, gradients, strict=True):
                    weight.add_(size * g)
        changes.append((pair[0], pair[1]))
    return changes


@torch.no_grad()
def _log_probability(task: LanguageModelTask, batch: dict[str, Tensor], model: nn.Module) -> float:
    return -task.negative_log_likelihoods(batch, model).item()
