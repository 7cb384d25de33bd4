"""The bench of eigenvectors in bf16, on a model that is hardly one."""

import numpy as np
import pytest

import stored_eigenvectors
from ekfac_fast.cli import demo_small


def test_a_line_for_each_rank(tmp_path, monkeypatch, capsys):
    sizes = ("VOCABULARY", 512), ("LAYERS", 1), ("WIDTH", 32), ("HEADS", 2)
    for name, value in sizes:
        monkeypatch.setattr(demo_small, name, value)
    monkeypatch.setattr(demo_small, "QUERIES", demo_small.QUERIES[:2])
    stored_eigenvectors.main(["--steps", "1", "--topics", "1", "--folder", str(tmp_path / "demo")])
    said = capsys.readouterr().out
    assert "in bf16" in said
    lines = [x.split("|")[1:-1] for x in said.splitlines() if x.startswith("|")][2:]
    assert [x[0].strip() for x in lines] == ["full", "32"]
    assert all(float(x[1]) > 0.9 for x in lines)


def test_the_error_is_of_what_is_rounded():
    exact = np.arange(12.0).reshape(2, 6)
    assert stored_eigenvectors.told(exact, exact) == ["1.000000", "1.000000", "0.0e+00"]
    mean, least, error = stored_eigenvectors.told(exact, exact * 1.1)
    assert (mean, least) == ("1.000000", "1.000000")
    assert float(error) == pytest.approx(0.1)
