"""Markdown tables between `<!-- table:NAME -->` and `<!-- /table -->`, from measured rows.

Of rows measured more than once the last counts. All rows of a file are shown, those where we lose
among them.
"""

import re
from collections.abc import Callable
from pathlib import Path

from measure.rows import GEMM, OURS, Row, latest, read

from .markdown import cell, duration, table

RESULTS = Path(__file__).parents[1] / "results"
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
NOT_WHOLE = (OURS, "own fp32", "bare bmm", GEMM)  # ourselves, or less than the op does


def shape(row: Row) -> str:
    """Sizes of an op's row, in the letters of the cards."""
    s = row.shape
    if s["O"] == 1:
        return f"{s['I']} features, {s['B'] * s['T']} rows"
    sizes = [f"{s['I']} x {s['O']}", f"T={s['T']}"]
    sizes.append(f"Q={s['Q']}" if row.quantity == "queries" else f"B={s['B']}")
    sizes += [f"Q={s['Q']}"] * (s["Q"] > 0 and row.quantity != "queries")
    return ", ".join(sizes + [f"K={s['K']}"] * (s["K"] > 0))


def acceptance(rows: list[Row]) -> str:
    """fp32 ops on a CPU beside kronfluence's contractions; last, the row that loses most to any
    whole way of doing the same, whatever its dtype.
    """
    rows = latest(rows)
    lines = []
    for row in rows:
        if row.dtype != "float32":
            continue
        theirs = {name: row.seconds[name] for name in THEIRS if name in row.seconds}
        times = [duration(s) + ("" if n == THEIRS[0] else f" ({n})") for n, s in theirs.items()]
        lines.append(
            [
                WHAT[row.quantity],
                shape(row),
                ", ".join(times),
                duration(row.ours),
                ", ".join(f"{row.times(name):.1f}x" for name in theirs),
            ]
        )
    found = [
        (row.times(way), way, row) for row in rows for way in row.seconds if way not in NOT_WHOLE
    ]
    ratio, way, row = min(found, key=lambda entry: entry[:2])
    lines.append(
        [
            f"{WHAT[row.quantity]}, {row.dtype}: our weakest",
            shape(row),
            f"{duration(row.seconds[way])} ({way})",
            duration(row.ours),
            f"{ratio:.2f}x",
        ]
    )
    threads = rows[0].environment["threads"]
    head = [f"fp32, {threads} threads", "shape", "kronfluence's contraction", "here", ""]
    return f"{table(head, lines)}\n\n{machine(rows)}"


def every_row(rows: list[Row]) -> str:
    """Share of the roof, and speed over every other way of the same run."""
    rows = latest(rows)
    others = dict.fromkeys(name for row in rows for name in row.seconds)
    others = [name for name in others if name not in (OURS, GEMM)]
    lines = []
    for row in rows:
        extra = row.extra_bytes.get(OURS)
        lines.append(
            [
                row.name,
                str(row.dtype),
                duration(row.ours),
                f"{row.gemm_share:.0%}",
                "" if extra is None else f"{extra / 2**20:.1f}",
                *(f"{row.times(name):.2f}x" if name in row.seconds else "" for name in others),
            ]
        )
    head = ["op and shape", "dtype", "here", "of GEMM roof", "extra MiB"]
    return f"{table([*head, *others], lines)}\n\n{machine(rows)}"


def against_kronfluence(rows: list[Row]) -> str:
    """Whole stages of kronfluence, without and with the backend; one column a case."""
    rows = latest(rows)
    cases = list(dict.fromkeys(row.name for row in rows))
    found = {(row.quantity, row.name): row for row in rows}
    lines = []
    for stage in dict.fromkeys(row.quantity for row in rows):
        here = [found.get((stage, case)) for case in cases]
        cells = [
            f"{duration(row.seconds['kronfluence'])} -> {duration(row.ours)},"
            f" **{row.times('kronfluence'):.2f}x**"
            if row
            else ""
            for row in here
        ]
        errors = [row.error for row in here if row and row.error is not None]
        ranks = [row.details["spearman"] for row in here if row and "spearman" in row.details]
        error = f"{max(errors):.0e}" if errors else ""
        lines.append([stage, *cells, error, f"{min(ranks):.4f}" if ranks else ""])
    head = ["stage", *cases, "largest relative error", "least Spearman's rho"]
    return f"{table(head, lines)}\n\n{machine(rows)}"


def stages(rows: list[Row]) -> str:
    """Whole models: a pass of each stage against the floor and against plain torch."""
    rows = latest(rows)
    lines = []
    for row in rows:
        s = row.shape
        plain = [row.times(name) for name in row.seconds if name.startswith("plain torch")]
        built, whole = s["blocks"], s["all_blocks"]
        lines.append(
            [
                row.name + ("" if built == whole else f", {built} of {whole} blocks"),
                row.quantity,
                f"{s['sequences']} x {s['tokens']}",
                f"{s['sequences'] * s['tokens'] / row.ours:.0f}",
                f"{row.gemm_share:.0%}",
                f"{row.over('floor'):.2f}",
                f"{min(plain):.2f}x" if plain else "",
                f"{row.extra_bytes[OURS] / 2**20:.0f}",
            ]
        )
    head = ["model", "stage", "batch", "tokens/s", "MFU", "x floor", "over plain torch", "peak MiB"]
    return f"{table(head, lines)}\n\n{machine(rows)}"


def race(rows: list[Row]) -> str:
    """Whole jobs, the fastest contestant first; last those that did not arrive, and why."""
    lines = []
    rows = latest(rows)
    for row in rows:
        s, theirs = row.shape, row.seconds.get("kronfluence")
        job = f"{row.name}, {s['blocks']} blocks, {s['fit']} fitted, {s['scan']} scored, "
        job += f"{s['queries']} queries"
        versions, rho = row.details.get("versions", {}), row.details["spearman"]
        label = {
            name: f"{name} {versions.get(name, '')}".strip() for name in row.seconds | row.failed
        }
        for name in sorted(row.seconds, key=row.seconds.__getitem__):
            stages = row.details["stages"][name]
            lines.append(
                [
                    job,
                    label[name],
                    duration(row.seconds[name]),
                    f"{theirs / row.seconds[name]:.2f}x" if theirs else "",
                    f"{row.extra_bytes[name] / 2**30:.1f}",
                    f"{rho[name]:.3f}" if name in rho else "",
                    ", ".join(f"{stage} {duration(x)}" for stage, x in stages.items()),
                ]
            )
            job = ""
        for name, reason in row.failed.items():
            lines.append([job, label[name], "failed", "", "", "", cell(reason)])
            job = ""
    head = ["job", "", "total", "", "peak GiB", "rho to ours", "stages"]
    return f"{table(head, lines)}\n\n{machine(rows)}"


def machine(rows: list[Row]) -> str:
    """Where, with what and when all these rows were measured."""
    facts = [row.environment for row in rows]
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
TABLES: dict[str, tuple[str, Callable[[list[Row]], str], str]] = {
    "acceptance": ("acceptance.jsonl", acceptance, "python bench/ops.py --shapes acceptance"),
    "acceptance-rows": ("acceptance.jsonl", every_row, "python bench/ops.py --shapes acceptance"),
    "acceptance-cuda": ("acceptance-cuda.jsonl", every_row, "make gpu-check"),
    "against-kronfluence": (
        "against_kronfluence.jsonl",
        against_kronfluence,
        "python bench/against_kronfluence.py",
    ),
    "race": ("race.jsonl", race, "python bench/race.py"),
    "stages": ("stages.jsonl", stages, "python bench/stages.py"),
    "stages-cuda": ("stages-cuda.jsonl", stages, "make gpu-check"),
}


def render(name: str, results: Path = RESULTS) -> str:
    """The text of one table; of one that nobody measured, what would measure it.

    Raises:
        KeyError: no such table.
    """
    file, show, command = TABLES[name]
    if not (results / file).exists():
        return f"Not measured yet: `{command}`."
    return show(read(results / file))


def filled(text: str, results: Path = RESULTS) -> str:
    """A page with all its tables made anew."""
    return MARKED.sub(lambda at: f"{at[1]}\n{render(at[2], results)}\n\n{at[3]}", text)
