"""The bench of experts' rows, on a small block: what is timed adds up to the same."""

import torch

import expert_rows


def test_the_same_sums_however_rows_are_padded(monkeypatch):
    monkeypatch.setattr(expert_rows, "HIDDEN", 16)
    monkeypatch.setattr(expert_rows, "INNER", 24)
    seen = expert_rows.captured(6, 20, 4, 2)
    width = max(x.g.shape[1] for x in seen)
    found = []
    for batch in (seen, [expert_rows.widened(x, width) for x in seen]):
        sums = {x.layer.name: torch.zeros(x.layer.O, x.layer.J) for x in seen}
        for x in batch:
            turns = (
                torch.linalg.qr(torch.ones(n, n) + torch.eye(n))[0]
                for n in sums[x.layer.name].shape
            )
            basis = expert_rows.Eigenvectors(*turns)
            for _, here, g, a, bias in expert_rows.rotated(x, basis, expert_rows.SharedRotation()):
                here.add_eigenvalues(sums[x.layer.name], g, a, bias)
        found.append(sums)
    for name, mine in found[0].items():
        torch.testing.assert_close(mine, found[1][name], rtol=1e-4, atol=1e-7)
    rows = sum(sum(x.rows.counts) for x in seen if "down" in x.layer.name)
    assert rows == 6 * 20 * 2
    assert expert_rows.measured(4, 16, 4, 2).count("\n") == 4
