"""Our tracked modules in kronfluence's registry, and the choice of path they make at every stage.

A `FastLinear` owns both kronfluence's trackers and ours and seats one of them when a stage begins:
ours, unless the backend is off or an obstacle is named. `OwnConv2d` always keeps kronfluence's.
"""

from typing import Any

import torch
from kronfluence.arguments import FactorArguments
from kronfluence.factor.config import Diagonal, Ekfac, FactorConfig, Identity, Kfac
from kronfluence.module.conv2d import TrackedConv2d
from kronfluence.module.linear import TrackedLinear
from kronfluence.module.tracked_module import ModuleMode, TrackedModule
from kronfluence.module.tracker.base import BaseTracker
from kronfluence.utils.constants import (
    ACTIVATION_EIGENVALUES_NAME,
    ACTIVATION_EIGENVECTORS_NAME,
    GRADIENT_EIGENVALUES_NAME,
    GRADIENT_EIGENVECTORS_NAME,
    LAMBDA_MATRIX_NAME,
    NUM_LAMBDA_PROCESSED,
    PAIRWISE_SCORE_MATRIX_NAME,
)
from torch import nn

from ..curvature.basis import Basis
from ..curvature.offload import Travelling, placed
from ..errors import NotFiniteError
from ..ops.shapes import FLOATS
from . import options as switched
from .report import FAST, STOCK, Row, record
from .storage import build
from .trackers.base import BatchSize, TokenTracker
from .trackers.covariance import FastCovarianceTracker
from .trackers.eigenvalues import FastLambdaTracker
from .trackers.gradient_sum import FastGradientTracker
from .trackers.pairwise import FastPairwiseScoreTracker
from .trackers.queries import FastPreconditionTracker
from .trackers.self_scores import FastSelfScoreTracker, FastSelfScoreWithMeasurementTracker

TRACKERS: dict[ModuleMode, type[TokenTracker]] = {
    ModuleMode.COVARIANCE: FastCovarianceTracker,
    ModuleMode.LAMBDA: FastLambdaTracker,
    ModuleMode.GRADIENT_AGGREGATION: FastGradientTracker,
    ModuleMode.PRECONDITION_GRADIENT: FastPreconditionTracker,
    ModuleMode.PAIRWISE_SCORE: FastPairwiseScoreTracker,
    ModuleMode.SELF_SCORE: FastSelfScoreTracker,
    ModuleMode.SELF_MEASUREMENT_SCORE: FastSelfScoreWithMeasurementTracker,
}
CONSUMED = (
    ACTIVATION_EIGENVALUES_NAME,
    ACTIVATION_EIGENVECTORS_NAME,
    GRADIENT_EIGENVALUES_NAME,
    GRADIENT_EIGENVECTORS_NAME,
    LAMBDA_MATRIX_NAME,
    NUM_LAMBDA_PROCESSED,
)
DTYPES = {
    ModuleMode.COVARIANCE: ("activation_covariance_dtype", "gradient_covariance_dtype"),
    ModuleMode.LAMBDA: ("per_sample_gradient_dtype", "lambda_dtype"),
}
SCORE_DTYPES = ("per_sample_gradient_dtype", "precondition_dtype", "score_dtype")
# Where a model keeps what its passes tell of their size.
SIZES = "_ekfac_fast_batch_size"
CONFIGS = {"identity": Identity, "diagonal": Diagonal, "kfac": Kfac, "ekfac": Ekfac}


class Backed(TrackedModule):
    """A tracked module that chooses its path when a stage begins."""

    options: switched.Options | None = None
    basis: Basis | Travelling[Basis] | None = None
    # Of the model that the module is part of.
    batch_size: BatchSize = BatchSize()
    # The stage is self-influence with a measurement; the stored gradient sum is of training data.
    scores_measurement: bool = False
    aggregate_is_train: bool = False

    def update_factor_args(self, factor_args: FactorArguments) -> None:
        """The first thing every stage calls: the switch is read here, once a stage."""
        super().update_factor_args(factor_args)
        self.options = switched.current()
        self.basis = None

    def obstacle(self, mode: ModuleMode) -> str | None:
        """Why this module keeps kronfluence's own path in `mode`; None where ours serves."""
        return f"{type(self.original_module).__name__} is not covered"

    def set_mode(self, mode: ModuleMode, release_memory: bool = False) -> None:
        """Seat the tracker of the chosen path, then switch to it."""
        if mode != ModuleMode.DEFAULT:
            self._seat(mode)
        super().set_mode(mode, release_memory)
        if mode == ModuleMode.DEFAULT and release_memory:
            self.basis = None

    def get_factor(self, factor_name: str) -> Any:
        """A factor as kronfluence collects it."""
        factor = super().get_factor(factor_name)
        tracker = self._trackers[self.current_mode]
        if factor is None or isinstance(tracker, TokenTracker):
            return None if factor is None else tracker.finished(factor_name, factor)
        if (
            factor_name == PAIRWISE_SCORE_MATRIX_NAME
            and self.options is not None
            and self.score_args.compute_per_module_scores
        ):
            # kronfluence forgets to clear per-module scores between batches, and its tracker of
            # post-processed gradients adds to what it finds.
            self.storage[PAIRWISE_SCORE_MATRIX_NAME] = None
        return factor

    def _seat(self, mode: ModuleMode) -> None:
        why = "the backend was off" if self.options is None else self.obstacle(mode)
        own: dict[ModuleMode, BaseTracker] = self.__dict__.setdefault(
            "own_trackers", dict(self._trackers)
        )
        if why is None:
            fast: dict[ModuleMode, TokenTracker] = self.__dict__.setdefault("fast_trackers", {})
            chosen = fast.setdefault(mode, TRACKERS[mode](self))
        else:
            chosen = own[mode]
        if self._trackers[mode] is not chosen:
            self._trackers[mode].release_hooks()
            self._trackers[mode].release_memory()
            self._trackers[mode] = chosen
        if self.options is not None:
            kind, path = type(self.original_module).__name__, STOCK if why else FAST
            record(Row(self.name, kind, mode.value, path, why or ""))


class FastLinear(Backed, TrackedLinear):
    """`nn.Linear` on our ops."""

    def obstacle(self, mode: ModuleMode) -> str | None:
        """Why this module keeps kronfluence's own path in `mode`; None where ours serves."""
        if mode == ModuleMode.COVARIANCE:
            return self._odd_dtype(self.factor_args, DTYPES[mode])
        if self.per_sample_gradient_process_fnc is not None:
            return "the task post-processes per-sample gradients"
        strategy = self.factor_args.strategy
        if type(FactorConfig.CONFIGS.get(strategy)) is not CONFIGS.get(strategy):
            return f"strategy {strategy!r} was redefined"
        if mode == ModuleMode.LAMBDA:
            return self._odd_dtype(self.factor_args, DTYPES[mode])
        return self._odd_dtype(self.score_args, SCORE_DTYPES)

    @staticmethod
    def _odd_dtype(args: Any, names: tuple[str, ...]) -> str | None:
        for name in names:
            dtype = getattr(args, name)
            if dtype not in FLOATS:
                return f"{name} is {dtype}"
        return None

    def prepare_storage(self, device: torch.device) -> None:
        """Prepare the factors for scoring; on our path they go to the device once, if they fit."""
        if self.options is None or self.obstacle(ModuleMode.PRECONDITION_GRADIENT) is not None:
            self.basis = None
            super().prepare_storage(device)
            return
        args, bias = self.score_args, self.original_module.bias is not None
        sizes = self.out_features, self.in_features + bias
        dtype = torch.promote_types(args.per_sample_gradient_dtype, args.precondition_dtype)
        try:
            built = build(
                self.storage, self.factor_args.strategy, args.damping_factor, sizes, dtype
            )
        except NotFiniteError as error:
            raise NotFiniteError(f"module {self.name!r}: {error}") from error
        self.basis = placed(built, sizes, device)
        for name in CONSUMED:
            self.storage[name] = None

    def basis_on(self, device: torch.device) -> Basis:
        """The basis, on `device`; prepared now if the loop did not."""
        if self.basis is None:
            self.prepare_storage(device)
        assert self.basis is not None
        return self.basis.at(device)


class OwnConv2d(Backed, TrackedConv2d):
    """`nn.Conv2d` on kronfluence's own path, with its per-module scores cleared as they should."""


BACKED: dict[type[TrackedModule], type[Backed]] = {
    TrackedLinear: FastLinear,
    TrackedConv2d: OwnConv2d,
}


def adopt(model: nn.Module) -> None:
    """Let modules that were prepared before the backend was enabled choose their path as well."""
    sizes: BatchSize | None = model.__dict__.get(SIZES)
    if sizes is None:
        sizes = model.__dict__[SIZES] = BatchSize()
        model.register_forward_pre_hook(sizes.see, with_kwargs=True)
    for module in model.modules():
        if type(module) in BACKED:
            module.__class__ = BACKED[type(module)]
        if isinstance(module, Backed):
            module.__dict__["batch_size"] = sizes
        elif isinstance(module, TrackedModule):
            kind = type(module.original_module).__name__
            why = f"{type(module).__name__} is not one of kronfluence's own classes"
            record(Row(module.name, kind, "every stage", STOCK, why))
