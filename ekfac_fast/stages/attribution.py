"""Output-token and input-token influence, of pairs of query and sequence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import require, whole
from ..curvature.query_gradients import QueryGradients
from ..data.batches import divided
from ..data.examples import Indexable
from ..errors import ArgumentError
from ..model.head import predicting
from ..model.layer_batch import LayerBatch
from ..model.layers import Layer
from ..model.tasks import LanguageModelTask, draws_several, targets
from ..model.token_influence import Contracted, TokenPass
from ..model.weights import lets_go
from .consumer import Batch, Consumer
from .processes import Processes
from .queries import Queries
from .run import Run, RunArguments, Stage
from .swapped import swapped

# A pass and its derivative keep about so many times as much as a scan's pass; on a CPU small
# batches cost more than memory does.
SHARE, SHARE_CPU = 4, 2
# Of every sequence, the queries that ask for it.
Wanted = Mapping[int, Sequence[int]]


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
        ProcessError: another process of the run has failed.
    """
    run = Run(model, dataset, {**arguments, "autocast": None}, processes=Processes.here())
    layers = [x.layer for x in queries.layers]
    if (reason := unattributable(run, layers)) is not None:
        raise ArgumentError(f"attribute_tokens: {reason}")
    queries.check_run(run.facts(), "attribute_tokens")
    require(isinstance(pairs, Sequence), "pairs", pairs, "a list of (query, index)")
    wanted: dict[int, list[int]] = {}
    for pair in pairs:
        require(isinstance(pair, tuple | list) and len(pair) == 2, "pairs", pair, "(query, index)")
        query = whole("query", pair[0], 0, len(queries) - 1)
        asking = wanted.setdefault(whole("index", pair[1], 0, run.batches.size - 1), [])
        asking += [] if query in asking else [query]
    with run.processes.together():
        consumer = Attributing(run, layers, thin(run, queries), wanted)
        run.each(
            Stage.DETAIL, layers, consumer.batches(), consumer, loss=consumer.loss,
            capture=consumer.capture,
        )  # fmt: skip
        found = {k: x for part in run.processes.gathered(consumer.found) for k, x in part.items()}
    return [found[int(query), int(index)] for query, index in pairs]


def unattributable(run: Run, layers: Sequence[Layer]) -> str | None:
    """Why there is no attribution to tokens, or None."""
    if not draws_several(run.task):
        return (
            f"{type(run.task).__name__} has a loss of its own; a single token's loss is known of "
            "LanguageModelTask alone"
        )
    if run.autocast is not None:
        return f"derivatives of derivatives are not taken under autocast ({run.autocast})"
    if why := lets_go(run.model):
        return why
    if other := next((x for x in layers if x.kind != "linear"), None):
        return f"layer {other.name} is no linear layer ({other.kind}): leave it out"
    doubled = next((x.name for x in layers if x.also), None)
    return None if doubled is None else f"layer {doubled} stands for several modules: leave it out"


def thin(
    run: Run, queries: Queries, placed: Mapping[str, QueryGradients] | None = None
) -> dict[str, QueryGradients]:
    """Every layer's queries on the device as they are kept: of low rank, not multiplied out.

    placed: what is there already; of the same form it is taken.
    """
    found, places = {}, run.places([own.layer for own in queries.layers])
    for own in queries.layers:
        kept, there = own.gradients, (placed or {}).get(own.layer.name)
        if there is None or type(there) is not type(kept):
            where = places[own.layer.name], run.dtype
            there = kept.each(partial(_moved, where))
        found[own.layer.name] = there
    return found


def _moved(where: tuple[torch.device, torch.dtype], x: Tensor) -> Tensor:
    return x.to(*where)


class Attributing(Consumer):
    """Output-token and input-token influence of a batch's sequences, for the queries that ask.

    A pass is shared by the queries of a sequence, which follow one another: the first of every
    sequence together, then the second. `found` is by (query, index).
    """

    def __init__(
        self,
        run: Run,
        layers: Sequence[Layer],
        gradients: Mapping[str, QueryGradients],
        wanted: Wanted,
    ) -> None:
        self.run, self.layers, self.gradients, self.wanted = run, layers, gradients, wanted
        self.capture = TokenPass(run.model, layers, partial(swapped, run))
        self.found: dict[tuple[int, int], TokenAttribution] = {}
        self.rounds: list[list[tuple[int, int]]] = []
        self.labels = torch.empty(0, 0, dtype=torch.int64)
        self.places = (self.labels, self.labels)

    def batches(self) -> list[list[int]]:
        """Sequences that as many queries ask for, of like length."""
        run, found = self.run, []
        share = SHARE_CPU if run.device.type == "cpu" else SHARE
        budget = max(1, run.batches.batch_tokens // share)
        for count in sorted({len(asking) for asking in self.wanted.values()}, reverse=True):
            some = [i for i in sorted(self.wanted) if len(self.wanted[i]) == count]
            parts = divided([run.batches.lengths[i] for i in some], budget)
            found += [[some[at] for at in part] for part in parts]
        return found

    def loss(self, batch: Batch) -> Tensor:
        """Of every target of a batch [n], nats."""
        assert isinstance(self.run.task, LanguageModelTask)
        logits = self.run.task.logits(batch.inputs, self.run.model)[self.places]
        return F.cross_entropy(logits, self.labels[self.places], reduction="none")

    def begin(self, batch: Batch) -> None:
        """Which queries ask for what."""
        self.labels = targets(batch.inputs)
        self.places = predicting(self.labels)
        asking = [self.wanted[index] for index in batch.indices]
        self.rounds = [
            [(queries[r], b) for b, queries in enumerate(asking) if len(queries) > r]
            for r in range(max(map(len, asking)))
        ]
        self.capture.asked = [self._contracted(pairs, len(asking)) for pairs in self.rounds]

    def _contracted(self, pairs: list[tuple[int, int]], B: int) -> dict[str, Contracted]:
        q, b = torch.tensor(pairs, device=self.run.device).T

        def contracted(layer: Layer, s: Tensor, a: Tensor) -> Tensor:
            own = self.gradients[layer.name].each(itemgetter(q))
            if len(pairs) < B:
                s, a = s[b], a[b]
            return own.by_token(s, a, layer.bias).sum()

        return {layer.name: partial(contracted, layer) for layer in self.layers}

    def add(self, seen: LayerBatch, batch: Batch) -> None:
        """Nothing: the pass finds it."""

    def end(self, batch: Batch) -> None:
        """Keep what the pass has found, without padding."""
        every = []
        for found in self.capture.found:
            target = torch.zeros_like(self.labels, dtype=found.target.dtype)
            target[self.places] = found.target
            # Position t predicts token t + 1.
            every.append(torch.stack([F.pad(target, (1, -1)), found.input.to(target.dtype)]))
        # All at once: the host waits for the device.
        for pairs, sides in zip(self.rounds, torch.stack(every).double().cpu(), strict=True):
            for q, b in pairs:
                index = batch.indices[b]
                by, of = sides[:, b, : self.run.batches.lengths[index]].numpy()
                self.found[q, index] = TokenAttribution(q, index, float(by.sum()), by, of)
