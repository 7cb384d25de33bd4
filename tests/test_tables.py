"""Files of separated values, as spreadsheets write them."""

import csv
import gzip

import pytest
from test_labelled_files import LABELS, WORDS, word_tokenizer

from ekfac_fast.data import read, read_labelled, read_pairs
from ekfac_fast.data.fields import Columns
from ekfac_fast.data.records import read_columns
from ekfac_fast.errors import DataError


def written(path, *rows, **how):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **how).writerows(rows)
    return path


ROWS = [
    ["text", "source", "year"],
    ['a, "quoted" é', "wiki", "007"],
    ["two\nlines", "", "1999"],
    ["x" * 200_000, "web", ""],
]


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".CSV"])
def test_rows_are_what_was_written(ending, tmp_path):
    plain = tmp_path / "rows"
    written(plain, *ROWS)
    path = tmp_path / f"corpus{ending}"
    data = b"\xef\xbb\xbf" + plain.read_bytes()
    path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    found = read(path, keep=["source", "year"])
    assert [x["text"] for x in found] == [text for text, *_ in ROWS[1:]]
    kept = [x["columns"] for x in found]
    assert kept == [{"source": a, "year": b} for _, a, b in ROWS[1:]], "as they stand there"
    assert [found.source(i).rpartition(", ")[2] for i in range(3)] == ["line 2", "line 3", "line 5"]
    assert csv.field_size_limit() < 200_000, "Python's own setting is as it was"


def test_questions_and_answers(tmp_path):
    path = written(tmp_path / "q.csv", ["question", "answer"], [], ["why?", "so"])
    columns = Columns({"prompt": "question", "completion": "answer"}, texts=False)
    (only,) = read_columns(path, "line", columns)
    assert only == {"prompt": "why?", "completion": "so", "source": f"{path}, line 3"}


def test_tabs_separate_without_quotes(tmp_path):
    """As GLUE's files, whose quotes are the sentences' own."""
    (tmp_path / "a.tsv").write_text('text\tset\t\t\n"a\tb\t\t\nc" d\te\t\t\n')
    found = read(tmp_path / "a.tsv", keep=["set"])
    assert [(x["text"], x["columns"]["set"]) for x in found] == [('"a', "b"), ('c" d', "e")]


def test_pairs_with_values_of_a_reference(tmp_path):
    path = tmp_path / "p.csv"
    names = ["prompt", "chosen", "rejected", "ref_chosen_logps", "ref_rejected_logps"]
    written(path, names, ["w1", " w2", " w3", "-1.5", "-2"])
    found = read_pairs(path, word_tokenizer(WORDS), 8)
    assert found[0]["ref_chosen_logps"] == -1.5
    assert found[0]["ref_rejected_logps"] == -2.0


def test_labels_are_numbers_or_names(tmp_path):
    tokenizer = word_tokenizer(WORDS)
    for values, expected in (
        (["0", "2"], [0, 2]),
        (["pos", "neg"], [2, 0]),
        (["0.5", "2"], [0.5, 2]),
    ):
        rows = [["w1", "", values[0]], ["w2", "w3", values[1]]]
        path = written(tmp_path / "a.csv", ["text", "text_pair", "label"], *rows)
        data = read_labelled(path, tokenizer, 8, LABELS)
        assert [data[i]["label"] for i in range(2)] == expected
        assert [len(data[i]["input_ids"]) for i in range(2)] == [1, 2]
    written(path, ["text", "label"], ["w1", "1"], ["w1", "2"])
    data = read_labelled(path, tokenizer, 8, {"1": 0, "2": 1})
    assert [data[i]["label"] for i in range(2)] == [0, 1], "names that are written as numbers"
    for values, message in (
        (["1", ""], r"a\.csv, line 3: 'label' is null"),
        (["1", "pos", "x"], r"a\.csv, line 4: label 'x' is none of the model's"),
        (["1_0"], r"a\.csv, line 2: label '1_0' is none of the model's"),
    ):
        written(path, ["text", "label"], *(["w1", x] for x in values))
        with pytest.raises(DataError, match=message):
            read_labelled(path, tokenizer, 8, LABELS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"text,source\na,b\nc,d,e\n", r"c\.csv, line 3: 3 values, but 2 columns"),
        (b'text,source\n"a\nb",x\nc\n', r"c\.csv, line 4: 1 values, but 2 columns"),
        (b'text,source\na,"b\nc,d\n', r"c\.csv, line 2: cannot be read"),
        (b'text\n"a"b\n', r"c\.csv, line 2: cannot be read"),
        (b"text,text\na,b\n", r"c\.csv: two columns are named 'text'"),
        (b"body,source\na,b\n", r"c\.csv: needs 'text', .* it has 'body', 'source'"),
        (b"text\n\xff\n", r"c\.csv: not UTF-8"),
        (b"text\n", "holds no record"),
        (b"", "holds no record"),
    ],
)
def test_what_is_wrong_is_named(data, message, tmp_path):
    (tmp_path / "c.csv").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "c.csv")
