"""What this machine and this installation have."""

import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import __version__, ops


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
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
