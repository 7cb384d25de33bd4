"""Progress in a terminal: one bar a stage, with rate and time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


@contextmanager
def showing(console: Terminal) -> Iterator[Callable[[str, int, int], None]]:
    """A progress callback with one bar a stage: done, rate and time left."""
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, tuple[TaskID, float, int]] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, rate=""), time.perf_counter(), done
            task, start, first = tasks[stage]
            elapsed = time.perf_counter() - start
            per_token = stage in PER_TOKEN
            rate = (
                f"{(done - first) / elapsed:,.0f} tokens/s" if elapsed > 0.2 and per_token else ""
            )
            bars.update(task, completed=done, total=total, rate=rate)

        yield update
