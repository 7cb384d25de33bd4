"""Batches as two arrays: the same as lists, and the plan by the rule that made them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ekfac_fast.data.batches import Batches, divided
from ekfac_fast.errors import StoreError
from ekfac_fast.store.division import Division
from ekfac_fast.store.files import save_tensors
from ekfac_fast.store.folder import Store


def one_after_the_other(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """The rule: the longest first, ties in order, as many as fit its length."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches, start = [], 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


sizes = st.one_of(st.integers(0, 4), st.integers(0, 600), st.integers(60000, 70000))


@given(st.lists(sizes, max_size=60), st.integers(1, 2000))
def test_the_plan_is_that_of_the_rule(lengths, budget):
    plan, expected = divided(lengths, budget), one_after_the_other(lengths, budget)
    assert list(plan) == expected
    assert plan == expected == plan
    assert [len(batch) for batch in plan] == plan.sizes.tolist()
    assert plan.indices[plan.starts].tolist() == [batch[0] for batch in plan]


def test_a_plan_of_many_lengths_is_that_of_the_rule():
    lengths = np.random.default_rng(0).integers(1, 513, 20000)
    assert divided(lengths, 4096) == one_after_the_other(lengths.tolist(), 4096)


def test_it_is_a_sequence_of_lists():
    plan = Division.of([[3, 1], [0], [2, 4, 5]])
    assert (len(plan), plan[0], plan[-1], plan[1:]) == (3, [3, 1], [2, 4, 5], [[0], [2, 4, 5]])
    assert type(plan[0][0]) is int
    assert plan != Division.of([[3], [1, 0], [2, 4, 5]])
    assert plan != [[3, 1], [0]]
    assert plan != 3
    with pytest.raises(IndexError):
        plan[3]
    assert list(Division.of([])) == []
    wanted = np.array([True, False, False, True, False, True])
    assert plan.only(wanted) == [[3], [0], [5]]
    assert plan.only(~wanted) == [[1], [], [2, 4]]


class Stub(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids):
        return input_ids


@pytest.mark.filterwarnings("ignore::ekfac_fast.errors.Notice")  # one has nothing to predict
def test_batches_of_some_and_of_what_is_no_text():
    data = [{"input_ids": [1] * n} for n in (2, 5, 3, 5, 1)]
    batches = Batches(data, Stub(), batch_tokens=6)
    assert batches.divided() == [[1], [3], [2, 0], [4]]
    assert batches.divided([4, 2, 0]) == [[2, 0], [4]]
    assert batches.divided([]) == []
    assert (batches.padded, batches.shortest, batches.tokens([1, 4])) == (3, 0, 6)
    assert not Batches(data[1:2] * 3, Stub(), batch_tokens=10).padded
    assert Batches(data[4:] * 2, Stub()).shortest == 0
    pairs = Batches([(torch.ones(2), 1)] * 5, Stub(), batch_size=2)
    assert pairs.divided() == [[0, 1], [2, 3], [4]]
    assert pairs.divided([4, 0, 2]) == [[4, 0], [2]]
    assert pairs.tokens([0, 3]) == 2


@pytest.mark.parametrize(
    ("indices", "sizes"), [([0, 1, 1], [2, 1]), ([0, 1], [2, 1]), ([0, 1], [3, -1])]
)
def test_a_stored_plan_that_is_damaged_is_refused(tmp_path, indices, sizes):
    with Store.open(tmp_path, kind="scores", facts={}):
        told = {"indices": torch.tensor(indices), "sizes": torch.tensor(sizes)}
        save_tensors(tmp_path / "plan.safetensors", told)
    with pytest.raises(StoreError, match=r"plan\.safetensors: an example stands in two batches"):
        Store.load(tmp_path).batches()
