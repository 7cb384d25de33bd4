"""Two examples in one order and in the other: how a probe learns whose rows are whose."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..data.collate import collate
from ..data.examples import IGNORED

if TYPE_CHECKING:
    from .run import Run


def swapped(run: "Run") -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The training loss of a run's two examples, in one order and in the other.

    With an odd number of positions, so that no axis but that of the sequences has two.
    """
    pair = _two_that_differ(run)
    return partial(_forward, run, pair), partial(_forward, run, pair[::-1])


def one_alone(run: "Run", indices: Sequence[int], number: int) -> Tensor:
    """The training loss of one example of a batch."""
    return _forward(run, [indices[number]])


def _two_that_differ(run: "Run") -> list[int]:
    batches = run.batches
    order = batches.lengths.argsort(kind="stable")
    first = int(order[0])
    if not batches.language:
        return [first, int(order[-1])]
    # Of another length if there is one: a model may order its sequences by that.
    longer = int(np.searchsorted(batches.lengths[order], batches.lengths[first], side="right"))
    if longer < len(order):
        return [first, int(order[longer])]
    ids = batches.example(first).input_ids.tolist()
    rest = map(int, order[1:])
    other = next((i for i in rest if batches.example(i).input_ids.tolist() != ids), first)
    return [first, other]


def _forward(run: "Run", indices: list[int]) -> Tensor:
    if run.batches.language:
        examples = [run.batches.example(i) for i in indices]
        even = collate(examples, run.batches.form.pad)
        # An odd number of positions: cut where there are enough, else padded.
        T = even["input_ids"].shape[1]
        change = 0 if T % 2 else 1 if T == 2 else -1
        values = {"labels": IGNORED, "input_ids": run.batches.form.pad}
        padded = {
            name: x
            if name in examples[0].values
            else torch.nn.functional.pad(x, (0, change), value=values.get(name, 0))
            for name, x in even.items()
        }
        padded["index"] = torch.tensor([x.id for x in examples])
        inputs = {name: x.to(run.device) for name, x in padded.items()}
    else:
        inputs = run.batches.load(indices)
    with run.settings():
        return run.task.compute_train_loss(batch=inputs, model=run.model, sample=False)
