"""The command line: `ekfac-fast` or `python -m ekfac_fast`."""

import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch
import typer
from rich.console import Console
from rich.table import Table

from . import __version__, ops

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
console = Console(highlight=False)


@app.callback()
def main() -> None:
    """EK-FAC influence functions for language models, fast."""


@app.command()
def doctor() -> None:
    """Print versions, instruction sets, CUDA, threads, and which tier runs each op."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, value in environment().items():
        facts.add_row(name, value)
    tiers = Table("op", "reference", "cpu", "cuda", box=None, pad_edge=False)
    for stem, has in ops.coverage().items():
        tiers.add_row(stem, *("yes" if has[tier] else "-" for tier in ("reference", "cpu", "cuda")))
    console.print(facts, "", tiers, sep="\n")


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
