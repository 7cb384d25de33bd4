"""docs/faithfulness.md, from the rows of faithfulness.py."""

from typing import Any

from ekfac_fast.validation.lds import Interval

from .markdown import duration, table

GROUPS = {
    "no model": "No model",
    "no curvature": "No curvature",
    "curvature": "Curvature, full rank, damping 0.1 x mean eigenvalue",
    "blocks": "EK-FAC, all layers: covariances in blocks",
    "rank": "EK-FAC, all layers: rank of the queries",
    "damping": "EK-FAC, all layers: damping",
    "dtype": "EK-FAC, all layers: passes",
    "refined": "EK-FAC refined on the Gauss-Newton matrix",
    "ensemble": "EK-FAC, all layers: mean scores of models with other seeds",
}
FINE_TUNED = (
    ", from one model of the rest of the text; what is left out is missing from its batch, batches "
    "and orders are the same in every subset"
)
HEAD = ["method", "LDS", "less that of EK-FAC", "tail patch, nats", "processor time"]


def page(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The whole page."""
    told = [
        "# Faithfulness",
        "",
        "<!-- made by bench/faithfulness.py: do not edit -->",
        "",
        f"A GPT-2 of {facts['parameters']:,} parameters, {facts['examples']} training sequences of "
        f"64 tokens of Python's reference, {facts['queries']} held-out queries of 32 tokens after "
        f"32. {facts['subsets']} subsets with {facts['share']:.0%} of the data, "
        f"{facts['seeds']} training(s) of {facts['epochs']} epochs each"
        + (FINE_TUNED if facts["fine_tuned"] else "")
        + f". Loss a token: training {facts['train_loss']:.2f}, queries {facts['query_loss']:.2f}.",
        "",
        "LDS: Spearman of summed scores with the outcome of retraining, the mean over queries; the "
        "95 % intervals cover the choice of queries and of subsets. Differences are taken query by "
        "query to EK-FAC on all layers, full rank, damping 0.1 x mean. " + _limit(facts),
        "Tail patch: rise of the completion's log-probability after three small steps on the ten "
        "sequences that a method puts first. Times hold factors where they were not there yet.",
        "",
    ]
    for group, title in GROUPS.items():
        lines = [_line(row) for row in rows if row["group"] == group]
        if lines:
            told += [f"## {title}", "", table(HEAD, lines), ""]
    told += [f"{facts['machine']}, {facts['date']}, revision {facts['revision']}:", ""]
    return "\n".join([*told, f"    {facts['command']}", ""])


def _limit(facts: dict[str, Any]) -> str:
    """How well anything could do."""
    if facts["additivity"] is not None:
        return (
            "Removals add up: what leaving out two sets does, against the sum of what each does, "
            f"correlates {facts['additivity']:.3f} over queries."
        )
    if facts["ceiling"] is None:
        return "No subset is trained twice: no ceiling is known."
    return (
        f"Two trainings of a subset differ: nothing could reach more than {facts['ceiling']:.3f}."
    )


def _interval(of: Interval | None) -> str:
    return "" if of is None else str(of)


def _line(row: dict[str, Any]) -> list[str]:
    return [
        row["name"],
        _interval(row["lds"]),
        _interval(row.get("less")),
        f"{row['tail']:+.4f}",
        duration(row["seconds"]),
    ]
