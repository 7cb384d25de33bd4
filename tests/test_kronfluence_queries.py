"""Queries: how many wait for one pass, how they are truncated, when low rank is multiplied out."""

from pathlib import Path

import pytest
import torch
from kronfluence import FactorArguments, ScoreArguments
from test_kronfluence_cases import (
    Pair,
    Sequence,
    SumLoss,
    assert_close,
    examples,
    pytestmark,  # noqa: F401
    quick_release,
)

from ekfac_fast.curvature.basis import Basis
from ekfac_fast.curvature.choice import contraction
from ekfac_fast.curvature.low_rank import truncate_exactly
from ekfac_fast.curvature.memory import free_bytes
from ekfac_fast.kronfluence.trackers.queries import FastPreconditionTracker
from ekfac_fast.kronfluence.truncation import low_rank
from ekfac_fast.ops.shapes import Shape


@pytest.fixture(autouse=True)
def _quick():
    with quick_release():
        yield


def pair(folder: Path) -> Pair:
    torch.manual_seed(0)
    model = Sequence((5, 6, 4), (True, False), inplace=False)
    data = examples(9, (3, 5), (3, 4)), examples(7, (3, 5), (3, 4))
    return Pair(model, SumLoss(), *data, folder, FactorArguments())


def test_queries_are_held_for_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = pair(tmp_path)
    one.fit(False, "stock")
    passes = []
    inner = SumLoss.compute_train_loss

    def counting(self, batch, model, sample=False):
        passes.append(len(batch[0]))
        return inner(self, batch, model, sample)

    monkeypatch.setattr(SumLoss, "compute_train_loss", counting)
    args = ScoreArguments(damping_factor=None, query_gradient_low_rank=2)
    counts, scores = {}, {}
    for label, backend, options in (
        ("stock", False, {}),
        ("held", True, {}),
        ("not held", True, {"hold_queries": False}),
        ("no room", True, {"memory_share": 0}),
    ):
        passes.clear()
        scores[label] = one.pairwise(backend, "stock", args, label, **options)
        counts[label] = sum(passes) // len(one.train)
    assert counts == {"stock": 4, "held": 1, "not held": 4, "no room": 4}
    for found in scores.values():
        assert_close(found, scores["stock"], 1e-5)


def test_too_many_held_queries_are_scored_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = pair(tmp_path)
    one.fit(False, "stock")
    args = ScoreArguments(damping_factor=None, query_gradient_low_rank=2)
    expected = one.pairwise(False, "stock", args, "stock")
    join, held = FastPreconditionTracker.join_held, []

    def small(self: FastPreconditionTracker) -> None:
        held.append(len(self.held))
        if len(self.held) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        join(self)

    monkeypatch.setattr(FastPreconditionTracker, "join_held", small)
    found = one.pairwise(True, "stock", args, "small")
    assert held[0] == 4
    assert set(held[1:]) == {1}
    assert_close(found, expected, 1e-5)


def test_low_rank_queries_are_multiplied_out_where_that_costs_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = (Shape(B=32, T=512, I=768, O=3072, Q=Q, K=32, bias=True) for Q in (4, 64))
    assert contraction(few) == "low_rank"
    assert contraction(many) == "dense"
    assert contraction(many, per_token=True) == "low_rank"
    torch.manual_seed(0)
    model = Sequence((5, 6, 4), (True, False), inplace=False)
    data = examples(9, (30, 5), (30, 4)), examples(9, (30, 5), (30, 4))
    one = Pair(model, SumLoss(), *data, tmp_path)
    one.fit(False, "stock")
    args = ScoreArguments(damping_factor=None, query_gradient_low_rank=3, use_full_svd=True)
    expected = one.pairwise(False, "stock", args, "dense")
    monkeypatch.setattr("ekfac_fast.curvature.choice.FLOPS_OF_A_NUMBER", 0)  # so small a layer
    assert_close(one.pairwise(True, "stock", args, "dense"), expected, 1e-5)


def test_exact_truncation_resolves_small_singular_values() -> None:
    """Squared in fp64, ratios below 1e-8 are lost: such queries go to LAPACK."""
    torch.manual_seed(0)
    for shape in ((2, 9, 14), (2, 14, 9)):
        U, _, Vh = torch.linalg.svd(torch.randn(*shape, dtype=torch.float64), full_matrices=False)
        S = torch.logspace(0, -12, 9, dtype=torch.float64)
        M = (U * S) @ Vh
        L, R = truncate_exactly(M, 6)
        best = (U[..., :6] * S[:6]) @ Vh[:, :6]
        assert (L @ R - best).norm() < 1e-13
        zero = truncate_exactly(torch.zeros(shape), 3)
        assert all(bool((x == 0).all() or x.isfinite().all()) for x in zero)


def test_low_rank_of_equal_draws_is_that_of_kronfluence() -> None:
    torch.manual_seed(0)
    for O, J in ((8, 12), (12, 8)):
        Qg, Qa = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (O, J))
        M = torch.randn(3, O, J, dtype=torch.float64)
        basis = Basis(Qg, Qa, torch.ones(O, J, dtype=torch.float64))
        torch.manual_seed(1)
        U, S, V = torch.svd_lowrank(Qg @ M @ Qa.T, q=4)
        state = torch.get_rng_state()
        torch.manual_seed(1)
        L, R = low_rank(M, 4, basis, exact=False, randomised=False)
        assert torch.equal(torch.get_rng_state(), state)
        assert (L @ R - (U * S.unsqueeze(1)) @ V.mT).norm() < 1e-12


def test_free_memory_is_a_plausible_number() -> None:
    assert 0 < free_bytes(torch.device("cpu")) < 2**50
