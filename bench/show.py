"""The pages: tables of measured rows, the roofline, this machine's roofs.

    python bench/show.py tables [--check]
    python bench/show.py roofline bench/results/acceptance.jsonl [--plot roofline.svg]
    python bench/show.py roofs [--device cpu|cuda] [--out roofs.jsonl]

`tables` writes every marked table of README.md and bench/README.md anew; with --check it only tells
whether they say what bench/results/ says, and ends with 1 if not. `roofline` shows what
`ops.py --out` wrote: a Markdown table, and with --plot one figure, FLOPs a byte against GFLOP/s.
"""

import argparse
import sys
from pathlib import Path

import torch

from measure import roofs
from measure.environment import device
from measure.rows import append
from pages import roofline, tables
from pages.markdown import table

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "bench" / "README.md")


def show_tables(chosen: argparse.Namespace) -> None:
    """Write the pages, or tell which ones say something else than the results."""
    old = [page for page in PAGES if tables.filled(page.read_text()) != page.read_text()]
    if chosen.check and old:
        names = ", ".join(str(page.relative_to(ROOT)) for page in old)
        command = "python bench/show.py tables"
        sys.exit(f"not what bench/results/ says: {names}; run {command}")
    for page in old:
        page.write_text(tables.filled(page.read_text()))
        print(f"{page.relative_to(ROOT)} written")


def show_roofline(chosen: argparse.Namespace) -> None:
    """Where the rows of files stand below their roofs."""
    try:
        rows = roofline.ops_rows(chosen.files)
    except ValueError as error:
        sys.exit(str(error))
    print(roofline.report(rows))
    if chosen.plot:
        roofline.plot(rows, chosen.plot)


def show_roofs(chosen: argparse.Namespace) -> None:
    """Measure this machine."""
    with torch.no_grad():
        rows = roofs.measured(device(chosen.device))
    lines = [["copy", f"{rows[0].roofs['bytes_per_second'] / 1e9:.1f} GB/s"]]
    for row in rows:
        rate = f"{row.roofs['flops_per_second'] / 1e9:.0f} GFLOP/s"
        lines.append([f"GEMM {row.dtype}", rate])
    print(table(["roof", rows[0].machine], lines))
    if chosen.out:
        append(chosen.out, rows)


def main(words: list[str] | None = None) -> None:
    """One of the three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    pages = parser.add_subparsers(required=True, metavar="page")
    made = pages.add_parser("tables", help="the tables of README.md and bench/README.md")
    made.add_argument("--check", action="store_true", help="write nothing; 1 if a page is old")
    made.set_defaults(show=show_tables)
    made = pages.add_parser("roofline", help="measured ops below the roofs of their own runs")
    made.add_argument("files", nargs="+", type=Path, help="JSON lines of ops.py")
    made.add_argument("--plot", type=Path, help="draw this file, e.g. roofline.svg")
    made.set_defaults(show=show_roofline)
    made = pages.add_parser("roofs", help="measure the roofs of this machine")
    made.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    made.add_argument("--out", type=Path, help="append them as JSON lines to this file")
    made.set_defaults(show=show_roofs)
    chosen = parser.parse_args(words)
    chosen.show(chosen)


if __name__ == "__main__":
    main()
