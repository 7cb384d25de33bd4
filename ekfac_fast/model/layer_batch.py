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
    a: Tensor  # [B,T,I]
    g: Tensor  # [B,T,O], gradient of the summed loss
    rows: Rows  # what the rows B x T stand for
    loss: int = 0  # of several losses of one pass, which it is the gradient of

    def parts(self) -> Iterator[tuple[Tensor | None, Tensor, Tensor]]:
        """(members, g, a) of all sequences at once (None), or, of an expert, of those that have
        about as many rows, [b]: rows without a token are not multiplied.
        """
        counts = self.rows.counts
        if counts is None:
            yield None, self.g, self.a
            return
        for group in alike(counts):
            members = torch.tensor(group, device=self.g.device)
            width = counts[group[0]]
            yield members, self.g[members, :width], self.a[members, :width]
