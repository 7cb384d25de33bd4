"""Free memory: of a device, of the machine, of the control group that we run in, of a budget."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Of what kind of device (None: of any), and bytes; of all threads.
_budgets: list[tuple[str | None, int]] = []
# The control groups that this process is in, and where the kernel shows them.
MEMBERSHIP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Of either version: a group's limit, what it has taken, and what of that are pages of files.
V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
V2 = "memory.max", "memory.current", ("inactive_file", "active_file")


@contextmanager
def budget(limit: int | None, kind: str | None = None) -> Iterator[None]:
    """Count on no more than `limit` bytes a device within, of one kind of device if it is given;
    None changes nothing.

    What this process has taken is part of it, files that are mapped are not: the kernel drops
    their pages where it needs them.
    """
    if limit is None:
        yield
        return
    _budgets.append((kind, limit))
    try:
        yield
    finally:
        _budgets.remove((kind, limit))


def free_bytes(device: torch.device) -> int:
    """Bytes that could be allocated on `device` now; what PyTorch caches there counts as free."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
    else:
        free = _available_bytes()
    left = (limit - taken_bytes(device) for limit in _limits(device))
    return max(0, min([free, *left]))


def total_bytes(device: torch.device) -> int:
    """Bytes of a GPU, or those of them that may be counted on."""
    return min([torch.cuda.mem_get_info(device)[1], *_limits(device)])


def is_limited(device: torch.device) -> bool:
    """Whether a budget is in force there."""
    return bool(_limits(device))


def _limits(device: torch.device) -> list[int]:
    return [limit for kind, limit in _budgets if kind in (None, device.type)]


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
    """MemAvailable of the kernel, bounded by the control groups that we run in."""
    available = _fields("/proc/meminfo").get("MemAvailable")
    if available is None:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, min([available, *_left_by_groups()]))


def _left_by_groups() -> Iterator[int]:
    """What each group leaves, from our own to the root: pages of files count as free."""
    lines = MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.exists() else []
    for _, controllers, place in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        root, (limit, used, files) = (GROUPS / "memory", V1) if controllers else (GROUPS, V2)
        # A container may see its own group as the root, and be told where that is outside.
        group = root / place.lstrip("/")
        for folder in (group, *group.parents[: len(group.parents) - len(root.parents)]):
            if not (folder / limit).exists():
                continue
            bound = (folder / limit).read_text().strip()
            if bound != "max":
                words = map(str.split, (folder / "memory.stat").read_text().splitlines())
                pages = sum(int(size) for name, size in words if name in files)
                yield int(bound) - int((folder / used).read_text()) + pages
