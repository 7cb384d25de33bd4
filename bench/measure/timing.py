"""Time and memory of calls: events on a GPU, wall time on a CPU; candidates taken in turn."""

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ekfac_fast.curvature.memory import give_back

# One sample of a short call is as many calls as take this long.
SAMPLE_SECONDS = 0.02
# A call that takes longer is not repeated as often: full SVDs take half a minute.
BUDGET_SECONDS = 60.0
# Calls of which the host's share is taken: few enough that none waits for a full queue.
HOST_CALLS = 10


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of one call, on a GPU from an idle start to the end of its last kernel."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(
    candidates: dict[str, Callable], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds a call, `repeats` samples of each candidate, taken in turn; fewer of slow ones.

    A sample on a GPU is many calls in one queue, as a pass over layers makes them: where launching
    takes longer than computing, that is what is measured.
    """
    if device.type == "cuda":
        for call in candidates.values():
            call()  # compiles, and fills the allocator
    first = {name: seconds(call, device) for name, call in candidates.items()}
    calls = {name: max(1, int(SAMPLE_SECONDS / s)) for name, s in first.items()}
    rounds = {
        name: max(1, min(repeats, int(BUDGET_SECONDS / (first[name] * calls[name]))))
        for name in candidates
    }
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats):
        for name, call in candidates.items():
            if repeat < rounds[name]:
                n = calls[name]
                taken = seconds(lambda call=call, n=n: often(call, n), device)
                samples[name].append(taken / n)
    return samples


def rotating(calls: Sequence[Callable]) -> Callable:
    """One call that makes each of `calls` in turn: their inputs together outgrow a cache."""
    if len(calls) == 1:
        return calls[0]
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def often(call: Callable, n: int) -> None:
    """`call`, n times."""
    for _ in range(n):
        call()


def host_seconds(call: Callable, device: torch.device) -> float:
    """What the host spends on one call before it may go on to the next; the GPU follows."""
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    often(call, HOST_CALLS)
    taken = (time.perf_counter() - begin) / HOST_CALLS
    torch.cuda.synchronize(device)
    return taken


@contextmanager
def extra_bytes(device: torch.device) -> Iterator[Callable[[], int]]:
    """Memory that the block takes at its peak above what was there: a call, for after the block.

    On a GPU what torch allocates, on a CPU the resident memory of the process.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    give_back(device)
    # 5 resets the peak of the resident memory (proc(5)).
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    yield lambda: _resident("VmHWM") - before


def _resident(field: str) -> int:
    """Bytes of resident memory: `VmRSS` now, `VmHWM` at its peak since the last reset."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024
