"""The sweep draws the same shapes again, computes what it times, and draws what it found."""

from dataclasses import replace
from time import perf_counter
from xml.etree import ElementTree

import pytest
import torch

import shapes_sweep
from ekfac_fast import ops
from pages.heat_map import heat_map


def test_draws_are_repeatable_and_cover_what_is_promised():
    cases = shapes_sweep.draw(60, seed=0)
    assert cases == shapes_sweep.draw(60, seed=0)
    assert cases != shapes_sweep.draw(60, seed=1)
    assert {case.op for case in cases} == {ops.stem(card) for card in ops.ALL}
    assert {case.dtype for case in cases} == set(shapes_sweep.DTYPES)
    for flag in ("bias", "per_token", "masked", "strided"):
        assert {getattr(case, flag) for case in cases} == {True, False}


@pytest.mark.parametrize("card", ops.ALL, ids=ops.stem)
def test_rows_are_checked_timed_and_drawn(card, monkeypatch):
    monkeypatch.setattr(shapes_sweep, "BUDGET_SECONDS", 0.0)
    torch.manual_seed(0)
    case = shapes_sweep.Case(ops.stem(card), 3, 5, 24, 20, 13, 4, *[False] * 4, dtype="float32")
    changes = [{}, {"bias": True}, {"strided": True, "dtype": "bfloat16"}, {"T": 40, "B": 2}]
    if "scores" in case.op:
        changes.append({"per_token": True})
    if case.op == "covariance":
        changes.append({"masked": True})
    rows = [
        shapes_sweep.row(replace(case, **change), torch.device("cpu"), perf_counter, gemm=1e11)
        for change in changes
    ]
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in rows)
    assert case.op in shapes_sweep.summary(rows)
    ElementTree.fromstring(heat_map(rows))
