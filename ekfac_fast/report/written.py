"""The report of scores from Python, as the command line writes it."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ..checks import are_texts, instance, require, whole
from ..data.examples import Corpus
from ..errors import ArgumentError
from ..stages.damping import damping_rule
from ..stages.factors import Factors
from ..stages.queries import Queries
from ..stages.scores import Scores
from . import write
from .collect import check_together, collect, run_facts, stage_times


def write_report(
    out: str | PathLike[str],
    scores: Scores,
    queries: Queries,
    factors: Factors,
    data: Corpus,
    tokenizer: Any,
    *,
    names: Sequence[str] | None = None,
    k: int = 10,
    by: str | None = None,
    model: str = "",
    measured: str = "",
    notes: Sequence[str] = (),
) -> Path:
    """Write the HTML report of a scan with details, and return its path.

    Args:
        scores: of `score(per_token=True)`, or with `per_layer` or `attribution`.
        data: what was scored: `tokenize`, `read_labelled`, `read_pairs` or `open_tokens`.
        names: of the queries.
        k: top and lowest sequences of each that are shown.
        by: a column of the records, to filter by.
        model: what it is called in the report.
        measured: what queries ask, where it is no completion's log-probability.
        notes: what else is to be said of the run.

    Raises:
        ArgumentError: scores without details, or of examples without tokens.
        StoreError: scores, queries, factors, corpus or tokenizer do not belong together.
        MissingExtra: jinja2 is not installed.
    """
    instance("scores", scores, Scores, "what score returns, or Scores(folder)")
    instance("queries", queries, Queries, "what prepare_queries returns, or Queries.load(folder)")
    instance("factors", factors, Factors, "what fit returns, or Factors(folder)")
    whole("k", k, 1)
    corpus = all(callable(getattr(data, name, None)) for name in ("record", "source", "column"))
    require(corpus, "data", data, "a corpus that knows its records: tokenize(read(path), ...), say")
    if not scores.store.facts.get("detail"):
        raise ArgumentError(
            f"{scores.folder} has no details of its best sequences, which are what a report shows: "
            "score with per_token=True, per_layer=True or attribution=True"
        )
    if len(queries.examples) != len(queries):
        raise ArgumentError("queries have no tokens, and a report shows texts: use Scores.top")
    names = [f"query {q + 1}" for q in range(len(queries))] if names is None else names
    require(are_texts(names), "names", names, "a list of texts")
    if len(names) != len(queries):
        raise ArgumentError(f"names are {len(names)}, the queries {len(queries)}")
    check_together(scores, factors, queries, data, tokenizer)
    told = queries.facts or {}
    rule = damping_rule(told["damping"]) if "damping" in told else "as the queries say"
    settings = [("factors", str(factors.folder))]
    if queries.refinement is not None:
        settings.append(("queries refined", queries.refinement.title))
    times = stage_times(factors.seconds | scores.stages)
    about = run_facts(scores, factors, queries, model, rule, times, settings, notes, by)
    results = collect(scores, queries, data, tokenizer, names, k, by, measured)
    return write(out, about, results)
