"""Sums of many batches keep what fp32 loses."""

import torch
from dense_ekfac import corpus, gpt2

from ekfac_fast import fit
from ekfac_fast.curvature.sums import Sum
from ekfac_fast.stages import sums
from ekfac_fast.store.files import load_tensors


def test_small_batches_after_a_large_sum_are_not_lost():
    large, small, count = 2.0**24, 0.75, 4096
    plain = torch.full((3,), large)
    kept = Sum(torch.zeros(3), torch.full((3,), large))
    for batch in range(count):
        plain += small
        kept.rest += small
        if batch % 64 == 63:
            kept.fold()
    exact = large + small * count
    assert plain[0] != exact  # each rounds to the next even number, or to nothing
    assert torch.equal(kept.value().double(), torch.full((3,), exact).double())


def test_what_a_fold_rounds_away_stays():
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(500, 100, generator=generator) * 10 ** torch.linspace(4, -4, 500)[:, None]
    kept = Sum.zero(100, dtype=torch.float32, device=torch.device("cpu"))
    for x in terms:
        kept.rest += x
        kept.fold()
    exact = terms.double().sum(0)
    error = (kept.value() - exact).abs().max() / exact.abs().max()
    assert error < 1e-7 < (terms.cumsum(0)[-1] - exact).abs().max() / exact.abs().max() * 10


def test_a_fit_of_many_batches_folds_and_continues_bitwise(tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "BATCHES_A_FOLD", 3)
    model, data = gpt2().eval(), corpus(20)
    whole = fit(model, data, out=tmp_path / "whole", batch_tokens=16)
    monkeypatch.setattr("ekfac_fast.store.folder.Pace.due", True)
    for stop in (5, 8, 31):
        heard = []

        def told(*_, heard=heard, stop=stop):
            heard.append(0)
            if len(heard) == stop:
                raise KeyboardInterrupt

        try:
            fit(model, data, out=tmp_path / "killed", batch_tokens=16, progress=told)
        except KeyboardInterrupt:
            continue
    again = fit(model, data, out=tmp_path / "killed", batch_tokens=16)
    for name in whole:
        assert torch.equal(whole[name].lam, again[name].lam)
    exact = fit(gpt2(torch.float64).eval(), data, out=tmp_path / "fp64")
    for side in ("activation", "gradient"):
        file = f"{side}_covariance.safetensors"
        got, want = (load_tensors(f.folder / file) for f in (whole, exact))
        for name, x in want.items():
            assert (got[name] - x).abs().max() < 1e-5 * x.abs().max()
