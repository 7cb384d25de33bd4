"""Where and with what numbers were taken: the facts beside every measured row."""

import datetime
import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy
import torch

import ekfac_fast
from ekfac_fast import ops
from ekfac_fast.model.weights import usual_device


def device(name: str | None) -> torch.device:
    """The device of that name; None for a GPU if there is one.

    Raises:
        SystemExit: there is no GPU, but one was asked for.
    """
    chosen = torch.device(name) if name else usual_device()
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here")
    return chosen


def environment(on: torch.device) -> dict:
    """Machine, versions, revision and date."""
    facts = {
        "device": on.type,
        "cpu": _cpu(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ekfac_fast": ekfac_fast.__version__,
        "extension": ops.coverage()["covariance"]["cpu"],
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "revision": revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if on.type == "cuda":
        import triton

        has = torch.cuda.get_device_properties(on)
        facts |= {
            "gpu": has.name,
            "compute_capability": f"{has.major}.{has.minor}",
            "processors": has.multi_processor_count,
            "l2_bytes": has.L2_cache_size,
            "memory_bytes": has.total_memory,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "float32_products": torch.get_float32_matmul_precision(),
        }
    return facts


def revision() -> str:
    """The commit, with "+changes" if files differ; $REVISION in a copy without .git."""
    here = Path(__file__).parent
    if shutil.which("git") is None:
        return os.environ.get("REVISION", "unknown")

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=here, capture_output=True, text=True)
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    if not commit:
        return os.environ.get("REVISION", "unknown")
    return commit + ("+changes" if git("status", "--porcelain") else "")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
