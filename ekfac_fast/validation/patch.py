"""Tail patch: a few steps of training on a query's top sequences, from the final weights.

No retraining: says whether the sequences that a method puts first teach the model what is asked
(Chang et al. 2024), beside those that share tokens with it (BM25) and those drawn at random.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np
from torch import nn

from ..checks import instance, whole
from ..data.batches import Batches, is_text
from ..data.examples import Indexable
from ..errors import ArgumentError, NotFiniteError
from ..model.alone import evaluating
from ..model.spread import device_of
from ..model.tasks import LanguageModelTask, Task, checked_task
from ..model.text_tasks import form_of
from ..model.weights import check_changeable
from .baselines import bm25, chance
from .measure import measurements
from .one_step import STEP, stepped
from .scores_of import AnyScores, scores_of


def tail_patch(
    model: nn.Module,
    queries: Indexable,
    dataset: Indexable,
    scores: Mapping[str, AnyScores],
    *,
    k: int = 10,
    steps: int = 3,
    size: float = STEP,
    task: Task | None = None,
    controls: bool = True,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """How much every query's measurement falls after steps on its k top sequences: [Q] by method.

    Of a language model: by how many nats the completion's log-probability rises. Steps go down the
    sum of the sequences' training losses in all parameters that train, each of length `size`. The
    model is left as it was.

    Args:
        scores: by name; see `scores_of`.
        controls: add "random" and, of text, "BM25".
        seed: of the random control.

    Raises:
        ArgumentError: k is larger than the data set, or no parameter trains.
        DataError: scores of another shape.
        NotFiniteError: a step is too long; names the query.
    """
    instance("scores", scores, Mapping, "a mapping from names to scores")
    whole("steps", steps)
    task = checked_task(task) or LanguageModelTask()
    every = Batches(dataset, model, form=form_of(task, model), device=device_of(model))
    if whole("k", k) > every.size:
        raise ArgumentError(f"k is {k}, but the data set has {every.size} sequences")
    weights = [w for w in model.parameters() if w.requires_grad]
    if not weights:
        raise ArgumentError("no parameter of the model requires a gradient: none can be trained")
    check_changeable(model, weights, "a step")
    shape = (len(queries), every.size)
    matrices = {name: scores_of(one, shape, name) for name, one in scores.items()}
    if controls:
        matrices["random"] = chance(*shape, seed)
        if is_text(dataset[0]):
            matrices["BM25"] = bm25(queries, dataset)
    with evaluating(model):
        before = measurements(model, queries, task).numpy()
        found = {name: np.empty(shape[0]) for name in matrices}
        for name, matrix in matrices.items():
            for q in range(shape[0]):
                batch = every.load(np.argsort(-matrix[q], kind="stable")[:k].tolist())
                loss = partial(task.compute_train_loss, batch=batch, model=model, sample=False)
                with stepped(weights, loss, steps, size):
                    after = measurements(model, [queries[q]], task).item()
                if not np.isfinite(after):
                    raise NotFiniteError(
                        f"{name}: after {steps} steps the measurement of query {q} is {after}: "
                        "take a smaller size"
                    )
                found[name][q] = before[q] - after
    return found
