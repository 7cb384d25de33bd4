"""Both sides of the smallest case, as the command runs them, and what the rows hold."""

import pytest

import against_kronfluence
from measure.rows import read


@pytest.mark.filterwarnings("ignore")
def test_stages_of_a_case(tmp_path, capsys, monkeypatch):
    out = tmp_path / "new" / "rows.jsonl"
    words = ["--smoke", "--cases", "mlp", "--repeats", "1", "--threads", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["against_kronfluence.py", *words])
    against_kronfluence.main()
    shown = capsys.readouterr().out
    rows = {row.quantity: row for row in read(out)}
    steps = ["covariance", "eigenvalue correction", "pairwise, rank 32, svd_lowrank"]
    total = rows.pop("pipeline without eigendecomposition")
    for way in ("kronfluence", "ours"):
        assert total.seconds[way] == sum(rows[name].seconds[way] for name in steps)
    for name, row in rows.items():
        assert f"mlp           {name} " in shown
        assert row.samples == {way: [seconds] for way, seconds in row.seconds.items()}
        assert row.error < (1e-3 if "pairwise, rank" not in name else 1)
        assert row.shape == {"train": 32, "queries": 8, "train_batch": 8, "query_batch": 4}
        assert row.environment["kronfluence"]
        assert ("spearman" in row.details) == (name.startswith(("self", "pairwise")))
