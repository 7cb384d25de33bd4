"""`write_report`: the page of the command line, from what the API returns."""

import json

import pytest
from test_data import bpe
from transformers import GPT2Config, GPT2LMHeadModel

from ekfac_fast import Factors, Queries, Scores, fit, prepare_queries, score, write_report
from ekfac_fast.data import read, read_queries, tokenize
from ekfac_fast.errors import ArgumentError, StoreError

TEXTS = [f"The {a} fox jumps over the {b} dog." for a in ("quick", "brown") for b in "xyz"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A model, its tokenizer, a corpus with sources, factors, queries and the folder."""
    folder, tokenizer = tmp_path_factory.mktemp("job"), bpe()
    rows = [{"text": x, "from": f"set {n % 2} <b>"} for n, x in enumerate(TEXTS)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=len(tokenizer), n_positions=64, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    data = tokenize(read(folder / "corpus.jsonl", keep=["from"]), tokenizer, 64)
    asked = read_queries([{"prompt": "The quick", "completion": " fox"}] * 2, tokenizer, 64)
    factors = fit(model, data, out=folder / "f")
    queries = prepare_queries(model, factors, asked, out=folder / "q", damping="0.2x")
    return model, tokenizer, data, factors, queries, folder


def test_the_page_has_what_was_found(job, tmp_path):
    model, tokenizer, data, _, queries, folder = job
    score(model, queries, data, out=tmp_path / "s", per_token=True)
    again = Scores(tmp_path / "s"), Queries.load(folder / "q"), Factors(folder / "f")
    out = write_report(
        tmp_path / "r.html", *again, data, tokenizer, by="from", names=["one <i>", "two"],
        model="a small one", notes=["said beside"],
    )  # fmt: skip
    page = out.read_text()
    for said in ("one &lt;i&gt;", "two", "a small one", "said beside", "corpus.jsonl, line 1",
                 "set 0 &lt;b&gt;", "0.2 x the mean eigenvalue", "scan the corpus"):  # fmt: skip
        assert said in page, said
    assert "one <i>" not in page
    assert "set 0 <b>" not in page
    assert "query 1" in write_report(tmp_path / "d.html", *again, data, tokenizer).read_text()


def test_what_does_not_belong_together_is_refused(job, tmp_path):
    model, tokenizer, data, factors, queries, folder = job
    plain = score(model, queries, data, out=tmp_path / "plain")
    scores = score(model, queries, data, out=tmp_path / "s", per_layer=True)
    other = tokenize([{"text": x[:-2]} for x in TEXTS], tokenizer, 64)
    out = tmp_path / "r.html"
    for arguments, error, message in (
        ((plain, queries, factors, data), ArgumentError, "no details .* score with per_token=True"),
        ((scores, queries, factors, [dict(x) for x in data]), ArgumentError, "tokenize"),
        ((scores, queries, factors, other), StoreError, "the corpus: not what was scored"),
        ((scores, queries, str(folder / "f"), data), ArgumentError, r"factors is .*Factors\("),
    ):
        with pytest.raises(error, match=message):
            write_report(out, *arguments, tokenizer)
    with pytest.raises(ArgumentError, match="names are 1, the queries 2"):
        write_report(out, scores, queries, factors, data, tokenizer, names=["one"])
    assert not out.exists()
