"""Truncation of preconditioned gradients: how much energy is kept, and of what it depends."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ekfac_fast.curvature.low_rank import captured_energy, rotate_back, truncate
from ekfac_fast.ops.testing.sampling import orthogonal

pytestmark = pytest.mark.usefixtures("poisoned")

SPECTRA = {
    "harmonic": lambda i: 1 / i,
    "slow, as gradients of trained models": lambda i: i**-0.75,
    "geometric": lambda i: 0.8**i,
    "one direction": lambda i: torch.where(i == 1, 1.0, 1e-3),
    "steps": lambda i: torch.where(i <= 40, 1.0, 0.01),
}


def with_spectrum(values: Tensor, O: int, J: int) -> Tensor:
    """A matrix [1,O,J] with these singular values, fp64."""
    n = len(values)
    left, right = orthogonal(O, torch.float64)[:, :n], orthogonal(J, torch.float64)[:, :n]
    return ((left * values.double()) @ right.T).unsqueeze(0)


def lost(P: Tensor, L: Tensor, R: Tensor) -> float:
    """The residual's share of the energy, from the residual itself."""
    P, L, R = P.double(), L.double(), R.double()
    return ((P - L @ R).square().sum() / P.square().sum()).item()


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_energy_is_that_of_the_exact_svd(spectrum, rank):
    for O, J in ((96, 257), (257, 96)):
        values = spectrum(torch.arange(1, 97).double())
        exact = (values[rank:].square().sum() / values.square().sum()).item()
        P = with_spectrum(values, O, J)
        for dtype in (torch.float32, torch.float64):
            L, R = truncate(P.to(dtype), rank)
            assert (L.shape, R.shape) == ((1, O, rank), (1, rank, J))
            assert L.dtype == R.dtype == dtype
            assert exact - 1e-6 <= lost(P, L, R) <= exact + 1e-3
            energy = captured_energy(P.to(dtype), L, R).item()
            assert energy == pytest.approx(1 - lost(P, L, R), abs=1e-5)


def test_flat_spectra_are_reported():
    P = torch.randn(2, 96, 257)
    energy = captured_energy(P, *truncate(P, 8))
    assert (energy < 0.35).all()
    assert (energy > 8 / 96).all()


sizes = st.integers(1, 40)


@given(O=sizes, J=sizes, rank=sizes, Q=st.integers(0, 3), more=st.integers(0, 5))
def test_enough_rank_is_exact(O, J, rank, Q, more):
    """Any matrix whose rank is at most K comes back, through whatever branch."""
    P = torch.randn(Q, O, rank, dtype=torch.float64) @ torch.randn(Q, rank, J, dtype=torch.float64)
    L, R = truncate(P, rank + more)
    assert L.shape[2] == R.shape[1] == min(rank + more, O, J)
    torch.testing.assert_close(L @ R, P, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(captured_energy(P, L, R), torch.ones(Q).double())


def test_rank_deficient_and_zero_queries_share_a_batch():
    P = torch.randn(4, 60, 50)
    P[1] = P[1, :, :3] @ P[1, :3]
    P[2] = 0
    L, R = truncate(P, 10)
    assert L.isfinite().all()
    assert R.isfinite().all()
    torch.testing.assert_close(L[1] @ R[1], P[1], rtol=1e-4, atol=1e-3)
    assert not (L[2] @ R[2]).any()
    energy = captured_energy(P, L, R)
    assert energy[2] == 1
    assert energy[1] == pytest.approx(1, abs=1e-5)
    assert energy[0] < 0.7


def test_left_factors_are_orthonormal():
    L, _ = truncate(with_spectrum(1 / torch.arange(1, 61).double(), 80, 60).float(), 12)
    torch.testing.assert_close(L[0].T @ L[0], torch.eye(12), rtol=0, atol=1e-5)


def test_seed_decides():
    P = torch.randn(3, 90, 70)
    first, again, other = (truncate(P, 5, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    before = torch.random.get_rng_state()
    truncate(P, 5)
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator was used"


def test_queries_do_not_depend_on_their_batch():
    P = torch.cat([with_spectrum(1 / torch.arange(1, 51).double(), 60, 50) for _ in range(5)])
    L, R = truncate(P, 8)
    for parts in (P.split(1), P.split(2)):
        alone = [truncate(part, 8) for part in parts]
        torch.testing.assert_close(torch.cat([x @ y for x, y in alone]), L @ R)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_scale_does_not_matter(scale):
    P = with_spectrum(1 / torch.arange(1, 51).double(), 60, 50).float()
    L, R = truncate(P, 8)
    l, r = truncate(P * scale, 8)
    torch.testing.assert_close(l @ (r / scale), L @ R, rtol=1e-3, atol=1e-4)
    scaled, energy = captured_energy(P * scale, l, r), captured_energy(P, L, R)
    torch.testing.assert_close(scaled, energy, rtol=1e-6, atol=0)


def test_rotate_back_is_the_dense_rotation():
    P = torch.randn(2, 20, 30).double()
    Qg, Qa = orthogonal(20, torch.float64), orthogonal(30, torch.float64)
    for rank in (5, 20):
        L, R = truncate(P, rank)
        l, r = rotate_back(L, R, Qg, Qa)
        torch.testing.assert_close(l @ r, Qg @ L @ R @ Qa.T)
        # Rotations are orthogonal: what was kept stays kept.
        rotated = Qg @ P @ Qa.T
        torch.testing.assert_close(captured_energy(rotated, l, r), captured_energy(P, L, R))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"truncate: P has shape \[4, 5\], expected \[Q,O,J\]"):
        truncate(torch.zeros(4, 5), 2)
    with pytest.raises(ValueError, match="truncate: rank is 0, expected at least 1"):
        truncate(torch.zeros(1, 4, 5), 0)
