"""Factors as a folder that kronfluence reads: `factors_<name>` in its output folder."""

from pathlib import Path
from typing import Any

import torch

from ..checks import path
from ..errors import ArgumentError, StoreError
from ..store.files import load_json, save_json, save_tensors
from ..store.manifest import MANIFEST
from .factors import (
    COVARIANCES,
    EIGENVALUES,
    EIGENVECTORS,
    LAMBDA,
    LAMBDA_COUNT,
    TOKEN_COUNTS,
    Factors,
)

ARGUMENTS = "factor_arguments.json"
# All but the covariances themselves.
FILES = (
    *TOKEN_COUNTS.values(),
    *EIGENVECTORS.values(),
    *EIGENVALUES.values(),
    LAMBDA,
    LAMBDA_COUNT,
)


def export_factors(factors: Factors, out: str | Path) -> Path:
    """Write factors as kronfluence does: every tensor under every layer's name, in fp32 or fp64.

    A fit that kept its covariances is such a folder already. Without them (`keep_covariances`)
    kronfluence scores with what is written, and cannot decompose again.

    Raises:
        ArgumentError: a covariance is a diagonal, which kronfluence does not know; names the layer.
        StoreError: `out` is a result folder; a file cannot be read or written.
    """
    out = path("out", out)
    if (out / MANIFEST).exists():
        raise StoreError(f"{out} is a result folder of ours: choose another one to export to")
    if narrow := [name for name, x in factors.items() if 1 in (x.Qa.ndim, x.Qg.ndim)]:
        raise ArgumentError(
            f"layer {narrow[0]} has a covariance that is a diagonal alone, which kronfluence does "
            "not know: fit other layers to export"
        )
    covariances = COVARIANCES.values() if factors.has_covariances else ()
    for name in (*covariances, *FILES):
        found = factors.stored(name).items()
        wide = {n: x.float() if x.dtype == torch.bfloat16 else x for n, x in found}
        save_tensors(out / name, wide)
    save_json(out / ARGUMENTS, load_json(factors.folder / ARGUMENTS), checksum=False)
    return out


def kronfluence_arguments(eigendecomposition: torch.dtype) -> dict[str, Any]:
    """`factor_arguments.json` as kronfluence writes it for these factors."""
    return {
        "strategy": "ekfac",
        "use_empirical_fisher": False,
        "amp_dtype": None,
        "amp_scale": 2.0**16,
        "has_shared_parameters": False,
        "covariance_max_examples": None,
        "covariance_data_partitions": 1,
        "covariance_module_partitions": 1,
        "activation_covariance_dtype": "torch.float32",
        "gradient_covariance_dtype": "torch.float32",
        "eigendecomposition_dtype": str(eigendecomposition),
        "lambda_max_examples": None,
        "lambda_data_partitions": 1,
        "lambda_module_partitions": 1,
        "use_iterative_lambda_aggregation": False,
        "offload_activations_to_cpu": False,
        "per_sample_gradient_dtype": "torch.float32",
        "lambda_dtype": "torch.float32",
    }
