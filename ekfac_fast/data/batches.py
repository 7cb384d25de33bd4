"""Any indexable data set -> checked examples -> batches on the model's device.

What is no example of a language model (`examples`) is batched by torch's default collate.
"""

import inspect
import warnings
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils.data import default_collate

from ..checks import choice, sized, whole
from ..errors import DataError, Notice
from ..store.division import Division
from ..store.fingerprint import Digest
from .choices import OnLongExample
from .collate import collate, collate_fields, moved
from .examples import IGNORED, Example, Indexable, Survey, example, named
from .forms import LABELLED, RATED, REFERENCES, TAGGED, TEXT, Form, pair_form

# On a CPU activations and logits of more leave the caches: slower, and three times the memory.
BATCH_TOKENS = {"cpu": 1024}
DEVICE_BATCH_TOKENS = 4096
BATCH_SIZE = 16


def default_tokens(device: torch.device) -> int:
    """`batch_tokens` where none are given."""
    return BATCH_TOKENS.get(device.type, DEVICE_BATCH_TOKENS)


def divided(lengths: ArrayLike, batch_tokens: int) -> Division:
    """Indices of the batches: (longest length) x (size) <= batch_tokens, or one example alone.

    From the longest to the shortest, ties in order: little padding, and what does not fit in
    memory shows in the first batch. Every index once; a pure function.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    longest = int(lengths.max(initial=0))
    # Of two bytes numpy sorts in linear time.
    behind = (longest - lengths).astype(np.uint16 if longest < 1 << 16 else np.int64)
    order = behind.argsort(kind="stable")
    below, start = behind[order], 0
    starts = [order[:0]]
    for end in [*(np.flatnonzero(np.diff(below)) + 1).tolist(), len(order)]:
        if start < end:
            # Batches that begin with one of these, which are equally long.
            size = max(1, batch_tokens // max(1, longest - int(below[end - 1])))
            starts.append(np.arange(start, end, size))
            start += size * len(starts[-1])
    return Division(order, np.diff(np.concatenate(starts), append=len(order)))


class Batches:
    """`dataset` seen by `model`: which examples form a batch, and the batch itself.

    Language-model examples are batched by `batch_tokens`, padded on the right and given `index`
    [B], the examples' ids. Of one longer than the model has positions, the end is cut off
    (`truncated` of them; `without_targets` have nothing left to predict), or it is refused. Some
    may hold several documents (`packed`).
    Mappings for a model with an encoder and a decoder are batched by `batch_size`, every field
    padded to its own longest. Anything else is batched by `batch_size` through torch's default
    collate. All of the data is read once here, by whole arrays where the data set has a `survey`
    (`examples.Surveyed`): what is wrong with it shows before any pass, and `fingerprint` covers
    every value. `lengths` [N] int64: tokens of every example. `form` says what else is read of
    examples; those of several sequences (`sides`) count as so many of their longest. They go to
    `device`; None: to that of the model's first weight.

    Raises:
        DataError: the data set is empty or not indexable, an example is malformed or too long.
        ArgumentError: a budget is not positive.
    """

    def __init__(
        self,
        dataset: Indexable,
        model: nn.Module,
        *,
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        max_examples: int | None = None,
        on_long: OnLongExample = "truncate",
        form: Form = TEXT,
        device: torch.device | None = None,
    ):
        self.dataset, self.size = dataset, _size(dataset, max_examples)
        self.form, self.sides = form, 1
        self.device = next(model.parameters()).device if device is None else device
        budget = default_tokens(self.device)
        self.batch_tokens = _positive("batch_tokens", batch_tokens, budget)
        self.batch_size = _positive("batch_size", batch_size, BATCH_SIZE)
        choice("on_long", on_long, get_args(OnLongExample))
        inner = getattr(model, "module", model)  # DataParallel and its kind
        self.context, self.vocabulary = positions(inner), vocabulary(inner)
        self._takes = inspect.signature(inner.forward).parameters
        first = dataset[0]
        mapping = isinstance(first, Mapping) and "input_ids" in first
        config = getattr(inner, "config", None)
        own = bool(form.values) or form.labels != "next"
        self.two_sided = mapping and not own and bool(getattr(config, "is_encoder_decoder", False))
        self.padding = pad_token(inner) or 0
        self.language = mapping if own else not self.two_sided and is_text(first)
        found = self._survey(on_long) if self.language else _unsurveyed(dataset, self.size)
        self.lengths, self._fingerprint = found.lengths, found.fingerprint
        self.truncated, self.without_targets = found.truncated, found.without_targets
        self.packed = found.packed
        # Tokens of an example in a batch of its own, with padding.
        self.widths = found.lengths if found.widths is None else found.widths

    def _survey(self, on_long: OnLongExample) -> Survey:
        """Check every example."""
        found = None
        if self.form.text:
            found = _by_arrays(self.dataset, self.size, self.vocabulary, self.context)
        found = found or self._one_by_one()
        if found.longest is not None and on_long == "refuse":
            one = self.example(found.longest)
            raise DataError(
                f"{named(self.dataset, found.longest)}: {len(one) + one.dropped} tokens, the model "
                f"has {self.context} positions: split it, or let its end be cut off"
            )
        if on_long == "truncate" and (found.truncated or found.without_targets):
            warnings.warn(
                f"of {self.size} examples {found.truncated} are longer than the model's "
                f"{self.context} positions and lose their end, {found.without_targets} have "
                "nothing to predict and no influence",
                Notice,
                stacklevel=4,
            )
        return found

    def _one_by_one(self) -> Survey:
        """Every example read."""
        lengths, widths, digest = array("q"), array("q"), Digest()
        truncated = without_targets = 0
        longest, packed = None, False
        for index in range(self.size):
            one = self.example(index)
            if not index:
                self.sides = len(one.widths)
            if len(one.widths) != self.sides:
                raise DataError(
                    f"{named(self.dataset, index)}: made of {len(one.widths)} sequence(s), the "
                    f"first example of {self.sides}: give pairs and others as data of their own"
                )
            if refused := [name for name in one.fields if name not in self._takes]:
                raise DataError(
                    f"{named(self.dataset, index)}: the model takes no {refused[0]!r}; leave it "
                    "out of the examples"
                )
            if one.dropped and longest is None:
                longest = index
            truncated += one.dropped > 0
            without_targets += self.form.targets(one.split(one.labels), IGNORED) == 0
            packed |= one.packed
            lengths.append(len(one))
            widths.append(self.sides * max(one.widths))
            # What is cut off depends on the model, which has a name of its own.
            uncut = example(self.dataset, index, form=self.form) if one.dropped else one
            digest.add(_content(uncut))
        counts, wide = (np.frombuffer(x, np.int64) for x in (lengths, widths))
        return Survey(counts, digest.hex(), truncated, longest, without_targets, packed, wide)

    def divided(self, among: Sequence[int] | None = None) -> Division:
        """Indices of every batch, of all examples or of some; by lengths and budget alone."""
        if self.language and among is None:
            return divided(self.widths, self.batch_tokens)
        every = np.asarray(range(self.size) if among is None else among, dtype=np.int64)
        if self.language:
            found = divided(self.widths[every], self.batch_tokens)
            return Division(every[found.indices], found.sizes)
        starts = np.arange(0, len(every), self.batch_size)
        return Division(every, np.diff(starts, append=len(every)))

    @property
    def padded(self) -> int:
        """Tokens of the longest sequence that others are padded to in `divided`, 0 without one."""
        plan = self.divided()
        found = self.widths[plan.indices]
        first, last = found[plan.starts], found[plan.ends - 1]
        uneven = first[first != last].max(initial=0)
        widest = max(uneven, self.widths[self.widths != self.lengths].max(initial=0))
        return int(widest) // self.sides

    @property
    def shortest(self) -> int:
        """The first of the shortest examples, of those of two tokens or more where there are."""
        longest = self.lengths.max()
        return int(np.where(self.lengths < 2, longest + 1, self.lengths).argmin())

    def tokens(self, indices: ArrayLike) -> int:
        """Real tokens (or examples, where there are none) of a batch."""
        return int(self.lengths[np.asarray(indices, dtype=np.int64)].sum())

    def widths_of(self, index: int) -> tuple[int, ...]:
        """Real tokens of every sequence that an example is of."""
        if self.sides == 1:
            return (int(self.lengths[index]),)
        return self.example(index).widths

    def load(self, indices: Sequence[int]) -> Any:
        """The batch of these examples, on the model's device."""
        return moved(self.gathered(indices), self.device)

    def gathered(self, indices: Sequence[int]) -> Any:
        """The batch of these examples, where they are read."""
        if self.language:
            examples = [self.example(i) for i in indices]
            return collate(examples, self.form.pad) | {
                "index": torch.tensor([x.id for x in examples])
            }
        records = [self.dataset[i] for i in indices]
        if not self.two_sided:
            return default_collate(records)
        return collate_fields(records, indices, self.padding)

    def example(self, index: int) -> Example:
        """Example `index` of a language-model data set, checked against the model."""
        return example(self.dataset, index, self.vocabulary, self.context, self.form)

    def takes(self, name: str) -> bool:
        """Whether the model's forward has an argument of that name, or takes any."""
        every = any(p.kind is p.VAR_KEYWORD for p in self._takes.values())
        return every or name in self._takes

    def fingerprint(self) -> str:
        """Identifies the data: every value of every example, of those that are cut, too."""
        return self._fingerprint


def data_fingerprint(dataset: Indexable, form: Form | None = None) -> str:
    """`Batches.fingerprint` of a data set, for any model.

    form: that of the task; None for what the data set says of itself.
    """
    own: Form = getattr(dataset, "form", TEXT)
    form = own if form is None else form
    if form == TEXT and not is_text(dataset[0]):
        return _unsurveyed(dataset, len(dataset)).fingerprint
    if form.text and (found := _by_arrays(dataset, len(dataset))):
        return found.fingerprint
    digest = Digest()
    for index in range(len(dataset)):
        digest.add(_content(example(dataset, index, form=form)))
    return digest.hex()


def fingerprint_like(dataset: Indexable, then: str) -> str:
    """`then`, if it is `Batches.fingerprint` of a data set as any kind of task reads it: as it says
    itself, as text, with a label of the whole, one a token, or of two sides; else the first.
    """
    own: Form = getattr(dataset, "form", TEXT)
    kinds = (TEXT, LABELLED, RATED, TAGGED, pair_form(), pair_form(REFERENCES))
    first = None
    for form in (own, *(x for x in kinds if x != own)):
        try:
            found = data_fingerprint(dataset, form)
        except DataError:
            continue  # it has not what such a task reads
        if found == then:
            return found
        first = first or found
    return first or "none"


def _by_arrays(
    dataset: Any, size: int, vocab_size: int | None = None, context: int | None = None
) -> Survey | None:
    """The survey of a data set that makes its own."""
    find = getattr(dataset, "survey", None)
    return find(size, vocab_size, context) if callable(find) else None


def _unsurveyed(dataset: Indexable, size: int) -> Survey:
    """Of examples that are not of a causal language model: each counts as one token."""
    digest = Digest()
    for index in range(size):
        digest.add(_plain(dataset[index]))
    return Survey(np.ones(size, dtype=np.int64), digest.hex())


def is_text(record: Any) -> bool:
    """Whether a record is an example of a causal language model.

    Another shape of labels (classes of a whole sequence) is of a task of the user's own.
    """
    if not isinstance(record, Mapping) or "input_ids" not in record:
        return False
    labels = record.get("labels")
    return labels is None or (np.ndim(labels) == 1 and len(labels) == len(record["input_ids"]))


def _content(one: Example) -> tuple[Any, ...]:
    found = one.input_ids, one.labels, one.id, one.fields
    if not (one.sides or one.values):
        return found
    return *found, one.sides, {name: x.double() for name, x in one.values.items()}


def text_config(of: Any) -> Any:
    """The configuration of a Hugging Face model, or of a part of one, as far as it is about text;
    None where it has none.
    """
    config: Any = getattr(of, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def pad_token(model: nn.Module) -> int | None:
    """The token that a model takes for padding, where its configuration says so."""
    return getattr(text_config(model), "pad_token_id", None)


def positions(model: nn.Module) -> int | None:
    """Tokens that a Hugging Face model has positions for; None where it does not say."""
    config = text_config(model)
    limit = getattr(config, "max_position_embeddings", None)
    limit = None if limit is None or limit < 1 else limit  # XLNet says -1: no limit
    table = next(
        (m for n, m in model.named_modules() if n.endswith("embeddings.position_embeddings")), None
    )
    # RoBERTa and its kin count positions from the padding index.
    offset = getattr(table, "padding_idx", None)
    return limit if limit is None or offset is None else limit - offset - 1


def vocabulary(model: nn.Module) -> int | None:
    """How many token ids a model has embeddings for; None where it does not say."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        table = find() if callable(find) else None
    except NotImplementedError:
        table = None
    return getattr(table, "num_embeddings", None)


def _size(dataset: Indexable, most: int | None) -> int:
    """How many examples are taken."""
    length = sized(dataset)
    most = None if most is None else whole("max_examples", most)
    if length == 0:
        raise DataError("the data set is empty")
    return length if most is None else min(length, most)


def _positive(name: str, value: int | None, default: int) -> int:
    if value is None:
        return default
    return whole(name, value)


def _plain(value: Any) -> Any:
    """An example as `Digest` takes it; what it cannot take, by its representation."""
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, Tensor | np.ndarray | str | bytes | int | float | bool | None):
        return (
            value
            if not isinstance(value, np.ndarray) or value.dtype.kind in "biufc"
            else repr(value)
        )
    return repr(value)
