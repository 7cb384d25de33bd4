"""Progress: one bar a stage in a terminal, a line every half minute in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from ..stages.run import Stage
from .terminal import Terminal

# Those that count tokens.
PER_TOKEN = {Stage.COVARIANCE, Stage.EIGENVALUE, Stage.SCAN, Stage.DETAIL}
# Between two lines of a log.
SECONDS = 30.0


@dataclass
class Pace:
    """How fast a stage goes, from its first report on."""

    first: int
    start: float = field(default_factory=lambda: time.perf_counter())

    def rate(self, stage: str, done: int) -> str:
        """Tokens a second, of stages that count them."""
        elapsed = time.perf_counter() - self.start
        counts = elapsed > 0.2 and stage in PER_TOKEN
        return f"{(done - self.first) / elapsed:,.0f} tokens/s" if counts else ""

    def left(self, done: int, total: int) -> str:
        """Time that the rest takes at this rate."""
        if done <= self.first:
            return ""
        elapsed = time.perf_counter() - self.start
        minutes = elapsed * (total - done) / (done - self.first) / 60
        return f"{minutes:.0f} min left" if minutes >= 1.5 else f"{60 * minutes:.0f} s left"


@contextmanager
def showing(console: Terminal) -> Iterator[Callable[[str, int, int], None]]:
    """A progress callback: done, rate and time left of every stage."""
    if not console.is_terminal:
        yield _logged(console)
        return
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, tuple[TaskID, Pace]] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, rate=""), Pace(done)
            task, pace = tasks[stage]
            bars.update(task, completed=done, total=total, rate=pace.rate(stage, done))

        yield update


def _logged(console: Terminal) -> Callable[[str, int, int], None]:
    """A line where a stage ends, and every half minute until then."""
    paces: dict[str, Pace] = {}
    last = time.perf_counter()

    def update(stage: str, done: int, total: int) -> None:
        nonlocal last
        pace = paces.setdefault(stage, Pace(done))
        now = time.perf_counter()
        if done < total and now - last < SECONDS:
            return
        last = now
        parts = [f"{stage}: {done:,} of {total:,}", pace.rate(stage, done)]
        parts.append(pace.left(done, total) if done < total else "")
        console.say(", ".join(filter(None, parts)))

    return update
