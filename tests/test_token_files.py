"""What `datasets` saves, parquet of token ids, and the commands on them and on a .bin."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from test_data import TEXT, bpe
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from ekfac_fast.cli import app
from ekfac_fast.data import open_tokens, read
from ekfac_fast.data.arrow import tokens_of
from ekfac_fast.data.batches import Batches, data_fingerprint
from ekfac_fast.data.token_files import are_tokens, token_files
from ekfac_fast.errors import ArgumentError, DataError, Notice
from ekfac_fast.stages.scores import Scores

ROWS = [[1, 2, 3], [4], [5, 6, 7, 8], [9, 10], [11, 12, 13]]
LABELS = [[-100, 2, 3], [4], [-100, -100, 7, 8], [9, 10], [11, -100, 13]]


def saved(folder, table: pa.Table, files: int = 2, batch: int = 2):
    """A folder as `datasets.Dataset.save_to_disk` writes it."""
    folder.mkdir()
    names = [f"data-{n:05d}-of-{files:05d}.arrow" for n in range(files)]
    step = -(-len(table) // files)
    for n, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as out, pa.ipc.new_stream(out, table.schema) as to:
            for one in table.slice(n * step, step).to_batches(max_chunksize=batch):
                to.write_batch(one)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def columns(kind=pa.int32, **more) -> pa.Table:
    kind = kind() if callable(kind) else kind
    lists = (
        kind if isinstance(kind, pa.DataType) and pa.types.is_large_list(kind) else pa.list_(kind)
    )
    return pa.table({"input_ids": pa.array(ROWS, lists), **more})


def rows_of(found) -> list:
    return [found[i]["input_ids"].tolist() for i in range(len(found))]


@pytest.mark.parametrize("kind", [pa.int32, pa.int64, pa.uint16, pa.large_list(pa.int32())])
def test_a_saved_data_set_is_mapped(tmp_path, kind):
    table = columns(kind, labels=pa.array(LABELS), set=["a", "b", "c", "d", "e"])
    folder = saved(tmp_path / "set", table)
    found = open_tokens(folder, 4, keep=["set"])
    assert rows_of(found) == ROWS
    assert [found[i]["labels"].tolist() for i in range(5)] == LABELS
    assert found.column("set") == ["a", "b", "c", "d", "e"]
    assert len(found.parts) == 3
    assert found.source(3) == f"{folder / 'data-00001-of-00002.arrow'}, sequence 1"
    assert found.source(2).endswith("data-00000-of-00002.arrow, sequence 3")
    assert open_tokens(folder / "data-00001-of-00002.arrow")[1]["input_ids"].tolist() == ROWS[4]
    other = saved(tmp_path / "other", table, files=1, batch=5)
    assert data_fingerprint(open_tokens(other)) == data_fingerprint(found)
    # Nothing of the ids was copied.
    assert pa.total_allocated_bytes() < 4096


def test_parquet_and_arrow_files_are_the_same(tmp_path):
    table = columns(labels=pa.array(LABELS))
    pa.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as out,
        pa.ipc.new_file(out, table.schema) as to,
    ):
        to.write_table(table)
    found = [open_tokens(tmp_path / name) for name in ("a.parquet", "a.arrow")]
    for one in found:
        assert rows_of(one) == ROWS
        assert data_fingerprint(one) == data_fingerprint(found[0])
    assert found[0].source(0) == f"{tmp_path / 'a.parquet'}, sequence 1"
    fixed = pa.table({"input_ids": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int32(), 2))})
    assert rows_of(tokens_of([(tmp_path, fixed.slice(1))])) == [[3, 4], [5, 6]]
    assert rows_of(tokens_of([(tmp_path, table.slice(1, 3))])) == ROWS[1:4]


def test_masks_and_positions_are_read_others_are_named(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=4, n_layer=1, n_head=1,
                                       bos_token_id=0, eos_token_id=0))  # fmt: skip
    masks = [[0] * (len(row) > 2) + [1] * (len(row) - (len(row) > 2)) for row in ROWS]
    table = columns(attention_mask=pa.array(masks, pa.list_(pa.int8())))
    found = open_tokens(saved(tmp_path / "masks", table))
    with pytest.warns(Notice, match="1 have nothing"):
        assert Batches(found, model).lengths.tolist() == [2, 1, 3, 2, 2]
    with pytest.warns(Notice, match="left out completion_mask: of a sequence only input_ids, lab"):
        open_tokens(saved(tmp_path / "more", columns(completion_mask=pa.array(masks))))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            columns(labels=pa.array([*LABELS[:3], [1], [1, 2, 3]])),
            "sequence 4: labels and input_id",
        ),
        (pa.table({"input_ids": pa.array([[1], None])}), "sequence 2: has no input_ids"),
        (pa.table({"input_ids": pa.array([[1], [2, None]])}), "a value of input_ids is null"),
        (pa.table({"input_ids": pa.array([[0.5]])}), "input_ids holds list<.*double>, not lists"),
        (pa.table({"input_ids": pa.array([1, 2])}), "input_ids holds int64, not lists of integers"),
        (pa.table({"input_ids": pa.array([], pa.list_(pa.int32()))}), "the data set is empty"),
    ],
)
def test_wrong_columns_are_named(tmp_path, table, message):
    with pytest.raises(DataError, match=message):
        open_tokens(saved(tmp_path / "set", table, files=1, batch=2))


def test_folders_that_are_none_are_refused(tmp_path):
    folder = saved(tmp_path / "set", columns())
    with pytest.raises(DataError, match=r"00001-of-00002\.arrow, sequence .*|sequence 3: 4 tokens"):
        open_tokens(folder, 3)
    with pytest.raises(DataError, match="has no column 'set'; it has input_ids"):
        open_tokens(folder, keep=["set"])
    with pytest.raises(ArgumentError, match=r"ends and dtype are of a \.bin"):
        open_tokens(folder, dtype="uint16")
    both = tmp_path / "both"
    both.mkdir()
    (both / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    for split in ("train", "test"):
        saved(both / split, columns())
    for opened in (open_tokens, read):
        with pytest.raises(DataError, match="holds the splits test, train: give the folder of one"):
            opened(both)
    state = json.loads((folder / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"another order than in its files: .* flatten_indices"):
        open_tokens(folder)
    (folder / "state.json").write_text("[]")
    with pytest.raises(DataError, match="not the state of a saved data set"):
        open_tokens(folder)
    cut = saved(tmp_path / "cut", columns()) / "data-00000-of-00002.arrow"
    cut.write_bytes(cut.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"not a complete \.arrow file"):
        open_tokens(tmp_path / "cut")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(
        DataError, match=r"no tokens: a \.bin, or arrow, parquet or JSON lines with"
    ):
        open_tokens(tmp_path / "a.txt")
    for path in (tmp_path / "a.txt", tmp_path / "nothing", tmp_path):
        assert token_files(path) is None


def test_text_of_a_saved_data_set_is_read(tmp_path):
    table = pa.table({"text": ["one", "two", "three"], "set": ["a", "b", "a"], "other": [1, 2, 3]})
    folder = saved(tmp_path / "set", table)
    assert token_files(folder) is None
    records = read(folder, keep=["set"])
    assert [records[i]["text"] for i in range(3)] == ["one", "two", "three"]
    assert [records[i]["columns"] for i in range(3)] == [{"set": x} for x in "aba"]
    assert records.source(2) == f"{folder / 'data-00001-of-00002.arrow'}, row 1"
    talk = {"role": "user", "content": "Hello"}
    alone = saved(tmp_path / "talk", pa.table({"messages": [[talk]]}), files=1)
    assert read(alone / "data-00000-of-00001.arrow")[0]["messages"] == [talk]
    with pytest.raises(DataError, match=r"arrow: needs 'text', .* it has 'body'"):
        read(saved(tmp_path / "wrong", pa.table({"body": ["a"]}), files=1))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, its tokenizer, a question, and the same sequences as a .bin and as a data set."""
    folder = tmp_path_factory.mktemp("place")
    tokenizer = bpe()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=8, n_layer=1, n_head=2,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "asked.jsonl").write_text('{"prompt": "The quick brown", "completion": " fox jumps"}')
    ids = np.array(tokenizer(TEXT)["input_ids"])[:160]
    ids.astype(np.uint16).tofile(folder / "train.bin")
    rows = pa.table({"input_ids": ids.reshape(10, 16).tolist(), "set": [*"ababababab"]})
    saved(folder / "set", rows)
    return folder


def command(folder, *words, ok=True):
    done = CliRunner().invoke(app, [*map(str, words)])
    assert (done.exit_code == 0) == ok, done.output
    return done.output


@pytest.mark.parametrize("corpus", ["train.bin", "set"])
def test_the_commands_take_them(place, corpus):
    model, data, out = place / "model", place / corpus, place / f"{corpus} run"
    command(place, "fit", model, data, "--out", out / "factors", "--context", 16)
    asked = (model, out / "factors", place / "asked.jsonl", data, "--context", 16)
    command(place, "score", *asked, "--out", out / "whole")
    said = command(place, "score", *asked, "--out", out / "best", "--top-k", 3)
    whole, best = Scores(out / "whole"), Scores(out / "best")
    assert best.top(0, 3) == whole.top(0, 3)
    assert not list((out / "best").glob("*.npy"))
    assert corpus in said or "arrow" in said
    command(place, "report", out / "best", data, "--out", out / "report.html")
    assert "sequence " in (out / "report.html").read_text()
    words = ("--by", "set") if corpus == "set" else ()
    command(place, "table", out / "whole", data, "--out", out / "whole.parquet", *words)
    command(place, "table", out / "best", data, "--out", out / "best.parquet")
    assert len(pa.parquet.read_table(out / "best.parquet")) == 3
    found = pa.parquet.read_table(out / "whole.parquet").to_pydict()
    assert len(found["index"]) == 10
    assert found["read_from"][9].endswith("sequence 10" if corpus == "train.bin" else "sequence 5")
    if corpus == "set":
        assert found["set"] == [*"ababababab"]
        plain = Scores(place / "train.bin run" / "whole").matrix
        assert plain.tobytes() == whole.matrix.tobytes()


def test_what_they_cannot_take_is_said(place):
    data, out = place / "set", place / "no"
    said = command(place, "fit", place / "model", data, "--out", out, "--context", 8, ok=False)
    assert "16 tokens, but the context is 8" in " ".join(said.split())
    fields = ("--fields", "text=body")
    said = command(place, "fit", place / "model", data, "--out", out, *fields, ok=False)
    assert "needs 'body'; it has 'input_ids', 'set'" in " ".join(said.split())


def test_text_beside_tokens_is_read_as_text(tmp_path):
    both = saved(tmp_path / "both", columns(text=["a", "b", "c", "d", "e"]))
    assert token_files(both) is not None
    assert not are_tokens(both)
    assert read(both)[4]["text"] == "e"
    assert rows_of(open_tokens(both)) == ROWS
    assert are_tokens(saved(tmp_path / "alone", columns()))


def test_json_lines_are_read_as_columns_are(tmp_path):
    table = columns(pa.int64(), labels=pa.array(LABELS), set=pa.array(["a", "b", "a", "b", "a"]))
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    lines = [
        json.dumps({"input_ids": x, "labels": y, "set": s, "beside": {"x": []}})
        for x, y, s in zip(ROWS, LABELS, "ababa", strict=True)
    ]
    text = "\n".join(["", *lines[:2], "", *lines[2:]]).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    (folder := tmp_path / "folder").mkdir()
    (folder / "1.jsonl").write_text("\n".join(lines[:3]))
    (folder / "2.jsonl").write_text("\n".join(lines[3:]))
    expected = open_tokens(tmp_path / "a.parquet", 4, keep=["set"])
    for path in (tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz", folder):
        assert are_tokens(path)
        found = open_tokens(path, 4, keep=["set"])
        assert rows_of(found) == ROWS
        assert [*found.column("set")] == [*expected.column("set")]
        assert data_fingerprint(found) == data_fingerprint(expected)
    assert found.source(3) == f"{folder / '2.jsonl'}, sequence 1"
    late = [{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}]
    for rows, lacking in ((late, 1), (late[::-1], 2)):
        (tmp_path / "late.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(DataError, match=rf"late\.jsonl, sequence {lacking}: has no labels"):
            open_tokens(tmp_path / "late.jsonl", 4)
    (tmp_path / "text.jsonl").write_text('{"text": "a", "input_ids": [1]}')
    assert not are_tokens(tmp_path / "text.jsonl")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        pytest.param('{"input_ids": [1, 2.5]}', "to int64", id="no whole number"),
        pytest.param('{"input_ids": [1]}\n{"labels": [1]}', "sequence 2: has no", id="gap"),
        pytest.param('{"input_ids": [1]}\n{"input_ids": [1', "JSON parse error", id="cut off"),
        pytest.param('{"input_ids": 3}', "JSON lines of token ids", id="no list"),
        pytest.param('{"input_ids": [1], "labels": [1, 2]}', "labels and input_ids", id="lengths"),
        pytest.param('{"input_ids": [1, null]}', "a value of input_ids is null", id="null"),
        pytest.param('{"input_ids": [1], "set": []}', "only texts and numbers", id="a list kept"),
    ],
)
def test_json_lines_that_are_no_tokens_are_refused(lines, message, tmp_path):
    (path := tmp_path / "a.jsonl").write_text(lines)
    keep = ["set"] if "set" in lines else []
    with pytest.raises(DataError, match=message) as told:
        open_tokens(path, keep=keep)
    assert str(path) in str(told.value)
