"""Markdown tables between `<!-- table:NAME -->` and `<!-- /table -->`, from measured JSON lines.

    python bench/tables.py [--check]

Writes every marked table of README.md and bench/README.md anew; --check only tells whether they
say what bench/results/ and the kernels' tiles say, and ends with 1 if not. Of rows measured more
than once the last counts. All rows of a file are shown, those where we lose among them.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import predict
from markdown import duration, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "bench" / "README.md")
MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
WHAT = {
    "covariance": "covariance",
    "eigenvalues": "corrected eigenvalues",
    "precondition": "preconditioning",
    "self_influence": "self-influence",
    "queries": "queries, preconditioned and truncated",
    "dense_scores": "dense scores",
    "low_rank_scores": "low-rank scores",
}
THEIRS = ("kronfluence order", "svd_lowrank", "full SVD")
NOT_WHOLE = ("ours", "own fp32", "bare bmm", "GEMM")  # ourselves, or less than the op does


def read(path: Path) -> list[dict]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def latest(rows: list[dict], *keys: str) -> list[dict]:
    """One row for each value of `keys`, the last, in the order of the first."""
    return list({tuple(str(row[key]) for key in keys): row for row in rows}.values())


def shape(row: dict) -> str:
    """Sizes of a row of `run.py`, in the letters of the cards."""
    s = row["shape"]
    if s["O"] == 1:
        return f"{s['I']} features, {s['B'] * s['T']} rows"
    sizes = [f"{s['I']} x {s['O']}", f"T={s['T']}"]
    sizes.append(f"Q={s['Q']}" if row["quantity"] == "queries" else f"B={s['B']}")
    sizes += [f"Q={s['Q']}"] * (s["Q"] > 0 and row["quantity"] != "queries")
    return ", ".join(sizes + [f"K={s['K']}"] * (s["K"] > 0))


def acceptance(rows: list[dict]) -> str:
    """fp32 ops on a CPU beside kronfluence's contractions; last, the row that loses most to any
    whole way of doing the same, whatever its dtype.
    """
    rows = latest(rows, "name", "dtype")
    lines = []
    for row in rows:
        if row["dtype"] != "float32":
            continue
        ours = row["seconds"]["ours"]
        theirs = {name: row["seconds"][name] for name in THEIRS if name in row["seconds"]}
        times = [duration(s) + ("" if n == THEIRS[0] else f" ({n})") for n, s in theirs.items()]
        lines.append(
            [
                WHAT[row["quantity"]],
                shape(row),
                ", ".join(times),
                duration(ours),
                ", ".join(f"{s / ours:.1f}x" for s in theirs.values()),
            ]
        )
    found = [
        (seconds / row["seconds"]["ours"], way, row)
        for row in rows
        for way, seconds in row["seconds"].items()
        if way not in NOT_WHOLE
    ]
    ratio, way, row = min(found, key=lambda entry: entry[:2])
    lines.append(
        [
            f"{WHAT[row['quantity']]}, {row['dtype']}: our weakest",
            shape(row),
            f"{duration(row['seconds'][way])} ({way})",
            duration(row["seconds"]["ours"]),
            f"{ratio:.2f}x",
        ]
    )
    threads = rows[0]["environment"]["threads"]
    head = [f"fp32, {threads} threads", "shape", "kronfluence's contraction", "here", ""]
    return f"{table(head, lines)}\n\n{machine(rows)}"


def every_row(rows: list[dict]) -> str:
    """Share of the roof, and speed over every other way of the same run."""
    rows = latest(rows, "name", "dtype")
    others = dict.fromkeys(name for row in rows for name in row["seconds"])
    others = [name for name in others if name not in ("ours", "GEMM")]
    lines = []
    for row in rows:
        ours, s = row["seconds"]["ours"], row["seconds"]
        share = row["flops"] / ours / row["roofs"]["flops_per_second"]
        line = [row["name"], row["dtype"], duration(ours), f"{share:.0%}"]
        extra = row.get("extra_bytes", {}).get("ours")
        line.append("" if extra is None else f"{extra / 2**20:.1f}")
        line += [f"{s[name] / ours:.2f}x" if name in s else "" for name in others]
        lines.append(line)
    head = ["op and shape", "dtype", "here", "of GEMM roof", "extra MiB"]
    return f"{table([*head, *others], lines)}\n\n{machine(rows)}"


def against_kronfluence(rows: list[dict]) -> str:
    """Whole stages of kronfluence, without and with the backend; one column a case."""
    rows = latest(rows, "case", "stage")
    cases = list(dict.fromkeys(row["case"] for row in rows))
    found = {(row["stage"], row["case"]): row for row in rows}
    lines = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        here = [found.get((stage, case)) for case in cases]
        cells = [
            f"{duration(row['plain_s'])} -> {duration(row['backend_s'])}, **{row['ratio']:.2f}x**"
            if row
            else ""
            for row in here
        ]
        errors = [row["relative_error"] for row in here if row and "relative_error" in row]
        ranks = [row["spearman"] for row in here if row and "spearman" in row]
        error = f"{max(errors):.0e}" if errors else ""
        lines.append([stage, *cells, error, f"{min(ranks):.4f}" if ranks else ""])
    head = ["stage", *cases, "largest relative error", "least Spearman's rho"]
    return f"{table(head, lines)}\n\n{machine(rows)}"


def stages(rows: list[dict]) -> str:
    """Whole models: a pass of each stage against the floor and against plain torch."""
    rows = latest(rows, "model", "stage", "blocks", "tokens", "queries")
    lines = []
    for row in rows:
        plain = [t for name, t in row["seconds"].items() if name.startswith("plain torch")]
        built, whole = row["blocks"]
        lines.append(
            [
                row["model"] + ("" if built == whole else f", {built} of {whole} blocks"),
                row["stage"],
                f"{row['sequences']} x {row['tokens']}",
                f"{row['tokens_per_second']['ours']:.0f}",
                f"{row['mfu']:.0%}",
                f"{row['over_floor']['ours']:.2f}",
                f"{min(plain) / row['seconds']['ours']:.2f}x" if plain else "",
                f"{row['extra_bytes']['ours'] / 2**20:.0f}",
            ]
        )
    head = ["model", "stage", "batch", "tokens/s", "MFU", "x floor", "over plain torch", "peak MiB"]
    return f"{table(head, lines)}\n\n{machine(rows)}"


def machine(rows: list[dict]) -> str:
    """Where, with what and when all these rows were measured."""
    facts = [row.get("environment", row) for row in rows]
    told = []
    for key, form in (
        ("gpu", "{}"),
        ("cpu", "{}"),
        ("threads", "{} threads"),
        ("torch", "torch {}"),
        ("revision", "revision {}"),
        ("date", "{}"),
    ):
        values = dict.fromkeys(str(fact[key]) for fact in facts if fact.get(key))
        if key == "date":
            values = dict.fromkeys(value[:10] for value in values)
        if key == "revision":
            # "+": files differed from the commit
            values = dict.fromkeys(value[:9] + "+" * ("+" in value) for value in values)
        told += [form.format(" and ".join(values))] if values else []
    return ", ".join(told) + "."


# name: file in bench/results, how it is shown, how it is measured
TABLES: dict[str, tuple[str, Callable[[list[dict]], str], str]] = {
    "acceptance": ("acceptance.jsonl", acceptance, "python bench/run.py --shapes acceptance"),
    "acceptance-rows": ("acceptance.jsonl", every_row, "python bench/run.py --shapes acceptance"),
    "acceptance-cuda": ("acceptance-cuda.jsonl", every_row, "make gpu-check"),
    "against-kronfluence": (
        "against_kronfluence.jsonl",
        against_kronfluence,
        "python bench/against_kronfluence.py",
    ),
    "stages": ("stages.jsonl", stages, "python bench/stages.py"),
}


PREDICTED = {f"predicted-{name}": partial(predict.report, name) for name in predict.GPUS}
PREDICTED["predicted-narrow"] = partial(predict.narrow_layers, "h100")


def render(name: str, results: Path = RESULTS) -> str:
    """The text of one table; of one that nobody measured, what would measure it.

    Raises:
        KeyError: no such table.
    """
    if name in PREDICTED:
        return PREDICTED[name]()
    file, show, command = TABLES[name]
    if not (results / file).exists():
        return f"Not measured yet: `{command}`."
    return show(read(results / file))


def filled(text: str, results: Path = RESULTS) -> str:
    """A page with all its tables made anew."""
    return MARKED.sub(lambda at: f"{at[1]}\n{render(at[2], results)}\n\n{at[3]}", text)


def main(words: list[str] | None = None) -> None:
    """Write the pages, or tell which ones say something else than the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is old")
    chosen = parser.parse_args(words)
    old = [page for page in PAGES if filled(page.read_text()) != page.read_text()]
    if chosen.check and old:
        names = ", ".join(str(page.relative_to(ROOT)) for page in old)
        sys.exit(
            f"not what bench/results/ and the kernels say: {names}; run python bench/tables.py"
        )
    for page in old:
        page.write_text(filled(page.read_text()))
        print(f"{page.relative_to(ROOT)} written")


if __name__ == "__main__":
    main()
