"""Files: whole or absent, checked when they are read, told apart by their content."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ekfac_fast.checks import Whole, check_json
from ekfac_fast.curvature.memory import taken_bytes
from ekfac_fast.errors import StoreError
from ekfac_fast.store.files import load_json, load_noted, load_tensors, save_json, save_tensors
from ekfac_fast.store.fingerprint import fingerprint
from ekfac_fast.store.folder import Store


def test_tensors_round_trip(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "whole": base,
        "again": base,
        "view": base[1:],
        "transposed": base.T,
        "graph": base.clone().requires_grad_() * 2,
        "half": base.bfloat16(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(7),
    }
    path = tmp_path / "made" / "on" / "the" / "way.safetensors"
    save_tensors(path, tensors, {"step": "3"})
    loaded = load_tensors(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    assert load_noted(path)[1] == {"step": "3"}
    before = path.read_bytes()
    loaded["whole"] += 1
    assert path.read_bytes() == before
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (None, "no such file"),
        (lambda data: b"", "not a complete safetensors file"),
        (lambda data: data[:20], "not a complete safetensors file"),
        (lambda data: data[:-1], "not a complete safetensors file"),
        (lambda data: b"PK\x03\x04 a torch.save file" * 20, "not a complete safetensors file"),
    ],
)
def test_damaged_tensor_files_are_named(tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "factors.safetensors"
    if damage:
        save_tensors(path, {"x": torch.arange(10)})
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StoreError, match=f"factors.safetensors: {message}"):
        load_tensors(path)


def test_sums_that_are_read_lie_as_those_that_were_made(tmp_path: Path) -> None:
    """Sums that go on in memory that begins elsewhere may round otherwise; files stay mapped."""
    every = {str(n): torch.ones(n, n) for n in range(1, 12)}
    with Store.open(tmp_path, kind="scores", facts={}) as store:
        store.save_state("sums", every, [0])
        assert all(x.data_ptr() % 64 == 0 for x in store.load_state("sums").tensors.values())
    save_tensors(tmp_path / "large.safetensors", {"x": torch.ones(1 << 22)})
    before = taken_bytes(torch.device("cpu"))
    held = load_tensors(tmp_path / "large.safetensors")
    assert taken_bytes(torch.device("cpu")) - before < held["x"].nbytes // 2


def test_json_errors_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with pytest.raises(StoreError, match=r"run\.json: no such file"):
        load_json(path)
    save_json(path, {"layers": ["é", 1.5]})
    assert load_json(path) == {"layers": ["é", 1.5]}
    with pytest.raises(ValueError, match="JSON compliant"):
        save_json(path, float("nan"))
    assert load_json(path) == {"layers": ["é", 1.5]}
    path.write_text('{"a": 1,\n "b": }\n')
    with pytest.raises(StoreError, match=r"run\.json, line 2: not valid JSON \(Expecting value"):
        load_json(path)
    path.write_bytes(b'"\xff"')
    with pytest.raises(StoreError, match=r"run\.json: not UTF-8"):
        load_json(path)


nests = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(deadline=None)
@given(nests, nests)
def test_fingerprints_differ_exactly_when_values_do(one, other) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (fingerprint(one) == fingerprint(other)) == same
    assert fingerprint(json.loads(json.dumps(one))) == fingerprint(one)


def test_fingerprint_of_tensors() -> None:
    x = torch.arange(6, dtype=torch.float32)
    prints = [
        fingerprint(x),
        fingerprint(x.reshape(2, 3)),
        fingerprint(x.reshape(2, 3).T),
        fingerprint(x.bfloat16()),
        fingerprint(x.int()),
        fingerprint(x[:5], x[5:]),
        fingerprint([x]),
        fingerprint(x.tolist()),
        fingerprint(torch.empty(0)),
        fingerprint(b"x"),
        fingerprint("x"),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint(x) == fingerprint(x.numpy()) == fingerprint(torch.arange(12.0)[::2] / 2)
    assert fingerprint({"a": 1, "b": x}) == fingerprint({"b": x, "a": 1})
    assert fingerprint([1, 2]) == fingerprint((1, 2)) == fingerprint(i for i in (1, 2))
    assert fingerprint("stable", 1, 0.5, None, x) == "96677e78fcaa5424"
    with pytest.raises(TypeError, match="cannot take a set"):
        fingerprint({1, 2})


def flips(data: bytes, count: int) -> list[bytes]:
    """`data` with one random bit turned, many times."""
    rng = random.Random(0)
    turned = []
    for _ in range(count):
        copy = bytearray(data)
        copy[rng.randrange(len(copy))] ^= 1 << rng.randrange(8)
        turned.append(bytes(copy))
    return turned


@pytest.mark.parametrize("count", [400])
def test_every_flipped_bit_is_noticed(tmp_path: Path, count: int) -> None:
    tensors, told = tmp_path / "x.safetensors", tmp_path / "x.json"
    save_tensors(tensors, {"a": torch.randn(7, 3), "b": torch.arange(5)}, {"notes": "{}"})
    save_json(told, {"kind": "scan", "layers": ["a", "é"], "damping": [0.25, 1e-9], "n": None})
    for path, load in ((tensors, load_tensors), (told, load_json)):
        whole, value = path.read_bytes(), load(path, ours=True)
        for data in flips(whole, count):
            path.write_bytes(data)
            try:
                again = load(path, ours=True)
            except StoreError:
                continue
            # White space of JSON, or a digit beyond those of a number.
            assert path is told, data
            assert again == value, data


def test_a_matrix_that_was_changed_is_noticed(tmp_path: Path) -> None:
    batches = [[3, 0], [1, 4], [2]]
    with Store.open(tmp_path, kind="scan", facts={}, seconds=0) as store:
        matrix = store.matrix((2, 5))
        for number, columns in enumerate(batches):
            matrix.write(number, columns, torch.randn(2, len(columns)))
    path = tmp_path / "scores.npy"
    whole = path.read_bytes()
    Store.load(tmp_path).matrix().verify(batches)
    start = len(whole) - 2 * 5 * 4
    for data in flips(whole[start:], 100):
        path.write_bytes(whole[:start] + data)
        with pytest.raises(StoreError, match=r"scores\.npy: the scores of batch \d are not those"):
            Store.load(tmp_path).matrix().verify(batches)


def test_a_matrix_that_was_cut_off_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    with Store.open(tmp_path, kind="scan", facts={}) as store:
        store.matrix((2, 100)).write(0, range(100), np.ones((2, 100)))
    path = tmp_path / "scores.npy"
    os.truncate(path, 300)
    for opened in (Store.load(tmp_path), Store.open(tmp_path, kind="scan", facts={})):
        with pytest.raises(StoreError, match=r"scores\.npy: not a complete \.npy file"):
            opened.matrix((2, 100))
        opened.close()
    assert path.stat().st_size == 300


def test_an_example_that_stands_twice_is_refused(tmp_path: Path) -> None:
    Store.open(tmp_path, kind="scan", facts={}).close()
    twice = {"indices": torch.tensor([0, 1, 1]), "sizes": torch.tensor([2, 1])}
    save_tensors(tmp_path / "plan.safetensors", twice)
    with pytest.raises(StoreError, match=r"plan\.safetensors: an example stands in two batches"):
        Store.load(tmp_path).batches()


def test_no_file_is_put_in_the_place_of_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="is there and no file"):
        save_json(tmp_path / "pipe", {})
    assert (tmp_path / "pipe").is_fifo()


SCHEMA = {"a": Whole(1), "b": [float], "c": (None, {str: bool}), "d": {"e": str}}
RIGHT = {"a": 1, "b": [0.5, 2], "c": None, "d": {"e": "f"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"c": {"x": True}, "more": 1}, None),
        ({"a": 0}, "a is 0, expected a whole number of at least 1"),
        ({"a": True}, "a is True"),
        ({"a": 1.0}, "a is 1.0"),
        ({"b": [1, float("nan")]}, r"b\[1\] is nan, expected a finite number"),
        ({"b": {}}, "b is {}, expected a list"),
        ({"c": {"x": 1}}, "c is {'x': 1}, expected null"),
        ({"d": {}}, "d.e is missing"),
        ({"d": []}, "d is \\[\\], expected names and values"),
    ],
)
def test_values_of_json_are_checked_by_their_schema(tmp_path: Path, change, message) -> None:
    def check():
        check_json(RIGHT | change, SCHEMA, tmp_path / "x.json", "Write it again")

    if message:
        with pytest.raises(StoreError, match=rf"x\.json: {message}.*Write it again"):
            check()
    else:
        check()
