"""TF-IDF candidates: the sequences that share rare tokens with a query (paper, Eq. 28-29).

    score(q,d) = sum_{t in q} [t in d] IDF(t)
    IDF(t)     = log((C - n_t + 0.5) / (n_t + 0.5) + 1)     n_t of the C sequences hold t

Over model tokens. The sum runs over the tokens of the query, with multiplicity; presence in a
sequence is binary, so that the k1 of Eq. 28 cancels and its printed sum over the tokens of the
sequence cannot be meant. Only tokens that occur in a query count, so a sequence is a sparse row
over those alone; the corpus is read twice (n_t, then scores) and never held.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..data.examples import Indexable, example
from ..data.forms import TEXT, Form
from ..data.survey import checked
from ..errors import ArgumentError, DataError
from ..extras import optional

CHUNK = 4096


def top_candidates(
    queries: Sequence[Sequence[int] | Tensor],
    dataset: Indexable,
    k: int,
    vocab_size: int,
    *,
    context: int | None = None,
    chunk: int = CHUNK,
    form: Form = TEXT,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k best sequences of every query: indices [Q,k], scores [Q,k], best first.

    Equal scores: the lower index first. k is at most len(dataset). Memory: one chunk of sequences
    and the k best; of a data set of whole arrays (`Surveyed`) a block in place of a chunk.
    `context` cuts sequences as the scan will; `form` is that of the task. Raises DataError for an
    empty or invalid query (named by index) or example.
    """
    if k < 1:
        raise ArgumentError(f"top_candidates: k must be at least 1, not {k}")
    if not len(dataset) or not len(queries):
        raise DataError(f"top_candidates: {len(queries)} queries, {len(dataset)} sequences")
    listed = [_tokens(query, q, vocab_size) for q, query in enumerate(queries)]
    terms = np.unique(np.concatenate(listed))
    column = np.full(vocab_size, -1, dtype=np.int64)
    column[terms] = np.arange(len(terms))

    C, counts = len(dataset), np.zeros(len(terms))
    for presence in _presence(dataset, column, len(terms), context, chunk, form):
        counts += presence.sum(axis=0)
    idf = np.log((C - counts + 0.5) / (counts + 0.5) + 1)
    multiplicity = np.stack([np.bincount(column[ids], minlength=len(terms)) for ids in listed])
    weights = np.ascontiguousarray((multiplicity * idf).T)  # [terms,Q]

    Q, start = len(listed), 0
    indices, scores = np.empty((Q, 0), np.int64), np.empty((Q, 0))
    for presence in _presence(dataset, column, len(terms), context, chunk, form):
        new, stop = (presence @ weights).T, start + presence.shape[0]
        places = np.arange(start, stop)
        start = stop
        if scores.shape[1] == k:
            # An equal score comes too late: the lower index stays.
            enters = (new > scores[:, -1:]).any(axis=0)
            new, places = new[:, enters], places[enters]
        scores = np.concatenate([scores, new], axis=1)
        indices = np.concatenate([indices, np.broadcast_to(places, new.shape)], axis=1)
        # what is kept comes first and has lower indices: a stable sort keeps ties in their order
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores = np.take_along_axis(scores, best, axis=1)
        indices = np.take_along_axis(indices, best, axis=1)
    return indices, scores


def _tokens(query: Sequence[int] | Tensor, q: int, vocab_size: int) -> NDArray[np.int64]:
    """A query's tokens, checked."""
    try:
        return example([{"input_ids": query}], 0, vocab_size).input_ids.numpy()
    except DataError as error:
        raise DataError(str(error).replace("example 0", f"query {q}", 1)) from None


def _presence(
    dataset: Indexable,
    column: NDArray[np.int64],
    terms: int,
    context: int | None,
    chunk: int,
    form: Form,
) -> Iterator[Any]:
    """CSR matrices [sequences of a chunk, terms] that are 1 where the sequence holds the term."""
    sparse = optional("scipy.sparse", "analysis")
    for ids, ends in _chunks(dataset, len(column), context, chunk, form):
        found = column[ids]
        places = np.flatnonzero(found >= 0)
        # Once a sequence, its terms in order.
        held = np.unique(ends.searchsorted(places, side="right") * terms + found[places])
        rows = (held // terms).searchsorted(np.arange(len(ends) + 1))
        yield sparse.csr_array((np.ones(len(held)), held % terms, rows), shape=(len(ends), terms))


def _chunks(
    dataset: Indexable, vocab_size: int, context: int | None, chunk: int, form: Form
) -> Iterator[tuple[NDArray, NDArray[np.int64]]]:
    """Checked sequences after each other, and where each ends; by whole arrays where the data set
    gives them.
    """
    find = getattr(dataset, "blocks", None)
    blocks = find(len(dataset)) if form.text and callable(find) else None
    if blocks is not None:
        for _, cut in checked(dataset, blocks, vocab_size, context):
            yield cut.ids, cut.ends
        return
    for first in range(0, len(dataset), chunk):
        some = range(first, min(first + chunk, len(dataset)))
        every = [example(dataset, i, vocab_size, context, form).input_ids.numpy() for i in some]
        yield np.concatenate(every), np.cumsum([*map(len, every)])
