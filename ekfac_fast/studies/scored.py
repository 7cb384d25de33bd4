"""A scan that keeps every layer's share: questions prepared once, sequences held against them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..checks import path
from ..data.examples import Corpus, Indexable, tokenized_by
from ..data.tokens import Tokens, tokenize
from ..model.layer_batch import LayerBatch
from ..model.layers import Layer
from ..stages.consumer import Batch, Consumer
from ..stages.factors import Factors
from ..stages.parts import Tally, add_scores, check_scores
from ..stages.preparation import prepare_queries
from ..stages.processes import Processes
from ..stages.queries import Queries
from ..stages.run import Run, RunArguments, Stage, accumulator
from ..stages.scan import on_device
from ..store.division import Division
from ..store.folder import Pieces

KIND = "scores by layer"
# Tokens of a study's own texts, at most.
CONTEXT = 512


@dataclass(frozen=True)
class LayerScores:
    """Raw scores by layer [L,Q,N], layers in the order of the forward pass; positive raises the
    completion's log-probability. They sum to what `score` finds.
    """

    layers: tuple[str, ...]
    values: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """[Q,N]."""
        return self.values.sum(0)

    def part(self, queries: slice, sequences: slice) -> "LayerScores":
        """Of some queries and sequences."""
        return LayerScores(self.layers, self.values[:, queries, sequences])


def asked(
    model: nn.Module,
    factors: Factors,
    questions: Indexable,
    data: Indexable,
    out: str | Path,
    *,
    rank: int | None = 32,
    damping: float | str | None = None,
    **arguments: Unpack[RunArguments],
) -> tuple[Queries, LayerScores]:
    """Prepare questions and scan `data` for them, in the folder `out`, which a rerun continues."""
    out = path("out", out)
    prepared = prepare_queries(
        model, factors, questions, rank=rank, damping=damping, out=out / "queries", **arguments
    )
    return prepared, layer_scores(model, prepared, data, out=out / "scores", **arguments)


@torch.inference_mode(False)
def layer_scores(
    model: nn.Module,
    queries: Queries,
    data: Indexable,
    *,
    out: str | Path,
    **arguments: Unpack[RunArguments],
) -> LayerScores:
    """Score every sequence against every query, layer by layer, into the folder `out`.

    Arguments and errors as those of `score`.
    """
    run = Run(model, data, arguments, processes=Processes.here())
    layers = [x.layer for x in queries.layers]
    names = [layer.name for layer in layers]
    facts = run.facts() | {"queries": queries.identity, "layers": names}
    queries.check_run(facts, "layer_scores")
    with run.opened(path("out", out), KIND, facts) as store:
        batches, pieces = run.planned(store), store.pieces()
        if not store.finished:
            consumer = _ByLayer(run, queries, layers, pieces)
            done = run.processes.from_first(pieces.done)
            run.each(Stage.SCAN, layers, batches, consumer, done=done)
            run.processes.meet()
            store.finish(seconds=run.seconds)
        parts = [pieces.read(number)["scores"] for number in range(len(batches))]
    values = torch.cat(parts, 2).double().numpy()
    return LayerScores(tuple(names), values[:, :, Division.of(batches).places])


class _ByLayer(Consumer):
    """s [L,Q,B] of a batch: a piece each."""

    def __init__(self, run: Run, queries: Queries, layers: Sequence[Layer], pieces: Pieces) -> None:
        self.run, self.pieces, self.gradients = run, pieces, on_device(run, queries)
        dtype = accumulator(run.model)
        self.tallies = {layer.name: Tally(len(queries), dtype) for layer in layers}

    def begin(self, batch: Batch) -> None:
        """No scores yet."""
        for tally in self.tallies.values():
            tally.begin()

    def add(self, seen: LayerBatch, batch: Batch) -> None:
        """One layer's own scores."""
        name = seen.layer.name
        s = self.tallies[name].on(seen.g.device, len(batch.indices))
        add_scores(s, self.gradients[name], seen)

    def end(self, batch: Batch) -> None:
        """Keep the batch."""
        s = torch.stack([tally.total() for tally in self.tallies.values()])
        check_scores(s, self.run.batches.dataset, batch.indices)
        self.pieces.write(batch.number, {"scores": s})


@dataclass(frozen=True, eq=False)
class Joined(Dataset):
    """Sequences of several corpora, of one tokenizer, one after the other."""

    parts: tuple[Corpus, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        part, place = self._at(index)
        return part[place]

    def source(self, index: int) -> str:
        """Where a sequence was read."""
        part, place = self._at(index)
        return part.source(place)

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Of the tokenizer of all parts."""
        return tokenized_by(self.parts[0])

    def _at(self, index: int) -> tuple[Corpus, int]:
        place = range(len(self))[index]
        for part in self.parts[:-1]:
            if place < len(part):
                return part, place
            place -= len(part)
        return self.parts[-1], place


def uncut(lines: Sequence[dict[str, Any]], tokenizer: Any) -> Tokens:
    """A study's own questions or texts; DataError names one that is too long to be whole."""
    return tokenize(lines, tokenizer, CONTEXT, on_long="refuse")


def told(records: Sequence[dict[str, Any]]) -> list[str]:
    """Names of questions, as they were given or by their places."""
    return [str(x.get("name") or f"question {n}") for n, x in enumerate(records, 1)]


def per_token(prepared: Queries) -> list[float]:
    """log p of every completion after its prompt, nats a token."""
    pairs = zip(prepared.measurements.tolist(), prepared.examples, strict=True)
    return [-value / int((labels >= 0).sum()) for value, (_, labels) in pairs]
