"""Output-token and input-token influence, of pairs of query and sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import require, whole
from ..data.batches import divided
from ..data.examples import Indexable
from ..errors import ArgumentError
from ..model.head import predicting
from ..model.tasks import LanguageModelTask, targets
from ..model.token_influence import TokenPass
from .queries import Queries
from .run import Run, RunArguments

# A pass and its derivative keep about so many times as much as a scan's pass.
SHARE = 4


@dataclass(frozen=True)
class TokenAttribution:
    """What every token of a sequence has of its score for a query; raw, as scores are.

    target  [T] at target t: <P, grad L_t>, what zeroing the loss of this token takes away; sums to
            `score`. The first token is no target, nor is a token without a label.
    input   [T] e_t d score / d e_t: what scaling this token's embedding does
    """

    query: int
    index: int
    score: float
    target: np.ndarray
    input: np.ndarray


@torch.inference_mode(False)
def attribute_tokens(
    model: nn.Module,
    queries: Queries,
    dataset: Indexable,
    pairs: Sequence[tuple[int, int]],
    **arguments: Unpack[RunArguments],
) -> list[TokenAttribution]:
    """Output-token influence (paper, Eq. 34-36) and input-token influence (Eq. 37-38), exactly, by
    differentiating the backward pass.

    Args:
        model: the model the queries were prepared on.
        queries: from `prepare_queries`.
        dataset: the corpus.
        pairs: (query, index of a sequence), e.g. [(q, i) for i, _ in scores.top(q, 10)].
        arguments: see `RunArguments`; autocast is off.

    Returns:
        One for each pair, in their order.

    Raises:
        ArgumentError: no such query or sequence; the task is not the language models' own; a layer
            stands for several modules.
        ModelError: the model cannot be differentiated twice.
    """
    run = Run(model, dataset, {**arguments, "autocast": None})
    queries.check_run(run.facts(), "attribute_tokens")
    own = LanguageModelTask.compute_train_loss
    task = run.task
    if not isinstance(task, LanguageModelTask) or type(task).compute_train_loss is not own:
        raise ArgumentError(
            f"attribute_tokens: {type(task).__name__} has a loss of its own; what one token's loss "
            "is is known of LanguageModelTask alone"
        )
    require(isinstance(pairs, Sequence), "pairs", pairs, "a list of (query, index)")
    for pair in pairs:
        require(isinstance(pair, tuple | list) and len(pair) == 2, "pairs", pair, "(query, index)")
        whole("query", pair[0], 0, len(queries) - 1)
        whole("index", pair[1], 0, run.batches.size - 1)
    layers = [x.layer for x in queries.layers]
    if doubled := [x.name for x in layers if x.also]:
        raise ArgumentError(f"layer {doubled[0]} stands for several modules: leave it out")
    gradients = {
        x.layer.name: x.gradients.each(lambda t: t.to(run.device, run.dtype))
        for x in queries.layers
    }
    lengths = [run.batches.lengths[index] for _, index in pairs]
    found: dict[int, TokenAttribution] = {}
    capture = TokenPass(model, layers, run.swapped)
    for some in divided(lengths, max(1, run.batches.batch_tokens // SHARE)) if pairs else ():
        asked = torch.tensor([pairs[at][0] for at in some], device=run.device)
        indices = [int(pairs[at][1]) for at in some]
        inputs = run.batches.load(indices)
        labels = targets(inputs)
        b, t = predicting(labels)

        def losses(inputs: Any = inputs, labels: Tensor = labels, places: Any = (b, t)) -> Tensor:
            logits = task.logits(inputs, model)[places]
            return F.cross_entropy(logits, labels[places], reduction="none")

        contracted = {
            x.name: partial(gradients[x.name].each(itemgetter(asked)).paired, bias=x.bias)
            for x in layers
        }
        seen = capture(losses, contracted, run.grid(inputs, indices))
        target = torch.zeros_like(labels, dtype=seen.target.dtype)
        target[b, t] = seen.target
        # Position t predicts token t + 1.
        target = F.pad(target, (1, 0))
        sides = [x.double().cpu().numpy() for x in (target, seen.input)]
        for row, at in enumerate(some):
            of, by = (side[row, : lengths[at]] for side in sides)
            query, index = (int(n) for n in pairs[at])
            found[at] = TokenAttribution(query, index, float(of.sum()), of, by)
    return [found[at] for at in range(len(pairs))]
