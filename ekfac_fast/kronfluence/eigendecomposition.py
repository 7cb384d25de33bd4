"""All eigendecompositions of a model: validated, deduplicated, largest first, several at once.

    C = (sum / count, symmetrised) = Q diag(values) Q^T, values ascending, in
    `eigendecomposition_dtype` (fp64 unless asked otherwise), stored in the covariance's dtype.

Layers that read the same tensor have equal covariances, bit for bit: they share one result.
"""

from dataclasses import dataclass, field

import torch
from kronfluence.arguments import FactorArguments
from kronfluence.module.tracked_module import TrackedModule
from kronfluence.module.utils import get_tracked_module_names
from kronfluence.utils.constants import (
    ACTIVATION_COVARIANCE_MATRIX_NAME,
    ACTIVATION_EIGENVALUES_NAME,
    ACTIVATION_EIGENVECTORS_NAME,
    EIGENDECOMPOSITION_FACTOR_NAMES,
    FACTOR_TYPE,
    GRADIENT_COVARIANCE_MATRIX_NAME,
    GRADIENT_EIGENVALUES_NAME,
    GRADIENT_EIGENVECTORS_NAME,
    NUM_ACTIVATION_COVARIANCE_PROCESSED,
    NUM_GRADIENT_COVARIANCE_PROCESSED,
)
from kronfluence.utils.logger import TQDM_BAR_FORMAT
from kronfluence.utils.state import State
from torch import Tensor, nn
from tqdm import tqdm

from ..curvature.eigen import Job, eigendecompositions, largest_first

SIDES = (
    (
        ACTIVATION_COVARIANCE_MATRIX_NAME,
        NUM_ACTIVATION_COVARIANCE_PROCESSED,
        ACTIVATION_EIGENVECTORS_NAME,
        ACTIVATION_EIGENVALUES_NAME,
    ),
    (
        GRADIENT_COVARIANCE_MATRIX_NAME,
        NUM_GRADIENT_COVARIANCE_PROCESSED,
        GRADIENT_EIGENVECTORS_NAME,
        GRADIENT_EIGENVALUES_NAME,
    ),
)


@dataclass(frozen=True)
class Wanted(Job):
    """One matrix, and each (module, name of vectors, name of values) that wants its result."""

    wanted_by: list[tuple[str, str, str]] = field(default_factory=list)


@torch.no_grad()
def perform_eigendecomposition(
    covariance_factors: FACTOR_TYPE,
    model: nn.Module,
    state: State,
    factor_args: FactorArguments,
    disable_tqdm: bool = False,
) -> FACTOR_TYPE:
    """kronfluence's function of this name: {factor name: {module: tensor on the CPU}}.

    Raises:
        ValueError: a covariance is missing, has the wrong size (another model), was never counted
            or is not finite; names the module and what to do.
    """
    names = get_tracked_module_names(model)
    check_sizes(covariance_factors, model)
    every = _jobs(covariance_factors, names)
    jobs = [every[i] for i in largest_first(every)]
    results: dict[str, dict[str, Tensor]] = {name: {} for name in EIGENDECOMPOSITION_FACTOR_NAMES}
    with tqdm(
        total=len(names) * len(SIDES),
        desc="Performing Eigendecomposition",
        bar_format=TQDM_BAR_FORMAT,
        disable=not state.is_main_process or disable_tqdm,
    ) as progress:
        solved = eigendecompositions(jobs, state.device, factor_args.eigendecomposition_dtype)
        for job, (values, vectors) in zip(jobs, solved, strict=True):
            for user, (module, *wanted) in enumerate(job.wanted_by):
                for name, x in zip(wanted, (vectors, values), strict=True):
                    # safetensors refuses tensors that share memory.
                    results[name][module] = x.clone() if user else x
            progress.update(len(job.wanted_by))
    # In the model's order, as kronfluence writes them.
    return {name: {m: by_module[m] for m in names} for name, by_module in results.items()}


def check_sizes(factors: FACTOR_TYPE, model: nn.Module) -> None:
    """Refuse covariances, eigenvectors or eigenvalues that were fitted for another model.

    Raises:
        ValueError: names the factor, the module, both shapes.
    """
    for module in model.modules():
        if not isinstance(module, TrackedModule):
            continue
        for name, by_module in factors.items():
            if module.name not in by_module:
                raise ValueError(
                    f"factor {name!r} has no entry for module {module.name!r}: either the factors "
                    "belong to another model, or the module took no part in the forward pass when "
                    "they were fitted. Fit the factors again, or name the modules that do take "
                    "part in Task.get_influence_tracked_modules"
                )
            layer = module.original_module
            if type(layer) not in (nn.Linear, nn.Conv2d):
                continue
            O, J = len(layer.weight), layer.weight[0].numel() + (layer.bias is not None)
            expected = {
                ACTIVATION_COVARIANCE_MATRIX_NAME: (J, J),
                ACTIVATION_EIGENVECTORS_NAME: (J, J),
                ACTIVATION_EIGENVALUES_NAME: (J,),
                GRADIENT_COVARIANCE_MATRIX_NAME: (O, O),
                GRADIENT_EIGENVECTORS_NAME: (O, O),
                GRADIENT_EIGENVALUES_NAME: (O,),
                "lambda_matrix": (O, J),
            }.get(name)
            found = tuple(by_module[module.name].shape)
            if expected is not None and found != expected:
                raise ValueError(
                    f"factor {name!r} of module {module.name!r} has shape {list(found)}, expected "
                    f"{list(expected)}: the factors belong to another model. Use another "
                    "factors_name or output_dir, or fit them again with overwrite_output_dir=True"
                )


def _jobs(factors: FACTOR_TYPE, names: list[str]) -> list[Wanted]:
    jobs: list[Wanted] = []
    for cov_name, count_name, vectors_name, values_name in SIDES:
        previous = None
        for module in names:
            cov, count = factors[cov_name][module], factors[count_name][module]
            label = f"{cov_name} of module {module!r} ({list(cov.shape)}, {cov.dtype})"
            if previous is None or not (previous.count.equal(count) and previous.sum.equal(cov)):
                previous = Wanted(cov, count, label)
                previous.check()
                jobs.append(previous)
            previous.wanted_by.append((module, vectors_name, values_name))
    return jobs
