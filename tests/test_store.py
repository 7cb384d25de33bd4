"""Results survive kill -9, full disks and changed settings; real files, real processes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ekfac_fast.store import (
    Store,
    StoreError,
    fingerprint,
    load_json,
    load_metadata,
    load_tensors,
    save_json,
    save_tensors,
)

# Makes all three kinds of progress, as a scan does. One interpreter forks a child per line of
# input, so that a hundred killed runs do not import torch a hundred times. A child kills itself at
# its file operation number `kill` (audit events: open, rename, mkdir, truncate, ...; 0: never).
RUNS = """
import os, random, signal, sys, time, torch
from ekfac_fast.store import Store
torch.set_num_threads(1)
Q, B = 3, 10

def scores(columns):
    columns = torch.tensor(columns, dtype=torch.float32)
    return torch.stack([torch.sin(columns * (q + 1)) for q in range(Q)])

def run(folder, batches, seconds, kill, seed):
    N, operations = batches * B, 0

    def count(event, _):
        nonlocal operations
        operations += event == "open" or event.startswith(("os.", "shutil.", "mmap."))
        if operations == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def plan():
        order = list(range(N))
        random.Random(seed).shuffle(order)
        return [order[i:i + B] for i in range(0, N, B)]

    sys.addaudithook(count)
    with Store.open(folder, kind="scan", facts={"N": N}, seconds=seconds) as store:
        batches = store.plan(plan)
        matrix = store.matrix((Q, N))
        start, state = store.load_state() or (0, {"sum": torch.zeros(Q)})
        for i, columns in enumerate(batches):
            if i not in store.done:
                store.write(i, {"detail": scores(columns).T})
            if i not in matrix.done:
                matrix.write(i, columns, scores(columns))
            if i >= start:
                state["sum"] += scores(columns).sum(1)
                if store.due or i == len(batches) - 1:
                    store.save_state(i + 1, state)
        store.finish(batches=len(batches))

for line in sys.stdin:
    folder, batches, seconds, kill, delay, seed = line.split()
    child = os.fork()
    if child == 0:
        try:
            run(folder, int(batches), float(seconds), int(kill), int(seed))
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    if float(delay):
        time.sleep(float(delay))
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runs:
    """Calls return the exit code of a run: 0, or -9 when it was killed."""

    def __init__(self) -> None:
        self.parent = subprocess.Popen(
            [sys.executable, "-c", RUNS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(
        self,
        folder: Path,
        *,
        batches: int,
        seconds: float = 0.0,
        kill: int = 0,
        delay: float = 0.0,
        seed: int = 0,
    ) -> int:
        print(folder, batches, seconds, kill, delay, seed, file=self.parent.stdin, flush=True)
        return int(self.parent.stdout.readline())

    def close(self) -> None:
        self.parent.stdin.close()
        self.parent.wait(30)
        self.parent.stdout.close()


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    runs = Runs()
    yield runs
    runs.close()


def results(folder: Path) -> dict[str, bytes]:
    """Every file, whole, but the manifest, which holds times, and the marks, which may repeat."""
    return {
        p.name: p.read_bytes() if p.suffix in {".npy", ".safetensors"} else b""
        for p in folder.iterdir()
    }


def test_killed_at_every_file_operation_continues_bitwise(runs: Runs, tmp_path: Path) -> None:
    assert runs(tmp_path / "whole", batches=2) == 0
    expected = results(tmp_path / "whole")
    killed = 0
    for kill in range(1, 1000):
        folder = tmp_path / str(kill)
        code = runs(folder, batches=2, kill=kill)
        if code == 0:  # a run has fewer operations than that
            break
        assert code == -signal.SIGKILL
        killed += 1
        # another seed: a stored plan must win over the one that would be made now
        stored = (folder / "plan.safetensors").exists()
        assert runs(folder, batches=2, seed=int(stored)) == 0, kill
        assert results(folder) == expected, kill
        assert Store.load(folder).finished
    assert killed > 40


@pytest.mark.parametrize("seconds", [0.0, 0.02])
def test_killed_at_random_moments_continues_bitwise(
    runs: Runs, tmp_path: Path, seconds: float
) -> None:
    start = time.monotonic()
    assert runs(tmp_path / "whole", batches=200) == 0
    whole = time.monotonic() - start
    rng = random.Random(7)
    delays = [rng.uniform(0.02, 0.2) * whole for _ in range(10)]
    codes = [runs(tmp_path / "killed", batches=200, seconds=seconds, delay=d) for d in delays]
    assert codes.count(-signal.SIGKILL) >= 2
    assert runs(tmp_path / "killed", batches=200, seconds=seconds) == 0
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert not np.isnan(Store.load(tmp_path / "killed").matrix().values).any()


def test_a_torn_mark_is_cut_off(tmp_path: Path) -> None:
    with Store.open(tmp_path, kind="scan", facts={}, seconds=0) as store:
        matrix = store.matrix((1, 4))
        matrix.write(1, [0, 2], torch.ones(1, 2))
        matrix.write(12, [1, 3], torch.ones(1, 2))
    os.truncate(tmp_path / "scores.done", len("1\n1"))
    with Store.open(tmp_path, kind="scan", facts={}, seconds=0) as store:
        assert store.matrix().done == {1}
        store.matrix().write(7, [1, 3], torch.ones(1, 2))
    assert Store.load(tmp_path).matrix().done == {1, 7}


def test_matrix_is_a_plain_npy_with_nan_where_nothing_was_written(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.float64).reshape(2, 3) / 3
    with Store.open(tmp_path, kind="scan", facts={}) as store:
        matrix = store.matrix((2, 5), np.float64)
        matrix.write(0, [4, 0, 2], values)
        assert matrix.done == set()  # not due: one commit a second
        matrix.commit()
        assert matrix.done == {0}
        with pytest.raises(ValueError, match=r"values \[1, 3\] for 3 columns of 2 rows"):
            matrix.write(1, [1, 2, 3], values[:1])
    read = np.load(tmp_path / "scores.npy")
    np.testing.assert_array_equal(read[:, [4, 0, 2]], values)
    assert np.isnan(read[:, [1, 3]]).all()
    with pytest.raises(StoreError, match="opened to read"):
        Store.load(tmp_path).matrix().write(1, [1], values[:, :1])
    with (
        Store.open(tmp_path, kind="scan", facts={}) as store,
        pytest.raises(StoreError, match=r"holds \[2, 5\] float64, not \[3, 5\] float32"),
    ):
        store.matrix((3, 5))


def test_a_lost_matrix_loses_its_marks(tmp_path: Path) -> None:
    with Store.open(tmp_path, kind="scan", facts={}) as store:
        store.matrix((1, 2)).write(0, [0, 1], torch.ones(1, 2))
    (tmp_path / "scores.npy").unlink()
    with pytest.raises(StoreError, match=r"scores\.npy: no such file"):
        Store.load(tmp_path).matrix()
    with Store.open(tmp_path, kind="scan", facts={}) as store:
        assert store.matrix((1, 2)).done == set()


def test_a_truncated_matrix_is_refused(tmp_path: Path) -> None:
    with Store.open(tmp_path, kind="scan", facts={}) as store:
        store.matrix((2, 100))
    os.truncate(tmp_path / "scores.npy", 300)
    with pytest.raises(StoreError, match=r"scores\.npy: not a complete \.npy file"):
        Store.load(tmp_path).matrix()


def test_state_and_shards_round_trip(tmp_path: Path) -> None:
    with Store.open(tmp_path, kind="scan", facts={}) as store:
        assert store.load_state() is None
        store.save_state(3, {"values": torch.ones(2)})
        store.save_state(4, {"values": torch.full((2,), 2.0)})
        store.save_state(9, {"sum": torch.zeros(1)}, name="covariance")
        store.write(1_000_000, {"x": torch.arange(3)})
        store.write(2, {"x": torch.arange(4)})
    store = Store.load(tmp_path, kind="scan")
    batches, state = store.load_state()
    assert batches == 4
    assert list(state) == ["values"]
    assert state["values"].tolist() == [2.0, 2.0]
    assert store.load_state("covariance")[0] == 9
    assert store.done == {2, 1_000_000}
    assert store.read(1_000_000)["x"].tolist() == [0, 1, 2]
    for change in (
        lambda: store.write(3, {"x": torch.ones(1)}),
        lambda: store.save_state(5, {}),
        lambda: store.update(a=1),
        lambda: store.finish(),
    ):
        with pytest.raises(StoreError, match="open to read"):
            change()


def test_durability_takes_a_twentieth_of_the_time(tmp_path: Path) -> None:
    with Store.open(tmp_path, kind="scan", facts={}, seconds=0.01) as store:
        assert not store.due
        time.sleep(0.02)
        assert store.due
        store._pace.cost = 60.0  # the last write took a minute: the next waits twenty
        time.sleep(0.02)
        assert not store.due


def test_plan_of_the_first_run_is_kept(tmp_path: Path) -> None:
    plan = [[3, 1], [0], [2, 4, 5]]
    with Store.open(tmp_path, kind="scan", facts={}) as store:
        assert store.plan(lambda: plan) == plan
    assert Store.load(tmp_path).plan(lambda: pytest.fail("made again")) == plan


def test_other_facts_are_refused_and_named(tmp_path: Path) -> None:
    facts = {"model": "ab12", "layers": ["a", "b", "c"], "fit": {"seed": 0, "rank": (32, 64)}}
    with Store.open(tmp_path, kind="scan", facts=facts) as store:
        store.update(mean=1.5)
        store.finish(tokens=10)
    with Store.open(tmp_path, kind="scan", facts=facts) as store:
        assert store.facts == json.loads(json.dumps(facts))
        assert store.finished
        assert store.state == {"mean": 1.5, "tokens": 10}
    other = {"model": "ab12", "layers": ["a", "x", "c"], "fit": {"seed": 1}, "task": "lm"}
    with pytest.raises(StoreError) as error:
        Store.open(tmp_path, kind="self", facts=other)
    assert str(error.value).splitlines() == [
        f"{tmp_path} holds the results of another run:",
        "  fit.rank: stored [32, 64], now '(none)'",
        "  fit.seed: stored 0, now 1",
        "  kind: stored 'scan', now 'self'",
        "  layers[1]: stored 'b', now 'x'",
        "  task: stored '(none)', now 'lm'",
        "Choose another folder or delete this one",
    ]
    Store.open(tmp_path, kind="scan", facts=facts).close()  # a refusal does not keep the lock


def test_folders_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"absent: no manifest\.json"):
        Store.load(tmp_path / "absent")
    (tmp_path / "shard_000000.safetensors").write_bytes(b"of an older run")
    with pytest.raises(StoreError, match=r"shard_000000.*no manifest\.json.*empty or a new"):
        Store.open(tmp_path, kind="scan", facts={})
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StoreError, match=r"file/manifest\.json: cannot be written"):
        Store.open(file, kind="scan", facts={})
    new = tmp_path / "new"
    Store.open(new, kind="scan", facts={}).close()
    with pytest.raises(StoreError, match="holds 'scan', not 'factors'"):
        Store.load(new, kind="factors")
    manifest = load_json(new / "manifest.json")
    save_json(new / "manifest.json", manifest | {"format": 2})
    with pytest.raises(StoreError, match="has format 2"):
        Store.open(new, kind="scan", facts={})
    (new / "manifest.json").write_text('{\n "kind": "scan",\n "format" 1}\n')
    with pytest.raises(StoreError, match=r"manifest\.json, line 3: not valid JSON"):
        Store.open(new, kind="scan", facts={})


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from ekfac_fast.store import Store\n"
        "Store.open(sys.argv[1], kind='scan', facts={})"
    )
    with Store.open(tmp_path, kind="scan", facts={}):
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
        )
        assert "another run is writing here" in other.stderr
        assert Store.load(tmp_path).facts == {}  # a reader is welcome
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


FULL = """
import resource, sys, torch
from pathlib import Path
from ekfac_fast.store import Store, StoreError, save_json
folder = Path(sys.argv[1])
with Store.open(folder, kind="scan", facts={}) as store:
    store.write(0, {"x": torch.arange(100)})
    store.save_state(1, {"x": torch.arange(100)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    for fails in (
        lambda: store.write(1, {"x": torch.zeros(100_000)}),
        lambda: store.save_state(2, {"x": torch.zeros(100_000)}),
        lambda: store.matrix((10, 10_000)),
        lambda: save_json(folder / "report.json", "x" * 400_000),
    ):
        try:
            fails()
        except StoreError as error:
            print(error)
        else:
            print("not refused")
    print(sorted(p.name for p in folder.iterdir()))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    store.write(1, {"x": torch.zeros(100_000)})
    print(store.read(0)["x"].equal(torch.arange(100)), store.load_state()[0], store.done)
"""


def test_no_room_names_the_file_and_leaves_what_was_there(tmp_path: Path) -> None:
    full = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True
    )
    *errors, files, end = full.stdout.splitlines()
    names = ["shard_000001.safetensors", "state.safetensors", "scores.npy", "report.json"]
    for error, name in zip(errors, names, strict=True):
        assert error.startswith(f"{tmp_path / name}: cannot be written"), error
        assert "File too large" in error
        assert "needs 400,0" in error
    assert files == str([".lock", "manifest.json", "shard_000000.safetensors", "state.safetensors"])
    assert end == "True 1 {0, 1}"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full: not Linux")
def test_marks_that_find_no_room_are_not_done(tmp_path: Path) -> None:
    store = Store.open(tmp_path, kind="scan", facts={}, seconds=0)
    matrix = store.matrix((1, 2))
    matrix.journal.symlink_to("/dev/full")  # every write: ENOSPC
    with pytest.raises(StoreError, match=r"scores\.done: cannot be written.*No space left"):
        matrix.write(0, [0, 1], torch.ones(1, 2))
    assert matrix.done == set()
    matrix.journal.unlink()
    store.close()
    assert Store.load(tmp_path).matrix().done == {0}  # written once there is room


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    Store.open(tmp_path, kind="scan", facts={}).close()
    scratch = tmp_path / ".partial-1-shard_000004.safetensors"
    scratch.mkdir()
    (scratch / ".tmpAbC").write_bytes(b"half")
    assert Store.load(tmp_path).done == set()
    Store.open(tmp_path, kind="scan", facts={}).close()
    assert not scratch.exists()


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
    assert load_metadata(path) == {"step": "3"}
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
    for load in (load_tensors, load_metadata):
        with pytest.raises(StoreError, match=f"factors.safetensors: {message}"):
            load(path)


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
    with pytest.raises(StoreError, match=r"run\.json: cannot be read"):
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
