"""A scan's results on disk: every score or the best of each query, and where the best come from."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..checks import Whole, check_json, path, whole
from ..data.examples import Indexable
from ..errors import ArgumentError, Notice, StoreError
from ..extras import optional
from ..store.files import replacing
from ..store.folder import Store
from ..store.manifest import MANIFEST
from ..store.results import check_result
from . import table
from .trust import SPARSE, Trust, sparsity

# Columns of a query's shard, for its top and its lowest sequences; a rank of 0 is none.
DETAIL = ("indices", "scores", "candidate_ranks")
# Of one of them in the shard, behind its index.
KINDS = TARGET, INPUT, HEADS = " target", " input", " heads"
NOT_ASKED = "they were not asked for"
UNFINISHED = "the scan is not finished"
HEAP = "heap"
# Queries, and places of each, in a notebook.
SHOWN = 5
SCHEMA = {
    "train_size": Whole(1), "examples": Whole(1), "layers": [str], "top_k": (None, Whole(1)),
}  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """What each head [heads] of an attention matrix has of its layer's share of a score.

    part: "q", "k", "v" (rows of W; of k and v there may be fewer) or "o" (columns). In a layer the
    heads of all parts sum to its share, less what the bias of "o" has, which is no head's.
    """

    layer: str
    part: str
    values: np.ndarray


@dataclass(frozen=True)
class Detail:
    """Where one sequence's score comes from: per_layer_token [L,T] sums to `score` (Eq. 30, 31).

    candidate_rank  its place among the query's TF-IDF candidates, from 1; None without them
    target          [T] what zeroing the loss of target t takes away (Eq. 34-36); sums to `score`
    input           [T] what scaling the embedding of token t does (Eq. 37-38)
    heads           of the tracked attention matrices

    target and input are None where they were not asked for, or could not be worked out
    (`Scores.unattributed`).
    """

    query: int
    index: int
    score: float
    per_layer_token: np.ndarray
    candidate_rank: int | None = None
    target: np.ndarray | None = None
    input: np.ndarray | None = None
    heads: tuple[Heads, ...] = ()

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
        if (self.folder / "scores.done").exists():
            check_result(self.store, "scores.done")
        matrix = self.store.matrix()
        batches = self.store.batches()
        matrix.verify(batches)
        if self.store.checked and self.store.finished and len(matrix.done) < len(batches):
            raise StoreError(
                f"{matrix.journal}: {len(matrix.done)} of {len(batches)} batches are marked, "
                "though the scan is finished: the file is damaged. Score again"
            )
        return matrix.values

    @property
    def queries(self) -> int:
        """How many queries were scored; 1 of self-influence."""
        kept = self.store.facts["top_k"]
        return len(self.matrix if kept is None else self._heap["values"])

    def __repr__(self) -> str:
        try:
            asked = f"{self.queries} queries, "
        except StoreError:  # nothing was kept yet, or it is damaged: whoever reads it hears of it
            asked = ""
        return f"Scores({asked}{len(self)} sequences{self._state}, in {self.folder})"

    def __len__(self) -> int:
        """Sequences of the corpus, scanned or not."""
        return int(self.store.facts["examples"])

    def __iter__(self) -> Iterator[np.ndarray]:
        """Raw scores [Q] of one sequence after the other, in the order of the corpus."""
        return iter(self.matrix.T)

    def to_arrow(
        self,
        data: Indexable | None = None,
        *,
        names: Sequence[str] | None = None,
        columns: Sequence[str] = (),
    ) -> Any:
        """A pyarrow table: a row a sequence, or, where only the top k were kept, a row a place.

        Args:
            data: the corpus, for `read_from` (file and line, where it knows them) and `columns` of
                its records (`Tokens.column`; of plain examples, they themselves).
            names: of the queries.

        Raises:
            ArgumentError: `data` or `names` do not fit.
        """
        self._tell_of_what_is_missing()
        return table.arrow(self, data, names, columns)

    def to_pandas(self, data: Indexable | None = None, **more: Any) -> Any:
        """`to_arrow` as a pandas DataFrame."""
        optional("pandas", "analysis")
        return self.to_arrow(data, **more).to_pandas()

    def to_parquet(self, file: str | Path, data: Indexable | None = None, **more: Any) -> Path:
        """Write `to_arrow` as a parquet file; one that is there is replaced as a whole."""
        file, found = path("file", file), self.to_arrow(data, **more)
        with replacing(file, found.nbytes) as partial:
            optional("pyarrow.parquet", "hf").write_table(found, partial)
        return file

    def totals(self, labels: Sequence[Any]) -> Mapping[Any, np.ndarray]:
        """Summed raw scores [Q] of the sequences of each label: which data set matters for a query.

        labels: one a sequence, as `Tokens.column("set")`. Raises ArgumentError if they are not.
        """
        self._tell_of_what_is_missing()
        return table.totals(self.matrix, labels)

    def _tell_of_what_is_missing(self) -> None:
        """A `Notice` where a scan still runs, or was killed."""
        if not self.store.finished:
            warnings.warn(
                f"{self.folder}: {UNFINISHED}: sequences that come later have no scores here",
                Notice,
                stacklevel=3,
            )

    @property
    def _state(self) -> str:
        """What is said behind the counts."""
        return "" if self.store.finished else f", {UNFINISHED}"

    def _repr_html_(self) -> str:
        """The best of every query, for notebooks."""
        rows = "".join(
            f"<tr><td>{q}</td><td>{place}</td><td>{index}</td><td>{value:.4g}</td></tr>"
            for q in range(min(self.queries, SHOWN))
            for place, (index, value) in enumerate(self.top(q, min(SHOWN, self._kept)), 1)
        )
        head = "".join(f"<th>{x}</th>" for x in ("query", "place", "index", "raw score"))
        return (
            f"<p>{self.queries} queries, {len(self)} sequences{self._state}, in "
            f"{escape(str(self.folder))}</p><table><tr>{head}</tr>{rows}</table>"
        )

    @property
    def _kept(self) -> int:
        """Places that are kept of a query."""
        kept = self.store.facts["top_k"]
        return len(self) if kept is None else int(kept)

    @cached_property
    def _heap(self) -> dict[str, Tensor]:
        """Of all queries, read and checked once."""
        if not (found := self.store.load_state(HEAP).tensors):
            raise StoreError(f"{self.folder}: {UNFINISHED}, and has kept nothing yet")
        return found

    def top(self, query: int, k: int, *, lowest: bool = False) -> list[tuple[int, float]]:
        """The k highest (or lowest) scores: (index, raw score), best first, ties by index.

        Fewer where fewer sequences were scanned.

        Raises:
            ArgumentError: no such query; or only the top k were kept, and others are wanted.
        """
        whole("query", query, 0, self.queries - 1)
        whole("k", k, 0)
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

        Raises:
            ArgumentError: no such query.
        """
        whole("query", query, 0, self.queries - 1)
        if query not in self._shards.done:
            if self.store.finished and self.store.facts.get("detail"):
                raise StoreError(
                    f"{self.folder}: the detail of query {query} is gone (shard_{query:06d}"
                    ".safetensors): put it back, or delete the folder and score again"
                )
            return []
        shard, side = self._shards.read(query), "lowest" if lowest else "top"
        rows = zip(*(shard[f"{side}.{name}"].tolist() for name in DETAIL), strict=True)
        found = []
        scanned = self._scanned(query)
        for index, score, rank in rows:
            matrix, target, by, heads = (
                None if (x := shard.get(f"{index}{kind}")) is None else x.numpy()
                for kind in ("", *KINDS)
            )
            assert matrix is not None
            split = self._split(heads)
            if not np.isclose(now := scanned(index), score, rtol=1e-6, atol=0.0):
                raise StoreError(
                    f"{self.folder}: the detail of query {query} says {score:.6g} of sequence "
                    f"{index}, the scan {now:.6g}: shard_{query:06d}.safetensors is another run's. "
                    "Delete the folder and score again"
                )
            found.append(Detail(query, index, score, matrix, rank or None, target, by, split))
        return found

    def _scanned(self, query: int) -> Callable[[int], float]:
        """The scan's score of a sequence; NaN where it has none."""
        if self.store.facts["top_k"] is None:
            row = self.matrix[query]
            return lambda index: float(row[index])
        best = dict(self.top(query, self._kept))
        return lambda index: best.get(index, np.nan)

    def _split(self, every: np.ndarray | None) -> tuple[Heads, ...]:
        """Heads by their layers and parts."""
        if every is None:
            return ()
        told = self.store.state["heads"]
        values = np.split(every, np.cumsum([many for *_, many in told])[:-1])
        return tuple(
            Heads(layer, part, x) for (layer, part, _), x in zip(told, values, strict=True)
        )

    @property
    def unattributed(self) -> str | None:
        """Why details say nothing of output and input tokens; None where they do."""
        reason = self.store.state.get("attribution")
        return NOT_ASKED if reason is None else str(reason) or None

    @cached_property
    def trust(self) -> Trust | None:
        """How far these scores can be trusted; None of self-influence and of older versions."""
        told = self.store.state.get("trust")
        if told is None:
            return None
        every = range(self.queries) if self.store.facts.get("detail") else self._shards.done
        details = [d for q in sorted(every) for d in self.details(q)]
        sparse = [sparsity(d.per_token) > SPARSE for d in details]
        share = float(np.mean(sparse)) if sparse else None
        return Trust(**told, sparse=share, validation=self.store.state.get("validation"))

    @property
    def seconds(self) -> float:
        """Time that the scan took, its batches alone."""
        return self.stages["scan"]

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of every stage that made this folder.

        Raises:
            StoreError: the scan is not finished.
        """
        if not self.store.finished:
            raise StoreError(f"{self.folder}: {UNFINISHED}; run it again to continue")
        seconds = self.store.state["seconds"]
        return seconds if isinstance(seconds, dict) else {"scan": seconds}
