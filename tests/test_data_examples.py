"""Examples: checked, without padding, divided into batches, padded again."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ekfac_fast.data.batches import divided
from ekfac_fast.data.collate import collate
from ekfac_fast.data.examples import example
from ekfac_fast.errors import DataError


def ids(values: list[int]) -> list[dict]:
    return [{"input_ids": values}]


@pytest.mark.parametrize(
    "kind", [list, torch.tensor, np.array, lambda v: torch.tensor(v, dtype=torch.int32)]
)
def test_example_drops_padding_of_either_side(kind) -> None:
    record = {
        "input_ids": kind([0, 0, 5, 6, 7, 0]),
        "attention_mask": kind([0, 0, 1, 1, 1, 0]),
        "labels": kind([9, 9, -100, 6, 7, 9]),
    }
    e = example([record], 0, vocab_size=8)
    assert e.input_ids.dtype == e.labels.dtype == torch.int64
    assert e.input_ids.tolist() == [5, 6, 7]
    assert e.labels.tolist() == [-100, 6, 7]
    assert (len(e), e.targets, e.dropped) == (3, 2, 0)
    assert example(ids([1, 2]), 0).labels.tolist() == [1, 2]


def test_example_does_not_alias_the_data() -> None:
    source = torch.tensor([1, 2, 3])
    e = example([{"input_ids": source}], 0)
    e.labels[0] = -100
    assert source.tolist() == e.input_ids.tolist() == [1, 2, 3]


@pytest.mark.parametrize(("given", "id"), [(7, 7), (np.int64(8), 8), ("a7", 1), (None, 1)])
def test_example_is_known_by_its_integer_id_or_its_index(given, id) -> None:
    found = example([{}, {"input_ids": [1, 2], "id": given}], 1)
    assert found.id == id
    assert example([{"input_ids": [1, 2]}], 0).id == 0


def test_example_longer_than_the_context() -> None:
    record = {"input_ids": [0, 1, 2, 3, 4], "attention_mask": [0, 1, 1, 1, 1]}
    e = example([record], 0, context=3)
    assert (e.input_ids.tolist(), e.labels.tolist(), e.dropped) == ([1, 2, 3], [1, 2, 3], 1)
    assert example([record], 0, context=4).dropped == 0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": []}, "example 1: has no tokens"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "example 1: has no tokens"),
        ({"input_ids": [3, 50, 8]}, "example 1: token id 50 at position 1 is outside .* of 10"),
        ({"input_ids": [3, -1]}, "example 1: token id -1 at position 1 is outside"),
        (
            {"input_ids": [0, 0, 99], "attention_mask": [0, 1, 1]},
            "token id 99 at position 2 is outside",
        ),
        ({"input_ids": [1, 2], "labels": [1, 10]}, "example 1: label 10 at position 1 is outside"),
        (
            {"input_ids": [1, 2], "labels": [1]},
            "example 1: labels has 1 positions, input_ids has 2",
        ),
        ({"input_ids": [1], "attention_mask": [1, 1]}, "attention_mask has 2 positions"),
        (
            {"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]},
            "example 1: attention_mask is 0 at position 1, between real tokens",
        ),
        (
            {"input_ids": [[1, 2]]},
            r"example 1: input_ids must be integers \[T\], not int64 \[1, 2\]",
        ),
        ({"input_ids": [0.5]}, r"must be integers \[T\], not float64 \[1\]"),
        ({"text": "a"}, "example 1: is a dict, not a mapping with 'input_ids'"),
        ([1, 2], "example 1: is a list, not a mapping with 'input_ids'"),
    ],
)
def test_wrong_examples_are_named(record, message: str) -> None:
    with pytest.raises(DataError, match=message):
        example([{"input_ids": [1]}, record], 1, vocab_size=10)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 200))
def test_division(sizes: list[int], budget: int) -> None:
    plan = divided(sizes, budget)
    assert sorted(i for batch in plan for i in batch) == list(range(len(sizes)))
    flat = [i for batch in plan for i in batch]
    assert flat == sorted(flat, key=lambda i: (-sizes[i], i))
    for n, batch in enumerate(plan, 1):
        longest = max(sizes[i] for i in batch)
        assert len(batch) == 1 or longest * len(batch) <= budget
        assert n == len(plan) or longest * (len(batch) + 1) > budget  # full
    assert plan == divided(sizes, budget)


@given(
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=12), min_size=1, max_size=6),
    st.sampled_from(["left", "right"]),
    st.integers(0, 99),
)
def test_collate_round_trips(rows: list[list[int]], side: str, pad_id: int) -> None:
    dataset = [{"input_ids": r, "labels": [-100, *r[1:]]} for r in rows]
    examples = [example(dataset, i) for i in range(len(rows))]
    batch = collate(examples, pad_id, side)
    T = max(map(len, rows))
    for i, row in enumerate(rows):
        pads = T - len(row)
        real = slice(pads, T) if side == "left" else slice(0, len(row))
        assert batch["attention_mask"][i].sum() == len(row)
        assert batch["attention_mask"][i, real].all()
        hidden = batch["attention_mask"][i] == 0
        assert (batch["input_ids"][i][hidden] == pad_id).all()
        assert (batch["labels"][i][hidden] == -100).all()
        back = example([{name: batch[name][i] for name in batch}], 0)
        assert back.input_ids.tolist() == row
        assert back.labels.tolist() == dataset[i]["labels"]
    assert all(t.shape == (len(rows), T) and t.dtype == torch.int64 for t in batch.values())
