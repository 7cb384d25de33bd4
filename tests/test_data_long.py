"""Texts too long to be tokenised at once: the same tokens, piece by piece."""

import random

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from ekfac_fast.data import encoding, read, tokenize

WORDS = [
    "one",
    "two",
    " ",
    "  ",
    "\n",
    "three-four",
    "naïve",
    "日本",
    "🙂",
    "1234",
    "don't",
    "aaaaaa",
]


@pytest.fixture(scope="module")
def tokenizer():
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator([" ".join(WORDS)] * 20, vocab_size=400, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer)


def text(seed, words=3000):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


@pytest.mark.parametrize("seed", range(5))
def test_pieces_join_to_the_whole(tokenizer, monkeypatch, seed):
    (whole,) = encoding.encoded(tokenizer, [text(seed)], ends=True)
    calls = []

    def counted(texts, **more):
        calls.append(max(map(len, texts)))
        return tokenizer(texts, **more)

    counted.is_fast = True
    for name, value in {"PIECE": 1000, "OVERLAP": 300, "AGREED": 8}.items():
        monkeypatch.setattr(encoding, name, value)
    assert encoding.encoded(counted, [text(seed)], ends=True) == [whole]
    assert max(calls) == 1000
    # Nothing to agree on: a token of any length may begin anywhere.
    assert encoding.encoded(counted, ["a" * 5000]) == encoding.encoded(tokenizer, ["a" * 5000])


def test_a_long_record_is_read_once(tokenizer, monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text(text(0))
    data = tokenize(read(tmp_path / "a.txt"), tokenizer, 16)
    monkeypatch.setattr(type(data.records), "__getitem__", None)
    assert data.source(3) == f"{tmp_path / 'a.txt'}, chunk 4"
