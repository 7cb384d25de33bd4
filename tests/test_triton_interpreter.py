"""Runs `test_triton_interpreter_cases.py` under Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_interpreted_kernels_agree_with_their_references():
    pytest.importorskip("triton")
    cases = Path(__file__).with_name("test_triton_interpreter_cases.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(cases)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=cases.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
