"""`make gpu-check` without a GPU: what it would run, and how it ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu_check
from gpu_check import Part

ROOT = Path(gpu_check.__file__).parents[1]


def test_make_runs_the_check_with_the_python_that_is_given():
    listed = subprocess.run(
        ["make", "--no-print-directory", "-n", "gpu-check", "PYTHON=python9", "OUT=there"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert listed.stdout == "python9 bench/gpu_check.py --out there\n"


def test_all_parts_end_within_nine_minutes(tmp_path):
    parts = gpu_check.parts(tmp_path)
    ends = [part.end for part in parts]
    assert ends == sorted(ends)
    assert ends[-1] <= 9 * 60
    names = [part.name.partition(" ")[0] for part in parts]
    assert names.index("build") < names.index("tests") < names.index("ops")
    for part in parts:
        for word in part.command:
            # Scripts and tests that are named exist.
            assert not word.endswith(".py") or (ROOT / word).exists()
    assert all("--no-index" in part.command for part in parts if "pip" in part.command)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run(
        ["make", "gpu-check", f"PYTHON={sys.executable}", f"OUT={tmp_path / 'out'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode
    assert "gpu-check needs a GPU, and nothing was run: torch" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def checked(tmp_path, monkeypatch):
    """Run the check on parts of our own; returns its exit status and the results by part."""
    monkeypatch.setattr(gpu_check, "GPU", "print('A GPU')")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "SITE", tmp_path / "site")
    out = tmp_path / "out"

    def run(*parts: Part) -> tuple[int, dict[str, str]]:
        monkeypatch.setattr(gpu_check, "parts", lambda out: list(parts))
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(out)])
        status = 0
        try:
            gpu_check.main()
        except SystemExit as end:
            status = end.code
        found = json.loads((out / "summary.json").read_text())
        assert found["gpu"] == "A GPU"
        return status, {x["part"]: x["result"] for x in found["parts"]}

    run.out = out
    return run


def part(name: str, program: str, end: int = 60) -> Part:
    return Part(name, end, (sys.executable, "-c", program), f"{name}.txt")


def test_a_failed_part_does_not_stop_those_after_it(checked, capsys):
    status, results = checked(
        part("build", "import os; assert os.environ['PYTHONSAFEPATH'] == '1'"),
        part("tests", "import sys; print('one is red'); sys.exit(3)"),
        part("ops", "import time; time.sleep(60)", end=2),
        part("stages", "print('still measured')"),
    )
    assert status == 1
    assert results == {
        "build": "ok",
        "tests": "failed (3)",
        "ops": "out of time",
        "stages": "ok",
    }
    assert "one is red" in (checked.out / "tests.txt").read_text()
    assert "still measured" in capsys.readouterr().out


def test_all_is_well(checked):
    assert checked(part("build", ""), part("tests", "")) == (0, {"build": "ok", "tests": "ok"})


def test_a_failed_build_ends_the_check(checked):
    status, results = checked(part("build", "raise SystemExit(1)"), part("tests", ""))
    assert (status, results) == (1, {"build": "failed (1)"})
