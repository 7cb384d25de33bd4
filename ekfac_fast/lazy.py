"""Public names of a package, imported when they are first asked for.

`ekfac-fast --help` then takes no second: torch and everything on it wait for a command.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def loader(package: str, homes: Mapping[str, str], rooms: tuple[str, ...] = ()) -> Callable:
    """A module's `__getattr__` (PEP 562).

    Args:
        package: the module's `__name__`.
        homes: name -> module of the package that defines it.
        rooms: subpackages that are names themselves.
    """

    def get(name: str) -> Any:
        if name in homes:
            return getattr(import_module(f"{package}.{homes[name]}"), name)
        if name in rooms:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
