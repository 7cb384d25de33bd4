"""A data set as batches on the model's device: by token budget for language models, else by
size."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from .data import DataError, Example, Indexable, batch_plan, collate, example, lengths
from .files import fingerprint

BATCH_TOKENS = 4096
BATCH_SIZE = 16
# Examples whose content goes into the fingerprint, evenly spaced; all lengths do.
FINGERPRINTED = 256
SAMPLED_WEIGHTS = 4096


class Batches:
    """`dataset` seen by `model`: which examples form a batch, and the batch itself.

    A language-model example is a mapping with `input_ids` whose `labels`, if any, are one a token.
    Those are batched by `batch_tokens`, padded on the right and given `index` [B], the examples'
    ids (their own `id` where they have one, else their place). Of one longer than the model has
    positions, the end is cut off (`truncated` of them), or it is refused. Anything else is batched
    by `batch_size` through torch's default collate.

    Raises:
        DataError: an example is malformed or too long; names it.
        ValueError: the data set is empty.
    """

    def __init__(
        self,
        dataset: Indexable,
        model: nn.Module,
        *,
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        max_examples: int | None = None,
        on_long: Literal["truncate", "refuse"] = "truncate",
    ):
        self.dataset = dataset
        self.size = len(dataset) if max_examples is None else min(len(dataset), max_examples)
        if self.size == 0:
            raise ValueError("the data set is empty")
        self.device = next(model.parameters()).device
        self.batch_tokens = batch_tokens or BATCH_TOKENS
        self.batch_size = batch_size or BATCH_SIZE
        config = getattr(model, "config", None)
        self.context = getattr(config, "max_position_embeddings", None)
        self.vocabulary = getattr(config, "vocab_size", None)
        first = dataset[0]
        self.language = isinstance(first, Mapping) and "input_ids" in first
        if self.language and first.get("labels") is not None:
            labels = torch.as_tensor(first["labels"])
            self.language = labels.ndim == 1 and len(labels) == len(first["input_ids"])
        whole = lengths(_First(dataset, self.size)) if self.language else [1] * self.size
        limit = self.context or max(whole)
        long = [index for index, length in enumerate(whole) if length > limit]
        if long and on_long == "refuse":
            raise DataError(
                f"{len(long)} examples are longer than the model's {limit} positions; the first is "
                f"example {long[0]} with {whole[long[0]]} tokens: split them, or let them be cut"
            )
        self.truncated = len(long)
        self.lengths = [min(length, limit) for length in whole]

    def plan(self) -> list[list[int]]:
        """Indices of every batch; a pure function of lengths and budget."""
        if self.language:
            return batch_plan(self.lengths, self.batch_tokens)
        every = list(range(self.size))
        return [every[i : i + self.batch_size] for i in range(0, self.size, self.batch_size)]

    def tokens(self, indices: list[int]) -> int:
        """Real tokens (or examples, where there are none) of a batch."""
        return sum(self.lengths[i] for i in indices)

    def load(self, indices: list[int]) -> Any:
        """The batch of these examples, on the model's device."""
        if not self.language:
            return _moved(default_collate([self.dataset[i] for i in indices]), self.device)
        examples = [self.example(i) for i in indices]
        ids = torch.tensor([x.id for x in examples])
        return _moved(collate(examples) | {"index": ids}, self.device)

    def example(self, index: int) -> Example:
        """Example `index` of a language-model data set, checked against the model."""
        return example(self.dataset, index, self.vocabulary, self.context)

    def fingerprint(self) -> str:
        """Identifies the data: all lengths, and the content of evenly spaced examples."""
        step = max(1, self.size // FINGERPRINTED)
        if not self.language:
            parts = (repr(self.dataset[i]) for i in range(0, self.size, step))
            return fingerprint(self.size, parts)
        some = (
            (e.input_ids, e.labels)
            for e in (
                example(self.dataset, i, None, self.context) for i in range(0, self.size, step)
            )
        )
        return fingerprint(self.lengths, some)


def model_fingerprint(model: nn.Module) -> str:
    """Identifies the weights: every name and shape, and evenly spaced values of each tensor."""

    def parts() -> Iterator[Any]:
        for name, weight in model.state_dict().items():
            flat = weight.detach().reshape(-1)
            yield name, list(weight.shape), flat[:: max(1, len(flat) // SAMPLED_WEIGHTS)].cpu()

    return fingerprint(parts())


def autocasting(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """`torch.autocast` in `dtype`, or nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class _First:
    """The first `size` examples of a data set."""

    def __init__(self, dataset: Indexable, size: int):
        self.dataset, self.size = dataset, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


def _moved(batch: Any, device: torch.device) -> Any:
    """Every tensor of a nested batch on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_moved(value, device) for value in batch)
    return batch
