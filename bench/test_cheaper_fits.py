"""The bench of cheaper fits, on a model that is hardly one."""

import numpy as np
import pytest

import cheaper_fits
from ekfac_fast.cli import demo_small


def test_a_line_for_each_fit_and_rank(tmp_path, monkeypatch, capsys):
    sizes = ("VOCABULARY", 512), ("LAYERS", 1), ("WIDTH", 32), ("HEADS", 2)
    for name, value in sizes:
        monkeypatch.setattr(demo_small, name, value)
    monkeypatch.setattr(demo_small, "QUERIES", demo_small.QUERIES[:2])
    cheaper_fits.main(["--steps", "1", "--topics", "1", "--folder", str(tmp_path / "demo")])
    said = capsys.readouterr().out
    lines = [[y.strip() for y in x.split("|")[1:-1]] for x in said.splitlines() if "|" in x][2:]
    assert [x[0] for x in lines[::2]] == [*cheaper_fits.fits(8)]
    assert [x[3] for x in lines] == ["full", "32"] * (len(lines) // 2)
    whole, rounded = (
        next(x for x in lines if x[0] == n) for n in ("whole", "eigenvectors in bf16")
    )
    assert whole[4:] == ["1.000000", "1.000000", "0.0e+00"]
    assert float(rounded[2]) <= float(whole[2]) / 2 + 0.1
    assert float(rounded[4]) > 0.9


def test_the_error_is_of_what_is_rounded():
    exact = np.arange(12.0).reshape(2, 6)
    assert cheaper_fits.told(exact, exact) == ["1.000000", "1.000000", "0.0e+00"]
    mean, least, error = cheaper_fits.told(exact, exact * 1.1)
    assert (mean, least) == ("1.000000", "1.000000")
    assert float(error) == pytest.approx(0.1)
