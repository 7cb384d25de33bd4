"""Laws of a tail, against laws that are known; what TF-IDF keeps; the command."""

import json

import fact_world
import numpy as np
import pytest
from typer.testing import CliRunner

from ekfac_fast.cli import app
from ekfac_fast.errors import DataError
from ekfac_fast.report.statistics import NoFit, power_law
from ekfac_fast.stages.fit import fit
from ekfac_fast.studies.tails import compared, tails

DRAWS = 99


def fitted(x, tail=500):
    law = power_law(x, tail=tail, draws=DRAWS)
    return law, compared(np.sort(x)[-tail:], law)


def test_a_power_law_is_told_from_an_exponential():
    rng = np.random.default_rng(0)
    law, against = fitted(1 + rng.pareto(1.5, 5000))
    assert abs(law.alpha - 2.5) < 0.25
    assert against["exponential"].ratio > 50
    assert against["exponential"].p_value < 0.01
    # The others hold power laws as their limits.
    assert all(abs(against[name].ratio) < 3 for name in ("Weibull", "log-normal"))


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (lambda rng: rng.exponential(3.0, 5000), "exponential"),
        (lambda rng: 2 * rng.weibull(0.5, 5000), "Weibull"),
        (lambda rng: rng.lognormal(0, 0.5, 5000), "log-normal"),
    ],
)
def test_other_laws_are_likelier_where_they_are_true(draw, name):
    law, against = fitted(draw(np.random.default_rng(1)), 2000)
    assert against[name].ratio < -3
    assert law.p_value < 0.1


def test_likelihoods_are_those_of_scipy_and_their_maximum():
    """Of an exponential the likeliest rate is known; units change nothing."""
    x = np.sort(np.random.default_rng(2).exponential(3.0, 400))
    law, against = fitted(x, 200)
    tail = x[-200:]
    own = np.log((law.alpha - 1) / law.xmin) - law.alpha * np.log(tail / law.xmin)
    mean = (tail - law.xmin).mean()
    other = -np.log(mean) - (tail - law.xmin) / mean
    assert against["exponential"].ratio == pytest.approx((own - other).sum(), rel=1e-6)
    scaled = fitted(1e-6 * x, 200)[1]
    for name, one in against.items():
        assert scaled[name].ratio == pytest.approx(one.ratio, rel=1e-3, abs=1e-3)


def words(*rows):
    return [{"input_ids": list(row)} for row in rows]


def test_what_the_filter_keeps_and_how_many_it_stands_for():
    """20 of 400 sequences share the question's words; the best that do not are unreachable."""
    rng, N = np.random.default_rng(3), 400
    scores = np.sort(rng.random(N))[::-1]
    data = words(*([1, 2] if 10 <= n < 30 else [3, 4] for n in range(N)))
    found = tails(scores[None], words([1, 2, 5]), data, ["q"], candidates=20, draws=DRAWS)
    (one,) = found.questions
    assert one.filtered == 0
    assert one.tenth == scores[19]
    assert isinstance(one.law, type(power_law(scores, draws=DRAWS)))
    assert scores[19] >= one.law.xmin
    assert one.needed == pytest.approx(one.law.scan_for(10, scores[19]))
    assert one.top_percent == pytest.approx(scores[:4].sum() / scores.sum())
    few = tails(scores[None, :60], words([1, 2, 5]), data[:60], ["q"], candidates=20, draws=DRAWS)
    assert isinstance(few.questions[0].law, NoFit)
    assert few.questions[0].needed == pytest.approx(10 / (20 / 60))
    assert few.questions[0].against == {}


def test_sequences_that_were_never_scanned_do_not_count():
    rng = np.random.default_rng(4)
    scores = rng.pareto(1.5, 600)
    data, questions = words(*([1 + n % 7, 9] for n in range(600))), words([1, 2])
    part = np.where(np.arange(600) < 400, scores, np.nan)
    cut = tails(part[None], questions, data, ["q"], candidates=400, draws=DRAWS)
    alone = tails(scores[None, :400], questions, data[:400], ["q"], candidates=400, draws=DRAWS)
    assert cut.questions[0].law == alone.questions[0].law
    assert cut.questions[0].top_percent == alone.questions[0].top_percent


def test_what_does_not_fit_is_refused():
    data = words(*[[1, 2]] * 12)
    with pytest.raises(DataError, match=r"scores are \[1, 12\], but there are 2 questions"):
        tails(np.ones((1, 12)), words([1], [2]), data, ["a", "b"])
    for count in (9, 13):
        with pytest.raises(DataError, match=f"{count} candidates of 12 sequences"):
            tails(np.ones((1, 12)), words([1]), data, ["a"], candidates=count)


def test_the_command_reads_a_folder_of_scores(tmp_path):
    tokenizer = fact_world.word_tokenizer()
    texts = [*dict.fromkeys(fact_world.sentences())]
    model = fact_world.trained(tokenizer, texts, steps=5)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    fact_world.write(tmp_path / "corpus.jsonl", [{"text": text} for text in texts])
    question = {"name": "sea", "prompt": "the sea was", "completion": " calm that day"}
    fact_world.write(tmp_path / "q.jsonl", [question])
    fit(model, fact_world.tokens(tokenizer, texts), out=tmp_path / "factors")

    def run(*words):
        return CliRunner().invoke(app, [str(tmp_path / x) if x in names else str(x) for x in words])

    names = ("model", "factors", "corpus.jsonl", "q.jsonl", "scores", "out")
    done = run("score", "model", "factors", "q.jsonl", "corpus.jsonl", "--out", "scores")
    assert done.exit_code == 0, done.output
    done = run("study", "tail", "scores", "corpus.jsonl", "--out", "out", "--draws", 19)
    assert done.exit_code == 0, done.output
    (row,) = map(json.loads, (tmp_path / "out/tail.jsonl").read_text().splitlines())
    assert row["sequences"] == len(texts)
    assert row["question"] == "sea"
    assert "sea" in (tmp_path / "out/tail.svg").read_text()
    fact_world.write(tmp_path / "corpus.jsonl", [{"text": text} for text in texts[::-1]])
    done = run("study", "tail", "scores", "corpus.jsonl", "--out", "out")
    assert done.exit_code == 1
    assert "the corpus: not what was scored" in " ".join(done.output.split())
