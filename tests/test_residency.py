"""Runs `test_residency_cases.py` in a process of its own, whose torch knows one device more."""

import os
import subprocess
import sys
from pathlib import Path


def test_what_is_on_the_device_stays_there():
    cases = Path(__file__).with_name("test_residency_cases.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(cases)],
        env=os.environ | {"PRETEND_DEVICE": "1"},
        cwd=cases.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
