"""Scores as a table: a row for each sequence of the corpus, or for each of a query's best."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import are_texts, comparable, require
from ..data.batches import fingerprint_like
from ..data.examples import Indexable, named
from ..errors import ArgumentError
from ..extras import optional

if TYPE_CHECKING:
    from .scores import Scores


def arrow(
    scores: "Scores", data: Indexable | None, names: Sequence[str] | None, columns: Sequence[str]
) -> Any:
    """A pyarrow table of raw scores.

    Of a whole matrix a row a sequence, in the order of the corpus: `index`, a column for each
    query, null where it was never scanned. Of a heap (`top_k`) a row for each query and place:
    `query`, `place`, `index`, `score`. With `data` also `read_from`, file and line where it knows
    them, and `columns` of its records.

    Raises:
        ArgumentError: `data` is another corpus; names are not one a query, or stand twice.
    """
    pa = optional("pyarrow", "hf")
    N, Q, kept = len(scores), scores.queries, scores.store.facts["top_k"]
    names = [f"query {q}" for q in range(Q)] if names is None else list(names)
    if data is not None and len(data) != N:
        raise ArgumentError(f"data has {len(data)} sequences, {N} were scored: another corpus")
    then = scores.store.facts.get("data")
    if data is not None and then is not None and (now := fingerprint_like(data, then)) != then:
        raise ArgumentError(
            f"data has other sequences than were scored in {scores.folder} (fingerprint {then}, "
            f"now {now}): another corpus"
        )
    require(are_texts(columns), "columns", columns, "a list of names")
    if columns and data is None:
        raise ArgumentError(f"columns {list(columns)} are of the records: give data=")
    taken = {"index", "read_from", "query", "place", "score"}
    if taken & {*columns} or len({*columns}) < len(columns):
        raise ArgumentError(
            f"columns are {list(columns)}; expected each once, none of {sorted(taken)}"
        )
    taken |= {*columns}
    if len(names) != Q or len({*names}) < Q or taken & {*names}:
        raise ArgumentError(f"names are {names}; expected {Q}, each once, none of {sorted(taken)}")
    if kept is None:
        found: dict[str, Any] = {"index": np.arange(N)}
        for q, name in enumerate(names):
            found[name] = pa.array(np.ascontiguousarray(scores.matrix[q]), from_pandas=True)
        rows: Iterable[int] = range(N)
    else:
        best = [scores.top(q, kept) for q in range(Q)]
        rows = [index for ranked in best for index, _ in ranked]
        found = {
            "query": [name for name, ranked in zip(names, best, strict=True) for _ in ranked],
            "place": [place for ranked in best for place, _ in enumerate(ranked, 1)],
            "index": rows,
            "score": [value for ranked in best for _, value in ranked],
        }
    if data is not None:
        if callable(tell := getattr(data, "source", None)):
            found["read_from"] = [tell(index) for index in rows]
        found |= {name: _column(data, name, rows) for name in columns}
    try:
        return pa.table(found)
    except (pa.ArrowException, TypeError) as error:
        raise ArgumentError(
            f"columns {list(columns)}: one holds values of kinds that make no column ({error})"
        ) from error


def _column(data: Indexable, name: str, rows: Iterable[int]) -> list[Any]:
    """What the records of these sequences have in a column; of plain examples, they themselves."""
    if callable(find := getattr(data, "column", None)):
        values = find(name)
        return [values[index] for index in rows]
    found = []
    for index in rows:
        if not isinstance(one := data[index], Mapping) or name not in one:
            raise ArgumentError(f"columns: {named(data, index)} has no {name!r}")
        found.append(one[name])
    return found


def totals(matrix: np.ndarray, labels: Sequence[Any]) -> Mapping[Any, np.ndarray]:
    """Sums of scores [Q] of the sequences with a label, the labels in the order in which they come;
    what was never scanned counts as nothing.
    """
    if len(labels) != matrix.shape[1]:
        raise ArgumentError(f"{len(labels)} labels for {matrix.shape[1]} sequences")
    labels = [comparable("labels", label) for label in labels]
    order = {label: at for at, label in enumerate(dict.fromkeys(labels))}
    groups = np.array([order[label] for label in labels])
    sums = np.zeros((len(order), len(matrix)))
    for q, row in enumerate(matrix):
        sums[:, q] = np.bincount(groups, np.nan_to_num(row, nan=0.0), len(order))
    return dict(zip(order, sums, strict=True))
