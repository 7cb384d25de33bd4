"""The line that says how far scores can be trusted: of a scan, after a validation, in a report."""

from dataclasses import replace

import numpy as np
import pytest
from dense_ekfac import asked, corpus, gpt2
from typer.testing import CliRunner

from ekfac_fast import fit, prepare_queries, score, self_scores
from ekfac_fast.cli import app
from ekfac_fast.errors import StoreError
from ekfac_fast.report import render
from ekfac_fast.report.contents import RunFacts
from ekfac_fast.stages.scores import Scores
from ekfac_fast.stages.trust import SPARSE, Trust, note_validation, sparsity
from ekfac_fast.validation import retrain


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model, data, factors, folder)"""
    folder, model, data = tmp_path_factory.mktemp("trust"), gpt2(), corpus()
    return model, data, fit(model, data, out=folder / "f"), folder


def test_scores_tell_what_was_left_out(made):
    model, data, factors, folder = made
    queries = prepare_queries(model, factors, asked(), rank=2)
    scores = score(model, queries, data, out=folder / "s", per_token=True)
    least = min(float(x.energy.min()) for x in queries.layers)
    trust = scores.trust
    assert trust.energy == least < 0.99
    assert (trust.least_damping, trust.most_damping) == (min(queries.damping), max(queries.damping))
    every = [d for q in range(3) for d in scores.details(q)]
    assert trust.sparse == np.mean([sparsity(d.per_token) > SPARSE for d in every])
    assert trust.line == (
        f"rank 2 keeps at least {least:.0%} of a gradient's energy; damping "
        f"{trust.least_damping:.2g} to {trust.most_damping:.2g}; not refined; {trust.sparse:.0%} "
        "of the top sequences rest on one or two tokens; not held against retraining"
    )


def test_refined_queries_of_full_rank(made):
    model, data, factors, folder = made
    queries = prepare_queries(model, factors, asked(), rank=None, refine="cg:2", dataset=data)
    trust = score(model, queries, data, out=folder / "refined").trust
    assert trust.residual == float(queries.residual.max())
    assert trust.line.startswith("full rank; damping ")
    assert f"refined by cg:2, residual at most {trust.residual:.1e}; not held" in trust.line
    assert trust.sparse is None


def test_self_influence_and_older_folders_have_none(made):
    model, data, factors, folder = made
    assert self_scores(model, factors, data, out=folder / "self").trust is None


def test_a_validation_is_noted_by_the_command(made):
    model, data, factors, folder = made
    scores = score(model, prepare_queries(model, factors, asked()), data, out=folder / "v")
    matrix = np.array(scores.matrix)

    def train(indices, seed):
        return -matrix[:, indices].sum(1)

    retrain(folder / "b", train, data, asked(), subsets=9, measure=lambda model: model)
    words = ["validate", str(folder / "b"), str(folder / "v")]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    expected = f"LDS 1.000 (1.000 to 1.000), 3 queries, 9 retrainings of {folder / 'b'}"
    assert Scores(folder / "v").trust.validation == expected
    assert Scores(folder / "v").trust.line.endswith(expected)
    assert np.array_equal(Scores(folder / "v").matrix, matrix)
    again = score(model, prepare_queries(model, factors, asked()), data, out=folder / "v")
    assert again.trust.validation == expected
    with pytest.raises(StoreError, match="holds 'bank', not 'scores'"):
        note_validation(folder / "b", "x")


def test_a_report_begins_with_it():
    facts = RunFacts("m", ("a",), (0.1,), "rule", 8, 1, 1, 1, 1, trust="rank 8 & <no> more")
    assert '<p class="muted">rank 8 &amp; &lt;no&gt; more</p>' in render(facts, [])
    assert "rank 8 &amp;" not in render(replace(facts, trust=""), [])


def test_a_line_without_anything_special():
    assert Trust(8, 0.5, 0.1, 0.1, None, None).line == (
        "rank 8 keeps at least 50% of a gradient's energy; damping 0.1 to 0.1; not refined; not "
        "held against retraining"
    )
