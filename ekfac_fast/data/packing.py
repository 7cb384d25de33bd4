"""Short documents end to end in one sequence, as training packs them, and still apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ..checks import instance, place, whole
from ..errors import ArgumentError, DataError
from .examples import IGNORED
from .tokens import Tokens


@dataclass(frozen=True, eq=False)
class Packed(Dataset):
    """Documents in sequences: sequence i is of documents starts[i] to starts[i + 1] of `tokens`.

    Positions start again with every document, which is how models tell them apart, and nothing
    predicts its first token: a sequence's gradient is the sum of its documents'.
    """

    tokens: Tokens
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def documents(self, index: int) -> range:
        """Which documents a sequence is of."""
        index = place(index, len(self))
        return range(int(self.starts[index]), int(self.starts[index + 1]))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        every = [self.tokens[at] for at in self.documents(index)]
        for one in every:
            one["labels"][0] = IGNORED
            one["position_ids"] = torch.arange(len(one["labels"]))
        return {name: torch.cat([one[name] for one in every]) for name in every[0]}

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """The tokenizer's that made the documents."""
        return self.tokens.tokenizer_fingerprint

    def source(self, index: int) -> str:
        """Where a sequence's documents were read: the first, how many more, the last."""
        first, *others = self.documents(index)
        told = self.tokens.source(first)
        if not others:
            return told
        return f"{told} and {len(others)} more, to {self.tokens.source(others[-1])}"

    def record(self, index: int) -> Mapping[str, Any] | None:
        """What a sequence of one document was made of."""
        first, *others = self.documents(index)
        return None if others else self.tokens.record(first)

    def column(self, name: str) -> list[Any]:
        """What the records of a sequence's documents have in a column that was kept.

        Raises:
            DataError: they have not the same; names them.
        """
        values, found = self.tokens.column(name), []
        for index in range(len(self)):
            own = [values[at] for at in self.documents(index)]
            if any(x != own[0] for x in own):
                raise DataError(
                    f"{self.source(index)}: packed documents differ in {name!r}; pack data of each "
                    "alone, or do not pack"
                )
            found.append(own[0])
        return found


def pack(tokens: Tokens, context: int) -> Packed:
    """Documents in their order, as many a sequence as `context` tokens hold.

    Args:
        tokens: of `tokenize`; each of its examples is a document.
        context: tokens a sequence, at most.

    Raises:
        ArgumentError: a document is longer; names it.
    """
    instance("tokens", tokens, Tokens, "what tokenize returns")
    whole("context", context, 2)
    starts, room = [0], context
    for at, length in enumerate(np.diff(tokens.rows[:, 0], prepend=0).tolist()):
        if length > context:
            raise ArgumentError(
                f"pack: {tokens.source(at)} has {length} tokens, but the context is {context}; "
                "give tokenize the same context"
            )
        if length > room:
            starts.append(at)
            room = context
        room -= length
    return Packed(tokens, np.array([*starts, len(tokens)]))
