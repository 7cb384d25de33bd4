"""kronfluence's own loops, called with what they spend for nothing taken out."""

import functools
from collections.abc import Callable
from typing import Any

from kronfluence.arguments import ScoreArguments
from kronfluence.module.tracked_module import TrackedModule
from torch import Tensor, nn

from .eigendecomposition import check_sizes
from .modules import Backed, FastLinear, adopt

Scores = dict[str, Tensor]


def adopting(update_factor_args: Callable[..., None]) -> Callable[..., None]:
    """The first call of every stage: modules prepared without the backend join it."""

    @functools.wraps(update_factor_args)
    def wrapper(model: nn.Module, factor_args: Any) -> None:
        adopt(model)
        update_factor_args(model=model, factor_args=factor_args)

    return wrapper


def set_factors(
    model: nn.Module, factor_name: str, factors: dict[str, Tensor], clone: bool = False
) -> None:
    """kronfluence's function of this name, checked, and without the copy where nothing needs it.

    kronfluence's own path changes factors in place, so it gets its copies; ours never does.
    """
    check_sizes({factor_name: factors}, model)
    for module in model.modules():
        if isinstance(module, TrackedModule):
            factor = factors[module.name]
            reads_only = (
                isinstance(module, FastLinear)
                and module.options is not None
                and module.obstacle(module.current_mode) is None
            )
            module.set_factor(factor_name, factor.clone() if clone and not reads_only else factor)


def in_score_dtype(compute: Callable[..., Scores]) -> Callable[..., Scores]:
    """Sum scores over modules in fp32 or fp64 (our trackers do not round), round them once here."""

    @functools.wraps(compute)
    def wrapper(*args: Any, score_args: ScoreArguments, **kwargs: Any) -> Scores:
        scores = compute(*args, score_args=score_args, **kwargs)
        return {name: s.to(score_args.score_dtype) for name, s in scores.items()}

    return wrapper


def measuring(compute: Callable[..., Scores]) -> Callable[..., Scores]:
    """Self-influence with a measurement: tell the modules, whose queries then stay rotated."""

    @functools.wraps(compute)
    def wrapper(*args: Any, model: nn.Module, **kwargs: Any) -> Scores:
        adopt(model)
        backed = [module for module in model.modules() if isinstance(module, Backed)]
        for module in backed:
            module.scores_measurement = True
        try:
            return compute(*args, model=model, **kwargs)
        finally:
            for module in backed:
                module.scores_measurement = False

    return wrapper
