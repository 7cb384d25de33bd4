"""What a task reads of an example beside its tokens: labels, values of the whole, and of how many
sequences it is.

    {"input_ids" [T], "label"}                one label of the whole: a class, classes, numbers
    {"input_ids" [T], "labels" [T]}           one a token: of the next one, or its own
    {"input_ids" [T], "labels" [T], "sides"}  of several sequences, end to end: `sides` are their
                                              lengths, of a pair what is preferred first
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..checks import Whole, is_number, shown
from ..errors import DataError

# (value, where it was read) -> the tensor that it stands for; DataError where it is none.
Reads = Callable[[Any, str], Tensor]


@dataclass(frozen=True)
class Form:
    """What is read of every example.

    labels   of tokens: "next", what stands at t predicts label t + 1; "own", label t; None: none
    classes  how many labels of tokens there are; None: the vocabulary
    values   of an example as a whole, [B,...] in a batch under the same names
    sides    how many sequences an example may be of, the same in all
    pad      the token that pads
    """

    labels: Literal["next", "own"] | None = "next"
    classes: int | None = None
    values: Mapping[str, Reads] = field(default_factory=dict)
    sides: tuple[int, ...] = (1,)
    pad: int = 0

    @property
    def text(self) -> bool:
        """Whether examples are a causal language model's, which whole arrays tell all about."""
        return self.labels == "next" and not self.values and 1 in self.sides

    def targets(self, labels: Sequence[Tensor], ignored: int) -> int:
        """How many losses an example has, of the labels of its sequences; the first token of one
        is predicted by nothing.
        """
        if self.labels is None:
            return 1
        start = 1 if self.labels == "next" else 0
        return sum(int((own[start:] != ignored).sum()) for own in labels)


TEXT = Form()
# Log-probabilities of a pair's sides under the reference model, as TRL calls them.
REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True)
class Class:
    """One of `count` classes: int64 []."""

    count: int

    def __call__(self, value: Any, where: str) -> Tensor:
        """The class's number."""
        value = _plain(value)
        if not Whole(-(2**63)).holds(value):
            raise DataError(
                f"{where} is {shown(value)}, expected one of the model's {self.count} classes by "
                "its number (of a name, config.label2id says which)"
                + _several(value, "multi_label_classification")
            )
        if not 0 <= value < self.count:
            raise DataError(f"{where} is {value}, but the model knows 0 to {self.count - 1}")
        return torch.tensor(int(value))


@dataclass(frozen=True)
class Classes:
    """Which of `count` classes: 0 or 1 of each, fp64 [count]."""

    count: int

    def __call__(self, value: Any, where: str) -> Tensor:
        """All of them."""
        found = _numbers(value, where, self.count, "0 or 1 of every class")
        if not ((found == 0) | (found == 1)).all():
            raise DataError(f"{where} is {shown(_plain(value))}, expected 0 or 1 of every class")
        return found


@dataclass(frozen=True)
class Numbers:
    """`count` numbers, fp64 [count]; one may stand for itself."""

    count: int

    def __call__(self, value: Any, where: str) -> Tensor:
        """All of them."""
        return _numbers(value, where, self.count, "finite numbers")


def number(value: Any, where: str) -> Tensor:
    """A finite number: fp64 []."""
    return _numbers(value, where, 1, "a finite number")[0]


def pair_form(values: Iterable[str] = ()) -> Form:
    """Of pairs with a label a token, and of each so many numbers by name."""
    return Form(sides=(2,), values=dict.fromkeys(values, number))


def anything(value: Any, where: str) -> Tensor:
    """Numbers of whatever shape, where no model says what they mean: fp64."""
    try:
        return torch.as_tensor(_plain(value), dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{where} is {shown(value)}, which is no number ({error})") from error


def _numbers(value: Any, where: str, count: int, expected: str) -> Tensor:
    plain = _plain(value)
    some = plain if isinstance(plain, list) else [plain]
    if len(some) != count or not all(is_number(x) for x in some):
        many = "" if count == 1 else f"{count} values, "
        raise DataError(f"{where} is {shown(plain)}, expected {many}{expected}")
    return torch.tensor([float(x) for x in some], dtype=torch.float64)


def _plain(value: Any) -> Any:
    """A value without its tensor or array."""
    return value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value


def _several(value: Any, kind: str) -> str:
    """What to say where there is a list."""
    return f'; several labels are of problem_type="{kind}"' if isinstance(value, list) else ""


# Of texts with a label or a number, and of words with a label each, whatever the model knows.
LABELLED = Form(None, values={"label": anything})
RATED = Form(None, values={"label": Numbers(1)})
TAGGED = Form("own", classes=1 << 62)
