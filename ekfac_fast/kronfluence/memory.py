"""Free memory, and the releases that kronfluence's loops make more often than they need."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_search = threading.local()


def free_bytes(device: torch.device) -> int:
    """Bytes that could be allocated on `device` now; what PyTorch caches there counts as free."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return _available_bytes()


def _available_bytes() -> int:
    """MemAvailable of the kernel, bounded by the control group that we run in."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    root = "/sys/fs/cgroup/memory"
    if os.path.exists(f"{root}.max"):
        with open(f"{root}.max") as limit, open(f"{root}.current") as used:
            bound = limit.read().strip()
            if bound != "max":
                available = min(available, int(bound) - int(used.read()))
    return max(available, 0)


@contextmanager
def _searching() -> Iterator[None]:
    _search.active = True
    try:
        yield
    finally:
        _search.active = False


def while_searching(release: Callable[[], None]) -> Callable[[], None]:
    """kronfluence's `release_memory`, in full only while a batch size is being searched.

    It collects garbage, resets torch.compile (throwing away every compiled graph) and empties the
    CUDA cache, up to six times a stage. Tensors here are freed by reference counts; only the
    tracebacks of a failed attempt hold cycles, and only then is the collection worth its time.
    """

    def release_memory() -> None:
        if getattr(_search, "active", False):
            release()
        elif torch.cuda.is_available():
            torch.cuda.empty_cache()

    return release_memory


def releasing(search: Callable[..., Any]) -> Callable[..., Any]:
    """kronfluence's `find_executable_batch_size`, with full releases inside."""

    def find_executable_batch_size(*args: Any, **kwargs: Any) -> Any:
        with _searching():
            return search(*args, **kwargs)

    return find_executable_batch_size
