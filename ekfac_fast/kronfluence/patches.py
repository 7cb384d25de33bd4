"""Every name of kronfluence that the backend replaces, and how it is put back.

The registry holds the classes that wrap `nn.Linear` and `nn.Conv2d`; loops are free functions that
other modules import by name, so they are replaced where they are looked up. No source is changed.
"""

import importlib
from collections.abc import Callable
from functools import reduce
from typing import Any

from kronfluence.module.conv2d import TrackedConv2d
from kronfluence.module.linear import TrackedLinear
from kronfluence.module.tracked_module import TrackedModule
from torch import nn

from . import eigendecomposition, modules, query_batches, wrappers

# Layer type -> (kronfluence's class, ours).
REGISTRY = {
    nn.Linear: (TrackedLinear, modules.FastLinear),
    nn.Conv2d: (TrackedConv2d, modules.OwnConv2d),
}


def _instead(replacement: Callable) -> Callable[[Callable], Callable]:
    return lambda _: replacement


def _all(*wrappers: Callable) -> Callable[[Callable], Callable]:
    """The first is the outermost."""
    return lambda function: reduce(lambda inner, outer: outer(inner), reversed(wrappers), function)


# (module of kronfluence, name) -> what makes our function out of kronfluence's.
FUNCTIONS: dict[tuple[str, str], Callable[[Callable], Callable]] = {
    ("factor.covariance", "update_factor_args"): wrappers.adopting,
    ("factor.eigen", "update_factor_args"): wrappers.adopting,
    ("score.pairwise", "update_factor_args"): wrappers.adopting,
    ("score.self", "update_factor_args"): wrappers.adopting,
    ("factor.eigen", "set_factors"): _instead(wrappers.set_factors),
    ("score.pairwise", "set_factors"): _instead(wrappers.set_factors),
    ("score.self", "set_factors"): _instead(wrappers.set_factors),
    ("computer.computer", "release_memory"): wrappers.while_searching,
    ("score.dot_product", "release_memory"): wrappers.while_searching,
    ("score.self", "release_memory"): wrappers.while_searching,
    ("computer.factor_computer", "find_executable_batch_size"): wrappers.releasing,
    ("computer.score_computer", "find_executable_batch_size"): wrappers.releasing,
    ("computer.factor_computer", "perform_eigendecomposition"): _instead(
        eigendecomposition.perform_eigendecomposition
    ),
    ("computer.factor_computer", "fit_covariance_matrices_with_loader"): wrappers.on_products,
    ("computer.factor_computer", "fit_lambda_matrices_with_loader"): wrappers.on_products,
    ("computer.score_computer", "compute_pairwise_scores_with_loaders"): _all(
        wrappers.on_products, wrappers.in_score_dtype, query_batches.holding_queries
    ),
    ("computer.score_computer", "compute_pairwise_query_aggregated_scores_with_loaders"): _all(
        wrappers.on_products, wrappers.in_score_dtype
    ),
    ("computer.score_computer", "compute_self_scores_with_loaders"): _all(
        wrappers.on_products, wrappers.in_score_dtype
    ),
    ("computer.score_computer", "compute_self_measurement_scores_with_loaders"): _all(
        wrappers.on_products, wrappers.in_score_dtype, wrappers.measuring
    ),
}

# (owner, name, kronfluence's, ours) of what is replaced now.
_replaced: list[tuple[Any, str, Any, Any]] = []


def install() -> None:
    """Replace registry entries and functions; a user's own registry entries are left alone."""
    for layer, (own, ours) in REGISTRY.items():
        if TrackedModule.SUPPORTED_MODULES.get(layer) is own:
            TrackedModule.SUPPORTED_MODULES[layer] = ours
    for (path, name), make in FUNCTIONS.items():
        owner = importlib.import_module(f"kronfluence.{path}")
        theirs = getattr(owner, name)
        made = make(theirs)
        setattr(owner, name, made)
        _replaced.append((owner, name, theirs, made))


def restore() -> None:
    """Put back what `install` replaced, except where something else was put on top since."""
    for layer, (own, ours) in REGISTRY.items():
        if TrackedModule.SUPPORTED_MODULES.get(layer) is ours:
            TrackedModule.SUPPORTED_MODULES[layer] = own
    while _replaced:
        owner, name, own, ours = _replaced.pop()
        if getattr(owner, name) is ours:
            setattr(owner, name, own)
