"""A scan's results on disk: every score or the best of each query, and where the best come from."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from ..checks import Whole, check_json
from ..errors import ArgumentError, StoreError
from ..store.folder import Store
from ..store.manifest import MANIFEST
from .trust import SPARSE, Trust, sparsity

# Columns of a query's shard, for its top and its lowest sequences; a rank of 0 is none.
DETAIL = ("indices", "scores", "candidate_ranks")
HEAP = "heap"
SCHEMA = {
    "train_size": Whole(1), "examples": Whole(1), "layers": [str], "top_k": (None, Whole(1)),
}  # fmt: skip


@dataclass(frozen=True)
class Detail:
    """Where one sequence's score comes from: per_layer_token [L,T] sums to `score` (Eq. 30, 31).

    `candidate_rank`: its place among the query's TF-IDF candidates, from 1; None without them.
    """

    query: int
    index: int
    score: float
    per_layer_token: np.ndarray
    candidate_rank: int | None = None

    @property
    def per_layer(self) -> np.ndarray:
        """Share of every layer [L]."""
        return self.per_layer_token.sum(1)

    @property
    def per_token(self) -> np.ndarray:
        """Share of every token [T]: the position whose update counts, one before its target."""
        return self.per_layer_token.sum(0)


class Scores:
    """Scores on disk: `matrix` [Q,N] or a bounded heap per query; details of top sequences."""

    def __init__(self, folder: str | Path):
        """Open a folder written by `score` or `self_scores`; StoreError names what is missing."""
        self.store = Store.load(folder)
        manifest = self.store.folder / MANIFEST
        check_json(self.store.facts, SCHEMA, manifest, "The folder holds no scores: check the path")
        self._shards = self.store.pieces()
        self.folder = Path(folder)
        self.train_size: int = self.store.facts["train_size"]
        self.layers: list[str] = self.store.facts["layers"]

    @cached_property
    def matrix(self) -> np.ndarray:
        """Raw scores [Q,N], mapped from disk; NaN where a sequence was never scanned.

        Raises:
            ArgumentError: the scan kept only the top k.
        """
        if self.store.facts["top_k"] is not None:
            raise ArgumentError(
                f"{self.folder} holds the top {self.store.facts['top_k']} of each query; "
                "score again without top_k for the whole matrix"
            )
        matrix = self.store.matrix()
        batches = self.store.batches()
        matrix.verify(batches)
        if self.store.checked and self.store.finished and len(matrix.done) < len(batches):
            raise StoreError(
                f"{matrix.journal}: {len(matrix.done)} of {len(batches)} batches are marked, "
                "though the scan is finished: the file is damaged. Score again"
            )
        return matrix.values

    @cached_property
    def _heap(self) -> dict[str, Tensor]:
        """Of all queries, read and checked once."""
        return self.store.load_state(HEAP).tensors

    def top(self, query: int, k: int, *, lowest: bool = False) -> list[tuple[int, float]]:
        """The k highest (or lowest) scores: (index, raw score), best first, ties by index."""
        kept = self.store.facts["top_k"]
        if kept is None:
            row = np.asarray(self.matrix[query])
            indices = np.flatnonzero(~np.isnan(row))
            values = row[indices]
        else:
            if lowest or k > kept:
                raise ArgumentError(f"{self.folder} holds only the top {kept} of each query")
            indices, values = (self._heap[x][query].numpy() for x in ("indices", "values"))
            indices, values = indices[indices >= 0], values[indices >= 0]
        order = np.lexsort((indices, values if lowest else -values))[:k]
        return [(int(indices[i]), float(values[i])) for i in order]

    def details(self, query: int, *, lowest: bool = False) -> list[Detail]:
        """Layer and token detail of the query's top (or lowest) sequences, best (or worst) first.

        [] if not asked for; of the lowest also where only the top k were kept.
        """
        if query not in self._shards.done:
            return []
        shard, side = self._shards.read(query), "lowest" if lowest else "top"
        rows = zip(*(shard[f"{side}.{name}"].tolist() for name in DETAIL), strict=True)
        return [
            Detail(query, index, score, shard[f"{index}"].numpy(), rank or None)
            for index, score, rank in rows
        ]

    @cached_property
    def trust(self) -> Trust | None:
        """How far these scores can be trusted; None of self-influence and of older versions."""
        told = self.store.state.get("trust")
        if told is None:
            return None
        details = [d for q in sorted(self._shards.done) for d in self.details(q)]
        sparse = [sparsity(d.per_token) > SPARSE for d in details]
        share = float(np.mean(sparse)) if sparse else None
        return Trust(**told, sparse=share, validation=self.store.state.get("validation"))

    @property
    def seconds(self) -> float:
        """Time that the scan took, its batches alone."""
        return self.stages["scan"]

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of every stage that made this folder."""
        seconds = self.store.state["seconds"]
        return seconds if isinstance(seconds, dict) else {"scan": seconds}
