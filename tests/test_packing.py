"""Documents packed into sequences: each sequence's score is the sum of its documents'."""

import json

import numpy as np
import pytest
import torch
from dense_ekfac import asked, close, llama
from test_processes import write_inputs
from typer.testing import CliRunner

from ekfac_fast import Scores, fit, prepare_queries, score
from ekfac_fast.cli import app
from ekfac_fast.data import DataError, Tokens, pack
from ekfac_fast.errors import ArgumentError

LENGTHS = [9, 4, 3, 12, 2, 2, 8, 7, 5]


@pytest.fixture
def documents() -> Tokens:
    """Sequences of those lengths, of two sets."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 40, sum(LENGTHS)).astype(np.int32)
    rows = np.stack([np.cumsum(LENGTHS), np.arange(len(LENGTHS)), [0] * len(LENGTHS)], 1)
    records = [{"source": f"a.jsonl:{i + 1}", "set": "AB"[i > 2]} for i in range(len(LENGTHS))]
    return Tokens(records, ids, rows, 0, 0, 0, "a tokenizer")


def test_documents_in_their_order(documents):
    packed = pack(documents, 16)
    own = [[*packed.documents(i)] for i in range(len(packed))]
    assert own == [[0, 1, 2], [3, 4, 5], [6, 7], [8]]
    first = packed[0]
    assert first["position_ids"].tolist() == [*range(9), *range(4), *range(3)]
    assert (first["labels"] == -100).nonzero().flatten().tolist() == [0, 9, 13]
    assert torch.equal(first["input_ids"][9:13], documents[1]["input_ids"])
    assert packed.source(1) == "a.jsonl:4 and 2 more, to a.jsonl:6"
    assert packed.source(3) == "a.jsonl:9"
    assert packed.record(0) is None
    assert packed.record(3)["set"] == "B"
    assert packed.column("set") == ["A", "B", "B", "B"]
    assert packed.tokenizer_fingerprint == "a tokenizer"
    with pytest.raises(DataError, match=r"a\.jsonl:1 and 3 more.* differ in 'set'"):
        pack(documents, 28).column("set")
    with pytest.raises(ArgumentError, match=r"a\.jsonl:4 has 12 tokens, but the context is 11"):
        pack(documents, 11)


def test_scores_are_sums_of_documents(documents, tmp_path):
    torch.manual_seed(0)
    model = llama(torch.float64).eval()
    packed = pack(documents, 16)
    factors = fit(model, packed, out=tmp_path / "f")
    queries = prepare_queries(model, factors, asked(2), rank=None)

    def scores(data):
        out = tmp_path / f"s{len(data)}"
        return torch.tensor(score(model, queries, data, out=out, batch_tokens=40).matrix)

    whole, alone = scores(packed), scores(documents)
    sums = [alone[:, [*packed.documents(i)]].sum(1) for i in range(len(packed))]
    close(whole, torch.stack(sums, 1), 1e-7)  # Llama's norms and attention compute in fp32


def test_commands_pack(tmp_path):
    home = write_inputs(tmp_path / "inputs")
    model, corpus = str(home / "model"), str(home / "corpus.jsonl")

    def run(*words: object) -> str:
        found = CliRunner().invoke(app, [*map(str, words)])
        assert found.exit_code == 0, found.output
        return found.output

    more = ("--context", 48, "--packed")
    told = run("fit", model, corpus, "--out", home / "factors", *more)
    lines = len((home / "corpus.jsonl").read_text().splitlines())
    assert f"of at most 48 tokens, of {lines} documents" in told
    asks = ("score", model, home / "factors", home / "queries.jsonl", corpus)
    run(*asks, "--out", home / "scores", *more)
    assert Scores(home / "scores").matrix.shape[1] < lines
    assert json.loads((home / "scores" / "run.json").read_text())["cutting"]["packed"]
    run("report", home / "scores", corpus, "--out", home / "report.html")
    assert (home / "report.html").stat().st_size > 10_000
    np.arange(200, dtype=np.uint16).tofile(home / "ids.bin")
    words = ("fit", model, home / "ids.bin", "--out", home / "other", "--packed")
    found = CliRunner().invoke(app, [*map(str, words)])
    assert found.exit_code == 1
    assert "ids.bin holds tokens: its sequences are made" in " ".join(found.output.split())
