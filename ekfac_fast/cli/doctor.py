"""What this machine and this installation have."""

import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.nn import functional as F

from .. import __version__, ops
from ..ops import products
from ..stages.plan import gemm_rate


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
    """What a product runs at by each library that has one for frozen layers."""
    torch_s = gemm_rate(product=F.linear) / 1e9
    if not products.available():
        return f"{torch_s:.0f} GFLOP/s"
    onednn = gemm_rate(product=products.onednn) / 1e9
    return f"oneDNN {onednn:.0f}, MKL {torch_s:.0f} GFLOP/s; frozen layers take oneDNN"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
