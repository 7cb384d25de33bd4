"""TF-IDF candidates against the paper's formula, term by term."""

import subprocess
import sys
import tracemalloc
from math import log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ekfac_fast.errors import DataError
from ekfac_fast.stages.candidates import top_candidates


def corpus(rows: list[list[int]]) -> list[dict]:
    return [{"input_ids": row} for row in rows]


def printed(query: list[int], rows: list[list[int]], k1: float = 1.5) -> list[float]:
    """Eq. 28-29 with the sum over the query's tokens, k1 and all."""
    scores = []
    for row in rows:
        score = 0.0
        for token in query:
            count = sum(token in other for other in rows)
            exists = token in row
            idf = log((len(rows) - count + 0.5) / (count + 0.5) + 1)
            score += (k1 + 1) * exists / (k1 + exists) * idf
        scores.append(score)
    return scores


tokens = st.lists(st.integers(0, 11), min_size=1, max_size=8)


@settings(deadline=None)
@given(
    st.lists(tokens, min_size=1, max_size=5),
    st.lists(tokens, min_size=1, max_size=12),
    st.integers(1, 14),
    st.integers(1, 13),
)
def test_equals_the_printed_formula(queries, rows, k: int, chunk: int) -> None:
    indices, scores = top_candidates(queries, corpus(rows), k, 12, chunk=chunk)
    assert indices.dtype == np.int64
    assert indices.shape == scores.shape == (len(queries), min(k, len(rows)))
    for q, query in enumerate(queries):
        expected = np.array(printed(query, rows))
        np.testing.assert_allclose(scores[q], expected[indices[q]], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(scores[q], np.sort(expected)[::-1][:k], rtol=1e-12, atol=1e-12)
        assert len(set(indices[q].tolist())) == len(indices[q])
        pairs = list(zip(-scores[q], indices[q], strict=True))
        assert pairs == sorted(pairs)  # equal scores: the lower index first
    again = top_candidates(queries, corpus(rows), k, 12)
    np.testing.assert_array_equal(again[0], indices)
    np.testing.assert_array_equal(again[1], scores)


def test_ties_across_chunks_take_the_lower_index() -> None:
    rows = [[9, 1, 2], [3], [2, 1], [1, 1, 2, 2], [4], [2, 9, 1]]
    for chunk in (1, 2, 4, 6):
        indices, scores = top_candidates([[1, 2]], corpus(rows), 3, 10, chunk=chunk)
        assert indices.tolist() == [[0, 2, 3]]
        assert len(set(scores[0].tolist())) == 1


def test_tokens_of_the_query_count_as_often_as_they_stand_in_it() -> None:
    rows = [[1, 7, 7, 7], [2, 7]]
    once, twice = ([1, 2], [1, 1, 2])
    _, scores = top_candidates([once, twice], corpus(rows), 2, 8)
    idf = log(1.5 / 1.5 + 1)
    np.testing.assert_allclose(scores, [[idf, idf], [2 * idf, idf]])


def test_tokens_of_no_and_of_every_sequence() -> None:
    rows = [[1, 2]] * 50 + [[1, 3]]
    indices, scores = top_candidates([[1], [5], [5, 3]], corpus(rows), 51, 6)
    assert scores[0].max() == scores[0].min() == pytest.approx(log(0.5 / 51.5 + 1))
    assert scores[0].max() < 0.01
    assert not scores[1].any()
    assert indices[1].tolist() == list(range(51))
    assert indices[2, 0] == 50


def test_a_planted_passage_is_found_among_zipf_text() -> None:
    rng = np.random.default_rng(0)
    rows = [np.minimum(rng.zipf(1.3, 128), 4999).tolist() for _ in range(9000)]
    passage = rng.integers(0, 5000, 40).tolist()
    planted = [17, 4000, 4095, 4096, 8999]
    for i in planted:
        rows[i][30:70] = passage
    indices, _ = top_candidates([torch.tensor(passage), [1, 2]], corpus(rows), 5, 5000)
    assert sorted(indices[0].tolist()) == planted


def test_padding_and_what_the_scan_cuts_off_are_not_there() -> None:
    dataset = [
        {"input_ids": [5, 1, 1], "attention_mask": [0, 1, 1]},
        {"input_ids": [1, 1, 1, 5]},
        {"input_ids": [1, 5]},
    ]
    indices, scores = top_candidates([[5]], dataset, 3, 8, context=3)
    assert indices.tolist() == [[2, 0, 1]]
    assert scores[0, 1:].tolist() == [0, 0]


def test_memory_does_not_grow_with_the_corpus() -> None:
    class Corpus:
        def __init__(self, size: int) -> None:
            self.size = size

        def __len__(self) -> int:
            return self.size

        def __getitem__(self, i: int) -> dict:
            return {"input_ids": torch.arange(i % 50, i % 50 + 40)}

    def peak(size: int) -> int:
        tracemalloc.start()
        top_candidates([list(range(100))], Corpus(size), 10, 100, chunk=200)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(400)  # imports
    assert peak(8000) < 1.2 * peak(400)


@pytest.mark.parametrize(
    ("queries", "rows", "message"),
    [
        ([[1], [2, 8]], [[1]], "query 1: token id 8 at position 1 is outside the vocabulary of 8"),
        ([[1], []], [[1]], "query 1: has no tokens"),
        ([[1]], [[1], [9]], "example 1: token id 9 at position 0"),
        ([[1]], [[1], []], "example 1: has no tokens"),
        ([[1]], [], "1 queries, 0 sequences"),
        ([], [[1]], "0 queries, 1 sequences"),
    ],
)
def test_wrong_input_is_named(queries, rows, message: str) -> None:
    with pytest.raises(DataError, match=message):
        top_candidates(queries, corpus(rows), 1, 8)
    with pytest.raises(ValueError, match="k must be at least 1, not 0"):
        top_candidates(queries, corpus(rows), 0, 8)


def test_scipy_is_named_where_it_is_not_installed() -> None:
    code = (
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name: None if name == 'scipy' else find(name)\n"
        "from ekfac_fast.stages.candidates import top_candidates\n"
        "assert 'scipy' not in sys.modules\n"
        "top_candidates([[1]], [{'input_ids': [1]}], 1, 8)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MissingExtra: scipy.sparse is not installed: pip install 'ekfac-fast[analysis]'" in (
        run.stderr
    )
