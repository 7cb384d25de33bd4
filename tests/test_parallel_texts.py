"""Questions and paragraphs in several languages."""

import json

import fact_world
import numpy as np
import pytest

from ekfac_fast.cli.demo_small import train_tokenizer
from ekfac_fast.errors import DataError
from ekfac_fast.stages.fit import fit
from ekfac_fast.stages.queries import Queries
from ekfac_fast.stages.scan import score
from ekfac_fast.studies import languages
from ekfac_fast.studies.parallel import Languages, broken, read_parallel

WORDS = {
    "a": {"king": "king", "sea": "sea", "rain": "rain"},
    "b": {"king": "roi", "sea": "mer", "rain": "pluie"},
}


def lines():
    """Two languages of three topics."""
    found = []
    for topic in ("king", "sea", "rain"):
        for language in ("a", "b"):
            word, end = WORDS[language][topic], "red" if language == "a" else "rouge"
            found.append({"topic": topic, "language": language, "prompt": f"{word} {word} was",
                          "completion": f" {end}"})  # fmt: skip
            found.append({"topic": topic, "language": language, "text": f"{word} was {end} {end}"})
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    texts = [x.get("text", x.get("prompt", "") + x.get("completion", "")) for x in lines()] * 4
    tokenizer = fact_world.word_tokenizer(texts)
    model = fact_world.trained(tokenizer, texts, steps=10)
    return (
        model,
        tokenizer,
        fit(model, fact_world.tokens(tokenizer, texts), out=folder / "f"),
        folder,
    )


def test_influence_by_language(world):
    model, tokenizer, factors, folder = world
    file = fact_world.write(folder / "texts.jsonl", lines())
    found = languages(model, tokenizer, factors, out=folder / "out", file=file, rank=None)
    assert found.languages == ("a", "b")
    for at, name in enumerate("ab"):
        assert found.same[at, at] > found.other[at, at]
        assert found.across(name) == found.same[at, 1 - at] / found.same[at, at]
        assert found.across(name) < 1
        assert found.across(name, other=True) == found.other[at, 1 - at] / found.same[at, at]
    assert found.broken == {"a": 0, "b": 0}
    rows = [json.loads(x) for x in (folder / "out/languages.jsonl").read_text().splitlines()]
    assert rows[0]["across, on other topics"] == pytest.approx(
        found.other[0, 1] / found.same[0, 0], rel=1e-5
    )
    assert rows[0]["same topic"]["b"] == pytest.approx(found.same[0, 1], rel=1e-5)
    assert "language of the paragraph" in (folder / "out/languages.svg").read_text()


def test_the_matrix_is_by_question_and_by_paragraph(world, tmp_path):
    """Against scores of every pair, one at a time."""
    model, tokenizer, factors, _ = world
    file = fact_world.write(tmp_path / "texts.jsonl", lines())
    found = languages(model, tokenizer, factors, out=tmp_path / "out", file=file, rank=None)
    _, _, asks, texts = read_parallel(file)
    data = fact_world.tokens(tokenizer, [x["text"] for x in texts])
    matrix = score(model, Queries.load(tmp_path / "out/queries"), data, out=tmp_path / "s").matrix
    for q, asked in enumerate("ab"):
        for t, told in enumerate("ab"):
            pairs = [(i, j) for i, x in enumerate(asks) for j, y in enumerate(texts)
                     if (x["language"], y["language"]) == (asked, told)]  # fmt: skip
            same = [matrix[i, j] for i, j in pairs if asks[i]["topic"] == texts[j]["topic"]]
            other = [matrix[i, j] for i, j in pairs if asks[i]["topic"] != texts[j]["topic"]]
            assert (len(same), len(other)) == (3, 6)
            slack = 1e-4 * float(np.abs(matrix).max())
            assert found.same[q, t] == pytest.approx(np.mean(same), abs=slack)
            assert found.other[q, t] == pytest.approx(np.mean(other), abs=slack)


def test_broken_tokens_are_counted(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.txt").write_text("the sea was calm that day " * 20)
    tokenizer = train_tokenizer(tmp_path / "corpus", tmp_path / "model")
    english = fact_world.tokens(tokenizer, ["the sea was calm that day"])
    assert broken(english, range(1), tokenizer) == 0
    korean = fact_world.tokens(tokenizer, ["바다는"])  # three bytes a character, all alone
    assert broken(korean, range(1), tokenizer) == 1
    words = fact_world.word_tokenizer()
    half = fact_world.tokens(words, ["the unheard sea unheard"])
    assert broken(half, range(1), words) == 0.5


def test_a_ratio_needs_a_positive_unit():
    one = Languages(("a", "b"), np.array([[-1.0, 2.0], [1.0, 4.0]]), np.zeros((2, 2)), {}, {})
    assert np.isnan(one.across("a"))
    assert one.across("b") == 0.25


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x[:-1], "language 'b' has no parallel text of topic 'rain'"),
        (lambda x: [y for y in x if "prompt" not in y or y["topic"] != "sea"],
         "language 'a' has no question of topic 'sea'"),
        (lambda x: [y for y in x if y["language"] == "a"], "'a' is its only language"),
        (lambda x: [*x, x[-1]], "line 13: a second text of 'rain' in 'b'"),
        (lambda x: [*x, {"topic": "x", "text": "y"}], "line 13: has no 'language'"),
    ],
)  # fmt: skip
def test_languages_without_parallel_text_are_refused(change, said, tmp_path):
    with pytest.raises(DataError, match=said):
        read_parallel(fact_world.write(tmp_path / "t.jsonl", change(lines())))


def test_shipped_texts_are_complete():
    topics, names, asks, texts = read_parallel()
    assert names == ["en", "fr", "de", "es", "tr", "ko"]
    assert len(asks) == len(texts) == len(topics) * len(names) == 24
