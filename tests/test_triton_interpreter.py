"""Runs `test_triton_interpreter_cases.py` under Triton's interpreter, in processes of its own.

The interpreter is Python, so two halves of the cases run beside each other.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HALVES = ("test_parity", "not test_parity")


@pytest.fixture(scope="module")
def running() -> Iterator[dict[str, subprocess.Popen]]:
    """Both halves, started."""
    pytest.importorskip("triton")
    cases = Path(__file__).with_name("test_triton_interpreter_cases.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(cases), "-k"]
    processes = {
        half: subprocess.Popen(
            [*command, half],
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            cwd=cases.parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for half in HALVES
    }
    yield processes
    for process in processes.values():
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("half", HALVES)
def test_interpreted_kernels_agree_with_their_references(running, half):
    output, _ = running[half].communicate()
    assert running[half].returncode == 0, output[-8000:]
