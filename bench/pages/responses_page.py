"""docs/responses.md and its figure, from what responses.py compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .markdown import duration, table

WIDTH, HEIGHT = 7.0, 3.6  # inches


def page(found: list[dict[str, Any]], facts: dict[str, Any], figure: str) -> str:
    """The whole page."""
    names = [row["name"] for row in found[0]["rows"]]
    correlations = _by_name(
        found,
        names,
        lambda row: f"{row['mean']:.3f} +- {row['error']:.3f}{'*' * bool(row['stopped'])}",
    )
    times = _by_name(found, names, lambda row: duration(row["seconds"]))
    times += [["the responses", *(duration(one["responses"]) for one in found)]]
    cases = [one["case"] for one in found]
    about = [[f"{one[x]:.3g}" if x == "damping" else f"{one[x]:,}" for x in ABOUT] for one in found]
    return "\n".join(
        [
            "# Against the response that influence functions stand for",
            "",
            "<!-- made by bench/responses.py: do not edit -->",
            "",
            "Pearson correlation, over training examples, of scores with the proximal Bregman "
            "response (`ekfac_fast.validation.pbrf`), in fp64: the mean over held-out queries and "
            "its standard error. Networks of three layers on scikit-learn's data sets. One damping "
            "for every method: a tenth of the mean eigenvalue.",
            "",
            f"![correlations]({figure}.svg)",
            "",
            table(["leaves out more from line to line", *cases], correlations),
            "",
            "An asterisk: it diverged for some queries, of which EK-FAC's solution was kept.",
            "",
            "Processor time, beside EK-FAC's fit; all queries together, every training example "
            "scored:",
            "",
            table(["method", *cases], times),
            "",
            table(["case", *ABOUT.values()], [[c, *x] for c, x in zip(cases, about, strict=True)]),
            "",
            f"{facts['machine']}, one thread, {facts['date']}, revision {facts['revision']}:",
            "",
            f"    {facts['command']}",
            "",
        ]
    )


ABOUT = {
    "parameters": "tracked parameters", "examples": "training examples", "queries": "queries",
    "asked": "responses a query", "damping": "damping",
}  # fmt: skip


def _by_name(
    found: list[dict[str, Any]], names: list[str], told: Callable[[dict], str]
) -> list[list[str]]:
    """A line a method, a cell a case."""
    return [[name, *(told(one["rows"][at]) for one in found)] for at, name in enumerate(names)]


def figure(found: list[dict[str, Any]], file: Path) -> None:
    """A line a case, methods from left to right."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # The same figures give the same file.
    with pyplot.rc_context({"svg.hashsalt": "ekfac_fast", "svg.fonttype": "none"}):
        drawn, axes = pyplot.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
        for one in found:
            rows = one["rows"]
            axes.errorbar(
                [row["name"] for row in rows], [row["mean"] for row in rows],
                yerr=[row["error"] for row in rows], label=one["case"], marker="o", markersize=4,
                linewidth=1, capsize=2,
            )  # fmt: skip
        axes.set_ylabel("Pearson correlation with the response")
        axes.tick_params(axis="x", labelrotation=30)
        axes.set_ylim(top=1.02)
        axes.grid(axis="y", linewidth=0.3)
        axes.legend(frameon=False)
        drawn.savefig(file, metadata={"Date": None})
        pyplot.close(drawn)
