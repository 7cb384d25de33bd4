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

from ..report.text import duration
from ..stages.run import Stage
from .terminal import Terminal

PER_TOKEN = set(Stage) - {Stage.EIGENDECOMPOSITION, Stage.REFINEMENT}
# Between two lines of a log.
SECONDS = 30.0


@dataclass
class Speed:
    """How fast a stage goes, from its first report on."""

    first: int
    start: float = field(default_factory=lambda: time.perf_counter())

    def rate(self, stage: str, done: int) -> str:
        """Tokens a second, of stages that count them."""
        elapsed = time.perf_counter() - self.start
        counts = elapsed > 0.2 and stage in PER_TOKEN and done > self.first
        return f"{(done - self.first) / elapsed:,.0f} tokens/s" if counts else ""

    def left(self, done: int, total: int) -> str:
        """Time that the rest takes at this rate."""
        if done <= self.first:
            return ""
        elapsed = time.perf_counter() - self.start
        return f"{duration(elapsed * (total - done) / (done - self.first))} left"


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
        tasks: dict[str, tuple[TaskID, Speed]] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, rate=""), Speed(done)
            task, speed = tasks[stage]
            bars.update(task, completed=done, total=total, rate=speed.rate(stage, done))

        yield update


def _logged(console: Terminal) -> Callable[[str, int, int], None]:
    """A line where a stage ends, and every half minute until then."""
    speeds: dict[str, Speed] = {}
    last = time.perf_counter()

    def update(stage: str, done: int, total: int) -> None:
        nonlocal last
        speed = speeds.setdefault(stage, Speed(done))
        if done < speed.first:  # the stage has begun again, with other data
            speed = speeds[stage] = Speed(done)
        now = time.perf_counter()
        if done < total and now - last < SECONDS:
            return
        last = now
        parts = [f"{stage}: {done:,} of {total:,}", speed.rate(stage, done)]
        parts.append(speed.left(done, total) if done < total else "")
        console.say(", ".join(filter(None, parts)))

    return update
