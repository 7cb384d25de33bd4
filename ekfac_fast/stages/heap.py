"""The best scores of every query, bounded: what is kept in place of a [Q,N] matrix."""

import numpy as np
import torch
from torch import Tensor


class Heap:
    """values [Q,K] and indices [Q,K], best first; ties go to the lower index; -1 where empty."""

    def __init__(self, values: Tensor, indices: Tensor) -> None:
        self.values, self.indices = values, indices

    @classmethod
    def empty(cls, Q: int, K: int, dtype: torch.dtype) -> "Heap":
        """Nothing yet."""
        return cls(
            torch.full((Q, K), -torch.inf, dtype=dtype), torch.full((Q, K), -1, dtype=torch.int64)
        )

    def push(self, s: Tensor, indices: Tensor) -> None:
        """Merge scores [Q,B] of a batch; NaN marks a sequence that is not the query's.

        Only queries that a score of the batch can enter are touched.
        """
        worst = self.values[:, -1:]
        s = s.nan_to_num(nan=-torch.inf)
        touched = ((s >= worst) & (s > -torch.inf)).any(1).nonzero().flatten()
        if not len(touched):
            return
        s = s[touched]
        ids = torch.where(s > -torch.inf, indices.expand(len(s), -1), -1)
        before = self.values[touched], self.indices[touched]
        self.values[touched], self.indices[touched] = _best(before, (s, ids))

    def merge(self, other: "Heap") -> None:
        """Take in what another heap of the same queries has kept of other sequences."""
        before, others = (self.values, self.indices), (other.values, other.indices)
        self.values, self.indices = _best(before, others)


def _best(kept: tuple[Tensor, Tensor], more: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of both (values, indices) as many as are kept, in their order."""
    values, ids = (torch.cat(pair, 1).numpy() for pair in zip(kept, more, strict=True))
    order = np.lexsort((ids, -values))[:, : kept[0].shape[1]]
    values, ids = (np.take_along_axis(x, order, 1) for x in (values, ids))
    return torch.from_numpy(values), torch.from_numpy(ids)
