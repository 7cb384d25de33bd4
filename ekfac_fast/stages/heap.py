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
        values = torch.cat([self.values[touched], s], 1).numpy()
        every = torch.where(s > -torch.inf, indices.expand(len(s), -1), -1)
        ids = torch.cat([self.indices[touched], every], 1).numpy()
        order = np.lexsort((ids, -values))[:, : self.values.shape[1]]
        self.values[touched] = torch.from_numpy(np.take_along_axis(values, order, 1))
        self.indices[touched] = torch.from_numpy(np.take_along_axis(ids, order, 1))

    def merge(self, other: "Heap") -> None:
        """Take in what another heap of the same queries has kept of other sequences."""
        values = torch.cat([self.values, other.values], 1).numpy()
        ids = torch.cat([self.indices, other.indices], 1).numpy()
        order = np.lexsort((ids, -values))[:, : self.values.shape[1]]
        self.values = torch.from_numpy(np.take_along_axis(values, order, 1))
        self.indices = torch.from_numpy(np.take_along_axis(ids, order, 1))
