"""All eigendecompositions of a model: validated, deduplicated, largest first, several at once.

    C = (sum / count, symmetrised) = Q diag(values) Q^T, values ascending, in
    `eigendecomposition_dtype` (fp64 unless asked otherwise), stored in the covariance's dtype.

Layers that read the same tensor have equal covariances, bit for bit: they share one result.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from accelerate.utils.memory import should_reduce_batch_size
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
from kronfluence.utils.state import State, release_memory
from torch import Tensor, nn
from tqdm import tqdm

from .memory import free_bytes
from .threads import spread

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
# Matrix, its symmetrised copy, eigenvectors and LAPACK's workspace (2 n^2), in matrices.
WORKSPACE = 5
# A batch beyond this size gains nothing, but postpones the progress bar.
LARGEST_BATCH = 16


@dataclass
class Job:
    """One matrix, and each (module, name of vectors, name of values) that wants its result."""

    cov: Tensor
    count: Tensor
    label: str
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
    jobs = sorted(_jobs(covariance_factors, names), key=lambda job: -job.cov.shape[0])
    results: dict[str, dict[str, Tensor]] = {name: {} for name in EIGENDECOMPOSITION_FACTOR_NAMES}
    with tqdm(
        total=len(names) * len(SIDES),
        desc="Performing Eigendecomposition",
        bar_format=TQDM_BAR_FORMAT,
        disable=not state.is_main_process or disable_tqdm,
    ) as progress:
        solve = _one_by_one if state.device.type == "cpu" else _in_batches
        solved = solve(jobs, state.device, factor_args.eigendecomposition_dtype)
        for job, stored in zip(jobs, solved, strict=True):
            for user, (module, *wanted) in enumerate(job.wanted_by):
                for name, x in zip(wanted, stored, strict=True):
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


def _jobs(factors: FACTOR_TYPE, names: list[str]) -> list[Job]:
    jobs: list[Job] = []
    for cov_name, count_name, vectors_name, values_name in SIDES:
        previous = None
        for module in names:
            cov, count = factors[cov_name][module], factors[count_name][module]
            label = f"{cov_name} of module {module!r} ({list(cov.shape)}, {cov.dtype})"
            if previous is None or not (previous.count.equal(count) and previous.cov.equal(cov)):
                _check_values(cov, count, label)
                previous = Job(cov, count, label)
                jobs.append(previous)
            previous.wanted_by.append((module, vectors_name, values_name))
    return jobs


def _check_values(cov: Tensor, count: Tensor, label: str) -> None:
    if int(count) <= 0:
        raise ValueError(
            f"{label} counts no rows: the attention mask was 0 everywhere, or the module took no "
            "part in the forward pass. Check Task.get_attention_mask and the dataset"
        )
    if not bool(cov.isfinite().all()):
        raise ValueError(
            f"{label} contains NaN or infinity: the loss or an activation overflowed while the "
            "covariances were fitted. Fit them again in a wider dtype (activation_covariance_dtype,"
            " gradient_covariance_dtype, amp_dtype), or exclude the module"
        )


def _mean(job: Job, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The covariance [J,J], exactly symmetric."""
    cov = job.cov.to(device, dtype) / job.count.to(device)
    return (cov + cov.mT) / 2


def _stored(job: Job, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues as kronfluence stores them."""
    vectors, values = (x.to("cpu", job.cov.dtype).contiguous() for x in (vectors, values))
    return vectors, values


def _room(n: int, device: torch.device, dtype: torch.dtype) -> int:
    """How many n x n problems fit into half of the free memory, at least one."""
    return max(1, free_bytes(device) // (2 * WORKSPACE * n * n * dtype.itemsize))


def _one_by_one(
    jobs: list[Job], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """On a CPU: as many at a time as there are threads."""

    def solve(job: Job) -> tuple[Tensor, Tensor]:
        return _stored(job, *torch.linalg.eigh(_mean(job, device, dtype)))

    yield from spread(solve, jobs, most=_room(jobs[0].cov.shape[0], device, dtype) if jobs else 1)


def _in_batches(
    jobs: list[Job], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """On a GPU: equal sizes in one call, as many as fit; one by one where they do not after all."""
    for n, equals in itertools.groupby(jobs, key=lambda job: job.cov.shape[0]):
        group, take = list(equals), min(_room(n, device, dtype), LARGEST_BATCH)
        for start in range(0, len(group), take):
            batch = group[start : start + take]
            stack = torch.stack([_mean(job, device, dtype) for job in batch])
            try:
                solved = list(zip(*torch.linalg.eigh(stack), strict=True))
            except Exception as error:
                if not should_reduce_batch_size(error):
                    raise
                solved = []
            if not solved:
                release_memory()
                solved = [tuple(x.cpu() for x in torch.linalg.eigh(cov)) for cov in stack]
            for job, (values, vectors) in zip(batch, solved, strict=True):
                yield _stored(job, values, vectors)
