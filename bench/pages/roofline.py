"""Where measured ops stand below the roofs of their own runs: a table, and one figure.

FLOPs and bytes are the least that the cards count; an op's roof is the lower of the machine's GEMM
rate and its copy rate times FLOPs a byte.
"""

import statistics
from pathlib import Path

from measure.rows import Row, latest, read

from .markdown import duration, table


def intensity(row: Row) -> float:
    """FLOPs a byte."""
    return row.flops / row.bytes


def roof(row: Row) -> float:
    """FLOP/s that the machine of the row allows at its intensity."""
    return min(row.roofs["flops_per_second"], intensity(row) * row.roofs["bytes_per_second"])


def ops_rows(paths: list[Path]) -> list[Row]:
    """The rows of `ops.py` in files that may hold others, the last of each.

    Raises:
        ValueError: there is none.
    """
    rows = [row for path in paths for row in read(path) if row.bench == "ops"]
    if not rows:
        raise ValueError(f"no rows of ops.py in {', '.join(map(str, paths))}")
    return latest(rows, "machine")


def report(rows: list[Row]) -> str:
    """One line a row, with the roof of its own run."""
    lines = []
    for row in rows:
        bound = "GEMM" if roof(row) == row.roofs["flops_per_second"] else "copy"
        lines.append(
            [
                row.name,
                str(row.dtype),
                row.machine,
                f"{intensity(row):.1f}",
                duration(row.ours),
                f"{row.flop_rate / 1e9:.0f}",
                f"{roof(row) / 1e9:.0f} ({bound})",
                f"{row.flop_rate / roof(row):.0%}",
            ]
        )
    head = ["op", "dtype", "machine", "FLOP/byte", "time", "GFLOP/s", "roof, GFLOP/s", "share"]
    return table(head, lines)


def plot(rows: list[Row], path: Path) -> None:
    """All rows below their roofs; one colour a quantity, one line a machine and dtype."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    low, high = min(map(intensity, rows)) / 4, max(map(intensity, rows)) * 4
    for name, dtype in dict.fromkeys((row.machine, str(row.dtype)) for row in rows):
        own = [r.roofs for r in rows if (r.machine, r.dtype) == (name, dtype)]
        flops = statistics.median(has["flops_per_second"] for has in own) / 1e9
        copied = statistics.median(has["bytes_per_second"] for has in own) / 1e9
        ridge = flops / copied
        x = [min(low, ridge / 8), ridge, max(high, ridge * 8)]  # both arms of every roof show
        (drawn,) = axes.plot(x, [x[0] * copied, flops, flops], linewidth=1)
        label = f"{name}, {dtype}: GEMM {flops:.0f} GFLOP/s, copy {copied:.0f} GB/s"
        axes.annotate(
            label, (x[2], flops), ha="right", va="bottom", fontsize=7, color=drawn.get_color()
        )
    markers = {"float32": "o", "bfloat16": "s", "float16": "^", "float64": "D"}
    quantities = list(dict.fromkeys(row.quantity for row in rows))
    for row in rows:
        colour = f"C{quantities.index(row.quantity)}"
        axes.plot(intensity(row), row.flop_rate / 1e9, markers[str(row.dtype)], color=colour)
    for at, quantity in enumerate(quantities):
        axes.plot([], [], "o", color=f"C{at}", label=quantity)
    for dtype in dict.fromkeys(str(row.dtype) for row in rows):
        axes.plot([], [], markers[dtype], color="gray", label=dtype)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="GFLOP/s")
    axes.grid(which="both", linewidth=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)
    plt.close(figure)
