"""Wall time, CPU time and peak memory of each stage of a contestant, as lines of JSON."""

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM"))


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A block of work; its peak is its own where the kernel lets it be reset."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    yield
    now = resource.getrusage(resource.RUSAGE_SELF)
    seconds = time.perf_counter() - start
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    row = {"stage": name, "seconds": seconds, "cpu_seconds": cpu, "peak_bytes": _peak()}
    print(json.dumps(row), flush=True)
