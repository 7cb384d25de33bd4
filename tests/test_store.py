"""A folder of results: what it holds, what it refuses, full disks, locks; real processes."""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from ekfac_fast.errors import Notice, StoreError
from ekfac_fast.store.files import load_json, save_json
from ekfac_fast.store.folder import Store


def test_a_torn_mark_is_cut_off(tmp_path: Path) -> None:
    with Store.open(tmp_path, kind="scan", facts={}, seconds=0) as store:
        matrix = store.matrix((1, 4))
        matrix.write(1, [0, 2], torch.ones(1, 2))
        matrix.write(12, [1, 3], torch.ones(1, 2))
    os.truncate(tmp_path / "scores.done", len("1 01234567\n12 0"))
    with Store.open(tmp_path, kind="scan", facts={}, seconds=0) as store:
        assert store.matrix().done.keys() == {1}
        store.matrix().write(7, [1, 3], torch.ones(1, 2))
    assert Store.load(tmp_path).matrix().done.keys() == {1, 7}


def test_matrix_is_a_plain_npy_with_nan_where_nothing_was_written(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.float64).reshape(2, 3) / 3
    with Store.open(tmp_path, kind="scan", facts={}) as store:
        matrix = store.matrix((2, 5), np.float64)
        matrix.write(0, [4, 0, 2], values)
        assert not matrix.done
        store.commit()
        assert matrix.done.keys() == {0}
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
        assert not store.matrix((1, 2)).done


def test_a_truncated_matrix_is_refused(tmp_path: Path) -> None:
    with Store.open(tmp_path, kind="scan", facts={}) as store:
        store.matrix((2, 100))
    os.truncate(tmp_path / "scores.npy", 300)
    with pytest.raises(StoreError, match=r"scores\.npy: not a complete \.npy file"):
        Store.load(tmp_path).matrix()


def test_states_and_pieces_round_trip(tmp_path: Path) -> None:
    with Store.open(tmp_path, kind="scan", facts={}) as store:
        empty = store.load_state("state")
        assert (empty.tensors, empty.done, empty.notes) == ({}, frozenset(), {})
        store.save_state("state", {"done": torch.ones(2)}, [0, 2], {"seconds": 1.5})
        store.save_state("state", {"done": torch.full((2,), 2.0)}, {5, 0, 2}, {"seconds": 2.5})
        store.save_state("covariance", {"sum": torch.zeros(1)}, range(9))
        store.pieces().write(1_000_000, {"x": torch.arange(3)})
        store.pieces().write(2, {"x": torch.arange(4)})
        store.pieces("eigen").write(2, {"x": torch.arange(5)})
    store = Store.load(tmp_path, kind="scan")
    state = store.load_state("state")
    assert (state.done, state.notes) == ({0, 2, 5}, {"seconds": 2.5})
    assert {name: x.tolist() for name, x in state.tensors.items()} == {"done": [2.0, 2.0]}
    assert store.load_state("covariance").done == set(range(9))
    assert store.pieces().done == {2, 1_000_000}
    assert store.pieces("eigen").done == {2}
    assert store.pieces().read(1_000_000)["x"].tolist() == [0, 1, 2]
    for change in (
        lambda: store.pieces().write(3, {"x": torch.ones(1)}),
        lambda: store.pieces().remove(),
        lambda: store.save_state("state", {}, []),
        lambda: store.remove_state("state"),
        lambda: store.update(a=1),
        lambda: store.finish(),
    ):
        with pytest.raises(StoreError, match="open to read"):
            change()
    with Store.open(tmp_path, kind="scan", facts={}) as store:
        store.pieces("eigen").remove()
        store.remove_state("covariance")
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [
        "shard_000002.safetensors", "shard_1000000.safetensors", "state.safetensors",
    ]  # fmt: skip


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
        assert store.batches(lambda: plan) == plan
    assert Store.load(tmp_path).batches(lambda: pytest.fail("made again")) == plan


def test_a_run_is_continued_on_as_many_threads_as_it_was_begun_on(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    with Store.open(tmp_path, kind="scan", facts={}):
        pass
    try:
        torch.set_num_threads(before + 1)
        store = Store.open(tmp_path, kind="scan", facts={})
        with pytest.warns(Notice, match=f"begun on {before} threads .* not on {before + 1}"):
            store.__enter__()
        with store:
            assert torch.get_num_threads() == before
            store.finish()
        assert torch.get_num_threads() == before + 1
        with warnings.catch_warnings(), Store.open(tmp_path, kind="scan", facts={}):
            warnings.simplefilter("error")
            assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_other_facts_are_refused_and_named(tmp_path: Path) -> None:
    facts = {"model": "ab12", "layers": ["a", "b", "c"], "fit": {"seed": 0, "rank": (32, 64)}}
    with Store.open(tmp_path, kind="scan", facts=facts) as store:
        store.update(mean=1.5)
        store.finish(tokens=10)
    with Store.open(tmp_path, kind="scan", facts=facts) as store:
        assert store.facts == json.loads(json.dumps(facts))
        assert store.finished
        began = {"threads": torch.get_num_threads(), "processes": 1}
        assert store.state == {"mean": 1.5, "tokens": 10, **began}
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
    save_json(new / "manifest.json", manifest | {"format": 3})
    with pytest.raises(StoreError, match="has format 3"):
        Store.open(new, kind="scan", facts={})
    (new / "manifest.json").write_text('{\n "kind": "scan",\n "format" 1}\n')
    with pytest.raises(StoreError, match=r"manifest\.json, line 3: not valid JSON"):
        Store.open(new, kind="scan", facts={})


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from ekfac_fast.store.folder import Store\n"
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
from ekfac_fast.store.folder import Store
from ekfac_fast.errors import StoreError
from ekfac_fast.store.files import save_json
folder = Path(sys.argv[1])
with Store.open(folder, kind="scan", facts={}) as store:
    store.pieces().write(0, {"x": torch.arange(100)})
    store.save_state("state", {"x": torch.arange(100)}, [0])
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    for fails in (
        lambda: store.pieces().write(1, {"x": torch.zeros(100_000)}),
        lambda: store.save_state("state", {"x": torch.zeros(100_000)}, [0, 1]),
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
    shards = store.pieces()
    shards.write(1, {"x": torch.zeros(100_000)})
    state = store.load_state("state")
    print(shards.read(0)["x"].equal(torch.arange(100)), *state.done, shards.done)
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
    assert end == "True 0 {0, 1}"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full: not Linux")
def test_marks_that_find_no_room_are_not_done(tmp_path: Path) -> None:
    store = Store.open(tmp_path, kind="scan", facts={}, seconds=0)
    matrix = store.matrix((1, 2))
    matrix.journal.symlink_to("/dev/full")  # every write: ENOSPC
    matrix.write(0, [0, 1], torch.ones(1, 2))
    with pytest.raises(StoreError, match=r"scores\.done: cannot be written.*No space left"):
        store.commit()
    assert not matrix.done
    matrix.journal.unlink()
    store.close()
    assert Store.load(tmp_path).matrix().done.keys() == {0}  # written once there is room


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path: Path) -> None:
    Store.open(tmp_path, kind="scan", facts={}).close()
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    names = [f".partial-{dead}-1-shard_000004.safetensors", f".partial-{os.getpid()}-1-report.html"]
    left, living = (tmp_path / name for name in names)
    inside = tmp_path / "scores" / names[0]  # another run's folder
    for scratch in (left, living, inside):
        scratch.mkdir(parents=True)
        (scratch / ".tmpAbC").write_bytes(b"half")
    Store.load(tmp_path)
    assert left.exists()
    Store.open(tmp_path, kind="scan", facts={}).close()
    assert [left.exists(), living.exists(), inside.exists()] == [False, True, True]


def test_a_fork_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A worker process that outlives the run (a data loader's) leaves the folder free."""
    store = Store.open(tmp_path, kind="scan", facts={})
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    store.close()
    try:
        Store.open(tmp_path, kind="scan", facts={}).close()
    finally:
        os.write(go[1], b"x")
        os.waitpid(child, 0)


def test_an_older_folder_is_read_and_not_continued(tmp_path: Path) -> None:
    Store.open(tmp_path, kind="scan", facts={}).close()
    manifest = load_json(tmp_path / "manifest.json")
    save_json(tmp_path / "manifest.json", manifest | {"format": 1}, checksum=False)
    assert not Store.load(tmp_path).checked
    with pytest.raises(StoreError, match=r"in format 1, whose results can be read but not contin"):
        Store.open(tmp_path, kind="scan", facts={})
