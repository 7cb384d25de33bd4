"""What this machine can do: products and copies, measured in the same minutes as the ops."""

import time
from collections.abc import Callable

import torch

SIZE = 2048  # large enough for any GEMM to reach its rate
COPIED = 1 << 28  # bytes, beyond any cache


def gemm(dtype: torch.dtype) -> Callable[[], object]:
    """The faster of torch.mm and oneDNN's product on SIZE^3, to be timed beside the ops.

    On CPUs where torch.mm is MKL's, oneDNN can be more than twice as fast.
    """
    x, y = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
    ways: list[Callable[[], object]] = [lambda: torch.mm(x, y)]
    if dtype in (torch.float32, torch.bfloat16) and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        linear = torch.ops.mkldnn._linear_pointwise
        ways.append(lambda: linear(x, y, None, "none", [], ""))
    return min(ways, key=lambda way: min(seconds(way) for _ in range(3)))


def gemm_flops() -> int:
    """FLOPs of one call of `gemm`."""
    return 2 * SIZE**3


def copy_rate() -> float:
    """Bytes read and written a second by a copy that no cache holds."""
    x = torch.ones(COPIED // 4)
    y = torch.empty_like(x)
    return 2 * COPIED / min(seconds(lambda: y.copy_(x)) for _ in range(4))


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
