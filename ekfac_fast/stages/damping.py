"""What is added to eigenvalues: a number, or a share of each layer's mean."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..checks import is_number, listed, require
from ..curvature.basis import HEURISTIC_DAMPING, LEAST_DAMPING, relative_damping
from ..errors import Notice


def check_damping(damping: float | str | None) -> float | str | None:
    """A number, the same in every layer; or, "0.01x", that share of each layer's mean eigenvalue;
    None: a tenth of it.

    Raises:
        ArgumentError: it is neither a number >= 0 nor such a number with an x behind it.
    """
    if damping is None:
        return None
    value: Any = damping
    if isinstance(damping, str):
        try:
            value = float(damping.strip().removesuffix("x"))
        except ValueError:
            value = None
    require(
        is_number(value) and value >= 0, "damping", damping,
        "a number >= 0, the same in every layer; or one like '0.01x', of each layer's mean "
        "eigenvalue",
    )  # fmt: skip
    relative = isinstance(damping, str) and damping.strip().endswith("x")
    return f"{float(value):g}x" if relative else float(value)


def damping_rule(damping: float | str | None) -> str:
    """Where each layer's damping is from, in words."""
    checked = check_damping(damping)
    if isinstance(checked, float):
        return "the same in every layer, as given"
    return f"{_share(checked):g} x the mean eigenvalue of each layer"


def layer_damping(lam: Tensor, damping: float | str | None) -> float:
    """Of a layer with these eigenvalues, as `check_damping` gave it; of a share at least 1e-16."""
    return damping if isinstance(damping, float) else relative_damping(lam, _share(damping))


def layer_dampings(lam: Mapping[str, Tensor], damping: float | str | None) -> dict[str, float]:
    """Of every layer; a `Notice` where the curvature of all is below the least damping."""
    found = {name: layer_damping(x, damping) for name, x in lam.items()}
    # One layer's alone may be what rounding leaves of zero.
    some = [name for name, x in lam.items() if x.any()]
    if some and not isinstance(damping, float) and {found[n] for n in some} == {LEAST_DAMPING}:
        warnings.warn(
            f"the curvature of {listed(some, 3)} is so small that the damping is the least, "
            f"{LEAST_DAMPING:g}, and no share of it: scores are hardly more than dot products. "
            "Scale the loss up, or give a damping",
            Notice,
            stacklevel=4,
        )
    return found


def _share(damping: str | None) -> float:
    return HEURISTIC_DAMPING if damping is None else float(damping[:-1])
