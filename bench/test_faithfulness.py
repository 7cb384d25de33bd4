"""A bank of tiny models from one command: continued, the same again, and a page."""

import json

import numpy as np

import faithfulness
from pages.faithfulness_page import page
from ways.small_language_model import FineTuning, sequences

SMALL = (
    "--runs 8 --seeds 1 --epochs 1 --sequences 32 --queries 3 --width 16 --blocks 1 --processes 1"
)


def made(folder, *only):
    """Rows and the page."""
    words = [*SMALL.split(), "--only", *only, "--work", folder, "--page", folder / "page.md"]
    faithfulness.main([str(x) for x in words])
    told = json.loads((folder / "faithfulness.json").read_text())
    return told, (folder / "page.md").read_text()


def test_one_command_from_text_to_page(tmp_path):
    told, text = made(tmp_path, "no model", "no curvature", "rank")
    names = [row["name"] for row in told["rows"]]
    assert names[:4] == ["random", "TF-IDF", "BM25", "last hidden states"]
    assert "rank 8" in names
    for row in told["rows"]:
        mean, low, high = row["lds"]
        assert low <= mean <= high
        assert f"| {row['name']} | {mean:.3f} ({low:.3f} to " in text
    bank = {p.name: p.read_bytes() for p in (tmp_path / "bank").iterdir()}
    again, _ = made(tmp_path, "no model", "no curvature", "rank")
    assert again["rows"] == told["rows"]
    assert bank == {p.name: p.read_bytes() for p in (tmp_path / "bank").iterdir()}


def test_a_page_tells_the_ceiling():
    facts = {"ceiling": 0.8125, "parameters": 1, "examples": 2, "queries": 3, "subsets": 4,
             "share": 0.5, "seeds": 2, "epochs": 1, "fine_tuned": False,
             "additivity": None, "train_loss": 1.0,
             "query_loss": 2.0, "machine": "m", "date": "d", "revision": "r",
             "command": "c"}  # fmt: skip
    assert "nothing could reach more than 0.812." in page([], facts)
    assert "no ceiling is known" in page([], facts | {"ceiling": None})
    assert "correlates 0.875 over queries" in page([], facts | {"additivity": 0.875})


def test_fine_tuning_leaves_out_of_a_batch_and_changes_nothing_else(tmp_path):
    data, queries, rest = sequences(64, 8, tmp_path / "sequences.json")
    assert not {str(x["input_ids"]) for x in data + queries} & {str(x["input_ids"]) for x in rest}
    training = FineTuning(data, 4)
    every = np.arange(64)
    whole = [(set(some), size) for some, size in training.batches(every, 0)]
    less = [(set(some), size) for some, size in training.batches(np.delete(every, [3, 40]), 0)]
    assert less == [(some - {3, 40}, size) for some, size in whole]


def test_the_published_protocol_from_one_command(tmp_path):
    words = [*SMALL.split(), "--fine-tune", "--rest", "16", "--epochs-before", "1"]
    words += ["--only", "no model", "refined", "--refined", "cg:1", "--refined-layers", "all"]
    faithfulness.main([*words, "--work", str(tmp_path), "--page", str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    assert "8 subsets with 99% of the data" in text
    assert "from one model of the rest of the text" in text
    assert "| cg:1, all |" in text
    assert "Removals add up" in text


def test_how_alike_scores_are():
    to = np.array([[1.0, 2.0, 2.0], [3.0, 0.0, 4.0]])
    assert faithfulness.likeness(to, to) == {"spearman": 1.0, "error": 0.0}
    found = faithfulness.likeness(np.array([[3.0, 6.0, 6.0], [-3.0, 0.0, -4.0]]), to)
    assert found == {"spearman": 0.0, "error": 2.0}
