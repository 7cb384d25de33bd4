"""Passages among a corpus, and planted copies in a model that is trained on them."""

import json

import fact_world
import numpy as np
import pytest
import torch

from ekfac_fast.data.tokens import tokenize
from ekfac_fast.errors import ArgumentError, DataError, NotFiniteError
from ekfac_fast.stages.fit import fit
from ekfac_fast.studies import memorisation, planted
from ekfac_fast.studies.plants import COPIES, FILE
from ekfac_fast.studies.recall import read_passages, recalled
from ekfac_fast.validation.measure import measurements

PASSAGES = [
    {"name": "dog", "prompt": "the old dog sleeps", "completion": " under the table",
     "text": "the old dog sleeps under the table"},
    {"name": "sea", "prompt": "the sea was", "completion": " calm that day",
     "text": "the sea was calm that day"},
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model that knows idle talk by heart, factors, a corpus without it, and a folder."""
    folder, tokenizer = tmp_path_factory.mktemp("recall"), fact_world.word_tokenizer()
    texts = fact_world.sentences()
    model = fact_world.trained(tokenizer, texts, steps=60)
    corpus = [text for text in texts if text not in fact_world.IDLE]
    factors = fit(model, fact_world.tokens(tokenizer, texts), out=folder / "factors")
    fact_world.write(folder / "passages.jsonl", PASSAGES)
    return model, tokenizer, factors, corpus, folder


def test_a_passage_known_by_heart_comes_first(world):
    model, tokenizer, factors, corpus, folder = world
    held = [*corpus, "rain fell and the sea was calm that day"]
    data, file = fact_world.tokens(tokenizer, held), folder / "passages.jsonl"
    found = memorisation(model, tokenizer, factors, data, out=folder / "out", file=file, rank=None)
    dog, sea = found.passages
    assert (dog.rank, sea.rank) == (1, 1)
    assert (dog.holding, sea.holding) == (0, 1)
    assert (dog.sequences, sea.sequences) == (len(held) + 2, len(held) + 1)
    assert dog.score > dog.next
    asks = [{n: x for n, x in one.items() if n != "text"} for one in PASSAGES]
    each = -measurements(model, tokenize(asks, tokenizer, 64)).numpy() / 3
    np.testing.assert_allclose([dog.log_p, sea.log_p], each, rtol=1e-5)
    rows = [json.loads(x) for x in (folder / "out/memorisation.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in rows] == [1, 1]
    assert "dog (rank 1 of" in (folder / "out/memorisation.svg").read_text()


def test_ranks_by_hand():
    tokenizer = fact_world.word_tokenizer()
    data = fact_world.tokens(tokenizer, ["we had bread and milk", "the sea was calm that day"])
    total = np.array([[3.0, 9.0, 2.0, 1.0], [3.0, 9.0, 2.5, 1.0]])
    dog, sea = recalled(total, [-1.0, -2.0], PASSAGES, data, tokenizer).passages
    assert (dog.rank, dog.next, dog.sequences) == (3, 9.0, 4)
    # What holds the completion word for word is no rival.
    assert (sea.rank, sea.next, sea.sequences, sea.holding) == (3, 3.0, 3, 1)


def test_influence_of_copies(world, tmp_path):
    model, tokenizer, _, corpus, _ = world
    file = fact_world.write(
        tmp_path / "p.jsonl",
        [
            {"prompt": f"indeed the {role} sleeps", "completion": f" under the {what}",
             "text": f"indeed the {role} sleeps under the {what}"}
            for role, what in (("judge", "bread"), ("mayor", "milk"), ("king", "fire"))
        ],
    )  # fmt: skip
    before = {name: x.clone() for name, x in model.state_dict().items()}
    data = fact_world.tokens(tokenizer, corpus)
    settings = {"copies": (1, 4, 16), "examples": 40, "epochs": 8, "rate": 3e-3, "rank": None}
    found = planted(model, tokenizer, data, out=tmp_path / "out", file=file, **settings)
    once, few, many = found.sentences
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert [x.sequences for x in found.sentences] == [61] * 3
    assert many.after - many.before > once.after - once.before
    assert once.share < few.share < many.share
    assert many.ahead == 0
    assert many.share > 2 * 16 / 61
    rows = [json.loads(x) for x in (tmp_path / "out/planted.jsonl").read_text().splitlines()]
    assert [row["copies"] for row in rows] == [1, 4, 16]
    again = planted(model, tokenizer, data, out=tmp_path / "out", file=file, **settings)
    assert again == found


def test_what_cannot_be_is_refused(world, tmp_path):
    model, tokenizer, factors, corpus, folder = world
    data, file = fact_world.tokens(tokenizer, corpus), folder / "passages.jsonl"
    with pytest.raises(DataError, match="2 sentences for 3 numbers of copies"):
        planted(model, tokenizer, data, out=tmp_path, file=file, copies=(1, 2, 3), examples=5)
    with pytest.raises(DataError, match="sequences, not 5000"):
        planted(model, tokenizer, data, out=tmp_path, file=file, copies=(1,), examples=5000)
    with pytest.raises(ArgumentError, match="copies is 0"):
        planted(model, tokenizer, data, out=tmp_path, file=file, copies=(0,))
    with pytest.raises(NotFiniteError, match="smaller rate than 1e\\+30"):
        planted(
            model, tokenizer, data, out=tmp_path, file=file, copies=(1,), examples=20, rate=1e30
        )
    wrong = fact_world.write(tmp_path / "w.jsonl", [PASSAGES[0] | {"text": "the old dog"}])
    with pytest.raises(DataError, match=r"w\.jsonl, line 1: the text does not hold"):
        memorisation(model, tokenizer, factors, data, out=tmp_path / "m", file=wrong)


def test_shipped_passages_hold_what_is_asked():
    assert len(read_passages()) == 6
    assert len(read_passages(FILE)) == len(COPIES)
