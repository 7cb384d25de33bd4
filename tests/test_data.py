"""Examples, batches and readers on real files and a real byte-level BPE tokenizer."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ekfac_fast.data import read, read_queries, tokenize
from ekfac_fast.data.examples import example
from ekfac_fast.errors import ArgumentError, DataError, Notice

TEXT = "The quick brown fox jumps over the lazy dog. A context manager is used by with. " * 30


def lengths(dataset) -> list[int]:
    return [len(dataset[i]["input_ids"]) for i in range(len(dataset))]


def bpe(bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained here; with `bos` it begins every text with <s>, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=8)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bpe()


def ids(values: list[int]) -> list[dict]:
    return [{"input_ids": values}]


def jsonl(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_json_lines_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "first \xc3\xa9"}\r\n\n{"prompt": "p", "completion": "c", "id": 3}\n'
        b'{"text": "last, without a line end"}'
    )
    records = read(path)
    assert len(records) == 3
    assert records[2] == {"text": "last, without a line end", "source": f"{path}, line 4"}
    assert records[0] == {"text": "first é", "source": f"{path}, line 1"}
    assert records[1] == {"prompt": "p", "completion": "c", "source": f"{path}, line 3"}
    assert records[-1] == records[2]
    with pytest.raises(IndexError):
        records[3]
    path.write_text('{"content": "x"}\n')
    assert read(path, fields={"text": "content"})[0]["text"] == "x"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a",}', r"line 2: malformed JSON \(.*column 14\)"),
        (b'{"text": "a"', r"line 2: malformed JSON \(Expecting"),
        (b'["a"]', "line 2: holds a list, not an object"),
        (
            b'{"txt": "a", "id": 1}',
            "line 2: needs 'text', 'messages', or .*; it has 'txt'",
        ),
        (b"{}", "line 2: .*; it has nothing"),
        (b'{"prompt": "a"}', "line 2: needs .*; it has 'prompt'"),
        (b'{"text": 7}', "line 2: 'text' is a int, not a string"),
        (b'{"text": "\xff"}', r"line 2: not UTF-8 \(invalid start byte\)"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    records = read(path)
    assert [records[0]["text"], records[2]["text"]] == ["fine", "fine"]
    with pytest.raises(DataError, match=f"corpus.jsonl, {message}"):
        records[1]


def test_text_by_file_paragraph_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\none\ntwo\n  \n\nthree\r\nfour\n\n\nfive")
    whole = read(path)
    assert [r["source"] for r in whole] == [str(path)]
    assert whole[0]["text"] == "\n\none\ntwo\n  \n\nthree\nfour\n\n\nfive"
    paragraphs = [(r["text"], r["source"]) for r in read(path, split="paragraph")]
    assert paragraphs == [
        ("one\ntwo", f"{path}, line 3"),
        ("three\nfour", f"{path}, line 7"),
        ("five", f"{path}, line 11"),
    ]
    assert [r["text"].strip() for r in read(path, split="line")] == [
        "one",
        "two",
        "three",
        "four",
        "five",
    ]
    lines = jsonl(tmp_path / "b.jsonl", json.dumps({"text": "one"}))
    with pytest.raises(ArgumentError, match=r"split is 'line': .*b\.jsonl holds no \.txt"):
        read(lines, split="line")
    path.write_bytes(b"fine\nfine\n\xff\n")
    with pytest.raises(DataError, match=r"a\.txt, line 3: not UTF-8"):
        read(path)[0]


def test_parquet_by_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"document {i}" for i in range(10)]
    table = pa.table({"id": range(10), "text": texts})
    pa.parquet.write_table(table, path, row_group_size=3)
    records = read(path)
    assert [records[i]["text"] for i in (9, 0, 5, 4)] == [texts[i] for i in (9, 0, 5, 4)]
    assert records[3]["source"] == f"{path}, row 4"
    assert len(records) == 10
    pa.parquet.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(DataError, match=r"a\.parquet, row 2: 'text' is a NoneType"):
        read(path)[1]
    pa.parquet.write_table(pa.table({"body": ["a"]}), path)
    with pytest.raises(DataError, match=r"a\.parquet: needs .* it has 'body'"):
        read(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.parquet: not a complete parquet file"):
        read(path)


def row(text: str) -> bytes:
    return (json.dumps({"text": text}) + "\n").encode()


def test_folder_holds_all_kinds_by_name(tmp_path: Path) -> None:
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    (corpus / "sub").mkdir(parents=True)
    other.mkdir()
    (corpus / "a.txt").write_text("1\n")
    jsonl(corpus / "b.jsonl", '{"text": "2"}', '{"text": "3"}')
    (corpus / "c.JSONL").write_bytes(row("4"))
    (corpus / "d.json").write_bytes(row("5") + row("6"))
    (corpus / "e.json").write_text(json.dumps([{"text": "7"}, {"text": "8"}], indent=1))
    (corpus / "f.jsonl.gz").write_bytes(gzip.compress(row("9")))
    with pa.output_stream(corpus / "g.jsonl.zst", compression="zstd") as file:
        file.write(row("10"))
    (other / "x.jsonl").write_bytes(row("11"))
    (corpus / "linked").symlink_to(other)
    (other / "again").symlink_to(corpus)  # a circle
    pa.parquet.write_table(pa.table({"text": ["12"]}), corpus / "sub" / "c.parquet")
    (corpus / "notes.md").write_text("not read")
    (corpus / ".hidden.txt").write_text("not read")
    with pytest.warns(Notice, match=r"left out notes\.md: not of a kind"):
        records = read(corpus)
    assert [int(r["text"]) for r in records] == list(range(1, 13))
    assert records[8]["source"] == f"{corpus / 'f.jsonl.gz'}, line 1"
    assert records[7]["source"] == f"{corpus / 'e.json'}, item 2"
    (tmp_path / "notes.md").write_text("not read")
    for missing, message in [
        (tmp_path / "absent", "absent: no such file or folder"),
        (tmp_path / "notes.md", r"notes\.md: cannot be read; .*\.jsonl, \.json, \.txt, \.csv"),
    ]:
        with pytest.raises(DataError, match=message):
            read(missing)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="empty: no file of a kind"):
        read(empty)
    (empty / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="empty: holds no record"):
        read(empty)


def test_chunks_hold_every_token_once(tokenizer, tmp_path: Path) -> None:
    texts = [TEXT, "The lazy dog.", TEXT[:333]]
    path = jsonl(tmp_path / "c.jsonl", *(json.dumps({"text": t}) for t in texts))
    seen: list[int] = []
    tokens = tokenize(read(path), tokenizer, 16, progress=seen.append)
    assert seen == [1, 2, 3]
    assert max(lengths(tokens)) == 16
    assert (tokens.truncated, tokens.dropped, tokens.skipped) == (0, 0, 0)
    joined = [i for n in range(len(tokens)) for i in tokens[n]["input_ids"].tolist()]
    assert joined == [i for t in texts for i in tokenizer(t, verbose=False)["input_ids"]]
    assert tokenizer.decode(joined) == "".join(texts)
    assert tokens[0]["labels"].equal(tokens[0]["input_ids"])
    chunks = -(-len(tokenizer(TEXT, verbose=False)["input_ids"]) // 16)
    assert tokens.source(0) == f"{path}, line 1"
    assert tokens.source(1) == f"{path}, line 1, chunk 2"
    assert tokens.source(chunks) == f"{path}, line 2"
    assert tokens.source(-1).startswith(f"{path}, line 3, chunk ")
    assert tokens[-1]["input_ids"].equal(tokens[len(tokens) - 1]["input_ids"])
    with pytest.raises(IndexError):
        tokens[len(tokens)]


def test_more_records_than_are_tokenized_at_once(tokenizer) -> None:
    records = [{"text": f"fox {i} dog"} for i in range(600)]
    tokens = tokenize(records, tokenizer, 32)
    assert [tokenizer.decode(tokens[i]["input_ids"]) for i in range(600)] == [
        r["text"] for r in records
    ]
    assert tokens.source(599) == "record 599"


def test_a_last_chunk_of_one_token_is_dropped(tokenizer) -> None:
    text = tokenizer(TEXT, verbose=False)["input_ids"][:9]
    record = {"text": tokenizer.decode(text)}
    assert tokenizer(record["text"])["input_ids"] == text
    tokens = tokenize([record], tokenizer, 4)
    assert lengths(tokens) == [4, 4]
    assert (tokens.truncated, tokens.dropped) == (1, 1)


def test_truncation_is_counted_or_refused(tokenizer) -> None:
    records = [{"text": TEXT, "source": "book, page 7"}, {"text": "The lazy dog."}]
    tokens = tokenize(records, tokenizer, 16, on_long="truncate")
    total = len(tokenizer(TEXT, verbose=False)["input_ids"])
    assert len(tokens) == 2
    assert tokens[0]["input_ids"].tolist() == tokenizer(TEXT, verbose=False)["input_ids"][:16]
    assert (tokens.truncated, tokens.dropped) == (1, total - 16)
    with pytest.raises(DataError, match=f"book, page 7: {total} tokens, but the context is 16"):
        tokenize(records, tokenizer, 16, on_long="refuse")


def test_every_example_begins_with_the_bos_of_the_tokenizer() -> None:
    tokenizer = bpe(bos=True)
    tokens = tokenize([{"text": TEXT}, {"prompt": "The", "completion": " fox"}], tokenizer, 16)
    assert all(tokens[i]["input_ids"][0] == 0 for i in range(len(tokens)))
    rest = [i for n in range(len(tokens) - 1) for i in tokens[n]["input_ids"][1:].tolist()]
    assert tokenizer.decode(rest) == TEXT
    assert max(lengths(tokens)) == 16
    last = tokens[-1]
    assert last["input_ids"].tolist() == tokenizer("The fox")["input_ids"]
    assert (last["labels"] == -100).tolist() == [True] * 2 + [False] * (len(last["labels"]) - 2)
    assert tokenize([{"text": " fox"}], tokenizer, 16)[0]["labels"][0] == 0
    own = tokenize([{"text": f"<s>{TEXT}"}], tokenizer, 16)
    assert [x["input_ids"].tolist() for x in own] == [
        x["input_ids"].tolist() for x in list(tokens)[:-1]
    ]
    with pytest.raises(ValueError, match="a context of 2 tokens is too short"):
        tokenize([{"text": "a"}], tokenizer, 2)


def test_empty_text_is_refused_or_skipped(tokenizer, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "c.jsonl", '{"text": "The fox"}', '{"text": ""}', '{"text": "a"}')
    with pytest.raises(DataError, match=r"c\.jsonl, line 2: nothing to predict: its text has 0"):
        tokenize(read(path), tokenizer, 16)
    tokens = tokenize(read(path), tokenizer, 16, on_empty="skip")
    assert (len(tokens), tokens.skipped) == (1, 2)  # "a": one token, nothing before it
    with pytest.raises(DataError, match="nothing to predict in 1 records"):
        tokenize([{"text": ""}], tokenizer, 16, on_empty="skip")


def test_records_that_no_file_held_are_checked(tokenizer) -> None:
    with pytest.raises(DataError, match=r"record 1: needs .* it has 'body'"):
        tokenize([{"text": "The fox"}, {"body": "x"}], tokenizer, 16)
    with pytest.raises(DataError, match="record 0: holds a str"):
        tokenize(["The fox"], tokenizer, 16)


def test_queries_mask_their_prompt(tokenizer, tmp_path: Path) -> None:
    queries = [("The lazy", " dog."), ("What is a con", "text manager"), ("", "The fox jumps")]
    path = jsonl(
        tmp_path / "q.jsonl",
        *(json.dumps({"prompt": p, "completion": c}) for p, c in queries),
    )
    tokens = read_queries(path, tokenizer, 32)
    # A token that reaches over the border is the completion's.
    measured = [" dog.", " context manager", "The fox jumps"]
    for i, (prompt, completion) in enumerate(queries):
        row, labels = tokens[i]["input_ids"], tokens[i]["labels"]
        assert row.tolist() == tokenizer(prompt + completion)["input_ids"]
        assert tokenizer.decode(row[labels != -100]) == measured[i]
        assert tokens.source(i) == f"{path}, line {i + 1}"
        assert example(tokens, i, vocab_size=len(tokenizer)).targets >= 1


def test_a_completion_keeps_its_very_characters(tmp_path: Path) -> None:
    """SentencePiece puts a space before a text: not before a completion that has none."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", *[f"<0x{i:02X}>" for i in range(256)]]
    backend.train_from_iterator(
        ["2+2=4 the quick brown fox"] * 3,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    path = jsonl(tmp_path / "q.jsonl", json.dumps({"prompt": "2+2=", "completion": "4"}))
    row = read_queries(path, fast, 64)[0]
    pieces = fast.convert_ids_to_tokens(row["input_ids"])
    assert "".join(pieces) == "▁2+2=4"
    assert pieces[-1] == "4"
    assert (row["labels"] >= 0).tolist() == [*[False] * (len(pieces) - 1), True]


def test_half_a_character_is_named(tokenizer, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "c.jsonl", '{"text": "a"}', '{"text": "a \\ud83d b"}')
    with pytest.raises(DataError, match=r"c\.jsonl, line 2: 'text' holds half of a character"):
        tokenize(read(path), tokenizer, 16)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "The fox", "completion": ""}', "its completion has 0 tokens after"),
        ('{"prompt": "", "completion": ""}', "its completion has 0 tokens"),
        ('{"prompt": "", "completion": "a"}', "its completion has 1 tokens"),
        ('{"prompt": "The fox"}', "needs 'messages', or 'prompt' and .*; it has 'prompt'"),
        ('{"text": "The fox"}', "needs 'messages', or 'prompt' and .*; it has 'text'"),
        (json.dumps({"prompt": TEXT, "completion": "x"}), "tokens, but the context is 32"),
        ('{"prompt": "The fox", "completion": "x"', "malformed JSON"),
    ],
)
def test_wrong_queries_are_named(tokenizer, tmp_path: Path, line: str, message: str) -> None:
    path = jsonl(tmp_path / "q.jsonl", '{"prompt": "The", "completion": " fox"}', line)
    with pytest.raises(DataError, match=f"q.jsonl, line 2: .*{message}"):
        read_queries(path, tokenizer, 32)


def test_plain_text_holds_no_queries(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("The fox")
    with pytest.raises(DataError, match=r"q\.txt: needs 'messages', or .* it has 'text'"):
        read_queries(tmp_path / "q.txt", tokenizer, 32)


def test_a_prompt_that_fills_the_context_leaves_nothing(tokenizer) -> None:
    records = [{"prompt": TEXT, "completion": " fox"}, {"prompt": "The", "completion": TEXT}]
    with pytest.raises(DataError, match=r"record 0: .*of its prompt, the context is 16"):
        tokenize(records, tokenizer, 16)
    tokens = tokenize(records, tokenizer, 16, on_empty="skip")
    assert (len(tokens), tokens.skipped, tokens.truncated) == (1, 1, 1)
    assert lengths(tokens) == [16]
    assert tokens.source(0) == "record 1"


def test_what_is_not_installed_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": ["a"]}), path)
    code = (
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name: None if name == 'pyarrow' else find(name)\n"
        "from ekfac_fast.data import read\n"
        "absent = {'pyarrow', 'transformers', 'tokenizers', 'scipy'} & set(sys.modules)\n"
        "assert not absent, absent\n"
        "read(sys.argv[1])\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert "MissingExtra: pyarrow.parquet is not installed: pip install 'ekfac-fast[hf]'" in (
        run.stderr
    )
