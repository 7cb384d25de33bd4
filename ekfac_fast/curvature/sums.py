"""Sums over many batches that stay exact to about twice the digits of their dtype.

A sum in fp32 loses what is below 2^-24 of it: a batch that is small beside all before it, and from
2^24 equal terms on everything. Here terms are added to `rest`; at a `fold` the sum of both moves
to `total`, and what that rounds away stays in `rest` (Knuth's two-sum).
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass
class Sum:
    """total + rest, of one shape and dtype; terms go into `rest`, and before the first fold there
    is nothing else.
    """

    rest: Tensor
    total: Tensor | None = None

    @classmethod
    def zero(cls, *shape: int, dtype: torch.dtype, device: torch.device) -> Self:
        """Of no terms."""
        return cls(torch.zeros(*shape, dtype=dtype, device=device))

    def fold(self) -> None:
        """Move the terms to the total; exact."""
        if self.total is None:
            self.total = self.rest.clone()
            self.rest.zero_()
            return
        new = self.total + self.rest
        seen = new - self.total
        self.rest.sub_(seen)
        self.rest.add_(self.total.sub_(new - seen))
        self.total.copy_(new)

    def value(self) -> Tensor:
        """The sum, rounded once."""
        return self.rest if self.total is None else self.total + self.rest
