"""Modules that only an optional extra installs."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .errors import MissingExtra


def optional(name: str, extra: str) -> Any:
    """Import a module of an extra (untyped: it need not be there); MissingExtra says which."""
    if find_spec(name.partition(".")[0]) is None:
        raise MissingExtra(f"{name} is not installed: pip install 'ekfac-fast[{extra}]'")
    return import_module(name)
