"""docs/models.md says what bench/results/families.jsonl says; one family goes through the bench."""

import json
from pathlib import Path

import pytest

import families
from pages import family_table
from ways import family_models

RESULTS = Path(__file__).parent / "results" / "families.jsonl"


def test_the_page_says_what_was_measured():
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    assert not [row["class"] for row in rows if family_table.outcome(row) in ("wrong", "failed")]
    page = family_table.PAGE.read_text()
    for name, text in family_table.tables(rows).items():
        assert f"<!-- table:{name} -->\n\n{text}\n\n<!-- /table -->" in page


@pytest.mark.filterwarnings("ignore")
def test_a_family_is_right_and_an_error_is_seen(monkeypatch):
    names = dict(family_models.classes())
    assert names["GPT2LMHeadModel"] == "gpt2"
    row = families.family("GPT2LMHeadModel", "gpt2")
    assert family_table.outcome(row) == "right"
    assert row["default"]["layers"] == 4
    true = families.gradients
    monkeypatch.setattr(
        families, "gradients", lambda *args: {n: 1.001 * g for n, g in true(*args).items()}
    )
    assert family_table.outcome(families.family("GPT2LMHeadModel", "gpt2")) == "wrong"
