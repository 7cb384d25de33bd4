"""What is switched on now: the options in force, read once at the start of every stage."""

from dataclasses import dataclass

from ..checks import choice, flag, is_number, require

TRUNCATIONS = ("kronfluence", "randomised")


@dataclass(frozen=True)
class Options:
    """What the user may choose; the defaults change speed only.

    truncation: "kronfluence" truncates queries as the script's own arguments say (`svd_lowrank`,
        or exactly with `use_full_svd=True`); "randomised" replaces both by ours
        (`curvature.low_rank.truncate`), seeded and oversampled.
    hold_queries: score as many query batches in one pass over the training data as fit in
        `memory_share` of the free memory (never fewer than the script asked for).
    memory_share: between 0 and 1.

    Raises:
        ArgumentError: an option is none of these.
    """

    truncation: str = "kronfluence"
    hold_queries: bool = True
    memory_share: float = 0.25

    def __post_init__(self) -> None:
        choice("truncation", self.truncation, TRUNCATIONS)
        flag("hold_queries", self.hold_queries)
        share = self.memory_share
        require(is_number(share) and 0 <= share <= 1, "memory_share", share, "a number in [0, 1]")


class Hold:
    """One reason for the backend to be on: an `enable()` or an open `with enabled()` block."""

    def __init__(self, options: Options) -> None:
        self.options = options


# Replaced, never mutated: `current` reads it without a lock.
_holds: tuple[Hold, ...] = ()


def current() -> Options | None:
    """The options in force, those set last; None while the backend is off."""
    holds = _holds
    return holds[-1].options if holds else None


def add(hold: Hold) -> bool:
    """Put options in force; whether they are the first."""
    global _holds
    _holds = (*_holds, hold)
    return len(_holds) == 1


def remove(hold: Hold) -> bool:
    """Take options out of force; whether none are left."""
    global _holds
    _holds = tuple(other for other in _holds if other is not hold)
    return not _holds
