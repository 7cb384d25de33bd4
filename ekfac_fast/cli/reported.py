"""Where commands print, and how they end in an error that says what to do."""

import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from ..errors import Error, Notice
from .terminal import Terminal

console = Terminal()


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Errors that say what to do are printed, without a traceback, with exit status 1."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.showwarning = _show
            try:
                command(*args, **kwargs)
            except Error as error:
                console.say(f"error: {error}", style="red")
                raise typer.Exit(1) from error

    return run


def _show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """A notice is a line for the reader; other warnings go where they always go."""
    if issubclass(category, Notice):
        console.say(f"note: {message}", style="yellow")
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *where[:2]))
