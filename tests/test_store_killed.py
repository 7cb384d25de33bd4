"""Results survive kill -9 at any moment; real files, real processes."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ekfac_fast.store.folder import Store

# Makes all three kinds of progress, as a scan does. One interpreter forks a child per line of
# input, so that a hundred killed runs do not import torch a hundred times. A child kills itself at
# its file operation number `kill` (audit events: open, rename, mkdir, truncate, ...; 0: never).
RUNS = """
import os, random, signal, sys, time, torch
from ekfac_fast.store.folder import Store
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
        batches = store.batches(plan)
        matrix, shards = store.matrix((Q, N)), store.pieces()
        state = store.load_state("state")
        done, total = set(state.done), state.tensors.get("total", torch.zeros(Q))
        for i, columns in enumerate(batches):
            if i not in shards.done:
                shards.write(i, {"detail": scores(columns).T})
            if i not in matrix.done:
                matrix.write(i, columns, scores(columns))
            if i not in done:
                total += scores(columns).sum(1)
                done.add(i)
            if store.due or i == len(batches) - 1:
                store.save_state("state", {"total": total}, done)
                store.commit()
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
