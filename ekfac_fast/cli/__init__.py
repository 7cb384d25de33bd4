"""The command line: `ekfac-fast` or `python -m ekfac_fast`."""

from .commands import app

__all__ = ["app"]
