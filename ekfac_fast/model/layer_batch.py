"""What a pass says of one layer."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .layers import Layer
from .rows import Rows, alike


@dataclass(frozen=True)
class LayerBatch:
    """One layer's inputs and output gradients in one batch.

    `shared` names the first layer that reads the very same input tensor (with a bias like its own):
    gate and up, or q, k and v, share what depends on `a` alone; `readers` counts them.
    """

    layer: Layer
    shared: str
    readers: int
    a: Tensor  # [B,rows,I]; rows are positions, or of an expert those that were routed to it
    g: Tensor  # [B,rows,O], gradient of the summed loss
    rows: Rows  # what the rows B x T stand for
    loss: int = 0  # of several losses of one pass, which it is the gradient of

    @property
    def filled(self) -> Tensor | None:
        """Of an expert, which rows of [B,rows], flat, are tokens; None where all rows count alike:
        of dense layers, and of experts that are used several times in a pass.
        """
        return self.rows.filled

    def tokens(self, x: Tensor) -> Tensor:
        """[B,rows,F] as [N,F]; of an expert, only the rows that are tokens."""
        flat = x.flatten(0, 1)
        return flat if self.filled is None else flat[self.filled]

    def spread(self, x: Tensor) -> Tensor:
        """[N,F] of an expert's tokens as [B,rows,F], zero elsewhere."""
        spread = x.new_zeros(self.g.shape[0] * self.g.shape[1], x.shape[-1])
        assert self.filled is not None
        spread[self.filled] = x
        return spread.view(*self.g.shape[:2], -1)

    def groups(self) -> Iterator[tuple[Tensor, int]]:
        """(members, rows) of an expert: sequences that have about as many rows, and how many at
        most: rows that are no tokens are hardly multiplied.
        """
        counts = self.rows.counts
        assert counts is not None
        for group in alike(counts):
            yield torch.tensor(group, device=self.g.device), counts[group[0]]
