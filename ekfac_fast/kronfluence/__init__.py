"""The drop-in backend: unchanged kronfluence scripts, same files, same scores, on our ops.

    import ekfac_fast.kronfluence as fast

    fast.enable()            # from here on; fast.disable() restores kronfluence as it was
    with fast.enabled():     # or for a block
        ...
    print(fast.report())     # which module took which path in which stage, and why

or, without touching the script, `python -m ekfac_fast.kronfluence script.py args...`.

What differs from kronfluence, and by how much: `docs/kronfluence.md`. Importing this package does
not import kronfluence; enabling it does.
"""

from .options import Options
from .report import Report, Row, report
from .switch import disable, enable, enabled

__all__ = ["Options", "Report", "Row", "disable", "enable", "enabled", "report"]
