"""A model and a task tried out before a run: on one example, or on two together and alone."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checks import listed
from ..errors import ArgumentError, DataError, Error, ModelError
from ..model.alone import alone
from ..model.identity import forward_state, switches
from ..model.rows import ONE_BY_ONE
from ..model.tasks import LanguageModelTask
from ..model.text_tasks import TextTask

if TYPE_CHECKING:
    from .run import Run

# What was found of a model in its latest state: positions before the text, by task and data.
_checked: "weakref.WeakKeyDictionary[nn.Module, tuple]" = weakref.WeakKeyDictionary()


def tried(run: "Run") -> int:
    """How many positions the model adds before the text.

    Raises:
        DataError, ArgumentError, ModelError: data, task and model do not fit each other.
    """
    if isinstance(run.task, TextTask):
        return _as_text(run, run.task)
    _check_sum(run)
    return 0


@contextmanager
def reading_as(fitted: str | None, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Say which task the factors were fitted with, where data does not fit another that was not
    asked for.
    """
    try:
        yield
    except (DataError, ModelError, ArgumentError) as error:
        if arguments.get("task") is not None or fitted in (None, LanguageModelTask.__qualname__):
            raise
        raise type(error)(f"{error}. The factors were fitted with {fitted}: give task=") from error


def _as_text(run: "Run", task: TextTask) -> int:
    """Of a task of this package. What a model of these weights was found to be once it is in the
    next stage, too.
    """
    batches, model = run.batches, run.model
    if not batches.language:
        also = "labels, one a token" if batches.form.labels else "label, one of the whole"
        causal = " and a causal language model" if isinstance(task, LanguageModelTask) else ""
        raise DataError(
            f"{type(task).__name__} needs examples with 'input_ids' (and {also}){causal}; give "
            "a task of your own for others"
        )
    if not batches.takes("input_ids"):
        raise ArgumentError(f"model is a {type(model).__name__} that takes no 'input_ids'")
    padded, shortest = batches.padded, batches.shortest
    one = batches.load([shortest])
    key = (type(task), str(run.autocast), padded, batches.packed, *sorted(one))
    state, found = _checked.get(model, (None, {}))
    if state != (now := (run.fingerprint, *forward_state(model))):
        found = {}
        _checked[model] = (now, found)
    if key not in found:
        before = switches(model)
        with alone(model), run.settings():
            found[key] = task.check(one, model, padded, batches.packed)
        for name, value in switches(model).items():
            if (then := before.get(name, value)) != value:
                raise ModelError(
                    f"a forward pass of {batches.lengths[shortest]} tokens has changed {name} of "
                    f"the model from {then!r} to {value!r}, and what it computes of all others "
                    "with it. Give the model set as it is to stay"
                )
    positions: int = found[key]
    return positions


def _check_sum(run: "Run") -> None:
    """Refuse a task of a user's own whose loss is not the sum of its examples'."""
    batches = run.batches
    size = batches.batch_tokens if batches.language else batches.batch_size
    if min(batches.size, size) < 2 or run.sharded:
        return
    try:
        with torch.no_grad(), alone(run.model), run.settings():
            one, other, both = (
                run.task.compute_train_loss(
                    batch=batches.load(some), model=run.model, sample=False
                ).item()
                for some in ([0], [1], [0, 1])
            )
    except Error:
        raise
    except Exception:  # whatever it is, the pass will meet it, and say where
        return
    check_is_sum(run, "compute_train_loss", both, [one, other], "the first two examples")


def check_is_sum(
    run: "Run",
    method: str,
    together: float,
    alone: Sequence[float],
    examples: str,
    *,
    mean: bool = False,
) -> None:
    """ArgumentError where what a task says of a batch is not the sum of what it says of each;
    `mean`: only where it is their mean. (A difference that is nearly nothing has no such digits.)
    """
    slack = 0.1 if torch.finfo(run.dtype).eps > 1e-6 else 1e-3
    room, total, many = slack * sum(map(abs, alone)), sum(alone), len(alone)
    near = abs(together - total / many) <= room / many
    if abs(together - total) > room and (near or not mean):
        said = listed([f"{x:.5g}" for x in alone], 4)
        raise ArgumentError(
            f"{type(run.task).__name__}.{method} is {said} of {examples}, and {together:.5g} of "
            f'all in a batch: it has to be their sum (reduction="sum"), or scores depend on the '
            f"batches; or give {ONE_BY_ONE[run.batches.language]}"
        )
