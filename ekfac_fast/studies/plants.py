"""Planted copies: how the share of influence grows with the times that a sentence was read."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import is_number, path, require, whole
from ..data.batches import Batches
from ..data.examples import Corpus, Indexable
from ..errors import ArgumentError, DataError, NotFiniteError
from ..model.tasks import LanguageModelTask
from ..stages.fit import fit
from ..stages.run import RunArguments
from ..validation.measure import measurements
from .lines import COLOURS, SHIPPED, drawing, write_result
from .recall import read_passages, tokenized
from .scored import asked, per_token

FILE = SHIPPED / "planted.jsonl"
COPIES = (1, 2, 5, 10, 20, 50)
BATCH = 8


@dataclass(frozen=True)
class Sentence:
    """One sentence that stands `copies` times among `sequences`.

    before, after   log p of its completion, nats a token, by the model before and after training
    share           of the copies in the sum of all positive influence on the completion
    ahead           sequences, none of them a copy, that have more influence than the least of them
    """

    sentence: str
    copies: int
    sequences: int
    before: float
    after: float
    share: float
    ahead: int


@dataclass(frozen=True)
class Plants:
    """From the fewest copies to the most, as they were given."""

    sentences: tuple[Sentence, ...]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """For JSON lines."""
        return [*map(asdict, self.sentences)]

    def draw(self, file: Path) -> None:
        """Share of influence, and log p, against copies."""
        with drawing(file, 7.0, 3.0) as figure:
            left, right = figure.subplots(1, 2)
            x = [one.copies for one in self.sentences]
            left.plot(x, [one.share for one in self.sentences], "o-", color=COLOURS[0],
                      label="influence")  # fmt: skip
            left.plot(x, [one.copies / one.sequences for one in self.sentences], "--",
                      color=COLOURS[1], label="sequences")  # fmt: skip
            left.set_ylabel("share of the copies")
            for name, colour in (("before", COLOURS[1]), ("after", COLOURS[4])):
                values = [getattr(one, name) for one in self.sentences]
                right.plot(x, values, "o-", color=colour, label=f"{name} fine-tuning")
            right.set_ylabel("log p of the completion, nats a token")
            for panel in (left, right):
                panel.set_xscale("log")
                panel.set_xlabel("copies")
                panel.legend()


def planted(
    model: nn.Module,
    tokenizer: Any,
    data: Corpus,
    *,
    out: str | Path,
    file: str | Path = FILE,
    copies: Sequence[int] = COPIES,
    examples: int = 100,
    epochs: int = 3,
    rate: float = 1e-4,
    seed: int = 0,
    layers: str | list[str] | None = None,
    rank: int | None = 32,
    damping: float | str | None = None,
    **arguments: Unpack[RunArguments],
) -> Plants:
    """Fine-tune a copy of the model on `examples` of the corpus and on sentences of a file, each of
    them so often, and hold all that it read against each sentence's completion.

    `out` gets factors, queries and scores (a rerun trains again and continues), `planted.jsonl` and
    `planted.svg`. The model itself is left as it is.

    Args:
        model, tokenizer, data: what to begin with.
        file: as of `memorisation`; a sentence a number of copies.
        copies: of each sentence.
        epochs, rate, seed: of AdamW, in batches of 8, on all parameters that train.
        layers: that are tracked.
        rank, damping, arguments: see `prepare_queries`.

    Raises:
        ArgumentError: no parameter trains.
        DataError: the file has fewer sentences than there are numbers, or the corpus fewer
            sequences.
        NotFiniteError: the training diverged.
    """
    out, sentences = path("out", out), read_passages(file)
    require(len(copies) > 0, "copies", copies, "at least one number")
    for count in copies:
        whole("copies", count)
    whole("epochs", epochs)
    whole("seed", seed, 0)
    require(is_number(rate) and rate > 0, "rate", rate, "a number above 0")
    if len(sentences) < len(copies):
        raise DataError(f"{file}: {len(sentences)} sentences for {len(copies)} numbers of copies")
    if len(data) < whole("examples", examples):
        raise DataError(f"the corpus has {len(data)} sequences, not {examples}")
    sentences = sentences[: len(copies)]
    questions, texts = tokenized(sentences, tokenizer)
    rows = [data[i] for i in range(examples)]
    for at, count in enumerate(copies):
        rows += [texts[at]] * count
    before = _log_p(model, questions)
    tuned = deepcopy(model)
    if not any(weight.requires_grad for weight in tuned.parameters()):
        raise ArgumentError("no parameter of the model requires a gradient: none can be trained")
    _train(tuned, rows, epochs, rate, seed)
    factors = fit(tuned, rows, out=out / "factors", layers=layers, **arguments)
    prepared, found = asked(
        tuned, factors, questions, rows, out, rank=rank, damping=damping, **arguments
    )  # fmt: skip
    result = _shares(found.total, copies, examples, sentences, before, per_token(prepared))
    write_result(out, "planted", result)
    return result


def _log_p(model: nn.Module, questions: Indexable) -> list[float]:
    """log p of completions, nats a token."""
    found = -measurements(model, questions)
    counts = [int((questions[q]["labels"] >= 0).sum()) for q in range(len(questions))]
    return [value / count for value, count in zip(found.tolist(), counts, strict=True)]


def _train(
    model: nn.Module, rows: Sequence[dict[str, Tensor]], epochs: int, rate: float, seed: int
) -> None:
    """AdamW on the mean loss of a token, in evaluation mode: nothing is dropped out."""
    batches, task = Batches(rows, model), LanguageModelTask()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for some in torch.randperm(len(rows), generator=generator).split(BATCH):
            batch = batches.load(some.tolist())
            tokens = (batch["labels"][:, 1:] >= 0).sum()
            loss = task.compute_train_loss(batch, model) / tokens
            if not bool(loss.isfinite()):
                raise NotFiniteError(
                    f"the training loss is {loss.item()}: the training diverged. Give a smaller "
                    f"rate than {rate}"
                )
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()


def _shares(
    total: np.ndarray,
    copies: Sequence[int],
    examples: int,
    sentences: Sequence[dict[str, Any]],
    before: Sequence[float],
    after: Sequence[float],
) -> Plants:
    """Scores [Q,N] of all that was read: `examples` of the corpus, then the copies in order."""
    found, start = [], examples
    for at, (count, line) in enumerate(zip(copies, sentences, strict=True)):
        own = np.zeros(total.shape[1], dtype=bool)
        own[start : start + count] = True
        start += count
        positive = np.maximum(total[at], 0)
        share = float(positive[own].sum() / positive.sum()) if positive.any() else 0.0
        ahead = int((total[at][~own] > total[at][own].min()).sum())
        found.append(
            Sentence(
                str(line["text"]), count, len(own), before[at], after[at], share, ahead
            )
        )  # fmt: skip
    return Plants(tuple(found))
