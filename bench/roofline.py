"""Measured roofs, and where the measured ops stand below them; for GPUs out of reach, bounds.

    python bench/roofline.py bench/results/*.jsonl [--plot roofline.svg]
    python bench/roofline.py --measure [--device cpu|cuda] [--out roofs.jsonl]
    python bench/roofline.py --predict h200

The first form reads what `run.py --out` wrote: a Markdown table, and with --plot one figure, FLOPs
a byte against GFLOP/s. FLOPs and bytes are the least that the cards count; an op's roof is the
lower of the machine's GEMM rate and its copy rate times FLOPs a byte, both of the op's own run.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import predict
import roofs
import torch
from environment import device as device_named
from environment import environment
from markdown import duration, table
from tables import latest, read

DTYPES = {"cpu": ("float32", "bfloat16", "float64")}
DTYPES["cuda"] = ("bfloat16", "float16", "float32", "float64")


def intensity(row: dict) -> float:
    """FLOPs a byte."""
    return row["flops"] / row["bytes"]


def roof(row: dict) -> float:
    """FLOP/s that the machine of the row allows at its intensity."""
    has = row["roofs"]
    return min(has["flops_per_second"], intensity(row) * has["bytes_per_second"])


def rate(row: dict) -> float:
    """FLOP/s of ours."""
    return row["flops"] / row["seconds"]["ours"]


def machine(row: dict) -> str:
    """What a row was measured on."""
    facts = row["environment"]
    return facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"


def ops_rows(paths: list[Path]) -> list[dict]:
    """The rows of `run.py` in files that may hold others, the last of each.

    Raises:
        SystemExit: there is none.
    """
    rows = [row for path in paths for row in read(path) if "quantity" in row and "roofs" in row]
    if not rows:
        sys.exit(f"no rows of run.py in {', '.join(map(str, paths))}")
    for row in rows:
        row["machine"] = machine(row)
    return latest(rows, "name", "dtype", "machine")


def report(rows: list[dict]) -> str:
    """One line a row, with the roof of its own run."""
    lines = []
    for row in rows:
        bound = "GEMM" if roof(row) == row["roofs"]["flops_per_second"] else "copy"
        lines.append(
            [
                row["name"],
                row["dtype"],
                row["machine"],
                f"{intensity(row):.1f}",
                duration(row["seconds"]["ours"]),
                f"{rate(row) / 1e9:.0f}",
                f"{roof(row) / 1e9:.0f} ({bound})",
                f"{rate(row) / roof(row):.0%}",
            ]
        )
    head = ["op", "dtype", "machine", "FLOP/byte", "time", "GFLOP/s", "roof, GFLOP/s", "share"]
    return table(head, lines)


def plot(rows: list[dict], path: Path) -> None:
    """All rows below their roofs; one colour a quantity, one line a machine and dtype."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    low, high = min(map(intensity, rows)) / 4, max(map(intensity, rows)) * 4
    for name, dtype in dict.fromkeys((row["machine"], row["dtype"]) for row in rows):
        own = [r["roofs"] for r in rows if (r["machine"], r["dtype"]) == (name, dtype)]
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
    quantities = list(dict.fromkeys(row["quantity"] for row in rows))
    for row in rows:
        colour = f"C{quantities.index(row['quantity'])}"
        axes.plot(intensity(row), rate(row) / 1e9, markers[row["dtype"]], color=colour)
    for at, quantity in enumerate(quantities):
        axes.plot([], [], "o", color=f"C{at}", label=quantity)
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        axes.plot([], [], markers[dtype], color="gray", label=dtype)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="GFLOP/s")
    axes.grid(which="both", linewidth=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def measured(device: torch.device) -> dict:
    """Copy rate and GEMM rate of every dtype."""
    rates = {dtype: roofs.gemm_rate(getattr(torch, dtype), device) for dtype in DTYPES[device.type]}
    return {
        "bench": "roofs",
        "bytes_per_second": roofs.copy_rate(device),
        "flops_per_second": rates,
        "environment": environment(device),
    }


def main(words: list[str] | None = None) -> None:
    """One of the three forms."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="JSON lines of run.py")
    parser.add_argument("--plot", type=Path, help="draw this file, e.g. roofline.svg")
    parser.add_argument("--measure", action="store_true", help="the roofs of this machine")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--out", type=Path, help="append the measured roofs as a JSON line")
    parser.add_argument("--predict", choices=predict.GPUS, help="bounds for a GPU, not measured")
    chosen = parser.parse_args(words)
    if not (chosen.files or chosen.measure or chosen.predict):
        parser.error("give files of run.py, --measure or --predict")
    if chosen.files:
        rows = ops_rows(chosen.files)
        print(report(rows))
        if chosen.plot:
            plot(rows, chosen.plot)
    if chosen.measure:
        found = measured(device_named(chosen.device))
        rates = found["flops_per_second"].items()
        lines = [["copy", f"{found['bytes_per_second'] / 1e9:.1f} GB/s"]]
        lines += [[f"GEMM {dtype}", f"{flops / 1e9:.0f} GFLOP/s"] for dtype, flops in rates]
        print(table(["roof", machine(found)], lines))
        if chosen.out:
            with chosen.out.open("a") as file:
                file.write(json.dumps(found) + "\n")
    if chosen.predict:
        print(predict.report(chosen.predict))
        print(f"\n{predict.narrow_layers(chosen.predict)}")


if __name__ == "__main__":
    main()
