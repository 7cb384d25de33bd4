"""What this machine can do: products and copies, measured in the same minutes as the ops."""

from collections.abc import Callable

import torch

from .environment import environment
from .rows import Row
from .timing import seconds

# Those that roofs are measured in.
DTYPES = {"cpu": ("float32", "bfloat16", "float64")}
DTYPES["cuda"] = ("bfloat16", "float16", "float32", "float64")

# Sizes at which any GEMM reaches its rate, and bytes beyond any cache.
SIZE = {"cpu": 2048, "cuda": 8192}
COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}


def gemm(dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """The fastest square product, to be timed beside the ops: cuBLAS on a GPU.

    On a CPU the faster of torch.mm and oneDNN: where torch.mm is MKL's, oneDNN can be more than
    twice as fast. Random numbers: products of zeros run faster.
    """
    size = SIZE[device.type]
    x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    ways: list[Callable[[], object]] = [lambda: torch.mm(x, y)]
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    has_bf16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if device.type == "cpu" and linear and (dtype == torch.float32 or has_bf16):
        ways.append(lambda: linear(x, y, None, "none", [], ""))
    return min(ways, key=lambda way: min(seconds(way, device) for _ in range(3)))


def gemm_flops(device: torch.device) -> int:
    """FLOPs of one call of `gemm`."""
    return 2 * SIZE[device.type] ** 3


def gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of `gemm`, the best of five calls."""
    call = gemm(dtype, device)
    return gemm_flops(device) / min(seconds(call, device) for _ in range(5))


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a copy that no cache holds."""
    size = COPIED[device.type]
    x = torch.ones(size // 4, device=device)
    y = torch.empty_like(x)
    return 2 * size / min(seconds(lambda: y.copy_(x), device) for _ in range(4))


def measured(device: torch.device) -> list[Row]:
    """Copy rate and GEMM rate, a row for every dtype."""
    copied, here = copy_rate(device), environment(device)
    return [
        Row(
            bench="roofs",
            name="machine",
            quantity="roofs",
            dtype=dtype,
            roofs={
                "flops_per_second": gemm_rate(getattr(torch, dtype), device),
                "bytes_per_second": copied,
            },
            environment=here,
        )
        for dtype in DTYPES[device.type]
    ]
