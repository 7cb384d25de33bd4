"""Scores where people work: tables with the records' own columns, totals by data set."""

import json
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from dense_ekfac import asked, corpus, gpt2
from test_data import bpe, jsonl

from ekfac_fast import fit, prepare_queries, score
from ekfac_fast.data import read, tokenize
from ekfac_fast.errors import ArgumentError, DataError, Notice

TEXTS = [f"fox {n} " * (12 if n == 0 else 1) for n in range(6)]


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tokens):
    folder = tmp_path_factory.mktemp("table")
    model, data = gpt2().eval(), tokens
    model.resize_token_embeddings(400)
    factors = fit(model, data, out=folder / "f")
    queries = prepare_queries(model, factors, asked(2), rank=4)
    whole = score(model, queries, data, out=folder / "s")
    some = score(model, queries, data, out=folder / "c", candidates=[[1, 2], [2, 5]])
    best = score(model, queries, data, out=folder / "h", top_k=3)
    return whole, some, best


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Eight sequences of six records: the first is cut in three."""
    rows = [{"text": text, "set": "ab"[n % 2], "n": n} for n, text in enumerate(TEXTS)]
    path = jsonl(tmp_path_factory.mktemp("read") / "c.jsonl", *map(json.dumps, rows))
    data = tokenize(read(path, keep=["set", "n"]), bpe(), 16)
    assert len(data) == 8
    return data


def test_a_row_a_sequence_with_its_records_columns(scored, tokens, tmp_path):
    whole, some, _ = scored
    found = whole.to_arrow(tokens, names=["x", "y"], columns=["set", "n"])
    assert found.column_names == ["index", "x", "y", "read_from", "set", "n"]
    assert np.array_equal(found["y"].to_numpy(), whole.matrix[1])
    assert found["n"].to_pylist() == [0, 0, 0, 1, 2, 3, 4, 5]
    assert found["read_from"][2].as_py().endswith("c.jsonl, line 1, chunk 3")
    frame = whole.to_pandas(tokens, columns=["set"])
    assert frame.groupby("set")["query 0"].sum()["b"] == pytest.approx(
        whole.totals(tokens.column("set"))["b"][0]
    )
    # What was never scanned is null, not NaN.
    assert some.to_arrow()["query 0"].null_count == 6
    file = whole.to_parquet(tmp_path / "s.parquet", tokens, columns=["set"])
    assert pyarrow.parquet.read_table(file)["set"].to_pylist() == list("aaababab")


def test_a_corpus_whose_sequences_lost_their_end_is_the_corpus(tmp_path):
    model, data = gpt2().eval(), corpus(5)
    data[3]["input_ids"] = [*range(30)]
    with pytest.warns(Notice, match="1 are longer than the model's 24 positions"):
        factors = fit(model, data, out=tmp_path / "f")
    queries = prepare_queries(model, factors, asked(1), rank=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        scores = score(model, queries, data, out=tmp_path / "s")
    assert scores.to_arrow(data).column_names == ["index", "query 0"]
    named = [x | {"set": n % 2} for n, x in enumerate(data)]
    assert scores.to_arrow(named, columns=["set"])["set"].to_pylist() == [0, 1, 0, 1, 0]
    del named[2]["set"]
    with pytest.raises(ArgumentError, match="columns: example 2 has no 'set'"):
        scores.to_arrow(named, columns=["set"])
    data[3]["input_ids"][-1] += 1
    with pytest.raises(ArgumentError, match="another corpus"):
        scores.to_arrow(data)


def test_a_row_a_place_where_the_best_were_kept(scored, tokens):
    _, _, best = scored
    found = best.to_arrow(tokens, columns=["n"]).to_pylist()
    assert [(r["query"], r["place"]) for r in found] == [
        (f"query {q}", place) for q in range(2) for place in (1, 2, 3)
    ]
    assert [(r["index"], r["score"]) for r in found[:3]] == best.top(0, 3)
    assert found[0]["n"] == [0, 0, 0, 1, 2, 3, 4, 5][found[0]["index"]]


def test_totals_by_data_set(scored, tokens):
    whole, some, best = scored
    found = whole.totals(tokens.column("set"))
    assert list(found) == ["a", "b"]
    assert np.allclose(found["b"], whole.matrix[:, [3, 5, 7]].sum(1))
    assert np.allclose(found["a"] + found["b"], whole.matrix.sum(1))
    assert np.isfinite(some.totals(list("aaaabbbb"))["a"]).all()
    with pytest.raises(ArgumentError, match="3 labels for 8 sequences"):
        whole.totals("abc")
    with pytest.raises(ArgumentError, match="holds the top 3 of each query"):
        best.totals(list("aaaabbbb"))


def test_in_the_order_of_the_corpus(scored):
    whole, _, _ = scored
    assert len(whole) == 8
    assert np.array_equal(np.stack(list(whole), 1), whole.matrix)


def test_a_notebook_shows_the_best(scored):
    for scores in scored:
        page = scores._repr_html_()
        index, value = scores.top(0, 1)[0]
        assert f"<td>0</td><td>1</td><td>{index}</td><td>{value:.4g}</td>" in page
        assert "2 queries, 8 sequences" in page


def test_what_is_refused(scored, tokens, tmp_path: Path):
    whole, _, _ = scored
    with pytest.raises(ArgumentError, match="data has 2 sequences, 8 were scored: another corpus"):
        whole.to_arrow(tokenize([{"text": "The fox"}] * 2, bpe(), 16))
    for names in (["x"], ["x", "x"], ["index", "x"]):
        with pytest.raises(ArgumentError, match=r"names are .*; expected 2, each once"):
            whole.to_arrow(names=names)
    with pytest.raises(ArgumentError, match="are of the records: give data="):
        whole.to_arrow(columns=["set"])
    with pytest.raises(
        ArgumentError, match=r"columns are \['score'\]; expected each once, none of"
    ):
        whole.to_arrow(tokens, columns=["score"])
    with pytest.raises(ArgumentError, match=r"labels: the label \[1\] .*; give texts or numbers"):
        whole.totals([[1]] * 8)
    turned = tokenize([{"text": text} for text in TEXTS[::-1]], bpe(), 16)
    assert len(turned) == 8
    with pytest.raises(ArgumentError, match=r"other sequences than were scored in .*table"):
        whole.to_arrow(turned)
    mixed = [{"text": text, "n": "a" if n else n} for n, text in enumerate(TEXTS)]
    mixed = tokenize(mixed, bpe(), 16)
    with pytest.raises(ArgumentError, match=r"columns \['n'\]: one holds values of kinds"):
        whole.to_arrow(mixed, columns=["n"])
    with pytest.raises(DataError, match=r"line 1: no column 'url' was kept; read\(path, keep="):
        whole.to_arrow(tokens, columns=["url"])
    path = jsonl(tmp_path / "d.jsonl", '{"text": "a", "set": 1}', '{"text": "b"}')
    with pytest.raises(DataError, match=r"d\.jsonl, line 2: has no 'set' to keep; it has text"):
        read(path, keep=["set"])[1]
    with pytest.raises(ArgumentError, match="keep is 'set', expected a list of names"):
        read(path, keep="set")
