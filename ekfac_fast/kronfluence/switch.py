"""Turning the backend on and off: one switch per process, safe under threads.

The backend is installed while `enable()` is in force or any `with enabled()` block is open, in
whatever thread, and every name it replaced is restored when the last of them ends. A stage that
has begun keeps the path it began with.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

SUPPORTED = "kronfluence >= 1.0.1, < 2"
TRUNCATIONS = ("kronfluence", "randomised")


@dataclass(frozen=True)
class Options:
    """What the user may choose; the defaults change speed only.

    truncation: "kronfluence" truncates queries as the script's own arguments say (`svd_lowrank`,
        or exactly with `use_full_svd=True`); "randomised" replaces both by `queries.truncate`,
        seeded and oversampled.
    hold_queries: score as many query batches in one pass over the training data as fit in
        `memory_share` of the free memory (never fewer than the script asked for).
    memory_share: between 0 and 1.

    Raises:
        ValueError: an unknown truncation, or a share outside [0, 1].
    """

    truncation: str = "kronfluence"
    hold_queries: bool = True
    memory_share: float = 0.25

    def __post_init__(self) -> None:
        if self.truncation not in TRUNCATIONS:
            raise ValueError(
                f"truncation is {self.truncation!r}, expected one of {', '.join(TRUNCATIONS)}"
            )
        if not 0 <= self.memory_share <= 1:
            raise ValueError(f"memory_share is {self.memory_share}, expected a number in [0, 1]")


class Hold:
    """One reason for the backend to be on: an `enable()` or an open `with enabled()` block."""

    def __init__(self, options: Options) -> None:
        self.options = options


_lock = threading.RLock()
_holds: list[Hold] = []
_enabled: Hold | None = None


def current() -> Options | None:
    """The options in force, those set last; None while the backend is off."""
    holds = _holds
    return holds[-1].options if holds else None


def enable(
    truncation: str = "kronfluence", hold_queries: bool = True, memory_share: float = 0.25
) -> None:
    """Run kronfluence on ekfac_fast from the next stage on, for all models prepared or to come.

    Calling it again only replaces the options (see `Options`).

    Raises:
        ModuleNotFoundError: kronfluence is not installed.
        ImportError: its version is not supported.
        ValueError: an option is out of range.
    """
    global _enabled
    hold = Hold(Options(truncation, hold_queries, memory_share))
    with _lock:
        _add(hold)
        if _enabled is not None:
            _remove(_enabled)
        _enabled = hold


def disable() -> None:
    """Undo `enable()`: every replaced name is kronfluence's again. Open blocks stay in force."""
    global _enabled
    with _lock:
        if _enabled is not None:
            _remove(_enabled)
        _enabled = None


@contextmanager
def enabled(
    truncation: str = "kronfluence", hold_queries: bool = True, memory_share: float = 0.25
) -> Iterator[None]:
    """`enable()` for a block; what was in force before is in force after it."""
    hold = Hold(Options(truncation, hold_queries, memory_share))
    with _lock:
        _add(hold)
    try:
        yield
    finally:
        with _lock:
            _remove(hold)


def check_version() -> None:
    """Refuse a kronfluence whose internals are not those we replace."""
    try:
        found = version("kronfluence")
    except PackageNotFoundError as error:
        raise ModuleNotFoundError(
            "kronfluence is not installed. `pip install --no-deps kronfluence==1.0.1` and "
            "`pip install -r requirements/kronfluence.txt` do so without replacing torch",
            name="kronfluence",
        ) from error
    numbers = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
    if not (1, 0, 1) <= numbers < (2,):
        raise ImportError(
            f"kronfluence {found} is installed; ekfac_fast.kronfluence supports {SUPPORTED}. "
            "`pip install --no-deps kronfluence==1.0.1`, or run without the backend",
            name="kronfluence",
        )


def _add(hold: Hold) -> None:
    global _holds
    if not _holds:
        check_version()
        # Imported here: it imports kronfluence, whose version had to be checked first.
        from . import patches

        patches.install()
    # Replaced, never mutated: `current` reads it without the lock.
    _holds = [*_holds, hold]


def _remove(hold: Hold) -> None:
    global _holds
    _holds = [other for other in _holds if other is not hold]
    if not _holds:
        from . import patches

        patches.restore()
