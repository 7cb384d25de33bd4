"""Influence by depth, against sums by hand; the study and its command on a small model."""

import json

import fact_world
import numpy as np
import pytest
from typer.testing import CliRunner

from ekfac_fast.cli import app
from ekfac_fast.errors import ArgumentError, DataError
from ekfac_fast.stages.fit import fit
from ekfac_fast.stages.queries import Queries
from ekfac_fast.stages.scan import score
from ekfac_fast.studies import layers
from ekfac_fast.studies.depth import profiles, read_questions
from ekfac_fast.studies.overlap import overlaps
from ekfac_fast.studies.scored import LayerScores


def ids(*rows):
    return [{"input_ids": row} for row in rows]


def test_overlap_by_hand():
    data = ids([1, 2, 3], [1, 2, 2], [1, 9, 9], [1, 5, 6])
    found = overlaps(ids([2, 3, 3, 7], [1, 8]), data)
    idf = {n: np.log((4 - n + 0.5) / (n + 0.5) + 1) for n in range(5)}
    whole = idf[2] + idf[1] + idf[0]  # of tokens 2, 3 and 7, once each
    want = [[(idf[2] + idf[1]) / whole, idf[2] / whole, 0, 0], [idf[4] / (idf[4] + idf[0])] * 4]
    np.testing.assert_allclose(found, want, rtol=1e-12)


def scores(values):
    values = np.asarray(values, dtype=np.float64)
    return LayerScores(tuple(f"layer {n}" for n in range(len(values))), values)


def test_profiles_by_hand():
    """Each of two questions has all of its influence in one layer."""
    rng, N = np.random.default_rng(0), 30
    values = np.zeros((9, 2, N))
    values[0, 0], values[8, 1] = rng.random(N), rng.random(N)
    data = ids(*(rng.integers(0, 50, 12) for _ in range(N)))
    questions = ids([1, 2], [3, 4])
    found = profiles(scores(values), questions, data, ["low", "high"], ["a", "b"], top=5)
    low, high = found.questions
    assert (low.centre, high.centre) == (0, 1)
    assert low.shares == [1, *[0] * 8]
    assert high.shares == [*[0] * 8, 1]
    # Only its own third ranks as all layers do; of zeros the first in order come first.
    assert (low.kept["lower"], high.kept["upper"]) == (10, 10)
    assert low.kept["upper"] == np.isin(np.argsort(-values[0, 0])[:10], range(10)).sum()
    assert [x.kind for x in found.kinds] == ["a", "b"]
    shared = overlaps(questions, data)
    best = np.argsort(-values[8, 1])[:10]
    assert high.overlap["upper"] == pytest.approx(shared[1, best].mean())
    assert high.overlap["corpus"] == pytest.approx(shared[1].mean())


def test_a_third_ranks_as_if_the_other_layers_were_zero():
    rng = np.random.default_rng(1)
    values = rng.standard_normal((6, 1, 40))
    data, questions = ids(*([n, n + 1] for n in range(40))), ids([3, 7, 20])
    (whole,) = profiles(scores(values), questions, data, ["q"], ["k"], top=5).questions
    alone = values.copy()
    alone[:2] = alone[4:] = 0
    (middle,) = profiles(scores(alone), questions, data, ["q"], ["k"], top=5).questions
    assert whole.overlap["middle"] == middle.overlap["all"]
    assert middle.kept["middle"] == 10


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model that was hardly trained, its tokenizer, factors, corpus, and a folder."""
    folder, tokenizer = tmp_path_factory.mktemp("depth"), fact_world.word_tokenizer()
    texts = [*dict.fromkeys(fact_world.sentences())]
    model = fact_world.trained(tokenizer, texts, steps=5)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    fact_world.write(folder / "corpus.jsonl", [{"text": text} for text in texts])
    questions = [
        {"kind": kind, "name": name, "prompt": prompt, "completion": completion}
        for kind, name, prompt, completion in (
            ("fact", "mera", "the king of Mera is", " Anna Ames"),
            ("fact", "tolo", "the judge of Tolo is", " Bert Bohm"),
            ("idle", "sea", "the sea was", " calm that day"),
        )
    ]
    fact_world.write(folder / "questions.jsonl", questions)
    data = fact_world.tokens(tokenizer, texts)
    return model, tokenizer, fit(model, data, out=folder / "factors"), data, folder


def test_the_study_and_its_command(world):
    model, tokenizer, factors, data, folder = world
    file = folder / "questions.jsonl"
    found = layers(
        model, tokenizer, factors, data, out=folder / "out", file=file, top=20, rank=None
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "out/layers.jsonl").read_text().splitlines()]
    assert [x["question"] for x in rows] == [None, None, "mera", "tolo", "sea"]
    queries = Queries.load(folder / "out/queries")
    plain = score(model, queries, data, out=folder / "plain", per_layer=True)
    top = [detail.per_layer for detail in plain.details(2)]
    shares = np.mean([x / np.abs(x).sum() for x in top], axis=0)
    np.testing.assert_allclose(found.questions[2].shares, shares, atol=1e-4)
    np.testing.assert_allclose(rows[0]["centre"], (rows[2]["centre"] + rows[3]["centre"]) / 2, 1e-5)
    assert "fact: mera" in (folder / "out/layers.svg").read_text()
    words = ["study", "layers", folder / "model", folder / "factors", folder / "corpus.jsonl",
             "--out", folder / "again", "--file", file, "--top", 20, "--rank", 0]  # fmt: skip
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == 0, done.output
    assert f"{found.kinds[0].centre:.3f}" in done.output


def test_a_killed_scan_continues_and_bad_input_is_refused(world, tmp_path):
    model, tokenizer, factors, data, folder = world
    file = folder / "questions.jsonl"

    def killed(stage, done, total):
        if stage == "scan" and done > total / 3:
            raise KeyboardInterrupt

    given = (model, tokenizer, factors, data)
    settings = {"out": tmp_path / "out", "file": file, "top": 20, "batch_tokens": 64}
    with pytest.raises(KeyboardInterrupt):
        layers(*given, **settings, progress=killed)
    seen = []
    layers(*given, **settings, progress=lambda stage, done, total: seen.append(done / total))
    assert min(seen) > 1 / 3
    with pytest.raises(DataError, match="fewer than the top 500"):
        layers(*given, out=tmp_path / "a", file=file, top=500)
    lacking = fact_world.write(tmp_path / "q.jsonl", [{"prompt": "a", "completion": " b"}])
    with pytest.raises(DataError, match=r"q\.jsonl, line 1: has no 'kind'"):
        read_questions(lacking)
    with pytest.raises(ArgumentError, match="2 tracked layers"):
        profiles(scores(np.ones((2, 1, 12))), ids([1]), ids(*[[1, 2]] * 12), ["q"], ["k"])


def test_the_shipped_questions_are_of_four_kinds():
    kinds = [x["kind"] for x in read_questions()]
    assert [*dict.fromkeys(kinds)] == ["fact", "quotation", "code", "definition"]
    assert all(kinds.count(kind) == 4 for kind in kinds)
