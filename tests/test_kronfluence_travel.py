"""Factors that do not fit on the device: the same scores, each on its way before its turn."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from kronfluence import ScoreArguments
from test_kronfluence_cases import (
    Pair,
    Sequence,
    SumLoss,
    assert_close,
    examples,
    pytestmark,  # noqa: F401
    quick_release,
)
from torch import Tensor

from ekfac_fast.curvature import offload
from ekfac_fast.curvature.basis import Basis
from ekfac_fast.curvature.offload import Travelling, fits

CPU = torch.device("cpu")


class Copied:
    """A transfer for machines without a GPU, counted."""

    log: ClassVar[list[str]] = []

    def __init__(self, pinned: Basis, device: torch.device) -> None:
        self.factors = pinned.each(Tensor.clone)
        self.log.append("departs")

    def arrived(self) -> Basis:
        self.log.append("arrives")
        return self.factors


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No module's factors fit; what the transfers did."""
    monkeypatch.setattr(offload, "fits", lambda *_: False)
    monkeypatch.setattr(offload, "Transfer", Copied)
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: x)
    Copied.log.clear()
    return Copied.log


def test_scores_do_not_change(tmp_path: Path, small_device: list[str]) -> None:
    torch.manual_seed(0)
    model = Sequence((5, 6, 8, 4), (True, False, True), inplace=False)
    data = examples(9, (3, 5), (3, 4)), examples(6, (3, 5), (3, 4))
    one = Pair(model, SumLoss(), *data, tmp_path)
    with quick_release():
        one.fit(False, "stock")
        for choices in (
            {},
            {"query_gradient_low_rank": 2},
            {"aggregate_query_gradients": True, "query_gradient_low_rank": 2},
        ):
            args = ScoreArguments(damping_factor=None, **choices)
            expected = one.pairwise(False, "stock", args, "travel")
            assert_close(one.pairwise(True, "stock", args, "travel"), expected, 1e-5)
        for measured in (False, True):
            args = ScoreArguments(damping_factor=None, use_measurement_for_self_influence=measured)
            small_device.clear()
            expected = one.self_scores(False, "stock", args, "travel")
            assert_close(one.self_scores(True, "stock", args, "travel"), expected, 1e-5)
            # 3 batches (and as many of measurements), 3 modules: one transfer for each use.
            uses = 9 * (1 + measured)
            assert small_device.count("arrives") == uses
            assert small_device.count("departs") in (uses, uses + 1)


def test_the_next_module_departs_before_this_one_computes(small_device: list[str]) -> None:
    last, middle, first = (
        Travelling(Basis(None, None, torch.full((2, 2), float(n)))) for n in range(3)
    )
    for _ in range(2):
        for number, factors in enumerate((last, middle, first)):
            assert float(factors.at(CPU).lam[0, 0]) == number
    each = ["departs", "arrives"]
    # In the first pass nobody knows who is next; from then on each departs while another computes.
    assert small_device == each * 3 + ["departs"] + each * 3
    assert first.transfer is None
    assert last.transfer is not None


def test_everything_fits_on_a_cpu() -> None:
    assert fits((10**6, 10**6), torch.float64, CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_transfers_wait_for_each_other() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    kept = [Basis(None, None, torch.randn(1024, 1024)) for _ in range(4)]
    travelling = [Travelling(factors) for factors in kept]
    x = torch.randn(1024, 1024, device=device)
    for _ in range(20):
        for factors, pinned in zip(kept, travelling, strict=True):
            found = x * pinned.at(device).lam
            torch.testing.assert_close(found, x * factors.lam.to(device))
