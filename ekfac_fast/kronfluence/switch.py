"""Turning the backend on and off: one switch per process, safe under threads.

The backend is installed while `enable()` is in force or any `with enabled()` block is open, in
whatever thread, and every name it replaced is restored when the last of them ends. A stage that
has begun keeps the path it began with.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

from . import options
from .options import Hold, Options

SUPPORTED = "kronfluence >= 1.0.1, < 2"


_lock = threading.RLock()
_enabled: Hold | None = None


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
    if options.current() is None:
        check_version()
        # Imported here: it imports kronfluence, whose version had to be checked first.
        from . import patches

        patches.install()
    options.add(hold)


def _remove(hold: Hold) -> None:
    if options.remove(hold):
        from . import patches

        patches.restore()
