"""A folder of scores, with its model's tokenizer and data, as what a report shows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..data.batches import fingerprint_like
from ..data.encoding import tokenizer_fingerprint
from ..data.examples import IGNORED, Corpus
from ..errors import StoreError
from ..stages.factors import Factors
from ..stages.queries import Queries
from ..stages.run import Stage
from ..stages.scores import NOT_ASKED, Detail, Scores
from .contents import QueryResult, RankedSequence, RunFacts, StageTime
from .text import TokenTexts
from .turns import turns

UNEVEN = 1e-3  # above it the sum of output tokens is another number than the score
LOW_ENERGY = 0.9  # below this share of its energy a rank does not represent a query
# The stages as a report names them.
SPOKEN = {
    Stage.REFERENCES: "log-probabilities of the reference",
    Stage.COVARIANCE: "covariances",
    Stage.EIGENDECOMPOSITION: "eigendecompositions",
    Stage.EIGENVALUE: "corrected eigenvalues",
    Stage.QUERIES: "prepare the queries",
    Stage.REFINEMENT: "refine the queries",
    Stage.SCAN: "scan the corpus",
    Stage.DETAIL: "details of the top sequences",
}


def stage_times(seconds: Mapping[str, float], floor: float | None = None) -> list[StageTime]:
    """What stages took, in their order and in words; `floor`: a plain pass over the scan's data."""
    return [
        StageTime(SPOKEN[stage], seconds[stage], floor if stage is Stage.SCAN else None)
        for stage in Stage
        if stage in seconds
    ]


def check_together(
    scores: Scores, factors: Factors, queries: Queries, data: Corpus, tokenizer: Any = None
) -> None:
    """Refuse a report of things that do not belong together.

    Raises:
        StoreError: the corpus, the queries, the factors or the tokenizer are not those of the scan.
    """
    if not scores.store.checked:
        return
    asked, pairs = queries.facts or {}, []
    told = scores.store.facts
    if tokenizer is not None:
        now = tokenizer_fingerprint(tokenizer)
        for facts in (told, asked):
            pairs.append(("the tokenizer", facts.get("tokenizer"), now))
    pairs.append(("the corpus", told["data"], fingerprint_like(data, told["data"])))
    pairs.append(("the queries", told["queries"], queries.identity))
    pairs.append(("the factors", asked.get("factors"), factors.identity))
    for what, then, now in pairs:
        if then not in (None, now):
            raise StoreError(
                f"{what}: not what was scored in {scores.folder} (fingerprint {then}, now {now}). "
                "Give what was scored, or score again"
            )


def collect(
    scores: Scores,
    queries: Queries,
    data: Corpus,
    tokenizer: Any,
    names: Sequence[str],
    k: int = 10,
    by: str | None = None,
    measured: str = "",
) -> tuple[QueryResult, ...]:
    """What was found for every query: its top and lowest sequences with their detail.

    by: a column of the records that was kept, to filter by.
    measured: what is asked, where it is no completion's log-probability.
    """
    groups = None if by is None else data.column(by)
    shown = Shown(data, TokenTexts(tokenizer), groups, measured)
    return tuple(_query(q, scores, queries, shown, name, k) for q, name in enumerate(names))


@dataclass(frozen=True)
class Shown:
    """What a reader is shown of a corpus: `groups` has one label a sequence, or there are none;
    `measured` is what queries ask.
    """

    data: Corpus
    texts: TokenTexts
    groups: Sequence[Any] | None
    measured: str = ""


def run_facts(
    scores: Scores,
    factors: Factors,
    queries: Queries,
    model: str,
    damping_rule: str,
    stages: Sequence[StageTime],
    settings: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
    by: str | None = None,
) -> RunFacts:
    """How the scores came about; notes say what is weak about them."""
    least = min(float(x.energy.min()) for x in queries.layers)
    if least < LOW_ENERGY:
        notes = (
            *notes,
            f"Rank {queries.rank} keeps as little as {least:.0%} of a preconditioned gradient's "
            "energy in some layer: trust no small differences; a higher rank helps.",
        )
    if (error := _unevenness(scores, len(queries))) > UNEVEN:
        notes = (
            *notes,
            f"What output tokens have of a score sums to it only to {error:.1%} of their absolute "
            "sum: the model computes in few bits.",
        )
    return RunFacts(
        model=model,
        layers=tuple(scores.layers),
        damping=queries.damping,
        damping_rule=damping_rule,
        rank=queries.rank,
        factor_sequences=factors.sequences,
        factor_tokens=factors.tokens,
        train_size=scores.train_size,
        scanned=scores.store.facts["examples"],
        stages=tuple(stages),
        settings=tuple(settings),
        notes=tuple(notes),
        trust="" if scores.trust is None else scores.trust.line,
        unattributed="" if scores.unattributed in (None, NOT_ASKED) else scores.unattributed,
        grouped_by=by or "",
    )


def _unevenness(scores: Scores, queries: int) -> float:
    """The largest difference of a score and the sum of its output tokens, over their |sum|."""
    details = (d for q in range(queries) for d in scores.details(q))
    found = (
        abs(float(d.target.sum()) - d.score) / max(float(np.abs(d.target).sum()), 1e-30)
        for d in details
        if d.target is not None
    )
    return max(found, default=0.0)


def passages(ids: Tensor, labels: Tensor) -> Iterator[tuple[bool, Tensor]]:
    """Tokens of a query in a row, and whether they are what is asked about, by turns."""
    start = 0
    for said, run in groupby((labels != IGNORED).tolist()):
        stop = start + sum(1 for _ in run)
        yield said, ids[start:stop]
        start = stop


def _query(
    q: int, scores: Scores, queries: Queries, shown: Shown, name: str, k: int
) -> QueryResult:
    ids, labels = queries.examples[q]
    runs = [(said, shown.texts(own.tolist())) for said, own in passages(ids, labels)]
    if runs and runs[0][0]:
        runs.insert(0, (False, ()))
    if len(runs) % 2:
        runs.append((True, ()))
    both = [(p, c) for (_, p), (_, c) in zip(runs[0::2], runs[1::2], strict=True)]
    full = scores.store.facts["top_k"] is None
    ranked = [_ranked(d, shown) for d in scores.details(q)[:k]]
    lowest = [d for d in scores.details(q, lowest=True) if d.score < 0]
    return QueryResult(
        name=name,
        prompt_tokens=both[0][0],
        completion_tokens=both[0][1],
        further=tuple(both[1:]),
        measured=shown.measured,
        log_probability=-float(queries.measurements[q]),
        ranked=tuple(ranked),
        bottom=tuple(_ranked(d, shown) for d in lowest[:k]),
        scores=np.asarray(scores.matrix[q]) if full else None,
    )


def label_of(record: Mapping[str, Any] | None) -> str:
    """The label that a record of a classifier's data has, if it is one of the whole."""
    label = None if record is None else record.get("label")
    return "" if label is None else str(label)


def _ranked(detail: Detail, shown: Shown) -> RankedSequence:
    data, groups = shown.data, shown.groups
    example, record = data[detail.index], data.record(detail.index)
    ids = example["input_ids"][: detail.per_layer_token.shape[1]]
    tokens = shown.texts(ids.tolist())
    sides = ((0, "chosen"), (int(example["sides"][0]), "rejected")) if "sides" in example else ()
    return RankedSequence(
        index=detail.index,
        score=detail.score,
        tokens=tokens,
        per_token=detail.per_token,
        per_layer=detail.per_layer,
        per_layer_token=detail.per_layer_token,
        source=Path(data.source(detail.index)).name,
        candidate_rank=detail.candidate_rank,
        per_target=detail.target,
        per_input=detail.input,
        heads=detail.heads,
        turns=sides or turns(record, tokens),
        label=label_of(record),
        group="" if groups is None else str(groups[detail.index]),
    )
