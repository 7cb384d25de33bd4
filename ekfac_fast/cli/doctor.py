"""What this machine and this installation have."""

import platform
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import __version__, ops
from ..ops import products


def environment() -> dict[str, str]:
    """Versions and devices by name, as `doctor` prints them."""
    extension, instructions = "not built: CPU tensors take the reference", "not asked"
    if ops.coverage()["covariance"]["cpu"]:
        info = import_module("ekfac_fast._C").build_info()
        extension = f"built for torch {info['torch']}, compiler {info['compiler']}"
        has = [name for name in ("avx2", "avx512", "bf16 products") if info[name]]
        instructions = ", ".join(has) or "baseline"
    cuda = "none"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        cuda = f"{torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}"
    return {
        "ekfac_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "extension": extension,
        "instructions": instructions,
        "cuda": cuda,
        "threads": str(torch.get_num_threads()),
        "fp32 product": _rates(),
    }


def _rates() -> str:
    """What a linear layer of 1024 tokens runs at, by each library."""
    x, W = torch.randn(1024, 768), torch.randn(1536, 768)
    if not products.available():
        return f"{_rate(F.linear, x, W):.0f} GFLOP/s"
    rates = f"oneDNN {_rate(products.onednn, x, W):.0f}, MKL {_rate(F.linear, x, W):.0f} GFLOP/s"
    return f"{rates}; frozen layers take oneDNN"


def _rate(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, W: Tensor) -> float:
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        product(x, W)
        seconds.append(time.perf_counter() - start)
    return 2 * x.numel() * len(W) / sorted(seconds)[len(seconds) // 2] / 1e9


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
