"""What is measured of a model: one number a query, as `prepare_queries` measures it."""

import torch
from torch import Tensor, nn

from ..data.batches import Batches
from ..data.examples import Indexable
from ..model.alone import alone
from ..model.spread import device_of
from ..model.tasks import LanguageModelTask, Task
from ..model.text_tasks import form_of
from ..stages.measured import measures_each


@torch.no_grad()
def measurements(model: nn.Module, queries: Indexable, task: Task | None = None) -> Tensor:
    """The task's measurement of every query, in evaluation mode: [Q], fp64.

    Of a language model -log p(completion | prompt), nats.
    """
    task = task or LanguageModelTask()
    ask = Batches(
        queries, model, on_long="refuse", form=form_of(task, model, asked=True),
        device=device_of(model),
    )  # fmt: skip
    found = torch.full((ask.size,), torch.nan, dtype=torch.float64)
    with alone(model):
        if measures_each(task):
            for some in ask.divided():
                values = task.measurements(ask.load(some), model)
                found[some] = values.to("cpu", torch.float64)
            return found
        for index in range(ask.size):
            value = task.compute_measurement(batch=ask.load([index]), model=model)
            found[index] = value.item()
    return found
