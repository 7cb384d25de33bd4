"""`python -m ekfac_fast.kronfluence script.py args...`: an unchanged script with the backend on.

The script runs as `__main__` with its own arguments and its own folder first on the path, as
`python script.py args...` would run it. Options of the backend come before the script.
"""

import argparse
import runpy
import sys
from pathlib import Path

from . import enable, report
from .options import TRUNCATIONS


def parse(arguments: list[str]) -> argparse.Namespace:
    """Split our options from the script and its arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m ekfac_fast.kronfluence", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument(
        "--truncation",
        choices=TRUNCATIONS,
        default="kronfluence",
        help="how low-rank queries are found (default: as the script's arguments say)",
    )
    parser.add_argument(
        "--no-hold-queries",
        action="store_true",
        help="never score more query batches in one pass than the script asks for",
    )
    parser.add_argument(
        "--report", action="store_true", help="print at the end which module took which path"
    )
    parser.add_argument("script", help="path of the script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Run the script."""
    options = parse(arguments)
    if not Path(options.script).is_file():
        sys.exit(f"ekfac_fast.kronfluence: there is no script {options.script!r}")
    enable(truncation=options.truncation, hold_queries=not options.no_hold_queries)
    sys.argv = [options.script, *options.arguments]
    sys.path[0] = str(Path(options.script).resolve().parent)
    try:
        runpy.run_path(options.script, run_name="__main__")
    finally:
        if options.report:
            print(report(), file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
