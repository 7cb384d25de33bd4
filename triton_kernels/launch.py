"""What all launchers share: checked arguments, the chip, tiles, splits and their second stage.

Nothing here or in a launcher synchronises, tunes or reads the environment. Every kernel's file has
one `config(shape, chip)`, a pure function of sizes, bytes of an element and chip: launchers ask it,
and so do the tests that compile and the bounds that benches predict. A call gives the same bits and
the same launches every time.
"""

from collections.abc import Callable
from functools import cache, lru_cache, wraps
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# Products of 16 bits of which the copy engine of an H200 saves as much time as its host takes to
# describe two tensors to it: 20 us each, every launch.
LEAST_FLOPS = 5e9


class Chip(NamedTuple):
    """What tiles depend on: 90 for sm_90, multiprocessors, bytes of shared memory a program."""

    capability: int
    processors: int
    shared: int


class Shape(NamedTuple):
    """Sizes of one launch in the letters of the cards, and bytes of an element of its operands."""

    itemsize: int
    B: int = 1
    T: int = 1
    I: int = 1
    O: int = 1
    Q: int = 0
    K: int = 0
    bias: bool = False
    per_token: bool = False

    @property
    def J(self) -> int:
        """Input features with the ones."""
        return self.I + self.bias

    @property
    def N(self) -> int:
        """Rows of all sequences."""
        return self.B * self.T


class Tile(NamedTuple):
    """One configuration of a kernel: rows x columns of the product, step along the sum."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of the launch."""
        return options(self.warps, self.stages)


class Config(NamedTuple):
    """How a kernel is launched: its tile, programs, and what each of them does.

    `parts` results are folded into one by a second launch, if there is more than one; where sums
    or sequences are cut into parts, `per_split` of them are a program's. `copies`: tiles come by
    the copy engine, and loops over sequences and their tokens are one, so that a sequence is on its
    way while another is closed; of loads from addresses that one loop would not be pipelined.
    """

    tile: Tile
    grid: tuple[int, ...]
    parts: int = 1
    per_split: int = 0
    copies: bool = False


def options(warps: int, stages: int = 2) -> dict[str, int | bool]:
    """Options of a launch; multiply-adds are fused by name, since Triton's default will change."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


@cache
def chip(device: torch.device) -> Chip:
    """The chip behind a device; for CPU tensors (Triton's interpreter) a small made-up one."""
    if device.type != "cuda":
        return Chip(80, 4, 166912)
    has = torch.cuda.get_device_properties(device)
    capability = 10 * has.major + has.minor
    return Chip(capability, has.multi_processor_count, has.shared_memory_per_block_optin)


def stages(rows: int, columns: int, step: int, itemsize: int, chip: Chip) -> int:
    """Loads in flight: as many pipeline stages as shared memory holds, at most 4."""
    return max(2, min(4, (chip.shared - 2048) // ((rows + columns) * step * itemsize)))


def hopper(chip: Chip) -> bool:
    """Whether tiles are those that were measured, on an H200."""
    return chip.capability // 10 == 9


def copies(flops: float, chip: Chip) -> bool:
    """Whether the copy engine is worth what the host takes to describe tensors to it."""
    return chip.capability >= 90 and flops >= LEAST_FLOPS


def tile(rows: int, columns: int, itemsize: int, chip: Chip) -> Tile:
    """Tile of a [rows,columns] product whose kernel holds two fp32 tiles at once.

    At most five configurations a kernel and architecture. What lost, by registers spilled: 128x256;
    fp32 by steps of 32, since IEEE products have no tensor cores.
    """
    if itemsize == 4:
        return Tile(64, 64, 16, 4, 4)
    if min(rows, columns) <= 64 or chip.shared < 99 * 1024:
        return Tile(64, 64, 32, 4, 4)
    step = 64 if chip.capability >= 90 else 32
    return Tile(128, 128, step, 8, stages(128, 128, step, itemsize, chip))


def cdiv(n: int, by: int) -> int:
    """n / by, rounded up; Triton's own takes 1.5 us on the host, and an op needs several."""
    return -(-n // by)


def padded(width: int) -> int:
    """Row pitch that keeps 16-byte loads: 769 columns of a layer with a bias are held in 784."""
    return cdiv(width, 16) * 16


def even(width: int) -> int:
    """`width`, or `padded` where rows of it would lie at odd places: a bias, say."""
    return padded(width) if width % 8 else width


def aligned(x: Tensor) -> Tensor:
    """`x`, or a copy with zero columns up to its `even` width.

    Tiles of odd rows are loaded number by number, past the pipeline, and spill registers.
    """
    width = even(x.shape[-1])
    if width == x.shape[-1]:
        return x
    out = x.new_zeros(*x.shape[:-1], width)
    out[..., : x.shape[-1]] = x
    return out


def precision(dtype: torch.dtype) -> str:
    """How fp32 products are made, after PyTorch's own switch; 16-bit products have one way."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def splits(tiles: int, terms: int, limit: int, chip: Chip, *, begin: int = 0) -> int:
    """Into how many parts a sum of `terms` is cut so that `tiles` of it fill the chip.

    Time in units of one term of one tile: whole waves of the longest part, each after what a
    program takes to `begin`. Where that is nothing, parts are sums that a second launch adds: about
    8 a tile to write and read it back and 3000 for the launch: some microseconds. At most four
    waves of tiles are parts: their memory stays at some tens of MB whatever the layer.
    """
    limit = min(limit, 4 * chip.processors // tiles)

    def time(parts: int) -> float:
        waves = cdiv(tiles * parts, chip.processors)
        second = 0 if begin or parts == 1 else 8 * tiles * parts / chip.processors + 3000
        return waves * (cdiv(terms, parts) + begin) + second

    return min(range(1, max(1, limit) + 1), key=time)


def sequences(shape: Shape, chip: Chip) -> Config:
    """Programs of [O,J] tiles, each for some sequences in turn: what they share is loaded once.

    64x256 is a tenth faster than 128x128 on an H200. Addresses, of rows of odd length or without a
    copy engine, take the registers of half a tile. To begin, a program waits for its tile of lam or
    P about as long as 500 tokens take.
    """
    by = tile(shape.O, shape.J, shape.itemsize, chip)
    engine = copies(2.0 * shape.N * shape.O * shape.J, chip)
    if by.rows == 128 and (shape.J % 4 or not engine):
        by = by._replace(rows=64)
    elif by.rows == 128 and hopper(chip):
        by = by._replace(rows=64, columns=256 if shape.J > 128 else 128)
    tiles = cdiv(shape.O, by.rows) * cdiv(shape.J, by.columns)
    per_split = cdiv(shape.B, splits(tiles, shape.N, shape.B, chip, begin=500))
    return Config(by, (tiles, cdiv(shape.B, per_split)), tiles, per_split, engine)


def readable(x: Tensor, rows: int, columns: int, engine: bool) -> Tensor | TensorDescriptor:
    """x [B,T,F], `describable`, as `piece` reads tiles of it: described to the copy engine, or as
    it is.
    """
    if not engine:
        return x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, columns])


def sides(x: Tensor, y: Tensor, by: Config) -> tuple[object, ...]:
    """Arguments of the sums over tokens of x [B,T,O] and y [B,T,J]: both as `piece` reads them, and
    of each whether every sequence has its own.
    """
    rows, columns, step, *_ = by.tile
    read = readable(x, step, rows, by.copies), readable(y, step, columns, by.copies)
    return *read, int(len(x) > 1), int(len(y) > 1)


def blocks(by: Config, dtype: torch.dtype) -> dict[str, object]:
    """Constants of a `gradient_tile`, and options of its launch."""
    rows, columns, step, *_ = by.tile
    sizes = {"BLOCK_O": rows, "BLOCK_J": columns, "BLOCK_T": step}
    return sizes | {"PRECISION": precision(dtype), "COPIES": by.copies} | by.tile.options


def describable(x: Tensor) -> Tensor:
    """`x`, or a copy that the copy engine reads: rows at multiples of 16 bytes, without gaps."""
    unit = 16 // x.element_size()
    if (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(stride % unit == 0 for stride in x.stride()[:-1])
    ):
        return x
    width = x.shape[-1]
    out = x.new_empty(*x.shape[:-1], padded(width))[..., :width]
    return out.copy_(x)


@triton.jit
def fold_kernel(
    out,  # [X,Y,Z]
    parts,  # [S, X Y Z]
    S,
    n,
    Y,
    Z,
    out_x,
    out_y,
    out_z,
    parts_s,
    parts_n,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[i] += sum_s parts[s,i], i over all elements in order; always summed the same way."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, BLOCK_S)
    inside = i < n
    total = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for s0 in range(0, S, BLOCK_S):
        at = parts + (s0 + s).to(tl.int64)[:, None] * parts_s + i[None, :] * parts_n
        total += tl.load(at, mask=(s < S - s0)[:, None] & inside[None, :], other=0.0)
    at = out + i // Z // Y * out_x + i // Z % Y * out_y + i % Z * out_z
    tl.store(at, tl.load(at, mask=inside) + tl.sum(total, 0), mask=inside)


def fold(out: Tensor, parts: Tensor) -> None:
    """out += sum_s parts[s]: the second stage of a split, in a fixed order.

    out: one to three axes, any strides; parts [S, ...] like it, the elements of a part in one row.
    """
    S, n = parts.shape[0], out.numel()
    out = out[(None,) * (3 - out.ndim)]
    # Many short parts (one a tile) are read 128 at a time, a few long ones side by side.
    block_s, block = (128, 32) if S > 16 else (16, 256)
    run(
        fold_kernel,
        (cdiv(n, block),),
        out,
        parts,
        S,
        n,
        *out.shape[1:],
        *out.stride(),
        parts.stride(0),
        parts.stride(-1),
        BLOCK_S=block_s,
        BLOCK=block,
        **options(4),
    )


# Launches that are known, forgotten all at once when there are so many: batches of all lengths.
_compiled: dict[tuple, tuple[Callable, list[object]]] = {}
MOST_LAUNCHES = 1 << 14


def _kind(x: object) -> object:
    """What a kernel is compiled for of an argument that is no integer."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if isinstance(x, TensorDescriptor):
        return x.base.dtype, *x.block_shape
    return type(x)


def run(
    kernel: JITFunction, grid: tuple[int, ...], out: Tensor, *args: object, **fixed: object
) -> None:
    """`kernel[grid](out, *args, **fixed)`, without looking again for what the same call has found.

    Triton looks at every argument of a launch to find the kernel that was compiled for its kind;
    here a call is known by its scalars, by dtype and alignment of its tensors, and by device.
    """
    device, kinds = out.device, [x if type(x) is int else _kind(x) for x in (out, *args)]
    key = (kernel.fn, device, grid, *kinds, *fixed.values())
    if (found := _compiled.get(key)) is not None:
        start, constants = found
        start(out, *args, *constants, stream=driver.active.get_current_stream(device.index))
        return
    compiled = kernel[grid](out, *args, **fixed)
    if isinstance(compiled, CompiledKernel):
        if len(_compiled) == MOST_LAUNCHES:
            _compiled.clear()
        constants = [fixed[name] for name in kernel.arg_names[1 + len(args) :]]
        _compiled[key] = compiled[(*grid, 1, 1)[:3]], constants


@lru_cache(maxsize=4096)
def _accepted(name: str, signature: tuple) -> None:
    """Run the op on meta tensors: its reference refuses what its card does not allow."""
    args = (
        torch.empty(x[0], dtype=x[1], device="meta") if isinstance(x, tuple) else x
        for x in signature
    )
    getattr(torch.ops.ekfac_fast, name)(*args)


def launcher(function: Callable) -> Callable:
    """Make `function` the op `tiled_<its name>` on GPUs: what `csrc/cuda/small.cpp` leaves to it.

    Without the extension it is the whole op. Arguments are checked by the op's reference (its
    checks are the only ones), once a signature of shapes, dtypes and scalars: a known signature
    costs 1.5 us, a new one a call on meta tensors.
    fp64 is left to the reference: it serves validation, and tensor cores of GPUs do without it.
    """
    name = function.__name__
    default = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)

    @wraps(function)
    def launch(*args: object) -> Tensor | None:
        tensors = [x for x in args if isinstance(x, Tensor)]
        device = tensors[0].device
        if tensors[0].dtype == torch.float64 or any(x.device != device for x in tensors):
            return getattr(torch.ops.ekfac_fast, name).default.redispatch(default, *args)
        _accepted(name, tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in args))
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return function(*args)
        return function(*args)

    op, tiled = f"ekfac_fast::{name}", f"ekfac_fast::tiled_{name}"
    schema = str(getattr(torch.ops.ekfac_fast, name).default._schema)
    torch.library.define(tiled, schema.removeprefix(op))
    torch.library.impl(tiled, "cuda", launch)
    if not torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA"):
        torch.library.impl(op, "cuda", launch)
    return launch
