"""Records that no file held."""

import gzip
import json
import resource
from pathlib import Path

import pandas
import pytest
import torch
from test_data import TEXT, bpe, jsonl

from ekfac_fast.data import read, read_queries, tokenize
from ekfac_fast.errors import ArgumentError, DataError


@pytest.fixture(scope="module")
def tokenizer():
    return bpe()


def test_what_else_is_given_as_data_is_named(tokenizer) -> None:
    texts = [{"text": TEXT, "topic": 1}, {"text": "The lazy dog.", "source": "web"}]
    tokens = tokenize(texts, tokenizer, 16)
    assert tokens.source(len(tokens) - 1) == "web", "where it was read, as it says itself"
    with pytest.raises(DataError, match=r"web: has no 'topic': give it in every"):
        tokens.column("topic")
    with pytest.raises(ArgumentError, match=r"Subset\(data, range\(0, 3\)\)"):
        tokens[:3]  # type: ignore[index]
    with pytest.raises(DataError, match=r"a pandas DataFrame: give its rows, \.to_dict"):
        tokenize(pandas.DataFrame(texts), tokenizer, 16)


def test_queries_of_a_list_are_those_of_a_file(tokenizer, tmp_path: Path) -> None:
    for rows in (
        [{"prompt": "The quick", "completion": " brown fox"}],
        [{"prompt": "The quick", "completion": " brown", "against": " lazy dog"}] * 2,
    ):
        path = jsonl(tmp_path / "q.jsonl", *map(json.dumps, rows))
        one, other = read_queries(path, tokenizer, 64), read_queries(rows, tokenizer, 64)
        assert len(one) == len(other) == len(rows)
        for a, b in zip(one, other, strict=True):
            assert {k: torch.as_tensor(x).tolist() for k, x in a.items()} == {
                k: torch.as_tensor(x).tolist() for k, x in b.items()
            }
    assert other.source(1) == "record 1"
    for given in (rows, read(path)):
        with pytest.raises(DataError, match=r"has 'against', .* which `read_queries` reads"):
            tokenize(given, tokenizer, 64)
    with pytest.raises(DataError, match="there is no record"):
        read_queries([], tokenizer, 64)


def test_a_full_folder_for_temporary_files_is_named(tokenizer, tmp_path: Path) -> None:
    packed = tmp_path / "corpus.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps({"text": TEXT * 40}).encode()))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(DataError, match=r"no room for tokens in /.*variable TMPDIR"):
            tokenize([{"text": TEXT * 40}], tokenizer, 64)
        with pytest.raises(DataError, match=r"no room for the content of .*gz in /.*TMPDIR"):
            read(packed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
