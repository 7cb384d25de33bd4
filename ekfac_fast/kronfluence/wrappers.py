"""kronfluence's own loops, called with what they spend for nothing taken out."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from kronfluence.arguments import ScoreArguments
from kronfluence.module.tracked_module import TrackedModule
from torch import Tensor, nn

from ..ops.products import products_for
from .eigendecomposition import check_sizes
from .modules import Backed, FastLinear, adopt

Scores = dict[str, Tensor]
_search = threading.local()


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


def on_products(loop: Callable[..., Any]) -> Callable[..., Any]:
    """A loop over batches, its frozen linear layers on the fastest product."""

    @functools.wraps(loop)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = (x for x in (*args, *kwargs.values()) if isinstance(x, nn.Module))
        with products_for(next(given)):
            return loop(*args, **kwargs)

    return wrapper


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


@contextmanager
def _searching() -> Iterator[None]:
    _search.active = True
    try:
        yield
    finally:
        _search.active = False


def while_searching(release: Callable[[], None]) -> Callable[[], None]:
    """kronfluence's `release_memory`, in full only while a batch size is being searched.

    It collects garbage, resets torch.compile (throwing away every compiled graph) and empties the
    CUDA cache, up to six times a stage. Tensors here are freed by reference counts; only the
    tracebacks of a failed attempt hold cycles, and only then is the collection worth its time.
    """

    def release_memory() -> None:
        if getattr(_search, "active", False):
            release()
        elif torch.cuda.is_available():
            torch.cuda.empty_cache()

    return release_memory


def releasing(search: Callable[..., Any]) -> Callable[..., Any]:
    """kronfluence's `find_executable_batch_size`, with full releases inside."""

    def find_executable_batch_size(*args: Any, **kwargs: Any) -> Any:
        with _searching():
            return search(*args, **kwargs)

    return find_executable_batch_size
