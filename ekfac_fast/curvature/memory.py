"""Free memory: of a device, of the machine, of the control group that we run in."""

import os

import torch


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
