"""Word order: groups of sequences against a question, as an API and as a command."""

import json

import fact_world
import numpy as np
import pytest
from typer.testing import CliRunner

from ekfac_fast.cli import app
from ekfac_fast.errors import ArgumentError, DataError
from ekfac_fast.stages.factors import Factors
from ekfac_fast.stages.fit import fit
from ekfac_fast.stages.queries import Queries
from ekfac_fast.stages.scan import score
from ekfac_fast.studies import word_order
from ekfac_fast.studies.ordering import GROUPS, read_facts
from ekfac_fast.studies.scored import layer_scores


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model that has read facts in both orders, its tokenizer, its factors, and a folder."""
    folder, tokenizer = tmp_path_factory.mktemp("world"), fact_world.word_tokenizer()
    texts = fact_world.sentences()
    model = fact_world.trained(tokenizer, texts)
    factors = fit(model, fact_world.tokens(tokenizer, texts), out=folder / "factors")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    fact_world.write(folder / "facts.jsonl", fact_world.astro_facts())
    return model, tokenizer, factors, folder


@pytest.fixture(scope="module")
def found(world):
    model, tokenizer, factors, folder = world
    return word_order(
        model, tokenizer, factors, out=folder / "out", file=folder / "facts.jsonl", rank=None
    )


def test_the_papers_ordering_holds_where_a_is_b_was_learned(found):
    """(1) > (3) > (2), (4); (5) ~ (6), far below (1)."""
    for fact in ("king of Astro", "mayor of Astro"):
        assert all(found.ordering(fact).values()), {g: found.ratio(fact, g) for g in GROUPS}
        assert found.ratio(fact, "prompt first") == 1
        assert abs(found.ratio(fact, "irrelevant")) < 0.05


def test_scores_are_those_of_a_scan(world, found, tmp_path):
    model, tokenizer, _, folder = world
    texts = [x["text"] for x in fact_world.astro_facts() if "group" in x]
    queries, data = Queries.load(folder / "out/queries"), fact_world.tokens(tokenizer, texts)
    plain = score(model, queries, data, out=tmp_path / "plain").matrix
    by_layer = layer_scores(model, queries, data, out=tmp_path / "layers", batch_tokens=16)
    np.testing.assert_allclose(by_layer.total, plain, rtol=1e-4, atol=1e-4 * np.abs(plain).max())
    assert len(by_layer.values) == 6
    own = [
        s for (fact, _), scores in found.scores.items() if fact == "mayor of Astro" for s in scores
    ]
    np.testing.assert_allclose(own, plain[1, -len(own) :], rtol=1e-4, atol=1e-4 * max(own))


def test_files_and_command_say_what_was_found(world, found):
    folder = world[-1]
    rows = [json.loads(x) for x in (folder / "out/word-order.jsonl").read_text().splitlines()]
    means = {(x["fact"], x["group"]): x["mean"] for x in rows if "mean" in x}
    for (fact, group), mean in means.items():
        own = [x["score"] for x in rows if (x["fact"], x["group"]) == (fact, group) and "text" in x]
        assert mean == pytest.approx(np.mean(own), rel=1e-4, abs=1e-3)
    drawn = (folder / "out/word-order.svg").read_text()
    assert all(words in drawn for words in (*GROUPS, "king of Astro"))
    words = ["study", "word-order", folder / "model", folder / "factors", "--out",
             folder / "again", "--file", folder / "facts.jsonl", "--rank", 0]  # fmt: skip
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    assert f"{found.ratio('king of Astro', 'order flipped'):.3f}" in done.output
    again = [json.loads(x) for x in (folder / "again/word-order.jsonl").read_text().splitlines()]
    assert [x["group"] for x in again] == [x["group"] for x in rows]


def test_the_papers_facts_ship_with_the_package():
    facts = read_facts()
    assert facts.groups == list(GROUPS)
    assert all(len(lines) == 6 for lines in facts.sequences.values())
    assert facts.questions["gleem"]["completion"] == " hydrogenium and oxium"
    forwards = facts.sequences["president", "prompt first"]
    assert sum("was Zorald Pfaff" in line["text"] for line in forwards) >= 4
    for line in facts.sequences["president", "order flipped"]:
        assert line["text"].index("Zorald") < line["text"].index("Astrobia")


QUESTION = {"fact": "x", "prompt": "the king of Astro is", "completion": " Anna Ames"}
FIRST = {"fact": "x", "group": "prompt first", "text": "the king of Astro is Anna Ames"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([QUESTION, FIRST, FIRST | {"group": "y", "text": " "}], r"line 3: text is ' '"),
        ([QUESTION, FIRST | {"group": "y"}], "'x' has no sequence in group 'prompt first', which"),
        ([QUESTION, FIRST, FIRST | {"group": "y"}, QUESTION | {"fact": "z"}, FIRST | {"fact": "z"}],
         "'z' has no sequence in group 'y'"),
        ([FIRST], "fact 'x' has no question"),
        ([QUESTION], "'x' has no sequence in group"),
        ([QUESTION, QUESTION, FIRST], "line 2: fact 'x' has a question already"),
        ([QUESTION, {"fact": "x", "text": "a"}], "line 2: has no 'group'"),
        ([{"group": "y", "text": "a"}], "line 1: has no 'fact'"),
        ([QUESTION | {"completion": 3}, FIRST], "line 1: completion is 3"),
        ([QUESTION, ["x"]], "line 2: is .'x'., expected an object"),
        ([], "is empty"),
    ],
)  # fmt: skip
def test_files_that_say_too_little_are_refused(rows, said, tmp_path):
    with pytest.raises(DataError, match=said):
        read_facts(fact_world.write(tmp_path / "facts.jsonl", rows))


def test_another_reference_and_other_errors(world, tmp_path):
    model, tokenizer, factors, folder = world
    group = {"fact": "x", "group": "mine", "text": "the king of Astro is Anna Ames"}
    file = fact_world.write(tmp_path / "own.jsonl", [QUESTION, group])
    own = word_order(model, tokenizer, factors, out=tmp_path / "o", file=file, reference="mine")
    assert [x.ratio for x in own.groups] == [1]
    long = group | {"text": "bread " * 600}
    file = fact_world.write(tmp_path / "long.jsonl", [QUESTION, group, long])
    with pytest.raises(DataError, match=r"long\.jsonl, line 3: 600 tokens, but the context is"):
        word_order(model, tokenizer, factors, out=tmp_path / "p", file=file, reference="mine")
    with pytest.raises(DataError, match="no such file"):
        word_order(model, tokenizer, factors, out=tmp_path / "q", file=tmp_path / "none.jsonl")
    with pytest.raises(ArgumentError, match="what fit returns"):
        word_order(model, tokenizer, folder, out=tmp_path / "q")
    other = fact_world.trained(tokenizer, fact_world.IDLE, steps=1)
    with pytest.raises(ArgumentError, match="model"):
        word_order(other, tokenizer, Factors(folder / "factors"), out=tmp_path / "q")


def test_what_stands_before_is_read_with_every_sequence(world, tmp_path):
    model, tokenizer, factors, _ = world
    name = {"fact": "x", "group": "name", "text": "Anna Ames is famous"}
    rows = [QUESTION, FIRST, name]
    longer = [QUESTION, *(x | {"text": f"indeed {x['text']}"} for x in rows[1:])]
    given = (model, tokenizer, factors)
    plain, before, written = (
        word_order(*given, out=tmp_path / out, file=fact_world.write(tmp_path / f"{out}.jsonl", x),
                   before=words)
        for out, x, words in (("a", rows, ""), ("b", rows, "indeed "), ("c", longer, ""))
    )  # fmt: skip
    assert before.scores == written.scores
    # Nothing predicts the first name at the start of a text.
    assert before.ratio("x", "name") > 1.5 * plain.ratio("x", "name")
