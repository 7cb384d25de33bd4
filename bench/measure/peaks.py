"""The most memory that a process has had, step by step."""

import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SAMPLING = 0.01


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(x.split()[1] for x in lines if x.startswith("RssAnon")))


class Peak:
    """Seconds of blocks by name, and the most memory of the process so far."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}
        self.most, self._over = anonymous(), threading.Event()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLING):
            self.most = max(self.most, anonymous())

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Around one step."""
        self._over.clear()
        watch = threading.Thread(target=self._watch)
        watch.start()
        start, busy = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self._over.set()
            watch.join()
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        with_files = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.rows[name] = {
            "seconds": seconds, "of a core": busy, "own": self.most, "with files": with_files,
        }  # fmt: skip
