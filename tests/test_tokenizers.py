"""A tokenizer belongs to its corpus: told from others, kept with results, asked for by a report."""

import json
from pathlib import Path

import pytest
import torch
from test_data import TEXT, bpe, jsonl
from torch.utils.data import Subset
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from ekfac_fast import fit, prepare_queries, score, self_scores
from ekfac_fast.data import read, read_queries, tokenize
from ekfac_fast.data.encoding import tokenizer_fingerprint
from ekfac_fast.data.examples import example
from ekfac_fast.errors import ArgumentError, DataError, StoreError
from ekfac_fast.report.collect import check_together


def other():
    """A tokenizer with the same vocabulary, of which two ids are exchanged."""
    tokenizer = bpe()
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    words = rules["model"]["vocab"]
    words["A"], words["B"] = words["B"], words["A"]
    tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(rules))
    return tokenizer


def model(words=400):
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=words, n_positions=16)
    return GPT2LMHeadModel(config).eval()


def test_a_fingerprint_is_of_all_that_ids_depend_on(tmp_path: Path) -> None:
    tokenizer = bpe()
    name = tokenizer_fingerprint(tokenizer)
    tokenizer(["short", TEXT], truncation=True, max_length=5)  # leaves its settings
    assert tokenizer_fingerprint(tokenizer) == name
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == name
    assert len({name, tokenizer_fingerprint(bpe(bos=True)), tokenizer_fingerprint(other())}) == 3

    class Slow:
        def __init__(self, *words: str) -> None:
            self.words = {word: at for at, word in enumerate(words)}

        def get_vocab(self) -> dict[str, int]:
            return self.words

    assert tokenizer_fingerprint(Slow("a", "b")) == tokenizer_fingerprint(Slow("a", "b"))
    assert tokenizer_fingerprint(Slow("a", "b")) != tokenizer_fingerprint(Slow("b", "a"))
    assert tokenizer_fingerprint(str.split) is None


def test_another_tokenizer_is_refused_by_every_step(tmp_path: Path) -> None:
    net, texts = model(), jsonl(tmp_path / "c.jsonl", *(f'{{"text": "fox {i}"}}' for i in range(6)))
    asked = jsonl(tmp_path / "q.jsonl", '{"prompt": "The quick", "completion": " fox"}')
    corpus = [tokenize(read(texts), t, 16) for t in (bpe(), other())]
    queries = [read_queries(asked, t, 16) for t in (bpe(), other())]
    assert torch.equal(corpus[0][2]["input_ids"], corpus[1][2]["input_ids"])  # no A, and no B
    factors = fit(net, corpus[0], out=tmp_path / "f")
    prepared = prepare_queries(net, factors, queries[0], rank=2)
    for step in (
        lambda: prepare_queries(net, factors, queries[1], rank=2),
        lambda: score(net, prepared, corpus[1], out=tmp_path / "s"),
        lambda: self_scores(net, factors, corpus[1], out=tmp_path / "s"),
        lambda: score(net, prepared, Subset(corpus[1], [3, 1]), out=tmp_path / "s"),
        lambda: prepare_queries(net, factors, queries[0], rank=2, refine="cg:1", dataset=corpus[1]),
    ):
        with pytest.raises(ArgumentError, match=r"on a tokenizer of fingerprint \w+, this one's"):
            step()
    with pytest.raises(StoreError, match="tokenizer: stored"):
        fit(net, corpus[1], out=tmp_path / "f")
    scores = score(net, prepared, corpus[0], out=tmp_path / "s")
    check_together(scores, factors, prepared, corpus[0], bpe())
    for tokenizer, data in ((other(), corpus[0]), (other(), corpus[1]), (bpe(bos=True), corpus[0])):
        with pytest.raises(StoreError, match=r"^the tokenizer: not what was scored"):
            check_together(scores, factors, prepared, data, tokenizer)


def test_a_subset_knows_where_its_examples_are_from(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "c.jsonl", '{"text": "aa"}', '{"text": "The quick brown fox"}')
    part = Subset(Subset(tokenize(read(path), bpe(), 16), [1, 0]), [0])
    with pytest.raises(DataError, match=r"example 0 \(.*c\.jsonl, line 2\): token id \d+ at"):
        example(part, 0, vocab_size=3)


def test_an_id_that_the_model_does_not_have_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "c.jsonl", '{"text": "aa"}', "", '{"text": "The quick brown fox"}')
    data = tokenize(read(path), bpe(), 16)
    with pytest.raises(DataError, match=rf"example 1 \({path}, line 3\): token id \d+ at position"):
        fit(model(300), data, out=tmp_path / "f")
