"""Results -> one HTML file which needs nothing else: no network, no fonts, no files beside it.

It reads without JavaScript; the script only adds arrow keys and the value under the cursor. All
text of the model and of the corpus passes through jinja2's autoescape, and the page's policy
(Content-Security-Policy) runs no script but ours, known by its hash.
"""

import base64
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np

from ..errors import ArgumentError
from ..extras import optional
from ..store.files import replacing
from . import charts, statistics, text
from .contents import QueryResult, RankedSequence, RunFacts

# Sequences up to this long are shown whole, longer ones first as their strongest spans.
SHORT = 160
SPAN = 56
# Groups of sequences that can be shown or not by themselves.
GROUPS = 12
# How classes of tones begin: by position, by output token, by input token.
KINDS = ("", "o", "i")


def write(path: str | os.PathLike[str], facts: RunFacts, results: Sequence[QueryResult]) -> Path:
    """Write the report and return its path; a file that is there is replaced as a whole.

    Raises MissingExtra without jinja2, ArgumentError where `facts` and `results` disagree.
    """
    path = Path(path)
    page = render(facts, results)
    with replacing(path, len(page)) as partial:
        partial.write_text(page, encoding="utf-8", newline="\n")
    return path


def render(facts: RunFacts, results: Sequence[QueryResult]) -> str:
    """The page; the same input gives the same bytes."""
    jinja2, Markup = optional("jinja2", "report"), optional("markupsafe", "report").Markup

    check(facts, results)
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "pieces": text.pieces,
        "plain": text.plain,
        "number": text.number,
        "signed": text.signed,
        "duration": text.duration,
    }
    every = (s for query in results for s in (*query.ranked, *query.bottom))
    attributed = any(len(s.kinds) > 1 for s in every)
    groups = groups_of(results) if facts.grouped_by else {}
    script = source("behaviour.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        facts=facts,
        results=results,
        attributed=attributed,
        groups=groups,
        others=GROUPS,
        statistics=statistics,
        charts=charts,
        excerpts=excerpts,
        heat=heat,
        rows=row_names(facts.layers),
        tokens_by_layer=tokens_by_layer,
        sequences_by_layer=sequences_by_layer,
        heads_by_layer=heads_by_layer,
        style=Markup(source("style.css")),
        script=Markup(script),
        script_hash=digest,
    )


def source(name: str) -> str:
    """A template, style sheet or script of this package."""
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def check(facts: RunFacts, results: Sequence[QueryResult]) -> None:
    """One layer axis for all, a scale that exists."""
    if facts.train_size < 1:
        raise ArgumentError(f"report: train_size is {facts.train_size}, the scale 1/N needs N >= 1")
    for query in results:
        for sequence in (*query.ranked, *query.bottom):
            if len(sequence.per_layer) != len(facts.layers):
                raise ArgumentError(
                    f"report: query {query.name!r}, sequence {sequence.index}: "
                    f"{len(sequence.per_layer)} layer scores for {len(facts.layers)} layers"
                )


def groups_of(results: Sequence[QueryResult]) -> dict[str, int]:
    """Groups of the shown sequences, numbered: those with the most of them, the others together."""
    found = Counter(s.group for query in results for s in (*query.ranked, *query.bottom))
    common = [group for group, _ in found.most_common(GROUPS)]
    return {group: common.index(group) if group in common else GROUPS for group in found}


def excerpts(sequence: RankedSequence) -> tuple[statistics.Span, ...]:
    """What is shown first: the whole, or the spans with the most |influence|."""
    T = len(sequence.tokens)
    width = T if T <= SHORT else SPAN
    kinds = [np.abs(np.nan_to_num(x, posinf=0, neginf=0)) for x in sequence.kinds]
    weights = np.sum([x / (x.max(initial=0.0) or 1.0) for x in kinds], axis=0)
    return statistics.spans(weights, width=max(width, 1), limit=2)


def heat(
    sequence: RankedSequence, start: int, stop: int, train_size: int
) -> Iterator[tuple[str, str, str, str]]:
    """(token, classes, influences / N, turn) of the tokens in a span; intensity relative to all.

    By position and, where they are known, by output and input token: a class and a number each.
    A turn is told where it begins, and where the span does.
    """
    begins = dict(sequence.turns)
    before = [role for at, role in sequence.turns if at <= start]
    begins |= {start: before[-1]} if before else {}
    tones = [charts.levels(x) for x in sequence.kinds]
    for t in range(start, stop):
        shown = zip(KINDS, (charts.tone(int(x[t])) for x in tones), strict=False)
        classes = " ".join(kind + tone for kind, tone in shown if tone)
        values = (text.brief(float(x[t]) / train_size) for x in sequence.kinds)
        yield sequence.tokens[t], classes, " | ".join(values), begins.get(t, "")


def heads_by_layer(sequence: RankedSequence) -> tuple[list[str], np.ndarray]:
    """Names of attention modules, the highest first, and [modules,heads] of their q, k, v and o.

    What a key or value head has is spread over the query heads that share it.
    """
    modules = tuple(dict.fromkeys(x.layer.rpartition(".")[0] for x in sequence.heads))
    found = np.zeros((len(modules), max(len(x.values) for x in sequence.heads)))
    for x in sequence.heads:
        row, many = modules.index(x.layer.rpartition(".")[0]), len(x.values)
        group = found.shape[1] // many
        found[row, : many * group] += np.repeat(x.values / group, group)
    return text.short_names(modules), found[::-1]


def row_names(layers: tuple[str, ...]) -> list[str]:
    """Labels of the layer axis, top to bottom: names, or numbers where layers are grouped."""
    groups = min(statistics.GROUPS, len(layers))
    if groups == len(layers):
        return text.short_names(layers)
    return [f"{i}{' upper' * (i == groups)}{' lower' * (i == 1)}" for i in range(groups, 0, -1)]


def tokens_by_layer(sequence: RankedSequence) -> np.ndarray | None:
    """[groups, T], the highest layers first, or None where the scan kept no such detail."""
    if sequence.per_layer_token is None:
        return None
    return statistics.layer_groups(sequence.per_layer_token)[::-1]


def sequences_by_layer(ranked: Sequence[RankedSequence]) -> np.ndarray:
    """[groups, sequences]: shares, highest layers first, columns by centre of mass (Fig. 18)."""
    depth = np.argsort([statistics.centre_of_mass(s.per_layer) for s in ranked], kind="stable")
    return np.stack([statistics.layer_shares(ranked[i].per_layer) for i in depth], axis=1)[::-1]
