"""Free memory: of a device, of the machine, of the control group that we run in, of a budget."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_budgets: list[int] = []


@contextmanager
def budget(limit: int | None) -> Iterator[None]:
    """Count on no more than `limit` bytes a device within; None changes nothing.

    What this process has taken is part of it, files that are mapped are not: the kernel drops
    their pages where it needs them.
    """
    if limit is None:
        yield
        return
    _budgets.append(limit)
    try:
        yield
    finally:
        _budgets.pop()


def free_bytes(device: torch.device) -> int:
    """Bytes that could be allocated on `device` now; what PyTorch caches there counts as free."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
    else:
        free = _available_bytes()
    return max(0, min(free, _budgets[-1] - taken_bytes(device))) if _budgets else free


def taken_bytes(device: torch.device) -> int:
    """Bytes that this process has allocated on `device`; mapped files are left out."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    fields = _fields("/proc/self/status")
    return sum(fields.get(name, 0) for name in ("RssAnon", "RssShmem"))


def give_back(device: torch.device) -> None:
    """Let the system have what was freed since: glibc keeps pages that lie between others in use,
    two fifths of what a fit on a CPU takes where rows that wait are allocated among activations.
    """
    if device.type == "cpu" and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def _fields(path: str) -> dict[str, int]:
    """The sizes, in bytes, of a file of the kernel's; empty where there is none."""
    if not os.path.exists(path):
        return {}
    with open(path) as lines:
        words = (line.replace(":", " ").split() for line in lines)
        return {w[0]: int(w[1]) * 1024 for w in words if w[-1] == "kB"}


def _available_bytes() -> int:
    """MemAvailable of the kernel, bounded by the control group that we run in."""
    available = _fields("/proc/meminfo").get("MemAvailable")
    if available is None:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    root = "/sys/fs/cgroup/memory"
    if os.path.exists(f"{root}.max"):
        with open(f"{root}.max") as limit, open(f"{root}.current") as used:
            bound = limit.read().strip()
            if bound != "max":
                available = min(available, int(bound) - int(used.read()))
    return max(available, 0)
