"""Is it true? What scores predict, held against what happens."""

from typing import TYPE_CHECKING

from ..lazy import loader

if TYPE_CHECKING:
    from .bank import RetrainingBank, retrain
    from .lds import LDS, reliability, validate
    from .patch import tail_patch
    from .removal import Removal, removals

__all__ = [
    "LDS",
    "Removal",
    "RetrainingBank",
    "baselines",
    "reliability",
    "removals",
    "retrain",
    "tail_patch",
    "validate",
]

__getattr__ = loader(
    __name__,
    {
        "LDS": "lds",
        "Removal": "removal",
        "RetrainingBank": "bank",
        "reliability": "lds",
        "removals": "removal",
        "retrain": "bank",
        "tail_patch": "patch",
        "validate": "lds",
    },
    rooms=("baselines",),
)
