"""Bounds for GPUs that are not here, from datasheets and from the tiles that our kernels choose.

A kernel is given the time of the slowest of three: tensor cores, in whole waves of its programs;
its operands through L2, each tile loading its own; what must come from memory. None of them is ever
reached in full, so these are bounds from below on time, and no measurement.
"""

import importlib
from dataclasses import asdict, dataclass
from math import ceil, prod

from ekfac_fast import ops
from ekfac_fast.ops.gradients import cheapest_order, flops
from ekfac_fast.ops.shapes import Shape
from ekfac_fast.triton_kernels import launch, narrow
from ekfac_fast.triton_kernels.launch import Chip, cdiv
from ways.shapes import ACCEPTANCE, Case

from .markdown import duration, table

ITEM = 2  # bytes of bf16
GROUP = 8  # rows of tiles that a wave shares, as in the kernels
LAUNCH = 2e-6  # seconds from one launch's end to its successor's full pace: assumed


@dataclass(frozen=True)
class Gpu:
    """A datasheet: FLOP/s of dense bf16, bytes/s of memory and of L2, bytes of L2.

    L2 delivers 64 bytes a cycle to each multiprocessor at most: 132 of them at 1.83 GHz.
    """

    chip: Chip
    flops: float
    memory: float
    l2: float
    l2_size: int


_HOPPER = Chip(90, 132, 232448)
GPUS = {
    "h100": Gpu(_HOPPER, 989e12, 3.35e12, 15.5e12, 50 << 20),
    "h200": Gpu(_HOPPER, 989e12, 4.8e12, 15.5e12, 50 << 20),
}


@dataclass(frozen=True)
class Kernel:
    """One launch: `programs` of rows x columns tiles, each `products` sums over `terms`.

    `live` are the bytes of operands that programs running together come back to; what does not fit
    L2 is loaded from memory by every wave again. `other`: bytes of results and accumulators.
    """

    rows: int
    columns: int
    programs: int
    terms: int
    operands: int
    live: int
    other: int
    products: int = 1
    together: int = 1  # sequences side by side on a tile

    def seconds(self, gpu: Gpu) -> dict[str, float]:
        """Time by what would bound it."""
        waves = ceil(self.programs / gpu.chip.processors)
        flops = 2 * self.rows * self.columns * self.terms * self.products
        loaded = (self.rows + self.columns) * self.terms * self.products * ITEM
        across = gpu.chip.processors / GROUP / self.together
        wide = self.together * (GROUP * self.rows + across * self.columns)
        again = waves * wide * self.terms * self.products * ITEM
        operands = self.operands if self.live < gpu.l2_size / 2 else max(self.operands, again)
        return {
            "tensor cores": waves * flops * gpu.chip.processors / gpu.flops,
            "L2": self.programs * loaded / gpu.l2,
            "memory": (operands + self.other) / gpu.memory,
        }


def sizes(shape: Shape, per_token: bool = False) -> launch.Shape:
    """What kernels are configured by."""
    return launch.Shape(ITEM, **asdict(shape), per_token=per_token)


def kernel(case: Case, chip: Chip) -> Kernel:
    """The main launch of an op on rotated inputs, as `triton_kernels/` configures it."""
    s = case.shape
    stem = importlib.import_module(f"ekfac_fast.triton_kernels.{case.quantity}")
    config = stem.config(sizes(s, case.per_token), chip)
    by, programs = config.tile, prod(config.grid)
    both = ITEM * s.N * (s.O + s.J)
    if case.quantity == "eigenvalues":
        other = 4 * s.O * s.J * (2 if config.parts == 1 else 2 * config.parts + 2)
        terms = config.per_split * s.T
        return Kernel(by.rows, by.columns, programs, terms, both, both, other)
    if case.quantity == "self_influence":
        together = config.together
        lam, live = 4 * s.O * s.J * s.B // together, both // s.B * together
        return Kernel(by.rows, by.columns, programs, s.T, both, live, lam, together=together)
    if case.quantity == "covariance":
        operands, part = ITEM * s.N * s.I, 2 * 4 * config.grid[0] * by.rows**2
        other = 2 * 4 * s.J**2 + (config.parts * part if config.parts > 1 else 0)
        terms = config.per_split
        return Kernel(by.rows, by.rows, programs, terms, operands, operands, other)
    if case.quantity == "low_rank_scores":
        operands = both + ITEM * s.Q * s.K * (s.O + s.J)
        terms = (s.O + s.J) // 2
        other = 8 * s.Q * s.B
        return Kernel(by.rows, by.columns, programs, terms, operands, operands, other, 2)
    raise ValueError(f"no prediction for {case.quantity}")


def rotations(case: Case, gpu: Gpu) -> float:
    """Seconds of the rotations by tokens, which are cuBLAS's, at the peak rate."""
    s = case.shape
    if case.rotated or case.quantity not in ("eigenvalues", "self_influence"):
        return 0.0
    if cheapest_order(s) != "tokens":
        raise ValueError(f"{case.label}: only rotations by tokens are predicted")
    work = flops(s) - flops(s, rotate_g=False, rotate_a=False)
    moved = ITEM * (s.O**2 + s.J**2 + 2 * s.N * (s.O + s.J))
    return max(work / gpu.flops, moved / gpu.memory)


def bare_bmm(case: Case, gpu: Gpu) -> float:
    """Seconds of the product that writes the gradients, at the peak rate."""
    s = case.shape
    moved = ITEM * (s.N * (s.O + s.J) + s.B * s.O * s.J)
    return max(flops(s, rotate_g=False, rotate_a=False) / gpu.flops, moved / gpu.memory)


def product(gpu: Gpu, batch: int, rows: int, columns: int, terms: int) -> float:
    """Seconds of one launch of products in tiles of 128 x 128, its operands in L2."""
    waves = ceil(batch * cdiv(rows, 128) * cdiv(columns, 128) / gpu.chip.processors)
    each = max(2 * 128 * 128 * terms / gpu.flops, 2 * 128 * terms * ITEM / gpu.l2)
    return LAUNCH + waves * each * gpu.chip.processors


def in_three_launches(s: Shape, gpu: Gpu) -> float:
    """`precondition` with rotations by cuBLAS, in the cheapest order."""
    first, second, last = {
        "tokens": ((1, s.N, s.O, s.O), (1, s.N, s.J, s.J), (s.B, s.O, s.J, s.T)),
        "gradient": ((s.B, s.O, s.J, s.T), (1, s.B * s.O, s.J, s.J), (s.B, s.O, s.J, s.O)),
        "a_tokens": ((1, s.N, s.J, s.J), (s.B, s.O, s.J, s.T), (s.B, s.O, s.J, s.O)),
        "g_tokens": ((1, s.N, s.O, s.O), (s.B, s.O, s.J, s.T), (s.B, s.O, s.J, s.J)),
    }[cheapest_order(s)]
    return sum(product(gpu, *sizes) for sizes in (first, second, last))


def in_one_launch(s: Shape, gpu: Gpu) -> float:
    """`precondition` in strips: each reads both sides of its sequence and both eigenvectors."""
    X, Y = max(s.O, s.J), min(s.O, s.J)
    waves = ceil(s.B * cdiv(X, narrow.ROWS) / gpu.chip.processors)
    work = 2 * narrow.ROWS * (s.T * X + s.T * Y + Y * Y)
    moved = ITEM * (s.T * (X + Y) + narrow.ROWS * X + Y * Y) + 2 * 4 * narrow.ROWS * Y
    return LAUNCH + waves * gpu.chip.processors * max(work / gpu.flops, moved / gpu.l2)


def narrow_layers(name: str) -> str:
    """Narrow layers, rotated and divided in one launch or in three, as a table."""
    gpu, lines = GPUS[name], []
    for O, I in ((128, 128), (256, 256), (512, 256), (512, 512), (1024, 256), (1024, 1024)):
        for B in (8, 32, 128):
            s = Shape(B=B, T=512, I=I, O=O)
            one, three = in_one_launch(s, gpu), in_three_launches(s, gpu)
            made = narrow.config(sizes(s), gpu.chip) is not None
            ratio = f"{three / one:.2f}x"
            here = "one launch" if made else "three"
            lines.append([f"{I} x {O}", f"{B}", duration(one), duration(three), ratio, here])
    head = ["layer, T=512, bf16", "B", "one launch", "three launches", "one over three", "taken"]
    title = (
        f"PREDICTION for {name.upper()}, not measured: bounds from its datasheet, and "
        f"{LAUNCH * 1e6:.0f} us assumed for every launch."
    )
    return f"{title}\n\n{table(head, lines)}"


def cases() -> list[Case]:
    """Acceptance shapes whose main launch is a tile of ours; `narrow_layers` has the others."""
    needs = [need for need in ACCEPTANCE["cuda"] if need.against != "three launches"]
    # Of dense_scores, cuBLAS does the most.
    return list(dict.fromkeys(n.case for n in needs if n.case.quantity != "dense_scores"))


def report(name: str) -> str:
    """The acceptance shapes of a GPU, as a table that says what it is."""
    gpu = GPUS[name]
    lines = []
    for case in cases():
        launch = kernel(case, gpu.chip)
        bounds = launch.seconds(gpu)
        slowest = max(bounds, key=bounds.__getitem__)
        total = bounds[slowest] + rotations(case, gpu)
        done = getattr(ops, case.quantity).cost(case.shape).flops
        if case.rotated:
            done -= flops(case.shape) - flops(case.shape, rotate_g=False, rotate_a=False)
        against = ""
        if case.rotated:
            against = f"{bare_bmm(case, gpu) / total:.2f}x"
        lines.append(
            [
                case.label,
                f"{launch.rows} x {launch.columns}",
                *(duration(bounds[key]) for key in ("tensor cores", "L2", "memory")),
                duration(total),
                f"{done / total / gpu.flops:.0%}",
                slowest,
                against,
            ]
        )
    head = ["op, bf16", "tile", "tensor cores", "L2", "memory", "at least", "of peak at most"]
    title = (
        f"PREDICTION for {name.upper()}, not measured: bounds from its datasheet "
        f"({gpu.flops / 1e12:.0f} TFLOP/s, {gpu.memory / 1e12:.2f} TB/s) and our kernels' tiles."
    )
    return f"{title}\n\n{table([*head, 'bound by', 'over bare bmm at its own bound'], lines)}"
