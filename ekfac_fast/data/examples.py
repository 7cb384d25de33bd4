"""One example of a language model, checked.

It is a mapping with `input_ids` [T] int, optional `attention_mask` [T] (0: padding), optional
`labels` [T] (Hugging Face: unshifted, -100 ignored, absent = input_ids) and optional `id`. Further
tensors, arrays or lists (`position_ids`, `token_type_ids`) go to the model as they are. A data set
is anything with `__len__` and `__getitem__` that gives such mappings. `forms` says what else a task
may read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Subset

from ..checks import shown
from ..errors import DataError
from .forms import TEXT, Form

IGNORED = -100


class Indexable(Protocol):
    """A list, a torch data set, a Hugging Face data set.

    One that holds whole arrays may have `survey` besides (`Surveyed`).
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class Corpus(Indexable, Protocol):
    """Examples that know where they were read, and what else their records hold: `Tokens`,
    `MappedTokens`.
    """

    def source(self, index: int, /) -> str:
        """Where an example was read."""
        ...

    def column(self, name: str, /) -> Sequence[Any]:
        """What the record of every example has there."""
        ...

    def record(self, index: int, /) -> Mapping[str, Any] | None:
        """What an example was made of; None where it was token ids already."""
        ...


@dataclass(frozen=True, eq=False)
class Survey:
    """What is to be known of all examples before any is passed.

    lengths      [N] int64, tokens that are left of every example
    fingerprint  covers every value
    truncated    examples that lose their end; `longest`, the first of them
    `without_targets` have nothing left to predict; some are `packed` of several documents;
    `widths` [N] are tokens with padding, where examples are of several sequences.
    """

    lengths: NDArray[np.int64]
    fingerprint: str
    truncated: int = 0
    longest: int | None = None
    without_targets: int = 0
    packed: bool = False
    widths: NDArray[np.int64] | None = None


class Surveyed(Indexable, Protocol):
    """A data set of whole arrays, looked at many examples at a time: millions in seconds.

    Both methods give None where examples have to be read one by one.
    """

    def survey(self, size: int, vocab_size: int | None, context: int | None) -> Survey | None:
        """What `example` would find of the first `size` examples, and raise for the first of them
        that is wrong.
        """
        ...

    def blocks(self, size: int) -> Iterator[Any] | None:
        """The first `size` examples as `survey.Block`s."""
        ...


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence without padding: input_ids [T], labels [T], int64; `dropped` tokens were cut.

    `id` is part of the key that samples its labels: the record's "id" where that is an integer, so
    that labels stay the same in another order or a larger data set; else its index. `fields` are
    further values [T] for the model. One of several sequences has them end to end, of these
    lengths `sides`; `values` are of the whole, as a `Form` reads them.
    """

    input_ids: Tensor
    labels: Tensor
    id: int
    dropped: int = 0
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)
    sides: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def widths(self) -> tuple[int, ...]:
        """Tokens of every sequence that it is of."""
        return self.sides or (len(self),)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """What is said of its tokens [T], by sequence."""
        return x.split(self.widths)

    @property
    def targets(self) -> int:
        """How many tokens a language model predicts of it."""
        return TEXT.targets(self.split(self.labels), IGNORED)

    @property
    def packed(self) -> bool:
        """Whether positions start again: several documents in one sequence."""
        at = self.fields.get("position_ids")
        return at is not None and bool((at[1:] <= at[:-1]).any())


def example(
    dataset: Indexable,
    index: int,
    vocab_size: int | None = None,
    context: int | None = None,
    form: Form = TEXT,
) -> Example:
    """Example `index`, checked and without its padding; DataError names it.

    Longer than `context` tokens: its end is cut off, that of each of several sequences, and counted
    in `dropped`.
    """
    record, where = dataset[index], named(dataset, index)
    if not isinstance(record, Mapping) or "input_ids" not in record:
        raise DataError(f"{where}: is a {type(record).__name__}, not a mapping with 'input_ids'")
    ids = _integers(record["input_ids"], f"{where}: input_ids")
    sides = _sides(record, len(ids), form, where)
    taken, told = _values(record, form, where)
    beside = {
        name: _beside(ids, value, f"{where}: {name}")
        for name, value in record.items()
        if name not in ("input_ids", "id", "sides", *taken) and _is_sequence(name, value, where)
    }
    labels, mask = beside.pop("labels", None), beside.pop("attention_mask", None)
    if mask is not None and not np.isin(mask, (0, 1)).all():
        raise DataError(f"{where}: attention_mask holds other values than 0 (padding) and 1")
    if labels is None:
        # Where positions start again, another document begins: nothing before predicts it.
        labels = ids.copy()
        if "position_ids" in beside:
            labels[1:][np.diff(beside["position_ids"]) <= 0] = IGNORED
    real = np.arange(len(ids)) if mask is None else np.flatnonzero(mask)
    if len(real) == 0:
        raise DataError(f"{where}: has no tokens")
    start, stop = int(real[0]), int(real[-1]) + 1
    if mask is not None and stop - start > len(real):
        hole = int(np.flatnonzero(mask[start:stop] == 0)[0]) + start
        raise DataError(f"{where}: attention_mask is 0 at position {hole}, between real tokens")
    if sides and len(real) < len(ids):
        raise DataError(f"{where}: padding in a pair; give the tokens of its sides alone")
    widths = [min(n, context) if context else n for n in sides or (stop - start,)]
    ends = np.cumsum([start, *sides])
    kept = np.concatenate([np.arange(a, a + n) for a, n in zip(ends, widths, strict=False)])
    dropped = stop - start - len(kept)
    _within(ids, kept, vocab_size, f"{where}: token id")
    if form.classes is None:
        _within(np.where(labels == IGNORED, 0, labels), kept, vocab_size, f"{where}: label")
    else:
        _known(labels, kept, form.classes, where)
    own = record.get("id")
    if isinstance(own, Integral) and not -(2**63) <= int(own) < 2**63:
        raise DataError(f"{where}: id {own} does not fit 64 bits; leave it out, or number anew")
    found = Example(
        torch.tensor(ids[kept]),
        torch.tensor(labels[kept]),
        int(own) if isinstance(own, Integral) and not isinstance(own, bool) else index,
        dropped,
        {name: torch.tensor(values[kept]) for name, values in beside.items()},
        told,
        tuple(widths) if sides else (),
    )
    if len(found.sides) == 2 and torch.equal(*found.split(found.input_ids)):
        raise DataError(f"{where}: both sides are the same {found.sides[0]} tokens")
    return found


def named(dataset: Indexable, index: int) -> str:
    """An example in a message: by file and line where its data set knows them."""
    held: Any = dataset
    tell, at = getattr(held, "source", None), index
    while not callable(tell) and isinstance(held, Subset):
        at, held = int(held.indices[at]), held.dataset
        tell = getattr(held, "source", None)
    return f"example {index}" + (f" ({tell(at)})" if callable(tell) else "")


def tokenized_by(dataset: Any) -> str | None:
    """The fingerprint of the tokenizer that a data set is from, where that is known."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return getattr(dataset, "tokenizer_fingerprint", None)


def _values(record: Mapping, form: Form, where: str) -> tuple[list[str], dict[str, Tensor]]:
    """What a form reads of the whole, and under which names it was found: transformers' own data
    sets have `labels` where others have `label`.
    """
    found, taken = {}, []
    for name, read in form.values.items():
        named = "labels" if name == "label" and name not in record else name
        if record.get(named) is None:
            raise DataError(f"{where}: has no {name!r}; it has {', '.join(map(repr, record))}")
        found[name] = read(record[named], f"{where}: {named}")
        taken.append(named)
    return taken, found


def _sides(record: Mapping, T: int, form: Form, where: str) -> tuple[int, ...]:
    """Lengths of an example's sequences; none where it is one."""
    given = record.get("sides")
    lengths = () if given is None else tuple(_integers(given, f"{where}: sides").tolist())
    if lengths and (min(lengths) < 1 or sum(lengths) != T):
        raise DataError(f"{where}: sides are {list(lengths)}, which are not the lengths of {T} ids")
    if (len(lengths) or 1) not in form.sides:
        what = "a pair" if len(lengths) == 2 else f"{len(lengths) or 1} sequence"
        wanted = " or ".join("a pair" if n == 2 else "one sequence" for n in form.sides)
        raise DataError(f"{where}: is {what}, expected {wanted}")
    return lengths


def _is_sequence(name: str, value: Any, where: str) -> bool:
    """Whether a field is one number a token; text and single values are about the example."""
    if isinstance(value, Tensor | np.ndarray):
        found = value.ndim > 0
    else:
        found = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if name in ("labels", "attention_mask", "position_ids") and not found and value is not None:
        raise DataError(f"{where}: {name} is {shown(value)}, not one number a token")
    return found


def _integers(values: Any, what: str) -> np.ndarray:
    """values as int64 [T]."""
    try:
        values = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    except ValueError as error:  # rows of different lengths
        raise DataError(f"{what} must be integers [T] ({error})") from error
    if values.ndim != 1 or (values.dtype.kind not in "iub" and len(values)):
        raise DataError(f"{what} must be integers [T], not {values.dtype} {list(values.shape)}")
    return values.astype(np.int64)


def _beside(ids: np.ndarray, values: Any, what: str) -> np.ndarray:
    """Values, one for each token."""
    kind, shape = getattr(values, "dtype", None), getattr(values, "shape", ())
    ours = what.rpartition(" ")[2] in ("labels", "attention_mask", "position_ids")
    if not ours and (getattr(kind, "is_floating_point", False) or len(shape) > 1):
        raise DataError(
            f"{what} is {kind} {list(shape)}: beside input_ids stands one integer a token. "
            "Examples that hold more (pixels, sound) are for a task of your own: put each in a "
            "mapping, like {'inputs': example}, which the task opens"
        )
    values = _integers(values, what)
    if len(values) != len(ids):
        raise DataError(f"{what} has {len(values)} positions, input_ids has {len(ids)}")
    return values


def _within(ids: np.ndarray, kept: np.ndarray, vocab_size: int | None, what: str) -> None:
    """Raise DataError at the first id that is negative or not in the vocabulary."""
    some = ids[kept]
    outside = np.flatnonzero((some < 0) | (some >= vocab_size if vocab_size else False))
    if len(outside):
        at = int(kept[outside[0]])
        raise DataError(
            f"{what} {ids[at]} at position {at} is outside the vocabulary"
            + (f" of {vocab_size}. Is this the model's own tokenizer?" if vocab_size else "")
        )


def _known(labels: np.ndarray, kept: np.ndarray, classes: int, where: str) -> None:
    """Raise DataError at the first label of a token that is none of the model's."""
    some = labels[kept]
    wrong = np.flatnonzero((some != IGNORED) & ((some < 0) | (some >= classes)))
    if len(wrong):
        at = int(kept[wrong[0]])
        raise DataError(
            f"{where}: label {labels[at]} at position {at}, but the model knows 0 to {classes - 1} "
            f"({IGNORED}: none)"
        )
